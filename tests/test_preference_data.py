"""Data of the preference trainers: stored references and their cache, rows that cannot be trained, bad input."""

import math

import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from trl import DPOConfig
from two_processes_preference import ToyTrainer, options

from trl_ift.preference import trainer as trainer_module
from trl_ift.preference.collator import WEIGHT, Branch, Column, PreferenceCollator
from trl_ift.preference.trainer import PreferenceConfig, PreferenceTrainer, tokenize_response


NOWHERE = "/nonexistent/model"  # every test that passes it proves that the error comes before the model loads
ARGUMENTS = ("ref_model", "eval_dataset", "peft_config", "processing_class", "data_collator")


def make(tmp_path, model, data=None, cls=PreferenceTrainer, **settings):
    arguments = {name: settings.pop(name) for name in ARGUMENTS if name in settings}
    return cls(
        model=model,
        args=cls.config_class(**options(tmp_path / "run", **settings)),
        train_dataset=tiny.preference_data() if data is None else data,
        **arguments,
    )


def entries(trainer):
    skip = ("runtime", "per_second", "total_flos")
    return [
        {key: value for key, value in entry.items() if not any(part in key for part in skip)}
        for entry in trainer.state.log_history
    ]


def tokenized(tokenizer, data=None):
    """`preference_data` as token ids, without its texts."""
    rows = []
    for row in tiny.preference_data() if data is None else data:
        texts = {f"{kind}_ids": row[kind] + tokenizer.eos_token for kind in ("chosen", "rejected", "reference") if kind in row}
        rows.append(
            {"prompt_ids": tokenizer(row["prompt"])["input_ids"]}
            | {name: tokenizer(text)["input_ids"] for name, text in texts.items()}
        )
    return Dataset.from_list(rows)


@pytest.fixture
def warnings_seen(monkeypatch):
    seen = []
    monkeypatch.setattr(trainer_module.logger, "warning", lambda message, *args, **kwargs: seen.append(message))
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
        assert entries(given) == entries(computed)
        assert passes == [4] * 4

    def test_iterable(self, tmp_path, tokenizer, model_dir, passes):
        computed = make(tmp_path, model_dir, precompute_ref_log_probs=True, train_sampling_strategy="sequential")
        data = stored(computed, tiny.preference_data()).to_iterable_dataset()
        given = make(tmp_path, model_dir, data)
        assert given.ref_model is None
        assert len(passes) == 2
        computed.train()
        given.train()
        assert [e["loss"] for e in entries(given)[:2]] == [e["loss"] for e in entries(computed)[:2]]
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
            (lambda d: d, {"eval_dataset": tiny.preference_data()}, "`eval_dataset` lacks the columns .* that `train_dataset` has"),
            (
                lambda d: d,
                {"eval_dataset": {"x": tiny.preference_data()}},
                r"`eval_dataset\['x'\]` lacks the columns .* that `train_dataset` has",
            ),
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
        trainer = make(tmp_path, model_dir, data)
        assert math.isfinite(trainer.evaluate(data)["eval_loss"])
        with pytest.raises(ValueError, match="lacks the columns"):
            trainer.evaluate(tiny.preference_data())
        with pytest.raises(ValueError, match="lacks the columns"):
            trainer.predict(tiny.preference_data())


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

    @pytest.mark.parametrize("common", [{"max_length": None}, {"max_length": 30, "truncation_mode": "keep_end"}], ids=str)
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
            ({"peft_config": LoraConfig(r=4, target_modules="all-linear")}, None),
        ],
        ids=str,
    )  # fmt: skip
    def test_key(self, tmp_path, tokenizer, model_dir, folder, passes, common, change, again):
        change = dict(change)
        settings = {"precompute_ref_log_probs": True} | common
        first = make(tmp_path, model_dir, Dataset.load_from_disk(folder), **settings)
        assert passes == [4, 4]
        model = model_dir
        if change.pop("other model", False):
            model = str(tmp_path / "other")
            tiny.model("llama", tokenizer, seed=1).save_pretrained(model)
            tokenizer.save_pretrained(model)
        second = make(tmp_path, model, Dataset.load_from_disk(folder), **settings | change)
        if again is not None:
            assert passes == [4, 4] * (1 + again)
        values = [trainer.train_dataset["ref_chosen_logps"][:] for trainer in (first, second)]
        assert (values[0] != values[1]) == bool(again)
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
