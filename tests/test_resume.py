"""Killed (SIGKILL) at a random step and resumed is bit for bit the run that was not: weights, optimizer, logs, states.

Every run is a process of its own, a fork of `resume_worker.py`. A method is under these tests once it stands in the registry.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import resume_worker
import tiny
import torch
from safetensors.torch import load_file
from transformers.trainer_pt_utils import safe_globals

from trl_ift import reference
from trl_ift.checks import is_complete_checkpoint
from trl_ift.extension import ExtensionTrainer
from trl_ift.registry import METHODS, get_method


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the worker forks")

# Where a training can be killed; from some number of steps on, all before the last
EVENTS = (
    "on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_step_end", "on_log", "on_evaluate", "on_save",
)  # fmt: skip
# Settings that give a method what it has to remember
STATEFUL = {
    "ift": {
        "ift_lambda_noise_std": 0.5,
        "ift_prediction": "sample",
        "ift_lambda_schedule": "linear",
        "ift_lambda_warmup_steps": 5,
    }
}
# What happens at the end of an epoch, behind the save of its last step
BY_EPOCH = {"eval_strategy": "epoch", "logging_strategy": "epoch"}
TIMES = ("_runtime", "_per_second")


class Worker:
    """Gives jobs to `resume_worker.py`."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, resume_worker.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.wholes = {}

    def __call__(self, folder, name, **job):
        """Run a job in `folder`, with its training in `run` there; return how it ended, and what it printed."""
        if "cli" not in job:
            job["output_dir"] = str(folder / "run")
        self.process.stdin.write(json.dumps({"folder": str(folder), "name": name, **job}) + "\n")
        self.process.stdin.flush()
        codes = json.loads(self.process.stdout.readline())
        printed = "".join(path.read_text() for path in sorted(folder.glob(f"{name}-*.txt")))
        return codes, printed

    def whole(self, tmp_path_factory, **job):
        """Folder of the run that is not killed, the same for all jobs that are."""
        key = json.dumps(job, sort_keys=True)
        if key not in self.wholes:
            folder = tmp_path_factory.mktemp("whole")
            codes, printed = self(folder, "whole", **job)
            assert set(codes) == {0}, printed[-3000:]
            self.wholes[key] = folder / "run"
        return self.wholes[key]


@pytest.fixture(scope="module")
def worker():
    worker = Worker()
    yield worker
    worker.process.stdin.close()
    worker.process.wait(timeout=60)


@pytest.fixture
def interrupted(worker, tmp_path, tmp_path_factory):
    """A function that runs a job, killed and resumed, compares it with the whole run, and returns what was printed then."""

    def run(kill=None, writing=None, resume=True, **job):
        whole = worker.whole(tmp_path_factory, **job)
        codes, printed = worker(tmp_path, "killed", kill=kill, writing=writing, **job)
        assert -signal.SIGKILL in codes, printed[-3000:]
        found = [path for path in (tmp_path / "run").glob("checkpoint-*") if is_complete_checkpoint(path)]
        note = f"killed at {kill or writing}; complete checkpoints: {sorted(path.name for path in found)}"
        rest = rest_of(whole, max(found, key=step_of))
        codes, printed = worker(tmp_path, "resumed", resume=resume, **job)
        assert set(codes) == {0}, f"{note}: {printed[-3000:]}"
        assert_same(tmp_path / "run", whole, note)
        steps, loss = rest
        summary = json.loads((tmp_path / "run" / "log.json").read_text())[-1]
        assert summary["train_loss"] * max(steps, 0.001) == pytest.approx(loss, rel=1e-5, abs=1e-4), note
        return printed

    return run


def step_of(checkpoint):
    return int(checkpoint.name.split("-")[1])


def rest_of(whole, checkpoint):
    """Number of steps behind a checkpoint, and the sum of their losses: that of all less those before it."""
    *log, summary = json.loads((whole / "log.json").read_text())
    state = json.loads((checkpoint / "trl_ift_state.json").read_text())
    losses = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    before, last = 0.0, 0
    for step, loss in losses:
        if step <= state["last_logged"]:
            before, last = before + (step - last) * loss, step
    logged = losses[-1][0] > state["last_logged"]
    before += sum(state["loss"]) / len(state["loss"]) if logged else state["loss"][0]
    return summary["step"] - step_of(checkpoint), summary["train_loss"] * summary["step"] - before


def without_times(entry):
    return {name: value for name, value in entry.items() if not name.endswith(TIMES)}


