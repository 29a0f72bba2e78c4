"""The report of a data selection: its numbers, its two formats, hostile texts, and inputs at the edge."""

import itertools
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from trl_ift.data import report
from trl_ift.data.report import check_report_tools, write_report


N, K = 400, 40
MEASURES = "Spearman's rank correlation of learnability and length"
GAIN = "the same for (initial loss - reference loss) × tokens, the gain that is not normalised"


def top(scores, k):
    return np.sort(np.argsort(-np.nan_to_num(scores, nan=-np.inf), kind="stable")[:k])


def inputs(n=N, k=K, seed=0, **changes):
    """Arguments of `write_report` for `n` rows, five of them dropped; texts are `prompt 7` and `completion 7`."""
    rng = np.random.default_rng(seed)
    initial = rng.gamma(3, 0.5, n)
    reference = initial * rng.lognormal(-0.3, 0.5, n)
    tokens = rng.integers(1, 60, n)  # many ties
    scores = np.round(1 - reference / initial, 2)  # ties here too
    dropped = rng.choice(n, 5, replace=False)
    scores[dropped], tokens[dropped[:3]], initial[dropped[3:]] = np.nan, 0, np.nan
    given = {
        "scores": scores,
        "selected": top(scores, k),
        "num_tokens": tokens,
        "dropped": {"no scored token": 3, "loss is not finite": 2},
        "comparisons": {"random": np.sort(rng.choice(n, k, replace=False)), "longest": top(tokens.astype(float), k)},
        "row_text": lambda i: (f"prompt {i}", f"completion {i}"),
        "settings": {"model": "org/base", "fraction": 0.1},
        "loss_initial": initial,
        "loss_reference": reference,
    }
    return given | changes


def few(scores, selected, tokens=None, **changes):
    """Arguments for a handful of rows with these scores, without losses and comparisons."""
    scores = np.array(scores, dtype=float)
    tokens = np.arange(1, len(scores) + 1) if tokens is None else np.array(tokens)
    missing = {"not finite": int((~np.isfinite(scores)).sum())} if not np.isfinite(scores).all() else {}
    given = {"scores": scores, "selected": np.array(selected, dtype=int), "num_tokens": tokens, "dropped": missing}
    return inputs(10, 2) | given | {"comparisons": {}, "loss_initial": None, "loss_reference": None} | changes


