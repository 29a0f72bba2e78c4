"""The script of `trl-ift lobass`: train the reference, score twice, select, report.

`output_dir` grows by `reference/` (the fine-tuned model), `scores/` (one folder a model) and `selection/` (the rows, as a
dataset, with the report). Interrupted at any point, the same command goes on.
"""

import json
import math
import os
import sys
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from trl_ift.scripts.train import INPUT_ERRORS, model_init_kwargs, parse_options, report_error, usage_error
from trl_ift.stages import as_json, claim, free_memory, is_main_process, say, train_and_save, training_settings


PROG = "trl-ift lobass"
STATE_FILE = "lobass.json"


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
            "choices": ["bfloat16", "float16", "float32"],
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
        from trl_ift.checks import check_choice, check_range

        if self.fraction is not None and self.k is not None:
            raise ValueError(f"`fraction={self.fraction}` and `k={self.k}` exclude each other. Drop one.")
        if self.fraction is not None:
            check_range("fraction", self.fraction, 0, 1, low_open=True)
        for name in ("k", "cross_fit", "batch_tokens", "shard_size"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 1, integer=True)
        check_choice("normalize", self.normalize, ("initial", "reference", "none"))
        if self.min_score is not None:  # no score of the method itself exceeds 1
            check_range("min_score", self.min_score, -math.inf, 1 if self.normalize == "initial" else math.inf)


