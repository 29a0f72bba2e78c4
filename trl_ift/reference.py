"""The reference that a policy is compared with: where its log-probabilities come from, and that it is the right one.

They stand in the dataset (stored), are computed before training, or by a model that runs beside the policy.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model, parse_flag_from_env
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from safetensors.torch import load_model, save_model
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from .checks import named_datasets
from .data.fingerprint import differs_from_source
from .data.inference import load_tokenizer, tokenizer_digest
from .data.rows import first_row
from .extension import ExtensionTrainer
from .hub.card import library_versions
from .trl_internals import NoReference, forget_fused_head, get_config_model_id, share_cache_folder


# Largest mean log-ratio, in nats a token, of a policy that has not been trained: rounding
REFERENCE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
# Column that says what stored log-probabilities were computed with, as JSON: it goes wherever the rows go
REF_SETTINGS = "ref_settings"
# In a folder of its own: pushes copy the weights that lie beside it
_REFERENCE_FILE = Path("reference", "model.safetensors")

logger = logging.get_logger(__name__)


class ReferenceTrainer(ExtensionTrainer):
    """Mixin for subclasses of [`~trl.DPOTrainer`] and [`~trl.KTOTrainer`]; stands before the TRL class in the bases.

    A model that is passed in memory is its own reference, as it is: TRL would load `model.config._name_or_path` again,
    which is another model once this one has been trained.

    Attributes:
        ref_columns: TRL's columns of log-probabilities under the reference; a dataset may bring them.
        uses_reference: Whether the loss reads reference log-probabilities.
        stores_reference: Whether they are always computed before training, so that no reference model is kept.
    """

    ref_columns: tuple[str, ...]
    uses_reference = True
    stores_reference = False
    precompute_ref_logps: bool
    _precompute_model_hash: Any
    _stored_reference: bool
    _reference_is_start: bool
    _reference_is_gone = False
    _reference_checked = False

    @property
    def _ref_words(self) -> tuple[str, str, str]:
        """What messages call the columns: a name, "it", "it was"."""
        if len(self.ref_columns) == 1:
            return f"column {self.ref_columns[0]!r}", "it", "it was"
        return f"columns {self.ref_columns}", "them", "they were"

    # ---------------------------------------------------------------- construction

    def _check_datasets(self, args: Any, train_dataset: Any, eval_dataset: Any) -> bool:
        """Check all datasets; return whether they bring reference log-probabilities."""
        named = named_datasets(train_dataset, eval_dataset)
        columns, them, _ = self._ref_words
        stored = self.uses_reference and self._has_reference(train_dataset)
        if stored and args.sync_ref_model:
            raise ValueError(
                f"`sync_ref_model=True` moves the reference during training, and the {columns} hold log-probabilities of one "
                f"that stays. Drop {them}, or the option."
            )
        for name, dataset in named.items():
            self._check_dataset(args, dataset, name, stored)
            if args.precompute_ref_log_probs and not stored and isinstance(dataset, IterableDataset):
                raise ValueError(
                    f"`precompute_ref_log_probs=True` is not supported with IterableDataset, and `{name}` is one. Pass a "
                    f"`Dataset`, add the {columns}, or set `precompute_ref_log_probs=False`."
                )
            if self.uses_reference and not stored and self._has_reference(dataset):
                raise ValueError(
                    f"`{name}` has the {columns} and `train_dataset` lacks {them}, so that the two would be compared with "
                    f"different references. Add {them} there, or drop {them} here."
                )
        return stored

    def _has_reference(self, dataset: Any) -> bool:
        """Whether the rows of a dataset, prepared or not, bring reference log-probabilities."""
        return self.ref_columns[0] in first_row(dataset)

    def _check_dataset(self, args: Any, dataset: Any, name: str, stored: bool) -> None:
        """Check one dataset that is not empty; extended by subclasses."""
        if stored and not self._has_reference(dataset):
            columns, them, _ = self._ref_words
            raise ValueError(
                f"`{name}` lacks the {columns} that `train_dataset` has. Add {them}, or drop {them} there so that the trainer "
                f"computes {them}."
            )

    @contextmanager
    def _with_reference(self, args: Any, model: Any, ref_model: Any, peft_config: Any, stored: bool) -> Iterator[Any]:
        """While TRL's constructor runs: settles where the reference comes from. Yields the `ref_model` to pass to it."""
        if stored and ref_model is not None:
            raise ValueError(
                f"The dataset holds reference log-probabilities ({', '.join(self.ref_columns)}) and a `ref_model` was passed. "
                "Drop one of the two."
            )
        self._stored_reference = stored
        # With these TRL keeps no reference model, and asks `_precompute_ref_logps` for the values
        without_model = args.precompute_ref_log_probs or self.stores_reference or stored or not self.uses_reference
        # Virtual tokens are no neutral start: with new ones the reference is the model without them
        new_prompt = getattr(peft_config, "is_prompt_learning", False)
        self._reference_is_start = self.uses_reference and not stored and ref_model is None and not new_prompt
        # Under FSDP, TRL runs a reference beside the unsharded policy for them, which it would load, needed or not
        passing = ref_model is None and without_model and under_fsdp(args)
        if passing and (stored or not self.uses_reference) and peft_config is None and not is_peft_model(model):
            ref_model = NoReference()
        elif ref_model is None and (passing or not without_model) and not isinstance(model, str):
            ref_model = reference_copy(model, args, peft_config)
        asked_for, args.precompute_ref_log_probs = args.precompute_ref_log_probs, without_model
        try:
            yield ref_model
        finally:
            args.precompute_ref_log_probs = asked_for
        if passing:
            self.ref_model = None
        self.precompute_ref_logps = without_model and self.uses_reference
        no_adapter = stored or self.stores_reference or not self.uses_reference
        if no_adapter and "ref" in getattr(self.model, "peft_config", {}):
            self.model.delete_adapter("ref")  # TRL's copy of an existing adapter, which is not needed any more
            self._reference_is_gone = self.uses_reference

    # ---------------------------------------------------------------- log-probabilities

    def _ref_logps_options(self) -> list[Any]:
        """Hook: all that they depend on beside the weights, their dtype and device, and the data."""
        return [self.args.max_length, self.args.bf16, self.args.fp16]

    def _precompute_ref_logps(self, dataset, name, batch_size):
        if not self.uses_reference or set(self.ref_columns) <= set(first_row(dataset)):
            return dataset
        if self._stored_reference:
            columns, them, they_were = self._ref_words
            raise ValueError(
                f"The {name} dataset lacks the {columns}, and the reference that {they_were} computed with for the training "
                f"data is not known. Add {them}."
            )
        if self._reference_is_gone:
            raise ValueError(
                f"Cannot compute reference log-probs for the {name} dataset: the adapter that training started from is no "
                "longer in memory. Provide the dataset as `eval_dataset` to the constructor."
            )
        saved, training = self._precompute_model_hash, self.model.training
        settings = (str(self.model.dtype), self.args.device.type, library_versions())
        self._precompute_model_hash = Hasher.hash((saved, self._ref_logps_options(), *settings))
        self.model.eval()
        if self.accelerator.num_processes > 1 and isinstance(dataset, Dataset):
            share_cache_folder(dataset)
        try:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self._precompute_model_hash = saved
            self.model.train(training)

    @contextmanager
    def _reference_in_batch(self, in_batch: bool) -> Iterator[None]:
        """While TRL's code runs: whether it finds the reference log-probs in the batch."""
        saved, self.precompute_ref_logps = self.precompute_ref_logps, in_batch
        try:
            yield
        finally:
            self.precompute_ref_logps = saved

    def _must_agree(self) -> bool:
        """Whether the policy is still its own reference; asked at each step, and true at the first one at most."""
        if self._reference_checked or not self.model.training:
            return False
        self._reference_checked = True
        return self._reference_is_start and self.state.global_step == 0

    def _check_agreement(self, drift: float, num_tokens: float) -> None:
        """Raise if the untrained policy does not agree with its reference.

        Args:
            drift: Mean difference of their log-probabilities, in nats a response.
            num_tokens: Mean length of the responses.
        """
        args = self.args
        options = self.model.config.get_text_config().to_dict().items()
        # TRL switches modules of dropout off, not the dropout of attention that a config asks for
        noisy = [name for name, value in options if ("dropout" in name or "jitter" in name) and value]
        if noisy or not args.disable_dropout or args.neftune_noise_alpha is not None:
            return
        half = args.bf16 or args.fp16
        tolerance = REFERENCE_TOLERANCE.get(self.model.dtype if not half else torch.bfloat16, 0.05)
        if not drift <= tolerance * max(1.0, num_tokens):  # NaN too
            raise ValueError(
                f"The reference is not the model that is being trained: before the first step their log-probabilities differ "
                f"by {drift:.3g} nats a response on average, expected 0. (An adapter whose initialisation changes the base "
                "model, a reference loaded from another place.) Pass the reference you mean as `ref_model`, or as the "
                f"{self._ref_words[0]}."
            )

    # ---------------------------------------------------------------- a reference that moves

    @property
    def _reference_is_in_parts(self) -> bool:
        return self.is_fsdp_enabled or (
            self.args.deepspeed_plugin is not None and self.args.deepspeed_plugin.zero_stage == 3
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As in [`ExtensionTrainer`]; warns of checkpoints that lack a reference that moves."""
        saves = self.args.save_strategy != SaveStrategy.NO and not self.args.save_only_model
        if self.args.sync_ref_model and self._reference_is_in_parts and saves:
            logger.warning_once(
                "The checkpoints of this run cannot be resumed: with `sync_ref_model=True` the reference moves, and FSDP and "
                "ZeRO-3 keep it in parts, which are not saved. Train without them, or with `sync_ref_model=False`, where a run "
                "may be interrupted."
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_extension_state(self, checkpoint: Path, state: dict[str, Any]) -> None:
        super()._save_extension_state(checkpoint, state)
        if self.args.sync_ref_model and not self.args.save_only_model and not self._reference_is_in_parts:
            path = checkpoint / _REFERENCE_FILE
            path.parent.mkdir(exist_ok=True)
            save_model(self.accelerator.unwrap_model(self.ref_model), str(path))

    def _load_extension_state(self, checkpoint: Path) -> None:
        super()._load_extension_state(checkpoint)
        if not self.args.sync_ref_model:
            return
        path = checkpoint / _REFERENCE_FILE
        if self._reference_is_in_parts or not path.is_file():
            raise ValueError(
                f"A run with `sync_ref_model=True` cannot be resumed without its reference, which has moved since the start: "
                f"`{path}` is missing, or cannot be loaded. (FSDP and ZeRO-3 keep it in parts.) Train from the start, or pass "
                "the reference as `ref_model` to a new run."
            )
        load_model(self.accelerator.unwrap_model(self.ref_model), str(path), device=str(self.args.device))

    # ---------------------------------------------------------------- evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """As in TRL, with the checks of the constructor; datasets may bring reference log-probabilities."""
        stored = False
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            named = eval_dataset if isinstance(eval_dataset, dict) else {metric_key_prefix: eval_dataset}
            for name, dataset in named.items():
                self._check_dataset(self.args, dataset, f"{name} dataset", self._stored_reference)
            stored = all(self._has_reference(dataset) for dataset in named.values())
            known = {"train_dataset": self.train_dataset} if self._stored_reference else {}
            named = known | {f"{name} dataset": data for name, data in named.items()}
            check_ref_settings(self.args, named, self.model, self.processing_class)
        with self._reference_in_batch(self.precompute_ref_logps and not stored):  # TRL has none to compute
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        """As in transformers; the dataset is prepared as `evaluate` prepares it."""
        self._check_dataset(self.args, test_dataset, "test_dataset", self._stored_reference)
        known = {"train_dataset": self.train_dataset} if self._stored_reference else {}
        check_ref_settings(self.args, known | {"test_dataset": test_dataset}, self.model, self.processing_class)
        test_dataset = self._prepare_dataset(test_dataset, self.processing_class, self.args, metric_key_prefix)
        if self.precompute_ref_logps and self.ref_columns[0] not in first_row(test_dataset):
            if self.ref_model is None and not is_peft_model(self.model) and self.state.global_step > 0:
                raise ValueError(
                    "Cannot compute reference log-probs for a dataset passed to `predict()` after training has started: "
                    f"the reference is no longer in memory. Provide it as `eval_dataset`, or add the {self._ref_words[0]}."
                )
            batch_size = self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size
            test_dataset = self._precompute_ref_logps(test_dataset, metric_key_prefix, batch_size)
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)


def check_ref_settings(args: Any, datasets: Mapping[str, Any], model: Any, processing_class: Any) -> None:
    """Raise if stored log-probabilities are sums over other tokens than those of the training, or of several references.

    Those without a column `ref_settings`, which `store_references` writes, are a user's own and are not looked at.

    Args:
        args: Config of the trainer.
        datasets: The datasets by the name that messages call them.
        model: The model, or its name: its tokenizer is used where there is no `processing_class`.
        processing_class: Tokenizer of the training.

    Raises:
        ValueError: They do not belong to this training.
    """
    expected: dict[str, Any] = {}
    references: dict[str, str] = {}
    for name, dataset in datasets.items():
        first = first_row(dataset)
        if REF_SETTINGS not in first:
            continue
        if not expected:
            expected["max_length"] = args.max_length
            if args.max_length is not None:
                expected["truncation_mode"] = getattr(args, "truncation_mode", "keep_start")
            options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
            expected["tokenizer"] = tokenizer_digest(load_tokenizer(model, processing_class, options))
        texts = dataset.unique(REF_SETTINGS) if isinstance(dataset, Dataset) else [first[REF_SETTINGS]]
        for text in texts:
            found = _settings_of(text, name)
            references.setdefault(found["reference"], name)
            differing = [key for key, value in expected.items() if found.get(key) != value]
            if "tokenizer" in differing:
                raise ValueError(
                    f"The reference log-probabilities of `{name}` are those of another tokenizer or chat template than this "
                    f"training's ({found.get('tokenizer')}, here {expected['tokenizer']}), so that they are sums over other "
                    "tokens. Store them again with this tokenizer (`trl-ift references`)."
                )
            if differing:
                were = ", ".join(f"`{key}={found.get(key)!r}` (here {expected[key]!r})" for key in differing)
                raise ValueError(
                    f"The reference log-probabilities of `{name}` were stored with {were}, so that they are sums over other "
                    "tokens where a response is cut. Train with the same, or store them again (`trl-ift references`)."
                )
    if len(references) > 1:
        raise ValueError(
            f"The stored log-probabilities are those of {len(references)} different references ({', '.join(references)}; in "
            f"{', '.join(dict.fromkeys(references.values()))}). Store all of them with one (`trl-ift references`)."
        )


def _settings_of(text: Any, name: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (TypeError, ValueError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("reference"), str):
        raise ValueError(
            f"`{name}`: the column '{REF_SETTINGS}' holds {text!r:.60}, which `store_references` did not write. Drop the "
            "column to vouch for the log-probabilities yourself, or store them again."
        )
    return found


def under_fsdp(args: Any) -> bool:
    """Whether the weights are going to be sharded by FSDP, as the config of the trainer or of accelerate says."""
    return args.fsdp_plugin_args is not None or parse_flag_from_env("ACCELERATE_USE_FSDP")


def reference_copy(model: torch.nn.Module, args: Any, peft_config: Any) -> torch.nn.Module | None:
    """A copy of a model in memory as its own reference; `None` where TRL needs none, or has to load it (ZeRO-3)."""
    if is_peft_model(model) or peft_config is not None:
        return None
    if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        return None
    reference = copy.deepcopy(model)
    forget_fused_head(reference)
    source = get_config_model_id(model.config)
    if source and differs_from_source(model, source):
        logger.warning(
            f"`model` has other weights than `{source}`, from which it was loaded. The reference is a copy of the model as it "
            "was passed; `trl.DPOTrainer` would compare it with the weights of that source."
        )
    return reference.requires_grad_(False).eval()
