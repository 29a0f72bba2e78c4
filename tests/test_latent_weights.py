"""Distances of codes and weights of pairs: numbers worked out by hand, and what they do not depend on."""

import math
from fractions import Fraction

import numpy as np
import pytest

from trl_ift.latent import weights
from trl_ift.latent.weights import (
    DISTANCES,
    NORMALIZATIONS,
    WeightNormalizer,
    check_clip,
    effective_sample_size,
    latent_distance,
    rank_correlation,
    weight_summary,
)


REAL = np.array([[0, 0, 1], [1, -1, 0.5], [0.2, 0.4, 0.4]])
GENERATED = np.array([[0, 3, -3], [1, -1, 0.5], [0.5, 0, 0.4]])
# In no order, with a tie and a 0
VALUES = np.array([0.3, 2.0, 0.0, 0.7, 2.0, 5.5, 1e-3])


def fitted(distances, normalization="mean", clip=None):
    return WeightNormalizer.fit(distances, normalization, clip)(distances)


def random_codes(number=9, dim=5, seed=0):
    random = np.random.default_rng(seed)
    return [random.standard_normal((number, dim)).astype(np.float32) for _ in range(2)]


# ---------------------------------------------------------------- distances


def test_worked_example():
    for distance, expected in (("l2", [5, 0, 0.5]), ("sq_l2", [25, 0, 0.25])):
        np.testing.assert_allclose(latent_distance(REAL, GENERATED, distance), expected, rtol=1e-14)
    # cosines: -3 / sqrt(18), 1, and 0.26 / (0.6 sqrt(0.41))
    expected = [1 + math.sqrt(0.5), 0, 1 - 0.26 / (0.6 * math.sqrt(0.41))]
    np.testing.assert_allclose(latent_distance(REAL, GENERATED, "cosine"), expected, rtol=1e-14)


@pytest.mark.parametrize(
    ("normalization", "expected"),
    [
        ("mean", [2.7272727273, 0, 0.2727272727]),
        ("max", [1, 0, 0.1]),
        ("minmax", [1, 0, 0.1]),
        ("sigmoid", [0.8035093070, 0.3067464599, 0.3559469368]),
        ("none", [5, 0, 0.5]),
    ],
)
def test_weights_of_the_worked_example(normalization, expected):
    found = fitted([5, 0, 0.5], normalization)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=0, atol=6e-11)


def test_defaults_are_l2_and_mean():
    distances = latent_distance(REAL, GENERATED)
    np.testing.assert_allclose(distances, [5, 0, 0.5], rtol=1e-14)
    np.testing.assert_allclose(fitted(distances), [30 / 11, 0, 3 / 11], rtol=1e-14)


@pytest.mark.parametrize("distance", DISTANCES)
def test_distances_are_symmetric_and_zero_for_equal_codes(distance):
    first, second = random_codes()
    found = latent_distance(first, second, distance)
    assert found.dtype == np.float64
    assert (found > 0).all()
    np.testing.assert_array_equal(latent_distance(second, first, distance), found)
    assert not latent_distance(first, first.copy(), distance).any()  # exactly
    second[3] = first[3]
    assert latent_distance(first, second, distance)[3] == 0


def test_distances_are_computed_in_float64():
    """1 and 1 + 2^-23 are neighbours in float32: their squares cannot be told from each other's by single precision."""
    first, second = np.ones((1, 2), np.float32), np.array([[1, 1 + 2**-23]], np.float32)
    assert latent_distance(first, second)[0] == 2**-23
    large = np.full((1, 4), 3e38, np.float32)  # its square overflows float32
    assert latent_distance(large, -large)[0] == pytest.approx(4 * float(large[0, 0]), rel=1e-15)


