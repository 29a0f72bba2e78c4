"""SPIN: the worked numbers, its identities, TRL's sigmoid and hinge losses, an independent float64 computation."""

import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
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
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from trl_ift import PreferenceConfig, SPINConfig, SPINTrainer, checks
from trl_ift.preference.spin import LOSS_TYPES, spin_loss


# ell and its derivative, of t in float64
ELL = {
    "sigmoid": (lambda t: math.log1p(math.exp(-t)), lambda t: -1 / (1 + math.exp(t))),
    "hinge": (lambda t: max(0.0, 1 - t), lambda t: -1.0 if t < 1 else 0.0),
    "correlation": (lambda t: 1 - t, lambda t: -1.0),
    "exponential": (lambda t: math.exp(-t), lambda t: -math.exp(-t)),
}
SLOPE_AT_0 = {"sigmoid": -0.5, "hinge": -1.0, "correlation": -1.0, "exponential": -1.0}
every_loss = pytest.mark.parametrize("loss_type", LOSS_TYPES)


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(found, expected, tolerance=1e-13):
    torch.testing.assert_close(found.detach(), vector(*expected), rtol=tolerance, atol=tolerance)


def tiny_lora(**options):
    return LoraConfig(r=4, target_modules="all-linear", **options)


def adapted(model):
    """A PEFT model whose adapter is not zero."""
    model = get_peft_model(model, tiny_lora())
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


# ---------------------------------------------------------------- the pure function


