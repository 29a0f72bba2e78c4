"""The report of a study: its numbers, its formats, hostile texts, and studies at the edge."""

import json
import math
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from trl_ift.study import report
from trl_ift.study.measures import Measure, mean_of
from trl_ift.study.report import report_text, write_report
from trl_ift.study.statistics import document_interval, holm, paired_difference, verdict


pytest.importorskip("matplotlib")

SIGNS = {"better": "▲", "worse": "▼", "higher": "↑", "lower": "↓", "no difference shown": "≈"}
T_2 = 4.302652729911275  # 0.975 quantile of Student's t with 2 degrees of freedom
METHODS = {
    "sft": ("sft", "Supervised Fine-Tuning", None, {}),
    "dpo": ("dpo", "Direct Preference Optimization", "2305.18290", {"beta": 0.1}),
    "kto": ("kto", "Kahneman-Tversky Optimization", "2402.01306", {"beta": 0.1}),
    "mpo": ("mpo", "Maximum Preference Optimization", "2312.16430", {"mpo_beta": 0.5}),
    "tpo": ("tpo", "Triple Preference Optimization", "2405.16681", {}),
}
# Gain of preference accuracy with most data, drift in nats
EFFECTS = {"sft": (0.03, 0.4), "dpo": (0.15, 0.25), "kto": (0.10, 0.12), "mpo": (-0.12, 0.6), "tpo": (0.02, 0.9)}


def measured(rng, gain, drift, skill, documents=200, extra=0):
    """Measures of one model; the hardness of a document is the same for all models."""
    hard = np.random.default_rng(7).random(documents)
    lengths = 20 + np.floor(200 * np.random.default_rng(8).random(documents))
    noise = rng.normal(0, 0.15, documents)
    right = (hard + noise < 0.5 + gain).astype(float) if drift else np.full(documents, 0.5)
    chosen = drift * rng.normal(-1, 2, documents)
    nll = 2.2 + hard + 0.05 * drift + 0.02 * noise
    found = {
        "preference_accuracy": mean_of(right, "Preference accuracy", "preference", "share", "higher", documents="p"),
        "reward_margin": mean_of(gain * 10 * (right - 0.4), "Reward margin", "preference", "nats", "higher", documents="p"),
        "chosen_drift": mean_of(chosen, "Log-prob change of chosen", "drift", "nats", documents="p"),
        "rejected_drift": mean_of(chosen - gain, "Log-prob change of rejected", "drift", "nats", documents="p"),
        "forward_kl": mean_of(drift * rng.gamma(2, 0.5, 64), "KL(start || model)", "drift", "nats", documents="k"),
        "answer_length": mean_of(
            np.round(60 + 30 * drift + 20 * noise[:64]), "Answer length", "generation", "tokens", documents="a"
        ),
        "cut_answers": mean_of(noise[:64] > 0.1, "Answers cut at the limit", "generation", "share", documents="a"),
        "neutral_nll": mean_of(
            nll, "NLL of neutral text", "forgetting", "nats/token", "lower", weights=lengths, documents="n"
        ),
    }  # fmt: skip
    names = ["task/chain_sum", "task/gsm8k"] + [f"lm_eval/bench_{i}/acc_norm" for i in range(extra)]
    for i, name in enumerate(names):
        outcome = np.random.default_rng(20 + i).random(150) + rng.normal(0, 0.1, 150) < 0.3 + 0.02 * i + skill
        group = "task" if name.startswith("task") else ("reasoning", "knowledge")[i % 2]
        title = name.split("/")[1]
        found[name] = mean_of(outcome, title, group, "share", "higher", documents=name)
    if extra:
        found["judge/mt_bench"] = mean_of(
            rng.integers(1, 9, 40), "MT-Bench", "judge", "score", "higher", documents="j"
        )
    return {name: measure.to_json() for name, measure in found.items()}


