"""What mkdocs does beside rendering the pages: their order, the files outside of `docs/` that they speak of, formulas.

Pages are written for the repository, where they are read too. A link to a file outside of `docs/` leads to its copy on the
site, whose pages lie in one folder.
"""

import html
import posixpath
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


sys.path.insert(0, str(Path(__file__).parent))
import pages


ROOT = Path(__file__).parents[2]
# Pages that stand elsewhere in the repository: their file there -> their file on the site
ELSEWHERE = {
    "CONTRIBUTING.md": "extending.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/study/README.md": "benchmarks_study.md",
    "benchmarks/study/report.md": "benchmarks_study_report.md",
    "examples/README.md": "examples.md",
}
_SOURCES = ("examples/*.py", "benchmarks/*.py", "benchmarks/study/*.yaml", "benchmarks/study/*.png")
_FONT = "STIXTwoMath-Regular.ttf"
_INCLUDE = re.compile(r"<!-- include: (\S+) -->")
_LINK = re.compile(r"(?<=\[)([^\[\]]*)\]\((?!https?://|mailto:|#)([^)#\s]+)")
# Spaces as TeX has them, which the converter does not: thin ones around the name of a function without brackets, none around
# a slash, none after a minus that is a sign
_SPACES = (
    (re.compile(r"(</m\w+>(?<!</mo>))(?=<mi>(?:log|exp)</mi>)"), r'\1<mspace width="0.17em"/>'),
    (re.compile(r"(<mi>(?:log|exp)</mi>)(?=<m(?!o\b))"), r'\1<mspace width="0.17em"/>'),
    (re.compile(r"<mo>&#x0002F;</mo>"), '<mo lspace="0" rspace="0">&#x0002F;</mo>'),
    (
        re.compile(r"(<mo[^>]*>(?:[(\[]|&#x000(?:28|5B|7B|3D|2C);)</mo>)<mo>&#x02212;</mo>"),
        r'\1<mo form="prefix">&#x02212;</mo>',
    ),
)
_FENCED = re.compile(r"(^ *```.*?^ *```)", re.DOTALL | re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    existing = {path.name for path in Path(config.docs_dir).glob("*.md")} | set(ELSEWHERE.values())
    config.nav = pages.navigation(existing)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for origin, page in ELSEWHERE.items():
        if files.get_file_from_path(page) is None:
            files.append(File.generated(config, page, content=(ROOT / origin).read_text(encoding="utf-8")))
    for pattern in _SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            name = f"source/{path.relative_to(ROOT).as_posix()}"
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    origins = {site: origin for origin, site in ELSEWHERE.items()}
    here = page.file.src_uri
    is_generated = page.file.generated_by is not None
    markdown = _rebase(markdown, origins[here] if is_generated else f"docs/{here}")
    if include := _INCLUDE.search(markdown):
        origin = posixpath.normpath(f"docs/{include[1]}")
        text = (ROOT / origin).read_text(encoding="utf-8").partition("\n")[2]  # without its title
        markdown = markdown.replace(include[0], _rebase(text, origin))
    return markdown


def _rebase(markdown: str, origin: str) -> str:
    """Turn the links of a file in the repository, but for those in code, into links of the site."""

    def link(match: re.Match) -> str:
        text, target = match[1], posixpath.normpath(posixpath.join(posixpath.dirname(origin), match[2]))
        if text.endswith(".md") and (ROOT / target).is_file():  # the name of a file: on the site, that of its page
            title = (ROOT / target).read_text(encoding="utf-8").partition("\n")[0]
            text = title.removeprefix("# ").partition(":")[0]
        if target.startswith("docs/"):
            target = target.removeprefix("docs/")
        elif target in ELSEWHERE:
            target = ELSEWHERE[target]
        else:
            target = f"source/{target}"
        return f"{text}]({target}"

    parts = _FENCED.split(markdown)
    return "".join(part if i % 2 else _LINK.sub(link, part) for i, part in enumerate(parts))


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return re.sub(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', _formula, content, flags=re.DOTALL)


def _formula(match: re.Match) -> str:
    """MathML of a formula: browsers draw it without a script."""
    tex, is_block = html.unescape(match[2]).strip(), match[1] == "div"
    formula = convert(tex.replace(r"\arg\max", r"\mathrm{arg}\,\max"), display="block" if is_block else "inline")
    if "\\" in formula:  # a command that the converter does not know stays as it is
        raise ValueError(f"Cannot draw the formula {tex!r}. Write it with commands that latex2mathml knows.")
    for place, spaced in _SPACES:
        formula = place.sub(spaced, formula)
    return f'<div class="formula">{formula}</div>' if is_block else formula


def on_post_build(config: MkDocsConfig, **kwargs: Any) -> None:
    # The font of the formulas where the reader's machine has none of its own
    package = Path(find_spec("ziamath").origin).parent
    shutil.copyfile(package / "fonts" / _FONT, Path(config.site_dir) / "stylesheets" / _FONT)
