"""Regularized PO: the numbers and identities of its loss, and its three normalisations in the trainer."""

import math
from functools import partial

import pytest
import tiny
import torch
from pairs import difference, double, gradients, logs, loss_and_gradients, make, step_gradients, token_logps
from torch import tensor
from torch.nn.functional import logsigmoid
from trl import DPOConfig, DPOTrainer

from trl_ift import RegularizedPOConfig, RegularizedPOTrainer
from trl_ift.preference.regularized_po import NORMALIZATIONS, dpo_loss, imitation_loss


LOGP_W = tensor([-20.0, -15.0], dtype=torch.float64)
LOGP_L = tensor([-24.0, -14.0], dtype=torch.float64)
REF_W = tensor([-22.0, -14.5], dtype=torch.float64)
REF_L = tensor([-23.0, -15.25], dtype=torch.float64)
LENGTHS = tensor([10, 5])


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


def loss_of(logp_w, logp_l, eta, normalization="sum", beta=0.1, lengths=LENGTHS):
    """Loss of a batch, a scalar."""
    imitation = imitation_loss(logp_w, lengths, beta, eta, normalization)
    dpo = dpo_loss((logp_w - REF_W) - (logp_l - REF_L), beta)
    return dpo.mean() + imitation.sum() / (lengths.sum() if normalization == "token_mean" else len(lengths))


def gradients_of(*args, **options):
    logp_w, logp_l = LOGP_W.clone().requires_grad_(), LOGP_L.clone().requires_grad_()
    return torch.autograd.grad(loss_of(logp_w, logp_l, *args, **options), (logp_w, logp_l))


class TestOnTensors:
    def test_numbers(self):
        margins = (LOGP_W - REF_W) - (LOGP_L - REF_L)
        close(dpo_loss(margins, 0.1) + imitation_loss(LOGP_W, LENGTHS, 0.1, 0.005), [0.5643552445, 0.7919704307])
        close(dpo_loss(margins, 0.1).mean(), 0.6694128376)
        close(loss_of(LOGP_W, LOGP_L, 0.005), 0.6781628376)
        close(loss_of(LOGP_W, LOGP_L, 0.2, "seq_mean"), 1.1694128376)
        close(loss_of(LOGP_W, LOGP_L, 0.2, "token_mean"), 1.1360795042)

    @pytest.mark.parametrize("normalization", NORMALIZATIONS)
    def test_eta_0_is_dpo(self, normalization):
        close(loss_of(LOGP_W, LOGP_L, 0.0, normalization), 0.6694128376)

    @pytest.mark.parametrize(
        ("normalization", "direction"), [("sum", [1, 1]), ("seq_mean", [1 / 10, 1 / 5]), ("token_mean", [1, 1])]
    )
    def test_large_eta_is_sft(self, normalization, direction):
        """The gradient has the direction of the log-likelihood of the chosen responses."""
        on_chosen, on_rejected = gradients_of(1e9, normalization)
        close(on_chosen / on_chosen[0], [value / direction[0] for value in direction], 1e-7)
        assert on_chosen[0] < 0
        assert (on_rejected / on_chosen[0]).abs().max() < 1e-7

    def test_gradients_of_the_sum(self):
        on_chosen, on_rejected = gradients_of(0.005, beta=0.3)
        push = torch.sigmoid(-0.3 * ((LOGP_W - REF_W) - (LOGP_L - REF_L)))
        close(2 * on_chosen, -0.3 * (push + 0.005))
        close(2 * on_rejected, 0.3 * push)

    def test_pushes_chosen_of_solved_pairs(self):
        solved = tensor([200.0], dtype=torch.float64, requires_grad=True)
        loss = dpo_loss(solved, 0.5) + imitation_loss(solved, LENGTHS[:1], 0.5, 0.005)
        close(torch.autograd.grad(loss.sum(), solved)[0], [-0.5 * 0.005])

    def test_at_the_start(self):
        close(loss_of(REF_W, REF_L, 0.005), math.log(2) - 0.005 * 0.1 * REF_W.mean().item())

    def test_equal_lengths(self):
        """The two means are one, and the sum with eta beta T in the place of eta."""
        lengths = tensor([7, 7])
        mean = loss_of(LOGP_W, LOGP_L, 0.005 * 0.1 * 7, "seq_mean", lengths=lengths)
        close(loss_of(LOGP_W, LOGP_L, 0.005 * 0.1 * 7, "token_mean", lengths=lengths), mean)
        close(loss_of(LOGP_W, LOGP_L, 0.005, lengths=lengths), mean)


# ---------------------------------------------------------------- the trainer


