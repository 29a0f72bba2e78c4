"""Judged dialogue after MT-Bench (Zheng et al. 2023, arXiv 2306.05685): two-turn answers, a judge's ratings, their means.

Three steps that exchange JSONL files. Each appends what is finished at once, and goes on there when it is called again.

generate_answers   both answers of a model to each question, at the benchmark's temperatures
judge_answers      single-answer grading by a `Judge`: a server, a chat model in memory, or stored judgments
score_judgments    the mean rating, of each turn and of each category
proxies            what can be said of the answers without a judge, under names of its own

Questions and judge prompts are files that the user names: FastChat's `question.jsonl` (reference answers in the column
`reference`) and `judge_prompts.jsonl`.
"""

import gzip
import hashlib
import json
import math
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias
from urllib.parse import urlsplit

import torch
from huggingface_hub import InferenceClient, get_token
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from peft import PeftModel
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from ..checks import check_range
from ..data.fingerprint import base_model, model_fingerprint
from ..data.inference import check_runnable, lent, load_tokenizer, tokenizer_digest
from ..data.shards import write_file
from ..trl_internals import get_config_model_id, tokenize
from .measures import Measure, digest_of, mean_of


# FastChat's; 0 is greedy
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1} | dict.fromkeys(
    ("extraction", "math", "coding", "reasoning"), 0.0
)
# Their questions are judged against the reference answer, where they have one
BY_REFERENCE = ("math", "reasoning", "coding")

Row: TypeAlias = dict[str, Any]
Messages: TypeAlias = list[dict[str, str]]
File: TypeAlias = str | os.PathLike


class JudgeError(RuntimeError):
    """A judge gave no judgment."""


def load_questions(file: File) -> list[Row]:
    """Read and check the questions of a JSONL file (`.gz` or not).

    Returns:
        Rows of `question_id`, an integer or a string; `category`; `turns`, two user messages, the second a follow-up of the
        first; and `reference`, the reference answers to both, or `None`.

    Raises:
        ValueError, FileNotFoundError: The file is not there, or a row is not such a question. The message names it.
    """
    return _check_questions(_read_rows(Path(file)), f"`{file}`")


def _check_questions(rows: Sequence[Mapping[str, Any]], name: str) -> list[Row]:
    if not rows:
        raise ValueError(f"{name} holds no questions.")
    expected: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "question_id": ("an integer or a string", lambda v: isinstance(v, int | str) and not isinstance(v, bool)),
        "category": ("a string, e.g. 'writing'", lambda v: isinstance(v, str) and v != ""),
        "turns": ("two user messages, not empty", lambda v: _is_pair(v) and all(text.strip() for text in v)),
        "reference": ("two answers, one to each turn, or null", lambda v: v is None or _is_pair(v)),
    }
    for number, row in enumerate(rows, 1):
        for column, (what, is_valid) in expected.items():
            if column not in row and column != "reference":
                raise ValueError(
                    f"{name}, question {number} lacks the column '{column}'; its columns are {sorted(row)}. Expected "
                    f"{', '.join(map(repr, expected))} (the last is optional). Rename or add it."
                )
            if not is_valid(row.get(column)):
                raise ValueError(
                    f"{name}, question {number}: '{column}' must be {what}; it is {row.get(column)!r:.80}. Mend or drop it."
                )
    if twice := [key for key, n in Counter(row["question_id"] for row in rows).items() if n > 1]:
        raise ValueError(f"{name}: the 'question_id' {twice[0]!r} occurs twice. Give each question its own.")
    return [{column: row.get(column) for column in expected} for row in rows]


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(text, str) for text in value)


# ---------------------------------------------------------------- step 1: answers


