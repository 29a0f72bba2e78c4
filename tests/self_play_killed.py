"""Runs LD-Align, and is killed (SIGKILL) on the way, at several moments, each in a fork of its own.

Usage: self_play_killed.py MODEL_DIR OUTPUT_DIR

Below OUTPUT_DIR, one folder each, all but `load` with a first iteration that is finished:
  load        in the first iteration, before anything is generated
  generate    a shard of completions is written but not yet in place
  encode      codes are computed
  step        in training, between two checkpoints
  checkpoint  a checkpoint has its weights, and not yet its end
  record      the policy is trained and saved, but that is not yet recorded
  publish     the files of the last policy are on their way into the folder itself

Prints how each ended. Also the home of what this run shares with the tests.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import tiny
import torch
from transformers import Trainer

from trl_ift import LDAlignConfig, SPINConfig
from trl_ift import self_play as module
from trl_ift.data import generation, shards
from trl_ift.latent.encoders import Encoder, text_of
from trl_ift.self_play import SelfPlayConfig, self_play


class Letters(Encoder):
    """Codes that are counts of letters; remembers what it was given."""

    latent_dim = 3

    def __init__(self, scale: float = 1.0):
        self.scale, self.seen = scale, []

    def describe(self) -> dict[str, Any]:
        return {"kind": "Letters", "scale": self.scale}

    def encode(self, samples) -> torch.Tensor:
        self.seen += samples
        texts = [text_of(sample.completion).lower() for sample in samples]
        counts = [[len(text), text.count("e"), sum(map(text.count, "aiou"))] for text in texts]
        return self.scale * torch.tensor(counts, dtype=torch.float32)


def lively(tokenizer):
    """A model with likely and unlikely tokens, that ends some answers by itself."""
    model = tiny.model("llama", tokenizer)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head.mul_(4)
        head[tokenizer.eos_token_id].mul_(2.4)
    return model


def run(model_dir, folder, method=SPINConfig, data=None, **settings):
    """`self_play` with settings that suit the tests; options of all its parts stand among each other."""
    names = ("eval_dataset", "latent", "processing_class", "quantization_config", "peft_config")
    arguments = {name: settings.pop(name) for name in names if name in settings}
    own = {field.name: settings.pop(field.name) for field in fields(SelfPlayConfig) if field.name in settings}
    args = method(
        str(folder),
        **{
            "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "logging_steps": 1,
            "max_steps": 3, "save_strategy": "no", "save_steps": 1, "learning_rate": 1e-2,
            "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "gradient_checkpointing": False,
        }
        | settings,
    )  # fmt: skip
    config = SelfPlayConfig(**{"num_iterations": 2, "max_new_tokens": 8, "shard_size": 4} | own)
    data = tiny.prompt_completion_data() if data is None else data
    return self_play(model_dir, args, data, config=config, **arguments)


# The run that is killed; the first of its two iterations is the same in all folders
KILLED = {
    "method": LDAlignConfig,
    "save_strategy": "steps",
    "keep_previous_pairs": 1,
    "beta": 0.5,
    "train_sampling_strategy": "random",
}


def killed(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_replacing(end: str, condition: Callable[[str], bool] = lambda source: True) -> None:
    replace = os.replace

    def patched(source, target):
        if str(target).endswith(end) and condition(source):
            killed()
        replace(source, target)

    shards.os.replace = patched


def in_load() -> None:
    generation.load_model = killed


def in_generate() -> None:
    before_replacing("iteration-1/completions/completions-00001.parquet")


def in_encode() -> None:
    Letters.encode = killed  # the real answers have been encoded


def in_step() -> None:
    step = Trainer.training_step

    def third_is_killed(self, *args, **kwargs):
        if self.state.global_step == 2:
            killed()
        return step(self, *args, **kwargs)

    Trainer.training_step = third_is_killed


def in_checkpoint() -> None:
    save = Trainer._save_optimizer_and_scheduler

    def second_is_killed(self, folder):
        if str(folder).endswith("checkpoint-2"):
            killed()
        save(self, folder)

    Trainer._save_optimizer_and_scheduler = second_is_killed


def in_record() -> None:
    before_replacing("iteration-1/stages.json", lambda source: '"train"' in Path(source).read_text())


def in_publish() -> None:
    link, calls = os.link, []

    def third_is_killed(source, target):
        calls.append(target)
        if len(calls) == 3:
            killed()
        link(source, target)

    module.os.link = third_is_killed


WAYS = {
    "load": in_load, "generate": in_generate, "encode": in_encode, "step": in_step, "checkpoint": in_checkpoint,
    "record": in_record, "publish": in_publish,
}  # fmt: skip


def main(model_dir: str, output_dir: str) -> None:
    torch.set_num_threads(1)
    base = Path(output_dir) / "base"
    run(model_dir, base, latent=Letters(), **(KILLED | {"num_iterations": 1}))
    for name, prepare in WAYS.items():
        child = os.fork()
        if child:
            print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        folder = Path(output_dir) / name
        if name != "load":
            shutil.copytree(base, folder)
        prepare()
        run(model_dir, folder, latent=Letters(), **KILLED)
        os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
