"""LD-Align: the worked numbers, its identities, where the weights come from, an independent float64 computation."""

import math
import os
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import two_processes_self_play
from datasets import Dataset
from pairs import anchored, difference, double, logs, loss_and_gradients, make, step_gradients, token_logps
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from trl_ift import LDAlignConfig, LDAlignTrainer, PreferenceTrainer, SPINConfig, SPINTrainer
from trl_ift.latent.weights import NORMALIZATIONS, WeightNormalizer


DISTANCES = [5.0, 0.0, 0.5, 2.0, 0.25, 3.0, 1.0, 0.75]


def pairs(number=8, **columns):
    return anchored(number, **columns)


def trainer_of(tmp_path, tokenizer, model="llama", data=None, cls=LDAlignTrainer, **settings):
    config_class = getattr(cls, "config_class", DPOConfig)
    model = tiny.model(model, tokenizer) if model in tiny.FAMILIES else model
    options = {"beta": 0.02} | settings
    return make(cls, config_class, tmp_path, model, data, tokenizer, **options)


def weights_of(trainer):
    return trainer.train_dataset["weight"][:]


def dpo_of(tmp_path, tokenizer, data, **settings):
    """TRL's sigmoid loss on the same pairs, without weights."""
    data = data.remove_columns([name for name in ("weight", "latent_distance") if name in data.column_names])
    return trainer_of(tmp_path, tokenizer, data=data, cls=PreferenceTrainer, **settings)


# ---------------------------------------------------------------- the worked example


class TestWorkedExample:
    r_real, r_gen = [-1.0, 2.5, 0.5], [-1.5, -1.0, 0.75]
    distances, weights = [5.0, 0.0, 0.5], [2.7272727273, 0.0, 0.2727272727]
    losses, batch_loss = [1.8230717673, 0.0, 0.1924705373], 0.6718474349

    def test_by_hand(self):
        weights = WeightNormalizer.fit(np.array(self.distances), "mean")(np.array(self.distances))
        np.testing.assert_allclose(weights, self.weights, atol=1e-10)
        margins = 0.1 * (np.array(self.r_real) - np.array(self.r_gen))
        losses = weights * np.log1p(np.exp(-margins))
        np.testing.assert_allclose(losses, self.losses, atol=1e-10)
        assert losses.mean() == pytest.approx(self.batch_loss, abs=1e-10)

    def data(self, tokenizer):
        """Pairs with a reference under which the log-ratios are those of the example."""
        model = double(tiny.model("llama", tokenizer))
        rows = tiny.preference_data().to_list()[:3]
        for row, *ratios, distance in zip(rows, self.r_real, self.r_gen, self.distances, strict=True):
            row["latent_distance"] = distance
            for name, ratio in zip(("chosen", "rejected"), ratios, strict=True):
                logp = token_logps(model, tokenizer, row["prompt"], row[name]).sum().item()
                row[f"ref_{name}_logps"] = logp - ratio
        return Dataset.from_list(rows)

    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_through_the_trainer(self, tmp_path, tokenizer, size):
        """The mean over pairs, not divided by the sum of the weights, in batches of any size."""
        trainer = trainer_of(
            tmp_path, tokenizer, data=self.data(tokenizer), beta=0.1, per_device_train_batch_size=size,
            gradient_accumulation_steps=math.ceil(3 / size), max_steps=1,
        )  # fmt: skip
        np.testing.assert_allclose(weights_of(trainer), self.weights, atol=1e-10)
        (loss,), _ = step_gradients(trainer)
        assert loss == pytest.approx(self.batch_loss, rel=3e-6)

    def test_each_pair(self, tmp_path, tokenizer):
        trainer = trainer_of(
            tmp_path, tokenizer, data=self.data(tokenizer), beta=0.1, per_device_train_batch_size=1, max_steps=3,
            learning_rate=0.0,
        )  # fmt: skip
        losses, steps = step_gradients(trainer)
        assert losses == pytest.approx(self.losses, rel=1e-5, abs=1e-9)
        assert all((gradient == 0).all() for gradient in steps[1].values())
        assert all((gradient != 0).any() for step in (steps[0], steps[2]) for gradient in step.values())


# ---------------------------------------------------------------- identities


