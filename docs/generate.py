"""Writes the generated tables of the documentation.

    python docs/generate.py            # brings the tables up to date
    python docs/generate.py --check    # only says whether they are

A table stands between two comments, `<!-- table: name -->` and `<!-- end -->`. The tables of layers
and operations are made from the registry of channel rules, that of `keras.applications` from the
records of `examples/benchmarks/applications.py`.
"""

import inspect
import json
import re
import sys
from pathlib import Path

from tf_kfacprune.graph.rules import registered_rules

HERE = Path(__file__).parent
RECORDS = HERE.parent / "examples" / "benchmarks" / "results" / "applications.jsonl"
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


TABLES = {
    "layers": lambda: rules_table(layers=True),
    "operations": lambda: rules_table(layers=False),
    "applications": applications_table,
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
