r"""Token-level Importance Sampling DPO (TIS-DPO), https://huggingface.co/papers/2410.04350.

DPO counts every token of a response alike, the good and the bad parts of one answer. TIS-DPO weighs them, by weights w_t that
are estimated once, before training, from a pair of contrastive models
([`~trl_ift.data.estimate_token_weights`], `trl-ift token-weights`). With u_t(y) = log pi(y_t|x,y_<t) - log ref(y_t|x,y_<t):

    u = beta sum_t w_t u_t(y_w)  -  beta sum_t w_t u_t(y_l)

    L = - log sigma( u - eta )

The weights are constants: they have no gradient. With all weights c it is DPO with beta c. The term eta, a difference of
weighted sequential KL divergences, which the official code leaves out by default, is left out here: eta = 0.

A reference whose log-probabilities are stored before training is stored as the weighted sums.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..data.rows import first_row
from ..hub.paper import arxiv_paper
from .collator import TokenColumn
from .trainer import PairLossConfig, PreferenceBatch, PreferenceTrainer


CHOSEN_WEIGHTS = TokenColumn("chosen_weights", required=True, response="chosen")
REJECTED_WEIGHTS = TokenColumn("rejected_weights", required=True, response="rejected")


@dataclass
class TISDPOConfig(PairLossConfig):
    r"""
    Configuration class for the [`TISDPOTrainer`]: no options beside those of [`~trl.DPOConfig`], and `beta` as in DPO. The
    options of the weights are those of [`~trl_ift.data.estimate_token_weights`].
    """

    def __post_init__(self):
        if self.ld_alpha is not None:
            raise ValueError(
                f"`ld_alpha={self.ld_alpha}` weighs the tokens of a response by their place, and TIS-DPO by the columns "
                f"'{CHOSEN_WEIGHTS.name}' and '{REJECTED_WEIGHTS.name}'. Drop it, or multiply it into the columns."
            )
        super().__post_init__()


def tis_dpo_loss(chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, beta: float) -> torch.Tensor:
    """TIS-DPO loss of each pair, (B,), from sum_t w_t (log pi - log ref) of its responses, each (B,)."""
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios))


class TISDPOTrainer(PreferenceTrainer):
    """Trainer for TIS-DPO, with the arguments of [`~trl.DPOTrainer`].

    Beside those of [`PreferenceTrainer`], the data have `chosen_weights` and `rejected_weights`: lists of floats, one a token
    of the response as the trainer tokenizes it, its end-of-sequence token included. The metrics `logps/*` and `rewards/*` are
    of the weighted sums.

    Example:

    ```python
    from datasets import load_dataset
    from trl_ift import TISDPOConfig, TISDPOTrainer
    from trl_ift.data import estimate_token_weights

    pairs = load_dataset("trl-lib/ultrafeedback_binarized", split="train[:1000]")
    pairs = estimate_token_weights(pairs, "qwen-dpo", "qwen-reverse-dpo")  # trained on the pairs, and on the pairs swapped
    trainer = TISDPOTrainer(model="Qwen/Qwen2.5-0.5B-Instruct", args=TISDPOConfig("qwen-tis-dpo"), train_dataset=pairs)
    trainer.train()
    ```
    """

    config_class = TISDPOConfig
    method = "tis-dpo"
    card_options = ("beta",)
    columns = (CHOSEN_WEIGHTS, REJECTED_WEIGHTS)
    token_weights = (CHOSEN_WEIGHTS.name, REJECTED_WEIGHTS.name)
    _tag_names = ["trl", "trl-ift", "tis-dpo"]  # noqa: RUF012
    _name = "TIS-DPO"
    _paper = arxiv_paper(
        "2410.04350",
        "liu2024tisdpo",
        "TIS-DPO: Token-level Importance Sampling for Direct Preference Optimization With Estimated Weights",
        "Aiwei Liu and Haoping Bai and Zhiyun Lu and Yanchao Sun and Xiang Kong and Simon Wang and Jiulong Shan and Albin "
        "Madappally Jose and Xiaojiang Liu and Lijie Wen and Philip S. Yu and Meng Cao",
        2024,
    )

    def _check_dataset(self, args: Any, dataset: Any, name: str, stored: bool) -> None:
        row = first_row(dataset)
        if row and (missing := [column.name for column in self.columns if column.name not in row]):
            raise ValueError(
                f"`{name}` lacks the column {' and '.join(map(repr, missing))}; its columns are {sorted(row)}. "
                "`trl_ift.data.estimate_token_weights` (`trl-ift token-weights`) adds the weights of tokens to pairs."
            )
        super()._check_dataset(args, dataset, name, stored)

    def pair_loss(self, batch: PreferenceBatch) -> torch.Tensor:
        for kind, responses, column in (
            ("chosen", batch.chosen, CHOSEN_WEIGHTS),
            ("rejected", batch.rejected, REJECTED_WEIGHTS),
        ):
            weights = batch.columns[column.name]
            self._record_mean(f"tis_dpo/{kind}_weight", weights.sum(), responses.lengths.sum())
        return tis_dpo_loss(batch.chosen.logratios, batch.rejected.logratios, self.beta)
