"""Relative PO: the numbers and identities of its loss, how it depends on the batch, and the embeddings of prompts."""

import math
from functools import partial

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from pairs import (
    difference,
    double,
    gradients,
    logs,
    loss_and_gradients,
    make,
    message_log,
    step_gradients,
    token_logps,
)  # fmt: skip
from torch import tensor
from torch.nn.functional import logsigmoid
from trl import DPOConfig, DPOTrainer

from trl_ift import RelativePOConfig, RelativePOTrainer
from trl_ift.data import embed_prompts
from trl_ift.data.embeddings import EMBEDDING, hashed_tfidf, prompt_text
from trl_ift.preference import relative_po
from trl_ift.preference.relative_po import WEIGHTINGS, diagonal_po_loss, relative_po_loss, relative_weights


def doubles(*values):
    return tensor(values, dtype=torch.float64)


E = doubles([1.0, 0, 0], [0.8, 0.6, 0], [0, 0, 1])
R_W, R_L = doubles(1.0, 2.0, -0.5), doubles(-1.0, 0.5, 0.3)


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


def loss_of(r_w, r_l, chosen, rejected=None, temperature=0.5, beta=0.1):
    weights = relative_weights(chosen, chosen if rejected is None else rejected, temperature)
    return relative_po_loss(r_w, r_l, beta, weights).mean()


def dpo(r_w, r_l, beta=0.1):
    return -logsigmoid(beta * (r_w - r_l))


class TestOnTensors:
    def test_numbers(self):
        close(loss_of(R_W, R_L, E), 0.6784570801)
        close(loss_of(R_W, R_L, E, temperature=0.25), 0.6787214121)
        unpaired = doubles([0.0, 1, 0], [0.6, 0, 0.8])
        close(loss_of(R_W, R_L[:2], E, unpaired), 0.6737228325)
        close(diagonal_po_loss(R_W, R_L, 0.1, 0.8).mean(), 0.6510176390)

    def test_one_pair_is_dpo(self):
        r_w, r_l = R_W[:1], R_L[:1]
        for loss in (
            loss_of(r_w, r_l, E[:1]), relative_po_loss(r_w, r_l, 0.1).mean(), diagonal_po_loss(r_w, r_l, 0.1, 0.8).mean(),
        ):  # fmt: skip
            close(loss, dpo(r_w, r_l).mean())

    def test_weights(self):
        weights = relative_weights(E, E, 0.5)
        close(weights.sum(1), [1.0] * 3)
        close(
            weights[0], [value / sum((1, math.exp(-0.4), math.exp(-2))) for value in (1, math.exp(-0.4), math.exp(-2))]
        )
        close(relative_weights(E[:1].expand(4, 3), E[:1].expand(4, 3), 0.5), torch.full((4, 4), 0.25))
        close(relative_weights(E * doubles(3.0, 0.1, 7)[:, None], 5 * E, 0.5), weights)

    def test_permutation(self):
        order = tensor([2, 0, 1])
        close(loss_of(R_W[order], R_L[order], E[order]), loss_of(R_W, R_L, E))
        weights = relative_weights(E, E, 0.5)
        close(relative_weights(E[order], E[order], 0.5), weights[order][:, order])

    def test_cold_limit(self):
        """The own comparisons at full weight, and log 2 for all others: a third of DPO's gradient."""
        close(loss_of(R_W, R_L, E, temperature=1e-3), dpo(R_W, R_L).mean() / 3 + 2 / 3 * math.log(2))
        r_w = R_W.clone().requires_grad_()
        found = torch.autograd.grad(loss_of(r_w, R_L, E, temperature=1e-3), r_w)[0]
        close(found, torch.autograd.grad(dpo(r_w, R_L).mean(), r_w)[0] / 3)

    def test_a_batch_twice(self):
        """Close, but the weights halve."""
        once = loss_of(R_W, R_L, E)
        twice = loss_of(R_W.repeat(2), R_L.repeat(2), E.repeat(2, 1))
        assert 1e-3 < abs(twice - once) < 2e-2
        close(relative_weights(E.repeat(2, 1), E.repeat(2, 1), 0.5)[:3, :3], relative_weights(E, E, 0.5) / 2)

    def test_autocast(self):
        expected = relative_weights(E.float(), E.float(), 0.01)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(relative_weights(E.float(), E.float(), 0.01), expected)

    def test_by_loops(self):
        expected = torch.zeros(3, dtype=torch.float64)
        for i in range(3):
            raw = [math.exp(-(1 - float(E[i] @ E[j])) / 0.5) for j in range(3)]
            for j in range(3):
                expected[i] += dpo(R_W[i], R_L[j], 0.1 * raw[j] / sum(raw)) / 3
        close(relative_po_loss(R_W, R_L, 0.1, relative_weights(E, E, 0.5)), expected)

    def test_gradients(self):
        r_w, r_l = R_W.clone().requires_grad_(), R_L.clone().requires_grad_()
        torch.autograd.gradcheck(lambda w, r: loss_of(w, r, E), (r_w, r_l))
        torch.autograd.gradcheck(lambda w, r: diagonal_po_loss(w, r, 0.1, 0.3), (r_w, r_l))

    def test_extremes(self):
        r_w = tensor([1e5, -1e5], requires_grad=True)
        loss = loss_of(r_w, tensor([-1e5, 1e5]), tensor([[1.0, 0], [1.0, 1e-6]]))
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(r_w.grad).all()


