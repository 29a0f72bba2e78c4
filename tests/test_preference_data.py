"""Data of the preference trainers: stored references and their cache, rows that cannot be trained, bad input."""

import math

import numpy as np
import pairs
import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from trl import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference
from two_processes_preference import ToyTrainer, history, options

from trl_ift import checks
from trl_ift.checks import check_preference_dataset
from trl_ift.preference.collator import WEIGHT, Column, PreferenceCollator
from trl_ift.preference.trainer import PreferenceConfig, PreferenceTrainer


NOWHERE = "/nonexistent/model"  # every test that passes it proves that the error comes before the model loads
ARGUMENTS = ("ref_model", "eval_dataset", "peft_config", "processing_class", "data_collator")


def make(tmp_path, model, data="pairs", cls=PreferenceTrainer, **settings):
    arguments = {name: settings.pop(name) for name in ARGUMENTS if name in settings}
    return cls(
        model=model,
        args=cls.config_class(**options(tmp_path / "run", **settings)),
        train_dataset=tiny.preference_data() if isinstance(data, str) else data,
        **arguments,
    )


def tokenized(tokenizer, data=None):
    """`preference_data` as token ids, without its texts."""
    rows = []
    for row in tiny.preference_data() if data is None else data:
        texts = {f"{kind}_ids": row[kind] + tokenizer.eos_token for kind in row if kind != "prompt"}
        ids = {name: tokenizer(text)["input_ids"] for name, text in texts.items()}
        rows.append({"prompt_ids": tokenizer(row["prompt"])["input_ids"], **ids})
    return Dataset.from_list(rows)


@pytest.fixture
def warnings_seen(monkeypatch):
    seen = []
    monkeypatch.setattr(checks.logger, "warning", lambda message, *args, **kwargs: seen.append(message))
    return seen


