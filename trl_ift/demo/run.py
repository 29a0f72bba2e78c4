"""The stages of the demo: base model, SFT, IFT, report.

A finished stage leaves `stages/<name>.json` and is never done again; training goes on from its last checkpoint.
"""

import argparse
import hashlib
import json
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from peft import LoraConfig
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from .. import IFTConfig, IFTTrainer
from ..checks import is_complete_checkpoint
from . import report
from .evaluate import MAX_NEW_TOKENS, evaluate
from .model import HUB_ID, load_model, load_tokenizer, packaged_model
from .report import LABELS
from .task import DATASET, OPTIONS, Question, make_questions, to_rows


METHODS = ("sft", "ift")
_MANIFEST = "manifest.json"
_OWN_FILES = (_MANIFEST, "data", "stages", "sft", "ift", *report.FILES)

# Costs on 2 cores of a Xeon of 2023: what the budget must pay for beside training (start, conversion, report), all
# three evaluations of a question, and training on a row by both methods
_FIXED_SECONDS = 45.0
_SECONDS_PER_TEST_ROW = 0.7
_SECONDS_PER_TRAIN_ROW = 0.8


@dataclass(frozen=True)
class Settings:
    """What the results depend on. Results of other settings are never mixed in one folder."""

    model: str
    train_rows: int
    test_rows: int
    seed: int = 0
    batch_size: int = 8
    learning_rate: float = 1e-3
    lora_rank: int = 16
    ift_lambda: float = 0.2
    ift_gamma: float = 0.95

    def fingerprint(self) -> str:
        """Return a digest of the settings and of the constants behind them."""
        constants = [DATASET, OPTIONS, MAX_NEW_TOKENS]
        return hashlib.sha256(json.dumps([asdict(self), constants], sort_keys=True).encode()).hexdigest()[:16]


def plan(budget: float, batch_size: int = Settings.batch_size) -> tuple[int, int]:
    """Return the number of training rows (a multiple of the batch size) and of test questions for a budget.

    Args:
        budget: About how long the demo may take on 2 CPU cores, in minutes.
        batch_size: Rows of an optimizer step.
    """
    test_rows = 8 * round(min(max(16 * budget, 32), 512) / 8)
    seconds = 60 * budget - _FIXED_SECONDS - _SECONDS_PER_TEST_ROW * test_rows
    return batch_size * max(round(seconds / _SECONDS_PER_TRAIN_ROW / batch_size), 4), test_rows


def run_demo(args: argparse.Namespace) -> dict[str, Any]:
    """Run what is not done yet, write the report, and return the results (those of `results.json`)."""
    _check_packages()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    folder = Path(args.output_dir)
    source = args.model or str(packaged_model())
    train_rows, test_rows = plan(args.budget)
    settings = Settings(args.model or HUB_ID, train_rows, test_rows, args.seed)
    claim_folder(folder, settings, args.overwrite_output_dir)
    print(_header(settings, args.budget, folder), flush=True)

    train, test = make_questions(settings.train_rows, settings.test_rows, settings.seed)
    for name, rows in (("train", train), ("test", test)):
        _write(folder / "data" / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer(source)

    results = {"base": stage(folder, "base", lambda: evaluate_base(source, tokenizer, test))}
    for method in METHODS:
        work = partial(fine_tune, method, source, settings, tokenizer, train, test, folder / method)
        results[method] = stage(folder, method, work)
    everything = {
        "settings": asdict(settings),
        "budget_minutes": args.budget,
        "source": source,
        "machine": machine(),
        "versions": versions(),
        "results": results,
    }
    report.write(folder, everything, test)
    print("\n" + report.terminal_table(results))
    print(f"\nWritten to {folder}: " + ", ".join([*report.FILES, "sft/", "ift/"]), flush=True)
    return everything


# ---------------------------------------------------------------- folder and stages


def claim_folder(folder: Path, settings: Settings, overwrite: bool) -> None:
    """Make `folder` the folder of these settings.

    Raises:
        ValueError: It holds the results of other settings, or files that no demo wrote.
    """
    manifest = folder / _MANIFEST
    if overwrite:
        for name in _OWN_FILES:
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    elif manifest.is_file():
        found = json.loads(manifest.read_text())
        if found["fingerprint"] == settings.fingerprint():
            return
        wanted = asdict(settings)
        differing = [f"{k}={found['settings'].get(k)!r} (now {v!r})" for k, v in wanted.items()]
        differing = [d for d, (k, v) in zip(differing, wanted.items(), strict=True) if found["settings"].get(k) != v]
        raise ValueError(
            f"{folder} holds a demo with other settings: {', '.join(differing) or 'another version of the demo'}. Choose "
            "another `--output_dir`, or start anew there with `--overwrite_output_dir`."
        )
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} is not empty, and no demo wrote it (it has no {_MANIFEST}). Choose another `--output_dir`, or, to "
            "write there anyway, `--overwrite_output_dir`."
        )
    _write(manifest, json.dumps({"fingerprint": settings.fingerprint(), "settings": asdict(settings)}, indent=2))


