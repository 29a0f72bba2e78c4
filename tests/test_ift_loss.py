"""The loss of IFT as functions on tensors: the worked example, identities, gradients, limits."""

import math

import pytest
import torch

from trl_ift.supervised.ift import (
    GRADS,
    NORMS,
    _mix_seeds,
    discounted_future_sum,
    fuse_embeddings,
    ift_document_loss,
    lambda_at_step,
    loss_coefficients,
)


# The worked example: vocabulary 3, a causal-mean model, five tokens of which four are predicted
EMBEDDINGS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
HEAD = torch.tensor([[1.0, -1.0], [0.5, 1.0], [-1.0, 0.5]], dtype=torch.float64)
TOKENS = torch.tensor([0, 1, 2, 1, 0])


def toy_logits(embeddings: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(1, embeddings.size(0) + 1, dtype=embeddings.dtype)
    return (embeddings.cumsum(0) / positions[:, None]) @ HEAD.T


def toy_nll(embeddings: torch.Tensor) -> torch.Tensor:
    return -toy_logits(embeddings)[:-1].log_softmax(-1).gather(-1, TOKENS[1:, None]).squeeze(-1)


def toy_example(ift_lambda: float, expected: bool = False) -> torch.Tensor:
    """Second-pass losses of the worked example."""
    true = EMBEDDINGS[TOKENS]
    logits = toy_logits(true)[:-1]
    predicted = logits.softmax(-1) @ EMBEDDINGS if expected else EMBEDDINGS[logits.argmax(-1)]
    return toy_nll(torch.cat([true[:1], fuse_embeddings(true[1:], predicted, ift_lambda)]))


def one_document(nll, *options, **named) -> float:
    nll = torch.as_tensor(nll, dtype=torch.float64).reshape(1, -1)
    return ift_document_loss(nll, *_whole(nll), *options, **named).loss[0]


def _whole(nll):
    return torch.ones_like(nll, dtype=torch.bool), torch.zeros_like(nll, dtype=torch.long), 1


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=0,
        atol=tolerance,
    )


