"""Stored reference log-probabilities: equal to those of the trainers, refused where they are of other tokens; TRL's cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from pairs import logs, make
from trl import DPOTrainer
from trl.trainer import dpo_trainer

from trl_ift import DPOPConfig, DPOPTrainer, PreferenceConfig, PreferenceTrainer, UFTConfig, UFTTrainer
from trl_ift.data import store_references, stored_references
from trl_ift.reference import REF_SETTINGS
from trl_ift.scripts import train


TESTS = Path(__file__).parent
PAIRS = ("ref_chosen_logps", "ref_rejected_logps")


def single_responses():
    rows = tiny.prompt_completion_data()
    return rows.add_column("label", [index % 3 != 0 for index in range(len(rows))])


def implicit():
    return tiny.implicit_preference_data()


@pytest.fixture
def model(tokenizer):
    return tiny.model("llama", tokenizer)


@pytest.fixture(scope="module")
def stored(tmp_path_factory, model_dir):
    """A folder that was stored with `max_length=24`, with a split for evaluation."""
    folder = tmp_path_factory.mktemp("stored")
    rows = tiny.preference_data()
    options = {"max_length": 24, "shard_size": 3}
    store_references(model_dir, rows, folder, **options)
    store_references(model_dir, rows.select([5, 2]), folder, split="test", **options)
    return str(folder)


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model fails the test."""

    def fail(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(dpo_trainer, "create_model_from_path", fail)
    monkeypatch.setattr(stored_references, "load_model", fail)


# ---------------------------------------------------------------- the values


CASES = {
    "pairs": (tiny.preference_data, {"max_length": None}),
    "pairs, start kept": (tiny.preference_data, {"max_length": 24}),
    "pairs, end kept": (tiny.preference_data, {"max_length": 20, "truncation_mode": "keep_end"}),
    "prompts in both": (implicit, {"max_length": 24}),
    "messages": (tiny.conversational_preference_data, {"max_length": 110}),
    "single responses": (single_responses, {"max_length": 24}),
}


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_trainer(case, tmp_path, model, tokenizer):
    make_rows, cut = CASES[case]
    rows = make_rows().add_column("row", list(range(8)))
    classes = (UFTTrainer, UFTConfig) if case == "single responses" else (PreferenceTrainer, PreferenceConfig)
    trainer = make(*classes, tmp_path, model, rows, tokenizer, precompute_ref_log_probs=True, **cut)
    computed = trainer.train_dataset
    if cut["max_length"] is not None:
        responses = "completion_ids" if case == "single responses" else "chosen_ids"
        assert any(len(row["prompt_ids"]) + len(row[responses]) > cut["max_length"] for row in computed)
    found = store_references(
        model, rows, tmp_path / "stored", processing_class=tokenizer, batch_tokens=100, shard_size=3, **cut
    )
    assert found["row"][:] == list(range(8))
    for column in ("ref_logps",) if case == "single responses" else PAIRS:
        values = torch.tensor(found[column][:])[computed["row"][:]]
        torch.testing.assert_close(values.float(), torch.tensor(computed[column][:]), rtol=1e-5, atol=1e-5)
        assert values.unique().numel() > 4


def test_cutting_changes_the_values(tmp_path, model, tokenizer):
    sums = []
    for length in (None, 24):
        rows = store_references(
            model, tiny.preference_data(), tmp_path / f"{length}", processing_class=tokenizer, max_length=length
        )
        sums.append(torch.tensor(rows["ref_chosen_logps"][:]))
    assert ((sums[0] - sums[1]).abs() > 1).any()


def test_the_folder_is_a_dataset(stored):
    """With every column and type of the data, in order; the splits under their names."""
    found = load_dataset(stored)
    rows = tiny.preference_data()
    assert set(found) == {"train", "test"}
    assert found["train"].select_columns(rows.column_names).to_list() == rows.to_list()
    assert found["test"]["prompt"][:] == [rows[5]["prompt"], rows[2]["prompt"]]
    assert found["test"]["ref_chosen_logps"][0] == pytest.approx(found["train"]["ref_chosen_logps"][5], rel=1e-6)
    assert sorted(path.name for path in (Path(stored) / "data").iterdir()) == [
        "test-00000-of-00001.parquet",
        *(f"train-0000{shard}-of-00003.parquet" for shard in range(3)),
    ]
    manifest = json.loads((Path(stored) / "references" / "train" / "manifest.json").read_text())
    assert manifest["settings"]["max_length"] == 24
    (settings,) = found["train"].unique(REF_SETTINGS)
    assert json.loads(settings) == {
        name: manifest["settings"][name]
        for name in ("reference", "dtype", "tokenizer", "max_length", "truncation_mode")
    }


# ---------------------------------------------------------------- trainings on them


def command(stored, model_dir, output_dir, method="dpo", **options):
    given = {
        "model_name_or_path": model_dir, "dataset_name": stored, "output_dir": output_dir, "max_length": 24, "max_steps": 2,
        "report_to": "none", "save_strategy": "no", "bf16": False, "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2, "eval_strategy": "epoch", "logging_steps": 1, **options,
    }  # fmt: skip
    return [method, *(f"--{name}={value}" for name, value in given.items())]


def prepared(argv):
    method = train.get_method(argv[0])
    return train.prepare(method, *train.parse(method, argv[1:], "test"))


@pytest.mark.parametrize("method", ["dpo", "chipo"])
def test_a_training_needs_no_reference_model(method, stored, model_dir, tmp_path, monkeypatch):
    """It has the losses of one whose reference runs beside it, and runs none."""
    live = tmp_path / "pairs.jsonl"
    load_dataset(stored, split="train").remove_columns([*PAIRS, REF_SETTINGS]).to_json(str(live))
    losses = []
    for source, options in ((str(live), {"eval_strategy": "no"}), (stored, {})):
        if source == stored:
            monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", None)
        trainer = prepared(command(source, model_dir, tmp_path / f"{len(losses)}", method, **options))
        trainer.train()
        losses.append([entry["loss"] for entry in logs(trainer)])
        assert (trainer.ref_model is None) == (source == stored)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[1][0] != losses[1][1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 25}, r"`max_length=24` \(here 25\)"),
        ({"max_length": 1024}, r"`max_length=24` \(here 1024\)"),
        ({"truncation_mode": "keep_end"}, r"`truncation_mode='keep_start'` \(here 'keep_end'\)"),
    ],
)
def test_another_length_is_refused(options, message, stored, model_dir, tmp_path, no_model):
    with pytest.raises(ValueError, match=message):
        prepared(command(stored, model_dir, tmp_path, **options))


