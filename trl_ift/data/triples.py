"""Triples (gold, chosen, rejected) from prompts with several scored responses: the data of TPO.

`build_triples` does a dataset, `triple_of` one row, `trl-ift triples` a file. Heavy imports are local, so `--help`
answers at once.
"""

import argparse
import hashlib
import json
import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, NamedTuple

from trl_ift.data.caching import versioned
from trl_ift.scripts.train import INPUT_ERRORS, report_error, usage_error


if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset


logger = logging.getLogger(__name__)

STRATEGIES = ("best-second-worst", "best-kth-worst", "best-random")
ON_TIES = ("keep", "drop", "raise")

_PROG = "trl-ift triples"
_OUTPUTS = ("reference", "chosen", "rejected", "score_reference", "score_chosen", "score_rejected")
_REASON = "_dropped_because"  # column of the intermediate dataset; null in rows that stay
_FORMS = "a string, or a list of {'role', 'content'} messages if the prompt is one"


class _Response(NamedTuple):
    value: Any  # as it is written to the triple
    key: str  # equal for equal texts
    score: float


def build_triples(
    dataset: "Dataset | IterableDataset",
    responses_column: str = "responses",
    scores_column: str = "scores",
    strategy: str = "best-second-worst",
    *,
    k: int = 2,
    min_margin: float = 0.0,
    on_ties: str = "keep",
    gold_column: str | None = None,
    seed: int = 0,
    num_proc: int | None = None,
) -> "Dataset | IterableDataset":
    """
    Build a triple-preference dataset from prompts with scored responses.

    Rows become `prompt`, `reference` (the gold response), `chosen`, `rejected` and the scores of the three, `score_reference`
    (null with `gold_column`), `score_chosen`, `score_rejected`. Texts stay as they are; with a conversational prompt each
    response is a list of messages. Other columns are kept, except the two of responses and scores; one that has the name of an
    output is replaced.

    Responses that are blank or have no score (null, NaN) are left out. Equal texts count once, at the first one's position,
    with the mean of their scores. A row is dropped if too few responses remain (3, or 2 with `gold_column`; `k + 1` for the
    k-th best), if chosen does not score higher than rejected, or less than `min_margin` higher, or if the gold response is
    missing or is the rejected one. How many rows were dropped and why is logged (not for an `IterableDataset`, which is
    processed lazily).

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with a `prompt` (string or messages), a list of responses (strings, or with a conversational prompt also
            lists of messages) and a list of as many scores, higher is better.
        responses_column (`str`, *optional*, defaults to `"responses"`):
            Column of the responses.
        scores_column (`str`, *optional*, defaults to `"scores"`):
            Column of the scores.
        strategy (`str`, *optional*, defaults to `"best-second-worst"`):
            Which responses are gold, chosen and rejected. Gold is the best and rejected the worst; chosen is

            - `"best-second-worst"`: the second best, as in the paper; with `gold_column` the best.
            - `"best-kth-worst"`: the `k`-th best, with `gold_column` too.
            - `"best-random"`: drawn among all that are better than rejected by `min_margin` and are not gold.
        k (`int`, *optional*, defaults to `2`):
            Rank of chosen for `strategy="best-kth-worst"`, from 2.
        min_margin (`float`, *optional*, defaults to `0.0`):
            Smallest difference between the scores of chosen and rejected.
        on_ties (`str`, *optional*, defaults to `"keep"`):
            What to do if another response has the score of gold, or of chosen where it is not drawn. `"keep"`: the earlier
            response ranks higher. `"drop"`: drop the row. `"raise"`: raise. Of several worst responses the last is rejected;
            that is no tie.
        gold_column (`str`, *optional*):
            Column of gold responses from elsewhere, e.g. human solutions, used in place of the best response.
        seed (`int`, *optional*, defaults to `0`):
            Seed of `strategy="best-random"`. A draw depends on it and on the row's content alone: not on the order of the rows,
            `num_proc` or sharding.
        num_proc (`int`, *optional*):
            Number of processes.

    Returns:
        `Dataset` or `IterableDataset`, as given.

    Example:

    ```python
    from datasets import Dataset
    from trl_ift.data.triples import build_triples

    dataset = Dataset.from_list([{"prompt": "2 + 2 =", "responses": [" 4", " four", " 5"], "scores": [1.0, 0.8, 0.0]}])
    build_triples(dataset)[0]  # reference " 4", chosen " four", rejected " 5"
    ```
    """
    options = {
        "responses_column": responses_column,
        "scores_column": scores_column,
        "strategy": strategy,
        "k": k,
        "min_margin": min_margin,
        "on_ties": on_ties,
        "gold_column": gold_column,
        "seed": seed,
    }
    triples, counts = _build(dataset, options, num_proc)
    if counts is not None:
        log = logger.warning if len(triples) < counts.total() else logger.info
        log(_summary(counts, _replaced(dataset.column_names, gold_column)))
    return triples


