"""Benchmarks of the lm-evaluation-harness (lm-eval), run on a model in memory.

A benchmark is named as lm-eval names it, and read from the Hub, or from local files of JSON lines with the same columns:

    run_harness(model, tokenizer, ["gsm8k", {"task": "piqa", "data_files": {"validation": "piqa.jsonl.gz"}, "limit": 100}])

Keys of such a mapping: `task`; `data_files`, a file for each split; `num_fewshot`; `limit`. Without a file for the split that
lm-eval takes the shots from, they are drawn from the other documents that are evaluated. The files of the group `mmlu` hold all
its subjects, told apart by the column `subject`. Needs `pip install "trl-ift[eval]"`.
"""

import copy
import difflib
import functools
import glob
import gzip
import io
import json
import logging
import math
import os
import random
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..checks import check_range
from ..data.fingerprint import base_model
from ..trl_internals import keep_4bit_trainable_on_cpu
from .measures import Measure, mean_of


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is reported.

    Attributes:
        title: Its name in reports.
        group: Its group in the paper.
        metric: The metric that stands for it, as lm-eval names it (metric, filter); `None`: not in lm-eval.
        shots: Examples in the prompt.
    """

    title: str
    group: str
    metric: str | None = None
    shots: int | None = None


# The 13 benchmarks of "Insights into Alignment" (arXiv 2404.14723). Metrics and shots of ARC, HellaSwag, Winogrande, GSM8K,
# TruthfulQA and MMLU are those of the Open LLM Leaderboard v1; of BIG-Bench and OpenBookQA those of the SPIN paper; of PIQA and
# BoolQ our choice.
_BBH, _ANSWER = "bbh_cot_fewshot_", "exact_match,get-answer"
BENCHMARKS = {
    "mt_bench": Benchmark("MT-Bench", "dialogue"),
    "arc_challenge": Benchmark("ARC-Challenge", "reasoning", "acc_norm,none", 25),
    "hellaswag": Benchmark("HellaSwag", "reasoning", "acc_norm,none", 10),
    "winogrande": Benchmark("Winogrande", "reasoning", "acc,none", 5),
    "piqa": Benchmark("PIQA", "reasoning", "acc_norm,none", 0),
    f"{_BBH}causal_judgement": Benchmark("BBH causal judgement", "reasoning", _ANSWER, 3),
    f"{_BBH}sports_understanding": Benchmark("BBH sports understanding", "reasoning", _ANSWER, 3),
    f"{_BBH}formal_fallacies": Benchmark("BBH formal fallacies", "reasoning", _ANSWER, 3),
    "gsm8k": Benchmark("GSM8K", "mathematics", "exact_match,strict-match", 5),
    "truthfulqa_mc2": Benchmark("TruthfulQA mc2", "truthfulness", "acc,none", 0),
    "mmlu": Benchmark("MMLU", "multi-task understanding", "acc,none", 5),
    "boolq": Benchmark("BoolQ", "question answering", "acc,none", 0),
    "openbookqa": Benchmark("OpenBookQA", "question answering", "acc_norm,none", 1),
}

# Where lm-eval keeps them: reading these folders takes 50 ms, and all of its tasks 10 seconds
_FOLDERS = (
    "arc", "bbh/cot_fewshot", "gsm8k", "hellaswag", "mmlu/default", "openbookqa", "piqa", "super_glue/boolq", "truthfulqa",
    "winogrande",
)  # fmt: skip

# Columns that the packaged tasks read
_COLUMNS = {
    "arc_challenge": ("question", "choices", "answerKey"),
    "arc_easy": ("question", "choices", "answerKey"),
    "boolq": ("passage", "question", "label"),
    "gsm8k": ("question", "answer"),
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "openbookqa": ("question_stem", "choices", "answerKey"),
    "piqa": ("goal", "sol1", "sol2", "label"),
    "truthfulqa_mc1": ("question", "mc1_targets"),
    "truthfulqa_mc2": ("question", "mc2_targets"),
    "winogrande": ("sentence", "option1", "option2", "answer"),
}
_USE_FILES = "Give local files: {'task': ..., 'data_files': {SPLIT: FILE}}, or go online and try again."
_ENTRY_KEYS = ("task", "data_files", "num_fewshot", "limit")
# lm-eval's own default, so that the shots are those of everyone else
_SHOTS_SEED = 1234


@dataclass(frozen=True)
class _Entry:
    """One of `tasks`. `label` is how messages call it."""

    task: str
    data_files: dict[str, str]
    num_fewshot: int | None
    limit: int | None
    label: str


def run_harness(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    tasks: Sequence[str | Mapping[str, Any]],
    *,
    batch_size: int = 8,
    max_length: int = 2048,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    seed: int = 0,
    metrics: Sequence[str] | None = None,
) -> dict[str, Measure]:
    """Evaluate a model with lm-eval, as its command line would evaluate the saved model.

    The model runs where it is, and is given back as it was: weights, training flags, forward, and the random states too.

    Args:
        model: A causal language model, PEFT models included.
        tokenizer: Its tokenizer.
        tasks: Names of tasks or groups, or mappings: see the top of this module.
        batch_size: Sequences of a batch.
        max_length: Most tokens of a prompt and its answer; no more than the model has positions for. Longer prompts lose
            their beginning, with a warning.
        limit: Number of documents of a task (of each task of a group), drawn at random. The draw depends on `seed` and the
            task only, and a smaller one is part of a larger one.
        num_fewshot: Examples in the prompt. Default: the number of `BENCHMARKS`, else the task's own. TruthfulQA and others
            that fix none keep none.
        apply_chat_template: Whether prompts are written as chats, with the shots as turns.
        seed: Seed of `limit`, and of tasks that sample.
        metrics: Metrics to report, as `"acc"` or `"exact_match,strict-match"`. Default: the one of `BENCHMARKS`, and of any
            other task all that are means over its documents.

    Returns:
        `lm_eval/TASK/METRIC` to the measure, of group `"benchmark"`, with one item a document. A group gives a measure of the
        pooled documents of its tasks, and one of each task.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError, TypeError: Something is wrong with the options, the tasks or their files, or the Hub cannot be reached.
            All of these come before the first task is run.
    """
    check_range("batch_size", batch_size, 1, integer=True)
    check_range("max_length", max_length, 2, integer=True)
    if limit is not None:
        check_range("limit", limit, 1, integer=True)
    if num_fewshot is not None:
        check_range("num_fewshot", num_fewshot, 0, integer=True)
    if isinstance(metrics, str):
        raise TypeError(f"`metrics={metrics!r}` must be a list of names: `metrics=[{metrics!r}]`.")
    check_tasks(tasks)
    entries = _entries(tasks)
    if isinstance(tokenizer, ProcessorMixin):
        tokenizer = tokenizer.tokenizer
    if apply_chat_template and not tokenizer.chat_template:
        raise ValueError(
            "`apply_chat_template=True`, but the tokenizer has no chat template. Set `tokenizer.chat_template`, or drop the "
            "option."
        )
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    max_length = min(max_length, positions or max_length)
    found: dict[str, Measure] = {}
    screen = sys.stderr  # lm-eval's own progress bars are hidden
    with _as_it_was(model, seed):
        loaded = []
        for entry in entries:
            with _quiet():
                loaded.append(_load(entry))
            for task in loaded[-1]["tasks"].values():
                _prepare(task, entry, num_fewshot, max_length, metrics)
        with _quiet():
            # It adds a padding token
            lm = HFLM(model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, max_length=max_length)
        for entry, parts in zip(entries, loaded, strict=True):
            size = limit if entry.limit is None else entry.limit
            drawn = _draw(parts["tasks"], size, seed)
            with tqdm(desc=f"lm-eval {entry.task}", unit="request", file=screen) as bar, _quiet() as messages:
                lm.set_cache_hook(_progress(bar, parts["tasks"]))  # called with every result
                results = evaluate(
                    lm, parts, samples=drawn, bootstrap_iters=0, log_samples=True,
                    apply_chat_template=apply_chat_template, fewshot_as_multiturn=apply_chat_template,
                )  # fmt: skip
            if any("runcat" in message for message in messages):
                warnings.warn(
                    f"`{entry.task}`: some prompts are longer than {max_length} tokens and lost their beginning. Raise "
                    "`max_length`, or lower `num_fewshot`."
                )
            found |= _measures(parts, results, metrics)
    return found


# ---------------------------------------------------------------- checks


def check_tasks(tasks: Sequence[str | Mapping[str, Any]]) -> None:
    """Raise for tasks that cannot be run, before any model is loaded.

    Takes a fraction of a second. Only the first task that is not in a folder of `BENCHMARKS` has lm-eval index all its tasks,
    which takes about 10 seconds, once.

    Args:
        tasks: As in [`run_harness`].

    Raises:
        ImportError: lm-eval is not installed, or too old.
        TypeError: An entry, or one of its values, is of the wrong type.
        ValueError: An unknown task, one that is named twice, a number out of range, a file that is missing or lacks columns, or
            data of the Hub that, offline, are not in the cache.
    """
    seen: dict[str, str] = {}
    for entry in _entries(tasks):
        leaves = _leaves(entry)
        for name, config in leaves.items():
            if name in seen:
                raise ValueError(f"The task `{name}` is in `{seen[name]}` and in `{entry.label}`. Drop one of them.")
            seen[name] = entry.label
            if entry.num_fewshot and config.get("num_fewshot") == 0:
                raise ValueError(
                    f"`{entry.label}`: num_fewshot={entry.num_fewshot}, but {name} has a prompt of its own and takes no shots. "
                    "Drop `num_fewshot`."
                )
        if entry.data_files:
            if list(leaves) != [entry.task] and _benchmark(entry.task) is not BENCHMARKS["mmlu"]:
                raise ValueError(
                    f"`{entry.label}`: {entry.task!r} stands for several tasks, and `data_files` belong to one. Name them one "
                    f"by one, each with its files: {', '.join(list(leaves)[:3])}, ..."
                )
            _check_files(entry, *next(iter(leaves.items())))  # the subjects of MMLU have their files in common
        elif datasets.config.HF_HUB_OFFLINE:
            for name, config in leaves.items():
                _check_cached(entry, name, config)


def _entries(tasks: Sequence[str | Mapping[str, Any]]) -> list[_Entry]:
    """Check and complete `tasks`."""
    if isinstance(tasks, str | Mapping) or not isinstance(tasks, Sequence):
        raise TypeError(
            f"`tasks` must be a list of names or mappings, got {type(tasks).__name__}: write `[{tasks!r}]`."
        )
    found = []
    for index, given in enumerate(tasks):
        label = f"tasks[{index}]"
        if isinstance(given, str):
            given = {"task": given}
        if not isinstance(given, Mapping) or not isinstance(given.get("task"), str):
            raise TypeError(
                f"`{label}` is {given!r}. Expected the name of a task, or a mapping such as {{'task': 'piqa', 'limit': 100}}."
            )
        if unknown := sorted(set(given) - set(_ENTRY_KEYS), key=str):
            raise ValueError(
                f"`{label}` has the key {unknown[0]!r}. Known keys are {', '.join(map(repr, _ENTRY_KEYS))}."
            )
        numbers = {name: given.get(name) for name in ("num_fewshot", "limit")}
        for name, value in numbers.items():
            if value is not None:
                check_range(f"{label}['{name}']", value, int(name == "limit"), integer=True)
        files = given.get("data_files", {})
        if not isinstance(files, Mapping) or not all(isinstance(path, str | os.PathLike) for path in files.values()):
            raise TypeError(
                f"`{label}['data_files']` must map the name of a split to a file, e.g. {{'test': 'questions.jsonl.gz'}}, got "
                f"{files!r}."
            )
        paths = {str(split): str(Path(path).expanduser().absolute()) for split, path in files.items()}
        found.append(_Entry(task=given["task"], data_files=paths, label=label, **numbers))
    return found


def _leaves(entry: _Entry) -> dict[str, dict[str, Any]]:
    """The tasks that an entry stands for, and their configs as lm-eval packages them."""
    index = _manager(entry).task_index
    found: dict[str, dict[str, Any]] = {}

    def add(member: str | Mapping[str, Any]) -> None:
        given = {"task": member} if isinstance(member, str) else member
        name: Any = given.get("group") or given.get("task")
        known = index.get(name)  # none: written out within its group
        parts = (
            given.get("task") if known is None else sorted(known.tags) if known.cfg is None else known.cfg.get("task")
        )
        if isinstance(parts, list):
            for part in parts:
                add(part)
        elif known is not None:
            found[name] = known.cfg

    add(entry.task)
    return found


def _manager(entry: _Entry) -> Any:
    """A `TaskManager` that knows the task, the quickest there is."""
    name, packaged = entry.task, _task_manager()
    # Tags may have members in other folders
    if name in packaged.task_index and packaged.task_index[name].cfg is not None:
        return packaged
    if name in BENCHMARKS:
        raise ValueError(f"`{entry.label}`: lm-eval has no {BENCHMARKS[name].title}: its answers are judged. Drop it.")
    files = list(_task_folder().rglob("*.yaml"))
    known = {path.stem for path in files} | set(packaged.task_index)
    if any(name.encode() in path.read_bytes() for path in files):  # else it is unknown, which is soon found out
        everything = _task_manager(everything=True)
        if name in everything.task_index:
            return everything
        known = set(everything.task_index)
    close = difflib.get_close_matches(name, sorted(known), n=3)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise ValueError(f"`{entry.label}`: lm-eval has no task or group {name!r}.{hint} `lm-eval ls tasks` lists them.")


@functools.cache
def _task_manager(everything: bool = False) -> Any:
    if find_spec("lm_eval") is None:
        raise ImportError(
            'Benchmarks need lm-eval, which is not installed. Install it with `pip install "trl-ift[eval]"`, or drop them.'
        )
    from lm_eval.tasks import TaskManager

    if not hasattr(TaskManager, "load"):
        raise ImportError('This lm-eval is too old. Update it: `pip install --upgrade "lm-eval>=0.4.13"`.')
    with _quiet():
        folders = None if everything else [_task_folder() / name for name in _FOLDERS]
        return TaskManager(include_path=folders, include_defaults=everything)


def _task_folder() -> Path:
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


def _benchmark(name: str) -> Benchmark | None:
    """The benchmark that a task is, or is a part of."""
    entry = _task_manager().task_index.get(name)
    if entry is not None and entry.yaml_path is not None and entry.yaml_path.parent.match("mmlu/default"):
        return BENCHMARKS["mmlu"]
    return BENCHMARKS.get(name)


def _check_files(entry: _Entry, name: str, config: dict[str, Any]) -> None:
    """Raise for splits that the task does not read, files that are not there, and columns that are missing."""
    if "class" in config:
        raise ValueError(f"`{entry.label}`: {name!r} loads its data with code of its own. Drop `data_files`.")
    _splits(entry, config)
    columns = _COLUMNS.get(name, ())
    if _benchmark(name) is BENCHMARKS["mmlu"]:
        columns = ("question", "choices", "answer") + (("subject",) if entry.task != name else ())
    elif name.startswith("bbh_"):
        columns = ("input", "target")
    for path in entry.data_files.values():
        if not Path(path).is_file():
            raise ValueError(f"`{entry.label}`: there is no file `{path}`. Correct `data_files`.")
        try:
            with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as lines:
                row = json.loads(next(lines, "null"))
        except (OSError, ValueError) as error:
            raise ValueError(f"`{entry.label}`: `{path}` does not hold JSON lines ({error}).") from error
        if not isinstance(row, dict):
            raise ValueError(
                f"`{entry.label}`: the first line of `{path}` must be a JSON object, one for each document."
            )
        if missing := [column for column in columns if column not in row]:
            raise ValueError(
                f"`{entry.label}`: `{path}` lacks the column {missing[0]!r}; its columns are {sorted(row)}, and {name} reads "
                f"{', '.join(map(repr, columns))}. Rename or add it."
            )


def _splits(entry: _Entry, config: dict[str, Any]) -> tuple[str, str]:
    """The split to evaluate, and the one that shots are taken from."""
    evaluated = [config[name] for name in ("test_split", "validation_split") if config.get(name)]
    fewshot = (config.get("fewshot_config") or {}).get("split")
    shots = [fewshot, config.get("fewshot_split"), config.get("training_split")]
    known = list(dict.fromkeys(filter(None, [*evaluated, *shots])))
    split = next((name for name in evaluated if name in entry.data_files), None)
    if split is None or not set(entry.data_files) <= set(known):
        raise ValueError(
            f"`{entry.label}['data_files']` has the splits {', '.join(map(repr, entry.data_files))}. {entry.task} evaluates "
            f"{' or '.join(map(repr, evaluated))}, and also knows {', '.join(map(repr, known))}. Rename the splits."
        )
    return split, next((name for name in [*shots, *evaluated[::-1]] if name in entry.data_files), split)


def _check_cached(entry: _Entry, name: str, config: dict[str, Any]) -> None:
    """Raise for data that would have to be fetched from the Hub, without a connection."""
    path = config.get("dataset_path")
    if not path or config.get("custom_dataset") or "class" in config:
        return
    try:
        with _quiet():
            options = {k: v for k, v in (config.get("dataset_kwargs") or {}).items() if k != "trust_remote_code"}
            datasets.load_dataset_builder(path, config.get("dataset_name"), **options)
    except Exception as error:
        raise ValueError(
            f"`{entry.label}`: the data of {name} ({path} on the Hub) are not in the cache, and HF_HUB_OFFLINE or "
            f"HF_DATASETS_OFFLINE keeps them from being fetched. {_USE_FILES}"
        ) from error


# ---------------------------------------------------------------- running


def _load(entry: _Entry) -> dict[str, Any]:
    """Load the tasks of an entry with their data, as lm-eval's dict of tasks and groups."""
    manager, leaves = _manager(entry), _leaves(entry)
    spec: Any = entry.task
    if entry.data_files:
        # Within a group lm-eval merges a config with the packaged one
        spec = {"group": entry.task, "task": [_override(entry, name, config) for name, config in leaves.items()]}
    try:
        loaded = manager.load([spec])
    except ImportError:  # of a package that the task needs; says so
        raise
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        if entry.data_files:
            files = ", ".join(entry.data_files.values())
            raise ValueError(f"`{entry.label}`: {entry.task} cannot be built from {files}. {found}") from error
        raise ValueError(
            f"`{entry.label}`: the data of {entry.task} cannot be loaded ({found}). {_USE_FILES}"
        ) from error
    if list(leaves) == [entry.task]:
        loaded["groups"] = {}  # of one task
    return loaded


