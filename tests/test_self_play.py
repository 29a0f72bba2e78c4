"""The iterations of SPIN and LD-Align: what each trains on and from, interruptions, what is refused, the commands."""

import gc
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import self_play_killed
import tiny
import torch
import two_processes_self_play
import yaml
from datasets import Dataset, load_dataset
from huggingface_hub.utils import filter_repo_objects
from pairs import token_logps
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from self_play_killed import KILLED, Letters, lively, run
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed

from trl_ift import DavIRDPOConfig, LDAlignConfig, SPINConfig, SPINTrainer
from trl_ift import self_play as module
from trl_ift.cli import main
from trl_ift.data import build_pairs, generate_completions, generation
from trl_ift.latent.encoders import PolicyHiddenState, Sample
from trl_ift.latent.weights import WeightNormalizer, latent_distance
from trl_ift.scripts import self_play as script
from trl_ift.self_play import LatentConfig, SelfPlayConfig


DATA = tiny.prompt_completion_data()


@pytest.fixture(autouse=True, scope="module")
def caches(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("cache"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", folder)
        patch.delenv("TRL_IFT_DEBUG", raising=False)
        yield


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, tokenizer):
    """Folder of a model that ends some of its answers."""
    path = tmp_path_factory.mktemp("models") / "policy"
    lively(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def whole(model_dir, tmp_path_factory):
    """An uninterrupted run of LD-Align: its folder, its summaries, its encoder."""
    folder, encoder = tmp_path_factory.mktemp("runs") / "whole", Letters()
    return SimpleNamespace(folder=folder, summaries=run(model_dir, folder, latent=encoder, **KILLED), encoder=encoder)


@pytest.fixture
def trained(monkeypatch):
    """What each iteration has trained: its trainer's config, rows, start and names of adapters."""
    seen, train = [], module.train_and_save

    def spy(trainer, folder, what):
        state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        adapters = list(getattr(trainer.model, "peft_config", {}))
        seen.append(SimpleNamespace(args=trainer.args, rows=trainer.train_dataset, start=state, adapters=adapters))
        seen[-1].record = train(trainer, folder, what)
        seen[-1].log = trainer.state.log_history
        seen[-1].losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return seen[-1].record

    monkeypatch.setattr(module, "train_and_save", spy)
    return seen


@pytest.fixture
def no_loading(monkeypatch):
    """Fail the test if anything tries to load a model."""

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded before the input was checked")

    for name in ("trl_ift.data.inference", "trl.trainer.dpo_trainer"):
        monkeypatch.setattr(f"{name}.create_model_from_path", refuse)


def lora(**options):
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options)


def weights(folder, name="model.safetensors"):
    return load_file(Path(folder) / name)


def assert_equal_weights(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def pairs_of(folder, iteration, name="pairs"):
    return load_dataset("parquet", data_files=f"{folder}/iteration-{iteration}/{name}.parquet", split="train")


def stages_of(folder, iteration):
    return json.loads((Path(folder) / f"iteration-{iteration}" / "stages.json").read_text())


def said_stages(text):
    """The stages that were said to begin, e.g. `(1, "generate")`."""
    return [(int(i), name) for i, name in re.findall(r"^Iteration (\d+) of \d+, stage \d of \d: (\w+)", text, re.M)]


def answering(monkeypatch, tokenizer, answer):
    """Let the policy answer each prompt with `answer(iteration, row of DATA)`: a text, its end appended."""
    iterations = []

    def sampler(model, settings, end_ids, pad_id):
        iterations.append(settings.seed - 42)
        rows = {tuple(tokenizer(row["prompt"])["input_ids"]): row for row in DATA}

        def sample(prompts, seed):
            texts = [answer(iterations[-1], rows[tuple(prompt)]) for prompt in prompts]
            return [tokenizer(text + tokenizer.eos_token)["input_ids"] for text in texts]

        return sample

    monkeypatch.setattr(generation, "transformers_sampler", sampler)


# ---------------------------------------------------------------- SPIN


class TestSPIN:
    @pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
    def test_one_iteration_is_one_trainer(self, model_dir, tmp_path, peft):
        """Bit for bit what generation, pairing and trainer give by hand."""
        arguments = {"peft_config": lora()} if peft else {}
        run(model_dir, tmp_path / "run", num_iterations=1, **arguments)
        completions = generate_completions(
            model_dir, DATA.remove_columns("completion"), tmp_path / "completions", max_new_tokens=8, shard_size=4,
            seed=42, score=False,
        )  # fmt: skip
        pairs = build_pairs(DATA, completions, processing_class=model_dir)
        assert pairs[:] == pairs_of(tmp_path / "run", 0)[:]
        args = SPINConfig(
            str(tmp_path / "hand"), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=3,
            learning_rate=1e-2, per_device_train_batch_size=4, gradient_checkpointing=False,
            precompute_ref_log_probs=True,
        )  # fmt: skip
        set_seed(42)
        trainer = SPINTrainer(model_dir, args=args, train_dataset=pairs, **arguments)
        trainer.train()
        trainer.save_model()
        name = "adapter_model.safetensors" if peft else "model.safetensors"
        found = weights(tmp_path / "run", name)
        assert_equal_weights(found, weights(tmp_path / "hand", name))
        assert_equal_weights(found, weights(tmp_path / "run/iteration-0/model", name))
        if not peft:
            assert not torch.equal(found["lm_head.weight"], weights(model_dir)["lm_head.weight"])

    def test_each_iteration_starts_from_the_last_and_is_compared_with_it(
        self, model_dir, tmp_path, trained, tokenizer
    ):
        summaries = run(model_dir, tmp_path / "run", keep_previous_pairs=1, train_sampling_strategy="sequential")
        first, second = trained
        assert_equal_weights(second.start, weights(tmp_path / "run/iteration-0/model"))
        assert_equal_weights(weights(tmp_path / "run"), weights(tmp_path / "run/iteration-1/model"))
        for iteration in trained:
            assert iteration.losses[0] == pytest.approx(math.log(2), rel=1e-5)
            assert iteration.losses[-1] < 0.6
        # The pairs of the first iteration come first in the second one, with the log-probs of its start
        number = len(first.rows)
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert second.rows[:number][name] == first.rows[name][:]
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            old, new = (np.array(x) for x in (first.rows[name][:], second.rows[:number][name]))
            assert (np.abs(old - new) > 1e-2).all()
        for folder, iteration in ((model_dir, first), (tmp_path / "run/iteration-0/model", second)):
            model = AutoModelForCausalLM.from_pretrained(folder)
            with torch.no_grad():
                for row in iteration.rows.select([0, len(iteration.rows) - 1]):
                    for kind in ("chosen", "rejected"):
                        logp = token_logps(model, tokenizer, row["prompt_ids"], row[f"{kind}_ids"]).sum().item()
                        assert row[f"ref_{kind}_logps"] == pytest.approx(logp, rel=1e-5)
        # Answered anew, by the trained policy, with other draws
        policies = [set(pairs_of(tmp_path / "run", i)["policy"]) for i in range(2)]
        assert [len(policy) for policy in policies] == [1, 1]
        assert policies[0] != policies[1]
        assert [s["iteration"] for s in summaries] == [0, 1]
        assert [s["pairs"] for s in summaries] == [number, number + summaries[1]["new_pairs"]]

    def test_other_draws_from_a_policy_that_has_not_changed(self, model_dir, tmp_path):
        run(model_dir, tmp_path / "run", learning_rate=1e-30)
        answers = [pairs_of(tmp_path / "run", i)["rejected"][:] for i in range(2)]
        assert answers[0] != answers[1]

    @pytest.mark.parametrize("keep", [0, 2])
    def test_pairs_that_are_kept(self, model_dir, tmp_path, trained, keep):
        summaries = run(model_dir, tmp_path / "run", num_iterations=3, keep_previous_pairs=keep, max_steps=1)
        new = [pairs_of(tmp_path / "run", i)["rejected_ids"][:] for i in range(3)]
        for iteration, seen in enumerate(trained):
            expected = [ids for earlier in range(max(iteration - keep, 0), iteration + 1) for ids in new[earlier]]
            assert seen.rows["rejected_ids"][:] == expected
            assert summaries[iteration]["pairs"] == len(expected)
            assert summaries[iteration]["new_pairs"] == len(new[iteration])

    def test_schedules(self, model_dir, tmp_path, trained):
        run(
            model_dir, tmp_path / "run", num_iterations=3, max_steps=1, beta_schedule=[0.3, 5.0],
            learning_rate_schedule=[1e-3, 1e-4, 1e-5],
        )  # fmt: skip
        assert [seen.args.beta for seen in trained] == [0.3, 5.0, 5.0]
        assert [seen.args.learning_rate for seen in trained] == [1e-3, 1e-4, 1e-5]

    def test_defaults_of_the_methods(self, model_dir, tmp_path, trained):
        """4 iterations with the pairs of one before for SPIN; 1 for LD-Align, and no earlier pairs."""
        settings = {"num_iterations": None, "max_steps": 1}
        assert len(run(model_dir, tmp_path / "spin", **settings)) == 4
        new = [stages_of(tmp_path / "spin", i)["pair"]["pairs"] for i in range(4)]
        assert [len(seen.rows) for seen in trained] == [new[0], *(new[i] + new[i - 1] for i in range(1, 4))]
        trained.clear()
        assert len(run(model_dir, tmp_path / "ld", LDAlignConfig, latent=Letters(), **settings)) == 1
        assert (
            len(run(model_dir, tmp_path / "ld", LDAlignConfig, latent=Letters(), **settings | {"num_iterations": 2}))
            == 2
        )
        new = [stages_of(tmp_path / "ld", i)["pair"]["pairs"] for i in range(2)]
        assert [len(seen.rows) for seen in trained] == new

    def test_conversations(self, model_dir, tmp_path, trained):
        run(model_dir, tmp_path / "run", data=tiny.messages_data(), num_iterations=1)
        assert trained[0].rows[0]["prompt"] == [{"role": "user", "content": "What is the capital of France?"}]
        run(model_dir, tmp_path / "same", data=tiny.conversational_data(), num_iterations=1)
        assert_equal_weights(weights(tmp_path / "run"), weights(tmp_path / "same"))

    def test_drop_truncated(self, model_dir, tmp_path, trained):
        (summary,) = run(model_dir, tmp_path / "run", num_iterations=1, max_new_tokens=24, drop_truncated=True)
        assert summary["dropped"] == {"truncated": summary["truncated"]}
        assert 0 < summary["truncated"] < summary["answers"] == 8
        assert not any(trained[0].rows["truncated"])

    def test_summaries_and_card(self, model_dir, tmp_path, trained):
        summaries = run(model_dir, tmp_path / "run")
        for iteration, summary in enumerate(summaries):
            folder = tmp_path / f"run/iteration-{iteration}/model"
            last = [entry for entry in trained[iteration].log if "loss" in entry][-1]
            for name in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"):
                assert summary[name] == last[name]
            assert summary["steps"] == 3
            text = (folder / "README.md").read_text()
            assert f"| `iteration` | `{iteration + 1} of 2` |" in text
            assert f"| `pairs` | `{summary['pairs']}` |" in text
            assert "| `max_new_tokens` | `8` |" in text
        assert (tmp_path / "run/README.md").read_text() == text
        assert "\n# run\n" in text  # the name of the folder
        assert "iteration-1" not in text
        assert [seen.args.run_name for seen in trained] == ["run-0", "run-1"]

    def test_what_is_published(self, model_dir, tmp_path, tokenizer):
        run(model_dir, tmp_path / "run")
        assert_equal_weights(
            AutoModelForCausalLM.from_pretrained(tmp_path / "run").state_dict(), weights(tmp_path / "run")
        )
        assert AutoTokenizer.from_pretrained(tmp_path / "run").get_vocab() == tokenizer.get_vocab()
        found = {path.name for path in (tmp_path / "run").iterdir()}
        assert {
            "README.md",
            "config.json",
            "model.safetensors",
            "self_play.json",
            "iteration-0",
            "iteration-1",
        } <= found
        assert not list((tmp_path / "run").rglob("training_args.bin"))


class TestAdapters:
    def test_one_adapter_through_all_iterations(self, model_dir, tmp_path, trained):
        config = lora(target_modules="all-linear")
        run(model_dir, tmp_path / "run", peft_config=config)
        first, second = trained
        assert first.adapters == second.adapters == ["default"]
        start = {name: value for name, value in second.start.items() if "lora_" in name}
        saved = weights(tmp_path / "run/iteration-0/model", "adapter_model.safetensors")
        assert_equal_weights({name.replace(".default", ""): value for name, value in start.items()}, saved)
        assert any((value != 0).all() for name, value in saved.items() if "lora_B" in name)
        assert second.losses[0] == pytest.approx(math.log(2), rel=1e-5)
        assert second.losses[-1] < 0.65
        # The base is not touched, and not copied; nothing is left of references
        base = weights(model_dir)
        for seen in trained:
            frozen = {
                name.removeprefix("base_model.model.").replace(".base_layer", ""): value
                for name, value in seen.start.items()
                if "lora_" not in name
            }
            assert_equal_weights(frozen, base)
        assert not list((tmp_path / "run").rglob("model.safetensors"))
        assert not [path for path in (tmp_path / "run").rglob("ref*") if path.is_dir()]
        model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run")
        assert list(model.peft_config) == ["default"]
        assert model.peft_config["default"].base_model_name_or_path == model_dir
        last = weights(tmp_path / "run/iteration-1/model", "adapter_model.safetensors")
        assert_equal_weights(weights(tmp_path / "run", "adapter_model.safetensors"), last)
        assert any(not torch.equal(last[name], value) for name, value in saved.items())
        assert "README.md" in os.listdir(tmp_path / "run")

    @pytest.fixture
    def adapter(self, model_dir, tmp_path):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), lora(r=2, target_modules="all-linear"))
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / "adapter")
        return str(tmp_path / "adapter")

    def test_initial_adapter(self, model_dir, tmp_path, trained, adapter):
        """It generates, it is the reference, and it is trained on."""
        before = weights(adapter, "adapter_model.safetensors")
        run(model_dir, tmp_path / "run", initial_adapter=adapter)
        first, second = trained
        found = {name.replace(".default", ""): value for name, value in first.start.items() if "lora_" in name}
        assert_equal_weights(found, before)
        assert [seen.losses[0] for seen in trained] == pytest.approx([math.log(2)] * 2, rel=1e-5)
        assert first.adapters == second.adapters == ["default"]
        run(model_dir, tmp_path / "without", num_iterations=1)
        assert pairs_of(tmp_path / "run", 0)["rejected"][:] != pairs_of(tmp_path / "without", 0)["rejected"][:]
        assert_equal_weights(weights(adapter, "adapter_model.safetensors"), before)
        after = weights(tmp_path / "run", "adapter_model.safetensors")
        assert all(not torch.equal(after[name], value) for name, value in before.items())
        assert PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), tmp_path / "run")

    def test_quantized(self, model_dir, tmp_path, trained):
        pytest.importorskip("bitsandbytes")
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="float32")
        run(model_dir, tmp_path / "run", peft_config=lora(), quantization_config=quantization)
        assert [seen.losses[0] for seen in trained] == pytest.approx([math.log(2)] * 2, rel=1e-3)
        assert all(seen.losses[-1] < 0.68 for seen in trained)
        kinds = [{name: value.dtype for name, value in seen.start.items()} for seen in trained]
        assert kinds[0] == kinds[1]
        assert torch.uint8 in kinds[1].values()
        with pytest.raises(
            ValueError, match=r"quantization_config='None' \(now 'None'\)|quantization_config='Bits.*now 'None'"
        ):
            run(model_dir, tmp_path / "run", peft_config=lora())