def make_parser() -> Any:
    """Return the `TrlParser` of `trl-ift lobass`: the options of `trl sft`, for the reference, and those of the selection."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    from trl_ift.supervised.sft import PlainSFTConfig

    parser = TrlParser(
        (ScriptArguments, PlainSFTConfig, ModelConfig, DatasetMixtureConfig, LoBaSSArguments),
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
    from trl_ift.data.scoring import DIRECT_PROMPT, RowOptions, check_prompts, content_of, dataset_digest
    from trl_ift.data.selection import check_output, join_folds, print_selection, write_selection
    from trl_ift.scripts.data import load_splits

    if model_args.model_name_or_path is None:
        raise ValueError("No model: name a Hub id or a local folder with `--model_name_or_path`.")
    if training_args.push_to_hub:
        raise ValueError("`--push_to_hub`: the reference is a means, and is not pushed. Drop the option.")
    if training_args.resume_from_checkpoint:
        raise ValueError("`--resume_from_checkpoint`: a run goes on by itself from where it was. Drop the option.")
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
    if number is None and training_args.max_steps <= 0:
        raise ValueError("The length of a streamed dataset is not known: say how long to train with `--max_steps`.")
    init_kwargs = model_init_kwargs(training_args, model_args)
    if is_main_process():
        data = {"rows": number, "dataset_digest": dataset_digest(dataset, row_options)}
        has_results = any(root.glob("reference*/checkpoint-*")) or any(root.glob("reference*/trained.json"))
        settings = as_json(data | _settings(training_args, model_args, script_args, options))
        claim(root, STATE_FILE, settings, has_results, "run of LoBaSS")

    folds: list[Any] = [None]
    if options.cross_fit > 1:
        order = np.random.default_rng(training_args.seed).permutation(len(dataset))
        folds = [np.sort(order[fold :: options.cross_fit]) for fold in range(options.cross_fit)]
    names = ["reference"] if len(folds) == 1 else [f"reference-{fold}" for fold in range(len(folds))]
    for name, fold in zip(names, folds, strict=True):
        rows = dataset if fold is None else dataset.select(np.setdiff1d(np.arange(len(dataset)), fold))
        _train_reference(root / name, model, rows, eval_dataset, training_args, model_args, init_kwargs)
    _leave_process_group()

    scoring = _Scoring(model, model_args, training_args, init_kwargs, options, row_options, root)
    before: list[_Task] = [("initial", dataset, None)]
    if options.ifd and options.report:
        try:
            check_prompts(DIRECT_PROMPT, content_of(next(iter(dataset)), row_options), row_options)
            before.append(("direct", dataset, DIRECT_PROMPT))
        except ValueError:
            say("Rows without prompts: no comparison with IFD.")
    after: list[_Task] = [
        (name, dataset if fold is None else dataset.select(fold), None)
        for name, fold in zip(names, folds, strict=True)
    ]
    if get_peft_config(model_args) is None:
        scores = scoring.score(model, before)
        for task in after:
            scores += scoring.score(str(root / task[0]), [task])
    else:  # one model in memory
        scores = scoring.score(model, before, after)
    initial, direct = scores[0], scores[1] if len(before) == 2 else None
    parts = scores[len(before) :]
    reference = parts[0] if len(folds) == 1 else join_folds(list(zip(folds, parts, strict=True)))
    if not is_main_process():
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


def _settings(training_args: Any, model_args: Any, script_args: Any, options: LoBaSSArguments) -> dict[str, Any]:
    """What the reference depends on beside the rows."""
    named = {"dataset": script_args.dataset_name, "dataset_split": script_args.dataset_train_split}
    return training_settings(training_args) | vars(model_args) | named | {"cross_fit": options.cross_fit}


# ---------------------------------------------------------------- the reference


def _train_reference(
    folder: Path,
    model: str,
    dataset: Any,
    eval_dataset: Any,
    training_args: Any,
    model_args: Any,
    init_kwargs: dict[str, Any],
) -> None:
    """Fine-tune the model on the rows with TRL's `SFTTrainer`, from the last checkpoint if there is one, unless it is done."""
    from accelerate.utils import is_peft_model
    from transformers import set_seed
    from trl import get_peft_config, get_quantization_config

    from trl_ift.data.shards import write_file
    from trl_ift.supervised.sft import PlainSFTTrainer
    from trl_ift.trl_internals import keep_4bit_trainable_on_cpu, score_labelled_positions_only

    done = folder / "trained.json"
    if done.is_file():
        say(f"The reference in {folder} is trained.")
        return
    args = copy(training_args)
    args.output_dir = str(folder)
    args.model_init_kwargs = init_kwargs
    say(f"Training the reference in {folder}.")
    set_seed(args.seed)
    trainer = PlainSFTTrainer(
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
    record = train_and_save(trainer, folder, "the reference")
    if is_main_process():
        write_file(done, json.dumps(record).encode())
    trainer.accelerator.wait_for_everyone()
    trainer.end()
    del trainer
    free_memory()


def _leave_process_group() -> None:
    """Scoring needs no collectives, and a process that is done must not keep others waiting until they time out."""
    import torch
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # ZeRO-3 would shard the models that score
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------- the scores

# Name of the scores (and of the adapter), rows, `direct_prompt`
_Task = tuple[str, Any, str | None]


class _Scoring:
    """Loads models for scoring and scores with the same options."""

    def __init__(
        self,
        model: str,
        model_args: Any,
        training_args: Any,
        init_kwargs: dict[str, Any],
        options: LoBaSSArguments,
        row_options: Any,
        root: Path,
    ):
        from transformers import AutoConfig, AutoTokenizer
        from trl import get_quantization_config

        source = {name: init_kwargs[name] for name in ("revision", "trust_remote_code") if name in init_kwargs}
        dtype = options.score_dtype or ("bfloat16" if training_args.bf16 else init_kwargs["dtype"] or "float32")
        if dtype == "auto":  # that of the initial model, for both
            dtype = str(AutoConfig.from_pretrained(model, **source).dtype or "float32").removeprefix("torch.")
        self.dtype, self.options, self.row_options, self.root = dtype, options, row_options, root
        self.tokenizer = AutoTokenizer.from_pretrained(model, **source)
        self.initial, self.init_kwargs = model, {**init_kwargs, "dtype": dtype}
        quantization = get_quantization_config(model_args)
        if quantization is not None:
            self.init_kwargs["quantization_config"] = quantization

    def score(self, source: str, tasks: Sequence[_Task], adapter_tasks: Sequence[_Task] = ()) -> list[Any]:
        """Load a model, score with it, and then with each of its adapters, which are in the folders of their names.

        The model is freed at the end: nothing else holds it.
        """
        from peft import PeftModel

        from trl_ift.data.inference import load_model, own_device

        options = dict(self.init_kwargs)
        if source != self.initial:
            options.pop("revision", None)  # a folder of ours
        model: Any = load_model(source, None, options, own_device(int(os.environ.get("WORLD_SIZE", "1"))))
        scores = [self._score(model, task) for task in tasks]
        for task in adapter_tasks:
            folder = str(self.root / task[0])
            if isinstance(model, PeftModel):
                model.load_adapter(folder, adapter_name=task[0])
                model.set_adapter(task[0])
            else:
                model = PeftModel.from_pretrained(model, folder, adapter_name=task[0])
            scores.append(self._score(model, task))
        del model
        free_memory()
        return scores

    def _score(self, model: Any, task: _Task) -> Any:
        from trl_ift.data.scoring import score_dataset

        name, dataset, direct_prompt = task
        say(f"Scoring: {name}.")
        return score_dataset(
            model,
            dataset,
            self.root / "scores" / name,
            processing_class=self.tokenizer,
            args=self.row_options,
            direct_prompt=direct_prompt,
            batch_tokens=self.options.batch_tokens,
            shard_size=self.options.shard_size,
        )


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
        if is_main_process():
            print("\nInterrupted. To go on, run the same command again.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(run(sys.argv[1:]))
