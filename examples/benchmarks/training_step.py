"""Cost of one training step, as a ratio to plain Keras with Adam on the same network.

    python examples/benchmarks/training_step.py

All variants train LeNet-5-Caffe in one process, in turns (one block of steps each, many rounds),
while the gates of the pruned variants are moving. Each ratio is the median over rounds; appends
one line to `results/training_step.jsonl`.
"""

import gc
import json
import platform
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import tf_kfacprune as kp

BATCH = flags.DEFINE_integer("batch", 256, "Batch size.")
BLOCK = flags.DEFINE_integer("block", 50, "Steps per block; a multiple of the periods.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Blocks per variant.")
OUTPUT = flags.DEFINE_string("output", None, "JSONL file; default: results/ beside this script.")

MANY_STEPS = 10**6
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def pruning_model(optimizer, curvature=None):
    """A pruned LeNet-5 in the middle of its pruning phase."""
    model = kp.PrunableModel(kp.zoo.lenet5(seed=0), budget=kp.Budget(macs=0.1), curvature=curvature)
    model.compile(optimizer, loss=LOSS, metrics=["accuracy"])
    model.plan_phases(MANY_STEPS)
    model.controller.step.assign(int(0.3 * MANY_STEPS))
    return model


def plain_model(optimizer):
    """The same network as a plain Keras model."""
    model = kp.zoo.lenet5(seed=0)
    model.compile(optimizer, loss=LOSS, metrics=["accuracy"])
    return model


def main(argv):
    """Times the variants in turns and prints and appends the ratios."""
    del argv
    keras.utils.set_random_seed(0)
    variants = {
        "keras + adam": plain_model(keras.optimizers.Adam(1e-3)),
        "prunable + adam": pruning_model(keras.optimizers.Adam(1e-3)),
        "prunable + kfac": pruning_model(kp.KFAC(1e-3, factor_every=10, inverse_every=50)),
        "prunable + kfac + spectral radius": pruning_model(
            kp.KFAC(1e-3, factor_every=10, inverse_every=50),
            kp.SpectralRadius(1e-5, every=4, batch_fraction=0.25),
        ),
    }
    rng = np.random.default_rng(0)
    x = tf.constant(rng.uniform(size=(BATCH.value, 28, 28, 1)), tf.float32)
    y = tf.constant(rng.integers(0, 10, BATCH.value), tf.int32)
    iterator = iter(tf.data.Dataset.from_tensors((x, y)).repeat())
    times = {name: [] for name in variants}
    for model in variants.values():
        model.make_train_function()
        for _ in range(3):
            model.train_function(iterator)
    gc.disable()
    for _ in range(ROUNDS.value):
        for name, model in variants.items():
            start = time.perf_counter()
            for _ in range(BLOCK.value):
                model.train_function(iterator)
            times[name].append(time.perf_counter() - start)
    reference = np.array(times["keras + adam"])
    ratios = {name: float(np.median(np.array(t) / reference)) for name, t in times.items()}
    for name, ratio in ratios.items():
        print(f"{name:<36} {ratio:5.2f}x   {1e3 * np.median(times[name]) / BLOCK.value:7.2f} ms")
    record = {
        "network": "lenet5",
        "batch": BATCH.value,
        "ratio_to_keras_adam": {name: round(r, 3) for name, r in ratios.items()},
        "rounds": ROUNDS.value,
        "steps_per_block": BLOCK.value,
        "keras": keras.__version__,
        "tensorflow": tf.__version__,
        "machine": platform.machine(),
    }
    path = Path(OUTPUT.value or Path(__file__).parent / "results" / "training_step.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    app.run(main)
