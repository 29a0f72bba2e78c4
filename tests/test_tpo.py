"""TPO: the numbers and identities of the paper, TRL's TPOTrainer and CPOTrainer, an independent float64 computation."""

import json
import math
import warnings
from dataclasses import fields, replace
from pathlib import Path

import datasets
import pytest
import tiny
import torch
import two_processes_tpo_mpo
from datasets import Dataset
from pairs import (
    GOLD_LENGTHS,
    difference,
    double,
    gradients,
    letters,
    logs,
    loss_and_gradients,
    make,
    message_log,
    step_gradients,
    token_logps,
    uneven_triples,
)
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.tpo import TPOConfig as TRLTPOConfig
from trl.experimental.tpo import TPOTrainer as TRLTPOTrainer

from trl_ift import TPOConfig, TPOTrainer, checks
from trl_ift.preference import tpo
from trl_ift.preference.tpo import LOSS_TYPES, NORMALIZATIONS, gold_nll_sum, tpo_pair_loss
from trl_ift.scripts import train as script


LORA = {"r": 4, "target_modules": "all-linear"}


def close(found, expected, tolerance=5e-10):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(found).double(), expected, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- the pure functions


def numbers():
    """Per-token log-probs of two rows: chosen, rejected, gold; each as (sums, lengths)."""
    rows = {
        "chosen": [[-0.5, -1, -0.25], [-2, -0.1]],
        "rejected": [[-1.5, -0.75], [-0.9, -0.3, -1.2, -0.6]],
        "gold": [[-0.2, -0.4, -0.6, -0.8], [-1]],
    }
    return {
        name: (
            torch.tensor([math.fsum(row) for row in values], dtype=torch.float64),
            torch.tensor([*map(len, values)]),
        )
        for name, values in rows.items()
    }


def toy_pair(loss_type="sigmoid", beta=0.1, **options):
    (chosen, chosen_lengths), (rejected, rejected_lengths) = (numbers()[name] for name in ("chosen", "rejected"))
    return tpo_pair_loss(chosen, rejected, chosen_lengths, rejected_lengths, loss_type, beta, **options).mean()


def toy_gold(normalization, rows=slice(None)):
    logps, lengths = (value[rows] for value in numbers()["gold"])
    count = len(logps) if NORMALIZATIONS[normalization] == "row" else lengths.sum()
    return gold_nll_sum(logps, lengths, normalization) / count


class TestNumbers:
    def test_pairs(self):
        close(toy_pair(), 0.6588094935)
        close(toy_pair(label_smoothing=0.1), 0.6658094935)
        close(toy_pair("hinge"), 0.93)
        close(toy_pair("ipo", 0.5), 0.9500347222)

    def test_gold_term(self):
        expected = {
            "batch_token_mean": 0.9588094935,
            "global_token_mean": 0.9588094935,
            "sequence_mean": 1.0338094935,
            "sequence_sum": 1.4088094935,
        }
        assert set(expected) == set(NORMALIZATIONS)
        for normalization, value in expected.items():
            close(toy_pair() + 0.5 * toy_gold(normalization), value)

    def test_answers_of_one_token(self):
        one = torch.ones(1, dtype=torch.long)
        logps = torch.tensor([-2.0], dtype=torch.float64), torch.tensor([-3.0], dtype=torch.float64)
        close(tpo_pair_loss(*logps, one, one, "ipo", 0.25), [1.0])
        close(tpo_pair_loss(*logps, one, one, "tpo-l", 2.0, gamma=2.0), [math.log(2)])
        close(gold_nll_sum(logps[0], one, "sequence_mean"), 2.0)

    def test_bias_of_two_micro_batches(self):
        close(toy_pair() + toy_gold("batch_token_mean"), 1.2588094935)
        halves = [toy_gold("batch_token_mean", slice(i, i + 1)) for i in range(2)]
        close(toy_pair() + sum(halves) / 2, 1.4088094935)

    def test_tpo_l(self):
        gold = toy_gold("batch_token_mean")
        close(toy_pair("tpo-l", 2.0, gamma=1.6) + 0.05 * gold, 1.6747836104)
        close(toy_pair("tpo-l", 0.01, gamma=0.5) + gold, 1.5733270990)


