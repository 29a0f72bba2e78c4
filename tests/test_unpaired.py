"""The methods that learn from single responses: their base, one row of formulas a method, and the identities of ULMA and UFT.

`FORMULAS` maps a name, the method's first, to (the loss of one row, options of the config, columns of the data). A formula
sees an `Answer` in float64, the options and the row.
"""

import copy
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset, concatenate_datasets, load_dataset
from pairs import (
    difference,
    double,
    gradients,
    letters,
    loss_and_gradients,
    make,
    message_log,
    step_gradients,
    token_logps,
)
from peft import LoraConfig, get_peft_model
from torch import tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM
from trl import KTOConfig, KTOTrainer, SFTConfig, SFTTrainer
from two_processes_unpaired import RUNS, step

from trl_ift import (
    METHODS,
    PreferenceConfig,
    PreferenceTrainer,
    UFTConfig,
    UFTTrainer,
    ULMAConfig,
    checks,
    get_method,
)
from trl_ift.data import store_references
from trl_ift.preference.collator import Column
from trl_ift.preference.trainer import pair_ids, prompt_and_response_ids
from trl_ift.trl_internals import DataCollatorForUnpairedPreference, LogProbFunction
from trl_ift.unpaired import trainer as base
from trl_ift.unpaired import ulma as ulma_module
from trl_ift.unpaired.data import COLUMNS, UnpairedCollator
from trl_ift.unpaired.trainer import UnpairedBatch, UnpairedConfig, UnpairedTrainer
from trl_ift.unpaired.uft import uft_loss
from trl_ift.unpaired.ulma import ulma_loss


def merged(model):
    """A copy of the base model with the adapter's weights in it."""
    return copy.deepcopy(model).merge_and_unload()


class Answer:
    """A response: log-probabilities of its tokens under policy and reference, each (T,)."""

    def __init__(self, tokens, ref_tokens):
        self.logp, self.ref = tokens.sum(), ref_tokens.sum()
        self.mean, self.mean_ref = tokens.mean(), ref_tokens.mean()


def label_of(row, threshold):
    if row.get("label") is not None:
        return row["label"]
    return row["score"] >= threshold


def ulma(a, o, row):
    logp, ref = (a.mean, a.mean_ref) if o.logp_reduction == "mean" else (a.logp, a.ref)
    z = o.beta * (logp - ref) + o.log_z
    if label_of(row, 1):
        return {"nll": -logp, "beta_nll": -o.beta * logp, "pointwise_dpo": -logsigmoid(z)}[o.positive_loss]
    return -logsigmoid(-z) if o.negative_loss == "binary" else (row.get("score", 0.0) - z).square()


def uft(a, o, row):
    q = 1 / (1 + (-o.beta * (a.logp - a.ref) - o.reward_offset).exp())
    s = row["score"] if row.get("score") is not None else float(row["label"])
    s = min(max(s, o.score_clip), 1 - o.score_clip)
    loss = (q - s).square() if o.score_loss == "mse" else -s * q.log() - (1 - s) * (1 - q).log()
    return loss * (o.sft_weight if row.get("is_sft") else 1)


LABELS = {"label": [True, False, True, True, False, True]}
SCORES = {"score": [1.0, 0.2, 0.7, 1.0, 0.0, 0.4]}
FORMULAS = {
    "ulma": (ulma, {}, LABELS),
    "ulma paper": (ulma, {"logp_reduction": "sum", "batch_reduction": "row_mean"}, LABELS),
    "ulma pointwise": (ulma, {"positive_loss": "pointwise_dpo", "logp_reduction": "sum", "log_z": 0.3}, LABELS),
    "ulma beta": (ulma, {"positive_loss": "beta_nll", "beta": 0.4, "desirable_weight": 0.5}, LABELS),
    "ulma continuous": (ulma, {"negative_loss": "continuous", "log_z": 0.5, "logp_reduction": "sum"}, SCORES),
    "ulma weights": (ulma, {"undesirable_weight": 3.0}, LABELS | {"weight": [1.0, 2.0, 0.0, 0.5, 1.0, 3.0]}),
    "uft": (uft, {"beta": 0.1}, SCORES),
    "uft labels": (uft, {"beta": 0.1, "undesirable_weight": 2.0}, LABELS),
    "uft bce": (uft, {"beta": 0.1, "score_loss": "bce", "score_clip": 0.1, "reward_offset": 0.4}, SCORES),
    "uft mix": (uft, {"beta": 0.1, "sft_weight": 0.3}, SCORES | {"is_sft": [True, False, False, True, False, False]}),
}  # fmt: skip
every_formula = pytest.mark.parametrize("name", FORMULAS)


def test_every_method_has_a_formula():
    own = {m.name for m in METHODS if issubclass(m.config_class, UnpairedConfig)}
    assert own == {name.split()[0] for name in FORMULAS}


def rows_of(name, number=6):
    columns = FORMULAS[name][2]
    rows = []
    for i, pair in enumerate(tiny.preference_data().to_list()[:number]):
        text = pair["rejected" if i % 2 else "chosen"]
        rows.append({"prompt": pair["prompt"], "completion": text} | {key: v[i] for key, v in columns.items()})
    return rows


def reference_of(tokenizer):
    """A model that is not the policy, but near it: log-ratios of a few nats, of both signs."""
    reference = tiny.model("llama", tokenizer)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return reference


def trainer_of(name, tmp_path, tokenizer, rows=None, model=None, **settings):
    method = get_method(name.split()[0])
    reference = {"ref_model": settings.pop("ref_model")} if "ref_model" in settings else {}

    def cls(**arguments):
        return method.trainer_class(**arguments, **reference)

    data = (
        rows
        if isinstance(rows, Dataset | IterableDataset)
        else Dataset.from_list(rows_of(name) if rows is None else rows)
    )
    options = {"per_device_train_batch_size": 6, "overwrite_output_dir": True} | FORMULAS[name][1] | settings
    model = tiny.model("llama", tokenizer) if model is None else model
    return make(cls, method.config_class, tmp_path, model, data, tokenizer, **options)


def losses_of(name, policy, reference, tokenizer, rows, options):
    """Loss of each row by the formula, one unpadded sequence at a time, and its label."""
    losses, labels = [], []
    for row in rows:
        with torch.no_grad():
            ref_tokens = token_logps(reference, tokenizer, row["prompt"], row["completion"])
        answer = Answer(token_logps(policy, tokenizer, row["prompt"], row["completion"]), ref_tokens)
        label = label_of(row, 1 if name.startswith("ulma") else 0.5)
        weight = (options.desirable_weight if label else options.undesirable_weight) * row.get("weight", 1.0)
        losses.append(weight * FORMULAS[name][0](answer, options, row))
        labels.append(label)
    return torch.stack(losses), tensor(labels)


def expected_loss(name, policy, reference, tokenizer, rows, options):
    losses, labels = losses_of(name, policy, reference, tokenizer, rows, options)
    if getattr(options, "batch_reduction", None) == "class_means":
        return sum(losses[kind].mean() for kind in (labels, ~labels) if kind.any())
    return losses.mean()


