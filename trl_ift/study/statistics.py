"""The statistics of a study: intervals, paired differences, what they allow to say, and the results ordered for that."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import combinations
from statistics import NormalDist
from typing import Any

import numpy as np

from .measures import Measure, digest_of


BASELINE = "start"  # the start itself, as a method
# Measures of the headline table, and those that stay out of it
FIRST = ("preference_accuracy", "forward_kl", "neutral_nll", "answer_length")
LATER = ("reward_margin", "chosen_drift", "rejected_drift", "cut_answers")
COLUMNS = 6
# Numbers of a block of resamples that are held in memory at a time
_BLOCK = 2_000_000
# With more documents the draws of a bootstrap are normal, and drawing them one by one takes seconds
_MANY = 4000


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval.

    Attributes:
        mean: NaN if there is no value.
        sd: Standard deviation with `ddof=1`; `None` with fewer than two values.
        low, high: `None` where there is no interval.
    """

    mean: float
    sd: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference:
    """A measure of one method minus that of another.

    Attributes:
        value: Mean over the pairs of runs; NaN if there is none.
        low, high: Confidence interval, `None` where there is none.
        p: Two-sided p-value of no difference, `None` where there is no interval.
        documents: How many documents were paired; 0 without items.
        seeds: How many runs were paired.
        kind: The randomness that the interval covers: `"documents and seeds"`, `"documents"`, `"seeds"` or `"none"`.
        better, unit: As in `Measure`.
    """

    value: float
    low: float | None
    high: float | None
    p: float | None
    documents: int
    seeds: int
    kind: str
    better: str | None = None
    unit: str = "score"


# Difference, Holm-adjusted p-value and verdict, by pairs of names
Judged = dict[tuple[str, str], tuple[Difference, float | None, str]]


# ---------------------------------------------------------------- Student's t


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """
    Mean and Student's t interval of independent values, e.g. one a seed: `mean ± t_{S-1} sd / sqrt(S)`.

    NaN is left out. One value has no interval, and none is computed from values that are all the same.

    Args:
        values (`Sequence[float]`):
            The values.
        level (`float`, *optional*, defaults to `0.95`):
            Confidence level.

    Raises:
        ValueError: `level` is not between 0 and 1.
    """
    _check_level(level)
    known = [float(value) for value in values if not math.isnan(value)]
    if len(known) < 2:
        return Interval(known[0] if known else math.nan, None, None, None)
    mean = math.fsum(known) / len(known)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (len(known) - 1))
    half = t_quantile(level, len(known) - 1) * sd / math.sqrt(len(known))
    return Interval(mean, sd, mean - half, mean + half)


def t_quantile(level: float, degrees: float) -> float:
    """The `t` with `P(|T| <= t) = level` for Student's distribution with `degrees` degrees of freedom."""
    _check_level(level)
    # P(|T| > t) = I_x(degrees / 2, 1 / 2) with x = degrees / (degrees + t²)
    x = _bisect(lambda x: _incomplete_beta(degrees / 2, 0.5, x) - (1 - level))
    return math.sqrt(degrees * (1 - x) / x)


def t_p_value(t: float, degrees: float) -> float:
    """Two-sided p-value of a t statistic."""
    return _incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))


