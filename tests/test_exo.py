"""EXO: the numbers and identities of its losses, and lists of responses against an independent computation."""

import math

import pytest
import tiny
import torch
import torch.nn.functional as F
from datasets import Dataset
from pairs import (
    anchored,
    difference,
    double,
    gradients,
    lists,
    logs,
    loss_and_gradients,
    make,
    response_ids,
    step_gradients,
)
from peft import LoraConfig
from torch import tensor
from trl import DPOConfig, DPOTrainer

from trl_ift import EXOConfig, EXOTrainer
from trl_ift.preference.exo import exo_loss, list_log_probs, preference_log_targets
from trl_ift.preference.lists import RewardsColumn, as_groups


SIZES = (4, 2, 3, 2, 5, 3, 2, 4)
R = tensor([[1.0, -0.5, 0.25]], dtype=torch.float64)
REWARDS = tensor([[0.8, 0.1, -0.3]], dtype=torch.float64)


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


def loss_of(logratios, rewards, loss="exo-rw", beta=0.5, beta_r=0.5, mask=None):
    mask = torch.ones_like(logratios, dtype=torch.bool) if mask is None else mask
    return exo_loss(list_log_probs(beta * logratios, mask), list_log_probs(rewards / beta_r, mask), mask, loss)


def preference_loss(r_w, r_l, epsilon, targets="normalized", beta=0.5):
    logratios = torch.stack([tensor(r_w, dtype=torch.float64), tensor(r_l, dtype=torch.float64)], 1)
    mask = torch.ones_like(logratios, dtype=torch.bool)
    log_p = tensor(preference_log_targets(epsilon, targets), dtype=torch.float64).expand_as(logratios)
    return exo_loss(list_log_probs(beta * logratios, mask), log_p, mask, "exo-pref")


# ---------------------------------------------------------------- the loss on tensors


def test_numbers():
    mask = torch.ones_like(R, dtype=torch.bool)
    close(list_log_probs(0.5 * R, mask).exp(), [[0.4630367420, 0.2187230696, 0.3182401884]])
    close(list_log_probs(REWARDS / 0.5, mask).exp(), [[0.7367024531, 0.1816685883, 0.0816289586]])
    close(loss_of(R, REWARDS), [0.2585806628])
    close(loss_of(R, REWARDS, "dpo-rw"), [0.9368111724])


def test_log_probs_of_responses_that_a_row_lacks_are_0():
    mask = torch.tensor([[True, False, True]])
    assert list_log_probs(R, mask)[0, 1] == 0


def test_numbers_of_preferences():
    pairs = ([2.0, -0.5], [-1.0, 1.25])
    close(preference_loss(*pairs, 1e-3), [0.7859172949, 4.2698019324])
    close(preference_loss(*pairs, math.exp(-10), "unnormalized"), [1.3492036744, 6.4519675967])
    close(preference_loss(*pairs, 1e-3, beta=0.1), [2.2581991915, 3.0664459409])


def test_unnormalised_targets_differ_by_a_constant():
    epsilon = math.exp(-10)
    pairs = ([2.0, -0.5, 0.0], [-1.0, 1.25, 3.0])
    shift = preference_loss(*pairs, epsilon / (1 + epsilon)) - preference_loss(*pairs, epsilon, "unnormalized")
    close(shift, [4.5398899e-05] * 3)


