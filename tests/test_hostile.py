"""Hostile input, by property: every data path gives a clear error, or rows whose trained tokens say what the response says.

Clear is an error whose message is ours: what was found, in which row and column. One of Python's or of a package's own, from
the depths, is not. Examples are drawn by hypothesis, always the same ones.
"""

import json
import math
import re
import string

import datasets
import fsspec
import pairs
import pytest
import study as tiny_study
import tiny
from datasets import Dataset, IterableDataset, concatenate_datasets
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import trl_ift.data.rows as rows_module
from trl_ift import (
    EurusRewardConfig,
    EurusRewardTrainer,
    EXOConfig,
    EXOTrainer,
    IFTConfig,
    IFTTrainer,
    PreferenceConfig,
    PreferenceTrainer,
    TPOConfig,
    TPOTrainer,
    UFTConfig,
    UFTTrainer,
)
from trl_ift.data.answers import extract_answer
from trl_ift.data.counterfactual import build_counterfactual_pairs
from trl_ift.data.embeddings import EMBEDDING, embed_prompts
from trl_ift.data.generation import generate_completions, load_completions
from trl_ift.data.pairs import build_pairs, first_turns
from trl_ift.data.references import score_references
from trl_ift.data.report import _fenced, _markdown
from trl_ift.data.rows import check_text, check_texts, check_written
from trl_ift.data.scoring import Scorer, load_scores
from trl_ift.data.token_weights import estimate_token_weights
from trl_ift.data.trees import cross_turn_pairs, tree_to_pairs, tree_to_sft
from trl_ift.data.triples import build_triples, triple_of
from trl_ift.hub.card import _cell
from trl_ift.latent.weigh import load_codes, load_weighted_pairs
from trl_ift.reward.eurus import check_rows
from trl_ift.scripts.data import load_named, load_split
from trl_ift.study.judged import load_questions, parse_rating
from trl_ift.study.plan import Study