def triple_of(
    row: Mapping[str, Any],
    *,
    responses_column: str = "responses",
    scores_column: str = "scores",
    strategy: str = "best-second-worst",
    k: int = 2,
    min_margin: float = 0.0,
    on_ties: str = "keep",
    gold_column: str | None = None,
    seed: int = 0,
) -> dict[str, Any] | str:
    """Return `reference`, `chosen`, `rejected` and their scores for one row, or why it is dropped. See `build_triples`."""
    wanted = ("prompt", responses_column, scores_column, *([gold_column] if gold_column else []))
    if missing := [column for column in wanted if column not in row]:
        raise ValueError(f"the row lacks {' and '.join(map(repr, missing))}; its columns are {list(row)}.")
    prompt = row["prompt"]
    if not isinstance(prompt, str) and not _is_messages(prompt):
        raise TypeError(
            f"'prompt' must be a string or a list of {{'role', 'content'}} messages, found {_shorten(prompt, 60)}."
        )
    chat = not isinstance(prompt, str)
    ranked = _rank(row[responses_column], row[scores_column], chat, (responses_column, scores_column))
    first = 0 if gold_column else 1  # the best place that chosen can have
    place = k - 1 if strategy == "best-kth-worst" else first
    if len(ranked) < place + 2:
        return f"fewer than {place + 2} different responses with a score"

    rejected = ranked[-1]
    candidates = ranked[first:-1] if strategy == "best-random" else ranked[place : place + 1]
    better = [response for response in candidates if response.score > rejected.score]
    if not better:
        return "chosen is not better than rejected"
    margins = [response.score - rejected.score for response in better]
    # 0.3 - 0.1 is 0.2 to the user
    wide = [r for r, m in zip(better, margins, strict=True) if m >= min_margin or math.isclose(m, min_margin)]
    if not wide:
        return f"chosen is better than rejected by less than {min_margin:g}"
    chosen = wide[_draw(seed, prompt, ranked, len(wide))] if strategy == "best-random" else wide[0]

    if gold_column:
        gold_value = _response(row[gold_column], chat, gold_column)
        if gold_value is None:
            return "the gold response is missing or blank"
        if _key(gold_value) == rejected.key:
            return "the gold response is the rejected one"
        gold_score = None
    else:
        gold_value, gold_score = ranked[0].value, ranked[0].score

    scores = [response.score for response in ranked]
    decisive = [] if strategy == "best-random" else [chosen.score]
    decisive += [] if gold_score is None else [gold_score]
    if on_ties != "keep" and any(scores.count(score) > 1 for score in decisive):
        if on_ties == "raise":
            raise ValueError(
                f"the scores {scores} are tied for gold or chosen, and `on_ties='raise'`. Break the tie in '{scores_column}', "
                "or set `on_ties` to 'drop' or 'keep'."
            )
        return "tied for gold or chosen"
    values = (gold_value, chosen.value, rejected.value, gold_score, chosen.score, rejected.score)
    return dict(zip(_OUTPUTS, values, strict=True))


# ---------------------------------------------------------------- one row