def trainer_of(tmp_path, tokenizer, cls=RegularizedPOTrainer, config=RegularizedPOConfig, data=None, **settings):
    reference = tiny.model("llama", tokenizer, seed=1)
    return make(
        partial(cls, ref_model=reference), config, tmp_path, tiny.model("llama", tokenizer),
        data or tiny.preference_data().select(range(4)), tokenizer, overwrite_output_dir=True, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("weighted", [False, True])
def test_token_mean(tmp_path, tokenizer, weighted):
    """Loss and gradients from one unpadded sequence at a time in float64."""
    data, weights = tiny.preference_data().select(range(4)), [1.0, 0.0, 3.0, 0.5]
    data = data.add_column("weight", weights) if weighted else data
    trainer = trainer_of(tmp_path, tokenizer, data=data, rpo_normalization="token_mean", rpo_eta=0.7)
    loss, found = loss_and_gradients(trainer)
    twin, reference = double(trainer.model), double(trainer.ref_model)
    pair, nll, tokens = 0.0, 0.0, 0
    for row, weight in zip(data, weights if weighted else [1.0] * 4, strict=True):
        w, l = (token_logps(twin, tokenizer, row["prompt"], row[kind]) for kind in ("chosen", "rejected"))  # noqa: E741
        with torch.no_grad():
            ref_w, ref_l = (
                token_logps(reference, tokenizer, row["prompt"], row[kind]).sum() for kind in ("chosen", "rejected")
            )
        pair = pair - weight * logsigmoid(0.1 * (w.sum() - ref_w - l.sum() + ref_l)) / 4
        nll, tokens = nll - weight * w.sum(), tokens + len(w)
    expected = pair + 0.7 * nll / tokens
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert difference(found, gradients(twin)) < 2e-5


def test_token_mean_is_trls_sft(tmp_path, tokenizer):
    ours = trainer_of(tmp_path, tokenizer, rpo_normalization="token_mean", rpo_eta=0.3)
    (loss, found) = loss_and_gradients(ours)
    reference, model = tiny.model("llama", tokenizer, seed=1), tiny.model("llama", tokenizer)
    theirs = make(
        partial(DPOTrainer, ref_model=reference), DPOConfig, tmp_path, model, tiny.preference_data().select(range(4)),
        tokenizer, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.3],
    )  # fmt: skip
    (expected, gradient) = loss_and_gradients(theirs)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert difference(found, gradient) < 1e-4


def test_token_mean_does_not_depend_on_accumulation(tmp_path, tokenizer):
    """TRL's loss does: each of its micro-batches has a mean of its own."""
    trl = {"cls": DPOTrainer, "config": DPOConfig, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}
    steps = {}
    for name, options in (("ours", {"rpo_normalization": "token_mean", "rpo_eta": 0.3}), ("trl", trl)):
        for size in (4, 1):
            settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_steps": 1}
            given = dict(options)
            cls, config = given.pop("cls", RegularizedPOTrainer), given.pop("config", RegularizedPOConfig)
            reference = tiny.model("llama", tokenizer, seed=1)
            trainer = make(
                partial(cls, ref_model=reference), config, tmp_path, tiny.model("llama", tokenizer),
                tiny.preference_data().select(range(4)), tokenizer, output_dir=str(tmp_path / f"{name}{size}"),
                **settings, **given,
            )  # fmt: skip
            steps[name, size] = step_gradients(trainer)[1][0]
    assert difference(steps["ours", 1], steps["ours", 4]) < 1e-5
    assert difference(steps["ours", 4], steps["trl", 4]) < 1e-4
    assert difference(steps["trl", 1], steps["trl", 4]) > 1e-2


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_parts_are_logged(tmp_path, tokenizer, normalization):
    trainer = trainer_of(
        tmp_path,
        tokenizer,
        rpo_normalization=normalization,
        max_steps=1,
        eval_dataset=tiny.preference_data().select(range(4)),
    )
    nats, tokens = 0.0, 0
    for row in tiny.preference_data().select(range(4)):
        with torch.no_grad():
            values = token_logps(trainer.model, tokenizer, row["prompt"], row["chosen"])
        nats, tokens = nats - values.sum().item(), tokens + len(values)
    start = trainer.evaluate()
    parts = [start[f"eval_regularized_po/{part}"] for part in ("dpo_loss", "sft_loss")]
    assert sum(parts) == pytest.approx(start["eval_loss"], rel=1e-4)
    trainer.train()
    (entry,) = logs(trainer)
    assert entry["nll_loss"] == pytest.approx(nats / tokens, rel=1e-4)
    assert entry["regularized_po/dpo_loss"] + entry["regularized_po/sft_loss"] == pytest.approx(
        entry["loss"], abs=2e-4
    )
    factor = {"sum": 0.005 * 0.1 * nats / 4, "token_mean": 0.2 * nats / tokens}.get(normalization)
    if factor is not None:
        assert entry["regularized_po/sft_loss"] == pytest.approx(factor, rel=1e-4)


# ---------------------------------------------------------------- options


def config_of(tmp_path, **settings):
    return RegularizedPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_default_eta(tmp_path):
    for normalization, eta in (("sum", 0.005), ("seq_mean", 0.2), ("token_mean", 0.2)):
        config = config_of(tmp_path, rpo_normalization=normalization)
        assert config.rpo_eta == eta
        again = {name: config.to_dict()[name] for name in ("rpo_eta", "rpo_normalization")}
        assert config_of(tmp_path, **again).rpo_eta == eta
    assert config_of(tmp_path, rpo_eta=0.1).rpo_eta == 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rpo_eta": -0.1}, r"`rpo_eta=-0.1` is out of range: it must lie in \[0, inf\)"),
        ({"rpo_eta": float("nan")}, "`rpo_eta=nan` is out of range"),
        ({"rpo_normalization": "mean"}, "`rpo_normalization='mean'` is not known. Choose one of: 'sum', 'seq_mean'"),
        ({"rpo_eta": 0.0, "rpo_normalization": "seq_mean"}, "has no effect with `rpo_eta=0`"),
        ({"loss_type": ["sigmoid", "sft"]}, r"`loss_type=\['sigmoid', 'sft'\]` has no effect"),
        ({"loss_weights": [2.0]}, "`loss_weights="),
    ],
)
def test_wrong_options(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path, **settings)
