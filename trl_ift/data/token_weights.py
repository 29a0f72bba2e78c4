"""Weights of the tokens of preference pairs, estimated from a positive and a negative model; what TIS-DPO trains with.

estimate_token_weights   the pairs with a weight for each token; `trl-ift token-weights` on the command line
token_weights            the weights of one response, from the log-ratios of its tokens
"""

import argparse
import hashlib
import io
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from jinja2 import TemplateError
from peft import PeftModel
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl import ModelConfig, extract_prompt, get_quantization_config

from ..checks import check_choice, check_preference_dataset, check_range
from ..hub.card import library_versions
from ..preference.tis_dpo import CHOSEN_WEIGHTS, REJECTED_WEIGHTS
from ..preference.trainer import pair_ids
from ..scripts.data import load_split
from ..scripts.tools import add_dataset_options, run_tool
from ..scripts.train import usage_error
from .caching import versioned
from .fingerprint import base_model, model_fingerprint
from .inference import (
    check_model,
    check_runnable,
    lent,
    load_model,
    load_tokenizer,
    own_device,
    token_log_probs,
    tokenizer_digest,
)
from .rows import check_implicit_prompts
from .shards import check_manifest, claim_shards, remove_scratch_files, wait_until, write_file


Model: TypeAlias = str | PreTrainedModel | PeftModel

KINDS = ("chosen", "rejected")
COLUMNS = (CHOSEN_WEIGHTS.name, REJECTED_WEIGHTS.name)
PAIRS_FILE = "pairs.parquet"
# Transform -> the options that it reads
TRANSFORMS: dict[str, tuple[str, ...]] = {
    "exp": ("weight_k", "weight_mu", "weight_low", "weight_high"),
    "rank_based": ("scale_min", "scale_max"),
    "threshold_and_scale": ("clip_min", "clip_max", "scale_min", "scale_max"),
    "threshold": ("clip_min", "clip_max"),
    "binary": ("top_percent",),
    "origin": (),
    "random": ("scale_min", "scale_max", "seed"),
}
DEFAULTS = {
    "weight_k": 1.0,
    "weight_mu": 1.0,
    "weight_low": -0.5,
    "weight_high": 1.5,
    "scale_min": 0.7,
    "scale_max": 1.3,
    "clip_min": -1.5,
    "clip_max": 1.5,
    "top_percent": 100.0,
    "seed": 0,
}
# Our choice, for general preferences; the paper's are about safety
CONTRASTIVE_PROMPTS = (
    "You are a careful assistant. Your answers are correct, helpful and harmless.",
    "You are a careless assistant. Your answers are wrong, unhelpful and harmful.",
)
_FORMAT = "token-logps-1"
_SCHEMA = pa.schema([(kind, pa.list_(pa.float32())) for kind in KINDS])


