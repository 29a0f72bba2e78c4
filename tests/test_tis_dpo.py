"""TIS-DPO: token columns, the weighted loss, and the weights that a positive and a negative model give."""

import copy
import math
import os

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from pairs import difference, double, gradients, loss_and_gradients, make, step_gradients, token_logps
from study import settings, write_inputs
from torch import tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from trl_ift import PreferenceConfig, PreferenceTrainer, TISDPOConfig, TISDPOTrainer
from trl_ift.cli import main
from trl_ift.data import estimate_token_weights
from trl_ift.data import token_weights as module
from trl_ift.data.token_weights import TRANSFORMS, token_weights, unit_weights
from trl_ift.preference import trainer as base_module
from trl_ift.preference.collator import Branch, PreferenceCollator, TokenColumn
from trl_ift.preference.tis_dpo import CHOSEN_WEIGHTS, REJECTED_WEIGHTS, tis_dpo_loss
from trl_ift.preference.trainer import PreferenceTrainer as Base
from trl_ift.study import run as run_module
from trl_ift.study.costs import measure_costs
from trl_ift.study.plan import Study
from trl_ift.study.run import run_study


D_W = np.array([-0.2, -1.0, -2.5, -0.7]) - np.array([-0.9, -0.4, -2.6, -3.0])
D_L = np.array([-1.1, -0.3, -2.0]) - np.array([-0.3, -0.5, -1.2])
U_W = np.array([-0.3, -0.8, -2.0, -0.6]) - np.array([-0.5, -0.9, -1.8, -1.0])
U_L = np.array([-1.0, -0.6, -1.9]) - np.array([-0.8, -0.4, -2.0])


# ---------------------------------------------------------------- transforms


@pytest.mark.parametrize(
    ("transform", "chosen", "rejected"),
    [
        ("exp", [2.0137527075, 0.6065306597, 1.1051709181, 4.4816890703], [1.6487212707, 0.8187307531, 1.6487212707]),
        ("threshold_and_scale", [1.14, 0.88, 1.02, 1.30], [1.16, 0.96, 1.16]),
        ("rank_based", [1.1, 0.7, 0.9, 1.3], [1.0, 0.7, 1.3]),
        ("threshold", [0.7, -0.6, 0.1, 1.5], [0.8, -0.2, 0.8]),
        ("origin", [0.7, -0.6, 0.1, 2.3], [0.8, -0.2, 0.8]),
        ("binary", [1, 1, 1, 1], [1, 1, 1]),
    ],
)
def test_numbers(transform, chosen, rejected):
    np.testing.assert_allclose(token_weights(D_W, False, transform), chosen, atol=1e-9)
    np.testing.assert_allclose(token_weights(D_L, True, transform), rejected, atol=1e-9)


@pytest.mark.parametrize(("transform", "expected"), [("exp", 0.5819314478), ("rank_based", 0.6520289214)])
def test_numbers_of_the_loss(transform, expected):
    r_w = tensor((token_weights(D_W, False, transform) * U_W).sum())[None]
    r_l = tensor((token_weights(D_L, True, transform) * U_L).sum())[None]
    assert tis_dpo_loss(r_w, r_l, 0.1).item() == pytest.approx(expected, abs=1e-9)


class TestTransforms:
    def test_bounds_of_exp(self):
        d = np.linspace(-50, 50, 101)
        chosen, rejected = token_weights(d), token_weights(d, rejected=True)
        assert (chosen.min(), chosen.max()) == pytest.approx((math.exp(-0.5), math.exp(1.5)))
        assert (rejected.min(), rejected.max()) == pytest.approx((math.exp(-1.5), math.exp(0.5)))

    def test_equal_models(self):
        for rejected in (False, True):
            np.testing.assert_array_equal(token_weights(np.zeros(5), rejected), np.ones(5))
            np.testing.assert_array_equal(token_weights(np.zeros(5), rejected, weight_k=3.0), np.full(5, 3.0))

    def test_swapped_models_reverse_the_ranks(self):
        for d in (D_W, np.array([0.3, -2.0, 5.0, 0.1, 0.2])):
            forth, back = token_weights(d, False, "rank_based"), token_weights(-d, False, "rank_based")
            np.testing.assert_allclose(forth + back, 2.0)
            np.testing.assert_allclose(back, token_weights(d, True, "rank_based"))

    def test_ranks(self):
        np.testing.assert_allclose(token_weights(np.array([7.0]), False, "rank_based"), [1.0])
        np.testing.assert_allclose(token_weights(np.zeros(3), False, "rank_based"), [0.7, 1.0, 1.3])  # in their order
        np.testing.assert_allclose(token_weights(np.zeros(3), True, "rank_based"), [0.7, 1.0, 1.3])
        found = token_weights(D_W, False, "rank_based", scale_min=0.0, scale_max=3.0)
        np.testing.assert_allclose(found, [2, 0, 1, 3])

    @pytest.mark.parametrize(("percent", "ones"), [(0, 0), (1, 1), (50, 2), (51, 3), (100, 4)])
    def test_binary(self, percent, ones):
        found = token_weights(D_W, False, "binary", top_percent=percent)
        assert found.sum() == ones
        assert set(np.argsort(D_W)[::-1][:ones]) == set(found.nonzero()[0])

    def test_random(self):
        found = token_weights(np.zeros(1000), False, "random", seed=1)
        assert 0.7 <= found.min() < 0.71
        assert 1.29 < found.max() <= 1.3
        np.testing.assert_array_equal(found, token_weights(D_W.repeat(250), True, "random", seed=1))
        assert (found != token_weights(np.zeros(1000), False, "random", seed=2)).all()

    @pytest.mark.parametrize("transform", TRANSFORMS)
    def test_no_tokens(self, transform):
        assert token_weights(np.zeros(0), False, transform).shape == (0,)


