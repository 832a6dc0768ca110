"""Gates placed by hand: a residual network whose author decides what may be pruned.

    python examples/build_gated_by_hand.py --output_dir=runs/by_hand

A gate belongs on the data input of a Dense or convolution layer: there a closed channel changes
nothing else, whatever activation or normalization came before. `kp.layers.GatedConv2D` and
`GatedDense` bring their own gate; one `NeuronGate` in front of two layers is shared by both.
"""

from __future__ import annotations

import sys
from pathlib import Path

import keras
from absl import app, flags
from keras import layers

import tf_kfacprune as kp
from tf_kfacprune import reporting

FLAGS = flags.FLAGS
flags.DEFINE_string("data", "digits", "digits, mnist, fashion_mnist, cifar10, or an .npz file.")
flags.DEFINE_string("data_dir", None, "Folder with the data; Keras downloads them without it.")
flags.DEFINE_float("budget_macs", 0.2, "Fraction of the multiply-accumulates to keep.")
flags.DEFINE_float("budget_params", None, "Fraction of the parameters to keep.")
flags.DEFINE_enum("policy", "hard_concrete", ["hard_concrete", "proximal"], "How gates close.")
flags.DEFINE_integer("epochs", 30, "Passes over the data.", lower_bound=1)
flags.DEFINE_integer("batch_size", 32, "Examples per step.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Seed of everything random.")
flags.DEFINE_string("output_dir", None, "Folder for the model and the record.", required=True)
flags.DEFINE_bool("overwrite", False, "Replace results that exist already.")


def gated_network(shape: tuple[int, ...], classes: int) -> keras.Model:
    """A residual block with its inner channels and its stream gated, then two dense layers."""
    inputs = keras.Input(shape, name="image")
    stream = layers.Conv2D(32, 3, padding="same", name="stem")(inputs)
    stream = layers.ReLU(name="stem_relu")(layers.BatchNormalization(name="stem_bn")(stream))

    kind = "hard_concrete" if FLAGS.policy == "hard_concrete" else "deterministic"

    # The stream's channels are read by the block's first convolution and, after the addition,
    # by the next one: each reader has a gate, and a channel goes once all of them are closed.
    y = kp.layers.GatedConv2D(48, 3, padding="same", gate=kind, activation="relu", name="block_a")(
        stream
    )
    y = kp.layers.GatedConv2D(32, 3, padding="same", gate=kind, name="block_b")(y)
    stream = layers.ReLU(name="block_relu")(layers.Add(name="block_add")([stream, y]))

    stream = layers.MaxPooling2D(name="pool")(stream)
    head = kp.layers.GatedConv2D(64, 3, padding="same", gate=kind, activation="relu", name="head")(
        stream
    )
    features = layers.GlobalAveragePooling2D(name="average")(head)
    gate = kp.layers.NeuronGate(kind=kind, name="features_gate")
    return keras.Model(inputs, layers.Dense(classes, name="logits")(gate(features)))


def run() -> None:
    """Everything from data to files."""
    out = Path(FLAGS.output_dir)
    if out.exists() and not FLAGS.overwrite:
        raise kp.errors.ExportError(f"{out} already exists. Choose another, or pass --overwrite.")
    budget = kp.Budget(macs=FLAGS.budget_macs, params=FLAGS.budget_params)
    keras.utils.set_random_seed(FLAGS.seed)
    data = kp.data.load(FLAGS.data, FLAGS.data_dir)
    model = gated_network(data.input_shape, data.num_classes)
    print(reporting.inspect(model))

    # A model that has gates already is taken as it is.
    pm = kp.PrunableModel(model, budget=budget, policy=FLAGS.policy, seed=FLAGS.seed)
    pm.compile(
        optimizer=kp.KFAC(),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    pm.fit(data.x_train, data.y_train, batch_size=FLAGS.batch_size, epochs=FLAGS.epochs, verbose=2)
    small = kp.compact(pm)
    small.summary()
    kp.export.tflite(
        small, out / "compact.tflite", overwrite=FLAGS.overwrite, verify_data=data.x_test[:256]
    )
    comparison = reporting.report(pm, small, data=(data.x_test, data.y_test))
    record = reporting.record(
        comparison,
        data=data.name,
        seed=FLAGS.seed,
        budget=budget.targets,
        policy=FLAGS.policy,
        epochs=FLAGS.epochs,
        batch_size=FLAGS.batch_size,
    )
    reporting.write_json_atomic(out / "record.json", record, overwrite=FLAGS.overwrite)
    print(comparison)
    print(f"Wrote {out}")


def main(_: list[str]) -> None:
    """One clear line for every foreseen error."""
    try:
        run()
    except kp.errors.KFACPruneError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
