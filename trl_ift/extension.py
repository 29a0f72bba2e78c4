"""What every trainer of the library adds to the TRL trainer it extends.

Checks before the model loads, the guard of 4-bit weights on CPU, resuming that continues the token count, protection of
earlier results, the model card, and pushes without pickles.
"""

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate.utils import is_peft_model
from huggingface_hub import EvalResult, HfApi, ModelCard
from packaging.version import Version
from torch.utils.data import IterableDataset
from transformers import TrainerControl
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, PushInProgress, logging
from trl import is_conversational

from .checks import WEIGHT_FILES, check_model_source, check_output_dir, check_quantization, resolve_checkpoint
from .data.rows import check_written, first_row, naming_the_row
from .hub.card import build_model_card, is_hub_id, library_versions
from .redaction import redacted
from .registry import get_method
from .trl_internals import get_comet_experiment_url, get_config_model_id, get_trackio_space_url


if TYPE_CHECKING:  # a mixin: the trainer it extends is the next class in the bases of its subclasses
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


_STATE_FILE = "trl_ift_state.json"
# What a push at a checkpoint takes from it: the model, not the state of the optimizer
_MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
)

logger = logging.get_logger(__name__)


class RedactedConfig:
    """Mixin for configs, before the class of TRL or transformers: what trackers log of them has no tokens and passwords."""

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without tokens and passwords in dictionaries of options either: trackers log it."""
        return redacted(super().to_dict())  # type: ignore[misc]


class SaveWithoutArguments(_Trainer):
    """Mixin for trainers: saves weights without `training_args.bin`, a pickle with `hub_token` in clear that nothing reads."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token
        if self.args.should_save:
            (Path(output_dir or self.args.output_dir) / TRAINING_ARGS_NAME).unlink(missing_ok=True)


@dataclass
class ExtensionConfig(RedactedConfig):
    """Options shared by the configs of all methods.

    Parameters:
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Whether training may write over the weights and checkpoints of another run in `output_dir`.
        hub_base_model (`str`, *optional*):
            Hub id of the base model when it was loaded from a local folder: printed in the model card and written into
            the adapter's config, so that others can load the adapter.
    """

    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Whether training may write over the weights and checkpoints of another run in `output_dir`."
        },
    )
    hub_base_model: str | None = field(
        default=None,
        metadata={
            "help": "Hub id of the base model when it was loaded from a local folder: printed in the model card and "
            "written into the adapter's config, so that others can load the adapter."
        },
    )

    # Options that change how fast a run is, not what it gives. (No metadata of the fields: those are argparse's arguments.)
    same_result: ClassVar[tuple[str, ...]] = ()