class TestLoss:
    def test_worked_example(self):
        margins = vector(-1.0, 2.5) - vector(-1.5, -1.0)
        close(spin_loss(margins, "sigmoid", 0.1), [0.6684596480, 0.5333821554], 5e-11)
        close(spin_loss(margins, "hinge", 0.1), [0.95, 0.65])
        close(spin_loss(margins, "correlation", 0.1), [0.95, 0.65])
        close(spin_loss(margins, "exponential", 0.1), [math.exp(-0.05), math.exp(-0.35)])

    def test_every_loss_is_in_these_tests(self):
        assert tuple(ELL) == LOSS_TYPES

    @every_loss
    @pytest.mark.parametrize("beta", [0.1, 5.0])
    def test_values_and_slopes(self, loss_type, beta):
        points = [-30.0, -2.0, -0.1, 0.0, 0.05, 0.3, 3.0, 30.0]
        margins = vector(*points).requires_grad_()
        losses = spin_loss(margins, loss_type, beta)
        value, slope = ELL[loss_type]
        close(losses, [value(beta * point) for point in points])
        close(torch.autograd.grad(losses.sum(), margins)[0], [beta * slope(beta * point) for point in points])

    @every_loss
    def test_convex_and_decreasing(self, loss_type):
        losses = spin_loss(torch.linspace(-20, 40, 601, dtype=torch.float64), loss_type, 0.3)
        steps = losses.diff()
        assert (steps <= 0).all()
        assert (steps[:200] < 0).all()
        assert (steps.diff() >= -1e-12).all()

    @every_loss
    def test_extremes(self, loss_type):
        """Float32 margins of long, surely won or lost pairs."""
        margins = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)
        losses = spin_loss(margins, loss_type, 0.1 if loss_type != "exponential" else 1e-3)
        (gradient,) = torch.autograd.grad(losses.sum(), margins)
        assert torch.isfinite(losses).all()
        assert torch.isfinite(gradient).all()
        if loss_type == "sigmoid":
            torch.testing.assert_close(losses.detach(), torch.tensor([0.0, 1000.0, math.log(2)]))

    def test_slope_of_the_correlation_does_not_depend_on_the_margin(self):
        margins = torch.randn(100, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(spin_loss(margins, "correlation", 0.3).sum(), margins)
        assert (gradient == -0.3).all()

    @every_loss
    def test_equal_answers(self, loss_type):
        """Loss ell(0), log 2 for the sigmoid, whatever the model; gradient exactly 0."""
        logps = torch.randn(50, dtype=torch.float64, requires_grad=True) * 40
        ref_logps = torch.randn(50, dtype=torch.float64) * 40
        losses = spin_loss((logps - ref_logps) - (logps - ref_logps), loss_type, 0.1)
        close(losses, [math.log(2) if loss_type == "sigmoid" else 1.0] * 50)
        (gradient,) = torch.autograd.grad(losses.sum(), logps)
        assert (gradient == 0).all()


class TestDistributions:
    """A world of five answers: the expected loss of every pi, by hand."""

    real = vector(0.4, 0.3, 0.15, 0.1, 0.05)
    opponent = vector(0.1, 0.2, 0.3, 0.15, 0.25)

    def expected_loss(self, logits, real, opponent, loss_type, beta):
        ratios = logits.log_softmax(-1) - opponent.log()
        losses = spin_loss((ratios[:, None] - ratios[None]).flatten(), loss_type, beta)
        return (losses * (real[:, None] * opponent[None]).flatten()).sum()

    @every_loss
    def test_a_policy_that_has_met_the_data_stays(self, loss_type):
        logits = self.real.log().requires_grad_()
        loss = self.expected_loss(logits, self.real, self.real, loss_type, 0.7)
        (gradient,) = torch.autograd.grad(loss, logits)
        close(gradient, [0.0] * 5, 1e-15)
        other = logits.detach() + vector(0.3, 0, -0.2, 0.1, 0)
        difference = self.expected_loss(other, self.real, self.real, loss_type, 0.7) - loss
        assert difference > (1e-4 if loss_type in ("sigmoid", "exponential") else -1e-12)

    @pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
    def test_optimum_of_an_iteration(self, beta):
        """pi ~ p_t (p_data / p_t)^(1 / beta)"""
        optimum = self.opponent * (self.real / self.opponent) ** (1 / beta)
        logits = optimum.log().requires_grad_()
        loss = self.expected_loss(logits, self.real, self.opponent, "sigmoid", beta)
        (gradient,) = torch.autograd.grad(loss, logits)
        close(gradient, [0.0] * 5, 1e-15)
        for other in (self.real, self.opponent, optimum**1.5):
            if not torch.allclose(other, optimum):
                assert self.expected_loss(other.log(), self.real, self.opponent, "sigmoid", beta) > loss + 1e-3


# ---------------------------------------------------------------- the config


class TestConfig:
    def config(self, tmp_path, **settings):
        return SPINConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)

    def test_defaults(self, tmp_path):
        ours, theirs = self.config(tmp_path), DPOConfig(str(tmp_path), use_cpu=True, bf16=False)
        assert (ours.loss_type, ours.beta, ours.learning_rate) == ("sigmoid", 0.1, 5e-7)
        for field in fields(DPOConfig):
            if field.name not in ("loss_type", "learning_rate", "run_name", "logging_dir"):
                assert getattr(ours, field.name) == getattr(theirs, field.name), field.name

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"loss_type": "logistic"}, "`loss_type='logistic'` is not known. Choose one of: 'sigmoid', 'hinge', 'corr"),
            ({"loss_type": "ipo"}, "`loss_type='ipo'` is not known"),
            ({"loss_type": ["sigmoid", "hinge"]}, r"`loss_type=\['sigmoid', 'hinge'\]` is not known"),
            ({"loss_type": []}, r"`loss_type=\[\]` is not known"),
            ({"beta": 0.0}, "`beta=0.0` is out of range"),
            ({"beta": -0.1}, "`beta=-0.1` is out of range"),
            ({"beta": math.inf}, "`beta=inf` is out of range"),
            ({"beta": math.nan}, "`beta=nan` is out of range"),
            ({"loss_weights": [1.0]}, r"`loss_weights=\[1.0\]` has no effect on this"),
            ({"label_smoothing": 0.1}, "`label_smoothing=0.1` has no effect on this"),
            ({"f_divergence_type": "forward_kl"}, "`f_divergence_type='forward_kl'` has no effect on this"),
            ({"f_alpha_divergence_coef": 0.7}, "`f_alpha_divergence_coef=0.7` has no effect on this"),
            ({"use_weighting": True}, "`use_weighting=True` has no effect on this"),
            ({"discopop_tau": 0.1}, "`discopop_tau=0.1` has no effect on this"),
            ({"ld_alpha": 1.5}, "`ld_alpha=1.5` is out of range"),
        ],
    )  # fmt: skip
    def test_idle_and_wrong_options_are_refused(self, tmp_path, settings, message):
        with pytest.raises(ValueError, match=message):
            self.config(tmp_path, **settings)

    @pytest.mark.parametrize(
        "settings",
        [{}, {"loss_type": "exponential", "beta": 5.0}, {"loss_type": ["hinge"]}, {"precompute_ref_log_probs": True}],
    )
    def test_round_trip(self, tmp_path, settings):
        config = self.config(tmp_path, **settings)
        known = {field.name for field in fields(config) if field.init}
        again = SPINConfig(**{name: value for name, value in config.to_dict().items() if name in known})
        assert again.to_dict() == config.to_dict()
        assert replace(config).to_dict() == config.to_dict()
        assert config.loss_type in LOSS_TYPES


