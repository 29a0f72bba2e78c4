"""Texts and messages of rows: what is wrong with one is said with its row and column, before anything is made of it.

first_row        of which columns and kinds are read
check_text       one value
check_texts      columns of a dataset
check_written    what a tokenizer and its chat template make of them: messages that get lost, ends within an answer
naming_the_row   around code that fails somewhere in a dataset: which row it was
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset, LargeList, List, Value
from transformers.utils import logging

from ..stages import is_main_process


_MARK = "trl-ift marks this text"
# Roles that chat templates know
_ROLES = ("system", "user", "assistant", "tool")

logger = logging.get_logger(__name__)

# A stream reads its first row from its source, and with `shuffle` a buffer of thousands
_first_rows: WeakKeyDictionary[IterableDataset, dict[str, Any]] = WeakKeyDictionary()


def first_row(dataset: Any) -> dict[str, Any]:
    """The first row of a dataset, empty where it has none; of a stream read once."""
    if not isinstance(dataset, IterableDataset):
        return next(iter(dataset), {})
    if dataset not in _first_rows:
        _first_rows[dataset] = next(iter(dataset), {})
    return dict(_first_rows[dataset])


def check_text(value: Any, where: str, column: str) -> None:
    """Raise unless `value` is a text or a list of messages.

    A message has a `role` and something to say: `content`, a text or a list of parts, or another field such as `tool_calls`.

    Args:
        value: What the column holds.
        where: How the message calls the row, e.g. "`dataset`, row 3".
        column: The column.

    Raises:
        ValueError: It is null, has no messages, or one without a role or content, or holds half of a surrogate pair.
        TypeError: It, or a part of it, is of another type.
    """
    if value is None:
        raise ValueError(
            f"{where}: column '{column}' is null. Fill it, or drop such rows: `dataset.filter(lambda row: row[{column!r}] is "
            "not None)`."
        )
    if fault := _fault(value):
        error, text = fault
        raise error(f"{where}: column '{column}' {text}. Mend or drop the row.")


def _fault(value: Any) -> tuple[type[Exception], str] | None:
    """What is wrong with a text or a list of messages, behind the name of its column."""
    if isinstance(value, str):
        return _unencodable(value)
    if not isinstance(value, list):
        found = f"{value!r:.60} ({type(value).__name__})"
        return TypeError, f"must hold a text or a list of {{'role', 'content'}} messages, found {found}"
    if not value:
        return ValueError, "holds an empty list of messages"
    for number, message in enumerate(value):
        fault = _fault_of_message(message)
        if fault is not None:
            return fault[0], f"holds a message {number} that {fault[1]}"
    return None


def _fault_of_message(message: Any) -> tuple[type[Exception], str] | None:
    if not isinstance(message, Mapping):
        return TypeError, f"is no {{'role', 'content'}} mapping: {message!r:.60} ({type(message).__name__})"
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        return ValueError, f"has no role: {dict(message)!r:.80}"
    if content is None:
        others = any(value is not None for name, value in message.items() if name != "role")
        return None if others else (ValueError, f"has the role {role!r} and no content")
    for part in content if isinstance(content, list) else [content]:
        text = part
        if isinstance(part, Mapping) and isinstance(content, list):
            # Arrow gives every part the fields of all: a null `text` is that of a part of another type
            text = part.get("text", "") if part.get("type") == "text" else part.get("text") or ""
        if not isinstance(text, str):
            return (
                TypeError,
                f"has the role {role!r} and as content no text but {content!r:.60} ({type(text).__name__})",
            )
        if (fault := _unencodable(text)) is not None:
            return fault
    return None


def _unencodable(text: str) -> tuple[type[Exception], str] | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lone = text[error.start].encode("ascii", "backslashreplace").decode()
        return (
            ValueError,
            f"holds half of a surrogate pair, {lone}, at character {error.start}, which no file can hold",
        )
    return None


def check_texts(dataset: Any, name: str, columns: Sequence[str], nullable: bool = False) -> None:
    """Check columns of texts or messages: of the first thousand rows of a stream, of all rows of a map-style dataset.

    Args:
        dataset: `Dataset` or `IterableDataset`.
        name: How the messages call it.
        columns: Columns that hold texts or messages, the same kind as in the first row.
        nullable: Whether they may be null.

    Raises:
        ValueError, TypeError: As `check_text`; or a row has texts where the first one has messages, or the other way round.
    """
    if isinstance(dataset, Dataset):
        if all(_is_sound(dataset, column, nullable) for column in columns):
            return
        rows = dataset.with_format(None).select_columns(list(columns))
    else:
        rows = dataset.take(1000)
    first: dict[str, type] = {}
    for index, row in enumerate(rows):
        for column in columns:
            value = row.get(column)
            if value is None and nullable:
                continue
            check_text(value, f"`{name}`, row {index}", column)
            if not isinstance(value, first.setdefault(column, type(value))):
                found = ("a text", "messages") if isinstance(value, str) else ("messages", "a text")
                raise TypeError(
                    f"`{name}`, row {index}: column '{column}' holds {found[0]}, and {found[1]} in a row before. Convert them "
                    "to one kind."
                )


def _is_sound(dataset: Dataset, column: str, nullable: bool) -> bool:
    """Whether a whole column is texts, or messages of texts, as `check_text` wants them; fast, without reading rows."""
    values = dataset.data.column(column)
    parts = _parts(dataset, column)
    if parts is None or (values.null_count and not nullable):
        return False
    if len(parts) == 1:
        return True
    return (
        pc.min(pc.list_value_length(values)).as_py() != 0
        and all(part.null_count == 0 for part in parts)
        and not pc.any(pc.equal(parts[1], "")).as_py()
    )


def _parts(dataset: Dataset, column: str) -> list[pa.ChunkedArray] | None:
    """A column of texts; contents and roles of all messages in it, which are texts; `None` for other columns.

    They are those of the whole table, of which the dataset may select rows.
    """
    feature, values = dataset.features[column], dataset.data.column(column)
    if _is_text(feature):
        return [values]
    message = feature.feature if isinstance(feature, List | LargeList) else None
    if not isinstance(message, dict) or not all(_is_text(message.get(name)) for name in ("content", "role")):
        return None
    flat = pc.list_flatten(values)
    return [pc.struct_field(flat, name) for name in ("content", "role")]


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def check_written(dataset: Any, name: str, columns: Sequence[str], tokenizer: Any) -> None:
    """Check what the tokenizer makes of the texts and messages of a map-style dataset (a stream passes unseen).

    A warning counts the rows whose answers (all columns but `prompt`) hold the text of the end-of-sequence token before their
    end: it becomes that token, so that the model learns to stop there, and then what stands behind it.

    Raises:
        ValueError: The chat template leaves out messages of a role.
    """
    if not isinstance(dataset, Dataset):
        return
    end, ends = tokenizer.eos_token or "", 0
    if _is_plain(dataset, columns, end, tokenizer):
        return
    roles: dict[str, tuple[int, str]] = {}
    for index, row in enumerate(dataset.with_format(None).select_columns(list(columns))):
        within = False
        start, pair = 0, (row.get("chosen"), row.get("rejected"))
        if "prompt" not in row and all(isinstance(value, str) for value in pair):
            # Both answers begin with the prompt, which may hold ends of turns
            start = next((i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), min(map(len, pair)))
        for column in columns:
            value = row[column]
            if isinstance(value, str):
                value = value[start:]
                within |= column != "prompt" and end != "" and end in value.rstrip().removesuffix(end)
                continue
            for message in value or []:
                roles.setdefault(message["role"], (index, column))
                content = message.get("content")
                spoken = message["role"] == "assistant" and isinstance(content, str) and end != ""
                within |= column != "prompt" and spoken and end in content
        ends += within
    for role, (index, column) in roles.items():
        if _leaves_out(tokenizer, role):
            raise ValueError(
                f"`{name}`, row {index}: column '{column}' holds a message of the role {role!r}, which the chat template "
                f"leaves out: the model would not see it. Rename the role ({', '.join(_ROLES)}), or change the template."
            )
    if ends and is_main_process():
        logger.warning(
            f"In {ends} of {len(dataset)} rows of `{name}` an answer holds {end!r} before its end. As the end-of-sequence "
            "token of the tokenizer it ends the answer there: the model learns to stop at it. Remove it from the text."
        )


def _is_plain(dataset: Dataset, columns: Sequence[str], end: str, tokenizer: Any) -> bool:
    """Whether no text of the columns holds `end`, and the chat template leaves nothing out; fast, without reading rows."""
    parts = [_parts(dataset, column) for column in columns]
    if any(part is None for part in parts):
        return False
    texts = [part[0] for part in parts if part]
    roles = {role for part in parts if part and len(part) == 2 for role in part[1].unique().to_pylist()}
    if end and any(pc.any(pc.match_substring(text, end)).as_py() for text in texts):
        return False
    return not any(_leaves_out(tokenizer, role) for role in roles if role is not None)


def _leaves_out(tokenizer: Any, role: str) -> bool:
    """Whether the chat template writes nothing of messages of a role. One that refuses them will say so itself."""
    marked, other = {"role": role, "content": _MARK}, {"role": "user", "content": "Hello."}
    for messages in ([other, marked], [marked, other]):  # some are written in the first place alone
        try:
            if _MARK in tokenizer.apply_chat_template(messages, tokenize=False):
                return False
        except Exception:
            return False
    return True


def head(dataset: Any, number: int) -> Any:
    """The first rows of a dataset, at most `number`. (Before datasets 5.2, `Dataset.take` fails when there are fewer.)"""
    return dataset.select(range(min(number, len(dataset)))) if isinstance(dataset, Dataset) else dataset.take(number)


def check_implicit_prompts(dataset: Any, name: str) -> None:
    """Raise if the responses of a pair without a column `prompt`, whose beginning it is, share none."""
    if hasattr(dataset, "num_rows"):
        rows = dataset.with_format(None).select_columns(["chosen", "rejected"])
    else:
        rows = dataset.take(1000)
    for index, row in enumerate(rows):
        if row["chosen"][:1] != row["rejected"][:1] or not row["chosen"]:
            raise ValueError(
                f"`{name}`, row {index}: 'chosen' and 'rejected' share no beginning, which would be the prompt. Add a column "
                "'prompt', or drop the row."
            )


def _is_own(error: Exception) -> bool:
    """Whether code of this library has raised an error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("trl_ift.")


