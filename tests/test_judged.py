"""Judged dialogue: answers, judges (a real server on the loopback interface among them), ratings; each step interrupted."""

import gzip
import json
import logging
import math
import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from trl_ift.study import judged
from trl_ift.study.judged import (
    InferenceClientJudge,
    JudgeError,
    LocalJudge,
    ReplayJudge,
    generate_answers,
    judge_answers,
    load_questions,
    parse_rating,
    proxies,
    score_judgments,
)
from trl_ift.study.statistics import paired_difference


DATA = Path(os.environ.get("TRL_IFT_TEST_DATA", Path(__file__).parent.parent.parent / "shared" / "data")) / "eval"
TOKEN = "sk-0123456789abcdefghij"


def question(key, category, first, second, reference=None):
    return {"question_id": key, "category": category, "turns": [first, second], "reference": reference}


QUESTIONS = [
    question(1, "writing", "Name a colour.", "Name another {one}."),
    question(2, "math", "What is two plus two?", "And what comes after four?", ["Four.", "Five."]),
    question(3, "extraction", "Who wrote Hamlet?", "When?"),
    question("four", "roleplay", "You are a spider. How many legs have you?", "Are you sure?", ["Eight.", "Yes."]),
    question(5, "coding", "Is water wet?", "Write that in C."),
    question(6, "stem", "Where do fish live?", "Why?"),
    question(7, "reasoning", "What comes after Monday?", "And then?", ["Tuesday.", "Wednesday."]),
]
PROMPTS = [
    {"name": "single-v1", "system_prompt": "Be kind.", "prompt_template": "Q {question} A {answer} rate [[x]]"},
    {
        "name": "single-v1-multi-turn",
        "system_prompt": "",
        "prompt_template": "Q1 {question_1} A1 {answer_1} Q2 {question_2} A2 {answer_2}",
    },
    {
        "name": "single-math-v1",
        "system_prompt": "Be exact.",
        "prompt_template": "Q {question} R {ref_answer_1} A {answer}",
    },
    {
        "name": "single-math-v1-multi-turn",
        "system_prompt": "Be exact.",
        "prompt_template": "Q1 {question_1} R1 {ref_answer_1} Q2 {question_2} R2 {ref_answer_2} A1 {answer_1} A2 {answer_2}",
    },
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def model(tokenizer):
    """A model with likely and unlikely tokens, that drops out in training. It is shared: it has to come back as it was."""
    model = tiny.model("llama", tokenizer, attention_dropout=0.3)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)
    return model


@pytest.fixture(scope="module")
def generate(model, tokenizer):
    def call(output_file, questions=QUESTIONS, **options):
        options = {"max_new_tokens": 10, "batch_size": 2} | options
        return generate_answers(options.pop("model", model), tokenizer, questions, output_file, **options)

    return call


@pytest.fixture(scope="module")
def answers_file(tmp_path_factory, generate):
    """Answers to `QUESTIONS`, complete. Do not change it."""
    path = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    generate(path)
    return path


@pytest.fixture
def prompts(tmp_path):
    return write(tmp_path / "prompts.jsonl", PROMPTS)


class Rater:
    """Rates by the length of the prompt; fails at the calls that are named; remembers what it was asked."""

    name = "rater"

    def __init__(self, fails_at=None, error=None):
        self.fails_at, self.error, self.asked = fails_at, error or OSError("out of tokens"), []

    def judge(self, messages):
        if len(self.asked) == self.fails_at:
            raise self.error
        self.asked.append(messages)
        return f"Rating: [[{len(messages[-1]['content']) % 10 + 1}]]"


# ---------------------------------------------------------------- questions


