"""Checks of user input that run before any model is loaded.

Each raises with three parts: what was found, what was expected, what to change.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers.utils import logging

from .data.rows import check_texts, first_row


# One of these makes a local model folder usable without `processing_class`
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
WEIGHT_FILES = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
)

logger = logging.get_logger(__name__)


def check_range(
    name: str, value: Any, low: float, high: float = math.inf, low_open: bool = False, integer: bool = False
) -> None:
    """Raise unless `value` is a number in [low, high] ((low, high] with `low_open`); NaN is out of every range."""
    if integer and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"`{name}` must be an integer, got {value!r} ({type(value).__name__}).")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`{name}` must be a number, got {value!r} ({type(value).__name__}).")
    if not low <= value <= high or math.isinf(value) or (low_open and value == low):
        left, right = ("(" if low_open else "["), (f"{high:g}]" if high < math.inf else "inf)")
        raise ValueError(f"`{name}={value}` is out of range: it must lie in {left}{low:g}, {right}.")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}={value!r}` is not known. Choose one of: {', '.join(map(repr, choices))}.")


def check_unused(config: Any, names: Sequence[str], reason: str) -> None:
    """Raise if one of the fields `names` of a dataclass was changed from its default: it would have no effect."""
    for field in fields(config):
        if field.name in names:
            default = field.default_factory() if callable(field.default_factory) else field.default
            if getattr(config, field.name) != default:
                raise ValueError(f"`{field.name}={getattr(config, field.name)!r}` has no effect {reason}. Drop it.")


def check_quantization(quantization_config: Any) -> None:
    """Raise if a bitsandbytes quantization is asked for and bitsandbytes is not installed."""
    bits = next((b for b in (4, 8) if getattr(quantization_config, f"load_in_{b}bit", False)), None)
    if bits is not None and find_spec("bitsandbytes") is None:
        raise ImportError(
            f"{bits}-bit weights are asked for (`load_in_{bits}bit`), but bitsandbytes is not installed. Install it with "
            '`pip install "trl-ift[quantization]"`, or drop the option.'
        )


def check_model_source(model: Any, processing_class: Any) -> None:
    """Raise if the model's folder is missing its files or no tokenizer can be found for it."""
    if isinstance(model, str):
        path = Path(model)
        if not path.is_dir():
            return  # a Hub id: `from_pretrained` reports what is wrong with it
        if not (path / "config.json").is_file():
            hint = ""
            if (path / "adapter_config.json").is_file():
                hint = " It holds a PEFT adapter: load it with `AutoPeftModelForCausalLM` and pass the model."
            raise ValueError(f"The model folder `{model}` has no `config.json`.{hint}")
        if processing_class is None and not any((path / name).is_file() for name in _TOKENIZER_FILES):
            raise ValueError(
                f"The model folder `{model}` holds no tokenizer (none of {', '.join(_TOKENIZER_FILES)}). Save the "
                "tokenizer there with `tokenizer.save_pretrained(...)`, or pass it as `processing_class`."
            )
    elif processing_class is None and not getattr(getattr(model, "config", None), "_name_or_path", ""):
        raise ValueError(
            f"`model` is a {type(model).__name__} that was built in memory, so its tokenizer cannot be found. Pass the "
            "tokenizer as `processing_class`."
        )


def check_instance(model: torch.nn.Module, peft_config: Any) -> None:
    """Raise for a model that cannot be trained as it is."""
    if peft_config is None and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "No parameter of `model` requires a gradient, so that nothing would be trained. Load an adapter with "
            "`PeftModel.from_pretrained(..., is_trainable=True)`, or pass a `peft_config`."
        )
    if is_peft_model(model) and "default" not in model.peft_config:
        raise ValueError(
            f"The adapters of `model` are called {', '.join(map(repr, model.peft_config))}; the one that is trained must be "
            "called 'default'. Load it with `adapter_name='default'`."
        )


def check_peft(peft_config: Any, model: Any, method: str, prompt_learning: bool = False) -> None:
    """Raise for adapters on `lm_head`, which the fused head cannot train, and, unless allowed, for prompt learning."""
    existing = getattr(model, "peft_config", None)
    configs = [peft_config] if peft_config is not None else []
    configs += list(existing.values()) if isinstance(existing, Mapping) else []
    for config in configs:
        if getattr(config, "is_prompt_learning", False) and not prompt_learning:
            raise ValueError(
                f"{method} does not support prompt-learning PEFT ({type(config).__name__}): its virtual tokens shift the "
                "positions whose predictions are used. Use an adapter such as `LoraConfig` instead."
            )
        targets = getattr(config, "target_modules", None)
        if isinstance(targets, str):  # a regular expression, or "all-linear", which leaves the head out
            on_head = targets != "all-linear" and re.fullmatch(targets, "lm_head") is not None
        else:
            on_head = any(name == "lm_head" or name.endswith(".lm_head") for name in targets or [])
        if on_head:
            raise ValueError(
                "`target_modules` contains 'lm_head'. An adapter on `lm_head` would never be trained, because the "
                "log-probabilities are computed from `lm_head.weight` directly. Remove it from `target_modules`; to train "
                "the head, use `modules_to_save=['lm_head']`."
            )


