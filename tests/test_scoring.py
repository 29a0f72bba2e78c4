"""Scores of rows: their values, what they do not depend on, interruptions, damage, refusals, the command."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scoring_killed
import tiny
import torch
import two_processes_scoring
from datasets import Dataset, IterableDataset, load_dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from trl_ift.data import inference, scoring, shards
from trl_ift.data.lobass import learnability, select_top
from trl_ift.data.scoring import DIRECT_PROMPT, RowOptions, Scorer, load_scores, main, score_dataset


COLUMNS = ["index", "row_hash", "token_hash", "num_tokens", "nll_sum", "nll"]
ROWS = tiny.prompt_completion_data()
# All questions with all answers: rows of many lengths
MANY = Dataset.from_list(
    [
        {"prompt": question, "completion": f" {answer}"}
        for question, _ in tiny.QUESTIONS
        for _, answer in tiny.QUESTIONS
    ]
).select(range(0, 64, 3))
NAN = float("nan")


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name in ("TRL_IFT_DEBUG", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def llama(tokenizer):
    """A model with likely and unlikely tokens. It is shared: scoring has to give it back as it was."""
    return lively(tokenizer)


@pytest.fixture
def score(tokenizer):
    """`score_dataset` with the shared tokenizer."""

    def call(model, dataset=ROWS, output_dir=None, **options):
        return score_dataset(model, dataset, output_dir, **{"processing_class": tokenizer} | options)

    return call


@pytest.fixture
def no_loading(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(inference, "create_model_from_path", load)


@pytest.fixture
def no_scoring(monkeypatch):
    def run(*args, **kwargs):
        raise AssertionError("the model was run")

    monkeypatch.setattr(scoring, "sequence_log_probs", run)


def lively(tokenizer, family="llama", **overrides):
    """A model with likely and unlikely tokens: Xavier weights alone give nearly equal logits."""
    model = tiny.model(family, tokenizer, **overrides)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)
    return model


def lora(model, **options):
    options = {"target_modules": ["q_proj", "v_proj"], "r": 4} | options
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))


def own(tokenizer, **options):
    """A tokenizer with the same vocabulary that may be changed."""
    options = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>"} | options
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **options)
    made.chat_template = tokenizer.chat_template
    return made


def contents(folder):
    """The bytes of all files but the manifest."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != "manifest.json"}


def assert_close(found, expected, rel=1e-6):
    """The same rows, tokens and counts, and losses up to rounding."""
    for column in ("index", "row_hash", "token_hash", "num_tokens"):
        assert found[column][:] == expected[column][:]
    for column in ("nll_sum", "nll"):
        np.testing.assert_allclose(found[column][:], expected[column][:], rtol=rel, atol=0)


def assert_identical(found, expected):
    assert found.column_names == expected.column_names
    for column in expected.column_names:
        np.testing.assert_array_equal(np.asarray(found[column][:]), np.asarray(expected[column][:]))


def counted(monkeypatch):
    """Return a list that grows with each shard that the model is run for, by its number of rows."""
    calls, original = [], scoring.sequence_log_probs

    def counting(model, sequences, *args):
        calls.append(len(sequences))
        return original(model, sequences, *args)

    monkeypatch.setattr(scoring, "sequence_log_probs", counting)
    return calls


# ---------------------------------------------------------------- the values


KINDS = {
    "text": tiny.text_data,
    "prompt-completion": tiny.prompt_completion_data,
    "messages": tiny.messages_data,
    "conversational": tiny.conversational_data,
}


def tokens_of(row, tokenizer):
    """Token ids and labels of a row, spelt out."""
    if "input_ids" in row:
        return row["input_ids"], row.get("labels", row["input_ids"])
    if "text" in row:
        ids = tokenizer(row["text"] + tokenizer.eos_token)["input_ids"]
        return ids, ids
    if "messages" in row:
        ids = tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"]
        return ids, ids
    if isinstance(row["prompt"], str):
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
    else:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
    assert ids[: len(prompt)] == prompt
    return ids, [-100] * len(prompt) + ids[len(prompt) :]