@pytest.mark.parametrize("compressed", [False, True])
def test_questions_are_read(compressed, tmp_path):
    rows = [row | {"source": "dropped"} for row in QUESTIONS[:2]] + [{**QUESTIONS[2]}]
    del rows[2]["reference"]
    path = write(tmp_path / "questions.jsonl", rows)
    if compressed:
        path = tmp_path / "questions.jsonl.gz"
        path.write_bytes(gzip.compress((tmp_path / "questions.jsonl").read_bytes()))
    assert load_questions(path) == QUESTIONS[:3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question_id": 1.5}, "question 2: 'question_id' must be an integer or a string; it is 1.5"),
        ({"question_id": True}, "'question_id' must be an integer or a string; it is True"),
        ({"question_id": 1}, "the 'question_id' 1 occurs twice"),
        ({"category": ""}, "'category' must be a string, e.g. 'writing'; it is ''"),
        ({"turns": ["Only one."]}, r"'turns' must be two user messages, not empty; it is \['Only one.'\]"),
        ({"turns": ["One.", " "]}, "'turns' must be two user messages, not empty"),
        ({"turns": "ab"}, "'turns' must be two user messages"),
        ({"reference": ["Four."]}, r"'reference' must be two answers, one to each turn, or null; it is \['Four.'\]"),
        (
            {"turns": ...},
            r"question 2 lacks the column 'turns'; its columns are \['category', 'question_id', 'reference'\]",
        ),
    ],
)
def test_a_wrong_question_is_named(change, message, tmp_path):
    row = {name: value for name, value in (QUESTIONS[1] | change).items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        load_questions(write(tmp_path / "questions.jsonl", [QUESTIONS[0], row]))


def test_files_that_are_no_questions(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file .*missing.jsonl"):
        load_questions(tmp_path / "missing.jsonl")
    for text, message in (
        ("", "holds no questions"),
        ('{"a": 1}\n{"b": \n{}\n', "line 2 is not JSON"),
        ('{"a": 1}\n{"b"', "line 2 is not JSON .* It was cut off"),
        ("[1]\n", "line 1 holds a list; expected a JSON object"),
    ):
        path = tmp_path / "questions.jsonl"
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_questions(path)


# ---------------------------------------------------------------- answers


def alone(model, tokenizer, messages, max_new_tokens=10):
    """The greedy reply, of `generate` itself."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**ids, max_new_tokens=max_new_tokens, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return tokenizer.decode(output, skip_special_tokens=True).strip()


def test_answers_and_what_the_second_turn_sees(answers_file, model, tokenizer):
    rows = {row["question_id"]: row for row in read(answers_file)}
    assert set(rows) == {row["question_id"] for row in QUESTIONS}
    for expected in QUESTIONS:
        row = rows[expected["question_id"]]
        assert {name: row[name] for name in expected} == expected
        first, second = ({"role": "user", "content": text} for text in expected["turns"])
        dialogue = [first, {"role": "assistant", "content": row["answers"][0]}, second]
        greedy = [alone(model, tokenizer, [first]), alone(model, tokenizer, dialogue)]
        if row["temperature"] == 0:
            assert row["answers"] == greedy
            # It does depend on the first answer
            assert alone(model, tokenizer, [first, {"role": "assistant", "content": "Yes."}, second]) != greedy[1]
        elif row["temperature"] == 0.7:
            assert row["answers"] != greedy
        assert all(n == 10 for n, cut in zip(row["num_tokens"], row["truncated"], strict=True) if cut)
    assert {row["category"]: row["temperature"] for row in rows.values()} == {
        "writing": 0.7, "roleplay": 0.7, "stem": 0.1, "math": 0, "extraction": 0, "coding": 0, "reasoning": 0,
    }  # fmt: skip


def test_the_benchmarks_temperatures():
    assert judged.TEMPERATURES == {
        "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
        "humanities": 0.1,
    }  # fmt: skip


def test_samples_have_the_probabilities_of_the_temperature():
    logits, n = torch.tensor([1.0, 0.0, -1.0, 2.0, -math.inf]), 20_000
    noise = judged._GumbelNoise(0.7, range(n))
    for _ in range(2):  # a second token is as good as the first
        drawn = noise(torch.zeros(n, 1), logits.expand(n, -1)).argmax(-1)
        found = drawn.bincount(minlength=5) / n
        torch.testing.assert_close(found, (logits / 0.7).softmax(-1), atol=0.012, rtol=0)


def test_neither_order_nor_seed_of_others_matters(answers_file, generate, tmp_path):
    stored = {row["question_id"]: row["answers"] for row in read(answers_file)}
    turned = generate(tmp_path / "turned.jsonl", QUESTIONS[::-1])
    assert [row["question_id"] for row in turned] == [row["question_id"] for row in QUESTIONS[::-1]]
    assert {row["question_id"]: row["answers"] for row in turned} == stored
    torch.manual_seed(99)
    reseeded = {row["question_id"]: row for row in generate(tmp_path / "seed.jsonl", seed=1, batch_size=7)}
    for key, row in reseeded.items():
        assert (row["answers"] == stored[key]) == (row["temperature"] == 0), key
    # Two turns of one question, and two questions, draw different numbers
    same = [question(key, "writing", "Name a colour.", "Name a colour.") for key in (1, "1", 2)]
    rows = generate(tmp_path / "same.jsonl", same)
    assert len({answer for row in rows for answer in row["answers"]}) == 6


def interrupted(monkeypatch, call, calls, error):
    """Run `call` until the chat has replied `calls` times."""
    replies, count = judged._Chat.replies, iter(range(1000))

    def failing(self, *args):
        if next(count) == calls:
            raise error
        return replies(self, *args)

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(judged._Chat, "replies", failing)
        call()


@pytest.mark.parametrize("calls", [0, 1, 2, 5])
def test_interrupted_answers_go_on(calls, answers_file, generate, tmp_path, monkeypatch, capsys):
    path = tmp_path / "new" / "answers.jsonl"
    interrupted(monkeypatch, lambda: generate(path), calls, KeyboardInterrupt())
    assert f"Finished answers are kept in {path}; to go on, run the same again" in capsys.readouterr().err
    rows = read(path)
    assert len(rows) == calls // 2 * 2  # batches of two, each of two turns
    generate(path)
    assert path.read_bytes() == answers_file.read_bytes()
    interrupted(monkeypatch, lambda: [generate(path), 1 / 0], 0, ZeroDivisionError())  # nothing is generated again


@pytest.mark.parametrize("cut", [1, 2, 40, None])
def test_a_cut_last_line_is_mended(cut, answers_file, generate, tmp_path):
    whole = answers_file.read_bytes()
    lines = whole.splitlines(keepends=True)
    path = tmp_path / "answers.jsonl"
    kept = b"".join(lines[:4])
    path.write_bytes(kept[:-cut] if cut else lines[0][:30])  # only the line's end, its brace too, more; the first line
    generate(path)
    assert path.read_bytes() == whole
    path.write_bytes(b"".join(lines[:3]))  # in the middle of a batch
    generate(path)
    assert path.read_bytes() == whole


def test_damage_in_the_middle_is_not_mended(answers_file, generate, tmp_path):
    lines = answers_file.read_text().splitlines(keepends=True)
    path = tmp_path / "answers.jsonl"
    for content, message in (
        ([lines[0], lines[1][:20] + "\n", lines[2]], "line 2 is not JSON"),
        (
            [lines[0], lines[0]],
            "holds question 7 twice|holds question 3 twice|holds question 2 twice|holds question 5 twice",
        ),
        (['{"text": "mine"}\n'], r"holds answers that were made with model=None \(now '[0-9a-f]{16}'\)"),
    ):
        path.write_text("".join(content))
        with pytest.raises(ValueError, match=message):
            generate(path)
        assert path.read_text() == "".join(content)
    with pytest.raises(ValueError, match="answers.jsonl.gz'` cannot be compressed"):
        generate(tmp_path / "answers.jsonl.gz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 3}, r"made with seed=0 \(now 3\). Choose another `output_file`"),
        ({"max_new_tokens": 11}, r"max_new_tokens=10 \(now 11\)"),
        ({"batch_size": 3}, r"batch_size=2 \(now 3\)"),
        ({"questions": QUESTIONS[:5]}, r"questions=7 \(now 5\), questions_digest="),
        ({"temperatures": {"stem": 1.0}}, r"'stem': 0.1"),
        ({"chat_template_kwargs": {"thinking": False}}, r"chat_template_kwargs=\{\} \(now \{'thinking': False\}\)"),
        ({"plain": True}, r"plain=False \(now True\)"),
        ({"model": "other"}, r"model='[0-9a-f]{16}' \(now '[0-9a-f]{16}'\)"),
    ],
)
def test_other_answers_are_not_mixed_in(change, message, answers_file, generate, tokenizer):
    before = answers_file.read_bytes()
    if "model" in change:
        change = {"model": tiny.model("llama", tokenizer, seed=5)}
    with pytest.raises(ValueError, match=message):
        generate(answers_file, **change)
    assert answers_file.read_bytes() == before


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_comes_back_as_it_was(fails, model, generate, tmp_path, monkeypatch):
    model.train()
    model.model.layers[0].eval()
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        if fails:
            interrupted(monkeypatch, lambda: generate(tmp_path / "a.jsonl"), 1, RuntimeError("full disk"))
        else:
            # Dropout would make it otherwise
            assert generate(tmp_path / "a.jsonl")[1]["answers"] == generate(tmp_path / "b.jsonl")[1]["answers"]
        assert model.training
        assert not model.model.layers[0].training
        assert model.model.layers[1].training
        assert torch.equal(torch.rand(3), expected)
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    finally:
        model.eval()


def test_an_end_ends_an_answer(generate, tokenizer, tmp_path, model, monkeypatch):
    monkeypatch.setattr(model.generation_config, "eos_token_id", list(range(40, 120)))
    rows = generate(tmp_path / "a.jsonl")
    pairs = [pair for row in rows for pair in zip(row["num_tokens"], row["truncated"], strict=True)]
    assert {cut for _, cut in pairs} == {False, True}
    assert all(n == 10 for n, cut in pairs if cut)
    assert min(n for n, cut in pairs if not cut) < 10


def test_plain_dialogue(generate, model, tokenizer, tmp_path, monkeypatch):
    plain = tiny.tokenizer()
    plain.chat_template = None
    with pytest.raises(ValueError, match="has no chat template.* pass `plain=True`"):
        generate_answers(model, plain, QUESTIONS, tmp_path / "a.jsonl")
    assert not (tmp_path / "a.jsonl").exists()

    def reply(text):
        ids = plain(text, return_tensors="pt")["input_ids"]
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
        return plain.decode(output[0, ids.shape[1] :], skip_special_tokens=True)

    options = {"max_new_tokens": 10, "plain": True}
    row = generate_answers(model, plain, QUESTIONS[2:3], tmp_path / "a.jsonl", **options)[0]
    whole = reply("User: Who wrote Hamlet?\n\nAssistant:")
    asked = f"User: Who wrote Hamlet?\n\nAssistant: {row['answers'][0]}\n\nUser: When?\n\nAssistant:"
    assert row["answers"] == [whole.strip(), reply(asked).strip()]

    # An answer ends where the next user message begins, and so does its generation; the others of the batch go on
    short, long = (question(n, "math", text, "Why?") for n, text in enumerate(("Who?", "Name a colour.")))
    before, after = reply("User: Who?\n\nAssistant:").split("0o")
    assert before.strip()
    assert after
    monkeypatch.setattr(judged, "_NEXT_USER", "0o")  # of two tokens
    rows = generate_answers(model, plain, [short, long], tmp_path / "b.jsonl", **options)
    assert rows[0]["answers"][0] == before.strip()
    assert rows[0]["num_tokens"][0] == len(plain(f"{before}0ot")["input_ids"])
    assert not rows[0]["truncated"][0]
    assert rows[1]["answers"][0] == reply("User: Name a colour.\n\nAssistant:").strip()
    assert (rows[1]["num_tokens"][0], rows[1]["truncated"][0]) == (10, True)


def test_a_full_context(tokenizer, tmp_path):
    context, colour = 200, "Name a colour."
    small = tiny.model("gpt-neox", tokenizer, max_position_embeddings=context)
    chat = judged._Chat(small, tokenizer, False, {})
    first = generate_answers(small, tokenizer, [question(1, "math", colour, "a")], tmp_path / "a", max_new_tokens=10)
    dialogue = [{"role": "user", "content": colour}, {"role": "assistant", "content": first[0]["answers"][0]}]

    def room(text):
        return context - len(chat.encode([*dialogue, {"role": "user", "content": text}]))

    texts = ["a " * n for n in range(1, context)]
    some, none = next(text for text in texts if room(text) == 4), next(text for text in texts if room(text) == 0)
    rows = [question(n, "math", colour, text) for n, text in enumerate(("a", some, none, none + none))]
    answers = generate_answers(small, tokenizer, rows, tmp_path / "b", max_new_tokens=10)
    assert [row["num_tokens"] for row in answers] == [[10, 10], [10, 4], [10, 0], [10, 0]]
    assert [row["answers"][1] == "" for row in answers] == [False, False, True, True]
    assert all(row["truncated"] == [True, True] for row in answers)
    single = generate_answers(small, tokenizer, rows, tmp_path / "c", max_new_tokens=10, batch_size=1)
    assert [row["answers"] for row in single] == [row["answers"] for row in answers]
    with pytest.raises(
        ValueError, match=r"Question 9 has \d+ tokens, and the model's context is 200: there is no room"
    ):
        generate_answers(small, tokenizer, [*rows, question(9, "math", none + none, "a")], tmp_path / "d")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_new_tokens": 0}, ValueError, "`max_new_tokens=0` is out of range"),
        ({"batch_size": 0}, ValueError, "`batch_size=0` is out of range"),
        ({"temperatures": {"math": -1}}, ValueError, r"`temperatures\['math'\]=-1` is out of range"),
        ({"questions": []}, ValueError, "`questions` holds no questions"),
        (
            {"questions": [question(1, "law", "Is it?", "Why?")]},
            ValueError,
            r"no temperature for the categories \['law'\].*`temperatures=\{'law': 0.7\}`",
        ),
        ({"model": "org/model"}, TypeError, "`model` is a str; expected a `PreTrainedModel`"),
    ],
)
def test_wrong_arguments_of_the_first_step(options, error, message, generate, tmp_path):
    with pytest.raises(error, match=message):
        generate(tmp_path / "a.jsonl", **options)
    assert not (tmp_path / "a.jsonl").exists()


def test_the_tokenizer_of_the_model(model, model_dir, generate, tmp_path):
    with pytest.raises(ValueError, match="built in memory, so its tokenizer cannot be found. Pass it as `tokenizer`"):
        generate_answers(model, None, QUESTIONS, tmp_path / "a.jsonl")
    loaded = AutoModelForCausalLM.from_pretrained(model_dir)
    rows = generate_answers(loaded, None, QUESTIONS[:2], tmp_path / "a.jsonl", max_new_tokens=10)
    assert rows[0]["model"] == model_dir
    expected = generate(tmp_path / "b.jsonl", QUESTIONS[:2], model=loaded, batch_size=8)
    assert [row["answers"] for row in rows] == [row["answers"] for row in expected]


def test_without_any_end_of_sequence(model, generate, tmp_path, monkeypatch):
    endless = tiny.tokenizer()
    endless.eos_token = None
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    with pytest.raises(ValueError, match="has an end-of-sequence token: no answer would ever end"):
        generate_answers(model, endless, QUESTIONS, tmp_path / "a.jsonl")


# ---------------------------------------------------------------- judgments


def test_what_the_judge_is_asked(answers_file, prompts, tmp_path):
    judge, path = Rater(), tmp_path / "judgments.jsonl"
    rows = judge_answers(answers_file, judge, path, prompts=prompts)
    assert rows == read(path)
    answers = {row["question_id"]: row["answers"] for row in read(answers_file)}
    asked = {(row["question_id"], row["turn"]): (row, m) for row, m in zip(rows, judge.asked, strict=True)}
    assert len(asked) == 14

    def check(key, turn, name, system, user):
        row, messages = asked[key, turn]
        assert messages == [
            *([{"role": "system", "content": system}] if system else []),
            {"role": "user", "content": user},
        ]
        assert (row["judge"], row["user_prompt"], row["total"]) == (["rater", name], user, 14)
        assert row["score"] == len(user) % 10 + 1
        assert row["judgment"] == f"Rating: [[{len(user) % 10 + 1}]]"

    a, b = answers[1]
    check(1, 1, "single-v1", "Be kind.", f"Q Name a colour. A {a} rate [[x]]")
    check(1, 2, "single-v1-multi-turn", "", f"Q1 Name a colour. A1 {a} Q2 Name another {{one}}. A2 {b}")
    a, b = answers[2]
    math_2 = f"Q1 What is two plus two? R1 Four. Q2 And what comes after four? R2 Five. A1 {a} A2 {b}"
    check(2, 1, "single-math-v1", "Be exact.", f"Q What is two plus two? R Four. A {a}")
    check(2, 2, "single-math-v1-multi-turn", "Be exact.", math_2)
    # A coding question without a reference, and a role with one
    assert asked[5, 1][0]["judge"][1] == "single-v1"
    assert asked["four", 2][0]["judge"][1] == "single-v1-multi-turn"
    assert asked[7, 2][0]["judge"][1] == "single-math-v1-multi-turn"


@pytest.mark.parametrize("calls", [0, 1, 5])
def test_interrupted_judgments_go_on(calls, answers_file, prompts, tmp_path):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "judgments.jsonl"
    judge_answers(answers_file, Rater(), whole, prompts=prompts)
    with pytest.raises(JudgeError, match=r"turn [12]\. out of tokens") as caught:
        judge_answers(answers_file, Rater(calls), path, prompts=prompts)
    assert f"What is finished is kept: {calls} of 14 judgments in `{path}`. To go on, run the same again." in str(
        caught.value
    )
    assert isinstance(caught.value.__cause__, OSError)
    if calls:
        path.write_bytes(path.read_bytes() + b'{"question_id": 1, "tu')  # and the writing of a row was interrupted
    judge = Rater()
    judge_answers(answers_file, judge, path, prompts=prompts)
    assert len(judge.asked) == 14 - calls
    assert path.read_bytes() == whole.read_bytes()
    judge_answers(answers_file, Rater(0), path, prompts=prompts)  # asks nothing more


def test_control_c_while_judging(answers_file, prompts, tmp_path, capsys):
    path = tmp_path / "judgments.jsonl"
    with pytest.raises(KeyboardInterrupt):
        judge_answers(answers_file, Rater(3, KeyboardInterrupt()), path, prompts=prompts)
    assert f"Finished judgments are kept in {path}" in capsys.readouterr().err
    assert len(read(path)) == 3


def test_other_judgments_are_not_mixed_in(answers_file, prompts, tmp_path):
    path = tmp_path / "judgments.jsonl"
    judge_answers(answers_file, Rater(), path, prompts=prompts)
    stored, other = path.read_bytes(), Rater()
    other.name = "colleague"
    with pytest.raises(ValueError, match=r"made with judge=\['rater', 'single-\S+'\] \(now \['colleague'"):
        judge_answers(answers_file, other, path, prompts=prompts)
    answers = read(answers_file)
    answers[3]["answers"][1] += " Or so."
    changed = write(tmp_path / "answers.jsonl", answers)
    with pytest.raises(ValueError, match="made with user_prompt="):
        judge_answers(changed, Rater(), path, prompts=prompts)
    answers[3]["question_id"] = 99
    with pytest.raises(ValueError, match=r"made with question_id="):
        judge_answers(write(changed, answers), Rater(), path, prompts=prompts)
    assert path.read_bytes() == stored


def test_wrong_arguments_of_the_second_step(answers_file, prompts, tmp_path):
    path = tmp_path / "judgments.jsonl"

    def judge(file=answers_file, judge=None, rows=PROMPTS):
        return judge_answers(file, judge or Rater(), path, prompts=write(prompts, rows))

    with pytest.raises(TypeError, match="`judge` is a str; expected an object with a method `judge"):
        judge(judge="gpt-4")
    silent = Rater()
    silent.judge = lambda messages: None
    with pytest.raises(TypeError, match="`rater.judge` returned a NoneType; expected a string"):
        judge(judge=silent)
    path.unlink()
    with pytest.raises(ValueError, match="lacks the judge prompt 'single-math-v1', which question .* needs; it has"):
        judge(rows=PROMPTS[:2])
    wrong = PROMPTS[0] | {"prompt_template": "{question} {response}"}
    with pytest.raises(ValueError, match=r"'single-v1' cannot be filled in \(KeyError: 'response'\).*\{answer\}"):
        judge(rows=[wrong, *PROMPTS[1:]])
    with pytest.raises(ValueError, match="'single-v1' cannot be filled in .* double other braces"):
        judge(rows=[PROMPTS[0] | {"prompt_template": "{question} }"}, *PROMPTS[1:]])
    with pytest.raises(ValueError, match=r"row 2: a judge prompt has the strings .* the columns are \['text'\]"):
        judge(rows=[PROMPTS[0], {"text": ""}])
    lines = answers_file.read_text().splitlines(keepends=True)
    part = tmp_path / "part.jsonl"
    for content, message in (
        (lines[:4], "holds the answers to 4 of 7 questions: it was interrupted. Run `generate_answers` again"),
        ([*lines[:4], lines[4][:50]], "line 5 is not JSON .* It was cut off: run the step"),
        ([], "holds the answers to 0 of some"),
        (
            ['{"question_id": 1}\n'],
            "row 1 lacks 'category', .*'settings'; .* Expected a file that `generate_answers` wrote",
        ),
    ):
        part.write_text("".join(content))
        with pytest.raises(ValueError, match=message):
            judge(part)
    assert not path.exists()


def test_local_judge(answers_file, prompts, model, tokenizer, tmp_path):
    model.train()
    try:
        judge = LocalJudge(model, tokenizer, max_new_tokens=8)
        rows = judge_answers(answers_file, judge, tmp_path / "judgments.jsonl", prompts=prompts)
        assert model.training
    finally:
        model.eval()
    assert rows[0]["judge"][0] == judge.name
    assert re.fullmatch(r"LlamaForCausalLM@[0-9a-f]{16}", judge.name)
    templates = {row["name"]: row for row in PROMPTS}
    for row in rows[:3]:
        system = templates[row["judge"][1]]["system_prompt"]
        messages = [{"role": "system", "content": system}] if system else []
        assert row["judgment"] == alone(
            model, tokenizer, [*messages, {"role": "user", "content": row["user_prompt"]}], 8
        )
    with pytest.raises(JudgeError, match=r"The prompt has \d+ tokens, and the context of the judge 'Llama.*' is 512"):
        judge.judge([{"role": "user", "content": "Why? " * 500}])
    bare = tiny.tokenizer()
    bare.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        LocalJudge(model, bare)


def test_replay_judge(answers_file, prompts, tmp_path):
    path, replayed = tmp_path / "judgments.jsonl", tmp_path / "replayed.jsonl"
    rows = judge_answers(answers_file, Rater(), path, prompts=prompts)
    again = judge_answers(answers_file, ReplayJudge(path), replayed, prompts=prompts)
    assert [row["judgment"] for row in again] == [row["judgment"] for row in rows]
    assert again[0]["judge"][0] == "rater (replayed)"
    path.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(
        JudgeError, match="turn 2. `.*judgments.jsonl` holds no judgment with this user prompt.* 1 of 14"
    ):
        judge_answers(answers_file, ReplayJudge(path), tmp_path / "c.jsonl", prompts=prompts)
    # Two models gave the same answer, and were rated differently
    write(path, [rows[0], rows[0] | {"model": "other", "judgment": "[[1]]"}])
    ask = [{"role": "user", "content": rows[0]["user_prompt"]}]
    with pytest.raises(
        JudgeError, match=r"holds 2 judgments with this user prompt.* `ReplayJudge\(file, model=...\)`"
    ):
        ReplayJudge(path).judge(ask)
    assert ReplayJudge(path, model="other").judge(ask) == "[[1]]"
    with pytest.raises(ValueError, match=r"no judgments of the model 'third', but of \['LlamaForCausalLM', 'other'\]"):
        ReplayJudge(path, model="third")
    with pytest.raises(ValueError, match="row 1 lacks 'turn', 'user_prompt'"):
        ReplayJudge(write(path, [{"question_id": 1, "judgment": ""}]))


# ---------------------------------------------------------------- a judge behind a server


class Server:
    """A chat-completions server on the loopback interface. `script` holds what it does first; then it rates with 7.

    A number is an HTTP status, `"hang"` says nothing for a second, `"drop"` closes the connection, bytes are sent as they
    are, and other values are the content of a judgment.
    """

    def __init__(self, *script):
        self.script, self.requests, self.headers = list(script), [], {}
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append((self.path, self.headers.get("Authorization"), body))
                step = server.script.pop(0) if server.script else "[[7]]"
                if step == "hang":
                    server.closing.wait(1.0)
                if step in ("hang", "drop"):
                    self.connection.close()
                    return
                status, payload = 200, step
                if isinstance(step, int):
                    status, payload = step, json.dumps({"error": f"no luck with {TOKEN}"}).encode()
                elif not isinstance(step, bytes):
                    message = {"role": "assistant", "content": step}
                    choice = {"index": 0, "message": message, "finish_reason": "stop"}
                    payload = json.dumps({"id": "1", "created": 1, "model": "m", "choices": [choice]}).encode()
                self.send_response(status)
                for name, value in ({"Content-Length": len(payload)} | server.headers).items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *args):
                pass

        self.closing = threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def close(self):
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def serve(monkeypatch):
    """Start servers; calls wait for nothing, and the pauses are in `serve.pauses`."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_login")
    servers = []

    def start(*script):
        servers.append(Server(*script))
        return servers[-1]

    start.pauses = []
    monkeypatch.setattr(judged.time, "sleep", start.pauses.append)
    yield start
    for server in servers:
        server.close()


ASK = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Rate this: é\u2028"}]


def test_a_server_is_asked(serve):
    server = serve("Good. [[9]]")
    judge = InferenceClientJudge("judge-1", server.url, token=TOKEN)
    assert judge.judge(ASK) == "Good. [[9]]"
    path, authorization, body = server.requests[0]
    assert (path, authorization) == ("/v1/chat/completions", f"Bearer {TOKEN}")
    asked = {"model": "judge-1", "messages": ASK, "max_tokens": 2048, "temperature": 0.0, "stream": False}
    assert body == asked
    InferenceClientJudge("judge-1", server.url, temperature=None, max_tokens=5).judge(ASK)
    _, authorization, body = server.requests[1]
    assert authorization is None  # in particular not the token that the machine is logged in with
    del asked["temperature"]
    assert body == asked | {"max_tokens": 5}
    assert serve.pauses == []


def test_a_busy_server_is_asked_again(serve):
    server = serve(500, 503, "drop", 429, "[[8]]")
    assert InferenceClientJudge("m", server.url, backoff=0.5).judge(ASK) == "[[8]]"
    assert len(server.requests) == 5
    assert serve.pauses == [0.5, 1, 2, 4]
    server.script, server.headers = [429, 503, "[[6]]"], {"Retry-After": "7"}
    assert InferenceClientJudge("m", server.url).judge(ASK) == "[[6]]"
    assert serve.pauses[4:] == [7, 7]
    server.headers = {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}
    server.script = [503] * 3
    with pytest.raises(JudgeError) as caught:
        InferenceClientJudge("m", server.url, retries=2, backoff=50).judge(ASK)
    assert f"The judge 'm' at `base_url='{server.url}'` does not answer (calls: 3): HTTP 503" in str(caught.value)
    assert serve.pauses[6:] == [50, 60]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_refusal_is_final(status, serve):
    server = serve(status)
    with pytest.raises(JudgeError, match=rf"\(calls: 1\): HTTP {status}.* Check `model`, `token` and `base_url`"):
        InferenceClientJudge("m", server.url, token=TOKEN).judge(ASK)
    assert len(server.requests) == 1


def test_a_silent_server(serve):
    server = serve("hang", "hang")
    start = time.monotonic()
    with pytest.raises(JudgeError, match=r"\(calls: 2\): silence for `timeout=0.2` seconds. Raise `timeout`"):
        InferenceClientJudge("m", server.url, timeout=0.2, retries=1).judge(ASK)
    assert time.monotonic() - start < 1
    assert len(server.requests) == 2
    server.script = ["hang", "[[5]]"]
    assert InferenceClientJudge("m", server.url, timeout=0.2).judge(ASK) == "[[5]]"


def test_a_dead_server_fails_at_once(serve, answers_file, prompts, tmp_path):
    server = serve()
    server.close()
    judge = InferenceClientJudge("m", server.url)
    start = time.monotonic()
    with pytest.raises(JudgeError) as caught:
        judge_answers(answers_file, judge, tmp_path / "judgments.jsonl", prompts=prompts)
    assert time.monotonic() - start < 2
    assert serve.pauses == []
    assert f"at `base_url='{server.url}'` does not answer (calls: 1): it cannot be reached (ConnectError" in str(
        caught.value
    )
    assert "Start the server, or correct `base_url`. What is finished is kept: 0 of 14" in str(caught.value)


def test_a_server_that_dies_and_comes_back(serve, answers_file, prompts, tmp_path):
    path, server = tmp_path / "judgments.jsonl", serve("[[1]]", "[[2]]")
    judge = InferenceClientJudge("m", server.url, retries=2)
    ask = judge.judge

    def dying(messages):
        if len(server.requests) == 2:
            server.close()
        return ask(messages)

    judge.judge = dying
    with pytest.raises(JudgeError, match=r"\(calls: 3\): it cannot be reached .* 2 of 14 judgments"):
        judge_answers(answers_file, judge, path, prompts=prompts)
    assert serve.pauses == [1, 2]  # it had answered before, so it was waited for
    other = serve()
    rows = judge_answers(answers_file, InferenceClientJudge("m", other.url), path, prompts=prompts)
    assert [row["score"] for row in rows] == [1, 2, *[7] * 12]
    assert len(other.requests) == 12


@pytest.mark.parametrize(
    "payload", [b"<html>", b"{}", b"[1]", b'{"choices": []}', b'{"choices": [{"text": "[[5]]"}]}']
)
def test_what_is_no_chat_completion(payload, serve):
    server = serve(payload)
    with pytest.raises(JudgeError, match=r"\(calls: 1\): no chat completion came back \(.*\). Check `base_url`"):
        InferenceClientJudge("m", server.url).judge(ASK)


def test_an_empty_judgment_holds_no_rating(serve, answers_file, prompts, tmp_path):
    server = serve(None)  # as reasoning models do when their tokens run out
    rows = judge_answers(answers_file, InferenceClientJudge("m", server.url), tmp_path / "j.jsonl", prompts=prompts)
    assert [row["score"] for row in rows] == [-1, *[7] * 13]
    assert rows[0]["judgment"] == ""


def test_the_token_is_nowhere(serve, answers_file, prompts, tmp_path, caplog, capsys):
    path = tmp_path / "judgments.jsonl"
    server = serve("[[3]]", 500, 401)  # the server quotes it
    with caplog.at_level(logging.DEBUG):
        judge = InferenceClientJudge("m", server.url, token=TOKEN)
        with pytest.raises(JudgeError, match=r"HTTP 401.*no luck with \*\*\*") as caught:
            judge_answers(answers_file, judge, path, prompts=prompts)
    assert [authorization for _, authorization, _ in server.requests] == [f"Bearer {TOKEN}"] * 3
    shown = [repr(judge), str(vars(judge)), caplog.text, *capsys.readouterr(), path.read_text()]
    error = caught.value
    while error is not None:  # the errors behind it, too
        shown.append(f"{error!r} {error}")
        error = error.__cause__ or error.__context__
    assert len(caplog.records) > 0
    assert TOKEN[:8] not in "".join(shown)
    assert repr(judge) == f"InferenceClientJudge(model='m', base_url='{server.url}')"


def test_a_quoted_token_is_not_cut_in_two():
    judge = InferenceClientJudge("m", "http://localhost:1/v1", token=TOKEN)
    for length in range(270, 301):
        assert TOKEN[:2] not in judge._shown(ValueError("y" * length + TOKEN))


def test_without_a_server_the_token_is_that_of_the_login(serve, monkeypatch):
    assert InferenceClientJudge("m")._client.token == "hf_of_the_login"
    monkeypatch.setattr(judged, "get_token", lambda: None)
    assert InferenceClientJudge("m", token=TOKEN)._client.token == TOKEN
    with pytest.raises(
        ValueError, match="no token for Hugging Face's Inference Providers. Pass `token`, run `hf auth login`"
    ):
        InferenceClientJudge("m")


def test_offline_mode_is_named(serve, monkeypatch):
    server = serve()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(JudgeError, match="`HF_HUB_OFFLINE` is set, .* Unset it"):
        InferenceClientJudge("m", server.url).judge(ASK)
    assert server.requests == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "localhost:8000/v1"}, "`base_url` must be the address of a server, such as 'http://localhost"),
        ({"base_url": f"http://me:{TOKEN}@host/v1"}, "without user, password and query"),
        ({"base_url": f"http://host/v1?key={TOKEN}"}, "Pass a key as `token`"),
        ({"base_url": ""}, "`base_url` must be the address"),
        ({"timeout": 0}, "`timeout=0` is out of range"),
        ({"retries": -1}, "`retries=-1` is out of range"),
        ({"max_tokens": 0}, "`max_tokens=0` is out of range"),
        ({"temperature": -1}, "`temperature=-1` is out of range"),
        ({"backoff": -1}, "`backoff=-1` is out of range"),
    ],
)
def test_wrong_arguments_of_the_client(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        InferenceClientJudge("m", **options)
    assert TOKEN not in str(caught.value)


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Good [[7]]. Or [[8]]?", 7),
        ("As in [1], it is fine: [[8.5]]", 8.5),
        ("Rating: [6] or [5]", 6),
        ("Rating: [[10.]]", 10),
        ("Rating: [[-3]] [[a]] 9/10", -1),
        ("[[8/10]] [4]", 4),
        ("[[\n9]]", -1),
        ("", -1),
    ],
)
def test_ratings(text, rating):
    assert parse_rating(text) == rating


