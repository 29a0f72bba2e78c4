"""Methods that train on K scored responses to a prompt: [`ListTrainer`], on [`PreferenceTrainer`].

The best response of a list by its reward is the chosen one of a pair, the worst the rejected one, and those between are the
branch `others`: so that metrics, reference, weights and accumulation are those of pairs.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from datasets import Dataset, IterableDataset, concatenate_datasets

from ..checks import check_range
from ..data.caching import versioned
from ..data.rows import check_text, first_row
from ..trl_internals import global_then_local_main_first
from .collator import Branch, Column, PreferenceCollator
from .trainer import REF_COLUMNS, PreferenceBatch, PreferenceTrainer, prompt_and_response_ids


@dataclass(frozen=True)
class RewardsColumn(Column):
    """The rewards of the responses of a row; in a batch (B, K), with NaN where a row has fewer than K."""

    def check(self, value: Any, where: str) -> None:
        if not isinstance(value, list | tuple):
            raise TypeError(f"{where}: column '{self.name}' must hold lists of numbers, found {value!r}.")
        for number in value:
            if isinstance(number, bool) or not isinstance(number, Real) or not math.isfinite(number):
                raise ValueError(
                    f"{where}: column '{self.name}' holds {number!r} in {value}, expected finite numbers. Correct or drop "
                    "the row."
                )

    def tensor(self, values: list[Any]) -> torch.Tensor:
        width = max(map(len, values))
        return torch.tensor([[*row, *[math.nan] * (width - len(row))] for row in values], dtype=torch.float32)


REWARDS = RewardsColumn("rewards")
OTHERS = Branch("others")


# ---------------------------------------------------------------- rows


def check_lists(dataset: Any, name: str, size: int | None = None, preferences: bool = False) -> None:
    """Check the rows of a dataset of lists: of its first row, or all of a map-style one.

    Args:
        dataset: `Dataset` or `IterableDataset` with a column `completions`.
        name: How the messages call it.
        size: Responses of a group, into which the rows must divide.
        preferences: Whether a group must be two responses of different rewards.
    """
    first = first_row(dataset)
    if missing := [column for column in ("prompt", "rewards") if column not in first]:
        raise ValueError(
            f"`{name}` has the column 'completions' but lacks {' and '.join(map(repr, missing))}; its columns are "
            f"{sorted(first)}. Expected 'prompt', 'completions' (a list of responses) and 'rewards' (a list of numbers)."
        )
    if clash := [column for column in ("chosen", "rejected", *REF_COLUMNS) if column in first]:
        raise ValueError(
            f"`{name}` has the column 'completions', and {', '.join(map(repr, clash))}, which are made of it. Drop either."
        )
    rows: Iterable[dict[str, Any]] = [first]
    if isinstance(dataset, Dataset):
        rows = dataset.with_format(None).select_columns(["prompt", "completions", "rewards"])
    text = isinstance(first["prompt"], str)
    for index, row in enumerate(rows):
        _check_row(
            row["prompt"], row["completions"], row["rewards"], f"`{name}`, row {index}", text, size, preferences
        )


def _check_row(
    prompt: Any, completions: Any, rewards: Any, where: str, text: bool, size: int | None, preferences: bool
) -> None:
    kind = str if text else list
    if not isinstance(completions, list) or not all(isinstance(value, kind) for value in [prompt, *completions]):
        raise TypeError(
            f"{where}: 'completions' must be a list of {'strings' if text else 'lists of messages'}, as 'prompt' is, "
            f"found prompt {prompt!r}, completions {completions!r}."
        )
    check_text(prompt, where, "prompt")
    for completion in completions:
        check_text(completion, where, "completions")
    REWARDS.check(rewards, where)
    if len(completions) != len(rewards) or len(completions) < 2:
        raise ValueError(
            f"{where} has {len(completions)} completions and {len(rewards)} rewards, expected as many, two or more. "
            "Correct or drop the row."
        )
    if size is not None and len(completions) % size:
        raise ValueError(
            f"{where} has {len(completions)} completions, which do not divide into groups of {size}. Change the size of "
            "the groups, or drop completions."
        )
    if preferences:
        _check_preferences(rewards, size or len(rewards), where)


def _check_preferences(rewards: list[float], size: int, where: str) -> None:
    if size != 2:
        raise ValueError(
            f"{where} has {size} completions, and the loss is one of preferences between two. Split them into groups of two, "
            "or take a loss of rewards."
        )
    for first, second in zip(rewards[::2], rewards[1::2], strict=True):
        if first == second:
            raise ValueError(
                f"{where}: both responses of a group have the reward {first}, so that none is preferred. Drop the row, or "
                "take a loss of rewards."
            )


def as_groups(batch: dict[str, list[Any]], size: int | None, preferences: bool = False) -> dict[str, list[Any]]:
    """Split rows of lists into groups of `size` responses in their order (`None`: one a row), each a pair and `others`.

    chosen is the first response of the highest reward; rejected the last one of the lowest, by preference one that differs
    from chosen. `rewards` are put in the order chosen, rejected, others. Rows are checked as by `check_lists`, which sees the
    first one of a stream alone.
    """
    rest = [name for name in batch if name not in ("completions", "rewards")]
    result: dict[str, list[Any]] = {name: [] for name in (*rest, "chosen", "rejected", "others", "rewards")}
    for index, (completions, rewards) in enumerate(zip(batch["completions"], batch["rewards"], strict=True)):
        prompt = batch["prompt"][index]
        where = f"The row with the prompt {prompt!r:.80}"
        _check_row(prompt, completions, rewards, where, isinstance(batch["prompt"][0], str), size, preferences)
        step = size or len(completions)
        for start in range(0, len(completions), step):
            members = range(start, start + step)
            best = max(members, key=lambda i: (rewards[i], -i))
            worst = min(
                (i for i in members if i != best),
                key=lambda i: (rewards[i], completions[i] == completions[best], -i),
            )
            others = [i for i in members if i not in (best, worst)]
            group = {
                "chosen": completions[best],
                "rejected": completions[worst],
                "others": [completions[i] for i in others],
                "rewards": [float(rewards[i]) for i in (best, worst, *others)],
            }
            for name, value in ({name: batch[name][index] for name in rest} | group).items():
                result[name].append(value)
    return result


def _tokenize_others(row: dict[str, Any], processing_class: Any, eos_token: str) -> dict[str, Any]:
    rows = []
    for response in row["others"]:
        prompt_ids, completion_ids = prompt_and_response_ids(row, response, processing_class, eos_token)
        rows.append({"prompt_ids": prompt_ids, "completion_ids": completion_ids})
    return {OTHERS.rows_column: rows}


# ---------------------------------------------------------------- reference log-probabilities


def _one_a_row(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    rows = [row for others in batch[OTHERS.rows_column] for row in others]
    return {name: [row[name] for row in rows] for name in ("prompt_ids", "completion_ids")}


def _with_ref_logps(row: dict[str, Any], index: int, starts: list[int], values: list[float]) -> dict[str, Any]:
    others = row[OTHERS.rows_column]
    found = values[starts[index] : starts[index] + len(others)]
    return {OTHERS.rows_column: [other | {"ref_logps": value} for other, value in zip(others, found, strict=True)]}


@dataclass
class _AnyTwo:
    """Collates rows of two responses, to prompts of their own, as TRL collates chosen and rejected ones."""

    collator: PreferenceCollator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [
            {key: example[prefix + key] for key in ("prompt_ids", "completion_ids")}
            for prefix in ("", "second_")
            for example in examples
        ]
        batch = self.collator._collate_branch(OTHERS, [{OTHERS.rows_column: rows}])
        return {key: batch[f"{OTHERS.name}_{key}"] for key in ("input_ids", "attention_mask", "completion_mask")}


# ---------------------------------------------------------------- the trainer


class ListTrainer(PreferenceTrainer):
    """[`PreferenceTrainer`] on lists of scored responses.

    A row has `prompt`, `completions` (K >= 2 responses, texts or lists of messages) and `rewards` (K numbers); K may differ
    between rows. Preference pairs are lists of two, with the rewards 1 and 0 unless they have a column `rewards`. A `weight`
    multiplies the loss of each group of its row.

    Attributes:
        group_size: Responses of a group; `None` for all of a row.
        preferences_only: Whether a group must be two responses of different rewards.
    """

    columns = (REWARDS,)
    branches = (OTHERS,)
    scores_branches = True
    group_size: int | None = None
    preferences_only = False

    # ---------------------------------------------------------------- data

    def _grouped(self, dataset: Any) -> Any:
        names = list(first_row(dataset))
        arguments = {"size": self.group_size, "preferences": self.preferences_only}
        options = {"batched": True, "remove_columns": names, "fn_kwargs": arguments}
        if not isinstance(dataset, Dataset):
            options["batch_size"] = 1  # to look at the first row must not prepare a thousand
        return dataset.map(versioned(as_groups), **options)

    def _check_dataset(self, args: Any, dataset: Any, name: str, stored: bool) -> None:
        row = first_row(dataset)
        if "completions" in row:
            check_lists(dataset, name, self.group_size, self.preferences_only)
            with global_then_local_main_first():
                dataset = self._grouped(dataset if isinstance(dataset, Dataset) else dataset.take(1))
        elif row and OTHERS.rows_column not in row:
            self._check_pairs(dataset, name, row)
        super()._check_dataset(args, dataset, name, stored)
        if isinstance(dataset, IterableDataset) and args.precompute_ref_log_probs and not stored:
            raise ValueError(
                f"`{name}` is an `IterableDataset`, whose reference log-probs cannot be stored before training. Pass a "
                "`Dataset`, or set `precompute_ref_log_probs=False`."
            )

    def _check_pairs(self, dataset: Any, name: str, row: dict[str, Any]) -> None:
        if self.group_size not in (None, 2):
            raise ValueError(
                f"`{name}` holds pairs (its columns are {sorted(row)}), which do not divide into groups of "
                f"{self.group_size}. Drop the size of the groups, or pass 'prompt', 'completions' and 'rewards'."
            )
        if "rewards" not in row:
            return
        values = dataset.with_format(None)["rewards"] if isinstance(dataset, Dataset) else [row["rewards"]]
        for index, rewards in enumerate(values):
            REWARDS.check(rewards, f"`{name}`, row {index}")
            if len(rewards) != 2:
                raise ValueError(
                    f"`{name}`, row {index}: {len(rewards)} rewards for a pair, expected two, that of chosen first."
                )

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if "completions" in first_row(dataset):
            with global_then_local_main_first():
                dataset = self._grouped(dataset)
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def _tokenize_branch(self, dataset, branch, implicit_prompt, processing_class, args):
        row = first_row(dataset)
        if branch is not OTHERS or not row or OTHERS.rows_column in row or "others" not in row:
            return super()._tokenize_branch(dataset, branch, implicit_prompt, processing_class, args)
        options = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
        arguments = {"processing_class": processing_class, "eos_token": self._tokenizer.eos_token}
        return dataset.map(versioned(_tokenize_others, prompt_and_response_ids), fn_kwargs=arguments, **options)

    # ---------------------------------------------------------------- reference

    def _precompute_ref_logps(self, dataset, name, batch_size):
        dataset = super()._precompute_ref_logps(dataset, name, batch_size)
        if not isinstance(dataset, Dataset) or OTHERS.rows_column not in dataset.column_names:
            return dataset
        counts = [len(rows) for rows in dataset[OTHERS.rows_column]]
        number = sum(counts)
        first: dict[str, Any] = next((rows[0] for rows in dataset[OTHERS.rows_column] if rows), {})
        if not number or first.get("ref_logps") is not None:
            return dataset
        flat = dataset.map(versioned(_one_a_row), batched=True, remove_columns=dataset.column_names)
        half = (number + 1) // 2
        # TRL scores two responses a row; of an odd number the last one twice
        second = flat.select([*range(half, number), *[number - 1] * (number % 2)])
        second = second.rename_columns({key: f"second_{key}" for key in flat.column_names})
        twos = concatenate_datasets([flat.select(range(half)), second], axis=1)
        options = {key: getattr(self.args, key) for key in ("max_length", "truncation_mode", "pad_to_multiple_of")}
        saved, self.data_collator = (
            self.data_collator,
            _AnyTwo(PreferenceCollator(pad_token_id=self._tokenizer.pad_token_id, **options)),
        )
        try:
            scored = super()._precompute_ref_logps(twos, f"{name} (other responses)", batch_size)
        finally:
            self.data_collator = saved
        values = [value for column in REF_COLUMNS for value in scored[column]][:number]
        starts = [0]
        for count in counts[:-1]:
            starts.append(starts[-1] + count)
        with global_then_local_main_first():
            arguments = {"starts": starts, "values": values}
            return self._own(dataset.map(versioned(_with_ref_logps), with_indices=True, fn_kwargs=arguments))

    # ---------------------------------------------------------------- loss

    @staticmethod
    def lists_of(batch: PreferenceBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-ratios, rewards and mask of a batch of B lists, each (B, K): chosen first, then rejected, then the others.

        Rows of fewer than K responses are filled with 0, and False in the mask.
        """
        logratios = torch.stack([batch.chosen.logratios, batch.rejected.logratios], 1)
        mask = torch.ones_like(logratios, dtype=torch.bool)
        others = batch.branches.get(OTHERS.name)
        if others is not None and others.logps.numel():
            counts = torch.bincount(others.pair, minlength=logratios.size(0))
            rank = torch.arange(others.pair.numel(), device=counts.device) - (counts.cumsum(0) - counts)[others.pair]
            filled = logratios.new_zeros(counts.numel(), int(counts.max()))
            filled = filled.index_put((others.pair, rank), others.logratios)
            mask = torch.cat([mask, torch.arange(filled.size(1), device=counts.device) < counts[:, None]], 1)
            logratios = torch.cat([logratios, filled], 1)
        rewards = batch.columns.get(REWARDS.name)
        if rewards is None:  # pairs
            rewards = logratios.new_tensor([1.0, 0.0]).expand_as(logratios)
        return logratios, rewards.to(logratios.dtype).masked_fill(~mask, 0.0), mask


def check_group_size(name: str, size: int | None) -> None:
    """Raise unless `size` is `None` or a number of responses >= 2."""
    if size is not None:
        check_range(name, size, 2, integer=True)