@torch.no_grad()
def explicit_loss(model, ids, labels):
    """The summed loss, by a float64 log-softmax of all logits, and the number of tokens."""
    labels = torch.tensor(labels[1:])
    log_probs = model(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    scored = labels != -100
    return -log_probs[scored].gather(-1, labels[scored, None]).sum().item(), int(scored.sum())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-neox", "qwen3-moe"])
def test_scores_are_those_of_explicit_logits(family, tokenizer, score):
    model = lively(tokenizer, family)
    # the grouped products of the experts are not there in float64
    double = copy.deepcopy(model) if family == "qwen3-moe" else copy.deepcopy(model).double()
    for kind in ("text", "prompt-completion", "messages", "conversational", "tokenized", "ids"):
        if kind in KINDS:
            rows = KINDS[kind]()
        else:
            rows = tiny.tokenized_data(tokenizer)
            rows = rows.select_columns(["input_ids"]) if kind == "ids" else rows
        found = score(model, rows, batch_tokens=150)
        assert found.column_names == COLUMNS
        assert found["index"][:] == list(range(8))
        for row, loss in zip(rows, found, strict=True):
            nll_sum, number = explicit_loss(double, *tokens_of(row, tokenizer))
            assert number > 1
            assert loss["num_tokens"] == number
            assert loss["nll_sum"] == pytest.approx(nll_sum, rel=2e-6)
            assert loss["nll"] == pytest.approx(nll_sum / number, rel=2e-6)
        assert len(set(found["row_hash"])) == len(set(found["token_hash"])) == 8


TEMPLATE = """{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}
<|im_end|>{% endgeneration %}{% else %}{{ message.role }}: {{ message.content }} {{ tools }} {{ mood }}
{% endif %}{% endfor %}{% if add_generation_prompt %}{% endif %}"""


def _conversations():
    names = {"user": "human", "assistant": "gpt"}
    rows = [
        [{"from": names[message["role"]], "value": message["content"]} for message in row["messages"]]
        for row in tiny.messages_data()
    ]
    return Dataset.from_list([{"conversations": row} for row in rows])


def _turns():
    """Conversations with several answers each."""
    rows = tiny.messages_data()["messages"][:]
    return Dataset.from_list([{"messages": rows[i] + rows[(i + 3) % 8]} for i in range(8)])


def _tools():
    rows = tiny.conversational_data().to_list()
    return Dataset.from_list(
        [
            row | {"tools": json.dumps([{"name": f"tool-{i}"}]), "chat_template_kwargs": {"mood": "glad" * i}}
            for i, row in enumerate(rows)
        ]
    )


def _masked(tokenizer):
    rows = tiny.tokenized_data(tokenizer).remove_columns("labels").to_list()
    return Dataset.from_list(
        [row | {"completion_mask": [int(i % 3 > 0) for i in range(len(row["input_ids"]))]} for row in rows]
    )


# name -> dataset (of a tokenizer), options of SFTConfig
AGAINST_TRL = {
    "default": (lambda t: tiny.prompt_completion_data(), {}),
    "keep_start": (lambda t: tiny.prompt_completion_data(), {"max_length": 16}),
    "keep_end": (lambda t: tiny.prompt_completion_data(), {"max_length": 12, "truncation_mode": "keep_end"}),
    "no truncation": (lambda t: tiny.prompt_completion_data(), {"max_length": None}),
    "whole rows": (lambda t: tiny.prompt_completion_data(), {"completion_only_loss": False}),
    "conversational": (lambda t: tiny.conversational_data(), {}),
    "assistant": (lambda t: _turns(), {"assistant_only_loss": True}),
    "assistant, cut": (lambda t: _turns(), {"assistant_only_loss": True, "max_length": 95}),
    "assistant, completion": (lambda t: tiny.conversational_data(), {"assistant_only_loss": True}),
    "assistant, file": (lambda t: _turns(), {"assistant_only_loss": True, "chat_template_path": "own.jinja"}),
    "file": (lambda t: tiny.messages_data(), {"chat_template_path": "own.jinja"}),
    "tools": (lambda t: _tools(), {"chat_template_path": "own.jinja"}),
    "eos": (lambda t: tiny.prompt_completion_data(), {"eos_token": "<|endoftext|>"}),
    "text": (lambda t: tiny.text_data(), {}),
    "another column": (lambda t: tiny.text_data().rename_column("text", "story"), {"dataset_text_field": "story"}),
    "conversations": (lambda t: _conversations(), {}),
    "tokenized": (lambda t: tiny.tokenized_data(t), {"max_length": 20}),
    "mask": (lambda t: _masked(t), {"completion_only_loss": True}),
    "mask, unused": (lambda t: _masked(t), {}),
    "moe": (lambda t: tiny.prompt_completion_data(), {"router_aux_loss_coef": 0.0}),
}


@pytest.mark.parametrize("name", AGAINST_TRL)
def test_scores_are_the_losses_of_trl(name, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.jinja").write_text(TEMPLATE)
    make, options = AGAINST_TRL[name]
    rows, family = make(tokenizer), "qwen3-moe" if name == "moe" else "llama"
    args = SFTConfig(
        "sft", use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, per_device_eval_batch_size=1, **options
    )
    numbered = rows.add_column("number", list(range(len(rows))))
    trainer = SFTTrainer(
        model=lively(tokenizer, family),
        args=args,
        train_dataset=rows.take(1),
        eval_dataset=numbered,
        processing_class=own(tokenizer),
    )
    losses = [
        trainer.prediction_step(trainer.model.eval(), batch, prediction_loss_only=True)[0].item()
        for batch in trainer.get_eval_dataloader()
    ]
    assert np.mean(losses) == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)
    expected = np.full(len(rows), NAN)
    expected[trainer.eval_dataset["number"][:]] = losses
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = score_dataset(lively(tokenizer, family), rows, processing_class=own(tokenizer), args=args)
    np.testing.assert_allclose(found["nll"][:], expected, rtol=1e-5)

    dropped = int(np.isnan(expected).sum())
    assert (dropped > 0) == (name in ("keep_start", "tokenized", "assistant, cut"))
    assert [f"{dropped} have no scored token" in str(w.message) for w in caught].count(True) == (dropped > 0)
    # the other ways to say the same
    only = RowOptions(**{field.name: getattr(args, field.name) for field in fields(RowOptions)})
    assert RowOptions.of(args) == only
    for scorer_args in (args, only):
        scorer = Scorer(lively(tokenizer, family), own(tokenizer), scorer_args)
        for row, other in zip(found, scorer(rows.to_list()), strict=True):
            row.pop("index")
            np.testing.assert_equal(other, row)


def test_options_are_those_of_trl():
    config = SFTConfig.__dataclass_fields__
    for field in fields(RowOptions):
        assert field.default == config[field.name].default, field.name
    assert RowOptions.of(None) == RowOptions() == RowOptions.of(SFTConfig("x", use_cpu=True, bf16=False))
    parsed = scoring.make_parser().parse_args(["--model_name_or_path=m", "--dataset_name=d", "--output_dir=o"])
    assert scoring.row_options(parsed) == RowOptions()
    given = ["--model_name_or_path=m", "--dataset_name=d", "--output_dir=o", "--max_length=none", "--eos_token=a"]
    given += ["--truncation_mode=keep_end", "--completion_only_loss=False", "--assistant_only_loss"]
    parsed = scoring.make_parser().parse_args([*given, "--dataset_text_field=story"])
    assert scoring.row_options(parsed) == RowOptions(None, "keep_end", False, True, "story", "a")


def test_settings_that_matter_do_change_the_scores(llama, score):
    """So that the comparisons above compare something."""
    plain = score(llama)["nll"][:]
    for options in (
        {"completion_only_loss": False},
        {"max_length": 30},
        {"max_length": 12, "truncation_mode": "keep_end"},
    ):
        assert not np.allclose(score(llama, args=RowOptions(**options))["nll"][:], plain, rtol=1e-3, equal_nan=True)


def test_scorer(llama, tokenizer, score):
    scorer = Scorer(llama, tokenizer, batch_tokens=100)
    assert scorer([]) == []
    found = scorer(MANY.to_list())
    assert [set(row) for row in found] == [set(COLUMNS) - {"index"}] * len(MANY)
    assert_identical(
        score(llama, MANY, batch_tokens=100).remove_columns("index"),
        Dataset.from_list(found).select_columns(COLUMNS[1:]),
    )
    lengths = [len(tokens_of(row, tokenizer)[0]) for row in MANY]
    assert scorer.tokens == sum(lengths)
    assert scorer.tokens <= scorer.padded_tokens <= len(MANY) * max(lengths)
    # columns that TRL does not read play no part
    assert scorer([row | {"id": 3, "score": None} for row in MANY.to_list()]) == found
    with pytest.raises(ValueError, match="`batch_tokens=0` is out of range"):
        Scorer(llama, tokenizer, batch_tokens=0)
    with pytest.raises(TypeError, match="`model` is a int"):
        Scorer(3, tokenizer)


def test_hashes(llama, tokenizer, score):
    """`row_hash` names the content, `token_hash` the tokens and labels."""
    scorer = Scorer(llama, tokenizer)
    base = {"prompt": "Is water", "completion": " wet?"}
    first, same, split, other = scorer(
        [
            base,
            dict(reversed(base.items())),
            {"prompt": "Is ", "completion": "water wet?"},
            base | {"completion": " wet"},
        ]
    )
    assert same == first
    assert len({row["row_hash"] for row in (first, split, other)}) == 3
    whole = Scorer(llama, tokenizer, RowOptions(completion_only_loss=False))([base])[0]
    cut = Scorer(llama, tokenizer, RowOptions(max_length=4))([base])[0]
    assert whole["row_hash"] == cut["row_hash"] == first["row_hash"]
    assert len({row["token_hash"] for row in (first, other, whole, cut)}) == 4
    # fields of messages that Arrow fills with nulls do not count
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    null = [message | {"tool_calls": None} for message in messages]
    turned = [dict(reversed(message.items())) for message in messages]
    named = scorer([{"messages": messages}])[0]["row_hash"]
    for others in (null, turned):
        assert scorer([{"messages": others}])[0]["row_hash"] == named
    # tokens and labels count both
    masks = [([5, 6, 7], [-100, -100, 7]), ([5, 8, 7], [-100, -100, 7]), ([5, 6, 7], [-100, 6, 7])]
    tokens = scorer([{"input_ids": ids, "labels": labels} for ids, labels in masks])
    assert len({row["token_hash"] for row in tokens}) == 3
    # a row has the same names in every dataset
    assert score(llama, ROWS)["row_hash"][3] == score(llama, ROWS.select([3]))["row_hash"][0]
    reordered = score(llama, ROWS.select_columns(["completion", "prompt"]))
    assert reordered["row_hash"][:] == score(llama, ROWS)["row_hash"][:]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype(dtype, model_dir, tmp_path):
    found = score_dataset(model_dir, ROWS, tmp_path / "out", model_init_kwargs={"dtype": dtype})
    exact = score_dataset(model_dir, ROWS)
    assert shards.read_manifest(tmp_path / "out")["settings"]["dtype"] == dtype
    assert (found["nll"][:] == exact["nll"][:]) == (dtype == "float32")
    np.testing.assert_allclose(found["nll"][:], exact["nll"][:], rtol=0.02)


# ---------------------------------------------------------------- what the scores do not depend on


@pytest.fixture(scope="module")
def both(tokenizer):
    """Scores of many rows under two models, with the largest batches."""
    models = lively(tokenizer), lively(tokenizer, seed=1)
    return models, [score_dataset(model, MANY, processing_class=tokenizer) for model in models]


def subset(pair):
    return select_top(MANY, learnability(*pair), fraction=0.3)[:]


@pytest.mark.parametrize(
    "options",
    [
        {"batch_tokens": 1},
        {"batch_tokens": 64},
        {"batch_tokens": 300},
        *({"shard_size": n} for n in (1, 3, 21, 22, 23)),
    ],
    ids=str,
)
def test_layout_does_not_matter(options, both, score):
    models, expected = both
    found = [score(model, MANY, **options) for model in models]
    for scores, others in zip(found, expected, strict=True):
        assert_close(scores, others)
    assert subset(found) == subset(expected)


def test_the_budget_of_a_batch(llama, tokenizer, score):
    shapes = []

    def note(module, args, kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))
        assert not torch.is_grad_enabled()

    hook = llama.register_forward_pre_hook(note, with_kwargs=True)
    try:
        score(llama, MANY, batch_tokens=80)
        assert sum(rows for rows, _ in shapes) == len(MANY)
        assert max(rows * length for rows, length in shapes) <= 80
        assert len(shapes) < len(MANY) / 1.5
        shapes.clear()
        score(llama, MANY, batch_tokens=30)  # less than the longest row, which is a batch of its own
        assert {rows for rows, length in shapes if rows * length > 30} == {1}
    finally:
        hook.remove()


def test_padding_side_does_not_matter(tokenizer, llama, score):
    expected = score(llama, MANY)
    for options in ({"padding_side": "left"}, {"padding_side": "right"}, {"pad_token": None}):
        assert_identical(score(llama, MANY, processing_class=own(tokenizer, **options)), expected)


def test_parts_make_a_whole(tmp_path, llama, score):
    """Independent jobs, in any order: the same files, and each takes its own shards only."""
    whole = score(llama, MANY, tmp_path / "whole", shard_size=5)
    files = contents(tmp_path / "whole")
    assert sorted(files) == [f"scores-0000{i}.parquet" for i in range(5)]
    for number, order in ((1, [0]), (2, [1, 0]), (3, [1, 2, 0]), (6, range(6))):
        folder = tmp_path / f"parts-{number}"
        for done, part in enumerate(order, 1):
            found = score(llama, MANY, folder, shard_size=5, part=(part, number))
            mine = {f"scores-0000{i}.parquet" for i in range(5) if i % number in set(order[:done])}
            assert set(contents(folder)) == mine
            assert (found is None) == (len(mine) < 5)
        assert_identical(found, whole)
        assert contents(folder) == files
    with pytest.raises(ValueError, match="incomplete: 2 of 5 shards are missing .the first is scores-00001.parquet."):
        score(llama, MANY, tmp_path / "half", shard_size=5, part=(0, 2))
        load_scores(tmp_path / "half")


