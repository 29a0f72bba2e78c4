r"""Self-Play fIne-tuNing (SPIN), https://huggingface.co/papers/2401.01335.

Alignment from SFT data alone. The model plays against its previous self: it has to tell the human answer y to a prompt x from
the answer y' that it sampled itself at the start of the iteration, with the weights p_t:

    L = E [ ell( beta [ log pi(y|x) - log p_t(y|x) ]  -  beta [ log pi(y'|x) - log p_t(y'|x) ] ) ]

with log-probabilities summed over the answer, and p_t frozen. ell is convex and decreasing:

    sigmoid      log(1 + exp(-t))     the paper's choice ("logistic"); then L is DPO's loss with p_t as its reference
    hinge        max(0, 1 - t)        in the released code
    correlation  1 - t                paper only
    exponential  exp(-t)              paper only

The paper writes lambda for beta. Where p_t is the distribution of the data, no pi is better.

This file trains one iteration, on pairs; [`~trl_ift.self_play.self_play`] and `trl-ift spin` run all of them.
"""

import textwrap
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from ..checks import check_choice
from .trainer import PreferenceBatch, PreferenceConfig, PreferenceTrainer


LOSS_TYPES = ("sigmoid", "hinge", "correlation", "exponential")


@dataclass
class SPINConfig(PreferenceConfig):
    r"""
    Configuration class for the [`SPINTrainer`].

    This class includes only the parameters whose defaults or values differ from TRL's. For a full list of training arguments,
    please refer to the [`~transformers.TrainingArguments`] and [`~trl.DPOConfig`] documentation. The authors train with RMSprop
    without weight decay (`optim="rmsprop"`), linear decay after 10 % of warmup, batches of 64 pairs.

    Parameters:
        loss_type (`str`, *optional*, defaults to `"sigmoid"`):
            The function ell: `"sigmoid"` (logistic), `"hinge"`, `"correlation"` or `"exponential"` (unbounded: watch
            `grad_norm`).
        beta (`float`, *optional*, defaults to `0.1`):
            Temperature, > 0; the paper's lambda. The authors raise it to 5 in the last of four iterations, near convergence.
        learning_rate (`float`, *optional*, defaults to `5e-7`):
            The authors' value for iterations 0 and 1, for all weights (1e-7 later); adapters need larger ones.
    """

    learning_rate: float = field(default=5e-7, metadata={"help": "The initial learning rate."})
    loss_type: str = field(
        default="sigmoid",
        metadata={"help": "The loss of a margin: logistic ('sigmoid') or another.", "choices": list(LOSS_TYPES)},
    )
    beta: float = field(default=0.1, metadata={"help": "Temperature; the paper's lambda."})

    def __post_init__(self):
        if isinstance(self.loss_type, list) and len(self.loss_type) == 1:  # TRL's config keeps a list
            (self.loss_type,) = self.loss_type
        check_choice("loss_type", self.loss_type, LOSS_TYPES)
        loss_type = self.loss_type
        super().__post_init__()
        self.loss_type = loss_type
        self._refuse_loss_options("loss_type")

    def _check_loss_type(self) -> None:
        pass  # checked above; TRL's losses are others


def spin_loss(margins: torch.Tensor, loss_type: str, beta: float) -> torch.Tensor:
    """Loss of each pair, (B,).

    Args:
        margins: Log-ratio of the real answer minus log-ratio of the generated one, in nats, (B,).
        loss_type: `"sigmoid"`, `"hinge"`, `"correlation"` or `"exponential"`.
        beta: Temperature.
    """
    t = beta * margins
    if loss_type == "sigmoid":
        return -F.logsigmoid(t)
    if loss_type == "hinge":
        return torch.relu(1 - t)
    return 1 - t if loss_type == "correlation" else torch.exp(-t)


class SPINTrainer(PreferenceTrainer):
    """Trainer for one iteration of SPIN, with the arguments of [`~trl.DPOTrainer`] and the data of [`PreferenceTrainer`].

    `chosen` is the human answer, `rejected` the one that the model which is passed has generated;
    [`~trl_ift.data.build_pairs`] makes such pairs from SFT data and completions. The reference is that model.

    Example:

    ```python
    from datasets import load_dataset
    from trl_ift import SPINConfig, SPINTrainer
    from trl_ift.data import build_pairs, generate_completions

    model = "Qwen/Qwen2.5-0.5B-Instruct"
    dataset = load_dataset("trl-lib/tldr", split="train[:10000]")
    pairs = build_pairs(dataset, generate_completions(model, dataset, "completions"), processing_class=model)
    trainer = SPINTrainer(model=model, args=SPINConfig("qwen-spin"), train_dataset=pairs)
    trainer.train()
    ```
    """

    config_class = SPINConfig
    method = "spin"
    _tag_names = ["trl", "trl-ift", "spin"]  # noqa: RUF012
    _name = "SPIN"
    _paper = {  # noqa: RUF012
        "title": "Self-Play Fine-Tuning Converts Weak Language Models to Strong Language Models",
        "id": "2401.01335",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{chen2024selfplay,
                title     = {{Self-Play Fine-Tuning Converts Weak Language Models to Strong Language Models}},
                author    = {Zixiang Chen and Yihe Deng and Huizhuo Yuan and Kaixuan Ji and Quanquan Gu},
                booktitle = {International Conference on Machine Learning},
                year      = 2024,
                url       = {https://arxiv.org/abs/2401.01335},
            }"""),
    }
    # How the pairs were made, for the model card; set by `self_play`
    iteration_summary: dict[str, Any] | None = None

    def _declare(self, args: SPINConfig) -> None:
        # With stored log-probs an adapter that is trained on needs no copy of its start
        self.stores_reference = args.precompute_ref_log_probs

    def pair_loss(self, batch: PreferenceBatch) -> torch.Tensor:
        return spin_loss(batch.margins, self.args.loss_type, self.beta)

    def _card_arguments(self) -> dict[str, Any]:
        arguments = super()._card_arguments()
        arguments["method_parameters"] |= self.iteration_summary or {}
        return arguments