# ---------------------------------------------------------------- the trainer against independent computations


def trainer_of(tmp_path, tokenizer, model="llama", data=None, cls=SPINTrainer, **settings):
    config_class = getattr(cls, "config_class", DPOConfig)
    model = tiny.model(model, tokenizer) if model in tiny.FAMILIES else model
    data = tiny.preference_data() if data is None else data
    return make(cls, config_class, tmp_path, model, data, tokenizer, **settings)


def naive_spin(model, tokenizer, rows, reference=None, loss_type="sigmoid", beta=0.1):
    """Mean loss from its definition, one answer at a time; with a row's stored reference values without a `reference`."""
    losses = []
    for row in rows:
        ratios = []
        for name in ("chosen", "rejected"):
            if reference is None:
                ref = row[f"ref_{name}_logps"]
            else:
                with torch.no_grad():
                    ref = token_logps(reference, tokenizer, row["prompt"], row[name]).sum()
            ratios.append(token_logps(model, tokenizer, row["prompt"], row[name]).sum() - ref)
        t = beta * (ratios[0] - ratios[1])
        losses.append(
            {
                "sigmoid": torch.log1p(torch.exp(-t)),
                "hinge": torch.clamp(1 - t, min=0),
                "correlation": 1 - t,
                "exponential": torch.exp(-t),
            }[loss_type]
        )
    return torch.stack(losses).mean()


def expected_of(model, tokenizer, rows, reference=None, **options):
    twin = double(model)
    loss = naive_spin(twin, tokenizer, rows, None if reference is None else double(reference), **options)
    loss.backward()
    return loss.item(), gradients(twin)


