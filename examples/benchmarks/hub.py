"""Gates and compacts the backbones of keras_hub, and proves that nothing else changes.

    python examples/benchmarks/hub.py [--models=Bert,GPT2]

Every backbone (a tiny one, see hub_backbones.py) gets a Dense layer behind each of its outputs, as
a task would have, so that its own outputs may lose channels; random weights and statistics; then
random gates, hard and soft ones. Recorded per backbone: how many layers were opened and which stay
opaque, the share of channels (without those of the outputs) that can be pruned, what freezes the
rest, the least share of parameters, the relative error between gated and compact model, how much
closing the gates changes the output at all, next to which the error is to be judged, how much open
gates change, and seconds. A backbone that fails is recorded with the error. Those recorded already
are skipped. One line per backbone is appended to results/hub.jsonl; `python docs/generate.py` makes
a table of it. Needs the extra `[hub]`.
"""

import gc

import keras
import keras_hub
import numpy as np
from absl import app, flags
from hub_backbones import BACKBONES, example
from proving import compared, disturb_statistics, timed
from records import Records

from tf_kfacprune.compaction import parity_error
from tf_kfacprune.gates import GatedNetwork, insert_gates
from tf_kfacprune.graph import CostModel, analyze, opaque_layers, reasons

MODELS = flags.DEFINE_list("models", None, "Names of backbones; default: all of them.")
OUTPUT = flags.DEFINE_string("output", None, "Folder of the records; default: results/.")

HEAD = "benchmark_head"


def with_heads(backbone):
    """The backbone with a Dense layer behind every output that has channels."""
    outputs = []
    actual = keras.tree.flatten(backbone(example(backbone)))
    for output, value in zip(keras.tree.flatten(backbone.output), actual, strict=True):
        # Some backbones are mistaken about the shapes of their outputs.
        channels = output.shape[-1] if tuple(output.shape[1:]) and len(value.shape) > 1 else None
        if channels == value.shape[-1] and "float" in output.dtype:
            output = keras.layers.Dense(3, name=f"{HEAD}_{len(outputs)}")(output)
        outputs.append(output)
    return keras.Model(backbone.input, outputs, name=backbone.name)


def randomize(model, x, rng):
    """Random weights around the initial ones; statistics of a batch, disturbed."""
    for weight in model.trainable_weights:
        value = keras.ops.convert_to_numpy(weight)
        factor = rng.uniform(0.7, 1.3, value.shape)
        weight.assign(value * factor + rng.uniform(-0.1, 0.1, value.shape))
    layers = list(model._flatten_layers())
    norms = [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization)]
    disturb_statistics(norms, model, x, rng, least=1e-3)


def channel_share(channels):
    """Share of prunable channels, those of outputs left out, and what freezes the others."""
    total = sum(len(p.labels) for p in channels.flow.producers)
    kinds = {call.path: type(call.operation).__name__ for call in channels.graph.calls}
    causes, outputs, frozen = {}, 0, 0
    for record in channels.frozen:
        if record.reason == reasons.MODEL_OUTPUT:
            outputs += record.channels
            continue
        frozen += record.channels
        cause = f"{kinds.get(record.where, record.where)}: {record.reason}"
        causes[cause] = causes.get(cause, 0) + record.channels
    others = total - outputs
    return (1 - frozen / others if others else 0.0), causes


def examine(name):
    """Gates, compacts and compares one backbone."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    backbone = BACKBONES[name]()
    model = with_heads(backbone)
    x = example(backbone)
    randomize(model, x, rng)
    channels, analyze_s = timed(analyze, model)
    share, causes = channel_share(channels)
    params = model.count_params()
    record = {
        "params": params,
        "opened": len(channels.graph.opened),
        "opaque": {
            layer.path: f"{type(layer.layer).__name__} ({layer.params} weights): {layer.reason}"
            for layer in opaque_layers(channels.graph)
        },
        "neurons": channels.num_neurons,
        "groups": len(channels.groups),
        "prunable_share": round(share, 4),
        "frozen": dict(sorted(causes.items(), key=lambda item: -item[1])),
        "seconds": {"analyze": analyze_s},
    }
    if not channels.num_neurons:
        return record
    cost = CostModel(channels)
    record["counts_all_parameters"] = cost.params_dense == params
    record["least_params"] = round(cost.least("params"), 4)
    gated, record["seconds"]["insert"] = timed(insert_gates, model)
    dense = model(x, training=False)
    record["open_gates_change"] = parity_error(dense, gated(x, training=False))
    (bank,) = GatedNetwork(gated).sources
    for kind in ("soft", "hard"):
        values = np.zeros(bank.size)
        while (values > 0).all() or not values.any():  # so that something is closed
            values = rng.uniform(0.3, 1.0, bank.size) * (rng.uniform(size=bank.size) < 0.7)
        bank.set_values((values > 0).astype("float32") if kind == "hard" else values)
        _, record["seconds"][f"compact_{kind}"], record[kind] = compared(gated, dense, x, params)
    return record


def main(argv):
    """Examines the backbones that are not recorded yet, and appends the records."""
    del argv
    records = Records("hub.jsonl", OUTPUT.value)
    for name in MODELS.value or BACKBONES:
        key = {"backbone": name, "keras_hub": keras_hub.__version__}
        if key in records:
            continue
        try:
            record = examine(name)
        except Exception as error:  # noqa: BLE001 (the next backbones shall be run, too)
            record = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        records.add(key, record)
        keras.backend.clear_session()
        gc.collect()


if __name__ == "__main__":
    app.run(main)
