r"""Intuitive Fine-Tuning (IFT), https://huggingface.co/papers/2405.11870.

Alignment from plain (prompt, answer) data: no pairs, no reference model, no sampling. Two changes to SFT:

1. *Temporal residual connection.* A first pass without gradient predicts every answer token from the true prefix. The
   second pass reads, in place of the embedding of each answer token, a mixture with the embedding of that prediction:

       e_t = (1 - lambda) E(x_t) + lambda E(x^_t),      x^_t = argmax_v logits_{t-1}[v]   on trained tokens, else x_t

   so the model is trained on prefixes that lean towards its own. Targets stay the true tokens.
2. *Dynamic relation propagation.* A token is weighted by the discounted loss of what follows it in its document:

       C_t = sum_{i >= t} gamma^(i-t) l_i / N,          w_t = N C_t / sum_s C_s,          L = (1/N) sum_t w_t l_t

   with l_t the negative log-likelihood of the second pass and N the number of trained tokens of the document.

The batch loss is the mean over documents. With lambda = 0 and gamma = 0 it is the mean over documents of SFT's loss.
"""

import functools
import math
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel
from trl import SFTConfig

from ..checks import check_choice, check_range
from ..extension import ExtensionConfig
from ..trl_internals import FusedCausalLMOutput, FusedTap, LMHead, disable_dropout_in_model
from .trainer import SupervisedTrainer


PREDICTIONS = ("argmax", "expected", "topk", "sample")
PROPAGATIONS = ("loss", "mask", "none")
NORMS = ("L1", "L2", "log", "softmax")
SIDES = ("left", "right")
GRADS = ("numerator", "full", "none")
NORMALIZATIONS = ("sequence", "token")


