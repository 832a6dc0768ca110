"""LeNet-300-100 and LeNet-5-Caffe on MNIST: train and prune in one run, then measure.

    python examples/mnist_lenet.py --model=lenet300 --data_dir=DIR --budget_macs=0.06 --epochs=40
    python examples/mnist_lenet.py --model=lenet5 --data_dir=DIR --budget_params=0.03 --epochs=40

DIR holds mnist.npz; Keras downloads it without --data_dir. Input pixels of lenet300 are neurons
too. Choose settings with --validation=10000, which holds out the last training examples; the test
set is measured once, after the last epoch, without it.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import keras
from absl import app, flags

import tf_kfacprune as kp
from tf_kfacprune import reporting, zoo

FLAGS = flags.FLAGS
flags.DEFINE_string("data", "mnist", "digits, mnist, fashion_mnist, cifar10, or an .npz file.")
flags.DEFINE_string("data_dir", None, "Folder with the data; Keras downloads them without it.")
flags.DEFINE_string("model", "lenet300", f"{', '.join(zoo.NAMES)}, or a .keras file.")
flags.DEFINE_float("budget_macs", None, "Fraction of the multiply-accumulates to keep.")
flags.DEFINE_float("budget_params", None, "Fraction of the parameters to keep.")
flags.DEFINE_bool("prune_inputs", None, "Prune input features; by default with flat inputs.")
flags.DEFINE_float("curvature", 0.0, "Strength of the spectral-radius penalty.", lower_bound=0.0)
flags.DEFINE_integer("epochs", 40, "Passes over the data.", lower_bound=1)
flags.DEFINE_integer("batch_size", 128, "Examples per step.", lower_bound=1)
flags.DEFINE_float("learning_rate", 3e-2, "Learning rate of K-FAC.")
flags.DEFINE_float("weight_decay", 0.03, "Decoupled weight decay of K-FAC.")
flags.DEFINE_integer("validation", 0, "Hold out so many training examples.", lower_bound=0)
flags.DEFINE_bool("compare_dense", False, "Train the dense network too, for the table.")
flags.DEFINE_integer("seed", 0, "Seed of everything random.")
flags.DEFINE_string("output_dir", "runs/mnist_lenet", "Folder for the models and the record.")
flags.DEFINE_bool("overwrite", False, "Replace results that exist already.")

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def network(data: kp.data.Dataset) -> keras.Model:
    """The network that --model names: built in, or from a file of the user's."""
    if FLAGS.model.endswith(".keras"):
        return kp.export.load_keras(FLAGS.model)
    return zoo.build(FLAGS.model, data.input_shape, data.num_classes, FLAGS.seed)


def trained(pm: kp.PrunableModel, x, y) -> kp.PrunableModel:
    """Compiles and fits."""
    optimizer = kp.KFAC(FLAGS.learning_rate, weight_decay=FLAGS.weight_decay)
    pm.compile(optimizer=optimizer, loss=LOSS, metrics=["accuracy"])
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
    if FLAGS.validation:
        data = kp.data.validation_split(data, FLAGS.validation)
    model = network(data)
    shape = model.input_shape[1:]
    x_train, x_test = data.x_train.reshape(-1, *shape), data.x_test.reshape(-1, *shape)

    dense = None
    if FLAGS.compare_dense:
        dense = network(data)
        trained(kp.PrunableModel(dense, seed=FLAGS.seed), x_train, data.y_train)
    pm = kp.PrunableModel(
        model,
        budget=budget,
        curvature=kp.SpectralRadius(FLAGS.curvature) if FLAGS.curvature else None,
        prune_inputs=len(shape) == 1 if FLAGS.prune_inputs is None else FLAGS.prune_inputs,
        seed=FLAGS.seed,
    )
    trained(pm, x_train, data.y_train)
    small = kp.compact(pm)
    where = {"overwrite": FLAGS.overwrite, "verify_data": x_test[:256]}
    kp.export.saved_model(small, out / "saved_model", **where)
    kp.export.tflite(small, out / "compact.tflite", **where)
    comparison = reporting.report(pm, small, dense=dense, data=(x_test, data.y_test))
    settings = ("model", "epochs", "batch_size", "learning_rate", "weight_decay", "curvature")
    record = reporting.record(
        comparison,
        data=data.name,
        seed=FLAGS.seed,
        budget=budget.targets,
        weights=kernel_weights(small),
        **{name: FLAGS[name].value for name in settings},
    )
    reporting.write_json_atomic(out / "record.json", record, overwrite=FLAGS.overwrite)
    print(comparison)
    print(f"Weights without biases: {kernel_weights(small):,}")
    print(f"Error: {100 * (1 - comparison.compact.accuracy):.2f} %")
    print(f"Wrote {out}")


def kernel_weights(model: keras.Model) -> int:
    """Number of weights without biases, as the literature counts them."""
    return sum(math.prod(w.shape) for w in model.trainable_weights if w.name == "kernel")


def main(_: list[str]) -> None:
    """One clear line for every foreseen error."""
    try:
        run()
    except kp.errors.KFACPruneError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
