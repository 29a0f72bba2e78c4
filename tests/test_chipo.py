"""chi-PO: the numbers and identities of its loss."""

import math
from functools import partial

import pytest
import tiny
import torch
import torch.nn.functional as F
from pairs import difference, loss_and_gradients, make
from torch import tensor
from trl import DPOConfig, DPOTrainer

from trl_ift import ChiPOConfig, ChiPOTrainer
from trl_ift.preference.chipo import chipo_loss, chipo_rewards


# Log-probs of policy and reference: chosen (-20, -15), (-22, -14.5); rejected (-24, -14), (-23, -15.25)
R_W = tensor([2.0, -0.5], dtype=torch.float64)
R_L = tensor([-1.0, 1.25], dtype=torch.float64)


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


def loss_of(r_w, r_l, beta, gamma=1.0, r_max=None):
    return chipo_loss(chipo_rewards(r_w, beta, gamma), chipo_rewards(r_l, beta, gamma), r_max)


def dpo(r_w, r_l, beta):
    return -F.logsigmoid(beta * (r_w - r_l))


def ratios(number=100, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(2, number, dtype=torch.float64, generator=generator)


def test_numbers():
    close(chipo_rewards(R_W, 0.1), [0.9389056099, 0.0106530660])
    close(chipo_rewards(R_L, 0.1), [-0.0632120559, 0.4740342957])
    close(chipo_rewards(R_W, 0.1) - chipo_rewards(R_L, 0.1), [1.0021176658, -0.4633812298])
    close(loss_of(R_W, R_L, 0.1), [0.3126926002, 0.9514413150])
    close(loss_of(R_W, R_L, 0.1).mean(), 0.6320669576)
    close(loss_of(R_W, R_L, 0.05), [0.4736773634, 0.8156876008])
    close(loss_of(R_W, R_L, 0.05).mean(), 0.6446824821)
    close(loss_of(R_W, R_L, 0.005), [0.6684080310, 0.7047988105])
    close(loss_of(R_W, R_L, 0.1, r_max=0.25), [0.4740769842, 0.9514413150])
    close(loss_of(R_W, R_L, 0.1, gamma=0.5), [0.3552314400, 0.8986456333])


def test_at_the_start():
    """Loss log 2, and the gradient of DPO with twice the beta."""
    r_w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    loss = loss_of(r_w, torch.zeros_like(r_w), 0.1)
    close(loss, [math.log(2)])
    close(torch.autograd.grad(loss.sum(), r_w)[0], [-0.1])


def test_swapping_turns_the_margin_round():
    r_w, r_l = ratios()
    swapped = loss_of(r_l, r_w, 0.1) - loss_of(r_w, r_l, 0.1)
    close(swapped, chipo_rewards(r_w, 0.1) - chipo_rewards(r_l, 0.1))


def test_near_the_reference_it_is_dpo_with_twice_the_beta():
    """To first order: the difference falls with the square of the log-ratios."""
    gaps = []
    for scale in (1e-2, 1e-3):
        r_w, r_l = ratios(scale=scale)
        gaps.append((loss_of(r_w, r_l, 0.1) - dpo(r_w, r_l, 0.2)).abs().max())
    assert gaps[0] < 1e-4
    assert gaps[0] / gaps[1] == pytest.approx(100, rel=0.1)


def test_far_below_the_reference_it_is_dpo():
    r_w, r_l = ratios() - 60
    close(loss_of(r_w, r_l, 0.1), dpo(r_w, r_l, 0.1))


def test_reward_rises_with_the_log_ratio():
    r = ratios(scale=3)[0].requires_grad_()
    (slope,) = torch.autograd.grad(chipo_rewards(r, 0.1).sum(), r)
    close(slope, 0.1 * (1 + r.detach().exp()))


def test_clip():
    r_w, r_l = (part.requires_grad_() for part in ratios(scale=3))
    loss = loss_of(r_w, r_l, 0.1, r_max=0.25)
    assert (loss >= math.log1p(math.exp(-0.5)) - 1e-12).all()
    assert (loss <= math.log1p(math.exp(0.5)) + 1e-12).all()
    on_chosen, on_rejected = torch.autograd.grad(loss.sum(), (r_w, r_l))
    beyond = (chipo_rewards(r_w, 0.1) - chipo_rewards(r_l, 0.1)).abs() > 0.5
    assert 0 < beyond.sum() < len(beyond)
    assert (on_chosen[beyond] == 0).all()
    assert (on_rejected[beyond] == 0).all()
    assert (on_chosen[~beyond] < 0).all()


def test_small_gamma_is_trls_chi_squared_loss(tmp_path, tokenizer):
    """TRL's alpha divergence with alpha = 2 has the scores exp(r) - 1, without the logarithm."""
    r_w, r_l = ratios()
    close(loss_of(r_w, r_l, 0.1, gamma=1e-12), -F.logsigmoid(0.1 * (r_w.exp() - r_l.exp())), 1e-10)

    found = []
    for cls, config, options in (
        (ChiPOTrainer, ChiPOConfig, {"chipo_gamma": 1e-9}),
        (DPOTrainer, DPOConfig, {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 2.0}),
    ):
        trainer = make(
            partial(cls, ref_model=tiny.model("llama", tokenizer, seed=1)), config, tmp_path,
            tiny.model("llama", tokenizer), tiny.preference_data(), tokenizer, beta=0.1, **options,
        )  # fmt: skip
        found.append(loss_and_gradients(trainer))
    (loss, gradient), (expected, expected_gradient) = found
    assert loss == pytest.approx(expected, rel=1e-5)
    assert difference(gradient, expected_gradient) < 1e-4


def test_large_log_ratios_do_not_overflow():
    r = tensor([300.0, 1e4, -1e4], requires_grad=True)
    rewards = chipo_rewards(r, 0.05)
    (slope,) = torch.autograd.grad(rewards.sum(), r)
    torch.testing.assert_close(rewards.detach(), tensor([math.exp(20) + 15, math.exp(20) + 500, -500.0]))
    torch.testing.assert_close(slope, tensor([0.05] * 3))


def test_bounds_of_the_exponent():
    """The rewards of very unlikely and of very likely answers, without the logarithm."""
    found = chipo_rewards(tensor([-1e4, -87.5, 19.5, 1e4], dtype=torch.float64), 1.0, gamma=0.0)
    expected = tensor([math.exp(x) for x in (-88.0, -87.5, 19.5, 20.0)], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chipo_r_max": 0.0}, "`chipo_r_max=0.0` is out of range"),
        ({"chipo_gamma": 0.0}, r"`chipo_gamma=0.0` is out of range: it must lie in \(0, 1\]"),
        ({"chipo_gamma": 1.5}, "`chipo_gamma=1.5` is out of range"),
        ({"f_divergence_type": "alpha_divergence"}, "`f_divergence_type='alpha_divergence'` has no effect"),
        ({"loss_type": ["sigmoid", "sft"]}, r"`loss_type=\['sigmoid', 'sft'\]` has no effect"),
    ],
)
def test_wrong_options(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        ChiPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)