class TestEvaluation:
    def test_it_is_answered_anew_in_each_iteration(self, model_dir, tmp_path, trained):
        settings = {"eval_strategy": "steps", "eval_steps": 3, "eval_dataset": DATA.select([5, 6, 7])}
        summaries = run(model_dir, tmp_path / "run", data=DATA.select(range(5)), **settings)
        answers = []
        for iteration, summary in enumerate(summaries):
            pairs = pairs_of(tmp_path / "run", iteration, "eval_pairs")
            assert set(pairs["prompt"]) <= {row["prompt"] for row in DATA.select([5, 6, 7])}
            answers.append(pairs["rejected"][:])
            last = [entry for entry in trained[iteration].log if "eval_loss" in entry][-1]
            for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"):
                assert summary[name] == last[name]
            assert summary["answers"] == 5
        assert answers[0] != answers[1]

    def test_an_iteration_without_evaluation(self, model_dir, tmp_path, tokenizer, monkeypatch, trained, capsys):
        """Where the policy has met the held-out rows, which must not end the run."""
        held_out = DATA.select([5, 6])

        def answer(iteration, row):
            return row["completion"] if iteration and row in list(held_out) else " No."

        answering(monkeypatch, tokenizer, answer)
        first, second = run(
            model_dir, tmp_path / "run", data=DATA.select(range(5)), eval_dataset=held_out, eval_strategy="steps",
            eval_steps=3, eval_on_start=True,
        )  # fmt: skip
        said = capsys.readouterr().out
        assert (
            "This iteration is trained without evaluation. No pair is left of 2 generated answers: 2 identical."
            in said
        )
        assert [stages_of(tmp_path / "run", i)["pair"]["eval_pairs"] for i in range(2)] == [2, 0]
        assert ("eval_loss" in first, "eval_loss" in second) == (True, False)
        assert second["steps"] == 3

    def test_it_does_not_change_the_training(self, model_dir, tmp_path, trained):
        run(model_dir, tmp_path / "plain", num_iterations=1)
        run(
            model_dir,
            tmp_path / "evaluated",
            num_iterations=1,
            eval_strategy="steps",
            eval_dataset=DATA.select([0, 1]),
        )
        assert_equal_weights(weights(tmp_path / "evaluated"), weights(tmp_path / "plain"))

    def test_ld_align(self, model_dir, tmp_path):
        """Held-out pairs need no weights."""
        (summary,) = run(
            model_dir, tmp_path / "run", LDAlignConfig, latent=Letters(), num_iterations=1, eval_strategy="steps",
            eval_steps=3, eval_dataset=DATA.select([5, 6]),
        )  # fmt: skip
        assert 0 < summary["eval_loss"] < 5
        assert "eval_rewards/margins" in summary


# ---------------------------------------------------------------- LD-Align


