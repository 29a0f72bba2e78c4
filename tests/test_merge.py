"""`trl-ift merge`, in folders and against a Hub on the loopback interface.

Run as a script (`python tests/test_merge.py FOLDER`) this file pushes an adapter and its base, merges them from there, and
pushes the result: the address of the Hub is read when huggingface_hub is imported, so it takes a process of its own.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from hub_server import HubServer
from huggingface_hub import HfApi, ModelCard
from pairs import make
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from trl_ift import DPOPConfig, DPOPTrainer, EurusRewardConfig, EurusRewardTrainer, cli
from trl_ift.hub import merge
from trl_ift.hub.card import check_model_card
from trl_ift.hub.merge import merge_adapter


TOKEN = "hf_" + "testTOKEN" * 4
IDS = torch.arange(20, 40).view(2, 10)
LORA = LoraConfig(r=2, target_modules=["q_proj", "up_proj"])


def train(tmp_path, model, tokenizer, **settings):
    """A folder with an adapter and its card, as a training leaves it."""
    settings = {"peft_config": LORA, **settings}
    trainer = make(DPOPTrainer, DPOPConfig, tmp_path, model, tiny.preference_data(), tokenizer, **settings)
    trainer.train()
    trainer.save_model()
    return tmp_path / "run"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, model_dir, tokenizer):
    return train(tmp_path_factory.mktemp("adapter"), model_dir, tokenizer)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def with_adapter(base, adapter, auto=AutoModelForCausalLM, **options):
    """What the merged model must compute."""
    return PeftModel.from_pretrained(auto.from_pretrained(base, dtype=torch.float32, **options), adapter)


def noisy(folder, base, config, card):
    """An adapter with weights of its own in a folder, with the card of another one."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    shutil.copy(card / "README.md", folder / "README.md")
    return folder


# ---------------------------------------------------------------- what is written


