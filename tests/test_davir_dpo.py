"""DavIR-DPO: the worked numbers, its identities, TRL's sigmoid loss, an independent float64 computation."""

import json
import math
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import datasets
import pytest
import tiny
import torch
import torch.nn.functional as F
from pairs import (
    anchored,
    difference,
    double,
    gradients,
    logs,
    loss_and_gradients,
    make,
    message_log,
    step_gradients,
    token_logps,
)
from peft import LoraConfig
from trl import DPOConfig

from trl_ift import DavIRDPOConfig, DavIRDPOTrainer, PreferenceConfig, PreferenceTrainer
from trl_ift.preference import davir_dpo
from trl_ift.preference.davir_dpo import MIN_NATS, davir_dpo_loss, relative_rewards
from trl_ift.scripts import train as script


def close(found, expected, tolerance=1e-13):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(found).double(), expected, rtol=tolerance, atol=tolerance)


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def random_logps(rows=50, seed=0):
    """Chosen and rejected, policy and reference."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(-1 - 40 * torch.rand(rows, generator=generator, dtype=torch.float64) for _ in range(4))


# ---------------------------------------------------------------- the pure functions


class TestNumbers:
    def test_worked_example(self):
        loss = davir_dpo_loss(vector(-12, -30.5), vector(-15, -22), vector(-11, -33), vector(-13.5, -21), beta=5.0)
        close(loss, [0.6439169683, 0.4315380770], 5e-10)

    def test_rewards_are_shares(self):
        # A tenth more likely in nats, a half less likely, unchanged, certain
        close(relative_rewards(vector(-9, -30, -7, 0), vector(-10, -20, -7, -5)), [0.1, -0.5, 0, 1])


class TestIdentities:
    def test_dpo_at_beta_over_c(self):
        chosen, rejected, _, _ = (logps.requires_grad_() for logps in random_logps())
        for c in (0.5, 8.0, 300.0):
            constant = torch.full_like(chosen, -c)
            ours = davir_dpo_loss(chosen, rejected, constant, constant, beta=5.0)
            dpo = -F.logsigmoid(5.0 / c * ((chosen + c) - (rejected + c)))
            close(ours, dpo.detach())
            found = torch.autograd.grad(ours.sum(), (chosen, rejected))
            for ours_gradient, gradient in zip(found, torch.autograd.grad(dpo.sum(), (chosen, rejected)), strict=True):
                close(ours_gradient, gradient)

    def test_each_response_has_its_own_scale(self):
        """Of each response, both log-probs may be multiplied by the same number. It changes the loss of DPO."""
        chosen, rejected, ref_chosen, ref_rejected = random_logps()
        loss = davir_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=3.0)
        close(davir_dpo_loss(7 * chosen, 0.5 * rejected, 7 * ref_chosen, 0.5 * ref_rejected, beta=3.0), loss)
        dpo = [-F.logsigmoid(k * (chosen - ref_chosen) - (rejected - ref_rejected)) for k in (1, 7)]
        assert (dpo[0] - dpo[1]).abs().max() > 1

    def test_rewards_are_at_most_one(self):
        logps, _, ref_logps, _ = random_logps()
        rewards = relative_rewards(logps, ref_logps)
        assert (rewards < 1).all()
        close(rewards, 1 - logps / ref_logps)
        close(relative_rewards(torch.zeros_like(logps), ref_logps), [1.0] * 50)

    def test_swapping_changes_the_loss_by_the_margin(self):
        chosen, rejected, ref_chosen, ref_rejected = random_logps()
        loss = davir_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=2.0)
        swapped = davir_dpo_loss(rejected, chosen, ref_rejected, ref_chosen, beta=2.0)
        margins = 2.0 * (relative_rewards(chosen, ref_chosen) - relative_rewards(rejected, ref_rejected))
        close(swapped - loss, margins, 1e-12)

    def test_at_the_start(self):
        """Loss log 2; the gradient of a response goes with 1 / |log ref|."""
        _, _, ref_chosen, ref_rejected = random_logps()
        chosen, rejected = (logps.clone().requires_grad_() for logps in (ref_chosen, ref_rejected))
        loss = davir_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=5.0)
        close(loss, [math.log(2)] * 50)
        on_chosen, on_rejected = torch.autograd.grad(loss.sum(), (chosen, rejected))
        close(on_chosen, -2.5 / -ref_chosen)
        close(on_rejected, 2.5 / -ref_rejected)

    def test_normaliser_has_no_gradient(self):
        chosen, rejected, ref_chosen, ref_rejected = (logps.requires_grad_() for logps in random_logps())
        rewards = relative_rewards(chosen, ref_chosen)
        (found,) = torch.autograd.grad(rewards.sum(), ref_chosen)
        close(found, 1 / ref_chosen.detach())  # through r alone: -1 / |log ref|
        loss = davir_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=5.0).sum()
        found = torch.autograd.grad(loss, (chosen, ref_chosen, rejected, ref_rejected))
        close(found[0], -found[1])
        close(found[2], -found[3])
        torch.autograd.gradcheck(
            lambda c, r: davir_dpo_loss(c, r, ref_chosen.detach(), ref_rejected.detach(), 5.0), (chosen, rejected)
        )


class TestExtremes:
    @pytest.mark.parametrize("values", [(0.0, -1e4), (-1e4, 0.0), (0.0, 0.0), (-1e4, -1e4), (-1e-12, -1e-12)])
    @pytest.mark.parametrize("references", [(0.0, 0.0), (-1e4, -1e-12), (-1e-12, -1e4), (-50.0, 0.0)])
    def test_finite(self, values, references):
        pair = [torch.tensor([value], requires_grad=True) for value in values]
        loss = davir_dpo_loss(*pair, *(torch.tensor([value]) for value in references), 5.0)
        loss.sum().backward()
        for tensor in (loss, pair[0].grad, pair[1].grad):
            assert torch.isfinite(tensor).all()

    def test_certain_responses_count_as_99_percent(self):
        assert math.isclose(math.exp(-MIN_NATS), 0.99, rel_tol=1e-4)
        found = relative_rewards(vector(-0.5, -0.5, -0.5), vector(0, -MIN_NATS / 2, -2 * MIN_NATS))
        close(found, [-50.0, -49.5, -24.0])


# ---------------------------------------------------------------- the config


class TestConfig:
    def config(self, tmp_path, **settings):
        return DavIRDPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)

    def test_defaults(self, tmp_path):
        ours, theirs = self.config(tmp_path), DPOConfig(str(tmp_path), use_cpu=True, bf16=False)
        assert (ours.beta, theirs.beta) == (5.0, 0.1)
        for field in fields(DPOConfig):
            if field.name not in ("beta", "run_name", "logging_dir"):
                assert getattr(ours, field.name) == getattr(theirs, field.name), field.name

    @pytest.mark.parametrize("beta", [0.1, 0.49, 0.5, 5.0])
    def test_a_temperature_for_dpo_is_warned_of(self, tmp_path, monkeypatch, beta):
        messages = message_log(monkeypatch, davir_dpo)
        self.config(tmp_path, beta=beta)
        assert [f"`beta={beta}` is made for the rewards of DPO" in message for message in messages] == [True] * (
            beta < 0.5
        )

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"beta": 0.0}, "`beta=0.0` is out of range"),
            ({"beta": -5.0}, "`beta=-5.0` is out of range"),
            ({"beta": math.nan}, "`beta=nan` is out of range"),
            ({"loss_type": "hinge"}, "`loss_type='hinge'` has no effect on this method's loss"),
            ({"loss_type": ["sigmoid", "sft"]}, r"`loss_type=\['sigmoid', 'sft'\]` has no effect on this"),
            ({"loss_type": "davir"}, "`loss_type='davir'` has no effect on this"),
            ({"loss_weights": [1.0]}, r"`loss_weights=\[1.0\]` has no effect on this"),
            ({"label_smoothing": 0.1}, "`label_smoothing=0.1` has no effect on this"),
            ({"f_divergence_type": "forward_kl"}, "`f_divergence_type='forward_kl'` has no effect on this"),
            ({"f_alpha_divergence_coef": 0.7}, "`f_alpha_divergence_coef=0.7` has no effect on this"),
            ({"use_weighting": True}, "`use_weighting=True` has no effect on this"),
            ({"discopop_tau": 0.1}, "`discopop_tau=0.1` has no effect on this"),
            ({"ref_model_mixup_alpha": 0.5}, "`ref_model_mixup_alpha=0.5` has no effect without `sync_ref_model=True`"),
            ({"ref_model_sync_steps": 8}, "`ref_model_sync_steps=8` has no effect without"),
            ({"ld_alpha": 1.5}, "`ld_alpha=1.5` is out of range"),
        ],
    )  # fmt: skip
    def test_idle_and_wrong_options_are_refused(self, tmp_path, settings, message):
        with pytest.raises(ValueError, match=message):
            self.config(tmp_path, **settings)

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"loss_type": "sigmoid"},
            {"beta": 1.0, "precompute_ref_log_probs": True},
            {"ld_alpha": 0.5, "sync_ref_model": True, "ref_model_sync_steps": 8},
        ],
    )
    def test_round_trip(self, tmp_path, settings):
        config = self.config(tmp_path, **settings)
        known = {field.name for field in fields(config) if field.init}
        again = DavIRDPOConfig(**{name: value for name, value in config.to_dict().items() if name in known})
        assert again.to_dict() == config.to_dict()
        assert replace(config).to_dict() == config.to_dict()


# ---------------------------------------------------------------- the trainer against independent computations


def trainer_of(tmp_path, tokenizer, model="llama", data=None, cls=DavIRDPOTrainer, ref_model=None, **settings):
    config_class = cls.config_class
    model = tiny.model(model, tokenizer) if model in tiny.FAMILIES else model
    data = tiny.preference_data() if data is None else data
    cls = cls if ref_model is None else partial(cls, ref_model=ref_model)
    return make(cls, config_class, tmp_path, model, data, tokenizer, **settings)


def reference_of(family, tokenizer):
    """A model that is not the policy, nor near it."""
    model = tiny.model(family, tokenizer, seed=1)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3)
    return model


def naive_shares(model, tokenizer, row, reference=None, ld_alpha=1.0):
    """log pi / log ref of chosen and rejected; of a row's stored values without a `reference`."""
    logps = {name: token_logps(model, tokenizer, row["prompt"], row[name]) for name in ("chosen", "rejected")}
    shared = min(map(len, logps.values()))

    def total(tokens):
        return tokens[:shared].sum() + ld_alpha * tokens[shared:].sum()

    shares = []
    for name, tokens in logps.items():
        if reference is None:
            ref = row[f"ref_{name}_logps"]
        else:
            with torch.no_grad():
                ref = total(token_logps(reference, tokenizer, row["prompt"], row[name]))
        shares.append(total(tokens) / ref)
    return shares


