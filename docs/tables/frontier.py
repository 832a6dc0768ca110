"""Error against size of every method."""

from tables.markdown import mean_and_deviation, recorded_table, records, training_of


def frontier_table():
    """Error and size of every method, mean and deviation over the seeds."""
    groups = {}
    for record in records("frontier.jsonl"):
        key = record["key"]
        if key["split"] == "test":
            group = key["case"], training_of(key), key["method"], key["target"]
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
    header = ["case", "epochs x images", "method", "size or strength", "seeds"]
    return recorded_table([*header, "error %", "weights", "MACs"], rows)
