"""The style sheet of the report: one column, system fonts, light or dark as the reader has it."""

from __future__ import annotations

__all__ = ["STYLE"]

# Blue and orange differ for every kind of colour vision; text has a contrast of 4.5 or more.
STYLE = """
:root { color-scheme: light dark;
  --page: #ffffff; --card: #f6f8fa; --text: #1f2328; --soft: #59636e; --rule: #d1d9e0;
  --track: #e3e8ed; --blue: #0969da; --orange: #c4560f; --green: #1a7f37; --violet: #8250df;
  --teal: #0b7285; --pink: #bf3989;
  --warmup: #eef2f6; --prune: #fdeedd; }
@media (prefers-color-scheme: dark) { :root {
  --page: #0d1117; --card: #151b23; --text: #e6edf3; --soft: #9198a1; --rule: #3d444d;
  --track: #2a313c; --blue: #58a6ff; --orange: #f0883e; --green: #3fb950; --violet: #bc8cff;
  --teal: #39c5cf; --pink: #f778ba;
  --warmup: #1b222c; --prune: #3a2716; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 800px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 40px 0 8px; padding-bottom: 6px;
  border-bottom: 1px solid var(--rule); }
p { margin: 8px 0; }
.soft, figcaption { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); gap: 12px;
  margin: 20px 0 0; }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 12px 14px; }
.tile b { display: block; font-size: 23px; line-height: 1.25; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.tile span { display: block; color: var(--soft); font-size: 13px; }
table { border-collapse: collapse; width: 100%; margin: 8px 0; font-variant-numeric: tabular-nums; }
caption { display: none; }
th, td { padding: 5px 8px; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
th:first-child, td:first-child { padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
td.name { overflow-wrap: anywhere; }
td.figure, th[style*=right], td[style*=right] { text-align: right; white-space: nowrap; }
td.figure { width: 1%; }
td.share { width: 55%; }
.track { height: 14px; margin-top: 4px; border-radius: 3px; background: var(--track);
  overflow: hidden; }
.track i { display: block; height: 100%; background: var(--blue); border-radius: 3px; }
.track i.whole { background: var(--soft); }
figure { margin: 16px 0 20px; }
figcaption { font-size: 13px; }
figcaption b { color: var(--text); font-size: 14px; margin-right: 6px; }
.key { margin-left: 14px; white-space: nowrap; }
p .key { margin: 0 14px 0 0; }
.key i { display: inline-block; width: 18px; border-top: 2.5px solid; vertical-align: 4px;
  margin-right: 6px; }
.key i.dashed { border-top-style: dashed; }
.key i.band { height: 12px; border: 1px solid var(--rule); vertical-align: -1px; }
svg { display: block; width: 100%; height: auto; margin-top: 4px; overflow: visible; }
svg text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--rule); stroke-width: 1; opacity: .6; }
svg .axis { stroke: var(--soft); stroke-width: 1; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 12px 14px; overflow-x: auto;
  font: 13px/1.5 ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
footer { margin-top: 48px; color: var(--soft); font-size: 13px; }
@media (max-width: 560px) { td.share { width: 30%; } h1 { font-size: 22px; }
  th { white-space: normal; } .wide table { font-size: 13px; }
  .wide td:first-child { overflow-wrap: anywhere; min-width: 7.5em; }
  svg text { font-size: 19px; } }
@media print { main { max-width: none; padding: 0; } figure, tr { break-inside: avoid; } }
"""
