"""The iterations of SPIN and LD-Align: generate, pair, encode, weigh, train, and again from the trained model.

self_play   runs them, in a folder that outlives any interruption; `trl-ift spin` and `trl-ift ld-align` on the command line

`output_dir` grows by a folder an iteration, and holds the last model itself:

    self_play.json                    what the run is made with
    guide/, real_codes/               LD-Align: the guiding model and the codes of the real answers
    iteration-0/stages.json           the stages that are finished, with their counts and figures
    iteration-0/completions/          answers of the policy at the start of the iteration
    iteration-0/pairs.parquet         these against the real ones; with distances and weights as weighted.parquet
    iteration-0/model/                the policy at its end, with the checkpoints
    iteration-1/ ...
"""

import hashlib
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from copy import copy, deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets, load_dataset
from huggingface_hub import HfApi
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedTokenizerBase, set_seed
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import IntervalStrategy

from .checks import check_choice, check_model_source, check_peft, check_quantization, check_range
from .data.generation import Settings as GenerationSettings
from .data.generation import generate_completions
from .data.inference import check_model, load_model, load_tokenizer, own_device, tokenizer_digest
from .data.pairs import NoPairsError, count_pairs, describe_dropped, describe_endless, first_turns
from .data.rows import head
from .data.shards import remove_scratch_files, wait_until, write_file
from .latent.encoders import Encoder, text_of
from .latent.weights import DISTANCES
from .preference.ld_align import LDAlignConfig, LDAlignTrainer
from .preference.spin import SPINConfig, SPINTrainer
from .stages import (
    as_json,
    claim,
    free_memory,
    is_main_process,
    last_checkpoint,
    say,
    train_and_save,
    training_settings,
)


STATE_FILE = "self_play.json"
_STAGES_FILE = "stages.json"
_FORMAT = 1


@dataclass
class SelfPlayConfig:
    """
    Options of the iterations of [`self_play`].

    Parameters:
        num_iterations (`int`, *optional*):
            Number of iterations; 4 for SPIN, as its authors, and 1 for LD-Align (our choice) if not given. A finished run goes
            on when it is raised, and refuses a lower one.
        keep_previous_pairs (`int`, *optional*):
            Number of earlier iterations whose pairs are trained again; 1 for SPIN, as its authors, and 0 for LD-Align (our
            choice) if not given. Weights are normalised over all pairs of an iteration.
        beta_schedule (`list[float]`, *optional*):
            `beta` of each iteration; the last one goes on. SPIN's authors: 0.1, 0.1, 0.1, 5.0. Those of iterations to come may
            change when a run goes on.
        learning_rate_schedule (`list[float]`, *optional*):
            `learning_rate` of each iteration, likewise. SPIN's authors: 5e-7, 5e-7, 1e-7, 1e-7.
        initial_adapter (`str`, *optional*):
            Hub id or folder of an adapter that the policy starts with, which is trained on. Excludes a new one.
        max_rows (`int`, *optional*):
            Take the first rows of the dataset only.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Most tokens of a generated answer.
        max_prompt_length (`int`, *optional*):
            Rows with prompts of more tokens are left out. SPIN's authors: 512.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the generation; `0` is greedy.
        top_p (`float`, *optional*, defaults to `1.0`):
            Probability mass that is sampled from.
        drop_truncated (`bool`, *optional*, defaults to `False`):
            Whether generated answers that were cut at `max_new_tokens` are left out.
        generation_dtype (`str`, *optional*):
            Dtype of the model that generates. Bfloat16 by default if the training runs in it, else that of the model.
        generation_batch_tokens (`int`, *optional*, defaults to `16384`):
            Most tokens of a batch of the generation.
        shard_size (`int`, *optional*, defaults to `256`):
            Prompts of a shard of the generation.
    """

    num_iterations: int | None = field(
        default=None, metadata={"help": "Number of iterations. Default: 4 for SPIN, 1 for LD-Align (our choice)."}
    )
    keep_previous_pairs: int | None = field(
        default=None,
        metadata={
            "help": "Earlier iterations whose pairs are trained again. Default: 1 for SPIN, 0 for LD-Align (our choice)."
        },
    )
    beta_schedule: list[float] | None = field(
        default=None, metadata={"help": "`beta` of each iteration; the last one goes on."}
    )
    learning_rate_schedule: list[float] | None = field(
        default=None, metadata={"help": "`learning_rate` of each iteration; the last one goes on."}
    )
    initial_adapter: str | None = field(
        default=None, metadata={"help": "Hub id or folder of an adapter that the policy starts with."}
    )
    max_rows: int | None = field(default=None, metadata={"help": "Take the first rows of the dataset only."})
    max_new_tokens: int = field(default=256, metadata={"help": "Most tokens of a generated answer."})
    max_prompt_length: int | None = field(default=None, metadata={"help": "Leave out prompts of more tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the generation; 0 is greedy."})
    top_p: float = field(default=1.0, metadata={"help": "Probability mass that is sampled from."})
    drop_truncated: bool = field(
        default=False, metadata={"help": "Whether generated answers that were cut are left out."}
    )
    generation_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Dtype of the model that generates. Default: bfloat16 if the training runs in it, else the model's.",
            "choices": ["bfloat16", "float16", "float32"],
        },
    )
    generation_batch_tokens: int = field(default=16384, metadata={"help": "Most tokens of a batch of the generation."})
    shard_size: int = field(default=256, metadata={"help": "Prompts of a shard of the generation."})

    def __post_init__(self):
        if self.num_iterations is not None:
            check_range("num_iterations", self.num_iterations, 1, integer=True)
        if self.keep_previous_pairs is not None:
            check_range("keep_previous_pairs", self.keep_previous_pairs, 0, integer=True)
        if self.max_rows is not None:
            check_range("max_rows", self.max_rows, 1, integer=True)
        for name in ("beta_schedule", "learning_rate_schedule"):
            values = getattr(self, name)
            if values is None:
                continue
            if not values:
                raise ValueError(
                    f"`{name}=[]`: expected a value for each iteration, at least one. Drop it, or give some."
                )
            for value in values:
                check_range(name, value, 0, low_open=True)
        if self.generation_dtype is not None:
            check_choice("generation_dtype", self.generation_dtype, ("bfloat16", "float16", "float32"))
        if self.initial_adapter is not None:
            self.initial_adapter = os.path.expanduser(self.initial_adapter)
        self._generation(0)  # checks the rest

    def _generation(self, seed: int) -> GenerationSettings:
        return GenerationSettings(
            num_completions=1,
            max_new_tokens=self.max_new_tokens,
            max_prompt_length=self.max_prompt_length,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=0,
            repetition_penalty=1.0,
            batch_tokens=self.generation_batch_tokens,
            shard_size=self.shard_size,
            seed=seed,
            backend="transformers",
            score=False,
        )