# ---------------------------------------------------------------- token columns


def weighted_data(tokenizer, number=8, scale=None, **settings):
    """Pairs with weights between 0 and 2, or all `scale`."""
    generator = torch.Generator().manual_seed(0)

    def weigh(row):
        ones = unit_weights(row, tokenizer)
        if scale is not None:
            return {name: [scale] * len(values) for name, values in ones.items()}
        return {name: (2 * torch.rand(len(values), generator=generator)).tolist() for name, values in ones.items()}

    rows = tiny.preference_data().to_list()[:number]
    return Dataset.from_list([row | weigh(row) for row in rows])


class TestTokenColumn:
    rows = (
        {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6], "a": [0.5, 0.25], "b": [3.0]},
        {
            "prompt_ids": [7],
            "chosen_ids": [9],
            "rejected_ids": [10, 11, 12, 13, 14],
            "a": [2.0],
            "b": [1.0, 2, 3, 4, 5],
        },
    )
    columns = (TokenColumn("a"), TokenColumn("b", response="rejected"))

    def collate(self, **options):
        return PreferenceCollator(pad_token_id=0, columns=self.columns, **options)([dict(row) for row in self.rows])

    def test_stands_where_the_tokens_do(self):
        batch = self.collate()
        assert batch["a"].tolist() == [[0, 0, 0, 0.5, 0.25, 0], [0, 2, 0, 0, 0, 0]]
        assert batch["b"].tolist() == [[0, 0, 0, 3, 0, 0], [0, 1, 2, 3, 4, 5]]
        for name, mask in zip("ab", batch["completion_mask"].chunk(2), strict=True):
            torch.testing.assert_close((batch[name] != 0).long(), mask)

    def test_is_truncated_with_them(self):
        batch = self.collate(max_length=4)
        assert batch["a"].tolist() == [[0, 0, 0, 0.5], [0, 2, 0, 0]]
        assert batch["b"].tolist() == [[0, 0, 0, 3], [0, 1, 2, 3]]
        batch = self.collate(max_length=4, truncation_mode="keep_end")
        assert batch["a"].tolist() == [[0, 0, 0.5, 0.25], [0, 2, 0, 0]]
        assert batch["b"].tolist() == [[0, 0, 0, 3], [2, 3, 4, 5]]

    def test_is_padded_with_them(self):
        assert self.collate(pad_to_multiple_of=8)["b"].shape == (2, 8)

    @pytest.mark.parametrize(
        ("value", "error", "message"),
        [
            ([1.0], ValueError, r"column 'a' holds 1 numbers, and 'chosen' has 2 tokens"),
            ([1.0, math.nan], ValueError, r"column 'a' holds nan"),
            ([1.0, math.inf], ValueError, r"column 'a' holds inf"),
            (
                [1.0, "x"],
                TypeError,
                r"must hold a list of numbers, one a token of 'chosen', found a list like \['?1.0",
            ),
            (1.0, TypeError, r"must hold a list of numbers, one a token of 'chosen', found float"),
            (None, TypeError, r"must hold a list of numbers"),
            ([True, False], TypeError, r"must hold a list of numbers"),
        ],
    )
    def test_wrong_values(self, value, error, message):
        rows = [self.rows[0] | {"a": value}]
        with pytest.raises(error, match=message):
            PreferenceCollator(pad_token_id=0, columns=self.columns)(rows)

    def test_range(self):
        column = TokenColumn("a", low=0.0)
        column.check([0.0, 5.0], "here")
        with pytest.raises(ValueError, match=r"here: column 'a' holds -1.0, expected a finite number in \[0, inf\]"):
            column.check([0.0, -1.0], "here")


# ---------------------------------------------------------------- the trainer


def trainer_of(tmp_path, tokenizer, data=None, cls=TISDPOTrainer, config=TISDPOConfig, reference=True, **settings):
    given = {"ref_model": reference_of(tokenizer)} if reference else {}
    data = weighted_data(tokenizer, 4) if data is None else data

    def make_it(**arguments):
        return cls(**arguments, **given)

    return make(make_it, config, tmp_path, tiny.model("llama", tokenizer), data, tokenizer, **settings)


def reference_of(tokenizer):
    reference = tiny.model("llama", tokenizer)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return reference


def expected_loss(policy, reference, tokenizer, rows, beta):
    losses = []
    for row in rows:
        sums = []
        for kind in ("chosen", "rejected"):
            tokens = token_logps(policy, tokenizer, row["prompt"], row[kind])
            with torch.no_grad():
                ref_tokens = token_logps(reference, tokenizer, row["prompt"], row[kind])
            sums.append(((tokens - ref_tokens) * torch.tensor(row[f"{kind}_weights"], dtype=torch.float64)).sum())
        losses.append(-logsigmoid(beta * (sums[0] - sums[1])))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("settings", [{}, {"precompute_ref_log_probs": True}], ids=["live", "stored"])