def examples(number: int):
    """So many examples, the same in each run."""
    return settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),  # of draws that are slow, large, or no dataset
    )


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """Leave nothing in the user's cache of datasets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny.model("llama", tokenizer)


# Of Python, NumPy, PyArrow, Jinja: what a message of ours does not say
DEPTHS = re.compile(
    r"object is not|object has no|has no attribute|not subscriptable|unsupported operand|indices must be|not supported between"
    r"|can only concatenate|index out of range|unexpected keyword|positional argument|^'\w+'$|codec can't|TextEncodeInput"
    r"|You need to specify either|must be str, not|not iterable|bad operand"
)


def check_clear(error: Exception, *named: str) -> None:
    """Fail unless the message of an error is ours, and holds one of the names."""
    # Behind the name of a file or of a row, the reason of a reader is welcome
    message = re.sub(r"(cannot be read|TRL cannot prepare it)\b.*", r"\1", str(error), flags=re.DOTALL)
    assert not isinstance(error, UnicodeError), message
    assert not DEPTHS.search(message), f"from the depths: {type(error).__name__}: {message}"
    assert not named or any(name in message for name in named), f"names none of {named}: {message}"


def outcome(call, *named: str):
    """What a call returns; `None` after a clear error."""
    try:
        return call()
    except (ValueError, TypeError, FileNotFoundError) as error:
        check_clear(error, *named)
        return None


# ---------------------------------------------------------------- what is drawn

# Ends, starts and paddings of templates, templates, controls, directions, marks without a letter, astral planes
ODD = (
    "<|im_end|>", "<|im_start|>user\n", "<|endoftext|>", "<|pad|>", "<image>", "</s>", "{{ 7 * 7 }}", "{% raw %}", "\x00",
    "\r\n", "\x1b[2J", "\x85", "\u202e", "\u200b", "\ufeff", "e\u0301", "\u0301", "אב", "𐍈😀", "\ufffd", "\uffff", " ", "\t",
    "|`*_[x](y)", "<script>",
)  # fmt: skip
texts = st.lists(st.one_of(st.sampled_from(ODD), st.text(max_size=6)), max_size=4).map("".join)
said = texts.filter(lambda text: text.strip() != "")
lone = st.sampled_from(["\ud800", "a\udfff", "\ud83d b"])
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.just(10**30), st.floats(), texts, lone, st.binary(max_size=3)
)
anything = st.recursive(
    scalars,
    lambda parts: st.one_of(
        st.lists(parts, max_size=3),
        st.dictionaries(st.sampled_from(["role", "content", "text", "x"]), parts, max_size=3),
    ),
    max_leaves=6,
)
roles = st.sampled_from(["system", "user", "assistant", "tool", "wizard", "", None])
messages = st.lists(
    st.fixed_dictionaries(
        {}, optional={"role": roles, "content": st.one_of(texts, anything), "tool_calls": st.none()}
    ),
    max_size=3,
)
values = st.one_of(said, messages, anything)


def chat(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def as_dataset(rows) -> Dataset:
    """A dataset of rows that can be one: what cannot is refused by `datasets`, before we see it."""
    try:
        return Dataset.from_list(rows)
    except Exception:
        assume(False)
        raise


# ---------------------------------------------------------------- texts and messages


@examples(200)
@given(value=values)
def test_check_text(value):
    try:
        check_text(value, "`data`, row 7", "prompt")
    except (ValueError, TypeError) as error:
        check_clear(error, "`data`, row 7: column 'prompt' ")
        surrogates = isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value)
        assert surrogates or not isinstance(value, str)
        return
    if isinstance(value, str):
        value.encode()
        return
    assert value
    for message in value:
        assert message["role"]
        assert any(part is not None for name, part in message.items() if name != "role")
        content = message.get("content") or ""
        for part in content if isinstance(content, list) else [content]:
            (part.get("text", "") if isinstance(part, dict) else part).encode()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "is null. Fill it, or drop such rows: `dataset.filter"),
        ([], "holds an empty list of messages"),
        ([None], r"holds a message 0 that is no \{'role', 'content'\} mapping: None \(NoneType\)"),
        (["a"], r".*mapping: 'a' \(str\)"),
        (
            [*chat("user", "a"), {"role": "assistant"}],
            "holds a message 1 that has the role 'assistant' and no content",
        ),
        ([{"content": "a"}], "holds a message 0 that has no role"),
        (chat("user", 3), r".*and as content no text but 3 \(int\)"),
        (chat("user", [{"type": "text", "text": None}]), r".*no text but .* \(NoneType\)"),
        (b"a", r"must hold a text or a list of \{'role', 'content'\} messages, found b'a' \(bytes\)"),
        (math.nan, r".*found nan \(float\)"),
        ("ab\ud800", r"holds half of a surrogate pair, \\ud800, at character 2"),
        (chat("user", "\udfff"), r"holds a message 0 that holds half of a surrogate pair, \\udfff"),
    ],
)
def test_messages_about_texts(value, message):
    with pytest.raises((ValueError, TypeError), match=f"`data`, row 7: column 'prompt' {message}"):
        check_text(value, "`data`, row 7", "prompt")
    for sound in (
        "",
        "a",
        chat("user", ""),
        [{"role": "assistant", "content": None, "tool_calls": [{}]}],
        chat("x", [{"type": "image"}]),
    ):
        check_text(sound, "", "")


def test_check_texts_names_the_row():
    rows = [{"prompt": "a", "completion": "b"}] * 5
    check_texts(Dataset.from_list(rows), "data", ["prompt", "completion"])
    with pytest.raises(ValueError, match="`data`, row 5: column 'completion' is null"):
        check_texts(Dataset.from_list([*rows, {"prompt": "a", "completion": None}]), "data", ["prompt", "completion"])
    kept = Dataset.from_list([{"prompt": None}, *[{"prompt": "a"}] * 3]).select([1, 2])
    check_texts(kept, "data", ["prompt"])  # the null is not among its rows
    check_texts(Dataset.from_list([{"text": None}]), "data", ["text"], nullable=True)


class Sound(Exception):
    """Raised where nothing was wrong."""


def conversation(role="user", content="Hi?"):
    return {"prompt": [{"role": "system", "content": "Be brief."}, {"role": role, "content": content}]}


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (conversation(), None),
        (conversation(role=""), "has no role"),
        (conversation(role=None), "has no role"),
        (conversation(content=None), "has the role 'user' and no content"),
        ({"prompt": []}, "an empty list of messages"),
        ({"prompt": None}, "is null"),
        ({"prompt": [None]}, "is no {'role', 'content'} mapping"),
    ],
)
def test_whole_columns_are_checked_as_rows_are(row, fault, monkeypatch):
    """What is found out without reading the rows is what reading them finds."""
    sound = Dataset.from_list([conversation()] * 2)
    data = concatenate_datasets([sound, Dataset.from_list([row], features=sound.features)])
    for _ in range(2):
        with pytest.raises((ValueError, TypeError) if fault else Sound, match=fault and re.escape(fault)) as raised:
            check_texts(data, "data", ["prompt"])
            raise Sound
        assert fault is None or "row 2" in str(raised.value)
        monkeypatch.setattr(rows_module, "_parts", lambda *_: None)


def test_sound_columns_are_not_read(tokenizer, monkeypatch):
    monkeypatch.setattr(rows_module, "check_text", None)
    monkeypatch.setattr(Dataset, "__iter__", None)
    for rows in ([{"prompt": "a", "completion": "b"}], [conversation() | {"completion": chat("assistant", "b")}]):
        check_texts(Dataset.from_list(rows), "data", ["prompt", "completion"])
        check_written(Dataset.from_list(rows), "data", ["prompt", "completion"], tokenizer)


def test_mixed_kinds_in_a_file(tmp_path):
    """`datasets` reads a JSON file whose values are of several types."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": value}) + "\n" for value in ("a", chat("user", "b"))))
    with pytest.raises(TypeError, match="row 1: column 'prompt' holds messages, and a text in a row before"):
        check_texts(load_named(str(path))["train"], "data", ["prompt"])


