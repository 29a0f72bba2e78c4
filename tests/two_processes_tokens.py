"""Run by `torchrun --nproc-per-node 2`: one optimizer step of the methods with numbers of tokens under DDP (gloo).

Usage: two_processes_tokens.py OUTPUT_DIR PREFIX (of the cases to run)
"""

import sys

import tiny
import two_processes_tpo_mpo as harness
from test_figa import edits
from test_tis_dpo import weighted_data

from trl_ift import FIGAConfig, FIGATrainer, TISDPOConfig, TISDPOTrainer


def tis_dpo(**settings):
    return TISDPOTrainer, TISDPOConfig, weighted_data(tiny.tokenizer(), 4), settings


def figa(**settings):
    return FIGATrainer, FIGAConfig, edits(), {"nll_cut": 6.0, **settings}


CASES = {
    "tis-dpo": tis_dpo,
    "tis-dpo stored": lambda: tis_dpo(precompute_ref_log_probs=True),
    "figa": figa,
    "figa others": lambda: figa(other_weight=0.5),
    "figa micro": lambda: figa(figa_normalization="micro"),
}


def check(monkeypatch, prefix, folder):
    """As `harness.check`, for the cases of this file."""
    monkeypatch.setattr(harness, "CASES", CASES)
    monkeypatch.setattr(harness, "__file__", __file__)
    return harness.check(prefix, folder)


if __name__ == "__main__":
    harness.CASES = CASES
    harness.main(*sys.argv[1:])
