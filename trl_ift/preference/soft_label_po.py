r"""Preference optimisation with soft labels (GDPO, GIPO, GROPO), https://huggingface.co/papers/2409.06691.

Pairs come with the probability p that chosen is preferred. The two likelihoods are replaced by geometric means weighted with
it, pi(y_w)^p pi(y_l)^(1-p) and pi(y_w)^(1-p) pi(y_l)^p, and so are the reference's, which scales the margin by 2p - 1: near
ties teach little, sure pairs as much as in DPO. With h = r_w - r_l, r = log pi - log ref, sums over the tokens of a response:

    "gdpo"     - log sigma( beta (2p-1) h )                                                 "dpo" at p = 1
    "gipo"     ( (2p-1) h - 1 / (2 beta) )^2                                                "ipo" at p = 1
    "gropo"    a sigma( -beta (2p-1) h ) - g log sigma( beta (2p-1) h )                     "ropo" at p = 1

and beside them the losses that interpolate linearly:

    "cdpo"     - p log sigma( beta h ) - (1-p) log sigma( -beta h )
    "cipo"     ( h - (2p-1) / (2 beta) )^2

ROPO, its weights a and g and their values, are from memory (unconfirmed). As in TRL's "ipo", the log-ratios of the forms of IPO
are divided by the numbers of tokens of their responses. Not the GDPO of GRPO (2601.05242).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers.utils import logging

from ..checks import check_choice, check_range, check_unused
from ..data.caching import versioned
from ..data.rows import first_row
from ..hub.paper import arxiv_paper
from ..trl_internals import global_then_local_main_first
from .collator import Column
from .trainer import PairLossConfig, PreferenceBatch, PreferenceTrainer


SOFT_LABEL = Column("soft_label", low=0, high=1)
# Loss -> (how p enters, the loss at p = 1)
LOSSES = {
    "gdpo": ("geometric", "dpo"),
    "gipo": ("geometric", "ipo"),
    "gropo": ("geometric", "ropo"),
    "cdpo": ("linear", "dpo"),
    "cipo": ("linear", "ipo"),
    "dpo": ("", "dpo"),
    "ipo": ("", "ipo"),
    "ropo": ("", "ropo"),
}
# Largest |2p - 1| of a tie
_TIE = 1e-6

logger = logging.get_logger(__name__)


@dataclass
class SoftLabelPOConfig(PairLossConfig):
    r"""
    Configuration class for the [`SoftLabelPOTrainer`].

    This class includes only the parameters that are specific to soft labels. For a full list of training arguments, please
    refer to the [`~transformers.TrainingArguments`] and [`~trl.DPOConfig`] documentation.

    Parameters:
        soft_label_loss (`str`, *optional*, defaults to `"gdpo"`):
            `"gdpo"`, `"gipo"`, `"gropo"` (geometric); `"cdpo"`, `"cipo"` (linear); `"dpo"`, `"ipo"`, `"ropo"` (the labels are
            not used, to compare with).
        ropo_alpha (`float`, *optional*, defaults to `2.0`):
            Weight of the bounded term of `"gropo"` and `"ropo"`, >= 0 (unconfirmed).
        ropo_gamma (`float`, *optional*, defaults to `0.1`):
            Weight of the logarithmic term of `"gropo"` and `"ropo"`, >= 0 (unconfirmed).
        soft_label_clip (`list[float]`, *optional*):
            Smallest and largest probability: the others are moved there. Not in the paper.
        drop_ties (`bool`, *optional*, defaults to `False`):
            Whether rows with p = 0.5 are dropped before training. They have no gradient in the geometric losses; the linear
            ones pull their margin to 0. Not in the paper.
        length_normalize (`bool`, *optional*):
            Whether the log-ratio of a response is divided by its number of tokens. If `None`: as in TRL, for `"gipo"`,
            `"cipo"` and `"ipo"` only.
    """

    soft_label_loss: str = field(
        default="gdpo",
        metadata={"help": "Loss: geometric (g...), linear (c...) or without labels.", "choices": list(LOSSES)},
    )
    ropo_alpha: float = field(
        default=2.0, metadata={"help": "Weight of the bounded term of 'gropo' and 'ropo' (unconfirmed)."}
    )
    ropo_gamma: float = field(
        default=0.1, metadata={"help": "Weight of the logarithmic term of 'gropo' and 'ropo' (unconfirmed)."}
    )
    soft_label_clip: list[float] | None = field(
        default=None, metadata={"help": "Smallest and largest probability: the others are moved there."}
    )
    drop_ties: bool = field(
        default=False, metadata={"help": "Whether rows with a probability of 0.5 are dropped before training."}
    )
    length_normalize: bool | None = field(
        default=None,
        metadata={
            "help": "Whether the log-ratio of a response is divided by its number of tokens. Default: for 'gipo', 'cipo', "
            "'ipo' only."
        },
    )

    def __post_init__(self):
        check_choice("soft_label_loss", self.soft_label_loss, tuple(LOSSES))
        kind, base = LOSSES[self.soft_label_loss]
        if base != "ropo":
            check_unused(self, ["ropo_alpha", "ropo_gamma"], f"with `soft_label_loss={self.soft_label_loss!r}`")
        for name in ("ropo_alpha", "ropo_gamma"):
            check_range(name, getattr(self, name), 0)
        if base == "ropo" and self.ropo_alpha == self.ropo_gamma == 0:
            raise ValueError("With `ropo_alpha=0` and `ropo_gamma=0` the loss is 0. Raise one of the two.")
        if not kind:
            check_unused(self, ["soft_label_clip"], f"with `soft_label_loss={self.soft_label_loss!r}`")
        if self.soft_label_clip is not None:
            check_clip(self.soft_label_clip)
        if self.length_normalize is None:
            self.length_normalize = base == "ipo"
        super().__post_init__()


def check_clip(bounds: Sequence[float]) -> None:
    """Raise unless `bounds` are two probabilities, the smaller one first."""
    if not isinstance(bounds, list | tuple) or len(bounds) != 2:
        raise ValueError(f"`soft_label_clip={bounds}` must be two probabilities, e.g. `[0.1, 0.9]`.")
    for bound in bounds:
        check_range("soft_label_clip", bound, 0, 1)
    if bounds[0] > bounds[1] or bounds[0] == bounds[1] == 0.5:
        raise ValueError(
            f"`soft_label_clip={list(bounds)}` must be in ascending order and leave more than ties, e.g. `[0.1, 0.9]`."
        )


def soft_label_loss(
    margins: torch.Tensor,
    labels: torch.Tensor,
    beta: float,
    loss: str = "gdpo",
    ropo_alpha: float = 2.0,
    ropo_gamma: float = 0.1,
) -> torch.Tensor:
    """Loss of each pair.

    Args:
        margins: Log-ratio of chosen minus log-ratio of rejected, (B,).
        labels: Probability that chosen is preferred, (B,); not read by `"dpo"`, `"ipo"`, `"ropo"`.
        beta: Temperature.
        loss: A name of `LOSSES`.
        ropo_alpha: Weight a of `"gropo"` and `"ropo"`.
        ropo_gamma: Their weight g.

    Returns:
        Values, (B,).
    """
    kind, base = LOSSES[loss]
    target = 1 / (2 * beta)
    if kind == "geometric":
        margins = (2 * labels - 1) * margins
    elif kind == "linear" and base == "dpo":
        return -labels * F.logsigmoid(beta * margins) - (1 - labels) * F.logsigmoid(-beta * margins)
    elif kind == "linear":
        return (margins - (2 * labels - 1) * target) ** 2
    if base == "dpo":
        return -F.logsigmoid(beta * margins)
    if base == "ipo":
        return (margins - target) ** 2
    return ropo_alpha * torch.sigmoid(-beta * margins) - ropo_gamma * F.logsigmoid(beta * margins)


def _is_no_tie(label: float) -> bool:
    return abs(2 * label - 1) > _TIE


class SoftLabelPOTrainer(PreferenceTrainer):
    """Trainer for soft preference labels, with the arguments of [`~trl.DPOTrainer`] and the data of [`PreferenceTrainer`].

    A column `soft_label` (float in [0, 1]) holds the probability that `chosen` is preferred; without it, it is 1.

    Example:

    ```python
    from datasets import load_dataset
    from trl_ift import SoftLabelPOConfig, SoftLabelPOTrainer

    votes = load_dataset("json", data_files="votes.jsonl", split="train")  # prompt, chosen, rejected, share
    trainer = SoftLabelPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=SoftLabelPOConfig("qwen-gdpo"),
        train_dataset=votes.rename_column("share", "soft_label"),
    )
    trainer.train()
    ```
    """

    config_class = SoftLabelPOConfig
    method = "soft-label-po"
    card_options = ("beta",)
    columns = (SOFT_LABEL,)
    _tag_names = ["trl", "trl-ift", "soft-label-po"]  # noqa: RUF012
    _name = "Soft-Label-PO"
    _paper = arxiv_paper(
        "2409.06691",
        "furuta2024geometric",
        "Geometric-Averaged Preference Optimization for Soft Preference Labels",
        "Hiroki Furuta and Kuang-Huei Lee and Shixiang Shane Gu and Yutaka Matsuo and Aleksandra Faust and Heiga Zen and "
        "Izzeddin Gur",
        2024,
    )

    def _check_dataset(self, args, dataset, name, stored):
        super()._check_dataset(args, dataset, name, stored)
        if name != "train_dataset" or SOFT_LABEL.name in first_row(dataset):
            return
        lacks = f"`{name}` lacks the column '{SOFT_LABEL.name}', the probability that 'chosen' is preferred"
        if args.drop_ties:
            raise ValueError(f"`drop_ties=True` has no effect: {lacks}. Add it, or drop the option.")
        if LOSSES[args.soft_label_loss][0]:
            logger.warning(
                f"{lacks}: it is taken to be 1 for every pair. If another column holds it, rename that one."
            )

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if not args.drop_ties or SOFT_LABEL.name not in first_row(prepared):
            return prepared
        with global_then_local_main_first():
            kept = prepared.filter(versioned(_is_no_tie), input_columns=[SOFT_LABEL.name])
        if isinstance(prepared, Dataset) and (ties := len(prepared) - len(kept)):
            if not len(kept):
                raise ValueError(
                    f"All rows of the {dataset_name} dataset are ties: their '{SOFT_LABEL.name}' is 0.5. Correct the column, "
                    "or set `drop_ties=False`."
                )
            logger.warning(f"Dropped {ties} of {len(prepared)} rows of the {dataset_name} dataset: ties.")
        return kept

    def pair_loss(self, batch: PreferenceBatch) -> torch.Tensor:
        args, chosen, rejected = self.args, batch.chosen, batch.rejected
        margins = batch.margins
        if args.length_normalize:
            margins = chosen.logratios / chosen.lengths.clamp(min=1) - rejected.logratios / rejected.lengths.clamp(
                min=1
            )
        labels = batch.columns.get(SOFT_LABEL.name, torch.ones_like(margins))
        self._record_mean("soft_label_po/label", labels.sum(), labels.numel())
        # Unlike `rewards/*`: as the labels say which is better, and how much it matters
        weights, signed = (2 * labels - 1).abs(), (2 * labels - 1) * batch.margins
        self._record_mean("soft_label_po/accuracy", (weights * (signed > 0)).sum(), weights.sum())
        self._record_mean("soft_label_po/margin", self.beta * signed.sum(), weights.sum())
        if args.soft_label_clip is not None:
            labels = labels.clamp(*args.soft_label_clip)
        return soft_label_loss(margins, labels, self.beta, args.soft_label_loss, args.ropo_alpha, args.ropo_gamma)