@pytest.fixture
def passes(monkeypatch):
    """Names of the models that scored a batch as reference."""
    seen = []
    original = PreferenceTrainer.compute_ref_log_probs

    def count(self, model, inputs):
        seen.append(inputs["input_ids"].size(0) // 2)
        return original(self, model, inputs)

    monkeypatch.setattr(PreferenceTrainer, "compute_ref_log_probs", count)
    return seen


def stored(trainer, data):
    """The data with the reference log-probs that a trainer precomputed for it."""
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        data = data.add_column(name, trainer.train_dataset[name][:])
    return data


class TestStoredReferences:
    @pytest.mark.parametrize("model", ["path", "memory", "adapter", "new adapter", "new prompt"])
    @pytest.mark.parametrize("cls", [PreferenceTrainer, ToyTrainer])
    def test_equal_precomputed_ones(self, tmp_path, tokenizer, model_dir, passes, model, cls):
        """And no reference model is in memory, nor scored."""

        def source():
            torch.manual_seed(0)
            adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=model != "adapter")
            if model == "adapter":
                return get_peft_model(tiny.model("llama", tokenizer), adapter), {}
            if model == "new adapter":
                return model_dir, {"peft_config": adapter}
            if model == "new prompt":
                return model_dir, {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}
            return (model_dir if model == "path" else tiny.model("llama", tokenizer)), {}

        start, settings = source()
        settings |= {"processing_class": tokenizer, "per_device_eval_batch_size": 4}
        data = tiny.triple_data()
        computed = make(
            tmp_path, start, data, cls, precompute_ref_log_probs=True, eval_dataset=data, **settings
        )  # fmt: skip
        assert passes == [4] * 4
        start, more = source()
        given = make(
            tmp_path, start, stored(computed, data), cls, eval_dataset=stored(computed, data), **settings | more
        )  # fmt: skip
        assert given.ref_model is None
        assert "ref" not in getattr(given.model, "peft_config", {})
        for trainer in (computed, given):
            trainer.train()
            trainer.evaluate()
        assert history(given) == history(computed)
        assert passes == [4] * 4

    def test_iterable(self, tmp_path, tokenizer, model_dir, passes):
        computed = make(tmp_path, model_dir, precompute_ref_log_probs=True, train_sampling_strategy="sequential")
        data = stored(computed, tiny.preference_data()).to_iterable_dataset()
        given = make(tmp_path, model_dir, data)
        assert given.ref_model is None
        assert len(passes) == 2
        computed.train()
        given.train()
        assert [e["loss"] for e in history(given)[:2]] == [e["loss"] for e in history(computed)[:2]]
        assert len(passes) == 2

    def test_other_values_are_used(self, tmp_path, model_dir):
        """The values of the columns, not those of the model: no check against the model at the first step."""
        data = tiny.preference_data().add_column("ref_chosen_logps", [-50.0] * 8)
        data = data.add_column("ref_rejected_logps", [-70.0] * 8)
        trainer = make(tmp_path, model_dir, data, max_steps=1)
        trainer.train()
        entry = trainer.state.log_history[0]
        assert entry["rewards/chosen"] == pytest.approx(0.1 * (entry["logps/chosen"] + 50), rel=1e-5)
        assert entry["rewards/rejected"] == pytest.approx(0.1 * (entry["logps/rejected"] + 70), rel=1e-5)

    @pytest.mark.parametrize(
        ("change", "settings", "message"),
        [
            (lambda d: d.remove_columns("ref_rejected_logps"), {}, "has the column 'ref_chosen_logps' but not the other"),
            (lambda d: d.remove_columns("ref_chosen_logps"), {}, "has the column 'ref_rejected_logps' but not the other"),
            (lambda d: d, {"ref_model": "model"}, "holds reference log-probabilities .* and a `ref_model` was passed"),
            (lambda d: d, {"eval_dataset": tiny.preference_data()}, "`eval_dataset` lacks .* that `train_dataset` has"),
            (
                lambda d: d,
                {"eval_dataset": {"x": tiny.preference_data()}},
                r"`eval_dataset\['x'\]` lacks the columns .* that `train_dataset` has",
            ),
            (lambda d: d, {"ld_alpha": 0.5}, "`ld_alpha` weighs the tokens .* of `train_dataset` are sums over all of them"),
            (lambda d: change_last(d, math.nan), {}, "`train_dataset`, row 7: column 'ref_chosen_logps' holds nan"),
            (lambda d: change_last(d, -math.inf), {}, "row 7: column 'ref_chosen_logps' holds -inf"),
            (lambda d: change_last(d, None), {}, "row 7: column 'ref_chosen_logps' must hold numbers, found None"),
        ],
    )  # fmt: skip
    def test_errors(self, tmp_path, tokenizer, change, settings, message):
        data = tiny.preference_data().add_column("ref_chosen_logps", [-50.0] * 8)
        data = data.add_column("ref_rejected_logps", [-70.0] * 8)
        if "ref_model" in settings:
            settings = {"ref_model": tiny.model("llama", tokenizer)}
        with pytest.raises((ValueError, TypeError), match=message):
            make(tmp_path, NOWHERE, change(data), **settings)

    def test_fresh_evaluation_sets_need_them(self, tmp_path, model_dir):
        data = tiny.preference_data().add_column("ref_chosen_logps", [-50.0] * 8)
        data = data.add_column("ref_rejected_logps", [-70.0] * 8)
        trainer = make(tmp_path, model_dir, data, eval_dataset=data, per_device_eval_batch_size=4)
        trainer.train()
        expected = trainer.evaluate()["eval_loss"]
        assert abs(expected - math.log(2)) > 0.01
        assert trainer.evaluate(data)["eval_loss"] == expected
        assert trainer.evaluate(data.to_iterable_dataset())["eval_loss"] == pytest.approx(expected)
        assert trainer.predict(data).metrics["test_loss"] == expected
        for method in (trainer.evaluate, trainer.predict):
            with pytest.raises(ValueError, match="lacks the columns"):
                method(tiny.preference_data())
            with pytest.raises(ValueError, match="row 7: column 'ref_chosen_logps' holds nan"):
                method(change_last(data, math.nan))


def change_last(data, value):
    rows = data.to_list()
    rows[-1]["ref_chosen_logps"] = value
    return Dataset.from_list(rows)


