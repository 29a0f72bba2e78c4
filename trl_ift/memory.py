r"""An estimate of the memory that a training takes on one device, before it runs.

With P parameters, P_t of them trained, b bytes a number of the weights and c bytes a number of the computation (2 in bfloat16
and float16, else 4), a batch of R rows of T tokens and N labelled positions, L layers of width h, attention of width a (heads
times their size), feed-forward width i and a vocabulary of V:

    weights      b P                        and c P more where float32 weights are cast for half precision
    gradients    b P_t
    optimizer    2 b P_t for AdamW; other optimizers: `optimizer_bytes`
    reference    b P for a copy of the model, else 0
    activations  L R T [ c (5 a + 5 h + 4 i) + 8 h ]       each layer's, kept for the backward pass
                 with checkpointing: L R T c h, the input of each layer, and one layer's whole
    head         c N h for the states that are projected, 4 N V for their probabilities where they are kept (on a CPU, while
                 N V <= 2^26), three tiles of 2^23 logits (on a CPU; elsewhere of 2^26), and the head's gradient in float32

Attention is counted without its scores, as PyTorch's fused kernels run it; eager attention keeps the R T^2 of each head, in
float32 and in the dtype of the computation, and needs them twice in the layer that the backward pass is at. Pairs that share
their prompts have a mask of B L^2 places, with sdpa a byte each, and a copy of c bytes a place that each layer keeps. The sum
is of parts that are seldom all there at once, and leaves out what allocators and libraries hold back: expect the peak within
a factor of two. For several devices it is that of each under DDP; FSDP and DeepSpeed split it.
"""

import copy
import math
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset

from .sequences import responses_of


# Bytes a weight of a linear layer takes with bitsandbytes, block scales included
_QUANTIZED_BYTES = {4: 0.5625, 8: 1.0}
# The option, and its name in newer versions of transformers
CHECKPOINTING_OPTIONS = ("gradient_checkpointing", "activation_checkpointing")
# How far the measured peak may lie above the estimate
_MARGIN = 2
# What reading the shape of an architecture with other names, or numbers of another kind, raises
UNKNOWN_SHAPE = (AttributeError, TypeError)
# Probabilities kept by the head on a CPU, and logits of a tile there and elsewhere
_KEPT_ON_CPU, _TILE_ON_CPU, _TILE = 2**26, 2**23, 2**26