def _override(entry: _Entry, name: str, config: dict[str, Any]) -> dict[str, Any]:
    """The keys of a packaged task's config that change when its documents are in local files."""
    split, shots = _splits(entry, config)
    override: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        # `datasets` takes a path for a pattern
        "dataset_kwargs": {"data_files": {name: glob.escape(path) for name, path in entry.data_files.items()}},
        # Only if the two names are the same does lm-eval keep a document out of its own shots
        "test_split": split,
        "fewshot_split": shots,
        "validation_split": None,
        "training_split": None,
    }
    fewshot = config.get("fewshot_config") or {}
    if fewshot.get("samples"):
        override["fewshot_split"] = None
    elif "split" in fewshot:
        override["fewshot_config"] = fewshot | {"split": shots}
    if entry.task != name:
        override["process_docs"] = functools.partial(_of_subject, subject=config["dataset_name"])
    return override


def _of_subject(documents: datasets.Dataset, subject: str) -> datasets.Dataset:
    chosen = [index for index, name in enumerate(documents["subject"]) if name == subject]
    if not chosen:
        raise ValueError(f"No row has the subject {subject!r}. For some of the subjects, name their tasks one by one.")
    return documents.select(chosen)


def _prepare(
    task: Any, entry: _Entry, num_fewshot: int | None, max_length: int, metrics: Sequence[str] | None
) -> None:
    """Set the shots of a loaded task, and raise for what would stop it half way."""
    name, benchmark = task.task_name, _benchmark(task.task_name)
    known = list(task.aggregation())
    if metrics is not None and not any(metric.split(",")[0] in known for metric in metrics):
        raise ValueError(f"`metrics={list(metrics)}`: {name} has none of these. Its metrics are {', '.join(known)}.")
    asked = [entry.num_fewshot, num_fewshot, benchmark and benchmark.shots, task.get_config("num_fewshot"), 0]
    shots = next(number for number in asked if number is not None)
    if task.get_config("num_fewshot") == 0:
        shots = 0
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(_SHOTS_SEED)
    if shots and hasattr(task, "sampler"):
        others = len(task.sampler.df) - (task.fewshot_cfg.split == task.config.test_split)
        if shots > others:
            raise ValueError(
                f"`{entry.label}`: {name} with {shots} shots, but there are {others} documents to take them from. Lower "
                "`num_fewshot`, or give more."
            )
    if task.OUTPUT_TYPE == "generate_until":
        answer = (task.get_config("generation_kwargs") or {}).get("max_gen_toks", 256)
        if answer >= max_length:
            raise ValueError(
                f"`{entry.label}`: answers of {name} have up to {answer} tokens, which leaves no room for a prompt: prompt and "
                f"answer have {max_length} tokens, the least of `max_length` and of the positions of the model. Raise "
                "`max_length`, or drop the task."
            )