@dataclass
class LatentConfig:
    """
    Where the latent distances of LD-Align come from. All of it is our choice, but that a guiding model learns the latent
    space by reconstruction.

    Without any option a guide is trained on the real answers and those of the first iteration, from the model that is trained.

    Parameters:
        guide (`str`, *optional*):
            Folder or Hub id of a guiding model, as `trl-ift guide` writes it.
        sentence_encoder (`str`, *optional*):
            Hub id or folder of a sentence encoder to use in place of a guide.
        policy_hidden_state (`bool`, *optional*, defaults to `False`):
            Whether the mean last hidden states of the initial model are used in place of a guide.
        guide_encoder (`str`, *optional*):
            Hub id or folder of the model that the guide's encoder starts from; the initial model by default. A small one does.
        guide_decoder (`str`, *optional*):
            That of its decoder; the initial model by default.
        guide_options (`dict` or `str`, *optional*):
            Options of [`~trl_ift.latent.GuideTrainingArguments`], as a dictionary or as JSON.
        distance (`str`, *optional*, defaults to `"l2"`):
            `"l2"`, `"sq_l2"` or `"cosine"`.
    """

    guide: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a guiding model (`trl-ift guide`)."}
    )
    sentence_encoder: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a sentence encoder to use in place of a guide."}
    )
    policy_hidden_state: bool = field(
        default=False,
        metadata={"help": "Whether mean hidden states of the initial model are used in place of a guide."},
    )
    guide_encoder: str | None = field(
        default=None, metadata={"help": "What the guide's encoder starts from (our choice: the initial model)."}
    )
    guide_decoder: str | None = field(
        default=None, metadata={"help": "What the guide's decoder starts from (our choice: the initial model)."}
    )
    guide_options: dict | str | None = field(
        default=None, metadata={"help": "Options of `trl-ift guide` (our choices) as JSON: '{\"latent_dim\": 64}'."}
    )
    distance: str = field(default="l2", metadata={"help": "Latent distance (our choice).", "choices": list(DISTANCES)})

    def __post_init__(self):
        check_choice("distance", self.distance, DISTANCES)
        for name in ("guide", "sentence_encoder", "guide_encoder", "guide_decoder"):
            if (source := getattr(self, name)) is not None:
                setattr(self, name, os.path.expanduser(source))
        if isinstance(self.guide_options, str):
            try:
                self.guide_options = json.loads(self.guide_options)
            except ValueError as error:
                raise ValueError(f"`guide_options={self.guide_options!r}` is no JSON: {error}.") from None
        if self.guide_options is not None and not isinstance(self.guide_options, dict):
            raise ValueError(f"`guide_options={self.guide_options!r}`: expected a dictionary of options.")
        given = [name for name in ("guide", "sentence_encoder", "policy_hidden_state") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"`{given[0]}` and `{given[1]}` exclude each other: distances come from one encoder.")
        training = [name for name in ("guide_encoder", "guide_decoder", "guide_options") if getattr(self, name)]
        if given and training:
            raise ValueError(
                f"`{training[0]}` has no effect with `{given[0]}`: no guide is trained. Drop one of the two."
            )

    @property
    def trains_guide(self) -> bool:
        """Whether a guide is trained."""
        return not (self.guide or self.sentence_encoder or self.policy_hidden_state)


