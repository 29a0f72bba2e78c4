"""FIGA: which tokens an edit marks, the numbers and identities of the loss, and its normalisation."""

import math
from itertools import product

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from pairs import difference, double, gradients, loss_and_gradients, make, step_gradients, token_logps
from torch import tensor

from trl_ift import FIGAConfig, FIGATrainer, PreferenceConfig, PreferenceTrainer
from trl_ift.preference.figa import edit_masks, figa_sums


EOS = 2
A, B = [11, 12, 13, 14, 15, 2], [50, 11, 99, 13, 15, 2]
P_B = tensor([[0.4, 0.9, 0.2, 0.8, 0.7, 0.95]], dtype=torch.float64)
P_A = tensor([[0.9, 0.7, 0.8, 0.3, 0.6, 0.95]], dtype=torch.float64)


def marks(a, b, align="levenshtein", eos=EOS):
    good, bad = edit_masks(a, b, align, eos)
    return good.astype(int).tolist(), bad.astype(int).tolist()


def edit_distance(a, b, substitution=1):
    """By recursion."""
    if not a or not b:
        return len(a) + len(b)
    if a[-1] == b[-1]:
        return edit_distance(a[:-1], b[:-1], substitution)
    return min(
        edit_distance(a[:-1], b[:-1], substitution) + substitution,
        edit_distance(a[:-1], b, substitution) + 1,
        edit_distance(a, b[:-1], substitution) + 1,
    )


# ---------------------------------------------------------------- marks


class TestMarks:
    def test_example(self):
        assert marks(A, B) == ([1, 0, 1, 0, 0, 1], [0, 1, 0, 1, 0, 0])
        assert edit_distance(A, B) == 3

    def test_ties(self):
        a, b = [1, 14, 15, 2], [1, 15, 16, 2]
        assert edit_distance(a, b) == 2
        assert marks(a, b) == ([0, 1, 1, 1], [0, 1, 1, 0])
        assert marks(a, b, "indel") == ([0, 0, 1, 1], [0, 1, 0, 0])
        # Substituted before deleted, deleted before inserted; each at the end where it may be anywhere
        assert marks([1, 1], [1], eos=None) == ([0], [1, 0])
        assert marks([1], [1, 1], eos=None) == ([1, 0], [0])
        assert marks([5, 6], [7], eos=None) == ([1], [1, 1])

    @pytest.mark.parametrize("align", ["levenshtein", "indel"])
    def test_all_short_answers(self, align):
        """The marks are those of a script of the smallest cost: what is not marked is common, and the counts add up."""
        substitution = {"levenshtein": 1, "indel": 2}[align]
        answers = [list(ids) for length in range(4) for ids in product([5, 6, 7], repeat=length)]
        for a, b in product(answers, repeat=2):
            good, bad = edit_masks(a, b, align)
            kept_a, kept_b = np.array(a)[~bad] if a else [], np.array(b)[~good] if b else []
            assert list(kept_a) == list(kept_b)
            cost = edit_distance(a, b, substitution)
            if align == "indel":
                assert good.sum() + bad.sum() == cost
            else:  # at least one marker an operation, two a substitution
                assert cost <= good.sum() + bad.sum() <= 2 * cost
                assert max(good.sum(), bad.sum()) <= cost

    def test_distance_of_long_answers(self):
        """A substitution is one good and one bad token in the same gap."""
        generator = np.random.default_rng(0)
        for _ in range(20):
            a, b = (generator.integers(3, 9, size=generator.integers(0, 9)).tolist() for _ in range(2))
            good, bad = edit_masks(a, b)
            gaps, i, j, cost = [], 0, 0, 0
            while i < len(a) or j < len(b):
                removed = added = 0
                while i < len(a) and bad[i]:
                    i, removed = i + 1, removed + 1
                while j < len(b) and good[j]:
                    j, added = j + 1, added + 1
                gaps.append((removed, added))
                cost += max(removed, added)
                i, j = i + 1, j + 1
            assert cost == edit_distance(a, b)

    def test_symmetric_up_to_ties(self):
        for a, b in ((A, B), ([1, 2, 3, 4], [1, 9, 3, 4]), ([4, 5, 6], [4, 5, 6, 7, 8])):
            good, bad = edit_masks(a, b)
            back_good, back_bad = edit_masks(b, a)
            np.testing.assert_array_equal(good, back_bad)
            np.testing.assert_array_equal(bad, back_good)

    def test_ends(self):
        assert marks([7, 2], [7, 2]) == ([0, 1], [0, 0])  # equal: the end alone
        assert marks([7, 2, 9], [7, 2, 9]) == ([0, 1, 0], [0, 0, 0])  # a template writes on behind it
        assert marks([7, 2], [7, 8]) == ([0, 1], [0, 0])  # replaced, and still not bad
        assert marks([2, 2, 7], [7]) == ([0], [0, 1, 0])  # the first one
        assert marks([], [7, 2]) == ([1, 1], [])
        assert marks([7, 2], []) == ([], [1, 0])
        assert marks([7, 2], [7, 2], eos=None) == ([0, 0], [0, 0])

    def test_long_answers_are_quick(self):
        generator = np.random.default_rng(0)
        a = generator.integers(0, 1000, 1024)
        b = np.delete(a, [10, 500])
        b[100] = 5000
        good, bad = edit_masks(a, b)
        assert good.nonzero()[0].tolist() == [100]
        assert bad.nonzero()[0].tolist() == [10, 101, 500]


