"""The model card, and pushes to a Hub that runs on the loopback interface.

Run as a script (`python tests/test_hub.py FOLDER`) this file does the training and the pushes that the tests look at: the
address of the Hub is read when huggingface_hub is imported, so it takes a process of its own.
"""

import ast
import itertools
import json
import os
import re
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
from hub_server import HubServer
from huggingface_hub import EvalResult, HfApi, ModelCard
from peft import LoraConfig, PromptTuningConfig
from transformers import BitsAndBytesConfig

from trl_ift import IFTConfig, IFTTrainer, extension
from trl_ift.extension import _quantization_summary, adapter_summary
from trl_ift.hub.card import build_model_card, check_model_card, library_versions


TOKEN = "hf_" + "testTOKEN" * 4
MINIMAL: dict[str, Any] = {
    "model_name": "tiny-ift",
    "method": "Intuitive Fine-Tuning",
    "trainer_name": "IFTTrainer",
    "method_parameters": {"ift_lambda": 0.2},
    "training_parameters": {"learning_rate": 2e-5, "max_length": None},
    "versions": library_versions(),
}
ACCURACY = EvalResult("text-generation", "chain-sum", "chain_sum", "exact_match", 0.421875, metric_name="accuracy")


def python_block(card: ModelCard) -> str:
    """The code of the card's quick start."""
    return re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]


# ---------------------------------------------------------------- the card


@pytest.mark.parametrize(
    ("peft", "base", "hub_model_id", "datasets", "results", "chat"),
    list(
        itertools.product(
            [False, True],
            [{"base_model": "org/base"}, {"base_model_label": "/home/me/models/tiny-base/"}, {}],
            [None, "user/tiny-ift"],
            [None, ["org/data", "my rows"]],
            [[], [ACCURACY]],
            [False, True],
        )
    ),
)
def test_every_card_is_valid_and_survives_a_file(peft, base, hub_model_id, datasets, results, chat, tmp_path):
    card = build_model_card(
        **MINIMAL,
        **base,
        peft=peft,
        hub_model_id=hub_model_id,
        dataset_names=datasets,
        eval_results=results,
        chat=chat,
        tags=["ift"],
        license="apache-2.0",
    )
    assert check_model_card(card) == []
    card.save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")
    assert str(loaded) == str(card)
    assert loaded.data.to_dict() == card.data.to_dict()
    ast.parse(python_block(card))
    assert "\n\n\n" not in card.text


def test_metadata_of_an_adapter():
    card = build_model_card(
        **MINIMAL,
        base_model="org/base",
        peft=True,
        hub_model_id="user/tiny-ift",
        dataset_names=["org/data", "my rows", "train/rows.jsonl"],
        tags=["ift", "trl", "lora"],
        eval_results=[ACCURACY],
    )
    model_index = [
        {
            "name": "tiny-ift",
            "results": [
                {
                    "task": {"type": "text-generation"},
                    "dataset": {"name": "chain_sum", "type": "chain-sum"},
                    "metrics": [{"type": "exact_match", "value": 0.421875, "name": "accuracy"}],
                }
            ],
        }
    ]
    assert card.data.to_dict() == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "datasets": ["org/data"],
        "tags": ["trl", "trl-ift", "ift", "lora", "generated_from_trainer"],
        "model-index": model_index,
    }