class TestCache:
    """Precomputed log-probs are computed again when something they depend on changed, and only then."""

    @pytest.fixture
    def folder(self, tmp_path):
        """Of a dataset on disk: one in memory is cached in a folder of the process."""
        tiny.preference_data().save_to_disk(tmp_path / "data")
        return str(tmp_path / "data")

    @pytest.mark.parametrize(
        "common", [{"max_length": None}, {"max_length": 30, "truncation_mode": "keep_end"}], ids=str
    )
    @pytest.mark.parametrize(
        ("change", "again"),
        [
            ({}, False),
            ({"learning_rate": 1e-3, "beta": 0.5, "loss_type": ["ipo"], "seed": 7}, False),
            ({"ld_alpha": 0.5}, True),
            ({"max_length": 20, "truncation_mode": "keep_end"}, True),
            ({"bf16": True}, True),
            ({"model_init_kwargs": {"dtype": "bfloat16"}}, True),
            ({"other model": True}, True),
        ],
        ids=str,
    )  # fmt: skip
    def test_key(self, tmp_path, tokenizer, model_dir, folder, passes, common, change, again):
        change = dict(change)
        settings = {"precompute_ref_log_probs": True, "processing_class": tokenizer} | common
        first = make(tmp_path, model_dir, Dataset.load_from_disk(folder), **settings)
        assert passes == [4, 4]
        model = model_dir
        if change.pop("other model", False):
            model = str(tmp_path / "other")
            tiny.model("llama", tokenizer, seed=1).save_pretrained(model)
        second = make(tmp_path, model, Dataset.load_from_disk(folder), **settings | change)
        assert passes == [4, 4] * (1 + again)
        values = [trainer.train_dataset["ref_chosen_logps"][:] for trainer in (first, second)]
        assert (values[0] != values[1]) == again
        if again and "bf16" not in change and "model_init_kwargs" not in change and model == model_dir:
            assert values[1] != pytest.approx(values[0], rel=1e-3)

    def test_a_method_shares_nothing_with_other_columns(self, tmp_path, tokenizer, folder, passes):
        """In memory: the same dataset object twice is one computation; other rows are another."""
        model = tiny.model("llama", tokenizer)
        settings = {"precompute_ref_log_probs": True, "max_length": None, "processing_class": tokenizer}
        data = Dataset.load_from_disk(folder)
        make(tmp_path, model, data, eval_dataset=data.select(range(4)), **settings)
        assert passes == [4, 4, 3, 1]
        make(tmp_path, model, data, eval_dataset=data.select(range(4)), **settings)
        assert passes == [4, 4, 3, 1]
        make(tmp_path, model, data.select(range(5)), **settings)
        assert passes == [4, 4, 3, 1, 4, 1]


