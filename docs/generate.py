"""Writes the generated tables of the documentation.

    python docs/generate.py            # brings the tables up to date
    python docs/generate.py --check    # only says whether they are

A table stands between two comments, `<!-- table: name -->` and `<!-- end -->`. The tables of layers
and operations are made from the registry of channel rules, that of `keras.applications` from the
records of `examples/benchmarks/applications.py`, those on flatness and on budgets from
`flatness.py` and `budgets.py` there.
"""

import inspect
import json
import re
import statistics
import sys
from pathlib import Path

from tf_kfacprune.graph.rules import registered_rules

HERE = Path(__file__).parent
RESULTS = HERE.parent / "examples" / "benchmarks" / "results"
RECORDS = RESULTS / "applications.jsonl"
FLATNESS = RESULTS / "flatness.jsonl"
BUDGETS = RESULTS / "budgets.jsonl"
TABLE = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def table(header, rows):
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def rules_table(layers):
    """What happens to the channels of every layer (or operation), by rule."""
    by_rule = {}
    for name, is_layer, rule in registered_rules():
        if is_layer == layers:
            by_rule.setdefault(type(rule), []).append(f"`{name}`")
    rows = []
    for rule, names in by_rule.items():
        first = inspect.getdoc(rule).split("\n\n")[0].replace("\n", " ")
        rows.append([", ".join(names), first.replace("|", "\\|")])
    return table(["layers" if layers else "operations", "channels"], rows)


def applications_table():
    """One row per model that the benchmark has recorded, the newest record of each."""
    if not RECORDS.exists():
        return "No model has been recorded yet.\n"
    records = {r["model"]: r for r in map(json.loads, RECORDS.read_text().splitlines())}
    rows = []
    for name, record in sorted(records.items()):
        errors = [record[k]["error"] for k in ("hard", "soft", "branches") if k in record]
        seconds = record["seconds"]
        tflite = record.get("tflite", {})
        rows.append(
            [
                f"`{name}`",
                f"{record['params'] / 1e6:.1f}M",
                f"{100 * record['prunable_share']:.4g} %",
                record["num_branches"],
                f"{max(errors):.0e}",
                f"{seconds['analyze']:.1f}",
                f"{seconds['inspect']:.1f}",
                f"{max(s for k, s in seconds.items() if k.startswith('compact')):.0f}",
                "yes" if "bytes" in tflite else "no" if "error" in tflite else "not tried",
            ]
        )
    header = ["model", "params", "prunable", "branches", "error"]
    return table([*header, "analyze s", "inspect s", "compact s", "`.tflite` runs"], rows)


def flatness_records(part):
    """Runs of a part of the benchmark on the test set: (network, label noise, strength) -> runs."""
    groups = {}
    lines = FLATNESS.read_text().splitlines() if FLATNESS.exists() else []
    for record in map(json.loads, lines):
        if record["part"] == part and not record["validation"]:
            key = record["network"], record.get("label_noise", 0.0), record["strength"]
            groups.setdefault(key, []).append(record)
    return dict(sorted(groups.items()))


def recorded_table(header, rows):
    """A table, or a word if there is nothing in it."""
    return table(header, rows) if rows else "No run has been recorded yet.\n"


def mean_and_deviation(values, digits, unit=1):
    """`mean +- standard deviation over the runs`."""
    values = [unit * value for value in values]
    deviation = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def flatness_table(part):
    """Curvature and error with and without the penalty, over the seeds."""
    rows = []
    for (network, noise, strength), runs in flatness_records(part).items():

        def of(name, digits, unit=1, runs=runs):
            return mean_and_deviation([run[name] for run in runs], digits, unit)

        rows.append(
            [
                f"{network}, {noise:.0%} wrong labels" if noise else network,
                f"{strength:g}" if strength else "none",
                len(runs),
                of("top", 2),
                of("top_scaled", 0),
                of("test_error", 2, 100),
                of("train_loss", 3),
                of("weight_norm", 1),
            ]
        )
    header = ["network", "penalty", "seeds", "top eigenvalue", "scaled", "test error %"]
    return recorded_table([*header, "training loss", "weight norm"], rows)