def token_weights(
    differences: np.ndarray, rejected: bool = False, weight_transform: str = "exp", **options: float
) -> np.ndarray:
    """
    Weights of the tokens of one response, (T,), from d_t = log pi+ - log pi- of its tokens, (T,), in nats.

    With the score s_t = d_t on a chosen and -d_t on a rejected response:

        "exp"                  k exp( mu clamp(d_t, low, high) ), with -mu on a rejected response (the paper's)
        "rank_based"           `scale_min` to `scale_max`, evenly, in the order of s_t; equal ones in the order of the text; 1
                               for a single token (the released code's example)
        "threshold_and_scale"  s_t clamped to [`clip_min`, `clip_max`], and that mapped to [`scale_min`, `scale_max`]
        "threshold"            s_t clamped (our reading of the name; may be negative)
        "binary"               1 for the `top_percent` % of the tokens with the largest s_t, rounded up, 0 for the others
        "origin"               s_t itself (may be negative)
        "random"               uniform in [`scale_min`, `scale_max`], for comparisons (our reading of the name)

    Args:
        differences: Log-ratios of the tokens.
        rejected: Whether the response is the rejected one.
        weight_transform: One of the above.
        **options: Those of the transform; `DEFAULTS` holds their defaults. `seed` may be a list of integers.
    """
    o: dict[str, Any] = DEFAULTS | options
    if weight_transform == "exp":
        mu = -o["weight_mu"] if rejected else o["weight_mu"]
        return o["weight_k"] * np.exp(mu * np.clip(differences, o["weight_low"], o["weight_high"]))
    scores, number, span = (
        (-differences if rejected else differences),
        len(differences),
        o["scale_max"] - o["scale_min"],
    )
    if weight_transform == "origin":
        return scores
    if weight_transform == "threshold":
        return np.clip(scores, o["clip_min"], o["clip_max"])
    if weight_transform == "threshold_and_scale":
        share = (np.clip(scores, o["clip_min"], o["clip_max"]) - o["clip_min"]) / (o["clip_max"] - o["clip_min"])
        return o["scale_min"] + span * share
    if weight_transform == "random":
        return np.random.default_rng(o["seed"]).uniform(o["scale_min"], o["scale_max"], number)
    ranks = np.empty(number)
    ranks[np.argsort(scores, kind="stable")] = np.arange(number)
    if weight_transform == "binary":
        return (ranks >= number - math.ceil(number * o["top_percent"] / 100)).astype(float)
    return o["scale_min"] + span * ranks / (number - 1) if number > 1 else np.ones(number)


