"""Contracts with the installed TRL: what `trl_internals` relies on, and what it adds."""

import copy
import dataclasses
import dis
import inspect
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer
from trl import DPOConfig, DPOTrainer, KTOTrainer, SFTConfig, SFTTrainer
from trl.trainer import dpo_trainer, kto_trainer
from trl.trainer.utils import add_fused_lm_head

import trl_ift
from trl_ift import PreferenceConfig, PreferenceTrainer, trl_internals
from trl_ift.stages import train_and_save
from trl_ift.trl_internals import (
    TESTED_TRL,
    TRL_PAIR_LOSSES,
    ChunkedLogProbFunction,
    FusedTap,
    LMHead,
    LogProbFunction,
    check_trl,
    dpo_compute_loss,
    dpo_construction,
    forget_fused_head,
    keep_4bit_trainable_on_cpu,
    score_labelled_positions_only,
    take_no_step,
    without_weight_hashes,
)


OUTPUTS = ("log_probs", "entropy", "is_top1")


class TestCheckTRL:
    def test_the_installed_version_passes_silently(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_trl(f"{TESTED_TRL[-1]}.0")

    def test_untested_minor_warns(self):
        with pytest.warns(UserWarning, match=r"tested with trl .*; found 1\.99\.0"):
            check_trl("1.99.0")

    def test_changed_signature_is_an_import_error(self):
        expected = {SFTTrainer.compute_loss: ("self", "model", "batch")}
        with pytest.raises(
            ImportError, match=r"does not work with trl 1\.99\.0: SFTTrainer\.compute_loss\(self, model"
        ):
            check_trl("1.99.0", expected)

    @pytest.mark.parametrize("function", trl_internals._EXPECTED_PARAMETERS, ids=lambda f: f.__qualname__)
    @pytest.mark.parametrize("change", ["added", "removed", "renamed"])
    def test_every_signature_is_watched(self, function, change, monkeypatch):
        """As in a release of TRL that adds, drops or renames a parameter of one of its functions."""
        signature = inspect.signature(function)
        *others, last = signature.parameters.values()
        changed = {
            "added": [*others, last.replace(name="another"), last],
            "removed": others,
            "renamed": [*others, last.replace(name="another")],
        }[change]
        monkeypatch.setattr(function, "__signature__", signature.replace(parameters=changed), raising=False)
        with pytest.raises(ImportError, match=re.escape(f"{function.__qualname__}(")) as error:
            check_trl()
        assert f"pip install 'trl=={TESTED_TRL[-1]}.*'" in str(error.value)

    def test_a_lost_field_is_an_import_error(self, monkeypatch):
        fields = [
            field for field in dataclasses.fields(trl_internals.FusedCausalLMOutput) if field.name != "label_mask"
        ]
        shorter = dataclasses.make_dataclass("Shorter", [(field.name, field.type, None) for field in fields])
        monkeypatch.setattr(trl_internals, "FusedCausalLMOutput", shorter)
        with pytest.raises(ImportError, match=r"FusedCausalLMOutput lacks \['label_mask'\]"):
            check_trl()

    def test_runs_on_import(self):
        code = (
            "import trl.trainer.utils as u\n"
            "u.FusedCausalLMOutput.__dataclass_fields__.pop('is_top1')\n"
            "import trl_ift.trl_internals\n"
        )
        finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert finished.returncode != 0
        assert "FusedCausalLMOutput lacks ['is_top1']" in finished.stderr

    def test_private_names_of_trl_stay_in_one_module(self):
        pattern = re.compile(
            r"from trl\.(trainer\.utils|models\.utils|data_utils|kernels|cli|scripts)"
            r"|from trl\.[\w.]+ import .*\b_|trl\.[\w.]+\._"
        )
        package = Path(trl_ift.__file__).parent
        offenders = [
            path.name
            for path in package.rglob("*.py")
            if path.name != "trl_internals.py" and pattern.search(path.read_text())
        ]
        assert offenders == []

    def test_attributes_the_trainers_read(self, tmp_path, tokenizer):
        trainer = SFTTrainer(
            model=tiny.model("llama", tokenizer),
            args=SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
            train_dataset=tiny.text_data(),
            processing_class=tokenizer,
        )
        for name in ("_metrics", "_total_train_tokens", "aux_loss_enabled", "router_aux_loss_coef", "hub_model_id"):
            assert hasattr(trainer, name), name
        assert trainer.get_tp_size() == 1
        assert list(inspect.signature(trainer.get_batch_samples).parameters) == [
            "epoch_iterator",
            "num_batches",
            "device",
        ]


def batch(tokenizer, trained_from=8):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, len(tokenizer), (3, 20), generator=generator)
    labels = ids.clone()
    labels[:, :trained_from] = -100
    labels[1] = -100
    labels[2, 12:15] = -100
    mask = torch.ones_like(ids)
    mask[0, 17:] = 0
    labels[0, 17:] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


