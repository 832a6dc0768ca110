"""Gates and compacts the models of `keras.applications`, and proves that nothing else changes.

    python examples/benchmarks/applications.py [--models=ResNet50,VGG16]

Every model gets random BatchNormalization statistics, biases and layer scales, then random gates:
hard ones, soft ones, and soft ones that close every second residual branch completely. Recorded per
model: the share of channels outside the classifier that can be pruned, what freezes the rest, the
relative error between gated and compact model, how much closing the gates changes the output at
all, next to which the error is to be judged, and whether the compact model becomes a `.tflite` file
that runs and agrees. Models that are recorded already for the size are skipped. One line per model
is appended to results/applications.jsonl; `python docs/generate.py` makes a table of it.
"""

import gc
import inspect
import tempfile
from pathlib import Path

import keras
import numpy as np
from absl import app, flags
from proving import compared, disturb_statistics, timed
from records import Records

import tf_kfacprune as kp
from tf_kfacprune.compaction import parity_error, random_inputs
from tf_kfacprune.errors import ExportError
from tf_kfacprune.gates import GatedNetwork, insert_gates
from tf_kfacprune.graph import CostModel, analyze

MODELS = flags.DEFINE_list("models", None, "Constructor names; default: all of them.")
SIZE = flags.DEFINE_integer("size", 96, "Height and width of the input images.")
TFLITE = flags.DEFINE_bool("tflite", True, "Whether to convert and run the compact model, too.")
OUTPUT = flags.DEFINE_string("output", None, "Folder of the records; default: results/.")


def constructors():
    """All constructors of `keras.applications`, by name."""
    return dict(inspect.getmembers(keras.applications, inspect.isfunction))


def randomize(model, rng):
    """Random biases, scales and statistics, so that closed channels do not hide behind zeros."""
    norms = [layer for layer in model.layers if hasattr(layer, "moving_variance")]
    for layer in model.layers:
        if getattr(layer, "bias", None) is not None:
            layer.bias.assign(rng.uniform(-0.1, 0.1, layer.bias.shape))
        if getattr(layer, "gamma", None) is not None:
            layer.gamma.assign(rng.uniform(0.5, 1.5, layer.gamma.shape))
        if getattr(layer, "beta", None) is not None:
            layer.beta.assign(rng.uniform(-0.5, 0.5, layer.beta.shape))
    disturb_statistics(norms, model, random_inputs(model, batch_size=4), rng)


def channel_share(channels, classifier):
    """Share of prunable channels outside the classifier, and what freezes the others."""
    total = sum(len(p.labels) for p in channels.flow.producers if p.name != classifier)
    frozen = [f for f in channels.frozen if f.layer != classifier]
    causes = {}
    for record in frozen:
        causes[record.reason] = causes.get(record.reason, 0) + record.channels
    return 1 - sum(f.channels for f in frozen) / total, causes


def convert(model):
    """Size of the model as `.tflite` file, which was run and compared, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = kp.export.tflite(model, Path(folder) / "model.tflite", batch_size=1)
        except ExportError as error:
            return {"error": str(error)}
        return {"bytes": path.stat().st_size}


def examine(name, constructor, size):
    """Gates, compacts and compares one model."""
    rng = np.random.default_rng(0)
    model = constructor(
        weights=None, input_shape=(size, size, 3), classes=10, classifier_activation=None
    )
    randomize(model, rng)
    channels, analyze_s = timed(analyze, model)
    _, inspect_s = timed(kp.inspect, model)
    cost = CostModel(channels)
    contractions = [edge.layer for edge in channels.edges]
    share, causes = channel_share(channels, contractions[-1].name)
    gated, insert_s = timed(insert_gates, model)
    x = random_inputs(model, batch_size=2)
    dense = model(x, training=False)
    record = {
        "params": model.count_params(),
        "neurons": channels.num_neurons,
        "groups": len(channels.groups),
        "num_branches": len(cost.branches.removable),
        "prunable_share": round(share, 4),
        "frozen": causes,
        "counts_all_parameters": cost.params_dense == model.count_params(),
        "open_gates_change": parity_error(dense, gated(x, training=False)),
        "seconds": {"analyze": analyze_s, "inspect": inspect_s, "insert": insert_s},
    }
    (bank,) = GatedNetwork(gated).sources
    branches = [channels.groups[g] for g in sorted(cost.branches.removable)][::2]
    for kind in ("branches", "soft", "hard") if branches else ("soft", "hard"):
        values = rng.uniform(0.3, 1.0, bank.size) * (rng.uniform(size=bank.size) < 0.7)
        for group in branches if kind == "branches" else ():
            values[group.neurons] = 0.0
        bank.set_values((values > 0).astype("float32") if kind == "hard" else values)
        small, record["seconds"][f"compact_{kind}"], record[kind] = compared(
            gated, dense, x, model.count_params()
        )
    if TFLITE.value:
        record["tflite"], record["seconds"]["tflite"] = timed(convert, small)
    return record


def main(argv):
    """Examines the models that are not recorded yet, and appends the records."""
    del argv
    records = Records("applications.jsonl", OUTPUT.value)
    every = constructors()
    for name in MODELS.value or every:
        key = {"model": name, "size": SIZE.value}
        if key in records:
            continue
        records.add(key, examine(name, every[name], SIZE.value))
        keras.backend.clear_session()
        gc.collect()


if __name__ == "__main__":
    app.run(main)
