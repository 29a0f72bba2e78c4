"""The examples of README and docs: Python runs as it stands, on a tiny model and dataset under the same names; commands
and YAML files are parsed."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import tiny
import yaml
from datasets import Dataset

from trl_ift import METHODS, cli, get_method
from trl_ift.scripts import check, lobass, train
from trl_ift.study.plan import Study


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


def ultrafeedback() -> Dataset:
    """The columns of `trl-lib/ultrafeedback_binarized`: conversations with an implicit prompt, and scores."""
    rows = [
        {
            side: [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
            for side, text in (("chosen", answer), ("rejected", answer[::-1]))
        }
        for question, answer in tiny.QUESTIONS
    ]
    ratings = [max(1.0, float(i)) for i in range(len(rows))]  # of 1 to 10
    return Dataset.from_list(
        [row | {"score_chosen": 8.0, "score_rejected": rating} for row, rating in zip(rows, ratings, strict=True)]
    )


def triples() -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": question, "reference": f" {answer}", "chosen": f" {answer[:9]}", "rejected": f" {answer[::-1]}"}
            for question, answer in tiny.QUESTIONS
        ]
    )


DATASETS = {
    "trl-lib/tldr": tiny.prompt_completion_data,
    "trl-lib/ultrafeedback_binarized": ultrafeedback,
    "tpo-alignment/triple-preference-ultrafeedback-40K": triples,
    "trl-lib/kto-mix-14k": lambda: tiny.conversational_data().add_column("label", [True, False] * 4),
}


@pytest.mark.parametrize("code", BLOCKS)
def test_example(code, tmp_path, monkeypatch, tokenizer):
    # `from_pretrained` and `load_dataset` look for a local folder of that name first
    model = tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
    tiny.model("llama", tokenizer).save_pretrained(model)
    tokenizer.save_pretrained(model)
    for name, dataset in DATASETS.items():
        data = tmp_path / name
        data.mkdir(parents=True)
        dataset().to_json(data / "train.jsonl")
    monkeypatch.chdir(tmp_path)
    here = 'use_cpu=True, bf16=False, max_steps=2, report_to="none"'
    code, trainings = re.subn(
        r'Config\(output_dir="([\w-]+)"(, push_to_hub=True)?', rf'Config(output_dir="\1", {here}', code
    )
    assert trainings == code.count("trainer.train()") + len(re.findall(r"^self_play\(", code, re.MULTILINE))
    namespace: dict = {}
    exec(code.replace("max_new_tokens=256", "max_new_tokens=8"), namespace)
    if "trainer" in namespace:
        assert namespace["trainer"].state.global_step == 2


def test_every_relative_link_leads_somewhere():
    for page in [
        *PAGES,
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "examples").glob("*.md"),
        *(ROOT / "benchmarks").glob("*.md"),
    ]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


# ---------------------------------------------------------------- commands


def fenced(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """The command lines of a block, each split into words."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def parse_command(words: list[str]) -> None:
    """Parse a command line of `trl-ift` as it would be, but run nothing; `...` stands for options that a page leaves out."""
    is_abridged = "..." in words
    command, *options = [word for word in words[1:] if word != "..."]
    if command == "check":
        method, options = check.split_method(options)
        parse_training(check.make_parser(method), "check.py", [method.name], options)
    elif command == "lobass":
        parse_training(lobass.make_parser(), "lobass.py", [], options)
    elif command in {method.name for method in METHODS}:
        method = get_method(command)
        make_parser = import_module(f"trl_ift.scripts.{method.script.removesuffix('.py')}").make_parser
        parse_training(make_parser(method), method.script, [method.name], options)
    elif command in cli._TOOLS:
        parser = import_module(cli._TOOLS[command][0]).make_parser()
        for action in parser._actions:
            action.required = action.required and not is_abridged
        if "--help" not in options and hasattr(parser, "parse_args_and_config"):
            train.parse_options(parser, options, parser.prog, launched=False)
        elif "--help" not in options:
            parser.parse_args(options)
    else:
        cli._make_parser().parse_args(words[1:])


def parse_training(parser, script: str, leading: list[str], options: list[str]) -> None:
    if "--help" not in options:
        launched = cli._launch_arguments(parser, script, leading, options)
        train.parse_options(parser, launched.training_script_args[len(leading) :], parser.prog)


BASH_PAGES = [
    *(page for page in PAGES if fenced(page, "bash")),
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "benchmarks" / "study" / "README.md",
]


@pytest.mark.parametrize(
    "page", BASH_PAGES, ids=lambda page: page.stem if page.parent.name == "docs" else page.parent.name
)
def test_commands(page, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "")  # put back after a file that sets it
    monkeypatch.chdir(tmp_path)
    for block in fenced(page, "yaml"):
        write_config(block)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in [words for block in fenced(page, "bash") for words in commands(block)]:
        if words[0] == "trl-ift":
            for word in words[2:]:  # a file that the page does not show
                if word.endswith(".yaml") and words[1] != "study" and not Path(word).exists():
                    Path(word).write_text("model_name_or_path: model\n" + "method: dpop\n" * (words[1] == "check"))
            parse_command(words)
        elif words[0] == "make":
            assert words[1] in targets
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file()
        else:
            assert words[0] in ("pip", "uv", "export", "accelerate"), f"who checks {words}?"


def write_config(block: str) -> tuple[Path, list[str]] | None:
    """Write a YAML block under the name in its first line, `# FILE: command`; return the file and the command."""
    if match := re.match(r"# (\S+\.yaml): (trl-ift .*)\n", block):
        path = Path(match[1])
        path.write_text(block)
        return path, shlex.split(match[2])
    return None


YAML_BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(fenced(page, "yaml"))
]


@pytest.mark.parametrize("block", YAML_BLOCKS)
def test_yaml(block, tmp_path, monkeypatch):
    """A file for a command is parsed by that command; one of a study is read as a study."""
    monkeypatch.setenv("WANDB_PROJECT", "")
    monkeypatch.chdir(tmp_path)
    if "starts" in yaml.safe_load(block):
        Path("study.yaml").write_text(block)
        assert Study.load("study.yaml").start_runs()
    else:
        path, words = write_config(block) or pytest.fail("a YAML block begins with `# FILE.yaml: trl-ift COMMAND ...`")
        assert str(path) in words
        parse_command(words)


def test_a_wrong_command_is_found(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for line in (
        "trl-ift dpop --dpop_lamda 5",
        "trl-ift generate --output_dir samples",
        "trl-ift generate ... --shards 3",
        "trl-ift nothing",
        "trl-ift study build study.yaml",
    ):
        with pytest.raises(SystemExit) as exit:
            parse_command(shlex.split(line))
        assert exit.value.code == 2
    Path("a.yaml").write_text("dpop_lamda: 5\n")
    with pytest.raises(SystemExit):
        parse_command(shlex.split("trl-ift dpop --config a.yaml"))
    assert "--dpop_lambda" in capsys.readouterr().err
