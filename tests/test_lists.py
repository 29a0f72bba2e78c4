"""Lists and reward models on two processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from pairs import difference
from two_processes_lists import RUNS, run


SCRIPT = Path(__file__).parent / "two_processes_lists.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = tiny.tokenizer()
    tiny.model("llama", tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def two(tmp_path_factory, folder):
    """Logs and gradients of the runs of the script on 2 gloo processes."""
    output = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    process = subprocess.Popen(
        [*command, folder, str(output)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, errors = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # torchrun's workers too
        raise
    assert process.returncode == 0, errors[-3000:]
    return json.loads((output / "logs.json").read_text()), torch.load(output / "gradients.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes(name, two, folder, tmp_path, tokenizer):
    """2 processes x 2 accumulation steps of 1 row = 1 batch of 4 rows."""
    _, expected, gradients = run(name, folder, tokenizer, tmp_path, 4, 1)
    found = two[0][name]
    assert difference(two[1][name], gradients) < 1e-5
    own = [key for key in expected if key.startswith(("exo/", "eurus/", "weights/"))]
    assert len(own) >= 5
    for key in ("loss", "grad_norm", "num_tokens", *own):
        assert found[key] == pytest.approx(expected[key], rel=2e-4, abs=1e-5), key
