"""`trl-ift check` and what it is made of: the report on a training before it starts, without a trace of it."""

import copy
import json
import math
import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import test_methods
import tiny
import torch
import trl
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile

from trl_ift import METHODS, DPOPConfig, DPOPTrainer, IFTTrainer, MinorDPOTrainer, get_method, inspection, memory
from trl_ift.cli import main
from trl_ift.inspection import inspect_training
from trl_ift.memory import Batch, largest_batch, optimizer_bytes
from trl_ift.scripts import check
from trl_ift.scripts.train import parse_options
from trl_ift.sequences import sequences_of


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TRL_IFT_DEBUG", raising=False)


def config_of(method, **settings):
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "per_device_train_batch_size": 4} | settings
    return method.config_class("never-written", **settings)


def arguments_of(method, tokenizer, model=None, data=None, **settings):
    makers = test_methods.DATA.get(method.name, lambda settings: {"train_dataset": tiny.preference_data()})
    model = model or test_methods.MODELS.get(method.name, lambda tokenizer: tiny.model("llama", tokenizer))(tokenizer)
    data = makers(settings) if data is None else {"train_dataset": data}
    return {"model": model, "args": config_of(method, **settings), "processing_class": tokenizer, **data}


def inspect(method, tokenizer, rows=3, load_model=True, peft_config=None, trainer_class=None, **given):
    arguments = arguments_of(method, tokenizer, **given)
    if peft_config is not None:
        arguments["peft_config"] = peft_config
    return inspect_training(trainer_class or method.trainer_class, rows=rows, load_model=load_model, **arguments)


# ---------------------------------------------------------------- every method


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method(method, tokenizer):
    arguments = arguments_of(method, tokenizer, push_to_hub=True, hub_token="hf_" + "x" * 30)
    model, args = arguments["model"], arguments["args"]
    weights, settings = copy.deepcopy(model.state_dict()), args.to_dict()
    found = inspect_training(method.trainer_class, **arguments)
    assert found.errors == []
    assert found.method == method.name
    assert math.isfinite(found.loss["measured"])
    if found.loss["known"] is None:
        assert found.loss["reason"]
    else:
        assert found.loss["measured"] == pytest.approx(found.loss["known"], abs=1e-3)
    assert len(found.rows) == 3
    for response in [response for row in found.rows for response in row]:
        assert {kind for kind, _ in response["segments"]} <= {"context", "trained"}
        assert 0 <= response["trained"] <= response["tokens"]
    assert sum(response["trained"] for row in found.rows for response in row) > 0
    assert found.data["tokens"] >= found.data["trained_tokens"] > 0
    assert found.memory["total"] == sum(found.memory["parts"].values())
    assert found.plan["steps"] == 3 * math.ceil(found.data["looked_at"] / 4)  # three epochs
    json.dumps(found.to_dict())
    # No trace
    assert not Path("never-written").exists()
    assert args.to_dict() == settings
    assert "forward" not in vars(model)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


