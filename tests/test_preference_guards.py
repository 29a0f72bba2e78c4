"""Cases in which a preference trainer, its data or its card would be wrong without a word."""

import shutil
import types
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from huggingface_hub import ModelCard
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from trl_ift import IFTConfig, IFTTrainer, reference
from trl_ift.checks import is_blank
from trl_ift.data import caching, generate_completions
from trl_ift.data.caching import _source_digest, versioned
from trl_ift.data.fingerprint import differs_from_source
from trl_ift.preference.mpo import MPOTrainer
from trl_ift.preference.tpo import TPOTrainer
from trl_ift.preference.trainer import PreferenceConfig, PreferenceTrainer
from trl_ift.trl_internals import forget_fused_head


def make(trainer_class, tmp_path, model, dataset=None, tokenizer=None, **settings):
    names = ("reg_dataset", "peft_config", "eval_dataset", "ref_model")
    arguments = {name: settings.pop(name) for name in names if name in settings}
    options = {
        "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "max_steps": 1,
        "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no", "overwrite_output_dir": True,
    }  # fmt: skip
    return trainer_class(
        model=model,
        args=trainer_class.config_class(str(tmp_path / "run"), **{**options, **settings}),
        train_dataset=tiny.triple_data() if dataset is None else dataset,
        processing_class=tokenizer,
        **arguments,
    )


@pytest.fixture
def samples(tmp_path, model_dir):
    return generate_completions(model_dir, tiny.preference_data(), tmp_path / "samples", max_new_tokens=6)


class TestReference:
    def test_dropout_in_attention_is_no_alarm(self, tmp_path, tokenizer):
        """TRL switches off modules of dropout only; such a policy is noisy, and its reference right."""
        model = tiny.model("llama", tokenizer, attention_dropout=0.3)
        make(PreferenceTrainer, tmp_path, model, tokenizer=tokenizer).train()

    def test_a_reference_in_memory_after_ift(self, tmp_path, tokenizer):
        model = tiny.model("llama", tokenizer)
        options = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1, "save_strategy": "no"}
        IFTTrainer(
            model=model,
            args=IFTConfig(str(tmp_path / "ift"), **options),
            train_dataset=tiny.prompt_completion_data(),
            processing_class=tokenizer,
        )
        trainer = make(PreferenceTrainer, tmp_path, model, tokenizer=tokenizer, max_steps=2)
        ids = torch.arange(10)[None]
        before = trainer.ref_model(ids).logits
        trainer.train()
        assert torch.equal(trainer.ref_model(ids).logits, before)

    def test_a_model_that_was_trained_since_is_named(self, tmp_path, tokenizer, model_dir, monkeypatch):
        seen = []
        monkeypatch.setattr(reference.logger, "warning", lambda message, *args: seen.append(message))
        for dtype in ("float32", "bfloat16"):
            model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
            assert differs_from_source(model, model_dir) is False
            make(PreferenceTrainer, tmp_path, model, tokenizer=tokenizer)
        assert seen == []
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(1.1)
        make(PreferenceTrainer, tmp_path, model, tokenizer=tokenizer)
        assert len(seen) == 1
        assert f"has other weights than `{model_dir}`" in seen[0]
        assert differs_from_source(model, str(tmp_path)) is None
        assert differs_from_source(model, "no/such-model") is None

    def test_hooks_of_other_libraries_stay(self, tokenizer):
        model = tiny.model("llama", tokenizer)
        model.forward = "a hook"
        forget_fused_head(model)
        assert model.forward == "a hook"
        model.forward = types.MethodType(lambda self: None, model)
        forget_fused_head(model)
        assert "forward" not in vars(model)

    def test_a_moving_reference_that_is_lost(self, tmp_path, tokenizer, model_dir):
        settings = {"sync_ref_model": True, "save_strategy": "steps", "save_steps": 1, "tokenizer": tokenizer}
        trainer = make(PreferenceTrainer, tmp_path, model_dir, **settings)
        trainer.train()
        shutil.rmtree(Path(trainer.args.output_dir) / "checkpoint-1" / "reference")
        with pytest.raises(ValueError, match=r"cannot be resumed without its reference.*model.safetensors` is miss"):
            make(PreferenceTrainer, tmp_path, model_dir, max_steps=2, **settings).train(resume_from_checkpoint=True)

    def test_a_frozen_adapter_is_refused(self, tmp_path, tokenizer):
        get_peft_model(tiny.model("llama", tokenizer), LoraConfig(r=2)).save_pretrained(tmp_path / "adapter")
        frozen = PeftModel.from_pretrained(tiny.model("llama", tokenizer), tmp_path / "adapter")
        with pytest.raises(ValueError, match=r"No parameter of `model` requires a gradient.*is_trainable=True"):
            make(TPOTrainer, tmp_path, frozen, tokenizer=tokenizer)

    def test_the_adapter_must_be_called_default(self, tmp_path, tokenizer):
        model = get_peft_model(tiny.model("llama", tokenizer), LoraConfig(r=2), adapter_name="mine")
        with pytest.raises(ValueError, match="are called 'mine'; the one that is trained must be called 'default'"):
            make(PreferenceTrainer, tmp_path, model, tokenizer=tokenizer)


