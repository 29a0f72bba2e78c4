"""The report of a study: `report.html` and `report.md`, with the same tables and sentences, and the plots.

`write_report` computes the contents once, as sections of texts, tables and figures; a template for each format prints them,
`prose.j2` has the sentences that stand in every report. What is claimed is what `statistics.verdict` allows.
"""

import io
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

import jinja2
import yaml

from ..data.report import _STYLE, _fenced, _markdown, _plot, _visible
from ..data.shards import write_file
from .statistics import BASELINE, COLUMNS, Difference, Interval, Judged, Results, verdict


FILES = ("report.html", "report.md")
SIGNS = {"better": "▲", "worse": "▼", "higher": "↑", "lower": "↓", "no difference shown": "≈", "": ""}

_DRIFT = ("forward_kl", "chosen_drift", "rejected_drift", "neutral_nll")
_RELATIVE = ("preference_accuracy", "reward_margin", *_DRIFT[:3])  # to the start, where they are known
_MEANING = {
    "preference_accuracy": "held-out pairs whose chosen answer gained more log-probability than the rejected one since the "
    "start, which has 50 % by definition",
    "reward_margin": "by how much the chosen answer of a held-out pair gained more than the rejected one",
    "chosen_drift": "gain of the log-probability of the chosen held-out answers since the start",
    "rejected_drift": "gain of the log-probability of the rejected held-out answers since the start",
    "forward_kl": "KL divergence of the model from the start, on samples of the start for held-out prompts",
    "neutral_nll": "negative log-likelihood of texts that have nothing to do with the training: it rises with forgetting",
    "answer_length": "length of the greedy answers to held-out prompts",
    "cut_answers": "greedy answers that did not end within the limit",
}
# Kind of a method -> what of the pairs it sees
_TRAINS_ON = {
    "sft": "chosen answers",
    "pairs": "pairs",
    "triples": "pairs and gold answers",
    "unpaired": "both answers, each for itself",
    "lists": "pairs, as lists of two",
    "samples": "pairs, and samples of the start",
    "self-play": "chosen answers, and samples of the start",
    "weighted": "chosen answers, and samples of the start",
    "degraded": "pairs, and degraded answers",
}
_LONG = 25  # rows; a longer table scrolls on the screen
_MISSING = "–"
# Dark enough on white, and apart for colour-blind readers; the markers differ too
_COLORS = ("#0072b2", "#c04e00", "#007a5a", "#a8407f", "#333333", "#8a6500", "#6a51a3", "#2f8ac0")
_MARKERS = "os^DvPX<>p*hd8H"
_GREY = "#5b6570"


@dataclass
class _Cell:
    text: str
    small: str = ""  # the interval, or a remark
    sign: str = ""  # a key of SIGNS
    link: str = ""


def _row(*parts: _Cell | str) -> list[_Cell]:
    return [_Cell(part) if isinstance(part, str) else part for part in parts]


@dataclass
class _Table:
    caption: str
    header: list[str]
    groups: list[tuple[str, list[list[_Cell]]]]  # the start ("" for none) and its rows
    numbers: bool = True  # all columns but the first
    kind: str = "table"

    @property
    def style(self) -> str:
        """Classes of the HTML table."""
        rows = [row for _, rows in self.groups for row in rows]
        signed = any(cell.sign for row in rows for cell in row)
        return "numbers" * self.numbers + " signed" * signed + " long" * (len(rows) > _LONG)


@dataclass
class _Figure:
    title: str
    file: str
    png: bytes
    view_box: str
    body: str  # of the <svg> element
    alt: str


@dataclass
class _Text:
    kind: str  # "text", "note", "code" or "figures"
    text: str = ""
    figures: list[_Figure] = field(default_factory=list)


@dataclass
class _Section:
    title: str
    blocks: list[_Table | _Text]


