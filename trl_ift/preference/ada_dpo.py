r"""Ada-DPO (adaptive preference scaling), https://huggingface.co/papers/2406.02764.

DPO in which every pair has a scale tau of its own, solved anew at each step: small for ambiguous pairs, for which a small
margin is then enough, large for clear ones, whose large margin is then rewarded. With h = beta [ r_w - r_l ], r = log pi -
log ref, sums over the tokens of a response, and tau_0 = `tau_min`:

    "linear"       L = min over tau in [tau_0, tau_max] of   - tau log sigma( h / tau ) + (rho_0 - log 2) tau
    "quadratic"    L = min over tau >= tau_0 of              - tau log sigma( h / tau ) + rho_0 tau^2 - (log 2) tau

The solution is a constant for the gradient (envelope theorem): dL/dh = - sigma( -h / tau ). The derivative by tau is
H( sigma(h / tau) ) - log 2 + rho_0, and in the second form + 2 rho_0 tau in the place of rho_0, with H the binary entropy in
nats. The linear form thus has a closed solution, which is not in the paper: with z > 0 such that H( sigma(z) ) = log 2 - rho_0,
one number of the run, tau = |h| / z within its bounds. The quadratic form is solved by bisection; "newton" is the paper's
solver.

For |h| between tau_0 z and tau_max z the slope of the linear form is constant, - sigma(-z) for h > 0 and - sigma(z) for h < 0.

The official code leaves the penalty out of the loss that it prints (the gradient is the same), and adds 1e-6 within the
logarithm, which takes the gradient from badly mis-ranked pairs; neither is done here.
"""

import functools
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ..checks import check_choice, check_range, check_unused
from ..hub.paper import arxiv_paper
from .trainer import PairLossConfig, PreferenceBatch, PreferenceTrainer


SOLVERS = ("exact", "newton")
PENALTIES = ("linear", "quadratic")
_LOG_2 = math.log(2)
# Smallest second derivative of a Newton step, as in the official code
_MIN_CURVATURE = 1e-6


@dataclass
class AdaDPOConfig(PairLossConfig):
    r"""
    Configuration class for the [`AdaDPOTrainer`].

    This class includes only the parameters that are specific to Ada-DPO, and `beta`, whose default differs from TRL's.

    Parameters:
        beta (`float`, *optional*, defaults to `0.01`):
            Temperature, > 0; the scales are those of beta times a log-ratio (the default is the official script's).
        rho0 (`float`, *optional*, defaults to `0.1`):
            Penalty on the scale, > 0: smaller ones give larger scales. For `"linear"` below log 2, where all scales become
            the smallest.
        tau_min (`float`, *optional*, defaults to `0.1`):
            Smallest scale, > 0.
        tau_max (`float`, *optional*, defaults to `4.0`):
            Largest scale, of `"linear"`; 1 to 10 were tried.
        tau_solver (`str`, *optional*, defaults to `"exact"`):
            `"exact"` (`"linear"` in closed form, `"quadratic"` by bisection) or `"newton"`, the paper's.
        tau_init (`float`, *optional*, defaults to `1.0`):
            Where Newton's method starts.
        tau_iters (`int`, *optional*, defaults to `5`):
            Steps of Newton's method.
        tau_penalty (`str`, *optional*, defaults to `"linear"`):
            `"linear"` or `"quadratic"`, where `rho0` multiplies the square of the scale.
    """

    beta: float = field(
        default=0.01, metadata={"help": "Temperature; the scales are those of beta times a log-ratio."}
    )
    rho0: float = field(
        default=0.1,
        metadata={
            "help": "Penalty on the scale of a pair: smaller ones give larger scales. Below log 2 for 'linear'."
        },
    )
    tau_min: float = field(default=0.1, metadata={"help": "Smallest scale."})
    tau_max: float = field(default=4.0, metadata={"help": "Largest scale, of the linear penalty."})
    tau_solver: str = field(
        default="exact",
        metadata={
            "help": "How scales are solved for: exactly, or by the paper's Newton steps.",
            "choices": list(SOLVERS),
        },
    )
    tau_init: float = field(default=1.0, metadata={"help": "Where Newton's method starts."})
    tau_iters: int = field(default=5, metadata={"help": "Steps of Newton's method."})
    tau_penalty: str = field(
        default="linear",
        metadata={"help": "Penalty on the scale, or on its square ('quadratic').", "choices": list(PENALTIES)},
    )

    def __post_init__(self):
        check_choice("tau_solver", self.tau_solver, SOLVERS)
        check_choice("tau_penalty", self.tau_penalty, PENALTIES)
        for name in ("rho0", "tau_min", "tau_init"):
            check_range(name, getattr(self, name), 0, low_open=True)
        check_range("tau_iters", self.tau_iters, 1, integer=True)
        if self.tau_solver != "newton":
            check_unused(self, ["tau_init", "tau_iters"], f"with `tau_solver={self.tau_solver!r}`")
        if self.tau_penalty == "quadratic":
            check_unused(self, ["tau_max"], "with `tau_penalty='quadratic'`, whose scales need no bound")
        else:
            check_range("tau_max", self.tau_max, self.tau_min)
            if self.rho0 >= _LOG_2:
                raise ValueError(
                    f"`rho0={self.rho0}` leaves every scale at `tau_min={self.tau_min}`: with `tau_penalty='linear'` it must "
                    f"lie in (0, log 2 = {_LOG_2:.4f}), e.g. 0.1."
                )
        super().__post_init__()