class Page(HTMLParser):
    """Reads a page strictly: tags are balanced, ids unique; collects tables, texts and attributes."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.tags = [], [], []
        self.sections, self.title, self.pres, self.headline = {}, None, [], ""
        self.feed(text)
        self.close()
        assert self.open == []
        ids = [value for _, name, value in self.attributes if name == "id"]
        assert len(ids) == len(set(ids))
        self.ids = set(ids)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag in self.VOID:
            return
        self.open.append(tag)
        if tag == "h2":
            self.title = ""
        elif tag == "table":
            self.sections.setdefault(self.title, []).append([])
        elif tag == "tr":
            self.sections[self.title][-1].append([])
        elif tag in ("td", "th"):
            if tag == "th":
                assert dict(attrs)["scope"] == ("col" if "thead" in self.open else "row")
            self.sections[self.title][-1][-1].append("")
        elif tag == "pre":
            self.pres.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open:
            return
        if self.open[-1] == "h2":
            self.title += data
        elif self.open[-1] in ("td", "th"):
            self.sections[self.title][-1][-1][-1] += data
        elif "pre" in self.open:
            self.pres[-1] += data
        elif self.open[-1] == "p" and not self.headline:
            self.headline = data

    def values(self, title, table=-1):
        """Rows of a table of a section as {first cell: other cells}."""
        return {row[0]: row[1:] for row in self.sections[title][table][1:]}


def markdown_tables(text):
    """Tables by section of a Markdown file, without fenced blocks; cells unescaped."""
    sections, title, rows, fence = {}, None, None, None
    for line in text.splitlines():
        run = re.match(r"`{3,}", line)
        if fence is None and run:
            fence = run[0]
        elif fence is not None:
            fence = None if line.rstrip() == fence else fence
        elif line.startswith("## "):
            title = line[3:]
        elif line.startswith("|"):
            if rows is None:
                rows = []
                sections.setdefault(title, []).append(rows)
            assert line.endswith(" |")
            cells = re.split(r"(?<!\\)\|", line[1:-1])
            if not set(line) <= set("|-: "):
                rows.append([re.sub(r"\\(.)", r"\1", cell.strip()) for cell in cells])
            else:
                assert len(rows) == 1
                assert len(cells) == len(rows[0])
        else:
            rows = None
    assert fence is None
    return sections


def written(folder, given):
    """Write the report; return the page and the Markdown."""
    write_report(folder, **given)
    assert sorted(os.listdir(folder)) == ["report.html", "report.md"]
    html, markdown = ((folder / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    return Page(html), markdown


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    given = inputs()
    return (given, *written(tmp_path_factory.mktemp("usual"), given))


# ---------------------------------------------------------------- numbers


def quantile(values, q):
    values = sorted(values)
    place = q * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def spearman(x, y):
    """From the definition: the rank is how many are smaller, plus half of those that are equal."""
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if np.isfinite(a) and np.isfinite(b)]
    ranks = []
    for side in zip(*pairs, strict=True):
        ranks.append(
            [sum(other < value for other in side) + sum(other == value for other in side) / 2 for value in side]
        )
    return np.corrcoef(*ranks)[0, 1]


def test_headline_and_counts(usual):
    given, page, markdown = usual
    lowest = min(given["scores"][i] for i in given["selected"])
    share = sum(given["num_tokens"][i] for i in given["selected"]) / sum(given["num_tokens"])
    assert page.headline == (
        f"40 of 400 rows (10 %) are selected: the lowest selected learnability is {lowest:.4g}. The selection has "
        f"{100 * share:.3g} % of all scored tokens."
    )
    assert markdown.splitlines()[2] == page.headline
    assert page.values("Rows") == {
        "all": ["400", "100 %"],
        "with a score": ["395", "98.8 %"],
        "dropped: no scored token": ["3", "0.75 %"],
        "dropped: loss is not finite": ["2", "0.5 %"],
        "selected": ["40", "10 %"],
    }
    assert page.values("Settings") == {"model": ["org/base"], "fraction": ["0.1"]}


def test_quantiles(usual):
    given, page, _ = usual
    every = [score for score in given["scores"] if not np.isnan(score)]
    picked = [given["scores"][i] for i in given["selected"]]
    names = {
        "min": 0,
        "1 %": 0.01,
        "5 %": 0.05,
        "25 %": 0.25,
        "50 %": 0.5,
        "75 %": 0.75,
        "95 %": 0.95,
        "99 %": 0.99,
        "max": 1,
    }
    found = page.values("Learnability")
    assert list(found) == list(names)
    for name, q in names.items():
        assert [float(value) for value in found[name]] == pytest.approx(
            [quantile(every, q), quantile(picked, q)], rel=1e-3
        )


def test_histogram_counts_every_row_once(usual):
    given, page, markdown = usual
    scores = given["scores"][np.isfinite(given["scores"])]
    rows = page.values("Learnability", 0)
    assert sum(int(number) for number, _ in rows.values()) == len(scores)
    assert sum(int(number) for _, number in rows.values()) == K
    for label, (number, picked) in rows.items():
        if "to" not in label:
            continue
        low, high = map(float, label.split(" to "))
        tolerance = 2e-3
        assert ((scores > low + tolerance) & (scores < high - tolerance)).sum() <= int(number)
        assert int(number) <= ((scores >= low - tolerance) & (scores <= high + tolerance)).sum()
        assert int(picked) <= int(number)
    bars = [row[-1] for row in markdown_tables(markdown)["Learnability"][0][1:]]
    most = max(int(number) for number, _ in rows.values())
    for bar, (number, picked) in zip(bars, rows.values(), strict=True):
        assert set(bar) <= set("█░")
        assert len(bar) == pytest.approx(24 * int(number) / most, abs=2)
        assert bar.count("█") == pytest.approx(24 * int(picked) / most, abs=1)
        assert (bar == "") == (int(number) == 0)


def test_length(usual):
    given, page, _ = usual
    scores, tokens = given["scores"], given["num_tokens"].astype(float)
    known = np.isfinite(scores)
    gain = (given["loss_initial"] - given["loss_reference"]) * tokens
    found = page.values("Length")
    assert float(found[MEASURES][0]) == pytest.approx(spearman(scores, tokens), abs=6e-4)
    assert float(found[GAIN][0]) == pytest.approx(spearman(gain[known], tokens[known]), abs=6e-4)
    assert abs(float(found[GAIN][0])) > 0.1  # else the line above proves little
    assert found["median length of the selected rows"] == [f"{quantile(tokens[given['selected']], 0.5):.4g}"]
    assert found["median length of the rows with a score"] == [f"{quantile(tokens[known], 0.5):.4g}"]


def test_deciles_of_length(usual):
    given, page, _ = usual
    known = np.isfinite(given["scores"])
    scores, tokens = given["scores"][known], given["num_tokens"][known]
    picked = np.isin(np.flatnonzero(known), given["selected"])
    groups = page.values("Length", 0)
    assert len(groups) == 10
    seen, last = 0, 0
    for label, (number, selected, median) in groups.items():
        low, *high = map(int, label.split(" to "))
        inside = (tokens >= low) & (tokens <= (high or [low])[0])
        assert last < low
        last = (high or [low])[0]
        assert int(number) == inside.sum()  # so equal lengths are in one group
        assert int(selected.split()[0]) == picked[inside].sum()
        assert float(median) == pytest.approx(quantile(scores[inside], 0.5), rel=1e-3, abs=1e-9)
        assert 20 <= int(number) <= 60
        seen += int(number)
    assert seen == len(scores)


def test_deciles():
    rows = np.random.default_rng(0).permutation(100)
    assert [sorted(rows[mask]) for mask in report._deciles(rows)] == [
        list(range(i, i + 10)) for i in range(0, 100, 10)
    ]
    assert [mask.tolist() for mask in report._deciles(np.array([3.0, 3.0, 3.0]))] == [[True] * 3]
    assert report._deciles(np.zeros(0)) == []


def test_losses(usual):
    given, page, _ = usual
    known = np.isfinite(given["scores"])
    initial, picked = given["loss_initial"], given["selected"]
    high = quantile(initial[known & np.isfinite(initial)], 0.95)
    found = page.values("Losses")
    every, share = found[f"share with an initial loss above {high:.4g}, its 95th percentile"]
    assert share == f"{100 * (initial[picked] > high).mean():.3g} %"
    assert float(every.split()[0]) == pytest.approx(5, abs=0.2)
    assert [float(x) for x in found["median reference loss"]] == pytest.approx(
        [quantile(given["loss_reference"][rows], 0.5) for rows in (known, picked)], rel=1e-3
    )
    groups = page.values("Losses", 0)
    assert sum(int(number) for number, *_ in groups.values()) == known.sum()
    assert sum(int(selected.split()[0]) for _, selected, _ in groups.values()) == K


@pytest.mark.parametrize(("number", "expected"), [(20, ["5.06 %", "100 %"]), (21, ["0 %", "0 %"])])
def test_memorised_noise_shows(tmp_path, number, expected):
    """Rows of a high initial loss that the reference knows by heart are selected: the share says so.

    Of 395 rows, 21 equal ones reach down to the 95th percentile: they are at it, not above.
    """
    given = inputs()
    noisy = np.flatnonzero(np.isfinite(given["scores"]))[:number]
    given["loss_initial"][noisy], given["loss_reference"][noisy], given["scores"][noisy] = 9.0, 0.1, 0.99
    page, _ = written(tmp_path, given | {"selected": top(given["scores"], number)})
    (shares,) = [value for name, value in page.values("Losses").items() if "95th" in name]
    assert shares == expected


def test_overlap(usual):
    given, page, _ = usual
    known = np.isfinite(given["scores"])
    for name, rows in given["comparisons"].items():
        size, shared, chance, jaccard, _ = page.values("Overlap with other selections")[name]
        both = set(rows.tolist()) & set(given["selected"].tolist())
        assert int(size) == K
        assert int(shared) == len(both)
        assert float(jaccard) == pytest.approx(len(both) / (2 * K - len(both)), abs=6e-4)
        assert float(chance) == pytest.approx(K * known[rows].sum() / known.sum(), abs=0.06)


@pytest.mark.parametrize("other", [[0, 1, 2], [3, 6], [6], [0, 1, 2, 3, 4, 5, 6], []])
def test_chance_overlap_is_the_mean_over_all_selections(tmp_path, other):
    """Six rows have a score (the last has none) and two are selected: fifteen selections in all."""
    given = few([0.9, 0.8, 0.5, 0.4, 0.3, 0.2, np.nan], [0, 1], comparisons={"other": np.array(other, dtype=int)})
    page, _ = written(tmp_path, given)
    subsets = [set(pair) for pair in itertools.combinations(range(6), 2)]
    shared = np.mean([len(pair & set(other)) for pair in subsets])
    jaccard = np.mean([len(pair & set(other)) / len(pair | set(other)) for pair in subsets])
    _, _, found, _, found_jaccard = page.values("Overlap with other selections")["other"]
    assert (found, found_jaccard) == (f"{shared:,.1f}", f"{jaccard:.3f}")


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([1, 2, 3], [10, 20, 30], 1),
        ([1, 2, 3], [3, 2, 1], -1),
        ([1, 2, np.nan, 3], [3, 2, 9, 1], -1),
        ([1, 1, 2, 2], [1, 2, 1, 2], 0),
        ([1, 2, 2, 3], [1, 3, 2, 4], 0.9486832980505138),
        ([1, 1, 1], [1, 2, 3], None),
        ([1], [1], None),
        ([], [], None),
        ([np.nan, np.nan], [1, 2], None),
    ],
)
def test_spearman(x, y, expected):
    assert report._spearman(np.array(x, dtype=float), np.array(y, dtype=float)) == pytest.approx(expected)


# ---------------------------------------------------------------- examples


def shown(markdown):
    """Rows of the examples by group."""
    groups = {}
    for line in markdown.splitlines():
        if line.startswith("### "):
            title = line[4:]
        elif found := re.match(r"\*\*Row (\d+)\*\*: (selected|not selected), ", line):
            groups.setdefault(title, []).append((int(found[1]), found[2] == "selected"))
    return groups


def test_examples_are_top_cut_and_bottom(usual):
    given, page, markdown = usual
    order = [int(i) for i in np.argsort(-given["scores"], kind="stable") if np.isfinite(given["scores"][i])]
    expected = {
        "Highest learnability": [(i, True) for i in order[:5]],
        "Around the cut": [(i, True) for i in order[K - 3 : K]] + [(i, False) for i in order[K : K + 2]],
        "Lowest learnability": [(i, False) for i in order[-5:]],
    }
    assert shown(markdown) == expected
    rows = [i for group in expected.values() for i, _ in group]
    assert page.pres == [f"\n{kind} {i}" for i in rows for kind in ("prompt", "completion")]
    first = rows[0]
    assert (
        f"**Row {first}**: selected, learnability {given['scores'][first]:.4g}, initial loss "
        f"{given['loss_initial'][first]:.4g}, reference loss {given['loss_reference'][first]:.4g}, "
        f"{given['num_tokens'][first]} tokens\n"
    ) in markdown


def test_only_the_texts_that_are_shown_are_read(tmp_path):
    calls = []

    def row_text(i):
        assert type(i) is int
        calls.append(i)
        return "", str(i)

    write_report(tmp_path, **inputs(row_text=row_text, examples=2))
    assert len(calls) == len(set(calls)) == 6
    calls.clear()
    _, markdown = written(tmp_path, inputs(row_text=row_text, examples=0))
    assert calls == []
    assert "## Examples" not in markdown


def test_a_selection_of_the_lowest_scores(tmp_path):
    page, markdown = written(tmp_path, few([5, 1, 4, 2, 3], [1, 3], name="perplexity", examples=2))
    assert page.headline.startswith(
        "2 of 5 rows (40 %) are selected: the highest selected perplexity is 2, and no lower"
    )
    assert shown(markdown)["Lowest perplexity"] == [(1, True)]
    assert shown(markdown)["Around the cut"] == [(4, False), (3, True)]


def test_a_selection_of_other_than_extreme_scores(tmp_path):
    page, markdown = written(tmp_path, few([5, 1, 4, 2, 3], [2, 3], examples=1))
    assert "the selected learnability is between 2 and 4" in page.headline
    assert "cut" not in markdown
    assert shown(markdown)["Lowest selected and highest not selected"] == [(3, True)]


# ---------------------------------------------------------------- the two formats


def test_both_files_say_the_same(usual):
    _, page, markdown = usual
    tables = markdown_tables(markdown)
    assert list(tables) == list(page.sections)
    for title, found in tables.items():
        with_bars = title in ("Learnability", "Length", "Losses")
        for i, table in enumerate(found):
            stripped = [row[:-1] for row in table] if with_bars and i == 0 else table
            assert stripped == page.sections[title][i]


def test_page_stands_alone(usual):
    _, page, _ = usual
    used = 0
    for tag, name, value in page.attributes:
        assert name not in ("src", "srcset", "action", "data", "onload", "onclick"), tag
        if name.endswith("href"):
            assert value.startswith("#")
            assert value[1:] in page.ids
            used += 1
        for target in re.findall(r"url\(([^)]*)\)", value or ""):
            assert target.startswith("#")
            assert target[1:] in page.ids
            used += 1
    assert used > 100
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)


def test_no_address_and_no_local_path(tmp_path):
    write_report(tmp_path, **inputs())
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "://" not in text
        assert "@import" not in text
        assert str(tmp_path) not in text
        assert str(Path(report.__file__).parent) not in text


def test_plots_have_a_description(usual):
    _, page, _ = usual
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert len(labels) == page.tags.count("svg") == 3
    assert labels[0].startswith("Histogram of learnability of 395 rows")
    assert ("html", "lang", "en") in page.attributes


def test_scatter_plots_stay_small(tmp_path):
    given = inputs(30_000, 3_000)
    page, markdown = written(tmp_path, given)
    assert 2 * 1500 <= page.tags.count("use") <= 2 * 1500 + 150
    assert (tmp_path / "report.html").stat().st_size < 600_000
    assert "(1,000 of the 26,995 not selected and 500 of the 3,000 selected)" in markdown


def test_long_tails_are_outside_the_plots_only(tmp_path):
    given = inputs()
    rows = np.flatnonzero(np.isfinite(given["scores"]) & ~np.isin(np.arange(N), given["selected"]))[:7]
    given["scores"][rows] = -1e6
    page, markdown = written(tmp_path, given)
    assert page.values("Learnability")["min"][0] == "-1,000,000"
    histogram = page.values("Learnability", 0)
    (below,) = [numbers for label, numbers in histogram.items() if label.startswith("below")]
    assert int(below[0]) >= 7
    assert f"{below[0]} rows ({100 * int(below[0]) / 395:.3g} %) lie outside the plot" in markdown
    widest = [label for label in histogram if " to " in label]
    assert float(widest[0].split(" to ")[0]) > -100


# ---------------------------------------------------------------- hostile texts

HOSTILE = [
    "<script>alert(1)</script><img src=http://example.com/x onerror=alert(1)>",
    "</pre></main><h2>Rows</h2> & &amp; &lt;b&gt; \" ' {{ 7 * 7 }} {% raw %}",
    "```\n# heading\n```",
    "`````` and ```\n~~~\n``````\n| a | b |",
    "a\x00b\x1bc\x7f\x85\ud800\udfff\u202ed\uffff",
    "a\r\nb\rc\td",
    "$x$ **b** [a](http://example.com)",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_of_the_dataset_are_shown_as_they_are(tmp_path, text):
    page, markdown = written(tmp_path, few([0.5], [0], row_text=lambda i: (text, "the end")))
    plain = text.replace("\r\n", "\n").replace("\r", "\n")
    plain = re.sub(r"[^\n\t -~]", lambda match: f"\\u{ord(match[0]):04x}", plain)
    assert page.pres == [f"\n{plain}", "\nthe end"]
    assert page.tags.count("h2") == len(page.sections) + 1  # the examples have no table
    assert not {"script", "img"} & set(page.tags)
    assert fenced(markdown) == [plain, "the end"]
    assert list(markdown_tables(markdown)) == list(page.sections)


def fenced(markdown):
    """Contents of the fenced blocks, as CommonMark reads them."""
    blocks, fence = [], None
    for line in markdown.split("\n"):
        if fence is None and (found := re.match(r"(`{3,})[^`]*$", line)):
            fence, block = found[1], []
        elif fence is not None and re.fullmatch(rf" {{0,3}}`{{{len(fence)},}}\s*", line):
            blocks.append("\n".join(block))
            fence = None
        elif fence is not None:
            block.append(line)
    assert fence is None
    return blocks


@pytest.mark.parametrize("text", HOSTILE)
def test_names_and_settings_are_shown_as_they_are(tmp_path, text):
    given = inputs(
        60, 6, name=text, settings={text: text}, dropped={text: 5}, comparisons={text: np.array([0])}, examples=1
    )
    page, markdown = written(tmp_path, given)
    assert not {"script", "img"} & set(page.tags)
    assert len(page.values("Settings")) == 1
    tables = markdown_tables(markdown)
    assert len(tables) == 6
    assert len(tables["Settings"][0]) == 2
    assert len(tables["Rows"][0]) == 5
    assert "<" not in re.sub(r"\\<", "", markdown)
    if text.isprintable():
        assert page.values("Settings") == {text: [text]}
        assert tables["Settings"][0][1] == [text, text]


def test_markdown_renders(tmp_path):
    """A parser of CommonMark with tables sees the texts in code blocks, and no HTML."""
    markdown_it = pytest.importorskip("markdown_it")
    texts = dict(enumerate(HOSTILE))
    given = few(
        np.linspace(1, 0.1, len(texts)), [0, 1], row_text=lambda i: (texts[i], "x"), settings={"a|b": "<b>|`c`_d_"}
    )
    _, markdown = written(tmp_path, given)
    tokens = markdown_it.MarkdownIt("commonmark").enable("table").parse(markdown)
    blocks = [token.content for token in tokens if token.type == "fence"]
    assert len(blocks) == 2 * len(texts)
    assert blocks[0] == HOSTILE[0] + "\n"
    assert not [token for token in tokens if token.type == "html_block"]
    inline = [child for token in tokens for child in token.children or []]
    assert {child.type for child in inline} <= {"text", "text_special", "strong_open", "strong_close", "softbreak"}
    cells = [token.content for token in tokens if token.type == "inline"]
    assert r"\<b\>|\`c\`\_d\_" in cells
    assert sum(token.type == "table_open" for token in tokens) == 6


def test_long_texts_are_shortened(tmp_path):
    page, markdown = written(tmp_path, few([0.5], [0], row_text=lambda i: ("", "a" * 400 + "b" * 10**6 + "c" * 150)))
    expected = "a" * 400 + "\n[... 1,000,000 characters ...]\n" + "c" * 150
    assert page.pres == [f"\n{expected}"]
    assert fenced(markdown) == [expected]
    assert "\nText:\n" in markdown
    assert "Prompt" not in markdown


# ---------------------------------------------------------------- writing


def test_same_bytes_in_another_process_with_other_settings(tmp_path):
    """Neither the time, the hash seed nor the user's own style of plots shows."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    write_report(here, **inputs())
    (tmp_path / "matplotlibrc").write_text("font.size: 21\nsvg.fonttype: path\naxes.grid: True\n")
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from test_selection_report import inputs\nfrom trl_ift.data.report import write_report\n"
        f"write_report({str(there)!r}, **inputs())"
    )
    environment = os.environ | {
        "PYTHONHASHSEED": "7",
        "MATPLOTLIBRC": str(tmp_path / "matplotlibrc"),
        "SOURCE_DATE_EPOCH": "1",
    }
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=Path(__file__).parent.parent)
    for name in ("report.html", "report.md"):
        assert (here / name).read_bytes() == (there / name).read_bytes()


