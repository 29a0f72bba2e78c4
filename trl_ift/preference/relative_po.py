r"""Relative Preference Optimization (Relative PO), https://huggingface.co/papers/2402.10958.

DPO that compares every chosen response of a batch with every rejected one, weighted by how alike their prompts are. With r =
log pi - log ref, sums over the tokens of a response, and unit vectors e of the prompts of M pairs:

    w_ij = exp( -(1 - e_i e_j) / tau ) / sum_j' exp( -(1 - e_i e_j') / tau )
    L_ij = - log sigma( w_ij beta [ r_w,i - r_l,j ] )

    "embedding"    L = mean over i, j of L_ij
    "uniform"      the same with w_ij = 1
    "diagonal"     L = mean over i of   a L_ii + (1 - a) mean over j != i of L_ij   with w_ij = 1

The weights have no gradient. The last two are the paper's ablations, and worse than DPO there. With one pair all three are DPO
("diagonal": our choice).

The batch is the micro-batch of one device. A pair's loss is the mean over j of its chosen response i; these are averaged
over all pairs of the optimizer step. What each is compared with depends on how the step is split.

Not Regularized PO, Reward-aware PO or Iterative RPO, which are called RPO too.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers.utils import logging

from ..checks import check_choice, check_range, check_unused
from ..data.embeddings import EMBEDDING, embed_prompts
from ..data.rows import first_row
from ..hub.paper import arxiv_paper
from ..trl_internals import global_then_local_main_first
from .collator import Column
from .trainer import PairLossConfig, PreferenceBatch, PreferenceTrainer


WEIGHTINGS = ("embedding", "uniform", "diagonal")

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class EmbeddingColumn(Column):
    """A vector of each row; in a batch (B, D)."""

    def check(self, value: Any, where: str) -> None:
        try:
            vector = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError):
            vector = np.zeros(())
        if vector.ndim != 1 or not vector.size or not np.isfinite(vector).all() or not vector.any():
            raise ValueError(
                f"{where}: column '{self.name}' must hold a list of finite numbers, not all 0, found {str(value)[:80]}. "
                "Correct or drop the row."
            )

    def check_sizes(self, values: Iterable[Any], where: str) -> None:
        """Raise unless all vectors have one length."""
        sizes = {len(value) for value in values}
        if len(sizes) > 1:
            raise ValueError(
                f"{where}: the vectors of column '{self.name}' have different lengths, {sorted(sizes)}. Make them with one "
                "encoder."
            )

    def tensor(self, values: list[Any]) -> torch.Tensor:
        self.check_sizes(values, "the batch")
        return torch.from_numpy(np.asarray(values, dtype=np.float32))


PROMPT_EMBEDDING = EmbeddingColumn(EMBEDDING)


@dataclass
class RelativePOConfig(PairLossConfig):
    r"""
    Configuration class for the [`RelativePOTrainer`].

    This class includes only the parameters that are specific to Relative PO. For a full list of training arguments, please
    refer to the [`~transformers.TrainingArguments`] and [`~trl.DPOConfig`] documentation.

    Parameters:
        distance_temperature (`float`, *optional*, defaults to `0.5`):
            Temperature of the cosine distances of prompts, > 0: smaller ones compare fewer prompts (the authors: 0.5 for
            Mistral-7B, 0.25 for Llama-2-7B).
        relative_weighting (`str`, *optional*, defaults to `"embedding"`):
            `"embedding"`: by how alike two prompts are; `"uniform"` and `"diagonal"`: the paper's ablations.
        diagonal_weight (`float`, *optional*, defaults to `0.8`):
            Share of a pair's own comparison in `"diagonal"`, in [0, 1].
    """

    distance_temperature: float = field(
        default=0.5, metadata={"help": "Temperature of the cosine distances of prompts; smaller ones compare fewer."}
    )
    relative_weighting: str = field(
        default="embedding",
        metadata={
            "help": "How comparisons across prompts are weighted: by how alike they are ('embedding'), or an ablation.",
            "choices": list(WEIGHTINGS),
        },
    )
    diagonal_weight: float = field(default=0.8, metadata={"help": "Share of a pair's own comparison in 'diagonal'."})

    def __post_init__(self):
        check_choice("relative_weighting", self.relative_weighting, WEIGHTINGS)
        check_range("distance_temperature", self.distance_temperature, 0, low_open=True)
        check_range("diagonal_weight", self.diagonal_weight, 0, 1)
        for name, weighting in (("distance_temperature", "embedding"), ("diagonal_weight", "diagonal")):
            if self.relative_weighting != weighting:
                check_unused(self, [name], f"with `relative_weighting={self.relative_weighting!r}`")
        super().__post_init__()
        if self.per_device_train_batch_size == 1:
            logger.warning(
                "`per_device_train_batch_size=1` leaves a pair nothing to be compared with: this is DPO. Gradient accumulation "
                "does not help; raise the batch size."
            )
        if self.eval_strategy != "no" and self.per_device_eval_batch_size == 1:
            logger.warning(
                "`per_device_eval_batch_size=1` leaves a pair nothing to be compared with: the evaluation loss is DPO's. Raise "
                "the batch size."
            )


def relative_weights(chosen: torch.Tensor, rejected: torch.Tensor, temperature: float) -> torch.Tensor:
    """w of M chosen and N rejected responses, (M, N), rows adding up to 1, from embeddings (M, D) and (N, D) of any length."""
    with torch.autocast(chosen.device.type, enabled=False):  # in which products are rounded to half precision
        distances = 1 - F.normalize(chosen, dim=1) @ F.normalize(rejected, dim=1).T
    return torch.softmax(-distances / temperature, 1)


def relative_po_loss(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    beta: float,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Relative PO loss of each chosen response.

    Args:
        chosen_logratios: log pi - log ref of M chosen responses, (M,).
        rejected_logratios: Those of N rejected responses, (N,).
        beta: Temperature.
        weights: Of each comparison, (M, N); 1 by default.

    Returns:
        Means over the rejected responses, (M,).
    """
    logits = beta * (chosen_logratios[:, None] - rejected_logratios)
    return -F.logsigmoid(logits if weights is None else weights * logits).mean(1)


