"""Running a study: stages that cells share, the cells, executors, and the results of it all.

    OUTPUT_DIR/
      study.json               the settings of the last run
      stages/sft-KEY/          a start that was fine-tuned before, with its model
      stages/heldout-KEY/      scores of a start on the held-out data, and its samples
      stages/reference-KEY/    reference log-probabilities of training pairs
      stages/samples-KEY/      answers of a start to training prompts
      cells/ID/                one training: model or adapter, cell.json, evaluation/, answers
      results.json             all of it, for `trl-ift study report`

A stage is finished when its `stage.json` is there, a cell when its `cell.json` is. Both are written last. Several processes may
run the same study at the same time: each takes what no other has taken.
"""

import inspect
import json
import math
import os
import platform
import shlex
import shutil
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from filelock import FileLock, Timeout
from transformers import AutoTokenizer, PrinterCallback, ProgressCallback, TrainerCallback

from ..checks import check_choice
from ..data.generation import generate_completions, load_completions
from ..data.inference import load_model, load_tokenizer
from ..data.shards import write_file
from ..hub.card import library_versions
from ..preference.trainer import PreferenceConfig, prompt_and_response_ids
from ..redaction import redacted
from ..stages import as_json, free_memory, last_checkpoint, say, train_and_save, training_settings
from .evaluate import PARTS, StartScores, evaluate_part, measures_to_json, score_start
from .measures import Measure, digest_of
from .methods import SEQUENCES, as_chat, get_study_method, options_of, training_rows
from .plan import Arm, Cell, Start, Study, StudyError


EXECUTORS = ("in-process", "ray")


def run_study(
    study: Study,
    cells: Sequence[str] | None = None,
    executor: str = "in-process",
    num_workers: int = 2,
) -> dict[str, Any]:
    """
    Train and evaluate what is missing of a study, and write `results.json`.

    A cell that fails is reported, and the others are run; it is tried again by the next call.

    Args:
        study: The study.
        cells: Ids of the cells to run; all by default.
        executor: `"in-process"`, one after another, or `"ray"`: tasks of a Ray cluster, or of this machine.
        num_workers: Cells that Ray runs at a time on this machine.

    Returns:
        What `results.json` holds.

    Raises:
        StudyError, ValueError, TypeError, ImportError, OSError: Something in the study is wrong.
    """
    check_choice("executor", executor, EXECUTORS)
    study.check()
    _check_ids(study, cells)
    wanted = [cell for cell in study.cells() if cells is None or cell.id in cells]
    study.output_dir.mkdir(parents=True, exist_ok=True)
    write_file(study.output_dir / "study.json", json.dumps(as_json(study.settings), indent=2).encode())
    missing = [cell for cell in wanted if not is_finished(study, cell)]
    say(f"{len(wanted)} cells, {len(wanted) - len(missing)} of them finished already.")
    try:
        if executor == "ray":
            _run_with_ray(study, missing, num_workers)
        else:
            _run_in_process(study, missing)
    except KeyboardInterrupt:
        say(f"\nInterrupted. What is finished is kept in {study.output_dir}; to go on, run the same again.")
        raise
    return write_results(study)


def _check_ids(study: Study, cells: Sequence[str] | None) -> None:
    known = {cell.id for cell in study.cells()}
    if unknown := [cell for cell in cells or [] if cell not in known]:
        raise ValueError(f"The study has no cell {unknown[0]!r}. `trl-ift study plan --list` lists the cells.")


def print_commands(study: Study, file: str, cells: Sequence[str] | None = None) -> list[str]:
    """One command a cell that is not finished, for any scheduler. They can run in any order, and at the same time."""
    study.check()
    _check_ids(study, cells)
    return [
        shlex.join(["trl-ift", "study", "run", file, "--cells", cell.id])
        for cell in study.cells()
        if (cells is None or cell.id in cells) and not is_finished(study, cell)
    ]


# ---------------------------------------------------------------- executors


def _run_in_process(study: Study, cells: Sequence[Cell]) -> None:
    began, done = time.monotonic(), 0
    waiting, told = list(cells), False
    while waiting:
        busy = []
        for cell in waiting:
            if _is_busy(study, cell):
                busy.append(cell)
                continue
            left = _time_left(time.monotonic() - began, done, len(cells))
            say(f"Cell {done + 1} of {len(cells)}: {cell}{left}")
            if run_cell(study, cell) == "busy":
                busy.append(cell)
            else:
                done += 1
        if busy and len(busy) == len(waiting):
            if not told:
                say(f"The last {len(busy)} cells are being run by other processes. Waiting for them.")
            told = True
            time.sleep(5)
        waiting = busy


