"""The loss of every row of an SFT dataset under a model, in shards that outlive any interruption.

score_dataset   losses of all rows, as a folder of shards and as a dataset; `trl-ift score` on the command line
load_scores     reads such a folder back
Scorer          the same for lists of rows, to be used in a pipeline of your own (Ray Data, Spark, ...)
"""

import argparse
import hashlib
import inspect
import io
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, IterableDataset
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl import ModelConfig, get_quantization_config, is_conversational

from ..checks import check_choice, check_quantization, check_range, check_sft_dataset
from ..hub.card import library_versions
from ..scripts.data import load_split
from ..scripts.tools import add_dataset_options, add_model_options, run_tool
from ..scripts.train import usage_error
from ..trl_internals import get_config_model_id, prepare_sft_rows
from .fingerprint import model_fingerprint
from .inference import (
    LIKE,
    batches,
    check_model,
    check_runnable,
    lent,
    load_model,
    load_tokenizer,
    own_device,
    sequence_log_probs,
    tokenizer_digest,
)
from .rows import check_text
from .shards import (
    MANIFEST,
    check_manifest,
    differing_versions,
    read_manifest,
    remove_scratch_files,
    write_file,
    write_manifest,
)


# What stands for the prompt where a completion is scored without it (IFD's reference implementation)
DIRECT_PROMPT = "### Response:"
# Settings that the tokens of a row depend on: two sets of scores can be compared only if they agree in these
ROW_SETTINGS = (
    "tokenizer", "max_length", "truncation_mode", "completion_only_loss", "assistant_only_loss", "dataset_text_field",
    "tokens_of_first_row",
)  # fmt: skip
_FORMAT = "scores-1"
_ROWS = "rows.json"
_COLUMNS = (
    "prompt", "completion", "messages", "conversations", "input_ids", "labels", "completion_mask", "assistant_masks",
    "tools", "chat_template_kwargs",
)  # fmt: skip
_INDEX = "trl_ift_row"
_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("row_hash", pa.string()),
        ("token_hash", pa.string()),
        ("num_tokens", pa.int64()),
        ("nll_sum", pa.float64()),
        ("nll", pa.float64()),
    ]
)


