"""Whether predicted latencies hold: networks pruned at random, predicted against measured.

    python examples/benchmarks/latency.py [--networks=lenet5,resnet20] [--of=float32,int8]

Nothing is trained: gates get random scores, with an offset for each group, so that layers shrink
differently. Networks land on budgets of MACs, where the prediction decides nothing, and of latency,
where landing obeys it. One line per network goes to results/latency.jsonl: `predicted` and
`measured` time relative to the dense network's, and in microseconds.
"""

import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from records import Records

import tf_kfacprune as kp

FLAGS = flags.FLAGS
SHAPES = {
    "lenet5": ((28, 28, 1), 10),
    "ds_cnn": ((49, 10, 1), 12),
    "resnet8": ((32, 32, 3), 10),
    "mobilenetv2": ((32, 32, 3), 10),
    "resnet20": ((32, 32, 3), 10),
}
flags.DEFINE_list("networks", list(SHAPES), "Built-in networks.")
flags.DEFINE_list("of", ["float32", "int8"], "Files.")
flags.DEFINE_list("measures", ["macs", "latency"], "What the budgets bound.")
flags.DEFINE_list("targets", ["0.5", "0.3", "0.1"], "Fractions to keep.")
flags.DEFINE_integer("seeds", 2, "Random networks of each kind.")
flags.DEFINE_string("cache_dir", None, "Folder of measured layers; default: the library's.")
flags.DEFINE_string("output", None, "Folder of the records; default: results/.")


def at_random(model, table, measure, target, seed):
    """A network that has landed with random scores, and its predicted microseconds."""
    pm = kp.PrunableModel(
        model, kp.Budget(**{measure: target}), policy="random", latency_table=table
    )
    rng = np.random.default_rng(seed)
    scores = []
    for source in pm.gated.sources:
        for size in source.group_sizes:
            scores.append(rng.normal(size=size) + 0.7 * rng.normal())
    scores = tf.constant(np.concatenate(scores), "float32")
    pm.controller.policy.scores = lambda: scores
    pm.controller.land()
    return kp.compact(pm), pm.gated.cost.exact("latency", pm.gated.kept_neurons())


def written(model, file, of):
    """The model's file."""
    if of == "float32":
        return kp.export.tflite(model, file, batch_size=1, verify=False)
    examples = np.random.default_rng(0).normal(size=(8, *model.input_shape[1:]))
    return kp.export.tflite(
        model,
        file,
        quantization=of,
        representative_data=examples.astype("float32"),
        batch_size=1,
        verify=False,
    )


def examine(network, of, records):
    """All networks of one kind, timed together."""
    measures = [
        {"network": network, "of": of, "budget": measure, "asked": float(target), "seed": seed}
        for measure in FLAGS.measures
        for target in FLAGS.targets
        for seed in range(FLAGS.seeds)
    ]
    missing = [key for key in measures if key not in records]
    if not missing:
        return
    shape, classes = SHAPES[network]
    dense = kp.zoo.build(network, shape, classes, 0)
    table = kp.export.latency_table(dense, of=of, cache_dir=FLAGS.cache_dir)
    whole = kp.inspect(dense, latency_table=table).latency
    predicted = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {"dense": written(dense, Path(folder) / "dense.tflite", of)}
        for number, key in enumerate(missing):
            try:
                small, time = at_random(dense, table, key["budget"], key["asked"], key["seed"])
            except kp.errors.BudgetError as error:  # less than pruning can reach
                records.add(key, {"reason": str(error).split(". ")[0]})
                continue
            predicted[str(number)] = time
            files[str(number)] = written(small, Path(folder) / f"{number}.tflite", of)
        times = kp.export.latency(files, runs=20)
    for number, time in predicted.items():
        records.add(
            missing[int(number)],
            {
                "predicted": time / whole,
                "measured": times.ratios[number],
                "predicted_us": time,
                "measured_us": times.microseconds[number],
                "dense_predicted_us": whole,
                "dense_measured_us": times.microseconds["dense"],
            },
        )


def main(argv) -> None:
    """Measures what is not yet recorded."""
    del argv
    records = Records("latency.jsonl", FLAGS.output)
    for of in FLAGS.of:
        for network in FLAGS.networks:
            examine(network, of, records)
            keras.backend.clear_session()


if __name__ == "__main__":
    app.run(main)
