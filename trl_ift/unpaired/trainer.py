r"""The base of the methods that learn from single responses with feedback, on [`~trl.KTOTrainer`].

A method declares the numbers of a row that it reads and gives one loss a row:

    class FooTrainer(UnpairedTrainer):
        config_class, method = FooConfig, "foo"
        columns = (Column("difficulty", low=0),)     # beside label, score, weight, is_sft

        def row_loss(self, batch):                   # shape (N,)
            return (batch.score - torch.sigmoid(self.beta * batch.logratios)) ** 2

The base runs policy and reference, completes the feedback (a label from a score, a score from a label, rows from pairs), and
takes the mean over the rows of the optimizer step.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig, PeftModel
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from transformers.utils import logging
from trl import KTOConfig, KTOTrainer, extract_prompt, unpair_preference_dataset

from ..checks import (
    check_choice,
    check_collator,
    check_instance,
    check_peft,
    check_range,
    check_unused,
    is_blank,
    named_datasets,
    probe_of,
    report_dropped,
    responses_differ,
)
from ..data.caching import versioned
from ..data.rows import first_row
from ..extension import ExtensionConfig
from ..preference.collator import Column
from ..preference.trainer import pair_ids
from ..reference import ReferenceTrainer, check_ref_settings
from ..trl_internals import (
    FusedTap,
    global_then_local_main_first,
    keep_4bit_trainable_on_cpu,
    kto_construction,
    preparation_options,
)
from .data import (
    COLUMNS,
    PAIR_REF_LOGPS,
    REF_LOGPS,
    UnpairedCollator,
    check_unpaired_dataset,
    complete_feedback,
    is_paired,
    pair_lengths,
    ref_logps_of_label,
)


# The others need lengths, which prompts and responses in two columns do not have
_SAMPLING = ("random", "sequential")

logger = logging.get_logger(__name__)


@dataclass
class UnpairedConfig(ExtensionConfig, KTOConfig):
    """
    Configuration class for the [`UnpairedTrainer`].

    The options are those of [`~trl.KTOConfig`]. A method's own config subclasses this one.

    > [!NOTE]
    > These parameters have default values different from [`~trl.KTOConfig`]:
    > - `loss_type`: `"apo_zero_unpaired"`, which builds no mismatched pairs for a KL term; another value raises.
    > - `train_sampling_strategy`: `"random"` instead of `"sequential"`, which only the KL term of KTO needs; others raise.
    """

    loss_type: str = field(
        default="apo_zero_unpaired",
        metadata={
            "help": "TRL's loss, which the method replaces: it cannot be set.",
            "choices": ["apo_zero_unpaired"],
        },
    )
    train_sampling_strategy: str = field(
        default="random",
        metadata={
            "help": "Sampler of the training dataloader: 'random' or 'sequential'.",
            "choices": list(_SAMPLING),
        },
    )

    def __post_init__(self):
        check_choice("train_sampling_strategy", self.train_sampling_strategy, _SAMPLING)
        check_range("beta", self.beta, 0, low_open=True)
        check_range("desirable_weight", self.desirable_weight, 0)
        check_range("undesirable_weight", self.undesirable_weight, 0)
        if self.desirable_weight == self.undesirable_weight == 0:
            raise ValueError(
                "`desirable_weight` and `undesirable_weight` are both 0: nothing would be trained. Raise one."
            )
        check_unused(self, ["loss_type"], "on this method's loss")
        if not self.sync_ref_model:
            check_unused(self, ["ref_model_mixup_alpha", "ref_model_sync_steps"], "without `sync_ref_model=True`")
        super().__post_init__()


@dataclass(frozen=True)
class UnpairedBatch:
    """What a loss sees of a batch of N rows, scored by the policy (with gradient) and by the reference (without).

    Attributes:
        logps: Log-probability of each response, summed over its tokens, float32, shape (N,).
        token_logps: Log-probability of each token, 0 outside the response, shape (N, T-1).
        mask: Whether a position predicts a token of the response, shape (N, T-1).
        lengths: Number of tokens, shape (N,).
        ref_logps: As `logps` under the reference, shape (N,).
        label: Whether a response is a good one, shape (N,).
        score: Its score in [0, 1], shape (N,); 1 or 0 where the data have labels.
        columns: Extra columns by name, each (N,); a column that the dataset lacks is missing.
        ref_token_logps: As `token_logps`, when the reference runs beside the policy (not with stored log-probs).
    """

    logps: torch.Tensor
    token_logps: torch.Tensor
    mask: torch.Tensor
    lengths: torch.Tensor
    ref_logps: torch.Tensor
    label: torch.Tensor
    score: torch.Tensor
    columns: Mapping[str, torch.Tensor]
    ref_token_logps: torch.Tensor | None = None

    @property
    def logratios(self) -> torch.Tensor:
        """log pi - log ref, shape (N,)."""
        return self.logps - self.ref_logps

    @property
    def mean_logps(self) -> torch.Tensor:
        """Mean log-probability per token, shape (N,); 0 for a response without tokens."""
        return self.logps / self.lengths.clamp(min=1)

    @property
    def mean_logratios(self) -> torch.Tensor:
        """log pi - log ref per token, shape (N,)."""
        return self.logratios / self.lengths.clamp(min=1)


class UnpairedTrainer(ReferenceTrainer, KTOTrainer, ABC):
    """Base on [`~trl.KTOTrainer`] with a loss a row, scores and row weights, the right reference, and the library's checks.

    The constructor takes the arguments of [`~trl.KTOTrainer`]. A dataset has `prompt`, `completion`, and `label` (bool) or
    `score` (float in [0, 1]), or both; or pairs, `chosen` and `rejected`, which become two rows (with `chosen_score` and
    `rejected_score`, if they are there). It may have `is_sft` (bool: demonstrations, whose label and score may be null),
    `weight` (float >= 0: the loss of a row is multiplied by it before the mean) and `ref_logps` (summed log-probability under a
    reference of your own, used in place of a reference model; see [`~trl_ift.reference.ReferenceTrainer`]).

    Attributes:
        columns: Numbers per row that the method reads beside these; declared by subclasses.
        label_threshold: Least score of a row with label true, where the data have scores only.
        fractional_scores: Whether scores other than 0 and 1 may stand without a label.
        needs_scores: Whether a row with label false needs a score.
        class_means: Whether the mean over the rows of each label is taken, and the two are added.
    """

    config_class: type = UnpairedConfig
    ref_columns = (REF_LOGPS.name,)
    columns: tuple[Column, ...] = ()
    label_threshold = 0.5
    fractional_scores = True
    needs_scores = False
    class_means = False
    data_collator: Any

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: UnpairedConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ):
        args = self._own_config(args, model)
        self._declare(args)
        self._check_source(args, model, processing_class, quantization_config)
        check_peft(peft_config, model, type(self).__name__, prompt_learning=True)
        stored = self._check_datasets(args, train_dataset, eval_dataset)
        if stored:
            check_ref_settings(args, named_datasets(train_dataset, eval_dataset), model, processing_class)
        if isinstance(model, torch.nn.Module):
            check_instance(model, peft_config)
            keep_4bit_trainable_on_cpu(model)

        with (
            self._with_reference(args, model, ref_model, peft_config, stored) as ref_model,
            kto_construction(hash_weights=not stored),
        ):
            super().__init__(
                model=model,
                ref_model=ref_model,
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
        # TRL computes reference and metrics, the loss is ours
        self.desirable_weight = self.undesirable_weight = 0.0
        self._step_counts: torch.Tensor | None = None
        self._eval_counts: torch.Tensor | None = None
        if data_collator is None:
            options = {
                name: getattr(self.data_collator, name)
                for name in ("pad_token_id", "max_length", "pad_to_multiple_of")
            }
            self.data_collator = UnpairedCollator(**options, columns=self._all_columns)
        else:
            keys = {column.name: column.name for column in (*self._all_columns, REF_LOGPS)}
            check_collator(self.data_collator, self.train_dataset, keys, UnpairedCollator)

    # ---------------------------------------------------------------- what a method overrides

    def _declare(self, args: Any) -> None:
        """Hook: set the attributes of the class that depend on the config. Runs before all else."""

    @abstractmethod
    def row_loss(self, batch: UnpairedBatch) -> torch.Tensor:
        """Loss of each row, shape (N,); weights and the mean over the rows follow."""

    def implicit_rewards(self, batch: UnpairedBatch) -> torch.Tensor:
        """Rewards for the metrics `rewards/*`, shape (N,). Here TRL's: beta times the log-ratio."""
        return self.beta * batch.logratios

    def derived_metrics(self, means: dict[str, float]) -> dict[str, float]:
        """Metrics that are made of the means recorded since the last log (a name with "_" first is not logged itself)."""
        if "rewards/chosen" in means and "rewards/rejected" in means:
            return {"rewards/margins": means["rewards/chosen"] - means["rewards/rejected"]}
        return {}

    @property
    def _all_columns(self) -> tuple[Column, ...]:
        return (*COLUMNS, *self.columns)

    # ---------------------------------------------------------------- data

    def _check_dataset(self, args: Any, dataset: Any, name: str, stored: bool) -> None:
        if isinstance(dataset, Dataset):
            dataset = dataset.with_format(None)
        check_unpaired_dataset(dataset, name, (*self._all_columns, REF_LOGPS), **self._feedback)
        row = first_row(dataset)
        for column in self.columns:
            if column.required and column.name not in row:
                raise ValueError(f"`{name}` lacks the column '{column.name}'; its columns are {sorted(row)}. Add it.")
        super()._check_dataset(args, dataset, name, stored)

    @property
    def _ref_words(self) -> tuple[str, str, str]:
        name, them, they_were = super()._ref_words
        of_pairs = " and ".join(repr(column.name) for column in PAIR_REF_LOGPS)
        return f"{name} (of pairs {of_pairs})", them, they_were

    def _has_reference(self, dataset: Any) -> bool:
        row = first_row(dataset)
        return REF_LOGPS.name in row or (is_paired(row) and PAIR_REF_LOGPS[0].name in row)

    @property
    def _feedback(self) -> dict[str, Any]:
        """Options of `complete_feedback`."""
        return {
            "threshold": self.label_threshold,
            "fractional": self.fractional_scores,
            "scores_needed": self.needs_scores,
        }

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        with self._naming_rows(dataset, dataset_name, processing_class):
            return self._prepared(dataset, processing_class, args, dataset_name)

    def _prepared(self, dataset, processing_class, args, dataset_name):
        probe = probe_of(dataset)
        differing = self._differing(probe)
        kept: Any = ()
        if first_row(differing):
            prepared, kept = self._prepare_rows(differing, processing_class, args, dataset_name)
        if not first_row(kept):
            raise ValueError(_NO_ROWS.format(name=dataset_name, max_length=args.max_length))
        if isinstance(dataset, Dataset):
            _report_dropped(probe, differing, prepared, kept, dataset_name, self._drop_options(args))
            return kept
        return self._prepare_rows(self._differing(dataset), processing_class, args, dataset_name)[1]

    def _differing(self, dataset):
        """The dataset without the pairs whose responses are equal: they would be trained with both labels."""
        row = first_row(dataset)
        if not is_paired(row) or "prompt_ids" in row:
            return dataset
        with global_then_local_main_first():
            return dataset.filter(versioned(responses_differ), fn_kwargs={"eos_token": self._tokenizer.eos_token})

    def _prepare_rows(self, dataset, processing_class, args, dataset_name):
        """Return the tokenized dataset, and the same without the rows that cannot be trained."""
        prepared, row = dataset, first_row(dataset)
        stored = is_paired(row) and PAIR_REF_LOGPS[0].name in row
        if stored:
            options = {"processing_class": processing_class, "eos_token": self._tokenizer.eos_token}
            with global_then_local_main_first():
                dataset = dataset.map(versioned(pair_lengths, pair_ids), fn_kwargs=options)
        if is_paired(row) and "prompt_ids" not in row and isinstance(dataset, IterableDataset):
            # TRL unpairs by the thousand, good rows first, and the order of a stream is that of the training
            dataset = dataset if "prompt" in row else dataset.map(extract_prompt)
            dataset = unpair_preference_dataset(dataset, batch_size=1)
        if "prompt_ids" not in row:
            # For a dataset called "train" TRL gives advice on KTO's class weights
            name = {"train": "training"}.get(dataset_name, dataset_name)
            prepared = super()._prepare_dataset(dataset, processing_class, preparation_options(args), name)
        with global_then_local_main_first():
            if stored:
                prepared = prepared.map(versioned(ref_logps_of_label), remove_columns="pair_lengths")
            prepared = prepared.map(versioned(complete_feedback), fn_kwargs=self._feedback)
            return prepared, prepared.filter(versioned(_trainable, is_blank), fn_kwargs=self._drop_options(args))

    def _drop_options(self, args) -> dict[str, Any]:
        """What `_why_dropped` depends on beside the row."""
        return {"eos_token": self._tokenizer.eos_token, "max_length": args.max_length}

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        names = [column.name for column in self._all_columns]
        self._signature_columns += [name for name in names if name not in self._signature_columns]

    # ---------------------------------------------------------------- evaluation

    def evaluation_loop(self, dataloader, *args, **kwargs):
        """As in transformers; means over classes are those of the whole dataset."""
        self._eval_counts = None
        if self.class_means and isinstance(dataloader.dataset, Dataset):
            self._eval_counts = self._counts(torch.tensor(dataloader.dataset.with_format(None)["label"][:]))
        elif self.class_means:
            logger.warning_once("The evaluation loss of a stream is the mean of the class means of its batches.")
        return super().evaluation_loop(dataloader, *args, **kwargs)

    # ---------------------------------------------------------------- loss

    @staticmethod
    def _counts(label: torch.Tensor) -> torch.Tensor:
        """Number of rows with label false and with label true, (2,)."""
        return torch.stack([(~label).sum(), label.sum()])

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in TRL; counts the rows of the optimizer step that divide the loss."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            counts = torch.stack([self._counts(batch["label"]).to(device) for batch in batches]).sum(0)
            if self.args.average_tokens_across_devices and self.accelerator.num_processes > 1:
                counts = self.accelerator.gather(counts[None]).sum(0) // self._tp_size
            self._step_counts = counts
        return batches, num_items

    def _mean(self, losses: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Value of a micro-batch in the mean over the rows of the step; micro-batches and processes are averaged later."""
        factor, counts = 1, self._counts(label)
        if self.model.training and self._step_counts is not None:
            factor, counts = self.current_gradient_accumulation_steps, self._step_counts.to(label.device)
            if self.args.average_tokens_across_devices:
                factor *= self.accelerator.num_processes // self._tp_size
        if not self.class_means:
            return losses.sum() * factor / counts.sum()
        divisor = counts[label.long()]  # at least 1: a class without rows has no losses either
        if not self.model.training and self._eval_counts is not None:  # weighted by its rows among the batches later
            counts = self._eval_counts.to(label.device)
            divisor = counts[label.long()] * label.numel() / counts.sum()
        return (losses * factor / divisor).sum()

    def _compute_loss(self, model, inputs, return_outputs):
        own = {column.name for column in self._all_columns} - {"label"}  # TRL's
        rows = {key: value for key, value in inputs.items() if key not in own}
        ref_token_logps = None
        if REF_LOGPS.name not in rows:
            ref_tap = FusedTap(self.ref_model or self.model)
            rows[REF_LOGPS.name], _ = self.compute_ref_log_probs(ref_tap, rows)
            ref_token_logps = ref_tap.output.log_probs
        tap = FusedTap(model)
        with self._reference_in_batch(True):
            base = super()._compute_loss(tap, rows, return_outputs)  # 0, and the router loss of a mixture of experts
        batch = self._batch(tap.output, rows, {key: inputs[key] for key in own if key in inputs}, ref_token_logps)
        if self._must_agree():
            drift, num_tokens = batch.logratios.detach().mean().abs(), batch.lengths.float().mean()
            self._check_agreement(drift.item(), num_tokens.item())

        losses = self.row_loss(batch)
        losses = losses * torch.where(batch.label, self.args.desirable_weight, self.args.undesirable_weight)
        if (weight := batch.columns.get("weight")) is not None:
            losses = losses * weight
            self._record_mean("weights/mean", weight.sum(), weight.numel())
        loss = (base[0] if return_outputs else base) + self._mean(losses, batch.label)
        self._record_rewards(batch)
        return (loss, base[1]) if return_outputs else loss

    @staticmethod
    def _batch(output, rows, extra, ref_token_logps) -> UnpairedBatch:
        width = rows["input_ids"].size(1) - 1  # without the virtual tokens of prompt learning
        token_logps, mask = output.log_probs[:, -width:].float(), rows["completion_mask"][:, 1:] != 0
        device = token_logps.device
        columns = {name: value.to(device) for name, value in extra.items()}
        return UnpairedBatch(
            logps=token_logps.sum(1),
            token_logps=token_logps,
            mask=mask,
            lengths=mask.sum(1),
            ref_logps=rows[REF_LOGPS.name].to(device),
            label=rows["label"].to(device),
            score=columns.pop("score"),
            columns=columns,
            ref_token_logps=None if ref_token_logps is None else ref_token_logps[:, -width:],
        )

    # ---------------------------------------------------------------- metrics

    def _record_rewards(self, batch: UnpairedBatch) -> None:
        """Record TRL's metrics of the rows of each label, as exact means; take away its KL term, which is not computed."""
        self._metrics["train" if self.model.training else "eval"].pop("kl", None)
        rewards = self.implicit_rewards(batch)
        for kind, label in (("chosen", batch.label), ("rejected", ~batch.label)):
            self._record_mean(f"rewards/{kind}", rewards[label].sum(), label.sum())
            self._record_mean(f"logps/{kind}", batch.logps[label].sum(), label.sum())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in TRL, with the means recorded since the last log and the metrics derived of them."""
        mode = "train" if self.model.training else "eval"
        if sums := self.__dict__.get("_sums", {}).get(mode):
            totals = self.accelerator.gather(torch.stack(list(sums.values()))[None]).sum(0).tolist()
            means = {name: total / count for name, (total, count) in zip(sums, totals, strict=True) if count}
            self._metrics[mode].pop("rewards/margins", None)  # TRL's is of the micro-batches with both labels
            for name, value in self.derived_metrics(means).items():
                self._metrics[mode][name] = [value]
            for name in [name for name in sums if name.startswith("_")]:
                del sums[name]
        super().log(logs, start_time)


# ---------------------------------------------------------------- rows

_NO_ROWS = (
    "No row of the {name} dataset can be trained: the responses are empty, those of a pair are equal, or their prompts fill "
    "`max_length={max_length}`. Check the columns, or raise `max_length`."
)


def _why_dropped(row: dict[str, Any], eos_token: str, max_length: int | None) -> str | None:
    """Reason why a prepared row cannot be trained, or `None`."""
    if max_length is not None and len(row["prompt_ids"]) >= max_length:  # tokenized before: TRL has not dropped it
        return f"the prompt fills `max_length={max_length}`"
    if not row["completion_ids"]:
        return "the response has no tokens"
    if row["label"] and "completion" in row and is_blank(row["completion"], eos_token):
        return "a good response is empty"
    return None


def _trainable(row: dict[str, Any], **options: Any) -> bool:
    return _why_dropped(row, **options) is None


def _report_dropped(
    raw: Dataset, differing: Dataset, prepared: Dataset, kept: Dataset, name: str, options: dict[str, Any]
) -> None:
    rows = 2 if is_paired(raw[0]) and "prompt_ids" not in raw[0] else 1
    equal, too_long = "chosen equals rejected", f"the prompt fills `max_length={options['max_length']}`"
    counts = {equal: (len(raw) - len(differing)) * rows, too_long: len(differing) * rows - len(prepared)}
    reasons = +Counter(counts)  # without zeros
    if len(kept) < len(prepared):
        reasons.update(reason for row in prepared if (reason := _why_dropped(row, **options)))
    report_dropped(reasons, len(raw) * rows, name)