def self_play(
    model: str,
    args: SPINConfig,
    train_dataset: Dataset,
    eval_dataset: Dataset | None = None,
    *,
    config: SelfPlayConfig | None = None,
    latent: LatentConfig | Encoder | None = None,
    distance: str | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    peft_config: PeftConfig | None = None,
) -> list[dict[str, Any]]:
    """
    Run the iterations of SPIN, or of LD-Align if `args` is an [`LDAlignConfig`].

    In each the policy answers all prompts, its answers are paired with the real ones, and it is trained to tell them apart.
    The reference is the policy as it was, and its log-probabilities are computed beforehand. With a `peft_config` one adapter
    is trained through all iterations. A run that was interrupted, in any way, goes on when it is called again with the same
    arguments: it costs at most the shard or the steps since the last checkpoint (`save_steps`) that it was at. A run that was
    finished goes on with a higher `num_iterations`. The number of processes may change, but not within a training.

    Args:
        model (`str`):
            Hub id or folder of the model to start from, best one that was fine-tuned on the data.
        args ([`SPINConfig`] or [`LDAlignConfig`]):
            Options of the training of each iteration. `output_dir` is the folder of the run.
        train_dataset ([`~datasets.Dataset`]):
            SFT data: `prompt` and `completion`, strings or messages, or `messages`.
        eval_dataset ([`~datasets.Dataset`], *optional*):
            SFT data to evaluate on, likewise; answered anew in each iteration.
        config ([`SelfPlayConfig`], *optional*):
            Options of the iterations.
        latent ([`LatentConfig`] or [`~trl_ift.latent.Encoder`], *optional*):
            Where the distances of LD-Align come from.
        distance (`str`, *optional*):
            `"l2"`, the default, `"sq_l2"` or `"cosine"`, of an encoder that is passed; a [`LatentConfig`] names its own.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer; the model's by default.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization of the model.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to train.

    Returns:
        A summary of each iteration: numbers of pairs, dropped and cut answers, the spread of the weights, and the last figures
        of the training.

    Raises:
        ValueError, TypeError, ImportError, OSError: Something in the input is wrong, or `output_dir` holds another run.
        RuntimeError: A training failed, or saved no weights.
    """
    run = _SelfPlay(
        model, args, train_dataset, eval_dataset, config or SelfPlayConfig(), latent, distance, processing_class,
        quantization_config, peft_config,
    )  # fmt: skip
    return run()