@every_formula
class TestTrainer:
    def test_loss_and_gradients(self, name, tmp_path, tokenizer):
        reference = reference_of(tokenizer)
        trainer = trainer_of(name, tmp_path, tokenizer, ref_model=reference)
        loss, found = loss_and_gradients(trainer)
        twin = double(trainer.model)
        expected = expected_loss(name, twin, double(reference), tokenizer, rows_of(name), trainer.args)
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert difference(found, gradients(twin)) < 2e-5

    def test_stored_reference(self, name, tmp_path, tokenizer):
        """Log-probs of the reference that are computed before training, or brought by the data, give the loss of a live one."""
        live = trainer_of(name, tmp_path, tokenizer, ref_model=reference_of(tokenizer))
        value, expected = loss_and_gradients(live)
        stored = trainer_of(
            name, tmp_path, tokenizer, ref_model=reference_of(tokenizer), precompute_ref_log_probs=True
        )
        logps = stored.train_dataset["ref_logps"]
        brought = [row | {"ref_logps": logp} for row, logp in zip(rows_of(name), logps, strict=True)]
        for trainer in (stored, trainer_of(name, tmp_path, tokenizer, brought)):
            loss, found = loss_and_gradients(trainer)
            assert loss == pytest.approx(value, rel=1e-5)
            assert difference(found, expected) < 1e-4
        assert trainer.ref_model is None

    def test_accumulation(self, name, tmp_path, tokenizer):
        """A step is the same as a whole and in parts, of which some have one label only; so are its metrics."""
        steps, logged = [], []
        for size in (6, 2, 1):
            trainer = trainer_of(
                name, tmp_path, tokenizer, per_device_train_batch_size=size, gradient_accumulation_steps=6 // size,
                max_steps=1, ref_model=reference_of(tokenizer),
            )  # fmt: skip
            steps.append(step_gradients(trainer))
            logged.append(trainer.state.log_history[0])
        (whole,), (gradient,) = steps[0]
        for ((parts,), (summed,)), entry in zip(steps[1:], logged[1:], strict=True):
            assert parts == pytest.approx(whole, abs=2e-4)  # logged with four digits
            assert difference(summed, gradient) < 1e-5
            for key in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
                assert entry[key] == pytest.approx(logged[0][key], rel=1e-4)
            assert "kl" not in entry

    @pytest.mark.parametrize("size", [6, 4])
    def test_evaluation(self, name, size, tmp_path, tokenizer):
        """The loss of a dataset does not depend on its batches."""
        reference = reference_of(tokenizer)
        rows = rows_of(name)
        trainer = trainer_of(
            name, tmp_path, tokenizer, ref_model=reference, eval_dataset=Dataset.from_list(rows),
            per_device_eval_batch_size=size,
        )  # fmt: skip
        with torch.no_grad():
            expected = expected_loss(name, double(trainer.model), double(reference), tokenizer, rows, trainer.args)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert trainer.evaluate(Dataset.from_list(rows))["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert trainer.predict(Dataset.from_list(rows)).metrics["test_loss"] == pytest.approx(
            expected.item(), rel=1e-5
        )

    def test_padding(self, name, tmp_path, tokenizer, monkeypatch):
        """Neither more padding nor the side of it matters."""
        found = loss_and_gradients(trainer_of(name, tmp_path, tokenizer, ref_model=reference_of(tokenizer)))
        wide = trainer_of(name, tmp_path, tokenizer, ref_model=reference_of(tokenizer), pad_to_multiple_of=64)
        assert next(iter(wide.get_train_dataloader()))["input_ids"].size(1) == 64
        monkeypatch.setattr(tokenizer, "padding_side", "left")
        left = trainer_of(name, tmp_path, tokenizer, ref_model=reference_of(tokenizer))
        for trainer in (wide, left):
            loss, other = loss_and_gradients(trainer)
            assert loss == pytest.approx(found[0], rel=1e-6)
            assert difference(other, found[1]) < 1e-5

    def test_order_of_rows(self, name, tmp_path, tokenizer):
        given = {"ref_model": reference_of(tokenizer)}
        loss, _ = loss_and_gradients(trainer_of(name, tmp_path, tokenizer, **given))
        turned, _ = loss_and_gradients(trainer_of(name, tmp_path, tokenizer, rows_of(name)[::-1], **given))
        assert turned == pytest.approx(loss, rel=1e-6)


# ---------------------------------------------------------------- the loss on tensors


def batch_of(tokens, ref_tokens, rows, threshold):
    """A batch from log-probabilities of tokens, each (N, T)."""
    mask = torch.ones_like(tokens, dtype=torch.bool)
    label = [label_of(row, threshold) for row in rows]
    score = [row.get("score", float(row.get("label", True))) for row in rows]
    columns = {key: tensor([float(row[key]) for row in rows]) for key in ("is_sft", "weight") if key in rows[0]}
    return UnpairedBatch(
        tokens.sum(1),
        tokens,
        mask,
        mask.sum(1),
        ref_tokens.sum(1),
        tensor(label),
        tensor(score, dtype=tokens.dtype),
        columns,
    )


def columns_of(name, number=6):
    return [{key: values[i] for key, values in FORMULAS[name][2].items()} for i in range(number)]


@pytest.fixture(params=FORMULAS)
def named_trainer(request, tmp_path, tokenizer):
    return request.param, trainer_of(request.param, tmp_path, tokenizer)


@pytest.mark.parametrize("name", ["ulma", "uft labels"])
def test_stored_reference_of_pairs(name, tmp_path, tokenizer):
    """Log-probs that stand in a pair, one for each answer, are those of its two rows."""
    pairs = [{"prompt": q, "chosen": a, "rejected": a[::-1] + "?"} for q, a in tiny.QUESTIONS[:3]]
    live = trainer_of(name, tmp_path, tokenizer, pairs, ref_model=reference_of(tokenizer))
    value, expected = loss_and_gradients(live)
    scored = store_references(
        reference_of(tokenizer), Dataset.from_list(pairs), tmp_path / "stored", processing_class=tokenizer,
        max_length=live.args.max_length,
    )  # fmt: skip
    for data in (scored, scored.to_iterable_dataset()):
        trainer = trainer_of(name, tmp_path, tokenizer, data, max_steps=1)
        assert trainer.ref_model is None
        assert len({row["ref_logps"] for row in trainer.train_dataset}) == 6
        loss, found = loss_and_gradients(trainer)
        assert loss == pytest.approx(value, rel=1e-5)
        assert difference(found, expected) < 1e-4
    with pytest.raises(
        ValueError, match="`eval_dataset` lacks the column 'ref_logps' .of pairs 'ref_chosen_logps' and"
    ):
        trainer_of(name, tmp_path, tokenizer, scored, eval_dataset=Dataset.from_list(pairs))
    with pytest.raises(ValueError, match="'ref_chosen_logps' but not the other one"):
        trainer_of(name, tmp_path, tokenizer, [pair | {"ref_chosen_logps": -1.0} for pair in pairs])


def test_stored_reference_of_other_tokens(tmp_path, tokenizer):
    """As a pair, both answers begin where the tokens of one of them do; as single answers, each for itself."""

    def lengths(rows):
        return [[len(ids[f"{side}_ids"]) for side in ("chosen", "rejected")] for ids in rows]

    rows = [
        {"prompt": "Sayi", "chosen": "s two", "rejected": "! no"},
        {"prompt": "Say:", "chosen": " a", "rejected": " b"},
    ]
    single = [
        prompt_and_response_ids(rows[0], rows[0][side], tokenizer, "<|im_end|>")[1] for side in ("chosen", "rejected")
    ]
    assert lengths([pair_ids(rows[0], tokenizer, "<|im_end|>")])[0] != [len(ids) for ids in single]
    stored = [row | {"ref_chosen_logps": -5.0, "ref_rejected_logps": -6.0} for row in rows]
    for data in (stored, Dataset.from_list(stored).to_iterable_dataset()):
        with pytest.raises(
            ValueError, match="The column 'ref_.*_logps' is a sum over . tokens, and as a single response"
        ):
            trainer_of("ulma", tmp_path, tokenizer, data, max_steps=1).train()  # of a stream when a row is read
    trainer = trainer_of("ulma", tmp_path, tokenizer, stored[1:])
    assert sorted(trainer.train_dataset["ref_logps"]) == [-6.0, -5.0]


def test_prepared_rows_are_prepared_once(tmp_path, tokenizer):
    """Scores of pairs become those of the answers, and stay so when the rows are prepared again."""
    pairs = [
        {"prompt": q, "chosen": a, "rejected": " No.", "chosen_score": 0.4, "rejected_score": 0.1}
        for q, a in tiny.QUESTIONS
    ]
    data = Dataset.from_list(pairs)
    trainer = trainer_of("uft bce", tmp_path, tokenizer, data, eval_dataset=data, ref_model=reference_of(tokenizer))
    expected = trainer.evaluate()
    for given in (trainer.eval_dataset, trainer.train_dataset, data):
        found = trainer.evaluate(given)
        for name in ("eval_loss", "eval_rewards/rejected"):
            assert found[name] == pytest.approx(expected[name], rel=1e-6)


def test_evaluation_with_a_reference_of_other_tokens(tmp_path, tokenizer):
    """Stored log-probs are compared with the options, though the training has none."""
    rows = Dataset.from_list(rows_of("uft"))
    scored = store_references(
        reference_of(tokenizer), rows, tmp_path / "stored", processing_class=tokenizer, max_length=7
    )
    trainer = trainer_of("uft", tmp_path, tokenizer, rows)
    for call in (trainer.evaluate, trainer.predict):
        with pytest.raises(ValueError, match=r"were stored with `max_length=7` \(here 1024\)"):
            call(scored)


