"""The contract of the pairwise losses: one row a method, its loss written down once more and independently.

`FORMULAS` maps a method to (the loss of one pair, options of its config, extra columns of its data). A formula sees two
`Answer`s, with log-probabilities in float64, the options and the row.

`METRICS` does the same for what the methods record, those on single responses among them.
"""
# ruff: noqa: E741  (w and l, the winning and the losing answer, as in the papers)

import inspect
import math
import re
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import tiny
import torch
from datasets import Dataset
from pairs import difference, double, gradients, loss_and_gradients, make, step_gradients, token_logps
from torch.nn.functional import logsigmoid, pad
from torch.nn.utils.rnn import pad_sequence

from trl_ift import get_method
from trl_ift.preference.trainer import PairLossConfig, PreferenceBatch, Responses
from trl_ift.registry import METHODS
from trl_ift.unpaired.trainer import UnpairedBatch, UnpairedTrainer


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


def ada_scale(h, o):
    """Where the derivative of the objective is 0, within the bounds."""
    power = {"linear": 1, "quadratic": 2}[o.tau_penalty]
    low, high = o.tau_min, o.tau_max if power == 1 else 1e3
    for _ in range(200):
        tau = (low + high) / 2
        z = h.detach() / tau
        p = z.abs().sigmoid()
        entropy = -p * logsigmoid(z.abs()) - (1 - p) * logsigmoid(-z.abs())
        rises = entropy + power * o.rho0 * tau ** (power - 1) > math.log(2)
        low, high = (low, tau) if rises else (tau, high)
    return tau


def ada_dpo(w, l, o, row):
    h = o.beta * (w.r - l.r)
    tau = ada_scale(h, o)
    penalty = o.rho0 * tau ** {"linear": 1, "quadratic": 2}[o.tau_penalty]
    return -tau * logsigmoid(h / tau) + penalty - math.log(2) * tau


def log_odds(answer):
    p = answer.mean.exp()
    return (p / (1 - p)).log()


def alignment(w, l, o):
    return -logsigmoid(o.beta * log_odds(w)) - logsigmoid(-o.beta * log_odds(l))


def aligned_sft(w, l, o, row):
    return -o.sft_weight * w.mean + o.asft_lambda * alignment(w, l, o)


def mrpo_references(w, l, o, row):
    """Weights of the two references, and log-probs of chosen and of rejected under them, clipped."""
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
    return alpha, w_refs, l_refs


def mrpo_mixture(alpha, refs, o):
    if o.mrpo_mixture == "geometric" or o.mrpo_mode == "multi_dpo":
        return (alpha * refs).sum()
    return refs.min() - (alpha * (refs.min() - refs).exp()).sum().log()  # so that no other exponent overflows


def mrpo(w, l, o, row):
    alpha, w_refs, l_refs = mrpo_references(w, l, o, row)
    if o.mrpo_mode == "multi_dpo":
        return sum(
            -a * logsigmoid(o.beta * (w.logp - x - l.logp + y)) for a, x, y in zip(alpha, w_refs, l_refs, strict=True)
        )
    mixed = [mrpo_mixture(alpha, refs, o) for refs in (w_refs, l_refs)]
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
        """Against the formula, on answers of one token too, and against finite differences."""
        name, trainer = named_trainer
        tokens = random_tokens()
        chosen, rejected = (part.requires_grad_() for part in tokens[:2])
        rows = [{key: values[i % len(values)] for key, values in FORMULAS[name][2].items()} for i in range(6)]
        for i in range(6):
            lengths = 2 * (1 + i % 4, 4 - i % 4)  # of chosen and rejected
            part = [value[i : i + 1, :length] for value, length in zip(tokens, lengths, strict=True)]
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


# ---------------------------------------------------------------- what is recorded


def answers(tokens, ref_tokens):
    vectors = [[torch.tensor(part, dtype=torch.float64) for part in parts] for parts in (tokens, ref_tokens)]
    return [Answer(*both) for both in zip(*vectors, strict=True)]


