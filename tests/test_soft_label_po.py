"""Soft labels: the numbers and identities of the losses, TRL's losses at their ends, and real votes."""

import math
import os
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset, load_dataset
from pairs import anchored, difference, logs, loss_and_gradients, make, message_log
from torch import tensor
from trl import DPOConfig, DPOTrainer

from trl_ift import SoftLabelPOConfig, SoftLabelPOTrainer
from trl_ift.preference import soft_label_po
from trl_ift.preference.soft_label_po import LOSSES, _is_no_tie, soft_label_loss


SOFT = [name for name, (kind, _) in LOSSES.items() if kind]
H = tensor([4.0], dtype=torch.float64)  # r_w = 3, r_l = -1


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


def filled(value, like=H):
    return torch.full_like(like, value)


def random_margins():
    return 5 * torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def slope(margin, label, loss="gdpo", beta=0.1):
    margin = margin.clone().requires_grad_()
    return torch.autograd.grad(soft_label_loss(margin, filled(label, margin), beta, loss).sum(), margin)[0]


class TestOnTensors:
    @pytest.mark.parametrize(
        ("loss", "expected"),
        [
            ("dpo", 0.5130152524),
            ("cdpo", 0.6130152524),
            ("gdpo", 0.5981388694),
            ("ipo", 1.0),
            ("cipo", 2.25),
            ("gipo", 9.0),
            ("ropo", 0.8539262050),
            ("gropo", 0.9601458923),
        ],
    )
    def test_numbers(self, loss, expected):
        close(soft_label_loss(H, filled(0.75), 0.1, loss), [expected])

    def test_gradients(self):
        close(slope(H, 0.75), [-0.0225083001])
        close(slope(H, 0.75, "cdpo"), [-0.0151312340])
        h = random_margins()
        close(slope(h, 0.8), -0.1 * 0.6 * torch.sigmoid(-0.1 * 0.6 * h))

    @pytest.mark.parametrize("loss", SOFT)
    def test_sure_labels(self, loss):
        """p = 1 is the loss without labels; p = 0 that of the swapped pair."""
        h, base = random_margins(), LOSSES[loss][1]
        expected = soft_label_loss(h, filled(0.3, h), 0.1, base)
        close(soft_label_loss(h, filled(1.0, h), 0.1, loss), expected)
        close(soft_label_loss(-h, filled(0.0, h), 0.1, loss), expected)

    @pytest.mark.parametrize("loss", SOFT)
    def test_swapping_the_pair_and_the_label(self, loss):
        h = random_margins()
        labels = torch.linspace(0, 1, len(h), dtype=torch.float64)
        close(soft_label_loss(-h, 1 - labels, 0.1, loss), soft_label_loss(h, labels, 0.1, loss))

    def test_ties(self):
        h = random_margins()
        for loss, value in (("gdpo", math.log(2)), ("gipo", 1 / (4 * 0.1**2)), ("gropo", 1 + 0.1 * math.log(2))):
            close(soft_label_loss(h, filled(0.5, h), 0.1, loss), filled(value, h))
            assert (slope(h, 0.5, loss) == 0).all()
        for loss in ("cdpo", "cipo"):  # these pull the margin to 0
            close(slope(filled(0.0), 0.5, loss), [0.0])
            assert (slope(h, 0.5, loss).sign() == h.sign()).all()

    def test_surer_labels_push_more(self):
        pushes = [-slope(filled(0.0), p).item() for p in (0.5, 0.6, 0.75, 1.0)]
        assert pushes == pytest.approx([0.1 * (2 * p - 1) / 2 for p in (0.5, 0.6, 0.75, 1.0)])
        assert all(larger > smaller for smaller, larger in pairwise(pushes))

    def test_optima(self):
        """cDPO stops where the policy fits the label; GDPO never does; GIPO asks for more of less sure pairs, cIPO for less."""
        fitted = filled(math.log(0.7 / 0.3) / 0.1)
        close(slope(fitted, 0.7, "cdpo"), [0.0])
        assert all(slope(filled(h), 0.7).item() < 0 for h in (-50.0, fitted.item(), 50.0, 500.0))
        close(slope(filled(1 / (2 * 0.1 * 0.4)), 0.7, "gipo"), [0.0])
        close(slope(filled(0.4 / (2 * 0.1)), 0.7, "cipo"), [0.0])

    def test_gipo_as_a_weighted_target(self):
        h = random_margins()
        close(soft_label_loss(h, filled(0.8, h), 0.1, "gipo"), 0.6**2 * (h - 1 / (2 * 0.1 * 0.6)) ** 2)


# ---------------------------------------------------------------- the trainer


def run_of(cls, config, tmp_path, tokenizer, data, **settings):
    reference = tiny.model("llama", tokenizer, seed=1)
    return loss_and_gradients(
        make(
            partial(cls, ref_model=reference),
            config,
            tmp_path,
            tiny.model("llama", tokenizer),
            data,
            tokenizer,
            **settings,
        )
    )


