"""Is the minimum flatter with the spectral-radius penalty, and is the network any better for it?

    python examples/benchmarks/flatness.py train --data_dir=DIR
    python examples/benchmarks/flatness.py prune --data_dir=DIR
    python examples/benchmarks/flatness.py track --data_dir=DIR
    python examples/benchmarks/flatness.py plot

`train` trains one compact architecture with and without the penalty, and by SAM and ASAM (two
passes a step) as peers, everything else equal, also with a share of the training labels replaced
by other classes. `prune` prunes the dense network to one budget with and without it. `track`
measures the K-FAC estimate and the exact eigenvalue along a run. Settings are in `NETWORKS`; they
were chosen on `--validation=10000` held-out training images (`train --methods=sam
--rhos=0.02,0.05,0.1` tries radii). The curvature is that of the training loss on all training
images, in inference mode. Each finished run appends one line to `results/flatness.jsonl`; what is
in there is not run again.
"""

import functools
import time

import keras
import numpy as np
from absl import app, flags
from records import Records
from sharpness_aware import SharpnessAware

import tf_kfacprune as kp

DATA_DIR = flags.DEFINE_string("data_dir", None, "Where mnist.npz lies.")
SELECTED = flags.DEFINE_list("networks", None, "Names of networks; default: all of them.")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2", "3", "4"], "Seeds.")
LABEL_NOISE = flags.DEFINE_list("label_noise", ["0", "0.2", "0.4"], "Shares of wrong labels.")
STRENGTHS = flags.DEFINE_list("strengths", None, "Strengths; default: 0 and the network's.")
METHODS = flags.DEFINE_list("methods", ["penalty", "sam", "asam"], "How `train` flattens.")
RHOS = flags.DEFINE_list("rhos", None, "Radii of sam and asam; default: the network's.")
VALIDATION = flags.DEFINE_integer("validation", 0, "Hold out so many training images.")
OUTPUT = flags.DEFINE_string("output", None, "Folder of the records; default: results/.")

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
SIZE = 28


def mlp(widths, seed):
    """Dense layers on images of half the size."""
    inputs = keras.Input((SIZE, SIZE, 1))
    x = keras.layers.Flatten()(keras.layers.AveragePooling2D(2)(inputs))
    for k, width in enumerate(widths):
        x = keras.layers.Dense(width, activation="relu", kernel_initializer=glorot(seed, k))(x)
    return keras.Model(inputs, logits(x, seed))


def lenet(filters, units, seed):
    """A LeNet with 3 x 3 filters on images of half the size."""
    inputs = keras.Input((SIZE, SIZE, 1))
    x = keras.layers.AveragePooling2D(2)(inputs)
    for k, count in enumerate(filters):
        x = keras.layers.Conv2D(count, 3, activation="relu", kernel_initializer=glorot(seed, k))(x)
        x = keras.layers.MaxPooling2D(2)(x)
    x = keras.layers.Flatten()(x)
    x = keras.layers.Dense(units, activation="relu", kernel_initializer=glorot(seed, 2))(x)
    return keras.Model(inputs, logits(x, seed))


def logits(x, seed):
    """The last layer."""
    return keras.layers.Dense(10, kernel_initializer=glorot(seed, 9))(x)


def glorot(seed, layer):
    """An initializer of its own for every layer."""
    return keras.initializers.GlorotUniform(seed=10 * seed + layer)


# name -> compact and dense network; settings chosen on held-out images with `mlp`
SETTINGS = {
    "batch_size": 256,
    "learning_rate": 1e-2,
    "weight_decay": 0.03,
    "strength": 1e-4,
    "rho": {"sam": 0.05, "asam": 0.5},
}
NETWORKS = {
    "mlp": {
        "compact": lambda seed: mlp((40, 20), seed),
        "dense": lambda seed: mlp((300, 100), seed),
        "budget": {"params": 0.1},
        "epochs": 30,
        **SETTINGS,
    },
    "lenet": {
        "compact": lambda seed: lenet((6, 16), 32, seed),
        "dense": lambda seed: lenet((20, 50), 200, seed),
        "budget": {"params": 0.1},
        "epochs": 16,
        **SETTINGS,
    },
}
CORRUPTIONS = {
    "noise": "normal noise of standard deviation 0.4, cut off at 0 and 1",
    "blur": "Gaussian blur of standard deviation 1.5 pixels",
    "contrast": "contrast halved around 0.5",
    "shift": "1 pixel down and 1 to the right",
}


def corrupted(images, name):
    """The same images, spoilt; the same noise in every call."""
    if name == "noise":
        noise = np.random.default_rng(0).normal(0, 0.4, images.shape)
        return np.clip(images + noise, 0, 1).astype("float32")
    if name == "blur":
        place = np.arange(SIZE)
        weights = np.exp(-0.5 * ((place[:, None] - place) / 1.5) ** 2)
        weights /= weights.sum(axis=1, keepdims=True)
        return np.einsum("ih,bhwc,jw->bijc", weights, images, weights).astype("float32")
    if name == "contrast":
        return (0.5 + 0.5 * (images - 0.5)).astype("float32")
    return np.roll(images, (1, 1), axis=(1, 2))