class TestLabelledPositionsOnly:
    """Projecting only labelled positions: TRL's values and gradients, fewer rows in the head."""

    @pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2", "qwen3-moe"])
    def test_equals_trl(self, tokenizer, family):
        results = []
        for ours in (False, True):
            model = tiny.model(family, tokenizer)
            add_fused_lm_head(model, outputs=OUTPUTS)
            if ours:
                score_labelled_positions_only(model)
            extra = {"output_router_logits": True} if family == "qwen3-moe" else {}
            output = model(**batch(tokenizer), fused_lm_head=True, **extra)
            (output.loss + (output.log_probs**2).sum() + output.entropy.sum()).backward()
            results.append((output, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        (theirs, their_gradients), (ours, our_gradients) = results
        for field in ("loss", "log_probs", "entropy", "is_top1", "label_mask"):
            torch.testing.assert_close(getattr(ours, field), getattr(theirs, field), rtol=1e-5, atol=1e-6)
        assert our_gradients.keys() == their_gradients.keys()
        for name, gradient in their_gradients.items():
            torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-4, atol=1e-5)

    def test_projects_only_labelled_rows(self, tokenizer, monkeypatch):
        rows = []
        original = torch.mm
        monkeypatch.setattr(torch, "mm", lambda a, b, **kwargs: (rows.append(a.size(0)), original(a, b, **kwargs))[1])
        inputs = batch(tokenizer)
        model = tiny.model("llama", tokenizer)
        add_fused_lm_head(model)
        with torch.no_grad():
            model(**inputs, fused_lm_head=True)
            score_labelled_positions_only(model)
            model(**inputs, fused_lm_head=True)
        assert rows == [3 * 19, (inputs["labels"][:, 1:] != -100).sum()]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("tile", [1, 120, 10**6])
    @pytest.mark.parametrize("trained", ["all", "weight", "hidden"])
    @pytest.mark.parametrize("stored", [0, 2**26])
    def test_cpu_head_equals_trl(self, monkeypatch, dtype, tile, trained, stored):
        """Values of every output and all gradients, entropy's too, against TRL's kernel; with bias and scale."""
        monkeypatch.setattr("trl_ift.trl_internals._CPU_TILE_ELEMENTS", tile)
        monkeypatch.setattr("trl_ift.trl_internals._STORED_ELEMENTS", stored)
        generator = torch.Generator().manual_seed(0)
        hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((7, 5), (40, 5), (40,)))
        targets = torch.randint(0, 40, (7,), generator=generator)
        upstream = torch.randn(2, 7, generator=generator)
        outputs = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        results = []
        for function in (ChunkedLogProbFunction, LogProbFunction):
            inputs = [value.to(dtype).requires_grad_(trained in (name, "all")) for name, value in
                      (("hidden", hidden), ("weight", weight), ("bias", bias))]  # fmt: skip
            values = function.apply(*inputs, targets, 0.7, 32768, None, 0.5, outputs)
            ((values[0] * upstream[0]).sum() + (values[1] * upstream[1]).sum()).backward()
            results.append((values, [value.grad for value in inputs]))
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        for theirs, ours in zip(*(r[0] for r in results), strict=True):
            torch.testing.assert_close(ours, theirs, **tolerance)
        for theirs, ours in zip(*(r[1] for r in results), strict=True):
            assert (theirs is None) == (ours is None)
            if theirs is not None:
                torch.testing.assert_close(ours, theirs, **tolerance)

    def test_softcaps_stay_with_trl(self, monkeypatch, tokenizer):
        calls = []
        original = ChunkedLogProbFunction.apply
        monkeypatch.setattr(ChunkedLogProbFunction, "apply", lambda *args: (calls.append(1), original(*args))[1])
        for family in ("llama", "gemma2"):
            model = tiny.model(family, tokenizer)
            add_fused_lm_head(model)
            score_labelled_positions_only(model)
            model(**batch(tokenizer), fused_lm_head=True)
        assert len(calls) == 1

    def test_a_batch_without_labels_is_a_differentiable_zero(self, tokenizer):
        model = tiny.model("llama", tokenizer)
        add_fused_lm_head(model)
        score_labelled_positions_only(model)
        inputs = batch(tokenizer) | {"labels": torch.full((3, 20), -100)}
        loss = model(**inputs, fused_lm_head=True).loss
        loss.backward()
        assert loss == 0

    def test_leaves_trl_alone(self, tokenizer):
        first, second = tiny.model("llama", tokenizer), tiny.model("llama", tokenizer)
        add_fused_lm_head(first)
        add_fused_lm_head(second)
        before = second.forward.__func__
        score_labelled_positions_only(first)
        assert second.forward.__func__ is before
        assert inspect.signature(first.forward) == inspect.signature(second.forward)

    def test_needs_the_fused_head(self, tokenizer):
        with pytest.raises(ValueError, match="add_fused_lm_head"):
            score_labelled_positions_only(tiny.model("llama", tokenizer))