def random_pairs(rows=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = (-40 * torch.rand(rows, generator=generator, dtype=torch.float64) for _ in range(2))
    lengths = [torch.randint(1, 30, (rows,), generator=generator) for _ in range(2)]
    return chosen, rejected, *lengths


class TestIdentities:
    def test_swapping_changes_sigmoid_by_beta_times_the_difference(self):
        chosen, rejected, *lengths = random_pairs()
        for smoothing in (0.0, 0.3):
            loss = tpo_pair_loss(chosen, rejected, *lengths, "sigmoid", 0.2, label_smoothing=smoothing)
            swapped = tpo_pair_loss(rejected, chosen, *lengths, "sigmoid", 0.2, label_smoothing=smoothing)
            close(swapped - loss, (1 - 2 * smoothing) * 0.2 * (chosen - rejected), 1e-12)

    def test_label_smoothing_half_is_minimal_at_0(self):
        gap = torch.linspace(-5, 5, 1001, dtype=torch.float64, requires_grad=True)
        one = torch.ones(1001, dtype=torch.long)
        loss = tpo_pair_loss(gap, torch.zeros_like(gap), one, one, "sigmoid", 0.7, label_smoothing=0.5)
        assert loss.argmin() == 500
        (slope,) = torch.autograd.grad(loss.sum(), gap)
        assert abs(slope[500]) < 1e-15
        assert (slope[501:] > 0).all()
        close(slope, -slope.flip(0), 1e-14)

    def test_no_temperature_and_no_margin_is_log_2(self):
        chosen, rejected, *lengths = random_pairs()
        for loss_type in ("sigmoid", "tpo-l"):
            close(tpo_pair_loss(chosen, rejected, *lengths, loss_type, 0.0), [math.log(2)] * 50, 1e-15)

    def test_gradient_of_sigmoid(self):
        chosen, rejected, *lengths = random_pairs()
        chosen.requires_grad_()
        (slope,) = torch.autograd.grad(tpo_pair_loss(chosen, rejected, *lengths, "sigmoid", 0.3).sum(), chosen)
        close(slope, -0.3 * torch.sigmoid(-0.3 * (chosen - rejected)).detach(), 1e-14)

    def test_tpo_l_without_gold_is_simpo(self):
        chosen, rejected, chosen_lengths, rejected_lengths = random_pairs()
        means = chosen / chosen_lengths, rejected / rejected_lengths
        expected = -torch.nn.functional.logsigmoid(2.5 * means[0] - 2.5 * means[1] - 1.25)
        close(tpo_pair_loss(chosen, rejected, chosen_lengths, rejected_lengths, "tpo-l", 2.5, 1.25), expected, 1e-13)

    def test_sequence_mean_ignores_lengths_of_equal_tokens(self):
        lengths = torch.tensor([1, 7, 100])
        close(gold_nll_sum(-0.5 * lengths.double(), lengths, "sequence_mean") / 3, 0.5)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
class TestExtremes:
    @pytest.mark.parametrize("values", [(-1e-12, -1e4), (-1e4, -1e-12), (-1e-12, -1e-12), (-1e4, -1e4), (0.0, 0.0)])
    @pytest.mark.parametrize("lengths", [(1, 1), (1, 400), (0, 0)])
    def test_finite(self, loss_type, values, lengths):
        pair = [torch.tensor([value], requires_grad=True) for value in values]
        sizes = [torch.tensor([length]) for length in lengths]
        smoothing = 0.1 if loss_type in ("sigmoid", "tpo-l") else 0.0
        loss = tpo_pair_loss(*pair, *sizes, loss_type, 2.0, 1.6, smoothing)
        for normalization in NORMALIZATIONS:
            loss = loss + gold_nll_sum(pair[0], sizes[0], normalization)
        loss.sum().backward()
        for tensor in (loss, pair[0].grad, pair[1].grad):
            assert torch.isfinite(tensor).all()

    def test_gradcheck(self, loss_type):
        chosen, rejected, *lengths = random_pairs(6, seed=1)
        smoothing = 0.1 if loss_type in ("sigmoid", "tpo-l") else 0.0
        inputs = (chosen.requires_grad_(), rejected.requires_grad_())
        torch.autograd.gradcheck(lambda c, r: tpo_pair_loss(c, r, *lengths, loss_type, 0.05, 0.4, smoothing), inputs)
        for normalization in NORMALIZATIONS:
            torch.autograd.gradcheck(
                lambda c, n=normalization: gold_nll_sum(c, lengths[0], n), (chosen.detach().requires_grad_(),)
            )


# ---------------------------------------------------------------- the config


class TestConfig:
    def test_default_temperatures(self, tmp_path):
        def found(**settings):
            config = TPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)
            return config.loss_type, config.beta, config.tpo_l_gamma

        assert found() == ("sigmoid", 0.01, None)
        assert found(loss_type="hinge") == ("hinge", 0.01, None)
        assert found(loss_type="ipo") == ("ipo", 0.5, None)
        assert found(loss_type="tpo-l") == ("tpo-l", 2.0, 1.6)
        assert found(loss_type="tpo-l", beta=3.0) == ("tpo-l", 3.0, 0.5)
        assert found(loss_type="tpo-l", tpo_l_gamma=0.0) == ("tpo-l", 2.0, 0.0)
        assert found(loss_type=["ipo"], beta=0.3) == ("ipo", 0.3, None)

    def test_other_defaults_are_trls(self, tmp_path):
        ours, theirs = TPOConfig(str(tmp_path), bf16=False), TRLTPOConfig(str(tmp_path), bf16=False)
        for name in ("learning_rate", "tpo_alpha", "label_smoothing", "max_length", "loss_type", "beta"):
            assert getattr(ours, name) == getattr(theirs, name)

    @pytest.mark.parametrize(
        ("settings", "warned"),
        [
            ({"loss_type": "tpo-l", "beta": 0.01}, True),
            ({"loss_type": "tpo-l", "beta": 0.5}, False),
            ({"loss_type": "ipo", "beta": 0.01}, True),
            ({"loss_type": "ipo", "beta": 0.1}, False),
            ({"beta": 1e-4}, False),
            ({"loss_type": "tpo-l"}, False),
        ],
    )
    def test_a_temperature_for_sums_is_warned_of(self, tmp_path, monkeypatch, settings, warned):
        messages = message_log(monkeypatch, tpo)
        TPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)
        assert [f"`beta={settings.get('beta')}` is made for sums" in message for message in messages] == [
            True
        ] * warned

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"loss_type": "tpo_l"}, "`loss_type='tpo_l'` is not known. Choose one of: 'sigmoid', 'hinge', 'ipo', 'tpo-l'"),
            ({"loss_type": "dpo"}, "`loss_type='dpo'` is not known"),
            ({"loss_type": ["sigmoid", "ipo"]}, r"`loss_type=\[.sigmoid., .ipo.\]` is not known"),
            ({"nll_normalization": "mean"}, "`nll_normalization='mean'` is not known"),
            ({"gold_from": "rejected"}, "`gold_from='rejected'` is not known"),
            ({"tpo_alpha": -1.0}, "`tpo_alpha=-1.0` is out of range"),
            ({"tpo_alpha": math.nan}, "`tpo_alpha=nan` is out of range"),
            ({"beta": 0.0}, "`beta=0.0` is out of range"),
            ({"beta": -1.0, "loss_type": "tpo-l"}, "`beta=-1.0` is out of range"),
            ({"loss_type": "tpo-l", "tpo_l_gamma": -0.1}, "`tpo_l_gamma=-0.1` is out of range"),
            ({"tpo_l_gamma": 0.5}, "`tpo_l_gamma` has no effect with `loss_type='sigmoid'`"),
            ({"loss_type": "ipo", "tpo_l_gamma": 0.5}, "`tpo_l_gamma` has no effect"),
            ({"loss_type": "hinge", "label_smoothing": 0.1}, "`label_smoothing` has no effect with `loss_type='hinge'`"),
            ({"loss_type": "ipo", "label_smoothing": 0.1}, "`label_smoothing` has no effect"),
            ({"label_smoothing": 1.1}, "`label_smoothing=1.1` is out of range"),
            ({"tpo_alpha": 0.0, "nll_normalization": "sequence_sum"}, "have no effect with `tpo_alpha=0`"),
            ({"tpo_alpha": 0.0, "gold_from": "chosen"}, "have no effect with `tpo_alpha=0`"),
            ({"precompute_ref_log_probs": True}, "`precompute_ref_log_probs=True` has no effect without a reference"),
            ({"precompute_ref_batch_size": 4}, "`precompute_ref_batch_size=4` has no effect"),
            ({"sync_ref_model": True}, "`sync_ref_model=True` has no effect"),
            ({"ref_model_mixup_alpha": 0.5}, "`ref_model_mixup_alpha=0.5` has no effect"),
            ({"ref_model_sync_steps": 8}, "`ref_model_sync_steps=8` has no effect"),
            ({"f_divergence_type": "forward_kl"}, "`f_divergence_type='forward_kl'` has no effect"),
            ({"f_alpha_divergence_coef": 0.7}, "`f_alpha_divergence_coef=0.7` has no effect"),
            ({"loss_weights": [1.0]}, r"`loss_weights=\[1.0\]` has no effect"),
            ({"use_weighting": True}, "`use_weighting=True` has no effect"),
            ({"discopop_tau": 0.1}, "`discopop_tau=0.1` has no effect"),
        ],
    )  # fmt: skip
    def test_idle_and_wrong_options_are_refused(self, tmp_path, settings, message):
        """`loss_type` among them, which TRL's TPOTrainer looks at in the first step."""
        with pytest.raises(ValueError, match=message):
            TPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)
        assert TRLTPOConfig(str(tmp_path), bf16=False, loss_type="dpo").loss_type == "dpo"

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"loss_type": "tpo-l"},
            {"loss_type": "tpo-l", "beta": 4.0, "tpo_l_gamma": 3.0, "tpo_alpha": 0.05},
            {"loss_type": "ipo", "nll_normalization": "sequence_sum", "gold_from": "chosen"},
            {"tpo_alpha": 0.0, "label_smoothing": 0.2},
        ],
    )
    def test_round_trip(self, tmp_path, settings):
        config = TPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)
        known = {field.name for field in fields(config) if field.init}
        again = TPOConfig(**{name: value for name, value in config.to_dict().items() if name in known})
        assert again.to_dict() == config.to_dict()
        assert replace(config).to_dict() == config.to_dict()
        assert json.loads(config.to_json_string()) == json.loads(again.to_json_string())


