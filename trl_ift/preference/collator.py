"""Extra columns and extra branches of preference batches: how a method declares them, and how they are collated."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..trl_internals import DataCollatorForPreference, pad


@dataclass(frozen=True)
class Column:
    """A number per row that the loss reads, e.g. a weight or a soft label.

    Attributes:
        name: Column of the dataset, and key of `PreferenceBatch.columns`.
        low: Smallest value allowed.
        high: Largest value allowed.
        required: Whether the dataset must have it.
    """

    name: str
    low: float = -math.inf
    high: float = math.inf
    required: bool = False

    def check(self, value: Any, where: str) -> None:
        """Raise unless `value` is a finite number in the range."""
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(
                f"{where}: column '{self.name}' must hold numbers, found {value!r} ({type(value).__name__}). Fill or drop the "
                "row."
            )
        if not self.low <= float(value) <= self.high or math.isinf(value):
            low = "-inf" if math.isinf(self.low) else f"{self.low:g}"
            high = "inf" if math.isinf(self.high) else f"{self.high:g}"
            raise ValueError(
                f"{where}: column '{self.name}' holds {value}, expected a finite number in [{low}, {high}]. Correct or drop "
                "the row."
            )

    def values_of(self, dataset: Dataset) -> Iterable[Any]:
        """The values of all rows, as `check` takes them."""
        return dataset.with_format(None)[self.name][:]

    def tensor(self, values: list[Any]) -> torch.Tensor:
        """The values of a batch of B rows, float32, B first."""
        return torch.tensor(values, dtype=torch.float32)


@dataclass(frozen=True)
class TokenColumn(Column):
    """A number for each token of a response, its end-of-sequence token included; e.g. a weight. A list of floats per row.

    The tokens are those that the trainer makes of the response. In a batch, (B, T-1), the numbers stand where the policy's
    `token_logps` of their tokens do, with 0 elsewhere, and are truncated with them.

    Attributes:
        response: `"chosen"` or `"rejected"`.
    """

    response: str = "chosen"

    def check(self, value: Any, where: str) -> None:
        """Raise unless `value` is a list of finite numbers in the range."""
        numbers = np.asarray(value)
        if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iuf"):
            found = type(value).__name__ if numbers.ndim == 0 else f"a list like {list(value)[:3]!r}"
            raise TypeError(
                f"{where}: column '{self.name}' must hold a list of numbers, one a token of '{self.response}', found {found}. "
                "Fill or drop the row."
            )
        outside = ~((numbers >= self.low) & (numbers <= self.high) & np.isfinite(numbers))
        for number in numbers[outside][:1].tolist():
            super().check(number, where)

    def check_length(self, numbers: int, tokens: int, where: str) -> None:
        """Raise unless there is one number for each token of the response."""
        if numbers != tokens:
            raise ValueError(
                f"{where}: column '{self.name}' holds {numbers} numbers, and '{self.response}' has {tokens} tokens, with the "
                "end-of-sequence token. Compute the column with the tokenizer and the chat template of the training."
            )

    def values_of(self, dataset: Dataset) -> Iterable[Any]:
        return (row[self.name] for row in dataset.select_columns(self.name).with_format("numpy"))


@dataclass(frozen=True)
class Flag(Column):
    """A truth value per row; a batch has it as a float unless the collator of the method says otherwise."""

    def check(self, value: Any, where: str) -> None:
        """Raise unless `value` is a truth value."""
        if not isinstance(value, bool):
            raise TypeError(
                f"{where}: column '{self.name}' must hold true or false, found {value!r} ({type(value).__name__}). Convert the "
                f"column (`dataset.cast_column({self.name!r}, Value('bool'))`), and fill or drop rows without a value."
            )


WEIGHT = Column("weight", low=0.0)


@dataclass(frozen=True)
class Branch:
    """Responses beside chosen and rejected: scored by the policy in the same forward pass.

    Attributes:
        name: Key of `PreferenceBatch.branches`.
        column: Text column with one response to the row's own prompt (a string or a list of messages); `None` if the
            trainer attaches tokenized rows itself.
        aliases: Other names that the column may have.
    """

    name: str
    column: str | None = None
    aliases: tuple[str, ...] = ()

    @property
    def rows_column(self) -> str:
        """Column of the prepared dataset: a list of `{"prompt_ids", "completion_ids"}`, and `"ref_logps"` if stored."""
        return f"{self.name}_rows"

    def source(self, row: Any) -> str | None:
        """Name of the text column in `row`, or `None`."""
        return next((name for name in (self.column, *self.aliases) if name is not None and name in row), None)


# What `collate` adds to a batch for a branch, each under `<branch>_<suffix>`
BRANCH_KEYS = ("input_ids", "attention_mask", "completion_mask", "pair", "ref_logps")


@dataclass
class PreferenceCollator(DataCollatorForPreference):
    """[`~trl.trainer.dpo_trainer.DataCollatorForPreference`] with the extra columns and branches of a method.

    Beside TRL's keys, a batch of B pairs holds each extra column, shape (B,), or (B, T) with a number for each of the T
    `input_ids` of its response if it is a `TokenColumn`, and for each branch of N rows `<branch>_input_ids`,
    `<branch>_attention_mask`, `<branch>_completion_mask`, all (N, T), `<branch>_pair`, the index of the pair a row belongs to,
    (N,), and `<branch>_ref_logps`, (N,), where they are stored.

    Raises:
        TypeError, ValueError: A value of an extra column is no number or out of its range, or a `TokenColumn` has another
            number of values than its response has tokens.
    """

    columns: tuple[Column, ...] = ()
    branches: tuple[Branch, ...] = ()

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        for column in self.columns:
            if column.name in examples[0]:
                values = [example[column.name] for example in examples]
                for value in values:
                    column.check(value, "the batch")
                if isinstance(column, TokenColumn):
                    batch[column.name] = self._collate_tokens(column, examples, batch["input_ids"].size(1))
                else:
                    batch[column.name] = column.tensor(values)
        for branch in self.branches:
            if branch.rows_column in examples[0]:
                batch |= self._collate_branch(branch, examples)
        return batch

    @property
    def _window(self) -> slice:
        """The part of a sequence that truncation leaves."""
        if self.max_length is None:
            return slice(None)
        return slice(None, self.max_length) if self.truncation_mode == "keep_start" else slice(-self.max_length, None)

    def _collate_tokens(self, column: TokenColumn, examples: list[dict[str, Any]], width: int) -> torch.Tensor:
        """Numbers of tokens, (B, width): 0 on the prompt and on padding."""
        found = torch.zeros(len(examples), width)
        for row, example in enumerate(examples):
            values = example[column.name]
            column.check_length(len(values), len(example[f"{column.response}_ids"]), "the batch")
            numbers = torch.tensor([*[0.0] * len(example["prompt_ids"]), *values][self._window])
            found[row, : len(numbers)] = numbers
        return found

    def _collate_branch(self, branch: Branch, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [(pair, row) for pair, example in enumerate(examples) for row in example[branch.rows_column]]
        window = self._window
        ids, masks = [], []
        for _, row in rows:
            prompt, completion = row["prompt_ids"], row["completion_ids"]
            ids.append(torch.tensor([*prompt, *completion][window]))
            masks.append(torch.tensor([*[0] * len(prompt), *[1] * len(completion)][window]))
        pair = torch.tensor([pair for pair, _ in rows], dtype=torch.long)
        if rows:
            multiple = self.pad_to_multiple_of
            values = {
                "input_ids": pad(ids, self.pad_token_id, "right", multiple),
                "attention_mask": pad([torch.ones_like(row) for row in ids], 0, "right", multiple),
                "completion_mask": pad(masks, 0, "right", multiple),
            }
        else:
            values = dict.fromkeys(BRANCH_KEYS[:3], torch.zeros(0, 1, dtype=torch.long))
        if rows and rows[0][1].get("ref_logps") is not None:
            values["ref_logps"] = torch.tensor([row["ref_logps"] for _, row in rows], dtype=torch.float32)
        return {f"{branch.name}_{key}": value for key, value in {**values, "pair": pair}.items()}