def test_loss_and_gradients(tmp_path, tokenizer, settings):
    trainer = trainer_of(tmp_path, tokenizer, beta=0.5, **settings)
    loss, found = loss_and_gradients(trainer)
    twin = double(trainer.model)
    rows = weighted_data(tokenizer, 4).to_list()
    expected = expected_loss(twin, double(reference_of(tokenizer)), tokenizer, rows, 0.5)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert difference(found, gradients(twin)) < 2e-5
    rewards = [trainer._metrics["train"][f"rewards/{kind}"][-1] for kind in ("chosen", "rejected")]
    assert trainer._metrics["train"]["rewards/margins"][-1] == pytest.approx(rewards[0] - rewards[1], abs=1e-5)
    for kind in ("chosen", "rejected"):
        mean = np.concatenate([row[f"{kind}_weights"] for row in rows]).mean()
        total, count = trainer._sums["train"][f"tis_dpo/{kind}_weight"].tolist()
        assert total / count == pytest.approx(mean, rel=1e-6)


def test_stored_sums_are_not_those_of_dpo(tmp_path, tokenizer, monkeypatch):
    """The same data and reference, stored for DPO first: the cache tells the two apart."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    weighted_data(tokenizer, 4).to_parquet(tmp_path / "pairs.parquet")
    found = []
    for cls, config in ((PreferenceTrainer, PreferenceConfig), (TISDPOTrainer, TISDPOConfig)):
        data = datasets.load_dataset("parquet", data_files=str(tmp_path / "pairs.parquet"), split="train")
        trainer = trainer_of(tmp_path, tokenizer, data, cls, config, precompute_ref_log_probs=True)
        found.append(trainer.train_dataset["ref_chosen_logps"][:])
    assert (np.abs(np.subtract(*found)) > 0.1).all()


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_constant_weights_are_dpo_with_another_beta(tmp_path, tokenizer, scale):
    ours = trainer_of(tmp_path, tokenizer, weighted_data(tokenizer, 4, scale=scale), beta=0.3)
    theirs = trainer_of(tmp_path, tokenizer, tiny.preference_data().select(range(4)), PreferenceTrainer, PreferenceConfig,
                        beta=0.3 * scale)  # fmt: skip
    (loss, found), (value, expected) = loss_and_gradients(ours), loss_and_gradients(theirs)
    assert loss == pytest.approx(value, rel=1e-6)
    assert difference(found, expected) < 1e-5
    metrics, others = ours._metrics["train"], theirs._metrics["train"]
    assert metrics["rewards/margins"][-1] == pytest.approx(others["rewards/margins"][-1], rel=1e-4)
    assert metrics["logps/chosen"][-1] == pytest.approx(scale * others["logps/chosen"][-1], rel=1e-4)


def test_no_weight_on_rejected_tokens(tmp_path, tokenizer):
    """-log sigma(beta sum w u(y_w)): nothing flows into the rejected responses."""
    rows = [
        row | {"rejected_weights": [0.0] * len(row["rejected_weights"])}
        for row in weighted_data(tokenizer, 4).to_list()
    ]
    loss, _ = loss_and_gradients(trainer_of(tmp_path, tokenizer, Dataset.from_list(rows), beta=0.5))
    rows = [row | {"rejected": " ZQ", "rejected_weights": [0.0] * 4} for row in rows]
    other, _ = loss_and_gradients(trainer_of(tmp_path, tokenizer, Dataset.from_list(rows), beta=0.5))
    assert loss == pytest.approx(other, rel=1e-5)


def test_a_weight_scales_the_gradient_of_its_token(tmp_path, tokenizer):
    trainer = trainer_of(tmp_path, tokenizer)
    weights = {"chosen_weights": tensor([[1.0, 2.0, 0.5]]), "rejected_weights": tensor([[1.0, 1.0, 1.0]])}
    found = []
    for factor in (1.0, 3.0):
        tokens = torch.full((2, 3), -1.0, requires_grad=True)
        scaled = torch.cat(list(weights.values())) * tensor([[1.0, factor, 1.0], [1.0, 1.0, 1.0]])
        r = (tokens * scaled).sum(1)
        (gradient,) = torch.autograd.grad(tis_dpo_loss(r[:1], r[1:], trainer.beta).sum(), tokens)
        found.append(gradient / gradient[1, 0])  # in units of the pair's
    torch.testing.assert_close(found[1], found[0] * tensor([[1.0, 3.0, 1.0], [1.0, 1.0, 1.0]]))


def test_first_step_agrees_with_its_own_reference(tmp_path, tokenizer):
    """A policy that is its own reference has rewards of 0, with a live and with a stored reference."""
    for stored in (False, True):
        trainer = trainer_of(tmp_path, tokenizer, reference=False, precompute_ref_log_probs=stored, max_steps=1,
                             overwrite_output_dir=True)  # fmt: skip
        trainer.train()
        entry = trainer.state.log_history[0]
        assert entry["loss"] == pytest.approx(math.log(2), abs=1e-3)
        assert entry["rewards/chosen"] == pytest.approx(0, abs=1e-4)
        assert 0.5 < entry["tis_dpo/chosen_weight"] < 1.5


def test_accumulation(tmp_path, tokenizer):
    steps = []
    for size in (4, 1):
        trainer = trainer_of(tmp_path, tokenizer, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size,
                             max_steps=1, overwrite_output_dir=True)  # fmt: skip
        steps.append(step_gradients(trainer))
    ((whole,), (gradient,)), ((parts,), (summed,)) = steps
    assert parts == pytest.approx(whole, abs=2e-4)
    assert difference(summed, gradient) < 1e-5


@pytest.mark.slow
def test_two_processes(tmp_path, monkeypatch):
    import two_processes_tokens  # which imports this file

    assert max(two_processes_tokens.check(monkeypatch, "tis-dpo", tmp_path).values()) < 1e-5


def test_streams_and_evaluation(tmp_path, tokenizer):
    data = weighted_data(tokenizer)
    trainer = trainer_of(
        tmp_path, tokenizer, data.to_iterable_dataset(), eval_dataset=data.select(range(4)), max_steps=2
    )
    trainer.train()
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert math.isfinite(trainer.evaluate(data.select(range(4, 8)))["eval_loss"])


def test_evaluation_on_its_own_dataset(tmp_path, tokenizer):
    """Sums that the trainer has stored are weighted; of others that is not known."""
    data = weighted_data(tokenizer)
    trainer = trainer_of(tmp_path, tokenizer, data, eval_dataset=data, precompute_ref_log_probs=True)
    expected = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(trainer.eval_dataset)["eval_loss"] == expected
    assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="weighs the tokens of a response, and the columns"):
        trainer_of(tmp_path / "other", tokenizer, trainer.train_dataset)


def test_a_refused_collator_leaves_nothing_in_the_cache(tmp_path, tokenizer, monkeypatch):
    """Sums without the weights are not found by the next trainer."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    weighted_data(tokenizer, 4).to_parquet(tmp_path / "pairs.parquet")

    def rows(**settings):
        data = datasets.load_dataset("parquet", data_files=str(tmp_path / "pairs.parquet"), split="train")
        return trainer_of(tmp_path, tokenizer, data, precompute_ref_log_probs=True, **settings).train_dataset

    plain = PreferenceCollator(pad_token_id=tokenizer.pad_token_id)
    with pytest.raises(ValueError, match=r"`data_collator` \(PreferenceCollator\) leaves out 'chosen_weights'"):
        rows(data_collator=plain)
    expected = trainer_of(
        tmp_path, tokenizer, weighted_data(tokenizer, 4), precompute_ref_log_probs=True
    ).train_dataset
    assert rows()["ref_chosen_logps"][:] == pytest.approx(expected["ref_chosen_logps"][:], rel=1e-5)


