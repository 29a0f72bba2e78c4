r"""Triple Preference Optimization (TPO, TPO-L), https://huggingface.co/papers/2405.16681.

One stage in place of SFT and preference optimisation: three responses a prompt, a gold one that is imitated and a pair that
is contrasted; no reference model. With log pi(y|x) the sum over the tokens of y and A(y) their mean:

    L_TPO   = -log sigma( beta log pi(y_w|x) - beta log pi(y_l|x) )  -  alpha log pi(y_gold|x)
    L_TPO-L = -log sigma( beta A(y_w) - beta A(y_l) - gamma )        -  alpha log pi(y_gold|x)

The first part is a mean over pairs. How the second is averaged is `nll_normalization`: the formula sums over tokens, the
released code takes the mean over the gold tokens of a micro-batch.
"""

import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.utils import logging

from ..checks import check_choice, check_range
from .collator import Branch
from .trainer import PreferenceBatch, PreferenceConfig, PreferenceTrainer, Responses, Term


LOSS_TYPES = ("sigmoid", "hinge", "ipo", "tpo-l")
GOLD_SOURCES = ("reference", "chosen")
# What the sum of the gold term is divided by
NORMALIZATIONS = {
    "global_token_mean": "token",
    "batch_token_mean": "batch token",
    "sequence_mean": "row",
    "sequence_sum": "row",
}
# Sums of log-probabilities differ by tens of nats, means by tenths
_DEFAULT_BETA = {"sigmoid": 0.01, "hinge": 0.01, "ipo": 0.5, "tpo-l": 2.0}

logger = logging.get_logger(__name__)


