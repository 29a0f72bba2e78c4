"""Self-play pairs: their token ids and texts, which are dropped, what is refused, the trainer on them, the command."""

import json
from pathlib import Path

import datasets
import pytest
import tiny
import torch
from datasets import Dataset, load_dataset
from pairs import make, message_log
from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_ift import SPINConfig, SPINTrainer
from trl_ift.cli import main
from trl_ift.data import build_pairs, generate_completions
from trl_ift.data import pairs as module
from trl_ift.data.pairs import count_pairs, first_turns


COLUMNS = [
    "prompt", "chosen", "rejected", "prompt_ids", "chosen_ids", "rejected_ids", "truncated", "prompt_index", "policy",
]  # fmt: skip
TEXT, CHAT = tiny.prompt_completion_data(), tiny.conversational_data()
END = "<|im_end|>"


@pytest.fixture(autouse=True)
def workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TRL_IFT_DEBUG", raising=False)


@pytest.fixture(scope="module")
def sampled(tokenizer, tmp_path_factory):
    """Real completions of a model that ends some answers by itself; by data, in the folders and in memory."""
    model = lively(tokenizer)
    options = {"processing_class": tokenizer, "max_new_tokens": 12, "num_completions": 3}
    folders = {name: str(tmp_path_factory.mktemp(name)) for name in ("text", "chat")}
    found = {
        name: generate_completions(model, dataset.remove_columns("completion"), folders[name], **options)
        for name, dataset in (("text", TEXT), ("chat", CHAT))
    }
    for completions in found.values():
        assert 2 < sum(completions["truncated"]) < len(completions) - 2
    tokenizer.save_pretrained(folders["text"] + "-tokenizer")
    return {"folders": folders, "model": folders["text"] + "-tokenizer", **found}


def lively(tokenizer):
    """A model with likely and unlikely tokens, that ends some answers by itself."""
    model = tiny.model("llama", tokenizer)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head.mul_(4)
        head[tokenizer.eos_token_id].mul_(2.4)
    return model


def completions_of(dataset, answers, tokenizer, cut=(), end=END, policy="a policy"):
    """Completions as `generate_completions` returns them; `None` for a prompt that was skipped."""
    rows = []
    for index, (row, answer) in enumerate(zip(dataset, answers, strict=True)):
        if answer is None:
            continue
        chat, truncated = not isinstance(row["prompt"], str), index in cut
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        tools = json.loads(row["tools"]) if row.get("tools") else None
        prompt = (
            tokenizer.apply_chat_template(row["prompt"], tools=tools, **options) if chat else tokenizer(row["prompt"])
        )
        ids = tokenizer(answer if truncated else answer + end)["input_ids"]
        rows.append(
            {
                "prompt": row["prompt"],
                "completion": [{"role": "assistant", "content": answer}] if chat else answer,
                "prompt_ids": prompt["input_ids"],
                "completion_ids": ids,
                "num_tokens": len(ids),
                "truncated": truncated,
                "prompt_index": index,
                "sample_index": 0,
                "policy": policy,
            }
        )
    return Dataset.from_list(rows)


def with_template(tokenizer, template):
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=END, pad_token="<|pad|>")
    own.chat_template = template
    return own


# ---------------------------------------------------------------- token ids and texts


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_ids_of_sampled_answers(kind, sampled, tokenizer):
    data = {"text": TEXT, "chat": CHAT}[kind]
    pairs = build_pairs(data, sampled[kind], processing_class=tokenizer)
    assert pairs.column_names == COLUMNS
    kept = [row for row in sampled[kind] if tiny_text(row["completion"]).strip()]
    assert len(pairs) == len(kept)
    end = tokenizer.eos_token_id
    for pair, row in zip(pairs, kept, strict=True):
        real = data[row["prompt_index"]]
        assert pair["prompt"] == real["prompt"]
        assert pair["chosen"] == real["completion"]
        for name in ("truncated", "prompt_index", "policy"):
            assert pair[name] == row[name]
        assert pair["rejected"] == row["completion"]
        # As sampled: with one end of sequence, or without any if it was cut
        assert pair["prompt_ids"] + pair["rejected_ids"] == row["prompt_ids"] + row["completion_ids"]
        assert pair["rejected_ids"].count(end) == (not row["truncated"])
        assert (pair["rejected_ids"][-1] == end) == (not row["truncated"])
        # The real answer ends as the generated ones do, with nothing behind
        assert pair["prompt_ids"] == row["prompt_ids"]
        assert pair["chosen_ids"] == tokenizer(tiny_text(real["completion"]))["input_ids"] + [end]
    assert {pair["truncated"] for pair in pairs} == {True, False}
    assert len({pair["prompt_index"] for pair in pairs}) == 8
    assert len(pairs) > 16  # several of a prompt


