"""Losses that see more than two log-ratios of a pair: finite differences, and values at the ends of their range."""

import pytest
import torch

from trl_ift.preference.exo import exo_loss, list_log_probs
from trl_ift.preference.figa import figa_sums
from trl_ift.preference.fpo import feature_distance, fpo_loss
from trl_ift.preference.relative_po import diagonal_po_loss, relative_po_loss, relative_weights
from trl_ift.preference.self_supervised_po import degree_loss
from trl_ift.preference.tis_dpo import tis_dpo_loss
from trl_ift.reward.eurus import eurus_reward_losses


MASK = torch.tensor([[True, True, True], [True, True, False]])
GOOD, BAD = torch.tensor([[1, 0, 1], [0, 1, 0]]), torch.tensor([[0, 1, 0], [1, 0, 0]])
EMBEDDINGS = torch.tensor([[1.0, 0.2], [0.3, 1.0]])


def tis_dpo(a, b):
    return tis_dpo_loss(a, b, 0.1)


def relative_po(a, b):
    return relative_po_loss(a, b, 0.1, relative_weights(EMBEDDINGS, EMBEDDINGS, 0.5).to(a.dtype))


def diagonal_po(a, b):
    return diagonal_po_loss(a, b, 0.1, 0.8)


def figa(a, b):
    # Three tokens a response; the cut is away from the values
    tokens = [torch.stack([x, 0.5 * x, 0.25 * x], 1) for x in (a, b)]
    return torch.stack(figa_sums(*tokens, GOOD, BAD, MASK, other_weight=0.3, nll_cut=5e4)[:1]).sum()[None]


def fpo(a, b):
    features = [torch.stack([x, 0.5 * x], 1) for x in (a, b)]
    distances = [feature_distance(part, torch.zeros_like(part), 2) for part in features]
    return fpo_loss(a, b, *distances, 0.1, 1e-5, False)


def exo(a, b, kind="exo-rw"):
    scores = torch.stack([a, b, 0.5 * (a + b)], 1)
    log_p = list_log_probs(torch.tensor([[1.0, 0.0, 0.5], [2.0, -1.0, 0.0]], dtype=a.dtype), MASK)
    return exo_loss(list_log_probs(0.5 * scores, MASK), log_p, MASK, kind)


def exo_forward(a, b):
    return exo(a, b, "dpo-rw")


def eurus(a, b):
    relative, absolute = eurus_reward_losses(a, b)
    return relative + absolute


def degree(a, b):
    return degree_loss(torch.stack([a, b, -a], 1), torch.tensor([1, 2]))


LOSSES = [tis_dpo, relative_po, diagonal_po, figa, fpo, exo, exo_forward, eurus, degree]


@pytest.mark.parametrize("loss", LOSSES)
def test_finite_differences(loss):
    a, b = (torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in ([0.7, -2.1], [-1.3, 0.4]))
    torch.autograd.gradcheck(lambda *x: loss(*x).sum(), (a, b))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "values", [(-1e-12, -1e4), (-1e4, -1e-12), (-1e-12, -1e-12), (-1e4, -1e4), (1e4, -1e4), (0, 0)]
)
def test_extremes(loss, values):
    a, b = (torch.full((2,), float(value), requires_grad=True) for value in values)
    found = loss(a, b)
    found.sum().backward()
    for tensor in (found, a.grad, b.grad):
        assert torch.isfinite(tensor).all()
