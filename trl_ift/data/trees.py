"""Preference trees: one problem, its turns of a correct and an incorrect action, and the rows that they give.

    tree_to_pairs       every turn, with the wrong actions of the turns before it in the prompt: preference rows
    tree_to_sft         the correct actions alone: prompt-completion rows
    cross_turn_pairs    correct actions against the incorrect ones of other turns: more preference rows, of one turn

The recipe is that of UltraInteract, https://huggingface.co/papers/2404.02078. A tree is a plain mapping:

    {
        "prompt": "What is 17 * 24?",               # or a list of messages
        "turns": [                                   # the first turn first
            {"chosen": "... 408.", "rejected": "... 398.", "feedback": "Wrong. Check 17 * 4."},
            {"chosen": "... 408.", "rejected": "... 418."},
        ],
        "tree_id": "0",                              # optional
    }

At each turn the correct action ends the branch; the incorrect one is answered by `feedback` (what the environment prints, and a
critique), and the next turn continues from there. The last turn needs no feedback. Actions are texts or lists of messages;
`feedback` is a text, which becomes a message of the user, or a list of messages. How actions are sampled and checked is yours.
"""

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from ..checks import check_range
from .rows import check_text


Messages = list[dict[str, Any]]


def tree_to_pairs(tree: Mapping[str, Any], max_turns: int | None = 5) -> list[dict[str, Any]]:
    """A preference row for each turn, at most `max_turns` (the paper's 5; `None` for all).

    Returns:
        Rows `prompt`, `chosen`, `rejected` (lists of messages), `turn` (from 0) and, if the tree has it, `tree_id`. The prompt
        of a turn holds the instruction, and the incorrect action and the feedback of every turn before it.

    Raises:
        ValueError, TypeError: The tree is not as described above, or a turn that is followed by another has no feedback.
    """
    prompt, turns = _checked(tree)
    if max_turns is not None:
        check_range("max_turns", max_turns, 1, integer=True)
    rows = []
    for index, turn in enumerate(turns[:max_turns]):
        rows.append(_row(tree, prompt=prompt, chosen=turn["chosen"], rejected=turn["rejected"], turn=index))
        prompt = prompt + turn["rejected"] + turn["feedback"]
    return rows


def tree_to_sft(tree: Mapping[str, Any], max_turns: int | None = None) -> list[dict[str, Any]]:
    """A prompt-completion row for the correct action of each turn, at most `max_turns`, without the turns before it.

    (In the paper this worked better than training on whole trajectories.) The same action at two turns gives one row.

    Returns:
        Rows `prompt`, `completion` (lists of messages), `turn` (from 0) and, if the tree has it, `tree_id`.
    """
    prompt, turns = _checked(tree)
    if max_turns is not None:
        check_range("max_turns", max_turns, 1, integer=True)
    rows: list[dict[str, Any]] = []
    for index, turn in enumerate(turns[:max_turns]):
        if all(turn["chosen"] != row["completion"] for row in rows):
            rows.append(_row(tree, prompt=prompt, completion=turn["chosen"], turn=index))
    return rows


