"""One default penalty for all: small networks of many kinds, with and without it.

    python examples/benchmarks/flatness_tasks.py --data_dir=DIR [--tasks=text] [--penalties=0,1e-4]

Every task is trained with the same optimizer and settings without the penalty and with its default
strength (a tenth of it and ten times it: `--penalties=1e-5,1e-3`). Some are pruned at the same
time, as in `frontier.py`. Nothing is chosen by the test set: rate and decay of `KFAC` are those of
`PrunableModel`, the epochs were set before any run. Each finished run appends one line to
`results/flatness_tasks.jsonl`; what is in there is not run again.
"""

import dataclasses
import time
from collections.abc import Callable

import frontier
import keras
import numpy as np
from absl import app, flags
from peers import SharedStarts
from records import Records
from text_task import manual_text, text_network

import tf_kfacprune as kp

TASK_NAMES = flags.DEFINE_list("tasks", None, "Names of tasks; default: all of them.")
PENALTIES = flags.DEFINE_list("penalties", ["0", "1e-4"], "Strengths of the penalty; 0 for none.")

LEARNING_RATE, WEIGHT_DECAY = 3e-2, 0.03
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
PIXELS, EXAMINED, SEEDS = 8, 2000, range(5)


def conv_bn(seed):
    """Three convolutions with BatchNormalization."""
    layers = [keras.Input((PIXELS, PIXELS, 1))]
    for k, (filters, stride) in enumerate([(16, 1), (32, 2), (32, 2)]):
        layers += [
            keras.layers.Conv2D(
                filters, 3, strides=stride, padding="same", use_bias=False,
                kernel_initializer=keras.initializers.GlorotUniform(10 * seed + k),
            ),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.ReLU(),
        ]  # fmt: skip
    return keras.Sequential([*layers, keras.layers.GlobalAveragePooling2D(), output(seed)])


def mlp(seed):
    """Two hidden layers."""
    layers = [keras.Input((PIXELS, PIXELS, 1)), keras.layers.Flatten()]
    for k, units in enumerate([64, 32]):
        initializer = keras.initializers.GlorotUniform(10 * seed + k)
        layers.append(keras.layers.Dense(units, "relu", kernel_initializer=initializer))
    return keras.Sequential([*layers, output(seed)])