def _bisect(function: Callable[[float], float]) -> float:
    """The zero in (0, 1) of an increasing function."""
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if function(middle) > 0 else (middle, high)
    return high


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function, by its continued fraction (Lentz's method)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly
        return 1 - _incomplete_beta(b, a, 1 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    tiny = 1e-300
    c, d = 1.0, 1 / ((1 - (a + b) * x / (a + 1)) or tiny)
    fraction = d
    for m in range(1, 1000):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / ((1 + term * d) or tiny)
            c = (1 + term / c) or tiny
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return math.exp(log_front) * fraction / a


# ---------------------------------------------------------------- documents


def stderr_of_share(p: float, n: int) -> float:
    """Standard error of a share `p` of `n` documents, `sqrt(p (1 - p) / (n - 1))`; NaN for fewer than two."""
    return math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else math.nan


def document_interval(measure: Measure, level: float = 0.95) -> Interval:
    """
    Interval of one run's measure over its documents. It does not cover what another seed would change.

    A share of documents with an outcome of 0 or 1 has Wilson's interval, which is not empty at 0 and 1; other (weighted) means
    have a t interval, with the standard error of a ratio of sums. Documents with NaN are left out; fewer than two have no
    interval.
    """
    values, weights = _arrays(measure)
    known = np.isfinite(values) & np.isfinite(weights)
    values, weights, n = values[known], weights[known], int(known.sum())
    if n < 2 or weights.sum() <= 0:
        return Interval(measure.value, None, None, None)
    mean = float(values @ weights / weights.sum())
    sd = float(np.sqrt((_influence(values, weights) ** 2).sum() / (n - 1)))
    if measure.unit == "share" and measure.weights is None and np.isin(values, (0, 1)).all():
        z = NormalDist().inv_cdf((1 + level) / 2)
        middle, half = mean + z**2 / (2 * n), z * math.sqrt(mean * (1 - mean) / n + z**2 / (4 * n * n))
        low, high = ((middle + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
        return Interval(mean, sd, min(low, mean), max(high, mean))  # rounding must not put 0 or 1 outside
    half = t_quantile(level, n - 1) * sd / math.sqrt(n)
    return Interval(mean, sd, mean - half, mean + half)


def paired_difference(
    a: Sequence[Measure], b: Sequence[Measure], level: float = 0.95, resamples: int = 5000, seed: int = 0
) -> Difference:
    """
    `a` minus `b`, with an interval over documents and seeds.

    Runs are paired by position, documents by theirs, so that what makes a document hard or a seed lucky for both cancels. The
    interval is a paired bootstrap: documents are drawn with replacement, the same ones for all runs, and a weighted measure is
    a ratio of sums in every draw. With two runs or more, each draw also has normal noise with the variance between seeds.
    Drawing the runs with replacement instead would give 95 % intervals that cover the truth in three cases of four with three
    seeds, where seeds matter more than documents. The deviations of the draws are then widened as those of Student's t are,
    with Satterthwaite's degrees of freedom: those of the documents, down to one less than runs if the variance is all between
    seeds.

    Without documents to pair (no items, no digest, or fewer than two) it is the t interval of the differences between runs.

    Args:
        a, b (`Sequence[Measure]`):
            `a[i]` and `b[i]` are runs with the same seed; `b` may repeat one baseline.
        level (`float`, *optional*, defaults to `0.95`):
            Confidence level.
        resamples (`int`, *optional*, defaults to `5000`):
            How many draws of documents.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.

    Raises:
        ValueError: The two differ in length or unit, or measures are of different documents.
    """
    _check_level(level)
    _check_pairs(a, b)
    better, unit = a[0].better, a[0].unit
    # The cells of `Measure.items` may be null where a producer had no value
    runs = [(_arrays(x), _arrays(y)) for x, y in zip(a, b, strict=True)]
    paired = all(x.items is not None and x.documents is not None for x in (*a, *b))
    if paired:
        # (runs, documents): values and weights of both sides
        x, u, y, v = (
            np.stack([arrays[side][part] for arrays in runs]) for side, part in ((0, 0), (0, 1), (1, 0), (1, 1))
        )
        known = np.isfinite(x + u + y + v).all(axis=0)
        x, u, y, v = x[:, known], u[:, known], y[:, known], v[:, known]
        paired = x.shape[1] > 1 and bool((u.sum(axis=1) > 0).all() and (v.sum(axis=1) > 0).all())
    if not paired:
        differences = [one.value - other.value for one, other in zip(a, b, strict=True)]
        return _between_runs([value for value in differences if not math.isnan(value)], level, better, unit)

    documents, seeds = x.shape[1], len(a)
    each = (x * u).sum(axis=1) / u.sum(axis=1) - (y * v).sum(axis=1) / v.sum(axis=1)
    value = float(each.mean())
    influence = _influence(x, u) - _influence(y, v)
    of_documents, of_seeds, degrees = _variances(each, influence)
    kind = "documents and seeds" if seeds > 1 else "documents"
    if unit == "share" and value and not of_documents + of_seeds:
        pick = min if value > 0 else max  # the wider bound on the side of 0
        least, most = pick(-y.max(), x.min() - 1), pick(1 - y.min(), x.max())
        low, high, p = _without_spread(value, least, most, documents, level)
        return Difference(value, low, high, p, documents, seeds, kind, better, unit)
    rng = np.random.default_rng([seed, documents, seeds])
    if documents > _MANY:
        deviations = math.sqrt(of_documents) * rng.standard_normal(resamples)
    else:
        parts = np.concatenate([x * u, u, y * v, v]).T
        with np.errstate(invalid="ignore", divide="ignore"):  # a draw may have no weight
            blocks = []
            for counts in _resamples(documents, resamples, seed):
                of_a, weight_a, of_b, weight_b = np.split(counts @ parts, 4, axis=1)
                blocks.append((of_a / weight_a - of_b / weight_b).mean(axis=1))
        deviations = np.concatenate(blocks) - value
    noise = math.sqrt(of_seeds) * rng.standard_normal(resamples)
    # Both signs of the noise, so that `b` minus `a` mirrors `a` minus `b`
    deviations = np.concatenate([deviations + noise, deviations - noise])
    draws = value + deviations * np.sqrt(degrees / np.tile(rng.chisquare(degrees, resamples), 2))
    draws = draws[np.isfinite(draws)]
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    # Not the share of the draws beyond 0: corrected for many comparisons, it could never be small enough
    scale = math.sqrt(of_documents + of_seeds)
    p = t_p_value(value / scale, degrees) if scale else float(value == 0)
    return Difference(value, float(low), float(high), p, documents, seeds, kind, better, unit)


def _without_spread(
    value: float, least: float, most: float, documents: int, level: float
) -> tuple[float, float, float]:
    """Interval and p-value of a difference that all documents share, of which no draw differs.

    They are those of the share of documents that differ and were not seen, whose differences may be `least` or `most`.
    """
    unseen = 1 - ((1 - level) / 2) ** (1 / documents)
    needed = value / (value - (least if value > 0 else most))  # share of them that would make the difference 0
    p = min(1.0, 2 * (1 - needed) ** documents)
    return float(value - unseen * (value - least)), float(value + unseen * (most - value)), float(p)


def _variances(each: np.ndarray, influence: np.ndarray) -> tuple[float, float, float]:
    """Variance of the mean difference from the documents and from the seeds, and degrees of freedom of their sum.

    Args:
        each: Difference of each run, `(runs,)`.
        influence: Share of each document in it, `(runs, documents)`, with means of 0.
    """
    runs, documents = influence.shape
    of_documents = float(influence.mean(axis=0).var(ddof=1)) / documents
    if runs == 1:
        return of_documents, 0.0, documents - 1
    of_seeds = float(each.var(ddof=1)) / runs
    # Runs that agree by chance say little: their variance counts as no less than each document's own noise in each run makes it
    own = float(((influence - influence.mean(axis=0)) ** 2).sum()) / ((runs - 1) * (documents - 1)) / documents / runs
    least = max(of_seeds, own)
    if not of_documents + least:
        return 0.0, 0.0, documents - 1
    degrees = (of_documents + least) ** 2 / (of_documents**2 / (documents - 1) + least**2 / (runs - 1))
    return of_documents, of_seeds, max(degrees, runs - 1)


def _resamples(documents: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks `(rows, documents)` of how often each document was drawn; the same ones for all comparisons."""
    rows = _BLOCK // documents
    return (_counts(documents, min(rows, resamples - start), seed, start) for start in range(0, resamples, rows))


@lru_cache(maxsize=8)
def _counts(documents: int, rows: int, seed: int, start: int) -> np.ndarray:
    drawn = np.random.default_rng([seed, start]).integers(0, documents, (rows, documents))
    drawn += documents * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * documents).reshape(rows, documents).astype(np.float64)


def _between_runs(differences: list[float], level: float, better: str | None, unit: str) -> Difference:
    """The t interval of differences without documents."""
    interval, seeds = t_interval(differences, level), len(differences)
    if interval.sd is None or (interval.sd == 0 and interval.mean != 0):  # no spread to judge by
        return Difference(interval.mean, None, None, None, 0, seeds, "none", better, unit)
    p = 1.0 if interval.sd == 0 else t_p_value(interval.mean / (interval.sd / math.sqrt(seeds)), seeds - 1)
    return Difference(interval.mean, interval.low, interval.high, p, 0, seeds, "seeds", better, unit)


def _check_pairs(a: Sequence[Measure], b: Sequence[Measure]) -> None:
    if not a or len(a) != len(b):
        raise ValueError(f"`a` and `b` must be runs in pairs, found {len(a)} and {len(b)}.")
    for name in ("unit", "documents"):
        found = {getattr(measure, name) for measure in (*a, *b)}
        if len(found) > 1:
            shown = ", ".join(sorted(map(repr, found)))
            raise ValueError(f"{a[0].title!r}: only measures of the same {name} are paired, found {shown}.")
    lengths = {len(measure.items) for measure in (*a, *b) if measure.items is not None}
    if len(lengths) > 1:
        raise ValueError(f"{a[0].title!r}: runs have different numbers of documents, {sorted(lengths)}.")


def _arrays(measure: Measure) -> tuple[np.ndarray, np.ndarray]:
    """Values and weights `(documents,)` of a measure; null is NaN."""
    values = np.array(measure.items or (), dtype=np.float64)
    return values, np.ones(len(values)) if measure.weights is None else np.array(measure.weights, dtype=np.float64)


def _influence(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """How much each document moves the weighted mean; its variance over documents is that of a ratio of sums."""
    total = weights.sum(axis=-1, keepdims=True)
    mean = (values * weights).sum(axis=-1, keepdims=True) / total
    return weights * (values - mean) / (total / values.shape[-1])


# ---------------------------------------------------------------- decisions


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p-values, in the order given. `None` or NaN (no test) stays `None` and does not count."""
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None and not math.isnan(p))
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[i] = largest
    return adjusted


def verdict(difference: Difference, adjusted_p: float | None) -> str:
    """
    What a difference allows to say: `"better"` or `"worse"`, for a measure where neither is better `"higher"` or `"lower"`,
    and `"no difference shown"` if its interval contains 0, if the adjusted p-value is above 0.05, or if there is none.
    """
    low, high = difference.low, difference.high
    if low is None or high is None or low <= 0 <= high or adjusted_p is None or not adjusted_p <= 0.05:
        return "no difference shown"
    direction = "higher" if difference.value > 0 else "lower"
    if difference.better is None:
        return direction
    return "better" if direction == difference.better else "worse"


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"`level` must be between 0 and 1, found {level}.")


# ---------------------------------------------------------------- a study


class Results:
    """
    The `results.json` of a study, by start, method, size and seed.

    Args:
        results (`dict`):
            Its contents.

    Attributes:
        runs: Measures by name, of each done cell, by seed, by (start, method, size).
        about: The first measure of each name: those of the headline table in its order, then the others as they come.
        main: Names of the measures of the headline table.
        primary: The measure that the answer is about; `None` without measures.
        size: The largest size with a done cell.
        averages: Names of the measures that an average is of, by its name.
        problems: What kept runs from being compared, by measure and run.
    """

    def __init__(self, results: dict[str, Any]) -> None:
        self.results, self.cells = results, results["cells"]
        self.starts, self.methods = results["starts"], results["methods"]
        self.sizes, self.seeds = sorted(results["sizes"]), results["seeds"]
        self.problems: dict[str, dict[str, str]] = {}
        self.runs: dict[tuple[str, str, int], dict[int | None, dict[str, Measure]]] = {}
        for cell in (cell for cell in self.cells if cell["status"] == "done"):
            found = {key: Measure.from_json(fields) for key, fields in (cell.get("measures") or {}).items() if fields}
            place = (cell["start"], cell["method"], 0 if cell["method"] == BASELINE else cell["size"])
            self.runs.setdefault(place, {})[cell["seed"]] = found
        every = [run for runs in self.runs.values() for run in runs.values()]
        self.averages = _add_averages(every)
        about = {key: measure for run in reversed(every) for key, measure in run.items()}
        names = dict.fromkeys(key for run in every for key in run)
        self.about = {key: about[key] for key in sorted(names, key=lambda key: _place(key, about[key]))}
        self.main = [key for key, measure in self.about.items() if _place(key, measure) < 9][:COLUMNS]
        judged = [key for key in self.main if self.about[key].better]
        self.primary = next(iter([*judged, *self.main, *self.about]), None)
        self.size = max([size for _, _, size in self.runs if size] or self.sizes, default=0)
        # Computed once, wherever they are shown
        self.estimate, self.difference = cache(self._estimate), cache(self._difference)

    def values(self, start: str, method: str, size: int, key: str) -> dict[int | None, Measure]:
        """A measure of the done runs by seed, where it is finite."""
        runs = self.runs.get((start, method, 0 if method == BASELINE else size), {})
        return {seed: run[key] for seed, run in runs.items() if key in run and math.isfinite(run[key].value)}

    def _estimate(self, start: str, method: str, size: int, key: str) -> tuple[Interval, int] | None:
        """Mean with its interval, and the number of runs. Of one run it is an interval over documents."""
        measures = list(self.values(start, method, size, key).values())
        if not measures:
            return None
        found = t_interval([m.value for m in measures]) if len(measures) > 1 else document_interval(measures[0])
        if found.low is not None and found.high is not None:
            unit = measures[0].unit
            low = max(found.low, 0.0) if unit in ("share", "tokens", "count") or key == "forward_kl" else found.low
            found = Interval(found.mean, found.sd, low, min(found.high, 1.0) if unit == "share" else found.high)
        return found, len(measures)

    def _difference(self, start: str, method: str, key: str, other: str) -> Difference | None:
        """A method less another at the largest size, over the seeds that both have; `None` if they cannot be compared."""
        a, b = (self.values(start, name, self.size, key) for name in (method, other))
        pairs = [(a[seed], b[seed if seed in b else None]) for seed in a if seed in b or None in b]
        try:
            return paired_difference([x for x, _ in pairs], [y for _, y in pairs]) if pairs else None
        except ValueError as error:
            self.problems.setdefault(key, {}).setdefault(f"{method} from {start}", str(error))
            return None

    def against_start(self, key: str) -> Judged:
        """Every method against its start: difference, Holm-adjusted p-value and verdict, by (start, method)."""
        places = [(start, method) for start in self.starts for method in self.methods]
        return _judged({place: self.difference(*place, key, BASELINE) for place in places})

    def compared(self, start: str) -> Judged:
        """Every two methods of a start on the primary measure."""
        key = self.primary
        return _judged({(a, b): self.difference(start, a, key, b) for a, b in combinations(self.methods, 2)})


def _place(key: str, measure: Measure) -> int:
    """Place of a measure: the headline table has those before 9."""
    if key in FIRST or key in LATER:
        return FIRST.index(key) if key in FIRST else 9
    return 5 if key.startswith("task/") else 6 if key.startswith("average/") else 7 if measure.better else 8


def _add_averages(runs: list[dict[str, Measure]]) -> dict[str, list[str]]:
    """Add averages of the shares of right answers, by group and of all groups, to the runs that have them all.

    An average is a measure like others: the documents of all its parts, weighted so that each part counts the same. A task
    counts once, whatever its metrics, and the parts of a benchmark that is there as a whole do not count. Returns the parts.
    """
    found = {key: measure for run in runs for key, measure in run.items() if _place(key, measure) in (5, 7)}
    shares: dict[str, str] = {}
    for key, measure in found.items():
        if key.startswith(("task/", "lm_eval/")) and measure.unit == "share" and measure.better == "higher":
            shares.setdefault("/".join(key.split("/")[:2]), key)
    wholes = tuple(f"{name}_" for name in shares if name.startswith("lm_eval/"))
    groups: dict[str, list[str]] = {}
    for name, key in shares.items():
        if not name.startswith(wholes):
            groups.setdefault(found[key].group, []).append(key)
    if len(groups) > 1:
        groups["all groups"] = [key for keys in groups.values() for key in keys]
    groups = {group: keys for group, keys in groups.items() if len(keys) > 1}
    for group, keys in groups.items():
        for run in (run for run in runs if all(key in run for key in keys)):
            parts = [run[key] for key in keys]
            value = math.fsum(part.value for part in parts) / len(parts)
            average = Measure(value, f"Average of {len(keys)} ({group})", group, "share", "higher")
            if all(part.items and part.documents and not part.weights for part in parts):
                items = tuple(value for part in parts for value in part.items or ())
                weights = tuple(1 / len(part.items or ()) for part in parts for _ in part.items or ())
                documents = digest_of([part.documents for part in parts])
                average = replace(average, items=items, weights=weights, documents=documents)
            run[f"average/{group}"] = average
    return {f"average/{group}": keys for group, keys in groups.items()}


def _judged(differences: dict[tuple[str, str], Difference | None]) -> Judged:
    known = {place: difference for place, difference in differences.items() if difference}
    adjusted = holm([difference.p for difference in known.values()])
    return {place: (d, p, verdict(d, p)) for (place, d), p in zip(known.items(), adjusted, strict=True)}
