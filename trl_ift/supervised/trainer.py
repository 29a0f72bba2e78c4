"""`SupervisedTrainer`: the base of the methods that train on SFT data."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from accelerate.utils import is_peft_model
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
from trl import SFTConfig, SFTTrainer

from ..checks import check_peft, check_sft_dataset
from ..extension import ExtensionTrainer
from ..trl_internals import keep_4bit_trainable_on_cpu, score_labelled_positions_only


class SupervisedTrainer(ExtensionTrainer, SFTTrainer):
    """[`~trl.SFTTrainer`] with the library's checks, scoring only labelled positions on every device.

    The constructor takes the arguments of [`~trl.SFTTrainer`]. A method subclasses it and overrides `compute_loss`; what
    it must change in the model goes into `_patch_model`.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SFTConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[dict], str] | None = None,
    ):
        args = self._own_config(args, model)
        if compute_loss_func is not None:
            raise ValueError(
                f"`compute_loss_func` would replace the loss of {type(self).__name__}. Drop it, or subclass the trainer and "
                "override `compute_loss`."
            )
        self._check_source(model, processing_class, quantization_config)
        check_peft(peft_config, model, type(self).__name__)
        self._check_datasets(args, train_dataset, eval_dataset, formatting_func is not None)
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
            formatting_func=formatting_func,
        )
        keep_4bit_trainable_on_cpu(self.model)  # no forward has run yet
        base_model = self.model.get_base_model() if is_peft_model(self.model) else self.model
        score_labelled_positions_only(base_model)
        self._patch_model(base_model)

    def _patch_model(self, base_model: PreTrainedModel) -> None:
        """Hook: extend the fused forward of the base model (not the PEFT wrapper)."""

    @staticmethod
    def _check_datasets(args: SFTConfig, train_dataset: Any, eval_dataset: Any, formatted: bool) -> None:
        if train_dataset is None:
            raise ValueError("`train_dataset` is required")
        if not isinstance(train_dataset, Dataset | IterableDataset):
            raise TypeError(
                f"`train_dataset` must be a `Dataset` or `IterableDataset`, got `{type(train_dataset).__name__}`."
            )
        named = {"train_dataset": train_dataset}
        if isinstance(eval_dataset, dict):
            named |= {f"eval_dataset[{key!r}]": dataset for key, dataset in eval_dataset.items()}
        elif eval_dataset is not None:
            named["eval_dataset"] = eval_dataset
        if not (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
            for name, dataset in named.items():
                check_sft_dataset(dataset, name, args.dataset_text_field, formatted)

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        prepared = super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        # An endless stream of untrainable rows must not hang the check
        rows = prepared if isinstance(prepared, Dataset) else islice(prepared, 1000)
        if not any(label != -100 for row in rows for label in row["labels"]):
            raise ValueError(
                f"No row of the {dataset_name} dataset has a trainable token: all labels are -100 after truncation to "
                f"`max_length={args.max_length}`. Raise `max_length` (a prompt may fill it), or check the labels, "
                "`completion_only_loss` and `assistant_only_loss`."
            )
        return prepared
