"""Codes of whole datasets, and pairs weighted by their latent distances.

encode_dataset        codes of one answer a row, as a folder of shards that outlive any interruption
load_codes            reads such a folder back
pair_distances        distances of the pairs of a dataset; exactly 0 where both answers are the same text
weigh_pairs           pairs with `latent_distance` and `weight`, as a folder; `trl-ift weigh` on the command line
load_weighted_pairs   reads such a folder back
"""

import argparse
import hashlib
import inspect
import io
import json
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from datasets import Dataset, load_dataset
from tqdm import tqdm
from transformers import AutoTokenizer
from trl import ModelConfig, get_quantization_config

from ..checks import check_choice, check_quantization, check_range
from ..data.inference import own_device
from ..data.scoring import row_hash
from ..data.shards import (
    MANIFEST,
    Manifest,
    check_manifest,
    claim_shards,
    read_manifest,
    remove_scratch_files,
    wait_until,
    write_file,
    write_manifest,
)
from ..hub.card import library_versions
from ..preference.collator import WEIGHT
from ..scripts.data import load_split
from ..scripts.tools import add_dataset_options, run_tool
from ..scripts.train import usage_error
from ..stages import as_json, is_main_process
from .encoders import POOLINGS, Encoder, PolicyHiddenState, Sample, SentenceEncoder, text_of
from .weights import (
    DISTANCE_COLUMN,
    DISTANCES,
    NORMALIZATIONS,
    WeightNormalizer,
    check_clip,
    check_distances,
    latent_distance,
    weight_summary,
)


WEIGHT_COLUMN = WEIGHT.name
PAIRS_FILE = "pairs.parquet"
_CODES_FORMAT, _PAIRS_FORMAT = "codes-1", "weighted-pairs-1"
# Below this share of pairs that the weights are worth, and above this rank correlation with lengths, a warning is given
_SMALL_SHARE, _HIGH_CORRELATION = 0.1, 0.7


# ---------------------------------------------------------------- codes


def encode_dataset(
    encoder: Encoder,
    dataset: Dataset,
    output_dir: str | os.PathLike | None,
    *,
    column: str = "completion",
    shard_size: int = 1000,
) -> np.ndarray:
    """
    Return the code of the answer in each row.

    The folder grows by whole shards. A run that was interrupted, in any way, goes on when it is called again with the same
    arguments, and gives the codes of an uninterrupted one; so does another number of processes (`accelerate launch`,
    `torchrun`), which share the folder and take turns at its shards.

    Args:
        encoder ([`~trl_ift.latent.Encoder`]):
            What gives the codes.
        dataset ([`~datasets.Dataset`]):
            Rows with a `prompt` and an answer, both strings or both messages.
        output_dir (`str`, *optional*):
            Folder of the shards `codes-00000.parquet`, ... and of `manifest.json`. With `None` nothing is kept, and every
            process encodes all rows.
        column (`str`, *optional*, defaults to `"completion"`):
            Column of the answers.
        shard_size (`int`, *optional*, defaults to `1000`):
            Rows of a shard: what an interruption can cost, and what one process takes at a time.

    Returns:
        `np.ndarray`: Codes in the order of the rows, float32, (rows, `encoder.latent_dim`).

    Raises:
        ValueError, TypeError, OSError: A row has no answer or one of another kind, a code is not finite, `output_dir` holds
            codes of another encoder or dataset, or cannot be written.
    """
    check_range("shard_size", shard_size, 1, integer=True)
    _check_columns(dataset, ("prompt", column))
    dataset = dataset.with_format(None).select_columns(["prompt", column])
    settings = _described(encoder) | {
        "latent_dim": encoder.latent_dim,
        "rows": len(dataset),
        "dataset": _digest(dataset, (column,)),
        "column": column,
        "shard_size": shard_size,
    }
    state = _processes()
    process, processes = (state.process_index, state.num_processes) if output_dir is not None else (0, 1)
    folder = None if output_dir is None else Path(output_dir).expanduser()
    if folder is not None:
        check_manifest(folder, _CODES_FORMAT, settings, "codes")
        _make(folder)
        manifest = {"format": _CODES_FORMAT, "settings": settings, "versions": library_versions()}
        claim_shards(folder, manifest, "codes")
        check_manifest(folder, _CODES_FORMAT, settings, "codes")  # of another job that has started at the same time
    starts = range(0, len(dataset), shard_size)
    own = [(shard, range(start, min(start + shard_size, len(dataset)))) for shard, start in enumerate(starts)]
    own = own[process::processes]
    options = {} if state.is_main_process else {"disable": True}  # else TQDM_DISABLE decides
    found = []
    try:
        with tqdm(total=sum(len(rows) for _, rows in own), unit="row", desc=f"Codes of {column}", **options) as bar:
            for shard, rows in own:
                if folder is None:
                    found.append(_encode(encoder, dataset, rows, column))
                elif not shard_path(folder, shard).is_file():
                    _write_shard(shard_path(folder, shard), _encode(encoder, dataset, rows, column), rows)
                bar.update(len(rows))
    except KeyboardInterrupt:
        if state.is_main_process and folder is not None:
            print(
                f"\nInterrupted. The shards that are finished are kept in {folder}; to go on, run the same again.",
                file=sys.stderr,
            )
        raise
    if folder is None:
        return np.concatenate(found)
    wait_until(lambda: all(shard_path(folder, shard).is_file() for shard in range(len(starts))))
    if state.is_main_process:
        remove_scratch_files(folder)
    return load_codes(folder)


