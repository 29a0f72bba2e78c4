"""The site of `docs/`: it builds, is whole, asks nobody for anything; its generated pages are those of the code."""

import ast
import html
import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_methods import train

from trl_ift import METHODS


ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def load_pages():
    spec = importlib.util.spec_from_file_location("pages", DOCS / "_site" / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pages = load_pages()


# ---------------------------------------------------------------- generated pages


@pytest.mark.parametrize("file", pages.PAGES)
def test_generated_pages_are_those_of_the_code(file):
    assert (DOCS / file).read_text() == pages.PAGES[file](), "run `python docs/_site/pages.py`"


def test_every_method_has_its_place():
    assert sorted(m.name for _, _, found in pages.grouped_methods() for m in found) == sorted(m.name for m in METHODS)
    for method in METHODS:
        text = (DOCS / pages.page(method)).read_text()
        assert f"`trl-ift {method.name}`" in text
        assert f"`{method.trainer}`" in text


def test_the_options_that_moving_names_exist():
    from trl_ift import get_method
    from trl_ift.scripts.train import make_parser, option_strings

    parsers = [make_parser(get_method(name)) for name in ("ift", "dpo", "uft", "regularized-po", "soft-label-po")]
    known = set().union(*map(option_strings, parsers)) | {"--accelerate_config", "--config"}
    named = set(re.findall(r"(?<![\w-])--[a-z]\w+", (DOCS / "moving.md").read_text()))
    assert len(named) > 30
    assert named <= known


# ---------------------------------------------------------------- metrics


def glossary() -> set[str]:
    """The metrics in the first cells of the tables of `metrics.md`, but for its table of symptoms."""
    text = (DOCS / "metrics.md").read_text().partition("## Of every trainer")[2]
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([\w/]+)`", row)}


def recorded_in_the_sources() -> dict[str, str]:
    """Patterns of the names that the library's own trainers record, and where; what an f-string fills in is a word."""
    found = {}
    folders = ("supervised", "preference", "unpaired", "reward", "latent")
    for path in sorted(path for folder in folders for path in (ROOT / "trl_ift" / folder).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "_record_mean"
            ):
                names = node.args[:1]
            elif isinstance(node, ast.Assign):  # found["uft/correlation"] = ...
                names = [target.slice for target in node.targets if isinstance(target, ast.Subscript)]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "append":
                names = [node.func.value.slice] if isinstance(node.func.value, ast.Subscript) else []
            elif isinstance(node, ast.JoinedStr) and ast.unparse(node).count("guide/"):
                names = [ast.JoinedStr(node.values[1:])]
            for name in names:
                pattern = name_pattern(name)
                if pattern and ("/" in pattern or pattern in ("nll_loss", "sft_loss")) and not pattern.startswith("_"):
                    found[pattern] = f"{path.name}:{node.lineno}"
    return found


def name_pattern(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.escape(node.value) if re.fullmatch(r"[\w/]+", node.value) else None
    if isinstance(node, ast.JoinedStr):
        parts = [re.escape(part.value) if isinstance(part, ast.Constant) else r"\w+" for part in node.values]
        return "".join(parts)
    return None


def test_every_metric_of_the_sources_is_in_the_glossary():
    known, recorded = glossary(), recorded_in_the_sources()
    assert len(recorded) > 50
    missing = {p: where for p, where in recorded.items() if not any(re.fullmatch(p, name) for name in known)}
    assert not missing
    prefixes = {m.name.replace("-", "_") for m in METHODS} | {"eurus", "spo", "guide"}
    own = {name for name in known if name.split("/")[0] in prefixes}
    assert len(own) > 40
    assert not {name for name in own if not any(re.fullmatch(pattern, name) for pattern in recorded)}, (
        "logged by nothing"
    )


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_metric_of_a_run_is_in_the_glossary(method, tmp_path, tokenizer):
    history = train(method, tmp_path, tokenizer, steps=1).state.log_history
    logged = {key for entry in history for key in entry} - {"step"}
    assert {"loss", "grad_norm"} <= logged
    assert logged <= glossary()


# ---------------------------------------------------------------- the site


class Collector(HTMLParser):
    """What a page links to, what it loads, its anchors, and its formulas."""

    def __init__(self):
        super().__init__()
        self.links, self.loaded, self.anchors, self.formulas = [], [], set(), 0

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.formulas += tag == "math"
        self.anchors |= {attributes.get("id"), attributes.get("name")} - {None}
        if tag == "a" and (target := attributes.get("href")):
            self.links.append(target)
        elif tag in ("script", "img", "source", "iframe") and (target := attributes.get("src")):
            self.loaded.append(target)
        elif tag == "link" and attributes.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loaded.append(attributes["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(ROOT / "mkdocs.yml")]
    built = subprocess.run(
        [*command, "--site-dir", str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        timeout=120,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture(scope="module")
def collected(site) -> dict[str, Collector]:
    found = {}
    for path in site.glob("*.html"):
        found[path.name] = Collector()
        found[path.name].feed(path.read_text())
    return found


@pytest.mark.slow
def test_the_site_has_all_pages(site, collected):
    expected = {path.with_suffix(".html").name for path in DOCS.glob("*.md")}
    assert expected <= set(collected)
    assert {"benchmarks.html", "examples.html", "extending.html"} <= set(collected)
    assert "odpo" in (site / "extending.html").read_text()  # the guide stands there, not a link to it
    assert (site / "search" / "search_index.json").stat().st_size > 100_000
    assert not (site / "_site").exists()
    navigation = set(collected["index.html"].links)
    for page in (DOCS / "choose.md", *(DOCS / pages.page(method) for method in METHODS)):
        assert page.with_suffix(".html").name in navigation


@pytest.mark.slow
def test_the_site_asks_nobody_for_anything(site, collected):
    for name, page in collected.items():
        assert page.loaded, name
        assert not [target for target in page.loaded if re.match(r"(https?:)?//", target)], name
    for path in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)]*", path.read_text()), path


@pytest.mark.slow
def test_every_link_of_the_site_leads_somewhere(site, collected):
    checked = 0
    for name, page in collected.items():
        for target in [*page.links, *page.loaded]:
            if re.match(r"(https?:|mailto:|//)", target):
                continue
            file, _, anchor = html.unescape(target).partition("#")
            file = name if file in ("", ".") else file.partition("?")[0]
            if name == "404.html":  # absolute, as a server wants it
                file = file.removeprefix("/")
            assert (site / file).exists(), f"{name} links to {target}"
            checked += 1
            if anchor and anchor != "__tabbed" and file in collected:
                assert anchor in collected[file].anchors, f"{name} links to {target}"
    assert checked > 1000


@pytest.mark.slow
def test_formulas_are_drawn(site, collected):
    total = 0
    for path in DOCS.glob("*.md"):
        text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.DOTALL)
        displayed = text.count("$$") // 2
        inline = text.replace("$$", "").count("$") // 2
        assert collected[path.with_suffix(".html").name].formulas == displayed + inline, path.name
        total += displayed + inline
    assert total > 300
    font = site / "stylesheets" / "STIXTwoMath-Regular.ttf"
    assert font.stat().st_size > 1_000_000
    assert font.name in (site / "stylesheets" / "site.css").read_text()
