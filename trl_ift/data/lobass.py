r"""LoBaSS: keep the rows of an SFT dataset that this model can learn, by two losses of each row.

With L_ini(i) the loss of row i under the initial model and L_ref(i) its loss under the reference, the same model fine-tuned on
the whole dataset, the rows with the highest

    S(i) = (L_ini(i) - L_ref(i)) / L_ini(i) = 1 - L_ref(i) / L_ini(i)

are kept: those with a high loss that training brings down. Rows that say little (both losses small) and rows that are too hard
(both large) score low. S <= 1, and it is negative where training made the row worse. It is the same for losses that are summed
over the tokens and for means. The initial model, not the reference, is then trained on the selected rows.

Paper: LoBaSS, https://huggingface.co/papers/2310.13008 (v1); its second version is called DavIR, with the same score. Beside it
stand the selections it is compared with: `SELECTIONS`.
"""

import heapq
import math
import uuid
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sized
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from ..checks import check_choice, check_range
from .scoring import column_of


DEFAULT_FRACTION = 0.06
BANDS = ("low", "middle", "high")


def learnability(
    initial: Dataset | Any, reference: Dataset | Any, normalize: str | None = "initial", reduction: str = "mean"
) -> np.ndarray:
    """
    Return the score of each row, float64, shape (N,): how much of its loss training takes away.

    Args:
        initial: Scores under the initial model, as `score_dataset` returns them; or losses, shape (N,).
        reference: The same under the reference.
        normalize: What L_ini - L_ref is divided by: `"initial"` (LoBaSS), `"reference"` (another number, the same order), or
            `None`, nothing (the second version of the paper calls it RHO-LM).
        reduction: `"mean"` or `"sum"` over the tokens of a row; it changes the score only with `normalize=None`.

    Returns:
        `np.ndarray`: NaN where a loss is not finite, or the one it is divided by is 0.

    Raises:
        ValueError: The two do not belong together: other rows, another tokenizer or truncation.
    """
    if normalize is not None:
        check_choice("normalize", normalize, ("initial", "reference"))
    check_choice("reduction", reduction, ("mean", "sum"))
    check_same_rows(initial, reference)
    # Means and sums give the same ratio; sums have been rounded once less
    column = "nll" if normalize is None and reduction == "mean" else "nll_sum"
    before, after = _losses(initial, column), _losses(reference, column)
    divisor = {"initial": before, "reference": after, None: np.ones_like(before)}[normalize]
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = (before - after) / divisor
    return np.where(np.isfinite(scores), scores, np.nan)


def check_same_rows(first: Dataset | Any, second: Dataset | Any) -> None:
    """Raise unless two sets of scores are of the same rows, tokenized and truncated in the same way."""
    if len(first) != len(second):
        raise ValueError(
            f"The scores do not belong together: {len(first)} rows and {len(second)} rows. Score the same dataset with both "
            "models."
        )
    if not (isinstance(first, Dataset) and isinstance(second, Dataset)):
        return
    for column, reason in (
        ("row_hash", "they are of different datasets, or of another order of the rows"),
        (
            "token_hash",
            "the tokenizer, the chat template (one that prints the date?), `max_length`, the truncation or the masking differ",
        ),
    ):
        if not column_of(first, column).equals(column_of(second, column)):
            differing = column_of(first, column).to_numpy() != column_of(second, column).to_numpy()
            raise ValueError(
                f"The scores do not belong together: {differing.sum()} of {len(first)} rows differ, the first is row "
                f"{differing.argmax()}; {reason}. Score the same dataset with both models and the same options."
            )


def _losses(scores: Dataset | Any, column: str) -> np.ndarray:
    return np.asarray(
        column_of(scores, column).to_numpy() if isinstance(scores, Dataset) else scores, dtype=np.float64
    )


# ---------------------------------------------------------------- the selections that LoBaSS is compared with


@dataclass(frozen=True)
class Inputs:
    """What a selection may read; scores as `score_dataset` returns them.

    Attributes:
        initial: Under the initial model.
        reference: Under the reference.
        direct: Of the completions without their prompts (`direct_prompt`), under the model that `initial` is of.
        normalize: Divisor of `learnability`.
        band: Which perplexities are kept.
        seed: Seed of the random selection.
    """

    initial: Dataset
    reference: Dataset | None = None
    direct: Dataset | None = None
    normalize: str | None = "initial"
    band: str = "low"
    seed: int = 0


@dataclass(frozen=True)
class Selection:
    """A way to score rows; the highest are kept.

    Attributes:
        summary: What it keeps, in one clause.
        needs: Which of `reference` and `direct` it reads.
        score: One float a row, NaN for rows that it drops.
        dropped: Why it drops rows that have a loss.
    """

    summary: str
    needs: tuple[str, ...]
    score: Callable[[Inputs], np.ndarray]
    dropped: str = "the score is not finite"


