"""FSDP2: two processes that hold a half of every weight each, against one process that holds all; the configs of launches."""

import importlib.resources
import os
import signal
import subprocess
import sys

import pytest
import torch
import two_processes_fsdp as worker
from accelerate.commands import launch
from accelerate.utils import merge_fsdp_weights
from safetensors.torch import load_file
from two_processes_invariance import ALONE

from trl_ift.cli import main
from trl_ift.scripts import train as script


pytestmark = pytest.mark.slow
# Rounding: sums over halves of the rows, in another order
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def two(tmp_path_factory, model_dir):
    """Folder of the runs on two gloo processes, and what they logged."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*command, worker.__file__, model_dir, str(folder)],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        _, errors = process.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # torchrun's workers too
        raise
    assert process.returncode == 0, errors[-3000:]
    return folder, torch.load(folder / "found.pt", weights_only=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tokenizer, model_dir):
    """Losses and weights of a run on one process."""
    runs = {}

    def run(name):
        if name not in runs:
            folder = tmp_path_factory.mktemp("alone")
            trainer = worker.make(worker.RUNS[name], model_dir, folder / "run", tokenizer, **ALONE)
            trainer.train()
            trainer.save_model(str(folder / "saved"))
            runs[name] = worker.losses_of(trainer), weights(folder)
        return runs[name]

    return run


def weights(folder):
    paths = list((folder / "saved").glob("*.safetensors"))
    assert len(paths) == 1
    found = load_file(paths[0])
    if "adapter" not in paths[0].name:  # tied weights are gathered as two
        found.setdefault("lm_head.weight", found["model.embed_tokens.weight"])
    return found


def check(found_losses, folder, expected, tolerance=TOLERANCE):
    losses, expected_weights = expected
    assert found_losses == pytest.approx(losses, rel=tolerance)
    assert len(set(losses)) > 1
    torch.testing.assert_close(weights(folder), expected_weights, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", worker.RUNS)
def test_sharded_equals_whole(name, two, alone):
    """Losses, and the weights that `save_model` gathers and writes."""
    folder, found = two
    # With bfloat16, FSDP rounds weights and sums of gradients where autocast rounds the factors of products
    tolerance = 2e-3 if "bfloat16" in name else TOLERANCE
    check(found["losses"][name], worker.folder_of(folder, name), alone(name), tolerance)


@pytest.mark.parametrize("name", worker.SHIPPED_RUNS)
def test_with_the_config_of_trl(name, two, alone):
    """The same under the variables that `accelerate launch` sets for TRL's `fsdp2`."""
    folder, found = two
    check(found["shipped"][name], worker.folder_of(folder, name, shipped=True), alone(name))


@pytest.mark.parametrize("state_dict_type", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_resumed_equals_uninterrupted(state_dict_type, two, tmp_path):
    ((logged, expected), (resumed, found)), files = two[1][state_dict_type]
    shards = {"pytorch_model_fsdp_0", "optimizer_0"}
    assert shards <= set(files) if state_dict_type == "SHARDED_STATE_DICT" else not shards & set(files)
    assert len(expected) == 21
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert resumed == logged
    if state_dict_type == "SHARDED_STATE_DICT":  # the way from there to a model
        checkpoint = two[0] / state_dict_type / "run" / "checkpoint-4"
        merge_fsdp_weights(str(checkpoint / "pytorch_model_fsdp_0"), str(tmp_path))
        torch.testing.assert_close(load_file(tmp_path / "model.safetensors"), expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_sharded_head(family, two):
    """Our head and TRL's, and `LMHead`, on a weight that is seen as shards."""
    whole, sharded = two[1]["heads"][:2] if family == "llama" else two[1]["heads"][2:]
    assert all(value.abs().sum() > 0 for value in whole)
    torch.testing.assert_close(sharded, whole, rtol=0, atol=1e-6)


def test_refusal(two):
    """A method with a head of its own says before the training what to use instead."""
    assert "Use DDP" in two[1]["refusal"]


# ---------------------------------------------------------------- what is launched

FSDP2 = {name: value for name, value in worker.SHIPPED.items() if name != "FSDP_ACTIVATION_CHECKPOINTING"}
# Config that TRL ships -> (engine of accelerate, variables of the launched processes)
ENGINES: dict[str, tuple[str | None, dict[str, str]]] = {
    "single_gpu": (None, {}),
    "multi_gpu": ("multi_gpu", {}),
    "fsdp1": ("use_fsdp", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1", "FSDP_USE_ORIG_PARAMS": "true"}),
    "fsdp2": ("use_fsdp", FSDP2),
    "zero1": ("use_deepspeed", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}),
    "zero2": ("use_deepspeed", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}),
    "zero3": (
        "use_deepspeed",
        {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
            "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
        },
    ),
}


def test_every_shipped_config_is_known():
    shipped = importlib.resources.files("trl.accelerate_configs")
    assert {path.name for path in shipped.iterdir() if path.name.endswith(".yaml")} == {
        f"{name}.yaml" for name in ENGINES
    }


@pytest.mark.parametrize("name", ENGINES)
def test_launch_arguments(name, monkeypatch):
    """What accelerate would launch for `--accelerate_config NAME`, and in which environment."""
    engine, variables = ENGINES[name]
    calls = []
    monkeypatch.setattr(launch, "launch_command", calls.append)
    options = ["--model_name_or_path", "org/model", "--dataset_name", "org/data"]
    processes = 1 if engine is None else 4
    assert main(["dpop", "--accelerate_config", name, "--num_processes", str(processes), *options]) == 0
    args, config, _ = launch._validate_launch_command(calls[0])
    found = {
        flag for flag in ("multi_gpu", "use_fsdp", "use_deepspeed", "tpu", "use_megatron_lm") if getattr(args, flag)
    }
    assert found == ({engine} if engine else set())
    assert (args.num_processes, args.mixed_precision) == (processes, "bf16")
    assert args.training_script_args == ["dpop", *options]
    if engine == "use_deepspeed":
        args.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)  # as `launch_command` does
        environment = launch.prepare_deepspeed_cmd_env(args)[1]
    elif engine is None:
        environment = launch.prepare_simple_launcher_cmd_env(args)[1]
    else:
        environment = launch.prepare_multi_gpu_env(args)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert {variable: environment.get(variable) for variable in variables} == variables
    for other in {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} - set(variables):
        assert environment.get(other, "false") == "false"


def test_fsdp_without_an_accelerator_is_refused(model_dir, monkeypatch, capsys):
    """accelerate would train by DDP, and not say so."""
    for variable, value in worker.SHIPPED.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    options = ["--model_name_or_path", model_dir, "--dataset_name", "./none.jsonl", "--output_dir", "out"]
    assert script.run(["dpop", *options]) == 1
    assert "FSDP is asked for, and the training is on the CPU" in capsys.readouterr().err
