"""The script of `trl-ift lobass`: train the reference, score twice, select, report.

`output_dir` grows by `reference/` (the fine-tuned model), `scores/` (one folder a model) and `selection/` (the rows, as a
dataset, with the report). Interrupted at any point, the same command goes on.
"""

import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from trl_ift.scripts.train import INPUT_ERRORS, parse_options, report_error, usage_error


PROG = "trl-ift lobass"
STATE_FILE = "lobass.json"
# Settings of the training that a run which goes on must share with the one before
_RECIPE = (
    "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "weight_decay",
    "max_grad_norm", "optim", "per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed", "bf16",
    "fp16", "packing", "max_length", "truncation_mode", "completion_only_loss", "assistant_only_loss",
    "dataset_text_field", "eos_token", "chat_template_path", "loss_type",
)  # fmt: skip
_MODEL = (
    "model_name_or_path", "model_revision", "dtype", "use_peft", "lora_r", "lora_alpha", "lora_dropout",
    "lora_target_modules", "lora_modules_to_save", "use_rslora", "use_dora", "load_in_4bit", "load_in_8bit",
)  # fmt: skip


@dataclass
class LoBaSSArguments:
    """
    Options of the selection; see [`~trl_ift.data.select_top`] and [`~trl_ift.data.score_dataset`].

    Parameters:
        fraction (`float`, *optional*):
            Share of all rows to select, in (0, 1]; 0.06 if neither it nor `k` is given.
        k (`int`, *optional*):
            Number of rows to select, in place of `fraction`.
        min_score (`float`, *optional*):
            Rows with a lower score are never selected; 0 drops the rows that training made worse.
        normalize (`str`, *optional*, defaults to `"initial"`):
            What the difference of the losses is divided by: `"initial"`, `"reference"` or `"none"`.
        cross_fit (`int`, *optional*, defaults to `1`):
            Number of references. With more than one, each is trained without a part of the rows, and scores that part, so that
            no row is scored by a model that has seen it (our choice; the paper trains one on all rows).
        ifd (`bool`, *optional*, defaults to `True`):
            Whether the completions are also scored without their prompts, so that the report can compare with IFD. Costs a
            forward pass; not done for rows without prompts.
        score_dtype (`str`, *optional*):
            Dtype of the models that score. Bfloat16 by default if the reference is trained in it, else that of the model.
        batch_tokens (`int`, *optional*, defaults to `8192`):
            Most tokens of a batch of the scoring.
        shard_size (`int`, *optional*, defaults to `1000`):
            Rows of a shard of the scoring.
        report (`bool`, *optional*, defaults to `True`):
            Whether to write the report (needs matplotlib).
        overwrite_selection (`bool`, *optional*, defaults to `False`):
            Whether an earlier selection in `output_dir` is replaced, e.g. by one with another `fraction`. Reference and scores
            are kept.
    """

    fraction: float | None = field(
        default=None,
        metadata={"help": "Share of all rows to select, in (0, 1]; 0.06 if neither it nor `k` is given."},
    )
    k: int | None = field(default=None, metadata={"help": "Number of rows to select, in place of `fraction`."})
    min_score: float | None = field(
        default=None,
        metadata={"help": "Rows with a lower score are never selected; 0 drops the rows that training made worse."},
    )
    normalize: str = field(
        default="initial",
        metadata={
            "help": "What the difference of the losses is divided by.",
            "choices": ["initial", "reference", "none"],
        },
    )
    cross_fit: int = field(
        default=1,
        metadata={
            "help": "Number of references. With more than one, each is trained without a part of the rows, and scores it."
        },
    )
    ifd: bool = field(
        default=True,
        metadata={
            "help": "Whether the completions are also scored without their prompts, to compare with IFD in the report."
        },
    )
    score_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Dtype of the models that score. Bfloat16 by default if the reference is trained in it, else the model's.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    batch_tokens: int = field(default=8192, metadata={"help": "Most tokens of a batch of the scoring."})
    shard_size: int = field(default=1000, metadata={"help": "Rows of a shard of the scoring."})
    report: bool = field(default=True, metadata={"help": "Whether to write the report (needs matplotlib)."})
    overwrite_selection: bool = field(
        default=False,
        metadata={"help": "Whether an earlier selection in `output_dir` is replaced. Reference and scores are kept."},
    )

    def __post_init__(self):
        from trl_ift.checks import check_range

        if self.fraction is not None and self.k is not None:
            raise ValueError(f"`fraction={self.fraction}` and `k={self.k}` exclude each other. Drop one.")
        if self.fraction is not None:
            check_range("fraction", self.fraction, 0, 1, low_open=True)
        for name in ("k", "cross_fit", "batch_tokens", "shard_size"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 1, integer=True)


