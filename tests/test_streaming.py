"""Data larger than memory: which functions take a stream, which refuse it, as docs/data.md says; and data by address."""

import json
import math
import re
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pytest
import tiny
from datasets import Dataset, IterableDataset, concatenate_datasets
from pairs import anchored, lists
from test_methods import DATA, MODELS
from trl import DatasetMixtureConfig, ScriptArguments, SFTConfig
from trl.scripts.utils import DatasetConfig

from trl_ift import METHODS, cli
from trl_ift.data import (
    build_counterfactual_pairs,
    build_pairs,
    build_triples,
    embed_prompts,
    estimate_token_weights,
    generate_completions,
    load_scores,
    score_dataset,
    score_references,
    select_top,
    store_references,
    tree_to_pairs,
    write_selection,
)
from trl_ift.latent.training import GuideTrainingArguments, train_guide
from trl_ift.latent.weigh import encode_dataset, weigh_pairs
from trl_ift.scripts.data import load_split, load_splits


PAGE = (Path(__file__).parent.parent / "docs" / "data.md").read_text().partition("## Larger than memory")[2]


@pytest.fixture(autouse=True)
def workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # it stands for every address
    return tmp_path


def claims():
    """What the page says of each function and of each method, by name: 'streams', 'stores' or 'refuses'."""
    found = {}
    for names, verdict in re.findall(r"^\| (`.+?) \| (streams|stores|refuses)\b", PAGE, re.MULTILINE):
        found |= dict.fromkeys(re.findall(r"`([\w-]+)`", names), verdict)
    return found


# ---------------------------------------------------------------- functions


def scored(rows, tokenizer, folder="scores"):
    model = tiny.model("llama", tokenizer)
    score_dataset(model, rows, folder, processing_class=tokenizer, shard_size=3)
    return load_scores(folder)


def triples(tokenizer):
    responses = [{"prompt": q, "responses": [" a", " b", " c"], "scores": [0.1, 0.2, 0.3]} for q, _ in tiny.QUESTIONS]
    return build_triples(Dataset.from_list(responses).to_iterable_dataset())


def generated(tokenizer):
    stream = tiny.prompt_completion_data().to_iterable_dataset()
    model = tiny.model("llama", tokenizer)
    return generate_completions(model, stream, "out", processing_class=tokenizer, max_new_tokens=2, shard_size=3)


def selected(tokenizer):
    scores = scored(tiny.prompt_completion_data(), tokenizer)
    return write_selection(
        "selected", tiny.prompt_completion_data().to_iterable_dataset(), scores, scores, fraction=0.5
    )


def tree_pairs(tokenizer):
    action = [{"role": "assistant", "content": "a"}]
    tree = {"prompt": "q", "turns": [{"chosen": "c", "rejected": action, "feedback": "no"}]}
    stream = Dataset.from_list([{"tree": question} for question, _ in tiny.QUESTIONS]).to_iterable_dataset()
    rows = stream.map(lambda row: {"rows": tree_to_pairs({**tree, "prompt": row["tree"]})})
    return [pair for row in rows for pair in row["rows"]]


def pairs():
    return tiny.preference_data().to_iterable_dataset()