class TestWorkedExample:
    def test_first_pass(self):
        logits = toy_logits(EMBEDDINGS[TOKENS])
        close(logits[0], [1, 0.5, -1])
        close(logits[1], [0, 0.75, -0.25])
        close(logits[2], [0, 1, -0.3333333333])
        close(logits[3], [-0.25, 1, -0.125])
        assert [0, *logits[:-1].argmax(-1).tolist()] == [0, 0, 1, 1, 1]
        nll = toy_nll(EMBEDDINGS[TOKENS])
        close(nll, [1.0549569196, 1.6098992550, 0.4894854816, 1.7269527184])
        close(nll.mean(), 1.2203235937)

    def test_second_pass(self):
        true = EMBEDDINGS[TOKENS]
        predicted = EMBEDDINGS[torch.tensor([0, 0, 1, 1, 1])]
        fused = fuse_embeddings(true, predicted, 0.2)
        close(fused, [[1, 0], [0.2, 0.8], [0.8, 1], [0, 1], [0.8, 0.2]])
        logits = toy_logits(fused)
        close(logits[1], [0.2, 0.7, -0.4])
        close(logits[2], [0.0666666667, 0.9333333333, -0.3666666667])
        close(logits[3], [-0.2, 0.95, -0.15])
        nll = toy_example(0.2)
        close(nll, [1.0549569196, 1.7623795458, 0.5264325068, 1.6504769726])
        close(one_document(nll, 0.0), 1.2485614862)

    def test_propagation(self):
        nll = toy_example(0.2)[None]
        mask, documents, _ = _whole(nll)
        close(
            discounted_future_sum(nll / 4, documents, 0.95)[0],
            [1.1548501300, 0.9380114738, 0.5235964077, 0.4126192431],
        )
        result = ift_document_loss(nll, mask, documents, 1, 0.95)
        close(result.weights[0], [1.5250190509, 1.2386761973, 0.6914269445, 0.5448778073])
        close(result.loss[0], 1.2637862220)

    @pytest.mark.parametrize(
        ("grad", "coefficients"),
        [
            ("full", [0.3640193735, 0.3344460244, 0.1355385642, 0.1326820852]),
            ("numerator", [0.4683239286, 0.5378399069, 0.4330673077, 0.5196389467]),
            ("none", [0.3812547627, 0.3096690493, 0.1728567361, 0.1362194518]),
        ],
    )
    def test_coefficients(self, grad, coefficients):
        nll = toy_example(0.2)[None]
        close(loss_coefficients(nll, *_whole(nll), 0.95, "loss", "L1", "left", grad)[0], coefficients)

    def test_variants(self):
        close(one_document(toy_example(0.2), 1.0), 1.2601995060)
        close(one_document(toy_example(0.2), 1e-12), 1.4456879510)
        close(one_document(toy_example(0.0), 0.95), 1.2193584918)
        close(one_document(toy_example(1.0), 0.95), 1.5435524393)
        # (log-sum-exp by hand: 1.0549569196, 2.5549569196, 0.7070178044, 1.3598992550)
        close(one_document(toy_example(1.0), 0.0), 1.4192077247)
        close(one_document(toy_example(0.2), 0.95, "mask"), 1.2213528501)
        expected = toy_example(0.2, expected=True)
        close(expected, [1.0549569196, 1.7060223966, 0.5191136936, 1.6288590358])
        close(one_document(expected, 0.95), 1.2411235150)

    def test_unnormalised_algorithm(self):
        nll = toy_example(0.2)
        future = discounted_future_sum(nll[None], torch.zeros(1, 4, dtype=torch.long), 0.95)[0]
        close((nll * future).sum(), 15.3124243984)

    def test_equation_21(self):
        # Linear: token i counts sum over n <= i of gamma^(i-n) = (1 - gamma^(i+1)) / (1 - gamma) times
        nll, documents = toy_example(0.2)[None], torch.zeros(1, 4, dtype=torch.long)
        total = discounted_future_sum(nll, documents, 0.95).sum()
        close(total / discounted_future_sum(torch.ones_like(nll), documents, 0.95).sum(), 1.2737417331)

    def test_easy_last_tokens_get_negative_coefficients_under_full(self):
        nll = torch.tensor([[2, 2, 0.01, 0.01]], dtype=torch.float64)
        full = loss_coefficients(nll, *_whole(nll), 0.95, "loss", "L1", "left", "full")[0]
        close(full, [0.6583451222, 0.3415760282, -0.3256038130, -0.6426809604])
        numerator = loss_coefficients(nll, *_whole(nll), 0.95, "loss", "L1", "left", "numerator")[0]
        assert (numerator > 0).all()

    def test_minimum_over_a_free_last_token_is_half_the_rest(self):
        last = torch.linspace(0.01, 3, 3000, dtype=torch.float64)
        rows = torch.cat([torch.full((3000, 40), 2.0, dtype=torch.float64), last[:, None]], 1)
        documents = torch.arange(3000)[:, None].expand_as(rows)
        losses = ift_document_loss(rows, torch.ones_like(rows, dtype=torch.bool), documents, 3000, 0.95).loss
        assert last[losses.argmin()].item() == pytest.approx(1.0, abs=0.05)