def test_another_template_is_refused(stored, model_dir, tmp_path, no_model, tokenizer):
    other = tiny.tokenizer()
    other.chat_template = tokenizer.chat_template + "\n"
    rows = load_dataset(stored, split="train")
    args = PreferenceConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=24)
    with pytest.raises(ValueError, match="another tokenizer or chat template"):
        PreferenceTrainer(model_dir, args=args, train_dataset=rows, processing_class=other)


def test_several_references_are_refused(stored, tokenizer, tmp_path, no_model, model_dir):
    rows = load_dataset(stored, split="train")
    other = store_references(
        tiny.model("llama", tokenizer, seed=3), tiny.preference_data(), tmp_path / "other", processing_class=tokenizer,
        max_length=24,
    )  # fmt: skip
    args = PreferenceConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=24)
    message = "those of 2 different references"
    with pytest.raises(ValueError, match=message):
        PreferenceTrainer(model_dir, args=args, train_dataset=concatenate_datasets([rows, other]))
    with pytest.raises(ValueError, match=message):
        PreferenceTrainer(model_dir, args=args, train_dataset=rows, eval_dataset=other)


def test_evaluation_data_are_checked_too(stored, tokenizer, tmp_path, model):
    rows = load_dataset(stored, split="train")
    trainer = make(PreferenceTrainer, PreferenceConfig, tmp_path, model, rows, tokenizer, max_length=24)
    longer = store_references(
        model, tiny.preference_data(), tmp_path / "longer", processing_class=tokenizer, max_length=30
    )
    for run in (trainer.evaluate, trainer.predict):
        with pytest.raises(ValueError, match=r"`max_length=30` \(here 24\)"):
            run(longer)
        assert run(rows.select(range(4)))


def test_a_stream_is_checked_by_its_first_row(stored, model_dir, tmp_path, no_model):
    stream = load_dataset(stored, split="train", streaming=True)
    args = PreferenceConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1)
    with pytest.raises(ValueError, match="max_length=24"):
        PreferenceTrainer(model_dir, args=args, train_dataset=stream)


@pytest.mark.parametrize("value", ["", "[]", "{}", None])
def test_foreign_settings_are_refused(value, stored, model_dir, tmp_path, no_model):
    rows = load_dataset(stored, split="train").remove_columns(REF_SETTINGS)
    rows = rows.add_column(REF_SETTINGS, [value] * 8)
    args = PreferenceConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=24)
    with pytest.raises(ValueError, match="which `store_references` did not write"):
        PreferenceTrainer(model_dir, args=args, train_dataset=rows)


# ---------------------------------------------------------------- the command, interruptions


def test_command(tmp_path, model_dir, capsys, monkeypatch):
    file = tmp_path / "rows.jsonl"
    single_responses().to_json(str(file))
    argv = ["--model_name_or_path", model_dir, "--dataset_name", str(file), "--output_dir", str(tmp_path / "out")]
    assert stored_references.main([*argv, "--max_length", "none", "--shard_size", "4"]) == 0
    assert "of 8 rows." in capsys.readouterr().out
    assert len(load_dataset(str(tmp_path / "out"), split="train")["ref_logps"][:]) == 8
    assert stored_references.main([*argv, "--max_length", "30", "--shard_size", "4"]) == 1
    assert "max_length=None (now 30)" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # all rows are needed
        stored_references.main([*argv, "--dataset_streaming"])


