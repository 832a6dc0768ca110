"""Every table on every page is what the records say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.keras_features import IS_OLD

PAGES = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_tables_are_up_to_date(generate, page):
    if IS_OLD:
        pytest.skip("pages list the layers of newer versions of Keras")
    text = page.read_text(encoding="utf-8")
    assert generate.generated(text) == text, "run `python docs/generate.py`"