class TestLDAlign:
    def codes(self, rows, column):
        encoder = Letters()
        return encoder.encode([Sample(row["prompt"], row[column]) for row in rows]).numpy()

    def test_weights_are_those_of_the_union(self, whole):
        """The distances of the codes, normalised over new and kept pairs together."""
        union = datasets.concatenate_datasets([pairs_of(whole.folder, i) for i in range(2)])
        distances = latent_distance(self.codes(union, "chosen"), self.codes(union, "rejected"))
        found = pairs_of(whole.folder, 1, "weighted")
        assert found.remove_columns(["latent_distance", "weight"])[:] == union[:]
        np.testing.assert_allclose(found["latent_distance"], distances, rtol=1e-12)
        np.testing.assert_allclose(found["weight"], distances / distances.mean(), rtol=1e-12)
        assert np.mean(found["weight"]) == pytest.approx(1)
        first = pairs_of(whole.folder, 0, "weighted")
        np.testing.assert_allclose(first["latent_distance"], distances[: len(first)], rtol=1e-12)
        assert np.mean(first["weight"]) == pytest.approx(1)
        assert not np.allclose(first["weight"], found["weight"][: len(first)])
        summary = whole.summaries[1]["weights"]
        assert summary["max"] == pytest.approx(max(found["weight"]))
        assert summary["mean"] == pytest.approx(1)

    def test_real_answers_are_encoded_once(self, whole):
        samples = whole.encoder.seen
        real = [s for s in samples if s.completion in set(DATA["completion"])]
        assert [s.completion for s in real] == DATA["completion"][:]
        assert len(samples) == len(DATA) + sum(stages_of(whole.folder, i)["pair"]["pairs"] for i in range(2))

    def test_the_weights_are_trained_with(self, model_dir, tmp_path, trained):
        run(
            model_dir, tmp_path / "run", LDAlignConfig, latent=Letters(), num_iterations=1,
            weight_normalization="sigmoid", weight_clip=[0.4, 0.6],
        )  # fmt: skip
        (seen,) = trained
        distances = np.array(seen.rows["latent_distance"])
        expected = WeightNormalizer.fit(distances, "sigmoid", (0.4, 0.6))(distances)
        assert {0.4, 0.6} <= set(expected)
        np.testing.assert_allclose(seen.rows["weight"], expected, rtol=1e-6)
        assert seen.losses[0] == pytest.approx(np.mean(expected) * math.log(2), rel=0.2)
        text = (tmp_path / "run/README.md").read_text()
        for name, value in (("weight_normalization", "sigmoid"), ("weight_clip", [0.4, 0.6]), ("distance", "l2")):
            assert f"| `{name}` | `{value}` |" in text

    def test_distance_of_an_encoder(self, model_dir, tmp_path, monkeypatch):
        monkeypatch.setattr(self_play_killed, "self_play", partial(module.self_play, distance="cosine"))
        run(model_dir, tmp_path / "run", LDAlignConfig, latent=Letters(), num_iterations=1)
        monkeypatch.undo()
        with pytest.raises(ValueError, match=r"'distance': 'cosine'} \(now .* 'distance': 'l2'}\)"):
            run(model_dir, tmp_path / "run", LDAlignConfig, latent=Letters(), num_iterations=1)
        pairs = pairs_of(tmp_path / "run", 0, "weighted")
        distances = latent_distance(self.codes(pairs, "chosen"), self.codes(pairs, "rejected"), "cosine")
        np.testing.assert_allclose(pairs["latent_distance"], distances, rtol=1e-12)
        assert "| `distance` | `cosine` |" in (tmp_path / "run/README.md").read_text()

    def test_equal_weights_are_spin(self, model_dir, tmp_path):
        class Constant(Letters):
            """Real answers here, all others there."""

            def encode(self, samples):
                real = set(DATA["completion"])
                return torch.tensor([[float(sample.completion in real), 0, 0] for sample in samples])

        settings = {"keep_previous_pairs": 1}
        run(model_dir, tmp_path / "ld", LDAlignConfig, latent=Constant(), **settings)
        run(model_dir, tmp_path / "spin", **settings)
        for name, value in weights(tmp_path / "ld").items():
            torch.testing.assert_close(value, weights(tmp_path / "spin")[name], rtol=1e-4, atol=1e-5)

    def test_empty_real_answers(self, model_dir, tmp_path):
        """They have no code, and are in no pair; the codes of the others stay theirs."""
        rows = DATA.to_list()
        rows[1]["completion"] = rows[4]["completion"] = ""
        (summary,) = run(
            model_dir,
            tmp_path / "run",
            LDAlignConfig,
            data=Dataset.from_list(rows),
            latent=Letters(),
            num_iterations=1,
        )
        assert summary["dropped"]["of an empty real answer"] == 2
        pairs = pairs_of(tmp_path / "run", 0, "weighted")
        distances = latent_distance(self.codes(pairs, "chosen"), self.codes(pairs, "rejected"))
        np.testing.assert_allclose(pairs["latent_distance"], distances, rtol=1e-12)
        assert 4 in pairs["prompt_index"][:] or 5 in pairs["prompt_index"][:]

    def test_said(self, model_dir, tmp_path, capsys):
        run(model_dir, tmp_path / "run", LDAlignConfig, latent=Letters(), num_iterations=1)
        said = capsys.readouterr().out
        assert re.search(
            r"8 pairs. Weights: mean 1, standard deviation .*\nEffective sample size \d.* rank correlation", said
        )


# ---------------------------------------------------------------- interruptions