# Log-ratios 1.5, 0, -4, 0.25, -2, 1 of chosen and -1, 0.5, 0, 0.25, 6, 1 of rejected answers: above, below and exactly at the
# reference, margins of 0, and one answer that is all but certain
CHOSEN = answers(
    [[-1.0, -2.0, -0.5], [-(2**-7)], [-3.0, -1.0, -4.0, -2.0], [-0.5, -0.5], [-8.0, -2.0], [-1.0, -1.0, -1.0]],
    [[-2.0, -2.0, -1.0], [-(2**-7)], [-2.0, -1.0, -2.0, -1.0], [-0.5, -0.75], [-6.0, -2.0], [-1.5, -1.0, -1.5]],
)
REJECTED = answers(
    [[-4.0, -1.0], [-0.5, -0.5, -1.5], [-2.0], [-1.0, -3.0, -1.0, -2.0], [-0.125, -0.125], [-2.0, -3.0, -1.0]],
    [[-2.0, -2.0], [-1.0, -0.5, -1.5], [-2.0], [-2.0, -3.0, -1.0, -1.25], [-3.0, -3.25], [-3.0, -3.0, -1.0]],
)
GOLDS = answers(
    [[-2.0], [-1.0, -0.5, -4.0, -3.0], [-0.25, -0.75], [-2.0, -2.0, -1.0], [-6.0], [-1.0, -3.0]],
    [[-1.0], [-1.0, -0.5, -3.0, -3.5], [-0.5, -0.75], [-1.0, -2.0, -1.5], [-2.0], [-4.0, -3.0]],
)
WIDTH = 4  # tokens of the longest
PARTS = slice(0, 4), slice(4, 6)  # micro-batches: of unequal size, so that a mean of means is another number
WEIGHTS = [0.5, 2.0, 1.0, 0.0, 3.0, 1.0]  # of rows: no metric of a method reads them


def mean(values):
    values = [float(value) for value in values]
    return math.fsum(values) / len(values)


def share(numbers, of):
    return math.fsum(map(float, numbers)) / math.fsum(map(float, of))


def metrics_of(**named):
    """A function of a batch to metrics, from functions of one pair, which are averaged; "rewards" are of chosen, rejected."""

    def metrics(rows, o):
        return {name.replace("__", "/"): mean(f(w, l, o, row) for w, l, row in rows) for name, f in named.items()}

    return metrics


def with_rewards(metrics, reward):
    """Those of a method whose rewards are not beta times a log-ratio: `reward` gives that of one answer."""

    def both(rows, o):
        rewards = [[float(reward(answer, o)) for answer in side] for side in list(zip(*rows, strict=True))[:2]]
        return metrics(rows, o) | {"rewards": rewards}

    return both


def softplus(x):
    return math.log1p(math.exp(x))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def chipo_reward(answer, o):
    return o.beta * (answer.r.exp() + o.chipo_gamma * answer.r)


def chipo_clipped(w, l, o, row):
    return (chipo_reward(w, o) - chipo_reward(l, o)).abs() > 2 * o.chipo_r_max


def regularized_metrics(rows, o):
    tokens = [w.tokens for w, l, row in rows]
    nll = share([-part.sum() for part in tokens], [len(part) for part in tokens])
    imitation = {
        "sum": o.beta * mean(-part.sum() for part in tokens),
        "seq_mean": mean(-part.mean() for part in tokens),
        "token_mean": nll,
    }[o.rpo_normalization]
    dpo = mean(softplus(-o.beta * (w.r - l.r)) for w, l, row in rows)
    found = {"nll_loss": nll, "regularized_po/dpo_loss": dpo}
    return found | {"regularized_po/sft_loss": o.rpo_eta * imitation}


def soft_label_metrics(rows, o):
    labels = [row.get("soft_label", 1.0) for w, l, row in rows]
    signed = [(2 * p - 1) * (w.r - l.r) for p, (w, l, row) in zip(labels, rows, strict=True)]
    clear = [abs(2 * p - 1) for p in labels]
    return {
        "soft_label_po/label": mean(labels),
        "soft_label_po/accuracy": share([c for c, h in zip(clear, signed, strict=True) if h > 0], clear),
        "soft_label_po/margin": o.beta * share(signed, clear),
    }