# ---------------------------------------------------------------- files


def as_json(value) -> bytes:
    try:
        return json.dumps(value).encode()
    except TypeError:  # bytes
        return repr(value).encode("utf-8", "surrogatepass")


@examples(25)
@given(
    data=st.one_of(st.binary(max_size=60), texts.map(str.encode), anything.map(as_json)),
    suffix=st.sampled_from([".jsonl", ".csv", ".parquet", ".json", ".jsonl.gz"]),
)
def test_files_of_any_bytes(data, suffix, tmp_path):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(data)
    rows = outcome(lambda: load_split(str(path), "train"), "rows")
    if rows is not None:
        assert list(rows) is not None  # each row can be read


@examples(15)
@given(rows=st.lists(st.fixed_dictionaries({"text": texts, "more": texts}), min_size=1, max_size=4))
def test_files_keep_their_texts(rows, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_named(str(path))["train"].to_list() == rows


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"text":"a"}\n{"text":"\xff\xfe"}\n', "row 1, holds bytes that are not UTF-8"),
        (b'{"text":"a"}\n{"text":"\\ud800"}\n', "cannot be read: .*surrogate"),
        (b'{"text":"a"}\n{"text":"b', "cannot be read: ArrowInvalid"),
        (b"null\n", "begins with b'null.*expected JSON objects"),
        (b" \n\tnull", "begins with b'null'"),
        (b'\xef\xbb\xbf"a"', "begins with"),
        (b"", "has no rows"),
    ],
)
def test_damaged_json(data, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        load_split(str(path), "train")


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".json.xz", ".ndjson.bz2"])
def test_compressed_json_of_null(suffix, tmp_path):
    path = tmp_path / f"rows{suffix}"
    with fsspec.open(str(path), "wb", compression="infer") as file:
        file.write(b"null\nnull\n")
    with pytest.raises(ValueError, match="begins with b'null"):
        load_named(str(path))


def test_a_huge_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "x" * 200_000}) + "\n")
    assert load_named(str(path))["train"]["text"][0] == "x" * 200_000


NAMES = ("complete", "shards", "settings", "rows", "shard_size", "latent_dim")
manifests = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 3), st.just("../../x"), st.floats(allow_nan=False)),
    lambda parts: st.one_of(
        st.lists(parts, max_size=2), st.fixed_dictionaries({}, optional=dict.fromkeys(NAMES, parts))
    ),
    max_leaves=8,
)


@examples(120)
@given(manifest=manifests, format_=st.sampled_from([None, "scores-1", "codes-1", "weighted-pairs-1"]))
def test_manifests(manifest, format_, tmp_path):
    if isinstance(manifest, dict) and format_ is not None:
        manifest = {"format": format_, "complete": True, **manifest}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    for load in (load_completions, load_scores, load_codes, load_weighted_pairs):
        found = outcome(lambda load=load: load(tmp_path), str(tmp_path))
        assert found is None or len(found) == 0  # scores or codes of a dataset without rows


turns = st.lists(scalars, max_size=2)
questions = st.fixed_dictionaries({"question_id": scalars, "category": scalars, "turns": turns})


@examples(50)
@given(rows=st.lists(st.one_of(anything, questions), max_size=3))
def test_questions(rows, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_bytes(b"".join(as_json(row) + b"\n" for row in rows))
    for row in outcome(lambda: load_questions(path), "questions.jsonl") or []:
        assert all(turn.strip() for turn in row["turns"])


# ---------------------------------------------------------------- answers, tables


@examples(200)
@given(reply=st.one_of(texts, st.text(string.digits + ",.-− ", max_size=12), st.just("9" * 5000), st.just("٣٤,٠٠٠")))
def test_answers(reply):
    found = extract_answer(reply)
    assert found is None or re.fullmatch(r"-?\d+(\.\d+)?", found)
    assert math.isfinite(parse_rating(reply))


@examples(100)
@given(text=texts)
def test_tables_stay_tables(text):
    for cell in (_markdown(text), _cell(text)):
        assert len(cell.splitlines()) <= 1
        assert not re.search(r"(?<!\\)(?:\\\\)*\|", cell)
    lines = _fenced(text).split("\n")
    assert lines[0].removesuffix("text").strip("`") == ""
    assert lines[-1] not in text


# ---------------------------------------------------------------- trees, triples, embeddings


actions = ("chosen", "rejected", "feedback")
odd_turns = st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(actions, values)), max_size=3)
sound_turns = st.lists(st.fixed_dictionaries(dict.fromkeys(actions, said)), min_size=1, max_size=3)
trees = st.one_of(
    anything,
    st.fixed_dictionaries({"prompt": values, "turns": odd_turns}, optional={"tree_id": scalars}),
    st.fixed_dictionaries({"prompt": said, "turns": sound_turns}),
)


