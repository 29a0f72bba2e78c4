"""The contract of every registered method: a method is under all of these the moment it stands in the registry."""

import importlib
import math
from dataclasses import MISSING, fields
from pathlib import Path

import datasets
import numpy as np
import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from pairs import anchored, lists
from peft import LoraConfig
from transformers import Trainer, TrainingArguments

import trl_ift
from trl_ift import METHODS, get_method, stages
from trl_ift.data.token_weights import unit_weights
from trl_ift.extension import ExtensionConfig, ExtensionTrainer
from trl_ift.hub.card import check_model_card
from trl_ift.preference import shared_prompt
from trl_ift.preference.sae import ReLUSAE
from trl_ift.preference.shared_prompt import join_rows
from trl_ift.preference.trainer import PreferenceConfig
from trl_ift.registry import methods_table, symptoms_table


ROOT = Path(__file__).parent.parent
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)

# A setting that makes each option of a method matter: (settings of both runs, the value that is compared with the default)
OPTIONS = {
    "ift": {
        "ift_lambda": ({}, 0.7),
        "ift_lambda_schedule": ({}, "linear"),
        "ift_lambda_min": ({"ift_lambda_schedule": "linear"}, 0.1),
        "ift_lambda_warmup_steps": ({"ift_lambda_schedule": "linear"}, 3),
        "ift_lambda_noise_std": ({}, 0.5),
        "ift_prediction": ({}, "expected"),
        "ift_temperature": ({"ift_prediction": "expected"}, 0.3),
        "ift_top_k": ({"ift_prediction": "topk", "ift_top_k": 2}, 5),
        "ift_gamma": ({}, 0.5),
        "ift_propagation": ({}, "mask"),
        "ift_propagation_norm": ({}, "softmax"),
        "ift_propagation_side": ({"ift_propagation_grad": "none"}, "right"),
        "ift_propagation_grad": ({}, "full"),
        "ift_loss_normalization": ({}, "token"),
        "ift_freeze_input_embeddings": ({}, True),
        "disable_dropout": ({}, False),
    },
    "dpo": {
        "loss_type": ({}, "hinge"),
        "beta": ({}, 0.5),
    },
    "davir-dpo": {
        "beta": ({}, 1.0),
    },
    "dpop": {
        "beta": ({}, 0.5),
        "dpop_lambda": ({}, 5.0),
        "dpop_variant": ({}, "outside"),
    },
    "minor-dpo": {
        "beta": ({}, 0.5),
    },
    "chipo": {
        "beta": ({}, 0.5),
        "chipo_r_max": ({}, 0.01),
        "chipo_gamma": ({}, 0.5),
    },
    "regularized-po": {
        "beta": ({}, 0.5),
        "rpo_eta": ({}, 0.5),
        "rpo_normalization": ({}, "token_mean"),
    },
    "soft-label-po": {
        "beta": ({}, 0.5),
        "soft_label_loss": ({}, "cipo"),
        "ropo_alpha": ({"soft_label_loss": "gropo"}, 0.5),
        "ropo_gamma": ({"soft_label_loss": "ropo"}, 0.5),
        "soft_label_clip": ({}, [0.6, 0.8]),
        "drop_ties": ({}, True),
        "length_normalize": ({}, True),
    },
    "ada-dpo": {
        "beta": ({}, 0.5),
        "rho0": ({}, 0.3),
        "tau_min": ({}, 0.3),
        "tau_max": ({}, 0.2),
        "tau_solver": ({}, "newton"),
        "tau_init": ({"tau_solver": "newton", "tau_iters": 1}, 2.0),
        "tau_iters": ({"tau_solver": "newton"}, 1),
        "tau_penalty": ({}, "quadratic"),
    },
    "relative-po": {
        "beta": ({}, 0.5),
        "distance_temperature": ({}, 0.1),
        "relative_weighting": ({}, "uniform"),
        "diagonal_weight": ({"relative_weighting": "diagonal"}, 0.3),
    },
    "aligned-sft": {
        "beta": ({}, 0.5),
        "asft_lambda": ({}, 0.2),
        "sft_weight": ({}, 0.0),
    },
    "tis-dpo": {
        "beta": ({}, 0.5),
    },
    "mrpo": {
        "beta": ({}, 0.5),
        "ref_models": ({}, ["another"]),
        "mrpo_mode": ({}, "multi_dpo"),
        "mrpo_mixture": ({}, "geometric"),
        "ctro_eps": ({}, 0.5),
        "ctro_adaptive": ({}, False),
        "weight_mode": ({}, "uniform"),
        "ref_weights": ({"weight_mode": "fixed", "ref_weights": [0.5, 0.5]}, [0.1, 0.9]),
    },
    "figa": {
        "good_weight": ({}, 0.5),
        "bad_weight": ({"nll_cut": 9.0}, 1.0),
        "other_weight": ({}, 0.5),
        "nll_cut": ({}, 9.0),
        "figa_nll_floor": ({"nll_cut": 9.0}, 5.8),
        "align": ({}, "indel"),
        "figa_normalization": ({"nll_cut": 5.8}, "micro"),
    },
    "fpo": {
        "beta": ({}, 0.5),
        "fpo_alpha": ({}, 5.0),
        "fpo_top_k": ({}, 3),
        "sae_path": ({"fpo_alpha": 5.0}, "sae.npz"),
        "sae_layer": ({}, 0),
        "detach_chosen": ({"fpo_alpha": 5.0}, False),
    },
    "self-supervised-po": {
        "loss_type": ({}, "hinge"),
        "beta": ({}, 0.5),
        "spo_gamma_chosen": ({}, 0.5),
        "spo_gamma_rejected": ({}, 0.0),
        "spo_levels": ({}, 3),
        "spo_pool": ({}, "last"),
        "spo_head_learning_rate": ({}, 0.1),
        "spo_length_control": ({}, True),
    },
    "mpo": {
        "logit_mode": ({}, "length_norm"),
        "logit_scale": ({}, 0.5),
        "reg_weight": ({}, 0.3),
        "reg_kl": ({}, "reverse"),
        "reg_reduction": ({}, "token_mean"),
        "log_w_max": ({"reg_kl": "reverse"}, 2.0),
        "reg_rows_per_pair": ({}, 0.5),
        "reg_dataset_name": ({}, "samples.jsonl"),
        "allow_other_policy": ({"allow_other_policy": False}, True),
        "pretrain_weight": ({}, 0.1),
        "pretrain_dataset_name": ({"pretrain_weight": 0.1}, "texts.jsonl"),
    },
    "spin": {
        "loss_type": ({}, "exponential"),
        "beta": ({}, 0.5),
    },
    "ld-align": {
        "loss_type": ({}, "hinge"),
        "beta": ({}, 0.5),
        "weight_normalization": ({}, "minmax"),
        "weight_clip": ({}, [0.5, 1.5]),
    },
    "tpo": {
        "loss_type": ({}, "tpo-l"),
        "beta": ({}, 0.5),
        "tpo_l_gamma": ({"loss_type": "tpo-l"}, 0.3),
        "tpo_alpha": ({}, 0.05),
        "nll_normalization": ({}, "sequence_mean"),
        "gold_from": ({}, "chosen"),
    },
    "ulma": {
        "beta": ({}, 0.5),
        "desirable_weight": ({}, 0.5),
        "undesirable_weight": ({}, 2.0),
        "positive_loss": ({}, "pointwise_dpo"),
        "negative_loss": ({}, "continuous"),
        "log_z": ({}, 0.5),
        "logp_reduction": ({}, "sum"),
        "batch_reduction": ({}, "row_mean"),
    },
    "uft": {
        "beta": ({}, 0.1),
        "desirable_weight": ({}, 0.5),
        "undesirable_weight": ({}, 2.0),
        "score_loss": ({}, "bce"),
        "sft_weight": ({}, 0.5),
        "reward_offset": ({}, 0.5),
        "score_clip": ({}, 0.2),
    },
    "exo": {
        "beta": ({}, 0.1),
        "exo_loss": ({}, "dpo-rw"),
        "exo_beta_r": ({}, 2.0),
        "exo_epsilon": ({"exo_loss": "exo-pref", "exo_num_contrastive": 2}, 0.1),
        "exo_targets": ({"exo_loss": "exo-pref", "exo_num_contrastive": 2, "exo_epsilon": 0.1}, "unnormalized"),
        "exo_temperature": ({}, 0.8),
        "exo_num_contrastive": ({}, 2),
    },
    "eurus-reward": {
        "absolute_coef": ({}, 0.5),
        "relative_coef": ({}, 0.5),
    },
}

