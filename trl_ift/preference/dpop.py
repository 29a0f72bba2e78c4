r"""DPO-Positive (DPOP, Smaug), https://huggingface.co/papers/2402.13228.

DPO with a penalty on a chosen response that becomes less likely than it was. DPO sees only the difference of the two
log-ratios, and can lower the chosen response as long as the rejected one falls faster; with pairs that differ in a few tokens
it does. With r = log pi - log ref, sums over the tokens of a response, and the penalty p = max(0, -r_w):

    "inside"     L = - log sigma( beta [ r_w - r_l - lambda p ] )            the paper's derivation
    "outside"    L = - log sigma( beta [ r_w - r_l ] ) + lambda p            in circulation since its first version

Nothing is detached; the derivative of max at r_w = 0, where training starts, is 0. At the same lambda the two forms differ by
orders of magnitude: inside, lambda is multiplied by beta and saturates with the sigmoid.

The default beta of 0.3 is that of the paper's main runs from memory (unconfirmed); lambda = 50 is the paper's.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ..checks import check_choice, check_range
from ..hub.paper import arxiv_paper
from .trainer import PairLossConfig, PreferenceBatch, PreferenceTrainer


VARIANTS = ("inside", "outside")


@dataclass
class DPOPConfig(PairLossConfig):
    r"""
    Configuration class for the [`DPOPTrainer`].

    This class includes only the parameters that are specific to DPOP, and `beta`, whose default differs from TRL's.

    Parameters:
        beta (`float`, *optional*, defaults to `0.3`):
            Temperature, > 0 (the paper's main runs; unconfirmed).
        dpop_lambda (`float`, *optional*, defaults to `50.0`):
            Strength of the penalty, >= 0. Of the form "inside"; take 0.1 to 0.5 for "outside".
        dpop_variant (`str`, *optional*, defaults to `"inside"`):
            Where the penalty stands: `"inside"` or `"outside"` the sigmoid.
    """

    beta: float = field(default=0.3, metadata={"help": "Temperature (the paper's main runs; unconfirmed)."})
    dpop_lambda: float = field(
        default=50.0,
        metadata={
            "help": "Strength of the penalty on a chosen response that becomes less likely. 50 for 'inside' (the paper's), "
            "0.1 to 0.5 for 'outside'."
        },
    )
    dpop_variant: str = field(
        default="inside",
        metadata={"help": "Where the penalty stands, inside or outside the sigmoid.", "choices": list(VARIANTS)},
    )

    def __post_init__(self):
        check_range("dpop_lambda", self.dpop_lambda, 0)
        check_choice("dpop_variant", self.dpop_variant, VARIANTS)
        super().__post_init__()


def dpop_loss(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    beta: float,
    dpop_lambda: float,
    variant: str = "inside",
) -> torch.Tensor:
    """DPOP loss of each pair, (B,), from log pi - log ref of the chosen and of the rejected responses, each (B,)."""
    penalty = dpop_lambda * torch.relu(-chosen_logratios)
    margins = chosen_logratios - rejected_logratios
    if variant == "inside":
        return -F.logsigmoid(beta * (margins - penalty))
    return -F.logsigmoid(beta * margins) + penalty


class DPOPTrainer(PreferenceTrainer):
    """Trainer for DPO-Positive, with the arguments of [`~trl.DPOTrainer`] and the data of [`PreferenceTrainer`].

    Example:

    ```python
    from datasets import load_dataset
    from trl_ift import DPOPConfig, DPOPTrainer

    trainer = DPOPTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=DPOPConfig("qwen-dpop"),
        train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    )
    trainer.train()
    ```
    """

    config_class = DPOPConfig
    method = "dpop"
    card_options = ("beta",)
    _tag_names = ["trl", "trl-ift", "dpop"]  # noqa: RUF012
    _name = "DPOP"
    _paper = arxiv_paper(
        "2402.13228",
        "pal2024smaug",
        "Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive",
        "Arka Pal and Deep Karkhanis and Samuel Dooley and Manley Roberts and Siddartha Naidu and Colin White",
        2024,
    )

    def pair_loss(self, batch: PreferenceBatch) -> torch.Tensor:
        chosen, rejected = batch.chosen.logratios, batch.rejected.logratios
        self._record_mean("dpop/penalty", torch.relu(-chosen).sum(), chosen.numel())
        self._record_mean("dpop/active", (chosen < 0).sum(), chosen.numel())
        return dpop_loss(chosen, rejected, self.beta, self.args.dpop_lambda, self.args.dpop_variant)