# ---------------------------------------------------------------- the loss


def loss_of(revised_logps=None, initial_logps=None, **options):
    good, bad = (tensor(mask, dtype=torch.float64)[None] for mask in edit_masks(A, B, eos_id=EOS))
    revised_logps = P_B.log() if revised_logps is None else revised_logps
    initial_logps = P_A.log() if initial_logps is None else initial_logps
    sums, count = figa_sums(revised_logps, initial_logps, good, bad, torch.ones_like(good), **options)
    return sums.sum() / count, count.item()


@pytest.mark.parametrize(
    ("options", "expected", "count"),
    [
        ({}, 0.5996711167, 4),
        ({"bad_weight": 0.0}, 0.8590073129, 3),
        ({"nll_cut": math.inf}, 0.3593396129, 5),
    ],
)
def test_numbers(options, expected, count):
    loss, found = loss_of(**options)
    assert loss.item() == pytest.approx(expected, abs=1e-9)
    assert found == count


def test_floor():
    """Of the bad tokens, with probabilities 0.7 and 0.3, only those between the bounds: nll 0.357 and 1.204."""
    assert loss_of(nll_floor=0.3)[1] == 4
    assert loss_of(nll_floor=0.4)[1] == 3
    assert loss_of(nll_floor=0.4, nll_cut=1.3)[0].item() == pytest.approx(
        (-math.log(0.4 * 0.2 * 0.95) + 0.5 * math.log(0.3)) / 4, abs=1e-9
    )


def test_identities():
    assert loss_of(bad_weight=0.0, other_weight=1.0)[0].item() == pytest.approx(-P_B.log().mean().item())
    edited = P_B[0, [0, 2, 5]].log().mean().item()
    assert loss_of(bad_weight=0.0)[0].item() == pytest.approx(-edited)


def test_gradients():
    revised, initial = P_B.log().requires_grad_(), P_A.log().requires_grad_()
    loss, count = loss_of(revised, initial, good_weight=2.0)
    on_revised, on_initial = torch.autograd.grad(loss, (revised, initial))
    assert on_revised[0].tolist() == pytest.approx([-2 / count, 0, -2 / count, 0, 0, -2 / count])
    assert on_initial[0].tolist() == pytest.approx([0, 0.5 / count, 0, 0, 0, 0])  # the other bad one has p = 0.3


def test_the_cut():
    for probability, gradient in ((0.55, 0.5), (0.5488, 0.0), (0.54, 0.0)):  # exp(-0.6) = 0.54881
        initial = tensor([[probability]], dtype=torch.float64).log().requires_grad_()
        one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
        sums, _ = figa_sums(zero, initial, zero, one, one)
        assert torch.autograd.grad(sums.sum(), initial)[0].item() == gradient
    for bounds in ({"nll_cut": 0.75}, {"nll_floor": 0.75, "nll_cut": 2.0}):  # both belong to what is pushed down
        sums, count = figa_sums(zero, -0.75 * one, zero, one, one, **bounds)
        assert (sums.item(), count.item()) == (-0.375, 1)


