"""The contract of the pairwise losses: one row a method, its loss written down once more and independently.

`FORMULAS` maps a method to (the loss of one pair, options of its config, extra columns of its data). A formula sees two
`Answer`s, with log-probabilities in float64, the options and the row.
"""
# ruff: noqa: E741  (w and l, the winning and the losing answer, as in the papers)

import math
from dataclasses import dataclass

import pytest
import tiny
import torch
from datasets import Dataset
from pairs import difference, double, gradients, loss_and_gradients, make, step_gradients, token_logps
from torch.nn.functional import logsigmoid

from trl_ift import get_method
from trl_ift.preference.trainer import PairLossConfig, PreferenceBatch, Responses
from trl_ift.registry import METHODS


@dataclass
class Answer:
    """A response: log-probabilities of its tokens under policy and reference, each (T,)."""

    tokens: torch.Tensor
    ref_tokens: torch.Tensor

    @property
    def logp(self):
        return self.tokens.sum()

    @property
    def ref(self):
        return self.ref_tokens.sum()

    @property
    def r(self):
        return self.logp - self.ref

    @property
    def mean(self):
        return self.tokens.mean()


def positive(x):
    return (x + x.abs()) / 2


def dpop(w, l, o, row):
    if o.dpop_variant == "inside":
        return -logsigmoid(o.beta * (w.r - l.r) - o.beta * o.dpop_lambda * positive(-w.r))
    return -logsigmoid(o.beta * (w.r - l.r)) + o.dpop_lambda * positive(-w.r)


def minor_dpo(w, l, o, row):
    return -logsigmoid(o.beta * (w.r - positive(l.r)))


def chipo(w, l, o, row):
    d = o.beta * (w.r.exp() - l.r.exp()) + o.chipo_gamma * o.beta * (w.r - l.r)
    bound = 2 * o.chipo_r_max if o.chipo_r_max else torch.inf
    return -logsigmoid(d if d.abs() < bound else d.sign() * bound)


def regularized_po(w, l, o, row):
    imitation = o.beta * w.logp if o.rpo_normalization == "sum" else w.mean
    return -logsigmoid(o.beta * (w.r - l.r)) - o.rpo_eta * imitation


def soft_label_po(w, l, o, row):
    p, h = row["soft_label"], w.r - l.r
    if o.soft_label_loss == "cdpo":
        return -p * logsigmoid(o.beta * h) - (1 - p) * logsigmoid(-o.beta * h)
    if o.soft_label_loss == "cipo":
        return (w.r / len(w.tokens) - l.r / len(l.tokens) - (2 * p - 1) / (2 * o.beta)) ** 2
    if o.soft_label_loss == "gipo":
        return ((2 * p - 1) * (w.r / len(w.tokens) - l.r / len(l.tokens)) - 1 / (2 * o.beta)) ** 2
    geometric = p * w.r + (1 - p) * l.r - (1 - p) * w.r - p * l.r
    if o.soft_label_loss == "gropo":
        bounded = 1 / (1 + (o.beta * geometric).exp())
        return o.ropo_alpha * bounded - o.ropo_gamma * logsigmoid(o.beta * geometric)
    return -logsigmoid(o.beta * geometric)


SOFT_LABELS = {"soft_label": [0.9, 0.25, 1.0, 0.6]}


def ada_dpo(w, l, o, row):
    """At the scale where the derivative of the objective is 0, within the bounds."""
    h = o.beta * (w.r - l.r)
    power = {"linear": 1, "quadratic": 2}[o.tau_penalty]
    low, high = o.tau_min, o.tau_max if power == 1 else 1e3
    for _ in range(200):
        tau = (low + high) / 2
        z = h.detach() / tau
        p = z.abs().sigmoid()
        entropy = -p * logsigmoid(z.abs()) - (1 - p) * logsigmoid(-z.abs())
        rises = entropy + power * o.rho0 * tau ** (power - 1) > math.log(2)
        low, high = (low, tau) if rises else (tau, high)
    return -tau * logsigmoid(h / tau) + o.rho0 * tau**power - math.log(2) * tau


def aligned_sft(w, l, o, row):
    p_w, p_l = w.mean.exp(), l.mean.exp()
    odds_w, odds_l = (p_w / (1 - p_w)).log(), (p_l / (1 - p_l)).log()
    aligned = -logsigmoid(o.beta * odds_w) - logsigmoid(-o.beta * odds_l)
    return -o.sft_weight * w.mean + o.asft_lambda * aligned