@dataclass
class IFTConfig(ExtensionConfig, SFTConfig):
    r"""
    Configuration class for the [`IFTTrainer`].

    This class includes only the parameters that are specific to Intuitive Fine-Tuning. For a full list of training
    arguments, please refer to the [`~transformers.TrainingArguments`] and [`~trl.SFTConfig`] documentation. Defaults are
    those of the released code, except where the entry says "our choice".

    Parameters:
        > Parameters that control the temporal residual connection

        ift_lambda (`float`, *optional*, defaults to `0.2`):
            Share of the predicted token in the input embedding, in [0, 1]; the maximum when it is scheduled. `0` reads
            the true tokens and costs what SFT costs.
        ift_lambda_schedule (`str`, *optional*):
            `"linear"` raises lambda from `ift_lambda_min` to `ift_lambda` over `ift_lambda_warmup_steps`; constant if
            `None`. In the released code, not reported in the paper.
        ift_lambda_min (`float`, *optional*, defaults to `0.0`):
            Start of the linear schedule, in [0, `ift_lambda`].
        ift_lambda_warmup_steps (`int`, *optional*, defaults to `150`):
            Length of the linear schedule in optimizer steps; independent of the learning-rate warmup.
        ift_lambda_noise_std (`float`, *optional*, defaults to `0.0`):
            Relative standard deviation of a Gaussian disturbance of lambda, drawn once an optimizer step, clamped to
            [0, 1] ("noisy lambda"). The released code uses 0.5 in this mode. Off in evaluation.
        ift_prediction (`str`, *optional*, defaults to `"argmax"`):
            What replaces a trained token: `"argmax"` (the paper), or one of our extensions, which have no reported
            results: `"sample"` (a token drawn at `ift_temperature`), `"expected"` (mean embedding under the predicted
            distribution, without gradient), `"topk"` (the same over the `ift_top_k` likeliest tokens).
        ift_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of `"expected"`, `"topk"` and `"sample"`, > 0.
        ift_top_k (`int`, *optional*):
            Number of tokens of `"topk"`, >= 1. Required there, refused elsewhere.

        > Parameters that control the dynamic relation propagation

        ift_gamma (`float`, *optional*, defaults to `0.95`):
            Discount of later tokens, in [0, 1]. `0` switches the weights off (w = 1), `1` does not discount.
        ift_propagation (`str`, *optional*, defaults to `"loss"`):
            What is propagated: `"loss"` the token losses, `"mask"` ones (position only), `"none"` nothing (w = 1).
        ift_propagation_norm (`str`, *optional*, defaults to `"L1"`):
            Weight as a function of the propagated sum C: `"L1"` C, `"L2"` C squared, `"log"` log(1 + C), `"softmax"` the
            softmax of C over the document. Always rescaled to mean 1 over the trained tokens of a document.
        ift_propagation_side (`str`, *optional*, defaults to `"left"`):
            `"left"` weighs by the losses that follow, `"right"` down by the losses that precede: with u the discounted
            sum of past losses plus its smallest non-zero value in the micro-batch (on which it depends), 1/u takes the
            place of C. `"right"` needs `ift_propagation_grad` `"none"` or `"full"`.
        ift_propagation_grad (`str`, *optional*, defaults to `"numerator"`):
            How gradients pass through the weights. All three have the same loss value. `"numerator"` (our choice):
            through C, not through its normaliser. `"full"` (the released code): through both. `"none"`: the weights are
            constants. `"full"` has NEGATIVE coefficients for tokens much easier than those before them, typically the
            end-of-sequence token, and makes them less likely. `examples/eos_hazard.py` trains on rows of random tokens
            whose end is certain; after 300 steps with lambda 0 (and 0.2), P(EOS) is 0.365 (0.326) with `"full"`, 0.998
            (0.998) with `"numerator"`, 0.913 with `"none"` and 0.998 with SFT (means of 3 seeds).

        > Parameters that control the training

        ift_loss_normalization (`str`, *optional*, defaults to `"sequence"`):
            `"sequence"` (the paper): mean over the documents of the optimizer step, whatever their length. `"token"`: mean
            over its trained tokens, as in SFT. Both are exact under gradient accumulation and several processes (but for
            `ift_propagation_side="right"` and the router loss of MoE models, which are those of the micro-batch).
        ift_freeze_input_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the input embeddings receive no gradient from the inputs, as in the released code. `False` is our
            choice: they are trained as in SFT.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to set the dropout probabilities of the model (attention included) and of its adapters to 0, so that
            both passes agree.
    """

    ift_lambda: float = field(
        default=0.2,
        metadata={"help": "Share of the predicted token in the input embedding, in [0, 1]. 0 reads the true tokens."},
    )
    ift_lambda_schedule: str | None = field(
        default=None,
        metadata={
            "help": "'linear' raises lambda from `ift_lambda_min` over `ift_lambda_warmup_steps`. Default: constant."
        },
    )
    ift_lambda_min: float = field(default=0.0, metadata={"help": "Start of the linear schedule, in [0, ift_lambda]."})
    ift_lambda_warmup_steps: int = field(
        default=150, metadata={"help": "Length of the linear schedule in optimizer steps."}
    )
    ift_lambda_noise_std: float = field(
        default=0.0,
        metadata={"help": "Relative standard deviation of Gaussian noise on lambda, one draw an optimizer step."},
    )
    ift_prediction: str = field(
        default="argmax",
        metadata={
            "help": "What replaces a trained token: its 'argmax' prediction (the paper), a 'sample', the 'expected' "
            "embedding, or the expected embedding over the 'topk'.",
            "choices": list(PREDICTIONS),
        },
    )
    ift_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of the predictions 'expected', 'topk' and 'sample'."}
    )
    ift_top_k: int | None = field(default=None, metadata={"help": "Number of tokens of the prediction 'topk'."})
    ift_gamma: float = field(
        default=0.95, metadata={"help": "Discount of later tokens in the weights, in [0, 1]. 0 switches them off."}
    )
    ift_propagation: str = field(
        default="loss",
        metadata={
            "help": "What is propagated: token losses ('loss'), ones ('mask'), or nothing ('none').",
            "choices": list(PROPAGATIONS),
        },
    )
    ift_propagation_norm: str = field(
        default="L1",
        metadata={"help": "Weight as a function of the propagated sum.", "choices": list(NORMS)},
    )
    ift_propagation_side: str = field(
        default="left",
        metadata={
            "help": "Weigh by the losses that follow ('left'), or down by those that precede ('right').",
            "choices": list(SIDES),
        },
    )
    ift_propagation_grad: str = field(
        default="numerator",
        metadata={
            "help": "Gradient through the weights: 'numerator' (not through their normaliser), 'full' (the released code; "
            "makes easy tokens such as EOS less likely), 'none'. The loss value is the same.",
            "choices": list(GRADS),
        },
    )
    ift_loss_normalization: str = field(
        default="sequence",
        metadata={
            "help": "Mean over documents ('sequence', the paper) or over trained tokens ('token', as in SFT).",
            "choices": list(NORMALIZATIONS),
        },
    )
    ift_freeze_input_embeddings: bool = field(
        default=False,
        metadata={
            "help": "Whether the input embeddings receive no gradient from the inputs, as in the released code."
        },
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Whether to set all dropout probabilities to 0."})

    def __post_init__(self):
        check_range("ift_lambda", self.ift_lambda, 0, 1)
        check_range("ift_gamma", self.ift_gamma, 0, 1)
        check_range("ift_lambda_noise_std", self.ift_lambda_noise_std, 0)
        check_range("ift_temperature", self.ift_temperature, 0, low_open=True)
        check_choice("ift_prediction", self.ift_prediction, PREDICTIONS)
        check_choice("ift_propagation", self.ift_propagation, PROPAGATIONS)
        check_choice("ift_propagation_norm", self.ift_propagation_norm, NORMS)
        check_choice("ift_propagation_side", self.ift_propagation_side, SIDES)
        check_choice("ift_propagation_grad", self.ift_propagation_grad, GRADS)
        check_choice("ift_loss_normalization", self.ift_loss_normalization, NORMALIZATIONS)
        self._check_schedule()
        self._check_prediction()
        self._check_propagation()
        super().__post_init__()
        if self.loss_type != "nll":
            raise ValueError(
                f"`loss_type={self.loss_type!r}` is another loss than IFT's. Leave it at 'nll', or use `trl.SFTTrainer`."
            )
        if self.label_smoothing_factor != 0:
            raise ValueError(
                "`label_smoothing_factor` is not supported: it needs full logits, which IFT does not build. Set it to 0."
            )

    def _check_propagation(self) -> None:
        off, idle = None, {}
        if self.ift_propagation == "none":
            off = "ift_propagation='none'"
            idle = {
                "gamma": 0.95,
                "propagation_norm": "L1",
                "propagation_side": "left",
                "propagation_grad": "numerator",
            }
        elif self.ift_gamma == 0:
            off = "ift_gamma=0"
            idle = {"propagation_norm": "L1", "propagation_side": "left", "propagation_grad": "numerator"}
        elif self.ift_propagation == "mask":
            off, idle = "ift_propagation='mask', whose weights have no gradient", {"propagation_grad": "numerator"}
        for name, default in idle.items():
            if getattr(self, f"ift_{name}") != default:
                raise ValueError(f"`ift_{name}` has no effect with `{off}`. Drop one of the two.")
        if (
            self.ift_propagation_side == "right"
            and self.ift_propagation == "loss"
            and self.ift_propagation_grad == "numerator"
        ):
            raise ValueError(
                "`ift_propagation_side='right'` needs `ift_propagation_grad='none'` (or 'full', the released code): its "
                "weights fall with the losses, and without the gradient of their normaliser a step can raise the loss."
            )

    def _check_schedule(self) -> None:
        if self.ift_lambda_schedule is not None:
            check_choice("ift_lambda_schedule", self.ift_lambda_schedule, ("linear",))
            check_range("ift_lambda_min", self.ift_lambda_min, 0, self.ift_lambda)
            check_range("ift_lambda_warmup_steps", self.ift_lambda_warmup_steps, 1, integer=True)
        elif self.ift_lambda_min != 0.0 or self.ift_lambda_warmup_steps != 150:
            raise ValueError(
                "`ift_lambda_min` and `ift_lambda_warmup_steps` act only on a schedule. Set `ift_lambda_schedule='linear'`, "
                "or drop them."
            )
        if self.ift_lambda == 0 and self.ift_lambda_noise_std != 0:
            raise ValueError(
                "`ift_lambda_noise_std` is relative to `ift_lambda`, and has no effect with `ift_lambda=0`."
            )

    def _check_prediction(self) -> None:
        if self.ift_lambda == 0 and self.ift_prediction != "argmax":
            raise ValueError(
                "`ift_prediction` has no effect with `ift_lambda=0`: nothing is replaced. Drop one of the two."
            )
        if self.ift_prediction == "topk":
            if self.ift_top_k is None:
                raise ValueError("`ift_prediction='topk'` needs `ift_top_k`, the number of tokens to keep.")
            check_range("ift_top_k", self.ift_top_k, 1, integer=True)
        elif self.ift_top_k is not None:
            raise ValueError(
                f"`ift_top_k` has no effect with `ift_prediction={self.ift_prediction!r}`. Set `ift_prediction='topk'`, or "
                "drop it."
            )
        if self.ift_prediction == "argmax" and self.ift_temperature != 1.0:
            raise ValueError(
                "`ift_temperature` has no effect with `ift_prediction='argmax'`. Choose 'expected', 'topk' or 'sample', or "
                "drop it."
            )

    @classmethod
    def official(cls, output_dir: str | None = None, **overrides: Any) -> "IFTConfig":
        """The settings of the released code (full fine-tuning of 7B models): gradient, embeddings, optimizer, schedule.

        RMSprop at 5e-7, cosine to 0 after 15 % warmup, 3 epochs, 512 rows a step (8 x 64 accumulation steps on one process;
        divide the latter by the number of processes), `max_length` 1024, gradient norm 10. The released code also keeps
        weights and optimizer in bfloat16 without float32 masters: load the model so (`model_init_kwargs={"dtype":
        "bfloat16"}`) for its numerics. `overrides` win.
        """
        settings: dict[str, Any] = {
            "ift_propagation_grad": "full",
            "ift_freeze_input_embeddings": True,
            "optim": "rmsprop",
            "learning_rate": 5e-7,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.15,
            "num_train_epochs": 3,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 64,
            "max_length": 1024,
            "max_grad_norm": 10.0,
        }
        if overrides.get("ift_propagation", "loss") != "loss" or overrides.get("ift_gamma") == 0:
            del settings["ift_propagation_grad"]  # the weights have no gradient
        return cls(output_dir=output_dir, **{**settings, **overrides})


# --------------------------------------------------------------------------------------------- the loss, on tensors


def lambda_at_step(
    step: int,
    ift_lambda: float,
    schedule: str | None = None,
    minimum: float = 0.0,
    warmup_steps: int = 150,
    noise_std: float = 0.0,
    seed: int = 0,
) -> float:
    """Lambda of an optimizer step: constant or linear warmup, then relative noise, then clamped to [0, 1].

    Args:
        step: Number of optimizer steps completed.
        ift_lambda: Constant value, or the end of the schedule.
        schedule: `None` or `"linear"`.
        minimum: Start of the schedule.
        warmup_steps: Length of the schedule.
        noise_std: Standard deviation of the noise, relative to lambda.
        seed: The draw depends on (`seed`, `step`) only, so a resumed run repeats it and all processes agree.
    """
    value = ift_lambda
    if schedule == "linear":
        value = minimum + (ift_lambda - minimum) * min(1.0, step / warmup_steps)
    if noise_std > 0:
        generator = torch.Generator().manual_seed(_mix_seeds(seed, step))
        value += torch.randn((), generator=generator, dtype=torch.float64).item() * noise_std * value
    return min(1.0, max(0.0, value))


def _mix_seeds(*numbers: int) -> int:
    """One 63-bit seed from several small numbers, different for every tuple in practice."""
    seed = 0
    for number in numbers:
        seed = (seed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return seed


def fuse_embeddings(true: torch.Tensor, predicted: torch.Tensor, ift_lambda: float) -> torch.Tensor:
    """(1 - lambda) `true` + lambda `predicted`, any equal shapes; bitwise `true` where both are equal."""
    return torch.lerp(true, predicted, ift_lambda)


def discounted_future_sum(values: torch.Tensor, documents: torch.Tensor, gamma: float) -> torch.Tensor:
    """y_t = sum over i >= t in the document of t of gamma^(i-t) values_i, along the last dimension.

    By doubling: O(T log T), no (T, T) matrix, no gamma^-T; differentiable.

    Args:
        values: (..., T).
        documents: (..., T), integer id of the document of each position; a document is contiguous.
        gamma: Discount in [0, 1].
    """
    total, shift, length = values, 1, values.size(-1)
    while shift < length:
        same = documents[..., shift:] == documents[..., :-shift]
        ahead = torch.where(same, total[..., shift:], 0.0)
        total = total + gamma**shift * F.pad(ahead, (0, shift))
        shift *= 2
    return total


def sum_by_document(values: torch.Tensor, documents: torch.Tensor, num_documents: int) -> torch.Tensor:
    """Sums of `values` (any shape, like `documents`) per document id, shape (num_documents,)."""
    return values.new_zeros(num_documents).index_add(0, documents.flatten(), values.flatten())


class DocumentLoss(NamedTuple):
    """Losses of the documents of a batch.

    Attributes:
        loss: (D,), weighted mean negative log-likelihood; 0 for a document without a trained token.
        num_tokens: (D,), trained tokens.
        weights: (B, T), weight of each trained token (mean 1 a document), 0 elsewhere.
    """

    loss: torch.Tensor
    num_tokens: torch.Tensor
    weights: torch.Tensor


def ift_document_loss(
    nll: torch.Tensor,
    mask: torch.Tensor,
    documents: torch.Tensor,
    num_documents: int,
    gamma: float = 0.95,
    propagation: str = "loss",
    norm: str = "L1",
    side: str = "left",
    grad: str = "numerator",
) -> DocumentLoss:
    """Dynamic relation propagation: L_d = (1/N_d) sum_t w_t nll_t for every document d.

    Args:
        nll: (B, T), negative log-likelihoods in nats; ignored where `mask` is false.
        mask: (B, T), whether the position predicts a trained token.
        documents: (B, T), document id in [0, `num_documents`) of each position; documents are contiguous.
        num_documents: D.
        gamma: Discount in [0, 1]; 0 means w = 1 (it is not the limit gamma -> 0).
        propagation: `"loss"`, `"mask"` or `"none"`.
        norm: `"L1"`, `"L2"`, `"log"` or `"softmax"`.
        side: `"left"` (losses that follow) or `"right"` (losses that precede).
        grad: `"numerator"`, `"full"` or `"none"`; the value does not depend on it.
    """
    nll = torch.where(mask, nll, 0.0)
    counts = sum_by_document(mask.to(nll.dtype), documents, num_documents)
    counts_here = counts[documents]
    if gamma == 0 or propagation == "none":
        weights = mask.to(nll.dtype)
    else:
        if propagation == "loss":
            items = nll / counts_here.clamp(min=1)
        else:
            items = mask.to(nll.dtype)
        if grad == "none":
            items = items.detach()
        scores = _propagation_scores(items, mask, documents, num_documents, gamma, norm, side)
        scores = torch.where(mask, scores, 0.0)
        normaliser = sum_by_document(scores, documents, num_documents)
        if grad == "numerator":
            normaliser = normaliser.detach()
        # A document whose losses are all 0 has no direction to propagate: w = 1
        empty = (normaliser == 0)[documents]
        safe = torch.where(normaliser == 0, 1.0, normaliser)[documents]
        weights = torch.where(empty, mask.to(nll.dtype), counts_here * scores / safe)
    loss = sum_by_document(weights * nll, documents, num_documents) / counts.clamp(min=1)
    return DocumentLoss(loss, counts, weights)


def _propagation_scores(
    items: torch.Tensor,
    mask: torch.Tensor,
    documents: torch.Tensor,
    num_documents: int,
    gamma: float,
    norm: str,
    side: str,
) -> torch.Tensor:
    """The weights up to a constant factor a document, (B, T); finite everywhere, meaningful on `mask`."""
    if side == "left":
        reach = discounted_future_sum(items, documents, gamma)
    else:
        past = discounted_future_sum(items.flip(-1), documents.flip(-1), gamma).flip(-1)
        candidates = torch.where(mask & (past > 0), past, math.inf).flatten()
        smallest = torch.cat([candidates, candidates.new_full((1,), math.inf)]).amin()
        # All losses 0: any constant gives w = 1
        past = past + torch.where(torch.isfinite(smallest), smallest, 1.0)
        reach = 1 / torch.log1p(past) if norm == "log" else 1 / past
    if norm == "log":
        return torch.log1p(reach) if side == "left" else reach
    peaks = _max_by_document(torch.where(mask, reach, 0.0).detach(), documents, num_documents)[documents]
    if norm == "softmax":  # over the trained tokens of the document; the caller divides by the sum
        return torch.exp(torch.where(mask, reach - peaks, -math.inf))
    # Scale-free, so divided by the largest: the square and its gradient stay in the range of float32
    reach = reach / torch.where(peaks > 0, peaks, 1.0)
    return reach if norm == "L1" else reach**2


def _max_by_document(values: torch.Tensor, documents: torch.Tensor, num_documents: int) -> torch.Tensor:
    return values.new_zeros(num_documents).scatter_reduce(0, documents.flatten(), values.flatten(), "amax")


def loss_coefficients(
    nll: torch.Tensor, mask: torch.Tensor, documents: torch.Tensor, num_documents: int, *options: Any
) -> torch.Tensor:
    """dL_d / d nll_t of `ift_document_loss` (same arguments), (B, T): how much a step lowers each token's loss."""
    with torch.enable_grad():
        nll = nll.detach().requires_grad_(True)
        loss = ift_document_loss(nll, mask, documents, num_documents, *options).loss
        return torch.autograd.grad(loss.sum(), nll)[0]


# ------------------------------------------------------------------------------------------------ the two-pass forward


def disable_dropout(model: torch.nn.Module) -> None:
    """Set all dropout probabilities to 0: those of `nn.Dropout` and those that modules keep as numbers (attention)."""
    disable_dropout_in_model(model)
    for module in model.modules():
        for name, value in vars(module).items():
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, 0.0)


@dataclass
class TwoPassOutput(FusedCausalLMOutput):
    """Fused output of the second pass, with sums over the trained tokens of the first.

    Attributes:
        sft_nll_sum: Negative log-likelihood of the true tokens on the true inputs.
        match_sum: Number of predictions equal to the true token.
    """

    sft_nll_sum: torch.Tensor | None = None
    match_sum: torch.Tensor | None = None


def add_two_pass_forward(
    model: PreTrainedModel, prediction: str, temperature: float, top_k: int | None, freeze_input_embeddings: bool
) -> None:
    """Give `model` both passes of IFT inside one forward: `model(..., fused_lm_head=True, ift_lambda=0.2)`.

    `model` must carry TRL's fused LM head. Without `ift_lambda` its forward is unchanged. One call of the wrapped model a
    step keeps the hooks of DDP, FSDP and ZeRO valid. Returns a [`TwoPassOutput`].

    Args:
        model: Base causal language model (not the PEFT wrapper).
        prediction: `"argmax"`, `"expected"`, `"topk"` or `"sample"`.
        temperature: Temperature of the last three.
        top_k: Number of tokens of `"topk"`.
        freeze_input_embeddings: Whether to cut the gradient to the embeddings from the inputs.
    """
    # The function, not the bound method: a copy of the model then runs its own weights
    fused_forward = model.forward.__func__
    head = LMHead.of(model)

    # Keep the original signature: `generate` validates its arguments against it
    @functools.wraps(type(model).forward)
    def two_pass_forward(
        self, *args, ift_lambda: float | None = None, ift_seed: int = 0, **kwargs
    ) -> TwoPassOutput | Any:
        if ift_lambda is None:
            return fused_forward(self, *args, **kwargs)
        if ift_lambda == 0 and not freeze_input_embeddings:
            return _with_sums(fused_forward(self, *args, **kwargs))

        input_ids, labels = kwargs.pop("input_ids"), kwargs["labels"]
        kwargs.pop("inputs_embeds", None)
        embed = self.get_input_embeddings()
        # Calling the module keeps Gemma's scaling, adapters and quantized tables right
        embeddings = embed(input_ids)
        if freeze_input_embeddings:
            embeddings = embeddings.detach()
        sums: dict[str, torch.Tensor] = {}
        if ift_lambda > 0:
            rows, columns = (labels[:, 1:] != -100).nonzero(as_tuple=True)
            targets = labels[rows, columns + 1]
            device_type = input_ids.device.type
            autocast = torch.autocast(
                device_type,
                dtype=torch.get_autocast_dtype(device_type),
                enabled=torch.is_autocast_enabled(device_type),
                # Casts made without gradient would be re-used by the second pass, and its weights get no gradient
                cache_enabled=False,
            )
            with torch.no_grad(), autocast, _without_checkpointing(self):
                skipped = ("labels", "fused_lm_head", "num_items_in_batch", "output_router_logits", "use_cache")
                first = self.base_model(
                    inputs_embeds=embeddings,
                    use_cache=False,
                    **{name: value for name, value in kwargs.items() if name not in skipped},
                )
                states = first.last_hidden_state
                # With the model split over devices, the backbone can end on another one
                hidden = states[rows.to(states.device), columns.to(states.device)]
                del first, states
                tokens, mixed, sums["sft_nll_sum"] = _predict(
                    self, head, hidden, targets, prediction, temperature, top_k, ift_seed
                )
            sums["match_sum"] = (tokens == targets).sum()
            predicted = embed(tokens[None])[0] if mixed is None else mixed
            if freeze_input_embeddings:
                predicted = predicted.detach()
            positions = (rows, columns + 1)
            embeddings = embeddings.index_put(
                positions, fuse_embeddings(embeddings[positions], predicted.to(embeddings), ift_lambda)
            )
        if freeze_input_embeddings and torch.is_grad_enabled():
            embeddings.requires_grad_(True)  # reentrant checkpointing drops the gradients of inputs without it
        return _with_sums(fused_forward(self, inputs_embeds=embeddings, **kwargs), **sums)

    model.forward = types.MethodType(two_pass_forward, model)


@contextmanager
def _without_checkpointing(model: torch.nn.Module) -> Iterator[None]:
    """Switch gradient checkpointing off: a pass without gradient saves nothing, and reentrant checkpoints would warn."""
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True


def _with_sums(
    output: FusedCausalLMOutput, sft_nll_sum: torch.Tensor | None = None, match_sum: torch.Tensor | None = None
) -> TwoPassOutput:
    """Add the sums of the first pass; where it was skipped, both passes are the same."""
    if sft_nll_sum is None:
        sft_nll_sum, match_sum = -output.log_probs.detach().sum(), output.is_top1.sum()
    return TwoPassOutput(**output, sft_nll_sum=sft_nll_sum, match_sum=match_sum)


def _predict(
    model: PreTrainedModel,
    head: LMHead,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    prediction: str,
    temperature: float,
    top_k: int | None,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Predict the tokens at N positions from their hidden states (N, H), tile by tile, without gradient.

    Returns:
        Predicted token ids (N,) (the likeliest for `"expected"` and `"topk"`), mean embeddings (N, H) or `None` where the
        prediction is one token, and the summed negative log-likelihood of `targets` (N,).
    """
    tokens = torch.empty_like(targets)
    nll = torch.zeros((), dtype=torch.float32, device=hidden.device)
    mixed: Any = None
    table: Any = None
    if prediction in ("expected", "topk"):
        # Once a step on every process, however many tiles it has: sharded embeddings are gathered together
        embed = model.get_input_embeddings()
        vocabulary = torch.arange(model.get_output_embeddings().weight.size(0), device=targets.device)
        table = embed(vocabulary[None])[0].to(hidden.device)
        mixed = torch.empty_like(hidden)
    generator = torch.Generator(hidden.device).manual_seed(seed) if prediction == "sample" else None
    for tile, logits in head.logit_tiles(model, hidden):
        best, likeliest = logits.max(-1)
        true_logits = logits.gather(-1, targets[tile, None].to(logits.device)).squeeze(-1)
        if prediction == "sample":
            # Gumbel-max: log p_v - log(Exp(1)) is largest for v with probability p_v
            noise = torch.empty_like(logits).exponential_(generator=generator)
            likeliest = (logits / temperature - noise.log()).argmax(-1)
        elif prediction == "expected":
            probabilities = (logits / temperature).softmax(-1).to(table)
            mixed[tile] = (probabilities @ table).to(mixed.dtype)
        elif prediction == "topk":
            top, ids = (logits / temperature).topk(min(top_k or 1, logits.size(-1)), dim=-1)
            probabilities = top.softmax(-1).to(table)
            mixed[tile] = (probabilities[:, None] @ table[ids.to(table.device)])[:, 0].to(mixed.dtype)
        tokens[tile] = likeliest
        # log-sum-exp with the maximum at hand, in the tile itself
        log_sum = best + logits.sub_(best[:, None]).exp_().sum(-1).log()
        nll += (log_sum - true_logits).sum().to(nll.device)
    return tokens, mixed, nll


# ---------------------------------------------------------------------------------------------------------- trainer


def _refuse_split_sequences(parallelism: Any) -> None:
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError(
            "IFT does not support context or sequence parallelism: its weights need whole documents on one process. Set "
            "`cp_size` and `sp_size` to 1."
        )


class IFTTrainer(SupervisedTrainer):
    """
    Trainer for Intuitive Fine-Tuning (IFT).

    It takes the arguments and the datasets of [`~trl.SFTTrainer`] and trains on the same data; only the inputs of the
    answer tokens and the weights of their losses differ (see the module's docstring). Only tokens with a label are scored
    and replaced, so use `completion_only_loss` or `assistant_only_loss`.

    Logged beside TRL's metrics: `sft_loss` (teacher-forced negative log-likelihood of the first pass in nats a token, which
    compares with SFT's loss), `ift/fused_loss` (of the second pass, unweighted), `ift/lambda`, `ift/greedy_match` (share of
    predictions equal to the true token) and, with `ift_propagation_grad="full"`, `ift/negative_coefficients` (share of
    tokens that a step makes less likely). `entropy` and `mean_token_accuracy` describe the second pass.

    Example:

    ```python
    from datasets import load_dataset
    from trl_ift import IFTTrainer

    trainer = IFTTrainer(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        train_dataset=load_dataset("trl-lib/tldr", split="train"),
    )
    trainer.train()
    ```

    Raises:
        TypeError: `args` is not an [`IFTConfig`]; a column has the wrong type.
        ValueError: Empty dataset, missing columns, no trainable token, prompt-learning PEFT, an adapter on `lm_head`, a
            vision dataset, `compute_loss_func`, context or sequence parallelism, a model that needs `input_ids` beside
            embeddings.
    """

    config_class = IFTConfig
    method = "ift"
    _tag_names = ["trl", "trl-ift", "ift"]  # noqa: RUF012
    _name = "IFT"
    _paper = {  # noqa: RUF012
        "title": "Intuitive Fine-Tuning: Towards Simplifying Alignment into a Single Process",
        "id": "2405.11870",
        "citation": """\
@inproceedings{hua2025intuitive,
    title     = {{Intuitive Fine-Tuning: Towards Simplifying Alignment into a Single Process}},
    author    = {Ermo Hua and Biqing Qi and Kaiyan Zhang and Kai Tian and Xingtai Lv and Ning Ding and Bowen Zhou},
    year      = 2025,
    booktitle = {Proceedings of the 63rd Annual Meeting of the Association for Computational Linguistics},
    note      = {arXiv:2405.11870},
}""",
    }

    @staticmethod
    def _check_model_config(args: IFTConfig, config: PretrainedConfig) -> None:
        if getattr(config.get_text_config(), "hidden_size_per_layer_input", None):
            raise ValueError(
                f"`{config.model_type}` models with per-layer embeddings read the token ids; IFT feeds mixtures of embeddings, "
                "which have no id. Use another model, or `trl.SFTTrainer`."
            )
        _refuse_split_sequences(args.parallelism_config)

    def _patch_model(self, base_model: PreTrainedModel) -> None:
        _refuse_split_sequences(self.accelerator.parallelism_config)  # an accelerate config file may ask for it
        # The loss is ours, whatever the model's forward takes: count the items of a step
        self.model_accepts_loss_kwargs = True
        if self.args.disable_dropout:
            disable_dropout(self.model)
        if self.args.ift_freeze_input_embeddings:
            self._freeze_input_embeddings(base_model)
        add_two_pass_forward(
            base_model,
            self.args.ift_prediction,
            self.args.ift_temperature,
            self.args.ift_top_k,
            self.args.ift_freeze_input_embeddings,
        )
        self._drawn = (-1, 0)  # (optimizer step, micro-batches of it seen): seeds of `ift_prediction="sample"`

    def _freeze_input_embeddings(self, base_model: PreTrainedModel) -> None:
        embeddings, head = base_model.get_input_embeddings(), base_model.get_output_embeddings()
        trainable = [name for name, parameter in embeddings.named_parameters() if parameter.requires_grad]
        if isinstance(self.model, PeftModel):
            if trainable:
                raise ValueError(
                    f"`ift_freeze_input_embeddings=True`, but PEFT trains the input embeddings ({', '.join(trainable)}). "
                    "Drop one of the two."
                )
        elif embeddings.weight is not head.weight:
            embeddings.weight.requires_grad_(False)  # DDP waits for gradients of all others

    def _current_lambda(self, training: bool) -> float:
        args = self.args
        return lambda_at_step(
            self.state.global_step,
            args.ift_lambda,
            args.ift_lambda_schedule,
            args.ift_lambda_min,
            args.ift_lambda_warmup_steps,
            args.ift_lambda_noise_std if training else 0.0,
            args.seed,
        )

    def _next_seed(self, training: bool) -> int:
        """Seed of the sampled predictions: a function of step, micro-batch and process, so that a resumed run repeats it."""
        if not training:
            return _mix_seeds(self.args.seed, self.args.process_index)
        step, count = self._drawn
        count = count + 1 if step == self.state.global_step else 0
        self._drawn = (self.state.global_step, count)
        return _mix_seeds(self.args.seed, self.state.global_step, count, self.args.process_index)

    @staticmethod
    def _documents(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        """Document id of each token, (B, T), and the number of documents: rows, or segments of a padding-free batch."""
        input_ids = inputs["input_ids"]
        if "attention_mask" not in inputs and "position_ids" in inputs:
            starts = (inputs["position_ids"] == 0).flatten()
            cu_seq_lens = inputs.get("cu_seq_lens_q")
            number = int(starts.sum()) + 1 if cu_seq_lens is None else cu_seq_lens.numel()
            return starts.cumsum(0).view_as(input_ids), number  # ids from 1; 0 is what precedes the first start
        rows = torch.arange(input_ids.size(0), device=input_ids.device)
        return rows[:, None].expand_as(input_ids), input_ids.size(0)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in TRL, but counts documents for `ift_loss_normalization="sequence"`."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if num_items is None or self.args.ift_loss_normalization == "token":
            return batches, num_items
        num_documents = torch.zeros((), dtype=torch.long, device=device)
        for batch in batches:
            documents, number = self._documents(batch)
            trained = sum_by_document((batch["labels"][:, 1:] != -100).long(), documents[:, :-1], number)
            num_documents += (trained > 0).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            # Tensor parallel ranks have the same batch
            num_documents = self.accelerator.gather(num_documents).sum() // self.get_tp_size()
        return batches, num_documents

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        training = self.model.training
        tap = FusedTap(model, ift_lambda=self._current_lambda(training), ift_seed=self._next_seed(training))
        # TRL computes its metrics from the second pass; its loss is dropped
        base = super().compute_loss(tap, inputs, return_outputs, num_items_in_batch)
        outputs: TwoPassOutput = tap.output

        args = self.args
        nll = -outputs.log_probs
        documents, num_documents = self._documents(inputs)
        documents = documents[:, :-1].to(nll.device)
        options = (args.ift_gamma, args.ift_propagation, args.ift_propagation_norm, args.ift_propagation_side)
        result = ift_document_loss(
            nll, outputs.label_mask, documents, num_documents, *options, args.ift_propagation_grad
        )
        if args.ift_loss_normalization == "token":
            total, local_items = (result.loss * result.num_tokens).sum(), result.num_tokens.sum()
        else:
            total, local_items = result.loss.sum(), (result.num_tokens > 0).sum()
        num_items = local_items if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = total / num_items.to(total.device).clamp(min=1)
        if num_items_in_batch is not None and args.average_tokens_across_devices:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())  # DDP averages the processes
        if self.aux_loss_enabled:
            steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps

        num_tokens = outputs.label_mask.sum()
        self._record_mean("sft_loss", outputs.sft_nll_sum, num_tokens)
        self._record_mean("ift/fused_loss", nll.sum(), num_tokens)
        self._record_mean("ift/greedy_match", outputs.match_sum, num_tokens)
        if args.ift_propagation_grad == "full":
            coefficients = loss_coefficients(nll, outputs.label_mask, documents, num_documents, *options, "full")
            self._record_mean("ift/negative_coefficients", (coefficients < 0).sum(), num_tokens)
        self._metrics["train" if training else "eval"]["ift/lambda"].append(tap.fused_kwargs["ift_lambda"])
        return (loss, base[1]) if return_outputs else loss