@examples(150)
@given(tree=trees)
def test_trees(tree):
    for convert in (tree_to_pairs, tree_to_sft, cross_turn_pairs):
        for row in outcome(lambda convert=convert: convert(tree), "tree") or []:
            for column in {"prompt", "chosen", "rejected", "completion"} & set(row):
                check_text(row[column], "row", column)
            assert "completion" in row or row["chosen"] != row["rejected"]


scores = st.lists(st.one_of(st.floats(), st.integers(), st.just(10**400), scalars), max_size=4)
scored = {"prompt": values, "responses": st.lists(values, max_size=4), "scores": scores}


@examples(150)
@given(row=st.fixed_dictionaries({}, optional=scored))
def test_triples(row):
    triple = outcome(lambda: triple_of(row), "prompt", "responses", "scores")
    if isinstance(triple, dict):
        assert triple["chosen"] != triple["rejected"]
        assert triple["score_reference"] >= triple["score_chosen"] > triple["score_rejected"]


def test_triples_name_the_row():
    rows = [{"prompt": "a", "responses": ["x", "y", "z"], "scores": [3.0, 2.0, 1.0]}] * 2
    rows.append({"prompt": None, "responses": ["x"], "scores": [1.0]})
    with pytest.raises(TypeError, match="Row 2 of the dataset: 'prompt' must be"):
        build_triples(Dataset.from_list(rows))


@examples(20)
@given(prompts=st.lists(values, min_size=1, max_size=3))
def test_embeddings(prompts):
    data = as_dataset([{"prompt": prompt} for prompt in prompts])
    found = outcome(lambda: embed_prompts(data), "row", "column")
    if found is not None:
        for vector in found[EMBEDDING]:
            assert math.isclose(sum(x * x for x in vector), 1, rel_tol=1e-4)


# ---------------------------------------------------------------- prompts and answers of a model


ids = st.lists(st.one_of(st.integers(-2, 400), scalars), max_size=3)
kinds = (
    {"prompt": values, "completion": values},
    {"messages": values},
    {"text": values},
    {"input_ids": ids},
    {"x": values},
)


@examples(40)
@given(rows=st.lists(st.one_of(*map(st.fixed_dictionaries, kinds)), min_size=1, max_size=2))
def test_scores(rows, tokenizer, model):
    found = outcome(lambda: Scorer(model, tokenizer)(rows), "row")
    for score in found or []:
        assert score["num_tokens"] == 0 or score["nll"] >= 0


@pytest.mark.parametrize("ids", [[-1, 2], [2, 330], [10**30, 1], [2, 1.5]])
def test_scores_of_tokens_of_others(ids, tokenizer, model):
    with pytest.raises((ValueError, TypeError), match="row 0"):
        Scorer(model, tokenizer)([{"input_ids": ids}])
    with pytest.raises((ValueError, TypeError), match="row 0"):
        Scorer(model, tokenizer)([{"input_ids": [1, 2], "labels": ids}])


@examples(12)
@given(prompts=st.lists(values, min_size=1, max_size=2))
def test_generation(prompts, tokenizer, model, tmp_path_factory):
    data = as_dataset([{"prompt": prompt} for prompt in prompts])
    folder = tmp_path_factory.mktemp("generated")
    found = outcome(
        lambda: generate_completions(model, data, folder, processing_class=tokenizer, max_new_tokens=2),
        "row",
        "tokens",
    )
    if found is not None:
        for row in found:
            whole = tokenizer.decode(row["prompt_ids"])
            assert row["prompt"] in whole if isinstance(row["prompt"], str) else row["prompt"][-1]["content"] in whole


def completion_of(tokenizer, **changes):
    ids = {name: tokenizer(text)["input_ids"] for name, text in (("prompt_ids", "Hi?"), ("completion_ids", " x"))}
    row = {"prompt": "Hi?", "completion": " x", "truncated": False, "prompt_index": 0, "policy": "p"}
    return row | ids | changes


@pytest.mark.parametrize(
    "column", ["prompt", "completion", "prompt_ids", "completion_ids", "truncated", "prompt_index"]
)
@pytest.mark.parametrize("value", [None, -1, [], [None], "x", {"a": 1}, 3.5])
def test_pairs_of_odd_completions(column, value, tokenizer):
    real = Dataset.from_list([{"prompt": "Hi?", "completion": " fine."}])
    generated = Dataset.from_list([completion_of(tokenizer, **{column: value})])
    assume_refused = not (column == "completion" and value == "x")
    found = outcome(lambda: build_pairs(real, generated, processing_class=tokenizer), "`completions`, row 0")
    assert (found is None) == assume_refused


