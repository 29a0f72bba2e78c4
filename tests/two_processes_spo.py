"""Run by `torchrun --nproc-per-node 2`: SPO-style training under DDP (gloo); the main process writes what was logged.

Usage: two_processes_spo.py FILE
"""

import json
import os
import sys
from pathlib import Path

import tiny
import torch
from datasets import Dataset

from trl_ift import SelfSupervisedPOConfig, SelfSupervisedPOTrainer


PHRASES = " Rivers carry cold water, and old towns sell bread."


def run(output_dir: str, processes: int) -> list[dict[str, float]]:
    """Steps of two pairs: with two degraded answers, with one on each side, with two on one process, and with none."""
    rows = tiny.preference_data().to_list()
    for index, names in enumerate([("chosen", "rejected"), (), ("chosen",), ("rejected",), ("chosen",), (), (), ()]):
        rows[index] = {name: text + PHRASES * (name in names) for name, text in rows[index].items()}
    tokenizer = tiny.tokenizer()
    args = SelfSupervisedPOConfig(
        output_dir, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1,
        learning_rate=1e-2, max_steps=6, per_device_train_batch_size=1, gradient_accumulation_steps=2 // processes,
        train_sampling_strategy="sequential", gradient_checkpointing=False, spo_levels=4,
        ddp_backend="gloo" if processes > 1 else None,
    )  # fmt: skip
    trainer = SelfSupervisedPOTrainer(
        tiny.model("llama", tokenizer), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    names = ("loss", "grad_norm", "spo/loss_chosen", "spo/loss_rejected", "spo/rows_chosen", "spo/rows_rejected")
    return [
        {name: entry[name] for name in names if name in entry}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    history = run(str(Path(sys.argv[1]).parent / "two"), 2)
    if os.environ["RANK"] == "0":
        Path(sys.argv[1]).write_text(json.dumps(history))
    torch.distributed.barrier()
    os._exit(0)  # tearing gloo down beside live DDP models sometimes hangs in torch 2.13
