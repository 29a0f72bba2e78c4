"""Training of the guiding model of LD-Align by reconstruction of answers; `trl-ift guide` on the command line.

`output_dir` grows by checkpoints, the guide (weights and tokenizers) and, last, `guide.json` with the check of the codes.
Interrupted at any point, the same call goes on.
"""

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import SAFE_WEIGHTS_NAME
from trl import TrlParser

from ..checks import (
    check_choice,
    check_model_source,
    check_preference_dataset,
    check_range,
    check_sft_dataset,
    check_unused,
    is_complete_checkpoint,
)
from ..data.caching import versioned
from ..data.fingerprint import model_fingerprint
from ..data.inference import load_tokenizer, tokenizer_digest
from ..data.shards import remove_scratch_files, wait_until, write_file
from ..extension import RedactedConfig, SaveWithoutArguments
from ..hub.card import library_versions
from ..scripts.data import load_split
from ..scripts.train import INPUT_ERRORS, parse_options, report_error, usage_error
from ..stages import as_json, claim, is_main_process, last_checkpoint, say, train_and_save, training_settings
from ..trl_internals import get_config_model_id
from .encoders import Sample, cut_tokens, pad_tokens, whole_token_ids
from .guide import (
    RECONSTRUCT,
    RESULT_FILE,
    GuideModel,
    apply_word_dropout,
    gaussian_kl,
    reconstruction_check,
    save_guide,
)


PROG = "trl-ift guide"
SETTINGS_FILE = "guide_settings.json"
GUIDE_DATA = ("both", "real")
DECODER_TRAINING = ("full", "memory", "lora")
_LEARNING_RATE = TrainingArguments.learning_rate  # its default


