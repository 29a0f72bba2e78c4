"""What is measured of a trained model, without a judge: on held-out data, against the model that it started from.

    preference_accuracy, reward_margin   implicit rewards log pi - log start of held-out pairs
    chosen_drift, rejected_drift         change of their log-probabilities
    forward_kl                           KL(start || model) on samples of the start, for held-out prompts
    answer_length, cut_answers           greedy answers to held-out prompts
    neutral_nll                          NLL of texts that have nothing to do with the training (forgetting)
    task/NAME                            share of right answers of a task whose answers can be verified

`evaluate_part` gives one part of these; the study keeps each part in a file of its own. Benchmarks are in `harness.py`,
judged dialogue in `judged.py`.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.answers import extract_answer
from ..data.generation import generate_completions
from ..data.inference import lent, sequence_log_probs, token_log_probs
from ..data.shards import write_file
from ..preference.trainer import prompt_and_response_ids
from ..trl_internals import tokenize
from .measures import Measure, digest_of, mean_of
from .methods import Row, as_chat


@dataclass(frozen=True)
class Task:
    """Questions with answers that can be verified.

    Attributes:
        name: Its measure is `task/NAME`.
        prompts: Questions, texts or messages.
        answers: The right answers.
        max_new_tokens: Longest reply.
        match: `"number"`: the last number of the reply is that of the answer. `"text"`: the reply is the answer, but for case
            and white space.
    """

    name: str
    prompts: tuple[Any, ...]
    answers: tuple[str, ...]
    max_new_tokens: int = 128
    match: str = "number"


@dataclass(frozen=True)
class HeldOut:
    """The held-out data of a study, as one start sees it (texts, or messages for its chat template).

    Attributes:
        pairs: Rows with `prompt`, `chosen`, `rejected`.
        kl_prompts: Prompts that the start samples for, with `kl_tokens` at most.
        answer_prompts: Prompts that are answered greedily, with `answer_tokens` at most.
        neutral: Texts for the NLL.
        tasks: Verifiable tasks.
        batch_tokens: Most tokens of a batch.
        max_length: Tokens that pairs and texts are cut to.
        seed: Seed of the samples.
    """

    pairs: tuple[Row, ...] = ()
    kl_prompts: tuple[Any, ...] = ()
    answer_prompts: tuple[Any, ...] = ()
    neutral: tuple[str, ...] = ()
    tasks: tuple[Task, ...] = ()
    kl_tokens: int = 64
    answer_tokens: int = 128
    batch_tokens: int = 8192
    max_length: int | None = None
    seed: int = 0

    def as_chat(self) -> "HeldOut":
        """The same as messages; the texts for the NLL stay as they are."""

        def chat(prompts: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(as_chat({"prompt": prompt})["prompt"] for prompt in prompts)

        tasks = tuple(Task(**(vars(task) | {"prompts": chat(task.prompts)})) for task in self.tasks)
        pairs = tuple(as_chat(row) for row in self.pairs)
        changed = {
            "pairs": pairs, "tasks": tasks, "kl_prompts": chat(self.kl_prompts),
            "answer_prompts": chat(self.answer_prompts),
        }  # fmt: skip
        return HeldOut(**(vars(self) | changed))

    def digest(self, part: str) -> str:
        """Name of the settings and data that a part of the evaluation depends on."""
        names = {
            "start": ("pairs", "kl_prompts", "kl_tokens", "max_length", "seed"),
            "pairs": ("pairs", "max_length"),
            "kl": ("kl_prompts", "kl_tokens", "seed"),
            "answers": ("answer_prompts", "answer_tokens"),
            "neutral": ("neutral", "max_length"),
            "tasks": ("tasks",),
        }[part]
        fields = asdict(self)
        return digest_of({name: fields[name] for name in names})


PARTS = ("pairs", "kl", "answers", "neutral", "tasks")


@dataclass(frozen=True)
class StartScores:
    """Log-probabilities, in nats, under the start: what a trained model is compared with.

    Attributes:
        chosen: Of the chosen answers of the held-out pairs.
        rejected: Of the rejected ones.
        samples: Samples of the start, as (prompt ids, completion ids, log-probability of each token).
    """

    chosen: tuple[float, ...]
    rejected: tuple[float, ...]
    samples: tuple[tuple[list[int], list[int], list[float]], ...]

    def save(self, path: Path) -> None:
        write_file(path, json.dumps(asdict(self)).encode())

    @classmethod
    def load(cls, path: Path) -> "StartScores":
        fields = json.loads(path.read_text(encoding="utf-8"))
        samples = tuple((prompt, completion, values) for prompt, completion, values in fields["samples"])
        return cls(tuple(fields["chosen"]), tuple(fields["rejected"]), samples)


def score_start(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, held_out: HeldOut, folder: Path
) -> StartScores:
    """Score the held-out pairs under the start, and sample its answers to the KL prompts into `folder`."""
    chosen, rejected = _pair_log_probs(model, tokenizer, held_out)
    samples: list[tuple[list[int], list[int], list[float]]] = []
    if held_out.kl_prompts:
        completions = generate_completions(
            model, _prompts(held_out.kl_prompts), folder / f"samples-{held_out.batch_tokens}", processing_class=tokenizer,
            max_new_tokens=held_out.kl_tokens, batch_tokens=held_out.batch_tokens, seed=held_out.seed, score=False,
        )  # fmt: skip
        ids = [(list(row["prompt_ids"]), list(row["completion_ids"])) for row in completions]
        ids = [(prompt, completion) for prompt, completion in ids if completion]
        scores = _completion_log_probs(model, tokenizer, ids, held_out.batch_tokens)
        samples = [(prompt, completion, values) for (prompt, completion), values in zip(ids, scores, strict=True)]
    return StartScores(tuple(chosen), tuple(rejected), tuple(samples))


def evaluate_part(
    part: str,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: HeldOut,
    start: StartScores,
    folder: Path,
) -> dict[str, Measure]:
    """
    Measure one part of `PARTS`.

    The model is given back as it was: weights, training flags, random state.

    Args:
        part: Which one.
        model: The trained model.
        tokenizer: Its tokenizer.
        held_out: The data.
        start: Scores of the model that training started from, from `score_start` with the same data.
        folder: Where generated answers are kept.

    Returns:
        Measures by name; empty if the part has no data.
    """
    functions: dict[str, Callable[..., dict[str, Measure]]] = {
        "pairs": _measure_pairs, "kl": _measure_kl, "answers": _measure_answers, "neutral": _measure_neutral,
        "tasks": _measure_tasks,
    }  # fmt: skip
    return functions[part](model, tokenizer, held_out, start, folder)


# ---------------------------------------------------------------- pairs and drift


def _measure_pairs(
    model: Any, tokenizer: Any, held_out: HeldOut, start: StartScores, folder: Path
) -> dict[str, Measure]:
    if not held_out.pairs:
        return {}
    return pair_measures(*_pair_log_probs(model, tokenizer, held_out), start, held_out.digest("pairs"))


def pair_measures(
    chosen: Sequence[float], rejected: Sequence[float], start: StartScores, documents: str | None = None
) -> dict[str, Measure]:
    """Measures of held-out pairs from the log-probabilities (nats, sums over tokens) of their answers, now and at the start.

    The accuracy is the share of pairs whose chosen answer gained more than the rejected one; one that gained the same counts
    half, so that a model that did not change has 0.5.
    """
    chosen_drift = [now - then for now, then in zip(chosen, start.chosen, strict=True)]
    rejected_drift = [now - then for now, then in zip(rejected, start.rejected, strict=True)]
    margins = [w - l for w, l in zip(chosen_drift, rejected_drift, strict=True)]  # noqa: E741
    return {
        "preference_accuracy": mean_of(
            [0.5 if margin == 0 else float(margin > 0) for margin in margins],
            "Preference accuracy", "preference", "share", "higher", documents=documents,
        ),
        "reward_margin": mean_of(margins, "Reward margin", "preference", "nats", "higher", documents=documents),
        "chosen_drift": mean_of(
            chosen_drift, "Log-prob change of chosen", "drift", "nats", documents=documents
        ),
        "rejected_drift": mean_of(
            rejected_drift, "Log-prob change of rejected", "drift", "nats", documents=documents
        ),
    }  # fmt: skip


def _pair_log_probs(model: Any, tokenizer: Any, held_out: HeldOut) -> tuple[list[float], list[float]]:
    sequences = []
    for answer in ("chosen", "rejected"):
        for row in held_out.pairs:
            prompt, response = prompt_and_response_ids(row, row[answer], tokenizer, tokenizer.eos_token)
            ids = (prompt + response)[: held_out.max_length]
            sequences.append((ids, ([-100] * len(prompt) + response)[: held_out.max_length]))
    with lent(model):
        sums = sequence_log_probs(model, sequences, held_out.batch_tokens, _pad_id(tokenizer))
    return sums[: len(held_out.pairs)], sums[len(held_out.pairs) :]


def _measure_kl(model: Any, tokenizer: Any, held_out: HeldOut, start: StartScores, folder: Path) -> dict[str, Measure]:
    if not start.samples:
        return {}
    ids = [(prompt, completion) for prompt, completion, _ in start.samples]
    now = _completion_log_probs(model, tokenizer, ids, held_out.batch_tokens)
    then = [values for _, _, values in start.samples]
    return {
        "forward_kl": mean_of(
            [forward_kl(before, after) for before, after in zip(then, now, strict=True)],
            "KL(start || model)", "drift", "nats", documents=held_out.digest("kl"),
        )
    }  # fmt: skip


def forward_kl(start: Sequence[float], model: Sequence[float]) -> float:
    """
    Estimate of KL(start || model), nats, of one sample of the start, from the log-probabilities of its tokens under both.

    For each token (r - 1) - log r with r = model / start, which is never negative, and whose mean over samples is the KL of
    the token's distribution; the KL of sequences is their sum along samples of the start.
    """
    logratios = [after - before for before, after in zip(start, model, strict=True)]
    return math.fsum(math.expm1(logratio) - logratio for logratio in logratios)


def _completion_log_probs(
    model: Any, tokenizer: Any, ids: Sequence[tuple[list[int], list[int]]], batch_tokens: int
) -> list[list[float]]:
    """Log-probability of each token of the completions."""
    sequences = [(prompt + completion, [-100] * len(prompt) + completion) for prompt, completion in ids]
    found: list[list[float]] = [[] for _ in ids]
    with lent(model):
        for index, values in token_log_probs(model, sequences, batch_tokens, _pad_id(tokenizer)):
            prompt, completion = ids[index]
            first = len(prompt) - 1
            found[index] = values[first : first + len(completion)].tolist()
    return found


# ---------------------------------------------------------------- texts and answers


def _measure_neutral(
    model: Any, tokenizer: Any, held_out: HeldOut, start: StartScores, folder: Path
) -> dict[str, Measure]:
    sequences = []
    for text in held_out.neutral:
        ids = list(tokenize(tokenizer, text)["input_ids"])[: held_out.max_length]
        if len(ids) > 1:
            sequences.append((ids, ids))
    if not sequences:
        return {}
    with lent(model):
        sums = sequence_log_probs(model, sequences, held_out.batch_tokens, _pad_id(tokenizer))
    tokens = [len(ids) - 1 for ids, _ in sequences]
    return {
        "neutral_nll": mean_of(
            [-value / number for value, number in zip(sums, tokens, strict=True)],
            "NLL of neutral text", "forgetting", "nats/token", "lower", weights=tokens,
            documents=held_out.digest("neutral"),
        )
    }  # fmt: skip


def _measure_answers(
    model: Any, tokenizer: Any, held_out: HeldOut, start: StartScores, folder: Path
) -> dict[str, Measure]:
    if not held_out.answer_prompts:
        return {}
    answers = _greedy(model, tokenizer, held_out.answer_prompts, held_out.answer_tokens, held_out, folder / "answers")
    documents = held_out.digest("answers")
    return {
        "answer_length": mean_of(
            [row["num_tokens"] for row in answers], "Answer length", "generation", "tokens", documents=documents
        ),
        "cut_answers": mean_of(
            [float(row["truncated"]) for row in answers], "Answers cut at the limit", "generation", "share",
            documents=documents,
        ),
    }  # fmt: skip


def _measure_tasks(
    model: Any, tokenizer: Any, held_out: HeldOut, start: StartScores, folder: Path
) -> dict[str, Measure]:
    found = {}
    for task in held_out.tasks:
        replies = _greedy(model, tokenizer, task.prompts, task.max_new_tokens, held_out, folder / f"task-{task.name}")
        right = {
            row["prompt_index"]: is_right(_text(row["completion"]), task.answers[row["prompt_index"]], task.match)
            for row in replies
        }
        found[f"task/{task.name}"] = mean_of(
            [float(right.get(index, False)) for index in range(len(task.prompts))],
            task.name, "task", "share", "higher", documents=digest_of(asdict(task)),
        )  # fmt: skip
    return found


def _greedy(
    model: Any, tokenizer: Any, prompts: Sequence[Any], max_new_tokens: int, held_out: HeldOut, folder: Path
) -> Dataset:
    return generate_completions(
        model, _prompts(prompts), folder, processing_class=tokenizer, max_new_tokens=max_new_tokens, temperature=0.0,
        batch_tokens=held_out.batch_tokens, score=False,
    )  # fmt: skip


def is_right(reply: str, answer: str, match: str = "number") -> bool:
    """Whether a reply gives the answer; see `Task.match`."""
    if match == "text":
        return " ".join(reply.split()).casefold() == " ".join(answer.split()).casefold()
    number = extract_answer(reply)
    return number is not None and number == extract_answer(answer)


# ---------------------------------------------------------------- small helpers


def _prompts(prompts: Sequence[Any]) -> Dataset:
    return Dataset.from_list([{"prompt": prompt} for prompt in prompts])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(message["content"] or "" for message in value)


def _pad_id(tokenizer: Any) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def measures_to_json(measures: Mapping[str, Measure]) -> dict[str, Any]:
    """Measures by name, as JSON."""
    return {name: measure.to_json() for name, measure in measures.items()}