def naive_davir_dpo(model, tokenizer, rows, beta=5.0, weights=None, **options):
    """Mean loss from its definition, one response at a time: a reward is beta (1 - log pi / log ref)."""
    losses = []
    for row in rows:
        chosen, rejected = naive_shares(model, tokenizer, row, **options)
        losses.append(torch.log1p(torch.exp(-beta * (rejected - chosen))))
    losses = torch.stack(losses)
    return (losses if weights is None else losses * torch.tensor(weights, dtype=losses.dtype)).mean()


def expected_of(model, tokenizer, rows, reference=None, **options):
    twin = double(model)
    if reference is not None:
        options["reference"] = double(reference)
    loss = naive_davir_dpo(twin, tokenizer, rows, **options)
    loss.backward()
    return loss.item(), gradients(twin)


class TestAgainstFloat64:
    @pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2", "gpt-neox"])
    @pytest.mark.parametrize("precompute", [False, True])
    def test_families(self, tmp_path, tokenizer, family, precompute):
        reference = reference_of(family, tokenizer)
        trainer = trainer_of(
            tmp_path, tokenizer, family, ref_model=reference, precompute_ref_log_probs=precompute, beta=20.0
        )
        loss, found = loss_and_gradients(trainer)
        rows = tiny.preference_data().to_list()[:4]
        value, expected = expected_of(trainer.model, tokenizer, rows, reference, beta=20.0)
        assert abs(value - math.log(2)) > 0.04
        assert loss == pytest.approx(value, rel=2e-6)
        assert difference(found, expected) < 1e-5

    def test_stored_reference(self, tmp_path, tokenizer):
        trainer = trainer_of(tmp_path, tokenizer, data=anchored())
        loss, found = loss_and_gradients(trainer)
        value, expected = expected_of(trainer.model, tokenizer, anchored(4))
        assert trainer.ref_model is None
        assert loss == pytest.approx(value, rel=2e-6)
        assert difference(found, expected) < 1e-5

    def test_a_model_is_its_own_reference(self, tmp_path, tokenizer):
        """Also after the first step, when it has moved."""
        model = tiny.model("llama", tokenizer)
        start = double(model)
        trainer = trainer_of(tmp_path, tokenizer, model, max_steps=2)
        losses, steps = step_gradients(trainer)
        rows = tiny.preference_data().to_list()
        value, expected = expected_of(tiny.model("llama", tokenizer), tokenizer, rows[:4], reference=start)
        assert losses[0] == pytest.approx(math.log(2), rel=1e-6)
        assert value == pytest.approx(math.log(2))
        assert difference(steps[0], expected) < 1e-5
        loss, found = loss_and_gradients(trainer)
        value, expected = expected_of(trainer.model, tokenizer, rows[:4], reference=start)
        assert abs(value - math.log(2)) > 0.1
        assert loss == pytest.approx(value, rel=5e-6)
        assert difference(found, expected) < 1e-5

    def test_weights(self, tmp_path, tokenizer):
        weights = [2.0, 0.0, 0.5, 1.0]
        data = anchored(4, weight=weights)
        trainer = trainer_of(tmp_path, tokenizer, data=data)
        loss, found = loss_and_gradients(trainer)
        value, expected = expected_of(trainer.model, tokenizer, data, weights=weights)
        assert loss == pytest.approx(value, rel=2e-6)
        assert difference(found, expected) < 1e-5

    @pytest.mark.parametrize("precompute", [False, True])
    def test_ld_alpha_acts_on_reward_and_normaliser(self, tmp_path, tokenizer, precompute):
        reference = reference_of("llama", tokenizer)
        trainer = trainer_of(
            tmp_path, tokenizer, ref_model=reference, ld_alpha=0.25, precompute_ref_log_probs=precompute
        )
        loss, found = loss_and_gradients(trainer)
        rows = tiny.preference_data().to_list()[:4]
        value, expected = expected_of(trainer.model, tokenizer, rows, reference, ld_alpha=0.25)
        assert value != pytest.approx(expected_of(trainer.model, tokenizer, rows, reference)[0], rel=1e-3)
        assert loss == pytest.approx(value, rel=2e-6)
        assert difference(found, expected) < 1e-5

    def test_lora(self, tmp_path, tokenizer):
        """The reference is the model without the adapter."""
        trainer = trainer_of(
            tmp_path, tokenizer, peft_config=LoraConfig(r=4, target_modules="all-linear"), max_steps=3
        )
        assert trainer.ref_model is None
        start = double(tiny.model("llama", tokenizer))
        trainer.train()
        loss, found = loss_and_gradients(trainer)
        trainer.model.zero_grad()
        rows = tiny.preference_data().to_list()[:4]
        expected = naive_davir_dpo(trainer.model, tokenizer, rows, reference=start)
        expected.backward()
        assert abs(expected.item() - math.log(2)) > 0.05
        assert loss == pytest.approx(expected.item(), rel=5e-6)
        assert all("lora_" in name for name in found)
        assert difference(found, gradients(trainer.model)) < 1e-5


