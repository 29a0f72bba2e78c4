"""The only module that touches private or unstable names of TRL.

Everything here is checked against the installed TRL by `check_trl`, which runs on import, and by the contract tests: when a
TRL release moves one of these names, this is the one file to mend.
"""

import dataclasses
import functools
import inspect
import os
import textwrap
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import trl
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from packaging.version import Version
from torch.distributed.tensor import DTensor
from transformers import Trainer
from trl import DPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer, get_training_chat_template
from trl.chat_template_utils import has_generation_markers
from trl.cli.accelerate_config import resolve_accelerate_config_argument
from trl.data_utils import _tokenize as tokenize
from trl.data_utils import common_prefix_length
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.scripts.env import print_env
from trl.trainer import dpo_trainer, kto_trainer, sft_trainer
from trl.trainer import utils as trl_utils
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference
from trl.trainer.reward_trainer import DataCollatorForPreference as DataCollatorForReward
from trl.trainer.utils import (
    FusedCausalLMOutput,
    add_fused_lm_head,
    create_model_from_path,
    disable_dropout_in_model,
    get_comet_experiment_url,
    get_config_model_id,
    get_trackio_space_url,
    global_then_local_main_first,
    maybe_gather_lm_head_ctx,
    pad,
)


__all__ = [
    "TRL_PAIR_LOSSES",
    "DataCollatorForPreference",
    "DataCollatorForReward",
    "DataCollatorForUnpairedPreference",
    "FusedCausalLMOutput",
    "FusedTap",
    "LMHead",
    "NoReference",
    "add_fused_lm_head",
    "check_trl",
    "common_prefix_length",
    "create_model_from_path",
    "disable_dropout_in_model",
    "dpo_compute_loss",
    "dpo_construction",
    "forget_fused_head",
    "get_comet_experiment_url",
    "get_config_model_id",
    "get_trackio_space_url",
    "global_then_local_main_first",
    "keep_4bit_trainable_on_cpu",
    "kto_construction",
    "pad",
    "preparation_options",
    "prepare_sft_rows",
    "print_env",
    "resolve_accelerate_config_argument",
    "score_labelled_positions_only",
    "share_cache_folder",
    "take_no_step",
    "tokenize",
    "without_weight_hashes",
]

# Minor releases the test suite was run against
TESTED_TRL = ("1.16",)

_EXPECTED_PARAMETERS: dict[Callable, tuple[str, ...]] = {
    SFTTrainer._prepare_dataset: (
        "self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name",
    ),
    SFTTrainer._set_signature_columns_if_needed: ("self",),
    SFTTrainer.compute_loss: ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
    DPOTrainer._prepare_dataset: ("self", "dataset", "processing_class", "args", "dataset_name"),
    DPOTrainer._compute_loss: ("self", "model", "inputs", "return_outputs"),
    DPOTrainer.compute_ref_log_probs: ("self", "model", "inputs"),
    DPOTrainer._precompute_ref_logps: ("self", "dataset", "name", "batch_size"),
    DPOTrainer._set_signature_columns_if_needed: ("self",),
    KTOTrainer._prepare_dataset: ("self", "dataset", "processing_class", "args", "dataset_name"),
    KTOTrainer._compute_loss: ("self", "model", "inputs", "return_outputs"),
    KTOTrainer.compute_ref_log_probs: ("self", "model", "inputs"),
    KTOTrainer._precompute_ref_logps: ("self", "dataset", "name", "batch_size"),
    KTOTrainer._set_signature_columns_if_needed: ("self",),
    DataCollatorForUnpairedPreference.torch_call: ("self", "examples"),
    RewardTrainer._prepare_dataset: ("self", "dataset", "processing_class", "args", "dataset_name"),
    RewardTrainer._set_signature_columns_if_needed: ("self",),
    RewardTrainer.compute_loss: ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
    add_fused_lm_head: ("model", "temperature", "cast_lm_head_to_fp32", "outputs"),
    create_model_from_path: ("model_id", "architecture", "kwargs"),
    tokenize: ("processing_class", "input", "apply_chat_template_kwargs"),
    DataCollatorForPreference.torch_call: ("self", "examples"),
    DataCollatorForReward.torch_call: ("self", "examples"),
    ChunkedLogProbFunction.forward: (
        "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
        "logit_scale", "outputs",
    ),
}  # fmt: skip
_EXPECTED_OUTPUT_FIELDS = {
    "loss", "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask", "aux_loss",
}  # fmt: skip


