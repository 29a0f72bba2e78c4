r"""The base of the preference methods, on [`~trl.DPOTrainer`]: the forward pass, the reference, the metrics.

A method declares what it needs beside chosen and rejected and gives one loss a pair:

    class FooTrainer(PreferenceTrainer):
        config_class, method = FooConfig, "foo"
        columns = (Column("label_prob", low=0, high=1),)     # numbers of a row
        branches = (Branch("gold", column="reference"),)     # responses beside chosen and rejected

        def pair_loss(self, batch):                          # shape (B,)
            return -F.logsigmoid(self.beta * batch.margins)

        def branch_terms(self, batch):                       # summands with a normalisation of their own
            gold = batch.branches["gold"]
            yield Term(-gold.logps.sum(), "gold", "token", weight=self.args.foo_alpha)

Without a `pair_loss` of its own it is DPO with TRL's losses (`loss_type`), weights, and the right reference:
https://huggingface.co/papers/2305.18290.
"""

import json
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow.compute as pc
import torch
import torch.nn.functional as F
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
from trl import DPOConfig, DPOTrainer, extract_prompt, is_conversational

from ..checks import (
    check_choice,
    check_collator,
    check_instance,
    check_peft,
    check_preference_dataset,
    check_range,
    check_unused,
    is_blank,
    named_datasets,
    probe_of,
    report_dropped,
)
from ..data.caching import versioned
from ..data.inference import load_tokenizer
from ..data.rows import check_implicit_prompts, first_row
from ..extension import ExtensionConfig
from ..reference import ReferenceTrainer, check_ref_settings
from ..trl_internals import (
    TRL_PAIR_LOSSES,
    FusedCausalLMOutput,
    FusedTap,
    common_prefix_length,
    dpo_compute_loss,
    dpo_construction,
    global_then_local_main_first,
    keep_4bit_trainable_on_cpu,
    preparation_options,
    tokenize,
)
from .collator import BRANCH_KEYS, WEIGHT, Branch, Column, PreferenceCollator, TokenColumn
from .shared_prompt import SharedPrompts, check_shared_prompt


REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
# Options that only TRL's own losses read
_LOSS_OPTIONS = (
    "loss_type", "loss_weights", "f_divergence_type", "f_alpha_divergence_coef", "label_smoothing", "use_weighting",
    "discopop_tau",
)  # fmt: skip
_REFERENCE_OPTIONS = (
    "precompute_ref_log_probs", "precompute_ref_batch_size", "sync_ref_model", "ref_model_mixup_alpha",
    "ref_model_sync_steps",
)  # fmt: skip