def _entropy(z: torch.Tensor) -> torch.Tensor:
    """Entropy of sigma(z) in nats, of the shape of z."""
    z = z.abs()  # even; no cancellation
    return F.softplus(-z) + z * torch.sigmoid(-z)


@functools.cache
def critical_ratio(rho0: float) -> float:
    """The z >= 0 at which the entropy of sigma(z) is log 2 - rho_0, by bisection; 0 < rho_0 < log 2."""
    low, high = 0.0, 100.0
    for _ in range(100):
        z = (low + high) / 2
        if math.log1p(math.exp(-z)) + z / (1 + math.exp(z)) > _LOG_2 - rho0:
            low = z
        else:
            high = z
    return high


def exact_scales(
    h: torch.Tensor, rho0: float, tau_min: float, tau_max: float, penalty: str = "linear"
) -> torch.Tensor:
    """Scale tau of each pair, (B,), from h, (B,). `"quadratic"` has no largest scale and does not read `tau_max`."""
    if penalty == "linear":
        return (h.abs() / critical_ratio(rho0)).clamp(tau_min, tau_max)
    # The derivative by tau rises, and is positive at log 2 / (2 rho_0)
    low = torch.full_like(h, tau_min)
    high = torch.full_like(h, max(tau_min, _LOG_2 / (2 * rho0)))
    for _ in range(60):
        tau = (low + high) / 2
        rises = _entropy(h / tau) + 2 * rho0 * tau > _LOG_2
        low, high = torch.where(rises, low, tau), torch.where(rises, tau, high)
    return low


def newton_scales(
    h: torch.Tensor,
    rho0: float,
    tau_min: float,
    tau_max: float,
    penalty: str = "linear",
    tau_init: float = 1.0,
    iterations: int = 5,
) -> torch.Tensor:
    """As [`exact_scales`], by `iterations` projected Newton steps from `tau_init`."""
    slope, curve, bound = (rho0, 0.0, tau_max) if penalty == "linear" else (0.0, 2 * rho0, math.inf)
    tau = torch.full_like(h, tau_init)
    for _ in range(iterations):
        z = h / tau
        first = _entropy(z) - _LOG_2 + slope + curve * tau
        second = z**2 * torch.sigmoid(z) * torch.sigmoid(-z) / tau + curve
        tau = (tau - first / second.clamp(min=_MIN_CURVATURE)).clamp(tau_min, bound)
    return tau


def scaled_dpo_loss(h: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """- tau log sigma(h / tau) of each pair, (B,), from h and the scales, both (B,)."""
    return -tau * F.logsigmoid(h / tau)


def scale_penalty(tau: torch.Tensor, rho0: float, penalty: str = "linear") -> torch.Tensor:
    """What the objective adds for the scales, both (B,)."""
    return rho0 * (tau if penalty == "linear" else tau**2) - _LOG_2 * tau


class AdaDPOTrainer(PreferenceTrainer):
    """Trainer for Ada-DPO, with the arguments of [`~trl.DPOTrainer`] and the data of [`PreferenceTrainer`].

    Example:

    ```python
    from datasets import load_dataset
    from trl_ift import AdaDPOConfig, AdaDPOTrainer

    trainer = AdaDPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=AdaDPOConfig("qwen-ada-dpo"),
        train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    )
    trainer.train()
    ```
    """

    config_class = AdaDPOConfig
    method = "ada-dpo"
    card_options = ("beta",)
    _tag_names = ["trl", "trl-ift", "ada-dpo"]  # noqa: RUF012
    _name = "Ada-DPO"
    _paper = arxiv_paper(
        "2406.02764",
        "hong2024adaptive",
        "Adaptive Preference Scaling for Reinforcement Learning with Human Feedback",
        "Ilgee Hong and Zichong Li and Alexander Bukharin and Yixiao Li and Haoming Jiang and Tianbao Yang and Tuo Zhao",
        2024,
    )

    def pair_loss(self, batch: PreferenceBatch) -> torch.Tensor:
        h, tau = self.beta * batch.margins, self._scales(self.beta * batch.margins.detach())
        loss, args = scaled_dpo_loss(h, tau), self.args
        shares = {"at_min": tau <= args.tau_min}
        if args.tau_penalty == "linear":
            shares["at_max"] = tau >= args.tau_max
        values = {"tau": tau, "dpo_loss": loss} | {f"share_{name}": share for name, share in shares.items()}
        for name, value in values.items():
            self._record_mean(f"ada_dpo/{name}", value.sum(), tau.numel())
        return loss + scale_penalty(tau, args.rho0, args.tau_penalty)

    def _scales(self, h: torch.Tensor) -> torch.Tensor:
        args = self.args
        options = (args.rho0, args.tau_min, args.tau_max, args.tau_penalty)
        if args.tau_solver == "newton":
            return newton_scales(h, *options, args.tau_init, args.tau_iters)
        return exact_scales(h, *options)
