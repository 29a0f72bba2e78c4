"""Pairs with one prompt for all of their responses: the results are those of padded rows."""

import copy
from dataclasses import fields

import pytest
import tiny
import torch
from datasets import Dataset
from pairs import difference, lists, logs, loss_and_gradients, make, samples, step_gradients, uneven_triples
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    BloomConfig,
    GPT2Config,
    GptOssConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    OPTConfig,
)
from transformers.models.llama import modeling_llama
from trl import DPOConfig

from trl_ift import (
    EXOConfig,
    EXOTrainer,
    FPOConfig,
    FPOTrainer,
    MPOConfig,
    MPOTrainer,
    SelfSupervisedPOConfig,
    SelfSupervisedPOTrainer,
    TISDPOConfig,
    TISDPOTrainer,
    TPOConfig,
    TPOTrainer,
)
from trl_ift.preference import shared_prompt
from trl_ift.preference.sae import ReLUSAE
from trl_ift.preference.shared_prompt import SharedPrompts, join_rows
from trl_ift.preference.trainer import PreferenceConfig, PreferenceTrainer
from trl_ift.stages import training_settings
from trl_ift.trl_internals import add_fused_lm_head


def padded_rows(*rows):
    """`input_ids`, `attention_mask` and `labels` of (prompt, response) lists."""
    width = max(len(prompt) + len(response) for prompt, response in rows)
    ids, mask, labels = torch.zeros(3, len(rows), width, dtype=torch.long)
    labels -= 100
    for i, (prompt, response) in enumerate(rows):
        number = len(prompt) + len(response)
        ids[i, :number] = torch.tensor([*prompt, *response])
        mask[i, :number] = 1
        labels[i, len(prompt) : number] = torch.tensor(response)
    return ids, mask, labels


class TestLayout:
    def test_by_hand(self):
        rows = join_rows(*padded_rows(([1, 2, 3], [4, 5]), ([1, 2, 3], [6])), torch.tensor([0, 0]))
        assert rows.input_ids.tolist() == [[1, 2, 3, 4, 5, 3, 6]]
        assert rows.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3]]
        assert rows.labels.tolist() == [[-100, -100, -100, 4, 5, -100, 6]]
        mask = rows.attention_mask("sdpa", torch.float32)
        assert mask.shape == (1, 1, 7, 7)
        assert mask[0, 0].int().tolist() == [
            [1, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0, 0],
            [1, 1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 1, 0, 0],
            [1, 1, 0, 0, 0, 1, 0],
            [1, 1, 0, 0, 0, 1, 1],
        ]
        eager = rows.attention_mask("eager", torch.float32)
        assert torch.equal(eager == 0, mask)
        assert (eager[~mask] == torch.finfo(torch.float32).min).all()
        # The predictions of 4, 5 and 6
        values = torch.tensor([[0.0, 0.0, 4.0, 5.0, 0.0, 6.0]])
        assert rows.padded(values).tolist() == [[0, 0, 4, 5], [0, 0, 6, 0]]
        assert rows.padded(values > 0).tolist() == [[False, False, True, True], [False, False, True, False]]

    def test_pairs_of_other_lengths_and_other_prompts(self):
        """Padding; a third response; a sample for another prompt, and one for a prompt of the same length."""
        rows = join_rows(
            *padded_rows(
                ([1, 2], [3]),
                ([7], [8, 9]),
                ([1, 2], [4, 4]),
                ([7], [5]),
                ([1, 2], [6]),
                ([2, 2], [1]),
                ([7, 7, 7], [1]),
            ),
            torch.tensor([0, 1, 0, 1, 0, 0, 1]),
        )
        assert rows.input_ids.tolist() == [[1, 2, 3, 2, 4, 4, 2, 6, 2, 2, 1], [7, 8, 9, 7, 5, 7, 7, 7, 1, 0, 0]]
        assert rows.position_ids.tolist() == [[0, 1, 2, 1, 2, 3, 1, 2, 0, 1, 2], [0, 1, 2, 0, 1, 0, 1, 2, 3, 0, 0]]
        assert rows.labels[1].tolist() == [-100, 8, 9, -100, 5, -100, -100, -100, 1, -100, -100]
        mask = rows.attention_mask("sdpa", torch.float32)[:, 0]
        assert mask[0, 10].int().tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1]  # another prompt
        assert mask[0, 7].int().tolist() == [1, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0]
        assert mask[1, 4].int().tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0]  # a prompt of one token
        assert mask.any(2).all()  # a softmax over nothing would be NaN

    def test_responses_without_a_prompt(self):
        """Truncation on the left may leave no token of it: nothing predicts the first token of the response."""
        rows = join_rows(*padded_rows(([], [3, 4]), ([], [5, 6])), torch.tensor([0, 0]))
        assert rows.labels.tolist() == [[-100, 4, -100, 6]]
        assert rows.padded(torch.tensor([[4.0, 5.0, 6.0]])).tolist() == [[4], [6]]

    def test_a_row_without_a_response(self):
        rows = join_rows(*padded_rows(([1, 2], [3]), ([1, 2], [])), torch.tensor([0, 0]))
        assert rows.labels.tolist() == [[-100, -100, 3] + [-100] * (rows.labels.size(1) - 3)]
        assert rows.padded(torch.ones(1, rows.labels.size(1) - 1)).tolist() == [[0, 1], [0, 0]]