def slow_loss(nll, mask, documents, num_documents, gamma, propagation="loss", norm="L1", side="left"):
    """The definition, token by token, in plain Python floats."""
    losses = []
    floor = math.inf
    sums = {}
    for d in range(num_documents):
        where = [(b, t) for b, t in zip(*torch.where(documents == d), strict=True)]
        trained = {i for i, (b, t) in enumerate(where) if mask[b, t]}
        values = [float(nll[b, t]) if i in trained else 0.0 for i, (b, t) in enumerate(where)]
        count = len(trained)
        items = [(v / count if propagation == "loss" else 1.0) if i in trained else 0.0 for i, v in enumerate(values)]
        if side == "left":
            reach = [sum(gamma ** (i - t) * items[i] for i in range(t, len(items))) for t in range(len(items))]
        else:
            reach = [sum(gamma ** (t - i) * items[i] for i in range(t + 1)) for t in range(len(items))]
            floor = min([floor, *[reach[i] for i in trained if reach[i] > 0]])
        sums[d] = (sorted(trained), values, reach)
    for d in range(num_documents):
        trained, values, reach = sums[d]
        if not trained:
            losses.append(0.0)
            continue
        if side == "right":
            reach = [r + floor for r in reach]
        transform = {
            ("L1", "left"): lambda c: c,
            ("L2", "left"): lambda c: c * c,
            ("log", "left"): math.log1p,
            ("softmax", "left"): math.exp,
            ("L1", "right"): lambda u: 1 / u,
            ("L2", "right"): lambda u: 1 / u**2,
            ("log", "right"): lambda u: 1 / math.log1p(u),
            ("softmax", "right"): lambda u: math.exp(1 / u),
        }[norm, side]
        weights = {i: transform(reach[i]) for i in trained}
        losses.append(sum(weights[i] * values[i] for i in trained) / sum(weights.values()))
    return torch.tensor(losses, dtype=torch.float64)


def random_batch(seed=0):
    """Three padded rows with gaps in their masks, one row of two packed documents, one untrained row."""
    generator = torch.Generator().manual_seed(seed)
    nll = torch.rand(5, 17, generator=generator, dtype=torch.float64) * 3 + 0.01
    mask = torch.rand(5, 17, generator=generator) > 0.3
    mask[1, 12:] = False
    mask[4] = False
    documents = torch.arange(5)[:, None].repeat(1, 17)
    documents[3, 9:] = 5
    return nll, mask, documents, 6


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("propagation", ["loss", "mask"])
@pytest.mark.parametrize("gamma", [0.5, 0.95, 1.0])
def test_equals_the_definition(gamma, propagation, norm, side):
    nll, mask, documents, number = random_batch()
    documents[4, 9:] = number  # of one token, with the smallest loss
    nll[4, 12], mask[4, 12] = 0.005, True
    batch = nll, mask, documents, number + 1
    expected = slow_loss(*batch, gamma, propagation, norm, side)
    for grad in GRADS:
        close(ift_document_loss(*batch, gamma, propagation, norm, side, grad).loss, expected, 1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("norm", NORMS)
def test_full_gradient_equals_finite_differences(norm, side):
    nll, mask, documents, number = random_batch(1)
    found = loss_coefficients(nll, mask, documents, number, 0.95, "loss", norm, side, "full")
    assert (found[~mask] == 0).all()
    step = 1e-6
    for b, t in [(0, 1), (1, 4), (2, 0), (3, 8), (3, 12)]:
        if not mask[b, t]:
            continue
        shifted = []
        for sign in (1, -1):
            moved = nll.clone()
            moved[b, t] += sign * step
            shifted.append(ift_document_loss(moved, mask, documents, number, 0.95, "loss", norm, side).loss.sum())
        close(found[b, t], (shifted[0] - shifted[1]) / (2 * step), 1e-6)


def test_coefficient_formulas():
    nll, mask, documents, number = random_batch(2)
    zeroed = torch.where(mask, nll, 0.0)
    future = discounted_future_sum(zeroed, documents, 0.95)
    past = discounted_future_sum(zeroed.flip(-1), documents.flip(-1), 0.95).flip(-1)
    count = discounted_future_sum(mask.double().flip(-1), documents.flip(-1), 0.95).flip(-1)
    loss = ift_document_loss(nll, mask, documents, number, 0.95).loss
    total = torch.zeros(number, dtype=torch.float64).index_add(0, documents.flatten(), (future * mask).flatten())
    total = total.clamp(min=1e-30)[documents]
    expected = {
        "full": (future + past - loss[documents] * count) / total,
        "numerator": (future + past) / total,
        "none": future / total,
    }
    for grad, value in expected.items():
        found = loss_coefficients(nll, mask, documents, number, 0.95, "loss", "L1", "left", grad)
        close(found, torch.where(mask, value, 0.0))
        # sum of coefficient times loss: L for full and none, 2 L for numerator
        sums = torch.zeros(number, dtype=torch.float64).index_add(0, documents.flatten(), (found * zeroed).flatten())
        close(sums, loss * (2 if grad == "numerator" else 1))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("side", "grad"), [("left", "numerator"), ("left", "full"), ("left", "none"), ("right", "full"), ("right", "none")]
)
def test_a_step_lowers_the_loss(norm, side, grad):
    """Scaling all losses down lowers the loss: sum of coefficient times loss > 0 in every document, in all accepted modes."""
    for seed in range(5):
        nll, mask, documents, number = random_batch(seed)
        found = loss_coefficients(nll, mask, documents, number, 0.95, "loss", norm, side, grad)
        sums = torch.zeros(number, dtype=torch.float64).index_add(0, documents.flatten(), (found * nll).flatten())
        assert (sums[ift_document_loss(nll, mask, documents, number).num_tokens > 0] > 0).all()
        if side == "left" and grad != "full":
            assert (found[mask] > 0).all()
    expected = (
        {"L1": 2, "L2": 3}.get(norm) if (side, grad) == ("left", "numerator") else 1 if norm in ("L1", "L2") else None
    )
    if expected is not None:
        loss = ift_document_loss(nll, mask, documents, number, 0.95, "loss", norm, side).loss
        # Over the batch: on the right, the smallest sum of one document enters the weights of all
        close(sums.sum(), expected * loss.sum())


