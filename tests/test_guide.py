"""The guiding model: its loss against an independent computation, its codes, saving, training, the check, the command."""

import copy
import json
import math
import random
import socket
import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path

import datasets
import pytest
import tiny
import torch
import transformers
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
    set_seed,
)

from trl_ift.data.inference import tokenizer_digest
from trl_ift.latent import training
from trl_ift.latent.encoders import Sample, token_ids, whole_token_ids
from trl_ift.latent.guide import (
    GuideConfig,
    GuideEncoder,
    GuideModel,
    GuideOutput,
    LatentGuide,
    apply_word_dropout,
    embedding_rms,
    gaussian_kl,
    partners_of,
    reconstruction_check,
    save_guide,
)
from trl_ift.latent.training import (
    GuideCollator,
    GuideTrainer,
    GuideTrainingArguments,
    check_sources,
    main,
    train_guide,
)
from trl_ift.trl_internals import LogProbFunction


SAMPLES = [Sample(question, f" {answer}") for question, answer in tiny.QUESTIONS]
# Encoder and decoder
PAIRS = [("llama", "llama"), ("llama", "qwen2"), ("qwen2", "gemma2"), ("gemma", "gpt-neox"), ("bert", "llama-tied")]
WORDS = [" Paris", " blue", " fish", " water", " Tuesday", " green", " Eight", " seas"]


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name in ("TRL_IFT_DEBUG", "RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def bert_tokenizer(tokenizer):
    """The same vocabulary under other rules: a token in front, one behind, a mask token."""
    special = {"cls_token": "<|endoftext|>", "sep_token": "<|im_start|>", "mask_token": "<|im_end|>"}
    made = PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(tokenizer.backend_tokenizer), pad_token="<|pad|>", **special
    )
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|im_start|>", special_tokens=[("<|endoftext|>", 0), ("<|im_start|>", 1)]
    )
    return made


def bert(tokenizer, head=False, seed=2, **overrides):
    torch.manual_seed(seed)
    options = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    options |= {"max_position_embeddings": 96, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    model = (BertForMaskedLM if head else BertModel)(BertConfig(**options | overrides))
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.xavier_uniform_(parameter)
    return model.eval()


def encoder_of(family, tokenizer, **overrides):
    return bert(tokenizer, **overrides) if family == "bert" else tiny.model(family, tokenizer, seed=1, **overrides)


def make(tokenizer, encoder="llama", decoder="llama", **options):
    """A guide with likely and unlikely tokens, on which the code has an influence."""
    torch.manual_seed(5)
    options = {"latent_dim": 6, "memory_tokens": 3, "max_length": 64} | options
    made = GuideModel.of(encoder_of(encoder, tokenizer), tiny.model(decoder, tokenizer), **options)
    with torch.no_grad():
        made.decoder.get_output_embeddings().weight.mul_(4)
        torch.nn.init.normal_(made.latent_head.norm.weight)
        torch.nn.init.normal_(made.latent_head.norm.bias)
        if options.get("variational"):
            torch.nn.init.normal_(made.latent_head.log_var.weight)
            torch.nn.init.normal_(made.latent_head.log_var.bias)
    return made.eval()


def rows_of(samples, tokenizer, encoder_tokenizer=None, max_length=64):
    """Rows as the training makes them."""
    rows = []
    for sample in samples:
        prompt, answer = token_ids(sample, tokenizer, max_length)
        rows.append({"prompt_ids": prompt, "answer_ids": answer})
        if encoder_tokenizer is not None:
            prompt, answer = token_ids(sample, encoder_tokenizer, max_length)
            rows[-1] |= {"encoder_prompt_ids": prompt, "encoder_answer_ids": answer}
    return rows


def batch_of(samples, tokenizer, encoder_tokenizer=None, reconstruct="completion"):
    batch = GuideCollator(tokenizer, encoder_tokenizer, reconstruct)(rows_of(samples, tokenizer, encoder_tokenizer))
    batch.pop("completion_mask")
    return batch


def mean_by_hand(guide, prompt, answer):
    """The code of one answer, (D,), in the dtype of the guide, without padding, with its normalised features."""
    hidden = guide.encoder(input_ids=torch.tensor([prompt + answer])).last_hidden_state[0, len(prompt) :]
    assert len(hidden) == len(answer)
    pooled = hidden.sum(0) / len(answer)
    centred = pooled - pooled.mean()
    norm = guide.latent_head.norm
    features = centred / torch.sqrt(centred.square().mean() + 1e-5) * norm.weight + norm.bias
    return guide.latent_head.mean.weight @ features + guide.latent_head.mean.bias, features


def nll_by_hand(guide, z, prompt, answer, full=False):
    """The loss of one answer from a code, with the decoder's own forward and all logits."""
    decoder, ids = guide.decoder, torch.tensor([prompt + answer])
    projection = guide.memory_projection
    memory = (projection.weight @ z + projection.bias).view(1, guide.config.memory_tokens, -1)
    inputs = torch.cat([memory, decoder.get_input_embeddings()(ids)], 1)
    logits = type(decoder).forward(decoder, inputs_embeds=inputs).logits[0]
    log_probs = logits[guide.config.memory_tokens - 1 : -1].log_softmax(-1).gather(-1, ids[0, :, None])[:, 0]
    assert len(log_probs) == len(prompt + answer)
    return -log_probs.mean() if full else -log_probs[len(prompt) :].mean()


def doubled(guide):
    """A float64 copy."""
    other = copy.deepcopy(guide).double()
    # copies of the models as they were before they got a fused head
    other.decoder.__dict__.pop("forward", None)
    return other


# ---------------------------------------------------------------- functions on tensors


def test_kl_numbers():
    mean = torch.tensor([[0.5, -1.0], [0, 0]], dtype=torch.float64)
    log_var = torch.tensor([[0, math.log(0.25)], [0, 0]], dtype=torch.float64)
    found = gaussian_kl(mean, log_var)
    assert found.tolist() == pytest.approx([0.9431471806, 0.0], abs=1e-10)
    normal = torch.distributions.Normal
    torch.manual_seed(0)
    mean, log_var = torch.randn(5, 4).double(), torch.randn(5, 4).double()
    expected = torch.distributions.kl_divergence(
        normal(mean, torch.exp(log_var / 2)), normal(torch.zeros(4).double(), torch.ones(4).double())
    )
    torch.testing.assert_close(gaussian_kl(mean, log_var), expected.sum(-1), rtol=1e-12, atol=0)
    # floors are those of each dimension of each sample: batches do not matter
    floor = 0.3
    assert (expected < floor).any()
    assert (expected > floor).any()
    torch.testing.assert_close(
        gaussian_kl(mean, log_var, floor), expected.clamp(min=floor).sum(-1), rtol=1e-12, atol=0
    )


def test_free_bits_have_no_gradient():
    mean = torch.tensor([[0.1, 2.0]], requires_grad=True)
    gaussian_kl(mean, torch.zeros(1, 2), 0.5).sum().backward()
    assert mean.grad.tolist() == [[0, 2]]  # divergences 0.005 and 2


def test_word_dropout_function():
    ids = torch.arange(20_000).view(10, -1)
    candidates = ids % 2 == 0
    torch.manual_seed(0)
    found = apply_word_dropout(ids, candidates, 0.3, -7)
    changed = found != ids
    assert (found[changed] == -7).all()
    assert not changed[~candidates].any()
    assert changed[candidates].float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(apply_word_dropout(ids, candidates, 1.0, 3), torch.where(candidates, 3, ids))
    assert torch.equal(apply_word_dropout(ids, candidates, 0.0, 3), ids)
    assert ids[0, 0] == 0  # not in place
    torch.manual_seed(0)
    assert torch.equal(apply_word_dropout(ids, candidates, 0.3, -7), found)


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("reconstruct", ["completion", "full"])
@pytest.mark.parametrize(("encoder", "decoder"), PAIRS)
def test_loss_and_gradients_by_hand(encoder, decoder, reconstruct, tokenizer, bert_tokenizer):
    """Padded batches of answers of many lengths against float64, one by one, without padding, mask or fused head."""
    own = bert_tokenizer if encoder == "bert" else None
    guide = make(tokenizer, encoder, decoder)
    double = doubled(guide)
    batch = batch_of(SAMPLES, tokenizer, own, reconstruct)
    lengths = batch["encoder_attention_mask"].sum(1)
    assert len(set(lengths.tolist())) > 3
    output = guide(**batch)
    assert output.nll.dtype == output.mean.dtype == torch.float32
    assert output.log_var is None
    output.nll.mean().backward()

    expected = []
    for row, mean in zip(rows_of(SAMPLES, tokenizer, own), output.mean, strict=True):
        prefix = "" if own is None else "encoder_"
        z, _ = mean_by_hand(double, row[f"{prefix}prompt_ids"], row[f"{prefix}answer_ids"])
        torch.testing.assert_close(mean.double(), z, rtol=1e-4, atol=1e-5)
        expected.append(nll_by_hand(double, z, row["prompt_ids"], row["answer_ids"], reconstruct == "full"))
    expected = torch.stack(expected)
    torch.testing.assert_close(output.nll.double(), expected, rtol=2e-5, atol=0)
    assert expected.max() - expected.min() > 0.2
    expected.mean().backward()
    compared = 0
    for (name, parameter), (other, value) in zip(guide.named_parameters(), double.named_parameters(), strict=True):
        assert name == other
        if value.grad is None:
            assert parameter.grad is None
            continue
        error = (parameter.grad.double() - value.grad).norm() / value.grad.norm().clamp(min=1e-4)
        assert error < 1e-3, (name, error.item())
        compared += int(value.grad.norm() > 1e-4)
    assert compared > 20


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma2", "gpt-neox"])
def test_memory_is_as_large_as_the_embeddings_that_the_model_sees(family, tokenizer):
    """Gemma multiplies token embeddings by the root of the hidden size; what `inputs_embeds` takes is behind that."""
    decoder = tiny.model(family, tokenizer)
    ids = torch.arange(len(tokenizer))[None]
    with torch.no_grad():
        seen = decoder(input_ids=ids[:, :50], output_hidden_states=True).hidden_states[0]
        again = decoder(inputs_embeds=decoder.get_input_embeddings()(ids[:, :50]), output_hidden_states=True)
    torch.testing.assert_close(again.hidden_states[0], seen)
    rms = embedding_rms(decoder)
    raw = decoder.get_input_embeddings().weight.square().mean().sqrt().item()
    assert rms == pytest.approx(raw * (4 if family.startswith("gemma") else 1), rel=1e-5)
    assert seen.square().mean().sqrt().item() == pytest.approx(rms, rel=0.1)
    torch.manual_seed(0)
    guide = GuideModel.of(tiny.model("llama", tokenizer), decoder, latent_dim=64, memory_tokens=4)
    memory = guide.memory_projection(torch.randn(500, 64))
    assert memory.square().mean().sqrt().item() == pytest.approx(rms, rel=0.1)
    codes = guide.encode_samples(SAMPLES, tokenizer, 4096)
    assert codes.square().mean().sqrt().item() == pytest.approx(1, rel=0.3)


def test_large_vocabularies_are_sampled(tokenizer):
    decoder = tiny.model("llama", tokenizer)
    decoder.resize_token_embeddings(10_000, mean_resizing=False)
    weight = torch.nn.init.normal_(decoder.get_input_embeddings().weight).detach()
    assert embedding_rms(decoder) == pytest.approx(weight[::3].square().mean().sqrt().item(), rel=1e-5)


def test_padding_and_batches_do_not_matter(tokenizer):
    guide = make(tokenizer)
    with torch.no_grad():
        together = guide(**batch_of(SAMPLES, tokenizer)).nll
        for size in (1, 3):
            parts = [guide(**batch_of(SAMPLES[i : i + size], tokenizer)).nll for i in range(0, len(SAMPLES), size)]
            torch.testing.assert_close(torch.cat(parts), together, rtol=1e-5, atol=0)
        batch = batch_of(SAMPLES, tokenizer)
        for name in ("input_ids", "encoder_input_ids"):
            mask = batch["encoder_attention_mask"]
            batch[name] = torch.where(mask, batch[name], 17)
        torch.testing.assert_close(guide(**batch).nll, together, rtol=1e-6, atol=0)


@pytest.mark.parametrize("reconstruct", ["completion", "full"])
def test_only_scored_positions_are_projected(reconstruct, tokenizer, monkeypatch):
    rows, original = [], LogProbFunction.apply

    def counting(hidden, *args):
        rows.append(len(hidden))
        return original(hidden, *args)

    monkeypatch.setattr(LogProbFunction, "apply", counting)
    batch = batch_of(SAMPLES, tokenizer, reconstruct=reconstruct)
    make(tokenizer)(**batch)
    assert rows == [int((batch["labels"] != -100).sum())]


def test_answer_without_prompt_tokens(tokenizer):
    """The first token is predicted from the code alone."""
    guide, double = make(tokenizer), doubled(make(tokenizer))
    row = {"prompt_ids": [], "answer_ids": tokenizer("Four.")["input_ids"]}
    batch = GuideCollator(tokenizer)([row])
    batch.pop("completion_mask")
    z, _ = mean_by_hand(double, **{k.removesuffix("_ids"): v for k, v in row.items()})
    expected = nll_by_hand(double, z, [], row["answer_ids"])
    assert guide(**batch).nll.item() == pytest.approx(expected.item(), rel=1e-5)


def test_low_precision_keeps_the_head_in_float32(tokenizer):
    guide = make(tokenizer)
    low = GuideModel.of(
        encoder_of("llama", tokenizer).bfloat16(),
        tiny.model("llama", tokenizer).bfloat16(),
        latent_dim=6,
        memory_tokens=3,
    )
    own = {*low.latent_head.parameters(), *low.memory_projection.parameters()}
    assert {p.dtype for p in own} == {torch.float32}
    assert {p.dtype for p in low.parameters() if p not in own} == {torch.bfloat16}
    low.latent_head.load_state_dict(guide.latent_head.state_dict())
    batch = batch_of(SAMPLES, tokenizer)
    found = low(**batch)
    assert found.nll.dtype == found.mean.dtype == torch.float32
    with torch.no_grad():
        expected = guide(**batch).mean
    torch.testing.assert_close(found.mean, expected, rtol=0, atol=0.1)
    # Mixed precision leaves the head alone: exact, from the same hidden states
    hidden, mask = torch.randn(2, 5, 16), torch.ones(2, 5).bool()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = guide.latent_head(hidden, mask)[0]
        memory_nll = guide.decode(expected, batch["input_ids"], batch["labels"])
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, guide.latent_head(hidden, mask)[0])
    assert memory_nll.dtype == torch.float32


