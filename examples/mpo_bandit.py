# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-ift", "matplotlib"]
# ///
"""What MPO, DPO and IPO do to the answer that nobody compared, on the smallest problem that shows it.

    uv run mpo_bandit.py
    python mpo_bandit.py --output bandit.png

Three answers, equally likely under the reference. People always prefer answer 0 to answer 1; answer 2 is in no pair. The
policy is a softmax over three logits, trained by gradient descent on each method's loss. MPO's KL term is computed on samples
of the reference (here: exactly), which include answer 2; the KL in DPO and IPO is not.

MPO has a closed form here (reference-free logit, scale 1): with q = p0 p1 / (p0 + p1)^2,

    p0 = 1/3 + q / beta,   p1 = 1/3 - q / beta,   p2 = 1/3 exactly.
"""

import argparse
import math

import torch
import torch.nn.functional as F

from trl_ift.preference.mpo import mpo_pair_loss


REF = torch.full((3,), 1 / 3, dtype=torch.float64)


def mpo_loss(logp: torch.Tensor, beta: float) -> torch.Tensor:
    return mpo_pair_loss(logp[0] - logp[1]) - beta * (REF * logp).sum()


def dpo_loss(logp: torch.Tensor, beta: float) -> torch.Tensor:
    return -F.logsigmoid(beta * (logp[0] - logp[1]))  # the reference cancels: it is uniform


def ipo_loss(logp: torch.Tensor, tau: float) -> torch.Tensor:
    return (logp[0] - logp[1] - 1 / (2 * tau)) ** 2


def train(loss, parameter: float, steps: int, learning_rate: float = 0.5) -> torch.Tensor:
    """Gradient descent from the reference; the probabilities after every step, (steps + 1, 3)."""
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    path = [logits.detach().softmax(0)]
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(loss(logits.log_softmax(0), parameter), logits)
        with torch.no_grad():
            logits -= learning_rate * gradient
        path.append(logits.detach().softmax(0))
    return torch.stack(path)


def closed_form(beta: float) -> tuple[float, float, float]:
    """The optimum of MPO for the uniform reference."""
    q = 2 * beta**2 / 9 * (math.sqrt(1 + 9 / (4 * beta**2)) - 1)
    return 1 / 3 + q / beta, 1 / 3 - q / beta, 1 / 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--output", default="mpo_bandit.png", help="where the plot goes; empty for none")
    args = parser.parse_args()

    # IPO's loss is steep: a smaller step
    contenders = [("MPO, beta 1", mpo_loss, 1.0, 0.5), ("DPO, beta 1", dpo_loss, 1.0, 0.5),
                  ("IPO, tau 0.1", ipo_loss, 0.1, 0.05)]  # fmt: skip
    paths = {name: train(loss, value, args.steps, rate) for name, loss, value, rate in contenders}
    print("| method | preferred | rejected | never compared |")
    print("| --- | --- | --- | --- |")
    print("| reference | 0.3333 | 0.3333 | 0.3333 |")
    for name, path in paths.items():
        print(f"| {name} | " + " | ".join(f"{p:.4f}" for p in path[-1].tolist()) + " |")
    for beta in (0.1, 0.5, 1.0, 2.0, 10.0):
        print(f"| MPO, beta {beta:g} (closed form) | " + " | ".join(f"{p:.4f}" for p in closed_form(beta)) + " |")
    if args.output:
        plot(paths, args.output)


def plot(paths: dict[str, torch.Tensor], output: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(paths), figsize=(4.5 * len(paths), 3.6), sharey=True)
    for axis, (name, path) in zip(axes, paths.items(), strict=True):
        for arm, label in enumerate(("preferred", "rejected", "never compared")):
            axis.plot(range(1, len(path) + 1), path[:, arm], label=label)
        axis.axhline(1 / 3, color="grey", linestyle=":", linewidth=1)
        axis.set_title(name)
        axis.set_xscale("log")
        axis.set_xlabel("step")
    axes[0].set_ylabel("probability")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(output, dpi=120)
    print(f"\nPlot: {output}")


if __name__ == "__main__":
    main()