def test_merged_equals_adapter(adapter, model_dir, tmp_path, capsys):
    output = tmp_path / "out" / "merged"
    assert cli.main(["merge", str(adapter), "--output_dir", str(output)]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out == f"Merged model written to {output}.\n"
    assert {path.name for path in output.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    merged = AutoModelForCausalLM.from_pretrained(output)
    assert merged.dtype == torch.float32
    torch.testing.assert_close(logits(merged), logits(with_adapter(model_dir, adapter)), rtol=0, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    assert (logits(merged) - logits(base)).abs().max() > 1e-3
    assert AutoTokenizer.from_pretrained(output).get_vocab() == AutoTokenizer.from_pretrained(model_dir).get_vocab()


def test_card(adapter, tmp_path):
    card = ModelCard.load(merge_adapter(str(adapter), tmp_path / "merged", hub_model_id="user/merged") / "README.md")
    assert check_model_card(card) == []
    assert card.data.tags[:3] == ["trl", "trl-ift", "dpop"]
    assert card.data.to_dict()["library_name"] == "transformers"
    assert "fine-tuned version of `tiny-llama` (a local model), trained with DPO-Positive" in card.text
    assert "What was trained is the adapter `run`" in card.text
    assert "merged into `tiny-llama` (a local model), with weights in float32" in card.text
    assert "Adapter: LORA, rank 2, alpha 8, on q_proj, up_proj." in card.text
    assert 'pipeline("text-generation", model="user/merged"' in card.text
    assert "DPOPTrainer" in card.text
    assert "https://huggingface.co/papers/2402.13228" in card.text


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_dora_and_whole_modules(family, adapter, tokenizer, tmp_path):
    """A head that was trained whole stays another one than the embeddings, though the base ties them."""
    base = tmp_path / "base"
    tiny.model(family, tokenizer).save_pretrained(base)
    tokenizer.save_pretrained(base)
    config = LoraConfig(r=2, use_dora=True, target_modules=["v_proj"], modules_to_save=["lm_head", "norm"])
    folder = noisy(tmp_path / "adapter", base, config, adapter)
    merged = AutoModelForCausalLM.from_pretrained(merge_adapter(str(folder), tmp_path / "merged"))
    torch.testing.assert_close(logits(merged), logits(with_adapter(base, folder)), rtol=0, atol=1e-5)
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)


def test_added_tokens(adapter, tokenizer, model_dir, tmp_path):
    """A tokenizer that grew for the training: the embeddings grow with it."""
    longer = AutoTokenizer.from_pretrained(model_dir)
    longer.add_tokens(["<tool>", "</tool>"])
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    base.resize_token_embeddings(len(longer))
    model = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    )
    model.save_pretrained(tmp_path / "adapter")
    longer.save_pretrained(tmp_path / "adapter")
    shutil.copy(adapter / "README.md", tmp_path / "adapter" / "README.md")
    merged = AutoModelForCausalLM.from_pretrained(merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged"))
    assert merged.lm_head.weight.shape == (len(longer), 16)
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-5)


def test_trained_on_4_bits(model_dir, tokenizer, tmp_path):
    """The adapter is merged into the base in full precision, whose dtype can be chosen."""
    pytest.importorskip("bitsandbytes")
    folder = train(tmp_path, model_dir, tokenizer, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    merged = AutoModelForCausalLM.from_pretrained(merge_adapter(str(folder), tmp_path / "merged"))
    assert not hasattr(merged.config, "quantization_config")
    torch.testing.assert_close(logits(merged), logits(with_adapter(model_dir, folder)), rtol=0, atol=1e-5)

    half = merge_adapter(str(folder), tmp_path / "half", dtype="bfloat16")
    assert {value.dtype for value in load_file(half / "model.safetensors").values()} == {torch.bfloat16}
    assert "with weights in bfloat16" in ModelCard.load(half / "README.md").text


def test_reward_model(model_dir, tokenizer, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    base.config.pad_token_id = None
    base.save_pretrained(tmp_path / "base")
    model_dir = str(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    arguments = (tmp_path, model_dir, tiny.preference_data(), tokenizer)
    trainer = make(EurusRewardTrainer, EurusRewardConfig, *arguments, peft_config=config)
    trainer.train()
    trainer.save_model()
    output = merge_adapter(str(tmp_path / "run"), tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(output)
    torch.testing.assert_close(logits(merged), logits(trainer.model), rtol=0, atol=1e-5)
    assert merged.config.pad_token_id == trainer.model.config.pad_token_id == tokenizer.pad_token_id
    card = ModelCard.load(output / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    assert check_model_card(card) == []


def test_another_base_and_method(adapter, model_dir, tmp_path):
    """An adapter without a card, and a base that has moved."""
    folder, base = tmp_path / "adapter", tmp_path / "base"
    shutil.copytree(model_dir, base)
    shutil.copytree(adapter, folder)
    (folder / "README.md").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/nowhere/base"}))
    output = merge_adapter(str(folder), tmp_path / "merged", base_model=str(base), method="spin")
    expected = logits(with_adapter(model_dir, adapter))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(output)), expected, rtol=0, atol=1e-5)
    assert "trained with Self-Play fIne-tuNing" in ModelCard.load(output / "README.md").text


# ---------------------------------------------------------------- errors


@pytest.fixture
def no_loading(monkeypatch):
    """Errors come before a model is loaded."""
    monkeypatch.setattr(
        merge.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded")
    )


def change_config(**changes):
    def change(folder):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))

    return change


def only_pickled(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def whole_model(folder):
    (folder / "adapter_config.json").rename(folder / "config.json")


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (None, {"adapter": "./none"}, r"The adapter `./none` does not exist"),
        (None, {"adapter": "org/none"}, r"The adapter `org/none` is no folder, and cannot be downloaded"),
        (whole_model, {}, r"holds no PEFT adapter as safetensors: .*found a whole model"),
        (
            only_pickled,
            {},
            r"expected `adapter_config.json` and `adapter_model.safetensors`, found no `adapter_model.saf",
        ),
        (change_config(base_model_name_or_path=None), {}, r"does not name its base model. Name the base model with"),
        (
            change_config(base_model_name_or_path="/nowhere/base"),
            {},
            r"that the adapter names does not exist: `/nowhere",
        ),
        (change_config(base_model_name_or_path="org/none"), {}, r"that the adapter names cannot be loaded"),
        (None, {"base_model": "./base"}, r"The base model does not exist: `./base` is no folder and no Hub id"),
        (None, {"base_model": "empty"}, r"The model folder `empty` has no `config.json`"),
        (None, {"base_model": "quantized"}, r"`quantized` is stored with quantized weights"),
        (lambda folder: (folder / "README.md").unlink(), {}, r"no model card of trl-ift.*Name it with `--method`"),
        (
            lambda folder: (folder / "README.md").write_text("---\ntags: [trl, dpo]\n---\n"),  # of TRL
            {},
            r"no model card of trl-ift",
        ),
        (None, {"method": "dpoo"}, r"Unknown method 'dpoo'"),
        (None, {"dtype": "int8"}, r"`dtype='int8'` is not known"),
        (None, {"hub_model_id": "a/b/c"}, r"`hub_model_id='a/b/c'` is no Hub id"),
        (None, {"output_dir": "quantized"}, r"`output_dir='quantized'` is not empty"),
    ],
)
def test_errors(change, arguments, message, adapter, model_dir, tmp_path, monkeypatch, no_loading):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(adapter, "adapter")
    Path("empty").mkdir()
    Path("quantized").mkdir()
    config = json.loads((Path(model_dir) / "config.json").read_text())
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    Path("quantized/config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    if change is not None:
        change(Path("adapter"))
    with pytest.raises(ValueError, match=message):
        merge_adapter(**{"adapter": "adapter", "output_dir": "merged", **arguments})
    assert not Path("merged").exists()


def test_adapter_that_is_no_change_of_weights(adapter, model_dir, tmp_path, no_loading):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(tiny.model("llama", AutoTokenizer.from_pretrained(model_dir)), config)
    model.save_pretrained(tmp_path / "prompt")
    with pytest.raises(ValueError, match="of the type PROMPT_TUNING cannot be merged"):
        merge_adapter(str(tmp_path / "prompt"), tmp_path / "merged", base_model=model_dir, method="dpo")


@pytest.mark.parametrize("part", ["lora_A", "modules_to_save"])
def test_broken_weights(part, adapter, model_dir, tmp_path):
    """Nothing is written of an adapter with NaNs, in a layer or in a module that was trained whole."""
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    folder = noisy(tmp_path / "adapter", model_dir, config, adapter)
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in weights if (part == "lora_A") == ("lora_A" in name) and "lora_B" not in name)
    weights[name].view(-1)[0] = torch.nan
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="not finite|NaNs detected"):
        merge_adapter(str(folder), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_command_line(adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["merge", str(adapter), "--push_to_hub"]) == 1
    assert "`--push_to_hub` and `--hub_model_id ID` go together" in capsys.readouterr().err
    with pytest.raises(SystemExit) as usage:
        cli.main(["merge", str(adapter), "--dtype", "int8"])
    assert usage.value.code == 2
    with pytest.raises(SystemExit) as usage:
        cli.main(["merge", "--help"])
    assert usage.value.code == 0
    Path("merge.yaml").write_text("dtype: float16\n")
    assert cli.main(["merge", f"{adapter}/", "--config", "merge.yaml"]) == 0
    assert {value.dtype for value in load_file("run-merged/model.safetensors").values()} == {torch.float16}


# ---------------------------------------------------------------- the Hub


def push_and_merge(folder):
    tokenizer = tiny.tokenizer()
    base = folder / "tiny-base"
    tiny.model("llama", tokenizer).save_pretrained(base)
    tokenizer.save_pretrained(base)
    adapter = train(folder, str(base), tokenizer, hub_base_model="org/tiny-base")
    expected = logits(with_adapter(base, adapter))
    api = HfApi()
    for repo, path in (("org/tiny-base", base), ("user/tiny-dpop", adapter)):
        api.create_repo(repo)
        api.upload_folder(repo_id=repo, folder_path=path)
    shutil.rmtree(base)
    shutil.rmtree(adapter)
    arguments = ["--output_dir", str(folder / "merged"), "--push_to_hub", "--hub_model_id", "user/tiny-merged"]
    assert cli.main(["merge", "user/tiny-dpop", *arguments, "--hub_private_repo"]) == 0
    shutil.rmtree(folder / "merged")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained("user/tiny-merged")), expected)


@pytest.mark.slow
def test_hub(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    with HubServer(TOKEN) as hub:
        environment |= {
            "HF_TOKEN": TOKEN,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        command = [sys.executable, __file__, str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-5000:]
    assert hub.repos["user/tiny-merged"] == "private"
    files = hub.files("user/tiny-merged")
    assert set(files) == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    card = ModelCard(files["README.md"].decode())
    assert check_model_card(card) == []
    assert card.data.base_model == "org/tiny-base"
    assert card.data.base_model_relation == "finetune"
    assert "the adapter [user/tiny-dpop](https://huggingface.co/user/tiny-dpop)" in card.text
    assert "merged into [org/tiny-base](https://huggingface.co/org/tiny-base)" in card.text
    for name, content in files.items():
        assert TOKEN.encode() not in content, name
        assert str(tmp_path).encode() not in content, name
    assert TOKEN not in done.stdout + done.stderr
    assert "Pushed to" in done.stdout


if __name__ == "__main__":
    push_and_merge(Path(sys.argv[1]))
