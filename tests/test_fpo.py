"""FPO: numbers and identities of its loss, the hook on the decoder layer, and the files of autoencoders."""

import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from pairs import (
    ARGUMENTS,
    anchored,
    difference,
    double,
    gradients,
    loss_and_gradients,
    make,
    response_ids,
    step_gradients,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import tensor

from trl_ift import FPOConfig, FPOTrainer, PreferenceConfig, PreferenceTrainer
from trl_ift.preference.fpo import (
    _config_of,
    _mean_logratios,
    _outputs_of,
    decoder_layers,
    feature_distance,
    fpo_loss,
    pooled_features,
)
from trl_ift.preference.sae import IdentityEncoder, JumpReLUSAE, ReLUSAE, load_sae


FAMILIES = ["llama", "gemma2", "gpt-neox"]


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(
        found, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance, check_dtype=False
    )


def random_sae(jump=True, d_model=16, d_sae=40):
    """A random projection with thresholds that let about a third of the features through."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(d_model, d_sae, generator=generator)
    bias = 0.1 * torch.randn(d_sae, generator=generator)
    return JumpReLUSAE(weight, bias, torch.rand(d_sae, generator=generator)) if jump else ReLUSAE(weight, bias)


def near(model):
    """A reference that is not the policy, but near it."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def trainer_of(tmp_path, tokenizer, sae=None, family="llama", cls=FPOTrainer, config=FPOConfig, **settings):
    given = {"ref_model": settings.pop("ref_model")} if "ref_model" in settings else {}
    if cls is FPOTrainer and "sae_path" not in settings:
        given["sae"] = random_sae() if sae is None else sae
        settings = {"fpo_top_k": 5, "fpo_alpha": 20.0} | settings
    data = settings.pop("data", tiny.preference_data().select(range(4)))
    model = settings.pop("model", None) or tiny.model(family, tokenizer)
    assert not {"ref_model", "sae"} & set(ARGUMENTS)
    settings = {"overwrite_output_dir": True, "beta": 0.3} | settings
    return make(lambda **arguments: cls(**arguments, **given), config, tmp_path, model, data, tokenizer, **settings)


def answer(model, tokenizer, layer, prompt, response):
    """Mean log-probability of the tokens of a response, and their hidden states in a layer, one unpadded sequence."""
    ids, own = [*tokenizer(prompt)["input_ids"], *response_ids(tokenizer, response)], response_ids(tokenizer, response)
    found = []
    handle = decoder_layers(model)[layer].register_forward_hook(
        lambda module, inputs, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    logits = model(input_ids=tensor([ids]), use_cache=False).logits[0, -len(own) - 1 : -1]
    handle.remove()
    logps = logits.log_softmax(-1).gather(-1, tensor(own)[:, None])
    return logps.mean(), found[0][0, -len(own) :]


def jump_relu(sae, hidden):
    activation = hidden @ sae.weight.double() + sae.bias.double()
    return torch.where(activation > sae.threshold.double(), activation.clamp(min=0), 0.0)


def expected_loss(policy, reference, tokenizer, rows, sae, o):
    """The definition, in float64."""
    losses = []
    for row in rows:
        ratio, distance = {}, {}
        for kind in ("chosen", "rejected"):
            logp, hidden = answer(policy, tokenizer, o.sae_layer, row["prompt"], row[kind])
            with torch.no_grad():
                ref_logp, ref_hidden = answer(reference, tokenizer, o.sae_layer, row["prompt"], row[kind])
            f, f_ref = jump_relu(sae, hidden).mean(0), jump_relu(sae, ref_hidden).mean(0)
            largest = f.argsort(descending=True)[: o.fpo_top_k]
            ratio[kind] = logp - ref_logp
            distance[kind] = sum((f_ref[i] - f[i]) ** 2 for i in largest) / o.fpo_top_k
        held = distance["chosen"].detach() if o.detach_chosen else distance["chosen"]
        logit = ratio["chosen"] - ratio["rejected"] - o.fpo_alpha * (distance["rejected"] - held)
        losses.append(torch.log1p(torch.exp(-o.beta * logit)))
    return torch.stack(losses).mean()


# ---------------------------------------------------------------- the loss


class TestLoss:
    FEATURES = tensor([[0, 3, 1, 0.5], [1, 0, 4, 2]], dtype=torch.float64)
    REFERENCE = tensor([[0.2, 2, 1.5, 0], [0.5, 0.1, 2, 2.5]], dtype=torch.float64)

    def test_answers_of_one_token(self):
        hidden = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(0))
        mask = torch.tensor([[False, True, False]])
        assert torch.equal(pooled_features(IdentityEncoder(16), hidden, mask), hidden[:, 1])
        logratios = tensor([2.0, 2.0])
        responses = SimpleNamespace(logratios=logratios, lengths=tensor([1, 0]))
        assert torch.equal(_mean_logratios(responses), logratios)

    def test_features_are_of_float32(self):
        hidden = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
        mask = torch.ones(2, 5, dtype=torch.bool)
        found = pooled_features(random_sae(), hidden, mask)
        assert torch.equal(found, pooled_features(random_sae(), hidden.float(), mask))

    def test_numbers(self):
        distances = feature_distance(self.FEATURES, self.REFERENCE, 2)
        close(distances, [0.625, 2.125])
        ratios = tensor([[-0.5 + 0.7], [-1.2 + 1.0]], dtype=torch.float64)
        close(fpo_loss(*ratios, *distances[:, None], 0.1, 0.5), [0.7108002977])

    def test_gradients_of_the_distances(self):
        ratios = tensor([[0.2], [-0.2]], dtype=torch.float64)
        for detach in (True, False):
            distances = tensor([[0.625], [2.125]], dtype=torch.float64, requires_grad=True)
            loss = fpo_loss(*ratios, *distances, 0.1, 0.5, detach)
            (found,) = torch.autograd.grad(loss.sum(), distances)
            slope = 0.1 * 0.5 * (1 - math.exp(-0.7108002977))
            close(found, [[0.0 if detach else -slope], [slope]])
        distances = tensor([[0.625], [2.125]], dtype=torch.float64, requires_grad=True)
        fpo_loss(*ratios, *distances, 0.1, 0.5).sum().backward()  # by default as in the paper
        close(distances.grad[0], [0.0])

    def test_the_indices_are_constants(self):
        features = self.FEATURES.clone().requires_grad_()
        feature_distance(features, self.REFERENCE, 2).sum().backward()
        close(features.grad, (self.FEATURES - self.REFERENCE) * tensor([[0, 1, 1, 0], [0, 0, 1, 1]]))

    def test_pooling_of_some_features_is_that_of_all(self):
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(3, 700, 16, generator=generator)  # more than one chunk
        mask = torch.rand(3, 700, generator=generator) < 0.8
        for sae in (random_sae(), random_sae(jump=False), IdentityEncoder(16)):
            full = pooled_features(sae, hidden, mask)
            by_hand = torch.stack([sae.encode(h[m]).mean(0) for h, m in zip(hidden, mask, strict=True)])
            torch.testing.assert_close(full, by_hand, rtol=1e-4, atol=1e-5)
            columns = full.topk(7).indices
            torch.testing.assert_close(
                pooled_features(sae, hidden, mask, columns), full.gather(1, columns), rtol=1e-4, atol=1e-5
            )

    def test_jump_relu(self):
        sae = JumpReLUSAE(torch.eye(3), tensor([0.0, 0.0, 1.0]), tensor([0.5, 0.0, 1.5]))
        found = sae.encode(tensor([[0.5, 0.2, 0.7], [0.6, -0.2, 0.4]]))
        close(found, [[0, 0.2, 1.7], [0.6, 0, 0]], 1e-6)
        close(ReLUSAE(sae.weight, sae.bias).encode(tensor([[0.5, -0.2, 0.4]])), [[0.5, 0, 1.4]], 1e-6)


# ---------------------------------------------------------------- the trainer


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"sae_layer": 0, "detach_chosen": False}),
        ("gemma2", {"sae_layer": -2}),
        ("gpt-neox", {"fpo_top_k": 40}),
    ],
)
def test_loss_and_gradients(family, settings, tmp_path, tokenizer):
    reference = near(tiny.model(family, tokenizer))
    trainer = trainer_of(tmp_path, tokenizer, family=family, ref_model=reference, **settings)
    loss, found = loss_and_gradients(trainer)
    rows = tiny.preference_data().to_list()[:4]
    twin = double(trainer.model)
    expected, plain = (
        expected_loss(twin, double(reference), tokenizer, rows, random_sae(), options)
        for options in (trainer.args, Without(trainer.args))
    )
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert difference(found, gradients(twin)) < 5e-5
    assert abs(loss - plain.item()) > 1e-3  # the constraint counts


