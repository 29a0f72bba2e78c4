"""PreferenceTrainer on tiny models: against DPOTrainer bit for bit, and against independent computations."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from two_processes_preference import (
    RUNS,
    TOYS,
    AttachedToy,
    BatchTokenToy,
    GradientRecorder,
    RowToy,
    SameHead,
    ToyTrainer,
    attached_rows,
    history,
    options,
    run,
    toy_gradients,
    unequal_triples,
)

from trl_ift.preference.collator import Branch, PreferenceCollator
from trl_ift.preference.trainer import PreferenceTrainer, Term
from trl_ift.trl_internals import TRL_PAIR_LOSSES


LORA = {"r": 4, "target_modules": "all-linear"}
ARGUMENTS = (
    "ref_model", "eval_dataset", "peft_config", "quantization_config", "callbacks", "processing_class", "compute_metrics",
)  # fmt: skip


def make(tmp_path, model, data=None, cls=PreferenceTrainer, **settings):
    arguments = {name: settings.pop(name) for name in ARGUMENTS if name in settings}
    config_class = getattr(cls, "config_class", DPOConfig)
    return cls(
        model=model,
        args=config_class(**options(tmp_path / "run", **settings)),
        train_dataset=tiny.preference_data() if data is None else data,
        **arguments,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """Folder of a tiny model of a family, by its name and seed."""
    made = {}

    def folder(family="llama", seed=0):
        if (family, seed) not in made:
            path = tmp_path_factory.mktemp(f"{family}-{seed}")
            tiny.model(family, tokenizer, seed).save_pretrained(path)
            tokenizer.save_pretrained(path)
            made[family, seed] = str(path)
        return made[family, seed]

    return folder


def adapted(path, config=None):
    """A PEFT model whose adapter is not zero."""
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), config or LoraConfig(**LORA))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def implicit():
    return tiny.implicit_preference_data()


LOSS_OPTIONS = {name: {"label_smoothing": 0.1} for name in ("exo_pair", "robust", "aot", "aot_unpaired")}
LOSS_OPTIONS["discopop"] = {"discopop_tau": 0.1}
# Settings under which the trainer must equal TRL's; callables get the folders and make an argument anew for each trainer
PARITY = {
    "fp32": {},
    "instance": {"model": lambda folder: AutoModelForCausalLM.from_pretrained(folder())},
    "bf16 autocast": {"bf16": True},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "lora": {"peft_config": lambda _: LoraConfig(**LORA)},
    "existing adapter": {"model": lambda folder: adapted(folder())},
    "prompt tuning": {"peft_config": lambda _: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)},
    "precompute": {"precompute_ref_log_probs": True},
    "lora precompute": {"peft_config": lambda _: LoraConfig(**LORA), "precompute_ref_log_probs": True},
    "evaluation": {
        "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4,
        "eval_dataset": lambda _: tiny.preference_data().select(range(5)),
    },
    "evaluation sets": {
        "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4,
        "eval_dataset": lambda _: {"a": tiny.preference_data().select(range(5)), "b": implicit().select([6, 7])},
    },
    "evaluation precompute": {
        "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "precompute_ref_log_probs": True,
        "eval_dataset": lambda _: {"a": tiny.preference_data().select(range(5)), "b": implicit().select([6, 7])},
    },
    "iterable": {"data": lambda _: tiny.preference_data().to_iterable_dataset()},
    "moe": {"model": lambda folder: folder("qwen3-moe")},
    "tied": {"model": lambda folder: folder("llama-tied")},
    "softcap": {"model": lambda folder: folder("gemma2")},
    "checkpointing": {"gradient_checkpointing": True},
    "lora checkpointing": {"gradient_checkpointing": True, "peft_config": lambda _: LoraConfig(**LORA)},
    "reentrant checkpointing": {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "losses": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "ld_alpha": {"ld_alpha": 0.3},
    "ld_alpha precompute": {"ld_alpha": 0.3, "precompute_ref_log_probs": True},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
    "weighting": {"use_weighting": True},
    "synchronised reference": {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
    "lora and an explicit reference": {
        "peft_config": lambda _: LoraConfig(**LORA),
        "ref_model": lambda folder: AutoModelForCausalLM.from_pretrained(folder(seed=1)),
    },
    "trained head": {
        "peft_config": lambda _: LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    },
    "bf16 weights": {"model_init_kwargs": {"dtype": "bfloat16"}},
    "existing prompt": {
        "model": lambda folder: adapted(folder(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    },
    "explicit reference": {"ref_model": lambda folder: AutoModelForCausalLM.from_pretrained(folder(seed=1))},
    "implicit prompt": {"data": lambda _: implicit()},
    "conversational": {"data": lambda _: tiny.conversational_preference_data()},
    "truncation": {"max_length": 20},
    "truncation of the start": {"max_length": 20, "truncation_mode": "keep_end"},
    **{f"loss {loss}": {"loss_type": [loss]} | LOSS_OPTIONS.get(loss, {}) for loss in TRL_PAIR_LOSSES},
}  # fmt: skip


def parity_run(tmp_path, folders, cls, settings):
    made = {
        name: value(folders) if callable(value) and not isinstance(value, type) else value
        for name, value in settings.items()
    }
    made.setdefault("model", folders())
    trainer = make(tmp_path, cls=cls, **made)
    trainer.train()
    return trainer


class TestParity:
    @pytest.mark.parametrize("case", PARITY)
    def test_equals_dpo_trainer(self, tmp_path, folders, case):
        """Bit for bit, in every logged value."""
        theirs = parity_run(tmp_path / "theirs", folders, DPOTrainer, PARITY[case])
        ours = parity_run(tmp_path / "ours", folders, SameHead, PARITY[case])
        assert history(ours) == history(theirs)
        for (name, left), (_, right) in zip(
            theirs.model.named_parameters(), ours.model.named_parameters(), strict=True
        ):
            assert torch.equal(left, right), name

    def test_compute_metrics(self, tmp_path, folders):
        """Logits of the pairs, from a second pass."""
        seen = []

        def compute_metrics(prediction):
            seen.append(prediction)
            return {"mean": float(prediction.predictions.mean())}

        for cls in (DPOTrainer, SameHead, ToyTrainer):
            data = tiny.triple_data()
            trainer = make(
                tmp_path, folders(), data, cls, eval_dataset=data, compute_metrics=compute_metrics,
                per_device_eval_batch_size=8,
            )  # fmt: skip
            trainer.evaluate()
        for prediction in seen:
            assert (prediction.predictions == seen[0].predictions).all()
            assert (prediction.label_ids == seen[0].label_ids).all()

    @pytest.mark.parametrize("case", ["fp32", "lora", "losses", "evaluation", "prompt tuning", "weighting"])
    def test_labelled_positions_only(self, tmp_path, folders, case):
        """What is on by default: the same up to rounding."""
        theirs = history(parity_run(tmp_path / "theirs", folders, DPOTrainer, PARITY[case]))
        ours = history(parity_run(tmp_path / "ours", folders, PreferenceTrainer, PARITY[case]))
        assert [entry.keys() for entry in ours] == [entry.keys() for entry in theirs]
        for found, expected in zip(ours, theirs, strict=True):
            for key, value in expected.items():
                assert found[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


# ---------------------------------------------------------------- independent computations


def double(model):
    """A float64 twin of a tiny model, with the plain forward of its class."""
    config = copy.deepcopy(model.config)
    twin = type(model)(config).double()
    twin.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    return twin.train()


def token_ids(tokenizer, prompt, response):
    """Ids of a prompt and of its response, ended, from the texts or the messages."""
    if isinstance(prompt, str):
        prompt_ids = tokenizer(prompt)["input_ids"]
        ids = tokenizer(prompt + response + tokenizer.eos_token)["input_ids"]
    else:
        template = {"return_dict": False}
        prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **template)
        ids = tokenizer.apply_chat_template(prompt + response, **template)
    assert ids[: len(prompt_ids)] == prompt_ids
    return prompt_ids, ids[len(prompt_ids) :]


def naive_logps(model, tokenizer, prompt, response):
    """Log-probabilities of the tokens of one response, alone in a plain forward, from all its logits."""
    prompt_ids, response_ids = token_ids(tokenizer, prompt, response)
    ids = torch.tensor([[*prompt_ids, *response_ids]])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.size(1) :]
    logps = logits[:-1].log_softmax(-1)[torch.arange(ids.size(1) - 1), ids[0, 1:]]
    return logps[len(prompt_ids) - 1 :]


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_and_gradients(trainer, rows):
    """Loss and gradients of the rows with these numbers, as one micro-batch."""
    inputs = trainer.data_collator([trainer.train_dataset[row] for row in rows])
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), gradients_of(trainer.model)


def assert_gradients_close(found, expected, tolerance):
    """Largest difference of an element, relative to the largest element."""
    assert found.keys() == expected.keys()
    scale = max(value.abs().max() for value in expected.values())
    assert scale > 0
    for name, value in expected.items():
        difference = (found[name].double() - value.double()).abs().max() / scale
        assert difference < tolerance, (name, difference)


def naive_pair_loss(model, reference, tokenizer, row, loss_type="sigmoid", beta=0.1):
    """A loss of one pair from its definition."""
    with torch.no_grad():
        ref = [naive_logps(reference, tokenizer, row["prompt"], row[kind]) for kind in ("chosen", "rejected")]
    logps = [naive_logps(model, tokenizer, row["prompt"], row[kind]) for kind in ("chosen", "rejected")]
    ratios = [(policy - start).sum() for policy, start in zip(logps, ref, strict=True)]
    if loss_type == "ipo":
        difference = ratios[0] / len(logps[0]) - ratios[1] / len(logps[1])
        return (difference - 1 / (2 * beta)) ** 2
    return -F.logsigmoid(beta * (ratios[0] - ratios[1]))


WEIGHTS = [1.0, 3.0, 0.0, 0.5, 2.0, 0.25, 1.0, 0.0]


def weighted(weights=WEIGHTS):
    return tiny.preference_data().add_column("weight", [float(weight) for weight in weights])


class TestWeight:
    @pytest.mark.parametrize(
        "loss_type",
        [["sigmoid"], ["sigmoid", "sft"], ["sft"], ["ipo"], ["hinge"], ["bco_pair"], ["apo_zero"], ["sigmoid_norm"]],
        ids="+".join,
    )
    def test_unit_weights_change_nothing(self, tmp_path, folders, loss_type):
        """Bit for bit."""
        runs = [
            parity_run(tmp_path / str(i), folders, PreferenceTrainer, {"loss_type": loss_type, "data": lambda _, d=data: d})
            for i, data in enumerate((tiny.preference_data(), weighted([1] * 8)))
        ]  # fmt: skip
        plain, unit = map(history, runs)
        assert [entry.pop("weights/mean") for entry in unit if "loss" in entry] == [1.0] * 3
        assert unit == plain
        for left, right in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
            assert torch.equal(left, right)

    @pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "sigmoid+sft"])
    def test_against_float64(self, tmp_path, tokenizer, loss_type):
        model, reference = tiny.model("llama", tokenizer), tiny.model("llama", tokenizer, seed=1)
        twin, twin_reference = double(model), double(reference)
        trainer = make(
            tmp_path, model, weighted(), ref_model=reference, processing_class=tokenizer,
            loss_type=loss_type.split("+"), loss_weights=[1.0, 0.3][: loss_type.count("+") + 1],
        )  # fmt: skip
        loss, gradients = loss_and_gradients(trainer, range(4))
        rows = [weighted()[i] for i in range(4)]
        losses = [
            row["weight"] * naive_pair_loss(twin, twin_reference, tokenizer, row, loss_type.split("+")[0])
            for row in rows
        ]
        expected = torch.stack(losses).mean()
        if "sft" in loss_type:
            logps = [naive_logps(twin, tokenizer, row["prompt"], row["chosen"]) for row in rows]
            nll = -sum(row["weight"] * logp.sum() for row, logp in zip(rows, logps, strict=True))
            expected = expected + 0.3 * nll / sum(map(len, logps))
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=2e-6)
        assert_gradients_close(gradients, gradients_of(twin), 2e-5)

    def test_weights_of_single_pairs(self, tmp_path, tokenizer):
        """Weight 2 doubles the loss of a pair, weight 0 removes it."""

        def step(weights, rows):
            trainer = make(
                tmp_path, tiny.model("llama", tokenizer), weighted(weights), processing_class=tokenizer,
                ref_model=tiny.model("llama", tokenizer, seed=1),
            )  # fmt: skip
            return loss_and_gradients(trainer, rows)

        ones = [1] * 8
        (first, first_gradients), (second, second_gradients) = step(ones, [0]), step(ones, [1])
        loss, gradients = step([2, 1, *[1] * 6], [0, 1])
        assert loss == pytest.approx((2 * first + second) / 2, rel=1e-6)
        combined = {name: first_gradients[name] + second_gradients[name] / 2 for name in gradients}
        assert_gradients_close(gradients, combined, 1e-5)
        loss, gradients = step([0, 1, *[1] * 6], [0, 1])
        assert loss == pytest.approx(second / 2, rel=1e-6)
        assert_gradients_close(gradients, {name: value / 2 for name, value in second_gradients.items()}, 1e-5)
        loss, gradients = step([0] * 8, [0, 1])
        assert loss == 0
        assert all((gradient == 0).all() for gradient in gradients.values())

    @pytest.mark.parametrize(
        "case", ["fp32", "precompute", "lora", "iterable", "prompt tuning", "moe", "bf16 autocast"]
    )
    def test_with(self, tmp_path, folders, case):
        """Before the first step all log-ratios are 0 (but for new virtual tokens): the loss is log 2 times the weights."""
        data = weighted()
        settings = PARITY[case] | {
            "data": lambda _: data.to_iterable_dataset() if case == "iterable" else data,
            "eval_dataset": lambda _: {"one": data.select([1]), "two": data.select([1, 2])},
            "per_device_train_batch_size": 8, "max_steps": 1, "router_aux_loss_coef": 0.0 if case == "moe" else None,
        }  # fmt: skip
        trainer = parity_run(tmp_path, folders, PreferenceTrainer, settings)
        entry = trainer.state.log_history[0]
        assert entry["weights/mean"] == pytest.approx(sum(WEIGHTS) / 8)
        tolerance = 0.1 if case == "prompt tuning" else 1e-5
        assert entry["loss"] == pytest.approx(math.log(2) * sum(WEIGHTS) / 8, rel=tolerance)
        metrics = trainer.evaluate()
        assert [e["eval_weights/mean"] for e in trainer.state.log_history if "eval_weights/mean" in e] == [3.0, 1.5]
        assert metrics["eval_one_loss"] == pytest.approx(2 * metrics["eval_two_loss"], rel=1e-5)
        assert abs(metrics["eval_one_loss"] - 3 * math.log(2)) > 1e-3


# ---------------------------------------------------------------- a method of its own


def toy_loss(model, reference, tokenizer, rows, per="token", micro_batches=None):
    """The loss of `ToyTrainer` from its definition, one response at a time.

    `micro_batches` splits the rows, for the mean over the tokens of a micro-batch.
    """
    pair_losses, golds, rejected = [], [], []
    for row in rows:
        logps = {
            kind: naive_logps(model, tokenizer, row["prompt"], row[kind])
            for kind in ("chosen", "rejected", "reference")
        }
        with torch.no_grad():
            start = {kind: naive_logps(reference, tokenizer, row["prompt"], row[kind]).sum() for kind in logps}
        margin = (logps["chosen"].sum() - start["chosen"]) - (logps["rejected"].sum() - start["rejected"])
        p = row.get("label_prob", 1.0)
        pair_losses.append(
            row.get("weight", 1.0) * (-p * F.logsigmoid(0.1 * margin) - (1 - p) * F.logsigmoid(-0.1 * margin))
        )
        golds.append(logps["reference"])
        rejected.append(logps["rejected"].sum())
    if per == "token":
        gold = -torch.cat(golds).mean()
    elif per == "row":
        gold = -torch.stack([logps.sum() for logps in golds]).mean()
    else:
        means = [-torch.cat([golds[i] for i in numbers]).mean() for numbers in micro_batches]
        gold = torch.stack(means).mean()
    return torch.stack(pair_losses).mean() + 0.7 * gold + 0.01 * torch.stack(rejected).mean()


def triples(wider):
    """Triples whose gold responses make wider, or narrower, batches than the pairs."""
    rows = tiny.triple_data().select([1, 3] if wider else [0, 2, 6, 7]).to_list()
    gold = max(len(row["prompt"] + row["reference"]) for row in rows)
    pair = max(len(row["prompt"] + row[kind]) for row in rows for kind in ("chosen", "rejected"))
    assert (gold > pair + 20) if wider else (gold < pair)
    return Dataset.from_list([row | {"label_prob": 0.8} for row in rows])


class NoGold(ToyTrainer):
    """The toy without its branch."""

    branches = ()

    def branch_terms(self, batch):
        yield Term(-batch.rejected.logps.sum(), "rejected", "row", -0.01)


class Rewarded(ToyTrainer):
    """The toy with rewards of its own."""

    def implicit_rewards(self, batch):
        return batch.chosen.mean_logps, batch.rejected.mean_logps - 1


class ReferenceFree(ToyTrainer):
    uses_reference = False


class Storing(ToyTrainer):
    stores_reference = True


class TestMethod:
    """A method with an extra column, an extra branch, a loss of its own and further terms."""

    def test_batch(self, tmp_path, tokenizer):
        """What the collator gives and what the loss sees."""
        data = unequal_triples()
        trainer = make(
            tmp_path, tiny.model("llama", tokenizer), data, ToyTrainer, processing_class=tokenizer, pad_to_multiple_of=8
        )  # fmt: skip
        trainer._set_signature_columns_if_needed()
        assert trainer._signature_columns == [
            "prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps", "weight", "label_prob",
            "gold_rows",
        ]  # fmt: skip
        inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        assert inputs["weight"].tolist() == data["weight"][:]
        assert inputs["label_prob"].tolist() == pytest.approx(data["label_prob"][:])
        assert inputs["gold_pair"].tolist() == [0, 1, 2, 3]
        assert inputs["gold_input_ids"].size(1) % 8 == 0
        for index, row in enumerate(data):
            prompt, response = token_ids(tokenizer, row["prompt"], row["reference"])
            length = len(prompt) + len(response)
            ids, mask, completion = (
                inputs[f"gold_{key}"][index] for key in ("input_ids", "attention_mask", "completion_mask")
            )
            assert ids.tolist() == prompt + response + [tokenizer.pad_token_id] * (len(ids) - length)
            assert mask.tolist() == [1] * length + [0] * (len(ids) - length)
            assert completion.tolist() == [0] * len(prompt) + [1] * len(response) + [0] * (len(ids) - length)
        assert inputs["gold_input_ids"].size(1) > inputs["input_ids"].size(1)
        kept = {key: value.clone() for key, value in inputs.items()}
        trainer.compute_loss(trainer.model, inputs)
        assert all(torch.equal(inputs[key], value) for key, value in kept.items())
        assert inputs.keys() == kept.keys()
        seen = trainer.seen
        twin = double(trainer.model)
        for kind, responses in {"chosen": seen.chosen, "rejected": seen.rejected, **seen.branches}.items():
            column = "reference" if kind == "gold" else kind
            for index, row in enumerate(data):
                logps = naive_logps(twin, tokenizer, row["prompt"], row[column])
                assert responses.logps[index].item() == pytest.approx(logps.sum().item(), rel=1e-5)
                assert responses.mean_logps[index].item() == pytest.approx(logps.mean().item(), rel=1e-5)
                assert responses.lengths[index] == len(logps)
                prompt, response = token_ids(tokenizer, row["prompt"], row[column])
                span = slice(len(prompt) - 1, len(prompt) - 1 + len(logps))
                ids = torch.tensor([prompt + response])
                logits = twin(input_ids=ids).logits[0, :-1].log_softmax(-1)
                entropy = -(logits.exp() * logits).sum(-1)[span]
                torch.testing.assert_close(responses.entropy[index, span], entropy.float(), rtol=1e-4, atol=1e-5)
                assert torch.equal(responses.is_top1[index, span], (logits.argmax(-1) == ids[0, 1:])[span])
                torch.testing.assert_close(responses.token_logps[index, span], logps.float(), rtol=1e-4, atol=1e-5)
                assert responses.mask[index].sum() == responses.mask[index, span].sum() == len(logps)
                assert (responses.token_logps[index][~responses.mask[index]] == 0).all()
            shape = responses.token_logps.shape
            assert responses.mask.shape == responses.entropy.shape == responses.is_top1.shape == shape
            assert not responses.entropy.requires_grad
            assert (responses.entropy[~responses.mask] == 0).all()
            assert responses.pair.tolist() == [0, 1, 2, 3]
        assert seen.columns["label_prob"].tolist() == inputs["label_prob"].tolist()
        assert seen.branches["gold"].ref_logps is None

    @pytest.mark.parametrize("cls", [ToyTrainer, RowToy, BatchTokenToy])
    def test_gradient(self, tmp_path, tokenizer, cls):
        model, reference = tiny.model("llama", tokenizer), tiny.model("llama", tokenizer, seed=1)
        twins = double(model), double(reference)
        trainer = make(tmp_path, model, unequal_triples(), cls, ref_model=reference, processing_class=tokenizer)
        loss, gradients = loss_and_gradients(trainer, range(4))
        expected = toy_loss(*twins, tokenizer, unequal_triples().to_list(), cls.per, [range(4)])
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=2e-6)
        assert_gradients_close(gradients, gradients_of(twins[0]), 1e-5)

    @pytest.mark.parametrize("wider", [True, False])
    @pytest.mark.parametrize("adapter", [None, "lora", "prompt tuning"])
    @pytest.mark.parametrize("stored", [False, True])
    def test_widths(self, tmp_path, tokenizer, wider, adapter, stored):
        """Gold rows wider and narrower than the pairs, also beside virtual tokens; reference live and stored."""
        torch.manual_seed(0)
        config = {
            "lora": LoraConfig(**LORA, init_lora_weights=False),
            "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        }.get(adapter)
        model = tiny.model("llama", tokenizer)
        model = get_peft_model(model, config) if config else model
        trainer = make(
            tmp_path, model, triples(wider), ToyTrainer, processing_class=tokenizer, precompute_ref_log_probs=stored
        )  # fmt: skip
        rows = triples(wider).to_list()
        loss, gradients = loss_and_gradients(trainer, range(len(rows)))
        trainer.model.zero_grad()
        # Before the first step the reference is the policy, adapter included
        expected = toy_loss(trainer.model, trainer.model, tokenizer, rows)
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=2e-6)
        assert_gradients_close(gradients, gradients_of(trainer.model), 1e-5)
        for responses in (trainer.seen.chosen, trainer.seen.rejected, trainer.seen.branches["gold"]):
            shape = responses.token_logps.shape
            assert responses.mask.shape == responses.entropy.shape == responses.is_top1.shape == shape
            assert (responses.entropy[responses.mask] > 0).all()
            assert (responses.entropy[~responses.mask] == 0).all()
        for responses in (trainer.seen.chosen, trainer.seen.rejected):
            torch.testing.assert_close(responses.ref_logps, responses.logps, rtol=1e-5, atol=1e-5)
            if stored:
                assert responses.ref_token_logps is None
            else:
                torch.testing.assert_close(responses.ref_token_logps, responses.token_logps, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("reference", ["live", "precomputed", "lora"])
    def test_ld_alpha(self, tmp_path, tokenizer, reference):
        """Tokens beyond the shorter response of a pair count less, under policy and reference; not in a branch."""
        settings = {"ref_model": tiny.model("llama", tokenizer, seed=1), "ld_alpha": 0.3}
        if reference == "lora":
            settings = {"peft_config": LoraConfig(**LORA), "ld_alpha": 0.3}
        model = tiny.model("llama", tokenizer)
        trainer = make(
            tmp_path, model, unequal_triples(), ToyTrainer, processing_class=tokenizer,
            precompute_ref_log_probs=reference == "precomputed", **settings,
        )  # fmt: skip
        loss_and_gradients(trainer, range(4))
        start = tiny.model("llama", tokenizer, seed=0 if reference == "lora" else 1)
        for index, row in enumerate(unequal_triples()):
            shorter = min(len(token_ids(tokenizer, row["prompt"], row[kind])[1]) for kind in ("chosen", "rejected"))
            for kind, responses in (("chosen", trainer.seen.chosen), ("rejected", trainer.seen.rejected)):
                for scored, values in ((model, responses.logps), (start, responses.ref_logps)):
                    logps = naive_logps(scored, tokenizer, row["prompt"], row[kind])
                    expected = logps[:shorter].sum() + 0.3 * logps[shorter:].sum()
                    assert values[index].item() == pytest.approx(expected.item(), rel=1e-5)
            gold = naive_logps(model, tokenizer, row["prompt"], row["reference"]).sum().item()
            assert trainer.seen.branches["gold"].logps[index].item() == pytest.approx(gold, rel=1e-5)

    def test_attached_rows(self, tmp_path, tokenizer):
        """Rows that the dataset brings: several or none for a pair, with reference log-probs of their own."""
        rows = attached_rows(tokenizer).to_list()
        numbers = iter(range(1, 9))
        for row in rows:
            row["gold_rows"] = [gold | {"ref_logps": -float(next(numbers))} for gold in row["gold_rows"]]
        trainer = make(
            tmp_path, tiny.model("llama", tokenizer), Dataset.from_list(rows), AttachedToy, processing_class=tokenizer
        )
        loss_and_gradients(trainer, range(4))
        gold = trainer.seen.branches["gold"]
        assert gold.pair.tolist() == [1, 1, 3, 3]
        assert gold.ref_logps.tolist() == [-1, -2, -3, -4]
        assert torch.equal(gold.logratios, gold.logps - gold.ref_logps)
        for index, pair in enumerate(gold.pair):
            row = unequal_triples()[int(pair)]
            logps = naive_logps(double(trainer.model), tokenizer, row["prompt"], row["reference"])
            assert gold.logps[index].item() == pytest.approx(logps.sum().item(), rel=1e-5)
        loss, gradients = loss_and_gradients(trainer, [0, 2])
        assert trainer.seen.branches["gold"].logps.shape == (0,)
        pairs = make(
            tmp_path, tiny.model("llama", tokenizer), unequal_triples().remove_columns(["label_prob", "weight"]), NoGold,
            processing_class=tokenizer,
        )  # fmt: skip
        expected, expected_gradients = loss_and_gradients(pairs, [0, 2])
        assert loss == pytest.approx(expected, rel=1e-6)
        assert_gradients_close(gradients, expected_gradients, 1e-6)

    @pytest.mark.parametrize(("mode", "length"), [("keep_start", 30), ("keep_end", 12), ("keep_start", None)])
    def test_truncation(self, tokenizer, mode, length):
        collator = PreferenceCollator(
            pad_token_id=3, max_length=length, truncation_mode=mode, branches=(Branch("gold"),)
        )
        rows = attached_rows(tokenizer).to_list()
        batch = collator(rows)
        kept = [gold for row in rows for gold in row["gold_rows"]]
        assert len(kept) == len(batch["gold_input_ids"]) == 4
        for index, gold in enumerate(kept):
            ids = gold["prompt_ids"] + gold["completion_ids"]
            mask = [0] * len(gold["prompt_ids"]) + [1] * len(gold["completion_ids"])
            window = (
                slice(None)
                if length is None
                else slice(None, length)
                if mode == "keep_start"
                else slice(-length, None)
            )
            ids, mask = ids[window], mask[window]
            assert batch["gold_input_ids"][index, : len(ids)].tolist() == ids
            assert batch["gold_completion_mask"][index, : len(ids)].tolist() == mask
            assert batch["gold_attention_mask"][index].sum() == len(ids)
            assert (batch["gold_input_ids"][index, len(ids) :] == 3).all()
            assert (batch["gold_completion_mask"][index, len(ids) :] == 0).all()
        none = collator([rows[0], rows[2]])
        assert none["gold_input_ids"].shape == (0, 1)
        assert none["gold_pair"].shape == (0,)
        assert "gold_ref_logps" not in batch

    def test_checkpointing_of_an_adapter(self, tmp_path, tokenizer):
        """The live reference is a second pass of the same model."""
        found = []
        for settings in ({}, {"gradient_checkpointing": True}):
            trainer = make(
                tmp_path, tiny.model("llama", tokenizer), tiny.triple_data(), ToyTrainer, processing_class=tokenizer,
                peft_config=LoraConfig(**LORA), **settings,
            )  # fmt: skip
            trainer.train()
            found.append(history(trainer))
        assert found[0] == found[1]

    @pytest.mark.parametrize("data", ["iterable", "alias", "implicit", "conversational"])
    def test_data(self, tmp_path, tokenizer, data):
        made = {
            "iterable": lambda: tiny.triple_data().to_iterable_dataset(),
            "alias": lambda: tiny.triple_data().rename_column("reference", "gold"),
            "implicit": tiny.implicit_triple_data,
            "conversational": tiny.conversational_triple_data,
        }[data]()
        recorder = GradientRecorder()
        trainer = make(
            tmp_path, tiny.model("llama", tokenizer), made, ToyTrainer, processing_class=tokenizer,
            ref_model=tiny.model("llama", tokenizer, seed=1), train_sampling_strategy="sequential", callbacks=[recorder],
            max_grad_norm=0.0, max_steps=1,
        )  # fmt: skip
        twins = double(trainer.model), double(trainer.ref_model)
        trainer.train()
        rows = (tiny.conversational_triple_data() if data == "conversational" else tiny.triple_data()).to_list()[:4]
        expected = toy_loss(*twins, tokenizer, rows)
        expected.backward()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert_gradients_close(recorder.steps[0], gradients_of(twins[0]), 2e-5)

    @pytest.mark.parametrize("data", ["standard", "implicit", "conversational", "tools"])
    def test_branches_are_tokenized_like_pairs(self, tmp_path, tokenizer, data):
        """A gold response that repeats the chosen one has its tokens."""
        rows = {
            "standard": tiny.triple_data, "implicit": tiny.implicit_triple_data,
        }.get(data, tiny.conversational_triple_data)().to_list()  # fmt: skip
        tool = {"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {}}}
        for row in rows:
            row["reference"] = row["chosen"]
            if data == "tools":
                row |= {"tools": json.dumps([tool]), "chat_template_kwargs": {"enable_thinking": False}}
        trainer = make(
            tmp_path, tiny.model("llama", tokenizer), Dataset.from_list(rows), ToyTrainer, processing_class=tokenizer,
            dataset_num_proc=2 if data == "standard" else None,
        )  # fmt: skip
        for row in trainer.train_dataset:
            (gold,) = row["gold_rows"]
            assert gold == {"prompt_ids": row["prompt_ids"], "completion_ids": row["chosen_ids"]}
        assert data != "tools" or "add" in tokenizer.decode(trainer.train_dataset[0]["prompt_ids"])

    @pytest.mark.parametrize("reference", ["live", "explicit", "precomputed"])
    def test_one_forward_a_step(self, tmp_path, tokenizer, reference):
        trainer = make(
            tmp_path, tiny.model("llama", tokenizer), tiny.triple_data(), ToyTrainer, processing_class=tokenizer,
            ref_model=tiny.model("llama", tokenizer) if reference == "explicit" else None,
            precompute_ref_log_probs=reference == "precomputed",
        )  # fmt: skip
        calls = {"policy": [], "reference": []}

        def count(name):
            return lambda module, args, kwargs: calls[name].append(kwargs["input_ids"].size(0))

        trainer.model.base_model.register_forward_pre_hook(count("policy"), with_kwargs=True)
        if trainer.ref_model is not None:
            trainer.ref_model.base_model.register_forward_pre_hook(count("reference"), with_kwargs=True)
        trainer.train()
        assert calls == {"policy": [12] * 3, "reference": [] if reference == "precomputed" else [8] * 3}

    def test_metrics(self, tmp_path, tokenizer):
        """TRL's metrics are those of the pairs; tokens count the branches too; an evaluation has its own means."""
        settings = {"max_steps": 2, "processing_class": tokenizer, "train_sampling_strategy": "sequential"}
        data = tiny.triple_data()
        toy = make(
            tmp_path, tiny.model("llama", tokenizer), data, ToyTrainer, eval_dataset=data, eval_strategy="steps",
            eval_steps=1, **settings,
        )  # fmt: skip
        plain = make(tmp_path, tiny.model("llama", tokenizer), data, **settings)
        toy.train()
        plain.train()
        found, expected = history(toy)[0], history(plain)[0]
        assert found.keys() == expected.keys()
        golds = sum(
            sum(map(len, token_ids(tokenizer, row["prompt"], row["reference"]))) for row in data.select(range(4))
        )
        assert found.pop("num_tokens") == expected.pop("num_tokens") + golds
        assert found["loss"] > expected["loss"]
        for key in found.keys() - {"loss", "grad_norm"}:
            assert found[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-6), key
        evaluation = history(toy)[1]
        assert evaluation["eval_num_tokens"] == history(toy)[0]["num_tokens"]
        # Batches of 3, 3 and 2 rows, each with means of its own
        toy.model.eval()
        rows = [toy.train_dataset[index] for index in range(8)]
        with torch.no_grad():
            losses = [
                toy.compute_loss(toy.model, toy.data_collator(part)).item() for part in (rows[:3], rows[3:6], rows[6:])
            ]
        assert toy.evaluate()["eval_loss"] == pytest.approx(
            (3 * losses[0] + 3 * losses[1] + 2 * losses[2]) / 8, rel=1e-5
        )

    def test_rewards(self, tmp_path, tokenizer):
        data = unequal_triples()
        trainer = make(
            tmp_path, tiny.model("llama", tokenizer), data, Rewarded, processing_class=tokenizer, max_steps=1
        )
        model = double(trainer.model)
        trainer.train()
        chosen, rejected = (
            torch.stack([naive_logps(model, tokenizer, row["prompt"], row[kind]).mean() for row in data])
            for kind in ("chosen", "rejected")
        )
        entry = trainer.state.log_history[0]
        assert entry["rewards/chosen"] == pytest.approx(chosen.mean().item(), rel=1e-5)
        assert entry["rewards/rejected"] == pytest.approx(rejected.mean().item() - 1, rel=1e-5)
        assert entry["rewards/margins"] == pytest.approx((chosen - rejected).mean().item() + 1, rel=1e-5)
        assert entry["rewards/accuracies"] == (chosen > rejected - 1).float().mean().item()

    @pytest.mark.parametrize("adapter", [None, "lora", "prompt tuning"])
    def test_without_a_reference(self, tmp_path, tokenizer, adapter):
        """None is kept or scored, nor a copy of an adapter; the loss sees none."""
        model = tiny.model("llama", tokenizer)
        if adapter == "lora":
            model = get_peft_model(model, LoraConfig(**LORA, init_lora_weights=False))
        elif adapter:
            model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        settings = {"data": tiny.triple_data(), "cls": ReferenceFree, "processing_class": tokenizer}
        with pytest.raises(ValueError, match="`ref_model` has no effect: ReferenceFree does not compare"):
            make(tmp_path, model, ref_model=tiny.model("llama", tokenizer), **settings)
        trainer = make(tmp_path, model, eval_dataset=tiny.triple_data(), **settings)
        assert trainer.ref_model is None
        assert "ref" not in getattr(trainer.model, "peft_config", {})
        trainable = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
        calls = []
        trainer.model.register_forward_pre_hook(lambda *_: calls.append(1))
        trainer.train()
        assert len(calls) == 3
        assert trainer.seen.chosen.ref_logps is None
        assert torch.equal(trainer.seen.margins, trainer.seen.chosen.logps - trainer.seen.rejected.logps)
        gradients = loss_and_gradients(trainer, range(4))[1]
        assert sorted(gradients) == sorted(trainable)
        assert trainer.evaluate(tiny.triple_data())["eval_loss"] == trainer.evaluate()["eval_loss"]

    @pytest.mark.parametrize("source", ["memory", "new adapter", "adapter"])
    def test_references_that_are_always_stored(self, tmp_path, tokenizer, folders, source):
        """`stores_reference` is `precompute_ref_log_probs=True`, and no copy of an adapter is kept."""
        found = []
        for cls in (ToyTrainer, Storing):
            settings = {"precompute_ref_log_probs": cls is ToyTrainer}
            model = adapted(folders()) if source == "adapter" else tiny.model("llama", tokenizer)
            if source == "new adapter":
                settings["peft_config"] = LoraConfig(**LORA)
            trainer = make(
                tmp_path, model, tiny.triple_data(), cls, processing_class=tokenizer, eval_dataset=tiny.triple_data(),
                **settings,
            )  # fmt: skip
            trainer.train()
            trainer.evaluate()
            found.append(history(trainer))
        assert found[0] == found[1]
        assert trainer.ref_model is None
        assert trainer.args.precompute_ref_log_probs is False
        assert "ref" not in getattr(trainer.model, "peft_config", {})
        if source == "new adapter":
            assert trainer.evaluate(tiny.triple_data())["eval_loss"] == found[0][-1]["eval_loss"]
        else:
            gone = {
                "memory": "Cannot compute reference log-probs .* after training",
                "adapter": "adapter .* is no longer in",
            }
            with pytest.raises(ValueError, match=gone[source]):
                trainer.evaluate(tiny.triple_data())

    def test_prompt_tuned_model_keeps_its_reference(self, tmp_path, tokenizer):
        model = get_peft_model(
            tiny.model("llama", tokenizer), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        )
        trainer = make(tmp_path, model, tiny.triple_data(), ToyTrainer, processing_class=tokenizer, max_steps=2)
        trainer.train()
        first, second = [entry for entry in history(trainer) if "loss" in entry]
        assert first["rewards/margins"] == 0
        assert second["rewards/margins"] != 0


