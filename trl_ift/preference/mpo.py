r"""Maximum Preference Optimization with importance sampling (MPO), https://huggingface.co/papers/2312.16430.

Not Mixed Preference Optimization (2411.10442), which TRL offers as `loss_type=["sigmoid", "bco_pair", "sft"]`, and not the
reinforcement-learning algorithm Maximum a posteriori Policy Optimisation.

Offline preference training in which the objective is the expected preference itself, bounded and without a logarithm, and
the anchor to the reference is a separate term on completions that the reference sampled beforehand, so that it acts on
responses that occur in no pair. With sigma(z) the policy's own probability that chosen beats rejected:

    L = - mean over pairs of [ p sigma(z) + (1 - p) sigma(-z) ]                                     p = 1 without soft labels
        + reg_weight      * mean over samples y ~ ref of [ - log pi(y|x) ]                          KL(ref || pi) + const
        + pretrain_weight * mean over texts x of [ - log pi(x) ]

    z = s [ (log pi - log ref)(y_w|x) - (log pi - log ref)(y_l|x) ]       "reference": two stored numbers a pair
    z = s [ log pi(y_w|x) - log pi(y_l|x) ]                               "reference_free"
    z = s [ log pi(y_w|x) / |y_w| - log pi(y_l|x) / |y_l| ]               "length_norm"

The gradient of a pair is sigma(z) times that of DPO at the same z. No reference model is kept in memory.

Confirmed by the paper's abstract: the off-policy view with importance sampling, the separate KL term, that neither a reward
nor a reference model is needed, and why DPO and IPO do not keep their KL term. Its body could not be read: the logit, the form
of the KL term (`reg_kl="reverse"` is the other one), the averages and all defaults are our choices.
"""

import json
import math
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
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

from ..checks import check_choice, check_range, check_unused
from ..data.caching import versioned
from ..data.fingerprint import model_fingerprint
from ..data.generation import MANIFEST, load_completions
from ..scripts.data import check_encoding, load_named
from ..trl_internals import tokenize
from .collator import Branch, Column
from .trainer import (
    PreferenceBatch,
    PreferenceConfig,
    PreferenceTrainer,
    Responses,
    Term,
    tokenize_response,
)


LOGIT_MODES = ("reference", "reference_free", "length_norm")
KLS = ("forward", "reverse")
REDUCTIONS = ("sequence_sum", "token_mean")
_DEFAULT_SCALE = {"reference": 0.1, "reference_free": 1.0, "length_norm": 2.0}
_DEFAULT_WEIGHT = {"sequence_sum": 0.05, "token_mean": 0.1}

logger = logging.get_logger(__name__)


