"""What a training step computes and keeps, counted: no method may cost more than its mathematics needs.

The floor of a step is the plain model, forward and backward, on the sequences of the batch, with its head on the positions that
have a label; padding is the data's. Floating-point operations are counted, not timed, so that the budgets hold on any machine.
They are counted on real tensors of a small model: which positions the head scores depends on the data, and meta tensors have
none.
"""

import importlib.util
from pathlib import Path

import pytest
import test_methods
import tiny
import torch
import torch.nn.functional as F
from pairs import make
from trl import DPOConfig, DPOTrainer

from trl_ift import METHODS, PreferenceConfig, PreferenceTrainer
from trl_ift.preference.sae import ReLUSAE


# The counter of the benchmarks, which are no package
_SPEC = importlib.util.spec_from_file_location("flops", Path(__file__).parent.parent / "benchmarks" / "flops.py")
_counter = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_counter)
flops, floor_of = _counter.flops, _counter.floor_of

# Operations of a step with stored reference log-probs, as a multiple of its floor
BUDGET = 1.01
# The same beside TRL's trainer in the same setting
BUDGET_BESIDE_TRL = 1.02
# What the mathematics of a method adds to its sequences, as a multiple of the floor
MORE = {
    "ift": 0.34,  # another forward: the model's own predictions are an input of the one that is trained
    "fpo": 0.34,  # the reference runs beside the policy, for its hidden states
}


# ---------------------------------------------------------------- counting


def saved_bytes(model, forward) -> int:
    """Bytes that the graph of a loss keeps for its backward, beside the model's weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    assert loss.requires_grad
    return sum(size for pointer, size in kept.items() if pointer not in weights)


def test_the_counter_misses_nothing():
    """A linear layer, attention, and products into a given tensor, in the number that they have on paper."""
    a, b = torch.randn(4, 5), torch.randn(5, 6)
    assert flops(lambda: torch.mm(a, b)) == 2 * 4 * 5 * 6
    assert flops(lambda: torch.mm(a, b, out=torch.empty(4, 6))) == 2 * 4 * 5 * 6
    assert flops(lambda: torch.zeros(4, 6).addmm_(a, b)) == 2 * 4 * 5 * 6
    assert flops(lambda: F.linear(a.requires_grad_(), b.t()).sum().backward()) == 2 * (2 * 4 * 5 * 6)
    q = torch.randn(1, 2, 8, 4, requires_grad=True)
    # Scores and values; in the backward the scores again, and two products for each of both
    assert flops(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True)) == 2 * 2 * (2 * 8 * 8 * 4)
    assert flops(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward()) == (2 + 5) * 2 * (2 * 8 * 8 * 4)


# ---------------------------------------------------------------- one step


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def small(tokenizer, head="CausalLM", **options):
    """A model whose head has about the share of the work that it has in models of a hundred million parameters."""
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4}
    return tiny.model("llama", tokenizer, head=head, **shape, **options)


def trainer_of(method, tmp_path, tokenizer):
    """A trainer whose reference, if it has one, is stored."""
    if method.name == "eurus-reward":
        model = small(tokenizer, "SequenceClassification", num_labels=1)
    else:
        model = small(tokenizer)
    data = test_methods.DATA.get(method.name, lambda settings: {"train_dataset": tiny.preference_data()})({})
    if method.name == "fpo":
        data["sae"] = ReLUSAE(torch.randn(64, 128), torch.zeros(128))
    # FPO needs its reference beside the policy, MPO has none
    with_reference = method.kind == "unpaired" or getattr(method.trainer_class, "uses_reference", False)
    stored = {"precompute_ref_log_probs": True} if with_reference and method.name not in ("fpo", "mpo") else {}
    rows = data.pop("train_dataset")
    if "sae" in data:
        return method.trainer_class(
            model=model,
            args=method.config_class(
                str(tmp_path), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False
            ),
            train_dataset=rows,
            processing_class=tokenizer,
            **data,
        )
    return make(method.trainer_class, method.config_class, tmp_path, model, rows, tokenizer, **data, **stored)


def step_of(trainer):
    """A training step without the optimizer, a function; and its batch."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    (inputs,), items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    return lambda: trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=items), inputs


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_no_method_computes_more_than_it_needs(method, tmp_path, tokenizer):
    trainer = trainer_of(method, tmp_path, tokenizer)
    step, inputs = step_of(trainer)
    if method.kind == "reward":
        floor = flops(lambda: floor_of(small(tokenizer, "SequenceClassification", num_labels=1), inputs)().backward())
    else:
        floor = flops(lambda: floor_of(small(tokenizer), inputs)().backward())
    found = flops(lambda: step().backward())
    assert found <= (BUDGET + MORE.get(method.name, 0)) * floor


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "live"])
def test_the_base_computes_and_keeps_no_more_than_trl(stored, tmp_path, tokenizer):
    found = []
    for trainer_class, config_class in ((PreferenceTrainer, PreferenceConfig), (DPOTrainer, DPOConfig)):
        model = small(tokenizer)
        trainer = trainer_class(
            model=model,
            ref_model=None if stored else small(tokenizer),
            args=config_class(
                str(tmp_path), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False,
                per_device_train_batch_size=4, precompute_ref_log_probs=stored, train_sampling_strategy="sequential",
            ),
            train_dataset=tiny.preference_data(),
            processing_class=tokenizer,
        )  # fmt: skip
        step, _ = step_of(trainer)
        found.append((flops(lambda step=step: step().backward()), saved_bytes(model, step)))
    (ours, kept), (theirs, kept_by_trl) = found
    assert ours <= BUDGET_BESIDE_TRL * theirs
    assert kept <= BUDGET_BESIDE_TRL * kept_by_trl
