"""What MkDocs needs besides the pages: the README, pictures, the reference, and a check of links.

MkDocs calls the functions whose names begin with `on_`.

- The README is the first page, with its links as they are from inside this folder.
- Pictures of the benchmarks stay beside their records and are shown from there.
- The reference has one entry for every name in an `__all__` of the package or of one of its public
  modules. A name without a docstring ends the build.
- A link or an anchor of any built page that leads nowhere ends the build, too.
"""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[1]
PACKAGE = "tf_kfacprune"
RESULTS = "examples/benchmarks/results"
PICTURES = "pictures/results"


def on_files(files, config):
    """Adds the pages that are generated, and the pictures of the benchmarks."""
    from mkdocs.structure.files import File

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=home_page(readme)))
    files.append(File.generated(config, "api.md", content=reference_page(public_names())))
    for picture in sorted((ROOT / RESULTS).glob("*.png")):
        path = f"{PICTURES}/{picture.name}"
        files.append(File.generated(config, path, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown, **_):
    """Leads links to pictures of the benchmarks to where the site has them."""
    return markdown.replace(f"](../{RESULTS}/", f"]({PICTURES}/")


def on_post_build(config):
    """Ends the build if a page links to nothing."""
    dead = dead_links(Path(config["site_dir"]))
    if dead:
        from mkdocs.exceptions import PluginError

        raise PluginError("Links that lead nowhere:\n" + "\n".join(dead))


# ---------------------------------------------------------------------------- pages


def home_page(readme):
    """The README with links as they are from inside the folder of the pages.

    Other files of the repository are not on the site: they are named instead of linked.
    """
    readme = re.sub(r"\[([^\]]+)\]\((?!docs/|https?:|#)([^)]+)\)", r"\1 (`\2`)", readme)
    return re.sub(r'(\]\(|src="|srcset=")docs/', r"\1", readme)


def public_names():
    """`(module, summary, paths)` of the package and of the public modules in its `__all__`.

    Raises:
        PluginError: If a public name has no docstring.
    """
    import griffe
    from mkdocs.exceptions import PluginError

    package = griffe.load(PACKAGE, search_paths=[str(ROOT)])
    modules = {PACKAGE: package}
    doors = [name for name in exported(package) if is_door(name)]
    modules |= {f"{PACKAGE}.{name}": package[name] for name in doors}
    found, missing = [], []
    for path, module in modules.items():
        members = {
            name: described(module[name], name)
            for name in exported(module)
            if path != PACKAGE or name not in doors
        }
        missing += [
            f"{path}.{name}"
            for name, member in members.items()
            if not member.is_attribute and not member.has_docstring
        ]
        summary = module.docstring.value.splitlines()[0]
        places = [
            f"{path}.{name}" if member is module[name] else member.canonical_path
            for name, member in members.items()
        ]
        found.append((path, summary, places))
    if missing:
        raise PluginError(f"Public names without a docstring: {', '.join(missing)}")
    return found


def is_door(name):
    """Whether a public name of the package is one of its modules."""
    path = ROOT / PACKAGE / name
    return path.is_dir() or path.with_suffix(".py").is_file()


def described(member, name):
    """What a public name stands for; a function may have the name of the file that it is in."""
    return member[name] if member.is_module else member


def exported(module):
    """Names in the `__all__` of a module, as text."""
    return [getattr(name, "name", name).strip("'\"") for name in module.exports or ()]


def reference_page(modules):
    """Markdown of the reference: an entry for every public name."""
    parts = ["# Reference\n"]
    for path, summary, places in modules:
        shown = path.replace(PACKAGE, "kp", 1)
        parts.append(f"## `{shown}`\n\n{summary}\n")
        parts += [f"::: {place}\n" for place in places]
    return "\n".join(parts)


# ---------------------------------------------------------------------------- links


class Links(HTMLParser):
    """Targets that a page links to, and the anchors that it has."""

    def __init__(self, text):
        super().__init__()
        self.targets, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        """Collects links of every kind, and ids."""
        for name, value in attrs:
            if name in ("href", "src", "srcset") and value:
                self.targets.append(value)
            elif name == "id" or (name == "name" and tag == "a"):
                self.anchors.add(value)


def dead_links(site):
    """`page: target` of every link of a built site that leads nowhere; others' sites aside."""
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    dead = []
    for path, page in sorted(pages.items()):
        if path.name == "404.html":
            continue  # its links count from the root of the server
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            goal = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            goal = goal / "index.html" if goal.is_dir() else goal
            anchors = pages[goal].anchors if goal in pages else None
            is_dead = not goal.exists() or (
                parts.fragment and anchors is not None and unquote(parts.fragment) not in anchors
            )
            # The theme's link to the top has no anchor of its own.
            if is_dead and parts.fragment != "__skip":
                dead.append(f"{path.relative_to(site)}: {target}")
    return list(dict.fromkeys(dead))