# ---------------------------------------------------------------- the trainer

VECTORS = [[1.0, 0.0, 0.0], [2.0, 1.5, 0.0], [0.0, 0.0, 0.5], [1.0, 1.0, 1.0]]


def data_of(number=4, **columns):
    rows = tiny.preference_data().to_list()[:number]
    columns = {EMBEDDING: (VECTORS * 2)[:number]} | columns
    return Dataset.from_list(
        [row | {name: values[i] for name, values in columns.items()} for i, row in enumerate(rows)]
    )


def trainer_of(tmp_path, tokenizer, data=None, cls=RelativePOTrainer, config=RelativePOConfig, **settings):
    reference = tiny.model("llama", tokenizer, seed=1)
    return make(
        partial(cls, ref_model=reference), config, tmp_path, tiny.model("llama", tokenizer),
        data_of() if data is None else data, tokenizer, overwrite_output_dir=True, **settings,
    )  # fmt: skip


def log_ratios(policy, reference, tokenizer, rows):
    """Of chosen and rejected, each (B,), one unpadded sequence at a time."""
    found = {}
    for kind in ("chosen", "rejected"):
        ratios = []
        for row in rows:
            with torch.no_grad():
                ref = token_logps(reference, tokenizer, row["prompt"], row[kind]).sum()
            ratios.append(token_logps(policy, tokenizer, row["prompt"], row[kind]).sum() - ref)
        found[kind] = torch.stack(ratios)
    return found["chosen"], found["rejected"]


def comparisons(r_w, r_l, weighting, rows):
    """Losses of each pair, written down again."""
    number, losses = len(rows), []
    unit = [np.array(row[EMBEDDING]) / np.linalg.norm(row[EMBEDDING]) for row in rows]
    for i in range(number):
        own = [dpo(r_w[i], r_l[j]) for j in range(number)]
        if weighting == "embedding":
            raw = [math.exp((unit[i] @ unit[j] - 1) / 0.5) for j in range(number)]
            own = [-logsigmoid(0.1 * raw[j] / sum(raw) * (r_w[i] - r_l[j])) for j in range(number)]
        if weighting == "diagonal":
            others = [own[j] for j in range(number) if j != i]
            losses.append(0.8 * own[i] + 0.2 * sum(others) / len(others))
        else:
            losses.append(sum(own) / number)
    return torch.stack(losses)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_loss_and_gradients_of_the_trainer(tmp_path, tokenizer, weighting, weighted):
    """A weight multiplies the comparisons of its chosen response."""
    weights = [1.0, 0.0, 3.0, 0.5] if weighted else [1.0] * 4
    rows = data_of(weight=weights)
    trainer = trainer_of(tmp_path, tokenizer, rows, relative_weighting=weighting)
    loss, found = loss_and_gradients(trainer)
    twin = double(trainer.model)
    ratios = log_ratios(twin, double(trainer.ref_model), tokenizer, rows)
    expected = (comparisons(*ratios, weighting, list(rows)) * tensor(weights)).mean()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert difference(found, gradients(twin)) < 2e-5


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_one_pair_is_trls_loss(tmp_path, tokenizer, weighting):
    options = {"per_device_train_batch_size": 1}
    ours = trainer_of(tmp_path, tokenizer, relative_weighting=weighting, **options)
    theirs = make(
        partial(DPOTrainer, ref_model=tiny.model("llama", tokenizer, seed=1)), DPOConfig, tmp_path,
        tiny.model("llama", tokenizer), tiny.preference_data().select(range(4)), tokenizer, **options,
    )  # fmt: skip
    (loss, found), (expected, gradient) = loss_and_gradients(ours), loss_and_gradients(theirs)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert difference(found, gradient) < 1e-4