def load_codes(folder: str | os.PathLike) -> np.ndarray:
    """Load the codes that `encode_dataset` has written, float32, (rows, latent_dim).

    Raises:
        ValueError: The folder holds none, or some are missing or damaged.
    """
    folder = Path(folder).expanduser()
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else Manifest()
    if manifest.get("format") != _CODES_FORMAT:
        raise ValueError(f"`{folder}` holds no codes. Give the folder that was `output_dir` of `encode_dataset`.")
    settings = manifest.part("settings")
    shard_size = settings.number("shard_size", 1)
    codes = np.empty((settings.number("rows"), settings.number("latent_dim", 1)), dtype=np.float32)
    for shard, start in enumerate(range(0, len(codes), shard_size)):
        path, rows = shard_path(folder, shard), codes[start : start + shard_size]
        if not path.is_file():
            raise ValueError(
                f"The codes in `{folder}` are incomplete: `{path.name}` is missing. Run the encoding again with the same "
                "arguments to finish them."
            )
        try:
            table = pq.read_table(path, page_checksum_verification=True)
            if table["index"].to_pylist() != list(range(start, start + len(rows))):
                raise ValueError("other rows")
            rows[:] = table["code"].combine_chunks().flatten().to_numpy().reshape(rows.shape)
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise ValueError(
                f"The shard `{path}` is damaged ({error}). Delete it, and run the encoding again: only this one is made anew."
            ) from None
    return codes


def shard_path(folder: Path, shard: int) -> Path:
    """Path of a shard of codes. The file is there iff the shard is finished."""
    return folder / f"codes-{shard:05d}.parquet"


def _encode(encoder: Encoder, dataset: Dataset, rows: range, column: str) -> np.ndarray:
    samples = [Sample(row["prompt"], row[column]) for row in dataset.select(rows)]
    try:
        codes = encoder.encode(samples).numpy()
    except ValueError as error:
        raise ValueError(f"`dataset`, column '{column}', rows from {rows.start}: {error}") from error
    if codes.shape != (len(rows), encoder.latent_dim):
        raise ValueError(
            f"The encoder gave codes of shape {codes.shape}, expected ({len(rows)}, {encoder.latent_dim}): one for each "
            "sample, of its `latent_dim`."
        )
    if bad := np.flatnonzero(~np.isfinite(codes).all(1)).tolist():
        raise ValueError(
            f"`dataset`, row {rows.start + bad[0]}: the code of '{column}' is not finite. Check the encoder; float16 may be "
            "too narrow for it."
        )
    return codes


