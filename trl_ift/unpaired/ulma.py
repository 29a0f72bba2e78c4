r"""Unified Language Model Alignment (ULMA) and point-wise DPO, https://huggingface.co/papers/2312.02554.

Learning from single responses: good ones (label 1) are demonstrations, and bad ones are pushed down with a penalty that the
reference regularises. With r = log pi(y|x) - log ref(y|x) and a constant log Z in the place of the partition function:

    label 1    ULMA            - log pi(y|x)                          no reference, no sigmoid
               point-wise DPO  - log sigma( beta r + log Z )
    label 0    binary          - log sigma( - beta r - log Z )
               continuous      ( s - beta r - log Z )^2               to the score s

The gradient on a bad response is beta sigma(beta r + log Z) grad log pi: bounded, and gone once the response is unlikely. That
of point-wise DPO on a good one dies out too, which is why the paper drops the regulariser there.

The paper writes log-probabilities of whole responses and a mean over the rows. The authors' code takes the mean per token, of
policy and reference alike, and the mean of each class, the two added (an absent class counts 0); the defaults here are those of
the code, which the released results come from. "mean" makes beta r small, so that the penalty starts near log 2 with a slope of
beta / 2 per nat of mean log-probability; with "sum" take a smaller beta. With rare bad responses, "class_means" makes one of
them as heavy as all good ones of its step: take "row_mean" with `undesirable_weight` then.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers.utils import logging

from ..checks import check_choice, check_range
from ..hub.paper import arxiv_paper
from .trainer import UnpairedBatch, UnpairedConfig, UnpairedTrainer


POSITIVE_LOSSES = ("nll", "beta_nll", "pointwise_dpo")
NEGATIVE_LOSSES = ("binary", "continuous")
LOGP_REDUCTIONS = ("mean", "sum")
BATCH_REDUCTIONS = ("class_means", "row_mean")

logger = logging.get_logger(__name__)


@dataclass
class ULMAConfig(UnpairedConfig):
    r"""
    Configuration class for the [`ULMATrainer`].

    This class includes only the parameters that are specific to ULMA.

    Parameters:
        positive_loss (`str`, *optional*, defaults to `"nll"`):
            Loss of good responses: `"nll"` (ULMA), `"beta_nll"` (the same times beta), `"pointwise_dpo"`.
        negative_loss (`str`, *optional*, defaults to `"binary"`):
            Loss of the others: `"binary"`, or `"continuous"`, the squared error to `score`.
        log_z (`float`, *optional*, defaults to `0.0`):
            Constant added to beta times the log-ratio.
        logp_reduction (`str`, *optional*, defaults to `"mean"`):
            Log-probability of a response: `"mean"` over its tokens (the authors' code) or `"sum"` (the paper).
        batch_reduction (`str`, *optional*, defaults to `"class_means"`):
            Mean over the rows of the optimizer step: of each class, added (the authors' code), or `"row_mean"` (the paper).
    """

    positive_loss: str = field(
        default="nll", metadata={"help": "Loss of good responses.", "choices": list(POSITIVE_LOSSES)}
    )
    negative_loss: str = field(
        default="binary",
        metadata={
            "help": "Loss of the others; 'continuous' is the squared error to the score.",
            "choices": list(NEGATIVE_LOSSES),
        },
    )
    log_z: float = field(default=0.0, metadata={"help": "Constant added to beta times the log-ratio."})
    logp_reduction: str = field(
        default="mean",
        metadata={
            "help": "Log-probability of a response: mean over its tokens (the authors' code) or sum (the paper).",
            "choices": list(LOGP_REDUCTIONS),
        },
    )
    batch_reduction: str = field(
        default="class_means",
        metadata={
            "help": "Mean over the rows of the optimizer step: of each class, added (the authors' code), or of all rows.",
            "choices": list(BATCH_REDUCTIONS),
        },
    )

    def __post_init__(self):
        check_choice("positive_loss", self.positive_loss, POSITIVE_LOSSES)
        check_choice("negative_loss", self.negative_loss, NEGATIVE_LOSSES)
        check_choice("logp_reduction", self.logp_reduction, LOGP_REDUCTIONS)
        check_choice("batch_reduction", self.batch_reduction, BATCH_REDUCTIONS)
        check_range("log_z", self.log_z, -float("inf"))
        super().__post_init__()


def ulma_loss(
    logps: torch.Tensor,
    ref_logps: torch.Tensor,
    label: torch.Tensor,
    score: torch.Tensor,
    beta: float,
    positive_loss: str = "nll",
    negative_loss: str = "binary",
    log_z: float = 0.0,
) -> torch.Tensor:
    """ULMA loss of each response, (N,), from its log-probability under policy and reference (sums or means), each (N,).

    Args:
        label: Whether a response is a good one, (N,), bool.
        score: Targets of the continuous form, (N,); not read otherwise.
    """
    z = beta * (logps - ref_logps) + log_z
    if positive_loss == "pointwise_dpo":
        positive = -F.logsigmoid(z)
    else:
        positive = -logps * (beta if positive_loss == "beta_nll" else 1)
    negative = -F.logsigmoid(-z) if negative_loss == "binary" else (score - z) ** 2
    return torch.where(label, positive, negative)


class ULMATrainer(UnpairedTrainer):
    """Trainer for ULMA and point-wise DPO, with the arguments of [`~trl.KTOTrainer`] and the data of [`UnpairedTrainer`].

    A row with a `score` and no `label` is a good one if its score is exactly 1. The metrics `rewards/*` are beta r as the loss
    sees it: with means over tokens by default.

    Example:

    ```python
    from datasets import load_dataset
    from trl_ift import ULMAConfig, ULMATrainer

    trainer = ULMATrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=ULMAConfig("qwen-ulma"),
        train_dataset=load_dataset("trl-lib/kto-mix-14k", split="train"),
    )
    trainer.train()
    ```
    """

    config_class = ULMAConfig
    method = "ulma"
    card_options = ("beta", "desirable_weight", "undesirable_weight")
    label_threshold = 1.0
    _tag_names = ["trl", "trl-ift", "ulma"]  # noqa: RUF012
    _name = "ULMA"
    _paper = arxiv_paper(
        "2312.02554",
        "cai2023ulma",
        "ULMA: Unified Language Model Alignment with Human Demonstration and Point-wise Preference",
        "Tianchi Cai and Xierui Song and Jiyan Jiang and Fei Teng and Jinjie Gu and Guannan Zhang",
        2023,
    )

    def _declare(self, args: Any) -> None:
        self.fractional_scores = self.needs_scores = args.negative_loss == "continuous"
        self.class_means = args.batch_reduction == "class_means"

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        kept = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if isinstance(kept, Dataset) and not any(kept["label"][:]):
            logger.warning(
                f"No row of the {dataset_name} dataset has the label true, so that there is nothing to imitate. (Without "
                "labels, only a score of 1 marks a good answer.) Add a column 'label', or scale the scores."
            )
        return kept

    def _logps(self, batch: UnpairedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities under policy and reference in the chosen reduction, each (N,)."""
        if self.args.logp_reduction == "sum":
            return batch.logps, batch.ref_logps
        return batch.mean_logps, batch.mean_logps - batch.mean_logratios

    def row_loss(self, batch: UnpairedBatch) -> torch.Tensor:
        args = self.args
        losses = ulma_loss(
            *self._logps(batch),
            batch.label,
            batch.score,
            self.beta,
            args.positive_loss,
            args.negative_loss,
            args.log_z,
        )
        for name, label in (("positive", batch.label), ("negative", ~batch.label)):
            self._record_mean(f"ulma/{name}_loss", losses[label].sum(), label.sum())
        if args.negative_loss == "binary":
            push = torch.sigmoid(self.implicit_rewards(batch) + args.log_z)[~batch.label]
            self._record_mean("ulma/push", push.sum(), push.numel())
        return losses

    def implicit_rewards(self, batch: UnpairedBatch) -> torch.Tensor:
        logps, ref_logps = self._logps(batch)
        return self.beta * (logps - ref_logps)