def generate_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None,
    questions: File | Sequence[Mapping[str, Any]],
    output_file: File,
    *,
    max_new_tokens: int = 1024,
    temperatures: Mapping[str, float] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    plain: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Row]:
    """Answer both turns of each question; the second turn sees the first answer.

    Samples are drawn from the model itself, at the temperature of the category: `top_k`, `top_p` and penalties of its
    `generation_config` are left aside. Each question has random numbers of its own, so that neither the order of the
    questions nor an interruption changes an answer. (Other questions beside it, or another `batch_size`, change the
    rounding of its logits, and nothing else.)

    Args:
        model: Model in memory. It is given back as it was, with its training flags and torch's random state.
        tokenizer: Tokenizer with a chat template; with `None` the model's.
        questions: File for `load_questions`, or such rows.
        output_file: JSONL file of the answers. If it holds some, made with the same arguments, the others are added.
        max_new_tokens: Most tokens of an answer. Where the model's context leaves less room, the answer is cut there.
        temperatures: Temperatures by category, which replace or extend `TEMPERATURES`; 0 is greedy.
        seed: Seed of the samples.
        batch_size: Questions answered at a time, all of one temperature: what an interruption can cost.
        plain: Whether to write the dialogue as `User: ...`, `Assistant: ...`, without a chat template; for base models.
        chat_template_kwargs: Further arguments of the chat template, e.g. `{"enable_thinking": False}`.

    Returns:
        The rows of the file, in the order of the questions: the columns of the question; `model`, its Hub id or folder;
        `answers`, without white space at the ends; `num_tokens` of each, and whether it was `truncated`; the `temperature`;
        and the `settings` that all rows share.

    Raises:
        ValueError, TypeError: Something in the input is wrong, or `output_file` holds other rows.
    """
    check_range("max_new_tokens", max_new_tokens, 1, integer=True)
    check_range("batch_size", batch_size, 1, integer=True)
    check_range("seed", seed, 0, integer=True)
    is_file = isinstance(questions, str | os.PathLike)
    rows = load_questions(questions) if is_file else _check_questions(list(questions), "`questions`")  # type: ignore
    known = {**TEMPERATURES, **(temperatures or {})}
    for category, value in known.items():
        check_range(f"temperatures[{category!r}]", value, 0)
    categories = sorted({row["category"] for row in rows})
    if unknown := [category for category in categories if category not in known]:
        raise ValueError(
            f"There is no temperature for the categories {unknown}, but for {sorted(known)}. Add them, e.g. "
            f"`temperatures={{{unknown[0]!r}: 0.7}}`."
        )
    chat = _Chat(model, tokenizer, plain, chat_template_kwargs or {})
    lengths = {row["question_id"]: len(chat.encode([_user(row["turns"][0])])) for row in rows}
    if too_long := [key for key, length in lengths.items() if length >= chat.context]:
        raise ValueError(
            f"Question {too_long[0]!r} has {lengths[too_long[0]]} tokens, and the model's context is {chat.context}: there is "
            "no room for an answer. Drop the question."
        )
    settings = {
        "model": model_fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokenizer": tokenizer_digest(chat.tokenizer),
        "questions": len(rows),
        "questions_digest": digest_of(sorted(rows, key=lambda row: str(row["question_id"]))),
        "temperatures": {category: known[category] for category in categories},
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "batch_size": batch_size,
        "plain": plain,
        "chat_template_kwargs": json.loads(json.dumps(dict(chat_template_kwargs or {}))),  # as a file gives it back
    }
    path = Path(output_file)
    done: dict[Any, Row] = {}
    for row in _resume(path):
        _check_same(path, "answers", row.get("settings"), settings)
        done[row["question_id"]] = row

    def rank(row: Row) -> tuple[float, int, str]:
        return known[row["category"]], -lengths[row["question_id"]], str(row["question_id"])

    name = get_config_model_id(base_model(model).config) or type(base_model(model)).__name__
    with lent(model), _appending(path, "answers", len(rows), len(done)) as append:
        for temperature, group in groupby(sorted(rows, key=rank), key=lambda row: known[row["category"]]):
            alike = list(group)
            for batch in (alike[start : start + batch_size] for start in range(0, len(alike), batch_size)):
                if all(row["question_id"] in done for row in batch):
                    continue
                # Also those that are done: the batches are those of an uninterrupted run, to the last bit
                for row, replies in zip(batch, _converse(chat, batch, max_new_tokens, temperature, seed), strict=True):
                    if row["question_id"] not in done:
                        texts, numbers, cuts = (list(values) for values in zip(*replies, strict=True))
                        answers = {"model": name, "answers": texts, "num_tokens": numbers, "truncated": cuts}
                        done[row["question_id"]] = row | answers | {"temperature": temperature, "settings": settings}
                        append(done[row["question_id"]])
    return [done[row["question_id"]] for row in rows]


class _Reply(NamedTuple):
    text: str
    num_tokens: int
    truncated: bool


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _converse(
    chat: "_Chat", rows: Sequence[Row], max_new_tokens: int, temperature: float, seed: int
) -> list[tuple[_Reply, ...]]:
    """Both replies to each question."""
    dialogues: list[Messages] = [[] for _ in rows]
    turns = []
    for turn in (0, 1):
        for dialogue, row in zip(dialogues, rows, strict=True):
            dialogue.append(_user(row["turns"][turn]))
        names = [f"{seed}/{json.dumps(row['question_id'])}/{turn}" for row in rows]
        seeds = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big") for name in names]
        turns.append(chat.replies(dialogues, max_new_tokens, temperature, seeds))
        for dialogue, reply in zip(dialogues, turns[-1], strict=True):
            dialogue.append({"role": "assistant", "content": reply.text})
    return list(zip(*turns, strict=True))