LN2 = math.log(2)
# Worked out by hand, for policy = reference: options, data if not plain pairs, the value
KNOWN = {
    "dpo": ({}, LN2),
    "dpo ipo": ({"loss_type": "ipo", "beta": 0.1}, 25.0),
    "dpo hinge": ({"loss_type": "hinge"}, 1.0),
    "dpo precomputed": ({"precompute_ref_log_probs": True}, LN2),
    "dpo shared prompts": ({"shared_prompt": True}, LN2),
    "davir-dpo": ({}, LN2),
    "dpop": ({}, LN2),
    "minor-dpo": ({}, LN2),
    "chipo": ({}, LN2),
    "ada-dpo": ({"rho0": 0.3, "tau_min": 0.2}, 0.3 * 0.2),
    "exo": ({"exo_beta_r": 0.5}, 0.5 * sum(math.log(0.5) - math.log(1 / (1 + math.exp(x))) for x in (-2, 2))),
    "mpo": ({"reg_weight": 0.0, "logit_mode": "reference"}, -0.5),
    "self-supervised-po": (
        {"spo_gamma_chosen": 0.3, "spo_gamma_rejected": 0.1, "spo_levels": 3},
        LN2 + 0.4 * math.log(3),
    ),
    "regularized-po": ({}, None),
    "aligned-sft": ({}, None),
    "tpo": ({}, None),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_losses(name, tokenizer):
    settings, expected = KNOWN[name]
    data = {"self-supervised-po": test_methods.wordy_data, "tpo": tiny.triple_data}.get(name, tiny.preference_data)()
    found = inspect(get_method(name.split()[0]), tokenizer, data=data, **settings)
    assert found.errors == []
    if expected is None:
        assert found.loss["known"] is None
        assert "depends on how likely the responses are" in found.loss["reason"]
    else:
        assert found.loss["known"] == pytest.approx(expected, rel=1e-5)
        assert found.loss["measured"] == pytest.approx(expected, abs=1e-4)


def test_references(tokenizer):
    """A model that is passed, and the copy of an adapter that is trained further."""
    arguments = arguments_of(get_method("dpop"), tokenizer, data=tiny.preference_data())
    found = inspect_training(DPOPTrainer, **arguments, ref_model=tiny.model("llama", tokenizer))
    assert found.reference["kind"] == "the model that was passed"
    model = get_peft_model(tiny.model("llama", tokenizer), LoraConfig(r=2, target_modules="all-linear"))
    found = inspect(get_method("dpop"), tokenizer, model=model, data=tiny.preference_data())
    assert found.reference["kind"] == "copy of the adapter"
    assert found.loss["measured"] == pytest.approx(LN2)


def test_loss_that_is_no_number(tokenizer):
    model = tiny.model("llama", tokenizer)
    with torch.no_grad():
        model.lm_head.weight[0] = math.nan
    (error,) = inspect(get_method("dpop"), tokenizer, model=model).errors
    assert error == "The loss of the first micro-batch is nan. Check the model, its dtype and the data."


@pytest.mark.parametrize("name", ["minor-dpo", "dpop", "ift", "exo", "mpo", "eurus-reward", "ulma"])
def test_without_the_model(name, tokenizer, tmp_path):
    """All but the loss is the same, and no weights are read."""
    method = get_method(name)
    model = test_methods.MODELS.get(name, lambda tokenizer: tiny.model("llama", tokenizer))(tokenizer)
    for part in (model, tokenizer):
        part.save_pretrained("model")
    peft = (
        LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS") if name in ("dpop", "eurus-reward") else None
    )
    whole = inspect(method, tokenizer, model="model", peft_config=peft).to_dict()
    Path("model/model.safetensors").unlink()
    found = inspect(method, tokenizer, model="model", peft_config=peft, load_model=False).to_dict()
    assert found.pop("loss") == {"measured": None, "known": None, "reason": "the model was not loaded"}
    assert whole.pop("loss")["measured"] is not None
    for report in (found, whole):  # older versions of transformers warn of their own names
        report["warnings"] = [text for text in report["warnings"] if "deprecated" not in text]
    assert found == whole


def test_a_model_in_memory_is_loaded(tokenizer):
    with pytest.raises(ValueError, match="`load_model=False` needs a model that is named by a string"):
        inspect(get_method("dpop"), tokenizer, load_model=False)


# ---------------------------------------------------------------- rows and data


def test_rows_and_truncation(tokenizer):
    """Against the tokenizer: what stands where, what is trained, and what `max_length` cuts."""
    row = tiny.preference_data()[5]
    lengths = [len(tokenizer(row["prompt"] + row[side])["input_ids"]) + 1 for side in ("chosen", "rejected")]
    prompt, limit = len(tokenizer(row["prompt"])["input_ids"]), lengths[0] - 3
    found = inspect(get_method("dpop"), tokenizer, data=Dataset.from_list([row] * 4), max_length=limit, rows=1)
    (chosen, rejected), decode = found.rows[0], tokenizer.decode
    ids = [*tokenizer(row["prompt"] + row["chosen"])["input_ids"], tokenizer.eos_token_id]
    assert chosen == {
        "name": "chosen", "tokens": limit, "trained": limit - prompt, "cut": 3,
        "segments": [["context", row["prompt"]], ["trained", decode(ids[prompt:limit])], ["cut", decode(ids[limit:])]],
    }  # fmt: skip
    kept = min(lengths[1], limit)
    assert (rejected["tokens"], rejected["trained"]) == (kept, kept - prompt)
    assert rejected["segments"][1][1].endswith("<|im_end|>") == (lengths[1] <= limit)
    assert found.data["truncated"] == 1.0
    assert found.data["tokens"] == 4 * (limit + kept)
    assert found.data["trained_tokens"] == 4 * (limit + kept - 2 * prompt)
    assert found.data["padding"] == pytest.approx(1 - (limit + kept) / (2 * limit))
    labelled = 4 * (limit + kept - 2 * prompt)
    assert found.data["largest_batch"] == {"rows": 8, "length": limit, "labelled": labelled, "mask": 0}
    assert found.data["duplicates"] == 3
    assert found.data["lengths"]["max"] == limit


def test_the_end_is_kept(tokenizer):
    found = inspect(get_method("dpop"), tokenizer, max_length=6, truncation_mode="keep_end")
    response = found.rows[0][0]
    assert response["segments"][0][0] == "cut"
    assert response["tokens"] == 6


def test_supervised_rows_show_what_is_cut(tokenizer):
    data = tiny.prompt_completion_data()
    long = max(len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) + 1 for row in data)
    found = inspect(get_method("ift"), tokenizer, max_length=long - 2, rows=8)
    cut = [row[0]["cut"] for row in found.rows]
    assert max(cut) == 2
    assert found.data["truncated"] == sum(map(bool, cut)) / 8
    assert found.data["kept"] == 8


@pytest.mark.parametrize("mode", [{"padding_free": True, "max_length": None}, {"packing": True, "max_length": 64}])
def test_rows_without_padding(tokenizer, mode):
    plain, found = (inspect(get_method("ift"), tokenizer, **options) for options in ({}, mode))
    assert found.data["padding"] == 0
    assert found.data["tokens"] == plain.data["tokens"]
    assert found.data["trained_tokens"] == plain.data["trained_tokens"]