class ExtensionTrainer(SaveWithoutArguments):
    """Mixin for subclasses of TRL trainers; stands before the TRL class in the bases.

    Attributes:
        config_class: Config that the trainer takes; a foreign one is refused.
        method: Name of the method in the registry.
        card_options: Options of TRL's config that the model card shows beside the method's own.
        pipeline_tag: What the trained model does, on the Hub.
    """

    config_class: type
    method: str
    control: TrainerControl
    card_options: tuple[str, ...] = ()
    pipeline_tag = "text-generation"
    # Columns of texts or messages that TRL tokenizes: the first of these that a row has
    _trained_texts: ClassVar[tuple[tuple[str, ...], ...]] = (("chosen", "rejected"), ("completion",))

    @classmethod
    def _own_config(cls, args: Any, model: Any) -> Any:
        """Return `args`, or the default config for `args=None`; refuse any other class."""
        if args is None:
            source = model if isinstance(model, str) else get_config_model_id(model.config)
            return cls.config_class(f"{source.split('/')[-1] or 'model'}-{cls._name}")
        if not isinstance(args, cls.config_class):
            raise TypeError(
                f"`args` is a `{type(args).__name__}`, but {cls.__name__} needs a `{cls.config_class.__name__}`: it holds the "
                f"options of the method. Replace `{type(args).__name__}(...)` by `{cls.config_class.__name__}(...)`; every "
                "option of the former is valid there."
            )
        return args

    def create_accelerator_and_postprocess(self) -> None:
        """As in transformers; under FSDP2 the model gives its log-probabilities out in float32, as it computes them.

        accelerate would have all that a module returns cast to the precision of the weights: a sum over a response in bfloat16
        is off by nats.
        """
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and self.accelerator.is_fsdp2 and plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)

    @staticmethod
    def _check_source(args: Any, model: Any, processing_class: Any, quantization_config: Any) -> None:
        check_model_source(model, processing_class)
        for config in (quantization_config, (args.model_init_kwargs or {}).get("quantization_config")):
            if config is not None:
                check_quantization(config)

    @contextmanager
    def _naming_rows(self, dataset: Any, name: str, processing_class: Any) -> Iterator[None]:
        """Around the preparation of a dataset: checks what the tokenizer makes of its rows; names one that it cannot read."""
        row = first_row(dataset)
        found = [names for names in self._trained_texts if all(row.get(name) is not None for name in names)]
        columns = ["prompt"] * (row.get("prompt") is not None and found[:1] != [("messages",)]) + list(*found[:1])
        if columns == ["messages"] and not is_conversational(row):  # TRL drops the column
            columns = []
        if not columns or {"input_ids", "prompt_ids", "chosen_ids"} & set(row):
            yield
            return
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        check_written(dataset, f"{name} dataset", columns, tokenizer)
        with naming_the_row(dataset, f"{name} dataset", columns, tokenizer):
            yield

    # ---------------------------------------------------------------- training and resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As in TRL. Refuses to write over another run (`overwrite_output_dir`) and to resume a broken checkpoint.

        A resumed run goes on as it would have without the interruption; with `resume_from_checkpoint=True` from the last
        complete checkpoint in `output_dir`.
        """
        checkpoint = resolve_checkpoint(resume_from_checkpoint, self.args.output_dir)
        self._resumed_state: dict[str, Any] = {}
        if not getattr(self, "_owns_output_dir", False):
            check_output_dir(self.args, checkpoint)
            if self.args.overwrite_output_dir and checkpoint is None:
                self._remove_earlier_run()
            self._owns_output_dir = True
        if checkpoint is not None:
            self._check_resumable(Path(checkpoint))
            self._load_extension_state(Path(checkpoint))
        return super().train(checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = self.model if model is None else model
        if Version(version("transformers")) >= Version("5.23") or not is_peft_model(model):
            return
        # Before, it leaves out the adapter in the checkpoint's own folder when others lie beside it, as the reference's does
        if len(model.peft_config) > 1 and (Path(resume_from_checkpoint) / ADAPTER_SAFE_WEIGHTS_NAME).is_file():
            active = model.active_adapters[0]
            model.load_adapter(resume_from_checkpoint, "default", is_trainable=active == "default")
            model.set_adapter(active)

    def _check_resumable(self, checkpoint: Path) -> None:
        """Refuse a checkpoint from which training would go on with a new optimizer."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # they have files of their own
            return
        if missing := [name for name in (OPTIMIZER_NAME, SCHEDULER_NAME) if not (checkpoint / name).is_file()]:
            raise ValueError(
                f"The checkpoint `{checkpoint}` has no {' and no '.join(map(repr, missing))}, so that training would go on "
                "with a new optimizer. (Was it saved with `save_only_model=True`?) Resume from a checkpoint that has them, or "
                "begin a new run with its weights as `model`."
            )

    def _remove_earlier_run(self) -> None:
        """Remove weights and checkpoints from `output_dir`: left behind, they would be loaded or resumed for this run's."""
        folder = Path(self.args.output_dir).resolve()
        source = get_config_model_id(self.model.config)
        if os.path.isdir(source) and Path(source).resolve().is_relative_to(folder):
            raise ValueError(
                f"`overwrite_output_dir=True` would remove the model that is being trained: `{source}` lies in "
                f"`output_dir={self.args.output_dir!r}`. Choose another `output_dir`."
            )
        if not self.is_world_process_zero() or not folder.is_dir():
            return
        for name in (*WEIGHT_FILES, "adapter_config.json"):
            (folder / name).unlink(missing_ok=True)
        for path in folder.glob("model-*-of-*.safetensors"):
            path.unlink()
        for path in folder.glob("checkpoint-*"):
            if path.is_dir() and path.name.removeprefix("checkpoint-").isdigit():
                shutil.rmtree(path)

    def _extension_state(self) -> dict[str, Any]:
        """State beyond the Trainer's that a resumed run needs, as JSON. Call it on all processes: it gathers."""
        means = self.__dict__.get("_sums", {}).get("train", {})
        last_step = self._last_step and [
            value.item() if isinstance(value, torch.Tensor) else value for value in self._last_step
        ]
        state = {
            "num_tokens": self._total_train_tokens,
            # Of the steps since the last log, where the checkpoint lies between two
            "last_logged": self._globalstep_last_logged,
            "metrics": dict(self._metrics["train"]),
            # ... of each process
            "loss": self.accelerator.gather(self._tr_loss[None]).tolist(),
            "means": {name: self.accelerator.gather(value[None]).tolist() for name, value in means.items()},
            # Norm of the gradient and learning rate, which a log at the end of the epoch shows; not where that end is over
            "last_step": last_step,
            # `log` asks for it: no longer after an evaluation
            "training": self.model.training,
            "stream": None,
        }
        if isinstance(self.train_dataset, IterableDataset):
            # Passes over the stream, and micro-batches of the next one; an epoch there are all the steps of the run
            passes, part = divmod(self.state.epoch, 1)
            batches = round(part * self.state.max_steps * self.args.gradient_accumulation_steps)
            state["stream"] = [int(passes), batches] if last_step else [math.ceil(self.state.epoch), 0]
        return state

    def _save_extension_state(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Hook: write what a resumed run needs into a checkpoint, on the process that saves; `state` is as JSON."""
        (checkpoint / _STATE_FILE).write_text(json.dumps(state))

    def _load_extension_state(self, checkpoint: Path) -> None:
        """Hook: take it from a checkpoint, on all processes, before training begins."""
        path = checkpoint / _STATE_FILE
        # Without it the checkpoint was written by another trainer, e.g. `trl.SFTTrainer`
        state = json.loads(path.read_text()) if path.is_file() else {}
        self._check_place(checkpoint, state)
        if not state:
            return
        self._total_train_tokens = state["num_tokens"]
        self._resumed_state |= {name: state.get(name) for name in ("stream", "last_step", "training")}
        # With another number of processes, the next log is of the steps after the checkpoint
        if len(state.get("loss", [])) == self.accelerator.num_processes:
            process = self.accelerator.process_index
            self._resumed_state |= {"last_logged": state["last_logged"], "losses": state["loss"]}
            self._metrics["train"].clear()
            self._metrics["train"].update(state["metrics"])
            means = {
                name: torch.tensor(each[process], device=self.args.device) for name, each in state["means"].items()
            }
            self.__dict__.setdefault("_sums", {"train": {}, "eval": {}})["train"] = means

    def _check_place(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Refuse a place in a stream for other data and the reverse; warn of a stream whose place is not known."""
        if self.args.ignore_data_skip:
            return
        stream = isinstance(self.train_dataset, IterableDataset)
        if "stream" not in state:
            if stream:
                logger.warning(
                    f"The checkpoint `{checkpoint}` does not say where it was in the stream (`IterableDataset`). Training goes "
                    "on where transformers takes it to have been, which is another place from the second pass on."
                )
        elif stream != (state["stream"] is not None):
            kinds = ["`Dataset`", "stream (`IterableDataset`)"]
            raise ValueError(
                f"The checkpoint `{checkpoint}` is of a training on a {kinds[not stream]}, and `train_dataset` is a "
                f"{kinds[stream]}: its place in the data is another there. Pass the same kind of dataset, or set "
                "`ignore_data_skip=True` to begin with its first rows."
            )

    def _init_training_state(self, *args, **kwargs):
        """As in transformers, with the place in a stream and the end of an epoch.

        It takes all the passes over a stream for one, so that it would skip batches of the first alone; and an epoch for ended
        after its last step, when its log, its evaluation and what callbacks do then may be outstanding.
        """
        epoch, batches = super()._init_training_state(*args, **kwargs)
        resumed = self._resumed = dict(self._resumed_state)
        self._last_step: tuple[Any, Any] | None = None
        self._noted_step = self.state.global_step
        self.control.should_save = False  # one that callbacks' states bring is that of within the save
        if resumed.get("stream") and not self.args.ignore_data_skip:
            epoch, batches = resumed["stream"]
        done = self.state.global_step >= self.state.max_steps
        if resumed.get("last_step") and (done or (self.state.epoch, 0) == (epoch, batches)):
            resumed["epoch_ends"] = True
            return math.ceil(self.state.epoch) - 1, 0
        return epoch, batches

    def _run_epoch(self, *args, **kwargs):
        """As in transformers, which takes one more step when resumed at the end, and forgets the loss since the last log."""
        resumed = self._resumed
        if "last_logged" in resumed:  # after the loop has begun to count anew
            self._globalstep_last_logged = resumed["brought_until"] = resumed.pop("last_logged")
            self._tr_loss += resumed["losses"][self.accelerator.process_index]
        if (training := resumed.pop("training", None)) is not None:
            kwargs["model"].train(training)
        done = self.state.global_step >= self.state.max_steps
        if done:
            self.control.should_training_stop = True
        if resumed.pop("epoch_ends", False):
            self._load_rng_state(kwargs["resume_from_checkpoint"])
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            place = (kwargs[name] for name in ("model", "trial", "epoch", "ignore_keys_for_eval", "start_time"))
            self._maybe_log_save_evaluate(self._tr_loss, None, *place)
        elif not done:
            super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, learning_rate=None, **kwargs):
        """As in transformers, which calls it after each step, and once more for the end of an epoch."""
        brought = self._resumed.pop("last_step", None)
        if learning_rate is None and brought:  # the last step of this epoch is that of the checkpoint
            grad_norm, learning_rate = brought
        if self.state.global_step > self._noted_step:
            self._noted_step = self.state.global_step
            self._last_step = (grad_norm, learning_rate)
        else:
            self._last_step = None
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, learning_rate=learning_rate, **kwargs)

    def _finalize_training(self, *args, **kwargs):
        """As in transformers; `train_loss` is of the steps of this call, without the loss that a checkpoint brought."""
        if "brought_until" in self._resumed:
            losses = torch.tensor(self._resumed["losses"])
            # A log adds the mean over the processes, the end the loss of each
            logged = self._globalstep_last_logged > self._resumed["brought_until"]
            self._total_loss_scalar -= (losses.mean() if logged else losses[self.accelerator.process_index]).item()
        return super()._finalize_training(*args, **kwargs)

    def _save_checkpoint(self, model, trial):
        checkpoint = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        state = self._extension_state()
        if self.args.should_save:
            checkpoint.mkdir(parents=True, exist_ok=True)
            # A stale marker of completeness must not vouch for files that are about to be written anew
            (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)
            self._save_extension_state(checkpoint, state)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # what is written next vouches for the files of all processes

    # ---------------------------------------------------------------- metrics

    def _record_mean(self, name: str, total: torch.Tensor, count: torch.Tensor | int) -> None:
        """Add to a metric that is a mean over tokens, rows or pairs, exact over processes and micro-batches.

        Every process must record the same names in a step, with `count` 0 if it has none.
        """
        sums = self.__dict__.setdefault("_sums", {"train": {}, "eval": {}})["train" if self.model.training else "eval"]
        values = torch.stack([torch.as_tensor(v).detach().float().to(self.args.device) for v in (total, count)])
        sums[name] = sums[name] + values if name in sums else values

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in TRL, with the means recorded since the last log. Call it on all processes: it gathers them."""
        mode = "train" if self.model.training else "eval"
        recorded = self.__dict__.get("_sums", {})
        sums = recorded.get(mode)
        if sums:
            recorded[mode] = {}
            stacked = torch.stack(list(sums.values()))
            totals = self.accelerator.gather(stacked[None]).sum(0).tolist()
            for name, (total, count) in zip(sums, totals, strict=True):
                if count:
                    self._metrics[mode][name] = [total / count]
        super().log(logs, start_time)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        """As in transformers."""
        output = super().predict(test_dataset, ignore_keys, metric_key_prefix)
        # Nothing logs the metrics of a prediction: they must not be averaged into the next evaluation
        self._metrics["eval"].clear()
        self.__dict__.get("_sums", {}).get("eval", {}).clear()
        return output

    # ---------------------------------------------------------------- model card

    def add_eval_result(
        self,
        metric: str,
        value: float,
        dataset: str,
        split: str | None = None,
        metric_name: str | None = None,
    ) -> None:
        """Add a result of an evaluation to the model card (its `model-index` and its table).

        Args:
            metric: Identifier of the metric, e.g. `"exact_match"`.
            value: Its value.
            dataset: Name of the dataset it was measured on.
            split: Split of the dataset.
            metric_name: Name to print; the identifier by default.
        """
        results = self.__dict__.setdefault("_eval_results", {})
        arguments = (metric, value, dataset, split, metric_name, self.pipeline_tag)
        results[(metric, dataset, split)] = _eval_result(*arguments)

    def _all_eval_results(self) -> list[EvalResult]:
        """The results added, and the last losses of the evaluations during training."""
        results = dict(self.__dict__.get("_eval_results", {}))
        found: dict[str, float] = {}
        for entry in self.state.log_history:
            found |= {key: value for key, value in entry.items() if re.fullmatch(r"eval_([^/]+_)?loss", key)}
        for name in ("eval_aux_loss", "eval_nll_loss"):  # parts of the loss, not of other datasets
            found.pop(name, None)
        for key, value in found.items():
            dataset = getattr(self, "_dataset_name", None) or "evaluation dataset"
            metric, name = "loss", f"{self._name} loss"
            if key == "eval_sft_loss":
                metric, name = "sft_loss", "NLL per token (nats)"
            elif key != "eval_loss":  # one of several evaluation datasets
                dataset = key.removeprefix("eval_").removesuffix("_loss")
            results[key] = _eval_result(metric, value, dataset, "evaluation", name, self.pipeline_tag)
        return list(results.values())

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Write `README.md` into `output_dir`, on the main process: paper, parameters, results, how to load it.

        Args:
            model_name: Name of the model; the output folder's by default.
            dataset_name: Hub id or name of the training dataset; remembered for later cards of this trainer.
            tags: Tags beside those of the method.
        """
        if not self.is_world_process_zero():
            return
        self._dataset_name = dataset_name or getattr(self, "_dataset_name", None)
        self._card_name = model_name or getattr(self, "_card_name", None)
        card = self._model_card([tags] if isinstance(tags, str) else tags)
        card.save(os.path.join(self.args.output_dir, "README.md"))

    def _model_card(self, tags: list[str] | None = None) -> ModelCard:
        folder = os.path.abspath(self.args.output_dir)
        return build_model_card(
            model_name=getattr(self, "_card_name", None) or Path(self.args.hub_model_id or folder).name,
            dataset_names=getattr(self, "_dataset_name", None),
            tags=[*self._tag_names, *(tags or [])],
            **self._card_arguments(),
        )

    def _card_arguments(self) -> dict[str, Any]:
        args, config = self.args, self.model.config
        adapter = next(iter(self.model.peft_config.values())) if is_peft_model(self.model) else None
        quantization = getattr(config, "quantization_config", None)
        source = get_config_model_id(config)
        on_hub = args.hub_base_model or (
            source if source and not os.path.isdir(source) and is_hub_id(source) else None
        )
        steps = {"max_steps": args.max_steps} if args.max_steps > 0 else {"num_train_epochs": args.num_train_epochs}
        wandb_run = sys.modules["wandb"].run if "wandb" in sys.modules else None
        return {
            "method": get_method(self.method).title,
            "trainer_name": type(self).__name__,
            "paper_title": self._paper["title"],
            "paper_id": self._paper["id"],
            "citation": self._paper["citation"],
            "base_model": on_hub,
            "base_model_label": source or None,
            "hub_model_id": self.hub_model_id,
            "method_parameters": {
                name: _without_folder(getattr(args, name))
                for name in (*self.card_options, *self.own_options())
                if getattr(args, name) is not None
            },
            "training_parameters": {
                "learning_rate": args.learning_rate,
                "lr_scheduler_type": str(args.lr_scheduler_type.value),
                "warmup_steps": args.warmup_steps,
                "optim": str(getattr(args.optim, "value", args.optim)),
                **steps,
                "batch size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
                "max_length": args.max_length,
                "max_grad_norm": args.max_grad_norm,
                "precision": "bf16"
                if args.bf16
                else "fp16"
                if args.fp16
                else str(self.model.dtype).removeprefix("torch."),
                "seed": args.seed,
            },
            "versions": library_versions(),
            "peft": adapter is not None,
            "peft_summary": adapter_summary(adapter) if adapter is not None else None,
            "quantization": _quantization_summary(quantization) if quantization is not None else None,
            "chat": bool(getattr(self.processing_class, "chat_template", None)),
            "eval_results": self._all_eval_results(),
            "wandb_url": wandb_run.url if wandb_run is not None else None,
            "trackio_url": get_trackio_space_url(),
            "comet_url": get_comet_experiment_url(),
            "pipeline_tag": self.pipeline_tag,
        }

    @classmethod
    def own_options(cls) -> list[str]:
        """Names of the config fields that the method adds to TRL's, but for those that do not change results."""
        shared = {field.name for field in fields(ExtensionConfig)}
        parents = [base for base in cls.config_class.__mro__[1:] if is_dataclass(base) and base is not ExtensionConfig]
        inherited = {field.name for base in parents for field in fields(base)}
        own = [field for field in fields(cls.config_class) if field.name not in shared | inherited]
        return [field.name for field in own if field.name not in getattr(cls.config_class, "same_result", ())]

    # ---------------------------------------------------------------- saving and pushing

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        path = folder / "adapter_config.json"
        if self.args.hub_base_model and path.is_file():
            # The adapter of a local copy is loaded elsewhere from the Hub's base
            adapter = json.loads(path.read_text())
            adapter["base_model_name_or_path"] = self.args.hub_base_model
            path.write_text(json.dumps(adapter, indent=2, sort_keys=True))
        if self.is_world_process_zero():
            self._model_card().save(folder / "README.md")  # PEFT has put its own there, with the path of the base

    def push_to_hub(self, *args, **kwargs):
        """As in TRL."""
        self._warn_of_local_base()
        self._finish_current_push()  # it reads the files that are now written anew
        return super().push_to_hub(*args, **kwargs)

    def _warn_of_local_base(self) -> None:
        if is_peft_model(self.model) and not self.args.hub_base_model:
            source = get_config_model_id(self.model.config)
            if os.path.isdir(source):
                logger.warning_once(
                    f"The adapter names the local folder `{source}` as its base model: others cannot load it. Set "
                    "`hub_base_model` to the Hub id of the base."
                )

    def _finish_current_push(self) -> None:
        """Wait for the pushes in the background, and report those that failed."""
        super()._finish_current_push()
        pending, self.push_in_progress = getattr(self, "push_in_progress", None), None
        for job in pending.jobs if pending is not None else []:
            if job.exception() is not None:
                logger.warning(f"A push to the Hub during training failed: {job.exception()}")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As in transformers, which would also write and push the pickled arguments, token included."""
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not args.hub_always_push:
            return
        self._finish_current_push()
        self._warn_of_local_base()
        self.callback_handler.on_push_begin(args, self.state, self.control)
        for pattern in _MODEL_FILES:
            for path in Path(checkpoint_folder).glob(pattern):
                shutil.copy(path, args.output_dir)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(args.output_dir)
        by_step = args.save_strategy == SaveStrategy.STEPS
        when = f"step {self.state.global_step}" if by_step else f"epoch {int(self.state.epoch)}"
        upload = partial(
            HfApi().upload_folder,
            repo_id=self.hub_model_id,
            token=args.hub_token,
            revision=args.hub_revision,
            run_as_future=True,
        )
        jobs = [
            upload(
                folder_path=args.output_dir,
                commit_message=f"Training in progress, {when}",
                ignore_patterns=["_*", "checkpoint-*", TRAINING_ARGS_NAME],
            )
        ]
        if args.hub_strategy != HubStrategy.EVERY_SAVE:  # the user asks for checkpoints to resume from
            folder = Path(checkpoint_folder)
            jobs.append(
                upload(
                    folder_path=folder,
                    path_in_repo="last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else folder.name,
                    commit_message=f"Training in progress, {when}, checkpoint",
                )
            )
        self.push_in_progress = PushInProgress(jobs)


def _eval_result(
    metric: str, value: float, dataset: str, split: str | None, metric_name: str | None, task: str
) -> EvalResult:
    return EvalResult(
        task_type=task,
        dataset_type=re.sub(r"[^\w./-]+", "-", dataset),
        dataset_name=dataset,
        dataset_split=split,
        metric_type=metric,
        metric_name=metric_name or metric,
        metric_value=value,
    )


def _without_folder(value: Any) -> Any:
    """The value of an option for a card: of an absolute path its last part only."""
    if isinstance(value, list | tuple):
        return [_without_folder(part) for part in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(os.path.expanduser(value)) else value


def adapter_summary(config: Any) -> str:
    """A PEFT config in a few words, e.g. `LORA, rank 16, alpha 32, on down_proj, q_proj`."""
    parts = [str(getattr(config.peft_type, "value", config.peft_type))]
    parts += [
        f"{label} {getattr(config, name)}"
        for name, label in (("r", "rank"), ("lora_alpha", "alpha"))
        if hasattr(config, name)
    ]
    targets = getattr(config, "target_modules", None)
    if targets:
        names = [targets] if isinstance(targets, str) else sorted({name.split(".")[-1] for name in targets})
        parts.append("on " + ", ".join(names))
    if getattr(config, "modules_to_save", None):
        parts.append("and trained whole: " + ", ".join(config.modules_to_save))
    return ", ".join(parts)


def _quantization_summary(config: Any) -> str:
    """A quantization config in a few words, e.g. `bitsandbytes 4-bit nf4`."""
    options = config if isinstance(config, dict) else config.to_dict()
    method = str(getattr(options.get("quant_method"), "value", options.get("quant_method", "unknown")))
    if options.get("load_in_4bit"):
        double = ", double quantization" if options.get("bnb_4bit_use_double_quant") else ""
        return f"{method} 4-bit {options.get('bnb_4bit_quant_type', '')}{double}"
    return f"{method} 8-bit" if options.get("load_in_8bit") else method
