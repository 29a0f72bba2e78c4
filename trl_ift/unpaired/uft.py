r"""Unified Fine-Tuning (UFT), https://huggingface.co/papers/2410.21438, and UNA, https://huggingface.co/papers/2408.15339.

Demonstrations and feedback of any form under one loss: a score in [0, 1] that the policy is to reproduce as an implicit score.
Demonstrations are feedback with the highest score. With log-probabilities summed over the tokens of a response:

    r(x, y) = beta [ log pi(y|x) - log ref(y|x) ] + c            the generalised implicit reward; c = 0 in all experiments
    s(x, y) = sigma( r(x, y) )

    "mse"    L = ( s(x, y) - score )^2                           UNA-score; UFT is this on the merged data
    "bce"    L = - score log s(x, y) - (1 - score) log( 1 - s(x, y) )

(Equations 11 and 13 of the UNA paper have a minus in front of the squared error, a misprint: the authors' code minimises it.)
For binary feedback the score is 1 or 0. On a pair UNA is DPO: - log sigma( r(x, y_w) - r(x, y_l) ).

At the start s = 0.5 for every response: a score of 0.5 gives no gradient, less pushes down. The gradient of "mse" is
2 (s - score) s (1 - s) beta grad log pi, nearly none where s is near 0 or 1, also when it is badly wrong; that of "bce" is
(s - score) beta grad log pi. With a score of 1 the optimum is at an infinite ratio, and only saturation stops.

Not to be confused with "UFT: Unifying Supervised and Reinforcement Fine-Tuning", another method. The weight of demonstrations,
a constant c other than 0 and the clip of the scores are extensions, not in the papers.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ..checks import check_choice, check_range
from ..data.rows import first_row
from ..hub.paper import arxiv_paper
from .trainer import UnpairedBatch, UnpairedConfig, UnpairedTrainer


SCORE_LOSSES = ("mse", "bce")
# |r| from which the implicit score counts as saturated
_SATURATED = 4.0


@dataclass
class UFTConfig(UnpairedConfig):
    r"""
    Configuration class for the [`UFTTrainer`].

    This class includes only the parameters that are specific to UFT, and `beta`, whose default differs from TRL's.

    Parameters:
        beta (`float`, *optional*, defaults to `0.01`):
            Temperature, > 0 (the paper's for UFT; 0.03 for scores alone).
        score_loss (`str`, *optional*, defaults to `"mse"`):
            Distance of implicit score and score: `"mse"`, or `"bce"` (in the paper for binary feedback).
        sft_weight (`float`, *optional*, defaults to `1.0`):
            Weight, >= 0, of the rows that the column `is_sft` marks as demonstrations (not in the papers).
        reward_offset (`float`, *optional*, defaults to `0.0`):
            Constant c of the implicit reward (0 in the papers' experiments).
        score_clip (`float`, *optional*, defaults to `0.0`):
            Smoothing of the scores, in [0, 0.5): they are clipped to [e, 1 - e] (not in the papers).
    """

    beta: float = field(default=0.01, metadata={"help": "Temperature (the paper's for UFT; 0.03 for scores alone)."})
    score_loss: str = field(
        default="mse", metadata={"help": "Distance of implicit score and score.", "choices": list(SCORE_LOSSES)}
    )
    sft_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the rows that the column 'is_sft' marks as demonstrations (not in the papers)."},
    )
    reward_offset: float = field(default=0.0, metadata={"help": "Constant added to the implicit reward."})
    score_clip: float = field(
        default=0.0, metadata={"help": "Smoothing e of the scores, clipped to [e, 1 - e] (not in the papers)."}
    )

    def __post_init__(self):
        check_choice("score_loss", self.score_loss, SCORE_LOSSES)
        check_range("sft_weight", self.sft_weight, 0)
        check_range("reward_offset", self.reward_offset, -float("inf"))
        check_range("score_clip", self.score_clip, 0, 0.5)
        if self.score_clip == 0.5:
            raise ValueError("`score_clip=0.5` makes all scores equal. Choose less.")
        super().__post_init__()


def uft_loss(
    logratios: torch.Tensor,
    score: torch.Tensor,
    beta: float,
    score_loss: str = "mse",
    reward_offset: float = 0.0,
    score_clip: float = 0.0,
) -> torch.Tensor:
    """UFT loss of each response, (N,), from log pi - log ref, (N,), and its score in [0, 1], (N,)."""
    z = beta * logratios + reward_offset
    target = score.clamp(score_clip, 1 - score_clip)
    if score_loss == "mse":
        return (torch.sigmoid(z) - target) ** 2
    return -target * F.logsigmoid(z) - (1 - target) * F.logsigmoid(-z)


class UFTTrainer(UnpairedTrainer):
    """Trainer for UFT and UNA, with the arguments of [`~trl.KTOTrainer`] and the data of [`UnpairedTrainer`].

    `score` is the target; rows with a `label` alone have the score 1 or 0, demonstrations marked by `is_sft` the score 1. The
    metrics `rewards/*` sort rows by `label`, or by a score of at least 0.5.

    Example:

    ```python
    from datasets import load_dataset
    from trl_ift import UFTConfig, UFTTrainer

    trainer = UFTTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=UFTConfig("qwen-uft"),
        train_dataset=load_dataset("trl-lib/kto-mix-14k", split="train"),
    )
    trainer.train()
    ```
    """

    config_class = UFTConfig
    method = "uft"
    card_options = ("beta", "desirable_weight", "undesirable_weight")
    _tag_names = ["trl", "trl-ift", "uft"]  # noqa: RUF012
    _name = "UFT"
    _paper = arxiv_paper(
        "2410.21438",
        "wang2024uft",
        "UFT: Unifying Fine-Tuning of SFT and RLHF/DPO/UNA through a Generalized Implicit Reward Function",
        "Zhichao Wang and Bin Bi and Zixu Zhu and Xiangbo Mao and Jun Wang and Shiyu Wang",
        2024,
    )

    def _check_dataset(self, args, dataset, name, stored):
        super()._check_dataset(args, dataset, name, stored)
        if name == "train_dataset" and "is_sft" not in first_row(dataset) and args.sft_weight != 1:
            raise ValueError(
                f"`sft_weight={args.sft_weight}` has no effect: `{name}` lacks the column 'is_sft', which marks "
                "demonstrations. Add it, or drop the option."
            )

    def implicit_rewards(self, batch: UnpairedBatch) -> torch.Tensor:
        return self.beta * batch.logratios + self.args.reward_offset

    def row_loss(self, batch: UnpairedBatch) -> torch.Tensor:
        args = self.args
        losses = uft_loss(
            batch.logratios, batch.score, self.beta, args.score_loss, args.reward_offset, args.score_clip
        )
        self._record(batch)
        if (is_sft := batch.columns.get("is_sft")) is not None:
            losses = losses * torch.where(is_sft > 0, args.sft_weight, 1.0)
        return losses

    def _record(self, batch: UnpairedBatch) -> None:
        z = self.implicit_rewards(batch).detach()
        found, score = z.sigmoid() - 0.5, batch.score - 0.5
        number = z.numel()
        self._record_mean("uft/mse", (found - score).square().sum(), number)
        self._record_mean("uft/saturated", (z.abs() > _SATURATED).sum(), number)
        if (is_sft := batch.columns.get("is_sft")) is not None:
            self._record_mean("uft/rewards_sft", (z * is_sft).sum(), is_sft.sum())
        moments = {"x": found, "y": score, "xx": found * found, "yy": score * score, "xy": found * score}
        for name, value in moments.items():
            self._record_mean(f"_{name}", value.sum(), number)

    def derived_metrics(self, means: dict[str, float]) -> dict[str, float]:
        """As in the base, with the correlation of implicit scores and scores since the last log."""
        found = super().derived_metrics(means)
        if "_x" in means:
            x, y = means["_x"], means["_y"]
            variances = means["_xx"] - x * x, means["_yy"] - y * y
            if min(variances) > 1e-12:  # else nothing but rounding
                found["uft/correlation"] = (means["_xy"] - x * y) / (variances[0] * variances[1]) ** 0.5
        return found