# ---------------------------------------------------------------- models


def random_rows(tokenizer, longest=30):
    """Rows of three pairs with a third response and samples for other prompts, and their pairs."""
    generator = torch.Generator().manual_seed(0)

    def ids(low, high):
        number = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(10, len(tokenizer), (number,), generator=generator).tolist()

    prompts = [ids(1, longest) for _ in range(3)]
    rows = [(prompt, ids(1, longest)) for _ in range(3) for prompt in prompts]
    rows += [(ids(1, longest), ids(1, longest)) for _ in range(3)]
    return padded_rows(*rows), torch.tensor([0, 1, 2] * 4)


def outputs(model, rows, pair=None):
    """Output of the fused head, and gradients of a sum over the tokens in which each has a weight of its own."""
    model.zero_grad()
    named = dict(zip(("input_ids", "attention_mask", "labels"), rows, strict=True))
    if pair is None:
        output = model(**named, fused_lm_head=True)
    else:
        output = SharedPrompts(rough=False).run(model, pair, **named, fused_lm_head=True)
    weights = torch.randn(output.log_probs.shape, generator=torch.Generator().manual_seed(1))
    (weights * (output.log_probs + 0.1 * output.entropy)).sum().backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


OTHERS = {
    "gpt2": lambda size: GPT2Config(vocab_size=size, n_embd=16, n_layer=2, n_head=2, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0),
    "opt": lambda size: OPTConfig(
        vocab_size=size, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, dropout=0.0, pad_token_id=3,
        word_embed_proj_dim=16,
    ),
    "gpt-oss": lambda size: GptOssConfig(  # attention sinks
        vocab_size=size, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=128, pad_token_id=3,
    ),
}  # fmt: skip


def model_of(family, tokenizer, **overrides):
    if family in tiny.FAMILIES:
        return tiny.model(family, tokenizer, **overrides)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(OTHERS[family](len(tokenizer)), **overrides)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.xavier_uniform_(parameter)
    return model


def attentive(tokenizer):
    """A model that attends to few tokens, so that it matters which it sees, and where."""
    model = tiny.model("llama", tokenizer)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 4
            layer.self_attn.o_proj.weight *= 4
    return model