class TestAgainstTRL:
    @pytest.mark.parametrize("c", [20.0, 90.0])
    def test_equal_normalisers_are_dpo_at_beta_over_c(self, tmp_path, tokenizer, c):
        """TRL's sigmoid loss, over several steps: losses, gradients, log."""
        columns = [-c] * 8
        data = tiny.preference_data().add_column("ref_chosen_logps", columns).add_column("ref_rejected_logps", columns)
        options = {"max_steps": 4, "learning_rate": 1e-3, "data": data}
        ours = trainer_of(tmp_path, tokenizer, beta=6.0, **options)
        theirs = trainer_of(tmp_path, tokenizer, cls=PreferenceTrainer, beta=6.0 / c, **options)
        found, expected = step_gradients(ours), step_gradients(theirs)
        assert found[0] == pytest.approx(expected[0], rel=1e-5)
        for ours_step, step in zip(found[1], expected[1], strict=True):
            assert difference(ours_step, step) < 1e-4
        for entry, their_entry in zip(logs(ours), logs(theirs), strict=True):
            assert entry.pop("davir_dpo/effective_beta") == pytest.approx(6.0 / c)
            assert set(entry) == set(their_entry)
            for name, value in their_entry.items():
                assert entry[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name

    def test_it_is_not_dpo_otherwise(self, tmp_path, tokenizer):
        mean = 1 / torch.tensor([[row["ref_chosen_logps"], row["ref_rejected_logps"]] for row in anchored(4)]).abs()
        _, ours = loss_and_gradients(trainer_of(tmp_path, tokenizer, data=anchored()))
        dpo = trainer_of(
            tmp_path, tokenizer, data=anchored(), cls=PreferenceTrainer, beta=5.0 * mean.mean().item()
        )  # the temperature nearest to it
        assert difference(loss_and_gradients(dpo)[1], ours) > 0.1


class TestSplitSteps:
    def test_accumulation(self, tmp_path, tokenizer):
        model = tiny.model("llama", tokenizer)
        value, expected = expected_of(model, tokenizer, anchored(4))
        for size in (4, 2, 1):
            trainer = trainer_of(
                tmp_path, tokenizer, data=anchored(4), max_steps=1, per_device_train_batch_size=size,
                gradient_accumulation_steps=4 // size,
            )  # fmt: skip
            (loss,), (found,) = step_gradients(trainer)
            assert loss == pytest.approx(value, rel=2e-6)
            assert difference(found, expected) < 1e-5

    def test_smaller_last_micro_batch(self, tmp_path, tokenizer):
        """Three pairs as 2 + 1: every pair counts the same, in a stream too."""
        _, expected = expected_of(tiny.model("llama", tokenizer), tokenizer, anchored(3))
        for data in (anchored(3), anchored(3).to_iterable_dataset()):
            trainer = trainer_of(
                tmp_path, tokenizer, data=data, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2
            )  # fmt: skip
            _, (found,) = step_gradients(trainer)
            assert difference(found, expected) < 1e-5


class TestMetrics:
    def test_margin_is_the_argument_of_the_sigmoid(self, tmp_path, tokenizer):
        trainer = trainer_of(tmp_path, tokenizer, data=anchored(1), per_device_train_batch_size=1, max_steps=1)
        trainer.train()
        (entry,) = logs(trainer)
        assert entry["loss"] == pytest.approx(math.log1p(math.exp(-entry["rewards/margins"])), rel=1e-5)

    def test_values(self, tmp_path, tokenizer):
        """Over two micro-batches of an optimizer step."""
        rows = anchored(4)
        trainer = trainer_of(
            tmp_path, tokenizer, data=rows, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2
        )
        twin = double(trainer.model)
        trainer.train()
        (entry,) = logs(trainer)
        shares = torch.stack([torch.stack(naive_shares(twin, tokenizer, row)) for row in rows]).detach()
        chosen, rejected = (5.0 * (1 - shares)).unbind(1)
        references = torch.tensor([[row["ref_chosen_logps"], row["ref_rejected_logps"]] for row in rows])
        logps = shares * references
        expected = {
            "rewards/chosen": chosen.mean(),
            "rewards/rejected": rejected.mean(),
            "rewards/margins": (chosen - rejected).mean(),
            "rewards/accuracies": (chosen > rejected).double().mean(),
            "logps/chosen": logps[:, 0].mean(),
            "logps/rejected": logps[:, 1].mean(),
            "davir_dpo/effective_beta": (5.0 / -references).mean(),
        }
        for name, value in expected.items():
            assert entry[name] == pytest.approx(value.item(), rel=1e-5, abs=1e-6), name
        assert 0 < expected["rewards/accuracies"] < 1

    def test_evaluation(self, tmp_path, tokenizer):
        reference = reference_of("llama", tokenizer)
        held_out = tiny.preference_data().select([4, 5, 6])
        trainer = trainer_of(
            tmp_path, tokenizer, ref_model=reference, eval_dataset=held_out, per_device_eval_batch_size=3
        )
        value, _ = expected_of(trainer.model, tokenizer, held_out, reference)
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(value, rel=2e-6)
        assert metrics["eval_davir_dpo/effective_beta"] > 0
        assert trainer.predict(held_out).metrics["test_loss"] == pytest.approx(value, rel=2e-6)


class TestTrainer:
    @pytest.mark.parametrize(
        "settings", [{"gradient_accumulation_steps": 2}, {"precompute_ref_log_probs": True}], ids=str
    )
    def test_resumed_equals_uninterrupted(self, tmp_path, tokenizer, model_dir, settings):
        def trainer():
            return trainer_of(
                tmp_path, tokenizer, model_dir, max_steps=6, save_strategy="steps", save_steps=3,
                per_device_train_batch_size=2, train_sampling_strategy="random", **settings,
            )  # fmt: skip

        whole, resumed = trainer(), trainer()
        whole.train()
        resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-3"))
        assert logs(resumed) == logs(whole)
        for (name, left), (_, right) in zip(
            whole.model.named_parameters(), resumed.model.named_parameters(), strict=True
        ):
            assert torch.equal(left, right), name

    def test_it_learns_the_pairs(self, tmp_path, tokenizer):
        trainer = trainer_of(tmp_path, tokenizer, max_steps=20)
        trainer.train()
        last = logs(trainer)[-1]
        assert last["loss"] < 0.3
        assert last["rewards/accuracies"] == 1
        assert last["rewards/chosen"] > 0.5 > -0.5 > last["rewards/rejected"]

    def test_config_of_another_method(self, tmp_path, tokenizer):
        with pytest.raises(TypeError, match="DavIRDPOConfig"):
            DavIRDPOTrainer(
                model="./nowhere", args=PreferenceConfig(str(tmp_path), use_cpu=True, bf16=False),
                train_dataset=tiny.preference_data(), processing_class=tokenizer,
            )  # fmt: skip

    def test_what_is_refused_before_the_model_loads(self, tmp_path, tokenizer):
        with pytest.raises(ValueError, match="`ld_alpha` weighs the tokens of a response"):
            trainer_of(tmp_path, tokenizer, "./nowhere", data=anchored(), ld_alpha=0.5)
        with pytest.raises(ValueError, match="Drop one of the two"):
            trainer_of(tmp_path, tokenizer, "./nowhere", data=anchored(), ref_model=reference_of("llama", tokenizer))


def test_script(model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tiny.preference_data().to_json("pairs.jsonl")
    argv = ["davir-dpo", "--model_name_or_path", model_dir, "--dataset_name", "pairs.jsonl", "--output_dir", "out"]
    argv += ["--max_steps", "2", "--logging_steps", "1", "--report_to", "none", "--use_cpu", "true", "--bf16", "false"]
    assert script.run(argv) == 0
    state = json.loads(Path("out/checkpoint-2/trainer_state.json").read_text())
    assert len([entry for entry in state["log_history"] if "davir_dpo/effective_beta" in entry]) == 2
    card = Path("out/README.md").read_text()
    assert "| `beta` | `5` |" in card
    assert "`loss_type`" not in card
    assert "2310.13008" in card
    argv[6:7] = ["other", "--label_smoothing", "0.1"]
    assert script.run(argv) == 1
    assert "`label_smoothing=0.1` has no effect on this method's loss" in capsys.readouterr().err
