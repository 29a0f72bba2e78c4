"""Run by `torchrun --nproc-per-node 2`: both processes score into the same folders.

Usage: two_processes_scoring.py MODEL_DIR OUTPUT_DIR
"""

import json
import os
import sys
from pathlib import Path

import tiny
import torch

from trl_ift.data import scoring
from trl_ift.data.scoring import score_dataset


def main(model_dir: str, output_dir: str) -> None:
    torch.set_num_threads(1)
    rank, write, written = os.environ["RANK"], scoring._write_shard, []

    def noted(path, *args):
        written.append(f"{path.parent.name}/{path.name}")
        write(path, *args)

    scoring._write_shard = noted
    data = tiny.prompt_completion_data()
    folder = Path(output_dir)
    rows = {
        "map": score_dataset(model_dir, data, folder / "map", shard_size=2),
        "stream": score_dataset(model_dir, data.to_iterable_dataset(), folder / "stream", shard_size=2),
        "memory": score_dataset(model_dir, data, shard_size=2),
    }
    report = {
        "written": written,
        "rows": {name: scores[:] for name, scores in rows.items()},
    }
    (folder / f"process-{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
