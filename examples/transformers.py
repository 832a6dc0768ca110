"""Transformers of keras_hub on data that are already there: train and prune in one run, export.

    python examples/transformers.py --task=characters --budget_macs=0.5 --output_dir=runs/gpt2

A ViT reads handwritten digits, a BERT names the package that a piece of source code is from, and a
GPT-2 writes docstrings; see benchmarks/transformer_tasks.py. Choose settings with --validation,
which holds out a fifth of the training data in place of the test data. Needs the extra `[hub]`.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import keras
from absl import app, flags

import tf_kfacprune as kp
from tf_kfacprune import reporting

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

from transformer_tasks import TASKS, data, network

FLAGS = flags.FLAGS
flags.DEFINE_enum("task", "digits", TASKS, "What is learned.")
flags.DEFINE_integer("hidden", 64, "Width of the dense network, a multiple of 4.", lower_bound=4)
flags.DEFINE_float("budget_macs", 0.5, "Fraction of the multiply-accumulates to keep.")
flags.DEFINE_integer("epochs", 20, "Passes over the data.", lower_bound=1)
flags.DEFINE_integer("batch_size", 64, "Examples per step.", lower_bound=1)
flags.DEFINE_float("learning_rate", 3e-3, "Learning rate of K-FAC.")
flags.DEFINE_float("weight_decay", 0.03, "Decoupled weight decay of K-FAC.")
flags.DEFINE_integer("examples", None, "Use so many training examples; default: all.")
flags.DEFINE_bool("validation", False, "Hold out a fifth of the training data as test data.")
flags.DEFINE_integer("seed", 0, "Seed of everything random.")
flags.DEFINE_string("output_dir", "runs/transformers", "Folder for the models and the record.")
flags.DEFINE_bool("overwrite", False, "Replace results that exist already.")

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def trained(model: keras.Model, x, y, budget: kp.Budget | None) -> kp.PrunableModel:
    """Trains from random weights; with a budget it prunes in the same run.

    The learning rate falls along a cosine: by itself while a pruned network settles.
    """
    pm = kp.PrunableModel(model, budget=budget, seed=FLAGS.seed)
    rate = FLAGS.learning_rate
    if budget is None:
        steps = FLAGS.epochs * math.ceil(len(x) / FLAGS.batch_size)
        rate = keras.optimizers.schedules.CosineDecay(rate, steps)
    optimizer = kp.KFAC(rate, weight_decay=FLAGS.weight_decay)
    pm.compile(optimizer=optimizer, loss=LOSS, metrics=["accuracy"])
    pm.fit(x, y, batch_size=FLAGS.batch_size, epochs=FLAGS.epochs, verbose=2)
    return pm


def measured(model: keras.Model, x, y) -> dict[str, float]:
    """Loss in nats and the share of wrong answers."""
    model.compile(loss=LOSS, metrics=["accuracy"])
    found = model.evaluate(x, y, batch_size=256, verbose=0, return_dict=True)
    return {"loss": found["loss"], "error": 1 - found["accuracy"]}


def run() -> None:
    """Everything from data to files."""
    out = Path(FLAGS.output_dir)
    if out.exists() and not FLAGS.overwrite:
        raise kp.errors.ExportError(f"{out} already exists. Choose another, or pass --overwrite.")
    budget = kp.Budget(macs=FLAGS.budget_macs)
    keras.utils.set_random_seed(FLAGS.seed)
    x, y, x_test, y_test = data(FLAGS.task, FLAGS.examples, FLAGS.validation)
    pm = trained(network(FLAGS.task, FLAGS.hidden), x, y, budget)
    small = kp.compact(pm)  # verified equal to pm
    where = {"overwrite": FLAGS.overwrite, "verify_data": x_test[:64]}
    kp.export.saved_model(small, out / "saved_model", **where)
    kp.export.tflite(small, out / "compact.tflite", **where)
    dense = network(FLAGS.task, FLAGS.hidden)  # for its size and time
    comparison = reporting.report(pm, small, dense=dense)
    settings = ("hidden", "epochs", "batch_size", "learning_rate", "weight_decay", "seed")
    given = {name: FLAGS[name].value for name in settings}
    test = measured(small, x_test, y_test)
    given |= {"data": FLAGS.task, "budget": budget.targets, "test": test}
    record = reporting.record(comparison, **given)
    reporting.write_json_atomic(out / "record.json", record, overwrite=FLAGS.overwrite)
    print(comparison)
    print(f"Loss {test['loss']:.4f}, error {100 * test['error']:.2f} %")
    print(f"Wrote {out}")


def main(_: list[str]) -> None:
    """One clear line for every foreseen error."""
    try:
        run()
    except kp.errors.KFACPruneError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