@examples(20)
@given(prompt=said.filter(lambda text: not text[-1].isspace()), answer=said, generated=said)
def test_pairs_say_what_the_answers_say(prompt, answer, generated, tokenizer):
    end = tokenizer.eos_token_id
    ids = {"prompt_ids": tokenizer(prompt)["input_ids"], "completion_ids": [*tokenizer(generated)["input_ids"], end]}
    real = Dataset.from_list([{"prompt": prompt, "completion": answer}])
    row = completion_of(tokenizer, prompt=prompt, completion=generated, **ids)
    pairs = outcome(lambda: build_pairs(real, Dataset.from_list([row]), processing_class=tokenizer), "No pair is left")
    for pair in pairs or []:
        # The prompt ends where its tokens do not depend on what follows
        whole = tokenizer.decode(pair["prompt_ids"] + pair["chosen_ids"])
        assert whole == prompt + answer.removesuffix("<|im_end|>") + "<|im_end|>" or "<|im_end|>" in answer
        assert tokenizer.decode(pair["prompt_ids"] + pair["rejected_ids"]) == prompt + generated + "<|im_end|>"


@examples(20)
@given(rows=st.lists(st.one_of(messages, anything), min_size=1, max_size=3))
def test_first_turns(rows):
    data = as_dataset([{"messages": chat("user", "a") + chat("assistant", "b")}] + [{"messages": row} for row in rows])
    found = outcome(lambda: first_turns(data), "row")
    for row in found or []:
        assert row["completion"][0]["role"] == "assistant"


@pytest.mark.parametrize("answer", [None, 3, [None], [{"role": "assistant"}], [{"content": "x"}], math.nan])
def test_counterfactual_answers(answer):
    def generate(prompts, name, number):
        return Dataset.from_list([{"prompt_index": i, "completion": answer} for i in range(len(prompts))])

    data = Dataset.from_list([{"prompt": "a"}])
    build = lambda: build_counterfactual_pairs(data, generate, desired="Be short.", undesired="Be long.")  # noqa: E731
    assert outcome(build, ", row 0: column 'completion' ") is None


@examples(15)
@given(prompts=st.lists(values, min_size=1, max_size=2))
def test_counterfactual_prompts(prompts):
    def generate(data, name, number):
        return Dataset.from_list([{"prompt_index": i, "completion": f"{name} {i}"} for i in range(len(data))])

    data = as_dataset([{"prompt": prompt} for prompt in prompts])
    found = outcome(
        lambda: build_counterfactual_pairs(data, generate, desired="Be short.", undesired="Be long."), "row", "No pair"
    )
    for row in found or []:
        check_text(row["prompt"], "row", "prompt")


# ---------------------------------------------------------------- preparation of the trainers


# Kind of rows -> trainer, config, first data
TRAINERS = {
    "sft": (IFTTrainer, IFTConfig, tiny.prompt_completion_data),
    "pairs": (PreferenceTrainer, PreferenceConfig, tiny.preference_data),
    "triples": (TPOTrainer, TPOConfig, tiny.triple_data),
    "lists": (EXOTrainer, EXOConfig, pairs.lists),
    "unpaired": (UFTTrainer, UFTConfig, lambda: tiny.prompt_completion_data().add_column("label", [True, False] * 4)),
    "reward": (EurusRewardTrainer, EurusRewardConfig, tiny.preference_data),
}


@pytest.fixture(scope="module")
def trainers(tokenizer, tmp_path_factory):
    """A trainer of each kind, whose preparation is called on other data, as `evaluate` does."""
    found = {}
    for kind, (trainer_class, config_class, data) in TRAINERS.items():
        model = tiny.reward_model(tokenizer) if kind == "reward" else tiny.model("llama", tokenizer)
        live = {"precompute_ref_log_probs": False} if kind == "lists" else {}  # the others' default; streams need it
        folder = str(tmp_path_factory.mktemp(kind))
        args = config_class(folder, use_cpu=True, bf16=False, report_to="none", **live)
        found[kind] = trainer_class(model=model, args=args, train_dataset=data(), processing_class=tokenizer)
    return found


def prepared(kind, trainer, data):
    """The rows of a dataset as they are trained, after the checks of the constructor and a batch."""
    tokenizer = trainer.processing_class
    if kind == "sft":
        trainer._check_datasets(trainer.args, data, None, False)
        rows = trainer._prepare_dataset(data, tokenizer, trainer.args, False, None, "train")
    else:
        check = check_rows if kind == "reward" else trainer._check_datasets
        check(trainer.args, data, "train_dataset" if kind == "reward" else None)
        rows = trainer._prepare_dataset(data, tokenizer, trainer.args, "train")
    rows = list(rows)
    trainer.data_collator(rows)
    return rows


