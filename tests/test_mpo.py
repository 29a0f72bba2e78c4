"""MPO: the numbers and properties of its terms, DPO, SFT and a closed form as yardsticks, and the trainer's samples."""

import gc
import json
import math
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import datasets
import pytest
import tiny
import torch
import two_processes_tpo_mpo
from datasets import Dataset, IterableDataset
from pairs import (
    anchored,
    difference,
    double,
    gradients,
    letters,
    logs,
    loss_and_gradients,
    make,
    message_log,
    response_ids,
    samples,
    step_gradients,
    texts,
    token_logps,
)
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from trl_ift import MPOConfig, MPOTrainer
from trl_ift.data.generation import generate_completions, load_completions, model_fingerprint
from trl_ift.preference import mpo
from trl_ift.preference.mpo import mpo_pair_loss, reverse_kl_samples
from trl_ift.scripts import train as script


LORA = {"r": 4, "target_modules": "all-linear"}


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(found, expected, tolerance=5e-10):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(found).double(), expected, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- the pure functions


CHOSEN, REJECTED = float64(-20, -15), float64(-24, -14)
MARGINS = (CHOSEN - float64(-22, -14.5)) - (REJECTED - float64(-23, -15.25))
REG, REF_REG = float64(-12, -8), float64(-12.5, -7.25)


class TestNumbers:
    def test_reference(self):
        margins = MARGINS.clone().requires_grad_()
        loss = mpo_pair_loss(0.1 * margins)
        close(loss, [-0.5744425168, -0.4563613128])
        close(loss.mean(), -0.5154019148)
        (slope,) = torch.autograd.grad(loss.sum(), margins)
        close(slope, [-0.0244458312, -0.0248095665])
        (dpo,) = torch.autograd.grad(-logsigmoid(0.1 * margins).sum(), margins)
        close(dpo, [-0.0425557483, -0.0543638687])
        close(mpo_pair_loss(MARGINS), [-0.9525741268, -0.1480471980])
        close(mpo_pair_loss(MARGINS).mean(), -0.5503106624)

    def test_reference_free_and_length_norm(self):
        close(mpo_pair_loss(CHOSEN - REJECTED), [-0.9820137900, -0.2689414214])
        close(mpo_pair_loss(0.1 * (CHOSEN - REJECTED)), [-0.5986876601, -0.4750208125])
        close(mpo_pair_loss(CHOSEN / float64(10, 5) - REJECTED / float64(12, 7)), [-0.5, -0.2689414214])

    def test_reverse_kl(self):
        found = reverse_kl_samples(REG, REF_REG)
        close(found, [0.1756393646, 0.1733585327])
        close(found.mean(), 0.1744989487)

    def test_total(self):
        total = mpo_pair_loss(0.1 * MARGINS).mean() - 0.1 * REG.mean() - 0.01 * float64(-30, -42).mean()
        close(total, 0.8445980852)


class TestProperties:
    def logits(self):
        return torch.linspace(-8, 8, 201, dtype=torch.float64, requires_grad=True)

    def test_gradient_is_sigmoid_times_that_of_dpo(self):
        z = self.logits()
        (ours,) = torch.autograd.grad(mpo_pair_loss(z).sum(), z)
        (dpo,) = torch.autograd.grad(-logsigmoid(z).sum(), z)
        close(ours, (z.sigmoid() * dpo).detach(), 1e-15)
        close(ours, (-z.sigmoid() * (-z).sigmoid()).detach(), 1e-15)

    def test_bounds_and_start(self):
        z = self.logits()
        assert ((mpo_pair_loss(z) > -1) & (mpo_pair_loss(z) < 0)).all()
        start = float64(0).requires_grad_()
        assert mpo_pair_loss(start).item() == -0.5
        (ours,) = torch.autograd.grad(mpo_pair_loss(start).sum(), start)
        (dpo,) = torch.autograd.grad(-logsigmoid(start).sum(), start)
        assert (ours.item(), dpo.item()) == (-0.25, -0.5)

    def test_swapping(self):
        z = self.logits().detach()
        close(mpo_pair_loss(-z), -1 - mpo_pair_loss(z), 1e-15)

    def test_soft_labels(self):
        z = self.logits()
        for p in (0.0, 0.2, 0.5, 1.0):
            label = torch.full_like(z, p)
            loss = mpo_pair_loss(z, label)
            close(loss, (-(p * z.sigmoid() + (1 - p) * (-z).sigmoid())).detach(), 1e-15)
            (slope,) = torch.autograd.grad(loss.sum(), z)
            (flipped,) = torch.autograd.grad(mpo_pair_loss(z, 1 - label).sum(), z)
            close(slope, -flipped, 1e-15)
            if p == 0.5:
                close(loss, torch.full_like(z, -0.5).detach(), 1e-15)
                close(slope, torch.zeros_like(z).detach(), 1e-16)
        close(mpo_pair_loss(z, torch.ones_like(z)).detach(), mpo_pair_loss(z).detach(), 0)

    def test_reverse_kl_over_all_responses(self):
        """Two tokens of a vocabulary of five: the mean under the reference is KL(pi || ref), with its gradient."""
        generator = torch.Generator().manual_seed(0)
        logits = [torch.randn(25, generator=generator, dtype=torch.float64) for _ in range(2)]
        policy = logits[0].requires_grad_()
        logp, ref = policy.log_softmax(0), logits[1].log_softmax(0)
        samples = reverse_kl_samples(logp, ref)
        assert (samples >= 0).all()
        found, expected = (ref.exp() * samples).sum(), (logp.exp() * (logp - ref)).sum()
        close(found.detach(), expected.detach(), 1e-14)
        (ours,) = torch.autograd.grad(found, policy, retain_graph=True)
        (theirs,) = torch.autograd.grad(expected, policy)
        close(ours, theirs, 1e-14)

        same = ref.clone().requires_grad_()
        (slope,) = torch.autograd.grad(reverse_kl_samples(same, ref).sum(), same)
        close(reverse_kl_samples(same, ref).detach(), torch.zeros(25).double(), 0)
        close(slope, torch.zeros(25).double(), 1e-15)

    def test_gradient_and_clamp_of_the_reverse_kl(self):
        log_w = torch.linspace(-6, 6, 49, dtype=torch.float64, requires_grad=True)
        zero = torch.zeros_like(log_w)
        (slope,) = torch.autograd.grad(reverse_kl_samples(log_w, zero, 3.0).sum(), log_w)
        inside = log_w <= 3
        close(slope, torch.where(inside, log_w.exp() * log_w, 0.0).detach(), 1e-12)
        loss = reverse_kl_samples(log_w, zero, 3.0)
        assert (loss[~inside] == loss[inside][-1]).all()

    def test_gradcheck(self):
        generator = torch.Generator().manual_seed(1)
        z, p = (torch.rand(6, generator=generator, dtype=torch.float64) for _ in range(2))
        torch.autograd.gradcheck(mpo_pair_loss, ((4 * z - 2).requires_grad_(),))
        torch.autograd.gradcheck(mpo_pair_loss, ((4 * z - 2).requires_grad_(), p.requires_grad_()))
        torch.autograd.gradcheck(lambda x: reverse_kl_samples(x, -p.detach(), 5.0), ((2 * z - 2).requires_grad_(),))

    @pytest.mark.parametrize("value", [0.0, 1e-12, -1e-12, 30.0, -30.0, 1e4, -1e4])
    def test_extremes(self, value):
        z = torch.tensor([value], requires_grad=True)
        for label in (None, torch.tensor([0.3])):
            loss = mpo_pair_loss(z, label)
            (slope,) = torch.autograd.grad(loss.sum(), z)
            assert -1 <= loss.item() <= 0
            assert torch.isfinite(slope).all()
        for bound in (5.0, 20.0):
            loss = reverse_kl_samples(z, torch.zeros(1), bound)
            (slope,) = torch.autograd.grad(loss.sum(), z)
            assert torch.isfinite(loss).all()
            assert loss.item() >= -1e-6
            assert torch.isfinite(slope).all()