@dataclass
class TPOConfig(PreferenceConfig):
    r"""
    Configuration class for the [`TPOTrainer`].

    Names and defaults are those of [`~trl.experimental.tpo.TPOConfig`], except where the entry says "our choice". For a full
    list of training arguments, please refer to the [`~transformers.TrainingArguments`] and [`~trl.DPOConfig`] documentation.

    Parameters:
        > Parameters that control the pair term

        loss_type (`str`, *optional*, defaults to `"sigmoid"`):
            `"sigmoid"` (TPO), `"tpo-l"` (TPO-L: means in place of sums, and a margin), `"hinge"` or `"ipo"` (on means).
        beta (`float`, *optional*):
            Temperature, > 0. If `None`: `0.01` for `"sigmoid"` and `"hinge"`, and (our choice, TRL has 0.01 everywhere)
            `2.0` for `"tpo-l"`, `0.5` for `"ipo"`, whose log-probabilities are means.
        tpo_l_gamma (`float`, *optional*):
            Target margin of `"tpo-l"`, >= 0, in units of beta A. If `None`: `1.6` with the default beta, one of the authors'
            settings, and TRL's `0.5` with a beta of your own.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            Probability that a label is flipped, in [0, 1]; for `"sigmoid"` and `"tpo-l"`.

        > Parameters that control the gold term

        tpo_alpha (`float`, *optional*, defaults to `1.0`):
            Weight of the negative log-likelihood of the gold response, >= 0. The authors use 1 for base and 0.05 for
            instruction-tuned models. `0` drops the gold branch; the dataset needs no gold column then.
        nll_normalization (`str`, *optional*, defaults to `"global_token_mean"`):
            `"global_token_mean"` (our choice): mean over the gold tokens of the optimizer step, on all processes; the same
            gradient however the step is split. `"batch_token_mean"`: mean over those of the micro-batch (the released code
            and TRL), the same without accumulation on one process. `"sequence_mean"`: mean over responses of their token
            mean. `"sequence_sum"`: mean over responses of their sum, the formula of the paper taken literally; larger by the
            number of tokens, so lower `tpo_alpha` by that factor.
        gold_from (`str`, *optional*, defaults to `"reference"`):
            Where the gold response comes from: the column `reference` (or `gold`), or `"chosen"`, which makes it CPO.
    """

    learning_rate: float = field(default=5e-7, metadata={"help": "The initial learning rate for AdamW."})
    loss_type: str = field(
        default="sigmoid",
        metadata={"help": "Pair term: 'sigmoid' (TPO), 'tpo-l', 'hinge' or 'ipo'.", "choices": list(LOSS_TYPES)},
    )
    beta: float | None = field(
        default=None,
        metadata={"help": "Temperature. Default: 0.01 for 'sigmoid' and 'hinge', 2.0 for 'tpo-l', 0.5 for 'ipo'."},
    )
    tpo_l_gamma: float | None = field(
        default=None,
        metadata={"help": "Target margin of 'tpo-l'. Default: 1.6 with the default beta, else 0.5."},
    )
    tpo_alpha: float = field(
        default=1.0, metadata={"help": "Weight of the negative log-likelihood of the gold response; 0 drops it."}
    )
    nll_normalization: str = field(
        default="global_token_mean",
        metadata={
            "help": "Mean of the gold term: over the gold tokens of the optimizer step ('global_token_mean') or of the "
            "micro-batch ('batch_token_mean', as TRL), or over responses of their mean or sum.",
            "choices": list(NORMALIZATIONS),
        },
    )
    gold_from: str = field(
        default="reference",
        metadata={
            "help": "Where the gold response comes from: column 'reference' (or 'gold'), or 'chosen'.",
            "choices": list(GOLD_SOURCES),
        },
    )

    def __post_init__(self):
        if isinstance(self.loss_type, list) and len(self.loss_type) == 1:  # TRL's config keeps a list
            (self.loss_type,) = self.loss_type
        check_choice("loss_type", self.loss_type, LOSS_TYPES)
        check_choice("nll_normalization", self.nll_normalization, tuple(NORMALIZATIONS))
        check_choice("gold_from", self.gold_from, GOLD_SOURCES)
        check_range("tpo_alpha", self.tpo_alpha, 0)
        self._check_pair_options()
        if self.tpo_alpha == 0 and (self.nll_normalization, self.gold_from) != ("global_token_mean", "reference"):
            raise ValueError("`nll_normalization` and `gold_from` have no effect with `tpo_alpha=0`. Drop them.")
        loss_type = self.loss_type
        super().__post_init__()
        self.loss_type = loss_type
        self._refuse_loss_options("loss_type", "label_smoothing")
        self._refuse_reference_options()

    def _check_loss_type(self) -> None:
        pass  # checked above; TRL's losses are others

    def _check_pair_options(self) -> None:
        given = self.beta
        beta = self.beta = _DEFAULT_BETA[self.loss_type] if given is None else given
        if self.loss_type == "tpo-l":
            if self.tpo_l_gamma is None:
                self.tpo_l_gamma = 1.6 if given is None else 0.5
            check_range("tpo_l_gamma", self.tpo_l_gamma, 0)
        elif self.tpo_l_gamma is not None:
            raise ValueError(
                f"`tpo_l_gamma` has no effect with `loss_type={self.loss_type!r}`. Set `loss_type='tpo-l'`, or drop it."
            )
        if self.loss_type in ("hinge", "ipo") and self.label_smoothing != 0:
            raise ValueError(
                f"`label_smoothing` has no effect with `loss_type={self.loss_type!r}`. Set it to 0, or choose 'sigmoid' or "
                "'tpo-l'."
            )
        smallest = {"tpo-l": 0.5, "ipo": 0.1}.get(self.loss_type, 0.0)
        if beta < smallest:
            logger.warning(
                f"`beta={beta}` is made for sums of log-probabilities; `loss_type={self.loss_type!r}` compares means per "
                f"token. Consider `beta={_DEFAULT_BETA[self.loss_type]}`."
            )