def test_distances_of_many_rows_are_those_of_each(monkeypatch):
    first, second = random_codes(23)
    for distance in DISTANCES:
        whole = latent_distance(first, second, distance)
        with monkeypatch.context() as patch:
            patch.setattr(weights, "_CHUNK", 4)
            np.testing.assert_array_equal(latent_distance(first, second, distance), whole)
        one_by_one = [latent_distance(first[i : i + 1], second[i : i + 1], distance)[0] for i in range(23)]
        np.testing.assert_array_equal(whole, one_by_one)


def test_cosine_of_zeros_and_of_opposites():
    first, second = np.array([[0.0, 0], [0, 0], [1, 2]]), np.array([[0.0, 0], [1, 1], [-2, -4]])
    np.testing.assert_allclose(latent_distance(first, second, "cosine"), [0, 1, 2], rtol=1e-15)
    # Rounding makes some cosines of parallel codes more than 1
    codes = random_codes(500)[0].astype(np.float64)
    cosines = (codes * 2 * codes).sum(1) / (np.linalg.norm(codes, axis=1) * np.linalg.norm(2 * codes, axis=1))
    assert cosines.max() > 1
    assert (latent_distance(codes, 2 * codes, "cosine") >= 0).all()


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (np.zeros((2, 3)), np.zeros((2, 4)), r"shapes \(2, 3\) and \(2, 4\)"),
        (np.zeros((2, 3)), np.zeros((3, 3)), r"shapes \(2, 3\) and \(3, 3\)"),
        (np.zeros(3), np.zeros(3), r"shapes \(3,\) and \(3,\)"),
        (np.array([[1.0], [np.nan]]), np.ones((2, 1)), r"The code of row 1 is not finite \(1 such rows\)"),
        (np.ones((3, 1)), np.array([[np.inf], [1], [-np.inf]]), r"The code of row 0 is not finite \(2 such rows\)"),
    ],
)
def test_bad_codes(first, second, expected):
    with pytest.raises(ValueError, match=expected):
        latent_distance(first, second)


# ---------------------------------------------------------------- normalisation


@pytest.mark.parametrize("clip", [None, (0.1, 0.6)])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_weights_are_monotone_and_permute_with_the_pairs(normalization, clip):
    found = fitted(VALUES, normalization, clip)
    order = np.argsort(VALUES, kind="stable")
    assert (np.diff(found[order]) >= 0).all()
    if clip is None:
        assert ((np.diff(found[order]) > 0) == (np.diff(VALUES[order]) > 0)).all()
    permutation = np.random.default_rng(0).permutation(len(VALUES))
    np.testing.assert_allclose(fitted(VALUES[permutation], normalization, clip), found[permutation], rtol=1e-14)


@pytest.mark.parametrize("factor", [1e-6, 3.0, 1e9])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_scale_of_distances_does_not_matter(normalization, factor):
    expected = fitted(VALUES, normalization) * (factor if normalization == "none" else 1)
    np.testing.assert_allclose(fitted(factor * VALUES, normalization), expected, rtol=1e-12)


def test_what_normalisations_fix():
    assert fitted(VALUES, "mean").mean() == pytest.approx(1, rel=1e-15)
    assert fitted(VALUES, "max").max() == 1
    np.testing.assert_array_equal(fitted(VALUES, "max"), fitted(VALUES, "minmax"))  # the smallest is 0
    shifted = VALUES + 1
    assert (fitted(shifted, "minmax").min(), fitted(shifted, "minmax").max()) == (0, 1)
    assert fitted(shifted, "max").min() > 0
    np.testing.assert_allclose(fitted(shifted, "sigmoid"), fitted(VALUES, "sigmoid"), rtol=1e-12)
    # two distances are one standard deviation (of the population) from their mean
    np.testing.assert_allclose(fitted([1, 4], "sigmoid"), [1 / (1 + math.e), math.e / (1 + math.e)], rtol=1e-15)


