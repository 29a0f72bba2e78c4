"""What an evaluation gives: a named number, with the value of every document behind it."""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


UNITS = ("share", "nats", "nats/token", "tokens", "score", "count")


@dataclass(frozen=True)
class Measure:
    """One number of an evaluation.

    Attributes:
        value: Mean of `items`, weighted by `weights`; NaN where nothing could be measured.
        title: What it is, in a few words.
        group: Measures of a group stand together in the report, e.g. `"preference"`, `"drift"`, `"benchmark"`.
        unit: One of `UNITS`. A share lies in [0, 1], and its differences are reported in points.
        better: `"higher"`, `"lower"`, or `None` where neither is better in itself.
        items: One value a document, for paired comparisons; `None` if there are none.
        weights: Weight of each item, e.g. its number of tokens; `None` is equal weights.
        documents: Digest of the documents behind the items. Only measures of the same documents are paired.
    """

    value: float
    title: str
    group: str
    unit: str
    better: str | None = None
    items: tuple[float, ...] | None = None
    weights: tuple[float, ...] | None = None
    documents: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The measure as JSON; NaN becomes null."""
        fields = asdict(self)
        fields["value"] = None if math.isnan(self.value) else self.value
        fields |= {name: None if fields[name] is None else list(fields[name]) for name in ("items", "weights")}
        return fields

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Measure":
        """The measure that `to_json` gave."""
        lists = {name: None if fields[name] is None else tuple(fields[name]) for name in ("items", "weights")}
        return cls(**(fields | lists | {"value": math.nan if fields["value"] is None else fields["value"]}))


def mean_of(
    items: Iterable[float],
    title: str,
    group: str,
    unit: str,
    better: str | None = None,
    weights: Iterable[float] | None = None,
    documents: Sequence[Any] | str | None = None,
) -> Measure:
    """The (weighted) mean of one value a document. `documents` are the documents, or the digest of them."""
    values = tuple(map(float, items))
    weighted = None if weights is None else tuple(map(float, weights))
    total = float(len(values)) if weighted is None else math.fsum(weighted)
    parts = values if weighted is None else [v * w for v, w in zip(values, weighted, strict=True)]
    value = math.fsum(parts) / total if total else math.nan
    digest = documents if documents is None or isinstance(documents, str) else digest_of(documents)
    return Measure(value, title, group, unit, better, values, weighted, digest)


def digest_of(content: Any) -> str:
    """16 hex digits that name JSON-like content."""
    text = json.dumps(content, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