def judgment(key, turn, text, category="writing", **columns):
    columns = {"model": "m", "judge": ["gpt-4", "single-v1"], "user_prompt": f"{key}/{turn}"} | columns
    return {"question_id": key, "turn": turn, "category": category, "judgment": text, "score": 0} | columns


def test_scores(tmp_path):
    rows = [
        judgment(2, 1, "[[9]]", "math"), judgment(2, 2, "[[4]]", "math"), judgment(1, 2, "no idea"),
        judgment(1, 1, "[[5]]"), judgment("b", 1, "[6]", "stem"), judgment("b", 2, "[[8.5]]", "stem"),
    ]  # fmt: skip
    path = write(tmp_path / "judgments.jsonl", rows)
    with pytest.warns(UserWarning, match="1 of 6 judgments in .* hold no rating: they are left out"):
        scores = score_judgments(path)
    assert {name: measure.value for name, measure in scores.items()} == pytest.approx(
        {
            "mt_bench/score": 6.5, "mt_bench/turn_1": 20 / 3, "mt_bench/turn_2": 6.25, "mt_bench/writing": 5,
            "mt_bench/math": 6.5, "mt_bench/stem": 7.25, "mt_bench/unrated": 1 / 6,
        }
    )  # fmt: skip
    assert scores["mt_bench/score"].items == (5, 0, 9, 4, 6, 8.5)  # by question and turn
    assert scores["mt_bench/score"].weights == (1, 0, 1, 1, 1, 1)
    assert scores["mt_bench/math"].weights is None
    assert scores["mt_bench/unrated"].items == (0, 1, 0, 0, 0, 0)
    unrated = scores.pop("mt_bench/unrated")
    assert (unrated.unit, unrated.better, unrated.group) == ("share", "lower", "judge")
    for measure in scores.values():
        assert (measure.unit, measure.better, measure.group) == ("score", "higher", "judge")
        assert measure.title.startswith("MT-Bench rating by gpt-4, ")
    # Digests: of question ids and turns only, whatever the order of the file and the ratings
    write(path, [row | {"judgment": "[[1]]"} for row in rows[::-1]])
    every = score_judgments(path)
    assert every["mt_bench/turn_1"].documents == scores["mt_bench/turn_1"].documents
    assert every["mt_bench/score"].documents == scores["mt_bench/score"].documents
    compared = paired_difference([every["mt_bench/score"]], [scores["mt_bench/score"]])
    assert (compared.value, compared.documents) == (pytest.approx(1 - 6.5), 6)
    assert every["mt_bench/unrated"].documents == unrated.documents
    write(path, [row for row in rows if row["question_id"] == 1 and row["turn"] == 2])
    with pytest.warns(UserWarning, match="1 of 1 judgments"):
        nothing = score_judgments(path)
    assert math.isnan(nothing["mt_bench/score"].value)
    assert nothing["mt_bench/score"].to_json()["value"] is None
    with pytest.warns(UserWarning, match="2 of 3 ratings in .* are not in 1 to 10"):
        assert score_judgments(write(path, [judgment(i, 1, f"[[{x}]]") for i, x in enumerate((0, 10, 85))]))[
            "mt_bench/score"
        ].value == pytest.approx(95 / 3)