def _perplexity(inputs: Inputs) -> np.ndarray:
    check_choice("band", inputs.band, BANDS)
    nll = _losses(inputs.initial, "nll")
    if inputs.band == "middle":
        valid = np.isfinite(nll)
        rank = np.full(len(nll), np.nan)
        rank[valid] = np.argsort(np.argsort(nll[valid], kind="stable"), kind="stable")
        return -np.abs(rank - (valid.sum() - 1) / 2)
    return np.exp(nll) if inputs.band == "high" else -np.exp(nll)


def _conditional_over_direct(inputs: Inputs, ratio: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    check_same_rows(inputs.initial, inputs.direct)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return ratio(_losses(inputs.initial, "nll"), _losses(inputs.direct, "nll"))


def _ifd(inputs: Inputs) -> np.ndarray:
    ratio = _conditional_over_direct(inputs, lambda conditional, direct: conditional / direct)
    return np.where(ratio <= 1, ratio, np.nan)


def _superfiltering(inputs: Inputs) -> np.ndarray:
    ratio = _conditional_over_direct(inputs, lambda conditional, direct: np.exp(conditional - direct))
    return np.where(ratio < 1, ratio, np.nan)


SELECTIONS = {
    "lobass": Selection(
        "rows whose loss training takes away, relative to the loss (LoBaSS, DavIR)",
        ("reference",),
        lambda inputs: learnability(inputs.initial, inputs.reference, inputs.normalize),
        "the initial loss is 0",
    ),
    "rho_lm": Selection(
        "rows whose summed loss training brings down most, without normalisation",
        ("reference",),
        lambda inputs: learnability(inputs.initial, inputs.reference, None, "sum"),
    ),
    "random": Selection(
        "rows drawn at random", (), lambda inputs: np.random.default_rng(inputs.seed).random(len(inputs.initial))
    ),
    "length": Selection("rows with the most scored tokens", (), lambda inputs: _losses(inputs.initial, "num_tokens")),
    "perplexity": Selection("rows of low, middle or high perplexity (`band`)", (), _perplexity),
    "ifd": Selection(
        "rows whose prompt helps least: loss with prompt / loss without it, up to 1 (IFD)",
        ("direct",),
        _ifd,
        "the prompt raises the loss (ratio above 1)",
    ),
    "superfiltering": Selection(
        "the same with perplexities, below 1; the scores are usually those of a small model",
        ("direct",),
        _superfiltering,
        "the prompt does not lower the perplexity (ratio of 1 or more)",
    ),
}


def selection_scores(
    selection: str,
    initial: Dataset,
    reference: Dataset | None = None,
    direct: Dataset | None = None,
    *,
    normalize: str | None = "initial",
    band: str = "low",
    seed: int = 0,
) -> np.ndarray:
    """
    Return the scores of the rows under one of `SELECTIONS`, float64, shape (N,); the highest are kept, NaN is dropped.

    Args:
        selection: `"lobass"`, `"rho_lm"`, `"random"`, `"length"`, `"perplexity"`, `"ifd"` or `"superfiltering"`.
        initial: Scores under the initial model, as `score_dataset` returns them.
        reference: Scores under the reference, for `"lobass"` and `"rho_lm"`.
        direct: Scores of the completions alone (`score_dataset(..., direct_prompt=...)`), for `"ifd"` and `"superfiltering"`.
        normalize: See `learnability`.
        band: `"low"`, `"middle"` or `"high"`, for `"perplexity"`.
        seed: For `"random"`.

    Raises:
        ValueError: Scores that it needs are missing, or do not belong together.
    """
    check_choice("selection", selection, list(SELECTIONS))
    inputs = Inputs(initial, reference, direct, normalize, band, seed)
    for name in SELECTIONS[selection].needs:
        if getattr(inputs, name) is None:
            hint = {"reference": "of the fine-tuned model", "direct": "made with `direct_prompt`"}[name]
            raise ValueError(f"The selection {selection!r} needs the scores `{name}`, {hint}. Pass them.")
    scores = SELECTIONS[selection].score(inputs)
    return np.where(np.isfinite(_losses(initial, "nll_sum")), scores, np.nan)


# ---------------------------------------------------------------- the rows


def top_rows(
    scores: Iterable[float],
    fraction: float | None = None,
    k: int | None = None,
    largest: bool = True,
    min_score: float | None = None,
) -> np.ndarray:
    """
    Return the indices of the rows with the highest scores, ascending, int64.

    Args:
        scores: Score of each row: an array, or an iterator, of which no more than the k best so far are held in memory.
        fraction: Share of all rows, those without a score included, in (0, 1]; k = max(1, floor(fraction * N)). 0.06 if neither
            it nor `k` is given.
        k: Number of rows, in place of `fraction`. A stream needs it.
        largest: Whether high scores are kept, or low ones.
        min_score: Rows with a lower score are never selected (with `largest=False`: higher).

    Ties go to the lower index; rows without a finite score are never selected, so that there may be fewer than k (with a
    warning).
    """
    if fraction is not None and k is not None:
        raise ValueError(f"`fraction={fraction}` and `k={k}` exclude each other. Drop one.")
    number = len(scores) if isinstance(scores, Sized) else None
    if k is not None:
        check_range("k", k, 1, integer=True)
    else:
        fraction = DEFAULT_FRACTION if fraction is None else fraction
        check_range("fraction", fraction, 0, 1, low_open=True)
        if number is None:
            raise ValueError("`fraction` of a stream, whose length is not known: give `k`.")
        # Decimal, because 0.29 * 100 is 28.999999999999996
        k = max(1, int(Decimal(repr(float(fraction))) * number))
    if min_score is not None and (isinstance(min_score, bool) or not math.isfinite(min_score)):
        raise ValueError(f"`min_score={min_score}` must be a finite number.")
    if number is not None and k > number:
        raise ValueError(f"`k={k}`, but there are only {number} rows. Lower it.")
    sign = 1.0 if largest else -1.0
    bound = -math.inf if min_score is None else sign * min_score
    if number is None:
        keyed = ((sign * float(score), -index) for index, score in enumerate(scores))
        pairs = heapq.nlargest(k, (pair for pair in keyed if math.isfinite(pair[0]) and pair[0] >= bound))
        best = np.array([-index for _, index in pairs], dtype=np.int64)
    else:
        signed = sign * np.asarray(scores, dtype=np.float64)
        valid = np.flatnonzero(np.isfinite(signed) & (signed >= bound))
        best = valid[np.argsort(-signed[valid], kind="stable")[:k]]
    if not len(best):
        limit = "" if min_score is None else f", and reaches `min_score={min_score}`"
        raise ValueError(f"No row can be selected: none has a finite score{limit}.")
    if len(best) < k:
        limit = "" if min_score is None else f" that reaches `min_score={min_score}`"
        warnings.warn(f"Selected {len(best)} rows in place of {k}: no others have a finite score{limit}.")
    return np.sort(best)


def select_top(
    dataset: Dataset | IterableDataset,
    scores: Any,
    fraction: float | None = None,
    k: int | None = None,
    largest: bool = True,
    min_score: float | None = None,
) -> Dataset:
    """
    Return the rows with the highest scores, in their original order.

    Args:
        dataset: The dataset that was scored. A stream is read up to the last selected row, and these are written to the
            cache of `datasets`.
        scores: Score of each row, shape (N,).
        fraction, k, largest, min_score: As in `top_rows`.

    Example:

    ```python
    from datasets import load_dataset
    from trl_ift.data import learnability, load_scores, select_top

    dataset = load_dataset("trl-lib/tldr", split="train")
    scores = learnability(load_scores("scores/initial"), load_scores("scores/reference"))
    subset = select_top(dataset, scores, fraction=0.06)
    ```
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(f"`dataset` is a {type(dataset).__name__}; expected a `Dataset` or an `IterableDataset`.")
    if isinstance(dataset, Dataset) and len(dataset) != len(scores):
        raise ValueError(
            f"`dataset` has {len(dataset)} rows and there are {len(scores)} scores. Pass the dataset that was scored."
        )
    indices = top_rows(scores, fraction, k, largest, min_score)
    if isinstance(dataset, Dataset):
        return dataset.select(indices)
    # Not lazily: workers of a data loader and processes share the shards of a stream, and would count rows in their own
    return Dataset.from_generator(
        _selected, gen_kwargs={"dataset": dataset, "indices": frozenset(indices.tolist()), "run": uuid.uuid4().hex}
    )


def _selected(dataset: Iterable[Any], indices: Collection[int], run: str) -> Iterator[Any]:
    """`rows_at`; another `run` keeps `datasets` from taking rows of the stream from its cache."""
    return rows_at(dataset, indices)


def rows_at(dataset: Iterable[Any], indices: Collection[int]) -> Iterator[Any]:
    """Yield the rows of a stream that stand at these indices, and end with the last of them."""
    last = max(indices)
    for index, row in enumerate(dataset):
        if index in indices:
            yield row
        if index == last:
            return
