"""Gradient checkpointing, chosen by the memory: both decisions, the bound that they rest on, and who is asked."""

import pytest
import tiny
import torch
from pairs import make
from peft import LoraConfig, get_peft_model
from transformers import Gemma3nTextConfig, MambaConfig

from trl_ift import (
    IFTConfig,
    IFTTrainer,
    PreferenceConfig,
    PreferenceTrainer,
    TPOConfig,
    TPOTrainer,
    UFTConfig,
    UFTTrainer,
    memory,
)
from trl_ift.inspection import inspect_training
from trl_ift.scripts import check, train
from trl_ift.sequences import sequences_of


def labelled():
    rows = tiny.prompt_completion_data()
    return rows.add_column("label", [index % 3 != 0 for index in range(len(rows))])


KINDS = {
    "pairs": (PreferenceTrainer, PreferenceConfig, tiny.preference_data, {"precompute_ref_log_probs": True}),
    "triples": (TPOTrainer, TPOConfig, tiny.triple_data, {}),
    "texts": (IFTTrainer, IFTConfig, tiny.text_data, {}),
    "single responses": (UFTTrainer, UFTConfig, labelled, {"precompute_ref_log_probs": True}),
}


def trainer_of(kind, tmp_path, tokenizer, **options):
    trainer_class, config_class, rows, own = KINDS[kind]
    settings = own | {"gradient_checkpointing": True, "max_length": 100} | options
    rows = settings.pop("rows", rows())
    return make(trainer_class, config_class, tmp_path, tiny.model("llama", tokenizer), rows, tokenizer, **settings)