def ada_metrics(rows, o):
    h = [o.beta * (w.r - l.r) for w, l, row in rows]
    tau = [ada_scale(value, o) for value in h]
    found = {
        "ada_dpo/tau": mean(tau),
        "ada_dpo/dpo_loss": mean(-t * logsigmoid(value / t) for t, value in zip(tau, h, strict=True)),
        "ada_dpo/share_at_min": mean(abs(t - o.tau_min) < 1e-9 for t in tau),
    }
    if o.tau_penalty == "linear":
        found["ada_dpo/share_at_max"] = mean(abs(t - o.tau_max) < 1e-9 for t in tau)
    return found


def tis_metrics(rows, o):
    return {
        f"tis_dpo/{kind}_weight": share(
            [sum(row[f"{kind}_weights"]) for *_, row in rows], [len(both[side].tokens) for both in rows]
        )
        for side, kind in enumerate(("chosen", "rejected"))
    }


def relative_metrics(rows, o):
    found = {"relative_po/dpo_loss": mean(softplus(-o.beta * (w.r - l.r)) for w, l, row in rows)}
    if o.relative_weighting != "embedding":
        return found
    own = []
    for part in PARTS:
        vectors = [torch.tensor(row["prompt_embedding"], dtype=torch.float64) for *_, row in rows[part]]
        for vector in vectors:
            distances = [1 - (vector @ v) / (vector.norm() * v.norm()) for v in vectors]
            own.append(1 / sum(math.exp(-d / o.distance_temperature) for d in distances))
    return found | {"relative_po/own_weight": mean(own)}


def mrpo_metrics(rows, o):
    found, rewards = {}, []
    references = [mrpo_references(w, l, o, row) for w, l, row in rows]
    for k in range(2):
        found[f"mrpo/weight_{k}"] = mean(alpha[k] for alpha, *_ in references)
    for side, kind in enumerate(("chosen", "rejected")):
        mixed = [mrpo_mixture(found[0], found[1 + side], o) for found in references]
        clipped = [found[1 + side] for found in references]
        found[f"mrpo/shift_{kind}"] = mean(x - both[side].ref for x, both in zip(mixed, rows, strict=True))
        found[f"mrpo/clipped_{kind}"] = mean(
            refs[1] != row[f"ref1_{kind}_logps"] for refs, (*_, row) in zip(clipped, rows, strict=True)
        )
        rewards.append([float(o.beta * (both[side].logp - x)) for x, both in zip(mixed, rows, strict=True)])
    return found | {"rewards": rewards}


def exo_metrics(rows, o):
    found, names = [], ("kl", "best_prob", "top_prob", "expected_reward")
    for w, l, row in rows:
        scores = torch.stack([o.beta * answer.r for answer in (w, l, *row.get("others", ()))])
        rewards = torch.tensor(row.get("rewards", [1.0, 0.0]), dtype=torch.float64)
        q, p = scores.exp() / scores.exp().sum(), (rewards / o.exo_beta_r).exp()
        p = p / p.sum()
        if o.exo_loss == "exo-pref":
            p = torch.tensor([1 - o.exo_epsilon, o.exo_epsilon], dtype=torch.float64)
        found.append([(q * (q / p).log()).sum(), q[0], max(q), (q * rewards).sum()])
    return {f"exo/{name}": mean(values) for name, values in zip(names, zip(*found, strict=True), strict=True)}


def figa_metrics(rows, o):
    good = [-x for w, l, row in rows for x, mark in zip(w.tokens, row["good_tokens"], strict=True) if mark]
    bad = [-x for w, l, row in rows for x, mark in zip(l.tokens, row["bad_tokens"], strict=True) if mark]
    return {
        "figa/good_tokens": len(good) / len(rows),
        "figa/bad_tokens": len(bad) / len(rows),
        "figa/kept_bad": mean(o.figa_nll_floor <= nll <= o.nll_cut for nll in bad),
        "figa/good_nll": mean(good),
        "figa/bad_nll": mean(bad),
    }


def tpo_reward(answer, o):
    return o.beta * (answer.mean if o.loss_type in ("ipo", "tpo-l") else answer.logp)


def tpo_metrics(rows, o):
    golds = [w if o.gold_from == "chosen" else row["gold"][0] for w, l, row in rows]
    tokens = [x for gold in golds for x in gold.tokens]
    return {
        "nll_loss": -mean(tokens),
        "tpo/reference_token_accuracy": mean(x > LIKELIEST for x in tokens),
        "logps/reference": mean(gold.logp for gold in golds),
        "rewards/reference": mean(tpo_reward(gold, o) for gold in golds),
    }