def content(path, run):
    """What a file of a checkpoint holds, without times and the place of the run."""
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix in (".pt", ".pth"):
        with safe_globals():
            return torch.load(path, weights_only=True)
    text = path.read_bytes().replace(str(run).encode(), b"RUN")
    if path.suffix != ".json":
        return text
    value = json.loads(text)
    if "target_modules" in value:  # a set, whose order is that of a process
        value["target_modules"].sort()
    if "log_history" in value:
        value["log_history"] = [without_times(entry) for entry in value["log_history"]]
    return value


def equal(left, right):
    """Whether two nested values are the same, bit for bit."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[name], right[name]) for name in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    return left == right


def assert_same(found, expected, note):
    """The last checkpoints of two runs, file by file, and what was logged."""
    last = max(expected.glob("checkpoint-*"), key=step_of).name
    files = sorted(path.relative_to(expected) for path in (expected / last).rglob("*") if path.is_file())
    assert {path.name for path in files} >= {"optimizer.pt", "scheduler.pt", "trainer_state.json"}
    assert any("rng_state" in path.name for path in files)
    assert any(path.suffix == ".safetensors" for path in files)
    assert files == sorted(path.relative_to(found) for path in (found / last).rglob("*") if path.is_file()), note
    for path in files:
        assert equal(content(found / path, found), content(expected / path, expected)), f"{path} differs; {note}"
    logs = []
    for run in (found, expected):
        entries = [without_times(entry) for entry in json.loads((run / "log.json").read_text())]
        entries[-1].pop("train_loss")  # the summary of the call to `train`
        logs.append(entries)
    assert logs[0] == logs[1], note
    assert len([entry for entry in logs[1] if "loss" in entry]) > 1


def takes(method, **options):
    """Whether the config of a method knows options, and does not refuse them."""
    try:
        get_method(method).config_class("run", use_cpu=True, bf16=False, **options)
    except (TypeError, ValueError):
        return False
    return True


def drawn(*key):
    """A moment to kill a run at, after its first checkpoint: an event, and from how many finished steps on."""
    draw = random.Random(" ".join(map(str, key)))
    return draw.choice(EVENTS), draw.randint(3, 5)


def killed_at_a_random_step(interrupted, method, lora, precomputed):
    settings = STATEFUL.get(method, {})
    if precomputed and takes(method, precompute_ref_log_probs=True):
        settings = settings | {"precompute_ref_log_probs": True}
    interrupted(kill=drawn(method, lora, precomputed), method=method, settings=settings, lora=lora)


@pytest.mark.parametrize("method", [method.name for method in METHODS])
def test_full_with_a_live_reference(method, interrupted):
    killed_at_a_random_step(interrupted, method, lora=False, precomputed=False)


@pytest.mark.slow
@pytest.mark.parametrize("method", [method.name for method in METHODS])
def test_adapter_with_a_precomputed_reference(method, interrupted):
    killed_at_a_random_step(interrupted, method, lora=True, precomputed=True)


@pytest.mark.parametrize("method", ["dpo", "uft"])
@pytest.mark.parametrize("lora", [False, True])
def test_the_other_reference(method, lora, interrupted):
    assert takes(method, precompute_ref_log_probs=True)
    killed_at_a_random_step(interrupted, method, lora, precomputed=not lora)


@pytest.mark.parametrize("method", ["ift", "dpo", "self-supervised-po", "eurus-reward", "uft"])
def test_stream(method, interrupted):
    """Killed in its second or third pass."""
    interrupted(kill=drawn(method, "stream"), method=method, settings=STATEFUL.get(method, {}), stream=True)


@pytest.mark.parametrize("stream", [False, True])
def test_killed_behind_the_last_checkpoint(stream, interrupted):
    """No step is left, though it ends in the middle of a pass."""
    settings = {"max_steps": 5, "save_steps": 5, "logging_steps": 2}
    interrupted(kill=("on_save", 5), method="dpo", settings=settings, stream=stream)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kill", [("on_save", 2), ("on_prediction_step", 6)])
def test_end_of_an_epoch(kill, stream, interrupted):
    """Killed behind the save of its last step: its log and its evaluation, the last one of the run too, are not left out."""
    interrupted(kill=kill, method="dpo", settings=BY_EPOCH, stream=stream)


@pytest.mark.parametrize("stream", [False, True])
def test_end_of_an_epoch_behind_an_evaluation(stream, interrupted):
    """Which is one of its last step: what is logged at the end is that of a model which does not train."""
    interrupted(kill=("on_save", 2), method="dpo", settings={"logging_strategy": "epoch"}, stream=stream)


@pytest.mark.parametrize("stream", [False, True])
def test_end_in_the_middle_of_an_epoch(stream, interrupted, tmp_path):
    settings = BY_EPOCH | {"max_steps": 5, "save_steps": 5}
    interrupted(kill=("on_save", 5), method="dpo", settings=settings, stream=stream)
    assert [e["step"] for e in json.loads((tmp_path / "run" / "log.json").read_text()) if "eval_loss" in e] == [
        2,
        4,
        5,
    ]


def test_saved_at_the_end_of_an_epoch(interrupted):
    """Nothing of that end is outstanding: it is not evaluated twice."""
    settings = BY_EPOCH | {"save_strategy": "epoch"}
    interrupted(kill=("on_epoch_begin", 4), method="dpo", settings=settings, stream=True)


def test_states_of_callbacks(interrupted):
    """Training stops where it would have, its metric worse three times in a row: once before, twice behind the checkpoint."""
    settings = {"metric_for_best_model": "eval_loss", "greater_is_better": True, "eval_steps": 1, "logging_steps": 1}
    settings |= {"restore_callback_states_from_checkpoint": True}
    interrupted(kill=("on_step_begin", 3), method="dpo", settings=settings, patience=3)


def test_states_of_callbacks_at_the_end_of_an_epoch(interrupted):
    """The wish to save, which is stored within the save, is not carried out again."""
    settings = BY_EPOCH | {"restore_callback_states_from_checkpoint": True}
    interrupted(kill=("on_prediction_step", 6), method="dpo", settings=settings)


def test_neftune(interrupted, worker, tmp_path, tmp_path_factory):
    interrupted(kill=drawn("neftune"), method="dpo", settings={"neftune_noise_alpha": 5.0})
    silent = worker.whole(tmp_path_factory, method="dpo", settings={})
    weights = [load_file(run / "checkpoint-6" / "model.safetensors") for run in (silent, tmp_path / "run")]
    assert not equal(*weights)


@pytest.mark.parametrize("stream", [False, True])
def test_other_kind_of_dataset(stream, worker, tmp_path, tmp_path_factory):
    """The place in a stream is none in a dataset, and the reverse; with `ignore_data_skip` none is used."""
    checkpoint = worker.whole(tmp_path_factory, method="dpo", settings={}, stream=stream) / "checkpoint-4"
    job = {"method": "dpo", "stream": not stream, "resume": str(checkpoint)}
    codes, printed = worker(tmp_path, "refused", settings={}, **job)
    kinds = ["a `Dataset`", "a stream (`IterableDataset`)"]
    assert codes == [1]
    assert f"is of a training on {kinds[stream]}, and `train_dataset` is {kinds[not stream]}" in printed
    codes, printed = worker(tmp_path, "taken", settings={"ignore_data_skip": True}, **job)
    assert codes == [0], printed[-3000:]
    assert step_of(tmp_path / "run" / "checkpoint-6") == 6


@pytest.mark.parametrize("written_by", ["an older version", "another trainer"])
def test_stream_without_its_place(written_by, worker, tmp_path, tmp_path_factory):
    checkpoint = worker.whole(tmp_path_factory, method="dpo", settings={}, stream=True) / "checkpoint-4"
    copied = shutil.copytree(checkpoint, tmp_path / "checkpoint-4") / "trl_ift_state.json"
    state = json.loads(copied.read_text())
    state = {name: value for name, value in state.items() if name not in ("stream", "last_step", "training")}
    copied.write_text(json.dumps(state))
    if written_by == "another trainer":
        copied.unlink()
    codes, printed = worker(
        tmp_path, "resumed", method="dpo", settings={}, stream=True, resume=str(tmp_path / "checkpoint-4")
    )
    assert codes == [0], printed[-3000:]
    assert printed.count("does not say where it was in the stream") == 1


@pytest.mark.parametrize("part", ["weights", "optimizer", "state"])
@pytest.mark.parametrize("lora", [False, True])
def test_killed_while_a_checkpoint_is_written(part, lora, interrupted, tmp_path):
    """Its marker is missing: the one before it is resumed, with a warning."""
    printed = interrupted(writing=(part, 4), method="dpo", settings={}, lora=lora)
    run = tmp_path / "run"
    assert (
        f"interrupted while it was being written: `{run}/checkpoint-4`. Training goes on from `{run}/checkpoint-2`"
        in printed
    )


def test_killed_while_an_old_checkpoint_is_removed(interrupted, tmp_path):
    printed = interrupted(writing=("removal", 2), method="dpo", settings={"save_total_limit": 1})
    assert "interrupted" not in printed


@pytest.mark.parametrize("method", ["dpo", "exo", "uft"])
def test_moving_reference(method, interrupted, tmp_path):
    """`sync_ref_model`: the checkpoint keeps the reference, which is not the model."""
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
    settings |= {"precompute_ref_log_probs": False} if method == "exo" else {}
    interrupted(kill=drawn(method, "moving"), method=method, settings=settings)
    last = tmp_path / "run" / "checkpoint-6"
    assert not equal(load_file(last / "reference" / "model.safetensors"), load_file(last / "model.safetensors"))


@pytest.mark.parametrize("sharded", ["FSDP", "ZeRO-3"])
def test_moving_reference_in_parts(sharded, worker, tmp_path, tmp_path_factory, monkeypatch):
    """Said when training begins, and refused when it is resumed."""
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
    whole = worker.whole(tmp_path_factory, method="dpo", settings=settings)
    dpo = get_method("dpo")
    config = dpo.config_class(str(tmp_path), use_cpu=True, bf16=False, report_to="none", sync_ref_model=True)
    tokenizer = resume_worker.TOKENIZER
    trainer = dpo.trainer_class(
        tiny.model("llama", tokenizer), args=config, train_dataset=tiny.preference_data(), processing_class=tokenizer
    )
    warnings = []
    monkeypatch.setattr(reference.logger, "warning_once", warnings.append)
    with monkeypatch.context() as patch:  # what would shard the weights
        patch.setattr(ExtensionTrainer, "train", lambda self, checkpoint=None: checkpoint)
        trainer.train()
        assert not warnings
        if sharded == "FSDP":
            trainer.is_fsdp_enabled = True
        else:
            trainer.args.deepspeed_plugin = SimpleNamespace(zero_stage=3)
        assert trainer.train("checkpoint") == "checkpoint"
        assert len(warnings) == 1
        assert "checkpoints of this run cannot be resumed" in warnings[0]
        trainer.args.save_only_model = True
        trainer.train()
        assert len(warnings) == 1
    with pytest.raises(ValueError, match="cannot be resumed without its reference"):
        trainer.train(resume_from_checkpoint=str(whole / "checkpoint-6"))


def test_best_model(interrupted):
    """The best checkpoint is kept, and known, across the interruption."""
    settings = {"load_best_model_at_end": True, "save_total_limit": 1}
    interrupted(kill=("on_substep_end", 4), method="tpo", settings=settings)


TWO = {"ddp_backend": "gloo", "per_device_train_batch_size": 1}


def test_two_processes(interrupted):
    interrupted(kill=("on_step_begin", 5), method="self-supervised-po", settings=TWO, lora=True, processes=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [BY_EPOCH, {"logging_first_step": True, "max_steps": 5, "save_steps": 4}],
    ids=["by epoch", "no log behind the checkpoint"],
)
def test_two_processes_that_log_elsewhere(settings, interrupted):
    interrupted(kill=("on_save", 4), method="dpo", settings=TWO | settings, processes=2)


@pytest.mark.slow
def test_command(worker, tmp_path, model_dir):
    """`trl-ift` in a process group that is killed at a random time, and the same command once more."""
    tiny.preference_data().to_json(tmp_path / "data.jsonl")

    def options(output_dir):
        argv = [
            "--model_name_or_path",
            model_dir,
            "--dataset_name",
            str(tmp_path / "data.jsonl"),
            "--output_dir",
            output_dir,
        ]
        argv += [
            "--max_steps",
            "20",
            "--learning_rate",
            "1e-2",
            "--save_steps",
            "4",
            "--logging_steps",
            "3",
            "--save_total_limit",
            "2",
            "--use_peft",
        ]
        argv += ["--lora_dropout", "0.1", "--disable_dropout", "false", "--per_device_train_batch_size", "2"]
        return ["dpop", *argv, "--report_to", "none", "--use_cpu", "true", "--bf16", "false"]

    whole, run = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    codes, printed = worker(tmp_path, "whole", cli=options(str(whole)))
    assert codes == [0], printed[-3000:]

    command = [sys.executable, "-m", "trl_ift.cli", *options(str(run))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not is_complete_checkpoint(run / "checkpoint-4") and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        time.sleep(random.random() / 5)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    found = sorted(path.name for path in run.glob("checkpoint-*"))
    assert "checkpoint-20" not in found

    resumed = subprocess.run([*command, "--resume_from_checkpoint", "true"], capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    for folder in (whole, run):
        state = json.loads((folder / "checkpoint-20" / "trainer_state.json").read_text())
        (folder / "log.json").write_text(json.dumps([*state["log_history"], {"train_loss": 0}]))
    assert_same(run, whole, f"killed with {found}")
    assert equal(*(load_file(folder / "adapter_model.safetensors") for folder in (run, whole)))
