"""Run by `torchrun --nproc-per-node 2`: some optimizer steps of every registered method under DDP (gloo).

Usage: two_processes_invariance.py OUTPUT_DIR

Also the home of what this run shares with the tests on one process.
"""

import inspect
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import tiny
import torch
from pairs import logs, make, step_gradients
from test_methods import DATA, MODELS

from trl_ift import METHODS
from trl_ift.preference.trainer import REF_COLUMNS


class Run(NamedTuple):
    """What training consists of: logged losses, gradients of the steps, and the number of tokens seen."""

    losses: list[float]
    gradients: list[dict[str, torch.Tensor]]
    num_tokens: float


def takes_reference(method):
    """Whether the trainer of a method compares with a model that can be passed to it."""
    cls = method.trainer_class
    return "ref_model" in inspect.signature(cls.__init__).parameters and getattr(cls, "uses_reference", True)


def reference_model(tokenizer):
    """A model that is not the policy, but near it: log-ratios of a few nats, of both signs."""
    reference = tiny.model("llama", tokenizer)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return reference


def build(method, folder, tokenizer, **settings):
    """A trainer of a method on the data of its contract, against a reference model of its own where it takes one.

    It descends by plain gradients, so that rounding does not grow where a gradient is almost 0.
    """
    given: dict[str, Any] = DATA.get(method.name, lambda settings: {"train_dataset": tiny.preference_data()})(settings)
    data, own = given.pop("train_dataset"), settings.pop("train_dataset", None)
    if own is not None:
        data = own
    elif takes_reference(method):
        data = data.remove_columns([name for name in REF_COLUMNS if name in data.column_names])
        given["ref_model"] = reference_model(tokenizer)
    model = MODELS.get(method.name, lambda tokenizer: tiny.model("llama", tokenizer))(tokenizer)
    cls = partial(method.trainer_class, **given)
    options = {"optim": "sgd", "overwrite_output_dir": True, **settings}
    return make(cls, method.config_class, Path(folder), model, data, tokenizer, **options)


def train(trainer) -> Run:
    losses, gradients = step_gradients(trainer)
    return Run(losses, gradients, logs(trainer)[-1]["num_tokens"])


# Steps over all eight rows, as two processes and as one split them into the same micro-batches
TOGETHER = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2, "logging_steps": 2}
ALONE = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 2}


def main(output_dir):
    torch.set_num_threads(1)
    tokenizer = tiny.tokenizer()
    found = {}
    for method in METHODS:
        trainer = build(method, f"{output_dir}/{method.name}", tokenizer, ddp_backend="gloo", **TOGETHER)
        assert trainer.accelerator.num_processes == 2
        found[method.name] = tuple(train(trainer))
    if os.environ["RANK"] == "0":
        torch.save(found, f"{output_dir}/found.pt")
    torch.distributed.barrier()
    os._exit(0)  # tearing gloo down beside live DDP models sometimes hangs in torch 2.13


if __name__ == "__main__":
    main(*sys.argv[1:])