class TestModels:
    @pytest.mark.parametrize(
        ("family", "attention"),
        [
            (family, attention)
            for family in (*tiny.FAMILIES, *OTHERS)
            for attention in (
                ["eager"] if family in ("gemma2", "gpt-oss") else ["sdpa", "eager"]
            )  # they have no other
        ],
    )
    def test_log_probs_and_gradients(self, family, attention, tokenizer):
        model = model_of(family, tokenizer, attn_implementation=attention)
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs"))
        rows, pair = random_rows(tokenizer)
        expected, gradients = outputs(model, rows)
        found, own_gradients = outputs(model, rows, pair)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
        assert difference(own_gradients, gradients) < 1e-5

    def test_fewer_tokens(self, tokenizer):
        model = tiny.model("llama", tokenizer)
        add_fused_lm_head(model)
        prompt, response = list(range(10, 50)), list(range(60, 70))
        rows = padded_rows(*[(prompt, response)] * 4)
        seen = []
        model.model.embed_tokens.register_forward_hook(lambda module, args, output: seen.append(args[0].numel()))
        shared = SharedPrompts(rough=False)
        named = dict(zip(("input_ids", "attention_mask", "labels"), rows, strict=True))
        for _ in range(2):
            shared.run(model, torch.tensor([0, 1, 0, 1]), **named, fused_lm_head=True)
        # A pair in both layouts, once, and then two rows of 39 + 11 + 11 tokens in the place of four of 50
        assert seen == [2 * 50, 24 + 26 + 25, 2 * 61, 2 * 61]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("fault", ["mask", "positions"])
    def test_a_model_that_ignores_what_it_is_told(self, fault, dtype, tokenizer, monkeypatch):
        """Found at the first batch, whatever the config says."""
        model = attentive(tokenizer).to(dtype)
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        original = modeling_llama.LlamaModel.forward

        def forward(self, input_ids, attention_mask=None, position_ids=None, **kwargs):
            if attention_mask.dim() == 4:
                attention_mask = None if fault == "mask" else attention_mask
                position_ids = None if fault == "positions" else position_ids
            return original(self, input_ids, attention_mask, position_ids, **kwargs)

        monkeypatch.setattr(modeling_llama.LlamaModel, "forward", forward)
        rows, pair = random_rows(tokenizer)
        limit = "0.001" if dtype == torch.float32 else r"0\.\d+"
        match = (
            rf"LlamaForCausalLM gives for a pair with one prompt differ by .* expected at most {limit}\. Its layers"
        )
        with pytest.raises(ValueError, match=match):
            outputs(model, rows, pair)

    def test_batches_that_cannot_be_laid_out(self, tokenizer):
        model = tiny.model("llama", tokenizer)
        add_fused_lm_head(model)
        (ids, mask, labels), pair = random_rows(tokenizer)
        named = {"input_ids": ids, "attention_mask": mask, "labels": labels, "fused_lm_head": True}
        with pytest.raises(ValueError, match="the batch holds 'token_type_ids', which cannot be laid out"):
            SharedPrompts(rough=False).run(model, pair, **named, token_type_ids=ids)
        with pytest.raises(ValueError, match="needs rows that are padded on the right"):
            SharedPrompts(rough=False).run(model, pair, **named | {"attention_mask": mask.flip(1)})

    def test_half_precision(self, tokenizer):
        """Compared with a tolerance of its rounding."""
        model = tiny.model("llama", tokenizer).bfloat16()
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        rows, pair = random_rows(tokenizer)
        expected, _ = outputs(model, rows)
        found, _ = outputs(model, rows, pair)
        assert (found.log_probs - expected.log_probs).abs().mean() < 0.02

    def test_half_precision_of_improbable_tokens(self, tokenizer, monkeypatch):
        """Rounding moves their log-probabilities by more than 0.05 nats a token, in any layout."""
        size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
        model = tiny.model("llama", tokenizer, **size).bfloat16()
        with torch.no_grad():
            model.lm_head.weight *= 1024
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        rows, pair = random_rows(tokenizer, longest=150)
        seen, measure = [], shared_prompt._difference
        monkeypatch.setattr(shared_prompt, "_difference", lambda *both: seen.append(measure(*both)) or seen[-1])
        state = torch.get_rng_state()
        with torch.no_grad():
            SharedPrompts(rough=False).run(
                model,
                pair,
                **dict(zip(("input_ids", "attention_mask", "labels"), rows, strict=True)),
                fused_lm_head=True,
            )
        assert torch.equal(torch.get_rng_state(), state)
        rounding, difference = seen
        assert difference > 0.05
        assert difference < 3 * rounding


# ---------------------------------------------------------------- trainers


def tokens_with_weights(tokenizer):
    rows = tiny.preference_data().to_list()
    generator = torch.Generator().manual_seed(0)
    for row in rows:
        for side in ("chosen", "rejected"):
            number = len(tokenizer(row[side])["input_ids"]) + 1
            row[f"{side}_weights"] = (0.1 + torch.rand(number, generator=generator)).tolist()
    return Dataset.from_list(rows)


def lora(**options):
    return LoraConfig(r=2, target_modules="all-linear", **options)


def nearby(tokenizer):
    """A model that is not the policy, but near it."""
    model = tiny.model("llama", tokenizer)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


