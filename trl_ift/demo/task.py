"""The demo's task: small sums from reasoning-gym (`chain_sum`), answered step by step.

A question reads "... arithmetic problem: 38 - 69 - 67 =". The reply to learn computes from left to right, a line a step:

    38 - 69 = -31
    -31 - 67 = -98

and the answer of a reply is the last number in it, so that any way of answering can be right.
"""

import hashlib
import re
from importlib.util import find_spec
from typing import TypedDict

from ..data.answers import extract_answer


DATASET = "reasoning-gym chain_sum"
OPTIONS = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}

_EXPRESSION = re.compile(r"-?\d+(?: [+-] \d+)+")


class Question(TypedDict):
    """A question, its answer (an integer), and the worked reply to learn."""

    question: str
    answer: str
    reply: str


def make_questions(train_rows: int, test_rows: int, seed: int) -> tuple[list[Question], list[Question]]:
    """Return training and test questions, all different from each other.

    A question's own hash decides whether it belongs to the training or the test set, so no seed and no size can bring
    one into both.

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError: There are not that many different questions.
    """
    if find_spec("reasoning_gym") is None:
        raise ImportError("the demo's questions come from reasoning-gym: run `pip install reasoning-gym`.")
    import reasoning_gym

    stream = reasoning_gym.create_dataset("chain_sum", size=100 + 20 * (train_rows + test_rows), seed=seed, **OPTIONS)
    train: list[Question] = []
    test: list[Question] = []
    seen = set()
    for entry in stream:
        question = entry["question"]
        rows, wanted = (test, test_rows) if is_test_question(question) else (train, train_rows)
        if question not in seen and len(rows) < wanted:
            seen.add(question)
            rows.append({"question": question, "answer": entry["answer"], "reply": worked_reply(question)})
        if len(train) == train_rows and len(test) == test_rows:
            return train, test
    raise ValueError(
        f"chain_sum gave only {len(train)} training and {len(test)} test questions that differ, of {train_rows} and "
        f"{test_rows} wanted. Choose a smaller `--budget`."
    )


def is_test_question(question: str) -> bool:
    """Whether a question belongs to the test set (a quarter of all do)."""
    return hashlib.sha256(question.encode()).digest()[0] % 4 == 0


def worked_reply(question: str) -> str:
    """Return the sum in `question` computed from left to right, a line a step."""
    found = _EXPRESSION.search(question)
    if found is None:
        raise ValueError(f"no sum of the form 'a + b - c' in {question!r}: another version of reasoning-gym?")
    first, *rest = found.group().split()
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {result}")
        total = result
    return "\n".join(lines)


def is_right(reply: str, answer: str) -> bool:
    """Whether the last number of `reply` is `answer`."""
    return extract_answer(reply) == answer


def to_prompt(question: Question) -> list[dict[str, str]]:
    """Return the conversation that asks the question."""
    return [{"role": "user", "content": question["question"]}]


def to_rows(questions: list[Question]) -> list[dict[str, list[dict[str, str]]]]:
    """Return the questions as conversational prompt-completion rows, as trainers take them."""
    return [{"prompt": to_prompt(q), "completion": [{"role": "assistant", "content": q["reply"]}]} for q in questions]