def test_what_cannot_be_scored(answers_file, prompts, tmp_path):
    path = tmp_path / "judgments.jsonl"
    judge_answers(answers_file, Rater(), path, prompts=prompts)
    assert len(score_judgments(path)["mt_bench/score"].items) == 14
    rows = read(path)
    with pytest.raises(ValueError, match="holds 9 of 14 judgments: it was interrupted. Run `judge_answers` again"):
        score_judgments(write(path, rows[:9]))
    two = [judgment(1, 1, "[[1]]"), judgment(1, 1, "[[3]]", model="n")]
    with pytest.raises(ValueError, match=r"judgments of several models: \['m', 'n'\]. Choose one, `model='m'`"):
        score_judgments(write(path, two))
    assert score_judgments(path, model="n")["mt_bench/score"].value == 3
    with pytest.raises(ValueError, match=r"no judgments of the model 'o', but of \['m', 'n'\]"):
        score_judgments(path, model="o")
    with pytest.raises(ValueError, match=r"by several judges: \['gpt-4', 'me'\]"):
        score_judgments(write(path, [two[0], judgment(1, 2, "[[3]]", judge=["me", "p"])]))
    with pytest.raises(ValueError, match="holds question 1, turn 1 twice"):
        score_judgments(write(path, [two[0], two[0]]))
    with pytest.raises(ValueError, match="row 1 lacks 'judgment'.* `judge_answers` wrote"):
        score_judgments(write(path, [{"question_id": 1, "turn": 1}]))


