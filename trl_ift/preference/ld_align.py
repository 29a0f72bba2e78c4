r"""Latent Distance guided Alignment training (LD-Align), https://huggingface.co/papers/2404.06390.

SPIN in which each pair has a weight: the distance, in the latent space of a guiding model, of the human answer y to a prompt x
and the answer y' that the model itself generated. Pairs whose answers mean the same hardly count, so that training is about
the prompts that the model answers badly, and does not over-fit where generator and data have nearly met:

    L = mean over pairs of   w_i * ( - log sigma( beta [ r(y_i) - r(y'_i) ] ) )            r = log pi - log p_t

    w_i = N( || mu(x_i, y_i) - mu(x_i, y'_i) || )

The weight stands outside the logarithm, is a constant for the gradient, and the mean is over all pairs, not divided by the sum
of the weights. It multiplies loss and gradient of a pair, not the margin: it is no beta of its own.

Confirmed by the paper's abstract and by its author's public code: the roles of the two answers, the latent space learnt by
reconstruction, its distance as the weight of a pair in a DPO loss, and where the weight enters. The paper's body could not be
read: the guiding model's architecture, the distance (L2), the normalisation N and all defaults are our choices, and the paper's
results are not claimed for them.

This file trains one iteration, on weighted pairs; [`~trl_ift.self_play.self_play`] and `trl-ift ld-align` run the whole.
"""

import textwrap
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset

from ..checks import check_choice
from ..data.rows import first_row
from ..latent.weights import DISTANCE_COLUMN, NORMALIZATIONS, WeightNormalizer, check_clip
from .collator import WEIGHT, Column
from .spin import SPINConfig, SPINTrainer
from .trainer import PreferenceBatch


DISTANCE = Column(DISTANCE_COLUMN, low=0.0)


@dataclass
class LDAlignConfig(SPINConfig):
    r"""
    Configuration class for the [`LDAlignTrainer`].

    This class includes only the parameters that are specific to LD-Align; the others are those of [`SPINConfig`]. The defaults
    are our choices.

    Parameters:
        weight_normalization (`str`, *optional*):
            How weights are made from the column `latent_distance`, over the whole training set: `"mean"` d / mean(d), so that
            the average weight is 1; `"max"` d / max(d); `"minmax"`; `"sigmoid"` of the standardised distance; `"none"`. If
            `None`, the column `weight` is used as it is, or `"mean"` where there is none.
        weight_clip (`list[float]`, *optional*):
            Smallest and largest weight, e.g. `[0.1, 5]`; applied after the normalisation, and to a column `weight` too.
    """

    weight_normalization: str | None = field(
        default=None,
        metadata={
            "help": "How weights are made from the column 'latent_distance' (our choice). Default: the column 'weight', or "
            "'mean'.",
            "choices": list(NORMALIZATIONS),
        },
    )
    weight_clip: list[float] | None = field(
        default=None, metadata={"help": "Smallest and largest weight of a pair (our choice)."}
    )

    def __post_init__(self):
        if self.weight_normalization is not None:
            check_choice("weight_normalization", self.weight_normalization, NORMALIZATIONS)
        check_clip(self.weight_clip)
        super().__post_init__()