class TestInterrupted:
    @pytest.fixture(scope="class")
    def cut_off(self, model_dir, tmp_path_factory):
        """Runs that were killed: their folders, and how each ended."""
        folder = tmp_path_factory.mktemp("killed")
        command = [sys.executable, self_play_killed.__file__, model_dir, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        return folder, done.stdout

    def left(self, folder):
        """The stages that are still to do."""
        done = [
            (i + 1, name)
            for i in range(2)
            for name in (stages_of(folder, i) if (folder / f"iteration-{i}/stages.json").is_file() else {})
        ]
        return [(i, name) for i in (1, 2) for name in ("generate", "pair", "weigh", "train") if (i, name) not in done]

    @pytest.mark.parametrize(
        ("way", "left"),
        [("load", 8), ("generate", 4), ("encode", 2), ("step", 1), ("checkpoint", 1), ("record", 1), ("publish", 0)],
    )
    def test_killed_and_restarted(self, way, left, cut_off, model_dir, whole, capsys):
        """SIGKILL, then the same again: the weights of an uninterrupted run; what was finished is not repeated."""
        folder, said = cut_off
        assert f"{way} {-signal.SIGKILL}" in said.splitlines()
        folder, encoder = folder / way, Letters()
        stages, before = self.left(folder), snapshot(folder)
        assert len(stages) == left
        summaries = run(model_dir, folder, latent=encoder, **KILLED)
        output = capsys.readouterr().out
        assert said_stages(output) == stages
        last = {"step": "checkpoint-2", "checkpoint": "checkpoint-1", "record": "checkpoint-3"}.get(way)
        assert [line for line in output.splitlines() if line.startswith("Going on from ")] == (
            [f"Going on from {last}."] if last else []
        )
        assert_equal_weights(weights(folder), weights(whole.folder))
        for iteration in range(2):
            name = f"iteration-{iteration}/model"
            assert_equal_weights(weights(folder / name), weights(whole.folder / name))
            for file in ("pairs", "weighted"):
                assert pairs_of(folder, iteration, file)[:] == pairs_of(whole.folder, iteration, file)[:]
        assert summaries == whole.summaries
        for path in (*folder.glob("iteration-0/completions/*"), *folder.glob("iteration-0/*.parquet")):
            if path in before:
                assert path.stat().st_mtime_ns == before[path], path
        if way != "load":
            assert not any(sample.completion in set(DATA["completion"]) for sample in encoder.seen)
        assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in whole.folder.iterdir())

    def test_finished_runs_do_nothing(self, model_dir, whole, capsys, no_loading):
        before = snapshot(whole.folder / "iteration-1")
        assert run(model_dir, whole.folder, latent=whole.encoder, **KILLED) == whole.summaries
        assert said_stages(capsys.readouterr().out) == []
        assert snapshot(whole.folder / "iteration-1") == before

    def test_more_iterations(self, model_dir, whole, tmp_path, capsys):
        settings = KILLED | {"num_iterations": 1, "latent": Letters()}
        first = run(model_dir, tmp_path / "run", **settings)
        assert_equal_weights(weights(tmp_path / "run"), weights(whole.folder / "iteration-0/model"))
        capsys.readouterr()
        assert run(model_dir, tmp_path / "run", **settings | {"num_iterations": 2}) == whole.summaries
        assert first == whole.summaries[:1]
        assert {iteration for iteration, _ in said_stages(capsys.readouterr().out)} == {2}
        assert_equal_weights(weights(tmp_path / "run"), weights(whole.folder))
        card = (tmp_path / "run/README.md").read_text()
        assert "`2 of 2`" in card
        # Fewer again would put an earlier policy in the place of the last
        with pytest.raises(
            ValueError, match=r"`num_iterations=1`, but .* holds the policy after more .*iteration-0/model"
        ):
            run(model_dir, tmp_path / "run", **settings)
        assert_equal_weights(weights(tmp_path / "run"), weights(whole.folder))

    @pytest.mark.parametrize("save_strategy", ["no", "steps"])
    def test_interrupted_training_without_and_with_checkpoints(
        self, model_dir, tmp_path, monkeypatch, trained, save_strategy, capsys
    ):
        """With an adapter, in the second iteration; without checkpoints its training begins anew."""
        settings = {"peft_config": lora(target_modules=["q_proj", "k_proj", "v_proj"]), "save_strategy": save_strategy}
        run(model_dir, tmp_path / "whole", **settings)
        step, steps = SPINTrainer.training_step, []

        def interrupted(self, *args, **kwargs):
            steps.append(self.state.global_step)
            if len(steps) == 6:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        monkeypatch.setattr(SPINTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(model_dir, tmp_path / "run", **settings)
        assert "Interrupted. What is finished is kept; to go on, run the same again." in capsys.readouterr().err
        run(model_dir, tmp_path / "run", **settings)
        assert steps == [0, 1, 2, 0, 1, 2, *([2] if save_strategy == "steps" else [0, 1, 2])]
        name = "adapter_model.safetensors"
        assert_equal_weights(weights(tmp_path / "run", name), weights(tmp_path / "whole", name))

    def test_what_is_recorded_is_the_same_in_each_process(self, model_dir, tmp_path, trained):
        """Sets, which PEFT makes of lists, have another order in each."""
        names = ["v_proj", "q_proj", "o_proj", "k_proj"]
        run(model_dir, tmp_path / "run", num_iterations=1, max_steps=1, peft_config=lora(target_modules=names))
        recorded = json.loads((tmp_path / "run/self_play.json").read_text())
        assert recorded["peft_config"]["target_modules"] == sorted(names)
        assert "{" not in json.dumps(recorded["peft_config"]["exclude_modules"])


class TestProcesses:
    """Their number may change between trainings, not within one."""

    def interrupted(self, model_dir, folder, monkeypatch):
        """A training that was stopped behind its first checkpoint, as if it had been one of two processes."""
        step = SPINTrainer.training_step

        def second_is_interrupted(self, *args, **kwargs):
            if self.state.global_step == 1:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(SPINTrainer, "training_step", second_is_interrupted)
            run(model_dir, folder, num_iterations=1, save_strategy="steps")
        checkpoint = folder / "iteration-0/model/checkpoint-1"
        (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
        shutil.copy(checkpoint / "rng_state_0.pth", checkpoint / "rng_state_1.pth")
        return checkpoint

    def test_another_number_is_refused(self, model_dir, tmp_path, monkeypatch):
        checkpoint = self.interrupted(model_dir, tmp_path / "run", monkeypatch)
        settings = {"num_iterations": 1, "save_strategy": "steps"}
        message = (
            r"checkpoint-1` is of a training in 2 processes, now there is 1: .*Launch 2 again \(`--num_processes 2`\)"
        )
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=message):
            patch.setattr("trl.trainer.dpo_trainer.create_model_from_path", None)
            run(model_dir, tmp_path / "run", **settings)
        shutil.rmtree(checkpoint)
        assert run(model_dir, tmp_path / "run", **settings)


class TestStarts:
    def test_a_config_of_peft_can_be_used_again(self, model_dir, tmp_path):
        """PEFT writes into the one that it is given."""
        config = lora()
        before = config.to_dict()
        for _ in range(2):
            run(model_dir, tmp_path / "run", num_iterations=1, max_steps=1, peft_config=config)
        assert config.to_dict() == before

    def test_interrupted_in_the_first_shard(self, model_dir, tmp_path, monkeypatch):
        """What has given nothing yet does not bind."""

        def interrupt(*args, **kwargs):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(generation._ShardWriter, "write", interrupt)
            run(model_dir, tmp_path / "run")
        assert (tmp_path / "run/iteration-0/completions/manifest.json").is_file()
        assert run(model_dir, tmp_path / "run", num_iterations=1, max_new_tokens=9)
        assert json.loads((tmp_path / "run/self_play.json").read_text())["max_new_tokens"] == 9

    def test_scratch_files(self, model_dir, tmp_path):
        """Of a kill while the first file is written, and of later ones."""
        folder = tmp_path / "run"
        folder.mkdir()
        end = f"json.{socket.gethostname()}.999999999.tmp"
        (folder / f".self_play.{end}").write_text("{")
        (folder / "iteration-0").mkdir()
        shutil.move(folder / "iteration-0", tmp_path / "aside")
        assert run(model_dir, folder, num_iterations=1, max_steps=1)
        (folder / f"iteration-0/.stages.{end}").write_text("{")
        stages = stages_of(folder, 0)
        del stages["train"]
        (folder / "iteration-0/stages.json").write_text(json.dumps(stages))
        run(model_dir, folder, num_iterations=1, max_steps=1)
        assert not [*folder.glob(".*.tmp"), *folder.glob("iteration-0/.*.tmp")]

    def test_seconds_of_all_parts(self, model_dir, tmp_path, monkeypatch):
        step = SPINTrainer.training_step

        def slow(self, *args, **kwargs):
            time.sleep(0.5)
            if (self.state.global_step, len(calls)) == (1, 1):
                raise KeyboardInterrupt
            calls.append(1)
            return step(self, *args, **kwargs)

        calls = []
        monkeypatch.setattr(SPINTrainer, "training_step", slow)
        with pytest.raises(KeyboardInterrupt):
            run(model_dir, tmp_path / "run", num_iterations=1, max_steps=2, save_strategy="steps")
        begun = stages_of(tmp_path / "run", 0)["train, begun"]["seconds"]
        assert begun >= 1
        calls.append(1)
        run(model_dir, tmp_path / "run", num_iterations=1, max_steps=2, save_strategy="steps")
        stages = stages_of(tmp_path / "run", 0)
        assert list(stages) == ["generate", "pair", "train"]
        assert stages["train"]["seconds"] >= begun + 0.5

    def test_home_folders(self, model_dir, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(Path(model_dir).parent))
        assert run("~/policy", tmp_path / "run", num_iterations=1, max_steps=1)
        assert SelfPlayConfig(initial_adapter="~/a").initial_adapter == str(Path(model_dir).parent / "a")
        assert LatentConfig(sentence_encoder="~/e").sentence_encoder == str(Path(model_dir).parent / "e")


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- changed settings


class TestChanged:
    @pytest.fixture(scope="class")
    def begun(self, model_dir, tmp_path_factory):
        """A run whose first iteration is finished."""
        folder = tmp_path_factory.mktemp("begun") / "run"
        run(model_dir, folder, LDAlignConfig, latent=Letters(), num_iterations=1)
        return folder

    @pytest.mark.parametrize(
        ("changed", "difference"),
        [
            ({"learning_rate": 1e-3}, "learning_rate=0.01 (now 0.001)"),
            ({"beta": 0.2}, "beta=0.1 (now 0.2)"),
            ({"loss_type": "hinge"}, "loss_type='sigmoid' (now 'hinge')"),
            ({"max_steps": 4}, "max_steps=3 (now 4)"),
            ({"seed": 1}, "seed=42 (now 1)"),
            ({"max_new_tokens": 9}, "max_new_tokens=8 (now 9)"),
            ({"temperature": 0.5}, "temperature=1.0 (now 0.5)"),
            ({"keep_previous_pairs": 1}, "keep_previous_pairs=0 (now 1)"),
            ({"beta_schedule": [0.2]}, "beta_schedule=None (now [0.2])"),
            ({"weight_normalization": "max"}, "weight_normalization=None (now 'max')"),
            (
                {"latent": Letters(2.0)},
                "latent={'kind': 'Letters', 'scale': 1.0, 'distance': 'l2'} (now {'kind': 'Letters', 'scale': 2.0,",
            ),
            (
                {"latent": LatentConfig(policy_hidden_state=True)},
                "latent={'kind': 'Letters', 'scale': 1.0, 'distance': 'l2'} (now {'guide'",
            ),
            ({"peft_config": lora()}, "peft_config=None (now {"),
            ({"data": DATA.select([1, 0, *range(2, 8)])}, "dataset_digest='"),
            ({"data": DATA.select(range(7))}, "rows=8 (now 7), dataset_digest='"),
            ({"max_rows": 7}, "max_rows=None (now 7), rows=8 (now 7)"),
            ({"method": SPINConfig}, "method='ld-align' (now 'spin')"),
            ({"eval_dataset": DATA.select([0]), "eval_strategy": "steps"}, "eval_dataset_digest=None (now '"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_refused(self, changed, difference, begun, model_dir, no_loading):
        settings = {"method": LDAlignConfig, "latent": Letters(), "num_iterations": 2} | changed
        if settings["method"] is SPINConfig:
            del settings["latent"]
        with pytest.raises(ValueError, match="holds a run that was made with .*Choose another `output_dir`") as caught:
            run(model_dir, begun, **settings)
        assert difference in str(caught.value)
        assert str(caught.value).count("(now") <= (20 if settings["method"] is SPINConfig else 3)

    def test_another_tokenizer_or_model(self, begun, model_dir, tmp_path, no_loading):
        other = AutoTokenizer.from_pretrained(model_dir)
        other.chat_template = "{{ messages }}"
        settings = {"method": LDAlignConfig, "latent": Letters()}
        with pytest.raises(ValueError, match="tokenizer='.*' \\(now '"):
            run(model_dir, begun, processing_class=other, **settings)
        shutil.copytree(model_dir, tmp_path / "other")
        with pytest.raises(ValueError, match=r"model='.*policy' \(now '.*other'\)"):
            run(str(tmp_path / "other"), begun, **settings)

    def test_what_does_not_change_the_result_may_change(self, model_dir, begun, tmp_path, capsys):
        shutil.copytree(begun, tmp_path / "run")
        capsys.readouterr()
        run(
            model_dir, tmp_path / "run", LDAlignConfig, latent=Letters(), logging_steps=2, save_steps=2,
            dataloader_pin_memory=False, run_name="other", save_total_limit=1,
        )  # fmt: skip
        assert {iteration for iteration, _ in said_stages(capsys.readouterr().out)} == {2}

    def test_schedules_of_iterations_to_come(self, model_dir, tmp_path, trained):
        """They may be longer than the run, and change with it; those of what is trained may not."""
        settings = {"max_steps": 1, "beta": 0.3}
        run(model_dir, tmp_path / "run", num_iterations=1, beta_schedule=[0.3, 5.0], **settings)
        run(model_dir, tmp_path / "run", num_iterations=2, beta_schedule=[0.3, 2.0, 7.0], **settings)
        assert [seen.args.beta for seen in trained] == [0.3, 2.0]
        for schedule in ([0.3, 5.0], [0.2, 2.0], None):
            with pytest.raises(ValueError, match=r"made with beta_schedule=\[0.3, 2.0, 7.0\] \(now "):
                run(model_dir, tmp_path / "run", num_iterations=3, beta_schedule=schedule, **settings)

    def test_settings_that_never_worked_do_not_bind(self, model_dir, tmp_path):
        with pytest.raises(ValueError, match="leaves no room for a prompt in the model's context"):
            run(model_dir, tmp_path / "run", max_new_tokens=10**6)
        assert run(model_dir, tmp_path / "run", num_iterations=1)

    def test_folders_of_something_else(self, model_dir, tmp_path, no_loading):
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(ValueError, match="is not empty, and holds no run of self-play"):
            run(model_dir, tmp_path)


# ---------------------------------------------------------------- answers that give no pairs


class TestNothingToLearn:
    @pytest.mark.parametrize(("text", "reason"), [("", "8 empty"), (None, "8 identical")])
    def test_in_the_first_iteration(self, model_dir, tmp_path, tokenizer, monkeypatch, text, reason):
        answering(monkeypatch, tokenizer, lambda _, row: row["completion"] if text is None else text)
        with pytest.raises(ValueError, match=f"No pair is left of 8 generated answers: {reason}"):
            run(model_dir, tmp_path / "run")

    @pytest.mark.parametrize("method", [SPINConfig, LDAlignConfig])
    def test_later(self, model_dir, tmp_path, tokenizer, monkeypatch, method, capsys):
        """The run ends with the policy that has met the data."""
        answering(monkeypatch, tokenizer, lambda iteration, row: row["completion"] if iteration else " No.")
        settings = {"latent": Letters()} if method is LDAlignConfig else {}
        for _ in range(2):  # also when it is called again
            summaries = run(model_dir, tmp_path / "run", method, num_iterations=4, **settings)
            said = capsys.readouterr().out
            assert len(summaries) == 1
            assert (
                "Iteration 2: nothing is left to train. No pair is left of 8 generated answers: 8 identical." in said
            )
            assert "The policy after 1 iteration" in said
            assert_equal_weights(weights(tmp_path / "run"), weights(tmp_path / "run/iteration-0/model"))

    def test_dropped_answers_are_counted(self, model_dir, tmp_path, tokenizer, monkeypatch, capsys):
        answers = dict(zip(DATA["prompt"], ["", " a", None, " b", " ", None, " c", " d"], strict=True))

        def answer(_, row):
            return row["completion"] if answers[row["prompt"]] is None else answers[row["prompt"]]

        answering(monkeypatch, tokenizer, answer)
        (summary,) = run(model_dir, tmp_path / "run", num_iterations=1)
        assert summary["dropped"] == {"empty": 2, "identical": 2}
        assert (summary["answers"], summary["new_pairs"], summary["pairs"]) == (8, 4, 4)
        assert (
            "4 pairs; dropped: 2 empty, 2 identical; 0 of 8 answers were cut at 8 tokens." in capsys.readouterr().out
        )

    def test_long_prompts_are_skipped(self, model_dir, tmp_path, trained):
        rows = [*DATA.to_list()[:4], {"prompt": "many words " * 200, "completion": " yes"}, *DATA.to_list()[4:]]
        with pytest.warns(UserWarning, match="Skipped 1 of 9 prompts: these prompts are longer than 504 tokens"):
            (summary,) = run(model_dir, tmp_path / "run", data=Dataset.from_list(rows), num_iterations=1)
        assert summary["answers"] == 8
        assert stages_of(tmp_path / "run", 0)["generate"]["prompts"] == 9
        assert trained[0].rows["prompt_index"][:] == [0, 1, 2, 3, 5, 6, 7, 8]

    def test_only_long_prompts(self, model_dir, tmp_path):
        with pytest.raises(ValueError, match="All 8 prompts are longer than 2 tokens"):
            run(model_dir, tmp_path / "run", max_prompt_length=2)


# ---------------------------------------------------------------- bad input


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"num_iterations": 0}, ValueError, "`num_iterations=0` is out of range"),
            ({"num_iterations": 1.5}, TypeError, "`num_iterations` must be an integer"),
            ({"keep_previous_pairs": -1}, ValueError, "`keep_previous_pairs=-1` is out of range"),
            ({"max_rows": 0}, ValueError, "`max_rows=0` is out of range"),
            ({"beta_schedule": []}, ValueError, r"`beta_schedule=\[\]`: expected a value for each iteration, at least one"),
            ({"beta_schedule": [0.1, 0.0]}, ValueError, "`beta_schedule=0.0` is out of range"),
            ({"beta_schedule": [math.nan]}, ValueError, "`beta_schedule=nan` is out of range"),
            ({"learning_rate_schedule": [-1e-3]}, ValueError, "`learning_rate_schedule=-0.001` is out of range"),
            ({"max_new_tokens": 0}, ValueError, "`max_new_tokens=0` is out of range"),
            ({"max_prompt_length": 0}, ValueError, "`max_prompt_length=0` is out of range"),
            ({"temperature": -1.0}, ValueError, "`temperature=-1.0` is out of range"),
            ({"top_p": 0.0}, ValueError, "`top_p=0.0` is out of range"),
            ({"top_p": 1.5}, ValueError, "`top_p=1.5` is out of range"),
            ({"generation_dtype": "int8"}, ValueError, "`generation_dtype='int8'` is not known"),
            ({"generation_batch_tokens": 0}, ValueError, "batch_tokens=0` is out of range"),
            ({"shard_size": 0}, ValueError, "`shard_size=0` is out of range"),
        ],
        ids=str,
    )  # fmt: skip
    def test_self_play_config(self, options, error, message):
        with pytest.raises(error, match=message):
            SelfPlayConfig(**options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"distance": "l1"}, "`distance='l1'` is not known. Choose one of: 'l2', 'sq_l2', 'cosine'"),
            ({"guide": "a", "sentence_encoder": "b"}, "`guide` and `sentence_encoder` exclude each other"),
            ({"guide": "a", "policy_hidden_state": True}, "`guide` and `policy_hidden_state` exclude each other"),
            ({"sentence_encoder": "b", "policy_hidden_state": True}, "`sentence_encoder` and `policy_hidden_state` exclude"),
            ({"guide": "a", "guide_encoder": "b"}, "`guide_encoder` has no effect with `guide`: no guide is trained"),
            ({"sentence_encoder": "a", "guide_decoder": "b"}, "`guide_decoder` has no effect with `sentence_encoder`"),
            ({"policy_hidden_state": True, "guide_options": {"a": 1}}, "`guide_options` has no effect with `policy_hidden"),
            ({"guide_options": "{"}, "`guide_options='{'` is no JSON"),
            ({"guide_options": "[1]"}, r"`guide_options=\[1\]`: expected a dictionary of options"),
        ],
        ids=str,
    )  # fmt: skip
    def test_latent_config(self, options, message):
        with pytest.raises(ValueError, match=message):
            LatentConfig(**options)

    def test_json_options(self):
        assert LatentConfig(guide_options='{"latent_dim": 8}').guide_options == {"latent_dim": 8}

    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"method": DavIRDPOConfig}, TypeError, "`args` is a DavIRDPOConfig; expected a `SPINConfig`, or"),
            ({"latent": Letters()}, ValueError, "`latent` has no effect in SPIN, whose pairs have no weights"),
            ({"latent": LatentConfig()}, ValueError, "`latent` has no effect in SPIN"),
            ({"peft_config": lora(), "initial_adapter": "x"}, ValueError, "`initial_adapter` is trained on, so that a new"),
            (
                {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}, ValueError,
                r"A quantized model is trained with an adapter: pass a `peft_config` \(`--use_peft`\)",
            ),
            ({"resume_from_checkpoint": "x"}, ValueError, "a run goes on by itself from where it was. Drop the option"),
            ({"save_only_model": True}, ValueError, "`save_only_model=True`: a run that was interrupted could not go on"),
            ({"sync_ref_model": True}, ValueError, "`sync_ref_model=True`: the reference of an iteration is its start"),
            ({"peft_config": lora(target_modules=["lm_head"])}, ValueError, "`target_modules` contains 'lm_head'"),
            (
                {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)}, ValueError,
                "Self-play does not support prompt-learning PEFT",
            ),
            ({"eval_dataset": DATA}, ValueError, "`eval_strategy='no'` and an `eval_dataset`: give both, or none"),
            ({"eval_strategy": "steps"}, ValueError, "`eval_strategy='steps'` and no `eval_dataset`: give both, or none"),
            ({"data": DATA.to_iterable_dataset()}, TypeError, "`train_dataset` is a IterableDataset; expected a `Dataset`"),
            ({"data": DATA.select([])}, ValueError, "`train_dataset` is empty"),
            ({"data": tiny.text_data()}, ValueError, r"`train_dataset` has the columns \['text'\]: self-play needs prompts"),
            ({"data": DATA.remove_columns("completion")}, ValueError, "`train_dataset` has a column 'prompt' but no"),
            (
                {"data": Dataset.from_list([{"messages": [{"role": "user", "content": "a"}]}])}, ValueError,
                "`train_dataset`, row 0: the conversation has no message of the assistant",
            ),
            (
                {"eval_dataset": tiny.text_data(), "eval_strategy": "steps"}, ValueError,
                r"`eval_dataset` has the columns \['text'\]: self-play needs prompts",
            ),
            (
                {"eval_dataset": [1], "eval_strategy": "steps"}, TypeError,
                "`eval_dataset` is a list; expected a `Dataset`",
            ),
        ],
        ids=lambda value: str(value)[:50],
    )  # fmt: skip
    def test_refused_before_a_model_loads(self, settings, error, message, model_dir, tmp_path, no_loading):
        with pytest.raises(error, match=message):
            run(model_dir, tmp_path / "run", **settings)
        assert not (tmp_path / "run").exists()

    def test_models(self, model_dir, tmp_path, tokenizer, no_loading):
        with pytest.raises(
            TypeError, match="`model` is a LlamaForCausalLM; expected a Hub id or a folder.*`save_pretrained`"
        ):
            run(tiny.model("llama", tokenizer), tmp_path / "run")
        with pytest.raises(ValueError, match="has no `config.json`"):
            run(str(tmp_path), tmp_path / "run")
        with pytest.raises(ValueError, match="has no `adapter_config.json`: it holds no PEFT adapter"):
            run(model_dir, tmp_path / "run", initial_adapter=model_dir)
        shutil.copytree(model_dir, tmp_path / "bare")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / "bare" / name).unlink()
        with pytest.raises(ValueError, match="holds no tokenizer"):
            run(str(tmp_path / "bare"), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_bitsandbytes_is_missing(self, model_dir, tmp_path, monkeypatch, no_loading):
        monkeypatch.setattr("trl_ift.checks.find_spec", lambda name: None)
        config = BitsAndBytesConfig(load_in_4bit=True)
        with pytest.raises(ImportError, match="bitsandbytes is not installed"):
            run(model_dir, tmp_path / "run", peft_config=lora(), quantization_config=config)

    def test_zero_3(self, model_dir, tmp_path, monkeypatch, no_loading):
        monkeypatch.setattr(SPINConfig, "deepspeed_plugin", SimpleNamespace(zero_stage=3), raising=False)
        monkeypatch.setattr(SPINConfig, "__setattr__", settable_but("deepspeed_plugin"))
        with pytest.raises(ValueError, match="do not work with DeepSpeed ZeRO-3.*run the stages one by one"):
            run(model_dir, tmp_path / "run")

    def test_distance_without_an_encoder(self, model_dir, tmp_path, monkeypatch, no_loading):
        monkeypatch.setattr(self_play_killed, "self_play", partial(module.self_play, distance="l2"))
        with pytest.raises(
            ValueError, match="`distance='l2'` is for an `Encoder` as `latent`, which is a LatentConfig"
        ):
            run(model_dir, tmp_path / "run", LDAlignConfig, latent=LatentConfig())

    def test_encoder_of_another_tokenizer(self, model_dir, tmp_path, tokenizer):
        """What an encoder says of the policy's tokenizer is asked before anything is generated."""
        other = AutoTokenizer.from_pretrained(model_dir)
        other.chat_template = "{{ messages }}"
        encoder = PolicyHiddenState(tiny.model("llama", tokenizer), processing_class=other, max_length=64)
        with pytest.raises(ValueError, match="The encoder's tokenizer .* is not that of the policy"):
            run(model_dir, tmp_path / "run", LDAlignConfig, latent=encoder)
        assert not (tmp_path / "run").exists()


def settable_but(name):
    def setattr_(self, key, value):
        if key != name:
            object.__setattr__(self, key, value)

    return setattr_


# ---------------------------------------------------------------- every option acts


class Guides:
    """Stand-ins for the guiding model: they note what they are asked for, and are counts of letters."""

    def __init__(self, monkeypatch):
        self.calls = calls = []

        class Arguments:
            def __init__(self, output_dir, latent_dim=3, **inherited):
                known = {
                    "use_cpu", "bf16", "fp16", "seed", "report_to", "per_device_train_batch_size", "disable_tqdm",
                    "gradient_accumulation_steps", "logging_steps", "save_strategy", "save_steps", "save_total_limit",
                    "ddp_timeout",
                }  # fmt: skip
                if unknown := set(inherited) - known:
                    raise TypeError(f"unexpected keyword argument {sorted(unknown)[0]!r}")
                self.output_dir, self.latent_dim, self.inherited = output_dir, latent_dim, inherited

        def train_guide(encoder, decoder, pairs, args, processing_class=None, model_init_kwargs=None):
            calls.append(SimpleNamespace(
                encoder=encoder, decoder=decoder, pairs=pairs, args=args, processing_class=processing_class,
                options=model_init_kwargs,
            ))  # fmt: skip
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            scale = args.latent_dim + len(encoder) + 3 * len(decoder)
            check = {"gap": 1.0, "collapsed": args.latent_dim == 1}
            Path(args.output_dir, "guide.json").write_text(json.dumps({"scale": scale, "check": check}))

        class LatentGuide:
            @staticmethod
            def from_pretrained(folder, **kwargs):
                calls.append(SimpleNamespace(folder=str(folder)))
                scale = json.loads((Path(folder) / "guide.json").read_text())["scale"]
                return Warped(scale)

        training = SimpleNamespace(
            GuideTrainingArguments=Arguments, train_guide=train_guide, check_sources=lambda *args: None
        )
        monkeypatch.setitem(sys.modules, "trl_ift.latent.training", training)
        monkeypatch.setitem(sys.modules, "trl_ift.latent.guide", SimpleNamespace(LatentGuide=LatentGuide))


class Warped(Letters):
    """Codes whose ratios depend on `scale` too."""

    def encode(self, samples):
        codes = super().encode(samples)
        return codes + torch.tensor([[self.scale % 7, 0.0, 0.0]]) * codes[:, 1:2]


@pytest.fixture
def guides(monkeypatch):
    return Guides(monkeypatch)


def outcome(model_dir, folder, **settings):
    """What a run consists of: its pairs, the weights of its pairs, its losses; or its error."""
    try:
        summaries = run(model_dir, folder, **{"num_iterations": 1, "max_steps": 1} | settings)
    except ValueError as error:
        return str(error)
    name = "weighted" if settings.get("method") is LDAlignConfig else "pairs"
    rows = [pairs_of(folder, i, name).remove_columns("policy").to_list() for i in range(len(summaries))]
    return rows, [(s["pairs"], s["loss"]) for s in summaries]


SELF_PLAY_OPTIONS = {
    "num_iterations": ({}, 2),
    "keep_previous_pairs": ({"num_iterations": 2}, 0),
    "beta_schedule": ({"max_steps": 2}, [0.7]),
    "learning_rate_schedule": ({"max_steps": 2}, [1e-3]),
    "initial_adapter": ({}, "adapter"),
    "max_rows": ({}, 5),
    "max_new_tokens": ({}, 5),
    "max_prompt_length": ({}, 10),
    "temperature": ({}, 0.3),
    "top_p": ({}, 0.3),
    "drop_truncated": ({"max_new_tokens": 24}, True),
    "generation_dtype": ({"max_new_tokens": 40}, "bfloat16"),
    "generation_batch_tokens": ({}, 60),
    "shard_size": ({}, 3),
}
LATENT_OPTIONS = {
    "guide": "guide",
    "sentence_encoder": "encoder",
    "policy_hidden_state": True,
    "guide_encoder": "small-encoder",
    "guide_decoder": "small",
    "guide_options": {"latent_dim": 5},
    "distance": "cosine",
}


class TestEveryOptionActs:
    @pytest.fixture(scope="class")
    def plain(self, model_dir, tmp_path_factory):
        """Outcomes of runs with default options, each made once."""
        made = {}

        def get(**settings):
            key = repr(settings)
            if key not in made:
                made[key] = outcome(model_dir, tmp_path_factory.mktemp("plain") / "run", **settings)
            return made[key]

        return get

    def test_all_are_here(self):
        assert list(SELF_PLAY_OPTIONS) == [field.name for field in fields(SelfPlayConfig)]
        assert list(LATENT_OPTIONS) == [field.name for field in fields(LatentConfig)]
        for config in (SelfPlayConfig, LatentConfig):
            for field in fields(config):
                assert field.metadata["help"]
                assert f"{field.name} (`" in config.__doc__

    @pytest.mark.parametrize("name", SELF_PLAY_OPTIONS)
    def test_self_play_config(self, name, plain, model_dir, tmp_path):
        common, value = SELF_PLAY_OPTIONS[name]
        if name == "initial_adapter":
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), lora(init_lora_weights=False))
            model.save_pretrained(tmp_path / "adapter")
            value = str(tmp_path / "adapter")
        changed = outcome(model_dir, tmp_path / "run", **common | {name: value})
        assert isinstance(changed, tuple)
        assert changed != plain(**common)

    @pytest.mark.parametrize("name", LATENT_OPTIONS)
    def test_latent_config(self, name, plain, guides, model_dir, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        value = LATENT_OPTIONS[name]
        Path("guide").mkdir()
        Path("guide/guide.json").write_text('{"scale": 2}')
        if name == "sentence_encoder":
            shutil.copytree(model_dir, "encoder")
        settings = {"method": LDAlignConfig, "max_steps": 2}
        expected = plain(latent=LatentConfig(), **settings)
        changed = outcome(model_dir, tmp_path / "run", latent=LatentConfig(**{name: value}), **settings)
        assert isinstance(changed, tuple), changed
        assert [row["latent_distance"] for row in changed[0][0]] != [row["latent_distance"] for row in expected[0][0]]
        # That they are trained with is another test; after two steps the losses may agree to the last digit
        assert [row["weight"] for row in changed[0][0]] != [row["weight"] for row in expected[0][0]]


class TestLatentSources:
    def test_a_guide_is_trained_once(self, guides, model_dir, tmp_path, trained, capsys):
        """On the pairs of the first iteration; it gives the codes of all of them."""
        settings = {"latent": LatentConfig(guide_options={"latent_dim": 5}), "per_device_train_batch_size": 2}
        run(model_dir, tmp_path / "run", LDAlignConfig, **settings)
        said = capsys.readouterr().out
        stages = ["generate", "pair", "guide", "weigh", "train", "generate", "pair", "weigh", "train"]
        assert [name for _, name in said_stages(said)] == stages
        assert "Iteration 1 of 2, stage 3 of 5: guide" in said
        assert "Iteration 2 of 2, stage 3 of 4: weigh" in said
        (call,) = [call for call in guides.calls if hasattr(call, "encoder")]
        assert (call.encoder, call.decoder) == (model_dir, model_dir)
        assert call.pairs[:] == pairs_of(tmp_path / "run", 0).select_columns(["prompt", "chosen", "rejected"])[:]
        assert (call.args.output_dir, call.args.latent_dim) == (str(tmp_path / "run/guide"), 5)
        inherited = call.args.inherited
        assert (inherited["use_cpu"], inherited["seed"], inherited["per_device_train_batch_size"]) == (True, 42, 2)
        assert call.processing_class is not None
        loaded = [call.folder for call in guides.calls if hasattr(call, "folder")]
        assert loaded == [str(tmp_path / "run/guide")] * 2
        assert stages_of(tmp_path / "run", 0)["guide"]["check"] == {"gap": 1.0, "collapsed": False}

    def test_models_of_the_guide(self, guides, model_dir, tmp_path):
        latent = LatentConfig(guide_encoder="e", guide_decoder="d")
        run(model_dir, tmp_path / "run", LDAlignConfig, num_iterations=1, latent=latent)
        call = next(call for call in guides.calls if hasattr(call, "encoder"))
        assert (call.encoder, call.decoder, call.processing_class) == ("e", "d", None)

    def test_a_guide_that_is_there(self, guides, model_dir, tmp_path, capsys):
        """In all iterations, and nothing is trained."""
        (tmp_path / "guide").mkdir()
        (tmp_path / "guide/guide.json").write_text('{"scale": 2}')
        run(model_dir, tmp_path / "run", LDAlignConfig, latent=LatentConfig(guide=str(tmp_path / "guide")))
        assert "guide" not in [name for _, name in said_stages(capsys.readouterr().out)]
        assert {call.folder for call in guides.calls} == {str(tmp_path / "guide")}
        assert not (tmp_path / "run/guide").exists()

    def test_a_guide_that_is_not_there(self, guides, model_dir, tmp_path, no_loading):
        with pytest.raises(OSError, match="nowhere"):
            run(model_dir, tmp_path / "run", LDAlignConfig, latent=LatentConfig(guide="nowhere"))
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"latent_dims": 5}, "`guide_options={'latent_dims': 5}`: unexpected keyword argument 'latent_dims'"),
            ({"output_dir": "x"}, "the guide is written into the folder of the run. Drop `output_dir`"),
        ],
    )
    def test_wrong_options_of_a_guide(self, guides, options, message, model_dir, tmp_path, no_loading):
        with pytest.raises(ValueError, match=re.escape(message)):
            run(model_dir, tmp_path / "run", LDAlignConfig, latent=LatentConfig(guide_options=options))
        assert not (tmp_path / "run").exists()

    def test_it_is_not_held_while_others_run(self, guides, model_dir, tmp_path, monkeypatch):
        """Neither in the generation nor where the pairs are weighed already."""
        held = []

        def spy(function):
            def spied(*args, **kwargs):
                gc.collect()
                held.append(any(isinstance(thing, Warped) for thing in gc.get_objects()))
                return function(*args, **kwargs)

            return spied

        gc.collect()
        for name in ("generate_completions", "train_and_save"):
            monkeypatch.setattr(module, name, spy(getattr(module, name)))
        (tmp_path / "guide").mkdir()
        (tmp_path / "guide/guide.json").write_text('{"scale": 2}')
        settings = {"latent": LatentConfig(guide=str(tmp_path / "guide")), "num_iterations": 1}
        run(model_dir, tmp_path / "run", LDAlignConfig, **settings)
        assert held == [False, False]

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, {"trust_remote_code": False, "revision": "v1", "attn_implementation": "eager"}),
            ({"guide_encoder": "e", "guide_decoder": "d"}, {"trust_remote_code": False}),
        ],
    )
    def test_how_its_models_are_loaded(self, guides, options, expected, model_dir, tmp_path):
        """As the policy, if they are the policy."""
        kwargs = {"revision": "v1", "attn_implementation": "eager", "trust_remote_code": False, "dtype": "float32"}
        run(
            model_dir, tmp_path / "run", LDAlignConfig, latent=LatentConfig(**options), num_iterations=1,
            model_init_kwargs=kwargs,
        )  # fmt: skip
        assert next(call for call in guides.calls if hasattr(call, "encoder")).options == expected

    def test_revisions_of_one_part(self, guides, model_dir, tmp_path, no_loading):
        settings = {"model_init_kwargs": {"revision": "v1"}, "latent": LatentConfig(guide_encoder="e")}
        with pytest.raises(ValueError, match="`revision='v1'` with `guide_encoder`: both parts of the guide"):
            run(model_dir, tmp_path / "run", LDAlignConfig, **settings)

    @pytest.mark.parametrize("save_strategy", ["steps", "best"])
    def test_its_checkpoints(self, guides, save_strategy, model_dir, tmp_path):
        run(
            model_dir, tmp_path / "run", LDAlignConfig, num_iterations=1, save_steps=2, save_total_limit=3,
            save_strategy=save_strategy, ddp_timeout=77, metric_for_best_model="loss",
        )  # fmt: skip
        inherited = next(call for call in guides.calls if hasattr(call, "encoder")).args.inherited
        assert [inherited[name] for name in ("save_steps", "save_total_limit", "ddp_timeout")] == [2, 3, 77]
        assert inherited["save_strategy"] == "steps"

    def test_a_collapsed_guide_is_replaced(self, guides, model_dir, tmp_path, monkeypatch, capsys):
        """Until something is trained with its weights; the answers are used again."""

        def interrupt(*args, **kwargs):
            raise KeyboardInterrupt

        def start(latent_dim, **options):
            run(
                model_dir, tmp_path / "run", LDAlignConfig, num_iterations=1,
                latent=LatentConfig(guide_options={"latent_dim": latent_dim}), **options,
            )  # fmt: skip
            return [name for _, name in said_stages(capsys.readouterr().out)]

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, "train_and_save", interrupt)
            start(1)
        assert "The guide's decoder hardly uses the codes. To have another one, stop here" in capsys.readouterr().out
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(sys.modules["trl_ift.latent.training"], "train_guide", interrupt)
            start(2)
        assert not (tmp_path / "run/guide").exists()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # one that is not finished
            patch.setattr(module, "train_and_save", interrupt)
            start(3, weight_clip=[0.1, 2.0])
        capsys.readouterr()
        with pytest.raises(ValueError, match=r"made with latent=.*'latent_dim': 3.* \(now .*'latent_dim': 1"):
            start(1, weight_clip=[0.1, 2.0])
        assert start(3, weight_clip=[0.1, 2.0]) == ["train"]
        assert json.loads((tmp_path / "run/self_play.json").read_text())["weight_clip"] == [0.1, 2.0]
        pairs = pairs_of(tmp_path / "run", 0, "weighted")
        scale = 3 + 4 * len(model_dir)
        codes = [
            Warped(scale).encode([Sample(r["prompt"], r[n]) for r in pairs]).numpy() for n in ("chosen", "rejected")
        ]
        np.testing.assert_allclose(pairs["latent_distance"], latent_distance(*codes), rtol=1e-6)

    @pytest.mark.parametrize("source", ["nowhere", "empty"])
    def test_a_sentence_encoder_that_is_none(self, source, model_dir, tmp_path, no_loading):
        (tmp_path / "empty").mkdir()
        latent = LatentConfig(sentence_encoder=str(tmp_path / source))
        with pytest.raises((OSError, ValueError), match=source):
            run(model_dir, tmp_path / "run", LDAlignConfig, latent=latent)
        assert not (tmp_path / "run").exists()

    def test_models_of_a_guide_are_checked(self, model_dir, tmp_path, no_loading):
        """Before anything is generated for it."""
        message = "`max_length=512` and `memory_tokens=8` do not fit the decoder, whose context has 512 tokens"
        with pytest.raises(ValueError, match=message):
            run(model_dir, tmp_path / "run", LDAlignConfig)
        assert not (tmp_path / "run").exists()

    def test_policies_of_a_short_context(self, tmp_path, tokenizer):
        model = lively(tokenizer)
        model.config.max_position_embeddings = 64
        model.save_pretrained(tmp_path / "short")
        tokenizer.save_pretrained(tmp_path / "short")
        settings = {"latent": LatentConfig(policy_hidden_state=True), "num_iterations": 1, "max_steps": 1}
        assert run(str(tmp_path / "short"), tmp_path / "run", LDAlignConfig, **settings)

    def test_policy_hidden_state(self, model_dir, tmp_path):
        """The codes of the initial model, in all iterations."""
        run(
            model_dir, tmp_path / "run", LDAlignConfig, latent=LatentConfig(policy_hidden_state=True, distance="sq_l2")
        )
        encoder = PolicyHiddenState(model_dir)
        for iteration in range(2):
            pairs = pairs_of(tmp_path / "run", iteration, "weighted")
            codes = [
                encoder.encode([Sample(row["prompt"], row[name]) for row in pairs]).numpy()
                for name in ("chosen", "rejected")
            ]
            expected = latent_distance(*codes, "sq_l2")
            np.testing.assert_allclose(pairs["latent_distance"], expected, rtol=1e-4)