class TestLMHead:
    @pytest.mark.parametrize("family", ["llama", "gemma2"])
    @pytest.mark.parametrize("tile_elements", [1, 1000, 2**26])
    def test_tiles_are_the_logits(self, tokenizer, family, tile_elements):
        model = tiny.model(family, tokenizer)
        add_fused_lm_head(model)
        inputs = batch(tokenizer)
        with torch.no_grad():
            expected = model(input_ids=inputs["input_ids"]).logits.flatten(0, 1)
            hidden = model.base_model(input_ids=inputs["input_ids"]).last_hidden_state.flatten(0, 1)
        tiles = list(LMHead.of(model).logit_tiles(model, hidden, tile_elements))
        assert [tile.start for tile, _ in tiles] == [0, *[tile.stop for tile, _ in tiles][:-1]]
        torch.testing.assert_close(torch.cat([logits for _, logits in tiles]), expected, rtol=1e-5, atol=1e-5)

    def test_scaled_logits(self, tokenizer):
        from transformers import CohereConfig, CohereForCausalLM

        torch.manual_seed(0)
        model = CohereForCausalLM(
            CohereConfig(
                vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                logit_scale=0.25, pad_token_id=0, eos_token_id=1, bos_token_id=None,
            )
        ).eval()  # fmt: skip
        add_fused_lm_head(model)
        ids = torch.arange(8)[None]
        with torch.no_grad():
            expected = model(input_ids=ids).logits[0]
            hidden = model.base_model(input_ids=ids).last_hidden_state[0]
        ((_, logits),) = LMHead.of(model).logit_tiles(model, hidden)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_tap_extends_and_keeps_the_first_fused_call_only():
    calls = []

    class Model:
        name = "model"

        def __call__(self, **kwargs):
            calls.append(kwargs)
            return len(calls)

    tap = FusedTap(Model(), extra=1)
    assert [tap(a=1), tap(fused_lm_head=True), tap(fused_lm_head=True)] == [1, 2, 3]
    assert calls == [{"a": 1}, {"fused_lm_head": True, "extra": 1}, {"fused_lm_head": True}]
    assert tap.output == 2
    assert tap.name == "model"


class Test4BitOnCPU:
    def test_gradients_survive_a_forward_in_eval_mode(self, model_dir, tokenizer):
        """What happens without the guard depends on the CPU (AVX512-BF16); with it, nothing may."""
        pytest.importorskip("bitsandbytes")
        norms = []
        for forward_first in (False, True):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_pretrained(
                model_dir,
                quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
            )
            keep_4bit_trainable_on_cpu(model)
            model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
            inputs = batch(tokenizer)
            if forward_first:
                with torch.no_grad():
                    model.eval()(**inputs)
            model.train()(**inputs).loss.backward()
            norms.append(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]))
        torch.testing.assert_close(norms[0], norms[1])

    def test_every_4bit_layer_is_marked(self, model_dir):
        pytest.importorskip("bitsandbytes")
        from bitsandbytes.nn import Linear4bit

        model = AutoModelForCausalLM.from_pretrained(
            model_dir, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
        )
        keep_4bit_trainable_on_cpu(model)
        layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
        assert layers
        assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


