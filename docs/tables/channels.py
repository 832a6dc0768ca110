"""What happens to channels, layer by layer and model by model."""

import inspect

from tables.markdown import newest, recorded_table, table
from tf_kfacprune.graph.rules import registered_rules


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


def hub_table():
    """One row per backbone of keras_hub that the benchmark has recorded, the newest record."""
    rows = []
    for name, record in sorted(newest("hub.jsonl", lambda r: r["key"]["backbone"]).items()):
        if "failed" in record:
            rows.append([f"`{name}`", "fails", *[""] * 6])
            continue
        errors = [record[kind]["error"] for kind in ("hard", "soft") if kind in record]
        rows.append(
            [
                f"`{name}`",
                f"{100 * record['prunable_share']:.0f} %",
                f"{100 * record['least_params']:.0f} %" if errors else "",
                f"{max(errors):.0e}" if errors else "",
                f"{record['open_gates_change']:.2g}" if errors else "",
                record["opened"],
                len(record["opaque"]),
                f"{record['seconds']['analyze']:.0f}",
            ]
        )
    header = ["backbone", "prunable", "least params", "error", "open gates"]
    return recorded_table([*header, "opened", "opaque", "analyze s"], rows)


def hub_summary():
    """How many backbones of the records can be pruned, and how exactly."""
    recorded = newest("hub.jsonl", lambda r: r["key"]["backbone"]).values()
    prunable = [r for r in recorded if r.get("neurons")]
    if not prunable:
        return "No run has been recorded yet.\n"
    error = max(r[kind]["error"] for r in prunable for kind in ("hard", "soft"))
    changed = sum(r["open_gates_change"] != 0 for r in prunable)
    most = sum(r["prunable_share"] >= 0.8 for r in prunable)
    return (
        f"Of {len(recorded)} backbones {len(prunable)} can be pruned, {most} of them in 80 % of "
        f"their channels or more; the largest error is {error:.0e}; open gates change {changed}.\n"
    )


def applications_table():
    """One row per model that the benchmark has recorded, the newest record of each."""
    rows = []
    for name, record in sorted(newest("applications.jsonl", lambda r: r["key"]["model"]).items()):
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
    return recorded_table([*header, "analyze s", "inspect s", "compact s", "`.tflite` runs"], rows)
