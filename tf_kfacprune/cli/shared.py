"""Flags that several commands have: data sets, outputs, layers."""

from __future__ import annotations

import os

from absl import flags

from tf_kfacprune.cli.command import UsageError, naming
from tf_kfacprune.data import NAMES, Dataset, load

__all__ = [
    "add_data_flags",
    "add_output_flags",
    "add_overwrite_flag",
    "add_selection_flags",
    "load_data",
    "refuse_inputs_as_outputs",
]


def add_data_flags(values: flags.FlagValues, default: str | None = "digits") -> None:
    """Defines ``--data`` and ``--data_dir``."""
    flags.DEFINE_string(
        "data",
        default,
        f"Data set: {', '.join(NAMES)}, or the path of an .npz file with x_train, y_train, x_test "
        "and y_test.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "data_dir",
        None,
        "Folder with the files of the data set; without it Keras downloads them.",
        flag_values=values,
    )


def add_output_flags(values: flags.FlagValues, name: str, help_text: str) -> None:
    """Defines the required output flag and ``--overwrite``."""
    flags.DEFINE_string(
        name,
        None,
        f"{help_text} A symbolic link is followed: what it points to is written, the link stays.",
        flag_values=values,
        required=True,
    )
    add_overwrite_flag(values)


def add_overwrite_flag(values: flags.FlagValues, more: str = "") -> None:
    """Defines ``--overwrite``."""
    flags.DEFINE_bool(
        "overwrite",
        False,
        "Replace an output that exists already: a regular file, or a folder that this program "
        f"made. Devices, FIFOs and sockets are never replaced.{more}",
        flag_values=values,
    )


def refuse_inputs_as_outputs(values: flags.FlagValues, output: str, *inputs: str) -> None:
    """Refuses to replace a file that the command reads, even with ``--overwrite``.

    Args:
        values: The parsed flags.
        output: Name of the flag of the output.
        *inputs: Names of the flags of the inputs.

    Raises:
        UsageError: If one of them names the same file, or a link to it.
    """
    target = values[output].value
    for name in inputs:
        source = values[name].value
        both_exist = target and source and os.path.exists(target) and os.path.exists(source)
        if both_exist and os.path.samefile(target, source):
            raise UsageError(
                f"--{output}={target} is the file of --{name}, which would be lost. Name another "
                "output."
            )


def add_selection_flags(values: flags.FlagValues) -> None:
    """Defines ``--include`` and ``--exclude``."""
    flags.DEFINE_list(
        "include",
        [],
        "Layers that may lose neurons, comma-separated names or regular expressions; default: all.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "exclude",
        [],
        "Layers that keep all their neurons, likewise; wins over --include.",
        flag_values=values,
    )


def load_data(values: flags.FlagValues, kind: str | None = None) -> Dataset:
    """The data set that ``--data`` and ``--data_dir`` name.

    Args:
        values: The parsed flags.
        kind: What its labels are, or None for what they look like.

    Raises:
        UsageError: If there is no such data set, or its labels are of another kind.
        DataError: If a file is missing, incomplete or malformed.
    """
    if not values.data.endswith(".npz") and (values.data not in NAMES or kind is not None):
        with naming("data"):
            return load(values.data, values.data_dir, kind=kind)
    return load(values.data, values.data_dir, kind=kind)