@dataclass
class MPOConfig(PreferenceConfig):
    r"""
    Configuration class for the [`MPOTrainer`].

    This class includes only the parameters that are specific to Maximum Preference Optimization. For a full list of training
    arguments, please refer to the [`~transformers.TrainingArguments`] and [`~trl.DPOConfig`] documentation. The paper's own
    values are not known to us: all defaults are our choice.

    Parameters:
        > Parameters that control the preference term

        logit_mode (`str`, *optional*, defaults to `"reference"`):
            What the preference probability is computed from: `"reference"` log-ratios to stored reference log-probs,
            `"reference_free"` log-probs (|z| is often so large that a pair never trains: watch `mpo/grad_weight`),
            `"length_norm"` mean log-probs per token.
        logit_scale (`float`, *optional*):
            Scale s of z, > 0; DPO's beta, not the weight of the KL. If `None`: 0.1, 1.0 and 2.0 in the three modes.

        > Parameters that control the regularisation

        reg_weight (`float`, *optional*):
            Weight of the KL term, >= 0. If `None`: 0.05 for `"sequence_sum"`, 0.1 for `"token_mean"`. `0` only measures it,
            and needs no `reg_dataset`.
        reg_kl (`str`, *optional*, defaults to `"forward"`):
            `"forward"`: KL(ref || pi), the negative log-likelihood of samples of the reference. `"reverse"`: KL(pi || ref) by
            importance sampling, E_ref[w log w - w + 1] with w = pi / ref; needs the column `ref_logps`.
        reg_reduction (`str`, *optional*, defaults to `"sequence_sum"`):
            `"sequence_sum"`: sum over tokens, mean over samples (the KL itself). `"token_mean"`: mean over all tokens, as
            SFT. For the samples and the pretraining texts; exact over accumulation and processes.
        log_w_max (`float`, *optional*, defaults to `5.0`):
            Largest log w of `"reverse"`, in (0, 20]; samples above it have no gradient.
        reg_rows_per_pair (`float`, *optional*, defaults to `1.0`):
            Samples (and pretraining texts) a pair, in [0.25, 4].
        reg_dataset_name (`str`, *optional*):
            File, folder (of `trl-ift generate`) or Hub id of the samples, when the trainer is given no `reg_dataset`.
        allow_other_policy (`bool`, *optional*, defaults to `False`):
            Whether the samples may come from another model than the one that training starts from.

        > Parameters that control the pretraining term

        pretrain_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the negative log-likelihood of pretraining texts, >= 0.
        pretrain_dataset_name (`str`, *optional*):
            File, folder or Hub id of the texts, when the trainer is given no `pretrain_dataset`.
    """

    learning_rate: float = field(default=5e-7, metadata={"help": "The initial learning rate for AdamW."})
    logit_mode: str = field(
        default="reference",
        metadata={
            "help": "Preference logit from log-ratios ('reference'), log-probs ('reference_free') or mean log-probs per "
            "token ('length_norm').",
            "choices": list(LOGIT_MODES),
        },
    )
    logit_scale: float | None = field(
        default=None, metadata={"help": "Scale of the logit. Default: 0.1, 1.0, 2.0 in the three modes."}
    )
    reg_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the KL term. Default: 0.05 for 'sequence_sum', 0.1 for 'token_mean'."},
    )
    reg_kl: str = field(
        default="forward",
        metadata={"help": "KL(ref || pi) ('forward') or KL(pi || ref) ('reverse').", "choices": list(KLS)},
    )
    reg_reduction: str = field(
        default="sequence_sum",
        metadata={
            "help": "Sum over the tokens of a sample, or mean over all tokens.",
            "choices": list(REDUCTIONS),
        },
    )
    log_w_max: float = field(default=5.0, metadata={"help": "Largest log importance weight of the reverse KL."})
    reg_rows_per_pair: float = field(
        default=1.0, metadata={"help": "Samples and pretraining texts a pair, in [0.25, 4]."}
    )
    reg_dataset_name: str | None = field(
        default=None, metadata={"help": "File, folder or Hub id of the samples of the reference."}
    )
    allow_other_policy: bool = field(
        default=False,
        metadata={"help": "Whether the samples may come from another model than the one that training starts from."},
    )
    pretrain_weight: float = field(default=0.0, metadata={"help": "Weight of the pretraining term."})
    pretrain_dataset_name: str | None = field(
        default=None, metadata={"help": "File, folder or Hub id of the pretraining texts."}
    )

    def __post_init__(self):
        check_choice("logit_mode", self.logit_mode, LOGIT_MODES)
        check_choice("reg_kl", self.reg_kl, KLS)
        check_choice("reg_reduction", self.reg_reduction, REDUCTIONS)
        if self.logit_scale is None:
            self.logit_scale = _DEFAULT_SCALE[self.logit_mode]
        if self.reg_weight is None:
            self.reg_weight = _DEFAULT_WEIGHT[self.reg_reduction]
        check_range("logit_scale", self.logit_scale, 0, low_open=True)
        check_range("reg_weight", self.reg_weight, 0)
        check_range("pretrain_weight", self.pretrain_weight, 0)
        check_range("reg_rows_per_pair", self.reg_rows_per_pair, 0.25, 4)
        check_range("log_w_max", self.log_w_max, 0, 20, low_open=True)
        if self.reg_kl == "forward" and self.log_w_max != 5.0:
            raise ValueError("`log_w_max` has no effect with `reg_kl='forward'`. Set `reg_kl='reverse'`, or drop it.")
        if self.reg_kl == "reverse" and self.reg_reduction == "token_mean":
            raise ValueError(
                "`reg_kl='reverse'` weighs whole responses and cannot be a mean over tokens. Set "
                "`reg_reduction='sequence_sum'`."
            )
        if self.pretrain_weight == 0 and self.pretrain_dataset_name is not None:
            raise ValueError(
                "`pretrain_dataset_name` has no effect with `pretrain_weight=0`. Set a weight, or drop it."
            )
        super().__post_init__()
        if self.beta != 0.1:
            raise ValueError(
                "`beta` has no effect in MPO: the scale inside the sigmoid is `logit_scale`, the weight of the KL term is "
                "`reg_weight`. Set one of these."
            )
        self._refuse_loss_options()
        # The pass that stores the reference log-probs reads its batch size
        self._refuse_reference_options(*["precompute_ref_batch_size"] if self.logit_mode == "reference" else [])


