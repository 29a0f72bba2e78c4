"""The statistics of a study: worked numbers, invariances, and how often the intervals cover the truth."""

import math
import time

import numpy as np
import pytest

from trl_ift.study import statistics
from trl_ift.study.measures import Measure, mean_of
from trl_ift.study.statistics import (
    Difference,
    document_interval,
    holm,
    paired_difference,
    stderr_of_share,
    t_interval,
    t_p_value,
    t_quantile,
    verdict,
)


def measure(items, weights=None, documents="d", unit="share", better="higher"):
    return mean_of(items, "A measure", "group", unit, better, weights=weights, documents=documents)


def plain(value, unit="score", better="higher"):
    """A measure without items."""
    return Measure(value, "A measure", "group", unit, better)


def runs(seeds=3, documents=100, shift=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return [measure(rng.normal(shift, 1, documents)) for _ in range(seeds)]


# ---------------------------------------------------------------- Student's t, shares


def test_t_interval_of_a_worked_example():
    found = t_interval([0.42, 0.45, 0.40])
    assert found.mean == pytest.approx(0.4233333333, abs=1e-10)
    assert found.sd == pytest.approx(0.0251661148, abs=1e-10)
    assert (found.low, found.high) == pytest.approx((0.3608172385, 0.4858494281), abs=1e-10)


@pytest.mark.parametrize(
    ("level", "degrees", "t"),
    [
        (0.95, 1, 12.7062047362),
        (0.95, 2, 4.3026527297),
        (0.95, 4, 2.7764451052),
        (0.95, 30, 2.0422724563),
        (0.99, 10, 3.1692726726),
        (0.999, 1, 636.6192487688),
        (0.9, 7, 1.8945786051),
        (0.95, 1e6, 1.9599663567),
    ],
)
def test_t_quantile(level, degrees, t):
    assert t_quantile(level, degrees) == pytest.approx(t, rel=1e-9)
    assert t_p_value(t, degrees) == pytest.approx(1 - level, rel=1e-7)


@pytest.mark.parametrize("degrees", [1, 2, 5, 40, 1000])
def test_t_quantile_grows_with_the_level_and_inverts_the_p_value(degrees):
    found = [t_quantile(level, degrees) for level in (0.01, 0.5, 0.8, 0.95, 0.999)]
    assert found == sorted(found)
    assert [1 - t_p_value(t, degrees) for t in found] == pytest.approx([0.01, 0.5, 0.8, 0.95, 0.999])
    assert t_p_value(0, degrees) == 1


def test_t_interval_at_the_edge():
    assert t_interval([0.4]) == statistics.Interval(0.4, None, None, None)
    assert math.isnan(t_interval([]).mean)
    assert t_interval([0.42, math.nan, 0.45, 0.40]) == t_interval([0.42, 0.45, 0.40])
    same = t_interval([0.3, 0.3])
    assert (same.sd, same.low, same.high) == (0, 0.3, 0.3)
    for level in (0, 1, 1.5, -0.1):
        with pytest.raises(ValueError, match="level"):
            t_interval([1, 2], level)


def test_stderr_of_share():
    assert stderr_of_share(0.42, 1319) == pytest.approx(0.0135950540, abs=1e-10)
    outcomes = np.repeat([1.0, 0.0], [42, 58])
    assert stderr_of_share(0.42, 100) == pytest.approx(outcomes.std(ddof=1) / 10)
    assert math.isnan(stderr_of_share(0.5, 1))


# ---------------------------------------------------------------- one run


def test_document_interval_of_a_mean_is_a_t_interval():
    items = np.random.default_rng(0).normal(2, 1, 50)
    found, expected = document_interval(measure(items, unit="nats")), t_interval(list(items))
    assert (found.mean, found.sd, found.low, found.high) == pytest.approx(
        (expected.mean, expected.sd, expected.low, expected.high)
    )


def test_document_interval_of_a_weighted_mean_is_near_the_bootstrap():
    rng = np.random.default_rng(0)
    items, weights = rng.gamma(2, 1, 300), rng.integers(5, 200, 300)
    found = document_interval(measure(items, weights, unit="nats/token"))
    drawn = rng.integers(0, 300, (4000, 300))
    means = (items * weights)[drawn].sum(1) / weights[drawn].sum(1)
    assert found.mean == pytest.approx((items * weights).sum() / weights.sum())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.02)