def test_input_and_style_are_left_alone(tmp_path):
    import matplotlib

    given = inputs()
    before = {name: value.copy() for name, value in given.items() if isinstance(value, np.ndarray)}
    style = dict(matplotlib.rcParams)
    write_report(tmp_path, **given)
    for name, value in before.items():
        np.testing.assert_array_equal(given[name], value)
    assert dict(matplotlib.rcParams) == style


@pytest.mark.parametrize("failure", ["row_text", "plot", "write", "replace"])
def test_an_error_leaves_the_earlier_report(tmp_path, monkeypatch, failure):
    write_report(tmp_path, **inputs())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    given = inputs(seed=1)

    def fail(*args, **kwargs):
        raise OSError("no space left")

    if failure == "row_text":
        given["row_text"] = fail
    elif failure == "plot":
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    elif failure == "write":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write_report(tmp_path, **given)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    write_report(tmp_path, **inputs(seed=1))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} != before


# ---------------------------------------------------------------- edges


@pytest.mark.parametrize(
    ("given", "headline"),
    [
        (few([0.5], [0]), "1 of 1 rows (100 %) is selected: the lowest selected learnability is 0.5"),
        (few([0.5, 0.1], [0, 1]), "2 of 2 rows (100 %) are selected: the lowest selected learnability is 0.1"),
        (few([0.1, 0.5, 0.2], [1]), "1 of 3 rows (33.3 %) is selected: the lowest selected learnability is 0.5"),
        (few([0, 0, 0, 0], [0, 1]), "2 of 4 rows (50 %) are selected: the lowest selected learnability is 0."),
        (few([-0.0, -0.0], [0]), "1 of 2 rows (50 %) is selected: the lowest selected learnability is 0."),
        (few([np.nan, np.nan, 0.5], [2]), "1 of 3 rows (33.3 %) is selected: the lowest selected learnability is 0.5"),
        (few([np.nan, np.nan], []), "None of 2 rows is selected."),
        (
            few([np.inf, -np.inf, 0.3], [2]),
            "1 of 3 rows (33.3 %) is selected: the lowest selected learnability is 0.3",
        ),
        (few([0.5, 0.4], []), "None of 2 rows is selected."),
        (few([], []), "None of 0 rows is selected."),
        (few([0.5, -1e6, -1e6, -1e6], [0]), "1 of 4 rows (25 %) is selected: the lowest selected learnability is 0.5"),
        (few([-1e300, -1e-300, 1e15, 1e15 + 1], [2, 3]), "2 of 4 rows (50 %) are selected: the lowest"),
        (
            few([0.5, 0.2], [0], tokens=[0, 0]),
            "1 of 2 rows (50 %) is selected: the lowest selected learnability is 0.5. ",
        ),
        (few([0.5, 0.2], [0], tokens=[10**9, 1]), "1 of 2 rows (50 %) is selected: the lowest"),
        (few([0.5, 0.2], [0], settings={}), "1 of 2 rows (50 %) is selected: the lowest"),
        (few([0.5, 0.2], [0], loss_initial=np.array([1.0, 2.0])), "1 of 2 rows (50 %) is selected: the lowest"),
        (
            few([0.5, 0.2], [0], loss_initial=np.zeros(2), loss_reference=np.full(2, np.nan)),
            "1 of 2 rows (50 %) is selected: the lowest",
        ),
    ],
)
@pytest.mark.filterwarnings("error")
def test_edges(tmp_path, given, headline):
    page, markdown = written(tmp_path, given)
    assert page.headline.startswith(headline)
    assert not re.search(r"\b(nan|inf)\b", markdown)
    assert not re.search(r"\b(nan|inf)\b", (tmp_path / "report.html").read_text(encoding="utf-8"))
    finite = int(np.isfinite(given["scores"]).sum())
    assert page.values("Rows")["with a score"][0] == str(finite)
    assert page.tags.count("svg") == (0 if not finite else 2)
    rows = [i for group in shown(markdown).values() for i, _ in group]
    assert sorted(rows) == np.flatnonzero(np.isfinite(given["scores"])).tolist()
    if finite:
        histogram = page.values("Learnability", 0).values()
        assert sum(int(number) for number, _ in histogram) == finite
        assert sum(int(number) for _, number in histogram) == len(given["selected"])