def _write_shard(path: Path, codes: np.ndarray, rows: range) -> None:
    values = pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1), pa.float32()), codes.shape[1])
    buffer = io.BytesIO()
    table = pa.table({"index": pa.array(rows, pa.int64()), "code": values})
    pq.write_table(table, buffer, write_page_checksum=True)
    write_file(path, buffer.getvalue())


# ---------------------------------------------------------------- weights


def pair_distances(
    dataset: Dataset, chosen_codes: np.ndarray, rejected_codes: np.ndarray, distance: str = "l2"
) -> np.ndarray:
    """Latent distances of the pairs of a dataset, float64, (rows,); exactly 0 where both answers are the same text.

    Codes of equal texts that were encoded in different batches may differ by rounding.

    Args:
        dataset: Pairs with `chosen` and `rejected`.
        chosen_codes: Codes of the chosen answers, (rows, D).
        rejected_codes: Codes of the rejected ones, (rows, D).
        distance: See [`~trl_ift.latent.weights.latent_distance`].

    Raises:
        ValueError: The shapes do not match, a code is not finite, or an option is unknown.
    """
    distances = latent_distance(chosen_codes, rejected_codes, distance)
    if len(distances) != len(dataset):
        raise ValueError(
            f"There are codes of {len(distances)} pairs, and {len(dataset)} pairs. Pass those of one dataset."
        )
    distances[[chosen == rejected for chosen, rejected in _answers(dataset)]] = 0.0
    return distances


def weigh_pairs(
    dataset: Dataset,
    encoder: Encoder | Callable[[], Encoder] | None = None,
    output_dir: str | os.PathLike | None = None,
    *,
    distance: str = "l2",
    weight_normalization: str = "mean",
    weight_clip: Sequence[float] | None = None,
    shard_size: int = 1000,
    overwrite: bool = False,
) -> Dataset:
    """
    Add the columns `latent_distance` and `weight` to pairs.

    The weights are normalised over all rows: pass all pairs that are trained together. A column `weight` that is there beside
    `latent_distance` is replaced. A warning is given if the weights are worth few pairs, or mostly follow lengths.

    Args:
        dataset ([`~datasets.Dataset`]):
            Pairs: `prompt`, `chosen` and `rejected`, strings or messages. Other columns are kept.
        encoder ([`~trl_ift.latent.Encoder`], *optional*):
            What gives the codes whose distance is taken; or a function that returns it, called when all else is checked.
            Without it the column `latent_distance` must be there, and only the weights are new.
        output_dir (`str`, *optional*):
            Folder of the result, `pairs.parquet` and `manifest.json`, and of the codes in `codes/chosen` and `codes/rejected`.
            A finished one is loaded, an interrupted one goes on. Without it nothing is kept.
        distance (`str`, *optional*, defaults to `"l2"`):
            `"l2"`, its square `"sq_l2"`, or `"cosine"`.
        weight_normalization (`str`, *optional*, defaults to `"mean"`):
            `"mean"`, `"max"`, `"minmax"`, `"sigmoid"` or `"none"`; see [`~trl_ift.latent.weights.WeightNormalizer`].
        weight_clip (`tuple[float, float]`, *optional*):
            Smallest and largest weight.
        shard_size (`int`, *optional*, defaults to `1000`):
            Rows of a shard of codes; see [`encode_dataset`].
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether a result of other settings in `output_dir` may be replaced. Codes are used again.

    Returns:
        [`~datasets.Dataset`]: The rows in their order, with `latent_distance` and `weight`.

    Raises:
        ValueError, TypeError, OSError: Something in the input is wrong, or `output_dir` holds other data.
    """
    dataset = _check_pairs(dataset, encoder is not None)
    if not (encoder is None or isinstance(encoder, Encoder) or callable(encoder)):
        raise TypeError(
            f"`encoder` is a {type(encoder).__name__}; expected a `LatentGuide`, a `SentenceEncoder`, a `PolicyHiddenState` or "
            "another `Encoder`. Load it first."
        )
    check_choice("distance", distance, DISTANCES)
    check_choice("weight_normalization", weight_normalization, NORMALIZATIONS)
    check_clip(weight_clip)
    check_range("shard_size", shard_size, 1, integer=True)
    for name, value in (("distance", distance), ("shard_size", shard_size)):
        if encoder is None and value != inspect.signature(weigh_pairs).parameters[name].default:
            raise ValueError(
                f"`{name}={value!r}` has no effect without an encoder: the distances are those of the column "
                f"'{DISTANCE_COLUMN}'. Drop it, or give an encoder."
            )
    if overwrite and output_dir is None:
        raise ValueError("`overwrite=True` has no effect without `output_dir`. Drop it, or name the folder.")
    clip = None if weight_clip is None else (float(weight_clip[0]), float(weight_clip[1]))
    settings = {
        "distance": None if encoder is None else distance,
        "weight_normalization": weight_normalization,
        "weight_clip": None if clip is None else list(clip),
        "rows": len(dataset),
        "dataset": _digest(dataset, ("chosen", "rejected")),
    }
    folder = None if output_dir is None else Path(output_dir).expanduser()
    _check_result(folder, settings, overwrite)
    if encoder is not None and not isinstance(encoder, Encoder):
        encoder = encoder()
    settings |= {"encoder.kind": None} if encoder is None else _described(encoder)
    _check_result(folder, settings, overwrite)
    state = _processes()
    if folder is None or not _is_finished(folder, settings):
        if encoder is None:
            distances = check_distances(dataset[DISTANCE_COLUMN][:])
        else:
            distances = _encoded_distances(dataset, encoder, folder, distance, shard_size)
        result, summary = add_weights(dataset, distances, weight_normalization, clip)
        if folder is not None and state.is_main_process:
            _write_result(folder, result, settings, summary)
    if folder is not None:
        # By the file, not by a collective: those have timeouts, which a slower process may exceed
        wait_until(lambda: _is_finished(folder, settings))
        result, summary = load_weighted_pairs(folder), read_manifest(folder)["weight_summary"]
    if state.is_main_process:
        warn_of_weights(summary, len(result))
    return result


