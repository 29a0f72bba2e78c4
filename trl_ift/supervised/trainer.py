"""`SupervisedTrainer`: the base of the methods that train on SFT data."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    DataCollator,
    EvalPrediction,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from ..checks import check_peft, check_sft_dataset, named_datasets, probe_of
from ..extension import ExtensionTrainer
from ..trl_internals import keep_4bit_trainable_on_cpu, score_labelled_positions_only


# What decides which config `from_pretrained` reads
_CONFIG_OPTIONS = ("revision", "trust_remote_code", "token", "cache_dir", "subfolder")


class SupervisedTrainer(ExtensionTrainer, SFTTrainer):
    """[`~trl.SFTTrainer`] with the library's checks, scoring only labelled positions on every device.

    The constructor takes the arguments of [`~trl.SFTTrainer`]. A method subclasses it and overrides `compute_loss`; what
    it must change in the model goes into `_patch_model`.
    """

    _trained_texts = (("completion",), ("messages",))

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
        self._check_source(args, model, processing_class, quantization_config)
        check_peft(peft_config, model, type(self).__name__)
        self._check_datasets(args, train_dataset, eval_dataset, formatting_func is not None)
        self._check_model_config(args, self._config_of(model, args))
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

    @staticmethod
    def _config_of(model: str | torch.nn.Module, args: SFTConfig) -> PretrainedConfig:
        """The config of the model; of a path or Hub id, without loading the model."""
        if not isinstance(model, str):
            return model.config
        options = {name: value for name, value in (args.model_init_kwargs or {}).items() if name in _CONFIG_OPTIONS}
        return AutoConfig.from_pretrained(model, **{"trust_remote_code": args.trust_remote_code, **options})

    @staticmethod
    def _check_model_config(args: Any, config: PretrainedConfig) -> None:
        """Hook: refuse models and settings that the method cannot train, before the model is loaded."""

    def _patch_model(self, base_model: PreTrainedModel) -> None:
        """Hook: extend the fused forward of the base model (not the PEFT wrapper)."""

    @staticmethod
    def _check_datasets(args: SFTConfig, train_dataset: Any, eval_dataset: Any, formatted: bool) -> None:
        if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
            named_datasets(train_dataset, None)  # TRL takes anything for the other one
            return
        for name, dataset in named_datasets(train_dataset, eval_dataset).items():
            check_sft_dataset(dataset, name, args.dataset_text_field, formatted)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """As in TRL, with the checks of the constructor."""
        skipped = (self.args.dataset_kwargs or {}).get("skip_prepare_dataset")
        if eval_dataset is not None and not isinstance(eval_dataset, str) and not skipped:
            named = eval_dataset if isinstance(eval_dataset, dict) else {metric_key_prefix: eval_dataset}
            for name, dataset in named.items():
                formatted = self._formatting_func is not None
                check_sft_dataset(dataset, f"{name} dataset", self.args.dataset_text_field, formatted)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        with self._naming_rows(dataset, dataset_name, processing_class) if formatting_func is None else nullcontext():
            return self._prepared(dataset, processing_class, args, packing, formatting_func, dataset_name)

    def _prepared(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        prepared = super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        rows = prepared
        if not isinstance(prepared, Dataset):
            probe = probe_of(dataset)  # TRL drops rows that cannot be trained
            rows = super()._prepare_dataset(probe, processing_class, args, packing, formatting_func, dataset_name)
        # Nothing predicts the first token of a row
        if not any(label != -100 for row in rows for label in row["labels"][1:]):
            raise ValueError(
                f"No row of the {dataset_name} dataset has a trainable token: all labels are -100 after truncation to "
                f"`max_length={args.max_length}`. Raise `max_length` (a prompt may fill it), or check the labels, "
                "`completion_only_loss` and `assistant_only_loss`."
            )
        return prepared
