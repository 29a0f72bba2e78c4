"""IFTTrainer on tiny models: against an independent float64 computation, against SFTTrainer, and under every option."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from trl_ift import IFTConfig, IFTTrainer
from trl_ift.supervised.ift import GRADS, PREDICTIONS, _mix_seeds


LORA = {"r": 4, "target_modules": "all-linear"}
NEUTRAL = {"ift_lambda": 0.0, "ift_gamma": 0.0, "ift_loss_normalization": "token"}


def options(tmp_path, **overrides):
    defaults = {
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "max_steps": 3,
        "gradient_checkpointing": False,
    }
    return defaults | overrides


def make(tmp_path, tokenizer, model="llama", data=None, cls=IFTTrainer, **settings):
    arguments = {
        name: settings.pop(name)
        for name in ("eval_dataset", "peft_config", "quantization_config", "callbacks")
        if name in settings
    }
    config = (IFTConfig if cls is IFTTrainer else SFTConfig)(**options(tmp_path, **settings))
    return cls(
        model=tiny.model(model, tokenizer) if model in tiny.FAMILIES else model,
        args=config,
        train_dataset=tiny.prompt_completion_data() if data is None else data,
        processing_class=tokenizer,
        **arguments,
    )


def batch_of(trainer, train=True):
    trainer.model.train(train)
    return next(iter(trainer.get_train_dataloader()))


def loss_and_gradients(trainer, inputs=None):
    """Loss and gradients of the trainer's first micro-batch."""
    inputs = batch_of(trainer) if inputs is None else inputs
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    loss.backward()
    return loss.item(), {
        name: parameter.grad.clone()
        for name, parameter in trainer.model.named_parameters()
        if parameter.grad is not None
    }


def history(trainer, drop=()):
    skip = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", *drop}
    return [
        {
            key: value
            for key, value in entry.items()
            if key not in skip and "_runtime" not in key and "_per_second" not in key
        }
        for entry in trainer.state.log_history
    ]


def documents_of(inputs):
    """Unpadded (input_ids, labels) of every document of a batch."""
    if "attention_mask" in inputs:
        for ids, labels, mask in zip(inputs["input_ids"], inputs["labels"], inputs["attention_mask"], strict=True):
            yield ids[mask.bool()], labels[mask.bool()]
    else:
        starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], inputs["input_ids"].size(1)], strict=True):
            yield inputs["input_ids"][0, start:end], inputs["labels"][0, start:end]


def naive_ift(model, inputs, ift_lambda=0.2, gamma=0.95, grad="numerator", normalization="sequence", freeze=False):
    """IFT from its definition, one document at a time, with full logits; any dtype."""
    losses, counts = [], []
    for ids, labels in documents_of(inputs):
        trained = [t for t in range(len(ids) - 1) if labels[t + 1] != -100]
        if not trained:
            continue
        with torch.no_grad():
            guesses = model(input_ids=ids[None]).logits[0].argmax(-1)
        predicted = ids.clone()
        for t in trained:
            predicted[t + 1] = guesses[t]
        embed = model.get_input_embeddings()
        true, other = embed(ids[None]), embed(predicted[None])
        if freeze:
            true, other = true.detach(), other.detach()
        logits = model(inputs_embeds=(1 - ift_lambda) * true + ift_lambda * other).logits[0]
        nll = -logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
        if gamma == 0:
            loss = nll[trained].mean()
        else:
            reach = torch.stack([sum(gamma ** (i - t) * nll[i] for i in trained if i >= t) for t in trained])
            if grad == "none":
                reach = reach.detach()
            total = reach.sum().detach() if grad == "numerator" else reach.sum()
            loss = (reach * nll[trained]).sum() / total
        losses.append(loss)
        counts.append(len(trained))
    losses, counts = torch.stack(losses), torch.tensor(counts, dtype=losses[0].dtype)
    return losses.mean() if normalization == "sequence" else (losses * counts).sum() / counts.sum()


def double(model):
    """A float64 twin of a tiny model, with the plain forward of its class."""
    config = copy.deepcopy(model.config)
    config._experts_implementation = "eager"  # the grouped kernel has no float64
    twin = type(model)(config).double()
    twin.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    return twin.train()


def assert_gradients_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    scale = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        difference = (found[name].double() - value.double()).abs().max() / scale
        assert difference < tolerance, (name, difference)