def test_proxies(answers_file, tmp_path):
    rows = {row["question_id"]: row for row in read(answers_file)}
    rows[2] |= {"answers": ["four, of course", "Five."], "num_tokens": [5, 2], "truncated": [False, False]}
    rows[7] |= {"answers": ["", "a b c d a b c d e"], "num_tokens": [1, 10], "truncated": [False, True]}
    path = write(tmp_path / "answers.jsonl", [rows[2], rows[7]])
    with pytest.raises(ValueError, match="2 of 7 questions: it was interrupted"):
        proxies(path)
    for row in rows.values():
        row["settings"]["questions"] = 2
    found = proxies(write(path, [rows[7], rows[2]]))
    assert not any("bench" in f"{name} {measure.title}".lower() for name, measure in found.items())
    items = {name: measure.items for name, measure in found.items()}
    assert items["answers/tokens"] == (5, 2, 1, 10)
    assert items["answers/empty"] == (0, 0, 1, 0)
    assert items["answers/truncated"] == (0, 0, 0, 1)
    assert items["answers/repetition"] == pytest.approx((0, 0, 0, 1 / 6))  # six 4-grams, "a b c d" twice
    assert items["answers/token_f1"] == pytest.approx((0.5, 1, 0, 0))  # one of three words, and the only one
    assert found["answers/token_f1"].better == "higher"
    assert found["answers/tokens"].unit == "tokens"
    assert proxies(write(path, [rows[2], rows[7]])) == found
    # Other references, for one question
    other = proxies(path, {7: ["", "e d"]})
    assert other["answers/token_f1"].items == pytest.approx((0, 2 * 2 / 11))
    assert other["answers/token_f1"].documents != found["answers/token_f1"].documents
    assert "answers/token_f1" not in proxies(path, {})
    by_file = proxies(path, write(tmp_path / "questions.jsonl", QUESTIONS))
    assert by_file == found