def named_datasets(train_dataset: Any, eval_dataset: Any) -> dict[str, Any]:
    """The datasets that a trainer is given, by what messages call them; raise for a missing one and for other types."""
    if train_dataset is None:
        raise ValueError("`train_dataset` is required")
    named = {"train_dataset": train_dataset}
    if isinstance(eval_dataset, dict):
        named |= {f"eval_dataset[{key!r}]": dataset for key, dataset in eval_dataset.items()}
    elif eval_dataset is not None:
        named["eval_dataset"] = eval_dataset
    for name, dataset in named.items():
        if not isinstance(dataset, Dataset | IterableDataset):
            raise TypeError(f"`{name}` must be a `Dataset` or `IterableDataset`, got `{type(dataset).__name__}`.")
    return named


def check_sft_dataset(
    dataset: Any, name: str, text_field: str = "text", formatted: bool = False, every_row: bool = True
) -> None:
    """Check columns and types of an SFT dataset: of its first row, and the texts of all rows.

    Args:
        dataset: `Dataset` or `IterableDataset`.
        name: How the messages call it, e.g. `"train_dataset"`.
        text_field: Column of plain text, `dataset_text_field` of the config.
        formatted: Whether a `formatting_func` will build the text, so that any columns do.
        every_row: Whether the texts of all rows are read; not by tools that name a bad row when they come to it.
    """
    row = first_row(dataset)
    if not row:
        raise ValueError(f"`{name}` is empty: it has no rows. Check the split, and any filter applied before.")
    if "image" in row or "images" in row:
        raise ValueError(
            f"`{name}` is a vision dataset (column 'image' or 'images'), which is not supported. Drop the column to train "
            "on the text alone, or use `trl.SFTTrainer`."
        )
    if formatted:
        return
    kinds = {
        "input_ids": ("a list of token ids", _is_ids),
        text_field: ("a string", lambda value: isinstance(value, str)),
        "messages": ("a list of {'role', 'content'} messages", _is_messages),
        "conversations": ("a list of messages", lambda value: isinstance(value, list) and len(value) > 0),
    }
    # A mixture has the columns of all its parts, null where they are not used
    column = next((column for column in kinds if row.get(column) is not None), None)
    column = column or next((column for column in kinds if column in row), None)
    if "prompt" in row and "completion" in row and column != "input_ids":
        prompt, completion = row["prompt"], row["completion"]
        both_text = isinstance(prompt, str) and isinstance(completion, str)
        if not both_text and not (_is_messages(prompt) and _is_messages(completion)):
            raise TypeError(
                f"`{name}`: columns 'prompt' and 'completion' must both be strings, or both be lists of "
                f"{{'role', 'content'}} messages; the first row has {_kind(prompt)} and {_kind(completion)}."
            )
    elif "prompt" in row and column != "input_ids":
        if "chosen" in row:
            hint = "For a preference dataset: `dataset.rename_column('chosen', 'completion')`."
        else:
            hint = "Rename the column with the answers to 'completion', or drop 'prompt' to train on the whole text."
        raise ValueError(f"`{name}` has a column 'prompt' but no 'completion'; its columns are {sorted(row)}. {hint}")
    elif column is not None:
        expected, is_valid = kinds[column]
        if not is_valid(row[column]):
            raise TypeError(
                f"`{name}`: column '{column}' must hold {expected}; the first row has {_kind(row[column])}."
            )
    else:
        raise ValueError(
            f"`{name}` has the columns {sorted(row)}. Expected 'messages' or '{text_field}' (language modeling), 'prompt' and "
            f"'completion', or 'input_ids' (pre-tokenized). Rename your columns, or set `dataset_text_field`."
        )
    if column == "input_ids" or not every_row:
        return
    answer = "completion" if "completion" in row and "prompt" in row else column
    texts = (
        ["prompt", "completion"]
        if answer == "completion"
        else [name for name in (text_field, "messages") if name in row]
    )
    if column == text_field and not _is_messages(row.get("messages")):  # TRL drops the column 'messages'
        texts = [name for name in texts if name != "messages"]
    check_texts(dataset, name, texts, nullable=len(texts) > 1 and answer != "completion")
    if answer in texts and hasattr(dataset, "num_rows") and all(map(is_blank, dataset.with_format(None)[answer])):
        raise ValueError(
            f"`{name}`: column '{answer}' is blank in all rows, so that nothing would be trained. Check it."
        )


