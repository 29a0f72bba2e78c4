"""Killed (SIGKILL) at a random step and resumed is bit for bit the run that was not: weights, optimizer, logs, states.

Every run is a process of its own, a fork of `resume_worker.py`. A method is under these tests once it stands in the registry.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import resume_worker
import tiny
import torch
from safetensors.torch import load_file
from transformers.trainer_pt_utils import safe_globals

from trl_ift.checks import is_complete_checkpoint
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
        found = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*") if is_complete_checkpoint(path))
        note = f"killed at {kill or writing}; complete checkpoints: {found}"
        codes, printed = worker(tmp_path, "resumed", resume=resume, **job)
        assert set(codes) == {0}, f"{note}: {printed[-3000:]}"
        assert_same(tmp_path / "run", whole, note)
        return printed

    return run


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
    last = max(expected.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])).name
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


def test_best_model(interrupted):
    """The best checkpoint is kept, and known, across the interruption."""
    settings = {"load_best_model_at_end": True, "save_total_limit": 1}
    interrupted(kill=("on_substep_end", 4), method="tpo", settings=settings)


def test_two_processes(interrupted):
    settings = {"ddp_backend": "gloo", "per_device_train_batch_size": 1}
    interrupted(kill=("on_step_begin", 5), method="self-supervised-po", settings=settings, lora=True, processes=2)


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