@pytest.mark.parametrize("known", [True, False])
def test_streams_give_the_same(known, tmp_path, llama, score):
    whole = score(llama, MANY, tmp_path / "whole", shard_size=3)
    stream = MANY.to_iterable_dataset(num_shards=2) if known else IterableDataset.from_generator(lambda: iter(MANY))
    found = score(llama, stream, tmp_path / "stream", shard_size=3)
    assert_identical(found, whole)
    files = contents(tmp_path / "stream")
    assert json.loads(files.pop("rows.json")) == {"rows": len(MANY)}
    assert files == contents(tmp_path / "whole")
    settings = shards.read_manifest(tmp_path / "stream")["settings"]
    assert settings["rows"] is settings["dataset"] is None
    assert_identical(score(llama, stream, shard_size=3), whole)
    # in parts
    assert score(llama, stream, tmp_path / "parts", shard_size=3, part=(1, 2)) is None
    assert_identical(score(llama, stream, tmp_path / "parts", shard_size=3, part=(0, 2)), whole)


def test_format_of_the_dataset_does_not_matter(llama, score, tokenizer):
    rows = tiny.tokenized_data(tokenizer)
    expected = score(llama, rows)
    for kind in ("torch", "numpy", "pandas", "arrow"):
        assert_identical(score(llama, rows.with_format(kind)), expected)
    assert_identical(score(llama, rows.to_iterable_dataset().with_format("torch")), expected)