@pytest.mark.parametrize(
    ("options", "label", "trls"),
    [
        ({}, None, "sigmoid"),
        ({}, 1.0, "sigmoid"),
        ({}, 0.0, "sigmoid"),
        ({"soft_label_loss": "cdpo"}, None, "sigmoid"),
        ({"soft_label_loss": "cdpo"}, 0.0, "sigmoid"),
        ({"soft_label_loss": "dpo"}, 0.3, "sigmoid"),
        ({"length_normalize": True}, 1.0, "sigmoid_norm"),
        ({"soft_label_loss": "gipo"}, None, "ipo"),
        ({"soft_label_loss": "gipo"}, 0.0, "ipo"),
        ({"soft_label_loss": "cipo"}, 1.0, "ipo"),
        ({"soft_label_loss": "ipo"}, 0.3, "ipo"),
    ],
    ids=str,
)
def test_sure_labels_are_trls_losses(tmp_path, tokenizer, options, label, trls):
    """p = 1, or no labels, is a loss of TRL, p = 0 that of the swapped pairs."""
    rows = tiny.preference_data().to_list()[:4]
    given = [row | ({} if label is None else {"soft_label": label}) for row in rows]
    if label == 0.0:
        rows = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    loss, found = run_of(
        SoftLabelPOTrainer, SoftLabelPOConfig, tmp_path, tokenizer, Dataset.from_list(given), **options
    )
    expected, gradient = run_of(DPOTrainer, DPOConfig, tmp_path, tokenizer, Dataset.from_list(rows), loss_type=[trls])
    assert loss == pytest.approx(expected, rel=1e-5)
    assert difference(found, gradient) < 1e-4


def trainer_of(tmp_path, tokenizer, data, **settings):
    return make(
        SoftLabelPOTrainer, SoftLabelPOConfig, tmp_path, tiny.model("llama", tokenizer), data, tokenizer, **settings
    )


def test_clip(tmp_path, tokenizer):
    """A clipped label is the label at the bound; a missing one is clipped too."""
    bounds = {"soft_label_clip": [0.2, 0.9]}
    cases = [
        (anchored(4, soft_label=[1.0, 0.95, 0.5, 0.1]), anchored(4, soft_label=[0.9, 0.9, 0.5, 0.2])),
        (anchored(4), anchored(4, soft_label=[0.9] * 4)),
    ]
    for given, expected in cases:
        loss, found = loss_and_gradients(trainer_of(tmp_path, tokenizer, given, soft_label_loss="cdpo", **bounds))
        value, gradient = loss_and_gradients(trainer_of(tmp_path, tokenizer, expected, soft_label_loss="cdpo"))
        assert loss == pytest.approx(value, rel=1e-6)
        assert difference(found, gradient) < 1e-5


def test_metrics(tmp_path, tokenizer):
    labels = [0.9, 0.5, 0.2, 1.0]
    data = anchored(4, soft_label=labels)
    trainer = trainer_of(tmp_path, tokenizer, data, max_steps=1)
    inputs = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        tokens = trainer.model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).logits[:, :-1].log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]  # fmt: skip
    chosen, rejected = (tokens * inputs["completion_mask"][:, 1:]).sum(1).chunk(2)
    h = 0.1 * (chosen - inputs["ref_chosen_logps"] - rejected + inputs["ref_rejected_logps"])
    trainer.train()
    (entry,) = logs(trainer)
    signed = 2 * tensor(labels) - 1
    assert entry["soft_label_po/label"] == pytest.approx(0.65)
    assert entry["soft_label_po/margin"] == pytest.approx((signed * h).sum().item() / 2.4, rel=1e-3)
    assert entry["soft_label_po/accuracy"] == pytest.approx(
        ((signed * h > 0) * signed.abs()).sum().item() / 2.4, abs=1e-6
    )
    assert entry["rewards/margins"] == pytest.approx(h.mean().item(), rel=1e-3)


def test_metrics_of_ties_alone(tmp_path, tokenizer):
    trainer = trainer_of(tmp_path, tokenizer, anchored(4, soft_label=[0.5] * 4), max_steps=1)
    trainer.train()
    (entry,) = logs(trainer)
    assert entry["grad_norm"] == 0
    assert "soft_label_po/accuracy" not in entry