def test_variational_codes_are_sampled_in_training_only(tokenizer):
    guide, batch = make(tokenizer, variational=True), batch_of(SAMPLES, tokenizer)
    with torch.no_grad():
        first, second = guide(**batch), guide(**batch)
        assert torch.equal(first.nll, second.nll)
        assert first.log_var.shape == first.mean.shape == (8, 6)
        _, features = mean_by_hand(guide, **_tokens(SAMPLES[3], tokenizer))
        expected = guide.latent_head.log_var.weight @ features + guide.latent_head.log_var.bias
        torch.testing.assert_close(first.log_var[3], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(guide.decode(first.mean, batch["input_ids"], batch["labels"]), first.nll)
        guide.train()
        torch.manual_seed(3)
        sampled = guide(**batch)
        torch.manual_seed(3)
        codes = sampled.mean + torch.exp(sampled.log_var / 2) * torch.randn(8, 6)
        assert torch.equal(sampled.nll, guide.decode(codes, batch["input_ids"], batch["labels"]))
        assert not torch.allclose(sampled.nll, first.nll, rtol=1e-3)
        assert not torch.allclose(guide(**batch).nll, sampled.nll, rtol=1e-3)


def _tokens(sample, tokenizer):
    prompt, answer = token_ids(sample, tokenizer, 64)
    return {"prompt": prompt, "answer": answer}


def test_variational_head_starts_at_the_prior(tokenizer):
    made = GuideModel.of(bert(tokenizer), tiny.model("llama", tokenizer), latent_dim=6, variational=True)
    with torch.no_grad():
        assert (made.eval()(**batch_of(SAMPLES, tokenizer)).log_var == 0).all()


def test_of_copies_shared_weights_and_leaves_loaded_ones(tokenizer):
    decoder = tiny.model("llama", tokenizer)
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    guide = GuideModel.of(decoder, decoder, latent_dim=4)
    assert not {id(p) for p in guide.encoder.parameters()} & {id(p) for p in guide.decoder.parameters()}
    for name, value in before.items():
        assert torch.equal(guide.decoder.state_dict()[name], value)
    for name, value in guide.encoder.state_dict().items():
        assert torch.equal(value, before[f"model.{name}"])
    assert guide.decoder is decoder
    other = tiny.model("llama", tokenizer, seed=1)
    assert GuideModel.of(other, decoder, latent_dim=4).encoder is other.model  # no copy
    assert guide.encoder(input_ids=torch.tensor([[5, 6]])).past_key_values is None  # no cache is built
    # attention stays what it was: transformers resets that of configs it is given
    assert guide.decoder.config._attn_implementation == "sdpa"
    assert guide.encoder.config._attn_implementation == "sdpa"


def test_config_is_checked():
    for options, expected in (
        ({"latent_dim": 0}, "`latent_dim=0` is out of range"),
        ({"memory_tokens": 0}, "`memory_tokens=0` is out of range"),
        ({"max_length": 1}, "`max_length=1` is out of range"),
    ):
        with pytest.raises(ValueError, match=expected):
            GuideConfig(**options)


# ---------------------------------------------------------------- codes


def test_codes_are_the_means_in_the_order_of_the_samples(tokenizer, bert_tokenizer):
    guide = make(tokenizer, "bert", "gpt-neox", variational=True)
    double = doubled(guide)
    codes = LatentGuide(guide, tokenizer, bert_tokenizer).encode(SAMPLES)
    assert codes.shape == (8, 6)
    assert codes.dtype == torch.float32
    assert codes.device.type == "cpu"
    assert not codes.requires_grad
    for sample, code in zip(SAMPLES, codes, strict=True):
        expected, _ = mean_by_hand(double, **_tokens(sample, bert_tokenizer))
        torch.testing.assert_close(code.double(), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(
        codes, LatentGuide(guide, tokenizer).encode(SAMPLES), atol=1e-2
    )  # by the other tokenizer


def test_equal_samples_have_equal_codes_and_batches_do_not_matter(tokenizer):
    guide = make(tokenizer)
    encoder = LatentGuide(guide, tokenizer)
    codes = encoder.encode(SAMPLES)
    mixed = encoder.encode([SAMPLES[4], *SAMPLES, SAMPLES[4], Sample(SAMPLES[4].prompt, " Other"), SAMPLES[4]])
    assert torch.equal(mixed[0], mixed[5])
    assert torch.equal(mixed[0], mixed[9])
    assert torch.equal(mixed[0], mixed[11])
    assert not torch.allclose(mixed[10], mixed[0], atol=1e-3)
    torch.testing.assert_close(mixed[1:9], codes, rtol=1e-5, atol=1e-6)
    for batch_tokens in (1, 50, 10**6):
        found = LatentGuide(guide, tokenizer, batch_tokens=batch_tokens).encode(SAMPLES)
        torch.testing.assert_close(found, codes, rtol=1e-5, atol=1e-6)
    assert encoder.encode([]).shape == (0, 6)


def test_equal_samples_are_encoded_once(tokenizer, monkeypatch):
    guide, rows = make(tokenizer), []
    original = GuideEncoder.encode

    def counting(self, ids, *masks):
        rows.append(len(ids))
        return original(self, ids, *masks)

    monkeypatch.setattr(GuideEncoder, "encode", counting)
    LatentGuide(guide, tokenizer).encode([*SAMPLES, *SAMPLES])
    assert sum(rows) == 8


def test_encoding_leaves_no_trace(tokenizer):
    """Evaluation mode for the time of a call: no dropout, the modes of all parts and torch's random state as they were."""
    torch.manual_seed(0)
    guide = GuideModel.of(
        bert(tokenizer, hidden_dropout_prob=0.5), tiny.model("llama", tokenizer), latent_dim=6, max_length=64
    )
    encoder = LatentGuide(guide, tokenizer)
    expected = encoder.encode(SAMPLES)
    guide.train()
    guide.encoder.embeddings.eval()
    modes = [module.training for module in guide.modules()]
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder.encode(SAMPLES)
    assert torch.equal(found, expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in guide.modules()] == modes
    assert len(set(modes)) == 2
    with torch.no_grad():
        batch = batch_of(SAMPLES, tokenizer)
        noisy = guide.encode(*(batch[f"encoder_{name}"] for name in ("input_ids", "attention_mask", "pooling_mask")))[
            0
        ]
    assert not torch.allclose(noisy, expected, atol=1e-2)  # so that there is something to switch off


def test_answers_without_tokens_are_refused(tokenizer):
    guide = LatentGuide(make(tokenizer), tokenizer)
    with pytest.raises(ValueError, match="Sample 1: its answer has no tokens"):
        guide.encode([SAMPLES[0], Sample("Name a colour.", "")])


def test_long_samples_are_cut(tokenizer):
    guide = LatentGuide(make(tokenizer, max_length=16), tokenizer)
    start = Sample("Name a colour.", " fish live in water, in rivers and in lakes")
    codes = guide.encode([start, Sample(start.prompt, start.completion + ", and in the seas of the north")])
    assert torch.equal(codes[0], codes[1])


# ---------------------------------------------------------------- saving and loading


@pytest.mark.parametrize(("encoder", "decoder"), [*PAIRS, ("qwen3-moe", "llama-tied"), ("bert-head", "qwen3")])
def test_round_trip(encoder, decoder, tokenizer, bert_tokenizer, tmp_path):
    own = bert_tokenizer if encoder.startswith("bert") else None
    if encoder == "bert-head":
        guide = GuideModel.of(bert(tokenizer, head=True), tiny.model(decoder, tokenizer), latent_dim=6, max_length=64)
    else:
        guide = make(tokenizer, encoder, decoder, variational=decoder == "gemma2")
    folder = tmp_path / "guide"
    save_guide(guide, folder, tokenizer, own)
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {".json", ".safetensors", ".jinja"}
    assert (folder / "encoder_tokenizer").is_dir() == (own is not None)

    loaded, info = GuideModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    stored, original = loaded.state_dict(), guide.state_dict()
    assert stored.keys() == original.keys()
    for name, value in original.items():
        assert torch.equal(stored[name], value), name
    output = loaded.decoder.get_output_embeddings().weight
    assert (output is loaded.decoder.get_input_embeddings().weight) == decoder.startswith(
        ("llama-tied", "qwen", "gemma")
    )
    for part in ("encoder", "decoder"):
        assert type(getattr(loaded, part)) is type(getattr(guide, part))
    batch = batch_of(SAMPLES, tokenizer, own)
    with torch.no_grad():
        # Not bit for bit: sums depend on where the weights lie in memory
        torch.testing.assert_close(loaded.eval()(**batch).nll, guide.eval()(**batch).nll)

    from_memory = LatentGuide(guide, tokenizer, own)
    from_disk = LatentGuide.from_pretrained(folder)
    assert type(from_disk.model) is GuideEncoder
    assert not hasattr(from_disk.model, "decoder")
    assert from_disk.describe() == from_memory.describe() == LatentGuide(loaded, tokenizer, own).describe()
    torch.testing.assert_close(from_disk.encode(SAMPLES), from_memory.encode(SAMPLES))
    low = LatentGuide.from_pretrained(str(folder), dtype="bfloat16", device="cpu")
    assert low.model.encoder.dtype == torch.bfloat16
    assert low.model.latent_head.mean.weight.dtype == torch.float32
    assert low.describe() == from_disk.describe() | {"dtype": "bfloat16"}
    torch.testing.assert_close(low.encode(SAMPLES), from_disk.encode(SAMPLES), rtol=0, atol=0.2)


def test_description(tokenizer, bert_tokenizer):
    guide = make(tokenizer)
    found = LatentGuide(guide, tokenizer).describe()
    assert json.loads(json.dumps(found)) == found
    assert found == {
        "kind": "guide",
        "weights": found["weights"],
        "latent_dim": 6,
        "max_length": 64,
        "dtype": "float32",
        "tokenizer": tokenizer_digest(tokenizer),
        "encoder_tokenizer": tokenizer_digest(tokenizer),
    }
    other = LatentGuide(guide, tokenizer, bert_tokenizer).describe()
    assert other == found | {"encoder_tokenizer": tokenizer_digest(bert_tokenizer)}
    assert other != found

    def changed(name):
        copied = copy.deepcopy(guide)
        with torch.no_grad():
            dict(copied.named_parameters())[name].add_(0.5)
        return LatentGuide(copied, tokenizer).describe()["weights"] != found["weights"]

    assert changed("encoder.norm.weight")
    assert changed("latent_head.mean.bias")
    assert not changed("decoder.lm_head.weight")  # codes do not depend on the decoder
    assert not changed("memory_projection.bias")


def test_check_tokenizer(tokenizer, bert_tokenizer, tmp_path, caplog):
    save_guide(make(tokenizer, "bert"), tmp_path / "guide", tokenizer, bert_tokenizer)
    guide = LatentGuide.from_pretrained(tmp_path / "guide")
    assert not caplog.text  # transformers knows the type of the model
    guide.check_tokenizer(tokenizer)
    guide.check_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "guide"))
    message = rf"{tokenizer_digest(bert_tokenizer)}\) is not that of the guide, .*{tokenizer_digest(tokenizer)}"
    with pytest.raises(ValueError, match=message):
        guide.check_tokenizer(bert_tokenizer)  # that of the encoder does not count