@dataclass(frozen=True)
class Shape:
    """What of a model's architecture its activations depend on.

    Attributes:
        layers: Number of decoder layers.
        hidden: Width of the hidden states.
        attention: Heads times their size.
        intermediate: Width of the feed-forward layers that a token runs through.
        heads: Number of attention heads.
        vocabulary: Size of the vocabulary.
        eager: Whether attention keeps its scores.
    """

    layers: int
    hidden: int
    attention: int
    intermediate: int
    heads: int
    vocabulary: int
    eager: bool = False

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """Read it from a config of transformers."""
        text = config.get_text_config()
        hidden, heads = text.hidden_size, text.num_attention_heads
        intermediate = getattr(text, "intermediate_size", None) or 4 * hidden
        intermediate = max(intermediate) if isinstance(intermediate, list | tuple) else intermediate  # of each layer
        if (experts := getattr(text, "num_experts_per_tok", None)) is not None:
            intermediate = experts * (getattr(text, "moe_intermediate_size", None) or intermediate)
        return cls(
            layers=text.num_hidden_layers,
            hidden=hidden,
            attention=heads * (getattr(text, "head_dim", None) or hidden // heads),
            intermediate=intermediate,
            heads=heads,
            vocabulary=text.vocab_size,
            eager=config._attn_implementation == "eager",
        )


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one device.

    Attributes:
        rows: Rows that run through the model together.
        length: Their padded length.
        labelled: Labelled positions.
        mask: Places of the mask of pairs that share their prompts, B L^2 for B pairs in rows of L tokens.
    """

    rows: int
    length: int
    labelled: int
    mask: int = 0


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device, part by part; see the module."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    head: int

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """The parts by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def estimate_memory(
    model: torch.nn.Module,
    args: Any,
    batch: Batch,
    reference_copy: bool = False,
    quantized_bits: int | None = None,
    on_cpu: bool | None = None,
) -> MemoryEstimate:
    """Estimate the memory of a training.

    Raises:
        AttributeError, TypeError: The config of the model does not say what its activations depend on (`UNKNOWN_SHAPE`).

    Args:
        model: The model that is trained, with its adapter; on the device "meta" too.
        args: Config of the trainer: precision, optimizer and checkpointing are read.
        batch: The largest micro-batch.
        reference_copy: Whether a second copy of the weights stays in memory.
        quantized_bits: Bits of the linear layers, for a model on "meta" that will be loaded quantized.
        on_cpu: Whether it is trained on a CPU; by default what `args` say.
    """
    shape = Shape.of(model.config)
    base_dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    width = 2 if args.bf16 or args.fp16 or base_dtype.itemsize == 2 else 4
    on_cpu = args.device.type == "cpu" if on_cpu is None else on_cpu
    return replace(
        estimate_resident(model, args, reference_copy, quantized_bits),
        activations=activation_bytes(shape, batch, width, bool(args.gradient_checkpointing)),
        head=head_bytes(shape, batch, width, on_cpu, trained_head=not is_peft_model(model)),
    )


def estimate_resident(
    model: torch.nn.Module, args: Any, reference_copy: bool = False, quantized_bits: int | None = None
) -> MemoryEstimate:
    """The part of `estimate_memory` that does not depend on a batch: without activations and head."""
    adapted = is_peft_model(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    own = {id(p) for p in trained} if adapted else set()
    ends = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    whole = {id(module.weight) for module in ends}  # bitsandbytes leaves them as they are
    bits = {id(p): None if id(p) in whole or p.dim() != 2 else quantized_bits for p in model.parameters()}
    weights = sum(weight_bytes(p, bits[id(p)]) for p in model.parameters() if id(p) not in own)
    gradients = sum(p.numel() * p.element_size() for p in trained)
    half = args.bf16 or args.fp16
    matrices = [p for p in model.parameters() if p.dim() > 1 and p.dtype == torch.float32 and bits[id(p)] is None]
    cast = sum(2 * p.numel() for p in matrices) if half else 0
    return MemoryEstimate(
        weights=weights + cast,
        adapter=gradients if adapted else 0,
        gradients=gradients,
        optimizer=optimizer_bytes(args.optim, gradients, sum(p.numel() for p in trained)),
        reference=weights if reference_copy else 0,
        activations=0,
        head=0,
    )


def weight_bytes(parameter: torch.Tensor, quantized_bits: int | None = None) -> int:
    """Bytes of a parameter; of one on "meta" that will be quantized, those of its bits."""
    if quantized_bits is not None and parameter.device.type == "meta":
        return int(parameter.numel() * _QUANTIZED_BYTES[quantized_bits])
    return parameter.numel() * parameter.element_size()


def optimizer_bytes(optim: Any, weight_bytes: int, number: int) -> int:
    """Bytes of the state of an optimizer of transformers for `number` trained weights of `weight_bytes` bytes."""
    name = str(getattr(optim, "value", optim))
    if name.startswith("sgd"):
        return 0
    if "8bit" in name:
        return (1 if "lion" in name or "rmsprop" in name else 2) * number
    if "4bit" in name:
        return number
    if name == "adafactor":
        return 0  # a row and a column of each matrix
    if name.startswith(("lion", "paged_lion", "rmsprop", "adagrad")):
        return weight_bytes
    return 2 * weight_bytes


def activation_bytes(shape: Shape, batch: Batch, width: int, checkpointing: bool) -> int:
    """Bytes that the layers keep for the backward pass; `width` is that of a number."""
    tokens = batch.rows * batch.length
    layer = tokens * (width * (5 * shape.attention + 5 * shape.hidden + 4 * shape.intermediate) + 8 * shape.hidden)
    scores = shape.heads * tokens * batch.length * (4 if width == 4 else 4 + width) if shape.eager else 0
    mask = batch.mask * (width if shape.eager else 1 + width * (1 if checkpointing else shape.layers))
    if checkpointing:
        return layer + 2 * scores + shape.layers * tokens * width * shape.hidden + mask
    return shape.layers * (layer + scores) + scores + mask


def head_bytes(shape: Shape, batch: Batch, width: int, on_cpu: bool, trained_head: bool) -> int:
    """Bytes of the projection of the labelled positions to the vocabulary, and of the gradient of its weight."""
    logits = batch.labelled * shape.vocabulary
    kept = logits if on_cpu and logits <= _KEPT_ON_CPU else 0
    tiles = 3 * min(logits, _TILE_ON_CPU if on_cpu else _TILE)
    gradient = shape.vocabulary * shape.hidden if trained_head and logits else 0
    return width * batch.labelled * shape.hidden + 4 * (kept + tiles + gradient)


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device now; of the machine for a CPU, `None` for another kind."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    import psutil

    return psutil.virtual_memory().available


def largest_batch(trainer: Any) -> Batch | None:
    """A micro-batch of the training that no other one exceeds; `None` if the length of its rows is not known."""
    args, dataset = trainer.args, trainer.train_dataset
    first = list(islice(iter(dataset), args.per_device_train_batch_size))
    rows = sum(len(responses_of(row)) for row in first)
    length = _longest(dataset) if isinstance(dataset, Dataset) else None
    known = [number for number in (length, args.max_length) if number is not None]
    if not known or not rows:
        return None
    pairs, length = len(first), min(known)
    # As if a pair shared nothing
    mask = pairs * (math.ceil(rows / pairs) * length) ** 2 if has_pair_mask(trainer.model, args) else 0
    return Batch(rows, length, rows * length, mask)


def has_pair_mask(model: Any, args: Any) -> bool:
    """Whether pairs share their prompts, in rows whose mask has a place for every two tokens."""
    # That of flex_attention is made of blocks
    return (
        getattr(args, "shared_prompt", False)
        and model.config.get_text_config()._attn_implementation != "flex_attention"
    )


def _longest(dataset: Dataset) -> int | None:
    """Most tokens of a response with its prompt in a prepared dataset; `None` if some are in a column of lists of them."""
    columns = set(dataset.column_names)
    if any(name.endswith("_rows") for name in columns):
        return None
    names = {"chosen_ids", "rejected_ids", "completion_ids"} & columns or {"input_ids"} & columns
    if not names:
        return None
    longest, prompt = 0, ["prompt_ids"] if "prompt_ids" in columns else []
    for table in dataset.select_columns([*names, *prompt]).with_format("arrow").iter(1000):
        before = pc.list_value_length(table["prompt_ids"]) if prompt else pa.scalar(0)
        totals = [pc.max(pc.add(pc.list_value_length(table[name]), before)).as_py() for name in names]
        longest = max(longest, *totals)
    return longest


def fits_without_checkpointing(model: torch.nn.Module, args: Any, batch: Batch, free: int) -> tuple[bool, int]:
    """Whether a training that keeps its activations fits, with a margin for the estimate, and the bytes that it would take.

    Args:
        model: The model that is trained, in memory already; what it takes now is not counted.
        args: Config of the trainer.
        batch: The largest micro-batch.
        free: Bytes that are free.
    """
    args = copy.copy(args)
    args.gradient_checkpointing = False
    there = sum(weight_bytes(parameter) for parameter in model.parameters())
    needed = estimate_memory(model, args, batch).total - there
    return _MARGIN * needed <= free, needed


def choose_checkpointing(trainer: Any) -> str:
    """Switch gradient checkpointing off if the training fits without it; return a sentence that says what was chosen and why.

    TRL's default is on, and computes the forward pass of each layer twice: about a third more time. The gradients are the
    same. For a trainer that is about to train.
    """
    fits, sentence = decide_checkpointing(trainer)
    if fits:
        for name in CHECKPOINTING_OPTIONS:
            if hasattr(trainer.args, name):
                setattr(trainer.args, name, False)
    return sentence


def decide_checkpointing(trainer: Any, coming: int = 0) -> tuple[bool | None, str]:
    """Whether a training fits without gradient checkpointing, `None` if that is not known, and a sentence for its log.

    Args:
        trainer: A trainer that is about to train.
        coming: Bytes of weights that are not in memory yet.
    """
    args, accelerator = trainer.args, trainer.accelerator
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return None, "Gradient checkpointing is on, as in TRL: with sharded weights the memory is not estimated."
    batch, free = largest_batch(trainer), free_memory(args.device)
    if batch is None or free is None:
        unknown = "`max_length`" if batch is None else f"free memory of a device of type {args.device.type!r}"
        return None, f"Gradient checkpointing is on, as in TRL: there is no {unknown} to choose by."
    free -= coming
    if args.device.type == "cpu":
        free //= accelerator.num_processes  # of this machine; more of them share less
    try:
        fits, needed = fits_without_checkpointing(trainer.model, args, batch, free)
    except UNKNOWN_SHAPE as error:
        return (
            None,
            f"Gradient checkpointing is on, as in TRL: the memory of this model cannot be estimated ({error}).",
        )
    fits = bool(accelerator.gather(torch.tensor([fits], device=args.device)).all())  # the same for all processes
    sizes = f"an estimated {needed / 2**30:.2g} GiB beside the weights, {free / 2**30:.2g} GiB are free"
    if fits:
        return True, f"Gradient checkpointing is off: the training takes {sizes} (`--gradient_checkpointing true`)."
    return False, (
        f"Gradient checkpointing is on: without it the training takes {sizes} (`--gradient_checkpointing false`)."
    )


def savings(
    model: torch.nn.Module,
    args: Any,
    batch: Batch,
    reference_copy: bool,
    estimate: MemoryEstimate,
    quantized_bits: int | None = None,
) -> list[tuple[str, int]]:
    """What would lower the estimate, as (change, bytes), the largest first; arguments as of `estimate_memory`."""
    shape, found = Shape.of(model.config), []
    width = 2 if args.bf16 or args.fp16 or model.dtype.itemsize == 2 else 4
    if reference_copy:
        found.append(("`precompute_ref_log_probs`: no reference beside the policy", estimate.reference))
    if not args.gradient_checkpointing:
        saved = estimate.activations - activation_bytes(shape, batch, width, True)
        found.append(("`gradient_checkpointing`: activations are computed again", saved))
    if batch.rows > 1 and args.per_device_train_batch_size > 1:
        half = replace(batch, rows=batch.rows // 2, labelled=batch.labelled // 2, mask=batch.mask // 2)
        saved = estimate.activations - activation_bytes(shape, half, width, bool(args.gradient_checkpointing))
        found.append(("half of `per_device_train_batch_size`, twice `gradient_accumulation_steps`", saved))
    if not is_peft_model(model):
        found.append(
            (
                "`use_peft`: gradients and optimizer of an adapter alone, and no copy as reference",
                estimate.gradients + estimate.optimizer + estimate.reference,
            )
        )
    elif quantized_bits is None and not any(getattr(model, f"is_loaded_in_{b}bit", False) for b in _QUANTIZED_BYTES):
        matrices = [p for p in model.parameters() if p.dim() == 2 and not p.requires_grad]
        saved = sum(int(p.numel() * (p.element_size() - _QUANTIZED_BYTES[4])) for p in matrices)
        found.append(("`load_in_4bit`: weights of 4 bits under the adapter", saved))
    return sorted(((change, saved) for change, saved in found if saved > 0), key=lambda pair: -pair[1])


def checkpoint_bytes(model: torch.nn.Module, args: Any, estimate: MemoryEstimate) -> int:
    """Bytes of one checkpoint: the weights or the adapter, and the state of the optimizer unless only the model is saved."""
    saved = estimate.adapter if is_peft_model(model) else sum(weight_bytes(p) for p in model.parameters())
    return saved + (0 if args.save_only_model else estimate.optimizer)