def estimate_token_weights(
    dataset: Dataset,
    positive: Model,
    negative: Model | None = None,
    output_dir: str | os.PathLike | None = None,
    *,
    positive_prompt: str | None = None,
    negative_prompt: str | None = None,
    positive_adapter: str | None = None,
    negative_adapter: str | None = None,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    weight_transform: str = "exp",
    eos_weight: float | None = 1.0,
    normalize_weights: bool = False,
    max_length: int | None = None,
    batch_tokens: int = 8192,
    shard_size: int = 1000,
    model_init_kwargs: dict[str, Any] | None = None,
    quantization_config: Any = None,
    **options: float,
) -> Dataset:
    """
    Add a weight for each token of both responses, from the log-probabilities of a positive and of a negative model.

    The two models are, best first as the paper reports it: trained by DPO on the pairs, and on the pairs with chosen and
    rejected swapped; trained by SFT on the chosen, and on the rejected responses; or one model under two prompts. They are
    loaded one after the other.

    With an `output_dir` the log-probabilities are kept there, in whole shards: a run that was interrupted, in any way, goes on
    when it is called again with the same arguments, and other weights of the same log-probabilities cost next to nothing.
    Processes of `accelerate launch` or `torchrun` share the folder and take turns at the shards.

    Args:
        dataset ([`~datasets.Dataset`]):
            Pairs: `prompt` (optional if both responses repeat it), `chosen`, `rejected`, as strings, messages or, for two
            models, token ids (`prompt_ids`, `chosen_ids`, `rejected_ids`).
        positive (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model that likes what is good: Hub id, folder or instance.
        negative (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            The one that likes what is bad. Without it, `positive` is both, under the two prompts.
        output_dir (`str`, *optional*):
            Folder of the shards. Without it nothing is kept, and every process scores all rows.
        positive_prompt (`str`, *optional*):
            System message before the prompts, or text before prompts that are texts, that makes the model a positive one.
        negative_prompt (`str`, *optional*):
            The one that makes it a negative one.
        positive_adapter (`str`, *optional*):
            Folder or Hub id of a PEFT adapter, loaded on a positive model that is named.
        negative_adapter (`str`, *optional*):
            The same for the negative one.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the model that will be trained; that of `positive` by default.
        weight_transform (`str`, *optional*, defaults to `"exp"`):
            How log-ratios become weights: `"exp"`, `"rank_based"`, `"threshold_and_scale"`, `"threshold"`, `"binary"`,
            `"origin"` or `"random"`; see [`~trl_ift.data.token_weights.token_weights`].
        eos_weight (`float`, *optional*, defaults to `1.0`):
            Weight of end-of-sequence tokens, which the transform then leaves out; 0 in the released code, so that the end is
            never trained. `None`: estimated like that of any other token.
        normalize_weights (`bool`, *optional*, defaults to `False`):
            Whether the weights of a response are divided by their mean (our extension): their mean scales beta.
        max_length (`int`, *optional*):
            Tokens of prompt and response that are scored, the first ones: the `max_length` of a training that cuts the others
            off. These have the weight 1. All by default, as a training with `truncation_mode="keep_end"` needs it.
        batch_tokens (`int`, *optional*, defaults to `8192`):
            Most tokens of a batch, padding included; bounds the memory.
        shard_size (`int`, *optional*, defaults to `1000`):
            Pairs of a shard: what an interruption can cost, and what one process takes at a time.
        model_init_kwargs (`dict`, *optional*):
            Arguments of `from_pretrained` for models that are named. As in TRL, `dtype` defaults to `"float32"`.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization of models that are named.
        **options (`float`):
            Of the transform: `weight_k`, `weight_mu`, `weight_low`, `weight_high` (1, 1, -0.5, 1.5; unconfirmed); `scale_min`,
            `scale_max` (0.7, 1.3); `clip_min`, `clip_max` (-1.5, 1.5); `top_percent` (100); `seed` (0).

    Returns:
        [`~datasets.Dataset`]: The pairs with `chosen_weights` and `rejected_weights`: a list of floats each, one a token of the
        response as the trainers tokenize it, its end-of-sequence token included.

    Raises:
        ValueError, TypeError, OSError: Something in the input is wrong, `output_dir` holds other log-probabilities, or cannot
            be written.
    """
    options = _check_options(weight_transform, options, eos_weight)
    for name, value in (("batch_tokens", batch_tokens), ("shard_size", shard_size)):
        check_range(name, value, 1, integer=True)
    if max_length is not None:
        check_range("max_length", max_length, 1, integer=True)
    init_kwargs = dict(model_init_kwargs or {})
    if quantization_config is not None:
        init_kwargs["quantization_config"] = quantization_config
    prompts = _check_sources(positive, negative, positive_prompt, negative_prompt, positive_adapter, negative_adapter)
    sources = {"positive": (positive, positive_adapter), "negative": (negative or positive, negative_adapter)}
    if prompts is not None:
        sources["negative"] = sources["positive"]
    any_named = any(isinstance(model, str) for model, _ in sources.values())
    for model, adapter in sources.values():
        check_model(model, processing_class, adapter, init_kwargs if isinstance(model, str) or not any_named else {})
    _check_dataset(dataset, prompts)
    tokenizer = _tokenizer_of(sources, processing_class, init_kwargs)
    fn_kwargs = {"tokenizer": tokenizer, "prompts": prompts, "max_length": max_length}
    _check_first_row(dataset, fn_kwargs)
    plain = dataset.with_format(None)
    options_of_map = {"fn_kwargs": fn_kwargs, "remove_columns": plain.column_names, "desc": "Tokenizing"}
    rows = plain.map(versioned(_tokenize, pair_ids), **options_of_map)
    for model, _ in sources.values():
        _check_context(model, rows, init_kwargs)

    process, processes = 0, 1
    if output_dir is not None:  # set by `accelerate launch` and `torchrun`; no group of processes is needed
        process, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with _folder(output_dir) as folder:
        scorer = _Scorer(folder, rows, shard_size, batch_tokens, pad_id, process, processes)
        loaded: Any = None
        for side, (source, adapter) in sources.items():
            scorer.check(side)
            if loaded is None or prompts is None:
                loaded = None  # frees the other one first
                if torch.accelerator.is_available():
                    torch.accelerator.empty_cache()
                loaded = _load(source, adapter, init_kwargs, processes)
            scorer(side, loaded)
        tables = {side: scorer.read(side) for side in sources}
    finish = {"eos_id": tokenizer.eos_token_id, "eos_weight": eos_weight, "normalize": normalize_weights}
    weights = _weights(rows, tables, weight_transform, options, **finish)
    return concatenate_datasets([dataset, weights], axis=1)


# ---------------------------------------------------------------- checks