def corruptions_table(part):
    """Accuracy on spoilt test images with and without the penalty."""
    rows, header = [], []
    for (network, noise, strength), runs in flatness_records(part).items():
        names = list(runs[0]["corrupted"])
        header = [*names, "mean"]
        columns = [[run["corrupted"][name] for run in runs] for name in names]
        columns.append([statistics.mean(run["corrupted"].values()) for run in runs])
        rows.append(
            [
                f"{network}, {noise:.0%} wrong labels" if noise else network,
                f"{strength:g}" if strength else "none",
                *(mean_and_deviation(column, 1, 100) for column in columns),
            ]
        )
    return recorded_table(["network", "penalty", *header], rows)


def tracking_table():
    """How the K-FAC estimate follows the exact eigenvalue along runs."""
    rows = []
    for (network, _, strength), runs in flatness_records("track").items():
        ratios = [estimate / exact for run in runs for _, exact, estimate, _ in run["track"]]
        rows.append(
            [
                network,
                f"{strength:g}" if strength else "none",
                len(runs),
                mean_and_deviation([run["rank_correlation"] for run in runs], 2),
                mean_and_deviation([run["rank_correlation_live"] for run in runs], 2),
                f"{min(ratios):.2f} to {max(ratios):.2f}",
            ]
        )
    header = ["network", "penalty", "runs", "rank correlation", "of the live figure"]
    return recorded_table([*header, "estimate / exact"], rows)


def newest(name, key):
    """The newest record of each key in a file of the benchmarks, in the order of the file."""
    path = RESULTS / name
    lines = path.read_text().splitlines() if path.exists() else []
    return {key(record): record for record in map(json.loads, lines)}


FORMATS = (None, "float16", "dynamic", "int8", "int16x8")
FORMAT_NAMES = [name or "float32" for name in FORMATS]


def latency_records():
    """Network -> rows of the latency benchmark, by (model, format, threads)."""
    records = newest("deploy_latency.jsonl", lambda record: record["key"]["network"])
    return {
        network: {(row["model"], row["quantization"], row["threads"]): row for row in found["rows"]}
        for network, found in records.items()
    }


def deploy_sizes_table():
    """Bytes of every file that the latency benchmark wrote."""
    rows = []
    for network, files in latency_records().items():
        for (model, name, threads), small in files.items():
            if model == "compact" and threads == 1:
                dense = files.get(("dense", name, 1))
                sizes = [small["size"]["raw"], small["size"]["gzip"], small["activations"]]
                sizes = [dense["size"]["raw"] if dense else None, *sizes]
                shown = ["-" if size is None else f"{size:,}" for size in sizes]
                rows.append([network, name or "float32", *shown])
    return table(["network", "format", "dense", "compact", "compact, gzip", "activations"], rows)


def deploy_times_table():
    """Time of every compact file, relative to the dense float32 file."""
    rows = []
    for network, files in latency_records().items():
        for threads in sorted({threads for _, _, threads in files}):
            dense = files["dense", None, threads]
            small = [files.get(("compact", name, threads)) for name in FORMATS]
            rows.append(
                [
                    network,
                    threads,
                    f"{dense['microseconds']:,.0f}",
                    f"{small[0]['macs_ratio']:.3f}",
                    *(f"{row['ratio']:.3f}" if row else "-" for row in small),
                    f"{small[0]['time_per_macs']:.1f}",
                ]
            )
    header = ["network", "threads", "dense us", "MACs", *FORMAT_NAMES]
    return table([*header, "float32: time / MACs"], rows)


def deploy_accuracy_table():
    """Accuracy of every file on the test images, beside that of the Keras model."""
    rows = []
    records = newest("deploy_networks.jsonl", lambda record: record["key"]["network"])
    for network, record in records.items():
        trained = f"{record['key']['epochs']} x {record['key']['examples'] or 'all'}"
        shown = []
        for name in FORMAT_NAMES:
            found = record["formats"].get(name)
            points = 100 * (found["accuracy"] - record["keras_accuracy"]) if found else None
            shown.append(f"{points:+.2f}" if found else "failed")
        accuracy = f"{100 * record['keras_accuracy']:.2f} %"
        rows.append([network, trained, f"{record['weights']:,}", accuracy, *shown])
    return table(["network", "epochs x images", "weights", "Keras", *FORMAT_NAMES], rows)


