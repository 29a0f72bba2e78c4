"""Run by `torchrun --nproc-per-node 2`: ULMA and UFT under DDP (gloo); the main process writes what it saw.

Usage: two_processes_unpaired.py MODEL_DIR OUTPUT_DIR

Also the home of what this run shares with the tests on one process.
"""

import json
import os
import sys
from pathlib import Path

import tiny
import torch
from datasets import Dataset
from pairs import Gradients
from transformers import AutoTokenizer

from trl_ift import get_method


RUNS = {"ulma": {}, "uft": {"beta": 0.1}}


def rows() -> Dataset:
    """Four rows in an order that leaves one process without a bad answer in its first micro-batch."""
    pairs = tiny.preference_data().to_list()
    kinds = [("chosen", True), ("chosen", True), ("rejected", False), ("chosen", True)]
    return Dataset.from_list(
        [
            {"prompt": row["prompt"], "completion": row[kind], "label": label, "weight": 1.0 + i}
            for i, (row, (kind, label)) in enumerate(zip(pairs, kinds, strict=False))
        ]
    )


def step(name, model, tokenizer, output_dir, batch_size, accumulation, **settings):
    """Trainer and gradients after one optimizer step over the four rows, evaluated after it."""
    recorder, method = Gradients(), get_method(name)
    trainer = method.trainer_class(
        model=model,
        args=method.config_class(
            str(output_dir), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no",
            logging_steps=1, learning_rate=1e-2, max_steps=1, max_grad_norm=0.0, gradient_checkpointing=False,
            per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
            per_device_eval_batch_size=2, train_sampling_strategy="sequential", **settings,
        ),
        train_dataset=rows(),
        eval_dataset=rows(),
        processing_class=tokenizer,
        callbacks=[recorder],
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    return trainer, recorder.steps[0]


def main(model_dir: str, output_dir: str) -> None:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    folder = Path(output_dir)
    histories, gradients = {}, {}
    for name, settings in RUNS.items():
        for precomputed in (False, True):
            key = f"{name} precomputed" if precomputed else name
            trainer, gradients[key] = step(
                name, model_dir, tokenizer, folder / key, 1, 2, ddp_backend="gloo",
                precompute_ref_log_probs=precomputed, **settings,
            )  # fmt: skip
            histories[key] = trainer.state.log_history
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "histories.json").write_text(json.dumps(histories))
        torch.save(gradients, folder / "gradients.pt")
    trainer.accelerator.wait_for_everyone()
    os._exit(0)  # tearing gloo down beside live DDP models sometimes hangs in torch 2.13


if __name__ == "__main__":
    main(*sys.argv[1:])