def test_folders_that_are_no_guides(tokenizer, bert_tokenizer, model_dir, tmp_path):
    folder = tmp_path / "guide"
    save_guide(make(tokenizer, "bert"), folder, tokenizer, bert_tokenizer)
    config = json.loads((folder / "config.json").read_text())

    def broken(**changes):
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    (tmp_path / "unfinished" / "checkpoint-1").mkdir(parents=True)
    for make_folder, expected in (
        (lambda: model_dir, "holds a model of type 'llama', expected 'trl_ift_guide'"),
        (lambda: tmp_path / "unfinished", "it has no `config.json`.*was interrupted: run the same command again"),
        (
            lambda: broken(tokenizer_digest="0" * 16),
            f"digest {tokenizer_digest(tokenizer)}; the guide was trained with 0{{16}}",
        ),
        (lambda: broken(encoder_tokenizer_digest="0" * 16), "encoder_tokenizer` has the digest"),
        (lambda: broken(latent_dim=7), r"`latent_head.mean.*\[6.*`latent_dim=7`\) it must be \[7"),
        (lambda: broken(variational=True), "lack latent_head.log_var.bias"),
    ):
        with pytest.raises(ValueError, match=expected):
            LatentGuide.from_pretrained(make_folder())
    with pytest.raises(ValueError, match="`batch_tokens=0` is out of range"):
        LatentGuide.from_pretrained(broken(), batch_tokens=0)
    LatentGuide.from_pretrained(broken())
    # weights in a pickle are not read
    torch.save(make(tokenizer, "bert").state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    for cls in (LatentGuide, GuideModel):
        with pytest.raises(OSError, match="model.safetensors"):
            cls.from_pretrained(folder)


# ---------------------------------------------------------------- the check


def test_partners():
    generator = random.Random(0)
    for _ in range(200):
        number = generator.randint(2, 30)
        groups = [str(generator.randint(0, generator.choice([1, 3, 20]))) for _ in range(number)]
        for seed in range(3):
            partners = partners_of(groups, seed)
            assert sorted(partners) == list(range(number))
            assert all(partner != index for index, partner in enumerate(partners))
            if max(groups.count(group) for group in groups) <= number / 2:
                assert all(groups[partner] != groups[index] for index, partner in enumerate(partners))
    many = [str(i) for i in range(50)]
    assert partners_of(many, 0) == partners_of(many, 0)
    assert partners_of(many, 0) != partners_of(many, 1)
    # one cycle through all, not pairs that swap
    place, seen = 0, set()
    while place not in seen:
        seen.add(place)
        place = partners_of(many, 0)[place]
    assert len(seen) == 50


@pytest.mark.parametrize("reconstruct", ["completion", "full"])
def test_check_by_hand(reconstruct, tokenizer, bert_tokenizer):
    guide = make(tokenizer, "bert", "gemma2", variational=True)
    samples = [*SAMPLES, *(Sample(s.prompt, f" {text}") for s, text in zip(SAMPLES, tiny.REJECTED, strict=True))]
    codes = LatentGuide(guide, tokenizer, bert_tokenizer).encode(samples)
    partners = partners_of([json.dumps(sample.prompt) for sample in samples])
    assert all(samples[a].prompt != samples[b].prompt for a, b in enumerate(partners))
    expected = []
    for z in (codes, codes[partners], torch.zeros_like(codes)):
        with torch.no_grad():
            nll = [
                nll_by_hand(guide, code, *_tokens(sample, tokenizer).values(), reconstruct == "full")
                for code, sample in zip(z, samples, strict=True)
            ]
        expected.append(torch.stack(nll).double().mean().item())
    for layer in guide.decoder.model.layers:
        layer.self_attn.attention_dropout = 0.5  # in training mode only
    guide.train()
    state = torch.get_rng_state()
    results = [
        reconstruction_check(
            guide, samples, tokenizer, bert_tokenizer, reconstruct=reconstruct, batch_tokens=size, threshold=-1
        )
        for size in (8192, 40)
    ]
    assert guide.training
    assert torch.equal(torch.get_rng_state(), state)
    for found in results:
        assert [found[name] for name in ("nll", "nll_permuted", "nll_zero")] == pytest.approx(expected, rel=1e-5)
        assert found["gap"] == pytest.approx(expected[1] / expected[0] - 1, abs=1e-5)
        assert (found["samples"], found["threshold"], found["collapsed"]) == (16, -1, False)
    assert abs(results[0]["gap"]) > 1e-4


def test_check_warns_of_codes_that_carry_nothing(tokenizer):
    guide = make(tokenizer)
    torch.nn.init.zeros_(guide.memory_projection.weight)
    with pytest.warns(
        UserWarning, match=r"hardly uses the codes.*gap of 0.00% \(expected at least 1.00%\).*noise.*Train on"
    ):
        found = reconstruction_check(guide, SAMPLES, tokenizer)
    assert found["collapsed"]
    assert found["gap"] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not reconstruction_check(guide, SAMPLES, tokenizer, threshold=0.0)["collapsed"]


def test_check_of_bad_input(tokenizer):
    guide = make(tokenizer)
    with pytest.raises(ValueError, match="at least two samples, found 1"):
        reconstruction_check(guide, SAMPLES[:1], tokenizer)
    with pytest.raises(ValueError, match="Sample 1: its answer has no tokens"):
        reconstruction_check(guide, [SAMPLES[0], Sample("a", "")], tokenizer)
    with pytest.raises(ValueError, match="`reconstruct='prompt'` is not known"):
        reconstruction_check(guide, SAMPLES, tokenizer, reconstruct="prompt")
    torch.nn.init.constant_(guide.memory_projection.weight, float("nan"))
    with pytest.raises(ValueError, match="is nan: the training diverged. Lower"):
        reconstruction_check(guide, SAMPLES, tokenizer)


# ---------------------------------------------------------------- training


def arguments(folder, **options):
    defaults = {
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "encoder_learning_rate": 1e-2,
        "decoder_learning_rate": 1e-2,
        "latent_dim": 6,
        "memory_tokens": 2,
        "max_length": 64,
    }
    return GuideTrainingArguments(str(folder), **(defaults | options))


@pytest.fixture
def train(tmp_path, tokenizer, monkeypatch):
    """`train_guide` on tiny models, with the options of `arguments`; keeps the trainers in `train.trainers`."""

    class Recording(GuideTrainer):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            call.trainers.append(self)

    def call(folder="guide", dataset=None, encoder="llama", decoder="llama", seeds=(1, 0), tokenizers=None, **options):
        own, other = tokenizers or (tokenizer, tokenizer)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The decoder hardly uses the codes")
            return train_guide(
                bert(other, seed=seeds[0]) if encoder == "bert" else tiny.model(encoder, tokenizer, seed=seeds[0]),
                tiny.model(decoder, tokenizer, seed=seeds[1]),
                tiny.preference_data() if dataset is None else dataset,
                arguments(tmp_path / folder, **options),
                processing_class=own,
                encoder_processing_class=other,
            )

    call.trainers = []
    monkeypatch.setattr(training, "GuideTrainer", Recording)
    return call


def test_no_pickled_arguments(train, tmp_path):
    train(save_strategy="steps", save_steps=1, max_steps=2)
    assert list((tmp_path / "guide").glob("checkpoint-*"))
    assert not list((tmp_path / "guide").rglob("training_args.bin"))


def weights(guide):
    return {name: value.detach().clone() for name, value in guide.named_parameters()}


def same(first, second):
    first, second = weights(first), weights(second)
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def result(tmp_path, folder="guide"):
    return json.loads((tmp_path / folder / "guide.json").read_text())


def entries(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("reconstruct", ["completion", "full"])
def test_training_saves_a_guide_and_its_check(reconstruct, train, tmp_path, tokenizer, capsys):
    guide = train(reconstruct=reconstruct)
    assert not guide.training
    assert isinstance(guide, GuideModel)
    assert capsys.readouterr().out.count("on 8 answers; 8 are held out") == 1
    loaded = GuideModel.from_pretrained(tmp_path / "guide")
    assert same(guide, loaded)
    assert loaded.config.max_length == 64
    assert not list((tmp_path / "guide").rglob("*.bin"))
    found = result(tmp_path)
    assert found["training"]["steps"] == 3
    trainer = train.trainers[0]
    data, held = tiny.preference_data(), trainer.eval_dataset
    assert len(set(held["row"])) == 4
    assert not set(held["row"]) & set(trainer.train_dataset["row"])
    assert set(held["row"]) | set(trainer.train_dataset["row"]) == set(range(8))
    samples = [
        Sample(data[row]["prompt"], data[row][column]) for row, column in zip(held["row"], held["column"], strict=True)
    ]
    assert {sample.completion for sample in samples} == {
        data[row][column] for row in set(held["row"]) for column in ("chosen", "rejected")
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found["check"] == reconstruction_check(loaded, samples, tokenizer, reconstruct=reconstruct)
    codes = LatentGuide.from_pretrained(tmp_path / "guide").encode(SAMPLES)
    assert torch.equal(codes, LatentGuide(guide, tokenizer).encode(SAMPLES))


def untrained(tokenizer):
    """What `train` starts from."""
    models = tiny.model("llama", tokenizer, seed=1), tiny.model("llama", tokenizer)
    set_seed(42)
    return GuideModel.of(*models, latent_dim=6, memory_tokens=2)


def test_loss_of_the_trainer(train, tokenizer):
    """What is logged, and the gradient, is the mean over samples of what `test_loss_and_gradients_by_hand` compares."""
    train(word_dropout=0.0, max_steps=2, per_device_train_batch_size=8, eval_strategy="steps", eval_steps=1)
    trainer = train.trainers[0]
    batch = trainer.data_collator(list(trainer.train_dataset))
    batch.pop("completion_mask")
    with torch.no_grad():
        expected = untrained(tokenizer)(**batch).nll.mean().item()
    assert entries(trainer, "loss")[0] == pytest.approx(expected, rel=1e-5)
    assert entries(trainer, "guide/nll") == pytest.approx(entries(trainer, "loss"), rel=1e-5)
    assert entries(trainer, "eval_guide/nll") == pytest.approx(entries(trainer, "eval_loss"), rel=1e-5)
    batch = trainer.data_collator(list(trainer.eval_dataset))
    batch.pop("completion_mask")
    with torch.no_grad():
        assert entries(trainer, "eval_loss")[-1] == pytest.approx(trainer.model(**batch).nll.mean().item(), rel=1e-5)
    assert "guide/kl" not in trainer.state.log_history[0]


class _Stub(torch.nn.Module):
    """Stands in for a guide: keeps its arguments."""

    def forward(self, **inputs):
        self.inputs = inputs
        return GuideOutput(nll=torch.ones(len(inputs["input_ids"])))


@pytest.mark.parametrize("reconstruct", ["completion", "full"])
def test_word_dropout_in_training_only_and_on_answers_only(reconstruct, train, tokenizer):
    train(max_steps=1, word_dropout=0.5, reconstruct=reconstruct)
    trainer, stub = train.trainers[0], _Stub()
    batch = GuideCollator(tokenizer, None, reconstruct)(rows_of(SAMPLES, tokenizer))
    before = {name: value.clone() for name, value in batch.items()}
    completion = before["completion_mask"]
    trainer.model.train()
    trainer.compute_loss(stub, dict(batch))
    assert stub.inputs.keys() == before.keys() - {"completion_mask"}
    for name, value in stub.inputs.items():
        if name != "input_ids":
            assert torch.equal(value, before[name]), name
    changed = stub.inputs["input_ids"] != before["input_ids"]
    assert 0.3 < changed.sum() / completion.sum() < 0.7
    assert not changed[~completion].any()
    assert (stub.inputs["input_ids"][changed] == tokenizer.pad_token_id).all()
    trainer.model.eval()
    trainer.compute_loss(stub, dict(batch))
    assert torch.equal(stub.inputs["input_ids"], before["input_ids"])
    assert (before["labels"] != -100).sum() == (
        before["encoder_attention_mask"] if reconstruct == "full" else completion
    ).sum()


def test_token_that_stands_for_dropped_ones(tokenizer, bert_tokenizer):
    assert training._dropout_token(bert_tokenizer, 0.3) == bert_tokenizer.mask_token_id
    assert training._dropout_token(tokenizer, 0.3) == tokenizer.pad_token_id
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    assert training._dropout_token(bare, 0.3) == bare.eos_token_id
    none = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert training._dropout_token(none, 0) == 0
    with pytest.raises(ValueError, match="`word_dropout=0.3`, but the tokenizer has no mask"):
        training._dropout_token(none, 0.3)


def test_divergence_in_the_loss(train, tokenizer):
    """Its weight grows over the first steps; what is logged is the divergence itself, without floor and weight."""
    options = {"variational": True, "kl_weight": 0.5, "free_bits": 0.4, "kl_warmup_ratio": 0.5, "max_steps": 8}
    train(**options, word_dropout=0.0)
    trainer = train.trainers[0]
    nll, kl, loss = (entries(trainer, name) for name in ("guide/nll", "guide/kl", "loss"))
    assert len(nll) >= 8
    assert loss[0] == pytest.approx(nll[0], rel=1e-6)  # weight 0
    assert all(value > first for value, first in zip(loss[1:8], nll[1:8], strict=True))
    guide = trainer.model.train()
    batch = GuideCollator(tokenizer)(rows_of(SAMPLES, tokenizer))
    for step, weight in ((0, 0.0), (1, 0.125), (3, 0.375), (4, 0.5), (7, 0.5)):
        trainer.state.global_step = step
        torch.manual_seed(step)
        found = trainer.compute_loss(guide, dict(batch))
        torch.manual_seed(step)
        output = guide(**{name: value for name, value in batch.items() if name != "completion_mask"})
        divergence = 0.5 * (output.log_var.exp() + output.mean**2 - 1 - output.log_var)
        expected = output.nll.mean() + weight * divergence.clamp(min=0.4).sum(1).mean()
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    trainer._sums.clear()
    trainer.compute_loss(guide, dict(batch))
    number = len(trainer.state.log_history)
    trainer.log({})
    assert trainer.state.log_history[number]["guide/kl"] == pytest.approx(divergence.sum(1).mean().item(), rel=1e-5)
    assert kl[0] > 0


def test_ragged_accumulation_is_a_larger_batch(train):
    """Seven samples in steps of four: micro-batches of 2, 2 and 2, 1 give the weights of batches of 4 and 3."""
    dataset = tiny.prompt_completion_data().select(range(7))
    dataset = Dataset.from_list([*dataset, *tiny.prompt_completion_data().to_list()[4:8], *dataset.to_list()[:3]])
    options = {
        "optim": "sgd",
        "word_dropout": 0.0,
        "max_steps": 4,
        "encoder_learning_rate": 0.3,
        "decoder_learning_rate": 0.3,
    }
    whole = train("whole", dataset, per_device_train_batch_size=4, **options)
    parts = train("parts", dataset, per_device_train_batch_size=2, gradient_accumulation_steps=2, **options)
    assert len(train.trainers[0].train_dataset) == 7
    untrained = train(
        "untrained", dataset, per_device_train_batch_size=4, **options | {"max_steps": 1, "decoder_learning_rate": 0}
    )
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], value, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(
        weights(untrained)["decoder.lm_head.weight"], weights(whole)["decoder.lm_head.weight"], atol=1e-4
    )
    first, second = train.trainers[:2]
    assert entries(second, "loss") == pytest.approx(entries(first, "loss"), rel=1e-5)
    assert entries(second, "guide/nll") == pytest.approx(entries(first, "guide/nll"), rel=1e-5)


def test_two_learning_rates(train, tokenizer):
    def moved(**options):
        guide = train(json.dumps(options), optim="sgd", max_steps=1, word_dropout=0.0, max_grad_norm=1e9, **options)
        return {name: weights(guide)[name] - value for name, value in weights(untrained(tokenizer)).items()}

    base = moved(encoder_learning_rate=1e-2, decoder_learning_rate=1e-2)
    assert all(change.any() for change in base.values())
    other = moved(encoder_learning_rate=3e-2, decoder_learning_rate=5e-2)
    for name, change in base.items():
        factor = 3 if name.startswith(("encoder.", "latent_head.")) else 5
        torch.testing.assert_close(other[name], factor * change, rtol=1e-2, atol=1e-6, msg=name)
    optimizer = train.trainers[-1].optimizer
    assert {group["initial_lr"] for group in optimizer.param_groups} == {3e-2, 5e-2}
    number = sum(len(group["params"]) for group in optimizer.param_groups)
    assert number == len(list(train.trainers[-1].model.parameters()))


def test_weight_decay_as_in_transformers(train):
    train(weight_decay=0.1)
    trainer = train.trainers[0]
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert (group["weight_decay"] == 0) == ("norm" in name or name.endswith("bias")), name


def test_what_is_trained_of_the_decoder(train, tokenizer, tmp_path, monkeypatch):
    adapters, original = [], training.get_peft_model

    def recording(model, config):
        adapters.append((config.r, config.lora_alpha))
        return original(model, config)

    monkeypatch.setattr(training, "get_peft_model", recording)
    start = tiny.model("llama", tokenizer).state_dict()
    for mode in ("full", "memory", "lora"):
        guide = train(mode, decoder_training=mode, **({"lora_r": 2} if mode == "lora" else {}), save_strategy="steps")
        changed = {name for name, value in guide.decoder.state_dict().items() if not torch.equal(value, start[name])}
        linear = {name for name in start if "_proj." in name}
        assert changed == {"full": set(start), "memory": set(), "lora": linear}[mode]
        assert same(guide, GuideModel.from_pretrained(tmp_path / mode))
        trained = weights(train.trainers[-1].model)
        if mode == "memory":
            assert not any(p.requires_grad for p in guide.decoder.parameters())
        checkpoint = tmp_path / mode / "checkpoint-3" / "model.safetensors"
        size = {"full": 1.0, "memory": 0.8, "lora": 0.95}[mode] * 4 * sum(map(torch.numel, trained.values()))
        assert checkpoint.stat().st_size < size + 20_000
    assert adapters == [(2, 4)]


# option -> (other options, its value, what is compared)
OPTIONS = {
    "guide_data": ({}, "real"),
    "reconstruct": ({}, "full"),
    "latent_dim": ({}, 7),
    "memory_tokens": ({}, 3),
    "variational": ({}, True),
    "kl_weight": ({"variational": True}, 0.3),
    "free_bits": ({"variational": True, "kl_weight": 0.3}, 1.0),
    "kl_warmup_ratio": ({"variational": True, "kl_weight": 0.3}, 1.0),
    "word_dropout": ({}, 0.6),
    "encoder_learning_rate": ({}, 2e-2),
    "decoder_learning_rate": ({}, 2e-2),
    "decoder_training": ({}, "memory"),
    "lora_r": ({"decoder_training": "lora"}, 3),
    "max_length": ({}, 14),
    "eval_fraction": ({}, 0.45),
    "collapse_threshold": ({}, 1e-9),
}


def test_all_options_are_tried():
    inherited = {field.name for field in fields(TrainingArguments)}
    own = {field.name for field in fields(GuideTrainingArguments)} - inherited
    assert own == set(OPTIONS)
    for field in fields(GuideTrainingArguments):
        if field.name in own | {"num_train_epochs", "logging_steps"}:
            assert field.metadata["help"]
            assert f"        {field.name} (`" in GuideTrainingArguments.__doc__
    defaults = {field.name: field.default for field in fields(GuideTrainingArguments)}
    assert (defaults["num_train_epochs"], defaults["logging_steps"], defaults["max_length"]) == (1.0, 10, 512)
    assert (defaults["latent_dim"], defaults["memory_tokens"], defaults["word_dropout"]) == (128, 8, 0.3)
    assert (defaults["encoder_learning_rate"], defaults["decoder_learning_rate"]) == (5e-5, 5e-5)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_acts(option, train, tmp_path):
    others, value = OPTIONS[option]
    dataset = Dataset.from_list([*tiny.preference_data(), *tiny.preference_data().select(range(8))] * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = train("base", dataset, **others)
        changed = train("changed", dataset, **(others | {option: value}))
    if option == "collapse_threshold":
        first, second = (result(tmp_path, folder)["check"] for folder in ("base", "changed"))
        assert (first["threshold"], second["threshold"]) == (0.01, 1e-9)
        assert first["gap"] == second["gap"]
    elif option == "eval_fraction":
        first, second = train.trainers
        assert (len(first.eval_dataset), len(second.eval_dataset)) == (16, 28)
    else:
        first, second = weights(base), weights(changed)
        assert {name: value.shape for name, value in first.items()} != {
            name: value.shape for name, value in second.items()
        } or max((value - second[name]).abs().max() for name, value in first.items()) > 1e-4


def test_gradient_checkpointing_and_mixed_precision_train_the_same(train):
    base = train("base")
    again = train("checkpointing", gradient_checkpointing=True)
    for name, value in weights(base).items():
        torch.testing.assert_close(weights(again)[name], value, rtol=1e-4, atol=1e-5)
    mixed = train("bf16", bf16=True, optim="sgd", max_steps=1)
    plain = train("fp32", optim="sgd", max_steps=1)
    assert not same(mixed, plain)
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(mixed)[name], value, rtol=0.1, atol=2e-3)
    assert mixed.forward.__func__ is GuideModel.forward  # accelerate's wrapper is gone


@pytest.mark.parametrize(
    "options",
    [
        {"train_sampling_strategy": "group_by_length"},
        {"variational": True, "kl_weight": 0.1, "kl_warmup_ratio": 0.5, "gradient_accumulation_steps": 2},
        {"decoder_training": "lora", "lora_r": 4},
        {"decoder_training": "memory", "encoder": "bert"},
    ],
)
def test_interrupted_run_goes_on(options, train, tmp_path, monkeypatch):
    """From the last complete checkpoint, with word dropout and sampled codes: the weights of an uninterrupted run."""
    options = options | {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    whole, steps = train("whole", **options), []
    original = GuideTrainer.training_step

    def interrupted(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(GuideTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train("parts", **options)
    assert not (tmp_path / "parts" / "guide.json").exists()
    with pytest.raises(ValueError, match="holds no guide: it has no `config.json`"):
        LatentGuide.from_pretrained(tmp_path / "parts")
    (tmp_path / "parts" / "checkpoint-9").mkdir()  # of an interruption while it was written

    def counting(self, *args, **kwargs):
        steps.append(self.state.global_step)
        return original(self, *args, **kwargs)

    steps.clear()
    with monkeypatch.context() as patch:
        patch.setattr(GuideTrainer, "training_step", counting)
        parts = train("parts", **options)
    assert set(steps) == {4, 5}
    assert same(parts, whole)
    assert result(tmp_path, "parts") == result(tmp_path, "whole")
    assert entries(train.trainers[-1], "loss") == entries(train.trainers[0], "loss")


def test_interrupted_before_the_end(train, tmp_path, monkeypatch):
    """After the training, and before the check was written."""
    whole = train("whole", save_strategy="steps")

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "reconstruction_check", stop)
        with pytest.raises(KeyboardInterrupt):
            train("parts", save_strategy="steps")
    assert not (tmp_path / "parts" / "guide.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(GuideTrainer, "training_step", stop)
        parts = train("parts", save_strategy="steps")
    assert same(parts, whole)
    assert result(tmp_path, "parts") == result(tmp_path, "whole")


def test_finished_guide_is_returned_or_defended(train, tmp_path, tokenizer, monkeypatch, capsys):
    guide = train()
    files = {path: path.read_bytes() for path in (tmp_path / "guide").rglob("*") if path.is_file()}

    def fail(*args, **kwargs):
        raise AssertionError("trained")

    monkeypatch.setattr(GuideTrainer, "train", fail)
    monkeypatch.setattr(training, "reconstruction_check", fail)
    capsys.readouterr()
    again = train(logging_steps=7, disable_tqdm=False)
    assert same(again, guide)
    assert capsys.readouterr().out == f"The guide in {tmp_path / 'guide'} is trained.\n"
    data = tiny.preference_data().to_list()
    data[3]["rejected"] += "!"
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ messages }}"
    for options, expected in (
        ({"encoder_learning_rate": 0.5}, r"encoder_learning_rate=0.01 \(now 0.5\)"),
        ({"eval_fraction": 0.3}, r"eval_fraction=0.05 \(now 0.3\)"),
        ({"max_steps": 4}, r"max_steps=3 \(now 4\)"),
        ({"dataset": Dataset.from_list(data)}, r"tokens='\w{16}' \(now '\w{16}'\)"),
        ({"dataset": tiny.preference_data().select(range(7))}, r"rows=8 \(now 7\), answers=16 \(now 14\)"),
        ({"dataset": tiny.preference_data().select([1, 0, *range(2, 8)])}, "tokens="),
        ({"seeds": (3, 0)}, r"encoder_weights='\w{16}' \(now '\w{16}'\)\. Choose"),
        ({"seeds": (1, 3)}, r"decoder_weights='\w{16}' \(now '\w{16}'\)\. Choose"),
        ({"tokenizers": (other, other)}, r"`output_dir='.*guide'` holds a run that was made with tokenizer='"),
        ({"tokenizers": (tokenizer, other)}, "encoder_tokenizer=None"),
    ):
        with pytest.raises(ValueError, match=expected):
            train(**options)
    assert files == {path: path.read_bytes() for path in (tmp_path / "guide").rglob("*") if path.is_file()}


def test_settings_of_a_run_without_results_may_change(train, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(GuideTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train()
    train(max_steps=2)
    assert json.loads((tmp_path / "guide" / "guide_settings.json").read_text())["max_steps"] == 2


def test_checkpoints_of_another_number_of_processes(train, tmp_path, monkeypatch):
    train(save_strategy="steps", save_steps=1, max_steps=1)
    (tmp_path / "guide/guide.json").unlink()
    checkpoint = tmp_path / "guide/checkpoint-1"
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    (checkpoint / "rng_state_1.pth").write_bytes(b"")
    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match=r"checkpoint-1` is of a training in 2 processes, now"),
    ):
        patch.setattr(training, "_load_guide", None)
        train(save_strategy="steps", save_steps=1, max_steps=1)


def test_other_folders_are_left_alone(train, tmp_path):
    (tmp_path / "guide").mkdir()
    (tmp_path / "guide" / "thesis.tex").write_text("...")
    with pytest.raises(ValueError, match="is not empty, and holds no training of a guide"):
        train()
    # but for what a writer that was killed has left
    (tmp_path / "guide" / "thesis.tex").unlink()
    (tmp_path / "guide" / f".guide_settings.json.{socket.gethostname()}.99999999.tmp").write_text("{")
    train()
    assert not list((tmp_path / "guide").glob(".*.tmp"))


_IN_TWO_PROCESSES = """
import sys, warnings
sys.path.insert(0, sys.argv[1])
import test_guide, tiny
from trl_ift.latent.training import train_guide
warnings.simplefilter("ignore")
tokenizer = tiny.tokenizer()
models = tiny.model("llama", tokenizer, seed=1), tiny.model("llama", tokenizer)
args = test_guide.arguments(sys.argv[2], per_device_train_batch_size=2, **test_guide.DISTRIBUTED)
both = {"processing_class": tokenizer, "encoder_processing_class": tokenizer}
train_guide(*models, tiny.preference_data(), args, **both)
"""
DISTRIBUTED = {"optim": "sgd", "word_dropout": 0.0, "train_sampling_strategy": "sequential"}


@pytest.mark.slow
def test_two_processes_train_as_one(train, tmp_path):
    """Batches of two on each of two processes, with reductions between them, are batches of four."""
    one = train("one", **DISTRIBUTED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    script = [sys.executable, "-c", _IN_TWO_PROCESSES, str(Path(__file__).parent), str(tmp_path / "two")]
    run = subprocess.run([*launcher, *script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("Training the guide in") == 1
    two = weights(GuideModel.from_pretrained(tmp_path / "two"))
    for name, value in weights(one).items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)
    first, second = (result(tmp_path, folder) for folder in ("one", "two"))
    assert second["check"]["nll"] == pytest.approx(first["check"]["nll"], rel=1e-5)
    assert second["training"]["last_loss"] == pytest.approx(first["training"]["last_loss"], rel=1e-5)


# ---------------------------------------------------------------- data


def test_kinds_of_data(train):
    strings = train("strings", tiny.prompt_completion_data())
    assert [len(trainer.train_dataset) for trainer in train.trainers] == [4]
    train("chat", tiny.conversational_data())
    train("pairs", tiny.conversational_preference_data())
    train("real", tiny.conversational_preference_data(), guide_data="real")
    chat, pairs, real = train.trainers[1:]
    assert len(pairs.train_dataset) == 8
    assert set(pairs.train_dataset["column"]) == {"chosen", "rejected"}
    assert set(real.train_dataset["column"]) == {"chosen"}
    same_rows = [dict(row, column="") for row in chat.train_dataset]
    assert [dict(row, column="") for row in real.train_dataset] == same_rows
    tokenizer = tiny.tokenizer()
    row = tiny.conversational_data()[chat.train_dataset[0]["row"]]
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert chat.train_dataset[0]["prompt_ids"] == prompt[-32:]
    assert chat.train_dataset[0]["answer_ids"] == tokenizer(row["completion"][0]["content"])["input_ids"]
    assert strings.config.latent_dim == 6


def test_two_tokenizers(train, tokenizer, bert_tokenizer, tmp_path):
    guide = train(encoder="bert", tokenizers=(tokenizer, bert_tokenizer))
    row = train.trainers[0].train_dataset[0]
    first, last = bert_tokenizer.cls_token_id, bert_tokenizer.sep_token_id
    assert row["encoder_prompt_ids"] == [first, *row["prompt_ids"], last]
    assert row["encoder_answer_ids"] == row["answer_ids"]
    batch = train.trainers[0].data_collator([row])
    assert batch["encoder_input_ids"][0].tolist() == row["encoder_prompt_ids"] + row["encoder_answer_ids"]
    assert batch["encoder_pooling_mask"][0].sum() == len(row["answer_ids"])
    encoder = LatentGuide.from_pretrained(tmp_path / "guide")
    assert encoder.describe() == LatentGuide(guide, tokenizer, bert_tokenizer).describe()


def test_empty_and_long_answers(train, tmp_path):
    rows = tiny.preference_data().to_list()
    rows[0]["rejected"], rows[5]["chosen"] = "", ""
    with pytest.warns(UserWarning, match="Dropped 2") as caught:
        train(dataset=Dataset.from_list(rows), max_length=16)
    messages = [str(warning.message) for warning in caught]
    assert sum("Dropped 2 of 16 answers: they are empty." in message for message in messages) == 1
    tokenizer = tiny.tokenizer()
    samples = [Sample(row["prompt"], row[column]) for row in rows for column in ("chosen", "rejected") if row[column]]
    whole = [whole_token_ids(sample, tokenizer) for sample in samples]
    prompts = sum(len(prompt) > 8 for prompt, _ in whole)
    answers = sum(len(answer) > 16 - min(len(prompt), 8) for prompt, answer in whole)
    assert 0 < prompts < 14
    assert 0 < answers < 14
    said = (
        f"At `max_length=16`, {prompts} prompts (to their last 8 tokens) and {answers} answers of 14 samples were cut."
    )
    assert messages.count(said) == 1
    trainer = train.trainers[0]
    assert len(trainer.train_dataset) + len(trainer.eval_dataset) == 14
    assert max(len(row["prompt_ids"]) + len(row["answer_ids"]) for row in trainer.train_dataset) == 16
    with pytest.raises(
        ValueError, match=r"All 8 answers are empty: nothing to train on. Check the columns \['completion'\]"
    ):
        train("empty", Dataset.from_list([{"prompt": "a", "completion": ""}] * 8))


def test_nothing_is_said_of_data_that_fit(train):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train()
    assert not [str(w.message) for w in caught if "answers" in str(w.message) and "codes" not in str(w.message)]


def test_number_of_rows_held_out(tokenizer):
    args = arguments("x", max_length=64)
    for rows, fraction, expected in ((8, 0.05, 4), (16, 0.05, 8), (40, 0.05, 8), (400, 0.05, 20), (30, 0.5, 15)):
        args.eval_fraction = fraction
        samples = Dataset.from_dict({"row": [row for row in range(rows) for _ in range(2)]})
        train_set, held = training._split(samples, rows, args)
        assert len(held) == 2 * expected
        assert len(train_set) == 2 * (rows - expected)
        other = training._split(samples, rows, args)[1]
        assert other["row"][:] == held["row"][:]
        args.seed += 1
        assert rows == 8 or training._split(samples, rows, args)[1]["row"][:] != held["row"][:]
    with pytest.raises(ValueError, match="Of 2 answers 1 are held out"):
        training._split(Dataset.from_dict({"row": [0, 1]}), 2, args)


# ---------------------------------------------------------------- it learns


def words_data(rows=160):
    generator = random.Random(0)
    return Dataset.from_list([{"prompt": "Say:", "completion": generator.choice(WORDS) * 2} for _ in range(rows)])


def test_the_code_is_used_where_the_prompt_says_nothing(train, tmp_path):
    options = {"latent_dim": 16, "per_device_train_batch_size": 16, "num_train_epochs": 5, "max_steps": -1}
    train(dataset=words_data(), eval_fraction=0.2, **options)
    check = result(tmp_path)["check"]
    assert not check["collapsed"]
    assert check["gap"] > 0.1
    assert check["nll"] < check["nll_zero"] < math.log(330)
    # words are told apart, and the same one is the same
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guide = LatentGuide.from_pretrained(tmp_path / "guide")
    codes = guide.encode([Sample("Say:", word * 2) for word in [*WORDS, WORDS[0]]])
    distances = torch.cdist(codes, codes)
    assert distances[0, 8] == 0
    assert distances[:8, :8][~torch.eye(8).bool()].min() > 0.1


def test_training_without_an_encoder_warns(train, tmp_path):
    """The code of a guide whose encoder gives the same for all answers is of no use."""
    dataset = Dataset.from_list([{"prompt": "Say:", "completion": " fish"}] * 20)
    with pytest.warns(UserWarning, match="Distances of such codes are noise"):
        train_guide(
            tiny.model("llama", tiny.tokenizer(), seed=1),
            tiny.model("llama", tiny.tokenizer()),
            dataset,
            arguments(tmp_path / "guide"),
            processing_class=tiny.tokenizer(),
            encoder_processing_class=tiny.tokenizer(),
        )
    assert result(tmp_path)["check"]["collapsed"]
    with pytest.warns(UserWarning, match="the decoder of this guide hardly used the codes: their distances are noise"):
        LatentGuide.from_pretrained(tmp_path / "guide")


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "error", "expected"),
    [
        ({"guide_data": "generated"}, ValueError, "`guide_data='generated'` is not known"),
        ({"reconstruct": "prompt"}, ValueError, "`reconstruct='prompt'` is not known"),
        ({"decoder_training": "head"}, ValueError, "`decoder_training='head'` is not known"),
        ({"latent_dim": 0}, ValueError, "`latent_dim=0` is out of range"),
        ({"latent_dim": 8.0}, TypeError, "`latent_dim` must be an integer"),
        ({"memory_tokens": 0}, ValueError, "`memory_tokens=0` is out of range"),
        ({"max_length": 1}, ValueError, "`max_length=1` is out of range"),
        ({"word_dropout": 1.1}, ValueError, "`word_dropout=1.1` is out of range"),
        ({"word_dropout": -0.1}, ValueError, "`word_dropout=-0.1` is out of range"),
        ({"encoder_learning_rate": -1}, ValueError, "`encoder_learning_rate=-1` is out of range"),
        ({"decoder_learning_rate": float("nan")}, ValueError, "`decoder_learning_rate=nan` is out of range"),
        ({"collapse_threshold": -1}, ValueError, "`collapse_threshold=-1` is out of range"),
        ({"eval_fraction": 0}, ValueError, "`eval_fraction=0` is out of range"),
        ({"eval_fraction": 0.6}, ValueError, "`eval_fraction=0.6` is out of range"),
        ({"kl_weight": 0.1}, ValueError, "`kl_weight=0.1` has no effect without `variational=True`"),
        ({"free_bits": 0.1}, ValueError, "`free_bits=0.1` has no effect without `variational=True`"),
        ({"variational": True, "free_bits": 0.1}, ValueError, "`free_bits=0.1` has no effect with `kl_weight=0`"),
        (
            {"variational": True, "kl_warmup_ratio": 0.1},
            ValueError,
            "`kl_warmup_ratio=0.1` has no effect with `kl_weight=0`",
        ),
        ({"variational": True, "kl_weight": -1}, ValueError, "`kl_weight=-1` is out of range"),
        (
            {"variational": True, "kl_weight": 1, "kl_warmup_ratio": 2},
            ValueError,
            "`kl_warmup_ratio=2` is out of range",
        ),
        ({"lora_r": 8}, ValueError, "`lora_r=8` has no effect with `decoder_training='full'`"),
        ({"lora_r": 0, "decoder_training": "lora"}, ValueError, "`lora_r=0` is out of range"),
        ({"learning_rate": 1e-3}, ValueError, "Set `encoder_learning_rate` and `decoder_learning_rate`"),
        ({"label_smoothing_factor": 0.1}, ValueError, "`label_smoothing_factor=0.1` has no effect"),
        ({"neftune_noise_alpha": 5}, ValueError, "`neftune_noise_alpha=5` has no effect"),
        ({"push_to_hub": True}, ValueError, "`push_to_hub=True` has no effect here: push the finished guide"),
        (
            {"resume_from_checkpoint": "x"},
            ValueError,
            "`resume_from_checkpoint='x'` has no effect here: a run goes on by itself",
        ),
        ({"save_only_model": True}, ValueError, "`save_only_model=True`: a run that was interrupted could not go on"),
        ({"fsdp": "full_shard"}, ValueError, "`fsdp='full_shard'` is not supported"),
        ({"deepspeed": {"a": 1}}, ValueError, "is not supported by the training of a guide"),
    ],
)
def test_bad_arguments(options, error, expected):
    with pytest.raises(error, match=expected):
        GuideTrainingArguments("x", use_cpu=True, **options)


@pytest.fixture
def no_loading(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(training, "_load_guide", load)


def test_bad_input_before_a_model_is_loaded(no_loading, model_dir, tokenizer, tmp_path):
    rows = tiny.prompt_completion_data()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    bare, llama = str(tmp_path / "bare"), tiny.model("llama", tokenizer)
    nulls = Dataset.from_list([*rows, {"prompt": "a", "completion": None}])
    mixed = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": rejected} for rejected in ("c", None)])
    quantized = tiny.model("llama", tokenizer)
    quantized.is_quantized = True

    def check(error, expected, encoder=model_dir, decoder=model_dir, dataset=rows, args=None, **options):
        args = arguments(tmp_path / "out", max_length=32) if args is None else args
        with pytest.raises(error, match=expected):
            train_guide(encoder, decoder, dataset, args, **options)

    check(TypeError, "`args` is a `TrainingArguments`; expected", args=TrainingArguments("x", use_cpu=True))
    check(TypeError, "`encoder` is a int; expected a Hub id", encoder=3)
    lora = get_peft_model(llama, LoraConfig(target_modules=["q_proj"]))
    check(TypeError, "`decoder` is a PeftModel.*merge_and_unload", decoder=lora)
    check(ValueError, "`encoder`: The model folder .* holds no tokenizer.*`encoder_processing_class`", encoder=bare)
    check(ValueError, "`decoder`: The model folder .* holds no tokenizer.*`processing_class`", decoder=bare)
    check(
        ValueError,
        "`decoder`: `model` is a LlamaForCausalLM that was built in memory",
        decoder=tiny.model("llama", tokenizer),
    )
    check(ValueError, "`decoder` is quantized", decoder=quantized)
    for name in ("quantization_config", "load_in_4bit", "device_map"):
        check(ValueError, rf"`model_init_kwargs\['{name}'\]` is not supported", model_init_kwargs={name: True})
    instances = {"encoder": bert(tokenizer), "decoder": tiny.model("llama", tokenizer)}
    check(
        ValueError,
        "`model_init_kwargs` is for models that are named",
        **instances,
        model_init_kwargs={"dtype": "float16"},
    )
    check(
        TypeError, "`dataset` is a DatasetDict.*Of a dictionary of splits, pass one", dataset=DatasetDict(train=rows)
    )
    check(TypeError, "`dataset` is a IterableDataset.*of a stream, take", dataset=rows.to_iterable_dataset())
    check(ValueError, "has a column 'prompt' but no 'completion'", dataset=rows.rename_column("completion", "answer"))
    check(ValueError, r"has the columns \['text'\]. Expected 'prompt' and 'completion'", dataset=tiny.text_data())
    check(ValueError, "Of implicit prompts make a column", dataset=tiny.implicit_preference_data())
    check(ValueError, "`dataset` has one row", dataset=rows.select([0]))
    check(ValueError, "`dataset` is empty", dataset=rows.select([]))
    check(ValueError, "row 8: 'completion' cannot be tokenized.*Mend or drop the row", dataset=nulls)
    check(ValueError, "row 1: column 'rejected' is null", dataset=mixed)
    broken = copy.deepcopy(tokenizer)
    broken.chat_template = "{{ raise_exception('no way') }}"
    check(
        ValueError,
        "row 0: 'completion' cannot be tokenized.*no way",
        dataset=tiny.conversational_data(),
        processing_class=broken,
    )
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_fit(train, tmp_path, tokenizer):
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=330, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    both = {"processing_class": tokenizer, "encoder_processing_class": tokenizer}
    llama, data = tiny.model("llama", tokenizer), tiny.prompt_completion_data()
    for encoder, decoder, options, expected in (
        (t5, llama, {}, "`encoder` is an encoder-decoder model .t5.*or an encoder such as BERT"),
        (llama, t5, {}, "`decoder` is an encoder-decoder model"),
        (llama, llama.model, {}, "`decoder` is a LlamaModel; expected a causal language model"),
        (
            bert(tokenizer),
            llama,
            {"max_length": 97},
            "`max_length=97` do not fit the encoder, whose context has 96 tokens",
        ),
        (
            llama,
            llama,
            {"max_length": 511},
            "`max_length=511` and `memory_tokens=2` do not fit the decoder, whose context has 512",
        ),
    ):
        with pytest.raises(ValueError, match=expected):
            train_guide(encoder, decoder, data, arguments(tmp_path / "out", **options), **both)
    foreign = type("Foreign", (type(llama),), {"__module__": "transformers_modules.someone"})
    llama.__class__ = foreign
    with pytest.raises(ValueError, match="`decoder` is a Foreign, whose code comes with the model"):
        train_guide(bert(tokenizer), llama, data, arguments(tmp_path / "out"), **both)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the command


@pytest.fixture
def command(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = tiny.preference_data().to_list()
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "--encoder", model_dir, "--dataset_name", "data.jsonl", "--output_dir", "out", "--max_length", "64",
        "--latent_dim", "6", "--max_steps", "2", "--disable_tqdm", "true",
        "--encoder_learning_rate", "0.01", "--decoder_learning_rate", "0.01",
    ]  # fmt: skip


def test_sources_are_checked_without_models(no_loading, model_dir, tokenizer, tmp_path, monkeypatch):
    """The context of both, and the tokenizer of another decoder, before anything is generated for them."""
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", None)
    args = arguments(tmp_path / "out")
    own = tokenizer.from_pretrained(model_dir)
    check_sources(None, None, model_dir, own, args, {"attn_implementation": "eager"})
    check_sources(model_dir, model_dir, "nowhere", own, args, {})
    with pytest.raises(
        ValueError, match="`max_length=512` and `memory_tokens=2` do not fit the decoder, whose context"
    ):
        check_sources(None, None, model_dir, own, arguments(tmp_path / "out", max_length=512), {})
    own.chat_template = "{{ messages }}"
    check_sources(model_dir, None, model_dir, own, args, {})
    with pytest.raises(
        ValueError, match=r"tokenizer of the guide's decoder `.*` \(\w{16}\) is not that of the policy \(\w{16}\)"
    ):
        check_sources(None, model_dir, model_dir, own, args, {})
    with pytest.raises(ValueError, match="`encoder`: The model folder `.*` has no `config.json`"):
        check_sources(str(tmp_path), None, model_dir, own, args, {})


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The decoder hardly uses the codes")
        yield


def test_command(command, model_dir, capsys, quiet):
    assert main(command) == 0
    said = capsys.readouterr().out
    check = json.loads(Path("out/guide.json").read_text())["check"]
    assert f"held-out answers, nats a token: {check['nll']:.4f} from their codes, {check['nll_permuted']:.4f}" in said
    assert f"({check['gap']:+.1%}), {check['nll_zero']:.4f} from zeros.\nThe codes are " in said
    assert said.endswith("Written to out.\n")
    guide = LatentGuide.from_pretrained("out")
    guide.check_tokenizer(AutoTokenizer.from_pretrained(model_dir))
    assert guide.latent_dim == 6
    lines = {
        "encoder": model_dir, "decoder": model_dir, "dataset_name": "data.jsonl", "output_dir": "other", "max_length": 64,
        "latent_dim": 7, "max_steps": 2, "encoder_learning_rate": 0.01, "decoder_learning_rate": 0.01, "disable_tqdm": True,
    }  # fmt: skip
    Path("run.yaml").write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in lines.items()))
    assert main(["--config=run.yaml", "--latent_dim", "6"]) == 0
    assert json.loads(Path("other/guide.json").read_text())["check"] == check
    assert main(command) == 0
    assert "The guide in out is trained.\n" in capsys.readouterr().out
    assert main([*command, "--seed", "3"]) == 1
    assert (
        "trl-ift guide: error: `output_dir='out'` holds a run that was made with seed=42 (now 3)"
        in capsys.readouterr().err
    )


def test_verdict_of_the_command(command, capsys, tmp_path):
    check = {"samples": 5, "nll": 2.0, "nll_permuted": 2.5, "nll_zero": 3.0, "gap": 0.25, "collapsed": False}
    Path("guide.json").write_text(json.dumps({"check": check}))
    assert training.summary(".") == (
        "Reconstruction of 5 held-out answers, nats a token: 2.0000 from their codes, 2.5000 from those of other answers "
        "(+25.0%), 3.0000 from zeros.\nThe codes are used.\nWritten to .."
    )
    Path("guide.json").write_text(json.dumps({"check": check | {"collapsed": True}}))
    assert "The codes are NOT used: distances would be noise.\n" in training.summary(".")


def test_dtype_of_the_command(command, quiet):
    assert main([*command, "--dtype", "bfloat16"]) == 0
    assert GuideModel.from_pretrained("out", dtype="auto").decoder.dtype == torch.bfloat16


def test_help_and_errors_of_the_command(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "Confirmed by the paper: a latent space learnt by reconstruction" in " ".join(said.split())
    for option in (*OPTIONS, "encoder", "decoder", "dataset_name", "dtype", "per_device_train_batch_size"):
        assert f"--{option}" in said
    Path("typo.yaml").write_text("latent_dimm: 1")
    Path("launch.yaml").write_text("num_machines: 2")
    for argv, expected in (
        (["--latent_dimm", "1"], "unknown option --latent_dimm"),
        (["--latent_dim", "many"], "invalid int value"),
        (["--guide_data", "none"], "invalid choice"),
        (["--config", "typo.yaml"], "unknown option --latent_dimm"),
        (["--config", "launch.yaml"], "unknown option --num_machines"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*command, *argv])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("trl-ift guide: error: ")
        assert expected in error
        assert error.count("\n") == 1
    Path("list.yaml").write_text("- 1")
    for argv, expected in (
        (["--latent_dim", "0"], "`latent_dim=0` is out of range"),
        (["--learning_rate", "0.1"], "Set `encoder_learning_rate` and `decoder_learning_rate`"),
        (["--dataset_name", "./none.jsonl"], "does not exist"),
        (["--dataset_split", "test"], "has no split 'test'"),
        (["--encoder", "./none"], "none"),
        (["--decoder", "."], "The model folder `.` has no `config.json`"),
        (["--config", "none.yaml"], "none.yaml"),
        (["--config", "list.yaml"], "list.yaml must contain a YAML mapping"),
    ):
        assert main([*command, *argv]) == 1, argv
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 2
    without = command[:4] + command[6:]
    assert main(without) == 1
    assert "No folder for the guide: name one with `output_dir`" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(command[2:])
    assert "--encoder" in capsys.readouterr().err
    assert not Path("out").exists()


def test_interrupted_command(command, capsys, monkeypatch, quiet):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(GuideTrainer, "training_step", stop)
        assert main(command) == 130
    assert "Interrupted. To go on from the last checkpoint, run the same command again." in capsys.readouterr().err
    assert main(command) == 0