class TestIdentities:
    def test_gamma_0_is_the_mean(self):
        nll, mask, documents, number = random_batch()
        loss, counts, weights = ift_document_loss(nll, mask, documents, number, 0.0)
        assert (weights == mask).all()
        close(loss[0], nll[0][mask[0]].mean())
        assert loss[4] == 0
        assert counts[4] == 0

    def test_gamma_to_0_is_not_gamma_0(self):
        nll = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
        close(one_document(nll, 1e-13), (nll**2).sum() / nll.sum())
        close(one_document(nll, 0.0), nll.mean())

    def test_gamma_1_closed_form(self):
        nll = torch.tensor([0.3, 2.0, 1.1, 0.7, 5.0], dtype=torch.float64)
        ranks = torch.arange(1, 6, dtype=torch.float64)
        close(one_document(nll, 1.0), (nll.sum() ** 2 + (nll**2).sum()) / 2 / (ranks * nll).sum())

    def test_one_token_equal_tokens_homogeneity_and_bounds(self):
        close(one_document([1.7], 0.95), 1.7)
        close(one_document([0.9] * 6, 0.95), 0.9)
        nll = torch.tensor([0.3, 2.0, 1.1, 0.7, 5.0], dtype=torch.float64)
        value = one_document(nll, 0.95)
        close(one_document(3 * nll, 0.95), 3 * value)
        assert nll.min() <= value <= nll.max()

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("norm", NORMS)
    def test_mean_weight_is_one(self, norm, side):
        nll, mask, documents, number = random_batch()
        result = ift_document_loss(nll, mask, documents, number, 0.95, "loss", norm, side)
        sums = torch.zeros(number, dtype=torch.float64).index_add(0, documents.flatten(), result.weights.flatten())
        close(sums, result.num_tokens, 1e-12)
        assert (result.weights[~mask] == 0).all()

    @pytest.mark.parametrize("norm", ["L1", "L2"])
    def test_dividing_the_items_by_their_number_changes_nothing(self, norm):
        # The released code's kinds "loss" (nll / N) and "logps" (nll): the weights are scale-free under L1 and L2
        nll, mask, documents, number = random_batch()
        scale = torch.tensor([2.0, 3.0, 5.0, 7.0, 1.0, 4.0], dtype=torch.float64)[documents]
        first = ift_document_loss(nll, mask, documents, number, 0.95, norm=norm).weights
        close(ift_document_loss(nll * scale, mask, documents, number, 0.95, norm=norm).weights, first, 1e-12)

    def test_the_defaults(self):
        batch = random_batch()
        close(ift_document_loss(*batch).loss, ift_document_loss(*batch, 0.95, "loss", "L1", "left").loss, 0)

    def test_propagation_none_is_gamma_0(self):
        batch = random_batch()
        close(ift_document_loss(*batch, 0.95, "none").loss, ift_document_loss(*batch, 0.0).loss, 0)

    def test_padding_and_packing(self):
        nll, mask, documents, number = random_batch()
        loss = ift_document_loss(nll, mask, documents, number, 0.95).loss
        padded = torch.nn.functional.pad(nll, (0, 9), value=7.0), torch.nn.functional.pad(mask, (0, 9))
        close(ift_document_loss(*padded, torch.arange(5)[:, None].expand(5, 26), 5, 0.95).loss[:3], loss[:3], 1e-12)
        flat = ift_document_loss(nll.reshape(1, -1), mask.reshape(1, -1), documents.reshape(1, -1), number, 0.95).loss
        close(flat, loss, 1e-12)
        alone = ift_document_loss(nll[1:2], mask[1:2], torch.zeros(1, 17, dtype=torch.long), 1, 0.95).loss
        close(alone[0], loss[1], 1e-12)

    def test_exponent_counts_untrained_positions(self):
        nll = torch.tensor([[1.0, 9.0, 9.0, 2.0]], dtype=torch.float64)
        mask = torch.tensor([[True, False, False, True]])
        result = ift_document_loss(nll, mask, torch.zeros(1, 4, dtype=torch.long), 1, 0.5)
        first, last = 1.0 + 0.5**3 * 2.0, 2.0
        close(result.loss[0], (first * 1.0 + last * 2.0) / (first + last))