def check_preference_dataset(
    dataset: Any, name: str, columns: Sequence[Any] = (), branches: Sequence[Any] = ()
) -> None:
    """Check columns and types of a preference dataset: of its first row, and all numbers of a map-style one.

    Args:
        dataset: `Dataset` or `IterableDataset`.
        name: How the messages call it, e.g. `"train_dataset"`.
        columns: `Column`s of numbers that the method reads.
        branches: `Branch`es whose text column must be there.
    """
    row = first_row(dataset)
    if not row:
        raise ValueError(f"`{name}` is empty: it has no rows. Check the split, and any filter applied before.")
    if "image" in row or "images" in row:
        raise ValueError(
            f"`{name}` is a vision dataset (column 'image' or 'images'), which is not supported. Drop the column to train "
            "on the text alone, or use `trl.DPOTrainer`."
        )
    tokenized = ("prompt_ids", "chosen_ids", "rejected_ids")
    if set(tokenized) <= set(row):
        for column in tokenized:
            if not _is_ids(row[column]):
                raise TypeError(
                    f"`{name}`: column '{column}' must hold a list of token ids; the first row has {_kind(row[column])}."
                )
    else:
        missing = [column for column in ("chosen", "rejected") if column not in row]
        if missing:
            raise ValueError(
                f"`{name}` lacks the column {' and '.join(map(repr, missing))}; its columns are {sorted(row)}. Expected "
                "'prompt', 'chosen' and 'rejected' (or all three as token ids: 'prompt_ids', 'chosen_ids', 'rejected_ids'). "
                "Rename your columns."
            )
        texts: dict[str, Any] = {column: row[column] for column in ("prompt", "chosen", "rejected") if column in row}
        _check_same_kind(texts, name)
        check_texts(dataset, name, list(texts))
    for branch in branches:
        if branch.column is None or branch.rows_column in row or f"{branch.column}_ids" in row:
            continue
        source = branch.source(row)
        if source is None:
            wanted = " or ".join(map(repr, (branch.column, *branch.aliases)))
            raise ValueError(
                f"`{name}` lacks the column {wanted} ({branch.name} response); its columns are {sorted(row)}. Rename or add it."
            )
        if "prompt_ids" in row and "prompt" not in row:
            raise ValueError(
                f"`{name}` is tokenized ('prompt_ids', 'chosen_ids', 'rejected_ids') but for the column '{source}'. Add its "
                f"token ids as '{branch.column}_ids', or pass the texts."
            )
        _check_same_kind({column: row[column] for column in ("prompt", "chosen", source) if column in row}, name)
        check_texts(dataset, name, [source])
    stored = [column for column in ("ref_chosen_logps", "ref_rejected_logps") if column in row]
    if len(stored) == 1:
        raise ValueError(
            f"`{name}` has the column '{stored[0]}' but not the other one: stored reference log-probabilities need both "
            "'ref_chosen_logps' and 'ref_rejected_logps'. Add it, or drop this one."
        )
    for column in columns:
        if column.name not in row:
            if column.required:
                raise ValueError(f"`{name}` lacks the column '{column.name}'; its columns are {sorted(row)}. Add it.")
            continue
        if hasattr(dataset, "num_rows"):
            for index, value in enumerate(column.values_of(dataset)):
                column.check(value, f"`{name}`, row {index}")
        else:
            column.check(row[column.name], f"`{name}`, first row")


def check_collator(collator: Any, dataset: Any, keys: Mapping[str, str], ours: type) -> None:
    """Raise for a user's collator that loses what the loss reads.

    Args:
        collator: The collator.
        dataset: Prepared dataset, whose first row is tried.
        keys: Columns that the loss reads, where a dataset has them, and the keys of a batch that they become.
        ours: Class from which it could be derived.
    """
    row = first_row(dataset)
    batch = collator([row])
    if lost := [column for column, key in keys.items() if column in row and key not in batch]:
        raise ValueError(
            f"`data_collator` ({type(collator).__name__}) leaves out {', '.join(map(repr, lost))}, which the loss reads. "
            f"Derive it from `{ours.__module__}.{ours.__name__}`, or drop the columns."
        )


def _check_same_kind(texts: Mapping[str, Any], name: str) -> None:
    if all(isinstance(value, str) for value in texts.values()) or all(map(_is_messages, texts.values())):
        return
    found = ", ".join(f"'{column}': {_kind(value)}" for column, value in texts.items())
    raise TypeError(
        f"`{name}`: these columns must all be strings, or all be lists of {{'role', 'content'}} messages; the first row has "
        f"{found}."
    )