def minimum(loss):
    """Probabilities of the softmax over three logits that minimise a loss, found from 0."""
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=2000, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(logits.log_softmax(0))
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().softmax(0)


class TestBandit:
    """Three answers, 0 always preferred to 1, 2 never compared: what becomes of it."""

    @pytest.mark.parametrize(
        ("beta", "expected"),
        [
            (0.1, (0.6451843640, 0.0214823027)),
            (0.5, (0.5735864069, 0.0930802600)),
            (1.0, (0.5117279195, 0.1549387472)),
            (2.0, (0.4444444444, 0.2222222222)),
            (10.0, (0.3581942685, 0.3084723982)),
        ],
    )
    def test_mpo_keeps_it(self, beta, expected):
        found = minimum(lambda logp: mpo_pair_loss(logp[0] - logp[1]) - beta * logp.mean())
        close(found, [*expected, 1 / 3], 1e-8)
        q = found[0] * found[1] / (found[0] + found[1]) ** 2
        close(found, [1 / 3 + q / beta, 1 / 3 - q / beta, 1 / 3], 1e-8)

    def test_mpo_with_another_reference(self):
        ref = float64(0.2, 0.5, 0.3)
        found = minimum(lambda logp: mpo_pair_loss(logp[0] - logp[1]) - (ref * logp).sum())
        close(found, [0.4351893396, 0.2648106604, 0.3], 1e-8)

    def test_ipo_takes_three_quarters_of_it(self):
        found = minimum(lambda logp: (logp[0] - logp[1] - 1 / (2 * 0.1)) ** 2)
        close(found, [0.9184229668, 0.0061882853, 0.0753887480], 1e-8)

    def test_dpo_takes_all(self):
        """By 20000 steps of gradient descent: it has no minimum. The logit of answer 2 has no gradient."""
        gap = 0.0
        for _ in range(20000):
            gap += 2 * 0.5 / (1 + math.exp(gap))
        close(float64(gap / 2, -gap / 2, 0.0).softmax(0), [0.9929285, 0.0000497, 0.0070218], 1e-6)


# ---------------------------------------------------------------- the trainer against independent computations


def trainer_of(tmp_path, tokenizer, model="llama", data=None, **settings):
    model = tiny.model(model, tokenizer) if model in tiny.FAMILIES else model
    if settings.get("reg_weight") == 0 or "reg_dataset_name" in settings:
        settings.setdefault("reg_dataset", None)
    settings.setdefault("reg_dataset", samples())
    return make(
        MPOTrainer, MPOConfig, tmp_path, model, tiny.preference_data() if data is None else data, tokenizer, **settings
    )


SCALES = {"reference": 0.1, "reference_free": 1.0, "length_norm": 2.0}


def naive_mpo(
    model, tokenizer, rows, reg=(), pretrain=(), mode="reference", scale=None, reg_weight=0.05, pretrain_weight=0.0,
    reduction="sequence_sum", kl="forward", log_w_max=5.0,
):  # fmt: skip
    """MPO from its definition, one sequence at a time."""
    scale = SCALES[mode] if scale is None else scale
    losses = []
    for row in rows:
        chosen, rejected = (token_logps(model, tokenizer, row["prompt"], row[name]) for name in ("chosen", "rejected"))
        if mode == "length_norm":
            z = scale * (chosen.mean() - rejected.mean())
        else:
            z = scale * (chosen.sum() - rejected.sum())
        if mode == "reference":
            z = z - scale * (row["ref_chosen_logps"] - row["ref_rejected_logps"])
        p = row.get("label_prob", 1.0)
        preferred = 1 / (1 + torch.exp(-z))
        losses.append(-row.get("weight", 1.0) * (p * preferred + (1 - p) * (1 - preferred)))
    loss = torch.stack(losses).mean()

    def average(tokens):
        return torch.cat(tokens).mean() if reduction == "token_mean" else torch.stack([t.sum() for t in tokens]).mean()

    if reg:
        tokens = [token_logps(model, tokenizer, row["prompt"], row["completion"]) for row in reg]
        if kl == "forward":
            loss = loss - reg_weight * average(tokens)
        else:
            log_w = torch.stack([t.sum() - row["ref_logps"] for t, row in zip(tokens, reg, strict=True)])
            log_w = log_w.clamp(max=log_w_max)
            loss = loss + reg_weight * (log_w.exp() * log_w - log_w.exp() + 1).mean()
    if pretrain:
        ids = [tokenizer(row["text"])["input_ids"] for row in pretrain]
        loss = loss - pretrain_weight * average([token_logps(model, tokenizer, i[:1], i[1:]) for i in ids])
    return loss


def expected_of(model, tokenizer, rows, **options):
    twin = double(model)
    loss = naive_mpo(twin, tokenizer, rows, **options)
    loss.backward()
    return loss.item(), gradients(twin)


def scored(tokenizer, seed=1, number=4):
    """Samples with log-probs of another model."""
    reference = tiny.model("llama", tokenizer, seed)
    rows = samples(number).to_list()
    with torch.no_grad():
        for row in rows:
            row["ref_logps"] = token_logps(reference, tokenizer, row["prompt"], row["completion"]).sum().item()
    return Dataset.from_list(rows)


