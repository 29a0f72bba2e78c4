"""The command line: speed of `--help`, dealing out of arguments, data sources, a real run, and what bad input prints."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import tiny
import torch
import yaml
from transformers import set_seed
from trl import DatasetMixtureConfig, ScriptArguments

from trl_ift import METHODS, IFTConfig, IFTTrainer, __version__, get_method
from trl_ift.cli import main
from trl_ift.registry import methods_table, symptoms_table
from trl_ift.scripts import train as script
from trl_ift.scripts.data import load_named, load_splits


@pytest.fixture(autouse=True)
def workdir(tmp_path, monkeypatch):
    """Each test runs in its own folder, with its own cache of datasets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TRL_IFT_DEBUG", raising=False)
    return tmp_path


@pytest.fixture
def data_file(workdir):
    path = workdir / "data.jsonl"
    tiny.messages_data().to_json(path)
    return str(path)


def _exit_code(argv: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    return stop.value.code or 0


# ---------------------------------------------------------------- the light commands


@pytest.mark.parametrize(
    "code",
    ["import trl_ift", "main(['--help'])", "main(['--version'])", "main(['methods'])", "main([])", "main(['metods'])"],
)
def test_light_commands_import_nothing_heavy(code):
    program = (
        "import sys\nfrom trl_ift.cli import main\n"
        f"try:\n    {code}\nexcept SystemExit:\n    pass\n"
        "print('HEAVY', {'torch', 'transformers', 'trl', 'accelerate', 'datasets', 'numpy'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "HEAVY set()" in result.stdout


def test_top_level_help_lists_every_command(capsys):
    assert _exit_code(["--help"]) == 0
    text = capsys.readouterr().out
    for name in [*(method.name for method in METHODS), "methods", "demo", "env"]:
        assert re.search(rf"\n    {name}\s", text)  # argparse breaks the line after a long name
    assert main([]) == 0
    assert capsys.readouterr().out == text


def test_version(capsys):
    assert _exit_code(["--version"]) == 0
    assert capsys.readouterr().out == f"trl-ift {__version__}\n"


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_methods_table(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= columns
    words = text.split()
    for method in METHODS:
        assert method.name in words
        assert f"arXiv:{method.paper}" in words


def test_a_reader_that_ends_early():
    """As `trl-ift methods | head -0` does."""
    process = subprocess.Popen(
        [sys.executable, "-m", "trl_ift.cli", "methods"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0


def test_methods_as_markdown(capsys):
    assert main(["methods", "--markdown"]) == 0
    assert capsys.readouterr().out.strip() == f"{methods_table()}\n\n{symptoms_table()}"


def test_unknown_command_names_the_nearest(capsys):
    assert _exit_code(["itf"]) == 2
    assert capsys.readouterr().err == "trl-ift: error: unknown command 'itf'. Did you mean `trl-ift ift`?\n"
    assert _exit_code(["zzzzzz"]) == 2
    assert "The commands are: ift" in capsys.readouterr().err


def test_abbreviations_are_refused(capsys):
    assert _exit_code(["--vers"]) == 2
    assert _exit_code(["methods", "--mark"]) == 2
    assert _exit_code(["ift", "--learning_ra", "1"]) == 2
    assert "Did you mean --learning_rate?" in capsys.readouterr().err


def test_env(capsys):
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"- trl-ift version: {__version__}" in lines
    assert f"- PyTorch version: {torch.__version__}" in lines


# ---------------------------------------------------------------- dealing out the arguments


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_help_of_every_method(method, capsys):
    assert _exit_code([method.name, "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--dataset_name", "--use_peft", "--learning_rate", "--overwrite_output_dir"):
        assert option in text
    assert "Config does not have: --overwrite_output_dir" in text


@pytest.fixture
def launched(monkeypatch):
    """The arguments that `accelerate launch` gets, in place of a launch."""
    calls = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", calls.append)
    return calls


def test_arguments_are_dealt_out(launched):
    argv = ["--num_processes=1", "--learning_rate", "1e-3", "--mixed_precision", "no", "--seed", "1", "--use_peft"]
    assert main(["ift", *argv, "--num_machines", "1", "--lora_target_modules", "q_proj", "v_proj"]) == 0
    (args,) = launched
    assert (args.num_processes, args.mixed_precision, args.num_machines) == (1, "no", 1)
    assert args.training_script == script.__file__
    expected = "ift --learning_rate 1e-3 --seed 1 --use_peft --lora_target_modules q_proj v_proj"
    assert args.training_script_args == expected.split()


@pytest.mark.parametrize("form", [["--config", "run.yaml"], ["--config=run.yaml"]])
def test_yaml_file_with_accelerate_keys(launched, form, monkeypatch):
    monkeypatch.setenv("TRL_IFT_TEST", "old")
    config = {"learning_rate": 1e-3, "multi_gpu": True, "main_process_port": 1234, "tpu": False}
    Path("run.yaml").write_text(yaml.safe_dump({**config, "env": {"TRL_IFT_TEST": 7}}))
    assert main(["ift", "--seed", "3", *form, "--main_process_port", "99", "--num_processes", "2"]) == 0
    (args,) = launched
    assert (args.multi_gpu, args.tpu, args.main_process_port, args.num_processes) == (True, False, 99, 2)
    assert args.training_script_args == ["ift", "--config", "run.yaml", "--seed", "3"]
    assert os.environ["TRL_IFT_TEST"] == "7"


@pytest.mark.parametrize("form", [["--accelerate_config", "zero2"], ["--accelerate_config=zero2"]])
def test_shipped_accelerate_config(launched, form):
    assert main(["ift", *form]) == 0
    assert Path(launched[0].config_file).name == "zero2.yaml"
    assert Path(launched[0].config_file).is_file()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--learning_rte 1e-3", ["unknown option --learning_rte", "Did you mean --learning_rate?"]),
        ("--num_proceses 2", ["unknown option --num_proceses", "Did you mean --num_processes?"]),
        ("--learning_rate abc", ["--learning_rate", "invalid float value: 'abc'"]),
        ("--ift_propagation los", ["--ift_propagation", "'loss'"]),
        ("--num_processes x", ["--num_processes", "invalid int value: 'x'"]),
        ("data.jsonl", ["unexpected argument 'data.jsonl'", "--dataset_name data.jsonl"]),
        ("--seed 1 2", ["unexpected argument '2'"]),
        ("--num_processes 1 2", ["unexpected argument '2'"]),
        ("--config", ["`--config` takes one YAML file"]),
        ("--config typo.yaml", ["in typo.yaml: unknown option --lerning_rate", "Did you mean --learning_rate?"]),
        ("--config dashes.yaml", ["in dashes.yaml: unknown option --num-train-epochs", "--num_train_epochs?"]),
    ],
)
def test_usage_errors_are_one_line(argv, expected, launched, capsys):
    Path("typo.yaml").write_text("lerning_rate: 1")
    Path("dashes.yaml").write_text("num-train-epochs: 1")
    assert _exit_code(["ift", *argv.split()]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("trl-ift ift: error: ")
    assert "\n" not in error
    assert all(part in error for part in expected), error
    assert not launched


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--config nowhere.yaml", "nowhere.yaml"),
        ("--config list.yaml", "expected `option: value` lines, found list"),
        ("--config env.yaml", "`env` must hold `NAME: value` lines, found str"),
        ("--accelerate_config zero9", "zero9 is neither a file nor a valid config"),
    ],
)
def test_broken_config_files(argv, expected, launched, capsys):
    Path("list.yaml").write_text("- seed: 1")
    Path("env.yaml").write_text("env: A=1")
    assert main(["ift", *argv.split()]) == 1
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error
    assert not launched


def test_killed_training_is_explained(monkeypatch, capsys):
    def killed(args):
        raise subprocess.CalledProcessError(-signal.SIGKILL, "python")

    monkeypatch.setattr("accelerate.commands.launch.launch_command", killed)
    assert main(["ift"]) == 137
    assert "ran out of memory" in capsys.readouterr().err


# ---------------------------------------------------------------- data


def test_data_files(workdir):
    data = tiny.prompt_completion_data()
    data.to_json("a.jsonl")
    data.to_json("a.json", lines=False)
    data.to_csv("a.csv")
    data.to_parquet("a.parquet")
    Path("a.jsonl.gz").write_bytes(gzip.compress(Path("a.jsonl").read_bytes()))
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", f"{workdir}/a.jsonl"):
        splits = load_named(name)
        assert list(splits) == ["train"]
        assert splits["train"].to_list() == data.to_list()
    assert next(iter(load_named("a.jsonl", streaming=True)["train"])) == data[0]


def test_data_folders():
    data = tiny.prompt_completion_data()
    data.to_json("files/train.jsonl")
    data.select(range(2)).to_json("files/test.jsonl")
    data.save_to_disk("saved")
    datasets.DatasetDict({"train": data, "validation": data.select(range(3))}).save_to_disk("saved-splits")

    def sizes(name):
        return {split: len(rows) for split, rows in load_named(name).items()}

    assert sizes("files") == {"train": 8, "test": 2}
    assert sizes("saved") == {"train": 8}
    assert sizes("saved-splits") == {"train": 8, "validation": 3}
    assert next(iter(load_named("saved", streaming=True)["train"])) == data[0]


def _splits(training: dict | None = None, mixture: dict | None = None, **script_args):
    config = IFTConfig("out", use_cpu=True, bf16=False, report_to="none", **(training or {}))
    return load_splits(ScriptArguments(**script_args), DatasetMixtureConfig(**(mixture or {})), config)


def test_evaluation_split(data_file):
    evaluation = {"eval_strategy": "steps"}
    train, test = _splits(dataset_name=data_file)
    assert (len(train), test) == (8, None)

    train, test = _splits(evaluation, {"test_split_size": 0.25}, dataset_name=data_file)
    again = _splits(evaluation, {"test_split_size": 0.25}, dataset_name=data_file)
    assert (len(train), len(test)) == (6, 2)
    assert test.to_list() == again[1].to_list()
    rows = [json.dumps(row) for row in [*train, *test]]
    assert sorted(rows) == sorted(json.dumps(row) for row in tiny.messages_data())

    train, test = _splits(evaluation, dataset_name=data_file, dataset_test_split="train")
    assert (len(train), len(test)) == (8, 8)


def test_mixture(data_file):
    tiny.messages_data().select(range(4)).to_json("more.jsonl")
    entries = [{"path": data_file}, {"path": "json", "data_files": "more.jsonl", "columns": ["messages"]}]
    train, test = _splits({"eval_strategy": "steps"}, {"datasets": entries, "test_split_size": 0.25})
    assert (len(train), len(test)) == (9, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "expected"),
    [
        ({}, ValueError, "none is given"),
        (
            {"dataset_name": "data.jsonl", "mixture": {"datasets": [{"path": "data.jsonl"}]}},
            ValueError,
            "both are given",
        ),
        ({"dataset_name": "nowhere.jsonl"}, FileNotFoundError, "`nowhere.jsonl` does not exist"),
        ({"dataset_name": "./nowhere"}, FileNotFoundError, "`./nowhere` does not exist"),
        ({"dataset_name": "notes.txt"}, ValueError, "`notes.txt` is of no known kind. Expected one of .jsonl"),
        ({"dataset_name": "broken.jsonl"}, ValueError, "broken.jsonl cannot be read"),
        ({"dataset_name": "data.jsonl", "dataset_train_split": "all"}, ValueError, "no split 'all'; it has: 'train'"),
        (
            {"dataset_name": "data.jsonl", "training": {"eval_strategy": "epoch"}},
            ValueError,
            "no split 'test'; it has: 'train'. `--eval_strategy epoch` needs one",
        ),
        (
            {"training": {"eval_strategy": "steps"}, "mixture": {"datasets": [{"path": "data.jsonl"}]}},
            ValueError,
            "`datasets:` has no split 'test'",
        ),
        (
            {"dataset_name": "data.jsonl", "dataset_streaming": True, "mixture": {"test_split_size": 0.1}},
            ValueError,
            "drop `--dataset_streaming`",
        ),
    ],
)
def test_data_errors(arguments, error, expected, data_file):
    Path("notes.txt").write_text("notes")
    Path("broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(error) as caught:
        _splits(**arguments)
    assert expected in str(caught.value)


# ---------------------------------------------------------------- the script


def _run(*argv: str, model: str | None = None, data: str = "data.jsonl") -> int:
    named = [] if model is None else ["--model_name_or_path", model]
    return script.run(["ift", *named, "--dataset_name", data, "--report_to", "none", *argv])


def test_script_bad_input(model_dir, data_file, capsys, monkeypatch):
    def error_of(*argv, **kwargs):
        assert _run("--output_dir", "out", *argv, **kwargs) == 1
        error = capsys.readouterr().err
        assert error.count("trl-ift ift: error: ") == 1
        assert "Traceback" not in error
        return error

    assert "name a Hub id or a local folder with `--model_name_or_path`" in error_of()
    assert "`ift_lambda=5.0` is out of range" in error_of("--ift_lambda", "5", model=model_dir)
    assert "has no `config.json`" in error_of(model=str(Path(data_file).parent))
    assert "there is no folder `out/checkpoint-1`" in error_of(
        "--resume_from_checkpoint", "out/checkpoint-1", model=model_dir
    )
    assert "holds no checkpoint" in error_of("--resume_from_checkpoint", "true", model=model_dir)
    datasets.Dataset.from_list([{"question": "a", "answer": "b"}]).to_json("columns.jsonl")
    assert "['answer', 'question']" in error_of(model=model_dir, data="columns.jsonl")

    Path("out").mkdir()
    Path("out/model.safetensors").touch()
    assert "already holds the results of another run" in error_of(model=model_dir)

    with monkeypatch.context() as patch:
        patch.setattr("trl_ift.checks.find_spec", lambda name: None)
        assert 'pip install "trl-ift[quantization]"' in error_of("--load_in_4bit", model=model_dir)

    monkeypatch.setenv("TRL_IFT_DEBUG", "1")
    assert _run("--output_dir", "out", model=model_dir) == 1
    assert "Traceback" in capsys.readouterr().err


def test_script_refuses_unknown_options(model_dir, data_file, capsys):
    Path("typo.yaml").write_text("lerning_rate: 1")
    for argv in (["--lerning_rate", "1"], ["--num_processes", "2"], ["--config", "typo.yaml"]):
        with pytest.raises(SystemExit) as stop:
            _run(*argv, model=model_dir)
        assert stop.value.code == 2
        assert "unknown option --" in capsys.readouterr().err


def test_script_needs_a_method(capsys):
    for argv in ([], ["--seed", "1"]):
        with pytest.raises(SystemExit) as stop:
            script.run(argv)
        assert stop.value.code == 2
        assert "the method comes first: train.py METHOD" in capsys.readouterr().err
    assert script.run(["itf"]) == 1
    assert "Known methods: ift" in capsys.readouterr().err


def test_script_falls_back_to_the_cpu_and_says_so(model_dir, data_file, capsys, monkeypatch):
    def parsed(*argv):
        return script.parse(get_method("ift"), ["--output_dir", "out", *argv], "trl-ift ift")[1]

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    args = parsed()
    assert (args.use_cpu, args.bf16) == (True, False)
    assert "Training on the CPU in float32 (no accelerator found" in capsys.readouterr().out
    args = parsed("--bf16", "true")
    assert (args.use_cpu, args.bf16) == (True, True)
    assert "in bfloat16" in capsys.readouterr().out
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert parsed().use_cpu
    assert "as asked for" in capsys.readouterr().out


def test_interrupted_and_failed_training(model_dir, data_file, capsys, monkeypatch):
    def interrupt(trainer, dataset_name):
        raise KeyboardInterrupt

    def fail(trainer, dataset_name):
        raise ValueError("a defect")

    monkeypatch.setattr(script, "train", interrupt)
    assert _run("--output_dir", "out", model=model_dir) == 130
    assert "Interrupted before the first checkpoint" in capsys.readouterr().err
    monkeypatch.setattr(script, "train", fail)
    with pytest.raises(ValueError, match="a defect"):  # the traceback of a defect is kept
        _run("--output_dir", "out", model=model_dir)


def test_qlora_and_resuming_in_the_script(model_dir, data_file):
    pytest.importorskip("bitsandbytes")
    qlora = ["--load_in_4bit", "--use_peft", "--lora_target_modules", "all-linear", "--save_steps", "1"]
    assert _run("--output_dir", "out", "--max_steps", "1", *qlora, model=model_dir) == 0
    assert Path("out/adapter_model.safetensors").is_file()
    assert "data.jsonl" in Path("out/README.md").read_text()
    resumed = ["--max_steps", "2", "--resume_from_checkpoint", "true"]
    assert _run("--output_dir", "out", *resumed, *qlora, model=model_dir) == 0
    state = json.loads(Path("out/checkpoint-2/trainer_state.json").read_text())
    assert state["global_step"] == 2


# ---------------------------------------------------------------- the launcher, for real


@pytest.mark.slow
def test_yaml_run_equals_the_run_in_python(model_dir, data_file, capfd):
    shared = {
        "max_steps": 3,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_steps": 3,
        "report_to": "none",
        "ift_lambda": 0.3,
        "seed": 5,
    }
    peft = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"]}
    data = {"dataset_name": data_file, "dataset_test_split": "train"}
    config = {**shared, **peft, **data, "model_name_or_path": model_dir, "mixed_precision": "no"}
    Path("run.yaml").write_text(yaml.safe_dump(config))
    assert main(["ift", "--config", "run.yaml", "--output_dir", "cli", "--num_processes", "1"]) == 0
    output = capfd.readouterr()
    assert "Training on the CPU" in output.out or torch.accelerator.is_available()
    assert "Model saved to cli." in output.out

    from peft import LoraConfig

    set_seed(5)
    dataset = datasets.load_dataset("json", data_files=data_file, split="train")
    on_cpu = not torch.accelerator.is_available()
    trainer = IFTTrainer(
        model=model_dir,
        args=IFTConfig("python", use_cpu=on_cpu, bf16=not on_cpu, **shared),
        train_dataset=dataset,
        eval_dataset=dataset,
        peft_config=LoraConfig(r=4, lora_alpha=32, lora_dropout=0.05, target_modules=["q_proj", "v_proj"]),
    )
    trainer.train()

    losses = []
    for folder in ("cli", "python"):
        log = json.loads(Path(folder, "checkpoint-3", "trainer_state.json").read_text())["log_history"]
        losses.append([entry.get("loss", entry.get("eval_loss")) for entry in log])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
    assert losses[0][2] < losses[0][0]


@pytest.mark.slow
def test_launcher_passes_on_the_error_and_its_code(data_file, capfd):
    assert main(["ift", "--model_name_or_path", "./nowhere", "--dataset_name", data_file]) == 1
    output = capfd.readouterr()
    assert "trl-ift ift: error: " in output.err
    assert "nowhere" in output.err
    assert "Traceback" not in output.err
    assert "CalledProcessError" not in output.err


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs process groups")
def test_ctrl_c_says_how_to_continue(model_dir, data_file):
    argv = ["ift", "--model_name_or_path", model_dir, "--dataset_name", data_file, "--output_dir", "out"]
    argv += ["--max_steps", "1000000", "--save_steps", "5", "--save_total_limit", "2", "--report_to", "none"]
    process = subprocess.Popen(
        [sys.executable, "-m", "trl_ift.cli", *argv], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 120
        while not list(Path("out").glob("checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert "run the same command with `--resume_from_checkpoint out/checkpoint-" in error
    assert "Traceback" not in error
