"""Small data and networks for the command line, made once."""

from __future__ import annotations

import keras
import numpy as np
import pytest


def network(outputs, activation=None, seed=0):
    """One hidden layer on images of 4 x 4 pixels."""
    image = keras.Input((4, 4, 1), name="image")
    hidden = keras.layers.Dense(
        8, "relu", name="fc1", kernel_initializer=keras.initializers.GlorotUniform(seed)
    )(keras.layers.Flatten()(image))
    last = keras.layers.Dense(
        outputs, activation, name="out", kernel_initializer=keras.initializers.GlorotUniform(seed)
    )
    return keras.Model(image, last(hidden), name="net")


def save_npz(path, x, y):
    np.savez(path, x_train=x[:64], y_train=y[:64], x_test=x[64:], y_test=y[64:])


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A folder with data of every kind and networks for them."""
    folder = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 96)
    x = rng.normal(0.2, 0.05, (96, 4, 4, 1)).clip(0, 1).astype("float32")
    x[y == 1, :, 2:] += 0.6
    mean = x.mean(axis=(1, 2, 3))
    kinds = {
        "bars": y,
        "text": np.array(["left", "right"])[y],
        "several": np.stack([y, mean > 0.5, x[:, 0, 0, 0] > 0.2], axis=1).astype("int64"),
        "values": mean,
        "onehot": np.eye(2)[y],
        "ten": np.arange(96) % 10,
    }
    for name, labels in kinds.items():
        save_npz(folder / f"{name}.npz", x, labels)
    for outputs in (1, 2, 3):
        network(outputs).save(folder / f"out{outputs}.keras")
    network(1, "sigmoid").save(folder / "sigmoid.keras")
    network(2, "softmax").save(folder / "softmax.keras")
    return folder