class TestAgainstFloat64:
    @pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2"])
    @pytest.mark.parametrize("mode", ["reference", "reference_free", "length_norm"])
    def test_modes(self, tmp_path, tokenizer, family, mode):
        scale = {"logit_scale": 0.05} if mode == "reference_free" else {}
        data = anchored() if mode == "reference" else None
        trainer = trainer_of(tmp_path, tokenizer, family, data, logit_mode=mode, **scale)
        loss, found = loss_and_gradients(trainer)
        value, expected = expected_of(
            trainer.model, tokenizer, anchored(4), reg=samples().to_list(), mode=mode, scale=scale.get("logit_scale")
        )
        assert loss == pytest.approx(value, rel=2e-6)
        assert difference(found, expected) < 1e-5

    @pytest.mark.parametrize("reduction", ["sequence_sum", "token_mean"])
    def test_all_terms(self, tmp_path, tokenizer, reduction):
        columns = {"label_prob": [0.9, 0.2, 1.0, 0.5], "weight": [1.0, 2.0, 0.0, 0.5]}
        data = anchored(4, **columns)
        trainer = trainer_of(
            tmp_path, tokenizer, data=data, reg_reduction=reduction, reg_weight=0.3, pretrain_weight=0.2,
            pretrain_dataset=texts(),
        )  # fmt: skip
        loss, found = loss_and_gradients(trainer)
        value, expected = expected_of(
            trainer.model, tokenizer, data.to_list(), reg=samples().to_list(), pretrain=texts().to_list(),
            reg_weight=0.3, pretrain_weight=0.2, reduction=reduction,
        )  # fmt: skip
        assert loss == pytest.approx(value, rel=2e-6)
        assert difference(found, expected) < 1e-5

    @pytest.mark.parametrize("log_w_max", [5.0, 1.0])
    def test_reverse_kl(self, tmp_path, tokenizer, log_w_max):
        rows = scored(tokenizer).to_list()
        trainer = trainer_of(
            tmp_path, tokenizer, data=anchored(), reg_dataset=Dataset.from_list(rows), reg_kl="reverse", reg_weight=0.4,
            log_w_max=log_w_max,
        )  # fmt: skip
        loss, found = loss_and_gradients(trainer)
        value, expected = expected_of(
            trainer.model,
            tokenizer,
            anchored(4).to_list(),
            reg=rows,
            kl="reverse",
            reg_weight=0.4,
            log_w_max=log_w_max,
        )
        assert loss == pytest.approx(value, rel=1e-5)
        assert difference(found, expected) < 1e-5

    @pytest.mark.parametrize("reduction", ["sequence_sum", "token_mean"])
    @pytest.mark.parametrize("per_pair", [0.5, 1.0, 2.5])
    def test_accumulation(self, tmp_path, tokenizer, reduction, per_pair):
        """The gradient does not depend on how the step was split, with 2, 4 or 10 samples in it."""
        data = anchored(4)
        settings = {"reg_reduction": reduction, "reg_rows_per_pair": per_pair, "reg_weight": 0.3}
        settings |= {"pretrain_weight": 0.2, "pretrain_dataset": texts(), "max_steps": 1}
        results = []
        for size in (4, 2, 1):
            trainer = trainer_of(
                tmp_path, tokenizer, data=data, per_device_train_batch_size=size,
                gradient_accumulation_steps=4 // size, **settings,
            )  # fmt: skip
            results.append(step_gradients(trainer))
        reg, pretrain = attached(trainer, "reg"), attached(trainer, "pretrain")
        assert len(reg) == len(pretrain) == 4 * per_pair
        ids = [tuple(response_ids(tokenizer, row["completion"])) for row in samples()]
        value, expected = expected_of(
            trainer_of(tmp_path, tokenizer, data=data, **settings).model, tokenizer, data.to_list(),
            reg=[samples()[ids.index(row)] for row in reg], reg_weight=0.3, pretrain_weight=0.2, reduction=reduction,
            pretrain=[{"text": text_of(tokenizer, row)} for row in attached(trainer, "pretrain", whole=True)],
        )  # fmt: skip
        for (loss,), (found,) in results:
            assert loss == pytest.approx(value, rel=2e-6)
            assert difference(found, expected) < 1e-5

    @pytest.mark.slow
    def test_two_processes(self, tmp_path):
        """Also with samples for one pair of four: three of the four micro-batches have none."""
        assert max(two_processes_tpo_mpo.check("mpo", tmp_path).values()) < 1e-5


def attached(trainer, name, whole=False):
    """Token ids of the responses that the pairs carry, in order."""
    return [
        tuple([*row["prompt_ids"], *row["completion_ids"]] if whole else row["completion_ids"])
        for pair in trainer.train_dataset[f"{name}_rows"]
        for row in pair
    ]


def text_of(tokenizer, ids):
    return next(row["text"] for row in texts() if tuple(tokenizer(row["text"])["input_ids"]) == ids)


