"""The plan of a study: its file, the grid of its cells, and what each of them depends on.

A study trains methods from several starting points, on nested subsets of one preference set, with several seeds, and evaluates
each result in the same way. A cell is one such training; its folder is named by a digest of everything that decides its
result, so that a change of the file repeats only what it concerns.
"""

import hashlib
import math
import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from ..checks import check_choice, check_model_source, check_peft, check_range
from ..data.rows import check_text
from ..registry import METHODS, Method
from ..scripts.data import check_encoding, load_named
from ..stages import as_json, say, training_settings
from ..trl_internals import tokenize
from .evaluate import PARTS, HeldOut, Task
from .measures import digest_of
from .methods import (
    KNOWN,
    NEEDS,
    SEQUENCES,
    Row,
    as_chat,
    get_study_method,
    options_of,
    training_rows,
    unknown_options,
)


BASELINE = "start"  # the start itself, as a row of the tables
BUDGETS = ("epochs", "steps", "sequences")
_FORMAT = 1

# What the sections of a study file may hold
_STUDY = (
    "name", "output_dir", "starts", "data", "methods", "sizes", "seeds", "budget", "training", "peft", "model", "samples",
    "evaluation",
)  # fmt: skip
_START = ("model", "revision", "chat", "sft")
_SFT = ("training", "rows", "budget")
_DATA = ("train", "test", "sft", "gold", "max_tokens")
_MODEL = ("dtype", "attn_implementation", "trust_remote_code", "load_in_4bit", "load_in_8bit")
_EVALUATION = (
    "pairs", "kl", "answers", "neutral", "tasks", "lm_eval", "judged", "batch_tokens", "max_length", "seed",
)  # fmt: skip
_TASK = ("name", "data", "prompt", "answer", "match", "rows", "max_new_tokens", "reasoning_gym", "options")
_JUDGED = (
    "questions", "prompts", "judge", "model", "base_url", "judgments", "rows", "max_new_tokens",
)  # fmt: skip
# Options that the study sets itself
_OWN_OPTIONS = (
    "output_dir", "seed", "data_seed", "max_steps", "num_train_epochs", "resume_from_checkpoint", "run_name",
    "overwrite_output_dir", "push_to_hub", "hub_model_id", "hub_token", "hub_strategy", "hub_private_repo",
)  # fmt: skip


class StudyError(ValueError):
    """A study file is wrong, or does not fit its data."""


@dataclass(frozen=True)
class Start:
    """A starting point.

    Attributes:
        name: Name in the study file.
        model: Hub id or folder.
        revision: Revision on the Hub.
        chat: Whether prompts and answers that are texts are put into the model's chat template.
        sft: How the model is fine-tuned before, once a seed: `training` options, `rows`, `budget`; `None`: not at all.
    """

    name: str
    model: str
    revision: str | None = None
    chat: bool = False
    sft: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Arm:
    """A method with its options: one entry of `methods`.

    Attributes:
        label: Name in the study file.
        method: The method.
        options: Options of its config.
        budget: Training budget of this method; `None` is the study's.
    """

    label: str
    method: Method
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Cell:
    """One training and its evaluation. `key` is the digest of everything that decides the trained weights."""

    start: Start
    arm: Arm | None
    size: int
    seed: int | None
    key: str

    @property
    def label(self) -> str:
        return BASELINE if self.arm is None else self.arm.label

    @property
    def id(self) -> str:
        seed = "" if self.seed is None else f"-s{self.seed}"
        size = "" if self.arm is None else f"-{self.size}"
        return f"{self.start.name}-{self.label}{size}{seed}-{self.key[:8]}"

    def __str__(self) -> str:
        parts = [self.start.name, self.label]
        parts += [f"{self.size} pairs"] if self.arm is not None else []
        parts += [f"seed {self.seed}"] if self.seed is not None else []
        return ", ".join(parts)


