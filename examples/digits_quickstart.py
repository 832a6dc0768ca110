"""Train a dense network and a pruned one on a small data set, export, and compare.

    python examples/digits_quickstart.py --output_dir=runs/digits

needs no download and takes about two minutes. Any other data set or network goes the same way:

    python examples/digits_quickstart.py --data=mnist --model=lenet5 --output_dir=runs/mnist
"""

from __future__ import annotations

import sys
from pathlib import Path

import keras
from absl import app, flags

import tf_kfacprune as kp
from tf_kfacprune import reporting, zoo

FLAGS = flags.FLAGS
flags.DEFINE_string("data", "digits", "digits, mnist, fashion_mnist, cifar10, or an .npz file.")
flags.DEFINE_string("data_dir", None, "Folder with the data; Keras downloads them without it.")
flags.DEFINE_string("model", "digits_cnn", f"{', '.join(zoo.NAMES)}, or a .keras file.")
flags.DEFINE_float("budget_macs", 0.12, "Fraction of the multiply-accumulates to keep.")
flags.DEFINE_float("budget_params", None, "Fraction of the parameters to keep.")
flags.DEFINE_integer("epochs", 30, "Passes over the data.", lower_bound=1)
flags.DEFINE_integer("batch_size", 32, "Examples per step.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Seed of everything random.")
flags.DEFINE_string("output_dir", None, "Folder for the models and the record.", required=True)
flags.DEFINE_bool("overwrite", False, "Replace results that exist already.")

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def network(data: kp.data.Dataset) -> keras.Model:
    """The network that --model names: built in, or from a file of the user's."""
    if FLAGS.model.endswith(".keras"):
        return kp.export.load_keras(FLAGS.model)
    return zoo.build(FLAGS.model, data.input_shape, data.num_classes, FLAGS.seed)


def trained(model: keras.Model, x, y, budget: kp.Budget | None) -> kp.PrunableModel:
    """Trains from random weights; with a budget it prunes in the same run."""
    pm = kp.PrunableModel(model, budget=budget, seed=FLAGS.seed)
    pm.compile(loss=LOSS, metrics=["accuracy"])
    pm.fit(x, y, batch_size=FLAGS.batch_size, epochs=FLAGS.epochs, verbose=2)
    return pm


def run() -> None:
    """Everything from data to files."""
    out = Path(FLAGS.output_dir)
    if out.exists() and not FLAGS.overwrite:
        raise kp.errors.ExportError(f"{out} already exists. Choose another, or pass --overwrite.")
    budget = kp.Budget(macs=FLAGS.budget_macs, params=FLAGS.budget_params)
    keras.utils.set_random_seed(FLAGS.seed)
    data = kp.data.load(FLAGS.data, FLAGS.data_dir)
    dense = network(data)
    shape = dense.input_shape[1:]  # a network of dense layers takes images flattened
    x_train, x_test = data.x_train.reshape(-1, *shape), data.x_test.reshape(-1, *shape)

    print("Training the dense network")
    trained(dense, x_train, data.y_train, budget=None)
    print("Training and pruning at the same time")
    pm = trained(network(data), x_train, data.y_train, budget)

    small = kp.compact(pm)  # an ordinary keras.Model, verified equal to pm
    kp.export.keras_file(small, out / "compact.keras", overwrite=FLAGS.overwrite)
    kp.export.saved_model(
        small, out / "saved_model", overwrite=FLAGS.overwrite, verify_data=x_test[:256]
    )
    comparison = reporting.report(pm, small, dense=dense, data=(x_test, data.y_test))
    record = reporting.record(
        comparison,
        data=data.name,
        seed=FLAGS.seed,
        budget=budget.targets,
        model=FLAGS.model,
        epochs=FLAGS.epochs,
        batch_size=FLAGS.batch_size,
    )
    reporting.write_json_atomic(out / "record.json", record, overwrite=FLAGS.overwrite)
    kp.export.tflite(
        small,
        out / "compact.tflite",
        overwrite=FLAGS.overwrite,
        verify_data=x_test[:256],
        metadata=kp.export.Metadata.of_record(record, labels=data.labels, scale=data.scale),
    )
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