# Defaults of a method's options, and of those of TRL that it changes: of the paper or its code, or the page's "our choice"
DEFAULTS = {
    "ift": {
        "ift_lambda": 0.2,
        "ift_lambda_schedule": None,
        "ift_lambda_min": 0.0,
        "ift_lambda_warmup_steps": 150,
        "ift_lambda_noise_std": 0.0,
        "ift_prediction": "argmax",
        "ift_temperature": 1.0,
        "ift_top_k": None,
        "ift_gamma": 0.95,
        "ift_propagation": "loss",
        "ift_propagation_norm": "L1",
        "ift_propagation_side": "left",
        "ift_propagation_grad": "numerator",
        "ift_loss_normalization": "sequence",
        "ift_freeze_input_embeddings": False,
        "disable_dropout": True,
    },
    "dpo": {"loss_type": ["sigmoid"], "beta": 0.1},
    "davir-dpo": {"beta": 5.0},
    "dpop": {"beta": 0.3, "dpop_lambda": 50.0, "dpop_variant": "inside"},
    "minor-dpo": {"beta": 0.1},
    "chipo": {"beta": 0.05, "chipo_r_max": None, "chipo_gamma": 1.0},
    "regularized-po": {"beta": 0.1, "rpo_eta": None, "rpo_normalization": "sum"},
    "soft-label-po": {
        "beta": 0.1,
        "soft_label_loss": "gdpo",
        "ropo_alpha": 2.0,
        "ropo_gamma": 0.1,
        "soft_label_clip": None,
        "drop_ties": False,
        "length_normalize": None,
    },
    "ada-dpo": {
        "beta": 0.01,
        "rho0": 0.1,
        "tau_min": 0.1,
        "tau_max": 4.0,
        "tau_solver": "exact",
        "tau_init": 1.0,
        "tau_iters": 5,
        "tau_penalty": "linear",
    },
    "aligned-sft": {"beta": 1.0, "asft_lambda": 1.0, "sft_weight": 1.0},
    "tis-dpo": {"beta": 0.1},
    "relative-po": {
        "beta": 0.1,
        "distance_temperature": 0.5,
        "relative_weighting": "embedding",
        "diagonal_weight": 0.8,
    },
    "mrpo": {
        "beta": 0.1,
        "ref_models": None,
        "mrpo_mode": "mrpo",
        "mrpo_mixture": "harmonic",
        "ctro_eps": 0.1,
        "ctro_adaptive": True,
        "weight_mode": "arwc",
        "ref_weights": None,
    },
    "self-supervised-po": {
        "loss_type": ["sigmoid"],
        "beta": 0.1,
        "spo_gamma_chosen": 0.1,
        "spo_gamma_rejected": 0.1,
        "spo_levels": 4,
        "spo_pool": "mean",
        "spo_head_learning_rate": 1e-3,
        "spo_length_control": False,
    },
    "figa": {
        "good_weight": 1.0,
        "bad_weight": 0.5,
        "other_weight": 0.0,
        "nll_cut": 0.6,
        "figa_nll_floor": 0.0,
        "align": "levenshtein",
        "figa_normalization": "step",
    },
    "fpo": {
        "beta": 0.1,
        "fpo_alpha": 0.5,
        "fpo_top_k": 50,
        "sae_path": None,
        "sae_layer": -1,
        "detach_chosen": True,
    },
    "mpo": {
        "logit_mode": "reference",
        "logit_scale": None,
        "reg_weight": None,
        "reg_kl": "forward",
        "reg_reduction": "sequence_sum",
        "log_w_max": 5.0,
        "reg_rows_per_pair": 1.0,
        "reg_dataset_name": None,
        "allow_other_policy": False,
        "pretrain_weight": 0.0,
        "pretrain_dataset_name": None,
        "learning_rate": 5e-7,
    },
    "spin": {"loss_type": "sigmoid", "beta": 0.1, "learning_rate": 5e-7},
    "ld-align": {
        "loss_type": "sigmoid",
        "beta": 0.1,
        "weight_normalization": None,
        "weight_clip": None,
        "learning_rate": 5e-7,
    },
    "tpo": {
        "loss_type": "sigmoid",
        "beta": None,
        "tpo_l_gamma": None,
        "tpo_alpha": 1.0,
        "nll_normalization": "global_token_mean",
        "gold_from": "reference",
        "learning_rate": 5e-7,
    },
    "exo": {
        "beta": 0.5,
        "exo_loss": "exo-rw",
        "exo_beta_r": 0.5,
        "exo_epsilon": 1e-3,
        "exo_targets": "normalized",
        "exo_temperature": 1.0,
        "exo_num_contrastive": None,
        "precompute_ref_log_probs": True,
    },
    "eurus-reward": {"absolute_coef": 1.0, "relative_coef": 1.0, "learning_rate": 1e-5},
    "ulma": {
        "beta": 0.1,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
        "positive_loss": "nll",
        "negative_loss": "binary",
        "log_z": 0.0,
        "logp_reduction": "mean",
        "batch_reduction": "class_means",
        "train_sampling_strategy": "random",
        "loss_type": "apo_zero_unpaired",
    },
    "uft": {
        "beta": 0.01,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
        "score_loss": "mse",
        "sft_weight": 1.0,
        "reward_offset": 0.0,
        "score_clip": 0.0,
        "train_sampling_strategy": "random",
        "loss_type": "apo_zero_unpaired",
    },
}
# What an option that was left out becomes: (settings, the options that follow)
RESOLVED = {
    "regularized-po": ({}, {"rpo_eta": 0.005}),
    "regularized-po sequences": ({"rpo_normalization": "seq_mean"}, {"rpo_eta": 0.2}),
    "regularized-po tokens": ({"rpo_normalization": "token_mean"}, {"rpo_eta": 0.2}),
    "soft-label-po": ({}, {"length_normalize": False}),
    "soft-label-po gropo": ({"soft_label_loss": "gropo"}, {"length_normalize": False}),
    "soft-label-po gipo": ({"soft_label_loss": "gipo"}, {"length_normalize": True}),
    "mpo": ({}, {"logit_scale": 0.1, "reg_weight": 0.05}),
    "mpo free": ({"logit_mode": "reference_free"}, {"logit_scale": 1.0}),
    "mpo means": ({"logit_mode": "length_norm"}, {"logit_scale": 2.0}),
    "mpo tokens": ({"reg_reduction": "token_mean"}, {"reg_weight": 0.1}),
    "tpo": ({}, {"beta": 0.01}),
    "tpo hinge": ({"loss_type": "hinge"}, {"beta": 0.01}),
    "tpo ipo": ({"loss_type": "ipo"}, {"beta": 0.5}),
    "tpo means": ({"loss_type": "tpo-l"}, {"beta": 2.0, "tpo_l_gamma": 1.6}),
    "tpo means and beta": ({"loss_type": "tpo-l", "beta": 2.0}, {"beta": 2.0, "tpo_l_gamma": 0.5}),
}


