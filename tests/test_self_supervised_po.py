"""SPO-style: the degraded texts, the auxiliary loss against an independent computation, and the life of its head."""

import importlib
import json
import linecache
import math
import os
import signal
import subprocess
import sys

import pytest
import tiny
import torch
import two_processes_spo
from datasets import Dataset
from datasets.fingerprint import Hasher
from pairs import difference, double, gradients, logs, loss_and_gradients, make, step_gradients
from peft import LoraConfig
from safetensors import safe_open
from test_methods import wordy_data
from torch import tensor
from transformers import AutoModelForCausalLM

from trl_ift import PreferenceConfig, SelfSupervisedPOConfig, SelfSupervisedPOTrainer
from trl_ift.data import caching
from trl_ift.preference import self_supervised_po as module
from trl_ift.preference.collator import PreferenceCollator
from trl_ift.preference.self_supervised_po import DegreeCollator, degraded_texts, degree_loss, pooled, rake
from trl_ift.preference.trainer import PreferenceTrainer


OFF = {"spo_gamma_chosen": 0.0, "spo_gamma_rejected": 0.0}
TEXT = "The quick brown fox jumps over the lazy dog, and a red fox sleeps. It is a quick nap!"


class TestTexts:
    def test_rake(self):
        """quick: degree 4 + 2 in 2 phrases, fox: 4 + 3 in 2; "jumps" follows fox in the first phrase."""
        found = [(TEXT[start:end], score) for start, end, score in rake(TEXT)]
        quick, fox = (4 + 2) / 2, (4 + 3) / 2
        assert found == [
            ("quick brown fox jumps", quick + 4 + fox + 4),
            ("lazy dog", 2 + 2),
            ("red fox sleeps", 3 + fox + 3),
            ("quick nap", quick + 2),
        ]
        assert rake("It is what it is, and that's that.") == []
        assert rake("") == []

    def test_levels(self):
        """The best phrases go first: of four, ceil(4 k / 3)."""
        assert degraded_texts(TEXT, rake(TEXT), 4) == [
            TEXT,
            "The over the lazy dog, and a . It is a quick nap!",
            "The over the lazy dog, and a . It is a !",
            "The over the , and a . It is a !",
        ]
        assert [text == TEXT for text in degraded_texts(TEXT, rake(TEXT), 2)] == [True, False]

    def test_spaces_of_the_text(self):
        """Indentation stays; level 0 is the text as it was."""
        code = "  Use  this loop:\n    while running print values\n"
        levels = degraded_texts(code, rake(code), 2)
        assert levels[0] == code
        assert levels[1] == "  this :\n    while \n"

    def test_few_phrases(self):
        spans = rake("Paris is the capital.")
        assert len(spans) == 2
        assert len(degraded_texts("Paris is the capital.", spans, 3)) == 3
        assert degraded_texts("Paris is the capital.", spans, 4) == []

    @pytest.mark.parametrize("levels", [2, 3, 4, 5])
    def test_removed_share_grows(self, levels):
        for text in (TEXT, *wordy_data()["chosen"]):
            lengths = [len(degraded) for degraded in degraded_texts(text, rake(text), levels)]
            assert lengths == sorted(lengths, reverse=True)
            assert len(set(lengths)) == len(lengths)

    def test_length_control(self):
        """As many words as before, those of the response, and the phrases gone."""
        found = degraded_texts(TEXT, rake(TEXT), 4, length_control=True)
        assert found[0] == TEXT
        assert found == degraded_texts(TEXT, rake(TEXT), 4, length_control=True)
        words = set(TEXT.replace(",", "").replace(".", "").replace("!", "").split())
        for text in found[1:]:
            assert len(text.split()) == len(TEXT.split())
            assert {word.strip(",.!") for word in text.split()} <= words
            assert "quick brown fox jumps" not in text
        assert "sleeps" not in found[1]
        assert "brown" not in found[1]

    def test_nothing_but_key_words(self):
        """Nothing is left to put in their place."""
        text = "Cats, dogs, birds."
        assert degraded_texts(text, rake(text), 4, length_control=True)[-1] == ", , ."