def test_text_of_an_adapter():
    card = build_model_card(
        **MINIMAL,
        base_model="org/base",
        peft=True,
        peft_summary="LoRA, rank 8",
        quantization="4-bit NF4",
        hub_model_id="user/tiny-ift",
        dataset_names="org/data",
        paper_title="Intuitive Fine-Tuning: a title",
        paper_id="2405.11870",
        citation="@article{hua2024ift, title={{IFT}}}\n",
        eval_results=[ACCURACY],
        wandb_url="https://wandb.ai/me/run",
    )
    for expected in (
        "PEFT adapter for [org/base](https://huggingface.co/org/base)",
        "on the [org/data](https://huggingface.co/datasets/org/data) dataset.",
        'AutoPeftModelForCausalLM.from_pretrained("user/tiny-ift"',
        "[Intuitive Fine-Tuning: a title](https://huggingface.co/papers/2405.11870)",
        "Adapter: LoRA, rank 8.",
        "Quantization of the base model during training: 4-bit NF4.",
        "| `ift_lambda` | `0.2` |",
        "| `max_length` | `None` |",
        "| chain_sum |  | accuracy | 0.421875 |",
        f"- PyTorch: {MINIMAL['versions']['PyTorch']}\n",
        "Cite Intuitive Fine-Tuning as:\n\n```bibtex\n@article{hua2024ift, title={{IFT}}}\n```",
        "Cite TRL as:\n\n```bibtex\n@software{vonwerra2020trl,\n  title   = {{TRL: Transformers",
        "(https://wandb.ai/me/run)",
    ):
        assert expected in card.text


def test_a_local_base_model_is_named_without_its_path():
    card = build_model_card(**MINIMAL, base_model_label="/home/me/models/tiny-base", peft=True)
    assert "PEFT adapter for `tiny-base` (a local model)" in card.text
    assert 'AutoModelForCausalLM.from_pretrained("path/to/tiny-base"' in card.text
    assert 'PeftModel.from_pretrained(base_model, "path/to/tiny-ift")' in card.text
    assert "/home" not in str(card)
    assert card.data.get("base_model") is None
    with pytest.raises(ValueError, match="is not a Hub id"):
        build_model_card(**MINIMAL, base_model="/home/me/models/tiny-base")


def test_paths_and_tokens_in_parameters_are_not_printed():
    parameters = {
        "file": "/home/me/data/rows.jsonl",
        "home": "~/data/rows.jsonl",
        "nested": {"folder": ["/home/me/data/"]},
        "windows": r"C:\Users\me\rows.jsonl",
        "token": TOKEN,
        "address": "https://huggingface.co/org/data",
        "remote": "s3://bucket/some/rows",
        "pipe": "a|b",
    }
    card = build_model_card(**MINIMAL | {"training_parameters": parameters}, dataset_names="/home/me/data/rows.jsonl")
    rows = dict(re.findall(r"\| `(\w+)` \| `(.*)` \|", card.text))
    assert rows == {
        "ift_lambda": "0.2",
        "file": "rows.jsonl",
        "home": "rows.jsonl",
        "nested": "{'folder': ['data']}",
        "windows": "rows.jsonl",
        "token": "hf_***",
        "address": "https://huggingface.co/org/data",
        "remote": "s3://bucket/some/rows",
        "pipe": r"a\|b",
    }
    assert "on the `rows.jsonl` dataset" in card.text
    assert card.data.get("datasets") is None
    assert check_model_card(card) == []


def test_a_result_that_is_not_finite_is_printed_but_not_indexed():
    nan = EvalResult("text-generation", "chain-sum", "chain_sum", "loss", float("nan"))
    card = build_model_card(**MINIMAL, eval_results=[ACCURACY, nan])
    assert "| chain_sum |  | loss | nan |" in card.text
    assert [r.metric_type for r in card.data.eval_results] == ["exact_match"]
    assert check_model_card(card) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("base_model: org/base", "base_model: None", "base_model 'None' is not a Hub id"),
        ("base_model: org/base\n", "", "base_model_relation is 'adapter'"),
        ("license: mit", "licence: license", "`licence` does not exist"),
        ("- trl\n", "", "tags must begin with 'trl', 'trl-ift'"),
        ("- ift\n", "- 1\n", "tags must be a list of strings"),
        ("- org/data", "- some/where/else", "datasets must be a list of Hub ids"),
        ("library_name: peft", "library_name: ''", "library_name is ''"),
        ("pipeline_tag: text-generation", "pipeline_tag: chat", "pipeline_tag is 'chat'"),
        ("value: 0.421875", "value: .nan", "model-index holds the value nan"),
        ("value: 0.421875", "value: null", "the metadata cannot be parsed: Invalid `model_index`"),
        ("/org/base)", "/None)", "link to None"),
        ("(https://huggingface.co/org/base)", "(org/base)", "link with an invalid address"),
        ("`0.2`", "`/tmp/run/out`", "absolute path of the machine: /tmp/run/out"),
        ("`0.2`", TOKEN, "looks like an access token: hf_tes..."),
    ],
)
def test_the_check_finds(old, new, problem):
    card = build_model_card(
        **MINIMAL,
        base_model="org/base",
        peft=True,
        tags=["ift"],
        license="mit",
        dataset_names="org/data",
        eval_results=[ACCURACY],
    )
    text = str(card)
    assert old in text
    problems = check_model_card(ModelCard(text.replace(old, new, 1)))
    assert any(problem in found for found in problems)
    assert not any(TOKEN in found for found in problems)