class Study:
    """
    A study as its file describes it.

    Everything that can be checked without loading a model is checked here.

    Args:
        settings (`dict`): What the file holds.

    Raises:
        StudyError: The settings are wrong; the message says where, and what to change.
    """

    def __init__(self, settings: Mapping[str, Any]):
        self.settings = dict(_mapping(settings, "the study"))  # as written: paths of this machine may be in variables
        settings = _expanded(self.settings)
        _check_keys(settings, _STUDY, "the study")
        for name in ("starts", "data", "methods"):
            if not settings.get(name):
                raise StudyError(f"The study lacks `{name}:`.")
        self._identities: dict[tuple[str, str | None], str] = {}
        self.name = str(settings.get("name") or "study")
        self.output_dir = Path(settings.get("output_dir") or self.name).expanduser()
        self.starts = {name: _start(name, value) for name, value in _mapping(settings["starts"], "starts").items()}
        self.seeds = _distinct(settings.get("seeds", [0]), "seeds")
        self.sizes = _distinct(settings.get("sizes", []), "sizes")
        if not self.sizes or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in self.sizes):
            raise StudyError(f"`sizes: {self.sizes}` must list numbers of preference pairs, such as `[100, 400]`.")
        self.training = _mapping(settings.get("training") or {}, "training")
        if own := [name for name in _OWN_OPTIONS if name in self.training]:
            raise StudyError(
                f"`training.{own[0]}` is set by the study itself, or not for it. Drop it. (The length is given by `budget:`.)"
            )
        self.budget = _budget(settings.get("budget") or {"epochs": 1}, "budget")
        self.peft = settings.get("peft")
        self._methods = settings["methods"]
        self.model_options = _mapping(settings.get("model") or {}, "model")
        _check_keys(self.model_options, _MODEL, "model")
        self.samples: dict[str, Any] = {"max_new_tokens": 128, "batch_tokens": 8192}
        self.samples |= dict(_mapping(settings.get("samples") or {}, "samples"))
        _check_keys(self.samples, ("max_new_tokens", "batch_tokens"), "samples")
        self.data = _mapping(settings["data"], "data")
        _check_keys(self.data, _DATA, "data")
        check_choice("data.gold", self.data.get("gold", "reference"), ("reference", "chosen"))
        self.evaluation = _mapping(settings.get("evaluation") or {"pairs": {}}, "evaluation")
        _check_keys(self.evaluation, _EVALUATION, "evaluation")
        self.arms = {label: self._arm(label, value) for label, value in self._method_items()}
        if any(start.sft is not None for start in self.starts.values()) and not self.data.get("sft"):
            raise StudyError("A start has `sft:`, but `data:` names no `sft` dataset. Add `data: {sft: FILE}`.")

    @classmethod
    def load(cls, path: str | Path) -> "Study":
        """The study of a YAML file."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no study file `{path}`.")
        try:
            settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise StudyError(f"`{path}` is no YAML file: {error}") from None
        return cls(_mapping(settings, f"`{path}`"))

    def check(self) -> None:
        """Check models, methods, sizes and data, without loading a model.

        Raises:
            StudyError, ValueError, TypeError, ImportError, OSError: Something does not fit.
        """
        from .checks import check_settings  # it needs `StudyError`

        for start in self.starts.values():
            check_model_source(start.model, None)
        check_settings(self)
        cells = self.cells()
        for arm in self.arms.values():
            if self.peft is not None:
                check_peft(self.peft_config(), None, arm.label)
        largest = max(self.sizes)
        if largest > len(self.rows):
            raise StudyError(
                f"`sizes` asks for {largest} pairs, but {self._named('train')} has {len(self.rows)}"
                f"{self._after_filter}. Lower it."
            )
        self._check_leaks()
        self._check_lengths()
        self._check_benchmarks()
        by_key: dict[str, Cell] = {}
        for cell in cells:
            if cell.key in by_key:
                raise StudyError(
                    f"The cells '{by_key[cell.key]}' and '{cell}' are the same training, and would write the same folder. "
                    "Change the options of one, or drop it."
                )
            by_key[cell.key] = cell

    # ---------------------------------------------------------------- the file

    def _method_items(self) -> list[tuple[str, Any]]:
        methods = self._methods
        if methods == "all":
            return [(method.name, None) for method in METHODS if method.name in KNOWN.keys() - NEEDS]
        if isinstance(methods, list):
            methods = dict.fromkeys(_distinct(methods, "methods"))
        return list(_mapping(methods, "methods").items())

    def _arm(self, label: str, value: Any) -> Arm:
        options = dict(_mapping(value or {}, f"methods.{label}"))
        if label == BASELINE:
            raise StudyError(f"`methods.{BASELINE}`: this name is that of the untrained start. Choose another.")
        method = get_study_method(str(options.pop("method", label)))
        budget = options.pop("budget", None)
        if own := [name for name in _OWN_OPTIONS if name in options]:
            raise StudyError(f"`methods.{label}.{own[0]}` is set by the study itself. Drop it.")
        for where, given in ((f"methods.{label}", options), ("training", self.training)):
            if unknown := unknown_options(method.config_class, given):
                known = [f.name for f in fields(method.config_class)]
                near = get_close_matches(unknown[0], known, n=1)
                hint = f" Did you mean `{near[0]}`?" if near else ""
                hint = hint or (
                    " Options of one method belong under it, in `methods:`." if where == "training" else ""
                )
                raise StudyError(f"`{where}.{unknown[0]}` is no option of {method.config_class.__name__}.{hint}")
        if (needed := NEEDS.get(method.name)) and needed not in options:
            raise StudyError(f"`methods.{label}` needs `{needed}`, which a study cannot make of pairs. Add it there.")
        return Arm(label, method, options, None if budget is None else _budget(budget, f"methods.{label}.budget"))

    def options_as_written(self, label: str) -> dict[str, Any]:
        """The options of a method as the file has them, with the variables of the environment unread."""
        methods = self.settings["methods"]
        written = (methods.get(label) if isinstance(methods, Mapping) else None) or {}
        return {name: value for name, value in written.items() if name not in ("method", "budget")}

    def absolute_settings(self) -> dict[str, Any]:
        """The settings with variables read and paths made absolute, for a process in another folder."""
        return _absolute(_expanded(self.settings) | {"output_dir": str(self.output_dir)})

    def peft_config(self) -> Any:
        """The `LoraConfig` of `peft:`, a new one each time; `None` for full fine-tuning."""
        if self.peft is None:
            return None
        from peft import LoraConfig

        options = {"target_modules": "all-linear"} | dict(_mapping(self.peft, "peft"))
        if unknown := unknown_options(LoraConfig, options):
            raise StudyError(f"`peft.{unknown[0]}` is no option of LoraConfig.")
        return LoraConfig(task_type="CAUSAL_LM", **options)

    def model_init_kwargs(self, start: Start | None = None) -> dict[str, Any]:
        """Arguments of `from_pretrained` for the models of the study."""
        names = ("dtype", "attn_implementation", "trust_remote_code")
        kwargs = {"dtype": "float32"} | {n: self.model_options[n] for n in names if n in self.model_options}
        return kwargs if start is None or start.revision is None else kwargs | {"revision": start.revision}

    def quantization_config(self) -> Any:
        """The quantization of `model:`, or `None`."""
        from trl import ModelConfig, get_quantization_config

        names = ("load_in_4bit", "load_in_8bit", "dtype")
        return get_quantization_config(ModelConfig(**{n: v for n, v in self.model_options.items() if n in names}))

    # ---------------------------------------------------------------- data

    @cached_property
    def rows(self) -> list[Row]:
        """The preference rows that subsets are taken from: `prompt`, `chosen`, `rejected`, and `reference` for triples."""
        return self._preference_rows("train")

    @cached_property
    def test_rows(self) -> list[Row]:
        """The held-out preference rows."""
        return self._preference_rows("test") if self.data.get("test") else []

    @cached_property
    def sft_rows(self) -> list[Row]:
        """The rows that SFT starts are trained on."""
        rows, columns = self._load("sft"), ("prompt", "completion")
        _check_columns(rows, columns, self._named("sft"))
        _check_said(rows, columns, self._named("sft"))
        return self._short_enough([{name: row[name] for name in columns} for row in rows], columns[1:], "sft")

    def subset(self, size: int, seed: int) -> list[Row]:
        """`size` rows: the first of a shuffle by `seed`, so that smaller subsets lie in larger ones."""
        return [self.rows[index] for index in self._order(seed)[:size]]

    def _order(self, seed: int) -> list[int]:
        order = list(range(len(self.rows)))
        random.Random(seed).shuffle(order)
        return order

    def sft_subset(self, start: Start, seed: int) -> list[Row]:
        """The rows that an SFT start is trained on."""
        rows = list(self.sft_rows)
        random.Random(seed).shuffle(rows)
        number = (start.sft or {}).get("rows")
        if number is not None and number > len(rows):
            raise StudyError(
                f"`starts.{start.name}.sft.rows: {number}`, but {self._named('sft')} has {len(rows)}. Lower it."
            )
        return rows[:number]

    def _preference_rows(self, part: str) -> list[Row]:
        rows, columns = self._load(part), ["prompt", "chosen", "rejected"]
        _check_columns(rows, columns, self._named(part))
        if part == "train" and any(arm.method.kind == "triples" for arm in self.arms.values()):
            gold = self.data.get("gold", "reference")
            if gold not in rows[0]:
                raise StudyError(
                    f"{self._named(part)} has no column 'reference', the gold answer that triples need. Add it, or take the "
                    "chosen answer with `data: {gold: chosen}`."
                )
            rows = [row | {"reference": row[gold]} for row in rows]
            columns.append("reference")
        rows = [{name: row[name] for name in columns} for row in rows]
        _check_said(rows, columns, self._named(part))
        trainable = [row for row in rows if _is_pair(row)]  # some trainers would drop the others
        if len(trainable) < len(rows):
            say(
                f"{self._named(part)}: {len(rows) - len(trainable)} of {len(rows)} rows are left out: equal or empty answers."
            )
        if not trainable:
            raise StudyError(f"No row of {self._named(part)} has two different answers.")
        return self._short_enough(trainable, ("chosen", "rejected"), part)

    def _short_enough(self, rows: list[Row], answers: Sequence[str], part: str) -> list[Row]:
        """The rows of at most `data.max_tokens` tokens."""
        limit = self.data.get("max_tokens")
        if limit is None:
            return rows
        check_range("data.max_tokens", limit, 2, integer=True)
        short = [row for row in rows if self._longest(row, answers) <= limit]
        if not short:
            raise StudyError(f"No row of {self._named(part)} has at most `data.max_tokens: {limit}` tokens. Raise it.")
        return short

    @cached_property
    def tokenizers(self) -> dict[str, Any]:
        """Tokenizers by start."""
        from transformers import AutoTokenizer

        trust = {name: v for name, v in self.model_options.items() if name == "trust_remote_code"}
        return {
            start.name: AutoTokenizer.from_pretrained(start.model, revision=start.revision or "main", **trust)
            for start in self.starts.values()
        }

    def _longest(self, row: Row, names: Sequence[str]) -> int:
        """Tokens of the prompt with the longest of its answers, with the tokenizer that takes most."""
        answers = [_as_text(row[name]) for name in names]
        by_model = {(start.model, start.revision): self.tokenizers[start.name] for start in self.starts.values()}
        return max(
            len(tokenizer(_as_text(row["prompt"]) + answer)["input_ids"]) + 1
            for tokenizer in by_model.values()
            for answer in answers
        )

    def _load(self, part: str) -> list[Row]:
        if not self.data.get(part):
            raise StudyError(f"`data:` names no `{part}` dataset. Add `data: {{{part}: FILE}}`.")
        wanted = ("test", "validation") if part == "test" else ("train",)
        return _load_rows(self.data[part], self._named(part), wanted)

    def _named(self, part: str) -> str:
        source = self.data.get(part)
        return f"`data.{part}` ({source.get('name') if isinstance(source, Mapping) else source})"

    @property
    def _after_filter(self) -> str:
        limit = self.data.get("max_tokens")
        return "" if limit is None else f" of at most {limit} tokens (`data.max_tokens`)"

    # ---------------------------------------------------------------- held-out data

    @cached_property
    def held_out(self) -> HeldOut:
        """The held-out data, as texts or as they are."""
        settings = self.evaluation
        options = {name: settings[name] for name in ("batch_tokens", "max_length", "seed") if name in settings}
        options.setdefault("max_length", self.training.get("max_length"))
        parts: dict[str, Any] = {}
        for part, known in (
            ("pairs", ("rows",)),
            ("kl", ("rows", "max_new_tokens")),
            ("answers", ("rows", "max_new_tokens")),
        ):
            if settings.get(part) is None:
                continue
            given = _mapping(settings[part], f"evaluation.{part}")
            _check_keys(given, known, f"evaluation.{part}")
            if not self.test_rows:
                raise StudyError(f"`evaluation.{part}` needs held-out rows. Add `data: {{test: FILE}}`.")
            rows = _first(self.test_rows, given.get("rows"), f"evaluation.{part}.rows", self._named("test"))
            if part == "pairs":
                parts["pairs"] = tuple(rows)
            else:
                prompts = list({digest_of(row["prompt"]): row["prompt"] for row in rows}.values())
                parts[{"kl": "kl_prompts", "answers": "answer_prompts"}[part]] = tuple(prompts)
                if "max_new_tokens" in given:
                    parts[{"kl": "kl_tokens", "answers": "answer_tokens"}[part]] = given["max_new_tokens"]
        if settings.get("neutral") is not None:
            parts["neutral"] = tuple(self._neutral(_mapping(settings["neutral"], "evaluation.neutral")))
        parts["tasks"] = tuple(self._task(value) for value in settings.get("tasks") or [])
        _distinct([task.name for task in parts["tasks"]], "evaluation.tasks")
        return HeldOut(**parts, **options)

    def held_out_of(self, start: Start) -> HeldOut:
        """The held-out data as a start sees it."""
        return self.held_out.as_chat() if start.chat else self.held_out

    def parts(self) -> list[str]:
        """The parts of the evaluation that have data."""
        held_out = self.held_out
        has = {
            "pairs": held_out.pairs, "kl": held_out.kl_prompts, "answers": held_out.answer_prompts,
            "neutral": held_out.neutral, "tasks": held_out.tasks,
        }  # fmt: skip
        more = [part for part in ("lm_eval", "judged") if self.evaluation.get(part)]
        return [part for part in PARTS if has[part]] + more

    def part_key(self, part: str, start: Start) -> str:
        """Digest of what a part of the evaluation depends on beside the model."""
        if part in PARTS:
            held_out = self.held_out_of(start)
            return digest_of(
                [part, held_out.digest(part), held_out.digest("start") if part in ("pairs", "kl") else ""]
            )
        settings = dict(self.evaluation[part])
        files = [settings.get(name) for name in ("questions", "prompts", "judgments")]
        tasks = settings.get("tasks") or []
        files += [
            file for task in tasks if isinstance(task, Mapping) for file in (task.get("data_files") or {}).values()
        ]
        digests = {str(file): _file_digest(Path(file)) for file in files if file and Path(file).is_file()}
        return digest_of([part, _by_content(settings, digests), start.chat])

    def _neutral(self, given: Mapping[str, Any]) -> list[str]:
        _check_keys(given, ("data", "column", "rows"), "evaluation.neutral")
        if "data" not in given:
            raise StudyError("`evaluation.neutral` names no `data`.")
        rows = _load_rows(given["data"], "evaluation.neutral.data")
        column = given.get("column", "text")
        _check_columns(rows, (column,), f"`evaluation.neutral.data` ({given['data']})")
        _check_said(rows, (column,), f"`evaluation.neutral.data` ({given['data']})")
        texts = [_as_text(row[column]) for row in rows]
        return list(_first(texts, given.get("rows"), "evaluation.neutral.rows", f"`{given['data']}`"))

    def _task(self, value: Any) -> Task:
        given = _mapping(value, "evaluation.tasks")
        _check_keys(given, _TASK, "evaluation.tasks")
        name = given.get("name")
        if not isinstance(name, str) or not name.replace("_", "").replace("-", "").isalnum():
            raise StudyError(
                f"`evaluation.tasks`: a task has the name {name!r}; expected letters, digits, '-' and '_'."
            )
        where = f"evaluation.tasks.{name}"
        check_choice(f"{where}.match", given.get("match", "number"), ("number", "text"))
        if ("data" in given) == ("reasoning_gym" in given):
            raise StudyError(f"`{where}` needs either `data` (a file) or `reasoning_gym` (the name of a dataset).")
        if "reasoning_gym" in given:
            pairs = _reasoning_gym(given, where)
        else:
            rows = _load_rows(given["data"], f"{where}.data")
            answer = given.get("answer", "answer")
            _check_columns(rows, (answer,), f"`{where}.data` ({given['data']})")
            pairs = [(row, str(row[answer])) for row in rows]
        template = given.get("prompt", "{question}")
        try:
            prompts = [str(template).format(**row) for row, _ in pairs]
        except (KeyError, IndexError, ValueError) as error:
            raise StudyError(
                f"`{where}.prompt: {template!r}` does not fit the columns {sorted(pairs[0][0])}: {error}."
            ) from None
        number = given.get("rows")
        source = given.get("data") or given.get("reasoning_gym")
        prompts = list(_first(prompts, number, f"{where}.rows", f"`{source}`"))
        answers = tuple(answer for _, answer in pairs[: len(prompts)])
        options = {option: given[option] for option in ("max_new_tokens", "match") if option in given}
        return Task(name, tuple(prompts), answers, **options)

    def _check_leaks(self) -> None:
        """Refuse held-out data that are trained on."""
        trained = {_print(row["prompt"]): "data.train" for row in self.rows}
        if any(start.sft is not None for start in self.starts.values()):
            trained |= {_print(row["prompt"]): "data.sft" for row in self.sft_rows}
            trained |= {_print(row["completion"]): "data.sft" for row in self.sft_rows}
        held_out = self.held_out
        tested = {
            "data.test": [row["prompt"] for row in self.test_rows],
            "evaluation.neutral.data": held_out.neutral,
            **{f"evaluation.tasks.{task.name}": task.prompts for task in held_out.tasks},
        }
        answers = {_print(row[name]): "data.train" for row in self.rows for name in ("chosen", "rejected")}
        for where, texts in tested.items():
            known = answers | trained if where == "evaluation.neutral.data" else trained
            found = [(text, known[_print(text)]) for text in texts if _print(text) in known]
            if found:
                text, source = found[0]
                raise StudyError(
                    f"{len(found)} of {len(texts)} rows of `{where}` are in the training data too, e.g. in `{source}`: "
                    f"{_as_text(text)!r:.80}. Drop them from one of the two: a score on them says nothing."
                )

    def _check_lengths(self) -> None:
        """Refuse prompts that leave no room for an answer: some trainers drop such rows, others do not."""
        limit = self.training.get("max_length", 1024)
        if limit is None:
            return
        used = {index: self.rows[index] for seed in self.seeds for index in self._order(seed)[: max(self.sizes)]}
        self._check_room(used, limit, "train", "training.max_length")
        limit = self.held_out.max_length
        if limit is not None:
            self._check_room(dict(enumerate(self.held_out.pairs)), limit, "test", "evaluation.max_length")

    def _check_room(self, rows: Mapping[int, Row], limit: int, part: str, option: str) -> None:
        for start in self.starts.values():
            tokenizer = self.tokenizers[start.name]
            for index, text in rows.items():
                row = as_chat(text) if start.chat else text
                options = {} if isinstance(row["prompt"], str) else {"add_generation_prompt": True}
                if len(tokenize(tokenizer, row["prompt"], **options)["input_ids"]) >= limit:
                    raise StudyError(
                        f"{self._named(part)}, row {index}: for the start '{start.name}' the prompt fills "
                        f"`{option}: {limit}`. Raise it, or leave long rows out with `data: {{max_tokens: N}}`."
                    )

    def _check_benchmarks(self) -> None:
        if self.evaluation.get("lm_eval"):
            from .harness import check_tasks

            given = _mapping(self.evaluation["lm_eval"], "evaluation.lm_eval")
            if not given.get("tasks"):
                raise StudyError("`evaluation.lm_eval` names no `tasks`.")
            check_tasks(given["tasks"])
        if self.evaluation.get("judged"):
            from .judged import load_questions

            given = _mapping(self.evaluation["judged"], "evaluation.judged")
            _check_keys(given, _JUDGED, "evaluation.judged")
            if not given.get("questions"):
                raise StudyError("`evaluation.judged` names no `questions` file.")
            check_choice("evaluation.judged.judge", given.get("judge", "none"), ("none", "client", "local", "replay"))
            needs = {"client": ("model", "prompts"), "local": ("model", "prompts"), "replay": ("judgments", "prompts")}
            for name in needs.get(given.get("judge", "none"), ()):
                if not given.get(name):
                    raise StudyError(f"`evaluation.judged.judge: {given['judge']}` needs `{name}`.")
            load_questions(given["questions"])

    # ---------------------------------------------------------------- the grid

    def cells(self) -> list[Cell]:
        """All cells: the untrained starts first, then seed by seed, so that what is done first is a smaller study."""
        cells = [Cell(start, None, 0, seed, self.start_key(start, seed)) for start, seed in self.start_runs()]
        for seed in self.seeds:
            for start in self.starts.values():
                for size in sorted(self.sizes):
                    for arm in self.arms.values():
                        cells.append(Cell(start, arm, size, seed, self.cell_key(start, arm, size, seed)))
        return cells

    def start_runs(self) -> list[tuple[Start, int | None]]:
        """The starts with their seeds: `None` for one that is not trained before."""
        return [
            (start, seed)
            for start in self.starts.values()
            for seed in (self.seeds if start.sft is not None else [None])
        ]

    def start_key(self, start: Start, seed: int | None) -> str:
        """Digest of everything that decides the weights of a start."""
        base = [_FORMAT, self._identity(start), dict(self.model_options), start.chat]
        if start.sft is None:
            return digest_of([*base, "start"])
        rows = self.sft_subset(start, self._seed(seed))
        config = self.sft_config(start, self._seed(seed), "unused")
        return digest_of([*base, "sft", self._resolved(config), self._peft_key(), digest_of(rows), seed])

    def start_key_of(self, start: Start, seed: int) -> str:
        """Key of the start of a cell of that seed."""
        return self.start_key(start, seed if start.sft is not None else None)

    def cell_key(self, start: Start, arm: Arm, size: int, seed: int) -> str:
        """Digest of everything that decides the weights of a cell."""
        config = self.config(arm, size, seed, "unused")
        rows: list[Any] = [[row[name] for name in ("prompt", "chosen", "rejected")] for row in self.subset(size, seed)]
        if arm.method.kind == "triples":
            rows.append([row["reference"] for row in self.subset(size, seed)])
        sampled = arm.method.kind in ("samples", "self-play")
        generated = [self.samples, self.sizes_up_to(size)] if sampled else None
        return digest_of(
            [
                self.start_key_of(start, seed), arm.method.name, self._peft_key(), self._resolved(config),
                digest_of(rows), seed, self.steps(arm, size), generated,
            ]
        )  # fmt: skip

    def sizes_up_to(self, size: int) -> list[int]:
        """The sizes whose subsets lie in that of `size`, the smallest first."""
        return [n for n in sorted(self.sizes) if n <= size]

    def _peft_key(self) -> Any:
        peft = self.peft_config()
        return None if peft is None else as_json(peft.to_dict())

    def _identity(self, start: Start) -> str:
        source = (start.model, start.revision)
        if source not in self._identities:
            self._identities[source] = model_identity(*source)
        return self._identities[source]

    def _resolved(self, config: Any) -> dict[str, Any]:
        return as_json(training_settings(config))

    def _seed(self, seed: int | None) -> int:
        return self.seeds[0] if seed is None else seed

    # ---------------------------------------------------------------- training options

    def config(self, arm: Arm, size: int, seed: int, output_dir: str) -> Any:
        """The config of a cell's trainer."""
        budget = self.budget if arm.budget is None else arm.budget
        options = {**self.training, **options_of(arm.method), **arm.options}
        return self._config(arm.method, options, size, seed, output_dir, budget, f"methods.{arm.label}")

    def sft_config(self, start: Start, seed: int, output_dir: str) -> Any:
        """The config of the training that makes an SFT start."""
        sft = dict(start.sft or {})
        budget = _budget(sft["budget"], f"starts.{start.name}.sft.budget") if "budget" in sft else {"epochs": 1}
        options = {**self.training, **(sft.get("training") or {})}
        size = len(self.sft_subset(start, seed))
        method = get_study_method("sft")
        return self._config(method, options, size, seed, output_dir, budget, f"starts.{start.name}.sft.training")

    def _config(
        self, method: Method, options: dict[str, Any], size: int, seed: int, output_dir: str,
        budget: Mapping[str, Any], where: str,
    ) -> Any:  # fmt: skip
        batch = options.get("per_device_train_batch_size", 8)
        options["per_device_train_batch_size"] = 2 * batch if method.kind == "unpaired" else batch
        if not torch.accelerator.is_available():
            options.setdefault("use_cpu", True)
        options = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True} | options
        steps = self._steps(method.kind, size, batch, options, budget)
        try:
            # 0 steps are not trained at all; Trainer would take them for "not given"
            return method.config_class(output_dir=output_dir, seed=seed, max_steps=max(steps, 1), **options)
        except (TypeError, ValueError) as error:
            raise StudyError(f"`{where}`: {error}") from error

    def _steps(self, kind: str, size: int, batch: int, options: Mapping[str, Any], budget: Mapping[str, Any]) -> int:
        pairs = batch * options.get("gradient_accumulation_steps", 1)
        if "steps" in budget:
            return budget["steps"]
        if "sequences" in budget:
            return math.ceil(budget["sequences"] / (pairs * SEQUENCES[kind]))
        return math.ceil(budget["epochs"] * math.ceil(size / pairs))

    def steps(self, arm: Arm, size: int) -> int:
        """Optimizer steps of a cell; 0 is a cell that is not trained."""
        options = {**self.training, **options_of(arm.method), **arm.options}
        budget = self.budget if arm.budget is None else arm.budget
        return self._steps(arm.method.kind, size, options.get("per_device_train_batch_size", 8), options, budget)

    def batch_pairs(self, arm: Arm) -> int:
        """Pairs of a batch of one device."""
        return {**self.training, **options_of(arm.method), **arm.options}.get("per_device_train_batch_size", 8)

    def training_data(self, start: Start, arm: Arm, size: int, seed: int) -> Any:
        """The dataset of a cell, for all kinds but self-play."""
        rows = self.rows_of(start, size, seed)
        return training_rows(arm.method.kind, rows, self.batch_pairs(arm), seed)

    def rows_of(self, start: Start, size: int, seed: int) -> list[Row]:
        """The rows of a subset as a start sees them."""
        rows = self.subset(size, seed)
        return [as_chat(row) for row in rows] if start.chat else rows


