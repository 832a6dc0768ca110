"""Error against size of every method."""

from tables.markdown import mean_and_deviation, recorded_table, records


def frontier_table():
    """Error and size of every method, mean and deviation over the seeds."""
    groups = {}
    for record in records("frontier.jsonl"):
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
