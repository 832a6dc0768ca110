"""Shows rich tables as text in a terminal and as real tables in HTML."""

from __future__ import annotations

import html
import io
import shutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["Rendered", "as_html", "as_text"]

# Where the output is no terminal, such as a file.
_DEFAULT_WIDTH = 100
# Fewer columns than the figures of a row need would cut numbers apart.
_LEAST_WIDTH = 60


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
    """Plain text without colours, as wide as the terminal at most; 100 columns without one."""
    from rich.console import Console

    columns = shutil.get_terminal_size((_DEFAULT_WIDTH, 24)).columns
    width = max(columns, _LEAST_WIDTH)
    console = Console(record=True, width=width, file=io.StringIO(), highlight=False, markup=False)
    console.print(renderable)
    lines = console.export_text().rstrip("\n").split("\n")
    return "\n".join(line.rstrip() for line in lines)


def as_html(renderable: Any) -> str:
    """HTML elements for what `render` returns: tables, lines of text, and groups of both.

    Colours and fonts are left to the page, so that a notebook shows them in its own.
    """
    from rich.console import Group
    from rich.table import Table

    if isinstance(renderable, Group):
        return "\n".join(as_html(part) for part in renderable.renderables)
    if isinstance(renderable, Table):
        return _table(renderable)
    return f"<p>{html.escape(str(renderable).strip())}</p>"


def _table(table: Table) -> str:
    """One ``<table>``; rules between sections are the upper borders of rows."""
    columns = table.columns
    # Cells are apart wherever the page has no style for tables, and figures stand beside the first
    # of several lines.
    styles = [
        f"text-align:{'right' if column.justify == 'right' else 'left'};vertical-align:top"
        + (";padding-left:12px" if k else "")
        for k, column in enumerate(columns)
    ]
    headers = [_shown(column.header) for column in columns]
    lines = ['<table style="border-collapse:collapse">']
    if table.title:
        lines.append(f'<caption style="text-align:left"><b>{_shown(table.title)}</b></caption>')
    lines.append(f"<thead>{_row('th', headers, styles)}</thead>")
    lines.append("<tbody>")
    starts_section = False
    for row, cells in zip(table.rows, zip(*(c.cells for c in columns), strict=True), strict=True):
        rule = ' style="border-top:2px solid"' if starts_section else ""
        lines.append(_row("td", [_shown(cell) for cell in cells], styles, rule))
        starts_section = row.end_section
    lines.append("</tbody>")
    lines.append("</table>")
    if table.caption:
        lines.append(f"<p>{_shown(table.caption)}</p>")
    return "\n".join(lines)


def _row(tag: str, cells: list[str], styles: list[str], attributes: str = "") -> str:
    shown = (
        f'<{tag} style="{style}">{cell}</{tag}>' for cell, style in zip(cells, styles, strict=True)
    )
    return f"<tr{attributes}>{''.join(shown)}</tr>"


def _shown(content: Any) -> str:
    return html.escape(str(content)).replace("\n", "<br>")