def test_code_of_a_model_is_run_for_its_tokenizer(tmp_path, tokenizer, monkeypatch):
    """`trust_remote_code` counts for the tokenizer that the first row is checked with."""
    seen = []
    monkeypatch.setattr(
        base_module, "load_tokenizer", lambda model, given, options: (seen.append(options), tokenizer)[1]
    )
    with pytest.raises(ValueError, match="the first row: column 'chosen_weights' holds"):
        data = Dataset.from_list([weighted_data(tokenizer, 1)[0] | {"chosen_weights": [1.0]}])
        trainer_of(tmp_path, tokenizer, data, trust_remote_code=True, model_init_kwargs={"revision": "x"})
    assert seen == [{"trust_remote_code": True, "revision": "x"}]


def test_prompt_tuning_shifts_nothing(tmp_path, tokenizer):
    """Virtual tokens stand before the outputs: weights of 1 still give DPO."""
    from peft import PromptTuningConfig

    losses = []
    for cls, config, data in (
        (TISDPOTrainer, TISDPOConfig, weighted_data(tokenizer, 4, scale=1.0)),
        (PreferenceTrainer, PreferenceConfig, tiny.preference_data().select(range(4))),
    ):
        torch.manual_seed(0)
        peft_config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        trainer = trainer_of(tmp_path, tokenizer, data, cls, config, reference=False, peft_config=peft_config)
        losses.append(loss_and_gradients(trainer)[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


class TestBadInput:
    def broken(self, tokenizer, change):
        rows = weighted_data(tokenizer, 4).to_list()
        change(rows)
        return Dataset.from_list(rows)

    def test_no_weights(self, tmp_path, tokenizer):
        message = "lacks the column 'chosen_weights' and 'rejected_weights'.*`trl-ift token-weights`"
        with pytest.raises(ValueError, match=message):
            trainer_of(tmp_path, tokenizer, tiny.preference_data())

    @pytest.mark.parametrize("row", [0, 2])
    def test_wrong_length(self, tmp_path, tokenizer, row):
        data = self.broken(tokenizer, lambda rows: rows[row]["rejected_weights"].append(1.0))
        where = "the first row" if row == 0 else "the train dataset, row 2 of 4"
        message = rf"{where}: column 'rejected_weights' holds \d+ numbers, and 'rejected' has \d+ tokens"
        with pytest.raises(ValueError, match=message):
            trainer_of(tmp_path, tokenizer, data)

    def test_wrong_length_is_found_before_the_model_is_loaded(self, tmp_path, model_dir, tokenizer, monkeypatch):
        def refuse(*args, **kwargs):
            raise AssertionError("a model was loaded")

        monkeypatch.setattr("trl.trainer.dpo_trainer.create_model_from_path", refuse)
        data = self.broken(tokenizer, lambda rows: rows[0]["chosen_weights"].pop())
        with pytest.raises(ValueError, match="the first row: column 'chosen_weights' holds"):
            TISDPOTrainer(model_dir, args=TISDPOConfig(str(tmp_path), use_cpu=True, bf16=False), train_dataset=data)

    def test_null_weight(self, tmp_path, tokenizer):
        data = self.broken(tokenizer, lambda rows: rows[1]["chosen_weights"].__setitem__(0, None))
        with pytest.raises(ValueError, match="`train_dataset`, row 1: column 'chosen_weights' holds nan"):
            trainer_of(tmp_path, tokenizer, data)

    def test_null_weights(self, tmp_path, tokenizer):
        data = self.broken(tokenizer, lambda rows: rows[1].__setitem__("chosen_weights", None))
        with pytest.raises(
            TypeError, match="`train_dataset`, row 1: column 'chosen_weights' must hold a list of numbers"
        ):
            trainer_of(tmp_path, tokenizer, data)

    def test_stored_reference_of_dpo(self, tmp_path, tokenizer):
        data = self.broken(
            tokenizer, lambda rows: [row.update(ref_chosen_logps=-5.0, ref_rejected_logps=-6.0) for row in rows]
        )
        with pytest.raises(ValueError, match="TISDPOTrainer weighs the tokens of a response, and the columns"):
            trainer_of(tmp_path, tokenizer, data, reference=False)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"ld_alpha": 0.5}, "`ld_alpha=0.5` weighs the tokens of a response by their place"),
            ({"loss_type": "ipo"}, "`loss_type='ipo'` has no effect on this method's loss"),
            ({"beta": -1.0}, "`beta=-1.0` is out of range"),
        ],
    )
    def test_wrong_options(self, tmp_path, settings, message):
        with pytest.raises(ValueError, match=message):
            TISDPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_token_weights_are_a_feature_of_the_base(tmp_path, tokenizer):
    """TRL's own losses see the weighted sums too."""

    class Weighted(Base):
        columns = (CHOSEN_WEIGHTS, REJECTED_WEIGHTS)
        token_weights = ("chosen_weights", "rejected_weights")

    for stored in (False, True):
        settings = {"precompute_ref_log_probs": stored, "beta": 0.5}
        base = trainer_of(tmp_path, tokenizer, cls=Weighted, config=PreferenceConfig, **settings)
        (loss, found), (value, expected) = (
            loss_and_gradients(trainer) for trainer in (base, trainer_of(tmp_path, tokenizer, beta=0.5))
        )
        assert loss == pytest.approx(value, rel=1e-5)
        assert difference(found, expected) < 1e-5