def deploy_applications_table():
    """How closely files of compact models of keras.applications follow the Keras model."""
    records = newest(
        "deploy_applications.jsonl", lambda r: (r["key"]["model"], r["key"]["quantization"])
    )
    rows = []
    for model in sorted({model for model, _ in records}):
        cells = []
        for name in (None, "int8"):
            found = records.get((model, name))
            if found is None:
                cells += ["not run", ""]
            elif found["agrees"]:
                cells += [f"{found['rms_error']:.1e}", f"{found['bytes'] / 1e6:.1f} MB"]
            else:
                cells += [found["message"].split("\n")[0].replace("|", "\\|"), ""]
        params = next(records[key]["compact_params"] for key in records if key[0] == model)
        rows.append([f"`{model}`", f"{params / 1e6:.1f}M", *cells])
    header = ["compact model", "params", "float32: error", "float32", "int8: error", "int8"]
    return table(header, rows)


def budgets_table():
    """One row per run that the benchmark has recorded."""
    if not BUDGETS.exists():
        return "No run has been recorded yet.\n"
    rows = []
    for record in map(json.loads, BUDGETS.read_text().splitlines()):
        row = [f"`{record['network']}`", record["measure"], record["seed"], record["asked"]]
        if record["achieved"] is None:
            rows.append([*row, "out of reach", "–", "–", "–", "–"])
            continue
        used = f"{100 * record['ratio']:.2f} %"
        switched = [f"{record[name]} of {record['gates']}" for name in ("closed", "reopened")]
        rows.append([*row, f"{record['achieved']:.5f}", used, f"{record['before']:.5f}", *switched])
    header = ["network", "measure", "seed", "asked", "achieved", "used", "before"]
    return table([*header, "closed", "reopened"], rows)


def frontier_table():
    """Error and size of every method, mean and deviation over the seeds."""
    groups = {}
    path = RESULTS / "frontier.jsonl"
    for record in map(json.loads, path.read_text().splitlines() if path.exists() else []):
        key = record["key"]
        if key["split"] == "test" and key["examples"] is None:
            group = key["case"], key["method"], key["target"], key["epochs"]
            groups.setdefault(group, []).append(record)
    rows = [
        [
            *group,
            len(runs),
            mean_and_deviation([run["error"] for run in runs], 2),
            *(mean_and_deviation([run[name] for run in runs], 0) for name in ("weights", "macs")),
        ]
        for group, runs in groups.items()
    ]
    header = ["case", "method", "size or strength", "epochs", "seeds", "error %", "weights", "MACs"]
    return recorded_table(header, rows)


TABLES = {
    "layers": lambda: rules_table(layers=True),
    "operations": lambda: rules_table(layers=False),
    "applications": applications_table,
    "deploy_sizes": deploy_sizes_table,
    "deploy_times": deploy_times_table,
    "deploy_accuracy": deploy_accuracy_table,
    "deploy_applications": deploy_applications_table,
    "flatness": lambda: flatness_table("train"),
    "corruptions": lambda: corruptions_table("train"),
    "flatness_pruned": lambda: flatness_table("prune"),
    "corruptions_pruned": lambda: corruptions_table("prune"),
    "tracking": tracking_table,
    "budgets": budgets_table,
    "frontier": frontier_table,
}


def generated(text):
    """The text with its tables made anew."""
    return TABLE.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}{match[4]}", text)


def main(arguments):
    """Writes the tables, or checks them; returns the exit status."""
    stale = []
    for path in sorted(HERE.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        fresh = generated(text)
        if fresh != text:
            stale.append(path.name)
            if "--check" not in arguments:
                path.write_text(fresh, encoding="utf-8")
    verb = "out of date" if "--check" in arguments else "written"
    print(f"{verb}: {', '.join(stale)}" if stale else "up to date")
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