class TestDroppedRows:
    @pytest.mark.parametrize("kind", ["standard", "implicit", "conversational", "tokenized"])
    def test_equal_responses(self, tmp_path, tokenizer, model_dir, warnings_seen, kind):
        data = {
            "standard": tiny.preference_data, "implicit": tiny.implicit_preference_data,
            "conversational": tiny.conversational_preference_data, "tokenized": lambda: tokenized(tokenizer),
        }[kind]()  # fmt: skip
        rows = data.to_list()
        chosen, rejected = ("chosen_ids", "rejected_ids") if kind == "tokenized" else ("chosen", "rejected")
        rows[2][rejected] = rows[2][chosen]
        trainer = make(tmp_path, model_dir, Dataset.from_list(rows), max_steps=1)
        assert len(trainer.train_dataset) == 7
        assert warnings_seen == ["Dropped 1 of 8 rows of the train dataset: 1 (chosen equals rejected)."]
        trainer.train()

    @pytest.mark.parametrize("empty", ["", "  ", "\n"])
    def test_empty_chosen(self, tmp_path, model_dir, warnings_seen, empty):
        rows = tiny.preference_data().to_list()
        rows[1]["chosen"] = empty
        rows[4]["chosen"] = empty
        rows[5]["rejected"] = ""  # a response that says nothing may well be the worse one
        trainer = make(tmp_path, model_dir, Dataset.from_list(rows))
        assert len(trainer.train_dataset) == 6
        assert warnings_seen == ["Dropped 2 of 8 rows of the train dataset: 2 (chosen is empty)."]

    def test_empty_chosen_message(self, tmp_path, model_dir, warnings_seen):
        rows = tiny.conversational_preference_data().to_list()
        rows[1]["chosen"][0]["content"] = " "
        trainer = make(tmp_path, model_dir, Dataset.from_list(rows))
        assert len(trainer.train_dataset) == 7
        assert warnings_seen == ["Dropped 1 of 8 rows of the train dataset: 1 (chosen is empty)."]

    @pytest.mark.parametrize("column", ["chosen_ids", "rejected_ids"])
    def test_no_tokens(self, tmp_path, tokenizer, model_dir, warnings_seen, column):
        rows = tokenized(tokenizer).to_list()
        rows[3][column] = []
        trainer = make(tmp_path, model_dir, Dataset.from_list(rows))
        assert len(trainer.train_dataset) == 7
        assert warnings_seen == ["Dropped 1 of 8 rows of the train dataset: 1 (chosen or rejected has no tokens)."]

    @pytest.mark.parametrize("kind", ["standard", "tokenized"])
    def test_long_prompts(self, tmp_path, tokenizer, model_dir, warnings_seen, kind):
        data = tokenized(tokenizer) if kind == "tokenized" else tiny.preference_data()
        lengths = sorted(map(len, tokenized(tokenizer)["prompt_ids"]))
        assert lengths[5] < lengths[6]
        trainer = make(tmp_path, model_dir, data, max_length=lengths[6])
        assert len(trainer.train_dataset) == 6
        reason = f"2 (the prompt fills `max_length={lengths[6]}`)"
        assert warnings_seen == [f"Dropped 2 of 8 rows of the train dataset: {reason}."]

    def test_reasons_and_datasets_are_told_apart(self, tmp_path, model_dir, warnings_seen):
        rows = tiny.triple_data().to_list()
        rows[0]["rejected"] = rows[0]["chosen"]
        rows[3]["chosen"] = ""
        rows[4]["reference"] = "  "
        rows[6]["prompt"] *= 50
        data = Dataset.from_list([row | {"extra_rows": 3} for row in rows])  # a column of no meaning here
        trainer = make(tmp_path, model_dir, data, ToyTrainer, eval_dataset={"x": data.select([0, 1])}, max_length=200)
        assert len(trainer.train_dataset) == 4
        assert warnings_seen == [
            "Dropped 4 of 8 rows of the train dataset: 1 (the prompt fills `max_length=200`), 1 (chosen equals rejected), "
            "1 (chosen is empty), 1 (an extra response is empty).",
            "Dropped 1 of 2 rows of the x dataset: 1 (chosen equals rejected).",
        ]

    @pytest.mark.parametrize("kind", ["standard", "iterable", "tokenized", "long", "eval"])
    def test_no_row_left(self, tmp_path, tokenizer, model_dir, kind):
        rows = tiny.preference_data().to_list()
        if kind == "long":
            data, settings = Dataset.from_list(rows), {"max_length": 3}
        else:
            data = Dataset.from_list([row | {"rejected": row["chosen"]} for row in rows])
            data = tokenized(tokenizer, data) if kind == "tokenized" else data
            data = data.to_iterable_dataset() if kind == "iterable" else data
            settings = {}
        if kind == "eval":
            data, settings = tiny.preference_data(), {"eval_dataset": data}
        name = "eval" if kind == "eval" else "train"
        with pytest.raises(ValueError, match=f"No row of the {name} dataset can be trained: .* equal or empty"):
            make(tmp_path, model_dir, data, **settings)

    def test_streams_cannot_be_precomputed(self, tmp_path, model_dir):
        data = tiny.preference_data().to_iterable_dataset()
        with pytest.raises(ValueError, match="`precompute_ref_log_probs=True` is not supported with IterableDataset"):
            make(tmp_path, model_dir, data, precompute_ref_log_probs=True)
        for arguments in ((data,), (tiny.preference_data(),)):  # before a model is loaded
            with pytest.raises(ValueError, match="is not supported with IterableDataset, and `.*` is one"):
                make(tmp_path, "no such model", *arguments, eval_dataset=data, precompute_ref_log_probs=True)

    def test_streams(self, tmp_path, model_dir):
        rows = tiny.preference_data().to_list()
        rows[0]["rejected"] = rows[0]["chosen"]
        trainer = make(tmp_path, model_dir, Dataset.from_list(rows).to_iterable_dataset())
        assert len(list(trainer.train_dataset)) == 7

    def test_nothing_is_said_of_clean_data(self, tmp_path, model_dir, warnings_seen):
        make(tmp_path, model_dir, eval_dataset=tiny.preference_data())
        assert warnings_seen == []