def test_extreme_sigmoids_are_finite():
    """A thousand standard deviations from the mean, on either side: exp of it overflows."""
    with np.errstate(over="raise", invalid="raise"):
        above = fitted(np.array([1e100, *[0.0] * 10**6]), "sigmoid")
        below = fitted(np.array([0.0, *[1e100] * 10**6]), "sigmoid")
    assert (above[0], below[0]) == (1, 0)
    assert 0.49 < above[1] < 0.5 < below[1] < 0.51


@pytest.mark.parametrize("number", [1, 2, 3, 7, 10, 1000])
@pytest.mark.parametrize("value", [0.1, 0.7, 3.0])
def test_equal_distances(number, value):
    """Their mean may differ from them by rounding."""
    distances = np.full(number, value)
    expected = {"mean": 1, "max": 1, "minmax": 0, "sigmoid": 0.5, "none": value}
    for normalization in NORMALIZATIONS:
        np.testing.assert_allclose(fitted(distances, normalization), expected[normalization], rtol=1e-14)


def test_all_distances_zero():
    expected = {"mean": 0, "max": 0, "minmax": 0, "sigmoid": 0.5, "none": 0}
    for normalization in NORMALIZATIONS:
        np.testing.assert_array_equal(fitted(np.zeros(3), normalization), expected[normalization])


def test_a_fit_is_applied_to_other_distances():
    normalizer = WeightNormalizer.fit([1.0, 3.0], "mean")
    np.testing.assert_array_equal(normalizer(np.array([[4.0], [0.0]])), [[2], [0]])
    assert WeightNormalizer.fit([1, 3], "minmax")(5) == 2


def test_smaller_distances_than_it_was_fitted_on():
    """Of evaluation data: a weight is never negative."""
    for clip, lowest in ((None, 0.0), ((0.2, 0.9), 0.2)):
        normalizer = WeightNormalizer.fit(np.array([2.0, 3.0]), "minmax", clip)
        assert normalizer(np.array([1.0, 2.5])).tolist() == [lowest, 0.5]


def test_clipping_comes_last():
    np.testing.assert_allclose(fitted([5, 0, 0.5], "mean", (0.1, 2)), [2, 0.1, 3 / 11], rtol=1e-14)
    np.testing.assert_allclose(fitted([5, 0, 0.5], "max", [0, 0.05]), [0.05, 0, 0.05], rtol=1e-14)
    np.testing.assert_array_equal(fitted([5, 0, 0.5], "none", (1, 5)), [5, 1, 1])
    # N is fitted on what is not clipped
    assert fitted([5, 0, 0.5], "mean", (0.1, 2)).mean() < 1
    assert WeightNormalizer.fit([1], "mean", [0, 5]) == WeightNormalizer.fit([1], "mean", (0, 5))


@pytest.mark.parametrize(
    ("clip", "error", "expected"),
    [
        ((1, 1), ValueError, r"`weight_clip\[1\]=1` is out of range: it must lie in \(1, inf\)"),
        ((2, 1), ValueError, r"`weight_clip\[1\]=1` is out of range"),
        ((-0.1, 1), ValueError, r"`weight_clip\[0\]=-0.1` is out of range"),
        ((0, math.inf), ValueError, r"`weight_clip\[1\]=inf` is out of range"),
        ((math.nan, 1), ValueError, r"`weight_clip\[0\]=nan` is out of range"),
        ((0, math.nan), ValueError, r"`weight_clip\[1\]=nan` is out of range"),
        (("0", 1), TypeError, r"`weight_clip\[0\]` must be a number"),
        ((1,), ValueError, "expected two numbers"),
        (5, ValueError, "`weight_clip=5`: expected two numbers"),
    ],
)
def test_bad_clips(clip, error, expected):
    for function in (check_clip, lambda clip: fitted([1.0], "mean", clip)):
        with pytest.raises(error, match=expected):
            function(clip)


