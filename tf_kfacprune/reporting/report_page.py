"""The report as one HTML page that needs nothing else: no network, no script, no picture file."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping

from tf_kfacprune.reporting.charts import Band, Line, line_chart, number
from tf_kfacprune.reporting.comparison import Comparison, before_after_table
from tf_kfacprune.reporting.figures import ModelFigures
from tf_kfacprune.reporting.page_style import STYLE
from tf_kfacprune.reporting.rendering import as_html
from tf_kfacprune.reporting.run_history import Run

__all__ = ["report_page"]

_COST_NAMES = {
    "macs": "MACs",
    "params": "parameters",
    "bytes": ".tflite bytes",
    "latency": "latency",
    "flash": "flash",
    "ram": "RAM",
}
_COST_COLORS = {
    "macs": "blue",
    "params": "green",
    "bytes": "violet",
    "latency": "orange",
    "flash": "teal",
    "ram": "pink",
}


def report_page(
    comparison: Comparison,
    *,
    title: str,
    run: Run | None = None,
    settings: Mapping[str, str] | None = None,
    command: str | None = None,
    versions: Mapping[str, str] | None = None,
) -> str:
    """Builds the page.

    Args:
        comparison: The figures before and after.
        title: Name of the model.
        run: How the training went; that part says why it is missing without one.
        settings: What the model was trained with, by name.
        command: The command line that made the run, if there is one that can be typed again.
        versions: Versions of the packages, by name.

    Returns:
        A whole HTML document.
    """
    parts = [
        f"<h1>{_text(title)}</h1>",
        '<p class="soft">Pruned by tf_kfacprune: what was kept, at what price, and how.</p>',
        _tiles(comparison),
        _section("What was kept", _kept(comparison)),
        _section("The run", _run(run, comparison)),
        _section("Before and after", f'<div class="wide">{_before_after(comparison)}</div>'),
        _section("Budget", _budget(comparison)),
        _section("Flatness", _flatness(comparison, run)),
        _section("How to make it again", _again(settings or {}, command, versions or {})),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}: pruning report</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{chr(10).join(parts)}\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>"


# ------------------------------------------------------------------ the figures at the top


def _tiles(comparison: Comparison) -> str:
    dense, compact = comparison.dense, comparison.compact
    tiles = []
    for name, of in (("MACs left", "macs"), ("parameters left", "params")):
        left = comparison.fraction(of)
        before, after = getattr(dense, of), getattr(compact, of)
        if left is not None:
            tiles.append((_percent(left), name, f"{after:,} of {before:,}"))
    if dense.tflite is not None and compact.tflite is not None:
        left, size = compact.tflite.raw / dense.tflite.raw, compact.tflite.raw
        tiles.append((_percent(left), "file left", f"{size:,} bytes of .tflite"))
    elif compact.tflite is not None:
        tiles.append((f"{compact.tflite.raw:,}", "bytes of .tflite", "float32"))
    if compact.accuracy is not None:
        note = "dense: not measured"
        if dense.accuracy is not None:
            note = f"dense: {100 * dense.accuracy:.2f} %"
        tiles.append((f"{100 * compact.accuracy:.2f} %", "accuracy", note))
    for name, value in compact.measures.items():
        before = dense.measures.get(name)
        note = "dense: not measured" if before is None else f"dense: {before:.4g}"
        tiles.append((f"{value:.4g}", name, note))
    if comparison.latency_ratio is not None:
        micro = f"{compact.latency_us:.1f} µs" if compact.latency_us is not None else "measured"
        tiles.append((_percent(comparison.latency_ratio), "time left", micro))
    shown = "".join(
        f'<div class="tile"><b>{_text(value)}</b>{_text(name)}<span>{_text(note)}</span></div>'
        for value, name, note in tiles
    )
    return f'<div class="tiles">{shown}</div>'


# ------------------------------------------------------------------ bars


def _kept(comparison: Comparison) -> str:
    sizes = comparison.dense.neurons
    rows = []
    for layer, size in sizes.items():
        kept = comparison.compact.neurons.get(layer, 0)
        share = kept / max(size, 1)
        kind = ' class="whole"' if kept == size else ""
        bar = f'<div class="track"><i{kind} style="width:{100 * share:.2f}%"></i></div>'
        rows.append(
            f'<tr><td class="name">{_text(layer)}</td><td class="share">{bar}</td>'
            f'<td class="figure">{kept:,} of {size:,}</td>'
            f'<td class="figure">{_percent(share)}</td></tr>'
        )
    note = (
        '<p class="soft">Channels of every input and every layer. A grey bar is one that kept all '
        "of them, an empty one a layer that is gone.</p>"
    )
    return f"{note}<table><tbody>{''.join(rows)}</tbody></table>"


# ------------------------------------------------------------------ the run over time


def _run(run: Run | None, comparison: Comparison) -> str:
    if run is None:
        return (
            "<p>No history of a training was at hand. Make the report in the process that trained "
            "the model, or pass <code>history=</code>, what <code>fit</code> returned.</p>"
        )
    bands: list[Band] = []
    if run.prune is not None:
        start, end = run.prune
        bands = [Band(run.first, start, "warmup"), Band(start, end, "prune")]
    x_range = (run.first, run.last)

    def chart(title: str, lines: Iterable[Line], percent: bool = False) -> str:
        return line_chart(
            list(lines),
            x_range=x_range,
            x_label="epochs",
            title=title,
            bands=bands,
            percent=percent,
        )

    def with_validation(name: str) -> list[Line]:
        found = {"training": (name, "blue"), "validation": (f"val_{name}", "orange")}
        return [
            Line(label, run.series[key], color)
            for label, (key, color) in found.items()
            if key in run.series
        ]

    charts = [chart("Loss", with_validation("loss"))]
    # Pruning begins with every gate open, which no epoch's end may show.
    whole = ((0.0, 1.0),) if run.first == 0 and run.prune is not None else ()
    costs = [Line(_COST_NAMES[m], (*whole, *run.series[m]), _COST_COLORS[m]) for m in run.costs]
    for measure, outcome in comparison.budget.items():
        if measure in run.costs:
            # The last value is what was achieved, also of a bound in bytes or microseconds.
            asked = run.series[measure][-1][1] / outcome.ratio
            line = ((run.first, asked), (run.last, asked))
            label = f"budget of {_COST_NAMES[measure]}"
            costs.append(Line(label, line, _COST_COLORS[measure], dashed=True))
    if comparison.budget:
        charts.append(chart("Cost, relative to dense", costs, percent=True))
    if "spectral_radius" in run.series:
        radius = Line("K-FAC estimate", run.series["spectral_radius"], "violet")
        charts.append(chart("Spectral radius of the curvature", [radius]))
    charts += [chart(_heading(name), with_validation(name)) for name in run.metrics]
    return _phase_note(run) + "".join(charts)


def _heading(name: str) -> str:
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]


def _epochs(count: float) -> str:
    return f"{number(count)} epoch" + "s" * (count != 1)


def _phase_note(run: Run) -> str:
    if run.settled:
        return '<p class="soft">The network had settled before this run: no gate moved in it.</p>'
    if run.prune is None:
        return '<p class="soft">Nothing was pruned in this run.</p>'
    start, end = run.prune
    keys = "".join(
        f'<span class="key"><i class="band" style="background:var(--{color})"></i>{name}</span>'
        for color, name in (
            ("warmup", "warm-up: every gate open"),
            ("prune", "prune: gates close"),
            ("page", "settle: what is left trains on"),
        )
    )
    return (
        f'<p class="soft">Pruning began after {_epochs(start)} and ended on the budget after '
        f"{_epochs(end)}. Each value stands at the end of its epoch.</p><p>{keys}</p>"
    )


# ------------------------------------------------------------------ tables and words


def _before_after(comparison: Comparison) -> str:
    return as_html(
        before_after_table(
            comparison.dense, comparison.compact, latency_ratio=comparison.latency_ratio
        )
    )


def _budget(comparison: Comparison) -> str:
    if not comparison.budget:
        return "<p>The model has no budget.</p>"
    rows = [
        [
            _COST_NAMES.get(measure, measure),
            f"{outcome.asked:.6g}",
            f"{outcome.achieved:.6g}",
            f"{100 * outcome.ratio:.1f} %",
        ]
        for measure, outcome in comparison.budget.items()
    ]
    # Not in the table: a column of prose has no room on a phone.
    reasons = "".join(
        f'<p class="soft">{_COST_NAMES.get(measure, measure)}, why not more: '
        f"{_text(outcome.reason or 'the bound is met exactly')}</p>"
        for measure, outcome in comparison.budget.items()
    )
    return _table(["bound on", "asked", "achieved", "used"], rows, numeric=(1, 2, 3)) + reasons


def _flatness(comparison: Comparison, run: Run | None) -> str:
    parts = []
    if run is not None and "spectral_radius" in run.series:
        epoch, value = run.series["spectral_radius"][-1]
        parts.append(
            f"<p>Spectral radius of the Kronecker-factored curvature after {_epochs(epoch)}: "
            f"<b>{number(value)}</b>.</p>"
        )
    measured = {"dense": comparison.dense, "compact": comparison.compact}
    rows = [_flatness_row(name, f) for name, f in measured.items() if f.flatness is not None]
    if rows:
        head = ["network", "top eigenvalue", "scale-invariant", "examples"]
        parts.append(_table(head, rows, numeric=(1, 2, 3)))
        parts.append(
            '<p class="soft">Largest eigenvalue of the exact Hessian of the mean loss; the '
            "scale-invariant one does not change when one layer is scaled up and the next one "
            "down. Networks of different size are compared by the second.</p>"
        )
    if not parts:
        return (
            "<p>Not measured. <code>kp.report(..., flatness=loss)</code> computes the exact top "
            "eigenvalue of the Hessian, and <code>curvature=kp.SpectralRadius()</code> watches and "
            "lowers the K-FAC estimate of it during training.</p>"
        )
    return "".join(parts)


def _flatness_row(name: str, figures: ModelFigures) -> list[str]:
    flatness = figures.flatness
    if flatness is None or flatness.top is None or flatness.scale_invariant is None:
        reason = flatness.reason if flatness is not None else None
        return [name, f"not measured: {reason}", "", ""]
    return [
        name,
        number(flatness.top),
        number(flatness.scale_invariant),
        f"{flatness.num_examples:,}",
    ]


def _again(settings: Mapping[str, str], command: str | None, versions: Mapping[str, str]) -> str:
    parts = []
    if command is not None:
        parts.append(f"<pre>{_text(command)}</pre>")
    if settings:
        parts.append(_table(["setting", "value"], [list(pair) for pair in settings.items()]))
    if versions:
        shown = ", ".join(f"{name} {version}" for name, version in versions.items())
        parts.append(f'<p class="soft">{_text(shown)}</p>')
    return "".join(parts) or "<p>Nothing is known about how the model was made.</p>"


def _table(head: list[str], rows: list[list[str]], numeric: Iterable[int] = ()) -> str:
    aligned = [' style="text-align:right"' if k in set(numeric) else "" for k in range(len(head))]
    left = ' style="text-align:left"'

    def row(tag: str, cells: list[str]) -> str:
        shown = (
            f"<{tag}{style or left}>{_text(cell)}</{tag}>"
            for cell, style in zip(cells, aligned, strict=True)
        )
        return f"<tr>{''.join(shown)}</tr>"

    body = "".join(row("td", cells) for cells in rows)
    return (
        f'<div class="wide"><table><thead>{row("th", head)}</thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def _percent(share: float) -> str:
    return f"{number(100 * share)} %"


def _text(content: str) -> str:
    return html.escape(content)