class TestIdentities:
    @pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
    @pytest.mark.parametrize("columns", [{"weight": [1.0] * 8}, {"latent_distance": [0.3] * 8}], ids=str)
    def test_equal_weights_are_spin_and_dpo(self, tmp_path, tokenizer, model_dir, loss_type, columns):
        options = {"max_steps": 4, "learning_rate": 1e-3, "loss_type": loss_type, "beta": 0.3}
        data = tiny.preference_data()
        for name, values in columns.items():
            data = data.add_column(name, values)
        found = step_gradients(trainer_of(tmp_path, tokenizer, model_dir, data, **options))
        for cls in (SPINTrainer, DPOTrainer):
            expected = step_gradients(
                trainer_of(tmp_path, tokenizer, model_dir, tiny.preference_data(), cls, **options)
            )
            assert found[0] == pytest.approx(expected[0], rel=1e-5)
            for ours, theirs in zip(found[1], expected[1], strict=True):
                assert difference(ours, theirs) < 1e-4

    def test_gradient_of_a_pair_is_the_weight_times_that_of_dpo(self, tmp_path, tokenizer):
        """The weight multiplies, it is no temperature; the pair of weight 0 has none, exactly, and counts in the mean."""
        weights = [2.5, 0.0, 0.4, 1.0]
        data = pairs(4, weight=weights)
        options = {"per_device_train_batch_size": 1, "max_steps": 4, "learning_rate": 0.0}
        losses, found = step_gradients(trainer_of(tmp_path, tokenizer, data=data, **options))
        expected_losses, expected = step_gradients(dpo_of(tmp_path, tokenizer, data, **options))
        assert losses == pytest.approx([w * loss for w, loss in zip(weights, expected_losses, strict=True)], rel=1e-5)
        for weight, ours, theirs in zip(weights, found, expected, strict=True):
            if weight == 0:
                assert all((gradient == 0).all() for gradient in ours.values())
            else:
                assert difference(ours, {name: weight * gradient for name, gradient in theirs.items()}) < 1e-5
        # The batch of all four: their mean
        loss, gradient = loss_and_gradients(trainer_of(tmp_path, tokenizer, data=data))
        assert loss == pytest.approx(sum(losses) / 4, rel=1e-5)
        assert difference(gradient, {name: sum(step[name] for step in found) / 4 for name in gradient}) < 1e-5

    def test_scaling_all_weights(self, tmp_path, tokenizer):
        weights = np.array([2.5, 0.0, 0.4, 1.0])
        loss, gradient = loss_and_gradients(trainer_of(tmp_path, tokenizer, data=pairs(4, weight=weights.tolist())))
        data = pairs(4, weight=(7.5 * weights).tolist())
        scaled, scaled_gradient = loss_and_gradients(trainer_of(tmp_path, tokenizer, data=data))
        assert scaled == pytest.approx(7.5 * loss, rel=1e-5)
        assert difference(scaled_gradient, {name: 7.5 * value for name, value in gradient.items()}) < 1e-5

    @pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "correlation", "exponential"])
    def test_against_float64(self, tmp_path, tokenizer, loss_type):
        data = pairs(4, latent_distance=DISTANCES[:4])
        trainer = trainer_of(tmp_path, tokenizer, data=data, loss_type=loss_type)
        loss, found = loss_and_gradients(trainer)
        twin = double(trainer.model)
        losses = []
        for row in data:
            ratios = [
                token_logps(twin, tokenizer, row["prompt"], row[name]).sum() - row[f"ref_{name}_logps"]
                for name in ("chosen", "rejected")
            ]
            t = 0.02 * (ratios[0] - ratios[1])
            ell = {
                "sigmoid": torch.log(1 + torch.exp(-t)), "hinge": torch.relu(1 - t), "correlation": 1 - t,
                "exponential": torch.exp(-t),
            }[loss_type]  # fmt: skip
            losses.append(row["latent_distance"] / (sum(DISTANCES[:4]) / 4) * ell)
        expected = sum(losses) / 4
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=3e-6)
        assert difference(found, {name: p.grad for name, p in twin.named_parameters()}) < 1e-5

    def test_accumulation(self, tmp_path, tokenizer):
        data = pairs(4, latent_distance=DISTANCES[:4])
        (expected, gradient), *others = [
            step_gradients(
                trainer_of(
                    tmp_path, tokenizer, data=data, max_steps=1, per_device_train_batch_size=size,
                    gradient_accumulation_steps=4 // size,
                )
            )
            for size in (4, 2, 1)
        ]  # fmt: skip
        for losses, (found,) in others:
            assert losses == pytest.approx(expected, rel=3e-6)
            assert difference(found, gradient[0]) < 1e-5


