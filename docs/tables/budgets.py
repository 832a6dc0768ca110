"""What budgets asked for, and what networks came to."""

from tables.markdown import recorded_table, records


def budgets_table():
    """One row per network, policy and target; the spread is over the seeds."""
    groups = {}
    for line in records("budgets.jsonl"):
        key = line["key"]
        of = key["network"], key["policy"], key["measure"], -key["asked"]
        groups.setdefault(of, []).append(line)
    rows = []
    for (network, policy, measure, asked), runs in sorted(groups.items()):
        row = [f"`{network}`", policy, measure, f"{-asked:g}", len(runs)]
        if any(run["achieved"] is None for run in runs):
            rows.append([*row, "out of reach", "-", "-", "-"])
            continue
        rows.append(
            [
                *row,
                spread([100 * run["ratio"] for run in runs], "{:.1f} %"),
                spread([run["before"] for run in runs], "{:.4f}"),
                spread([run["closed"] for run in runs], "{}"),
                spread([run["reopened"] for run in runs], "{}"),
            ]
        )
    header = [
        "network",
        "policy",
        "measure",
        "asked",
        "seeds",
        "share of it used",
        "before landing",
    ]
    return recorded_table([*header, "closed by it", "reopened"], rows)


def spread(values, form):
    """The least and the greatest value, or the only one."""
    ends = [form.format(value) for value in (min(values), max(values))]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)