# ---------------------------------------------------------------- reading the file


def _expanded(value: Any) -> Any:
    """Settings with `$NAME` and `${NAME}` replaced by variables of the environment."""
    if isinstance(value, Mapping):
        return {name: _expanded(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_expanded(v) for v in value]
    if not isinstance(value, str):
        return value
    text = os.path.expandvars(value)
    if missing := re.findall(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))", text):
        raise StudyError(
            f"The study names the environment variable {''.join(missing[0])}, which is not set: {value!r}."
        )
    return text


def _by_content(value: Any, digests: Mapping[str, str]) -> Any:
    """Settings with the digest of a file in the place of its path: a file that lies elsewhere is the same one."""
    if isinstance(value, Mapping):
        return {key: _by_content(v, digests) for key, v in value.items()}
    if isinstance(value, list):
        return [_by_content(v, digests) for v in value]
    return digests.get(value, value) if isinstance(value, str) else value


_PATHS = ("output_dir", "model", "train", "test", "sft", "data", "questions", "prompts", "judgments", "name")
_ROWS = ("train", "test", "sft", "data")


def _absolute(value: Any, name: str = "", files: bool = False) -> Any:
    if isinstance(value, Mapping):
        named = name in _ROWS  # else a name is that of the study, a task or a tracker
        return {
            key: v if key == "name" and not named else _absolute(v, key, files or name == "data_files")
            for key, v in value.items()
        }
    if isinstance(value, list):
        return [_absolute(v) for v in value]
    is_path = isinstance(value, str) and (name in _PATHS or files)
    return str(Path(value).resolve()) if is_path and (name == "output_dir" or Path(value).exists()) else value


