"""Ada-DPO: the numbers and identities of its loss, its solvers, and TRL's DPO where nothing adapts."""

import math
from functools import partial
from itertools import pairwise

import pytest
import tiny
import torch
from pairs import difference, logs, loss_and_gradients, make
from torch import tensor
from torch.nn.functional import logsigmoid
from trl import DPOConfig, DPOTrainer

from trl_ift import AdaDPOConfig, AdaDPOTrainer
from trl_ift.preference.ada_dpo import (
    critical_ratio,
    exact_scales,
    newton_scales,
    scale_penalty,
    scaled_dpo_loss,
)


OPTIONS = (0.1, 0.1, 4.0)  # rho_0, tau_0, tau_max
LOG_2 = math.log(2)


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


def rewards(*values):
    return tensor(values, dtype=torch.float64)


GRID = torch.linspace(-9, 9, 1801, dtype=torch.float64)


def loss_of(h, options=OPTIONS, penalty="linear", scales=exact_scales):
    tau = scales(h.detach(), *options, penalty)
    return scaled_dpo_loss(h, tau) + scale_penalty(tau, options[0], penalty)


def slope_of(h, *args):
    h = h.clone().requires_grad_()
    return torch.autograd.grad(loss_of(h, *args).sum(), h)[0]


def bisection(h, rho0, tau_min, tau_max, penalty="linear"):
    """Scales from the derivative of the objective by tau, as autograd computes it."""
    low, high = torch.full_like(h, tau_min), torch.full_like(h, tau_max)
    for _ in range(100):
        tau = ((low + high) / 2).requires_grad_()
        objective = -tau * logsigmoid(h / tau) + rho0 * (tau if penalty == "linear" else tau**2) - LOG_2 * tau
        (first,) = torch.autograd.grad(objective.sum(), tau)
        tau = tau.detach()
        low, high = torch.where(first > 0, low, tau), torch.where(first > 0, tau, high)
    return high


class TestScales:
    @pytest.mark.parametrize(
        ("rho0", "expected"), [(0.05, 0.6489845566), (0.1, 0.9434431176), (0.3, 1.8696171701), (0.5, 2.9832412476)]
    )
    def test_critical_ratio(self, rho0, expected):
        assert critical_ratio(rho0) == pytest.approx(expected, abs=1e-10)
        p = 1 / (1 + math.exp(-critical_ratio(rho0)))
        assert -p * math.log(p) - (1 - p) * math.log(1 - p) == pytest.approx(LOG_2 - rho0, abs=1e-12)

    def test_numbers(self):
        h = rewards(-3, -0.5, 0.02, 0.1, 1, 2, 5)
        expected = [3.1798419471, 0.5299736579, 0.1, 0.1059947316, 1.0599473157, 2.1198946314, 4.0]
        close(exact_scales(h, *OPTIONS), expected)
        quadratic = exact_scales(rewards(0.1, 0.5, 2, 5), 0.1, 0.1, 4.0, "quadratic")
        close(quadratic, [0.1819302560, 0.5190340367, 1.2305862742, 2.0591369048])

    @pytest.mark.parametrize("rho0", [0.01, 0.1, 0.5, 0.69])
    def test_closed_form_is_bisection(self, rho0):
        close(exact_scales(GRID, rho0, 0.1, 4.0), bisection(GRID, rho0, 0.1, 4.0))

    @pytest.mark.parametrize("rho0", [0.02, 0.1, 3.0])
    def test_quadratic_solves_its_equation(self, rho0):
        h = GRID[GRID.abs() > 1e-3]
        close(exact_scales(h, rho0, 0.1, math.nan, "quadratic"), bisection(h, rho0, 0.1, 50.0, "quadratic"), 1e-8)

    @pytest.mark.parametrize("penalty", ["linear", "quadratic"])
    def test_newton(self, penalty):
        exact = exact_scales(GRID, *OPTIONS, penalty)
        many = partial(newton_scales, rho0=0.1, tau_min=0.1, tau_max=4.0, penalty=penalty, iterations=20)
        close(many(GRID), exact, 1e-10)

    def test_a_newton_step_at_a_margin_of_0(self):
        """Without curvature it leads to the bound."""
        found = newton_scales(torch.zeros(1, dtype=torch.float64), *OPTIONS, tau_init=2.0, iterations=1)
        close(found, torch.full((1,), 0.1, dtype=torch.float64), 0)

    def test_five_newton_steps(self):
        gap = (newton_scales(GRID, *OPTIONS) - exact_scales(GRID, *OPTIONS)).abs()
        near = GRID.abs() <= 5
        assert 3e-4 < gap[near].max() < 7e-4
        assert GRID[gap.argmax()].abs().item() == pytest.approx(0.57, abs=0.05)
        assert gap[~near].max() < 1e-12

    @pytest.mark.parametrize("penalty", ["linear", "quadratic"])
    def test_even_and_rising(self, penalty):
        scales = exact_scales(GRID, *OPTIONS, penalty)
        close(scales.flip(0), scales)
        half = scales[GRID >= 0]
        assert (half.diff() >= -1e-12).all()
        assert half[0] == pytest.approx(0.1)
        assert half[-1] > 10 * half[0]

    def test_ends_of_rho(self):
        h = rewards(0.3, -2, 5)
        assert exact_scales(h, 1e-12, 0.1, 4.0).tolist() == [4.0] * 3
        assert exact_scales(h, 1e-30, 0.1, 4.0).tolist() == [4.0] * 3
        assert (exact_scales(h, LOG_2 - 1e-15, 0.1, 4.0) < 0.2).all()
        sizes = [exact_scales(rewards(1.0), rho0, 1e-6, 1e6).item() for rho0 in (0.01, 0.1, 0.3, 0.6)]
        assert all(larger > smaller for larger, smaller in pairwise(sizes))