class TestTies:
    def test_dropped(self, tmp_path, tokenizer, monkeypatch):
        warnings = message_log(monkeypatch, soft_label_po)
        data = anchored(4, soft_label=[0.5, 0.7, 0.5, 0.2])
        trainer = trainer_of(tmp_path, tokenizer, data, drop_ties=True, eval_dataset=anchored(3))
        assert trainer.train_dataset["soft_label"] == [0.7, 0.2]
        assert len(trainer.eval_dataset) == 3
        assert warnings == ["Dropped 2 of 4 rows of the train dataset: ties."]
        assert len(trainer_of(tmp_path, tokenizer, data).train_dataset) == 4

    def test_dropped_from_a_stream(self, tmp_path, tokenizer):
        stream = anchored(4, soft_label=[0.5, 0.7, 0.5, 0.2]).to_iterable_dataset()
        trainer = trainer_of(tmp_path, tokenizer, stream, drop_ties=True)
        assert [row["soft_label"] for row in trainer.train_dataset] == [0.7, 0.2]

    def test_rounding_makes_no_preference(self):
        labels = (0.5, 0.5000004, 0.4999996, 0.5000006, 0.4999994, 0.0, 1.0)
        assert [_is_no_tie(label) for label in labels] == [False] * 3 + [True] * 4

    def test_ties_alone(self, tmp_path, tokenizer):
        with pytest.raises(ValueError, match="All rows of the train dataset are ties"):
            trainer_of(tmp_path, tokenizer, anchored(4, soft_label=[0.5] * 4), drop_ties=True)

    def test_without_labels(self, tmp_path, tokenizer):
        with pytest.raises(ValueError, match="`drop_ties=True` has no effect: `train_dataset` lacks the column"):
            trainer_of(tmp_path, tokenizer, anchored(), drop_ties=True)


def test_missing_labels_are_said(tmp_path, tokenizer, monkeypatch):
    warnings = message_log(monkeypatch, soft_label_po)
    trainer_of(tmp_path, tokenizer, anchored(4), soft_label_loss="dpo")
    trainer_of(tmp_path, tokenizer, anchored(4, soft_label=[0.7] * 4))
    assert warnings == []
    trainer_of(tmp_path, tokenizer, anchored(4))
    (warning,) = warnings
    assert "lacks the column 'soft_label'" in warning
    assert "taken to be 1 for every pair" in warning


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (
            [0.5, 1.2, 0.5, 0.5],
            ValueError,
            r"row 1: column 'soft_label' holds 1.2, expected a finite number in \[0, 1\]",
        ),
        ([0.5, -0.1, 0.5, 0.5], ValueError, "row 1: column 'soft_label' holds -0.1"),
        ([0.5, 0.5, None, 0.5], TypeError, "row 2: column 'soft_label' must hold numbers, found None"),
    ],
)
def test_wrong_labels(tmp_path, tokenizer, labels, error, message):
    with pytest.raises(error, match=message):
        trainer_of(tmp_path, tokenizer, anchored(4, soft_label=labels))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"soft_label_loss": "xdpo"}, "`soft_label_loss='xdpo'` is not known. Choose one of: 'gdpo', 'gipo'"),
        ({"ropo_alpha": 1.0}, "`ropo_alpha=1.0` has no effect with `soft_label_loss='gdpo'`"),
        ({"soft_label_loss": "ropo", "ropo_gamma": -1.0}, "`ropo_gamma=-1.0` is out of range"),
        ({"soft_label_loss": "gropo", "ropo_alpha": 0.0, "ropo_gamma": 0.0}, "the loss is 0"),
        ({"soft_label_loss": "ipo", "soft_label_clip": [0.1, 0.9]}, "`soft_label_clip=.* has no effect with"),
        ({"soft_label_clip": [0.1]}, "must be two probabilities"),
        ({"soft_label_clip": [0.1, 1.5]}, "`soft_label_clip=1.5` is out of range"),
        ({"soft_label_clip": [0.9, 0.1]}, "must be in ascending order"),
        ({"soft_label_clip": [0.5, 0.5]}, "leave more than ties"),
        ({"label_smoothing": 0.1}, "`label_smoothing=0.1` has no effect"),
        ({"f_divergence_type": "js_divergence"}, "`f_divergence_type='js_divergence'` has no effect"),
    ],
)
def test_wrong_options(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        SoftLabelPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


@pytest.mark.parametrize("clip", [[0.7, 0.7], [0.2, 0.5], [0.5, 0.9]])
def test_clips_that_leave_more_than_ties(tmp_path, clip):
    assert SoftLabelPOConfig(str(tmp_path), use_cpu=True, bf16=False, soft_label_clip=clip).soft_label_clip == clip


def test_default_normalization(tmp_path):
    for loss, (_, base) in LOSSES.items():
        config = SoftLabelPOConfig(str(tmp_path), use_cpu=True, bf16=False, soft_label_loss=loss)
        assert config.length_normalize is (base == "ipo")


DATA = Path(os.environ.get("TRL_IFT_TEST_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
VOTES = DATA / "soft_label_test.jsonl.gz"


@pytest.mark.skipif(not VOTES.is_file(), reason=f"the data are not here: {VOTES}")
def test_real_votes(tmp_path, tokenizer):
    """Shares of three annotators' votes, ties among them."""
    votes = load_dataset("json", data_files=str(VOTES), split="train", cache_dir=str(tmp_path / "cache"))
    votes = votes.rename_column("chosen_prob", "soft_label").select(range(24))
    trainer = trainer_of(tmp_path, tokenizer, votes, drop_ties=True, max_steps=3)
    assert 0 < sum(label == 0.5 for label in votes["soft_label"]) == 24 - len(trainer.train_dataset)
    trainer.train()
    for entry in logs(trainer):
        assert math.isfinite(entry["loss"])
        assert 0.5 < entry["soft_label_po/label"] <= 1
