"""Trains runs that may be killed, each in a fork of this process, which itself trains nothing: `python resume_worker.py`.

Reads jobs from the standard input, one line of JSON each, and answers each with how its processes ended (-9 when killed). A job
is the arguments of `train`, or the arguments of the script behind `trl-ift` as `cli`; and `folder`, `name` (of the file of what
they print) and `processes`, one unless given.
"""

import functools
import gc
import importlib.metadata
import json
import os
import shutil
import signal
import socket
import sys
import traceback
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import tiny
import torch
from accelerate.utils import is_peft_available
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel
from test_methods import DATA, MODELS
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState

from trl_ift import extension, get_method
from trl_ift.scripts import train as script


# Three passes of two steps of two micro-batches; saves at 2, 4 and 6, the first two of them between two logs
SETTINGS = {
    "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-2, "warmup_steps": 2,
    "max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 4,
    "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
    "save_total_limit": 2, "disable_dropout": False, "train_sampling_strategy": "random",
}  # fmt: skip
TOKENIZER = tiny.tokenizer()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Kill(TrainerCallback):
    """Kills the process at an event of the training, the first with so many finished steps or more."""

    def __init__(self, event: str, steps: int):
        def at_event(args, state, control, **kwargs):
            if state.global_step >= steps:
                die()

        setattr(self, event, at_event)


def kill_in_writing(part: str, steps: int) -> None:
    """Kill the process in the middle of a file of the checkpoint after so many steps, or of the removal of an old one."""
    owner, function = {
        "weights": (Trainer, "_save"),
        "optimizer": (torch, "save"),
        "state": (TrainerState, "save_to_json"),
        "removal": (shutil, "rmtree"),
    }[part]
    original = getattr(owner, function)

    def killed(*args, **kwargs):
        path = next(Path(value) for value in args if isinstance(value, str | os.PathLike))
        if part == "removal" and path.name.startswith("checkpoint-"):
            next(path.glob("*.safetensors")).unlink()
            die()
        result = original(*args, **kwargs)
        if f"checkpoint-{steps}" in path.parts:
            path = next(path.glob("*.safetensors")) if path.is_dir() else path
            os.truncate(path, path.stat().st_size // 2)
            die()
        return result

    setattr(owner, function, killed)


def rows_of(method: str) -> dict[str, Any]:
    """What a method is trained on in the tests of all methods, without log-probs of a reference that is not the model."""
    data = DATA.get(method, lambda settings: {"train_dataset": tiny.preference_data()})({})
    rows = data["train_dataset"]
    if method != "mrpo":  # it would need those of its second reference
        stored = [name for name in ("ref_chosen_logps", "ref_rejected_logps") if name in rows.column_names]
        data["train_dataset"] = rows.remove_columns(stored)
    return data


def train(
    method: str,
    output_dir: str,
    settings: dict[str, Any],
    lora: bool = False,
    stream: bool = False,
    patience: int | None = None,
    kill: tuple[str, int] | None = None,
    writing: tuple[str, int] | None = None,
    resume: bool | str | None = None,
) -> None:
    """Train a method on its tiny data, with dropout; what is logged is written to `log.json` beside the checkpoints."""
    # Cards take nearly half the time of such short runs, and have tests of their own
    extension.build_model_card = lambda **arguments: ModelCard("")
    PeftModel.create_or_update_model_card = lambda model, folder: None
    registered = get_method(method)
    known = {field.name for field in fields(registered.config_class)}
    options = {name: value for name, value in SETTINGS.items() if name in known} | settings
    data = rows_of(method)
    data["eval_dataset"] = data["train_dataset"]
    if stream:
        data["train_dataset"] = data["train_dataset"].to_iterable_dataset().shuffle(seed=3, buffer_size=4)
    model = MODELS.get(method, lambda tokenizer: tiny.model("llama", tokenizer))(TOKENIZER)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.2
    adapter = LoraConfig(
        r=2, target_modules="all-linear", lora_dropout=0.1, task_type="SEQ_CLS" if method in MODELS else None
    )
    trainer = registered.trainer_class(
        model=model,
        args=registered.config_class(output_dir, **options),
        processing_class=TOKENIZER,
        peft_config=adapter if lora else None,
        **data,
    )
    if patience is not None:
        trainer.add_callback(EarlyStoppingCallback(patience))
    if kill is not None:
        trainer.add_callback(Kill(*kill))
    if writing is not None:
        kill_in_writing(*writing)
    trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        Path(output_dir, "log.json").write_text(json.dumps(trainer.state.log_history))


def run(job: dict[str, Any], output: Path) -> None:
    """Do a job in this process, a fork, and end it."""
    code = 1
    signal.alarm(300)  # ends a process that waits for another one
    try:
        with open(output, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if "cli" in job:
            code = script.run(job["cli"])
        else:
            train(**job)
            code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def distributed(rank: int, processes: int, port: int) -> None:
    """As `torchrun` tells a process of its place."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def main() -> None:
    torch.set_num_threads(1)
    # A fifth of the time of a run goes into versions of packages: read once, here
    for name in ("metadata", "version"):
        setattr(importlib.metadata, name, functools.cache(getattr(importlib.metadata, name)))
    versions = functools.cache(vars(extension)["library_versions"])
    vars(extension)["library_versions"] = versions
    versions()
    is_peft_available()
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        job = json.loads(line)
        folder, name, processes = Path(job.pop("folder")), job.pop("name"), job.pop("processes", 1)
        folder.mkdir(parents=True, exist_ok=True)
        datasets.config.HF_DATASETS_CACHE = str(folder / "cache")
        port, children = free_port(), []
        for rank in range(processes):
            if (child := os.fork()) == 0:
                if processes > 1:
                    distributed(rank, processes, port)
                run(job, folder / f"{name}-{rank}.txt")
            children.append(child)
        codes = []
        while children:
            child, status = os.wait()
            children.remove(child)
            codes.append(os.waitstatus_to_exitcode(status))
            if codes[-1] == -signal.SIGKILL:  # the others would wait for it
                for other in children:
                    os.kill(other, signal.SIGKILL)
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    main()
