r"""Chi-squared Preference Optimization (chi-PO), https://huggingface.co/papers/2407.13399.

DPO with another link between policy and reward: z + log z of the likelihood ratio z = pi / ref in the place of log z, which
makes the implied regulariser the sum of a chi-squared divergence and the KL divergence. It holds the policy nearer to the data
than DPO does where beta is small or training long. With r = log pi - log ref, sums over the tokens of a response:

    s(r) = beta ( exp(r) + gamma r )

    L = - log sigma( clip( s(r_w) - s(r_l), -2 R_max, 2 R_max ) )

gamma = 1 is chi-PO; 0 < gamma < 1 mixes the two divergences (from memory, unconfirmed). R_max bounds the true reward; pairs
beyond the clip have no gradient, mis-ranked ones too. exp(r) is computed as exp(clip(log beta + r, -88, 20)), so that it does
not overflow; beyond these bounds (from memory, unconfirmed) that part has no gradient. Near the reference chi-PO is DPO with
twice its beta, and for very unlikely responses DPO with its beta.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ..checks import check_range
from ..hub.paper import arxiv_paper
from .trainer import PairLossConfig, PreferenceBatch, PreferenceTrainer


# Bounds of the exponent log beta + r
_EXPONENT = (-88.0, 20.0)


@dataclass
class ChiPOConfig(PairLossConfig):
    r"""
    Configuration class for the [`ChiPOTrainer`].

    This class includes only the parameters that are specific to chi-PO, and `beta`, whose default differs from TRL's.

    Parameters:
        beta (`float`, *optional*, defaults to `0.05`):
            Temperature, > 0. Half of a beta of DPO acts like it near the reference.
        chipo_r_max (`float`, *optional*):
            Bound of the true reward, > 0: differences of rewards are clipped to [-2 R_max, 2 R_max]. No clip by default.
        chipo_gamma (`float`, *optional*, defaults to `1.0`):
            Weight of the logarithm in the link, in (0, 1] (unconfirmed; 1 is chi-PO).
    """

    beta: float = field(
        default=0.05, metadata={"help": "Temperature; half of a beta of DPO acts like it at the start."}
    )
    chipo_r_max: float | None = field(
        default=None,
        metadata={
            "help": "Bound of the true reward: differences of rewards are clipped to twice of it. Default: no clip."
        },
    )
    chipo_gamma: float = field(
        default=1.0, metadata={"help": "Weight of the logarithm in the link, in (0, 1] (unconfirmed; 1 is chi-PO)."}
    )

    def __post_init__(self):
        if self.chipo_r_max is not None:
            check_range("chipo_r_max", self.chipo_r_max, 0, low_open=True)
        check_range("chipo_gamma", self.chipo_gamma, 0, 1, low_open=True)
        super().__post_init__()


def chipo_rewards(logratios: torch.Tensor, beta: float, gamma: float = 1.0) -> torch.Tensor:
    """Reward beta (exp(r) + gamma r) of each response, (N,), from r = log pi - log ref, (N,)."""
    exponent = (math.log(beta) + logratios).clamp(*_EXPONENT)
    return exponent.exp() + gamma * beta * logratios


def chipo_loss(
    chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor, r_max: float | None = None
) -> torch.Tensor:
    """Chi-PO loss of each pair, (B,), from the rewards of the chosen and of the rejected responses, each (B,)."""
    margins = chosen_rewards - rejected_rewards
    if r_max is not None:
        margins = margins.clamp(-2 * r_max, 2 * r_max)
    return -F.logsigmoid(margins)


class ChiPOTrainer(PreferenceTrainer):
    """Trainer for chi-PO, with the arguments of [`~trl.DPOTrainer`] and the data of [`PreferenceTrainer`].

    Example:

    ```python
    from datasets import load_dataset
    from trl_ift import ChiPOConfig, ChiPOTrainer

    trainer = ChiPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=ChiPOConfig("qwen-chipo"),
        train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    )
    trainer.train()
    ```
    """

    config_class = ChiPOConfig
    method = "chipo"
    card_options = ("beta",)
    _tag_names = ["trl", "trl-ift", "chipo"]  # noqa: RUF012
    _name = "chi-PO"
    _paper = arxiv_paper(
        "2407.13399",
        "huang2024correcting",
        "Correcting the Mythos of KL-Regularization: Direct Alignment without Overoptimization via Chi-Squared Preference "
        "Optimization",
        "Audrey Huang and Wenhao Zhan and Tengyang Xie and Jason D. Lee and Wen Sun and Akshay Krishnamurthy and "
        "Dylan J. Foster",
        2024,
    )

    def pair_loss(self, batch: PreferenceBatch) -> torch.Tensor:
        chosen, rejected = self.implicit_rewards(batch)
        if (r_max := self.args.chipo_r_max) is not None:
            clipped = (chosen - rejected).abs() > 2 * r_max
            self._record_mean("chipo/clip_fraction", clipped.sum(), clipped.numel())
        return chipo_loss(chosen, rejected, r_max)

    def implicit_rewards(self, batch: PreferenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
        options = {"beta": self.beta, "gamma": self.args.chipo_gamma}
        return chipo_rewards(batch.chosen.logratios, **options), chipo_rewards(batch.rejected.logratios, **options)
