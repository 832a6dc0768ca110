"""Flags of `kfacprune train`."""

from __future__ import annotations

from absl import flags

from tf_kfacprune import zoo
from tf_kfacprune.cli.command import define_count, define_number
from tf_kfacprune.cli.objectives import add_objective_flags
from tf_kfacprune.cli.shared import (
    add_data_flags,
    add_overwrite_flag,
    add_selection_flags,
)
from tf_kfacprune.graph.latency import LATENCY_OF
from tf_kfacprune.pruning import POLICIES

__all__ = ["BOARD", "MEASURES", "OPTIMIZERS", "define", "flag_of"]

MEASURES = ("macs", "params", "bytes", "latency")
# What a microcontroller has: sizes with a unit, or fractions.
BOARD = ("flash", "ram")
# As `compile` takes them; None is the library's own.
OPTIMIZERS = {"kfac": None, "adam": "adam", "sgd": "sgd"}
_LARGEST_SEED = 2**32 - 1  # NumPy's


def define(values: flags.FlagValues) -> None:
    """Defines all of them."""
    add_data_flags(values)
    flags.DEFINE_string(
        "model",
        "digits_cnn",
        f"Network: {', '.join(zoo.NAMES)}, or the path of a .keras file of your own.",
        flag_values=values,
    )
    _define_pruning(values)
    add_objective_flags(values)
    flags.DEFINE_enum("optimizer", "kfac", list(OPTIMIZERS), "Optimizer.", flag_values=values)
    define_number(
        values,
        "learning_rate",
        None,
        "Learning rate, above 0; the optimizer's own if left out.",
        above=0,
    )
    for name, default, meaning in [
        ("epochs", 30, "Passes over the training data, all phases together."),
        ("batch_size", 128, "Examples per step."),
    ]:
        define_count(values, name, default, meaning)
    define_count(
        values,
        "validation",
        0,
        "Hold out this many training examples and measure on them instead of the test set.",
        lower=0,
    )
    flags.DEFINE_bool(
        "compare_dense", False, "Train the dense network too, to compare with.", flag_values=values
    )
    define_count(
        values,
        "seed",
        0,
        f"Seed of everything random, from 0 to {_LARGEST_SEED}.",
        lower=0,
        upper=_LARGEST_SEED,
    )
    _define_output(values)


def flag_of(measure: str) -> str:
    """Name of the flag that bounds a measure."""
    return measure if measure in BOARD else f"budget_{measure}"


def _define_pruning(values: flags.FlagValues) -> None:
    for measure, meaning, absolute in zip(
        MEASURES,
        ("multiply-accumulates", "parameters", ".tflite bytes", "latency on this machine"),
        ("", "", ", or a number of bytes above 1", ", or microseconds above 1"),
        strict=True,
    ):
        define_number(
            values,
            flag_of(measure),
            None,
            f"Fraction of the dense network's {meaning} to keep, in (0, 1]{absolute}. Without any "
            "budget nothing is pruned.",
            above=0,
            upper=None if absolute else 1,
        )
    flags.DEFINE_enum(
        "latency_of",
        "float32",
        LATENCY_OF,
        "Which .tflite file --budget_latency bounds.",
        flag_values=values,
    )
    for measure, meaning in zip(
        BOARD,
        (
            "the int8 .tflite file, which lies in flash memory",
            "the tensor arena that it needs in TensorFlow Lite Micro",
        ),
        strict=True,
    ):
        flags.DEFINE_string(
            flag_of(measure),
            None,
            f"Most bytes of {meaning}: 64kB, 64KiB, a number of bytes, or a fraction of the dense "
            "network's in (0, 1].",
            flag_values=values,
        )
    flags.DEFINE_enum(
        "policy", "kfac", POLICIES, "How gates find out whether to close.", flag_values=values
    )
    flags.DEFINE_bool("prune_inputs", False, "Prune input features too.", flag_values=values)
    flags.DEFINE_bool(
        "prune_features",
        False,
        "Prune flattened features one by one, where a Dense layer reads them.",
        flag_values=values,
    )
    add_selection_flags(values)
    define_count(values, "round_to", None, "Keep channels in multiples of this number, e.g. 8.")
    define_count(
        values,
        "min_channels",
        None,
        "Keep at least so many channels per layer, and no residual branch goes as a whole.",
    )
    define_number(
        values,
        "curvature",
        0.0,
        "Strength of the penalty on the spectral radius of the curvature; 0 for none.",
        lower=0,
    )


def _define_output(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "output_dir",
        None,
        "Folder for model.keras, compact.keras, compact.tflite, saved_model, record.json and "
        "report.html. It appears whole at the end. Until then the run is kept in "
        "<output_dir>.resume. A symbolic link is followed: the folder that it points to is "
        "written, the link stays.",
        flag_values=values,
        required=True,
    )
    flags.DEFINE_bool(
        "resume",
        False,
        "Go on with the run that was interrupted, with its flags; start it if there is none. On "
        "one machine, where TensorFlow's kernels are deterministic (its CPU kernels with as many "
        "threads), the result is to the bit that of an undisturbed run.",
        flag_values=values,
    )
    add_overwrite_flag(values, " Also discards an interrupted run, unless it is resumed.")