class _GumbelNoise(LogitsProcessor):
    """Makes the argmax of each row a sample, by random numbers of its own: those of `generate` are a batch's."""

    def __init__(self, temperature: float, seeds: Sequence[int]):
        self.temperature = temperature
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        drawn = [torch.empty(scores.shape[1]).exponential_(generator=generator) for generator in self.generators]
        noise = -torch.stack(drawn).clamp_min(torch.finfo(torch.float32).tiny).log()
        return scores.float() / self.temperature + noise.to(scores.device)


_NEXT_USER = "\nUser:"  # where a plain answer ends


class _Chat:
    """A model that replies to messages. Call `replies` within `lent(model)`."""

    def __init__(self, model: Any, tokenizer: Any, plain: bool, template_kwargs: Mapping[str, Any]):
        if not isinstance(model, PreTrainedModel | PeftModel):
            raise TypeError(
                f"`model` is a {type(model).__name__}; expected a `PreTrainedModel` or a `PeftModel` in memory. Load it with "
                "`AutoModelForCausalLM.from_pretrained(...)`."
            )
        check_runnable(model)
        self.model, self.plain, self.template_kwargs = model, plain, template_kwargs
        if tokenizer is None and not get_config_model_id(base_model(model).config):
            raise ValueError(
                "The model was built in memory, so its tokenizer cannot be found. Pass it as `tokenizer`."
            )
        self.tokenizer = load_tokenizer(model, tokenizer, {})
        if not plain and self.tokenizer.chat_template is None:
            raise ValueError(
                "The tokenizer has no chat template: it is not known how the model wants to be asked. Use the tokenizer of a "
                "chat model, set `tokenizer.chat_template`, or, for the answers of a base model, pass `plain=True`."
            )
        configured = base_model(model).generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}
        if not ends:
            raise ValueError(
                "Neither the tokenizer nor the model's `generation_config` has an end-of-sequence token: no answer would "
                "ever end. Set `tokenizer.eos_token`."
            )
        self.end_ids = sorted(ends)
        self.pad_id = self.end_ids[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        positions = getattr(base_model(model).config.get_text_config(), "max_position_embeddings", None)
        self.context = math.inf if positions is None else positions

    def encode(self, messages: Messages) -> list[int]:
        """Token ids up to where the reply begins."""
        if not self.plain:
            options = {"add_generation_prompt": True, **self.template_kwargs}
            return list(tokenize(self.tokenizer, messages, **options)["input_ids"])
        lines = [f"{message['role'].title()}: {message['content']}\n\n" for message in messages]
        return list(self.tokenizer("".join(lines) + "Assistant:")["input_ids"])

    def replies(
        self, dialogues: Sequence[Messages], max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[_Reply]:
        """A reply to each dialogue; an empty one where the context is full."""
        prompts = [self.encode(dialogue) for dialogue in dialogues]
        rooms = [int(min(max_new_tokens, self.context - len(prompt))) for prompt in prompts]
        together = [index for index, room in enumerate(rooms) if room == max_new_tokens]
        # One by one: a limit of its own must not become that of the batch
        alone = [[index] for index, room in enumerate(rooms) if 0 < room < max_new_tokens]
        found = [_Reply("", 0, True)] * len(prompts)
        for indices in [together, *alone] if together else alone:
            noise = [_GumbelNoise(temperature, [seeds[index] for index in indices])] if temperature else []
            sampled = self._generate([prompts[index] for index in indices], rooms[indices[0]], noise)
            for index, ids in zip(indices, sampled, strict=True):
                found[index] = self._read(ids)
        return found

    def _generate(self, prompts: list[list[int]], max_new_tokens: int, noise: list[_GumbelNoise]) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = [[self.pad_id] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        options: dict[str, Any] = {"eos_token_id": self.end_ids, "pad_token_id": self.pad_id, "do_sample": False}
        if self.plain:
            options["stop_strings"] = [_NEXT_USER]
        output = self.model.generate(
            input_ids=torch.tensor(ids, device=self.model.device),
            attention_mask=torch.tensor(mask, device=self.model.device),
            generation_config=GenerationConfig(max_new_tokens=max_new_tokens, **options),
            logits_processor=LogitsProcessorList(noise),
            **({"tokenizer": self.tokenizer} if self.plain else {}),
        )
        return output[:, width:].tolist()

    def _read(self, ids: list[int]) -> _Reply:
        """The reply that token ids spell, without what stands behind its end."""
        end = next((position for position, token in enumerate(ids) if token in self.end_ids), None)
        ids = ids if end is None else ids[: end + 1]
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        stopped = self.plain and _NEXT_USER in text
        if stopped:
            text = text.partition(_NEXT_USER)[0]
            ids = [token for token in ids if token != self.pad_id]
        return _Reply(text.strip(), len(ids), end is None and not stopped)


# ---------------------------------------------------------------- judges


class Judge(Protocol):
    """What judges: anything with this method. The files call it by its attribute `name`, else by its class."""

    def judge(self, messages: Messages) -> str:
        """Return the judgment, with a rating such as `[[8]]`, that answers the messages (`system`, if any, and `user`)."""
        ...


class InferenceClientJudge:
    """A judge behind a chat-completions interface, called by [`~huggingface_hub.InferenceClient`].

    A server that is busy, broken or silent is asked again, after pauses that double, of a minute at most; one that cannot be
    reached at the first call is not. The token is in no file, log, message or `repr`.

    Args:
        model: Model that judges.
        base_url: An OpenAI-compatible server, e.g. `"http://localhost:8000/v1"`. By default Hugging Face's Inference
            Providers, with the token that the machine is logged in with.
        token: Token, or key, for the server. With a `base_url` and without `token`, none is sent.
        max_tokens: Most tokens of a judgment.
        temperature: Temperature; `None` leaves it to the server, which some models ask for.
        retries: How often a call is repeated.
        timeout: Seconds of silence after which a call has failed.
        backoff: Seconds before the first repetition.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        token: str | None = None,
        max_tokens: int = 2048,
        temperature: float | None = 0.0,
        retries: int = 5,
        timeout: float = 120.0,
        backoff: float = 1.0,
    ):
        check_range("max_tokens", max_tokens, 1, integer=True)
        check_range("retries", retries, 0, integer=True)
        check_range("timeout", timeout, 0, low_open=True)
        check_range("backoff", backoff, 0)
        if temperature is not None:
            check_range("temperature", temperature, 0)
        url = urlsplit("http://default" if base_url is None else base_url)
        if url.scheme not in ("http", "https") or not url.hostname or "@" in url.netloc or url.query:
            raise ValueError(
                "`base_url` must be the address of a server, such as 'http://localhost:8000/v1', without user, password and "
                "query, because messages show it. Pass a key as `token`."
            )
        self.name, self.base_url, self.max_tokens, self.temperature = model, base_url, max_tokens, temperature
        self.retries, self.timeout, self.backoff = retries, timeout, backoff
        token = token or (get_token() if base_url is None else None)
        if token is None and base_url is None:
            raise ValueError(
                "There is no token for Hugging Face's Inference Providers. Pass `token`, run `hf auth login`, or name another "
                "server by `base_url`."
            )
        # Else the client would send the token of the machine's login to any server
        headers: Any = {"authorization": None} if token is None else None
        self._client = InferenceClient(base_url=base_url, token=token, timeout=timeout, headers=headers)
        self._has_answered = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}(model={self.name!r}, base_url={self.base_url!r})"

    def judge(self, messages: Messages) -> str:
        """Ask the server. Raises `JudgeError` if it does not answer, refuses, or answers with something else."""
        for attempt in range(self.retries + 1):
            try:
                reply = self._client.chat_completion(
                    list(messages), model=self.name, max_tokens=self.max_tokens, temperature=self.temperature
                )
                self._has_answered = True
                return reply.choices[0].message.content or ""
            except OfflineModeIsEnabled:
                reason = "`HF_HUB_OFFLINE` is set, which keeps huggingface_hub from calling any server. Unset it."
                again, pause = False, 0.0
            except HTTPError as error:
                reason, again, pause = self._explain(error)
            except (ValueError, TypeError, AttributeError, LookupError) as error:
                reason = f"no chat completion came back ({self._shown(error)}). Check `base_url`, `model` and `token`."
                again, pause = False, 0.0
            if not again or attempt == self.retries:
                break
            time.sleep(min(60.0, max(self.backoff * 2**attempt, pause)))
        server = "Hugging Face's Inference Providers" if self.base_url is None else f"`base_url={self.base_url!r}`"
        raise JudgeError(f"The judge {self.name!r} at {server} does not answer (calls: {attempt + 1}): {reason}")

    def _shown(self, error: Exception) -> str:
        text = " ".join(str(error).split())
        return (text.replace(self._client.token, "***") if self._client.token else text)[:300]  # servers quote tokens

    def _explain(self, error: HTTPError) -> tuple[str, bool, float]:
        """Why a call failed, whether it may be repeated, and the seconds that the server asks for."""
        text = self._shown(error)
        if (response := getattr(error, "response", None)) is not None:
            again = response.status_code in (408, 409, 425, 429) or response.status_code >= 500
            wait = response.headers.get("retry-after", "")
            remedy = "" if again else " Check `model`, `token` and `base_url`."
            return f"HTTP {response.status_code}: {text}.{remedy}", again, float(wait) if wait.isdecimal() else 0.0
        kind = type(error.__cause__ or error).__name__
        if kind in ("ConnectError", "ConnectTimeout"):
            reason = f"it cannot be reached ({kind}: {text}). Start the server, or correct `base_url`."
            return reason, self._has_answered, 0.0
        if "Timeout" in kind:
            return f"silence for `timeout={self.timeout:g}` seconds. Raise `timeout`.", True, 0.0
        return f"the connection broke ({kind}: {text}).", True, 0.0


class LocalJudge:
    """A chat model in memory that judges, by greedy decoding. It is given back as it was after each judgment.

    Args:
        model: The model.
        tokenizer: Tokenizer with a chat template; with `None` the model's.
        max_new_tokens: Most tokens of a judgment.
    """

    def __init__(self, model: Any, tokenizer: Any = None, max_new_tokens: int = 2048):
        check_range("max_new_tokens", max_new_tokens, 1, integer=True)
        self._chat, self.max_new_tokens = _Chat(model, tokenizer, False, {}), max_new_tokens
        source = get_config_model_id(base_model(model).config) or type(base_model(model)).__name__
        self.name = f"{source}@{model_fingerprint(model)}"

    def judge(self, messages: Messages) -> str:
        """Generate the judgment. Raises `JudgeError` if the messages leave no room for one in the model's context."""
        if (length := len(self._chat.encode(messages))) >= self._chat.context:
            raise JudgeError(
                f"The prompt has {length} tokens, and the context of the judge {self.name!r} is {self._chat.context}. Use a "
                "judge with a longer context, or answers with a smaller `max_new_tokens`."
            )
        with lent(self._chat.model):
            return self._chat.replies([messages], self.max_new_tokens, 0.0, [0])[0].text


class ReplayJudge:
    """Gives stored judgments again, found by the user prompt: it holds the answers, and its form tells the turn.

    Args:
        file: JSONL file of `judge_answers`, or FastChat's: `question_id`, `turn`, `user_prompt`, `judgment`.
        model: The model whose answers were judged, where the file has several; by default all.
    """

    def __init__(self, file: File, model: str | None = None):
        self._file = file
        rows = _read_judgments(Path(file), ("question_id", "turn", "user_prompt", "judgment"), model)
        self.name = f"{', '.join(sorted(set(map(_judge_of, rows))))} (replayed)"
        self._stored: dict[str, list[Row]] = {}
        for row in rows:
            self._stored.setdefault(row["user_prompt"], []).append(row)

    def judge(self, messages: Messages) -> str:
        """Return the stored judgment. Raises `JudgeError` if there is none, or several whose ratings differ."""
        found = self._stored.get(messages[-1]["content"], [])
        if not found:
            raise JudgeError(
                f"`{self._file}` holds no judgment with this user prompt. It has to be of the same questions and answers, "
                "with the same judge prompts."
            )
        if len({parse_rating(row["judgment"]) for row in found}) > 1:
            raise JudgeError(
                f"`{self._file}` holds {len(found)} judgments with this user prompt, and their ratings differ. Name the "
                "model that was judged: `ReplayJudge(file, model=...)`."
            )
        return found[0]["judgment"]


# ---------------------------------------------------------------- step 2: judgments


def judge_answers(answers_file: File, judge: Judge, output_file: File, *, prompts: File) -> list[Row]:
    """Have a judge rate each answer from 1 to 10: single-answer grading.

    First turns are judged with the prompt `single-v1`, second ones with `single-v1-multi-turn`; answers to questions on
    math, reasoning and coding that have a reference answer with `single-math-v1` and `single-math-v1-multi-turn`.

    Args:
        answers_file: What `generate_answers` wrote, complete.
        judge: Called once for each turn of each question.
        output_file: JSONL file of the judgments. If it holds some, by the same judge of the same answers, the others are
            added.
        prompts: JSONL file of the judge's prompts: `name`, `system_prompt` and `prompt_template`.

    Returns:
        The rows of the file, by question and turn: `question_id`, `category`, `turn` (1 or 2), `model`, `judge` (its name and
        that of the prompt), `user_prompt`, `judgment`, `score` (`parse_rating` of it), and `total`, the number of rows of the
        complete file.

    Raises:
        JudgeError: The judge gave no judgment. What is finished is kept; the message says how to go on.
        ValueError, TypeError: Something in the input is wrong, or `output_file` holds other rows.
    """
    if not callable(getattr(judge, "judge", None)):
        raise TypeError(
            f"`judge` is a {type(judge).__name__}; expected an object with a method `judge(messages) -> str`, such as "
            "`InferenceClientJudge`, `LocalJudge` or `ReplayJudge`."
        )
    answers, templates, path = _read_answers(Path(answers_file)), _load_prompts(Path(prompts)), Path(output_file)
    judge_name = str(getattr(judge, "name", type(judge).__name__))
    wanted: dict[tuple[Any, Any], tuple[Row, Messages]] = {}
    for answer in answers:
        for turn in (1, 2):
            prompt_name, messages = _judge_prompt(answer, turn, templates)
            row = {name: answer[name] for name in ("question_id", "category", "model")}
            row |= {"turn": turn, "judge": [judge_name, prompt_name], "user_prompt": messages[-1]["content"]}
            wanted[row["question_id"], turn] = row | {"total": 2 * len(answers)}, messages
    done: dict[tuple[Any, Any], Row] = {}
    for row in _resume(path):
        key = (row.get("question_id"), row.get("turn"))
        expected = wanted[key][0] if key in wanted else {"question_id": [key for key, _ in wanted]}
        _check_same(path, "judgments", row, expected)
        done[key] = row

    with _appending(path, "judgments", len(wanted), len(done)) as append:
        for key, (row, messages) in wanted.items():
            if key in done:
                continue
            try:
                judgment = judge.judge(messages)
            except Exception as error:
                raise JudgeError(
                    f"No judgment of question {key[0]!r}, turn {key[1]}. {error} What is finished is kept: {len(done)} of "
                    f"{len(wanted)} judgments in `{path}`. To go on, run the same again."
                ) from error
            if not isinstance(judgment, str):
                raise TypeError(f"`{judge_name}.judge` returned a {type(judgment).__name__}; expected a string.")
            done[key] = row | {"judgment": judgment, "score": parse_rating(judgment)}
            append(done[key])
    return [done[key] for key in wanted]


def _judge_prompt(answer: Row, turn: int, templates: Mapping[str, Row]) -> tuple[str, Messages]:
    """Name of the prompt, and the messages for the judge."""
    references = answer.get("reference") if answer["category"] in BY_REFERENCE else None
    name = ("single-math-v1" if references else "single-v1") + ("-multi-turn" if turn == 2 else "")
    if name not in templates:
        raise ValueError(
            f"`prompts` lacks the judge prompt '{name}', which question {answer['question_id']!r} needs; it has "
            f"{sorted(templates)}. Use FastChat's `judge_prompts.jsonl`."
        )
    pairs = {"question": answer["turns"], "answer": answer["answers"], "ref_answer": references or ()}
    values = {f"{prefix}_{number}": text for prefix, pair in pairs.items() for number, text in enumerate(pair, 1)}
    values |= {"question": answer["turns"][0], "answer": answer["answers"][0]}
    try:
        prompt = templates[name]["prompt_template"].format(**values)
    except (LookupError, ValueError, AttributeError) as error:
        raise ValueError(
            f"The judge prompt '{name}' cannot be filled in ({type(error).__name__}: {error}). Its `prompt_template` may hold "
            f"{', '.join(f'{{{value}}}' for value in values)}; double other braces."
        ) from None
    system = templates[name].get("system_prompt")
    return name, [*([{"role": "system", "content": system}] if system else []), _user(prompt)]


def _load_prompts(path: Path) -> dict[str, Row]:
    rows = _read_rows(path)
    for number, row in enumerate(rows, 1):
        if not all(isinstance(row.get(column), str) for column in ("name", "prompt_template")):
            raise ValueError(
                f"`{path}`, row {number}: a judge prompt has the strings 'name', 'system_prompt' and 'prompt_template'; the "
                f"columns are {sorted(row)}. Use FastChat's `judge_prompts.jsonl`."
            )
    return {row["name"]: row for row in rows}


# ---------------------------------------------------------------- step 3: scores


def parse_rating(text: str) -> float:
    """The first `[[x]]` of a judgment, else the first `[x]`, else -1, as FastChat reads it; x need not be in 1 to 10."""
    match = re.search(r"\[\[(\d+\.?\d*)\]\]", text) or re.search(r"\[(\d+\.?\d*)\]", text)
    return float(match[1]) if match else -1.0


def score_judgments(judgments_file: File, *, model: str | None = None) -> dict[str, Measure]:
    """Mean ratings, read anew from the judgments; those without a rating (-1) have weight 0, and are counted.

    Args:
        judgments_file: What `judge_answers` wrote, complete, or FastChat's judgments.
        model: The model whose answers were judged, where the file has several.

    Returns:
        `mt_bench/score` over both turns, `mt_bench/turn_1`, `mt_bench/turn_2` and `mt_bench/<category>`, from 1 to 10, with an
        item for each (question, turn); `mt_bench/unrated`, the share of judgments without a rating. NaN is a mean of nothing.

    Raises:
        ValueError: The file is incomplete, or mixes models or judges.
    """
    path = Path(judgments_file)
    rows = _read_judgments(path, ("question_id", "turn", "judgment"), model)
    models, judges = sorted({str(row.get("model")) for row in rows}), sorted(set(map(_judge_of, rows)))
    if len(models) > 1:
        raise ValueError(f"`{path}` holds judgments of several models: {models}. Choose one, `model={models[0]!r}`.")
    if len(judges) > 1:
        raise ValueError(f"`{path}` holds judgments by several judges: {judges}. Score each in a file of its own.")
    if len(rows) != (total := rows[0].get("total", len(rows))):
        raise ValueError(
            f"`{path}` holds {len(rows)} of {total} judgments: it was interrupted. Run `judge_answers` again with the same "
            "arguments to finish it."
        )
    rows.sort(key=lambda row: (isinstance(row["question_id"], str), row["question_id"], row["turn"]))
    ratings = [parse_rating(row["judgment"]) for row in rows]
    if unrated := ratings.count(-1):
        warnings.warn(f"{unrated} of {len(rows)} judgments in `{path}` hold no rating: they are left out.")
    if odd := sum(rating > 10 or -1 < rating < 1 for rating in ratings):
        warnings.warn(
            f"{odd} of {len(rows)} ratings in `{path}` are not in 1 to 10; they are used as the benchmark does."
        )

    def mean(what: str, **columns: Any) -> Measure:
        chosen = [i for i, row in enumerate(rows) if columns.items() <= row.items()]
        title, of = f"MT-Bench rating by {judges[0]}, {what}", [documents[i] for i in chosen]
        rated = [float(ratings[i] != -1) for i in chosen]
        values = [max(ratings[i], 0.0) for i in chosen]  # any number does where the weight is 0
        return mean_of(values, title, "judge", "score", "higher", None if all(rated) else rated, documents=of)

    documents = [[row["question_id"], row["turn"]] for row in rows]
    measures = {"mt_bench/score": mean("both turns")}
    for turn in sorted({row["turn"] for row in rows}):
        measures[f"mt_bench/turn_{turn}"] = mean(f"turn {turn}", turn=turn)
    for category in dict.fromkeys(row["category"] for row in rows if "category" in row):
        measures[f"mt_bench/{category}"] = mean(category, category=category)
    title, lacking = f"judgments by {judges[0]} without a rating", [rating == -1 for rating in ratings]
    measures["mt_bench/unrated"] = mean_of(lacking, title, "judge", "share", "lower", documents=documents)
    return measures


def proxies(answers_file: File, references: File | Mapping[Any, Any] | None = None) -> dict[str, Measure]:
    """What can be said of the answers without a judge. None of it is, or stands for, an MT-Bench score.

    Args:
        answers_file: What `generate_answers` wrote, complete.
        references: Reference answers to both turns by `question_id`, or a file for `load_questions`; by default those of the
            questions that were answered.

    Returns:
        With an item for each (question, turn): `answers/tokens`, the mean length; `answers/empty` and `answers/truncated`, the
        shares of empty answers and of those cut at the limit; `answers/repetition`, the mean share of an answer's word 4-grams
        that repeat an earlier one; and, of the answers with a reference, `answers/token_f1`, F1 of the words (lower case,
        without punctuation), and, if rouge_score is installed, `answers/rouge_l`, ROUGE-L's F1 of stemmed words.
    """
    rows = sorted(_read_answers(Path(answers_file)), key=lambda row: str(row["question_id"]))
    if isinstance(references, str | os.PathLike):
        references = {row["question_id"]: row["reference"] for row in load_questions(references)}
    elif references is None:
        references = {row["question_id"]: row.get("reference") for row in rows}
    turns = [(row, turn) for row in rows for turn in (0, 1)]
    compared = [(row, turn) for row, turn in turns if references.get(row["question_id"]) is not None]
    pairs = [(row["answers"][turn], references[row["question_id"]][turn]) for row, turn in compared]

    def mean(title: str, items: Any, unit: str = "share", better: str | None = "lower", of: Any = turns) -> Measure:
        documents = [[row["question_id"], turn + 1] for row, turn in of]
        return mean_of(items, title, "answers", unit, better, documents=documents)

    texts = [row["answers"][turn] for row, turn in turns]
    measures = {
        "answers/tokens": mean("length of the answers", [r["num_tokens"][t] for r, t in turns], "tokens", None),
        "answers/empty": mean("empty answers", [not text for text in texts]),
        "answers/truncated": mean("answers cut at the limit", [r["truncated"][t] for r, t in turns]),
        "answers/repetition": mean("repeated word 4-grams", map(_repetition, texts)),
    }
    if pairs:
        f1 = [_token_f1(*pair) for pair in pairs]
        measures["answers/token_f1"] = mean("word F1 against the references", f1, better="higher", of=compared)
    if pairs and find_spec("rouge_score") is not None:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rougeL"], use_stemmer=True)
        rouge = [scorer.score(reference, answer)["rougeL"].fmeasure for answer, reference in pairs]
        measures["answers/rouge_l"] = mean("ROUGE-L against the references", rouge, better="higher", of=compared)
    return measures


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _token_f1(answer: str, reference: str) -> float:
    found, wanted = Counter(_words(answer)), Counter(_words(reference))
    return 2 * (found & wanted).total() / max(found.total() + wanted.total(), 1)


def _repetition(text: str, size: int = 4) -> float:
    words = _words(text)
    grams = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


# ---------------------------------------------------------------- files


def _read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file, `.gz` or not."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file `{path}`.")
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows, lines = [], data.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            cut = " It was cut off: run the step that writes the file again." if number == len(lines) else ""
            raise ValueError(f"`{path}`, line {number} is not JSON ({error}).{cut}") from None
        if not isinstance(rows[-1], dict):
            raise ValueError(f"`{path}`, line {number} holds a {type(rows[-1]).__name__}; expected a JSON object.")
    return rows


def _need(path: Path, rows: Sequence[Row], columns: Sequence[str], writer: str) -> None:
    for number, row in enumerate(rows, 1):
        if missing := [column for column in columns if column not in row]:
            raise ValueError(
                f"`{path}`, row {number} lacks {', '.join(map(repr, missing))}; its columns are {sorted(row)}. Expected a file "
                f"that `{writer}` wrote."
            )


def _read_answers(path: Path) -> list[Row]:
    """The answers of a file, which has to be complete."""
    rows = _read_rows(path)
    columns = ("question_id", "category", "turns", "model", "answers", "num_tokens", "truncated", "settings")
    _need(path, rows, columns, "generate_answers")
    total = rows[0]["settings"]["questions"] if rows else "some"
    if len(rows) != total:
        raise ValueError(
            f"`{path}` holds the answers to {len(rows)} of {total} questions: it was interrupted. Run `generate_answers` again "
            "with the same arguments to finish it."
        )
    return rows


def _read_judgments(path: Path, columns: Sequence[str], model: str | None) -> list[Row]:
    rows = _read_rows(path)
    _need(path, rows, columns, "judge_answers")
    found = [row for row in rows if model in (None, row.get("model"))]
    if not found:
        models = sorted({str(row.get("model")) for row in rows})
        raise ValueError(f"`{path}` holds no judgments of the model {model!r}, but of {models}.")
    keys = Counter((row["question_id"], row["turn"], row.get("model"), _judge_of(row)) for row in found)
    if twice := [key for key, n in keys.items() if n > 1]:
        raise ValueError(f"`{path}` holds question {twice[0][0]!r}, turn {twice[0][1]!r} twice. Drop one of the rows.")
    return found


def _judge_of(row: Row) -> str:
    judge = row.get("judge")
    return str(judge[0] if isinstance(judge, list) and judge else judge)


def _resume(path: Path) -> list[Row]:
    """The rows that are finished. A last line that was cut off is removed from the file."""
    if path.suffix == ".gz":
        raise ValueError(f"`output_file='{path}'` cannot be compressed: rows are appended to it. Drop the '.gz'.")
    if not path.exists():
        return []
    data = path.read_bytes()
    head, newline, tail = data.rpartition(b"\n")
    if tail:
        try:
            json.loads(tail)
            write_file(path, data + b"\n")
        except ValueError:
            write_file(path, head + newline)
    rows = _read_rows(path)
    counts = Counter((row.get("question_id"), row.get("turn")) for row in rows)
    if twice := [key for key, n in counts.items() if n > 1]:
        raise ValueError(f"`{path}` holds question {twice[0][0]!r} twice: did two runs write to it? Delete the file.")
    return rows


def _check_same(path: Path, what: str, found: Any, now: Mapping[str, Any]) -> None:
    """Raise if a row that is there was not made as those to come."""
    found = found if isinstance(found, dict) else {}
    differing = [f"{k}={found.get(k)!r:.120} (now {v!r:.120})" for k, v in now.items() if found.get(k) != v]
    if differing:
        raise ValueError(
            f"`output_file='{path}'` holds {what} that were made with {', '.join(differing)}. Choose another `output_file`, "
            "or, to go on there, give the same again."
        )


@contextmanager
def _appending(path: Path, what: str, total: int, done: int) -> Iterator[Callable[[Row], None]]:
    """Give a function that appends a row, and has it on the disk when it returns; with a bar over the rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file, tqdm(total=total, initial=done, unit=what[:-1], desc=what.title()) as bar:

        def append(row: Row) -> None:
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            bar.update()

        try:
            yield append
        except KeyboardInterrupt:
            print(f"\nInterrupted. Finished {what} are kept in {path}; to go on, run the same again.", file=sys.stderr)
            raise