@pytest.mark.parametrize("value", [-1e-12, -1e4])
def test_extremes(value):
    logps = [torch.full((1, 3), value, requires_grad=True) for _ in range(2)]
    ones = torch.ones(1, 3)
    sums, _ = figa_sums(*logps, ones, ones, ones, nll_cut=math.inf)
    for gradient in torch.autograd.grad(sums.sum(), logps):
        assert torch.isfinite(gradient).all()


# ---------------------------------------------------------------- the trainer


def edits(number=4):
    """Answers and small corrections of them."""
    changes = [("Paris", "London"), ("Eight", "Seven"), ("green", "red"), ("Tuesday", "Monday"), ("wet", "dry")]
    changed = []
    for row in tiny.preference_data():
        old, new = next((pair for pair in changes if pair[0] in row["chosen"]), (" ", " very "))
        changed.append(row | {"rejected": row["chosen"].replace(old, new)})
    return Dataset.from_list(changed[:number])


def trainer_of(tmp_path, tokenizer, data=None, **settings):
    data = edits() if data is None else data
    return make(FIGATrainer, FIGAConfig, tmp_path, tiny.model("llama", tokenizer), data, tokenizer, **settings)


def expected_loss(policy, tokenizer, rows, args, kept_only=False):
    """By one unpadded sequence at a time."""
    total, count = 0.0, 0
    for row in rows:
        b, a = (tokenizer(row[kind])["input_ids"] + [tokenizer.eos_token_id] for kind in ("chosen", "rejected"))
        good, bad = edit_masks(a, b, args.align, tokenizer.eos_token_id)
        for j, logp in enumerate(token_logps(policy, tokenizer, row["prompt"], row["chosen"])):
            weight = args.good_weight if good[j] else args.other_weight
            total, count = total - row.get("weight", 1.0) * weight * logp, count + (weight != 0)
        for i, logp in enumerate(token_logps(policy, tokenizer, row["prompt"], row["rejected"])):
            kept = bad[i] and args.figa_nll_floor <= -logp.item() <= args.nll_cut
            total = total + row.get("weight", 1.0) * kept * args.bad_weight * logp
            count += bool(kept if kept_only else bad[i]) and args.bad_weight != 0
    return total / count


@pytest.mark.parametrize(
    "options",
    [
        {"nll_cut": 6.0},
        {"nll_cut": 6.0, "figa_normalization": "micro"},
        {"nll_cut": math.inf, "other_weight": 0.25, "good_weight": 2.0},
        {"nll_cut": math.inf, "figa_nll_floor": 5.0, "align": "indel", "bad_weight": 1.5},
        {"bad_weight": 0.0},
    ],
)
def test_loss_and_gradients(tmp_path, tokenizer, options):
    trainer = trainer_of(tmp_path, tokenizer, **options)
    loss, found = loss_and_gradients(trainer)
    twin = double(trainer.model)
    micro = trainer.args.figa_normalization == "micro"
    expected = expected_loss(twin, tokenizer, edits().to_list(), trainer.args, micro)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert difference(found, gradients(twin)) < 2e-5


def test_row_weights(tmp_path, tokenizer):
    data = edits().add_column("weight", [0.0, 1.0, 2.0, 0.5])
    trainer = trainer_of(tmp_path, tokenizer, data, nll_cut=7.0)
    loss, _ = loss_and_gradients(trainer)
    assert loss == pytest.approx(
        expected_loss(double(trainer.model), tokenizer, data.to_list(), trainer.args).item(), rel=1e-5
    )


def test_all_revised_tokens_are_trls_sft_loss(tmp_path, tokenizer):
    """bad_weight = 0, and all tokens of the revised answers alike."""
    ours = trainer_of(tmp_path, tokenizer, bad_weight=0.0, other_weight=1.0)
    theirs = make(PreferenceTrainer, PreferenceConfig, tmp_path, tiny.model("llama", tokenizer), edits(), tokenizer,
                  loss_type="sft")  # fmt: skip
    (loss, found), (value, expected) = loss_and_gradients(ours), loss_and_gradients(theirs)
    assert loss == pytest.approx(value, rel=1e-5)
    assert difference(found, expected) < 1e-5


