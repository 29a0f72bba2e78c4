"""Every method with an adapter: DoRA and modules trained whole, new or existing, on a full or a 4-bit base.

One combined configuration a method: if it works, so do its parts.
"""

import math

import pytest
import tiny
import torch
from pairs import logs
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    get_peft_model,
)
from test_methods import DATA, every_method
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig
from two_processes_invariance import takes_reference

from trl_ift.preference.trainer import REF_COLUMNS
from trl_ift.trl_internals import keep_4bit_trainable_on_cpu


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
# Rewards at the start are beta * 1 there, and those against the references of others
STARTS_ELSEWHERE = {"chipo", "mrpo"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """Folders of a base model and of a reward model, by whether a method trains rewards."""
    paths = {}
    for reward, make in ((False, lambda tokenizer: tiny.model("llama", tokenizer)), (True, tiny.reward_model)):
        paths[reward] = str(tmp_path_factory.mktemp("base") / ("reward" if reward else "llama"))
        make(tokenizer).save_pretrained(paths[reward])
        tokenizer.save_pretrained(paths[reward])
    return paths


def dora(reward):
    """DoRA on all linear layers; head, embeddings and norms are trained whole."""
    return LoraConfig(
        r=2,
        use_dora=True,
        target_modules="all-linear",
        modules_to_save=["score" if reward else "lm_head", "embed_tokens", "norm"],
        task_type="SEQ_CLS" if reward else "CAUSAL_LM",
    )


def with_adapter(folder, reward):
    """A model with an adapter that is not neutral any more, as a stage before would leave it."""
    cls, options = (AutoModelForSequenceClassification, {"num_labels": 1}) if reward else (AutoModelForCausalLM, {})
    torch.manual_seed(1)
    model = get_peft_model(cls.from_pretrained(folder, dtype=torch.float32, **options), dora(reward))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    return model


def build(method, start, folders, tmp_path):
    """The trainer of a method with an adapter, without a reference model of its own."""
    reward = method.kind == "reward"
    folder = folders[reward]
    given = DATA.get(method.name, lambda settings: {"train_dataset": tiny.preference_data()})({})
    if takes_reference(method):
        data = given["train_dataset"]
        given["train_dataset"] = data.remove_columns([name for name in REF_COLUMNS if name in data.column_names])
    if start == "4bit":
        given["quantization_config"] = BitsAndBytesConfig(**NF4)
    if start != "existing":
        given["peft_config"] = dora(reward)
    return method.trainer_class(
        model=with_adapter(folder, reward) if start == "existing" else folder,
        args=method.config_class(
            str(tmp_path / "run"), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, logging_steps=1, max_steps=2,
            per_device_train_batch_size=4, learning_rate=1e-2, save_strategy="no",
        ),
        **given,
    )  # fmt: skip


def sample(tokenizer):
    return {"input_ids": torch.tensor([tokenizer(tiny.QUESTIONS[3][0])["input_ids"]])}


@pytest.mark.parametrize("start", ["new", "existing", "4bit"])
@every_method
def test_adapter(method, start, folders, tmp_path, tokenizer):
    """Two steps train all of the adapter and nothing else, from the right reference; what is saved is what was trained."""
    if start == "4bit":
        pytest.importorskip("bitsandbytes")
    trainer = build(method, start, folders, tmp_path)
    model = trainer.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert any("lora_magnitude_vector" in name for name in trained)
    assert all(any(f"{name}.modules_to_save.default" in key for key in trained) for name in ("embed_tokens", "norm"))
    if start == "4bit":
        assert model.get_base_model().is_loaded_in_4bit

    trainer.train()
    first, last = logs(trainer)
    assert math.isfinite(first["loss"])
    assert math.isfinite(last["loss"])
    after = model.state_dict()
    changed = {name for name, value in before.items() if name in after and not torch.equal(value, after[name])}
    assert changed == trained
    if takes_reference(method) and method.name not in STARTS_ELSEWHERE:
        # TRL casts what is trained on a 4-bit base to bfloat16, copies of whole modules too
        rounding = 0.02 if start == "4bit" else 1e-4
        rewards = [value for name, value in first.items() if name in ("rewards/chosen", "rewards/rejected")]
        assert rewards == pytest.approx([0] * len(rewards), abs=rounding)
        assert rewards
        assert last["rewards/margins"] != 0

    trainer.save_model(str(tmp_path / "saved"))
    auto = AutoPeftModelForSequenceClassification if method.kind == "reward" else AutoPeftModelForCausalLM
    options = {"num_labels": 1} if method.kind == "reward" else {}
    if start == "4bit":
        options["quantization_config"] = BitsAndBytesConfig(**NF4)
    loaded = auto.from_pretrained(str(tmp_path / "saved"), dtype=torch.float32, **options)
    keep_4bit_trainable_on_cpu(loaded)
    with torch.no_grad():
        expected = model.eval()(**sample(tokenizer)).logits.float().log_softmax(-1)
        found = loaded.eval()(**sample(tokenizer)).logits.float().log_softmax(-1)
    # PEFT loads in float32 what was trained in bfloat16
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 if start == "4bit" else 1e-5)