def test_rouge_of_the_proxies(answers_file, tmp_path, monkeypatch):
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    found = proxies(answers_file, {1: ["Blue is a colour.", "And so is green."]})
    answers = next(row["answers"] for row in read(answers_file) if row["question_id"] == 1)
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    expected = [
        scorer.score("Blue is a colour.", answers[0])["rougeL"].fmeasure,
        scorer.score("And so is green.", answers[1])["rougeL"].fmeasure,
    ]
    assert found["answers/rouge_l"].items == tuple(expected)
    same = proxies(answers_file, {1: [f"Well, {answers[0]} it is", answers[1]]})["answers/rouge_l"]
    assert 0 < same.value <= 1
    monkeypatch.setattr(judged, "find_spec", lambda name: None)
    assert "answers/rouge_l" not in proxies(answers_file)
    assert "answers/token_f1" in proxies(answers_file)


# ---------------------------------------------------------------- the benchmark's own data


@pytest.fixture(scope="module")
def benchmark_files():
    files = {name: DATA / f"mt_bench_{name}.jsonl.gz" for name in ("questions", "judge_prompts", "judgments")}
    if missing := [path.name for path in files.values() if not path.is_file()]:
        pytest.skip(f"{', '.join(missing)} not found in {DATA} (set TRL_IFT_TEST_DATA)")
    return files


