"""The page of the report: complete, self-contained, and laid out well in a browser."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from tf_kfacprune.export import FileSize
from tf_kfacprune.pruning import BudgetOutcome
from tf_kfacprune.reporting import Comparison, Flatness, ModelFigures
from tf_kfacprune.reporting.report_page import report_page
from tf_kfacprune.reporting.run_history import Run


def browser():
    """Path of a Chromium that starts, or None; one installed by half does not."""
    for name in ("chromium", "chromium-browser"):
        path = shutil.which(name)
        if path and subprocess.run([path, "--version"], capture_output=True).returncode == 0:
            return path
    return None


BROWSER = browser()
LAYERS = {f"stage{k}_block_with_a_long_name_conv": 16 * k for k in range(1, 7)}
DENSE = ModelFigures(
    LAYERS, 266_610, 266_200, FileSize(1_070_000, 990_000), 0.9813, 20.0, Flatness(20.0, 1500.0, 9)
)
COMPACT = ModelFigures(
    {name: size // 4 for name, size in LAYERS.items()},
    19_700,
    19_000,
    FileSize(82_000, 75_000),
    0.9805,
    5.0,
    Flatness(None, None, 9, "layer 'up' (UpSampling2D) has none"),
)
COMPARISON = Comparison(
    DENSE,
    COMPACT,
    latency_ratio=0.25,
    budget={
        "macs": BudgetOutcome(0.08, 0.0714, "1 neuron of <fc1> would make macs=0.081"),
        "bytes": BudgetOutcome(90_000, 82_000),
    },
)
EPOCHS = range(1, 31)
RUN = Run(
    0,
    30,
    {
        "loss": tuple((k, 2.0 / k**2) for k in EPOCHS),
        "val_loss": tuple((k, 1.9 / k) for k in EPOCHS),
        "macs": tuple((k, max(0.0714, 1 - k / 8)) for k in EPOCHS),
        "params": tuple((k, max(0.0739, 1 - k / 8)) for k in EPOCHS),
        "spectral_radius": tuple((k, 30.0 / k) for k in EPOCHS),
        "accuracy": tuple((k, 1 - 0.3 / k) for k in EPOCHS),
    },
    prune=(1.5, 7.5),
)


def page(**changes):
    arguments = {
        "title": "a <net> & more",
        "run": RUN,
        "settings": {"budget": "Budget(macs=0.08)", "seed": "0"},
        "command": "kfacprune train --model=lenet5 --output_dir='a b'",
        "versions": {"keras": "3.15"},
    }
    return report_page(COMPARISON, **{**arguments, **changes})


class Outline(HTMLParser):
    """Tags that are open at the end, the text of the page, and its headings."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.counts = [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_every_part_is_on_the_page_and_every_tag_is_closed():
    outline = Outline(page())
    assert outline.open == []
    assert (outline.counts["h2"], outline.counts["svg"], outline.counts["h1"]) == (6, 4, 1)
    text = " ".join(" ".join(outline.words).split())
    for shown in (
        "a <net> & more",
        "7.14 % MACs left 19,000 of 266,200",
        "98.05 % accuracy dense: 98.13 %",
        "stage6_block_with_a_long_name_conv 24 of 96 25 %",
        "Pruning began after 1.5 epochs and ended on the budget after 7.5 epochs",
        "validation: 1.9 at 1",
        "MACs: 100 % at 0",
        "budget of MACs",
        "MACs 0.08 0.0714 89.2 % .tflite bytes 90000 82000 91.1 %",
        "MACs, why not more: 1 neuron of <fc1> would make macs=0.081",
        ".tflite bytes, why not more: the bound is met exactly",
        "dense 20 1,500 9",
        "not measured: layer 'up' (UpSampling2D) has none",
        "after 30 epochs: 1 .",
        "kfacprune train --model=lenet5 --output_dir='a b'",
        "seed 0",
        "keras 3.15",
    ):
        assert shown in text, shown


def test_nothing_is_loaded_from_elsewhere():
    assert not re.search(r"https?:|src=|url\(|@import|<script|<link|<iframe", page())


def test_what_is_not_known_is_said():
    bare = Comparison(
        replace(DENSE, flatness=None, tflite=None, accuracy=None),
        replace(COMPACT, flatness=None, tflite=None, accuracy=None),
    )
    text = report_page(bare, title="bare")
    for shown in ("No history of a training", "has no budget", "Not measured.", "Nothing is known"):
        assert shown in text
    assert "<svg" not in text
    assert Outline(text).open == []
    settled = page(run=replace(RUN, prune=None, settled=True))
    assert "had settled before this run" in settled
    assert "Nothing was pruned in this run" in page(run=replace(RUN, prune=None))


# Reads the layout in the browser: what sticks out, and which labels of a picture overlap.
LAYOUT = """<script>
const boxes = [...document.querySelectorAll('svg')].map(svg =>
  [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]));
const apart = (a, b) => a.right <= b.left || b.right <= a.left || a.bottom <= b.top ||
  b.bottom <= a.top;
const overlaps = boxes.flatMap(of => of.flatMap(([s, a], i) =>
  of.slice(i + 1).filter(([_, b]) => !apart(a, b)).map(([t, _]) => s + ' / ' + t)));
const wide = [...document.querySelectorAll('main *')].filter(e =>
  e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.wide')).map(e => e.outerHTML);
document.title = JSON.stringify({overlaps, wide, texts: boxes.flat().length,
  lowest: Math.min(...boxes.flat().map(([_, box]) => box.height)),
  bar: document.querySelector('.track i').getBoundingClientRect().width /
    document.querySelector('.track').getBoundingClientRect().width});
</script>"""


def browse(*arguments):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", *arguments]
    return subprocess.run(command, capture_output=True, timeout=120, check=True).stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium that starts")
@pytest.mark.parametrize("width", [400, 1000])
def test_labels_are_legible_and_apart_and_nothing_sticks_out_in_a_browser(tmp_path, width):
    (tmp_path / "page.html").write_text(page().replace("</body>", f"{LAYOUT}</body>"))
    dom = browse("--dump-dom", f"--window-size={width},900", f"file://{tmp_path}/page.html")
    found = json.loads(re.search(r"<title>(.*?)</title>", dom.decode(), re.DOTALL)[1])
    assert found["overlaps"] == found["wide"] == []
    assert found["texts"] > 40
    assert found["lowest"] > 9  # pixels
    assert found["bar"] == pytest.approx(0.25, abs=0.01)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium that starts")
@pytest.mark.parametrize(("scheme", "color"), [(0, (13, 17, 23)), (1, (255, 255, 255))])
def test_the_page_is_dark_where_the_reader_wants_it_so(tmp_path, scheme, color):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "page.html").write_text(page())
    browse(
        f"--blink-settings=preferredColorScheme={scheme}",
        "--window-size=600,400",
        f"--screenshot={tmp_path}/page.png",
        f"file://{tmp_path}/page.html",
    )
    picture = image.open(io.BytesIO((tmp_path / "page.png").read_bytes())).convert("RGB")
    assert picture.getpixel((2, 2)) == color
    assert len(picture.getcolors(1 << 20)) > 20
