"""The Ray example gives the scores of `score_dataset`, of each row once, and leaves nothing behind."""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from trl_ift.data import learnability, score_dataset


pytest.importorskip("ray.data", reason="the example needs `ray[data]`")
pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).parents[1] / "examples" / "score_ray.py"


@pytest.fixture
def ray_folder():
    """Folder of what Ray writes; its sockets need a short path."""
    folder = tempfile.mkdtemp(prefix="ray-")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _run(ray_folder: str, *argv: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {
        "RAY_TMPDIR": ray_folder,
        "RAY_AUTH_TOKEN": secrets.token_hex(32),  # else Ray keeps one in the home directory
        "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(100 * 2**20),
    }
    command = [sys.executable, str(EXAMPLE), *argv]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def _processes(ray_folder: str) -> list[str]:
    """Command lines of the processes that Ray has started here."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = ((process / name).read_bytes() for name in ("cmdline", "environ"))
        except OSError:  # it has ended, or is another user's
            continue
        if ray_folder.encode() in command + environment:
            found.append(command.replace(b"\0", b" ").decode())
    return found


def _ended(ray_folder: str, seconds: float = 15) -> bool:
    """Whether the processes are gone, which may take them a moment."""
    end = time.monotonic() + seconds
    while _processes(ray_folder):
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def _repeated(data: Dataset, times: int) -> Dataset:
    """The rows again and again, no two of them alike."""

    def numbered(row: dict, index: int) -> dict:
        prompt = row["prompt"]
        if isinstance(prompt, str):
            return {"prompt": f"{index} {prompt}"}
        return {"prompt": [{**prompt[0], "content": f"{index} {prompt[0]['content']}"}]}

    return data.select([*range(len(data))] * times).map(numbered, with_indices=True)


@pytest.mark.parametrize(("kind", "max_length"), [("adapter", 16), ("reference_model", 100)])
def test_scores(kind, max_length, tmp_path, ray_folder, tokenizer, model_dir):
    """Prompt-completion rows in JSON lines with an adapter; conversational rows in Parquet with a model of its own.

    Some rows are cut, so that none of their scored tokens is left.
    """
    model, reference_dir = AutoModelForCausalLM.from_pretrained(model_dir), str(tmp_path / "reference")
    if kind == "adapter":
        rows = _repeated(tiny.prompt_completion_data(), 5)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        reference = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config)
    else:
        rows = _repeated(tiny.conversational_data(), 5)
        reference = tiny.model("llama", tokenizer, seed=1)
    reference.save_pretrained(reference_dir)
    for number, part in enumerate((range(7), range(7, 30), range(30, 40))):  # in three files
        if kind == "adapter":
            rows.select(part).to_json(tmp_path / "rows" / f"{number}.jsonl.gz", compression="gzip")
        else:
            rows.select(part).to_parquet(tmp_path / "rows" / f"{number}.parquet")

    output = tmp_path / "scores"
    argv = ["--model", model_dir, f"--{kind}", reference_dir, "--data", str(tmp_path / "rows" / "*")]
    argv += ["--output", str(output), "--workers", "2", "--max_length", str(max_length)]
    result = _run(ray_folder, *argv, "--batch_rows", "8", "--batch_tokens", "256")
    assert result.returncode == 0, result.stderr[-3000:]
    assert _ended(ray_folder), _processes(ray_folder)

    options = {"processing_class": tokenizer, "args": SFTConfig(max_length=max_length, bf16=False, report_to="none")}
    with pytest.warns(UserWarning, match="no scored token"):
        before, after = (score_dataset(each, rows, **options) for each in (model, reference))
    found = pq.read_table(output).sort_by("index").to_pydict()
    assert found["index"] == list(range(len(rows)))
    assert found["row_hash"] == before["row_hash"][:]
    assert found["num_tokens"] == before["num_tokens"][:]
    assert found["nll"] == pytest.approx(before["nll"][:], rel=1e-5, nan_ok=True)
    assert found["nll_reference"] == pytest.approx(after["nll"][:], rel=1e-5, nan_ok=True)
    assert found["learnability"] == pytest.approx(learnability(before, after), abs=1e-5, nan_ok=True)
    assert np.nanmax(np.abs(found["learnability"])) > 1e-3


def test_nothing_is_written_over(tmp_path, ray_folder):
    output = tmp_path / "scores"
    output.mkdir()
    result = _run(ray_folder, "--data", "rows.jsonl", "--output", str(output))
    assert result.returncode == 2
    assert f"`{output}` exists" in result.stderr
    assert not list(output.iterdir())