def cross_turn_pairs(
    tree: Mapping[str, Any], *, seed: int = 0, max_product: int | None = 10, max_pairs: int = 9, max_uses: int = 3
) -> list[dict[str, Any]]:
    """Preference rows of one turn: correct actions against incorrect ones of other turns, in random order.

    The pairs of the same turn are those of `tree_to_pairs`. A tree of N turns has N correct and N incorrect actions. Actions
    are told apart by what they say: equal ones are one action, which is in no pair with itself, and no pair comes twice.

    Args:
        tree: The tree.
        seed: Seed of the sample.
        max_product: Trees with N * N above it give no pairs (the paper's 10); `None` for no bound.
        max_pairs: Most pairs of a tree (the paper's 9).
        max_uses: Most pairs of one action (the paper's 3).

    Returns:
        Rows `prompt` (the instruction alone), `chosen`, `rejected` (lists of messages) and, if the tree has it, `tree_id`.
    """
    prompt, turns = _checked(tree)
    for name, value in (("max_product", max_product), ("max_pairs", max_pairs), ("max_uses", max_uses)):
        if value is not None:
            check_range(name, value, 1, integer=True)
    number = len(turns)
    if max_product is not None and number * number > max_product:
        return []
    candidates = [(i, j) for i in range(number) for j in range(number) if i != j]
    random.Random(seed).shuffle(candidates)
    rows: list[dict[str, Any]] = []
    uses: dict[tuple[str, str], int] = {}
    seen = {(_key(turn["chosen"]), _key(turn["rejected"])) for turn in turns}
    for i, j in candidates:
        chosen, rejected = pair = _key(turns[i]["chosen"]), _key(turns[j]["rejected"])
        keys = (("chosen", chosen), ("rejected", rejected))
        usable = chosen != rejected and pair not in seen
        if usable and len(rows) < max_pairs and all(uses.get(key, 0) < max_uses for key in keys):
            seen.add(pair)
            uses |= {key: uses.get(key, 0) + 1 for key in keys}
            rows.append(_row(tree, prompt=prompt, chosen=turns[i]["chosen"], rejected=turns[j]["rejected"]))
    return rows


def _key(action: Messages) -> str:
    return json.dumps(action, sort_keys=True, default=str)


def _row(tree: Mapping[str, Any], **columns: Any) -> dict[str, Any]:
    return columns | ({"tree_id": tree["tree_id"]} if "tree_id" in tree else {})


def _checked(tree: Mapping[str, Any]) -> tuple[Messages, list[dict[str, Messages]]]:
    """The prompt and the turns of a tree, as messages."""
    if not isinstance(tree, Mapping):
        raise TypeError(
            f"A tree must be a mapping with 'prompt' and 'turns', found {str(tree)[:80]!r} ({type(tree).__name__})."
        )
    where = f"The tree {tree['tree_id']!r}" if "tree_id" in tree else "The tree"
    for name in ("prompt", "turns"):
        if name not in tree:
            raise ValueError(f"{where} has no {name!r}; it has {list(tree)}.")
    if not isinstance(tree["turns"], Sequence) or isinstance(tree["turns"], str) or not tree["turns"]:
        raise ValueError(f"{where}: 'turns' must be a list of one turn or more, found {tree['turns']!r}.")
    prompt = _messages(tree["prompt"], "user", where, "prompt")
    turns = []
    for index, turn in enumerate(tree["turns"]):
        if not isinstance(turn, Mapping):
            raise TypeError(
                f"{where}, turn {index}, must be a mapping with 'chosen' and 'rejected', found {str(turn)[:80]!r} "
                f"({type(turn).__name__})."
            )
        if missing := [name for name in ("chosen", "rejected") if not turn.get(name)]:
            raise ValueError(
                f"{where}, turn {index}, has no {' and no '.join(map(repr, missing))}; it has {list(turn)}."
            )
        if index + 1 < len(tree["turns"]) and not turn.get("feedback"):
            raise ValueError(
                f"{where}, turn {index}, is followed by another and has no 'feedback', which answers its rejected action. Add "
                "what the environment or a critic said."
            )
        found = {
            name: _messages(turn[name], "assistant", f"{where}, turn {index}", name) for name in ("chosen", "rejected")
        }
        if found["chosen"] == found["rejected"]:
            raise ValueError(f"{where}, turn {index}: 'chosen' and 'rejected' are the same. Drop the turn.")
        feedback = turn.get("feedback")
        found["feedback"] = _messages(feedback, "user", f"{where}, turn {index}", "feedback") if feedback else []
        turns.append(found)
    return prompt, turns


def _messages(value: Any, role: str, where: str, column: str) -> Messages:
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if isinstance(value, list) and value and all(isinstance(m, Mapping) and "role" in m for m in value):
        check_text(value, where, column)
        return [dict(message) for message in value]
    raise TypeError(
        f"{where}: {column!r} must be a text or a list of {{'role', 'content'}} messages, found {value!r}."
    )