class TestNormalization:
    def steps(self, tmp_path, tokenizer, **options):
        found = []
        for size in (4, 1):
            trainer = trainer_of(
                tmp_path, tokenizer, nll_cut=6.0, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size,
                max_steps=1, overwrite_output_dir=True, **options,
            )  # fmt: skip
            found.append(step_gradients(trainer))
        return found

    def test_step(self, tmp_path, tokenizer):
        """The same however the step is split."""
        ((whole,), (gradient,)), ((parts,), (summed,)) = self.steps(tmp_path, tokenizer)
        assert parts == pytest.approx(whole, abs=2e-4)
        assert difference(summed, gradient) < 1e-5

    def test_micro(self, tmp_path, tokenizer):
        """Means of micro-batches: another gradient."""
        ((_,), (gradient,)), ((_,), (summed,)) = self.steps(tmp_path, tokenizer, figa_normalization="micro")
        assert difference(summed, gradient) > 0.05

    @pytest.mark.slow
    def test_two_processes(self, tmp_path, monkeypatch):
        import two_processes_tokens  # which imports this file

        apart = two_processes_tokens.check(monkeypatch, "figa", tmp_path)
        assert apart.pop("figa micro") > 0.05
        assert max(apart.values()) < 1e-5


def test_metrics(tmp_path, tokenizer):
    trainer = trainer_of(tmp_path, tokenizer, nll_cut=6.0, max_steps=1)
    assert trainer.ref_model is None
    trainer.train()
    entry = trainer.state.log_history[0]
    rows = list(trainer.train_dataset)
    good, bad = (sum(sum(row[name]) for row in rows) for name in ("good_tokens", "bad_tokens"))
    assert entry["figa/good_tokens"] == pytest.approx(good / 4)
    assert entry["figa/bad_tokens"] == pytest.approx(bad / 4)
    assert 0 < entry["figa/kept_bad"] < 1
    total = good * entry["figa/good_nll"]
    assert entry["loss"] < total / (good + bad)
    assert entry["rewards/chosen"] < 0


def test_chat_template_writes_behind_the_end(tmp_path, tokenizer):
    """The first end-of-sequence token is good, the line break behind it is left alone."""
    data = tiny.conversational_preference_data()
    trainer = trainer_of(tmp_path, tokenizer, data)
    for row in trainer.train_dataset:
        ids = np.array(row["chosen_ids"])
        first = (ids == tokenizer.eos_token_id).nonzero()[0][0]
        assert first == len(ids) - 2
        assert row["good_tokens"][first:] == [1, 0]
        assert row["bad_tokens"][-2:] == [0, 0]


def test_streams_and_evaluation(tmp_path, tokenizer):
    data = edits(8)
    trainer = trainer_of(
        tmp_path, tokenizer, data.to_iterable_dataset(), eval_dataset=data.select(range(4)), max_steps=2
    )
    trainer.train()
    first = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(data.select(range(4)))["eval_loss"] == pytest.approx(first)


def test_truncation(tmp_path, tokenizer):
    trainer = trainer_of(tmp_path, tokenizer, max_length=24, nll_cut=9.0)
    assert math.isfinite(loss_and_gradients(trainer)[0])


def test_the_choice_among_equal_alignments_stays():
    """Several keep as many tokens; another choice would mark the data of a resumed run anew."""
    good, bad = edit_masks([2, 1, 0, 2, 0, 0, 2], [2, 2, 2, 0, 2, 1], "indel")
    assert good.tolist() == [False, False, True, False, False, True]
    assert bad.tolist() == [False, True, True, False, True, False, False]