def _is_busy(study: Study, cell: Cell) -> bool:
    """Whether another process runs a cell at this moment."""
    folder = cell_folder(study, cell)
    if not folder.is_dir():
        return False
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def _run_with_ray(study: Study, cells: Sequence[Cell], num_workers: int) -> None:
    try:
        import ray
    except ImportError:
        raise ImportError('`executor="ray"` needs Ray. Install it with `pip install "trl-ift[ray]"`.') from None
    if not ray.is_initialized():
        ray.init(address=None if ray_address() is None else "auto", num_cpus=None if ray_address() else num_workers)
    gpus = 1 if torch.cuda.is_available() else 0
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_run_remote)
    # A cell waits for the stages that it shares; starts first, so that workers do not wait for one and the same
    done = 0
    for group in ([c for c in cells if c.arm is None], [c for c in cells if c.arm is not None]):
        tasks = {remote.remote(study.absolute_settings(), cell.id): cell for cell in group}
        while tasks:
            (ready,), _ = ray.wait(list(tasks), num_returns=1)
            cell = tasks.pop(ready)
            done += 1
            try:
                say(f"{done} of {len(cells)}: {cell}: {ray.get(ready)}")
            except ray.exceptions.RayError as error:
                if not (cell_folder(study, cell) / "failed.json").is_file():
                    _record_failure(study, cell, f"{type(error).__name__}: {error}")
                say(f"{done} of {len(cells)}: {cell}: failed ({type(error).__name__})")


def ray_address() -> str | None:
    """Address of a Ray cluster that this process is told to use."""
    return os.environ.get("RAY_ADDRESS")


def _run_remote(settings: dict[str, Any], cell_id: str) -> str:
    study = Study(settings)
    cell = next((cell for cell in study.cells() if cell.id == cell_id), None)
    if cell is None:
        raise ValueError(f"The study has no cell {cell_id!r} on this node: it sees another model or other data there.")
    return run_cell(study, cell, wait=True)


def _time_left(seconds: float, done: int, total: int) -> str:
    if not done:
        return ""
    minutes = seconds / done * (total - done) / 60
    return f" (about {minutes:.0f} min left)" if minutes >= 1 else " (less than a minute left)"


# ---------------------------------------------------------------- one cell


def cell_folder(study: Study, cell: Cell) -> Path:
    """Folder of a cell."""
    return study.output_dir / "cells" / cell.id


def is_finished(study: Study, cell: Cell) -> bool:
    """Whether a cell is trained, and evaluated as the study asks now."""
    folder = cell_folder(study, cell)
    return (folder / "cell.json").is_file() and all(_part_file(study, cell, part).is_file() for part in study.parts())


def run_cell(study: Study, cell: Cell, wait: bool = False) -> str:
    """Train and evaluate a cell; return `"done"`, `"failed"`, or `"busy"` if another process runs it."""
    folder = cell_folder(study, cell)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=-1 if wait else 0):
            if is_finished(study, cell):
                return "done"
            try:
                _run_locked(study, cell, folder)
            except Exception as error:
                text = "".join(traceback.format_exception(error))
                _record_failure(study, cell, f"{type(error).__name__}: {error}", text)
                say(redacted(f"Failed: {cell}: {type(error).__name__}: {error}"))
                return "failed"
            finally:
                free_memory()
    except Timeout:
        return "busy"
    return "done"