# ---------------------------------------------------------------- the Hub


def test_pushed(model_dir, tmp_path, monkeypatch, capsys):
    """The repository is made before anything is loaded; the last policy alone is pushed, once, at the end."""
    calls = []

    class Hub:
        def __init__(self, token):
            assert token == "hf_token"

        def create_repo(self, name, **options):
            assert not list(tmp_path.glob("run/iteration-*"))
            calls.append((name, options))
            return SimpleNamespace(repo_id=f"user/{name}")

        def upload_folder(self, repo_id, folder_path, ignore_patterns, commit_message, revision):
            paths = [path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()]
            calls.append((repo_id, sorted(filter_repo_objects(paths, ignore_patterns=ignore_patterns))))

    monkeypatch.setattr(module, "HfApi", Hub)
    waits = []
    monkeypatch.setattr(module.PartialState, "wait_for_everyone", lambda self: waits.append(len(calls)))
    run(
        model_dir, tmp_path / "run", LDAlignConfig, latent=Letters(), push_to_hub=True, hub_token="hf_token",
        hub_private_repo=True, max_steps=1,
    )  # fmt: skip
    created, (repo_id, files) = calls
    assert max(waits) == 1  # nobody waits for the upload
    assert created == ("run", {"private": True, "exist_ok": True})
    assert repo_id == "user/run"
    published = {path.name for path in (tmp_path / "run").iterdir() if path.is_file()} - {"self_play.json"}
    assert set(files) == published >= {"README.md", "model.safetensors", "config.json", "tokenizer.json"}
    assert "Model pushed to https://huggingface.co/user/run." in capsys.readouterr().out
    assert "hf_token" not in (tmp_path / "run/self_play.json").read_text()
    assert 'model="user/run"' in (tmp_path / "run/README.md").read_text()


