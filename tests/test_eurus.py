"""The reward-modeling objective of Eurus: its numbers, TRL's at the neutral setting, and an independent computation."""

import math
import re

import pytest
import tiny
import torch
import trl
from datasets import Dataset
from huggingface_hub import ModelCard
from pairs import difference, double, gradients, logs, loss_and_gradients, make, message_log, step_gradients
from peft import LoraConfig, get_peft_model
from torch import tensor
from trl import RewardConfig, RewardTrainer

from trl_ift import EurusRewardConfig, EurusRewardTrainer, checks
from trl_ift.hub.card import check_model_card
from trl_ift.reward import eurus
from trl_ift.reward.eurus import EurusRewardCollator, _why_dropped, eurus_reward_losses
from trl_ift.scripts.train import run


ABSOLUTE = [True, False, False, True, True, True, False, True]
MARGINS = [0.5, 0.0, 1.0, -0.3, 0.2, 2.0, 0.1, 0.0]


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


def rewards(*values):
    return tensor(values, dtype=torch.float64, requires_grad=True)


# ---------------------------------------------------------------- the loss on tensors


def test_numbers():
    chosen, rejected = rewards(1.2, -0.5), rewards(0.4, 0.3)
    relative, absolute = eurus_reward_losses(chosen, rejected)
    close(relative, [0.3711006659, 1.1711006659])
    close(absolute[0], 1.1762977197)
    close(relative[0] + absolute[0], 1.5473983857)
    close((relative + tensor([1.0, 0.0]) * absolute).mean(), 1.3592495258)
    (relative[0] + absolute[0]).backward()
    close(chosen.grad[0], -0.5415007354)
    close(rejected.grad[0], 0.9087131790)


def test_at_zero():
    relative, absolute = eurus_reward_losses(rewards(0), rewards(0))
    close(relative, [math.log(2)])
    close(absolute, [2 * math.log(2)])
    close(relative + absolute, [2.0794415417])


class TestIdentities:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = 3 * torch.randn(2, 100, dtype=torch.float64, generator=generator)

    def test_signs(self):
        chosen, rejected = self.chosen.clone().requires_grad_(), self.rejected.clone().requires_grad_()
        relative, absolute = eurus_reward_losses(chosen, rejected)
        assert (absolute > 0).all()
        (relative + absolute).sum().backward()
        assert (chosen.grad < 0).all()
        assert (rejected.grad > 0).all()
        close(chosen.grad, -torch.sigmoid(rejected - chosen) - torch.sigmoid(-chosen))
        close(rejected.grad, torch.sigmoid(rejected - chosen) + torch.sigmoid(rejected))

    def test_swapping_and_shifting(self):
        relative, absolute = eurus_reward_losses(self.chosen, self.rejected)
        swapped = eurus_reward_losses(self.rejected, self.chosen)
        assert ((relative - swapped[0]).abs() > 1e-6).all()
        assert ((absolute - swapped[1]).abs() > 1e-6).all()
        shifted = eurus_reward_losses(self.chosen + 2, self.rejected + 2)
        close(shifted[0], relative)
        assert ((absolute - shifted[1]).abs() > 1e-6).all()

    def test_margin(self):
        relative, absolute = eurus_reward_losses(self.chosen, self.rejected, tensor(MARGINS[0]).expand(100))
        close(relative, -torch.nn.functional.logsigmoid(self.chosen - self.rejected - 0.5))
        close(absolute, eurus_reward_losses(self.chosen, self.rejected)[1])

    def test_extremes(self):
        chosen, rejected = tensor([-1e4, 1e4], requires_grad=True), tensor([1e4, -1e4], requires_grad=True)
        total = sum(eurus_reward_losses(chosen, rejected))
        total.sum().backward()
        for values in (total, chosen.grad, rejected.grad):
            assert torch.isfinite(values).all()


# ---------------------------------------------------------------- the trainer


def data(absolute=None, margin=None):
    dataset = tiny.preference_data()
    for name, values in (("absolute", absolute), ("margin", margin)):
        dataset = dataset if values is None else dataset.add_column(name, values)
    return dataset


def trainer_of(tmp_path, tokenizer, dataset, **settings):
    model = tiny.reward_model(tokenizer)
    return make(
        EurusRewardTrainer,
        EurusRewardConfig,
        tmp_path,
        model,
        dataset,
        tokenizer,
        overwrite_output_dir=True,
        **settings,
    )


