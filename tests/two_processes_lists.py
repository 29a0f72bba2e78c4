"""Run by `torchrun --nproc-per-node 2`: one optimizer step of EXO and of Eurus under DDP (gloo).

Usage: two_processes_lists.py MODEL_DIR OUTPUT_DIR. Also the home of what this run shares with the tests on one process.
"""

import json
import os
import sys
from pathlib import Path

import tiny
import torch
from pairs import lists, logs, make, step_gradients
from transformers import AutoTokenizer

from trl_ift import EurusRewardConfig, EurusRewardTrainer, EXOConfig, EXOTrainer


def scored_rows():
    """Every second list has no response between the best and the worst: there is none on one of two processes."""
    return lists((4, 2, 3, 2)).add_column("weight", [1.0, 0.5, 2.0, 1.0])


RUNS = {
    "stored": (EXOTrainer, EXOConfig, scored_rows, {}),
    "live": (EXOTrainer, EXOConfig, scored_rows, {"precompute_ref_log_probs": False}),
    "eurus": (
        EurusRewardTrainer,
        EurusRewardConfig,
        lambda: tiny.preference_data().select(range(4)).add_column("absolute", [True, False, True, True]),
        {},
    ),
}


def run(name, model, tokenizer, output_dir, batch_size, accumulation, **settings):
    """Logs and gradients of one optimizer step over four rows."""
    cls, config, data, own = RUNS[name]
    options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation, "max_steps": 1}
    trainer = make(cls, config, output_dir / name, model, data(), tokenizer, **options, **own, **settings)
    _, (gradients,) = step_gradients(trainer)
    return trainer, logs(trainer)[0], gradients


def main(model_dir: str, output_dir: str) -> None:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    folder = Path(output_dir)
    found, gradients = {}, {}
    for name in RUNS:
        trainer, found[name], gradients[name] = run(name, model_dir, tokenizer, folder, 1, 2, ddp_backend="gloo")
    if trainer.is_world_process_zero():
        (folder / "logs.json").write_text(json.dumps(found))
        torch.save(gradients, folder / "gradients.pt")
    trainer.accelerator.wait_for_everyone()
    os._exit(0)  # tearing gloo down beside live DDP models sometimes hangs in torch 2.13


if __name__ == "__main__":
    main(*sys.argv[1:])