class TestIdentities:
    generator = torch.Generator().manual_seed(0)
    r = 3 * torch.randn(50, 4, dtype=torch.float64, generator=generator)
    rewards = torch.randn(50, 4, dtype=torch.float64, generator=generator)

    def test_is_a_divergence(self):
        assert (loss_of(self.r, self.rewards) > 1e-6).all()
        optimum = self.rewards / (0.3 * 0.7) + self.r[:, :1]
        close(loss_of(optimum, self.rewards, beta=0.3, beta_r=0.7), [0.0] * 50)

    @pytest.mark.parametrize("loss", ["exo-rw", "dpo-rw"])
    def test_constants_do_not_matter(self, loss):
        expected = loss_of(self.r, self.rewards, loss)
        close(loss_of(self.r + 17, self.rewards, loss), expected)
        close(loss_of(self.r, self.rewards - 5, loss), expected)

    @pytest.mark.parametrize("loss", ["exo-rw", "dpo-rw"])
    def test_order_does_not_matter(self, loss):
        order = [2, 0, 3, 1]
        close(loss_of(self.r[:, order], self.rewards[:, order], loss), loss_of(self.r, self.rewards, loss))

    def test_forward_form_with_a_sure_reward_is_dpo(self):
        pair = self.r[:, :2]
        rewards = tensor([[1000.0, 0.0]], dtype=torch.float64).expand_as(pair)
        close(loss_of(pair, rewards, "dpo-rw"), -F.logsigmoid(0.5 * (pair[:, 0] - pair[:, 1])))

    def test_rewards_that_are_a_preference(self):
        epsilon, pair = 0.01, self.r[:, :2]
        gap = 0.5 * math.log((1 - epsilon) / epsilon)
        rewards = tensor([[gap, 0.0]], dtype=torch.float64).expand_as(pair)
        close(loss_of(pair, rewards), preference_loss(pair[:, 0].tolist(), pair[:, 1].tolist(), epsilon))

    @pytest.mark.parametrize("loss", ["exo-rw", "dpo-rw"])
    def test_equal_rewards_pull_together(self, loss):
        r = self.r.clone().requires_grad_()
        loss_of(r, torch.zeros_like(r), loss).sum().backward()
        rows = torch.arange(50)
        assert (r.grad[rows, r.argmax(1)] > 0).all()
        assert (r.grad[rows, r.argmin(1)] < 0).all()
        close(r.grad.sum(1), [0.0] * 50)

    @pytest.mark.parametrize("loss", ["exo-rw", "dpo-rw"])
    def test_masked_responses_do_not_exist(self, loss):
        mask = torch.ones_like(self.r, dtype=torch.bool)
        mask[:, 3] = False
        r = self.r.clone().requires_grad_()
        found = loss_of(r, self.rewards, loss, mask=mask)
        close(found, loss_of(self.r[:, :3], self.rewards[:, :3], loss))
        found.sum().backward()
        assert torch.isfinite(r.grad).all()
        assert (r.grad[:, 3] == 0).all()
        assert (r.grad[:, :3] != 0).any()

    def test_no_gradient_from_a_sure_and_wrong_policy(self):
        """Mode-seeking: the reverse form cannot leave a wrong mode, the forward form can."""
        for loss, is_stuck in (("exo-rw", True), ("dpo-rw", False)):
            r = tensor([[-100.0, 100.0]], requires_grad=True)
            loss_of(r, tensor([[1.0, 0.0]]), loss).sum().backward()
            assert (r.grad.abs().max() < 1e-6) == is_stuck


# ---------------------------------------------------------------- the trainer


def reference_of(tokenizer):
    reference = tiny.model("llama", tokenizer)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return reference


def trainer_of(tmp_path, tokenizer, data, model=None, ref_model=None, **settings):
    def cls(**arguments):
        return EXOTrainer(**arguments, ref_model=ref_model)

    model = tiny.model("llama", tokenizer) if model is None else model
    return make(cls, EXOConfig, tmp_path, model, data, tokenizer, overwrite_output_dir=True, **settings)