BASE = (PreferenceTrainer, PreferenceConfig, tiny.preference_data)
TPO = (TPOTrainer, TPOConfig, uneven_triples)
LIVE = {"precompute_ref_log_probs": False}
# Trainer, config and data, and settings
CASES = {
    "live reference": (*BASE, {}),
    "stored reference": (*BASE, {"precompute_ref_log_probs": True}),
    "messages": (PreferenceTrainer, PreferenceConfig, tiny.conversational_preference_data, {}),
    "truncated": (*BASE, {"max_length": 20}),
    "truncated on the left": (*BASE, {"max_length": 16, "truncation_mode": "keep_end"}),
    "multiples of 16": (*BASE, {"pad_to_multiple_of": 16}),
    "ld_alpha": (*BASE, {"ld_alpha": 0.3}),
    "ld_alpha, stored": (*BASE, {"ld_alpha": 0.3, "precompute_ref_log_probs": True}),
    "losses of TRL": (*BASE, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2], "use_weighting": False}),
    "WPO": (*BASE, {"use_weighting": True}),
    "new adapter": (*BASE, {"peft_config": lora}),
    "gradient checkpointing": (*BASE, {"gradient_checkpointing": True}),
    "reentrant checkpointing": (
        *BASE,
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
    "third response": (*TPO, {}),
    "third response, TPO-L": (*TPO, {"loss_type": "tpo-l"}),
    "samples for other prompts": (
        MPOTrainer, MPOConfig, tiny.preference_data,
        {"reg_dataset": lambda: samples(ref_logps=[-60.0] * 4), "logit_mode": "length_norm"},
    ),
    "lists": (EXOTrainer, EXOConfig, lists, LIVE),
    "lists, stored": (EXOTrainer, EXOConfig, lists, {"precompute_ref_log_probs": True}),
    "token weights": (TISDPOTrainer, TISDPOConfig, tokens_with_weights, LIVE),
    "token weights, stored": (TISDPOTrainer, TISDPOConfig, tokens_with_weights, {"precompute_ref_log_probs": True}),
}  # fmt: skip


def trainer_of(case, tmp_path, tokenizer, model=None, ref_model=None, **more):
    trainer_class, config_class, data, settings = CASES[case]
    data = data(tokenizer) if data is tokens_with_weights else data()
    settings = {name: value() if callable(value) else value for name, value in settings.items()}

    def create(**arguments):
        torch.manual_seed(0)
        return trainer_class(ref_model=ref_model, **arguments) if ref_model is not None else trainer_class(**arguments)

    model = tiny.model("llama", tokenizer) if model is None else model
    return make(
        create, config_class, tmp_path, model, data, tokenizer, **{"overwrite_output_dir": True, **settings, **more}
    )