def study(starts=("base", "sft"), methods=tuple(METHODS), sizes=(64, 256), seeds=(0, 1, 2), extra=0, documents=200):
    """A `results.json` in which all cells are done."""
    rng = np.random.default_rng(0)
    cells = []

    def cell(start, method, size, seed, gain, drift, skill):
        key = f"{start}-{method}{f'-{size}' if size else ''}{'' if seed is None else f'-s{seed}'}-1a2b3c4d"
        sequences = 2 * size if method != "sft" else size
        seconds = 0.1 * max(sequences, 1) * (1 + 0.1 * rng.random())
        train = {
            "rows": size, "sequences": sequences, "tokens": 80 * sequences, "steps": size // 8, "seconds": seconds,
            "tokens_per_second": 80 * sequences / seconds, "peak_memory_bytes": 1.4e9 + 1e8 * rng.random(),
            "history": [{"step": 4, "loss": 0.69}],
        }  # fmt: skip
        cells.append({
            "id": key, "start": start, "method": method, "size": size, "seed": seed, "status": "done", "error": None,
            "folder": f"cells/{key}", "train": train if size else None, "evaluation_seconds": 31.0,
            "measures": measured(rng, gain, drift, skill, documents, extra), "config": f"cells/{key}/cell.json",
            "samples": f"cells/{key}/samples.jsonl", "versions": {"trl": "1.16.0", "torch": "2.13.0"},
        })  # fmt: skip

    for start in starts:
        for seed in (None,) if start != "sft" else seeds:
            cell(start, "start", 0, seed, 0, 0, 0)
        for i, method in enumerate(methods):
            gain, drift = EFFECTS.get(METHODS[method][0] if method in METHODS else "", (0.01 * i, 0.05 * (i + 1)))
            for size in sizes:
                part = (size / max(sizes)) ** 0.5
                for seed in seeds:
                    cell(start, method, size, seed, part * gain + rng.normal(0, 0.01), part * drift, part * gain / 2)
    names = ("method", "title", "paper", "options")
    return {
        "study": "smollm2",
        "settings": {"name": "smollm2", "starts": {"base": {"model": "org/base"}}, "sizes": list(sizes)},
        "environment": {
            "versions": {"trl": "1.16.0", "torch": "2.13.0"}, "device": "cpu", "machine": "2 cores, 24 GiB", "python": "3.11",
        },
        "starts": {start: {"model": "HuggingFaceTB/SmolLM2-135M", "sft": start == "sft"} for start in starts},
        "methods": {
            method: dict(zip(names, METHODS.get(method, (method, method, None, {})), strict=True)) | {"kind": "pairs"}
            for method in methods
        },
        "sizes": list(sizes), "seeds": list(seeds), "cells": cells,
    }  # fmt: skip