@pytest.mark.slow
def test_two_processes(model_dir, tmp_path):
    script = str(Path(two_processes_scoring.__file__))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    (tmp_path / "out").mkdir()
    done = subprocess.run([*command, model_dir, str(tmp_path / "out")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one = score_dataset(model_dir, ROWS, tmp_path / "one", shard_size=2)
    reports = [json.loads((tmp_path / "out" / f"process-{rank}.json").read_text()) for rank in (0, 1)]
    for rank, report in enumerate(reports):
        for rows in report["rows"].values():
            assert rows == one[:]
        own_shards = [f"{name}/scores-0000{i}.parquet" for name in ("map", "stream") for i in (rank, rank + 2)]
        assert [path for path in report["written"] if path.startswith(("map/", "stream/"))] == own_shards
        assert len(report["written"]) == 8  # without a folder each scores all
    for name in ("map", "stream"):
        files = contents(tmp_path / "out" / name)
        assert (files.pop("rows.json", None) is None) == (name == "map")
        assert files == contents(tmp_path / "one")


# ---------------------------------------------------------------- the folder, interruptions and damage


def test_folder(tmp_path, llama, score, monkeypatch):
    calls = counted(monkeypatch)
    folder = tmp_path / "new" / "out"
    found = score(llama, ROWS, folder, shard_size=3)
    assert sorted(os.listdir(folder)) == ["manifest.json", *(f"scores-0000{i}.parquet" for i in range(3))]
    assert calls == [3, 3, 2]
    for loaded in (
        load_scores(folder),
        load_scores(str(folder)),
        load_dataset("parquet", data_files=f"{folder}/scores-*.parquet", split="train"),
    ):
        assert_identical(loaded, found)
        assert loaded.features == found.features
    manifest = shards.read_manifest(folder)
    assert manifest["format"] == "scores-1"
    assert manifest["settings"]["rows"] == 8
    assert {"tokenizer", "max_length", "truncation_mode", "dataset", "policy", "dtype"} <= set(manifest["settings"])
    assert manifest["settings"]["completion_only_loss"] is True
    # a complete folder is only read
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_identical(score(llama, ROWS, folder, shard_size=3), found)
    with pytest.warns(UserWarning, match="made with `batch_tokens=8192`: the rest may be rounded otherwise"):
        assert_identical(score(llama, ROWS, folder, shard_size=3, batch_tokens=17), found)
    assert len(calls) == 3
    with pytest.raises(ValueError, match="holds no scores: it has no manifest.json"):
        load_scores(tmp_path)


def test_home_folder(tmp_path, llama, score, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = score(llama, ROWS, "~/scores")
    assert (tmp_path / "scores" / "manifest.json").is_file()
    assert_identical(load_scores("~/scores"), found)


def test_lost_shards_are_scored_anew(tmp_path, llama, score, monkeypatch):
    folder = tmp_path / "out"
    whole = score(llama, MANY, folder, shard_size=5)
    files = contents(folder)
    kept = folder / "scores-00000.parquet"
    times = kept.stat().st_mtime_ns
    calls = counted(monkeypatch)
    for lost in ([1], [4], [0, 2, 3]):
        for shard in lost:
            (folder / f"scores-0000{shard}.parquet").unlink()
        with pytest.raises(ValueError, match=f"incomplete: {len(lost)} of 5 shards are missing"):
            load_scores(folder)
        assert_identical(score(llama, MANY, folder, shard_size=5), whole)
        assert contents(folder) == files
        assert (kept.stat().st_mtime_ns == times) == (0 not in lost)
    assert calls == [5, 2, 5, 5, 5]


def test_interruption(tmp_path, llama, score, capsys, monkeypatch):
    """Ctrl-C in the third shard: the first two are kept, the third is not there."""
    whole = score(llama, ROWS, tmp_path / "whole", shard_size=2)
    for number, folder in enumerate((tmp_path / "out", None)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            original, calls = scoring.sequence_log_probs, []

            def interrupted(*args, original=original, calls=calls):
                calls.append(None)
                if len(calls) == 3:
                    raise KeyboardInterrupt
                return original(*args)

            patch.setattr(scoring, "sequence_log_probs", interrupted)
            score(llama, ROWS, folder, shard_size=2)
        said = capsys.readouterr().err
        assert ("are kept in" in said) == (number == 0)
    assert sorted(contents(tmp_path / "out")) == ["scores-00000.parquet", "scores-00001.parquet"]
    calls = counted(monkeypatch)
    assert_identical(score(llama, ROWS, tmp_path / "out", shard_size=2), whole)
    assert calls == [2, 2]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.fixture(scope="module")
def cut_off(model_dir, tmp_path_factory):
    """How the runs of the script ended, and their folders."""
    folder = tmp_path_factory.mktemp("cut-off")
    command = [sys.executable, str(Path(scoring_killed.__file__)), model_dir, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines(), folder


@pytest.mark.slow
@pytest.mark.parametrize("how", ["write", "forward"])
def test_killed_and_restarted(how, cut_off, model_dir, tmp_path):
    """SIGKILL, in the writing of a shard or in the model: the files are those of an uninterrupted run."""
    said, folder = cut_off[0], cut_off[1] / how
    assert f"{how} {-signal.SIGKILL}" in said
    found = set(contents(folder))
    if how == "write":
        (scratch,) = found - {"scores-00000.parquet"}
        assert scratch.startswith(".scores-00001.parquet.")
        assert scratch.endswith(".tmp")
    else:
        assert found == {"scores-00000.parquet", "scores-00001.parquet"}
    times = {path: path.stat().st_mtime_ns for path in folder.glob("scores-*")}
    with pytest.raises(ValueError, match=f"incomplete: {4 - len(times)} of 4 shards are missing"):
        load_scores(folder)
    went_on = score_dataset(model_dir, ROWS, folder, **scoring_killed.OPTIONS)
    whole = score_dataset(model_dir, ROWS, tmp_path / "whole", **scoring_killed.OPTIONS)
    assert_identical(went_on, whole)
    assert contents(folder) == contents(tmp_path / "whole")  # no scratch file is left
    assert shards.read_manifest(folder) == shards.read_manifest(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.slow
def test_full_disk(cut_off, model_dir, tmp_path):
    said, folder = cut_off[0], cut_off[1] / "full"
    (early,) = (said[i - 1] for i, line in enumerate(said) if line == "none 1")  # before the model was loaded
    assert early.startswith(f"`output_dir='{cut_off[1]}/none'` cannot be written: [Errno 27] File too large")
    assert not list((cut_off[1] / "none").iterdir())
    (late,) = (said[i - 1] for i, line in enumerate(said) if line == "full 1")
    assert "scores-00001.parquet` cannot be written: File too large. What is finished is kept" in late
    assert set(contents(folder)) == {"scores-00000.parquet"}  # neither half a shard nor a scratch file
    with pytest.raises(ValueError, match="incomplete: 3 of 4 shards are missing"):
        load_scores(folder)
    whole = score_dataset(model_dir, ROWS, tmp_path / "whole", **scoring_killed.OPTIONS)
    assert_identical(score_dataset(model_dir, ROWS, folder, **scoring_killed.OPTIONS), whole)
    assert contents(folder) == contents(tmp_path / "whole")


def test_folder_that_cannot_be_written(tmp_path, model_dir, score, no_loading):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="cannot be written: .*Free some space, or choose another folder"):
            score(model_dir, ROWS, folder)
    assert (tmp_path / "file").read_text() == "mine"


def _cut(data):
    return data[: len(data) // 2]


def _flip(data):
    """Another value in a page of data; the file is still whole."""
    found = bytearray(data)
    found[len(found) // 6] ^= 0x10
    return bytes(found)


def _other_index(data):
    """Whole and with valid checksums, but of other rows."""
    table = pq.read_table(pa.BufferReader(data))
    table = table.set_column(0, "index", pa.array([i + 1 for i in table["index"].to_pylist()]))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def _other_table(data):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"index": [3, 4, 5]}), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    "damage",
    [_cut, _flip, lambda data: b"", lambda data: b"PAR1" * 9, _other_table],
    ids=["cut", "flip", "empty", "junk", "table"],
)
def test_damaged_shards(damage, tmp_path, llama, score, monkeypatch):
    folder = tmp_path / "out"
    whole = score(llama, ROWS, folder, shard_size=3)
    files = contents(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    damaged = folder / "scores-00001.parquet"
    damaged.write_bytes(damage(files[damaged.name]))
    with pytest.raises(ValueError, match=f"The shard `{damaged}` is damaged. Run the scoring again .*Only this one"):
        load_scores(folder)
    calls = counted(monkeypatch)
    with pytest.warns(UserWarning, match=f"The shard '{damaged}' is damaged: it is scored anew"):
        assert_identical(score(llama, ROWS, folder, shard_size=3), whole)
    assert calls == [3]
    assert contents(folder) == files
    del times[damaged]
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_every_flipped_byte_of_the_data_is_found(tmp_path, llama, score):
    """Or is in a place that the values do not depend on."""
    folder = tmp_path / "out"
    whole = score(llama, ROWS, folder)
    path = folder / "scores-00000.parquet"
    data, messages = path.read_bytes(), []
    for place in range(0, len(data), 17):
        changed = bytearray(data)
        changed[place] ^= 0x10
        path.write_bytes(bytes(changed))
        try:
            assert_identical(load_scores(folder), whole)
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert {f"The shard `{path}` is damaged" in message for message in messages} == {True}


def test_swapped_shards(tmp_path, llama, score):
    """Of equal rows too: a shard has the numbers of its rows."""
    same = Dataset.from_list([ROWS[0]] * 4)
    folder = tmp_path / "out"
    score(llama, same, folder, shard_size=2)
    first, second = (folder / f"scores-0000{i}.parquet" for i in range(2))
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match="scores-00001.parquet` is damaged"):
        load_scores(folder)
    with pytest.raises(ValueError, match="holds scores of another dataset: row"):
        score(llama, same, folder, shard_size=2)


def test_a_folder_that_is_not_of_scores(tmp_path, llama, score, model_dir, no_loading):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "train-0.parquet").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"holds data of other origin \(train-0.parquet; there is no manifest.json\)"):
        score(model_dir, ROWS, foreign)
    assert sorted(os.listdir(foreign)) == ["train-0.parquet"]
    for manifest in ("{}", '{"format": 1, "settings": {"shard_size": 2}}', '{"format": "scores-0", "settings": {}}'):
        (foreign / "manifest.json").write_text(manifest)
        with pytest.raises(ValueError, match="holds a manifest.json that this version of the library did not write"):
            score(model_dir, ROWS, foreign)
        with pytest.raises(ValueError, match="is not one of `score_dataset`"):
            load_scores(foreign)
    # files that are no data are no obstacle
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("mine")
    score(llama, ROWS, tmp_path / "notes")
    assert (tmp_path / "notes" / "readme.txt").read_text() == "mine"


# ---------------------------------------------------------------- refusals


def test_other_settings_are_refused(tokenizer, model_dir, tmp_path, score, no_loading, no_scoring):
    """Before the model is loaded, where that can be."""
    folder = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "create_model_from_path", AutoModelForCausalLM.from_pretrained)
        patch.setattr(scoring, "sequence_log_probs", inference.sequence_log_probs)
        score(model_dir, ROWS, folder, shard_size=3)
    before = contents(folder)
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    template = RowOptions(chat_template_path=str(tmp_path / "own.jinja"))
    changed = ROWS.to_list()
    changed[4]["completion"] += "!"
    for options, shown in (
        ({"dataset": ROWS.take(7)}, r"scores that were made with rows=8 \(now 7\), dataset="),
        ({"dataset": ROWS.select(range(7, -1, -1))}, "made with dataset='"),
        ({"dataset": Dataset.from_list(changed)}, "made with dataset='"),
        ({"dataset": ROWS.to_iterable_dataset()}, r"rows=8 \(now None\)"),
        ({"processing_class": own(tokenizer, eos_token="<|endoftext|>")}, "made with tokenizer='"),
        ({"args": RowOptions(eos_token="<|endoftext|>"), "processing_class": own(tokenizer)}, "made with tokenizer='"),
        ({"args": template, "processing_class": own(tokenizer)}, "made with tokenizer='"),
        ({"args": RowOptions(max_length=512)}, r"made with max_length=1024 \(now 512\). Choose another `output_dir`"),
        ({"args": RowOptions(max_length=None)}, r"max_length=1024 \(now None\)"),
        ({"args": RowOptions(truncation_mode="keep_end")}, r"truncation_mode='keep_start' \(now 'keep_end'\)"),
        ({"args": RowOptions(completion_only_loss=False)}, r"completion_only_loss=True \(now False\)"),
        ({"args": RowOptions(dataset_text_field="story")}, r"dataset_text_field='text' \(now 'story'\)"),
        ({"direct_prompt": "x"}, r"direct_prompt=None \(now 'x'\)"),
        ({"shard_size": 4}, r"shard_size=3 \(now 4\)"),
        ({"shard_size": 4, "args": RowOptions(max_length=9)}, r"max_length=1024 \(now 9\), .*shard_size=3 \(now 4\)"),
    ):
        with pytest.raises(ValueError, match=shown):
            score(**{"model": model_dir, "dataset": ROWS, "output_dir": folder, "shard_size": 3} | options)
    for model, shown in (
        (lively(tokenizer), "made with policy='"),
        (tiny.model("llama", tokenizer).bfloat16(), r"made with dtype='float32' \(now 'bfloat16'\)"),
        (lora(tiny.model("llama", tokenizer), init_lora_weights=False), "made with policy='"),
        (
            tiny.model("llama", tokenizer, attn_implementation="eager"),
            r"attn_implementation='sdpa' \(now 'eager'\)",
        ),
    ):
        with pytest.raises(ValueError, match=shown):
            score(model, ROWS, folder, shard_size=3)
    assert contents(folder) == before
    # the same model in memory, and what TRL decides in the end
    again = score(
        tiny.model("llama", tokenizer), ROWS, folder, shard_size=3, args=RowOptions(completion_only_loss=True)
    )
    assert_identical(again, load_scores(folder))


def test_other_versions_are_told(tmp_path, llama, score):
    score(llama, ROWS, tmp_path)
    manifest = shards.read_manifest(tmp_path)
    shards.write_manifest(tmp_path, manifest | {"versions": manifest["versions"] | {"TRL": "0.1"}})
    with pytest.warns(UserWarning, match=r"first scores in .* were made with TRL 0.1 \(now "):
        score(llama, ROWS, tmp_path)


@pytest.mark.parametrize("kind", ["prompt-completion", "text"])
def test_tokenizer_that_puts_other_tokens_in_front(kind, tmp_path, llama, tokenizer, score):
    """The vocabulary is the same."""
    rows = KINDS[kind]()
    folder = tmp_path / "out"
    score(llama, rows, folder, shard_size=4)
    (folder / "scores-00001.parquet").unlink()
    with_bos = copy.deepcopy(tokenizer)
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert with_bos("a")["input_ids"] == [1, *tokenizer("a")["input_ids"]]
    with pytest.raises(ValueError, match="holds scores that were made with"):
        score(llama, rows, folder, shard_size=4, processing_class=with_bos)


def test_changed_row_in_a_finished_shard(tmp_path, llama, score, no_scoring):
    """In a place that is not looked at beforehand: found when its shard is met again."""
    folder = tmp_path / "out"
    rows = [{"prompt": f"Name {i}", "completion": " blue"} for i in range(150)]
    looked_at = {round(place) for place in np.linspace(0, 149, 64)}
    assert 100 not in looked_at
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "sequence_log_probs", inference.sequence_log_probs)
        score(llama, Dataset.from_list(rows), folder, shard_size=40)
    before = contents(folder)
    rows[100] = {"prompt": "Name another", "completion": " blue"}
    with pytest.raises(
        ValueError, match="holds scores of another dataset: row 100 is not what it was. Choose another"
    ):
        score(llama, Dataset.from_list(rows), folder, shard_size=40)
    assert contents(folder) == before
    rows[0]["completion"] = " red"
    with pytest.raises(ValueError, match="made with dataset='"):
        score(llama, Dataset.from_list(rows), folder, shard_size=40)


