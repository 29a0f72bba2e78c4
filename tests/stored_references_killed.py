"""Stores reference log-probabilities, is killed on the way, and goes on in two processes; each in a fork of its own.

Usage: stored_references_killed.py MODEL_DIR OUTPUT_DIR

Prints as JSON: how the forks ended, the files after the kill, and how many responses each of the two processes scored.
"""

import json
import os
import signal
import sys
from pathlib import Path

import tiny
import torch

from trl_ift.data import shards, stored_references


def fork(run) -> int:
    child = os.fork()
    if not child:
        run()
        os._exit(0)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(model_dir: str, output_dir: str) -> None:
    torch.set_num_threads(1)
    folder = Path(output_dir)

    def store() -> None:
        stored_references.store_references(model_dir, tiny.preference_data(), folder, shard_size=2, batch_tokens=60)

    def killed() -> None:
        replace = os.replace

        def dies(source, target):
            if "train-00001-of-" in str(target):
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        shards.os.replace = dies
        store()

    def process(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
        scored, run = [], stored_references.sequence_log_probs
        stored_references.sequence_log_probs = lambda *args: (scored.append(len(args[1])), run(*args))[1]
        store()
        (folder / f"scored-{rank}.json").write_text(json.dumps(sum(scored)))

    report = {"killed": ended(fork(killed)), "files": sorted(path.name for path in (folder / "data").glob("[!.]*"))}
    children = [fork(lambda rank=rank: process(rank)) for rank in (0, 1)]
    report["processes"] = [ended(child) for child in children]
    report["scored"] = [json.loads((folder / f"scored-{rank}.json").read_text()) for rank in (0, 1)]
    report["left"] = sorted(path.name for path in (folder / "data").glob(".*"))
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