# ---------------------------------------------------------------- where the weights come from


class TestWeights:
    @pytest.mark.parametrize("normalization", [*NORMALIZATIONS, None])
    def test_normalizations(self, tmp_path, tokenizer, normalization):
        data = pairs(latent_distance=DISTANCES)
        trainer = trainer_of(tmp_path, tokenizer, data=data, weight_normalization=normalization)
        d = np.array(DISTANCES)
        expected = {
            "mean": d / d.mean(), "max": d / 5, "minmax": d / 5, "none": d, None: d / d.mean(),
            "sigmoid": 1 / (1 + np.exp(-(d - d.mean()) / d.std())),
        }[normalization]  # fmt: skip
        np.testing.assert_allclose(weights_of(trainer), expected, rtol=1e-12)

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({}, [0.5, 9.0, 0.0, 1.0]),  # as it is
            ({"weight_clip": [0.25, 2]}, [0.5, 2.0, 0.25, 1.0]),
            ({"weight_normalization": "max"}, [1.0, 0.0, 0.1, 0.4]),  # of the distances
            ({"weight_normalization": "max", "weight_clip": (0.2, 0.5)}, [0.5, 0.2, 0.2, 0.4]),
        ],
        ids=str,
    )
    def test_of_both_columns(self, tmp_path, tokenizer, settings, expected):
        data = pairs(4, latent_distance=DISTANCES[:4], weight=[0.5, 9.0, 0.0, 1.0])
        trainer = trainer_of(tmp_path, tokenizer, data=data, **settings)
        np.testing.assert_allclose(weights_of(trainer), expected, rtol=1e-12)
        batch = next(iter(trainer.get_train_dataloader()))
        torch.testing.assert_close(batch["weight"], torch.tensor(expected))

    @pytest.mark.parametrize("max_length", [1024, 12])
    def test_normalised_over_the_rows_that_are_trained(self, tmp_path, tokenizer, max_length):
        """Not over rows that the trainer drops, and not over a batch."""
        rows = tiny.preference_data().to_list()
        rows[0]["rejected"] = rows[0]["chosen"]
        kept = [
            index
            for index, row in enumerate(rows)
            if row["chosen"] != row["rejected"] and len(tokenizer(row["prompt"])["input_ids"]) < max_length
        ]
        assert 2 < len(kept) < (8 if max_length > 12 else 7)
        data = Dataset.from_list([row | {"latent_distance": d} for row, d in zip(rows, DISTANCES, strict=True)])
        trainer = trainer_of(
            tmp_path, tokenizer, data=data, per_device_train_batch_size=1, max_length=max_length, max_steps=len(kept)
        )
        d = np.array(DISTANCES)[kept]
        np.testing.assert_allclose(weights_of(trainer), d / d.mean(), rtol=1e-12)
        trainer.train()
        assert [entry["weights/mean"] for entry in logs(trainer)] == pytest.approx((d / d.mean()).tolist(), rel=1e-6)
        assert [entry["ld_align/latent_distance"] for entry in logs(trainer)] == pytest.approx(d.tolist(), rel=1e-6)

    def test_permuted(self, tmp_path, tokenizer):
        data, order = pairs(latent_distance=DISTANCES), [3, 0, 7, 1, 6, 2, 5, 4]
        plain = weights_of(trainer_of(tmp_path, tokenizer, data=data))
        permuted = weights_of(trainer_of(tmp_path, tokenizer, data=data.select(order)))
        np.testing.assert_allclose(permuted, np.array(plain)[order], rtol=1e-14)

    def test_evaluation_data_use_the_constants_of_training(self, tmp_path, tokenizer):
        train, held_out = pairs(4, latent_distance=DISTANCES[:4]), pairs(3, latent_distance=[100.0, 40.0, 0.0])
        mean = np.mean(DISTANCES[:4])
        trainer = trainer_of(tmp_path, tokenizer, data=train, eval_dataset=held_out, weight_clip=[0.1, 30])
        np.testing.assert_allclose(trainer.eval_dataset["weight"][:], [30, 40 / mean, 0.1], rtol=1e-12)
        plain = dpo_of(tmp_path, tokenizer, held_out, per_device_train_batch_size=1, max_steps=3, learning_rate=0.0)
        losses = step_gradients(plain)[0]
        expected = np.mean(np.array([30, 40 / mean, 0.1]) * losses)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
        # Also data that come later
        later = pairs(2, latent_distance=[1.0, 2.0])
        expected = np.mean(np.array([1.0, 2.0]) / mean * losses[:2])
        assert trainer.evaluate(later)["eval_loss"] == pytest.approx(expected, rel=1e-5)
        assert trainer.predict(later).metrics["test_loss"] == pytest.approx(expected, rel=1e-5)

    def test_evaluation_data_without_weights(self, tmp_path, tokenizer):
        """Their pairs count alike."""
        held_out = pairs(3)
        trainer = trainer_of(tmp_path, tokenizer, data=pairs(4, latent_distance=DISTANCES[:4]), eval_dataset=held_out)
        plain = trainer_of(tmp_path, tokenizer, data=held_out, eval_dataset=held_out, cls=SPINTrainer)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)

    def test_evaluation_data_nearer_than_any_trained_pair(self, tmp_path, tokenizer):
        held_out = pairs(2, latent_distance=[0.25, 2.5])
        trainer = trainer_of(
            tmp_path, tokenizer, data=pairs(4, latent_distance=[1.0, 2.0, 3.0, 5.0]), eval_dataset=held_out,
            weight_normalization="minmax",
        )  # fmt: skip
        assert trainer.eval_dataset["weight"][:] == [0.0, 0.375]
        assert math.isfinite(trainer.evaluate()["eval_loss"])

    @pytest.mark.parametrize("stream", [False, True])
    def test_evaluation_data_with_weights_of_another_origin(self, tmp_path, tokenizer, stream):
        """Where the trained weights are made of distances, a stored one is on another scale: it is left aside."""
        train, held_out = pairs(4, latent_distance=DISTANCES[:4]), pairs(3, weight=[70.0, 0.0, 9.0])
        losses = [
            trainer_of(tmp_path, tokenizer, data=train, eval_dataset=dataset).evaluate()["eval_loss"]
            for dataset in (pairs(3), held_out.to_iterable_dataset() if stream else held_out)
        ]
        assert losses[1] == pytest.approx(losses[0], rel=1e-6)

    def test_streams(self, tmp_path, tokenizer):
        """Their weights are there already; evaluation data then need none either."""
        weights = [2.5, 0.0, 0.4, 1.0]
        data = pairs(4, weight=weights, latent_distance=DISTANCES[:4])
        expected, gradient = loss_and_gradients(trainer_of(tmp_path, tokenizer, data=data))
        stream = data.to_iterable_dataset()
        for held_out in (pairs(3), pairs(3).to_iterable_dataset(), pairs(3, weight=weights[:3])):
            trainer = trainer_of(tmp_path, tokenizer, data=stream, eval_dataset=held_out)
            loss, found = loss_and_gradients(trainer)
            assert loss == pytest.approx(expected, rel=1e-6)
            assert difference(found, gradient) < 1e-6
            metrics = trainer.evaluate()
            assert ("eval_weights/mean" in metrics) == ("weight" in next(iter(held_out)))

    def test_streams_of_evaluation_data(self, tmp_path, tokenizer):
        """Their distances are normalised as those of a dataset in memory."""
        held_out = pairs(3, latent_distance=[100.0, 40.0, 0.0])
        losses = [
            trainer_of(
                tmp_path, tokenizer, data=pairs(4, latent_distance=DISTANCES[:4]), eval_dataset=dataset
            ).evaluate()["eval_loss"]
            for dataset in (held_out, held_out.to_iterable_dataset())
        ]
        assert losses[1] == pytest.approx(losses[0], rel=1e-6)