def tiny_text(completion):
    return completion if isinstance(completion, str) else completion[0]["content"]


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_finished_pairs_are_tokenized_as_trl_does(kind, tmp_path, tokenizer):
    """But for the line break that chat templates write behind the end."""
    data = {"text": TEXT, "chat": CHAT}[kind]
    space = " " if kind == "text" else ""
    completions = completions_of(data, [space + answer for answer in tiny.REJECTED], tokenizer)
    pairs = build_pairs(data, completions, processing_class=tokenizer)
    texts = pairs.select_columns(["prompt", "chosen", "rejected"])
    model = tiny.model("llama", tokenizer)
    theirs = make(SPINTrainer, SPINConfig, tmp_path, model, texts, tokenizer).train_dataset
    newline = [] if kind == "text" else tokenizer("\n")["input_ids"]
    for pair, row in zip(pairs, theirs, strict=True):
        assert pair["prompt_ids"] == row["prompt_ids"]
        for name in ("chosen_ids", "rejected_ids"):
            assert pair[name] + newline == row[name]


def test_text_that_brings_its_end(tokenizer):
    data = Dataset.from_list([row | {"completion": row["completion"] + END} for row in TEXT])
    pairs = build_pairs(data, completions_of(data, tiny.REJECTED, tokenizer), processing_class=tokenizer)
    for pair, row in zip(pairs, TEXT, strict=True):
        assert pair["chosen_ids"] == tokenizer(row["completion"] + END)["input_ids"]
        assert pair["chosen_ids"].count(tokenizer.eos_token_id) == 1


def test_tokens_that_merge_across_the_prompt(tokenizer):
    """Where a prompt's tokens change with what follows, both answers begin with the first one that does."""
    data = Dataset.from_list([{"prompt": "What is two plus two? Th", "completion": "ey are"}])
    own = tokenizer
    merged, split = own("What is two plus two? They are")["input_ids"], own("What is two plus two? Th")["input_ids"]
    assert merged[: len(split)] != split
    row = build_pairs(data, completions_of(data, ["at is"], own), processing_class=own)[0]
    assert row["prompt_ids"] + row["chosen_ids"] == [*merged, own.eos_token_id]
    assert row["prompt_ids"] + row["rejected_ids"] == split + own("at is" + END)["input_ids"]
    assert row["prompt_ids"] == split[: len(row["prompt_ids"])]
    assert 0 < len(row["prompt_ids"]) < len(split)
    assert row["chosen_ids"][0] != row["rejected_ids"][0]


HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
TAIL = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"


def test_generation_prompt_that_is_no_prefix(tokenizer):
    """As of reasoning models: the generation prompt opens a thought that answers of the data have not."""
    own = with_template(tokenizer, HEAD + "<|im_end|>\n" + TAIL + "<think>{% endif %}")
    row = build_pairs(CHAT, completions_of(CHAT, tiny.REJECTED, own), processing_class=own)[0]
    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    assert own.decode(row["prompt_ids"]) == text
    assert own.decode(row["chosen_ids"]) == "The capital of France is Paris.<|im_end|>"
    assert own.decode(row["rejected_ids"]) == "<think>London.<|im_end|>"