def _encoded_distances(
    dataset: Dataset, encoder: Encoder, folder: Path | None, distance: str, shard_size: int
) -> np.ndarray:
    codes = {}
    for column in ("chosen", "rejected"):
        output_dir = None if folder is None else folder / "codes" / column
        codes[column] = encode_dataset(encoder, dataset, output_dir, column=column, shard_size=shard_size)
    return pair_distances(dataset, codes["chosen"], codes["rejected"], distance)


def add_weights(
    dataset: Dataset, distances: np.ndarray, weight_normalization: str, clip: tuple[float, float] | None
) -> tuple[Dataset, dict[str, Any]]:
    """Pairs with distances and weights, and a summary of the latter as JSON values."""
    weights = WeightNormalizer.fit(distances, weight_normalization, clip)(distances)
    lengths = np.array([abs(len(chosen) - len(rejected)) for chosen, rejected in _answers(dataset)])
    summary = {name: None if np.isnan(v) else v for name, v in weight_summary(weights, lengths).items()}
    if DISTANCE_COLUMN in dataset.column_names:
        dataset = dataset.remove_columns(DISTANCE_COLUMN)
    return dataset.add_column(DISTANCE_COLUMN, distances).add_column(WEIGHT_COLUMN, weights), summary


def load_weighted_pairs(folder: str | os.PathLike) -> Dataset:
    """Load the pairs that `weigh_pairs` has written.

    Raises:
        ValueError: The folder holds none, or the run that wrote them was interrupted.
    """
    folder = Path(folder).expanduser()
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else Manifest()
    if manifest.get("format") != _PAIRS_FORMAT or not manifest.get("complete"):
        raise ValueError(
            f"`{folder}` holds no weighted pairs, or they are incomplete. Give the folder that was `output_dir` of "
            "`weigh_pairs`, or run that again with the same arguments."
        )
    return load_dataset("parquet", data_files=str(folder / PAIRS_FILE), split="train")


