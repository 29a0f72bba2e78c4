"""Triples from scored responses: every rule on rows made by hand, real data, the command, and TRL's own trainer."""

import json
import math
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import datasets
import pytest
import tiny
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset

from trl_ift.cli import main
from trl_ift.data import triples
from trl_ift.data.triples import STRATEGIES, build_triples, triple_of


DATA = Path(os.environ.get("TRL_IFT_TEST_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
TEXTS = ("reference", "chosen", "rejected")
NOT_BETTER = "chosen is not better than rejected"


def row(responses, scores, prompt="Q: 2 + 2?\nA:", **columns):
    return {"prompt": prompt, "responses": responses, "scores": scores, **columns}


def texts(triple):
    """The three texts of a triple, or the reason why there is none."""
    if isinstance(triple, str):
        return triple
    return " ".join(value if isinstance(value, str) else value[0]["content"] for value in map(triple.get, TEXTS))


def say(content):
    return [{"role": "assistant", "content": content}]


def dataset_of(n, seed=0):
    """`n` rows of six responses, scores with ties, and some that give no triple."""
    rows = []
    for i in range(n):
        scores = [float((i * 7 + j * j + seed) % 5) for j in range(6)]
        rows.append(row([f" {i}-{j}" for j in range(6)], [1.0] * 6 if i % 9 == 8 else scores, f"Q{i}", source=f"s{i}"))
    return Dataset.from_list(rows)


# ---------------------------------------------------------------- which responses


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "a b e"),
        ({"strategy": "best-kth-worst"}, "a b e"),
        ({"strategy": "best-kth-worst", "k": 3}, "a c e"),
        ({"strategy": "best-kth-worst", "k": 4}, "a d e"),
        ({"strategy": "best-kth-worst", "k": 5}, "fewer than 6 different responses with a score"),
        ({"gold_column": "human"}, "h a e"),
        ({"gold_column": "human", "strategy": "best-kth-worst"}, "h b e"),
        ({"gold_column": "human", "strategy": "best-kth-worst", "k": 4}, "h d e"),
    ],
)
def test_strategies(options, expected):
    assert texts(triple_of(row(list("cebad"), [3, 1, 4, 5, 2], human="h"), **options)) == expected


def test_scores_are_those_of_the_responses():
    scored = row(list("abc"), [1, 0.5, -2.0], human="h")
    assert triple_of(scored) == {
        "reference": "a",
        "chosen": "b",
        "rejected": "c",
        "score_reference": 1.0,
        "score_chosen": 0.5,
        "score_rejected": -2.0,
    }
    triple = triple_of(scored, gold_column="human")
    assert (triple["score_reference"], triple["score_chosen"], triple["score_rejected"]) == (None, 1.0, -2.0)


def test_random_choice_is_uniform_over_the_better_ones():
    drawn = [
        texts(triple_of(row(list("abcdef"), [5, 4, 3, 3, 1, 1], f"Q{i}"), strategy="best-random")) for i in range(3000)
    ]
    assert set(drawn) == {"a b f", "a c f", "a d f"}  # never gold, never one as bad as rejected
    assert all(abs(drawn.count(triple) - 1000) < 130 for triple in set(drawn))  # five standard deviations


def test_random_choice_with_gold_and_margin():
    rows = [row(list("abcd"), [5, 4, 1.5, 1], f"Q{i}", human="h") for i in range(100)]
    options = {"strategy": "best-random"}
    assert {texts(triple_of(r, gold_column="human", **options)) for r in rows} == {"h a d", "h b d", "h c d"}
    assert {texts(triple_of(r, min_margin=1, **options)) for r in rows} == {"a b d"}
    assert {texts(triple_of(r, min_margin=5, **options)) for r in rows} == {
        "chosen is better than rejected by less than 5"
    }


