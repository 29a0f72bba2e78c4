"""Rows of single responses with feedback: what is checked, how the feedback of a row is completed, and how it is collated."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..checks import _check_same_kind, _is_ids, _kind, check_preference_dataset
from ..data.rows import check_implicit_prompts, check_texts, first_row
from ..preference.collator import WEIGHT, Column, Flag
from ..preference.trainer import pair_ids
from ..trl_internals import DataCollatorForUnpairedPreference


LABEL, SCORE, IS_SFT = Flag("label"), Column("score", low=0, high=1), Flag("is_sft")
REF_LOGPS = Column("ref_logps", high=1e-3)
PAIR_REF_LOGPS = (Column("ref_chosen_logps", high=1e-3), Column("ref_rejected_logps", high=1e-3))
PAIR_SCORES = (Column("chosen_score", low=0, high=1), Column("rejected_score", low=0, high=1))
# Columns that a batch has, where the dataset has them, beside those of a method
COLUMNS = (LABEL, SCORE, WEIGHT, IS_SFT)


def is_paired(row: Any) -> bool:
    return "chosen" in row and "rejected" in row


def complete_feedback(
    row: Any, threshold: float, fractional: bool = True, scores_needed: bool = False
) -> dict[str, Any]:
    """Return `label` and `score` of a row that may have one of them only; what cannot be known stays `None`.

    A demonstration (`is_sft`) without feedback is a perfect answer. A row of an unpaired pair with `chosen_score` and
    `rejected_score` is one with a score.

    Args:
        row: A row with `label`, `score`, or both.
        threshold: Least score of a row with label true.
        fractional: Whether scores other than 0 and 1 may stand without a label.
        scores_needed: Whether a row with label false needs a score.

    Raises:
        ValueError: The feedback contradicts itself, or does not do for the loss.
    """
    label, score = row.get("label"), row.get("score")
    if label is not None and score is None and "chosen_score" in row:  # with a score, it has been completed
        score = row["chosen_score" if label else "rejected_score"]
        label = None
    elif row.get("is_sft") is True and label is None and score is None:
        score = 1.0
    if row.get("is_sft") is True and (label is False or (score is not None and score < 1)):
        found = "the label false" if label is False else f"the score {score}"
        raise ValueError(
            f"A row is a demonstration (`is_sft`), which is a perfect answer, and has {found}. Set `is_sft` to false, or drop "
            "its label and score."
        )
    if label is None and score is not None:
        if not fractional and score not in (0, 1):
            remedy = "Round it, add a column 'label', or choose a loss for scores"
            if "chosen_score" in row:
                remedy = "Drop 'chosen_score' and 'rejected_score', or choose a loss for scores"
            raise ValueError(
                f"A row has the score {score} and no `label`, and the loss reads labels: the score must be 0 or 1. {remedy} "
                "(ULMA: `negative_loss='continuous'`)."
            )
        label = score >= threshold
    if scores_needed and label is False and score is None:
        raise ValueError(
            "A bad answer has no score, which the loss would take for 0. Add a column 'score' (for pairs 'chosen_score' and "
            "'rejected_score'), or choose a loss for labels (ULMA: `negative_loss='binary'`)."
        )
    return {"label": label, "score": float(label) if score is None and isinstance(label, bool) else score}


def pair_lengths(row: Any, processing_class: Any, eos_token: str) -> dict[str, list[int]]:
    """Return `pair_lengths`: the numbers of tokens of both responses of a pair, of which stored log-probabilities are sums."""
    ids = pair_ids(row, processing_class, eos_token)
    return {"pair_lengths": [len(ids["chosen_ids"]), len(ids["rejected_ids"])]}


def ref_logps_of_label(row: Any) -> dict[str, Any]:
    """Return the stored reference log-probability of a prepared row of an unpaired pair.

    Raises:
        ValueError: It is the sum over other tokens than those of the response: as a pair, both responses begin where the first
            of them differs from the prompt's tokens, and one of them may alone.
    """
    index = 0 if row["label"] else 1
    column, length = PAIR_REF_LOGPS[index].name, row["pair_lengths"][index]
    if len(row["completion_ids"]) != length:
        raise ValueError(
            f"The column '{column}' is a sum over {length} tokens, and as a single response {row.get('completion')!r:.80} has "
            f"{len(row['completion_ids'])}: the end of the prompt is tokenized together with the other response of the pair. "
            "Make single responses of the pairs (`trl.unpair_preference_dataset`), and store the log-probabilities of those."
        )
    return {REF_LOGPS.name: row[column]}


def check_unpaired_dataset(
    dataset: Any, name: str, columns: Sequence[Column], threshold: float, **feedback: bool
) -> None:
    """Check columns and types of a dataset: of its first row, and all feedback and numbers of a map-style one.

    Args:
        dataset: `Dataset` or `IterableDataset`, of single responses or of pairs.
        name: How the messages call it, e.g. `"train_dataset"`.
        columns: Columns of numbers and truth values that the method reads.
        threshold: As in `complete_feedback`.
        feedback: Options of `complete_feedback`.
    """
    row = first_row(dataset)
    if not row:
        raise ValueError(f"`{name}` is empty: it has no rows. Check the split, and any filter applied before.")
    paired = is_paired(row)
    if paired:
        _check_pairs(dataset, name, row)
    else:
        _check_single(dataset, name, row)
    given = [column for column in (LABEL, SCORE, IS_SFT, *PAIR_SCORES) if column.name in row]
    for where, values in _numbers(dataset, name, [column.name for column in (*given, *columns) if column.name in row]):
        for column in given:  # as it is given: a null may be completed
            if values[column.name] is not None:
                column.check(values[column.name], where)
        for label in (True, False) if paired else (values.get("label"),):
            try:
                completed = values | complete_feedback(values | {"label": label}, threshold, **feedback)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            for column in columns:
                if column.name in completed:
                    column.check(completed[column.name], where)


def _numbers(dataset: Any, name: str, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The columns of each row of a map-style dataset, of the first row of a stream, and how messages call the row."""
    if not hasattr(dataset, "num_rows") or not columns:
        row = first_row(dataset)
        yield f"`{name}`, first row", {column: row[column] for column in columns}
        return
    plain = dataset.with_format(None)
    for index, values in enumerate(zip(*(plain[column][:] for column in columns), strict=True)):
        yield f"`{name}`, row {index}", dict(zip(columns, values, strict=True))