def _run_locked(study: Study, cell: Cell, folder: Path) -> None:
    (folder / "failed.json").unlink(missing_ok=True)
    seed = cell.seed if cell.seed is not None else study.seeds[0]
    source = ensure_start(study, cell.start, seed)
    scores = ensure_start_scores(study, cell.start, seed)
    record = folder / "train.json"
    if cell.arm is not None and not record.is_file():
        trained = train_cell(study, cell, cell.arm, source, folder / "model")
        write_file(record, json.dumps(trained, indent=2).encode())
    train = json.loads(record.read_text()) if record.is_file() else None
    missing = [part for part in study.parts() if not _part_file(study, cell, part).is_file()]
    if missing:
        weights = folder / "model" if train is not None and train["steps"] else None  # of no steps: the start
        model, tokenizer = load_trained(study, cell.start, source, weights)
        for part in missing:
            began = time.monotonic()
            measures = _evaluate(study, cell, part, model, tokenizer, scores, folder)
            if broken := [
                name for name, measure in measures.items() if not all(map(math.isfinite, measure.items or ()))
            ]:
                raise ArithmeticError(
                    f"{', '.join(broken)} of {cell} is no finite number: the training diverged. Lower its learning rate."
                )
            found = {"seconds": time.monotonic() - began, "measures": measures_to_json(measures)}
            path = _part_file(study, cell, part)
            path.parent.mkdir(exist_ok=True)
            write_file(path, json.dumps(found).encode())
    for checkpoint in folder.glob("model/checkpoint-*"):
        shutil.rmtree(checkpoint)
    _write_samples(study, cell, folder)
    parts = [json.loads(_part_file(study, cell, part).read_text()) for part in study.parts()]
    try:
        _track(study, cell, _measures_of(study, cell))
    except Exception as error:  # the numbers are in the folder, whatever a tracker says
        say(f"The measures of {cell} were not logged: {type(error).__name__}: {error}")
    cell_record = {
        "id": cell.id, "start": cell.start.name, "method": cell.label, "size": cell.size, "seed": cell.seed, "key": cell.key,
        "train": train, "config": None if cell.arm is None else _described(study, cell),
        "evaluation_seconds": sum(part["seconds"] for part in parts), "versions": library_versions(), "device": device_name(),
    }  # fmt: skip
    write_file(folder / "cell.json", json.dumps(cell_record, indent=2).encode())


def train_cell(study: Study, cell: Cell, arm: Arm, source: str, folder: Path) -> dict[str, Any]:
    """Train a cell from the model in `source`; return what is recorded of it."""
    assert cell.seed is not None
    steps = study.steps(arm, cell.size)
    if steps == 0:
        return {"rows": cell.size, "sequences": 0, "tokens": 0, "steps": 0, "seconds": 0.0, "history": []}
    config = study.config(arm, cell.size, cell.seed, str(folder))
    data, more = _training_data(study, cell, arm, source, config)
    return train(study, cell.start, arm.method, source, config, data, folder, str(cell), **more)