def mpo_strength(answer, o):
    return {"reference": answer.r, "reference_free": answer.logp, "length_norm": answer.mean}[o.logit_mode]


def mpo_metrics(rows, o):
    p = [sigmoid(o.logit_scale * (mpo_strength(w, o) - mpo_strength(l, o))) for w, l, row in rows]
    found = {"mpo/preference_prob": mean(p), "mpo/grad_weight": mean(x * (1 - x) for x in p)}
    for name in ("reg", "pretrain"):
        if parts := [answer for *_, row in rows for answer in row.get(name, ())]:
            found[f"mpo/{name}_nll"] = -mean(x for answer in parts for x in answer.tokens)
            if name == "reg" and o.logit_mode == "reference":
                found["mpo/reg_kl"] = mean(-answer.r for answer in parts)
    return found


def spo_metrics(rows, o):
    found = {}
    for kind in ("chosen", "rejected"):
        degraded = [sample for *_, row in rows for sample in row[f"levels_{kind}"]]
        nll = [math.log(sum(map(math.exp, logits))) - logits[level] for logits, level in degraded]
        found[f"spo/loss_{kind}"] = mean(nll)
        found[f"spo/accuracy_{kind}"] = mean(max(logits) == logits[level] for logits, level in degraded)
        found[f"spo/rows_{kind}"] = len(degraded) / len(rows)
    return found


def single_metrics(rows, o, reward):
    """Those of every method on single responses: means over the rows of each label."""
    found = {}
    for kind, label in (("chosen", True), ("rejected", False)):
        own = [answer for answer, row in rows if row["label"] is label]
        found |= {f"rewards/{kind}": mean(map(reward, own)), f"logps/{kind}": mean(a.logp for a in own)}
    return found | {"rewards/margins": found["rewards/chosen"] - found["rewards/rejected"]}


def ulma_metrics(rows, o):
    def reward(answer):
        return float(o.beta * (answer.r if o.logp_reduction == "sum" else answer.r / len(answer.tokens)))

    good = [answer for answer, row in rows if row["label"]]
    z = [(reward(answer) + o.log_z, row["score"]) for answer, row in rows if not row["label"]]
    found = {
        "nll": lambda: mean(-(a.logp if o.logp_reduction == "sum" else a.mean) for a in good),
        "pointwise_dpo": lambda: mean(softplus(-reward(a) - o.log_z) for a in good),
    }
    found = single_metrics(rows, o, reward) | {"ulma/positive_loss": found[o.positive_loss]()}
    if o.negative_loss == "continuous":
        return found | {"ulma/negative_loss": mean((score - value) ** 2 for value, score in z)}
    found["ulma/negative_loss"] = mean(softplus(value) for value, score in z)
    return found | {"ulma/push": mean(sigmoid(value) for value, score in z)}


def uft_metrics(rows, o):
    z = [float(o.beta * answer.r + o.reward_offset) for answer, row in rows]
    q, s = [sigmoid(value) for value in z], [row["score"] for answer, row in rows]
    dq, ds = [x - mean(q) for x in q], [x - mean(s) for x in s]
    norm = math.sqrt(sum(x * x for x in dq) * sum(x * x for x in ds))
    found = single_metrics(rows, o, lambda answer: float(o.beta * answer.r + o.reward_offset)) | {
        "uft/mse": mean((x - y) ** 2 for x, y in zip(q, s, strict=True)),
        "uft/saturated": mean(abs(value) > 4 for value in z),
        "uft/correlation": sum(x * y for x, y in zip(dq, ds, strict=True)) / norm,
    }
    if "is_sft" in rows[0][1]:
        found["uft/rewards_sft"] = mean(value for value, (_, row) in zip(z, rows, strict=True) if row["is_sft"])
    return found