@pytest.mark.parametrize(
    ("columns", "settings"),
    [
        ({}, {}),
        ({"margin": MARGINS}, {}),
        ({"absolute": ABSOLUTE}, {}),
        ({"margin": MARGINS}, {"center_rewards_coefficient": 0.1}),
    ],
)
def test_without_absolute_term_it_is_trl(columns, settings, tmp_path, tokenizer):
    ours = trainer_of(tmp_path, tokenizer, data(**columns), absolute_coef=0.0, max_steps=3, **settings)
    theirs = make(
        RewardTrainer,
        RewardConfig,
        tmp_path,
        tiny.reward_model(tokenizer),
        data(**columns),
        tokenizer,
        max_steps=3,
        **settings,
    )
    for found, expected in zip(step_gradients(ours)[1], step_gradients(theirs)[1], strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    for mine, other in zip(logs(ours), logs(theirs), strict=True):
        assert {name: mine[name] for name in other} == other


def reward_of(model, tokenizer, row, kind):
    ids = [*tokenizer(row["prompt"] + row[kind])["input_ids"], tokenizer.eos_token_id]
    hidden = model.model(input_ids=tensor([ids]), use_cache=False).last_hidden_state[0, -1]
    return model.score(hidden)[0]


def expected_loss(model, tokenizer, rows, args):
    losses = []
    for row in rows:
        c, r = (reward_of(model, tokenizer, row, kind) for kind in ("chosen", "rejected"))
        loss = args.relative_coef * torch.log1p((r - c + row.get("margin", 0.0)).exp())
        if row.get("absolute", True):
            loss = loss + args.absolute_coef * (torch.log1p((-c).exp()) + torch.log1p(r.exp()))
        losses.append(loss)
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    ("columns", "settings"),
    [
        ({}, {}),
        ({"absolute": ABSOLUTE, "margin": MARGINS}, {"absolute_coef": 0.7, "relative_coef": 1.5}),
        ({"absolute": ABSOLUTE}, {"relative_coef": 0.0}),
    ],
)
def test_loss_and_gradients(columns, settings, tmp_path, tokenizer):
    trainer = trainer_of(tmp_path, tokenizer, data(**columns), **settings)
    loss, found = loss_and_gradients(trainer)
    twin = double(trainer.model)
    rows = [dict(row) for row in data(**columns).select(range(4))]
    expected = expected_loss(twin, tokenizer, rows, trainer.args)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert difference(found, gradients(twin)) < 2e-5


def test_accumulation(tmp_path, tokenizer):
    steps = []
    for size in (8, 2):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 1}
        steps.append(step_gradients(trainer_of(tmp_path, tokenizer, data(ABSOLUTE, MARGINS), **options)))
    ((whole,), (gradient,)), ((parts,), (summed,)) = steps
    assert parts == pytest.approx(whole, abs=2e-4)
    assert difference(summed, gradient) < 1e-5


def test_every_row_has_the_term_unless_it_is_said(tmp_path, tokenizer):
    runs = [step_gradients(trainer_of(tmp_path, tokenizer, data(a)))[0] for a in (None, [True] * 8, [False] * 8)]
    assert runs[0] == runs[1] != runs[2]
    assert runs[2] == step_gradients(trainer_of(tmp_path, tokenizer, data(), absolute_coef=0.0))[0]


def test_metrics_and_evaluation(tmp_path, tokenizer):
    trainer = trainer_of(tmp_path, tokenizer, data(ABSOLUTE), eval_dataset=data(ABSOLUTE), max_steps=40)
    trainer.train()
    first, last = logs(trainer)[0], logs(trainer)[-1]
    twin = double(tiny.reward_model(tokenizer))
    rows = [dict(row) for row in data(ABSOLUTE).select(range(4))]
    with torch.no_grad():
        c, r = (
            torch.stack([reward_of(twin, tokenizer, row, kind) for row in rows]) for kind in ("chosen", "rejected")
        )
    assert first["eurus/chosen_reward"] == pytest.approx(c.mean().item(), abs=1e-4)
    assert first["eurus/rejected_reward"] == pytest.approx(r.mean().item(), abs=1e-4)
    relative, absolute = eurus_reward_losses(c, r)
    has = tensor(ABSOLUTE[:4])
    assert first["eurus/relative_loss"] == pytest.approx(relative.mean().item(), abs=1e-4)
    assert first["eurus/absolute_loss"] == pytest.approx(absolute[has].mean().item(), abs=1e-4)
    right = (c > 0) & (r < 0)
    assert first["eurus/absolute_accuracy"] == pytest.approx(right[has].double().mean().item())
    assert last["eurus/absolute_accuracy"] == 1
    assert last["accuracy"] == 1
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(trainer.evaluate(data(ABSOLUTE))["eval_loss"])
    assert found["eval_loss"] < first["loss"]
    assert found["eval_eurus/absolute_accuracy"] == 1