class TestTokenized:
    @pytest.mark.parametrize("precompute", [False, True])
    def test_equals_text(self, tmp_path, tokenizer, model_dir, precompute):
        """Bit for bit, in training, evaluation, and evaluation and prediction of fresh datasets."""
        found = []
        for data in (tiny.preference_data(), tokenized(tokenizer)):
            settings = {"eval_dataset": data.select(range(5)), "precompute_ref_log_probs": precompute}
            trainer = make(tmp_path, model_dir, data, eval_strategy="steps", eval_steps=2, **settings)
            metrics = trainer.evaluate(data.select([6, 7])) | trainer.predict(data.select([5, 6, 7])).metrics
            trainer.train()
            found.append((history(trainer), {k: v for k, v in metrics.items() if k.endswith("loss")}))
        assert found[0] == found[1]
        assert set(found[0][1]) == {"eval_loss", "test_loss"}

    @pytest.mark.parametrize("stream", [False, True])
    def test_branch(self, tmp_path, tokenizer, model_dir, stream):
        def train(data):
            data = data.to_iterable_dataset() if stream else data
            trainer = make(tmp_path, model_dir, data, ToyTrainer)
            trainer.train()
            return history(trainer)

        assert train(tokenized(tokenizer, tiny.triple_data())) == train(tiny.triple_data())

    def test_branch_as_text_needs_the_texts(self, tmp_path, tokenizer):
        data = tokenized(tokenizer).add_column("reference", tiny.triple_data()["reference"][:])
        with pytest.raises(ValueError, match="`train_dataset` .*'reference_ids'"):
            make(tmp_path, NOWHERE, data, ToyTrainer)


class TestEvaluation:
    @pytest.mark.parametrize(
        ("kind", "precompute"),
        [
            ("dataset", False),
            ("dataset", True),
            ("iterable", False),
            ("dict", False),
            ("dict", True),
            ("DatasetDict", True),
        ],
    )
    def test_fresh_datasets(self, tmp_path, model_dir, precompute, kind):
        """`evaluate` of datasets that the constructor has not seen gives what it gives of those it has."""
        data = tiny.preference_data()
        fresh = {
            "dataset": data, "iterable": data.to_iterable_dataset(), "dict": {"a": data, "b": data.select([3])},
            "DatasetDict": DatasetDict({"a": data, "b": data.select([3])}),
        }[kind]  # fmt: skip
        trainer = make(
            tmp_path, model_dir, eval_dataset=fresh, precompute_ref_log_probs=precompute,
            peft_config=LoraConfig(r=4, target_modules="all-linear", lora_alpha=64), learning_rate=3e-2,
        )  # fmt: skip
        trainer.train()
        seen, unseen = (
            {k: v for k, v in m.items() if "loss" in k} for m in (trainer.evaluate(), trainer.evaluate(fresh))
        )
        assert unseen == seen
        assert set(seen) == ({"eval_a_loss", "eval_b_loss"} if "ict" in kind else {"eval_loss"})
        assert all(abs(value - math.log(2)) > 1e-3 for value in seen.values())
        if kind == "dataset":
            predicted = trainer.predict(data)
            assert predicted.metrics["test_loss"] == seen["eval_loss"]

    @pytest.mark.parametrize("cls", [PreferenceTrainer, ToyTrainer])
    def test_predictions_leave_no_trace(self, tmp_path, model_dir, cls):
        """Their metrics are in no later evaluation."""
        data = tiny.triple_data().add_column("weight", [1.0] * 8)
        trainer = make(tmp_path, model_dir, data, cls, eval_dataset=data.select([0, 1]))
        trainer.evaluate()
        trainer.predict(data.select([3]))
        trainer.evaluate()
        first, second = history(trainer)
        assert first == second

    @pytest.mark.parametrize("precompute", [False, True])
    def test_the_reference_sees_model_inputs_alone(self, tmp_path, model_dir, precompute):
        """No column or branch of a method: most models swallow what they do not know."""
        data = tiny.triple_data().add_column("weight", [1.0] * 8)
        trainer = make(
            tmp_path, model_dir, data, ToyTrainer, precompute_ref_log_probs=precompute, max_steps=1,
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
        )  # fmt: skip
        seen = set()
        trainer.model.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
        trainer.evaluate(data)
        trainer.train()
        assert seen == {"input_ids", "attention_mask", "labels", "fused_lm_head", "use_cache"}

    def test_fresh_datasets_without_a_reference(self, tmp_path, model_dir):
        """After full training with precomputed references there is none left."""
        trainer = make(tmp_path, model_dir, precompute_ref_log_probs=True)
        assert trainer.evaluate(tiny.preference_data())["eval_loss"] == pytest.approx(math.log(2))
        trainer.train()
        for method in (trainer.evaluate, trainer.predict):
            message = f"Cannot compute reference log-probs for a dataset passed to `{method.__name__}"
            with pytest.raises(ValueError, match=message):
                method(tiny.preference_data())

    def test_fresh_datasets_are_checked(self, tmp_path, model_dir):
        trainer = make(tmp_path, model_dir)
        with pytest.raises(ValueError, match="`eval dataset` lacks the column 'rejected'"):
            trainer.evaluate(tiny.preference_data().remove_columns("rejected"))
        with pytest.raises(ValueError, match="`b dataset`, row 1: column 'weight' holds -1"):
            data = tiny.preference_data().select([0, 1])
            trainer.evaluate({"a": data, "b": data.add_column("weight", [1.0, -1.0])})
        with pytest.raises(ValueError, match="`test_dataset` lacks the column 'chosen'"):
            trainer.predict(tiny.preference_data().remove_columns("chosen"))