@pytest.mark.parametrize("length", [24, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_no_batch_is_larger(kind, length, tmp_path, tokenizer):
    """And the bound is met, but for branches, whose lengths are not looked at."""
    trainer = trainer_of(kind, tmp_path, tokenizer, max_length=length)
    bound = memory.largest_batch(trainer)
    rows, widths = 0, []
    for batch in trainer.get_train_dataloader():
        together = [value for name, value in batch.items() if name.endswith("input_ids")]
        rows = max(rows, sum(map(len, together)))
        widths += [len(sequence.ids) for row in sequences_of(dict(batch)) for sequence in row]
    assert bound.rows == rows
    assert bound.length == length if kind == "triples" else bound.length == max(widths)
    assert bound.labelled == bound.rows * bound.length


def test_no_bound_without_lengths(tmp_path, tokenizer):
    stream = tiny.preference_data().to_iterable_dataset()
    options = {"rows": stream, "precompute_ref_log_probs": False}
    trainer = trainer_of("pairs", tmp_path, tokenizer, max_length=None, **options)
    assert memory.largest_batch(trainer) is None
    assert "is on, as in TRL: there is no `max_length`" in memory.choose_checkpointing(trainer)
    assert trainer.args.gradient_checkpointing
    assert memory.largest_batch(trainer_of("pairs", tmp_path, tokenizer, **options)) == memory.Batch(8, 100, 800)


@pytest.mark.parametrize("plenty", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_both_decisions(kind, plenty, tmp_path, tokenizer, monkeypatch):
    """With twice the estimate free, and with one byte less; the training does what was chosen."""
    trainer = trainer_of(kind, tmp_path, tokenizer, max_steps=1)
    needed = memory.fits_without_checkpointing(trainer.model, trainer.args, memory.largest_batch(trainer), 0)[1]
    assert trainer.args.gradient_checkpointing
    asked = []
    free = 2 * needed if plenty else 2 * needed - 1
    monkeypatch.setattr(memory, "free_memory", lambda device: (asked.append(device.type), free)[1])
    told = memory.choose_checkpointing(trainer)
    assert asked == ["cpu"]
    assert told.startswith(f"Gradient checkpointing is {'off' if plenty else 'on'}: ")
    trainer.train()
    assert trainer.model.is_gradient_checkpointing is not plenty


def test_what_is_needed_is_beside_the_weights(tmp_path, tokenizer):
    trainer = trainer_of("pairs", tmp_path, tokenizer, gradient_checkpointing=False)
    batch = memory.largest_batch(trainer)
    estimate = memory.estimate_memory(trainer.model, trainer.args, batch)
    _, needed = memory.fits_without_checkpointing(trainer.model, trainer.args, batch, 0)
    assert (
        needed
        == estimate.total - estimate.weights
        == sum((estimate.gradients, estimate.optimizer, estimate.activations, estimate.head))
    )


@pytest.mark.parametrize("peft", [False, True])
def test_memory_of_quantized_weights(peft, tokenizer):
    """Of a model on "meta": linear layers in 4 bits, embeddings and head as they are, which alone are cast."""
    with torch.device("meta"):
        model = tiny.model("llama", tokenizer, tie_word_embeddings=False)
    if peft:
        model = get_peft_model(model.requires_grad_(False), LoraConfig(r=2, target_modules="all-linear"))
    args = PreferenceConfig("run", bf16=True, use_cpu=True)
    ends = 2 * model.get_input_embeddings().weight.numel()
    base = {name: p for name, p in model.named_parameters() if "lora_" not in name}
    linear = sum(p.numel() for p in base.values() if p.dim() == 2) - ends
    norms = sum(p.numel() for p in base.values() if p.dim() == 1)
    adapter = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    found = memory.estimate_resident(model, args, quantized_bits=4)
    assert found.weights == pytest.approx(0.5625 * linear + (4 + 2) * ends + 4 * norms + 2 * 0, rel=1e-3)
    assert found.adapter == 4 * adapter
    batch = memory.Batch(2, 8, 8)
    whole = memory.estimate_memory(model, args, batch, quantized_bits=4)
    changes = [change for change, _ in memory.savings(model, args, batch, False, whole, 4)]
    assert not any("load_in_4bit" in change for change in changes)
    assert any("load_in_4bit" in change for change, _ in memory.savings(model, args, batch, False, whole)) == peft


@pytest.mark.parametrize("config", [MambaConfig(), Gemma3nTextConfig()], ids=["names", "lists"])
def test_other_shapes(config, tmp_path, tokenizer, monkeypatch):
    """Architectures whose configs have other names, or lists, are no errors."""
    trainer = trainer_of("texts", tmp_path, tokenizer)
    monkeypatch.setattr(trainer.model, "config", config)
    config._attn_implementation = "sdpa"
    told = memory.choose_checkpointing(trainer)
    if isinstance(config, MambaConfig):
        assert "the memory of this model cannot be estimated ('MambaConfig'" in told
        assert trainer.args.gradient_checkpointing
    else:
        assert "GiB" in told


def test_free_memory(monkeypatch):
    assert memory.free_memory(torch.device("cpu")) > 0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 80))
    assert memory.free_memory(torch.device("cuda")) == 7
    assert memory.free_memory(torch.device("meta")) is None


@pytest.mark.parametrize(
    ("option", "told", "checkpointing"),
    [
        ([], "is off: ", False),
        (["--gradient_checkpointing", "true"], "", True),
        pytest.param(["--activation_checkpointing"], "", True, marks=tiny.needs_activation_checkpointing),
        (["--no_gradient_checkpointing"], "", False),
        (["--config"], "", True),
    ],
)
def test_the_command_asks_unless_it_is_told(option, told, checkpointing, tmp_path, model_dir, monkeypatch, capsys):
    file = tmp_path / "pairs.jsonl"
    tiny.preference_data().to_json(str(file))
    if option == ["--config"]:
        option = ["--config", str(tmp_path / "train.yaml")]
        (tmp_path / "train.yaml").write_text("gradient_checkpointing: true\n")
    found = []
    monkeypatch.setattr(train, "train", lambda trainer, name: found.append(trainer.args.gradient_checkpointing))
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**40)
    argv = ["dpo", *option, "--model_name_or_path", model_dir, "--dataset_name", str(file), "--report_to", "none"]
    assert train.run([*argv, "--output_dir", str(tmp_path / "run"), "--max_length", "64"]) == 0
    printed = capsys.readouterr().out
    assert (f"Gradient checkpointing {told}" in printed) if told else "Gradient checkpointing" not in printed
    assert found == [checkpointing]


def test_check_says_what_would_be_chosen(tmp_path, model_dir, monkeypatch):
    arguments = {"model": model_dir, "train_dataset": tiny.preference_data()}
    options = {"use_cpu": True, "bf16": False, "report_to": "none"}
    for free, line in ((2**40, "keeps it off"), (0, "keeps it on")):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        args = PreferenceConfig(str(tmp_path), gradient_checkpointing=True, **options)
        found = inspect_training(PreferenceTrainer, args=args, **arguments)
        assert line in check.rendered(found.to_dict())
    args = PreferenceConfig(str(tmp_path), gradient_checkpointing=False, **options)
    kept = inspect_training(PreferenceTrainer, args=args, **arguments)
    assert kept.memory["without_checkpointing"] is None
    assert found.memory["without_checkpointing"] == {"total": kept.memory["total"], "fits": False}