def train(
    study: Study, start: Start, method: Any, source: str, config: Any, data: Any, folder: Path, what: str, **more: Any
) -> dict[str, Any]:
    """Train one method on a dataset, from its last checkpoint if there is one, and save it to `folder`."""
    if last_checkpoint(folder, 1) is None:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before it had recorded its end
    trainer = make_trainer(study, start, method, source, config, data, **more)
    if len(trainer.train_dataset) != len(data):
        raise ValueError(
            f"{what}: the trainer has dropped {len(data) - len(trainer.train_dataset)} of {len(data)} rows, so it would be "
            "trained on other data than the other methods. Leave out rows that cannot be trained, such as long prompts."
        )
    clock = _Clock(folder / "seconds.json")
    trainer.add_callback(clock)
    with _memory_peak() as peak:
        train_and_save(trainer, folder, what)
    (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    seen, tokens, seconds = rows_seen(trainer), count_tokens(trainer), clock.seconds()
    sequences = seen * (1 if method.kind == "unpaired" else SEQUENCES[method.kind])
    return as_json(
        {
            "rows": len(data), "sequences": sequences, "tokens": tokens, "steps": trainer.state.global_step, "seconds": seconds,
            "tokens_per_second": tokens / seconds if seconds else None, "peak_memory_bytes": peak[0], "history": history,
        }
    )  # fmt: skip


class _Clock(TrainerCallback):
    """Time of a training, with that before an interruption as far as its last checkpoint."""

    def __init__(self, path: Path):
        self.path = path
        self.before = json.loads(path.read_text())["seconds"] if path.is_file() else 0.0
        self.began = time.monotonic()

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.began

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.monotonic()

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        write_file(self.path, json.dumps({"seconds": self.seconds()}).encode())


def make_trainer(study: Study, start: Start, method: Any, source: str, config: Any, data: Any, **more: Any) -> Any:
    """The trainer of a method, on the model in the folder or with the Hub id `source`.

    Raises:
        StudyError: The process sees several GPUs, which would share each batch: a step would take as many times the rows.
    """
    if config.n_gpu > 1:
        raise StudyError(
            f"This process sees {config.n_gpu} GPUs, and a cell is trained on one: show it one with CUDA_VISIBLE_DEVICES=0, or "
            "give each worker one with `--executor ray`."
        )
    kwargs: dict[str, Any] = {"args": config, "train_dataset": data, "peft_config": study.peft_config(), **more}
    revision = start if source == start.model else None
    # By its path: of a model in memory, TRL would load the reference from where that model once came from
    kwargs["model"], config.model_init_kwargs = source, study.model_init_kwargs(revision)
    if (quantization := study.quantization_config()) is not None:
        if "quantization_config" in inspect.signature(method.trainer_class).parameters:
            kwargs["quantization_config"] = quantization
        else:
            config.model_init_kwargs["quantization_config"] = quantization
    if hasattr(config, "trust_remote_code"):
        config.trust_remote_code = bool(study.model_options.get("trust_remote_code"))
    with_own_tokens = method.module.startswith("trl.experimental")
    if with_own_tokens:
        kwargs["processing_class"] = study.tokenizers[start.name]
    trainer = method.trainer_class(**kwargs)
    if with_own_tokens:
        trainer.train_dataset = _as_tokenized(data, trainer.processing_class, config.max_length)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def _as_tokenized(data: Dataset, tokenizer: Any, max_length: int) -> Dataset:
    """The pairs as `DPOTrainer` tokenizes them: TRL's CPO and ORPO would add tokens at the beginning or the end."""
    rows = []
    for row in data:
        columns: dict[str, Any] = {}
        for answer in ("chosen", "rejected"):
            prompt, response = prompt_and_response_ids(row, row[answer], tokenizer, tokenizer.eos_token)
            ids = (prompt + response)[:max_length]
            columns |= {f"{answer}_input_ids": ids, f"{answer}_attention_mask": [1] * len(ids)}
            columns[f"{answer}_labels"] = ([-100] * len(prompt) + response)[:max_length]
        rows.append(columns | {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)})
    return Dataset.from_list(rows)


def rows_seen(trainer: Any) -> int:
    """Rows that a trainer has processed: all of each epoch, whose last batch may be smaller."""
    rows, steps, args = len(trainer.train_dataset), trainer.state.global_step, trainer.args
    batches = math.ceil(rows / args.per_device_train_batch_size)
    a_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    rest = steps % a_epoch * args.per_device_train_batch_size * args.gradient_accumulation_steps
    return steps // a_epoch * rows + min(rest, rows)


def count_tokens(trainer: Any) -> int:
    """Tokens that a trainer has trained on: those of the rows' sequences, prompts included, as far as `max_length`."""
    rows, limit = trainer.train_dataset, getattr(trainer.args, "max_length", None)
    total = sum(share * min(length, limit or length) for row in rows for share, length in _lengths(row))
    return round(total / max(len(rows), 1) * rows_seen(trainer))


def _lengths(row: dict[str, Any]) -> Iterator[tuple[float, int]]:
    """Lengths of the sequences of a row, each with the share of the epochs that it is trained in."""
    if "chosen_input_ids" in row:  # CPO, ORPO: prompt and answer
        yield from ((1, len(row[name])) for name in ("chosen_input_ids", "rejected_input_ids"))
    elif "input_ids" in row:
        yield 1, len(row["input_ids"])
    else:
        prompt = len(row["prompt_ids"])
        for name in ("completion_ids", "chosen_ids", "rejected_ids"):
            if name in row:
                yield 1, prompt + len(row[name])
        for value in row.values():  # responses beside chosen and rejected
            if isinstance(value, list) and value and isinstance(value[0], dict) and "completion_ids" in value[0]:
                share = 1 / len(value) if "level" in value[0] else 1  # one level of an answer is drawn
                yield from ((share, len(other["prompt_ids"]) + len(other["completion_ids"])) for other in value)