class TestSamples:
    def test_another_distribution_is_another_policy(self, tmp_path, tokenizer, model_dir):
        cold = generate_completions(
            model_dir, tiny.preference_data(), tmp_path / "cold", max_new_tokens=6, temperature=0.5, top_k=3
        )
        (policy,) = cold.unique("policy")
        assert policy.endswith("@temperature=0.5@top_k=3")
        with pytest.raises(ValueError, match="sampled from another model"):
            make(MPOTrainer, tmp_path, model_dir, tokenizer=tokenizer, reg_dataset=cold)
        make(MPOTrainer, tmp_path, model_dir, tokenizer=tokenizer, reg_dataset=cold, allow_other_policy=True)

    def test_an_unfinished_folder_is_refused(self, tmp_path, tokenizer, model_dir, samples):
        manifest = tmp_path / "samples" / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"complete": true', '"complete": false'))
        with pytest.raises(ValueError, match="are incomplete"):
            make(MPOTrainer, tmp_path, "/nonexistent", reg_dataset_name=str(tmp_path / "samples"))

    @pytest.mark.parametrize("config", [IA3Config(feedforward_modules=[]), LoraConfig(init_lora_weights=True)])
    def test_new_adapters_start_from_the_base(self, tmp_path, tokenizer, model_dir, samples, config):
        config.target_modules = {"q_proj", "v_proj"}
        make(MPOTrainer, tmp_path, model_dir, tokenizer=tokenizer, reg_dataset=samples, peft_config=config).train()

    def test_workers_of_a_stream_would_repeat_them(self, tmp_path, tokenizer, model_dir, samples):
        stream = tiny.preference_data().to_iterable_dataset()
        settings = {"reg_dataset": samples, "logit_mode": "length_norm", "tokenizer": tokenizer}
        with pytest.raises(ValueError, match=r"`dataloader_num_workers=2` with an `IterableDataset`"):
            make(MPOTrainer, tmp_path, model_dir, stream, dataloader_num_workers=2, **settings)

    def test_the_card_hides_folders(self, tmp_path, tokenizer, model_dir, samples):
        trainer = make(
            MPOTrainer, tmp_path, model_dir, tokenizer=tokenizer, reg_dataset_name=str(tmp_path / "samples")
        )
        trainer.create_model_card()
        text = (tmp_path / "run" / "README.md").read_text()
        assert "| `reg_dataset_name` | `samples` |" in text
        assert str(tmp_path) not in text.split("### Method parameters")[1]


class TestLoss:
    @pytest.mark.parametrize("trainer_class", [MPOTrainer, TPOTrainer])
    def test_a_smaller_last_micro_batch_does_not_weigh_more(self, tmp_path, tokenizer, model_dir, trainer_class):
        norms = []
        settings = {"reg_weight": 0.0} if trainer_class is MPOTrainer else {}
        for batch, steps in ((6, 1), (4, 2), (2, 3)):
            trainer = make(
                trainer_class, tmp_path, model_dir, tiny.triple_data().select(range(6)), tokenizer,
                per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_grad_norm=1e9, **settings,
            )  # fmt: skip
            trainer.train()
            norms.append(trainer.state.log_history[0]["grad_norm"])
        assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)

    def test_two_compiled_trainers(self, tmp_path, tokenizer, model_dir):
        losses = []
        for compiled in (False, True, True):
            options = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
            trainer = make(TPOTrainer, tmp_path, model_dir, tokenizer=tokenizer, **options)
            trainer.train()
            losses.append(trainer.state.log_history[0]["loss"])
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)

    def test_options_that_no_loss_reads(self, tmp_path):
        for settings in (
            {"label_smoothing": 0.3},
            {"discopop_tau": 0.1},
            {"f_alpha_divergence_coef": 0.7},
            {"ref_model_sync_steps": 3},
            {"ref_model_mixup_alpha": 0.3},
        ):
            with pytest.raises(ValueError, match=f"`{next(iter(settings))}=.*` has no effect"):
                PreferenceConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)
        with pytest.raises(ValueError, match="cannot be combined with the loss 'sft'"):
            PreferenceConfig(str(tmp_path), use_cpu=True, bf16=False, use_weighting=True, loss_type=["sigmoid", "sft"])

    def test_stored_sums_have_no_ld_alpha(self, tmp_path):
        data = tiny.preference_data()
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            data = data.add_column(name, [-10.0] * len(data))
        with pytest.raises(ValueError, match="`ld_alpha` weighs the tokens"):
            make(PreferenceTrainer, tmp_path, "/nonexistent", data, ld_alpha=0.5)


