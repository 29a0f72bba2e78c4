"""The Frozen Lake example: its losses are those it names, and its figures those of the documentation."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

from trl_ift.supervised.ift import loss_coefficients


pytest.importorskip("gymnasium", reason="the example takes the lake from gymnasium: pip install gymnasium")

EXAMPLE = Path(__file__).parents[1] / "examples" / "frozen_lake.py"
SEEDS = list(range(20))


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("frozen_lake", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lake(example):
    return example.make_lake(example.MAP)


@pytest.fixture(scope="module")
def after_100(example):
    """Results of 100 steps, by method."""
    return example.run_default_map(100, len(SEEDS), 100, list(example.METHODS))[0]


def make_task(example, lake, runs):
    chosen, rejected = (
        example.make_trajectories([lake] * runs, [way] * runs) for way in (example.OPTIMAL, example.SUBOPTIMAL)
    )
    return example.Task(lake.next_state.expand(runs, -1, -1), chosen, rejected)


# ------------------------------------------------------------------------------------------------------------ the lake


def test_the_lake_is_that_of_gymnasium_and_its_ways_reach_the_goal(example, lake):
    assert lake.cells == "SFFFFHFHFFFHHFFG"
    assert lake.live.sum() == 11
    assert lake.next_state[0].tolist() == [0, 4, 1, 0]
    assert lake.optimal[[0, 3, 4, 10]].tolist() == [[0, 0.5, 0.5, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]]
    assert example.optimal_actions(lake) == example.OPTIMAL
    # The rejected trajectory is the only longer way that enters no cell twice, with one bad action of eight
    assert [way for way in example.ways(lake, "G") if len(way) > 6] == [example.SUBOPTIMAL]
    assert example.share_of_optimal_actions(lake, example.SUBOPTIMAL) == 7 / 8
    assert example.share_of_optimal_actions(lake, example.OPTIMAL) == 1


def test_random_lakes_differ_and_their_ways_end_where_they_say(example):
    drawn = list(example.random_lakes(5))
    assert len({lake.cells for lake, *_ in drawn}) == 5
    for lake, longer, fatal in drawn:
        length = len(example.optimal_actions(lake))
        assert len(longer) > length >= len(fatal)
        for way, end in ((longer, "G"), (fatal, "H")):
            state = 0
            for action in way:
                assert lake.live[state]
                state = lake.next_state[state, action]
            assert lake.cells[state] == end


# ---------------------------------------------------------------------------------------------------------- the losses


def by_hand(first, second, inputs):
    """Log-probabilities of one network without bias for one input, in plain floats."""
    hidden = [max(0.0, sum(x * w for x, w in zip(inputs, column, strict=True))) for column in zip(*first, strict=True)]
    logits = [sum(h * w for h, w in zip(hidden, column, strict=True)) for column in zip(*second, strict=True)]
    total = math.log(sum(math.exp(logit) for logit in logits))
    return [logit - total for logit in logits]


def ift_by_hand(example, lake, seed, ift_lambda, gamma):
    """The loss as the documentation writes it, on the optimal trajectory, and the states that were replaced."""
    w1, _, w2, _ = (parameter[0].tolist() for parameter in example.make_policy([seed]))
    states = [0, 4, 8, 9, 13, 14]
    one_hot = [[float(i == state) for i in range(16)] for state in range(16)]
    predicted = [0]
    for state in states[:-1]:
        logps = by_hand(w1, w2, one_hot[state])
        predicted.append(int(lake.next_state[state, logps.index(max(logps))]))
    losses = []
    for state, guess, action in zip(states, predicted, example.OPTIMAL, strict=True):
        mixed = [(1 - ift_lambda) * x + ift_lambda * y for x, y in zip(one_hot[state], one_hot[guess], strict=True)]
        losses.append(-by_hand(w1, w2, mixed)[action])
    reach = [sum(gamma ** (i - t) * losses[i] for i in range(t, 6)) for t in range(6)]
    replaced = sum(guess != state for state, guess in zip(states, predicted, strict=True))
    return sum(loss * c for loss, c in zip(losses, reach, strict=True)) / sum(reach), replaced


@pytest.mark.parametrize("ift_lambda", [0.0, 0.2])
def test_ift_equals_the_formula_in_plain_floats(example, lake, ift_lambda):
    policy, task = example.make_policy(SEEDS[:4]), make_task(example, lake, 4)
    loss = example.ift_loss(ift_lambda, 0.95)(policy, task, policy)
    expected = [ift_by_hand(example, lake, seed, ift_lambda, 0.95) for seed in SEEDS[:4]]
    assert all(replaced > 0 for _, replaced in expected)
    assert loss.tolist() == pytest.approx([value for value, _ in expected], abs=1e-12)


def test_ift_does_not_see_the_padding(example, lake):
    """A trajectory padded to the length of a longer one has the loss, and the gradient, it has alone."""
    policy, loss = example.make_policy([0, 0]), example.ift_loss(0.2, 0.95)
    ways = example.make_trajectories([lake] * 2, [example.OPTIMAL, example.SUBOPTIMAL])
    padded = loss(policy, example.Task(lake.next_state.expand(2, -1, -1), ways, ways), policy)
    alone_policy = example.make_policy([0])
    alone = loss(alone_policy, make_task(example, lake, 1), alone_policy)
    assert padded[0].item() == pytest.approx(alone.item(), abs=1e-14)
    padded.sum().backward()
    alone.backward()
    for ours, theirs in zip(policy, alone_policy, strict=True):
        torch.testing.assert_close(ours.grad[0], theirs.grad[0], rtol=0, atol=1e-14)


def test_the_gradient_of_ift_is_that_of_its_value(example, lake):
    """ "full", the released code's, is the derivative of the loss; the other two are not."""
    task, step = make_task(example, lake, 1), 1e-6

    def slope(grad):
        policy = example.make_policy([0])
        example.ift_loss(0.2, 0.95, grad)(policy, task, policy).backward()
        return policy[3].grad.flatten()

    differences = []
    for action in range(4):
        values = []
        for sign in (1, -1):
            policy = example.make_policy([0])
            with torch.no_grad():
                policy[3][..., action] += sign * step
            values.append(example.ift_loss(0.2, 0.95)(policy, task, policy).item())
        differences.append((values[0] - values[1]) / (2 * step))
    assert slope("full").tolist() == pytest.approx(differences, abs=1e-8)
    for other in ("numerator", "none"):
        assert slope(other).tolist() != pytest.approx(differences, abs=1e-4)


