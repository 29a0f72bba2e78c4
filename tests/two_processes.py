"""Run by `torchrun --nproc-per-node 2`: trains tiny models under DDP (gloo) and writes their log histories.

Usage: two_processes.py MODEL_DIR OUTPUT_DIR
"""

import json
import os
import sys
from pathlib import Path

import tiny
import torch
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from trl_ift import IFTConfig, IFTTrainer


CASES = {
    "sequence": (IFTTrainer, IFTConfig, {}),
    "own": (IFTTrainer, IFTConfig, {"average_tokens_across_devices": False}),
    "token": (IFTTrainer, IFTConfig, {"ift_loss_normalization": "token"}),
    "neutral": (IFTTrainer, IFTConfig, {"ift_lambda": 0.0, "ift_gamma": 0.0, "ift_loss_normalization": "token"}),
    "sft": (SFTTrainer, SFTConfig, {}),
}


def main(model_dir: str, output_dir: str) -> None:
    torch.set_num_threads(1)
    histories, evaluations = {}, {}
    for name, (trainer_class, config_class, settings) in CASES.items():
        trainer = trainer_class(
            model=model_dir,
            args=config_class(
                output_dir=f"{output_dir}/{name}", use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
                save_strategy="no", logging_steps=1, learning_rate=1e-2, max_steps=3, per_device_train_batch_size=2,
                per_device_eval_batch_size=2, gradient_checkpointing=False, ddp_backend="gloo", **settings,
            ),
            train_dataset=tiny.prompt_completion_data(),
            eval_dataset=tiny.prompt_completion_data(),
            processing_class=AutoTokenizer.from_pretrained(model_dir),
        )  # fmt: skip
        trainer.train()
        histories[name] = [entry for entry in trainer.state.log_history if "loss" in entry]
        evaluations[name] = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        (Path(output_dir) / "history.json").write_text(json.dumps({"train": histories, "eval": evaluations}))
    trainer.accelerator.wait_for_everyone()
    os._exit(0)  # tearing gloo down beside live DDP models sometimes hangs in torch 2.13


if __name__ == "__main__":
    main(*sys.argv[1:])
