"""The report of a data selection: `report.html` and `report.md` in one folder, with the same contents.

`write_report` computes the facts once, as sections of text, plots and tables; a template for each format prints them.
"""

import io
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from .shards import write_file


FILES = ("report.html", "report.md")

# Examples show the first and the last characters of a text
_HEAD, _TAIL = 400, 150
_QUANTILES = (0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1)
# Bars of the histogram and lines of its table; the first is a multiple of the second
_BINS, _TABLE_BINS = 60, 20
_BAR = 24
# Points of a scatter plot: not selected, selected
_POINTS = (1000, 500)
_PLAIN, _CHOSEN, _LINE = "#9aa3ad", "#0b62c4", "#c2410c"
# Of figures 360 pt wide, which a phone shows at about this size; texts stay texts, in the font of the page
_STYLE: dict[str, Any] = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "legend.handletextpad": 0.4,
    "svg.fonttype": "none",
    "text.parse_math": False,
}

# Control characters, marks that reverse the direction of text, lone surrogates, and what XML does not allow
_INVISIBLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\ufeff\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
_MARKDOWN = re.compile(r"[\\`*\[\]<>|~&$#]|(?<!\w)_|_(?!\w)")


@dataclass
class _Table:
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    bars: list[str] = field(default_factory=list)  # one for each row; only in the Markdown file
    bars_title: str = ""
    numbers: bool = True  # all columns but the first


@dataclass
class _Plot:
    view_box: str
    body: str  # of the <svg> element
    alt: str
    caption: str
    table: _Table  # the same in numbers


@dataclass
class _Example:
    row: int
    facts: str
    texts: list[tuple[str, str]]  # label, text


@dataclass
class _Section:
    title: str
    text: str = ""
    plot: _Plot | None = None
    tables: list[_Table] = field(default_factory=list)
    groups: list[tuple[str, list[_Example]]] = field(default_factory=list)
    note: str = ""