def test_document_interval_of_a_share_is_wilsons():
    found = document_interval(measure([1.0] * 8 + [0.0] * 2))
    assert (found.low, found.high) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    none, every = document_interval(measure([0.0] * 200)), document_interval(measure([1.0] * 200))
    assert (none.low, none.high) == pytest.approx((0, 0.018846), abs=1e-5)
    assert (every.low, every.high) == pytest.approx((0.981154, 1), abs=1e-5)
    assert none.low <= none.mean
    assert every.high >= every.mean


def test_document_interval_without_documents():
    for one in (plain(0.5), measure([0.3]), measure([1.0, 2.0], weights=[0, 0])):
        assert document_interval(one).low is None
    holes = Measure(0.5, "A measure", "group", "nats", None, (None, 1.0, 2.0, 4.0), None, "d")
    expected = document_interval(measure([1.0, 2.0, 4.0], unit="nats"))
    assert document_interval(holes) == expected


# ---------------------------------------------------------------- paired differences


def test_no_difference_of_a_run_with_itself():
    for given in (runs(), runs(1), [measure([0, 1, 1], weights=[3, 1, 0.1])]):
        found = paired_difference(given, given)
        assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_difference_is_antisymmetric_and_repeatable(seeds):
    a, b = runs(seeds, seed=1, shift=0.3), runs(seeds, seed=2)
    one, other = paired_difference(a, b), paired_difference(b, a)
    assert (other.value, other.low, other.high) == pytest.approx((-one.value, -one.high, -one.low))
    assert other.p == one.p
    assert paired_difference(a, b) == one
    assert paired_difference(a, b, seed=1) != one
    assert one.value == pytest.approx(np.mean([x.value - y.value for x, y in zip(a, b, strict=True)]))
    assert one.low < one.value < one.high
    assert (one.documents, one.seeds) == (100, seeds)
    assert one.kind == ("documents and seeds" if seeds > 1 else "documents")


def test_order_of_documents_does_not_matter():
    order = np.random.default_rng(3).permutation(100)
    a, b = runs(seed=1, shift=0.3), runs(seed=2)
    one = paired_difference(a, b, resamples=20000)
    shuffled = [[measure(np.array(run.items)[order]) for run in side] for side in (a, b)]
    other = paired_difference(*shuffled, resamples=20000)
    assert other.value == pytest.approx(one.value)
    assert (other.low, other.high) == pytest.approx((one.low, one.high), abs=0.01)


def test_pairing_takes_out_what_documents_have_in_common():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 5, 200)
    a, b = ([measure(hard + shift + rng.normal(0, 0.1, 200), unit="nats")] for shift in (0.1, 0))
    found = paired_difference(a, b)
    assert 0.05 < found.low < found.high < 0.15
    assert found.p < 0.001
    # The interval of each alone is fifty times as wide
    alone = document_interval(a[0])
    assert alone.high - alone.low > 1


def test_one_run_is_a_paired_t_interval():
    a, b = runs(1, 300, 0.1, seed=1), runs(1, 300, seed=2)
    found = paired_difference(a, b, resamples=40000)
    expected = t_interval(list(np.subtract(a[0].items, b[0].items)))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.01)
    statistic = expected.mean / (expected.sd / math.sqrt(300))
    assert found.p == pytest.approx(t_p_value(statistic, 299), abs=0.02)


def test_seeds_alone_give_the_t_interval_of_runs():
    shifts = [0.10, 0.14, 0.11]
    base = runs(3, 500, seed=2)
    a = [measure(np.array(run.items) + shift) for run, shift in zip(base, shifts, strict=True)]
    found, expected = paired_difference(a, base, resamples=40000), t_interval(shifts)
    assert found.kind == "documents and seeds"
    assert found.value == pytest.approx(expected.mean)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.005)


def test_weighted_measures_are_ratios_of_sums():
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 100, 150)
    a, b = rng.normal(1, 1, 150), rng.normal(0.5, 1, 150)
    found = paired_difference([measure(a, weights, unit="nats/token")], [measure(b, weights, unit="nats/token")])
    assert found.value == pytest.approx((a * weights).sum() / weights.sum() - (b * weights).sum() / weights.sum())
    drawn = rng.integers(0, 150, (5000, 150))
    draws = ((a - b) * weights)[drawn].sum(1) / weights[drawn].sum(1)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=0.03)
    # A document of no weight plays no part; equal weights are no weights
    more = [measure([*x, 1e6], [*weights, 0], unit="nats/token") for x in (a, b)]
    assert paired_difference(more[:1], more[1:]).value == pytest.approx(found.value)
    unweighted = paired_difference([measure(a)], [measure(b)])
    equal = paired_difference([measure(a, [7] * 150)], [measure(b, [7] * 150)])
    assert (equal.value, equal.low, equal.high) == pytest.approx((unweighted.value, unweighted.low, unweighted.high))