@pytest.mark.parametrize(
    ("template_end", "expected"),
    [
        ("<|im_end|>\n", "<|im_end|>"),
        ("<|im_end|>", "<|im_end|>"),
        ("<|im_end|>\n<|pad|>", "<|im_end|>"),
        ("\n", "\n"),  # none to end with
        (" bye<|im_end|> now", " bye<|im_end|> now"),  # what stands behind is said
    ],
)
def test_end_of_real_answers_in_templates(template_end, expected, tokenizer):
    own = with_template(tokenizer, HEAD + template_end + TAIL + "{% endif %}")
    row = build_pairs(CHAT, completions_of(CHAT, tiny.REJECTED, own), processing_class=own)[0]
    assert own.decode(row["chosen_ids"]) == "The capital of France is Paris." + expected


def test_another_token_that_ends_answers(tokenizer):
    """Of the model's generation config: it is known from the answers that end with it."""
    own = with_template(tokenizer, HEAD + "<|endoftext|>\n" + TAIL + "{% endif %}")
    completions = completions_of(CHAT, tiny.REJECTED, own, cut={1}, end="<|endoftext|>")
    rows = build_pairs(CHAT, completions, processing_class=own)
    for row in rows:
        assert own.decode(row["chosen_ids"]).endswith(".<|endoftext|>")
    # As in Phi-3, the template writes the tokenizer's own token behind that at which the model stops
    own.chat_template, own.eos_token = HEAD + "<|im_end|>\n<|endoftext|>\n" + TAIL + "{% endif %}", "<|endoftext|>"
    for row in build_pairs(CHAT, completions_of(CHAT, tiny.REJECTED, own), processing_class=own):
        assert own.decode(row["chosen_ids"]).endswith(".<|im_end|>")
    # The last token of an answer that was cut is no end: "think." is
    cut = completions[1]["completion_ids"][-1]
    assert rows[1]["rejected_ids"][-1] == cut != own.eos_token_id


def test_real_answers_without_an_end_are_counted(tokenizer, monkeypatch):
    """Of a template that writes none: nobody else would say that the model learns not to stop."""
    said = message_log(monkeypatch, module)
    own = with_template(tokenizer, HEAD + "\n" + TAIL + "{% endif %}")
    completions = completions_of(CHAT, tiny.REJECTED, own)
    build_pairs(CHAT, completions, processing_class=own)
    assert len(said) == 1
    assert (
        "8 of 8 real answers have no token at their end that ends answers, because the chat template writes" in said[0]
    )
    assert count_pairs(CHAT, completions, own, False)[1]["endless"] == 8


def test_tools_and_template_arguments(tokenizer):
    template = "{{ tools[0].name }} {{ mood }} " + HEAD + "<|im_end|>\n" + TAIL + "{% endif %}"
    own = with_template(tokenizer, template)
    row = CHAT[0] | {"tools": json.dumps([{"name": "clock"}]), "chat_template_kwargs": {"mood": "glad"}}
    data = Dataset.from_list([row])
    completions = generate_completions(
        lively(own), data.remove_columns("completion"), "out", processing_class=own, max_new_tokens=4
    )
    assert own.decode(completions[0]["prompt_ids"]).startswith("clock glad <|im_start|>user")
    pair = build_pairs(data, completions, processing_class=own)[0]
    assert pair["prompt_ids"] == completions[0]["prompt_ids"]
    assert own.decode(pair["chosen_ids"]) == "The capital of France is Paris.<|im_end|>"