def test_dropped_rows_have_a_reason(tokenizer):
    rows = tiny.preference_data().to_list()
    rows[2]["rejected"] = rows[2]["chosen"]
    found = inspect(get_method("dpop"), tokenizer, data=Dataset.from_list(rows))
    assert (found.data["rows"], found.data["kept"], found.data["dropped"]["number"]) == (8, 7, 1)
    assert found.data["dropped"]["why"] == ["Dropped 1 of 8 rows of the train dataset: 1 (chosen equals rejected)."]


def test_rows_that_sft_drops_are_counted(tokenizer):
    """Their prompts fill `max_length`."""
    rows = tiny.prompt_completion_data().to_list()[:5]
    rows[1]["prompt"] = rows[3]["prompt"] = "word " * 40
    found = inspect(get_method("ift"), tokenizer, data=Dataset.from_list(rows), max_length=32)
    assert (found.data["rows"], found.data["kept"], found.data["dropped"]["number"]) == (5, 3, 2)
    assert found.data["dropped"]["why"] == ["without a token to train on after truncation"]


def test_rows_that_are_tokenized_by_the_user(tokenizer):
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [5, 6, 8, 9], "labels": [-100, 6, 8, 9]},
    ] * 4
    options = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": 3}  # which cuts nothing then
    found = inspect(get_method("ift"), tokenizer, data=Dataset.from_list(rows), **options)
    assert [row[0]["tokens"] for row in found.rows] == [3, 4, 3]
    assert [row[0]["trained"] for row in found.rows] == [2, 3, 2]
    assert (found.data["truncated"], found.data["kept"], found.data["tokens"]) == (0, 8, 28)
    with pytest.raises(ValueError, match="the rows have no 'input_ids'"):
        inspect(get_method("ift"), tokenizer, data=tiny.text_data(), **options)


def test_rows_of_a_formatting_function(tokenizer):
    arguments = arguments_of(
        get_method("ift"), tokenizer, data=Dataset.from_list([{"a": "one two", "b": "three"}] * 3)
    )
    found = inspect_training(IFTTrainer, **arguments, formatting_func=lambda row: f"{row['a']} {row['b']}")
    assert found.rows[0][0]["segments"][-1][1].startswith("ne two three")


@pytest.mark.parametrize("mode", [{"padding_free": True, "max_length": None}, {"packing": True, "max_length": 64}])
def test_rows_without_padding_but_at_the_end(tokenizer, mode):
    plain, found = (inspect(get_method("ift"), tokenizer, pad_to_multiple_of=number, **mode) for number in (None, 64))
    for name in ("tokens", "trained_tokens", "responses"):
        assert found.data[name] == plain.data[name]
    assert found.rows == plain.rows
    assert found.data["padding"] > plain.data["padding"] == 0


def test_stream(tokenizer):
    data = tiny.preference_data().to_iterable_dataset()
    found = inspect(get_method("minor-dpo"), tokenizer, data=data, max_steps=5)
    assert (found.data["kept"], found.data["looked_at"], found.plan["steps"], found.plan["epochs"]) == (
        None,
        8,
        5,
        None,
    )
    assert found.loss["measured"] == pytest.approx(LN2)


