"""Run by `torchrun --nproc-per-node 2`: a step of LD-Align's trainer, or its iterations, under DDP (gloo).

Usage: two_processes_self_play.py trainer OUTPUT_DIR
       two_processes_self_play.py run OUTPUT_DIR MODEL_DIR

Also the home of `step`, which the tests on one process share.
"""

import json
import os
import sys
from pathlib import Path

import tiny
import torch
from pairs import anchored, logs, make, step_gradients
from self_play_killed import KILLED, Letters, run

from trl_ift import LDAlignConfig, LDAlignTrainer


def step(folder, **settings):
    """Log entry and gradients of one optimizer step over four weighted pairs."""
    tokenizer = tiny.tokenizer()
    trainer = make(
        LDAlignTrainer, LDAlignConfig, Path(folder), tiny.model("llama", tokenizer),
        anchored(4, latent_distance=[5.0, 0.0, 0.5, 2.0]), tokenizer, beta=0.02, max_steps=1, **settings,
    )  # fmt: skip
    _, gradients = step_gradients(trainer)
    return logs(trainer)[0], gradients


def main(what, output_dir, model_dir=None):
    torch.set_num_threads(1)
    if what == "trainer":
        entry, (gradients,) = step(
            f"{output_dir}/two", per_device_train_batch_size=1, gradient_accumulation_steps=2, ddp_backend="gloo"
        )
        if os.environ["RANK"] == "0":
            torch.save((entry, gradients), f"{output_dir}/found.pt")
    else:
        settings = KILLED | {"per_device_train_batch_size": 2, "ddp_backend": "gloo"}
        summaries = run(model_dir, f"{output_dir}/two", latent=Letters(), **settings)
        if os.environ["RANK"] == "0":
            Path(output_dir, "summaries.json").write_text(json.dumps(summaries))
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # tearing gloo down beside live DDP models sometimes hangs in torch 2.13


if __name__ == "__main__":
    main(*sys.argv[1:])