# Name -> (call with a stream; number of rows that come of it, or the message of the refusal)
FUNCTIONS = {
    "generate_completions": (generated, 8),
    "build_triples": (triples, 8),
    "tree_to_pairs": (tree_pairs, 8),
    "score_dataset": (lambda t: scored(tiny.prompt_completion_data().to_iterable_dataset(), t), 8),
    "select_top": (lambda t: select_top(pairs(), np.arange(8), fraction=0.5), 4),
    "write_selection": (selected, 4),
    "build_pairs": (
        lambda t: build_pairs(pairs(), "out", processing_class=t),
        r"expected a `Dataset`.*can be stored with `Dataset.from_generator`",
    ),
    "build_counterfactual_pairs": (
        lambda t: build_counterfactual_pairs(pairs(), None, desired="x", undesired="y"),
        r"expected a `Dataset`",
    ),
    "estimate_token_weights": (
        lambda t: estimate_token_weights(pairs(), tiny.model("llama", t), tiny.model("llama", t), processing_class=t),
        r"expected a `Dataset`|must be a `Dataset`",
    ),
    "score_references": (
        lambda t: score_references(pairs(), tiny.model("llama", t), processing_classes=[t]),
        r"expected a `Dataset`.*a stream can be stored",
    ),
    "store_references": (
        lambda t: store_references(tiny.model("llama", t), pairs(), "references", processing_class=t),
        r"expected a `Dataset`.*a stream can be stored",
    ),
    "embed_prompts": (lambda t: embed_prompts(pairs()), r"must be a `Dataset`, got `IterableDataset`"),
    "encode_dataset": (
        lambda t: encode_dataset(None, pairs(), "codes", column="chosen"),
        r"expected a `Dataset`.*a stream can",
    ),
    "weigh_pairs": (lambda t: weigh_pairs(pairs()), r"expected a `Dataset`.*a stream can"),
    "train_guide": (
        lambda t: train_guide("none", "none", pairs(), GuideTrainingArguments("guide", use_cpu=True, bf16=False)),
        r"expected a `datasets.Dataset`.*of a stream, take",
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name, tokenizer):
    call, expected = FUNCTIONS[name]
    if isinstance(expected, int):
        assert claims()[name] in ("streams", "stores")
        result = call(tokenizer)
        assert isinstance(result, IterableDataset) == (name == "build_triples")
        assert len(list(result)) == expected
    else:
        assert claims()[name] == "refuses"
        with pytest.raises((TypeError, ValueError), match=expected):
            call(tokenizer)


# ---------------------------------------------------------------- trainers

WEIGHTS = [1.0, 0.5, 2.0, 1.5] * 2
# Methods that need all rows before training -> (the message, what the page says to do: columns to have, and settings)
REFUSING = {
    "relative-po": (
        r"is a stream and lacks the column 'prompt_embedding'.*embed_prompts",
        lambda: (embed_prompts(tiny.preference_data()), {}),
    ),
    "mpo": (r"is an `IterableDataset`, and `logit_mode='reference'` stores the reference", lambda: (anchored(), {})),
    "ld-align": (
        r"is a stream, and the weights are computed over all of it.*weigh_pairs",
        lambda: (tiny.preference_data().add_column("weight", WEIGHTS), {}),
    ),
    "exo": (
        r"is an `IterableDataset`, whose reference log-probs cannot be stored.*precompute_ref_log_probs=False",
        lambda: (lists(), {"precompute_ref_log_probs": False}),
    ),
}


START = "the beginning"


def stream_of(data, read):
    """The rows of a dataset as a stream, which counts those that were read, and how often it was begun."""

    def rows(data):
        read.append(START)
        for row in data:
            read.append(row)
            yield row

    return IterableDataset.from_generator(rows, gen_kwargs={"data": data}, features=data.features)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_trainer(method, tokenizer, tmp_path):
    """A step on a stream, whose rows are prepared as they come."""
    given = DATA.get(method.name, lambda settings: {"train_dataset": tiny.preference_data()})({})
    data = given.pop("train_dataset")
    model = MODELS.get(method.name, lambda tokenizer: tiny.model("llama", tokenizer))(tokenizer)

    def build(data, **settings):
        args = method.config_class(
            str(tmp_path / "run"), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=1,
            per_device_train_batch_size=2, save_strategy="no", logging_steps=1, **settings,
        )  # fmt: skip
        return method.trainer_class(model=model, args=args, train_dataset=data, processing_class=tokenizer, **given)

    assert claims()[method.name] == ("refuses" if method.name in REFUSING else "streams")
    settings = {}
    if method.name in REFUSING:
        message, remedy = REFUSING[method.name]
        with pytest.raises(ValueError, match=message):
            build(stream_of(data, []))
        data, settings = remedy()
    trainer = build(stream_of(concatenate_datasets([data] * 1000), read := []), **settings)
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])
    assert 0 < len(read) < 4000  # of 8000: checks look at the first thousand, a few times
    assert read.count(START) <= 15, read.count(START)  # half of them by TRL


