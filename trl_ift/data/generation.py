"""Completions sampled from a model for the prompts of a dataset, in shards that outlive any interruption.

generate_completions   the samples, as a folder of shards and as a dataset; `trl-ift generate` on the command line
load_completions       reads such a folder back
"""

import argparse
import hashlib
import inspect
import io
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, List, Value, load_dataset
from peft import PeftModel
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl import ModelConfig, extract_prompt, get_quantization_config

from ..checks import check_choice, check_quantization, check_range
from ..hub.card import library_versions
from ..scripts.data import load_split
from ..scripts.tools import add_dataset_options, add_model_options, run_tool
from ..scripts.train import usage_error
from ..trl_internals import get_config_model_id, tokenize
from .fingerprint import base_model, model_fingerprint
from .inference import (
    batches,
    check_model,
    check_runnable,
    lent,
    load_model,
    load_tokenizer,
    sequence_log_probs,
    tokenizer_digest,
)
from .rows import check_text, head
from .shards import (
    MANIFEST,
    check_manifest,
    claim_shards,
    read_manifest,
    remove_scratch_files,
    wait_until,
    write_file,
    write_manifest,
)


BACKENDS = ("transformers", "vllm")
_FORMAT = 1

# Samples one completion (token ids, possibly with more behind its EOS) for each prompt (token ids), from a seed
Sampler = Callable[[list[list[int]], int], list[list[int]]]


@dataclass(frozen=True)
class Settings:
    """What the samples depend on beside the model, the tokenizer and the prompts. Recorded in the manifest."""

    num_completions: int
    max_new_tokens: int
    max_prompt_length: int | None
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    batch_tokens: int
    shard_size: int
    seed: int
    backend: str
    score: bool

    def off_policy(self) -> str:
        """What makes the samples draws from another distribution than the model's, e.g. `@top_k=50`; empty if nothing."""
        neutral = {"temperature": 1, "top_p": 1, "top_k": 0, "repetition_penalty": 1}
        return "".join(
            f"@{name}={getattr(self, name):g}" for name, value in neutral.items() if getattr(self, name) != value
        )

    def __post_init__(self):
        for name in ("num_completions", "max_new_tokens", "batch_tokens", "shard_size"):
            check_range(name, getattr(self, name), 1, integer=True)
        if self.max_prompt_length is not None:
            check_range("max_prompt_length", self.max_prompt_length, 1, integer=True)
        for name in ("top_k", "seed"):
            check_range(name, getattr(self, name), 0, integer=True)
        check_range("temperature", self.temperature, 0)
        check_range("top_p", self.top_p, 0, 1, low_open=True)
        check_range("repetition_penalty", self.repetition_penalty, 0, low_open=True)
        check_choice("backend", self.backend, BACKENDS)
        if self.temperature == 0 and self.num_completions > 1:
            raise ValueError(
                f"`num_completions={self.num_completions}` with `temperature=0`: greedy completions of a prompt are all the "
                "same. Set `num_completions=1`, or a `temperature` above 0."
            )