def test_the_check_finds_metadata_that_cannot_be_parsed():
    card = build_model_card(**MINIMAL)
    card.data["model-index"] = [{"results": []}]
    assert any("the metadata cannot be parsed" in problem for problem in check_model_card(card))


@pytest.mark.parametrize("hub_base_model", [None, "org/tiny-llama"])
@pytest.mark.parametrize("peft", [False, True])
def test_every_saved_folder_is_safe_to_share(peft, hub_base_model, model_dir, tmp_path):
    from peft import LoraConfig

    from trl_ift import IFTConfig, IFTTrainer

    args = IFTConfig(
        str(tmp_path / "run"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_steps=1,
        save_steps=1,
        hub_token=TOKEN,
        hub_base_model=hub_base_model,
    )
    peft_config = LoraConfig(r=2, target_modules="all-linear") if peft else None
    trainer = IFTTrainer(model_dir, args, train_dataset=tiny.conversational_data(), peft_config=peft_config)
    trainer.train()
    trainer.save_model()  # PEFT writes a card of its own here
    trainer.save_model(tmp_path / "elsewhere")
    assert args.hub_token == TOKEN

    folders = (tmp_path / "run", tmp_path / "run" / "checkpoint-1", tmp_path / "elsewhere")
    for folder in folders:
        assert not (folder / "training_args.bin").exists()  # holds `hub_token` in clear
        if peft:
            config = json.loads((folder / "adapter_config.json").read_text())
            assert config["base_model_name_or_path"] == (hub_base_model or model_dir)
    cards = [ModelCard.load(path) for path in tmp_path.rglob("README.md")]
    assert {path.parent for path in tmp_path.rglob("README.md")} >= {folders[0], folders[2]}
    for card in cards:
        assert check_model_card(card) == []
        assert card.data.to_dict()["library_name"] == ("peft" if peft else "transformers")
        assert card.data.base_model == hub_base_model
        base = (
            "[org/tiny-llama](https://huggingface.co/org/tiny-llama)"
            if hub_base_model
            else "`tiny-llama` (a local model)"
        )
        assert base in card.text
    assert not any(TOKEN.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


# ---------------------------------------------------------------- pushes


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), "LORA, rank 4, alpha 8, on all-linear"),
        (
            LoraConfig(r=4, lora_alpha=8, target_modules=["a.q_proj", "b.q_proj"], modules_to_save=["lm_head"]),
            "LORA, rank 4, alpha 8, on q_proj, and trained whole: lm_head",
        ),
        (PromptTuningConfig(num_virtual_tokens=4), "PROMPT_TUNING"),
    ],
    ids=["pattern", "names", "prompt"],
)
def test_adapters_in_a_few_words(config, expected):
    assert adapter_summary(config) == expected


def test_quantizations_in_a_few_words():
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    assert _quantization_summary(four) == "bitsandbytes 4-bit nf4, double quantization"
    assert _quantization_summary(BitsAndBytesConfig(load_in_8bit=True)) == "bitsandbytes 8-bit"
    assert _quantization_summary({"quant_method": "gptq", "bits": 4}) == "gptq"


class Uploads:
    """In the place of a Hub: what was uploaded, by a job that is `busy` or has failed with `error`."""

    def __init__(self, busy=False, error=None):
        self.calls, self.busy, self.error = [], busy, error

    def upload_folder(self, **options):
        self.calls.append((Path(options["folder_path"]).name, options.get("path_in_repo")))
        return self

    def done(self):
        return not self.busy

    def exception(self):
        return self.error