class TestTrainers:
    @pytest.mark.parametrize("case", CASES)
    def test_loss_gradients_and_metrics(self, case, tmp_path, tokenizer, monkeypatch):
        joined = []
        monkeypatch.setattr(shared_prompt, "join_rows", lambda *args: joined.append(1) or join_rows(*args))
        steps, found = [], []
        for shared in (False, True):
            own_reference = case in ("new adapter", "samples for other prompts") or "third" in case
            ref_model = None if own_reference else nearby(tokenizer)
            trainer = trainer_of(case, tmp_path, tokenizer, ref_model=ref_model, shared_prompt=shared)
            steps.append(step_gradients(trainer)[1])
            found.append(logs(trainer))
            assert bool(joined) == shared
        assert len(steps[0]) == 2
        # The second step is taken from weights that Adam has moved by the gradients of the first
        assert difference(steps[1][0], steps[0][0]) < 1e-5
        assert difference(steps[1][1], steps[0][1]) < 1e-3
        for own, expected in zip(*found, strict=True):
            assert own == pytest.approx(expected, rel=1e-3, abs=1e-3)

    def test_an_existing_adapter(self, tmp_path, tokenizer):
        """Its reference is a copy of it, which the same model runs with."""
        found = []
        for shared in (False, True):
            model = tiny.model("llama", tokenizer)
            torch.manual_seed(0)
            model = get_peft_model(model, lora(init_lora_weights=False))
            trainer = trainer_of("live reference", tmp_path, tokenizer, model, shared_prompt=shared)
            found.append(step_gradients(trainer)[1])
        assert difference(found[1][0], found[0][0]) < 1e-5
        assert difference(found[1][1], found[0][1]) < 1e-3

    def test_accumulation(self, tmp_path, tokenizer):
        settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 1}
        steps = []
        for more in ({}, {"shared_prompt": True}, {"shared_prompt": True, **settings}):
            trainer = trainer_of("third response", tmp_path, tokenizer, **{"max_steps": 1, **more})
            steps.append(step_gradients(trainer)[1][0])
        assert difference(steps[1], steps[0]) < 1e-5
        assert difference(steps[2], steps[0]) < 1e-5

    @pytest.mark.parametrize("stored", [False, True])
    def test_evaluation_and_prediction(self, stored, tmp_path, tokenizer):
        found = []
        for shared in (False, True):
            trainer = trainer_of(
                "live reference", tmp_path, tokenizer, ref_model=nearby(tokenizer), shared_prompt=shared,
                precompute_ref_log_probs=stored, eval_dataset=tiny.preference_data(),
            )  # fmt: skip
            metrics = trainer.evaluate() | trainer.predict(tiny.preference_data().select(range(5))).metrics
            found.append({k: v for k, v in metrics.items() if "runtime" not in k and "per_second" not in k})
        assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-4)

    def test_experts_without_the_router_loss(self, tmp_path, tokenizer):
        found = []
        for shared in (False, True):
            model = tiny.model("qwen3-moe", tokenizer)
            trainer = trainer_of(
                "live reference", tmp_path, tokenizer, model, ref_model=copy.deepcopy(model), router_aux_loss_coef=0.0,
                shared_prompt=shared,
            )  # fmt: skip
            found.append(loss_and_gradients(trainer))
        assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
        assert difference(found[1][1], found[0][1]) < 1e-5

    def test_bfloat16(self, tmp_path, tokenizer):
        """Under autocast, and the comparison at the first batch has the tolerance of its rounding."""
        found = []
        for shared in (False, True):
            trainer = trainer_of("live reference", tmp_path, tokenizer, bf16=True, shared_prompt=shared)
            found.append(step_gradients(trainer)[1][0])
        assert difference(found[1], found[0]) < 0.05

    def test_4bit(self, tmp_path, tokenizer, model_dir):
        found = []
        for shared in (False, True):
            quantization = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32"
            )
            trainer = trainer_of(
                "live reference", tmp_path, tokenizer, model_dir, shared_prompt=shared, peft_config=lora(),
                quantization_config=quantization,
            )  # fmt: skip
            found.append(step_gradients(trainer)[1][0])
        assert difference(found[1], found[0]) < 0.01  # the adapters are in bfloat16

    def test_each_model_is_compared_once(self, tmp_path, tokenizer, monkeypatch):
        compared = []
        monkeypatch.setattr(SharedPrompts, "_compare", lambda self, model, *args: compared.append(model))
        trainer = trainer_of(
            "live reference", tmp_path, tokenizer, ref_model=nearby(tokenizer), shared_prompt=True,
            eval_dataset=tiny.preference_data(),
        )  # fmt: skip
        trainer.train()
        trainer.evaluate()
        assert len(compared) == 2
        assert trainer.ref_model in compared


# ---------------------------------------------------------------- refusals


def refused(match, tmp_path, tokenizer, model=None, **settings):
    with pytest.raises(ValueError, match=match):
        trainer_of("live reference", tmp_path, tokenizer, model, shared_prompt=True, **settings)


