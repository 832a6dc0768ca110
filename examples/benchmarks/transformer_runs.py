"""Pruned transformers against dense ones and narrower ones of as many MACs, trained as long.

    python examples/benchmarks/transformer_runs.py --tasks=digits --seeds=3 --epochs=20

Trains what `examples/transformers.py` does: a dense network, pruned ones, and for each budget the
widest network of the same class within it. Each run is exported to `.tflite`, and timed next to the
dense network. Finished runs are skipped; one line per run is appended to
`results/transformers.jsonl`, `python docs/generate.py` makes a table of them. Needs `[hub]`.
"""

import sys
import tempfile
import time
from pathlib import Path

import keras
from absl import app, flags

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import transformers as example  # noqa: E402
from records import Records  # noqa: E402
from transformer_tasks import TASKS, data, network  # noqa: E402

import tf_kfacprune as kp  # noqa: E402

WHICH = flags.DEFINE_list("tasks", list(TASKS), "Tasks to train.")
SEEDS = flags.DEFINE_integer("seeds", 1, "How many seeds, from 0.")
BUDGETS = flags.DEFINE_list("budgets", ["0.5", "0.3"], "Fractions of the MACs to keep.")
METHODS = flags.DEFINE_list("methods", ["dense", "pruned", "narrow"], "What to train.")
OUTPUT = flags.DEFINE_string("output", None, "Folder of the records; default: results/.")
FLAGS = flags.FLAGS

SETTINGS = ["hidden", "epochs", "batch_size", "learning_rate", "weight_decay"]
SETTINGS += ["examples", "validation"]


def narrow_width(task, budget):
    """Width of the widest network within a budget of MACs: heads of whole dimensions."""
    limit = budget * kp.inspect(network(task, FLAGS.hidden)).macs
    widths = range(FLAGS.hidden - 4, 3, -4)
    return next(w for w in widths if kp.inspect(network(task, w)).macs <= limit)


def examine(task, method, budget):
    """One run: its record."""
    keras.utils.set_random_seed(FLAGS.seed)
    x, y, x_test, y_test = data(task, FLAGS.examples, FLAGS.validation)
    dense = network(task, FLAGS.hidden)
    hidden = narrow_width(task, budget) if method == "narrow" else FLAGS.hidden
    keras.utils.set_random_seed(FLAGS.seed)
    start = time.process_time()
    asked = kp.Budget(macs=budget) if method == "pruned" else None
    pm = example.trained(network(task, hidden), x, y, asked)
    seconds = time.process_time() - start
    small = kp.compact(pm)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "small.tflite"
        kp.export.tflite(small, file, verify_data=x_test[:64])
        kp.export.saved_model(small, Path(folder) / "saved_model", verify_data=x_test[:64])
        size = file.stat().st_size
    # Both as models, which are written for one example: a free batch alone costs 15 % here.
    times = kp.export.latency({"dense": dense, "small": small})
    return {
        "width": hidden,
        "macs": kp.inspect(small).macs / kp.inspect(dense).macs,
        "params": small.count_params() / dense.count_params(),
        "bytes": size,
        "latency_ratio": times.ratios["small"],
        "cpu_seconds": round(seconds, 1),
        **example.measured(small, x_test, y_test),
    }


def main(argv):
    """Trains what is not recorded yet."""
    del argv
    records = Records("transformers.jsonl", OUTPUT.value)
    for seed in range(SEEDS.value):
        FLAGS.seed = seed
        for task in WHICH.value:
            for method in METHODS.value:
                for budget in [1.0] if method == "dense" else map(float, BUDGETS.value):
                    key = {"task": task, "method": method, "budget": budget, "seed": seed}
                    key |= {name: FLAGS[name].value for name in SETTINGS}
                    if key not in records:
                        records.add(key, examine(task, method, budget))
                        keras.backend.clear_session()


if __name__ == "__main__":
    app.run(main)