NOTHING = metrics_of()
LIKELIEST = -1.5  # a token is the likeliest one if its log-probability is larger
SOFT = {"soft_label": [0.9, 0.25, 1.0, 0.6, 0.5, 0.75]}
NEAR = {
    "ref1_chosen_logps": [-5.25, -0.25, -3.0, -1.25, -8.25, -9.0],
    "ref1_rejected_logps": [-4.0, -3.5, -2.0625, -1.0, -6.25, -7.5],
}
LISTS = {
    "others": [GOLDS[:2], [], GOLDS[2:3], [], [], []],
    "rewards": [[1.5, 0.2, -1.0, 0.1], [0.3, 0.1], [2.0, -1.0, 0.5], [0.1, 0.0], [1.0, 0.5], [0.0, -3.0]],
}
EDITS = {
    "good_tokens": [[1, 0, 1], [0], [0, 1, 0.5, 0], [0, 0], [1, 0], [1, 1, 0]],
    "bad_tokens": [[1, 1], [1, 0, 0], [1], [0, 1, 1, 0], [1, 0], [0, 0, 0.5]],
}
TOKEN_WEIGHTS = {
    "chosen_weights": [[1.0, 2.0, 0.5], [3.0], [0.0, 1.0, 0.25, 4.0], [1.0, 1.0], [0.5, 2.0], [1.0, 0.0, 2.0]],
    "rejected_weights": [[0.5, 0.5], [1.0, 0.0, 3.0], [2.0], [1.0, 1.0, 0.5, 0.5], [0.25, 1.0], [2.0, 2.0, 2.0]],
}
EMBEDDINGS = {"prompt_embedding": [[1.0, 0.0], [1.0, 0.5], [-1.0, 2.0], [0.0, 3.0], [2.0, 1.0], [-1.0, -1.0]]}
DISTANCES = {"distance_chosen": [1.0, 0.5, 4.0, 0.0, 2.0, 0.25], "distance_rejected": [0.5, 3.0, 0.0, 1.0, 8.0, 2.0]}
OUTSIDE = {
    "reg": [GOLDS[:2], [], GOLDS[2:3], [], GOLDS[4:5], []],
    "pretrain": [[], GOLDS[3:4], GOLDS[5:], [], [], GOLDS[:1]],
}
LEVELS = {
    "levels_chosen": [[([1.0, 0.0, -1.0], 0)], [([0.0, 2.0, 0.5], 2)], [], [([0.5, 0.0, 3.0], 2)], [([2.0, 0.0, 1.0], 1)], []],
    "levels_rejected": [[], [([0.0, 4.0, 1.0], 1)], [([1.0, 0.0, 0.5], 2)], [], [], []],
}  # fmt: skip
# Of twelve single responses, those of the pairs one after the other
FEEDBACK = {
    "label": [True, False, True, True, False, True, False, True, True, False, False, True],
    "score": [1.0, 0.25, 0.75, 1.0, 0.0, 0.5, 0.375, 1.0, 0.875, 0.125, 0.0, 0.625],
}
DEMONSTRATIONS = FEEDBACK | {"is_sft": [1.0, 0, 0, 1.0, 0, 0, 0, 0, 0, 0, 0, 1.0]}

