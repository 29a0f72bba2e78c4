"""Checks of a study's settings that need no model: what would fail only after hours of training is refused here.

`Study.__init__` reads the file and knows its keys; `check_settings` looks at the values, and at the data.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session

from ..checks import check_quantization
from ..trl_internals import tokenize
from .methods import Row, as_chat, unpaired_rows


if TYPE_CHECKING:
    from .plan import Start, Study

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_SEEDS = 2**32 - 1  # the largest that NumPy takes
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
_DTYPES = ("auto", "bfloat16", "float16", "float32")
_LM_EVAL = ("tasks", "limit", "num_fewshot", "batch_size", "max_length", "seed", "metrics")
# What each judge reads
_JUDGES = {
    "none": (),
    "client": ("model", "base_url", "prompts"),
    "local": ("model", "prompts"),
    "replay": ("model", "judgments", "prompts"),
}
_MAX_LENGTH = 1024  # of the configs


def check_settings(study: "Study") -> None:
    """Check the values of a study's settings, and what its data look like to each method.

    Args:
        study: The study, as its file describes it.

    Raises:
        StudyError: Something would fail later; the message says what was found, what is expected and what to change.
        ImportError: bitsandbytes is asked for and not installed.
    """
    _check_names(study)
    _check_seeds(study)
    _check_starts(study)
    _check_training(study)
    _check_model(study)
    _check_peft(study)
    _check_output_dir(study)
    _check_evaluation(study)
    _check_judged(study)
    _check_rows(study)
    _check_unpaired(study)
    _check_own_lengths(study)
    if not study.parts():
        raise _error("`evaluation` measures nothing. Name at least one part, e.g. `evaluation: {pairs: {}}`.")
    _check_judge_answers(study)


def _error(text: str) -> ValueError:
    from .plan import StudyError

    return StudyError(text)


def _section(value: Any) -> Mapping[str, Any]:
    """A section of the file; one of another type is reported where it is read."""
    return value if isinstance(value, Mapping) else {}


def _is_integer(value: Any, least: int, most: float = float("inf")) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _check_integers(given: Mapping[str, Any], where: str, least: Mapping[str, int], optional: bool = False) -> None:
    """Refuse values that are given and are no integers of at least so much; with `optional` they may be null."""
    for name, low in least.items():
        if name in given and not _is_integer(given[name], low) and not (optional and given[name] is None):
            raise _error(
                f"`{where}.{name}: {given[name]!r}` must be an integer of at least {low}. Change it, or drop it for the "
                "default."
            )


# ---------------------------------------------------------------- names, seeds, starts


def _check_names(study: "Study") -> None:
    for where, names in (("starts", study.starts), ("methods", study.arms)):
        for name in names:
            if not isinstance(name, str) or _NAME.fullmatch(name) is None:
                hint = "" if isinstance(name, str) else " Put it in quotes."
                raise _error(
                    f"`{where}`: the name {name!r} is to be part of a folder's; expected letters, digits, '-', '_' and '.', "
                    f"with no '.' in front. Change it.{hint}"
                )


def _check_seeds(study: "Study") -> None:
    if not study.seeds or not all(_is_integer(seed, 0, _SEEDS) for seed in study.seeds):
        raise _error(f"`seeds: {study.seeds}` must list integers from 0 to {_SEEDS}, such as `[0, 1, 2]`.")


def _check_starts(study: "Study") -> None:
    from .plan import _OWN_OPTIONS

    for name, written in _section(study.settings.get("starts")).items():
        chat = _section(written).get("chat", False)
        if not isinstance(chat, bool):
            raise _error(f"`starts.{name}.chat: {chat!r}` must be true or false.")
    for start in study.starts.values():
        if start.sft is None:
            continue
        where = f"starts.{start.name}.sft"
        _check_integers(start.sft, where, {"rows": 1}, optional=True)
        budget = _section(start.sft.get("budget"))
        if any(number == 0 for number in budget.values()):
            raise _error(
                f"`{where}.budget: {dict(budget)}` trains nothing. Raise it, or drop `sft` to start from the model itself."
            )
        training = start.sft.get("training")
        if training is not None and not isinstance(training, Mapping):
            raise _error(f"`{where}.training`: expected `name: value` lines, found {type(training).__name__}.")
        if own := [option for option in _OWN_OPTIONS if option in (training or {})]:
            raise _error(f"`{where}.training.{own[0]}` is set by the study itself. Drop it; the length is `budget`.")


# ---------------------------------------------------------------- training, model, adapter


def _training_sections(study: "Study") -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield "training", study.training
    for label, arm in study.arms.items():
        yield f"methods.{label}", arm.options
    for start in study.starts.values():
        if start.sft is not None:
            yield f"starts.{start.name}.sft.training", _section(start.sft.get("training"))


def _check_training(study: "Study") -> None:
    for where, given in _training_sections(study):
        _check_integers(given, where, dict.fromkeys(_BATCH, 1))
        _check_integers(given, where, {"max_length": 2}, optional=True)
        if "report_to" in given:
            _check_trackers(given["report_to"], f"{where}.report_to")


def _check_trackers(report_to: Any, where: str) -> None:
    from accelerate.utils import LoggerType
    from transformers.integrations import get_available_reporting_integrations

    names = [report_to] if isinstance(report_to, str) else report_to
    if names is None or names in (["none"], ["all"], []):
        return
    # The training logs by those of transformers, the measures by those of accelerate
    known = sorted(set(get_available_reporting_integrations()) & {kind.value for kind in LoggerType})
    if not isinstance(names, list) or (missing := [name for name in names if name not in known]):
        found = missing[0] if isinstance(names, list) else report_to
        raise _error(
            f"`{where}` names the tracker {found!r}, which is not installed here, or not known. Install it, or name some of: "
            f"{', '.join(known) or 'none is installed'}; or drop it."
        )


def _check_model(study: "Study") -> None:
    given = study.model_options
    if "dtype" in given and given["dtype"] not in _DTYPES:
        raise _error(f"`model.dtype: {given['dtype']!r}` is not known. Choose one of: {', '.join(_DTYPES)}.")
    switches = ("load_in_4bit", "load_in_8bit", "trust_remote_code")
    for name in switches:
        if not isinstance(given.get(name, False), bool):
            raise _error(f"`model.{name}: {given[name]!r}` must be true or false.")
    quantized = [name for name in switches[:2] if given.get(name)]
    if len(quantized) == 2:
        raise _error("`model`: `load_in_4bit` and `load_in_8bit` exclude each other. Drop one.")
    if quantized and study.peft is None:
        raise _error(
            f"`model.{quantized[0]}` without `peft:`: quantized weights cannot be trained themselves. Add an adapter, "
            "`peft: {r: 16}`, or drop the quantization."
        )
    if quantized:
        check_quantization(study.quantization_config())


def _check_peft(study: "Study") -> None:
    if study.peft is None:
        return
    if not isinstance(study.peft, Mapping):
        raise _error(
            f"`peft: {study.peft!r}` must hold options of LoraConfig, e.g. `peft: {{r: 16}}`; without `peft:` all weights "
            "are trained."
        )
    for name in ("task_type", "inference_mode"):
        if name in study.peft:
            raise _error(f"`peft.{name}` is set by the study itself. Drop it.")
    _check_integers(study.peft, "peft", {"r": 1})
    for name, low_open, high in (("lora_alpha", True, float("inf")), ("lora_dropout", False, 1.0)):
        value = study.peft.get(name, 0.5)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value < high or (low_open and value == 0):
            allowed = "a number above 0" if low_open else "a number from 0 to below 1"
            raise _error(f"`peft.{name}: {value!r}` must be {allowed}. Change it.")
    try:
        study.peft_config()
    except TypeError as error:
        raise _error(f"`peft`: {error}") from error


def _check_output_dir(study: "Study") -> None:
    for path in (study.output_dir, *study.output_dir.parents):
        if path.exists():
            if not path.is_dir():
                raise _error(f"`output_dir: {study.output_dir}`: `{path}` is a file. Name a folder.")
            return


# ---------------------------------------------------------------- evaluation


def _check_evaluation(study: "Study") -> None:
    given = study.evaluation
    _check_integers(study.samples, "samples", {"max_new_tokens": 1, "batch_tokens": 1})
    _check_integers(given, "evaluation", {"batch_tokens": 1, "seed": 0})
    _check_integers(given, "evaluation", {"max_length": 2}, optional=True)
    for part in ("kl", "answers"):
        _check_integers(_section(given.get(part)), f"evaluation.{part}", {"max_new_tokens": 1})
    tasks = given.get("tasks") or []
    if not isinstance(tasks, list):
        raise _error(f"`evaluation.tasks` must be a list, found {type(tasks).__name__}.")
    for task in map(_section, tasks):
        where = f"evaluation.tasks.{task.get('name')}"
        _check_integers(task, where, {"max_new_tokens": 1})
        for name, reader in (("options", "reasoning_gym"), ("answer", "data")):
            if name in task and reader not in task:
                raise _error(f"`{where}.{name}` is read with `{reader}` only, and has no effect. Drop it.")
    lm_eval = _section(given.get("lm_eval"))
    for name in lm_eval:
        if name not in _LM_EVAL:
            raise _error(f"`evaluation.lm_eval`: unknown key {name!r}. Known: {', '.join(_LM_EVAL)}.")
    _check_integers(lm_eval, "evaluation.lm_eval", {"batch_size": 1, "max_length": 2, "seed": 0})
    _check_integers(lm_eval, "evaluation.lm_eval", {"limit": 1, "num_fewshot": 0}, optional=True)


def _check_judged(study: "Study") -> None:
    given = _section(study.evaluation.get("judged"))
    judge = given.get("judge", "none")
    if not given.get("questions") or judge not in _JUDGES:
        return  # reported where the section is read
    where = "evaluation.judged"
    _check_integers(given, where, {"max_new_tokens": 1})
    _check_integers(given, where, {"rows": 1}, optional=True)
    for name in ("model", "base_url", "prompts", "judgments"):
        if name in given and name not in _JUDGES[judge]:
            readers = [other for other, reads in _JUDGES.items() if name in reads]
            raise _error(
                f"`{where}.{name}` is not read by `judge: {judge}`, only by {', '.join(readers)}. Drop it, or change `judge`."
            )
    for name in ("questions", "prompts", "judgments"):
        if given.get(name) and not Path(given[name]).is_file():
            raise _error(f"`{where}.{name}`: there is no file `{given[name]}` (in {os.getcwd()}). Correct the path.")
    from .judged import InferenceClientJudge, load_questions

    questions = len(load_questions(given["questions"]))
    if (given.get("rows") or 0) > questions:
        raise _error(
            f"`{where}.rows: {given['rows']}`, but `{given['questions']}` has {questions} questions. Lower it."
        )
    if judge == "client" and given.get("model"):
        try:
            InferenceClientJudge(given["model"], given.get("base_url"), os.environ.get("JUDGE_TOKEN"))
        except ValueError as error:
            raise _error(f"`{where}`: {error}") from error


def _check_judge_answers(study: "Study") -> None:
    """Ask the server of the judge for its models: any answer will do. Not where all is judged already."""
    given = _section(study.evaluation.get("judged"))
    url = given.get("base_url")
    if given.get("judge") != "client" or not url:
        return
    from .run import is_finished

    if all(is_finished(study, cell) for cell in study.cells()):
        return
    try:
        get_session().get(f"{url.rstrip('/')}/models", timeout=5)
    except OfflineModeIsEnabled:
        raise _error(
            f"`evaluation.judged.base_url: {url}` cannot be asked: `HF_HUB_OFFLINE` is set, which keeps huggingface_hub from "
            "calling any server. Unset it."
        ) from None
    except (HTTPError, OSError) as error:  # refused, or silent for too long
        raise _error(
            f"`evaluation.judged.base_url: {url}` does not answer ({type(error).__name__}: {error}). Start the server, or "
            "correct the address."
        ) from None


# ---------------------------------------------------------------- rows


def _check_rows(study: "Study") -> None:
    starts = list(study.starts.values())
    _check_texts(study, "train", study.rows, starts)
    _check_texts(study, "test", study.test_rows, starts)
    if trained := [start for start in starts if start.sft is not None]:
        _check_texts(study, "sft", study.sft_rows, trained)


def _check_texts(study: "Study", part: str, rows: Sequence[Row], starts: Sequence["Start"]) -> None:
    """Refuse values that are neither texts nor messages, blank answers, and rows or columns of mixed kinds."""
    named = study._named(part)
    kinds = [{column: _kind(value) for column, value in row.items()} for row in rows]
    for row, found in zip(rows, kinds, strict=True):
        for column, value in row.items():
            if found[column] is None:
                raise _error(
                    f"{named}, {_row(row)}: column {column!r} must be a text or a list of {{'role', 'content'}} messages; it "
                    f"is {value!r:.80}. Mend or drop the row."
                )
            if column != "prompt" and _is_blank(value):
                raise _error(
                    f"{named}, {_row(row)}: the answer in column {column!r} is blank: {value!r:.80}. Drop the row."
                )
    plain = next((start.name for start in starts if not start.chat), None)
    if plain is None:
        return  # all become messages
    for row, found in zip(rows, kinds, strict=True):
        if len({*found.values(), *kinds[0].values()}) > 1:
            raise _error(
                f"{named}, {_row(row)}: {', '.join(f'{column!r} holds {kind}' for column, kind in found.items())}; in the "
                f"first row, {', '.join(f'{column!r} holds {kind}' for column, kind in kinds[0].items())}. Expected texts "
                f"throughout, or messages throughout. Convert them, or set `starts.{plain}.chat: true`, which makes "
                "messages of texts."
            )


def _row(row: Row) -> str:
    """A row by its prompt: rows that cannot be used are gone already, so that its number would not be that of the file."""
    return f"the row with the prompt {row['prompt']!r:.60}"


def _kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "text"
    is_messages = (
        isinstance(value, list) and len(value) > 0 and all(isinstance(m, Mapping) and "role" in m for m in value)
    )
    return "messages" if is_messages else None


def _is_blank(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else [message.get("content") or "" for message in value]
    return not any(text if not isinstance(text, str) else text.strip() for text in texts)


def _check_unpaired(study: "Study") -> None:
    """Order the rows of KTO as they will be trained on: with too few prompts that cannot be done."""
    done = set()
    for label, arm in study.arms.items():
        if arm.method.kind != "unpaired":
            continue
        for start in study.starts.values():
            for size in study.sizes:
                for seed in study.seeds:
                    case = (start.chat, study.batch_pairs(arm), size, seed)
                    if case in done:
                        continue
                    done.add(case)
                    try:
                        unpaired_rows(study.rows_of(start, size, seed), 2 * study.batch_pairs(arm), seed)
                    except ValueError as error:
                        raise _error(f"`methods.{label}`, {size} pairs, seed {seed}: {error}") from error


# ---------------------------------------------------------------- lengths


def _check_own_lengths(study: "Study") -> None:
    """Refuse prompts without room for an answer where a method, or the SFT of a start, has a limit of its own."""
    limits = {
        f"methods.{label}.max_length": arm.options["max_length"]
        for label, arm in study.arms.items()
        if arm.options.get("max_length") is not None
    }
    used = sorted({index for seed in study.seeds for index in study._order(seed)[: max(study.sizes)]})
    for start in study.starts.values():
        if limits:
            where = min(limits, key=lambda name: limits[name])
            prompts = [(index, study.rows[index]["prompt"]) for index in used]
            _check_room(study, start, prompts, limits[where], where, "data.train")
        if start.sft is None:
            continue
        own = _section(start.sft.get("training"))
        limit = {"max_length": _MAX_LENGTH, **study.training, **own}["max_length"]
        if limit is not None:
            where = f"starts.{start.name}.sft.training.max_length" if "max_length" in own else "training.max_length"
            rows = {id(row): row for seed in study.seeds for row in study.sft_subset(start, seed)}
            prompts = [(index, row["prompt"]) for index, row in enumerate(study.sft_rows) if id(row) in rows]
            _check_room(study, start, prompts, limit, where, "data.sft")


def _check_room(
    study: "Study", start: "Start", prompts: Iterable[tuple[int, Any]], limit: int, where: str, source: str
) -> None:
    tokenizer = study.tokenizers[start.name]
    for index, prompt in prompts:
        seen = as_chat({"prompt": prompt})["prompt"] if start.chat else prompt
        options = {} if isinstance(seen, str) else {"add_generation_prompt": True}
        length = len(tokenize(tokenizer, seen, **options)["input_ids"])
        if length >= limit:
            raise _error(
                f"`{source}`, row {index}: for the start '{start.name}' the prompt has {length} tokens, which fill `{where}: "
                f"{limit}`. Raise it, or leave the row out."
            )
