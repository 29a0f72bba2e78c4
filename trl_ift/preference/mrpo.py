r"""Multi-Reference Preference Optimization (MRPO), https://huggingface.co/papers/2405.16388.

DPO against several frozen references in place of one: reference 0 is the starting policy, references 1, 2, ... are other
models, whose log-probabilities are stored before training. With lp_k(y) = log ref_k(y|x), a sum over the tokens of y under
the model's own tokenizer, and weights alpha_k of a pair that add up to 1, the references are mixed into a virtual one,

    log ref~(y|x) = - log sum_k alpha_k exp( - lp_k(y) )                                    "harmonic"

    L = - log sigma( beta [ (log pi - log ref~)(y_w|x) - (log pi - log ref~)(y_l|x) ] )

which comes from an upper bound of sum_k alpha_k KL(pi || ref_k). Without the bound the closed form is the "geometric" mixture
log ref~ = sum_k alpha_k lp_k (not in the paper). Weights and references are constants for the gradient.

Before the mixture each lp_k, k >= 1, is clipped to a trust region around lp_0, separately for y_w and y_l:

    lp_k(y) in [ (1 + eps_y) lp_0(y), (1 - eps_y) lp_0(y) ]

    b(y) = mean_k lp_k(y);  eps_w = eps |b(y_w)| / ( |b(y_w)| + |b(y_l)| ),  eps_l = eps - eps_w        adaptive

Weights, with m_k = |lp_k(y_w) - lp_k(y_l)| before the clip:

    "arwc"             alpha_k = m_k / sum_j m_j: the more a reference discriminates, the more it counts
    "official_code"    two references: alpha_0 = m_1 / (m_0 + m_1 + 1e-6), alpha_1 = 1 - alpha_0, the reverse
    "uniform", "fixed"

"official_code" is what the released code's expression expands to: the weight computed from reference 1 multiplies reference 0.
(The formula that the paper prints could not be checked.) The baseline "multi_dpo" is sum_k alpha_k DPO(ref_k).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from transformers.utils import logging

from ..checks import check_choice, check_range, check_unused
from ..data.caching import versioned
from ..data.fingerprint import base_model
from ..data.references import check_references, reference_columns, score_references
from ..data.rows import first_row
from ..hub.paper import arxiv_paper
from .collator import Column
from .trainer import PairLossConfig, PreferenceBatch, PreferenceTrainer


MODES = ("mrpo", "multi_dpo")
MIXTURES = ("harmonic", "geometric")
WEIGHT_MODES = ("arwc", "uniform", "fixed", "official_code")

logger = logging.get_logger(__name__)


@dataclass
class MRPOConfig(PairLossConfig):
    r"""
    Configuration class for the [`MRPOTrainer`].

    This class includes only the parameters that are specific to MRPO. `beta` is that of DPO, 0.1.

    Parameters:
        ref_models (`list[str]`, *optional*):
            Hub ids or folders of the references 1, 2, ...; each is loaded once, scores the pairs, and is freed. They get the
            policy's `dtype` and `attn_implementation`. Without it the dataset must have the columns `ref1_chosen_logps`,
            `ref1_rejected_logps`, ... of [`~trl_ift.data.score_references`].
        mrpo_mode (`str`, *optional*, defaults to `"mrpo"`):
            `"mrpo"`: DPO against the mixture. `"multi_dpo"`: the mixture of the DPO losses against each reference.
        mrpo_mixture (`str`, *optional*, defaults to `"harmonic"`):
            Mixture of `"mrpo"`: `"harmonic"` (the paper's) or `"geometric"` (not in the paper).
        ctro_eps (`float`, *optional*, defaults to `0.1`):
            Radius of the trust region around reference 0, >= 0, as a share of its log-probability. `0` is DPO with reference
            0 alone, `None` no clip (a number as large as 1e9 has the effect of `None`, where that cannot be written).
        ctro_adaptive (`bool`, *optional*, defaults to `True`):
            Whether `ctro_eps` is shared out between chosen and rejected by the size of their log-probabilities; otherwise
            both have all of it.
        weight_mode (`str`, *optional*, defaults to `"arwc"`):
            Weights of the references: `"arwc"`, `"uniform"`, `"fixed"` (`ref_weights`) or `"official_code"` (two references).
        ref_weights (`list[float]`, *optional*):
            Weights of `weight_mode="fixed"`, reference 0 first, >= 0 and adding up to 1.
    """

    ref_models: list[str] | None = field(
        default=None,
        metadata={"help": "Hub ids or folders of the references beside the starting policy; scored once, then freed."},
    )
    mrpo_mode: str = field(
        default="mrpo",
        metadata={"help": "DPO against a mixture of references, or a mixture of DPO losses.", "choices": list(MODES)},
    )
    mrpo_mixture: str = field(
        default="harmonic",
        metadata={"help": "Mixture of the references; 'geometric' is not in the paper.", "choices": list(MIXTURES)},
    )
    ctro_eps: float | None = field(
        default=0.1,
        metadata={"help": "Radius of the trust region around the starting policy, a share of its log-probability."},
    )
    ctro_adaptive: bool = field(
        default=True, metadata={"help": "Whether chosen and rejected share the radius by their log-probabilities."}
    )
    weight_mode: str = field(
        default="arwc", metadata={"help": "Weights of the references.", "choices": list(WEIGHT_MODES)}
    )
    ref_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of weight_mode 'fixed', that of the starting policy first."}
    )

    def __post_init__(self):
        check_choice("mrpo_mode", self.mrpo_mode, MODES)
        check_choice("mrpo_mixture", self.mrpo_mixture, MIXTURES)
        check_choice("weight_mode", self.weight_mode, WEIGHT_MODES)
        if self.ctro_eps is not None:
            check_range("ctro_eps", self.ctro_eps, 0)
        if not self.ctro_eps:
            check_unused(self, ["ctro_adaptive"], f"with `ctro_eps={self.ctro_eps}`")
        if self.mrpo_mode == "multi_dpo":
            check_unused(self, ["mrpo_mixture"], "with `mrpo_mode='multi_dpo'`, which mixes losses")
        if self.ref_models is not None and (not self.ref_models or isinstance(self.ref_models, str)):
            raise ValueError(
                f"`ref_models={self.ref_models!r}` must be a list of Hub ids or folders: the references beside the starting "
                "policy. Give one or more, or drop it and store their log-probabilities in the dataset."
            )
        self._check_weights()
        if self.ld_alpha is not None:
            raise ValueError(
                f"`ld_alpha={self.ld_alpha}` weighs the tokens of a response, and of the references only sums over all of them "
                "are stored. Drop it."
            )
        if self.sync_ref_model:
            raise ValueError(
                "`sync_ref_model=True` moves the reference during training; those of MRPO are fixed, and their "
                "log-probabilities stored. Drop it."
            )
        super().__post_init__()

    def _check_weights(self) -> None:
        weights = self.ref_weights
        if self.weight_mode != "fixed":
            check_unused(self, ["ref_weights"], f"with `weight_mode={self.weight_mode!r}`")
        elif weights is None:
            raise ValueError("`weight_mode='fixed'` needs `ref_weights`: one number a reference, the policy's first.")
        else:
            for weight in weights:
                check_range("ref_weights", weight, 0, 1)
            if abs(sum(weights) - 1) > 1e-3:
                raise ValueError(f"`ref_weights={weights}` add up to {sum(weights):g}. They must add up to 1.")
        if self.ref_models is not None:
            self.check_number(len(self.ref_models) + 1)

    def check_number(self, references: int) -> None:
        """Raise if the weights are not those of so many references, the starting policy counted."""
        if self.ref_weights is not None and len(self.ref_weights) != references:
            raise ValueError(
                f"`ref_weights` has {len(self.ref_weights)} numbers for {references} references (the starting policy is the "
                "first). Give one a reference."
            )
        if self.weight_mode == "official_code" and references != 2:
            raise ValueError(
                f"`weight_mode='official_code'` is defined for two references; there are {references}. Choose 'arwc'."
            )


def reference_weights(
    ref_chosen: torch.Tensor, ref_rejected: torch.Tensor, mode: str, fixed: Sequence[float] | None = None
) -> torch.Tensor:
    """Weights of K references in B pairs, (K, B), adding up to 1, from their log-probabilities of both answers, each (K, B)."""
    number = ref_chosen.size(0)
    margins = (ref_chosen - ref_rejected).abs()
    if mode == "official_code":
        first = margins[1] / (margins.sum(0) + 1e-6)
        return torch.stack([first, 1 - first])
    if mode == "arwc":  # a pair that no reference tells apart: all alike
        total = margins.sum(0)
        return torch.where(total > 0, margins / total.clamp(min=torch.finfo(total.dtype).tiny), 1 / number)
    values = margins.new_tensor([1.0] * number if fixed is None else fixed)
    return (values / values.sum())[:, None].expand_as(margins)


def trust_region(
    ref_chosen: torch.Tensor, ref_rejected: torch.Tensor, eps: float | None, adaptive: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip references 1.. around reference 0; log-probabilities of both answers, each (K, B), `eps=None` for no clip."""
    if eps is None:
        return ref_chosen, ref_rejected
    share: torch.Tensor | float = 1.0
    other: torch.Tensor | float = 1.0
    if adaptive:
        sizes = [ref_chosen.mean(0).abs(), ref_rejected.mean(0).abs()]
        share = sizes[0] / (sizes[0] + sizes[1]).clamp(min=1e-12)
        other = 1 - share

    def clip(values: torch.Tensor, radius: torch.Tensor | float) -> torch.Tensor:
        start = values[:1]
        return torch.minimum(torch.maximum(values, (1 + radius) * start), (1 - radius) * start)

    def around(values: torch.Tensor, radius: torch.Tensor | float) -> torch.Tensor:
        return torch.cat([values[:1], clip(values, radius)[1:]])

    return around(ref_chosen, eps * share), around(ref_rejected, eps * other)


def virtual_reference(ref_logps: torch.Tensor, weights: torch.Tensor, mixture: str = "harmonic") -> torch.Tensor:
    """Log-probability of B answers under the mixture of K references, (B,), from theirs and their weights, each (K, B)."""
    if mixture == "geometric":
        return (weights * ref_logps).sum(0)
    return -torch.logsumexp(weights.log() - ref_logps, 0)  # a weight of 0 is exp(-inf)


def mrpo_loss(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    weights: torch.Tensor,
    beta: float,
    mixture: str | None = "harmonic",
) -> torch.Tensor:
    """MRPO loss of each pair.

    Args:
        chosen_logps: Log-probabilities of the chosen answers under the policy, summed over tokens, (B,).
        rejected_logps: Those of the rejected ones, (B,).
        ref_chosen: Log-probabilities of the chosen answers under the references, clipped, (K, B).
        ref_rejected: Those of the rejected ones, (K, B).
        weights: Weights of the references, (K, B).
        beta: Temperature.
        mixture: `"harmonic"` or `"geometric"`; `None` for Multi-DPO, the mixture of losses.

    Returns:
        Loss of each pair, (B,).
    """
    if mixture is None:
        margins = (chosen_logps - ref_chosen) - (rejected_logps - ref_rejected)
        return -(weights * F.logsigmoid(beta * margins)).sum(0)
    chosen = chosen_logps - virtual_reference(ref_chosen, weights, mixture)
    rejected = rejected_logps - virtual_reference(ref_rejected, weights, mixture)
    return -F.logsigmoid(beta * (chosen - rejected))


class MRPOTrainer(PreferenceTrainer):
    """Trainer for MRPO, with the arguments of [`~trl.DPOTrainer`] and the data of [`PreferenceTrainer`].

    The extra references are those of `ref_models`, or columns `ref1_chosen_logps`, `ref1_rejected_logps`, `ref2_...` of the
    dataset. Pairs that `max_length` would cut are dropped: the stored sums are those of whole responses.

    Example:

    ```python
    from datasets import load_dataset
    from trl_ift import MRPOConfig, MRPOTrainer

    trainer = MRPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=MRPOConfig("qwen-mrpo", ref_models=["Qwen/Qwen2.5-1.5B-Instruct"]),
        train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    )
    trainer.train()
    ```
    """

    config_class = MRPOConfig
    method = "mrpo"
    card_options = ("beta",)
    _tag_names = ["trl", "trl-ift", "mrpo"]  # noqa: RUF012
    _name = "MRPO"
    _paper = arxiv_paper(
        "2405.16388",
        "le2024multi",
        "Multi-Reference Preference Optimization for Large Language Models",
        "Hung Le and Quan Tran and Dung Nguyen and Kien Do and Saloni Mittal and Kelechi Ogueji and Svetha Venkatesh",
        2024,
    )

    # ---------------------------------------------------------------- the stored references

    def _check_source(self, args, model, processing_class, quantization_config) -> None:  # type: ignore[override]
        super()._check_source(args, model, processing_class, quantization_config)
        self._loaded: dict[str, Any] = {}
        if not isinstance(model, str):  # a model in memory was not loaded from `model_init_kwargs`
            base = base_model(model)
            self._loaded = {"dtype": base.dtype, "attn_implementation": base.config._attn_implementation}

    def _init_kwargs(self, args: MRPOConfig) -> dict[str, Any]:
        """How the references are loaded: as the policy, but for what is a matter of that one alone."""
        found = {"trust_remote_code": args.trust_remote_code, **self._loaded, **(args.model_init_kwargs or {})}
        return {name: found[name] for name in ("dtype", "attn_implementation", "trust_remote_code") if found.get(name)}

    def _check_datasets(self, args: MRPOConfig, train_dataset: Any, eval_dataset: Any) -> bool:
        datasets = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
        known = [data for data in (train_dataset, *datasets.values()) if isinstance(data, Dataset | IterableDataset)]
        rows: list[dict[str, Any]] = [first_row(data) for data in known]
        stored = _number_stored(rows[0]) if rows else 0
        if args.ref_models is None and rows and not stored:
            raise ValueError(
                "MRPO needs a reference beside the starting policy. Name one or more with `ref_models`, or add the columns "
                f"{reference_columns(1)} with `trl_ift.data.score_references`."
            )
        if args.ref_models is not None and any(map(_number_stored, rows)):
            raise ValueError(
                f"A dataset holds log-probabilities of other references ({', '.join(reference_columns(1))}) and `ref_models` "
                "names models. Drop one of the two."
            )
        number = stored or len(args.ref_models or [])
        args.check_number(number + 1)
        self._number = number
        names = [name for k in range(number) for name in reference_columns(k + 1)]
        self.columns = tuple(Column(name, high=1e-3, required=args.ref_models is None) for name in names)
        return super()._check_datasets(args, train_dataset, eval_dataset)

    def _check_dataset(self, args: MRPOConfig, dataset: Any, name: str, stored: bool) -> None:
        super()._check_dataset(args, dataset, name, stored)
        found = _number_stored(first_row(dataset))
        if found not in (0, self._number):
            raise ValueError(
                f"`{name}` has the log-probabilities of {found} references beside the starting policy, the run has "
                f"{self._number}. Score it with the same models."
            )
        if args.ref_models is not None and not found:
            check_references(dataset, name, args.ref_models, init_kwargs=self._init_kwargs(args))

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if not _number_stored(first_row(dataset)):
            dataset = score_references(
                dataset,
                args.ref_models,
                eos_token=self._tokenizer.eos_token,
                model_init_kwargs=self._init_kwargs(args),
                device=args.device,
            )
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if args.max_length is None:
            return prepared
        options = {"max_length": args.max_length, "with_prompt": args.truncation_mode == "keep_start"}
        whole = prepared.filter(versioned(_is_whole), fn_kwargs=options)
        if isinstance(dataset, Dataset) and len(whole) < len(prepared):
            cut = f"{len(prepared) - len(whole)} of {len(prepared)} rows of the {dataset_name} dataset"
            if not len(whole):
                raise ValueError(f"`max_length={args.max_length}` cuts the responses of {cut}. Raise it.")
            logger.warning(
                f"Dropped {cut}: `max_length={args.max_length}` cuts their responses, and the references have scored whole "
                "ones. Raise it to train on them."
            )
        return whole

    # ---------------------------------------------------------------- loss

    def _references(self, batch: PreferenceBatch, side: int) -> torch.Tensor:
        """Log-probabilities of chosen (side 0) or rejected (1) under the references, (K, B)."""
        own = (batch.chosen, batch.rejected)[side].ref_logps
        names = [reference_columns(k)[side] for k in range(1, self._number + 1)]
        return torch.stack([own, *(batch.columns[name] for name in names)])

    def _mixed(self, batch: PreferenceBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Those of chosen and of rejected, clipped, and the weights of the references."""
        chosen, rejected = self._references(batch, 0), self._references(batch, 1)
        weights = reference_weights(chosen, rejected, self.args.weight_mode, self.args.ref_weights)
        return *trust_region(chosen, rejected, self.args.ctro_eps, self.args.ctro_adaptive), weights

    @property
    def _mixture(self) -> str | None:
        return self.args.mrpo_mixture if self.args.mrpo_mode == "mrpo" else None

    def pair_loss(self, batch: PreferenceBatch) -> torch.Tensor:
        chosen, rejected, weights = self._mixed(batch)
        for k, weight in enumerate(weights):
            self._record_mean(f"mrpo/weight_{k}", weight.sum(), weight.numel())
        for side, (name, values) in enumerate((("chosen", chosen), ("rejected", rejected))):
            shift = virtual_reference(values, weights, self._mixture or "geometric") - values[0]
            self._record_mean(f"mrpo/shift_{name}", shift.sum(), shift.numel())
            moved = values[1:] != self._references(batch, side)[1:]
            self._record_mean(f"mrpo/clipped_{name}", moved.sum(), moved.numel())
        logps = (batch.chosen.logps, batch.rejected.logps)
        return mrpo_loss(*logps, chosen, rejected, weights, self.beta, self._mixture)

    def implicit_rewards(self, batch: PreferenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
        chosen, rejected, weights = self._mixed(batch)
        # The margins of Multi-DPO, averaged over the references, are those of the geometric mixture
        mixture = self._mixture or "geometric"
        chosen = batch.chosen.logps - virtual_reference(chosen, weights, mixture)
        rejected = batch.rejected.logps - virtual_reference(rejected, weights, mixture)
        return self.beta * chosen, self.beta * rejected


def _number_stored(row: dict[str, Any]) -> int:
    """Number of references whose log-probabilities a row holds."""
    matches = (re.fullmatch(r"ref([1-9]\d*)_(chosen|rejected)_logps", name) for name in row)
    return max((int(found[1]) for found in matches if found), default=0)


def _is_whole(row: dict[str, Any], max_length: int, with_prompt: bool) -> bool:
    longest = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
    return longest + with_prompt * len(row["prompt_ids"]) <= max_length