class TestMessages:
    def test_first_turns(self):
        assert first_turns(tiny.messages_data())[:] == CHAT.select_columns(["prompt", "completion"])[:]
        system, user, other = (
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "user", "content": "Well?"},
        )
        answer, late = {"role": "assistant", "content": "Hello."}, {"role": "assistant", "content": "Bye."}
        data = Dataset.from_list(
            [{"messages": [system, user, other, answer, user, late], "tools": "[]", "source": 1, "text": None}]
        )
        assert first_turns(data).to_list() == [
            {"prompt": [system, user, other], "completion": [answer], "tools": "[]"}
        ]
        assert first_turns(TEXT.add_column("x", [1] * 8)).column_names == ["prompt", "completion"]

    @pytest.mark.parametrize("roles", [["assistant", "user"], ["user"], ["user", "user"]])
    def test_rows_without_an_answer_are_named(self, roles):
        rows = tiny.messages_data().to_list()
        rows[3]["messages"] = [{"role": role, "content": "x"} for role in roles]
        with pytest.raises(
            ValueError, match="`dataset`, row 3: the conversation has no message of the assistant behind"
        ):
            first_turns(Dataset.from_list(rows))

    def test_pairs(self, tokenizer):
        completions = completions_of(CHAT, tiny.REJECTED, tokenizer)
        expected = build_pairs(CHAT, completions, processing_class=tokenizer)
        assert build_pairs(tiny.messages_data(), completions, processing_class=tokenizer)[:] == expected[:]

    def test_keys_that_tables_fill_with_null(self, tokenizer):
        """Of messages with other keys elsewhere in the table."""
        completions = completions_of(CHAT, tiny.REJECTED, tokenizer)
        rows = CHAT.to_list()
        rows[0]["prompt"][0]["name"] = None
        data = Dataset.from_list(rows)
        assert len(build_pairs(data, completions, processing_class=tokenizer)) == 8


# ---------------------------------------------------------------- what is dropped


class TestDropped:
    def answers(self):
        real = [row["completion"] for row in TEXT]
        return [" one", "", real[2] + "\n ", " four", " \n", real[5].strip(), " seven", " eight"]

    def test_counts(self, tokenizer, monkeypatch):
        warnings = message_log(monkeypatch, module)
        completions = completions_of(TEXT, self.answers(), tokenizer, cut={0, 2, 6})
        pairs, counts = count_pairs(TEXT, completions, tokenizer, False)
        assert pairs["prompt_index"][:] == [0, 3, 6, 7]
        dropped = {"empty": 2, "identical": 2}
        assert counts == {"completions": 8, "truncated": 3, "dropped": dropped, "pairs": 4, "endless": 0}
        pairs, counts = count_pairs(TEXT, completions, tokenizer, True)
        assert pairs["prompt_index"][:] == [3, 7]
        assert counts["dropped"] == {"empty": 2, "identical": 2, "truncated": 2}
        assert warnings == []
        build_pairs(TEXT, completions, processing_class=tokenizer, drop_truncated=True)
        assert warnings == ["Dropped 2 empty, 2 identical, 2 truncated of 8 generated answers."]

    def test_nothing_dropped_no_warning(self, tokenizer, monkeypatch):
        warnings = message_log(monkeypatch, module)
        build_pairs(TEXT, completions_of(TEXT, tiny.REJECTED, tokenizer), processing_class=tokenizer)
        assert warnings == []

    def test_messages(self, tokenizer):
        real = [row["completion"][0]["content"] for row in CHAT]
        answers = ["a", "  ", real[2] + " ", *"defgh"]
        _, counts = count_pairs(CHAT, completions_of(CHAT, answers, tokenizer), tokenizer, False)
        assert counts["dropped"] == {"empty": 1, "identical": 1}

    def test_empty_real_answers(self, tokenizer):
        data = Dataset.from_list([*TEXT.to_list()[:7], {"prompt": "Well?", "completion": " "}])
        _, counts = count_pairs(data, completions_of(data, tiny.REJECTED, tokenizer), tokenizer, False)
        assert counts["dropped"] == {"of an empty real answer": 1}

    def test_skipped_prompts(self, tokenizer):
        """Rows of prompts that were too long have no completion."""
        answers = [None, " b", None, " d", " e", " f", None, " h"]
        pairs, counts = count_pairs(TEXT, completions_of(TEXT, answers, tokenizer), tokenizer, False)
        assert pairs["prompt_index"][:] == [1, 3, 4, 5, 7]
        assert counts == {"completions": 5, "truncated": 0, "dropped": {}, "pairs": 5, "endless": 0}
        for row in pairs:
            assert row["chosen"] == TEXT[row["prompt_index"]]["completion"]

    @pytest.mark.parametrize(
        ("answers", "drop_truncated", "message"),
        [
            ([""] * 8, False, "No pair is left of 8 generated answers: 8 empty. Look at a few of them"),
            ([row["completion"] for row in TEXT], False, "No pair is left of 8 generated answers: 8 identical"),
            ([" a"] * 8, True, "No pair is left of 8 generated answers: 8 truncated"),
        ],
    )
    def test_nothing_left(self, answers, drop_truncated, message, tokenizer):
        completions = completions_of(TEXT, answers, tokenizer, cut=range(8) if drop_truncated else ())
        with pytest.raises(ValueError, match=message):
            build_pairs(TEXT, completions, processing_class=tokenizer, drop_truncated=drop_truncated)


