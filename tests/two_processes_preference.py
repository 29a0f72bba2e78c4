"""Run by `torchrun --nproc-per-node 2`: preference trainers under DDP (gloo); the main process writes what it saw.

Usage: two_processes_preference.py MODEL_DIR OUTPUT_DIR

Also the home of what this run shares with the tests on one process.
"""

import json
import os
import sys
from pathlib import Path

import tiny
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from trl_ift.preference.collator import Branch, Column
from trl_ift.preference.trainer import PreferenceTrainer, Term


class SameHead(PreferenceTrainer):
    """Projects prompt and padding too, as TRL does on a CPU, so that equality is exact."""

    _labelled_positions_only = False


class ToyTrainer(PreferenceTrainer):
    """A method with everything a method can declare: soft labels, gold responses, and terms over each kind of response."""

    columns = (Column("label_prob", 0.0, 1.0),)
    branches = (Branch("gold", column="reference", aliases=("gold",)),)
    per = "token"  # how the gold term is averaged
    seen = None  # the last `PreferenceBatch`

    def pair_loss(self, batch):
        self.seen = batch
        p = batch.columns.get("label_prob", 1.0)
        logits = self.beta * batch.margins
        return -p * F.logsigmoid(logits) - (1 - p) * F.logsigmoid(-logits)

    def branch_terms(self, batch):
        yield Term(-batch.branches["gold"].logps.sum(), "gold", self.per, 0.7)
        yield Term(-batch.rejected.logps.sum(), "rejected", "row", -0.01)


class RowToy(ToyTrainer):
    per = "row"


class BatchTokenToy(ToyTrainer):
    per = "batch token"


class AttachedToy(ToyTrainer):
    """Its branch has no text column: the dataset brings tokenized rows, none for some pairs."""

    branches = (Branch("gold"),)


class GradientRecorder(TrainerCallback):
    """Gradients of each optimizer step, summed over its micro-batches and averaged over processes."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = getattr(model, "module", model).named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def options(output_dir, **overrides):
    defaults = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "max_steps": 3,
        "gradient_checkpointing": False,
    }
    return defaults | overrides


def history(entries):
    """Logged entries (or a trainer's) without what depends on the clock."""
    clock = ("runtime", "per_second", "preparation_time", "total_flos")
    return [
        {key: value for key, value in entry.items() if not any(part in key for part in clock)}
        for entry in (entries if isinstance(entries, list) else entries.state.log_history)
    ]


def unequal_triples() -> Dataset:
    """Four triples whose gold responses have very different lengths, with soft labels and weights."""
    rows = tiny.triple_data().select(range(4))
    return rows.add_column("label_prob", [1.0, 0.7, 0.2, 0.9]).add_column("weight", [1.0, 3.0, 0.0, 0.5])


def attached_rows(tokenizer) -> Dataset:
    """The same, tokenized; every second pair brings no gold row."""
    rows = []
    for index, row in enumerate(unequal_triples()):
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = {name: tokenizer(row[name] + "<|im_end|>")["input_ids"] for name in ("chosen", "rejected", "reference")}
        gold = [{"prompt_ids": prompt, "completion_ids": ids["reference"]}] * (2 if index % 2 else 0)
        rows.append(
            {"prompt_ids": prompt, "chosen_ids": ids["chosen"], "rejected_ids": ids["rejected"], "gold_rows": gold}
        )
    return Dataset.from_list(rows)


# Runs of one optimizer step over the four rows: class, settings (2 processes x batch 1 x 2 accumulation steps = 4)
TOYS = {"token": ToyTrainer, "row": RowToy, "attached": AttachedToy}


def toy_gradients(cls, model, tokenizer, output_dir, batch_size, accumulation, **settings):
    """Gradients of one optimizer step over four rows."""
    recorder = GradientRecorder()
    trainer = cls(
        model=model,
        args=cls.config_class(
            **options(
                output_dir, max_steps=1, max_grad_norm=0.0, per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=accumulation, train_sampling_strategy="sequential", **settings,
            )
        ),
        train_dataset=attached_rows(tokenizer) if cls is AttachedToy else unequal_triples(),
        processing_class=tokenizer,
        callbacks=[recorder],
    )  # fmt: skip
    trainer.train()
    return trainer, recorder.steps[0]


# Whole runs: trainer, settings
RUNS = {
    "theirs": (DPOTrainer, {}),
    "ours": (SameHead, {}),
    "ours precomputed": (SameHead, {"precompute_ref_log_probs": True}),
}


def run(cls, model, tokenizer, output_dir, **settings):
    config_class = getattr(cls, "config_class", DPOConfig)
    trainer = cls(
        model=model,
        args=config_class(
            **options(
                output_dir, per_device_train_batch_size=2, eval_strategy="steps", eval_steps=2, **settings
            )
        ),
        train_dataset=tiny.preference_data(),
        eval_dataset=tiny.preference_data().select(range(6)),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    return trainer


def main(model_dir: str, output_dir: str) -> None:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    folder = Path(output_dir)
    histories, gradients = {}, {}
    for name, (cls, settings) in RUNS.items():
        trainer = run(cls, model_dir, tokenizer, folder / name, ddp_backend="gloo", **settings)
        histories[name] = trainer.state.log_history
    for name, cls in TOYS.items():
        trainer, gradients[name] = toy_gradients(cls, model_dir, tokenizer, folder / name, 1, 2, ddp_backend="gloo")
        histories[name] = trainer.state.log_history
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "histories.json").write_text(json.dumps(histories))
        torch.save(gradients, folder / "gradients.pt")
    trainer.accelerator.wait_for_everyone()
    os._exit(0)  # tearing gloo down beside live DDP models sometimes hangs in torch 2.13


if __name__ == "__main__":
    main(*sys.argv[1:])
