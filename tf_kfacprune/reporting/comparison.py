"""The before/after table: what pruning took away and what it cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from tf_kfacprune.export.file_sizes import FileSize
from tf_kfacprune.pruning import BudgetOutcome
from tf_kfacprune.reporting.figures import Flatness, ModelFigures
from tf_kfacprune.reporting.rendering import Rendered

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Comparison", "before_after_table"]

_UNKNOWN = "–"


@dataclass(frozen=True)
class Comparison(Rendered):
    """Figures of the dense and of the compact model, side by side.

    Printing it shows the table; a notebook shows it as HTML.

    Attributes:
        dense: figures of the model before pruning.
        compact: figures of the compact model.
        latency_ratio: time of the compact / time of the dense model, if measured as a ratio.
        kept: layer or input -> indices of the channels that were kept.
        budget: measure -> what the budget asked for and what was achieved, with the reason.
    """

    dense: ModelFigures
    compact: ModelFigures
    latency_ratio: float | None = None
    kept: dict[str, list[int]] | None = None
    budget: dict[str, BudgetOutcome] = field(default_factory=dict)

    def fraction(self, measure: str) -> float | None:
        """What is left of ``"params"`` or ``"macs"``, in [0, 1]; None if unknown."""
        return _ratio(getattr(self.dense, measure), getattr(self.compact, measure))

    def render(self) -> Table:
        table = before_after_table(self.dense, self.compact, latency_ratio=self.latency_ratio)
        for measure, outcome in self.budget.items():
            asked, achieved = f"asked {outcome.asked:.6g}", f"{outcome.achieved:.6g}"
            table.add_row(f"budget of {measure}", asked, achieved, f"{100 * outcome.ratio:.1f} %")
        reasons = {m: outcome.reason for m, outcome in self.budget.items() if outcome.reason}
        if reasons:
            table.caption = "\n".join(f"budget of {m}: {reason}" for m, reason in reasons.items())
            table.caption_justify = "left"
        return table

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON record."""
        return asdict(self)


def before_after_table(
    dense: ModelFigures, compact: ModelFigures, *, latency_ratio: float | None = None
) -> Table:
    """A table of neurons per layer, parameters, MACs, bytes, accuracy, latency and flatness.

    Args:
        dense: figures before pruning.
        compact: figures after pruning.
        latency_ratio: time ratio to show instead of the quotient of the two times, for example
            the median of ratios of `tf_kfacprune.export.latency`.

    Returns:
        A rich table; ``rich.print`` shows it. Rows with no figure are left out.

    Examples:
        >>> from tf_kfacprune.reporting import ModelFigures, before_after_table
        >>> table = before_after_table(ModelFigures({"fc": 300}, 1000), ModelFigures({"fc": 9}, 50))
    """
    from rich.table import Table

    table = Table(title="Before and after pruning", title_justify="left")
    table.add_column("")
    for heading in ("dense", "compact", "left"):
        table.add_column(heading, justify="right")
    for layer, size in dense.neurons.items():
        kept = compact.neurons.get(layer)
        table.add_row(f"neurons of {layer}", *_row(size, kept, _count))
    table.add_section()
    for label, name in [("parameters", "params"), ("MACs", "macs")]:
        _add(table, label, getattr(dense, name), getattr(compact, name), _count)
    for label, part in [(".tflite bytes", "raw"), (".tflite bytes, gzip", "gzip")]:
        _add(table, label, _part(dense.tflite, part), _part(compact.tflite, part), _count)
    if dense.accuracy is not None or compact.accuracy is not None:
        change = _UNKNOWN
        if dense.accuracy is not None and compact.accuracy is not None:
            change = f"{100 * (compact.accuracy - dense.accuracy):+.2f} points"
        table.add_row("accuracy", _percent(dense.accuracy), _percent(compact.accuracy), change)
    for name in dict.fromkeys([*dense.measures, *compact.measures]):
        _add(table, name, dense.measures.get(name), compact.measures.get(name), _significant)
    if dense.latency_us is not None or compact.latency_us is not None:
        row = _row(dense.latency_us, compact.latency_us, lambda time: f"{time:.1f} µs")
        left = row[2] if latency_ratio is None else f"{100 * latency_ratio:.1f} %"
        table.add_row("latency", row[0], row[1], left)
    for label, part in [
        ("top Hessian eigenvalue", "top"),
        ("same, scale-invariant", "scale_invariant"),
    ]:
        _add(table, label, _part(dense.flatness, part), _part(compact.flatness, part), _significant)
    return table


def _add(
    table: Table,
    label: str,
    dense: float | None,
    compact: float | None,
    show: Callable[[Any], str],
) -> None:
    if dense is not None or compact is not None:
        table.add_row(label, *_row(dense, compact, show))


def _row(
    dense: float | None, compact: float | None, show: Callable[[Any], str]
) -> tuple[str, str, str]:
    ratio = _ratio(dense, compact)
    return (
        _UNKNOWN if dense is None else show(dense),
        _UNKNOWN if compact is None else show(compact),
        _UNKNOWN if ratio is None else f"{100 * ratio:.1f} %",
    )


def _ratio(dense: float | None, compact: float | None) -> float | None:
    return None if not dense or compact is None else compact / dense


def _part(record: FileSize | Flatness | None, part: str) -> Any:
    return None if record is None else getattr(record, part)


def _significant(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _count(value: int) -> str:
    return f"{value:,}"


def _percent(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{100 * value:.2f} %"