def _write_result(folder: Path, result: Dataset, settings: dict[str, Any], summary: dict[str, Any]) -> None:
    """Write pairs and manifest. In between, a manifest says that the pairs may be of either settings."""
    _make(folder)
    manifest = {"format": _PAIRS_FORMAT, "complete": False, "settings": settings, "versions": library_versions()}
    write_manifest(folder, manifest)
    buffer = io.BytesIO()
    pq.write_table(result.data.table, buffer)  # `add_column` has left no indices
    write_file(folder / PAIRS_FILE, buffer.getvalue())
    remove_scratch_files(folder)
    write_manifest(folder, manifest | {"complete": True, "rows": len(result), "weight_summary": summary})


def _is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether a folder holds the result of these settings."""
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else Manifest()
    return bool(manifest.get("complete")) and manifest["settings"] == settings


def _check_result(folder: Path | None, settings: dict[str, Any], overwrite: bool) -> None:
    """Raise if a folder holds something else than an interrupted result, or one of other settings that is to be kept."""
    if folder is None:
        return
    if folder.is_file():
        raise ValueError(f"`output_dir='{folder}'` is a file. Name a folder.")
    check_manifest(folder, _PAIRS_FORMAT, {}, "weighted pairs")
    if overwrite or not (folder / MANIFEST).is_file() or not read_manifest(folder)["complete"]:
        return
    try:
        check_manifest(folder, _PAIRS_FORMAT, settings, "weighted pairs")
    except ValueError as error:
        raise ValueError(
            f"{error} To weigh anew, with codes that are there already: `overwrite=True` (`--overwrite`)."
        ) from None


def describe_weights(summary: Mapping[str, Any], pairs: int) -> str:
    """How the weights of pairs are spread, in a sentence or two."""
    correlation = summary["length_correlation"]
    return (
        f"{pairs} pairs. Weights: mean {summary['mean']:.4g}, standard deviation {summary['std']:.4g}, from "
        f"{summary['min']:.4g} to {summary['max']:.4g}, median {summary['median']:.4g}; {summary['zeros']:.1%} are 0.\n"
        f"Effective sample size {summary['effective_sample_size']:.1f} ({summary['effective_share']:.1%} of the pairs); rank "
        f"correlation with the difference in length {'unknown' if correlation is None else f'{correlation:.2f}'}."
    )


def warn_of_weights(summary: Mapping[str, Any], pairs: int) -> None:
    """Warn of weights that are hardly any good."""
    if summary["max"] == 0:
        warnings.warn(
            f"The weights of all {pairs} pairs are 0: their distances are all the same. Nothing would be learnt from them."
        )
    elif summary["effective_share"] < _SMALL_SHARE:
        warnings.warn(
            f"The weights are worth {summary['effective_sample_size']:.1f} equally weighted pairs of {pairs}: a few outweigh "
            "the others. Bound the weights (`weight_clip`, e.g. 0.1 and 5), and drop generated answers that were cut, which "
            "are often far from the real ones."
        )
    correlation = summary["length_correlation"]
    if correlation is not None and abs(correlation) > _HIGH_CORRELATION:
        warnings.warn(
            f"The rank correlation of the weights with the difference in length is {correlation:.2f}: they say little else. "
            "Drop generated answers that were cut, or try another encoder or distance."
        )


# ---------------------------------------------------------------- datasets and folders


def _processes() -> PartialState:
    return PartialState(cpu=not torch.accelerator.is_available())  # without `cpu`, processes on a CPU are not a group


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"`output_dir='{folder}'` cannot be made: {error}. Choose another folder.") from error


def _described(encoder: Encoder) -> dict[str, Any]:
    return as_json({f"encoder.{name}": value for name, value in encoder.describe().items()})


def _check_columns(dataset: Any, columns: Sequence[str]) -> None:
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"`dataset` is a {type(dataset).__name__}; expected a `Dataset`. Of a dictionary of splits pass one; a stream can "
            "be stored with `Dataset.from_generator`."
        )
    if missing := [name for name in columns if name not in dataset.column_names]:
        raise ValueError(
            f"`dataset` lacks the column {' and '.join(map(repr, missing))}; its columns are {sorted(dataset.column_names)}. "
            "Rename yours. (An implicit prompt is made a column by `trl.extract_prompt`.)"
        )
    if not len(dataset):
        raise ValueError("`dataset` is empty: it has no rows. Check the split, and any filter applied before.")


def _check_pairs(dataset: Any, encoded: bool) -> Dataset:
    """Check the columns of pairs, and leave out those that are made anew."""
    _check_columns(dataset, ("prompt", "chosen", "rejected"))
    columns = dataset.column_names
    if DISTANCE_COLUMN not in columns and not encoded:
        raise ValueError(
            f"`dataset` has no column '{DISTANCE_COLUMN}'; its columns are {sorted(columns)}. Give an encoder, with which the "
            "distances are made (`--guide`, `--sentence_encoder` or `--policy_hidden_state`)."
        )
    if WEIGHT_COLUMN in columns and DISTANCE_COLUMN not in columns:
        raise ValueError(
            f"`dataset` has a column '{WEIGHT_COLUMN}' and no '{DISTANCE_COLUMN}': its weights are of another origin, and "
            "would be lost. Rename or remove it."
        )
    made = [WEIGHT_COLUMN, *([DISTANCE_COLUMN] if encoded else [])]
    return dataset.with_format(None).remove_columns([name for name in made if name in columns])


def _digest(dataset: Dataset, answers: Sequence[str]) -> str:
    """Check prompts and answers of all rows, and return 16 hex digits of all columns."""
    texts = ("prompt", *answers)
    others = [name for name in dataset.column_names if name not in texts]
    digest = hashlib.sha256(json.dumps(others).encode())
    for index, row in enumerate(dataset):
        for name in answers:
            _check_answer(row["prompt"], row[name], index, name)
        digest.update(row_hash({name: row[name] for name in texts}).encode())
        digest.update(json.dumps([row[name] for name in others], default=str).encode())
    return digest.hexdigest()[:16]


def _check_answer(prompt: Any, answer: Any, index: int, name: str) -> None:
    both_text = isinstance(prompt, str) and isinstance(answer, str)
    if not both_text and not (_is_messages(prompt) and _is_messages(answer)):
        raise TypeError(
            f"`dataset`, row {index}: 'prompt' and '{name}' must both be strings, or both be lists of {{'role', 'content'}} "
            f"messages; they are {prompt!r:.60} and {answer!r:.60}. Mend or drop the row."
        )
    if not text_of(answer).strip():
        raise ValueError(f"`dataset`, row {index}: '{name}' is empty. Drop pairs with an empty answer.")


def _is_messages(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(message, Mapping) and "role" in message for message in value)


def _answers(dataset: Dataset) -> list[tuple[str, str]]:
    """Texts of both answers of each row."""
    rows = dataset.with_format(None).select_columns(["chosen", "rejected"])
    return [(text_of(row["chosen"]), text_of(row["rejected"])) for row in rows]


# ---------------------------------------------------------------- the command line

# The options that name an encoder, and, of those that not all encoders have, which have them
_ENCODERS = ("guide", "sentence_encoder", "policy_hidden_state")
_READ_BY = {
    "adapter": ("policy_hidden_state",),
    "load_in_4bit": ("policy_hidden_state",),
    "pooling": ("sentence_encoder",),
    "with_prompt": ("sentence_encoder",),
    "max_length": ("sentence_encoder", "policy_hidden_state"),
    "trust_remote_code": ("sentence_encoder", "policy_hidden_state"),
    "dtype": _ENCODERS,
    "batch_tokens": _ENCODERS,
}


def make_parser(prog: str = "trl-ift weigh") -> argparse.ArgumentParser:
    """Return the parser of the command. Defaults are those of `weigh_pairs` and of the encoders."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Weight pairs by the distance of their answers in a latent space, for LD-Align and for every method that "
        "reads the column `weight`. Confirmed by the paper: that such a distance weighs a pair; encoder, distance, "
        "normalisation and defaults are our choices. An interrupted run goes on where it was when the same command is given "
        "again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add, signature = parser.add_argument, inspect.signature(weigh_pairs).parameters
    add("--config", metavar="FILE", help="YAML file of options; those on the command line win")
    add_dataset_options(parser, streaming=False)
    add("--completions", help="folder of `trl-ift generate`, if the dataset is an SFT dataset and no pairs")
    add(
        "--tokenizer",
        help="Hub id or folder of the tokenizer of the pairs to build; by default, of what generated them",
    )
    add("--drop_truncated", action="store_true", help="build no pairs of generated answers that were cut")
    add("--output_dir", required=True, help="folder of the codes and of the weighted pairs")
    add("--guide", help="folder or Hub id of a guiding model, as `trl-ift guide` writes it")
    add("--sentence_encoder", help="Hub id or folder of a sentence encoder, in its place")
    add("--policy_hidden_state", help="Hub id or folder of a causal model whose hidden states are used, in its place")
    add("--adapter", help="Hub id or folder of a PEFT adapter for the causal model")
    add("--load_in_4bit", action="store_true", help="quantize the causal model to 4 bits")
    add("--pooling", choices=POOLINGS, help="how a sentence encoder's states become one")
    add("--with_prompt", action="store_true", help="let a sentence encoder read the prompt too")
    add("--max_length", type=int, help="most tokens that an encoder other than a guide reads")
    add("--dtype", choices=("auto", "bfloat16", "float16", "float32"), help="dtype of the encoder")
    add("--batch_tokens", type=int, help="most tokens of a batch; bounds the memory")
    add("--trust_remote_code", action="store_true", help="run code that comes with the encoder")
    add(
        "--distance",
        choices=DISTANCES,
        default=signature["distance"].default,
        help="distance of two codes (our choice)",
    )
    add(
        "--weight_normalization",
        choices=NORMALIZATIONS,
        default=signature["weight_normalization"].default,
        help="how distances become weights (our choice)",
    )
    add("--weight_clip", nargs="+", metavar=("MIN", "MAX"), help="smallest and largest weight")
    add(
        "--shard_size", type=int, default=signature["shard_size"].default, help="rows of a shard, the unit of progress"
    )
    add("--num_processes", type=int, default=1, help="processes of this machine, each with an encoder of its own")
    add("--overwrite", action="store_true", help="replace a result of other settings; codes are used again")
    parser.error = partial(usage_error, prog)  # type: ignore[method-assign]
    return parser