def check_report_tools() -> None:
    """
    Check that the packages of the report are installed, without importing them.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ImportError(
            'the report needs matplotlib: run `pip install "trl-ift[report]"`, or leave the report out with `--no_report`.'
        )


def write_report(
    folder: str | os.PathLike,
    scores: np.ndarray,
    selected: np.ndarray,
    num_tokens: np.ndarray,
    *,
    name: str = "learnability",
    dropped: Mapping[str, int],
    comparisons: Mapping[str, np.ndarray],
    row_text: Callable[[int], tuple[str, str]],
    settings: Mapping[str, Any],
    loss_initial: np.ndarray | None = None,
    loss_reference: np.ndarray | None = None,
    examples: int = 5,
) -> None:
    """
    Write `report.html` and `report.md`, which say what a selection has kept of a dataset.

    Both files stand alone: plots and styles are inside. Each is replaced in one step, after both have been computed. The same
    input gives the same bytes.

    Args:
        folder (`str` or `os.PathLike`):
            An existing folder.
        scores (`np.ndarray`):
            Score of each row, `(N,)`. A row whose score is not finite counts as dropped.
        selected (`np.ndarray`):
            Indices of the selected rows, `(k,)`, ascending.
        num_tokens (`np.ndarray`):
            Number of scored tokens of each row, `(N,)`.
        name (`str`, *optional*, defaults to `"learnability"`):
            What the score is called.
        dropped (`Mapping[str, int]`):
            Number of dropped rows by reason.
        comparisons (`Mapping[str, np.ndarray]`):
            Row indices of other selections, by name.
        row_text (`Callable[[int], tuple[str, str]]`):
            Returns prompt (may be empty) and completion of a row. Only called for the rows that are shown.
        settings (`Mapping[str, Any]`):
            Printed as a table, in this order.
        loss_initial (`np.ndarray`, *optional*):
            Mean loss of each row under the initial model in nats a token, `(N,)`.
        loss_reference (`np.ndarray`, *optional*):
            The same under the reference model.
        examples (`int`, *optional*, defaults to `5`):
            How many rows to show of each kind: highest scores, around the cut, lowest scores.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: An array has a wrong shape, or a row index is out of range, repeated or of a row without a score.
    """
    check_report_tools()
    facts = _Facts(scores, selected, num_tokens, loss_initial, loss_reference, name)
    sections = [
        _settings(settings),
        _rows(facts, dropped),
        _scores(facts),
        _length(facts),
        _losses(facts),
        _overlap(facts, comparisons),
        _examples(facts, row_text, examples),
    ]
    page = {
        "title": f"Data selection by {facts.name}",
        "headline": _headline(facts),
        "sections": [section for section in sections if section],
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
    # Escaped here, at the only exit, whatever an odd character came with
    contents = [_visible(environment.get_template(f"{file}.j2").render(page)).encode() for file in FILES]
    for file, content in zip(FILES, contents, strict=True):
        write_file(Path(folder) / file, content)


# ---------------------------------------------------------------- numbers


class _Facts:
    """The arrays, checked and cut down to the rows that have a score.

    Attributes:
        total: Number of all rows, N.
        rows: Indices of the rows with a finite score, `(n,)`, ascending. All arrays below are of these rows.
        scores, tokens: `(n,)` float64.
        chosen: Whether the row is selected, `(n,)` bool.
        initial, reference: Losses, `(n,)` float64, or `None`.
        token_share: Share of the scored tokens of all N rows that the selected ones have.
        best_first: Whether the selected rows are those with the highest (`True`) or the lowest (`False`) scores; `None` if
            neither.
        cut: The selected score nearest to those not selected; `None` if `best_first` is, or if nothing is selected.
        span: Lowest and highest score that the plots show.
    """

    def __init__(
        self,
        scores: np.ndarray,
        selected: np.ndarray,
        num_tokens: np.ndarray,
        loss_initial: np.ndarray | None,
        loss_reference: np.ndarray | None,
        name: str,
    ) -> None:
        self.name = _visible(" ".join(name.split()))  # also on the axes of plots, which take no odd characters
        scores = np.asarray(scores, dtype=np.float64)
        if scores.ndim != 1:
            raise ValueError(f"`scores` must have one dimension, found the shape {scores.shape}.")
        self.total = len(scores)
        arrays = {"num_tokens": num_tokens, "loss_initial": loss_initial, "loss_reference": loss_reference}
        for argument, array in arrays.items():
            if array is not None and np.shape(array) != scores.shape:
                raise ValueError(
                    f"`{argument}` must have the shape of `scores`, {scores.shape}; found {np.shape(array)}."
                )
        chosen = self.members(selected, "selected")
        if len(selected) > 1 and np.any(np.diff(selected) <= 0):
            raise ValueError("`selected` must be ascending, each row once.")
        finite = np.isfinite(scores)
        if np.any(chosen & ~finite):
            raise ValueError(f"row {np.flatnonzero(chosen & ~finite)[0]} is selected but has no finite score.")

        tokens = np.nan_to_num(np.asarray(num_tokens, dtype=np.float64))
        self.token_share = _ratio(tokens[chosen].sum(), tokens.sum())
        self.rows = np.flatnonzero(finite)
        self.scores, self.tokens, self.chosen = scores[finite], tokens[finite], chosen[finite]
        self.initial = None if loss_initial is None else np.asarray(loss_initial, dtype=np.float64)[finite]
        self.reference = None if loss_reference is None else np.asarray(loss_reference, dtype=np.float64)[finite]

        self.best_first: bool | None = None
        self.cut: float | None = None
        inside, outside = self.scores[self.chosen], self.scores[~self.chosen]
        if len(inside):
            if not len(outside) or inside.min() >= outside.max():
                self.best_first, self.cut = True, inside.min()
            elif inside.max() <= outside.min():
                self.best_first, self.cut = False, inside.max()
        self.span = _span(self.scores)

    @property
    def num_chosen(self) -> int:
        return int(self.chosen.sum())

    def members(self, indices: np.ndarray, argument: str) -> np.ndarray:
        """Return `(N,)` bool: whether a row is among `indices`."""
        indices = np.asarray(indices)
        if indices.ndim != 1 or (len(indices) and indices.dtype.kind not in "iu"):
            raise ValueError(f"`{argument}` must be a one-dimensional array of row indices.")
        wrong = indices[(indices < 0) | (indices >= self.total)]
        if len(wrong):
            raise ValueError(f"`{argument}` has the row {wrong[0]}, but the rows are 0 to {self.total - 1}.")
        found = np.zeros(self.total, dtype=bool)
        found[indices.astype(np.int64)] = True
        return found


def _spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    """Spearman's rank correlation of two arrays `(n,)`; ties have their average rank, pairs with NaN are left out.

    `None` if it is not defined: fewer than two pairs, or one side constant.
    """
    known = np.isfinite(x) & np.isfinite(y)
    a, b = _ranks(x[known]), _ranks(y[known])
    if not len(a):
        return None
    a -= a.mean()
    b -= b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(np.clip((a @ b) / scale, -1, 1)) if scale > 0 else None


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks of `x` `(n,)` from 0, equal values with their average rank."""
    order = np.argsort(x, kind="stable")
    ordered = x[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(x) else np.zeros(0, dtype=np.int64)
    ends = np.r_[starts[1:], len(x)]
    ranks = np.empty(len(x))
    ranks[order] = np.repeat((starts + ends - 1) / 2, ends - starts)
    return ranks


def _deciles(x: np.ndarray) -> list[np.ndarray]:
    """Masks `(n,)` of up to ten groups of about equal size by ascending `x`; equal values are in one group."""
    if not len(x):
        return []
    edges = np.unique(np.quantile(x, np.arange(1, 10) / 10, method="lower"))
    group = np.searchsorted(edges, x)
    masks = [group == i for i in range(len(edges) + 1)]
    return [mask for mask in masks if mask.any()]


def _span(x: np.ndarray) -> tuple[float, float]:
    """Limits of a plot of `x` `(n,)`: all of it but long tails."""
    if not len(x):
        return 0.0, 1.0
    low, high = float(x.min()), float(x.max())
    for share in (0.25, 0.05, 0.01):  # the wider ones where most values are equal
        first, last = np.quantile(x, [share, 1 - share])
        if last > first:
            low, high = max(low, first - 4 * (last - first)), min(high, last + 4 * (last - first))
            break
    size = max(abs(low), abs(high))
    if high - low <= 1e-9 * size or high == low:
        return low - max(0.5, 0.05 * size), high + max(0.5, 0.05 * size)
    return low, high


def _chance_overlap(n: int, k: int, inside: int, size: int, log_factorial: np.ndarray) -> tuple[float, float]:
    """Shared rows and Jaccard index that are expected of `k` random rows out of `n` and a set of `size` rows.

    Args:
        n: Number of rows that could be selected.
        k: Number of selected rows.
        inside: How many of the set are among the `n`.
        size: Number of rows of the set.
        log_factorial: `log(i!)` for `i` up to `n`.
    """
    shared = np.arange(max(0, k + inside - n), min(k, inside) + 1)
    log_p = -log_factorial[shared] - log_factorial[inside - shared]
    log_p -= log_factorial[k - shared] + log_factorial[n - inside - k + shared]
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    return k * inside / n, float(p @ (shared / (k + size - shared)))


def _sample(facts: _Facts) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the rows that a scatter plot shows: not selected, selected. Always the same ones."""
    rng = np.random.default_rng(0)
    drawn = []
    for mask, most in zip((~facts.chosen, facts.chosen), _POINTS, strict=True):
        rows = np.flatnonzero(mask)
        drawn.append(rows if len(rows) <= most else np.sort(rng.choice(rows, most, replace=False)))
    return drawn[0], drawn[1]


# ---------------------------------------------------------------- sections


def _headline(facts: _Facts) -> str:
    k, inside = facts.num_chosen, facts.scores[facts.chosen]
    if not k:
        return f"None of {facts.total:,} rows is selected."
    if facts.best_first is None:
        score = f"the selected {facts.name} is between {_number(inside.min())} and {_number(inside.max())}"
    elif facts.best_first:
        score = f"the lowest selected {facts.name} is {_number(inside.min())}"
    else:
        score = f"the highest selected {facts.name} is {_number(inside.max())}, and no lower one is left out"
    return (
        f"{k:,} of {facts.total:,} rows ({_percent(k / facts.total)}) {'is' if k == 1 else 'are'} selected: {score}. The "
        f"selection has {_percent(facts.token_share)} of all scored tokens."
    )


def _settings(settings: Mapping[str, Any]) -> _Section | None:
    rows: list[tuple[str, ...]] = [
        (str(key), f"{value:.6g}" if isinstance(value, float) else str(value)) for key, value in settings.items()
    ]
    return _Section("Settings", tables=[_Table(("Setting", "Value"), rows, numbers=False)]) if rows else None


def _rows(facts: _Facts, dropped: Mapping[str, int]) -> _Section:
    unexplained = facts.total - len(facts.rows) - sum(dropped.values())
    counts = {
        "all": facts.total,
        "with a score": len(facts.rows),
        **{f"dropped: {reason}": number for reason, number in dropped.items()},
        **({"dropped: no reason given": unexplained} if unexplained > 0 else {}),
        "selected": facts.num_chosen,
    }
    rows: list[tuple[str, ...]] = [
        (what, f"{number:,}", _percent(_ratio(number, facts.total))) for what, number in counts.items()
    ]
    none_dropped = "" if sum(dropped.values()) or unexplained > 0 else "No row was dropped."
    return _Section("Rows", tables=[_Table(("Rows", "Number", "Share"), rows)], note=none_dropped)


def _scores(facts: _Facts) -> _Section:
    low, high = facts.span
    scores, chosen = facts.scores, facts.chosen
    edges = np.linspace(low, high, _BINS + 1)
    every, picked = (np.histogram(x, _BINS, (low, high))[0] for x in (scores, scores[chosen]))
    below, above = (int(mask.sum()) for mask in (scores < low, scores > high))

    def draw(figure: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        axes = figure.subplots()
        axes.stairs(every, edges, fill=True, color=_PLAIN, label="all rows")
        axes.stairs(picked, edges, fill=True, color=_CHOSEN, label="selected")
        if facts.cut is not None and low <= facts.cut <= high:
            axes.axvline(facts.cut, color=_LINE, linestyle="--", linewidth=1.2, label=f"cut at {_number(facts.cut)}")
        axes.set(xlabel=facts.name, ylabel="rows", xlim=(low, high))
        axes.xaxis.set_major_locator(MaxNLocator(7))
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True, steps=(1, 2, 5, 10)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        _legend(figure)

    table = _Table((_capital(facts.name), "Rows", "Selected"), [], bars_title="█ selected, ░ not selected")
    step = _BINS // _TABLE_BINS
    counts = [
        (
            f"{_number(edges[i])} to {_number(edges[i + step])}",
            int(every[i : i + step].sum()),
            int(picked[i : i + step].sum()),
        )
        for i in range(0, _BINS, step)
    ]
    if below:
        counts.insert(0, (f"below {_number(low)}", below, int((chosen & (scores < low)).sum())))
    if above:
        counts.append((f"above {_number(high)}", above, int((chosen & (scores > high)).sum())))
    most = max(1, *(number for _, number, _ in counts))
    for label, number, number_picked in counts:
        table.rows.append((label, f"{number:,}", f"{number_picked:,}"))
        full = _blocks(number_picked / most)
        table.bars.append("█" * full + "░" * max(_blocks(number / most) - full, number > number_picked))

    cut = "" if facts.cut is None else f" The cut is at {_number(facts.cut)}."
    if facts.cut is not None and not low <= facts.cut <= high:
        cut = f" The cut, at {_number(facts.cut)}, is outside the plot."
    plot = _plot(
        "scores",
        draw,
        f"Histogram of {facts.name} of {len(scores):,} rows, with the selected rows in another colour.{cut}",
        f"How many rows have which {facts.name}.{cut}{_outside(below + above, len(scores))}",
        table,
    )
    values = [_quantiles(scores), _quantiles(scores[chosen])]
    names = ["min", *(f"{100 * q:g} %" for q in _QUANTILES[1:-1]), "max"]
    quantiles: list[tuple[str, ...]] = [
        (label, _number(a), _number(b)) for label, a, b in zip(names, *values, strict=True)
    ]
    return _Section(
        _capital(facts.name),
        plot=plot if len(scores) else None,
        tables=[_Table(("Quantile", "Rows with a score", "Selected"), quantiles)],
    )


def _length(facts: _Facts) -> _Section:
    scores, chosen = facts.scores, facts.chosen
    low, high = facts.span
    tokens = np.maximum(facts.tokens, 1)  # for a log axis
    medians, table = (
        [],
        _Table(
            ("Tokens", "Rows", "Selected", f"Median {facts.name}"),
            [],
            bars_title=f"from {_number(low)} to {_number(high)}",
        ),
    )
    for mask in _deciles(facts.tokens):
        median = float(np.median(scores[mask]))
        medians.append((float(np.median(tokens[mask])), median))
        table.rows.append((*_group(facts, facts.tokens, mask, ",.0f"), _number(median)))
        table.bars.append("█" * _blocks((median - low) / (high - low)))

    def draw(figure: Any) -> None:
        from matplotlib.ticker import LogLocator

        axes = figure.subplots()
        _scatter(axes, tokens, scores, facts)
        axes.plot(
            *zip(*medians, strict=True), "o-", color=_LINE, markersize=4, linewidth=1.5, label="median by decile"
        )
        axes.set(xscale="log", xlabel="scored tokens", ylabel=facts.name, ylim=_padded(low, high))
        least, most = tokens.min() / 1.2, tokens.max() * 1.2
        axes.set_xlim(least, most)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if most < 300 * least else (1,), numticks=12))
        axes.xaxis.set_major_formatter(lambda value, _: _number(value))
        axes.xaxis.set_minor_formatter(lambda value, _: "")
        _legend(figure)

    plot = None
    correlation = _spearman(scores, facts.tokens)
    if len(scores):
        outside = int(((scores < low) | (scores > high)).sum())
        plot = _plot(
            "length",
            draw,
            f"{_capital(facts.name)} against the number of scored tokens, with the median of each tenth of the lengths. "
            f"Spearman's rank correlation is {_fixed(correlation)}.",
            f"{_capital(facts.name)} and length, {_drawn(facts)}. The line joins the medians of groups by "
            f"length.{_outside(outside, len(scores))}",
            table,
        )
    measures: list[tuple[str, ...]] = [
        (f"Spearman's rank correlation of {facts.name} and length", _fixed(correlation))
    ]
    if facts.initial is not None and facts.reference is not None:
        gain = (facts.initial - facts.reference) * facts.tokens
        label = "the same for (initial loss - reference loss) × tokens, the gain that is not normalised"
        measures.append((label, _fixed(_spearman(gain, facts.tokens))))
    measures += [
        ("median length of the selected rows", _number(_median(facts.tokens[chosen]))),
        ("median length of the rows with a score", _number(_median(facts.tokens))),
        ("share of all scored tokens that the selection has", _percent(facts.token_share)),
    ]
    return _Section("Length", plot=plot, tables=[_Table(("Measure", "Value"), measures)])


def _losses(facts: _Facts) -> _Section | None:
    initial, reference, chosen = facts.initial, facts.reference, facts.chosen
    known = [(label, loss) for label, loss in (("initial", initial), ("reference", reference)) if loss is not None]
    if not known or not len(facts.rows):
        return None
    table = _Table(("Measure", "Rows with a score", "Selected"), [])
    for label, loss in known:
        table.rows.append((f"median {label} loss", _number(_median(loss)), _number(_median(loss[chosen]))))
    note = ""
    finite = np.zeros(0) if initial is None else initial[np.isfinite(initial)]
    if initial is not None and len(finite):
        high = np.quantile(finite, 0.95)
        above = initial > high
        table.rows.append(
            (
                f"share with an initial loss above {_number(high)}, its 95th percentile",
                _percent(_ratio(above.sum(), len(above))),
                _percent(_ratio(above[chosen].sum(), chosen.sum())),
            )
        )
    if initial is not None and reference is not None:
        note = (
            "If far more than 5 % of the selected rows are above the 95th percentile, look at them: a reference model that "
            "was trained too long has learned noise by heart, and noise then looks learnable."
        )
    plot = None
    if initial is not None and reference is not None:
        plot = _loss_plot(facts, initial, reference)
    return _Section("Losses", text="Mean loss of a row, in nats a token.", plot=plot, tables=[table], note=note)


def _loss_plot(facts: _Facts, initial: np.ndarray, reference: np.ndarray) -> _Plot | None:
    known = np.isfinite(initial) & np.isfinite(reference)
    if not known.any():
        return None
    spans = [_span(initial[known]), _span(reference[known])]
    low, high = min(span[0] for span in spans), max(span[1] for span in spans)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        limits = _padded(low, high)
        _scatter(axes, initial, reference, facts)
        axes.plot(limits, limits, "--", color=_LINE, linewidth=1.2, label="equal losses")
        axes.set(xlabel="initial loss", ylabel="reference loss", xlim=limits, ylim=limits)
        _legend(figure)

    table = _Table(
        ("Initial loss", "Rows", "Selected", "Median reference loss"),
        [],
        bars_title="share of the rows that is selected",
    )
    values = initial[known]
    for mask in _deciles(values):
        rows = np.flatnonzero(known)[mask]
        median = _number(np.median(reference[rows]))
        table.rows.append((*_group(facts, initial, rows, ".3g"), median))
        table.bars.append("█" * _blocks(facts.chosen[rows].mean()))
    outside = known & ((np.minimum(initial, reference) < low) | (np.maximum(initial, reference) > high))
    return _plot(
        "losses",
        draw,
        "Loss under the reference model against loss under the initial model, with the selected rows in another colour.",
        f"Loss under both models, {_drawn(facts)}. Below the line the reference model is better."
        f"{_outside(int(outside.sum()), len(initial))}",
        table,
    )


def _overlap(facts: _Facts, comparisons: Mapping[str, np.ndarray]) -> _Section | None:
    if not comparisons:
        return None
    n, k = len(facts.rows), facts.num_chosen
    log_factorial = np.r_[0.0, np.cumsum(np.log(np.arange(1, n + 1)))]
    table = _Table(("Selection", "Rows", "Shared", "Shared by chance", "Jaccard index", "Jaccard by chance"), [])
    for other, indices in comparisons.items():
        members = facts.members(indices, f"comparisons[{other!r}]")
        size, inside = int(members.sum()), int(members[facts.rows].sum())
        shared = int(members[facts.rows[facts.chosen]].sum())
        expected, by_chance = None, None
        if n and k + size:
            expected, by_chance = _chance_overlap(n, k, inside, size, log_factorial)
        jaccard = _ratio(shared, k + size - shared)
        chance = "-" if expected is None else f"{expected:,.1f}"
        table.rows.append((other, f"{size:,}", f"{shared:,}", chance, _fixed(jaccard), _fixed(by_chance)))
    return _Section(
        "Overlap with other selections",
        tables=[table],
        note="Jaccard index: shared rows over the rows that are in either selection. By chance: expected if as many rows with "
        "a score had been selected at random.",
    )


def _examples(facts: _Facts, row_text: Callable[[int], tuple[str, str]], number: int) -> _Section | None:
    if number < 1 or not len(facts.rows):
        return None
    order = np.argsort(-facts.scores, kind="stable")
    chosen = order[facts.chosen[order]]
    others = order[~facts.chosen[order]]
    inside, outside = (number + 1) // 2, number // 2
    if facts.best_first is False:
        middle = [*others[len(others) - outside :][:outside], *chosen[:inside]]
    else:
        middle = [*chosen[max(0, len(chosen) - inside) :], *others[:outside]]
    around = "Around the cut" if facts.cut is not None else "Lowest selected and highest not selected"
    wanted = {
        f"Highest {facts.name}": order[:number],
        around: np.array(middle if len(chosen) else [], dtype=np.int64),
        f"Lowest {facts.name}": order[-number:],
    }
    shown: set[int] = set()
    groups = []
    for title, positions in wanted.items():
        new = [int(i) for i in positions if int(i) not in shown]
        shown.update(new)
        if new:
            groups.append((title, [_example(facts, i, *row_text(int(facts.rows[i]))) for i in new]))
    return _Section("Examples", text="Long texts are shortened. No row is shown twice.", groups=groups)


def _example(facts: _Facts, i: int, prompt: str, completion: str) -> _Example:
    parts = ["selected" if facts.chosen[i] else "not selected", f"{facts.name} {_number(facts.scores[i])}"]
    losses = (("initial loss", facts.initial), ("reference loss", facts.reference))
    parts += [f"{label} {_number(loss[i])}" for label, loss in losses if loss is not None]
    parts.append(f"{facts.tokens[i]:,.0f} {'token' if facts.tokens[i] == 1 else 'tokens'}")
    texts = (
        [("Prompt", _shorten(prompt)), ("Completion", _shorten(completion))]
        if prompt
        else [("Text", _shorten(completion))]
    )
    return _Example(int(facts.rows[i]), ", ".join(parts), texts)


def _group(facts: _Facts, values: np.ndarray, rows: np.ndarray, form: str) -> tuple[str, str, str]:
    """Range of `values`, number of rows and selected rows of a group, as cells."""
    low, high = values[rows].min(), values[rows].max()
    label = f"{low:{form}}" if f"{low:{form}}" == f"{high:{form}}" else f"{low:{form}} to {high:{form}}"
    chosen = facts.chosen[rows]
    return label, f"{len(chosen):,}", f"{int(chosen.sum()):,} ({_percent(chosen.mean())})"


# ---------------------------------------------------------------- plots


def _plot(name: str, draw: Callable[[Any], None], alt: str, caption: str, table: _Table) -> _Plot:
    """Draw a figure and return it as SVG without anything that changes from run to run."""
    from matplotlib import style
    from matplotlib.figure import Figure

    # "default" shuts out the user's matplotlibrc
    with style.context(["default", {**_STYLE, "svg.hashsalt": name}]):
        figure = Figure(figsize=(5, 3.4), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    match = re.search(r'<svg[^>]* viewBox="([^"]*)"[^>]*>(.*)</svg>', buffer.getvalue(), re.DOTALL)
    assert match is not None
    body = re.sub(r"<!--.*?-->\s*", "", match[2], flags=re.DOTALL)
    # The plots share a page: no two elements of it may have the same id
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", body)
    return _Plot(match[1], body, alt, caption, table)


def _scatter(axes: Any, x: np.ndarray, y: np.ndarray, facts: _Facts) -> None:
    for rows, color, label in zip(_sample(facts), (_PLAIN, _CHOSEN), ("not selected", "selected"), strict=True):
        if len(rows):
            axes.plot(x[rows], y[rows], "o", color=color, alpha=0.55, markersize=2.5, markeredgewidth=0, label=label)


def _legend(figure: Any) -> None:
    """Put a legend above the plot, in which the points are large enough for their colours to be told apart."""
    legend = figure.legend(loc="outside upper center", ncols=3, frameon=False, columnspacing=1.2)
    for handle in legend.legend_handles:
        if handle.get_label() in ("not selected", "selected") and hasattr(handle, "set_markersize"):
            handle.set(markersize=6, alpha=1)


def _drawn(facts: _Facts) -> str:
    """How many rows the points of a scatter plot stand for."""
    totals = len(facts.rows) - facts.num_chosen, facts.num_chosen
    parts = [
        f"all {total:,} {label}" if len(rows) == total else f"{len(rows):,} of the {total:,} {label}"
        for rows, total, label in zip(_sample(facts), totals, ("not selected", "selected"), strict=True)
        if total
    ]
    return f"one point a row ({' and '.join(parts)})"


def _padded(low: float, high: float) -> tuple[float, float]:
    return low - 0.03 * (high - low), high + 0.03 * (high - low)


def _outside(number: int, total: int) -> str:
    if not number:
        return ""
    return f" {number:,} {'row' if number == 1 else 'rows'} ({_percent(number / total)}) lie outside the plot."


def _blocks(share: float) -> int:
    """Length of a bar: something for all that is not zero."""
    return int(np.ceil(np.clip(share, 0, 1) * _BAR - 1e-9))


# ---------------------------------------------------------------- text


def _number(value: float | None) -> str:
    """Four digits; thousands and millions in full."""
    if value is None or np.isnan(value):
        return "-"
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e7 else f"{value + 0.0:.4g}"


def _fixed(value: float | None) -> str:
    return "-" if value is None else f"{round(value, 3) + 0.0:.3f}"


def _percent(value: float | None) -> str:
    if value is None:
        return "-"
    return "> 99.9 %" if 0.9995 <= value < 1 else f"{100 * value:.3g} %"


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def _median(x: np.ndarray) -> float | None:
    x = x[np.isfinite(x)]
    return float(np.median(x)) if len(x) else None


def _quantiles(x: np.ndarray) -> list[float | None]:
    return [float(value) for value in np.quantile(x, _QUANTILES)] if len(x) else [None] * len(_QUANTILES)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _shorten(text: str) -> str:
    left_out = len(text) - _HEAD - _TAIL
    if left_out > 50:
        text = f"{text[:_HEAD]}\n[... {left_out:,} characters ...]\n{text[-_TAIL:]}"
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _visible(text: str) -> str:
    """Return `text` with a `\\u` escape for each character that a reader could not see or a file could not hold."""
    return _INVISIBLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _markdown(text: Any) -> str:
    """Return `text` for a line or a table cell of Markdown, where it is shown as it is."""
    return _MARKDOWN.sub(r"\\\g<0>", " ".join(str(text).splitlines()))


def _fenced(text: str) -> str:
    """Return `text` as a fenced block that nothing in it can close."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"
