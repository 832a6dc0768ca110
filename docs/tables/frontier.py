"""Error against size of every method."""

import statistics

from tables.markdown import (
    grouped_by_settings,
    mean_and_deviation,
    recorded_table,
    records,
    training_of,
)


def frontier_table():
    """Error and size of every method, mean and deviation over the seeds.

    Cases are in the order of their first runs; in each, methods of about the same size stand
    together, the best first.
    """
    lines = [line for line in records("frontier.jsonl") if line["key"]["split"] == "test"]
    groups = grouped_by_settings(lines)
    cases = list(dict.fromkeys(case_of(runs[0]["key"]) for runs in groups))

    def order(runs):
        weights = statistics.mean(run["weights"] for run in runs)
        error = statistics.mean(run["error"] for run in runs)
        return cases.index(case_of(runs[0]["key"])), -float(f"{weights:.0e}"), error

    rows = [
        [
            *case_of(runs[0]["key"]),
            runs[0]["key"]["method"],
            runs[0]["key"]["target"],
            len(runs),
            mean_and_deviation([run["error"] for run in runs], 2),
            *(mean_and_deviation([run[name] for run in runs], 0) for name in ("weights", "macs")),
            seconds_of(runs),
        ]
        for runs in sorted(groups, key=order)
    ]
    header = ["case", "epochs x images", "method", "size or strength", "seeds"]
    return recorded_table([*header, "error %", "weights", "MACs", "seconds"], rows)


def seconds_of(runs):
    """Mean seconds of runs; nothing if they shared their cores with others."""
    seconds = [run["seconds"] for run in runs]
    return "-" if None in seconds else f"{statistics.mean(seconds):.0f}"


def case_of(key):
    """The case of a run, and how long it was."""
    return key["case"], training_of(key)


def cost_table():
    """Seconds of whole runs, ours and the dense network with AdamW in turns."""
    rows = [
        [
            *(runs[0]["key"][name] for name in ("case", "epochs", "target")),
            len(runs),
            *(mean_and_deviation([run[name] for run in runs], 0) for name in ("dense_s", "ours_s")),
            mean_and_deviation([run["ratio"] for run in runs], 2),
        ]
        for runs in grouped_by_settings(records("frontier_cost.jsonl"), repeated="round")
    ]
    header = ["case", "epochs", "size of ours", "rounds", "dense, s", "ours, s", "ours / dense"]
    return recorded_table(header, rows)