def generate_completions(
    model: str | PreTrainedModel | PeftModel,
    dataset: Dataset | IterableDataset,
    output_dir: str | os.PathLike,
    *,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    num_completions: int = 1,
    max_new_tokens: int = 256,
    max_prompt_length: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    batch_tokens: int = 16384,
    shard_size: int = 256,
    seed: int = 0,
    backend: str = "transformers",
    score: bool = True,
    adapter: str | None = None,
    model_init_kwargs: dict[str, Any] | None = None,
    quantization_config: Any = None,
    vllm_kwargs: dict[str, Any] | None = None,
) -> Dataset:
    """
    Sample completions of a model, and score them under it.

    By default the samples are draws from the model itself: the sampling settings of its `generation_config` are left
    aside, its end-of-sequence tokens are kept. The folder grows by whole shards. A run that was interrupted, in any way,
    goes on when it is called again with the same arguments, and gives the token ids of an uninterrupted one; so does
    another number of processes (`accelerate launch`, `torchrun`), which share the folder and take turns at its shards.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Hub id, folder or instance. An instance is used where it is, with its active adapter, and is given back as it
            was; torch's random state too.
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Prompts: a column `prompt` of strings or of lists of messages (then `tools` and `chat_template_kwargs` are read
            as TRL does), or `chosen` and `rejected` with an implicit prompt. Other columns are ignored. A stream has to
            give the same rows each time: their content is not recorded in the manifest.
        output_dir (`str`):
            Folder of the shards `completions-00000.parquet`, ... and of `manifest.json`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer; the model's by default.
        num_completions (`int`, *optional*, defaults to `1`):
            Completions of each prompt.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Most tokens of a completion, its end-of-sequence token included.
        max_prompt_length (`int`, *optional*):
            Longer prompts are skipped, and so are those that leave no room for `max_new_tokens` in the model's context.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature; `0` is greedy decoding.
        top_p (`float`, *optional*, defaults to `1.0`):
            Probability mass that is sampled from.
        top_k (`int`, *optional*, defaults to `0`):
            Number of likeliest tokens that are sampled from; `0` is all.
        repetition_penalty (`float`, *optional*, defaults to `1.0`):
            Penalty on tokens that have occurred; `1.0` is none.
        batch_tokens (`int`, *optional*, defaults to `16384`):
            Most tokens of a batch, padding and `max_new_tokens` included; bounds the memory.
        shard_size (`int`, *optional*, defaults to `256`):
            Prompts of a shard: what an interruption can cost, and what one process takes at a time.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the samples.
        backend (`str`, *optional*, defaults to `"transformers"`):
            `"transformers"`, or `"vllm"` for a model that is named by a string, in one process. The latter was written
            to vLLM's documented interface and has not been run with vLLM.
        score (`bool`, *optional*, defaults to `True`):
            Whether to add the column `ref_logps`.
        adapter (`str`, *optional*):
            Folder or Hub id of a PEFT adapter, loaded on a model that is named by a string.
        model_init_kwargs (`dict`, *optional*):
            Arguments of `from_pretrained`, e.g. `{"dtype": "bfloat16"}`. As in TRL, `dtype` defaults to `"float32"`.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization of a model that is named by a string.
        vllm_kwargs (`dict`, *optional*):
            Arguments of `vllm.LLM`. By default it takes half of the GPU's memory and leaves the rest for scoring.

    Returns:
        [`~datasets.Dataset`]: A row for each completion, in the order of the prompts:
            `prompt` as given; `completion`, of the same kind; `prompt_ids` and `completion_ids`, the latter with an
            end-of-sequence token iff one was generated; `ref_logps`, the log-probability of the completion under the model
            at temperature 1 and without truncation; `num_tokens` of the completion; whether it was `truncated` at
            `max_new_tokens`; `prompt_index`, the row of the prompt in the dataset; `sample_index`; and `policy`, the
            `model_fingerprint`, followed by sampling settings that make it another distribution than the model's.

    Raises:
        ValueError, TypeError, ImportError: Something in the input is wrong, or `output_dir` holds other completions.
    """
    settings = Settings(
        num_completions, max_new_tokens, max_prompt_length, temperature, top_p, top_k, repetition_penalty, batch_tokens,
        shard_size, seed, backend, score,
    )  # fmt: skip
    folder, init_kwargs = Path(output_dir), dict(model_init_kwargs or {})
    if quantization_config is not None:
        init_kwargs["quantization_config"] = quantization_config
    state = PartialState(cpu=not torch.accelerator.is_available())  # without `cpu`, processes on a CPU are not a group
    check_model(model, processing_class, adapter, init_kwargs)
    _check_backend(model, adapter, init_kwargs, vllm_kwargs, backend, state)
    tokenizer = load_tokenizer(model, processing_class, init_kwargs)
    dataset = _only_prompts(dataset)
    first_prompt, _ = tokenize_prompt(next(iter(dataset)), 0, tokenizer)  # a template that fails does so here
    recorded = asdict(settings) | _record_prompts(dataset) | {"tokenizer": tokenizer_digest(tokenizer)}
    check_manifest(folder, _FORMAT, recorded, "completions")

    source = model if isinstance(model, str) else get_config_model_id(model.config)
    if isinstance(model, str):
        model = load_model(model, adapter, init_kwargs, state.device if state.num_processes > 1 else None)
    check_runnable(model)
    limit = _prompt_limit(model, settings)
    recorded |= {
        "policy": model_fingerprint(model) + settings.off_policy(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    check_manifest(folder, _FORMAT, recorded, "completions")
    if state.is_main_process:
        contents = {"model": source, "adapter": adapter, "settings": recorded, "versions": library_versions()}
        claim_shards(folder, {"format": _FORMAT, **contents, "complete": False}, "completions")
    state.wait_for_everyone()
    if read_manifest(folder)["complete"]:
        return load_completions(folder)

    end_ids, pad_id = _special_ids(model, tokenizer)
    if backend == "vllm":
        sampler = vllm_sampler(source, settings, end_ids, init_kwargs, vllm_kwargs)
    else:
        sampler = transformers_sampler(model, settings, end_ids, pad_id)
    writer = _ShardWriter(
        folder=folder,
        settings=settings,
        policy=recorded["policy"],
        model=model,
        tokenizer=tokenizer,
        sampler=sampler,
        end_ids=end_ids,
        pad_id=pad_id,
        prompt_limit=limit,
        features=_features(dataset, first_prompt, score),
    )
    try:
        with lent(model), _Progress(dataset, settings, state) as progress:
            shards, prompts = 0, 0
            for shard, rows in enumerate(_split(dataset, shard_size)):
                shards, prompts = shard + 1, prompts + len(rows)
                if shard % state.num_processes != state.process_index:
                    continue
                if shard_path(folder, shard).is_file():
                    progress.skip(len(rows))
                else:
                    writer.write(shard, rows, progress)
        wait_until(lambda: all(shard_path(folder, shard).is_file() for shard in range(shards)))
        if state.is_main_process:
            _complete(folder, shards, prompts, limit, progress.tokens_per_second)
        # By the file, not by a collective: those have timeouts, which a slower process may exceed
        wait_until(lambda: read_manifest(folder)["complete"])
    except KeyboardInterrupt:
        if state.is_main_process:
            print(
                f"\nInterrupted. The shards that are finished are kept in {folder}; to go on, run the same again.",
                file=sys.stderr,
            )
        raise
    return load_completions(folder)


def load_completions(folder: str | os.PathLike) -> Dataset:
    """Load the completions that `generate_completions` has written.

    Raises:
        ValueError: The folder holds none, or is not complete.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise ValueError(
            f"`{folder}` holds no completions: it has no {MANIFEST}. Give the folder that was `output_dir`."
        )
    manifest = read_manifest(folder)
    if not manifest.get("complete"):
        raise ValueError(
            f"The completions in `{folder}` are incomplete: the run that generated them was interrupted. Run it again with "
            "the same arguments to finish them."
        )
    shards = manifest.number("shards", 1)
    missing = next((shard for shard in range(shards) if not shard_path(folder, shard).is_file()), None)
    if missing is not None:
        raise ValueError(
            f"The completions in `{folder}` are incomplete: `{shard_path(folder, missing).name}` is missing. Generate them "
            "anew, in another folder."
        )
    return _load_shards(folder, shards)


# ---------------------------------------------------------------- model and tokenizer


def _check_backend(
    model: Any,
    adapter: str | None,
    init_kwargs: dict[str, Any],
    vllm_kwargs: dict[str, Any] | None,
    backend: str,
    state: PartialState,
) -> None:
    if backend != "vllm":
        if vllm_kwargs is not None:
            raise ValueError(f"`vllm_kwargs` has no effect with `backend={backend!r}`. Drop it.")
        return
    if not isinstance(model, str) or adapter is not None or "quantization_config" in init_kwargs:
        raise ValueError(
            "`backend='vllm'` loads the model itself, by its Hub id or folder, without adapter and quantization. Save the "
            "merged model and name its folder, or use `backend='transformers'`."
        )
    if state.num_processes > 1:
        raise ValueError(
            f"`backend='vllm'` in {state.num_processes} processes. Launch one, and give vLLM several GPUs by "
            "`vllm_kwargs={'tensor_parallel_size': ...}`."
        )
    if find_spec("vllm") is None:
        raise ImportError("`backend='vllm'`, but vLLM is not installed. Run `pip install vllm`.")


def _special_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Return the tokens that end a completion, and one for padding."""
    configured = base_model(model).generation_config.eos_token_id
    end_ids = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}
    if not end_ids:
        raise ValueError(
            "Neither the tokenizer nor the model's `generation_config` has an end-of-sequence token: no completion would "
            "ever end. Set `tokenizer.eos_token`."
        )
    pad_id = tokenizer.pad_token_id
    return sorted(end_ids), min(end_ids) if pad_id is None else pad_id


def _prompt_limit(model: PreTrainedModel | PeftModel, settings: Settings) -> int | None:
    """Most tokens of a prompt, if there is a bound."""
    context = getattr(base_model(model).config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return settings.max_prompt_length
    room = context - settings.max_new_tokens
    if room < 1:
        raise ValueError(
            f"`max_new_tokens={settings.max_new_tokens}` leaves no room for a prompt in the model's context of {context} "
            "tokens. Lower it."
        )
    return room if settings.max_prompt_length is None else min(room, settings.max_prompt_length)


# ---------------------------------------------------------------- prompts


def _only_prompts(dataset: Any) -> Dataset | IterableDataset:
    """Return the dataset with no columns but those that a prompt is made of."""
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(
            f"`dataset` is a {type(dataset).__name__}; expected a `Dataset` or an `IterableDataset`. Of a dictionary of "
            "splits, pass one."
        )
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError("`dataset` is empty: it has no rows. Check the split, and any filter applied before.")
    if "image" in row or "images" in row:
        raise ValueError("`dataset` is a vision dataset (column 'image' or 'images'), which is not supported.")
    if "prompt" not in row and not {"chosen", "rejected"} <= set(row):
        raise ValueError(
            f"`dataset` has the columns {sorted(row)}. Expected 'prompt', or 'chosen' and 'rejected' that begin with it. "
            "Rename your columns."
        )
    columns = ["prompt"] if "prompt" in row else ["chosen", "rejected"]
    columns += [column for column in ("tools", "chat_template_kwargs") if column in row]
    return dataset.with_format(None).select_columns(columns)


def _prompt_of(row: dict[str, Any], index: int) -> str | list[dict[str, Any]]:
    prompt = row["prompt"] if "prompt" in row else extract_prompt(row)["prompt"]
    of_messages = isinstance(prompt, list) and all(isinstance(m, dict) and "role" in m for m in prompt)
    if not prompt or not (isinstance(prompt, str) or of_messages):
        raise TypeError(
            f"`dataset`, row {index}: the prompt must be a string or a list of {{'role', 'content'}} messages, and not "
            f"empty; it is {prompt!r:.80}. Mend or drop the row."
        )
    check_text(prompt, f"`dataset`, row {index}", "prompt")
    return prompt


def tokenize_prompt(
    row: dict[str, Any], index: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[str | list[dict[str, Any]], list[int]]:
    """Return the prompt and its token ids, those of TRL's preference trainers."""
    prompt = _prompt_of(row, index)
    options: dict[str, Any] = {}
    if not isinstance(prompt, str):
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        options = {"add_generation_prompt": True, "tools": tools, **(row.get("chat_template_kwargs") or {})}
    return prompt, list(tokenize(tokenizer, prompt, **options)["input_ids"])


def _check_keys(prompt: str | list[dict[str, Any]], index: int, features: Features) -> None:
    """Raise if a message has a key that the columns of a stream, known by its first row only, leave out."""
    message = getattr(features["prompt"], "feature", None)
    if isinstance(prompt, str) or not isinstance(message, dict):
        return
    extra = {key for m in prompt for key, value in m.items() if value is not None} - set(message)
    if extra:
        raise ValueError(
            f"`dataset`, row {index}: a message has the keys {sorted(extra)}, which those of the first row have not. State the "
            "`features` of the stream, e.g. with `dataset.cast(features)`."
        )


def _record_prompts(dataset: Dataset | IterableDataset) -> dict[str, Any]:
    """Check all prompts of a map-style dataset, and return their number and digest. A stream has neither."""
    if not isinstance(dataset, Dataset):
        return {"prompts": None, "prompts_digest": None}
    digest = hashlib.sha256()
    for index, row in enumerate(dataset):
        content = [_prompt_of(row, index), row.get("tools"), row.get("chat_template_kwargs")]
        digest.update(json.dumps(content, sort_keys=True, default=str).encode() + b"\n")
    return {"prompts": len(dataset), "prompts_digest": digest.hexdigest()[:16]}


def _split(dataset: Dataset | IterableDataset, size: int) -> Iterator[Dataset | list[dict[str, Any]]]:
    """Yield the rows of each shard."""
    if isinstance(dataset, Dataset):
        for start in range(0, len(dataset), size):
            yield dataset.select(range(start, min(start + size, len(dataset))))
    else:
        rows = iter(dataset)
        while chunk := list(islice(rows, size)):
            yield chunk


def _features(dataset: Dataset | IterableDataset, first_prompt: str | list, score: bool) -> Features:
    """Return the columns of a shard; stated, so that all shards agree."""
    known = dataset.features or Dataset.from_list([{"prompt": first_prompt}]).features
    message = {"role": Value("string"), "content": Value("string")}
    return Features(
        {
            "prompt": known["prompt" if "prompt" in known else "chosen"],
            "completion": Value("string") if isinstance(first_prompt, str) else List(message),
            "prompt_ids": List(Value("int64")),
            "completion_ids": List(Value("int64")),
            **({"ref_logps": Value("float32")} if score else {}),
            "num_tokens": Value("int64"),
            "truncated": Value("bool"),
            "prompt_index": Value("int64"),
            "sample_index": Value("int64"),
            "policy": Value("string"),
        }
    )


# ---------------------------------------------------------------- sampling and scoring


def transformers_sampler(
    model: PreTrainedModel | PeftModel, settings: Settings, end_ids: list[int], pad_id: int
) -> Sampler:
    """Sample with `model.generate`. Seeds torch's generators; call it within `lent(model)`."""
    options: dict[str, Any] = {"do_sample": False}
    if settings.temperature > 0:
        options = {
            "do_sample": True,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
        }
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        repetition_penalty=settings.repetition_penalty,
        eos_token_id=end_ids,
        pad_token_id=pad_id,
        **options,
    )

    def sample(prompts: list[list[int]], seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        width = max(map(len, prompts))
        padding = [width - len(prompt) for prompt in prompts]
        ids = [[pad_id] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in padding]
        output = model.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=config,
        )
        return output[:, width:].tolist()

    return sample


def vllm_sampler(
    source: str,
    settings: Settings,
    end_ids: list[int],
    init_kwargs: dict[str, Any],
    vllm_kwargs: dict[str, Any] | None,
) -> Sampler:
    """Sample with vLLM. Written to its documented interface; it has not been run with vLLM."""
    from vllm import LLM, SamplingParams

    names = ("dtype", "revision", "trust_remote_code")
    options = {"dtype": "float32"} | {name: init_kwargs[name] for name in names if name in init_kwargs}
    options |= {"gpu_memory_utilization": 0.5, "generation_config": "vllm"} | (vllm_kwargs or {})
    llm = LLM(model=source, **options)

    def sample(prompts: list[list[int]], seed: int) -> list[list[int]]:
        parameters = [
            SamplingParams(
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k or -1,
                repetition_penalty=settings.repetition_penalty,
                max_tokens=settings.max_new_tokens,
                stop_token_ids=end_ids,
                seed=seed + number,
                detokenize=False,
            )
            for number in range(len(prompts))
        ]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return sample


def _batch_seed(seed: int, shard: int, batch: int) -> int:
    digest = hashlib.sha256(f"{seed}/{shard}/{batch}".encode()).digest()
    return int.from_bytes(digest[:7], "big")  # signed 64-bit integers hold it, also with the number of a row added


@dataclass
class _ShardWriter:
    """Samples, scores and writes shards."""

    folder: Path
    settings: Settings
    policy: str
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    sampler: Sampler
    end_ids: list[int]
    pad_id: int
    prompt_limit: int | None
    features: Features

    def write(self, shard: int, prompt_rows: Dataset | list[dict[str, Any]], progress: "_Progress") -> None:
        rows: list[dict[str, Any]] = []
        for index, row in enumerate(prompt_rows, start=shard * self.settings.shard_size):
            prompt, ids = tokenize_prompt(row, index, self.tokenizer)
            _check_keys(prompt, index, self.features)
            if self.prompt_limit is not None and len(ids) > self.prompt_limit:
                progress.skip(1)
                continue
            for sample_index in range(self.settings.num_completions):
                rows.append(
                    {"prompt": prompt, "prompt_ids": ids, "prompt_index": index, "sample_index": sample_index}
                    | {"policy": self.policy}
                )
        self._sample(shard, rows, progress)
        if self.settings.score:
            sequences = [
                (row["prompt_ids"] + row["completion_ids"], [-100] * len(row["prompt_ids"]) + row["completion_ids"])
                for row in rows
            ]
            log_probs = sequence_log_probs(self.model, sequences, self.settings.batch_tokens, self.pad_id)
            for row, value in zip(rows, log_probs, strict=True):
                row["ref_logps"] = value
        columns = {name: [row[name] for row in rows] for name in self.features}
        write_file(shard_path(self.folder, shard), _to_parquet(Dataset.from_dict(columns, features=self.features)))

    def _sample(self, shard: int, rows: list[dict[str, Any]], progress: "_Progress") -> None:
        """Add the completions to the rows of a shard."""
        lengths = [len(row["prompt_ids"]) + self.settings.max_new_tokens for row in rows]
        # vLLM makes batches of its own
        batch_tokens = float("inf") if self.settings.backend == "vllm" else self.settings.batch_tokens
        for number, batch in enumerate(batches(lengths, batch_tokens)):
            chosen = [rows[index] for index in batch]
            seed = _batch_seed(self.settings.seed, shard, number)
            sampled = self.sampler([row["prompt_ids"] for row in chosen], seed)
            for row, ids in zip(chosen, sampled, strict=True):
                row["completion_ids"] = ids = self._up_to_the_end(ids)
                row["num_tokens"], row["truncated"] = len(ids), ids[-1] not in self.end_ids
                row["completion"] = self._decode(row)
            progress.add(chosen)

    def _up_to_the_end(self, ids: list[int]) -> list[int]:
        end = next((position for position, token in enumerate(ids) if token in self.end_ids), len(ids))
        return ids[: end + 1]

    def _decode(self, row: dict[str, Any]) -> str | list[dict[str, str]]:
        decode = partial(self.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        text = decode(row["completion_ids"])
        if not isinstance(row["prompt"], str):
            return [{"role": "assistant", "content": text}]
        # SentencePiece drops a leading space of what it decodes, which after a prompt belongs to the text
        prompt, whole = decode(row["prompt_ids"]), decode(row["prompt_ids"] + row["completion_ids"])
        return whole.removeprefix(prompt) if whole.startswith(prompt) else text


class _Progress:
    """A bar over the prompts of this process, shown by the main one, with the speed of sampling and scoring."""

    def __init__(self, dataset: Dataset | IterableDataset, settings: Settings, state: PartialState):
        self.num_completions = settings.num_completions
        total, size = None, settings.shard_size
        if isinstance(dataset, Dataset):
            own = range(state.process_index * size, len(dataset), state.num_processes * size)
            total = sum(min(size, len(dataset) - start) for start in own)
        options = {} if state.is_main_process else {"disable": True}  # else TQDM_DISABLE decides
        self.bar = tqdm(total=total, unit="prompt", desc="Completions", **options)
        self.tokens, self.start = 0, time.monotonic()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of this process; `None` if it had nothing to do."""
        return self.tokens / (time.monotonic() - self.start) if self.tokens else None

    def skip(self, prompts: int) -> None:
        self.bar.update(prompts)

    def add(self, rows: list[dict[str, Any]]) -> None:
        self.tokens += sum(row["num_tokens"] for row in rows)
        self.bar.set_postfix_str(f"{self.tokens_per_second:.0f} tokens/s", refresh=False)
        self.bar.update(sum(row["sample_index"] == self.num_completions - 1 for row in rows))


# ---------------------------------------------------------------- the folder


def shard_path(folder: Path, shard: int) -> Path:
    """Path of a shard. The file is there iff the shard is finished."""
    return folder / f"completions-{shard:05d}.parquet"


def _complete(folder: Path, shards: int, prompts: int, limit: int | None, tokens_per_second: float | None) -> None:
    """Record that all shards are there, and their totals."""
    too_long = (
        f"prompts are longer than {limit} tokens (`max_prompt_length`, or the model's context less `max_new_tokens`)"
    )
    if not any(pq.read_metadata(shard_path(folder, shard)).num_rows for shard in range(shards)):
        raise ValueError(
            f"All {prompts} {too_long}: nothing was generated. Change these, and choose another `output_dir`."
        )
    dataset = _load_shards(folder, shards)
    skipped = prompts - len(dataset.unique("prompt_index"))
    if skipped:
        warnings.warn(f"Skipped {skipped} of {prompts} prompts: these {too_long}.")
    totals = {
        "rows": len(dataset),
        "tokens": sum(dataset["num_tokens"]),
        "truncated": sum(dataset["truncated"]),
        "prompts": prompts,
        "skipped": skipped,
        "tokens_per_second": tokens_per_second,
    }
    remove_scratch_files(folder)
    write_manifest(folder, read_manifest(folder) | {"complete": True, "shards": shards, "totals": totals})


def _load_shards(folder: Path, shards: int) -> Dataset:
    files = [str(shard_path(folder, shard)) for shard in range(shards)]
    return load_dataset("parquet", data_files=files, split="train")


def _to_parquet(dataset: Dataset) -> bytes:
    buffer, table = io.BytesIO(), dataset.data.table
    with pq.ParquetWriter(buffer, table.schema) as writer:
        if len(table):  # datasets cannot read an empty row group
            writer.write_table(table)
    return buffer.getvalue()


# ---------------------------------------------------------------- the command line

_HELP = {
    "num_completions": "completions of each prompt",
    "max_new_tokens": "most tokens of a completion",
    "max_prompt_length": "skip prompts of more tokens",
    "temperature": "temperature; 0 is greedy",
    "top_p": "probability mass that is sampled from",
    "top_k": "number of likeliest tokens that are sampled from; 0 is all",
    "repetition_penalty": "penalty on tokens that have occurred; 1 is none",
    "batch_tokens": "most tokens of a batch; bounds the memory",
    "shard_size": "prompts of a shard, the unit of progress",
    "seed": "seed of the samples",
    "backend": f"one of {', '.join(BACKENDS)}",
}


def make_parser(prog: str = "trl-ift generate") -> argparse.ArgumentParser:
    """Return the parser of the command. Defaults are those of `generate_completions`."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Sample completions of a model for the prompts of a dataset, and score them under it. An interrupted run "
        "goes on where it was when the same command is given again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; those on the command line win")
    add_model_options(parser)
    add_dataset_options(parser)
    parser.add_argument("--max_rows", type=int, help="take the first rows only")
    parser.add_argument("--output_dir", required=True, help="folder of the completions")
    signature = inspect.signature(generate_completions).parameters
    for name, text in _HELP.items():
        default = signature[name].default
        kind = int if default is None else type(default)
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    parser.add_argument("--no_score", action="store_true", help="leave out the log-probabilities (`ref_logps`)")
    parser.error = partial(usage_error, prog)  # type: ignore[method-assign]
    return parser


def main(argv: list[str]) -> int:
    """Run `trl-ift generate` and return its exit code."""
    return run_tool(make_parser(), argv, _generate, "trl_ift.data.generation")


def _generate(args: argparse.Namespace) -> None:
    check_quantization(args)
    if args.max_rows is not None:
        check_range("max_rows", args.max_rows, 1, integer=True)
    dataset = load_split(args.dataset_name, args.dataset_split, args.dataset_config, args.dataset_streaming)
    if args.max_rows is not None:
        dataset = head(dataset, args.max_rows)
    generate_completions(
        os.path.expanduser(args.model_name_or_path),
        dataset,
        args.output_dir,
        adapter=args.adapter,
        score=not args.no_score,
        model_init_kwargs={"dtype": args.dtype, "trust_remote_code": args.trust_remote_code},
        quantization_config=get_quantization_config(ModelConfig(dtype=args.dtype, load_in_4bit=args.load_in_4bit)),
        **{name: getattr(args, name) for name in _HELP},
    )
    if os.environ.get("RANK", "0") == "0":
        print(_summary(args.output_dir))


def _summary(folder: str) -> str:
    manifest = read_manifest(folder)
    totals, most = manifest["totals"], manifest["settings"]["max_new_tokens"]
    speed = totals["tokens_per_second"]
    return (
        f"{totals['rows']} completions of {totals['prompts'] - totals['skipped']} prompts ({totals['skipped']} skipped), "
        f"{totals['tokens']} tokens" + ("" if speed is None else f" at {speed:.0f} tokens/s a process") + ", "
        f"{totals['truncated'] / totals['rows']:.1%} cut at {most} tokens.\nWritten to {folder}."
    )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
