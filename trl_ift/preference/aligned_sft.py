r"""Aligned Supervised Fine-Tuning (ASFT), https://huggingface.co/papers/2409.10571.

One stage from a base model, without a reference: the chosen response is imitated, and each response of a pair is judged on its
own, the chosen one to be likely, the rejected one to be unlikely. With p(y|x) = exp( mean_t log pi(y_t|x,y_<t) ), the
geometric mean of the probabilities of its tokens, and the log-odds o(y) = log p(y|x) - log( 1 - p(y|x) ):

    L = - alpha log p(y_w|x)  +  lambda [ - log sigma( beta o(y_w) ) - log sigma( - beta o(y_l) ) ]

With beta = 1, ASFT itself, the bracket is exactly - log p(y_w|x) - log( 1 - p(y_l|x) ), and is computed so; other
temperatures are those of https://huggingface.co/papers/2502.01237, whose statement of ASFT this is. alpha = 0 drops the
imitation, for a start that has had its SFT. Whether the original paper sums or averages the term of imitation is unconfirmed;
here it is the mean.

The push on the rejected response, lambda p_l / (1 - p_l) per unit of its mean log-probability, vanishes as that becomes
unlikely. It would grow without bound for one that is certain: log p_l is held at -1e-7 at most, where its gradient ends.

Not Anchored Supervised Fine-Tuning, which shares the acronym.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers.utils import logging

from ..checks import check_range, check_unused
from ..data.rows import first_row
from ..hub.paper import arxiv_paper
from .trainer import REF_COLUMNS, PairLossConfig, PreferenceBatch, PreferenceTrainer


# Largest mean log-probability whose odds are taken
_CERTAIN = -1e-7

logger = logging.get_logger(__name__)


@dataclass
class AlignedSFTConfig(PairLossConfig):
    r"""
    Configuration class for the [`AlignedSFTTrainer`].

    This class includes only the parameters that are specific to ASFT, and `beta`, whose default and meaning differ from TRL's.

    Parameters:
        beta (`float`, *optional*, defaults to `1.0`):
            Temperature of the log-odds in the alignment term, > 0; 1 is ASFT.
        asft_lambda (`float`, *optional*, defaults to `1.0`):
            Weight of the alignment term, >= 0; 0 is SFT on the chosen responses.
        sft_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the negative log-likelihood of the chosen response, >= 0; 0 aligns only, from a model that has had its
            SFT.
    """

    beta: float = field(default=1.0, metadata={"help": "Temperature of the log-odds; 1 is ASFT."})
    asft_lambda: float = field(
        default=1.0, metadata={"help": "Weight of the alignment term; 0 is SFT on the chosen responses."}
    )
    sft_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the negative log-likelihood of the chosen response; 0 aligns only, after an SFT."
        },
    )

    def __post_init__(self):
        check_range("asft_lambda", self.asft_lambda, 0)
        check_range("sft_weight", self.sft_weight, 0)
        if self.asft_lambda == 0:
            if self.sft_weight == 0:
                raise ValueError("`asft_lambda=0` and `sft_weight=0` leave no loss. Set one of them above 0.")
            check_unused(self, ["beta"], "with `asft_lambda=0`")
        check_unused(self, ["ld_alpha"], "on means per token")
        super().__post_init__()
        self._refuse_reference_options()


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0, of any shape, exact near 0 and far from it."""
    # Each branch is kept off the values of the other, where its gradient may be infinite
    near, far = x.clamp(min=-math.log(2)), x.clamp(max=-math.log(2))
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


def log_odds(mean_logps: torch.Tensor) -> torch.Tensor:
    """Log-odds log p - log(1 - p) of responses, (N,), from their mean log-probabilities per token, (N,)."""
    mean_logps = mean_logps.clamp(max=_CERTAIN)
    return mean_logps - log1mexp(mean_logps)


def align_loss(chosen_mean_logps: torch.Tensor, rejected_mean_logps: torch.Tensor, beta: float = 1.0) -> torch.Tensor:
    """Alignment term of each pair, (B,), from the mean log-probabilities per token of its responses, each (B,)."""
    if beta == 1:
        return -chosen_mean_logps - log1mexp(rejected_mean_logps.clamp(max=_CERTAIN))
    return -F.logsigmoid(beta * log_odds(chosen_mean_logps)) - F.logsigmoid(-beta * log_odds(rejected_mean_logps))


def aligned_sft_loss(
    chosen_mean_logps: torch.Tensor,
    rejected_mean_logps: torch.Tensor,
    beta: float = 1.0,
    asft_lambda: float = 1.0,
    sft_weight: float = 1.0,
) -> torch.Tensor:
    """ASFT loss of each pair, (B,), from the mean log-probabilities per token of its responses, each (B,)."""
    aligned = align_loss(chosen_mean_logps, rejected_mean_logps, beta)
    return -sft_weight * chosen_mean_logps + asft_lambda * aligned


class AlignedSFTTrainer(PreferenceTrainer):
    """Trainer for Aligned Supervised Fine-Tuning, with the arguments of [`~trl.DPOTrainer`] but `ref_model`, and the data of
    [`PreferenceTrainer`].

    The metrics `rewards/*` are the log-odds o(y).

    Example:

    ```python
    from datasets import load_dataset
    from trl_ift import AlignedSFTConfig, AlignedSFTTrainer

    trainer = AlignedSFTTrainer(
        model="Qwen/Qwen2.5-0.5B",
        args=AlignedSFTConfig("qwen-asft", learning_rate=6e-6),
        train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    )
    trainer.train()
    ```
    """

    config_class = AlignedSFTConfig
    method = "aligned-sft"
    card_options = ("beta",)
    uses_reference = False
    _tag_names = ["trl", "trl-ift", "aligned-sft"]  # noqa: RUF012
    _name = "ASFT"
    _paper = arxiv_paper(
        "2409.10571",
        "wang2024asft",
        "ASFT: Aligned Supervised Fine-Tuning through Absolute Likelihood",
        "Ruoyu Wang and Jiachen Sun and Shaowei Hua and Quan Fang",
        2024,
    )

    def _check_dataset(self, args, dataset, name, stored):
        super()._check_dataset(args, dataset, name, stored)
        if found := [column for column in REF_COLUMNS if column in first_row(dataset)]:
            logger.warning(
                f"`{name}` has the columns {found}, which have no effect: ASFT does not compare with a reference. Drop "
                "them, or choose a method with a reference."
            )

    def pair_loss(self, batch: PreferenceBatch) -> torch.Tensor:
        args, chosen, rejected = self.args, batch.chosen.mean_logps, batch.rejected.mean_logps
        self._record_mean("nll_loss", -chosen.sum(), chosen.numel())
        aligned = align_loss(chosen.detach(), rejected.detach(), args.beta)
        self._record_mean("aligned_sft/align_loss", aligned.sum(), aligned.numel())
        return aligned_sft_loss(chosen, rejected, args.beta, args.asft_lambda, args.sft_weight)

    def implicit_rewards(self, batch: PreferenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
        return log_odds(batch.chosen.mean_logps), log_odds(batch.rejected.mean_logps)