class TestOnTensors:
    def test_values_and_gradients(self, named_trainer):
        """Against the formula, and against finite differences."""
        name, trainer = named_trainer
        generator = torch.Generator().manual_seed(0)
        tokens, ref_tokens = -4 * torch.rand(2, 6, 4, dtype=torch.float64, generator=generator)
        tokens.requires_grad_()
        rows = columns_of(name)
        found = trainer.row_loss(batch_of(tokens, ref_tokens, rows, trainer.label_threshold))
        expected = [
            FORMULAS[name][0](Answer(*pair), trainer.args, row)
            for *pair, row in zip(tokens, ref_tokens, rows, strict=True)
        ]
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=1e-9)
        torch.autograd.gradcheck(
            lambda t: trainer.row_loss(batch_of(t, ref_tokens, rows, trainer.label_threshold)),
            (tokens,),
            eps=1e-7,
            atol=1e-5,
        )

    def test_extremes(self, named_trainer):
        name, trainer = named_trainer
        for value, ref_value in ((-1e-12, -1e4), (-1e4, -1e-12), (-1e-12, -1e-12), (-1e4, -1e4), (-3.0, -3.0)):
            for length in (1, 3):
                tokens, ref_tokens = torch.full((6, length), value), torch.full((6, length), ref_value)
                tokens.requires_grad_()
                loss = trainer.row_loss(batch_of(tokens, ref_tokens, columns_of(name), trainer.label_threshold))
                loss.sum().backward()
                assert torch.isfinite(loss).all()
                assert torch.isfinite(tokens.grad).all()


# ---------------------------------------------------------------- the reference


NAMES = ["ulma pointwise", "uft"]


@pytest.mark.parametrize("name", NAMES)
class TestReference:
    def test_of_lora_is_the_model_without_it(self, name, tmp_path, tokenizer):
        trainer = trainer_of(name, tmp_path, tokenizer, peft_config=LoraConfig(r=2, target_modules="all-linear"))
        assert trainer.ref_model is None
        torch.manual_seed(0)
        with torch.no_grad():
            for key, parameter in trainer.model.named_parameters():
                if "lora_B" in key:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        trainer._reference_checked = True
        loss, _ = loss_and_gradients(trainer)
        reference = double(tiny.model("llama", tokenizer))
        expected = expected_loss(
            name, double(merged(trainer.model)), reference, tokenizer, rows_of(name), trainer.args
        )
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        at_start = expected_loss(name, reference, reference, tokenizer, rows_of(name), trainer.args)
        assert abs(loss - at_start.item()) > 1e-3

    def test_of_an_existing_adapter_is_its_start(self, name, tmp_path, tokenizer):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(tiny.model("llama", tokenizer), config)
        start = double(merged(model))
        trainer = trainer_of(name, tmp_path, tokenizer, model=model)
        loss, _ = loss_and_gradients(trainer)
        expected = expected_loss(name, start, start, tokenizer, rows_of(name), trainer.args)
        assert loss == pytest.approx(expected.item(), rel=1e-5)

    def test_of_a_model_in_memory_is_the_model(self, name, tmp_path, tokenizer, model_dir, monkeypatch):
        """Not that on the disk from which it was loaded."""
        messages = message_log(monkeypatch, sys.modules["trl_ift.reference"])
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        start = double(model)
        trainer = trainer_of(name, tmp_path, tokenizer, model=model)
        loss, _ = loss_and_gradients(trainer)
        assert loss == pytest.approx(
            expected_loss(name, start, start, tokenizer, rows_of(name), trainer.args).item(), rel=1e-5
        )
        assert "other weights than" in messages[0]

    def test_another_reference_by_mistake(self, name, tmp_path, tokenizer):
        trainer = trainer_of(name, tmp_path, tokenizer)
        with torch.no_grad():
            for parameter in trainer.ref_model.parameters():
                parameter.mul_(1.5)
        with pytest.raises(ValueError, match="The reference is not the model that is being trained"):
            trainer.train()

    def test_evaluation_after_training(self, name, tmp_path, tokenizer):
        """Without a reference in memory, a dataset needs its log-probs."""
        data = Dataset.from_list(rows_of(name))
        trainer = trainer_of(
            name, tmp_path, tokenizer, precompute_ref_log_probs=True, eval_dataset=data, max_steps=1
        )  # fmt: skip
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
        with pytest.raises(ValueError, match="after training has started"):
            trainer.evaluate(data)
        with pytest.raises(ValueError, match="after training has started"):
            trainer.predict(data)
        logps = trainer.train_dataset["ref_logps"]
        assert trainer.evaluate(data.add_column("ref_logps", list(logps)))["eval_loss"] == pytest.approx(loss)


# ---------------------------------------------------------------- data


def stream_of(dataset):
    return dataset.to_iterable_dataset()


def prepared(tmp_path, tokenizer, rows, name="uft", **settings):
    """Rows as they are trained on: ids of prompt and response, label, score."""
    trainer = trainer_of(name, tmp_path, tokenizer, rows, **settings)
    batch = next(iter(trainer.get_train_dataloader()))
    return trainer, batch