# ---------------------------------------------------------------- input


class TestConfig:
    def config(self, tmp_path, **settings):
        return LDAlignConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)

    def test_defaults(self, tmp_path):
        ours, theirs = self.config(tmp_path), SPINConfig(str(tmp_path), use_cpu=True, bf16=False)
        assert (ours.weight_normalization, ours.weight_clip) == (None, None)
        for field in fields(SPINConfig):
            if field.name not in ("run_name", "logging_dir"):
                assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
        assert LDAlignTrainer.own_options() == ["weight_normalization", "weight_clip"]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"weight_normalization": "median"}, "`weight_normalization='median'` is not known. Choose one of: 'mean', 'max'"),
            ({"weight_clip": [0.1]}, r"`weight_clip=\[0.1\]`: expected two numbers"),
            ({"weight_clip": 5.0}, "`weight_clip=5.0`: expected two numbers"),
            ({"weight_clip": [-1.0, 5.0]}, r"`weight_clip\[0\]=-1.0` is out of range"),
            ({"weight_clip": [2.0, 2.0]}, r"`weight_clip\[1\]=2.0` is out of range"),
            ({"weight_clip": [0.1, math.nan]}, r"`weight_clip\[1\]=nan` is out of range"),
            ({"loss_type": "ipo"}, "`loss_type='ipo'` is not known"),
            ({"label_smoothing": 0.1}, "`label_smoothing=0.1` has no effect"),
        ],
    )  # fmt: skip
    def test_wrong_options_are_refused(self, tmp_path, settings, message):
        with pytest.raises((ValueError, TypeError), match=message):
            self.config(tmp_path, **settings)

    def test_round_trip(self, tmp_path):
        config = self.config(tmp_path, weight_normalization="minmax", weight_clip=[0.1, 5.0], loss_type="hinge")
        known = {field.name for field in fields(config) if field.init}
        again = LDAlignConfig(**{name: value for name, value in config.to_dict().items() if name in known})
        assert again.to_dict() == config.to_dict()
        assert replace(config).to_dict() == config.to_dict()


