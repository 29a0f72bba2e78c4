"""Pairs from the contrast of prompts: every variant's rows, the filters, and a run from prompts to a trained model."""

import re

import pytest
import tiny
from datasets import Dataset, concatenate_datasets
from pairs import message_log

from trl_ift import PreferenceConfig, PreferenceTrainer
from trl_ift.cli import main
from trl_ift.data import build_counterfactual_pairs, counterfactual, generation
from trl_ift.data.counterfactual import VARIANTS, answer_with
from trl_ift.data.pairs import NoPairsError


PLUS, MINUS = "Answer briefly.", "Talk like a pirate."
NEEDED = {"enc": {"desired": PLUS}, "dis": {"undesired": MINUS}, "con": {"desired": PLUS, "undesired": MINUS}}
NEEDED["neg"] = NEEDED["dis"]
every_variant = pytest.mark.parametrize("variant", VARIANTS)

TEXTS = Dataset.from_list([{"prompt": question} for question, _ in tiny.QUESTIONS])
CHATS = Dataset.from_list([{"prompt": [{"role": "user", "content": question}]} for question, _ in tiny.QUESTIONS])


def like(prompt, text):
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def tag(prompts, name, number):
    """Answers that say which prompt they answer."""
    rows = []
    for index, prompt in enumerate(prompts["prompt"]):
        for sample in range(number):
            text = f"{sample}: {counterfactual._all_text(prompt)}"
            rows.append({"prompt_index": index, "completion": like(prompt, text), "truncated": False})
    return Dataset.from_list(rows)


def answers(*texts, **columns):
    """A generator that gives the answers of a side, by its name: texts of the plain and of the styled prompts."""
    plain, styled = texts

    def generate(prompts, name, number):
        found = plain if name == "control" else styled
        rows = [{"prompt_index": i, "completion": like(p, found[i])} for i, p in enumerate(prompts["prompt"])]
        rows = [row for row in rows if counterfactual.text_of(row["completion"]) != "SKIPPED"]
        return Dataset.from_list([row | {k: v[row["prompt_index"]] for k, v in columns.items()} for row in rows])

    return generate


def build(data=TEXTS, generate=tag, variant="con", **settings):
    return build_counterfactual_pairs(data, generate, variant=variant, **{**NEEDED[variant], **settings})