def stage(folder: Path, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the result of a stage: read it where the stage is done, else do it, and keep it as JSON."""
    path = folder / "stages" / f"{name}.json"
    done_before = path.is_file()
    if not done_before:
        _write(path, json.dumps(work()))
    result = json.loads(path.read_text())
    print(report.stage_line(name, result, done_before), flush=True)
    return result


def _write(path: Path, text: str) -> None:
    """Write a file so that it is there whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


# ---------------------------------------------------------------- the work


def evaluate_base(source: str, tokenizer: PreTrainedTokenizerBase, test: list[Question]) -> dict[str, Any]:
    """Measure the model as it comes."""
    model = load_model(source)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return _measure("base", model, tokenizer, test)


def fine_tune(
    method: str,
    source: str,
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    train: list[Question],
    test: list[Question],
    folder: Path,
) -> dict[str, Any]:
    """Train a LoRA adapter by `method`, measure it, and save it with its model card in `folder`.

    Both methods get the same arguments, the same adapter at the start and the same batches in the same order.
    """
    trainer = make_trainer(method, source, settings, tokenizer, train, folder)
    checkpoint = newest_checkpoint(folder)
    if checkpoint is not None:
        print(f"{LABELS[method]}: going on from step {checkpoint.name.removeprefix('checkpoint-')}", flush=True)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model()
    history = trainer.state.log_history
    seconds = max((entry["seconds"] for entry in history if "seconds" in entry), default=0.0)

    trainer.model.merge_adapter()  # the same function, with fewer operations
    measured = _measure(method, trainer.model, tokenizer, test)
    trainer.model.unmerge_adapter()
    if method == "ift":
        add = {"dataset": DATASET, "split": "test"}
        trainer.add_eval_result("exact_match", round(measured["exact_match"], 4), metric_name="Exact match", **add)
        trainer.add_eval_result("nll", round(measured["nll"], 4), metric_name="NLL of the reply (nats a token)", **add)
        trainer.create_model_card(model_name=f"{Path(settings.model).name}-sums-IFT", dataset_name=DATASET)
        if settings.model == HUB_ID:
            _note_base(folder / "README.md")
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
    return measured | {"train_seconds": seconds, "steps": trainer.state.global_step, "log_history": history}


def _note_base(card: Path) -> None:
    """Say in the model card that training and evaluation saw a de-quantised copy of the base model."""
    note = """## The base model

Trained and evaluated on the weights of a 4-bit (Q4_1) GGUF file of the base model, de-quantised to float32; not
measured on the original weights. The adapter was made by `trl-ift demo`.

"""
    text = card.read_text(encoding="utf-8")
    before, title, after = text.partition("## Framework versions")
    _write(card, before + note + title + after)


def make_trainer(
    method: str,
    source: str,
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    train: list[Question],
    folder: Path,
) -> SFTTrainer:
    """Return the trainer of `"sft"` or `"ift"`; all that differs is the class and the options that only IFT has."""
    on_gpu = torch.accelerator.is_available()
    steps = len(train) // settings.batch_size
    save_steps = max(2, min(10, steps // 10))
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": 1,
        "per_device_train_batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": max(1, steps // 20),
        "logging_steps": 1,
        "save_steps": save_steps,
        "save_total_limit": 1,
        "gradient_checkpointing": False,  # short sequences: memory is no issue
        "use_cpu": not on_gpu,
        "bf16": on_gpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        "dataloader_pin_memory": on_gpu,
        "seed": settings.seed,
        "report_to": "none",
        "disable_tqdm": True,
    }
    if method == "ift":
        trainer_class: type[SFTTrainer] = IFTTrainer
        base = HUB_ID if settings.model == HUB_ID else None
        config: SFTConfig = IFTConfig(
            ift_lambda=settings.ift_lambda, ift_gamma=settings.ift_gamma, hub_base_model=base, **options
        )
    else:
        trainer_class, config = SFTTrainer, SFTConfig(**options)
    set_seed(settings.seed)  # the adapter's first weights
    trainer = trainer_class(
        model=load_model(source),
        args=config,
        train_dataset=datasets.Dataset.from_list(to_rows(train)),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=settings.lora_rank,
            lora_alpha=2 * settings.lora_rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        callbacks=[TrainingProgress(f"{LABELS[method]}: training")],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, if any; delete those that were cut off while they were written."""
    complete = []
    for path in folder.glob("checkpoint-*"):
        if is_complete_checkpoint(path):
            complete.append(path)
        else:
            shutil.rmtree(path)
    return max(complete, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def _measure(name: str, model: Any, tokenizer: PreTrainedTokenizerBase, test: list[Question]) -> dict[str, Any]:
    start = time.monotonic()
    with progress(f"{LABELS[name]}: {len(test)} test questions", len(test)) as advance:
        measured = evaluate(model, tokenizer, test, advance)
    return measured | {"eval_seconds": time.monotonic() - start}


# ---------------------------------------------------------------- what the reader sees


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show progress with the time left: a bar on a terminal, else a line every tenth."""
    if sys.stderr.isatty():
        # Left to itself, tqdm prints nothing on a terminal that does not tell its size
        size = shutil.get_terminal_size()
        bar_format = f"  {label} {{percentage:3.0f}}%|{{bar:30}}| {{elapsed}} done, {{remaining}} left"
        with tqdm(total=total, leave=False, ncols=size.columns, nrows=size.lines, bar_format=bar_format) as bar:
            yield bar.update
        return
    start, done = time.monotonic(), 0

    def advance(number: int) -> None:
        nonlocal done
        before, done = done, done + number
        if done * 10 // total > before * 10 // total:
            left = (time.monotonic() - start) / done * (total - done)
            print(f"  {label}: {100 * done // total} %, {left:.0f} s left", flush=True)

    yield advance


class TrainingProgress(TrainerCallback):
    """Progress of the steps still to do; logs the seconds of training so far, over interruptions, as `seconds`."""

    def __init__(self, label: str):
        self.label = label

    def on_train_begin(self, args, state, control, **kwargs):
        self._seconds_before = max((entry.get("seconds", 0.0) for entry in state.log_history), default=0.0)
        self._start = time.monotonic()
        self._progress = progress(self.label, max(state.max_steps - state.global_step, 1))
        self._advance = self._progress.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        self._advance(1)

    def on_log(self, args, state, control, **kwargs):
        state.log_history[-1]["seconds"] = self._seconds_before + time.monotonic() - self._start

    def on_train_end(self, args, state, control, **kwargs):
        self._progress.__exit__(None, None, None)


def _header(settings: Settings, budget: float, folder: Path) -> str:
    return "\n".join(
        [
            f"{settings.model} learns small sums with LoRA, by SFT and by IFT: same start, same data, same order.",
            f"  data     {settings.train_rows} training and {settings.test_rows} test questions ({DATASET}), none in both",
            f"  machine  {machine()}",
            f"  output   {folder}",
            f"  time     about {budget:g} minutes on 2 idle CPU cores (--budget); Ctrl-C keeps what is done",
            "",
        ]
    )


def machine() -> str:
    """Return the hardware that computes, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if torch.accelerator.is_available():
        return f"{torch.accelerator.current_accelerator()} ({platform.machine()})"
    return f"CPU ({_cpu_name()}), {torch.get_num_threads()} threads"


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that the results depend on."""
    names = ("trl-ift", "trl", "transformers", "peft", "torch", "reasoning-gym")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the terminal for the demo's own lines: no bars of single files, no hints for developers."""
    loggers = [logging.getLogger(name) for name in ("accelerate", "trl", "peft", "datasets")]
    levels = [logger.level for logger in loggers]
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars[0]:
            transformers.logging.enable_progress_bar()
        if not bars[1]:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check_packages() -> None:
    missing = [
        package
        for package, module in (("reasoning-gym", "reasoning_gym"), ("matplotlib", "matplotlib"))
        if find_spec(module) is None
    ]
    if missing:
        raise ImportError(
            f"the demo needs {' and '.join(missing)}: run `pip install {' '.join(missing)}`, or `pip install "
            '"trl-ift[demo-tools]"` for all it needs but the model.'
        )