# ---------------------------------------------------------------- the trainer against independent computations


def trainer_of(tmp_path, tokenizer, model="llama", data=None, cls=TPOTrainer, **settings):
    config_class = {TPOTrainer: TPOConfig, TRLTPOTrainer: TRLTPOConfig, CPOTrainer: CPOConfig}[cls]
    model = tiny.model(model, tokenizer) if model in tiny.FAMILIES else model
    return make(
        cls, config_class, tmp_path, model, tiny.triple_data() if data is None else data, tokenizer, **settings
    )


def naive_pair(chosen, rejected, loss_type, beta, gamma=0.0, smoothing=0.0):
    """The pair term from log-probs of tokens."""
    if loss_type in ("ipo", "tpo-l"):
        gap = chosen.mean() - rejected.mean()
    else:
        gap = chosen.sum() - rejected.sum()
    if loss_type == "ipo":
        return (gap - 0.5 / beta) ** 2
    if loss_type == "hinge":
        return (1 - beta * gap).clamp(min=0)
    z, zero = beta * gap - gamma, torch.zeros_like(gap)
    return (1 - smoothing) * torch.logaddexp(zero, -z) + smoothing * torch.logaddexp(zero, z)


def naive_tpo(model, tokenizer, rows, alpha=1.0, normalization="token", gold="reference", weights=None, **pair):
    """TPO from its definition, one response at a time. Normalisations: "token", "row", "sum"."""
    losses, golds = [], []
    for row in rows:
        logps = [token_logps(model, tokenizer, row["prompt"], row[name]) for name in ("chosen", "rejected")]
        losses.append(naive_pair(*logps, **({"loss_type": "sigmoid", "beta": 0.01} | pair)))
        golds.append(logps[0] if gold == "chosen" else token_logps(model, tokenizer, row["prompt"], row[gold]))
    losses = torch.stack(losses)
    nll = {
        "token": lambda: -torch.cat(golds).mean(),
        "row": lambda: -torch.stack([g.mean() for g in golds]).mean(),
        "sum": lambda: -torch.stack([g.sum() for g in golds]).mean(),
    }[normalization]()
    return (losses if weights is None else losses * torch.tensor(weights, dtype=losses.dtype)).mean() + alpha * nll


def expected_of(model, tokenizer, rows, **options):
    twin = double(model)
    loss = naive_tpo(twin, tokenizer, rows, **options)
    loss.backward()
    return loss.item(), gradients(twin)


OPTIONS = {
    "sigmoid": {"beta": 0.1},
    "hinge": {"beta": 0.1},
    "ipo": {"beta": 0.5},
    "tpo-l": {"beta": 2.0, "tpo_l_gamma": 1.6},
}
AVERAGES = {"batch_token_mean": "token", "global_token_mean": "token", "sequence_mean": "row", "sequence_sum": "sum"}


def pair_options(loss_type, smoothing=0.0):
    options = OPTIONS[loss_type]
    return {
        "loss_type": loss_type, "beta": options["beta"], "gamma": options.get("tpo_l_gamma", 0.0),
        "smoothing": smoothing,
    }  # fmt: skip