def make_parser() -> Any:
    """Return the `TrlParser` of `trl-ift lobass`: the options of `trl sft`, for the reference, and those of the selection."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

    parser = TrlParser(
        (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, LoBaSSArguments),
        prog=PROG,
        usage=f"{PROG} [--config FILE] [--accelerate_config NAME|FILE] [options] [options of accelerate launch]",
        description="LoBaSS data selection: fine-tune a reference on all rows, score every row before and after, and keep "
        "those that the model can learn. Data: language modeling, prompt-completion. Paper: "
        "https://huggingface.co/papers/2310.13008",
        epilog="The options of the training are those of `trl sft`; the selection adds --fraction, --k, --min_score, "
        "--normalize, --cross_fit, --no_ifd, --score_dtype, --batch_tokens, --shard_size, --no_report, --overwrite_selection.",
        allow_abbrev=False,
    )
    parser.error = partial(usage_error, PROG)
    return parser


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any, options: LoBaSSArguments) -> None:
    """Run LoBaSS with the parsed arguments of `make_parser()`."""
    import numpy as np
    from transformers import set_seed
    from trl import get_peft_config

    from trl_ift.checks import check_model_source, check_quantization, check_sft_dataset
    from trl_ift.data.report import check_report_tools
    from trl_ift.data.scoring import RowOptions
    from trl_ift.data.selection import check_output, join_folds, print_selection, write_selection
    from trl_ift.scripts.data import load_splits

    if model_args.model_name_or_path is None:
        raise ValueError("No model: name a Hub id or a local folder with `--model_name_or_path`.")
    if training_args.push_to_hub:
        raise ValueError("`--push_to_hub`: the reference is a means, and is not pushed. Drop the option.")
    model = os.path.expanduser(model_args.model_name_or_path)
    check_quantization(model_args)
    check_model_source(model, None)
    row_options = RowOptions.of(training_args)
    root = Path(training_args.output_dir).expanduser()
    check_output(root / "selection", options.overwrite_selection)
    if options.report:
        check_report_tools()
    set_seed(training_args.seed)
    dataset, eval_dataset = load_splits(script_args, dataset_args, training_args)
    check_sft_dataset(dataset, "dataset", row_options.dataset_text_field)
    number = len(dataset) if hasattr(dataset, "__len__") else None
    if options.cross_fit > 1 and (number is None or options.cross_fit > number):
        found = "a stream" if number is None else f"{number} rows"
        raise ValueError(
            f"`cross_fit={options.cross_fit}` of {found}: it needs a map-style dataset with at least as many rows."
        )
    if number is not None and options.k is not None and options.k > number:
        raise ValueError(f"`k={options.k}`, but there are only {number} rows. Lower it.")
    if _is_main_process():
        _claim(root, script_args, training_args, model_args, options, number)

    folds: list[Any] = [None]
    if options.cross_fit > 1:
        order = np.random.default_rng(training_args.seed).permutation(len(dataset))
        folds = [np.sort(order[fold :: options.cross_fit]) for fold in range(options.cross_fit)]
    names = ["reference"] if len(folds) == 1 else [f"reference-{fold}" for fold in range(len(folds))]
    for name, fold in zip(names, folds, strict=True):
        rows = dataset if fold is None else dataset.select(np.setdiff1d(np.arange(len(dataset)), fold))
        _train_reference(root / name, model, rows, eval_dataset, training_args, model_args)

    scoring = _Scoring(model, model_args, training_args, options, row_options, root)
    uses_ifd = options.ifd and options.report and _has_prompt(next(iter(dataset)), row_options)
    if get_peft_config(model_args) is None:
        with scoring.loaded(None) as initial_model:
            initial = scoring.score(initial_model, dataset, "initial")
            direct = scoring.score(initial_model, dataset, "direct", direct=True) if uses_ifd else None
        parts = []
        for name, fold in zip(names, folds, strict=True):
            with scoring.loaded(root / name) as reference_model:
                parts.append(scoring.score(reference_model, dataset if fold is None else dataset.select(fold), name))
    else:  # one model in memory
        with scoring.loaded(None, adapters={name: root / name for name in names}) as adapted:
            with adapted.disable_adapter():
                initial = scoring.score(adapted, dataset, "initial")
                direct = scoring.score(adapted, dataset, "direct", direct=True) if uses_ifd else None
            parts = []
            for name, fold in zip(names, folds, strict=True):
                adapted.set_adapter(name)
                parts.append(scoring.score(adapted, dataset if fold is None else dataset.select(fold), name))
    reference = parts[0] if len(folds) == 1 else join_folds(list(zip(folds, parts, strict=True)))
    if not _is_main_process():
        return
    selected = write_selection(
        root / "selection",
        dataset,
        initial,
        reference,
        direct,
        fraction=options.fraction,
        k=options.k,
        min_score=options.min_score,
        normalize=None if options.normalize == "none" else options.normalize,
        dataset_text_field=row_options.dataset_text_field,
        report=options.report,
        settings={
            "dataset": script_args.dataset_name or "a mixture",
            "initial_model": model_args.model_name_or_path,
            "reference_epochs": training_args.num_train_epochs,
            "reference_learning_rate": training_args.learning_rate,
            "reference_adapter": "LoRA" if model_args.use_peft else "none (all weights)",
            "cross_fit": options.cross_fit,
            "max_length": row_options.max_length,
            "score_dtype": scoring.dtype,
        },
        overwrite=options.overwrite_selection,
    )
    print_selection(root / "selection", len(selected), len(initial), options.report)


def _claim(
    root: Path, script_args: Any, training_args: Any, model_args: Any, options: LoBaSSArguments, number: int | None
) -> None:
    """Record what the folder is made with, or raise if it was made with something else."""
    from trl_ift.data.shards import write_file

    state: dict[str, Any] = {
        "dataset": script_args.dataset_name,
        "dataset_config": script_args.dataset_config,
        "dataset_split": script_args.dataset_train_split,
        "rows": number,
        "cross_fit": options.cross_fit,
    }
    state |= {name: getattr(training_args, name) for name in _RECIPE if hasattr(training_args, name)}
    state |= {name: getattr(model_args, name) for name in _MODEL if hasattr(model_args, name)}
    state = json.loads(json.dumps(state, default=str))
    file = root / STATE_FILE
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        differing = [f"{name}={found.get(name)!r} (now {v!r})" for name, v in state.items() if found.get(name) != v]
        if differing:
            raise ValueError(
                f"`output_dir='{root}'` holds a run that was made with {', '.join(differing)}. Choose another `output_dir`, "
                "or, to go on there, give the same again."
            )
        return
    if root.is_dir() and any(root.iterdir()):
        raise ValueError(f"`output_dir='{root}'` is not empty, and holds no run of LoBaSS. Choose another folder.")
    root.mkdir(parents=True, exist_ok=True)
    write_file(file, (json.dumps(state, indent=2) + "\n").encode())


def _has_prompt(row: Any, options: Any) -> bool:
    return "prompt" in row and "completion" in row and options.completion_only_loss is not False


# ---------------------------------------------------------------- the reference


def _train_reference(
    folder: Path, model: str, dataset: Any, eval_dataset: Any, training_args: Any, model_args: Any
) -> None:
    """Fine-tune the model on the rows with TRL's `SFTTrainer`, from the last checkpoint if there is one, unless it is done."""
    import torch
    from accelerate.utils import is_peft_model
    from transformers import set_seed
    from trl import SFTTrainer, get_peft_config, get_quantization_config

    from trl_ift.checks import is_complete_checkpoint
    from trl_ift.data.shards import write_file
    from trl_ift.trl_internals import keep_4bit_trainable_on_cpu, score_labelled_positions_only

    done = folder / "trained.json"
    if done.is_file():
        _say(f"The reference in {folder} is trained.")
        return
    args = copy(training_args)
    args.output_dir = str(folder)
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    checkpoints = [path for path in folder.glob("checkpoint-*") if is_complete_checkpoint(path)]
    last = max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    _say(f"Training the reference in {folder}" + (f", from {last.name}." if last else "."))
    set_seed(args.seed)
    trainer = SFTTrainer(
        model,
        args=args,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    keep_4bit_trainable_on_cpu(trainer.model)
    # The same loss, sooner on a CPU
    score_labelled_positions_only(trainer.model.get_base_model() if is_peft_model(trainer.model) else trainer.model)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    trainer.save_model(args.output_dir)
    trainer.accelerator.wait_for_everyone()
    if _is_main_process():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        write_file(done, json.dumps({"steps": trainer.state.global_step, "last_loss": losses[-1:]}).encode())
    trainer.accelerator.wait_for_everyone()
    trainer.end()
    del trainer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------- the scores


class _Scoring:
    """Loads models for scoring and scores with the same options."""

    def __init__(
        self,
        model: str,
        model_args: Any,
        training_args: Any,
        options: LoBaSSArguments,
        row_options: Any,
        root: Path,
    ):
        from trl import get_quantization_config

        default = "bfloat16" if training_args.bf16 else model_args.dtype or "float32"
        self.dtype = options.score_dtype or default
        self.model, self.options, self.row_options, self.root = model, options, row_options, root
        self.tokenizer_options = {
            "revision": model_args.model_revision,
            "trust_remote_code": training_args.trust_remote_code,
        }
        self.init_kwargs = {
            **(training_args.model_init_kwargs or {}),
            **self.tokenizer_options,
            "attn_implementation": model_args.attn_implementation,
            "dtype": self.dtype,
        }
        quantization = get_quantization_config(model_args)
        if quantization is not None:
            self.init_kwargs["quantization_config"] = quantization

    @contextmanager
    def loaded(self, folder: Path | None, adapters: dict[str, Path] | None = None) -> Iterator[Any]:
        """The model in `folder`, or the initial one, possibly with adapters; freed at the end."""
        import torch
        from peft import PeftModel

        from trl_ift.data.inference import load_model, own_device

        processes = int(os.environ.get("WORLD_SIZE", "1"))
        model: Any = load_model(str(folder or self.model), None, self.init_kwargs, own_device(processes))
        for name, path in (adapters or {}).items():
            if isinstance(model, PeftModel):
                model.load_adapter(str(path), adapter_name=name)
            else:
                model = PeftModel.from_pretrained(model, str(path), adapter_name=name)
        try:
            yield model
        finally:
            del model
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def score(self, model: Any, dataset: Any, name: str, direct: bool = False) -> Any:
        from transformers import AutoTokenizer

        from trl_ift.data.scoring import DIRECT_PROMPT, score_dataset

        _say(f"Scoring: {name}.")
        return score_dataset(
            model,
            dataset,
            self.root / "scores" / name,
            processing_class=AutoTokenizer.from_pretrained(self.model, **self.tokenizer_options),
            args=self.row_options,
            direct_prompt=DIRECT_PROMPT if direct else None,
            batch_tokens=self.options.batch_tokens,
            shard_size=self.options.shard_size,
        )


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _say(text: str) -> None:
    if _is_main_process():
        print(text, flush=True)


def run(argv: list[str]) -> int:
    """Run the script on a command line and return the exit code."""
    try:
        try:
            arguments = parse_options(make_parser(), argv, PROG)
        except INPUT_ERRORS as error:
            return report_error(PROG, error)
        try:
            main(*arguments)
        except INPUT_ERRORS as error:
            return report_error(PROG, error)
    except KeyboardInterrupt:
        if _is_main_process():
            print("\nInterrupted. To go on, run the same command again.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(run(sys.argv[1:]))
