"""Shows rich tables as text in a terminal and as HTML in a notebook."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["Rendered", "as_html", "as_text"]

_WIDTH = 100


class Rendered:
    """Mixin for results that show themselves: a subclass says what to draw in ``render``."""

    def render(self) -> RenderableType:
        """The rich object to draw."""
        raise NotImplementedError

    def __rich__(self) -> RenderableType:
        return self.render()

    def __str__(self) -> str:
        return as_text(self.render())

    def _repr_html_(self) -> str:
        return as_html(self.render())


def as_text(renderable: RenderableType) -> str:
    """Plain text, 100 columns wide at most, without colours."""
    console = _console()
    console.print(renderable)
    lines = console.export_text().rstrip("\n").split("\n")
    return "\n".join(line.rstrip() for line in lines)


def as_html(renderable: RenderableType) -> str:
    """An HTML fragment with its styles inline."""
    console = _console()
    console.print(renderable)
    return console.export_html(
        inline_styles=True,
        code_format='<pre style="font-family:monospace;line-height:1.2">{code}</pre>',
    )


def _console() -> Console:
    from rich.console import Console

    return Console(record=True, width=_WIDTH, file=io.StringIO(), highlight=False)
