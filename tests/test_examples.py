"""The examples run as they stand, on local folders, and their headers are right."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from datasets import Dataset


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def data_dir(tmp_path):
    data = tiny.messages_data()
    data.to_json(tmp_path / "data" / "train.jsonl")
    data.select(range(2)).to_json(tmp_path / "data" / "test.jsonl")
    return str(tmp_path / "data")


@pytest.fixture
def pairs_dir(tmp_path):
    """Triples, which are pairs too."""
    rows = [
        {"prompt": question, "reference": f" {answer}", "chosen": f" {answer[:9]}", "rejected": f" {answer[::-1]}"}
        for question, answer in tiny.QUESTIONS
    ]
    Dataset.from_list(rows).to_json(tmp_path / "pairs" / "train.jsonl")
    return str(tmp_path / "pairs")


def _python(example: str, *argv: str, folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache")}
    command = [sys.executable, str(EXAMPLES / example), *argv]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_header_and_listing(path):
    header = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", path.read_text(), re.MULTILINE)
    metadata = tomllib.loads(re.sub(r"^# ?", "", header[1], flags=re.MULTILINE))
    assert any(re.match(r"trl-ift\b", dependency) for dependency in metadata["dependencies"])
    assert metadata["requires-python"] == ">=3.11"
    assert f"]({path.name})" in (EXAMPLES / "README.md").read_text()


@pytest.mark.slow
def test_ift(tmp_path, model_dir, data_dir):
    paths = ["--model_name_or_path", model_dir, "--dataset_name", data_dir, "--output_dir", "out"]
    run = ["--max_steps", "2", "--logging_steps", "1", "--eval_strategy", "epoch", "--report_to", "none"]
    result = _python("ift.py", *paths, *run, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert any("down_proj" in name for name in adapter["target_modules"])
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    log = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert [round(entry["ift/lambda"], 6) for entry in log if "loss" in entry] == [0.2, 0.2]


@pytest.mark.slow
def test_mpo(tmp_path, model_dir, pairs_dir):
    paths = ["--model_name_or_path", model_dir, "--dataset_name", pairs_dir, "--output_dir", "out"]
    run = ["--max_steps", "2", "--logging_steps", "1", "--max_new_tokens", "8", "--report_to", "none"]
    result = _python("mpo.py", *paths, *run, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    log = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert log[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert log[0]["mpo/reg_kl"] == pytest.approx(0, abs=1e-3)  # the samples are the starting model's


@pytest.mark.slow
def test_lobass(tmp_path, model_dir, data_dir):
    paths = ["--model_name_or_path", model_dir, "--dataset_name", data_dir, "--output_dir", "out"]
    run = ["--max_steps", "2", "--learning_rate", "0.01", "--fraction", "0.5", "--report_to", "none"]
    result = _python("lobass.py", *paths, *run, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Selected 4 of 8 rows" in result.stdout
    table = pq.read_table(tmp_path / "out" / "selection" / "scores.parquet").to_pydict()
    assert np.mean(table["loss_reference"]) < np.mean(table["loss_initial"])
    assert sum(table["selected"]) == 4
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spin", "ld_align"])
def test_self_play(name, tmp_path, model_dir, data_dir):
    paths = ["--model_name_or_path", model_dir, "--dataset_name", data_dir, "--output_dir", "out"]
    run = [
        "--max_steps",
        "2",
        "--logging_steps",
        "1",
        "--num_iterations",
        "2",
        "--max_new_tokens",
        "8",
        "--report_to",
        "none",
    ]
    if name == "ld_align":
        run += ["--guide_options", '{"latent_dim": 4, "max_length": 64, "eval_fraction": 0.25}']
    result = _python(f"{name}.py", *paths, *run, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"^Iteration [12]: (8|16) pairs", result.stdout, re.MULTILINE)) == 2
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / "iteration-1" / "stages.json").is_file()
    assert (tmp_path / "out" / "guide" / "guide.json").is_file() == (name == "ld_align")


@pytest.mark.slow
def test_tpo(tmp_path, model_dir, pairs_dir):
    paths = ["--model_name_or_path", model_dir, "--dataset_name", pairs_dir, "--output_dir", "out"]
    run = ["--max_steps", "2", "--logging_steps", "1", "--loss_type", "tpo-l", "--report_to", "none"]
    result = _python("tpo.py", *paths, *run, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    log = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert all(entry["nll_loss"] > 0 for entry in log if "loss" in entry)


def test_mpo_bandit():
    """MPO ends at its closed form, in which the answer that nobody compared keeps its probability; DPO does not stop."""
    spec = importlib.util.spec_from_file_location("mpo_bandit", EXAMPLES / "mpo_bandit.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    end = example.train(example.mpo_loss, 1.0, 300)[-1]
    assert end.tolist() == pytest.approx(example.closed_form(1.0), abs=1e-6)
    dpo = example.train(example.dpo_loss, 1.0, 300)
    assert dpo[-1, 2] < 0.1
    assert dpo[-1, 0] > dpo[150, 0] > dpo[50, 0]
    assert example.train(example.ipo_loss, 0.1, 300, 0.05)[-1].tolist() == pytest.approx(
        [0.9184229668, 0.0061882853, 0.0753887480], abs=1e-6
    )


@pytest.mark.slow
def test_eos_hazard(tmp_path):
    """The figures in the documentation, in direction: the released gradient unlearns a certain end, the default does not."""
    spec = importlib.util.spec_from_file_location("eos_hazard", EXAMPLES / "eos_hazard.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    settings = ["SFT (lambda 0, gamma 0)", "lambda 0.2, full", "lambda 0.2, numerator (default)"]
    sft, full, numerator = (example.run(example.SETTINGS[name], 150, 0, str(tmp_path)) for name in settings)
    assert full < 0.6
    assert numerator > 0.95
    assert sft > 0.95