class TestRows:
    @every_variant
    def test_texts(self, variant):
        """The table of the paper: prompt, chosen and rejected of each variant."""
        prompt, chosen, rejected = {
            "enc": ("{q}", f"0: {PLUS}\n\n{{q}}", "0: {q}"),
            "dis": ("{q}", "0: {q}", f"0: {MINUS}\n\n{{q}}"),
            "con": ("{q}", f"0: {PLUS}\n\n{{q}}", f"0: {MINUS}\n\n{{q}}"),
            "neg": (f"{MINUS}\n\n{{q}}", "0: {q}", f"0: {MINUS}\n\n{{q}}"),
        }[variant]
        label = {"enc": PLUS, "dis": MINUS, "con": f"{PLUS} / {MINUS}", "neg": MINUS}[variant]
        assert build(variant=variant).to_list() == [
            {
                "prompt": prompt.format(q=question),
                "chosen": chosen.format(q=question),
                "rejected": rejected.format(q=question),
                "style": label,
                "variant": variant,
                "prompt_index": index,
            }
            for index, (question, _) in enumerate(tiny.QUESTIONS)
        ]

    @every_variant
    @pytest.mark.parametrize("position", [None, "system", "user_prefix", "user_suffix"])
    def test_messages(self, variant, position):
        def prompt(question, style):
            if style is None:
                return [{"role": "user", "content": question}]
            if position in (None, "system"):
                return [{"role": "system", "content": style}, {"role": "user", "content": question}]
            parts = [style, question] if position == "user_prefix" else [question, style]
            return [{"role": "user", "content": "\n\n".join(parts)}]

        styles = {"control": None, "desired": PLUS, "undesired": MINUS}
        for row, (question, _) in zip(
            build(CHATS, variant=variant, style_position=position), tiny.QUESTIONS, strict=True
        ):
            expected = [prompt(question, styles[side]) for side in VARIANTS[variant]]
            assert row["prompt"] == expected[0]
            for name, seen in (("chosen", expected[1]), ("rejected", expected[2])):
                assert row[name] == like(seen, "0: " + "\n".join(message["content"] for message in seen))

    def test_conversations(self):
        """An instruction is added to a system prompt, and to the last message of the user."""
        turns = [("system", "Be kind."), ("user", "Hi."), ("assistant", "Hello!"), ("user", "Who are you?")]
        data = Dataset.from_list([{"prompt": [{"role": role, "content": text} for role, text in turns]}])

        def contents(position):
            prompt = build(data, variant="neg", style_position=position)[0]["prompt"]
            assert [message["role"] for message in prompt] == [role for role, _ in turns]
            return [message["content"] for message in prompt]

        assert contents("system") == [f"Be kind.\n\n{MINUS}", "Hi.", "Hello!", "Who are you?"]
        assert contents("user_prefix") == ["Be kind.", "Hi.", "Hello!", f"{MINUS}\n\nWho are you?"]
        assert contents("user_suffix") == ["Be kind.", "Hi.", "Hello!", f"Who are you?\n\n{MINUS}"]

    @every_variant
    def test_training_prompts(self, variant):
        """Never with the desired instruction, and with the undesired one only to negate it."""
        for data in (TEXTS, CHATS):
            for prompt in build(data, variant=variant)["prompt"]:
                text = counterfactual._all_text(prompt)
                assert PLUS not in text
                assert (MINUS in text) == (variant == "neg")

    def test_swapped_instructions(self):
        swapped = build(desired=MINUS, undesired=PLUS)
        rows = build()
        assert (swapped["chosen"][:], swapped["rejected"][:]) == (rows["rejected"][:], rows["chosen"][:])
        assert swapped["prompt"][:] == rows["prompt"][:]

    def test_several_pairs_of_a_prompt(self):
        rows = build(num_pairs_per_prompt=3, style="terse")
        assert len(rows) == 24
        assert rows["prompt_index"][:6] == [0, 0, 0, 1, 1, 1]
        for number, row in enumerate(rows):
            assert row["chosen"].startswith(f"{number % 3}: ")
            assert row["rejected"].startswith(f"{number % 3}: ")
            assert row["style"] == "terse"

    def test_tools_are_kept(self):
        data = CHATS.add_column("tools", ["[]"] * 8)
        seen = []
        rows = build(data, lambda prompts, *rest: (seen.append(prompts.column_names), tag(prompts, *rest))[1])
        assert seen == [["prompt", "tools"]] * 2
        assert rows["tools"][:] == ["[]"] * 8

    def test_names_of_the_sides(self):
        """The plain answers serve all styles, others have names of their own."""
        seen = []
        for text, position in (("A", None), ("B", None), ("A", "user_suffix")):
            note = lambda prompts, name, number: (seen.append(name), tag(prompts, name, number))[1]  # noqa: E731
            build_counterfactual_pairs(TEXTS, note, variant="enc", desired=text, style_position=position)
        assert seen.count("control") == 3
        styled = [name for name in seen if name != "control"]
        assert len(set(styled)) == 3
        assert all(re.fullmatch(r"desired-[0-9a-f]{8}", name) for name in styled)


PLAIN = [f"plain {i}" for i in range(8)]
STYLED = [f"brief {i}" for i in range(8)]