# ---------------------------------------------------------------- what is refused


class TestRefused:
    @pytest.mark.parametrize(
        ("dataset", "row"),
        [
            (TEXT.select([1, 0, *range(2, 8)]), 0),
            (TEXT.select([*range(7), 6]), 7),
            (TEXT.select(range(6)), 6),
            (CHAT, 0),
            (tiny.messages_data(), 0),
        ],
        ids=["shuffled", "another", "shorter", "messages", "conversations"],
    )
    def test_completions_of_other_data(self, dataset, row, tokenizer):
        completions = completions_of(TEXT, tiny.REJECTED, tokenizer)
        with pytest.raises(
            ValueError, match=f"`completions`, row {row}: it was generated for another prompt than that of"
        ):
            build_pairs(dataset, completions, processing_class=tokenizer)

    @pytest.mark.parametrize("kind", ["text", "chat"])
    def test_another_tokenizer(self, kind, sampled, tokenizer):
        data = {"text": TEXT, "chat": CHAT}[kind]
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()])
        other = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)
        other.chat_template = tokenizer.chat_template
        with pytest.raises(
            ValueError, match=r"row 0: its prompt begins with '.*' as .* and with '.*' as .* Pass the tokenizer"
        ):
            build_pairs(data, sampled[kind], processing_class=other)
        # Of a folder it is known, also where the prompts are the same
        other = tokenizer.from_pretrained(sampled["model"])
        other.eos_token = "<|endoftext|>"
        with pytest.raises(
            ValueError, match=r"of a tokenizer with the digest \w{16}, that of `processing_class` is \w{16}"
        ):
            build_pairs(data, sampled["folders"][kind], processing_class=other)

    def test_rows_that_are_no_completions(self, tokenizer):
        with pytest.raises(
            ValueError, match="`completions` lacks 'completion_ids', 'prompt_ids', 'prompt_index', 'truncated'"
        ):
            build_pairs(TEXT, TEXT, processing_class=tokenizer)

    def test_datasets(self, tokenizer):
        completions = completions_of(TEXT, tiny.REJECTED, tokenizer)
        for dataset, error, message in (
            (
                TEXT.to_iterable_dataset(),
                TypeError,
                "`dataset` is a IterableDataset; expected a `Dataset`.*from_generator",
            ),
            (
                datasets.DatasetDict(train=TEXT),
                TypeError,
                "`dataset` is a DatasetDict.*Of a dictionary of splits pass one",
            ),
            (TEXT.select([]), ValueError, "`dataset` is empty"),
            (tiny.text_data(), ValueError, r"has the columns \['text'\]: self-play needs prompts"),
            (TEXT.remove_columns("completion"), ValueError, "has a column 'prompt' but no 'completion'"),
            (tiny.preference_data(), ValueError, "dataset.rename_column"),
            (
                Dataset.from_list([{"prompt": "a", "completion": [{"role": "user"}]}]),
                TypeError,
                "must both be strings",
            ),
        ):
            with pytest.raises(error, match=message):
                build_pairs(dataset, completions, processing_class=tokenizer)

    def test_folders(self, tokenizer, tmp_path):
        with pytest.raises(ValueError, match="holds no completions"):
            build_pairs(TEXT, tmp_path, processing_class=tokenizer)