class TestLoss:
    def test_numbers(self):
        align = -math.log(1 / (1 + math.exp(-0.5)))
        assert align == pytest.approx(0.4740769842, abs=1e-10)
        chosen = degree_loss(tensor([[2.0, 0, -1]], dtype=torch.float64), tensor([0])).mean()
        logits = tensor([[0.5, 0.2, -0.3], [0, 0, 0]], dtype=torch.float64)
        rejected = degree_loss(logits, tensor([2, 1])).mean()
        assert (align + 0.1 * chosen + 0.1 * rejected).item() == pytest.approx(0.6251906380, abs=1e-9)

    def test_pool(self):
        hidden = torch.arange(24.0).view(2, 4, 3)
        mask = tensor([[0, 1, 1, 0], [0, 0, 1, 1]])
        torch.testing.assert_close(pooled(hidden, mask), torch.stack([hidden[0, 1:3].mean(0), hidden[1, 2:].mean(0)]))
        torch.testing.assert_close(pooled(hidden, mask, "last"), torch.stack([hidden[0, 2], hidden[1, 3]]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spo_gamma_chosen": -1.0}, "`spo_gamma_chosen=-1.0` is out of range"),
        ({"spo_gamma_rejected": -1.0}, "`spo_gamma_rejected=-1.0` is out of range"),
        ({"spo_levels": 1}, "`spo_levels=1` is out of range"),
        ({"spo_pool": "max"}, "`spo_pool='max'` is not known"),
        ({"spo_head_learning_rate": 0.0}, "`spo_head_learning_rate=0.0` is out of range"),
        (OFF | {"spo_head_learning_rate": 0.1}, "`spo_head_learning_rate=0.1` has no effect"),
        (OFF | {"spo_levels": 3}, "`spo_levels=3` has no effect with `spo_gamma_chosen=0`"),
        (OFF | {"spo_pool": "last"}, "`spo_pool='last'` has no effect"),
        (OFF | {"spo_length_control": True}, "`spo_length_control=True` has no effect"),
        ({"loss_type": "simpo"}, "`loss_type='simpo'` is not known"),
    ],
)
def test_wrong_options(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        SelfSupervisedPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


# ---------------------------------------------------------------- the trainer


def trainer_of(tmp_path, tokenizer, data=None, cls=SelfSupervisedPOTrainer, config=SelfSupervisedPOConfig, **settings):
    data = wordy_data() if data is None else data
    return make(cls, config, tmp_path, tiny.model("llama", tokenizer), data, tokenizer, **settings)


def with_a_head(trainer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer._head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return trainer


def mixed_data():
    """Pairs of which some answers have too few key phrases."""
    rows = wordy_data().to_list()
    for index in (0, 5):
        rows[index]["chosen"] = " Yes."
    for index in (1, 2, 3):
        rows[index]["rejected"] = " No."
    return Dataset.from_list(rows)


def test_without_gammas_it_is_the_base(tmp_path, tokenizer):
    """Loss and gradient, to the bit; nothing is logged of it."""
    options = {"loss_type": ["ipo", "sft"]}
    found = trainer_of(tmp_path / "spo", tokenizer, **OFF, **options)
    base = trainer_of(tmp_path / "dpo", tokenizer, cls=PreferenceTrainer, config=PreferenceConfig, **options)
    (loss, gradient), (value, expected) = loss_and_gradients(found), loss_and_gradients(base)
    assert loss == value
    assert all(torch.equal(gradient[name], expected[name]) for name in expected)
    found.train()
    base.train()
    assert logs(found) == logs(base)


def test_at_the_start(tmp_path, tokenizer):
    """A head of zeros: log K, and no gradient on the policy; the loss falls on the head alone."""
    trainer = trainer_of(tmp_path / "spo", tokenizer, spo_levels=4)
    base = trainer_of(tmp_path / "dpo", tokenizer, cls=PreferenceTrainer, config=PreferenceConfig)
    (loss, gradient), (value, expected) = loss_and_gradients(trainer), loss_and_gradients(base)
    assert loss == pytest.approx(value + 0.2 * math.log(4), rel=1e-6)
    assert difference(gradient, expected) < 1e-5
    assert trainer._head.weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize("pool", ["mean", "last"])
@pytest.mark.parametrize("kind", ["texts", "messages"])
def test_loss_and_gradients(kind, pool, tmp_path, tokenizer):
    """Against one unpadded sequence at a time in float64; chosen and rejected with weights of their own."""
    rows = mixed_data().to_list()[:4]
    if kind == "messages":
        rows = [
            {n: [{"role": "user" if n == "prompt" else "assistant", "content": v.strip()}] for n, v in row.items()}
            for row in rows
        ]
    settings = {"spo_gamma_chosen": 0.7, "spo_gamma_rejected": 0.3, "spo_pool": pool, "spo_levels": 3}
    trainer = with_a_head(trainer_of(tmp_path, tokenizer, Dataset.from_list(rows), **settings))
    batch = next(iter(trainer.get_train_dataloader()))
    loss, found = loss_and_gradients(trainer)
    twin, head = double(trainer.model), trainer._head

    def ids_of(row, text):
        if kind == "texts":
            return tokenizer(row["prompt"])["input_ids"], tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        whole = [*row["prompt"], {"role": "assistant", "content": text}]
        return prompt, tokenizer.apply_chat_template(whole, return_dict=False)[len(prompt) :]

    expected, seen = torch.zeros((), dtype=torch.float64), {}
    for side, gamma in (("chosen", 0.7), ("rejected", 0.3)):
        levels, losses = iter(batch[f"degraded_{side}_labels"].tolist()), []
        for row in rows:
            text = row[side] if kind == "texts" else row[side][0]["content"]
            if not (texts := degraded_texts(text, rake(text), 3)):
                continue
            level = next(levels)
            prompt, ids = ids_of(row, texts[level])
            hidden = twin.model(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).last_hidden_state[
                0, len(prompt) :
            ]
            state = hidden.mean(0) if pool == "mean" else hidden[-1]
            logits = head.weight.detach().double() @ state + head.bias.detach().double()
            losses.append(torch.logsumexp(logits, 0) - logits[level])
        assert next(levels, None) is None
        seen[side] = len(losses)
        expected = expected + gamma * torch.stack(losses).mean()
    assert seen == {"chosen": 3, "rejected": 1}
    base = trainer_of(
        tmp_path / "dpo", tokenizer, Dataset.from_list(rows), cls=PreferenceTrainer, config=PreferenceConfig
    )
    value, base_gradient = loss_and_gradients(base)
    assert loss == pytest.approx(value + expected.item(), rel=1e-5)
    expected.backward()
    own = gradients(twin)
    total = {name: gradient.double() + own.get(name, 0) for name, gradient in base_gradient.items()}
    assert difference(found, total) < 2e-5


def test_levels_are_drawn(tmp_path, tokenizer):
    """By seed, epoch and row, uniformly; the same again for the same."""

    def labels(seed, epoch):
        trainer = trainer_of(tmp_path / f"{seed}", tokenizer, seed=seed, spo_levels=3)
        trainer.data_collator.epoch = epoch
        batches = [dict(batch) for batch in trainer.get_train_dataloader()]
        return [batch[f"degraded_{side}_labels"].tolist() for batch in batches for side in ("chosen", "rejected")]

    assert labels(1, 0) == labels(1, 0)
    assert len({str(labels(seed, epoch)) for seed, epoch in ((1, 0), (1, 1), (2, 0))}) == 3
    counts = torch.bincount(torch.tensor([n for epoch in range(12) for part in labels(0, epoch) for n in part]))
    assert counts.sum() == 12 * 16
    assert (counts > 40).all()


def test_epochs_draw_anew(tmp_path, tokenizer):
    epochs = []
    trainer = trainer_of(tmp_path, tokenizer, max_steps=5)
    draw = DegreeCollator.torch_call
    trainer.data_collator.torch_call = lambda rows: (
        epochs.append(trainer.data_collator.epoch),
        draw(trainer.data_collator, rows),
    )[1]
    trainer.train()
    assert epochs[:5] == [0, 0, 1, 1, 2]


def test_workers_that_outlive_an_epoch_draw_anew(tmp_path, tokenizer):
    """Levels of a worker that lives on are those of no worker, in every epoch."""
    found = []
    for workers in (0, 1):
        options = {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0}
        trainer = trainer_of(tmp_path / str(workers), tokenizer, per_device_train_batch_size=8, max_steps=4, **options)
        labels, compute = [], trainer._compute_loss
        trainer._compute_loss = lambda model, inputs, *rest, labels=labels, compute=compute: (
            labels.append(inputs["degraded_chosen_labels"].tolist()),
            compute(model, inputs, *rest),
        )[1]
        trainer.train()
        found.append(labels)
    assert found[0] == found[1]
    assert len({str(labels) for labels in found[1]}) == 4


def test_accumulation(tmp_path, tokenizer):
    """A step as a whole and in parts, some of which have no degraded response: head and policy."""
    steps = []
    for size in (4, 1):
        trainer = trainer_of(
            tmp_path / str(size), tokenizer, mixed_data().select(range(4)), per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size, max_steps=1,
        )  # fmt: skip
        steps.append(step_gradients(with_a_head(trainer)))
    (whole,), (gradient,) = steps[0]
    (parts,), (summed,) = steps[1]
    assert parts == pytest.approx(whole, abs=2e-4)
    assert "spo_head.weight" in gradient
    assert difference(summed, gradient) < 1e-5


@pytest.mark.slow
def test_two_processes(tmp_path):
    """The same as accumulation on one process, also for processes without a degraded response in a step."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*command, two_processes_spo.__file__, str(tmp_path / "two.json")],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        _, errors = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, errors[-3000:]
    expected = two_processes_spo.run(str(tmp_path), 1)
    for found, log in zip(json.loads((tmp_path / "two.json").read_text()), expected, strict=True):
        assert found == {name: pytest.approx(value, abs=2e-4) for name, value in log.items()}


def test_metrics_and_evaluation(tmp_path, tokenizer):
    data = mixed_data()
    trainer = trainer_of(tmp_path, tokenizer, data, eval_dataset=data, max_steps=1, per_device_train_batch_size=8)
    trainer.train()
    (log,) = logs(trainer)
    assert log["spo/loss_chosen"] == pytest.approx(math.log(4), abs=1e-4)
    assert log["spo/rows_chosen"] == pytest.approx(6 / 8)
    assert log["spo/rows_rejected"] == pytest.approx(5 / 8)
    assert 0 <= log["spo/accuracy_rejected"] <= 1
    # Evaluations have levels of their own, whatever the epoch
    first, second = (trainer.evaluate() for _ in range(2))
    trainer.data_collator.epoch = 4
    third = trainer.evaluate(data)
    for name in ("eval_loss", "eval_spo/loss_chosen", "eval_spo/accuracy_rejected"):
        assert first[name] == second[name] == third[name]


def test_it_is_learned(tmp_path, tokenizer):
    """The accuracy rises far above that of guessing, on responses that were seen."""
    options = {"max_steps": 60, "per_device_train_batch_size": 8, "spo_gamma_chosen": 1.0, "spo_levels": 2}
    options["spo_head_learning_rate"] = 1e-2
    trainer = trainer_of(tmp_path, tokenizer, **options)
    trainer.train()
    late = [log["spo/accuracy_chosen"] for log in logs(trainer)[-10:]]
    assert sum(late) / 10 > 0.9


# ---------------------------------------------------------------- the head


def keys_of(file):
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


@pytest.mark.parametrize("lora", [False, True])
def test_head_is_trained_and_left_out_of_the_model(lora, tmp_path, tokenizer):
    adapter = {"peft_config": LoraConfig(r=2, target_modules="all-linear")} if lora else {}
    trainer = trainer_of(tmp_path, tokenizer, save_strategy="steps", save_steps=2, **adapter)
    trainer.train()
    assert trainer._head.weight.abs().max() > 1e-3
    assert not any("spo_head" in name for name, _ in trainer.model.named_parameters())
    trainer.save_model()
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        assert not any("spo_head" in key for key in keys_of(folder / file))
    assert (tmp_path / "run" / "checkpoint-2" / "spo_head.json").is_file()
    assert not (tmp_path / "run" / "spo_head.json").exists()
    if not lora:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
        assert torch.equal(loaded.lm_head.weight, trainer.model.lm_head.weight)


def test_learning_rate_of_the_head(tmp_path, tokenizer):
    """Its own, under the schedule of the run, which falls to 0: Adam moves by at most 3/3 + 2/3 + 1/3 of it in 3 steps."""
    trainer = trainer_of(tmp_path, tokenizer, max_steps=3, learning_rate=1e-6, spo_head_learning_rate=3e-3)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert 4e-3 < trainer._head.weight.abs().max() < 6.1e-3
    moved = max((value - before[name]).abs().max() for name, value in trainer.model.state_dict().items())
    assert 0 < moved < 3e-6
    groups = trainer.optimizer.param_groups
    assert [len(group["params"]) for group in groups][-1] == 2
    own = {id(parameter) for parameter in trainer._head.parameters()}
    assert not any(id(parameter) in own for group in groups[:-1] for parameter in group["params"])


@pytest.mark.parametrize("lora", [False, True])
def test_resumed_run_is_the_whole_one(lora, tmp_path, tokenizer):
    """With the head, and with the levels that the rows had."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 2}
    if lora:
        options["peft_config"] = LoraConfig(r=2, target_modules="all-linear")
    whole = trainer_of(tmp_path, tokenizer, **options)
    whole.train()
    resumed = trainer_of(tmp_path, tokenizer, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert logs(resumed) == logs(whole)
    assert torch.equal(resumed._head.weight, whole._head.weight)


def test_resuming_without_a_head(tmp_path, tokenizer):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer_of(tmp_path, tokenizer, **options).train()
    (tmp_path / "run" / "checkpoint-1" / "spo_head.json").unlink()
    with pytest.raises(ValueError, match=r"has no `spo_head.json`"):
        trainer_of(tmp_path, tokenizer, **options).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def test_stream(tmp_path, tokenizer):
    found = loss_and_gradients(trainer_of(tmp_path / "a", tokenizer, wordy_data().to_iterable_dataset()))
    assert found[0] == loss_and_gradients(trainer_of(tmp_path / "b", tokenizer))[0]


def test_another_extraction(tmp_path, tokenizer):
    class Letters(SelfSupervisedPOTrainer):
        key_phrases = staticmethod(lambda text: [(i, i + 1, 1.0) for i in range(3)])

    trainer = trainer_of(tmp_path, tokenizer, tiny.preference_data(), cls=Letters)
    assert all(len(rows) == 4 for rows in trainer.train_dataset["degraded_chosen_rows"])


def test_an_edited_extraction_is_another(tmp_path, tokenizer, monkeypatch):
    """`datasets` would take the rows of the old one from its cache, as the name is the same."""
    found, apply = [], Dataset.map

    def noted(self, function=None, **options):
        if "extract" in (options.get("fn_kwargs") or {}):
            found.append(Hasher.hash([function, options["fn_kwargs"]["extract"]]))
        return apply(self, function, **options)

    monkeypatch.setattr(Dataset, "map", noted)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(tmp_path)
    for width in (1, 1, 2):
        (tmp_path / "own_phrases.py").write_text(
            f"def phrases(text):\n    return [(i, i + {width}, 1.0) for i in range(0, 3 * {width}, {width})]\n"
        )
        sys.modules.pop("own_phrases", None)
        caching._source_digest.cache_clear()
        linecache.clearcache()
        importlib.invalidate_caches()
        phrases = importlib.import_module("own_phrases").phrases
        cls = type("Own", (SelfSupervisedPOTrainer,), {"key_phrases": staticmethod(phrases)})
        trainer_of(tmp_path, tokenizer, tiny.preference_data(), cls=cls, spo_gamma_rejected=0.0)
    assert found[0] == found[1] != found[2]


def test_rows_of_another_trainer(tmp_path, tokenizer):
    """Refused: they may have other levels. Those of its own are taken again."""
    data = wordy_data()
    trainer = trainer_of(tmp_path / "a", tokenizer, data, eval_dataset=data, spo_levels=3)
    assert trainer.evaluate(trainer.eval_dataset)["eval_loss"] == trainer.evaluate()["eval_loss"]
    with pytest.raises(
        ValueError, match="`train_dataset` has the column 'degraded_chosen_rows', made by another trainer"
    ):
        trainer_of(tmp_path / "b", tokenizer, trainer.train_dataset, spo_levels=4)


def test_contents_of_parts(tmp_path, tokenizer):
    """Of a first row before the model is loaded."""
    parts = [{"role": "assistant", "content": [{"type": "text", "text": TEXT}]}]
    row = {"prompt": [{"role": "user", "content": "x"}], "chosen": parts, "rejected": parts}
    args = SelfSupervisedPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(TypeError, match="A message of 'chosen' has the content .*, a list of parts"):
        SelfSupervisedPOTrainer("no/model", args=args, train_dataset=Dataset.from_list([row]))
    with pytest.raises(TypeError, match="A message of 'rejected' has the content"):
        module._degrade(row, "rejected", tokenizer, "", None, extract=rake, levels=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"optimizers": (torch.optim.SGD([torch.zeros(1, requires_grad=True)]), None)},
            "`optimizers` holds an optimizer",
        ),
        (
            {"data_collator": PreferenceCollator(pad_token_id=0)},
            r"`data_collator` \(PreferenceCollator\) does not draw",
        ),
        (
            {"train_dataset": Dataset.from_list([{"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]}])},
            "`train_dataset` has token ids and no texts",
        ),
    ],
)
def test_bad_input(tmp_path, arguments, message):
    """Before the model is loaded."""
    args = SelfSupervisedPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match=message):
        SelfSupervisedPOTrainer("no/model", args=args, **{"train_dataset": wordy_data(), **arguments})


def test_no_response_has_key_phrases(tmp_path, tokenizer):
    data = Dataset.from_list([{"prompt": "a", "chosen": " Yes.", "rejected": " No."}])
    with pytest.raises(ValueError, match="No chosen response has 3 key phrases"):
        trainer_of(tmp_path, tokenizer, data)
