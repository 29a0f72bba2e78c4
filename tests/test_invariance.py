"""What training must not depend on, for every registered method: how a step is split, padded, ordered and computed.

Whole runs are compared, in losses and gradients. What depends on something by definition stands in `EXCEPTIONS`, and must
differ. (`test_family.py` holds value and gradient of the pairwise losses against formulas in float64, with more options.)
"""

import copy
import math
import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import datasets
import pytest
import tiny
import torch
import two_processes_invariance
from pairs import anchored, gradients
from test_methods import OPTIONS, every_method
from two_processes_invariance import ALONE, Run, build, takes_reference, train

from trl_ift import METHODS, get_method
from trl_ift.preference.collator import TokenColumn
from trl_ift.trl_internals import TRL_PAIR_LOSSES


# Largest difference, relative to the loss and to the largest entry of the gradient. Most are below 1e-6; but the log-prob of a
# response, a sum of some 100 nats, is rounded to 8e-6 nats in float32, which the gradient of an exponential shows (EXO, ChiPO)
TOLERANCE = 2e-5
# Least difference of an exception: more than rounding
DIFFERENT = 1e-3

# Seven rows in steps of four: the last step is smaller, and so may be its last micro-batch
ROWS = 7
WHOLE = {"per_device_train_batch_size": 4, "max_steps": 2}
SPLITS = {
    "2 x 2": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "1 x 4": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
}


class Depends(NamedTuple):
    """A loss that depends on how a step is split: how, and the words of a page of `docs/` that say so."""

    kind: str
    page: str
    words: str


# Steps that differ: a loss of the whole micro-batch; a mean of means, where a micro-batch is smaller than the others
STEPS = {"of the batch": {"2 x 2": (0, 1), "1 x 4": (0, 1)}, "mean of means": {"2 x 2": (1,), "1 x 4": ()}}
SORTED = Depends("of the batch", "preference", "`aot` and `aot_unpaired`, which sort the batch")
EXCEPTIONS = {  # a method, or one of its variants below
    "dpo": Depends("mean of means", "preference", "TRL's own losses are means of micro-batches"),
    "self-supervised-po": Depends("mean of means", "self_supervised_po", "TRL's loss of the pairs is a mean of"),
    "eurus-reward": Depends("mean of means", "eurus_reward", "micro-batches count alike, as in TRL"),
    "relative-po": Depends("of the batch", "relative_po", "splitting a step changes the loss"),
    "dpo loss_type=aot": SORTED,
    "dpo loss_type=aot_unpaired": SORTED,
    "dpo loss_type=sft": Depends("of the batch", "preference", "TRL averages over the chosen tokens of the batch"),
    "figa figa_normalization=micro": Depends(
        "of the batch", "figa", "means of micro-batches and processes are averaged"
    ),
    "tpo nll_normalization=batch_token_mean": Depends("of the batch", "tpo", "| mean over those of the micro-batch |"),
    "ift ift_propagation_side=right": Depends("of the batch", "ift", '`"right"` looks at the micro-batch'),
}


def only_scales(method, name, value):
    """Whether an option is another factor or bound in the loss than its default, so that nothing else is counted."""
    default = next(field.default for field in fields(get_method(method).config_class) if field.name == name)
    return all(isinstance(number, float) and number and math.isfinite(number) for number in (default, value))


# Settings: the options of a method as its contract tries them, and losses beside these
VARIANTS = {
    f"{method} {name}={value}": {**common, name: value}
    for method, options in OPTIONS.items()
    for name, (common, value) in options.items()
    # Dropout is drawn for each micro-batch
    if name != "disable_dropout" and not only_scales(method, name, value)
}
VARIANTS |= {f"dpo loss_type={loss}": {"loss_type": loss} for loss in TRL_PAIR_LOSSES}
VARIANTS["dpo loss_type=exo_pair"]["label_smoothing"] = 0.1
VARIANTS["dpo loss_type=aot"]["train_dataset"] = anchored()  # whose references have another order than the policy
VARIANTS["tpo nll_normalization=batch_token_mean"] = {"nll_normalization": "batch_token_mean"}


def apart(found: Run, expected: Run) -> list[float]:
    """Largest relative difference of loss and gradient in each step."""
    result = []
    for loss, value, *both in zip(found.losses, expected.losses, found.gradients, expected.gradients, strict=True):
        result.append(max(abs(loss - value) / abs(value), gradients_apart(*both)))
    return result


def gradients_apart(found, expected):
    """Largest difference of two sets of gradients, relative to the largest entry of the second."""
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    return (max((found[name] - gradient).abs().max() for name, gradient in expected.items()) / largest).item()