class Without:
    """Options without the constraint."""

    fpo_alpha = 0.0

    def __init__(self, options):
        self.options = options

    def __getattr__(self, name):
        return getattr(self.options, name)


def test_without_constraint_is_trls_sigmoid_norm(tmp_path, tokenizer):
    runs = [
        loss_and_gradients(trainer_of(tmp_path, tokenizer, ref_model=near(tiny.model("llama", tokenizer)), **settings))
        for settings in (
            {"fpo_alpha": 0.0, "fpo_top_k": 50, "sae": random_sae(d_sae=64)},
            {"cls": PreferenceTrainer, "config": PreferenceConfig, "loss_type": "sigmoid_norm"},
        )
    ]
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-6)
    assert difference(runs[0][1], runs[1][1]) < 1e-5


def test_identity_encoder(tmp_path, tokenizer):
    """With all features D is the mean squared difference of mean hidden states."""
    reference = near(tiny.model("llama", tokenizer))
    trainer = trainer_of(tmp_path, tokenizer, IdentityEncoder(16), ref_model=reference, fpo_top_k=16, max_steps=1)
    trainer.train()
    found = trainer.state.log_history[0]
    models = double(tiny.model("llama", tokenizer)), double(reference)
    for kind in ("chosen", "rejected"):
        errors = []
        for row in tiny.preference_data().to_list()[:4]:
            means = [answer(model, tokenizer, -1, row["prompt"], row[kind])[1].mean(0) for model in models]
            errors.append((means[0] - means[1]).square().mean().item())
        assert found[f"fpo/distance_{kind}"] == pytest.approx(np.mean(errors), rel=1e-3)


