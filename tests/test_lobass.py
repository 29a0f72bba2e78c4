"""Selections of rows by their losses: the score of LoBaSS, the selections beside it, which rows are kept, a toy."""

import heapq
import math
import re
import tracemalloc
import warnings

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset, Value
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from trl_ift import data
from trl_ift.data import score_dataset
from trl_ift.data.lobass import DEFAULT_FRACTION, SELECTIONS, learnability, select_top, selection_scores, top_rows


# The worked example: log-probabilities of the tokens of four rows
INITIAL = [[-2, -1, -3], [-0.2, -0.1], [-4, -5, -4.5, -4.5], [-3, -2, -1, -2]]
REFERENCE = [[-0.5, -0.4, -0.9], [-0.15, -0.09], [-3.8, -4.9, -4.4, -4.4], [-1.5, -1.6, -1.1, -1.2]]
NAN = float("nan")


def scores_of(nll_sum, counts=None, row_hashes=None, token_hashes=None):
    """Scores as `score_dataset` returns them."""
    nll_sum = np.asarray(nll_sum, dtype=np.float64)
    counts = np.full(len(nll_sum), 4) if counts is None else np.asarray(counts)
    return Dataset.from_dict(
        {
            "index": list(range(len(nll_sum))),
            "row_hash": row_hashes or [f"row-{i}" for i in range(len(nll_sum))],
            "token_hash": token_hashes or [f"tokens-{i}" for i in range(len(nll_sum))],
            "num_tokens": counts.tolist(),
            "nll_sum": nll_sum.tolist(),
            "nll": (nll_sum / np.where(counts == 0, 1, counts)).tolist(),
        }
    )


def of_means(means, counts=None):
    counts = np.full(len(means), 4) if counts is None else np.asarray(counts)
    return scores_of(np.asarray(means, dtype=np.float64) * counts, counts)


def example():
    rows = [[-sum(row) for row in log_probs] for log_probs in (INITIAL, REFERENCE)]
    counts = [len(row) for row in INITIAL]
    return scores_of(rows[0], counts), scores_of(rows[1], counts)


def order(scores):
    return np.argsort(-scores, kind="stable").tolist()


# ---------------------------------------------------------------- the score


def test_worked_example():
    initial, reference = example()
    np.testing.assert_allclose(initial["nll"][:], [2, 0.15, 4.5, 2], atol=1e-12)
    np.testing.assert_allclose(reference["nll"][:], [0.6, 0.12, 4.375, 1.35], atol=1e-12)
    score = learnability(initial, reference)
    assert score.dtype == np.float64
    assert score.shape == (4,)
    np.testing.assert_allclose(score, [0.7, 0.2, 0.0277777778, 0.325], atol=1e-10)
    np.testing.assert_allclose(learnability(initial, reference, None), [1.4, 0.03, 0.125, 0.65], atol=1e-12)
    np.testing.assert_allclose(learnability(initial, reference, None, "sum"), [4.2, 0.06, 0.5, 2.6], atol=1e-12)
    np.testing.assert_allclose(
        learnability(initial, reference, "reference"), [2.3333333333, 0.25, 0.0285714286, 0.4814814815], atol=1e-10
    )
    assert top_rows(score, fraction=0.5).tolist() == [0, 3]
    subset = select_top(Dataset.from_dict({"text": list("abcd")}), score, fraction=0.5)
    assert subset["text"][:] == ["a", "d"]