def check_trl(
    version: str = trl.__version__,
    expected_parameters: dict[Callable, tuple[str, ...]] | None = None,
) -> None:
    """Compare the installed TRL with what this package builds on.

    Warns once for a minor release that was not tested; raises `ImportError` when a signature or a field that the trainers
    rely on has changed.
    """
    mismatches = []
    for function, expected in (expected_parameters or _EXPECTED_PARAMETERS).items():
        found = tuple(inspect.signature(function).parameters)
        if found != expected:
            mismatches.append(f"{function.__qualname__}({', '.join(found)}), expected ({', '.join(expected)})")
    fields = {field.name for field in dataclasses.fields(FusedCausalLMOutput)}
    if not fields >= _EXPECTED_OUTPUT_FIELDS:
        mismatches.append(f"FusedCausalLMOutput lacks {sorted(_EXPECTED_OUTPUT_FIELDS - fields)}")
    if mismatches:
        raise ImportError(
            f"trl_ift does not work with trl {version}: " + "; ".join(mismatches) + ". Install a tested version: "
            f"pip install 'trl=={TESTED_TRL[-1]}.*'."
        )
    minor = ".".join(str(part) for part in Version(version).release[:2])
    if minor not in TESTED_TRL:
        warnings.warn(
            f"trl_ift was tested with trl {', '.join(TESTED_TRL)}; found {version}. What it relies on is still there.",
            stacklevel=2,
        )


class FusedTap:
    """Stands in for `model` in a TRL loss function: adds keyword arguments to the fused call and keeps its output.

    Only the first call with `fused_lm_head=True` is kept and extended; all other calls and attributes pass through.
    """

    def __init__(self, model: torch.nn.Module, **fused_kwargs: Any):
        self.model = model
        self.fused_kwargs = fused_kwargs
        self.output: Any = None

    def __call__(self, *args, **kwargs):
        if not kwargs.get("fused_lm_head") or self.output is not None:
            return self.model(*args, **kwargs)
        self.output = self.model(*args, **kwargs, **self.fused_kwargs)
        return self.output

    def __getattr__(self, name: str):
        return getattr(self.model, name)


def _fused_forward_of(model: torch.nn.Module) -> Any:
    forward = model.forward.__func__ if isinstance(model.forward, types.MethodType) else None
    if forward is None or "final_logit_softcapping" not in forward.__code__.co_freevars:
        raise ValueError(f"`add_fused_lm_head` was not applied to this {type(model).__name__}.")
    return forward


@functools.cache
def _compact_globals() -> dict[str, Any]:
    """Globals of TRL's fused forward in which it scores labelled positions only (`_use_triton` decides), with our head."""
    return {
        **vars(trl_utils),
        "_use_triton": lambda device: True,
        "_ChunkedLogProbFunction": LogProbFunction,
    }


def score_labelled_positions_only(model: torch.nn.Module) -> None:
    """Make the fused LM head of `model` project only positions that have a label, on every device.

    TRL does this on Triton devices; elsewhere it projects prompt and padding too and masks them afterwards, which on a
    CPU costs as much as scoring them. On a CPU, small batches also keep their probabilities instead of projecting again
    in the backward, and tiles are smaller. `model` must carry TRL's fused head (`add_fused_lm_head`); other models keep
    TRL's behaviour, because only this instance's forward is rebound.
    """
    fused = _fused_forward_of(model)
    # The same code with other globals. One dictionary for all models: torch.compile caches by code.
    compact = types.FunctionType(
        fused.__code__, _compact_globals(), fused.__name__, fused.__defaults__, fused.__closure__
    )
    compact.__kwdefaults__ = fused.__kwdefaults__
    compact.__dict__.update(fused.__dict__)
    model.forward = types.MethodType(compact, model)