class Page(HTMLParser):
    """Reads a page strictly: tags are balanced, ids unique. Collects the tables of each section, texts and attributes."""

    VOID = ("meta", "br", "hr", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []
        self.tables, self.captions, self.title = {}, [], None
        self.texts = {"h1": [], "h2": [], "p": [], "li": [], "pre": [], "a": [], "text": []}
        self.hidden = 0
        self.feed(text)
        self.close()
        assert self.open == []
        ids = [value for _, name, value in self.attributes if name == "id"]
        assert len(ids) == len(set(ids))
        self.ids = set(ids)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag in self.VOID:
            return
        self.open.append((tag, dict(attrs)))
        if tag in self.texts:
            self.texts[tag].append("")
        if tag == "table":
            self.tables.setdefault(self.texts["h2"][-1], []).append([])
        elif tag == "caption":
            self.captions.append("")
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            if tag == "th":
                in_head = any(name == "thead" for name, _ in self.open)
                assert dict(attrs)["scope"] in (("col",) if in_head else ("row", "rowgroup"))
            self.rows[-1].append("")

    @property
    def rows(self):
        return self.tables[self.texts["h2"][-1]][-1]

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        names = [name for name, _ in self.open]
        for name in self.texts:
            if name in names:
                self.texts[name][-1] += data
        if "caption" in names:
            self.captions[-1] += data
        # The words for screen readers stand beside the sign
        if ("td" in names or "th" in names) and not any(attrs.get("class") == "words" for _, attrs in self.open):
            self.rows[-1][-1] += data

    def cells(self, section, table=0):
        """{(start, method): texts of the cells} of a table whose rows are grouped by start."""
        found, start = {}, ""
        for row in self.tables[section][table][1:]:
            row = [" ".join(cell.split()) for cell in row]
            if len(row) == 1:
                start = row[0]
            else:
                found[start, row[0]] = row[1:]
        return found


def unescaped(text):
    """What Markdown shows."""
    return re.sub(r"\\([!-/:-@[-`{-~])", r"\1", text)


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
            title = unescaped(line[3:])
        elif line.startswith("|"):
            if rows is None:
                rows = []
                sections.setdefault(title, []).append(rows)
            assert line.endswith(" |")
            cells = re.split(r"(?<!\\)\|", line[1:-1])
            if not set(line) <= set("|-: "):
                rows.append([unescaped(cell.strip()) for cell in cells])
            assert len(cells) == len(rows[0])
        else:
            rows = None
    assert fence is None
    return sections


def markdown_cells(text, section, table=0):
    return {tuple(row[:2]): row[2:] for row in markdown_tables(text)[section][table][1:]}


def written(folder, results):
    """Write the report; return the page, the Markdown, and both checked for what every report must hold."""
    path = write_report(json.loads(json.dumps(results)), folder)
    assert path == folder / "report.html"
    html, markdown = ((folder / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    page = Page(html)
    # One file, no script, nothing loaded
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "link", "iframe", "object", "embed"})
    assert not re.search(r"@import|url\((?!#)", html)
    for tag, name, value in page.attributes:
        assert name not in ("src", "srcset", "data", "onclick", "onload", "background")
        if name.endswith("href") and not (tag == "a" and value.startswith("https://huggingface.co/papers/")):
            assert ":" not in value
            assert not value.startswith("#") or value[1:] in page.ids
    figures = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert all(attrs["role"] == "img" and len(attrs["aria-label"]) > 40 for attrs in figures)
    assert len(page.captions) == sum(tag == "table" for tag, _ in page.tags)
    assert all(page.captions)
    # The same contents in both
    assert page.texts["h2"] == [unescaped(title) for title in re.findall(r"^## (.*)$", markdown, re.M)]
    images = re.findall(r"!\[(.*)\]\((report-[a-z]+-\d+\.png)\)", markdown)
    assert len(images) == len(figures)
    assert all(alt and (folder / file).read_bytes().startswith(b"\x89PNG") for alt, file in images)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["report.html", "report.md", *(file for _, file in images)]
    )
    for section, tables in markdown_tables(markdown).items():
        for i, table in enumerate(tables):
            if table[0][0] == "Start":
                shown = {tuple(row[:2]): row[2:] for row in table[1:]}
                assert list(page.cells(section, i)) == list(shown)
                for place, cells in page.cells(section, i).items():
                    # HTML has the sign before the interval
                    assert [sorted(cell.split()) for cell in cells] == [sorted(cell.split()) for cell in shown[place]]
            else:
                assert [[" ".join(cell.split()) for cell in row] for row in page.tables[section][i][1:]] == [
                    [re.sub(r"^\[(.*)\]\(.*\)$", r"\1", cell) for cell in row] for row in table[1:]
                ]
    return page, markdown


@pytest.fixture(scope="module")
def full():
    return study()


