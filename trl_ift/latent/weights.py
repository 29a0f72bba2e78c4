r"""From codes to the weights of pairs: distances, normalisations, clipping, and how to tell whether they are any good.

For a pair of answers to one prompt, with codes mu(x, y) and mu(x, y'),

    d_i = || mu(x_i, y_i) - mu(x_i, y'_i) ||          w_i = N(d_i)

with N fitted on all pairs that are trained together, never on a batch. That the weight of a pair is a distance of codes is
the idea of LD-Align (https://huggingface.co/papers/2404.06390); which distance and which N are our choices.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checks import check_choice, check_range


# Rows that are compared at a time: codes are float32, and their differences float64
_CHUNK = 4096

DISTANCE_COLUMN = "latent_distance"
DISTANCES = ("l2", "sq_l2", "cosine")
NORMALIZATIONS = ("mean", "max", "minmax", "sigmoid", "none")


def latent_distance(first: np.ndarray, second: np.ndarray, distance: str = "l2") -> np.ndarray:
    """Distance of each pair of codes, float64, (N,), >= 0; exactly 0 for equal codes.

    Args:
        first: Codes, (N, D).
        second: Codes of the other answers, (N, D).
        distance: `"l2"`, its square `"sq_l2"`, or `"cosine"`: 1 minus the cosine of the angle.

    Raises:
        ValueError: The shapes do not match, or a code is not finite.
    """
    check_choice("distance", distance, DISTANCES)
    first, second = np.asarray(first), np.asarray(second)
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(
            f"Codes of shapes {first.shape} and {second.shape}: expected the same number of codes, of the same dimension. "
            "Codes of different encoders cannot be compared; encode both sides with one."
        )
    for codes in (first, second):
        if bad := np.flatnonzero(~np.isfinite(codes).all(1)).tolist():
            raise ValueError(
                f"The code of row {bad[0]} is not finite ({len(bad)} such rows). Check the encoder, and its dtype."
            )
    distances = np.empty(len(first))
    for start in range(0, len(first), _CHUNK):
        rows = slice(start, start + _CHUNK)
        distances[rows] = _distances(first[rows].astype(np.float64), second[rows].astype(np.float64), distance)
    return distances


def _distances(first: np.ndarray, second: np.ndarray, distance: str) -> np.ndarray:
    if distance != "cosine":
        squared = ((first - second) ** 2).sum(1)
        return squared if distance == "sq_l2" else np.sqrt(squared)
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    cosine = (first * second).sum(1) / np.where(norms > 0, norms, 1)
    # Rounding must not leave a distance between equal codes
    return np.where((first == second).all(1), 0.0, np.clip(1 - cosine, 0, 2))


@dataclass(frozen=True)
class WeightNormalizer:
    """N of the weights, fitted on the distances of a whole training set.

    `"mean"` d / mean(d), so that the average weight is 1; `"max"` d / max(d); `"minmax"` (d - min) / (max - min); `"sigmoid"`
    sigma((d - mean) / std) with the standard deviation of the population; `"none"` d itself. Where all distances are equal,
    `"minmax"` gives 0 and `"sigmoid"` 1/2; where all are 0, `"mean"` and `"max"` give 0. Of smaller distances than it was
    fitted on `"minmax"` gives 0.

    Attributes:
        normalization: One of `NORMALIZATIONS`.
        shift: Subtracted from d.
        scale: Then divided by.
        clip: Smallest and largest weight; applied last.
    """

    normalization: str
    shift: float
    scale: float
    clip: tuple[float, float] | None = None

    @classmethod
    def fit(
        cls, distances: np.ndarray, normalization: str = "mean", clip: tuple[float, float] | None = None
    ) -> "WeightNormalizer":
        """Fit N on distances, (N,).

        Raises:
            ValueError: There are none, one is negative or not finite, or an option is unknown.
        """
        check_choice("weight_normalization", normalization, NORMALIZATIONS)
        check_clip(clip)
        distances = check_distances(distances)
        shift, scale = 0.0, 1.0
        if normalization == "mean":
            scale = float(distances.mean())
        elif normalization == "max":
            scale = float(distances.max())
        elif normalization == "minmax":
            shift = float(distances.min())
            scale = float(distances.max()) - shift
        elif normalization == "sigmoid":
            shift, scale = float(distances.mean()), float(distances.std())
            if distances.min() == distances.max():  # from which their mean may differ by rounding
                shift, scale = float(distances[0]), 1.0
        return cls(normalization, shift, scale if scale > 0 else 1.0, None if clip is None else (clip[0], clip[1]))

    def __call__(self, distances: np.ndarray) -> np.ndarray:
        """Weights of distances, float64, of the same shape."""
        weights = (np.asarray(distances, dtype=np.float64) - self.shift) / self.scale
        if self.normalization == "sigmoid":
            weights = np.exp(-np.logaddexp(0, -weights))
        elif self.normalization == "minmax":
            weights = np.maximum(weights, 0.0)  # of distances below those that it was fitted on
        return weights if self.clip is None else np.clip(weights, *self.clip)


def check_clip(clip: Any) -> None:
    """Raise unless `clip` is `None` or two numbers, 0 <= smallest < largest."""
    if clip is None:
        return
    if not isinstance(clip, list | tuple) or len(clip) != 2:
        raise ValueError(
            f"`weight_clip={clip!r}`: expected two numbers, the smallest and the largest weight, or none."
        )
    check_range("weight_clip[0]", clip[0], 0)
    check_range("weight_clip[1]", clip[1], clip[0], low_open=True)


def check_distances(distances: Any) -> np.ndarray:
    """Return distances as float64, (N,), or raise."""
    distances = np.asarray(distances, dtype=np.float64)
    if distances.ndim != 1 or not len(distances):
        raise ValueError(f"Expected the distances of at least one pair, found an array of shape {distances.shape}.")
    if bad := np.flatnonzero(~(np.isfinite(distances) & (distances >= 0))).tolist():
        raise ValueError(
            f"Row {bad[0]}: the latent distance is {distances[bad[0]]}, expected a finite number >= 0 ({len(bad)} such rows)."
        )
    return distances


def effective_sample_size(weights: np.ndarray) -> float:
    """(sum w)^2 / sum w^2: how many equally weighted pairs the weights are worth; 0 if all are 0."""
    weights = np.asarray(weights, dtype=np.float64)
    total = float((weights**2).sum())
    return float(weights.sum()) ** 2 / total if total > 0 else 0.0


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation, with average ranks for ties; NaN if one side is constant or there are no two rows."""
    ranks = [_average_ranks(np.asarray(values, dtype=np.float64)) for values in (first, second)]
    if len(ranks[0]) < 2 or any(rank.std() == 0 for rank in ranks):
        return float("nan")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _average_ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def weight_summary(weights: np.ndarray, length_differences: np.ndarray | None = None) -> dict[str, float]:
    """How the weights of pairs are spread.

    Args:
        weights: Weights, (N,).
        length_differences: |len(y) - len(y')| of the pairs, (N,). A high correlation with it says that the weights see
            little but lengths.

    Returns:
        `mean`, `std`, `min`, `median`, `max`, `zeros` (share of pairs without any weight), `effective_sample_size`,
        `effective_share` (of the number of pairs) and `length_correlation` (Spearman).
    """
    weights = np.asarray(weights, dtype=np.float64)
    size = effective_sample_size(weights)
    summary = {
        "mean": float(weights.mean()),
        "std": float(weights.std()),
        "min": float(weights.min()),
        "median": float(np.median(weights)),
        "max": float(weights.max()),
        "zeros": float((weights == 0).mean()),
        "effective_sample_size": size,
        "effective_share": size / len(weights),
    }
    if length_differences is not None:
        summary["length_correlation"] = rank_correlation(weights, length_differences)
    return summary
