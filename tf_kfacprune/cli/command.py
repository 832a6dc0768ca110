"""A subcommand: a function with flags of its own, and help made from both."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from absl import flags

from tf_kfacprune.errors import InvalidArgumentError, KFACPruneError

__all__ = [
    "Command",
    "FileError",
    "UsageError",
    "define_count",
    "define_number",
    "import_modules",
    "naming",
]

_LARGEST_COUNT = 2**31 - 1
_LARGEST_FLOAT = 3.4028234663852886e38
_REQUIRED = "must have a value other than None"  # what absl says of a flag that is missing


class UsageError(InvalidArgumentError):
    """A flag is wrong: in itself, or beside the other flags, the model or the data."""


class FileError(KFACPruneError):
    """A file that a flag names cannot be used."""


@dataclass(frozen=True)
class Command:
    """One subcommand of the program.

    Attributes:
        name: What the user types.
        summary: One line for the list of commands.
        define: Defines the command's flags on the `flags.FlagValues` it is given.
        execute: Carries the command out, with the parsed flags.
        flags: The command's own flags; none are global, so that commands cannot clash.
    """

    name: str
    summary: str
    define: Callable[[flags.FlagValues], None]
    execute: Callable[[flags.FlagValues], None]
    flags: flags.FlagValues = field(default_factory=flags.FlagValues)

    def __post_init__(self) -> None:
        self.define(self.flags)
        flags.DEFINE_list(
            "import",
            [],
            "Modules of yours, comma-separated, to import first: they register layers and other "
            "classes of a --model. Looked for in the current folder, too. Their code is run.",
            flag_values=self.flags,
        )
        flags.DEFINE_bool("debug", False, "Show the traceback of an error.", flag_values=self.flags)
        flags.DEFINE_bool("help", False, "Show this help.", short_name="h", flag_values=self.flags)

    def parse(self, arguments: list[str]) -> None:
        """Reads the command line.

        Args:
            arguments: What follows the command's name.

        Raises:
            flags.Error: If a flag is unknown, malformed or missing, or an argument is no flag.
        """
        try:
            rest = self.flags([self.name, *arguments])[1:]
        except flags.IllegalFlagValueError as error:
            missing = re.search(rf"--(\w+) {_REQUIRED}", str(error))
            if missing is None:
                raise
            raise flags.Error(
                f"--{missing[1]} is required: {self.flags[missing[1]].help}"
            ) from error
        except ValueError as error:  # of files only: absl's own errors are `flags.Error`
            raise flags.Error(f"--flagfile must name files of text: {error}") from error
        if rest:
            raise flags.Error(f"Unexpected argument {rest[0]!r}; everything is given by flags.")
        for name in self.flags:
            value = self.flags[name].value
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str):
                    _check_text(name, text)

    def help_text(self, program: str) -> str:
        """The command's help, one paragraph per flag.

        Args:
            program: Name of the program.

        Returns:
            Text of several lines.
        """
        lines = [f"{program} {self.name}: {self.summary}", "", "Flags:"]
        own = self.flags.flags_by_module_dict().values()
        for flag in sorted((f for group in own for f in group), key=lambda f: f.name):
            default = " (required)" if _is_required(flag) else ""
            if flag.default is not None and flag.default is not False and flag.default != []:
                default = f" [{flag.default}]"
            lines.append(f"  --{flag.name}{default}")
            lines.append(f"      {flag.help}")
        return "\n".join(lines)


def _is_required(flag: flags.Flag[Any]) -> bool:
    """Whether a flag was defined with `required=True`, for which absl has no attribute."""
    return any(_REQUIRED in str(validator.message) for validator in flag.validators)


def _check_text(name: str, text: str) -> None:
    """Refuses what no path can have, and what cannot be printed or written to a file of ours."""
    try:
        if "\0" not in text:
            text.encode()
            return
    except UnicodeEncodeError:  # bytes of the command line that are not UTF-8
        pass
    raise flags.Error(f"--{name} must be UTF-8 text without NUL characters. Received: {text!r}")


class _NumberParser(flags.FloatParser):
    """Numbers that are finite in float32, above a bound or from it on."""

    def __init__(self, above: float | None, lower: float | None, upper: float | None) -> None:
        super().__init__()
        self._above, self._lower, self._upper = above, lower, upper

    def convert(self, argument: Any) -> float:
        value = super().convert(argument)
        if (
            not abs(value) <= _LARGEST_FLOAT
            or (self._above is not None and value <= self._above)
            or (self._lower is not None and value < self._lower)
            or (self._upper is not None and value > self._upper)
        ):
            bounds = [
                f"{word} {bound:g}"
                for word, bound in (
                    ("above", self._above),
                    ("from", self._lower),
                    ("up to", self._upper),
                )
                if bound is not None
            ]
            raise ValueError(" ".join(["must be a finite number of float32", *bounds]))
        return value


def define_number(
    values: flags.FlagValues,
    name: str,
    default: float | None,
    help_text: str,
    *,
    above: float | None = None,
    lower: float | None = None,
    upper: float | None = None,
) -> None:
    """Defines a flag for a number of float32; absl's own takes inf, and nan past every bound.

    Args:
        values: Where the flag is defined.
        name: Name of the flag.
        default: Its value if it is not given.
        help_text: Its help.
        above: What it must exceed.
        lower: Least value.
        upper: Largest value.
    """
    parser, serializer = _NumberParser(above, lower, upper), flags.ArgumentSerializer()
    flags.DEFINE(parser, name, default, help_text, values, serializer)


def define_count(
    values: flags.FlagValues,
    name: str,
    default: int | None,
    help_text: str,
    *,
    lower: int = 1,
    upper: int = _LARGEST_COUNT,
) -> None:
    """Defines a flag for an integer between two bounds.

    Args:
        values: Where the flag is defined.
        name: Name of the flag.
        default: Its value if it is not given.
        help_text: Its help.
        lower: Least value.
        upper: Largest value; by default what an axis of a tensor may have.
    """
    flags.DEFINE_integer(name, default, help_text, lower, upper, flag_values=values)


@contextmanager
def naming(*names: str, of: type[KFACPruneError] = KFACPruneError) -> Iterator[None]:
    """Turns an error about arguments into one about the flags that they came from.

    Args:
        *names: Names of the flags.
        of: Which errors are about them.

    Raises:
        UsageError: For such an error.
    """
    try:
        yield
    except of as error:
        raise UsageError(f"{', '.join(f'--{name}' for name in names)}: {error}") from error


def import_modules(values: flags.FlagValues) -> None:
    """Imports the modules of ``--import``.

    Raises:
        UsageError: If one cannot be found.
        FileError: If one raises an error.
    """
    for name in values["import"].value:
        if not all(part.isidentifier() for part in name.split(".")):
            raise UsageError(
                "--import must be names of modules, such as my_layers for my_layers.py. Received: "
                f"{name!r}"
            )
        # Programs, unlike `python -m`, do not look into the current folder.
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UsageError(
                f"--import={name}: {error}. Looked in {os.getcwd()} and where Python's modules are."
            ) from error
        # Code of the user's, which may raise anything, and must not end the program unseen.
        except (Exception, SystemExit) as error:
            raise FileError(
                f"--import={name}: the module raises {type(error).__name__}: {error}"
            ) from error