def row_of(kind, prompt, response, other, index=0):
    """A row of a kind that says `response`, and `other` where it has more."""
    if kind == "sft":
        row = {"prompt": prompt, "completion": response}
    elif kind == "unpaired":
        row = {"prompt": prompt, "completion": response, "label": True}
    elif kind == "lists":
        row = {"prompt": prompt, "completions": [response, other, response], "rewards": [2.0, 0.0, 1.0]}
    else:
        row = {"prompt": prompt, "chosen": response, "rejected": other}
    return row | ({"reference": response} if kind == "triples" else {}) | {"index": index}


def trained(kind, row):
    """Whole sequences of a prepared row that say the response, each with the part that is trained."""
    if kind == "sft":
        return [(row["input_ids"], [label for label in row["labels"] if label != -100])]
    if kind == "reward":
        return [(row["chosen_ids"], row["chosen_ids"])]
    if kind == "unpaired":
        return [(row["prompt_ids"] + row["completion_ids"], row["completion_ids"])]
    found = [(row["prompt_ids"] + row["chosen_ids"], row["chosen_ids"])]
    more = row.get("gold_rows", []) + row.get("others_rows", [])
    return found + [(other["prompt_ids"] + other["completion_ids"], other["completion_ids"]) for other in more]


@pytest.mark.parametrize("kind", TRAINERS)
@examples(8)
@given(drawn=st.lists(st.tuples(said, said, said), min_size=1, max_size=4))
def test_texts_are_trained_as_they_stand(kind, drawn, trainers, tokenizer):
    data = Dataset.from_list([row_of(kind, *row, index) for index, row in enumerate(drawn)])
    rows = outcome(lambda: prepared(kind, trainers[kind], data), "No row of the train dataset")
    kept = set()
    for row in rows or []:
        prompt, response, _ = drawn[row["index"]]
        kept.add(row["index"])
        said_in_full = prompt + (response if response.endswith("<|im_end|>") else response + "<|im_end|>")
        for whole, answer in trained(kind, row):
            assert tokenizer.decode(whole) == said_in_full
            # The answer begins at a border of tokens, at that of the texts or before it
            assert said_in_full.endswith(tokenizer.decode(answer)) or "\ufffd" in tokenizer.decode(answer)
            assert len(tokenizer.decode(answer)) >= len(said_in_full) - len(prompt)
    for index, (_, response, other) in enumerate(drawn):
        same = response.removesuffix("<|im_end|>") == other.removesuffix("<|im_end|>") and kind not in (
            "sft",
            "unpaired",
        )
        blank = response.removesuffix("<|im_end|>").strip() == ""
        assert index in kept or same or blank, f"dropped: {drawn[index]}"


@pytest.mark.parametrize("kind", TRAINERS)
@examples(8)
@given(drawn=st.lists(st.tuples(said, said, said), min_size=1, max_size=3))
def test_messages_are_trained_as_they_stand(kind, drawn, trainers, tokenizer):
    dialogues = [(chat("user", a), chat("assistant", b), chat("assistant", c)) for a, b, c in drawn]
    data = Dataset.from_list([row_of(kind, *row, index) for index, row in enumerate(dialogues)])
    rows = outcome(lambda: prepared(kind, trainers[kind], data), "No row of the train dataset")
    for row in rows or []:
        prompt, response, _ = dialogues[row["index"]]
        for whole, answer in trained(kind, row):
            assert tokenizer.decode(whole) == tokenizer.apply_chat_template(prompt + response, tokenize=False)
            assert response[0]["content"] + "<|im_end|>" in tokenizer.decode(answer)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", TRAINERS)
@examples(10)
@given(
    drawn=st.lists(st.tuples(values, values, values), min_size=1, max_size=2),
    first=st.booleans(),
    as_chat=st.booleans(),
)
def test_odd_rows_are_named(kind, streaming, drawn, first, as_chat, trainers, tokenizer):
    sound = (
        (chat("user", "Hi?"), chat("assistant", "Fine."), chat("assistant", "Bad."))
        if as_chat
        else ("Hi?", " Fine.", " Bad.")
    )
    given_rows = [row_of(kind, *row, index) for index, row in enumerate([sound] * (not first) + drawn)]
    data = IterableDataset.from_generator(lambda: iter(given_rows))
    if not streaming:
        data = as_dataset(given_rows)
    rows = outcome(
        lambda: prepared(kind, trainers[kind], data), "row", "No row", "these columns must all be", "must both be"
    )
    for row in rows or []:
        for whole, answer in trained(kind, row):
            assert answer
            assert len(whole) >= len(answer)


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_huge_row_is_cut_or_dropped(kind, trainers):
    data = Dataset.from_list([row_of(kind, "Hi?", " a" * 100_000, " b"), row_of(kind, "Hi?", " Fine.", " b", 1)])
    rows = prepared(kind, trainers[kind], data)
    assert 1 in {row["index"] for row in rows}
    batch = trainers[kind].data_collator(rows)
    assert batch["input_ids"].shape[1] <= 1024


