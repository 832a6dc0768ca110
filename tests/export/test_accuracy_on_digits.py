"""On real data every format predicts what the Keras model predicts."""

from __future__ import annotations

import keras
import pytest

from tf_kfacprune.data import load
from tf_kfacprune.export import benchmark


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(scope="module")
def trained(digits):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1), name="image"),
            keras.layers.Conv2D(12, 3, padding="same", use_bias=False),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss, metrics=["accuracy"], jit_compile=False)
    model.fit(digits.x_train, digits.y_train, batch_size=64, epochs=4, verbose=0)
    return model


@pytest.mark.slow
def test_every_format_keeps_the_accuracy(trained, digits):
    _, expected = trained.evaluate(digits.x_test, digits.y_test, verbose=0)
    assert expected > 0.9
    measured = benchmark(
        {"net": trained},
        quantizations=(None, "float16", "dynamic", "int8", "int16x8"),
        representative_data=digits.x_train,
        data=(digits.x_test, digits.y_test),
        blocks=1,
    )
    assert measured.failures == ()
    # One of the 360 test digits is 0.28 points.
    allowed = {None: 0.0, "float16": 0.0, "dynamic": 0.3, "int8": 0.6, "int16x8": 0.3}
    for row in measured.rows:
        points = 100 * abs(row.accuracy - expected)
        assert points <= allowed[row.quantization] + 1e-4, row