@pytest.fixture(scope="module")
def both(full, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return *written(folder, full), folder


def values_of(results, start, method, size, key):
    """Values of a measure by seed."""
    return {
        cell["seed"]: Measure.from_json(cell["measures"][key])
        for cell in results["cells"]
        if (cell["start"], cell["method"], cell["size"]) == (start, method, size) and key in cell["measures"]
    }


def differences(results, key, size=256):
    """Every method against its start, computed apart from the report."""
    found = {}
    for start in results["starts"]:
        base = values_of(results, start, "start", 0, key)
        for method in results["methods"]:
            runs = values_of(results, start, method, size, key)
            found[start, method] = paired_difference(
                list(runs.values()), [base.get(seed, base.get(None)) for seed in runs]
            )
    adjusted = holm([difference.p for difference in found.values()])
    return {place: (d, verdict(d, p)) for (place, d), p in zip(found.items(), adjusted, strict=True)}


HEADLINE = "Results with 256 pairs"
LABELS = {"base": "base: HuggingFaceTB/SmolLM2-135M", "sft": "sft: HuggingFaceTB/SmolLM2-135M, after SFT"}


def number(text):
    return float(text.replace("−", "-").replace(",", ""))


def test_headline_numbers(full, both):
    page, markdown, _ = both
    for shown in (page.cells(HEADLINE), markdown_cells(markdown, HEADLINE)):
        assert len(shown) == 2 * (len(METHODS) + 1)
        for start in full["starts"]:
            for method in full["methods"]:
                values = np.array(
                    [run.value for run in values_of(full, start, method, 256, "preference_accuracy").values()]
                )
                half = T_2 * values.std(ddof=1) / math.sqrt(3)
                expected = 100 * np.array([values.mean(), values.mean() - half, values.mean() + half])
                numbers = [number(n) for n in re.findall(r"[−\d.]+", shown[LABELS[start], method][0])]
                assert numbers == pytest.approx(list(expected), abs=0.0501)
                values = np.array([run.value for run in values_of(full, start, method, 256, "neutral_nll").values()])
                assert number(shown[LABELS[start], method][2].split()[0]) == pytest.approx(values.mean(), abs=5e-4)


def test_headline_signs(full, both):
    page, markdown, _ = both
    header = page.tables[HEADLINE][0][0]
    assert header == [
        "Method", "Preference accuracy", "KL(start || model), nats", "NLL of neutral text, nats/token", "Answer length, tokens",
        "chain_sum", "gsm8k",
    ]  # fmt: skip
    keys = ["preference_accuracy", "forward_kl", "neutral_nll", "answer_length", "task/chain_sum", "task/gsm8k"]
    seen = set()
    for column, key in enumerate(keys):
        for (start, method), (_, said) in differences(full, key).items():
            seen.add(said)
            for shown in (page.cells(HEADLINE), markdown_cells(markdown, HEADLINE)):
                text = shown[LABELS[start], method][column]
                assert [sign for sign in SIGNS.values() if sign in text] == [SIGNS[said]]
    assert seen >= {"better", "worse", "higher", "no difference shown"}
    # The start has no sign, and says what is known by definition
    assert page.cells(HEADLINE)[LABELS["base"], "the start itself"][0] == "50.0 % by definition"
    assert "†" in page.cells(HEADLINE)[LABELS["base"], "the start itself"][2]
    words = [attrs for tag, attrs in page.tags if attrs.get("class") == "words"]
    assert len(words) == sum(attrs.get("class", "").startswith("sign ") for _, attrs in page.tags)


def test_no_mean_stands_alone(both):
    page, _, _ = both
    for section in (HEADLINE, "Preference accuracy and data size", "All measures, by group"):
        for i in range(len(page.tables[section])):
            for cells in page.cells(section, i).values():
                assert all(re.search(r"\[.*, .*\]|by definition|no spread", cell) for cell in cells)


def test_answer_says_what_the_verdicts_allow(full, both):
    page, markdown, _ = both
    answer = page.texts["p"][1]
    said = differences(full, "preference_accuracy")
    words = {"better": re.search(r"Shown better than the start: (.*?\))\.", answer)[1]}
    words["worse"] = re.search(r"Shown worse than the start: (.*?\))\.", answer)[1]
    for (start, method), (difference, word) in said.items():
        for name, text in words.items():
            assert (f"{method} from {start} (" in text) == (word == name)
        if word in words:
            shown = [100 * number for number in (difference.value, difference.low, difference.high)]
            numbers = re.search(rf"{method} from {start} \((\S+) points \[(\S+), (\S+)\]\)", answer).groups()
            assert [number(n) for n in numbers] == pytest.approx(shown, abs=0.0501)
    silent = sum(word == "no difference shown" for _, word in said.values())
    assert answer.endswith(f"No difference is shown for {silent} others.")
    assert "than SFT on the same data" in page.texts["p"][2]
    assert "than DPO" in page.texts["p"][3]
    assert answer in unescaped(markdown)


def test_no_claim_without_an_effect(tmp_path, monkeypatch):
    for name in EFFECTS:
        monkeypatch.setitem(EFFECTS, name, (0.0, 0.01))
    page, _ = written(tmp_path, study(starts=("base",), sizes=(64,)))
    assert page.texts["p"][1].endswith("No method is shown to differ from the start.")
    assert page.texts["p"][2] == "No method is shown to differ from SFT on the same data."
    assert page.texts["p"][3] == "No method is shown to differ from DPO."
    assert "▲" not in "".join(cell for cells in page.cells("Results with 64 pairs").values() for cell in cells[:1])


def test_pairwise_table(full, both):
    page, _, _ = both
    shown = page.cells("Methods against each other")
    assert len(shown) == 2 * 10
    for start in full["starts"]:
        pairs = {}
        names = list(full["methods"])
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                runs = [values_of(full, start, method, 256, "preference_accuracy") for method in (a, b)]
                pairs[a, b] = paired_difference(*(list(side.values()) for side in runs))
        adjusted = holm([difference.p for difference in pairs.values()])
        for ((a, b), difference), p in zip(pairs.items(), adjusted, strict=True):
            cells = shown[LABELS[start], f"{a} − {b}"]
            numbers = [number(n) for n in re.findall(r"[−+\d.]+(?= points|,|\])", cells[0])]
            expected = [100 * n for n in (difference.value, difference.low, difference.high)]
            assert numbers == pytest.approx(expected, abs=0.0501)
            assert cells[2] == ("< 0.001" if p < 0.001 else f"{p:.3f}")
            said = verdict(difference, p)
            assert cells[3] == {"better": f"{a} better", "worse": f"{b} better"}.get(said, said)


def test_size_table_and_drift(full, both):
    page, _, _ = both
    sizes = page.cells("Preference accuracy and data size")
    assert page.tables["Preference accuracy and data size"][0][0] == ["Method", "64 pairs", "256 pairs"]
    for size, cell in zip((64, 256), sizes[LABELS["sft"], "dpo"], strict=True):
        values = [run.value for run in values_of(full, "sft", "dpo", size, "preference_accuracy").values()]
        assert number(cell.split()[0]) == pytest.approx(100 * np.mean(values), abs=0.0501)
    change = page.cells("Drift and forgetting")[LABELS["base"], "tpo"][-1]
    difference, said = differences(full, "neutral_nll")["base", "tpo"]
    assert number(change.split()[0]) == pytest.approx(difference.value, abs=5e-5)
    assert said == "worse"
    assert "▼" in change
    assert page.cells("Drift and forgetting")[LABELS["base"], "the start itself"][-1] == "–"


def test_averages_are_over_shares_of_right_answers(tmp_path):
    results = study(starts=("base",), methods=("dpo",), sizes=(64,), extra=5)
    page, _ = written(tmp_path, results)
    found = {}
    for i, table in enumerate(page.tables["All measures, by group"]):
        for title, cell in zip(
            table[0][1:], page.cells("All measures, by group", i)[LABELS["base"], "dpo"], strict=True
        ):
            found[title] = cell
    averages = {title: cell for title, cell in found.items() if title.startswith("Average")}
    titles = ("2 (task)", "3 (reasoning)", "2 (knowledge)", "7 (all groups)")
    assert list(averages) == [f"Average of {title}" for title in titles]
    keys = [key for key in results["cells"][0]["measures"] if key.startswith(("task/", "lm_eval/"))]
    runs = [
        np.mean([cell["measures"][key]["value"] for key in keys]) for cell in results["cells"] if cell["size"] == 64
    ]
    half = T_2 * np.std(runs, ddof=1) / math.sqrt(3)
    numbers = [number(n) for n in re.findall(r"[\d.]+", averages["Average of 7 (all groups)"])]
    assert numbers == pytest.approx(
        [100 * np.mean(runs), 100 * (np.mean(runs) - half), 100 * (np.mean(runs) + half)], abs=0.0501
    )
    assert any(sign in averages["Average of 7 (all groups)"] for sign in SIGNS.values())
    # A score and the shares that are no right answers are in none
    assert "MT-Bench" in found
    assert "Answers cut at the limit" in found
    meanings = {row[0]: row[1] for row in page.tables["Set-up"][1][1:]}
    assert meanings["Average of 2 (task)"] == "mean of chain_sum, gsm8k"


def test_a_benchmark_is_averaged_once(tmp_path):
    results = small()
    for cell in results["cells"]:
        one = cell["measures"].pop("task/gsm8k")
        for name in ("mmlu/acc", "mmlu_anatomy/acc", "mmlu_law/acc", "gsm8k/strict", "gsm8k/flexible"):
            cell["measures"][f"lm_eval/{name}"] = one | {"title": name, "group": "benchmark"}
    page, _ = written(tmp_path, results)
    meanings = {row[0]: row[1] for row in page.tables["Set-up"][1][1:]}
    assert meanings["Average of 2 (benchmark)"] == "mean of mmlu/acc, gsm8k/strict"
    assert meanings["Average of 3 (all groups)"] == "mean of chain_sum, mmlu/acc, gsm8k/strict"


def test_cost(full, both):
    page, markdown, _ = both
    runs = [c["train"] for c in full["cells"] if (c["start"], c["method"], c["size"]) == ("base", "dpo", 256)]
    sft = [
        c["train"]["seconds"] for c in full["cells"] if (c["start"], c["method"], c["size"]) == ("base", "sft", 256)
    ]
    shown = {
        method: cells for (start, method), cells in page.cells("Cost of training").items() if start.startswith("base")
    }
    times = [run["seconds"] for run in runs]
    assert shown["dpo"][0] == f"{np.median(times):.0f} s {min(times):.0f} s to {max(times):.0f} s"
    assert shown["dpo"][1] == f"{np.median(times) / np.median(sft):.2f} ×"
    assert shown["sft"][1] == "1.00 ×"
    assert shown["dpo"][3:5] == ["512", "32"]
    assert shown["dpo"][5] == f"{np.mean([run['peak_memory_bytes'] for run in runs]) / 2**30:.2f} GiB"
    assert "relative to sft" in markdown


def test_cells_link_to_their_files(full, both):
    page, markdown, _ = both
    links = [value for tag, name, value in page.attributes if tag == "a" and name == "href"]
    for cell in full["cells"]:
        assert cell["config"] in links
        assert cell["samples"] in links
        assert f"[{cell['id'].replace('_', '_')}]({cell['config']})" in markdown
    assert "https://huggingface.co/papers/2305.18290" in links


def test_same_input_same_bytes(full, both, tmp_path):
    _, _, folder = both
    write_report(full, tmp_path / "new" / "folder")
    for path in folder.iterdir():
        assert (tmp_path / "new" / "folder" / path.name).read_bytes() == path.read_bytes()


def test_text_for_a_terminal(full, both):
    _, markdown, _ = both
    text = report_text(full)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 119
    assert " ".join(lines[:3]).startswith("Preference accuracy with 256 pairs. Shown better than the start")
    for (_, method), cells in markdown_cells(markdown, HEADLINE).items():
        for cell in cells:
            assert any(method in line and " ".join(cell.split()) in line for line in lines)
    narrow = report_text(full, 60)
    assert max(map(len, narrow.splitlines())) <= 60


# ---------------------------------------------------------------- what does not go as planned


def small(**changes):
    return study(**{"starts": ("base",), "methods": ("dpo", "kto"), "sizes": (64,), "seeds": (0, 1)} | changes)


def warnings_of(page):
    return " ".join(text for text in page.texts["li"])


def test_one_seed(tmp_path):
    results = small(seeds=(0,))
    page, _ = written(tmp_path, results)
    assert "One seed: intervals are over documents" in warnings_of(page)
    assert "With one seed, intervals are over the test documents" in warnings_of(page)
    for method in ("dpo", "kto"):
        cell = page.cells("Results with 64 pairs")[LABELS["base"], method][0]
        run = values_of(results, "base", method, 64, "preference_accuracy")[0]
        interval = document_interval(run)
        assert "†" in cell
        numbers = [number(n) for n in re.findall(r"[\d.]+", cell)]
        assert numbers == pytest.approx([100 * n for n in (interval.mean, interval.low, interval.high)], abs=0.0501)


def test_failed_and_missing_cells(tmp_path):
    results = study(starts=("base",), methods=("dpo", "kto", "mpo"), sizes=(64, 256))
    for cell in results["cells"]:
        broken = {"train": None, "measures": {}, "evaluation_seconds": None, "samples": None, "versions": {}}
        if cell["method"] == "kto" and cell["size"] == 256:
            cell.update(
                broken,
                status="failed",
                error="Traceback (most recent call last):\n  File x\nValueError: no <room> & | left",
            )
        if cell["method"] == "dpo" and cell["seed"] == 1 and cell["size"] == 256:
            cell.update(broken, status="missing")
    page, markdown = written(tmp_path, results)
    text = warnings_of(page)
    assert "3 cells failed" in text
    assert "base-kto-256-s2-1a2b3c4d" in text
    assert "1 cell not done yet" in text
    shown = page.cells(HEADLINE)
    assert shown[LABELS["base"], "kto (failed)"] == ["–"] * 6
    assert re.search(r"\[|no spread, 2 runs", shown[LABELS["base"], "dpo (2 of 3 seeds)"][0])
    assert "kto" not in " ".join(page.texts["p"][1:4])
    statuses = {row[0].strip(): row[1].strip() for row in page.tables["Every cell"][0][1:]}
    assert statuses["base-kto-256-s0-1a2b3c4d"] == "failed: ValueError: no <room> & | left"
    assert r"no \<room\> \& \| left" in markdown
    assert "2 of 3 seeds" in report_text(results)


def test_largest_size_not_reached(tmp_path):
    results = study(starts=("base",), methods=("dpo",), sizes=(64, 256), seeds=(0,))
    for cell in results["cells"]:
        if cell["size"] == 256:
            cell.update(status="missing", train=None, measures=None)
    page, _ = written(tmp_path, results)
    assert "Results with 64 pairs" in page.texts["h2"]
    assert "No cell with 256 pairs is done; tables show 64." in warnings_of(page)


@pytest.mark.parametrize("left", [[], ["start"]])
def test_nothing_is_done_yet(tmp_path, left):
    results = small()
    for cell in results["cells"]:
        if cell["method"] not in left:
            cell.update(
                status="missing", train=None, measures={}, evaluation_seconds=None, samples=None, versions=None
            )
    page, _ = written(tmp_path, results)
    assert page.texts["p"][1] == "No trained cell is done yet: nothing can be said."
    assert "nothing can be said" in report_text(results)
    written(tmp_path, results | {"cells": []})


def test_without_the_start(tmp_path):
    results = small()
    results["cells"] = [cell for cell in results["cells"] if cell["method"] != "start"]
    page, _ = written(tmp_path, results)
    assert "nothing is compared with it: the start itself of base" in warnings_of(page)
    assert "Against the start: no interval to judge by." in page.texts["p"][1]
    cells = page.cells("Results with 64 pairs")[LABELS["base"], "dpo"]
    assert not any(sign in cell for sign in SIGNS.values() for cell in cells)


def test_values_that_are_missing_in_some_cells(tmp_path):
    results = small(seeds=(0, 1, 2))
    trained = [cell["measures"] for cell in results["cells"] if cell["method"] == "dpo"]
    trained[0]["preference_accuracy"]["value"] = None  # one seed has none
    for measures in trained:
        measures["forward_kl"] = None
        del measures["answer_length"]
        measures["neutral_nll"]["items"][5] = None
        measures["task/gsm8k"]["value"] = math.nan
        measures["chosen_drift"]["value"] = math.inf
    page, _ = written(tmp_path, results)
    cells = page.cells("Results with 64 pairs")[LABELS["base"], "dpo"]
    assert "[" in cells[0]
    assert cells[1] == cells[3] == "–"
    assert "[" in cells[2]
    assert cells[5] == "–"


def test_measures_without_documents(tmp_path):
    results = small(seeds=(0, 1, 2))
    for cell in results["cells"]:
        for measure in cell["measures"].values():
            measure.update(items=None, weights=None, documents=None)
    page, _ = written(tmp_path, results)
    assert "no interval" in page.cells("Results with 64 pairs")[LABELS["base"], "the start itself"][0]
    assert "[" in page.cells("Results with 64 pairs")[LABELS["base"], "dpo"][0]
    one = small(seeds=(0,))
    for cell in one["cells"]:
        cell["measures"] = {key: m | {"items": None, "weights": None} for key, m in cell["measures"].items()}
    page, _ = written(tmp_path, one)
    assert "no interval to judge by" in page.texts["p"][1]
    assert page.cells("Methods against each other")[LABELS["base"], "dpo − kto"][-1] == "no interval to judge by"


def test_different_documents_are_not_compared(tmp_path):
    results = small()
    for cell in results["cells"]:
        if cell["method"] == "dpo":
            cell["measures"]["preference_accuracy"]["documents"] = "other"
    page, _ = written(tmp_path, results)
    assert (
        "Not compared: dpo from base. 'Preference accuracy': only measures of the same documents are paired"
        in warnings_of(page)
    )
    cell = page.cells("Results with 64 pairs")[LABELS["base"], "dpo"][0]
    assert not any(sign in cell for sign in SIGNS.values())


def test_different_versions_and_few_documents(tmp_path):
    results = small(documents=12)
    results["cells"][1]["versions"] = {"trl": "1.17.0", "torch": "2.13.0"}
    page, _ = written(tmp_path, results)
    assert "different versions of trl: 1.16.0 in 4 cells, 1.17.0 in 1 cell." in warnings_of(page)
    assert "versions of torch" not in warnings_of(page)
    assert "Fewer than 30 documents" in warnings_of(page)
    assert "Fewer than 30 documents" in " ".join(report_text(results).split())


def test_fifteen_methods_and_thirty_measures(tmp_path):
    names = [f"method-{i}" for i in range(15)]
    page, _ = written(tmp_path, study(("base",), names, seeds=(0, 1), sizes=(64, 128), extra=22, documents=40))
    assert len(page.tables[HEADLINE.replace("256", "128")][0][0]) == 7
    shown = {title for table in page.tables["All measures, by group"] for title in table[0]}
    assert {f"bench_{i}" for i in range(22)} <= shown
    assert len(page.cells("Methods against each other")) == 105
    assert any("long" in attrs.get("class", "") for tag, attrs in page.tags if tag == "div")


def test_other_measures_only(tmp_path):
    results = small()
    for cell in results["cells"]:
        cell["measures"] = {key: cell["measures"][key] for key in ("task/gsm8k", "cut_answers", "answer_length")}
    page, _ = written(tmp_path, results)
    assert page.texts["p"][1].startswith("gsm8k with 64 pairs.")
    for cell in results["cells"]:
        del cell["measures"]["task/gsm8k"]
    page, _ = written(tmp_path, results)
    # Neither more nor fewer tokens are better
    assert re.search("Shown (higher|lower) than the start|No method", page.texts["p"][1])
    assert "better than" not in page.texts["p"][1]


def test_hostile_texts(tmp_path):
    odd = "<b>a & b</b> | `c` *d* $e$ [f](javascript:1) \x1b\u202e\nnew ]]> </script>"
    results = json.loads(
        json.dumps(small(sizes=(64, 256))).replace('"dpo"', '"d<p>o|&"').replace('"base"', '"b<a>se|&"')
    )
    results["study"] = odd
    results["settings"]["note"] = odd + "\n```\n"
    results["environment"]["machine"] = odd
    results["starts"]["b<a>se|&"]["model"] = odd
    results["methods"]["d<p>o|&"].update(title=odd, paper="x:javascript", options={"a<b": odd})
    results["cells"][3].update(status="failed", error=odd, measures={}, train=None)
    for cell in results["cells"]:
        cell["config"] = f"cells/a b#c?d%(e)<{cell['seed']}>/cell.json"
        for measure in cell["measures"].values():
            measure["title"] = f"{measure['title']} <i>|&"
    page, markdown = written(tmp_path, results)
    assert {"b", "i", "script"}.isdisjoint({tag for tag, _ in page.tags})
    assert page.texts["h1"][0].startswith("Study <b>a & b</b> | `c`")
    assert not re.search(r"[\x1b\u202e]", page.texts["h1"][0] + markdown + report_text(results))
    assert "javascript:" not in "".join(value for _, name, value in page.attributes if name == "href")
    links = {value for tag, name, value in page.attributes if tag == "a" and name == "href"}
    assert "cells/a b#c?d%(e)<0>/cell.json" in {unquote(link) for link in links}
    for line in markdown.splitlines():  # outside of the study file
        if line.startswith("|"):
            assert not re.search(r"(?<!\\)<(?!\d)", line)


def test_repeated_titles_are_told_apart(tmp_path):
    results = small()
    for cell in results["cells"]:
        cell["measures"]["lm_eval/gsm8k/exact_match"] = dict(cell["measures"]["task/gsm8k"])
    page, _ = written(tmp_path, results)
    titles = [title for table in page.tables["All measures, by group"] for title in table[0]]
    assert "gsm8k (task/gsm8k)" in titles
    assert "gsm8k (lm_eval/gsm8k/exact_match)" in titles


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=re.escape('pip install "trl-ift[report]"')):
        write_report({}, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert "Preference accuracy" in report_text(small())


def test_templates_are_in_the_package():
    root = Path(report.__file__).parents[2]
    if (root / "pyproject.toml").exists():
        settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
        assert "study/*.j2" in settings["tool"]["setuptools"]["package-data"]["trl_ift"]
    assert {path.name for path in Path(report.__file__).parent.glob("*.j2")} >= {
        "report.html.j2",
        "report.md.j2",
        "prose.j2",
    }