@pytest.mark.parametrize("normalize", ["initial", "reference"])
def test_sums_and_means_give_the_same(normalize):
    """Of datasets under either name, and of arrays of sums or of means."""
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 50, 40)
    before, after = rng.uniform(0.1, 9, 40), rng.uniform(0.1, 9, 40)
    expected = learnability(before, after, normalize)
    for found in (
        learnability(before * counts, after * counts, normalize),
        learnability(of_means(before, counts), of_means(after, counts), normalize, "sum"),
        learnability(of_means(before, counts), of_means(after, counts), normalize, "mean"),
        learnability(of_means(before, counts), after * counts, normalize),
        learnability(list(before), list(after), normalize),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    sums = learnability(of_means(before, counts), of_means(after, counts), None, "sum")
    means = learnability(of_means(before, counts), of_means(after, counts), None, "mean")
    np.testing.assert_allclose(sums, means * counts, rtol=1e-12)
    assert not np.allclose(sums, means)


def test_both_divisors_give_the_same_order():
    rng = np.random.default_rng(1)
    before, after = rng.uniform(0.01, 9, 500), rng.uniform(0.01, 9, 500)
    first, second = learnability(before, after), learnability(before, after, "reference")
    assert order(first) == order(second)
    assert order(first) != order(learnability(before, after, None))
    np.testing.assert_allclose(second, before / after - 1, rtol=1e-12)
    assert top_rows(first, 0.3).tolist() == top_rows(second, 0.3).tolist()


def test_identities_are_exact():
    losses = np.random.default_rng(2).uniform(1e-6, 300, 1000)
    for normalize in ("initial", "reference", None):
        score = learnability(losses, losses, normalize)
        assert (score == 0).all()
    assert (learnability(losses, np.zeros(1000)) == 1).all()
    assert top_rows(learnability(losses, losses), 0.01).tolist() == list(range(10))  # the tie rule


def test_monotone_in_both_losses():
    losses = np.linspace(0.01, 12, 400)
    assert (np.diff(learnability(np.full(400, 3.0), losses)) < 0).all()
    assert (np.diff(learnability(losses, np.full(400, 3.0))) > 0).all()
    assert (learnability(losses, np.full(400, 3.0)) < 1).all()
    assert ((learnability(losses, np.full(400, 3.0)) < 0) == (losses < 3)).all()  # made worse


def test_values_that_are_not_finite():
    inf = math.inf
    before = np.array([0.0, 0.0, 1.0, NAN, 1.0, inf, 1.0, 2.0])
    after = np.array([1.0, 0.0, NAN, 1.0, inf, 1.0, 0.0, 1.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for normalize, expected in (
            ("initial", [NAN, NAN, NAN, NAN, NAN, NAN, 1.0, 0.5]),
            ("reference", [-1.0, NAN, NAN, NAN, NAN, NAN, NAN, 1.0]),
            (None, [-1.0, 0.0, NAN, NAN, NAN, NAN, 1.0, 1.0]),
        ):
            np.testing.assert_array_equal(learnability(before, after, normalize), expected)
            np.testing.assert_array_equal(
                learnability(scores_of(before), scores_of(after), normalize, "sum"), expected
            )


def test_other_scores_are_refused():
    initial = example()[0]
    hashes = [*initial["row_hash"][:3], "other"]
    tokens = [initial["token_hash"][0], "a", "b", initial["token_hash"][3]]
    sums, counts = initial["nll_sum"][:], initial["num_tokens"][:]
    reordered = initial.select([1, 0, 2, 3])
    for other, expected in (
        (initial.select(range(3)), "4 rows and 3 rows. Score the same dataset"),
        (scores_of(sums, counts, row_hashes=hashes), "1 of 4 rows differ, the first is row 3; they are of different"),
        (reordered, "2 of 4 rows differ, the first is row 0; they are of different datasets, or of another order"),
        (scores_of(sums, counts, token_hashes=tokens), "2 of 4 rows differ, the first is row 1; the tokenizer"),
        ([1.0, 2.0], "4 rows and 2 rows"),
    ):
        with pytest.raises(ValueError, match=re.escape(expected)):
            learnability(initial, other)
        if isinstance(other, Dataset):
            with pytest.raises(ValueError, match="do not belong together"):
                selection_scores("ifd", initial, direct=other)
    with pytest.raises(ValueError, match=r"normalize='length'.*'initial', 'reference'"):
        learnability(initial, initial, "length")
    with pytest.raises(ValueError, match=r"reduction='max'.*'mean', 'sum'"):
        learnability(initial, initial, reduction="max")


def test_scores_of_other_tokens_are_refused(tokenizer):
    """Real scores: another dataset, another order, another tokenizer, another truncation; other models are no obstacle."""
    rows, model = tiny.prompt_completion_data(), tiny.model("llama", tokenizer)
    initial = score_dataset(model, rows, processing_class=tokenizer)
    other_eos = tiny.tokenizer()
    other_eos.eos_token = "<|endoftext|>"
    score = learnability(
        initial, score_dataset(tiny.model("llama", tokenizer, seed=1), rows, processing_class=tokenizer)
    )
    assert np.isfinite(score).all()
    assert np.abs(score).min() > 0
    options = {"processing_class": tokenizer}
    for other, expected in (
        (
            score_dataset(model, rows.select(range(7, -1, -1)), **options),
            "8 of 8 rows differ, the first is row 0; they",
        ),
        (
            score_dataset(model, rows, processing_class=other_eos),
            "8 of 8 rows differ, the first is row 0; the tokenizer",
        ),
        (score_dataset(model, rows, args=data.scoring.RowOptions(max_length=25), **options), "the truncation or the"),
        (
            score_dataset(model, rows, args=data.scoring.RowOptions(completion_only_loss=False), **options),
            "the masking",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(expected)):
            learnability(initial, other)


# ---------------------------------------------------------------- the selections beside it


def test_ifd_and_superfiltering():
    """The numbers of the worked example: ratios that are not the same ranking."""
    conditional, direct = of_means([1.2, 2.0, 0.4]), of_means([1.5, 1.9, 0.41])
    np.testing.assert_allclose(
        selection_scores("ifd", conditional, direct=direct), [0.8, NAN, 0.9756097561], atol=1e-10
    )
    found = selection_scores("superfiltering", conditional, direct=direct)
    np.testing.assert_allclose(found, [0.7408182207, NAN, 0.9900498337], atol=1e-10)
    # what is dropped, from the other side
    swapped = selection_scores("ifd", direct, direct=conditional)
    np.testing.assert_allclose(swapped, [NAN, 1 / 1.0526315789, NAN], atol=1e-9)
    swapped = selection_scores("superfiltering", direct, direct=conditional)
    np.testing.assert_allclose(swapped, [NAN, 1 / 1.1051709181, NAN], atol=1e-9)
    # not the same ranking: ratio against difference
    pair, alone = of_means([0.1, 3.0]), of_means([0.2, 4.0])
    assert order(selection_scores("ifd", pair, direct=alone)) == [1, 0]
    assert order(selection_scores("superfiltering", pair, direct=alone)) == [0, 1]


def test_dropping_rules_of_ifd_and_superfiltering():
    """A ratio of exactly 1 is kept by IFD and dropped by superfiltering; a loss of 0 alone gives no ratio."""
    conditional, direct = of_means([1.0, 1.0, 0.5, 0.0, 0.0]), of_means([1.0, 0.5, 0.0, 0.0, 1.0])
    np.testing.assert_array_equal(selection_scores("ifd", conditional, direct=direct), [1.0, NAN, NAN, NAN, 0.0])
    found = selection_scores("superfiltering", conditional, direct=direct)
    np.testing.assert_allclose(found, [NAN, NAN, NAN, NAN, math.exp(-1)], atol=1e-12)
    large = selection_scores("superfiltering", of_means([2000.0, 1.0]), direct=of_means([1.0, 2000.0]))
    np.testing.assert_array_equal(large, [NAN, 0.0])


def test_means_are_compared_not_sums():
    """With other counts under the two models (impossible for `score_dataset`) sums would give other numbers."""
    conditional, direct = of_means([1.0, 2.0], [2, 8]), of_means([2.0, 3.0], [2, 8])
    np.testing.assert_allclose(
        selection_scores("superfiltering", conditional, direct=direct), [math.exp(-1)] * 2, atol=1e-12
    )


def test_lobass_and_rho_lm():
    initial, reference = example()
    np.testing.assert_array_equal(selection_scores("lobass", initial, reference), learnability(initial, reference))
    np.testing.assert_array_equal(
        selection_scores("lobass", initial, reference, normalize="reference"),
        learnability(initial, reference, "reference"),
    )
    np.testing.assert_allclose(selection_scores("rho_lm", initial, reference), [4.2, 0.06, 0.5, 2.6], atol=1e-12)


def test_length_and_perplexity():
    rows = of_means([1.0, 5.0, 3.0, 2.0, 4.0], [3, 9, 4, 9, 1])
    assert selection_scores("length", rows).tolist() == [3, 9, 4, 9, 1]
    assert top_rows(selection_scores("length", rows), k=2).tolist() == [1, 3]
    np.testing.assert_allclose(selection_scores("perplexity", rows, band="high"), np.exp(rows["nll"][:]))
    kept = {band: selection_scores("perplexity", rows, band=band) for band in ("low", "middle", "high")}
    assert {band: top_rows(score, k=2).tolist() for band, score in kept.items()} == {
        "low": [0, 3],
        "middle": [2, 3],  # rank 2 of 0..4, then the tie of ranks 1 and 3: the lower index
        "high": [1, 4],
    }
    assert top_rows(kept["middle"], k=3).tolist() == [2, 3, 4]
    assert top_rows(selection_scores("perplexity", rows), k=2).tolist() == [0, 3]
    with pytest.raises(ValueError, match="`band='top'` is not known. Choose one of: 'low', 'middle', 'high'"):
        selection_scores("perplexity", rows, band="top")


def test_middle_band_leaves_out_rows_without_a_score():
    rows = of_means([1.0, NAN, 3.0, 9.0, 2.0])
    score = selection_scores("perplexity", rows, band="middle")
    np.testing.assert_array_equal(score, [-1.5, NAN, -0.5, -1.5, -0.5])


def test_random():
    rows = of_means(np.ones(1000))
    first = selection_scores("random", rows)
    np.testing.assert_array_equal(first, selection_scores("random", rows, seed=0))
    other = selection_scores("random", rows, seed=1)
    assert len(set(first)) == 1000
    overlap = len(set(top_rows(first, 0.1)) & set(top_rows(other, 0.1)))
    assert overlap < 30  # 10 are expected
    assert 0.4 < first.mean() < 0.6


@pytest.mark.parametrize("selection", SELECTIONS)
def test_rows_without_a_score_are_never_selected(selection):
    means = np.linspace(1, 2, 10)
    means[[2, 7]] = NAN
    initial, reference, direct = of_means(means), of_means(means * 0.9), of_means(means * 1.1)
    score = selection_scores(selection, initial, reference, direct)
    assert score.dtype == np.float64
    assert np.flatnonzero(np.isnan(score)).tolist() == [2, 7]
    with pytest.warns(UserWarning, match="Selected 8 rows in place of 9"):
        assert top_rows(score, k=9).tolist() == [0, 1, 3, 4, 5, 6, 8, 9]
    # nor where the other scores lack them
    needs = SELECTIONS[selection].needs
    full = {"reference": of_means(np.linspace(0.9, 1.9, 10)), "direct": of_means(np.linspace(1.1, 2.1, 10))}
    lacking = {"reference": reference, "direct": direct}
    for name in needs:
        score = selection_scores(selection, of_means(np.linspace(1, 2, 10)), **(full | {name: lacking[name]}))
        assert np.flatnonzero(np.isnan(score)).tolist() == [2, 7]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_what_a_selection_needs(selection):
    initial = of_means([1.0, 2.0])
    assert set(SELECTIONS[selection].needs) <= {"reference", "direct"}
    given = {"reference": of_means([0.5, 1.0]), "direct": of_means([2.0, 3.0])}
    for missing in SELECTIONS[selection].needs:
        with pytest.raises(ValueError, match=f"The selection '{selection}' needs the scores `{missing}`"):
            selection_scores(selection, initial, **{k: v for k, v in given.items() if k != missing})
    needed = {name: given[name] for name in SELECTIONS[selection].needs}
    assert np.isfinite(selection_scores(selection, initial, **needed)).all()
    assert SELECTIONS[selection].summary
    assert SELECTIONS[selection].dropped


def test_unknown_selection():
    with pytest.raises(
        ValueError, match=r"`selection='less'` is not known. Choose one of: 'lobass', 'rho_lm', 'random'"
    ):
        selection_scores("less", of_means([1.0]))


def test_public_names():
    for name in (
        "learnability",
        "select_top",
        "selection_scores",
        "top_rows",
        "score_dataset",
        "load_scores",
        "Scorer",
    ):
        assert name in data.__all__
        assert callable(getattr(data, name))
    assert data.SELECTIONS is SELECTIONS


# ---------------------------------------------------------------- the rows that are kept


def brute(scores, k, largest=True):
    """The rule, spelt out: the best first, ties to the lower index, NaN never; in ascending order."""
    finite = [i for i, score in enumerate(scores) if math.isfinite(score)]
    best = sorted(finite, key=lambda i: (-scores[i] if largest else scores[i], i))[:k]
    return sorted(best)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_top_rows_of_ties_and_gaps(seed, largest):
    rng = np.random.default_rng(seed)
    scores = rng.integers(-3, 4, 60).astype(float)
    scores[rng.random(60) < 0.2] = NAN
    scores[rng.random(60) < 0.1] = rng.choice([-math.inf, math.inf])
    finite = int(np.isfinite(scores).sum())
    for k in (1, 2, 7, finite - 1, finite):
        found = top_rows(scores, k=k, largest=largest)
        assert found.dtype == np.int64
        assert found.tolist() == brute(scores, k, largest)
        assert top_rows(iter(scores), k=k, largest=largest).tolist() == found.tolist()
        assert top_rows(scores.tolist(), k=k, largest=largest).tolist() == found.tolist()
        assert top_rows(torch.tensor(scores), k=k, largest=largest).tolist() == found.tolist()


@pytest.mark.parametrize(
    ("number", "fraction", "k"),
    [
        (100, 0.29, 29),  # 0.29 * 100 is 28.999999999999996
        (100, 0.57, 57),
        (1000, 0.001, 1),
        (1000, 0.0019, 1),
        (1000, 0.999, 999),
        (52002, 0.06, 3120),
        (7, 0.5, 3),
        (3, 0.1, 1),  # at least one
        (1, 1e-9, 1),
        (9, 1.0, 9),
        (9, 1, 9),
        (50, None, 3),  # the paper's 6 percent
    ],
)
def test_fraction_is_rounded_down(number, fraction, k):
    found = top_rows(np.arange(number)[::-1], fraction)
    assert found.tolist() == list(range(k))


def test_fraction_counts_all_rows():
    """Also those without a score."""
    scores = np.array([NAN] * 5 + [1.0, 2.0, 3.0, 4.0, 5.0])
    assert top_rows(scores, 0.4).tolist() == [6, 7, 8, 9]
    with pytest.warns(UserWarning, match="Selected 5 rows in place of 8"):
        assert top_rows(scores, 0.8).tolist() == [5, 6, 7, 8, 9]
    assert DEFAULT_FRACTION == 0.06
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert top_rows(scores, 0.5).tolist() == [5, 6, 7, 8, 9]


def test_min_score():
    scores = [0.5, -0.1, 0.0, 0.9, -2.0, NAN]
    with pytest.warns(UserWarning, match="Selected 3 rows in place of 5"):
        assert top_rows(scores, k=5, min_score=0.0).tolist() == [0, 2, 3]
    assert top_rows(scores, k=2, min_score=0.0).tolist() == [0, 3]
    with pytest.warns(UserWarning, match="Selected 2 rows in place of 3"):
        assert top_rows(scores, k=3, min_score=-0.1, largest=False).tolist() == [1, 4]
    assert top_rows(scores, k=1, min_score=-0.1, largest=False).tolist() == [4]
    with pytest.raises(ValueError, match=r"none has a finite score, and reaches `min_score=1.0`"):
        top_rows(scores, k=1, min_score=1.0)
    for bad in (NAN, math.inf, True):
        with pytest.raises(ValueError, match="must be a finite number"):
            top_rows(scores, k=1, min_score=bad)


def test_a_stream_of_scores_is_not_held():
    def stream():
        for i in range(100_000):
            yield float(i * 7919 % 100_003)

    expected = sorted(i for _, i in heapq.nlargest(5, ((s, i) for i, s in enumerate(stream()))))
    tracemalloc.start()
    try:
        assert top_rows(stream(), k=5).tolist() == expected
        assert tracemalloc.get_traced_memory()[1] < 200_000  # a list of all would take millions
    finally:
        tracemalloc.stop()
    assert top_rows(iter([1.0, 2.0]), k=1).tolist() == [1]
    with pytest.warns(UserWarning, match="Selected 2 rows in place of 3"):
        assert top_rows(iter([1.0, 2.0]), k=3).tolist() == [0, 1]
    with pytest.raises(ValueError, match="of a stream, whose length is not known: give `k`"):
        top_rows(iter([1.0]), fraction=0.5)
    with pytest.raises(ValueError, match="of a stream"):
        top_rows(iter([1.0]))


@pytest.mark.parametrize(
    ("options", "error", "expected"),
    [
        ({"fraction": 0}, ValueError, "`fraction=0` is out of range: it must lie in (0, 1]"),
        ({"fraction": -0.1}, ValueError, "`fraction=-0.1` is out of range"),
        ({"fraction": 1.01}, ValueError, "`fraction=1.01` is out of range"),
        ({"fraction": NAN}, ValueError, "`fraction=nan` is out of range"),
        ({"fraction": "0.5"}, TypeError, "`fraction` must be a number"),
        ({"fraction": 0.5, "k": 2}, ValueError, "`fraction=0.5` and `k=2` exclude each other. Drop one."),
        ({"k": 0}, ValueError, "`k=0` is out of range"),
        ({"k": 2.0}, TypeError, "`k` must be an integer"),
        ({"k": True}, TypeError, "`k` must be an integer"),
        ({"k": 4}, ValueError, "`k=4`, but there are only 3 rows. Lower it."),
        ({"scores": [NAN, NAN], "k": 1}, ValueError, "No row can be selected: none has a finite score."),
        ({"scores": []}, ValueError, "only 0 rows"),
    ],
    ids=str,
)
def test_bad_input(options, error, expected):
    options = {"scores": [1.0, 2.0, 3.0]} | options
    with pytest.raises(error) as caught:
        top_rows(**options)
    assert expected in str(caught.value)
    rows = Dataset.from_dict({"text": ["a"] * len(options["scores"])})
    with pytest.raises(error) as caught:
        select_top(rows, **options)
    assert expected in str(caught.value)


def test_select_top_keeps_order_and_rows():
    rows = Dataset.from_dict({"text": list("abcdefgh"), "extra": [{"n": i} for i in range(8)]})
    scores = [0.1, 0.9, NAN, 0.4, 0.9, 0.2, 0.8, 0.3]
    subset = select_top(rows, scores, k=4)
    assert subset["text"][:] == ["b", "d", "e", "g"]
    assert subset.features == rows.features
    assert subset["extra"][:] == [{"n": i} for i in (1, 3, 4, 6)]
    assert select_top(rows, scores, k=2, largest=False)["text"][:] == ["a", "f"]
    assert select_top(rows, scores, 0.25)["text"][:] == ["b", "e"]
    assert select_top(rows, np.array(scores), fraction=0.25)["text"][:] == ["b", "e"]
    with pytest.warns(UserWarning, match="Selected 3 rows in place of 6"):
        assert select_top(rows, scores, k=6, min_score=0.5)["text"][:] == ["b", "e", "g"]
    # of rows that were chosen and reordered before
    some = rows.select([7, 6, 5, 4])
    assert select_top(some, [1.0, 3.0, 2.0, 4.0], k=2)["text"][:] == ["g", "e"]


def test_the_whole_is_unchanged():
    rows = tiny.messages_data()
    scores = np.random.default_rng(0).random(8)
    whole = select_top(rows, scores, fraction=1.0)
    assert whole[:] == rows[:]
    assert whole.features == rows.features
    assert whole.data.table.equals(rows.data.table)  # no indices over a table: as fast to read
    assert whole._indices is None
    assert select_top(rows, scores, k=8)[:] == rows[:]


@pytest.mark.parametrize("known", [True, False])
def test_select_top_of_a_stream(known):
    rows = Dataset.from_dict({"text": list("abcdefgh")})
    scores = [0.1, 0.9, NAN, 0.4, 0.9, 0.2, 0.8, 0.3]
    stream = rows.to_iterable_dataset() if known else IterableDataset.from_generator(lambda: iter(rows))
    subset = select_top(stream, scores, fraction=0.5)
    assert isinstance(subset, Dataset)  # written down, so that no workers can count in their own shards
    for _ in range(2):  # it can be read again
        assert [row["text"] for row in subset] == ["b", "d", "e", "g"]
    if known:
        assert subset.features == {"text": Value("string")}
    assert [row["text"] for row in select_top(stream, iter(scores), k=2)] == ["b", "e"]


def test_select_top_of_a_stream_in_shards():
    """Workers of a data loader, and processes, that share the shards of a stream among them."""
    stream = Dataset.from_dict({"n": list(range(8))}).to_iterable_dataset(num_shards=2)
    subset = select_top(stream, [0.1, 0.9, NAN, 0.4, 0.9, 0.2, 0.8, 0.3], k=4)
    assert [row["n"] for row in subset] == [1, 3, 4, 6]
    assert sorted(row["n"] for row in DataLoader(subset, batch_size=None, num_workers=2)) == [1, 3, 4, 6]


def test_wrong_arguments_of_select_top():
    rows = Dataset.from_dict({"text": list("abc")})
    for scores in ([1.0, 2.0], [1.0] * 4, []):
        with pytest.raises(ValueError, match=f"`dataset` has 3 rows and there are {len(scores)} scores"):
            select_top(rows, scores, k=1)
    with pytest.raises(TypeError, match="`dataset` is a list; expected a `Dataset` or an `IterableDataset`"):
        select_top([{"text": "a"}], [1.0], k=1)
    with pytest.raises(ValueError, match="of a stream"):
        select_top(rows.to_iterable_dataset(), iter([1.0, 2.0, 3.0]), fraction=0.5)


# ---------------------------------------------------------------- a toy in which it is known what can be learnt


_KINDS = ("trivial", "learnable", "random")
_SYMBOLS, _FIRST = 32, 4


def toy_rows():
    """200 rows of each kind, with completions of 8, 16 and 32 tokens.

    Trivial: the same pattern each time. Learnable: counting from a start in steps, both of which the prompt names. Random:
    tokens without any rule.
    """
    rng = np.random.default_rng(0)
    rows, kinds = [], []
    for number, kind in enumerate(_KINDS):
        for i in range(200):
            places = np.arange((8, 16, 32)[i % 3])
            start, step, *noise = (
                int(rng.integers(_SYMBOLS)),
                int(1 + rng.integers(3)),
                *rng.integers(_SYMBOLS, size=2),
            )
            completion = {
                "trivial": places % 4,
                "learnable": (start + step * (places + 1)) % _SYMBOLS,
                "random": rng.integers(_SYMBOLS, size=len(places)),
            }[kind]
            ids = [_SYMBOLS + number, step, *noise, start, *completion]
            ids = [_FIRST + int(token) for token in ids]
            rows.append({"input_ids": ids, "labels": [-100] * 5 + ids[5:]})
            kinds.append(kind)
    order = rng.permutation(len(rows))
    return Dataset.from_list([rows[i] for i in order]), np.array(kinds)[order]


def toy_train(model, rows, seed):
    """400 steps of 16 rows."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence([torch.tensor(row[name]) for row in rows], True, value)
        for name, value in (("input_ids", 0), ("labels", -100))
    )
    model.train()
    for _ in range(400):
        batch = torch.randint(len(ids), (16,), generator=generator)
        model(input_ids=ids[batch], labels=labels[batch]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def spearman(scores, counts):
    """Rank correlation; the counts have three values only, whose ranks are equally spaced."""
    ranks = np.argsort(np.argsort(scores))
    return np.corrcoef(ranks, np.searchsorted(np.unique(counts), counts))[0, 1]


@pytest.mark.slow
def test_toy(tokenizer):
    """Among the best 100 of 600 rows, the normalised score keeps what can be learnt; without normalisation, what is long."""
    rows, kinds = toy_rows()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64,
        )
    )  # fmt: skip
    toy_train(model, rows.select(np.flatnonzero(kinds == "trivial")), seed=1)
    initial = score_dataset(model, rows, processing_class=tokenizer)
    toy_train(model, rows, seed=2)
    reference = score_dataset(model, rows, processing_class=tokenizer)
    lengths = np.array(initial["num_tokens"][:])
    assert set(lengths) == {8, 16, 32}

    scores = {
        "normalised": selection_scores("lobass", initial, reference),
        "unnormalised sum": selection_scores("rho_lm", initial, reference),
        "high perplexity": selection_scores("perplexity", initial, band="high"),
        "low perplexity": selection_scores("perplexity", initial),
    }
    kept = {}
    for name, score in scores.items():
        top = top_rows(score, k=100)
        kept[name] = {kind: int((kinds[top] == kind).sum()) for kind in _KINDS}
        print(f"{name}: {kept[name]}, Spearman with length {spearman(score, lengths):.2f}")
    means = {kind: scores["normalised"][kinds == kind].mean() for kind in _KINDS}
    print("mean S:", {kind: round(float(mean), 2) for kind, mean in means.items()})

    assert kept["normalised"]["learnable"] >= 90
    assert kept["unnormalised sum"]["learnable"] < 90
    assert kept["unnormalised sum"]["random"] > 10
    assert kept["high perplexity"]["learnable"] < 90
    assert kept["low perplexity"]["trivial"] >= 95
    assert means["trivial"] < means["random"] < means["learnable"]
    assert abs(spearman(scores["normalised"], lengths)) < 0.2 < spearman(scores["unnormalised sum"], lengths)