def test_random_choice_depends_on_seed_and_content():
    rows = [row(list("abcdef"), [5, 4, 3, 2, 2, 1], f"Q{i}") for i in range(50)]
    draws = [[texts(triple_of(r, strategy="best-random", seed=seed)) for r in rows] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


# ---------------------------------------------------------------- rows that are dropped


@pytest.mark.parametrize(
    ("responses", "scores", "expected"),
    [
        (list("ab"), [2, 1], "fewer than 3 different responses with a score"),
        ([], [], "fewer than 3 different responses with a score"),
        (None, None, "fewer than 3 different responses with a score"),
        (list("abc"), None, "fewer than 3 different responses with a score"),
        (list("abca"), [3, 2, 1, 3], "a b c"),
        (list("aba"), [3, 2, 3], "fewer than 3 different responses with a score"),
        (["a", "", " \n", None, "b"], [5, 4, 3, 2, 1], "fewer than 3 different responses with a score"),
        (["a", "", " \n", None, "b", "c"], [5, 4, 3, 2, 1, 0], "a b c"),
        (list("abc"), [3, None, 1], "fewer than 3 different responses with a score"),
        (list("abc"), [3, math.nan, 1], "fewer than 3 different responses with a score"),
        (list("abcde"), [3, math.nan, 2, None, 1], "a c e"),
        (["a", " a", "a "], [3, 2, 1], "a  a a "),  # texts that differ in blanks are different, and stay as they are
        (list("abc"), [1, 1, 1], NOT_BETTER),
        (list("abc"), [1, 0, 0], NOT_BETTER),
        (list("abc"), [1, 1, 0], "a b c"),
    ],
)
def test_too_few_or_no_better_response(responses, scores, expected):
    assert texts(triple_of(row(responses, scores))) == expected


def test_equal_texts_count_once_with_their_mean_score():
    triple = triple_of(row(list("abcb"), [2, 3, 1, 0]))  # b: (3 + 0) / 2
    assert texts(triple) == "a b c"
    assert triple["score_chosen"] == 1.5
    assert triple_of(row(list("abbbc"), [2, 0.1, 0.1, 0.1, 0]))["score_chosen"] == 0.1
    assert texts(triple_of(row(list("abca"), [4, 3, 3, 2]))) == NOT_BETTER  # a: 3, as all others


@pytest.mark.parametrize(
    ("min_margin", "expected"),
    [
        (0, "a b c"),
        (0.2, "a b c"),  # 0.3 - 0.1 is a little less than 0.2
        (0.21, "chosen is better than rejected by less than 0.21"),
    ],
)
def test_margin(min_margin, expected):
    assert texts(triple_of(row(list("abc"), [1, 0.3, 0.1]), min_margin=min_margin)) == expected


@pytest.mark.parametrize(
    ("gold", "responses", "expected"),
    [
        ("h", list("ab"), "h a b"),
        ("a", list("ab"), "a a b"),
        ("b", list("ab"), "the gold response is the rejected one"),
        ("", list("ab"), "the gold response is missing or blank"),
        (None, list("ab"), "the gold response is missing or blank"),
        ("h", list("aa"), "fewer than 2 different responses with a score"),
    ],
)
def test_gold_column(gold, responses, expected):
    assert texts(triple_of(row(responses, [2, 1], human=gold), gold_column="human")) == expected


@pytest.mark.parametrize(
    ("scores", "options", "kept", "tied"),
    [
        ([3, 2, 1, 0], {}, "a b d", False),
        ([3, 3, 1, 0], {}, "a b d", True),
        ([1, 3, 3, 0], {}, "b c d", True),
        ([3, 2, 2, 0], {}, "a b d", True),
        ([3, 2, 0, 0], {}, "a b d", False),  # of several worst ones the last
        ([3, 2, 2, 0], {"strategy": "best-random"}, None, False),
        ([3, 3, 2, 0], {"strategy": "best-random"}, None, True),
        ([3, 2, 2, 0], {"gold_column": "human"}, "h a d", False),
        ([3, 3, 2, 0], {"gold_column": "human"}, "h a d", True),
        ([3, 3, 2, 0], {"gold_column": "human", "strategy": "best-random"}, None, False),
    ],
)
def test_ties(scores, options, kept, tied):
    scored = row(list("abcd"), scores, human="h")
    keep = triple_of(scored, **options)
    assert kept in (None, texts(keep))
    assert triple_of(scored, on_ties="drop", **options) == ("tied for gold or chosen" if tied else keep)
    if tied:
        with pytest.raises(ValueError, match="are tied for gold or chosen, and `on_ties='raise'`"):
            triple_of(scored, on_ties="raise", **options)
    else:
        assert triple_of(scored, on_ties="raise", **options) == keep


def test_a_row_dropped_anyway_is_no_tie():
    assert triple_of(row(list("abc"), [1, 1, 1]), on_ties="raise") == NOT_BETTER


# ---------------------------------------------------------------- conversations


USER = [{"role": "user", "content": "2 + 2?"}]


def test_conversational_prompt_with_strings_or_messages():
    from_text = triple_of(row(list("abc"), [3, 2, 1], USER, human="h"), gold_column="human")
    from_messages = triple_of(row([*map(say, "abc")], [3, 2, 1], USER, human=say("h")), gold_column="human")
    assert from_text == from_messages
    assert [from_text[name] for name in TEXTS] == [say("h"), say("a"), say("c")]


def test_equal_and_blank_messages():
    absent_field = [{"role": "assistant", "content": "a", "tool_calls": None}]
    responses = [say("a"), absent_field, say("b"), say(" "), say(None), []]
    assert triple_of(row(responses, [3, 3, 2, 1, 1, 1], USER)) == "fewer than 3 different responses with a score"
    call = [{"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}]
    assert triple_of(row([call, say("b"), say("c")], [3, 2, 1], USER))["reference"] == call


# ---------------------------------------------------------------- whole datasets


def test_columns_counts_and_log(caplog):
    data = Dataset.from_list(
        [
            row(
                list("ab"), [2.0, 1.0], source="x", reference="lost"
            ),  # no triple in the first row: types are known anyway
            row(list("abc"), [3.0, 2.0, 1.0], source="y", reference="lost"),
            row(list("abc"), [1.0, 1.0, 1.0], source="z", reference="lost"),
        ]
    )
    triples = build_triples(data)
    assert triples.to_list() == [
        {
            "prompt": "Q: 2 + 2?\nA:",
            "reference": "a",
            "chosen": "b",
            "rejected": "c",
            "score_reference": 3.0,
            "score_chosen": 2.0,
            "score_rejected": 1.0,
            "source": "y",
        }
    ]
    assert triples.column_names[:4] == ["prompt", *TEXTS]
    (record,) = (record for record in caplog.records if record.name == "trl_ift.data.triples")
    assert record.levelname == "WARNING"
    assert "3 rows, 1 triples, 2 dropped (1 fewer than 3" in record.message
    assert "1 chosen is not better than rejected). Replaced columns of the input: reference." in record.message


def test_nothing_dropped_is_no_warning(caplog):
    build_triples(Dataset.from_list([row(list("abc"), [3, 2, 1])]))
    assert not [record for record in caplog.records if record.name == "trl_ift.data.triples"]


def test_other_column_names():
    data = Dataset.from_list([{"prompt": "Q", "answers": list("abc"), "ratings": [1, 3, 2]}])
    assert texts(build_triples(data, "answers", "ratings")[0]) == "b c a"


def test_no_triple_at_all():
    data = Dataset.from_list([row(list("abc"), [1, 1, 1]), row(list("ab"), [2, 1])])
    with pytest.raises(ValueError, match=r"No triple can be built. 2 rows, 0 triples, 2 dropped \(1 .*, 1 .*\)"):
        build_triples(data)


def test_streaming_gives_the_same_triples():
    data = dataset_of(40)
    expected = build_triples(data, strategy="best-random").to_list()
    streamed = build_triples(data.to_iterable_dataset(num_shards=3), strategy="best-random")
    assert list(streamed) == expected
    assert streamed.column_names == list(expected[0])
    untyped = build_triples(IterableDataset.from_generator(lambda: iter(data.to_list())), strategy="best-random")
    assert list(untyped) == expected


def test_random_choices_survive_processes_shuffling_and_other_rows():
    data = dataset_of(60)
    alone = {r["prompt"]: r for r in build_triples(data, strategy="best-random", seed=3)}
    assert len({r["score_chosen"] for r in alone.values()}) > 1
    mixed = datasets.concatenate_datasets([dataset_of(20, seed=1).map(lambda r: {"prompt": r["prompt"] + "'"}), data])
    other = build_triples(mixed.shuffle(seed=1), strategy="best-random", seed=3, num_proc=2)
    assert {r["prompt"]: r for r in other if not r["prompt"].endswith("'")} == alone


def test_features_of_messages_survive():
    data = Dataset.from_list([row([*map(say, "abc")], [3, 2, 1], USER), row([*map(say, "ab")], [3, 2], USER)])
    assert build_triples(data).features["chosen"] == data.features["prompt"]
    strings = Dataset.from_list([row(list("abc"), [3, 2, 1], USER, human="h")])
    triples = build_triples(strings, gold_column="human")
    assert triples[0]["reference"] == say("h")
    assert triples.features["reference"] == triples.features["chosen"] == data.features["prompt"]


# ---------------------------------------------------------------- bad input


GOOD = row(list("abc"), [3, 2, 1])


@pytest.mark.parametrize(
    ("rows", "options", "error", "expected"),
    [
        ([GOOD], {"strategy": "best-worst"}, ValueError, "`strategy='best-worst'` is not known. Choose one of: 'best-s"),
        ([GOOD], {"on_ties": "skip"}, ValueError, "`on_ties='skip'` is not known"),
        ([GOOD], {"strategy": "best-kth-worst", "k": 1}, ValueError, "`k=1` is out of range: it must lie in [2, inf"),
        ([GOOD], {"strategy": "best-kth-worst", "k": 2.0}, TypeError, "`k` must be an integer"),
        ([GOOD], {"k": 3}, ValueError, "`k=3` has no effect with `strategy='best-second-worst'`"),
        ([GOOD], {"seed": 3}, ValueError, "`seed=3` has no effect with `strategy='best-second-worst'`"),
        ([GOOD], {"min_margin": -1}, ValueError, "`min_margin=-1` is out of range"),
        ([GOOD], {"min_margin": math.nan}, ValueError, "`min_margin=nan` is out of range"),
        ([GOOD], {"responses_column": "answers"}, ValueError, "lacks the column 'answers'; its columns are ['prompt', 'res"),
        ([GOOD], {"responses_column": "answers"}, ValueError, "Name the right one with `responses_column`"),
        ([GOOD], {"scores_column": "rating"}, ValueError, "Name the right one with `scores_column`"),
        ([GOOD], {"gold_column": "human"}, ValueError, "Name the right one with `gold_column`"),
        ([{"question": "Q"}], {}, ValueError, "lacks the column 'prompt'; its columns are ['question']"),
        ([], {}, ValueError, "`dataset` is empty"),
        ([row("abc", [3, 2, 1])], {}, TypeError, "Row 0 of the dataset: 'responses' must hold lists, one value a response"),
        ([row(list("abc"), 3)], {}, TypeError, "'scores' must hold lists, one value a response, found 3"),
        ([GOOD, row(list("abc"), [3, 2])], {}, ValueError, "Row 1 of the dataset: 'responses' has 3 values and 'scores' has 2"),
        ([GOOD, row(list("abc"), [3, 2, math.inf])], {}, ValueError, "Row 1 of the dataset: 'scores' holds inf"),
        ([row(list("abc"), list("321"))], {}, TypeError, "'scores' must hold numbers, found '3' (str). Convert them."),
        ([row(list("abc"), [True, True, False])], {}, TypeError, "must hold numbers, found True (bool)"),
        ([row(list("abc"), [3, 2, 1], None)], {}, TypeError, "'prompt' must be a string or a list of {'role', 'content'}"),
        ([row([1, 2, 3], [3, 2, 1])], {}, TypeError, "a response in 'responses' must be a string, or a list of"),
        ([row([*map(say, "abc")], [3, 2, 1])], {}, TypeError, "found 'a' after a string prompt"),
        ([row([USER + say(c) for c in "abc"], [3, 2, 1], USER)], {}, ValueError, "If it repeats the prompt, cut it off"),
        ([row(list("abc"), [3, 2, 1], human=say("h"))], {"gold_column": "human"}, TypeError, "a response in 'human'"),
        ([GOOD, row(list("abc"), [2, 2, 1])], {"on_ties": "raise"}, ValueError, "Row 1 of the dataset: the scores [2.0, 2.0"),
    ],
)  # fmt: skip
def test_bad_input(rows, options, error, expected):
    with pytest.raises(error) as caught:
        build_triples(Dataset.from_list(rows), **options)
    assert expected in str(caught.value)


def test_bad_input_of_a_stream():
    with pytest.raises(ValueError, match="lacks the column 'scores'"):
        build_triples(Dataset.from_list([{"prompt": "Q", "responses": ["a"]}]).to_iterable_dataset())
    stream = Dataset.from_list([GOOD, row(list("abc"), [3, 2])]).to_iterable_dataset()
    with pytest.raises(ValueError, match="`num_proc=2` has no effect on an `IterableDataset`"):
        build_triples(stream, num_proc=2)
    with pytest.raises(ValueError, match="Row 1 of the dataset: 'responses' has 3 values"):
        list(build_triples(stream))


def test_row_number_of_another_process():
    with pytest.raises(ValueError, match="Row 3 of the dataset: 'responses' has 3 values"):
        build_triples(Dataset.from_list([*[GOOD] * 3, row(list("abc"), [3, 2])]), num_proc=2)


def test_a_dict_of_splits_is_refused():
    with pytest.raises(TypeError, match="got DatasetDict. Of a dict of splits, pass one split"):
        build_triples(DatasetDict({"train": Dataset.from_list([GOOD])}))


# ---------------------------------------------------------------- real data


def real(name):
    path = DATA / f"{name}_test.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"no real data: {path} does not exist; TRL_IFT_TEST_DATA names its folder")
    return load_dataset("json", data_files=str(path), split="train")


@pytest.mark.parametrize("name", ["scored_text", "scored_chat"])
@pytest.mark.parametrize("gold_column", [None, "reference"])
def test_real_data(name, gold_column, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    scored = {json.dumps(r["prompt"]): r for r in real(name)}
    for strategy in STRATEGIES:
        triples = build_triples(real(name), strategy=strategy, gold_column=gold_column)
        assert 0 < len(triples) <= len(scored)
        for triple in triples:
            source = scored[json.dumps(triple["prompt"])]
            given = [(s, r) for s, r in zip(source["scores"], source["responses"], strict=True)]
            assert triple["score_rejected"] == min(source["scores"]) < triple["score_chosen"]
            assert (triple["score_rejected"], triple["rejected"]) in given
            assert (triple["score_chosen"], triple["chosen"]) in given
            if gold_column:
                assert triple["reference"] == source["reference"] != triple["rejected"]
            else:
                assert triple["score_reference"] == max(source["scores"])
                assert (triple["score_reference"], triple["reference"]) in given
                assert triple["reference"] != triple["chosen"]


def test_the_human_triples_come_out_again(tmp_path, monkeypatch):
    """The set of triples that was made from the same votes elsewhere."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    triples = build_triples(real("scored_chat"), gold_column="reference")
    scored = {json.dumps(r["prompt"]): r for r in real("scored_chat")}
    published = real("triple_chat")
    assert len(triples) == len(published)
    for triple, other in zip(sorted(triples, key=str), sorted(published, key=str), strict=True):
        assert (triple["prompt"], triple["reference"]) == (other["prompt"], other["reference"])
        source = scored[json.dumps(triple["prompt"])]
        score = [source["scores"][source["responses"].index(other[name])] for name in ("chosen", "rejected")]
        assert score == [triple["score_chosen"], triple["score_rejected"]]


# ---------------------------------------------------------------- the trainer


@pytest.mark.parametrize("chat", [False, True])
def test_trl_trains_on_them(chat, tmp_path, tokenizer):
    from trl.experimental.tpo import TPOConfig, TPOTrainer

    prompt = [{"role": "user", "content": "Name a colour."}] if chat else "Name a colour."
    responses = [" Blue", " Blue is a colour.", " No."]
    data = Dataset.from_list([row(responses, [2, 3, 1], prompt), row(responses, [3, 2, 1], prompt)])
    trainer = TPOTrainer(
        model=tiny.model("llama", tokenizer),
        args=TPOConfig(
            str(tmp_path), max_steps=1, per_device_train_batch_size=2, use_cpu=True, bf16=False, report_to="none"
        ),
        train_dataset=build_triples(data),
        processing_class=tokenizer,
    )
    tokens = trainer.train_dataset[0]
    assert [tokenizer.decode(tokens[f"{name}_ids"], skip_special_tokens=True).strip() for name in TEXTS] == [
        "Blue is a colour.",
        "Blue",
        "No.",
    ]
    assert math.isfinite(trainer.train().training_loss)


# ---------------------------------------------------------------- the command


@pytest.fixture
def scored_file(tmp_path, monkeypatch):
    """A file of scored responses, in a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TRL_IFT_DEBUG", raising=False)
    rows = [
        row([" vier", " 4", " fünf"], [2 / 3, 1.0, 0.123456789012], source="x"),
        row(list("abc"), [1.0, 1.0, 1.0], source="y"),
        row(list("abc"), [3.0, 2.0, 1.0], source="z"),
    ]
    Path("scored.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return "scored.jsonl"


def run(*options, output="triples.jsonl"):
    return main(["triples", "--dataset_name", "scored.jsonl", "--output", output, *options])


@pytest.mark.parametrize("output", ["triples.jsonl", "new/triples.parquet"])
def test_command(scored_file, capsys, output):
    assert run(output=output) == 0
    out = capsys.readouterr().out
    assert out.startswith("3 rows, 2 triples, 1 dropped\n       1  chosen is not better than rejected\nWritten to ")
    assert "  reference        ' 4'\n" in out
    builder = Path(output).suffix[1:].replace("jsonl", "json")
    written = load_dataset(builder, data_files=output, split="train")
    scored = load_dataset("json", data_files=scored_file, split="train")
    assert written.to_list() == build_triples(scored).to_list()  # texts and scores to the last digit
    assert [path.name for path in Path(output).parent.glob(".*")] == []


def test_command_passes_every_option_on(scored_file, monkeypatch):
    seen = {}
    build = triples._build
    monkeypatch.setattr(triples, "_build", lambda *arguments: seen.update(arguments[1]) or build(*arguments))
    options = "--strategy best-random --seed 4 --k 2 --min_margin 0.1 --on_ties drop"
    columns = "--responses_column responses --scores_column scores --gold_column source --dataset_split train"
    assert run(*options.split(), *columns.split()) == 0
    assert seen == {
        "responses_column": "responses",
        "scores_column": "scores",
        "strategy": "best-random",
        "k": 2,
        "min_margin": 0.1,
        "on_ties": "drop",
        "gold_column": "source",
        "seed": 4,
    }


def test_existing_output(scored_file, capsys):
    Path("triples.jsonl").write_text("precious")
    assert run() == 1
    assert "`--output triples.jsonl` exists already" in capsys.readouterr().err
    assert Path("triples.jsonl").read_text() == "precious"
    assert run("--overwrite", "--min_margin", "9") == 1  # an error later leaves it alone, too
    assert Path("triples.jsonl").read_text() == "precious"
    assert run("--overwrite") == 0
    assert len(Path("triples.jsonl").read_text().splitlines()) == 2
    assert run("--overwrite", output=scored_file) == 1
    assert "is the dataset itself" in capsys.readouterr().err


def test_failed_writing_leaves_nothing_behind(scored_file, capsys):
    scored = load_dataset("json", data_files=scored_file, split="train")
    scored.add_column("day", [None, None, datetime(2024, 5, 1)]).to_parquet("dated.parquet")
    assert run("--dataset_name", "dated.parquet") == 1
    assert "type datetime cannot be written as JSON. Write a .parquet file" in capsys.readouterr().err
    assert not [path for path in Path().iterdir() if "triples" in path.name]
    assert run("--dataset_name", "dated.parquet", output="triples.parquet") == 0


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--dataset_split", "test"], "has no split 'test'; it has: 'train'"),
        (["--scores_column", "rating"], "lacks the column 'rating'"),
        (["--min_margin", "9"], "No triple can be built. 3 rows, 0 triples, 3 dropped"),
        (["--k", "3"], "`k=3` has no effect"),
        (["--dataset_name", "nowhere.jsonl"], "`nowhere.jsonl` does not exist"),
    ],
)
def test_command_errors(argv, expected, scored_file, capsys):
    assert run(*argv) == 1
    error = capsys.readouterr().err
    assert "trl-ift triples: error: " in error
    assert expected in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--output", "a.jsonl"], "the following arguments are required: --dataset_name"),
        (["--dataset_name", "a", "--output", "a.csv"], "--output a.csv must end in .jsonl or .parquet"),
        (["--dataset_name", "a", "--output", "a.jsonl", "--strategy", "best"], "invalid choice: 'best'"),
        (["--dataset_name", "a", "--output", "a.jsonl", "--over"], "unrecognized arguments: --over"),
    ],
)
def test_usage_errors(argv, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["triples", *argv])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("trl-ift triples: error: ")
    assert "\n" not in error
    assert expected in error


def test_help_imports_nothing_heavy():
    program = (
        "import sys\nfrom trl_ift.cli import main\ntry:\n    main(['triples', '--help'])\nexcept SystemExit:\n    pass\n"
        "print('HEAVY', {'torch', 'transformers', 'trl', 'datasets', 'numpy'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "--gold_column" in result.stdout
    assert "HEAVY set()" in result.stdout