def _training_data(study: Study, cell: Cell, arm: Arm, source: str, config: Any) -> tuple[Any, dict[str, Any]]:
    """The dataset of a cell, and further arguments of its trainer."""
    assert cell.seed is not None
    kind, rows = arm.method.kind, study.rows_of(cell.start, cell.size, cell.seed)
    if kind == "self-play":
        return _self_play_pairs(study, cell, arm, source), {}
    data = training_rows(kind, rows, study.batch_pairs(arm), cell.seed)
    if kind == "weighted":
        # The tokens that are scored are the first ones
        scored = config.max_length if config.truncation_mode == "keep_start" else None
        return _with_token_weights(study, cell, source, data, scored), {}
    if kind == "samples":
        if not getattr(config, "reg_weight", 1):
            return data, {}
        return data, {"reg_dataset": ensure_samples(study, cell.start, cell.seed, source, cell.size)}
    if kind in ("pairs", "degraded") and study.peft is None and _reads_reference(arm.method.trainer_class, config):
        data = _with_reference(study, cell, source, config, data)
    return data, {}


def _reads_reference(trainer_class: type, config: Any) -> bool:
    """Whether a trainer takes stored log-probabilities of the reference, which stay as they are."""
    return getattr(trainer_class, "uses_reference", False) and config.ld_alpha is None and not config.sync_ref_model


def _self_play_pairs(study: Study, cell: Cell, arm: Arm, source: str) -> Dataset:
    from ..data.pairs import build_pairs

    assert cell.seed is not None
    samples = ensure_samples(study, cell.start, cell.seed, source, cell.size)
    rows = training_rows("sft", study.rows_of(cell.start, cell.size, cell.seed), 1, cell.seed)
    pairs = build_pairs(rows, samples, processing_class=study.tokenizers[cell.start.name])
    if arm.method.name == "ld-align":
        from ..latent import PolicyHiddenState, weigh_pairs

        model, tokenizer = load_trained(study, cell.start, source, None)
        pairs = weigh_pairs(pairs, PolicyHiddenState(model, processing_class=tokenizer))
    return pairs


def _with_token_weights(study: Study, cell: Cell, source: str, data: Dataset, max_length: int | None) -> Dataset:
    from ..data.token_weights import CONTRASTIVE_PROMPTS, estimate_token_weights

    model, tokenizer = load_trained(study, cell.start, source, None)
    positive, negative = CONTRASTIVE_PROMPTS
    return estimate_token_weights(
        data,
        model,
        positive_prompt=positive,
        negative_prompt=negative,
        processing_class=tokenizer,
        max_length=max_length,
    )


# ---------------------------------------------------------------- shared stages


@contextmanager
def _stage(study: Study, kind: str, key: str) -> Iterator[tuple[Path, bool]]:
    """Folder of a stage, and whether it is finished; only one process at a time is in it."""
    folder = study.output_dir / "stages" / f"{kind}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "stage.json").is_file():
        yield folder, True
        return
    with FileLock(folder / ".lock"):
        yield folder, (folder / "stage.json").is_file()


def _finish(folder: Path, **record: Any) -> None:
    record |= {"versions": library_versions(), "device": device_name()}
    write_file(folder / "stage.json", json.dumps(as_json(record), indent=2).encode())


def ensure_start(study: Study, start: Start, seed: int) -> str:
    """The folder or Hub id of a start; one with `sft` is trained first, once a seed."""
    if start.sft is None:
        return start.model
    with _stage(study, "sft", study.start_key(start, seed)) as (folder, finished):
        if not finished:
            say(f"Fine-tuning the start '{start.name}', seed {seed}")
            _train_start(study, start, seed, folder)
        return str(folder / "model")


def _train_start(study: Study, start: Start, seed: int, folder: Path) -> None:
    rows = study.sft_subset(start, seed)
    if start.chat:
        rows = [as_chat(row) for row in rows]
    config = study.sft_config(start, seed, str(folder / "training"))
    data = Dataset.from_list(rows)
    record = train(study, start, get_study_method("sft"), start.model, config, data, folder / "training", start.name)
    if study.peft is not None:
        # Into the weights as they were before any quantization, so that the merge is not rounded to it
        # and in float32: bfloat16 would round away what is smaller than its spacing
        kwargs = study.model_init_kwargs(start) | {"dtype": "float32"}
        model = load_model(start.model, str(folder / "training"), kwargs).merge_and_unload()
    else:
        model = load_model(str(folder / "training"), None, study.model_init_kwargs())
    scratch = folder / "model-writing"
    shutil.rmtree(scratch, ignore_errors=True)
    model.save_pretrained(scratch)
    study.tokenizers[start.name].save_pretrained(scratch)
    shutil.rmtree(folder / "model", ignore_errors=True)
    scratch.rename(folder / "model")
    _finish(folder, start=start.name, seed=seed, rows=len(rows), train=record)