class TestYardsticks:
    def test_gradient_of_each_pair_is_sigmoid_times_that_of_dpo(self, tmp_path, tokenizer):
        """With DPO's beta as the scale, and a reference that differs from the policy."""
        reference = tiny.model("llama", tokenizer, seed=1)
        rows = tiny.preference_data().to_list()[:3]
        for row in rows:
            for name in ("chosen", "rejected"):
                with torch.no_grad():
                    total = token_logps(reference, tokenizer, row["prompt"], row[name]).sum().item()
                row[f"ref_{name}_logps"] = total
            args = DPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", beta=0.3)
            dpo = DPOTrainer(
                model=tiny.model("llama", tokenizer), ref_model=reference, args=args, processing_class=tokenizer,
                train_dataset=Dataset.from_list([row]).select_columns(["prompt", "chosen", "rejected"]),
            )  # fmt: skip
            _, theirs = loss_and_gradients(dpo)
            margin = dpo._metrics["train"]["rewards/margins"][-1]
            assert abs(margin) > 0.01
            ours = trainer_of(tmp_path, tokenizer, data=Dataset.from_list([row]), reg_weight=0.0, logit_scale=0.3)
            loss, found = loss_and_gradients(ours)
            weight = 1 / (1 + math.exp(-margin))
            assert loss == pytest.approx(-weight, rel=1e-5)
            assert difference(found, {name: weight * value for name, value in theirs.items()}) < 1e-5

    @pytest.mark.parametrize("number", [4, 2])
    def test_samples_alone_are_sft(self, tmp_path, tokenizer, number):
        """Labels of 0.5 leave the pairs without a gradient."""
        data = tiny.preference_data().select(range(4)).add_column("label_prob", [0.5] * 4)
        ours = trainer_of(
            tmp_path, tokenizer, data=data, reg_dataset=samples(number), reg_weight=1.0, reg_reduction="token_mean"
        )
        sft = make(SFTTrainer, SFTConfig, tmp_path, tiny.model("llama", tokenizer), samples(number), tokenizer)
        loss, found = loss_and_gradients(ours)
        sft_loss, expected = loss_and_gradients(sft)
        assert loss == pytest.approx(sft_loss - 0.5, rel=1e-6)
        assert difference(found, expected) < 2e-6

    def test_start(self, tmp_path, tokenizer):
        """At the reference the loss is -1/2 and each pair pulls with s / 4."""
        trainer = trainer_of(tmp_path, tokenizer, reg_weight=0.0, max_steps=1)
        (loss,), _ = step_gradients(trainer)
        (entry,) = logs(trainer)
        assert loss == pytest.approx(-0.5, abs=1e-7)
        assert entry["mpo/preference_prob"] == pytest.approx(0.5, abs=1e-6)
        assert entry["mpo/grad_weight"] == pytest.approx(0.25, abs=1e-6)
        assert entry["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
        model = tiny.model("llama", tokenizer)
        difference_of_sums = sum(
            sign * token_logps(model, tokenizer, row["prompt"], row[name]).sum()
            for row in tiny.preference_data().select(range(4))
            for name, sign in (("chosen", 1), ("rejected", -1))
        )
        (-0.1 / 4 * difference_of_sums / 4).backward()
        trainer = trainer_of(tmp_path, tokenizer, reg_weight=0.0)
        assert difference(loss_and_gradients(trainer)[1], gradients(model)) < 1e-4


def number_of_models():
    gc.collect()
    return len([thing for thing in gc.get_objects() if isinstance(thing, PreTrainedModel)])


class TestReference:
    """Two stored numbers a pair; no model, no parameter, no forward pass beside the policy's."""

    @pytest.mark.parametrize("kind", ["full", "lora", "existing"])
    @pytest.mark.parametrize("mode", ["reference", "length_norm"])
    def test_no_second_model(self, tmp_path, tokenizer, kind, mode):
        torch.manual_seed(0)
        model, peft = tiny.model("llama", tokenizer), {}
        if kind == "existing":
            model = get_peft_model(model, LoraConfig(**LORA, init_lora_weights=False))
        elif kind == "lora":
            peft = {"peft_config": LoraConfig(**LORA)}
        names = {name for name, _ in model.named_parameters()}
        models = number_of_models()
        trainer = trainer_of(tmp_path, tokenizer, model, logit_mode=mode, **peft)
        assert trainer.ref_model is None
        assert number_of_models() == models
        if kind != "lora":
            assert {name for name, _ in trainer.model.named_parameters()} == names
        else:
            assert list(trainer.model.peft_config) == ["default"]
        base = trainer.model.get_base_model() if kind != "full" else trainer.model
        rows = []
        base.model.register_forward_pre_hook(
            lambda module, args, named: rows.append(named["input_ids"].size(0)), with_kwargs=True
        )
        trainer.train()
        assert rows == [12, 12]  # 4 pairs and 4 samples
        trainer.save_model()
        if kind != "full":
            assert not (Path(trainer.args.output_dir) / "ref").exists()

    def test_existing_adapter_is_its_own_reference(self, tmp_path, tokenizer):
        torch.manual_seed(0)
        model = get_peft_model(tiny.model("llama", tokenizer), LoraConfig(**LORA, init_lora_weights=False))
        row = tiny.preference_data()[0]
        with torch.no_grad():
            expected = token_logps(model, tokenizer, row["prompt"], row["chosen"]).sum().item()
        trainer = trainer_of(tmp_path, tokenizer, model)
        assert trainer.train_dataset[0]["ref_chosen_logps"] == pytest.approx(expected, rel=1e-6)
        trainer.train()
        with pytest.raises(ValueError, match="no longer in memory"):
            trainer.evaluate(tiny.preference_data())

    def test_trained_model_in_memory(self, tmp_path, tokenizer, model_dir):
        """The reference is the model as it was passed, not the one of its `name_or_path`."""
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        make(SFTTrainer, SFTConfig, tmp_path / "sft", model, tiny.prompt_completion_data(), tokenizer).train()
        trainer = trainer_of(tmp_path, tokenizer, model, max_steps=1)
        trainer.train()
        (entry,) = logs(trainer)
        assert entry["rewards/margins"] == pytest.approx(0.0, abs=1e-5)

    def test_lora_against_a_later_dataset(self, tmp_path, tokenizer):
        """The reference of a new adapter stays available: it is the base model."""
        trainer = trainer_of(tmp_path, tokenizer, peft_config=LoraConfig(**LORA))
        before = trainer.evaluate(tiny.preference_data())
        assert before["eval_loss"] == pytest.approx(-0.5, abs=1e-6)
        trainer.train()
        after = trainer.evaluate(tiny.preference_data())
        assert after["eval_loss"] < before["eval_loss"]

    def test_full_fine_tuning_refuses_a_later_dataset(self, tmp_path, tokenizer):
        trainer = trainer_of(tmp_path, tokenizer)
        assert trainer.evaluate(tiny.preference_data())["eval_loss"] == pytest.approx(-0.5, abs=1e-6)
        trainer.train()
        with pytest.raises(ValueError, match="Cannot compute reference log-probs"):
            trainer.evaluate(tiny.preference_data())
        free = trainer_of(tmp_path, tokenizer, logit_mode="length_norm")
        free.train()
        assert math.isfinite(free.evaluate(tiny.preference_data())["eval_loss"])

    def test_later_dataset_with_stored_reference(self, tmp_path, tokenizer):
        trainer = trainer_of(tmp_path, tokenizer, data=anchored(), learning_rate=0.0)
        trainer.train()
        value, _ = expected_of(trainer.model, tokenizer, anchored(4))
        assert trainer.evaluate(anchored(4))["eval_loss"] == pytest.approx(value, rel=2e-6)

    @pytest.mark.parametrize("mode", ["length_norm", "reference_free"])
    def test_streams_without_reference(self, tmp_path, tokenizer, mode):
        settings = {"logit_mode": mode, "logit_scale": 0.1, "reg_rows_per_pair": 0.5}
        streamed = trainer_of(tmp_path, tokenizer, data=tiny.preference_data().to_iterable_dataset(), **settings)
        assert step_gradients(streamed)[0] == step_gradients(trainer_of(tmp_path, tokenizer, **settings))[0]

    def test_streams_with_reference(self, tmp_path, tokenizer):
        stream = tiny.preference_data().to_iterable_dataset()
        with pytest.raises(ValueError, match="`train_dataset` is an `IterableDataset`.*'ref_chosen_logps'"):
            trainer_of(tmp_path, tokenizer, "./nowhere", stream)
        with pytest.raises(ValueError, match="`eval_dataset` is an `IterableDataset`"):
            trainer_of(tmp_path, tokenizer, "./nowhere", eval_dataset=stream)
        streamed = trainer_of(tmp_path, tokenizer, data=anchored().to_iterable_dataset())
        assert step_gradients(streamed)[0] == step_gradients(trainer_of(tmp_path, tokenizer, data=anchored()))[0]


# ---------------------------------------------------------------- samples


class TestDealing:
    def test_token_ids_alone(self, tmp_path, tokenizer):
        """They are taken as they are."""
        ids = Dataset.from_list([{"prompt_ids": [5, 6], "completion_ids": [7, 8 + i]} for i in range(8)])
        trainer = trainer_of(tmp_path, tokenizer, data=anchored(), reg_dataset=ids)
        assert sorted(attached(trainer, "reg")) == [(7, 8 + i) for i in range(8)]

    @pytest.mark.parametrize(
        ("row", "fits"),
        [
            ({"prompt_ids": [1] * 3, "completion_ids": [2]}, True),
            ({"prompt_ids": [1] * 4, "completion_ids": [2]}, False),  # no token of the answer is left
            ({"prompt_ids": [1] * 3, "completion_ids": []}, False),
            ({"prompt_ids": [1] * 3, "completion_ids": [2], "ref_logps": -1.0}, True),
            ({"prompt_ids": [1] * 3, "completion_ids": [2, 2], "ref_logps": -1.0}, False),
        ],
    )
    def test_rows_that_fit(self, row, fits):
        assert mpo._fits(row, 4) == fits

    def test_what_is_said_of_the_dealing(self, tmp_path, monkeypatch):
        messages = message_log(monkeypatch, mpo)

        def report(data, number, **settings):
            args = MPOConfig(str(tmp_path), use_cpu=True, bf16=False, max_steps=1, **settings)
            mpo._report_dealing(data, "reg", number, args)

        report(anchored(), 4, reg_rows_per_pair=0.5)
        assert messages == []
        report(anchored(), 5, reg_rows_per_pair=0.5)
        assert messages[0].startswith("4 of the 5 rows of the reg dataset are used: 8 pairs")
        stream = anchored().to_iterable_dataset()
        report(stream, 5, dataloader_num_workers=1)
        with pytest.raises(ValueError, match="`dataloader_num_workers=2` with an `IterableDataset`"):
            report(stream, 5, dataloader_num_workers=2)

    @pytest.mark.parametrize("per_pair", [0.25, 0.5, 1.0, 2.5])
    @pytest.mark.parametrize("number", [3, 8])
    def test_every_sample_equally_often(self, tmp_path, tokenizer, per_pair, number):
        trainer = trainer_of(
            tmp_path, tokenizer, data=anchored(), reg_dataset=samples(number), reg_rows_per_pair=per_pair
        )
        dealt = attached(trainer, "reg")
        assert len(dealt) == 8 * per_pair
        times = Counter(dealt)
        counts = [times[tuple(response_ids(tokenizer, row["completion"]))] for row in samples(number)]
        assert sum(counts) == len(dealt)
        assert max(counts) - min(counts) <= 1
        sizes = [len(rows) for rows in trainer.train_dataset["reg_rows"]]
        assert max(sizes) - min(sizes) <= 1

    def test_order(self, tmp_path, tokenizer):
        def order(**settings):
            return attached(
                trainer_of(tmp_path, tokenizer, data=anchored(), reg_dataset=samples(8), **settings), "reg"
            )

        first = order()
        assert order() == first
        assert order(data_seed=7, train_sampling_strategy="random", per_device_train_batch_size=1) == first
        other = order(seed=1)
        assert other != first
        assert sorted(other) == sorted(first)
        assert first != [tuple(response_ids(tokenizer, row["completion"])) for row in samples(8)]

    def test_pairs_keep_their_samples(self, tmp_path, tokenizer):
        trainer = trainer_of(
            tmp_path, tokenizer, data=anchored(), reg_rows_per_pair=0.5, train_sampling_strategy="random",
            per_device_train_batch_size=3,
        )  # fmt: skip
        carried = {
            tuple(row["prompt_ids"] + row["chosen_ids"]): [tuple(reg["completion_ids"]) for reg in row["reg_rows"]]
            for row in trainer.train_dataset
        }
        for batch in trainer.get_train_dataloader():
            pairs = [tuple(ids[mask.bool()].tolist()) for ids, mask in rows_of(batch)][: len(batch["input_ids"]) // 2]
            found = [[] for _ in pairs]
            for ids, mask, pair in zip(
                batch["reg_input_ids"], batch["reg_completion_mask"], batch["reg_pair"], strict=True
            ):
                found[pair].append(tuple(ids[mask.bool()].tolist()))
            assert found == [carried[pair] for pair in pairs]

    def test_resumed_equals_uninterrupted(self, tmp_path, tokenizer):
        """Bit for bit: weights, and every logged value."""

        def trainer():
            return trainer_of(
                tmp_path, tokenizer, max_steps=6, save_strategy="steps", save_steps=3, train_sampling_strategy="random",
                per_device_train_batch_size=1, gradient_accumulation_steps=2, reg_rows_per_pair=0.5,
                pretrain_weight=0.01, pretrain_dataset=texts(),
            )  # fmt: skip

        whole, resumed = trainer(), trainer()
        whole.train()
        resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-3"))
        assert logs(resumed) == logs(whole)
        for (name, left), (_, right) in zip(
            whole.model.named_parameters(), resumed.model.named_parameters(), strict=True
        ):
            assert torch.equal(left, right), name


def rows_of(batch):
    return zip(batch["input_ids"], batch["attention_mask"], strict=True)


class TestSamples:
    def completions(self, tmp_path, tokenizer, rows, **settings):
        data = Dataset.from_list(rows if isinstance(rows, list) else [rows])
        trainer = trainer_of(tmp_path, tokenizer, data=anchored(), reg_dataset=data, **settings)
        return [list(ids) for ids in dict.fromkeys(attached(trainer, "reg"))]

    def test_end_of_sequence(self, tmp_path, tokenizer):
        """Text gets one unless it was cut; token ids stay as they are."""
        row = {"prompt": "Name a colour.", "completion": " Blue"}
        plain, end = tokenizer(" Blue")["input_ids"], tokenizer.eos_token_id
        assert self.completions(tmp_path, tokenizer, row) == [[*plain, end]]
        assert self.completions(tmp_path, tokenizer, row | {"truncated": False}) == [[*plain, end]]
        assert self.completions(tmp_path, tokenizer, row | {"truncated": True}) == [plain]
        assert self.completions(tmp_path, tokenizer, row | {"completion": " Blue<|im_end|>"}) == [[*plain, end]]
        ids = {"prompt_ids": tokenizer("Name a colour.")["input_ids"], "completion_ids": plain}
        assert self.completions(tmp_path, tokenizer, row | ids) == [plain]
        assert self.completions(tmp_path, tokenizer, ids | {"truncated": False}) == [plain]

    def test_messages(self, tmp_path, tokenizer):
        prompt = [{"role": "user", "content": "Name a colour."}]
        row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "Blue"}]}
        whole = tokenizer.apply_chat_template(prompt + row["completion"], return_dict=False)
        start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        assert self.completions(tmp_path, tokenizer, row) == [whole[len(start) :]]
        cut = self.completions(tmp_path, tokenizer, row | {"truncated": True})
        assert cut == [tokenizer("Blue")["input_ids"]]

    def test_too_long_samples_are_dropped(self, tmp_path, tokenizer, monkeypatch):
        """With a count: all that do not fit if they are scored as a whole, else those of which nothing would be left."""
        messages = message_log(monkeypatch, mpo)
        rows = scored(tokenizer, number=8).to_list()
        lengths = [
            len(tokenizer(row["prompt"])["input_ids"]) + len(response_ids(tokenizer, row["completion"]))
            for row in rows
        ]
        limit = sorted(lengths)[5]
        pairs = [{"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]}] * 8
        pairs = Dataset.from_list(pairs)
        settings = {"max_length": limit, "logit_mode": "length_norm"}
        trainer = trainer_of(tmp_path, tokenizer, data=pairs, reg_dataset=Dataset.from_list(rows), **settings)
        left = {
            tuple(response_ids(tokenizer, row["completion"]))
            for row, length in zip(rows, lengths, strict=True)
            if length <= limit
        }
        assert set(attached(trainer, "reg")) == left
        assert f"Dropped {8 - len(left)} of 8 rows of the reg dataset" in messages[-1]

        unscored = Dataset.from_list(rows).remove_columns("ref_logps")
        trainer = trainer_of(tmp_path, tokenizer, data=pairs, reg_dataset=unscored, **settings)
        some_left = [row for row in rows if len(tokenizer(row["prompt"])["input_ids"]) < limit]
        assert len(left) < len(some_left) == len(set(attached(trainer, "reg"))) < 8
        batch = next(iter(trainer.get_train_dataloader()))
        assert batch["reg_input_ids"].size(1) <= limit
        with pytest.raises(ValueError, match="No row of the reg dataset can be used"):
            trainer_of(tmp_path, tokenizer, data=pairs, reg_dataset=samples(), logit_mode="length_norm", max_length=2)

    def test_empty_samples_are_dropped(self, tmp_path, tokenizer):
        rows = [*samples(2).to_list(), {"prompt": "Name a colour.", "completion": " "}]
        assert len(self.completions(tmp_path, tokenizer, rows)) == 2

    def test_pretraining_texts(self, tmp_path, tokenizer):
        """Text or token ids; nothing predicts the first token."""
        ids = Dataset.from_list([{"input_ids": tokenizer(row["text"])["input_ids"]} for row in texts()])
        settings = {"pretrain_weight": 0.2, "data": anchored()}
        text, tokens = (trainer_of(tmp_path, tokenizer, pretrain_dataset=data, **settings) for data in (texts(), ids))
        assert attached(text, "pretrain", whole=True) == attached(tokens, "pretrain", whole=True)
        batch = next(iter(text.get_train_dataloader()))
        assert torch.equal(batch["pretrain_completion_mask"].sum(1), batch["pretrain_attention_mask"].sum(1) - 1)
        assert (batch["pretrain_completion_mask"][:, 0] == 0).all()

    def test_metrics(self, tmp_path, tokenizer):
        """Means over tokens, samples and pairs of the optimizer step."""
        reg = scored(tokenizer)
        trainer = trainer_of(
            tmp_path, tokenizer, data=anchored(4), reg_dataset=reg, pretrain_weight=0.1, pretrain_dataset=texts(),
            per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=1,
        )  # fmt: skip
        model = double(trainer.model)
        trainer.train()
        (entry,) = logs(trainer)
        tokens = [token_logps(model, tokenizer, row["prompt"], row["completion"]).detach() for row in reg]
        kl = sum(row["ref_logps"] - t.sum().item() for row, t in zip(reg, tokens, strict=True)) / 4
        ids = [tokenizer(row["text"])["input_ids"] for row in texts()]
        plain = [token_logps(model, tokenizer, i[:1], i[1:]).detach() for i in ids]
        ratios = {
            name: float64(
                *(
                    token_logps(model, tokenizer, row["prompt"], row[name]).sum().item() - row[f"ref_{name}_logps"]
                    for row in anchored(4)
                )
            )
            for name in ("chosen", "rejected")
        }
        margins = 0.1 * (ratios["chosen"] - ratios["rejected"])
        preferred = margins.sigmoid()
        expected = {
            "mpo/reg_nll": -torch.cat(tokens).mean().item(),
            "mpo/reg_kl": kl,
            "mpo/pretrain_nll": -torch.cat(plain).mean().item(),
            "mpo/preference_prob": preferred.mean().item(),
            "mpo/grad_weight": (preferred * (1 - preferred)).mean().item(),
            "rewards/chosen": 0.1 * ratios["chosen"].mean().item(),
            "rewards/rejected": 0.1 * ratios["rejected"].mean().item(),
            "rewards/margins": margins.mean().item(),
            "rewards/accuracies": (margins > 0).double().mean().item(),
        }
        for name, value in expected.items():
            assert entry[name] == pytest.approx(value, rel=1e-5), name
        batch = next(iter(trainer_of(tmp_path, tokenizer, data=anchored(4)).get_train_dataloader()))
        sizes = sum(batch[f"{kind}attention_mask"].sum().item() for kind in ("", "reg_"))
        assert entry["num_tokens"] == sizes + sum(map(len, ids))
        unscored = trainer_of(tmp_path, tokenizer, data=anchored())
        unscored.train()
        assert "mpo/reg_kl" not in logs(unscored)[0]

    @pytest.mark.parametrize("mode", ["reference_free", "length_norm"])
    def test_rewards_without_reference(self, tmp_path, tokenizer, mode):
        trainer = trainer_of(tmp_path, tokenizer, logit_mode=mode, logit_scale=0.1, max_steps=1)
        reduce = torch.sum if mode == "reference_free" else torch.mean
        rows = tiny.preference_data().select(range(4))
        with torch.no_grad():
            rewards = [
                0.1 * reduce(token_logps(trainer.model, tokenizer, row["prompt"], row["chosen"])).item()
                for row in rows
            ]
        trainer.train()
        assert logs(trainer)[0]["rewards/chosen"] == pytest.approx(sum(rewards) / 4, rel=1e-5)

    def test_tiny_gradient_weight_is_warned_of(self, tmp_path, tokenizer, monkeypatch):
        """Once, by the mean of the first optimizer step; a pair or two may be saturated."""
        messages = message_log(monkeypatch, mpo)
        split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "max_steps": 2}
        trainer_of(tmp_path, tokenizer, max_steps=1).train()
        trainer_of(tmp_path, tokenizer, logit_mode="reference_free", logit_scale=0.2, **split).train()
        assert messages == []
        trainer_of(tmp_path, tokenizer, logit_mode="reference_free", logit_scale=20.0, **split).train()
        assert len(messages) == 1
        assert "The pairs hardly train: the mean of sigma(z) sigma(-z) is" in messages[0]

    def test_the_weight_that_is_warned_of_is_that_which_is_logged(self, tmp_path, tokenizer, monkeypatch):
        messages = message_log(monkeypatch, mpo)
        split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1}
        trainer = trainer_of(tmp_path, tokenizer, logit_mode="reference_free", logit_scale=3.0, **split)
        trainer.train()
        weight = logs(trainer)[0]["mpo/grad_weight"]
        assert weight < 1e-3
        assert f"is {weight:.1e} in the first step" in messages[0]

    def test_collator_that_loses_the_samples(self, tmp_path, tokenizer):
        """Not an objective without its KL term."""
        collator = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)
        with pytest.raises(ValueError, match="`data_collator` .* leaves out 'reg_rows'"):
            trainer_of(tmp_path, tokenizer, data_collator=collator).train()

    def test_evaluation_is_the_preference_term(self, tmp_path, tokenizer):
        trainer = trainer_of(
            tmp_path, tokenizer, data=anchored(), eval_dataset=anchored(4), eval_strategy="steps", eval_steps=1,
            max_steps=1, learning_rate=0.0, pretrain_weight=0.1, pretrain_dataset=texts(),
        )  # fmt: skip
        trainer.train()
        value, _ = expected_of(trainer.model, tokenizer, anchored(4))
        entry = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
        assert entry["eval_loss"] == pytest.approx(value, rel=2e-6)
        assert "eval_mpo/preference_prob" in entry
        assert "eval_mpo/reg_nll" not in entry