def test_the_benchmarks_questions(benchmark_files):
    rows = load_questions(benchmark_files["questions"])
    assert [row["question_id"] for row in rows] == list(range(81, 161))
    assert {row["category"] for row in rows} == set(judged.TEMPERATURES)
    assert {row["category"] for row in rows if row["reference"]} == set(judged.BY_REFERENCE)


def test_replayed_judgments_give_the_stored_scores(benchmark_files, tmp_path):
    """The answers are taken out of the stored prompts, and the prompts are built again from them."""
    with gzip.open(benchmark_files["judgments"], "rt", encoding="utf-8") as file:
        stored = [json.loads(line) for line in file]
    assert [parse_rating(row["judgment"]) for row in stored] == [row["score"] for row in stored]
    questions = {row["question_id"]: row for row in load_questions(benchmark_files["questions"])}
    models = sorted({row["model"] for row in stored})
    assert (len(stored), len(models)) == (480, 4)
    for number, model in enumerate(models):
        own = {(row["question_id"], row["turn"]): row for row in stored if row["model"] == model}
        answers = []
        for (key, turn), row in own.items():
            if turn == 2:
                first, second = questions[key]["turns"]
                text = row["user_prompt"].split("<|The Start of Assistant A's Conversation with User|>\n\n")[1]
                text = text.removeprefix(f"### User:\n{first}\n\n### Assistant A:\n")
                text = text.removesuffix("\n\n<|The End of Assistant A's Conversation with User|>")
                pair = text.split(f"\n\n### User:\n{second}\n\n### Assistant A:\n")
                extra = {
                    "model": model,
                    "num_tokens": [1, 1],
                    "truncated": [False, False],
                    "settings": {"questions": 60},
                }
                answers.append(questions[key] | {"answers": pair} | extra)
        answers_file, path = write(tmp_path / f"a{number}.jsonl", answers), tmp_path / f"j{number}.jsonl"
        judge = ReplayJudge(benchmark_files["judgments"], model=model)
        rows = judge_answers(answers_file, judge, path, prompts=benchmark_files["judge_prompts"])
        assert len(rows) == len(own) == 120
        for row in rows:
            expected = own[row["question_id"], row["turn"]]
            assert (row["user_prompt"], row["judgment"]) == (expected["user_prompt"], expected["judgment"])
            assert row["score"] == expected["score"]
            assert row["judge"][1] == expected["judge"][1]
        rated = [row["score"] for row in own.values() if row["score"] != -1]
        if len(rated) < 120:
            with pytest.warns(UserWarning, match="1 of 120 judgments"):
                scores = score_judgments(path)
        else:
            scores = score_judgments(path)
        assert scores["mt_bench/score"].value == pytest.approx(sum(rated) / len(rated), abs=1e-12)
        assert scores["mt_bench/unrated"].value == (120 - len(rated)) / 120
