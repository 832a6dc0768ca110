"""Writes the generated tables of the documentation.

    python docs/generate.py            # brings the tables up to date
    python docs/generate.py --check    # only says whether they are

A table stands between two comments, `<!-- table: name -->` and `<!-- end -->`. Those of layers and
operations are made from the registry of channel rules, all others from the records of the
benchmarks in `examples/benchmarks/results/`.
"""

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from tables import (  # noqa: E402
    budgets,
    channels,
    deploy,
    flatness,
    frontier,
    latency,
    optimizer,
    transformers,
)

TABLE = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

TABLES = {
    "layers": lambda: channels.rules_table(layers=True),
    "operations": lambda: channels.rules_table(layers=False),
    "applications": channels.applications_table,
    "hub": channels.hub_table,
    "hub_summary": channels.hub_summary,
    "transformers": transformers.transformers_table,
    "deploy_sizes": deploy.sizes_table,
    "deploy_times": deploy.times_table,
    "deploy_accuracy": deploy.accuracy_table,
    "deploy_applications": deploy.applications_table,
    "flatness": lambda: flatness.flatness_table("train"),
    "corruptions": lambda: flatness.corruptions_table("train"),
    "flatness_pruned": lambda: flatness.flatness_table("prune"),
    "corruptions_pruned": lambda: flatness.corruptions_table("prune"),
    "tracking": flatness.tracking_table,
    "flatness_tasks": flatness.tasks_table,
    "flatness_strengths": flatness.strengths_table,
    "budgets": budgets.budgets_table,
    "latency": latency.latency_table,
    "step_cost": optimizer.step_cost_table,
    "location_cost": optimizer.location_cost_table,
    "real_networks": optimizer.real_networks_table,
    **{
        f"curves_{task}": lambda task=task: optimizer.curves_table(task)
        for task in ("autoencoder_small", "autoencoder", "lenet5", "resnet20", "text")
    },
    "losses_after_steps": lambda: optimizer.moments_table(
        "autoencoder_small", 0, (5, 10, 20, 50, 150)
    ),
    "losses_after_steps_autoencoder": lambda: optimizer.moments_table(
        "autoencoder", 0, (5, 10, 20, 40, 120)
    ),
    "losses_after_seconds": lambda: optimizer.moments_table(
        "autoencoder_small", 1, (5, 10, 20, 40)
    ),
    "frontier": frontier.frontier_table,
    "frontier_cost": frontier.cost_table,
}


def generated(text):
    """The text with its tables made anew."""
    return TABLE.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}{match[4]}", text)


def main(arguments):
    """Writes the tables, or checks them; returns the exit status."""
    stale = []
    for path in sorted(HERE.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        fresh = generated(text)
        if fresh != text:
            stale.append(path.name)
            if "--check" not in arguments:
                path.write_text(fresh, encoding="utf-8")
    verb = "out of date" if "--check" in arguments else "written"
    print(f"{verb}: {', '.join(stale)}" if stale else "up to date")
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