class TestExtremes:
    @pytest.mark.parametrize("grad", GRADS)
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("value", [0.0, 1e-12, 1e4])
    def test_extreme_losses_stay_finite(self, grad, norm, side, value):
        nll = torch.full((2, 6), value, dtype=torch.float32)
        nll[1, 3:] = 0.0
        documents = torch.arange(2)[:, None].expand(2, 6)
        mask = torch.ones(2, 6, dtype=torch.bool)
        result = ift_document_loss(nll, mask, documents, 2, 0.95, "loss", norm, side, grad)
        assert torch.isfinite(result.loss).all()
        close(result.loss[0], value, 1e-3 * max(value, 1e-9))
        assert torch.isfinite(loss_coefficients(nll, mask, documents, 2, 0.95, "loss", norm, side, grad)).all()

    @pytest.mark.parametrize("norm", ["L1", "L2"])
    def test_the_scale_of_losses_is_that_of_the_trained_tokens(self, norm):
        nll = torch.tensor([[3e-30, 7.0, 1e-30, 2e-30]])
        mask = torch.tensor([[True, False, True, True]])
        weights = [
            ift_document_loss(x, mask, torch.zeros(1, 4, dtype=torch.long), 1, norm=norm).weights
            for x in (nll, nll * 1e30)
        ]
        assert weights[1].unique().numel() == 4
        torch.testing.assert_close(*weights)

    def test_a_free_last_token_weighs_nothing(self):
        close(one_document([2.0, 0.0], 0.95), 2.0)  # weights 2 and 0

    def test_coefficients_leave_the_losses_as_they_are(self):
        nll = torch.rand(2, 3)
        loss_coefficients(nll, torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.long), 1)
        assert not nll.requires_grad

    def test_untrained_batch_is_a_differentiable_zero(self):
        nll = torch.ones(2, 3, requires_grad=True)
        mask = torch.zeros(2, 3, dtype=torch.bool)
        for side in ("left", "right"):
            loss = ift_document_loss(nll, mask, torch.zeros(2, 3, dtype=torch.long), 1, 0.95, side=side).loss.sum()
            loss.backward()
            assert loss == 0
            assert (nll.grad == 0).all()

    def test_rows_without_positions(self):
        empty = torch.zeros(3, 0)
        for side in ("left", "right"):
            result = ift_document_loss(empty, empty.bool(), empty.long(), 3, side=side)
            assert (result.loss == 0).all()

    def test_doubling_is_exact_at_length_2049(self):
        values = torch.rand(1, 2049, generator=torch.Generator().manual_seed(0))
        documents = (torch.arange(2049) >= 700).long()[None]
        found = discounted_future_sum(values, documents, 0.95)[0]
        exact = torch.zeros(2049, dtype=torch.float64)
        for t in range(2048, -1, -1):
            ahead = exact[t + 1] if t < 2048 and documents[0, t] == documents[0, t + 1] else 0.0
            exact[t] = values[0, t].double() + 0.95 * ahead
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 3, 7)])
    def test_any_leading_dimensions(self, shape):
        found = discounted_future_sum(torch.ones(shape), torch.zeros(shape, dtype=torch.long), 1.0)
        assert torch.equal(found, torch.arange(7.0, 0.0, -1.0).expand(shape))