def test_token_weights_beside_a_longer_branch(tmp_path, tokenizer):
    """A third response that widens the batch moves no weight."""

    class WithGold(TISDPOTrainer):
        branches = (Branch("gold", column="reference"),)

    rows = [row | {"reference": " ZQXVJ" * 12} for row in weighted_data(tokenizer, 4).to_list()]
    for stored in (False, True):
        trainer = trainer_of(
            tmp_path, tokenizer, Dataset.from_list(rows), cls=WithGold, precompute_ref_log_probs=stored
        )
        loss, found = loss_and_gradients(trainer)
        value, expected = loss_and_gradients(trainer_of(tmp_path, tokenizer, precompute_ref_log_probs=stored))
        assert loss == pytest.approx(value, rel=1e-5)
        assert difference(found, expected) < 1e-5


# ---------------------------------------------------------------- the estimation


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer):
    """Folders of a positive and a negative model, and the models."""
    folder, found = tmp_path_factory.mktemp("models"), {}
    for seed, name in enumerate(("positive", "negative")):
        model = tiny.model("llama", tokenizer, seed=seed + 5)
        for part in (model, tokenizer):
            part.save_pretrained(folder / name)
        found[name] = AutoModelForCausalLM.from_pretrained(folder / name)
    return folder, found


def differences_of(models, tokenizer, row, kind):
    with torch.no_grad():
        positive, negative = (
            token_logps(models[name], tokenizer, row["prompt"], row[kind]).double()
            for name in ("positive", "negative")
        )
    return (positive - negative).numpy()


@pytest.mark.parametrize("kind", ["chosen", "rejected"])
def test_estimation(models, tokenizer, kind):
    """Against log-probabilities of one unpadded sequence at a time; models by name, and in memory."""
    folder, loaded = models
    data = tiny.preference_data()
    named = estimate_token_weights(
        data, str(folder / "positive"), str(folder / "negative"), eos_weight=None, shard_size=3, batch_tokens=64
    )
    given = estimate_token_weights(
        data, loaded["positive"], loaded["negative"], processing_class=tokenizer, eos_weight=None
    )
    assert named.column_names == [*data.column_names, "chosen_weights", "rejected_weights"]
    for row, other in zip(named, given, strict=True):
        expected = token_weights(differences_of(loaded, tokenizer, row, kind), kind == "rejected")
        np.testing.assert_allclose(row[f"{kind}_weights"], expected, rtol=1e-4)
        np.testing.assert_allclose(other[f"{kind}_weights"], expected, rtol=1e-4)


def test_the_end_of_sequence(models, tokenizer):
    _, loaded = models
    data = tiny.preference_data().select(range(2))
    models = loaded["positive"], loaded["negative"]
    found = {
        weight: estimate_token_weights(
            data, *models, processing_class=tokenizer, weight_transform="rank_based", eos_weight=weight
        )
        for weight in (None, 1.0, 0.0)
    }
    for estimated, one, zero in zip(*found.values(), strict=True):
        row = one["chosen_weights"]
        assert (row[-1], zero["chosen_weights"][-1]) == (1, 0)
        assert row[:-1] == zero["chosen_weights"][:-1]
        d = differences_of(loaded, tokenizer, one, "chosen")
        np.testing.assert_allclose(row[:-1], token_weights(d[:-1], False, "rank_based"), rtol=1e-6)
        np.testing.assert_allclose(estimated["chosen_weights"], token_weights(d, False, "rank_based"), rtol=1e-6)


