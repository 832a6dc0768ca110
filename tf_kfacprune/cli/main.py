"""Entry point of the program: picks the command, and turns errors into one clear line."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence

from absl import flags

from tf_kfacprune.cli import benchmark, compact, evaluate, export, inspect, train
from tf_kfacprune.cli.command import Command
from tf_kfacprune.errors import KFACPruneError

__all__ = ["main", "run"]

PROGRAM = "kfacprune"
EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

# Functions, so that every run of the program defines its flags afresh.
_COMMANDS: dict[str, Callable[[], Command]] = {
    "train": train.command,
    "inspect": inspect.command,
    "compact": compact.command,
    "export": export.command,
    "evaluate": evaluate.command,
    "benchmark": benchmark.command,
}


def run() -> None:
    """Runs the program with the arguments of this process and exits with its status."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Runs one command.

    Args:
        arguments: The command's name and its flags.

    Returns:
        The exit status: 0, or 1 for an error, 2 for a wrong command line, 130 when interrupted.
    """
    arguments = list(arguments)
    if not arguments or arguments[0] in ("--help", "-h", "-help", "help"):
        print(_overview())
        return 0 if arguments else EXIT_USAGE
    name = arguments[0]
    if name not in _COMMANDS:
        close = difflib.get_close_matches(name, _COMMANDS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return _fail(f"{PROGRAM}: unknown command {name!r}.{hint} Commands: {', '.join(_COMMANDS)}")
    command = _COMMANDS[name]()
    if {"--help", "-h", "-help"} & set(arguments[1:]):
        print(command.help_text(PROGRAM))
        return 0
    try:
        command.parse(arguments[1:])
    except flags.Error as error:
        return _fail(f"{PROGRAM} {name}: {error}")
    try:
        command.execute(command.flags)
    except KeyboardInterrupt:
        return _fail(f"{PROGRAM} {name}: interrupted; nothing was written.", EXIT_INTERRUPTED)
    except (KFACPruneError, OSError) as error:
        if command.flags.debug:
            raise
        return _fail(f"{PROGRAM} {name}: error: {' '.join(str(error).split())}", EXIT_FAILURE)
    return 0


def _fail(message: str, status: int = EXIT_USAGE) -> int:
    print(message, file=sys.stderr)
    return status


def _overview() -> str:
    lines = [
        f"{PROGRAM}: train and prune Keras networks at the same time, toward flat minima.",
        "",
        f"Usage: {PROGRAM} COMMAND [--flag=value ...]",
        "",
        "Commands:",
    ]
    lines += [f"  {name:<10}{build().summary}" for name, build in _COMMANDS.items()]
    lines += ["", f"'{PROGRAM} COMMAND --help' lists the flags of a command."]
    return "\n".join(lines)
