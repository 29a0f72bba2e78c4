"""MinorDPO: the numbers and identities of its loss."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import tensor

from trl_ift import MinorDPOConfig
from trl_ift.preference.minor_dpo import minor_dpo_loss


# Log-probs of policy and reference: chosen (-20, -15), (-22, -14.5); rejected (-24, -14), (-23, -15.25)
R_W = tensor([2.0, -0.5], dtype=torch.float64)
R_L = tensor([-1.0, 1.25], dtype=torch.float64)


def dpo(r_w, r_l, beta):
    return -F.logsigmoid(beta * (r_w - r_l))


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


def gradients_of(loss, r_w, r_l, beta=0.1):
    r_w, r_l = r_w.clone().requires_grad_(), r_l.clone().requires_grad_()
    return torch.autograd.grad(loss(r_w, r_l, beta).sum(), (r_w, r_l))


def test_numbers():
    close(minor_dpo_loss(R_W, R_L, 0.1), [0.5981388694, 0.7844704307])
    close(minor_dpo_loss(R_W, R_L, 0.1).mean(), 0.6913046500)
    close(dpo(R_W, R_L, 0.1), [0.5543552445, 0.7844704307])
    close(dpo(R_W, R_L, 0.1).mean(), 0.6694128376)


def test_above_the_reference_it_is_dpo():
    r_l = R_L.abs()
    close(minor_dpo_loss(R_W, r_l, 0.1), dpo(R_W, r_l, 0.1))
    for found, expected in zip(gradients_of(minor_dpo_loss, R_W, r_l), gradients_of(dpo, R_W, r_l), strict=True):
        close(found, expected)


def test_below_the_reference_the_rejected_answer_is_left_alone():
    r_l = -R_L.abs()
    close(minor_dpo_loss(R_W, r_l, 0.1), -F.logsigmoid(0.1 * R_W))
    assert (gradients_of(minor_dpo_loss, R_W, r_l)[1] == 0).all()


def test_at_the_start():
    """Loss log 2, a gradient on the chosen answer, and none on the rejected one."""
    zero = torch.zeros(1, dtype=torch.float64)
    close(minor_dpo_loss(zero, zero, 0.1), [math.log(2)])
    on_chosen, on_rejected = gradients_of(minor_dpo_loss, zero, zero)
    close(on_chosen, [-0.05])
    assert on_rejected.item() == 0


def test_is_at_least_dpo():
    generator = torch.Generator().manual_seed(0)
    r_w, r_l = 3 * torch.randn(2, 200, dtype=torch.float64, generator=generator)
    excess = minor_dpo_loss(r_w, r_l, 0.1) - dpo(r_w, r_l, 0.1)
    assert (excess[r_l < 0] > 0).all()
    close(excess[r_l >= 0], torch.zeros_like(excess[r_l >= 0]))


def test_moves_with_either_log_prob():
    """Raising the chosen answer, or lowering a rejected one above the reference, moves the margin by beta times as much."""
    r_l = R_L.abs() + 1

    def margin(r_w, r_l):
        loss = minor_dpo_loss(r_w, r_l, 0.1)
        return -torch.log(torch.expm1(loss))  # inverse of -log sigma

    close(margin(R_W + 0.7, r_l) - margin(R_W, r_l), [0.07] * 2)
    close(margin(R_W, r_l - 0.7) - margin(R_W, r_l), [0.07] * 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "`beta=0.0` is out of range"),
        ({"loss_type": "hinge"}, "`loss_type='hinge'` has no effect on this method's loss"),
        ({"f_divergence_type": "forward_kl"}, "`f_divergence_type='forward_kl'` has no effect"),
        ({"label_smoothing": 0.1}, "`label_smoothing=0.1` has no effect"),
    ],
)
def test_wrong_options(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        MinorDPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)