def ensure_start_scores(study: Study, start: Start, seed: int) -> StartScores:
    """Scores of a start on the held-out data, computed once."""
    held_out = study.held_out_of(start)
    key = digest_of([study.start_key_of(start, seed), held_out.digest("start")])
    with _stage(study, "heldout", key) as (folder, finished):
        if not finished:
            source = ensure_start(study, start, seed)
            model, tokenizer = load_trained(study, start, source, None)
            score_start(model, tokenizer, held_out, folder).save(folder / "scores.json")
            _finish(folder, start=start.name, seed=seed if start.sft is not None else None)
        return StartScores.load(folder / "scores.json")


def ensure_samples(study: Study, start: Start, seed: int, source: str, size: int) -> Dataset:
    """Answers of a start to the training prompts of a subset, in their order; those of each size are generated once.

    Each size adds a block of prompts to that of the next smaller one, so that smaller sizes do not depend on larger ones.
    """
    rows, blocks, first = study.rows_of(start, size, seed), [], 0
    for end in study.sizes_up_to(size):
        prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in rows[first:end]])
        key = digest_of([study.start_key_of(start, seed), prompts.to_list(), study.samples, seed])
        with _stage(study, "samples", key) as (folder, finished):
            if not finished:
                say(f"Sampling answers of the start '{start.name}' for {len(prompts)} training prompts, seed {seed}")
                model, tokenizer = load_trained(study, start, source, None)
                generate_completions(
                    model, prompts, folder / "completions", processing_class=tokenizer, seed=seed, **study.samples
                )
                made_of = {"samples": study.samples, "start_key": study.start_key_of(start, seed)}
                _finish(folder, start=start.name, seed=seed, prompts=len(prompts), **made_of)
            block = load_completions(folder / "completions")
        index = [first + prompt for prompt in block["prompt_index"]]
        blocks.append(block.remove_columns("prompt_index").add_column("prompt_index", index))
        first = end
    return concatenate_datasets(blocks)


def _with_reference(study: Study, cell: Cell, source: str, config: Any, data: Dataset) -> Dataset:
    """The pairs with the log-probabilities of the start, computed once for the largest subset of a seed.

    Without adapters only: an adapter that is switched off is the reference already.
    """
    assert cell.seed is not None
    names = ("max_length", "truncation_mode", "bf16", "fp16", "pad_to_multiple_of")
    options = {name: getattr(config, name) for name in names}
    rows = study.rows_of(cell.start, max(study.sizes), cell.seed)
    key = digest_of([study.start_key_of(cell.start, cell.seed), options, rows])
    with _stage(study, "reference", key) as (folder, finished):
        if not finished:
            numbered = training_rows("pairs", rows, 1, cell.seed).add_column("row", list(range(len(rows))))
            reference = PreferenceConfig(
                output_dir=str(folder),
                precompute_ref_log_probs=True,
                report_to="none",
                use_cpu=config.use_cpu,
                **options,
            )
            method = get_study_method("dpo")
            trainer = make_trainer(study, cell.start, method, source, reference, numbered)
            scored = trainer.train_dataset
            columns = {name: list(scored[name]) for name in ("row", "ref_chosen_logps", "ref_rejected_logps")}
            write_file(folder / "logps.json", json.dumps(as_json(columns)).encode())
            _finish(folder, start=cell.start.name, seed=cell.seed, rows=len(scored))
        columns = json.loads((folder / "logps.json").read_text())
    logps = {row: index for index, row in enumerate(columns["row"])}
    keep = [row for row in range(len(data)) if row in logps]  # others cannot be trained: the trainer would drop them
    data = data.select(keep)
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        data = data.add_column(name, [columns[name][logps[row]] for row in keep])
    return data


# ---------------------------------------------------------------- evaluation


