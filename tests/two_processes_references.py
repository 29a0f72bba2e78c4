"""Run by `torchrun --nproc-per-node 2`: both processes score references; each writes what it got.

Usage: two_processes_references.py MODEL_DIR OUTPUT_DIR
"""

import json
import os
import sys
from pathlib import Path

import tiny
import torch

from trl_ift.data import references


def main(model_dir: str, output_dir: str) -> None:
    torch.set_num_threads(1)
    scored, run = [], references.sequence_log_probs
    references.sequence_log_probs = lambda *args: (scored.append(len(args[1])), run(*args))[1]
    rows = references.score_references(tiny.preference_data(), model_dir)
    report = {"scored": sum(scored)} | {name: rows[name][:] for name in references.reference_columns(1)}
    (Path(output_dir) / f"{os.environ['RANK']}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