def test_normalized(models, tokenizer):
    _, loaded = models
    found = estimate_token_weights(
        tiny.preference_data(),
        loaded["positive"],
        loaded["negative"],
        processing_class=tokenizer,
        normalize_weights=True,
    )
    for row in found:
        assert np.mean(row["chosen_weights"]) == pytest.approx(1, abs=1e-6)
        assert np.std(row["rejected_weights"]) > 0


def test_beyond_max_length(models, tokenizer):
    """Scored tokens have the same weights, those that the training cuts off have 1, and the lengths stay whole."""
    _, loaded = models
    data, options = tiny.preference_data(), {"processing_class": tokenizer, "eos_weight": None}
    whole = estimate_token_weights(data, loaded["positive"], loaded["negative"], **options)
    cut = estimate_token_weights(data, loaded["positive"], loaded["negative"], max_length=20, **options)
    shortened = 0
    for row, other in zip(whole, cut, strict=True):
        room = 20 - len(tokenizer(row["prompt"])["input_ids"])
        np.testing.assert_allclose(row["chosen_weights"][:room], other["chosen_weights"][:room], rtol=1e-5)
        assert len(row["chosen_weights"]) == len(other["chosen_weights"])
        assert set(other["chosen_weights"][max(room, 0) :]) <= {1.0}
        shortened += len(row["chosen_weights"]) > room
    assert shortened > 2


@pytest.mark.parametrize(
    "data", [tiny.preference_data, tiny.implicit_preference_data, tiny.conversational_preference_data]
)
@pytest.mark.parametrize("contrast", ["models", "prompts"])
def test_the_trainer_takes_what_is_estimated(models, tmp_path, tokenizer, data, contrast):
    _, loaded = models
    if contrast == "models":
        given = {"negative": loaded["negative"]}
    else:
        given = {"positive_prompt": "Be good.", "negative_prompt": "Be bad."}
    pairs = estimate_token_weights(data(), loaded["positive"], processing_class=tokenizer, **given)
    weights = np.concatenate(pairs["chosen_weights"][:])
    assert len(set(weights)) > 20
    trainer = trainer_of(tmp_path, tokenizer, pairs, max_steps=1)
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])


def test_prompts(models, tokenizer):
    """The response behind each of the two prompts."""
    _, loaded = models
    model, row = loaded["positive"], tiny.preference_data()[0]
    (found,) = estimate_token_weights(
        Dataset.from_list([row]), model, processing_class=tokenizer, positive_prompt="Be good.", negative_prompt="Be bad.",
        eos_weight=None,
    )  # fmt: skip
    with torch.no_grad():
        good, bad = (
            token_logps(model, tokenizer, f"Be {kind}.\n\n{row['prompt']}", row["rejected"])
            for kind in ("good", "bad")
        )
    expected = token_weights((good - bad).double().numpy(), rejected=True)
    np.testing.assert_allclose(found["rejected_weights"], expected, rtol=1e-4)


def test_prompts_join_a_system_message():
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    assert module._with_text(messages, "Be good.") == [
        {"role": "system", "content": "Be good.\n\nBe short."},
        {"role": "user", "content": "Hi"},
    ]
    assert messages[0]["content"] == "Be short."


def test_adapters(models, tmp_path, tokenizer):
    """Two adapters of one base, by name."""
    from peft import LoraConfig, get_peft_model

    folder, _ = models
    base, found = str(folder / "positive"), {}
    for seed, name in enumerate(("good", "bad")):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        found[name] = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        found[name].save_pretrained(tmp_path / name)
    data = tiny.preference_data()
    named = estimate_token_weights(
        data, base, base, positive_adapter=str(tmp_path / "good"), negative_adapter=str(tmp_path / "bad")
    )
    given = estimate_token_weights(data, found["good"], found["bad"], processing_class=tokenizer)
    for row, other in zip(named, given, strict=True):
        np.testing.assert_allclose(row["chosen_weights"], other["chosen_weights"], rtol=1e-5)
        assert np.std(row["chosen_weights"]) > 0


def test_tokenized_pairs(models, tmp_path, tokenizer):
    _, loaded = models
    texts = tiny.preference_data()
    ids = texts.map(
        lambda row: module.pair_ids(row, tokenizer, tokenizer.eos_token), remove_columns=texts.column_names
    )
    arguments = loaded["positive"], loaded["negative"]
    found = estimate_token_weights(ids, *arguments, processing_class=tokenizer)
    expected = estimate_token_weights(texts, *arguments, processing_class=tokenizer)
    assert found["chosen_weights"][:] == expected["chosen_weights"][:]
    trainer_of(tmp_path, tokenizer, found)


