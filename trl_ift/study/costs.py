"""What a study will cost: tokens by counting, time by two steps of each method and a few sampled answers."""

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers import TrainerCallback

from ..data.generation import generate_completions
from ..data.shards import write_file
from ..data.token_weights import unit_weights
from ..registry import Method
from ..stages import as_json, free_memory, say, training_settings
from .measures import digest_of
from .methods import SEQUENCES, as_chat, get_study_method, options_of, training_rows
from .plan import Arm, Cell, Start, Study
from .run import cell_folder, count_tokens, device_name, is_finished, load_trained, make_trainer


_SAMPLED = 8  # answers that are timed
Cost = dict[str, float]


class _StepTimes(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.monotonic()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.monotonic() - self.began)


# ---------------------------------------------------------------- measuring


def measure_costs(study: Study, start: Start | None = None) -> dict[str, Cost]:
    """
    Train two steps of each method; return its `step_seconds` (of the second) and `step_tokens`.

    Kept in `costs.json` of the study's folder, and measured again only where options, model, rows or device have changed.
    Answers that a start would have to sample first are stood in for by the rejected ones.

    Args:
        study: The study.
        start: The start whose model is trained, without its SFT; the first by default.
    """
    start = _untrained(start or next(iter(study.starts.values())))
    costs = {}
    for label, arm in study.arms.items():
        config = _trial(study.config(arm, max(study.sizes), study.seeds[0], "unused"))
        data, more = _arm_data(study, start, arm, config)
        what = f"two steps of {label}" + _on_model(study, start)
        costs[label] = _measured(study, start, what, arm.method, config, data, more)
    return costs


def measure_sft(study: Study, start: Start) -> Cost:
    """`step_seconds` and `step_tokens` of the SFT of a start."""
    seed = study.seeds[0]
    config = _trial(study.sft_config(start, seed, "unused"))
    rows = study.sft_subset(start, seed)
    data = _rows_of_two_steps(Dataset.from_list([as_chat(row) if start.chat else row for row in rows]), config)
    what = f"two steps of the SFT of the start '{start.name}'"
    return _measured(study, _untrained(start), what, get_study_method("sft"), config, data, {})


def measure_sampling(study: Study, start: Start) -> Cost:
    """`answer_seconds`: seconds for one answer of a few that a start samples to training prompts, in one batch."""
    start = _untrained(start)
    rows = study.rows_of(start, max(study.sizes), study.seeds[0])[:_SAMPLED]
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in rows])

    def measure() -> Cost:
        model, tokenizer = load_trained(study, start, start.model, None)
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            generate_completions(model, prompts, folder, processing_class=tokenizer, **study.samples)
            seconds = time.monotonic() - began
        del model
        free_memory()
        return {"answer_seconds": seconds / len(prompts)}

    key = ["sampling", _model_key(study, start), study.samples, prompts.to_list()]
    return _cached(study, key, f"{len(prompts)} sampled answers" + _on_model(study, start), measure)


def _measured(
    study: Study, start: Start, what: str, method: Method, config: Any, data: Dataset, more: dict[str, Any]
) -> Cost:
    used = [data.to_list(), {name: value.to_list() for name, value in more.items()}]
    key = [method.name, as_json(training_settings(config)), _model_key(study, start), digest_of(used)]
    return _cached(study, key, what, lambda: _two_steps(study, start, method, config, data, more))


def _cached(study: Study, content: Any, what: str, measure: Callable[[], Cost]) -> Cost:
    """What `costs.json` holds for a key, measured if it does not."""
    path, key = study.output_dir / "costs.json", digest_of(content)
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if key not in known:
        say(f"Measuring {what}")
        known[key] = {"what": what, **measure()}
        study.output_dir.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(known, indent=2).encode())
    return {name: value for name, value in known[key].items() if name != "what"}


def _two_steps(study: Study, start: Start, method: Method, config: Any, data: Dataset, more: dict[str, Any]) -> Cost:
    times = _StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        config.output_dir = folder
        trainer = make_trainer(study, start, method, start.model, config, data, **more)
        trainer.add_callback(times)
        trainer.train()
        tokens = count_tokens(trainer) / max(trainer.state.global_step, 1)
    del trainer
    free_memory()
    return {"step_seconds": times.seconds[-1], "step_tokens": tokens}


def _trial(config: Any) -> Any:
    """The config for two steps that leave nothing behind: no trackers, no checkpoints, nothing on the Hub."""
    config.max_steps, config.report_to = 2, []
    config.save_strategy, config.load_best_model_at_end, config.push_to_hub = "no", False, False
    return config


