"""Log-probabilities under a reference, computed once and stored with the data: `trl-ift references`.

The folder is a dataset that any training on it reads (`--dataset_name`), without a reference model, with any seed, beta or
method, on any machine:

    data/train-00000-of-00003.parquet    all columns of the data, the log-probabilities, and `ref_settings`
    references/train/manifest.json       what they were computed with

A file is there iff it is finished, so that an interruption costs one at most. `ref_settings` is what the trainers compare with
their own options: a sum over the tokens of another length or template would be wrong, and nobody would see it.
"""

import argparse
import hashlib
import inspect
import io
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl import ModelConfig, get_quantization_config

from ..checks import check_choice, check_preference_dataset, check_quantization, check_range
from ..hub.card import library_versions
from ..preference.trainer import REF_COLUMNS, pair_ids, prompt_and_response_ids
from ..reference import REF_SETTINGS
from ..scripts.data import load_split
from ..scripts.tools import add_dataset_options, add_model_options, run_tool
from ..scripts.train import usage_error
from ..trl_internals import get_config_model_id
from ..unpaired.data import REF_LOGPS, check_unpaired_dataset, is_paired
from .fingerprint import model_fingerprint
from .inference import (
    check_model,
    check_runnable,
    lent,
    load_model,
    load_tokenizer,
    own_device,
    sequence_log_probs,
    tokenizer_digest,
)
from .rows import check_implicit_prompts, first_row, naming_the_row
from .shards import check_manifest, claim_shards, remove_scratch_files, wait_until, write_file


_FORMAT = "references-1"
_WHAT = "reference log-probabilities"