def test_what_is_recorded(tmp_path):
    """Means over two micro-batches of unequal size; a reward of exactly 0 is neither right nor wrong."""
    trainer = EurusRewardTrainer.__new__(EurusRewardTrainer)  # its metrics need no model
    trainer.args = EurusRewardConfig(str(tmp_path), use_cpu=True, bf16=False)
    trainer.model = torch.nn.Module().train()
    c, r = [0.75, 0.0, 1.0, 0.5, 3.0], [-1.0, -2.0, 0.0, -3.0, 0.25]
    has = [True, True, True, False, True]
    for part in (slice(0, 3), slice(3, 5)):
        chosen, rejected, flags = rewards(*c[part]), rewards(*r[part]), tensor(has[part]).double()
        trainer._record(chosen, rejected, *eurus_reward_losses(chosen, rejected), flags)

    def softplus(x):
        return math.log1p(math.exp(x))

    found = {name: (total / count).item() for name, (total, count) in trainer._sums["train"].items()}
    absolute = [softplus(-x) + softplus(y) for x, y, flag in zip(c, r, has, strict=True) if flag]
    assert found == pytest.approx(
        {
            "eurus/relative_loss": sum(softplus(y - x) for x, y in zip(c, r, strict=True)) / 5,
            "eurus/absolute_loss": sum(absolute) / 4,
            "eurus/chosen_reward": 5.25 / 5,
            "eurus/rejected_reward": -5.75 / 5,
            "eurus/absolute_accuracy": 1 / 4,
        },
        rel=1e-6,
    )


def test_losses_are_of_float32(tmp_path, tokenizer):
    trainer = trainer_of(tmp_path, tokenizer, data())
    trainer.model.to(torch.bfloat16)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert trainer.compute_loss(trainer.model, inputs).dtype == torch.float32


def test_collator_of_one_row():
    row = {"chosen_ids": [5, 6], "rejected_ids": [7], "absolute": True}
    assert EurusRewardCollator(pad_token_id=0)([row])["absolute"].tolist() == [True]


def test_another_collator_needs_no_column_that_the_data_lack(tmp_path, tokenizer):
    collator = trl.trainer.reward_trainer.DataCollatorForPreference(pad_token_id=0)
    arguments = (EurusRewardTrainer, EurusRewardConfig, tmp_path, tiny.reward_model(tokenizer), data(), tokenizer)
    assert make(*arguments, data_collator=collator).data_collator is collator


def test_evaluation_on_data_without_a_column(tmp_path, tokenizer):
    trainer = trainer_of(tmp_path, tokenizer, data())
    with pytest.raises(ValueError, match="`eval dataset` lacks the column 'rejected'"):
        trainer.evaluate(data().remove_columns("rejected"))


def test_conversations_tokens_and_streams(tmp_path, tokenizer):
    flags = tiny.conversational_preference_data().add_column("absolute", ABSOLUTE)
    trainer = trainer_of(tmp_path, tokenizer, flags)
    expected = step_gradients(trainer)[0]
    tokens = trainer.train_dataset.select_columns(["chosen_ids", "rejected_ids", "absolute"])
    assert step_gradients(trainer_of(tmp_path, tokenizer, tokens))[0] == expected
    assert step_gradients(trainer_of(tmp_path, tokenizer, flags.to_iterable_dataset()))[0] == expected