def fpo_data(settings):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, generator=generator)
    if "sae_path" in settings:
        np.savez(settings["sae_path"], W_enc=weight.flip(1).numpy(), b_enc=np.ones(64, np.float32))
        return {"train_dataset": tiny.preference_data()}
    return {"train_dataset": tiny.preference_data(), "sae": ReLUSAE(weight, torch.zeros(64))}


def mpo_data(settings):
    data = {"train_dataset": tiny.preference_data()}
    if "reg_dataset_name" not in settings:
        samples = tiny.prompt_completion_data().add_column("ref_logps", [-200.0] * 8)
        if "allow_other_policy" in settings:
            samples = samples.add_column("policy", ["another model"] * 8)
        data["reg_dataset"] = samples
    if "pretrain_weight" in settings and "pretrain_dataset_name" not in settings:
        data["pretrain_dataset"] = tiny.text_data()
    return data


def wordy_data():
    """Pairs with several key phrases in each answer."""
    tails = " Rivers carry cold water, and old towns sell bread.", " Red cars hum; tall birds sing in green trees."
    return tiny.preference_data().map(
        lambda row: {name: row[name] + tail for name, tail in zip(("chosen", "rejected"), tails, strict=True)}
    )


def mrpo_data(settings):
    if "ref_models" not in settings:
        return {"train_dataset": anchored(ref1_chosen_logps=[-60.0] * 8, ref1_rejected_logps=[-75.0] * 8)}
    tokenizer = tiny.tokenizer()
    for model in (tiny.model("llama", tokenizer, seed=3), tokenizer):
        model.save_pretrained(settings["ref_models"][0])
    return {"train_dataset": tiny.preference_data()}