class TestAgainstFloat64:
    @pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2", "gpt-neox"])
    def test_families(self, tmp_path, tokenizer, family):
        trainer = trainer_of(tmp_path, tokenizer, family)
        loss, found = loss_and_gradients(trainer)
        rows = tiny.triple_data().to_list()[:4]
        value, expected = expected_of(trainer.model, tokenizer, rows)
        assert loss == pytest.approx(value, rel=2e-6)
        assert difference(found, expected) < 1e-5

    @pytest.mark.parametrize("loss_type", LOSS_TYPES)
    def test_loss_types(self, tmp_path, tokenizer, loss_type):
        smoothing = 0.1 if loss_type in ("sigmoid", "tpo-l") else 0.0
        trainer = trainer_of(
            tmp_path, tokenizer, loss_type=loss_type, label_smoothing=smoothing, tpo_alpha=0.3, **OPTIONS[loss_type]
        )
        loss, found = loss_and_gradients(trainer)
        rows = tiny.triple_data().to_list()[:4]
        value, expected = expected_of(trainer.model, tokenizer, rows, alpha=0.3, **pair_options(loss_type, smoothing))
        assert loss == pytest.approx(value, rel=2e-6)
        assert difference(found, expected) < 1e-5

    def test_no_gamma(self, tmp_path, tokenizer):
        trainer = trainer_of(tmp_path, tokenizer, loss_type="tpo-l", beta=2.0, tpo_l_gamma=0.0)
        rows = tiny.triple_data().to_list()[:4]
        value, _ = expected_of(trainer.model, tokenizer, rows, loss_type="tpo-l", beta=2.0)
        assert loss_and_gradients(trainer)[0] == pytest.approx(value, rel=2e-6)

    @pytest.mark.parametrize("normalization", NORMALIZATIONS)
    def test_normalizations(self, tmp_path, tokenizer, normalization):
        trainer = trainer_of(tmp_path, tokenizer, data=uneven_triples(), nll_normalization=normalization)
        loss, found = loss_and_gradients(trainer)
        value, expected = expected_of(
            trainer.model, tokenizer, uneven_triples(), normalization=AVERAGES[normalization]
        )
        assert loss == pytest.approx(value, rel=2e-6)
        assert difference(found, expected) < 1e-5

    def test_weights_multiply_the_pairs_only(self, tmp_path, tokenizer):
        weights = [2.0, 0.0, 0.5, 1.0]
        data = tiny.triple_data().select(range(4)).add_column("weight", weights)
        trainer = trainer_of(tmp_path, tokenizer, data=data, beta=0.1)
        loss, found = loss_and_gradients(trainer)
        value, expected = expected_of(trainer.model, tokenizer, data, beta=0.1, weights=weights)
        assert loss == pytest.approx(value, rel=2e-6)
        assert difference(found, expected) < 1e-5

    def test_padding_and_order_of_the_rows(self, tmp_path, tokenizer):
        settings = {"loss_type": "tpo-l", "per_device_train_batch_size": 8}
        loss, found = loss_and_gradients(trainer_of(tmp_path, tokenizer, **settings))
        data = tiny.triple_data().select([3, 1, 0, 2, 7, 6, 5, 4])
        padded = trainer_of(tmp_path, tokenizer, data=data, pad_to_multiple_of=64, **settings)
        assert next(iter(padded.get_train_dataloader()))["gold_input_ids"].size(1) % 64 == 0
        other, same = loss_and_gradients(padded)
        assert other == pytest.approx(loss, rel=1e-6)
        assert difference(same, found) < 1e-5

    def test_ld_alpha_acts_on_the_pair(self, tmp_path, tokenizer):
        trainer = trainer_of(tmp_path, tokenizer, ld_alpha=0.25, beta=0.1, gold_from="chosen")
        loss, _ = loss_and_gradients(trainer)
        expected, chosen_tokens = [], []
        for row in tiny.triple_data().select(range(4)):
            chosen, rejected = (
                token_logps(trainer.model, tokenizer, row["prompt"], row[name]) for name in ("chosen", "rejected")
            )
            shared = min(len(chosen), len(rejected))
            gap = sum(sign * (t[:shared].sum() + 0.25 * t[shared:].sum()) for sign, t in ((1, chosen), (-1, rejected)))
            expected.append(torch.log1p((-0.1 * gap).exp()))
            chosen_tokens.append(chosen)
        value = torch.stack(expected).mean() - torch.cat(chosen_tokens).mean()
        assert loss == pytest.approx(value.item(), rel=2e-6)