def _rank(responses: Any, scores: Any, chat: bool, columns: tuple[str, str]) -> list[_Response]:
    """The different responses with a score, best first; ties stay in the order of the row."""
    for name, value in zip(columns, (responses, scores), strict=True):
        if value is not None and not isinstance(value, list | tuple):
            raise TypeError(f"'{name}' must hold lists, one value a response, found {_shorten(value, 60)}.")
    responses = [] if responses is None else responses
    scores = [None] * len(responses) if scores is None else scores
    if len(responses) != len(scores):
        raise ValueError(
            f"'{columns[0]}' has {len(responses)} values and '{columns[1]}' has {len(scores)}. Expected one score a response; "
            "null stands for a missing one."
        )
    found: dict[str, tuple[Any, list[float]]] = {}
    for response, score in zip(responses, scores, strict=True):
        value = _response(response, chat, columns[0])
        if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
            raise TypeError(
                f"'{columns[1]}' must hold numbers, found {_shorten(score, 60)} ({type(score).__name__}). Convert them."
            )
        if value is None or score is None or score != score:
            continue
        if abs(score) > sys.float_info.max:  # integers may be too
            found_score = _shorten(score, 60)
            raise ValueError(
                f"'{columns[1]}' holds {found_score}. Scores must be finite; null stands for a missing one."
            )
        found.setdefault(_key(value), (value, []))[1].append(float(score))
    distinct = [_Response(value, key, mean(values)) for key, (value, values) in found.items()]
    return sorted(distinct, key=lambda response: -response.score)