def test_at_the_start(tmp_path, tokenizer):
    trainer = trainer_of(tmp_path, tokenizer, max_steps=1)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["fpo/distance_chosen"] == first["fpo/distance_rejected"] == 0
    # The gradient is that of the loss without the constraint
    plain = trainer_of(tmp_path, tokenizer, fpo_alpha=0.0, fpo_top_k=50, sae=random_sae(d_sae=64), max_steps=1)
    plain.train()
    assert first["grad_norm"] == pytest.approx(plain.state.log_history[0]["grad_norm"], rel=1e-5)


def test_no_gradient_through_the_chosen_distance(tmp_path, tokenizer):
    """Of a layer's hidden states, those of chosen responses get one from the log-probabilities alone."""
    found = {}
    for detach in (True, False):
        trainer = trainer_of(tmp_path, tokenizer, ref_model=near(tiny.model("llama", tokenizer)), detach_chosen=detach)
        kept = []
        original = trainer._distances

        def distances(mask, original=original, kept=kept):
            kept.append(original(mask))
            kept[0].retain_grad()
            return kept[0]

        trainer._distances = distances
        loss_and_gradients(trainer)
        chosen, rejected = kept[0].grad.chunk(2)
        found[detach] = chosen
        assert (rejected > 0).all()
    assert (found[True] == 0).all()
    assert (found[False] < 0).all()