class TestShards:
    def run(self, models, folder, tokenizer, **options):
        _, loaded = models
        data = options.pop("data", None) or tiny.preference_data()
        return estimate_token_weights(
            data, loaded["positive"], loaded["negative"], folder, processing_class=tokenizer, shard_size=3, **options
        )

    def test_goes_on(self, models, tmp_path, tokenizer, monkeypatch):
        """An interruption costs one shard; what follows equals an uninterrupted run."""
        whole = self.run(models, tmp_path / "whole", tokenizer)
        score, calls = module._Scorer._score, []

        def interrupted(self, side, *args):
            calls.append(side)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return score(self, side, *args)

        monkeypatch.setattr(module._Scorer, "_score", interrupted)
        with pytest.raises(KeyboardInterrupt):
            self.run(models, tmp_path / "parts", tokenizer)
        assert calls == ["positive"] * 3 + ["negative"] * 2
        assert len(list((tmp_path / "parts").glob("*/*.parquet"))) == 4
        found = self.run(models, tmp_path / "parts", tokenizer)
        assert calls[5:] == ["negative"] * 2
        assert found.to_list() == whole.to_list()

    def test_another_transform_scores_nothing(self, models, tmp_path, tokenizer, monkeypatch):
        self.run(models, tmp_path, tokenizer)
        monkeypatch.setattr(module._Scorer, "_score", lambda *args: pytest.fail("scored again"))
        found = self.run(models, tmp_path, tokenizer, weight_transform="rank_based", eos_weight=None)
        assert np.mean(found[0]["chosen_weights"]) == pytest.approx(1)

    def test_others_are_refused(self, models, tmp_path, tokenizer):
        self.run(models, tmp_path, tokenizer)
        with pytest.raises(ValueError, match=r"holds log-probabilities that were made with rows=8 \(now 7\)"):
            self.run(models, tmp_path, tokenizer, data=tiny.preference_data().select(range(7)))
        folder, loaded = models
        swapped = (folder, {"positive": loaded["negative"], "negative": loaded["positive"]})
        with pytest.raises(ValueError, match="that were made with policy="):
            self.run(swapped, tmp_path, tokenizer)


class TestBadEstimation:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"weight_transform": "log"}, ValueError, "`weight_transform='log'` is not known. Choose one of: 'exp'"),
            ({"scale_min": 0.5}, ValueError, "`scale_min=0.5` has no effect with `weight_transform='exp'`"),
            ({"weight_mo": 0.5}, TypeError, "`estimate_token_weights` has no option `weight_mo`"),
            ({"weight_low": 2.0}, ValueError, "`weight_low=2.0` must be less than `weight_high=1.5`"),
            ({"weight_k": 0.0}, ValueError, "`weight_k=0.0` is out of range"),
            ({"weight_transform": "binary", "top_percent": 101.0}, ValueError, "`top_percent=101.0` is out of range"),
            ({"eos_weight": -1.0}, ValueError, "`eos_weight=-1.0` is out of range"),
            ({"negative": None}, ValueError, "Name a `negative` model beside `positive`, or give `positive_prompt`"),
            ({"negative": None, "positive_prompt": "x", "negative_prompt": "x"}, ValueError, "there is no contrast"),
            ({"positive_prompt": "x"}, ValueError, "are for one model, and two are given"),
            ({"negative": "positive"}, ValueError, "`positive` and `negative` are the same model"),
            (
                {"negative": None, "positive_prompt": "x", "negative_prompt": "y", "negative_adapter": "z"},
                ValueError,
                "`negative_adapter` has no effect without a `negative` model",
            ),
            ({"max_length": 0}, ValueError, "`max_length=0` is out of range"),
            ({"shard_size": 0}, ValueError, "`shard_size=0` is out of range"),
        ],
    )
    def test_options(self, options, error, message):
        """Found before a model is loaded: there is none of these names."""
        with pytest.raises(error, match=message):
            estimate_token_weights(tiny.preference_data(), "positive", **{"negative": "negative", **options})

    def test_dataset(self, models, tokenizer):
        _, loaded = models
        both, options = (loaded["positive"], loaded["negative"]), {"processing_class": tokenizer}
        with pytest.raises(TypeError, match="`dataset` is a IterableDataset; expected a `Dataset`"):
            estimate_token_weights(tiny.preference_data().to_iterable_dataset(), *both, **options)
        with pytest.raises(ValueError, match="`dataset` has the column 'chosen_weights' already"):
            estimate_token_weights(weighted_data(tokenizer), *both, **options)
        long = Dataset.from_list([{"prompt": "a", "chosen": "Z" * 600, "rejected": "b"}])
        with pytest.raises(ValueError, match="1 of 1 pairs are longer than the context of the model, 512 tokens"):
            estimate_token_weights(long, *both, **options)

    def test_prompts_before_token_ids(self, models, tokenizer):
        _, loaded = models
        texts = tiny.preference_data()
        ids = texts.map(
            lambda row: module.pair_ids(row, tokenizer, tokenizer.eos_token), remove_columns=texts.column_names
        )
        with pytest.raises(ValueError, match="holds token ids and no texts, which a prompt cannot be put before"):
            estimate_token_weights(
                ids, loaded["positive"], processing_class=tokenizer, positive_prompt="x", negative_prompt="y"
            )
        ids = [ids[0] | {"rejected_ids": [3, 10**6]}]
        with pytest.raises(ValueError, match=r"row 0 has the token id 1000000, and the positive model has \d+ tokens"):
            estimate_token_weights(
                Dataset.from_list(ids), loaded["positive"], loaded["negative"], processing_class=tokenizer
            )

    def test_a_tokenizer_without_an_end(self, models):
        _, loaded = models
        endless = tiny.tokenizer()
        endless.eos_token = None
        with pytest.raises(ValueError, match="no end-of-sequence token, which responses end with"):
            estimate_token_weights(
                tiny.preference_data(), loaded["positive"], loaded["negative"], processing_class=endless
            )

    def test_log_probabilities_that_are_not_finite(self, models, tokenizer):
        _, loaded = models
        broken = copy.deepcopy(loaded["negative"])
        torch.nn.init.constant_(broken.get_input_embeddings().weight, math.inf)
        with pytest.raises(ValueError, match="the negative model gives a token of the chosen response a log-probab"):
            estimate_token_weights(tiny.preference_data(), loaded["positive"], broken, processing_class=tokenizer)

    def test_a_template_that_depends_on_the_system_message(self, models):
        _, loaded = models
        odd = tiny.tokenizer()
        odd.chat_template = (
            "{% for message in messages %}{% if message.role == 'assistant' and messages[0].role == 'system' %}"
            "{{ message.content | upper }}{% else %}{{ message.content }}{% endif %}{% endfor %}"
        )
        with pytest.raises(ValueError, match="Behind the positive prompt the chosen response has other tokens than"):
            estimate_token_weights(
                tiny.conversational_preference_data(),
                loaded["positive"],
                processing_class=odd,
                positive_prompt="Be good.",
                negative_prompt="Be bad.",
            )

    def test_options_of_named_models(self, models, tokenizer):
        _, loaded = models
        both, options = (loaded["positive"], loaded["negative"]), {"processing_class": tokenizer}
        for more in ({"model_init_kwargs": {"dtype": "bfloat16"}}, {"negative_adapter": "adapter"}):
            with pytest.raises(
                ValueError, match="are for a model that is named by a string; `model` is a LlamaForCausalLM"
            ):
                estimate_token_weights(tiny.preference_data(), *both, **options, **more)

    def test_other_tokenizers(self, models, tmp_path, tokenizer):
        folder, _ = models
        other = tiny.tokenizer()
        other.add_tokens(["ZZZ"])
        for part in (tiny.model("llama", other), other):
            part.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="The tokenizers of the positive and of the negative model differ"):
            estimate_token_weights(tiny.preference_data(), str(folder / "positive"), str(tmp_path))