# ---------------------------------------------------------------- messages


class TestMessages:
    def test_iteration_stage_and_time_left(self, model_dir, tmp_path, capsys):
        run(model_dir, tmp_path / "run", num_iterations=1)
        first = capsys.readouterr().out
        for number, name in enumerate(("generate", "pair", "train"), start=1):
            assert f"Iteration 1 of 1, stage {number} of 3: {name}\n" in first
        assert f"The policy after 1 iteration is in {tmp_path / 'run'}" in first.replace("iterations", "iteration")
        path = tmp_path / "run/iteration-0/stages.json"
        stages = json.loads(path.read_text())
        assert all(stage["seconds"] >= 0 for stage in stages.values())
        for name, seconds in (("generate", 3000), ("pair", 60), ("train", 5400)):
            stages[name]["seconds"] = seconds
        path.write_text(json.dumps(stages))
        run(model_dir, tmp_path / "run", num_iterations=3)
        said = capsys.readouterr().out
        assert "Iteration 2 of 3, stage 1 of 3: generate (about 4 h 42 min left)" in said
        # What the second one took counts from then on
        assert "Iteration 2 of 3, stage 3 of 3: train (about 3 h 0 min left)" in said
        assert re.search(r"Iteration 3 of 3, stage 3 of 3: train \(about (a minute|1 min) left\)", said)

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [(0.2, "a minute"), (40, "1 min"), (59 * 60, "59 min"), (3600, "1 h 0 min"), (3e4, "8 h 20 min")],
    )
    def test_durations(self, seconds, text):
        assert module._duration(seconds) == text