@pytest.mark.parametrize("kind", ["adapter", "whole"])
def test_model_card_runs(kind, tmp_path, tokenizer, capsys, monkeypatch):
    """The example of the card loads the model and prints the reward that training saw."""
    base = tmp_path / "base"
    tiny.reward_model(tokenizer).save_pretrained(base)
    tokenizer.save_pretrained(base)
    options = {"peft_config": LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])} if kind == "adapter" else {}
    trainer = make(EurusRewardTrainer, EurusRewardConfig, tmp_path, str(base), data(), tokenizer, **options)
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if "score" in name and p.requires_grad}
    trainer.train()
    assert before, "the head is not trained"
    now = dict(trainer.model.named_parameters())
    assert all(not torch.equal(now[name], value) for name, value in before.items())
    trainer.save_model()
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert check_model_card(card) == []
    assert card.data.pipeline_tag == "text-classification"
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    code = code.replace("path/to/run", str(tmp_path / "run")).replace("path/to/base", str(base))
    exec(code.replace(', device_map="auto"', ""), {})
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}], tokenize=False
    )
    with torch.no_grad():
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        expected = trainer.model.eval()(input_ids=ids).logits.item()
    assert float(capsys.readouterr().out.split()[-1]) == pytest.approx(expected, rel=1e-4)


def test_command_line_trains_the_head(tmp_path, tokenizer, capsys):
    model = tmp_path / "model"
    tiny.model("llama", tokenizer).save_pretrained(model)
    tokenizer.save_pretrained(model)
    data(ABSOLUTE).to_json(tmp_path / "pairs.jsonl")
    options = {
        "model_name_or_path": model, "dataset_name": tmp_path / "pairs.jsonl", "output_dir": tmp_path / "out", "max_steps": 2,
        "report_to": "none", "lora_target_modules": "all-linear", "absolute_coef": 0.5, "save_strategy": "no",
    }  # fmt: skip
    argv = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    assert run(["eurus-reward", *argv, "--use_peft"]) == 0
    assert "modules_to_save" in (tmp_path / "out" / "adapter_config.json").read_text()
    assert '"SEQ_CLS"' in (tmp_path / "out" / "adapter_config.json").read_text()
    assert "`absolute_coef` | `0.5`" in (tmp_path / "out" / "README.md").read_text()


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"absolute": [1] * 8}, {}, "row 0: column 'absolute' must hold true or false, found 1"),
        ({"absolute": [True] * 7 + [None]}, {}, "row 7: column 'absolute' must hold true or false, found None"),
        ({"margin": [0.1] * 7 + [math.nan]}, {}, "row 7: column 'margin' holds nan"),
        ({"margin": MARGINS}, {"relative_coef": 0.0}, "has a column 'margin', which belongs to the relative term"),
    ],
)
def test_wrong_columns(columns, settings, message, tmp_path, tokenizer):
    def attempt(dataset):
        make(EurusRewardTrainer, EurusRewardConfig, tmp_path, "no such model", dataset, tokenizer, **settings)

    with pytest.raises((ValueError, TypeError), match=message):
        attempt(data(**columns))
    ids = Dataset.from_list([{"chosen_ids": [5, 6], "rejected_ids": [7]}] * 8)
    for name, values in columns.items():
        ids = ids.add_column(name, values)
    with pytest.raises((ValueError, TypeError), match=message):
        attempt(ids)


def test_wrong_data_and_models(tmp_path, tokenizer):
    def attempt(model, dataset, **settings):
        return make(EurusRewardTrainer, EurusRewardConfig, tmp_path, model, dataset, tokenizer, **settings)

    with pytest.raises(ValueError, match="lacks the column 'rejected'"):
        attempt("no such model", data().remove_columns("rejected"))
    with pytest.raises(ValueError, match="is a LlamaForCausalLM, which has no reward head"):
        attempt(tiny.model("llama", tokenizer), data())
    with pytest.raises(ValueError, match="would leave the reward head as it was initialised"):
        attempt("no such model", data(), peft_config=LoraConfig(task_type="CAUSAL_LM"))
    for pairs in (data(), data().to_iterable_dataset()):
        with pytest.raises(ValueError, match="No row of the train dataset fits `max_length=2`"):
            attempt(tiny.reward_model(tokenizer), pairs, max_length=2)
    embeddings = LoraConfig(task_type="CAUSAL_LM", modules_to_save=["embed_tokens"])
    for model in ("no such model", tiny.reward_model(tokenizer)):
        with pytest.raises(ValueError, match=r"`modules_to_save=\['embed_tokens'\]`\) would leave the reward head"):
            attempt(model, data(), peft_config=embeddings)
    with pytest.raises(ValueError, match="leaves out 'absolute', which the loss reads"):
        collator = trl.trainer.reward_trainer.DataCollatorForPreference(pad_token_id=0)
        attempt(tiny.reward_model(tokenizer), data(ABSOLUTE), data_collator=collator)


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({}, False),
        ({"modules_to_save": ["embed_tokens"]}, False),
        ({"modules_to_save": ["score"]}, True),
        ({"task_type": "SEQ_CLS"}, True),
        ({"target_modules": ["q_proj", "score"]}, True),
    ],
)
def test_head_of_an_adapter_on_the_model(settings, trained, tmp_path, tokenizer):
    config = LoraConfig(**{"target_modules": ["q_proj"], "r": 2} | settings)
    model = get_peft_model(tiny.reward_model(tokenizer), config)
    arguments = (EurusRewardTrainer, EurusRewardConfig, tmp_path, model, data(), tokenizer)
    if trained:
        make(*arguments)
        return
    with pytest.raises(ValueError, match="No parameter of the reward head requires a gradient"):
        make(*arguments)


