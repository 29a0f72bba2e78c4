"""Run by `torchrun --nproc-per-node 2`: one optimizer step of TPO and MPO under DDP (gloo), its loss and gradients.

Usage: two_processes_tpo_mpo.py OUTPUT_DIR PREFIX (of the cases to run)

Also the home of `check`, which compares them with one process.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import tiny
import torch
from pairs import anchored, difference, logs, make, samples, step_gradients, texts, uneven_triples
from trl.experimental.tpo import TPOConfig as TRLTPOConfig
from trl.experimental.tpo import TPOTrainer as TRLTPOTrainer

from trl_ift import MPOConfig, MPOTrainer, TPOConfig, TPOTrainer


def mpo(**settings):
    data = settings.pop("data", anchored(4))
    return MPOTrainer, MPOConfig, data, {"reg_dataset": samples(), "reg_weight": 0.3, **settings}


def tpo(**settings):
    return TPOTrainer, TPOConfig, uneven_triples(), settings


# Four pairs each. With 0.25 samples a pair, three of the four micro-batches have none
CASES = {
    "tpo global_token_mean": tpo,
    "tpo sequence_mean": lambda: tpo(nll_normalization="sequence_mean"),
    "tpo sequence_sum": lambda: tpo(nll_normalization="sequence_sum"),
    "tpo of TRL": lambda: (TRLTPOTrainer, TRLTPOConfig, uneven_triples(), {}),
    "mpo sequence_sum": lambda: mpo(pretrain_weight=0.2, pretrain_dataset=texts()),
    "mpo token_mean": lambda: mpo(reg_reduction="token_mean", pretrain_weight=0.2, pretrain_dataset=texts()),
    "mpo few samples": lambda: mpo(reg_rows_per_pair=0.25),
    "mpo many samples": lambda: mpo(reg_rows_per_pair=2.5),
    "mpo reverse": lambda: mpo(
        reg_kl="reverse", reg_dataset=samples(ref_logps=[-20.0, -120.0, -40.0, -60.0]), log_w_max=20.0
    ),
    "mpo own reference": lambda: mpo(data=tiny.preference_data().select(range(4))),
}


# Metrics that TRL averages over micro-batches of different sizes
_BY_MICRO_BATCH = {"logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy"}


def run(name, folder, **settings):
    """What the first optimizer step consists of: (log entry, gradients)."""
    tokenizer = tiny.tokenizer()
    cls, config_class, data, own = CASES[name]()
    model = tiny.model("llama", tokenizer)
    trainer = make(cls, config_class, Path(folder), model, data, tokenizer, max_steps=1, **own, **settings)
    _, (gradients,) = step_gradients(trainer)
    return logs(trainer)[0], gradients


def check(prefix, folder):
    """2 gloo processes with 2 micro-batches of 1 = 1 process with 1 of 4. Returns how far the gradients are apart."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    process = subprocess.Popen(
        [*command, str(folder), prefix], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        _, errors = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # torchrun's workers too
        raise
    assert process.returncode == 0, errors[-3000:]
    found, apart = torch.load(folder / "found.pt"), {}
    for name in filter(lambda name: name.startswith(prefix), CASES):
        entry, gradients = run(name, folder / "one" / name)
        apart[name] = difference(found[name][1], gradients)
        if apart[name] < 1e-5:
            for key in entry.keys() - _BY_MICRO_BATCH:
                assert abs(found[name][0][key] - entry[key]) <= 1e-5 * max(1, abs(entry[key])), (name, key)
    return apart


def main(output_dir, prefix):
    torch.set_num_threads(1)
    found = {
        name: run(name, f"{output_dir}/{name}", per_device_train_batch_size=1, gradient_accumulation_steps=2,
                  ddp_backend="gloo")
        for name in CASES
        if name.startswith(prefix)
    }  # fmt: skip
    if os.environ["RANK"] == "0":
        torch.save(found, f"{output_dir}/found.pt")
    torch.distributed.barrier()
    os._exit(0)  # tearing gloo down beside live DDP models sometimes hangs in torch 2.13


if __name__ == "__main__":
    main(*sys.argv[1:])
