"""K-FAC against the optimizers of Keras: loss over steps and over seconds, cost of a step.

    python examples/benchmarks/optimizer.py curves --data_dir=DIR [--tasks=autoencoder,lenet5]
    python examples/benchmarks/optimizer.py step_cost
    python examples/benchmarks/optimizer.py plot

`curves` first tunes the learning rate of every optimizer on the same small grid (training loss
after the task's seconds, seed 100), then trains with three other seeds. Losses are measured on
training examples, off the clock. `step_cost` times all optimizers in one process, in turns.
Each finished run appends one line to `results/optimizer.jsonl`; what is in there is not run again.
`plot` draws the curves.
"""

import dataclasses
import gc
import platform
import time
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from records import Records
from text_task import manual_text, text_network

import tf_kfacprune as kp

TASKS_FLAG = flags.DEFINE_list("tasks", None, "Names of tasks; default: all of them.")
OPTIMIZERS_FLAG = flags.DEFINE_list(
    "optimizers", None, "Names of optimizers; default: all of them."
)
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of the final runs.")
SECONDS = flags.DEFINE_float("seconds", None, "Seconds of training per run; default: the task's.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where mnist.npz and cifar10 lie.")
OUTPUT = flags.DEFINE_string("output", None, "Folder of the records; default: results/.")

TUNING_SEED = 100
SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def autoencoder(sizes):
    """A symmetric autoencoder, ReLU but for the code and the output."""
    inputs = keras.Input((sizes[0],))
    x = inputs
    widths = [*sizes[1:], *sizes[-2::-1]]
    for k, width in enumerate(widths):
        is_linear = k in (len(sizes) - 2, len(widths) - 1)
        x = keras.layers.Dense(width, activation=None if is_linear else "relu")(x)
    return keras.Model(inputs, x)


def mnist_images():
    """Flat MNIST images, as inputs and as targets."""
    data = kp.data.load("mnist", data_dir=DATA_DIR.value)
    flat = data.x_train.reshape(len(data.x_train), -1)
    return flat, flat


def mnist_digits():
    """MNIST images and digits."""
    data = kp.data.load("mnist", data_dir=DATA_DIR.value)
    return data.x_train, data.y_train


def cifar_images():
    """CIFAR-10 images and classes."""
    data = kp.data.load("cifar10", data_dir=DATA_DIR.value)
    return data.x_train, data.y_train


def resnet20():
    """ResNet-20 with moving statistics that keep up with a run of a hundred steps."""
    network = kp.zoo.resnet20((32, 32, 3), 10)
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.9
    return network


BERNOULLI = keras.losses.BinaryCrossentropy(from_logits=True)


@dataclasses.dataclass(frozen=True)
class Task:
    """A network, its data, and how long it is trained.

    Attributes:
        scale: Factor on the losses that are shown; 784 sums over the pixels of an image.
        evaluated: Training examples that losses are measured on.
    """

    network: Callable
    data: Callable
    loss: keras.losses.Loss
    batch_size: int
    seconds: float
    evaluated: int
    sgd_rates: tuple = (0.01, 0.03, 0.1, 0.3)
    kfac_rates: tuple = (3e-3, 1e-2, 3e-2, 1e-1)
    scale: float = 1.0


AUTOENCODING = {
    "data": mnist_images,
    "loss": BERNOULLI,
    "evaluated": 10_000,
    "sgd_rates": (0.3, 1.0, 3.0, 10.0),
    "kfac_rates": (0.03, 0.1, 0.3, 1.0),
    "scale": 784.0,
}
TASKS = {
    "autoencoder_small": Task(
        lambda: autoencoder((784, 250, 100, 30)), batch_size=512, seconds=40.0, **AUTOENCODING
    ),
    "autoencoder": Task(
        lambda: autoencoder((784, 1000, 500, 250, 30)),
        batch_size=1024,
        seconds=80.0,
        **AUTOENCODING,
    ),
    "lenet5": Task(
        kp.zoo.lenet5, mnist_digits, SPARSE, batch_size=256, seconds=40.0, evaluated=5_000
    ),
    "resnet20": Task(resnet20, cifar_images, SPARSE, batch_size=128, seconds=100.0, evaluated=500),
    "text": Task(
        text_network,
        manual_text,
        SPARSE,
        batch_size=256,
        seconds=40.0,
        evaluated=2_000,
        sgd_rates=(0.03, 0.1, 0.3, 1.0),
        kfac_rates=(0.01, 0.03, 0.1, 0.3),
    ),
}
ADAM_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
OPTIMIZERS = ("sgd", "adam", "adamw", "kfac", "kfac_auto")


