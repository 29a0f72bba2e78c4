"""ASFT: the numbers and identities of its loss, and what it needs from a run."""

import math

import pytest
import tiny
import torch
import torch.nn.functional as F
from pairs import anchored, difference, loss_and_gradients, make, message_log
from test_family import batch_of
from torch import tensor
from trl.experimental.orpo.orpo_trainer import ORPOTrainer

from trl_ift import AlignedSFTConfig, AlignedSFTTrainer, PreferenceConfig, PreferenceTrainer
from trl_ift.preference import aligned_sft
from trl_ift.preference.aligned_sft import align_loss, aligned_sft_loss, log1mexp, log_odds


CHOSEN = tensor([-0.5, -1.0, -0.25], dtype=torch.float64)
REJECTED = tensor([-1.5, -0.75], dtype=torch.float64)
W, L = CHOSEN.mean()[None], REJECTED.mean()[None]


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


def means(number=50):
    generator = torch.Generator().manual_seed(0)
    return [-3 * torch.rand(number, dtype=torch.float64, generator=generator) - 1e-3 for _ in range(2)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 1.5591945241),
        ({"asft_lambda": 0.2}, 0.7785055715),
        ({"sft_weight": 0.0}, 0.9758611908),
        ({"sft_weight": 0.0, "beta": 0.3}, 1.2480801278),
        ({"sft_weight": 0.0, "beta": 2.0}, 0.6948025135),
    ],
)
def test_numbers(options, expected):
    close(aligned_sft_loss(W, L, **options), [expected])


class TestIdentities:
    def test_without_alignment(self):
        w, r = means()
        close(aligned_sft_loss(w, r, asft_lambda=0), -w)

    def test_closed_form_is_the_tempered_one_at_1(self):
        w, r = means()
        tempered = -F.logsigmoid(log_odds(w)) - F.logsigmoid(-log_odds(r))
        close(align_loss(w, r), tempered)
        close(align_loss(w, r), -w - torch.log(1 - r.exp()))
        close(align_loss(w, r, 1 + 1e-12), align_loss(w, r))

    def test_bounds_the_odds_ratio_term(self):
        """ORPO's term, computed by TRL, is smaller by a log that is known."""
        w, r = means()
        stand_in = type("", (), {"beta": -1.0, "accelerator": type("", (), {"device": "cpu"})})()
        odds_ratio = ORPOTrainer.odds_ratio_loss(stand_in, w, r)[0].double()
        p_w, p_l = w.exp(), r.exp()
        difference = torch.log(p_w * (1 - p_l) + p_l * (1 - p_w))
        close(odds_ratio, align_loss(w, r) + difference, 1e-4)  # TRL's is in float32
        assert (odds_ratio < align_loss(w, r)).all()
        value = ORPOTrainer.odds_ratio_loss(stand_in, W, L)[0]
        assert value.item() == pytest.approx(0.3226126459, abs=1e-6)

    def test_gradients(self):
        w, r = (part.requires_grad_() for part in means())
        on_chosen, on_rejected = torch.autograd.grad(align_loss(w, r).sum(), (w, r))
        close(on_chosen, -torch.ones_like(w))
        close(on_rejected, r.exp() / (1 - r.exp()))
        assert (on_rejected > 0).all()

    def test_vanishes_on_unlikely_rejected_answers(self):
        r = tensor([-50.0], requires_grad=True)
        (gradient,) = torch.autograd.grad(align_loss(tensor([-1.0]), r).sum(), r)
        assert 0 < gradient.item() < 1e-20

    def test_is_held_on_certain_rejected_answers(self):
        r = tensor([-1e-7, -1e-9, 0.0], requires_grad=True)
        loss = align_loss(torch.zeros(3), r)
        (gradient,) = torch.autograd.grad(loss.sum(), r)
        torch.testing.assert_close(loss, torch.full((3,), 7 * math.log(10)), rtol=1e-5, atol=0)
        assert gradient[0].item() == pytest.approx(1e7, rel=1e-3)
        assert gradient[1:].tolist() == [0, 0]


