"""A subcommand: a function with flags of its own, and help made from both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from absl import flags

__all__ = ["Command"]


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
        flags.DEFINE_bool("debug", False, "Show the traceback of an error.", flag_values=self.flags)
        flags.DEFINE_bool("help", False, "Show this help.", short_name="h", flag_values=self.flags)

    def parse(self, arguments: list[str]) -> None:
        """Reads the command line.

        Args:
            arguments: What follows the command's name.

        Raises:
            flags.Error: If a flag is unknown, malformed or missing, or an argument is no flag.
        """
        rest = self.flags([self.name, *arguments])[1:]
        if rest:
            raise flags.Error(f"Unexpected argument {rest[0]!r}; everything is given by flags.")

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
            default = "" if flag.default in (None, False, []) else f" [{flag.default}]"
            lines.append(f"  --{flag.name}{default}")
            lines.append(f"      {flag.help}")
        return "\n".join(lines)