class LogProbFunction:
    """Stands in for TRL's `ChunkedLogProbFunction`: the same arguments and results."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs):
        if softcap is None and hidden.device.type == "cpu":
            # Within a Function gradients are always off, so that it is told whether a backward may follow
            training = torch.is_grad_enabled()
            return _CPULogProbFunction.apply(
                hidden, weight, bias, targets, logit_scale / temperature, outputs, training
            )
        return ChunkedLogProbFunction.apply(
            hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs
        )


# Largest N x V whose probabilities are kept for the backward, in float32 (256 MiB), and rows x V of a tile
_STORED_ELEMENTS = 2**26
_CPU_TILE_ELEMENTS = 2**23


def _scaled_logits(hidden, weight, bias, scale: float) -> torch.Tensor:
    """Float32 logits of one tile, (rows, V), from inputs in the dtype of the projection."""
    logits = torch.mm(hidden, weight.t())
    if bias is not None:
        logits += bias.to(logits.dtype)
    logits = logits.float()
    if scale != 1.0:
        logits *= scale
    return logits


class _CPULogProbFunction(torch.autograd.Function):
    """Log-probabilities and statistics of N tokens, tile by tile.

    Keeps the (N, V) probabilities for the backward while they are few, and computes them again otherwise.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scale: float, outputs: tuple[str, ...], training: bool):
        ctx.set_materialize_grads(False)
        device_type = hidden.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype
        number, vocabulary = hidden.size(0), weight.size(0)
        rows = max(1, _CPU_TILE_ELEMENTS // vocabulary)
        keep = training and any(ctx.needs_input_grad) and number * vocabulary <= _STORED_ELEMENTS
        stored = torch.empty(number if keep else min(rows, number), vocabulary, dtype=torch.float32)
        names = ("log_probs", "log_z", "entropy", "log_sum_sq_probs", "mean_logits")
        values = {name: torch.empty(number, dtype=torch.float32) for name in names}
        is_top1 = torch.empty(number, dtype=torch.bool)
        compute_weight = weight.to(dtype)
        for start in range(0, number, rows):
            tile = slice(start, min(start + rows, number))
            logits = _scaled_logits(hidden[tile].to(dtype), compute_weight, bias, scale)
            if "mean_logits" in outputs:
                values["mean_logits"][tile] = logits.mean(-1)
            top, likeliest = logits.max(-1)
            is_top1[tile] = likeliest == targets[tile]
            logits -= top[:, None]
            probs = torch.exp(logits, out=stored[tile] if keep else stored[: logits.size(0)])
            total = probs.sum(-1)
            log_total = total.log()
            values["log_z"][tile] = top + log_total
            values["log_probs"][tile] = logits.gather(-1, targets[tile, None]).squeeze(-1) - log_total
            if "entropy" in outputs:
                values["entropy"][tile] = log_total - torch.linalg.vecdot(probs, logits) / total
            if "log_sum_sq_probs" in outputs:
                values["log_sum_sq_probs"][tile] = torch.linalg.vecdot(probs, probs).log() - 2 * log_total
            if keep:
                probs /= total[:, None]
        found = [values[name] if name in outputs else None for name in ("entropy", "log_sum_sq_probs", "mean_logits")]
        result = (values["log_probs"], *found, is_top1 if "is_top1" in outputs else None)
        probs_or_none = stored if keep else None
        ctx.save_for_backward(hidden, weight, bias, targets, probs_or_none, values["log_z"], values["entropy"])
        ctx.dtype, ctx.scale, ctx.rows = dtype, scale, rows
        ctx.mark_non_differentiable(*(value for value in result[2:] if value is not None))
        return result

    @staticmethod
    def backward(ctx, grad_log_probs, grad_entropy, *_):
        hidden, weight, bias, targets, probs, log_z, entropy = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # Accumulated in float32 whatever the inputs are, as TRL does
        projection = weight.to(ctx.dtype)
        compute_weight = projection.float()
        grad_hidden = torch.empty(hidden.shape, dtype=torch.float32) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros(bias.shape, dtype=torch.float32) if needs_bias else None
        for start in range(0, hidden.size(0), ctx.rows):
            tile = slice(start, min(start + ctx.rows, hidden.size(0)))
            if probs is not None:
                p = probs[tile]
            else:
                p = _scaled_logits(hidden[tile].to(ctx.dtype), projection, bias, ctx.scale)
                p = p.sub_(log_z[tile, None]).exp_()
            if grad_log_probs is None:
                grad = torch.zeros_like(p)
            else:
                # d log p_target / d z_j = 1[j = target] - p_j
                upstream = grad_log_probs[tile].float()[:, None]
                grad = p * -upstream
                grad.scatter_add_(1, targets[tile, None], upstream)
            if grad_entropy is not None:
                # d entropy / d z_j = -p_j (log p_j + entropy)
                grad -= grad_entropy[tile].float()[:, None] * (torch.xlogy(p, p) + p * entropy[tile, None])
            if ctx.scale != 1.0:
                grad *= ctx.scale
            grad = grad.to(ctx.dtype).float()
            if grad_hidden is not None:
                torch.mm(grad, compute_weight, out=grad_hidden[tile])
            if grad_weight is not None:
                grad_weight.addmm_(grad.t(), hidden[tile].to(ctx.dtype).float())
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *[None] * 4,
        )


