"""The picture of the README: LeNet-5 before and after, and its error against size beside peers.

    python examples/benchmarks/readme_picture.py

Everything is read from `results/frontier.jsonl`. A light and a dark picture are written into
`docs/pictures/`, so that a page can show the one that its reader wants.
"""

import json
import pathlib
import statistics

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot, rc_context, ticker
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.transforms import Affine2D

HERE = pathlib.Path(__file__).parent
FOLDER = HERE.parents[1] / "docs" / "pictures"
CASE, SHOWN = "lenet5", ("ours", "8k", 0)
NAMES = {
    "magnitude": "magnitude",
    "slimming": "network slimming",
    "taylor": "Taylor",
    "hard_concrete": "L0 hard concrete",
    "ours": "tf_kfacprune",
}
# Rows of squares that the neurons of a layer are drawn in.
LAYERS = (("conv1", 20, 4), ("conv2", 50, 5), ("fc1", 500, 20), ("classes", 10, 5))
THEMES = {
    "light": {"text": "#1f2328", "soft": "#59636e", "gone": "#dde3e9", "ours": "#0969da"},
    "dark": {"text": "#e6edf3", "soft": "#9198a1", "gone": "#2a313c", "ours": "#58a6ff"},
}
PEERS = {"light": ("#c4560f", "#8a6d00", "#1a7f37", "#8250df")}
PEERS["dark"] = ("#f0883e", "#d4a72c", "#3fb950", "#bc8cff")


def runs():
    """Finished runs of the case on the test set: `(method, target) -> records, by seed`."""
    found = {}
    for line in (HERE / "results" / "frontier.jsonl").read_text().splitlines():
        record = json.loads(line)
        key = record["key"]
        if (key["case"], key["split"]) == (CASE, "test"):
            found.setdefault((key["method"], key["target"]), {})[key["seed"]] = record
    return found


def mean_points(found, method):
    """`(weights, error)` of every target of a method, means over the seeds, by size."""
    targets = [list(by_seed.values()) for (m, _), by_seed in found.items() if m == method]
    points = [
        tuple(statistics.mean(run[name] for run in records) for name in ("weights", "error"))
        for records in targets
    ]
    return sorted(points)


def square(x, y, side=0.78):
    """A square whose lower left corner is at a place."""
    return Path.unit_rectangle().transformed(Affine2D().scale(side).translate(x, y))


def draw_network(axis, found, theme):
    """Every neuron a square; what was removed is pale."""
    method, target, seed = SHOWN
    record = found[method, target][seed]
    kept = [shape[-1] for shape in record["shapes"]]
    left = 0.0
    for (name, size, rows), stays in zip(LAYERS, kept, strict=True):
        columns = -(-size // rows)
        places = [(left + k // rows, (rows - 1) / 2 - k % rows) for k in range(size)]
        for color, part in (("gone", places[stays:]), ("ours", places[:stays])):
            if part:  # one path for all squares keeps the file small
                squares = Path.make_compound_path(*(square(*place) for place in part))
                axis.add_patch(PathPatch(squares, color=theme[color], linewidth=0))
        middle = left + (columns - 0.22) / 2
        axis.text(middle, 11.2, name, ha="center", va="bottom", color=theme["text"])
        shown = f"{stays} of {size}"
        axis.text(middle, -10.6, shown, ha="center", va="top", color=theme["soft"], fontsize=10)
        left += columns + 5.5
    axis.set(xlim=(-3.5, left - 2), ylim=(-12.5, 13.5), aspect="equal")
    axis.set_axis_off()
    axis.set_anchor("N")
    dense = next(iter(found["dense", "0"].values()))
    axis.set_title(
        f"LeNet-5 after one fit: {record['weights']:,} of {dense['weights']:,} weights,\n"
        f"test error {record['error']:.2f} % (dense {dense['error']:.2f} %, same seed)",
        color=theme["text"],
        fontsize=11.5,
    )


def draw_errors(axis, found, theme, colors):
    """Error against weights, the mean of all seeds."""
    for method, color in zip(NAMES, (*colors, theme["ours"]), strict=True):
        points = mean_points(found, method)
        is_ours = method == "ours"
        axis.plot(
            *zip(*points, strict=True),
            color=color,
            marker="o",
            linewidth=3 if is_ours else 1.6,
            markersize=8 if is_ours else 5,
            label=NAMES[method],
        )
    ((weights, error),) = mean_points(found, "dense")
    axis.plot(weights, error, "D", color=theme["text"], markersize=7, label="dense (AdamW)")
    axis.set(xscale="log", yscale="log", xlabel="weights", ylabel="test error, MNIST")
    axis.set_yticks([0.7, 1, 1.5, 2, 3, 5], [f"{t:g} %" for t in (0.7, 1, 1.5, 2, 3, 5)])
    ticks = [2e3, 5e3, 2e4, 5e4, 2e5, 5e5]
    axis.set_xticks(ticks, [f"{tick / 1e3:g}k" for tick in ticks])
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.yaxis.set_minor_locator(ticker.NullLocator())
    axis.grid(color=theme["gone"], linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.legend(frameon=False, loc="upper right", labelcolor=theme["text"], fontsize=10.5)
    axis.set_title(
        "Error against size beside its peers,\nmean of five seeds",
        color=theme["text"],
        fontsize=11.5,
    )


def draw(name):
    """Writes one of the pictures and returns its path."""
    theme = THEMES[name]
    soft = dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), theme["soft"])
    settings = {
        **soft,
        "axes.labelcolor": theme["text"],
        "font.size": 11,
        "svg.fonttype": "path",
        "svg.hashsalt": "tf_kfacprune",
    }
    found = runs()
    with rc_context(settings):
        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=(12.5, 4.4), width_ratios=(1.25, 1), layout="constrained"
        )
        draw_network(left, found, theme)
        draw_errors(right, found, theme, PEERS[name])
        FOLDER.mkdir(parents=True, exist_ok=True)
        path = FOLDER / f"frontier-{name}.svg"
        figure.savefig(path, transparent=True, metadata={"Date": None})
        pyplot.close(figure)
    return path


if __name__ == "__main__":
    for scheme in THEMES:
        print(f"Written: {draw(scheme).relative_to(HERE.parents[1])}")
