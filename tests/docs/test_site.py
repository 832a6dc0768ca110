"""The documentation site: first page, reference of all public names, and the check of links."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import tf_kfacprune as kp

ROOT = Path(__file__).parents[2]


@pytest.fixture(name="site", scope="module")
def site_hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_of_the_readme_are_led_to_the_pages_beside_it(site):
    text = '[a](docs/a.md#b) <img src="docs/p.svg" srcset="docs/q.svg"> [c](https://x.org/docs/)'
    expected = '[a](a.md#b) <img src="p.svg" srcset="q.svg"> [c](https://x.org/docs/)'
    assert site.home_page(text) == expected
    assert site.home_page("[d](examples/e.py) [f](#g)") == "d (`examples/e.py`) [f](#g)"
    for path in re.findall(r'(?:\]\(|src="|srcset=")(docs/[^)"#]*)', readme()):
        assert (ROOT / path).is_file(), path
    linked = {path for path in re.findall(r"\]\(([^)#]+)", readme()) if "://" not in path}
    assert all((ROOT / path).exists() for path in linked)
    left = set(re.findall(r"\]\(([^)#]+)", site.home_page(readme())))
    assert all("://" in path or (ROOT / "docs" / path).is_file() for path in left)


def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_pictures_of_the_benchmarks_are_led_to_their_place_in_the_site(site):
    text = "![x](../examples/benchmarks/results/frontier.png) [y](../CHANGELOG.md)"
    assert site.on_page_markdown(text) == "![x](pictures/results/frontier.png) [y](../CHANGELOG.md)"


def test_every_public_name_is_in_the_reference(site):
    pytest.importorskip("griffe")
    pytest.importorskip("mkdocs")
    page = site.reference_page(site.public_names())
    doors = {name: getattr(kp, name) for name in kp.__all__}
    for name, member in doors.items():
        if hasattr(member, "__all__"):
            assert f"## `kp.{name}`" in page
            for inner in member.__all__:
                assert f"::: tf_kfacprune.{name}.{inner}\n" in page
        elif name != "compact":
            assert f"::: tf_kfacprune.{name}\n" in page
    # A function that has the name of its file: the package's own name would mean the file.
    assert "::: tf_kfacprune.compaction.compact.compact\n" in page


def test_examples_have_the_title_by_which_the_reference_shows_them_as_code():
    # Under "Example:" the prompts `>>>` would be quotation marks of Markdown.
    for path in (ROOT / "tf_kfacprune").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert len(re.findall(r"^ *Example:$", text, re.MULTILINE)) == 0, path


def test_a_public_name_without_a_docstring_ends_the_build(site, tmp_path, monkeypatch):
    pytest.importorskip("griffe")
    from_mkdocs = pytest.importorskip("mkdocs.exceptions")
    package = tmp_path / "bare"
    package.mkdir()
    (package / "__init__.py").write_text(
        '"""Something."""\n__all__ = ["f", "g", "N"]\nN = 1\n'
        'def f():\n    pass\ndef g():\n    """Does."""\n'
    )
    monkeypatch.setattr(site, "ROOT", tmp_path)
    monkeypatch.setattr(site, "PACKAGE", "bare")
    with pytest.raises(from_mkdocs.PluginError, match=r"without a docstring: bare\.f$"):
        site.public_names()


def test_links_that_lead_nowhere_are_found(site, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "index.html").write_text('<h2 id="x"></h2><img src="../p.png">')
    (tmp_path / "p.png").write_text("")
    (tmp_path / "b.html").write_text(
        '<a href="a/#x"></a><a href="a/index.html#y"></a><a href="#z"></a><p id="z"></p>'
        '<a href="c.html"></a><img src="q%20r.png"><a href="https://x.org/d.html"></a>'
        '<a href="mailto:a@b"></a><a href="#__skip"></a>'
    )
    (tmp_path / "404.html").write_text('<a href="/gone.html"></a>')
    assert site.dead_links(tmp_path) == [
        "b.html: a/index.html#y",
        "b.html: c.html",
        "b.html: q%20r.png",
    ]