def _check_pairs(dataset: Any, name: str, row: Any) -> None:
    if "prompt_ids" in row:
        raise ValueError(
            f"`{name}` has pairs that are tokenized ('prompt_ids', 'chosen_ids', 'rejected_ids'), of which single responses "
            "cannot be made. Drop these columns; the texts are tokenized anew."
        )
    check_preference_dataset(dataset, name, (*PAIR_SCORES, *PAIR_REF_LOGPS))
    if not {"prompt", "prompt_ids"} & set(row):
        check_implicit_prompts(dataset, name)
    if single := [column.name for column in (LABEL, SCORE, IS_SFT, REF_LOGPS) if column.name in row]:
        raise ValueError(
            f"`{name}` has pairs ('chosen', 'rejected') and the column '{single[0]}', which belongs to single responses. Drop "
            "it, or give one row a response ('prompt', 'completion'); scores of pairs are 'chosen_score' and 'rejected_score'."
        )
    scores = [column.name for column in PAIR_SCORES if column.name in row]
    if len(scores) == 1:
        raise ValueError(
            f"`{name}` has the column '{scores[0]}' but not the other one of 'chosen_score' and 'rejected_score'. Add it, or "
            "drop this one."
        )


def _check_single(dataset: Any, name: str, row: Any) -> None:
    if "image" in row or "images" in row:
        raise ValueError(
            f"`{name}` is a vision dataset (column 'image' or 'images'), which is not supported. Drop the column to train "
            "on the text alone, or use `trl.KTOTrainer`."
        )
    if "prompt_ids" in row and "completion_ids" in row:
        for column in ("prompt_ids", "completion_ids"):
            if not _is_ids(row[column]):
                raise TypeError(
                    f"`{name}`: column '{column}' must hold a list of token ids; the first row has {_kind(row[column])}."
                )
    else:
        missing = [column for column in ("prompt", "completion") if column not in row]
        if missing:
            raise ValueError(
                f"`{name}` lacks the column {' and '.join(map(repr, missing))}; its columns are {sorted(row)}. Expected "
                "'prompt' and 'completion' with 'label' or 'score' (or 'prompt_ids' and 'completion_ids'), or pairs: "
                "'chosen' and 'rejected'. Rename your columns."
            )
        _check_same_kind({column: row[column] for column in ("prompt", "completion")}, name)
        check_texts(dataset, name, ["prompt", "completion"])
    if not {"label", "score", "is_sft"} & set(row):
        raise ValueError(
            f"`{name}` has no feedback; its columns are {sorted(row)}. Expected 'label' (true for a good response) or 'score' "
            "(0 to 1). Demonstrations are good responses: `dataset.add_column('label', [True] * len(dataset))`."
        )


@dataclass
class UnpairedCollator(DataCollatorForUnpairedPreference):
    """[`~trl.trainer.kto_trainer.DataCollatorForUnpairedPreference`] with the columns of a method.

    Beside TRL's keys, a batch of N rows holds `score` and each extra column that the rows have, shape (N,), float32.

    Raises:
        TypeError, ValueError: A value is no number (no truth value), or out of its range.
    """

    columns: tuple[Column, ...] = ()

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        found = {}
        for column in self.columns:
            if column.name in examples[0]:
                values = [example[column.name] for example in examples]
                for value in values:
                    column.check(value, "the batch")
                found[column.name] = torch.tensor(values, dtype=torch.float32)
        batch = super().torch_call(examples)
        return found | batch  # TRL's label is a truth value