@dataclasses.dataclass(frozen=True)
class LMHead:
    """The LM head of a model with TRL's fused head, for projections of our own inside the wrapped forward.

    Attributes:
        logit_scale: Factor on the logits (Cohere, Granite, ...).
        softcap: Bound of the tanh on the logits (Gemma), or `None`.
    """

    logit_scale: float
    softcap: float | None

    @classmethod
    def of(cls, model: torch.nn.Module) -> "LMHead":
        """Read scale and cap from the fused head, so that both projections agree."""
        options = inspect.getclosurevars(_fused_forward_of(model)).nonlocals
        return cls(options["logit_scale"], options["final_logit_softcapping"])

    def logit_tiles(
        self, model: torch.nn.Module, hidden: torch.Tensor, tile_elements: int = 2**26
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Project `hidden` of shape (N, H) through the head of `model` tile by tile, without gradient.

        Yields the slice of rows and their float32 logits, shape (rows, V), at most `tile_elements` elements. Shards of
        FSDP2 and ZeRO-3 are gathered for the duration; call it inside the wrapped forward.
        """
        head = model.get_output_embeddings()
        weight, bias = head.weight, head.bias
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
            bias = bias.full_tensor() if bias is not None else None
        hidden = hidden.to(weight.device)
        device_type = hidden.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype
        with torch.no_grad(), torch.autocast(device_type, enabled=False), maybe_gather_lm_head_ctx(weight, bias):
            weight = weight.to(dtype)
            rows = max(1, tile_elements // weight.size(0))
            for start in range(0, hidden.size(0), rows):
                tile = slice(start, min(start + rows, hidden.size(0)))
                logits = torch.nn.functional.linear(
                    hidden[tile].to(dtype), weight, None if bias is None else bias.to(dtype)
                )
                logits = logits.float()
                if self.logit_scale != 1.0:
                    logits = logits * self.logit_scale
                if self.softcap is not None:
                    logits = self.softcap * torch.tanh(logits / self.softcap)
                yield tile, logits


def keep_4bit_trainable_on_cpu(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    A forward in eval mode (precomputed references, evaluation, generation) repacks them into a format without
    autograd, and every later backward is wrong for the layers below. Call it before the first forward.

    Raises:
        ValueError: A weight is already packed: gradients of this instance would be wrong.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"The 4-bit weight of `{name}` was packed for inference by an earlier forward in eval mode on this CPU; "
                "gradients through it would be wrong. Load the model again and pass it to the trainer before running "
                "it, or pass the model's path together with `quantization_config`."
            )


# ---------------------------------------------------------------- SFTTrainer


def prepare_sft_rows(
    dataset: IterableDataset,
    tokenizer: Any,
    *,
    max_length: int | None,
    truncation_mode: str,
    completion_only_loss: bool,
    assistant_only_loss: bool,
    dataset_text_field: str,
) -> IterableDataset:
    """Return the rows as [`~trl.SFTTrainer`] would train on them: `input_ids` and `labels`, beside the columns there were.

    Lazily, without a trainer, in the order of the dataset, without packing, and without the waiting for other processes, which
    here may be at other rows. Rows that truncation leaves without a label are dropped, as TRL does.
    """
    template = None
    if assistant_only_loss and not has_generation_markers(tokenizer.chat_template):
        template = get_training_chat_template(tokenizer)
    # What the method reads of its trainer and of its config
    trainer = types.SimpleNamespace(
        _tokenizer=tokenizer, chat_template=template, completion_only_loss=completion_only_loss
    )
    args = types.SimpleNamespace(
        max_length=max_length,
        truncation_mode=truncation_mode,
        assistant_only_loss=assistant_only_loss,
        dataset_text_field=dataset_text_field,
        shuffle_dataset=False,
    )
    original = sft_trainer.global_then_local_main_first
    sft_trainer.global_then_local_main_first = nullcontext
    try:
        return SFTTrainer._prepare_dataset(trainer, dataset, tokenizer, args, False, None, "scored")
    finally:
        sft_trainer.global_then_local_main_first = original


# ---------------------------------------------------------------- DPOTrainer

TRL_PAIR_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip

_PAIR_MEAN = "per_sequence_loss.mean()"


def _with_pair_mean_hook(function: Callable) -> Callable:
    """Return TRL's loss function with its mean over the pairs replaced by `model.pair_mean(per_sequence_loss, loss_type)`.

    TRL has no hook between the losses of the pairs and their mean. The source keeps its file and lines in tracebacks.
    """
    lines, first_line = inspect.getsourcelines(function)
    source = textwrap.dedent("".join(lines))
    if source.count(_PAIR_MEAN) != 1:
        raise ImportError(
            f"trl_ift does not work with trl {trl.__version__}: `{_PAIR_MEAN}` occurs {source.count(_PAIR_MEAN)} times in "
            f"{function.__qualname__}, expected once. Install a tested version: pip install 'trl=={TESTED_TRL[-1]}.*'."
        )
    source = source.replace(_PAIR_MEAN, "model.pair_mean(per_sequence_loss, loss_type)")
    namespace: dict[str, Any] = {}
    exec(compile("\n" * (first_line - 1) + source, inspect.getfile(function), "exec"), function.__globals__, namespace)
    return namespace[function.__name__]


dpo_compute_loss = _with_pair_mean_hook(DPOTrainer._compute_loss)


class NoReference(torch.nn.Module):
    """Stands in the constructor of a `DPOTrainer` for a reference that TRL would load and nobody reads."""


@contextmanager
def dpo_construction(
    labelled_positions_only: bool = True,
    hash_weights: bool = True,
    temperature: float = 1.0,
    trainer_module: Any = dpo_trainer,
) -> Iterator[None]:
    """While a `DPOTrainer` is built: its fused heads score labelled positions only, and 4-bit weights stay trainable.

    TRL adds the heads, and runs them over the data when it precomputes reference log-probs, within one constructor. With
    `hash_weights=False` the weights are not hashed for a cache of reference log-probs that will not be written. `temperature`
    divides the logits of policy and reference.
    """
    original, original_hash = trainer_module.add_fused_lm_head, trainer_module.hash_module

    def add_head(model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        if isinstance(model, NoReference):
            return
        keep_4bit_trainable_on_cpu(model)
        original(model, *args, **kwargs, temperature=temperature)
        if labelled_positions_only:
            score_labelled_positions_only(model)

    trainer_module.add_fused_lm_head = add_head
    if not hash_weights:
        trainer_module.hash_module = lambda module: ""
    try:
        yield
    finally:
        trainer_module.add_fused_lm_head, trainer_module.hash_module = original, original_hash


# The same while a `KTOTrainer` is built
kto_construction = functools.partial(dpo_construction, trainer_module=kto_trainer)


def preparation_options(args: Any) -> types.SimpleNamespace:
    """What TRL's preference and KTO trainers read of a config when they prepare data.

    `datasets` hashes the object that they are given: with the whole config, a run with another seed or `output_dir` would find
    no tokens and no reference log-probs in the cache.
    """
    names = ("dataset_num_proc", "max_length", "truncation_mode")
    return types.SimpleNamespace(**{name: getattr(args, name) for name in names if hasattr(args, name)})


@contextmanager
def without_weight_hashes() -> Iterator[None]:
    """Meanwhile TRL's trainers do not hash weights, for a cache of reference log-probs that will not be written."""
    modules = (dpo_trainer, kto_trainer)
    originals = [module.hash_module for module in modules]
    for module in modules:
        module.hash_module = lambda model: ""
    try:
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.hash_module = original


def share_cache_folder(dataset: Dataset) -> None:
    """Let all processes cache what is derived from an in-memory dataset in the main process's folder.

    Each has a temporary folder of its own otherwise, and cannot read the reference log-probs that the first one wrote.
    """
    folder = [os.path.dirname(dataset._get_cache_file_path("0"))]
    broadcast_object_list(folder, from_process=0)
    dataset._get_cache_file_path = lambda fingerprint: os.path.join(folder[0], f"cache-{fingerprint}.arrow")


def take_no_step(trainer: Trainer) -> None:
    """Let `trainer.train` load its checkpoint and end, for one at its last step: transformers would take one more."""
    # Else the loop over the epochs of a stream, which has no last one, would not end
    trainer._run_epoch = lambda **_: setattr(trainer.control, "should_training_stop", True)


def forget_fused_head(model: torch.nn.Module) -> None:
    """Give a copy of a model that a TRL trainer has patched its own forward back: the patch still runs the original."""
    # Patches (and what accelerate makes of them for mixed precision) are bound methods; its other hooks, which are not, copy
    # well and stay
    if isinstance(vars(model).get("forward"), types.MethodType):
        del model.forward
        vars(model).pop("_original_forward", None)


check_trl()