def test_killed_and_finished_by_two_processes(tmp_path, model_dir, tokenizer, model):
    done = subprocess.run(
        [sys.executable, TESTS / "stored_references_killed.py", model_dir, tmp_path / "out"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(TESTS)}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["killed"] == -9
    assert report["files"] == ["train-00000-of-00004.parquet"]
    assert report["processes"] == [0, 0]
    assert report["scored"] == [4, 8]  # two responses a row, two rows a file; the first file was there
    assert report["left"] == []
    found = load_dataset(str(tmp_path / "out"), split="train")
    whole = store_references(model, tiny.preference_data(), tmp_path / "whole", processing_class=tokenizer)
    for column in PAIRS:
        torch.testing.assert_close(
            torch.tensor(found[column][:]), torch.tensor(whole[column][:]), rtol=1e-6, atol=1e-6
        )


def test_what_is_finished_is_not_scored_again(tmp_path, model, tokenizer, monkeypatch):
    options = {"processing_class": tokenizer, "shard_size": 3}
    store_references(model, tiny.preference_data(), tmp_path, **options)
    files = sorted((tmp_path / "data").iterdir())
    damaged = files[1].read_bytes()
    files[1].write_bytes(damaged[: len(damaged) // 2])
    scored, run = [], stored_references.sequence_log_probs
    monkeypatch.setattr(
        stored_references, "sequence_log_probs", lambda *args: (scored.append(len(args[1])), run(*args))[1]
    )
    with pytest.warns(UserWarning, match="is damaged: it is made anew"):
        store_references(model, tiny.preference_data(), tmp_path, **options)
    assert scored == [6]
    assert files[1].read_bytes() == damaged


def test_other_settings_do_not_mix(tmp_path, model, tokenizer):
    rows, options = tiny.preference_data(), {"processing_class": tokenizer, "shard_size": 3}
    store_references(model, rows, tmp_path, **options)
    with pytest.raises(ValueError, match="max_length=1024"):
        store_references(model, rows, tmp_path, max_length=10, **options)
    with pytest.raises(ValueError, match="dataset="):
        store_references(model, rows.select([1, 0, 2, 3, 4, 5, 6, 7]), tmp_path, **options)
    with pytest.raises(ValueError, match="reference="):
        store_references(tiny.model("llama", tokenizer, seed=3), rows, tmp_path, **options)
    (tmp_path / "foreign" / "data").mkdir(parents=True)
    (tmp_path / "foreign" / "data" / "train-0.parquet").touch()
    with pytest.raises(ValueError, match="data of other origin"):
        store_references(model, rows, tmp_path / "foreign", **options)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (lambda: tiny.preference_data().to_iterable_dataset(), {}, "expected a `Dataset`"),
        (lambda: tiny.preference_data().remove_columns("rejected"), {}, "rejected"),
        (lambda: tiny.preference_data().add_column("ref_settings", [""] * 8), {}, "already"),
        (single_responses, {"truncation_mode": "keep_end"}, "keep the start"),
        (tiny.preference_data, {"truncation_mode": "middle"}, "truncation_mode"),
        (tiny.preference_data, {"max_length": 0}, "max_length"),
        (tiny.preference_data, {"split": "../train"}, "split"),
    ],
)
def test_bad_input(rows, options, message, tmp_path, model_dir, no_model):
    with pytest.raises((ValueError, TypeError), match=message):
        store_references(model_dir, rows(), tmp_path, **options)
    assert not list(tmp_path.rglob("*.parquet"))


# ---------------------------------------------------------------- TRL's cache


def test_the_cache_of_the_trainers(tmp_path, model_dir, monkeypatch):
    """One scoring for two methods, betas and seeds on the same file; none of it helps data in memory."""
    file = tmp_path / "pairs.jsonl"
    tiny.preference_data().to_json(str(file))
    scored, compute = [], DPOTrainer.compute_ref_log_probs
    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", lambda *args: (scored.append(1), compute(*args))[1])

    def scorings(make_rows):
        counts = []
        for trainer, config in ((PreferenceTrainer, PreferenceConfig), (DPOPTrainer, DPOPConfig)):
            for beta, seed in ((0.1, 0), (0.5, 1)):
                scored.clear()
                args = config(
                    str(tmp_path / "run"), use_cpu=True, bf16=False, report_to="none", precompute_ref_log_probs=True,
                    beta=beta, seed=seed, per_device_train_batch_size=8,
                )  # fmt: skip
                trainer(model_dir, args=args, train_dataset=make_rows())
                counts.append(len(scored))
        return counts

    cache = str(tmp_path / "cache")
    assert scorings(lambda: load_dataset("json", data_files=str(file), split="train", cache_dir=cache)) == [1, 0, 0, 0]
    rows = tiny.preference_data().to_list()
    assert scorings(lambda: Dataset.from_list(rows)) == [1, 1, 1, 1]