def response_logp(model, tokenizer, prompt, response, temperature, max_length=None):
    prompt_ids, ids = tokenizer(prompt)["input_ids"], response_ids(tokenizer, response)
    ids = ids[: (max_length or 512) - len(prompt_ids)]
    logits = model(input_ids=tensor([[*prompt_ids, *ids]]), use_cache=False).logits[0, -len(ids) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(-1, tensor(ids)[:, None]).sum()


def expected_loss(policy, reference, tokenizer, rows, args, temperature=1.0, max_length=None):
    """Mean over rows, one sequence at a time, written with exp and log alone."""
    losses = []
    for row in rows:
        r = []
        for response in row["completions"]:
            arguments = (tokenizer, row["prompt"], response, temperature, max_length)
            with torch.no_grad():
                ref = response_logp(reference, *arguments)
            r.append(response_logp(policy, *arguments) - ref)
        e = (args.beta * torch.stack(r)).exp()
        q = e / e.sum()
        e = (tensor(row["rewards"], dtype=torch.float64) / args.exo_beta_r).exp()
        p = e / e.sum()
        losses.append((q * (q / p).log()).sum() if args.exo_loss == "exo-rw" else -(p * q.log()).sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize(
    "settings",
    [{}, {"exo_loss": "dpo-rw", "beta": 0.2}, {"exo_temperature": 0.7}, {"max_length": 22}],
    ids=["exo-rw", "dpo-rw", "temperature", "truncated"],
)
def test_loss_and_gradients(stored, settings, tmp_path, tokenizer):
    """Lists of 2 to 4 responses in one batch, with one odd response for the reference."""
    data = lists(SIZES[:4])
    reference = reference_of(tokenizer)
    trainer = trainer_of(
        tmp_path, tokenizer, data, ref_model=reference, precompute_ref_log_probs=stored, max_steps=1, **settings
    )
    rows = trainer.train_dataset["others_rows"]
    assert [len(others) for others in rows] == [2, 0, 1, 0]
    assert all(("ref_logps" in other) == stored for others in rows for other in others)
    loss, found = loss_and_gradients(trainer)
    twin = double(trainer.model)
    options = (settings.get("exo_temperature", 1.0), settings.get("max_length"))
    expected = expected_loss(twin, double(reference), tokenizer, data, trainer.args, *options)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=2e-5)
    assert difference(found, gradients(twin)) < 5e-5


def test_accumulation(tmp_path, tokenizer):
    """A step of lists of different lengths is the same as a whole and in parts, with weights too."""
    data = lists(SIZES).add_column("weight", [1.0, 0.5, 2.0, 0.0, 1.0, 3.0, 0.2, 1.0])
    steps = []
    for size in (8, 2):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 1}
        trainer = trainer_of(tmp_path, tokenizer, data, ref_model=reference_of(tokenizer), **options)
        steps.append(step_gradients(trainer))
    ((whole,), (gradient,)), ((parts,), (summed,)) = steps
    assert parts == pytest.approx(whole, abs=2e-4)
    assert difference(summed, gradient) < 1e-5