def test_padding_does_not_matter(tmp_path, tokenizer):
    runs = [
        loss_and_gradients(trainer_of(tmp_path, tokenizer, ref_model=near(tiny.model("llama", tokenizer)), **settings))
        for settings in ({}, {"pad_to_multiple_of": 128})
    ]
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-6)
    assert difference(runs[1][1], runs[0][1]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", [False, True])
def test_gradient_checkpointing(adapter, family, tmp_path, tokenizer):
    runs = []
    for checkpointing in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        settings = {} if checkpointing is None else {"gradient_checkpointing_kwargs": checkpointing}
        torch.manual_seed(0)
        trainer = trainer_of(
            tmp_path, tokenizer, family=family, gradient_checkpointing=checkpointing is not None, sae_layer=0,
            max_steps=2, peft_config=LoraConfig(r=2, target_modules="all-linear") if adapter else None, **settings,
        )  # fmt: skip
        runs.append(step_gradients(trainer))
    for losses, steps in runs[1:]:
        assert losses == pytest.approx(runs[0][0], abs=1e-6)
        assert difference(steps[1], runs[0][1][1]) < 1e-4


def test_reference_of_lora_is_the_model_without_it(tmp_path, tokenizer):
    trainer = trainer_of(tmp_path, tokenizer, peft_config=LoraConfig(r=2, target_modules="all-linear"))
    assert trainer.ref_model is None
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    trainer._reference_checked = True
    loss, _ = loss_and_gradients(trainer)
    start = double(tiny.model("llama", tokenizer))
    policy = double(trainer.accelerator.unwrap_model(trainer.model).merge_and_unload())
    rows = tiny.preference_data().to_list()[:4]
    assert loss == pytest.approx(
        expected_loss(policy, start, tokenizer, rows, random_sae(), trainer.args).item(), rel=1e-5
    )
    assert abs(loss - expected_loss(policy, start, tokenizer, rows, random_sae(), Without(trainer.args)).item()) > 1e-4


def test_accumulation_and_evaluation(tmp_path, tokenizer):
    steps, evaluations = [], []
    for size in (4, 1):
        trainer = trainer_of(
            tmp_path, tokenizer, ref_model=near(tiny.model("llama", tokenizer)), per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size, max_steps=1, per_device_eval_batch_size=size,
            eval_dataset=tiny.preference_data(),
        )  # fmt: skip
        evaluations.append(trainer.evaluate())
        steps.append(step_gradients(trainer))
    assert steps[1][0] == pytest.approx(steps[0][0], abs=2e-4)
    assert difference(steps[1][1][0], steps[0][1][0]) < 1e-5
    for key in ("eval_loss", "eval_fpo/distance_rejected", "eval_rewards/margins"):
        assert evaluations[1][key] == pytest.approx(evaluations[0][key], rel=1e-4)


def test_rewards_are_of_means(tmp_path, tokenizer):
    reference = near(tiny.model("llama", tokenizer))
    trainer = trainer_of(tmp_path, tokenizer, ref_model=reference, max_steps=1)
    trainer.train()
    models = double(tiny.model("llama", tokenizer)), double(reference)
    rows = tiny.preference_data().to_list()[:4]
    ratios = [
        np.subtract(*[answer(model, tokenizer, 0, row["prompt"], row["chosen"])[0].item() for model in models])
        for row in rows
    ]
    assert trainer.state.log_history[0]["rewards/chosen"] == pytest.approx(0.3 * np.mean(ratios), rel=1e-4)


def test_layers_that_are_not_trained(tmp_path, tokenizer):
    """Their features could not be held: nothing acts on them."""
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[1])
    with pytest.raises(ValueError, match="hidden states of layer 0 do not depend on what is trained"):
        trainer_of(tmp_path, tokenizer, sae_layer=0, peft_config=config).train()
    trainer_of(tmp_path, tokenizer, sae_layer=1, peft_config=config).train()