def store_references(
    model: str | PreTrainedModel | PeftModel,
    dataset: Dataset,
    output_dir: str | os.PathLike,
    *,
    split: str = "train",
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    batch_tokens: int = 16384,
    shard_size: int = 1000,
    adapter: str | None = None,
    model_init_kwargs: dict[str, Any] | None = None,
    quantization_config: Any = None,
) -> Dataset:
    """
    Write a dataset with the log-probabilities of its responses under a reference, for trainings without a reference model.

    They are those that a trainer computes with `precompute_ref_log_probs=True`: summed over the tokens of a response that
    `max_length` leaves, at temperature 1. The folder grows by whole files: a run that was interrupted goes on when it is called
    again with the same arguments. Processes of `accelerate launch` or `torchrun` share the files, and wait for each other at
    the end.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The reference: Hub id, folder or instance, with its active adapter.
        dataset ([`~datasets.Dataset`]):
            Pairs (`prompt`, `chosen`, `rejected`, or both responses with their prompt), or single responses with feedback
            (`prompt`, `completion`, and `label` or `score`); strings or messages.
        output_dir (`str`):
            Folder of the dataset. Other splits may be written into it, too.
        split (`str`, *optional*, defaults to `"train"`):
            Name of the split that the rows become.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the trainings; the model's by default.
        max_length (`int`, *optional*, defaults to `1024`):
            As in the config of the trainings: most tokens of a prompt with its response; `None` for all.
        truncation_mode (`str`, *optional*, defaults to `"keep_start"`):
            As in the config of the trainings: which tokens `max_length` leaves. Trainings on single responses know
            `"keep_start"` only.
        batch_tokens (`int`, *optional*, defaults to `16384`):
            Most tokens of a batch, padding included; bounds the memory.
        shard_size (`int`, *optional*, defaults to `1000`):
            Rows of a file: what an interruption can cost, and what one process takes at a time.
        adapter (`str`, *optional*):
            Folder or Hub id of a PEFT adapter, loaded on a model that is named by a string.
        model_init_kwargs (`dict`, *optional*):
            Arguments of `from_pretrained`, e.g. `{"dtype": "bfloat16"}`. As in TRL, `dtype` defaults to `"float32"`.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization of a model that is named by a string.

    Returns:
        [`~datasets.Dataset`]: The dataset with `ref_chosen_logps` and `ref_rejected_logps` (`ref_logps` for single responses),
            in nats, and `ref_settings`: what they were computed with, as JSON.

    Raises:
        ValueError, TypeError, ImportError, OSError: Something in the input is wrong, `output_dir` holds other log-probabilities
            or cannot be written; before the model is loaded, where that can be.
    """
    init_kwargs = dict(model_init_kwargs or {})
    if quantization_config is not None:
        init_kwargs["quantization_config"] = quantization_config
    for name, value in (("batch_tokens", batch_tokens), ("shard_size", shard_size), ("max_length", max_length)):
        if name != "max_length" or value is not None:
            check_range(name, value, 1, integer=True)
    check_choice("truncation_mode", truncation_mode, ("keep_start", "keep_end"))
    if not re.fullmatch(r"\w+", split):
        raise ValueError(f"`split={split!r}` must consist of letters, digits and underscores.")
    check_model(model, processing_class, adapter, init_kwargs)
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"`dataset` is a {type(dataset).__name__}; expected a `Dataset`. Of a dictionary of splits pass one; a stream can "
            "be stored with `Dataset.from_generator`."
        )
    dataset = dataset.with_format(None)
    columns = _check_rows(dataset, truncation_mode)
    tokenizer = load_tokenizer(model, processing_class, init_kwargs)
    if tokenizer.eos_token is None:
        raise ValueError("The tokenizer has no end-of-sequence token, which trainers end responses with. Set one.")
    with naming_the_row(dataset, "dataset", _texts(dataset), tokenizer):  # a template that fails does so here
        _sequences(dataset[0], tokenizer, max_length, truncation_mode)

    of_tokens = {
        "tokenizer": tokenizer_digest(tokenizer),
        "max_length": max_length,
        "truncation_mode": truncation_mode,
    }
    settings = {"rows": len(dataset), "dataset": _digest(dataset), **of_tokens, "shard_size": shard_size}
    folder = Path(output_dir).expanduser()
    manifest_folder = folder / "references" / split
    check_manifest(manifest_folder, _FORMAT, settings, _WHAT)
    shards = _Shards(folder / "data", split, len(dataset), shard_size)
    shards.check_folder(expected=manifest_folder.is_dir())

    source = model if isinstance(model, str) else get_config_model_id(model.config)
    process, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if isinstance(model, str):
        model = load_model(model, adapter, init_kwargs, own_device(processes))
    check_runnable(model)
    of_model = {"reference": model_fingerprint(model), "dtype": str(model.dtype).removeprefix("torch.")}
    settings |= of_model
    check_manifest(manifest_folder, _FORMAT, settings, _WHAT)
    contents = {"model": source, "revision": getattr(model.config, "_commit_hash", None), "adapter": adapter}
    manifest = {"format": _FORMAT, **contents, "settings": settings, "versions": library_versions()}
    claim_shards(manifest_folder, manifest, _WHAT)
    check_manifest(manifest_folder, _FORMAT, settings, _WHAT)  # of another job that starts now

    text = json.dumps(of_model | of_tokens)
    own = range(process, shards.number, processes)
    hidden = {} if process == 0 else {"disable": True}  # else TQDM_DISABLE decides
    try:
        with tqdm(total=sum(map(shards.rows_of, own)), unit="row", desc="Scoring the reference", **hidden) as bar:
            for shard in own:
                if not shards.is_finished(shard):
                    part = dataset.select(shards.range_of(shard))
                    values = _score(part, model, tokenizer, max_length, truncation_mode, batch_tokens, shards, shard)
                    for number, column in enumerate(columns):
                        part = part.add_column(column, values[:, number])
                    shards.write(shard, part.add_column(REF_SETTINGS, [text] * len(part)))
                bar.update(shards.rows_of(shard))
    except KeyboardInterrupt:
        if process == 0:
            print(
                f"\nInterrupted. The files that are finished are kept in {folder}; to go on, run the same again.",
                file=sys.stderr,
            )
        raise
    wait_until(lambda: all(shards.path(shard).is_file() for shard in range(shards.number)))
    remove_scratch_files(shards.folder)
    return Dataset.from_parquet([str(shards.path(shard)) for shard in range(shards.number)])


