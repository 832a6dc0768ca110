"""`kfacprune compact`: from a trained gated model to a plain, small Keras model."""

from __future__ import annotations

from absl import flags

from tf_kfacprune.cli.command import Command, FileError
from tf_kfacprune.cli.models import model_of
from tf_kfacprune.cli.shared import add_output_flags, refuse_inputs_as_outputs
from tf_kfacprune.compaction import compact, compaction_report, missed_budget
from tf_kfacprune.export import keras_file

__all__ = ["command"]


def command() -> Command:
    """The command, with flags of its own."""
    return Command(
        "compact", "Turn a pruned model into a plain Keras model, verified.", _define, _execute
    )


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "model",
        None,
        "Path of the .keras file of a pruned (gated) model.",
        flag_values=values,
        required=True,
    )
    add_output_flags(values, "output", "Path of the .keras file to write.")


def _execute(values: flags.FlagValues) -> None:
    refuse_inputs_as_outputs(values, "output", "model")
    pruned = model_of(values.model, "compact")
    if (missed := missed_budget(pruned)) is not None:
        raise FileError(f"--model={values.model}: {missed}")
    small = compact(pruned)
    path = keras_file(small, values.output, overwrite=values.overwrite)
    removed = compaction_report(pruned, small)
    for name, layer in removed["layers"].items():
        print(f"{name}: {len(layer['kept'])} of {layer['channels']} neurons")
    for measure in ("params", "macs"):
        before, after = removed[measure]["dense"], removed[measure]["compact"]
        print(f"{measure}: {after:,} of {before:,} ({100 * after / before:.2f} %)")
    print(f"Wrote {path}")
