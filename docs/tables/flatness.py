"""Curvature and generalization with and without the penalty."""

import statistics

from tables.markdown import grouped_by_settings, mean_and_deviation, recorded_table, records


def flatness_records(part):
    """Runs of a part of the benchmark on the test set.

    Returns:
        A list of `((network, label noise, method), runs)`, one per settings.
    """
    lines = [
        line
        for line in records("flatness.jsonl")
        if line["key"]["part"] == part and not line["key"]["validation"]
    ]
    groups = []
    for runs in grouped_by_settings(lines):
        key = runs[0]["key"]
        groups.append(((key["network"], key.get("label_noise", 0.0), _method(key)), runs))
    return sorted(groups, key=lambda group: (*group[0][:2], _ORDER.index(group[0][2][0]), group[0]))


_ORDER = ("none", "penalty", "sam", "asam")


def _method(key):
    """What flattens, and how strongly."""
    if "method" in key:
        return key["method"], key["rho"]
    return ("penalty", key["strength"]) if key["strength"] else ("none", 0.0)


def _named(method):
    name, strength = method
    if name in ("none", "penalty"):
        return f"{strength:g}" if strength else "none"
    return f"{name.upper()}, rho {strength:g}"


def flatness_table(part):
    """Curvature and error with and without the penalty, over the seeds."""
    rows = []
    for (network, noise, method), runs in flatness_records(part):

        def of(name, digits, unit=1, runs=runs):
            return mean_and_deviation([run[name] for run in runs], digits, unit)

        rows.append(
            [
                f"{network}, {noise:.0%} wrong labels" if noise else network,
                _named(method),
                len(runs),
                of("top", 2)
                + ("" if all(run["converged"] for run in runs) else " (not converged)"),
                of("top_scaled", 0),
                of("test_error", 2, 100),
                of("train_loss", 3),
                of("weight_norm", 1),
            ]
        )
    header = ["network", "penalty", "seeds", "top eigenvalue", "scaled", "test error %"]
    return recorded_table([*header, "training loss", "weight norm"], rows)


def corruptions_table(part):
    """Accuracy on spoilt test images with and without the penalty."""
    rows, header = [], []
    for (network, noise, method), runs in flatness_records(part):
        names = list(runs[0]["corrupted"])
        header = [*names, "mean"]
        columns = [[run["corrupted"][name] for run in runs] for name in names]
        columns.append([statistics.mean(run["corrupted"].values()) for run in runs])
        rows.append(
            [
                f"{network}, {noise:.0%} wrong labels" if noise else network,
                _named(method),
                *(mean_and_deviation(column, 1, 100) for column in columns),
            ]
        )
    return recorded_table(["network", "penalty", *header], rows)


def tasks_table(default=1e-4):
    """Networks of many kinds without the penalty and with its default strength."""
    rows = []
    for task, runs in _by_task().items():
        pair = [runs.get(0.0, []), runs.get(default, [])]
        seeds = [{run["key"]["seed"]: run for run in side} for side in pair]
        both = sorted(seeds[0].keys() & seeds[1].keys())
        if both:
            sides = [[of_side[seed] for seed in both] for of_side in seeds]
            rows.append([f"`{task}`", len(both), *_compared(*sides)])
    header = ["task", "seeds", "scaled eigenvalue", "times flatter", "test error %"]
    return recorded_table([*header, "accuracy on spoilt images %", "cost"], rows)


def strengths_table(strengths=(0.0, 1e-5, 1e-4, 1e-3)):
    """Error and scaled eigenvalue by the strength of the penalty, over the seeds that have all."""
    rows = []
    for task, runs in _by_task().items():
        seeds = [{run["key"]["seed"]: run for run in runs.get(s, [])} for s in strengths]
        common = sorted(set.intersection(*(set(of) for of in seeds)))
        if common:
            cells = [
                [[of[seed][name] for seed in common] for of in seeds]
                for name in ("test_error", "top_scaled")
            ]
            errors = [mean_and_deviation(values, 2, 100) for values in cells[0]]
            tops = [f"{statistics.mean(values):.1f}" for values in cells[1]]
            rows.append([f"`{task}`", len(common), " / ".join(errors), " / ".join(tops)])
    shown = " / ".join("none" if not s else f"{s:g}" for s in strengths)
    return recorded_table(["task", "seeds", f"test error %, {shown}", "scaled eigenvalue"], rows)


def _by_task():
    """Runs of every task by the strength of the penalty."""
    tasks = {}
    for run in records("flatness_tasks.jsonl"):
        of_task = tasks.setdefault(run["key"]["task"], {})
        of_task.setdefault(run["key"]["strength"], []).append(run)
    return tasks


def _compared(without, penalized):
    """Cells of two lists of runs with the same seeds."""

    def of(value, digits, unit=1):
        return " -> ".join(
            mean_and_deviation([value(run) for run in side], digits, unit)
            for side in (without, penalized)
        )

    pairs = list(zip(without, penalized, strict=True))
    flatter = statistics.geometric_mean(a["top_scaled"] / b["top_scaled"] for a, b in pairs)
    seconds = "cpu_seconds" if "cpu_seconds" in without[0] else "epoch_cpu_seconds"
    spoilt = "-"
    if "corrupted" in without[0]:
        spoilt = of(lambda run: statistics.mean(run["corrupted"].values()), 1, 100)
    return [
        of(lambda run: run["top_scaled"], 1),
        f"{flatter:.1f}",
        of(lambda run: run["test_error"], 2, 100),
        spoilt,
        f"{statistics.median(b[seconds] / a[seconds] for a, b in pairs):.2f}",
    ]


def tracking_table():
    """How the K-FAC estimate follows the exact eigenvalue along runs."""
    rows = []
    for (network, _, method), runs in flatness_records("track"):
        ratios = [estimate / exact for run in runs for _, exact, estimate, _ in run["track"]]
        rows.append(
            [
                network,
                _named(method),
                len(runs),
                mean_and_deviation([run["rank_correlation"] for run in runs], 2),
                mean_and_deviation([run["rank_correlation_live"] for run in runs], 2),
                f"{min(ratios):.2f} to {max(ratios):.2f}",
            ]
        )
    header = ["network", "penalty", "runs", "rank correlation", "of the live figure"]
    return recorded_table([*header, "estimate / exact"], rows)