class TestAgainstFloat64:
    """Value and all gradients equal a per-document, unpadded, full-logits computation in float64."""

    @pytest.mark.parametrize("family", tiny.FAMILIES)
    def test_families(self, tmp_path, tokenizer, family):
        model = tiny.model(family, tokenizer)
        extra = {"router_aux_loss_coef": 0.0} if family == "qwen3-moe" else {}
        trainer = make(tmp_path, tokenizer, model, ift_lambda=0.4, **extra)
        inputs = batch_of(trainer)
        loss, gradients = loss_and_gradients(trainer, inputs)
        twin = double(model)
        expected = naive_ift(twin, inputs, ift_lambda=0.4)
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=2e-6)
        reference = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
        assert_gradients_close(gradients, reference, 2e-5)

    @pytest.mark.parametrize("grad", GRADS)
    @pytest.mark.parametrize("normalization", ["sequence", "token"])
    def test_gradient_modes(self, tmp_path, tokenizer, grad, normalization):
        trainer = make(
            tmp_path, tokenizer, ift_propagation_grad=grad, ift_loss_normalization=normalization, ift_gamma=0.8
        )
        inputs = batch_of(trainer)
        loss, gradients = loss_and_gradients(trainer, inputs)
        twin = double(trainer.model)
        expected = naive_ift(twin, inputs, gamma=0.8, grad=grad, normalization=normalization)
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=2e-6)
        assert_gradients_close(gradients, {n: p.grad for n, p in twin.named_parameters()}, 2e-5)

    @pytest.mark.parametrize("family", ["llama", "llama-tied"])
    @pytest.mark.parametrize("ift_lambda", [0.2, 0.0])
    def test_frozen_input_embeddings(self, tmp_path, tokenizer, family, ift_lambda):
        trainer = make(tmp_path, tokenizer, family, ift_freeze_input_embeddings=True, ift_lambda=ift_lambda)
        inputs = batch_of(trainer)
        _, gradients = loss_and_gradients(trainer, inputs)
        twin = double(trainer.model)
        naive_ift(twin, inputs, ift_lambda, freeze=True).backward()
        expected = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
        assert ("model.embed_tokens.weight" in gradients) == (family == "llama-tied")
        # DDP waits for the gradients of all others
        assert trainer.model.get_input_embeddings().weight.requires_grad == (family == "llama-tied")
        assert_gradients_close(gradients, expected, 2e-5)

    def test_one_document_at_the_neutral_setting_is_sft(self, tmp_path, tokenizer):
        data = tiny.tokenized_data(tokenizer).select([3])
        ours = make(tmp_path, tokenizer, data=data, ift_lambda=0.0, ift_gamma=0.0)
        theirs = make(tmp_path, tokenizer, data=data, cls=SFTTrainer)
        inputs = batch_of(ours)
        (loss, gradients), (sft_loss, sft_gradients) = (
            loss_and_gradients(ours, inputs),
            loss_and_gradients(theirs, inputs),
        )
        assert loss == pytest.approx(sft_loss, rel=1e-6)
        assert_gradients_close(gradients, sft_gradients, 1e-6)

    @pytest.mark.parametrize("normalization", ["sequence", "token"])
    def test_a_document_of_one_token_and_one_of_none(self, tmp_path, tokenizer, normalization):
        """Also in the log of a training, whose steps count documents or tokens before their micro-batches."""
        rows = tiny.tokenized_data(tokenizer).select(range(4)).to_list()
        rows[1]["labels"] = [-100] * (len(rows[1]["labels"]) - 1) + rows[1]["labels"][-1:]
        rows[2]["labels"] = [-100] * len(rows[2]["labels"])
        data = Dataset.from_list(rows)
        trainer = make(tmp_path, tokenizer, data=data, max_length=None, ift_loss_normalization=normalization)
        expected = naive_ift(double(trainer.model), batch_of(trainer), normalization=normalization).item()
        assert loss_and_gradients(trainer)[0] == pytest.approx(expected, rel=2e-6)
        for size in (4, 2):
            trainer = make(
                tmp_path, tokenizer, data=data, max_length=None, ift_loss_normalization=normalization, max_steps=1,
                per_device_train_batch_size=size, gradient_accumulation_steps=4 // size,
            )  # fmt: skip
            trainer.train()
            assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=2e-6)

    @pytest.mark.parametrize("mode", ["padding_free", "packing"])
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_padding_free_and_packing(self, tmp_path, tokenizer, mode, attention):
        settings = {
            "padding_free": {"padding_free": True, "max_length": None},
            "packing": {"packing": True, "max_length": 64},
        }
        model = tiny.model("llama", tokenizer, attn_implementation=attention)
        trainer = make(tmp_path, tokenizer, model, tiny.tokenized_data(tokenizer), **settings[mode])
        inputs = batch_of(trainer)
        assert "attention_mask" not in inputs
        assert len(list(documents_of(inputs))) > 1
        loss, gradients = loss_and_gradients(trainer, inputs)
        twin = double(model)
        expected = naive_ift(twin, inputs)
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=2e-6)
        assert_gradients_close(gradients, {n: p.grad for n, p in twin.named_parameters()}, 2e-5)

    def test_padded_equals_padding_free(self, tmp_path, tokenizer):
        data = tiny.tokenized_data(tokenizer)
        padded = make(tmp_path, tokenizer, data=data)
        flat = make(tmp_path, tokenizer, data=data, padding_free=True, max_length=None)
        (loss, gradients), (flat_loss, flat_gradients) = loss_and_gradients(padded), loss_and_gradients(flat)
        assert loss == pytest.approx(flat_loss, rel=1e-6)
        assert_gradients_close(gradients, flat_gradients, 1e-5)

    def test_documents_of_a_batch(self):
        flat = {"input_ids": torch.zeros(1, 5), "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
        for inputs in (flat, flat | {"cu_seq_lens_q": torch.tensor([0, 3, 5])}):
            documents, number = IFTTrainer._documents(inputs)
            assert documents.tolist() == [[1, 1, 1, 2, 2]]
            assert number == 3  # with id 0, which has no token
        padded = {"input_ids": torch.zeros(2, 3)}
        positions = {"position_ids": torch.tensor([[0, 0, 1], [0, 1, 2]])}
        for inputs in (padded, padded | positions | {"attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}):
            documents, number = IFTTrainer._documents(inputs)
            assert documents.tolist() == [[0, 0, 0], [1, 1, 1]]
            assert number == 2

    def test_more_padding_changes_nothing(self, tmp_path, tokenizer):
        trainer = make(tmp_path, tokenizer)
        inputs = batch_of(trainer)
        wider = {
            "input_ids": torch.nn.functional.pad(inputs["input_ids"], (0, 13), value=5),
            "labels": torch.nn.functional.pad(inputs["labels"], (0, 13), value=-100),
            "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 13)),
        }
        (loss, gradients), (wide_loss, wide_gradients) = (
            loss_and_gradients(trainer, inputs),
            loss_and_gradients(trainer, wider),
        )
        assert loss == pytest.approx(wide_loss, rel=1e-6)
        assert_gradients_close(gradients, wide_gradients, 1e-5)


def inputs_of_second_pass(trainer, inputs, ift_lambda=0.2, **kwargs):
    """Input embeddings that reach the backbone in each of its calls."""
    seen = []
    backbone = trainer.model.base_model
    handle = backbone.register_forward_pre_hook(
        lambda module, args, named: seen.append(named["inputs_embeds"].detach().clone()), with_kwargs=True
    )
    try:
        with torch.no_grad():
            output = trainer.model(**inputs, fused_lm_head=True, ift_lambda=ift_lambda, **kwargs)
    finally:
        handle.remove()
    return seen, output


class TestTwoPasses:
    def test_replaced_positions_are_exactly_the_trained_tokens(self, tmp_path, tokenizer):
        trainer = make(tmp_path, tokenizer, data=tiny.text_data())
        inputs = batch_of(trainer)
        inputs["labels"][:, 5] = -100
        assert (inputs["labels"][:, 0] != -100).all()  # trained, but nothing predicts it
        (first, second), _ = inputs_of_second_pass(trainer, inputs)
        with torch.no_grad():
            guesses = trainer.model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
            ).logits.argmax(-1)
        embed = trainer.model.get_input_embeddings()
        replaced = inputs["labels"] != -100
        replaced[:, 0] = False
        assert torch.equal(second[~replaced], first[~replaced])
        predicted = torch.cat([inputs["input_ids"][:, :1], guesses[:, :-1]], 1)
        expected = 0.8 * embed(inputs["input_ids"]) + 0.2 * embed(predicted)
        torch.testing.assert_close(second[replaced], expected[replaced].detach(), rtol=1e-6, atol=1e-6)
        assert not torch.equal(second[replaced], first[replaced])

    def test_the_last_replacement_is_not_used(self, tmp_path, tokenizer):
        trainer = make(tmp_path, tokenizer, data=tiny.tokenized_data(tokenizer).select([0]))
        inputs = batch_of(trainer)
        with torch.no_grad():
            full = trainer.model(**inputs, fused_lm_head=True, ift_lambda=0.5)
            backbone = trainer.model.base_model
            handle = backbone.register_forward_pre_hook(
                lambda module, args, named: (
                    args,
                    named | {"inputs_embeds": torch.cat([named["inputs_embeds"][:, :-1], torch.ones(1, 1, 16)], 1)},
                ),
                with_kwargs=True,
            )
            changed = trainer.model(**inputs, fused_lm_head=True, ift_lambda=0.5)
            handle.remove()
        assert torch.equal(full.log_probs, changed.log_probs)

    def test_lambda_0_is_one_pass_and_equal(self, tmp_path, tokenizer):
        trainer = make(tmp_path, tokenizer)
        inputs = batch_of(trainer)
        calls = []
        handle = trainer.model.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
        with torch.no_grad():
            zero = trainer.model(**inputs, fused_lm_head=True, ift_lambda=0.0)
            assert len(calls) == 1
            some = trainer.model(**inputs, fused_lm_head=True, ift_lambda=0.2)
            assert len(calls) == 3
        handle.remove()
        assert zero.sft_nll_sum.item() == pytest.approx(some.sft_nll_sum.item(), rel=1e-6)
        assert zero.match_sum == some.match_sum
        frozen = make(tmp_path, tokenizer, ift_freeze_input_embeddings=True)
        assert len(inputs_of_second_pass(frozen, inputs, 0.0)[0]) == 1
        assert len(inputs_of_second_pass(frozen, inputs, 0.2)[0]) == 2

    def test_inputs_have_gradients_only_where_they_train(self, tmp_path, tokenizer):
        """Under LoRA the backward pass ends at the first layer."""
        for settings, needed in (({}, True), ({"peft_config": LoraConfig(**LORA)}, False)):
            trainer = make(tmp_path, tokenizer, **settings)
            seen = []
            model = trainer.model.get_base_model() if settings else trainer.model
            model.base_model.register_forward_pre_hook(
                lambda module, args, named, seen=seen: seen.append(named["inputs_embeds"].requires_grad),
                with_kwargs=True,
            )
            loss_and_gradients(trainer)
            assert seen[-1] == needed

    def test_right_predictions_make_lambda_irrelevant(self, tmp_path, tokenizer):
        # Learn one row by heart; then every prediction is the true token
        data = tiny.tokenized_data(tokenizer).select([0])
        trainer = make(
            tmp_path,
            tokenizer,
            data=data,
            max_steps=80,
            per_device_train_batch_size=1,
            ift_lambda=0.0,
            logging_steps=80,
        )
        trainer.train()
        inputs = batch_of(trainer)
        with torch.no_grad():
            losses = [trainer.model(**inputs, fused_lm_head=True, ift_lambda=value) for value in (0.0, 0.3, 1.0)]
        assert losses[1].match_sum == (inputs["labels"][:, 1:] != -100).sum()
        for other in losses[1:]:
            torch.testing.assert_close(other.log_probs, losses[0].log_probs, rtol=1e-5, atol=1e-5)

    def test_plain_forward_and_generation_are_unchanged(self, tmp_path, tokenizer):
        model = tiny.model("llama", tokenizer)
        inputs = tokenizer(["Name a colour."], return_tensors="pt")
        inputs.pop("token_type_ids", None)
        before = model(**inputs).logits, model.generate(**inputs, max_new_tokens=5, do_sample=False)
        trainer = make(tmp_path, tokenizer, model)
        trainer.model.eval()
        assert torch.equal(before[0], trainer.model(**inputs).logits)
        assert torch.equal(before[1], trainer.model.generate(**inputs, max_new_tokens=5, do_sample=False))

    def test_embedding_gradient_reaches_predicted_tokens(self, tmp_path, tokenizer):
        trainer = make(tmp_path, tokenizer, ift_lambda=0.5)
        inputs = batch_of(trainer)
        with torch.no_grad():
            guesses = trainer.model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
            ).logits.argmax(-1)
        # Replaced tokens that a later trained token can see
        trained = inputs["labels"] != -100
        rows, columns = (trained[:, 1:-1] & trained[:, 2:]).nonzero(as_tuple=True)
        only_predicted = set(guesses[rows, columns].tolist()) - set(inputs["input_ids"].flatten().tolist())
        _, gradients = loss_and_gradients(trainer, inputs)
        assert only_predicted
        for token in only_predicted:
            assert gradients["model.embed_tokens.weight"][token].abs().max() > 0


class TestPredictions:
    def test_expected_embedding_at_low_temperature_is_argmax(self, tmp_path, tokenizer):
        hard = make(tmp_path, tokenizer)
        soft = make(tmp_path, tokenizer, ift_prediction="expected", ift_temperature=1e-5)
        inputs = batch_of(hard)
        (_, hard_inputs), _ = inputs_of_second_pass(hard, inputs)
        (_, soft_inputs), _ = inputs_of_second_pass(soft, inputs)
        torch.testing.assert_close(hard_inputs, soft_inputs, rtol=1e-4, atol=1e-5)

    def test_expected_embedding_equals_its_definition(self, tmp_path, tokenizer):
        for family in ("llama", "gemma2"):
            trainer = make(tmp_path, tokenizer, family, ift_prediction="expected", ift_temperature=0.7)
            inputs = batch_of(trainer)
            (first, second), _ = inputs_of_second_pass(trainer, inputs, 0.3)
            with torch.no_grad():
                logits = trainer.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
                table = trainer.model.get_input_embeddings()(torch.arange(len(tokenizer))[None])[0]
            mean = (logits[:, :-1] / 0.7).softmax(-1) @ table
            expected = first.clone()
            replaced = inputs["labels"][:, 1:] != -100
            expected[:, 1:][replaced] = (0.7 * first[:, 1:] + 0.3 * mean)[replaced]
            torch.testing.assert_close(second, expected, rtol=1e-5, atol=1e-5)

    def test_topk(self, tmp_path, tokenizer):
        inputs = batch_of(make(tmp_path, tokenizer))
        seconds = {}
        for name, settings in {
            "argmax": {},
            "top1": {"ift_prediction": "topk", "ift_top_k": 1},
            "top3": {"ift_prediction": "topk", "ift_top_k": 3},
            "all": {"ift_prediction": "topk", "ift_top_k": 10**6},
            "expected": {"ift_prediction": "expected"},
            "all, cooler": {"ift_prediction": "topk", "ift_top_k": 10**6, "ift_temperature": 0.2},
            "expected, cooler": {"ift_prediction": "expected", "ift_temperature": 0.2},
        }.items():
            (_, seconds[name]), _ = inputs_of_second_pass(make(tmp_path, tokenizer, **settings), inputs)
        torch.testing.assert_close(seconds["top1"], seconds["argmax"])
        torch.testing.assert_close(seconds["all"], seconds["expected"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(seconds["all, cooler"], seconds["expected, cooler"], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(seconds["top3"], seconds["argmax"])

    def test_samples_follow_the_distribution_and_the_seed(self, tmp_path, tokenizer):
        data = tiny.tokenized_data(tokenizer).select([1])
        trainer = make(tmp_path, tokenizer, ift_prediction="sample", ift_temperature=0.2, data=data)
        inputs = batch_of(trainer)
        with torch.no_grad():
            logits = trainer.model(input_ids=inputs["input_ids"]).logits
            table = trainer.model.get_input_embeddings()(torch.arange(len(tokenizer)))
        position = (inputs["labels"][0, 1:] != -100).nonzero()[0].item()
        counts = torch.zeros(len(tokenizer))
        for seed in range(1500):
            (_, second), _ = inputs_of_second_pass(trainer, inputs, 1.0, ift_seed=seed)
            counts[(table - second[0, position + 1]).abs().sum(-1).argmin()] += 1
        probabilities = (logits[0, position] / 0.2).softmax(-1)
        for token in probabilities.topk(5).indices:
            expected = probabilities[token].item()
            assert counts[token].item() / 1500 == pytest.approx(expected, abs=4 * math.sqrt(expected / 1500) + 1e-3)
        (_, again), _ = inputs_of_second_pass(trainer, inputs, 1.0, ift_seed=3)
        (_, same), _ = inputs_of_second_pass(trainer, inputs, 1.0, ift_seed=3)
        assert torch.equal(again, same)

    def test_seeds_of_samples_go_with_step_and_micro_batch(self, tmp_path, tokenizer):
        for start in (0, 1):  # of a new run, and of one resumed after its first step
            trainer = make(tmp_path, tokenizer, ift_prediction="sample", seed=3)
            for step in (start, start + 1):
                trainer.state.global_step = step
                found = [trainer._next_seed(training=True) for _ in range(3)]
                assert found == [_mix_seeds(3, step, count, 0) for count in range(3)]
                assert trainer._next_seed(training=False) == _mix_seeds(3, 0)

    @pytest.mark.parametrize("prediction", PREDICTIONS)
    @pytest.mark.parametrize("family", ["llama", "gemma"])
    def test_all_train(self, tmp_path, tokenizer, prediction, family):
        settings = {"ift_top_k": 3} if prediction == "topk" else {}
        trainer = make(tmp_path, tokenizer, family, ift_prediction=prediction, **settings)
        before = {name: value.clone() for name, value in trainer.model.named_parameters()}
        trainer.train()
        assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
        assert all(not torch.equal(before[name], value) for name, value in trainer.model.named_parameters())


PARITY = {
    "plain": {},
    "text": {"data": tiny.text_data},
    "conversational": {"data": tiny.conversational_data},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "lora": {"peft_config": LORA},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": tiny.prompt_completion_data},
    "packing": {"packing": True, "max_length": 48, "per_device_train_batch_size": 1},
    "packing-wrapped": {
        "packing": True,
        "packing_strategy": "wrapped",
        "max_length": 48,
        "per_device_train_batch_size": 1,
    },
    "padding-free": {"padding_free": True, "max_length": None},
    "truncation": {"max_length": 12},
    "checkpointing": {"gradient_checkpointing": True},
    "bf16": {"bf16": True},
    "moe": {"model": "qwen3-moe"},
    "moe-accumulation": {"model": "qwen3-moe", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "gemma2": {"model": "gemma2"},
}


def built(settings):
    settings = dict(settings)
    for key in ("data", "eval_dataset"):
        if key in settings:
            settings[key] = settings[key]()
    if "peft_config" in settings:
        settings["peft_config"] = LoraConfig(**settings["peft_config"])
    return settings


@pytest.mark.parametrize("case", PARITY)
def test_neutral_setting_equals_sft(tmp_path, tokenizer, case):
    """lambda 0, gamma 0, token normalisation: the log history of `trl.SFTTrainer`."""
    settings = PARITY[case]
    ours = make(tmp_path, tokenizer, **built(settings), **NEUTRAL)
    theirs = make(tmp_path, tokenizer, **built(settings), cls=SFTTrainer)
    ours.train()
    theirs.train()
    assert len(ours.state.log_history) == len(theirs.state.log_history)
    tolerance = 3e-2 if case == "bf16" else 1e-6
    for found, expected in zip(history(ours), history(theirs), strict=True):
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=tolerance, abs=tolerance), key
    for entry in history(ours):
        for prefix in ("", "eval_"):
            if f"{prefix}loss" in entry and "moe" not in case:
                assert entry[f"{prefix}sft_loss"] == pytest.approx(entry[f"{prefix}ift/fused_loss"], rel=1e-6)


class TestAccumulation:
    @pytest.mark.parametrize("normalization", ["sequence", "token"])
    @pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
    def test_splits_give_the_same_run(self, tmp_path, tokenizer, normalization, family):
        """Exact whatever the micro-batch: rows differ in length, so means of means would differ."""
        extra = {"router_aux_loss_coef": 0.0} if family == "qwen3-moe" else {}
        runs = []
        for size, steps in ((4, 1), (2, 2), (1, 4)):
            trainer = make(
                tmp_path,
                tokenizer,
                family,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=steps,
                ift_loss_normalization=normalization,
                **extra,
            )
            trainer.train()
            runs.append(
                [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
            )
        for other in runs[1:]:
            for left, right in zip(runs[0], other, strict=True):
                assert left == pytest.approx(right, rel=2e-5)

    def test_sft_loss_is_the_loss_of_sft(self, tmp_path, tokenizer):
        settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 1}
        ours = make(tmp_path, tokenizer, **settings)
        theirs = make(tmp_path, tokenizer, cls=SFTTrainer, **settings)
        ours.train()
        theirs.train()
        assert ours.state.log_history[0]["sft_loss"] == pytest.approx(theirs.state.log_history[0]["loss"], rel=1e-6)

    def test_packed_documents_count_equally(self, tmp_path, tokenizer):
        """Micro-batches of a packed run hold different numbers of documents; each document still counts once."""
        data = tiny.tokenized_data(tokenizer)
        packed = make(
            tmp_path, tokenizer, data=data, packing=True, max_length=48, per_device_train_batch_size=1,
            gradient_accumulation_steps=100, max_steps=1,
        )  # fmt: skip
        padded = make(tmp_path, tokenizer, data=data, per_device_train_batch_size=8, max_steps=1)
        assert len(packed.train_dataset) > 1
        packed.train()
        padded.train()
        first, second = packed.state.log_history[0], padded.state.log_history[0]
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
        assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-4)


class TestOptions:
    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("lora", [True, False])
    @pytest.mark.parametrize("freeze", [True, False])
    def test_gradient_checkpointing(self, tmp_path, tokenizer, reentrant, lora, freeze):
        peft_config = {"peft_config": LoraConfig(**LORA)} if lora else {}
        plain = make(tmp_path, tokenizer, ift_freeze_input_embeddings=freeze, **peft_config)
        settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        saving = make(tmp_path, tokenizer, ift_freeze_input_embeddings=freeze, **settings, **peft_config)
        switches = {id(m) for m in saving.model.modules() if hasattr(m, "gradient_checkpointing")}
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*None of the inputs have requires_grad.*")
            plain.train()
            saving.train()
        switched = [m for m in saving.model.modules() if hasattr(m, "gradient_checkpointing")]
        assert {id(module) for module in switched} == switches
        # The first pass, which goes without, leaves it on
        assert any(module.gradient_checkpointing for module in switched)
        for found, expected in zip(history(saving), history(plain), strict=True):
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)

    @pytest.mark.parametrize("mixed", ["autocast", "weights"])
    def test_bf16_trains_every_parameter(self, tmp_path, tokenizer, mixed):
        model = tiny.model("llama", tokenizer)
        if mixed == "weights":
            model = model.bfloat16()
        trainer = make(tmp_path, tokenizer, model, bf16=True)
        inputs = batch_of(trainer)
        with (
            trainer.compute_loss_context_manager(),
            torch.autocast("cpu", torch.bfloat16, enabled=mixed == "autocast"),
        ):
            loss, gradients = loss_and_gradients(trainer, inputs)
        twin = double(model.float())
        expected = naive_ift(twin, inputs)
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=2e-2)
        # Without care, weights cast by the first pass (no gradient) serve the second and receive none
        assert gradients.keys() == {name for name, _ in twin.named_parameters()}
        for name, parameter in twin.named_parameters():
            cosine = torch.cosine_similarity(gradients[name].double().flatten(), parameter.grad.flatten(), dim=0)
            assert cosine > 0.95, (name, cosine)

    @pytest.mark.parametrize(
        "data",
        [tiny.text_data, tiny.prompt_completion_data, tiny.messages_data, tiny.conversational_data, "tokenized"],
    )
    def test_data_formats(self, tmp_path, tokenizer, data):
        rows = tiny.tokenized_data(tokenizer) if data == "tokenized" else data()
        trainer = make(tmp_path, tokenizer, data=rows, max_steps=40)
        trainer.train()
        assert trainer.state.log_history[-2]["sft_loss"] < trainer.state.log_history[0]["sft_loss"] - 1
        labels = [label for row in trainer.train_dataset["labels"] for label in row]
        masked = data in (tiny.prompt_completion_data, tiny.conversational_data, "tokenized")
        assert (-100 in labels) == masked

    @pytest.mark.parametrize("setting", [{"assistant_only_loss": True}, {"completion_only_loss": False}])
    def test_label_masks(self, tmp_path, tokenizer, setting):
        data = tiny.messages_data() if "assistant_only_loss" in setting else tiny.prompt_completion_data()
        trainer = make(tmp_path, tokenizer, data=data, **setting)
        inputs = batch_of(trainer)
        loss, _ = loss_and_gradients(trainer, inputs)
        assert ((inputs["labels"] == -100) & inputs["attention_mask"].bool()).any() == (
            "assistant_only_loss" in setting
        )
        assert loss == pytest.approx(naive_ift(double(trainer.model), inputs).item(), rel=1e-5)

    def test_iterable_dataset(self, tmp_path, tokenizer):
        plain = make(tmp_path, tokenizer)
        stream = make(tmp_path, tokenizer, data=tiny.prompt_completion_data().to_iterable_dataset())
        inputs = next(iter(stream.get_train_dataloader()))
        loss, _ = loss_and_gradients(stream, inputs)
        assert loss == pytest.approx(loss_and_gradients(plain, inputs)[0], rel=1e-6)
        stream.train()
        assert stream.state.global_step == 3

    def test_evaluation(self, tmp_path, tokenizer):
        """Same loss as in training but without noise; the first pass is SFT's loss; nothing in training moves."""
        data = tiny.prompt_completion_data()
        parts = make(tmp_path, tokenizer, eval_dataset=data, per_device_eval_batch_size=3).evaluate()
        noisy = make(tmp_path, tokenizer, eval_dataset=data, ift_lambda_noise_std=0.9, per_device_eval_batch_size=8)
        quiet = make(tmp_path, tokenizer, eval_dataset=data, per_device_eval_batch_size=8)
        sft = make(tmp_path, tokenizer, eval_dataset=data, per_device_eval_batch_size=8, cls=SFTTrainer)
        first, second = noisy.evaluate(), noisy.evaluate()
        expected = quiet.evaluate()
        for key in ("eval_loss", "eval_sft_loss", "eval_ift/fused_loss"):
            assert first[key] == second[key] == expected[key]
        assert first["eval_sft_loss"] == pytest.approx(sft.evaluate()["eval_loss"], rel=1e-6)
        for key in ("eval_sft_loss", "eval_ift/fused_loss", "eval_ift/greedy_match"):
            assert parts[key] == pytest.approx(first[key], rel=1e-6)  # over tokens, however they are batched
        batch = next(iter(quiet.get_eval_dataloader()))
        assert first["eval_loss"] == pytest.approx(naive_ift(double(quiet.model), batch).item(), rel=1e-5)
        with pytest.raises(ValueError, match="`held dataset`, row 1: column 'completion' is null"):
            quiet.evaluate({"held": Dataset.from_list([{"prompt": "a", "completion": end} for end in ("b", None)])})
        fresh = quiet.evaluate(tiny.messages_data())
        assert math.isfinite(fresh["eval_sft_loss"])

    def test_metrics_are_means_over_tokens(self, tmp_path, tokenizer):
        """On answers that the model gives itself, and whose ends are others, in batches of 3 and 1 rows."""
        model = tiny.model("llama", tokenizer)
        twin, rows, expected = double(model), [], {"sft_loss": [], "ift/fused_loss": [], "ift/greedy_match": []}
        for number, (question, _) in enumerate(tiny.QUESTIONS[:4], 2):
            ids = tokenizer(question)["input_ids"]
            start = len(ids)
            with torch.no_grad():
                for _ in range(number):
                    ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
            ids += [11, 12, 13]
            rows.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
            true = torch.tensor(ids)
            with torch.no_grad():
                first = twin(true[None]).logits[0, :-1].log_softmax(-1)
                guessed = torch.cat([true[:start], first.argmax(-1)[start - 1 :]])
                mixed = 0.8 * twin.get_input_embeddings()(true) + 0.2 * twin.get_input_embeddings()(guessed)
                second = twin(inputs_embeds=mixed[None]).logits[0, :-1].log_softmax(-1)
            for position in range(start - 1, len(ids) - 1):
                target = ids[position + 1]
                expected["sft_loss"].append(-first[position, target].item())
                expected["ift/fused_loss"].append(-second[position, target].item())
                expected["ift/greedy_match"].append(float(guessed[position + 1] == target))
        found = make(tmp_path, tokenizer, model, eval_dataset=Dataset.from_list(rows)).evaluate()
        assert sum(expected["ift/greedy_match"]) == 2 + 3 + 4 + 5
        for name, values in expected.items():
            assert found[f"eval_{name}"] == pytest.approx(sum(values) / len(values), rel=1e-5), name
        assert found["eval_ift/lambda"] == 0.2

    def test_predictions_do_not_change_the_next_evaluation(self, tmp_path, tokenizer):
        trainer = make(tmp_path, tokenizer, eval_dataset=tiny.prompt_completion_data().select(range(4)))
        first = trainer.evaluate()
        trainer.predict(trainer.train_dataset.select(range(4, 8)))
        second = trainer.evaluate()
        names = [name for name in first if "ift" in name or "entropy" in name or "sft" in name]
        assert len(names) >= 4
        assert {name: first[name] for name in names} == {name: second[name] for name in names}

    @pytest.mark.parametrize("prediction", ["argmax", "sample"])
    def test_evaluation_does_not_change_the_run(self, tmp_path, tokenizer, prediction):
        with_eval = make(
            tmp_path, tokenizer, eval_dataset=tiny.prompt_completion_data(), eval_strategy="steps", eval_steps=1,
            ift_prediction=prediction, ift_lambda_noise_std=0.5,
        )  # fmt: skip
        without = make(tmp_path, tokenizer, ift_prediction=prediction, ift_lambda_noise_std=0.5)
        with_eval.train()
        without.train()
        trained = [entry for entry in history(with_eval) if "loss" in entry]
        assert trained == [entry for entry in history(without) if "loss" in entry]

    def test_dropout_is_switched_off(self, tmp_path, tokenizer):
        peft_config = LoraConfig(lora_dropout=0.5, **LORA)
        off = make(tmp_path, tokenizer, peft_config=peft_config)
        on = make(tmp_path, tokenizer, peft_config=peft_config, disable_dropout=False)
        probabilities = [
            {m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)} for trainer in (off, on)
        ]
        assert probabilities == [{0}, {0.5}]
        attention = make(tmp_path, tokenizer, tiny.model("llama", tokenizer, attention_dropout=0.5))
        inputs = batch_of(attention)
        assert loss_and_gradients(attention, inputs)[0] == loss_and_gradients(attention, inputs)[0]

    def test_a_copy_runs_its_own_weights(self, tmp_path, tokenizer):
        trainer = make(tmp_path, tokenizer)
        inputs = batch_of(trainer)
        twin = copy.deepcopy(trainer.model)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(0.5)
            ours, copied = (m(**inputs, fused_lm_head=True, ift_lambda=0.2) for m in (trainer.model, twin))
        assert not torch.allclose(ours.log_probs, copied.log_probs)
        assert not torch.allclose(ours.sft_nll_sum, copied.sft_nll_sum)

    def test_lambda_schedule_and_noise_are_logged(self, tmp_path, tokenizer):
        trainer = make(
            tmp_path, tokenizer, max_steps=5, ift_lambda_schedule="linear", ift_lambda=0.4, ift_lambda_warmup_steps=4
        )
        trainer.train()
        values = [entry["ift/lambda"] for entry in trainer.state.log_history if "loss" in entry]
        assert values == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
        noisy = make(tmp_path, tokenizer, max_steps=5, ift_lambda_noise_std=0.5)
        noisy.train()
        assert len({entry["ift/lambda"] for entry in noisy.state.log_history if "loss" in entry}) == 5

    def test_negative_coefficients_are_logged_under_full(self, tmp_path, tokenizer):
        # Answers are noise, their end is certain: the case in which the released gradient works against EOS
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(10, 250, (64, 12), generator=generator).tolist()
        data = Dataset.from_list([{"input_ids": [*row, tokenizer.eos_token_id]} for row in rows])
        trainer = make(tmp_path, tokenizer, data=data, max_steps=120, per_device_train_batch_size=16)
        trainer.train()
        full = make(tmp_path, tokenizer, trainer.model, data, ift_propagation_grad="full", max_steps=1)
        inputs = batch_of(full)
        with torch.no_grad():
            nll = -full.model(**inputs, fused_lm_head=True, ift_lambda=0.2).log_probs
        future = torch.zeros(nll.shape, dtype=torch.float64)
        past, reach = future.clone(), future.clone()
        for t in range(nll.size(1)):
            powers = 0.95 ** (torch.arange(nll.size(1)) - t).abs().double()
            future[:, t] = (powers * nll)[:, t:].sum(1)
            past[:, t] = (powers * nll)[:, : t + 1].sum(1)
            reach[:, t] = powers[: t + 1].sum()
        total = future.sum(1, keepdim=True)
        coefficients = (future + past - (nll * future).sum(1, keepdim=True) / total * reach) / total
        share = (coefficients < 0).double().mean().item()
        assert share > 0
        assert (coefficients[:, -1] < 0).all()
        full.train()
        assert full.state.log_history[0]["ift/negative_coefficients"] == pytest.approx(share, abs=1e-6)
        assert "ift/negative_coefficients" not in trainer.state.log_history[0]

        def counted(*rows):
            full.__dict__.pop("_sums", None)
            full.compute_loss(full.model, full.data_collator([{"input_ids": row} for row in rows]))
            return full._sums["train"]["ift/negative_coefficients"]

        assert torch.equal(counted(rows[0], rows[1][:4]), counted(rows[0]) + counted(rows[1][:4]))  # padding is none

    def test_untrained_rows_and_batches(self, tmp_path, tokenizer):
        rows = tiny.tokenized_data(tokenizer).to_list()
        for row in rows[4:]:
            row["labels"] = [-100] * len(row["labels"])
        trainer = make(
            tmp_path,
            tokenizer,
            data=Dataset.from_list(rows),
            max_length=None,
            per_device_train_batch_size=2,
            max_steps=4,
        )
        trainer.train()
        assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
        inputs = trainer.data_collator([rows[0], rows[5]])
        loss, _ = loss_and_gradients(trainer, inputs)
        alone, _ = loss_and_gradients(trainer, trainer.data_collator([rows[0]]))
        assert loss == pytest.approx(alone, rel=1e-6)
        nothing, gradients = loss_and_gradients(trainer, trainer.data_collator([rows[5], rows[6]]))
        assert nothing == 0
        assert all((gradient == 0).all() for gradient in gradients.values())

    def test_moe_adds_the_router_loss_of_the_second_pass(self, tmp_path, tokenizer):
        weighted = make(tmp_path, tokenizer, "qwen3-moe", router_aux_loss_coef=0.5)
        plain = make(tmp_path, tokenizer, "qwen3-moe", router_aux_loss_coef=0.0)
        inputs = batch_of(weighted)
        with torch.no_grad():
            aux = weighted.model(
                **inputs, fused_lm_head=True, ift_lambda=0.2, output_router_logits=True, use_cache=False
            ).aux_loss
        difference = loss_and_gradients(weighted, inputs)[0] - loss_and_gradients(plain, inputs)[0]
        assert difference == pytest.approx(0.5 * aux.item(), rel=1e-4)

    def test_compute_metrics(self, tmp_path, tokenizer):
        seen = []

        def compute_metrics(prediction):
            seen.append(prediction.predictions.shape)
            return {"rows": len(prediction.predictions)}

        trainer = IFTTrainer(
            model=tiny.model("llama", tokenizer),
            args=IFTConfig(**options(tmp_path, per_device_eval_batch_size=8)),
            train_dataset=tiny.prompt_completion_data(),
            eval_dataset=tiny.prompt_completion_data(),
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
        )
        metrics = trainer.evaluate()
        assert metrics["eval_rows"] == 8
        assert math.isfinite(metrics["eval_loss"])