def one(**row):
    base = {"prompt": "Q", "chosen": " a", "rejected": " b"}
    return Dataset.from_list([{key: value for key, value in (base | row).items() if value is not None}])


def ids(**row):
    return Dataset.from_list([{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]} | row])


MESSAGE = [{"role": "assistant", "content": "a"}]


class TestBadInput:
    """Each with the message that the user sees, before the model loads."""

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (lambda: one(chosen=None), r"`train_dataset` lacks the column 'chosen'; its columns are \['prompt', 'rejected'\]"),
            (lambda: one(rejected=None), "lacks the column 'rejected'.*Rename your columns"),
            (lambda: one(chosen=None, rejected=None, completion=" a"), "lacks the column 'chosen' and 'rejected'"),
            (lambda: one(chosen=MESSAGE), "must all be strings, or all be lists .* 'chosen': a list of dict, 'rejected': str"),
            (lambda: one(chosen=MESSAGE, rejected=MESSAGE), "must all be strings, or all .* 'prompt': str"),
            (lambda: one(prompt=MESSAGE), "'prompt': a list of dict, 'chosen': str"),
            (lambda: one(chosen=3), "'chosen': int"),
            (lambda: one(chosen=[], rejected=MESSAGE, prompt=MESSAGE), "'chosen': an empty list"),
            (lambda: one(chosen=[{"text": "a"}], rejected=MESSAGE, prompt=MESSAGE), "'chosen': a list of dict"),
            (lambda: one(image="x.png"), "is a vision dataset"),
            (lambda: one(images=["x.png"]), "is a vision dataset"),
            (lambda: one().select([]), "`train_dataset` is empty"),
            (lambda: one().to_iterable_dataset().take(0), "`train_dataset` is empty"),
            (lambda: [{"prompt": "Q", "chosen": "a", "rejected": "b"}], "must be a `Dataset` or `IterableDataset`, got `list`"),
            (lambda: None, "`train_dataset` is required"),
            (lambda: DatasetDict(train=one()), "must be a `Dataset` or `IterableDataset`, got `DatasetDict`"),
            (lambda: one(weight=-0.5), r"row 0: column 'weight' holds -0.5, expected a finite number in \[0, inf\]"),
            (lambda: one(weight=math.nan), "column 'weight' holds nan"),
            (lambda: one(weight=math.inf), "column 'weight' holds inf"),
            (lambda: one(weight="1"), "column 'weight' must hold numbers, found '1' \\(str\\)"),
            (lambda: one(weight=True), "column 'weight' must hold numbers, found True \\(bool\\)"),
            (lambda: one(weight=[1.0]), "column 'weight' must hold numbers"),
            (lambda: one().add_column("weight", [None]), "column 'weight' must hold numbers, found None"),
            (lambda: Dataset.from_list([*one(weight=1.0), *one(weight=-1.0)]), "row 1: column 'weight' holds -1"),
            (lambda: one(weight=-0.5).to_iterable_dataset(), "`train_dataset`, first row: column 'weight' holds -0.5"),
            (lambda: ids(prompt_ids="abc"), "'prompt_ids' must hold a list of token ids; the first row has str"),
            (lambda: ids(chosen_ids=[1.5]), "'chosen_ids' must hold a list of token ids; the first row has a list of float"),
            (lambda: ids(rejected_ids=3), "'rejected_ids' must hold a list of token ids; the first row has int"),
        ],
    )  # fmt: skip
    def test_train_dataset(self, tmp_path, data, message):
        with pytest.raises((ValueError, TypeError), match=message):
            make(tmp_path, NOWHERE, data())

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (lambda: one(rejected=None), "`eval_dataset` lacks the column 'rejected'"),
            (lambda: {"x": one(weight=-1.0)}, r"`eval_dataset\['x'\]`, row 0: column 'weight' holds -1"),
            (lambda: one().select([]), "`eval_dataset` is empty"),
            (lambda: [{"prompt": "Q", "chosen": "a", "rejected": "b"}], "`eval_dataset` must be .* got `list`"),
            (lambda: one(ref_chosen_logps=-1.0, ref_rejected_logps=-2.0), "`eval_dataset` has .* `train_dataset` lacks them"),
        ],
    )  # fmt: skip
    def test_eval_dataset(self, tmp_path, data, message):
        with pytest.raises((ValueError, TypeError), match=message):
            make(tmp_path, NOWHERE, eval_dataset=data())

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (lambda: one(label_prob=1.5, reference=" c"), r"'label_prob' holds 1.5, expected a finite number in \[0, 1\]"),
            (lambda: one(), "`train_dataset` lacks the column 'reference' or 'gold' \\(gold response\\); its columns are"),
            (lambda: one(reference=MESSAGE), "'chosen': str, 'reference': a list of dict"),
            (lambda: one(gold=MESSAGE), "'chosen': str, 'gold': a list of dict"),
        ],
    )  # fmt: skip
    def test_columns_of_a_method(self, tmp_path, data, message):
        with pytest.raises((ValueError, TypeError), match=message):
            make(tmp_path, NOWHERE, data(), ToyTrainer)

    def test_required_column(self, tmp_path):
        class Needs(PreferenceTrainer):
            columns = (Column("margin", required=True),)

        with pytest.raises(ValueError, match="`train_dataset` lacks the column 'margin'"):
            make(tmp_path, NOWHERE, cls=Needs)

    @pytest.mark.parametrize("loss_type", [["aot"], ["sigmoid", "aot_unpaired"]])
    def test_weights_of_sorted_losses(self, tmp_path, loss_type):
        with pytest.raises(ValueError, match="sort the log-ratios .* cannot be combined with the column 'weight'"):
            make(tmp_path, NOWHERE, one(weight=1.0), loss_type=loss_type)

    @pytest.mark.parametrize("value", [-1.0, math.nan, None, "1"])
    def test_weights_later_in_a_stream(self, tmp_path, model_dir, value):
        """Found by the collator."""

        def rows():
            for index, row in enumerate(tiny.preference_data()):
                yield row | {"weight": 1.0 if index < 2 else value}

        data = IterableDataset.from_generator(rows)
        trainer = make(tmp_path, model_dir, data, per_device_train_batch_size=1)
        with pytest.raises((ValueError, TypeError), match="the batch: column 'weight' .*(row|Fill)"):
            trainer.train()

    def test_numbers_of_numpy_in_a_stream(self, tmp_path, model_dir):
        def rows():
            for row in tiny.preference_data():
                yield row | {"weight": np.float32(2.0)}

        trainer = make(tmp_path, model_dir, IterableDataset.from_generator(rows), max_steps=1)
        trainer.train()
        assert trainer.state.log_history[0]["weights/mean"] == 2

    def test_collators_that_lose_columns(self, tmp_path, model_dir):
        """TRL's, passed by hand, would drop weights and branches without a word."""
        options = {"pad_token_id": 3, "max_length": 50}
        theirs = DataCollatorForPreference(**options)
        data = tiny.triple_data()
        make(tmp_path, model_dir, data, data_collator=theirs, max_steps=1).train()
        with pytest.raises(ValueError, match=r"`data_collator` \(DataCollatorForPreference\) leaves out 'weight'"):
            make(tmp_path, model_dir, data.add_column("weight", [1.0] * 8), data_collator=theirs)
        stored = tiny.preference_data()
        for column in ("ref_chosen_logps", "ref_rejected_logps"):
            stored = stored.add_column(column, [-5.0] * 8)
        inner = PreferenceCollator(**options)

        def without(rows):
            return {key: value for key, value in inner(rows).items() if not key.startswith("ref_")}

        with pytest.raises(ValueError, match="leaves out 'ref_chosen_logps', 'ref_rejected_logps'"):
            make(tmp_path, model_dir, stored, data_collator=without)
        with pytest.raises(ValueError, match="leaves out 'gold_rows', which the loss reads"):
            make(tmp_path, model_dir, data, ToyTrainer, data_collator=theirs)
        own = PreferenceCollator(**options, columns=(WEIGHT,), branches=ToyTrainer.branches)
        make(
            tmp_path, model_dir, data.add_column("weight", [1.0] * 8), ToyTrainer, data_collator=own, max_steps=1
        ).train()

    def test_implicit_prompt_that_a_branch_does_not_share(self, tmp_path, model_dir):
        rows = tiny.implicit_triple_data().to_list()
        rows[3]["reference"] = "Something else."
        with pytest.raises(ValueError, match="A response in the column 'reference' does not begin with the prompt"):
            make(tmp_path, model_dir, Dataset.from_list(rows), ToyTrainer)

    def test_config_of_another_class(self, tmp_path):
        with pytest.raises(TypeError, match="`args` is a `DPOConfig`, but .* needs a `PreferenceConfig`"):
            PreferenceTrainer(NOWHERE, args=DPOConfig(str(tmp_path), use_cpu=True, bf16=False), train_dataset=one())

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"beta": 0.0}, r"`beta=0.0` is out of range: it must lie in \(0, inf\)"),
            ({"beta": -0.1}, "`beta=-0.1` is out of range"),
            ({"beta": math.nan}, "`beta=nan` is out of range"),
            ({"beta": math.inf}, "`beta=inf` is out of range"),
            ({"loss_type": ["dpo"]}, "`loss_type='dpo'` is not known. Choose one of: 'sigmoid'"),
            ({"loss_type": "dpo"}, "`loss_type='dpo'` is not known"),
            ({"loss_type": ["sigmoid", "kto_pair"]}, "`loss_type='kto_pair'` is not known"),
            ({"ld_alpha": 1.5}, r"`ld_alpha=1.5` is out of range: it must lie in \[0, 1\]"),
            ({"ld_alpha": -0.1}, "`ld_alpha=-0.1` is out of range"),
            ({"label_smoothing": 1.1}, "`label_smoothing=1.1` is out of range"),
            ({"label_smoothing": -0.1}, "`label_smoothing=-0.1` is out of range"),
            ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights"),
            ({"label_smoothing": 0.1}, r"`label_smoothing=0.1` has no effect with `loss_type=\['sigmoid'\]`"),
            ({"discopop_tau": 0.1}, "`discopop_tau=0.1` has no effect"),
            ({"f_alpha_divergence_coef": 0.3}, "`f_alpha_divergence_coef=0.3` has no effect"),
            ({"ref_model_sync_steps": 3}, "`ref_model_sync_steps=3` has no effect without `sync_ref_model=True`"),
            ({"ref_model_mixup_alpha": 0.3}, "`ref_model_mixup_alpha=0.3` has no effect without"),
            (
                {"use_weighting": True, "loss_type": ["sigmoid", "sft"]},
                "`use_weighting=True` cannot be combined with .*'sft'",
            ),
        ],
    )
    def test_config(self, tmp_path, settings, message):
        with pytest.raises(ValueError, match=message):
            PreferenceConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)

    def test_good_configs(self, tmp_path):
        common = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
        config = PreferenceConfig(**common, loss_type="aot", ld_alpha=0.0, label_smoothing=1)
        assert config.loss_type == ["aot"]
        kept = {name: config.to_dict()[name] for name in ("loss_type", "beta", "ld_alpha", "label_smoothing")}
        again = PreferenceConfig(**common, **kept)
        assert (again.loss_type, again.ld_alpha, again.label_smoothing) == (["aot"], 0.0, 1)


def test_a_null_response_is_named(tmp_path):
    rows = tiny.preference_data().to_list()
    rows[3]["rejected"] = None
    with pytest.raises(ValueError, match=r"`train_dataset`, row 3: column 'rejected' is null"):
        make(tmp_path, NOWHERE, Dataset.from_list(rows))
    kept = Dataset.from_list(rows).filter(lambda row: row["rejected"] is not None)
    check_preference_dataset(kept, "train_dataset")


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_formatted_datasets(tmp_path, tokenizer, kind):
    """A format that the user has set changes nothing."""
    losses = []
    for format_of_rows in (None, kind):
        data = tiny.preference_data().add_column("weight", [0.5] * 8).with_format(format_of_rows)
        model = tiny.model("llama", tokenizer)
        trainer = pairs.make(
            PreferenceTrainer, PreferenceConfig, tmp_path, model, data, tokenizer, overwrite_output_dir=True
        )
        losses.append(pairs.step_gradients(trainer)[0])
    assert losses[0] == losses[1]