class TestAgainstFloat64:
    @every_loss
    def test_first_step(self, tmp_path, tokenizer, loss_type):
        """Loss ell(0), log 2 for the sigmoid; gradient of a pair ell'(0) beta (grad log pi(y) - grad log pi(y'))."""
        trainer = trainer_of(tmp_path, tokenizer, loss_type=loss_type, beta=0.3)
        loss, found = loss_and_gradients(trainer)
        twin = double(trainer.model)
        rows = tiny.preference_data().to_list()[:4]
        margins = [
            token_logps(twin, tokenizer, row["prompt"], row["chosen"]).sum()
            - token_logps(twin, tokenizer, row["prompt"], row["rejected"]).sum()
            for row in rows
        ]
        (0.3 * SLOPE_AT_0[loss_type] * torch.stack(margins).mean()).backward()
        assert loss == pytest.approx(math.log(2) if loss_type == "sigmoid" else 1.0, rel=2e-6)
        assert difference(found, gradients(twin)) < 1e-5

    @every_loss
    @pytest.mark.parametrize("family", ["llama", "gemma2"])
    def test_stored_reference(self, tmp_path, tokenizer, family, loss_type):
        options = {"loss_type": loss_type, "beta": 0.02}
        trainer = trainer_of(tmp_path, tokenizer, family, anchored(), **options)
        loss, found = loss_and_gradients(trainer)
        value, expected = expected_of(trainer.model, tokenizer, anchored(4), **options)
        assert trainer.ref_model is None
        assert abs(value - ELL[loss_type][0](0)) > 0.005
        assert loss == pytest.approx(value, rel=3e-6)
        assert difference(found, expected) < 1e-5

    @pytest.mark.parametrize("precompute", [False, True])
    def test_the_reference_is_the_model_as_it_was(self, tmp_path, tokenizer, precompute):
        """Also after the first steps, when it has moved."""
        model = tiny.model("llama", tokenizer)
        start = double(model)
        trainer = trainer_of(tmp_path, tokenizer, model, precompute_ref_log_probs=precompute, beta=0.5)
        assert (trainer.ref_model is None) == precompute
        trainer.train()
        assert logs(trainer)[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
        loss, found = loss_and_gradients(trainer)
        rows = tiny.preference_data().to_list()[:4]
        value, expected = expected_of(trainer.model, tokenizer, rows, start, beta=0.5)
        assert abs(value - math.log(2)) > 0.1
        assert loss == pytest.approx(value, rel=5e-6)
        assert difference(found, expected) < 1e-5

    @every_loss
    def test_a_constant_on_both_log_ratios_changes_nothing(self, tmp_path, tokenizer, loss_type):
        def run(constant):
            rows = [
                row | {name: row[name] + constant for name in ("ref_chosen_logps", "ref_rejected_logps")}
                for row in anchored(4)
            ]
            data = Dataset.from_list(rows)
            return loss_and_gradients(trainer_of(tmp_path, tokenizer, data=data, loss_type=loss_type, beta=0.02))

        (plain, gradient), (shifted, shifted_gradient) = run(0.0), run(-40.0)
        assert shifted == pytest.approx(plain, rel=1e-5)
        assert difference(shifted_gradient, gradient) < 1e-5

    def test_ld_alpha(self, tmp_path, tokenizer):
        reference = {"ref_chosen_logps": [-60.0] * 8, "ref_rejected_logps": [-60.0] * 8}
        trainers = [trainer_of(tmp_path, tokenizer, ld_alpha=alpha, max_steps=2, beta=1.0) for alpha in (None, 0.0)]
        for trainer in trainers:
            trainer.train()
        assert logs(trainers[0])[1]["loss"] != pytest.approx(logs(trainers[1])[1]["loss"], rel=1e-2)
        data = tiny.preference_data()
        for name, values in reference.items():
            data = data.add_column(name, values)
        with pytest.raises(ValueError, match="`ld_alpha` weighs the tokens of a response"):
            trainer_of(tmp_path, tokenizer, data=data, ld_alpha=0.5)


# Settings under which the sigmoid and the hinge must be those of TRL; callables are called with the tokenizer
PARITY = {
    "fp32": {},
    "precompute": {"precompute_ref_log_probs": True},
    "lora": {"peft_config": lambda _: tiny_lora()},
    "lora precompute": {"peft_config": lambda _: tiny_lora(), "precompute_ref_log_probs": True},
    "existing adapter": {"model": lambda tokenizer: adapted(tiny.model("llama", tokenizer))},
    "chat": {"data": lambda _: tiny.conversational_preference_data()},
    "stream": {"data": lambda _: tiny.preference_data().to_iterable_dataset()},
    "truncation": {"max_length": 20},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "evaluation": {
        "eval_strategy": "steps", "eval_steps": 2, "eval_dataset": lambda _: tiny.preference_data().select(range(3)),
    },
    "ld_alpha": {"ld_alpha": 0.3},
    "synchronised": {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
}  # fmt: skip


class TestAgainstTRL:
    @pytest.mark.parametrize(
        ("loss_type", "case"),
        [*(("sigmoid", case) for case in PARITY), ("hinge", "fp32"), ("hinge", "lora precompute")],
    )
    def test_equals_dpo_trainer(self, tmp_path, tokenizer, model_dir, loss_type, case):
        """Losses, gradients and everything that is logged, over three steps."""
        runs = []
        for name, cls in (("theirs", DPOTrainer), ("ours", SPINTrainer)):
            settings = {name: value(tokenizer) if callable(value) else value for name, value in PARITY[case].items()}
            options = {"model": model_dir, "max_steps": 3, "learning_rate": 1e-3, "beta": 0.5} | settings
            trainer = trainer_of(tmp_path / name, tokenizer, cls=cls, loss_type=loss_type, **options)
            runs.append((step_gradients(trainer), [*logs(trainer), *evaluations(trainer)]))
        (expected, their_log), (found, our_log) = runs
        assert found[0] == pytest.approx(expected[0], rel=1e-4)
        for ours, theirs in zip(found[1], expected[1], strict=True):
            assert difference(ours, theirs) < 1e-4
        assert [entry.keys() for entry in our_log] == [entry.keys() for entry in their_log]
        for ours, theirs in zip(our_log, their_log, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)
        assert found[0][-1] < found[0][0] - 1e-3

    @pytest.mark.parametrize("loss_type", ["correlation", "exponential"])
    def test_it_is_another_loss_otherwise(self, tmp_path, tokenizer, loss_type):
        """Away from the start, where all gradients have one direction."""
        found = [
            loss_and_gradients(trainer_of(tmp_path, tokenizer, data=anchored(), beta=0.05, loss_type=name))[1]
            for name in (loss_type, "sigmoid", "hinge")
        ]
        for other in found[1:]:
            scale = sum((other[n] * found[0][n]).sum() for n in other) / sum((other[n] ** 2).sum() for n in other)
            assert difference({n: scale * value for n, value in other.items()}, found[0]) > 0.05


def evaluations(trainer):
    skip = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time")
    found = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    return [{key: value for key, value in entry.items() if key not in skip} for entry in found]


class TestSplitSteps:
    @every_loss
    def test_accumulation(self, tmp_path, tokenizer, loss_type):
        options = {"loss_type": loss_type, "beta": 0.02}
        value, expected = expected_of(tiny.model("llama", tokenizer), tokenizer, anchored(4), **options)
        for size in (4, 2, 1):
            trainer = trainer_of(
                tmp_path, tokenizer, data=anchored(4), max_steps=1, per_device_train_batch_size=size,
                gradient_accumulation_steps=4 // size, **options,
            )  # fmt: skip
            (loss,), (found,) = step_gradients(trainer)
            assert loss == pytest.approx(value, rel=3e-6)
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


class TestAdapters:
    def test_new_adapter(self, tmp_path, tokenizer):
        """The reference is the model without it, which does not move."""
        model = tiny.model("llama", tokenizer)
        start, base = double(model), {name: value.clone() for name, value in model.state_dict().items()}
        trainer = trainer_of(tmp_path, tokenizer, model, peft_config=tiny_lora(), max_steps=3, beta=0.5)
        assert trainer.ref_model is None
        trainer.train()
        loss, found = loss_and_gradients(trainer)
        trainer.model.zero_grad()
        rows = tiny.preference_data().to_list()[:4]
        expected = naive_spin(trainer.model, tokenizer, rows, start, beta=0.5)
        expected.backward()
        assert abs(expected.item() - math.log(2)) > 0.02
        assert loss == pytest.approx(expected.item(), rel=5e-6)
        assert all("lora_" in name for name in found)
        assert difference(found, gradients(trainer.model)) < 1e-5
        moved = {name.replace(".base_layer", ""): v for name, v in trainer.model.get_base_model().state_dict().items()}
        assert all(torch.equal(moved[name], value) for name, value in base.items())

    @pytest.mark.parametrize("precompute", [False, True])
    def test_existing_adapter(self, tmp_path, tokenizer, precompute):
        """The reference is the adapter as it was: in a copy named "ref", or, when its log-probs are stored, in no copy."""
        model = adapted(tiny.model("llama", tokenizer))
        with torch.no_grad():
            start = double(model.merge_and_unload()).state_dict()
        model = adapted(tiny.model("llama", tokenizer))
        trainer = trainer_of(tmp_path, tokenizer, model, precompute_ref_log_probs=precompute, max_steps=3, beta=0.5)
        assert set(trainer.model.peft_config) == ({"default"} if precompute else {"default", "ref"})
        trainer.train()
        assert logs(trainer)[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
        reference = tiny.model("llama", tokenizer).double()
        reference.load_state_dict(start)
        expected = naive_spin(trainer.model, tokenizer, tiny.preference_data().to_list()[:4], reference, beta=0.5)
        assert abs(expected.item() - math.log(2)) > 0.02
        assert loss_and_gradients(trainer)[0] == pytest.approx(expected.item(), rel=5e-6)
        if precompute:
            trainer.save_model(str(tmp_path / "saved"))
            assert not (tmp_path / "saved" / "ref").exists()
            with pytest.raises(ValueError, match="the adapter that training started from is no longer in memory"):
                trainer.evaluate(tiny.preference_data().select([0]))


class TestTrainer:
    @pytest.mark.parametrize(
        "settings",
        [{"gradient_accumulation_steps": 2}, {"precompute_ref_log_probs": True}, {"peft_config": tiny_lora()}],
        ids=["accumulation", "precompute", "lora"],
    )
    def test_resumed_equals_uninterrupted(self, tmp_path, tokenizer, model_dir, settings):
        def trainer():
            torch.manual_seed(0)  # of a new adapter
            return trainer_of(
                tmp_path, tokenizer, model_dir, max_steps=6, save_strategy="steps", save_steps=3,
                per_device_train_batch_size=2, train_sampling_strategy="random", loss_type="hinge", **settings,
            )  # fmt: skip

        whole, resumed = trainer(), trainer()
        whole.train()
        resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-3"))
        assert logs(resumed) == logs(whole)
        for (name, left), (_, right) in zip(
            whole.model.named_parameters(), resumed.model.named_parameters(), strict=True
        ):
            assert torch.equal(left, right), name

    @every_loss
    def test_evaluation(self, tmp_path, tokenizer, loss_type):
        model = tiny.model("llama", tokenizer)
        start = double(model)
        held_out = tiny.preference_data().select([4, 5, 6])
        trainer = trainer_of(
            tmp_path, tokenizer, model, eval_dataset=held_out, per_device_eval_batch_size=3, loss_type=loss_type
        )
        trainer.train()
        value, _ = expected_of(trainer.model, tokenizer, held_out, start, loss_type=loss_type)
        assert value != pytest.approx(ELL[loss_type][0](0), rel=1e-3)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(value, rel=5e-6)
        assert trainer.predict(held_out).metrics["test_loss"] == pytest.approx(value, rel=5e-6)

    @every_loss
    def test_it_learns_the_pairs(self, tmp_path, tokenizer, loss_type):
        trainer = trainer_of(tmp_path, tokenizer, max_steps=20, loss_type=loss_type, beta=0.3)
        trainer.train()
        first, *_, last = logs(trainer)
        assert last["loss"] < first["loss"] - 0.5
        assert last["rewards/accuracies"] == 1
        assert last["rewards/margins"] > 1

    def test_equal_answers_are_dropped(self, tmp_path, tokenizer, monkeypatch):
        messages = message_log(monkeypatch, checks)
        rows = tiny.preference_data().to_list()
        rows[2]["rejected"] = rows[2]["chosen"]
        trainer = trainer_of(tmp_path, tokenizer, data=Dataset.from_list(rows))
        assert len(trainer.train_dataset) == 7
        assert messages == ["Dropped 1 of 8 rows of the train dataset: 1 (chosen equals rejected)."]

    def test_the_card_tells_how_the_pairs_were_made(self, tmp_path, tokenizer):
        trainer = trainer_of(tmp_path, tokenizer, loss_type="exponential", beta=0.3)
        trainer.iteration_summary = {"iteration": "2 of 4", "pairs": 7}
        trainer.create_model_card()
        text = Path(trainer.args.output_dir, "README.md").read_text()
        for line in (
            "| `loss_type` | `exponential` |",
            "| `beta` | `0.3` |",
            "| `iteration` | `2 of 4` |",
            "| `pairs` | `7` |",
        ):
            assert line in text
        assert "2401.01335" in text

    def test_config_of_another_method(self, tmp_path, tokenizer):
        with pytest.raises(TypeError, match="SPINConfig"):
            SPINTrainer(
                model="./nowhere", args=PreferenceConfig(str(tmp_path), use_cpu=True, bf16=False),
                train_dataset=tiny.preference_data(), processing_class=tokenizer,
            )  # fmt: skip

    def test_data_without_generated_answers(self, tmp_path, tokenizer):
        with pytest.raises(ValueError, match="lacks the column 'chosen' and 'rejected'"):
            trainer_of(tmp_path, tokenizer, "./nowhere", tiny.prompt_completion_data())

    def test_an_explicit_reference(self, tmp_path, tokenizer, model_dir):
        """Allowed, as in TRL: it is then compared with that model."""
        other = tiny.model("llama", tokenizer, seed=1)
        args = SPINConfig(
            str(tmp_path), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=4,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer = SPINTrainer(
            model_dir, ref_model=other, args=args, train_dataset=tiny.preference_data(), processing_class=tokenizer
        )
        start = AutoModelForCausalLM.from_pretrained(model_dir)
        value, expected = expected_of(start, tokenizer, tiny.preference_data().to_list()[:4], other)
        loss, found = loss_and_gradients(trainer)
        assert loss == pytest.approx(value, rel=2e-6)
        assert difference(found, expected) < 1e-5