def test_accumulation(tmp_path, tokenizer):
    """A step is the mean over its pairs of losses within their micro-batches, a smaller last one included."""
    trainer = trainer_of(
        tmp_path, tokenizer, data_of(6), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=1
    )
    twin, reference = double(trainer.model), double(trainer.ref_model)
    rows = list(data_of(6))
    losses = []
    for part in (rows[:4], rows[4:]):
        losses.append(comparisons(*log_ratios(twin, reference, tokenizer, part), "embedding", part))
    expected = torch.cat(losses).mean()
    expected.backward()
    (loss,), (gradient,) = step_gradients(trainer)
    assert loss == pytest.approx(expected.item(), abs=2e-4)
    assert difference(gradient, gradients(twin)) < 2e-5

    whole = trainer_of(
        tmp_path, tokenizer, data_of(4), max_steps=1, per_device_train_batch_size=4, output_dir=str(tmp_path / "4")
    )
    parts = trainer_of(
        tmp_path, tokenizer, data_of(4), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        output_dir=str(tmp_path / "2"),
    )  # fmt: skip
    assert difference(step_gradients(parts)[1][0], step_gradients(whole)[1][0]) > 1e-2  # other comparisons


def test_stored_reference_and_stream(tmp_path, tokenizer):
    expected, gradient = loss_and_gradients(trainer_of(tmp_path, tokenizer))
    for data, settings in ((data_of(), {"precompute_ref_log_probs": True}), (data_of().to_iterable_dataset(), {})):
        loss, found = loss_and_gradients(trainer_of(tmp_path, tokenizer, data, **settings))
        assert loss == pytest.approx(expected, rel=1e-5)
        assert difference(found, gradient) < 1e-4


def test_metrics(tmp_path, tokenizer):
    trainer = trainer_of(tmp_path, tokenizer, max_steps=1, eval_dataset=data_of(8))
    r_w, r_l = log_ratios(trainer.model, trainer.ref_model, tokenizer, data_of())
    own = relative_weights(tensor(VECTORS), tensor(VECTORS), 0.5).diagonal().mean()
    trainer.train()
    (entry,) = logs(trainer)
    assert entry["relative_po/own_weight"] == pytest.approx(own.item(), rel=1e-5)
    assert entry["relative_po/dpo_loss"] == pytest.approx(dpo(r_w, r_l).mean().item(), rel=1e-4)
    assert entry["rewards/accuracies"] == (r_w > r_l).float().mean().item()
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert math.isfinite(trainer.evaluate(data_of(3))["eval_relative_po/own_weight"])
    assert math.isfinite(trainer.predict(data_of(3)).metrics["test_loss"])


# ---------------------------------------------------------------- embeddings