def test_one_baseline_for_all_seeds():
    a, b = runs(3, seed=1), runs(1, seed=2)
    assert paired_difference(a, b * 3).value == pytest.approx(np.mean([run.value for run in a]) - b[0].value)


def test_documents_without_a_value_are_left_out_everywhere():
    a, b = runs(2, seed=1), runs(2, seed=2)
    holes = [list(run.items) for run in a]
    holes[0][3], holes[1][7] = math.nan, None
    given = [Measure(0.0, "A measure", "group", "share", "higher", tuple(items), None, "d") for items in holes]
    found = paired_difference(given, b)
    kept = [i for i in range(100) if i not in (3, 7)]
    rest = [[measure(np.array(run.items)[kept]) for run in side] for side in (a, b)]
    expected = paired_difference(*rest)
    assert found.documents == 98
    assert (found.value, found.low, found.high) == pytest.approx((expected.value, expected.low, expected.high))


def test_without_items_the_interval_is_over_seeds():
    a, b = [plain(v) for v in (5.2, 5.6, 5.4)], [plain(v) for v in (5.0, 5.1, 5.15)]
    found, expected = paired_difference(a, b), t_interval([0.2, 0.5, 0.25])
    assert (found.value, found.low, found.high) == pytest.approx((expected.mean, expected.low, expected.high))
    assert found.p == pytest.approx(t_p_value(expected.mean / (expected.sd / math.sqrt(3)), 2))
    assert (found.kind, found.documents, found.seeds) == ("seeds", 0, 3)
    # Items whose documents are not known are not paired
    unknown = [[measure(np.arange(5.0) + i * i, documents=None) for i in side] for side in ((1, 2), (0, 1))]
    assert paired_difference(*unknown).kind == "seeds"


def test_without_items_and_seeds_there_is_no_interval():
    for a, b in (
        ([plain(5.2)], [plain(5.0)]),
        ([plain(5.2), plain(math.nan)], [plain(5.0), plain(5.0)]),
        ([plain(1.5), plain(2.5)], [plain(1.0), plain(2.0)]),  # the same twice: no spread to judge by
        ([measure([0.7])], [measure([0.2])]),
    ):
        found = paired_difference(a, b)
        assert (found.low, found.high, found.p, found.kind) == (None, None, None, "none")
        assert found.value > 0
        assert verdict(found, found.p) == "no difference shown"
    assert math.isnan(paired_difference([plain(math.nan)], [plain(1.0)]).value)


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_difference_that_all_documents_share_is_not_certain(seeds):
    right, half = measure([1.0] * 8), measure([0.5] * 8)
    found, mirrored = (
        paired_difference([right] * seeds, [half] * seeds),
        paired_difference([half] * seeds, [right] * seeds),
    )
    # The sign test, and the interval of Clopper and Pearson
    assert found.p == pytest.approx(2 / 2**8)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.025 ** (1 / 8) - 0.5, 0.5))
    assert (mirrored.value, mirrored.low, mirrored.high, mirrored.p) == pytest.approx(
        (-0.5, -found.high, -found.low, found.p)
    )
    assert verdict(paired_difference([measure([1.0] * 3)], [measure([0.0] * 3)]), 0.01) == "better"
    few = paired_difference([measure([1.0] * 3)], [measure([0.5] * 3)])
    assert few.p > 0.05
    assert few.low < 0


def test_measures_that_do_not_fit_are_refused():
    one = measure([0.0, 1.0])
    for other, words in (
        (measure([0.0, 1.0], documents="e"), "same documents"),
        (measure([0.0, 1.0], unit="nats"), "same unit"),
        (measure([0.0, 1.0, 1.0]), "different numbers of documents"),
    ):
        with pytest.raises(ValueError, match=words):
            paired_difference([one], [other])
    with pytest.raises(ValueError, match="found 1 and 2"):
        paired_difference([one], [one, one])
    with pytest.raises(ValueError, match="found 0 and 0"):
        paired_difference([], [])
    with pytest.raises(ValueError, match="level"):
        paired_difference([one], [one], level=95)


def test_many_documents_are_the_limit_of_the_bootstrap(monkeypatch):
    a, b = runs(3, 600, 0.05, seed=1), runs(3, 600, seed=2)
    bootstrap = paired_difference(a, b, resamples=20000)
    monkeypatch.setattr(statistics, "_MANY", 500)
    limit = paired_difference(a, b, resamples=20000)
    assert limit.value == bootstrap.value
    assert (limit.low, limit.high) == pytest.approx((bootstrap.low, bootstrap.high), abs=0.005)
    mirrored = paired_difference(b, a, resamples=20000)
    assert (mirrored.low, mirrored.high) == pytest.approx((-limit.high, -limit.low), abs=0.005)