def main(argv: list[str]) -> int:
    """Run `trl-ift weigh` and return its exit code."""
    return run_tool(make_parser(), argv, _weigh, "trl_ift.latent.weigh")


def _weigh(args: argparse.Namespace) -> None:
    kind = _encoder_kind(args)
    weight_clip = _parse_clip(args.weight_clip)
    check_quantization(args)
    pairs = weigh_pairs(
        _load_pairs(args),
        None if kind is None else partial(_load_encoder, kind, args),
        args.output_dir,
        distance=args.distance,
        weight_normalization=args.weight_normalization,
        weight_clip=weight_clip,
        shard_size=args.shard_size,
        overwrite=args.overwrite,
    )
    if is_main_process():
        _print_summary(args.output_dir, pairs)


def _encoder_kind(args: argparse.Namespace) -> str | None:
    """The option that names the encoder, after a check that no option is given which it does not have."""
    given = [name for name in _ENCODERS if getattr(args, name) is not None]
    if len(given) > 1:
        raise ValueError(f"`--{given[0]}` and `--{given[1]}` exclude each other: distances come from one encoder.")
    kind = given[0] if given else None
    for name, readers in _READ_BY.items():
        if _is_given(args, name) and kind not in readers:
            with_ = "without an encoder" if kind is None else f"with `--{kind}`"
            raise ValueError(
                f"`--{name}` has no effect {with_}: it is an option of {', '.join(f'`--{r}`' for r in readers)}."
            )
    for name in ("tokenizer", "drop_truncated"):
        if _is_given(args, name) and args.completions is None:
            raise ValueError(
                f"`--{name}` has no effect without `--completions`: the dataset holds the pairs. Drop it."
            )
    return kind