@pytest.mark.parametrize(
    ("settings", "theirs", "rewards"),
    [
        ({"exo_loss": "exo-pref"}, {"loss_type": "exo_pair", "label_smoothing": 1e-3}, [0.2, 0.1]),
        ({"exo_loss": "dpo-rw"}, {"loss_type": "sigmoid"}, [1000.0, 0.0]),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_two_responses_are_those_of_trl(settings, theirs, rewards, swapped, tmp_path, tokenizer):
    pairs = tiny.preference_data()
    step = -1 if swapped else 1
    data = Dataset.from_list(
        [
            {
                "prompt": row["prompt"],
                "completions": [row["chosen"], row["rejected"]][::step],
                "rewards": rewards[::step],
            }
            for row in pairs
        ]
    )
    ours = trainer_of(tmp_path, tokenizer, data, max_steps=3, **settings)
    _, found = step_gradients(ours)
    options = {"beta": 0.5, "precompute_ref_log_probs": True, "max_steps": 3, **theirs}
    # TRL loads the reference from the name of the model
    model = tiny.model("llama", tokenizer)
    model.save_pretrained(tmp_path / "model")
    model.config._name_or_path = str(tmp_path / "model")
    trl = make(DPOTrainer, DPOConfig, tmp_path / "trl", model, pairs, tokenizer, **options)
    _, expected = step_gradients(trl)
    for ours_step, trl_step in zip(found, expected, strict=True):
        assert difference(ours_step, trl_step) < 1e-4
    names = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
    for mine, other in zip(logs(ours), logs(trl), strict=True):
        assert {n: mine[n] for n in names} == pytest.approx({n: other[n] for n in names}, rel=1e-3, abs=2e-3)


def test_pairs_are_lists_of_two(tmp_path, tokenizer):
    """With a prompt or without, as pairs, they train as lists do."""
    pairs = tiny.preference_data()
    data = Dataset.from_list(
        [{"prompt": p, "completions": [c, r], "rewards": [1, 0]} for p, c, r in zip(*pairs[:].values(), strict=True)]
    )
    runs = [step_gradients(trainer_of(tmp_path, tokenizer, d)) for d in (data, pairs)]
    assert runs[0][0] == runs[1][0]
    conversations = Dataset.from_list(
        [
            {"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]], "rewards": [1, 0]}
            for row in tiny.conversational_preference_data()
        ]
    )
    runs = [
        step_gradients(trainer_of(tmp_path, tokenizer, d))[0]
        for d in (conversations, tiny.conversational_preference_data())
    ]
    assert runs[0] == runs[1]


def test_groups(tmp_path, tokenizer):
    """Groups are rows of their own, in the order of the completions."""
    data = lists((4, 2, 6, 4))
    split = Dataset.from_list(
        [
            {
                "prompt": row["prompt"],
                "completions": row["completions"][i : i + 2],
                "rewards": row["rewards"][i : i + 2],
            }
            for row in data
            for i in range(0, len(row["completions"]), 2)
        ]
    )
    whole = trainer_of(tmp_path, tokenizer, data, exo_num_contrastive=2)
    parts = trainer_of(tmp_path, tokenizer, split)
    assert len(whole.train_dataset) == len(parts.train_dataset) == 8
    assert step_gradients(whole)[0] == step_gradients(parts)[0]


def test_order_of_a_group():
    batch = {"prompt": ["x"], "completions": [["a", "b", "c", "d"]], "rewards": [[1, 3, 0, 3]], "weight": [0.5]}
    groups = as_groups(batch, None)
    assert (groups["chosen"], groups["rejected"], groups["others"]) == (["b"], ["c"], [["a", "d"]])
    assert groups["rewards"] == [[3.0, 0.0, 1.0, 3.0]]
    groups = as_groups(batch, 2)
    assert (groups["chosen"], groups["rejected"]) == (["b", "d"], ["a", "c"])
    assert groups["weight"] == [0.5, 0.5]
    # equal rewards: two responses that differ, if there are any
    groups = as_groups({"prompt": ["x"], "completions": [["a", "b", "a"]], "rewards": [[1, 1, 1]]}, None)
    assert (groups["chosen"], groups["rejected"], groups["others"]) == (["a"], ["b"], [["a"]])


def test_rewards_of_a_batch():
    found = RewardsColumn("rewards").tensor([[1.0, 2.0, 3.0], [4.0, 5.0]])
    torch.testing.assert_close(found, tensor([[1, 2, 3], [4, 5, math.nan]]), equal_nan=True)


def test_metrics_and_evaluation(tmp_path, tokenizer):
    data = lists(SIZES)
    trainer = trainer_of(tmp_path, tokenizer, data, eval_dataset=data.select(range(4)), max_steps=12)
    trainer.train()
    first, last = logs(trainer)[0], logs(trainer)[-1]
    rows = [dict(row) for row in data.select(range(4))]
    shares = sum(1 / len(row["rewards"]) for row in rows) / 4  # the untrained policy is the reference
    assert first["exo/best_prob"] == pytest.approx(shares, abs=1e-3)
    assert first["exo/top_prob"] == pytest.approx(shares, abs=1e-3)
    mean = sum(sum(row["rewards"]) / len(row["rewards"]) for row in rows) / 4
    assert first["exo/expected_reward"] == pytest.approx(mean, abs=1e-3)
    assert first["exo/kl"] == pytest.approx(first["loss"], abs=1e-4)
    assert last["exo/best_prob"] > first["exo/best_prob"]
    assert last["rewards/accuracies"] == 1
    found = trainer.evaluate()
    assert found["eval_exo/kl"] == pytest.approx(found["eval_loss"], rel=1e-4)
    assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] == pytest.approx(found["eval_loss"], rel=1e-5)


def test_adapter(tmp_path, tokenizer):
    """The reference of an adapter is the model without it, stored or live."""
    steps, unseen = [], []
    for stored in (True, False):
        trainer = trainer_of(
            tmp_path, tokenizer, lists(SIZES), precompute_ref_log_probs=stored, max_steps=3,
            peft_config=LoraConfig(r=2, target_modules="all-linear"),
        )  # fmt: skip
        assert trainer.ref_model is None
        steps.append(step_gradients(trainer)[0])
        unseen.append(trainer.evaluate(lists((3, 2, 5)))["eval_loss"])
        rows = [dict(row) for row in lists((3, 2, 5))]
        policy = double(trainer.model.merge_and_unload())
        reference = double(tiny.model("llama", tokenizer))
        with torch.no_grad():
            expected = expected_loss(policy, reference, tokenizer, rows, trainer.args).item()
        assert unseen[-1] == pytest.approx(expected, rel=1e-4)
    assert steps[0] == pytest.approx(steps[1], abs=1e-4)


def test_temperature_of_stored_references(tmp_path, tokenizer):
    """Stored at another temperature, they are computed anew."""
    data = lists(SIZES)
    sums = []
    for temperature in (1.0, 0.5, 1.0):
        rows = trainer_of(tmp_path, tokenizer, data, exo_temperature=temperature).train_dataset
        sums.append([sum(rows["ref_chosen_logps"]), rows["others_rows"][0][0]["ref_logps"]])
    assert sums[0] == sums[2]
    assert all(abs(one - other) > 0.1 for one, other in zip(sums[0], sums[1], strict=True))


def test_streams(tmp_path, tokenizer):
    data = lists(SIZES)
    with pytest.raises(ValueError, match="is an `IterableDataset`, whose reference log-probs cannot be stored"):
        trainer_of(tmp_path, tokenizer, data.to_iterable_dataset())
    options = {"precompute_ref_log_probs": False, "exo_num_contrastive": None}
    stream = trainer_of(tmp_path, tokenizer, data.to_iterable_dataset(), **options)
    whole = trainer_of(tmp_path, tokenizer, data, **options)
    assert step_gradients(stream)[0] == step_gradients(whole)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": [1.0, 2.0, 3.0]}, "has 4 completions and 3 rewards, expected as many"),
        ({"rewards": [1.0, 2.0, 3.0, math.nan]}, "column 'rewards' holds nan"),
        ({"completions": [" a", " b", " c"], "rewards": [1.0, 2.0, 3.0]}, "do not divide into groups of 2"),
        ({"rewards": [1.0, 1.0, 3.0, 4.0]}, "both responses of a group have the reward 1.0"),
    ],
)
def test_later_rows_of_streams(change, message, tmp_path, tokenizer):
    """They are checked when they are read."""
    data = Dataset.from_list([*[ROW] * 4, *[ROW | {"prompt": "bad"} | change] * 4]).to_iterable_dataset()
    options = {"precompute_ref_log_probs": False, "exo_num_contrastive": 2, "exo_loss": "exo-pref"}
    with pytest.raises(ValueError, match=f"The row with the prompt 'bad'.*{message}"):
        list(trainer_of(tmp_path, tokenizer, data, **options).train_dataset)


