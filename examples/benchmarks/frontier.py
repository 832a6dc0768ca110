"""Error against size: ours, the dense network and the peers, under the same epochs.

    python examples/benchmarks/frontier.py run --data_dir=DIR [--cases=lenet300] [--methods=ours]
    python examples/benchmarks/frontier.py tune --data_dir=DIR [...]
    python examples/benchmarks/frontier.py cost --data_dir=DIR
    python examples/benchmarks/frontier.py plot

`run` trains on all training images, measures the test error once, after the last epoch, and
records it with weights (without biases), MACs, parameters and seconds. `tune` is the same on the
last 10,000 training images instead of the test set, one seed, for choosing settings. `cost` times
whole runs, ours and Adam on the dense network in turns. `plot` draws error against weights, with
the published points. Every finished run is one line of results/frontier.jsonl; what is there is
not run again.
"""

import dataclasses
import gc
import time
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import peers
import variational_peers
from absl import app, flags
from records import Records

import tf_kfacprune as kp

CASES_FLAG = flags.DEFINE_list("cases", None, "Names of cases; default: all.")
METHODS_FLAG = flags.DEFINE_list("methods", None, "Names of methods; default: all.")
TARGETS = flags.DEFINE_list("targets", None, "Names of targets; default: all of the case.")
STRENGTHS_FLAG = flags.DEFINE_list(
    "strengths", None, "Strengths of methods that know no budget; default: all of the method."
)
SEEDS = flags.DEFINE_list("seeds", None, "Seeds; default: 5 of them, 3 for CIFAR-10.")
EPOCHS = flags.DEFINE_integer("epochs", None, "Epochs; default: the case's.")
EXAMPLES = flags.DEFINE_integer("examples", None, "Training images; default: the case's.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of the data; Keras downloads without it.")
OUTPUT = flags.DEFINE_string("output", None, "Folder of the records; default: results/.")