class TestFilters:
    def left(self, monkeypatch, plain=None, styled=None, **settings):
        """Rows of the prompts whose pairs are left, and what the warning says."""
        messages = message_log(monkeypatch, counterfactual)
        columns = {"truncated": settings.pop("truncated")} if "truncated" in settings else {}
        texts = [PLAIN[: len(PLAIN) - len(first)] for first in (plain or [], styled or [])]
        texts = [[*first, *rest[::-1]] for first, rest in zip((plain or [], styled or []), texts, strict=True)]
        rows = build(TEXTS, answers(*texts, **columns), "enc", **settings)
        return rows["prompt_index"][:], messages

    def test_nothing_is_dropped(self, monkeypatch):
        assert self.left(monkeypatch, PLAIN, STYLED) == (list(range(8)), [])

    @pytest.mark.parametrize(
        ("plain", "styled", "reason"),
        [
            ("same", " same\n", "identical"),
            (" \n", "x", "empty"),
            ("x", "", "empty"),
            ("I'm sorry, but I cannot help.", "x", "refusing"),
            ("x", "As an AI, I have no taste.", "refusing"),
            ("x", "As requested, briefly: x.", "speaking of the instruction"),
            ("SKIPPED", "x", "without an answer"),
        ],
    )
    def test_reasons(self, monkeypatch, plain, styled, reason):
        found = self.left(monkeypatch, [plain, *PLAIN[1:]], [styled, *STYLED[1:]])
        assert found == (list(range(1, 8)), [f"Dropped of 8 pairs: 1 {reason}."])

    def test_a_plain_answer_may_speak_of_instructions(self, monkeypatch):
        rows, _ = self.left(monkeypatch, ["As requested by law.", *PLAIN[1:]], STYLED)
        assert rows == list(range(8))

    def test_patterns(self, monkeypatch):
        """Of one's own, or none."""
        plain, styled = (
            ["I cannot.", "Nein.", *PLAIN[2:]],
            ["As requested: x.", "x", "Wie gewünscht.", *STYLED[3:]],
        )
        assert self.left(monkeypatch, plain, styled, refusals=None, echoes=None) == (list(range(8)), [])
        rows, messages = self.left(monkeypatch, plain, styled, refusals="^nein", echoes="^wie")
        assert rows == [0, 3, 4, 5, 6, 7]
        assert messages == ["Dropped of 8 pairs: 1 refusing, 1 speaking of the instruction."]

    def test_cut_answers(self, monkeypatch):
        cut = [True, True, *[False] * 6]
        rows, messages = self.left(monkeypatch, PLAIN, STYLED, truncated=cut)
        assert (rows, messages) == ([2, 3, 4, 5, 6, 7], ["Dropped of 8 pairs: 2 cut."])
        rows, _ = self.left(monkeypatch, PLAIN, STYLED, truncated=cut, drop_truncated=False)
        assert rows == list(range(8))

    @every_variant
    def test_contrast(self, variant):
        """The style is on the chosen side where it is desired, on the rejected one where it is not."""
        plain = ["plain", "STYLE a", "plain", "STYLE a", *["plain"] * 4]
        styled = ["STYLE b", "STYLE b", "b", "b", *["STYLE b"] * 4]
        generate = answers(plain, styled)
        if variant == "con":  # both sides are styled: the undesired one answers as the plain one did
            generate = lambda prompts, name, number: answers(plain, styled)(  # noqa: E731
                prompts, "control" if name.startswith("undesired") else name, number
            )
        rows = build(TEXTS, generate, variant, is_styled=lambda text: "STYLE" in text)
        assert rows["prompt_index"][:] == [0, 4, 5, 6, 7]

    def test_prompts_with_the_instruction(self, monkeypatch):
        messages = message_log(monkeypatch, counterfactual)
        data = concatenate_datasets([Dataset.from_list([{"prompt": f"Why? {PLUS.upper()}"}]), TEXTS])
        rows = build(data, num_pairs_per_prompt=2)
        assert rows["prompt_index"][:] == [index for index in range(1, 9) for _ in range(2)]
        assert messages == ["Dropped of 18 pairs: 2 with the instruction in the prompt."]

    def test_plain_answers_are_those_to_all_prompts(self):
        """Whatever the instruction, so that a second style finds them in the folder."""
        data = concatenate_datasets([Dataset.from_list([{"prompt": f"Why? {PLUS}"}]), TEXTS])
        asked = {}
        for style in (PLUS, MINUS):
            note = lambda prompts, name, number: (  # noqa: E731
                asked.setdefault((style, name.split("-")[0]), prompts["prompt"][:]),  # noqa: B023
                answers(["x", *PLAIN], [*STYLED, "brief 8"])(prompts, name, number),
            )[1]
            for variant in ("enc", "neg"):
                rows = build(data, note, variant, **dict.fromkeys(NEEDED[variant], style))
                first = int(style == PLUS)
                assert rows["prompt_index"][:] == list(range(first, 9))
                assert rows["chosen" if variant == "neg" else "rejected"][:] == ["x", *PLAIN][first:]
        assert asked[PLUS, "control"] == asked[MINUS, "control"] == data["prompt"][:]
        assert asked[PLUS, "desired"] == [f"{PLUS}\n\n{question}" for question, _ in tiny.QUESTIONS]

    def test_lengths_are_reported(self, monkeypatch):
        messages = message_log(monkeypatch, counterfactual, "info")
        build(TEXTS, answers(["one two three"] * 8, ["one"] * 8), "enc")
        assert messages == ["Words of an answer, on average: 1.0 chosen, 3.0 rejected."]

    def test_no_pair_is_left(self):
        with pytest.raises(NoPairsError, match="No pair is left of 8: 8 identical"):
            build(TEXTS, answers(PLAIN, PLAIN), "enc")
        with pytest.raises(NoPairsError, match="No pair is left of 1: 1 with the instruction in the prompt"):
            build(Dataset.from_list([{"prompt": PLUS}]))


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        (TEXTS, {"variant": "con", "desired": PLUS}, "`variant='con'` needs the instruction `undesired`"),
        (TEXTS, {"variant": "con", "undesired": PLUS}, "`variant='con'` needs the instruction `desired`"),
        (TEXTS, {"variant": "enc"}, "`variant='enc'` needs the instruction `desired`"),
        (TEXTS, {"variant": "dis"}, "`variant='dis'` needs the instruction `undesired`"),
        (TEXTS, {"variant": "neg"}, "`variant='neg'` needs the instruction `undesired`"),
        (
            TEXTS,
            {"variant": "enc", "desired": "x", "undesired": "y"},
            "`undesired='y'` has no effect with `variant='enc'`",
        ),
        (
            TEXTS,
            {"variant": "neg", "desired": "x", "undesired": "y"},
            "`desired='x'` has no effect with `variant='neg'`",
        ),
        (TEXTS, {"variant": "CON"}, "`variant='CON'` is not known"),
        (TEXTS, NEEDED["con"] | {"style_position": "end"}, "`style_position='end'` is not known"),
        (TEXTS, NEEDED["con"] | {"style_position": "system"}, "needs prompts that are messages"),
        (TEXTS, NEEDED["con"] | {"num_pairs_per_prompt": 0}, "`num_pairs_per_prompt=0` is out of range"),
        (TEXTS, NEEDED["con"] | {"refusals": "("}, r"`refusals='\('` is no regular expression"),
        (TEXTS.rename_column("prompt", "text"), NEEDED["con"], r"has the columns \['text'\]. Expected 'prompt'"),
        (TEXTS.select([]), NEEDED["con"], "is empty"),
        (TEXTS.to_iterable_dataset(), NEEDED["con"], "is a IterableDataset; expected a `Dataset`"),
        (Dataset.from_list([{"prompt": "a"}, {"prompt": ""}]), NEEDED["con"], "`dataset`, row 1: the prompts must"),
        (
            Dataset.from_list([{"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}]),
            NEEDED["con"],
            "row 0: a message has a content of parts",
        ),
        (
            Dataset.from_list([{"prompt": [{"role": "system", "content": "a"}]}]),
            NEEDED["con"] | {"style_position": "user_prefix"},
            "row 0: no message of the user",
        ),
    ],
)
def test_bad_input(data, settings, message):
    """Before anything is generated."""
    with pytest.raises((ValueError, TypeError), match=message):
        build_counterfactual_pairs(data, None, **settings)


def test_a_generator_that_returns_something_else():
    with pytest.raises(ValueError, match="`generate` returned rows without 'prompt_index' for 'control'"):
        build(generate=lambda *_: Dataset.from_list([{"completion": "x"}]), variant="enc")


# ---------------------------------------------------------------- with a model

OPTIONS = {"max_new_tokens": 6, "batch_tokens": 2000}


def test_an_empty_instruction_changes_nothing(model_dir, tmp_path):
    """Greedy answers to the same prompts are the same."""
    generate = answer_with(model_dir, tmp_path, temperature=0, **OPTIONS)
    with pytest.raises(NoPairsError, match="No pair is left of 8: 8 identical"):
        build(CHATS, generate, "enc", desired="", drop_truncated=False)


def test_an_interrupted_run_goes_on(model_dir, tmp_path, monkeypatch):
    """What was sampled is kept, and the plain answers serve other styles."""
    generate = answer_with(model_dir, tmp_path / "killed", shard_size=3, **OPTIONS)
    options = {"variant": "enc", "drop_truncated": False}
    written, write = [], generation.write_file

    def stop(path, data):
        if len(written) == 4:  # three shards of plain answers, one of the others
            raise KeyboardInterrupt
        written.append(f"{path.parent.name}/{path.name}")
        write(path, data)

    monkeypatch.setattr(generation, "write_file", stop)
    with pytest.raises(KeyboardInterrupt):
        build(CHATS, generate, **options)
    monkeypatch.setattr(generation, "write_file", lambda *args: (written.append(str(args[0])), write(*args))[1])
    resumed = build(CHATS, generate, **options)
    assert len(written) == 6
    whole = build(CHATS, answer_with(model_dir, tmp_path / "whole", shard_size=3, **OPTIONS), **options)
    assert resumed.to_list() == whole.to_list()
    del written[:]
    build(CHATS, generate, desired="Answer in verse.", **options)
    assert len(written) == 3
    assert not any("control" in path for path in written)


def test_from_prompts_to_a_trained_model(model_dir, tmp_path, monkeypatch, capsys, tokenizer):
    """The command, and DPO on what it writes."""
    monkeypatch.chdir(tmp_path)
    CHATS.to_json("prompts.jsonl")
    options = ["--model_name_or_path", model_dir, "--dataset_name", "prompts.jsonl", "--answers_dir", "answers"]
    options += ["--max_new_tokens", "12", "--keep_truncated", "--desired", PLUS, "--undesired", MINUS]
    assert main(["counterfactual", *options, "--max_rows", "6", "--output", "pairs.parquet"]) == 0
    printed = capsys.readouterr().out
    assert "6 pairs written to pairs.parquet; dropped: none." in printed
    assert "Words of an answer, on average: " in printed
    pairs = Dataset.from_parquet("pairs.parquet")
    generate = answer_with(model_dir, "again", max_new_tokens=12)
    assert pairs.to_list() == build(CHATS.take(6), generate, drop_truncated=False).to_list()
    assert pairs["prompt"][:] == CHATS["prompt"][:6]

    args = PreferenceConfig("run", use_cpu=True, bf16=False, report_to="none", max_steps=10, learning_rate=1e-3)
    args.logging_steps = 1
    trainer = PreferenceTrainer(
        tiny.model("llama", tokenizer), args=args, train_dataset=pairs, processing_class=tokenizer
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert logged[-1]["rewards/margins"] > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "x.jsonl"], "expected a file that ends with .parquet"),
        (["--output", "there.parquet"], "`--output there.parquet` exists"),
        (["--output", "x.parquet", "--style_pattern", "("], "`--style_pattern (` is no regular expression"),
        (["--output", "x.parquet", "--undesired", "x"], "`undesired='x'` has no effect with `variant='enc'`"),
        (["--output", "x.parquet", "--max_rows", "0"], "`max_rows=0` is out of range"),
    ],
)
def test_wrong_commands(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.parquet").touch()
    given = [
        "--model_name_or_path",
        "no/model",
        "--dataset_name",
        "none.jsonl",
        "--answers_dir",
        "a",
        "--variant",
        "enc",
    ]
    assert main(["counterfactual", *given, "--desired", "x", *options]) == 1
    assert message in capsys.readouterr().err


def test_pattern_of_the_command(model_dir, tmp_path, monkeypatch, capsys):
    """Nothing matches it: no pair has the contrast."""
    monkeypatch.chdir(tmp_path)
    CHATS.to_json("prompts.jsonl")
    options = ["--model_name_or_path", model_dir, "--dataset_name", "prompts.jsonl", "--answers_dir", "answers"]
    options += ["--max_new_tokens", "6", "--keep_truncated", "--variant", "enc", "--desired", PLUS, "--max_rows", "2"]
    options += ["--style_pattern", "no such text", "--output", "x.parquet"]
    assert main(["counterfactual", *options]) == 1
    assert "No pair is left of 2: 2 without the contrast" in capsys.readouterr().err
