r"""Efficient Exact Optimization (EXO), https://huggingface.co/papers/2402.00856.

A distribution over K responses to one prompt is fitted to the one that their rewards induce. DPO minimises the forward KL
divergence, which spreads the policy over all that the rewards find good; EXO the reverse one, which seeks a mode, and has
asymptotically the update direction of RLHF. With r_i = log pi(y_i|x) - log ref(y_i|x), sums over the tokens of y_i, and
y_i ~ ref:

    q = softmax_i( beta r_i )          p = softmax_i( R_i / beta_r )

    "exo-rw"      L = sum_i q_i ( log q_i - log p_i )                                            KL(q || p)
    "exo-pref"    as "exo-rw", K = 2, with p = (1 - eps, eps) for the preferred and the other response
    "dpo-rw"      L = - sum_i p_i log q_i                                                        KL(p || q) + const

Nothing is detached but the targets. At the optimum r_i = R_i / (beta beta_r) + const: the coefficient of the KL penalty that
this stands for is beta beta_r. beta is the paper's beta_pi. Plain DPO is "dpo-rw" with all mass on one of two responses.

"exo-pref" is TRL's `loss_type="exo_pair"` with eps = `label_smoothing`. The official code has the targets (0, log eps) in the
place of (log(1 - eps), log eps), with log eps = -10: with eps' = eps / (1 + eps) in the normalised form the losses differ by
the constant log(1 + eps), and the gradients are the same.

The official scripts divide the logits of policy and reference by 0.8, the temperature that the responses were sampled at
(`exo_temperature`). The default 1 is our choice: log-probabilities as TRL computes them.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ..checks import check_choice, check_range, check_unused
from ..hub.paper import arxiv_paper
from .lists import ListTrainer, check_group_size
from .trainer import PairLossConfig, PreferenceBatch


LOSSES = ("exo-rw", "exo-pref", "dpo-rw")
TARGETS = ("normalized", "unnormalized")


@dataclass
class EXOConfig(PairLossConfig):
    r"""
    Configuration class for the [`EXOTrainer`].

    This class includes only the parameters that are specific to EXO, and those whose defaults differ from TRL's.

    Parameters:
        beta (`float`, *optional*, defaults to `0.5`):
            beta_pi, the weight of the log-ratios, > 0 (the official scripts: 0.5, and 0.1 for IMDB).
        precompute_ref_log_probs (`bool`, *optional*, defaults to `True`):
            Whether to store the reference log-probabilities of all responses before training (our choice: K forwards a
            prompt are saved in every epoch, and no reference model is kept).
        exo_loss (`str`, *optional*, defaults to `"exo-rw"`):
            `"exo-rw"` (reverse KL to the rewards), `"exo-pref"` (two responses, reverse KL to a smoothed preference) or
            `"dpo-rw"` (forward KL to the rewards).
        exo_beta_r (`float`, *optional*, defaults to `0.5`):
            Temperature of the rewards, > 0, in the units of the rewards; not for `"exo-pref"`.
        exo_epsilon (`float`, *optional*, defaults to `0.001`):
            Probability of the response that is not preferred, in (0, 1), for `"exo-pref"` (TRL's recommendation; the
            official code: exp(-10) with `exo_targets="unnormalized"`).
        exo_targets (`str`, *optional*, defaults to `"normalized"`):
            Log-probabilities of the targets of `"exo-pref"`: `"normalized"`, (log(1 - eps), log eps), or `"unnormalized"`,
            (0, log eps), as the official code has them.
        exo_temperature (`float`, *optional*, defaults to `1.0`):
            What the logits of policy and reference are divided by, > 0: the temperature that the responses were sampled at
            (the official scripts: 0.8; 1 is our choice).
        exo_num_contrastive (`int`, *optional*):
            Responses of a group, >= 2: the responses of a row are split into groups in their order. One group a row by
            default (our choice; the official scripts: 2).
    """

    beta: float = field(
        default=0.5, metadata={"help": "beta_pi, the weight of the log-ratios (official scripts: 0.5)."}
    )
    precompute_ref_log_probs: bool = field(
        default=True,
        metadata={"help": "Whether to store the reference log-probabilities of all responses before training."},
    )
    exo_loss: str = field(
        default="exo-rw",
        metadata={
            "help": "Reverse KL to the rewards (exo-rw), to a smoothed preference between two (exo-pref), or forward KL to "
            "the rewards (dpo-rw).",
            "choices": list(LOSSES),
        },
    )
    exo_beta_r: float = field(default=0.5, metadata={"help": "Temperature of the rewards, in their units."})
    exo_epsilon: float = field(
        default=1e-3, metadata={"help": "Probability of the response that is not preferred, for exo-pref."}
    )
    exo_targets: str = field(
        default="normalized",
        metadata={
            "help": "Log-targets of exo-pref: (log(1 - eps), log eps), or (0, log eps) as in the official code.",
            "choices": list(TARGETS),
        },
    )
    exo_temperature: float = field(
        default=1.0,
        metadata={
            "help": "What the logits of policy and reference are divided by: the temperature that the responses were sampled "
            "at (official scripts: 0.8)."
        },
    )
    exo_num_contrastive: int | None = field(
        default=None,
        metadata={"help": "Responses of a group, into which rows are split in order. Default: one group a row."},
    )

    def __post_init__(self):
        check_choice("exo_loss", self.exo_loss, LOSSES)
        check_choice("exo_targets", self.exo_targets, TARGETS)
        check_range("exo_beta_r", self.exo_beta_r, 0, low_open=True)
        check_range("exo_epsilon", self.exo_epsilon, 0, 1, low_open=True)
        check_range("exo_temperature", self.exo_temperature, 0, low_open=True)
        check_group_size("exo_num_contrastive", self.exo_num_contrastive)
        unused = ["exo_beta_r"] if self.exo_loss == "exo-pref" else ["exo_epsilon", "exo_targets"]
        check_unused(self, unused, f"with `exo_loss={self.exo_loss!r}`")
        check_unused(self, ["ld_alpha"], "on lists: it compares the lengths of two responses")
        if self.exo_epsilon == 1:
            raise ValueError("`exo_epsilon=1` is out of range: it must lie in (0, 1).")
        if self.exo_loss == "exo-pref" and self.exo_num_contrastive not in (None, 2):
            raise ValueError(
                f"`exo_loss='exo-pref'` compares two responses, and `exo_num_contrastive={self.exo_num_contrastive}`. Set it "
                "to 2, or take 'exo-rw' or 'dpo-rw'."
            )
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError(
                "`sync_ref_model=True` needs a reference model beside the policy: set `precompute_ref_log_probs=False`."
            )
        super().__post_init__()


def list_log_probs(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Log of the softmax of `scores`, (B, K), over the responses of each row that `mask`, (B, K), has; 0 elsewhere."""
    return F.log_softmax(scores.masked_fill(~mask, -math.inf), -1).masked_fill(~mask, 0.0)