class TestPolicy:
    def generated(self, tmp_path, tokenizer, model, folder="samples"):
        prompts = Dataset.from_list([{"prompt": question} for question, _ in tiny.QUESTIONS])
        return generate_completions(
            model, prompts, tmp_path / folder, max_new_tokens=8, processing_class=tokenizer, batch_tokens=200
        )

    def test_samples_of_the_model_itself(self, tmp_path, tokenizer):
        model = tiny.model("llama", tokenizer)
        reg = self.generated(tmp_path, tokenizer, model)
        assert reg.unique("policy") == [model_fingerprint(model)]
        for options in ({}, {"peft_config": LoraConfig(**LORA)}):
            trainer = trainer_of(tmp_path, tokenizer, reg_dataset=reg, max_steps=1, reg_kl="reverse", **options)
            trainer.train()
            assert logs(trainer)[0]["mpo/reg_kl"] == pytest.approx(0.0, abs=1e-3)
            assert logs(trainer)[0]["loss"] == pytest.approx(-0.5, abs=1e-4)

    def test_samples_of_another_model(self, tmp_path, tokenizer):
        reg = self.generated(tmp_path, tokenizer, tiny.model("llama", tokenizer, seed=1))
        with pytest.raises(ValueError, match="was sampled from another model.*allow_other_policy=True"):
            trainer_of(tmp_path, tokenizer, reg_dataset=reg)
        trainer_of(tmp_path, tokenizer, reg_dataset=reg, allow_other_policy=True, max_steps=1).train()
        own = self.generated(tmp_path, tokenizer, tiny.model("llama", tokenizer), "own")
        both = datasets.concatenate_datasets([own, reg])
        with pytest.raises(ValueError, match="was sampled from another model"):
            trainer_of(tmp_path, tokenizer, reg_dataset=both)

    def test_samples_of_a_trained_model_in_memory(self, tmp_path, tokenizer, model_dir):
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        before = self.generated(tmp_path, tokenizer, model)
        make(SFTTrainer, SFTConfig, tmp_path / "sft", model, tiny.prompt_completion_data(), tokenizer).train()
        with pytest.raises(ValueError, match="was sampled from another model"):
            trainer_of(tmp_path, tokenizer, model, reg_dataset=before)
        after = self.generated(tmp_path, tokenizer, model, "after")
        trainer_of(tmp_path, tokenizer, model, reg_dataset=after, max_steps=1).train()

    def test_samples_of_an_adapter(self, tmp_path, tokenizer):
        torch.manual_seed(0)
        model = get_peft_model(tiny.model("llama", tokenizer), LoraConfig(**LORA, init_lora_weights=False))
        reg = self.generated(tmp_path, tokenizer, model)
        trainer = trainer_of(tmp_path, tokenizer, model, reg_dataset=reg, max_steps=1)
        trainer.train()
        assert logs(trainer)[0]["mpo/reg_kl"] == pytest.approx(0.0, abs=1e-3)
        with pytest.raises(ValueError, match="was sampled from another model"):
            trainer_of(tmp_path, tokenizer, model.get_base_model(), reg_dataset=reg)

    def test_named_samples(self, tmp_path, tokenizer):
        """A folder of `trl-ift generate`, or a file."""
        reg = self.generated(tmp_path, tokenizer, tiny.model("llama", tokenizer))
        reg.to_json(tmp_path / "samples.jsonl")
        texts().to_json(tmp_path / "texts.jsonl")
        runs = [
            trainer_of(tmp_path, tokenizer, reg_dataset=load_completions(tmp_path / "samples")),
            trainer_of(tmp_path, tokenizer, reg_dataset_name=str(tmp_path / "samples")),
            trainer_of(tmp_path, tokenizer, reg_dataset_name=str(tmp_path / "samples.jsonl")),
        ]
        first, *others = [attached(trainer, "reg", whole=True) for trainer in runs]
        assert others == [first, first]
        trainer = trainer_of(
            tmp_path, tokenizer, pretrain_weight=0.1, pretrain_dataset_name=str(tmp_path / "texts.jsonl")
        )
        assert len(attached(trainer, "pretrain")) == 8
        datasets.DatasetDict({"test": reg}).save_to_disk(tmp_path / "test-only")
        with pytest.raises(ValueError, match="test-only` has no split 'train'; it has: 'test'"):
            trainer_of(tmp_path, tokenizer, reg_dataset_name=str(tmp_path / "test-only"))
        with pytest.raises(ValueError, match="A dataset was passed and `.*samples.jsonl` is named in the config too"):
            trainer_of(tmp_path, tokenizer, reg_dataset=reg, reg_dataset_name=str(tmp_path / "samples.jsonl"))


