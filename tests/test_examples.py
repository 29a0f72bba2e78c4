"""The examples run as they stand, on local folders, and their headers are right."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tiny


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def data_dir(tmp_path):
    data = tiny.messages_data()
    data.to_json(tmp_path / "data" / "train.jsonl")
    data.select(range(2)).to_json(tmp_path / "data" / "test.jsonl")
    return str(tmp_path / "data")


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