class TestExactness:
    """The gradient of an optimizer step does not depend on how its rows are split."""

    @pytest.mark.parametrize("name", TOYS)
    def test_accumulation(self, tmp_path, tokenizer, name):
        cls = TOYS[name]
        found = [
            toy_gradients(cls, tiny.model("llama", tokenizer), tokenizer, tmp_path / f"{batch}", batch, 4 // batch)
            for batch in (4, 2, 1)
        ]
        (whole, expected), *others = found
        for trainer, gradients in others:
            assert_gradients_close(gradients, expected, 1e-6)
            left, right = history(trainer)[0], history(whole)[0]
            for key in ("loss", "num_tokens", "grad_norm", *(["weights/mean"] if name != "attached" else [])):
                assert left[key] == pytest.approx(right[key], rel=1e-5), key

    def test_last_step_of_an_epoch(self, tmp_path, tokenizer):
        """It has fewer micro-batches: 4 rows in steps of 3 and 1."""
        recorder = GradientRecorder()
        trainer = make(
            tmp_path, tiny.model("llama", tokenizer), unequal_triples(), ToyTrainer, processing_class=tokenizer, max_steps=2,
            learning_rate=0.0, max_grad_norm=0.0, per_device_train_batch_size=1, gradient_accumulation_steps=3,
            train_sampling_strategy="sequential", callbacks=[recorder],
        )  # fmt: skip
        trainer.train()
        for gradients, rows in zip(recorder.steps, ([0, 1, 2], [3]), strict=True):
            twin = double(tiny.model("llama", tokenizer))
            reference = double(tiny.model("llama", tokenizer))
            toy_loss(twin, reference, tokenizer, unequal_triples().select(rows).to_list()).backward()
            assert_gradients_close(gradients, gradients_of(twin), 2e-5)

    def test_unequal_micro_batches(self, tmp_path, tokenizer):
        """3 rows at once, and as 2 and 1: no mean of means, in any part of the loss."""
        found = []
        for batch, accumulation in ((3, 1), (2, 2)):
            recorder = GradientRecorder()
            trainer = make(
                tmp_path, tiny.model("llama", tokenizer), unequal_triples().select(range(3)), ToyTrainer, max_steps=1,
                processing_class=tokenizer, max_grad_norm=0.0, per_device_train_batch_size=batch, callbacks=[recorder],
                gradient_accumulation_steps=accumulation, train_sampling_strategy="sequential",
            )  # fmt: skip
            trainer.train()
            found.append((trainer.state.log_history[0]["loss"], recorder.steps[0]))
        (loss, gradients), (split_loss, split_gradients) = found
        assert split_loss == pytest.approx(loss, rel=1e-6)
        assert_gradients_close(split_gradients, gradients, 1e-6)

    def test_means_over_the_tokens_of_a_micro_batch(self, tmp_path, tokenizer):
        """`"batch token"`, what TRL does: it does depend on the split."""
        reference = double(tiny.model("llama", tokenizer))
        found = []
        for batch in (4, 2, 1):
            model = tiny.model("llama", tokenizer)
            twin = double(model)
            _, gradients = toy_gradients(BatchTokenToy, model, tokenizer, tmp_path / str(batch), batch, 4 // batch)
            split = [range(start, start + batch) for start in range(0, 4, batch)]
            toy_loss(twin, reference, tokenizer, unequal_triples().to_list(), "batch token", split).backward()
            assert_gradients_close(gradients, gradients_of(twin), 1e-5)
            found.append(torch.cat([gradient.flatten() for gradient in gradients.values()]))
        assert (found[1] - found[0]).abs().max() > 0.01 * found[0].abs().max()
        assert (found[2] - found[1]).abs().max() > 0.01 * found[0].abs().max()


# ---------------------------------------------------------------- the reference


def first_rewards(trainer):
    """Rewards of the first step: log-ratios before anything was learned."""
    trainer.train()
    entry = trainer.state.log_history[0]
    return entry["rewards/chosen"], entry["rewards/rejected"]


def by_hand(model, tokenizer, steps=3):
    """Train a model without a trainer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for row in tiny.preference_data().select(range(steps)):
        (-naive_logps(model, tokenizer, row["prompt"], row["chosen"]).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def fine_tuned(tmp_path, model, tokenizer, **settings):
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**options(tmp_path / "sft", **settings)),
        train_dataset=tiny.prompt_completion_data(),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer.model


QUESTION = {"input_ids": torch.arange(10, 30)[None]}


class TestReference:
    @staticmethod
    def trained(tmp_path, tokenizer, folders, training):
        """A model that was loaded from a path and trained since."""
        model = AutoModelForCausalLM.from_pretrained(folders())
        if training == "by hand":
            by_hand(model, tokenizer)
        elif training == "merged":
            model = adapted(folders()).merge_and_unload().requires_grad_(True)  # PEFT leaves it frozen
        elif training == "dpo":
            trainer = make(tmp_path, model, learning_rate=2e-2)
            trainer.train()
            model = trainer.model
        else:
            extra = {"sft in bf16": {"bf16": True}, "sft with checkpointing": {"gradient_checkpointing": True}}
            model = fine_tuned(tmp_path, model, tokenizer, **extra.get(training, {}))
        return model

    @pytest.mark.parametrize("training", ["sft", "sft in bf16", "sft with checkpointing", "by hand", "merged", "dpo"])
    def test_model_trained_in_memory(self, tmp_path, tokenizer, folders, training):
        """The reference is the model as it was passed."""
        model = self.trained(tmp_path, tokenizer, folders, training)
        start = model.eval()(**QUESTION).logits.detach().clone()
        trainer = make(tmp_path, model, eval_dataset=tiny.preference_data(), max_steps=4)
        assert trainer.ref_model is not None
        scored = trainer.compute_ref_log_probs(
            trainer.ref_model, trainer.data_collator(trainer.train_dataset.to_list())
        )
        assert first_rewards(trainer) == (0.0, 0.0)
        # The reference does not follow the policy, neither in the pass of the loss nor in a plain forward
        again = trainer.compute_ref_log_probs(
            trainer.ref_model, trainer.data_collator(trainer.train_dataset.to_list())
        )
        assert torch.equal(torch.stack(scored), torch.stack(again))
        trainer.model.eval()
        rounding = 0.05 if training == "sft in bf16" else 1e-5  # that model keeps computing in bf16
        with torch.no_grad():
            torch.testing.assert_close(trainer.ref_model(**QUESTION).logits, start, rtol=0, atol=rounding)
            assert (trainer.model(**QUESTION).logits - start).abs().max() > 0.2
        assert trainer.evaluate()["eval_rewards/margins"] > 0.05

    @pytest.mark.parametrize("training", ["sft", "by hand", "merged"])
    def test_what_trl_does(self, tmp_path, tokenizer, folders, training):
        """It loads the model of the path again, as it was before: rewards are not 0 at the start."""
        model = self.trained(tmp_path, tokenizer, folders, training)
        rewards = first_rewards(make(tmp_path, model, cls=DPOTrainer))
        assert sum(map(abs, rewards)) > 0.01

    def test_frozen_models_are_refused(self, tmp_path, folders):
        """As PEFT leaves them; nothing would be trained."""
        merged = adapted(folders()).merge_and_unload()
        with pytest.raises(ValueError, match="No parameter of `model` requires a gradient"):
            make(tmp_path, merged)
        adapted(folders()).save_pretrained(tmp_path / "adapter")
        base = AutoModelForCausalLM.from_pretrained(folders())
        with pytest.raises(ValueError, match="No parameter of `model` requires a gradient.*is_trainable=True"):
            make(tmp_path, PeftModel.from_pretrained(base, tmp_path / "adapter"))
        base = AutoModelForCausalLM.from_pretrained(folders())
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
        assert first_rewards(make(tmp_path, loaded)) == (0.0, 0.0)
        assert first_rewards(make(tmp_path, merged, peft_config=LoraConfig(**LORA))) == (0.0, 0.0)

    @pytest.mark.parametrize("settings", [{}, {"precompute_ref_log_probs": True}, {"bf16": True}], ids=str)
    def test_model_built_in_memory(self, tmp_path, tokenizer, settings):
        trainer = make(tmp_path, tiny.model("llama", tokenizer), processing_class=tokenizer, **settings)
        rewards = first_rewards(trainer)
        assert rewards == (0.0, 0.0) if not settings else rewards == pytest.approx((0, 0), abs=1e-4)
        assert (trainer.ref_model is None) == ("precompute_ref_log_probs" in settings)
        assert not any(p.requires_grad for p in trainer.ref_model.parameters()) if trainer.ref_model else True

    @pytest.mark.parametrize("precompute", [False, True])
    def test_trained_adapter(self, tmp_path, folders, precompute):
        model = adapted(folders())
        start = {name: value.clone() for name, value in model.named_parameters()}
        trainer = make(tmp_path, model, precompute_ref_log_probs=precompute)
        assert first_rewards(trainer) == (pytest.approx((0, 0), abs=1e-6) if precompute else (0.0, 0.0))
        reference = {name: value for name, value in trainer.model.named_parameters() if ".ref." in name}
        assert reference
        for name, value in reference.items():
            assert torch.equal(value, start[name.replace(".ref.", ".default.")])

    @pytest.mark.parametrize("precompute", [False, True])
    def test_new_adapter_on_a_trained_model(self, tmp_path, tokenizer, folders, precompute):
        model = by_hand(AutoModelForCausalLM.from_pretrained(folders()), tokenizer)
        trainer = make(tmp_path, model, peft_config=LoraConfig(**LORA), precompute_ref_log_probs=precompute)
        assert trainer.ref_model is None
        assert first_rewards(trainer) == (pytest.approx((0, 0), abs=1e-6) if precompute else (0.0, 0.0))

    @pytest.mark.parametrize("init", [False, "pissa", "gaussian"])
    @pytest.mark.parametrize("precompute", [False, True])
    def test_adapter_that_changes_the_model(self, tmp_path, folders, init, precompute):
        """The base without the adapter is not where training starts; `"gaussian"` starts at zero."""
        config = LoraConfig(**LORA, init_lora_weights=init)
        trainer = make(tmp_path, folders(), peft_config=config, precompute_ref_log_probs=precompute)
        if init == "gaussian":
            assert first_rewards(trainer) == pytest.approx((0, 0), abs=1e-6)
            return
        with pytest.raises(ValueError, match="The reference is not the model that is being trained.*expected 0"):
            trainer.train()

    def test_models_that_are_not_a_number(self, tmp_path, tokenizer):
        model = tiny.model("llama", tokenizer)
        with torch.no_grad():
            model.lm_head.weight[0, 0] = math.nan
        trainer = make(tmp_path, model, processing_class=tokenizer)
        with pytest.raises(ValueError, match="log-probabilities differ by nan nats"):
            trainer.train()

    @pytest.mark.parametrize("precompute", [False, True])
    def test_dropout(self, tmp_path, tokenizer, precompute):
        """The reference is scored without it, and the policy, scored with it, is no error then."""
        model = tiny.model("llama", tokenizer, attention_dropout=0.4).train()
        settings = {"processing_class": tokenizer, "disable_dropout": False, "precompute_ref_log_probs": precompute}
        trainer = make(tmp_path, model, max_steps=1, **settings)
        assert model.training
        without = tiny.model("llama", tokenizer)
        inputs = trainer.data_collator([trainer.train_dataset[index] for index in range(8)])
        scored = trainer.compute_ref_log_probs(trainer.ref_model or model, inputs)
        if precompute:
            scored = [
                torch.tensor(trainer.train_dataset[name][:]) for name in ("ref_chosen_logps", "ref_rejected_logps")
            ]
        for kind, values in zip(("chosen", "rejected"), scored, strict=True):
            for row, value in zip(tiny.preference_data(), values, strict=True):
                expected = naive_logps(without, tokenizer, row["prompt"], row[kind]).sum().item()
                assert value.item() == pytest.approx(expected, rel=1e-5)
        assert all(abs(reward) > 1e-4 for reward in first_rewards(trainer))

    def test_explicit_reference(self, tmp_path, folders):
        reference = AutoModelForCausalLM.from_pretrained(folders(seed=1))
        trainer = make(tmp_path, folders(), ref_model=reference)
        assert trainer.ref_model is reference
        rewards = first_rewards(trainer)
        assert min(map(abs, rewards)) > 0.001

    def test_the_model_itself_is_no_reference(self, tmp_path, tokenizer):
        model = tiny.model("llama", tokenizer)
        with pytest.raises(ValueError, match="`model` and `ref_model` cannot be the same object"):
            make(tmp_path, model, ref_model=model, processing_class=tokenizer)

    def test_synchronised_copy(self, tmp_path, tokenizer):
        trainer = make(
            tmp_path, tiny.model("llama", tokenizer), processing_class=tokenizer, sync_ref_model=True,
            ref_model_sync_steps=1, ref_model_mixup_alpha=1.0,
        )  # fmt: skip
        assert first_rewards(trainer) == (0.0, 0.0)
        for left, right in zip(trainer.model.parameters(), trainer.ref_model.parameters(), strict=True):
            assert torch.equal(left, right)

    @pytest.mark.parametrize("cls", [PreferenceTrainer, ToyTrainer])
    def test_the_callers_model_still_works(self, tmp_path, tokenizer, cls):
        model = tiny.model("llama", tokenizer)
        before = model(**QUESTION).logits, model.generate(**QUESTION, max_new_tokens=5, do_sample=False)
        trainer = make(tmp_path, model, tiny.triple_data(), cls, processing_class=tokenizer)
        assert trainer.model is model
        model.eval()
        assert torch.equal(before[0], model(**QUESTION).logits)
        assert torch.equal(before[1], model.generate(**QUESTION, max_new_tokens=5, do_sample=False))
        trainer.train()
        loaded = tiny.model("llama", tokenizer)
        loaded.load_state_dict(model.state_dict())
        assert torch.equal(loaded(**QUESTION).logits, model.eval()(**QUESTION).logits)
        assert not torch.equal(before[0], model(**QUESTION).logits)


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}


class TestQuantized:
    """4-bit base on CPU: forwards in eval mode must not spoil the gradients."""

    @pytest.mark.parametrize("source", ["path", "instance", "adapter"])
    def test_live_equals_precomputed(self, tmp_path, tokenizer, folders, source):
        pytest.importorskip("bitsandbytes")
        runs = []
        for precompute in (False, True):
            settings = {"peft_config": LoraConfig(**LORA), "precompute_ref_log_probs": precompute}
            if source == "path":
                model = folders()
                settings["quantization_config"] = BitsAndBytesConfig(**NF4)
            else:
                model = AutoModelForCausalLM.from_pretrained(folders(), quantization_config=BitsAndBytesConfig(**NF4))
            if source == "adapter":
                torch.manual_seed(1)
                model = get_peft_model(model, settings.pop("peft_config"))
            trainer = make(tmp_path, model, eval_dataset=tiny.preference_data(), **settings)
            assert trainer.model.get_base_model().is_loaded_in_4bit
            if precompute:
                trainer.evaluate()
            trainer.train()
            runs.append([entry for entry in history(trainer) if "loss" in entry])
        live, precomputed = runs
        assert live[0]["rewards/chosen"] == live[0]["rewards/rejected"] == 0
        assert precomputed[0]["rewards/chosen"] == pytest.approx(0, abs=1e-5)
        for left, right in zip(live, precomputed, strict=True):
            assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-4)
            assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)
        assert live[-1]["rewards/margins"] > 0.01


# ---------------------------------------------------------------- resuming


class TestResume:
    @pytest.mark.parametrize(
        ("model", "settings"),
        [
            ("path", {}),
            ("memory", {}),
            ("path", {"precompute_ref_log_probs": True, "gradient_accumulation_steps": 2}),
            ("path", {"peft_config": LoraConfig(**LORA)}),
            ("adapter", {}),
            ("adapter", {"precompute_ref_log_probs": True}),
            ("toy", {}),
        ],
        ids=str,
    )
    def test_resumed_equals_uninterrupted(self, tmp_path, tokenizer, folders, model, settings):
        """Bit for bit: weights, and every logged value including `num_tokens`."""

        def trainer():
            source = {"path": folders, "adapter": lambda: adapted(folders())}.get(
                model, lambda: tiny.model("llama", tokenizer)
            )
            return make(
                tmp_path, source(), tiny.triple_data(), ToyTrainer if model == "toy" else PreferenceTrainer, max_steps=6,
                save_strategy="steps", save_steps=3, per_device_train_batch_size=2, processing_class=tokenizer, **settings,
            )  # fmt: skip

        whole = trainer()
        whole.train()
        resumed = trainer()
        resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-3"))
        steps = [entry for entry in history(whole) if "loss" in entry]
        assert [entry for entry in history(resumed) if "loss" in entry] == steps
        assert steps[-1]["rewards/margins"] != 0
        assert [entry["num_tokens"] for entry in steps] == sorted({entry["num_tokens"] for entry in steps})
        parameters = zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True)
        for (name, left), (_, right) in parameters:
            assert torch.equal(left, right), name


# ---------------------------------------------------------------- two processes


SCRIPT = Path(__file__).parent / "two_processes_preference.py"


@pytest.fixture(scope="module")
def two(tmp_path_factory, folders):
    """Log histories and gradients of the runs of the script on 2 gloo processes."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    process = subprocess.Popen(
        [*command, folders(), str(folder)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, errors = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # torchrun's workers too
        raise
    assert process.returncode == 0, errors[-3000:]
    return json.loads((folder / "histories.json").read_text()), torch.load(folder / "gradients.pt")


@pytest.mark.slow
class TestTwoProcesses:
    def test_equals_dpo_trainer(self, two):
        """Bit for bit."""
        assert history(two[0]["ours"]) == history(two[0]["theirs"])

    def test_precomputed_references_of_a_dataset_in_memory(self, two):
        live, precomputed = (history(two[0][name]) for name in ("ours", "ours precomputed"))
        for left, right in zip(precomputed, live, strict=True):
            assert left.keys() == right.keys()
            for key in left.keys() - {"rewards/accuracies"}:  # of rewards that are 0 up to rounding
                assert left[key] == pytest.approx(right[key], rel=1e-4, abs=1e-5), key

    @pytest.mark.parametrize("name", ["theirs", "ours"])
    def test_equals_accumulation(self, tmp_path, tokenizer, folders, two, name):
        """2 processes with batches of 2 = 1 process with 2 accumulation steps."""
        cls, settings = RUNS[name]
        trainer = run(cls, folders(), tokenizer, tmp_path, gradient_accumulation_steps=2, **settings)
        found, expected = ([e for e in entries if "loss" in e] for entries in (two[0][name], history(trainer)))
        for left, right in zip(found, expected, strict=True):
            for key in ("loss", "grad_norm", "num_tokens", "rewards/margins", "logps/chosen"):
                assert left[key] == pytest.approx(right[key], rel=2e-5, abs=1e-6), key

    @pytest.mark.parametrize("name", TOYS)
    def test_gradient_of_a_method(self, tmp_path, tokenizer, folders, two, name):
        """2 processes x 2 accumulation steps of 1 row = 1 batch of 4 rows; also with branch rows on one of them only."""
        trainer, gradients = toy_gradients(TOYS[name], folders(), tokenizer, tmp_path, 4, 1)
        assert_gradients_close(two[1][name], gradients, 1e-6)
        left, right = two[0][name][0], history(trainer)[0]
        for key in ("loss", "num_tokens", "grad_norm", *(["weights/mean"] if name != "attached" else [])):
            assert left[key] == pytest.approx(right[key], rel=1e-5), key