@pytest.mark.parametrize("kind", TRAINERS)
def test_nothing_to_train_is_an_error(kind, trainers):
    for response in ("", "  \n"):
        data = Dataset.from_list([row_of(kind, "Hi?", response, response)] * 3)
        with pytest.raises(
            ValueError, match="No row of|is blank in all rows|both responses of a group|nothing would be trained"
        ):
            prepared(kind, trainers[kind], data)


@pytest.mark.parametrize("kind", [kind for kind in TRAINERS if kind != "lists"])
def test_lost_messages_are_an_error(kind, trainers):
    """The chat template of Qwen writes nothing of roles that it does not know."""
    sound = row_of(kind, chat("user", "Hi?"), chat("assistant", "Fine."), chat("assistant", "Bad."))
    for odd in (
        row_of(kind, chat("wizard", "Hi?"), chat("assistant", "Fine."), chat("assistant", "Bad.")),
        row_of(kind, chat("user", "Hi?"), chat("wizard", "Fine."), chat("assistant", "Bad.")),
    ):
        with pytest.raises(
            ValueError,
            match="row 1: column '.*' holds a message of the role 'wizard', which the chat template leaves out",
        ):
            prepared(kind, trainers[kind], Dataset.from_list([sound, odd]))


@pytest.mark.parametrize("kind", [kind for kind in TRAINERS if kind != "lists"])
def test_ends_within_a_response_are_counted(kind, trainers, monkeypatch):
    said = pairs.message_log(monkeypatch, rows_module)
    inner = [row_of(kind, "Hi?", f" one<|im_end|> two{i}", " b", i) for i in range(3)]
    sound = [row_of(kind, "Hi?<|im_end|>", f" three{i}<|im_end|>", " b", 3 + i) for i in range(2)]
    assert len(prepared(kind, trainers[kind], Dataset.from_list(inner + sound))) == 5
    assert len(said) == 1
    assert said[0].startswith("In 3 of 5 rows of `train dataset` an answer holds '<|im_end|>' before its end.")
    in_chat = row_of(kind, chat("user", "<|im_end|>"), chat("assistant", "one<|im_end|>"), chat("assistant", "b"))
    prepared(kind, trainers[kind], Dataset.from_list([in_chat]))
    assert said[1].startswith("In 1 of 1 rows")
    prepared(kind, trainers[kind], Dataset.from_list(sound))
    assert len(said) == 2


@pytest.mark.parametrize("kind", ["pairs", "reward", "unpaired"])
@pytest.mark.parametrize(("chosen", "rejected"), [("abc ", "xyz"), ("", ""), ("", "a")])
def test_implicit_prompts_must_exist(kind, chosen, rejected, trainers):
    rows = [{"chosen": "Hi? a", "rejected": "Hi? b"}, {"chosen": chosen, "rejected": rejected}]
    if kind == "reward":  # it reads no prompt
        prepared(kind, trainers[kind], Dataset.from_list(rows))
        return
    with pytest.raises(ValueError, match="row 1: 'chosen' and 'rejected' share no beginning"):
        prepared(kind, trainers[kind], Dataset.from_list(rows))


def test_templates_that_refuse_a_row_name_it(trainers, tokenizer, monkeypatch):
    refusing = (
        "{{ raise_exception('no tools here') if messages[-1].role == 'tool' else '' }}" + tokenizer.chat_template
    )
    monkeypatch.setattr(trainers["pairs"].processing_class, "chat_template", refusing)
    sound = row_of("pairs", chat("user", "Hi?"), chat("assistant", "Fine."), chat("assistant", "Bad."))
    odd = row_of("pairs", chat("user", "Hi?"), chat("tool", "Fine."), chat("assistant", "Bad."))
    with pytest.raises(
        ValueError, match=r"row 2: column 'chosen' cannot be tokenized \(TemplateError: no tools here\)"
    ):
        prepared("pairs", trainers["pairs"], Dataset.from_list([sound, sound, odd]))


def weigh_tokens(data, model, tokenizer):
    prompts = {"positive_prompt": "good", "negative_prompt": "bad"}
    return estimate_token_weights(data, model, processing_class=tokenizer, **prompts)


def score_reference(data, model, tokenizer):
    return score_references(data, model, processing_classes=[tokenizer])