def tpo_pair_loss(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
    loss_type: str,
    beta: float,
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Contrast of each pair.

    Args:
        chosen_logps: Summed log-probabilities of the chosen responses, (B,).
        rejected_logps: Those of the rejected ones, (B,).
        chosen_lengths: Numbers of tokens, (B,); read by `"ipo"` and `"tpo-l"`.
        rejected_lengths: Those of the rejected ones, (B,).
        loss_type: `"sigmoid"`, `"hinge"`, `"ipo"` or `"tpo-l"`.
        beta: Temperature.
        gamma: Margin of `"tpo-l"`.
        label_smoothing: Probability that a label is flipped, for `"sigmoid"` and `"tpo-l"`.

    Returns:
        Loss of each pair, (B,).
    """
    if loss_type in ("ipo", "tpo-l"):
        chosen_logps = chosen_logps / chosen_lengths.clamp(min=1)
        rejected_logps = rejected_logps / rejected_lengths.clamp(min=1)
    difference = chosen_logps - rejected_logps
    if loss_type == "hinge":
        return torch.relu(1 - beta * difference)
    if loss_type == "ipo":
        return (difference - 1 / (2 * beta)) ** 2
    logits = beta * difference - (gamma if loss_type == "tpo-l" else 0.0)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def gold_nll_sum(logps: torch.Tensor, lengths: torch.Tensor, normalization: str) -> torch.Tensor:
    """Negative log-likelihoods of N gold responses, added up; a scalar.

    `logps`, (N,), are sums over `lengths`, (N,), tokens. Divided by N for `"sequence_mean"` (which adds token means) and
    `"sequence_sum"`, by the number of tokens for the other two, it is the gold term.
    """
    return -(logps / lengths.clamp(min=1) if normalization == "sequence_mean" else logps).sum()


class TPOTrainer(PreferenceTrainer):
    """Trainer for Triple Preference Optimization, with the arguments of [`~trl.experimental.tpo.TPOTrainer`].

    The dataset has `prompt` (optional if all responses repeat it), `reference` or `gold` (the gold response), `chosen` and
    `rejected`, strings or messages; [`~trl_ift.data.build_triples`] makes them from scored responses.

    Example:

    ```python
    from datasets import load_dataset
    from trl_ift import TPOConfig, TPOTrainer

    trainer = TPOTrainer(
        model="Qwen/Qwen2.5-0.5B",
        args=TPOConfig("qwen-tpo", loss_type="tpo-l"),
        train_dataset=load_dataset("tpo-alignment/triple-preference-ultrafeedback-40K", split="train"),
    )
    trainer.train()
    ```
    """

    config_class = TPOConfig
    method = "tpo"
    uses_reference = False
    _tag_names = ["trl", "trl-ift", "tpo"]  # noqa: RUF012
    _name = "TPO"
    _paper = {  # noqa: RUF012
        "title": "Triple Preference Optimization: Achieving Better Alignment using a Single Step Optimization",
        "id": "2405.16681",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{saeidi2025triple,
                title   = {{Triple Preference Optimization: Achieving Better Alignment using a Single Step Optimization}},
                author  = {Amir Saeidi and Shivanshu Verma and Aswin RRV and Kashif Rasul and Chitta Baral},
                journal = {Transactions on Machine Learning Research},
                year    = 2025,
                url     = {https://arxiv.org/abs/2405.16681},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: TPOConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
    ):
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )

    def _declare(self, args: TPOConfig) -> None:
        if args.tpo_alpha != 0 and args.gold_from == "reference":
            self.branches = (Branch("gold", column="reference", aliases=("gold",)),)

    def pair_loss(self, batch: PreferenceBatch) -> torch.Tensor:
        args, chosen, rejected = self.args, batch.chosen, batch.rejected
        return tpo_pair_loss(
            chosen.logps, rejected.logps, chosen.lengths, rejected.lengths,
            args.loss_type, args.beta, args.tpo_l_gamma or 0.0, args.label_smoothing,
        )  # fmt: skip

    def branch_terms(self, batch: PreferenceBatch) -> Iterator[Term]:
        args = self.args
        if args.tpo_alpha == 0:
            return
        name = "chosen" if args.gold_from == "chosen" else "gold"
        gold = batch.chosen if name == "chosen" else batch.branches[name]
        logps = gold.token_logps.sum(1)
        total = gold_nll_sum(logps, gold.lengths, args.nll_normalization)
        yield Term(total, name, NORMALIZATIONS[args.nll_normalization], args.tpo_alpha)

        number = gold.logps.numel()
        self._record_mean("nll_loss", -logps.sum(), gold.lengths.sum())
        self._record_mean("tpo/reference_token_accuracy", (gold.is_top1 & gold.mask).sum(), gold.lengths.sum())
        self._record_mean("logps/reference", logps.sum(), number)
        self._record_mean("rewards/reference", self._reward(gold).sum(), number)

    def _reward(self, responses: Responses) -> torch.Tensor:
        averaged = self.args.loss_type in ("ipo", "tpo-l")
        return self.beta * (responses.mean_logps if averaged else responses.logps)

    def implicit_rewards(self, batch: PreferenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
        return self._reward(batch.chosen), self._reward(batch.rejected)
