"""Transformers of keras_hub on data that are already there: train and prune in one run, export.

    python examples/transformers.py --task=characters --budget_macs=0.5 --output_dir=runs/gpt2

    digits      a ViT on the handwritten digits of scikit-learn
    packages    a BERT that reads 32 words of source code and names the package they are from
    characters  a GPT-2 that predicts the next character of docstrings

Texts are those of Python's own standard library. Choose settings with --validation, which trains
on the first 80 % of the training data and tests on the rest. Needs the extra `[hub]`.
"""

from __future__ import annotations

import ast
import re
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import keras
import numpy as np
from absl import app, flags

import tf_kfacprune as kp
from tf_kfacprune import reporting

FLAGS = flags.FLAGS
flags.DEFINE_enum("task", "digits", ["digits", "packages", "characters"], "What is learned.")
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

PACKAGES = ["asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml"]
LENGTHS, VOCABULARY = {"packages": 32, "characters": 64}, 1000
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def sources(package: str) -> list[str]:
    """The source files of a package of the standard library."""
    files = sorted((Path(sysconfig.get_paths()["stdlib"]) / package).rglob("*.py"))
    return [path.read_text(encoding="utf-8") for path in files]


def windows(tokens: list[int], length: int) -> np.ndarray:
    """Tokens cut into pieces of a length."""
    count = len(tokens) // length
    return np.array(tokens[: count * length], "int32").reshape(count, length)


def packages() -> tuple[np.ndarray, np.ndarray]:
    """Words of source code, and the packages they are from."""
    words = [re.findall(r"\w+|[^\w\s]", "\n".join(sources(package))) for package in PACKAGES]
    known = Counter(word for part in words for word in part).most_common(VOCABULARY - 1)
    number = {word: place for place, (word, _) in enumerate(known, start=1)}
    pieces = [windows([number.get(w, 0) for w in part], LENGTHS["packages"]) for part in words]
    pieces = [piece[:1000] for piece in pieces]
    return np.concatenate(pieces), np.repeat(np.arange(len(PACKAGES)), [*map(len, pieces)])


def characters() -> tuple[np.ndarray, np.ndarray]:
    """Characters of docstrings, and the ones that follow them."""
    nodes = [node for p in PACKAGES for text in sources(p) for node in ast.walk(ast.parse(text))]
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    texts = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]
    codes = [min(ord(character), 127) for character in "\n\n".join(filter(None, texts))]
    pieces = windows(codes, LENGTHS["characters"] + 1)
    return pieces[:, :-1], pieces[:, 1:]


def data(task: str) -> tuple[np.ndarray, ...]:
    """Training and test data, `x_train, y_train, x_test, y_test`."""
    if task == "digits":
        digits = kp.data.load("digits")
        parts = (digits.x_train, digits.y_train, digits.x_test, digits.y_test)
    else:
        x, y = {"packages": packages, "characters": characters}[task]()
        order = np.random.default_rng(0).permutation(len(x))
        train, test = np.split(order, [4 * len(x) // 5])
        parts = (x[train], y[train], x[test], y[test])
    x, y = parts[0][: FLAGS.examples], parts[1][: FLAGS.examples]
    kept = 4 * len(x) // 5
    return (x[:kept], y[:kept], x[kept:], y[kept:]) if FLAGS.validation else (x, y, *parts[2:])


def network(task: str, hidden: int) -> keras.Model:
    """A transformer of two layers with a Dense layer behind it."""
    import keras_hub

    size = {"num_layers": 2, "num_heads": 4, "hidden_dim": hidden}
    if task == "digits":
        image = keras.Input((8, 8, 1), name="image")
        vit = keras_hub.models.ViTBackbone(
            image_shape=(8, 8, 1), patch_size=(2, 2), mlp_dim=2 * hidden, **size
        )
        return keras.Model(image, keras.layers.Dense(10, name="digit")(vit(image)[:, 0]))
    size |= {"intermediate_dim": 2 * hidden, "max_sequence_length": LENGTHS[task]}
    tokens = keras.Input((LENGTHS[task],), dtype="int32", name="tokens")
    inputs = {"token_ids": tokens, "padding_mask": keras.ops.ones_like(tokens)}
    if task == "packages":
        bert = keras_hub.models.BertBackbone(vocabulary_size=VOCABULARY, **size)
        read = bert({**inputs, "segment_ids": keras.ops.zeros_like(tokens)})["pooled_output"]
        return keras.Model(tokens, keras.layers.Dense(len(PACKAGES), name="package")(read))
    gpt2 = keras_hub.models.GPT2Backbone(vocabulary_size=128, **size)
    return keras.Model(tokens, keras.layers.Dense(128, name="character")(gpt2(inputs)))


def trained(model: keras.Model, x, y, budget: kp.Budget | None) -> kp.PrunableModel:
    """Trains from random weights; with a budget it prunes in the same run."""
    pm = kp.PrunableModel(model, budget=budget, seed=FLAGS.seed)
    optimizer = kp.KFAC(FLAGS.learning_rate, weight_decay=FLAGS.weight_decay)
    pm.compile(optimizer=optimizer, loss=LOSS, metrics=["accuracy"])
    pm.fit(x, y, batch_size=FLAGS.batch_size, epochs=FLAGS.epochs, verbose=2)
    return pm


def run() -> None:
    """Everything from data to files."""
    out = Path(FLAGS.output_dir)
    if out.exists() and not FLAGS.overwrite:
        raise kp.errors.ExportError(f"{out} already exists. Choose another, or pass --overwrite.")
    budget = kp.Budget(macs=FLAGS.budget_macs)
    keras.utils.set_random_seed(FLAGS.seed)
    x, y, x_test, y_test = data(FLAGS.task)
    pm = trained(network(FLAGS.task, FLAGS.hidden), x, y, budget)
    small = kp.compact(pm)  # verified equal to pm
    where = {"overwrite": FLAGS.overwrite, "verify_data": x_test[:64]}
    kp.export.saved_model(small, out / "saved_model", **where)
    kp.export.tflite(small, out / "compact.tflite", **where)
    comparison = reporting.report(pm, small, data=(x_test, y_test))
    settings = ("task", "hidden", "epochs", "batch_size", "learning_rate", "weight_decay", "seed")
    record = reporting.record(
        comparison, budget=budget.targets, **{name: FLAGS[name].value for name in settings}
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