def _is_pair(row: Row) -> bool:
    chosen, rejected = (_as_text(row[name]).strip() for name in ("chosen", "rejected"))
    return bool(chosen) and bool(rejected) and chosen != rejected


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise StudyError(f"{where}: expected `name: value` lines, found {type(value).__name__}.")
    return value


def _check_keys(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in given:
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise StudyError(f"{where}: unknown key {name!r}.{hint} Known: {', '.join(known)}.")


def _distinct(values: Any, where: str) -> list[Any]:
    if not isinstance(values, list):
        raise StudyError(f"`{where}: {values!r}` must be a list.")
    doubled = [value for index, value in enumerate(values) if value in values[:index]]
    if doubled:
        raise StudyError(f"`{where}` lists {doubled[0]!r} twice.")
    return values


def _start(name: str, value: Any) -> Start:
    where = f"starts.{name}"
    given = _mapping(value, where)
    _check_keys(given, _START, where)
    if not isinstance(given.get("model"), str):
        raise StudyError(f"`{where}` names no `model` (a Hub id or a folder).")
    sft = given.get("sft")
    if sft in (False, None):
        sft = None
    else:
        sft = {} if sft is True else _mapping(sft, f"{where}.sft")
        _check_keys(sft, _SFT, f"{where}.sft")
    model = str(Path(given["model"]).expanduser()) if given["model"].startswith("~") else given["model"]
    return Start(str(name), model, given.get("revision"), bool(given.get("chat", False)), sft)


def _budget(value: Any, where: str) -> dict[str, Any]:
    given = dict(_mapping(value, where))
    if len(given) != 1 or next(iter(given)) not in BUDGETS:
        raise StudyError(
            f"`{where}` must be one of `epochs`, `steps` and `sequences`, e.g. `{{epochs: 1}}`; found {given}."
        )
    ((unit, number),) = given.items()
    check_range(f"{where}.{unit}", number, 0, integer=unit != "epochs")
    return given


def _check_columns(rows: Sequence[Row], columns: Sequence[str], where: str) -> None:
    missing = [column for column in columns if column not in rows[0]]
    if missing:
        raise StudyError(
            f"{where} lacks the column {' and '.join(map(repr, missing))}; its columns are {sorted(rows[0])}. Rename or add it."
        )
    for index, row in enumerate(rows):
        for column in columns:
            if row[column] is None:
                raise StudyError(f"{where}, row {index}: column {column!r} is null. Fill it, or drop the row.")


def _check_said(rows: Sequence[Row], columns: Sequence[str], where: str) -> None:
    """Refuse what is no text and no messages; answers without messages are left out later."""
    for index, row in enumerate(rows):
        for column in columns:
            if row[column] != []:
                try:
                    check_text(row[column], f"{where}, row {index}", column)
                except (ValueError, TypeError) as error:
                    raise StudyError(str(error)) from None


def _load_rows(source: Any, where: str, wanted: Sequence[str] = ("test", "validation", "train")) -> list[Row]:
    """The rows of a file, a folder or a Hub dataset: its name, or `name`, `config` and `split`."""
    given = {"name": source} if isinstance(source, str) else _mapping(source, where)
    _check_keys(given, ("name", "config", "split"), where)
    if not given.get("name"):
        raise StudyError(f"{where} names no dataset. Add `name`: a file, a folder or a Hub id.")
    splits = load_named(str(given["name"]), given.get("config"))
    names = [given["split"]] if "split" in given else list(splits) if len(splits) == 1 else wanted
    split = next((name for name in names if name in splits), None)
    if split is None:
        raise StudyError(
            f"{where} has no split {' or '.join(map(repr, names))}; it has: {', '.join(map(repr, splits))}. Name one: "
            "`{name: ..., split: ...}`."
        )
    check_encoding(splits[split], str(given["name"]))
    rows = list(splits[split])
    if not rows:
        raise StudyError(f"{where}, split {split!r}, has no rows.")
    return rows


def _first(values: Sequence[Any], number: int | None, where: str, source: str) -> Sequence[Any]:
    if number is None:
        return values
    check_range(where, number, 1, integer=True)
    if number > len(values):
        raise StudyError(f"`{where}: {number}`, but {source} has {len(values)} rows. Lower it.")
    return values[:number]


def _reasoning_gym(given: Mapping[str, Any], where: str) -> list[tuple[Row, str]]:
    try:
        import reasoning_gym
    except ImportError:
        raise ImportError(
            f"`{where}` needs reasoning-gym. Install it with `pip install reasoning-gym`, or give `data`."
        ) from None
    options = {"size": given.get("rows", 64), "seed": 0} | dict(given.get("options") or {})
    try:
        dataset = reasoning_gym.create_dataset(given["reasoning_gym"], **options)
    except (ValueError, TypeError, AssertionError) as error:
        raise StudyError(
            f"`{where}`: reasoning-gym cannot make {given['reasoning_gym']!r} with {options}: {error}"
        ) from None
    return [({"question": entry["question"]}, str(entry["answer"])) for entry in dataset]


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(str(message.get("content") or "") for message in value)


def _print(value: Any) -> str:
    """Digest of a text but for case and white space."""
    return digest_of(" ".join(_as_text(value).split()).casefold())


# ---------------------------------------------------------------- what a model is


def model_identity(name: str, revision: str | None = None) -> str:
    """A name for the files of a model: for a folder a digest of them, else the id with the commit if that is known."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        kinds = (".json", ".safetensors", ".bin", ".jinja", ".model", ".txt", ".py")
        names = sorted(
            path.name for path in folder.iterdir() if path.suffix in kinds and path.name != "training_args.bin"
        )
        # A folder that is moved is the same model
        return digest_of([[file, _file_digest(folder / file)] for file in names])
    from huggingface_hub import hf_hub_download

    try:  # the commit that is there now, or that is in the cache
        commit = Path(hf_hub_download(name, "config.json", revision=revision)).parent.name
    except OSError as error:
        raise StudyError(f"The model `{name}` is no folder, and cannot be found on the Hub: {error}") from None
    return f"{name}@{commit}"


def _file_digest(path: Path, block: int = 65536, blocks: int = 64) -> str:
    """Digest of a file: all of it up to 4 MiB, else its size and 64 blocks spread over it."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= block * blocks:
            digest.update(file.read())
        else:
            for index in range(blocks):
                file.seek((size - block) * index // (blocks - 1))
                digest.update(file.read(block))
    return digest.hexdigest()[:16]