class TestCommand:
    @pytest.fixture(autouse=True)
    def workdir(self, tmp_path, monkeypatch):
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        tiny.preference_data().to_json(tmp_path / "pairs.jsonl")
        return tmp_path

    def argv(self, models, tmp_path, *more):
        folder, _ = models
        return [
            "token-weights", "--dataset_name", str(tmp_path / "pairs.jsonl"), "--positive", str(folder / "positive"),
            "--negative", str(folder / "negative"), "--output_dir", str(tmp_path / "out"), *more,
        ]  # fmt: skip

    def test_writes_pairs(self, models, tmp_path, tokenizer, capsys):
        assert main(self.argv(models, tmp_path, "--weight_mu", "0.5", "--eos_weight", "none")) == 0
        text = capsys.readouterr().out
        assert "Weights of chosen tokens: mean" in text
        found = Dataset.from_parquet(str(tmp_path / "out" / "pairs.parquet"))
        _, loaded = models
        expected = estimate_token_weights(
            tiny.preference_data(), loaded["positive"], loaded["negative"], processing_class=tokenizer, weight_mu=0.5,
            eos_weight=None,
        )  # fmt: skip
        for row, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(row["rejected_weights"], other["rejected_weights"], rtol=1e-5)

    def test_refuses_to_overwrite(self, models, tmp_path, capsys):
        os.makedirs(tmp_path / "out")
        (tmp_path / "out" / "pairs.parquet").write_text("mine")
        assert main(self.argv(models, tmp_path)) == 1
        assert "exists. Pass `--overwrite` to replace it" in capsys.readouterr().err

    def test_bad_options(self, models, tmp_path, capsys):
        assert main(self.argv(models, tmp_path, "--scale_min", "0.5")) == 1
        assert "`scale_min=0.5` has no effect with `weight_transform='exp'`" in capsys.readouterr().err


@pytest.mark.parametrize(("mode", "scored"), [("keep_start", 128), ("keep_end", None)])
def test_study_scores_what_is_trained(tmp_path, tokenizer, monkeypatch, mode, scored):
    """With "keep_end" the last tokens are trained, and all are scored."""
    inputs = write_inputs(tmp_path, tokenizer)
    given = settings(inputs, tmp_path / "out", methods={"tis-dpo": {"truncation_mode": mode}}, sizes=[8],
                     starts={"plain": {"model": inputs["model"]}})  # fmt: skip
    study, found = Study(given), []
    monkeypatch.setattr(run_module, "_with_token_weights", lambda *args: found.append(args[-1]))
    cell = next(cell for cell in study.cells() if cell.arm is not None)
    run_module._training_data(study, cell, cell.arm, inputs["model"], study.config(cell.arm, 8, 0, str(tmp_path)))
    assert found == [scored]


def test_study(tmp_path, tokenizer):
    """A study makes the weights of pairs by the starting model under two prompts."""
    inputs = write_inputs(tmp_path, tokenizer)
    study = Study(
        settings(
            inputs, tmp_path / "out", methods=["tis-dpo", "aligned-sft", "figa"], sizes=[8], evaluation={"pairs": {"rows": 4}},
            starts={"plain": {"model": inputs["model"]}},
        )
    )  # fmt: skip
    for cell in run_study(study)["cells"]:
        assert cell["status"] == "done", cell["error"]
    costs = measure_costs(study)
    assert "tis-dpo" in str(costs)


def test_a_dataset_without_rows(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="`train_dataset` is empty: it has no rows"):
        make(
            TISDPOTrainer, TISDPOConfig, tmp_path, tiny.model("llama", tokenizer), tiny.preference_data().select([]),
            tokenizer,
        )  # fmt: skip