def tis_data(settings):
    tokenizer = tiny.tokenizer()
    return {"train_dataset": tiny.preference_data().map(unit_weights, fn_kwargs={"tokenizer": tokenizer})}


# What a method trains on if not on preference pairs: datasets of its trainer, which may depend on the settings
DATA = {
    "ift": lambda settings: {"train_dataset": tiny.prompt_completion_data()},
    "dpop": lambda settings: {"train_dataset": anchored()},
    "chipo": lambda settings: {"train_dataset": anchored()},
    "tis-dpo": tis_data,
    "mrpo": mrpo_data,
    "soft-label-po": lambda settings: {"train_dataset": anchored(soft_label=[1.0, 0.5, 0.7, 0.3, 0.9, 0.5, 0.0, 0.6])},
    "ada-dpo": lambda settings: {"train_dataset": anchored()},
    "fpo": fpo_data,
    "self-supervised-po": lambda settings: {"train_dataset": wordy_data()},
    "mpo": mpo_data,
    "ld-align": lambda settings: {
        "train_dataset": tiny.preference_data().add_column("latent_distance", [2.0, 0.5, 1.0, 3.0, 0.1, 1.5, 0.7, 2.5])
    },
    "tpo": lambda settings: {"train_dataset": tiny.triple_data()},
    "ulma": lambda settings: {
        "train_dataset": tiny.prompt_completion_data()
        .add_column("label", [True, False] * 4)
        .add_column("score", [1.0, 0.2] * 4)
    },
    "uft": lambda settings: {
        "train_dataset": tiny.prompt_completion_data()
        .add_column("score", [1.0, 0.2, 0.7, 1.0, 0.0, 0.4, 1.0, 0.6])
        .add_column("is_sft", [True, False, False, True, False, False, False, False])
    },
    "exo": lambda settings: {"train_dataset": lists()},
}