def test_stored_references_and_a_temperature(tmp_path, tokenizer):
    """Columns are those at 1; what the trainer has stored itself is taken."""
    pairs = anchored()
    assert trainer_of(tmp_path / "a", tokenizer, pairs)
    with pytest.raises(
        ValueError, match="of `train_dataset` are log-probabilities at the temperature 1, .* divided by 0.5"
    ):
        trainer_of(tmp_path / "b", tokenizer, pairs, exo_temperature=0.5)
    data = lists(SIZES)
    trainer = trainer_of(tmp_path / "c", tokenizer, data, eval_dataset=data, exo_temperature=0.5)
    assert trainer.evaluate(trainer.eval_dataset)["eval_loss"] == trainer.evaluate()["eval_loss"]


# ---------------------------------------------------------------- bad input


ROW = {"prompt": "x", "completions": [" a", " b", " c", " d"], "rewards": [1.0, 2.0, 3.0, 4.0]}


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"rewards": [1.0, 2.0]}, {}, "row 1 has 4 completions and 2 rewards, expected as many, two or more"),
        ({"completions": [" a"], "rewards": [1.0]}, {}, "row 1 has 1 completions and 1 rewards"),
        ({"rewards": [1.0, 2.0, 3.0, math.nan]}, {}, "row 1: column 'rewards' holds nan .* expected finite numbers"),
        ({"rewards": None}, {}, "row 1: column 'rewards' must hold lists of numbers, found None"),
        ({}, {"exo_num_contrastive": 3}, "row 0 has 4 completions, which do not divide into groups of 3"),
        ({}, {"exo_loss": "exo-pref"}, "row 0 has 4 completions, and the loss is one of preferences between two"),
        (
            {"rewards": [1.0, 2.0, 3.0, 3.0]},
            {"exo_loss": "exo-pref", "exo_num_contrastive": 2},
            "row 1: both responses of a group have the reward 3.0",
        ),
    ],
)
def test_wrong_rows(row, settings, message, tmp_path, tokenizer):
    data = Dataset.from_list([ROW, ROW | row])
    with pytest.raises((ValueError, TypeError), match=message):
        make(EXOTrainer, EXOConfig, tmp_path, "no such model", data, tokenizer, **settings)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"completions": [" a", " b"]}], {}, "lacks 'prompt' and 'rewards'"),
        ([ROW | {"chosen": " a"}], {}, "has the column 'completions', and 'chosen', which are made of it"),
        ([ROW | {"completions": "a"}], {}, "'completions' must be a list of strings, as 'prompt' is"),
        (
            [{"prompt": "x", "chosen": " a", "rejected": " b", "rewards": [1.0]}],
            {},
            "1 rewards for a pair, expected two",
        ),
        ([{"prompt": "x", "chosen": " a", "rejected": " b"}], {"exo_num_contrastive": 4}, "holds pairs"),
    ],
)
def test_wrong_columns(rows, settings, message, tmp_path, tokenizer):
    with pytest.raises((ValueError, TypeError), match=message):
        make(EXOTrainer, EXOConfig, tmp_path, "no such model", Dataset.from_list(rows), tokenizer, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exo_loss": "dpo-pref"}, "`exo_loss='dpo-pref'` is not known"),
        ({"exo_targets": "log"}, "`exo_targets='log'` is not known"),
        ({"exo_beta_r": 0.0}, "`exo_beta_r=0.0` is out of range"),
        ({"exo_temperature": -1.0}, "`exo_temperature=-1.0` is out of range"),
        ({"exo_loss": "exo-pref", "exo_epsilon": 1}, r"it must lie in \(0, 1\)"),
        ({"exo_loss": "exo-pref", "exo_epsilon": 0}, "`exo_epsilon=0` is out of range"),
        ({"exo_epsilon": 0.1}, "`exo_epsilon=0.1` has no effect with `exo_loss='exo-rw'`"),
        ({"exo_targets": "unnormalized"}, "`exo_targets='unnormalized'` has no effect with `exo_loss='exo-rw'`"),
        ({"exo_loss": "exo-pref", "exo_beta_r": 0.1}, "`exo_beta_r=0.1` has no effect with `exo_loss='exo-pref'`"),
        ({"exo_num_contrastive": 1}, "`exo_num_contrastive=1` is out of range"),
        ({"exo_loss": "exo-pref", "exo_num_contrastive": 4}, "compares two responses, and `exo_num_contrastive=4`"),
        ({"loss_type": "exo_pair"}, "`loss_type='exo_pair'` has no effect on this method's loss"),
        ({"ld_alpha": 0.5}, "`ld_alpha=0.5` has no effect on lists"),
        ({"sync_ref_model": True}, "set `precompute_ref_log_probs=False`"),
    ],
)
def test_wrong_options(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        EXOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)