class TestAdapters:
    def test_lora(self, tmp_path, tokenizer):
        trainer = trainer_of(tmp_path, tokenizer, peft_config=LoraConfig(**LORA))
        before = {name: value.clone() for name, value in trainer.model.named_parameters()}
        trainer.train()
        for name, value in trainer.model.named_parameters():
            assert torch.equal(before[name], value) == ("lora_" not in name), name

    def test_prompt_tuning(self, tmp_path, tokenizer):
        """The samples may be longer than the pairs, whose virtual tokens come first."""
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        reg = [{"prompt": "Name a colour.", "completion": letters(60)}]
        trainer = trainer_of(
            tmp_path, tokenizer, data=anchored(4), reg_dataset=Dataset.from_list(reg), peft_config=config
        )
        loss, found = loss_and_gradients(trainer)
        trainer.model.zero_grad()
        expected = naive_mpo(trainer.model, tokenizer, anchored(4), reg=reg)
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=2e-6)
        assert difference(found, gradients(trainer.model)) < 1e-5


# ---------------------------------------------------------------- bad input


ROWS = samples().to_list()
SCORED = [row | {"ref_logps": -20.0} for row in ROWS]


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"logit_mode": "reward"}, "`logit_mode='reward'` is not known. Choose one of: 'reference'"),
            ({"reg_kl": "jeffreys"}, "`reg_kl='jeffreys'` is not known"),
            ({"reg_reduction": "mean"}, "`reg_reduction='mean'` is not known"),
            ({"logit_scale": 0.0}, "`logit_scale=0.0` is out of range"),
            ({"logit_scale": math.nan}, "`logit_scale=nan` is out of range"),
            ({"reg_weight": -0.1}, "`reg_weight=-0.1` is out of range"),
            ({"pretrain_weight": -0.1}, "`pretrain_weight=-0.1` is out of range"),
            ({"reg_rows_per_pair": 0.2}, "`reg_rows_per_pair=0.2` is out of range"),
            ({"reg_rows_per_pair": 5.0}, "`reg_rows_per_pair=5.0` is out of range"),
            ({"reg_kl": "reverse", "log_w_max": 21.0}, "`log_w_max=21.0` is out of range"),
            ({"reg_kl": "reverse", "log_w_max": 0.0}, "`log_w_max=0.0` is out of range"),
            ({"log_w_max": 3.0}, "`log_w_max` has no effect with `reg_kl='forward'`"),
            ({"reg_kl": "reverse", "reg_reduction": "token_mean"}, "cannot be a mean over tokens"),
            ({"pretrain_dataset_name": "texts.jsonl"}, "`pretrain_dataset_name` has no effect with `pretrain_weight=0`"),
            ({"beta": 0.2}, "`beta` has no effect in MPO.*`logit_scale`.*`reg_weight`"),
            ({"sync_ref_model": True}, "`sync_ref_model=True` has no effect"),
            ({"precompute_ref_log_probs": True}, "`precompute_ref_log_probs=True` has no effect"),
            ({"loss_type": ["ipo"]}, r"`loss_type=\['ipo'\]` has no effect"),
            ({"loss_type": "hinge"}, r"`loss_type=\['hinge'\]` has no effect"),
            ({"label_smoothing": 0.1}, "`label_smoothing=0.1` has no effect"),
            ({"f_divergence_type": "forward_kl"}, "`f_divergence_type='forward_kl'` has no effect"),
            ({"use_weighting": True}, "`use_weighting=True` has no effect"),
        ],
    )  # fmt: skip
    def test_config(self, tmp_path, settings, message):
        with pytest.raises(ValueError, match=message):
            MPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)

    def test_reference_options_of_the_pass(self, tmp_path):
        """The one reference option that has an effect in the default mode."""
        config = MPOConfig(str(tmp_path), use_cpu=True, bf16=False, precompute_ref_batch_size=2)
        assert config.precompute_ref_batch_size == 2
        with pytest.raises(ValueError, match="`precompute_ref_batch_size=2` has no effect"):
            MPOConfig(str(tmp_path), use_cpu=True, bf16=False, precompute_ref_batch_size=2, logit_mode="length_norm")

    def test_defaults_and_round_trip(self, tmp_path):
        for settings, expected in [
            ({}, (0.1, 0.05)),
            ({"logit_mode": "reference_free"}, (1.0, 0.05)),
            ({"logit_mode": "length_norm", "reg_reduction": "token_mean"}, (2.0, 0.1)),
            ({"logit_scale": 0.3, "reg_weight": 0.0}, (0.3, 0.0)),
        ]:
            config = MPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)
            assert (config.logit_scale, config.reg_weight) == expected
            known = {field.name for field in fields(config) if field.init}
            again = MPOConfig(**{name: value for name, value in config.to_dict().items() if name in known})
            assert again.to_dict() == config.to_dict() == replace(config).to_dict()

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"reg_dataset": None}, ValueError, "`reg_weight=0.05` needs a `reg_dataset`"),
            ({"reg_dataset": Dataset.from_list([{"text": "a"}])}, ValueError, r"`reg_dataset` has the columns \['text'\]"),
            ({"reg_dataset": Dataset.from_list([{"prompt": "a", "response": "b"}])}, ValueError, "Expected 'prompt' and"),
            ({"reg_dataset": Dataset.from_dict({"prompt": [], "completion": []})}, ValueError, "`reg_dataset` is empty"),
            ({"reg_dataset": ROWS}, TypeError, "`reg_dataset` must be a `Dataset`.*got `list`"),
            ({"reg_dataset": IterableDataset.from_generator(lambda: iter(ROWS))}, TypeError, "got `IterableDataset`"),
            ({"reg_dataset": {"train": Dataset.from_list(ROWS)}}, TypeError, "got `dict`"),
            (
                {"reg_dataset": Dataset.from_list([*SCORED, ROWS[0] | {"ref_logps": math.nan}])},
                ValueError, "`reg_dataset`, row 4: column 'ref_logps' holds nan",
            ),
            (
                {"reg_dataset": Dataset.from_list([*SCORED, ROWS[0] | {"ref_logps": None}])},
                TypeError, "row 4: column 'ref_logps' must hold numbers, found None",
            ),
            (
                {"reg_dataset": Dataset.from_list([ROWS[0] | {"ref_logps": 0.5}])},
                ValueError, "row 0: column 'ref_logps' holds 0.5, expected a finite number in",
            ),
            (
                {"reg_weight": 0.0, "reg_kl": "reverse"}, ValueError,
                "`reg_kl='reverse'` has no effect without a `reg_dataset`",
            ),
            ({"reg_weight": 0.0, "reg_rows_per_pair": 2.0}, ValueError, "`reg_rows_per_pair=2.0` has no effect without"),
            ({"reg_weight": 0.0, "allow_other_policy": True}, ValueError, "`allow_other_policy=True` has no effect"),
            ({"reg_kl": "reverse"}, ValueError, "`reg_kl='reverse'` needs the column 'ref_logps'"),
            ({"pretrain_weight": 0.1}, ValueError, "`pretrain_weight=0.1` and no `pretrain_dataset`"),
            ({"pretrain_dataset": texts()}, ValueError, "`pretrain_weight=0.0` and a `pretrain_dataset`"),
            (
                {"pretrain_weight": 0.1, "pretrain_dataset": samples()},
                ValueError, r"`pretrain_dataset` has the columns \['completion', 'prompt'\]",
            ),
            ({"data": anchored(2, label_prob=[0.5, 1.2])}, ValueError, "row 1: column 'label_prob' holds 1.2"),
            ({"data": anchored(2, label_prob=[-0.1, 1.0])}, ValueError, "row 0: column 'label_prob' holds -0.1"),
            ({"data": anchored(2, label_prob=[0.1, None])}, TypeError, "row 1: column 'label_prob' must hold numbers"),
            ({"data": anchored().remove_columns("ref_rejected_logps")}, ValueError, "but not the other one"),
            ({"data": samples()}, ValueError, "lacks the column 'chosen' and 'rejected'"),
            ({"eval_dataset": anchored(1, label_prob=[2.0])}, ValueError, "`eval_dataset`, row 0: column 'label_prob'"),
            ({"reg_dataset_name": "nowhere.jsonl"}, FileNotFoundError, "`nowhere.jsonl` does not exist"),
        ],
    )  # fmt: skip
    def test_before_the_model_is_loaded(self, tmp_path, tokenizer, arguments, error, message):
        arguments = dict(arguments)
        with pytest.raises(error, match=message):
            trainer_of(tmp_path, tokenizer, "./nowhere", arguments.pop("data", anchored()), **arguments)

    def test_reference_model(self, tmp_path, tokenizer):
        with pytest.raises(TypeError, match="ref_model"):
            MPOTrainer(
                model=tiny.model("llama", tokenizer), ref_model=tiny.model("llama", tokenizer),
                train_dataset=anchored(), processing_class=tokenizer,
            )  # fmt: skip


# ---------------------------------------------------------------- the script


def test_script(model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.preference_data().to_json("pairs.jsonl")
    samples().to_json("samples.jsonl")
    argv = ["mpo", "--model_name_or_path", model_dir, "--dataset_name", "pairs.jsonl", "--output_dir", "out"]
    argv += ["--max_steps", "2", "--logging_steps", "1", "--report_to", "none", "--use_cpu", "true", "--bf16", "false"]
    assert script.run([*argv, "--reg_dataset_name", "samples.jsonl", "--reg_rows_per_pair", "0.5"]) == 0
    state = json.loads(Path("out/checkpoint-2/trainer_state.json").read_text())
    assert len([entry for entry in state["log_history"] if "mpo/reg_nll" in entry]) == 2
    card = Path("out/README.md").read_text()
    for name in ("logit_mode", "logit_scale", "reg_weight", "reg_rows_per_pair"):
        assert f"`{name}`" in card
    argv[6] = "other"
    assert script.run(argv) == 1
    assert "trl-ift mpo: error: `reg_weight=0.05` needs a `reg_dataset`" in capsys.readouterr().err