class LDAlignTrainer(SPINTrainer):
    """Trainer for one iteration of LD-Align, with the arguments of [`~trl.DPOTrainer`] and the data of [`SPINTrainer`].

    The training data have `latent_distance` (float >= 0) or `weight` (float >= 0), or both;
    [`~trl_ift.latent.weigh_pairs`] adds them to pairs. Weights are computed once, from the rows that are trained. Evaluation
    data need neither. They are weighed as the training data are: by their distances, normalised with the constants of these, or
    by their column `weight`. Those without that column are not, whatever the other one says.

    Example:

    ```python
    from datasets import load_dataset
    from trl_ift import LDAlignConfig, LDAlignTrainer
    from trl_ift.data import build_pairs, generate_completions
    from trl_ift.latent import PolicyHiddenState, weigh_pairs

    model = "Qwen/Qwen2.5-0.5B-Instruct"
    dataset = load_dataset("trl-lib/tldr", split="train[:10000]")
    pairs = build_pairs(dataset, generate_completions(model, dataset, "completions"), processing_class=model)
    pairs = weigh_pairs(pairs, PolicyHiddenState(model), "weighted")  # or a `LatentGuide`
    trainer = LDAlignTrainer(model=model, args=LDAlignConfig("qwen-ld-align"), train_dataset=pairs)
    trainer.train()
    ```
    """

    config_class = LDAlignConfig
    method = "ld-align"
    columns = (DISTANCE,)
    _tag_names = ["trl", "trl-ift", "ld-align"]  # noqa: RUF012
    _name = "LD-Align"
    _paper = {  # noqa: RUF012
        "title": "Latent Distance Guided Alignment Training for Large Language Models",
        "id": "2404.06390",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @misc{luo2024latent,
                title         = {{Latent Distance Guided Alignment Training for Large Language Models}},
                author        = {Haotian Luo},
                year          = 2024,
                eprint        = {2404.06390},
                archivePrefix = {arXiv},
                url           = {https://arxiv.org/abs/2404.06390},
            }"""),
    }
    # Column that the weights are made from, and how; fitted on the training data, which are prepared first
    _weighing: tuple[str, WeightNormalizer] | None = None

    def _check_dataset(self, args: LDAlignConfig, dataset: Any, name: str, stored: bool) -> None:
        super()._check_dataset(args, dataset, name, stored)
        row = first_row(dataset)
        if name != "train_dataset":
            return
        if WEIGHT.name not in row and DISTANCE.name not in row:
            raise ValueError(
                f"`{name}` has neither 'weight' nor 'latent_distance'; its columns are {sorted(row)}. Add them with "
                "`trl_ift.latent.weigh_pairs`, or train with `SPINTrainer`, which has no weights."
            )
        if args.weight_normalization is not None and DISTANCE.name not in row:
            raise ValueError(
                f"`weight_normalization={args.weight_normalization!r}` needs the column 'latent_distance' in `{name}`; its "
                f"columns are {sorted(row)}. Add it, or drop the option to use the column 'weight' as it is."
            )
        derived = args.weight_normalization is not None or args.weight_clip is not None or WEIGHT.name not in row
        if derived and not isinstance(dataset, Dataset):
            raise ValueError(
                f"`{name}` is a stream, and the weights are computed over all of it. Store them in the column 'weight' "
                "(`trl_ift.latent.weigh_pairs`), and leave `weight_normalization` and `weight_clip` out."
            )

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if self._weighing is None:
            self._weighing = self._fit(prepared, args)
        source, normalizer = self._weighing
        if source not in (row := first_row(prepared)):  # evaluation data; weights of another origin are none
            return prepared.remove_columns([WEIGHT.name]) if WEIGHT.name in row else prepared
        if not isinstance(prepared, Dataset):
            return prepared.map(_weigh_row, fn_kwargs={"source": source, "normalizer": normalizer})
        weights = normalizer(prepared.with_format("numpy")[source][:])
        return prepared.remove_columns([WEIGHT.name] if WEIGHT.name in prepared.column_names else []).add_column(
            WEIGHT.name, weights.tolist()
        )

    @staticmethod
    def _fit(prepared: Any, args: Any) -> tuple[str, WeightNormalizer]:
        """Column that the weights are made from, and how, by the prepared training data."""
        if not isinstance(prepared, Dataset):  # a stream brings its weights
            return WEIGHT.name, WeightNormalizer("none", 0.0, 1.0)
        stored = args.weight_normalization is None and WEIGHT.name in prepared.column_names
        source, normalization = (
            (WEIGHT.name, "none") if stored else (DISTANCE.name, args.weight_normalization or "mean")
        )
        values = prepared.with_format("numpy")[source][:]
        return source, WeightNormalizer.fit(values, normalization, args.weight_clip)

    def pair_loss(self, batch: PreferenceBatch) -> torch.Tensor:
        if (distances := batch.columns.get(DISTANCE.name)) is not None:
            self._record_mean("ld_align/latent_distance", distances.sum(), distances.numel())
        return super().pair_loss(batch)


def _weigh_row(row: dict[str, Any], source: str, normalizer: WeightNormalizer) -> dict[str, float]:
    return {WEIGHT.name: float(normalizer(row[source]))}
