"""DPOP: the numbers and identities of its loss, and the symptom it cures."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import tensor

from trl_ift import DPOPConfig
from trl_ift.preference.dpop import dpop_loss


R_W = tensor([-1.0, 2.5], dtype=torch.float64)
R_L = tensor([-1.5, -1.0], dtype=torch.float64)


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("dpop_lambda", "variant", "expected"),
    [
        (0, "inside", [0.6209570478, 0.3000584796]),
        (0, "outside", [0.6209570478, 0.3000584796]),
        (5, "inside", [1.5805085714, 0.3000584796]),
        (50, "inside", [14.8500003554, 0.3000584796]),
        (5, "outside", [5.6209570478, 0.3000584796]),
    ],
)
def test_numbers(dpop_lambda, variant, expected):
    close(dpop_loss(R_W, R_L, 0.3, dpop_lambda, variant), expected)


def gradients_of(r_w, r_l, *options):
    r_w, r_l = r_w.clone().requires_grad_(), r_l.clone().requires_grad_()
    return torch.autograd.grad(dpop_loss(r_w, r_l, *options).sum(), (r_w, r_l))


def test_gradients():
    on_chosen, on_rejected = gradients_of(R_W, R_L, 0.3, 5)
    close(on_chosen, [-1.4294333308, -0.0777675302])
    close(on_rejected, [0.2382388885, 0.0777675302])
    s = torch.sigmoid(-0.3 * (R_W - R_L))
    on_chosen, on_rejected = gradients_of(R_W, R_L, 0.3, 5, "outside")
    close(on_chosen, -0.3 * s - 5 * (R_W < 0))
    close(on_rejected, 0.3 * s)


@pytest.mark.parametrize("variant", ["inside", "outside"])
class TestIdentities:
    def test_no_penalty_above_the_reference(self, variant):
        r_w = R_W.abs()
        close(dpop_loss(r_w, R_L, 0.3, 50, variant), -F.logsigmoid(0.3 * (r_w - R_L)))

    def test_at_the_start(self, variant):
        """Loss log 2 and DPO's gradient, whatever lambda."""
        zero = torch.zeros(2, dtype=torch.float64)
        close(dpop_loss(zero, zero, 0.3, 50, variant), [math.log(2)] * 2)
        on_chosen, on_rejected = gradients_of(zero, zero, 0.3, 50, variant)
        close(on_chosen, [-0.15] * 2)
        close(on_rejected, [0.15] * 2)

    def test_grows_with_lambda(self, variant):
        generator = torch.Generator().manual_seed(0)
        r_w, r_l = 3 * torch.randn(2, 100, dtype=torch.float64, generator=generator)
        losses = [dpop_loss(r_w, r_l, 0.3, strength, variant) for strength in (0, 1, 5, 50)]
        for smaller, larger in pairwise(losses):
            assert (larger >= smaller).all()
            assert (larger[r_w < 0] > smaller[r_w < 0]).all()
            close(larger[r_w >= 0], smaller[r_w >= 0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dpop_lambda": -1.0}, r"`dpop_lambda=-1.0` is out of range: it must lie in \[0, inf\)"),
        ({"dpop_variant": "both"}, "`dpop_variant='both'` is not known. Choose one of: 'inside', 'outside'"),
        ({"loss_type": "ipo"}, "`loss_type='ipo'` has no effect on this method's loss"),
        ({"f_divergence_type": "js_divergence"}, "`f_divergence_type='js_divergence'` has no effect"),
    ],
)
def test_wrong_options(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        DPOPConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


# ---------------------------------------------------------------- near-duplicate pairs


def run_on_near_duplicates(dpop_lambda, variant):
    """Mean log-ratio of the chosen answers, share of them that fell, and accuracy, after training a small model on pairs
    that differ in one token of 16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(0, 64, (32, 20), generator=generator)  # 4 tokens of prompt
    rejected = chosen.clone()
    place = torch.randint(4, 12, (32, 1), generator=generator)
    rejected.scatter_(1, place, (chosen.gather(1, place) + torch.randint(1, 64, (32, 1), generator=generator)) % 64)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    both = torch.cat([chosen, rejected])

    def logps():
        tokens = model(input_ids=both).logits[:, 3:-1].log_softmax(-1).gather(-1, both[:, 4:, None])[..., 0]
        return tokens.sum(1)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(60):  # on both answers alike
        optimizer.zero_grad()
        (-logps().mean() / 16).backward()
        optimizer.step()
    with torch.no_grad():
        start = logps()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    for _ in range(60):
        optimizer.zero_grad()
        r_w, r_l = (logps() - start).chunk(2)
        dpop_loss(r_w, r_l, 0.3, dpop_lambda, variant).mean().backward()
        optimizer.step()
    with torch.no_grad():
        r_w, r_l = (logps() - start).chunk(2)
    return r_w.mean().item(), (r_w < 0).float().mean().item(), (r_w > r_l).float().mean().item()


def test_keeps_chosen_answers_that_dpo_loses():
    lost, falling, accuracy = run_on_near_duplicates(0, "inside")
    assert lost < -1
    assert falling > 0.9
    assert accuracy > 0.95
    for options in ((50, "inside"), (5, "outside")):
        kept, falling, accuracy = run_on_near_duplicates(*options)
        assert kept > -0.5
        assert falling < 0.2
        assert accuracy > 0.9