def _check_options(transform: str, options: Mapping[str, Any], eos_weight: float | None) -> dict[str, Any]:
    check_choice("weight_transform", transform, tuple(TRANSFORMS))
    for name in options:
        if name not in DEFAULTS:
            raise TypeError(
                f"`estimate_token_weights` has no option `{name}`. Those of the transforms: {', '.join(DEFAULTS)}."
            )
        if name not in TRANSFORMS[transform]:
            raise ValueError(f"`{name}={options[name]}` has no effect with `weight_transform={transform!r}`. Drop it.")
    found = {name: options.get(name, DEFAULTS[name]) for name in TRANSFORMS[transform]}
    for name, value in found.items():
        low, high = {"top_percent": (0.0, 100.0), "weight_k": (0.0, math.inf), "seed": (0.0, math.inf)}.get(
            name, (-math.inf, math.inf)
        )
        check_range(name, value, low, high, low_open=name == "weight_k", integer=name == "seed")
    for low_name, high_name in (("weight_low", "weight_high"), ("scale_min", "scale_max"), ("clip_min", "clip_max")):
        if low_name in found and not found[low_name] < found[high_name]:
            raise ValueError(
                f"`{low_name}={found[low_name]}` must be less than `{high_name}={found[high_name]}`. Swap or change them."
            )
    if eos_weight is not None:
        check_range("eos_weight", eos_weight, 0)
    return found


def _check_sources(
    positive: Model, negative: Model | None, positive_prompt: Any, negative_prompt: Any, *adapters: str | None
) -> tuple[str, str] | None:
    """Raise unless there are two models or two prompts; return the prompts."""
    given = [prompt for prompt in (positive_prompt, negative_prompt) if prompt is not None]
    if negative is None:
        if len(given) < 2:
            raise ValueError(
                "Name a `negative` model beside `positive`, or give `positive_prompt` and `negative_prompt`, which make one "
                "model both."
            )
        if adapters[1] is not None:
            raise ValueError(
                "`negative_adapter` has no effect without a `negative` model. Drop it, or name the model."
            )
        if positive_prompt == negative_prompt:
            raise ValueError("`positive_prompt` and `negative_prompt` are the same: there is no contrast. Change one.")
        return positive_prompt, negative_prompt
    if given:
        raise ValueError(
            "`positive_prompt` and `negative_prompt` are for one model, and two are given. Drop one or the other."
        )
    same = positive is negative or (isinstance(positive, str) and positive == negative)
    if same and adapters[0] == adapters[1]:
        raise ValueError("`positive` and `negative` are the same model: there is no contrast. Name another one.")
    return None


def _check_dataset(dataset: Any, prompts: Any) -> None:
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"`dataset` is a {type(dataset).__name__}; expected a `Dataset`. Of a dictionary of splits pass one; a stream can "
            "be stored with `Dataset.from_generator`."
        )
    check_preference_dataset(dataset, "dataset")
    if not {"prompt", "prompt_ids"} & set(dataset.column_names):
        check_implicit_prompts(dataset, "dataset")
    if present := [column for column in COLUMNS if column in dataset.column_names]:
        raise ValueError(f"`dataset` has the column '{present[0]}' already. Remove it to estimate the weights again.")
    if prompts is not None and not {"chosen", "rejected"} <= set(dataset.column_names):
        raise ValueError(
            "`dataset` holds token ids and no texts, which a prompt cannot be put before. Pass the texts."
        )


def _tokenizer_of(sources: Mapping[str, tuple[Model, Any]], given: Any, init_kwargs: dict[str, Any]) -> Any:
    found = [load_tokenizer(model, given, init_kwargs) for model, _ in sources.values()]
    if tokenizer_digest(found[0]) != tokenizer_digest(found[1]):
        raise ValueError(
            "The tokenizers of the positive and of the negative model differ (vocabulary, end of sequence or chat template): a "
            "weight needs both log-probabilities of one token. If the vocabularies are the same, pass the tokenizer of the "
            "model to be trained as `processing_class`."
        )
    if found[0].eos_token is None:
        raise ValueError(
            "The tokenizer has no end-of-sequence token, which responses end with. Set `tokenizer.eos_token`."
        )
    return found[0]