class TestData:
    def test_pairs_are_two_rows(self, tmp_path, tokenizer):
        pairs = tiny.preference_data().select(range(3))
        single = [
            {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
            for kind in ("chosen", "rejected")
            for row in pairs
        ]
        (_, found), (_, expected) = (prepared(tmp_path, tokenizer, data) for data in (pairs, single))
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value)
        assert found["score"].tolist() == [1, 1, 1, 0, 0, 0]

    @pytest.mark.parametrize("kind", [tiny.implicit_preference_data, tiny.conversational_preference_data])
    def test_pairs_of_other_forms(self, kind, tmp_path, tokenizer):
        _, batch = prepared(tmp_path, tokenizer, kind().select(range(3)))
        assert batch["label"].tolist() == [True] * 3 + [False] * 3
        assert (batch["completion_mask"].sum(1) > 0).all()

    def test_scores_of_pairs(self, tmp_path, tokenizer):
        pairs = tiny.preference_data().select(range(3))
        pairs = pairs.add_column("chosen_score", [1.0, 0.7, 0.4]).add_column("rejected_score", [0.0, 0.6, 0.3])
        _, batch = prepared(tmp_path, tokenizer, pairs)
        assert batch["score"].tolist() == pytest.approx([1, 0.7, 0.4, 0, 0.6, 0.3])
        assert batch["label"].tolist() == [True, True, False, False, True, False]
        # For ULMA only a score of 1 marks a demonstration
        _, batch = prepared(tmp_path, tokenizer, pairs, "ulma", negative_loss="continuous")
        assert batch["label"].tolist() == [True, False, False, False, False, False]
        message = (
            r"`train_dataset`, row 1: A row has the score 0.7 and no `label`.* Drop 'chosen_score' and 'rejected_score', or "
            r"choose a loss for scores \(ULMA: `negative_loss='continuous'`\)"
        )
        with pytest.raises(ValueError, match=message):
            prepared(tmp_path, tokenizer, pairs, "ulma")

    def test_label_and_score(self, tmp_path, tokenizer):
        """Each as it is given."""
        rows = [row | {"label": i == 1} for i, row in enumerate(rows_of("uft"))]
        for name in ("uft", "ulma"):
            _, batch = prepared(tmp_path, tokenizer, rows, name)
            assert batch["label"].tolist() == [False, True, False, False, False, False]
            assert batch["score"].tolist() == pytest.approx(SCORES["score"])

    def test_demonstrations_need_no_score(self, tmp_path, tokenizer):
        rows = rows_of("uft mix")
        rows[0]["score"] = rows[3]["score"] = None
        _, batch = prepared(tmp_path, tokenizer, rows)
        assert batch["score"].tolist() == pytest.approx([1.0, 0.2, 0.7, 1.0, 0.0, 0.4])
        rows[1]["score"] = None
        with pytest.raises(
            TypeError, match="`train_dataset`, row 1: column 'label' must hold true or false, found None"
        ):
            prepared(tmp_path, tokenizer, rows)

    def test_merged_data(self, tmp_path, tokenizer):
        """Demonstrations and feedback, concatenated: columns that one lacks are null."""
        demonstrations = tiny.prompt_completion_data().select(range(3)).add_column("is_sft", [True] * 3)
        feedback = Dataset.from_list(rows_of("uft")[:3]).add_column("is_sft", [False] * 3)
        _, batch = prepared(tmp_path, tokenizer, concatenate_datasets([demonstrations, feedback]))
        assert batch["score"].tolist() == pytest.approx([1, 1, 1, 1, 0.2, 0.7])
        assert batch["is_sft"].tolist() == [1, 1, 1, 0, 0, 0]

    def test_conversations(self, tmp_path, tokenizer):
        data = tiny.conversational_data().add_column("label", [True, False] * 4)
        _, batch = prepared(tmp_path, tokenizer, data)
        ids = batch["input_ids"][0][batch["completion_mask"][0] == 1]
        assert tokenizer.decode(ids).strip() == "The capital of France is Paris.<|im_end|>"

    def test_tokenized_rows(self, tmp_path, tokenizer):
        rows = rows_of("uft")
        ids = [
            {
                "prompt_ids": tokenizer(row["prompt"])["input_ids"],
                "completion_ids": [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id],
                "score": row["score"],
            }
            for row in rows
        ]
        (_, found), (_, expected) = (prepared(tmp_path, tokenizer, data) for data in (ids, rows))
        for key, value in expected.items():
            assert torch.equal(found[key], value)

    @pytest.mark.parametrize("name", ["ulma", "uft"])
    def test_streams(self, name, tmp_path, tokenizer, monkeypatch):
        runs = []
        for stream in (False, True):
            data = Dataset.from_list(rows_of(name))
            method = get_method(name)
            trainer = make(
                method.trainer_class, method.config_class, tmp_path, tiny.model("llama", tokenizer),
                data.to_iterable_dataset() if stream else data, tokenizer, max_steps=2, overwrite_output_dir=True,
                per_device_train_batch_size=3,
            )  # fmt: skip
            runs.append(step_gradients(trainer)[0])
        assert runs[0] == pytest.approx(runs[1], abs=1e-6)
        messages = message_log(monkeypatch, base, "warning_once")
        trainer.evaluate(Dataset.from_list(rows_of(name)).to_iterable_dataset())
        assert len(messages) == (name == "ulma")

    @pytest.mark.parametrize(
        "kind",
        [tiny.preference_data, tiny.implicit_preference_data, tiny.conversational_preference_data],
    )
    def test_streams_of_pairs(self, kind, tmp_path, tokenizer):
        """A good and a bad row in turn, each as in a dataset in memory."""
        pairs = kind().select(range(3)).add_column("weight", [0.5, 1.0, 2.0])
        pairs = pairs.add_column("chosen_score", [1.0, 0.7, 0.6]).add_column("rejected_score", [0.0, 0.4, 0.3])
        stream = trainer_of("uft", tmp_path, tokenizer, stream_of(pairs), max_steps=1)
        rows = list(stream.train_dataset)
        assert [row["label"] for row in rows] == [True, False] * 3
        assert [row["weight"] for row in rows] == [0.5, 0.5, 1, 1, 2, 2]
        assert [row["score"] for row in rows] == [1.0, 0.0, 0.7, 0.4, 0.6, 0.3]
        known = trainer_of("uft", tmp_path, tokenizer, pairs).train_dataset
        for column in ("prompt_ids", "completion_ids"):
            assert [row[column] for row in rows[::2] + rows[1::2]] == list(known[column])
        batch = next(iter(trainer_of(
            "ulma", tmp_path, tokenizer, stream_of(tiny.preference_data()), per_device_train_batch_size=4, max_steps=1
        ).get_train_dataloader()))  # fmt: skip
        assert batch["label"].tolist() == [True, False, True, False]

    def test_equal_pairs_are_dropped(self, tmp_path, tokenizer, monkeypatch):
        messages = message_log(monkeypatch, checks)
        rows = tiny.preference_data().to_list()
        rows[0]["rejected"] = rows[0]["chosen"]
        rows[1]["rejected"] = rows[1]["chosen"] + tokenizer.eos_token  # TRL adds it to the other one
        rows[2]["prompt"] = letters(80)
        trainer = trainer_of("uft", tmp_path, tokenizer, Dataset.from_list(rows), max_length=64)
        assert len(trainer.train_dataset) == 10
        assert messages == [
            "Dropped 6 of 16 rows of the train dataset: 4 (chosen equals rejected), 2 (the prompt fills `max_length=64`)."
        ]
        stream = trainer_of("uft", tmp_path, tokenizer, stream_of(Dataset.from_list(rows)), max_length=64)
        assert len(list(stream.train_dataset)) == 10
        messages_equal = [row | {"rejected": row["chosen"]} for row in tiny.conversational_preference_data()]
        for data in (Dataset.from_list(messages_equal), stream_of(Dataset.from_list(messages_equal))):
            with pytest.raises(ValueError, match="No row of the train dataset can be trained: .* of a pair are equal"):
                trainer_of("uft", tmp_path, tokenizer, data)

    def test_endless_streams_of_equal_pairs(self, tmp_path, tokenizer):
        def rows():
            while True:
                yield {"prompt": "Q", "chosen": " a", "rejected": " a"}

        with pytest.raises(ValueError, match="No row of the train dataset can be trained"):
            trainer_of("uft", tmp_path, tokenizer, IterableDataset.from_generator(rows), max_steps=1)

    @pytest.mark.parametrize("form", ["torch", "numpy"])
    @pytest.mark.parametrize("kind", ["text", "messages", "pairs", "tokens"])
    def test_formatted_data(self, kind, form, tmp_path, tokenizer):
        scores = [1.0, 0.2, 0.7, 1.0, 0.0, 0.4, 0.6, 1.0]
        data = {
            "text": tiny.prompt_completion_data,
            "messages": tiny.conversational_data,
            "pairs": tiny.conversational_preference_data,
            "tokens": tiny.prompt_completion_data,
        }[kind]()
        if kind != "pairs":
            data = data.add_column("score", scores).add_column("is_sft", [score == 1 for score in scores])
        data = data.add_column("weight", [1.0, 2.0] * 4)
        trainer = trainer_of("uft", tmp_path, tokenizer, data)
        expected = step_gradients(trainer)[0]
        if kind == "tokens":
            data = trainer.train_dataset.remove_columns(["prompt", "completion", "label"])
        data = data.with_format(form)
        trainer = trainer_of("uft", tmp_path, tokenizer, data)
        assert step_gradients(trainer)[0] == expected
        assert math.isfinite(trainer.evaluate(data)["eval_loss"])
        assert math.isfinite(trainer.predict(data).metrics["test_loss"])

    def test_streams_cannot_be_precomputed(self, tmp_path, tokenizer):
        """Which is said before a model is loaded; with log-probs of their own there is nothing to compute."""
        data, settings = Dataset.from_list(rows_of("uft")), {"precompute_ref_log_probs": True}
        for train, other in ((stream_of(data), None), (data, stream_of(data))):
            with pytest.raises(ValueError, match="is not supported with IterableDataset, and `.*_dataset` is one"):
                trainer_of("uft", tmp_path, tokenizer, train, model="no such model", eval_dataset=other, **settings)
        stored = stream_of(data.add_column("ref_logps", [-20.0] * 6))
        trainer_of("uft", tmp_path, tokenizer, stored, **settings).train()

    @pytest.mark.parametrize("change", [{"label": False}, {"score": 0.9}, {"label": True, "score": 0.5}])
    def test_demonstrations_are_perfect(self, change, tmp_path, tokenizer):
        demonstration = {"prompt": "Q", "completion": " a", "is_sft": True, "label": None, "score": None} | change
        good = {"prompt": "Q", "completion": " b", "is_sft": True, "label": True, "score": 1.0}
        with pytest.raises(
            ValueError, match="`train_dataset`, row 1: A row is a demonstration .* Set `is_sft` to false"
        ):
            trainer_of("uft", tmp_path, tokenizer, Dataset.from_list([good, demonstration]))
        later = trainer_of(
            "uft", tmp_path, tokenizer, stream_of(Dataset.from_list([good] * 1000 + [demonstration])), max_steps=1
        )  # fmt: skip
        with pytest.raises(ValueError, match="A row is a demonstration"):
            list(later.train_dataset)

    def test_dropped_rows(self, tmp_path, tokenizer, monkeypatch):
        messages = message_log(monkeypatch, checks)
        rows = rows_of("ulma")
        rows[0]["prompt"] = letters(80)
        rows[2]["completion"] = "  "  # a good one
        rows[4]["completion"] = " "  # a bad one
        trainer = trainer_of("ulma", tmp_path, tokenizer, rows, max_length=64)
        assert len(trainer.train_dataset) == 4
        assert messages == [
            "Dropped 2 of 6 rows of the train dataset: 1 (the prompt fills `max_length=64`), 1 (a good response is empty)."
        ]
        with pytest.raises(ValueError, match="No row of the train dataset can be trained"):
            trainer_of("ulma", tmp_path, tokenizer, rows, max_length=3)

    def test_no_advice_on_ktos_weights(self, tmp_path, tokenizer, monkeypatch):
        messages = message_log(monkeypatch, sys.modules["trl.trainer.kto_trainer"])
        trainer_of("ulma", tmp_path, tokenizer)
        assert messages == []

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (
                {"label": 1},
                TypeError,
                r"row 0: column 'label' must hold true or false, found 1 \(int\). Convert the column",
            ),
            (
                {"label": None, "score": 1.2},
                ValueError,
                r"row 0: column 'score' holds 1.2, expected a finite number in \[0, 1\]",
            ),
            ({"label": None, "score": "good"}, TypeError, "row 0: column 'score' must hold numbers, found 'good'"),
            ({"label": None, "score": math.nan}, ValueError, "row 0: column 'score' holds nan"),
            ({"label": None}, TypeError, "row 0: column 'label' must hold true or false, found None"),
            (
                {"weight": -1.0},
                ValueError,
                r"row 0: column 'weight' holds -1.0, expected a finite number in \[0, inf\]",
            ),
            ({"is_sft": 1}, TypeError, "row 0: column 'is_sft' must hold true or false, found 1"),
            ({"ref_logps": 3.0}, ValueError, "row 0: column 'ref_logps' holds 3.0"),
            ({"completion": None}, TypeError, "'prompt' and 'completion' must both|must all be strings"),
            ({"image": "x.png"}, ValueError, "is a vision dataset"),
        ],
    )
    def test_wrong_values(self, change, error, message, tmp_path, tokenizer):
        rows = [{"prompt": "Q", "completion": " a", "label": True} | change] * 2
        with pytest.raises(error, match=message):
            trainer_of("uft", tmp_path, tokenizer, rows)

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"prompt": "Q", "completion": " a"}, "`train_dataset` has no feedback; its columns are"),
            ({"prompt": "Q", "label": True}, "`train_dataset` lacks the column 'completion'"),
            ({"question": "Q", "answer": " a", "label": True}, "lacks the column 'prompt' and 'completion'"),
            ({"prompt": "Q", "chosen": " a", "rejected": " b", "label": True}, "has pairs .* and the column 'label'"),
            ({"prompt": "Q", "chosen": " a", "rejected": " b", "chosen_score": 1.0}, "but not the other one"),
            (
                {
                    "prompt": "Q",
                    "chosen": " a",
                    "rejected": " b",
                    "prompt_ids": [5],
                    "chosen_ids": [6],
                    "rejected_ids": [7],
                },
                "has pairs that are tokenized .* Drop these columns",
            ),
            (
                {"prompt": "Q", "chosen": " a", "rejected": " b", "ref_logps": -1.0},
                "has pairs .* and the column 'ref_logps'",
            ),
        ],
    )
    def test_wrong_columns(self, row, message, tmp_path, tokenizer):
        with pytest.raises(ValueError, match=message):
            trainer_of("uft", tmp_path, tokenizer, [row] * 2)

    def test_bad_input_comes_before_the_model(self, tmp_path, model_dir, monkeypatch):
        def load(*args, **kwargs):
            raise AssertionError("the model was loaded")

        monkeypatch.setattr("trl.trainer.kto_trainer.create_model_from_path", load)
        data = Dataset.from_list([{"prompt": "Q", "completion": " a", "score": 3.0}])
        args = UFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
        with pytest.raises(ValueError, match="column 'score' holds 3.0"):
            UFTTrainer(model=model_dir, args=args, train_dataset=data)
        with pytest.raises(AssertionError, match="was loaded"):
            UFTTrainer(model=model_dir, args=args, train_dataset=Dataset.from_list(rows_of("uft")))

    def test_references_of_two_kinds(self, tmp_path, tokenizer):
        rows = rows_of("uft")
        stored = [row | {"ref_logps": -20.0} for row in rows]
        for train, other, message in (
            (
                stored,
                rows,
                "`eval_dataset` lacks the column 'ref_logps' .* that .* Add it, or drop it there so that .* computes it",
            ),
            (
                rows,
                stored,
                "`eval_dataset` has the column 'ref_logps' .* and `train_dataset` lacks it, .* Add it there",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                trainer_of("uft", tmp_path, tokenizer, train, eval_dataset=Dataset.from_list(other))
        with pytest.raises(ValueError, match="and a `ref_model` was passed. Drop one of the two"):
            trainer_of("uft", tmp_path, tokenizer, stored, ref_model=reference_of(tokenizer))

    def test_a_collator_that_loses_the_scores(self, tmp_path, tokenizer):
        collator = DataCollatorForUnpairedPreference(pad_token_id=tokenizer.pad_token_id)
        with pytest.raises(ValueError, match=r"`data_collator` \(DataCollator.*\) leaves out 'score'"):
            trainer_of("uft", tmp_path, tokenizer, data_collator=collator)
        own = UnpairedCollator(pad_token_id=tokenizer.pad_token_id, columns=COLUMNS)
        rows = [row | {"ref_logps": -5.0} for row in rows_of("uft")]

        def without(rows):
            return {key: value for key, value in own(rows).items() if key != "ref_logps"}

        with pytest.raises(ValueError, match="leaves out 'ref_logps', which the loss reads"):
            trainer_of("uft", tmp_path, tokenizer, rows, data_collator=without)

    def test_a_reference_that_moves_and_one_that_is_stored(self, tmp_path, tokenizer):
        rows = [row | {"ref_logps": -5.0} for row in rows_of("uft")]
        with pytest.raises(ValueError, match="`sync_ref_model=True` moves the reference"):
            trainer_of("uft", tmp_path, tokenizer, rows, sync_ref_model=True)

    def test_real_rows(self, tmp_path, tokenizer):
        """Answers of models to questions of TruthfulQA and GSM8K, with human labels or their correctness."""
        shared = Path(__file__).parent.parent.parent / "shared" / "data"
        path = Path(os.environ.get("TRL_IFT_TEST_DATA", shared)) / "unpaired_text_test.jsonl.gz"
        if not path.is_file():
            pytest.skip(f"{path} is absent")
        data = load_dataset("json", data_files=str(path), split="train").select(range(40))
        for name in ("ulma", "uft"):
            trainer = trainer_of(name, tmp_path, tokenizer, data, max_steps=3, max_length=256, learning_rate=1e-3)
            trainer.train()
            assert math.isfinite(trainer.state.log_history[-1]["train_loss"])
            assert len(trainer.train_dataset) > 20


class Difficulty(UnpairedTrainer):
    """A method with a column of its own."""

    config_class, method = UnpairedConfig, "uft"
    columns = (Column("difficulty", low=0, required=True),)
    _name = "Difficulty"

    def row_loss(self, batch):
        return -batch.logps / batch.lengths * batch.columns["difficulty"]


def test_columns_of_a_method(tmp_path, tokenizer):
    data = Dataset.from_list(rows_of("ulma")[:2])
    with pytest.raises(ValueError, match="`train_dataset` lacks the column 'difficulty'"):
        make(Difficulty, UnpairedConfig, tmp_path, tiny.model("llama", tokenizer), data, tokenizer)
    with pytest.raises(ValueError, match="column 'difficulty' holds -1.0"):
        make(Difficulty, UnpairedConfig, tmp_path, None, data.add_column("difficulty", [2.0, -1.0]), tokenizer)
    trainer = make(
        Difficulty, UnpairedConfig, tmp_path, tiny.model("llama", tokenizer), data.add_column("difficulty", [2.0, 3.0]),
        tokenizer,
    )  # fmt: skip
    twin = double(trainer.model)
    nll = [-token_logps(twin, tokenizer, row["prompt"], row["completion"]).mean().item() for row in data]
    assert loss_and_gradients(trainer)[0] == pytest.approx((2 * nll[0] + 3 * nll[1]) / 2, rel=1e-5)


def test_only_tokens_of_responses_are_projected(tmp_path, tokenizer, monkeypatch):
    numbers, original = [], LogProbFunction.apply

    def apply(hidden, *arguments):
        numbers.append(hidden.size(0))
        return original(hidden, *arguments)

    monkeypatch.setattr(LogProbFunction, "apply", staticmethod(apply))
    loss_and_gradients(trainer_of("uft", tmp_path, tokenizer))
    tokens = sum(len(tokenizer(row["completion"])["input_ids"]) + 1 for row in rows_of("uft"))
    assert numbers == [tokens, tokens]  # of the reference and of the policy


def test_several_evaluation_datasets(tmp_path, tokenizer):
    data = Dataset.from_list(rows_of("ulma"))
    parts = {"first": data.select([0, 1]), "second": data.select([2, 3, 4, 5])}
    trainer = trainer_of("ulma", tmp_path, tokenizer, eval_dataset=parts, per_device_eval_batch_size=1)
    twin = double(trainer.model)
    for found in (trainer.evaluate(), trainer.evaluate(parts)):
        for name, rows in parts.items():
            expected = expected_loss("ulma", twin, twin, tokenizer, rows.to_list(), trainer.args).item()
            assert found[f"eval_{name}_loss"] == pytest.approx(expected, rel=1e-5)


def test_resuming(tmp_path, tokenizer):
    settings = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2, "max_steps": 4}
    whole = trainer_of("uft", tmp_path, tokenizer, **settings)
    whole.train()
    again = trainer_of("uft", tmp_path, tokenizer, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for ours, theirs in zip(again.state.log_history[2:4], whole.state.log_history[2:4], strict=True):
        for name in ("loss", "grad_norm", "num_tokens", "uft/mse"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6)


def test_a_mixture_of_experts_keeps_its_router_loss(tmp_path, tokenizer):
    losses = {}
    for coefficient in (0.0, 0.3):
        model = tiny.model("qwen3-moe", tokenizer, output_router_logits=True)
        trainer = trainer_of("ulma", tmp_path, tokenizer, model=model, router_aux_loss_coef=coefficient)
        losses[coefficient] = loss_and_gradients(trainer)[0]
    aux = trainer._metrics["train"]["aux_loss"][-1]
    assert losses[0.3] - losses[0.0] == pytest.approx(0.3 * aux, rel=1e-4)
    assert aux > 0


def test_metrics_are_trls(tmp_path, tokenizer):
    """Names and values of `KTOTrainer`, where those are exact: in a step of one batch."""
    rows = rows_of("uft labels")
    ours = trainer_of("uft labels", tmp_path, tokenizer, max_steps=1, ref_model=reference_of(tokenizer))
    ours.train()
    theirs = make(
        lambda **arguments: KTOTrainer(ref_model=reference_of(tokenizer), **arguments), KTOConfig, tmp_path,
        tiny.model("llama", tokenizer), Dataset.from_list(rows), tokenizer, loss_type="apo_zero_unpaired", beta=0.1,
        max_steps=1, per_device_train_batch_size=6,
    )  # fmt: skip
    theirs.train()
    found, expected = ours.state.log_history[0], theirs.state.log_history[0]
    kept = set(expected) - {"loss", "grad_norm", "kl"}
    assert kept <= set(found)
    assert {name for name in found if "/" in name} - kept == {"uft/mse", "uft/saturated", "uft/correlation"}
    for name in kept:
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "kto"}, "`loss_type='kto'` has no effect on this method's loss"),
        (
            {"train_sampling_strategy": "group_by_length"},
            "`train_sampling_strategy='group_by_length'` is not known. Choose one of: 'random', 'sequential'",
        ),
        ({"beta": 0.0}, r"`beta=0.0` is out of range: it must lie in \(0, inf\)"),
        ({"desirable_weight": -1.0}, "`desirable_weight=-1.0` is out of range"),
        ({"desirable_weight": 0.0, "undesirable_weight": 0.0}, "are both 0: nothing would be trained"),
        ({"ref_model_sync_steps": 3}, "`ref_model_sync_steps=3` has no effect without `sync_ref_model=True`"),
        (
            {"positive_loss": "ce"},
            "`positive_loss='ce'` is not known. Choose one of: 'nll', 'beta_nll', 'pointwise_dpo'",
        ),
        ({"negative_loss": "mse"}, "`negative_loss='mse'` is not known"),
        ({"logp_reduction": "median"}, "`logp_reduction='median'` is not known"),
        ({"batch_reduction": "sum"}, "`batch_reduction='sum'` is not known"),
        ({"log_z": math.inf}, "`log_z=inf` is out of range"),
    ],
)
def test_wrong_options_of_ulma(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        ULMAConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score_loss": "mae"}, "`score_loss='mae'` is not known. Choose one of: 'mse', 'bce'"),
        ({"sft_weight": -1.0}, "`sft_weight=-1.0` is out of range"),
        ({"score_clip": 0.5}, "`score_clip=0.5` makes all scores equal"),
        ({"score_clip": 0.6}, r"`score_clip=0.6` is out of range: it must lie in \[0, 0.5\]"),
        ({"reward_offset": math.nan}, "`reward_offset=nan` is out of range"),
    ],
)
def test_wrong_options_of_uft(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        UFTConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_a_weight_of_demonstrations_needs_them(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="`sft_weight=2.0` has no effect: `train_dataset` lacks the column 'is_sft'"):
        trainer_of("uft", tmp_path, tokenizer, sft_weight=2.0)


def test_rows_are_shuffled_by_default(tmp_path):
    assert ULMAConfig(str(tmp_path), use_cpu=True, bf16=False).train_sampling_strategy == "random"


# ---------------------------------------------------------------- ULMA: numbers and identities


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=0,
        atol=tolerance,
    )