@contextmanager
def naming_the_row(dataset: Any, name: str, columns: Sequence[str], tokenizer: Any) -> Iterator[None]:
    """When the block fails, look for a row whose texts or messages cannot be tokenized, among the first thousand; name it.

    Errors that the library itself has raised pass.

    Raises:
        ValueError: A row cannot be tokenized; the message has its number, the column and the reason.
    """
    try:
        yield
    except Exception as error:
        from ..trl_internals import tokenize

        if isinstance(error, ValueError) and _is_own(error):
            raise
        rows = dataset.with_format(None) if hasattr(dataset, "num_rows") else dataset
        for index, row in enumerate(head(rows, 1000)):
            tools = row.get("tools")
            tools = json.loads(tools) if isinstance(tools, str) else tools
            options = {"tools": tools, **(row.get("chat_template_kwargs") or {})}
            before: Any = None
            for column in columns:
                try:
                    value = row[column]
                    check_text(value, f"`{name}`, row {index}", column)
                    if column == "prompt":
                        before = value
                    whole = value if before is None or column == "prompt" else before + value
                    if type(whole) is not type(value):
                        raise TypeError("not of the kind of the prompt")
                    tokenize(tokenizer, whole, **(options if isinstance(whole, list) else {}))
                except Exception as reason:
                    text = f"{type(reason).__name__}: {reason}"
                    if isinstance(reason, ValueError | TypeError) and f"row {index}" in str(reason):
                        raise type(reason)(str(reason)) from error
                    raise ValueError(
                        f"`{name}`, row {index}: column '{column}' cannot be tokenized ({text}). Mend or drop the row."
                    ) from error
        raise
