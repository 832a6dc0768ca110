"""K-FAC against the optimizers of Keras."""

import itertools
import statistics

import numpy as np

from tables.markdown import mean_and_deviation, recorded_table, records

TUNING_SEED = 100
REFERENCE = "adam"


def step_cost_table():
    """Time of a step over that of Adam."""
    rows = []
    for record in records("optimizer.jsonl"):
        if record["key"]["part"] != "step_cost" or "kfac_locations" in record["ratios"]:
            continue
        found = record["floor"], *(record["ratios"].get(n) for n in ("kfac", "kfac_auto"))
        floor, *ratios = ("-" if value is None else f"{value:.2f}" for value in found)
        rows.append([record["key"]["task"], record["batch"], floor, *ratios])
    header = ["task", "batch", "arithmetic floor", "`KFAC()` / Adam", '`KFAC("auto")` / Adam']
    return recorded_table(header, rows)


def location_cost_table():
    """Time of a step over that of Adam, with factors of all locations and of a quarter of them."""
    rows = []
    for record in records("optimizer.jsonl"):
        if record["key"]["part"] == "step_cost" and "kfac_locations" in record["ratios"]:
            ratios = (f"{record['ratios'][n]:.2f}" for n in ("kfac", "kfac_locations"))
            rows.append([record["key"]["task"], record["batch"], *ratios])
    header = ["task", "batch", "`KFAC()` / Adam", "`KFAC(location_fraction=0.25)` / Adam"]
    return recorded_table(header, rows)


def real_networks_table():
    """Start-up, step and memory on real networks over those of Adam in plain Keras."""
    runs = {record["key"]: record for record in records("real_networks.jsonl")}
    rows = []
    for network in dict.fromkeys(key.split("/")[0] for key in runs):
        found = {
            variant: runs.get(f"{network}/{variant}") for variant in ("adam", "kfac", "pruned")
        }
        if None in found.values():
            continue
        adam = found.pop("adam")
        ratios = [
            " / ".join(f"{run[figure] / adam[figure]:.2f}" for run in found.values())
            for figure in ("start_up", "step", "memory")
        ]
        rows.append(
            [network, f"{adam['start_up']:.1f} s", f"{adam['memory'] / 1024:.1f} GiB", *ratios]
        )
    header = ["network", "start-up of Adam", "its memory", "start-up", "step", "memory"]
    return recorded_table(header, rows)


def final_runs(task):
    """Optimizer -> runs of a task with the rate that was chosen for it, by seed."""
    runs = {}
    for record in records("optimizer.jsonl"):
        key = record["key"]
        if key["part"] == "curves" and key["task"] == task and key["seed"] != TUNING_SEED:
            runs.setdefault(key["optimizer"], {})[key["seed"]] = record
    return runs


def curves_table(task):
    """Final loss in the same time, and what it takes to reach Adam's."""
    runs, rows = final_runs(task), []
    for optimizer, by_seed in runs.items():
        finals = [final_loss(run) for run in by_seed.values()]
        rates = {run["key"]["rate"] for run in by_seed.values()}
        rows.append(
            [
                optimizer,
                ", ".join("-" if rate is None else f"{rate:g}" for rate in sorted(rates, key=str)),
                len(by_seed),
                f"{statistics.mean(run['curve'][-1][0] for run in by_seed.values()):.0f}",
                mean_and_deviation(finals, 3 if max(finals) < 10 else 1),
                *(to_reach_the_reference(by_seed, runs.get(REFERENCE, {}), c) for c in (1, 0)),
            ]
        )
    header = ["optimizer", "learning rate", "seeds", "steps", "final training loss"]
    return recorded_table([*header, "time to Adam's loss", "steps to Adam's loss"], rows)


def to_reach_the_reference(by_seed, reference, column):
    """Mean share of the seconds (column 1) or steps (0) of Adam that its final loss takes."""
    shares = []
    for seed in by_seed.keys() & reference.keys():
        goal = final_loss(reference[seed])
        needed = first_below(by_seed[seed]["curve"], goal, column)
        adam = first_below(reference[seed]["curve"], goal, column)
        shares.append(None if needed is None else needed / adam)
    if not shares or None in shares:
        return "not reached"
    return mean_and_deviation(shares, 2) + "x"


def final_loss(run):
    """Loss after the seconds that the run was given; the last measurement may be a little later."""
    _, seconds, losses = np.transpose(run["curve"])
    return float(np.interp(run["key"]["seconds"], seconds, losses))


def first_below(curve, loss, column):
    """Steps or seconds after which the loss is no higher than this for the first time."""
    for before, after in itertools.pairwise(curve):
        if after[2] <= loss:
            share = (before[2] - loss) / (before[2] - after[2])
            return before[column] + share * (after[column] - before[column])
    return None


def moments_table(task, column, moments):
    """Mean loss at moments, in steps (column 0) or seconds (1); linear between measurements."""
    rows = []
    for optimizer, by_seed in final_runs(task).items():
        curves = [np.array(run["curve"]) for run in by_seed.values()]
        losses = [np.interp(moments, c[:, column], c[:, 2], right=np.nan) for c in curves]
        means = np.mean(losses, axis=0)
        rows.append([optimizer, *("-" if np.isnan(m) else f"{m:.1f}" for m in means)])
    unit = "steps" if column == 0 else "s"
    return recorded_table(["optimizer", *(f"{moment} {unit}" for moment in moments)], rows)
