"""Tiny tokenizers, models and datasets, built from configs with fixed seeds: no downloads."""

import importlib.resources
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast


needs_activation_checkpointing = pytest.mark.skipif(
    not hasattr(transformers.TrainingArguments, "activation_checkpointing"), reason="an option of newer transformers"
)
QUESTIONS = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many legs has a spider?", "Eight."),
    ("Name a colour.", "Blue is a colour, and so is green."),
    ("What comes after Monday?", "Tuesday."),
    ("Is water wet?", "Yes, water is wet."),
    ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet around the year 1600."),
    ("What is two plus two?", "Four."),
    ("Where do fish live?", "Fish live in water: in rivers, lakes and seas."),
]


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on `QUESTIONS`, with Qwen2.5's chat template."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([text for pair in QUESTIONS for text in pair], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|pad|>")
    template = importlib.resources.files("trl") / "chat_templates" / "qwen2_5.jinja"
    fast.chat_template = template.read_text()
    return fast


_COMMON = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": False}),
    "llama-tied": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True}),
    "gemma": ("Gemma", {"num_key_value_heads": 1, "head_dim": 8}),  # embeddings scaled by sqrt(hidden size)
    "gemma2": ("Gemma2", {"num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 5.0}),
    "gpt-neox": ("GPTNeoX", {"tie_word_embeddings": False}),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "num_key_value_heads": 1,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "router_aux_loss_coef": 0.01,
        },
    ),
}
FAMILIES = tuple(_FAMILIES)


def model(
    family: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0, head: str = "CausalLM", **overrides: Any
) -> PreTrainedModel:
    """A tiny model of the family, float32, Xavier-initialised (at this width the default 0.02 would kill gradients)."""
    name, options = _FAMILIES[family]
    options = _COMMON | options | overrides
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        **options,
    )
    created = getattr(transformers, f"{name}For{head}")(config)
    for parameter in created.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.xavier_uniform_(parameter)
    return created.eval()


def reward_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> PreTrainedModel:
    """A tiny reward model: a Llama with one output."""
    return model("llama", tokenizer, seed, head="SequenceClassification", num_labels=1)


def text_data() -> Dataset:
    return Dataset.from_list([{"text": f"{question} {answer}"} for question, answer in QUESTIONS])


def prompt_completion_data() -> Dataset:
    return Dataset.from_list([{"prompt": question, "completion": f" {answer}"} for question, answer in QUESTIONS])


def messages_data() -> Dataset:
    return Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
            for question, answer in QUESTIONS
        ]
    )


def conversational_data() -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": answer}],
            }
            for question, answer in QUESTIONS
        ]
    )


def tokenized_data(tokenizer: PreTrainedTokenizerFast) -> Dataset:
    rows = []
    for question, answer in QUESTIONS:
        prompt = tokenizer(question)["input_ids"]
        answer_ids = [*tokenizer(f" {answer}")["input_ids"], tokenizer.eos_token_id]
        rows.append({"input_ids": prompt + answer_ids, "labels": [-100] * len(prompt) + answer_ids})
    return Dataset.from_list(rows)


# Rejected answers to `QUESTIONS`, shorter and longer than the chosen ones
REJECTED = [
    "London.",
    "A spider has no legs at all, I think.",
    "Seven.",
    "It is hard to say.",
    "No.",
    "I do not know who wrote it.",
    "Two plus two is twenty-two.",
    "In trees.",
]


def preference_data() -> Dataset:
    """Pairs with a prompt, strings."""
    return Dataset.from_list(
        [
            {"prompt": question, "chosen": f" {answer}", "rejected": f" {rejected}"}
            for (question, answer), rejected in zip(QUESTIONS, REJECTED, strict=True)
        ]
    )


def implicit_preference_data() -> Dataset:
    """Pairs without a prompt column: both responses repeat it."""
    return Dataset.from_list(
        [
            {"chosen": f"{question} {answer}", "rejected": f"{question} {rejected}"}
            for (question, answer), rejected in zip(QUESTIONS, REJECTED, strict=True)
        ]
    )


def conversational_preference_data() -> Dataset:
    """Pairs of messages."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": question}],
                "chosen": [{"role": "assistant", "content": answer}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
            for (question, answer), rejected in zip(QUESTIONS, REJECTED, strict=True)
        ]
    )


# Gold answers to `QUESTIONS`, some much longer and some much shorter than chosen and rejected
GOLD = [
    "Paris.",
    "A spider has eight legs; an insect has six, and a centipede may have more than a hundred.",
    "Red.",
    "Tuesday comes after Monday, and after it come Wednesday, Thursday, Friday and Saturday.",
    "It is.",
    "Shakespeare.",
    "Two plus two is four.",
    "In water.",
]


def triple_data() -> Dataset:
    """Pairs with a gold response in the column `reference`, strings."""
    return preference_data().add_column("reference", [f" {gold}" for gold in GOLD])


def implicit_triple_data() -> Dataset:
    """Triples without a prompt column."""
    golds = [f"{question} {gold}" for (question, _), gold in zip(QUESTIONS, GOLD, strict=True)]
    return implicit_preference_data().add_column("reference", golds)


def conversational_triple_data() -> Dataset:
    """Triples of messages."""
    golds = [[{"role": "assistant", "content": gold}] for gold in GOLD]
    return conversational_preference_data().add_column("reference", golds)
