"""A tiny study in a folder: models, data, settings."""

import json
from pathlib import Path
from typing import Any

import tiny


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_rows(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write_inputs(folder: Path, tokenizer: Any) -> dict[str, str]:
    """Write a model and all data into a folder; return their paths by name."""
    tiny.model("llama", tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = []
    for i in range(36):
        question, answer = tiny.QUESTIONS[i % 8]
        rows.append(
            {
                "prompt": f"{i}: {question}",
                "chosen": f" {answer}",
                "rejected": f" No idea about {i}",
                "reference": f" {answer} Yes.",
            }
        )
    return {
        "model": str(folder / "model"),
        "train": write_rows(folder / "train.jsonl", rows[:26]),
        "test": write_rows(folder / "test.jsonl", rows[26:]),
        "sft": write_rows(folder / "sft.jsonl", [{"prompt": f"Say {i}:", "completion": f" {i}."} for i in range(12)]),
        "neutral": write_rows(
            folder / "neutral.jsonl", [{"text": f"The sea is wide and blue {i}."} for i in range(5)]
        ),
        "task": write_rows(folder / "task.jsonl", [{"question": f"{i}+1=", "answer": str(i + 1)} for i in range(4)]),
    }


def settings(inputs: dict[str, str], output_dir: Path | str, **changes: Any) -> dict[str, Any]:
    """The settings of a study of two starts and three methods; `changes` replace whole sections."""
    return {
        "name": "tiny",
        "output_dir": str(output_dir),
        "starts": {"plain": {"model": inputs["model"]}, "sft": {"model": inputs["model"], "sft": {"rows": 8}}},
        "data": {name: inputs[name] for name in ("train", "test", "sft")},
        "methods": ["sft", "dpo", "kto"],
        "sizes": [8, 16],
        "seeds": [0],
        "training": {
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "max_length": 128,
            "bf16": False,
        },
        "peft": {"r": 4},
        "samples": {"max_new_tokens": 6},
        "evaluation": {
            "pairs": {"rows": 8},
            "kl": {"rows": 6, "max_new_tokens": 6},
            "answers": {"rows": 4, "max_new_tokens": 6},
            "neutral": {"data": inputs["neutral"]},
            "tasks": [{"name": "add", "data": inputs["task"], "max_new_tokens": 4}],
        },
    } | changes