LOGPS = tensor([-1.2, -0.8, -2.0, -3.0], dtype=torch.float64)
REF_LOGPS = tensor([-1.0, -1.5, -2.5, -2.0], dtype=torch.float64)
GOOD = tensor([True, False, True, False])


class TestULMA:
    def test_numbers(self):
        score = GOOD.double()
        pointwise = ulma_loss(LOGPS, REF_LOGPS, GOOD, score, 0.1, "pointwise_dpo")
        close(pointwise, [0.7031971797, 0.7287595555, 0.6684596480, 0.6443966601])
        losses = ulma_loss(LOGPS, REF_LOGPS, GOOD, score, 0.1)
        close(losses, [1.2, 0.7287595555, 2.0, 0.6443966601])
        close(losses[GOOD].mean() + losses[~GOOD].mean(), 2.2865781078)
        close(losses.mean(), 1.1432890539)
        close(pointwise[GOOD].mean() + pointwise[~GOOD].mean(), 1.3724065217)
        scores = tensor([1, 0.2, 1, 0.6], dtype=torch.float64)
        close(ulma_loss(LOGPS, REF_LOGPS, scores == 1, scores, 0.1, "nll", "continuous"), [1.2, 0.0169, 2.0, 0.49])

    def test_numbers_of_the_trainer(self, tmp_path, tokenizer):
        """The two reductions of the rows, by the base."""
        for reduction, expected in (("class_means", 2.2865781078), ("row_mean", 1.1432890539)):
            trainer = trainer_of("ulma", tmp_path, tokenizer, batch_reduction=reduction)
            losses = ulma_loss(LOGPS, REF_LOGPS, GOOD, GOOD.double(), 0.1)
            close(trainer._mean(losses, GOOD), expected)
            only_good = trainer._mean(losses[GOOD], GOOD[GOOD])  # an absent class counts 0
            close(only_good, 1.6)

    def test_of_good_answers_alone_is_sft(self, tmp_path, tokenizer):
        rows = [row | {"label": True} for row in rows_of("ulma")]
        for reduction in ("sum", "mean"):
            trainer = trainer_of("ulma", tmp_path, tokenizer, rows, logp_reduction=reduction)
            twin = double(trainer.model)
            tokens = [token_logps(twin, tokenizer, row["prompt"], row["completion"]) for row in rows]
            nll = [-getattr(logps, reduction)().item() for logps in tokens]
            assert loss_and_gradients(trainer)[0] == pytest.approx(np.mean(nll), rel=1e-5)
        # With one row, TRL's own SFT
        one = trainer_of("ulma", tmp_path, tokenizer, rows[:1])
        data = Dataset.from_list([{key: rows[0][key] for key in ("prompt", "completion")}])
        sft = make(SFTTrainer, SFTConfig, tmp_path, tiny.model("llama", tokenizer), data, tokenizer)
        (loss, found), (expected, theirs) = loss_and_gradients(one), loss_and_gradients(sft)
        assert loss == pytest.approx(expected, rel=1e-5)
        assert difference(found, theirs) < 1e-5

    @pytest.mark.parametrize("positive_loss", ["nll", "beta_nll", "pointwise_dpo"])
    def test_of_bad_answers_alone_is_pointwise_dpo(self, positive_loss):
        bad = torch.zeros(4, dtype=torch.bool)
        close(
            ulma_loss(LOGPS, REF_LOGPS, bad, bad.double(), 0.1, positive_loss, log_z=0.2),
            F.softplus(0.1 * (LOGPS - REF_LOGPS) + 0.2),
        )

    def test_pointwise_on_a_pair_is_bco(self, tmp_path, tokenizer):
        """The two rows of a pair, summed: TRL's "bco_pair"."""
        pair = tiny.preference_data().select([0])
        settings = {"beta": 0.3, "ref_model": reference_of(tokenizer)}
        trainer = trainer_of("ulma pointwise", tmp_path, tokenizer, pair, log_z=0.0, **settings)
        bco = make(
            lambda **arguments: PreferenceTrainer(ref_model=reference_of(tokenizer), **arguments), PreferenceConfig,
            tmp_path, tiny.model("llama", tokenizer), pair, tokenizer, loss_type="bco_pair", beta=0.3,
        )  # fmt: skip
        (loss, found), (expected, theirs) = loss_and_gradients(trainer), loss_and_gradients(bco)
        assert loss == pytest.approx(expected, rel=1e-5)  # class means of one row each
        assert difference(found, theirs) < 1e-5

    def test_direction_of_the_continuous_loss(self):
        """A score above log Z pushes the answer up at the start, one below it down."""
        scores = tensor([0.0, 0.2, 0.8, 1.0], dtype=torch.float64)
        bad = torch.zeros(4, dtype=torch.bool)
        for log_z, signs in ((0.0, [0, -1, -1, -1]), (0.5, [1, 1, -1, -1])):
            logps = LOGPS.clone().requires_grad_()
            losses = ulma_loss(logps, LOGPS, bad, scores, 0.1, "nll", "continuous", log_z)
            (found,) = torch.autograd.grad(losses.sum(), logps)
            assert found.sign().tolist() == signs

    @pytest.mark.parametrize("kind", ["labels", "null scores", "pairs"])
    def test_continuous_needs_scores(self, kind, tmp_path, tokenizer):
        rows = rows_of("ulma")
        if kind == "null scores":
            rows = [row | {"score": None if i == 4 else 0.5} for i, row in enumerate(rows)]
        data = tiny.preference_data() if kind == "pairs" else Dataset.from_list(rows)
        for dataset in (data, stream_of(data)):
            with pytest.raises(ValueError, match="A bad answer has no score, which the loss would take for 0"):
                trainer = trainer_of("ulma", tmp_path, tokenizer, dataset, negative_loss="continuous")
                list(trainer.train_dataset)  # of a stream, a row that is not the first
        # Good answers need none
        rows = [row | {"score": None if row["label"] else 0.5} for row in rows]
        loss, _ = loss_and_gradients(trainer_of("ulma", tmp_path, tokenizer, rows, negative_loss="continuous"))
        assert math.isfinite(loss)

    def test_no_good_answer_is_said(self, tmp_path, tokenizer, monkeypatch):
        messages = message_log(monkeypatch, ulma_module)
        pairs = tiny.preference_data().add_column("chosen_score", [0.9] * 8).add_column("rejected_score", [0.1] * 8)
        trainer_of("ulma", tmp_path, tokenizer, pairs, negative_loss="continuous")
        assert messages[0].startswith("No row of the train dataset has the label true")
        trainer_of("ulma", tmp_path, tokenizer, eval_dataset=Dataset.from_list(rows_of("ulma")[1:2]))
        assert messages[1].startswith("No row of the eval dataset has the label true")
        assert len(messages) == 2

    def test_at_the_start(self):
        close(ulma_loss(LOGPS, LOGPS, GOOD, GOOD.double(), 0.1, "pointwise_dpo"), [math.log(2)] * 4)

    def test_is_monotonic_in_the_ratio_and_sees_nothing_else(self):
        r = torch.linspace(-50, 50, 101, dtype=torch.float64)
        for label, sign in ((True, -1), (False, 1)):
            labels = torch.full((101,), label)
            losses = ulma_loss(r, torch.zeros_like(r), labels, labels.double(), 0.1, "pointwise_dpo")
            assert (sign * losses.diff() > 0).all()
            shifted = ulma_loss(r - 7, torch.full_like(r, -7), labels, labels.double(), 0.1, "pointwise_dpo")
            close(shifted, losses)

    def test_gradients(self):
        """Of a bad answer beta sigma(beta r + log Z), bounded by beta; of a good one -1."""
        logps = LOGPS.clone().requires_grad_()
        (found,) = torch.autograd.grad(ulma_loss(logps, REF_LOGPS, GOOD, GOOD.double(), 0.1, log_z=0.2).sum(), logps)
        push = 0.1 * torch.sigmoid(0.1 * (LOGPS - REF_LOGPS) + 0.2)
        close(found, torch.where(GOOD, -1.0, push))
        for ratio, expected in ((1e4, 0.1), (-1e4, 0.0)):
            far = (REF_LOGPS + ratio).requires_grad_()
            bad = torch.zeros(4, dtype=torch.bool)
            (found,) = torch.autograd.grad(ulma_loss(far, REF_LOGPS, bad, bad.double(), 0.1).sum(), far)
            close(found, [expected] * 4)

    def test_metrics(self, tmp_path, tokenizer):
        reference = reference_of(tokenizer)
        trainer = trainer_of(
            "ulma", tmp_path, tokenizer, ref_model=reference, per_device_train_batch_size=2,
            gradient_accumulation_steps=3, max_steps=1,
        )  # fmt: skip
        trainer.train()
        found = trainer.state.log_history[0]
        twin, theirs = double(tiny.model("llama", tokenizer)), double(reference)
        losses, label = losses_of("ulma", twin, theirs, tokenizer, rows_of("ulma"), trainer.args)
        assert found["ulma/positive_loss"] == pytest.approx(losses[label].mean().item(), rel=1e-4)
        assert found["ulma/negative_loss"] == pytest.approx(losses[~label].mean().item(), rel=1e-4)
        rewards = []
        for row in rows_of("ulma"):
            logps = [
                token_logps(model, tokenizer, row["prompt"], row["completion"]).mean() for model in (twin, theirs)
            ]
            rewards.append(0.1 * (logps[0] - logps[1]).item())
        rewards = tensor(rewards)
        assert found["rewards/chosen"] == pytest.approx(rewards[label].mean().item(), rel=1e-3)
        assert found["rewards/margins"] == pytest.approx(
            (rewards[label].mean() - rewards[~label].mean()).item(), rel=1e-3
        )
        assert found["ulma/push"] == pytest.approx(rewards[~label].sigmoid().mean().item(), rel=1e-4)


