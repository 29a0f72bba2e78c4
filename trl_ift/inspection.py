"""What a training would do, before it costs anything: its rows as the model sees them, its first loss, its memory.

[`inspect_training`] builds the trainer that would train, looks at its data, and measures the loss of its first micro-batch,
without a step. `trl-ift check` prints what it returns.
"""

import copy
import logging
import math
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice, takewhile
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, SchedulerType, set_seed
from transformers.trainer_utils import IntervalStrategy
from trl import RewardTrainer, SFTTrainer

from .data.inference import load_tokenizer
from .data.rows import first_row
from .memory import (
    UNKNOWN_SHAPE,
    Batch,
    MemoryEstimate,
    checkpoint_bytes,
    decide_checkpointing,
    estimate_memory,
    estimate_resident,
    has_pair_mask,
    savings,
)
from .reference import REFERENCE_TOLERANCE, ReferenceTrainer
from .sequences import Sequence, rendered, responses_of, sequences_of
from .trl_internals import FusedCausalLMOutput, forget_fused_head, without_weight_hashes


# Rows of a stream that are looked at
STREAM_ROWS = 1000
# Schedules that transformers builds without a warm-up
_WITHOUT_WARMUP = (SchedulerType.CONSTANT, SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
_QUANTILES = {"min": 0.0, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "max": 1.0}


@dataclass
class Inspection:
    """What [`inspect_training`] found; all values are plain ones.

    Attributes:
        method: Name of the method in the registry.
        rows: The first rows. Each is a list of responses with `name`, `tokens`, `trained` and `cut` (numbers of tokens), and
            `segments`, pairs of a kind (`"context"`, `"trained"`, `"cut"`) and its text.
        data: Rows, lengths, truncation, padding and duplicates.
        reference: What the policy is compared with, and what it costs.
        loss: The loss of the first micro-batch (`measured`), and its known value (`known`) or why there is none (`reason`).
        memory: The estimate in bytes, part by part, and what would lower it.
        plan: Steps, epochs, tokens, checkpoints.
        warnings: What the trainer warned of.
        errors: What is wrong; empty for a training that can start.
    """

    method: str
    rows: list[list[dict[str, Any]]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    reference: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The inspection as JSON can hold it."""
        return asdict(self)


def inspect_training(trainer_class: Any, *, rows: int = 3, load_model: bool = True, **arguments: Any) -> Inspection:
    """Say what a training would do, without a step of it.

    Nothing is written into `output_dir`, pushed, or scored beforehand: a reference that the training precomputes runs here on
    the first micro-batch alone. A model that is passed in memory is copied and stays as it is.

    Args:
        trainer_class: Trainer of a method, e.g. [`DPOPTrainer`].
        rows: Number of rows to show.
        load_model: Whether the model is loaded. Without it there is no first loss; its config and tokenizer are needed still.
        **arguments: Those of the trainer, as for a training: `model`, `args`, `train_dataset`, ...

    Returns:
        [`Inspection`]: With `errors` if the training would start wrong.

    Raises:
        ValueError, TypeError, ImportError, OSError: What the constructor of the trainer raises for bad input.
    """
    arguments = dict(arguments)
    given: Any = arguments.get("train_dataset")
    quantization, wanted = arguments.get("quantization_config"), arguments["args"]
    named_references = bool(getattr(wanted, "ref_models", None)) and isinstance(given, Dataset)
    if named_references:  # which score every row that the trainer gets
        number = max(rows, wanted.per_device_train_batch_size)
        arguments["train_dataset"] = given.select(range(min(number, len(given))))
        arguments["eval_dataset"] = None
    with tempfile.TemporaryDirectory() as folder, _captured_warnings() as warnings:
        arguments["args"] = _without_traces(wanted, folder)
        if named_references:
            arguments["args"] = without_evaluation(arguments["args"])
        if not load_model:
            arguments |= _skeleton(trainer_class, arguments)
        elif isinstance(arguments["model"], torch.nn.Module):
            arguments["model"] = copy.deepcopy(arguments["model"])
            for module in arguments["model"].modules():
                forget_fused_head(module)
        set_seed(wanted.seed)
        try:
            with without_weight_hashes():
                trainer = _dry(trainer_class, load_model)(**arguments)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"The model does not fit into the memory: {error} Check without its weights (`load_model=False`, in the "
                "command `--no_model`) for an estimate of what it needs."
            ) from error
        found = Inspection(trainer.method)
        found.reference = _reference(trainer, arguments)
        full = _untruncated(trainer)
        found.rows = _shown(trainer, full, rows)
        found.data, largest, first = _data(trainer, full, given)
        if trainer.args.world_size > 1:
            found.data["note"] = "the figures of tokens and batches are of the rows of the first process"
        found.data["partial"] = named_references
        if named_references:
            found.data["note"] = (
                f"the first {len(full)} rows alone: those of `ref_models` score each row before training"
            )
        reference_copy = found.reference["kind"] == "copy of the model" or arguments.get("ref_model") is not None
        found.plan, found.memory = _costs(
            trainer, found.data, largest, reference_copy, quantization, load_model, len(full), given
        )
        if load_model:
            try:
                found.loss = _first_loss(trainer, first, found.errors)
            except torch.OutOfMemoryError as error:
                reason = "the first micro-batch does not fit into the memory"
                found.loss = {"measured": None, "known": None, "reason": reason}
                found.errors.append(f"Out of memory at the first micro-batch: {error}")
        else:
            found.loss = {"measured": None, "known": None, "reason": "the model was not loaded"}
        _check_positions(found)
    found.warnings = list(dict.fromkeys(warnings))
    found.data["dropped"] = _dropped(found)
    return found


# ---------------------------------------------------------------- the trainer, without its costs


def _without_traces(args: Any, folder: str) -> Any:
    """A copy of a config that writes into a temporary folder only, and pushes nothing."""
    args = copy.copy(args)
    args.output_dir, args.push_to_hub, args.report_to = folder, False, []
    return args


def without_evaluation(args: Any) -> Any:
    """A copy of a config that evaluates nothing, for a trainer without an evaluation dataset."""
    args = copy.copy(args)
    args.eval_strategy, args.eval_on_start = IntervalStrategy.NO, False
    return args


def _dry(trainer_class: Any, load_model: bool) -> Any:
    """The trainer class, but that it scores nothing before the training; it remembers the data that it was given."""

    def prepare(self, dataset, processing_class, args, *rest):
        if rest[-1] == "train":
            self.given_dataset = dataset
        return trainer_class._prepare_dataset(self, dataset, processing_class, args, *rest)

    changes: dict[str, Any] = {
        "_prepare_dataset": prepare,
        "_precompute_ref_logps": lambda self, dataset, name, batch_size: dataset,
    }
    if not load_model:
        changes["_check_policy"] = lambda self: None  # of MPO: it compares weights
    return type(trainer_class.__name__, (trainer_class,), changes)


def _skeleton(trainer_class: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments `model` and `processing_class` of a trainer whose model has shapes and no weights."""
    model, args = arguments["model"], arguments["args"]
    if not isinstance(model, str):
        raise ValueError(
            f"`load_model=False` needs a model that is named by a string; `model` is a {type(model).__name__}."
        )
    options = dict(args.model_init_kwargs or {})
    tokenizer = load_tokenizer(model, arguments.get("processing_class"), options)
    known = {name: options[name] for name in ("revision", "trust_remote_code") if options.get(name)}
    config = AutoConfig.from_pretrained(model, **known)
    dtype = options.get("dtype") or "float32"  # TRL's default
    dtype = getattr(config, "dtype", None) or torch.float32 if dtype == "auto" else dtype
    auto = AutoModelForCausalLM
    if issubclass(trainer_class, RewardTrainer):
        auto, config.num_labels = AutoModelForSequenceClassification, 1
    attention = {"attn_implementation": value} if (value := options.get("attn_implementation")) else {}
    with init_empty_weights(include_buffers=True):
        skeleton = auto.from_config(
            config, dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype, **attention
        )
    skeleton.config._name_or_path = ""  # nothing is read from there
    skeleton.hf_device_map = {"": "meta", "nothing": "cpu"}  # so that the trainer and accelerate leave it where it is
    args.model_init_kwargs = None
    return {"model": skeleton, "processing_class": tokenizer, "quantization_config": None}


@contextmanager
def _captured_warnings() -> Iterator[list[str]]:
    """The warnings of this library, of TRL and of transformers meanwhile, which are not printed."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Keep(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("trl_ift", "trl", "transformers")]
    saved = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    try:
        yield messages
    finally:
        for logger, (handlers, propagate) in zip(loggers, saved, strict=True):
            logger.handlers, logger.propagate = handlers, propagate


# ---------------------------------------------------------------- rows


def _untruncated(trainer: Any) -> list[dict[str, Any]] | Dataset:
    """The prepared rows with all their tokens; the first ones of a stream."""
    dataset = trainer.train_dataset
    if _skips_preparation(trainer):
        if "input_ids" not in first_row(dataset):
            raise ValueError(
                "`skip_prepare_dataset=True`: the rows have no 'input_ids', so that what a collator of your own makes of them "
                "cannot be shown. Tokenize them, or drop the option for the check."
            )
    elif isinstance(trainer, SFTTrainer):  # which cuts its rows when it prepares them
        args = copy.copy(trainer.args)
        args.max_length = None
        given = trainer.given_dataset
        given = given if isinstance(given, Dataset) else given.take(STREAM_ROWS)
        # Under another name, by which the given data are not remembered anew
        dataset = trainer._prepare_dataset(
            given, trainer.processing_class, args, False, trainer._formatting_func, "whole train"
        )
    return dataset.with_format(None) if isinstance(dataset, Dataset) else list(islice(dataset, STREAM_ROWS))


def _skips_preparation(trainer: Any) -> bool:
    """Whether an SFT trainer takes its rows as they are."""
    return bool((getattr(trainer.args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset"))


def _columns(trainer: Any) -> tuple[Any, ...]:
    # Of FIGA: with a weight of the other tokens, those that were kept are trained too
    return () if getattr(trainer.args, "other_weight", 0) else getattr(trainer, "columns", ())


def _shown(trainer: Any, full: Any, number: int) -> list[list[dict[str, Any]]]:
    """The first rows, decoded, with what is trained and what truncation cuts."""
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    shown = []
    for row in islice(full, number):
        whole = responses_of(row)
        if isinstance(trainer, SFTTrainer):
            window = _window(trainer)
            names = [name for name in ("input_ids", "labels", "completion_mask", "assistant_masks") if name in row]
            row = {name: row[name][window] for name in names}
            if trainer.args.packing or trainer.args.padding_free:
                row["seq_lengths"] = [len(row["input_ids"])]
        (sequences,) = sequences_of(trainer.data_collator([row]), _columns(trainer))
        shown.append([rendered(sequence, whole, tokenizer) for sequence in sequences])
    return shown


def _limit(trainer: Any) -> int | None:
    """Number of tokens behind which a row is cut. Packing cuts with its strategy `"bfd"` only, the others lose no token."""
    args = trainer.args
    packed = getattr(args, "packing", False) and args.packing_strategy != "bfd"
    return None if packed or _skips_preparation(trainer) else getattr(args, "max_length", None)


def _window(trainer: Any) -> slice:
    args, limit = trainer.args, _limit(trainer)
    if limit is None:
        return slice(None)
    kept_end = getattr(args, "truncation_mode", "keep_start") == "keep_end" and not args.packing
    return slice(-limit, None) if kept_end else slice(None, limit)


# ---------------------------------------------------------------- data


def _data(trainer: Any, full: Any, given: Any) -> tuple[dict[str, Any], Batch, Any]:
    """Figures of the training data, the largest micro-batch, and the first one. The batches are those of the first epoch."""
    limit = _limit(trainer)
    truncated, seen = 0, set()
    for row in full:
        whole = responses_of(row)
        truncated += limit is not None and any(len(ids) > limit for ids in whole.values())
        seen.add(hash(tuple(next(iter(whole.values())))))
    set_seed(trainer.args.seed)
    first, largest, lengths, tokens, places, trained, rows, batches = None, Batch(0, 0, 0), [], 0, 0, 0, 0, 0
    for batch in trainer.get_train_dataloader():
        first = batch if first is None else first
        examples = sequences_of(dict(batch), _columns(trainer))
        sequences = [s for example in examples for s in example]
        rows, batches = rows + len(examples), batches + 1
        own = [len(s.ids) for s in sequences]
        together = [value for name, value in batch.items() if name.endswith("input_ids")]  # in one forward pass
        height, width = sum(map(len, together)), max(value.size(1) for value in together)
        labelled = sum(sum(s.trained) for s in sequences)
        lengths += own
        tokens, places, trained = tokens + sum(own), places + height * width, trained + labelled
        if height * width > largest.rows * largest.length:
            largest = Batch(height, width, labelled, _mask_places(trainer, examples))
        if not isinstance(full, Dataset) and rows >= STREAM_ROWS:
            break
    quantiles = {name: round(float(np.quantile(lengths, q))) for name, q in _QUANTILES.items()}
    evaluated = trainer.eval_dataset
    parts = evaluated.values() if isinstance(evaluated, dict) else [evaluated]
    found = {
        "eval_rows": sum(len(part) for part in parts if isinstance(part, Dataset)),
        "rows": len(given) if isinstance(given, Dataset) else None,
        "kept": _kept(trainer, full),
        "looked_at": len(full),
        "truncated": truncated / max(len(full), 1),
        "lengths": quantiles,
        "responses": len(lengths),
        "batches": batches,
        "tokens": tokens,
        "trained_tokens": trained,
        "padding": 1 - tokens / max(places, 1),
        "largest_batch": asdict(largest),
        "duplicates": len(full) - len(seen),
    }
    return found, largest, first


def _kept(trainer: Any, full: Any) -> int | None:
    """Number of rows that are trained on; `None` for a stream."""
    if not isinstance(full, Dataset):
        return None
    # SFT drops the rows of which truncation leaves nothing to train
    return len(full) if getattr(trainer.args, "packing", False) else len(trainer.train_dataset)


def _mask_places(trainer: Any, examples: list[list[Sequence]]) -> int:
    """Places of the mask of a batch whose pairs share their prompts."""
    if not has_pair_mask(trainer.model, trainer.args):
        return 0
    longest = 0
    for example in examples:
        places = zip(*(zip(sequence.ids, sequence.trained, strict=True) for sequence in example), strict=False)
        prompt = sum(1 for _ in takewhile(lambda each: len(set(each)) == 1 and not each[0][1], places))
        shared = max(prompt - 1, 0)  # its last token stands before each response
        longest = max(longest, sum(len(sequence.ids) - shared for sequence in example) + shared)
    return len(examples) * longest**2


def _dropped(found: Inspection) -> dict[str, Any]:
    """How many rows are not trained on, and what the trainer says of them."""
    why = [message for message in found.warnings if re.match(r"Dropped \d+ of \d+ ", message)]
    of_training = [message for message in why if " the train dataset" in message]
    number = sum(int(re.findall(r"\d+", message)[0]) for message in of_training)
    rows, kept = found.data["rows"], found.data["kept"]
    if not of_training and None not in (rows, kept) and not found.data["partial"] and kept < rows:
        number, why = rows - kept, [*why, "without a token to train on after truncation"]
    return {"number": number, "why": why}


# ---------------------------------------------------------------- reference, loss


def _reference(trainer: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """What the loss compares the policy with."""
    adapted = is_peft_model(trainer.model)
    if not isinstance(trainer, ReferenceTrainer) or not trainer.uses_reference:
        return {"kind": "none", "cost": "no memory"}
    if trainer._stored_reference:
        return {"kind": "stored columns", "cost": "no memory"}
    if arguments.get("ref_model") is not None:
        return {"kind": "the model that was passed", "cost": "its weights beside the policy's"}
    if trainer.precompute_ref_logps:
        start = "the model without its adapter" if adapted and "ref" not in trainer.model.peft_config else "the model"
        return {
            "kind": f"precomputed with {start} as it is",
            "cost": "no memory; one pass over the data before training",
        }
    if adapted and "ref" in trainer.model.peft_config:
        return {
            "kind": "copy of the adapter",
            "cost": "a second adapter; its pass takes the policy's memory for a while",
        }
    if adapted:
        return {"kind": "the model, its adapter switched off", "cost": "no memory of its own"}
    return {"kind": "copy of the model", "cost": "the weights once more"}


def _first_loss(trainer: Any, batch: Any, errors: list[str]) -> dict[str, Any]:
    """The loss of a micro-batch before the first step, beside the value that an untouched reference gives it."""
    unscored = isinstance(trainer, ReferenceTrainer) and trainer.precompute_ref_logps and trainer.ref_model is None
    if unscored and (not is_peft_model(trainer.model) or trainer._reference_is_gone):
        trainer.ref_model = trainer.model  # no adapter can be switched off: the start is the policy itself
    if trainer.args.gradient_checkpointing:
        enable = getattr(trainer.model, "activation_checkpointing_enable", trainer.model.gradient_checkpointing_enable)
        enable(trainer.args.gradient_checkpointing_kwargs)
    trainer.model.train()
    model = trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True)
    refused = False
    try:
        measured = _loss(trainer, model, batch)
    except ValueError as error:  # of the trainer's own check of the first step, which it makes once
        errors.append(str(error))
        measured, refused = _loss(trainer, model, batch), True
    known = _known_loss(trainer, model, batch)
    result = {"measured": measured, "known": known, "reason": None if known is not None else _why_unknown(trainer)}
    tolerance = _tolerance(trainer) * max(1.0, abs(known or 0.0))
    if not math.isfinite(measured):
        errors.append(f"The loss of the first micro-batch is {measured}. Check the model, its dtype and the data.")
    elif known is not None and not refused and abs(measured - known) > tolerance:
        if abs(_loss(trainer, model, batch, trainer.args.seed + 1) - measured) > tolerance / 10:
            result["reason"] = "dropout is on, so that the loss differs from one pass to the next"
        else:
            errors.append(
                f"The loss of the first micro-batch is {measured:.5g}, and with a reference that is the model as it starts it "
                f"is {known:.5g}: the reference is another model, or the model changes between two passes."
            )
    return result


def _tolerance(trainer: Any) -> float:
    half = trainer.args.bf16 or trainer.args.fp16
    return REFERENCE_TOLERANCE.get(torch.bfloat16 if half else trainer.model.dtype, 0.05)


def _loss(trainer: Any, model: Any, batch: Any, seed: int | None = None) -> float:
    """The loss of a micro-batch as the first one of an optimizer step of its own, without a step."""
    set_seed(trainer.args.seed if seed is None else seed)
    trainer.current_gradient_accumulation_steps = 1
    (batch,), number = trainer.get_batch_samples(iter([dict(batch)]), 1, trainer.args.device)
    inputs = trainer._prepare_inputs(batch)
    # With gradients: methods tell the pass of the policy from that of the reference by them
    loss = trainer.compute_loss(model, inputs, num_items_in_batch=number)
    return float(loss.detach())


def _known_loss(trainer: Any, model: Any, batch: Any) -> float | None:
    """The loss where policy and reference agree on every token, if it does not depend on what they agree on.

    Both get made-up log-probabilities, twice: a loss of the log-ratios alone is the same for both.
    """
    if not isinstance(trainer, ReferenceTrainer) or not trainer._reference_is_start:
        return None
    values = []
    for seed in (0, 1):
        with _made_up_log_probs(trainer, seed) as calls:
            values.append(_loss(trainer, model, batch))
    same = abs(values[0] - values[1]) <= 1e-5 * max(1.0, abs(values[0]))
    return values[0] if calls and same else None


def _why_unknown(trainer: Any) -> str:
    if isinstance(trainer, ReferenceTrainer) and trainer.uses_reference and not trainer._reference_is_start:
        return "the reference is not the model as it starts"
    return "the loss depends on how likely the responses are, not on the reference alone"


@contextmanager
def _made_up_log_probs(trainer: Any, seed: int) -> Iterator[list[int]]:
    """Let policy and reference give out the same made-up log-probabilities; yields a list that is filled with the calls."""
    calls: list[int] = []

    def replace(module: Any, inputs: Any, output: Any) -> Any:
        if not isinstance(output, FusedCausalLMOutput):
            return None
        calls.append(1)
        # Numbers of a row and position, whatever the shape: the reference may see fewer rows, and narrower ones
        rows, places = (torch.arange(size, device=output.log_probs.device) for size in output.log_probs.shape)
        made_up = -3 * torch.sin(seed + 7.3 * rows[:, None] + 1.7 * places) ** 2
        return FusedCausalLMOutput(**{**output, "log_probs": made_up * output.label_mask})

    models = {id(model): model for model in (trainer.model, trainer.ref_model) if model is not None}
    handles = [model.register_forward_hook(replace) for model in models.values()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


# ---------------------------------------------------------------- costs


def _costs(
    trainer: Any, data: dict[str, Any], largest: Batch, copied: bool, quantization: Any, loaded: bool, looked_at: int,
    given: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    args, model = trainer.args, trainer.model
    bits = next((b for b in (4, 8) if getattr(quantization, f"load_in_{b}bit", False)), None)
    bits = None if loaded else bits
    try:
        estimate, unknown = estimate_memory(model, args, largest, copied, bits), None
    except UNKNOWN_SHAPE as error:
        estimate, unknown = estimate_resident(model, args, copied, bits), str(error)
    loader = trainer.get_train_dataloader()
    _, steps_per_epoch, _, _, batch_size, _, max_steps = trainer.set_initial_training_values(args, loader)
    if data["partial"]:  # the trainer has a part of the rows
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        steps_per_epoch = math.ceil(len(given) / per_step)
        max_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    stream = not isinstance(trainer.train_dataset, Dataset)
    if stream:
        micro_batches = max_steps * args.gradient_accumulation_steps * args.world_size
        tokens = data["tokens"] / max(data["batches"], 1) * micro_batches
    elif data["partial"]:
        tokens = data["tokens"] / max(looked_at, 1) * batch_size * max_steps
    else:
        tokens = data["tokens"] * args.world_size * max_steps / steps_per_epoch
    plan = {
        "steps": max_steps,
        "epochs": None if stream else round(max_steps / steps_per_epoch, 4),
        "warmup_steps": 0 if args.lr_scheduler_type in _WITHOUT_WARMUP else args.get_warmup_steps(max_steps),
        "batch_size": batch_size,
        "processes": args.world_size,
        "positions": getattr(model.config.get_text_config(), "max_position_embeddings", None),
        "tokens": round(tokens),
        "checkpoint_bytes": checkpoint_bytes(model, args, estimate),
        "checkpoints": _checkpoints(args, max_steps, steps_per_epoch),
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    memory = {
        "parts": estimate.parts(),
        "total": estimate.total,
        "available": _available(args.device),
        "unknown": unknown,
        "would_save": [],
        "without_checkpointing": None,
    }
    if unknown is None:
        memory["would_save"] = [list(pair) for pair in savings(model, args, largest, copied, estimate, bits)]
        memory["without_checkpointing"] = _without_checkpointing(trainer, largest, estimate, loaded)
    return plan, memory


def _without_checkpointing(
    trainer: Any, largest: Batch, estimate: MemoryEstimate, loaded: bool
) -> dict[str, Any] | None:
    """The estimate for activations that are kept, and whether a training command would keep them; `None` if they are kept."""
    if not trainer.args.gradient_checkpointing:
        return None
    kept = copy.copy(trainer.args)
    kept.gradient_checkpointing = False
    activations = estimate_memory(trainer.model, kept, largest).activations
    fits, _ = decide_checkpointing(trainer, coming=0 if loaded else estimate.weights)
    return {"total": estimate.total - estimate.activations + activations, "fits": fits}


def _checkpoints(args: Any, steps: int, steps_per_epoch: int) -> int:
    """How many checkpoints stay in `output_dir`."""
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy == "steps":
        every = args.save_steps if args.save_steps >= 1 else math.ceil(steps * args.save_steps)
        number = math.ceil(steps / every)  # the last step is saved too
    else:
        number = {"no": 0, "epoch": math.ceil(steps / steps_per_epoch)}.get(strategy, 1)
    limit = args.save_total_limit
    if limit is None or limit <= 0:
        return number
    # The best one stays beside the last one
    return min(number, max(limit, 2) if args.metric_for_best_model is not None else limit)


def _available(device: torch.device) -> int | None:
    """Bytes of memory of a device; of the machine for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu":
        return None
    import psutil

    return psutil.virtual_memory().total


def _check_positions(found: Inspection) -> None:
    """Note sequences that are longer than the positions of the model."""
    positions, longest = found.plan["positions"], found.data["lengths"]["max"]
    if positions is not None and longest > positions:
        found.errors.append(
            f"A sequence has {longest} tokens, and the model {positions} positions. Set `max_length={positions}` or less."
        )