class TestLambda:
    def test_constant_and_linear(self):
        assert lambda_at_step(7, 0.2) == 0.2
        values = [lambda_at_step(step, 0.5, "linear", 0.1, 4) for step in range(6)]
        assert values == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5])
        assert lambda_at_step(75, 0.5, "linear") == pytest.approx(0.25)  # from 0, in 150 steps

    def test_noise_is_a_function_of_seed_and_step(self):
        draw = [lambda_at_step(step, 0.2, noise_std=0.5, seed=3) for step in range(2000)]
        assert draw == [lambda_at_step(step, 0.2, noise_std=0.5, seed=3) for step in range(2000)]
        assert draw != [lambda_at_step(step, 0.2, noise_std=0.5, seed=4) for step in range(2000)]
        assert all(0 <= value <= 1 for value in draw)
        # 0.2 + 0.1 z, of which the clamp at 0 cuts 2.3 %
        assert sum(draw) / len(draw) == pytest.approx(0.2, abs=0.01)
        assert torch.tensor(draw).std().item() == pytest.approx(0.1, abs=0.01)
        assert draw[:2] != [lambda_at_step(step, 0.2, noise_std=0.5) for step in range(2)]
        assert lambda_at_step(7, 0.2, noise_std=0.5) == lambda_at_step(7, 0.2, noise_std=0.5, seed=0)

    def test_noise_leaves_lambda_between_0_and_1(self):
        draw = [lambda_at_step(step, 0.5, noise_std=10.0) for step in range(200)]
        assert min(draw) == 0
        assert max(draw) == 1

    def test_seeds_stay_those_of_earlier_releases(self):
        assert [_mix_seeds(0, 0), _mix_seeds(1, 2), _mix_seeds(42, 7, 3)] == [
            1876011003808476466,
            8240147227655269473,
            2658020928085787537,
        ]
        assert all(0 <= _mix_seeds(number, number) < 2**63 for number in range(64))

    def test_fusing_equal_embeddings_is_bitwise_the_same(self):
        embeddings = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
        for ift_lambda in (0.0, 0.2, 0.7, 1.0):
            assert torch.equal(fuse_embeddings(embeddings, embeddings, ift_lambda), embeddings)