def _arm_data(study: Study, start: Start, arm: Arm, config: Any) -> tuple[Dataset, dict[str, Any]]:
    rows, kind = study.rows_of(start, max(study.sizes), study.seeds[0]), arm.method.kind
    is_sampled = kind in ("samples", "self-play")
    data = training_rows("pairs" if is_sampled else kind, rows, study.batch_pairs(arm), study.seeds[0])
    data = _rows_of_two_steps(data, config)
    more: dict[str, Any] = {}
    if kind == "samples" and _needs_samples(arm, config):
        samples = [{"prompt": row["prompt"], "completion": row["rejected"]} for row in data]
        more["reg_dataset"] = Dataset.from_list(samples)
    if kind == "weighted":
        tokenizer = study.tokenizers[start.name]
        data = data.map(unit_weights, fn_kwargs={"tokenizer": tokenizer})
    if arm.method.name == "ld-align":
        data = data.add_column("weight", [1.0] * len(data))
    return data, more


def _rows_of_two_steps(data: Dataset, config: Any) -> Dataset:
    """As many rows as two whole steps take, repeated where there are fewer: a short last step would take less time."""
    wanted = 2 * config.per_device_train_batch_size * config.gradient_accumulation_steps
    copies = -(-wanted // len(data))
    return concatenate_datasets([data] * copies).select(range(wanted))


def _needs_samples(arm: Arm, config: Any) -> bool:
    """Whether the start has to sample answers for a method."""
    return arm.method.kind == "self-play" or (arm.method.kind == "samples" and bool(getattr(config, "reg_weight", 1)))


def _untrained(start: Start) -> Start:
    """The start as the model that it is made of: its SFT changes neither size nor speed."""
    return replace(start, sft=None)


def _model_key(study: Study, start: Start) -> str:
    """Digest of the model, of how it is loaded and shown its data, of its adapter and of the device."""
    peft = study.peft_config()
    adapter = None if peft is None else as_json(peft.to_dict())
    return digest_of([study.start_key(_untrained(start), None), adapter, device_name()])


def _on_model(study: Study, start: Start) -> str:
    return f" on the model of the start '{start.name}'" if len(study.starts) > 1 else ""


# ---------------------------------------------------------------- the plan


def describe_plan(study: Study, measure: bool = True) -> str:
    """The grid, its cost and what is shared, as text for a terminal."""
    cells = study.cells()
    todo = [cell for cell in cells if not is_finished(study, cell)]
    starts = [cell for cell in cells if cell.arm is None]
    untrained = [cell for cell in todo if cell.arm and not (cell_folder(study, cell) / "train.json").is_file()]
    lines = [
        f"{study.name}: {len(study.starts)} starts x {len(study.arms)} methods x {len(study.sizes)} sizes x "
        f"{len(study.seeds)} seeds = {len(cells) - len(starts)} cells, and {len(starts)} untrained starts. "
        f"{len(cells) - len(todo)} are finished.",
        "",
    ]
    # Starts of one model share its costs
    models = {start.name: _model_key(study, start) for start in study.starts.values()}
    first: dict[str, Start] = {}
    for start in study.starts.values():
        first.setdefault(models[start.name], start)
    costs = {model: measure_costs(study, start) for model, start in first.items()} if measure else {}
    head = ["method", "trains on", "steps", "sequences", *(["tokens", "s a step", "time"] if measure else [])]
    table, total_seconds, total_tokens = [head], 0.0, 0.0
    for label, arm in study.arms.items():
        steps = [study.steps(arm, size) for size in sorted(study.sizes)]
        options = {**study.training, **options_of(arm.method), **arm.options}
        batch = study.batch_pairs(arm) * options.get("gradient_accumulation_steps", 1)
        counts = [str(n * batch * SEQUENCES[arm.method.kind]) for n in steps]
        row = [label, arm.method.kind, " / ".join(map(str, steps)), " / ".join(counts)]
        if measure:
            taken = Counter[str]()
            for cell in untrained:
                if cell.arm is arm:
                    taken[models[cell.start.name]] += study.steps(arm, cell.size)
            seconds = sum(n * costs[model][label]["step_seconds"] for model, n in taken.items())
            tokens = sum(n * costs[model][label]["step_tokens"] for model, n in taken.items())
            total_seconds, total_tokens = total_seconds + seconds, total_tokens + tokens
            each = " / ".join(f"{costs[model][label]['step_seconds']:.2f}" for model in first)
            row += [f"{tokens:,.0f}", each, _duration(seconds)]
        table.append(row)
    lines += _aligned(table)
    if measure and len(first) > 1:
        lines.append(f"(s a step: with the model of {' / '.join(start.name for start in first.values())})")
    lines.append("")
    if measure:
        sft_seconds, sft = _sft_cost(study, todo)
        sample_seconds, sampled = _sampling_cost(study, untrained)
        evaluation_seconds, evaluation = _evaluation_cost(study, todo)
        lines.append(
            f"Still to train: {len(untrained)} cells, {total_tokens:,.0f} tokens, about {_duration(total_seconds)}."
        )
        lines += [*sft, *sampled, evaluation]
        whole = total_seconds + sft_seconds + sample_seconds + (evaluation_seconds or 0.0)
        without = " (without the evaluation)" if evaluation_seconds is None else ""
        lines.append(
            f"Together: about {_duration(whole)}{without}. Not counted: loading models, scores of starts and references."
        )
    lines += _shared(study)
    return "\n".join(lines)


def _sft_cost(study: Study, todo: list[Cell]) -> tuple[float, list[str]]:
    """Seconds for the SFT of starts that cells still wait for."""
    seconds, missing = 0.0, 0
    for start, seed in _sft_runs(study):
        waiting = any(cell.start is start and cell.seed == seed for cell in todo)
        if waiting and not _has_sft(study, start, seed):
            missing += 1
            seconds += study.sft_config(start, seed, "unused").max_steps * measure_sft(study, start)["step_seconds"]
    return seconds, [f"SFT of starts: {missing} still to do, about {_duration(seconds)}."] if missing else []


def _sampling_cost(study: Study, untrained: list[Cell]) -> tuple[float, list[str]]:
    """Seconds for the answers that starts have to sample before cells can be trained."""
    wanted: dict[tuple[str, int], int] = {}
    for cell in untrained:
        if cell.arm is None or cell.seed is None:
            continue
        if _needs_samples(cell.arm, study.config(cell.arm, cell.size, cell.seed, "unused")):
            place = (cell.start.name, cell.seed)
            wanted[place] = max(wanted.get(place, 0), cell.size)
    seconds, answers = 0.0, 0
    for (name, seed), number in wanted.items():
        start = study.starts[name]
        if (left := max(0, number - _sampled(study, start, seed))) > 0:
            answers += left
            seconds += left * measure_sampling(study, start)["answer_seconds"]
    if not answers:
        return 0.0, []
    text = f"Answers to sample: {answers:,}, at most about {_duration(seconds)} (timed in a batch of {_SAMPLED})."
    return seconds, [text]


def _evaluation_cost(study: Study, todo: list[Cell]) -> tuple[float | None, str]:
    """Seconds for the evaluation of cells, by those of the same start that are finished, or else of any."""
    taken: dict[str, list[float]] = {}
    for cell in study.cells():
        path = cell_folder(study, cell) / "cell.json"
        if path.is_file():
            seconds = json.loads(path.read_text(encoding="utf-8")).get("evaluation_seconds")
            if seconds is not None:
                taken.setdefault(cell.start.name, []).append(seconds)
    if not taken:
        return None, "The evaluation of a cell is measured by the first one that is finished."
    everywhere = [value for values in taken.values() for value in values]
    means = {name: sum(values) / len(values) for name, values in taken.items()}
    mean = sum(everywhere) / len(everywhere)
    total = sum(means.get(cell.start.name, mean) for cell in todo)
    return total, f"Evaluation: {_duration(mean)} a cell, about {_duration(total)} for {len(todo)} cells."


# ---------------------------------------------------------------- what is shared


def _stages(study: Study) -> dict[str, list[dict[str, Any]]]:
    """The records of the finished stages, by their kind."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(study.output_dir.glob("stages/*/stage.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(path.parent.name.rpartition("-")[0], []).append(record)
    return found


def _sft_runs(study: Study) -> list[tuple[Start, int]]:
    return [(start, seed) for start, seed in study.start_runs() if seed is not None]


def _has_sft(study: Study, start: Start, seed: int) -> bool:
    return (study.output_dir / "stages" / f"sft-{study.start_key(start, seed)}" / "stage.json").is_file()


def _sampled(study: Study, start: Start, seed: int) -> int:
    """Answers of a start that are there already."""
    key = study.start_key_of(start, seed)
    records = [
        record
        for record in _stages(study).get("samples", [])
        if (record["start"], record["seed"]) == (start.name, seed)
        and record.get("start_key", key) == key
        and record.get("samples", study.samples) == study.samples
    ]
    return sum(record["prompts"] for record in records)


def _shared(study: Study) -> list[str]:
    """What is computed once for several cells, and which of it is there."""
    each = len(study.arms) * len(study.sizes)
    lines = []
    for start in study.starts.values():
        if start.sft is not None:
            rows = len(study.sft_subset(start, study.seeds[0]))
            done = sum(_has_sft(study, start, seed) for seed in study.seeds)
            lines.append(
                f"Shared: the start '{start.name}' is fine-tuned on {rows} rows once a seed, for {each} cells each; "
                f"{done} of {len(study.seeds)} are there."
            )
    sampling = [
        label
        for label, arm in study.arms.items()
        if _needs_samples(arm, study.config(arm, max(study.sizes), study.seeds[0], "unused"))
    ]
    if sampling:
        lines.append(
            f"Shared: {max(study.sizes)} answers of each start, once a seed, for {', '.join(sampling)} at all sizes."
        )
    lines.append(f"Shared: the scores of each start on the held-out data, for {each} cells each.")
    if stages := _stages(study):
        counts = ", ".join(f"{len(records)} x {kind}" for kind, records in stages.items())
        lines.append(f"Shared results that are there, of earlier settings too: {counts}.")
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