class TestAgainstTRL:
    @pytest.mark.parametrize("loss_type", LOSS_TYPES)
    def test_tpo_trainer(self, tmp_path, tokenizer, loss_type):
        smoothing = {"label_smoothing": 0.1} if loss_type in ("sigmoid", "tpo-l") else {}
        options = {"loss_type": loss_type, **OPTIONS[loss_type], **smoothing, "tpo_alpha": 0.7}
        theirs = trainer_of(tmp_path, tokenizer, cls=TRLTPOTrainer, **options)
        ours = trainer_of(tmp_path, tokenizer, **options)
        (their_loss, expected), (loss, found) = loss_and_gradients(theirs), loss_and_gradients(ours)
        assert loss == pytest.approx(their_loss, rel=1e-6)
        assert difference(found, expected) < 2e-6

    @pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "tpo-l"])
    @pytest.mark.parametrize("gold", ["column", "chosen"])
    def test_gold_equal_to_chosen_is_cpo(self, tmp_path, tokenizer, loss_type, gold):
        """And CPO-SimPO for TPO-L. TRL's CPOTrainer strips nothing and adds no token here, so that rows are the same."""
        data = tiny.preference_data()
        options = dict(OPTIONS[loss_type])
        gamma = {"simpo_gamma": options["tpo_l_gamma"]} if loss_type == "tpo-l" else {}
        cpo = trainer_of(
            tmp_path, tokenizer, data=data, cls=CPOTrainer, beta=options["beta"], cpo_alpha=0.7, **gamma,
            loss_type="simpo" if loss_type == "tpo-l" else loss_type, remove_unused_columns=False,
        )  # fmt: skip
        cpo.model.train()
        cpo.model.zero_grad()
        inputs = next(iter(cpo.get_train_dataloader()))
        expected = cpo.get_batch_loss_metrics(cpo.model, inputs)[0]
        expected.backward()
        if gold == "column":
            data, source = data.add_column("reference", data["chosen"]), {}
        else:
            source = {"gold_from": "chosen"}
        ours = trainer_of(tmp_path, tokenizer, data=data, loss_type=loss_type, tpo_alpha=0.7, **options, **source)
        assert [branch.name for branch in ours.branches] == (["gold"] if gold == "column" else [])
        loss, found = loss_and_gradients(ours)
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        assert difference(found, gradients(cpo.model)) < 2e-6

    def test_tpo_l_without_gold_is_simpo(self, tmp_path, tokenizer):
        data = tiny.preference_data()
        cpo = trainer_of(
            tmp_path, tokenizer, data=data, cls=CPOTrainer, beta=2.0, cpo_alpha=0.0, simpo_gamma=1.6,
            loss_type="simpo", remove_unused_columns=False,
        )  # fmt: skip
        expected = cpo.get_batch_loss_metrics(cpo.model, next(iter(cpo.get_train_dataloader())))[0]
        expected.backward()
        loss, found = loss_and_gradients(trainer_of(tmp_path, tokenizer, data=data, loss_type="tpo-l", tpo_alpha=0.0))
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        assert difference(found, gradients(cpo.model)) < 2e-6

    def test_many_steps(self, tmp_path, tokenizer):
        options = {"max_steps": 6, "loss_type": "tpo-l", "beta": 2.0, "tpo_l_gamma": 1.6, "learning_rate": 1e-3}
        runs = [trainer_of(tmp_path, tokenizer, cls=cls, **options) for cls in (TRLTPOTrainer, TPOTrainer)]
        for trainer in runs:
            trainer.train()
        theirs, ours = (logs(trainer) for trainer in runs)
        for their_entry, entry in zip(theirs, ours, strict=True):
            assert set(their_entry) <= set(entry)
            # TRL logs means as `logps/*` under TPO-L, and the entropy of the gold tokens too
            for name in set(their_entry) - {"logps/chosen", "logps/rejected", "entropy"}:
                assert entry[name] == pytest.approx(their_entry[name], rel=1e-3, abs=1e-4), name


class TestSplitSteps:
    """The gradient of an optimizer step does not depend on how it was split."""

    @pytest.mark.parametrize("normalization", ["global_token_mean", "sequence_mean", "sequence_sum"])
    def test_accumulation(self, tmp_path, tokenizer, normalization):
        model = tiny.model("llama", tokenizer)
        value, expected = expected_of(model, tokenizer, uneven_triples(), normalization=AVERAGES[normalization])
        for size in (4, 2, 1):
            trainer = trainer_of(
                tmp_path, tokenizer, data=uneven_triples(), nll_normalization=normalization, max_steps=1,
                per_device_train_batch_size=size, gradient_accumulation_steps=4 // size,
            )  # fmt: skip
            (loss,), (found,) = step_gradients(trainer)
            assert loss == pytest.approx(value, rel=2e-6)
            assert difference(found, expected) < 1e-5

    def test_unfinished_accumulation(self, tmp_path, tokenizer):
        """The last step of an epoch has 2 of 4 micro-batches."""
        data = datasets.concatenate_datasets([uneven_triples(), uneven_triples().select([1, 2])])
        trainer = trainer_of(
            tmp_path, tokenizer, data=data, max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=4,
            learning_rate=0.0,
        )  # fmt: skip
        _, steps = step_gradients(trainer)
        for rows, found in zip((uneven_triples(), uneven_triples().select([1, 2])), steps, strict=True):
            _, expected = expected_of(trainer.model, tokenizer, rows)
            assert difference(found, expected) < 1e-5

    def test_batch_token_mean_is_trls_bias(self, tmp_path, tokenizer):
        split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 1}
        _, (theirs,) = step_gradients(
            trainer_of(tmp_path, tokenizer, data=uneven_triples(), cls=TRLTPOTrainer, **split)
        )
        ours = trainer_of(tmp_path, tokenizer, data=uneven_triples(), nll_normalization="batch_token_mean", **split)
        model = tiny.model("llama", tokenizer)
        _, (found,) = step_gradients(ours)
        assert difference(found, theirs) < 2e-6
        _, whole = expected_of(model, tokenizer, uneven_triples())
        assert difference(theirs, whole) > 0.1

    @pytest.mark.slow
    def test_two_processes(self, tmp_path):
        apart = two_processes_tpo_mpo.check("tpo", tmp_path)
        assert apart.pop("tpo of TRL") > 0.1
        assert max(apart.values()) < 1e-5


# ---------------------------------------------------------------- data