def _is_ids(value: Any) -> bool:
    return hasattr(value, "__len__") and all(
        isinstance(v, int) or getattr(v, "dtype", None) is not None for v in value
    )


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(m, Mapping) and "role" in m for m in value)


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {type(value[0]).__name__}" if value else "an empty list"
    return type(value).__name__


# ---------------------------------------------------------------- rows that cannot be trained


def is_blank(value: Any, eos_token: str = "") -> bool:
    """Whether a response, text or messages, says nothing (a tool call says something)."""
    if isinstance(value, str):
        return value.removesuffix(eos_token).strip() == ""
    said = (str(m.get("content") or "").removesuffix(eos_token).strip() or m.get("tool_calls") for m in value or [])
    return not any(said)


def responses_differ(row: dict[str, Any], eos_token: str) -> bool:
    """Whether the responses of a pair differ, but for an end that TRL adds."""
    chosen, rejected = (
        value.removesuffix(eos_token) if isinstance(value, str) else value
        for value in (row["chosen"], row["rejected"])
    )
    return chosen != rejected


def probe_of(dataset: Any) -> Any:
    """The rows in which a trainable one must be found: of a stream the first thousand, as it may be endless."""
    return dataset.with_format(None) if isinstance(dataset, Dataset) else dataset.take(1000)


def report_dropped(reasons: Mapping[str, int], total: int, name: str) -> None:
    """Warn of the rows of a dataset that are not trained: how many of `total`, by the reason."""
    if reasons:
        found = ", ".join(f"{number} ({reason})" for reason, number in reasons.items())
        logger.warning(f"Dropped {sum(reasons.values())} of {total} rows of the {name} dataset: {found}.")


# ---------------------------------------------------------------- folders


def is_complete_checkpoint(checkpoint: str | os.PathLike) -> bool:
    """Whether a Trainer checkpoint was written to its end (the Trainer writes its state last)."""
    try:
        json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def resolve_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str) -> str | None:
    """Return the checkpoint folder to resume from, or `None` to start afresh.

    With `True` it is the last complete one in `output_dir`; a later one whose writing was interrupted is named in a warning.

    Raises:
        ValueError: The folder named (or, with `True`, every one in `output_dir`) is missing or was interrupted while it
            was written. The message names the newest complete one.
    """
    if not resume_from_checkpoint:
        return None
    folder = Path(output_dir)
    found = sorted(folder.glob("checkpoint-*"), key=_step_of) if folder.is_dir() else []
    found = [path for path in found if path.is_dir() and _step_of(path) >= 0]
    complete = [path for path in found if is_complete_checkpoint(path)]
    remedy = f"Resume from `{complete[-1]}`" if complete else "Start without `resume_from_checkpoint`"
    if resume_from_checkpoint is True:
        if not found:
            raise ValueError(f"`resume_from_checkpoint=True`, but `{output_dir}` holds no checkpoint. {remedy}.")
        wanted = str((complete or found)[-1])
        if complete and (broken := found[found.index(complete[-1]) + 1 :]):
            logger.warning_once(
                f"Incomplete (no whole `trainer_state.json`), as the run was interrupted while it was being written: "
                f"{', '.join(f'`{path}`' for path in broken)}. Training goes on from `{wanted}`."
            )
    else:
        wanted = str(resume_from_checkpoint)
        if not Path(wanted).is_dir():
            raise ValueError(f"`resume_from_checkpoint`: there is no folder `{wanted}`. {remedy}.")
    if not is_complete_checkpoint(wanted):
        raise ValueError(
            f"The checkpoint `{wanted}` is incomplete (it has no whole `trainer_state.json`): the run was interrupted while "
            f"it was being written. {remedy}; the incomplete folder can be deleted."
        )
    return wanted


def _step_of(checkpoint: Path) -> int:
    step = checkpoint.name.removeprefix("checkpoint-")
    return int(step) if step.isdigit() else -1


def check_output_dir(args: Any, checkpoint: str | None = None) -> None:
    """Raise if training would overwrite the weights of an earlier run in `args.output_dir`.

    Passes when the run resumes (`checkpoint`), when the folder holds neither weights nor checkpoints, or with
    `args.overwrite_output_dir=True`.
    """
    folder = Path(args.output_dir)
    if args.overwrite_output_dir or checkpoint is not None or not folder.is_dir():
        return
    found = [name for name in WEIGHT_FILES if (folder / name).is_file()]
    found += [path.name for path in sorted(folder.glob("checkpoint-*"), key=_step_of) if path.is_dir()]
    if found:
        raise ValueError(
            f"`output_dir={str(folder)!r}` already holds the results of another run ({', '.join(found[:3])}). Continue it "
            "with `resume_from_checkpoint=True`, choose another `output_dir`, or set `overwrite_output_dir=True` to write "
            "over it."
        )
