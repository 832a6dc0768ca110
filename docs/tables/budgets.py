"""What budgets asked for, and what networks came to."""

from tables.markdown import grouped_by_settings, recorded_table, records

_MEASURES = ("macs", "params", "bytes", "latency")


def budgets_table():
    """One row per network, training, measure and target; the spread is over the seeds."""
    rows = []
    for runs in sorted(grouped_by_settings(records("budgets.jsonl")), key=_order):
        key = runs[0]["key"]
        row = [
            f"`{key['network']}`",
            f"{key['policy']}, {key['optimizer']}, {key['epochs']} x {key['images']}",
            key["measure"] + (f" of {key['latency_of']}" if "latency_of" in key else ""),
            f"{key['asked']:g}",
            len(runs),
        ]
        if any(run["achieved"] is None for run in runs):
            rows.append([*row, "out of reach", "-", "-", "-", "-"])
            continue
        measured = [100 * run["measured"] / key["asked"] for run in runs if "measured" in run]
        rows.append(
            [
                *row,
                spread([100 * run["ratio"] for run in runs], "{:.1f} %"),
                spread(measured, "{:.1f} %") if measured else "-",
                spread([run["before"] for run in runs], "{:.4f}"),
                spread([run["closed"] for run in runs], "{}"),
                spread([run["reopened"] for run in runs], "{}"),
            ]
        )
    header = [
        "network",
        "policy, optimizer, epochs x images",
        "measure",
        "asked",
        "seeds",
        "share of it used",
        "as measured",
        "before landing",
    ]
    return recorded_table([*header, "closed by it", "reopened"], rows)


def _order(runs):
    key = runs[0]["key"]
    return key["policy"], key["network"], _MEASURES.index(key["measure"]), -key["asked"]


def spread(values, form):
    """The least and the greatest value, or the only one."""
    ends = [form.format(value) for value in (min(values), max(values))]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)