class TestAdapters:
    def test_lora_trains_only_the_adapter(self, tmp_path, tokenizer, model_dir):
        trainer = make(tmp_path, tokenizer, model_dir, peft_config=LoraConfig(**LORA))
        before = {name: value.clone() for name, value in trainer.model.named_parameters()}
        trainer.train()
        trainer.save_model()
        for name, value in trainer.model.named_parameters():
            assert torch.equal(before[name], value) == ("lora_" not in name), name
        base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        loaded = PeftModel.from_pretrained(base, trainer.args.output_dir)
        inputs = batch_of(trainer, train=False)
        plain = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        with torch.no_grad():
            torch.testing.assert_close(loaded(**plain).logits, trainer.model(**plain).logits, rtol=1e-5, atol=1e-5)

    def test_existing_adapter_and_modules_to_save(self, tmp_path, tokenizer):
        model = get_peft_model(
            tiny.model("llama", tokenizer), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
        )
        trainer = make(tmp_path, tokenizer, model)
        before = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
        assert any("lm_head" in name for name in before)
        trainer.train()
        assert all(not torch.equal(before[name], dict(model.named_parameters())[name]) for name in before)

    def test_lora_on_the_embeddings(self, tmp_path, tokenizer):
        peft_config = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])
        trainer = make(tmp_path, tokenizer, peft_config=peft_config)
        before = {name: value.clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
        trainer.train()
        trained = dict(trainer.model.named_parameters())
        assert all(not torch.equal(before[name], trained[name]) for name in before)

    @pytest.mark.parametrize("double_quantization", [False, True])
    def test_qlora(self, tmp_path, tokenizer, model_dir, double_quantization):
        """4-bit base on CPU: evaluation before and between steps must not spoil the gradients."""
        pytest.importorskip("bitsandbytes")
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quantization,
            bnb_4bit_compute_dtype=torch.float32,
        )
        norms = []
        for evaluate_first in (False, True):
            trainer = make(
                tmp_path, tokenizer, model_dir, peft_config=LoraConfig(**LORA), quantization_config=quantization,
                eval_dataset=tiny.prompt_completion_data(),
            )  # fmt: skip
            assert trainer.model.get_base_model().is_loaded_in_4bit
            if evaluate_first:
                trainer.evaluate()
            trainer.train()
            norms.append([entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry])
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
        assert min(norms[0]) > 0

    def test_packed_4bit_weights_are_refused(self, tmp_path, tokenizer, model_dir):
        pytest.importorskip("bitsandbytes")
        model = AutoModelForCausalLM.from_pretrained(
            model_dir, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
        )
        layer = next(module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu"))
        layer.weight.quant_state.packing_format_for_cpu = True  # what a forward in eval mode leaves on AVX512-BF16
        with pytest.raises(ValueError, match="packed for inference"):
            make(tmp_path, tokenizer, model, peft_config=LoraConfig(**LORA))


class TestResume:
    @pytest.mark.parametrize(
        ("settings", "lora"),
        [
            ({}, False),
            ({"ift_lambda_noise_std": 0.5, "ift_prediction": "sample", "gradient_accumulation_steps": 2}, False),
            ({"ift_lambda_schedule": "linear", "ift_lambda_warmup_steps": 4, "packing": True, "max_length": 48}, True),
            ({"streaming": True}, True),
        ],
    )
    def test_resumed_equals_uninterrupted(self, tmp_path, tokenizer, settings, lora):
        """Bit for bit: weights, and every logged value including `num_tokens`."""

        settings = dict(settings)
        data = tiny.prompt_completion_data()
        data = data.to_iterable_dataset() if settings.pop("streaming", False) else data

        def trainer(folder):
            peft_config = {"peft_config": LoraConfig(**LORA)} if lora else {}
            return make(
                tmp_path / folder, tokenizer, data=data, max_steps=6, save_strategy="steps", save_steps=3,
                per_device_train_batch_size=2, **settings, **peft_config,
            )  # fmt: skip

        whole = trainer("whole")
        whole.train()
        resumed = trainer("whole")
        resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-3"))
        assert [e for e in history(resumed) if "loss" in e] == [e for e in history(whole) if "loss" in e]
        for (name, left), (_, right) in zip(
            whole.model.named_parameters(), resumed.model.named_parameters(), strict=True
        ):
            assert torch.equal(left, right), name


SCRIPT = Path(__file__).parent / "two_processes.py"


@pytest.mark.slow
def test_two_processes_equal_accumulation(tmp_path, tokenizer, model_dir):
    """2 gloo processes with batch 2 = 1 process with 2 accumulation steps of batch 2; neutral setting = SFT there."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    process = subprocess.Popen(
        [*command, model_dir, str(tmp_path / "two")], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, errors = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # torchrun's workers too
        raise
    assert process.returncode == 0, errors[-3000:]
    found = json.loads((tmp_path / "two" / "history.json").read_text())
    two, evaluations = found["train"], found["eval"]
    for case, settings in {
        "sequence": {},
        "own": {},  # each process divides by its own documents, which are as many
        "token": {"ift_loss_normalization": "token"},
        "neutral": NEUTRAL,
        "sft": {"cls": SFTTrainer},
    }.items():
        one = make(
            tmp_path / case,
            tokenizer,
            model_dir,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            gradient_accumulation_steps=2,
            eval_dataset=tiny.prompt_completion_data(),
            **settings,
        )
        one.train()
        assert evaluations[case] == pytest.approx(one.evaluate()["eval_loss"], rel=2e-5), case
        losses = [entry for entry in history(one) if "loss" in entry]
        assert len(two[case]) == len(losses)
        for found, expected in zip(two[case], losses, strict=True):
            for key in ("loss", "grad_norm", "num_tokens"):
                assert found[key] == pytest.approx(expected[key], rel=2e-5), (case, key)
    for found, expected in zip(two["neutral"], two["sft"], strict=True):
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-6, abs=1e-6), key
