"""What networks were predicted to take, and what they took."""

import statistics

from tables.markdown import grouped_by_settings, recorded_table, records

_NETWORKS = ("lenet5", "ds_cnn", "resnet8", "mobilenetv2", "resnet20")


def latency_table():
    """One row per network, file and kind of budget; the spread is over targets and seeds."""
    rows = []
    for runs in sorted(_kinds(), key=_order):
        key = runs[0]["key"]
        row = [f"`{key['network']}`", key["of"], key["budget"], len(runs)]
        runs = [run for run in runs if "measured" in run]
        if not runs:
            rows.append([*row, "out of reach", "-", "-"])
            continue
        shares = sorted(run["measured"] / run["predicted"] for run in runs)
        measured = sorted(run["measured"] for run in runs)
        row[-1] = f"{len(runs)} of {row[-1]}" if len(runs) < row[-1] else row[-1]
        rows.append(
            [
                *row,
                f"{100 * measured[0]:.0f} % to {100 * measured[-1]:.0f} %",
                f"{100 * statistics.median(shares):.0f} %",
                f"{100 * shares[0]:.0f} % to {100 * shares[-1]:.0f} %",
            ]
        )
    header = ["network", "file", "budget of", "networks", "time left", "measured / predicted"]
    return recorded_table([*header, "from and to"], rows)


def _kinds():
    """Runs that differ in target and seed only."""
    kinds = {}
    for runs in grouped_by_settings(records("latency.jsonl"), "asked"):
        key = runs[0]["key"]
        kinds.setdefault((key["network"], key["of"], key["budget"]), []).extend(runs)
    return list(kinds.values())


def _order(runs):
    key = runs[0]["key"]
    return key["of"], _NETWORKS.index(key["network"]), key["budget"] == "latency"
