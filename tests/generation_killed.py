"""Generates completions, and is killed (SIGKILL) when the second shard is written but not yet in place.

Usage: generation_killed.py MODEL_DIR OUTPUT_DIR
"""

import os
import signal
import sys

import tiny

from trl_ift.data import generation, shards


OPTIONS = {"num_completions": 2, "max_new_tokens": 12, "shard_size": 2, "batch_tokens": 300, "seed": 7}


def main(model_dir: str, output_dir: str) -> None:
    replace = os.replace

    def killed(source, target):
        if str(target).endswith("completions-00001.parquet"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    shards.os.replace = killed
    generation.generate_completions(model_dir, tiny.conversational_data(), output_dir, **OPTIONS)


if __name__ == "__main__":
    main(*sys.argv[1:])