def mrpo(w, l, o, row):
    w_refs, l_refs = [w.ref, row["ref1_chosen_logps"]], [l.ref, row["ref1_rejected_logps"]]
    w_refs, l_refs = (
        torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in refs]) for refs in (w_refs, l_refs)
    )
    margins = (w_refs - l_refs).abs()
    alpha = {
        "arwc": margins / margins.sum(),
        "fixed": torch.tensor(o.ref_weights or [0.5, 0.5], dtype=torch.float64),
        "official_code": torch.stack([margins[1], margins[0] + 1e-6]) / (margins.sum() + 1e-6),
    }[o.weight_mode]
    if o.ctro_eps is not None:
        share = w_refs.mean() / (w_refs.mean() + l_refs.mean()) if o.ctro_adaptive else 0.5
        for refs, part in ((w_refs, share), (l_refs, 1 - share)):
            eps = o.ctro_eps * part * (1 if o.ctro_adaptive else 2)
            refs[1] = refs[1].clamp((1 + eps) * refs[0], (1 - eps) * refs[0])
    if o.mrpo_mode == "multi_dpo":
        return sum(
            -a * logsigmoid(o.beta * (w.logp - x - l.logp + y)) for a, x, y in zip(alpha, w_refs, l_refs, strict=True)
        )
    if o.mrpo_mixture == "geometric":
        mixed = [(alpha * refs).sum() for refs in (w_refs, l_refs)]
    else:  # from the smallest exponent, so that no other overflows
        mixed = [refs.min() - (alpha * (refs.min() - refs).exp()).sum().log() for refs in (w_refs, l_refs)]
    return -logsigmoid(o.beta * (w.logp - mixed[0] - l.logp + mixed[1]))


# Log-probs of a second reference, near that of the tests
SECOND = {
    "ref1_chosen_logps": [-60.0, -12.0, -75.0, -9.0, -3.0, -7.0],
    "ref1_rejected_logps": [-11.0, -70.0, -13.0, -33.0, -8.0, -2.0],
}


def exo(w, l, o, row):
    d = o.beta * (w.r - l.r)
    first, second = row.get("rewards", (1.0, 0.0))
    p = torch.sigmoid(torch.tensor((first - second) / o.exo_beta_r, dtype=torch.float64))
    p = 1 - o.exo_epsilon if o.exo_loss == "exo-pref" else p
    targets = torch.tensor([p, 1 - p], dtype=torch.float64)
    log_q = torch.stack([logsigmoid(d), logsigmoid(-d)])
    if o.exo_loss == "dpo-rw":
        return -(targets * log_q).sum()
    return (log_q.exp() * (log_q - targets.log())).sum()


FORMULAS = {
    "dpop": (dpop, {"dpop_lambda": 0.7}, {}),
    "dpop outside": (dpop, {"dpop_lambda": 0.3, "dpop_variant": "outside"}, {}),
    "minor-dpo": (minor_dpo, {}, {}),
    "chipo": (chipo, {}, {}),
    "chipo clipped": (chipo, {"beta": 0.1, "chipo_r_max": 0.2, "chipo_gamma": 0.5}, {}),
    "regularized-po": (regularized_po, {"rpo_eta": 0.3}, {}),
    "regularized-po seq_mean": (regularized_po, {"rpo_normalization": "seq_mean"}, {}),
    "soft-label-po": (soft_label_po, {}, SOFT_LABELS),
    "soft-label-po gipo": (soft_label_po, {"soft_label_loss": "gipo", "beta": 0.4}, SOFT_LABELS),
    "soft-label-po gropo": (soft_label_po, {"soft_label_loss": "gropo", "ropo_gamma": 0.3}, SOFT_LABELS),
    "soft-label-po cdpo": (soft_label_po, {"soft_label_loss": "cdpo"}, SOFT_LABELS),
    "soft-label-po cipo": (soft_label_po, {"soft_label_loss": "cipo", "beta": 0.4}, SOFT_LABELS),
    "ada-dpo": (ada_dpo, {"beta": 0.1}, {}),
    "ada-dpo quadratic": (ada_dpo, {"beta": 0.1, "tau_penalty": "quadratic"}, {}),
    "aligned-sft": (aligned_sft, {"asft_lambda": 0.7}, {}),
    "aligned-sft tempered": (aligned_sft, {"beta": 0.3, "sft_weight": 0.5}, {}),
    "mrpo": (mrpo, {}, SECOND),
    "mrpo unclipped": (mrpo, {"ctro_eps": None, "mrpo_mixture": "geometric"}, SECOND),
    "mrpo official": (mrpo, {"ctro_adaptive": False, "ctro_eps": 0.3, "weight_mode": "official_code"}, SECOND),
    "mrpo multi": (mrpo, {"mrpo_mode": "multi_dpo", "weight_mode": "fixed", "ref_weights": [0.3, 0.7]}, SECOND),
    "exo": (exo, {}, {"rewards": [[1.5, 0.2], [0.3, 0.8], [2.0, -1.0], [0.1, 0.0]]}),
    "exo pairs": (exo, {"exo_beta_r": 0.3}, {}),
    "exo preferences": (exo, {"exo_loss": "exo-pref", "exo_epsilon": 0.01}, {}),
    "exo forward": (exo, {"exo_loss": "dpo-rw"}, {"rewards": [[1.5, 0.2], [0.3, 0.8], [2.0, -1.0], [0.1, 0.0]]}),
}
every_formula = pytest.mark.parametrize("name", FORMULAS)


