"""Every Python snippet of every page runs, in the order of the page."""

from __future__ import annotations

import re
from pathlib import Path

import keras
import numpy as np
import pytest

import tf_kfacprune as kp

DOCS = Path(__file__).parents[2] / "docs"
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def data(classes=2, features=8):
    """Few examples, of which the first feature tells the class."""
    x = np.random.default_rng(0).normal(size=(64, features)).astype("float32")
    return x, (np.abs(x[:, 0]) * classes).astype("int64") % classes


def network(classes=2, features=8):
    return keras.Sequential(
        [
            keras.Input((features,), name="x"),
            keras.layers.Dense(16, activation="relu", name="hidden"),
            keras.layers.Dense(classes, name="head"),
        ]
    )


def cross_entropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def nothing():
    """The page begins with nothing but its own imports."""
    return {}


def a_network():
    return {"kp": kp, "network": network()}


def a_wide_network():
    """Wide enough that most of its time is arithmetic, which pruning can take away."""
    layers = [keras.layers.Dense(1024, activation="relu") for _ in range(2)]
    net = keras.Sequential([keras.Input((784,)), *layers, keras.layers.Dense(10)])
    return {"kp": kp, "network": net}


def blocks_of_three():
    """A network with the names of layers that the page uses."""
    x = keras.Input((64,))
    y = keras.layers.Dense(512, activation="relu", name="block3_in")(x)
    y = keras.layers.Dense(8, activation="relu", name="block3_out")(y)
    return {"kp": kp, "network": keras.Model(x, keras.layers.Dense(4, name="head")(y))}


def for_training():
    x, y = data()
    model = network()
    names = {"kp": kp, "keras": keras, "network": model, "model": model, "loss": cross_entropy()}
    return {**names, "x": x, "y": y}


def on_two_devices():
    x, y = data(10, 784)
    return {"x_train": x, "y_train": y}


def ready_for_training():
    x, y = data()
    pm = kp.PrunableModel(network(), kp.Budget(macs=0.5), policy="magnitude", seed=0)
    pm.compile("adam", cross_entropy(), metrics=["accuracy"])
    names = {"kp": kp, "keras": keras, "pm": pm}
    return {**names, "x_train": x, "y_train": y, "x_test": x, "y_test": y}


def pruned():
    tf_keras = pytest.importorskip("tf_keras")
    pytest.importorskip("tensorflow_model_optimization")
    x, y = data()
    pm = kp.PrunableModel(network(), kp.Budget(macs=0.5))
    pm.controller.land()
    return {
        "network": network(),
        "pm": pm,
        "small": kp.compact(pm),
        "build": lambda unroll: keras.models.clone_model(kp.compact(pm)),  # nothing is recurrent
        "loss": tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        **{"x_train": x, "y_train": y, "x_test": x, "y_test": y},
    }


# What a page takes for granted. Pages that train by K-FAC, or quantize, take tens of seconds.
SLOW = pytest.mark.slow
PAGES = {
    "budgets": (a_wide_network, SLOW),
    "channels": (blocks_of_three, ()),
    "command_line": (nothing, ()),
    "deploy": (pruned, SLOW),
    "distribution": (on_two_devices, SLOW),
    "flatness": (for_training, SLOW),
    "frontier": (nothing, ()),
    "no_gain": (a_network, ()),
    "optimizer": (for_training, SLOW),
    "policies": (nothing, ()),
    "pretrained": (nothing, SLOW),
    "tutorial": (nothing, SLOW),
    "watching": (ready_for_training, SLOW),
}


def test_every_page_is_run():
    assert sorted(PAGES) == sorted(page.stem for page in DOCS.glob("*.md"))


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=marks) for page, (_, marks) in PAGES.items()]
)
def test_snippets_of_a_page_run_as_printed(page, tmp_path, monkeypatch):
    names = PAGES[page][0]()
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    # One folder for the page: its snippets read what those before have written.
    monkeypatch.chdir(tmp_path)
    for number, snippet in enumerate(SNIPPET.findall(text)):
        exec(compile(snippet, f"{page}.md, snippet {number + 1}", "exec"), names)