def stream_of(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize(
    ("shard_size", "number", "expected"),
    [
        (3, 7, "row 7 is not what it was"),
        (3, 6, "The stream gave 6 rows, and 8 when it was scored"),
        (3, 9, "row 8 is not what it was"),
        (4, 9, "The stream gave 9 rows, and 8 when it was scored"),
        (4, 4, "The stream gave 4 rows, and 8 when it was scored"),
    ],
)
def test_streams_of_another_length(shard_size, number, expected, tmp_path, llama, score):
    rows = [*ROWS, *ROWS]
    whole = score(llama, stream_of(rows[:8]), tmp_path, shard_size=shard_size)
    with pytest.raises(ValueError, match=expected):
        score(llama, stream_of(rows[:number]), tmp_path, shard_size=shard_size)
    assert_identical(load_scores(tmp_path), whole)
    assert_identical(score(llama, stream_of(rows[:8]), tmp_path, shard_size=shard_size), whole)


def test_changed_row_of_a_stream(tmp_path, llama, score):
    rows = ROWS.to_list()
    score(llama, stream_of(rows), tmp_path, shard_size=3)
    rows[4] = rows[4] | {"completion": " no"}
    with pytest.raises(ValueError, match="row 4 is not what it was"):
        score(llama, stream_of(rows), tmp_path, shard_size=3)


def test_unfinished_stream(tmp_path, llama, score, monkeypatch):
    folder = tmp_path / "out"

    def broken():
        yield from ROWS.to_list()[:5]
        raise OSError("connection lost")

    with pytest.raises(OSError, match="connection lost"):
        score(llama, IterableDataset.from_generator(broken), folder, shard_size=2)
    assert set(contents(folder)) == {"scores-00000.parquet", "scores-00001.parquet"}
    with pytest.raises(ValueError, match="the end of the stream was not reached. Run the scoring again"):
        load_scores(folder)
    calls = counted(monkeypatch)
    found = score(llama, stream_of(ROWS), folder, shard_size=2)
    assert calls == [2, 2]
    assert_identical(found, score(llama, ROWS, shard_size=2))


def test_processes_that_end_at_the_same_time(tmp_path, llama, score, monkeypatch):
    """One finds everything complete, and tidies up, while another one records the length of the stream."""
    whole = score(llama, stream_of(ROWS), tmp_path, shard_size=3)
    replace = os.replace

    def late(source, target):
        if str(target).endswith("rows.json"):
            shards.remove_scratch_files(tmp_path)  # as the other process does
        replace(source, target)

    monkeypatch.setattr(shards.os, "replace", late)
    assert_identical(score(llama, stream_of(ROWS), tmp_path, shard_size=3), whole)


@pytest.mark.parametrize(
    ("options", "error", "expected"),
    [
        ({"batch_tokens": 0}, ValueError, "`batch_tokens=0` is out of range"),
        ({"shard_size": 0}, ValueError, "`shard_size=0` is out of range"),
        ({"shard_size": 2.5}, TypeError, "`shard_size` must be an integer"),
        ({"part": (2, 2)}, ValueError, "`part=(2, 2)`: the number of the job must lie in [0, 2)"),
        ({"part": (-1, 2)}, ValueError, "must lie in [0, 2)"),
        ({"part": (0, 0)}, ValueError, "must lie in [0, 0)"),
        ({"part": "0/2"}, TypeError, "must be two integers"),
        ({"part": (0, 1, 2)}, TypeError, "must be two integers"),
        ({"part": (True, 2)}, TypeError, "must be two integers"),
        ({"part": (0, 2), "output_dir": None}, ValueError, "Name it with `output_dir`"),
        (
            {"args": SFTConfig("x", use_cpu=True, bf16=False, max_length=0)},
            ValueError,
            "`max_length=0` is out of range",
        ),
        ({"args": SFTConfig("x", use_cpu=True, bf16=False, truncation_mode="middle")}, ValueError, "Choose one of"),
        (
            {"args": SFTConfig("x", use_cpu=True, bf16=False, eos_token="<no>")},
            ValueError,
            "`eos_token='<no>'` is not in",
        ),
        (
            {"args": SFTConfig("x", use_cpu=True, bf16=False, chat_template_path="org/model")},
            ValueError,
            "`chat_template_path='org/model'` is no template file",
        ),
        (
            {"args": SFTConfig("x", use_cpu=True, bf16=False, chat_template_path="./no.jinja")},
            ValueError,
            "is no template file",
        ),
        (
            {"args": SFTConfig("x", use_cpu=True, bf16=False, dataset_kwargs={"skip_prepare_dataset": True})},
            ValueError,
            "rows are scored as TRL prepares them. Drop the option",
        ),
        ({"dataset": Dataset.from_list([])}, ValueError, "`dataset` is empty"),
        ({"dataset": [{"prompt": "a"}]}, TypeError, "`dataset` is a list; expected a `Dataset`"),
        ({"dataset": datasets.DatasetDict({"train": ROWS})}, TypeError, "Of a dictionary of splits, pass one"),
        ({"dataset": tiny.preference_data()}, ValueError, "but no 'completion'"),
        ({"dataset": Dataset.from_list([{"story": "a"}])}, ValueError, "set `dataset_text_field`"),
        ({"dataset": Dataset.from_list([{"text": "a", "image": 1}])}, ValueError, "vision dataset"),
        ({"dataset": Dataset.from_list([{"prompt": "a", "completion": None}])}, TypeError, "must both be strings"),
        ({"direct_prompt": ""}, ValueError, "`direct_prompt=''` has no tokens"),
        (
            {"args": SFTConfig("x", use_cpu=True, bf16=False, assistant_only_loss=True)},
            ValueError,
            "the dataset is not conversational. Drop the option",
        ),
        ({"dataset": ROWS.with_transform(lambda batch: batch)}, ValueError, "which TRL does not train on either"),
        ({"model": 3}, TypeError, "`model` is a int"),
        ({"model": "./nowhere/model"}, OSError, "nowhere"),
        ({"adapter": "."}, ValueError, "has no `adapter_config.json`"),
    ],
    ids=str,
)
def test_bad_input_before_the_model_loads(options, error, expected, model_dir, tmp_path, no_loading):
    with pytest.raises(error) as caught:
        score_dataset(**{"model": model_dir, "dataset": ROWS, "output_dir": tmp_path / "out"} | options)
    assert expected in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_failing_template_before_the_model_loads(model_dir, tmp_path, no_loading):
    (tmp_path / "bad.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="row 0: TRL cannot prepare it .TemplateError: roles must alternate"):
        score_dataset(model_dir, tiny.messages_data(), args=RowOptions(chat_template_path=str(tmp_path / "bad.jinja")))


def test_bad_combinations_with_an_instance(tokenizer, llama, score):
    with pytest.raises(ValueError, match="Apply them when you load it"):
        score(llama, model_init_kwargs={"dtype": "bfloat16"})
    with pytest.raises(ValueError, match="Apply them when you load it"):
        score(llama, adapter="a")
    with pytest.raises(ValueError, match="tokenizer as `processing_class`"):
        score(llama, processing_class=None)
    with pytest.raises(ValueError, match="tokenizer as `processing_class`"):
        Scorer(llama)


# ---------------------------------------------------------------- rows without a score


def test_rows_without_scored_tokens(llama, score):
    """A prompt that fills `max_length`; labels that are all masked; a single token, which nothing predicts."""
    rows = [
        {"prompt": "Is water wet? " * 9, "completion": " no"},
        *ROWS.take(2),
        {"prompt": "What? " * 30, "completion": "a"},
    ]
    with pytest.warns(UserWarning, match="no scored token") as caught:
        found = score(llama, Dataset.from_list(rows), args=RowOptions(max_length=30))
    assert [str(w.message) for w in caught if "NaN" in str(w.message)] == [
        "Of 4 rows, 2 have no scored token after truncation to `max_length=30`: their scores are NaN, and they are never "
        "selected."
    ]
    assert [count > 0 for count in found["num_tokens"]] == [False, True, True, False]
    for column in ("nll", "nll_sum"):
        assert np.isnan(found[column][:]).tolist() == [True, False, False, True]
    assert_close(found.select([1, 2]), score(llama, ROWS.take(2)).map(lambda row: {"index": row["index"] + 1}))
    subset = select_top(Dataset.from_list(rows), np.array(found["nll"][:]), k=2)
    assert subset["prompt"][:] == ROWS["prompt"][:2]

    ids = [{"input_ids": [7, 8, 9]}, {"input_ids": [7]}, {"input_ids": []}]
    with pytest.warns(UserWarning, match="Of 3 rows, 2 have no scored token"):
        assert score(llama, Dataset.from_list(ids))["num_tokens"][:] == [2, 0, 0]
    masked = [{"input_ids": [7, 8], "labels": [7, -100]}, {"input_ids": [7, 8], "labels": [-100, 8]}]
    with pytest.warns(UserWarning, match="Of 2 rows, 1 have no scored token"):
        assert score(llama, Dataset.from_list(masked))["num_tokens"][:] == [0, 1]


def test_empty_completions(tokenizer, llama, score):
    """EOS is scored, where the row or TRL puts it; without it nothing is."""
    eos = tokenizer.eos_token
    rows = Dataset.from_list([{"prompt": "What?", "completion": text} for text in ("", eos, " a", f" a{eos}")])
    found = score(llama, rows)
    assert found["num_tokens"][:2] == [1, 1]
    assert found["nll"][0] == found["nll"][1]
    assert found["token_hash"][0] == found["token_hash"][1] != found["token_hash"][2] == found["token_hash"][3]
    assert found["row_hash"][0] != found["row_hash"][1]
    empty = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": ""}]}]
    )
    assert score(llama, empty)["num_tokens"][0] >= 1  # the end of the turn
    prompt = tokenizer("What?")["input_ids"]
    none = Dataset.from_list(
        [{"input_ids": prompt, "labels": [-100] * len(prompt)}, {"input_ids": prompt, "labels": prompt}]
    )
    with pytest.warns(UserWarning, match="Of 2 rows, 1 have no scored token"):
        assert score(llama, none)["num_tokens"][:] == [0, len(prompt) - 1]


@pytest.mark.parametrize("in_folder", [True, False])
def test_no_row_can_be_scored(in_folder, llama, score, tmp_path):
    folder = tmp_path / "out" if in_folder else None
    for _ in range(2):  # also when the folder is complete
        with pytest.raises(
            ValueError, match=r"No row can be scored: of 8 rows, 8 have no scored token .*Raise `max_length`"
        ):
            score(llama, ROWS, folder, args=RowOptions(max_length=2), shard_size=3)
    with pytest.raises(ValueError, match="No row can be scored: of 8 rows, 8 have no scored token"):
        score(
            llama,
            ROWS,
            folder and tmp_path / "parts",
            args=RowOptions(max_length=2),
            part=(0, 1) if in_folder else None,
        )


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"prompt": "a", "completion": None}], "column 'completion' is null. Fill it, or drop such rows"),
        ([{"prompt": None, "completion": "b"}], "column 'prompt' is null. Fill it, or drop such rows"),
        ([{"text": None}], "column 'text' is null. Fill it, or drop such rows"),
        ([{"messages": None}], "column 'messages' is null. Fill it, or drop such rows"),
        ([{"messages": [{"role": "user", "content": None}]}], "a message 0 that has the role 'user' and no content"),
        ([{"input_ids": None}], "Mend or drop the row: {'input_ids': None}"),
    ],
    ids=str,
)
def test_null_values(rows, expected, llama, tokenizer, score):
    """The error names the row."""
    kinds = {"prompt": ROWS, "text": tiny.text_data(), "messages": tiny.messages_data()}
    good = kinds.get(next(iter(rows[0])), tiny.tokenized_data(tokenizer).select_columns("input_ids")).to_list()
    dataset = Dataset.from_list(good[:5] + rows + good[5:])
    for shard_size, named in ((100, "`dataset`, rows from 0: row 5: "), (4, "`dataset`, rows from 4: row 1: ")):
        with pytest.raises(ValueError, match=f"^{named}") as caught:
            score(llama, dataset, shard_size=shard_size)
        assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            [{"input_ids": [1, 2]}, {"input_ids": [3, 9999]}],
            "row 1 has the token id 9999, and the model has 330 tokens",
        ),
        ([{"input_ids": [1, 2], "labels": [1]}], "row 0 has 2 token ids and 1 labels"),
        ([ROWS[0], tiny.conversational_data()[0]], "one by one but not together: rows of different kinds"),
    ],
    ids=["token", "labels", "kinds"],
)
def test_rows_that_cannot_be_scored(rows, expected, llama, tokenizer, score):
    with pytest.raises(ValueError, match=expected):
        score(llama, stream_of(rows))
    with pytest.raises(ValueError, match=expected):
        Scorer(llama, tokenizer)(rows)