@dataclass(frozen=True)
class RowOptions:
    """The options of [`~trl.SFTConfig`] that decide what a row looks like to the model, with its defaults."""

    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    dataset_text_field: str = "text"
    eos_token: str | None = None
    chat_template_path: str | None = None

    @classmethod
    def of(cls, args: Any) -> "RowOptions":
        """Take them from an `SFTConfig`."""
        if args is None or isinstance(args, cls):
            return args or cls()
        if (getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset"):
            raise ValueError(
                "`dataset_kwargs={'skip_prepare_dataset': True}`: rows are scored as TRL prepares them. Drop the option; rows "
                "with `input_ids` and `labels` are left as they are."
            )
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})

    def __post_init__(self):
        if self.max_length is not None:
            check_range("max_length", self.max_length, 1, integer=True)
        check_choice("truncation_mode", self.truncation_mode, ("keep_start", "keep_end"))
        path = self.chat_template_path
        if path is not None and not (path.endswith((".jinja", ".j2")) and Path(path).is_file()):
            raise ValueError(
                f"`chat_template_path={path!r}` is no template file (.jinja, .j2). The template of another model may bring new "
                "tokens, which the model to score does not have. Save the template in a file and name that."
            )

    def resolved(self, first_row: Mapping[str, Any]) -> "RowOptions":
        """Decide from the first row of a dataset whether only completions are scored, as TRL does, unless that is said."""
        if self.completion_only_loss is not None:
            return self
        return replace(self, completion_only_loss="prompt" in first_row and "completion" in first_row)

    def applied_to(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """Return the tokenizer with the end-of-sequence token and the template: a copy, if they are others."""
        if self.eos_token is None and self.chat_template_path is None:
            return tokenizer
        tokenizer = deepcopy(tokenizer)
        if self.eos_token is not None:
            if self.eos_token not in tokenizer.get_vocab():
                raise ValueError(f"`eos_token={self.eos_token!r}` is not in the vocabulary of the tokenizer.")
            tokenizer.eos_token = self.eos_token
        if self.chat_template_path is not None:
            tokenizer.chat_template = Path(self.chat_template_path).read_text(encoding="utf-8")
        return tokenizer


class Scorer:
    """
    Scores lists of rows under a model: what [`score_dataset`] runs on every shard.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model on its device, with its active adapter. It is given back as it was after each call.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer; the model's by default.
        args ([`~trl.SFTConfig`], *optional*):
            Config of the training that the scores are for: `max_length`, `truncation_mode`, `completion_only_loss`,
            `assistant_only_loss`, `dataset_text_field`, `eos_token` and `chat_template_path` are read.
        batch_tokens (`int`, *optional*, defaults to `8192`):
            Most tokens of a batch, padding included; bounds the memory. A longer row is a batch of its own.
        direct_prompt (`str`, *optional*):
            Text that takes the place of the prompt, for the loss of a completion without it (IFD). The scored tokens stay the
            same; a row without a prompt has no score.

    Example:

    ```python
    from transformers import AutoModelForCausalLM
    from trl_ift.data import Scorer

    scorer = Scorer(AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct"))
    scorer([{"prompt": "2 + 2 =", "completion": " 4"}])     # [{'nll': ..., 'nll_sum': ..., 'num_tokens': ..., ...}]
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        args: Any = None,
        *,
        batch_tokens: int = 8192,
        direct_prompt: str | None = None,
    ):
        check_range("batch_tokens", batch_tokens, 1, integer=True)
        check_model(model, processing_class, None, {})
        check_runnable(model)
        self.model = model
        self.options = RowOptions.of(args)
        self.tokenizer = self.options.applied_to(load_tokenizer(model, processing_class, {}))
        self.vocabulary = model.get_input_embeddings().num_embeddings
        self.batch_tokens = batch_tokens
        self.direct_ids = _direct_ids(direct_prompt, self.tokenizer)
        self.tokens = self.padded_tokens = 0  # of all batches so far, the latter with padding

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """
        Return a dictionary for each row, in their order.

        `nll_sum`, the negative log-likelihood in nats, summed over the `num_tokens` scored tokens; `nll`, its mean; both NaN
        for a row without scored tokens, and `nll_sum` also where the model gives a value that is not finite. `row_hash` names
        the content of the row, `token_hash` its token ids and labels.

        Raises:
            ValueError: TRL cannot prepare a row (the message names its position).
        """
        if not rows:
            return []
        rows = [content_of(row, self.options) for row in rows]
        self.options = self.options.resolved(rows[0])  # by the first row of the first call
        prepared = _prepare(rows, self.tokenizer, self.options)
        for index, row in enumerate(prepared):
            for ids, least in zip(row or (), (0, -100), strict=False):
                _check_ids(ids, index, self.vocabulary, least)
        sequences = [row if row is None else self._sequence(*row) for row in prepared]
        counts = [0 if row is None else int(sum(label != -100 for label in row[1][1:])) for row in sequences]
        found: list[dict[str, Any]] = [
            {
                "row_hash": row_hash(row),
                "token_hash": _token_hash(tokens),
                "num_tokens": count,
                "nll_sum": float("nan"),
                "nll": float("nan"),
            }
            for row, tokens, count in zip(rows, prepared, counts, strict=True)
        ]
        kept = {index: row for index, row in enumerate(sequences) if row is not None and counts[index]}
        to_score, pad_id = list(kept.values()), self.tokenizer.pad_token_id
        with lent(self.model):
            log_probs = sequence_log_probs(self.model, to_score, self.batch_tokens, 0 if pad_id is None else pad_id)
        for index, value in zip(kept, log_probs, strict=True):
            if np.isfinite(value):
                found[index]["nll_sum"] = 0.0 - value  # not -0.0
                found[index]["nll"] = found[index]["nll_sum"] / counts[index]
        lengths = [len(ids) for ids, _ in to_score]
        self.tokens += sum(lengths)
        self.padded_tokens += sum(len(b) * lengths[b[0]] for b in batches(lengths, self.batch_tokens, LIKE))
        return found

    def _sequence(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]] | None:
        """The tokens to score, and their labels; `None` for a row without a prompt, if another takes its place."""
        if self.direct_ids is None:
            return ids, labels
        start = _first_label(labels)
        return None if start == 0 else (self.direct_ids + ids[start:], [-100] * len(self.direct_ids) + labels[start:])


def score_dataset(
    model: str | PreTrainedModel | PeftModel,
    dataset: Dataset | IterableDataset,
    output_dir: str | os.PathLike | None = None,
    *,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    args: Any = None,
    direct_prompt: str | None = None,
    batch_tokens: int = 8192,
    shard_size: int = 1000,
    part: tuple[int, int] | None = None,
    adapter: str | None = None,
    model_init_kwargs: dict[str, Any] | None = None,
    quantization_config: Any = None,
) -> Dataset | None:
    """
    Return the loss of every row under a model: the loss that TRL's `SFTTrainer` would train on.

    The folder grows by whole shards. A run that was interrupted, in any way, goes on when it is called again with the same
    arguments, and gives the same scores as an uninterrupted one. Processes of `accelerate launch` or `torchrun`, on one
    machine or on several that share the folder, take turns at the shards, and never wait for each other but at the end.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Hub id, folder or instance. An instance is used where it is, with its active adapter, and is given back as it
            was: within `with model.disable_adapter():` it is its base model.
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Any text dataset that `SFTTrainer` takes. A stream is scored by chunks, and has to give the same rows each time.
        output_dir (`str`, *optional*):
            Folder of the shards `scores-00000.parquet`, ... and of `manifest.json`. Without it nothing is kept: the run cannot
            be continued, and every process scores all rows.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer; the model's by default.
        args ([`~trl.SFTConfig`], *optional*):
            Config of the training that the scores are for; see [`Scorer`]. Its defaults are those of TRL.
        direct_prompt (`str`, *optional*):
            Text that takes the place of the prompt, for IFD's loss of a completion alone; see [`Scorer`].
        batch_tokens (`int`, *optional*, defaults to `8192`):
            Most tokens of a batch, padding included; bounds the memory.
        shard_size (`int`, *optional*, defaults to `1000`):
            Rows of a shard: what an interruption can cost, and what one process takes at a time.
        part (`tuple[int, int]`, *optional*):
            `(p, P)` for the p-th of P independent jobs (0 <= p < P): it takes the shards p, p + P, ... and does not wait
            for the others.
        adapter (`str`, *optional*):
            Folder or Hub id of a PEFT adapter, loaded on a model that is named by a string.
        model_init_kwargs (`dict`, *optional*):
            Arguments of `from_pretrained`, e.g. `{"dtype": "bfloat16"}`. As in TRL, `dtype` defaults to `"float32"`.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization of a model that is named by a string.

    Returns:
        [`~datasets.Dataset`]: A row for each row of the dataset: `index`; `row_hash` of its content and `token_hash` of its
            token ids and labels; `num_tokens` that are scored; `nll_sum` and `nll`, the sum and the mean of their negative
            log-likelihoods in nats, NaN for a row without scored tokens or where the model's value is not finite. `None` for a
            `part` while other parts are missing.

    Raises:
        ValueError, TypeError, ImportError, OSError: Something in the input is wrong, `output_dir` holds other scores or cannot
            be written.
    """
    init_kwargs = dict(model_init_kwargs or {})
    if quantization_config is not None:
        init_kwargs["quantization_config"] = quantization_config
    options = RowOptions.of(args)
    for name, value in (("batch_tokens", batch_tokens), ("shard_size", shard_size)):
        check_range(name, value, 1, integer=True)
    process, processes = _check_part(part)
    if output_dir is None:
        if part is not None:
            raise ValueError("`part` is for jobs that write into one folder. Name it with `output_dir`.")
        process, processes = 0, 1
    check_model(model, processing_class, adapter, init_kwargs)
    dataset = _check_dataset(dataset, options)
    first_row = content_of(next(iter(dataset)), options)
    options = options.resolved(first_row)
    check_prompts(direct_prompt, first_row, options)
    if options.assistant_only_loss and not is_conversational(first_row):
        raise ValueError("`assistant_only_loss=True`, but the dataset is not conversational. Drop the option.")
    tokenizer = options.applied_to(load_tokenizer(model, processing_class, init_kwargs))
    (prepared,) = _prepare([first_row], tokenizer, options)  # a template that fails does so here
    _direct_ids(direct_prompt, tokenizer)
    settings = {
        "rows": len(dataset) if isinstance(dataset, Dataset) else None,
        "dataset": dataset_digest(dataset, options),
        "tokenizer": tokenizer_digest(tokenizer),
        **{name: getattr(options, name) for name in ROW_SETTINGS if hasattr(options, name)},
        "tokens_of_first_row": _token_hash(prepared),
        "direct_prompt": direct_prompt,
        "shard_size": shard_size,
    }
    with _folder(output_dir) as folder:
        check_manifest(folder, _FORMAT, settings, "scores")
        _check_writable(folder)

        source = model if isinstance(model, str) else get_config_model_id(model.config)
        if isinstance(model, str):
            model = load_model(model, adapter, init_kwargs, own_device(processes))
        check_runnable(model)
        settings |= {
            "policy": model_fingerprint(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "attn_implementation": model.config._attn_implementation,
        }
        contents = {"model": source, "revision": getattr(model.config, "_commit_hash", None), "adapter": adapter}
        _claim(folder, settings, contents | {"batch_tokens": batch_tokens})

        scorer = Scorer(model, tokenizer, options, batch_tokens=batch_tokens, direct_prompt=direct_prompt)
        shows_progress = process == 0 or part is not None
        try:
            rows = _score_shards(folder, dataset, scorer, shard_size, process, processes, shows_progress)
            if settings["rows"] is None:
                _record_rows(folder, rows)
            if processes == 1:
                scores = load_scores(folder)
            elif part is None:
                scores = _wait_for_all(folder, process)
            elif (found := _complete(folder)) is None:
                return None
            else:
                scores = found
            remove_scratch_files(folder)
        except KeyboardInterrupt:
            if shows_progress and output_dir is not None:
                print(
                    f"\nInterrupted. The shards that are finished are kept in {folder}; to go on, run the same again.",
                    file=sys.stderr,
                )
            raise
    if process == 0 or part is not None:
        _warn_unscored(scores, options)
    return scores


def load_scores(folder: str | os.PathLike) -> Dataset:
    """Load the scores that `score_dataset` has written.

    Raises:
        ValueError: The folder holds none, or some are missing or damaged.
    """
    folder = Path(folder).expanduser()
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"`{folder}` holds no scores: it has no {MANIFEST}. Give the folder that was `output_dir`.")
    manifest = read_manifest(folder)
    if manifest.get("format") != _FORMAT:
        raise ValueError(f"The {MANIFEST} in `{folder}` is not one of `score_dataset` (or of another version).")
    settings = manifest.part("settings")
    shard_size = settings.number("shard_size", 1)
    rows = None if settings["rows"] is None else settings.number("rows")
    if rows is None and (folder / _ROWS).is_file():
        rows = json.loads((folder / _ROWS).read_text())["rows"]
    again = "Run the scoring again with the same arguments to finish them."
    if rows is None:
        raise ValueError(f"The scores in `{folder}` are incomplete: the end of the stream was not reached. {again}")
    number = -(-rows // shard_size)
    missing = [shard for shard in range(number) if not shard_path(folder, shard).is_file()]
    if missing:
        raise ValueError(
            f"The scores in `{folder}` are incomplete: {len(missing)} of {number} shards are missing (the first is "
            f"{shard_path(folder, missing[0]).name}). {again}"
        )
    tables = []
    for shard in range(number):
        table = read_shard(shard_path(folder, shard))
        first, last = shard * shard_size, min((shard + 1) * shard_size, rows)
        if table is None or not table.column("index").equals(pa.chunked_array([np.arange(first, last)])):
            raise ValueError(
                f"The shard `{shard_path(folder, shard)}` is damaged. {again} Only this one is scored anew."
            )
        tables.append(table)
    return Dataset(pa.concat_tables(tables))


# ---------------------------------------------------------------- rows


def column_of(scores: Dataset, name: str) -> pa.ChunkedArray:
    """A column of a set of scores, without a Python object for every value."""
    return scores.with_format("arrow")[:].column(name)


def content_of(row: Mapping[str, Any], options: RowOptions) -> dict[str, Any]:
    """Return the columns of a row that TRL reads."""
    return {name: row[name] for name in (*_COLUMNS, options.dataset_text_field) if name in row}


def row_hash(content: Mapping[str, Any]) -> str:
    """Return 16 hex digits of the content of a row. Fields of messages that are null, as Arrow adds them, do not count."""
    return _digest(json.dumps(_without_nulls(content), sort_keys=True, default=str).encode())


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(v) for key, v in value.items() if v is not None}
    if isinstance(value, np.ndarray | np.generic):  # rows of other libraries
        value = value.tolist()
    return [_without_nulls(v) for v in value] if isinstance(value, list | tuple) else value


def _token_hash(tokens: tuple[list[int], list[int]] | None) -> str:
    """16 hex digits of token ids and labels."""
    return _digest(np.asarray(tokens or ((), ()), dtype=np.int64).tobytes())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _prepare(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, options: RowOptions
) -> list[tuple[list[int], list[int]] | None]:
    """Return token ids and labels of each row as in training; `None` for a row that training drops."""
    try:
        return _prepare_all(rows, tokenizer, options)
    except Exception:
        for index, row in enumerate(rows):
            try:
                _prepare_all([row], tokenizer, options)
            except Exception as error:
                _check_columns(row, index, options)
                raise ValueError(
                    f"row {index}: TRL cannot prepare it ({type(error).__name__}: {error}). Mend or drop the row: "
                    f"{str(dict(row))[:200]}"
                ) from error
        raise ValueError(
            "TRL can prepare these rows one by one but not together: rows of different kinds (texts, messages, token ids) must "
            "not be mixed in one dataset. Convert them to one kind."
        ) from None


def _check_columns(row: Mapping[str, Any], index: int, options: RowOptions) -> None:
    """Raise if texts or messages are what is wrong with a row."""
    if "input_ids" in row:
        return
    names = [name for name in ("prompt", "completion", "messages", options.dataset_text_field) if name in row]
    if not names and "conversations" not in row:
        raise ValueError(
            f"row {index} has no text: its columns are {list(row)}. Expected 'prompt' and 'completion', 'messages' or "
            f"'{options.dataset_text_field}'."
        )
    for name in names:
        check_text(row[name], f"row {index}", name)


def _prepare_all(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, options: RowOptions
) -> list[tuple[list[int], list[int]] | None]:
    def numbered() -> Iterator[dict[str, Any]]:
        for index, row in enumerate(rows):
            yield {**row, _INDEX: index}

    prepared = prepare_sft_rows(
        IterableDataset.from_generator(numbered),
        tokenizer,
        max_length=options.max_length,
        truncation_mode=options.truncation_mode,
        completion_only_loss=bool(options.completion_only_loss),
        assistant_only_loss=options.assistant_only_loss,
        dataset_text_field=options.dataset_text_field,
    )
    found: list[tuple[list[int], list[int]] | None] = [None] * len(rows)
    for row in prepared:
        ids, labels = list(row["input_ids"]), list(row["labels"])
        if len(ids) != len(labels):
            raise ValueError(
                f"row {row[_INDEX]} has {len(ids)} token ids and {len(labels)} labels. It needs one for each."
            )
        found[row[_INDEX]] = (ids, labels)
    return found


def _check_ids(ids: Sequence[int], index: int, vocabulary: int, least: int) -> None:
    """Raise unless these are tokens of the model, or labels, among which -100 is none."""
    numbers = np.asarray(ids)
    if numbers.size and numbers.dtype.kind not in "iuO":  # O: integers that are too large for an array
        raise TypeError(f"row {index} has token ids that are no integers: {list(ids)[:3]}. Mend or drop the row.")
    wrong = [token for token in (min(ids, default=0), max(ids, default=0)) if not least <= token < vocabulary]
    if wrong or (numbers.size and ((numbers < 0) & (numbers != -100)).any()):
        found = wrong[0] if wrong else int(numbers[(numbers < 0) & (numbers != -100)][0])
        raise ValueError(
            f"row {index} has the token id {found}, and the model has {vocabulary} tokens. The tokenizer (or the one that the "
            "dataset was tokenized with) is another model's."
        )


def _first_label(labels: Sequence[int]) -> int:
    """Position of the first scored token; the number of tokens if there is none."""
    return next((position for position, label in enumerate(labels) if label != -100), len(labels))


def _direct_ids(direct_prompt: str | None, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    ids = None if direct_prompt is None else list(tokenizer(direct_prompt)["input_ids"])
    if ids == []:
        raise ValueError(
            f"`direct_prompt={direct_prompt!r}` has no tokens: nothing would predict the first token of a completion. "
            f"The default is {DIRECT_PROMPT!r}."
        )
    return ids


def _check_dataset(dataset: Any, options: RowOptions) -> Dataset | IterableDataset:
    """Check the first row, and leave out the columns that are not read."""
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(
            f"`dataset` is a {type(dataset).__name__}; expected a `Dataset` or an `IterableDataset`. Of a dictionary of "
            "splits, pass one."
        )
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        raise ValueError(
            "`dataset` has a transform (`with_transform`), which TRL does not train on either. Apply it with `map` first."
        )
    dataset = dataset.with_format(None)
    check_sft_dataset(dataset, "dataset", options.dataset_text_field, every_row=False)
    names = list(content_of(next(iter(dataset)), options))
    return dataset.select_columns(names) if isinstance(dataset, Dataset) else dataset


def check_prompts(direct_prompt: str | None, first_row: Mapping[str, Any], options: RowOptions) -> None:
    """Raise if `direct_prompt` is asked for and rows have no prompts that it could replace."""
    if direct_prompt is None or options.assistant_only_loss or "labels" in first_row:
        return
    if options.completion_only_loss is False or not {"prompt", "completion"} <= set(first_row):
        raise ValueError(
            f"`direct_prompt={direct_prompt!r}` takes the place of prompts: rows must have 'prompt' and 'completion', and "
            f"`completion_only_loss` must not be False; the columns are {sorted(first_row)}."
        )


def dataset_digest(dataset: Dataset | IterableDataset, options: RowOptions) -> str | None:
    """Digest of some rows, all over the dataset; the rows of each shard are compared when it is met again."""
    if isinstance(dataset, IterableDataset):
        return None
    places = sorted({round(place) for place in np.linspace(0, len(dataset) - 1, 64)})
    return _digest(" ".join(row_hash(content_of(dataset[place], options)) for place in places).encode())


def _chunks(dataset: Dataset | IterableDataset, size: int) -> Iterator[tuple[int, Iterable[Mapping[str, Any]], int]]:
    """Yield the number, the rows and the number of rows of each shard."""
    if isinstance(dataset, Dataset):
        for shard, start in enumerate(range(0, len(dataset), size)):
            end = min(start + size, len(dataset))
            yield shard, dataset.select(range(start, end)), end - start
    else:
        rows, shard = iter(dataset), 0
        while chunk := list(islice(rows, size)):
            yield shard, chunk, len(chunk)
            shard += 1


# ---------------------------------------------------------------- shards


def shard_path(folder: Path, shard: int) -> Path:
    """Path of a shard. The file is there iff the shard is finished."""
    return folder / f"scores-{shard:05d}.parquet"


def read_shard(path: Path) -> pa.Table | None:
    """Return the table of a shard, or `None` if the file is damaged: cut short, or with wrong checksums."""
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError):
        return None
    return table if table.schema.equals(_SCHEMA) else None


def _write_shard(path: Path, rows: list[dict[str, Any]], start: int) -> None:
    table = pa.Table.from_pylist([{"index": start + i, **row} for i, row in enumerate(rows)], schema=_SCHEMA)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, write_page_checksum=True)
    write_file(path, buffer.getvalue())


def _score_shards(
    folder: Path,
    dataset: Dataset | IterableDataset,
    scorer: Scorer,
    shard_size: int,
    process: int,
    processes: int,
    shows_progress: bool,
) -> int:
    """Score the shards of this process that are not there yet; return the number of rows of the dataset."""
    with _Progress(dataset, scorer, shard_size, process, processes, shows_progress) as progress:
        total = 0
        for shard, rows, number in _chunks(dataset, shard_size):
            start, total = total, total + number
            if shard % processes != process:
                continue
            path = shard_path(folder, shard)
            contents = [content_of(row, scorer.options) for row in rows]
            if not (path.is_file() and _is_finished(path, contents, start)):
                try:
                    scores = scorer(contents)
                except ValueError as error:
                    raise ValueError(f"`dataset`, rows from {start}: {error}") from error.__cause__
                _write_shard(path, scores, start)
            progress.update(number)
    return total


def _is_finished(path: Path, contents: list[dict[str, Any]], start: int) -> bool:
    """Whether a shard that is there is whole; raise if it is of other rows."""
    table = read_shard(path)
    if table is None:
        warnings.warn(f"The shard '{path}' is damaged: it is scored anew.")
        return False
    found = table.column("row_hash").to_pylist()
    expected = [row_hash(row) for row in contents]
    if found != expected or table.column("index")[0].as_py() != start:
        differing = (i for i, (old, new) in enumerate(zip(found, expected, strict=False)) if old != new)
        row = start + next(differing, min(len(found), len(expected)))
        raise ValueError(
            f"`output_dir='{path.parent}'` holds scores of another dataset: row {row} is not what it was. Choose another "
            "`output_dir`, or give the same dataset to go on there."
        )
    return True


def _check_part(part: tuple[int, int] | None) -> tuple[int, int]:
    """Return the number of this process, and how many there are."""
    if part is None:  # set by `accelerate launch` and `torchrun`; no group of processes is needed
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not (isinstance(part, Sequence) and len(part) == 2 and all(type(n) is int for n in part)):
        raise TypeError(
            f"`part={part!r}` must be two integers: the number of this job, from 0, and how many there are."
        )
    process, processes = part
    if not 0 <= process < processes:
        raise ValueError(f"`part={part!r}`: the number of the job must lie in [0, {processes}), jobs count from 0.")
    return process, processes


@contextmanager
def _folder(output_dir: str | os.PathLike | None) -> Iterator[Path]:
    """The folder of the shards: the one that is named, or a temporary one."""
    if output_dir is not None:
        yield Path(output_dir).expanduser()
    else:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)


def _check_writable(folder: Path) -> None:
    """Raise before the model is loaded if nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0" * 4096)
    except OSError as error:
        raise OSError(
            f"`output_dir='{folder}'` cannot be written: {error}. Free some space, or choose another folder."
        ) from error


def _claim(folder: Path, settings: dict[str, Any], contents: dict[str, Any]) -> None:
    """Write the manifest, or, where there is one, compare with it."""
    versions = library_versions()
    if not (folder / MANIFEST).is_file():
        manifest = {"format": _FORMAT, **contents, "settings": settings, "versions": versions}
        write_manifest(
            folder, manifest, keep_existing=True
        )  # of another job that starts now, perhaps with other settings
    check_manifest(folder, _FORMAT, settings, "scores")
    found = read_manifest(folder)
    if found["batch_tokens"] != contents["batch_tokens"]:
        warnings.warn(
            f"The first scores in '{folder}' were made with `batch_tokens={found['batch_tokens']}`: the rest may be rounded "
            "otherwise."
        )
    if differing := differing_versions(found["versions"], versions):
        warnings.warn(
            f"The first scores in '{folder}' were made with {differing}: the rest may not be what an uninterrupted run "
            "would have given."
        )


def _record_rows(folder: Path, rows: int) -> None:
    """Record how many rows a stream has."""
    path = folder / _ROWS
    if not path.is_file():
        write_file(path, json.dumps({"rows": rows}).encode())
    found = json.loads(path.read_text())["rows"]
    if found != rows:
        raise ValueError(
            f"The stream gave {rows} rows, and {found} when it was scored into `output_dir='{folder}'` before. It must give "
            "the same rows each time. Choose another `output_dir`."
        )


def _complete(folder: Path) -> Dataset | None:
    """The scores, if they are complete and whole (another process may be about to mend a shard)."""
    try:
        return load_scores(folder)
    except ValueError:
        return None


def _wait_for_all(folder: Path, process: int) -> Dataset:
    """The scores, when the other processes have written theirs. By the files: a collective has a timeout."""
    pause, waited = 0.2, 0.0
    while (scores := _complete(folder)) is None:
        time.sleep(pause)
        if process == 0 and waited < 10 <= waited + pause:
            print(
                f"Waiting for the shards of the other processes (WORLD_SIZE={os.environ.get('WORLD_SIZE')}) in {folder}. For "
                "jobs that do not wait, see `part` (`--part`).",
                file=sys.stderr,
            )
        waited, pause = waited + pause, min(1.5 * pause, 20.0)
    return scores


def _warn_unscored(scores: Dataset, options: RowOptions) -> None:
    """Raise if no row has a score; warn if some have none."""
    counts, sums = column_of(scores, "num_tokens").to_numpy(), column_of(scores, "nll_sum").to_numpy()
    empty, infinite = int((counts == 0).sum()), int((~np.isfinite(sums) & (counts > 0)).sum())
    if empty + infinite == 0:
        return
    found = f"{empty} have no scored token after truncation to `max_length={options.max_length}`" if empty else ""
    found += (" and " if empty and infinite else "") + (f"the loss of {infinite} is not finite" if infinite else "")
    if empty + infinite == len(scores):
        raise ValueError(
            f"No row can be scored: of {len(scores)} rows, {found}. Raise `max_length`, check the labels and "
            "`completion_only_loss`, or use another dtype."
        )
    warnings.warn(f"Of {len(scores)} rows, {found}: their scores are NaN, and they are never selected.")


class _Progress:
    """A bar over the rows of this process, shown by the first one, with the speed."""

    def __init__(
        self,
        dataset: Dataset | IterableDataset,
        scorer: Scorer,
        shard_size: int,
        process: int,
        processes: int,
        shown: bool,
    ):
        total = None
        if isinstance(dataset, Dataset):
            own = range(process * shard_size, len(dataset), processes * shard_size)
            total = sum(min(shard_size, len(dataset) - start) for start in own)
        options = {} if shown else {"disable": True}  # else TQDM_DISABLE decides
        self.bar = tqdm(total=total, unit="row", desc="Scoring", **options)
        self.scorer, self.start = scorer, time.monotonic()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def update(self, rows: int) -> None:
        if tokens := self.scorer.tokens:
            speed, padding = tokens / (time.monotonic() - self.start), 1 - tokens / self.scorer.padded_tokens
            self.bar.set_postfix_str(f"{speed:.0f} tokens/s, {padding:.1%} padding", refresh=False)
        self.bar.update(rows)


# ---------------------------------------------------------------- the command line

_HELP = {
    "batch_tokens": "most tokens of a batch; bounds the memory",
    "shard_size": "rows of a shard, the unit of progress",
}


def make_parser(prog: str = "trl-ift score") -> argparse.ArgumentParser:
    """Return the parser of the command. Defaults are those of `score_dataset` and of `trl.SFTConfig`."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Write the loss of every row of an SFT dataset under a model. An interrupted run goes on where it was when "
        "the same command is given again. `trl-ift select` selects rows by the losses under two models.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="YAML file of options; those on the command line win")
    add_model_options(parser)
    add_dataset_options(parser)
    add("--output_dir", required=True, help="folder of the scores")
    add_row_options(parser)
    add(
        "--direct_prompt",
        nargs="?",
        const=DIRECT_PROMPT,
        help=f"score completions without their prompts, behind this text ({DIRECT_PROMPT!r} if none is given), for IFD",
    )
    signature = inspect.signature(score_dataset).parameters
    for name, text in _HELP.items():
        add(f"--{name}", type=int, default=signature[name].default, help=text)
    add(
        "--part", metavar="p/P", help="this is independent job p (from 0) of P: take every P-th shard, wait for nobody"
    )
    parser.error = partial(usage_error, prog)  # type: ignore[method-assign]
    return parser


def add_row_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `SFTConfig` that decide what a row looks like to the model."""
    add, default = parser.add_argument, RowOptions()
    add("--max_length", type=_int_or_none, default=default.max_length, help="most tokens of a row, or `none`")
    add("--truncation_mode", choices=("keep_start", "keep_end"), default=default.truncation_mode, help="what is kept")
    add(
        "--completion_only_loss",
        type=_bool,
        metavar="true|false",
        help="whether only completions are scored (default: yes if there is a prompt)",
    )
    add("--assistant_only_loss", action="store_true", help="score assistant messages only")
    add("--dataset_text_field", default=default.dataset_text_field, help="column of plain text")
    add("--eos_token", help="end-of-sequence token, if not the tokenizer's")
    add("--chat_template_path", help="file of a chat template, if not the tokenizer's")


def row_options(args: argparse.Namespace) -> RowOptions:
    """Return the options that `add_row_options` added."""
    return RowOptions(**{field.name: getattr(args, field.name) for field in fields(RowOptions)})


def _int_or_none(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


def _bool(text: str) -> bool:
    values = {"true": True, "false": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return values[text.lower()]


def parse_part(text: str | None) -> tuple[int, int] | None:
    """Read `p/P`."""
    if text is None:
        return None
    numbers = text.split("/")
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        raise ValueError(f"`--part {text}`: expected two numbers, as in `--part 0/4`.")
    return int(numbers[0]), int(numbers[1])


def main(argv: list[str]) -> int:
    """Run `trl-ift score` and return its exit code."""
    return run_tool(make_parser(), argv, _score, "trl_ift.data.scoring")


def _score(args: argparse.Namespace) -> None:
    check_quantization(args)
    part = parse_part(args.part)
    options = row_options(args)
    dataset = load_split(args.dataset_name, args.dataset_split, args.dataset_config, args.dataset_streaming)
    scores = score_dataset(
        os.path.expanduser(args.model_name_or_path),
        dataset,
        args.output_dir,
        args=options,
        direct_prompt=args.direct_prompt,
        part=part,
        adapter=args.adapter,
        model_init_kwargs={"dtype": args.dtype, "trust_remote_code": args.trust_remote_code},
        quantization_config=get_quantization_config(ModelConfig(dtype=args.dtype, load_in_4bit=args.load_in_4bit)),
        **{name: getattr(args, name) for name in _HELP},
    )
    if os.environ.get("RANK", "0") != "0":
        return
    if scores is None:
        print(f"Part {args.part} is done. Other parts of {args.output_dir} are missing yet.")
        return
    counts, sums = column_of(scores, "num_tokens").to_numpy(), column_of(scores, "nll_sum").to_numpy()
    valid = np.isfinite(sums)
    tokens = counts[valid].sum()
    print(f"{len(scores)} rows, {tokens} scored tokens, mean loss {sums[valid].sum() / tokens:.4f} nats a token.")
    print(f"Written to {args.output_dir}.")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