@dataclass
class GuideTrainingArguments(RedactedConfig, TrainingArguments):
    r"""
    Arguments of the training of a guide, [`train_guide`].

    This class includes only the parameters that are specific to it, or have another default than in
    [`~transformers.TrainingArguments`]. All defaults are our choices.

    Parameters:
        guide_data (`str`, *optional*, defaults to `"both"`):
            Answers to train on: `"both"`, real and generated ones, as far as the dataset has them; or `"real"`.
        reconstruct (`str`, *optional*, defaults to `"completion"`):
            What the decoder rebuilds: `"completion"`, the answer given its prompt; or `"full"`, the prompt too.
        latent_dim (`int`, *optional*, defaults to `128`):
            Dimension of the codes.
        memory_tokens (`int`, *optional*, defaults to `8`):
            Number of embeddings made from the code, in front of the decoder's tokens.
        variational (`bool`, *optional*, defaults to `False`):
            Whether codes are sampled in training, from a normal distribution whose mean and variance the encoder gives.
        kl_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the KL divergence of that distribution from N(0, I), summed over dimensions. Needs `variational`.
        free_bits (`float`, *optional*, defaults to `0.0`):
            Nats of each dimension's divergence that cost nothing. Needs `kl_weight`.
        kl_warmup_ratio (`float`, *optional*, defaults to `0.0`):
            Share of the steps over which `kl_weight` grows linearly from 0. Needs `kl_weight`.
        word_dropout (`float`, *optional*, defaults to `0.3`):
            Share of the answers' tokens that the decoder does not see in training (the mask or padding token is in their
            place), so that it has to use the code.
        encoder_learning_rate (`float`, *optional*, defaults to `5e-5`):
            Learning rate of the encoder and its projection. It is what is logged as `learning_rate`.
        decoder_learning_rate (`float`, *optional*, defaults to `5e-5`):
            Learning rate of the decoder and of the memory projection.
        decoder_training (`str`, *optional*, defaults to `"full"`):
            What is trained of the decoder beside the memory projection: `"full"`, all of it; `"memory"`, nothing; `"lora"`,
            LoRA on all linear layers, merged when it is saved.
        lora_r (`int`, *optional*, defaults to `16`):
            Rank of LoRA; its alpha is twice that.
        max_length (`int`, *optional*, defaults to `512`):
            Most tokens of prompt and answer together. A prompt keeps its last `max_length // 2`, an answer its first ones.
        eval_fraction (`float`, *optional*, defaults to `0.05`):
            Share of the rows that are held out for the check (and for `eval_strategy`); at least 8 rows, if that is not more
            than half of them.
        collapse_threshold (`float`, *optional*, defaults to `0.01`):
            Smallest gap between the losses with other answers' codes and with their own, relative to the latter, without a
            warning.
        num_train_epochs (`float`, *optional*, defaults to `1.0`):
            Number of epochs.
        logging_steps (`float`, *optional*, defaults to `10`):
            Number of steps between two logs, or, below 1, their share of all steps.
    """

    guide_data: str = field(
        default="both",
        metadata={"help": "Answers to train on: real and generated ones, or real ones.", "choices": list(GUIDE_DATA)},
    )
    reconstruct: str = field(
        default="completion",
        metadata={
            "help": "What the decoder rebuilds: the answer given its prompt, or the prompt too.",
            "choices": list(RECONSTRUCT),
        },
    )
    latent_dim: int = field(default=128, metadata={"help": "Dimension of the codes."})
    memory_tokens: int = field(
        default=8, metadata={"help": "Number of embeddings made from the code, in front of the decoder's tokens."}
    )
    variational: bool = field(
        default=False,
        metadata={"help": "Whether codes are sampled in training, from a normal distribution that the encoder gives."},
    )
    kl_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the KL divergence of that distribution from N(0, I). Needs `variational`."},
    )
    free_bits: float = field(
        default=0.0,
        metadata={"help": "Nats of each dimension's divergence that cost nothing. Needs `kl_weight`."},
    )
    kl_warmup_ratio: float = field(
        default=0.0,
        metadata={"help": "Share of the steps over which `kl_weight` grows linearly from 0. Needs `kl_weight`."},
    )
    word_dropout: float = field(
        default=0.3,
        metadata={"help": "Share of the answers' tokens that the decoder does not see in training."},
    )
    encoder_learning_rate: float = field(
        default=5e-5, metadata={"help": "Learning rate of the encoder and its projection."}
    )
    decoder_learning_rate: float = field(
        default=5e-5, metadata={"help": "Learning rate of the decoder and of the memory projection."}
    )
    decoder_training: str = field(
        default="full",
        metadata={
            "help": "What is trained of the decoder beside the memory projection: all of it, nothing, or LoRA.",
            "choices": list(DECODER_TRAINING),
        },
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of LoRA; its alpha is twice that."})
    max_length: int = field(default=512, metadata={"help": "Most tokens of prompt and answer together."})
    eval_fraction: float = field(
        default=0.05,
        metadata={"help": "Share of the rows that are held out for the check; at least 8, if there are enough."},
    )
    collapse_threshold: float = field(
        default=0.01,
        metadata={"help": "Smallest relative gap between the losses with others' codes and with their own ones."},
    )

    # Other defaults than in TrainingArguments
    num_train_epochs: float = field(default=1.0, metadata={"help": "Number of epochs."})
    logging_steps: float = field(
        default=10, metadata={"help": "Number of steps between two logs, or, below 1, their share of all steps."}
    )

    def __post_init__(self):
        if self.output_dir is None:
            raise ValueError("No folder for the guide: name one with `output_dir`.")
        check_choice("guide_data", self.guide_data, GUIDE_DATA)
        check_choice("reconstruct", self.reconstruct, RECONSTRUCT)
        check_choice("decoder_training", self.decoder_training, DECODER_TRAINING)
        for name in ("latent_dim", "memory_tokens", "lora_r"):
            check_range(name, getattr(self, name), 1, integer=True)
        check_range("max_length", self.max_length, 2, integer=True)
        for name in ("kl_weight", "free_bits", "encoder_learning_rate", "decoder_learning_rate", "collapse_threshold"):
            check_range(name, getattr(self, name), 0)
        for name in ("kl_warmup_ratio", "word_dropout"):
            check_range(name, getattr(self, name), 0, 1)
        check_range("eval_fraction", self.eval_fraction, 0, 0.5, low_open=True)
        if not self.variational:
            check_unused(self, ("kl_weight", "free_bits", "kl_warmup_ratio"), "without `variational=True`")
        if self.kl_weight == 0:
            check_unused(self, ("free_bits", "kl_warmup_ratio"), "with `kl_weight=0`")
        if self.decoder_training != "lora":
            check_unused(self, ("lora_r",), f"with `decoder_training={self.decoder_training!r}`")
        if self.learning_rate != _LEARNING_RATE:
            raise ValueError(
                f"`learning_rate={self.learning_rate!r}`: encoder and decoder have their own. Set `encoder_learning_rate` and "
                "`decoder_learning_rate`."
            )
        check_unused(self, ("label_smoothing_factor", "neftune_noise_alpha"), "on the loss of a guide")
        check_unused(self, ("push_to_hub",), "here: push the finished guide with its `push_to_hub`")
        check_unused(self, ("resume_from_checkpoint",), "here: a run goes on by itself from its last checkpoint")
        if self.save_only_model:
            raise ValueError(
                "`save_only_model=True`: a run that was interrupted could not go on as it would have. Drop the option."
            )
        for name in ("fsdp", "deepspeed"):
            if getattr(self, name):
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` is not supported by the training of a guide. Drop it."
                )
        super().__post_init__()


def train_guide(
    encoder: str | PreTrainedModel,
    decoder: str | PreTrainedModel,
    dataset: Dataset,
    args: GuideTrainingArguments,
    *,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    encoder_processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    model_init_kwargs: dict[str, Any] | None = None,
) -> GuideModel:
    """
    Train a guide, check that its decoder uses the codes, and save it in `args.output_dir`.

    A run that was interrupted goes on from its last checkpoint when the function is called again with the same arguments, and
    gives the guide of an uninterrupted one; a finished guide is loaded. Logged are `guide/nll`, the reconstruction loss in nats
    a token (mean over the tokens of an answer, then over answers), and, if variational, `guide/kl`, in nats an answer.

    Args:
        encoder (`str` or [`~transformers.PreTrainedModel`]):
            Hub id, folder or instance: a causal language model, whose backbone is taken, or an encoder such as BERT.
        decoder (`str` or [`~transformers.PreTrainedModel`]):
            Hub id, folder or instance of a causal language model. It should have the tokenizer of the policies whose pairs will
            be weighed. Instances are trained in place.
        dataset ([`~datasets.Dataset`]):
            `prompt` and `completion`; or `prompt`, `chosen` (real) and `rejected` (generated). Strings or messages. Rows, not
            answers, are held out for the check.
        args ([`GuideTrainingArguments`]):
            Arguments of the training.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the decoder; that of `decoder` by default.
        encoder_processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the encoder; by default that of `encoder`, or the decoder's if both are the same model.
        model_init_kwargs (`dict`, *optional*):
            Arguments of `from_pretrained` for both models, e.g. `{"dtype": "bfloat16"}`. `dtype` defaults to `"float32"`.

    Returns:
        [`GuideModel`]: The guide, in evaluation mode.

    Raises:
        ValueError, TypeError, OSError: Something in the input is wrong, or `output_dir` holds another guide.
    """
    if not isinstance(args, GuideTrainingArguments):
        raise TypeError(f"`args` is a `{type(args).__name__}`; expected `GuideTrainingArguments`.")
    folder = Path(args.output_dir).expanduser()
    args.output_dir = str(folder)
    encoder, decoder = (os.path.expanduser(m) if isinstance(m, str) else m for m in (encoder, decoder))
    _check_model(encoder, "encoder")
    _check_model(decoder, "decoder")
    init_kwargs = _check_init_kwargs(encoder, decoder, model_init_kwargs)
    _check_tokenizer(decoder, processing_class, "decoder")
    shared = encoder_processing_class is None and _source_of(encoder) == _source_of(decoder)
    if not shared:
        _check_tokenizer(encoder, encoder_processing_class, "encoder")
    _check_dataset(dataset)
    tokenizer = load_tokenizer(decoder, processing_class, init_kwargs)
    encoder_tokenizer = None
    if not shared:
        encoder_tokenizer = load_tokenizer(encoder, encoder_processing_class, init_kwargs)
        if tokenizer_digest(encoder_tokenizer) == tokenizer_digest(tokenizer):
            encoder_tokenizer = None
    replacement = _dropout_token(tokenizer, args.word_dropout)
    done = folder / RESULT_FILE
    if not done.is_file():
        last_checkpoint(folder, args.world_size)  # refuses one of another number of processes
    with args.main_process_first(desc="tokenizing"):
        samples = _tokenize(dataset, tokenizer, encoder_tokenizer, args)
    train, held_out = _split(samples, len(dataset), args)

    guide = _load_guide(encoder, decoder, args, init_kwargs)
    settings = training_settings(args)
    settings |= {name: getattr(args, name) for name in _own_options()}  # `eval_fraction` among them
    settings |= {
        "rows": len(dataset),
        "answers": len(samples),
        "tokens": _digest(samples),
        "tokenizer": tokenizer_digest(tokenizer),
        "encoder_tokenizer": None if encoder_tokenizer is None else tokenizer_digest(encoder_tokenizer),
        "encoder_weights": model_fingerprint(guide.encoder),
        "decoder_weights": model_fingerprint(guide.decoder),
        "dtypes": [str(part.dtype).removeprefix("torch.") for part in (guide.encoder, guide.decoder)],
    }
    if is_main_process():
        if folder.is_dir():
            remove_scratch_files(folder)
        has_results = done.is_file() or any(map(is_complete_checkpoint, folder.glob("checkpoint-*")))
        claim(folder, SETTINGS_FILE, as_json(settings), has_results, "training of a guide")
    if done.is_file():
        say(f"The guide in {folder} is trained.")
        return GuideModel.from_pretrained(folder)

    if args.decoder_training == "memory":
        guide.decoder.requires_grad_(False)
    elif args.decoder_training == "lora":
        lora = LoraConfig(
            r=args.lora_r, lora_alpha=2 * args.lora_r, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        guide.decoder = get_peft_model(guide.decoder, lora)
    collator = GuideCollator(tokenizer, encoder_tokenizer, args.reconstruct)
    trainer = GuideTrainer(
        guide, args, data_collator=collator, train_dataset=train, eval_dataset=held_out, replacement=replacement
    )
    say(f"Training the guide in {folder} on {len(train)} answers; {len(held_out)} are held out.")
    record = train_and_save(trainer, folder, "the guide")
    guide = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    if args.decoder_training == "lora":
        guide.decoder = guide.decoder.merge_and_unload()
    if is_main_process():
        save_guide(guide, folder, tokenizer, encoder_tokenizer)
        check = reconstruction_check(
            guide,
            [_sample(dataset[row], column) for row, column in zip(held_out["row"], held_out["column"], strict=True)],
            tokenizer,
            encoder_tokenizer,
            reconstruct=args.reconstruct,
            threshold=args.collapse_threshold,
        )
        result = {
            "encoder": _source_of(encoder),
            "decoder": _source_of(decoder),
            "training": record,
            "check": check,
            "versions": library_versions(),
        }
        write_file(done, (json.dumps(as_json(result), indent=2) + "\n").encode())
    wait_until(done.is_file)  # not by a collective: the check may take longer than those wait
    return guide


def _own_options() -> list[str]:
    inherited = {field.name for field in fields(TrainingArguments)}
    return [field.name for field in fields(GuideTrainingArguments) if field.name not in inherited]


# ---------------------------------------------------------------- models


def _source_of(model: str | PreTrainedModel) -> str:
    return model if isinstance(model, str) else get_config_model_id(model.config)


def _check_init_kwargs(encoder: Any, decoder: Any, init_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    init_kwargs = dict(init_kwargs or {})
    if init_kwargs and not (isinstance(encoder, str) or isinstance(decoder, str)):
        raise ValueError(
            "`model_init_kwargs` is for models that are named by strings; `encoder` and `decoder` are instances. Apply it when "
            "you load them, and drop it here."
        )
    for name in ("quantization_config", "load_in_4bit", "load_in_8bit", "device_map"):
        if init_kwargs.get(name):
            raise ValueError(
                f"`model_init_kwargs['{name}']` is not supported: both models are trained, and saved. Drop it."
            )
    return {"dtype": "float32"} | init_kwargs


def _check_model(model: Any, name: str) -> None:
    if not isinstance(model, str | PreTrainedModel):
        hint = " Merge the adapter first: `model.merge_and_unload()`." if isinstance(model, PeftModel) else ""
        raise TypeError(
            f"`{name}` is a {type(model).__name__}; expected a Hub id, a folder or a `PreTrainedModel`.{hint}"
        )
    if getattr(model, "is_quantized", False):
        raise ValueError(f"`{name}` is quantized: a guide is trained, and saved, with its weights. Load it without.")


def _check_tokenizer(model: str | PreTrainedModel, processing_class: Any, name: str) -> None:
    """Raise if a model has no tokenizer and none is given, or its folder is missing files."""
    try:
        check_model_source(model, processing_class)
    except ValueError as error:
        argument = "`processing_class`" if name == "decoder" else "`encoder_processing_class`"
        raise ValueError(f"`{name}`: {str(error).replace('`processing_class`', argument)}") from None


def _load_guide(
    encoder: str | PreTrainedModel,
    decoder: str | PreTrainedModel,
    args: GuideTrainingArguments,
    init_kwargs: dict[str, Any],
) -> GuideModel:
    """Load both models, check that they fit the task, and put them together."""
    one = isinstance(encoder, str) and isinstance(decoder, str) and _source_of(encoder) == _source_of(decoder)
    if isinstance(decoder, str):
        decoder = AutoModelForCausalLM.from_pretrained(decoder, **init_kwargs)
    if one:
        encoder = decoder  # its backbone will be copied
    elif isinstance(encoder, str):
        encoder = AutoModel.from_pretrained(encoder, **init_kwargs)
    for name, model in (("encoder", encoder), ("decoder", decoder)):
        if type(model).__module__.startswith("transformers_modules."):
            raise ValueError(
                f"`{name}` is a {type(model).__name__}, whose code comes with the model. A guide is saved without code: choose "
                "a model of an architecture that transformers has."
            )
    if decoder.get_output_embeddings() is None:
        raise ValueError(f"`decoder` is a {type(decoder).__name__}; expected a causal language model.")
    _check_config(encoder.config, "encoder", args)
    _check_config(decoder.config, "decoder", args)
    set_seed(args.seed)  # the initial weights of the projections
    return GuideModel.of(
        encoder,
        decoder,
        latent_dim=args.latent_dim,
        memory_tokens=args.memory_tokens,
        variational=args.variational,
        max_length=args.max_length,
    )


def _check_config(config: PreTrainedConfig, name: str, args: GuideTrainingArguments) -> None:
    """Raise if a model of this config cannot be the part of a guide with this name."""
    if config.is_encoder_decoder:
        raise ValueError(
            f"`{name}` is an encoder-decoder model ({config.model_type}), which is not supported. Choose a causal language "
            "model" + (", or an encoder such as BERT." if name == "encoder" else ".")
        )
    memory = args.memory_tokens if name == "decoder" else 0
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and args.max_length + memory > context:
        raise ValueError(
            f"`max_length={args.max_length}`{f' and `memory_tokens={memory}`' if memory else ''} do not fit the {name}, whose "
            f"context has {context} tokens. Lower them."
        )


def check_sources(
    encoder: str | None,
    decoder: str | None,
    policy: str,
    tokenizer: PreTrainedTokenizerBase,
    args: GuideTrainingArguments,
    init_kwargs: dict[str, Any],
) -> None:
    """Raise, before any model is loaded, if no guide of these models (`None`: the policy) can be trained, or used with it."""
    options = {name: value for name, value in init_kwargs.items() if name != "attn_implementation"}
    for name, model in (("encoder", encoder), ("decoder", decoder)):
        if model is not None:
            _check_tokenizer(model, None, name)
        _check_config(AutoConfig.from_pretrained(model or policy, **options), name, args)
    if decoder is not None:
        found, expected = tokenizer_digest(load_tokenizer(decoder, None, init_kwargs)), tokenizer_digest(tokenizer)
        if found != expected:
            raise ValueError(
                f"The tokenizer of the guide's decoder `{decoder}` ({found}) is not that of the policy ({expected}): "
                "vocabulary, rules or chat template differ. Choose a decoder that shares it; the encoder may have its own."
            )


def _dropout_token(tokenizer: PreTrainedTokenizerBase, rate: float) -> int:
    """The token that stands for one that the decoder does not see."""
    names = ("mask_token_id", "pad_token_id", "unk_token_id", "eos_token_id")
    found = [token for name in names if (token := getattr(tokenizer, name)) is not None]
    if not found and rate > 0:
        raise ValueError(
            f"`word_dropout={rate}`, but the tokenizer has no mask, padding, unknown or end-of-sequence token to put in the "
            "place of others. Set `tokenizer.pad_token`, or `word_dropout=0`."
        )
    return found[0] if found else 0


# ---------------------------------------------------------------- data


def _check_dataset(dataset: Any) -> None:
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"`dataset` is a {type(dataset).__name__}; expected a `datasets.Dataset`. Of a dictionary of splits, pass one; of "
            "a stream, take the rows to train on: `Dataset.from_list(list(stream.take(100_000)))`."
        )
    if {"chosen", "rejected"} <= set(dataset.column_names):
        check_preference_dataset(dataset, "dataset")
    else:
        check_sft_dataset(dataset, "dataset", every_row=False)
    if "prompt" not in dataset.column_names or not {"completion", "chosen"} & set(dataset.column_names):
        raise ValueError(
            f"`dataset` has the columns {sorted(dataset.column_names)}. Expected 'prompt' and 'completion', or 'prompt', "
            "'chosen' and 'rejected'. Of implicit prompts make a column with `dataset.map(trl.extract_prompt)`."
        )
    if len(dataset) < 2:
        raise ValueError("`dataset` has one row; expected at least two, one to train on and one for the check.")


def _columns(dataset_columns: Sequence[str], guide_data: str) -> list[str]:
    """Columns of the answers to train on."""
    if "chosen" not in dataset_columns or "rejected" not in dataset_columns:
        return ["completion"]
    return ["chosen", "rejected"] if guide_data == "both" else ["chosen"]


def _sample(row: Mapping[str, Any], column: str) -> Sample:
    return Sample(row["prompt"], row[column])


def _tokenize(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    encoder_tokenizer: PreTrainedTokenizerBase | None,
    args: GuideTrainingArguments,
) -> Dataset:
    """Return a row for each answer that has tokens; say how many have none, and how many were cut."""
    columns = _columns(dataset.column_names, args.guide_data)
    tokenizers = {"": tokenizer} if encoder_tokenizer is None else {"": tokenizer, "encoder_": encoder_tokenizer}
    ids = List(Value("int32"))
    features = {"row": Value("int64"), "column": Value("string"), "length": Value("int64"), "cut": List(Value("bool"))}
    features |= {f"{prefix}{part}_ids": ids for prefix in tokenizers for part in ("prompt", "answer")}
    tokenized = dataset.with_format(None).map(
        partial(versioned(_tokenize_rows), columns=columns, tokenizers=tokenizers, max_length=args.max_length),
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=Features(features),
        desc="Tokenizing",
    )
    empty = len(columns) * len(dataset) - len(tokenized)
    if not len(tokenized):
        raise ValueError(f"All {empty} answers are empty: nothing to train on. Check the columns {columns}.")
    if empty:
        warnings.warn(f"Dropped {empty} of {len(columns) * len(dataset)} answers: they are empty.")
    prompts, answers = (sum(cut) for cut in zip(*tokenized["cut"], strict=True))
    if prompts or answers:
        warnings.warn(
            f"At `max_length={args.max_length}`, {prompts} prompts (to their last {args.max_length // 2} tokens) and {answers} "
            f"answers of {len(tokenized)} samples were cut."
        )
    return tokenized.remove_columns("cut")


def _tokenize_rows(
    rows: dict[str, list[Any]],
    indices: list[int],
    columns: list[str],
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    max_length: int,
) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {"row": [], "column": [], "length": [], "cut": []}
    found |= {f"{prefix}{part}_ids": [] for prefix in tokenizers for part in ("prompt", "answer")}
    for place, index in enumerate(indices):
        for column in columns:
            sample = Sample(rows["prompt"][place], rows[column][place])
            try:
                whole = {prefix: whole_token_ids(sample, tokenizer) for prefix, tokenizer in tokenizers.items()}
            except Exception as error:
                raise ValueError(
                    f"`dataset`, row {index}: '{column}' cannot be tokenized ({type(error).__name__}: {error}). Mend or drop "
                    f"the row: {sample!s:.200}"
                ) from error
            tokens = {prefix: cut_tokens(parts, max_length) for prefix, parts in whole.items()}
            if not all(answer for _, answer in tokens.values()):
                continue
            found["row"].append(index)
            found["column"].append(column)
            found["length"].append(sum(len(prompt) + len(answer) for prompt, answer in tokens.values()))
            found["cut"].append([any(len(whole[p][i]) > len(tokens[p][i]) for p in tokens) for i in range(2)])
            for prefix, (prompt, answer) in tokens.items():
                found[f"{prefix}prompt_ids"].append(prompt)
                found[f"{prefix}answer_ids"].append(answer)
    return found


def _split(samples: Dataset, rows: int, args: GuideTrainingArguments) -> tuple[Dataset, Dataset]:
    """Hold out the answers of some rows, at random."""
    number = min(max(round(args.eval_fraction * rows), 8), rows // 2)
    held_rows = np.random.default_rng(args.seed).permutation(rows)[:number]
    held = np.isin(samples.with_format("numpy")["row"][:], held_rows)
    if held.all() or held.sum() < 2:
        raise ValueError(
            f"Of {len(samples)} answers {held.sum()} are held out for the check: there must be at least two, and some to train "
            "on. Give more rows, or change `eval_fraction`."
        )
    return samples.select(np.flatnonzero(~held)), samples.select(np.flatnonzero(held))


def _digest(samples: Dataset) -> str:
    """16 hex digits of all tokens."""
    digest = hashlib.sha256()
    names = [name for name in samples.column_names if name.endswith("_ids")]
    for table in samples.with_format("arrow").iter(1000):
        for name in names:
            for chunk in table.column(name).chunks:
                digest.update(chunk.value_lengths().to_numpy(zero_copy_only=False).tobytes())
                digest.update(chunk.flatten().to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()[:16]


class GuideCollator:
    """Makes batches of a [`GuideModel`]'s arguments, and of `completion_mask`: which tokens are those of the answers."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        encoder_tokenizer: PreTrainedTokenizerBase | None = None,
        reconstruct: str = "completion",
    ):
        self.pad_id = tokenizer.pad_token_id or 0
        self.encoder_pad_id = None if encoder_tokenizer is None else encoder_tokenizer.pad_token_id or 0
        self.reconstruct = reconstruct

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        ids, mask, answers = pad_tokens([(row["prompt_ids"], row["answer_ids"]) for row in rows], self.pad_id)
        batch = {
            "input_ids": ids,
            "labels": ids.masked_fill(~(answers if self.reconstruct == "completion" else mask), -100),
            "completion_mask": answers,
        }
        if self.encoder_pad_id is not None:
            pairs = [(row["encoder_prompt_ids"], row["encoder_answer_ids"]) for row in rows]
            ids, mask, answers = pad_tokens(pairs, self.encoder_pad_id)
        return batch | {
            "encoder_input_ids": ids, "encoder_attention_mask": mask, "encoder_pooling_mask": answers,
        }  # fmt: skip


# ---------------------------------------------------------------- the trainer


class GuideTrainer(SaveWithoutArguments, Trainer):
    """Trainer of a [`GuideModel`]: the loss of reconstruction, two learning rates, word dropout.

    Takes the arguments of [`~transformers.Trainer`], and `replacement`, the token id that stands for dropped ones.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, model: GuideModel, args: GuideTrainingArguments, *, replacement: int, **options: Any):
        super().__init__(model, args, **options)
        self.replacement = replacement
        self._sums: dict[str, torch.Tensor] = {}

    def _set_signature_columns_if_needed(self) -> None:
        parts = ("prompt_ids", "answer_ids")
        self._signature_columns = [*parts, *(f"encoder_{part}" for part in parts), self.args.length_column_name]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As in transformers, with a learning rate for the encoder and one for the decoder."""
        if self.optimizer is None:
            optimizer = super().create_optimizer(model)
            guide = self.accelerator.unwrap_model(self.model)
            encoder = {id(p) for part in (guide.encoder, guide.latent_head) for p in part.parameters()}
            groups = []
            for of_encoder, rate in (
                (True, self.args.encoder_learning_rate),
                (False, self.args.decoder_learning_rate),
            ):
                for group in optimizer.param_groups:
                    members = [p for p in group["params"] if (id(p) in encoder) == of_encoder]
                    if members:
                        groups.append({**group, "params": members, "lr": rate})
            optimizer.param_groups[:] = groups
        return self.optimizer

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """As in transformers, but counts samples: the loss of a step is the mean over them, however they are split."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        number = torch.tensor(sum(len(batch["input_ids"]) for batch in batches), device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            number = self.accelerator.gather(number).sum()
        return batches, number

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Mean over samples of their reconstruction loss, and of the weighted KL divergence if variational."""
        args, inputs = self.args, dict(inputs)
        completion_mask = inputs.pop("completion_mask")
        if self.model.training and args.word_dropout > 0:
            inputs["input_ids"] = apply_word_dropout(
                inputs["input_ids"], completion_mask, args.word_dropout, self.replacement
            )
        outputs = model(**inputs)
        losses = outputs.nll.float()
        recorded = [losses]
        if outputs.log_var is not None:
            mean, log_var = outputs.mean.float(), outputs.log_var.float()
            recorded.append(gaussian_kl(mean, log_var))
            if args.kl_weight > 0:
                losses = losses + self._kl_weight() * gaussian_kl(mean, log_var, args.free_bits)
        self._record(recorded)
        if num_items_in_batch is None:
            loss = losses.mean()
        else:
            loss = losses.sum() / num_items_in_batch
            if args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes  # DDP averages the processes
        return (loss, outputs) if return_outputs else loss

    def _kl_weight(self) -> float:
        """The weight at this step."""
        warmup = self.args.kl_warmup_ratio * self.state.max_steps
        return self.args.kl_weight * (min(self.state.global_step / warmup, 1.0) if warmup > 0 else 1.0)

    def _record(self, values: list[torch.Tensor]) -> None:
        """Add losses of samples to what the next log reports."""
        mode = "" if self.model.training else "eval_"
        sums = torch.stack([*(value.detach().sum() for value in values), torch.ones_like(values[0]).sum()])
        self._sums[mode] = self._sums[mode] + sums if mode in self._sums else sums

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in transformers, with `guide/nll` and `guide/kl` since the last log, exact over processes."""
        mode = "" if self.model.training else "eval_"
        if mode in self._sums:
            *totals, number = self.accelerator.gather(self._sums.pop(mode)[None]).sum(0).tolist()
            names = (f"{mode}guide/nll", f"{mode}guide/kl")
            logs |= {name: total / number for name, total in zip(names, totals, strict=False)}
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save what is trained, without the pickled arguments; `train_guide` saves the guide itself."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        guide = self.accelerator.unwrap_model(self.model)
        trained = {name: p.detach().contiguous() for name, p in guide.named_parameters() if p.requires_grad}
        save_file(trained, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        guide = self.accelerator.unwrap_model(self.model if model is None else model)
        stored = load_file(Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME)
        trained = {name: p for name, p in guide.named_parameters() if p.requires_grad}
        if stored.keys() != trained.keys():
            raise ValueError(
                f"The checkpoint `{resume_from_checkpoint}` holds other weights than are trained: "
                f"{sorted(stored.keys() ^ trained.keys())[:3]}. Delete it, or choose another `output_dir`."
            )
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(stored[name])


# ---------------------------------------------------------------- the command line


@dataclass
class GuideScriptArguments:
    """
    Models and data of `trl-ift guide`.

    Parameters:
        encoder (`str`):
            Hub id or folder of the encoder.
        decoder (`str`, *optional*):
            Hub id or folder of the decoder; that of the encoder by default.
        dataset_name (`str`):
            File, folder or Hub id of the dataset.
        dataset_config (`str`, *optional*):
            Configuration of a dataset on the Hub.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Split of the dataset.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Dtype of the weights.
    """

    encoder: str = field(metadata={"help": "Hub id or folder of the encoder."})
    dataset_name: str = field(metadata={"help": "File, folder or Hub id of the dataset."})
    decoder: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the decoder; that of the encoder by default."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Dtype of the weights.", "choices": ["auto", "bfloat16", "float16", "float32"]},
    )


def make_parser() -> TrlParser:
    """Return the parser of `trl-ift guide`."""
    parser = TrlParser(
        (GuideScriptArguments, GuideTrainingArguments),
        prog=PROG,
        usage=f"{PROG} --encoder ID [--decoder ID] --dataset_name NAME --output_dir DIR [--config FILE] [options]",
        description="Train the guiding model of LD-Align: an encoder of answers into codes, whose distances weigh pairs, and a "
        "decoder that rebuilds them. Confirmed by the paper: a latent space learnt by reconstruction; the architecture and all "
        "defaults are our choices. Data: prompt-completion, or preference (chosen: real, rejected: generated). An "
        "interrupted run goes on when the same command is given again. Paper: https://huggingface.co/papers/2404.06390",
        epilog=f"Options beside those of transformers.TrainingArguments: {', '.join(f'--{name}' for name in _own_options())}.",
        allow_abbrev=False,
    )
    parser.error = partial(usage_error, PROG)
    return parser


def _parse(argv: Sequence[str]) -> tuple[GuideScriptArguments, GuideTrainingArguments]:
    argv = [part for token in argv for part in (token.split("=", 1) if token.startswith("--config=") else [token])]
    script_args, args = parse_options(make_parser(), argv, PROG, launched=False)
    return script_args, args


def main(argv: list[str]) -> int:
    """Run `trl-ift guide` and return its exit code."""
    try:
        script_args, args = _parse(argv)
        dataset = load_split(script_args.dataset_name, script_args.dataset_split, script_args.dataset_config)
        train_guide(
            script_args.encoder,
            script_args.decoder or script_args.encoder,
            dataset,
            args,
            model_init_kwargs={"dtype": script_args.dtype},
        )
    except KeyboardInterrupt:
        if is_main_process():
            print("\nInterrupted. To go on from the last checkpoint, run the same command again.", file=sys.stderr)
        return 130
    except INPUT_ERRORS as error:
        return report_error(PROG, error)
    say(summary(args.output_dir))
    return 0


def summary(folder: str | os.PathLike) -> str:
    """What the check of a trained guide found, in a few lines."""
    check = json.loads((Path(folder) / RESULT_FILE).read_text(encoding="utf-8"))["check"]
    verdict = "NOT used: distances would be noise" if check["collapsed"] else "used"
    return (
        f"Reconstruction of {check['samples']} held-out answers, nats a token: {check['nll']:.4f} from their codes, "
        f"{check['nll_permuted']:.4f} from those of other answers ({check['gap']:+.1%}), {check['nll_zero']:.4f} from zeros.\n"
        f"The codes are {verdict}.\nWritten to {folder}."
    )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