@pytest.mark.parametrize(
    ("seeds", "of_documents", "of_seeds", "of_both", "weighted"),
    [
        (1, 1.0, 0.0, 0.0, False),
        (1, 1.0, 0.0, 0.0, True),
        (2, 0.5, 0.05, 0.5, False),
        (3, 0.5, 0.05, 0.5, True),
        (3, 0.05, 0.1, 0.05, False),  # drawing the runs with replacement would cover 75 %
        (5, 0.3, 0.05, 0.3, False),
    ],
)
def test_intervals_cover_the_truth(seeds, of_documents, of_seeds, of_both, weighted):
    rng = np.random.default_rng(5)
    covered, significant, n, times = 0, 0, 150, 250
    for _ in range(times):
        effect, hard = rng.normal(0, of_documents, n), rng.normal(0, 2, n)
        weights = rng.integers(5, 100, n) if weighted else None
        a, b = [], []
        for _ in range(seeds):
            base = hard + rng.normal(0, 0.3, n)
            b.append(measure(base, weights, unit="nats"))
            change = effect + rng.normal(0, of_seeds) + rng.normal(0, of_both, n)
            a.append(measure(base + change, weights, unit="nats"))
        found = paired_difference(a, b, resamples=800)
        covered += found.low <= 0 <= found.high
        significant += found.p < 0.01
    assert 0.9 <= covered / times <= 0.995
    assert significant / times <= 0.04


def test_bootstrap_is_quick():
    a, b = runs(3, 200, seed=1), runs(3, 200, seed=2)
    took = []
    for seed in range(3):  # another process may hold the machine up once
        before = time.perf_counter()
        paired_difference(a, b, seed=seed)
        took.append(time.perf_counter() - before)
    assert min(took) < 0.2


# ---------------------------------------------------------------- decisions


def test_holm_by_hand():
    # Ordered: 0.005 × 4, 0.01 × 3, 0.03 × 2, 0.04 × 1, none less than the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.01, None, 0.04, math.nan]) == [pytest.approx(0.02), None, pytest.approx(0.04), None]
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []
    assert holm([0.03]) == [0.03]


def test_holm_adjusts_upwards_and_keeps_the_order():
    p_values = list(np.random.default_rng(0).random(20) ** 3)
    adjusted = holm(p_values)
    assert all(p <= q <= 1 for p, q in zip(p_values, adjusted, strict=True))
    ordered = [q for _, q in sorted(zip(p_values, adjusted, strict=True))]
    assert ordered == sorted(ordered)


@pytest.mark.parametrize(
    ("low", "high", "p", "better", "said"),
    [
        (0.1, 0.3, 0.01, "higher", "better"),
        (0.1, 0.3, 0.01, "lower", "worse"),
        (-0.3, -0.1, 0.01, "higher", "worse"),
        (-0.3, -0.1, 0.01, "lower", "better"),
        (0.1, 0.3, 0.05, None, "higher"),
        (-0.3, -0.1, 0.01, None, "lower"),
        (0.1, 0.3, 0.051, "higher", "no difference shown"),
        (-0.1, 0.3, 0.01, "higher", "no difference shown"),
        (0.0, 0.3, 0.01, "higher", "no difference shown"),
        (0.1, 0.3, None, "higher", "no difference shown"),
        (0.1, 0.3, math.nan, "higher", "no difference shown"),
        (None, None, 0.01, "higher", "no difference shown"),
    ],
)
def test_verdict(low, high, p, better, said):
    value = 0.2 if low is None else (low + high) / 2
    assert verdict(Difference(value, low, high, p, 100, 3, "documents", better), p) == said


def test_many_comparisons_of_a_plain_difference():
    """Its p-value is small enough for the correction of any number of comparisons, and agrees with the interval."""
    better, worse = runs(documents=400, shift=1.0, seed=1), runs(documents=400, seed=2)
    found = paired_difference(better, worse)
    assert found.p < 1e-6
    assert holm([found.p] + [0.5] * 2000)[0] < 0.05
    for shift in (0.05, 0.1, 0.15, 0.2, 0.25):
        found = paired_difference(runs(shift=shift, seed=3), runs(seed=4))
        if abs(found.p - 0.05) > 0.01:
            assert (found.p < 0.05) == (not found.low <= 0 <= found.high)
