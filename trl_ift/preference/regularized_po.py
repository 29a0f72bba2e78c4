r"""Regularized Preference Optimization (DPO and SFT on the chosen responses), https://huggingface.co/papers/2405.16436.

DPO with an imitation of the chosen response, which holds its probability up. The paper derives the term: choosing the policy
for an adversarial reward reduces to the DPO loss and a log-likelihood of a baseline policy, here the distribution of the
chosen responses. With r = log pi - log ref and log pi(y|x) the sum over the tokens of y:

    L = - log sigma( beta [ r_w - r_l ] )  +  S

    "sum"           S = - eta beta log pi(y_w|x)             the paper's algorithm; mean over pairs
    "seq_mean"      S = - eta log pi(y_w|x) / |y_w|          the paper's appendix; mean over pairs
    "token_mean"    S = - eta (sum of log pi(y_w|x) over the pairs) / (sum of |y_w|)         TRL's `["sigmoid", "sft"]`

eta is multiplied by beta in the first form only. The push on a chosen response is beta [ sigma(-beta (r_w - r_l)) + eta ]
there: it does not vanish when the pair is solved. Nothing is detached or clamped.

Not Iterative RPO, Reward-aware PO or Relative PO, which are called RPO too.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ..checks import check_choice, check_range, check_unused
from ..hub.paper import arxiv_paper
from .collator import WEIGHT
from .trainer import PairLossConfig, PreferenceBatch, PreferenceTrainer, Term


# Default of `rpo_eta`
_DEFAULT_ETA = {"sum": 0.005, "seq_mean": 0.2, "token_mean": 0.2}
NORMALIZATIONS = tuple(_DEFAULT_ETA)


@dataclass
class RegularizedPOConfig(PairLossConfig):
    r"""
    Configuration class for the [`RegularizedPOTrainer`].

    This class includes only the parameters that are specific to regularized PO. For a full list of training arguments, please
    refer to the [`~transformers.TrainingArguments`] and [`~trl.DPOConfig`] documentation.

    Parameters:
        rpo_eta (`float`, *optional*):
            Weight of the imitation, >= 0. If `None`: `0.005` for `"sum"`, `0.2` for `"seq_mean"` (both the authors'), `0.2` for
            `"token_mean"` (our choice: the two are the same for responses of equal length). `0` is DPO.
        rpo_normalization (`str`, *optional*, defaults to `"sum"`):
            What the log-probability of a chosen response is divided by: nothing, and multiplied by `beta` (`"sum"`); its own
            number of tokens (`"seq_mean"`); all are added up and divided by the number of their tokens in the optimizer step
            (`"token_mean"`).
    """

    rpo_eta: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the imitation of the chosen response. Default: 0.005 for 'sum', 0.2 for the other two."
        },
    )
    rpo_normalization: str = field(
        default="sum",
        metadata={
            "help": "Log-probability that is imitated: summed and multiplied by beta ('sum'), its mean over the tokens of each "
            "response ('seq_mean'), or over those of the optimizer step ('token_mean').",
            "choices": list(NORMALIZATIONS),
        },
    )

    def __post_init__(self):
        check_choice("rpo_normalization", self.rpo_normalization, NORMALIZATIONS)
        if self.rpo_eta is None:
            self.rpo_eta = _DEFAULT_ETA[self.rpo_normalization]
        check_range("rpo_eta", self.rpo_eta, 0)
        if self.rpo_eta == 0:
            check_unused(self, ["rpo_normalization"], "with `rpo_eta=0`")
        super().__post_init__()


def dpo_loss(margins: torch.Tensor, beta: float) -> torch.Tensor:
    """DPO loss of each pair, (B,), from the log-ratio of chosen minus that of rejected, (B,)."""
    return -F.logsigmoid(beta * margins)


def imitation_loss(
    logps: torch.Tensor, lengths: torch.Tensor, beta: float, eta: float, normalization: str = "sum"
) -> torch.Tensor:
    """What each chosen response adds to the loss.

    Args:
        logps: Summed log-probabilities of the chosen responses, (B,).
        lengths: Their numbers of tokens, (B,); read by `"seq_mean"`.
        beta: Temperature; read by `"sum"`.
        eta: Weight of the imitation.
        normalization: `"sum"`, `"seq_mean"` or `"token_mean"`.

    Returns:
        Values, (B,), whose mean is the term; with `"token_mean"`, their sum divided by the number of tokens is.
    """
    if normalization == "sum":
        return -eta * beta * logps
    return -eta * (logps / lengths.clamp(min=1) if normalization == "seq_mean" else logps)


class RegularizedPOTrainer(PreferenceTrainer):
    """Trainer for regularized PO, with the arguments of [`~trl.DPOTrainer`] and the data of [`PreferenceTrainer`].

    Example:

    ```python
    from datasets import load_dataset
    from trl_ift import RegularizedPOConfig, RegularizedPOTrainer

    trainer = RegularizedPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=RegularizedPOConfig("qwen-regularized-po"),
        train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    )
    trainer.train()
    ```
    """

    config_class = RegularizedPOConfig
    method = "regularized-po"
    card_options = ("beta",)
    _tag_names = ["trl", "trl-ift", "regularized-po"]  # noqa: RUF012
    _name = "Regularized-PO"
    _paper = arxiv_paper(
        "2405.16436",
        "liu2024provably",
        "Provably Mitigating Overoptimization in RLHF: Your SFT Loss is Implicitly an Adversarial Regularizer",
        "Zhihan Liu and Miao Lu and Shenao Zhang and Boyi Liu and Hongyi Guo and Yingxiang Yang and Jose Blanchet and "
        "Zhaoran Wang",
        2024,
    )

    @property
    def _is_token_mean(self) -> bool:
        return self.args.rpo_normalization == "token_mean"

    def _imitation(self, batch: PreferenceBatch) -> torch.Tensor:
        # All tokens of the response, with `ld_alpha` too
        logps, args = batch.chosen.token_logps.sum(1), self.args
        return imitation_loss(logps, batch.chosen.lengths, self.beta, args.rpo_eta, args.rpo_normalization)

    def pair_loss(self, batch: PreferenceBatch) -> torch.Tensor:
        chosen = batch.chosen
        dpo, imitation = dpo_loss(batch.margins, self.beta), self._imitation(batch)
        tokens = chosen.lengths.sum()
        self._record_mean("nll_loss", -chosen.token_logps.sum(), tokens)
        self._record_mean("regularized_po/dpo_loss", dpo.sum(), dpo.numel())
        count = tokens if self._is_token_mean else dpo.numel()
        self._record_mean("regularized_po/sft_loss", imitation.sum(), count)
        return dpo if self._is_token_mean else dpo + imitation

    def branch_terms(self, batch: PreferenceBatch) -> Iterator[Term]:
        if self._is_token_mean:
            values = self._imitation(batch)
            if (weights := batch.columns.get(WEIGHT.name)) is not None:  # as in TRL's "sft" on the base
                values = values * weights
            yield Term(values.sum(), "chosen", "token")
