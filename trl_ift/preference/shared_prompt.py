r"""Pairs whose prompt is computed once (`shared_prompt=True`), https://huggingface.co/papers/2410.20305.

The padded rows `prompt + chosen` and `prompt + rejected` of a pair become one row, in which responses see the prompt and not
each other. The last token of the prompt stands before each response, because it predicts the first token of each:

    row         p1 p2 .. p(n-1)   pn c1 c2 ..   pn r1 r2 ..        responses of a further branch follow in the same way
    position     0  1 ..   n-2   n-1  n ..     n-1  n ..

Hidden states, log-probabilities and gradients are those of the padded rows but for rounding, and results are handed back in
their layout, so that nothing after the forward pass knows of it.
"""

import inspect
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from accelerate.utils import extract_model_from_parallel, is_peft_model
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ..trl_internals import FusedCausalLMOutput


# Implementations of attention that take a mask of any shape
_ATTENTION = ("sdpa", "eager", "flex_attention")
# Layers in which a token sees all tokens before it, or the last of them
_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
# Options of configs that hold the number of tokens that such a layer sees
_WINDOWS = (
    "sliding_window", "sliding_window_size", "attention_window_size", "window_size", "keep_window_size", "local_attention",
    "attention_chunk_size",
)  # fmt: skip
_NOISE = re.compile("(?!classifier|summary).*(dropout|jitter).*")
# Largest mean difference to padded rows, in nats a token, in float32
_TOLERANCE = 1e-3
# With matrices in fewer bits: this many times the difference that a rounding of the embeddings makes, relative to their size
_ROUNDINGS, _ROUNDING = 3, 2**-8


# ---------------------------------------------------------------- layout