def train_rows(trainer):
    """Train on the first rows. (They are chosen here: weights and embeddings are fitted on all.)"""
    trainer.train_dataset = trainer.train_dataset.select(range(min(ROWS, len(trainer.train_dataset))))
    return train(trainer)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer):
    """The run of a method in whole steps, which the others are compared with."""
    runs = {}

    def run(method):
        if method.name not in runs:
            folder = tmp_path_factory.mktemp("whole")
            runs[method.name] = train_rows(build(method, folder, tokenizer, **WHOLE))
        return runs[method.name]

    return run


def check_split(name, split, found, expected):
    """Equal steps, but for those that an exception says."""
    exception = EXCEPTIONS.get(name) or EXCEPTIONS.get(name.split()[0])
    steps = STEPS[exception.kind][split] if exception else ()
    differences = dict(enumerate(apart(found, expected)))
    if steps:
        assert differences[steps[0]] > DIFFERENT, f"{name} is no exception any more"
    assert all(difference < TOLERANCE for step, difference in differences.items() if step not in steps)
    assert found.num_tokens == expected.num_tokens


@every_method
@pytest.mark.parametrize("split", SPLITS)
def test_accumulation(method, split, whole, tmp_path, tokenizer):
    """In one micro-batch rows of different lengths pad each other; in those of one row none is padded."""
    found = train_rows(build(method, tmp_path, tokenizer, **WHOLE | SPLITS[split]))
    check_split(method.name, split, found, whole(method))


@pytest.mark.parametrize("variant", VARIANTS)
def test_accumulation_with_options(variant, tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tiny.prompt_completion_data().to_json("samples.jsonl")
    tiny.text_data().to_json("texts.jsonl")
    method, settings = get_method(variant.split()[0]), VARIANTS[variant]
    expected, found = (
        train_rows(build(method, tmp_path, tokenizer, **settings, **WHOLE | split)) for split in ({}, SPLITS["2 x 2"])
    )
    check_split(variant, "2 x 2", found, expected)


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_exceptions_are_documented(name):
    exception = EXCEPTIONS[name]
    assert name in VARIANTS or get_method(name)
    page = Path(__file__).parent.parent / "docs" / f"{exception.page}.md"
    assert exception.words in " ".join(page.read_text().split())


# ---------------------------------------------------------------- what a batch looks like, and how it is computed


def pad_on_the_left(batch, columns):
    """A batch of TRL's collators, which pad on the right, with the padding on the other side."""
    moved = dict(batch)
    for prefix in [key.removesuffix("input_ids") for key in batch if key.endswith("input_ids")]:
        order = batch[f"{prefix}attention_mask"].argsort(dim=1, stable=True)  # padding first
        names = [f"{prefix}{part}" for part in ("input_ids", "attention_mask", "completion_mask")]
        names += [] if prefix else ["labels"]
        rows = {name: order for name in names if name in batch}
        if not prefix:
            halves = dict(zip(("chosen", "rejected"), order.chunk(2), strict=True))
            rows |= {column.name: halves[column.response] for column in columns if column.name in batch}
        moved |= {name: batch[name].gather(1, index) for name, index in rows.items()}
    return moved


def turn(trainer):
    """Pad on the left."""
    collate = trainer.data_collator
    columns = [column for column in getattr(trainer, "columns", ()) if isinstance(column, TokenColumn)]
    trainer.data_collator = lambda examples: pad_on_the_left(collate(examples), columns)


def permute(trainer):
    """Change the order of the rows within each step."""
    trainer.train_dataset = trainer.train_dataset.select([2, 0, 3, 1, 6, 4, 5])


CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
# Settings of a run, what is done to its trainer, and whether this has come about, by the trainer and its first batch
CHANGES = {
    "padding": ({"pad_to_multiple_of": 96}, None, lambda trainer, batch: batch["input_ids"].size(1) % 96 == 0),
    "side": ({}, turn, lambda trainer, batch: (batch["attention_mask"][:, 0] == 0).any()),
    "order": ({}, permute, None),
    "checkpointing": (CHECKPOINTING, None, lambda trainer, batch: trainer.model.is_gradient_checkpointing),
}


@every_method
@pytest.mark.parametrize("change", CHANGES)
def test_form_of_a_batch(change, method, whole, tmp_path, tokenizer):
    settings, alter, has_come_about = CHANGES[change]
    if change == "side":  # a tokenizer's own side has no effect either
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.padding_side = "left"
    trainer = build(method, tmp_path, tokenizer, **WHOLE, **settings)
    if alter is not None:
        alter(trainer)
    found = train_rows(trainer)
    if has_come_about is not None:
        assert has_come_about(trainer, next(iter(trainer.get_train_dataloader())))
    assert max(apart(found, whole(method))) < TOLERANCE
    assert found.num_tokens == whole(method).num_tokens


# FPO compares hidden states too, and refuses the option
STORING = [method for method in METHODS if takes_reference(method) and method.name != "fpo"]


def test_who_takes_a_reference():
    found = {method.name for method in METHODS if takes_reference(method)}
    assert {"dpo", "spin", "mrpo", "exo", "fpo", "ulma", "uft"} <= found
    assert not found & {"ift", "aligned-sft", "figa", "mpo", "tpo", "eurus-reward"}


@pytest.mark.parametrize("method", STORING, ids=lambda method: method.name)
def test_reference_before_training_or_beside_it(method, whole, tmp_path, tokenizer):
    default = method.config_class(str(tmp_path), use_cpu=True, bf16=False).precompute_ref_log_probs
    trainer = build(method, tmp_path, tokenizer, **WHOLE, precompute_ref_log_probs=not default)
    assert trainer.precompute_ref_logps is not default
    assert max(apart(train_rows(trainer), whole(method))) < TOLERANCE


class NaiveHead:
    """A model whose fused head is replaced: logits of the whole batch, their softmax in float32, gathered by hand."""

    def __init__(self, model, temperature):
        self.model, self.temperature = model, temperature

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, *args, labels, fused_lm_head, **kwargs):
        passes = []
        handle = self.model.get_decoder().register_forward_hook(lambda module, _, output: passes.append(output))
        output = self.model(*args, labels=labels, fused_lm_head=fused_lm_head, **kwargs)
        handle.remove()
        logits = self.model.get_output_embeddings()(passes[-1].last_hidden_state).float() / self.temperature
        next_tokens = labels[:, 1:]
        found = logits[:, :-1].log_softmax(-1).gather(-1, next_tokens.clamp(min=0)[..., None]).squeeze(-1)
        self.fused, output.log_probs = output.log_probs, found.masked_fill(next_tokens == -100, 0.0)
        self.naive = output.log_probs
        return output