def test_how_the_gradients_spread_over_the_actions(example, lake):
    """The released gradient stresses the first actions, "none" as well; "numerator" treats all alike."""
    task, policy = make_task(example, lake, len(SEEDS)), example.make_policy(SEEDS)
    nll = -example.action_logps(policy, example.EYE[task.chosen.states], task.chosen.actions)
    documents = torch.arange(len(SEEDS))[:, None].expand_as(nll)
    shares = {}
    for grad in ("full", "none", "numerator"):
        options = (0.95, "loss", "L1", "left", grad)
        coefficients = loss_coefficients(nll, task.chosen.mask, documents, len(SEEDS), *options)
        shares[grad] = (coefficients / coefficients.sum(1, keepdim=True)).mean(0)
    for grad in ("full", "none"):
        assert shares[grad][[0, 5]].tolist() == pytest.approx([0.27, 0.055], abs=0.005)
    assert shares["numerator"].tolist() == pytest.approx([0.166] * 6, abs=0.006)


def test_sft_and_the_losses_of_pairs(example, lake):
    policy, task = example.make_policy([3]), make_task(example, lake, 1)
    w1, _, w2, _ = (parameter[0].tolist() for parameter in policy)

    def logps(way):
        state, values = 0, []
        for action in way:
            values.append(by_hand(w1, w2, [float(i == state) for i in range(16)])[action])
            state = int(lake.next_state[state, action])
        return values

    chosen, rejected = logps(example.OPTIMAL), logps(example.SUBOPTIMAL)
    assert example.sft_loss(policy, task, policy).item() == pytest.approx(-sum(chosen) / 6, abs=1e-12)
    assert example.dpo_loss(policy, task, policy).item() == pytest.approx(math.log(2), abs=1e-12)
    other = example.make_policy([4])
    reference = example.sequence_logps(other, task.chosen) - example.sequence_logps(other, task.rejected)
    margin = 0.1 * (sum(chosen) - sum(rejected) - reference.item())
    assert example.dpo_loss(policy, task, other).item() == pytest.approx(math.log1p(math.exp(-margin)), abs=1e-12)
    win, lose = math.exp(sum(chosen) / 6), math.exp(sum(rejected) / 8)
    odds = win / (1 - win) / (lose / (1 - lose))
    expected = -math.log(win) + 0.25 * math.log1p(1 / odds)
    assert example.orpo_loss(policy, task, policy).item() == pytest.approx(expected, abs=1e-12)