def _response(value: Any, chat: bool, column: str) -> Any:
    """A response as it is written to the triple, or `None` if it is missing or blank."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}] if chat else value
    if not chat or not (value == [] or _is_messages(value)):
        found = f"{_shorten(value, 60)} after a {'conversational' if chat else 'string'} prompt"
        raise TypeError(f"a response in '{column}' must be {_FORMS}, found {found}.")
    if value and value[0]["role"] != "assistant":
        raise ValueError(
            f"a response in '{column}' starts with a message of the role {value[0]['role']!r}, expected 'assistant'. If it "
            "repeats the prompt, cut it off."
        )
    return value if any(_says_something(message) for message in value) else None


def _says_something(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return bool(content.strip() if isinstance(content, str) else content) or bool(message.get("tool_calls"))


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(m, Mapping) and "role" in m for m in value)


def _key(value: Any) -> str:
    """A text that is equal for equal values; fields of messages that are null count as absent."""
    if isinstance(value, str):
        return value
    messages = [{name: field for name, field in message.items() if field is not None} for message in value]
    return json.dumps(messages, sort_keys=True, default=str)


def _draw(seed: int, prompt: Any, ranked: list[_Response], n: int) -> int:
    """A uniform number in [0, n) that depends on the seed and the content of the row."""
    content = json.dumps([seed, _key(prompt), [(response.key, response.score) for response in ranked]])
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") % n


# ---------------------------------------------------------------- the dataset


def _build(dataset: Any, options: dict[str, Any], num_proc: int | None) -> tuple[Any, Counter[str] | None]:
    """Return the triples and how many rows were kept (`""`) and dropped for each reason (`None` if unknown)."""
    from datasets import Dataset, IterableDataset

    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(
            f"`dataset` must be a `Dataset` or an `IterableDataset`, got {type(dataset).__name__}. Of a dict of splits, "
            "pass one split."
        )
    _check_options(options)
    dataset = dataset.with_format(None)
    row = _first_row(dataset, options)
    consumed = [options["responses_column"], options["scores_column"]]
    features = None if dataset.features is None else _features(dataset.features, row, options)
    build = partial(versioned(_build_row), options=options)
    arguments = {"with_indices": True, "remove_columns": consumed, "features": features}
    if isinstance(dataset, IterableDataset):
        if num_proc is not None:
            raise ValueError(
                f"`num_proc={num_proc}` has no effect on an `IterableDataset`, which is processed lazily. Drop it."
            )
        return dataset.map(build, **arguments).filter(_is_kept).remove_columns(_REASON), None

    built = dataset.map(build, **arguments, num_proc=num_proc, desc="Building triples")
    reasons = built[_REASON][:]
    counts = Counter(reason or "" for reason in reasons)
    if not counts[""]:
        raise ValueError(
            f"No triple can be built. {_summary(counts)} Check the scores, or change `strategy`, `min_margin` or `on_ties`."
        )
    kept = [index for index, reason in enumerate(reasons) if reason is None]
    return built.remove_columns(_REASON).select(kept), counts


def _build_row(row: Mapping[str, Any], index: int, options: dict[str, Any]) -> dict[str, Any]:
    try:
        triple = triple_of(row, **options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"Row {index} of the dataset: {error}") from None
    if isinstance(triple, str):
        return {**dict.fromkeys(_OUTPUTS), _REASON: triple}
    return {**triple, _REASON: None}


def _is_kept(row: Mapping[str, Any]) -> bool:
    return row[_REASON] is None


def _check_options(options: Mapping[str, Any]) -> None:
    from trl_ift.checks import check_choice, check_range

    strategy = options["strategy"]
    check_choice("strategy", strategy, STRATEGIES)
    check_choice("on_ties", options["on_ties"], ON_TIES)
    check_range("min_margin", options["min_margin"], 0)
    check_range("k", options["k"], 2, integer=True)
    for name, default, user in (("k", 2, "best-kth-worst"), ("seed", 0, "best-random")):
        if options[name] != default and strategy != user:
            raise ValueError(
                f"`{name}={options[name]}` has no effect with `strategy={strategy!r}`. Drop it, or use {user!r}."
            )


def _first_row(dataset: Any, options: dict[str, Any]) -> Mapping[str, Any]:
    """Return the first row, after a check of what all rows share: the columns and their kinds."""
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError("`dataset` is empty: it has no rows. Check the split, and any filter applied before.")
    if "prompt" not in row:
        raise ValueError(
            f"`dataset` lacks the column 'prompt'; its columns are {sorted(row)}. Rename yours to 'prompt'."
        )
    for argument in ("responses_column", "scores_column", "gold_column"):
        column = options[argument]
        if column is not None and column not in row:
            raise ValueError(
                f"`dataset` lacks the column '{column}'; its columns are {sorted(row)}. Name the right one with `{argument}`."
            )
    _build_row(row, 0, options)
    return row


def _features(features: "Features", row: Mapping[str, Any], options: Mapping[str, Any]) -> "Features":
    """The features of the triples with their reason; without them, columns whose first rows are dropped get no type."""
    from datasets import Features, List, Value

    chat = not isinstance(row["prompt"], str)

    def response_feature(feature: Any) -> Any:
        if not chat:
            return Value("string")
        return List({"role": Value("string"), "content": Value("string")}) if isinstance(feature, Value) else feature

    responses = features[options["responses_column"]]
    item = response_feature(getattr(responses, "feature", responses))
    gold = response_feature(features[options["gold_column"]]) if options["gold_column"] else item
    outputs = dict(zip(_OUTPUTS, [gold, item, item, *[Value("float64")] * 3], strict=True))
    consumed = (options["responses_column"], options["scores_column"])
    others = {name: feature for name, feature in features.items() if name not in (*consumed, "prompt", *_OUTPUTS)}
    return Features({"prompt": features["prompt"], **outputs, **others, _REASON: Value("string")})


def _replaced(columns: list[str] | None, gold_column: str | None) -> list[str]:
    """Columns of the input that the triples replace."""
    return [name for name in columns or () if name in _OUTPUTS and name != gold_column]


def _summary(counts: Counter[str], replaced: list[str] | None = None) -> str:
    reasons = ", ".join(f"{number} {reason}" for reason, number in counts.most_common() if reason)
    text = f"{counts.total()} rows, {counts['']} triples, {counts.total() - counts['']} dropped"
    text += f" ({reasons})." if reasons else "."
    return text + (f" Replaced columns of the input: {', '.join(replaced)}." if replaced else "")


# ---------------------------------------------------------------- the command


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `trl-ift triples`."""
    parser = argparse.ArgumentParser(
        prog=_PROG,
        description="Build triples (gold, chosen, rejected) for TPO from prompts with scored responses. Rows that give none "
        "are dropped and counted.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dataset_name", required=True, default=argparse.SUPPRESS, help="file, folder or Hub id of the responses")
    add("--dataset_config", default=None, help="config of a dataset on the Hub")
    add("--dataset_split", default="train", help="split to use; a single file is the split train")
    add("--output", required=True, type=Path, default=argparse.SUPPRESS, help="file to write, .jsonl or .parquet")
    add("--overwrite", action="store_true", help="write over an existing output")
    add("--responses_column", default="responses", help="column with the list of responses")
    add("--scores_column", default="scores", help="column with the list of scores, higher is better")
    add("--gold_column", default=None, help="column of gold responses, in place of the best response")
    add("--strategy", default=STRATEGIES[0], choices=STRATEGIES, help="which responses are gold, chosen and rejected")
    add("--k", type=int, default=2, help="rank of chosen for best-kth-worst")
    add("--min_margin", type=float, default=0.0, help="smallest score difference between chosen and rejected")
    add("--on_ties", default="keep", choices=ON_TIES, help="rows where the score of gold or chosen is not unique")
    add("--seed", type=int, default=0, help="seed of best-random")
    parser.error = partial(usage_error, _PROG)  # type: ignore[method-assign]
    return parser


