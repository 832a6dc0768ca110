"""Parts that all tables are made of."""

import json
import statistics
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "examples" / "benchmarks" / "results"


def records(name):
    """The lines of a file of the benchmarks, the oldest first; none if there is no file."""
    path = RESULTS / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def grouped_by_settings(records, repeated="seed"):
    """Runs that differ in nothing but the seed, say, in the order of their first ones."""
    groups = {}
    for record in records:
        settings = {name: v for name, v in record["key"].items() if name != repeated}
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(record)
    return list(groups.values())


def newest(name, key):
    """The newest record of each key in a file of the benchmarks, in the order of the file."""
    return {key(record): record for record in records(name)}


def table(header, rows):
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def recorded_table(header, rows):
    """A table, or a word if there is nothing in it."""
    return table(header, rows) if rows else "No run has been recorded yet.\n"


def training_of(key):
    """How long a run was: `epochs x images`."""
    return f"{key['epochs']} x {key['examples'] or 'all'}"


def mean_and_deviation(values, digits, unit=1):
    """`mean +- standard deviation over the runs`."""
    values = [unit * value for value in values]
    deviation = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"