# What a method trains if not a model that generates
MODELS = {"eurus-reward": tiny.reward_model}


def train(method, tmp_path, tokenizer, steps=3, **settings):
    torch.manual_seed(0)
    trainer = method.trainer_class(
        model=MODELS.get(method.name, lambda tokenizer: tiny.model("llama", tokenizer))(tokenizer),
        args=method.config_class(
            str(tmp_path), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, logging_steps=1, max_steps=steps,
            per_device_train_batch_size=4, learning_rate=1e-2, overwrite_output_dir=True, **settings,
        ),
        processing_class=tokenizer,
        **DATA.get(method.name, lambda settings: {"train_dataset": tiny.preference_data()})(settings),
        peft_config=LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.3) if "disable_dropout" in settings else None,
    )  # fmt: skip
    trainer.train()
    return trainer


def trace(trainer):
    """What training consists of: losses and gradient norms. (Other metrics could differ while these do not.)"""
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]


@every_method
def test_names(method):
    module = importlib.import_module(method.module)
    trainer, config = getattr(trl_ift, method.trainer), getattr(trl_ift, method.config)
    assert (trainer, config) == (method.trainer_class, method.config_class)
    assert trainer.config_class is config
    assert trainer.method == method.name
    assert issubclass(trainer, ExtensionTrainer)
    assert issubclass(trainer, Trainer)
    assert issubclass(config, ExtensionConfig)
    assert issubclass(config, TrainingArguments)
    assert trainer._tag_names[:2] == ["trl", "trl-ift"]
    assert method.name in trainer._tag_names
    assert trainer._paper["id"] == method.paper
    assert method.paper in module.__doc__
    assert get_method(method.name) is method


@every_method
def test_every_option_is_documented(method):
    described = {field.name: field.metadata.get("help", "") for field in fields(method.config_class)}
    for name in method.trainer_class.own_options():
        assert described[name], f"{name} has no help"
        assert "%" not in described[name].replace("%%", ""), f"argparse needs %% in the help of {name}"
        assert f"{name} (`" in method.config_class.__doc__, f"{name} is missing in the docstring"


def declared(config_class):
    """Default of each field."""
    return {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(config_class)
    }


@every_method
def test_defaults(method):
    found = declared(method.config_class)
    names = {*method.trainer_class.card_options, *method.trainer_class.own_options()}
    trl = next(base for base in method.config_class.__mro__ if base.__module__.split(".")[0] == "trl")
    names |= {name for name, default in declared(trl).items() if found[name] != default}
    assert {name: found[name] for name in names} == DEFAULTS[method.name]


