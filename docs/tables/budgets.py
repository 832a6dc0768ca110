"""What budgets asked for, and what networks came to."""

from tables.markdown import recorded_table, records


def budgets_table():
    """One row per run that the benchmark has recorded."""
    rows = []
    for record in records("budgets.jsonl"):
        row = [f"`{record['network']}`", record["measure"], record["seed"], record["asked"]]
        if record["achieved"] is None:
            rows.append([*row, "out of reach", "–", "–", "–", "–"])
            continue
        used = f"{100 * record['ratio']:.2f} %"
        switched = [f"{record[name]} of {record['gates']}" for name in ("closed", "reopened")]
        rows.append([*row, f"{record['achieved']:.5f}", used, f"{record['before']:.5f}", *switched])
    header = ["network", "measure", "seed", "asked", "achieved", "used", "before"]
    return recorded_table([*header, "closed", "reopened"], rows)
