"""Prepared rows and collated batches as sequences of tokens: which are trained, and which truncation cuts."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from .preference.collator import TokenColumn


@dataclass
class Sequence:
    """A row of a batch as the model sees it.

    Attributes:
        name: `"chosen"`, `"rejected"`, the name of a branch, `"completion"` or `"text"`.
        ids: Token ids, without padding.
        trained: Whether a token is a target of the loss, one flag a token.
    """

    name: str
    ids: list[int]
    trained: list[bool]


def responses_of(row: dict[str, Any]) -> dict[str, list[int]]:
    """All tokens of each response of a prepared row with its prompt, by the name of the response."""
    if "chosen_ids" in row:
        prompt = row.get("prompt_ids") or []
        found = {side: [*prompt, *row[f"{side}_ids"]] for side in ("chosen", "rejected")}
    elif "completion_ids" in row:
        return {"completion": [*row["prompt_ids"], *row["completion_ids"]]}
    else:
        return {"text": list(row["input_ids"])}
    for column, value in row.items():
        if column.endswith("_rows") and isinstance(value, list):
            name = column.removesuffix("_rows")
            found |= {f"{name} {i}": [*r["prompt_ids"], *r["completion_ids"]] for i, r in enumerate(value)}
    return found


def sequences_of(batch: dict[str, Any], columns: Iterable[Any] = ()) -> list[list[Sequence]]:
    """The rows of a batch as the model sees them, a list for each example.

    Args:
        batch: What a collator made.
        columns: Columns of the method; tokens whose number in a `TokenColumn` is 0 are not trained.
    """
    ids = batch["input_ids"]
    if "labels" in batch:
        kind, trained = "text", batch["labels"] != -100
        if "attention_mask" not in batch:  # rows one after the other, without padding
            positions = batch["position_ids"][0]
            places = positions.nonzero().flatten().tolist()
            end = places[-1] + 1 if places else 1  # behind it is padding, at position 0 too
            starts = (positions[:end] == 0).nonzero().flatten().tolist()
            slices = [slice(start, stop) for start, stop in zip(starts, [*starts[1:], end], strict=True)]
            return [[Sequence(kind, ids[0][part].tolist(), _targets(trained[0][part]))] for part in slices]
    elif "completion_mask" in batch:
        kind, trained = "completion" if "label" in batch else "pair", batch["completion_mask"] != 0
    else:  # a reward model reads the last token
        present = batch["attention_mask"]
        kind, trained = "pair", (present == 1) & (present.flip(1).cumsum(1).flip(1) == 1)
    if kind != "pair":
        return [[_sequence(kind, ids, batch["attention_mask"], trained, i)] for i in range(len(ids))]
    number = len(ids) // 2
    for column in columns:
        if isinstance(column, TokenColumn) and column.name in batch:
            start = 0 if column.response == "chosen" else number
            trained[start : start + number] &= batch[column.name] != 0
    found = [
        [
            _sequence(name, ids, batch["attention_mask"], trained, start + i)
            for name, start in (("chosen", 0), ("rejected", number))
        ]
        for i in range(number)
    ]
    for name in [key.removesuffix("_completion_mask") for key in batch if key.endswith("_completion_mask")]:
        ids, present, trained = (
            batch[f"{name}_{suffix}"] for suffix in ("input_ids", "attention_mask", "completion_mask")
        )
        for i, pair in enumerate(batch[f"{name}_pair"].tolist()):
            found[pair].append(_sequence(name, ids, present, trained, i))
    return found


def _sequence(name: str, ids: Any, present: Any, trained: Any, index: int) -> Sequence:
    own = present[index] != 0
    return Sequence(name, ids[index][own].tolist(), _targets(trained[index][own] != 0))


def _targets(trained: torch.Tensor) -> list[bool]:
    """Which tokens are predicted and trained: nothing predicts the first one."""
    return [False, *trained[1:].tolist()]


def rendered(sequence: Sequence, whole: dict[str, list[int]], tokenizer: Any) -> dict[str, Any]:
    """A sequence for a report: `name`, numbers of `tokens`, `trained` and `cut` ones, and `segments`, pairs of kind and text.

    Args:
        sequence: As the model sees it.
        whole: What `responses_of` says of its row, of which truncation left it.
        tokenizer: Decodes it, special tokens too.
    """
    ids, number = sequence.ids, len(sequence.ids)
    candidates = [all_ids for name, all_ids in whole.items() if name.split(" ")[0] == sequence.name]
    before: list[int] = []
    after: list[int] = []
    for all_ids in candidates:
        if all_ids[:number] == ids:
            after = all_ids[number:]
            break
        if all_ids[-number:] == ids:
            before = all_ids[:-number]
            break
    kinds = ["cut"] * len(before) + ["trained" if flag else "context" for flag in sequence.trained]
    kinds += ["cut"] * len(after)
    segments: list[tuple[str, list[int]]] = []
    for kind, token in zip(kinds, [*before, *ids, *after], strict=True):
        if not segments or segments[-1][0] != kind:
            segments.append((kind, []))
        segments[-1][1].append(token)
    return {
        "name": sequence.name,
        "tokens": number,
        "trained": sum(sequence.trained),
        "cut": len(before) + len(after),
        "segments": [[kind, tokenizer.decode(part)] for kind, part in segments],
    }
