"""`kfacprune inspect`: what can be pruned, what cannot and why."""

from __future__ import annotations

from absl import flags

from tf_kfacprune import zoo
from tf_kfacprune.cli.command import Command
from tf_kfacprune.cli.models import model_named
from tf_kfacprune.cli.shared import add_data_flags, add_selection_flags, load_data
from tf_kfacprune.export import latency_table
from tf_kfacprune.graph.latency import LATENCY_OF
from tf_kfacprune.reporting import inspect

__all__ = ["command"]


def command() -> Command:
    """The command, with flags of its own."""
    return Command("inspect", "Show what can be pruned, what cannot and why.", _define, _execute)


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "model",
        None,
        f"Network: {', '.join(zoo.NAMES)}, or the path of a .keras file.",
        flag_values=values,
        required=True,
    )
    add_data_flags(values, default=None)
    flags.DEFINE_bool(
        "prune_inputs", False, "Count input features as neurons too.", flag_values=values
    )
    flags.DEFINE_bool(
        "prune_features", False, "Count flattened features as neurons too.", flag_values=values
    )
    add_selection_flags(values)
    flags.DEFINE_enum(
        "latency_of",
        None,
        LATENCY_OF,
        "Measure the layers of this file on this machine, and show the latency too.",
        flag_values=values,
    )


def _execute(values: flags.FlagValues) -> None:
    dataset = load_data(values) if values.data else None
    model = model_named(values.model, dataset)
    table = latency_table(model, of=values.latency_of) if values.latency_of else None
    print(
        inspect(
            model,
            prune_inputs=values.prune_inputs,
            prune_features=values.prune_features,
            include=values.include or None,
            exclude=values.exclude,
            latency_table=table,
        )
    )