def load_trained(study: Study, start: Start, source: str, trained: Path | None) -> tuple[Any, Any]:
    """A trained model and its tokenizer; with `trained=None` the start itself."""
    kwargs = study.model_init_kwargs(start if source == start.model else None)
    if (quantization := study.quantization_config()) is not None:
        kwargs["quantization_config"] = quantization
    if trained is None:
        model = load_model(source, None, kwargs)
    elif not any(trained.glob("*.safetensors")):
        raise FileNotFoundError(
            f"The weights of the cell are gone from `{trained}`. To train it again, delete `{trained.parent / 'train.json'}`."
        )
    elif (trained / "adapter_config.json").is_file():
        model = load_model(source, str(trained), kwargs)
    else:
        model = load_model(str(trained), None, {n: v for n, v in kwargs.items() if n != "revision"})
    return model, AutoTokenizer.from_pretrained(
        source, **{n: v for n, v in kwargs.items() if n in ("revision", "trust_remote_code")}
    )


def _part_file(study: Study, cell: Cell, part: str) -> Path:
    return cell_folder(study, cell) / "evaluation" / f"{part}-{study.part_key(part, cell.start)}.json"


def _answers_folder(study: Study, cell: Cell, part: str) -> Path:
    """Where the answers of a part are; another `batch_tokens` begins anew, as after a lack of memory."""
    name = f"{part}-{study.part_key(part, cell.start)}-{study.held_out.batch_tokens}"
    return cell_folder(study, cell) / "answers" / name


def _evaluate(
    study: Study, cell: Cell, part: str, model: Any, tokenizer: Any, scores: StartScores, folder: Path
) -> dict[str, Measure]:
    answers = _answers_folder(study, cell, part)
    if part in PARTS:
        return evaluate_part(part, model, tokenizer, study.held_out_of(cell.start), scores, answers)
    if part == "lm_eval":
        from .harness import run_harness

        return run_harness(model, tokenizer, apply_chat_template=cell.start.chat, **study.evaluation["lm_eval"])
    return _judge(study, cell.start, model, tokenizer, answers)


def _judge(study: Study, start: Start, model: Any, tokenizer: Any, folder: Path) -> dict[str, Measure]:
    """Answer the dialogue questions, and let a judge grade the answers; without a judge they are described only."""
    from . import judged

    given = study.evaluation["judged"]
    folder.mkdir(parents=True, exist_ok=True)
    questions = judged.load_questions(given["questions"])[: given.get("rows")]
    judged.generate_answers(
        model, tokenizer, questions, folder / "answers.jsonl", max_new_tokens=given.get("max_new_tokens", 1024),
        plain=not start.chat or tokenizer.chat_template is None,
    )  # fmt: skip
    measures = judged.proxies(folder / "answers.jsonl")
    judge: judged.Judge
    match given.get("judge", "none"):
        case "none":
            return measures
        case "client":
            judge = judged.InferenceClientJudge(given["model"], given.get("base_url"), os.environ.get("JUDGE_TOKEN"))
        case "local":
            kwargs = study.model_init_kwargs()
            judge = judged.LocalJudge(
                load_model(given["model"], None, kwargs), load_tokenizer(given["model"], None, kwargs)
            )
        case _:
            judge = judged.ReplayJudge(given["judgments"], given.get("model"))
    judgments = folder / "judgments.jsonl"
    judged.judge_answers(folder / "answers.jsonl", judge, judgments, prompts=given["prompts"])
    return measures | judged.score_judgments(judgments)


def _measures_of(study: Study, cell: Cell) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in study.parts():
        path = _part_file(study, cell, part)
        if path.is_file():
            found |= json.loads(path.read_text(encoding="utf-8"))["measures"]
    return found


def _write_samples(study: Study, cell: Cell, folder: Path) -> None:
    """The answers of the evaluation as it is now in one file, to be read."""
    import pyarrow.parquet as pq

    lines = []
    for part in study.parts():
        for file in sorted(_answers_folder(study, cell, part).rglob("completions-*.parquet")):
            for row in pq.read_table(file, columns=["prompt", "completion"]).to_pylist():
                name = part if file.parent.name == "answers" else file.parent.name.removeprefix("task-")
                lines.append(json.dumps({"part": name, **row}, ensure_ascii=False) + "\n")
    if lines:
        write_file(folder / "samples.jsonl", "".join(lines).encode())


# ---------------------------------------------------------------- results