def test_log1mexp():
    """Value and gradient against float64, from the near to the far end, and at the seam."""
    x = tensor([-1e-9, -1e-7, -1e-3, -0.5, -math.log(2), -0.7, -3.0, -30.0, -300.0], requires_grad=True)
    exact = x.detach().double()
    value = log1mexp(x)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(value.double(), torch.log(-torch.expm1(exact)), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(gradient.double(), 1 / torch.expm1(-exact).neg(), rtol=1e-5, atol=1e-8)


def trainer_of(tmp_path, tokenizer, cls=AlignedSFTTrainer, config=AlignedSFTConfig, **settings):
    data = settings.pop("data", None) or tiny.preference_data()
    return make(cls, config, tmp_path, tiny.model("llama", tokenizer), data, tokenizer, **settings)


def test_length_does_not_count(tmp_path, tokenizer):
    """Every log-prob k times: the same loss."""
    trainer = trainer_of(tmp_path, tokenizer)
    losses = []
    for times in (1, 3):
        chosen, rejected = CHOSEN.repeat(times)[None], REJECTED.repeat(times)[None]
        batch = batch_of(chosen, rejected, torch.zeros_like(chosen), torch.zeros_like(rejected), {})
        losses.append(trainer.pair_loss(batch))
    close(losses[0], [1.5591945241])
    close(losses[1], losses[0])


def test_without_alignment_is_trls_sft_loss(tmp_path, tokenizer):
    """Of one pair, whose token mean is that of the batch."""
    data = tiny.preference_data().select([0])
    options = {"data": data, "per_device_train_batch_size": 1}
    ours = trainer_of(tmp_path, tokenizer, asft_lambda=0.0, **options)
    theirs = trainer_of(tmp_path, tokenizer, PreferenceTrainer, PreferenceConfig, loss_type="sft", **options)
    (loss, found), (value, expected) = loss_and_gradients(ours), loss_and_gradients(theirs)
    assert loss == pytest.approx(value, rel=1e-5)
    assert difference(found, expected) < 1e-5


def test_metrics_and_memory(tmp_path, tokenizer):
    trainer = trainer_of(tmp_path, tokenizer)
    assert trainer.ref_model is None
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(entry["nll_loss"] + entry["aligned_sft/align_loss"], rel=1e-3)
    assert entry["rewards/margins"] == pytest.approx(entry["rewards/chosen"] - entry["rewards/rejected"], rel=1e-3)
    assert entry["rewards/chosen"] < 0  # log-odds of an untrained model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"asft_lambda": -1.0}, r"`asft_lambda=-1.0` is out of range: it must lie in \[0, inf\)"),
        ({"sft_weight": float("nan")}, r"`sft_weight=nan` is out of range"),
        ({"beta": 0.0}, r"`beta=0.0` is out of range"),
        ({"asft_lambda": 0.0, "sft_weight": 0.0}, "`asft_lambda=0` and `sft_weight=0` leave no loss"),
        ({"asft_lambda": 0.0, "beta": 0.3}, "`beta=0.3` has no effect with `asft_lambda=0`"),
        ({"ld_alpha": 0.5}, "`ld_alpha=0.5` has no effect on means per token"),
        ({"loss_type": "ipo"}, "`loss_type='ipo'` has no effect on this method's loss"),
        (
            {"precompute_ref_log_probs": True},
            "`precompute_ref_log_probs=True` has no effect without a reference model",
        ),
    ],
)
def test_wrong_options(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        AlignedSFTConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_stored_reference_is_said(tmp_path, tokenizer, monkeypatch):
    messages = message_log(monkeypatch, aligned_sft)
    trainer_of(tmp_path, tokenizer, data=anchored())
    assert messages[0].startswith(
        "`train_dataset` has the columns ['ref_chosen_logps', 'ref_rejected_logps'], which have no effect"
    )
    messages.clear()
    trainer_of(tmp_path, tokenizer)
    assert messages == []


def test_unpaired_rows_are_refused(tmp_path, tokenizer):
    data = tiny.prompt_completion_data().add_column("label", [True, False] * 4)
    with pytest.raises(ValueError, match="lacks the column 'chosen' and 'rejected'"):
        trainer_of(tmp_path, tokenizer, data=data)