@dataclass
class PreferenceConfig(ExtensionConfig, DPOConfig):
    """
    Configuration class for the [`PreferenceTrainer`].

    The options are those of [`~trl.DPOConfig`], and:

    Parameters:
        shared_prompt (`bool`, *optional*, defaults to `False`):
            Whether the prompt of a pair is computed once for all of its responses. Faster where prompts are long; the
            results are the same but for rounding.

    A method's own config subclasses this one.
    """

    shared_prompt: bool = field(
        default=False,
        metadata={"help": "Whether the prompt of a pair is computed once for all of its responses."},
    )
    same_result = (*ExtensionConfig.same_result, "shared_prompt")

    def __post_init__(self):
        check_range("beta", self.beta, 0, low_open=True)
        check_range("label_smoothing", self.label_smoothing, 0, 1)
        if self.ld_alpha is not None:
            check_range("ld_alpha", self.ld_alpha, 0, 1)
        if self.shared_prompt and not self.disable_dropout:
            raise ValueError(
                "`shared_prompt=True` needs `disable_dropout=True`, TRL's default: dropout would be the same in the prompt of "
                "both responses of a pair. Drop one of the two options."
            )
        if self.shared_prompt and self.neftune_noise_alpha is not None:
            raise ValueError(
                "`shared_prompt=True` cannot be combined with `neftune_noise_alpha`, whose noise depends on the length of a "
                "row. Drop one of the two options."
            )
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"`train_sampling_strategy={self.train_sampling_strategy!r}` sorts rows by the length of their one sequence, "
                "and a pair has several. Choose 'random' or 'sequential'."
            )
        self._check_loss_type()
        super().__post_init__()

    def _check_loss_type(self) -> None:
        for loss_type in [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type:
            check_choice("loss_type", loss_type, TRL_PAIR_LOSSES)
        losses = {self.loss_type} if isinstance(self.loss_type, str) else set(self.loss_type)
        if not losses & {"exo_pair", "robust", "aot", "aot_unpaired"}:
            check_unused(
                self,
                ["label_smoothing"],
                f"with `loss_type={sorted(losses)}` (TRL smooths 'robust', 'exo_pair', 'aot')",
            )
        if self.use_weighting and "sft" in losses:
            raise ValueError(
                "`use_weighting=True` cannot be combined with the loss 'sft', which has no pairs. Drop one of the two."
            )
        if "discopop" not in losses:
            check_unused(self, ["discopop_tau"], f"with `loss_type={sorted(losses)}`")
        if self.f_divergence_type != "alpha_divergence":
            check_unused(self, ["f_alpha_divergence_coef"], f"with `f_divergence_type={self.f_divergence_type!r}`")
        if not self.sync_ref_model:
            check_unused(self, ["ref_model_mixup_alpha", "ref_model_sync_steps"], "without `sync_ref_model=True`")

    def _refuse_loss_options(self, *used: str) -> None:
        """Refuse options that only TRL's losses read, but for those that the method uses too."""
        check_unused(self, [name for name in _LOSS_OPTIONS if name not in used], "on this method's loss")

    def _refuse_reference_options(self, *used: str) -> None:
        """Refuse options of a reference model, but for those that the method uses too."""
        check_unused(self, [name for name in _REFERENCE_OPTIONS if name not in used], "without a reference model")


@dataclass
class PairLossConfig(PreferenceConfig):
    """Base of the configs of methods with a `pair_loss` of their own: options that only TRL's losses read are refused."""

    def _check_loss_type(self) -> None:
        # TRL's config makes it a list later
        self._refuse_loss_options(*["loss_type"] if self.loss_type == "sigmoid" else [])
        super()._check_loss_type()


@dataclass(frozen=True)
class Responses:
    """N responses of one kind, scored by the policy (with gradient) and by the reference (without).

    Attributes:
        logps: Log-probability of each response, summed over its tokens, float32, shape (N,). With `ld_alpha`, the tokens
            of a pair beyond its shorter response count `ld_alpha` times, as in TRL; with the trainer's `token_weights`, each
            token as often as its weight says.
        token_logps: Log-probability of each token, 0 outside the response, shape (N, T-1).
        mask: Whether a position predicts a token of the response, shape (N, T-1).
        lengths: Number of tokens, shape (N,).
        ref_logps: As `logps` under the reference; `None` without one.
        ref_token_logps: As `token_logps`, when the reference runs beside the policy (not with stored log-probs).
        entropy: Entropy of each prediction in nats, 0 outside the response, shape (N, T-1).
        is_top1: Whether a token is the likeliest one, shape (N, T-1).
        pair: Index of the pair that each response belongs to, shape (N,).
    """

    logps: torch.Tensor
    token_logps: torch.Tensor
    mask: torch.Tensor
    lengths: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor
    pair: torch.Tensor
    ref_logps: torch.Tensor | None = None
    ref_token_logps: torch.Tensor | None = None

    @property
    def logratios(self) -> torch.Tensor:
        """log pi - log ref, shape (N,); log pi without a reference."""
        return self.logps if self.ref_logps is None else self.logps - self.ref_logps

    @property
    def mean_logps(self) -> torch.Tensor:
        """Mean log-probability per token, shape (N,); 0 for a response without tokens."""
        return self.logps / self.lengths.clamp(min=1)


@dataclass(frozen=True)
class PreferenceBatch:
    """What a loss sees of a batch of B pairs.

    Attributes:
        chosen: The B chosen responses.
        rejected: The B rejected responses.
        branches: Other responses by the name of their branch; a branch that the batch lacks is missing.
        columns: Extra columns by name, each (B,), or (B, T-1) like `token_logps` for a `TokenColumn`; a column that the
            dataset lacks is missing.
    """

    chosen: Responses
    rejected: Responses
    branches: Mapping[str, Responses]
    columns: Mapping[str, torch.Tensor]

    @property
    def margins(self) -> torch.Tensor:
        """Log-ratio of chosen minus log-ratio of rejected, shape (B,)."""
        return self.chosen.logratios - self.rejected.logratios


@dataclass(frozen=True)
class Term:
    """A summand of the loss with a normalisation of its own: `weight * total / count`.

    The count is taken over all micro-batches of the optimizer step and all processes, so that the gradient does not depend
    on how the step was split.

    Attributes:
        total: Sum over the micro-batch, a scalar.
        branch: What is counted: the responses `"chosen"`, `"rejected"` or of a branch, or a `TokenColumn`, whose tokens are
            those with another value than 0; or several of them.
        per: In which unit: `"token"`, `"row"`, or `"batch token"`, the tokens of the micro-batch alone; `"batch"` for a total
            that has been divided by a count of its micro-batch.
        weight: Factor.
    """

    total: torch.Tensor
    branch: str | tuple[str, ...]
    per: str
    weight: float = 1.0


def sequence_logps(token_logps: torch.Tensor, mask: torch.Tensor, ld_alpha: float | None = None) -> torch.Tensor:
    """Sum token log-probabilities, shape (2B, T-1), chosen first, into (2B,).

    With `ld_alpha` (LD-DPO, https://huggingface.co/papers/2409.06411) the tokens beyond the shorter response of a pair are
    multiplied by it.
    """
    if ld_alpha is None:
        return token_logps.sum(1)
    chosen, rejected = mask.sum(1).chunk(2)
    shared = torch.minimum(chosen, rejected).repeat(2)[:, None]
    position = mask.cumsum(1)
    return (token_logps * torch.where(position <= shared, 1.0, ld_alpha)).sum(1)


class _PairTap(FusedTap):
    """Runs all branches in the forward pass of the pairs, keeps its output, and shows TRL's loss the pairs alone."""

    def __init__(
        self,
        model: torch.nn.Module,
        branches: dict[str, dict[str, torch.Tensor]],
        weight: Any,
        token_weights: torch.Tensor | None = None,
        shared_prompts: SharedPrompts | None = None,
    ):
        super().__init__(model)
        self.branches = branches
        self.weight = weight
        self.token_weights = token_weights
        self.shared_prompts = shared_prompts

    def __call__(self, *args, **kwargs):
        if not kwargs.get("fused_lm_head") or self.output is not None:
            return self.model(*args, **kwargs)
        rows, width = kwargs["input_ids"].shape
        if not self.branches:
            self.output = self._run(*args, **kwargs)
            return self._weighted(self.output)
        joint = max(width, *(branch["input_ids"].size(1) for branch in self.branches.values()))
        for key, padding in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
            parts = [kwargs[key], *(branch[key] for branch in self.branches.values())]
            kwargs[key] = torch.cat([F.pad(part, (0, joint - part.size(1)), value=padding) for part in parts])
        # The branches may be wider, on the right (on the left are the virtual tokens of prompt learning)
        excess = joint - width
        self.output = self._run(*args, **kwargs)
        pairs = {
            name: value[:rows, : value.size(1) - excess]
            if isinstance(value, torch.Tensor) and value.dim() == 2
            else value
            for name, value in self.output.items()
        }
        return self._weighted(FusedCausalLMOutput(**pairs))

    def _run(self, *args, **kwargs) -> FusedCausalLMOutput:
        """The forward pass of all rows, or one that computes the prompt of a pair once."""
        if self.shared_prompts is None:
            return self.model(*args, **kwargs)
        others = [branch["pair"] for branch in self.branches.values()]
        own = torch.arange((len(kwargs["input_ids"]) - sum(map(len, others))) // 2)
        pair = torch.cat([own, own, *(other.to(own) for other in others)]).to(kwargs["input_ids"].device)
        return self.shared_prompts.run(self.model, pair, *args, **kwargs)

    def _weighted(self, output: FusedCausalLMOutput) -> FusedCausalLMOutput:
        """The output that TRL sees, whose log-probs it adds up."""
        if self.token_weights is None:
            return output
        weights = self.token_weights.to(output.log_probs.device)
        virtual = output.log_probs.size(1) - weights.size(1)  # tokens of prompt learning
        return FusedCausalLMOutput(**{**output, "log_probs": output.log_probs * F.pad(weights, (virtual, 0))})

    def pair_mean(self, per_sequence_loss: torch.Tensor, loss_type: str) -> torch.Tensor:
        """Mean over the pairs of one of TRL's losses, weighted; called from TRL's loss function."""
        if self.weight is None:
            return per_sequence_loss.mean()
        if loss_type == "sft":  # one mean over the chosen tokens of the batch
            chosen = slice(self.weight.size(0))
            log_probs = self.weight[:, None] * self.output.log_probs[chosen]
            return -log_probs[self.output.label_mask[chosen]].mean()
        return (self.weight * per_sequence_loss).mean()


class PreferenceTrainer(ReferenceTrainer, DPOTrainer):
    """[`~trl.DPOTrainer`] with row weights, extra columns and branches, the right reference, and the library's checks.

    The constructor takes the arguments of [`~trl.DPOTrainer`]. Beside `prompt`, `chosen`, `rejected`, a dataset may have
    `weight` (float >= 0: the loss of a pair is multiplied by it before the mean over the pairs) and `ref_chosen_logps`,
    `ref_rejected_logps` (summed log-probabilities of a reference of your own, used in place of a reference model; see
    [`~trl_ift.reference.ReferenceTrainer`]).

    Attributes:
        columns: Numbers per row that the method reads; declared by subclasses.
        branches: Responses beside chosen and rejected; declared by subclasses.
        scores_branches: Whether a reference that runs beside the policy scores the branches too.
        token_weights: Names of the `TokenColumn`s of chosen and rejected that the log-probabilities of their tokens are
            multiplied by, those of the policy and of the reference, wherever they are summed.
        logit_temperature: What the logits of policy and reference are divided by.
        reads_hidden_states: Whether the method reads hidden states of its own, which `shared_prompt` would rearrange.
    """

    config_class: type = PreferenceConfig
    method = "dpo"
    card_options: tuple[str, ...] = ("loss_type", "beta")
    columns: tuple[Column, ...] = ()
    branches: tuple[Branch, ...] = ()
    ref_columns = REF_COLUMNS
    scores_branches = False
    token_weights: tuple[str, str] | None = None
    logit_temperature = 1.0
    reads_hidden_states = False
    data_collator: Any
    # TRL projects prompt and padding too, on a CPU; the tests of exact equality switch this off
    _labelled_positions_only = True

    _tag_names = ["trl", "trl-ift", "dpo"]  # noqa: RUF012
    _name = "DPO"
    _paper = DPOTrainer._paper

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: PreferenceConfig | None = None,
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
        self._own_datasets: weakref.WeakSet[Any] = weakref.WeakSet()
        self._declare(args)
        name = type(self).__name__
        self._check_source(args, model, processing_class, quantization_config)
        check_peft(peft_config, model, name, prompt_learning=True)
        self._shared_prompts: SharedPrompts | None = None
        if args.shared_prompt:
            if self.reads_hidden_states:
                raise ValueError(
                    f"{name} reads the hidden states of responses, which `shared_prompt=True` arranges in another way. Set "
                    "`shared_prompt=False`."
                )
            check_shared_prompt(args, model, ref_model, peft_config)
            self._shared_prompts = SharedPrompts(rough=args.bf16 or args.fp16)
        if ref_model is not None and not self.uses_reference:
            raise ValueError(f"`ref_model` has no effect: {name} does not compare with a reference model. Drop it.")
        stored = self._check_datasets(args, train_dataset, eval_dataset)
        if stored:
            check_ref_settings(args, named_datasets(train_dataset, eval_dataset), model, processing_class)
        self._check_first_tokens(args, model, processing_class, train_dataset, eval_dataset)
        if isinstance(model, torch.nn.Module):
            check_instance(model, peft_config)
            keep_4bit_trainable_on_cpu(model)

        self._has_default_collator = data_collator is None
        hash_weights = self.uses_reference and not stored
        with (
            self._with_reference(args, model, ref_model, peft_config, stored) as ref_model,
            dpo_construction(
                self._labelled_positions_only, hash_weights=hash_weights, temperature=self.logit_temperature
            ),
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
        self._step_counts: dict[str, dict[str, torch.Tensor]] | None = None
        if self._has_own_loss:
            self.loss_types: list[str] = []  # TRL computes reference and metrics, the loss is ours
            self.loss_weights: list[float] = []
        self._replace_collator()
        if data_collator is not None:
            self._check_collator()

    def _replace_collator(self) -> None:
        """Put ours in the place of TRL's default collator."""
        if self._has_default_collator and not isinstance(self.data_collator, PreferenceCollator):
            options = {
                field: getattr(self.data_collator, field)
                for field in ("pad_token_id", "max_length", "truncation_mode", "pad_to_multiple_of")
            }
            self.data_collator = PreferenceCollator(**options, columns=self._all_columns, branches=self.branches)

    def _check_collator(self) -> None:
        """Refuse a collator that loses what the method reads."""
        keys = {column.name: column.name for column in self._all_columns}
        keys |= {name: name for name in self.ref_columns if self.uses_reference}
        keys |= {branch.rows_column: f"{branch.name}_input_ids" for branch in self.branches}
        check_collator(self.data_collator, self.train_dataset, keys, PreferenceCollator)

    # ---------------------------------------------------------------- what a method overrides

    def _declare(self, args: Any) -> None:
        """Hook: set `branches`, `columns` or `uses_reference` where they depend on the config. Runs before all else."""

    def pair_loss(self, batch: PreferenceBatch) -> torch.Tensor | None:
        """Loss of each pair, shape (B,); weights and the mean over the pairs follow. Here: none, but TRL's `loss_type`."""
        return None

    def branch_terms(self, batch: PreferenceBatch) -> Iterable[Term]:
        """Summands of the loss with a normalisation of their own. Here: none."""
        return ()

    def implicit_rewards(self, batch: PreferenceBatch) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Rewards of chosen and rejected for the metrics `rewards/*`, each (B,); `None` for TRL's beta * log-ratio."""
        return None

    @property
    def _has_own_loss(self) -> bool:
        return type(self).pair_loss is not PreferenceTrainer.pair_loss

    @property
    def _all_columns(self) -> tuple[Column, ...]:
        return (WEIGHT, *self.columns)

    @property
    def _token_columns(self) -> list[TokenColumn]:
        return [column for column in self.columns if isinstance(column, TokenColumn)]

    # ---------------------------------------------------------------- data

    def _check_dataset(self, args: Any, dataset: Any, name: str, stored: bool) -> None:
        columns = [*self._all_columns, *(Column(column, high=1e-3) for column in REF_COLUMNS if self.uses_reference)]
        check_preference_dataset(dataset, name, columns, self.branches)
        super()._check_dataset(args, dataset, name, stored)
        row = first_row(dataset)
        if not {"prompt", "prompt_ids"} & set(row):
            check_implicit_prompts(dataset, name)
        if WEIGHT.name in row and any(loss.startswith("aot") for loss in args.loss_type):
            raise ValueError(
                "The losses 'aot' and 'aot_unpaired' sort the log-ratios of a batch, so that pairs have no losses of their "
                "own: they cannot be combined with the column 'weight'. Drop one of the two."
            )
        if self._is_own(dataset):
            return
        if REF_COLUMNS[0] in row and self.uses_reference and args.ld_alpha is not None:
            raise ValueError(
                f"`ld_alpha` weighs the tokens of a response, and the columns {REF_COLUMNS} of `{name}` are sums over all of "
                "them. Drop one of the two."
            )
        if REF_COLUMNS[0] in row and self.uses_reference and self.token_weights is not None:
            raise ValueError(
                f"{type(self).__name__} weighs the tokens of a response, and the columns {REF_COLUMNS} of `{name}` are sums "
                "over all of them alike. Drop them; `precompute_ref_log_probs=True` stores weighted ones."
            )
        if REF_COLUMNS[0] in row and self.uses_reference and self.logit_temperature != 1:
            raise ValueError(
                f"The columns {REF_COLUMNS} of `{name}` are log-probabilities at the temperature 1, and the policy's logits "
                f"are divided by {self.logit_temperature:g}. Drop them; `precompute_ref_log_probs=True` stores those at "
                "its temperature."
            )

    def _own(self, dataset: Any) -> Any:
        """Note that this trainer has made a dataset; return it."""
        self._own_datasets.add(dataset)
        return dataset

    def _is_own(self, dataset: Any) -> bool:
        """Whether this trainer has made a dataset: what `_own` was told of, such as `trainer.eval_dataset`."""
        return dataset in self._own_datasets

    def _check_first_tokens(self, args: Any, model: Any, processing_class: Any, *datasets: Any) -> None:
        """Raise, before a model is loaded, if a first row has numbers of other tokens than the tokenizer makes."""
        parts = [part for data in datasets for part in (data.values() if isinstance(data, dict) else [data])]
        for row in [first_row(part) for part in parts if part is not None and self._token_columns]:
            columns = [column for column in self._token_columns if column.name in row]
            if columns and "prompt_ids" not in row:
                options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
                tokenizer = load_tokenizer(model, processing_class, options)
                row = row | pair_ids(row, tokenizer, tokenizer.eos_token)
            for column in columns:
                column.check_length(len(row[column.name]), len(row[f"{column.response}_ids"]), "the first row")

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        with self._naming_rows(dataset, dataset_name, processing_class):
            return self._prepared(dataset, processing_class, args, dataset_name)

    def _prepared(self, dataset, processing_class, args, dataset_name):
        probe = probe_of(dataset)
        prepared, kept = self._prepare_rows(probe, processing_class, args, dataset_name)
        if isinstance(dataset, Dataset):
            _check_token_counts(prepared, self._token_columns, dataset_name)
        if not first_row(kept):
            raise ValueError(_NO_ROWS.format(name=dataset_name, max_length=args.max_length))
        if isinstance(dataset, Dataset):
            _report_dropped(probe, prepared, kept, dataset_name, args, self._drop_options(args))
            return kept
        return self._prepare_rows(dataset, processing_class, args, dataset_name)[1]

    def _prepare_rows(self, dataset, processing_class, args, dataset_name):
        """Return the tokenized dataset, and the same without the rows that cannot be trained."""
        prepared = dataset
        if "prompt_ids" not in first_row(dataset):
            options = preparation_options(args)
            prepared = super()._prepare_dataset(dataset, processing_class, options, dataset_name)
        implicit_prompt = "prompt" not in first_row(dataset)
        with global_then_local_main_first():
            for branch in self.branches:
                prepared = self._tokenize_branch(prepared, branch, implicit_prompt, processing_class, args)
            return prepared, prepared.filter(versioned(_trainable, is_blank), fn_kwargs=self._drop_options(args))

    def _drop_options(self, args) -> dict[str, Any]:
        """What `_why_dropped` depends on beside the row."""
        return {
            "branches": [branch.rows_column for branch in self.branches],
            "eos_token": self._tokenizer.eos_token,
            "max_length": args.max_length if args.truncation_mode == "keep_start" else None,
        }

    def _tokenize_branch(self, dataset, branch: Branch, implicit_prompt: bool, processing_class, args):
        row = first_row(dataset)
        if not row or branch.rows_column in row or branch.column is None:
            return dataset
        if f"{branch.column}_ids" in row:  # tokenized by TRL
            return dataset.map(versioned(_rows_from_ids), fn_kwargs={"branch": branch})
        options = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
        return dataset.map(
            versioned(tokenize_response, is_blank),
            fn_kwargs={
                "branch": branch,
                "source": branch.source(row),
                "implicit_prompt": implicit_prompt,
                "processing_class": processing_class,
                "eos_token": self._tokenizer.eos_token,
            },
            **options,
        )

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        own = [*(column.name for column in self._all_columns), *(branch.rows_column for branch in self.branches)]
        self._signature_columns += [name for name in own if name not in self._signature_columns]

    # ---------------------------------------------------------------- reference

    def _ref_logps_options(self) -> list[Any]:
        options = [self.ld_alpha, self.args.max_length, self.args.truncation_mode, self.args.bf16, self.args.fp16]
        options += [self.logit_temperature] if self.logit_temperature != 1 else []
        return options + ([self.token_weights] if self.token_weights is not None else [])

    def _precompute_ref_logps(self, dataset, name, batch_size):
        if self.token_weights is not None:
            self._replace_collator()  # within TRL's constructor: TRL's collator leaves the weights out
            if not self._has_default_collator:
                self._check_collator()  # before sums without the weights are cached
        computed = super()._precompute_ref_logps(dataset, name, batch_size)
        return dataset if computed is dataset else self._own(computed)

    def compute_ref_log_probs(self, model, inputs):
        pairs, extra = self._split(inputs)
        weights = self._weights_of_tokens(extra)
        if not isinstance(model, _PairTap) and (weights is not None or self._shared_prompts is not None):
            model = _PairTap(model, {}, None, weights, self._shared_prompts)
        return super().compute_ref_log_probs(model, pairs)

    # ---------------------------------------------------------------- loss

    def _split(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Split a batch into what TRL knows and what is ours."""
        own = {column.name for column in self._all_columns}
        own |= {f"{branch.name}_{key}" for branch in self.branches for key in BRANCH_KEYS}
        return (
            {key: value for key, value in inputs.items() if key not in own},
            {key: value for key, value in inputs.items() if key in own},
        )

    def _weights_of_tokens(self, extra: dict[str, Any]) -> torch.Tensor | None:
        """Weights of the tokens of the pairs in a batch, (2B, T-1), chosen first; `None` where they are not weighted."""
        if self.token_weights is None or self.token_weights[0] not in extra:
            return None
        return torch.cat([extra[name] for name in self.token_weights])[:, 1:]

    @property
    def _counts_steps(self) -> bool:
        return self._has_own_loss or type(self).branch_terms is not PreferenceTrainer.branch_terms

    def _counts(self, inputs: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
        """Rows and tokens of each kind of response in a batch."""
        chosen, rejected = inputs["completion_mask"].chunk(2)
        masks = {"chosen": chosen, "rejected": rejected}
        for branch in self.branches:
            if f"{branch.name}_completion_mask" in inputs:
                masks[branch.name] = inputs[f"{branch.name}_completion_mask"]
        counts = {
            name: {"row": torch.tensor(mask.size(0), device=mask.device), "token": (mask[:, 1:] != 0).sum()}
            for name, mask in masks.items()
        }
        for column in self._token_columns:
            if column.name in inputs:
                tokens = inputs[column.name][:, 1:] != 0
                counts[column.name] = {"row": tokens.any(1).sum(), "token": tokens.sum()}
        return counts

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in TRL; counts the rows and tokens of the optimizer step that divide the terms of the loss."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._counts_steps and batches:
            counts = [self._counts(batch) for batch in batches]
            names = ["chosen", "rejected", *(b.name for b in self.branches), *(c.name for c in self._token_columns)]
            zero = {"row": torch.zeros(()), "token": torch.zeros(())}
            totals = torch.stack(
                [
                    torch.stack([count.get(name, zero)[per].to(device, torch.long) for count in counts]).sum()
                    for name in names
                    for per in ("row", "token")
                ]
            )
            if self.args.average_tokens_across_devices and self.accelerator.num_processes > 1:
                totals = self.accelerator.gather(totals[None]).sum(0) // self._tp_size
            self._step_counts = {
                name: {"row": totals[2 * i], "token": totals[2 * i + 1]} for i, name in enumerate(names)
            }
        return batches, num_items

    def _value(self, term: Term, inputs: dict[str, Any]) -> torch.Tensor:
        """Value of a term in the loss of a micro-batch, which is averaged over micro-batches and processes later."""
        if term.per == "batch":
            return term.weight * term.total
        names, factor = (term.branch,) if isinstance(term.branch, str) else term.branch, 1
        if term.per != "batch token" and self.model.training and self._step_counts is not None:
            counts = [self._step_counts[name][term.per] for name in names]
            factor = self.current_gradient_accumulation_steps
            if self.args.average_tokens_across_devices:
                factor *= self.accelerator.num_processes // self._tp_size
        else:
            found = self._counts(inputs)
            counts = [found[name][term.per.removeprefix("batch ")] for name in names]
        count = torch.stack(counts).sum()
        return term.weight * term.total * (factor / count.clamp(min=1).to(term.total.device))

    def _compute_loss(self, model, inputs, return_outputs):
        mode = "train" if self.model.training else "eval"
        pairs, extra = self._split(inputs)
        branches = self._branch_inputs(extra)
        token_weights = self._weights_of_tokens(extra)
        ref_token_logps = None
        if not self.uses_reference:
            zeros = torch.zeros(pairs["input_ids"].size(0) // 2, device=pairs["input_ids"].device)
            pairs |= dict.fromkeys(REF_COLUMNS, zeros)
        elif REF_COLUMNS[0] not in pairs and (
            self._has_own_loss or token_weights is not None or self._shared_prompts is not None
        ):
            scored = branches if self.scores_branches else {}
            ref_tap = _PairTap(self.ref_model or self.model, scored, None, token_weights, self._shared_prompts)
            pairs |= zip(REF_COLUMNS, self.compute_ref_log_probs(ref_tap, pairs), strict=True)
            ref_token_logps = ref_tap.output.log_probs

        tap = _PairTap(model, branches, extra.get(WEIGHT.name), token_weights, self._shared_prompts)
        with self._reference_in_batch(REF_COLUMNS[0] in pairs):
            base = dpo_compute_loss(self, tap, pairs, return_outputs)
        loss = base[0] if return_outputs else base
        if self._must_agree():
            means = [self._metrics["train"][f"rewards/{kind}"][-1] for kind in ("chosen", "rejected")]
            num_tokens = (pairs["completion_mask"] != 0).sum() / pairs["input_ids"].size(0)
            self._check_agreement(max(map(abs, means)) / self.beta, num_tokens.item())

        if self._counts_steps:
            batch = self._batch(tap.output, pairs, extra, ref_token_logps)
            if (losses := self.pair_loss(batch)) is not None:
                total = (losses if tap.weight is None else losses * tap.weight).sum()
                loss = loss + self._value(Term(total, "chosen", "row"), inputs)
            for term in self.branch_terms(batch):
                loss = loss + self._value(term, inputs)
            rewards = self.implicit_rewards(batch)
            if rewards is not None:
                self._log_rewards(mode, *rewards)
        if tap.weight is not None:
            self._record_mean("weights/mean", tap.weight.sum(), tap.weight.numel())
        # On every process, though some may have no row of a branch: it gathers
        masks = [mask for branch in self.branches if (mask := extra.get(f"{branch.name}_attention_mask")) is not None]
        if masks and mode == "train":
            tokens = torch.stack([mask.sum() for mask in masks]).sum()
            self._total_train_tokens += int(self.accelerator.gather(tokens).sum()) // self._tp_size
            self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        return (loss, base[1]) if return_outputs else loss

    def _branch_inputs(self, extra: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        """Model inputs of the branches that have rows in this batch."""
        found = {}
        for branch in self.branches:
            ids = extra.get(f"{branch.name}_input_ids")
            if ids is not None and ids.size(0) > 0:
                labels = ids.masked_fill(extra[f"{branch.name}_completion_mask"] == 0, -100)
                mask, pair = (extra[f"{branch.name}_{key}"] for key in ("attention_mask", "pair"))
                found[branch.name] = {"input_ids": ids, "attention_mask": mask, "labels": labels, "pair": pair}
        return found

    def _batch(self, output, pairs, extra, ref_token_logps) -> PreferenceBatch:
        """Sort the rows of the forward pass out."""
        widths = [extra[key].size(1) for b in self.branches if (key := f"{b.name}_input_ids") in extra]
        width = max([pairs["input_ids"].size(1), *widths]) - 1  # without the virtual tokens of prompt learning
        token_logps, mask = output.log_probs[:, -width:], output.label_mask[:, -width:]
        number = pairs["input_ids"].size(0) // 2
        device = token_logps.device

        def responses(start: int, stop: int, logps=None, ref_logps=None, pair=None, ref_token_logps=None) -> Responses:
            rows = slice(start, stop)
            return Responses(
                logps=token_logps[rows].sum(1) if logps is None else logps,
                token_logps=token_logps[rows],
                mask=mask[rows],
                lengths=mask[rows].sum(1),
                entropy=output.entropy[rows, -width:].detach(),
                is_top1=output.is_top1[rows, -width:],
                pair=torch.arange(number, device=device) if pair is None else pair.to(device),
                ref_logps=None if ref_logps is None else ref_logps.to(device),
                ref_token_logps=ref_token_logps,
            )

        summed = token_logps[: 2 * number]
        if (weights := self._weights_of_tokens(extra)) is not None:
            summed = summed * F.pad(weights.to(device), (0, width - weights.size(1)))
        pair_logps = sequence_logps(summed, mask[: 2 * number], self.ld_alpha).chunk(2)
        ref_logps = [pairs.get(name) if self.uses_reference else None for name in REF_COLUMNS]
        ref_tokens = [None, None]
        if ref_token_logps is not None:  # of the pairs alone, which may be narrower, or of all
            own = width if ref_token_logps.size(0) > 2 * number else pairs["input_ids"].size(1) - 1
            ref_token_logps = F.pad(ref_token_logps[:, -own:], (0, width - own))
            ref_tokens = ref_token_logps[: 2 * number].chunk(2)
        chosen, rejected = (
            responses(i * number, (i + 1) * number, pair_logps[i], ref_logps[i], ref_token_logps=ref_tokens[i])
            for i in range(2)
        )
        branches, start = {}, 2 * number
        for branch in self.branches:
            if (pair := extra.get(f"{branch.name}_pair")) is not None:
                stop = start + pair.size(0)
                stored, live = extra.get(f"{branch.name}_ref_logps"), None
                if self.scores_branches and ref_token_logps is not None:
                    live = ref_token_logps[start:stop]
                    stored = live.sum(1)
                branches[branch.name] = responses(start, stop, None, stored, pair, live)
                start = stop
        columns = {c.name: extra[c.name].to(device) for c in self._all_columns if c.name in extra}
        for column in self._token_columns:
            if column.name in columns:  # nothing predicts the first token
                numbers = columns[column.name][:, 1:]
                columns[column.name] = F.pad(numbers, (0, width - numbers.size(1)))
        return PreferenceBatch(chosen, rejected, branches, columns)

    def _log_rewards(self, mode: str, chosen: torch.Tensor, rejected: torch.Tensor) -> None:
        """Put the method's rewards in the place of TRL's."""
        both = self.accelerator.gather(torch.stack([chosen, rejected], 1).detach())
        chosen, rejected = both[:, 0], both[:, 1]
        means = torch.stack([chosen, rejected, chosen - rejected, (chosen > rejected).float()]).mean(1).tolist()
        for name, mean in zip(("chosen", "rejected", "margins", "accuracies"), means, strict=True):
            self._metrics[mode][f"rewards/{name}"][-1] = mean


# ---------------------------------------------------------------- rows

_NO_ROWS = (
    "No row of the {name} dataset can be trained: chosen and rejected are equal or empty in all of them, or their prompts fill "
    "`max_length={max_length}`. Check the columns, or raise `max_length`."
)


def _rows_from_ids(row: dict[str, Any], branch: Branch) -> dict[str, Any]:
    return {branch.rows_column: [{"prompt_ids": row["prompt_ids"], "completion_ids": row[f"{branch.column}_ids"]}]}


def tokenize_response(
    row: dict[str, Any], branch: Branch, source: str, implicit_prompt: bool, processing_class: Any, eos_token: str
) -> dict[str, Any]:
    """Tokenize the response of a branch as TRL tokenizes chosen and rejected."""
    prompt, response = row["prompt"], row[source]
    if implicit_prompt and response:  # every response repeats it
        if response[: len(prompt)] != prompt:
            raise ValueError(
                f"A response in the column '{source}' does not begin with the prompt that chosen and rejected share. Add a "
                "column 'prompt', or let all responses repeat the same prompt."
            )
        response = response[len(prompt) :]
    if is_blank(response):
        return {branch.rows_column: [{"prompt_ids": row["prompt_ids"], "completion_ids": []}]}
    prompt_ids, completion_ids = prompt_and_response_ids(
        row | {"prompt": prompt}, response, processing_class, eos_token
    )
    return {branch.rows_column: [{"prompt_ids": prompt_ids, "completion_ids": completion_ids}]}


def prompt_and_response_ids(
    row: dict[str, Any], response: Any, processing_class: Any, eos_token: str
) -> tuple[list[int], list[int]]:
    """Token ids of the row's prompt and of a response to it, as TRL's preference trainers make them, with the end token."""
    prompt = row["prompt"]
    options: dict[str, Any] = {}
    if is_conversational({"prompt": prompt}):
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        options = {"tools": tools, **(row.get("chat_template_kwargs") or {})}
        prompt_ids = tokenize(processing_class, prompt, add_generation_prompt=True, **options)["input_ids"]
    else:
        prompt_ids = tokenize(processing_class, prompt)["input_ids"]
        response = response if response.endswith(eos_token) else response + eos_token
    ids = tokenize(processing_class, prompt + response, **options)["input_ids"]
    start = common_prefix_length(prompt_ids, ids)
    return ids[:start], ids[start:]


def pair_ids(row: dict[str, Any], processing_class: Any, eos_token: str) -> dict[str, list[int]]:
    """`prompt_ids`, `chosen_ids` and `rejected_ids` of a preference row, as TRL's preference trainers make them."""
    if "prompt" not in row:
        row = row | extract_prompt(row)
    prompt_ids, chosen_ids = prompt_and_response_ids(row, row["chosen"], processing_class, eos_token)
    other_prompt, rejected_ids = prompt_and_response_ids(row, row["rejected"], processing_class, eos_token)
    # Where the end of the prompt changes with what follows, both responses start at the first token that does
    start = min(len(prompt_ids), len(other_prompt))
    return {
        "prompt_ids": prompt_ids[:start],
        "chosen_ids": prompt_ids[start:] + chosen_ids,
        "rejected_ids": other_prompt[start:] + rejected_ids,
    }


def _check_token_counts(dataset: Dataset, columns: list[TokenColumn], name: str) -> None:
    """Raise unless every row of a tokenized dataset has as many numbers as tokens."""
    for column in [column for column in columns if column.name in dataset.column_names]:
        names, start = [column.name, f"{column.response}_ids"], 0
        for table in dataset.select_columns(names).with_format("arrow").iter(1000):
            numbers, tokens = (pc.list_value_length(table[part]).to_numpy() for part in names)
            for row in (numbers != tokens).nonzero()[0][:1]:
                where = f"the {name} dataset, row {start + row} of {len(dataset)}"
                column.check_length(numbers[row], tokens[row], where)
            start += len(tokens)


def _why_dropped(row: dict[str, Any], branches: list[str], eos_token: str, max_length: int | None) -> str | None:
    """Reason why a prepared row cannot be trained, or `None`."""
    if max_length is not None and len(row["prompt_ids"]) >= max_length:  # tokenized before: TRL has not dropped it
        return f"the prompt fills `max_length={max_length}`"
    if row["chosen_ids"] == row["rejected_ids"]:
        return "chosen equals rejected"
    if not row["chosen_ids"] or not row["rejected_ids"]:
        return "chosen or rejected has no tokens"
    if "chosen" in row and is_blank(row["chosen"], eos_token):
        return "chosen is empty"
    if any(name in row and not all(r["completion_ids"] for r in row[name]) for name in branches):
        return "an extra response is empty"
    return None


def _trainable(row: dict[str, Any], **options: Any) -> bool:
    return _why_dropped(row, **options) is None


def _report_dropped(
    raw: Dataset, prepared: Dataset, kept: Dataset, name: str, args: Any, options: dict[str, Any]
) -> None:
    too_long = f"the prompt fills `max_length={args.max_length}`"
    reasons = +Counter({too_long: len(raw) - len(prepared)})  # without zeros
    if len(kept) < len(prepared):
        reasons.update(reason for row in prepared if (reason := _why_dropped(row, **options)))
    report_dropped(reasons, len(raw), name)
