r"""MinorDPO, https://huggingface.co/papers/2408.09834.

DPO that stops pushing a rejected response down once the policy finds it no likelier than the reference does. With
r = log pi - log ref, sums over the tokens of a response:

    L = - log sigma( beta [ r_w - max(0, r_l) ] )

Its gradient is DPO's for pairs with r_l > 0, and none on the rejected response otherwise. Training starts at r_l = 0, exactly
at the kink; "only while the policy gives more than the reference" reads as strict, so that the derivative there is 0. (An
independent implementation has 1 there: its first step pushes the rejected responses down.) As max(0, r_l) >= r_l, the loss is
at least DPO's: the values of the two are not to be compared.

No official code is published, and the ranges that the paper tried are not known to us.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..hub.paper import arxiv_paper
from .trainer import PairLossConfig, PreferenceBatch, PreferenceTrainer


@dataclass
class MinorDPOConfig(PairLossConfig):
    r"""
    Configuration class for the [`MinorDPOTrainer`]: no options beside those of [`~trl.DPOConfig`], and `beta` as in DPO.
    """


def minor_dpo_loss(chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, beta: float) -> torch.Tensor:
    """MinorDPO loss of each pair, (B,), from log pi - log ref of the chosen and of the rejected responses, each (B,)."""
    return -F.logsigmoid(beta * (chosen_logratios - torch.relu(rejected_logratios)))


class MinorDPOTrainer(PreferenceTrainer):
    """Trainer for MinorDPO, with the arguments of [`~trl.DPOTrainer`] and the data of [`PreferenceTrainer`].

    The metrics `rewards/*` are of the log-ratios themselves, as in DPO, not of what the loss cuts off.

    Example:

    ```python
    from datasets import load_dataset
    from trl_ift import MinorDPOConfig, MinorDPOTrainer

    trainer = MinorDPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=MinorDPOConfig("qwen-minor-dpo"),
        train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    )
    trainer.train()
    ```
    """

    config_class = MinorDPOConfig
    method = "minor-dpo"
    card_options = ("beta",)
    _tag_names = ["trl", "trl-ift", "minor-dpo"]  # noqa: RUF012
    _name = "MinorDPO"
    _paper = arxiv_paper(
        "2408.09834",
        "xie2024minor",
        "Minor DPO reject penalty to increase training robustness",
        "Shiming Xie and Hong Chen and Fred Yu and Zeye Sun and Xiuyu Wu and Yingfan Hu",
        2024,
    )

    def pair_loss(self, batch: PreferenceBatch) -> torch.Tensor:
        rejected = batch.rejected.logratios
        self._record_mean("minor_dpo/gate_fraction", (rejected > 0).sum(), rejected.numel())
        return minor_dpo_loss(batch.chosen.logratios, rejected, self.beta)
