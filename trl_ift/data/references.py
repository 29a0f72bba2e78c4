"""Log-probabilities of preference pairs under several reference models, as columns of the dataset.

score_references   each model is loaded, scores the texts with its own tokenizer and chat template, and is freed
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset, IterableDataset, concatenate_datasets
from datasets.fingerprint import Hasher
from peft import PeftModel
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl import is_conversational

from ..checks import check_preference_dataset, check_range
from ..hub.card import library_versions
from ..preference.trainer import pair_ids
from ..trl_internals import global_then_local_main_first, share_cache_folder
from .caching import source_digest, versioned
from .fingerprint import base_model, model_fingerprint
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
from .rows import check_implicit_prompts, first_row


# Pairs between two steps of the progress bar
_PAIRS = 256

Model: TypeAlias = str | PreTrainedModel | PeftModel


def reference_columns(number: int) -> tuple[str, str]:
    """Names of the columns with the log-probabilities of chosen and rejected under reference `number`."""
    return f"ref{number}_chosen_logps", f"ref{number}_rejected_logps"


def score_references(
    dataset: Dataset,
    models: Model | Sequence[Model],
    *,
    processing_classes: Sequence[PreTrainedTokenizerBase | ProcessorMixin | None] | None = None,
    eos_token: str | None = None,
    batch_tokens: int = 16384,
    model_init_kwargs: dict[str, Any] | None = None,
    quantization_config: Any = None,
    device: torch.device | None = None,
) -> Dataset:
    """
    Add the log-probabilities of both responses under each model, summed over the response, in nats.

    A model reads the texts with its own tokenizer and chat template, as TRL would prepare the pairs for it: token ids of one
    model mean nothing to another, and sums over a whole response stay comparable where its tokens do not. Only one model is in
    memory at a time. The values are cached beside the dataset, by the weights and all else that they depend on; with several
    processes (`accelerate launch`) each scores its share of the rows.

    Args:
        dataset ([`~datasets.Dataset`]):
            `prompt` (optional if both responses repeat it), `chosen`, `rejected`, as strings or messages.
        models (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], or a list of them):
            Hub ids, folders or instances.
        processing_classes (list of [`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizers, one a model; the models' own by default.
        eos_token (`str`, *optional*):
            End-of-sequence token of another model that strings end with, if they do: it is taken off, and each model's own is
            put in its place. Strings that do not end with it get the model's own too.
        batch_tokens (`int`, *optional*, defaults to `16384`):
            Most tokens of a batch, padding included; bounds the memory.
        model_init_kwargs (`dict`, *optional*):
            Arguments of `from_pretrained` for models that are named, e.g. `{"dtype": "bfloat16"}`. As in TRL, `dtype`
            defaults to `"float32"`.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization of models that are named.
        device (`torch.device`, *optional*):
            Where models that are named are loaded; by default where TRL would.

    Returns:
        [`~datasets.Dataset`]: The dataset with `ref1_chosen_logps`, `ref1_rejected_logps`, `ref2_chosen_logps`, ...: one pair
        of columns a model, in their order.

    Raises:
        ValueError, TypeError: Something in the input is wrong, or a text is longer than the context of a model. Before that
            model is loaded.
    """
    models = [models] if isinstance(models, Model) else list(models)
    tokenizers = [None] * len(models) if processing_classes is None else list(processing_classes)
    check_range("batch_tokens", batch_tokens, 1, integer=True)
    init_kwargs = dict(model_init_kwargs or {})
    if quantization_config is not None:
        init_kwargs["quantization_config"] = quantization_config
    if len(tokenizers) != len(models):
        raise ValueError(
            f"`processing_classes` has {len(tokenizers)} entries for {len(models)} models. Give one a model."
        )
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"`dataset` is a {type(dataset).__name__}; expected a `Dataset`. Of a dictionary of splits pass one; a stream can "
            "be stored with `Dataset.from_generator`."
        )
    loaded = check_references(dataset, "dataset", models, tokenizers, init_kwargs)
    # Without `cpu`, processes on a CPU are not a group
    state = PartialState(cpu=not torch.accelerator.is_available())
    if state.num_processes > 1:
        share_cache_folder(dataset)
    columns = []
    for number, (model, tokenizer) in enumerate(zip(models, loaded, strict=True), start=1):
        reference = _Reference(model, tokenizer, init_kwargs, device, state)
        scores = reference.score(dataset, eos_token, batch_tokens)
        columns.append(scores.rename_columns(dict(zip(scores.column_names, reference_columns(number), strict=True))))
    return concatenate_datasets([dataset, *columns], axis=1)


def check_references(
    dataset: Any,
    name: str,
    models: Sequence[Model],
    tokenizers: Sequence[Any] | None = None,
    init_kwargs: dict[str, Any] | None = None,
) -> list[PreTrainedTokenizerBase]:
    """Raise, before a model is loaded, if these models cannot score this dataset; return their tokenizers."""
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"`{name}` is an `IterableDataset`: references score all pairs before training. Pass a `Dataset` (`Dataset."
            "from_generator` stores a stream), or a stream that has the columns of `score_references`."
        )
    check_preference_dataset(dataset, name)
    if not models:
        raise ValueError("No reference model is given. Name at least one.")
    row = first_row(dataset)
    if not {"chosen", "rejected"} <= set(row):
        raise ValueError(
            f"`{name}` has token ids and no texts, which another model could not read. Add the columns 'prompt', 'chosen' and "
            "'rejected', or the columns of `score_references`."
        )
    if "prompt" not in row:
        check_implicit_prompts(dataset, name)
    if present := [column for column in reference_columns(1) if column in row]:
        raise ValueError(f"`{name}` has the column '{present[0]}' already. Remove it to score the pairs again.")
    found = []
    for model, processing_class in zip(models, tokenizers or [None] * len(models), strict=True):
        check_model(model, processing_class, None, (init_kwargs or {}) if isinstance(model, str) else {})
        tokenizer = load_tokenizer(model, processing_class, init_kwargs or {})
        if is_conversational({"chosen": row["chosen"]}) and tokenizer.chat_template is None:
            raise ValueError(
                f"`{name}` holds messages, and the tokenizer of the reference `{_label(model)}` has no chat template. Choose "
                "another reference, or pass `score_references` a tokenizer with a template."
            )
        if tokenizer.eos_token is None:
            raise ValueError(
                f"The tokenizer of the reference `{_label(model)}` has no end-of-sequence token, so that the ends of the "
                "responses would not be scored. Set `tokenizer.eos_token` and save it with the model."
            )
        found.append(tokenizer)
    return found


def _label(model: Model) -> str:
    return model if isinstance(model, str) else type(model).__name__


class _Reference:
    """One reference model, loaded when its scores are not cached."""

    def __init__(self, model: Model, tokenizer: Any, init_kwargs: dict[str, Any], device: Any, state: PartialState):
        self.model, self.tokenizer, self.device, self.state = model, tokenizer, device, state
        self.init_kwargs = init_kwargs if isinstance(model, str) else {}
        self.loaded = None if isinstance(model, str) else model

    def score(self, dataset: Dataset, eos_token: str | None, batch_tokens: int) -> Dataset:
        """Log-probabilities of chosen and rejected, a dataset of two columns."""
        config = self._config()
        kind = (self.device or torch.accelerator.current_accelerator() or torch.device("cpu")).type
        kwargs = sorted((name, str(value)) for name, value in self.init_kwargs.items())
        known = [self._identity(config), tokenizer_digest(self.tokenizer), eos_token, kwargs, kind, library_versions()]
        known.append(source_digest(_tokenize_row, pair_ids, sequence_log_probs))
        fingerprint = [Hasher.hash((dataset._fingerprint, known))]
        broadcast_object_list(fingerprint, from_process=0)  # the processes' datasets may have different ones
        cache = dataset._get_cache_file_path(fingerprint[0])
        if not os.path.exists(cache):
            sequences = self._tokenize(dataset, eos_token, config)
            scores = self._run(sequences, batch_tokens)
            if self.state.is_main_process:
                dataset.map(
                    lambda _, rows: {
                        name: [scores[row][i] for row in rows] for i, name in enumerate(("chosen", "rejected"))
                    },
                    with_indices=True,
                    batched=True,
                    remove_columns=dataset.column_names,
                    new_fingerprint=fingerprint[0],
                    cache_file_name=cache,
                    desc="Caching reference log probs",
                )
            self.state.wait_for_everyone()
        return Dataset.from_file(cache)

    def _config(self) -> Any:
        if self.loaded is not None:
            return base_model(self.loaded).config
        options = {
            name: self.init_kwargs[name] for name in ("revision", "trust_remote_code") if name in self.init_kwargs
        }
        return AutoConfig.from_pretrained(self.model, **options)

    def _identity(self, config: Any) -> Any:
        """What tells the weights from others, if possible without loading them."""
        if self.loaded is None and (folder := Path(self.model)).is_dir():
            files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".json"))
            return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        if self.loaded is None and getattr(config, "_commit_hash", None):
            return [self.model, config._commit_hash]
        return [model_fingerprint(self._load()), str(self._load().dtype)]

    def _load(self) -> PreTrainedModel | PeftModel:
        if self.loaded is None:
            device = self.device or own_device(self.state.num_processes)
            kwargs = self.init_kwargs
            if device is not None and device.type == "cpu":
                kwargs = {"device_map": None} | kwargs
            self.loaded = load_model(self.model, None, kwargs, device)
        check_runnable(self.loaded)
        return self.loaded

    def _tokenize(self, dataset: Dataset, eos_token: str | None, config: Any) -> Dataset:
        """The sequences of chosen and rejected, as token ids, and where the responses start."""
        with global_then_local_main_first():
            tokenized = dataset.with_format(None).map(
                versioned(_tokenize_row, pair_ids),
                fn_kwargs={"tokenizer": self.tokenizer, "eos_token": eos_token},
                remove_columns=dataset.column_names,
                desc=f"Tokenizing for {_label(self.model)}",
            )
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
        lengths = tokenized.with_format("numpy")["length"][:]
        if context is not None and (lengths > context).any():
            raise ValueError(
                f"{(lengths > context).sum()} of {len(dataset)} pairs are longer than the context of the reference "
                f"`{_label(self.model)}`, {context} tokens (the longest: {lengths.max()} tokens, row {lengths.argmax()}). Drop "
                "such rows, or choose another reference."
            )
        return tokenized

    def _run(self, tokenized: Dataset, batch_tokens: int) -> list[list[float]]:
        """Log-probabilities of chosen and rejected of every row; each process scores its share."""
        own = range(self.state.process_index, len(tokenized), self.state.num_processes)
        pad_id = self.tokenizer.pad_token_id
        pad_id = self.tokenizer.eos_token_id if pad_id is None else pad_id
        found: list[tuple[int, float, float]] = []
        hidden = {} if self.state.is_main_process else {"disable": True}  # else TQDM_DISABLE decides
        model = self._load()
        with (
            lent(model),
            tqdm(total=len(own), unit="pair", desc=f"Scoring with {_label(self.model)}", **hidden) as bar,
        ):
            for start in range(0, len(own), _PAIRS):
                chunk = own[start : start + _PAIRS]
                sequences = []
                for row in tokenized.select(chunk):
                    for ids in (row["chosen_ids"], row["rejected_ids"]):
                        sequences.append((ids, [-100] * row["start"] + ids[row["start"] :]))
                sums = sequence_log_probs(model, sequences, batch_tokens, pad_id)
                found += zip(chunk, sums[::2], sums[1::2], strict=True)
                bar.update(len(chunk))
        del model
        if isinstance(self.model, str):
            self.loaded = None
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()
        if self.state.num_processes > 1:
            found = gather_object(found)
        return [[chosen, rejected] for _, chosen, rejected in sorted(found)]


def _tokenize_row(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, eos_token: str | None) -> dict[str, Any]:
    if eos_token and isinstance(row["chosen"], str):
        row = row | {name: row[name].removesuffix(eos_token) for name in ("chosen", "rejected")}
    ids = pair_ids(row, tokenizer, tokenizer.eos_token)
    prompt, chosen, rejected = (ids[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    longest = len(prompt) + max(len(chosen), len(rejected))
    return {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected, "start": len(prompt), "length": longest}