def test_nothing_is_left_on_the_model(tmp_path, tokenizer):
    trainer = trainer_of(tmp_path, tokenizer)
    trainer.train()
    assert not any(module._forward_hooks for module in trainer.model.modules())
    assert trainer._hidden == []
    assert trainer._ref_hidden is None


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fpo_alpha": -1.0}, "`fpo_alpha=-1.0` is out of range"),
        ({"fpo_top_k": 0}, "`fpo_top_k=0` is out of range"),
        ({"fpo_alpha": 0.0, "fpo_top_k": 3}, "`fpo_top_k=3` has no effect on the loss with `fpo_alpha=0`"),
        ({"loss_type": "ipo"}, "`loss_type='ipo'` has no effect on this method's loss"),
        ({"ld_alpha": 0.5}, "`ld_alpha=0.5` has no effect on means per token"),
        ({"precompute_ref_log_probs": True}, "has no effect here: the reference has to run beside the policy"),
    ],
)
def test_wrong_options(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        FPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sae_layer": 2}, "`sae_layer=2` is out of range: the model has 2 decoder layers"),
        ({"sae_layer": -3}, "`sae_layer=-3` is out of range"),
        ({"fpo_top_k": 41}, "`fpo_top_k=41` is more than the 40 features"),
        ({"fpo_top_k": 41, "fpo_alpha": 0.5}, "`fpo_top_k=41` is more than the 40 features"),
        ({"sae": IdentityEncoder(8)}, "reads hidden states of 8 numbers, and the model's have 16"),
        (
            {"data": anchored(4)},
            "has the columns 'ref_chosen_logps' and 'ref_rejected_logps', and FPO needs the features",
        ),
    ],
)
def test_what_does_not_fit(tmp_path, tokenizer, model_dir, monkeypatch, settings, message):
    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("trl.trainer.dpo_trainer.create_model_from_path", load)
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, tokenizer, model=model_dir, **settings)
    with pytest.raises(AssertionError, match="was loaded"):
        trainer_of(tmp_path, tokenizer, model=model_dir)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 32}, "`ref_model` has hidden states of 32 numbers, and the model has hidden states of 16"),
        ({"num_hidden_layers": 1}, "`ref_model` has 1 decoder layers, and the model has 2 decoder layers"),
        ({"num_hidden_layers": 3}, "`ref_model` has 3 decoder layers"),
    ],
)
def test_another_reference(tmp_path, tokenizer, model_dir, overrides, message):
    reference = tiny.model("llama", tokenizer, **overrides)
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, tokenizer, model=model_dir, ref_model=reference)


def test_layers_within_adapters():
    model = tiny.model("llama", tiny.tokenizer())
    layers = decoder_layers(model)
    assert decoder_layers(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))) is layers


def test_layers_that_give_out_more_than_hidden_states():
    layer = torch.nn.Identity()
    with _outputs_of(layer) as found:
        layer(("hidden", "attention"))
        layer("hidden")
    layer("later")
    assert found == ["hidden", "hidden"]


def test_the_config_is_of_the_revision(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda name, **options: asked.append(options))
    for settings in ({}, {"trust_remote_code": True, "model_init_kwargs": {"revision": "v1"}}):
        _config_of("me/model", FPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings))
    assert asked == [{"trust_remote_code": False}, {"trust_remote_code": True, "revision": "v1"}]


def test_without_constraint_few_features_do(tmp_path, tokenizer, monkeypatch):
    """The encoder is not run, and need not have as many features as are compared by default."""
    monkeypatch.setattr(IdentityEncoder, "encode", lambda *arguments: pytest.fail("the encoder was run"))
    trainer = trainer_of(tmp_path, tokenizer, IdentityEncoder(16), fpo_alpha=0.0, fpo_top_k=50)
    trainer.train()
    with pytest.raises(ValueError, match="`fpo_top_k=50` is more than the 16 features"):
        trainer_of(tmp_path, tokenizer, ReLUSAE(torch.ones(16, 16), torch.ones(16)), fpo_top_k=50)


class Halves:
    """An encoder of another class: the halves of hidden states."""

    d_model, d_sae = 16, 16

    def encode(self, hidden, columns=None):
        return hidden / 2 if columns is None else hidden[..., columns] / 2

    def to(self, device):
        self.device = device
        return self


def test_an_encoder_of_ones_own(tmp_path, tokenizer, model_dir):
    losses, _ = step_gradients(trainer_of(tmp_path, tokenizer, Halves()))
    sae = Halves()
    assert step_gradients(trainer_of(tmp_path, tokenizer, sae))[0] == losses
    assert sae.device.type == "cpu"
    for name in ("encode", "to", "d_model", "d_sae"):
        lacking = Halves()
        setattr(lacking, name, None)
        with pytest.raises(TypeError, match=rf"`sae` \(Halves\) lacks '{name}'. Expected the integers"):
            trainer_of(tmp_path, tokenizer, lacking, model="no such model")