def write_report(results: dict[str, Any], folder: str | os.PathLike) -> Path:
    """
    Write `report.html`, `report.md`, and the plots of the latter, `report-*.png`.

    `report.html` stands alone: plots and styles are inside. Both link to the cells by relative paths. Each file is replaced in
    one step, after all have been computed.

    Args:
        results (`dict`):
            The contents of a study's `results.json`.
        folder (`str` or `os.PathLike`):
            Where to write, usually the folder of the study; made if it does not exist.

    Returns:
        `Path`: The HTML file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ImportError('the report of a study needs matplotlib: run `pip install "trl-ift[report]"`.')
    study, folder = _Study(results), Path(folder)
    makers = (_headline, _sizes, _drift, _measures, _cost, _pairwise, _cells, _setup)
    sections = [section for section in (make(study) for make in makers) if section.blocks]
    page = {
        "title": f"Study {results['study']}",
        "subtitle": _subtitle(study),
        "answer": _answer(study),
        "warnings": _warnings(study),  # after the tables, which add to them
        "sections": sections,
        "signs": SIGNS,
        "study": study,
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=lambda template: template == "report.html.j2",
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(markdown=_markdown, fenced=_fenced)
    contents = {file: _visible(environment.get_template(f"{file}.j2").render(page)).encode() for file in FILES}
    figures = (figure for section in sections for block in section.blocks for figure in getattr(block, "figures", ()))
    contents |= {figure.file: figure.png for figure in figures}
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in contents.items():
        write_file(folder / file, content)
    return folder / FILES[0]


def report_text(results: dict[str, Any], width: int = 119) -> str:
    """The answer, the warnings and the headline table of a study, for a terminal of `width` columns."""
    study = _Study(results)
    lines = [line for text in _answer(study) for line in textwrap.wrap(text, width)]
    for text in _warnings(study):
        lines += ["", *textwrap.wrap(f"! {text}", width, subsequent_indent="  ")]
    if not study.main:
        return _visible("\n".join(lines))
    table = _measure_table(study, study.main)
    rows = [row for name, rows in table.groups for row in ([_Cell(name)], *rows)]
    names = [_cut("  " * (len(row) > 1) + row[0].text, width // 3) for row in rows]
    first = max(map(len, names))
    blocks: list[list[list[str]]] = []  # of columns that have room side by side
    room = 0
    for i, title in enumerate(table.header[1:], 1):
        cells = [_plain(row[i]) if len(row) > 1 else "" for row in rows]
        head = textwrap.wrap(title, 20)
        wide = max(map(len, [*head, *cells]))
        if wide + 2 > room:
            blocks, room = [*blocks, []], width - first
        room -= wide + 2
        blocks[-1].append([f"  {text:>{wide}}" for text in [""] * (9 - len(head)) + head + cells])
    for columns in blocks:
        shown = [name.ljust(first) + "".join(cells) for name, *cells in zip([""] * 9 + names, *columns, strict=True)]
        lines += ["", *(line for line in shown[:9] if line.strip()), "-" * len(shown[0]), *shown[9:]]
    lines += ["", *textwrap.wrap(table.caption, width)]
    return _visible("\n".join(line.rstrip() for line in lines))


# ---------------------------------------------------------------- names


class _Study(Results):
    """The results with the names that the report gives to their parts."""

    def label(self, key: str, unit: str = "") -> str:
        """Title of a measure, with its name where titles repeat."""
        title = self.about[key].title
        twins = sum(measure.title == title for measure in self.about.values())
        return title + (f" ({key})" if twins > 1 else "") + (f", {unit}" if unit else "")

    def start_label(self, start: str) -> str:
        about = self.starts[start]
        format_ = ", chat template" if about.get("chat") else ""
        return f"{start}: {about['model']}{', after SFT' if about.get('sft') else ''}{format_}"

    def row_label(self, start: str, method: str) -> str:
        """A method at the largest size, with what is not complete."""
        done = len(self.runs.get((start, method, self.size), {}))
        if method == BASELINE or done == len(self.seeds):
            return "the start itself" if method == BASELINE else method
        place = (start, method, self.size)
        failed = any((c["start"], c["method"], c["size"]) == place and c["status"] == "failed" for c in self.cells)
        return f"{method} ({f'{done} of {len(self.seeds)} seeds' if done else 'failed' if failed else 'missing'})"

    def by_start(self, row: Callable[[str, str], list[_Cell]], *first: str) -> list[tuple[str, list[list[_Cell]]]]:
        """Rows of all methods, after those in `first`, as groups of a table."""
        return [(self.start_label(s), [row(s, method) for method in (*first, *self.methods)]) for s in self.starts]


# ---------------------------------------------------------------- sentences


def _subtitle(study: _Study) -> str:
    done = sum(cell["status"] == "done" for cell in study.cells)
    numbers = {"start": study.starts, "method": study.methods, "size": study.sizes, "seed": study.seeds}
    grid = " × ".join(_count(len(found), what) for what, found in numbers.items())
    return f"{grid}; {done:,} of {_count(len(study.cells), 'cell')} done."


def _answer(study: _Study) -> list[str]:
    key = study.primary
    if key is None or not any(size for _, _, size in study.runs):
        return ["No trained cell is done yet: nothing can be said."]
    what = f"{study.label(key)} with {_count(study.size, 'pair')}."
    sentences = [f"{what} {_claim(study, 'the start', study.against_start(key))}"]
    for name, title in (("sft", "SFT on the same data"), ("dpo", "DPO")):
        other = next((label for label, method in study.methods.items() if method["method"] == name), None)
        found: Judged = {}
        for start in study.starts if other else ():
            for (a, b), (_, p, _) in study.compared(start).items():
                method = b if a == other else a
                difference = study.difference(start, method, key, other) if other in (a, b) else None
                if difference:
                    found[start, method] = (difference, p, verdict(difference, p))
        if found:
            sentences.append(_claim(study, title if other == name else f"{title} ({other})", found))
    return sentences


def _claim(study: _Study, other: str, found: Judged) -> str:
    """What is shown of the methods against another one, and what is not."""
    tested = {place: entry for place, entry in found.items() if entry[0].low is not None}
    if not tested:
        return f"Against {other}: no interval to judge by."
    said: dict[str, list[str]] = {}
    for (start, method), (difference, _, word) in sorted(tested.items(), key=lambda item: -abs(item[1][0].value)):
        name = f"{method} from {start}" if len(study.starts) > 1 else method
        said.setdefault(word, []).append(f"{name} ({_plain(_change(difference))})")
    silent = len(said.pop("no difference shown", []))
    words = [word for word in ("better", "higher", "worse", "lower") if word in said]
    parts = [f"Shown {word} than {other}: {_listed(said[word])}." for word in words]
    parts += [f"No difference is shown for {_count(silent, 'other')}."] if silent else []
    return " ".join(parts) if said else f"No method is shown to differ from {other}."


def _warnings(study: _Study) -> list[str]:
    warnings = []
    for status, verb in (("failed", "failed"), ("missing", "not done yet")):
        ids = [cell["id"] for cell in study.cells if cell["status"] == status]
        if ids:
            warnings.append(f"{_count(len(ids), 'cell')} {verb}; all numbers rest on the others: {_listed(ids, 8)}.")
    versions: dict[str, dict[str, int]] = {}
    for cell in (cell for cell in study.cells if cell["status"] == "done"):
        for package, version in (cell.get("versions") or {}).items():
            numbers = versions.setdefault(package, {})
            numbers[str(version)] = numbers.get(str(version), 0) + 1
    for package, numbers in versions.items():
        if len(numbers) > 1:
            parts = [f"{version} in {_count(number, 'cell')}" for version, number in numbers.items()]
            warnings.append(f"Cells were made with different versions of {package}: {', '.join(parts)}.")
    if len(study.seeds) == 1:
        warnings.append("One seed: intervals are over documents, and do not cover what another training would give.")
    seeds = [len(runs) for (_, _, size), runs in study.runs.items() if size == study.size]
    if seeds and min(seeds) < max(len(study.seeds), 2) and len(study.seeds) > 1:
        warnings.append(
            "Of some methods one seed or some of the seeds are done: † marks differences over documents alone."
        )
    rows = {
        cell["id"]: f"{cell['id']} ({cell['train']['rows']} of {cell['size']})"
        for cell in study.cells
        if cell["status"] == "done" and cell.get("train") and cell["size"] and cell["train"]["rows"] < cell["size"]
    }
    if rows:
        warnings.append(
            f"Trained on fewer pairs than the others, some of them twice, as the start gave no other answer to some prompts: "
            f"{_listed(list(rows.values()), 8)}."
        )
    if study.sizes and study.size < study.sizes[-1]:
        warnings.append(f"No cell with {_count(study.sizes[-1], 'pair')} is done; tables show {study.size:,}.")
    bare = [start for start in study.starts if (start, BASELINE, 0) not in study.runs]
    if bare:
        warnings.append(f"Not evaluated, so that nothing is compared with it: the start itself of {_listed(bare)}.")
    few = [study.label(key) for key, measure in study.about.items() if 0 < len(measure.items or ()) < 30]
    if few:
        warnings.append(f"Fewer than 30 documents, too few for their intervals to be trusted: {_listed(few)}.")
    for found in study.problems.values():
        warnings.append(f"Not compared: {_listed(list(found))}. {next(iter(found.values()))}")
    return warnings


# ---------------------------------------------------------------- tables of measures


def _headline(study: _Study) -> _Section:
    title = f"Results with {_count(study.size, 'pair')}"
    return _Section(title, [_measure_table(study, study.main)] if study.main else [])


def _measure_table(study: _Study, keys: Sequence[str], title: str = "", change: str = "") -> _Table:
    """All methods at the largest size, with a sign against the start; of the measure `change`, what changed."""
    said = {key: study.against_start(key) for key in keys}

    def row(start: str, method: str) -> list[_Cell]:
        cells = [_Cell(study.row_label(start, method))]
        for key in keys:
            difference, _, word = said[key].get((start, method), (None, None, ""))
            cell = _estimate_cell(study, start, method, study.size, key)
            if key == change:
                cell = _change(difference) if difference else _Cell(_MISSING)
            cell.sign = word if difference and difference.low is not None else ""
            cells.append(cell)
        return cells

    groups = study.by_start(row, BASELINE)
    caption = (
        "Mean and 95 % interval over seeds († one run: over documents). Against the start: ▲ better, ▼ worse, ↑ higher, "
        "↓ lower, ≈ no difference shown (paired over documents and seeds, at 0.05 adjusted for the column)."
    )
    caption = f"{title} Numbers and signs as in the first table." if title else caption
    header = [study.label(key, _UNIT_TITLES.get(study.about[key].unit, "")) for key in keys]
    header = [f"Change of {text}" if key == change else text for key, text in zip(keys, header, strict=True)]
    return _Table(caption, ["Method", *header], groups)


def _estimate_cell(study: _Study, start: str, method: str, size: int, key: str) -> _Cell:
    found = study.estimate(start, method, size, key)
    if found is None:
        return _Cell(_MISSING)
    (interval, runs), unit = found, study.about[key].unit
    if interval.low is None or interval.high is None:
        return _Cell(_amounts([interval.mean], unit)[0] + _mark(unit), "no interval")
    mean, low, high = _amounts([interval.mean, interval.low, interval.high], unit)
    if interval.low == interval.high:
        same = "no spread" if runs == 1 else f"no spread, {runs} runs"
        return _Cell(mean + _mark(unit), "by definition" if method == BASELINE and key in _RELATIVE else same)
    return _Cell(mean + _mark(unit), f"[{low}, {high}]{'†' if runs == 1 else ''}")


def _sizes(study: _Study) -> _Section:
    key, sizes = study.primary, study.sizes
    if key is None:
        return _Section("Data size", [])
    title = study.label(key)
    section = _Section(f"{title} and data size", [])
    if len(sizes) < 2:
        section.blocks.append(_Text("text", "One size was run: what less or more data would give is not known."))
        return section
    figures = [figure for i, start in enumerate(study.starts) if (figure := _size_figure(study, i, start, key))]
    note = (
        "Bars are 95 % intervals over seeds, or over documents for one run; those that leave the plot are cut. The data of a "
        "smaller size are part of those of a larger one."
    )
    groups = study.by_start(
        lambda start, method: [_Cell(method), *(_estimate_cell(study, start, method, size, key) for size in sizes)]
    )
    caption = f"{title} by number of pairs: mean and 95 % interval over seeds († one run: over documents)."
    section.blocks += [_Text("figures", figures=figures), _Text("note", note)] if figures else []
    section.blocks.append(_Table(caption, ["Method", *(_count(size, "pair") for size in sizes)], groups))
    return section


def _drift(study: _Study) -> _Section:
    section, key = _Section("Drift and forgetting", []), study.primary
    if key and "forward_kl" in study.about and key != "forward_kl":
        figures = [figure for i, start in enumerate(study.starts) if (figure := _drift_figure(study, i, start, key))]
        note = (
            "A line goes from the smallest size to the largest, which has the large marker and bars of 95 % intervals."
        )
        section.blocks += [_Text("figures", figures=figures), _Text("note", note)] if figures else []
    keys = [key for key in _DRIFT if key in study.about]
    section.blocks += [_measure_table(study, keys, "Drift.", change="neutral_nll")] if keys else []
    return section


def _measures(study: _Study) -> _Section:
    """The measures that the section on drift does not show, by group."""
    section = _Section("All measures, by group", [])
    groups: dict[str, list[str]] = {}
    for key in (key for key in study.about if key not in _DRIFT[:3]):
        groups.setdefault(study.about[key].group, []).append(key)
    tables: list[dict[str, list[str]]] = []  # small groups share one
    for group, keys in groups.items():
        if not tables or sum(map(len, tables[-1].values())) + len(keys) > COLUMNS:
            tables.append({})
        tables[-1][group] = keys
    for table in tables:
        title, keys = ", ".join(table), [key for keys in table.values() for key in keys]
        for i in range(0, len(keys), COLUMNS):
            part = keys[i : i + COLUMNS]
            section.blocks.append(_measure_table(study, part, f"{title[:1].upper()}{title[1:]}."))
    return section


def _pairwise(study: _Study) -> _Section:
    section = _Section("Methods against each other", [])
    groups = []
    for start in study.starts if study.primary else ():
        rows = []
        found = study.compared(start).items()
        for (a, b), (difference, p, word) in sorted(found, key=lambda item: 2 if item[1][1] is None else item[1][1]):
            texts = {"better": f"{a} better", "worse": f"{b} better", "higher": f"{a} higher", "lower": f"{b} higher"}
            shown = texts.get(word, word if difference.low is not None else "no interval to judge by")
            rows.append(_row(f"{a} − {b}", _change(difference), _p_value(difference.p), _p_value(p), shown))
        groups += [(study.start_label(start), rows)] if rows else []
    if groups and study.primary:
        caption = (
            f"{study.label(study.primary)} with {_count(study.size, 'pair')}: difference with its 95 % interval, paired over "
            "documents and seeds († one seed: over documents). The adjusted p-value (Holm) is for all comparisons of a start."
        )
        header = ["Methods", "Difference", "p-value", "Adjusted", "Shown"]
        section.blocks.append(_Table(caption, header, groups))
    return section


# ---------------------------------------------------------------- cost, cells, settings


def _cost(study: _Study) -> _Section:
    cells = [cell for cell in study.cells if cell["status"] == "done" and cell.get("train")]
    cells = [cell for cell in cells if cell["size"] == study.size]
    sft = next((label for label, method in study.methods.items() if method["method"] == "sft"), None)
    groups = []
    for start in study.starts:
        trained: dict[str, list[dict[str, Any]]] = {}
        for cell in (cell for cell in cells if cell["start"] == start):
            trained.setdefault(cell["method"], []).append(cell["train"])
        seconds = {method: _median(trained[method], "seconds") for method in study.methods if method in trained}
        known = {method: value for method, value in seconds.items() if value}
        unit = sft if sft in known else min(known, key=lambda method: known[method], default="")
        rows = []
        for method in seconds:
            times = [run["seconds"] for run in trained[method] if run.get("seconds") is not None]
            spread = f"{_duration(min(times))} to {_duration(max(times))}" if len(times) > 1 else ""
            relative = f"{known[method] / known[unit]:.2f} ×" if method in known else _MISSING
            memory = _median(trained[method], "peak_memory_bytes")
            others = [_whole(_median(trained[method], name)) for name in ("tokens_per_second", "sequences", "steps")]
            others.append(_MISSING if memory is None else f"{memory / 2**30:.2f} GiB")
            rows.append(_row(method, _Cell(_duration(seconds[method]), spread), relative, *others))
        groups += [(f"{study.start_label(start)} (relative to {unit})", rows)] if known else []
    header = ["Method", "Training", "Relative", "Tokens/s", "Sequences", "Steps", "Peak memory"]
    caption = (
        f"Medians of the runs with {_count(study.size, 'pair')}, with the shortest and the longest training. Evaluation and "
        "the SFT of a start are not included. Times compare only if the machine did nothing else."
    )
    return _Section("Cost of training", [_Table(caption, header, groups)] if groups else [])


def _cells(study: _Study) -> _Section:
    rows = []
    for cell in study.cells:
        config, samples = (quote(cell.get(name) or "") for name in ("config", "samples"))
        error = (cell.get("error") or "").strip().splitlines()[-1:]  # of a traceback, the line that says what happened
        status = ": ".join([cell["status"], *(_cut(line.strip(), 300) for line in error)])
        times = (cell.get("train") or {}).get("seconds"), cell.get("evaluation_seconds")
        answers = _Cell("samples" if samples else _MISSING, link=samples)
        rows.append(_row(_Cell(cell["id"], link=config), status, *map(_duration, times), answers))
    header = ["Cell", "Status", "Training", "Evaluation", "Answers"]
    caption = "Each cell with a link to its settings and results, and one to its generated answers."
    return _Section("Every cell", [_Table(caption, header, [("", rows)], numbers=False)] if rows else [])


def _setup(study: _Study) -> _Section:
    methods, measures = [], []
    for label, method in study.methods.items():
        paper = str(method.get("paper") or "")
        link = f"https://huggingface.co/papers/{paper}" if re.fullmatch(r"\d{4}\.\d{4,5}", paper) else ""
        options = ", ".join(f"{name}={value}" for name, value in (method.get("options") or {}).items()) or "defaults"
        title = str(method.get("title") or label)
        trains_on = _TRAINS_ON.get(str(method.get("kind")), str(method.get("kind") or _MISSING))
        methods.append(_row(label, title, trains_on, options, _Cell(paper or _MISSING, link=link)))
    for key, measure in study.about.items():
        better = f"{measure.better} is better" if measure.better else "neither is better"
        documents = f"{len(measure.items):,}" if measure.items else _MISSING
        parts = ", ".join(study.label(part) for part in study.averages.get(key, ()))
        told = "share of right greedy answers" if key.startswith("task/") else key
        meaning = f"mean of {parts}" if parts else _MEANING.get(key, told)
        measures.append(_row(study.label(key), meaning, measure.unit, better, documents))
    environment = study.results.get("environment") or {}
    versions = ", ".join(f"{name} {version}" for name, version in (environment.get("versions") or {}).items())
    facts = [_row(str(n), versions if n == "versions" else str(v)) for n, v in environment.items()]
    tables = [
        _Table("Methods", ["Method", "Title", "Trains on", "Options", "Paper"], [("", methods)], numbers=False),
        _Table("Measures", ["Measure", "Meaning", "Unit", "Direction", "Documents"], [("", measures)], numbers=False),
        _Table("Environment", ["What", "Value"], [("", facts)], numbers=False),
    ]
    section = _Section("Set-up", [table for table in tables if table.groups[0][1]])
    settings = yaml.safe_dump(study.results.get("settings") or {}, sort_keys=False, allow_unicode=True)
    section.blocks += [_Text("note", "The study file:"), _Text("code", settings.rstrip())]
    return section


# ---------------------------------------------------------------- plots


def _figure(study: _Study, name: str, start: str, alt: str, draw: Callable[[Any], None]) -> _Figure:
    """Draw a figure as SVG for the HTML file and as PNG for the Markdown file."""
    from matplotlib import style
    from matplotlib.figure import Figure

    svg = _plot(name, draw, alt, "", None)  # type: ignore[arg-type]
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(5, 3.4), layout="constrained")
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    title = f"From {study.start_label(start)}"
    return _Figure(title, f"report-{name}.png", buffer.getvalue(), svg.view_box, svg.body, _visible(alt))


def _look(study: _Study, method: str) -> dict[str, Any]:
    i = list(study.methods).index(method)
    line = ("-", "--")[i // len(_COLORS) % 2]
    return {"color": _COLORS[i % len(_COLORS)], "marker": _MARKERS[i % len(_MARKERS)], "linestyle": line}


def _bars(interval: Interval, scale: float) -> list[list[float]] | None:
    """Lengths of the two halves of an interval, as matplotlib wants them."""
    if interval.low is None or interval.high is None:
        return None
    return [[max(0.0, scale * part)] for part in (interval.mean - interval.low, interval.high - interval.mean)]


def _span(study: _Study, key: str) -> tuple[float, float]:
    """Limits of the plots of all starts. They are those of the means: intervals over few seeds can be far wider."""
    found = [study.estimate(start, BASELINE, 0, key) for start in study.starts]
    means = [entry[0].mean for entry in found if entry]
    for start in study.starts:
        means += [interval.mean for points in _lines(study, start, key).values() for _, interval in points]
    room = 0.4 * (max(means) - min(means)) or 0.1 * abs(means[0]) or 1.0
    low, high = min(means) - room, max(means) + room
    return (max(low, -0.02), min(high, 1.02)) if study.about[key].unit == "share" else (low, high)


def _lines(study: _Study, start: str, key: str) -> dict[str, list[tuple[int, Interval]]]:
    """Intervals of a measure by size, by method."""
    lines = {
        method: [(size, found[0]) for size in study.sizes if (found := study.estimate(start, method, size, key))]
        for method in study.methods
    }
    return {method: points for method, points in lines.items() if points}


def _size_figure(study: _Study, i: int, start: str, key: str) -> _Figure | None:
    lines, base, unit = _lines(study, start, key), study.estimate(start, BASELINE, 0, key), study.about[key].unit
    scale, sizes = 100 if unit == "share" else 1, study.sizes
    if not lines:
        return None
    low, high = (scale * limit for limit in _span(study, key))
    wide = sizes[-1] / sizes[0]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.set(xscale="log", xlabel="pairs", ylabel=_axis(study, key), ylim=(low, high))
        axes.set_xlim(sizes[0] * wide**-0.1, sizes[-1] * wide**0.1)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        ends = []
        step = min(0.012, 0.1 / len(lines))
        for j, (method, points) in enumerate(lines.items()):
            look = _look(study, method)
            xs = [size * wide ** (step * (j - (len(lines) - 1) / 2)) for size, _ in points]  # bars side by side
            axes.plot(xs, [scale * interval.mean for _, interval in points], **look, markersize=5, linewidth=1.4)
            for x, (_, interval) in zip(xs, points, strict=True):
                bars = _bars(interval, scale)
                axes.errorbar(x, scale * interval.mean, bars, color=look["color"], linewidth=0.9, capsize=2)
            ends.append((scale * points[-1][1].mean, xs[-1], method, look["color"]))
        if base:
            axes.axhline(scale * base[0].mean, color=_GREY, linestyle=":", linewidth=1)
            ends.append((scale * base[0].mean, sizes[-1] * wide**0.1, "the start", _GREY))
        ends.sort()
        places = _apart([(y - low) / (high - low) for y, *_ in ends], 1 / max(17, len(ends)))
        for (y, x, label, color), place in zip(ends, places, strict=True):
            arrow = {"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkB": 4, "relpos": (0, 0.5)}
            text = {"textcoords": "axes fraction", "va": "center", "color": color, "fontsize": 9, "arrowprops": arrow}
            axes.annotate(_cut(_visible(label), 18), (x, y), (1.04, place), annotation_clip=False, **text)

    facts = (
        f"{method} {', '.join(_amounts([interval.mean for _, interval in points], unit))}{_mark(unit)}"
        for method, points in lines.items()
    )
    alt = (
        f"{study.label(key)} with {', '.join(f'{size:,}' for size in sizes)} pairs, from {start}: {'; '.join(facts)}."
    )
    return _figure(study, f"size-{i + 1}", start, alt, draw)


def _apart(places: list[float], gap: float) -> list[float]:
    """Ascending places in [0, 1], moved so that none is closer than `gap` to the next."""
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    most = 1.0
    for i in reversed(range(len(places))):
        places[i] = min(places[i], most)
        most = places[i] - gap
    return places


def _drift_figure(study: _Study, i: int, start: str, key: str) -> _Figure | None:
    unit = study.about[key].unit
    scale = 100 if unit == "share" else 1
    drifts, values = ({m: dict(points) for m, points in _lines(study, start, k).items()} for k in ("forward_kl", key))
    paths = {
        method: [(x, values[method][size]) for size, x in points.items() if size in values.get(method, {})]
        for method, points in drifts.items()
    }
    paths = {method: points for method, points in paths.items() if points}
    if not paths:
        return None
    low, high = (scale * limit for limit in _span(study, key))

    def draw(figure: Any) -> None:
        figure.set_size_inches(5, 3 + 0.2 * math.ceil(len(paths) / 3))  # room for the legend
        axes = figure.subplots()
        for method, points in paths.items():
            look, (x, y) = _look(study, method), points[-1]
            means = [[x.mean for x, _ in points], [scale * y.mean for _, y in points]]
            axes.plot(*means, **look, markersize=3, linewidth=1)
            axes.plot(
                x.mean, scale * y.mean, **look | {"linestyle": ""}, markersize=8, label=_cut(_visible(method), 18)
            )
        axes.margins(0.15)
        limits = axes.get_xlim()  # of the means
        for method, points in paths.items():
            (x, y), color = points[-1], _look(study, method)["color"]
            axes.errorbar(x.mean, scale * y.mean, _bars(y, scale), _bars(x, 1), color=color, linewidth=0.8, alpha=0.6)
        axes.set(xlabel=_axis(study, "forward_kl"), ylabel=_axis(study, key), xlim=limits, ylim=(low, high))
        figure.legend(loc="outside lower center", ncols=3, frameon=False, columnspacing=1.2)

    facts = (
        f"{method} {_amounts([points[-1][0].mean], 'nats')[0]} nats, {_amounts([points[-1][1].mean], unit)[0]}{_mark(unit)}"
        for method, points in paths.items()
    )
    alt = f"{study.label(key)} against {study.label('forward_kl')} at the largest size, from {start}: {'; '.join(facts)}."
    return _figure(study, f"drift-{i + 1}", start, alt, draw)


def _axis(study: _Study, key: str) -> str:
    unit = study.about[key].unit
    return _visible(study.label(key, "%" if unit == "share" else _UNIT_TITLES.get(unit, "")))


# ---------------------------------------------------------------- text

_UNIT_TITLES = {"nats": "nats", "nats/token": "nats/token", "tokens": "tokens"}


def _amounts(values: Sequence[float], unit: str, sign: str = "") -> list[str]:
    """Numbers that belong together, with as many decimals as the largest of them needs; shares in percent."""
    values = [100 * value for value in values] if unit == "share" else values
    decimals = {"share": 1, "tokens": 1, "count": 1, "score": 2}.get(unit, 3)
    # Nats may be small, or their interval narrow
    width = max(values) - min(values)
    scales = [max(map(abs, values)) / 100, max(width / 10, 1e-4) if width else 0]
    if decimals == 3 and any(scales):
        decimals = min(6, max(3, math.ceil(-math.log10(min(filter(None, scales))))))
    texts = (f"{value if round(value, decimals) else 0.0:{sign},.{decimals}f}" for value in values)
    return [text.replace("-", "−") for text in texts]


def _mark(unit: str) -> str:
    return " %" if unit == "share" else ""


def _change(difference: Difference) -> _Cell:
    """A difference with its interval."""
    known = [value for value in (difference.value, difference.low, difference.high) if value is not None]
    value, *bounds = _amounts(known, difference.unit, "+")
    unit = "points" if difference.unit == "share" else _UNIT_TITLES.get(difference.unit, "")
    mark = "†" if difference.kind == "documents" else ""
    return _Cell(f"{value} {unit}".rstrip(), f"[{', '.join(bounds)}]{mark}" if bounds else "no interval")


def _plain(cell: _Cell) -> str:
    return " ".join(filter(None, (cell.text, cell.small, SIGNS[cell.sign])))


def _p_value(p: float | None) -> str:
    return _MISSING if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return _MISSING
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _whole(value: float | None) -> str:
    return _MISSING if value is None else f"{value:,.0f}"


def _median(runs: Iterable[dict[str, Any]], name: str) -> float | None:
    """Of runs one of which may have been held up."""
    known = [run[name] for run in runs if run.get(name) is not None]
    return median(known) if known else None


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _listed(names: list[str], most: int = 5) -> str:
    return (
        ", ".join(names) if len(names) <= most else f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"
    )


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
