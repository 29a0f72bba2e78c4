"""What every trainer of the library adds to the TRL trainer it extends.

Checks before the model loads, the guard of 4-bit weights on CPU, resuming that continues the token count, protection of
earlier results, the model card, and pushes without pickles.
"""

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from .checks import check_model_source, check_output_dir, check_quantization, resolve_checkpoint
from .trl_internals import get_config_model_id


_STATE_FILE = "trl_ift_state.json"


@dataclass
class ExtensionConfig:
    """Options shared by the configs of all methods.

    Parameters:
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Whether training may write over the weights and checkpoints of another run in `output_dir`.
        hub_base_model (`str`, *optional*):
            Hub id of the base model, printed in the model card when the model was loaded from a local folder.
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
            "help": "Hub id of the base model, printed in the model card when the model was loaded from a local folder."
        },
    )


class ExtensionTrainer:
    """Mixin for subclasses of TRL trainers; stands before the TRL class in the bases.

    Attributes:
        config_class: Config that the trainer takes; a foreign one is refused.
        method: Name of the method in the registry.
    """

    config_class: type
    method: str

    @classmethod
    def _own_config(cls, args: Any, model: Any) -> Any:
        """Return `args`, or the default config for `args=None`; refuse any other class."""
        if args is None:
            source = model if isinstance(model, str) else get_config_model_id(model.config)
            return cls.config_class(f"{source.split('/')[-1] or 'model'}-{cls._name}")  # type: ignore[attr-defined]
        if not isinstance(args, cls.config_class):
            raise TypeError(
                f"`args` is a `{type(args).__name__}`, but {cls.__name__} needs a `{cls.config_class.__name__}`: it holds the "
                f"options of the method. Replace `{type(args).__name__}(...)` by `{cls.config_class.__name__}(...)`; every "
                "option of the former is valid there."
            )
        return args

    @staticmethod
    def _check_source(model: Any, processing_class: Any, quantization_config: Any) -> None:
        check_model_source(model, processing_class)
        if quantization_config is not None:
            check_quantization(quantization_config)

    # ---------------------------------------------------------------- training and resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As in TRL. Refuses to write over another run (`overwrite_output_dir`) and to resume a broken checkpoint."""
        checkpoint = resolve_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if not getattr(self, "_owns_output_dir", False):
            check_output_dir(self.args, checkpoint)
            if self.args.overwrite_output_dir and checkpoint is None:
                self._remove_checkpoints()
            self._owns_output_dir = True
        if checkpoint is not None:
            self._load_extension_state(Path(checkpoint))
        return super().train(checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _remove_checkpoints(self) -> None:
        # Left behind, they would be picked up by a later `resume_from_checkpoint=True` of this run
        if self.is_world_process_zero():
            for path in Path(self.args.output_dir).glob("checkpoint-*"):
                if path.is_dir() and path.name.removeprefix("checkpoint-").isdigit():
                    shutil.rmtree(path)

    def _extension_state(self) -> dict[str, Any]:
        """State beyond the Trainer's that a resumed run needs, as JSON; extended by methods that keep any."""
        return {"num_tokens": self._total_train_tokens}

    def _load_extension_state(self, checkpoint: Path) -> None:
        path = checkpoint / _STATE_FILE
        if path.is_file():  # absent when the checkpoint was written by another trainer, e.g. `trl.SFTTrainer`
            self._total_train_tokens = json.loads(path.read_text())["num_tokens"]

    def _save_checkpoint(self, model, trial):
        checkpoint = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            checkpoint.mkdir(parents=True, exist_ok=True)
            # A stale marker of completeness must not vouch for files that are about to be written anew
            (checkpoint / "trainer_state.json").unlink(missing_ok=True)
            (checkpoint / _STATE_FILE).write_text(json.dumps(self._extension_state()))
        super()._save_checkpoint(model, trial)  # type: ignore[misc]

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
        result = EvalResult(
            task_type="text-generation",
            dataset_type=re.sub(r"[^\w./-]+", "-", dataset),
            dataset_name=dataset,
            dataset_split=split,
            metric_type=metric,
            metric_name=metric_name or metric,
            metric_value=value,
        )
        results = self.__dict__.setdefault("_eval_results", {})
        results[(metric, dataset, split)] = result

    def _logged_eval_results(self) -> dict[str, float]:
        """Loss metrics of the last evaluation during training."""
        for entry in reversed(self.state.log_history):
            found = {key: entry[key] for key in ("eval_loss", "eval_sft_loss") if key in entry}
            if found:
                return found
        return {}

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
        super().create_model_card(model_name, self._dataset_name, tags)