def _is_given(args: argparse.Namespace, name: str) -> bool:
    value = getattr(args, name)
    return value is not None and value is not False


def _parse_clip(values: list[str] | None) -> tuple[float, float] | None:
    """Two numbers, from the command line or, as one text, from a YAML list."""
    if values is None:
        return None
    numbers = " ".join(values).strip("[]").replace(",", " ").split()
    try:
        smallest, largest = map(float, numbers)
    except ValueError:
        raise ValueError(
            f"`--weight_clip {' '.join(values)}`: expected two numbers, as in `--weight_clip 0.1 5`."
        ) from None
    return smallest, largest


def _load_pairs(args: argparse.Namespace) -> Dataset:
    dataset = load_split(args.dataset_name, args.dataset_split, args.dataset_config)
    if args.completions is None:
        return dataset
    from ..data.generation import load_completions
    from ..data.pairs import build_pairs

    load_completions(args.completions)  # refuses a folder without, or with some of them
    return build_pairs(
        dataset, args.completions, processing_class=_tokenizer_of(args), drop_truncated=args.drop_truncated
    )


def _tokenizer_of(args: argparse.Namespace) -> str:
    """Where to load the tokenizer of the pairs that are built."""
    return args.tokenizer or read_manifest(args.completions)["model"]


def _load_encoder(kind: str, args: argparse.Namespace) -> Encoder:
    encoder = _make_encoder(kind, args)
    if args.completions is not None:
        encoder.check_tokenizer(AutoTokenizer.from_pretrained(_tokenizer_of(args)))
    return encoder