def test_a_new_adapter_saves_the_head_of_a_model_in_memory(tmp_path, tokenizer):
    config = LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["score"])
    arguments = (EurusRewardTrainer, EurusRewardConfig, tmp_path, tiny.reward_model(tokenizer), data(), tokenizer)
    assert (
        make(*arguments, peft_config=config)
        .model.base_model.model.score.modules_to_save["default"]
        .weight.requires_grad
    )


def test_frozen_head(tmp_path, tokenizer):
    model = tiny.reward_model(tokenizer)
    model.score.requires_grad_(False)
    with pytest.raises(ValueError, match="No parameter of the reward head requires a gradient"):
        make(EurusRewardTrainer, EurusRewardConfig, tmp_path, model, data(), tokenizer)


def test_predict(tmp_path, tokenizer):
    """Of texts, as `evaluate`; its metrics are not those of the next evaluation."""
    trainer = trainer_of(tmp_path, tokenizer, data(ABSOLUTE, MARGINS))
    expected = trainer.evaluate(data(ABSOLUTE, MARGINS))
    output = trainer.predict(data(ABSOLUTE, MARGINS))
    assert output.metrics["test_loss"] == pytest.approx(expected["eval_loss"])
    trainer.predict(data(ABSOLUTE).select(range(2)))
    again = trainer.evaluate(data(ABSOLUTE, MARGINS))
    assert again["eval_eurus/chosen_reward"] == pytest.approx(expected["eval_eurus/chosen_reward"])
    with pytest.raises(TypeError, match="`test_dataset`, row 0: column 'absolute' must hold true or false"):
        trainer.predict(data([1] * 8))


@pytest.mark.parametrize("form", ["torch", "numpy"])
@pytest.mark.parametrize("kind", ["text", "messages", "tokens"])
def test_formatted_data(kind, form, tmp_path, tokenizer):
    pairs = data() if kind == "text" else tiny.conversational_preference_data()
    pairs = pairs.add_column("absolute", ABSOLUTE).add_column("margin", MARGINS)
    trainer = trainer_of(tmp_path, tokenizer, pairs)
    expected = step_gradients(trainer)[0]
    if kind == "tokens":
        pairs = trainer.train_dataset.select_columns(["chosen_ids", "rejected_ids", "absolute", "margin"])
    pairs = pairs.with_format(form)
    trainer = trainer_of(tmp_path, tokenizer, pairs)
    assert step_gradients(trainer)[0] == expected
    assert math.isfinite(trainer.evaluate(pairs)["eval_loss"])
    assert math.isfinite(trainer.predict(pairs).metrics["test_loss"])


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ("Paris. ", None),
        (" ", "chosen is empty"),
        ([("user", "A?"), ("assistant", "B"), ("user", "C?"), ("assistant", "")], "chosen is empty"),
        ([("user", "A?"), ("assistant", "B")], None),
    ],
)
def test_empty_answers_behind_a_prompt_of_their_own(chosen, reason):
    if not isinstance(chosen, str):
        chosen = [{"role": role, "content": content} for role, content in chosen]
    rejected = "London." if isinstance(chosen, str) else [*chosen[:-1], {"role": "assistant", "content": "No."}]
    assert _why_dropped({"chosen": chosen, "rejected": rejected}, "<|end|>") == reason