# ---------------------------------------------------------------- UFT: numbers and identities


def slope(z_of, *arguments, **options):
    r = tensor([z_of], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(uft_loss(r, *arguments, **options).sum(), r)
    return found.item()


class TestUFT:
    @pytest.mark.parametrize(
        ("ratio", "score", "options", "expected"),
        [
            (12, 0.7, {"beta": 0.03}, 0.0123120253),
            (-40, 0.2, {"beta": 0.03}, 0.0009906893),
            (12, 0.7, {"beta": 0.03, "reward_offset": 0.25}, 0.0027101601),
            (12, 1, {"beta": 0.01, "score_loss": "bce"}, 0.6349461016),
            (-8, 0, {"beta": 0.01, "score_loss": "bce"}, 0.6539469673),
        ],
    )
    def test_numbers(self, ratio, score, options, expected):
        found = uft_loss(tensor([ratio], dtype=torch.float64), tensor([score], dtype=torch.float64), **options)
        close(found, [expected])

    def test_number_of_a_batch(self, tmp_path, tokenizer):
        ratios, scores = tensor([[0, 12, -40], [1, 0.7, 0.2]], dtype=torch.float64)
        losses = uft_loss(ratios, scores, 0.03)
        trainer = trainer_of("uft", tmp_path, tokenizer)
        close(trainer._mean(losses, scores >= 0.5), 0.0877675715)

    def test_at_the_start(self):
        zero, half = torch.zeros(1, dtype=torch.float64), torch.full((1,), 0.5, dtype=torch.float64)
        close(uft_loss(zero, half, 0.01), [0])
        assert slope(0.0, half, 0.01) == 0
        for score, expected in ((1.0, -0.0025), (0.0, 0.0025)):
            target = tensor([score], dtype=torch.float64)
            close(uft_loss(zero, target, 0.01), [0.25])
            assert slope(0.0, target, 0.01) == pytest.approx(expected, abs=1e-12)

    def test_saturation(self):
        """The squared error has no gradient where it is badly wrong; the cross-entropy has."""
        one = torch.ones(1, dtype=torch.float64)
        assert abs(slope(-40 / 0.01, one, 0.01)) < 1e-15
        assert slope(-40 / 0.01, one, 0.01, score_loss="bce") == pytest.approx(-0.01, abs=1e-12)

    def test_offset_and_clip(self):
        r, s = tensor([[-9.0, 3.0, 30.0], [0.0, 0.4, 1.0]], dtype=torch.float64)
        for kind in ("mse", "bce"):
            close(
                uft_loss(r, s, 0.1, kind, reward_offset=0.7),
                uft_loss(r + 7, s, 0.1, kind),
            )
            clipped = tensor([0.1, 0.4, 0.9], dtype=torch.float64)
            close(uft_loss(r, s, 0.1, kind, score_clip=0.1), uft_loss(r, clipped, 0.1, kind))

    def test_gradient_at_small_beta_is_that_of_sft(self, tmp_path, tokenizer):
        """-0.25 beta grad log pi, of sums over tokens."""
        rows = [row | {"score": 1.0} for row in rows_of("uft")]
        beta = 1e-4
        _, found = loss_and_gradients(trainer_of("uft", tmp_path, tokenizer, rows, beta=beta))
        twin = double(tiny.model("llama", tokenizer))
        logps = [token_logps(twin, tokenizer, row["prompt"], row["completion"]).sum() for row in rows]
        (-0.25 * beta * torch.stack(logps).mean()).backward()
        assert difference(found, gradients(twin)) < 1e-4

    def test_bce_on_a_pair_is_half_of_bco(self, tmp_path, tokenizer):
        pair = tiny.preference_data().select([0])
        trainer = trainer_of(
            "uft", tmp_path, tokenizer, pair, score_loss="bce", beta=0.3, ref_model=reference_of(tokenizer)
        )
        bco = make(
            lambda **arguments: PreferenceTrainer(ref_model=reference_of(tokenizer), **arguments), PreferenceConfig,
            tmp_path, tiny.model("llama", tokenizer), pair, tokenizer, loss_type="bco_pair", beta=0.3,
        )  # fmt: skip
        (loss, found), (expected, theirs) = loss_and_gradients(trainer), loss_and_gradients(bco)
        assert 2 * loss == pytest.approx(expected, rel=1e-5)
        assert difference({key: 2 * value for key, value in found.items()}, theirs) < 1e-5

    def test_of_a_pair_is_dpo(self, tmp_path, tokenizer):
        """- log sigma of the difference of the rewards that the metrics show is DPO's loss."""
        pair = tiny.preference_data().select([0])
        settings = {"beta": 0.3, "ref_model": reference_of(tokenizer)}
        trainer = trainer_of("uft", tmp_path, tokenizer, pair, max_steps=1, **settings)
        trainer.train()
        margin = trainer.state.log_history[0]["rewards/margins"]
        dpo = make(
            lambda **arguments: PreferenceTrainer(ref_model=reference_of(tokenizer), **arguments), PreferenceConfig,
            tmp_path, tiny.model("llama", tokenizer), pair, tokenizer, beta=0.3,
        )  # fmt: skip
        assert loss_and_gradients(dpo)[0] == pytest.approx(-logsigmoid(tensor(margin)).item(), rel=1e-4)

    def test_metrics(self, tmp_path, tokenizer):
        reference = reference_of(tokenizer)
        trainer = trainer_of(
            "uft mix", tmp_path, tokenizer, ref_model=reference, per_device_train_batch_size=1,
            gradient_accumulation_steps=6, max_steps=1, beta=2.2,
        )  # fmt: skip
        trainer.train()
        found = trainer.state.log_history[0]
        assert not any(name.startswith("_") for name in found)
        twin, theirs = double(tiny.model("llama", tokenizer)), double(reference)
        z = []
        for row in rows_of("uft mix"):
            logps = [token_logps(model, tokenizer, row["prompt"], row["completion"]).sum() for model in (twin, theirs)]
            z.append(2.2 * (logps[0] - logps[1]).item())
        z, s = np.array(z), np.array(SCORES["score"])
        q = 1 / (1 + np.exp(-z))
        sft = np.array(FORMULAS["uft mix"][2]["is_sft"])
        assert 0 < ((np.abs(z) > 4) & (np.abs(z) < 5)).mean() < 1
        expected = {
            "uft/correlation": np.corrcoef(q, s)[0, 1],
            "uft/mse": ((q - s) ** 2).mean(),
            "uft/saturated": (np.abs(z) > 4).mean(),
            "uft/rewards_sft": z[sft].mean(),
        }
        assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-3)

    def test_no_correlation_without_differences(self, tmp_path, tokenizer):
        trainer = trainer_of("uft", tmp_path, tokenizer, max_steps=1)
        trainer.train()  # the policy is the reference
        assert "uft/correlation" not in trainer.state.log_history[0]

    def test_learns_the_scores(self, tmp_path, tokenizer):
        trainer = trainer_of("uft", tmp_path, tokenizer, beta=0.1, max_steps=40)
        trainer.train()
        first, last = trainer.state.log_history[1], trainer.state.log_history[-2]
        assert last["uft/mse"] < 0.02 < first["uft/mse"]
        assert last["uft/correlation"] > 0.9