@pytest.mark.parametrize("name", RESOLVED)
def test_options_left_out(name, tmp_path):
    settings, expected = RESOLVED[name]
    config = get_method(name.split()[0]).config_class(str(tmp_path), use_cpu=True, bf16=False, **settings)
    assert {option: getattr(config, option) for option in expected} == expected


def outcome(*args, **settings):
    try:
        return trace(train(*args, **settings))
    except ValueError as error:
        return str(error)


@every_method
def test_every_option_acts(method, tmp_path, tokenizer, monkeypatch):
    """Changing any option changes the run, or makes it possible: nothing is accepted and ignored."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tiny.prompt_completion_data().select([0]).to_json("samples.jsonl")
    tiny.text_data().select([0]).to_json("texts.jsonl")
    options = OPTIONS[method.name]
    trainer_class = method.trainer_class
    assert list(options) == [*trainer_class.card_options, *trainer_class.own_options()]
    for name, (common, value) in options.items():
        default = next(field.default for field in fields(method.config_class) if field.name == name)
        if name == "disable_dropout":
            common = {"disable_dropout": default}
        plain = outcome(method, tmp_path, tokenizer, **common)
        changed = train(method, tmp_path, tokenizer, **{**common, name: value})
        assert value != default
        assert plain != trace(changed), f"{name}={value!r} changed nothing"
        assert isinstance(plain, list) or f"`{name}={value}`" in plain


@pytest.mark.parametrize(
    "method", [m for m in METHODS if issubclass(m.config_class, PreferenceConfig)], ids=lambda method: method.name
)
def test_a_shared_prompt_changes_nothing(method, tmp_path, tokenizer, monkeypatch):
    """The option that may not act on results: losses, gradients and metrics stay, or it raises."""
    if method.trainer_class.reads_hidden_states:
        with pytest.raises(ValueError, match=f"{method.trainer} reads the hidden states of responses"):
            train(method, tmp_path, tokenizer, shared_prompt=True)
        return
    runs, joined = [], []
    monkeypatch.setattr(shared_prompt, "join_rows", lambda *args: joined.append(True) or join_rows(*args))
    for shared in (False, True):
        trainer = train(method, tmp_path, tokenizer, steps=2, shared_prompt=shared)
        assert bool(joined) == shared
        skip = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
        runs.append([{k: v for k, v in entry.items() if k not in skip} for entry in trainer.state.log_history])
    for found, expected in zip(runs[1], runs[0], strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)


@every_method
def test_runs_are_reproducible(method, tmp_path, tokenizer):
    assert trace(train(method, tmp_path, tokenizer)) == trace(train(method, tmp_path, tokenizer))


@every_method
def test_checkpoint_and_card(method, tmp_path, tokenizer):
    trainer = train(method, tmp_path, tokenizer, steps=2, save_strategy="steps", save_steps=2)
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    trainer.add_eval_result("exact_match", 0.25, "a task", split="test")
    trainer.create_model_card(dataset_name="org/data")
    for path in (tmp_path / "README.md", tmp_path / "checkpoint-2" / "README.md"):
        card = ModelCard.load(path)
        assert check_model_card(card) == []
        assert trainer._paper["title"] in card.text
        assert method.title in card.text
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.datasets == ["org/data"]
    assert [(r.metric_type, r.metric_value) for r in card.data.eval_results] == [("exact_match", 0.25)]
    for name in (*trainer.card_options, *trainer.own_options()):
        if getattr(trainer.args, name) is not None:
            assert f"`{name}`" in card.text


def test_readme_shows_the_registry():
    readme = (ROOT / "README.md").read_text()
    assert methods_table() in readme
    assert symptoms_table() in readme


def test_unknown_method():
    with pytest.raises(ValueError, match="Unknown method 'xyz'. Known methods: ift, "):
        get_method("xyz")
    with pytest.raises(AttributeError, match="has no attribute 'XYZTrainer'"):
        _ = trl_ift.XYZTrainer
    assert {method.trainer for method in METHODS} <= set(dir(trl_ift))


def test_options_of_a_method_decide_its_result():
    """None of them is taken for one of logging or saving, with which an interrupted run may go on."""
    for method in METHODS:
        assert [name for name in method.trainer_class.own_options() if stages._MAY_CHANGE.fullmatch(name)] == []
