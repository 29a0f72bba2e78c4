r"""DavIR-DPO, https://huggingface.co/papers/2310.13008 (second version).

DPO in which each implicit reward is divided by the size of the response's own log-probability under the reference, so that
it is a share of it and no longer grows with the length of the response. With sums over the tokens of y,

    r(y) = log pi(y|x) - log ref(y|x)

    L = -log sigma( beta r(y_w) / |log ref(y_w|x)|  -  beta r(y_l) / |log ref(y_l|x)| )

and both |log ref| constants for the gradient, which is DPO's with beta / |log ref(y|x)| in the place of beta, one for each
response. Where both are equal to c, it is DPO at beta / c. Because r / |log ref| = 1 - log pi / log ref, a reward is at most
beta, and the same if both log-probabilities of a response are twice as large.

The paper's beta is not known to us.
"""

import textwrap
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers.utils import logging

from .trainer import PairLossConfig, PreferenceBatch, PreferenceTrainer, Responses


# Smallest |log ref|, in nats, that a reward is divided by (our choice): that of a response with a probability of 99 %
MIN_NATS = 0.01

logger = logging.get_logger(__name__)


@dataclass
class DavIRDPOConfig(PairLossConfig):
    r"""
    Configuration class for the [`DavIRDPOTrainer`].

    This class includes only the parameter whose default differs from TRL's. For a full list of training arguments, please
    refer to the [`~transformers.TrainingArguments`] and [`~trl.DPOConfig`] documentation.

    Parameters:
        beta (`float`, *optional*, defaults to `5.0`):
            Temperature, > 0, of rewards that are shares of a log-probability, so that it must be larger than DPO's (our
            choice, the paper's value is not known to us; try 1 to 10). The metric `davir_dpo/effective_beta` is the
            temperature of a DPO with the same gradient.
    """

    beta: float = field(
        default=5.0,
        metadata={"help": "Temperature of the relative rewards; larger than DPO's, try 1 to 10."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.beta < 0.5:
            logger.warning(
                f"`beta={self.beta}` is made for the rewards of DPO, which are nats a response; those of DavIR-DPO are shares "
                "of its log-probability. Consider `beta=5.0`."
            )


def reference_nats(ref_logps: torch.Tensor) -> torch.Tensor:
    """|log ref|, at least `MIN_NATS`, of log-probabilities of any shape; without a gradient."""
    return ref_logps.detach().abs().clamp(min=MIN_NATS)


def relative_rewards(logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """r / |log ref| of N responses, (N,), from log-probabilities summed over them, (N,)."""
    return (logps - ref_logps) / reference_nats(ref_logps)


def davir_dpo_loss(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    chosen_ref_logps: torch.Tensor,
    rejected_ref_logps: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """DavIR-DPO loss of each pair.

    Args:
        chosen_logps: Summed log-probabilities of the chosen responses, (B,).
        rejected_logps: Those of the rejected ones, (B,).
        chosen_ref_logps: Those of the chosen ones under the reference, (B,).
        rejected_ref_logps: Those of the rejected ones under the reference, (B,).
        beta: Temperature.

    Returns:
        Loss of each pair, (B,).
    """
    chosen = relative_rewards(chosen_logps, chosen_ref_logps)
    rejected = relative_rewards(rejected_logps, rejected_ref_logps)
    return -F.logsigmoid(beta * (chosen - rejected))


class DavIRDPOTrainer(PreferenceTrainer):
    """Trainer for DavIR-DPO, with the arguments of [`~trl.DPOTrainer`] and the data of [`PreferenceTrainer`].

    Example:

    ```python
    from datasets import load_dataset
    from trl_ift import DavIRDPOConfig, DavIRDPOTrainer

    trainer = DavIRDPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=DavIRDPOConfig("qwen-davir-dpo"),
        train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    )
    trainer.train()
    ```
    """

    config_class = DavIRDPOConfig
    method = "davir-dpo"
    card_options = ("beta",)
    _tag_names = ["trl", "trl-ift", "davir-dpo"]  # noqa: RUF012
    _name = "DavIR-DPO"
    _paper = {  # noqa: RUF012
        "title": "DavIR: Data Selection via Implicit Reward for Large Language Models",
        "id": "2310.13008",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @misc{zhou2025davir,
                title         = {{DavIR: Data Selection via Implicit Reward for Large Language Models}},
                author        = {Haotian Zhou and Tingkai Liu and Qianli Ma and Yufeng Zhang and Jianbo Yuan
                                 and Pengfei Liu and Yang You and Hongxia Yang},
                year          = 2025,
                note          = {ACL 2025},
                eprint        = {2310.13008},
                archivePrefix = {arXiv},
                url           = {https://arxiv.org/abs/2310.13008},
            }"""),
    }

    def pair_loss(self, batch: PreferenceBatch) -> torch.Tensor:
        chosen, rejected = batch.chosen, batch.rejected
        nats = reference_nats(torch.cat([chosen.ref_logps, rejected.ref_logps]))
        self._record_mean("davir_dpo/effective_beta", (self.beta / nats).sum(), nats.numel())
        return davir_dpo_loss(chosen.logps, rejected.logps, chosen.ref_logps, rejected.ref_logps, self.beta)

    def implicit_rewards(self, batch: PreferenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
        return self._reward(batch.chosen), self._reward(batch.rejected)

    def _reward(self, responses: Responses) -> torch.Tensor:
        return self.beta * relative_rewards(responses.logps, responses.ref_logps)