# ---------------------------------------------------------------- the trainer


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_the_trainer_sees_the_log_probs_of_the_generation(kind, sampled, tokenizer, tmp_path):
    """On the sampled ids, cut or not, it computes what the generation has recorded."""
    data = {"text": TEXT, "chat": CHAT}[kind]
    pairs = build_pairs(data, sampled[kind], processing_class=tokenizer)
    trainer = make(
        SPINTrainer, SPINConfig, tmp_path, lively(tokenizer), pairs, tokenizer, precompute_ref_log_probs=True
    )
    recorded = [row["ref_logps"] for row in sampled[kind] if tiny_text(row["completion"]).strip()]
    assert trainer.train_dataset["ref_rejected_logps"][:] == pytest.approx(recorded, rel=1e-5)
    assert len(trainer.train_dataset) == len(pairs)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931471806, rel=1e-5)


# ---------------------------------------------------------------- from folders, and on the command line


def command(folder, *options, data="data.jsonl"):
    argv = ["pairs", "--dataset_name", data, "--completions", folder, "--output", "out/pairs.parquet"]
    return main([*argv, *options])


def test_command(sampled, tokenizer, model_dir, capsys):
    TEXT.to_json("data.jsonl")
    folder = sampled["folders"]["text"]
    expected = build_pairs(TEXT, folder, processing_class=model_dir)
    assert expected[:] == build_pairs(TEXT, sampled["text"], processing_class=tokenizer)[:]
    assert command(folder, "--tokenizer", model_dir) == 0
    said = capsys.readouterr().out
    empty = len(sampled["text"]) - len(expected)
    assert (
        f"{len(expected)} pairs written to out/pairs.parquet; dropped: {f'{empty} empty' if empty else 'none'}."
        in said
    )
    found = load_dataset("parquet", data_files="out/pairs.parquet", split="train")
    assert found[:] == expected[:]

    assert command(folder, "--tokenizer", model_dir) == 1
    assert "`--output out/pairs.parquet` exists" in capsys.readouterr().err
    Path("out/pairs.parquet").unlink()
    Path("options.yaml").write_text(f"tokenizer: {model_dir}\ndrop_truncated: true\n")
    assert command(folder, "--config", "options.yaml") == 0
    found = load_dataset("parquet", data_files="out/pairs.parquet", split="train")
    assert found[:] == build_pairs(TEXT, folder, processing_class=model_dir, drop_truncated=True)[:]
    assert 0 < len(found) < len(expected)


def test_command_takes_the_rows_that_were_answered(model_dir, tokenizer, capsys):
    TEXT.to_json("data.jsonl")
    completions = generate_completions(model_dir, TEXT.take(3).remove_columns("completion"), "three", max_new_tokens=3)
    assert len(completions) == 3
    assert command("three", "--tokenizer", model_dir, "--max_rows", "3") == 0
    assert command("three", "--tokenizer", model_dir, "--max_rows", "2", "--output", "other.parquet") == 1
    assert "row 2: it was generated for another prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "pairs.json"], "`--output pairs.json`: expected a file that ends with .parquet"),
        (["--completions", "nowhere"], "`nowhere` holds no completions"),
        (["--dataset_name", "nowhere.jsonl"], "does not exist"),
        (["--dataset_split", "test"], "Name one with `--dataset_split`"),
        (["--dataset_name", "messages.jsonl"], "it was generated for another prompt"),
        (["--tokenizer", "./nowhere"], "nowhere"),
    ],
    ids=str,
)
def test_command_errors(options, message, sampled, model_dir, capsys):
    TEXT.to_json("data.jsonl")
    tiny.messages_data().to_json("messages.jsonl")
    assert command(sampled["folders"]["text"], "--tokenizer", model_dir, *options) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("trl-ift pairs: error: ")
    assert "Traceback" not in error
    assert not Path("out").exists()


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["pairs", "--help"])
    assert not stop.value.code
    assert "--drop_truncated" in capsys.readouterr().out