def _check_first_row(dataset: Dataset, fn_kwargs: dict[str, Any]) -> None:
    try:
        _tokenize(dataset.with_format(None)[0], **fn_kwargs)
    except TemplateError as error:
        raise ValueError(
            f"The chat template cannot write the first row: {error}. (A template without a system role needs two models in the "
            "place of two prompts.)"
        ) from error


def _check_context(model: Model, rows: Dataset, init_kwargs: dict[str, Any]) -> None:
    if isinstance(model, str):
        names = {name: init_kwargs[name] for name in ("revision", "trust_remote_code") if name in init_kwargs}
        config = AutoConfig.from_pretrained(model, **names)
    else:
        config = base_model(model).config
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    lengths = rows.with_format("numpy")["length"][:]
    if context is not None and (lengths > context).any():
        raise ValueError(
            f"{(lengths > context).sum()} of {len(rows)} pairs are longer than the context of the model, {context} tokens (the "
            f"longest: {lengths.max()} tokens, row {lengths.argmax()}). Set `max_length` to that of the training, or drop them."
        )


# ---------------------------------------------------------------- tokens


def _with_text(prompt: Any, text: str) -> Any:
    """A prompt behind a text, or messages behind a system message."""
    if isinstance(prompt, str):
        return f"{text}\n\n{prompt}"
    if prompt[0]["role"] == "system":
        return [{**prompt[0], "content": f"{text}\n\n{prompt[0]['content']}"}, *prompt[1:]]
    return [{"role": "system", "content": text}, *prompt]


