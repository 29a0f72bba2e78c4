r"""The reward-modeling objective of Eurus, https://huggingface.co/papers/2404.02078.

Bradley-Terry sees the difference of two rewards alone, so that both may be high. Where right and wrong are objective
(mathematics, code) an absolute term pushes the reward of the right answer above 0 and that of the wrong one below. With r_c and
r_r the rewards of the chosen and of the rejected response to one prompt:

    L_BT = - log sigma( r_c - r_r - m )                        m: the row's margin, if the data have one
    L_DR = - log sigma( r_c ) - log sigma( - r_r )

    L = relative_coef L_BT + absolute_coef [the row has the absolute term] L_DR

a mean over all rows of the batch. Both coefficients are 1 in the paper; the margin is TRL's. Which rows have the absolute term
says the column `absolute`: in the paper those of UltraInteract have, those of UltraFeedback and UltraSafety have not.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig, PeftModel, TaskType
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.utils import logging
from trl import RewardConfig, RewardTrainer

from ..checks import (
    check_preference_dataset,
    check_range,
    is_blank,
    named_datasets,
    probe_of,
    report_dropped,
    responses_differ,
)
from ..data.caching import versioned
from ..data.rows import first_row
from ..extension import ExtensionConfig, ExtensionTrainer
from ..hub.paper import arxiv_paper
from ..preference.collator import Column, Flag
from ..trl_internals import DataCollatorForReward, global_then_local_main_first, keep_4bit_trainable_on_cpu


logger = logging.get_logger(__name__)


ABSOLUTE = Flag("absolute")
MARGIN = Column("margin")
# What models for sequence classification call their head
_HEADS = ("score", "classifier")


@dataclass
class EurusRewardConfig(ExtensionConfig, RewardConfig):
    r"""
    Configuration class for the [`EurusRewardTrainer`].

    This class includes only the parameters that are specific to the objective, and `learning_rate`, whose default differs from
    TRL's.

    Parameters:
        learning_rate (`float`, *optional*, defaults to `1e-5`):
            The initial learning rate for AdamW (the paper's, with one epoch, a cosine schedule and a warm-up of 0.1).
        absolute_coef (`float`, *optional*, defaults to `1.0`):
            Weight of the absolute term, >= 0; 0 is Bradley-Terry alone, whatever the column `absolute` says.
        relative_coef (`float`, *optional*, defaults to `1.0`):
            Weight of the Bradley-Terry term, >= 0; 0 makes it two independent logistic losses.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})
    absolute_coef: float = field(
        default=1.0, metadata={"help": "Weight of the absolute term; 0 is Bradley-Terry alone."}
    )
    relative_coef: float = field(
        default=1.0, metadata={"help": "Weight of the Bradley-Terry term; 0 makes it two independent logistic losses."}
    )

    def __post_init__(self):
        check_range("absolute_coef", self.absolute_coef, 0)
        check_range("relative_coef", self.relative_coef, 0)
        if self.absolute_coef == self.relative_coef == 0:
            raise ValueError(
                "`absolute_coef` and `relative_coef` are both 0, so that nothing would be trained. Raise one."
            )
        if self.center_rewards_coefficient is not None and self.absolute_coef > 0:
            logger.warning(
                f"`center_rewards_coefficient={self.center_rewards_coefficient}` pulls the rewards of a pair to a mean of 0, "
                "and the absolute term fixes the zero of the reward by right and wrong. Drop it, or set `absolute_coef=0`."
            )
        super().__post_init__()