def with_wrong_labels(labels, share, seed):
    """Every label is replaced by another class with this probability."""
    generator = np.random.default_rng(1000 + seed)
    wrong = generator.random(len(labels)) < share
    return np.where(wrong, (labels + generator.integers(1, 10, len(labels))) % 10, labels)


def load():
    """MNIST, or its training images split in two."""
    data = kp.data.load("mnist", data_dir=DATA_DIR.value)
    return kp.data.validation_split(data, VALIDATION.value) if VALIDATION.value else data


def penalized(model, strength, seed, **pruning):
    """A wrapper that flattens by the penalty, or only measures the radius."""
    return kp.PrunableModel(model, curvature=kp.SpectralRadius(strength), seed=seed, **pruning)


def peer(model, method, rho, seed):
    """A wrapper that flattens by `"sam"` or `"asam"`."""
    return SharpnessAware(model, rho, is_adaptive=method == "asam", seed=seed)


def fitted(make, settings, seed, x, y, *, callbacks=(), is_pruned=False):
    """Trains the wrapper that `make()` returns; returns it and the processor time in seconds."""
    keras.utils.set_random_seed(seed)
    trainer = make()
    steps = settings["epochs"] * -(-len(x) // settings["batch_size"])
    rate = settings["learning_rate"]
    if not is_pruned:  # pruning lays out its own decay
        rate = keras.optimizers.schedules.CosineDecay(rate, steps)
    optimizer = kp.KFAC(rate, weight_decay=settings["weight_decay"])
    # Many steps at a time, unless somebody wants to see each.
    trainer.compile(optimizer, loss=LOSS, steps_per_execution=1 if callbacks else 47)
    start = time.process_time()
    trainer.fit(
        x,
        y,
        batch_size=settings["batch_size"],
        epochs=settings["epochs"],
        callbacks=list(callbacks),
        verbose=0,
    )
    return trainer, round(time.process_time() - start, 1)


def accuracy(model, x, y):
    """Share of right answers."""
    predicted = model.predict(x, batch_size=1000, verbose=0)
    return float(np.mean(predicted.argmax(axis=1) == y))


def measured(model, data, y_train):
    """Everything that is reported about a trained network."""
    examples = (data.x_train, y_train)
    options = {"tolerance": 1e-2, "batch_size": 2000}
    plain = kp.diagnostics.hessian_spectrum(model, examples, LOSS, **options)
    scaled = kp.diagnostics.hessian_spectrum(model, examples, LOSS, scaling="norm", **options)
    estimate = kp.diagnostics.spectral_radius(model, examples, LOSS, batch_size=2000)
    outputs = model.predict(data.x_train, batch_size=1000, verbose=0)
    spoilt = {n: accuracy(model, corrupted(data.x_test, n), data.y_test) for n in CORRUPTIONS}
    return {
        "test_error": 1 - accuracy(model, data.x_test, data.y_test),
        "train_loss": float(LOSS(y_train, outputs)),
        "corrupted": spoilt,
        "top": plain.top,
        "top_scaled": scaled.top,
        "converged": bool(plain.converged and scaled.converged),
        "kfac_radius": estimate.radius,
        "weight_norm": plain.weight_norm,
        "parameters": plain.num_parameters,
    }


def finished():
    """The runs that are recorded."""
    return Records("flatness.jsonl", OUTPUT.value)


def runs():
    """`name, settings, seed, strength` of all runs asked for; pairs follow each other."""
    for name in SELECTED.value or NETWORKS:
        for seed in map(int, SEEDS.value):
            for strength in map(float, STRENGTHS.value or [0.0, NETWORKS[name]["strength"]]):
                yield name, NETWORKS[name], seed, strength


def trained_variants():
    """`name, settings, seed, strength, method`: without and with penalty, and by its peers.

    `method` is a dictionary of a peer's name and rho, empty without one.
    """
    if "penalty" in METHODS.value:
        yield from ((*run, {}) for run in runs())
    for name in SELECTED.value or NETWORKS:
        for seed in map(int, SEEDS.value):
            for method in (method for method in METHODS.value if method != "penalty"):
                for rho in map(float, RHOS.value or [NETWORKS[name]["rho"][method]]):
                    yield name, NETWORKS[name], seed, 0.0, {"method": method, "rho": rho}


def key_of(part, name, settings, seed, strength):
    """What tells a run from others."""
    chosen = ("epochs", "batch_size", "learning_rate", "weight_decay")
    return {
        "part": part,
        "network": name,
        "seed": seed,
        "strength": strength,
        "validation": VALIDATION.value,
        **{k: settings[k] for k in chosen},
    }


def run_train():
    """The compact architecture: with and without the penalty, and by its peers."""
    records, data = finished(), load()
    for share in map(float, LABEL_NOISE.value):
        for name, settings, seed, strength, method in trained_variants():
            key = {**key_of("train", name, settings, seed, strength), **method}
            key["label_noise"] = share
            if key in records:
                continue
            labels = with_wrong_labels(data.y_train, share, seed)
            model = settings["compact"](seed)
            if method:
                make = functools.partial(peer, model, seed=seed, **method)
            else:
                make = functools.partial(penalized, model, strength, seed)
            _, seconds = fitted(make, settings, seed, data.x_train, labels)
            records.add(key, {**measured(model, data, labels), "cpu_seconds": seconds})


def run_prune():
    """From the dense network to a budget, with and without the penalty."""
    records, data = finished(), load()
    for name, settings, seed, strength in runs():
        key = {**key_of("prune", name, settings, seed, strength), "budget": settings["budget"]}
        if key in records:
            continue
        dense, budget = settings["dense"](seed), kp.Budget(**settings["budget"])
        make = functools.partial(penalized, dense, strength, seed, budget=budget)
        trainer, seconds = fitted(make, settings, seed, data.x_train, data.y_train, is_pruned=True)
        small = kp.compact(trainer)
        records.add(key, {**measured(small, data, data.y_train), "cpu_seconds": seconds})


class Tracker(keras.callbacks.Callback):
    """Measures the K-FAC estimate and the exact eigenvalue at intervals."""

    def __init__(self, data, moments):
        super().__init__()
        self.data = data
        self.moments = set(moments)
        self.track = []

    def on_train_batch_end(self, batch, logs=None):
        step = int(self.model.guard.step)
        if step in self.moments:
            net, options = self.model.net, {"batch_size": 2000}
            exact = kp.diagnostics.hessian_spectrum(
                net, self.data, LOSS, tolerance=1e-2, **options
            ).top
            estimate = kp.diagnostics.spectral_radius(net, self.data, LOSS, **options).radius
            self.track.append([step, exact, estimate, float(logs["spectral_radius"])])


def rank_correlation(a, b):
    """Spearman's, for values without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def run_track():
    """The K-FAC estimate beside the exact eigenvalue, along a run with and without the penalty."""
    records, data = finished(), load()
    for name, settings, seed, strength in runs():
        key = key_of("track", name, settings, seed, strength)
        if key in records:
            continue
        steps = settings["epochs"] * -(-len(data.x_train) // settings["batch_size"])
        moments = np.unique(np.geomspace(10, steps, 24).astype(int))
        tracker = Tracker((data.x_train[:10_000], data.y_train[:10_000]), moments)
        x, y = data.x_train, data.y_train
        make = functools.partial(penalized, settings["compact"](seed), strength, seed)
        fitted(make, settings, seed, x, y, callbacks=[tracker])
        _, exact, estimate, live = zip(*tracker.track, strict=True)
        correlations = {
            "rank_correlation": rank_correlation(exact, estimate),
            "rank_correlation_live": rank_correlation(exact, live),
        }
        records.add(key, {**correlations, "track": tracker.track})


def runs_of(part):
    """Finished runs on the test set, keys and values side by side."""
    lines = [{**line["key"], **line} for line in finished().lines]
    return [line for line in lines if line["part"] == part and not line["validation"]]


def run_plot():
    """Draws error against curvature for every run, and the estimate beside the exact value."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 3.6), layout="constrained")
    for part, marker in (("train", "o"), ("prune", "s")):
        groups = {}
        for run in runs_of(part):
            if not run.get("label_noise"):
                penalty = "penalty" if run["strength"] else "no penalty"
                how = run.get("method", penalty)
                groups.setdefault((run["network"], how), []).append(run)
        for (network, how), runs in sorted(groups.items()):
            errors = [100 * run["test_error"] for run in runs]
            label = f"{network}, {'pruned, ' if part == 'prune' else ''}{how}"
            left.scatter([run["top"] for run in runs], errors, marker=marker, label=label)
    left.set(xlabel="top eigenvalue of the Hessian", ylabel="test error %", xscale="log")
    ticks = [1, 1.5, 2, 3, 4, 6, 8, 10]
    left.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    left.minorticks_off()
    for run in runs_of("track"):
        steps, exact, estimate, _ = zip(*run["track"], strict=True)
        label = f"{run['network']}, {'penalty' if run['strength'] else 'no penalty'}"
        (line,) = right.plot(steps, exact, label=f"{label}: exact")
        right.plot(steps, estimate, ":", color=line.get_color(), label=f"{label}: K-FAC")
    right.set(xlabel="step", ylabel="top eigenvalue", xscale="log", yscale="log")
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    path = finished().path.with_suffix(".png")
    figure.savefig(path, dpi=120)
    print(f"Written: {path}")


def main(argv):
    """Runs one of the commands."""
    commands = {"train": run_train, "prune": run_prune, "track": run_track, "plot": run_plot}
    if len(argv) != 2 or argv[1] not in commands:
        raise app.UsageError(f"Give one command: {', '.join(commands)}.")
    commands[argv[1]]()


if __name__ == "__main__":
    app.run(main)
