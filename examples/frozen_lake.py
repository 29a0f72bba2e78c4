# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-ift", "gymnasium", "matplotlib"]
# ///
"""The Frozen Lake experiment of Intuitive Fine-Tuning: which loss brings a policy closest to the optimal one?

    uv run frozen_lake.py
    python frozen_lake.py --output_dir frozen-lake

A state is a prefix, an action is a token, a trajectory is an answer. A network of two layers sees ONE optimal trajectory
(SFT, IFT), or the pair of it and a sub-optimal one (DPO, ORPO). The measure is the mean squared error between its
probabilities and those of the same network fitted to the optimal policy of the whole lake, on the cells one can stand on.
The paper shows its result as a picture and publishes neither map, trajectories, network nor steps: those here are ours.

The losses of IFT are the library's (`trl_ift.supervised.ift`); the first layer of the network plays the input embedding.
All networks, one a seed, are trained at once in float64. Two runs on a machine agree; another machine may change the
fourth digit, because the fit of the optimal policy amplifies rounding.
"""

import argparse
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import torch
import torch.nn.functional as F
from gymnasium.envs.toy_text.frozen_lake import generate_random_map

from trl_ift.supervised.ift import fuse_embeddings, ift_document_loss


ACTIONS = ("left", "down", "right", "up")
STATES, HIDDEN = 16, 64
MAP = ["SFFF", "FHFH", "FFFH", "HFFG"]  # the default of FrozenLake-v1
OPTIMAL, SUBOPTIMAL = (1, 1, 2, 1, 2, 2), (2, 2, 1, 1, 0, 1, 2, 2)
EYE = torch.eye(STATES, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------ the lake


@dataclass(frozen=True)
class Lake:
    """A 4x4 map with its moves; the same fields with a leading dimension R describe R runs at once.

    Attributes:
        cells: The letters S, F, H, G of the map, row by row.
        next_state: (16, 4), where an action leads.
        live: (16,), whether the cell is a place to act in (S or F).
        optimal: (16, 4), the optimal policy: uniform over the actions of the highest value.
    """

    cells: str
    next_state: torch.Tensor
    live: torch.Tensor
    optimal: torch.Tensor


def make_lake(rows: list[str], discount: float = 0.95) -> Lake:
    """Reads the deterministic moves of gymnasium's FrozenLake-v1 and solves them by value iteration."""
    moves = gymnasium.make("FrozenLake-v1", desc=rows, is_slippery=False).unwrapped.P
    _, next_state, reward, ends = torch.tensor(
        [[moves[state][action][0] for action in range(4)] for state in range(STATES)], dtype=torch.float64
    ).unbind(-1)
    next_state = next_state.long()
    value = torch.zeros(STATES, dtype=torch.float64)
    for _ in range(STATES + 1):  # one more than the longest way
        returns = reward + discount * (1 - ends) * value[next_state]
        value = returns.amax(1)
    best = (returns >= value[:, None] - 1e-9).double()
    cells = "".join(rows)
    return Lake(cells, next_state, torch.tensor([cell in "SF" for cell in cells]), best / best.sum(1, keepdim=True))


def optimal_actions(lake: Lake) -> tuple[int, ...]:
    """A shortest way to the goal: the first of the optimal actions in every state."""
    state, actions = 0, []
    while lake.cells[state] != "G":
        actions.append(int(lake.optimal[state].argmax()))
        state = int(lake.next_state[state, actions[-1]])
    return tuple(actions)


def ways(lake: Lake, end: str, visited: tuple[int, ...] = (0,)) -> Iterator[tuple[int, ...]]:
    """The actions of every way from the start to a cell of the kind `end` that enters no cell twice."""
    for action, state in enumerate(lake.next_state[visited[-1]].tolist()):
        if lake.cells[state] == end:
            yield (action,)
        elif lake.live[state] and state not in visited:
            for rest in ways(lake, end, (*visited, state)):
                yield (action, *rest)


@dataclass(frozen=True)
class Trajectories:
    """One trajectory a run, padded: `states`, `actions` and `mask` (real steps), each (R, T)."""

    states: torch.Tensor
    actions: torch.Tensor
    mask: torch.Tensor


def make_trajectories(lakes: list[Lake], actions: list[tuple[int, ...]]) -> Trajectories:
    length = max(map(len, actions))
    states = []
    for lake, row in zip(lakes, actions, strict=True):
        visited = [0]
        for action in row:
            visited.append(int(lake.next_state[visited[-1], action]))
        states.append(visited[:-1] + [0] * (length - len(row)))
    padded = torch.tensor([[*row, *[0] * (length - len(row))] for row in actions])
    mask = torch.arange(length) < torch.tensor([len(row) for row in actions])[:, None]
    return Trajectories(torch.tensor(states), padded, mask)


# ---------------------------------------------------------------------------------------------------------- the policy


def make_policy(seeds: list[int]) -> list[torch.Tensor]:
    """W1 (R, 16, 64), b1, W2 (R, 64, 4), b2: one network a seed."""
    first, second = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        first.append(torch.randn(STATES, HIDDEN, generator=generator, dtype=torch.float64) * 0.5)
        second.append(torch.randn(HIDDEN, 4, generator=generator, dtype=torch.float64) / HIDDEN**0.5)
    zeros = torch.zeros(len(seeds), 1, HIDDEN + 4, dtype=torch.float64)
    parameters = [torch.stack(first), zeros[..., :HIDDEN].clone(), torch.stack(second), zeros[..., HIDDEN:].clone()]
    return [parameter.requires_grad_(True) for parameter in parameters]


def log_policy(policy: list[torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the actions, (R, T, 4), for inputs (R, T, 16): one-hot states or mixtures of two."""
    w1, b1, w2, b2 = policy
    return (torch.relu(inputs @ w1 + b1) @ w2 + b2).log_softmax(-1)


def all_probabilities(policy: list[torch.Tensor]) -> torch.Tensor:
    """(R, 16, 4), without gradient."""
    with torch.no_grad():
        return log_policy(policy, EYE.expand(policy[0].size(0), -1, -1)).exp()


# ---------------------------------------------------------------------------------------------------------- the losses


@dataclass(frozen=True)
class Task:
    """What R runs are trained on."""

    next_state: torch.Tensor
    chosen: Trajectories
    rejected: Trajectories


def action_logps(policy: list[torch.Tensor], inputs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    return log_policy(policy, inputs).gather(-1, actions[..., None]).squeeze(-1)


def sequence_logps(policy: list[torch.Tensor], way: Trajectories, mean: bool = False) -> torch.Tensor:
    """Sum (or mean) of the log-probabilities of the actions of a trajectory, (R,)."""
    total = torch.where(way.mask, action_logps(policy, EYE[way.states], way.actions), 0.0).sum(1)
    return total / way.mask.sum(1) if mean else total


def sft_loss(policy: list[torch.Tensor], task: Task, reference: list[torch.Tensor]) -> torch.Tensor:
    return -sequence_logps(policy, task.chosen, mean=True)


def ift_loss(
    ift_lambda: float, gamma: float, grad: str = "full"
) -> Callable[[list[torch.Tensor], Task, list[torch.Tensor]], torch.Tensor]:
    """Both passes of IFT. `grad="full"` is the released code's gradient; the value of the loss is the same without."""

    def loss(policy: list[torch.Tensor], task: Task, reference: list[torch.Tensor]) -> torch.Tensor:
        states, actions, mask = task.chosen.states, task.chosen.actions, task.chosen.mask
        rows = torch.arange(len(states))[:, None]
        with torch.no_grad():  # first pass: where would the policy itself have gone?
            greedy = log_policy(policy, EYE[states]).argmax(-1)
        reached = task.next_state[rows, states, greedy]
        predicted = torch.cat([states[:, :1], reached[:, :-1]], dim=1)  # the start is given, as a prompt is
        nll = -action_logps(policy, fuse_embeddings(EYE[states], EYE[predicted], ift_lambda), actions)
        return ift_document_loss(nll, mask, rows.expand_as(states), len(states), gamma, grad=grad).loss

    return loss


def dpo_loss(policy: list[torch.Tensor], task: Task, reference: list[torch.Tensor], beta: float = 0.1) -> torch.Tensor:
    margin = sequence_logps(policy, task.chosen) - sequence_logps(policy, task.rejected)
    with torch.no_grad():
        reference_margin = sequence_logps(reference, task.chosen) - sequence_logps(reference, task.rejected)
    return -F.logsigmoid(beta * (margin - reference_margin))


def orpo_loss(
    policy: list[torch.Tensor], task: Task, reference: list[torch.Tensor], weight: float = 0.25
) -> torch.Tensor:
    chosen = sequence_logps(policy, task.chosen, mean=True)
    rejected = sequence_logps(policy, task.rejected, mean=True)
    log_odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    return -chosen - weight * F.logsigmoid(log_odds)


METHODS = {
    "SFT": sft_loss,
    "IFT": ift_loss(0.2, 0.95),
    "IFT, lambda 0 (propagation only)": ift_loss(0.0, 0.95),
    "IFT, gamma 0 (residual only)": ift_loss(0.2, 0.0),
    "ORPO": orpo_loss,
    "DPO": dpo_loss,
    'IFT, gradient "none"': ift_loss(0.2, 0.95, "none"),
    'IFT, gradient "numerator" (the trainer\'s default)': ift_loss(0.2, 0.95, "numerator"),
}
DRAWN = list(METHODS)[:6]


# -------------------------------------------------------------------------------------------------------- the training


def fit_target(seeds: list[int], optimal: torch.Tensor, live: torch.Tensor, steps: int = 1500) -> torch.Tensor:
    """The optimal parametrised policy, (R, 16, 4): the same network fitted to the optimal one on the live cells."""
    policy = make_policy(seeds)
    optimizer = torch.optim.Adam(policy, lr=1e-2)
    inputs = EYE.expand(len(seeds), -1, -1)
    for _ in range(steps):
        cross_entropy = -(optimal * log_policy(policy, inputs)).sum(-1)
        optimizer.zero_grad()
        (torch.where(live, cross_entropy, 0.0).sum(1) / live.sum(-1)).sum().backward()
        optimizer.step()
    return all_probabilities(policy)


def squared_error(probabilities: torch.Tensor, target: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """Mean over the live cells and the four actions, (R,)."""
    return torch.where(live, (probabilities - target).square().mean(-1), 0.0).sum(1) / live.sum(-1)


def train(loss: Callable, seeds: list[int], task: Task, steps: int) -> Iterator[torch.Tensor]:
    """The probabilities (R, 16, 4) before the first step and after each. The sum of the runs' losses keeps them apart."""
    policy, reference = make_policy(seeds), make_policy(seeds)
    optimizer = torch.optim.RMSprop(policy, lr=1e-3)
    yield all_probabilities(policy)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(policy, task, reference).sum().backward()
        optimizer.step()
        yield all_probabilities(policy)


@dataclass(frozen=True)
class Result:
    """One method on the default map.

    Attributes:
        errors: (steps + 1, seeds), the squared error before the first step and after each.
        drawn: (16, 4), probabilities at the step of the picture, mean over seeds.
        success: Share of the seeds whose greedy policy reaches the goal in the end.
    """

    errors: torch.Tensor
    drawn: torch.Tensor
    success: float


def greedy_success(probabilities: torch.Tensor, next_state: torch.Tensor) -> float:
    rows = torch.arange(len(probabilities))
    greedy = probabilities.argmax(-1)
    states = torch.zeros_like(rows)
    for _ in range(STATES):
        states = next_state[rows, states, greedy[rows, states]]
    return (states == STATES - 1).double().mean().item()


def run_default_map(
    steps: int, seeds: int, drawn_step: int, methods: list[str], optimal: tuple[int, ...] = OPTIMAL
) -> tuple[dict[str, Result], torch.Tensor]:
    """The methods on the default map, and the optimal parametrised policies (seeds, 16, 4)."""
    lake, numbers = make_lake(MAP), list(range(seeds))
    target = fit_target([10000 + seed for seed in numbers], lake.optimal, lake.live)
    next_state = lake.next_state.expand(seeds, -1, -1)
    chosen, rejected = (make_trajectories([lake] * seeds, [way] * seeds) for way in (optimal, SUBOPTIMAL))
    results = {}
    for name in methods:
        errors = []
        for step, probabilities in enumerate(train(METHODS[name], numbers, Task(next_state, chosen, rejected), steps)):
            errors.append(squared_error(probabilities, target, lake.live))
            if step == drawn_step:
                drawn = probabilities.mean(0)
        results[name] = Result(torch.stack(errors), drawn, greedy_success(probabilities, next_state))
    return results, target


# -------------------------------------------------------------------------------------------------------- random maps


def random_lakes(number: int) -> Iterator[tuple[Lake, tuple[int, ...], tuple[int, ...]]]:
    """Different maps on which the start has a longer way to the goal and one into a hole: (map, longer, fatal).

    The longer way is one of the shortest that are not optimal, as on the default map; the fatal one is not longer than the
    optimal way. Where several qualify, the seed of the map draws.
    """
    seen: set[str] = set()
    seed = 0
    while len(seen) < number:
        lake = make_lake(generate_random_map(size=4, p=0.8, seed=seed))
        length = len(optimal_actions(lake))
        longer = [way for way in ways(lake, "G") if len(way) > length]
        fatal = [way for way in ways(lake, "H") if len(way) <= length]
        if longer and fatal and lake.cells not in seen:
            seen.add(lake.cells)
            draw = random.Random(seed)
            shortest = min(map(len, longer))
            yield lake, draw.choice([way for way in longer if len(way) == shortest]), draw.choice(fatal)
        seed += 1


def share_of_optimal_actions(lake: Lake, way: tuple[int, ...]) -> float:
    state, good = 0, 0
    for action in way:
        good += bool(lake.optimal[state, action] > 0)
        state = int(lake.next_state[state, action])
    return good / len(way)


def run_random_maps(number: int, seeds: int = 5, steps: int = 200) -> dict[str, dict[str, torch.Tensor]]:
    """Squared error a map (mean over seeds), by kind of rejected trajectory and method; `"share"`: its optimal actions."""
    drawn = list(random_lakes(number))
    lakes = [lake for lake, *_ in drawn for _ in range(seeds)]
    numbers = list(range(seeds)) * number
    next_state, live, optimal = (
        torch.stack([getattr(lake, name) for lake in lakes]) for name in ("next_state", "live", "optimal")
    )
    target = fit_target([10000 + seed for seed in numbers], optimal, live)
    chosen = make_trajectories(lakes, [optimal_actions(lake) for lake in lakes])

    def errors(name: str, rejected: Trajectories) -> torch.Tensor:
        for probabilities in train(METHODS[name], numbers, Task(next_state, chosen, rejected), steps):
            last = probabilities
        return squared_error(last, target, live).view(number, seeds).mean(1)

    alone = {name: errors(name, chosen) for name in METHODS if name not in ("ORPO", "DPO")}  # no rejected trajectory
    results = {}
    for kind, index in (("longer way to the goal", 1), ("way into a hole", 2)):
        rejected_ways = [row[index] for row in drawn]
        rejected = make_trajectories(lakes, [way for way in rejected_ways for _ in range(seeds)])
        share = [share_of_optimal_actions(row[0], way) for row, way in zip(drawn, rejected_ways, strict=True)]
        pairs = {name: errors(name, rejected) for name in ("ORPO", "DPO")}
        results[kind] = {**alone, **pairs, "share": torch.tensor(share)}
    return results


# ---------------------------------------------------------------------------------------------------------- the report


def print_table(results: dict[str, Result], steps: int) -> None:
    early = min(100, steps)
    sft = results["SFT"].errors
    start, seeds = sft[0], sft.size(1)
    print(f"MSE to the optimal parametrised policy, mean (sd) over {seeds} seeds. Start: {_mean_sd(start)}\n")
    print(f"| loss | {early} steps | {steps} steps | lowest mean (step) | seeds below SFT | greedy success |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, result in results.items():
        lowest, step = result.errors.mean(1).min(0)
        below = " / ".join(str(int((result.errors[at] < sft[at]).sum())) for at in (early, steps))
        below = "-" if name == "SFT" else f"{below} of {seeds}"
        numbers = " | ".join(_mean_sd(result.errors[at]) for at in (early, steps))
        print(f"| {name} | {numbers} | {lowest:.4f} ({int(step)}) | {below} | {result.success:.0%} |")


def _mean_sd(values: torch.Tensor) -> str:
    return f"{values.mean():.4f} ({values.std(correction=0):.4f})"


def print_other_ways(results: dict[str, Result], steps: int) -> None:
    """The losses of one trajectory on all optimal ones of the map: is the difference a matter of that trajectory?"""
    names = DRAWN[:4]
    seeds = results["SFT"].errors.size(1)
    print(f"\nThe same after {steps} steps for each of the optimal trajectories\n")
    print(f"| trajectory | {' | '.join(names)} |\n| --- |{' --- |' * len(names)}")
    lake = make_lake(MAP)
    for way in ways(lake, "G"):
        if len(way) == len(OPTIMAL):
            here = results if way == OPTIMAL else run_default_map(steps, seeds, 0, names, way)[0]
            errors = " | ".join(f"{here[name].errors[-1].mean():.4f}" for name in names)
            print(f"| {', '.join(ACTIONS[action] for action in way)} | {errors} |")


def print_maps(results: dict[str, dict[str, torch.Tensor]]) -> None:
    first = next(iter(results.values()))
    print(f"\n{len(first['share'])} random maps, 200 steps, mean over 5 seeds\n")
    print("| loss | MSE | maps below SFT | maps below IFT |\n| --- | --- | --- | --- |")
    for name in METHODS:
        for kind, errors in results.items():
            paired = name in ("ORPO", "DPO")
            label = f"{name}, rejected: {kind}" if paired else name
            if paired or errors is first:
                shares = [
                    "-" if other == name else f"{(errors[name] < errors[other]).double().mean():.0%}"
                    for other in ("SFT", "IFT")
                ]
                print(f"| {label} | {errors[name].mean():.4f} | {' | '.join(shares)} |")
    optimal = "; ".join(f"{kind} {errors['share'].mean():.0%}" for kind, errors in results.items())
    print(f"\nOptimal actions among those of the rejected trajectory: {optimal}")


def print_reading(results: dict[str, Result], steps: int, drawn_step: int) -> None:
    """What the full run shows, with its numbers; a shorter one does not show all of it."""
    sft = results["SFT"].errors.mean(1)
    gain = {name: f"{sft[-1] - result.errors[-1].mean():+.4f}" for name, result in results.items()}
    weights, residual, none, default = (name for name in METHODS if name.startswith("IFT, "))
    lake, dpo = make_lake(MAP), results["DPO"]
    share = share_of_optimal_actions(lake, SUBOPTIMAL)
    stray = dpo.drawn[lake.live, ACTIONS.index("up")].mean()
    print(f"""
Reading (gain: how much closer to the optimum than SFT after {steps} steps)
- IFT {gain["IFT"]}; without the residual {gain[weights]}; without the propagation weights {gain[residual]}. The gain is that
  of the weights, which stress the first actions; the residual alone is neutral to slightly worse here. And it is a
  gain on this trajectory: on the other optimal ones of the map (second table) there is none to speak of.
- The weights act through their gradient: released code {gain["IFT"]}, "none" {gain[none]}, but "numerator", the trainer's
  default, {gain[default]}: on so short an answer its coefficients are nearly equal, as in SFT.
- DPO moves away from the start: {dpo.errors[0].mean():.4f} to {dpo.errors[-1].mean():.4f}. Of the rejected actions {share:.0%}
  are optimal, and DPO unlearns them; after {drawn_step} steps {stray:.0%} of its probability is on "up", which neither
  trajectory contains. That DPO comes first, as in the paper's picture, did not reproduce on these maps.
- SFT is closest at step {int(sft.argmin())} ({sft.min():.4f}) and ends at {sft[-1]:.4f}: more training moves it away again.""")


# -------------------------------------------------------------------------------------------------------- the pictures

GOOD, BAD, HOLE, GOAL = "#0072B2", "#C44E00", "#3B4252", "#F6E3A1"  # told apart with any colour vision
CURVES = {
    "SFT": ("black", "-"), "IFT": (GOOD, "-"), "IFT, lambda 0 (propagation only)": ("#56B4E9", "--"),
    "IFT, gamma 0 (residual only)": ("#CC79A7", "-."), "ORPO": ("#009E73", "-"), "DPO": (BAD, "-"),
    'IFT, gradient "numerator" (the trainer\'s default)': ("#E69F00", ":"),
}  # fmt: skip


def plot_policies(results: dict[str, Result], target: torch.Tensor, step: int, path: Path) -> None:
    """The lake and its two ways, the optimal policy, the first one, and what each loss made of it in `step` steps."""
    plt = _pyplot()
    lake = make_lake(MAP)
    start = all_probabilities(make_policy(list(range(len(target)))))
    panels = [
        ("Target: optimal parametrised policy", target.mean(0)),
        (f"Start: {results['SFT'].errors[0].mean():.3f}", start.mean(0)),
        *((f"{name}: {results[name].errors[step].mean():.3f}", results[name].drawn) for name in DRAWN),
    ]
    figure, axes = plt.subplots(3, 3, figsize=(15, 17))
    axes[0, 0].set_title("The lake, and the two trajectories", fontsize=16)
    _draw_lake(axes[0, 0], lake)
    for way, label, colour, shift in (
        (OPTIMAL, "optimal (all losses)", GOOD, -0.1),
        (SUBOPTIMAL, "rejected (DPO, ORPO)", BAD, 0.1),
    ):
        _draw_way(axes[0, 0], lake, way, label, colour, shift)
    axes[0, 0].legend(
        loc="upper center", bbox_to_anchor=(0.5, 0.01), ncols=2, fontsize=14, handlelength=1, frameon=False
    )
    for axis, (title, probabilities) in zip(axes.flat[1:], panels, strict=True):
        axis.set_title(title, fontsize=16)
        _draw_lake(axis, lake)
        _draw_policy(axis, lake, probabilities)
    figure.suptitle(
        f"Policies after {step} steps, mean over {len(target)} seeds. Arrows and numbers: probability in %. Blue, bold: an\n"
        "optimal action; orange: any other. In the titles: mean squared error to the target. No number below 5 %.",
        fontsize=17,
    )
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.915, wspace=0.05, hspace=0.17)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _centre(state: int) -> tuple[float, float]:
    return state % 4 + 0.5, 3.5 - state // 4


def _draw_lake(axis, lake: Lake) -> None:
    from matplotlib.patches import Rectangle

    for state, cell in enumerate(lake.cells):
        x, y = _centre(state)
        colour = {"H": HOLE, "G": GOAL}.get(cell, "white")
        axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="#8A93A3", linewidth=1.2))
        if cell in "HG":
            height = y if cell == "H" else y + 0.29  # above the ways that end there
            axis.text(
                x, height, cell, ha="center", va="center", fontsize=22, color="white" if cell == "H" else "black"
            )
        else:
            axis.text(x - 0.45, y - 0.45, cell, ha="left", va="bottom", fontsize=11, color="#6B7280")
    axis.set(xlim=(-0.02, 4.02), ylim=(-0.02, 4.02), aspect="equal")
    axis.axis("off")


def _draw_way(axis, lake: Lake, way: tuple[int, ...], label: str, colour: str, shift: float) -> None:
    """A trajectory as a chain of arrows from cell to cell, moved aside so that two can share cells."""
    state = 0
    for action in way:
        following = int(lake.next_state[state, action])
        (x, y), (to_x, to_y) = _centre(state), _centre(following)
        axis.annotate(
            "", (to_x + shift, to_y + shift), (x + shift, y + shift),
            arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 3.5, "mutation_scale": 24, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip
        state = following
    axis.plot([], [], color=colour, linewidth=3, label=label)


def _draw_policy(axis, lake: Lake, probabilities: torch.Tensor) -> None:
    """In every live cell an arrow an action, its length, width and opacity growing with the probability beside it."""
    from matplotlib.patches import FancyArrow

    # Directions in the order of the actions, and where the number stands: beside its arrow, each in a quarter of its own
    places = (((-1, 0), (-0.3, -0.2)), ((0, -1), (0.28, -0.34)), ((1, 0), (0.3, 0.2)), ((0, 1), (-0.28, 0.34)))
    for state in lake.live.nonzero().flatten().tolist():
        x, y = _centre(state)
        for action, ((dx, dy), (number_x, number_y)) in enumerate(places):
            probability = probabilities[state, action].item()
            if probability < 0.02:
                continue
            optimal = bool(lake.optimal[state, action] > 0)
            colour = GOOD if optimal else BAD
            length, width = 0.04 + 0.38 * probability, 0.02 + 0.06 * probability
            axis.add_patch(
                FancyArrow(
                    x + 0.03 * dx, y + 0.03 * dy, length * dx, length * dy, width=width, head_width=2.6 * width,
                    head_length=min(length, 2.2 * width), length_includes_head=True, linewidth=0, color=colour,
                    alpha=0.35 + 0.65 * probability,
                )
            )  # fmt: skip
            if probability >= 0.05:
                axis.text(
                    x + number_x, y + number_y, f"{100 * probability:.0f}", ha="center", va="center_baseline",
                    fontsize=14.5 if probability < 0.995 else 12, color=colour,
                    fontweight="bold" if optimal else "normal",
                )  # fmt: skip


def plot_errors(results: dict[str, Result], path: Path) -> None:
    """Left: the error during training. Right: the difference to SFT from the same seed. Bands: one sd over seeds."""
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2))
    for name, (colour, style) in CURVES.items():
        curves = [(left, results[name].errors)] if name in DRAWN else []
        if name.startswith("IFT"):
            curves.append((right, results[name].errors - results["SFT"].errors))
        for axis, values in curves:
            mean, sd = values.mean(1), values.std(1, correction=0)
            axis.plot(mean, color=colour, linestyle=style, linewidth=2.2, label=name)
            axis.fill_between(range(len(mean)), mean - sd, mean + sd, color=colour, alpha=0.13, linewidth=0)
    right.axhline(0, color="black", linewidth=1)
    left.set(title="Error of the policy", ylabel="MSE to the optimal parametrised policy", ylim=(0, None))
    right.set(title="Difference to SFT, seed by seed (below 0: closer to the optimum)", ylabel="MSE minus that of SFT")
    for axis in (left, right):
        axis.set_xlabel("step")
        axis.margins(x=0)
        axis.spines[["top", "right"]].set_visible(False)
    left.legend(loc="lower left", bbox_to_anchor=(0.35, 0.52), fontsize=10, frameon=False)
    right.legend(loc="lower left", fontsize=10, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="on the default map")
    parser.add_argument("--seeds", type=int, default=20, help="networks on the default map")
    parser.add_argument("--maps", type=int, default=20, help="random maps; 0 for none")
    parser.add_argument("--output_dir", default="frozen-lake", help="where the pictures go; empty for none")
    args = parser.parse_args()
    if min(args.steps, args.seeds) < 1 or args.maps < 0:
        parser.error("`--steps` and `--seeds` must be at least 1, `--maps` at least 0.")

    drawn_step = min(100, args.steps)
    results, target = run_default_map(args.steps, args.seeds, drawn_step, list(METHODS))
    print_table(results, args.steps)
    print_other_ways(results, args.steps)
    if args.maps:
        print_maps(run_random_maps(args.maps))
    if args.steps >= 500 and args.seeds >= 20:
        print_reading(results, args.steps, drawn_step)
    else:
        print("\nA shortened run. The reading is that of the defaults: 500 steps, 20 seeds.")
    if args.output_dir:
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        plot_policies(results, target, drawn_step, folder / "policies.png")
        plot_errors(results, folder / "errors.png")
        print(f"\nPictures: {folder / 'policies.png'}, {folder / 'errors.png'}")


if __name__ == "__main__":
    main()
