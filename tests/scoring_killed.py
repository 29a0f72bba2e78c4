"""Scores a dataset, and is cut off on the way, in several ways, each in a fork of its own.

Usage: scoring_killed.py MODEL_DIR OUTPUT_DIR

Below OUTPUT_DIR, one folder each:
  write     SIGKILL when the second shard is written but not yet in place
  forward   SIGKILL while the model runs, when two shards are finished
  none      no space for any file
  full      no space any more after the first shard

Prints how each ended.
"""

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import tiny
import torch

from trl_ift.data import inference, scoring, shards


OPTIONS = {"shard_size": 2, "batch_tokens": 60}


def killed(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def limit_files() -> None:
    """No file can grow beyond 1000 bytes, as if the disk were full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def before_replacing(name: str, action: Callable[[], None]) -> None:
    replace = os.replace

    def patched(source, target):
        if str(target).endswith(name):
            action()
        replace(source, target)

    shards.os.replace = patched


def in_write() -> None:
    before_replacing("scores-00001.parquet", killed)


def in_forward() -> None:
    score, calls = scoring.sequence_log_probs, []

    def third_is_killed(model, *args):
        calls.append(model)
        if len(calls) == 3:
            model.model.layers[-1].register_forward_pre_hook(killed)
        return score(model, *args)

    scoring.sequence_log_probs = third_is_killed


def without_space() -> None:
    inference.create_model_from_path = None  # not reached
    limit_files()


def without_space_later() -> None:
    before_replacing("scores-00000.parquet", limit_files)


WAYS = {"write": in_write, "forward": in_forward, "none": without_space, "full": without_space_later}


def main(model_dir: str, output_dir: str) -> None:
    torch.set_num_threads(1)
    for name, prepare in WAYS.items():
        child = os.fork()
        if child:
            print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        prepare()
        try:
            scoring.score_dataset(model_dir, tiny.prompt_completion_data(), Path(output_dir) / name, **OPTIONS)
        except OSError as error:
            print(error, flush=True)
            os._exit(1)
        os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