def test_the_runs_of_a_batch_do_not_touch_each_other(example, lake):
    for method in ("IFT", "DPO"):
        together, alone = (
            list(example.train(example.METHODS[method], seeds, make_task(example, lake, len(seeds)), 10))[-1]
            for seeds in ([0, 1, 2], [2])
        )
        torch.testing.assert_close(together[2], alone[0], rtol=0, atol=1e-10)


# --------------------------------------------------------------------------------------------------------- the figures


def test_figures_after_100_steps(after_100):
    """Those of the documentation. The fit of the target amplifies rounding to about 1e-4, alike for all methods."""
    errors = {name: result.errors.mean(1) for name, result in after_100.items()}
    for name, expected in {"SFT": 0.1074, "IFT": 0.1034, "ORPO": 0.1572, "DPO": 0.3754}.items():
        assert errors[name][0].item() == pytest.approx(0.1720, abs=1e-4)
        assert errors[name][100].item() == pytest.approx(expected, abs=2e-4)
    gains = {name: (errors["SFT"][100] - values[100]).item() for name, values in errors.items()}
    assert gains["IFT"] == pytest.approx(0.0040, abs=1e-4)
    assert gains["IFT, lambda 0 (propagation only)"] == pytest.approx(0.0051, abs=1e-4)
    assert gains["IFT, gamma 0 (residual only)"] == pytest.approx(-0.0015, abs=1e-4)
    assert gains['IFT, gradient "none"'] == pytest.approx(0.0045, abs=1e-4)
    assert gains['IFT, gradient "numerator" (the trainer\'s default)'] == pytest.approx(-0.0010, abs=1e-4)
    assert after_100["SFT"].errors[0].std(correction=0).item() == pytest.approx(0.0107, abs=1e-4)


def test_only_dpo_does_not_reach_the_goal(after_100):
    assert {name: result.success for name, result in after_100.items()} == {
        name: float(name != "DPO") for name in after_100
    }


def test_the_error_falls_and_rises_again_except_that_of_dpo(after_100):
    for name, result in after_100.items():
        lowest = int(result.errors.mean(1).argmin())
        assert lowest == 0 if name == "DPO" else 10 < lowest < 60


def test_a_shortened_run_makes_the_pictures(example, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="the pictures need matplotlib: pip install matplotlib")
    folder = tmp_path / "new" / "lake"
    arguments = ["--steps", "5", "--seeds", "2", "--maps", "2", "--output_dir", str(folder)]
    monkeypatch.setattr(sys, "argv", ["frozen_lake.py", *arguments])
    example.main()
    for name in ("policies.png", "errors.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| DPO |" in printed
    assert "2 random maps" in printed
    assert "A shortened run" in printed


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--seeds", "0"], ["--maps", "-1"]])
def test_bad_numbers_are_refused(example, arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["frozen_lake.py", *arguments])
    with pytest.raises(SystemExit):
        example.main()
    assert "at least" in capsys.readouterr().err