def vision_transformer(seed):
    """Sixteen patches of 2 x 2 pixels, two blocks of width 32 with four heads."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((PIXELS, PIXELS, 1))
    x = keras.layers.Reshape((16, 32))(keras.layers.Conv2D(32, 2, strides=2)(inputs))
    x = x + keras.layers.Embedding(16, 32)(keras.ops.arange(16))
    for _ in range(2):
        y = keras.layers.LayerNormalization()(x)
        x = x + keras.layers.MultiHeadAttention(4, 8)(y, y)
        y = keras.layers.Dense(64, "gelu")(keras.layers.LayerNormalization()(x))
        x = x + keras.layers.Dense(32)(y)
    x = keras.layers.GlobalAveragePooling1D()(keras.layers.LayerNormalization()(x))
    return keras.Model(inputs, output(seed)(x))


def output(seed):
    """The last layer."""
    initializer = keras.initializers.GlorotUniform(10 * seed + 9)
    return keras.layers.Dense(10, kernel_initializer=initializer)


def digits(brightest=1.0):
    """The digits, their pixels between 0 and a number."""
    data = kp.data.load("digits")
    factor = np.float32(brightest)
    return dataclasses.replace(data, x_train=data.x_train * factor, x_test=data.x_test * factor)


def text():
    """Windows of text and the characters that follow; the last tenth of the text is the test."""
    x, y = manual_text()
    train, test = slice(0, len(x) * 9 // 10, 5), slice(len(x) * 9 // 10 + 5, None, 5)
    return kp.data.Dataset(x[train], y[train], x[test], y[test], 128, "text")


@dataclasses.dataclass(frozen=True)
class Task:
    """A network, its data, and how long it is trained."""

    network: Callable
    data: Callable
    epochs: int
    batch_size: int = 32

    def train(self, curvature, seed):
        """The trained network, its data, and what it took."""
        data, network = self.data(), self.network(seed)
        model = kp.PrunableModel(network, curvature=curvature, seed=seed)
        steps = self.epochs * -(-len(data.x_train) // self.batch_size)
        rate = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps)
        model.compile(kp.KFAC(rate, weight_decay=WEIGHT_DECAY), LOSS, steps_per_execution=10)
        batch = {"batch_size": self.batch_size, "verbose": 0}
        model.fit(data.x_train, data.y_train, epochs=1, **batch)  # with the tracing
        start = time.process_time()
        model.fit(data.x_train, data.y_train, epochs=self.epochs, initial_epoch=1, **batch)
        seconds = (time.process_time() - start) / (self.epochs - 1)
        return network, data, {"epoch_cpu_seconds": round(seconds, 3)}


@dataclasses.dataclass(frozen=True)
class PrunedTask:
    """A case of `frontier.py`, pruned to one of its targets."""

    case: str
    target: str

    @property
    def epochs(self):
        """Epochs of training."""
        return frontier.CASES[self.case].epochs

    def train(self, curvature, seed):
        """The compact network, its data, and what it took."""
        case = frontier.CASES[self.case]
        data = frontier.load(case, "test")
        budget = kp.Budget(**case.targets[self.target])
        run = frontier.prepared(case, data, seed, SharedStarts(), budget)
        start = time.process_time()
        small = frontier.ours(run, curvature=curvature)
        seconds = time.process_time() - start
        images = {
            "x_train": run.x,
            "y_train": run.y,
            "x_test": frontier.shown_to(small, data.x_test),
        }
        return small, dataclasses.replace(data, **images), {"cpu_seconds": round(seconds, 1)}


TASKS = {
    "digits_conv_bn": Task(conv_bn, digits, epochs=20),
    "digits_mlp_16": Task(mlp, lambda: digits(16.0), epochs=30),
    "digits_mlp": Task(mlp, digits, epochs=30),
    "digits_transformer": Task(vision_transformer, digits, epochs=30),
    "text": Task(lambda seed: seeded(text_network, seed), text, epochs=6, batch_size=256),
    "lenet300_9k": PrunedTask("lenet300", "9k"),
    "lenet5_2.75k": PrunedTask("lenet5", "2.75k"),
    "lenet5_fashion_2.75k": PrunedTask("lenet5_fashion", "2.75k"),
    "resnet20_30%": PrunedTask("resnet20", "30%"),
}


def seeded(network, seed):
    """A network whose initial weights belong to a seed."""
    keras.utils.set_random_seed(seed)
    return network()


def spoilt(images):
    """Test images with noise, with half the contrast, and moved by one pixel."""
    top = images.max()
    noise = np.random.default_rng(0).normal(0, 0.3 * top, images.shape)
    return {
        "noise": np.clip(images + noise, 0, top).astype("float32"),
        "contrast": (0.5 * top + 0.5 * (images - 0.5 * top)).astype("float32"),
        "shift": np.roll(images, (1, 1), axis=(1, 2)),
    }


def error(network, x, y):
    """Share of wrong answers."""
    predicted = network.predict(x, batch_size=500, verbose=0)
    return float(np.mean(predicted.argmax(axis=-1) != y))


def measured(network, data):
    """Curvature on the first training examples, and the error on test data."""
    examples = (data.x_train[:EXAMINED], data.y_train[:EXAMINED])
    options = {"tolerance": 1e-2, "batch_size": 500}
    plain = kp.diagnostics.hessian_spectrum(network, examples, LOSS, **options)
    scaled = kp.diagnostics.hessian_spectrum(network, examples, LOSS, scaling="norm", **options)
    network.compile(loss=LOSS)
    values = {
        "top": plain.top,
        "top_scaled": scaled.top,
        "converged": bool(plain.converged and scaled.converged),
        "test_error": error(network, data.x_test, data.y_test),
        "test_loss": float(network.evaluate(data.x_test, data.y_test, 500, verbose=0)),
        "train_loss": float(network.evaluate(*examples, 500, verbose=0)),
    }
    if data.x_test.ndim == 4:
        values["corrupted"] = {
            name: 1.0 - error(network, images, data.y_test)
            for name, images in spoilt(data.x_test).items()
        }
    return values


def main(argv):
    """All runs that are not recorded yet."""
    del argv
    records = Records("flatness_tasks.jsonl", frontier.OUTPUT.value)
    for seed in map(int, frontier.SEEDS.value or SEEDS):
        for name in TASK_NAMES.value or TASKS:
            for strength in map(float, PENALTIES.value):
                task = TASKS[name]
                key = {"task": name, "strength": strength, "seed": seed, "epochs": task.epochs}
                if key in records:
                    continue
                keras.utils.set_random_seed(seed)
                curvature = kp.SpectralRadius(strength) if strength else None
                network, data, cost = task.train(curvature, seed)
                records.add(key, measured(network, data) | cost)
                keras.backend.clear_session()


if __name__ == "__main__":
    app.run(main)