def mpo_pair_loss(logits: torch.Tensor, label_prob: torch.Tensor | None = None) -> torch.Tensor:
    """Minus the expected preference of each pair, (B,), in (-1, 0).

    Args:
        logits: z, (B,).
        label_prob: Probability that chosen is truly preferred, (B,), in [0, 1]; 1 if `None`.
    """
    if label_prob is None:
        return -torch.sigmoid(logits)
    return -(label_prob * torch.sigmoid(logits) + (1 - label_prob) * torch.sigmoid(-logits))


def reverse_kl_samples(logps: torch.Tensor, ref_logps: torch.Tensor, log_w_max: float = math.inf) -> torch.Tensor:
    """w log w - w + 1 of samples of the reference, w = pi / ref; each >= 0, with mean KL(pi || ref).

    `logps` and `ref_logps`, (N,), are summed over the response. log w is clamped at `log_w_max`.
    """
    log_w = (logps - ref_logps).clamp(max=log_w_max)
    return log_w.exp() * log_w - log_w.exp() + 1


class MPOTrainer(PreferenceTrainer):
    """Trainer for Maximum Preference Optimization with importance sampling (arXiv 2312.16430).

    The arguments are those of [`~trl.DPOTrainer`] without `ref_model`, and:

    Args:
        reg_dataset ([`~datasets.Dataset`], *optional*):
            Completions that the starting model sampled, as [`~trl_ift.data.generate_completions`] writes them: `prompt` and
            `completion`, with `completion_ids`, `prompt_ids`, `ref_logps` and `policy` where stored. Required unless
            `reg_weight=0`.
        pretrain_dataset ([`~datasets.Dataset`], *optional*):
            Texts (`text`) or token ids (`input_ids`) of the pretraining term.

    The preference dataset may have `label_prob`, the probability in [0, 1] that chosen is truly preferred. Pair i of the
    training set carries its samples with it, so that shuffling, resuming and several processes keep them together. Evaluation
    computes the preference term alone.
    """

    config_class = MPOConfig
    method = "mpo"
    card_options = ()
    columns = (Column("label_prob", 0.0, 1.0),)
    stores_reference = True
    _tag_names = ["trl", "trl-ift", "mpo"]  # noqa: RUF012
    _name = "MPO"
    _paper = {  # noqa: RUF012
        "title": "Preference as Reward, Maximum Preference Optimization with Importance Sampling",
        "id": "2312.16430",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @misc{jiang2024preference,
                title         = {{Preference as Reward, Maximum Preference Optimization with Importance Sampling}},
                author        = {Zaifan Jiang and Xing Huang and Chao Wei},
                year          = 2024,
                eprint        = {2312.16430},
                archivePrefix = {arXiv},
                url           = {https://arxiv.org/abs/2312.16430},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: MPOConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        reg_dataset: Dataset | None = None,
        pretrain_dataset: Dataset | None = None,
    ):
        args = self._own_config(args, model)
        self._policies: set[str] = set()
        self._new_adapter = peft_config is not None  # training then starts from the model without it
        self._first_weights: list[float] = []
        self._extra_rows: dict[str, Dataset | None] = {
            "reg": _regularisation_rows(args, _given_or_named(reg_dataset, args.reg_dataset_name)),
            "pretrain": _pretraining_rows(args, _given_or_named(pretrain_dataset, args.pretrain_dataset_name)),
        }
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
        self.beta = self.args.logit_scale  # of the metrics `rewards/*`
        self._check_policy()

    def _declare(self, args: MPOConfig) -> None:
        self.uses_reference = args.logit_mode == "reference"
        self.branches = tuple(Branch(name) for name, rows in self._extra_rows.items() if rows is not None)

    # ---------------------------------------------------------------- data

    def _check_dataset(self, args: Any, dataset: Any, name: str, stored: bool) -> None:
        super()._check_dataset(args, dataset, name, stored)
        if self.uses_reference and not stored and isinstance(dataset, IterableDataset):
            raise ValueError(
                f"`{name}` is an `IterableDataset`, and `logit_mode='reference'` stores the reference log-probs of all pairs "
                "before training. Pass a `Dataset`, add the columns 'ref_chosen_logps' and 'ref_rejected_logps', or set "
                "`logit_mode='length_norm'`."
            )

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        rows, self._extra_rows = self._extra_rows, {}  # the training set comes first, and alone carries them
        for name, extra in rows.items():
            if extra is None:
                continue
            extra = _tokenized(extra, name, processing_class, self._tokenizer.eos_token, args)
            order = np.random.default_rng([args.seed, len(extra)]).permutation(len(extra)).tolist()
            _report_dealing(dataset, name, len(extra), args)
            options = {"rows": extra, "order": order, "per_pair": args.reg_rows_per_pair, "column": f"{name}_rows"}
            dataset = dataset.map(versioned(_attach), with_indices=True, fn_kwargs=options)
            if name == "reg":
                self._reg_scored = "ref_logps" in extra.column_names
                self._policies = set(extra.unique("policy")) - {None} if "policy" in extra.column_names else set()
        return dataset

    def _check_policy(self) -> None:
        """Refuse samples of another model than the one that training starts from."""
        if not self._policies or self.args.allow_other_policy:
            return
        own = model_fingerprint(self.model, with_adapters=not self._new_adapter)
        if self._policies != {own}:
            raise ValueError(
                f"`reg_dataset` was sampled from another model (policy {', '.join(sorted(self._policies))}) than the one that "
                f"training starts from (policy {own}): the KL term would anchor to that one. Sample it again with `trl-ift "
                "generate` from this model, or set `allow_other_policy=True` if this is what you want."
            )

    # ---------------------------------------------------------------- loss

    def _strength(self, responses: Responses) -> torch.Tensor:
        """What the logit compares, (N,)."""
        return responses.mean_logps if self.args.logit_mode == "length_norm" else responses.logratios

    def pair_loss(self, batch: PreferenceBatch) -> torch.Tensor:
        logits = self.args.logit_scale * (self._strength(batch.chosen) - self._strength(batch.rejected))
        probabilities = torch.sigmoid(logits.detach())
        weight = (probabilities * (1 - probabilities)).sum()
        self._record_mean("mpo/preference_prob", probabilities.sum(), probabilities.numel())
        self._record_mean("mpo/grad_weight", weight, probabilities.numel())
        if self.model.training and self.state.global_step == 0:
            self._warn_of_tiny_weights((weight / probabilities.numel()).item())
        return mpo_pair_loss(logits, batch.columns.get("label_prob"))

    def _warn_of_tiny_weights(self, weight: float) -> None:
        """Warn if the pairs of the first optimizer step have hardly any gradient; called for each of its micro-batches."""
        self._first_weights.append(weight)
        mean = sum(self._first_weights) / len(self._first_weights)
        if len(self._first_weights) == self.args.gradient_accumulation_steps and mean < 1e-3:
            logger.warning(
                f"The pairs hardly train: the mean of sigma(z) sigma(-z) is {mean:.1e} in the first step (at most 0.25). "
                f"Lower `logit_scale` (now {self.args.logit_scale}), or set `logit_mode` to 'reference' or 'length_norm'."
            )

    def branch_terms(self, batch: PreferenceBatch) -> Iterator[Term]:
        args = self.args
        per = "row" if args.reg_reduction == "sequence_sum" else "token"
        if (reg := batch.branches.get("reg")) is not None:
            if args.reg_kl == "reverse" and reg.ref_logps is not None:
                total = reverse_kl_samples(reg.logps, reg.ref_logps, args.log_w_max).sum()
            else:
                total = -reg.logps.sum()
            yield Term(total, "reg", per, args.reg_weight)
            self._record_mean("mpo/reg_nll", -reg.logps.sum(), reg.lengths.sum())
            if self._reg_scored:  # an unbiased estimate of KL(ref || pi), in nats a response
                self._record_mean("mpo/reg_kl", -reg.logratios.sum(), reg.logps.numel())
        if (pretrain := batch.branches.get("pretrain")) is not None:
            yield Term(-pretrain.logps.sum(), "pretrain", per, args.pretrain_weight)
            self._record_mean("mpo/pretrain_nll", -pretrain.logps.sum(), pretrain.lengths.sum())

    def implicit_rewards(self, batch: PreferenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
        scale = self.args.logit_scale
        return scale * self._strength(batch.chosen), scale * self._strength(batch.rejected)


# ---------------------------------------------------------------- regularisation and pretraining rows


def _given_or_named(dataset: Dataset | None, name: str | None) -> Dataset | None:
    if name is None:
        return dataset
    if dataset is not None:
        raise ValueError(f"A dataset was passed and `{name}` is named in the config too. Drop one of the two.")
    if (Path(name).expanduser() / MANIFEST).is_file():
        return load_completions(Path(name).expanduser())  # refuses a folder that is not finished
    splits = load_named(name)
    if "train" not in splits:
        raise ValueError(
            f"`{name}` has no split 'train'; it has: {', '.join(map(repr, splits))}. Pass the dataset itself."
        )
    check_encoding(splits["train"], name)
    return splits["train"]


def _regularisation_rows(args: MPOConfig, dataset: Dataset | None) -> Dataset | None:
    if dataset is None:
        if args.reg_weight:
            raise ValueError(
                f"`reg_weight={args.reg_weight}` needs a `reg_dataset`: completions that the starting model sampled (`trl-ift "
                "generate`). Pass it, name it with `reg_dataset_name`, or set `reg_weight=0` for the preference term alone."
            )
        idle = ["reg_kl", "log_w_max", "allow_other_policy"]
        if args.pretrain_weight == 0:
            idle += ["reg_reduction", "reg_rows_per_pair"]
        check_unused(args, idle, "without a `reg_dataset`")
        return None
    _check_extra_dataset("reg_dataset", dataset)
    columns = set(dataset.column_names)
    if not {"prompt_ids", "completion_ids"} <= columns and not {"prompt", "completion"} <= columns:
        raise ValueError(
            f"`reg_dataset` has the columns {sorted(columns)}. Expected 'prompt' and 'completion', or 'prompt_ids' and "
            "'completion_ids', as `trl-ift generate` writes them."
        )
    if "ref_logps" in columns:
        column = Column("ref_logps", high=1e-3)  # rounding
        for index, value in enumerate(dataset["ref_logps"][:]):
            column.check(value, f"`reg_dataset`, row {index}")
    elif args.reg_kl == "reverse":
        raise ValueError(
            f"`reg_kl='reverse'` needs the column 'ref_logps' in `reg_dataset`; its columns are {sorted(columns)}. Generate "
            "the samples with scores, or set `reg_kl='forward'`."
        )
    return dataset


def _pretraining_rows(args: MPOConfig, dataset: Dataset | None) -> Dataset | None:
    if (dataset is None) != (args.pretrain_weight == 0):
        found = "no `pretrain_dataset`" if dataset is None else "a `pretrain_dataset`"
        raise ValueError(
            f"`pretrain_weight={args.pretrain_weight}` and {found}: the pretraining term needs both. Set or drop both."
        )
    if dataset is not None:
        _check_extra_dataset("pretrain_dataset", dataset)
        if not {"text", "input_ids"} & set(dataset.column_names):
            raise ValueError(
                f"`pretrain_dataset` has the columns {sorted(dataset.column_names)}. Expected 'text' or 'input_ids'."
            )
    return dataset


def _check_extra_dataset(name: str, dataset: Any) -> None:
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"`{name}` must be a `Dataset` (its rows are dealt out to the pairs by number), got `{type(dataset).__name__}`."
        )
    if not len(dataset):
        raise ValueError(f"`{name}` is empty: it has no rows.")


def _tokenized(dataset: Dataset, name: str, processing_class: Any, eos_token: str, args: MPOConfig) -> Dataset:
    """Rows with `prompt_ids`, `completion_ids`, and `ref_logps` and `policy` where stored, that fit `max_length`."""
    if name == "pretrain":
        rows = dataset.map(versioned(_pretraining_row), fn_kwargs={"processing_class": processing_class})
    elif {"prompt_ids", "completion_ids"} <= set(dataset.column_names):
        rows = dataset
    else:
        rows = dataset.map(
            versioned(_regularisation_row), fn_kwargs={"processing_class": processing_class, "eos_token": eos_token}
        )
    keep = ["prompt_ids", "completion_ids", "ref_logps", "policy"]
    rows = rows.select_columns([column for column in keep if column in rows.column_names])
    fitting = rows.filter(versioned(_fits), fn_kwargs={"max_length": args.max_length})
    if not len(fitting):
        raise ValueError(
            f"No row of the {name} dataset can be used: all are empty or do not fit `max_length={args.max_length}`. Raise it."
        )
    if len(fitting) < len(rows):
        logger.warning(
            f"Dropped {len(rows) - len(fitting)} of {len(rows)} rows of the {name} dataset: empty, or longer than "
            f"`max_length={args.max_length}`."
        )
    return fitting


def _regularisation_row(row: dict[str, Any], processing_class: Any, eos_token: str) -> dict[str, Any]:
    # A sample that was cut did not end: it gets no end-of-sequence token
    cut = bool(row.get("truncated"))
    eos_token = "" if cut else eos_token
    branch = Branch("reg", column="completion")
    row = {"prompt_ids": [], **row}
    (ids,) = tokenize_response(row, branch, "completion", False, processing_class, eos_token)[branch.rows_column]
    if cut and ids["completion_ids"] and not isinstance(row["completion"], str):
        # The chat template has closed the turn
        tools = row.get("tools")
        options = {
            "tools": json.loads(tools) if isinstance(tools, str) else tools,
            "continue_final_message": True,
            **(row.get("chat_template_kwargs") or {}),
        }
        open_ended = tokenize(processing_class, row["prompt"] + row["completion"], **options)["input_ids"]
        ids["completion_ids"] = open_ended[len(ids["prompt_ids"]) :]
    return ids


def _pretraining_row(row: dict[str, Any], processing_class: Any) -> dict[str, Any]:
    ids = row["input_ids"] if "input_ids" in row else tokenize(processing_class, row["text"])["input_ids"]
    return {"prompt_ids": ids[:1], "completion_ids": ids[1:]}  # nothing predicts the first token


def _fits(row: dict[str, Any], max_length: int | None) -> bool:
    if not row["completion_ids"] or max_length is None:
        return bool(row["completion_ids"])
    if row.get("ref_logps") is not None:  # of the whole response, so that none of it may be cut
        return len(row["prompt_ids"]) + len(row["completion_ids"]) <= max_length
    return len(row["prompt_ids"]) < max_length


def _report_dealing(dataset: Any, name: str, number: int, args: MPOConfig) -> None:
    if isinstance(dataset, IterableDataset):
        if args.dataloader_num_workers > 1:
            raise ValueError(
                f"`dataloader_num_workers={args.dataloader_num_workers}` with an `IterableDataset`: each worker numbers its "
                f"pairs from 0, so that only some rows of the {name} dataset would be used. Set it to 0 or 1, or pass a "
                "`Dataset`."
            )
    elif (needed := math.floor(len(dataset) * args.reg_rows_per_pair)) < number:
        logger.warning(
            f"{needed} of the {number} rows of the {name} dataset are used: {len(dataset)} pairs with `reg_rows_per_pair="
            f"{args.reg_rows_per_pair:g}`. Raise it to use more."
        )


def _attach(row: dict[str, Any], index: int, rows: Dataset, order: list[int], per_pair: float, column: str):
    """Deal rows out: pair i gets those from i * per_pair up to (i + 1) * per_pair of the shuffled rows, around and around."""
    numbers = range(math.floor(index * per_pair), math.floor((index + 1) * per_pair))
    chosen = [rows[order[number % len(rows)]] for number in numbers]
    names = [name for name in rows.column_names if name != "policy"]
    return {column: [{name: item[name] for name in names} for item in chosen]}
