"""The training script of every method: `accelerate launch train.py METHOD [options]`.

`trl-ift METHOD` launches it; `main` does the same from Python. The options are those of TRL's own scripts, with the
method's config in place of TRL's.
"""

import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from trl_ift.redaction import redacted
from trl_ift.registry import Method, get_method
from trl_ift.stages import is_main_process


# What the checks of this package and the loaders of datasets and models raise for bad input
INPUT_ERRORS = (ValueError, TypeError, ImportError, OSError)


def make_parser(method: Method, prog: str | None = None, more: Sequence[type] = ()) -> Any:
    """Return the `TrlParser` of `method`, over its script, training, model and mixture arguments, and `more` dataclasses."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    prog = prog or f"trl-ift {method.name}"
    trl_config = next(base for base in method.config_class.__mro__ if base.__module__.startswith("trl."))
    known_to_trl = {field.name for field in fields(trl_config)}
    own = [f"--{field.name}" for field in fields(method.config_class) if field.name not in known_to_trl]
    own += [f"--{field.name}" for config in more for field in fields(config)]
    parser = TrlParser(
        (ScriptArguments, method.config_class, ModelConfig, DatasetMixtureConfig, *more),
        prog=prog,
        usage=f"{prog} [--config FILE] [--accelerate_config NAME|FILE] [options] [options of accelerate launch]",
        description=f"{method.title}: {method.summary}. Data: {method.data}. "
        f"Paper: https://huggingface.co/papers/{method.paper}",
        epilog=f"Options that {trl_config.__name__} does not have: {', '.join(own)}.",
        allow_abbrev=False,
    )
    parser.error = partial(usage_error, prog)  # argparse would print the usage of all options first
    return parser


def usage_error(prog: str, message: str) -> NoReturn:
    """Print one message about the command line and exit with code 2."""
    print(f"{prog}: error: {redacted(message)} (`{prog} --help` lists the options)", file=sys.stderr)
    raise SystemExit(2)


def report_error(prog: str, error: BaseException) -> int:
    """Print the message of an input error, without its traceback unless TRL_IFT_DEBUG=1, and return exit code 1."""
    if os.environ.get("TRL_IFT_DEBUG", "0") != "0":
        print(redacted("".join(traceback.format_exception(error))), end="", file=sys.stderr)
        return 1
    rank = os.environ.get("RANK", "0")
    prefix = prog if rank == "0" else f"[rank {rank}] {prog}"
    print(
        f"{prefix}: error: {redacted(str(error)) or type(error).__name__}\n(TRL_IFT_DEBUG=1 shows the full traceback.)",
        file=sys.stderr,
    )
    return 1


def read_config(file: str) -> dict[str, Any]:
    """Return the options in the YAML file of `--config`.

    Raises:
        ValueError: It is no YAML file of plain values, or holds something else than options.
        OSError: It cannot be read.
    """
    import yaml

    try:
        config = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"`--config {file}` is no YAML file of plain values: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"`--config {file}`: expected `option: value` lines, found {type(config).__name__}.")
    return config


def option_strings(parser: Any) -> set[str]:
    """All spellings of the options of an argparse parser."""
    return {option for action in parser._actions for option in action.option_strings}


def unknown_option(option: str, known: Iterable[str]) -> str:
    """Message for an option that neither the script nor `accelerate launch` has."""
    near = get_close_matches(option, sorted(known), n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"unknown option {option}: neither this command nor `accelerate launch` has it.{hint}"


def prepare(method: Method, script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> Any:
    """Check the arguments, load the data, and return the trainer.

    Raises:
        ValueError, TypeError, ImportError, OSError: Something in the input is wrong. All that can be checked without the
            model is checked before it is loaded.
    """
    from transformers import set_seed
    from trl import get_peft_config, get_quantization_config

    from trl_ift.checks import check_model_source, check_output_dir, check_quantization, resolve_checkpoint
    from trl_ift.scripts.data import load_splits

    if model_args.model_name_or_path is None:
        raise ValueError("No model: name a Hub id or a local folder with `--model_name_or_path`.")
    model = os.path.expanduser(model_args.model_name_or_path)
    check_quantization(model_args)
    check_model_source(model, None)
    training_args.resume_from_checkpoint = _resume_value(training_args.resume_from_checkpoint)
    checkpoint = resolve_checkpoint(training_args.resume_from_checkpoint, training_args.output_dir)
    check_output_dir(training_args, checkpoint)

    # Before the data: random splits of mixtures and initial adapter weights then are those of `seed`, on every process
    set_seed(training_args.seed)
    train_dataset, eval_dataset = load_splits(script_args, dataset_args, training_args)

    training_args.model_init_kwargs = model_init_kwargs(training_args, model_args)
    if method.kind == "reward":
        model_args.lora_task_type = "SEQ_CLS"  # of another type, the adapter would not train the new head
    return method.trainer_class(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )


def model_init_kwargs(training_args: Any, model_args: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained`; those in `model_init_kwargs` win."""
    return {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }


def train(trainer: Any, dataset_name: str | None = None) -> None:
    """Train, save, push if asked to, and close the trackers."""
    args = trainer.args
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.accelerator.print("Training completed.")

    trainer.save_model(args.output_dir)
    if dataset_name and Path(dataset_name).expanduser().exists():
        dataset_name = Path(dataset_name).name  # in the model card, `folder/name` would read as a Hub id
    trainer.create_model_card(dataset_name=dataset_name)
    trainer.accelerator.print(f"Model saved to {args.output_dir}.")

    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
        trainer.accelerator.print(f"Model pushed to https://huggingface.co/{trainer.hub_model_id}.")

    trainer.end()


def main(method: Method, script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Train `method` with the parsed arguments of `make_parser(method)`."""
    trainer = prepare(method, script_args, training_args, model_args, dataset_args)
    train(trainer, script_args.dataset_name)


def run(argv: list[str]) -> int:
    """Run the script on a command line, METHOD first, and return the exit code.

    Input errors are printed as one message; errors during training keep their traceback.
    """
    from trl_ift.memory import CHECKPOINTING_OPTIONS, choose_checkpointing

    if not argv or argv[0].startswith("-"):
        usage_error("train.py", "the method comes first: train.py METHOD [options]")
    prog = f"trl-ift {argv[0]}"
    output_dir = None
    try:
        try:
            method = get_method(argv[0])
            script_args, training_args, model_args, dataset_args = parse(method, argv[1:], prog)
            output_dir = training_args.output_dir
            trainer = prepare(method, script_args, training_args, model_args, dataset_args)
            if not {*CHECKPOINTING_OPTIONS} & {*given_options(make_parser(method, prog), argv[1:])}:
                trainer.accelerator.print(choose_checkpointing(trainer))
        except INPUT_ERRORS as error:
            return report_error(prog, error)
        train(trainer, script_args.dataset_name)
    except KeyboardInterrupt:
        if is_main_process():
            print(f"\n{_how_to_continue(output_dir)}", file=sys.stderr)
        return 130
    return 0


def parse(method: Method, argv: list[str], prog: str) -> tuple[Any, Any, Any, Any]:
    """Parse the options of `method`."""
    return parse_options(make_parser(method, prog), argv, prog)


def parse_options(parser: Any, argv: list[str], prog: str, launched: bool = True) -> tuple[Any, ...]:
    """Parse the options of a script, refusing unknown ones. On a machine without accelerator the CPU is the default.

    The second dataclass of the parser is the config of the training. Unless the script is `launched` by accelerate, options of
    that are unknown too.
    """
    import torch
    from accelerate.commands.launch import launch_command_parser

    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")  # `accelerate launch --cpu`
    if wants_cpu or not torch.accelerator.is_available():
        parser.set_defaults(use_cpu=True, bf16=False)

    *parsed, from_config, from_argv = parser.parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    # Keys of the YAML file may be meant for `accelerate launch`, which has read them by now
    launch_options = option_strings(launch_command_parser()) | {"--accelerate_config"} if launched else set()
    unknown = [*(token for token in from_config[::2] if token not in launch_options), *from_argv]
    if unknown:
        usage_error(prog, unknown_option(unknown[0], option_strings(parser) | launch_options))

    training_args = parsed[1]
    if training_args.use_cpu and os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        raise ValueError(
            "FSDP is asked for, and the training is on the CPU, where accelerate would copy the whole model to every process "
            "instead. Drop `--accelerate_config` (or `--use_fsdp`), or train on accelerators."
        )
    if training_args.use_cpu and is_main_process():
        precision = "bfloat16" if training_args.bf16 else "float32"
        reason = "as asked for" if wants_cpu or torch.accelerator.is_available() else "no accelerator found"
        print(f"Training on the CPU in {precision} ({reason}; `--use_cpu`, `--bf16` change it).")
    return tuple(parsed)


def given_options(parser: Any, argv: list[str]) -> dict[str, str]:
    """The options that a user gave, by name, and where: on the command line or in the YAML file of `--config`."""
    found = {}
    if "--config" in argv:
        file = argv[argv.index("--config") + 1]
        found = dict.fromkeys(read_config(file), file)
    actions = parser._option_string_actions
    for token in argv:
        if (option := token.partition("=")[0]) in actions:
            found[actions[option].dest] = "the command line"
    return found


def _resume_value(value: str | bool | None) -> str | bool | None:
    """`--resume_from_checkpoint true` means the last checkpoint, as `True` does in Python."""
    words = {"true": True, "false": None, "none": None, "": None}
    return words.get(value.lower(), value) if isinstance(value, str) else value


def _how_to_continue(output_dir: str | None) -> str:
    from trl_ift.checks import is_complete_checkpoint

    checkpoints = [path for path in Path(output_dir or "").glob("checkpoint-*") if is_complete_checkpoint(path)]
    if output_dir is None or not checkpoints:
        return "Interrupted before the first checkpoint (see `--save_steps`): run the same command to start again."
    last = max(checkpoints, key=lambda path: path.stat().st_mtime)
    return f"Interrupted. To continue, run the same command with `--resume_from_checkpoint {last}`."


if __name__ == "__main__":
    raise SystemExit(run(sys.argv[1:]))