def preference_log_targets(epsilon: float, targets: str = "normalized") -> list[float]:
    """Log-targets of "exo-pref": of the preferred response and of the other one."""
    return [math.log1p(-epsilon) if targets == "normalized" else 0.0, math.log(epsilon)]


def exo_loss(log_q: torch.Tensor, log_p: torch.Tensor, mask: torch.Tensor, loss: str = "exo-rw") -> torch.Tensor:
    """EXO loss of each list, (B,).

    Args:
        log_q: Log-probabilities of the responses under the policy's distribution, (B, K).
        log_p: Log-targets, (B, K), constants.
        mask: Whether a row has a response there, (B, K).
        loss: `"exo-rw"`, `"exo-pref"` (the same on other targets) or `"dpo-rw"`.
    """
    terms = -log_p.exp() * log_q if loss == "dpo-rw" else log_q.exp() * (log_q - log_p)
    return (terms * mask).sum(-1)


class EXOTrainer(ListTrainer):
    """Trainer for EXO, with the arguments of [`~trl.DPOTrainer`] and the data of [`ListTrainer`].

    Example:

    ```python
    from datasets import Dataset
    from trl_ift import EXOConfig, EXOTrainer

    rows = [{"prompt": "2 + 2 =", "completions": [" 4", " 5", " four"], "rewards": [1.0, 0.0, 0.8]}]
    trainer = EXOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct", args=EXOConfig("qwen-exo"), train_dataset=Dataset.from_list(rows)
    )
    trainer.train()
    ```
    """

    config_class = EXOConfig
    method = "exo"
    card_options = ("beta",)
    _tag_names = ["trl", "trl-ift", "exo"]  # noqa: RUF012
    _name = "EXO"
    _paper = arxiv_paper(
        "2402.00856",
        "ji2024towards",
        "Towards Efficient Exact Optimization of Language Model Alignment",
        "Haozhe Ji and Cheng Lu and Yilin Niu and Pei Ke and Hongning Wang and Jun Zhu and Jie Tang and Minlie Huang",
        2024,
    )

    def _declare(self, args: EXOConfig) -> None:
        self.logit_temperature = args.exo_temperature
        self.group_size = args.exo_num_contrastive
        self.preferences_only = args.exo_loss == "exo-pref"

    def pair_loss(self, batch: PreferenceBatch) -> torch.Tensor:
        args = self.args
        logratios, rewards, mask = self.lists_of(batch)
        log_q = list_log_probs(self.beta * logratios, mask)
        if args.exo_loss == "exo-pref":
            log_p = log_q.new_tensor(preference_log_targets(args.exo_epsilon, args.exo_targets)).expand_as(log_q)
        else:
            log_p = list_log_probs(rewards / args.exo_beta_r, mask)
        self._record(log_q.detach(), log_p, rewards, mask)
        return exo_loss(log_q, log_p, mask, args.exo_loss)

    def _record(self, log_q: torch.Tensor, log_p: torch.Tensor, rewards: torch.Tensor, mask: torch.Tensor) -> None:
        q, number = log_q.exp() * mask, len(log_q)
        self._record_mean("exo/kl", (q * (log_q - log_p)).sum(), number)
        self._record_mean("exo/best_prob", q[:, 0].sum(), number)
        self._record_mean("exo/top_prob", q.max(1).values.sum(), number)
        self._record_mean("exo/expected_reward", (q * rewards).sum(), number)