def _tokenize(
    row: dict[str, Any], tokenizer: Any, prompts: tuple[str, str] | None, max_length: int | None
) -> dict[str, Any]:
    """Token ids of both responses as the trainers make them, how many are scored, and what stands before them."""
    if "prompt_ids" in row:
        ids = {name: list(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    else:
        row = row if "prompt" in row else row | extract_prompt(row)
        ids = pair_ids(row, tokenizer, tokenizer.eos_token)
    found: dict[str, Any] = {"length": 0}
    for kind in KINDS:
        response = ids[f"{kind}_ids"]
        room = len(response) if max_length is None else max(0, max_length - len(ids["prompt_ids"]))
        found[f"{kind}_ids"], found[f"{kind}_scored"] = response, min(room, len(response))
    for side, text in zip(("positive", "negative"), prompts or (None, None), strict=True):
        other = (
            ids
            if text is None
            else pair_ids(row | {"prompt": _with_text(row["prompt"], text)}, tokenizer, tokenizer.eos_token)
        )
        for kind in KINDS:
            response = ids[f"{kind}_ids"]
            whole = other["prompt_ids"] + other[f"{kind}_ids"]
            before = len(whole) - len(response)
            if before < 0 or whole[before:] != response:
                raise ValueError(
                    f"Behind the {side} prompt the {kind} response has other tokens than behind its own: "
                    f"{tokenizer.decode(whole[-len(response) :])[:80]!r} in the place of {tokenizer.decode(response)[:80]!r}. "
                    "Choose prompts that the chat template writes before the response without changing it."
                )
            found[f"{side}_{kind}"] = whole[:before]
            found["length"] = max(found["length"], before + found[f"{kind}_scored"])
    return found


def _sequences(rows: Dataset, side: str) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids and labels of chosen and rejected of each row."""
    for row in rows:
        for kind in KINDS:
            before, scored = row[f"{side}_{kind}"], row[f"{kind}_ids"][: row[f"{kind}_scored"]]
            yield before + scored, [-100] * len(before) + scored


# ---------------------------------------------------------------- log-probabilities


@contextmanager
def _folder(output_dir: str | os.PathLike | None) -> Iterator[Path]:
    """The folder of the shards: the one that is named, or a temporary one."""
    if output_dir is not None:
        yield Path(output_dir).expanduser()
    else:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)


def _load(source: Model, adapter: str | None, init_kwargs: dict[str, Any], processes: int) -> Any:
    model = load_model(source, adapter, init_kwargs, own_device(processes)) if isinstance(source, str) else source
    check_runnable(model)
    return model


class _Scorer:
    """Log-probabilities of the tokens under a model, in `<folder>/<side>`."""

    def __init__(
        self,
        folder: Path,
        rows: Dataset,
        shard_size: int,
        batch_tokens: int,
        pad_id: int,
        process: int,
        processes: int,
    ):
        self.folder, self.rows, self.batch_tokens, self.pad_id = folder, rows, batch_tokens, pad_id
        self.process, self.processes = process, processes
        starts = range(0, len(rows), shard_size)
        self.shards = [range(start, min(start + shard_size, len(rows))) for start in starts]
        self.settings = {"rows": len(rows), "shard_size": shard_size}

    def check(self, side: str) -> dict[str, Any]:
        """Raise, before the model is loaded, if the folder holds others; return what the values depend on beside the model."""
        digest = hashlib.sha256()
        for ids, labels in _sequences(self.rows, side):
            digest.update(np.array([len(ids), labels.count(-100), *ids], dtype=np.int64).tobytes())
        settings = self.settings | {"tokens": digest.hexdigest()[:16]}
        check_manifest(self.folder / side, _FORMAT, settings, "log-probabilities")
        return settings

    def path(self, side: str, shard: int) -> Path:
        """Path of a shard. The file is there iff the shard is finished."""
        return self.folder / side / f"{shard:05d}.parquet"

    def __call__(self, side: str, model: PreTrainedModel | PeftModel) -> None:
        """Write the shards of this process that are not there yet, and wait for those of the others."""
        vocabulary = model.get_input_embeddings().num_embeddings
        settings = self.check(side)
        settings |= {"policy": model_fingerprint(model), "dtype": str(model.dtype).removeprefix("torch.")}
        check_manifest(self.folder / side, _FORMAT, settings, "log-probabilities")
        manifest = {"format": _FORMAT, "settings": settings, "versions": library_versions()}
        try:
            claim_shards(self.folder / side, manifest, "log-probabilities")
        except OSError as error:
            raise OSError(
                f"`output_dir='{self.folder}'` cannot be written: {error}. Choose another folder."
            ) from error
        check_manifest(self.folder / side, _FORMAT, settings, "log-probabilities")  # of another job that starts now
        own = list(enumerate(self.shards))[self.process :: self.processes]
        hidden = {} if self.process == 0 else {"disable": True}  # else TQDM_DISABLE decides
        try:
            with tqdm(
                total=sum(len(part) for _, part in own), unit="pair", desc=f"Scoring, {side} model", **hidden
            ) as bar:
                for shard, part in own:
                    if not self.path(side, shard).is_file():
                        table = self._score(side, model, self.rows.select(part), vocabulary, part.start)
                        buffer = io.BytesIO()
                        pq.write_table(table, buffer)
                        write_file(self.path(side, shard), buffer.getvalue())
                    bar.update(len(part))
        except KeyboardInterrupt:
            if self.process == 0:
                print(
                    "\nInterrupted. Finished shards are kept in `output_dir`; to go on, run the same again.",
                    file=sys.stderr,
                )
            raise
        wait_until(lambda: all(self.path(side, shard).is_file() for shard in range(len(self.shards))))
        if self.process == 0:
            remove_scratch_files(self.folder / side)

    def _score(self, side: str, model: Any, rows: Dataset, vocabulary: int, start: int) -> pa.Table:
        sequences = list(_sequences(rows, side))
        found: list[Any] = [[] for _ in sequences]
        for index, (ids, _) in enumerate(sequences):
            if max(ids, default=0) >= vocabulary:
                raise ValueError(
                    f"`dataset`, row {start + index // 2} has the token id {max(ids)}, and the {side} model has {vocabulary} "
                    "tokens. The tokenizer (or the one that the dataset was tokenized with) is another model's."
                )
        to_score = [index for index, (_, labels) in enumerate(sequences) if any(label != -100 for label in labels[1:])]
        with lent(model):
            chosen = [sequences[index] for index in to_score]
            for place, values in token_log_probs(model, chosen, self.batch_tokens, self.pad_id):
                labels = chosen[place][1]
                values = torch.cat([torch.zeros(1), values])[: len(labels)]  # nothing predicts the first token
                found[to_score[place]] = values[labels.count(-100) :].numpy()
        for index, values in enumerate(found):
            if not np.isfinite(values).all():
                raise ValueError(
                    f"`dataset`, row {start + index // 2}: the {side} model gives a token of the {KINDS[index % 2]} response a "
                    "log-probability that is not finite. Load it in another dtype (bfloat16 or float32)."
                )
        return pa.table({kind: found[number::2] for number, kind in enumerate(KINDS)}, schema=_SCHEMA)

    def read(self, side: str) -> Dataset:
        """The log-probabilities of all rows; once the folder is complete."""
        tables = [pq.read_table(self.path(side, shard), schema=_SCHEMA) for shard in range(len(self.shards))]
        return Dataset.from_dict({kind: pa.concat_tables(tables)[kind].combine_chunks() for kind in KINDS})


# ---------------------------------------------------------------- weights


def _weights(
    rows: Dataset,
    tables: Mapping[str, Dataset],
    transform: str,
    options: Mapping[str, Any],
    eos_id: int,
    eos_weight: float | None,
    normalize: bool,
) -> Dataset:
    """The two columns of weights."""
    found: dict[str, list[np.ndarray]] = {column: [] for column in COLUMNS}
    parts = [
        part.with_format("numpy")
        for part in (rows.select_columns([f"{kind}_ids" for kind in KINDS]), *tables.values())
    ]
    for index, (row, positive, negative) in enumerate(zip(*parts, strict=True)):
        for number, (kind, column) in enumerate(zip(KINDS, COLUMNS, strict=True)):
            differences = positive[kind].astype(np.float64) - negative[kind].astype(np.float64)
            ids = row[f"{kind}_ids"]
            weights = np.ones(len(ids))
            estimated = np.arange(len(ids)) < len(differences)
            if eos_weight is not None:
                is_end = ids == eos_id
                weights[is_end] = eos_weight
                estimated &= ~is_end
            drawn = {"seed": [options["seed"], index, number]} if "seed" in options else {}
            ratios = differences[estimated[: len(differences)]]
            weights[estimated] = token_weights(ratios, kind == "rejected", transform, **{**options, **drawn})
            if normalize and (mean := weights[: len(differences)].mean() if len(differences) else 0.0) > 0:
                weights[: len(differences)] /= mean
            found[column].append(weights.astype(np.float32))
    features = Features({column: List(Value("float32")) for column in COLUMNS})
    return Dataset.from_dict(found, features=features)


def unit_weights(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[float]]:
    """A row's weights, all 1, with which TIS-DPO is DPO; for `Dataset.map`."""
    ids = _tokenize(row, tokenizer, None, None)
    return {column: [1.0] * len(ids[f"{kind}_ids"]) for kind, column in zip(KINDS, COLUMNS, strict=True)}


# ---------------------------------------------------------------- the command line


def make_parser(prog: str = "trl-ift token-weights") -> argparse.ArgumentParser:
    """Return the parser of the command. Defaults are those of `estimate_token_weights`."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Estimate a weight for each token of preference pairs, from a positive and a negative model, for `trl-ift "
        "tis-dpo`. An interrupted run goes on where it was when the same command is given again; another transform of the "
        "same log-probabilities costs next to nothing.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="YAML file of options; those on the command line win")
    add_dataset_options(parser, streaming=False)
    add("--positive", required=True, help="Hub id or folder of the model that likes what is good")
    add("--negative", help="Hub id or folder of the model that likes what is bad")
    add("--positive_adapter", help="Hub id or folder of a PEFT adapter for the positive model")
    add("--negative_adapter", help="Hub id or folder of a PEFT adapter for the negative model")
    add("--positive_prompt", help="system text that makes the one model a positive one, without --negative")
    add("--negative_prompt", help="system text that makes the one model a negative one, without --negative")
    add("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="float32", help="dtype of the models")
    add("--load_in_4bit", action="store_true", help="quantize the models to 4 bits")
    add("--trust_remote_code", action="store_true", help="run code that comes with the models")
    add("--weight_transform", choices=tuple(TRANSFORMS), default="exp", help="how log-ratios become weights")
    for name, default in DEFAULTS.items():
        readers = ", ".join(transform for transform, names in TRANSFORMS.items() if name in names)
        add(f"--{name}", type=type(default), help=f"of {readers}; {default:g} unless given")
    add("--eos_weight", type=_float_or_none, default=1.0, help="weight of end-of-sequence tokens; none: estimated too")
    add("--normalize_weights", action="store_true", help="divide the weights of a response by their mean")
    add("--max_length", type=int, help="tokens of prompt and response that the training will keep; all unless given")
    add("--batch_tokens", type=int, default=8192, help="most tokens of a batch; bounds the memory")
    add("--shard_size", type=int, default=1000, help="pairs of a shard, the unit of progress")
    add("--num_processes", type=int, default=1, help="processes of this machine, each with a model of its own")
    add("--output_dir", required=True, help=f"folder of the log-probabilities and of the weighted pairs, {PAIRS_FILE}")
    add(
        "--overwrite",
        action="store_true",
        help="replace weighted pairs that are there; log-probabilities are used again",
    )
    parser.error = partial(usage_error, prog)  # type: ignore[method-assign]
    return parser


def main(argv: list[str]) -> int:
    """Run `trl-ift token-weights` and return its exit code."""
    return run_tool(make_parser(), argv, _run, "trl_ift.data.token_weights")


def _run(args: argparse.Namespace) -> None:
    output = Path(args.output_dir).expanduser() / PAIRS_FILE
    if output.exists() and not args.overwrite:
        raise ValueError(f"`{output}` exists. Pass `--overwrite` to replace it, or choose another `--output_dir`.")
    init_kwargs: dict[str, Any] = {"dtype": args.dtype}
    if args.trust_remote_code:
        init_kwargs["trust_remote_code"] = True
    if args.load_in_4bit:
        init_kwargs["quantization_config"] = get_quantization_config(ModelConfig(dtype=args.dtype, load_in_4bit=True))
    names = (
        "positive_prompt", "negative_prompt", "positive_adapter", "negative_adapter", "weight_transform", "eos_weight",
        "normalize_weights", "max_length", "batch_tokens", "shard_size",
    )  # fmt: skip
    options = {name: getattr(args, name) for name in names}
    options |= {name: value for name in DEFAULTS if (value := getattr(args, name)) is not None}
    pairs = estimate_token_weights(
        load_split(args.dataset_name, args.dataset_split, args.dataset_config),
        args.positive,
        args.negative,
        args.output_dir,
        model_init_kwargs=init_kwargs,
        **options,
    )
    if int(os.environ.get("RANK", 0)) == 0:
        buffer = io.BytesIO()
        pairs.to_parquet(buffer)
        write_file(output, buffer.getvalue())
        print(describe_weights(pairs))
        print(f"Written to {output}. Train on them with `trl-ift tis-dpo --dataset_name {output}`.")


def describe_weights(pairs: Dataset) -> str:
    """How the weights are spread, one line a response."""
    lines = []
    for kind, column in zip(KINDS, COLUMNS, strict=True):
        rows: Sequence[np.ndarray] = [row[column] for row in pairs.select_columns([column]).with_format("numpy")]
        values = np.concatenate(rows)
        lines.append(
            f"Weights of {kind} tokens: mean {values.mean():.4g} (beta of the response is multiplied by it), "
            f"{values.min():.4g} to {values.max():.4g}, {len(values)} tokens of {len(rows)} responses."
        )
    return "\n".join(lines)


def _float_or_none(text: str) -> float | None:
    return None if text.lower() in ("none", "null") else float(text)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