VALIDATION = 10_000


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, its data, and the sizes to reach."""

    network: Callable
    data: str
    targets: dict
    epochs: int
    varied: tuple = ()  # targets at which methods are varied
    examples: int | None = None
    prune_inputs: bool = False
    batch_size: int = 256
    adam_rate: float = 3e-3  # rate and decay of AdamW, tuned on MNIST for both networks
    adam_decay: float = 0.1
    num_seeds: int = 5
    augment: Callable | None = None  # changes batches of training images
    loss: keras.losses.Loss = dataclasses.field(
        default_factory=lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )


def lenet300(input_shape, num_classes, seed):
    """LeNet-300-100 with Dropout on the pixels, which no small network does without."""
    network = kp.zoo.lenet300(input_shape, num_classes, seed)
    inputs = keras.Input(network.input_shape[1:])
    x = keras.layers.Dropout(0.1, seed=seed)(inputs)
    for layer in network.layers[1:]:
        x = layer(x)
    return keras.Model(inputs, x)


# LeNet-300-100 has 266,200 weights, LeNet-5 430,500 and 2.29 million MACs.
LENET5_TARGETS = {
    "8k": {"params": 0.0188},
    "2.75k": {"params": 0.0065},
    "2k": {"params": 0.0047, "macs": 0.0523},
}
CASES = {
    "lenet300": Case(
        lenet300,
        "mnist",
        {"26k": {"macs": 0.1}, "9k": {"macs": 0.0338}, "4k": {"macs": 0.01502}},
        epochs=40,
        varied=("9k",),
        prune_inputs=True,
    ),
    "lenet5": Case(kp.zoo.lenet5, "mnist", LENET5_TARGETS, epochs=15),
    "lenet5_fashion": Case(kp.zoo.lenet5, "fashion_mnist", LENET5_TARGETS, epochs=15),
    "resnet20": Case(
        kp.zoo.resnet20,
        "cifar10",
        {"30%": {"macs": 0.3}},
        epochs=10,
        examples=10_000,
        batch_size=128,
        num_seeds=3,
    ),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        model: The untrained network.
        starts: What runs of this network, data and seed have in common.
        strength: Price of methods that know no budget.
    """

    case: Case
    model: keras.Model
    x: np.ndarray
    y: np.ndarray
    seed: int
    starts: peers.SharedStarts
    budget: kp.Budget | None = None
    strength: float | None = None

    def steps(self, epochs):
        """Steps in so many epochs."""
        return -(-len(self.x) // self.case.batch_size) * epochs

    def fit(self, model, epochs):
        """Trains a compiled model."""
        batches = kp.data.batches(self.x, self.y, self.case.batch_size)
        if self.case.augment is not None:
            batches = self.case.augment(batches)
        model.fit(batches, epochs=epochs, shuffle=False, verbose=0)  # shuffled already


def ours(run, optimizer=None, **options):
    """One `fit` with the library's defaults, but for what an ablation changes."""
    pm = kp.PrunableModel(
        run.model, budget=run.budget, prune_inputs=run.case.prune_inputs, seed=run.seed, **options
    )
    pm.compile(optimizer, loss=run.case.loss)
    run.fit(pm, run.case.epochs)
    return kp.compact(pm)


def dense(run):
    """AdamW with cosine decay, nothing pruned."""
    run.model.compile(peers.adam(run, run.case.epochs), loss=run.case.loss)
    run.fit(run.model, run.case.epochs)
    return run.model


def dense_kfac(run):
    """The optimizer of `ours` on the dense network: what pruning itself adds or takes."""
    model = kp.KFACModel(run.model, seed=run.seed)
    rate = keras.optimizers.schedules.CosineDecay(3e-2, run.steps(run.case.epochs))
    model.compile(kp.KFAC(rate, weight_decay=0.03), loss=run.case.loss)
    run.fit(model, run.case.epochs)
    return run.model


def narrow(run, train):
    """A network with fewer units in every layer from the start, trained as the dense one is."""
    return train(dataclasses.replace(run, model=peers.narrowed(run)))


# A method with one thing changed.
VARIATIONS = {
    "ours_adam": lambda run: ours(
        run, keras.optimizers.AdamW(run.case.adam_rate, weight_decay=run.case.adam_decay)
    ),
    "ours_hard_concrete": lambda run: ours(run, policy="hard_concrete"),
    "ours_proximal": lambda run: ours(run, policy="proximal"),
    "ours_taylor": lambda run: ours(run, policy="taylor"),
    "ours_features": lambda run: ours(run, prune_features=True),
    "magnitude_compensated": lambda run: peers.one_shot(run, "magnitude", compensate=True),
    "taylor_compensated": lambda run: peers.one_shot(run, "taylor", compensate=True),
}
# What turns a run into the network that its method makes.
METHODS = {
    "dense": dense,
    "dense_kfac": dense_kfac,
    "ours": ours,
    "ours_penalty": lambda run: ours(run, curvature=kp.SpectralRadius()),
    "narrow": lambda run: narrow(run, dense),
    "narrow_kfac": lambda run: narrow(run, dense_kfac),
    "magnitude": lambda run: peers.one_shot(run, "magnitude"),
    "taylor": lambda run: peers.one_shot(run, "taylor"),
    "hard_concrete": peers.hard_concrete,
    "slimming": lambda run: peers.slimming(run, penalty=0.1),
    "vibnet": variational_peers.vibnet,
    "bc_gnj": variational_peers.bc_gnj,
    "bc_ghs": variational_peers.bc_ghs,
} | VARIATIONS
# Methods without a budget run at these strengths instead of the targets.
STRENGTHS = {
    "hard_concrete": (0.3, 1.0, 3.0),
    "vibnet": (2e-4, 5e-4, 1e-3),
    "bc_gnj": (1.0,),
    "bc_ghs": (1.0,),
    "dense": (0.0,),
    "dense_kfac": (0.0,),
}


def plans(case_name):
    """`(method, name of the target, budget, strength)` of every run of a case and seed."""
    case = CASES[case_name]
    for method in METHODS_FLAG.value or METHODS:
        if method in STRENGTHS:
            for strength in map(float, STRENGTHS_FLAG.value or STRENGTHS[method]):
                yield method, f"{strength:g}", None, strength
        else:
            for target in TARGETS.value or (case.varied if method in VARIATIONS else case.targets):
                yield method, target, kp.Budget(**case.targets[target]), None


def load(case, split):
    """Training data, and what error is measured on."""
    data = kp.data.load(case.data, DATA_DIR.value)
    if split == "validation":
        data = kp.data.validation_split(data, VALIDATION)
    return data


def shown_to(model, x):
    """Images in the shape that a model takes."""
    return x.reshape(-1, *model.input_shape[1:])


def prepared(case, data, seed, starts, budget=None, strength=None):
    """A run of an untrained network."""
    keras.utils.set_random_seed(seed)
    model = case.network(data.input_shape, data.num_classes, seed=seed)
    x = shown_to(model, data.x_train[: case.examples])
    return Run(case, model, x, data.y_train[: case.examples], seed, starts, budget, strength)


def trained(case, data, method, seed, starts, budget=None, strength=None):
    """The network that a method makes, and the seconds it takes."""
    run = prepared(case, data, seed, starts, budget, strength)
    start, spared = time.perf_counter(), starts.seconds_spared
    small = METHODS[method](run)
    return small, time.perf_counter() - start + starts.seconds_spared - spared


def measured(small, data):
    """Error and size of a network."""
    logits = small.predict(shown_to(small, data.x_test), batch_size=1000, verbose=0)
    kernels = [w for w in small.trainable_weights if w.name == "kernel"]
    return {
        "error": round(100 * float(np.mean(np.argmax(logits, axis=1) != data.y_test)), 3),
        "weights": sum(int(np.prod(w.shape)) for w in kernels),
        "shapes": [list(w.shape) for w in kernels],
        "macs": kp.inspect(small).macs,
        "params": small.count_params(),
    }


def chosen(case):
    """A case, with what the command line changes about it."""
    changes = {"epochs": EPOCHS.value, "examples": EXAMPLES.value}
    return dataclasses.replace(case, **{k: v for k, v in changes.items() if v})


def run(split="test"):
    """All runs that are not recorded yet."""
    records = Records("frontier.jsonl", OUTPUT.value)
    for name in CASES_FLAG.value or CASES:
        case = chosen(CASES[name])
        data = load(case, split)
        seeds = SEEDS.value or range(case.num_seeds if split == "test" else 1)
        for seed in map(int, seeds):
            starts = peers.SharedStarts()
            for method, target, budget, strength in plans(name):
                key = {"case": name, "method": method, "target": target, "seed": seed}
                key |= {"epochs": case.epochs, "examples": case.examples, "split": split}
                if key in records:
                    continue
                small, seconds = trained(case, data, method, seed, starts, budget, strength)
                records.add(key, measured(small, data) | {"seconds": round(seconds, 1)})
                keras.backend.clear_session()
                gc.collect()


def cost(rounds=3):
    """Seconds of whole runs relative to Adam on the dense network in the same round."""
    records = Records("frontier_cost.jsonl", OUTPUT.value)
    for name in CASES_FLAG.value or ("lenet300", "lenet5"):
        case = chosen(CASES[name])
        data = load(case, "test")
        target, fractions = list(case.targets.items())[1]
        for number in range(rounds):
            key = {"case": name, "target": target, "epochs": case.epochs, "round": number}
            if key in records:
                continue
            _, dense_s = trained(case, data, "dense", number, peers.SharedStarts())
            budget = kp.Budget(**fractions)
            _, ours_s = trained(case, data, "ours", number, peers.SharedStarts(), budget)
            seconds = {"dense_s": round(dense_s, 1), "ours_s": round(ours_s, 1)}
            records.add(key, {**seconds, "ratio": round(ours_s / dense_s, 3)})


# Published weights and errors in percent (sources in docs/frontier.md), and the side of the mark
# on which there is room for the name.
PUBLISHED = {
    "lenet300": {
        "SBP": (48_600, 1.55, "right"),
        "L0": (26_600, 1.8, "above right"),
        "BC-GNJ": (28_600, 1.8, "right"),
        "VIBNet": (9_600, 1.6, "below"),
    },
    "lenet5": {
        "Sparse VD": (39_500, 0.75, "below"),
        "GD": (5_900, 1.1, "above"),
        "BC-GNJ": (4_070, 1.0, "above"),
        "BC-GHS": (2_750, 1.0, "below left"),
        "L0-sep": (6_200, 1.0, "right"),
    },
}
# Distance from a mark in points, and the part of the name that is put there.
SIDES = {
    "above right": (3, 6, "left", "bottom"),
    "right": (6, 0, "left", "center"),
    "above": (0, 6, "center", "bottom"),
    "below": (0, -6, "center", "top"),
    "below left": (-4, -6, "right", "top"),
}


def plot():
    """Error against weights, one panel per case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = {}
    for line in Records("frontier.jsonl", OUTPUT.value).lines:
        key, case = line["key"], chosen(CASES[line["key"]["case"]])
        is_whole = (key["epochs"], key["examples"]) == (case.epochs, case.examples)
        if key["split"] == "test" and is_whole and key["method"] not in VARIATIONS:
            of_method = points.setdefault(key["case"], {}).setdefault(key["method"], {})
            of_method.setdefault(key["target"], []).append((line["weights"], line["error"]))
    columns = min(2, len(points))
    rows = -(-len(points) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(6 * columns, 4.6 * rows), squeeze=False, layout="constrained"
    )
    shown = [m for m in METHODS if any(m in methods for methods in points.values())]
    colors = pyplot.get_cmap("tab20").colors  # dark ones first, then light ones
    colors = (*colors[::2], *colors[1::2])
    styles = {m: {"color": colors[k], "marker": "os"[k // 10]} for k, m in enumerate(shown)}
    for axis in axes.flat[len(points) :]:
        axis.set_axis_off()
    for axis, (name, methods) in zip(axes.flat, points.items(), strict=False):
        for method in (method for method in METHODS if method in methods):
            runs = sorted(map(np.array, methods[method].values()), key=np.mean)
            mean = np.array([of_target.mean(axis=0) for of_target in runs])
            spread = [run[:, 1].std(ddof=1) if len(run) > 1 else 0.0 for run in runs]
            style = styles[method] | {"capsize": 2, "label": method}
            axis.errorbar(mean[:, 0], mean[:, 1], spread, **style)
        for label, (weights, error, side) in PUBLISHED.get(name, {}).items():
            dx, dy, ha, va = SIDES[side]
            place = {"xytext": (dx, dy), "textcoords": "offset points", "ha": ha, "va": va}
            axis.plot(weights, error, "k+", zorder=5)
            axis.annotate(label, (weights, error), fontsize=7, **place)
        axis.set(title=name, xlabel="weights", ylabel="test error, %", xscale="log", yscale="log")
        limits = axis.get_ylim()
        ticks = [1, 1.5, 2, 3, 5, 10, 15, 20, 30, 40, 50]
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_ylim(limits)
        axis.legend(frameon=False, fontsize=7)
    path = Path(OUTPUT.value or Records("frontier.jsonl").path.parent) / "frontier.png"
    figure.savefig(path, dpi=120)
    print(f"Written: {path}")


def main(argv):
    """Runs one of the commands."""
    commands = {"run": run, "tune": lambda: run("validation"), "cost": cost, "plot": plot}
    if len(argv) != 2 or argv[1] not in commands:
        raise app.UsageError(f"Give one command: {', '.join(commands)}.")
    commands[argv[1]]()


if __name__ == "__main__":
    app.run(main)
