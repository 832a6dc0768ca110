"""Entry point of the program: picks the command, and turns errors into one clear line."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Sequence

import tensorflow as tf
from absl import flags

from tf_kfacprune.cli import benchmark, compact, evaluate, export, inspect, train
from tf_kfacprune.cli.command import Command, import_modules
from tf_kfacprune.cli.progress_lines import fresh_line
from tf_kfacprune.cli.stopping import Stopped, stop_signals
from tf_kfacprune.errors import BudgetError, InvalidArgumentError, KFACPruneError
from tf_kfacprune.reporting import versions

__all__ = ["main", "run", "start_devices"]

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

_EXIT_STATUS = """Exit status:
  0    done
  1    failed: a file is missing, damaged or in the way, or the work itself went wrong
  2    a flag is wrong: in itself, or beside the other flags, the model or the data
  130  interrupted (129, 143: by SIGHUP, SIGTERM)"""


def run() -> None:
    """Runs the program with the arguments of this process and exits with its status."""
    sys.exit(main(sys.argv[1:]))


def start_devices() -> None:
    """Lets TensorFlow look for accelerators now: its drivers print lines while it does."""
    tf.config.list_logical_devices()


def main(arguments: Sequence[str]) -> int:
    """Runs one command.

    Args:
        arguments: The command's name and its flags.

    Returns:
        The exit status: 0, or 1 for a failure, 2 for a wrong command line, 128 and the number of
        the signal when stopped by one.
    """
    arguments = list(arguments)
    if not arguments or arguments[0] in ("--help", "-h", "-help", "help"):
        print(_overview())
        return 0 if arguments else EXIT_USAGE
    if arguments[0] in ("--version", "-version", "version"):
        print("\n".join(f"{name} {version}" for name, version in versions().items()))
        return 0
    name = arguments[0]
    if name not in _COMMANDS:
        close = difflib.get_close_matches(name, _COMMANDS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return _fail(f"{PROGRAM}: unknown command {name!r}.{hint} Commands: {', '.join(_COMMANDS)}")
    command = _COMMANDS[name]()
    if {"--help", "-h", "-help"} & set(arguments[1:]):
        print(f"{command.help_text(PROGRAM)}\n\n{_EXIT_STATUS}")
        return 0
    try:
        command.parse(arguments[1:])
    except flags.Error as error:
        return _fail(f"{PROGRAM} {name}: {error}")
    try:
        with stop_signals():
            import_modules(command.flags)
            command.execute(command.flags)
    except KeyboardInterrupt as error:
        status = error.status if isinstance(error, Stopped) else EXIT_INTERRUPTED
        why, kept = str(error) or "interrupted", _notes(error) or "nothing was written."
        return _fail(f"{PROGRAM} {name}: {why}; {kept}", status)
    except (KFACPruneError, OSError, MemoryError, tf.errors.OpError) as error:
        if command.flags.debug:
            raise
        status = EXIT_FAILURE
        if isinstance(error, InvalidArgumentError | BudgetError):
            status = EXIT_USAGE
        message = f"{PROGRAM} {name}: error: {_in_flags(command, error)} {_notes(error)}"
        return _fail(" ".join(message.split()), status)
    return 0


def _in_flags(command: Command, error: Exception) -> str:
    """The message of an error, with flags for the arguments that they became."""
    text = str(error) or type(error).__name__

    def flag(found: re.Match[str]) -> str:
        return f"--{found[1]}" if found[1] in command.flags else found[0]

    return re.sub(r"Argument `(\w+)`(?: of \w+)?", flag, text)


def _notes(error: BaseException) -> str:
    return " ".join(getattr(error, "__notes__", []))


def _fail(message: str, status: int = EXIT_USAGE) -> int:
    print(fresh_line(sys.stderr) + message, file=sys.stderr)
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
    lines += [
        "",
        f"'{PROGRAM} COMMAND --help' lists the flags of a command,",
        f"'{PROGRAM} --version' the versions of what it runs on.",
        "",
        _EXIT_STATUS,
    ]
    return "\n".join(lines)