def test_dropped_pairs(tmp_path, tokenizer, monkeypatch):
    messages = message_log(monkeypatch, checks)
    rows = data().to_list()
    rows[0]["rejected"] = rows[0]["chosen"]
    rows[3]["chosen"] = "  "
    rows[5]["rejected"] = "  "  # may well be a wrong answer
    trainer = trainer_of(tmp_path, tokenizer, Dataset.from_list(rows))
    assert len(trainer.train_dataset) == 6
    assert messages == ["Dropped 2 of 8 rows of the train dataset: 1 (chosen equals rejected), 1 (chosen is empty)."]
    stream = trainer_of(tmp_path, tokenizer, Dataset.from_list(rows).to_iterable_dataset())
    assert len(list(stream.train_dataset)) == 6
    conversations = tiny.conversational_preference_data().to_list()
    conversations[0]["chosen"][-1]["content"] = ""
    for row in conversations[4:]:  # the prompt within the responses
        row |= {kind: row["prompt"] + row[kind] for kind in ("chosen", "rejected")}
        del row["prompt"]
    conversations[5]["chosen"][-1]["content"] = " "
    for part in (conversations[:4], conversations[4:]):
        assert len(trainer_of(tmp_path, tokenizer, Dataset.from_list(part)).train_dataset) == 3
    tokens = Dataset.from_list([{"chosen_ids": [5, 6], "rejected_ids": ids} for ids in ([5, 6], [], [7])])
    assert len(trainer_of(tmp_path, tokenizer, tokens).train_dataset) == 1
    equal = Dataset.from_list([row | {"rejected": row["chosen"]} for row in rows])
    for pairs in (equal, equal.to_iterable_dataset()):
        with pytest.raises(ValueError, match="No row of the train dataset .* with responses that differ"):
            trainer_of(tmp_path, tokenizer, pairs)


def test_warnings(tmp_path, tokenizer, monkeypatch):
    messages, dropped = message_log(monkeypatch, eurus), message_log(monkeypatch, checks)
    trainer_of(tmp_path, tokenizer, data(), max_length=20, center_rewards_coefficient=0.1)
    assert "pulls the rewards of a pair to a mean of 0" in messages[0]
    assert re.match(r"Dropped \d of 8 rows of the train dataset", dropped[0])
    trainer_of(tmp_path, tokenizer, data())
    trainer_of(tmp_path, tokenizer, data(), center_rewards_coefficient=0.1, absolute_coef=0.0)
    assert len(messages) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"absolute_coef": -1.0}, "`absolute_coef=-1.0` is out of range"),
        ({"relative_coef": math.inf}, "`relative_coef=inf` is out of range"),
        ({"absolute_coef": 0, "relative_coef": 0}, "are both 0, so that nothing would be trained"),
    ],
)
def test_wrong_options(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        EurusRewardConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_losses_of_the_paper_that_trl_has(tmp_path, tokenizer):
    """NCA's number, by TRL's loss: -42 against -45, and -55 against -50."""
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(str(tmp_path), use_cpu=True, bf16=False, loss_type="nca_pair", beta=0.1, report_to="none")
    stored = data().add_column("ref_chosen_logps", [0.0] * 8).add_column("ref_rejected_logps", [0.0] * 8)
    model = tiny.model("llama", tokenizer)
    model.save_pretrained(tmp_path / "model")
    model.config._name_or_path = str(tmp_path / "model")
    trainer = DPOTrainer(model, args=config, train_dataset=stored.select([0]), processing_class=tokenizer)
    trainer.precompute_ref_logps = True
    inputs = trainer.data_collator([trainer.train_dataset[0]])
    with torch.no_grad():
        first = trainer.compute_loss(trainer.model, dict(inputs)).item()
        metrics = trainer._metrics["eval" if not trainer.model.training else "train"]
        logps = [metrics[f"logps/{kind}"][-1] for kind in ("chosen", "rejected")]
        inputs |= {"ref_chosen_logps": tensor([logps[0] - 3]), "ref_rejected_logps": tensor([logps[1] + 5])}
        loss = trainer.compute_loss(trainer.model, inputs).item()
    assert first != pytest.approx(loss)
    assert loss == pytest.approx(1.2185713588, rel=1e-5)