@pytest.mark.parametrize(
    ("distances", "expected"),
    [
        ([1, math.nan, -1], r"Row 1: the latent distance is nan, expected a finite number >= 0 \(2 such rows\)"),
        ([1, 2, -1e-9], "Row 2: the latent distance is -1e-09"),
        ([math.inf], "Row 0: the latent distance is inf"),
        ([None, 1.0], "Row 0: the latent distance is nan"),
        ([], r"at least one pair, found an array of shape \(0,\)"),
        ([[1.0]], r"found an array of shape \(1, 1\)"),
    ],
)
def test_bad_distances(distances, expected):
    with pytest.raises(ValueError, match=expected):
        WeightNormalizer.fit(distances)


def test_unknown_options():
    with pytest.raises(ValueError, match="`weight_normalization='median'` is not known. Choose one of: 'mean', "):
        WeightNormalizer.fit([1.0], "median")
    with pytest.raises(ValueError, match="`distance='l1'` is not known. Choose one of: 'l2', 'sq_l2', 'cosine'"):
        latent_distance(REAL, GENERATED, "l1")


# ---------------------------------------------------------------- how good the weights are


def test_effective_sample_size():
    assert effective_sample_size([2, 2, 2, 2]) == 4
    assert effective_sample_size([0, 3, 0]) == 1
    assert effective_sample_size([1, 2, 3]) == pytest.approx(36 / 14, rel=1e-15)
    assert effective_sample_size(1e-3 * np.array([1, 2, 3])) == pytest.approx(36 / 14, rel=1e-14)
    assert effective_sample_size([0, 0]) == 0


def spearman(first, second):
    """By the definition, in exact arithmetic but for the root: a rank is the mean of the places that equal values share."""

    def ranks(values):
        return [sum(v < value for v in values) + Fraction(1 + sum(v == value for v in values), 2) for value in values]

    first, second = ranks(first), ranks(second)
    mean = Fraction(len(first) + 1, 2)
    products = sum((a - mean) * (b - mean) for a, b in zip(first, second, strict=True))
    squares = [sum((rank - mean) ** 2 for rank in side) for side in (first, second)]
    return float(products) / math.sqrt(squares[0] * squares[1])


@pytest.mark.parametrize("seed", range(5))
def test_rank_correlation(seed):
    random = np.random.default_rng(seed)
    first = random.integers(0, 6, 40)  # many ties
    second = first + random.integers(-4, 5, 40)
    assert len(set(first.tolist())) < 10
    found = rank_correlation(first, second)
    assert found == pytest.approx(spearman(first.tolist(), second.tolist()), rel=1e-12)
    assert 0.2 < found < 0.95
    assert rank_correlation(np.exp(first.astype(float)), -(second**3)) == pytest.approx(-found, rel=1e-12)


def test_rank_correlation_by_hand():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(0.8, rel=1e-15)  # 1 - 6 * 2 / 60
    # ranks 1.5 1.5 3 and 1 2 3
    assert rank_correlation([7, 7, 9], [1, 2, 3]) == pytest.approx(1.5 / math.sqrt(1.5 * 2), rel=1e-15)
    for first, second in (([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [0.1, 0.1, 0.1]), ([1], [1]), ([], [])):
        assert math.isnan(rank_correlation(first, second))


def test_summary():
    summary = weight_summary(np.array([0, 1, 2, 5]), np.array([3, 1, 0, 7]))
    assert summary == {
        "mean": 2,
        "std": pytest.approx(math.sqrt(3.5), rel=1e-15),
        "min": 0,
        "median": 1.5,
        "max": 5,
        "zeros": 0.25,
        "effective_sample_size": pytest.approx(64 / 30, rel=1e-15),
        "effective_share": pytest.approx(16 / 30, rel=1e-15),
        "length_correlation": pytest.approx(0.2, rel=1e-14),  # rank differences 2, 0, 2, 0: 1 - 6 * 8 / 60
    }
    assert "length_correlation" not in weight_summary(np.array([1.0]))