def eurus_reward_losses(
    chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor, margin: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The relative term, with an optional `margin`, and the absolute one, each (B,), from rewards and margin, each (B,)."""
    difference = chosen_rewards - rejected_rewards
    relative = -F.logsigmoid(difference if margin is None else difference - margin)
    return relative, -F.logsigmoid(chosen_rewards) - F.logsigmoid(-rejected_rewards)


@dataclass
class EurusRewardCollator(DataCollatorForReward):
    """[`~trl.trainer.reward_trainer.DataCollatorForPreference`] with the column `absolute`, (B,) boolean."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        if ABSOLUTE.name in examples[0]:
            values = [example[ABSOLUTE.name] for example in examples]
            for value in values:
                ABSOLUTE.check(value, "the batch")
            batch[ABSOLUTE.name] = torch.tensor(values)
        return batch


class EurusRewardTrainer(ExtensionTrainer, RewardTrainer):
    """Trainer for reward models with the objective of Eurus, with the arguments of [`~trl.RewardTrainer`].

    Beside `prompt` (optional), `chosen`, `rejected` and TRL's `margin`, a dataset may have `absolute`: whether a row has the
    absolute term. Without the column all rows have it.

    Example:

    ```python
    from datasets import load_dataset
    from trl_ift import EurusRewardConfig, EurusRewardTrainer

    trainer = EurusRewardTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=EurusRewardConfig("qwen-reward"),
        train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    )
    trainer.train()
    ```
    """

    config_class = EurusRewardConfig
    method = "eurus-reward"
    pipeline_tag = "text-classification"
    data_collator: Any
    _tag_names = ["trl", "trl-ift", "reward-trainer", "eurus-reward"]  # noqa: RUF012
    _name = "Eurus-Reward"
    _paper = arxiv_paper(
        "2404.02078",
        "yuan2024advancing",
        "Advancing LLM Reasoning Generalists with Preference Trees",
        "Lifan Yuan and Ganqu Cui and Hanbin Wang and Ning Ding and others",
        2024,
    )

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: EurusRewardConfig | None = None,
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
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ):
        args = self._own_config(args, model)
        self._check_source(args, model, processing_class, quantization_config)
        _check_head(model, peft_config)
        for name, dataset in named_datasets(train_dataset, eval_dataset).items():
            check_rows(args, dataset, name)
        if isinstance(model, torch.nn.Module):
            keep_4bit_trainable_on_cpu(model)
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
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        keep_4bit_trainable_on_cpu(self.model)  # no forward has run yet
        _check_trained_head(self.model)
        if data_collator is None:
            options = {name: getattr(self.data_collator, name) for name in ("pad_token_id", "pad_to_multiple_of")}
            self.data_collator = EurusRewardCollator(**options)
            return
        row = first_row(self.train_dataset)
        if ABSOLUTE.name in row and ABSOLUTE.name not in self.data_collator([row]):
            raise ValueError(
                f"`data_collator` ({type(data_collator).__name__}) leaves out 'absolute', which the loss reads. Derive it from "
                "`trl_ift.reward.eurus.EurusRewardCollator`, or drop the column."
            )

    # ---------------------------------------------------------------- data

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        with self._naming_rows(dataset, dataset_name, processing_class):
            return self._prepared(dataset, processing_class, args, dataset_name)

    def _prepared(self, dataset, processing_class, args, dataset_name):
        probe = probe_of(dataset)
        usable, prepared = self._usable(probe, processing_class), ()
        if first_row(usable):
            prepared = super()._prepare_dataset(usable, processing_class, args, dataset_name)
        if not first_row(prepared):
            raise ValueError(
                f"No row of the {dataset_name} dataset fits `max_length={args.max_length}`, prompt and response together, with "
                "responses that differ and are not empty. Check the columns, raise `max_length`, or set it to None."
            )
        if not isinstance(dataset, Dataset):
            usable = self._usable(dataset, processing_class)
            return super()._prepare_dataset(usable, processing_class, args, dataset_name)
        _report_dropped(probe, usable, prepared, dataset_name, args, processing_class.eos_token)
        return prepared

    @staticmethod
    def _usable(dataset, processing_class):
        """The dataset without the pairs that say nothing. (TRL puts the prompt before the responses.)"""
        with global_then_local_main_first():
            code = versioned(_trainable, is_blank, responses_differ)
            return dataset.filter(code, fn_kwargs={"eos_token": processing_class.eos_token})

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if ABSOLUTE.name not in self._signature_columns:
            self._signature_columns += [ABSOLUTE.name]

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """As in TRL, with the checks of the constructor."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            named = eval_dataset if isinstance(eval_dataset, dict) else {metric_key_prefix: eval_dataset}
            for name, dataset in named.items():
                check_rows(self.args, dataset, f"{name} dataset")
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        """As in transformers; the dataset is prepared as `evaluate` prepares it."""
        check_rows(self.args, test_dataset, "test_dataset")
        test_dataset = self._prepare_dataset(test_dataset, self.processing_class, self.args, metric_key_prefix)
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    # ---------------------------------------------------------------- loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        absolute = inputs.get(ABSOLUTE.name)
        inputs = {name: value for name, value in inputs.items() if name != ABSOLUTE.name}
        # TRL's loss is not used, its metrics are
        _, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        chosen, rejected = outputs.logits.squeeze(-1).float().chunk(2)
        relative, pointwise = eurus_reward_losses(chosen, rejected, inputs.get(MARGIN.name))
        has_absolute = torch.ones_like(pointwise) if absolute is None else absolute.to(pointwise)
        loss = (self.args.relative_coef * relative + self.args.absolute_coef * has_absolute * pointwise).mean()
        if self.args.center_rewards_coefficient is not None:
            loss = loss + self.args.center_rewards_coefficient * ((chosen + rejected) ** 2).mean()
        self._record(chosen, rejected, relative, pointwise, has_absolute)
        return (loss, outputs) if return_outputs else loss

    def _record(self, chosen, rejected, relative, pointwise, has_absolute) -> None:
        number, counted = len(chosen), has_absolute.sum()
        self._record_mean("eurus/relative_loss", relative.sum(), number)
        self._record_mean("eurus/absolute_loss", (has_absolute * pointwise).sum(), counted)
        self._record_mean("eurus/chosen_reward", chosen.sum(), number)
        self._record_mean("eurus/rejected_reward", rejected.sum(), number)
        self._record_mean("eurus/absolute_accuracy", (has_absolute * (chosen > 0) * (rejected < 0)).sum(), counted)


def check_rows(args: EurusRewardConfig, dataset: Any, name: str) -> None:
    """Check columns and types of a dataset: of its first row, and all numbers and booleans of a map-style one."""
    if isinstance(dataset, Dataset):
        dataset = dataset.with_format(None)
    row = first_row(dataset)
    columns = (MARGIN, ABSOLUTE)
    if not {"chosen_ids", "rejected_ids"} <= set(row):
        check_preference_dataset(dataset, name, columns)
    else:
        for column in [column for column in columns if column.name in row]:
            values = dataset[column.name] if isinstance(dataset, Dataset) else [row[column.name]]
            for index, value in enumerate(values):
                column.check(value, f"`{name}`, row {index}")
    if MARGIN.name in row and args.relative_coef == 0:
        raise ValueError(
            f"`{name}` has a column 'margin', which belongs to the relative term, and `relative_coef=0`. Drop one of the two."
        )


def _check_head(model: Any, peft_config: Any) -> None:
    """Raise for models and adapters that leave the new head as it was initialised."""
    name = type(model).__name__
    if isinstance(model, torch.nn.Module) and "CausalLM" in name:
        raise ValueError(
            f"`model` is a {name}, which has no reward head. Pass its name or folder, or load it with "
            "`AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)`."
        )
    if peft_config is None or peft_config.is_prompt_learning:
        return
    heads = {name.split(".")[0] for name in _head(model)} if isinstance(model, torch.nn.Module) else {*_HEADS}
    saved = getattr(peft_config, "modules_to_save", None) or ()
    if peft_config.task_type != TaskType.SEQ_CLS and not heads & {name.split(".")[-1] for name in saved}:
        raise ValueError(
            f"The adapter (`task_type={getattr(peft_config.task_type, 'value', None)!r}`, `modules_to_save={list(saved)}`) "
            "would leave the reward head as it was initialised. Set `task_type='SEQ_CLS'` in its config, or "
            "`modules_to_save=['score']`."
        )


def _head(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters of a model that are not those of its backbone, by name."""
    if is_peft_model(model):
        model = model.get_base_model()
    backbone = f"{model.base_model_prefix}."
    return {name: value for name, value in model.named_parameters() if not name.startswith(backbone)}