def test_every_method_has_a_formula():
    own = {m.name for m in METHODS if issubclass(m.config_class, PairLossConfig)}
    # The loss of relative-po is of a whole batch: see its own tests
    assert own - {"davir-dpo", "tis-dpo", "relative-po", "fpo", "figa"} == {name.split()[0] for name in FORMULAS}


def rows_of(name, number=4):
    columns = FORMULAS[name][2]
    rows = tiny.preference_data().to_list()[:number]
    return [row | {column: values[i] for column, values in columns.items()} for i, row in enumerate(rows)]


def reference_of(tokenizer):
    """A model that is not the policy, but near it: log-ratios of a few nats, of both signs."""
    reference = tiny.model("llama", tokenizer)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return reference


def trainer_of(name, tmp_path, tokenizer, rows=None, **settings):
    method = get_method(name.split()[0])
    reference = {"ref_model": settings.pop("ref_model")} if "ref_model" in settings else {}

    def cls(**arguments):
        return method.trainer_class(**arguments, **reference)

    data = Dataset.from_list(rows_of(name) if rows is None else rows)
    options = FORMULAS[name][1] | settings
    return make(cls, method.config_class, tmp_path, tiny.model("llama", tokenizer), data, tokenizer, **options)


def expected_loss(name, policy, reference, tokenizer, rows, options):
    """Mean of the formula over rows, by one unpadded sequence at a time in float64."""
    losses = []
    for row in rows:
        answers = []
        for kind in ("chosen", "rejected"):
            with torch.no_grad():
                ref_tokens = token_logps(reference, tokenizer, row["prompt"], row[kind])
            answers.append(Answer(token_logps(policy, tokenizer, row["prompt"], row[kind]), ref_tokens))
        losses.append(FORMULAS[name][0](*answers, options, row))
    return torch.stack(losses).mean()


def needs_reference(name):
    return get_method(name.split()[0]).trainer_class.uses_reference


@every_formula
def test_loss_and_gradients_of_the_trainer(name, tmp_path, tokenizer):
    reference = reference_of(tokenizer)
    given = {"ref_model": reference} if needs_reference(name) else {}
    trainer = trainer_of(name, tmp_path, tokenizer, **given)
    loss, found = loss_and_gradients(trainer)
    twin = double(trainer.model)
    expected = expected_loss(name, twin, double(reference), tokenizer, rows_of(name), trainer.args)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert difference(found, gradients(twin)) < 2e-5


@every_formula
def test_stored_reference(name, tmp_path, tokenizer):
    """Log-probs of the reference that are computed before training give the loss of a live one."""
    if not needs_reference(name):
        pytest.skip("has no reference")
    live = trainer_of(name, tmp_path, tokenizer, ref_model=reference_of(tokenizer))
    stored = trainer_of(name, tmp_path, tokenizer, ref_model=reference_of(tokenizer), precompute_ref_log_probs=True)
    (loss, found), (value, expected) = loss_and_gradients(stored), loss_and_gradients(live)
    assert loss == pytest.approx(value, rel=1e-5)
    assert difference(found, expected) < 1e-4


@every_formula
def test_accumulation(name, tmp_path, tokenizer):
    """A step of 4 pairs is the same as a whole and in parts."""
    steps = []
    for size in (4, 1):
        given = {"ref_model": reference_of(tokenizer)} if needs_reference(name) else {}
        trainer = trainer_of(
            name, tmp_path, tokenizer, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size,
            max_steps=1, overwrite_output_dir=True, **given,
        )  # fmt: skip
        steps.append(step_gradients(trainer))
    (whole,), (gradient,) = steps[0]
    (parts,), (summed,) = steps[1]
    assert parts == pytest.approx(whole, abs=2e-4)  # logged with four digits
    assert difference(summed, gradient) < 1e-5