def test_one_autoencoder(tmp_path, tokenizer, model_dir):
    data = Dataset.from_list(tiny.preference_data().to_list())
    args = FPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ValueError, match="needs one sparse autoencoder, as `sae_path` or as `sae`; found neither"):
        FPOTrainer(model=model_dir, args=args, train_dataset=data)
    args = FPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", sae_path="sae.npz")
    with pytest.raises(ValueError, match="found both"):
        FPOTrainer(model=model_dir, args=args, train_dataset=data, sae=random_sae())


# ---------------------------------------------------------------- files


class TestFiles:
    @pytest.mark.parametrize("kind", ["npz", "safetensors"])
    @pytest.mark.parametrize("jump", [True, False])
    def test_round_trip(self, kind, jump, tmp_path):
        sae = random_sae(jump)
        arrays = {"W_enc": sae.weight, "b_enc": sae.bias, "W_dec": torch.zeros(40, 16), "b_dec": torch.zeros(16)}
        if jump:
            arrays["threshold"] = sae.threshold
        path = tmp_path / f"sae.{kind}"
        if kind == "npz":
            np.savez(path, **{name: value.numpy() for name, value in arrays.items()})
        else:
            save_file(arrays, path)
        found = load_sae(path)
        assert type(found) is type(sae)
        hidden = torch.randn(5, 16)
        assert torch.equal(found.encode(hidden), sae.encode(hidden))
        assert (found.d_model, found.d_sae) == (16, 40)

    def test_half_precision_is_read_as_float32(self, tmp_path):
        sae = random_sae(False)
        save_file({"W_enc": sae.weight.bfloat16(), "b_enc": sae.bias.bfloat16()}, tmp_path / "sae.safetensors")
        assert load_sae(tmp_path / "sae.safetensors").weight.dtype == torch.float32

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"encoder": np.zeros((16, 40))}, r"lacks 'W_enc' and 'b_enc'; it holds \['encoder'\]"),
            ({"W_enc": np.zeros((16, 40))}, r"lacks 'b_enc'; it holds \['W_enc'\]"),
            ({"W_enc": np.zeros((40, 16)), "b_enc": np.zeros(40)}, r"`W_enc` has the shape \(40, 16\).*Transpose"),
            (
                {"W_enc": np.zeros((16, 40)), "b_enc": np.zeros(40), "threshold": np.zeros(3)},
                r"`threshold` has the shape \(3,\); expected \(40,\)",
            ),
            ({"W_enc": np.full((16, 40), np.nan), "b_enc": np.zeros(40)}, "'W_enc' has values that are not finite"),
        ],
    )
    def test_wrong_arrays(self, arrays, message, tmp_path):
        np.savez(tmp_path / "sae.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            load_sae(tmp_path / "sae.npz")

    def test_no_pickles(self, tmp_path):
        class Bomb:
            def __reduce__(self):
                return (exec, ("raise RuntimeError('a pickle was loaded')",))

        np.savez(tmp_path / "sae.npz", W_enc=np.array([Bomb()], dtype=object), b_enc=np.zeros(1))
        (tmp_path / "raw.npz").write_bytes(pickle.dumps(Bomb()))
        for name in ("sae.npz", "raw.npz"):
            with pytest.raises(ValueError, match="cannot be read as .npz"):
                load_sae(tmp_path / name)
        torch.save({"W_enc": torch.zeros(2, 2)}, tmp_path / "sae.pt")
        with pytest.raises(ValueError, match="is of no known kind"):
            load_sae(tmp_path / "sae.pt")

    def test_broken_files(self, tmp_path):
        with pytest.raises(ValueError, match="There is no file"):
            load_sae(tmp_path / "sae.npz")
        (tmp_path / "sae.safetensors").write_bytes(b"nothing")
        with pytest.raises(ValueError, match="cannot be read as .safetensors"):
            load_sae(tmp_path / "sae.safetensors")