class TestLoss:
    def test_numbers(self):
        r_w, r_l = rewards(12.0).requires_grad_(), rewards(-38.0)
        h = 0.01 * (r_w - r_l)
        tau = exact_scales(h.detach(), *OPTIONS)
        close(scaled_dpo_loss(h, tau).detach(), [0.1742496940])
        loss = loss_of(h)
        close(loss.detach(), [-0.1401026869])
        close(torch.autograd.grad(loss.sum(), r_w)[0], [-0.0028020537])

    @pytest.mark.parametrize("c", [1.0, 2.5])
    def test_one_scale_is_dpo(self, c):
        """- c log sigma(h / c), and a constant."""
        h = GRID.clone()
        close(loss_of(h, (0.1, c, c)) - (0.1 - LOG_2) * c, -c * logsigmoid(h / c))
        close(slope_of(h, (0.1, c, c)), -torch.sigmoid(-h / c))

    @pytest.mark.parametrize("penalty", ["linear", "quadratic"])
    def test_is_the_minimum(self, penalty):
        h = GRID[::10]
        best = loss_of(h, OPTIONS, penalty)
        for tau in torch.linspace(0.1, 4, 200):
            other = scaled_dpo_loss(h, tau.double()) + scale_penalty(tau.double(), 0.1, penalty)
            assert (other >= best - 1e-12).all()

    @pytest.mark.parametrize("penalty", ["linear", "quadratic"])
    def test_falls_and_is_continuous(self, penalty):
        """The slope by autograd is that of finite differences: the scale is a constant at the minimum."""
        slope = slope_of(GRID, OPTIONS, penalty)
        assert (slope < 0).all()
        loss = loss_of(GRID, OPTIONS, penalty)
        step = loss.diff() / GRID.diff()
        assert (step <= 0).all()
        assert (loss.diff().abs() < 0.011).all()
        upper, lower = torch.maximum(slope[1:], slope[:-1]), torch.minimum(slope[1:], slope[:-1])
        assert ((step <= upper + 1e-6) & (step >= lower - 1e-6)).all()

    def test_band_of_constant_slope(self):
        z = critical_ratio(0.1)
        inside = (GRID.abs() > 0.1 * z) & (GRID.abs() < 4 * z)
        close(slope_of(GRID)[inside & (GRID > 0)], tensor(-1 / (1 + math.exp(z))).expand(int(inside.sum()) // 2), 1e-7)
        close(
            slope_of(GRID)[inside & (GRID < 0)], tensor(-1 / (1 + math.exp(-z))).expand(int(inside.sum()) // 2), 1e-7
        )
        assert 1 / (1 + math.exp(z)) == pytest.approx(0.280, abs=5e-4)

    @pytest.mark.parametrize("p", [0.55, 0.6, 0.8, 0.95])
    def test_expected_loss(self, p):
        """The best margin of a pair whose answers are preferred with probability p: clear pairs get the largest scale."""
        h = torch.linspace(0, 15, 150001, dtype=torch.float64)
        expected = p * loss_of(h) + (1 - p) * loss_of(-h)
        entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
        tau = 4.0 if entropy < LOG_2 - 0.1 else 0.1
        assert h[expected.argmin()].item() == pytest.approx(tau * math.log(p / (1 - p)), abs=2e-4)

    def test_both_ends_of_the_expected_loss_are_met(self):
        entropies = [-p * math.log(p) - (1 - p) * math.log(1 - p) for p in (0.55, 0.6, 0.8, 0.95)]
        assert [entropy < LOG_2 - 0.1 for entropy in entropies] == [False, False, True, True]

    def test_badly_ranked_pairs_keep_their_gradient(self):
        close(slope_of(rewards(-1e3), (0.1, 0.1, 4.0)), [-1.0])


# ---------------------------------------------------------------- the trainer


def trainer_of(cls, config, tmp_path, tokenizer, **settings):
    reference = tiny.model("llama", tokenizer, seed=1)
    return make(
        partial(cls, ref_model=reference), config, tmp_path, tiny.model("llama", tokenizer), tiny.preference_data(), tokenizer,
        **settings,
    )  # fmt: skip


def test_one_scale_is_trls_loss(tmp_path, tokenizer):
    ours = trainer_of(AdaDPOTrainer, AdaDPOConfig, tmp_path, tokenizer, beta=0.1, tau_min=1.0, tau_max=1.0)
    theirs = trainer_of(DPOTrainer, DPOConfig, tmp_path, tokenizer, beta=0.1)
    loss, found = loss_and_gradients(ours)
    expected, gradient = loss_and_gradients(theirs)
    assert loss - (0.1 - LOG_2) == pytest.approx(expected, rel=1e-5)
    assert difference(found, gradient) < 1e-4


@pytest.mark.parametrize("penalty", ["linear", "quadratic"])
def test_newton_in_the_trainer(tmp_path, tokenizer, penalty):
    exact = trainer_of(AdaDPOTrainer, AdaDPOConfig, tmp_path, tokenizer, beta=0.3, tau_penalty=penalty)
    newton = trainer_of(
        AdaDPOTrainer,
        AdaDPOConfig,
        tmp_path,
        tokenizer,
        beta=0.3,
        tau_penalty=penalty,
        tau_solver="newton",
        tau_iters=20,
    )
    (loss, found), (expected, gradient) = loss_and_gradients(newton), loss_and_gradients(exact)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert difference(found, gradient) < 1e-4


@pytest.mark.parametrize("penalty", ["linear", "quadratic"])
def test_scales_are_constants_for_the_gradient(tmp_path, tokenizer, penalty):
    """One Newton step from far away: there the loss still depends on the scale."""
    settings = {"tau_penalty": penalty, "tau_solver": "newton", "tau_iters": 1, "tau_init": 3.0}
    trainer = trainer_of(AdaDPOTrainer, AdaDPOConfig, tmp_path, tokenizer, beta=0.3, tau_min=0.01, **settings)
    _, found = loss_and_gradients(trainer)
    of_pair = trainer._scales
    trainer._scales = lambda h: of_pair(h.detach())
    _, expected = loss_and_gradients(trainer)
    assert difference(found, expected) < 1e-6


@pytest.mark.parametrize("penalty", ["linear", "quadratic"])
def test_metrics(tmp_path, tokenizer, penalty):
    settings = {"beta": 0.1, "max_steps": 1, "tau_min": 0.2, "tau_penalty": penalty}
    settings |= {"tau_max": 0.9} if penalty == "linear" else {}
    trainer = trainer_of(AdaDPOTrainer, AdaDPOConfig, tmp_path, tokenizer, **settings)
    inputs = next(iter(trainer.get_train_dataloader()))
    sums = []
    for model in (trainer.model, trainer.ref_model):
        with torch.no_grad():
            output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        tokens = output.logits[:, :-1].log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
        sums.append((tokens * inputs["completion_mask"][:, 1:]).sum(1))
    chosen, rejected = (sums[0] - sums[1]).double().chunk(2)
    h = 0.1 * (chosen - rejected)
    tau = bisection(h, 0.1, 0.2, 0.9 if penalty == "linear" else 50.0, penalty)
    trainer.train()
    (entry,) = logs(trainer)
    assert entry["ada_dpo/tau"] == pytest.approx(tau.mean().item(), rel=1e-4)
    assert entry["ada_dpo/dpo_loss"] == pytest.approx((-tau * logsigmoid(h / tau)).mean().item(), rel=1e-4)
    added = 0.1 * (tau if penalty == "linear" else tau**2) - LOG_2 * tau
    assert entry["loss"] - entry["ada_dpo/dpo_loss"] == pytest.approx(added.mean().item(), abs=2e-4)
    assert entry["ada_dpo/share_at_min"] == (tau < 0.2001).double().mean().item()
    if penalty == "linear":
        assert entry["ada_dpo/share_at_max"] == (tau > 0.8999).double().mean().item()
        assert 0 < entry["ada_dpo/share_at_min"] + entry["ada_dpo/share_at_max"] < 1
    else:
        assert "ada_dpo/share_at_max" not in entry


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho0": 0.0}, r"`rho0=0.0` is out of range: it must lie in \(0, inf\)"),
        ({"rho0": LOG_2}, r"`rho0=0.6931.*` leaves every scale at `tau_min=0.1`"),
        ({"rho0": 0.7}, r"`rho0=0.7` leaves every scale at `tau_min=0.1`: .* in \(0, log 2 = 0.6931\)"),
        ({"tau_min": 0.0}, "`tau_min=0.0` is out of range"),
        ({"tau_min": 2.0, "tau_max": 1.0}, r"`tau_max=1.0` is out of range: it must lie in \[2, inf\)"),
        ({"tau_solver": "bisection"}, "`tau_solver='bisection'` is not known. Choose one of: 'exact', 'newton'"),
        ({"tau_penalty": "cubic"}, "`tau_penalty='cubic'` is not known"),
        ({"tau_iters": 3}, "`tau_iters=3` has no effect with `tau_solver='exact'`"),
        ({"tau_init": 2.0}, "`tau_init=2.0` has no effect with `tau_solver='exact'`"),
        ({"tau_solver": "newton", "tau_iters": 0}, "`tau_iters=0` is out of range"),
        ({"tau_solver": "newton", "tau_init": 0.0}, "`tau_init=0.0` is out of range"),
        ({"tau_penalty": "quadratic", "tau_max": 5.0}, "`tau_max=5.0` has no effect with `tau_penalty='quadratic'`"),
        ({"f_divergence_type": "js_divergence"}, "`f_divergence_type='js_divergence'` has no effect"),
    ],
)
def test_wrong_options(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        AdaDPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_quadratic_takes_any_penalty(tmp_path):
    assert AdaDPOConfig(str(tmp_path), use_cpu=True, bf16=False, rho0=2.0, tau_penalty="quadratic").rho0 == 2.0