def make_optimizer(name, rate):
    """An optimizer by name, with a learning rate."""
    if name == "sgd":
        return keras.optimizers.SGD(rate, momentum=0.9)
    if name == "adam":
        return keras.optimizers.Adam(rate)
    if name == "adamw":
        return keras.optimizers.AdamW(rate, weight_decay=1e-2)
    if name == "kfac_locations":
        return kp.KFAC(rate, location_fraction=0.25)
    return kp.KFAC("auto" if name == "kfac_auto" else rate)


def rates_of(task, name):
    """The grid of learning rates of an optimizer on a task."""
    if name == "kfac_auto":
        return (None,)
    return {"sgd": TASKS[task].sgd_rates, "kfac": TASKS[task].kfac_rates}.get(name, ADAM_RATES)


def compiled(task, name, rate, seed):
    """A fresh model with its optimizer, ready to train."""
    keras.utils.set_random_seed(seed)
    model = TASKS[task].network()
    if name.startswith("kfac"):
        model = kp.KFACModel(model, seed=seed)
    model.compile(make_optimizer(name, rate), TASKS[task].loss)
    model.make_train_function()
    return model


def train(task, name, rate, seed, seconds):
    """One run: `[step, seconds, loss]` at growing intervals."""
    chosen = TASKS[task]
    x, y = chosen.data()
    model = compiled(task, name, rate, seed)
    examples = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=seed).repeat()
    iterator = iter(examples.batch(chosen.batch_size, drop_remainder=True).prefetch(2))
    evaluated = tf.data.Dataset.from_tensor_slices((x, y)).take(chosen.evaluated).batch(1000)

    @tf.function
    def batch_loss(images, labels):
        return chosen.loss(labels, model(images, training=False))

    def measured():
        return chosen.scale * float(np.mean([batch_loss(a, b) for a, b in evaluated]))

    curve = [[0, 0.0, measured()]]
    model.train_function(iterator)  # compiled off the clock
    step, clock, interval = 1, 0.0, 1
    while clock < seconds:
        start = time.perf_counter()
        for _ in range(interval):
            model.train_function(iterator)
        keras.ops.convert_to_numpy(model.trainable_variables[0])  # waits for the last step
        clock += time.perf_counter() - start
        step += interval
        curve.append([step, round(clock, 3), measured()])
        if not np.isfinite(curve[-1][-1]):
            break
        in_time_left = int((seconds - clock) * step / clock) + 1
        interval = max(1, min(step // 6, in_time_left))
    return curve


def finished():
    """The runs that are recorded."""
    return Records("optimizer.jsonl", OUTPUT.value)


def curve_of(task, name, rate, seed):
    """The curve of a run, recorded now or before."""
    seconds = SECONDS.value or TASKS[task].seconds
    key = {"part": "curves", "task": task, "optimizer": name}
    key |= {"rate": rate, "seed": seed, "seconds": seconds}
    records = finished()
    line = records.get(key)
    if line is None:
        machine = platform.processor() or platform.machine()
        line = records.add(
            key, {"curve": train(task, name, rate, seed, seconds), "machine": machine}
        )
    return line["curve"]


def final_loss(curve):
    """What learning rates are chosen by."""
    return curve[-1][-1] if np.isfinite(curve[-1][-1]) else np.inf


def run_curves():
    """Tunes and trains whatever is not in the file yet."""
    for task in TASKS_FLAG.value or TASKS:
        for name in OPTIMIZERS_FLAG.value or OPTIMIZERS:
            rates = rates_of(task, name)
            best = rates[0]
            if len(rates) > 1:
                losses = [final_loss(curve_of(task, name, r, TUNING_SEED)) for r in rates]
                best = rates[int(np.argmin(losses))]
            for seed in map(int, SEEDS.value):
                curve_of(task, name, best, seed)


def run_step_cost():
    """Records what steps cost relative to Adam's."""
    records = finished()
    names = OPTIMIZERS_FLAG.value or ("adam", "kfac", "kfac_auto")
    for task in TASKS_FLAG.value or ("autoencoder_small", "autoencoder", "lenet5", "resnet20"):
        key = {"part": "step_cost", "task": task, "optimizers": list(names)}
        if key not in records:
            records.add(key, step_costs(task, names, rounds=3 if task == "resnet20" else 7))


def step_costs(task, names, rounds, count=50):
    """Median over rounds of the time of `count` steps, relative to Adam's in the same round.

    Fifty steps are a whole period of `KFAC`, with updates of factors and inverses.
    """
    batch = TASKS[task].batch_size
    data = tf.data.Dataset.from_tensor_slices(tuple(p[: 10 * batch] for p in TASKS[task].data()))
    iterator = iter(data.batch(batch).cache().repeat())
    models = {name: compiled(task, name, 1e-3, 0) for name in names}
    for model in models.values():
        for _ in range(3):
            model.train_function(iterator)
        model.optimizer.iterations.assign(1000)  # past the first steps, which invert more often
    times = {name: [] for name in models}
    gc.disable()
    for _ in range(rounds):
        for name, model in models.items():
            start = time.perf_counter()
            for _ in range(count):
                model.train_function(iterator)
            keras.ops.convert_to_numpy(model.trainable_variables[0])
            times[name].append((time.perf_counter() - start) / count)
    gc.enable()
    reference = np.array(times["adam"])
    ratios = {n: round(float(np.median(np.array(t) / reference)), 3) for n, t in times.items()}
    milliseconds = {n: round(1e3 * float(np.median(t)), 2) for n, t in times.items()}
    floor = arithmetic_floor(models["adam"], batch)
    return {"batch": batch, "ratios": ratios, "floor": floor, "milliseconds": milliseconds}


def arithmetic_floor(model, batch):
    """1 + sum n_in n_out (n_in + n_out) / (3 B sum n_in n_out); None unless all is Dense."""
    shapes = [tuple(v.shape) for v in model.trainable_variables if v.name == "kernel"]
    if any(len(shape) != 2 for shape in shapes):
        return None
    work = sum(a * b * (a + b) for a, b in shapes)
    return round(1.0 + work / (3.0 * batch * sum(a * b for a, b in shapes)), 3)


def run_plot():
    """Draws the mean curves of the final runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = {}
    for line in finished().lines:
        key = line["key"]
        if key["part"] == "curves" and key["seed"] != TUNING_SEED:
            curves.setdefault((key["task"], key["optimizer"]), []).append(line["curve"])
    tasks = [task for task in TASKS if any(t == task for t, _ in curves)]
    figure, axes = pyplot.subplots(
        len(tasks), 2, figsize=(10, 3.2 * len(tasks)), squeeze=False, layout="constrained"
    )
    for row, task in zip(axes, tasks, strict=True):
        for k, name in enumerate(OPTIMIZERS):
            runs = [np.array(c) for c in curves.get((task, name), [])]
            if not runs:
                continue
            length = min(map(len, runs))
            mean = np.mean([run[:length] for run in runs], axis=0)
            for axis, column in zip(row, (0, 1), strict=True):
                axis.plot(mean[1:, column], mean[1:, 2], color=f"C{k}", label=name)
        for axis, label in zip(row, ("steps", "seconds"), strict=True):
            axis.set(title=task, xlabel=label, ylabel="training loss", yscale="log")
            axis.set(xscale="log")
            axis.legend(frameon=False)
    path = finished().path.with_suffix(".png")
    figure.savefig(path, dpi=120)
    print(f"Written: {path}")


def main(argv):
    """Runs one of the commands."""
    commands = {"curves": run_curves, "step_cost": run_step_cost, "plot": run_plot}
    if len(argv) != 2 or argv[1] not in commands:
        raise app.UsageError(f"Give one command: {', '.join(commands)}.")
    commands[argv[1]]()


if __name__ == "__main__":
    app.run(main)