class _SelfPlay:
    """One run: its checks, and its stages."""

    def __init__(
        self,
        model,
        args,
        train_dataset,
        eval_dataset,
        config,
        latent,
        distance,
        processing_class,
        quantization_config,
        peft_config,
    ):
        if not isinstance(args, SPINConfig):
            raise TypeError(
                f"`args` is a {type(args).__name__}; expected a `SPINConfig`, or an `LDAlignConfig` for LD-Align."
            )
        self.weighted = isinstance(args, LDAlignConfig)
        if latent is not None and not self.weighted:
            raise ValueError(
                "`latent` has no effect in SPIN, whose pairs have no weights. Drop it, or pass an `LDAlignConfig`."
            )
        if distance is not None:
            check_choice("distance", distance, DISTANCES)
            if not isinstance(latent, Encoder):
                raise ValueError(
                    f"`distance={distance!r}` is for an `Encoder` as `latent`, which is a {type(latent).__name__}. Drop it, or "
                    "set it in a `LatentConfig`."
                )
        if not isinstance(model, str):
            raise TypeError(
                f"`model` is a {type(model).__name__}; expected a Hub id or a folder: each iteration loads the model anew. "
                "Save yours with `save_pretrained`."
            )
        if peft_config is not None and config.initial_adapter is not None:
            raise ValueError(
                "`initial_adapter` is trained on, so that a new adapter (`peft_config`, `--use_peft`) has no place. Drop one "
                "of the two, or merge the initial one into the model."
            )
        if quantization_config is not None and peft_config is None and config.initial_adapter is None:
            raise ValueError("A quantized model is trained with an adapter: pass a `peft_config` (`--use_peft`).")
        if args.resume_from_checkpoint:
            raise ValueError("`resume_from_checkpoint`: a run goes on by itself from where it was. Drop the option.")
        if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
            raise ValueError(
                "The iterations in one command do not work with DeepSpeed ZeRO-3, which would shard the model that generates. "
                "Use another strategy, or run the stages one by one: `trl-ift generate`, `pairs`, `weigh`, `dpo`."
            )
        if args.sync_ref_model:
            raise ValueError("`sync_ref_model=True`: the reference of an iteration is its start. Drop it.")
        training_settings(args)  # refuses what could not go on
        model = os.path.expanduser(model)
        self.model, self.args, self.config = model, args, config
        self.num_iterations = config.num_iterations or (1 if self.weighted else 4)
        kept = config.keep_previous_pairs
        self.keep = (0 if self.weighted else 1) if kept is None else kept
        self.latent = latent if latent is not None or not self.weighted else LatentConfig()
        self.distance = self.latent.distance if isinstance(self.latent, LatentConfig) else distance or "l2"
        self.init_kwargs: dict[str, Any] = {"dtype": "float32", **(args.model_init_kwargs or {})}
        if quantization_config is not None:
            self.init_kwargs["quantization_config"] = quantization_config
        self.peft_config = deepcopy(peft_config)  # PEFT writes into it
        check_quantization(quantization_config)
        check_model_source(model, processing_class)
        check_model(model, processing_class, config.initial_adapter, self.init_kwargs)
        check_peft(peft_config, None, "Self-play", prompt_learning=False)
        self.tokenizer = load_tokenizer(model, processing_class, self.init_kwargs)
        self.data = _checked(train_dataset, "train_dataset", config.max_rows)
        self.eval_data = None
        if (args.eval_strategy != "no") != (eval_dataset is not None):
            raise ValueError(
                f"`eval_strategy={str(getattr(args.eval_strategy, 'value', args.eval_strategy))!r}` and "
                f"{'no `eval_dataset`' if eval_dataset is None else 'an `eval_dataset`'}: give both, or none."
            )
        if eval_dataset is not None:
            self.eval_data = _checked(eval_dataset, "eval_dataset", None)
        self.root = Path(args.output_dir).expanduser()
        if "train" in self._finished(self._folder(self.num_iterations)):
            raise ValueError(
                f"`num_iterations={self.num_iterations}`, but `output_dir='{self.root}'` holds the policy after more of them. "
                f"Give their number or a higher one; the policy after {self.num_iterations} is in "
                f"{self._folder(self.num_iterations - 1) / 'model'}."
            )
        self.state = PartialState(cpu=args.use_cpu)
        if self.weighted:
            self._check_latent()
        if is_main_process():
            self._claim()
        self.repo_id = self._make_repo()
        self.state.wait_for_everyone()

    def _claim(self) -> None:
        """Record what the run is made with, or refuse what differs from what its results were made with."""
        settings, path = self._settings(), self.root / STATE_FILE
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        has_results = any(self.root.glob("iteration-*/completions/*.parquet"))
        changed = {
            name: found[name] for name in self._may_change(found, settings) if found.get(name) != settings[name]
        }
        claim(self.root, STATE_FILE, settings | changed, has_results, "run of self-play")
        remove_scratch_files(self.root)
        if not has_results and not any(self._folder(0).rglob("*.parquet")):
            shutil.rmtree(self._folder(0), ignore_errors=True)  # its stages have recorded settings of an earlier start
        elif "latent" in changed:
            self._forget_latent()
        if changed:
            claim(self.root, STATE_FILE, settings, False, "run of self-play")

    def _may_change(self, found: dict[str, Any], settings: dict[str, Any]) -> list[str]:
        """The settings of which nothing that is finished depends on what differs."""
        trained = 0
        while "train" in self._finished(folder := self._folder(trained)) or any(folder.glob("model/checkpoint-*")):
            trained += 1
        names = [
            f"{name}_schedule"
            for name in ("beta", "learning_rate")
            if all(_scheduled(found, name, i) == _scheduled(settings, name, i) for i in range(trained))
        ]
        stages = self._finished(self._folder(0))
        if "weigh" not in stages:
            names += ["weight_normalization", "weight_clip"]
        collapsed = trained == 0 and (stages.get("guide", {}).get("check") or {}).get("collapsed")
        if collapsed or not {"guide", "weigh"} & stages.keys():
            names.append("latent")
        return [name for name in names if name in found and name in settings]

    def _forget_latent(self) -> None:
        """Remove what was made with another latent space."""
        say("The options of the latent space have changed: what was made with the earlier ones is removed.")
        folder = self._folder(0)
        stages = {name: record for name, record in self._finished(folder).items() if name in ("generate", "pair")}
        _write_json(stages, folder / _STAGES_FILE)
        for path in (self.root / "guide", self.root / "real_codes", folder / "codes"):
            shutil.rmtree(path, ignore_errors=True)

    def _folder(self, iteration: int) -> Path:
        return self.root / f"iteration-{iteration}"

    def _settings(self) -> dict[str, Any]:
        """What the results depend on. `num_iterations` is not among it: a run may go on."""
        config = asdict(self.config) | {"keep_previous_pairs": self.keep}
        del config["num_iterations"]
        latent: Any = None
        if isinstance(self.latent, LatentConfig):
            latent = asdict(self.latent)
        elif self.latent is not None:
            latent = self.latent.describe() | {"distance": self.distance}
        settings: dict[str, Any] = {
            "format": _FORMAT,
            "method": "ld-align" if self.weighted else "spin",
            "model": self.model,
        }
        settings |= training_settings(self.args) | config
        settings |= {
            "latent": latent,
            "peft_config": None if self.peft_config is None else self.peft_config.to_dict(),
            "quantization_config": str(self.init_kwargs.get("quantization_config")),
            "tokenizer": tokenizer_digest(self.tokenizer),
            "rows": len(self.data),
            "dataset_digest": _digest(self.data),
            "eval_dataset_digest": None if self.eval_data is None else _digest(self.eval_data),
        }
        return as_json(settings)

    def _check_latent(self) -> None:
        """Check what the codes come from, so that what is wrong with it is found before anything is generated."""
        latent = self.latent
        if isinstance(latent, Encoder):
            latent.check_tokenizer(self.tokenizer)
        elif latent.trains_guide:
            from .latent.training import check_sources

            revision, own = self.init_kwargs.get("revision"), (latent.guide_encoder, latent.guide_decoder).count(None)
            if revision not in (None, "main") and own == 1:
                raise ValueError(
                    f"`revision={revision!r}` with `guide_{'encoder' if latent.guide_encoder else 'decoder'}`: both parts of "
                    "the guide would be loaded with it. Name both (the policy as a folder), or none."
                )
            arguments = self._guide_arguments()
            check_sources(
                latent.guide_encoder, latent.guide_decoder, self.model, self.tokenizer, arguments, self._guide_kwargs()
            )
        elif latent.guide is not None:
            self._load_encoder()
            free_memory()  # of the device; it is loaded again when it is needed
        elif latent.sentence_encoder is not None:
            check_model_source(latent.sentence_encoder, None)
            AutoConfig.from_pretrained(latent.sentence_encoder)
            load_tokenizer(latent.sentence_encoder, None, {})

    def _guide_kwargs(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` for the models that the guide starts from."""
        names = ["trust_remote_code"]
        if self.latent.guide_encoder is None and self.latent.guide_decoder is None:
            names += ["revision", "attn_implementation"]
        kwargs = {name: value for name in names if (value := self.init_kwargs.get(name)) is not None}
        if "flash" in kwargs.get("attn_implementation", ""):  # not for weights in float32
            del kwargs["attn_implementation"]
        return kwargs

    def _guide_arguments(self) -> Any:
        from .latent.training import GuideTrainingArguments

        args = self.args
        inherited = {
            "use_cpu": args.use_cpu, "bf16": args.bf16, "fp16": args.fp16, "seed": args.seed, "report_to": args.report_to,
            "per_device_train_batch_size": args.per_device_train_batch_size, "disable_tqdm": args.disable_tqdm,
            "gradient_accumulation_steps": args.gradient_accumulation_steps, "logging_steps": args.logging_steps,
            "save_strategy": "steps" if args.save_strategy == "best" else args.save_strategy, "save_steps": args.save_steps,
            "save_total_limit": args.save_total_limit, "ddp_timeout": args.ddp_timeout,
        }  # fmt: skip
        options: dict[str, Any] = dict(self.latent.guide_options or {})  # type: ignore[arg-type]
        if "output_dir" in options:
            raise ValueError("`guide_options`: the guide is written into the folder of the run. Drop `output_dir`.")
        try:
            return GuideTrainingArguments(output_dir=str(self.root / "guide"), **(inherited | options))
        except TypeError as error:
            raise ValueError(f"`guide_options={options}`: {error}.") from None

    # ---------------------------------------------------------------- the iterations

    def __call__(self) -> list[dict[str, Any]]:
        try:
            summaries = []
            for iteration in range(self.num_iterations):
                summary = self._iterate(iteration)
                if summary is None:
                    break
                summaries.append(summary)
            self._publish(len(summaries))
        except KeyboardInterrupt:
            if is_main_process():
                print("\nInterrupted. What is finished is kept; to go on, run the same again.", file=sys.stderr)
            raise
        return summaries

    def _iterate(self, iteration: int) -> dict[str, Any] | None:
        """Run the stages of an iteration that are not finished; `None` if the policy has nothing left to learn."""
        folder = self._folder(iteration)
        stages: list[tuple[str, Callable[[Path, int], dict[str, Any]]]] = [("generate", self._generate)]
        stages += [("pair", self._pair)]
        if self.weighted:
            stages += [("guide", self._train_guide)] if iteration == 0 and self._trains_guide else []
            stages += [("weigh", self._weigh)]
        stages += [("train", self._train)]
        for number, (name, run) in enumerate(stages, start=1):
            self._stage(folder, iteration, name, run, f"stage {number} of {len(stages)}")
            if name == "pair" and (record := self._finished(folder)["pair"])["pairs"] == 0:
                say(f"Iteration {iteration + 1}: nothing is left to train. {record['reason']}")
                return None
        return self._summary(folder, iteration)

    @property
    def _trains_guide(self) -> bool:
        return isinstance(self.latent, LatentConfig) and self.latent.trains_guide

    def _finished(self, folder: Path) -> dict[str, Any]:
        path = folder / _STAGES_FILE
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def _stage(self, folder: Path, iteration: int, name: str, run: Callable, place: str) -> None:
        """Run a stage on all processes, unless it is finished, and record it."""
        finished = name in self._finished(folder)
        self.state.wait_for_everyone()  # all have looked before one of them records
        if finished:
            return
        say(f"Iteration {iteration + 1} of {self.num_iterations}, {place}: {name}{self._time_left(iteration, name)}")
        begun = f"{name}, begun"  # the time of what was interrupted, unless it was killed
        start = time.monotonic() - self._finished(folder).get(begun, {"seconds": 0})["seconds"]
        try:
            record = run(folder, iteration)
        except BaseException:
            if is_main_process() and folder.is_dir():
                seconds = round(time.monotonic() - start, 1)
                _write_json(self._finished(folder) | {begun: {"seconds": seconds}}, folder / _STAGES_FILE)
            raise
        if is_main_process():
            record = {**record, "seconds": round(time.monotonic() - start, 1)}
            stages = {key: value for key, value in self._finished(folder).items() if key != begun}
            _write_json(stages | {name: record}, folder / _STAGES_FILE)
            remove_scratch_files(folder)
        wait_until(lambda: name in self._finished(folder))

    def _time_left(self, iteration: int, name: str) -> str:
        """What the stages to come took before; nothing while one of them has not been run."""
        seconds: dict[str, float] = {}
        for earlier in range(iteration + 1):
            seconds |= {k: v["seconds"] for k, v in self._finished(self._folder(earlier)).items()}
        order = ["generate", "pair", *(["weigh"] if self.weighted else []), "train"]
        if name not in order or not all(stage in seconds for stage in order):
            return ""
        later = order[order.index(name) :] + order * (self.num_iterations - iteration - 1)
        return f" (about {_duration(sum(seconds[stage] for stage in later))} left)"

    # ---------------------------------------------------------------- the stages

    def _start_of(self, iteration: int) -> tuple[str, str | None]:
        """Model and adapter that an iteration starts from."""
        if iteration == 0:
            return self.model, self.config.initial_adapter
        folder = str(self._folder(iteration - 1) / "model")
        has_adapter = self.peft_config is not None or self.config.initial_adapter is not None
        return (self.model, folder) if has_adapter else (folder, None)

    def _load_kwargs(self, model: str) -> dict[str, Any]:
        # A revision is one of the Hub's
        return {k: v for k, v in self.init_kwargs.items() if k != "revision" or model == self.model}

    def _generate(self, folder: Path, iteration: int) -> dict[str, Any]:
        record = self._answer(self.data, folder / "completions", iteration)
        if self.eval_data is not None:
            self._answer(self.eval_data, folder / "eval_completions", iteration)
        return record

    def _answer(self, dataset: Dataset, folder: Path, iteration: int) -> dict[str, Any]:
        model, adapter = self._start_of(iteration)
        kwargs = self._load_kwargs(model)
        if self.config.generation_dtype or self.args.bf16:
            kwargs["dtype"] = self.config.generation_dtype or "bfloat16"
        # Answers of another iteration are other draws, also for a policy that has not changed
        settings = asdict(self.config._generation(self.args.seed + iteration))
        completions = generate_completions(
            model,
            dataset.remove_columns("completion"),
            folder,
            processing_class=self.tokenizer,
            adapter=adapter,
            quantization_config=kwargs.pop("quantization_config", None),
            model_init_kwargs=kwargs,
            **settings,
        )
        free_memory()
        tokens = sum(completions["num_tokens"])
        return {"answers": len(completions), "tokens": tokens, "prompts": len(dataset)}

    def _pair(self, folder: Path, iteration: int) -> dict[str, Any]:
        if not is_main_process():
            return {}
        counts: dict[str, Any] = {}
        for data, source, target in self._sets(folder):
            try:
                pairs, found = count_pairs(data, folder / source, self.tokenizer, self.config.drop_truncated)
            except NoPairsError as error:
                # A later policy may have met the data; the first one that gives no pair has something wrong
                if iteration == 0:
                    raise
                if source == "completions":
                    return {"pairs": 0, "reason": str(error)}
                say(f"This iteration is trained without evaluation. {error}")
                counts["eval_pairs"] = 0
                continue
            _write_parquet(pairs, folder / target)
            counts = counts | {"eval_pairs": found["pairs"]} if counts else found
        say(
            f"{counts['pairs']} pairs; dropped: {describe_dropped(counts)}; {counts['truncated']} of {counts['completions']} "
            f"answers were cut at {self.config.max_new_tokens} tokens."
        )
        if counts["endless"]:
            say(describe_endless(counts))
        return counts

    def _sets(self, folder: Path) -> list[tuple[Dataset, str, str]]:
        sets = [(self.data, "completions", "pairs.parquet")]
        return sets if self.eval_data is None else [*sets, (self.eval_data, "eval_completions", "eval_pairs.parquet")]

    def _train_guide(self, folder: Path, iteration: int) -> dict[str, Any]:
        from .latent.training import train_guide

        latent = self.latent
        pairs = _read_parquet(folder / "pairs.parquet").select_columns(["prompt", "chosen", "rejected"])
        own = latent.guide_decoder is None
        train_guide(
            latent.guide_encoder or self.model,
            latent.guide_decoder or self.model,
            pairs,
            self._guide_arguments(),
            processing_class=self.tokenizer if own else None,
            model_init_kwargs=self._guide_kwargs(),
        )
        free_memory()
        check = json.loads((self.root / "guide" / "guide.json").read_text(encoding="utf-8")).get("check")
        if check and check.get("collapsed"):
            say(
                "The guide's decoder hardly uses the codes. To have another one, stop here, and run the same again with other "
                "options of the latent space: they bind from the first checkpoint of the training on."
            )
        return {"check": check}

    def _load_encoder(self) -> Encoder:
        if isinstance(self.latent, Encoder):
            return self.latent
        from .latent.encoders import PolicyHiddenState, SentenceEncoder
        from .latent.guide import LatentGuide

        latent = self.latent
        if latent.sentence_encoder is not None:
            encoder: Encoder = SentenceEncoder(latent.sentence_encoder)
        elif latent.policy_hidden_state:
            encoder = PolicyHiddenState(
                self.model,
                processing_class=self.tokenizer,
                adapter=self.config.initial_adapter,
                model_init_kwargs=self.init_kwargs,
            )
        else:
            encoder = LatentGuide.from_pretrained(latent.guide or self.root / "guide")
        encoder.check_tokenizer(self.tokenizer)
        return encoder

    def _weigh(self, folder: Path, iteration: int) -> dict[str, Any]:
        """Weights of the new pairs and of those that are kept from earlier iterations, normalised together."""
        from .latent.weigh import add_weights, describe_weights, encode_dataset, pair_distances, warn_of_weights

        encoder = self._load_encoder()
        # Codes of the real answers, once for all iterations; an empty one has none, and is in no pair
        answered = [index for index, row in enumerate(self.data) if text_of(row["completion"]).strip()]
        real = encode_dataset(encoder, self.data.select(answered), self.root / "real_codes")
        place = {index: position for position, index in enumerate(answered)}
        distances = []
        for earlier in self._kept(iteration):
            pairs = _read_parquet(self._folder(earlier) / "pairs.parquet")
            generated = encode_dataset(encoder, pairs, self._folder(earlier) / "codes", column="rejected")
            chosen = real[[place[index] for index in pairs["prompt_index"]]]
            distances.append(pair_distances(pairs, chosen, generated, self.distance))
        description = encoder.describe()
        del encoder
        free_memory()
        if not is_main_process():
            return {}

        normalization, clip = self.args.weight_normalization or "mean", self.args.weight_clip
        union = self._union(iteration, "pairs.parquet")
        pairs, summary = add_weights(union, np.concatenate(distances), normalization, clip)
        warn_of_weights(summary, len(pairs))
        _write_parquet(pairs, folder / "weighted.parquet")
        say(describe_weights(summary, len(pairs)))
        return {"weights": summary, "encoder": description}

    def _kept(self, iteration: int) -> range:
        """The iterations whose pairs are trained in this one."""
        return range(max(iteration - self.keep, 0), iteration + 1)

    def _union(self, iteration: int, file: str) -> Dataset:
        return concatenate_datasets([_read_parquet(self._folder(earlier) / file) for earlier in self._kept(iteration)])

    def _train(self, folder: Path, iteration: int) -> dict[str, Any]:
        last_checkpoint(folder / "model", self.state.num_processes)  # refuses one of another number of processes
        model, adapter = self._start_of(iteration)
        kwargs = self._load_kwargs(model)
        args = self._arguments(folder, iteration)
        pairs = (
            _read_parquet(folder / "weighted.parquet") if self.weighted else self._union(iteration, "pairs.parquet")
        )
        eval_pairs = None
        if self.eval_data is not None and self._finished(folder)["pair"].get("eval_pairs") != 0:
            eval_pairs = _read_parquet(folder / "eval_pairs.parquet")
        elif self.eval_data is not None:
            args.eval_strategy, args.eval_on_start = IntervalStrategy.NO, False
        trainer_class = LDAlignTrainer if self.weighted else SPINTrainer
        set_seed(args.seed)
        options: dict[str, Any] = {"peft_config": deepcopy(self.peft_config)}
        policy: Any = model
        if adapter is None:
            options["quantization_config"] = kwargs.pop("quantization_config", None)
            args.model_init_kwargs = kwargs
        else:
            device = own_device(self.state.num_processes)
            policy = PeftModel.from_pretrained(load_model(model, None, kwargs, device), adapter, is_trainable=True)
            args.model_init_kwargs, options = None, {}
        trainer = trainer_class(
            policy, args=args, train_dataset=pairs, eval_dataset=eval_pairs, processing_class=self.tokenizer, **options
        )
        trainer.iteration_summary = {
            "iteration": f"{iteration + 1} of {self.num_iterations}",
            "pairs": len(trainer.train_dataset),
            "max_new_tokens": self.config.max_new_tokens,
            "temperature": self.config.temperature,
        }
        if self.weighted:
            trainer.iteration_summary |= {
                "distance": self.distance,
                "weight_normalization": self.args.weight_normalization or "mean",
                **({} if self.args.weight_clip is None else {"weight_clip": self.args.weight_clip}),
            }
        trainer._card_name, trainer.hub_model_id = self.root.resolve().name, self.repo_id
        record = train_and_save(trainer, folder / "model", f"iteration {iteration + 1}")
        record |= {"pairs": len(trainer.train_dataset), "metrics": _last_metrics(trainer.state.log_history)}
        del trainer, policy
        free_memory()
        return record

    def _arguments(self, folder: Path, iteration: int) -> Any:
        """The config of the training of an iteration."""
        args = copy(self.args)
        args.output_dir = str(folder / "model")
        args.precompute_ref_log_probs = True  # once for each iteration; no second model is held in memory
        args.push_to_hub = False  # done at the end
        args.hub_model_id = args.hub_model_id or self.root.resolve().name  # TRL calls the model so in its card
        args.overwrite_output_dir = True  # of an earlier start without a checkpoint
        args.run_name = f"{args.run_name or self.root.resolve().name}-{iteration}"
        for name in ("beta", "learning_rate"):
            setattr(args, name, _scheduled(vars(self.args) | vars(self.config), name, iteration))
        if self.weighted:  # the weights are those of the column
            args.weight_normalization, args.weight_clip = None, None
        return args

    # ---------------------------------------------------------------- results

    def _summary(self, folder: Path, iteration: int) -> dict[str, Any]:
        stages = self._finished(folder)
        pair, train = stages["pair"], stages["train"]
        summary = {
            "iteration": iteration,
            "answers": pair["completions"],
            "truncated": pair["truncated"],
            "dropped": pair["dropped"],
            "new_pairs": pair["pairs"],
            "pairs": train["pairs"],
            "steps": train["steps"],
            **train["metrics"],
        }
        if self.weighted:
            summary["weights"] = stages["weigh"]["weights"]
        return summary

    def _publish(self, iterations: int) -> None:
        """Put the last policy into `output_dir` itself, and on the Hub if asked to."""
        source = self._folder(iterations - 1) / "model"
        if is_main_process():
            for path in source.iterdir():
                if path.is_file() and path.name != TRAINING_ARGS_NAME:
                    target = self.root / path.name
                    target.unlink(missing_ok=True)
                    try:
                        os.link(path, target)
                    except OSError:  # a file system without hard links
                        shutil.copy2(path, target)
            say(f"The policy after {iterations} iterations is in {self.root}; each of them in its folder there.")
        self.state.wait_for_everyone()  # not for the upload, which may take longer than collectives wait
        if self.repo_id is not None:
            self._push(self.repo_id)

    def _make_repo(self) -> str | None:
        """Make the repository on the Hub, as transformers does before the training, and return its id."""
        args = self.args
        if not args.push_to_hub or not is_main_process():
            return None
        name = args.hub_model_id or self.root.resolve().name
        return self._hub().create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id

    def _hub(self) -> HfApi:
        return HfApi(token=self.args.hub_token)

    def _push(self, repo_id: str) -> None:
        self._hub().upload_folder(
            repo_id=repo_id,
            folder_path=self.root,
            commit_message="End of training",
            ignore_patterns=["iteration-*", "guide/*", "real_codes/*", STATE_FILE, ".*"],
            revision=self.args.hub_revision,
        )
        say(f"Model pushed to https://huggingface.co/{repo_id}.")


def _checked(dataset: Any, name: str, max_rows: int | None) -> Dataset:
    """The SFT dataset as prompts and completions, with the name of the argument in the messages."""
    try:
        rows = first_turns(dataset)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("`dataset`", f"`{name}`")) from None
    return rows if max_rows is None else head(rows, max_rows)


def _digest(dataset: Dataset) -> str:
    digest = hashlib.sha256()
    for row in dataset:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()[:16]


def _scheduled(settings: Mapping[str, Any], name: str, iteration: int) -> Any:
    """The value of an option in an iteration: that of its schedule, if there is one."""
    schedule = settings.get(f"{name}_schedule")
    return schedule[min(iteration, len(schedule) - 1)] if schedule else settings.get(name)


def _last_metrics(history: list[dict[str, Any]]) -> dict[str, float]:
    """The last figures of the training, and of its evaluation."""
    wanted = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
    found: dict[str, float] = {}
    for entry in history:
        found |= {name: entry[name] for name in wanted if name in entry}
        found |= {name: value for name, value in entry.items() if name.removeprefix("eval_") in wanted}
    return found


def _write_json(value: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def _write_parquet(dataset: Dataset, path: Path) -> None:
    buffer = io.BytesIO()
    dataset.to_parquet(buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, buffer.getvalue())


def _read_parquet(path: Path) -> Dataset:
    return load_dataset("parquet", data_files=str(path), split="train")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else "a minute"