def test_a_bad_row_costs_nothing(tmp_path, llama, score):
    """The shards before it are kept; once it is mended, the run goes on."""
    folder = tmp_path / "out"
    rows = ROWS.to_list()
    broken = [*rows[:6], {"prompt": "a", "completion": None}, rows[7]]
    with pytest.raises(ValueError, match="rows from 4: row 2"):
        score(llama, stream_of(broken), folder, shard_size=4)
    assert set(contents(folder)) == {"scores-00000.parquet"}
    assert_identical(score(llama, stream_of(rows), folder, shard_size=4), score(llama, ROWS, shard_size=4))


def test_values_that_are_not_finite(tokenizer, score, tmp_path):
    """Token 40 has NaN for an embedding, token 50 an infinite one: rows that read them have no score, others keep theirs."""
    model, poisoned = lively(tokenizer), lively(tokenizer)
    with torch.no_grad():
        poisoned.get_input_embeddings().weight[40] = NAN
        poisoned.get_input_embeddings().weight[50] = math.inf
    rng = np.random.default_rng(0)
    ids = [rng.integers(60, 300, n).tolist() for n in (5, 9, 7, 12, 6, 8)]
    ids[1][3], ids[3][5] = 40, 50
    rows = Dataset.from_list([{"input_ids": row} for row in ids])
    with pytest.warns(UserWarning, match="not finite") as caught:
        found = score(poisoned, rows, tmp_path, shard_size=4)
    assert [str(w.message) for w in caught if "NaN" in str(w.message)] == [
        "Of 6 rows, the loss of 2 is not finite: their scores are NaN, and they are never selected."
    ]
    for column in ("nll", "nll_sum"):
        assert np.isnan(found[column][:]).tolist() == [False, True, False, True, False, False]
    assert found["num_tokens"][:] == [len(row) - 1 for row in ids]
    good = [0, 2, 4, 5]
    assert_close(found.select(good), score(model, rows, shard_size=4).select(good))
    initial = score(model, rows)
    with pytest.warns(UserWarning, match="Selected 4 rows in place of 6"):
        assert len(select_top(rows, learnability(initial, found), k=6)) == 4
    both = Dataset.from_list([{"input_ids": row} for row in [*ids, [7]]])
    with pytest.warns(
        UserWarning, match="Of 7 rows, 1 have no scored token after .* and the loss of 2 is not finite: their"
    ):
        score(poisoned, both)
    with torch.no_grad():
        poisoned.get_output_embeddings().weight.fill_(NAN)
    with pytest.raises(
        ValueError, match="No row can be scored: of 6 rows, the loss of 6 is not finite. .*another dtype"
    ):
        score(poisoned, rows)


def test_infinite_losses_are_no_scores(llama, tokenizer, monkeypatch):
    """Nor is a loss of minus infinity."""
    values = [-math.inf, NAN, -3.0, math.inf, 0.0]
    monkeypatch.setattr(scoring, "sequence_log_probs", lambda *args: values)
    found = Scorer(llama, tokenizer)([{"input_ids": [7, 8, 9]}] * 5)
    np.testing.assert_array_equal([row["nll_sum"] for row in found], [NAN, NAN, 3.0, NAN, 0.0])
    np.testing.assert_array_equal([row["nll"] for row in found], [NAN, NAN, 1.5, NAN, 0.0])
    assert math.copysign(1, found[4]["nll_sum"]) == 1  # and not -0.0


def test_parts_warn_too(llama, score, tmp_path):
    """The one that comes last has all scores, whatever its number."""
    rows = Dataset.from_list([*ROWS, {"prompt": "What? " * 30, "completion": "a"}])
    options = {"args": RowOptions(max_length=30), "shard_size": 5}
    assert score(llama, rows, tmp_path, part=(0, 2), **options) is None
    with pytest.warns(UserWarning, match="Of 9 rows, 1 have no scored token"):
        score(llama, rows, tmp_path, part=(1, 2), **options)


def test_one_warning_of_several_processes(llama, score, tmp_path, monkeypatch):
    rows = Dataset.from_list([*ROWS, {"prompt": "What? " * 30, "completion": "a"}])
    with pytest.warns(UserWarning, match="Of 9 rows"):
        score(llama, rows, tmp_path, args=RowOptions(max_length=30))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert len(score(llama, rows, tmp_path, args=RowOptions(max_length=30))) == 9
        assert [str(w.message).startswith("Of 9 rows") for w in caught].count(True) == (rank == 0)


# ---------------------------------------------------------------- completions without their prompts