# ---------------------------------------------------------------- the loss on tensors


def batch_of(chosen, rejected, ref_chosen, ref_rejected, columns):
    """A batch from log-probabilities of tokens, each (B, T), float64."""

    def responses(tokens, ref_tokens):
        mask = torch.ones_like(tokens, dtype=torch.bool)
        return Responses(
            logps=tokens.sum(1), token_logps=tokens, mask=mask, lengths=mask.sum(1), entropy=torch.zeros_like(tokens),
            is_top1=mask, pair=torch.arange(len(tokens)), ref_logps=ref_tokens.sum(1), ref_token_logps=ref_tokens,
        )  # fmt: skip

    return PreferenceBatch(responses(chosen, ref_chosen), responses(rejected, ref_rejected), {}, columns)


def value_of(trainer, name, *tokens):
    """Loss of each pair, (B,), from log-probabilities of tokens of chosen and rejected, policy and reference, each (B, T)."""
    number = len(tokens[0])
    columns = {
        key: torch.tensor((values * number)[:number], dtype=torch.float64) for key, values in FORMULAS[name][2].items()
    }
    batch = batch_of(*tokens, columns)
    loss = trainer.pair_loss(batch)
    for term in trainer.branch_terms(batch):  # of one pair or equal lengths: a mean over pairs
        count = {"row": number, "token": sum(getattr(batch, term.branch).lengths)}[term.per]
        loss = loss + term.weight * term.total / count
    return loss


@pytest.fixture(params=FORMULAS)
def named_trainer(request, tmp_path, tokenizer):
    return request.param, trainer_of(request.param, tmp_path, tokenizer)


def random_tokens(number=6, length=4):
    generator = torch.Generator().manual_seed(0)
    return [-4 * torch.rand(number, length, dtype=torch.float64, generator=generator) for _ in range(4)]


class TestOnTensors:
    def test_values_and_gradients(self, named_trainer):
        """Against the formula, and against finite differences."""
        name, trainer = named_trainer
        tokens = random_tokens()
        chosen, rejected = (part.requires_grad_() for part in tokens[:2])
        rows = [{key: values[i % len(values)] for key, values in FORMULAS[name][2].items()} for i in range(6)]
        for i in range(6):
            part = [value[i : i + 1] for value in tokens]
            answers = Answer(part[0][0], part[2][0]), Answer(part[1][0], part[3][0])
            expected = FORMULAS[name][0](*answers, trainer.args, rows[i])
            columns = {key: torch.tensor([value], dtype=torch.float64) for key, value in rows[i].items()}
            batch = batch_of(*part, columns)
            found = trainer.pair_loss(batch).sum()
            for term in trainer.branch_terms(batch):
                count = {"row": 1, "token": part[0].size(1)}[term.per]
                found = found + term.weight * term.total / count
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        torch.autograd.gradcheck(
            lambda c, r: value_of(trainer, name, c, r, *tokens[2:]).sum(), (chosen, rejected), eps=1e-7, atol=1e-5
        )

    @pytest.mark.parametrize("length", [1, 3])
    @pytest.mark.parametrize("references", [(-1e-12, -1e4), (-1e4, -1e-12), (-3.0, -3.0)])
    @pytest.mark.parametrize("values", [(-1e-12, -1e4), (-1e4, -1e-12), (-1e-12, -1e-12), (-1e4, -1e4)])
    def test_extremes(self, named_trainer, values, references, length):
        name, trainer = named_trainer
        tokens = [torch.full((1, length), value, dtype=torch.float32) for value in (*values, *references)]
        for part in tokens[:2]:
            part.requires_grad_()
        loss = value_of(trainer, name, *tokens)
        loss.sum().backward()
        for tensor in (loss, tokens[0].grad, tokens[1].grad):
            assert torch.isfinite(tensor).all()

    def test_equal_answers(self, named_trainer):
        """Nothing breaks where chosen, rejected and reference are one."""
        name, trainer = named_trainer
        tokens = [random_tokens()[0].clone() for _ in range(4)]
        chosen, rejected = (part.requires_grad_() for part in tokens[:2])
        loss = value_of(trainer, name, *tokens)
        loss.sum().backward()
        assert torch.isfinite(loss).all()
        assert torch.isfinite(chosen.grad).all()
        assert torch.isfinite(rejected.grad).all()