class TestRefusals:
    @pytest.fixture(autouse=True)
    def no_model_is_loaded(self, monkeypatch):
        def load(*args, **kwargs):
            raise AssertionError("a model was loaded")

        monkeypatch.setattr("trl.trainer.dpo_trainer.create_model_from_path", load)

    @pytest.mark.parametrize(
        ("config", "match"),
        [
            (
                MambaConfig(),
                r"MambaForCausalLM has layers other than attention to earlier tokens .*Set `shared_prompt=False`",
            ),
            (BloomConfig(), "BloomForCausalLM takes no position ids"),
            (
                MistralConfig(sliding_window=512),
                "MistralForCausalLM see the last 512 tokens, where `max_length=1024` .*Set `max_length=512` or lower, or set",
            ),
            (
                OPTConfig(),
                r"the noise of `dropout=0.1` in the config of the model would be the same .* Set it to 0 there",
            ),
        ],
        ids=["mamba", "bloom", "mistral", "opt"],
    )
    def test_architectures(self, config, match, tmp_path, tokenizer):
        """By the config of a model that is named, before it is loaded."""
        name = {"mamba": "Mamba", "bloom": "Bloom", "mistral": "Mistral", "opt": "OPT"}[config.model_type]
        config.architectures = [f"{name}ForCausalLM"]
        config.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        refused(match, tmp_path, tokenizer, str(tmp_path / "model"))

    @pytest.mark.parametrize("max_length", [64, 65, None])
    def test_windows(self, max_length, tmp_path, tokenizer):
        model = tiny.model("gemma2", tokenizer, sliding_window=64)
        if max_length == 64:
            trainer = trainer_of("live reference", tmp_path, tokenizer, model, shared_prompt=True, max_length=64)
            trainer.train()
        else:
            match = f"see the last 64 tokens, where `max_length={max_length}`"
            refused(match, tmp_path, tokenizer, model, max_length=max_length)

    def test_the_reference_too(self, tmp_path, tokenizer):
        reference = tiny.model("gemma2", tokenizer, sliding_window=64)
        refused("Gemma2ForCausalLM see the last 64", tmp_path, tokenizer, ref_model=reference)

    def test_hybrids(self, tmp_path, tokenizer):
        model = tiny.model("llama", tokenizer)
        model.config.layer_types = ["full_attention", "linear_attention"]
        refused(r"has layers other than attention to earlier tokens \(linear_attention\)", tmp_path, tokenizer, model)

    def test_custom_code(self, tmp_path, tokenizer):
        class Mine(LlamaForCausalLM):
            pass

        model = tiny.model("llama", tokenizer)
        model.__class__ = Mine
        refused("is not known of a model that is not part of transformers", tmp_path, tokenizer, model)

    def test_attention(self, tmp_path, tokenizer, model_dir):
        settings = {"model_init_kwargs": {"attn_implementation": "flash_attention_2"}}
        match = r"the attention 'flash_attention_2' takes no mask .*`attn_implementation='sdpa'`"
        refused(match, tmp_path, tokenizer, model_dir, **settings)
        model = tiny.model("llama", tokenizer)
        model.config._attn_implementation = "flash_attention_2"
        refused(match, tmp_path, tokenizer, model)

    def test_router_loss(self, tmp_path, tokenizer):
        refused("the router loss of a mixture of experts", tmp_path, tokenizer, tiny.model("qwen3-moe", tokenizer))

    def test_virtual_tokens(self, tmp_path, tokenizer):
        prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        refused("PromptTuningConfig adds virtual tokens", tmp_path, tokenizer, peft_config=prompts)
        model = get_peft_model(tiny.model("llama", tokenizer), prompts)
        refused("PromptTuningConfig adds virtual tokens", tmp_path, tokenizer, model)

    def test_noise(self, tmp_path, tokenizer):
        refused("`attention_dropout=0.3`", tmp_path, tokenizer, tiny.model("llama", tokenizer, attention_dropout=0.3))
        with pytest.raises(ValueError, match="`shared_prompt=True` needs `disable_dropout=True`"):
            PreferenceConfig(str(tmp_path), use_cpu=True, bf16=False, shared_prompt=True, disable_dropout=False)
        with pytest.raises(ValueError, match="cannot be combined with `neftune_noise_alpha`"):
            PreferenceConfig(str(tmp_path), use_cpu=True, bf16=False, shared_prompt=True, neftune_noise_alpha=5.0)

    def test_hidden_states(self, tmp_path, tokenizer):
        settings = {"shared_prompt": True, "max_steps": 1}
        data, model = tiny.preference_data(), tiny.model("llama", tokenizer)
        with pytest.raises(ValueError, match="SelfSupervisedPOTrainer reads the hidden states of responses"):
            make(SelfSupervisedPOTrainer, SelfSupervisedPOConfig, tmp_path, model, data, tokenizer, **settings)

        def fpo(**arguments):
            return FPOTrainer(**arguments, sae=ReLUSAE(torch.randn(16, 64), torch.zeros(64)))

        with pytest.raises(ValueError, match="FPOTrainer reads the hidden states of responses"):
            make(fpo, FPOConfig, tmp_path, model, data, tokenizer, **settings)


def test_it_is_no_part_of_what_a_result_depends_on(tmp_path):
    """The one option beside TRL's: records of settings, and cards, do not hold it."""
    found = {f.name for f in fields(PreferenceConfig)} - {f.name for f in fields(DPOConfig)}
    assert found == {"shared_prompt", "overwrite_output_dir", "hub_base_model"}
    plain, shared = (
        training_settings(PreferenceConfig(str(tmp_path), use_cpu=True, bf16=False, shared_prompt=value))
        for value in (False, True)
    )
    assert plain == shared
    assert "shared_prompt" not in plain
    assert PreferenceTrainer.own_options() == []
