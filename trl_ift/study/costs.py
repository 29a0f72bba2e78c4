"""What a study will cost: tokens by counting, time by two steps of each method."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback

from ..data.shards import write_file
from ..stages import as_json, free_memory, say, training_settings
from .measures import digest_of
from .methods import SEQUENCES, training_rows
from .plan import Arm, Study
from .run import count_tokens, device_name, is_finished, make_trainer


class _StepTimes(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.monotonic()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.monotonic() - self.began)


def measure_costs(study: Study) -> dict[str, dict[str, float]]:
    """
    Train two steps of each method; return its `step_seconds` (of the second) and `step_tokens`.

    On the first start, as it is. Answers that a start would have to sample first are stood in for by the rejected ones. Kept
    in `costs.json` of the study's folder, and measured again only where options or device have changed.
    """
    path = study.output_dir / "costs.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    costs = {}
    for label, arm in study.arms.items():
        config = study.config(arm, max(study.sizes), study.seeds[0], "unused")
        config.max_steps = 2
        peft = study.peft_config()
        model = [study.model_options, None if peft is None else as_json(peft.to_dict())]
        key = digest_of([as_json(training_settings(config)), next(iter(study.starts)), device_name(), model])
        if known.get(label, {}).get("key") != key:
            say(f"Measuring two steps of {label}")
            known[label] = {"key": key} | _two_steps(study, arm, config)
            study.output_dir.mkdir(parents=True, exist_ok=True)
            write_file(path, json.dumps(known, indent=2).encode())
        costs[label] = known[label]
    return costs


def _two_steps(study: Study, arm: Arm, config: Any) -> dict[str, float]:
    start = next(iter(study.starts.values()))
    rows = study.rows_of(start, max(study.sizes), study.seeds[0])[: 4 * study.batch_pairs(arm)]
    kind = arm.method.kind
    more: dict[str, Any] = {}
    data = training_rows("pairs" if kind in ("samples", "self-play") else kind, rows, study.batch_pairs(arm), 0)
    if kind == "samples" and getattr(config, "reg_weight", True):
        samples = [{"prompt": row["prompt"], "completion": row["rejected"]} for row in rows]
        more["reg_dataset"] = Dataset.from_list(samples)
    if arm.method.name == "ld-align":
        data = data.add_column("weight", [1.0] * len(data))
    times = _StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        config.output_dir = folder
        trainer = make_trainer(study, start, arm.method, start.model, config, data, **more)
        trainer.add_callback(times)
        trainer.train()
        tokens = count_tokens(trainer) / max(trainer.state.global_step, 1)
    del trainer
    free_memory()
    return {"step_seconds": times.seconds[-1], "step_tokens": tokens}


def describe_plan(study: Study, measure: bool = True) -> str:
    """The grid, its cost and what is shared, as text for a terminal."""
    cells = study.cells()
    todo = [cell for cell in cells if not is_finished(study, cell)]
    starts = [cell for cell in cells if cell.arm is None]
    lines = [
        f"{study.name}: {len(study.starts)} starts x {len(study.arms)} methods x {len(study.sizes)} sizes x "
        f"{len(study.seeds)} seeds = {len(cells) - len(starts)} cells, and {len(starts)} untrained starts. "
        f"{len(cells) - len(todo)} are finished.",
        "",
    ]
    costs = measure_costs(study) if measure else {}
    head = ["method", "trains on", "steps", "sequences", *(["tokens", "s a step", "time"] if measure else [])]
    table, total_seconds, total_tokens = [head], 0.0, 0.0
    for label, arm in study.arms.items():
        left = [cell for cell in todo if cell.arm is arm]
        steps = [study.steps(arm, size) for size in sorted(study.sizes)]
        batch = study.batch_pairs(arm) * {**study.training, **arm.options}.get("gradient_accumulation_steps", 1)
        counts = [str(n * batch * SEQUENCES[arm.method.kind]) for n in steps]
        row = [label, arm.method.kind, " / ".join(map(str, steps)), " / ".join(counts)]
        if measure:
            taken = sum(study.steps(arm, cell.size) for cell in left)
            seconds, tokens = taken * costs[label]["step_seconds"], taken * costs[label]["step_tokens"]
            total_seconds, total_tokens = total_seconds + seconds, total_tokens + tokens
            row += [f"{tokens:,.0f}", f"{costs[label]['step_seconds']:.2f}", _duration(seconds)]
        table.append(row)
    lines += _aligned(table)
    lines.append("")
    if measure:
        lines.append(
            f"Still to train: {total_tokens:,.0f} tokens, about {_duration(total_seconds)} (without sampling and SFT)."
        )
        lines.append(_evaluation_cost(study, len(todo)))
    lines += _shared(study)
    return "\n".join(lines)


def _evaluation_cost(study: Study, cells: int) -> str:
    seconds = []
    for path in sorted(study.output_dir.glob("cells/*/cell.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        seconds.append(record["evaluation_seconds"])
    if not seconds:
        return "The evaluation of a cell is measured by the first one that is finished."
    mean = sum(seconds) / len(seconds)
    return f"Evaluation: {_duration(mean)} a cell, about {_duration(mean * cells)} for {cells} cells."


def _shared(study: Study) -> list[str]:
    """What is computed once for several cells."""
    each = len(study.arms) * len(study.sizes)
    lines = []
    for start in study.starts.values():
        if start.sft is not None:
            rows = len(study.sft_subset(start, study.seeds[0]))
            lines.append(
                f"Shared: the start '{start.name}' is fine-tuned on {rows} rows once a seed, for {each} cells each."
            )
    sampling = [label for label, arm in study.arms.items() if arm.method.kind in ("samples", "self-play")]
    if sampling:
        lines.append(
            f"Shared: {max(study.sizes)} answers of each start, once a seed, for {', '.join(sampling)} at all sizes."
        )
    lines.append(f"Shared: the scores of each start on the held-out data, for {each} cells each.")
    return lines


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return [rows[0], "  ".join("-" * width for width in widths), *rows[1:]]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def results_file(study: Study) -> Path:
    """Where the results of a study are."""
    return study.output_dir / "results.json"