def diagonal_po_loss(
    chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, beta: float, diagonal_weight: float
) -> torch.Tensor:
    """Loss of each of B pairs, (B,): its own, and the mean of those with the rejected responses of the others; as above."""
    losses = -F.logsigmoid(beta * (chosen_logratios[:, None] - rejected_logratios))
    own, number = losses.diagonal(), len(losses)
    if number == 1:
        return own
    others = losses.masked_fill(torch.eye(number, dtype=torch.bool, device=losses.device), 0.0).sum(1) / (number - 1)
    return diagonal_weight * own + (1 - diagonal_weight) * others


class RelativePOTrainer(PreferenceTrainer):
    """Trainer for Relative PO, with the arguments of [`~trl.DPOTrainer`] and the data of [`PreferenceTrainer`].

    A column `prompt_embedding` (list of floats) tells how alike two prompts are; [`~trl_ift.data.embed_prompts`] adds it with
    an encoder of yours, and the trainer, where it is missing, with hashed TF-IDF.

    Example:

    ```python
    from datasets import load_dataset
    from sentence_transformers import SentenceTransformer
    from trl_ift import RelativePOConfig, RelativePOTrainer
    from trl_ift.data import embed_prompts

    dataset = load_dataset("trl-lib/ultrafeedback_binarized", split="train")
    trainer = RelativePOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=RelativePOConfig("qwen-relative-po", per_device_train_batch_size=8),
        train_dataset=embed_prompts(dataset, SentenceTransformer("all-MiniLM-L6-v2").encode),
    )
    trainer.train()
    ```
    """

    config_class = RelativePOConfig
    method = "relative-po"
    card_options = ("beta",)
    _tag_names = ["trl", "trl-ift", "relative-po"]  # noqa: RUF012
    _name = "Relative-PO"
    _paper = arxiv_paper(
        "2402.10958",
        "yin2024relative",
        "Relative Preference Optimization: Enhancing LLM Alignment through Contrasting Responses across Identical and Diverse "
        "Prompts",
        "Yueqin Yin and Zhendong Wang and Yi Gu and Hai Huang and Weizhu Chen and Mingyuan Zhou",
        2024,
    )

    def _declare(self, args: RelativePOConfig) -> None:
        if args.relative_weighting == "embedding":
            self.columns = (PROMPT_EMBEDDING,)

    def _check_dataset(self, args, dataset, name, stored):
        super()._check_dataset(args, dataset, name, stored)
        if args.relative_weighting != "embedding":
            return
        row = first_row(dataset)
        given = EMBEDDING in row
        if name == "train_dataset":
            self._embeddings_given = given
        prepared_here = given and "prompt_ids" in row
        if given != self._embeddings_given and not prepared_here:
            raise ValueError(
                f"`{name}` {'has' if given else 'lacks'} the column '{EMBEDDING}', which the training data "
                f"{'lack' if given else 'have'}: prompts would be compared by other measures. Add it to both, or drop it."
            )
        if given and isinstance(dataset, Dataset):
            PROMPT_EMBEDDING.check_sizes(dataset.with_format(None)[EMBEDDING], f"`{name}`")
        elif not given and (not isinstance(dataset, Dataset) or not {"prompt", "chosen"} & set(row)):
            raise ValueError(
                f"`{name}` {'is tokenized' if isinstance(dataset, Dataset) else 'is a stream'} and lacks the column "
                f"'{EMBEDDING}', which cannot be computed from it. Add it with `trl_ift.data.embed_prompts`, or set another "
                "`relative_weighting`."
            )
        elif not given and name == "train_dataset":
            logger.warning(
                f"`{name}` lacks the column '{EMBEDDING}': prompts are compared by hashed TF-IDF of their words. The paper "
                "uses a sentence encoder, see `trl_ift.data.embed_prompts`."
            )

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if args.relative_weighting != "embedding" or self._embeddings_given or EMBEDDING in first_row(prepared):
            return prepared
        with global_then_local_main_first():
            return embed_prompts(prepared)

    def pair_loss(self, batch: PreferenceBatch) -> torch.Tensor:
        args, chosen, rejected = self.args, batch.chosen.logratios, batch.rejected.logratios
        self._record_mean("relative_po/dpo_loss", -F.logsigmoid(self.beta * batch.margins).sum(), chosen.numel())
        if args.relative_weighting == "diagonal":
            return diagonal_po_loss(chosen, rejected, self.beta, args.diagonal_weight)
        if args.relative_weighting == "uniform":
            return relative_po_loss(chosen, rejected, self.beta)
        embeddings = batch.columns[EMBEDDING]
        weights = relative_weights(embeddings, embeddings, args.distance_temperature)
        self._record_mean("relative_po/own_weight", weights.diagonal().sum(), chosen.numel())
        return relative_po_loss(chosen, rejected, self.beta, weights)