def _check_rows(dataset: Dataset, truncation_mode: str) -> tuple[str, ...]:
    """Check the rows; return the columns that are written."""
    row = first_row(dataset)
    single = "completion" in row and not is_paired(row)
    if single:
        check_unpaired_dataset(dataset, "dataset", (), threshold=0.5)
        if truncation_mode != "keep_start":
            raise ValueError(
                "`truncation_mode='keep_end'`: trainings on single responses keep the start. Drop the option."
            )
    else:
        check_preference_dataset(dataset, "dataset")
    if not set(_texts(dataset)) & {"chosen", "completion"}:
        raise ValueError("`dataset` has token ids and no texts, so that no tokenizer could be told. Pass the texts.")
    if "prompt" not in row:
        check_implicit_prompts(dataset, "dataset")
    columns = (REF_LOGPS.name,) if single else REF_COLUMNS
    if present := [column for column in (*columns, REF_SETTINGS) if column in row]:
        raise ValueError(f"`dataset` has the column '{present[0]}' already. Remove it to store new values.")
    return columns


def _texts(dataset: Dataset) -> list[str]:
    return [name for name in ("prompt", "chosen", "rejected", "completion") if name in dataset.column_names]


def _digest(dataset: Dataset) -> str:
    """16 hex digits of all rows, the same on every machine."""
    digest = hashlib.sha256()
    for row in dataset:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _sequences(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int | None, truncation_mode: str
) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels (-100: none) of each response with its prompt, cut as the trainers' collators cut them."""
    row = dict(row)
    if is_paired(row):
        ids = pair_ids(row, tokenizer, tokenizer.eos_token)
        pairs = [(ids["prompt_ids"], ids[f"{kind}_ids"]) for kind in ("chosen", "rejected")]
    else:
        pairs = [prompt_and_response_ids(row, row["completion"], tokenizer, tokenizer.eos_token)]
    kept = slice(None)
    if max_length is not None:
        kept = slice(max_length) if truncation_mode == "keep_start" else slice(-max_length, None)
    return [((prompt + response)[kept], ([-100] * len(prompt) + response)[kept]) for prompt, response in pairs]


def _score(
    part: Dataset, model: Any, tokenizer: Any, max_length: int | None, truncation_mode: str, batch_tokens: int,
    shards: "_Shards", shard: int,
) -> np.ndarray:  # fmt: skip
    """Log-probabilities of the responses of some rows, (rows, responses)."""
    with naming_the_row(part, f"dataset, rows from {shards.range_of(shard).start}", _texts(part), tokenizer):
        sequences = [pair for row in part for pair in _sequences(row, tokenizer, max_length, truncation_mode)]
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with lent(model):
        values = np.array(sequence_log_probs(model, sequences, batch_tokens, pad_id)).reshape(len(part), -1)
    if not np.isfinite(values).all():
        row = shards.range_of(shard).start + int((~np.isfinite(values)).any(1).argmax())
        raise ValueError(
            f"The reference gives row {row} a log-probability that is not finite. Use another dtype, or check the model."
        )
    return values