def test_every_method_stands_in_the_table():
    others = {"tree_to_sft", "cross_turn_pairs"}  # as tree_to_pairs
    assert {method.name for method in METHODS} | set(FUNCTIONS) | others == set(claims())


# ---------------------------------------------------------------- addresses and patterns


@pytest.fixture
def stored(tmp_path):
    """Eight rows in two files: in a folder, and in fsspec's memory, which stands for object storage."""
    memory = fsspec.filesystem("memory")
    (tmp_path / "shards").mkdir()
    for number in range(2):
        half = tiny.preference_data().select(range(4 * number, 4 * number + 4))
        for suffix, write in (("jsonl", half.to_json), ("parquet", half.to_parquet)):
            path = tmp_path / "shards" / f"{number}.{suffix}"
            write(str(path))
            memory.pipe(f"/bucket/{number}.{suffix}", path.read_bytes())
    yield tmp_path
    memory.rm("/bucket", recursive=True)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("memory://bucket/0.jsonl", 4),
        ("memory://bucket/*.parquet", 8),
        ("file://{folder}/shards/1.parquet", 4),
        ("shards/*.jsonl", 8),
        ("{folder}/**/*.parquet", 8),
        ("shards/[1-9].jsonl", 4),
    ],
)
def test_addresses(name, rows, streaming, stored):
    data = load_split(name.format(folder=stored), "train", streaming=streaming)
    assert isinstance(data, IterableDataset) == streaming
    expected = tiny.preference_data().to_list()
    assert [dict(row) for row in data] == (expected if rows == 8 else expected[4:] if "1" in name else expected[:4])


def test_commands_take_them(stored, capsys):
    """A mixture of addresses, and a command."""
    mixture = DatasetMixtureConfig(
        datasets=[DatasetConfig(path="memory://bucket/0.jsonl"), DatasetConfig(path="shards/1.*quet")]
    )
    train_dataset, _ = load_splits(
        ScriptArguments(dataset_name=None), mixture, SFTConfig("out", use_cpu=True, bf16=False)
    )
    assert train_dataset.to_list() == tiny.preference_data().to_list()
    rows = [{"prompt": q, "responses": [" a", " b", " c"], "scores": [0.1, 0.2, 0.3]} for q, _ in tiny.QUESTIONS]
    fsspec.filesystem("memory").pipe("/bucket/scored.jsonl", "\n".join(map(json.dumps, rows)).encode())
    arguments = [
        "--dataset_name",
        "memory://bucket/scored.jsonl",
        "--output",
        "triples.parquet",
    ]
    assert cli.main(["triples", *arguments]) == 0, capsys.readouterr().err
    assert len(Dataset.from_parquet("triples.parquet")) == 8


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("memory://bucket/0.txt", ValueError, "is of no known kind. Expected one of .jsonl"),
        ("s3://bucket/folder", ValueError, "is of no known kind"),
        ("shards/*.json", FileNotFoundError, r"No file matches `shards/\*.json`"),
        ("shards/0.*", ValueError, "matches files of several kinds: json, parquet. Name one kind"),
        ("memory://bucket/9.jsonl", FileNotFoundError, "9.jsonl"),
        ("shards/null*.json", ValueError, "begins with b'null'"),
    ],
)
def test_errors(name, error, message, stored):
    (stored / "shards" / "null.json").write_text("null")
    if "*.json" in name and "null" not in name:
        (stored / "shards" / "null.json").unlink()
    with pytest.raises(error, match=message):
        load_split(name, "train")