# Method -> (its metrics, from rows of answers and columns; options of its config; columns of its data)
METRICS = {
    "dpo": (NOTHING, {}, {}),
    "spin": (NOTHING, {}, {}),
    "davir-dpo": (
        with_rewards(
            lambda rows, o: {
                "davir_dpo/effective_beta": mean(
                    o.beta / max(abs(answer.ref), 0.01) for w, l, row in rows for answer in (w, l)
                )
            },
            lambda answer, o: o.beta * answer.r / max(abs(answer.ref), 0.01),
        ),
        {},
        {},
    ),
    "dpop": (
        metrics_of(
            dpop__penalty=lambda w, l, o, row: max(0, -w.r), dpop__active=lambda w, l, o, row: w.r < 0
        ),
        {},
        {},
    ),
    "minor-dpo": (metrics_of(minor_dpo__gate_fraction=lambda w, l, o, row: l.r > 0), {}, {}),
    "chipo": (with_rewards(NOTHING, chipo_reward), {"chipo_gamma": 0.5}, {}),
    "chipo clipped": (with_rewards(metrics_of(chipo__clip_fraction=chipo_clipped), chipo_reward), {"chipo_r_max": 0.1}, {}),
    "chipo at the bound": (  # the second pair is exactly there, and not clipped
        with_rewards(metrics_of(chipo__clip_fraction=chipo_clipped), chipo_reward),
        {"beta": 1.0, "chipo_r_max": float(REJECTED[1].r.exp() + REJECTED[1].r - 1) / 2},
        {},
    ),
    "regularized-po": (regularized_metrics, {"rpo_eta": 0.3}, {}),
    "regularized-po seq_mean": (regularized_metrics, {"rpo_eta": 0.3, "rpo_normalization": "seq_mean"}, {}),
    "regularized-po token_mean": (regularized_metrics, {"rpo_eta": 0.3, "rpo_normalization": "token_mean"}, {}),
    "soft-label-po": (soft_label_metrics, {"soft_label_clip": [0.3, 0.8]}, SOFT),
    "soft-label-po cipo": (soft_label_metrics, {"soft_label_loss": "cipo"}, SOFT),
    "soft-label-po hard": (soft_label_metrics, {"beta": 0.5}, {}),
    "ada-dpo": (ada_metrics, {"beta": 1.0}, {}),
    "ada-dpo quadratic": (ada_metrics, {"beta": 1.0, "tau_penalty": "quadratic"}, {}),
    "aligned-sft": (
        with_rewards(
            metrics_of(
                nll_loss=lambda w, l, o, row: -w.mean, aligned_sft__align_loss=lambda w, l, o, row: alignment(w, l, o)
            ),
            lambda answer, o: log_odds(answer),
        ),
        {"sft_weight": 0.5, "asft_lambda": 0.3, "beta": 0.7},
        {},
    ),
    "tis-dpo": (tis_metrics, {}, TOKEN_WEIGHTS),
    "relative-po": (relative_metrics, {}, EMBEDDINGS),
    "relative-po diagonal": (relative_metrics, {"relative_weighting": "diagonal"}, {}),
    "relative-po uniform": (relative_metrics, {"relative_weighting": "uniform"}, {}),
    "mrpo": (mrpo_metrics, {}, NEAR),
    "mrpo multi": (mrpo_metrics, {"mrpo_mode": "multi_dpo", "ctro_adaptive": False, "ctro_eps": 0.3}, NEAR),
    "mrpo unclipped": (mrpo_metrics, {"ctro_eps": None, "mrpo_mixture": "geometric"}, NEAR),
    "exo": (exo_metrics, {}, LISTS),
    "exo preferences": (exo_metrics, {"exo_loss": "exo-pref", "exo_epsilon": 0.1}, {}),
    "figa": (
        with_rewards(figa_metrics, lambda answer, o: answer.mean), {"figa_nll_floor": 0.5, "nll_cut": 2.0}, EDITS
    ),
    "fpo": (
        with_rewards(
            metrics_of(
                fpo__distance_chosen=lambda w, l, o, row: row["distance_chosen"],
                fpo__distance_rejected=lambda w, l, o, row: row["distance_rejected"],
            ),
            lambda answer, o: o.beta * answer.r / len(answer.tokens),
        ),
        {},
        DISTANCES,
    ),
    "fpo unbound": (
        with_rewards(NOTHING, lambda answer, o: o.beta * answer.r / len(answer.tokens)), {"fpo_alpha": 0.0}, DISTANCES
    ),
    "ld-align": (
        metrics_of(ld_align__latent_distance=lambda w, l, o, row: row["latent_distance"]),
        {},
        {"latent_distance": DISTANCES["distance_chosen"]},
    ),
    "ld-align weights": (NOTHING, {}, {}),
    "self-supervised-po": (spo_metrics, {"spo_levels": 3}, LEVELS),
    "tpo": (with_rewards(tpo_metrics, tpo_reward), {"beta": 0.2}, {"gold": [[gold] for gold in GOLDS]}),
    "tpo means": (
        with_rewards(tpo_metrics, tpo_reward), {"loss_type": "tpo-l"}, {"gold": [[gold] for gold in GOLDS]}
    ),
    "tpo chosen": (
        with_rewards(tpo_metrics, tpo_reward), {"beta": 0.2, "loss_type": "ipo", "gold_from": "chosen"}, {}
    ),
    "tpo alone": (with_rewards(NOTHING, tpo_reward), {"tpo_alpha": 0.0}, {}),
    "mpo": (with_rewards(mpo_metrics, lambda answer, o: o.logit_scale * mpo_strength(answer, o)), {}, OUTSIDE),
    "mpo length_norm": (
        with_rewards(mpo_metrics, lambda answer, o: o.logit_scale * mpo_strength(answer, o)),
        {"logit_mode": "length_norm"},
        {"reg": OUTSIDE["reg"]},
    ),
    "ulma": (ulma_metrics, {"beta": 0.5, "log_z": 0.25}, FEEDBACK),
    "ulma sums": (
        ulma_metrics,
        {"logp_reduction": "sum", "negative_loss": "continuous", "positive_loss": "pointwise_dpo", "log_z": 0.25},
        FEEDBACK,
    ),
    "uft": (uft_metrics, {"beta": 2.0}, DEMONSTRATIONS),
    "uft offset": (uft_metrics, {"beta": 2.0, "reward_offset": 1.0, "score_clip": 0.1}, FEEDBACK),
}  # fmt: skip
# Whose metrics come from a forward pass of their own: see tests/test_ift_trainer.py and tests/test_eurus.py
ELSEWHERE = {"ift", "eurus-reward"}
every_metric = pytest.mark.parametrize("name", METRICS)