@pytest.mark.parametrize("kind", ["prompt-completion", "conversational", "tokenized"])
def test_direct_prompt(kind, tokenizer, llama, score, tmp_path):
    rows = tiny.tokenized_data(tokenizer) if kind == "tokenized" else KINDS[kind]()
    double = copy.deepcopy(llama).double()
    options = {"direct_prompt": DIRECT_PROMPT}
    alone, usual = score(llama, rows, tmp_path / "alone", **options), score(llama, rows)
    assert DIRECT_PROMPT == "### Response:"
    before = tokenizer("### Response:")["input_ids"]
    for row, loss in zip(rows, alone, strict=True):
        ids, labels = tokens_of(row, tokenizer)
        answer = [token for token, label in zip(ids, labels, strict=True) if label != -100]
        expected, number = explicit_loss(double, before + answer, [-100] * len(before) + answer)
        assert loss["nll_sum"] == pytest.approx(expected, rel=2e-6)
        assert loss["num_tokens"] == number == len(answer)
    for column in ("row_hash", "token_hash", "num_tokens"):
        assert alone[column][:] == usual[column][:]
    assert not np.allclose(alone["nll"][:], usual["nll"][:], rtol=1e-3)
    assert shards.read_manifest(tmp_path / "alone")["settings"]["direct_prompt"] == DIRECT_PROMPT
    for found, row in zip(Scorer(llama, tokenizer, **options)(rows.to_list()), alone, strict=True):
        row.pop("index")
        assert found == row
    # what comes in place of the prompt matters, what it replaces does not
    assert score(llama, rows, direct_prompt="Answer:")["nll"][:] != alone["nll"][:]
    if kind == "prompt-completion":
        others = rows.map(lambda row: {"prompt": "How? " + row["prompt"]})
        assert_identical(score(llama, others, **options).select_columns("nll_sum"), alone.select_columns("nll_sum"))


def test_direct_prompt_after_truncation(llama, tokenizer, score):
    """The completion is cut as with the prompt."""
    options = {"args": RowOptions(max_length=30)}
    alone, usual = score(llama, direct_prompt="x", **options), score(llama, **options)
    assert alone["num_tokens"][:] == usual["num_tokens"][:]
    assert alone["num_tokens"][:] != score(llama)["num_tokens"][:]
    double = copy.deepcopy(llama).double()
    for row, loss in zip(ROWS, alone, strict=True):
        ids, labels = (values[:30] for values in tokens_of(row, tokenizer))
        answer = [token for token, label in zip(ids, labels, strict=True) if label != -100]
        before = tokenizer("x")["input_ids"]
        expected, _ = explicit_loss(double, before + answer, [-100] * len(before) + answer)
        assert loss["nll_sum"] == pytest.approx(expected, rel=2e-6)


def test_direct_prompt_is_refused(model_dir, tokenizer, llama, score, no_loading):
    for rows, options in (
        (tiny.text_data(), {}),
        (tiny.messages_data(), {}),
        (tiny.tokenized_data(tokenizer).select_columns("input_ids"), {}),
        (ROWS, {"args": RowOptions(completion_only_loss=False)}),
    ):
        with pytest.raises(
            ValueError, match="`direct_prompt='x'` takes the place of prompts: rows must have 'prompt' and"
        ):
            score(model_dir, rows, direct_prompt="x", **options)
    with pytest.raises(ValueError, match=r"has no tokens: .*The default is '### Response:'"):
        score(model_dir, direct_prompt="")
    with pytest.raises(ValueError, match="has no tokens"):
        Scorer(llama, tokenizer, direct_prompt="")


def test_rows_that_have_lost_their_prompt(llama, tokenizer, score):
    """Of some rows truncation leaves no prompt: they have a loss, but none without the prompt."""
    rows = Dataset.from_list([ROWS[5], ROWS[6], ROWS[1]])
    args = RowOptions(max_length=10, truncation_mode="keep_end")
    usual = score(llama, rows, args=args)
    assert np.isfinite(usual["nll"][:]).all()
    with pytest.warns(UserWarning, match="Of 3 rows, 1 have no scored token"):
        alone = score(llama, rows, args=args, direct_prompt="x")
    assert np.isnan(alone["nll"][:]).tolist() == [True, False, False]
    assert alone["token_hash"][:] == usual["token_hash"][:]
    found = Scorer(llama, tokenizer, args, direct_prompt="x")(tiny.text_data().to_list())
    assert all(math.isnan(row["nll"]) and row["num_tokens"] == 0 for row in found)


# ---------------------------------------------------------------- adapters, and the model of the caller


def test_adapters(tokenizer, score):
    base = lively(tokenizer)
    plain = score(base, MANY)
    torch.manual_seed(1)
    model = lora(base, init_lora_weights=False, target_modules="all-linear", lora_dropout=0.5)
    model.train()
    tuned = score(model, MANY)
    double = copy.deepcopy(model).eval().double()
    for row, loss in zip(MANY, tuned, strict=True):
        assert loss["nll_sum"] == pytest.approx(explicit_loss(double, *tokens_of(row, tokenizer))[0], rel=1e-5)
    assert not np.allclose(tuned["nll"][:], plain["nll"][:], rtol=1e-3)
    with model.disable_adapter():
        assert_identical(score(model, MANY), plain)
    assert_identical(score(model, MANY), tuned)
    idle = lora(lively(tokenizer))  # an adapter that does nothing yet
    assert_identical(score(idle, MANY), plain)
    assert_close(score(model.merge_and_unload(), MANY), tuned, rel=1e-5)


def test_adapters_share_a_folder_with_what_they_equal(tmp_path, tokenizer, score):
    """The folder is of weights: of the base model, where the adapter is disabled."""
    base = lively(tokenizer)
    plain = score(base, ROWS, tmp_path)
    model = lora(base, init_lora_weights=False)
    with model.disable_adapter():
        assert_identical(score(model, ROWS, tmp_path), plain)
    with pytest.raises(ValueError, match="made with policy='"):
        score(model, ROWS, tmp_path)


def test_the_model_is_given_back(tokenizer, score, monkeypatch):
    base = lively(tokenizer, attention_dropout=0.5)
    expected = score(base, MANY)
    assert "forward" not in vars(base)
    model = lora(base, lora_dropout=0.5, init_lora_weights=False)
    with model.disable_adapter():
        base_scores = score(model, MANY)
    assert_identical(base_scores, expected)  # without dropout, whatever the mode is
    model.train()
    model.base_model.model.model.layers[0].eval()
    base.config.use_cache = False
    base.forward = forward = base.forward
    state = {
        "modes": [module.training for module in model.modules()],
        "config": base.generation_config,
        "active": list(model.active_adapters),
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "weights": {name: parameter.clone() for name, parameter in model.named_parameters()},
    }

    def check():
        assert [module.training for module in model.modules()] == state["modes"]
        assert base.generation_config is state["config"]
        assert vars(base)["forward"] is forward
        assert list(model.active_adapters) == state["active"]
        assert not base.config.use_cache
        assert torch.is_grad_enabled()
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == state["trainable"][name]
            assert torch.equal(parameter, state["weights"][name])
            assert parameter.grad is None

    torch.manual_seed(3)
    random = torch.rand(4)
    torch.manual_seed(3)
    first = score(model, MANY)
    assert torch.equal(torch.rand(4), random)
    check()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="on the way"):

        def fail(*args):
            raise RuntimeError("on the way")

        patch.setattr(scoring, "sequence_log_probs", fail)
        score(model, MANY)
    check()
    with model.disable_adapter():
        score(model, MANY)
    check()
    assert_identical(score(model, MANY), first)


def test_the_tokenizer_is_given_back(tokenizer, llama, score, tmp_path):
    """What options change of it is for this call."""
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    mine = own(tokenizer)
    plain = score(llama, processing_class=mine)
    options = RowOptions(eos_token="<|endoftext|>", chat_template_path=str(tmp_path / "own.jinja"))
    assert score(llama, processing_class=mine, args=options)["nll"][:] != plain["nll"][:]
    assert mine.eos_token == "<|im_end|>"
    assert mine.chat_template == tokenizer.chat_template
    assert_identical(score(llama, processing_class=mine), plain)


def test_model_of_a_trainer(tokenizer, tmp_path, score):
    """TRL's patched forward scores as the plain one, and goes on training; then the scores differ."""
    model = lively(tokenizer)
    plain = score(model)
    args = SFTConfig(tmp_path / "t", use_cpu=True, bf16=False, report_to="none", max_steps=2, disable_tqdm=True)
    trainer = SFTTrainer(model=model, args=args, train_dataset=ROWS, processing_class=own(tokenizer))
    forward = trainer.model.forward
    assert_identical(score(trainer.model, args=args), plain)
    assert trainer.model.forward == forward
    trainer.train()
    after = score(trainer.model, args=args)
    assert np.abs(learnability(plain, after)).min() > 0


