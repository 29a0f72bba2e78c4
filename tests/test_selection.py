"""From scores to a folder: what a selection holds, how it is refused, and `trl-ift select` and `trl-ift lobass`."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from datasets import Dataset, IterableDataset, load_from_disk

from trl_ift.cli import main
from trl_ift.data import learnability, load_scores, score_dataset, selection_scores, top_rows
from trl_ift.data import selection as module
from trl_ift.data.scoring import row_hash
from trl_ift.data.selection import join_folds, write_selection
from trl_ift.scripts import lobass
from trl_ift.scripts.data import load_named
from trl_ift.supervised import sft


pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TRL_IFT_DEBUG", raising=False)
    return tmp_path


def losses(nll, num_tokens=None, row_hash=None) -> Dataset:
    """Scores with these mean losses."""
    number = len(nll)
    num_tokens = [4] * number if num_tokens is None else num_tokens
    return Dataset.from_dict(
        {
            "index": list(range(number)),
            "row_hash": row_hash or [f"{i:016x}" for i in range(number)],
            "token_hash": [f"{i:016x}" for i in range(number)],
            "num_tokens": num_tokens,
            "nll_sum": [float(loss * n) if n else float("nan") for loss, n in zip(nll, num_tokens, strict=True)],
            "nll": [float(loss) if n else float("nan") for loss, n in zip(nll, num_tokens, strict=True)],
        }
    )


@pytest.fixture(scope="module")
def scored(tokenizer):
    """A dataset and its scores under two models and without prompts."""
    data = tiny.prompt_completion_data().add_column("source", list(range(8)))
    base, tuned = (tiny.model("llama", tokenizer, seed=seed) for seed in (0, 1))
    return {
        "dataset": data,
        "initial": score_dataset(base, data, processing_class=tokenizer),
        "reference": score_dataset(tuned, data, processing_class=tokenizer),
        "direct": score_dataset(base, data, processing_class=tokenizer, direct_prompt="### Response:"),
    }


# ---------------------------------------------------------------- the folder


def test_contents(scored):
    rows = write_selection("out", **scored, fraction=0.5, settings={"initial_model": "tiny"})
    scores = learnability(scored["initial"], scored["reference"])
    expected = sorted(np.argsort(-scores)[:4].tolist())
    assert rows["source"] == expected
    assert rows[:] == scored["dataset"].select(expected)[:]
    assert load_from_disk("out")[:] == rows[:]
    assert load_named("out")["train"][:] == rows[:]

    table = pq.read_table("out/scores.parquet").to_pydict()
    assert table["index"] == list(range(8))
    assert table["selected"] == [i in expected for i in range(8)]
    np.testing.assert_array_equal(table["learnability"], scores)
    for name in ("initial", "reference"):
        assert table[f"loss_{name}"] == scored[name]["nll"][:]
    for name in ("num_tokens", "row_hash"):
        assert table[name] == scored["initial"][name][:]

    summary = json.loads(Path("out/selection.json").read_text())
    assert summary == {
        "selection": "lobass", "fraction": 0.5, "k": None, "min_score": None, "normalize": "initial",
        "initial_model": "tiny", "rows": 8, "selected": 4, "dropped": {},
    }  # fmt: skip
    page = Path("out/report.html").read_text()
    for text in ("learnability", "IFD", "RHO-LM", "lowest perplexity", "longest", "random", "initial_model", "tiny"):
        assert text in page, text
    best = scored["dataset"][int(np.argmax(scores))]
    assert best["prompt"] in page
    assert best["completion"].strip() in page
    assert sorted(path.name for path in Path().iterdir() if path.name != "cache") == ["out"]


@pytest.mark.parametrize("selection", module.SELECTIONS)
def test_every_selection(selection, scored):
    direct = scored | {"initial": losses(np.arange(8) * 0.1 + 0.5), "direct": losses([1.0] * 8)}
    direct["reference"] = losses(np.linspace(0.1, 0.9, 8))
    direct["initial"] = (
        direct["initial"].remove_columns("row_hash").add_column("row_hash", scored["initial"]["row_hash"][:])
    )
    for name in ("reference", "direct"):
        direct[name] = direct[name].remove_columns("row_hash").add_column("row_hash", scored["initial"]["row_hash"][:])
    seed = {"seed": 3} if selection == "random" else {}
    rows = write_selection("out", **direct, selection=selection, k=2, report=False, **seed)
    scores = selection_scores(selection, direct["initial"], direct["reference"], direct["direct"], seed=3)
    assert rows["source"] == top_rows(scores, k=2).tolist()
    column = "learnability" if selection == "lobass" else "score"
    np.testing.assert_array_equal(pq.read_table("out/scores.parquet")[column].to_numpy(), scores)


def test_dropped_rows_are_counted_by_reason(scored):
    hashes = scored["initial"]["row_hash"][:]
    initial = losses([1, 1, 1, 0, float("nan"), 1, 1, 1], [4, 0, 4, 4, 4, 4, 4, 4], hashes)
    reference = losses([0.5, 1, 2, 0, 1, 0.9, 0.8, 0.7], [4, 0, 4, 4, 4, 4, 4, 4], hashes)
    rows = write_selection("out", scored["dataset"], initial, reference, fraction=0.5, min_score=0.0)
    assert rows["source"] == [0, 5, 6, 7]
    assert json.loads(Path("out/selection.json").read_text())["dropped"] == {
        "no scored token after truncation": 1,
        "the loss is not finite": 1,
        "the initial loss is 0": 1,
        "score below min_score (0)": 1,
    }
    assert "no scored token after truncation" in Path("out/report.md").read_text()


def test_stream(scored):
    stream = IterableDataset.from_generator(lambda: iter(scored["dataset"].to_list()))
    options = {name: scored[name] for name in ("initial", "reference", "direct")}
    rows = write_selection("stream", stream, **options, k=3)
    assert rows[:] == write_selection("map", scored["dataset"], **options, k=3)[:]
    assert Path("stream/report.md").read_text() == Path("map/report.md").read_text()
    short = IterableDataset.from_generator(lambda: iter(scored["dataset"].to_list()[:2]))
    with pytest.raises(ValueError, match="The stream ended before row"):
        write_selection("short", short, **options, k=5)
    assert not Path("short").exists()


@pytest.mark.parametrize(
    ("data", "prompt", "completion"),
    [
        (tiny.text_data, "", "What is the capital of France? The capital of France is Paris."),
        (tiny.messages_data, "What is the capital of France?", "The capital of France is Paris."),
        (tiny.conversational_data, "What is the capital of France?", "The capital of France is Paris."),
    ],
)
def test_texts_of_the_report(data, prompt, completion, tokenizer):
    scores = score_dataset(tiny.model("llama", tokenizer), data(), processing_class=tokenizer)
    write_selection("out", data(), scores, selection="length", k=8)
    page = Path("out/report.md").read_text()
    assert completion in page
    assert prompt in page


@pytest.mark.parametrize("streamed", [False, True])
def test_report_of_equal_scores(streamed):
    rows = Dataset.from_list([{"text": f"row {i} of many"} for i in range(120)])
    hashes = [row_hash({"text": row["text"]}) for row in rows]
    equal = losses([1.0] * 120, row_hash=hashes)
    data = IterableDataset.from_generator(lambda: iter(rows.to_list())) if streamed else rows
    assert write_selection("out", data, equal, equal, min_score=-1.0)["text"] == rows["text"][:7]
    assert json.loads(Path("out/selection.json").read_text())["fraction"] == 0.06
    assert "row 0 of many" in Path("out/report.md").read_text()


def test_nothing_is_written_over_or_half_written(scored, monkeypatch):
    write_selection("out", **scored, k=2, report=False)
    with pytest.raises(ValueError, match="already holds a selection.*--overwrite"):
        write_selection("out", **scored, k=3)
    assert len(load_from_disk("out")) == 2

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_report", fail)
        with pytest.raises(OSError, match="No space"):
            write_selection("out", **scored, k=3, overwrite=True)
        assert len(load_from_disk("out")) == 2
        with pytest.raises(OSError, match="No space"):
            write_selection("new", **scored, k=3)
        assert sorted(path.name for path in Path().iterdir() if path.name != "cache") == ["out"]
    assert len(write_selection("out", **scored, k=3, overwrite=True)) == 3

    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds other files"):
        write_selection("mine", **scored, k=3, overwrite=True)
    assert Path("mine/thesis.txt").exists()


def test_replacing_never_loses_both(scored, monkeypatch):
    """Interrupted between the two moves, the old selection is back; only a selection is ever replaced."""
    write_selection("out", **scored, k=2, report=False)
    replace = os.replace

    def interrupted(source, target):
        if Path(target).name == "out" and Path(source).name == "selection":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_selection("out", **scored, k=3, report=False, overwrite=True)
    assert len(load_from_disk("out")) == 2
    assert sorted(path.name for path in Path().iterdir() if path.name != "cache") == ["out"]

    Path("out/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(notes.txt\)"):
        write_selection("out", **scored, k=3, report=False, overwrite=True)
    Path("out/notes.txt").unlink()
    Path("link").symlink_to("out")
    write_selection("link", **scored, k=4, report=False, overwrite=True)
    assert len(load_from_disk("out")) == 4
    assert Path("link").is_symlink()


def test_options_of_other_selections_are_refused(scored):
    for options in ({"normalize": None}, {"band": "high"}, {"seed": 1}):
        with pytest.raises(ValueError, match="has no effect with `selection='length'`"):
            write_selection("out", **scored, selection="length", **options)
    assert not Path("out").exists()


def test_wrong_dataset_is_refused(scored):
    options = {name: scored[name] for name in ("initial", "reference")}
    with pytest.raises(ValueError, match="The dataset has 7 rows and there are scores of 8"):
        write_selection("out", scored["dataset"].select(range(7)), **options, k=2)
    with pytest.raises(ValueError, match="is not the row that was scored"):
        write_selection("out", scored["dataset"].select(range(7, -1, -1)), **options, k=2)
    assert not Path("out").exists()


def test_joined_folds_are_in_the_order_of_the_rows(scored, tokenizer):
    model, data = tiny.model("llama", tokenizer, seed=1), scored["dataset"]
    folds = [np.array([1, 2, 6]), np.array([0, 3, 4, 5, 7])]
    parts = [score_dataset(model, data.select(fold), processing_class=tokenizer) for fold in folds]
    joined = join_folds(list(zip(folds, parts, strict=True)))
    assert joined["index"] == list(range(8))
    assert joined["token_hash"] == scored["reference"]["token_hash"]
    np.testing.assert_allclose(joined["nll"], scored["reference"]["nll"], rtol=1e-6)
    assert np.isfinite(learnability(scored["initial"], joined)).all()


# ---------------------------------------------------------------- trl-ift select


@pytest.fixture
def folders(scored, tokenizer, model_dir, workdir):
    """A data file, and folders of scores."""
    scored["dataset"].to_json("data.jsonl")
    data = load_named("data.jsonl")["train"]
    score_dataset(model_dir, data, "initial")
    score_dataset(tiny.model("llama", tokenizer, seed=1), data, "reference", processing_class=tokenizer)
    score_dataset(model_dir, data, "direct", direct_prompt="### Response:")
    return ["--initial", "initial", "--reference", "reference", "--dataset_name", "data.jsonl", "--output_dir", "out"]


def test_select(folders, capsys):
    assert main(["select", *folders, "--direct", "direct", "--fraction", "0.25"]) == 0
    scores = learnability(load_scores("initial"), load_scores("reference"))
    assert load_from_disk("out")["source"] == top_rows(scores, 0.25).tolist()
    assert "Selected 2 of 8 rows. Train on them with `--dataset_name out`." in capsys.readouterr().out
    assert main(["select", *folders, "--selection", "length", "--k", "3", "--overwrite", "--no_report"]) == 0
    assert len(load_from_disk("out")) == 3
    assert not Path("out/report.html").exists()
    Path("options.yaml").write_text("selection: perplexity\nband: high\nk: 1\noverwrite: true\nno_report: true\n")
    assert main(["select", *folders, "--config", "options.yaml"]) == 0
    assert load_from_disk("out")["source"] == [int(np.argmax(load_scores("initial")["nll"]))]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--fraction", "1.5"], "`fraction=1.5` is out of range"),
        (["--fraction", "0"], "`fraction=0.0` is out of range"),
        (["--fraction", "0.5", "--k", "2"], "exclude each other"),
        (["--k", "9"], "there are only 8 rows"),
        (["--selection", "ifd"], "needs the scores `direct`"),
        (["--direct", "initial"], "holds scores of completions with their prompts"),
        (["--reference", "direct"], "holds scores of completions without their prompts"),
        (["--reference", "nowhere"], "holds no scores"),
        (["--dataset_split", "test"], "has no split 'test'"),
    ],
)
def test_select_bad_input(options, expected, folders, capsys):
    assert main(["select", *folders, *options]) == 1
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error
    assert not Path("out").exists()


def test_scores_that_do_not_belong_together(folders, model_dir, capsys):
    from trl import SFTConfig

    data = load_named("data.jsonl")["train"]
    args = SFTConfig("x", use_cpu=True, bf16=False, max_length=20)
    score_dataset(model_dir, data, "shorter", args=args)
    assert main(["select", *folders, "--reference", "shorter"]) == 1
    assert "max_length=20 there and 1024 in initial" in capsys.readouterr().err
    score_dataset(model_dir, data, "bf16", model_init_kwargs={"dtype": "bfloat16"})
    assert main(["select", *folders, "--reference", "bf16"]) == 1
    assert "dtype='bfloat16' there" in capsys.readouterr().err
    score_dataset(model_dir, data.select(range(7)), "fewer")
    assert main(["select", *folders, "--reference", "fewer"]) == 1
    assert "rows=7 there and 8" in capsys.readouterr().err


def test_direct_scores_of_another_model_are_refused(folders, tokenizer, capsys):
    data = load_named("data.jsonl")["train"]
    other = tiny.model("llama", tokenizer, seed=5)
    score_dataset(other, data, "other", processing_class=tokenizer, direct_prompt="### Response:")
    assert main(["select", *folders, "--direct", "other", "--selection", "ifd"]) == 1
    assert "policy='" in capsys.readouterr().err


def test_nulls_and_texts_in_the_yaml_file(folders, capsys):
    Path("options.yaml").write_text("k: 2\nfraction: null\nmin_score: null\nno_report: true\n")
    assert main(["select", *folders, "--config", "options.yaml"]) == 0
    assert len(load_from_disk("out")) == 2
    Path("options.yaml").write_text('overwrite: "false"\n')
    assert main(["select", *folders, "--config", "options.yaml"]) == 1
    assert "`overwrite: 'false'` must be true or false" in capsys.readouterr().err


def test_select_notes_a_reference_that_was_not_trained(folders, capsys):
    assert main(["select", *folders, "--reference", "initial", "--fraction", "0.5", "--no_report"]) == 0
    assert "has the weights of the initial model" in capsys.readouterr().err
    assert load_from_disk("out")["source"] == [0, 1, 2, 3]


# ---------------------------------------------------------------- trl-ift lobass


@pytest.fixture
def command(model_dir, workdir):
    rows = tiny.prompt_completion_data().to_list()
    Dataset.from_list([row | {"source": i} for i, row in enumerate(rows * 2)]).to_json("data.jsonl")
    return [
        "--model_name_or_path", model_dir, "--dataset_name", "data.jsonl", "--output_dir", "run", "--fraction", "0.25",
        "--max_steps", "3", "--learning_rate", "0.02", "--report_to", "none", "--dtype", "float32", "--use_cpu",
        "--logging_steps", "1", "--save_steps", "1", "--disable_tqdm", "True",
    ]  # fmt: skip


LORA = ["--use_peft", "--lora_target_modules", "all-linear", "--lora_r", "4"]


@pytest.mark.parametrize("peft", [[], LORA], ids=["full", "lora"])
def test_pipeline(peft, command, model_dir, monkeypatch, capsys):
    assert lobass.run([*command, *peft]) == 0, capsys.readouterr().err
    assert list(Path("run").rglob("checkpoint-*"))
    assert not list(Path("run").rglob("training_args.bin"))
    data = load_named("data.jsonl")["train"]
    initial, reference = load_scores("run/scores/initial"), load_scores("run/scores/reference")
    options = {"adapter": "run/reference"} if peft else {}
    trained = score_dataset(model_dir if peft else "run/reference", data, **options)
    assert initial[:] == score_dataset(model_dir, data)[:]
    np.testing.assert_allclose(reference["nll"], trained["nll"], rtol=1e-6)
    assert np.mean(reference["nll"]) < np.mean(initial["nll"]) - 0.01
    chosen = top_rows(learnability(initial, reference), 0.25)
    assert load_from_disk("run/selection")["source"] == chosen.tolist()
    page = Path("run/selection/report.md").read_text()
    assert "IFD" in page
    assert "reference_learning_rate" in page

    # Another fraction: nothing is trained or scored again
    from trl import SFTTrainer

    monkeypatch.setattr(SFTTrainer, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    shards = list(Path("run/scores").rglob("*.parquet"))
    written = [path.stat().st_mtime_ns for path in shards]
    wider = ["0.5" if option == "0.25" else option for option in command]
    assert lobass.run([*wider, *peft]) == 1
    assert "already holds a selection" in capsys.readouterr().err
    assert lobass.run([*wider, *peft, "--overwrite_selection", "True"]) == 0
    assert len(load_from_disk("run/selection")) == 8
    assert [path.stat().st_mtime_ns for path in shards] == written


def test_qlora(command, capsys):
    pytest.importorskip("bitsandbytes")
    assert lobass.run([*command, *LORA, "--load_in_4bit"]) == 0, capsys.readouterr().err
    initial, reference = load_scores("run/scores/initial"), load_scores("run/scores/reference")
    assert np.mean(reference["nll"]) < np.mean(initial["nll"]) - 0.01
    assert len(load_from_disk("run/selection")) == 4


@pytest.mark.parametrize("peft", [[], LORA], ids=["full", "lora"])
def test_cross_fit(peft, command, model_dir, capsys):
    assert lobass.run([*command, *peft, "--cross_fit", "2", "--no_report"]) == 0, capsys.readouterr().err
    data = load_named("data.jsonl")["train"]
    order = np.random.default_rng(42).permutation(16)
    folds = [np.sort(order[fold::2]) for fold in range(2)]
    expected = np.empty(16)
    for number, fold in enumerate(folds):
        part = load_scores(f"run/scores/reference-{number}")
        options = {"adapter": f"run/reference-{number}"} if peft else {}
        source = model_dir if peft else f"run/reference-{number}"
        again = score_dataset(source, data.select(fold), **options)
        np.testing.assert_allclose(part["nll"], again["nll"], rtol=1e-6)
        expected[fold] = part["nll"]
    table = pq.read_table("run/selection/scores.parquet").to_pydict()
    np.testing.assert_array_equal(table["loss_reference"], expected)
    assert not Path("run/scores/direct").exists()


def test_folds_are_trained_without_the_rows_they_score(command, monkeypatch):
    seen = []

    class Spy(sft.PlainSFTTrainer):
        def __init__(self, *args, **kwargs):
            seen.append(kwargs["train_dataset"]["source"])
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(sft, "PlainSFTTrainer", Spy)
    assert lobass.run([*command, "--cross_fit", "4", "--no_report", "--max_steps", "1"]) == 0
    held_out = [set(range(16)) - set(rows) for rows in seen]
    assert [len(rows) for rows in held_out] == [4] * 4
    assert set.union(*held_out) == set(range(16))


def test_scoring_loads_the_model_as_training_did(command):
    kwargs = json.dumps({"attn_implementation": "eager"})
    assert (
        lobass.run([*command, *LORA, "--no_report", "--model_init_kwargs", kwargs, "--score_dtype", "bfloat16"]) == 0
    )
    for name in ("initial", "reference"):
        settings = json.loads(Path(f"run/scores/{name}/manifest.json").read_text())["settings"]
        assert settings["attn_implementation"] == "eager"
        assert settings["dtype"] == "bfloat16"


def test_one_model_in_memory(command, monkeypatch):
    """When a model is loaded for scoring, those before it are gone."""
    import weakref

    from trl_ift.data import inference

    loaded, alive, load = [], [], inference.load_model

    def watched(*args, **kwargs):
        alive.append(sum(model() is not None for model in loaded))
        model = load(*args, **kwargs)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(inference, "load_model", watched)
    assert lobass.run([*command, "--cross_fit", "2", "--no_report"]) == 0
    assert alive == [0, 0, 0]


def test_a_trainer_in_mixed_precision_scores_as_its_model_does(tokenizer, workdir):
    """Whether the trainer has wrapped the forward or not, no score is computed in its precision."""
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    data = tiny.prompt_completion_data()
    trainer = SFTTrainer(
        model=tiny.model("llama", tokenizer),
        args=SFTConfig("out", use_cpu=True, bf16=True, max_steps=1, report_to="none", save_strategy="no"),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules="all-linear"),
    )
    with trainer.model.disable_adapter():
        before = score_dataset(trainer.model, data, processing_class=tokenizer)
    trainer.train()
    with trainer.model.disable_adapter():
        after = score_dataset(trainer.model, data, processing_class=tokenizer)
    assert before[:] == after[:] == score_dataset(tiny.model("llama", tokenizer), data, processing_class=tokenizer)[:]


def test_interrupted_training_goes_on(command, monkeypatch, capsys):
    """Interrupted in the second step, the run ends with the weights and the selection of an uninterrupted one."""
    from transformers import Trainer

    whole = ["whole" if option == "run" else option for option in command]
    assert lobass.run([*whole, *LORA, "--no_report"]) == 0
    steps, step = [], Trainer.training_step

    def interrupted(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if self.state.global_step == 1 and len(steps) == 2:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", interrupted)
    assert lobass.run([*command, *LORA, "--no_report"]) == 130
    assert "run the same command again" in capsys.readouterr().err
    assert lobass.run([*command, *LORA, "--no_report"]) == 0
    assert steps == [0, 1, 1, 2]
    assert "from checkpoint-1" in capsys.readouterr().out
    weights = [Path(run, "reference/adapter_model.safetensors").read_bytes() for run in ("run", "whole")]
    assert weights[0] == weights[1]
    assert load_from_disk("run/selection")[:] == load_from_disk("whole/selection")[:]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--fraction", "2"], "`fraction=2.0` is out of range"),
        (["--k", "3"], "exclude each other"),
        (["--cross_fit", "0"], "`cross_fit=0` is out of range"),
        (["--cross_fit", "17"], "`cross_fit=17` of 16 rows"),
        (["--push_to_hub"], "is not pushed"),
        (["--resume_from_checkpoint", "True"], "goes on by itself"),
        (["--min_score", "1.5"], "`min_score=1.5` is out of range"),
        (["--dataset_streaming", "--max_steps", "-1"], "say how long to train with `--max_steps`"),
        (["--chat_template_path", "nowhere.jinja"], "is no template file"),
        (["--dataset_name", "nowhere.jsonl"], "does not exist"),
        (["--model_name_or_path", "."], "has no `config.json`"),
    ],
)
def test_pipeline_bad_input(options, expected, command, capsys):
    assert lobass.run([*command, *options]) == 1
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error
    assert not Path("run").exists()


def test_a_run_is_not_continued_with_other_settings(command, capsys):
    assert lobass.run([*command, "--no_report"]) == 0
    shutil.rmtree("run/selection")
    assert lobass.run([*command, "--no_report", "--learning_rate", "0.01"]) == 1
    assert "learning_rate=0.02 (now 0.01)" in capsys.readouterr().err
    data = Path("data.jsonl").read_text()
    Path("data.jsonl").write_text(data.replace("Eight", "Seven"))
    assert lobass.run([*command, "--no_report"]) == 1
    assert "dataset_digest='" in capsys.readouterr().err
    shutil.rmtree("run")
    Path("run").mkdir()
    Path("run/notes.txt").write_text("mine")
    assert lobass.run(command) == 1
    assert "is not empty, and holds no run of LoBaSS" in capsys.readouterr().err


def test_settings_that_never_worked_do_not_bind(command, capsys):
    wrong = ["--use_peft", "--lora_target_modules", "nothing_of_this_name"]
    assert lobass.run([*command, *wrong, "--no_report"]) == 1
    assert "nothing_of_this_name" in capsys.readouterr().err
    assert lobass.run([*command, *LORA, "--no_report"]) == 0


def test_streamed_data(command):
    assert lobass.run([*command, *LORA, "--no_report"]) == 0
    streamed = ["streamed" if option == "run" else option for option in command]
    assert lobass.run([*streamed, *LORA, "--dataset_streaming", "--no_report"]) == 0
    assert load_scores("streamed/scores/initial")[:] == load_scores("run/scores/initial")[:]
    assert len(load_from_disk("streamed/selection")) == 4


def test_help_of_the_commands(capsys):
    for name, option in (("score", "--direct_prompt"), ("select", "--min_score"), ("lobass", "--cross_fit")):
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert not stop.value.code
        assert option in capsys.readouterr().out


@pytest.mark.slow
def test_pipeline_in_two_processes(command, model_dir):
    """Launched by the command in two processes: one selection, the shards dealt out, nobody waits in vain."""
    program = [sys.executable, "-m", "trl_ift.cli", "lobass", *command, *LORA, "--shard_size", "3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = ["--num_processes", "2", "--cpu"]
    done = subprocess.run([*program, *launch], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Selected 4 of 16 rows") == 1
    assert len(list(Path("run/scores/initial").glob("*.parquet"))) == 6
    assert (
        load_from_disk("run/selection")["source"]
        == top_rows(
            learnability(load_scores("run/scores/initial"), load_scores("run/scores/reference")), 0.25
        ).tolist()
    )


@pytest.mark.slow
def test_killed_pipeline_goes_on(command):
    """SIGKILL of the whole group at some point of the training, then the same command."""
    program = [sys.executable, "-m", "trl_ift.scripts.lobass", *command, *LORA, "--no_report", "--max_steps", "40"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(program, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(Path("run/reference").glob("checkpoint-*")) and time.monotonic() < deadline:
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not Path("run/selection").exists()
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(load_from_disk("run/selection")) == 4
