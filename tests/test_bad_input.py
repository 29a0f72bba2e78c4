"""Bad input: each kind with the message the user sees, raised before any model is loaded."""

import math
from pathlib import Path

import pytest
import tiny
from accelerate import ParallelismConfig
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import BitsAndBytesConfig, TrainingArguments
from trl import DPOConfig, SFTConfig

from trl_ift import METHODS, IFTConfig, IFTTrainer
from trl_ift.checks import resolve_checkpoint


@pytest.fixture
def no_loading(monkeypatch):
    """Fail the test if anything tries to load a model."""

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr("trl.trainer.sft_trainer.create_model_from_path", refuse)


def config(tmp_path, **settings):
    return IFTConfig(str(tmp_path / "run"), use_cpu=True, bf16=False, report_to="none", save_strategy="no", **settings)


def train(tmp_path, model_dir, data=None, settings=None, **arguments):
    return IFTTrainer(
        model=model_dir,
        args=config(tmp_path, **(settings or {})),
        train_dataset=tiny.prompt_completion_data() if data is None else data,
        **arguments,
    )


def bad(**row):
    return Dataset.from_list([row])


class TestConfig:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"ift_lambda": 1.5}, r"`ift_lambda=1.5` is out of range: it must lie in \[0, 1\]"),
            ({"ift_lambda": -0.1}, "out of range"),
            ({"ift_lambda": math.nan}, "`ift_lambda=nan` is out of range"),
            ({"ift_gamma": 1.01}, "`ift_gamma=1.01` is out of range"),
            ({"ift_gamma": math.nan}, "out of range"),
            ({"ift_lambda_noise_std": -1.0}, "`ift_lambda_noise_std=-1.0` is out of range"),
            ({"ift_lambda_noise_std": math.inf}, "out of range"),
            ({"ift_prediction": "greedy"}, "`ift_prediction='greedy'` is not known. Choose one of: 'argmax'"),
            ({"ift_propagation": "logps"}, "`ift_propagation='logps'` is not known"),
            ({"ift_propagation_norm": "l1"}, "Choose one of: 'L1', 'L2', 'log', 'softmax'"),
            ({"ift_propagation_side": "both"}, "`ift_propagation_side='both'` is not known"),
            ({"ift_propagation_grad": "partial"}, "`ift_propagation_grad='partial'` is not known"),
            ({"ift_loss_normalization": "batch"}, "`ift_loss_normalization='batch'` is not known"),
            ({"ift_lambda_schedule": "cosine"}, "`ift_lambda_schedule='cosine'` is not known"),
            ({"ift_lambda_min": 0.1}, "act only on a schedule. Set `ift_lambda_schedule='linear'`"),
            ({"ift_lambda_warmup_steps": 10}, "act only on a schedule"),
            ({"ift_lambda_schedule": "linear", "ift_lambda_min": 0.5}, r"must lie in \[0, 0.2\]"),
            (
                {"ift_lambda_schedule": "linear", "ift_lambda_warmup_steps": 0},
                "`ift_lambda_warmup_steps=0` is out of range",
            ),
            ({"ift_prediction": "topk"}, "needs `ift_top_k`"),
            ({"ift_prediction": "topk", "ift_top_k": 0}, "`ift_top_k=0` is out of range"),
            ({"ift_top_k": 5}, "`ift_top_k` has no effect with `ift_prediction='argmax'`"),
            ({"ift_temperature": 0.5}, "`ift_temperature` has no effect"),
            ({"ift_prediction": "sample", "ift_temperature": 0.0}, "`ift_temperature=0.0` is out of range"),
            ({"ift_propagation": "none", "ift_propagation_norm": "L2"}, "`ift_propagation_norm` has no effect"),
            ({"ift_propagation": "none", "ift_propagation_grad": "full"}, "`ift_propagation_grad` has no effect"),
            ({"ift_propagation": "none", "ift_gamma": 0.5}, "`ift_gamma` has no effect with `ift_propagation='none'`"),
            ({"ift_propagation": "mask", "ift_propagation_grad": "full"}, "whose weights have no gradient"),
            (
                {"ift_gamma": 0.0, "ift_propagation_norm": "L2"},
                "`ift_propagation_norm` has no effect with `ift_gamma=0`",
            ),
            ({"ift_propagation_side": "right"}, "needs `ift_propagation_grad='none'`"),
            ({"ift_lambda": 0.0, "ift_prediction": "sample"}, "`ift_prediction` has no effect with `ift_lambda=0`"),
            ({"ift_lambda": 0.0, "ift_lambda_noise_std": 0.5}, "has no effect with `ift_lambda=0`"),
            ({"loss_type": "dft"}, "`loss_type='dft'` is another loss"),
            ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` is not supported"),
        ],
    )
    def test_values(self, tmp_path, settings, message):
        with pytest.raises(ValueError, match=message):
            config(tmp_path, **settings)

    def test_types(self, tmp_path):
        with pytest.raises(TypeError, match="`ift_lambda` must be a number, got '0.2'"):
            config(tmp_path, ift_lambda="0.2")
        with pytest.raises(TypeError, match="`ift_top_k` must be an integer, got 2.5"):
            config(tmp_path, ift_prediction="topk", ift_top_k=2.5)

    @pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
    @pytest.mark.parametrize("foreign", [SFTConfig, DPOConfig, TrainingArguments])
    def test_foreign_config(self, tmp_path, model_dir, no_loading, method, foreign):
        args = foreign(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
        message = f"`args` is a `{foreign.__name__}`, but {method.trainer} needs a `{method.config}`"
        with pytest.raises(TypeError, match=message):
            method.trainer_class(model=model_dir, args=args, train_dataset=tiny.prompt_completion_data())

    def test_official_preset(self, tmp_path):
        preset = IFTConfig.official(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=512)
        assert preset.ift_propagation_grad == "full"
        assert preset.ift_freeze_input_embeddings
        assert (preset.optim, preset.lr_scheduler_type, preset.learning_rate) == ("rmsprop", "cosine", 5e-7)
        assert preset.per_device_train_batch_size * preset.gradient_accumulation_steps == 512
        assert preset.get_warmup_steps(100) == 15
        assert IFTConfig.official(str(tmp_path), use_cpu=True, bf16=False).max_length == 1024
        assert (preset.num_train_epochs, preset.max_grad_norm, preset.max_length) == (3, 10.0, 512)
        for ablation in (
            {"ift_propagation": "none"},
            {"ift_gamma": 0.0, "ift_lambda": 0.0},
            {"ift_propagation": "mask"},
        ):
            assert IFTConfig.official(str(tmp_path), use_cpu=True, bf16=False, **ablation).ift_freeze_input_embeddings

    def test_round_trip(self, tmp_path):
        first = config(tmp_path, ift_lambda=0.3, ift_prediction="topk", ift_top_k=4, ift_temperature=0.5)
        values = first.to_dict()
        again = IFTConfig(**values)
        assert again.to_dict() == values


class TestData:
    @pytest.mark.parametrize(
        ("data", "error", "message"),
        [
            (None, ValueError, "`train_dataset` is required"),
            ([{"text": "a"}], TypeError, "must be a `Dataset` or `IterableDataset`, got `list`"),
            (Dataset.from_dict({"text": []}), ValueError, "`train_dataset` is empty"),
            (IterableDataset.from_generator(lambda: iter(())), ValueError, "`train_dataset` is empty"),
            (
                bad(question="a", answer="b"),
                ValueError,
                r"has the columns \['answer', 'question'\]. Expected 'messages'",
            ),
            (bad(prompt="a"), ValueError, "has a column 'prompt' but no 'completion'"),
            (bad(prompt="a", messages=[{"role": "user", "content": "a"}]), ValueError, "or drop 'prompt'"),
            (bad(prompt="a", chosen="b", rejected="c"), ValueError, r"rename_column\('chosen', 'completion'\)"),
            (bad(text=3), TypeError, "column 'text' must hold a string; the first row has int"),
            (
                bad(messages="hello"),
                TypeError,
                "column 'messages' must hold a list of .* messages; the first row has str",
            ),
            (bad(messages=[{"content": "a"}]), TypeError, "the first row has a list of dict"),
            (
                bad(prompt="a", completion=[{"role": "assistant", "content": "b"}]),
                TypeError,
                "must both be strings, or both",
            ),
            (bad(prompt=None, completion="b"), TypeError, "the first row has NoneType and str"),
            (bad(input_ids="1 2 3"), TypeError, "column 'input_ids' must hold a list of token ids"),
            (bad(text="a", image="x.png"), ValueError, "is a vision dataset"),
        ],
    )
    def test_rows(self, tmp_path, model_dir, no_loading, data, error, message):
        with pytest.raises(error, match=message):
            IFTTrainer(model=model_dir, args=config(tmp_path), train_dataset=data)

    def test_eval_dataset_is_checked_and_named(self, tmp_path, model_dir, no_loading):
        with pytest.raises(ValueError, match=r"`eval_dataset\['b'\]` has the columns"):
            train(tmp_path, model_dir, eval_dataset={"a": tiny.text_data(), "b": bad(x=1)})

    def test_type_of_an_eval_dataset(self, tmp_path, model_dir, no_loading):
        with pytest.raises(
            TypeError, match=r"`eval_dataset\['b'\]` must be a `Dataset` or `IterableDataset`, got `list`"
        ):
            train(tmp_path, model_dir, eval_dataset={"a": tiny.text_data(), "b": [{"text": "a"}]})

    def test_formatting_func_allows_any_columns(self, tmp_path, model_dir):
        data = Dataset.from_list([{"q": "Name a colour.", "a": "Blue."}] * 4)
        trainer = train(tmp_path, model_dir, data, formatting_func=lambda row: f"{row['q']} {row['a']}")
        assert len(trainer.train_dataset) == 4

    def test_rows_of_one_token(self, tmp_path, model_dir):
        with pytest.raises(ValueError, match="No row of the train dataset has a trainable token"):
            train(tmp_path, model_dir, Dataset.from_list([{"input_ids": [5]}, {"input_ids": [6]}]))

    @pytest.mark.parametrize("max_length", [3, None])
    def test_endless_untrainable_stream(self, tmp_path, model_dir, max_length):
        def rows():
            while True:
                yield {"input_ids": [5, 6, 7, 8], "labels": [-100] * 4}

        with pytest.raises(ValueError, match="No row of the train dataset has a trainable token"):
            train(
                tmp_path, model_dir, IterableDataset.from_generator(rows), {"max_length": max_length, "max_steps": 1}
            )

    @pytest.mark.parametrize("max_length", [3, None])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_no_trainable_token(self, tmp_path, model_dir, max_length, streaming):
        data = bad(input_ids=[5, 6, 7, 8, 9], labels=[-100, -100, -100, 8 if max_length else -100, -100])
        data = data.to_iterable_dataset() if streaming else data
        with pytest.raises(ValueError, match="No row of the train dataset has a trainable token"):
            train(tmp_path, model_dir, data, {"max_length": max_length, "max_steps": 1})

    def test_unknown_assistant_mask(self, tmp_path, model_dir):
        with pytest.raises(ValueError, match="assistant_only_loss=True"):
            train(tmp_path, model_dir, tiny.text_data(), {"assistant_only_loss": True})


class TestModels:
    @pytest.mark.parametrize("existing", [False, True])
    def test_prompt_learning(self, tmp_path, model_dir, tokenizer, no_loading, existing):
        prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        with pytest.raises(ValueError, match=r"does not support prompt-learning PEFT \(PromptTuningConfig\)"):
            if existing:
                model = get_peft_model(tiny.model("llama", tokenizer), prompt)
                IFTTrainer(
                    model=model, args=config(tmp_path), train_dataset=tiny.text_data(), processing_class=tokenizer
                )
            else:
                train(tmp_path, model_dir, peft_config=prompt)

    @pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ".*(q_proj|lm_head)"])
    def test_adapter_on_the_head(self, tmp_path, model_dir, no_loading, targets):
        with pytest.raises(ValueError, match="`target_modules` contains 'lm_head'"):
            train(tmp_path, model_dir, peft_config=LoraConfig(target_modules=targets))

    def test_sequence_parallelism(self, tmp_path, model_dir, no_loading):
        args = config(tmp_path)
        args.parallelism_config = ParallelismConfig(cp_size=2)
        with pytest.raises(ValueError, match="does not support context or sequence parallelism"):
            IFTTrainer(model=model_dir, args=args, train_dataset=tiny.text_data())

    def test_compute_loss_func(self, tmp_path, model_dir, no_loading):
        with pytest.raises(ValueError, match="`compute_loss_func` would replace the loss of IFTTrainer"):
            train(tmp_path, model_dir, compute_loss_func=lambda *_: 0)

    def test_folder_without_tokenizer(self, tmp_path, tokenizer, no_loading):
        folder = tmp_path / "bare"
        tiny.model("llama", tokenizer).save_pretrained(folder)
        with pytest.raises(ValueError, match=r"holds no tokenizer .* pass it as `processing_class`"):
            train(tmp_path, str(folder))

    def test_folder_without_model(self, tmp_path, tokenizer, no_loading):
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match="has no `config.json`"):
            train(tmp_path, str(tmp_path / "empty"))
        (tmp_path / "empty" / "adapter_config.json").write_text("{}")
        with pytest.raises(ValueError, match="It holds a PEFT adapter"):
            train(tmp_path, str(tmp_path / "empty"))

    def test_model_in_memory_without_tokenizer(self, tmp_path, tokenizer):
        with pytest.raises(ValueError, match="built in memory.*Pass the tokenizer as `processing_class`"):
            train(tmp_path, tiny.model("llama", tokenizer))

    def test_4bit_without_bitsandbytes(self, tmp_path, model_dir, no_loading, monkeypatch):
        quantization = BitsAndBytesConfig(load_in_4bit=True)
        monkeypatch.setattr("trl_ift.checks.find_spec", lambda name: None)
        with pytest.raises(
            ImportError, match=r"`load_in_4bit`\), but bitsandbytes is not installed.*trl-ift\[quantization\]"
        ):
            train(tmp_path, model_dir, quantization_config=quantization)
        with pytest.raises(ImportError, match="bitsandbytes is not installed"):
            train(tmp_path, model_dir, settings={"model_init_kwargs": {"quantization_config": quantization}})

    def test_frozen_and_trained_embeddings(self, tmp_path, model_dir):
        peft_config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
        with pytest.raises(ValueError, match="but PEFT trains the input embeddings"):
            train(tmp_path, model_dir, settings={"ift_freeze_input_embeddings": True}, peft_config=peft_config)

    def test_per_layer_embeddings(self, tmp_path, tokenizer, no_loading):
        model = tiny.model("llama", tokenizer)
        model.config.hidden_size_per_layer_input = 4
        model.save_pretrained(tmp_path / "model")
        for source in (model, str(tmp_path / "model")):
            with pytest.raises(ValueError, match="`llama` models with per-layer embeddings"):
                train(tmp_path, source, processing_class=tokenizer)


class TestOutputFolder:
    def finished_run(self, tmp_path, model_dir, **settings):
        trainer = train(tmp_path, model_dir, settings={"max_steps": 2, **settings}, peft_config=LoraConfig(r=2))
        trainer.train()
        trainer.save_model()
        return trainer

    def test_another_run_is_not_overwritten(self, tmp_path, model_dir):
        first = self.finished_run(tmp_path, model_dir)
        path = Path(first.args.output_dir) / "adapter_model.safetensors"
        weights = path.read_bytes()
        second = train(tmp_path, model_dir, settings={"max_steps": 1}, peft_config=LoraConfig(r=2))
        with pytest.raises(ValueError, match="already holds the results of another run .*adapter_model.safetensors"):
            second.train()
        assert path.read_bytes() == weights
        assert second.evaluate(tiny.text_data())["eval_loss"] > 0  # looking does no harm
        consenting = train(
            tmp_path, model_dir, settings={"max_steps": 1, "overwrite_output_dir": True}, peft_config=LoraConfig(r=2)
        )
        consenting.train()
        consenting.save_model()
        assert path.read_bytes() != weights

    def test_the_same_trainer_may_go_on(self, tmp_path, model_dir):
        trainer = self.finished_run(tmp_path, model_dir)
        trainer.train()

    def test_only_a_resumed_run_may_write_on(self, tmp_path, model_dir):
        first = self.finished_run(tmp_path, model_dir)
        settings = {
            "max_steps": 1,
            "resume_from_checkpoint": "true",
        }  # an option for scripts: `train` does not read it
        second = train(tmp_path, model_dir, settings=settings)
        with pytest.raises(ValueError, match="already holds the results of another run"):
            second.train()
        assert (Path(first.args.output_dir) / "adapter_model.safetensors").is_file()

    def test_overwriting_leaves_no_stale_adapter(self, tmp_path, model_dir):
        first = self.finished_run(tmp_path, model_dir)
        second = train(tmp_path, model_dir, settings={"max_steps": 1, "overwrite_output_dir": True})
        second.train()
        second.save_model()
        files = {path.name for path in Path(first.args.output_dir).iterdir()}
        assert "model.safetensors" in files
        assert not {name for name in files if name.startswith("adapter_")}

    def test_the_model_in_training_is_not_overwritten(self, tmp_path, model_dir, tokenizer):
        folder = tmp_path / "run" / "checkpoint-5"
        tiny.model("llama", tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        trainer = train(tmp_path, str(folder), settings={"max_steps": 1, "overwrite_output_dir": True})
        with pytest.raises(ValueError, match="would remove the model that is being trained"):
            trainer.train()
        assert (folder / "model.safetensors").is_file()

    def test_overwriting_removes_old_checkpoints(self, tmp_path, model_dir):
        settings = {"max_steps": 2, "overwrite_output_dir": True}
        trainer = train(tmp_path, model_dir, settings=settings)
        stale = Path(trainer.args.output_dir) / "checkpoint-900"
        stale.mkdir(parents=True)
        kept = Path(trainer.args.output_dir) / "notes.txt"
        kept.write_text("mine")
        trainer.train()
        assert not stale.exists()
        assert kept.read_text() == "mine"

    def test_interrupted_checkpoint(self, tmp_path, model_dir):
        settings = {"max_steps": 4}
        trainer = train(tmp_path, model_dir, settings=settings)
        trainer.args.save_strategy, trainer.args.save_steps = "steps", 2
        trainer.train()
        folder = Path(trainer.args.output_dir)
        state = folder / "checkpoint-4" / "trainer_state.json"
        state.write_text(state.read_text()[:50])
        again = train(tmp_path, model_dir, settings=settings)
        with pytest.raises(ValueError, match=r"checkpoint-4` is incomplete .* Resume from `.*checkpoint-2`"):
            again.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == 4

    def test_no_whole_checkpoint(self, tmp_path):
        (tmp_path / "checkpoint-2").mkdir()
        with pytest.raises(ValueError, match=r"checkpoint-2` is incomplete .* Start without `resume_from_checkpoint`"):
            resolve_checkpoint(True, str(tmp_path))

    def test_a_checkpoint_without_its_optimizer(self, tmp_path, model_dir):
        """Refused: training would go on with a new one, and with a new schedule."""
        trainer = train(tmp_path, model_dir, settings={"max_steps": 2})
        args = trainer.args
        args.save_strategy, args.save_steps, args.save_only_model = "steps", 1, True
        trainer.train()
        with pytest.raises(ValueError, match=r"checkpoint-1` has no 'optimizer.pt' and no 'scheduler.pt'"):
            trainer.train(resume_from_checkpoint=str(Path(args.output_dir) / "checkpoint-1"))

    def test_missing_checkpoint(self, tmp_path):
        with pytest.raises(ValueError, match="there is no folder `nowhere`. Start without"):
            resolve_checkpoint("nowhere", str(tmp_path))
        with pytest.raises(ValueError, match="holds no checkpoint"):
            resolve_checkpoint(True, str(tmp_path))
        assert resolve_checkpoint(None, str(tmp_path)) is None
        assert resolve_checkpoint(False, str(tmp_path)) is None