@pytest.fixture
def pushing(tmp_path, model_dir, monkeypatch):
    """A trainer that pushes checkpoints: a function of its strategy and the uploads."""

    def make(strategy, uploads, **settings):
        args = IFTConfig(
            str(tmp_path / "run"), use_cpu=True, bf16=False, report_to="none", hub_strategy=strategy, **settings
        )
        trainer = IFTTrainer(model_dir, args, train_dataset=tiny.text_data())
        trainer.hub_model_id, trainer.push_in_progress = "user/model", None  # as `push_to_hub=True` sets them
        monkeypatch.setattr(extension, "HfApi", lambda: uploads)
        (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
        trainer._push_from_checkpoint(str(tmp_path / "run" / "checkpoint-2"))
        return trainer

    return make


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("end", []),
        ("every_save", [("run", None)]),
        ("checkpoint", [("run", None), ("checkpoint-2", "last-checkpoint")]),
        ("all_checkpoints", [("run", None), ("checkpoint-2", "checkpoint-2")]),
    ],
)
def test_strategies_of_pushing(strategy, expected, pushing):
    uploads = Uploads()
    pushing(strategy, uploads)
    assert uploads.calls == expected


@pytest.mark.parametrize("always", [False, True])
def test_a_push_while_another_runs(always, pushing):
    uploads = Uploads(busy=True)
    trainer = pushing("every_save", uploads, hub_always_push=always)
    trainer.push_in_progress.wait_until_done = lambda: None
    trainer._push_from_checkpoint(str(Path(trainer.args.output_dir) / "checkpoint-2"))
    assert len(uploads.calls) == 1 + always


def test_a_push_that_fails_is_reported(pushing, caplog):
    trainer = pushing("every_save", Uploads(error=OSError("the disk of the Hub is full")))
    with caplog.at_level("WARNING"):
        trainer._finish_current_push()
    assert "A push to the Hub during training failed: the disk of the Hub is full" in caplog.text
    assert trainer.push_in_progress is None


class Pushed(NamedTuple):
    """What the training process left behind."""

    hub: HubServer
    folder: Path
    output: str