class _Shards:
    """The files of a split, under the names by which `datasets` and the Hub know them."""

    def __init__(self, folder: Path, split: str, rows: int, size: int):
        self.folder, self.split, self.rows, self.size = folder, split, rows, size
        self.number = -(-rows // size)

    def path(self, shard: int) -> Path:
        return self.folder / f"{self.split}-{shard:05d}-of-{self.number:05d}.parquet"

    def range_of(self, shard: int) -> range:
        return range(shard * self.size, min((shard + 1) * self.size, self.rows))

    def rows_of(self, shard: int) -> int:
        return len(self.range_of(shard))

    def check_folder(self, expected: bool) -> None:
        """Raise before the model is loaded if the files of another dataset are there, or none can be written."""
        found = sorted(path.name for path in self.folder.glob(f"{self.split}-*.parquet"))
        if found and not expected:
            raise ValueError(
                f"`{self.folder}` holds data of other origin ({', '.join(found[:3])}; there is no manifest of them). Choose "
                "another `output_dir`."
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as file:
                file.write(b"0" * 4096)
        except OSError as error:
            raise OSError(
                f"`output_dir='{self.folder.parent}'` cannot be written: {error}. Free some space, or choose another folder."
            ) from error

    def is_finished(self, shard: int) -> bool:
        """Whether a file is there and whole."""
        if not self.path(shard).is_file():
            return False
        try:
            if pq.read_table(self.path(shard), page_checksum_verification=True).num_rows == self.rows_of(shard):
                return True
        except (pa.ArrowException, OSError):
            pass
        warnings.warn(f"The file '{self.path(shard)}' is damaged: it is made anew.")
        return False

    def write(self, shard: int, rows: Dataset) -> None:
        buffer = io.BytesIO()
        rows.to_parquet(buffer, write_page_checksum=True)
        write_file(self.path(shard), buffer.getvalue())


# ---------------------------------------------------------------- the command line

_HELP = {
    "batch_tokens": "most tokens of a batch; bounds the memory",
    "shard_size": "rows of a file, the unit of progress",
}


def make_parser(prog: str = "trl-ift references") -> argparse.ArgumentParser:
    """Return the parser of the command. Defaults are those of `store_references`, and of TRL."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Compute the reference log-probabilities of a dataset once, for any number of trainings that then need no "
        "reference model. An interrupted run goes on where it was when the same command is given again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add, signature = parser.add_argument, inspect.signature(store_references).parameters
    add("--config", metavar="FILE", help="YAML file of options; those on the command line win")
    add_model_options(parser)
    add_dataset_options(parser, streaming=False)
    add("--output_dir", required=True, help="folder of the dataset that is written; the split keeps its name")
    add(
        "--max_length",
        type=lambda text: None if text.lower() == "none" else int(text),
        default=signature["max_length"].default,
        help="most tokens of a prompt with its response, or `none`; the trainings must have the same",
    )
    add(
        "--truncation_mode",
        choices=("keep_start", "keep_end"),
        default=signature["truncation_mode"].default,
        help="what is kept; the trainings must have the same",
    )
    for name, text in _HELP.items():
        add(f"--{name}", type=int, default=signature[name].default, help=text)
    parser.error = partial(usage_error, prog)  # type: ignore[method-assign]
    return parser


def main(argv: list[str]) -> int:
    """Run `trl-ift references` and return its exit code."""
    return run_tool(make_parser(), argv, _run, "trl_ift.data.stored_references")


def _run(args: argparse.Namespace) -> None:
    check_quantization(args)
    names = ("output_dir", "max_length", "truncation_mode", "adapter", *_HELP)
    rows = store_references(
        os.path.expanduser(args.model_name_or_path),
        load_split(args.dataset_name, args.dataset_split, args.dataset_config),
        split=args.dataset_split,
        model_init_kwargs={"dtype": args.dtype, "trust_remote_code": args.trust_remote_code},
        quantization_config=get_quantization_config(ModelConfig(dtype=args.dtype, load_in_4bit=args.load_in_4bit)),
        **{name: getattr(args, name) for name in names},
    )
    if os.environ.get("RANK", "0") != "0":
        return
    for column in [name for name in (*REF_COLUMNS, REF_LOGPS.name) if name in rows.column_names]:
        print(f"{column}: mean {np.mean(rows[column][:]):.2f} nats, of {len(rows)} rows.")
    length = "none" if args.max_length is None else args.max_length
    print(f"Written to {args.output_dir}. Train with `--dataset_name {args.output_dir} --max_length {length}`.")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