def _check_trained_head(model: torch.nn.Module) -> None:
    """Raise if the head would stay as it is."""
    if not any(parameter.requires_grad for parameter in _head(model).values()):
        raise ValueError(
            "No parameter of the reward head requires a gradient, so that it would stay as it is. With an adapter, set "
            "`task_type='SEQ_CLS'` in its config, or `modules_to_save=['score']`; else unfreeze the head."
        )


def _why_dropped(row: dict[str, Any], eos_token: str) -> str | None:
    """Reason why a pair cannot be trained, or `None`."""
    if "chosen_ids" in row and "rejected_ids" in row:
        if not row["chosen_ids"] or not row["rejected_ids"]:
            return "chosen or rejected has no tokens"
        return "chosen equals rejected" if row["chosen_ids"] == row["rejected_ids"] else None
    if not responses_differ(row, eos_token):
        return "chosen equals rejected"
    chosen = row["chosen"]
    if "prompt" not in row and not isinstance(chosen, str):
        chosen = chosen[-1:]  # what stands before it may be the prompt
    return "chosen is empty" if is_blank(chosen, eos_token) else None


def _trainable(row: dict[str, Any], **options: Any) -> bool:
    return _why_dropped(row, **options) is None


def _report_dropped(
    raw: Dataset, usable: Dataset, prepared: Dataset, name: str, args: EurusRewardConfig, eos_token: str
) -> None:
    too_long = f"a response is longer than `max_length={args.max_length}` with its prompt"
    reasons = +Counter({too_long: len(usable) - len(prepared)})  # without zeros
    if len(usable) < len(raw):
        reasons.update(reason for row in raw if (reason := _why_dropped(row, eos_token)))
    report_dropped(reasons, len(raw), name)