def responses_of(group, with_reference, pair=None):
    mask = torch.arange(WIDTH) < torch.tensor([len(answer.tokens) for answer in group])[:, None]

    def padded(parts):
        rows = [pad(part, (0, WIDTH - len(part))) for part in parts]
        return torch.stack(rows) if rows else torch.zeros(0, WIDTH, dtype=torch.float64)

    tokens = padded([answer.tokens for answer in group])
    ref_tokens = padded([answer.ref_tokens for answer in group])
    return Responses(
        logps=tokens.sum(1), token_logps=tokens, mask=mask.reshape(len(group), WIDTH), lengths=mask.sum(-1),
        entropy=torch.zeros_like(tokens), is_top1=tokens > LIKELIEST,  # padding too: it must not count
        pair=torch.arange(len(group)) if pair is None else torch.tensor(pair, dtype=torch.long),
        ref_logps=ref_tokens.sum(1) if with_reference else None,
        ref_token_logps=ref_tokens if with_reference else None,
    )  # fmt: skip


def column_of(name, values):
    """Numbers of rows, or lists of numbers: of as many as there are tokens, or as the longest list has."""
    if not isinstance(values[0], list):
        return torch.tensor(values, dtype=None if name == "label" else torch.float64)
    column = pad_sequence([torch.tensor(value, dtype=torch.float64) for value in values], batch_first=True)
    return pad(column, (0, WIDTH - column.size(1))) if name.endswith(("_tokens", "_weights")) else column


def is_branch(values):
    return any(isinstance(item, Answer) for value in values if isinstance(value, list) for item in value)


def pair_batch(columns, part, with_reference):
    own = {name: values[part] for name, values in columns.items()} | {"weight": WEIGHTS[part]}
    branches, numbers = {}, {}
    for name, values in own.items():
        if is_branch(columns.get(name, [])):
            pairs = [index for index, group in enumerate(values) for _ in group]
            group = [answer for group in values for answer in group]
            branches[name] = responses_of(group, with_reference, pairs)
        elif not name.startswith("levels"):
            numbers[name] = column_of(name, values)
    sides = (responses_of(side[part], with_reference) for side in (CHOSEN, REJECTED))
    return PreferenceBatch(*sides, {name: branch for name, branch in branches.items() if len(branch.logps)}, numbers)


def single_batch(columns, part):
    group = [answer for both in zip(CHOSEN, REJECTED, strict=True) for answer in both][part]
    found = responses_of(group, True)
    numbers = {name: column_of(name, values[part]) for name, values in columns.items()}
    return UnpairedBatch(
        logps=found.logps, token_logps=found.token_logps, mask=found.mask, lengths=found.lengths,
        ref_logps=found.ref_logps, label=numbers.pop("label"), score=numbers.pop("score"),
        columns=numbers | {"weight": torch.tensor((WEIGHTS * 2)[part])},
    )  # fmt: skip