def test_what_is_not_defined_is_a_dash(tmp_path):
    page, _ = written(tmp_path, few([0.5, 0.5], [], tokens=[3, 4], comparisons={"none": np.array([])}))
    assert page.values("Length")[MEASURES] == ["-"]
    assert page.values("Length")["median length of the selected rows"] == ["-"]
    assert {numbers[1] for numbers in page.values("Learnability").values()} == {"-"}
    assert page.values("Overlap with other selections") == {"none": ["0", "0", "-", "-", "-"]}


def test_all_equal_scores(tmp_path):
    page, _ = written(tmp_path, few([0.25] * 6, [0, 1, 2]))
    histogram = {label: numbers for label, numbers in page.values("Learnability", 0).items() if numbers != ["0", "0"]}
    assert list(histogram.values()) == [["6", "3"]]
    low, high = map(float, next(iter(histogram)).split(" to "))
    assert low <= 0.25 <= high


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.123456, "0.1235"),
        (-0.0, "0"),
        (999.96, "1000"),
        (12345.6, "12,346"),
        (-1e6, "-1,000,000"),
        (-1e300, "-1e+300"),
        (float("nan"), "-"),
        (None, "-"),
    ],
)
def test_numbers(value, expected):
    assert report._number(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, "100 %"), (0.9999, "> 99.9 %"), (0.9994, "99.9 %"), (0.05, "5 %"), (0, "0 %"), (None, "-")],
)
def test_shares(value, expected):
    assert report._percent(value) == expected