def test_adapter_by_name(model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    torch.manual_seed(1)
    tuned = get_peft_model(model, LoraConfig(init_lora_weights=False, target_modules=["q_proj"]))
    tuned.save_pretrained(tmp_path / "adapter")
    named = score_dataset(model_dir, ROWS, tmp_path / "out", adapter=str(tmp_path / "adapter"))
    assert_identical(named, score_dataset(tuned, ROWS, tmp_path / "out"))
    assert named["nll"][:] != score_dataset(model_dir, ROWS)["nll"][:]
    manifest = shards.read_manifest(tmp_path / "out")
    assert manifest["adapter"] == str(tmp_path / "adapter")
    assert manifest["model"] == model_dir


def test_prompt_learning_is_refused(tokenizer, score, tmp_path):
    model = get_peft_model(lively(tokenizer), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="prompt-learning PEFT .PromptTuningConfig."):
        score(model, ROWS, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()  # the folder is not taken
    with pytest.raises(ValueError, match="prompt-learning PEFT .PromptTuningConfig."):
        Scorer(model, tokenizer)


# ---------------------------------------------------------------- the command


@pytest.fixture
def command(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ROWS.to_json("data.jsonl")
    return ["--model_name_or_path", model_dir, "--dataset_name", "data.jsonl", "--output_dir", "out"]


def test_command(command, capsys, model_dir):
    assert main(command) == 0
    said = capsys.readouterr().out
    found, expected = load_scores("out"), score_dataset(model_dir, ROWS)
    assert_identical(found, expected)
    tokens = sum(found["num_tokens"])
    mean = sum(found["nll_sum"]) / tokens
    assert said == f"8 rows, {tokens} scored tokens, mean loss {mean:.4f} nats a token.\nWritten to out.\n"
    assert main(command) == 0  # complete: only read
    assert capsys.readouterr().out == said


def test_options_of_the_command(command, model_dir, capsys):
    Path("own.jinja").write_text(TEMPLATE)
    tiny.messages_data().to_json("messages.jsonl")
    tiny.text_data().rename_column("text", "story").to_json("story.jsonl")
    for number, (argv, rows, options) in enumerate(
        (
            (
                ["--max_length", "30", "--direct_prompt"],
                ROWS,
                {"args": RowOptions(30), "direct_prompt": DIRECT_PROMPT},
            ),
            (["--direct_prompt", "So:"], ROWS, {"direct_prompt": "So:"}),
            (["--truncation_mode", "keep_end", "--max_length", "9"], ROWS, {"args": RowOptions(9, "keep_end")}),
            (["--completion_only_loss", "false"], ROWS, {"args": RowOptions(completion_only_loss=False)}),
            (["--eos_token", "<|endoftext|>"], ROWS, {"args": RowOptions(eos_token="<|endoftext|>")}),
            (["--dtype", "bfloat16"], ROWS, {"model_init_kwargs": {"dtype": "bfloat16"}}),
            (["--batch_tokens", "50", "--shard_size", "3"], ROWS, {"batch_tokens": 50, "shard_size": 3}),
            (["--max_length", "none", "--dataset_streaming"], ROWS, {"args": RowOptions(None)}),
            (
                ["--dataset_name", "story.jsonl", "--dataset_text_field", "story"],
                tiny.text_data().rename_column("text", "story"),
                {"args": RowOptions(dataset_text_field="story")},
            ),
            (
                ["--dataset_name", "messages.jsonl", "--chat_template_path", "own.jinja", "--assistant_only_loss"],
                tiny.messages_data(),
                {"args": RowOptions(chat_template_path="own.jinja", assistant_only_loss=True)},
            ),
        )
    ):
        assert main([*command, *argv, "--output_dir", f"out-{number}"]) == 0, capsys.readouterr().err
        assert_identical(load_scores(f"out-{number}"), score_dataset(model_dir, rows, **options))
    assert (Path("out-7") / "rows.json").is_file()
    assert len(list(Path("out-6").glob("*.parquet"))) == 3


def test_command_with_an_adapter(command, model_dir):
    torch.manual_seed(1)
    tuned = lora(AutoModelForCausalLM.from_pretrained(model_dir), init_lora_weights=False)
    tuned.save_pretrained("adapter")
    assert main([*command, "--adapter", "adapter"]) == 0
    assert_identical(load_scores("out"), score_dataset(tuned, ROWS))


def test_parts_of_the_command(command, capsys):
    assert main([*command, "--shard_size", "3", "--output_dir", "whole"]) == 0
    capsys.readouterr()
    assert main([*command, "--shard_size", "3", "--part", "0/2"]) == 0
    assert capsys.readouterr().out == "Part 0/2 is done. Other parts of out are missing yet.\n"
    assert set(contents("out")) == {"scores-00000.parquet", "scores-00002.parquet"}
    assert main([*command, "--shard_size", "3", "--part", "1/2"]) == 0
    assert capsys.readouterr().out.endswith("Written to out.\n")
    assert contents("out") == contents("whole")


def test_file_of_options(command, model_dir):
    lines = {
        "model_name_or_path": model_dir, "dataset_name": "data.jsonl", "output_dir": "out", "max_length": 20,
        "shard_size": 3, "completion_only_loss": False, "dataset_streaming": True, "load_in_4bit": False,
    }  # fmt: skip
    Path("run.yaml").write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in lines.items()))
    assert main(["--config", "run.yaml", "--shard_size", "4"]) == 0
    settings = shards.read_manifest("out")["settings"]
    assert (settings["max_length"], settings["shard_size"], settings["completion_only_loss"]) == (20, 4, False)
    assert settings["rows"] is None


def test_help_and_errors_of_the_command(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for field in fields(RowOptions):
        assert f"--{field.name}" in said
    Path("typo.yaml").write_text("max_lenght: 1")
    Path("list.yaml").write_text("- 1")
    for argv in (
        ["--max_len", "1"],
        ["--shard_size", "many"],
        ["--max_length", "long"],
        ["--completion_only_loss", "perhaps"],
        ["--truncation_mode", "middle"],
        ["--dtype", "float8"],
        ["--config", "typo.yaml"],
        ["--num_processes", "0"],
        ["--num_processes", "2", "--part", "0/2"],
        ["--part", "-1/2"],
        ["stray"],
    ):
        with pytest.raises(SystemExit) as stop:
            main([*command, *argv])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("trl-ift score: error: ")
        assert error.count("\n") == 1
    with pytest.raises(SystemExit) as stop:
        main(command[2:])
    assert stop.value.code == 2
    assert "--model_name_or_path" in capsys.readouterr().err
    for argv, expected in (
        (["--shard_size", "0"], "`shard_size=0` is out of range"),
        (["--max_length", "0"], "`max_length=0` is out of range"),
        (["--part", "2/2"], "must lie in [0, 2)"),
        (["--part", "1"], "`--part 1`: expected two numbers, as in `--part 0/4`"),
        (["--part=a/b"], "`--part a/b`: expected two numbers"),
        (["--dataset_split", "test"], "has no split 'test'; it has: 'train'"),
        (["--dataset_name", "./none.jsonl"], "does not exist"),
        (["--model_name_or_path", "./none"], "none"),
        (["--adapter", "."], "has no `adapter_config.json`"),
        (["--config", "none.yaml"], "none.yaml"),
        (["--config", "list.yaml"], "expected `option: value` lines"),
        (["--direct_prompt", ""], "has no tokens"),
        (["--chat_template_path", "org/model"], "is no template file"),
        (["--eos_token", "<no>"], "is not in the vocabulary"),
        (["--output_dir", "data.jsonl"], "`output_dir='data.jsonl'` cannot be written"),
    ):
        assert main([*command, *argv]) == 1, argv
        error = capsys.readouterr().err
        message, hint = error.splitlines()
        assert message.startswith("trl-ift score: error: ")
        assert expected in message
        assert hint == "(TRL_IFT_DEBUG=1 shows the full traceback.)"
    assert not Path("out").exists()


def test_rows_that_cannot_be_scored_by_the_command(command, capsys):
    assert main([*command, "--max_length", "2"]) == 1
    assert "trl-ift score: error: No row can be scored: of 8 rows, 8 have no scored token" in capsys.readouterr().err
    Path("bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": null}\n')
    assert main([*command, "--dataset_name", "bad.jsonl", "--output_dir", "bad"]) == 1
    assert "row 1: column 'completion' is null" in capsys.readouterr().err


def test_interrupted_command(command, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "sequence_log_probs", interrupt)
        assert main(command) == 130
    assert "are kept in out; to go on, run the same again" in capsys.readouterr().err
    assert main(command) == 0


@pytest.mark.slow
def test_two_processes_of_the_command(command, capfd):
    options = ["--shard_size", "2"]
    assert main([*command, *options, "--num_processes", "2"]) == 0
    assert capfd.readouterr().out.count("Written to out.") == 1
    assert main([*command, *options, "--output_dir", "one"]) == 0
    assert contents("out") == contents("one")


def test_of_two_jobs_that_start_at_once_the_first_manifest_counts(tmp_path, llama, score, monkeypatch):
    """Another job with other settings claims the folder between the look for a manifest and the writing of one."""
    folder, write = tmp_path / "out", scoring.write_manifest

    def late(path, manifest, **options):
        other = manifest | {"settings": manifest["settings"] | {"shard_size": 999}}
        write(path, other)
        write(path, manifest, **options)

    monkeypatch.setattr(scoring, "write_manifest", late)
    with pytest.raises(ValueError, match=r"shard_size=999 \(now 4\)"):
        score(llama, ROWS, folder, shard_size=4)
    assert not list(folder.glob("*.parquet"))
