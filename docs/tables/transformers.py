"""Transformers of keras_hub, trained: dense, pruned while they were trained, and built narrower."""

from tables.markdown import grouped_by_settings, mean_and_deviation, recorded_table, records

_NAMES = {
    "digits": "ViT, digits",
    "packages": "BERT, packages",
    "characters": "GPT-2, characters",
}


def transformers_table():
    """One row per task, method and budget; the spread is over the seeds."""
    rows = []
    for runs in grouped_by_settings(records("transformers.jsonl")):
        key = runs[0]["key"]
        if key["validation"]:
            continue
        rows.append(
            [
                _NAMES[key["task"]],
                key["method"],
                f"{key['epochs']}, {key['learning_rate']:g}",
                len(runs),
                mean_and_deviation([run["width"] for run in runs], 0),
                mean_and_deviation([run["macs"] for run in runs], 1, 100) + " %",
                mean_and_deviation([run["error"] for run in runs], 2, 100) + " %",
                mean_and_deviation([run["loss"] for run in runs], 3),
                mean_and_deviation([run["latency_ratio"] for run in runs], 2),
                mean_and_deviation([run["cpu_seconds"] for run in runs], 0),
            ]
        )
    header = ["network, task", "method", "epochs, rate", "seeds", "width", "MACs", "error", "loss"]
    return recorded_table([*header, "time of a `.tflite`", "CPU s"], rows)