def test_tokens_of_a_stream(tokenizer, monkeypatch):
    """Those of the same rows as a `Dataset`, though a part of them is looked at."""
    monkeypatch.setattr(inspection, "STREAM_ROWS", 8)
    data = Dataset.from_list(tiny.preference_data().to_list() * 3)
    options = {"max_steps": 6, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    whole = inspect(get_method("dpop"), tokenizer, data=data, **options, dataloader_drop_last=True)
    found = inspect(get_method("dpop"), tokenizer, data=data.to_iterable_dataset(), **options)
    assert (found.data["looked_at"], found.data["batches"], found.data["responses"]) == (8, 4, 16)
    assert found.plan["tokens"] == whole.plan["tokens"] == whole.data["tokens"]


@pytest.mark.parametrize(("strategy", "cuts"), [("bfd", True), ("bfd_split", False), ("wrapped", False)])
def test_packing_that_cuts(strategy, cuts, tokenizer):
    options = {"packing": True, "packing_strategy": strategy, "max_length": 12, "padding_free": False}
    plain = inspect(get_method("ift"), tokenizer, max_length=None)
    found = inspect(get_method("ift"), tokenizer, **options)
    assert (found.data["truncated"] > 0) == cuts
    assert any(row[0]["cut"] for row in found.rows) == cuts
    assert (found.data["tokens"] < plain.data["tokens"]) == cuts


def test_sequences_of_tokens_with_weights(tokenizer):
    """Of FIGA: the tokens that were put in or taken out, and the end of the revised answer."""
    found = inspect(get_method("figa"), tokenizer)
    chosen, _ = found.rows[0]
    assert 0 < chosen["trained"] < chosen["tokens"]
    everything = inspect(get_method("figa"), tokenizer, other_weight=0.5).rows[0][0]
    assert everything["trained"] > chosen["trained"]


def test_first_tokens_are_not_predicted():
    labels = torch.tensor([[5, 6, 7], [5, 6, -100]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    batch = {"input_ids": torch.tensor([[5, 6, 7], [5, 6, 0]]), "labels": labels, "attention_mask": mask}
    (first,), (second,) = sequences_of(batch)
    assert (first.ids, first.trained) == ([5, 6, 7], [False, True, True])
    assert (second.ids, second.trained) == ([5, 6], [False, True])


# ---------------------------------------------------------------- reference and first loss


def test_kinds_of_reference(tokenizer):
    minor, lora = get_method("minor-dpo"), LoraConfig(r=2, target_modules="all-linear")

    def kind(**options):
        found = inspect(minor, tokenizer, rows=0, **options)
        return found.reference["kind"], found.memory["parts"]["reference"], found.loss["measured"]

    weights = 4 * sum(parameter.numel() for parameter in tiny.model("llama", tokenizer).parameters())
    assert kind() == ("copy of the model", weights, pytest.approx(LN2))
    assert kind(peft_config=lora) == ("the model, its adapter switched off", 0, pytest.approx(LN2))
    stored = (
        tiny.preference_data().add_column("ref_chosen_logps", [-9.0] * 8).add_column("ref_rejected_logps", [-9.0] * 8)
    )
    assert kind(data=stored)[:2] == ("stored columns", 0)
    assert kind(precompute_ref_log_probs=True) == ("precomputed with the model as it is", 0, pytest.approx(LN2))
    found = kind(precompute_ref_log_probs=True, peft_config=lora)
    assert found == ("precomputed with the model without its adapter as it is", 0, pytest.approx(LN2))
    assert inspect(get_method("tpo"), tokenizer).reference["kind"] == "none"


def test_wrong_reference(tokenizer):
    """An adapter that changes the model from the start: the trainer's own check, and the known loss."""
    lora = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    found = inspect(get_method("minor-dpo"), tokenizer, peft_config=lora)
    (error,) = found.errors
    assert error.startswith("The reference is not the model that is being trained")
    assert found.loss["known"] == pytest.approx(LN2)
    assert abs(found.loss["measured"] - LN2) > 1e-3

    class Unchecked(MinorDPOTrainer):  # drifts of both signs in a batch cancel in the trainer's check
        def _check_agreement(self, drift, num_tokens):
            pass

    found = inspect(get_method("minor-dpo"), tokenizer, peft_config=lora, trainer_class=Unchecked)
    (error,) = found.errors
    assert "with a reference that is the model as it starts it is 0.69315: the reference is another model" in error


def test_dropout_is_no_error(tokenizer):
    model = tiny.model("llama", tokenizer, attention_dropout=0.5)
    found = inspect(get_method("minor-dpo"), tokenizer, model=model)
    assert found.errors == []
    assert "dropout is on" in found.loss["reason"]
    assert abs(found.loss["measured"] - LN2) > 1e-3


def test_half_precision(tokenizer):
    found = inspect(get_method("minor-dpo"), tokenizer, bf16=True)
    assert found.errors == []
    assert found.loss["known"] == pytest.approx(LN2)


def test_out_of_memory(tokenizer, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB")

    monkeypatch.setattr(inspection, "_first_loss", fail)
    found = inspect(get_method("dpop"), tokenizer)
    assert found.errors == ["Out of memory at the first micro-batch: Tried to allocate 9 GiB"]
    assert found.loss["measured"] is None
    assert "First loss\n  not measured: the first micro-batch does not fit" in check.rendered(found.to_dict())
    assert found.memory["total"] > 0


def test_out_of_memory_while_the_model_loads(tokenizer, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB")

    monkeypatch.setattr(trl.DPOTrainer, "__init__", fail)
    with pytest.raises(ValueError, match=r"does not fit into the memory: Tried to allocate 9 GiB .*`--no_model`"):
        inspect(get_method("dpop"), tokenizer)


def test_too_few_positions(tokenizer):
    model = tiny.model("llama", tokenizer, max_position_embeddings=16)
    (error,) = inspect(get_method("dpop"), tokenizer, model=model).errors
    assert "the model 16 positions. Set `max_length=16`" in error


# ---------------------------------------------------------------- memory and plan


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_against_the_measured_peak(tokenizer, tmp_path, adapter, checkpointing):
    size = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4}
    data = tiny.preference_data().map(lambda row: {"prompt": row["prompt"] * 8})
    arguments = {
        "processing_class": tokenizer,
        "train_dataset": data,
        "peft_config": LoraConfig(r=4, target_modules="all-linear") if adapter else None,
    }
    options = {"max_steps": 2, "gradient_checkpointing": checkpointing, "save_strategy": "no", "disable_tqdm": True}
    args = config_of(get_method("dpop"), **options)
    found = inspect_training(DPOPTrainer, model=tiny.model("llama", tokenizer, **size), args=args, rows=0, **arguments)
    args.output_dir = str(tmp_path / "run")
    trainer = DPOPTrainer(model=tiny.model("llama", tokenizer, **size), args=args, **arguments)
    models = [model for model in (trainer.model, trainer.ref_model) if model is not None]
    before = sum(p.numel() * p.element_size() for model in models for p in model.parameters())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak > 2**22
    assert 0.5 < found.memory["total"] / (before + peak) < 2


def test_what_lowers_the_memory(tokenizer):
    found = inspect(get_method("minor-dpo"), tokenizer, rows=0, gradient_checkpointing=False)
    changes = {change.split("`")[1]: saved for change, saved in found.memory["would_save"]}
    parts = found.memory["parts"]
    assert changes["precompute_ref_log_probs"] == parts["reference"]
    assert changes["use_peft"] == parts["gradients"] + parts["optimizer"] + parts["reference"]
    lower = inspect(get_method("minor-dpo"), tokenizer, rows=0, gradient_checkpointing=True)
    assert changes["gradient_checkpointing"] == found.memory["total"] - lower.memory["total"]
    assert sorted(changes.values(), reverse=True) == [saved for _, saved in found.memory["would_save"]]


def test_unknown_shapes(tokenizer, monkeypatch):
    def fail(*_):
        raise AttributeError("no attribute 'num_attention_heads'")

    monkeypatch.setattr(memory.Shape, "of", fail)
    found = inspect(get_method("ift"), tokenizer, gradient_checkpointing=True)
    assert found.errors == []
    assert found.memory["parts"]["weights"] > 0 == found.memory["parts"]["activations"]
    text = check.rendered(found.to_dict())
    assert "without the activations, which cannot be estimated for this model (no attribute" in text


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_memory_of_the_mask(attention, tokenizer):
    """Of pairs that share their prompts: the places of that which the model gets, and what its layers keep."""
    row, masks = tiny.preference_data()[5], []
    data = Dataset.from_list([row] * 4)
    model = tiny.model("llama", tokenizer, attn_implementation=attention)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    options = {"data": data, "rows": 0, "model": model, "shared_prompt": True}
    kept, again = (
        inspect(get_method("minor-dpo"), tokenizer, **options, gradient_checkpointing=v) for v in (False, True)
    )
    places = kept.data["largest_batch"]["mask"]
    assert places == max(mask.numel() for mask in masks if mask.dim() == 4)
    plain = inspect(get_method("minor-dpo"), tokenizer, data=data, rows=0, model=model, gradient_checkpointing=False)
    added = kept.memory["parts"]["activations"] - plain.memory["parts"]["activations"]
    assert added == places * (1 + 4 * 2 if attention == "sdpa" else 4)
    plain = inspect(get_method("minor-dpo"), tokenizer, data=data, rows=0, model=model, gradient_checkpointing=True)
    added = again.memory["parts"]["activations"] - plain.memory["parts"]["activations"]
    assert added == places * (1 + 4 if attention == "sdpa" else 4)


@pytest.mark.parametrize(("attention", "places"), [("sdpa", 2 * 14**2), ("flex_attention", 0)])
def test_mask_of_the_largest_batch(attention, places, tokenizer):
    model = tiny.model("llama", tokenizer)
    model.config._attn_implementation = attention
    row = {"prompt_ids": [1] * 4, "chosen_ids": [2] * 3, "rejected_ids": [3]}
    args = SimpleNamespace(per_device_train_batch_size=2, max_length=None, shared_prompt=True)
    trainer = SimpleNamespace(args=args, train_dataset=Dataset.from_list([row] * 5), model=model)
    assert largest_batch(trainer) == Batch(4, 7, 28, places)


def test_optimizers():
    sizes = {"adamw_torch_fused": 800, "adamw_8bit": 200, "sgd": 0, "adafactor": 0, "lion_32bit": 400, "rmsprop": 400}
    sizes |= {"adamw_torch_4bit": 100, "lion_8bit": 100}
    for name, expected in sizes.items():
        assert optimizer_bytes(name, 400, 100) == expected, name


def test_plan(tokenizer):
    options = {"max_steps": 7, "save_steps": 2, "warmup_steps": 0.5, "gradient_accumulation_steps": 2}
    found = inspect(get_method("dpop"), tokenizer, per_device_train_batch_size=2, **options)
    plan, parts = found.plan, found.memory["parts"]
    assert (plan["steps"], plan["epochs"], plan["batch_size"], plan["warmup_steps"]) == (7, 3.5, 4, 4)
    assert (plan["checkpoints"], plan["tokens"]) == (4, round(3.5 * found.data["tokens"]))
    assert plan["checkpoint_bytes"] == parts["weights"] + parts["optimizer"]
    assert inspect(get_method("dpop"), tokenizer, save_total_limit=1, **options).plan["checkpoints"] == 1
    constant = inspect(get_method("dpop"), tokenizer, lr_scheduler_type="constant", **options)
    assert constant.plan["warmup_steps"] == 0


def test_the_best_checkpoint_stays_beside_the_last():
    args = SimpleNamespace(save_strategy="steps", save_steps=2, save_total_limit=1, metric_for_best_model=None)
    assert inspection._checkpoints(args, 7, 2) == 1
    args.metric_for_best_model = "loss"  # which `load_best_model_at_end` sets
    assert inspection._checkpoints(args, 7, 2) == 2
    assert inspection._checkpoints(args, 1, 2) == 1


# ---------------------------------------------------------------- settings without an effect


def unused(method, *argv):
    parser = check.make_parser(get_method(method))
    *configs, _ = parse_options(parser, list(argv), "x")[:5]
    values = {name: value for config in configs for name, value in vars(config).items()}
    return check.unused_settings(check.Settings(values, check.given_options(parser, list(argv))))


@pytest.mark.parametrize(
    ("method", "argv", "name"),
    [
        ("dpop", "--eval_steps 10", "eval_steps"),
        (
            "dpop",
            "--save_strategy best --metric_for_best_model loss --eval_strategy steps --save_steps 5",
            "save_steps",
        ),
        ("dpop", "--logging_strategy epoch --logging_steps 5", "logging_steps"),
        ("dpop", "--logging_strategy epoch --logging_steps 5 --eval_strategy steps --eval_steps 9", "logging_steps"),
        ("dpop", "--lr_scheduler_type constant --warmup_steps 5", "warmup_steps"),
        ("dpop", "--lr_scheduler_type greedy --eval_strategy epoch --warmup_steps 0.1", "warmup_steps"),
        ("dpop", "--optim lion_8bit --adam_epsilon 1e-6", "adam_epsilon"),
        pytest.param(
            "dpop",
            '--activation_checkpointing false --activation_checkpointing_kwargs {"a":1}',
            "activation_checkpointing_kwargs",
            marks=tiny.needs_activation_checkpointing,
        ),
        ("dpop", "--eval_strategy epoch --eval_steps 10", "eval_steps"),
        ("dpop", "--save_strategy no --save_total_limit 2", "save_total_limit"),
        ("dpop", "--save_strategy epoch --save_steps 10", "save_steps"),
        ("dpop", "--hub_strategy end", "hub_strategy"),
        ("dpop", "--lora_r 16", "lora_r"),
        ("dpop", "--bnb_4bit_quant_type nf4", "bnb_4bit_quant_type"),
        ("dpop", "--max_steps 9 --num_train_epochs 2", "num_train_epochs"),
        ("ift", "--packing_strategy wrapped", "packing_strategy"),
        ("dpop", "--dataloader_persistent_workers true", "dataloader_persistent_workers"),
        ("dpop", "--precompute_ref_batch_size 4", "precompute_ref_batch_size"),
        ("dpop", "--optim adafactor --adam_beta1 0.8", "adam_beta1"),
        ("dpop", "--run_name a --report_to none", "run_name"),
        ("ulma", "--greater_is_better true", "greater_is_better"),
    ],
)
def test_unused_settings(method, argv, name):
    (message,) = unused(method, "--output_dir", "out", *argv.split())
    assert message.startswith(f"`{name}: ")
    assert "(the command line) has no effect" in message


def test_settings_with_an_effect_or_by_default():
    assert unused("dpop", "--output_dir", "out") == []
    assert unused("dpop", "--use_peft", "--lora_r", "4", "--eval_strategy", "steps", "--eval_steps", "3") == []
    assert unused("dpop", "--push_to_hub", "false", "--hub_always_push", "false", "--max_steps", "4") == []
    assert unused("mpo", "--precompute_ref_batch_size", "4", "--logit_mode", "reference") == []


@pytest.mark.parametrize(
    ("method", "argv"),
    [
        ("dpop", "--test_split_size 0.1"),  # takes rows out of the training
        ("dpop", "--hub_model_id me/model"),  # the name in the model card
        ("dpop", "--logging_strategy epoch --logging_steps 5 --eval_strategy steps"),  # the steps of the evaluation
        ("dpop", "--lr_scheduler_type constant_with_warmup --warmup_steps 5"),
        ("dpop", "--lr_scheduler_type constant --warmup_steps 0"),
        ("dpop", "--optim lion_8bit --adam_beta1 0.8"),
        ("ift", "--train_sampling_strategy batch_rebalance --length_column_name n"),
        pytest.param(
            "dpop",
            '--activation_checkpointing true --activation_checkpointing_kwargs {"use_reentrant":true}',
            marks=tiny.needs_activation_checkpointing,
        ),
    ],
)
def test_settings_that_are_right(method, argv):
    assert unused(method, "--output_dir", "out", *argv.split()) == []


def test_evaluation_before_the_first_step():
    (message,) = unused("dpop", "--output_dir", "out", "--eval_on_start", "true")
    assert "there is no evaluation dataset, so that training stops there: set `eval_strategy`" in message
    assert unused("dpop", "--output_dir", "out", "--eval_on_start", "true", "--eval_strategy", "epoch") == []


def misplaced(method, argv, steps_known=True, **plan):
    parser = check.make_parser(get_method(method))
    argv = ["--output_dir", "out", *argv.split()]
    *configs, _ = parse_options(parser, argv, "x")
    values = {name: value for config in configs for name, value in vars(config).items()}
    found = SimpleNamespace(plan={"steps": 3, "warmup_steps": 0, "positions": 512} | plan)
    return check._misplaced(check.Settings(values, check.given_options(parser, argv)), found, steps_known)


def test_settings_and_the_size_of_the_run():
    (message,) = misplaced("dpop", "--warmup_steps 3", warmup_steps=3)
    assert message.startswith("`warmup_steps: 3` takes all of the 3 steps")
    assert misplaced("dpop", "--warmup_steps 3", warmup_steps=3, steps_known=False) == []
    assert misplaced("dpop", "--warmup_steps 0.1", warmup_steps=1, steps=1) == []  # rounded up
    # The last step is saved and evaluated whatever they are
    assert misplaced("dpop", "--save_steps 99 --eval_strategy steps --eval_steps 99") == []


def test_settings_and_positions():
    (message,) = misplaced("ift", "--max_length 600")
    assert message.startswith("`max_length: 600` is more than the 512 positions")
    assert misplaced("ift", "--max_length 600 --packing true") == []
    assert misplaced("ift", "--max_length 600 --packing true --packing_strategy bfd_split") == []
    (message,) = misplaced("ift", "--max_length 600 --packing true --packing_strategy wrapped")
    assert message.startswith("`max_length: 600` is more than the 512 positions")


def test_settings_of_a_file_and_secrets():
    Path("run.yaml").write_text("eval_steps: 10\nhub_token: hf_abcdefghijklmnopqrstuvwxyz\nsave_total_limit: null\n")
    first, second = unused("dpop", "--config", "run.yaml")
    assert "(run.yaml)" in first
    assert "abcdef" not in first + second
    assert "`hub_token: ***`" in second


# ---------------------------------------------------------------- the command


@pytest.fixture
def run_file(model_dir):
    """A YAML file of a training that is right, with its method."""
    tiny.preference_data().to_json("pairs.jsonl")
    settings = {
        "method": "dpop", "model_name_or_path": model_dir, "dataset_name": "pairs.jsonl", "output_dir": "out",
        "use_peft": True, "lora_target_modules": "all-linear", "per_device_train_batch_size": 4, "max_length": 32,
    }  # fmt: skip
    Path("run.yaml").write_text(yaml.safe_dump(settings))
    return "run.yaml"


def test_command_by_file(run_file, capfd):
    """`trl-ift check FILE`, launched."""
    assert main(["check", run_file, "--rows", "1", "--json", "found.json"]) == 0
    shown = capfd.readouterr().out
    assert "What is the capital of France?⟦ The capital of France is Paris.<|im_end|>⟧" in shown
    assert "measured on the first micro-batch 0.69315, known value 0.69315" in shown
    assert "Nothing is wrong with this training." in shown
    assert "\x1b" not in shown
    found = json.loads(Path("found.json").read_text())
    assert found["method"] == "dpop"
    assert found["errors"] == []
    assert not Path("out").exists()


def test_command_by_method(run_file, model_dir, capfd):
    """`trl-ift check METHOD [options]`, launched, with settings that have no effect."""
    tiny.messages_data().to_json("data.jsonl")
    options = ["--model_name_or_path", model_dir, "--dataset_name", "data.jsonl", "--output_dir", "out", "--no_model"]
    assert main(["check", "ift", *options, "--eval_steps", "5", "--warmup_steps", "99", "--max_length", "600"]) == 1
    shown = capfd.readouterr().out
    assert "error: `eval_steps: 5` (the command line) has no effect" in shown
    assert "error: `warmup_steps: 99` takes all of the 3 steps" in shown
    assert "error: `max_length: 600` is more than the 512 positions of the model" in shown
    assert "not measured: the model was not loaded" in shown
    assert not Path("out").exists()


def test_bad_input(run_file, capsys):
    assert check.run(["dpop", "--config", run_file, "--dataset_name", "nowhere.jsonl"]) == 1
    assert "`nowhere.jsonl` does not exist" in capsys.readouterr().err
    for argv, expected in (
        (["nothing"], "unknown method 'nothing'"),
        ([run_file.replace("run", "other")], "unknown method 'other.yaml'"),
        (["minor-dpo", "--config", run_file], "the YAML file names the method 'dpop'"),
        (["dpop", "--lerning_rate", "1"], "unknown option --lerning_rate"),
    ):
        with pytest.raises(SystemExit) as stop:
            if argv[0] == "minor-dpo":
                check.run(argv)
            else:
                main(["check", *argv])
        assert stop.value.code == 2
        assert expected in capsys.readouterr().err


def test_settings_are_named_beside_the_error_of_the_trainer(run_file, capsys):
    Path("pairs.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    assert check.run(["dpop", "--config", run_file, "--eval_steps", "10"]) == 1
    shown = capsys.readouterr().err
    assert "rejected" in shown
    assert "error: `eval_steps: 10` (the command line) has no effect" in shown


def test_broken_files(capsys):
    Path("list.yaml").write_text("[1]")
    Path("bare.yaml").write_text("seed: 1")
    for file, code, expected in (("list.yaml", 1, "found list"), ("bare.yaml", 2, "has no key `method`")):
        with pytest.raises(SystemExit) as stop:
            main(["check", file])
        assert stop.value.code == code
        assert expected in capsys.readouterr().err


def test_earlier_results_are_an_error_here_too(run_file, capsys):
    Path("out").mkdir()
    Path("out/model.safetensors").touch()
    assert check.run(["dpop", "--config", run_file]) == 1
    assert "already holds the results of another run" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["spin", "ld-align"])
def test_self_play(name, run_file, model_dir, capsys):
    tiny.prompt_completion_data().to_json("sft.jsonl")
    options = ["--model_name_or_path", model_dir, "--dataset_name", "sft.jsonl", "--output_dir", "out"]
    # Right for the whole of the data
    options += ["--eval_strategy", "steps", "--eval_steps", "50", "--save_steps", "50", "--warmup_steps", "20"]
    options += ["--eval_on_start", "true", "--test_split_size", "0.25"]
    assert (
        check.run([name, *options, "--max_new_tokens", "6", "--per_device_train_batch_size", "2", "--json", "f.json"])
        == 0
    )
    found = json.loads(Path("f.json").read_text())
    assert found["loss"]["measured"] == pytest.approx(LN2)
    assert found["rows"][0][0]["name"] == "chosen"
    assert "answers of the model to the first prompts alone" in found["data"]["note"]
    assert found["errors"] == []
    assert not Path("out").exists()


def test_self_play_that_goes_on(model_dir, tokenizer, capsys):
    """On conversations, from an adapter, in a folder with results; the reference is stored, as an iteration stores it."""
    tiny.messages_data().to_json("sft.jsonl")
    model = get_peft_model(tiny.model("llama", tokenizer), LoraConfig(r=2, target_modules="all-linear"))
    model.save_pretrained("adapter")
    Path("out").mkdir()
    Path("out/model.safetensors").touch()
    options = ["--model_name_or_path", model_dir, "--dataset_name", "sft.jsonl", "--output_dir", "out"]
    options += ["--initial_adapter", "adapter", "--precompute_ref_batch_size", "4", "--max_new_tokens", "6"]
    options += ["--per_device_train_batch_size", "2", "--json", "f.json"]
    assert check.run(["spin", *options]) == 0, capsys.readouterr().err
    found = json.loads(Path("f.json").read_text())
    adapter = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert found["plan"]["trained_parameters"] == adapter
    assert found["reference"]["kind"].startswith("precomputed")
    assert found["loss"]["measured"] == pytest.approx(LN2)
    assert "a training command keeps it" not in capsys.readouterr().out


def test_help(capsys):
    for argv, code in ((["--help"], 0), ([], 2)):
        with pytest.raises(SystemExit) as stop:
            check.split_method(argv)
        assert stop.value.code == code
        assert "Methods: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["dpop", "--rows", "-1"], "`--rows -1` must be at least 0"),
        (["spin", "--no_model"], "`--no_model` cannot check self-play: its rejected answers are the model's own"),
    ],
)
def test_options_of_the_check(argv, message, model_dir, capsys):
    tiny.prompt_completion_data().to_json("data.jsonl")
    options = ["--model_name_or_path", model_dir, "--dataset_name", "data.jsonl", "--output_dir", "out"]
    assert check.run([*argv, *options]) == 1
    assert message in capsys.readouterr().err


def test_text_of_what_does_not_fit(tokenizer):
    data = tiny.preference_data().to_iterable_dataset()
    found = inspect(get_method("dpop"), tokenizer, data=data, max_steps=2).to_dict()
    text = check.rendered(found | {"warnings": ["a warning of TRL"]})
    assert f"a stream; the first {found['data']['looked_at']} rows:" in text
    assert "a warning of TRL" in text
    assert "That does not fit." not in text
    assert "That does not fit." in check.rendered(found | {"memory": found["memory"] | {"available": 1}})


def test_interrupted(run_file, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "inspect", stop)
    assert check.run(["dpop", "--config", run_file]) == 130


def test_colours_and_long_texts():
    segments = [["context", "a" * 700], ["trained", "b"], ["cut", "c"]]
    assert check._marked(*segments[0], colour=False) == f"{'a' * 300} [... 100 characters ...] {'a' * 300}"
    assert [check._marked(*part, colour=False) for part in segments[1:]] == ["⟦b⟧", "~~c~~"]
    assert check._marked("trained", "b", colour=True) == "\x1b[32mb\x1b[0m"


def test_named_references_score_a_few_rows_only(tokenizer):
    method = get_method("mrpo")
    for part in (tiny.model("llama", tokenizer, seed=3), tokenizer):
        part.save_pretrained("other")
    data = Dataset.from_list(tiny.preference_data().to_list() * 3)
    found = inspect(method, tokenizer, data=data, ref_models=["other"], model=None)
    assert found.data["looked_at"] == 4
    assert "score each row before training" in found.data["note"]
    evaluated = config_of(method, ref_models=["other"], eval_strategy="epoch", eval_on_start=True)
    arguments = arguments_of(method, tokenizer, data=data, ref_models=["other"]) | {
        "args": evaluated,
        "eval_dataset": data,
    }
    assert inspect_training(method.trainer_class, **arguments).errors == []
    assert evaluated.eval_strategy == "epoch"
    assert found.plan["steps"] == 18
    assert found.data["dropped"]["number"] == 0


def test_config_class_is_checked(tokenizer):
    with pytest.raises(TypeError, match="needs a `IFTConfig`"):
        inspect_training(IFTTrainer, model="x", args=DPOPConfig("x", use_cpu=True, bf16=False), train_dataset=None)


def test_names_that_other_tools_still_have():
    """Rows of docs/moving.md for options that transformers does not have any more, or never had."""
    text = (Path(__file__).parent.parent / "docs" / "moving.md").read_text()
    _, factory, axolotl = re.split("^## From (?=LLaMA|axolotl)", text, flags=re.MULTILINE)
    own = {field.name for field in fields(DPOPConfig)}
    for names, section in (
        (("warmup_ratio", "group_by_length", "disable_gradient_checkpointing"), factory),
        (("warmup_ratio", "group_by_length", "saves_per_epoch", "evals_per_epoch"), axolotl),
    ):
        assert own.isdisjoint(names)
        named = re.findall(r"^\| (.*?) \|", section, flags=re.MULTILINE)
        assert set(names) <= set(re.findall(r"`(\w+)", " ".join(named)))