class TestData:
    def test_gold_is_an_alias_of_reference(self, tmp_path, tokenizer):
        first = loss_and_gradients(trainer_of(tmp_path, tokenizer))
        renamed = tiny.triple_data().rename_column("reference", "gold")
        second = loss_and_gradients(trainer_of(tmp_path, tokenizer, data=renamed))
        assert first[0] == second[0]

    def test_no_gold_column_without_gold_term(self, tmp_path, tokenizer):
        """TRL demands the column all the same."""
        trainer = trainer_of(tmp_path, tokenizer, data=tiny.preference_data(), tpo_alpha=0.0, beta=0.1)
        batch = next(iter(trainer.get_train_dataloader()))
        assert not [name for name in batch if name.startswith("gold")]
        loss, found = loss_and_gradients(trainer)
        rows = tiny.preference_data().to_list()[:4]
        value, expected = expected_of(trainer.model, tokenizer, rows, alpha=0.0, gold="chosen", beta=0.1)
        assert loss == pytest.approx(value, rel=2e-6)
        assert difference(found, expected) < 1e-5
        with pytest.raises(ValueError, match="columns"):
            trainer_of(tmp_path, tokenizer, data=tiny.preference_data(), cls=TRLTPOTrainer, tpo_alpha=0.0)

    def test_missing_gold_column(self, tmp_path, tokenizer):
        with pytest.raises(ValueError, match="lacks the column 'reference' or 'gold'"):
            trainer_of(tmp_path, tokenizer, model="./nowhere", data=tiny.preference_data())

    def test_implicit_prompt_and_messages(self, tmp_path, tokenizer):
        columns = ("reference", "chosen", "rejected")
        rows = tiny.triple_data().to_list()
        loss, _ = loss_and_gradients(trainer_of(tmp_path, tokenizer))
        implicit = Dataset.from_list([{name: row["prompt"] + row[name] for name in columns} for row in rows])
        assert loss_and_gradients(trainer_of(tmp_path, tokenizer, data=implicit))[0] == pytest.approx(loss, rel=1e-6)
        broken = Dataset.from_list([row | {"reference": "Another question."} for row in implicit.to_list()])
        with pytest.raises(
            ValueError, match="'reference' does not begin with the prompt that chosen and rejected share"
        ):
            trainer_of(tmp_path, tokenizer, data=broken)

        messages = Dataset.from_list(
            [
                {"prompt": [{"role": "user", "content": row["prompt"]}]}
                | {name: [{"role": "assistant", "content": row[name].strip()}] for name in columns}
                for row in rows
            ]
        )
        ours = trainer_of(tmp_path, tokenizer, data=messages)
        theirs = trainer_of(tmp_path, tokenizer, data=messages, cls=TRLTPOTrainer)
        assert loss_and_gradients(ours)[0] == pytest.approx(loss_and_gradients(theirs)[0], rel=1e-6)

    def test_fully_truncated_rows_are_dropped(self, tmp_path, tokenizer, monkeypatch):
        """TRL keeps them, and a batch of one is NaN, which its log shows as 0."""
        lengths = [len(tokenizer(row["prompt"])["input_ids"]) for row in tiny.triple_data()]
        limit = sorted(lengths)[3]
        left = [row for row, length in zip(tiny.triple_data(), lengths, strict=True) if length < limit]
        messages = message_log(monkeypatch, checks)
        trainer = trainer_of(tmp_path, tokenizer, max_length=limit)
        assert [row["prompt"] for row in trainer.train_dataset] == [row["prompt"] for row in left]
        assert f"Dropped {8 - len(left)} of 8 rows" in messages[0]
        trainer.train()
        assert all(math.isfinite(value) for entry in logs(trainer) for value in entry.values())

        worst = tiny.triple_data().select([lengths.index(max(lengths))])
        with pytest.raises(ValueError, match="No row of the train dataset can be trained"):
            trainer_of(tmp_path, tokenizer, data=worst, max_length=limit)
        theirs = trainer_of(tmp_path, tokenizer, data=worst, cls=TRLTPOTrainer, max_length=limit)
        assert math.isnan(loss_and_gradients(theirs)[0])

    def test_truncated_gold(self, tmp_path, tokenizer):
        row = tiny.triple_data()[0] | {"reference": letters(40)}
        prompt = tokenizer(row["prompt"])["input_ids"]
        for mode, kept in (("keep_start", 12), ("keep_end", len(prompt) + 12)):
            trainer = trainer_of(
                tmp_path, tokenizer, data=Dataset.from_list([row]), max_length=len(prompt) + 12, truncation_mode=mode,
            )  # fmt: skip
            batch = next(iter(trainer.get_train_dataloader()))
            assert batch["gold_completion_mask"].sum() == kept

    def test_tokenized_data(self, tmp_path, tokenizer):
        """TRL raises for it."""
        first = trainer_of(tmp_path, tokenizer)
        rows = [
            {
                "prompt_ids": row["prompt_ids"], "chosen_ids": row["chosen_ids"], "rejected_ids": row["rejected_ids"],
                "reference_ids": row["gold_rows"][0]["completion_ids"],
            }
            for row in first.train_dataset
        ]  # fmt: skip
        tokenized = Dataset.from_list(rows)
        second = trainer_of(tmp_path, tokenizer, data=tokenized)
        assert loss_and_gradients(second)[0] == loss_and_gradients(first)[0]
        with pytest.raises(ValueError, match="columns"):
            trainer_of(tmp_path, tokenizer, data=tokenized, cls=TRLTPOTrainer)

    def test_fully_truncated_rows_of_tokenized_data_are_dropped(self, tmp_path, tokenizer):
        rows = [
            {"prompt_ids": [*range(10, 10 + n)], "chosen_ids": [5, 6], "rejected_ids": [7], "reference_ids": [8, 9]}
            for n in (3, 20)
        ]
        trainer = trainer_of(tmp_path, tokenizer, data=Dataset.from_list(rows), max_length=10)
        assert len(trainer.train_dataset) == 1

    def test_iterable_dataset(self, tmp_path, tokenizer):
        stream = tiny.triple_data().to_iterable_dataset()
        streamed = trainer_of(tmp_path, tokenizer, data=stream)
        losses, (found, _) = step_gradients(streamed)
        expected_losses, (expected, _) = step_gradients(trainer_of(tmp_path, tokenizer))
        assert losses == expected_losses
        assert difference(found, expected) == 0

    def test_untrainable_triples_are_dropped(self, tmp_path, tokenizer):
        rows = tiny.triple_data().to_list()
        rows[1]["reference"] = " "
        rows[2]["rejected"] = rows[2]["chosen"]
        trainer = trainer_of(tmp_path, tokenizer, data=Dataset.from_list(rows))
        assert len(trainer.train_dataset) == 6


# ---------------------------------------------------------------- what TRL's trainer lacks