def prepared(trainer, batch, columns, part):
    """Set what the trainers of some methods take from their constructor, or from the forward pass."""
    if trainer.method == "mrpo":
        trainer._number = 1
    elif trainer.method == "mpo":
        trainer.state = SimpleNamespace(global_step=1)
        trainer._reg_scored = trainer.uses_reference
    elif trainer.method == "fpo":
        distances = torch.cat([batch.columns[name] for name in DISTANCES])
        trainer._distances = lambda mask: distances
    elif trainer.method == "self-supervised-po":  # logits are the hidden states, the same at each of two tokens
        number = 2 * len(batch.chosen.logps)
        trainer._head = torch.nn.Linear(3, 3, bias=False)
        torch.nn.init.eye_(trainer._head.weight)
        trainer._inputs, hidden = {"input_ids": torch.zeros(number, 2)}, [torch.full((number, 3), 9.0)]
        for kind in ("chosen", "rejected"):
            degraded = [sample for row in columns[f"levels_{kind}"][part] for sample in row]
            if degraded:
                hidden.append(torch.tensor([logits for logits, _ in degraded]))
                ones = torch.ones(len(degraded), 2)
                trainer._inputs |= {
                    f"degraded_{kind}_input_ids": ones,
                    f"degraded_{kind}_completion_mask": ones,
                    f"degraded_{kind}_labels": torch.tensor([level for _, level in degraded]),
                }
        trainer._hidden = torch.cat(hidden)[:, None].expand(-1, 2, -1)


def recorded(name):
    """What a trainer records of two micro-batches: means by name, and the rewards of each answer if they are its own."""
    _, options, columns = METRICS[name]
    method = get_method(name.split()[0])
    trainer = method.trainer_class.__new__(method.trainer_class)  # its losses need no model
    trainer.args = method.config_class("unused", use_cpu=True, bf16=False, **options)
    trainer.beta, trainer.model, trainer._metrics = trainer.args.beta, torch.nn.Module().train(), {"train": {}}
    trainer._extra_rows = dict.fromkeys(columns)
    trainer._declare(trainer.args)
    single, rewards = isinstance(trainer, UnpairedTrainer), []
    for part in PARTS:
        if single:
            batch = single_batch(columns, slice(2 * part.start, 2 * part.stop))
            trainer.row_loss(batch)
            trainer._record_rewards(batch)
            continue
        batch = pair_batch(columns, part, trainer.uses_reference)
        prepared(trainer, batch, columns, part)
        trainer.pair_loss(batch)
        list(trainer.branch_terms(batch))
        rewards.append(trainer.implicit_rewards(batch))
    means = {
        key: (total / count).item()
        for key, (total, count) in trainer.__dict__.get("_sums", {"train": {}})["train"].items()
    }
    if single:
        means |= trainer.derived_metrics(means)
    found = {key: value for key, value in means.items() if not key.startswith("_")}
    if not single and rewards[0] is not None:
        found["rewards"] = [torch.cat(side).tolist() for side in zip(*rewards, strict=True)]
    return trainer.args, found


@every_metric
def test_what_is_recorded(name):
    """Exactly these metrics, as exact means over all rows, pairs or tokens of the micro-batches."""
    metrics, _, columns = METRICS[name]
    options, found = recorded(name)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if "label" in columns:
        group = [answer for both in zip(CHOSEN, REJECTED, strict=True) for answer in both]
        rows = list(zip(group, rows, strict=True))
    else:
        rows = list(zip(CHOSEN, REJECTED, rows or [{}] * len(CHOSEN), strict=True))
    expected = metrics(rows, options)
    assert found.keys() == expected.keys()
    if "rewards" in expected:
        for side, values in zip(found.pop("rewards"), expected.pop("rewards"), strict=True):
            assert side == pytest.approx(values, rel=1e-9, abs=1e-12)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_every_metric_is_in_the_table():
    names = {name.split()[0] for name in METRICS}
    assert names == {method.name for method in METHODS} - ELSEWHERE
    for name in names:
        source = inspect.getsource(inspect.getmodule(get_method(name).trainer_class))
        found = {key for entry in METRICS if entry.split()[0] == name for key in recorded(entry)[1]}
        written_down = set(re.findall(r'_record_mean\(\s*f?"([^"_][^"]*)"', source))
        for written in written_down - {"weights/mean"}:  # of the base: see tests/test_preference_trainer.py
            pattern = re.sub(r"\{.*?\}", ".+", written)
            assert any(re.fullmatch(pattern, key) for key in found), f"{name}: {written} is not in METRICS"