def write_results(study: Study) -> dict[str, Any]:
    """Collect the cells of a study into `results.json`, and return it."""
    if not (study.output_dir / "cells").is_dir():
        raise ValueError(f"There are no cells in `{study.output_dir}` yet. Run the study first: `trl-ift study run`.")
    results = collect_results(study)
    write_file(study.output_dir / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    return results


def collect_results(study: Study) -> dict[str, Any]:
    """What is known of all cells: status, training, measures."""
    cells = []
    for cell in study.cells():
        folder = cell_folder(study, cell)
        relative = folder.relative_to(study.output_dir).as_posix()
        failed = folder / "failed.json"
        record = json.loads((folder / "cell.json").read_text()) if (folder / "cell.json").is_file() else {}
        status = "done" if is_finished(study, cell) else "failed" if failed.is_file() else "missing"
        cells.append(
            {
                "id": cell.id, "start": cell.start.name, "method": cell.label, "size": cell.size, "seed": cell.seed,
                "status": status, "error": json.loads(failed.read_text())["error"] if status == "failed" else None,
                "folder": relative, "train": record.get("train"), "evaluation_seconds": record.get("evaluation_seconds"),
                "measures": _measures_of(study, cell), "versions": record.get("versions", {}),
                "config": f"{relative}/cell.json" if record else None,
                "samples": f"{relative}/samples.jsonl" if (folder / "samples.jsonl").is_file() else None,
            }
        )  # fmt: skip
    methods = {
        label: {
            "method": arm.method.name, "title": arm.method.title, "paper": arm.method.paper, "kind": arm.method.kind,
            "options": {**options_of(arm.method), **study.options_as_written(label)},
        }
        for label, arm in study.arms.items()
    }  # fmt: skip
    starts = {
        start.name: {"model": _shown(start.model), "sft": start.sft is not None, "chat": start.chat}
        for start in study.starts.values()
    }
    return as_json(
        {
            "study": study.name, "settings": study.settings, "environment": environment(),
            "starts": starts,
            "methods": methods, "sizes": sorted(study.sizes), "seeds": study.seeds, "cells": cells,
        }
    )  # fmt: skip


def _shown(model: str) -> str:
    """The name of a model without the folders of this machine."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def environment() -> dict[str, Any]:
    """Versions and hardware, for the report."""
    import psutil

    memory = psutil.virtual_memory().total / 2**30
    return {
        "versions": library_versions(), "device": device_name(), "python": platform.python_version(),
        "machine": f"{os.cpu_count()} cores, {memory:.0f} GiB",
    }  # fmt: skip


def device_name() -> str:
    """The device that models run on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _described(study: Study, cell: Cell) -> dict[str, Any]:
    assert cell.arm is not None
    assert cell.seed is not None
    return as_json(training_settings(study.config(cell.arm, cell.size, cell.seed, "unused")))


def _record_failure(study: Study, cell: Cell, error: str, text: str = "") -> None:
    folder = cell_folder(study, cell)
    folder.mkdir(parents=True, exist_ok=True)
    record = redacted({"error": error, "traceback": text})
    write_file(folder / "failed.json", json.dumps(record, indent=2).encode())


def _track(study: Study, cell: Cell, measures: dict[str, Any]) -> None:
    """Give the measures to the trackers of `training.report_to`."""
    trackers = study.training.get("report_to", "none")
    trackers = [trackers] if isinstance(trackers, str) else list(trackers)
    if trackers in (["none"], []):
        return
    from accelerate import Accelerator

    folder = study.output_dir / "trackers"
    accelerator = Accelerator(log_with=trackers, project_dir=str(folder), cpu=not torch.accelerator.is_available())
    names = {"wandb": {"name": cell.id}, "trackio": {"name": cell.id}}
    accelerator.init_trackers(
        study.name if "tensorboard" not in trackers else f"{study.name}/{cell.id}",
        init_kwargs={name: value for name, value in names.items() if name in trackers},
    )
    accelerator.log({name: m["value"] for name, m in measures.items() if m["value"] is not None}, step=0)
    accelerator.end_training()


@contextmanager
def _memory_peak() -> Iterator[list[int]]:
    """Largest memory while the block runs, in bytes: of the GPU, or of this process."""
    peak = [0]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        try:
            yield peak
        finally:
            peak[0] = torch.cuda.max_memory_allocated()
        return
    import psutil

    process, stop = psutil.Process(), threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            peak[0] = max(peak[0], process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
        peak[0] = max(peak[0], process.memory_info().rss)
