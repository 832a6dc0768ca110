"""Error against size of every method."""

import statistics

from tables.markdown import mean_and_deviation, recorded_table, records, training_of


def frontier_table():
    """Error and size of every method, mean and deviation over the seeds.

    Cases are in the order of their first runs; in each, methods of about the same size stand
    together, the best first.
    """
    groups = {}
    for record in records("frontier.jsonl"):
        key = record["key"]
        if key["split"] == "test":
            group = key["case"], training_of(key), key["method"], key["target"]
            groups.setdefault(group, []).append(record)
    cases = list(dict.fromkeys(group[:2] for group in groups))

    def order(item):
        (*case, _, _), runs = item
        weights = statistics.mean(run["weights"] for run in runs)
        error = statistics.mean(run["error"] for run in runs)
        return cases.index(tuple(case)), -float(f"{weights:.0e}"), error

    rows = [
        [
            *group,
            len(runs),
            mean_and_deviation([run["error"] for run in runs], 2),
            *(mean_and_deviation([run[name] for run in runs], 0) for name in ("weights", "macs")),
            f"{statistics.mean(run['seconds'] for run in runs):.0f}",
        ]
        for group, runs in sorted(groups.items(), key=order)
    ]
    header = ["case", "epochs x images", "method", "size or strength", "seeds"]
    return recorded_table([*header, "error %", "weights", "MACs", "seconds"], rows)


def cost_table():
    """Seconds of whole runs, ours and the dense network with AdamW in turns."""
    groups = {}
    for record in records("frontier_cost.jsonl"):
        key = record["key"]
        groups.setdefault((key["case"], key["epochs"], key["target"]), []).append(record)
    rows = [
        [
            *group,
            len(runs),
            *(mean_and_deviation([run[name] for run in runs], 0) for name in ("dense_s", "ours_s")),
            mean_and_deviation([run["ratio"] for run in runs], 2),
        ]
        for group, runs in groups.items()
    ]
    header = ["case", "epochs", "size of ours", "rounds", "dense, s", "ours, s", "ours / dense"]
    return recorded_table(header, rows)