class TestDPO:
    """What the preference methods take from `DPOTrainer`."""

    def test_the_hook_is_the_only_change(self):
        def code(function):
            return [op for op in dis.Bytecode(function) if op.opname not in ("CACHE", "RESUME")]

        names = {op.argval for op in code(dpo_compute_loss)} - {op.argval for op in code(DPOTrainer._compute_loss)}
        assert "pair_mean" in names
        assert dpo_compute_loss.__code__.co_firstlineno == DPOTrainer._compute_loss.__code__.co_firstlineno
        assert dpo_compute_loss.__code__.co_filename == DPOTrainer._compute_loss.__code__.co_filename

    def test_another_loss_function_is_an_import_error(self):
        def without_the_mean(self, model, inputs, return_outputs):
            return inputs

        with pytest.raises(ImportError, match=r"occurs 0 times in .*without_the_mean, expected once"):
            trl_internals._with_pair_mean_hook(without_the_mean)

    def test_every_pair_loss_of_trl_is_known(self):
        found = set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(DPOTrainer._compute_loss)))
        assert found == set(TRL_PAIR_LOSSES)

    def test_attributes_the_trainers_read(self, tmp_path, tokenizer):
        trainer = DPOTrainer(
            model=tiny.model("llama", tokenizer),
            ref_model=tiny.model("llama", tokenizer),
            args=DPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
            train_dataset=tiny.preference_data(),
            processing_class=tokenizer,
        )
        for name in (
            "precompute_ref_logps", "ref_model", "beta", "ld_alpha", "loss_types", "loss_weights", "_metrics", "_tokenizer",
            "_total_train_tokens", "_tp_size", "_precompute_model_hash", "aux_loss_enabled",
        ):  # fmt: skip
            assert hasattr(trainer, name), name

    def test_names_are_put_back(self):
        before = (dpo_trainer.add_fused_lm_head, dpo_trainer.hash_module)
        with pytest.raises(RuntimeError), dpo_construction(hash_weights=False):
            assert dpo_trainer.add_fused_lm_head is not before[0]
            assert dpo_trainer.hash_module(None) == ""
            raise RuntimeError
        assert (dpo_trainer.add_fused_lm_head, dpo_trainer.hash_module) == before

    def test_a_copy_of_a_patched_model_runs_its_own_weights(self, tokenizer):
        model = tiny.model("llama", tokenizer)
        ids = torch.arange(8)[None]
        add_fused_lm_head(model)
        copied = copy.deepcopy(model)
        forget_fused_head(copied)
        with torch.no_grad():
            before = copied(ids).logits
            for parameter in model.parameters():
                parameter.zero_()
            assert torch.equal(copied(ids).logits, before)
            assert not torch.equal(model(ids).logits, before)

    def test_nothing_is_kept_without_gradients(self, monkeypatch):
        """Reference passes and evaluation do not store the probabilities for a backward that never comes."""
        sizes = []
        empty = torch.empty

        def recorded(*shape, **options):
            sizes.append(shape)
            return empty(*shape, **options)

        hidden, weight = torch.randn(64, 8), torch.randn(50, 8, requires_grad=True)
        monkeypatch.setattr(trl_internals, "_CPU_TILE_ELEMENTS", 500)  # ten rows
        monkeypatch.setattr(torch, "empty", recorded)
        arguments = (hidden, weight, None, torch.zeros(64, dtype=torch.long), 1.0, 0, None, 1.0, ("log_probs",))
        with torch.no_grad():
            trl_internals.LogProbFunction.apply(*arguments)
        assert (64, 50) not in sizes
        trl_internals.LogProbFunction.apply(*arguments)
        assert (64, 50) in sizes


@pytest.mark.parametrize("stream", [False, True])
def test_a_training_that_takes_no_step(stream, tmp_path, tokenizer):
    """Transformers takes one more step from the checkpoint of the last one, unless told not to."""

    data = tiny.text_data().to_iterable_dataset() if stream else tiny.text_data()

    def trained():
        config = SFTConfig(
            str(tmp_path), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=1, save_steps=1
        )
        return SFTTrainer(tiny.model("llama", tokenizer), config, train_dataset=data, processing_class=tokenizer)

    assert next(iter(inspect.signature(Trainer._run_epoch).parameters)) == "self"
    first, again = trained(), trained()
    first.train()
    take_no_step(again)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.state.global_step == 1
    for name, value in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_what_is_outstanding_at_the_end_of_a_stage_is_made_up_for(tmp_path, tokenizer):
    """The log and the evaluation of the last epoch, of a training that was killed before them."""
    data = tiny.preference_data()

    def trainer():
        args = PreferenceConfig(
            str(tmp_path), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=2, save_steps=1,
            logging_strategy="epoch", eval_strategy="epoch", per_device_train_batch_size=4,
        )  # fmt: skip
        model = tiny.model("llama", tokenizer)
        return PreferenceTrainer(model, args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer)

    first, again = trainer(), trainer()
    first.train()
    assert [set(entry) & {"loss", "eval_loss"} for entry in first.state.log_history] == [
        {"loss"},
        {"eval_loss"},
        set(),
    ]
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["log_history"] == []  # it was saved before
    train_and_save(again, tmp_path, "the test")
    for entry, expected in zip(again.state.log_history[:2], first.state.log_history[:2], strict=True):
        for name in {"loss", "eval_loss", "step"} & set(expected):
            assert entry[name] == expected[name]


def test_without_weight_hashes(tokenizer):
    """TRL's trainers look the hash up where it is taken away, and have it back afterwards."""
    modules, model = (dpo_trainer, kto_trainer), tiny.model("llama", tokenizer)
    for trainer in (DPOTrainer, KTOTrainer):
        assert "hash_module(self.ref_model or self.model)" in inspect.getsource(trainer.__init__)
    with without_weight_hashes():
        assert [module.hash_module(model) for module in modules] == ["", ""]
    assert len({module.hash_module(model) for module in modules}) == 1
    assert all(module.hash_module(model) for module in modules)