@dataclass(frozen=True)
class JointRows:
    """N padded rows of T tokens as B joint rows of L tokens, one a pair.

    Attributes:
        input_ids: Tokens, (B, L).
        position_ids: Position of each token in its padded row, (B, L).
        labels: As `input_ids` on the tokens of responses, -100 elsewhere, (B, L).
        segments: What a token belongs to, (B, L): 0 the shared prompt, n > 0 a response that sees it, n < -1 a row with another
            prompt, which sees itself alone, -1 padding.
        pair: Joint row of each padded row, (N, 1).
        columns: Column of each of its tokens there, L for padding, (N, T).
        label_mask: Whether a position of the padded rows predicts a token of a response, (N, T-1).
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    segments: torch.Tensor
    pair: torch.Tensor
    columns: torch.Tensor
    label_mask: torch.Tensor

    def attention_mask(self, implementation: str, dtype: torch.dtype) -> Any:
        """The mask of the joint rows for an implementation of attention: (B, 1, L, L), or a `BlockMask`."""
        segments = self.segments
        rows, width = segments.shape

        def sees(row, head, query, key):
            own, other = segments[row, query], segments[row, key]
            return (key <= query) & ((own == other) | ((other == 0) & (own > 0)))

        return ALL_MASK_ATTENTION_FUNCTIONS[implementation](
            batch_size=rows,
            q_length=width,
            kv_length=width,
            mask_function=sees,
            allow_is_causal_skip=False,
            dtype=dtype,
            device=segments.device,
        )

    def padded(self, values: torch.Tensor) -> torch.Tensor:
        """What was computed for each prediction of the joint rows, (B, L-1), for those of the padded rows, (N, T-1)."""
        found = values[self.pair, self.columns[:, :-1].clamp(max=values.size(1) - 1)]
        return found.masked_fill(~self.label_mask, 0)


def join_rows(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, pair: torch.Tensor
) -> JointRows:
    """Lay padded rows out with one prompt a pair.

    Args:
        input_ids: Tokens of N rows, padded on the right, (N, T); the first B are the chosen rows of the pairs.
        attention_mask: 0 on padding, (N, T).
        labels: -100 outside the responses, (N, T).
        pair: Pair of each row, (N,), of the first B rows 0, ..., B-1.

    A row whose prompt is not that of its pair's chosen row (a sample for another prompt; a prompt that was cut on the left)
    stands in the joint row as a whole.
    """
    number, width = input_ids.shape
    places = torch.arange(width, device=input_ids.device)
    lengths, labelled = attention_mask.sum(1), labels != -100
    starts = torch.where(labelled.any(1), labelled.int().argmax(1), lengths)
    differs = ((input_ids != input_ids[pair]) & (places < starts[:, None])).any(1)
    shares = (starts == starts[pair]) & ~differs
    shared = torch.where(shares, starts - 1, 0).clamp(min=0)

    numbers = torch.stack([pair, shared, lengths - shared]).tolist()  # once to the host
    ends: dict[int, int] = {}
    offsets = []
    for row, first, own in zip(*numbers, strict=True):
        offsets.append(ends.setdefault(row, first))  # behind the prompt of the chosen row, which comes first
        ends[row] += own
    total = max(ends.values())

    first = shared[:, None]
    offset = torch.tensor(offsets, device=input_ids.device)[:, None]
    columns = torch.where(places < first, places, offset + places - first)
    columns = columns.masked_fill(attention_mask == 0, total)
    index = torch.arange(number, device=input_ids.device)
    own_segment = torch.where(shares, 1 + index, -2 - index)[:, None]

    def joint(values: torch.Tensor, padding: int) -> torch.Tensor:
        rows = torch.full((len(ends), total + 1), padding, dtype=values.dtype, device=values.device)
        rows[pair[:, None], columns] = values  # the shared prompt several times: the same values
        return rows[:, :-1]

    return JointRows(
        input_ids=joint(input_ids, 0),
        position_ids=joint(places.expand(number, -1), 0),
        labels=joint(labels.masked_fill(places == first, -100), -100),  # nothing predicts the first token of a segment
        segments=joint(torch.where(places < first, 0, own_segment), -1),
        pair=pair[:, None],
        columns=columns,
        label_mask=labels[:, 1:] != -100,
    )


# ---------------------------------------------------------------- forward pass


class SharedPrompts:
    """Runs models on joint rows in the place of padded ones.

    The first batch of each model is computed in both layouts for one pair, and compared.

    Args:
        rough: Whether autocast multiplies matrices in fewer bits than float32 has.
    """

    def __init__(self, rough: bool):
        self.rough = rough
        self._compared: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    def run(
        self,
        model: torch.nn.Module,
        pair: torch.Tensor,
        *,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        **options: Any,
    ) -> FusedCausalLMOutput:
        """Output of the fused head of `model` for padded rows, each field (N, T-1); `pair` (N,) as in [`join_rows`].

        Raises:
            ValueError: The batch holds what cannot be laid out, or the model gives other log-probabilities.
        """
        if unknown := [name for name, value in options.items() if isinstance(value, torch.Tensor)]:
            raise ValueError(
                f"`shared_prompt=True`: the batch holds {', '.join(map(repr, unknown))}, which cannot be laid out with one "
                "prompt a pair. Drop them from the output of `data_collator`, or set `shared_prompt=False`."
            )
        if (attention_mask[:, :-1] < attention_mask[:, 1:]).any():
            raise ValueError(
                "`shared_prompt=True` needs rows that are padded on the right, and `data_collator` pads them elsewhere. Pad on "
                "the right, or set `shared_prompt=False`."
            )
        if model not in self._compared:
            self._compare(model, input_ids, attention_mask, options)
            self._compared.add(model)
        return self._forward(model, pair, input_ids, attention_mask, labels, options)

    @staticmethod
    def _forward(model, pair, input_ids, attention_mask, labels, options) -> FusedCausalLMOutput:
        base: Any = extract_model_from_parallel(model)
        rows = join_rows(input_ids, attention_mask, labels, pair)
        output = model(
            input_ids=rows.input_ids,
            attention_mask=rows.attention_mask(base.config.get_text_config()._attn_implementation, base.dtype),
            position_ids=rows.position_ids,
            labels=rows.labels,
            **options,
        )
        fields = {
            name: rows.padded(value) if isinstance(value, torch.Tensor) and value.dim() == 2 else value
            for name, value in output.items()
        }
        return FusedCausalLMOutput(**{**fields, "label_mask": rows.label_mask})

    @torch.no_grad()
    def _compare(self, model, input_ids, attention_mask, options) -> None:
        """Raise unless a model gives the same log-probabilities in both layouts, for a pair made of its longest row.

        Every process makes this comparison at its first batch, whatever is in it: with FSDP each forward pass is one of all.
        """
        lengths = attention_mask.sum(1)
        ids = input_ids[lengths.argmax(), : int(lengths.max())]
        half = len(ids) // 2
        backwards = torch.cat([ids[:half], ids[half:].flip(0)])
        rows = torch.stack([ids, backwards])
        mask = torch.ones_like(rows)
        mask[1, -1] = 0  # padding
        labels = rows.masked_fill(mask == 0, -100)
        labels[:, :half] = -100
        pair = torch.zeros(2, dtype=torch.long, device=rows.device)
        padded = model(input_ids=rows, attention_mask=mask, labels=labels, **options)
        shared = self._forward(model, pair, rows, mask, labels, options)
        base: Any = extract_model_from_parallel(model)
        whole = all(parameter.dtype == torch.float32 for parameter in base.parameters())
        exact = whole and not self.rough and torch.get_float32_matmul_precision() == "highest"
        tolerance = _TOLERANCE
        if not exact:  # how far rounding moves the log-probabilities depends on the model and the text: it is measured
            with _rounded_embeddings(base):
                rounded = model(input_ids=rows, attention_mask=mask, labels=labels, **options)
            tolerance = max(tolerance, _ROUNDINGS * _difference(padded, rounded))
        difference = _difference(padded, shared)
        if not difference <= tolerance:  # NaN too
            raise ValueError(
                f"`shared_prompt=True`: the log-probabilities that {type(base).__name__} gives for a pair with one prompt "
                f"differ by {difference:.3g} nats a token from those for padded rows, expected at most {tolerance:.3g}. "
                "Its layers do not keep the responses of a row apart, or ignore position ids. Set `shared_prompt=False`."
            )


def _difference(one: FusedCausalLMOutput, other: FusedCausalLMOutput) -> float:
    """Mean difference of the log-probabilities of a row, in nats a token, of the row where it is largest."""
    totals = (one.log_probs - other.log_probs).abs().sum(1)
    return (totals / one.label_mask.sum(1).clamp(min=1)).max().item()


@contextmanager
def _rounded_embeddings(model: Any) -> Iterator[None]:
    """Move each number of the embeddings by about a rounding of bfloat16, so that those of all layers come out otherwise."""

    def move(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        factors = torch.full((output.numel(),), 1 + _ROUNDING, device=output.device)
        factors[::3] = 1 - _ROUNDING
        return (output.float() * factors.view(output.shape)).to(output.dtype)

    handle = model.get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


# ---------------------------------------------------------------- checks


def check_shared_prompt(args: Any, model: Any, ref_model: Any, peft_config: Any) -> None:
    """Raise if pairs cannot share their prompts exactly in the models of a trainer; no model is loaded for it.

    Raises:
        ValueError: An adapter of virtual tokens, an architecture or an implementation of attention that does not keep the
            responses of a row apart, dropout, or the router loss of a mixture of experts.
    """
    existing = getattr(model, "peft_config", None) or {}
    for config in [peft_config, *existing.values()]:
        if getattr(config, "is_prompt_learning", False):
            _refuse(
                f"the adapter {type(config).__name__} adds virtual tokens that have no place in it",
                "Use an adapter such as `LoraConfig`",
            )
    for each in [model] if ref_model is None else [model, ref_model]:
        config, model_class = _architecture_of(each, args)
        _check_architecture(config, model_class, args.max_length)
        _check_noise(config)
    _check_router(_architecture_of(model, args)[0], args)


def _refuse(why: str, remedy: str = "") -> None:
    raise ValueError(
        f"`shared_prompt=True` puts the responses of a pair behind one prompt, in one row, and {why}. {remedy}"
        f"{', or set' if remedy else 'Set'} `shared_prompt=False`."
    )


def _architecture_of(model: Any, args: Any) -> tuple[PretrainedConfig, type[PreTrainedModel] | None]:
    """Text config and class of a model, or of the one that a path or Hub id names; `None` for custom code."""
    if isinstance(model, str):
        options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
        config = AutoConfig.from_pretrained(model, **options)
        model_class = getattr(transformers, (config.architectures or [""])[0], None)
    else:
        base: Any = model.get_base_model() if is_peft_model(model) else model
        config, model_class = base.config, type(base)
    if model_class is None or not model_class.__module__.startswith("transformers."):
        model_class = None
    return config.get_text_config(), model_class


def _check_architecture(
    config: PretrainedConfig, model_class: type[PreTrainedModel] | None, max_length: int | None
) -> None:
    if model_class is None:
        _refuse("whether its code keeps them apart is not known of a model that is not part of transformers")
    assert model_class is not None
    name = model_class.__name__
    layers = set(getattr(config, "layer_types", None) or ())
    if config.is_encoder_decoder:
        _refuse(f"{name} has an encoder, which reads a prompt on its own")
    if getattr(model_class, "_is_stateful", False) or not layers <= _LAYERS:
        found = f" ({', '.join(sorted(layers - _LAYERS))})" if layers - _LAYERS else ""
        _refuse(f"{name} has layers other than attention to earlier tokens{found}, which do not keep them apart")
    if "position_ids" not in inspect.signature(model_class.forward).parameters or getattr(config, "alibi", False):
        _refuse(f"{name} takes no position ids, so that the second response would stand too far from the prompt")
    windows = [getattr(config, name, None) for name in _WINDOWS] if layers != {"full_attention"} else []
    window = min((size for size in windows if isinstance(size, int) and size > 0), default=None)
    if window is not None and (max_length is None or max_length > window):
        _refuse(
            f"layers of {name} see the last {window} tokens, where `max_length={max_length}` lets a response be further from "
            "its prompt",
            f"Set `max_length={window}` or lower",
        )
    implementation = config._attn_implementation  # `None` before a model is loaded: its default
    if implementation is not None and implementation not in _ATTENTION:
        _refuse(
            f"the attention {implementation!r} takes no mask that would keep them apart",
            "Load the model with `attn_implementation='sdpa'`",
        )


def _check_noise(config: PretrainedConfig) -> None:
    noise = [f"`{name}={value}`" for name, value in config.to_dict().items() if _NOISE.fullmatch(name) and value]
    if noise:
        _refuse(
            f"the noise of {', '.join(noise)} in the config of the model would be the same in the prompt of all of them",
            "Set it to 0 there",
        )


def _check_router(config: PretrainedConfig, args: Any) -> None:
    coefficient = args.router_aux_loss_coef
    if coefficient is None:
        coefficient = getattr(config, "router_aux_loss_coef", 0.0)
    if hasattr(config, "output_router_logits") and coefficient != 0:
        _refuse(
            "the router loss of a mixture of experts would count the tokens of the prompt once instead of once a response",
            "Train without it (`router_aux_loss_coef=0.0`)",
        )