class TestData:
    @pytest.mark.parametrize(
        ("columns", "settings", "stream", "message"),
        [
            ({}, {}, False, "has neither 'weight' nor 'latent_distance'; its columns are .*train with `SPINTrainer`"),
            ({}, {}, True, "has neither 'weight' nor 'latent_distance'"),
            (
                {"weight": [1.0] * 4}, {"weight_normalization": "mean"}, False,
                "`weight_normalization='mean'` needs the column 'latent_distance'",
            ),
            ({"weight": [1.0, 2.0, math.nan, 1.0]}, {}, False, "`train_dataset`, row 2: column 'weight' holds nan"),
            ({"weight": [1.0, -2.0, 1.0, 1.0]}, {}, False, "row 1: column 'weight' holds -2.0, expected .* in \\[0, inf\\]"),
            ({"weight": [1.0, 1.0, 1.0, math.inf]}, {}, False, "row 3: column 'weight' holds inf"),
            ({"latent_distance": [1.0, math.nan, 1.0, 1.0]}, {}, False, "row 1: column 'latent_distance' holds nan"),
            ({"latent_distance": [-1.0, 1.0, 1.0, 1.0]}, {}, False, "row 0: column 'latent_distance' holds -1.0"),
            ({"latent_distance": [1.0, None, 1.0, 1.0]}, {}, False, "row 1: column 'latent_distance' must hold numbers"),
            ({"weight": ["1", "2", "3", "4"]}, {}, False, "row 0: column 'weight' must hold numbers, found '1'"),
            ({"latent_distance": [1.0] * 4}, {}, True, "is a stream, and the weights are computed over all of it"),
            ({"weight": [1.0] * 4}, {"weight_clip": [0.1, 5]}, True, "is a stream, and the weights are computed"),
            (
                {"weight": [1.0] * 4, "latent_distance": [1.0] * 4}, {"weight_normalization": "max"}, True,
                "is a stream, and the weights are computed",
            ),
        ],
    )  # fmt: skip
    def test_refused_before_the_model_loads(self, tmp_path, tokenizer, columns, settings, stream, message):
        data = pairs(4, **columns)
        with pytest.raises((ValueError, TypeError), match=message):
            trainer_of(
                tmp_path, tokenizer, "./nowhere", data=data.to_iterable_dataset() if stream else data, **settings
            )

    def test_bad_weight_of_a_stream(self, tmp_path, tokenizer):
        data = pairs(4, weight=[1.0, 2.0, math.nan, 1.0]).to_iterable_dataset()
        with pytest.raises(ValueError, match="column 'weight' holds nan"):
            trainer_of(tmp_path, tokenizer, data=data).train()

    def test_bad_distances_of_evaluation_data(self, tmp_path, tokenizer):
        held_out = pairs(3, latent_distance=[1.0, 1.0, math.nan])
        with pytest.raises(ValueError, match="`eval_dataset`, row 2: column 'latent_distance' holds nan"):
            trainer_of(
                tmp_path, tokenizer, "./nowhere", data=pairs(4, latent_distance=[1.0] * 4), eval_dataset=held_out
            )

    def test_config_of_spin(self, tmp_path, tokenizer):
        with pytest.raises(TypeError, match="LDAlignConfig"):
            LDAlignTrainer(
                model="./nowhere", args=SPINConfig(str(tmp_path), use_cpu=True, bf16=False),
                train_dataset=pairs(weight=[1.0] * 8), processing_class=tokenizer,
            )  # fmt: skip