def test_dropped_rows(tmp_path):
    page, _ = written(tmp_path, few([np.nan, np.nan, np.nan, 0.5], [3], dropped={"no scored token": 1}))
    assert page.values("Rows")["dropped: no scored token"] == ["1", "25 %"]
    assert page.values("Rows")["dropped: no reason given"] == ["2", "50 %"]
    _, markdown = written(tmp_path, few([0.5, 0.1], [0]))
    assert "No row was dropped." in markdown
    # A row can have a score and still be left out
    page, markdown = written(tmp_path, few([0.5, -0.1], [0], dropped={"score below min_score (0)": 1}))
    assert "dropped: no reason given" not in page.values("Rows")
    assert "No row was dropped." not in markdown


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"num_tokens": np.ones(3)}, "`num_tokens` must have the shape of `scores`, (400,); found (3,)"),
        ({"loss_reference": np.ones((N, 1))}, "`loss_reference` must have the shape"),
        ({"scores": np.ones((N, 1))}, "`scores` must have one dimension"),
        ({"selected": np.array([3, 2])}, "`selected` must be ascending"),
        ({"selected": np.array([2, 2])}, "`selected` must be ascending"),
        ({"selected": np.array([2, N])}, "`selected` has the row 400, but the rows are 0 to 399"),
        ({"selected": np.array([-1, 2])}, "`selected` has the row -1"),
        ({"selected": np.array([True, False])}, "`selected` must be a one-dimensional array of row indices"),
        ({"comparisons": {"x": np.array([N])}}, "`comparisons['x']` has the row 400"),
    ],
)
def test_bad_input(tmp_path, changes, error):
    with pytest.raises(ValueError, match=re.escape(error)):
        write_report(tmp_path, **inputs(**changes))
    assert os.listdir(tmp_path) == []


def test_a_row_without_a_score_cannot_be_selected(tmp_path):
    with pytest.raises(ValueError, match="row 1 is selected but has no finite score"):
        write_report(tmp_path, **few([0.5, np.nan], [0, 1]))


def test_missing_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for call in (check_report_tools, lambda: write_report(tmp_path, **inputs())):
        with pytest.raises(ImportError, match=re.escape('pip install "trl-ift[report]"`') + ".*--no_report"):
            call()
    assert os.listdir(tmp_path) == []


def test_the_check_imports_nothing_heavy():
    code = (
        "import sys; from trl_ift.data.report import check_report_tools; check_report_tools()\n"
        "print(sorted({'matplotlib', 'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