class TestMarksOfYourOwn:
    def data(self, tokenizer, **change):
        def mark(row):
            b, a = (len(tokenizer(row[kind])["input_ids"]) + 1 for kind in ("chosen", "rejected"))
            return {"good_tokens": [1.0] * b, "bad_tokens": [0.5] * a} | change

        return edits().map(mark)

    def test_are_used(self, tmp_path, tokenizer):
        trainer = trainer_of(tmp_path, tokenizer, self.data(tokenizer), nll_cut=math.inf)
        assert all(set(row["bad_tokens"]) == {0.5} for row in trainer.train_dataset)
        loss, _ = loss_and_gradients(trainer)
        total, count = 0.0, 0
        twin = double(trainer.model)
        for row in edits():
            for kind, sign in (("chosen", -1.0), ("rejected", 0.25)):
                logps = token_logps(twin, tokenizer, row["prompt"], row[kind])
                total, count = total + sign * logps.sum().item(), count + len(logps)
        assert loss == pytest.approx(total / count, rel=1e-5)

    def test_wrong(self, tmp_path, tokenizer):
        with pytest.raises(ValueError, match="has the column 'good_tokens' but not the other one"):
            trainer_of(tmp_path, tokenizer, self.data(tokenizer).remove_columns("bad_tokens"))
        with pytest.raises(ValueError, match="the first row: column 'bad_tokens' holds 1 numbers, and 'rejected' has"):
            trainer_of(tmp_path, tokenizer, self.data(tokenizer, bad_tokens=[0.5]))
        with pytest.raises(ValueError, match=r"column 'good_tokens' holds 1.5, expected a finite number in \[0, 1\]"):
            trainer_of(
                tmp_path,
                tokenizer,
                self.data(tokenizer).map(lambda row: {"good_tokens": [1.5] * len(row["good_tokens"])}),
            )
        with pytest.raises(ValueError, match=r"column 'bad_tokens' holds 3.0, expected a finite number in \[0, 1\]"):
            trainer_of(tmp_path, tokenizer, self.data(tokenizer, bad_tokens=[3.0]))
        with pytest.raises(
            ValueError, match="`align='indel'` has no effect on `train_dataset`, which has the columns"
        ):
            trainer_of(tmp_path, tokenizer, self.data(tokenizer), align="indel")

    @pytest.mark.parametrize("normalization", ["step", "micro"])
    @pytest.mark.parametrize("marked", [1, 0])
    def test_one_token_of_a_batch_or_none(self, tmp_path, tokenizer, normalization, marked):
        rows = self.data(tokenizer).to_list()
        for row in rows:
            row |= {name: [0.0] * len(row[name]) for name in ("good_tokens", "bad_tokens")}
        rows[1]["good_tokens"][2] = float(marked)
        trainer = trainer_of(tmp_path, tokenizer, Dataset.from_list(rows), figa_normalization=normalization)
        nll = -token_logps(double(trainer.model), tokenizer, rows[1]["prompt"], rows[1]["chosen"])[2].item()
        assert loss_and_gradients(trainer)[0] == pytest.approx(marked * nll, rel=1e-5)

    def test_in_tokenized_rows(self, tmp_path, tokenizer):
        """They were marked by someone else, unless this trainer has made them."""
        data = edits()
        trainer = trainer_of(tmp_path / "a", tokenizer, data, eval_dataset=data, align="indel")
        assert trainer.evaluate(trainer.eval_dataset)["eval_loss"] == trainer.evaluate()["eval_loss"]
        with pytest.raises(
            ValueError, match="`align='indel'` has no effect on `train_dataset`, which has the columns"
        ):
            trainer_of(tmp_path / "b", tokenizer, trainer.train_dataset, align="indel")


def test_equal_answers_are_dropped(tmp_path, tokenizer):
    rows = edits().to_list()
    rows[1]["rejected"] = rows[1]["chosen"]
    assert len(trainer_of(tmp_path, tokenizer, Dataset.from_list(rows)).train_dataset) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"good_weight": 0.0}, r"`good_weight=0.0` is out of range: it must lie in \(0, inf\)"),
        ({"bad_weight": -0.5}, "`bad_weight=-0.5` is out of range"),
        ({"other_weight": -1.0}, "`other_weight=-1.0` is out of range"),
        ({"nll_cut": 0.0}, "`nll_cut=0.0` is out of range"),
        ({"nll_cut": float("nan")}, "`nll_cut=nan` is out of range"),
        ({"figa_nll_floor": 0.6}, "`figa_nll_floor=0.6` must be less than `nll_cut=0.6`"),
        ({"bad_weight": 0.0, "nll_cut": 1.0}, "`nll_cut=1.0` has no effect with `bad_weight=0`"),
        ({"align": "words"}, "`align='words'` is not known. Choose one of: 'levenshtein', 'indel'"),
        ({"figa_normalization": "row"}, "`figa_normalization='row'` is not known"),
        ({"beta": 0.5}, "`beta=0.5` has no effect on this method's loss"),
        ({"ld_alpha": 0.5}, "`ld_alpha=0.5` has no effect on this method's loss"),
        ({"loss_type": "ipo"}, "`loss_type='ipo'` has no effect on this method's loss"),
        (
            {"precompute_ref_log_probs": True},
            "`precompute_ref_log_probs=True` has no effect without a reference model",
        ),
    ],
)
def test_wrong_options(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        FIGAConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)
