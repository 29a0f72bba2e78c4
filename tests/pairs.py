"""What the tests of TPO and MPO share: runs, gradients of optimizer steps, and log-probs computed independently."""

import copy
from dataclasses import fields

import tiny
import torch
from datasets import Dataset
from transformers import TrainerCallback


ARGUMENTS = (
    "eval_dataset", "peft_config", "quantization_config", "callbacks", "data_collator", "compute_metrics", "reg_dataset",
    "pretrain_dataset",
)  # fmt: skip


class Gradients(TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
        self.steps.append({name: grad.clone() for name, grad in named.items() if grad is not None})


def make(cls, config_class, tmp_path, model, data, tokenizer, **settings):
    """A trainer of TRL or ours with settings that suit the tests; arguments of the trainer stand among the options."""
    arguments = {name: settings.pop(name) for name in ARGUMENTS if name in settings}
    options = {
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 2,
        "max_grad_norm": 1e9,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "disable_dropout": True,
    }
    known = {field.name for field in fields(config_class)}
    options = {name: value for name, value in options.items() if name in known} | settings
    return cls(model=model, args=config_class(**options), train_dataset=data, processing_class=tokenizer, **arguments)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_and_gradients(trainer):
    """Of the trainer's first micro-batch."""
    trainer.model.train()
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    loss.backward()
    return loss.item(), gradients(trainer.model)


def step_gradients(trainer):
    """Logged losses and gradients of all optimizer steps of a training run."""
    callback = Gradients()
    trainer.add_callback(callback)
    trainer.train()
    return [entry["loss"] for entry in logs(trainer)], callback.steps


def logs(trainer):
    """What was logged at every step."""
    skip = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}
    return [
        {key: value for key, value in entry.items() if key not in skip}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def double(model):
    """A float64 twin of a model, with the plain forward of its class."""
    config = copy.deepcopy(model.config)
    config._experts_implementation = "eager"  # the grouped kernel has no float64
    twin = type(model)(config).double()
    twin.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    return twin.train()


def response_ids(tokenizer, response, eos=True):
    return tokenizer(response)["input_ids"] + [tokenizer.eos_token_id] * eos


def token_logps(model, tokenizer, prompt, response):
    """Log-probs of the tokens of a response (text, or token ids), from all logits of one unpadded sequence."""
    prompt_ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
    ids = response_ids(tokenizer, response) if isinstance(response, str) else response
    logits = model(input_ids=torch.tensor([[*prompt_ids, *ids]]), use_cache=False).logits[0, -len(ids) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]


def difference(found, expected):
    """Norm of the difference of two sets of gradients, relative to the norm of the second."""
    assert found.keys() == expected.keys()
    distance = sum((found[name].double() - value.double()).pow(2).sum() for name, value in expected.items())
    return (distance / sum(value.double().pow(2).sum() for value in expected.values())).sqrt().item()


def message_log(monkeypatch, module, method="warning"):
    """Collect what a module's logger is told."""
    messages = []
    monkeypatch.setattr(module.logger, method, lambda message, *args, **kwargs: messages.append(message))
    return messages


# ---------------------------------------------------------------- data

# Gold responses of so many tokens, with the end of sequence
GOLD_LENGTHS = (3, 30, 5, 20)


def letters(number):
    """A text of `number` tokens: letters that no question has are never merged."""
    return " " + "".join("ZQXVJ"[i % 5] for i in range(number - 1))


def uneven_triples():
    """Four triples with gold responses of very different lengths."""
    rows = tiny.triple_data().to_list()[: len(GOLD_LENGTHS)]
    return Dataset.from_list(
        [row | {"reference": letters(length - 1)} for row, length in zip(rows, GOLD_LENGTHS, strict=True)]
    )


def anchored(number=8, **columns):
    """Pairs with log-probs of a reference that is not the policy."""
    rows = tiny.preference_data().to_list()[:number]
    for index, row in enumerate(rows):
        row |= {"ref_chosen_logps": -60.0 - 7 * index, "ref_rejected_logps": -80.0 + 9 * index}
        row |= {name: values[index] for name, values in columns.items()}
    return Dataset.from_list(rows)


def lists(sizes=(4,) * 8):
    """Rows of so many completions, with rewards that are not in their order."""
    words = (" I think so.", " ZQ", " Perhaps it is, perhaps not.", " No.")
    rows = []
    for index, size in enumerate(sizes):
        question, answer = tiny.QUESTIONS[index]
        completions = [words[(index + k) % 4] for k in range(size - 1)]
        completions.insert(index % size, f" {answer}")
        rewards = [0.4 * ((7 * k + 3 * index) % 5) - 0.1 * k for k in range(size)]
        rows.append({"prompt": question, "completions": completions, "rewards": rewards})
    return Dataset.from_list(rows)


def samples(number=4, **columns):
    """Samples of different lengths, as text."""
    lengths = (3, 20, 5, 9, 2, 12, 7, 4)[:number]
    rows = [
        {"prompt": question, "completion": letters(length)}
        for (question, _), length in zip(tiny.QUESTIONS[:number], lengths, strict=True)
    ]
    return Dataset.from_list(
        [row | {name: values[index] for name, values in columns.items()} for index, row in enumerate(rows)]
    )


def texts():
    return Dataset.from_list([{"text": f"{question} {answer}"} for question, answer in tiny.QUESTIONS[-4:]])
