"""The range of every numeric option, as its message states it: what lies outside is refused."""

import math
import re

import pytest

from trl_ift import METHODS, get_method


INF = math.inf
# Of method: option, its range, whether it is an integer, and what makes it act
RANGES = [
    ("ift", "ift_lambda", "[0, 1]"),
    ("ift", "ift_gamma", "[0, 1]"),
    ("ift", "ift_lambda_noise_std", "[0, inf)"),
    ("ift", "ift_temperature", "(0, inf)"),
    ("ift", "ift_lambda_min", "[0, 0.2]", {"ift_lambda_schedule": "linear"}),
    ("ift", "ift_lambda_warmup_steps", "[1, inf)", {"ift_lambda_schedule": "linear"}),
    ("ift", "ift_top_k", "[1, inf)", {"ift_prediction": "topk"}),
    ("dpo", "beta", "(0, inf)"),
    ("dpo", "label_smoothing", "[0, 1]"),
    ("dpo", "ld_alpha", "[0, 1]"),
    ("figa", "good_weight", "(0, inf)"),
    ("figa", "bad_weight", "[0, inf)"),
    ("figa", "other_weight", "[0, inf)"),
    ("figa", "nll_cut", "(0, inf)"),
    ("figa", "figa_nll_floor", "[0, inf)"),
    ("relative-po", "distance_temperature", "(0, inf)"),
    ("relative-po", "diagonal_weight", "[0, 1]"),
    ("chipo", "chipo_r_max", "(0, inf)"),
    ("chipo", "chipo_gamma", "(0, 1]"),
    ("exo", "exo_beta_r", "(0, inf)"),
    ("exo", "exo_epsilon", "(0, 1]"),
    ("exo", "exo_temperature", "(0, inf)"),
    ("mrpo", "ctro_eps", "[0, inf)"),
    ("tpo", "tpo_alpha", "[0, inf)"),
    ("tpo", "tpo_l_gamma", "[0, inf)", {"loss_type": "tpo-l"}),
    ("regularized-po", "rpo_eta", "[0, inf)"),
    ("fpo", "fpo_alpha", "[0, inf)"),
    ("fpo", "fpo_top_k", "[1, inf)"),
    ("fpo", "sae_layer", "[-inf, inf)"),
    ("self-supervised-po", "spo_gamma_chosen", "[0, inf)"),
    ("self-supervised-po", "spo_gamma_rejected", "[0, inf)"),
    ("self-supervised-po", "spo_levels", "[2, inf)"),
    ("self-supervised-po", "spo_head_learning_rate", "(0, inf)"),
    ("mpo", "logit_scale", "(0, inf)"),
    ("mpo", "reg_weight", "[0, inf)"),
    ("mpo", "pretrain_weight", "[0, inf)"),
    ("mpo", "reg_rows_per_pair", "[0.25, 4]"),
    ("mpo", "log_w_max", "(0, 20]"),
    ("aligned-sft", "asft_lambda", "[0, inf)"),
    ("aligned-sft", "sft_weight", "[0, inf)"),
    ("dpop", "dpop_lambda", "[0, inf)"),
    ("ada-dpo", "rho0", "(0, inf)"),
    ("ada-dpo", "tau_min", "(0, inf)"),
    ("ada-dpo", "tau_init", "(0, inf)"),
    ("ada-dpo", "tau_iters", "[1, inf)"),
    ("ada-dpo", "tau_max", "[0.1, inf)", {"tau_min": 0.1, "tau_penalty": "linear", "rho0": 0.1}),
    ("soft-label-po", "ropo_alpha", "[0, inf)", {"soft_label_loss": "ropo"}),
    ("soft-label-po", "ropo_gamma", "[0, inf)", {"soft_label_loss": "ropo"}),
    ("ulma", "log_z", "[-inf, inf)"),
    ("ulma", "desirable_weight", "[0, inf)"),
    ("ulma", "undesirable_weight", "[0, inf)"),
    ("uft", "sft_weight", "[0, inf)"),
    ("uft", "reward_offset", "[-inf, inf)"),
    ("uft", "score_clip", "[0, 0.5]"),
    ("eurus-reward", "absolute_coef", "[0, inf)"),
    ("eurus-reward", "relative_coef", "[0, inf)"),
]
INTEGERS = {"ift_lambda_warmup_steps", "ift_top_k", "fpo_top_k", "sae_layer", "spo_levels", "tau_iters"}
IDS = [f"{method}-{option}" for method, option, *_ in RANGES]


def config_of(method, settings):
    return get_method(method).config_class("never-written", use_cpu=True, bf16=False, report_to="none", **settings)


def numbers(interval):
    return tuple(float(number) for number in re.findall(r"-?[\w.]+", interval))


@pytest.mark.parametrize("case", RANGES, ids=IDS)
def test_outside(case):
    method, option, interval, *more = case
    low, high = numbers(interval)
    outside = [math.nan] if low == -INF else [low - 1]
    outside += [low] if interval[0] == "(" else []
    outside += [high + 0.5] if high < INF else [INF] if option != "nll_cut" else []  # of which infinity is none
    for value in outside:
        integer = option in INTEGERS
        if integer and not math.isfinite(value):
            continue
        value = int(value) if integer else value
        with pytest.raises(ValueError, match=re.escape(f"is out of range: it must lie in {interval}.")) as error:
            config_of(method, dict(*more) | {option: value})
        assert f"`{option}={value}`" in str(error.value)


@pytest.mark.parametrize("case", RANGES, ids=IDS)
def test_kind(case):
    method, option, _, *more = case
    if option in INTEGERS:
        with pytest.raises(TypeError, match=f"`{option}` must be an integer, got 2.5"):
            config_of(method, dict(*more) | {option: 2.5})
    else:
        with pytest.raises(TypeError, match=f"`{option}` must be a number, got '1'"):
            config_of(method, dict(*more) | {option: "1"})
    with pytest.raises(TypeError, match=f"`{option}` must be an? "):
        config_of(method, dict(*more) | {option: True})


def test_names():
    assert {method for method, *_ in RANGES} <= {method.name for method in METHODS}