def _make_encoder(kind: str, args: argparse.Namespace) -> Encoder:
    name = os.path.expanduser(getattr(args, kind))
    names = ("adapter", "pooling", "with_prompt", "max_length", "batch_tokens")
    options = {option: getattr(args, option) for option in names if _is_given(args, option)}
    init_kwargs: dict[str, Any] = {} if args.dtype is None else {"dtype": args.dtype}
    if kind == "guide":
        from .guide import LatentGuide

        device = own_device(int(os.environ.get("WORLD_SIZE", 1)))
        return LatentGuide.from_pretrained(name, device=device, **init_kwargs, **options)
    if args.trust_remote_code:
        init_kwargs["trust_remote_code"] = True
    if args.load_in_4bit:
        config = ModelConfig(dtype=args.dtype or "float32", load_in_4bit=True)
        init_kwargs["quantization_config"] = get_quantization_config(config)
    encoder_class = SentenceEncoder if kind == "sentence_encoder" else PolicyHiddenState
    return encoder_class(name, model_init_kwargs=init_kwargs, **options)


def _print_summary(folder: str, pairs: Dataset) -> None:
    """Print how the weights are spread, and the nearest and farthest pair."""
    print(describe_weights(read_manifest(Path(folder).expanduser())["weight_summary"], len(pairs)))
    distances = np.array(pairs[DISTANCE_COLUMN][:])
    different = np.where(distances > 0, distances, np.inf)
    for what, row in (("Nearest", int(different.argmin())), ("Farthest", int(distances.argmax()))):
        pair = pairs[row]
        print(f"{what} pair (row {row}, distance {pair[DISTANCE_COLUMN]:.4g}, weight {pair[WEIGHT_COLUMN]:.4g}):")
        for name in ("prompt", "chosen", "rejected"):
            print(f"  {name:<8}  {textwrap.shorten(text_of(pair[name]), 100, placeholder=' ...')}")
    print(f"Written to {folder}. Train on them with `--dataset_name {Path(folder) / PAIRS_FILE}`.")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