def _draw(tasks: dict[str, Any], limit: int | None, seed: int) -> dict[str, list[int]]:
    """The documents of each task that has more than `limit`, in ascending order, which lm-eval takes for granted."""
    drawn = {}
    for name, task in tasks.items():
        order = list(range(len(task.eval_docs)))
        if limit is not None and limit < len(order):
            random.Random(f"{name} {seed}").shuffle(order)
            drawn[name] = sorted(order[:limit])
    return drawn


def _progress(bar: tqdm, tasks: dict[str, Any]) -> Any:
    """What lm-eval calls with every result of the model."""

    def add_partial(*_: Any) -> None:
        if bar.total is None:
            bar.total = sum(instance.repeats for task in tasks.values() for instance in task.instances)
        bar.update()

    return SimpleNamespace(add_partial=add_partial)


_PATCHED = ("forward", "tie_weights")


@contextmanager
def _as_it_was(model: PreTrainedModel | PeftModel, seed: int) -> Iterator[None]:
    """Seed everything, and give the model and the random states back as they were."""
    with suppress(ValueError):  # some are packed already, which does not matter here
        keep_4bit_trainable_on_cpu(model)
    modes = [(module, module.training) for module in model.modules()]
    outer = {id(module): module for module in (model, base_model(model))}.values()
    own = [(module, {name: vars(module)[name] for name in _PATCHED if name in vars(module)}) for module in outer]
    states = random.getstate(), np.random.get_state()
    kind = model.device.type
    devices = {parameter.device.index for parameter in model.parameters() if parameter.device.type == kind} - {None}
    with torch.random.fork_rng(sorted(devices), device_type=kind):
        try:
            for set_seed in (random.seed, np.random.seed, torch.manual_seed):
                set_seed(seed)
            for module in outer:
                if "_original_forward" in vars(module):  # a trainer's forward is in mixed precision
                    module.forward = module._original_forward
                # HFLM calls it, which fails for a tied head that an adapter trains (`modules_to_save`)
                module.tie_weights = lambda *_, **__: None
            yield
        finally:
            for module, attributes in own:
                for name in _PATCHED:
                    vars(module).pop(name, None)
                vars(module).update(attributes)
            for module, training in modes:
                module.training = training
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Keep what lm-eval says from the screen; yields its messages."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    try:
        for logger in loggers:
            logger.handlers, logger.propagate = [handler], False
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield messages
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate


# ---------------------------------------------------------------- results


def _measures(loaded: dict[str, Any], results: Any, metrics: Sequence[str] | None) -> dict[str, Measure]:
    """Turn lm-eval's results into measures: of the groups, then of their tasks."""
    items: dict[str, dict[str, list[float]]] = {}
    documents: dict[str, list[Any]] = {}
    better: dict[str, bool] = {}
    for name, task in loaded["tasks"].items():
        samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
        documents[name] = [sample["doc"] for sample in samples if sample["filter"] == samples[0]["filter"]]
        better |= task.higher_is_better()
        items[name] = {}
        for key, mean in results["results"][name].items():
            metric, _, chosen = key.partition(",")
            values = [sample.get(metric) for sample in samples if sample["filter"] == chosen]
            if not values or not all(
                isinstance(value, int | float | np.number | np.bool_) for value in [*values, mean]
            ):
                continue
            values = list(map(float, values))
            # Perplexities and the like are no means over the documents
            if math.isclose(math.fsum(values) / len(values), mean, rel_tol=1e-9, abs_tol=1e-12):
                items[name][key] = values
        if not items[name]:
            warnings.warn(f"`{name}` has no metric that is a mean over documents, so that nothing of it is reported.")
    for name, group in loaded["groups"].items():
        parts = [task.task_name for task in group.get_all_tasks()]
        common = [key for key in items[parts[0]] if all(key in items[part] for part in parts)]
        items[name] = {key: [value for part in parts for value in items[part][key]] for key in common}
        documents[name] = [document for part in parts for document in documents[part]]
    found = {}
    for name in [*loaded["groups"], *loaded["tasks"]]:
        benchmark, title = _benchmark(name), name
        if benchmark is not None:  # part of it, or all
            title = benchmark.title + ("" if name in BENCHMARKS else name.removeprefix("mmlu").replace("_", " "))
        wanted = metrics if metrics is not None else [benchmark.metric] if benchmark else list(items[name])
        for key, values in items[name].items():
            metric, label = key.split(",")[0], key.removesuffix(",none")
            if key in wanted or metric in wanted:
                full_title = f"{title} ({label.replace(',', ', ')})"
                unit = "share" if all(0 <= value <= 1 for value in values) else "score"
                better_is = "higher" if better.get(metric, True) else "lower"
                found[f"lm_eval/{name}/{label}"] = mean_of(
                    values, full_title, "benchmark", unit, better_is, documents=documents[name]
                )
    return found