HEADS = {method.name: {} for method in METHODS if method.kind != "reward"} | {"exo tempered": {"exo_temperature": 0.7}}


@pytest.mark.parametrize("name", HEADS)
def test_fused_head(name, tmp_path, tokenizer):
    method, settings = get_method(name.split()[0]), HEADS[name]
    trainer = build(method, tmp_path, tokenizer, **WHOLE, **settings)
    batch, found = next(iter(trainer.get_train_dataloader())), {}
    trainer.model.train()
    naive = NaiveHead(trainer.model, getattr(trainer, "logit_temperature", 1.0))
    for name, model in (("fused", trainer.model), ("naive", naive)):
        trainer.model.zero_grad()
        loss = trainer.compute_loss(model, dict(batch))
        loss.backward()
        found[name] = Run([loss.item()], [gradients(trainer.model)], 0)
    assert (naive.naive != 0).sum() > 40
    torch.testing.assert_close(naive.fused, naive.naive, rtol=TOLERANCE, atol=0)
    assert max(apart(found["fused"], found["naive"])) < TOLERANCE


# ---------------------------------------------------------------- processes and logging


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The runs of all methods on 2 gloo processes, by name."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*command, two_processes_invariance.__file__, str(folder)],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        _, errors = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # torchrun's workers too
        raise
    assert process.returncode == 0, errors[-3000:]
    found = torch.load(folder / "found.pt", weights_only=True)
    return {name: Run(*values) for name, values in found.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tokenizer):
    """The run of a method on one process, logged at every step."""
    runs = {}

    def run(method):
        if method.name not in runs:
            runs[method.name] = train(build(method, tmp_path_factory.mktemp("alone"), tokenizer, **ALONE))
        return runs[method.name]

    return run


def check_logs(found, expected, interval):
    """No drift: the losses are the means of so many steps, and the tokens are counted alike."""
    assert len(found.losses) * interval == len(expected.losses)
    for index, loss in enumerate(found.losses):
        part = expected.losses[index * interval : (index + 1) * interval]
        assert loss == pytest.approx(sum(part) / interval, rel=TOLERANCE)
    assert found.num_tokens == expected.num_tokens


@pytest.mark.slow
@every_method
def test_two_processes(method, two, alone):
    """2 processes x 2 micro-batches of 2 rows = the 4 micro-batches on one process."""
    found, expected = two[method.name], alone(method)
    pairs = zip(found.gradients, expected.gradients, strict=True)
    assert max(gradients_apart(one, other) for one, other in pairs) < TOLERANCE
    check_logs(found, expected, interval=2)


@every_method
def test_logging_steps(method, alone, tmp_path, tokenizer):
    found = train(build(method, tmp_path, tokenizer, **ALONE, logging_steps=2))
    check_logs(found, alone(method), interval=2)
