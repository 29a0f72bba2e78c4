"""MRPO: the numbers and identities of its loss, and the references that are scored, stored and freed before training."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import weakref

import pytest
import tiny
import torch
import torch.nn.functional as F
import two_processes_references
from datasets import Dataset, load_dataset
from pairs import anchored, difference, logs, loss_and_gradients, make, message_log, token_logps
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import tensor
from transformers import PreTrainedTokenizerFast

from trl_ift import MRPOConfig, MRPOTrainer, PreferenceConfig
from trl_ift.data import caching, references, score_references
from trl_ift.preference import mrpo
from trl_ift.preference.mrpo import mrpo_loss, reference_weights, trust_region, virtual_reference
from trl_ift.preference.trainer import PreferenceTrainer, pair_ids


def double(*values):
    return tensor(values, dtype=torch.float64)


LOGPS = double(-20, -15), double(-24, -14)
REFS = double([-22, -14.5], [-18, -16]), double([-23, -15.25], [-22.5, -15])


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


def loss_of(refs=REFS, mode="arwc", eps=None, adaptive=True, fixed=None, mixture="harmonic", logps=LOGPS):
    weights = reference_weights(*refs, mode, fixed)
    return mrpo_loss(*logps, *trust_region(*refs, eps, adaptive), weights, 0.1, mixture)


def dpo(ref_chosen, ref_rejected):
    return -F.logsigmoid(0.1 * (LOGPS[0] - ref_chosen - LOGPS[1] + ref_rejected))


REJECTED = {
    "arwc": [-22.6114960445, -15.1148678382],
    "official_code": [-22.9257720868, -15.1504009257],
    "uniform": [-22.7809298036, -15.1327922393],
}


@pytest.mark.parametrize(
    ("mode", "eps", "chosen", "loss", "mean"),
    [
        ("arwc", None, [-20.3744515294, -15.5951183960], [0.6088794007, 0.7194722890], 0.6641758448),
        ("arwc", 0.1, [-21.2537408873, -14.9774403739], [0.5697364924, 0.7516348593], 0.6606856759),
        ("official_code", None, [-21.8033910081, -15.4131472345], [0.5595815803, 0.7306891401], 0.6451353602),
        ("official_code", 0.1, [-21.8757300955, -14.8777222827], [0.5564878805, 0.7588043865], 0.6576461335),
        ("uniform", None, [-21.3250027474, -15.5082660974], [0.5740121929, 0.7248609496], 0.6494365712),
    ],
)
def test_numbers(mode, eps, chosen, loss, mean):
    weights = reference_weights(*REFS, mode)
    ref_chosen, ref_rejected = trust_region(*REFS, eps)
    # The clip does not reach the rejected answers of this example
    close(virtual_reference(ref_chosen, weights), chosen)
    close(virtual_reference(ref_rejected, weights), REJECTED[mode])
    close(loss_of(mode=mode, eps=eps), loss)
    close(loss_of(mode=mode, eps=eps).mean(), mean)


def test_weights_by_hand():
    """Margins of reference 0 are 1 and 0.75, of reference 1 4.5 and 1."""
    close(reference_weights(*REFS, "arwc"), [[1 / 5.5, 0.75 / 1.75], [4.5 / 5.5, 1 / 1.75]])
    first = double(4.5 / (5.5 + 1e-6), 1 / (1.75 + 1e-6))
    close(reference_weights(*REFS, "official_code"), torch.stack([first, 1 - first]), 1e-15)
    close(reference_weights(*REFS, "fixed", [0.25, 0.75]), [[0.25] * 2, [0.75] * 2])
    near = double([-3.0], [-5.0]), double([-3.2], [-5.1])  # of margins that add up to less than 1
    close(reference_weights(*near, "arwc"), [[2 / 3], [1 / 3]])


@pytest.mark.parametrize("mode", ["arwc", "official_code", "uniform"])
def test_pairs_that_no_reference_tells_apart(mode):
    refs = (REFS[0], REFS[0])
    assert torch.isfinite(loss_of(refs, mode)).all()
    close(reference_weights(*refs, mode).sum(0), [1, 1], 1e-15)


def random_refs(number=3, pairs=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(-300 * torch.rand(number, pairs, dtype=torch.float64, generator=generator) for _ in range(2))


class TestIdentities:
    @pytest.mark.parametrize("mode", ["arwc", "official_code", "uniform"])
    @pytest.mark.parametrize("mixture", ["harmonic", "geometric", None])
    def test_dpo_with_reference_0(self, mode, mixture):
        """With no radius, or with references that are one."""
        expected = dpo(REFS[0][0], REFS[1][0])
        for adaptive in (True, False):
            close(loss_of(mode=mode, eps=0, adaptive=adaptive, mixture=mixture), expected)
        same = tuple(refs[:1].expand(2, -1) for refs in REFS)
        for eps in (None, 0.1):
            close(loss_of(same, mode, eps, mixture=mixture), expected)

    @pytest.mark.parametrize("mixture", ["harmonic", "geometric", None])
    @pytest.mark.parametrize("k", [0, 1])
    def test_dpo_with_one_reference(self, k, mixture):
        weights = [float(k == 0), float(k == 1)]
        close(loss_of(mode="fixed", fixed=weights, mixture=mixture), dpo(REFS[0][k], REFS[1][k]))
        alone = tuple(refs[k : k + 1] for refs in REFS)
        for mode in ("arwc", "uniform"):
            close(loss_of(alone, mode, 0.1, mixture=mixture), dpo(REFS[0][k], REFS[1][k]))

    def test_harmonic_below_geometric_within_the_references(self):
        refs = random_refs()
        weights = reference_weights(*refs, "arwc")
        for values in refs:
            harmonic, geometric = (virtual_reference(values, weights, name) for name in ("harmonic", "geometric"))
            assert (harmonic < geometric).all()
            assert (values.min(0).values <= harmonic).all()
            assert (harmonic <= values.max(0).values).all()
        equal = torch.full((3, 50), -500.0, dtype=torch.float64)
        close(virtual_reference(equal, weights), equal[0])

    def test_order_of_the_extra_references(self):
        refs = random_refs()
        swapped = tuple(values[[0, 2, 1]] for values in refs)
        logps = tuple(values.mean(0) for values in refs)
        for mode, fixed, other in (("arwc", None, None), ("fixed", [0.2, 0.3, 0.5], [0.2, 0.5, 0.3])):
            found = loss_of(swapped, mode, 0.1, fixed=other, logps=logps)
            close(found, loss_of(refs, mode, 0.1, fixed=fixed, logps=logps))

    def test_shift(self):
        """A constant on all references of both answers cancels, but not where they are clipped."""
        shifted = tuple(values - 30 for values in REFS)
        close(loss_of(shifted), loss_of())
        assert (loss_of(shifted, eps=0.1) - loss_of(eps=0.1)).abs().max() > 1e-3

    def test_clip(self):
        """Between (1 + eps) lp_0 and (1 - eps) lp_0, reference 0 itself never."""
        for refs, eps, adaptive in (
            (random_refs(), 0.1, True),
            (random_refs(), 0.5, False),
            ([values / 1000 for values in random_refs()], 0.1, True),  # of answers that are nearly certain
        ):
            clipped = trust_region(*refs, eps, adaptive)
            sizes = [values.mean(0).abs() for values in refs]
            for old, new, size in zip(refs, clipped, sizes, strict=True):
                radius = eps * size / (sizes[0] + sizes[1]) if adaptive else eps
                close(new[0], old[0], 0)
                close(new[1:], torch.minimum(torch.maximum(old[1:], (1 + radius) * old[0]), (1 - radius) * old[0]))
                assert (new[1:] != old[1:]).any()
        refs = random_refs()
        for new, old in zip(trust_region(*refs, 1e9), trust_region(*refs, None), strict=True):
            close(new, old, 0)

    def test_multi_dpo(self):
        losses = torch.stack([dpo(REFS[0][k], REFS[1][k]) for k in range(2)])
        close(loss_of(mixture=None), (reference_weights(*REFS, "arwc") * losses).sum(0))

    def test_no_gradient_beside_that_of_the_policy(self):
        """The gradient is DPO's at the loss's own margin."""
        logps = tuple(values.clone().requires_grad_() for values in LOGPS)
        loss = loss_of(logps=logps, eps=0.1)
        loss.sum().backward()
        close(logps[0].grad, -0.1 * (1 - torch.exp(-loss.detach())))
        close(logps[1].grad, -logps[0].grad)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ctro_eps": -0.1}, r"`ctro_eps=-0.1` is out of range"),
        ({"ctro_eps": None, "ctro_adaptive": False}, "`ctro_adaptive=False` has no effect with `ctro_eps=None`"),
        ({"ctro_eps": 0.0, "ctro_adaptive": False}, r"`ctro_adaptive=False` has no effect with `ctro_eps=0.0`"),
        ({"weight_mode": "best"}, "`weight_mode='best'` is not known"),
        ({"mrpo_mode": "dpo"}, "`mrpo_mode='dpo'` is not known"),
        ({"mrpo_mixture": "mean"}, "`mrpo_mixture='mean'` is not known"),
        ({"mrpo_mode": "multi_dpo", "mrpo_mixture": "geometric"}, "`mrpo_mixture='geometric'` has no effect"),
        ({"ref_weights": [0.5, 0.5]}, r"`ref_weights=\[0.5, 0.5\]` has no effect with `weight_mode='arwc'`"),
        ({"weight_mode": "fixed"}, "needs `ref_weights`"),
        ({"weight_mode": "fixed", "ref_weights": [0.5, 0.6]}, "add up to 1.1. They must add up to 1"),
        ({"weight_mode": "fixed", "ref_weights": [1.5, -0.5]}, r"`ref_weights=1.5` is out of range"),
        ({"weight_mode": "fixed", "ref_weights": [1.0], "ref_models": ["a"]}, "has 1 numbers for 2 references"),
        ({"weight_mode": "official_code", "ref_models": ["a", "b"]}, "defined for two references; there are 3"),
        ({"ref_models": []}, r"`ref_models=\[\]` must be a list"),
        ({"ref_models": "a"}, "`ref_models='a'` must be a list"),
        ({"ld_alpha": 0.5}, "`ld_alpha=0.5` weighs the tokens"),
        ({"sync_ref_model": True}, "`sync_ref_model=True` moves the reference"),
        ({"loss_type": "ipo"}, "`loss_type='ipo'` has no effect on this method's loss"),
    ],
)
def test_wrong_options(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        MRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


# ---------------------------------------------------------------- the references


def letters_tokenizer():
    """One token a byte, another chat template and another end token than the tests' tokenizer."""
    special = ["<end>", "<user>", "<bot>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE(vocab={token: i for i, token in enumerate(special + alphabet)}, merges=[])
    letters = Tokenizer(model)
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    letters.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<end>", pad_token="<end>")
    fast.chat_template = (
        "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<bot>' }}{{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<bot>{% endif %}"
    )
    return fast


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Folder, model and tokenizer of another family with another vocabulary."""
    folder = tmp_path_factory.mktemp("references") / "other"
    letters = letters_tokenizer()
    model = tiny.model("qwen2", letters, seed=5)
    for part in (model, letters):
        part.save_pretrained(folder)
    return str(folder), model, letters


@pytest.fixture
def loads(monkeypatch):
    """The models that are loaded to score."""
    found, load = [], references.load_model
    monkeypatch.setattr(references, "load_model", lambda source, *rest: (found.append(source), load(source, *rest))[1])
    return found


def on_disk(tmp_path, data):
    """The dataset read from a file, whose cache outlives the process."""
    data.to_json(tmp_path / "pairs.jsonl")
    return load_dataset(
        "json", data_files=str(tmp_path / "pairs.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )


def summed(model, tokenizer, prompt, response):
    with torch.no_grad():
        return token_logps(model, tokenizer, prompt, response).double().sum().item()


class TestScores:
    def test_texts(self, tokenizer, other, model_dir):
        """Each model sees the texts as its own tokenizer cuts them, with its own end token."""
        folder, model, letters = other
        data = tiny.preference_data()
        scored = score_references(data, [folder, model_dir], batch_tokens=200)
        assert scored.column_names == [
            *data.column_names, "ref1_chosen_logps", "ref1_rejected_logps", "ref2_chosen_logps", "ref2_rejected_logps",
        ]  # fmt: skip
        for k, (own, own_tokenizer) in enumerate([(model, letters), (tiny.model("llama", tokenizer), tokenizer)], 1):
            for row in scored:
                for name in ("chosen", "rejected"):
                    expected = summed(own, own_tokenizer, row["prompt"], row[name])
                    assert row[f"ref{k}_{name}_logps"] == pytest.approx(expected, rel=1e-5)

    def test_messages(self, other):
        """In the chat template of the model; an implicit prompt is found."""
        folder, model, letters = other
        data = tiny.conversational_preference_data()
        implicit = data.map(lambda row: {name: row["prompt"] + row[name] for name in ("chosen", "rejected")})
        for rows in (data, implicit.remove_columns("prompt")):
            scored = score_references(rows, folder)
            for row, (question, answer) in zip(scored, tiny.QUESTIONS, strict=True):
                prompt = letters(f"<user>{question}<end><bot>")["input_ids"]
                ids = letters(f"{answer}<end>")["input_ids"]
                assert row["ref1_chosen_logps"] == pytest.approx(summed(model, letters, prompt, ids), rel=1e-5)

    def test_end_token_of_another_model(self, other):
        folder = other[0]
        data = tiny.preference_data()
        ended = data.map(lambda row: {name: f"{row[name]}<|im_end|>" for name in ("chosen", "rejected")})
        expected = score_references(data, folder)["ref1_chosen_logps"][:]
        assert score_references(ended, folder, eos_token="<|im_end|>")["ref1_chosen_logps"][:] == expected
        assert score_references(ended, folder)["ref1_chosen_logps"][:] != expected

    def test_an_instance_is_given_back(self, tokenizer):
        model = tiny.model("llama", tokenizer).train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        scored = score_references(tiny.preference_data(), model, processing_classes=[tokenizer])
        assert model.training
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        row = scored[0]
        expected = summed(model.eval(), tokenizer, row["prompt"], row["chosen"])
        assert row["ref1_chosen_logps"] == pytest.approx(expected, rel=1e-5)

    def test_cache(self, tmp_path, tokenizer, other, model_dir, loads):
        """By the data and the weights; whatever the place of the model in the list. Weights are not loaded for it."""
        folder = other[0]
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        data = on_disk(tmp_path, tiny.preference_data())
        first = score_references(data, str(copy))
        again = score_references(data, [model_dir, str(copy)])
        assert again["ref2_chosen_logps"][:] == first["ref1_chosen_logps"][:]
        assert loads == [str(copy), model_dir]
        score_references(data.select(range(4)), str(copy))
        assert loads[2:] == [str(copy)]
        tiny.model("qwen2", other[2], seed=6).save_pretrained(copy)
        changed = score_references(data, str(copy))
        assert loads[3:] == [str(copy)]
        assert changed["ref1_chosen_logps"][:] != first["ref1_chosen_logps"][:]

    def test_other_code_scores_anew(self, tmp_path, other, loads, monkeypatch):
        data = on_disk(tmp_path, tiny.preference_data())
        for _ in range(2):
            score_references(data, other[0])
        assert len(loads) == 1
        digest = caching._source_digest
        changed = pair_ids.__module__
        monkeypatch.setattr(caching, "_source_digest", lambda name: "new" if name == changed else digest(name))
        score_references(data, other[0])
        assert len(loads) == 2

    def test_one_model_in_memory(self, other, model_dir, monkeypatch):
        alive, found, load = [], [], references.load_model

        def noted(*arguments):
            gc.collect()
            found.append(sum(reference() is not None for reference in alive))
            model = load(*arguments)
            alive.append(weakref.ref(model))
            return model

        monkeypatch.setattr(references, "load_model", noted)
        score_references(
            tiny.preference_data(), [other[0], model_dir, other[0]], model_init_kwargs={"dtype": "bfloat16"}
        )
        gc.collect()
        assert found[:2] == [0, 0]
        assert not any(reference() is not None for reference in alive)

    @pytest.mark.slow
    def test_two_processes(self, tmp_path, other):
        """Each scores half of the rows, and both have all of them."""
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        process = subprocess.Popen(
            [*command, two_processes_references.__file__, other[0], str(tmp_path)],
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            _, errors = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        assert process.returncode == 0, errors[-3000:]
        scored = score_references(tiny.preference_data(), other[0])
        for rank in range(2):
            report = json.loads((tmp_path / f"{rank}.json").read_text())
            assert report["scored"] == 4 * 2
            for name in ("ref1_chosen_logps", "ref1_rejected_logps"):
                assert report[name] == pytest.approx(scored[name][:], rel=1e-5)

    @pytest.mark.parametrize(
        ("data", "models", "message"),
        [
            (lambda: tiny.preference_data().to_iterable_dataset(), None, "is a IterableDataset; expected a `Dataset`"),
            (lambda: anchored(ref1_chosen_logps=[-1.0] * 8), None, "has the column 'ref1_chosen_logps' already"),
            (lambda: tiny.preference_data().remove_columns("chosen"), None, "lacks the column 'chosen'"),
            (tiny.preference_data, ["no/such/folder/at/all"], "no/such/folder"),
            (tiny.preference_data, [], "No reference model is given"),
            (
                lambda: Dataset.from_list([{"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]}]),
                None,
                "has token ids and no texts",
            ),
            (
                lambda: Dataset.from_list([{"prompt": "x" * 600, "chosen": "a", "rejected": "b"}]),
                None,
                r"1 of 1 pairs are longer than the context of the reference .*, 512 tokens \(the longest: 602 tokens, row 0\)",
            ),
        ],
    )
    def test_bad_input(self, data, models, message, other, loads):
        with pytest.raises((ValueError, TypeError, OSError), match=message):
            score_references(data(), [other[0]] if models is None else models)
        assert not loads

    def test_messages_without_a_template(self, tmp_path, other, loads):
        folder = tmp_path / "plain"
        shutil.copytree(other[0], folder)
        (folder / "chat_template.jinja").unlink()
        with pytest.raises(ValueError, match="reference `.*plain` has no chat template"):
            score_references(tiny.conversational_preference_data(), str(folder))
        assert not loads


# ---------------------------------------------------------------- the trainer


def trainer_of(tmp_path, tokenizer, data=None, cls=MRPOTrainer, config=MRPOConfig, **settings):
    data = tiny.preference_data() if data is None else data
    return make(cls, config, tmp_path, tiny.model("llama", tokenizer), data, tokenizer, **settings)


class TestTrainer:
    def test_own_model_as_second_reference_is_dpo(self, tmp_path, tokenizer, model_dir):
        """The folder holds the starting policy: losses, rewards and gradients of a run are DPO's."""
        trainer = trainer_of(tmp_path, tokenizer, ref_models=[model_dir])
        plain = trainer_of(tmp_path / "dpo", tokenizer, cls=PreferenceTrainer, config=PreferenceConfig)
        found, expected = loss_and_gradients(trainer), loss_and_gradients(plain)
        assert found[0] == pytest.approx(expected[0], abs=1e-6)
        assert difference(found[1], expected[1]) < 1e-4
        for run in (trainer, plain):
            run.train()
        for ours, theirs in zip(logs(trainer), logs(plain), strict=True):
            for name, value in theirs.items():
                if name != "rewards/accuracies":  # at the start all margins are 0 but for rounding
                    assert ours[name] == pytest.approx(value, abs=2e-3), name
            assert ours["mrpo/shift_chosen"] == pytest.approx(0, abs=1e-4)

    def test_metrics(self, tmp_path, tokenizer, other):
        data = score_references(tiny.preference_data(), other[0]).select(range(4))
        trainer = trainer_of(tmp_path, tokenizer, data, max_steps=1)
        trainer.train()
        log = logs(trainer)[0]
        own = tiny.model("llama", tokenizer)
        refs = [
            double([summed(own, tokenizer, row["prompt"], row[name]) for row in data], data[f"ref1_{name}_logps"][:])
            for name in ("chosen", "rejected")
        ]
        weights = reference_weights(*refs, "arwc")
        clipped = trust_region(*refs, 0.1)
        expected = {"mrpo/weight_0": weights[0], "mrpo/weight_1": weights[1]}
        for name, new, old in zip(("chosen", "rejected"), clipped, refs, strict=True):
            mixed = virtual_reference(new, weights)
            expected[f"mrpo/shift_{name}"] = mixed - old[0]
            expected[f"mrpo/clipped_{name}"] = (new[1] != old[1]).double()
            expected[f"rewards/{name}"] = 0.1 * (old[0] - mixed)  # the policy is still reference 0
        for name, values in expected.items():
            assert log[name] == pytest.approx(values.mean().item(), rel=1e-3, abs=1e-4), name

    def test_models_and_columns_train_alike(self, tmp_path, tokenizer, other):
        """Named in the config, or scored by oneself; the evaluation dataset too."""
        data = tiny.preference_data()
        stored = score_references(data, other[0])
        options = {"eval_strategy": "steps", "eval_steps": 1}
        named = trainer_of(tmp_path / "a", tokenizer, data, eval_dataset=data, ref_models=[other[0]], **options)
        columns = trainer_of(tmp_path / "b", tokenizer, stored, eval_dataset={"x": stored}, **options)
        for trainer in (named, columns):
            trainer.train()
        assert logs(named) == logs(columns)
        evaluations = [
            [entry for entry in t.state.log_history if any("loss" in k and "eval" in k for k in entry)]
            for t in (named, columns)
        ]
        assert [e["eval_loss"] for e in evaluations[0]] == [e["eval_x_loss"] for e in evaluations[1]]
        # A dataset of its own, after training: the stored references do not change with the policy
        assert named.evaluate(data)["eval_loss"] == pytest.approx(columns.evaluate(stored)["eval_loss"], rel=1e-6)
        assert named.predict(data).metrics["test_loss"] == pytest.approx(evaluations[0][-1]["eval_loss"], rel=1e-4)

    def test_a_stream_with_columns(self, tmp_path, tokenizer, other):
        stored = score_references(tiny.preference_data(), other[0])
        found = loss_and_gradients(trainer_of(tmp_path, tokenizer, stored.to_iterable_dataset()))
        expected = loss_and_gradients(trainer_of(tmp_path, tokenizer, stored))
        assert found[0] == expected[0]

    def test_scored_once(self, tmp_path, tokenizer, other, loads):
        data = on_disk(tmp_path, tiny.preference_data())
        for name in ("a", "b"):
            trainer_of(tmp_path / name, tokenizer, data, ref_models=[other[0]])
        assert loads == [other[0]]

    def test_dtype_is_that_of_the_policy(self, tmp_path, tokenizer, other, model_dir, monkeypatch):
        found = []
        monkeypatch.setattr(
            references, "load_model", lambda source, adapter, kwargs, device: found.append(kwargs) or 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            make(
                MRPOTrainer, MRPOConfig, tmp_path, model_dir, tiny.preference_data(), tokenizer, ref_models=[other[0]],
                model_init_kwargs={"dtype": "bfloat16", "revision": "main"},
            )  # fmt: skip
        assert found[0]["dtype"] == "bfloat16"
        assert "revision" not in found[0]

    def test_dtype_is_that_of_a_policy_in_memory(self, tmp_path, tokenizer, other, monkeypatch):
        """And its kind of attention."""
        found = []
        monkeypatch.setattr(
            references, "load_model", lambda source, adapter, kwargs, device: found.append(kwargs) or 1 / 0
        )
        model = tiny.model("llama", tokenizer).to(torch.bfloat16)
        model.set_attn_implementation("eager")
        with pytest.raises(ZeroDivisionError):
            make(MRPOTrainer, MRPOConfig, tmp_path, model, tiny.preference_data(), tokenizer, ref_models=[other[0]])
        assert found[0]["dtype"] == torch.bfloat16
        assert found[0]["attn_implementation"] == "eager"

    def test_cut_pairs_are_dropped(self, tmp_path, tokenizer, other, monkeypatch):
        messages = message_log(monkeypatch, mrpo)
        data = tiny.preference_data()
        lengths = [
            max(len(tokenizer(row["prompt"] + row[name])["input_ids"]) + 1 for name in ("chosen", "rejected"))
            for row in data
        ]
        limit = sorted(lengths)[4]
        trainer = trainer_of(tmp_path, tokenizer, data, ref_models=[other[0]], max_length=limit)
        kept = [row["prompt"] for row, length in zip(data, lengths, strict=True) if length <= limit]
        assert trainer.train_dataset["prompt"][:] == kept
        assert len(kept) < len(data)
        assert f"Dropped {8 - len(kept)} of " in messages[0]
        trainer_of(tmp_path / "whole", tokenizer, data, ref_models=[other[0]], max_length=max(lengths))
        assert len(messages) == 1
        with pytest.raises(ValueError, match=r"`max_length=\d+` cuts the responses of"):
            shortest = max(len(tokenizer(row["prompt"])["input_ids"]) for row in data) + 1
            long = data.map(lambda row: {"chosen": row["chosen"] + " and so on" * 20})
            trainer_of(tmp_path / "none", tokenizer, long, ref_models=[other[0]], max_length=shortest)

    def test_lora(self, tmp_path, tokenizer, other):
        from peft import LoraConfig

        stored = score_references(tiny.preference_data(), other[0])
        adapter = LoraConfig(r=2, target_modules="all-linear")
        found = trainer_of(tmp_path / "lora", tokenizer, stored, peft_config=adapter)
        assert found.ref_model is None
        full = trainer_of(tmp_path / "full", tokenizer, stored)
        assert loss_and_gradients(found)[0] == pytest.approx(loss_and_gradients(full)[0], rel=1e-5)

    @pytest.mark.parametrize(
        ("data", "settings", "message"),
        [
            (
                tiny.preference_data,
                {},
                r"needs a reference beside the starting policy.*add the columns .*ref1_chosen_logps",
            ),
            (lambda: anchored(ref1_chosen_logps=[-1.0] * 8), {}, "lacks the column 'ref1_rejected_logps'"),
            (lambda: anchored(ref1_chosen_logps=[-1.0] * 8), {"ref_models": ["a"]}, r"\(ref1_.*Drop one of the two"),
            (
                lambda: anchored(ref2_chosen_logps=[-1.0] * 8, ref2_rejected_logps=[-1.0] * 8),
                {},
                "lacks the column 'ref1_chosen_logps'",
            ),
            (
                lambda: anchored(ref1_chosen_logps=[1.0] * 8, ref1_rejected_logps=[-1.0] * 8),
                {},
                "column 'ref1_chosen_logps' holds 1.0, expected a finite number",
            ),
            (
                lambda: anchored(ref1_chosen_logps=[-1.0] * 8, ref1_rejected_logps=[-1.0] * 8),
                {"weight_mode": "fixed", "ref_weights": [0.2, 0.3, 0.5]},
                "has 3 numbers for 2 references",
            ),
            (
                lambda: tiny.preference_data().to_iterable_dataset(),
                {"ref_models": ["OTHER"]},
                "is an `IterableDataset`",
            ),
            (tiny.preference_data, {"ref_models": ["EMPTY"]}, "has no `config.json`"),
        ],
    )
    def test_bad_data(self, data, settings, message, tmp_path, tokenizer, other, loads, monkeypatch):
        """Before any model is loaded."""
        (tmp_path / "empty").mkdir()
        folders = {"OTHER": other[0], "EMPTY": str(tmp_path / "empty")}
        if "ref_models" in settings:
            settings = settings | {"ref_models": [folders.get(name, name) for name in settings["ref_models"]]}
        with pytest.raises(ValueError, match=message):
            make(MRPOTrainer, MRPOConfig, tmp_path, "policy", data(), tokenizer, **settings)
        assert not loads

    def test_other_number_of_references(self, tmp_path, tokenizer, other, model_dir):
        one = score_references(tiny.preference_data(), other[0])
        two = score_references(tiny.preference_data(), [other[0], model_dir])
        with pytest.raises(
            ValueError, match="`eval_dataset` has the log-probabilities of 2 references .*, the run has 1"
        ):
            trainer_of(tmp_path, tokenizer, one, eval_dataset=two)

    def test_folders_stay_out_of_the_model_card(self, tmp_path, tokenizer, other):
        trainer = trainer_of(tmp_path, tokenizer, ref_models=[other[0]])
        trainer.create_model_card()
        card = (tmp_path / "run" / "README.md").read_text()
        assert other[0] not in card
        assert "['other']" in card