class TestData:
    def test_a_tool_call_says_something(self, tmp_path, tokenizer):
        def call(name):
            function = {"name": name, "arguments": {"x": "1"}}
            return [{"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}]

        rows = [
            {"prompt": [{"role": "user", "content": question}], "chosen": call("add"), "rejected": call("subtract")}
            for question, _ in tiny.QUESTIONS
        ]
        trainer = make(PreferenceTrainer, tmp_path, tiny.model("llama", tokenizer), Dataset.from_list(rows), tokenizer)
        assert len(trainer.train_dataset) == len(rows)

    def test_what_old_code_made_is_not_found(self, monkeypatch):
        """`datasets` hashes importable functions by name: the source of their module is added."""
        before = Hasher.hash(versioned(call_me))
        assert before == Hasher.hash(versioned(call_me))
        assert versioned(call_me)(2, y=3) == 5
        _source_digest.cache_clear()
        monkeypatch.setattr("inspect.getsource", lambda module: f"{module.__name__}, changed")
        assert Hasher.hash(versioned(call_me)) != before
        _source_digest.cache_clear()

    def test_nor_what_is_called_from_elsewhere(self, monkeypatch):
        """The modules of functions that are called count too; those of a notebook have no source."""
        before = Hasher.hash(versioned(call_me, is_blank))
        assert before != Hasher.hash(versioned(call_me))
        digest, changed = _source_digest, is_blank.__module__
        monkeypatch.setattr(caching, "_source_digest", lambda name: "new" if name == changed else digest(name))
        assert Hasher.hash(versioned(call_me, is_blank)) != before
        assert Hasher.hash(versioned(call_me, partial(is_blank, eos_token="."))) != before
        monkeypatch.undo()
        sourceless = types.FunctionType(call_me.__code__, {"__name__": "__main__"})
        assert versioned(sourceless)(2, y=3) == 5

    def test_predictions_do_not_change_the_next_evaluation(self, tmp_path, tokenizer):
        data = tiny.triple_data()
        trainer = make(
            TPOTrainer, tmp_path, tiny.model("llama", tokenizer), data, tokenizer, eval_dataset=data.select(range(4))
        )
        first = trainer.evaluate()
        trainer.predict(data.select(range(4, 8)))
        second = trainer.evaluate()
        names = [name for name in first if "reward" in name or "logps" in name or "nll" in name]
        assert len(names) >= 6
        assert {name: first[name] for name in names} == {name: second[name] for name in names}

    def test_parts_of_the_loss_are_no_datasets_on_the_card(self, tmp_path, tokenizer):
        data = tiny.triple_data()
        trainer = make(TPOTrainer, tmp_path, tiny.model("llama", tokenizer), data, tokenizer, eval_dataset=data)
        trainer.evaluate()
        trainer.create_model_card(dataset_name="org/data")
        results = ModelCard.load(tmp_path / "run" / "README.md").data.eval_results
        assert [result.dataset_name for result in results] == ["org/data"]

    def test_names_of_evaluation_datasets_on_the_card(self, tmp_path, tokenizer):
        data, named = tiny.triple_data(), {"helpful-base": tiny.triple_data(), "b": tiny.triple_data()}
        trainer = make(TPOTrainer, tmp_path, tiny.model("llama", tokenizer), data, tokenizer, eval_dataset=named)
        trainer.evaluate()
        trainer.create_model_card()
        results = ModelCard.load(tmp_path / "run" / "README.md").data.eval_results
        assert [result.dataset_name for result in results] == list(named)


def call_me(x, y):
    return x + y


def test_rows_of_several_sequences_have_no_length(tmp_path):
    config_class = TPOTrainer.config_class
    with pytest.raises(ValueError, match="`train_sampling_strategy='group_by_length'` sorts rows by the length"):
        config_class(str(tmp_path), use_cpu=True, bf16=False, train_sampling_strategy="group_by_length")
    assert (
        config_class(
            str(tmp_path), use_cpu=True, bf16=False, train_sampling_strategy="sequential"
        ).train_sampling_strategy
        == "sequential"
    )