class TestTrainer:
    def test_its_loss_is_a_mean_of_micro_batches(self, tokenizer):
        """Else transformers would not divide by the accumulation steps for a batch that holds `labels`."""
        assert TPOTrainer.loss_is_scaled_for_ga is False
        assert TRLTPOTrainer.loss_is_scaled_for_ga is None

    def test_no_logits(self, tmp_path, tokenizer):
        def refuse(*args, **kwargs):
            raise AssertionError("logits of the whole batch")

        for cls in (TPOTrainer, TRLTPOTrainer):
            model = tiny.model("llama", tokenizer)
            model.lm_head.forward = refuse
            trainer = trainer_of(tmp_path, tokenizer, model, cls=cls)
            if cls is TPOTrainer:
                assert math.isfinite(loss_and_gradients(trainer)[0])
            else:
                with pytest.raises(AssertionError, match="logits of the whole batch"):
                    loss_and_gradients(trainer)

    def test_one_forward_a_step(self, tmp_path, tokenizer):
        trainer = trainer_of(tmp_path, tokenizer)
        assert trainer.ref_model is None
        rows = []
        trainer.model.model.register_forward_pre_hook(
            lambda module, args, named: rows.append(named["input_ids"].size(0)), with_kwargs=True
        )
        trainer.train()
        assert rows == [12, 12]

    def test_moe_router_loss(self, tmp_path, tokenizer):
        weighted = trainer_of(tmp_path, tokenizer, "qwen3-moe", router_aux_loss_coef=0.5)
        plain = trainer_of(tmp_path, tokenizer, "qwen3-moe", router_aux_loss_coef=0.0)
        loss = loss_and_gradients(weighted)[0]
        aux = weighted._metrics["train"]["aux_loss"][-1]
        assert aux > 0
        assert loss - loss_and_gradients(plain)[0] == pytest.approx(0.5 * aux, rel=1e-4)
        value, _ = expected_of(plain.model, tokenizer, tiny.triple_data().to_list()[:4])
        assert loss_and_gradients(plain)[0] == pytest.approx(value, rel=2e-6)
        assert "aux_loss" not in trainer_of(tmp_path, tokenizer, "qwen3-moe", cls=TRLTPOTrainer)._metrics["train"]

    @pytest.mark.parametrize("loss_type", ["sigmoid", "tpo-l"])
    def test_metrics(self, tmp_path, tokenizer, loss_type):
        """Over two micro-batches of an optimizer step; `logps/*` are sums also where rewards are of means."""
        beta = OPTIONS[loss_type]["beta"]
        trainer = trainer_of(
            tmp_path, tokenizer, data=uneven_triples(), loss_type=loss_type, beta=beta, max_steps=1,
            per_device_train_batch_size=2, gradient_accumulation_steps=2,
        )  # fmt: skip
        model = double(trainer.model)
        tokens = {
            name: [token_logps(model, tokenizer, row["prompt"], row[name]).detach() for row in uneven_triples()]
            for name in ("chosen", "rejected", "reference")
        }
        hits, top = 0, 0
        for row in uneven_triples():
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids = [*prompt, *tokenizer(row["reference"])["input_ids"], tokenizer.eos_token_id]
            best = model(input_ids=torch.tensor([ids])).logits[0].argmax(-1)[len(prompt) - 1 : -1]
            hits += (best == torch.tensor(ids[len(prompt) :])).sum().item()
            top += len(ids) - len(prompt)
        assert top == sum(GOLD_LENGTHS)
        trainer.train()
        (entry,) = logs(trainer)

        def mean(values):
            return torch.stack(list(values)).mean().item()

        reward = torch.mean if loss_type == "tpo-l" else torch.sum
        rewards = {name: beta * torch.stack([reward(t) for t in values]) for name, values in tokens.items()}
        expected = {
            "nll_loss": -torch.cat(tokens["reference"]).mean().item(),
            "tpo/reference_token_accuracy": hits / top,
            "rewards/margins": (rewards["chosen"] - rewards["rejected"]).mean().item(),
            "rewards/accuracies": (rewards["chosen"] > rewards["rejected"]).double().mean().item(),
            **{f"logps/{name}": mean(t.sum() for t in values) for name, values in tokens.items()},
            **{f"rewards/{name}": values.mean().item() for name, values in rewards.items()},
        }
        for name, value in expected.items():
            assert entry[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
        total = sum(
            len(tokenizer(row["prompt"])["input_ids"]) + len(tokenizer(row[name])["input_ids"]) + 1
            for row in uneven_triples()
            for name in tokens
        )
        assert entry["num_tokens"] == total

    def test_evaluation(self, tmp_path, tokenizer, monkeypatch):
        held_out = tiny.triple_data().select([4, 5, 6, 7])
        trainer = trainer_of(
            tmp_path, tokenizer, eval_dataset=held_out, eval_strategy="steps", eval_steps=1, max_steps=1,
            learning_rate=0.0,
        )  # fmt: skip
        trainer.train()
        value, _ = expected_of(trainer.model, tokenizer, held_out)
        entry = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
        assert entry["eval_loss"] == pytest.approx(value, rel=2e-6)
        assert entry["eval_nll_loss"] > 0
        assert {"eval_logps/reference", "eval_rewards/margins"} <= set(entry)
        assert trainer.evaluate(held_out)["eval_loss"] == pytest.approx(value, rel=2e-6)

        calls = []
        prepare = TPOTrainer._prepare_dataset
        monkeypatch.setattr(TPOTrainer, "_prepare_dataset", lambda *args: (calls.append(args[-1]), prepare(*args))[1])
        metrics = trainer.evaluate({"a": held_out, "b": tiny.triple_data().select([0])})
        assert calls == ["a", "b"]
        assert metrics["eval_a_loss"] == pytest.approx(value, rel=2e-6)
        assert "eval_b_loss" in metrics

    def test_predict_of_raw_data(self, tmp_path, tokenizer):
        trainer = trainer_of(tmp_path, tokenizer)
        held_out = tiny.triple_data().select([4, 5, 6, 7])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = trainer.predict(held_out)
        value, _ = expected_of(trainer.model, tokenizer, held_out)
        assert found.metrics["test_loss"] == pytest.approx(value, rel=2e-6)

    def test_reference_model_is_refused(self, tmp_path, tokenizer):
        with pytest.raises(TypeError, match="ref_model"):
            TPOTrainer(
                model=tiny.model("llama", tokenizer), ref_model=tiny.model("llama", tokenizer),
                train_dataset=tiny.triple_data(), processing_class=tokenizer,
            )  # fmt: skip

    def test_pad_token(self, tmp_path):
        own = tiny.tokenizer()  # it is changed
        trainer = trainer_of(tmp_path, own, pad_token="<|endoftext|>")
        batch = next(iter(trainer.get_train_dataloader()))
        for kind in ("", "gold_"):
            padding = batch[f"{kind}input_ids"][batch[f"{kind}attention_mask"] == 0]
            assert len(padding) > 0
            assert (padding == own.convert_tokens_to_ids("<|endoftext|>")).all()

    @pytest.mark.parametrize("settings", [{"gradient_accumulation_steps": 2}, {"streaming": True}])
    def test_resumed_equals_uninterrupted(self, tmp_path, tokenizer, settings):
        """Bit for bit: weights, and every logged value."""
        settings = dict(settings)
        data = tiny.triple_data()
        data = data.to_iterable_dataset() if settings.pop("streaming", False) else data

        def trainer():
            return trainer_of(
                tmp_path, tokenizer, data=data, max_steps=6, save_strategy="steps", save_steps=3,
                per_device_train_batch_size=2, train_sampling_strategy="random", **settings,
            )  # fmt: skip

        whole, resumed = trainer(), trainer()
        whole.train()
        resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-3"))
        assert logs(resumed) == logs(whole)
        for (name, left), (_, right) in zip(
            whole.model.named_parameters(), resumed.model.named_parameters(), strict=True
        ):
            assert torch.equal(left, right), name


class TestAdapters:
    def test_lora(self, tmp_path, tokenizer, model_dir):
        trainer = trainer_of(tmp_path, tokenizer, model_dir, peft_config=LoraConfig(**LORA))
        before = {name: value.clone() for name, value in trainer.model.named_parameters()}
        trainer.train()
        trainer.save_model()
        for name, value in trainer.model.named_parameters():
            assert torch.equal(before[name], value) == ("lora_" not in name), name
        base_model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        loaded = PeftModel.from_pretrained(base_model, trainer.args.output_dir).eval()
        trainer.model.eval()
        row = tiny.triple_data()[0]
        with torch.no_grad():
            found, expected = (
                token_logps(model, tokenizer, row["prompt"], row["chosen"]) for model in (loaded, trainer.model)
            )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_existing_adapter_is_the_only_one(self, tmp_path, tokenizer):
        """TRL's DPO adds a copy of it as the reference, which is neither needed nor saved here."""
        torch.manual_seed(0)
        model = get_peft_model(tiny.model("llama", tokenizer), LoraConfig(**LORA, init_lora_weights=False))
        names = {name for name, _ in model.named_parameters()}
        trainer = trainer_of(tmp_path, tokenizer, model, beta=0.1, save_strategy="steps", save_steps=1, max_steps=1)
        assert {name for name, _ in trainer.model.named_parameters()} == names
        assert list(trainer.model.peft_config) == ["default"]
        loss, found = loss_and_gradients(trainer)
        expected = naive_tpo(trainer.model, tokenizer, tiny.triple_data().to_list()[:4], beta=0.1)
        trainer.model.zero_grad()
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=2e-6)
        assert difference(found, gradients(trainer.model)) < 1e-5
        trainer.train()
        trainer.save_model()
        folders = [Path(trainer.args.output_dir), Path(trainer.args.output_dir) / "checkpoint-1"]
        for folder in folders:
            assert (folder / "adapter_model.safetensors").is_file()
            assert not (folder / "ref").exists()

    def test_prompt_tuning(self, tmp_path, tokenizer):
        """TRL's trainer fails on the virtual tokens."""
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        data = uneven_triples()  # gold responses longer than the pairs
        trainer = trainer_of(tmp_path, tokenizer, data=data, peft_config=config, beta=0.1)
        loss, found = loss_and_gradients(trainer)
        assert list(found) == ["prompt_encoder.default.embedding.weight"]
        trainer.model.zero_grad()
        expected = naive_tpo(trainer.model, tokenizer, data, beta=0.1)
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=2e-6)
        assert difference(found, gradients(trainer.model)) < 1e-5
        trainer.train()
        theirs = trainer_of(tmp_path, tokenizer, data=data, cls=TRLTPOTrainer, peft_config=config)
        with pytest.raises((RuntimeError, IndexError, ValueError)):
            loss_and_gradients(theirs)

    def test_4bit(self, tmp_path, tokenizer, model_dir):
        pytest.importorskip("bitsandbytes")
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        trainer = trainer_of(
            tmp_path, tokenizer, model_dir, peft_config=LoraConfig(**LORA), quantization_config=quantization,
            eval_dataset=tiny.triple_data(),
        )  # fmt: skip
        assert trainer.model.get_base_model().is_loaded_in_4bit
        trainer.evaluate()
        trainer.train()
        assert all(entry["grad_norm"] > 0 for entry in logs(trainer))


def test_script(model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tiny.triple_data().to_json("triples.jsonl")
    argv = ["tpo", "--model_name_or_path", model_dir, "--dataset_name", "triples.jsonl", "--output_dir", "out"]
    argv += ["--max_steps", "2", "--logging_steps", "1", "--report_to", "none", "--loss_type", "tpo-l"]
    argv += ["--tpo_alpha", "0.05", "--use_cpu", "true", "--bf16", "false"]
    assert script.run(argv) == 0
    state = json.loads(Path("out/checkpoint-2/trainer_state.json").read_text())
    assert len([entry for entry in state["log_history"] if "nll_loss" in entry]) == 2
    card = Path("out/README.md").read_text()
    for name, value in {"loss_type": "tpo-l", "beta": 2.0, "tpo_l_gamma": 1.6, "tpo_alpha": 0.05}.items():
        assert f"`{name}`" in card
        assert str(value) in card
    tiny.preference_data().to_json("pairs.jsonl")
    argv[4], argv[6] = "pairs.jsonl", "other"
    assert script.run(argv) == 1
    assert "trl-ift tpo: error: `train_dataset` lacks the column 'reference' or 'gold'" in capsys.readouterr().err