# ---------------------------------------------------------------- the commands


@pytest.fixture
def command(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    DATA.to_json("data.jsonl")
    return [
        "--model_name_or_path", model_dir, "--dataset_name", "data.jsonl", "--output_dir", "run", "--max_steps", "2",
        "--num_iterations", "2", "--max_new_tokens", "8", "--learning_rate", "0.01", "--report_to", "none",
        "--dtype", "float32", "--use_cpu", "true", "--bf16", "false", "--disable_tqdm", "true", "--logging_steps", "1",
    ]  # fmt: skip


class TestCommands:
    def test_spin(self, command, capsys):
        assert script.run(["spin", *command]) == 0
        said = capsys.readouterr().out
        *_, head, first, second = said.strip().splitlines()
        assert head.split()[:4] == ["iteration", "pairs", "dropped", "cut"]
        assert [first.split()[0], second.split()[0]] == ["1", "2"]
        new = [stages_of("run", i)["pair"] for i in range(2)]
        assert first.split()[1:4] == [str(new[0]["pairs"]), str(8 - new[0]["pairs"]), f"{new[0]['truncated'] / 8:.0%}"]
        assert int(second.split()[1]) == new[0]["pairs"] + new[1]["pairs"]
        assert AutoModelForCausalLM.from_pretrained("run")
        # Again: nothing is left to do
        assert script.run(["spin", *command]) == 0
        assert said_stages(capsys.readouterr().out) == []

    def test_ld_align_by_a_file(self, command, model_dir, capsys):
        Path("options.yaml").write_text(
            yaml.safe_dump(
                {
                    "policy_hidden_state": True, "distance": "cosine", "weight_normalization": "max", "use_peft": True,
                    "lora_target_modules": "all-linear", "lora_r": 4, "keep_previous_pairs": 1,
                    "beta_schedule": [0.1, 0.5], "weight_clip": [0.1, 0.9],
                }
            )
        )  # fmt: skip
        assert script.run(["ld-align", *command, "--config", "options.yaml"]) == 0, capsys.readouterr().err
        pairs = pairs_of("run", 1, "weighted")
        expected = WeightNormalizer.fit(np.array(pairs["latent_distance"]), "max", (0.1, 0.9))
        np.testing.assert_allclose(pairs["weight"], expected(np.array(pairs["latent_distance"])))
        assert len(pairs) == sum(stages_of("run", i)["pair"]["pairs"] for i in range(2))
        assert AutoPeftModelForCausalLM.from_pretrained("run")
        settings = json.loads(Path("run/self_play.json").read_text())
        assert settings["latent"]["distance"] == "cosine"
        assert settings["beta_schedule"] == [0.1, 0.5]

    def test_errors(self, command, capsys, no_loading):
        for method, argv, message in (
            ("spin", ["--num_iterations", "0"], "`num_iterations=0` is out of range"),
            ("spin", ["--loss_type", "ipo"], "ipo"),
            ("ld-align", ["--distance", "l1"], "l1"),
            ("ld-align", ["--guide_options", "{"], "is no JSON"),
            ("spin", ["--dataset_name", "nowhere.jsonl"], "does not exist"),
            ("spin", ["--dataset_streaming", "true"], "`train_dataset` is a IterableDataset"),
            ("spin", ["--eval_strategy", "steps"], "needs one: name it with `--dataset_test_split`"),
            ("spin", ["--model_name_or_path", "."], "has no `config.json`"),
            ("spin", ["--resume_from_checkpoint", "true"], "goes on by itself"),
        ):
            try:
                code = script.run([method, *command, *argv])
            except SystemExit as stop:  # a choice that the parser knows of
                code = stop.code
            error = capsys.readouterr().err
            assert code in (1, 2)
            assert message in error
            assert f"trl-ift {method}: error: " in error
            assert "Traceback" not in error
            assert not Path("run").exists()
        without = command[2:]
        assert script.run(["spin", *without]) == 1
        assert "No model: name a Hub id or a local folder" in capsys.readouterr().err
        with pytest.raises(SystemExit) as stop:
            script.run(["spin", *command, "--distance", "l2"])  # an option of LD-Align
        assert stop.value.code == 2
        assert "unknown option --distance" in capsys.readouterr().err

    def test_ctrl_c(self, command, monkeypatch, capsys):
        def interrupt(*args, **kwargs):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(module, "train_and_save", interrupt)
            assert script.run(["spin", *command]) == 130
        output = capsys.readouterr()
        assert "What is finished is kept; to go on, run the same again." in output.err
        assert said_stages(output.out) == [(1, "generate"), (1, "pair"), (1, "train")]
        assert script.run(["spin", *command]) == 0
        assert said_stages(capsys.readouterr().out)[:1] == [(1, "train")]

    def test_failed_training(self, command, monkeypatch, capsys):
        def fail(*args, **kwargs):
            raise ValueError("a defect")

        monkeypatch.setattr(SPINTrainer, "training_step", fail)
        with pytest.raises(
            RuntimeError, match="The training of iteration 1 in run/iteration-0/model failed: a defect"
        ):
            script.run(["spin", *command])

    def test_help(self, capsys):
        for method, options in (
            ("spin", ["--num_iterations", "--beta_schedule", "--max_new_tokens", "--loss_type"]),
            ("ld-align", ["--policy_hidden_state", "--weight_clip", "--guide_options", "--keep_previous_pairs"]),
        ):
            with pytest.raises(SystemExit) as stop:
                main([method, "--help"])
            assert not stop.value.code
            text = capsys.readouterr().out
            assert all(option in text for option in options)
            text = " ".join(text.split()).replace("- ", "-")
            assert f"Confirmed by the paper{'' if method == 'ld-align' else ' and its code'}: " in text
            assert "Default: 4 for SPIN, 1 for LD-Align (our choice)." in text
            assert ("Latent distance (our choice)." in text) == (method == "ld-align")
            assert ("--distance" in text) == (method == "ld-align")

    @pytest.mark.slow
    def test_launched(self, command, capfd):
        Path("options.yaml").write_text("num_processes: 1\nmax_prompt_length: 64\n")
        assert main(["spin", *command, "--config", "options.yaml"]) == 0
        output = capfd.readouterr().out
        assert len(said_stages(output)) == 6
        assert weights("run")
        assert main(["spin", *command, "--config", "options.yaml", "--learning_rate", "0.02"]) == 1
        assert "learning_rate=0.01 (now 0.02)" in capfd.readouterr().err


@pytest.mark.slow
def test_two_processes(model_dir, tmp_path):
    """2 gloo processes with batches of 2 = 1 process with batches of 4, up to rounding, through two iterations."""
    program = two_processes_self_play.__file__
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", program]
    process = subprocess.Popen(
        [*command, "run", str(tmp_path), model_dir], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # torchrun's workers too
        raise
    assert process.returncode == 0, errors[-3000:]
    assert len(said_stages(output)) == 8  # once, not by both
    encoder = Letters()
    summaries = run(model_dir, tmp_path / "one", latent=encoder, **KILLED)
    assert len(list((tmp_path / "two/iteration-0/completions").glob("*.parquet"))) == 2
    for iteration in range(2):
        first, second = (pairs_of(tmp_path / name, iteration, "weighted") for name in ("one", "two"))
        assert first["rejected_ids"][:] == second["rejected_ids"][:]
        np.testing.assert_allclose(first["weight"], second["weight"], rtol=1e-6)
    for name, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], value, rtol=1e-3, atol=1e-4)
    found = json.loads((tmp_path / "summaries.json").read_text())
    assert [s["loss"] for s in found] == pytest.approx([s["loss"] for s in summaries], rel=1e-3)