def train_and_push(folder: Path) -> None:
    """Train an adapter and a full model, push both, then run the code of the cards as the Hub shows it."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file
    from transformers.utils import logging

    logging.set_verbosity_info()
    token = os.environ["TEST_HUB_TOKEN"]
    tokenizer = tiny.tokenizer()
    base = folder / "tiny-base"
    tiny.model("llama", tokenizer).save_pretrained(base)
    tokenizer.save_pretrained(base)
    common = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "learning_rate": 0.01,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "push_to_hub": True,
        "hub_token": token,
    }

    adapter_args = IFTConfig(
        str(folder / "out" / "adapter"),
        save_steps=2,
        hub_model_id="user/tiny-ift",
        hub_base_model="org/tiny-base",
        hub_strategy="every_save",
        **common,
    )
    trainer = IFTTrainer(
        str(base),
        adapter_args,
        train_dataset=tiny.conversational_data(),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )
    trainer.train()
    trainer.push_to_hub(dataset_name="org/tiny-data")
    save_file(get_peft_model_state_dict(trainer.model), folder / "adapter.safetensors")

    full_args = IFTConfig(str(folder / "out" / "full"), save_strategy="no", hub_model_id="user/tiny-full", **common)
    trainer = IFTTrainer(str(base), full_args, train_dataset=tiny.conversational_data())
    trainer.train()
    trainer.push_to_hub()
    save_file(trainer.model.state_dict(), folder / "full.safetensors")

    api = HfApi(token=token)
    api.create_repo("org/tiny-base")
    api.upload_folder(repo_id="org/tiny-base", folder_path=base)
    for repo in ("user/tiny-ift", "user/tiny-full"):
        print(f"Running the code of {repo}")
        exec(python_block(ModelCard.load(repo)), {})


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pushed")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    with HubServer(TOKEN) as hub:
        environment |= {
            "TEST_HUB_TOKEN": TOKEN,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(folder / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        command = [sys.executable, __file__, str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-5000:]
        yield Pushed(hub, folder, done.stdout + done.stderr)


def test_the_push_authenticates(pushed):
    writes = [(path, with_token) for method, path, with_token in pushed.hub.requests if method == "POST"]
    assert writes
    assert all(with_token for _, with_token in writes)


def test_only_the_model_and_its_tokenizer_arrive(pushed):
    tokenizer_files = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    adapter_files = {"adapter_config.json", "adapter_model.safetensors"}
    assert set(pushed.hub.files("user/tiny-ift")) == {"README.md"} | tokenizer_files | adapter_files
    model_files = {"config.json", "generation_config.json", "model.safetensors"}
    assert set(pushed.hub.files("user/tiny-full")) == {"README.md"} | tokenizer_files | model_files


def test_weights_arrive_as_trained(pushed):
    import torch
    from safetensors.torch import load, load_file

    for repo, name, expected in (
        ("user/tiny-ift", "adapter_model.safetensors", "adapter.safetensors"),
        ("user/tiny-full", "model.safetensors", "full.safetensors"),
    ):
        arrived = load(pushed.hub.files(repo)[name])
        trained = load_file(pushed.folder / expected)
        assert set(arrived) == set(trained)
        assert all(torch.equal(arrived[key], trained[key]) for key in trained)


def test_a_push_at_every_save(pushed):
    first, *_, last = [commit for commit in pushed.hub.commits if commit.repo == "user/tiny-ift"]
    assert first.message == "Training in progress, step 2"
    assert set(first.files) == set(pushed.hub.files("user/tiny-ift"))
    assert last.message == "End of training"
    trained = pushed.hub.files("user/tiny-ift")["adapter_model.safetensors"]
    assert first.files["adapter_model.safetensors"] != trained
    assert check_model_card(ModelCard(first.files["README.md"].decode())) == []


def test_cards_of_the_pushed_models(pushed):
    adapter, full = (
        ModelCard(pushed.hub.files(f"user/tiny-{kind}")["README.md"].decode()) for kind in ("ift", "full")
    )
    assert check_model_card(adapter) == []
    assert check_model_card(full) == []
    assert adapter.data.base_model == "org/tiny-base"
    assert adapter.data.base_model_relation == "adapter"
    assert adapter.data.to_dict()["library_name"] == "peft"
    assert adapter.data.tags[:3] == ["trl", "trl-ift", "ift"]
    assert adapter.data.datasets == ["org/tiny-data"]
    assert "| `ift_lambda` |" in adapter.text
    assert "| `learning_rate` | `0.01` |" in adapter.text
    assert "https://huggingface.co/papers/2405.11870" in adapter.text
    assert full.data.base_model is None
    assert full.data.to_dict()["library_name"] == "transformers"
    assert full.data.datasets is None
    assert "`tiny-base` (a local model)" in full.text


def test_the_code_of_the_cards_runs(pushed):
    answers = pushed.output.partition("Running the code of user/tiny-ift\n")[2]
    assert "Running the code of user/tiny-full\n" in answers


def test_nothing_pushed_or_saved_holds_a_secret(pushed):
    for repo in pushed.hub.repos:
        for name, content in pushed.hub.files(repo).items():
            assert TOKEN.encode() not in content, f"token in {repo}/{name}"
            assert str(pushed.folder).encode() not in content, f"path of the machine in {repo}/{name}"
            assert not name.endswith((".bin", ".pt", ".pth", ".pkl")), f"pickle {repo}/{name}"
    for path in pushed.folder.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), f"token in {path}"
    assert TOKEN not in pushed.output


def test_the_hub_refuses_a_wrong_token():
    with HubServer(TOKEN) as hub:
        connection = HTTPConnection(hub.url.removeprefix("http://"), timeout=10)
        connection.request("POST", "/api/repos/create", '{"name": "tiny"}', {"Authorization": "Bearer hf_wrong"})
        assert connection.getresponse().status == 401
    assert hub.repos == {}


if __name__ == "__main__":
    train_and_push(Path(sys.argv[1]))