def main(argv: list[str]) -> int:
    """Run `trl-ift triples` and return its exit code."""
    args = make_parser().parse_args(argv)
    if args.output.suffix not in (".jsonl", ".parquet"):
        usage_error(_PROG, f"--output {args.output} must end in .jsonl or .parquet")
    try:
        _run(args)
    except INPUT_ERRORS as error:
        return report_error(_PROG, error)
    return 0


def _run(args: argparse.Namespace) -> None:
    output = args.output.expanduser()
    _check_output(output, Path(args.dataset_name).expanduser(), args.overwrite)
    from trl_ift.scripts.data import load_split

    dataset = load_split(args.dataset_name, args.dataset_split, args.dataset_config)
    names = ("responses_column", "scores_column", "strategy", "k", "min_margin", "on_ties", "gold_column", "seed")
    triples, counts = _build(dataset, {name: getattr(args, name) for name in names}, None)
    _write(triples, output)
    assert counts is not None  # not streamed

    print(f"{counts.total()} rows, {len(triples)} triples, {counts.total() - len(triples)} dropped")
    for reason, number in counts.most_common():
        if reason:
            print(f"  {number:>6}  {reason}")
    if replaced := _replaced(dataset.column_names, args.gold_column):
        print(f"Replaced columns of the input: {', '.join(replaced)}.")
    print(f"Written to {output}. The first triple:")
    for name in ("prompt", *_OUTPUTS):
        print(f"  {name:<15}  {_shorten(triples[0][name], 100)}")


def _check_output(output: Path, source: Path, overwrite: bool) -> None:
    if output.is_dir():
        raise ValueError(f"`--output {output}` is a folder. Name a file in it.")
    if output.exists() and source.exists() and output.samefile(source):
        raise ValueError(f"`--output {output}` is the dataset itself. Choose another file.")
    if output.exists() and not overwrite:
        raise ValueError(
            f"`--output {output}` exists already. Choose another file, or write over it with `--overwrite`."
        )


def _write(triples: Any, output: Path) -> None:
    """Write the file whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial_file = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        if output.suffix == ".parquet":
            triples.to_parquet(partial_file)
        else:  # not `to_json`, which rounds the scores
            with partial_file.open("w", encoding="utf-8") as lines:
                lines.writelines(json.dumps(row, ensure_ascii=False, default=_refuse) + "\n" for row in triples)
        os.replace(partial_file, output)
    finally:
        partial_file.unlink(missing_ok=True)


def _refuse(value: Any) -> None:
    raise TypeError(
        f"A value of type {type(value).__name__} cannot be written as JSON. Write a .parquet file, or drop its column."
    )


def _shorten(value: Any, width: int) -> str:
    text = repr(value[-1]["content"] if _is_messages(value) and "content" in value[-1] else value)
    return text if len(text) <= width else f"{text[: width - 3]}..."