# ---------------------------------------------------------------- two processes

SCRIPT = Path(__file__).parent / "two_processes_unpaired.py"


@pytest.fixture(scope="module")
def two(tmp_path_factory, model_dir):
    """Log histories and gradients of the runs of the script on 2 gloo processes."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    process = subprocess.Popen(
        [*command, model_dir, str(folder)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, errors = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # torchrun's workers too
        raise
    assert process.returncode == 0, errors[-3000:]
    return json.loads((folder / "histories.json").read_text()), torch.load(folder / "gradients.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("key", [*RUNS, *(f"{name} precomputed" for name in RUNS)])
def test_two_processes(key, two, model_dir, tokenizer, tmp_path):
    """One row at a time on each of two processes: the step, the metrics and the evaluation of one process."""
    name = key.split()[0]
    trainer, expected = step(name, model_dir, tokenizer, tmp_path, 4, 1, **RUNS[name])
    histories, found = two
    assert difference(found[key], expected) < 1e-5
    one, both = trainer.state.log_history, histories[key]
    names = ["rewards/margins", "logps/chosen", "logps/rejected", "loss"]
    for metric in names:
        assert both[0][metric] == pytest.approx(one[0][metric], rel=1e-3, abs=1e-6), metric
        assert both[-1][f"eval_{metric}"] == pytest.approx(one[-1][f"eval_{metric}"], rel=1e-3), metric


def test_the_base_has_no_loss(tmp_path):
    """It says so before anything is loaded."""
    with pytest.raises(TypeError, match="abstract.*row_loss"):
        UnpairedTrainer(model="/nonexistent/model")