# ---------------------------------------------------------------- runs


class TestTrainer:
    @pytest.mark.parametrize(
        "settings", [{"precompute_ref_log_probs": True}, {"peft_config": LoraConfig(r=4, target_modules="all-linear")}],
        ids=["precompute", "lora"],
    )  # fmt: skip
    def test_resumed_equals_uninterrupted(self, tmp_path, tokenizer, model_dir, settings):
        data = tiny.preference_data().add_column("latent_distance", DISTANCES)

        def trainer():
            torch.manual_seed(0)  # of a new adapter
            return trainer_of(
                tmp_path, tokenizer, model_dir, data, max_steps=6, save_strategy="steps", save_steps=3, beta=0.3,
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

    def test_it_learns_the_pairs_that_count(self, tmp_path, tokenizer):
        """Of pairs that ask for opposite answers, the one with the weight wins."""
        row = tiny.preference_data()[0]
        flipped = row | {"chosen": row["rejected"], "rejected": row["chosen"]}
        for weights, sign in (((1.0, 0.1), 1), ((0.1, 1.0), -1)):
            data = Dataset.from_list([row | {"weight": weights[0]}, flipped | {"weight": weights[1]}])
            trainer = trainer_of(tmp_path, tokenizer, data=data, max_steps=8, per_device_train_batch_size=2, beta=0.3)
            trainer.train()
            held_out = trainer.evaluate(Dataset.from_list([row]))
            assert sign * held_out["eval_rewards/margins"] > 0.5

    def test_card(self, tmp_path, tokenizer):
        data = tiny.preference_data().add_column("latent_distance", DISTANCES)
        trainer = trainer_of(tmp_path, tokenizer, data=data, weight_normalization="max", weight_clip=[0.1, 5.0])
        trainer.create_model_card()
        text = Path(trainer.args.output_dir, "README.md").read_text()
        for line in ("| `weight_normalization` | `max` |", "| `weight_clip` | `[0.1, 5.0]` |", "2404.06390"):
            assert line in text


@pytest.mark.slow
def test_two_processes(tmp_path, tokenizer):
    """2 gloo processes with 2 micro-batches of 1 pair = 1 process with 1 batch of 4: loss, gradients, metrics."""
    program = two_processes_self_play.__file__
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", program]
    process = subprocess.Popen(
        [*command, "trainer", str(tmp_path)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        _, errors = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # torchrun's workers too
        raise
    assert process.returncode == 0, errors[-3000:]
    entry, gradient = torch.load(tmp_path / "found.pt")
    expected, (expected_gradient,) = two_processes_self_play.step(tmp_path / "one")
    assert difference(gradient, expected_gradient) < 1e-5
    for name in ("loss", "weights/mean", "ld_align/latent_distance", "rewards/margins", "grad_norm"):
        assert entry[name] == pytest.approx(expected[name], rel=1e-5), name