class TestEmbeddings:
    def test_hashed_tfidf(self):
        texts = ["Name a colour.", "name A colour", "Name a rare bird.", "Where do fish live?", "  "]
        vectors = hashed_tfidf(texts)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
        same, related, other = (vectors[0] @ vectors[j] for j in (1, 2, 3))
        assert 1 > same > related > other >= 0
        np.testing.assert_array_equal(hashed_tfidf(texts), vectors)

    def test_rare_words_count_more(self):
        texts = ["the cat", "the dog", "a cat", "the sun", "the sea"]
        vectors = hashed_tfidf(texts)
        assert vectors[0] @ vectors[2] > vectors[0] @ vectors[1] > 0

    def test_prompt_text(self):
        messages = [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        ]
        assert prompt_text(messages) == "Be kind.\nHi"
        assert prompt_text("Hi") == "Hi"

    def test_encoder(self):
        seen = []

        def encoder(texts):
            seen.append(texts)
            return [[3.0 * len(text), 4.0 * len(text)] for text in texts]

        found = embed_prompts(tiny.preference_data(), encoder, batch_size=3)
        np.testing.assert_allclose(found[EMBEDDING], [[0.6, 0.8]] * 8, rtol=1e-6)
        assert [len(texts) for texts in seen] == [3, 3, 2]
        assert [text for texts in seen for text in texts] == [question for question, _ in tiny.QUESTIONS]

    def test_prompts_within_the_answers(self):
        rows = [
            {
                kind: [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
                for kind, a in (("chosen", a), ("rejected", "No."))
            }
            for q, a in tiny.QUESTIONS
        ]
        explicit = embed_prompts(Dataset.from_list([{"prompt": q} for q, _ in tiny.QUESTIONS]))
        np.testing.assert_allclose(embed_prompts(Dataset.from_list(rows))[EMBEDDING], explicit[EMBEDDING], rtol=1e-6)

    @pytest.mark.parametrize(
        ("encoder", "message"),
        [
            (lambda texts: [1.0] * len(texts), r"returned an array of shape \(8,\) for 8 texts, expected \(8, D\)"),
            (lambda texts: [[1.0]], r"shape \(1, 1\)"),
            (lambda texts: [[1.0]] * 7 + [[0.0]], "zero or not finite for the prompt 'Where do fish live"),
            (lambda texts: [[math.nan]] + [[1.0]] * 7, "zero or not finite for the prompt 'What is the capital"),
        ],
    )
    def test_bad_encoder(self, encoder, message):
        with pytest.raises(ValueError, match=message):
            embed_prompts(tiny.preference_data(), encoder)

    def test_no_rows(self):
        for dataset in (Dataset.from_list([]), tiny.preference_data().select([])):
            with pytest.raises(ValueError, match="`dataset` is empty: it has no rows"):
                embed_prompts(dataset, lambda texts: np.ones((len(texts), 2)))

    def test_bad_data(self):
        with pytest.raises(TypeError, match="must be a `Dataset`, got `IterableDataset`"):
            embed_prompts(tiny.preference_data().to_iterable_dataset())
        with pytest.raises(ValueError, match="has a column 'prompt_embedding'. Drop it first"):
            embed_prompts(data_of())
        with pytest.raises(ValueError, match=r"has the columns \['text'\]; expected 'prompt'"):
            embed_prompts(tiny.text_data())


class TestMissingEmbeddings:
    def test_are_computed(self, tmp_path, tokenizer, monkeypatch):
        warnings = message_log(monkeypatch, relative_po)
        plain = tiny.preference_data()
        trainer = trainer_of(tmp_path, tokenizer, plain, eval_dataset=plain.select([3, 4]))
        (text,) = [text for text in warnings if "compared by hashed TF-IDF of their words" in text]
        assert text.startswith("`train_dataset` lacks")
        given = trainer_of(tmp_path, tokenizer, embed_prompts(plain))
        assert loss_and_gradients(trainer)[0] == loss_and_gradients(given)[0]
        assert trainer.train_dataset[EMBEDDING] == given.train_dataset[EMBEDDING]
        assert math.isfinite(trainer.evaluate()["eval_loss"])
        assert math.isfinite(trainer.evaluate(plain.select([1, 2]))["eval_loss"])
        assert math.isfinite(trainer.evaluate(trainer.train_dataset)["eval_loss"])

    def test_are_not_needed(self, tmp_path, tokenizer, monkeypatch):
        warnings = message_log(monkeypatch, relative_po)
        trainer = trainer_of(tmp_path, tokenizer, tiny.preference_data(), relative_weighting="uniform")
        assert EMBEDDING not in trainer.train_dataset.column_names
        assert warnings == []

    def test_of_a_stream(self, tmp_path, tokenizer):
        with pytest.raises(ValueError, match="`train_dataset` is a stream and lacks the column 'prompt_embedding'"):
            trainer_of(tmp_path, tokenizer, tiny.preference_data().to_iterable_dataset())

    def test_of_tokens(self, tmp_path, tokenizer):
        tokens = Dataset.from_list([{"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}] * 2)
        with pytest.raises(ValueError, match="`train_dataset` is tokenized and lacks the column"):
            trainer_of(tmp_path, tokenizer, tokens)

    def test_of_one_dataset(self, tmp_path, tokenizer):
        with pytest.raises(
            ValueError, match="`eval_dataset` lacks the column 'prompt_embedding', which the training data have"
        ):
            trainer_of(tmp_path, tokenizer, eval_dataset=tiny.preference_data())
        with pytest.raises(
            ValueError, match="`eval_dataset` has the column 'prompt_embedding', which the training data lack"
        ):
            trainer_of(tmp_path, tokenizer, tiny.preference_data(), eval_dataset=data_of())


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (
            [[1.0], [2.0], [0.0], [1.0]],
            r"row 2: column 'prompt_embedding' must hold a list of finite numbers, not all 0",
        ),
        ([[1.0], [math.nan], [1.0], [1.0]], "row 1: column 'prompt_embedding' must hold"),
        ([[1.0, 1.0], [2.0, math.inf], [1.0, 1.0], [1.0, 1.0]], "row 1: column 'prompt_embedding' must hold"),
        ([[1.0], [], [1.0], [1.0]], "row 1: column 'prompt_embedding' must hold"),
        ([["a"], ["b"], ["c"], ["d"]], "row 0: column 'prompt_embedding' must hold"),
        ([1.0, 2.0, 3.0, 4.0], "row 0: column 'prompt_embedding' must hold"),
        ([None, [1.0], [1.0], [1.0]], "row 0: column 'prompt_embedding' must hold"),
        ([[1.0], [1.0, 2.0], [1.0], [1.0]], r"`train_dataset`: the vectors .* have different lengths, \[1, 2\]"),
    ],
)
def test_wrong_embeddings(tmp_path, tokenizer, vectors, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, tokenizer, data_of(**{EMBEDDING: vectors}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distance_temperature": 0.0}, r"`distance_temperature=0.0` is out of range: it must lie in \(0, inf\)"),
        (
            {"relative_weighting": "tfidf"},
            "`relative_weighting='tfidf'` is not known. Choose one of: 'embedding', 'uniform'",
        ),
        ({"relative_weighting": "diagonal", "diagonal_weight": 1.5}, "`diagonal_weight=1.5` is out of range"),
        ({"diagonal_weight": 0.5}, "`diagonal_weight=0.5` has no effect with `relative_weighting='embedding'`"),
        (
            {"relative_weighting": "uniform", "distance_temperature": 0.2},
            "`distance_temperature=0.2` has no effect with",
        ),
        ({"use_weighting": True}, "`use_weighting=True` has no effect"),
        ({"loss_type": "aot"}, "`loss_type='aot'` has no effect"),
    ],
)
def test_wrong_options(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        RelativePOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_a_batch_of_one_is_said(tmp_path, monkeypatch):
    warnings = message_log(monkeypatch, relative_po)
    RelativePOConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert warnings == []
    RelativePOConfig(str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=1)
    assert "leaves a pair nothing to be compared with: this is DPO" in warnings[0]
    RelativePOConfig(str(tmp_path), use_cpu=True, bf16=False, per_device_eval_batch_size=1)
    assert len(warnings) == 1
    RelativePOConfig(str(tmp_path), use_cpu=True, bf16=False, per_device_eval_batch_size=1, eval_strategy="epoch")
    assert warnings[1].startswith("`per_device_eval_batch_size=1` leaves a pair nothing to be compared with")