@pytest.mark.parametrize("score", [score_reference, weigh_tokens])
@pytest.mark.parametrize("odd", [None, [None], [], [{"role": "assistant", "content": None}]])
def test_references_and_weights_name_the_row(score, odd, model, tokenizer):
    rows = [row_of("pairs", chat("user", "Hi?"), chat("assistant", "Fine."), chat("assistant", "Bad."))] * 2
    data = as_dataset([*rows, rows[0] | {"rejected": odd}])
    assert outcome(lambda: score(data, model, tokenizer), "row 2: column 'rejected'") is None


@pytest.mark.parametrize("kind", TRAINERS)
def test_losses_of_odd_texts_are_finite(kind, trainers):
    data = Dataset.from_list([row_of(kind, f"a{odd}", f"b{odd}c", f"d{odd}", i) for i, odd in enumerate(ODD)])
    trainer = trainers[kind]
    rows = prepared(kind, trainer, data)
    assert len(rows) == len(ODD)
    batch = trainer.data_collator(rows)
    assert math.isfinite(trainer.compute_loss(trainer.model, dict(batch)).item())


@pytest.mark.parametrize("kind", ["pairs", "triples", "unpaired", "reward"])
def test_an_end_alone_says_nothing(kind, trainers):
    rows = [
        row_of(kind, chat("user", "Hi?"), chat("assistant", text), chat("assistant", "b"))
        for text in ("<|im_end|>", "a")
    ]
    assert len(prepared(kind, trainers[kind], Dataset.from_list(rows))) == 1


# ---------------------------------------------------------------- studies


@pytest.fixture(scope="module")
def inputs(tokenizer, tmp_path_factory):
    return tiny_study.write_inputs(tmp_path_factory.mktemp("inputs"), tokenizer)


@pytest.mark.parametrize("column", ["prompt", "chosen"])
@pytest.mark.parametrize(
    "odd", [None, 3, [None], [], ["a"], {"a": 1}, "", "  ", [{"role": "user"}], [{"content": "a"}], math.nan]
)
def test_studies_name_the_row(column, odd, inputs, tmp_path):
    rows = tiny_study.read_rows(inputs["train"])
    rows[3][column] = odd
    given = inputs | {"train": tiny_study.write_rows(tmp_path / "odd.jsonl", rows)}
    check = Study(tiny_study.settings(given, tmp_path / "study")).check
    if (column, odd) == ("prompt", "") or (column == "prompt" and odd == "  "):
        check()  # an empty prompt is one
    elif column == "chosen" and odd in ("", "  ", []):
        check()  # left out, and counted
    else:
        assert outcome(check, "row") is None
    assert not (tmp_path / "study").exists()


# ---------------------------------------------------------------- no false refusals


def test_parts_with_the_fields_of_others():
    """Arrow gives all parts of a message the same fields."""
    parts = [{"type": "thinking", "thinking": "a", "text": None}, {"type": "text", "thinking": None, "text": "b"}]
    check_text(chat("assistant", parts), "row", "chosen")


@pytest.mark.parametrize("kind", ["pairs", "unpaired", "reward"])
@pytest.mark.parametrize("unused", [[{"from": "human", "value": "a"}], ["a", "b"]])
def test_columns_that_are_not_trained_are_not_checked(kind, unused, trainers):
    row = row_of(kind, "Hi?", " Fine.", " Bad.") | {"messages": unused}
    assert len(prepared(kind, trainers[kind], Dataset.from_list([row]))) == 1


@pytest.mark.parametrize("unused", [[{"from": "human", "value": "a"}], ["a", "b"]])
def test_messages_beside_a_text_are_not_checked(unused, trainers):
    data = Dataset.from_list([{"text": "Hi? Fine.", "messages": unused}])
    assert len(prepared("sft", trainers["sft"], data)) == 1


@pytest.mark.parametrize(("place", "lost"), [("loop.first", False), ("loop.last", False), ("false", True)])
def test_roles_of_one_place(place, lost, tokenizer, monkeypatch):
    template = (
        "{% for m in messages %}{% if m.role == 'user' or " + place + " %}{{ m.content }}{% endif %}{% endfor %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    for role in ("developer", "tool", "system"):
        assert rows_module._leaves_out(tokenizer, role) == lost


def test_minus_zero():
    assert [extract_answer(text) for text in ("-0", "-0.0", "-3")] == ["0", "0", "-3"]


@pytest.mark.parametrize(("tail", "warnings"), [("", 0), (" More.<|im_end|>", 1)])
def test_ends_of_turns_in_an_implicit_prompt_are_no_ends_of_an_answer(tail, warnings, tokenizer, monkeypatch):
    said = pairs.message_log(monkeypatch, rows_module)
    prompt = "<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\n"
    rows = [{"chosen": f"{prompt}Hi.<|im_end|>{tail}", "rejected": f"{prompt}No.<|im_end|>"}]
    rows_module.check_written(Dataset.from_list(rows), "data", ["chosen", "rejected"], tokenizer)
    assert len(said) == warnings
