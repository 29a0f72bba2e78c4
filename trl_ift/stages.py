"""What commands of several stages share: the record of a run's settings, training that goes on by itself, messages."""

import ctypes
import gc
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .redaction import redacted


# Options of a training that may change when a run goes on: they do not change its result
_MAY_CHANGE = re.compile(
    "output_dir|.*logging.*|log_level.*|log_on_each_node|report_to|run_name|project|trackio.*|disable_tqdm|save_.*|eval_.*|.*_eval_.*|do_.*|push_.*"
    "|hub_.*|dataloader_num_workers|dataloader_pin_memory|dataloader_p.*|dataset_num_proc|overwrite_.*|resume_from_checkpoint"
    "|use_cpu|ddp_timeout|.*local_rank|gradient_checkpointing.*|activation_checkpointing.*|torch_compile.*|debug|deepspeed"
)


def is_main_process() -> bool:
    """Whether this is the first process of a launcher, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print on the main process."""
    if is_main_process():
        print(text, flush=True)


def training_settings(training_args: Any) -> dict[str, Any]:
    """The options of a config that its result depends on.

    Raises:
        ValueError: An interrupted training could not go on as it would have (`save_only_model`).
    """
    if training_args.save_only_model:
        raise ValueError(
            "`save_only_model=True`: a run that was interrupted could not go on as it would have. Drop the option."
        )
    same_result = getattr(training_args, "same_result", ())
    settings = {
        name: value
        for name, value in training_args.to_dict().items()
        if not _MAY_CHANGE.fullmatch(name) and name not in same_result
    }
    if options := settings.get("model_init_kwargs"):  # tokens are written nowhere
        settings["model_init_kwargs"] = {name: value for name, value in options.items() if "token" not in name}
    return settings


def as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they read back from a file, without tokens, keys and passwords."""
    # Sets, as in the configs of PEFT, have another order in each process
    return redacted(
        json.loads(json.dumps(settings, default=lambda value: sorted(value) if isinstance(value, set) else str(value)))
    )


def claim(root: Path, file: str, settings: Mapping[str, Any], has_results: bool, what: str) -> None:
    """Record in `root / file` what the folder is made with, or raise if it was made with something else.

    Args:
        root: Folder of the run; made if it is not there.
        file: Name of the record.
        settings: What the results depend on, as `as_json` gives it.
        has_results: Whether the folder holds results that must not be mixed with others; without any the record is replaced.
        what: How the message calls a run, e.g. `"run of LoBaSS"`.

    Raises:
        ValueError: The settings differ (the message shows where), or the folder holds something else.
    """
    from .data.shards import write_file

    path = root / file
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = [f"{name}={found.get(name)!r} (now {v!r})" for name, v in settings.items() if found.get(name) != v]
        if differing and has_results:
            raise ValueError(
                f"`output_dir='{root}'` holds a run that was made with {', '.join(differing)}. Choose another `output_dir`, "
                "or, to go on there, give the same again."
            )
    elif root.is_dir() and not all(path.match(".*.tmp") for path in root.iterdir()):  # of a `claim` that was killed
        raise ValueError(f"`output_dir='{root}'` is not empty, and holds no {what}. Choose another folder.")
    root.mkdir(parents=True, exist_ok=True)
    write_file(path, (json.dumps(settings, indent=2) + "\n").encode())


def last_checkpoint(folder: Path, processes: int) -> Path | None:
    """The last complete checkpoint in the folder of a training, if there is one.

    Raises:
        ValueError: It was written by another number of processes.
    """
    from .checks import is_complete_checkpoint

    checkpoints = [path for path in folder.glob("checkpoint-*") if is_complete_checkpoint(path)]
    last = max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    if last is not None and (found := len(list(last.glob("rng_state*.pth")))) not in (0, processes):  # one of each
        raise ValueError(
            f"`{last}` is of a training in {found} process{'es' * (found > 1)}, now there {'is' if processes == 1 else 'are'} "
            f"{processes}: its steps would be of another number of rows. Launch {found} again (`--num_processes {found}`), or "
            "delete the checkpoints beside it to begin this training anew."
        )
    return last


def train_and_save(trainer: Any, folder: Path, what: str) -> dict[str, Any]:
    """Train from the last complete checkpoint in the folder, if there is one, and save; return what to record of it.

    Raises:
        ValueError: The checkpoint was written by another number of processes.
        RuntimeError: The training failed, or saved no weights.
    """
    from transformers import TrainerState
    from transformers.trainer import TRAINER_STATE_NAME

    from .checks import WEIGHT_FILES
    from .extension import ExtensionTrainer
    from .scripts.train import INPUT_ERRORS
    from .trl_internals import take_no_step

    if (last := last_checkpoint(folder, trainer.args.world_size)) is not None:
        say(f"Going on from {last.name}.")
        state = TrainerState.load_from_json(str(last / TRAINER_STATE_NAME))
        # At its end one more would be taken; our trainers take none, and do what is outstanding
        if state.global_step >= state.max_steps and not isinstance(trainer, ExtensionTrainer):
            take_no_step(trainer)
    try:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    except INPUT_ERRORS as error:
        raise RuntimeError(f"The training of {what} in {folder} failed: {error}") from error
    trainer.save_model(str(folder))
    trainer.accelerator.wait_for_everyone()
    if is_main_process() and not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise RuntimeError(
            f"The training was completed, but saved no weights in {folder}. With FSDP, set `fsdp_state_dict_type: "
            "FULL_STATE_DICT`; with ZeRO-3, `stage3_gather_16bit_weights_on_model_save`."
        )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"steps": trainer.state.global_step, "last_loss": losses[-1:]}


def free_memory() -> None:
    """Give the memory of models that nothing refers to back to the device."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # of the machine: glibc keeps what was freed
        ctypes.CDLL("libc.so.6").malloc_trim(0)
