"""`trl-ift`: one training command a method, and the tools beside them.

Nothing heavy is imported before a command runs: `trl-ift --help` answers at once.
"""

import argparse
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from . import __version__
from .registry import METHODS, Method, get_method, methods_table, symptoms_table


# Tools with a `main(argv) -> int` of their own: name -> (module, help)
_TOOLS = {
    "generate": ("trl_ift.data.generation", "Sample completions of a model for a prompt dataset"),
    "pairs": ("trl_ift.data.pairs", "Pair the answers of an SFT dataset with generated ones"),
    "counterfactual": ("trl_ift.data.counterfactual", "Pair a model's answers with and without a style instruction"),
    "guide": ("trl_ift.latent.training", "Train the guiding model of LD-Align"),
    "weigh": ("trl_ift.latent.weigh", "Weigh pairs by the latent distance of their answers"),
    "token-weights": ("trl_ift.data.token_weights", "Estimate weights of the tokens of pairs, for TIS-DPO"),
    "triples": ("trl_ift.data.triples", "Build triples (gold, chosen, rejected) from scored responses"),
    "score": ("trl_ift.data.scoring", "Write the loss of every row of an SFT dataset under a model"),
    "select": ("trl_ift.data.selection", "Select rows of an SFT dataset by their scores, with a report"),
    "references": ("trl_ift.data.stored_references", "Store the reference log-probs of a dataset, for many trainings"),
    "merge": ("trl_ift.hub.merge", "Merge an adapter into its base model, and push the result"),
    "study": ("trl_ift.study.cli", "Compare methods from several starts, with several data sizes and seeds"),
    "demo": ("trl_ift.demo", "Fine-tune a small chat model on this machine and write a report"),
}

_CHECK = "Show what a training would do: rows, first loss, memory, settings without an effect"
_LOBASS = "Select rows by LoBaSS: train the reference, score twice, select, report"


def main(argv: list[str] | None = None) -> int:
    """Run `trl-ift` and return its exit code; `--help` and usage errors exit at once, as argparse does."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _make_parser()
    if not argv:
        parser.print_help()
        return 0
    command, rest = argv[0], argv[1:]
    methods = [method.name for method in METHODS]
    if command in methods:
        return _train(get_method(command), rest)
    if command == "lobass":
        from .scripts.lobass import make_parser

        return _run_launched(make_parser(), "lobass.py", [], rest)
    if command == "check":
        from .scripts import check

        method, options = check.split_method(rest)
        return _run_launched(check.make_parser(method), "check.py", [method.name], options)
    if command in _TOOLS:
        return import_module(_TOOLS[command][0]).main(rest)
    known = [*methods, "methods", "check", "lobass", *_TOOLS, "env"]
    if not command.startswith("-") and command not in known:
        near = get_close_matches(command, known, n=1)
        hint = f"Did you mean `trl-ift {near[0]}`?" if near else f"The commands are: {', '.join(known)}."
        parser.exit(2, f"trl-ift: error: unknown command {command!r}. {hint}\n")
    args = parser.parse_args(argv)
    try:
        if args.command == "methods":
            print(f"{methods_table()}\n\n{symptoms_table()}" if args.markdown else _terminal_table())
        elif args.command == "env":
            _print_env()
        sys.stdout.flush()
    except BrokenPipeError:  # what reads has ended, as `head` does; Python would flush once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-ift",
        description="Alignment methods that TRL lacks. Every training command takes TRL's options, `--config FILE.yaml`, "
        "`--accelerate_config NAME|FILE` and the options of `accelerate launch`.",
        epilog="`trl-ift COMMAND --help` lists the options of a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"trl-ift {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for method in METHODS:
        commands.add_parser(method.name, help=f"Train with {method.title}: {method.summary}", add_help=False)
    methods = commands.add_parser("methods", help="List the methods, their data and papers", allow_abbrev=False)
    methods.add_argument("--markdown", action="store_true", help="as Markdown tables, by data and by symptom")
    commands.add_parser("check", help=_CHECK, add_help=False)
    commands.add_parser("lobass", help=_LOBASS, add_help=False)
    for name, (_, summary) in _TOOLS.items():
        commands.add_parser(name, help=summary, add_help=False)
    commands.add_parser("env", help="Print versions and hardware, for bug reports", allow_abbrev=False)
    return parser


def _terminal_table() -> str:
    """The registry as a table that fits the terminal: long cells are wrapped."""
    head = ("command", "method", "data", "what for", "paper")
    rows = [(m.name, m.title, m.data, m.summary, f"arXiv:{m.paper}") for m in METHODS]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    available = max(shutil.get_terminal_size((119, 24)).columns, 80) - 2 * (len(head) - 1)
    for column in (3, 2, 1):  # narrow the widest texts first
        excess = sum(widths) - available
        widths[column] = max(widths[column] - max(excess, 0), 12)
    lines = []
    for row in (head, tuple("-" * width for width in widths), *rows):
        cells = [textwrap.wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
        for i in range(max(map(len, cells))):
            parts = (
                (cell[i] if i < len(cell) else "").ljust(width) for cell, width in zip(cells, widths, strict=True)
            )
            lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def _print_env() -> None:
    from contextlib import redirect_stdout
    from io import StringIO

    from .trl_internals import print_env

    with redirect_stdout(StringIO()) as text:
        print_env()
    print(f"{text.getvalue().rstrip()}\n- trl-ift version: {__version__}\n")


# ---------------------------------------------------------------- launched commands


def _train(method: Method, argv: list[str]) -> int:
    """Launch the training script of `method` with accelerate; return the exit code of the training."""
    script = import_module(f".scripts.{method.script.removesuffix('.py')}", __package__)
    return _run_launched(script.make_parser(method, f"trl-ift {method.name}"), method.script, [method.name], argv)


def _run_launched(parser: Any, script: str, leading: list[str], argv: list[str]) -> int:
    """Launch a script of `scripts/`, whose options `parser` knows, with accelerate; return its exit code."""
    from .scripts.train import INPUT_ERRORS, report_error

    if "-h" in argv or "--help" in argv:
        parser.print_help()
        parser.exit()
    try:
        return _launch(_launch_arguments(parser, script, leading, argv))
    except INPUT_ERRORS as error:
        return report_error(parser.prog, error)
    except KeyboardInterrupt:
        return 130


def _launch_arguments(parser: Any, script: str, leading: list[str], argv: Sequence[str]) -> argparse.Namespace:
    """Deal the command line and the YAML file out to the script and to `accelerate launch`; parse the latter's part."""
    from accelerate.commands.launch import launch_command_parser

    from .scripts.train import option_strings, unknown_option, usage_error
    from .trl_internals import resolve_accelerate_config_argument

    launcher = launch_command_parser()
    launcher.error = partial(usage_error, parser.prog)
    script_options = option_strings(parser)
    launch_options = option_strings(launcher) | {"--accelerate_config"}
    known = script_options | launch_options | {"--config"}

    config_file, argv = _take_config(argv, parser.error)
    to_script: list[str] = [] if config_file is None else ["--config", config_file]
    to_launcher: list[str] = []
    destination = None
    for token in argv:
        option, equals, value = token.partition("=")
        if option in script_options:
            destination = to_script
            destination.append(token)
        elif option in launch_options:
            destination = to_launcher
            destination += [option, value] if equals else [option]
        elif token.startswith("--") and " " not in option:
            parser.error(unknown_option(option, known))
        elif destination is None:
            parser.error(f"unexpected argument {token!r}: a value follows its option, as in `--dataset_name {token}`")
        else:
            destination.append(token)
    # Types and choices, here rather than in each of the launched processes
    if excess := parser.parse_known_args(to_script[2 if config_file else 0 :])[1]:
        parser.error(f"unexpected argument {excess[0]!r}")

    if config_file is not None:
        from_file = _launcher_options(config_file, parser, launcher, launch_options)
        to_launcher = [token for pair in from_file if pair[0] not in to_launcher for token in pair] + to_launcher
    to_launcher = resolve_accelerate_config_argument(to_launcher)
    path = str(Path(__file__).parent / "scripts" / script)
    args = launcher.parse_args([*to_launcher, path, *leading, *to_script])
    if args.training_script != path:
        parser.error(f"unexpected argument {args.training_script!r}")
    return args


def _take_config(argv: Sequence[str], error: Any) -> tuple[str | None, list[str]]:
    """Split `--config FILE` or `--config=FILE` off the command line."""
    rest, files, tokens = [], [], iter(argv)
    for token in tokens:
        if token == "--config":
            files.append(next(tokens, ""))
        elif token.startswith("--config="):
            files.append(token.removeprefix("--config="))
        else:
            rest.append(token)
    if len(files) > 1 or "" in files:
        error("`--config` takes one YAML file, and is given once")
    return (files[0] if files else None), rest


def _launcher_options(config_file: str, parser: Any, launcher: Any, launch_options: set[str]) -> list[list[str]]:
    """Options of `accelerate launch` in a YAML file, as [option, value] or, for a switch, [option].

    Sets the variables under `env:`, for the launched processes too. Keys that nobody knows are refused.
    """
    from .scripts.train import read_config, unknown_option

    config = read_config(config_file)
    env = config.pop("env", None) or {}
    if not isinstance(env, dict):
        raise ValueError(f"`--config {config_file}`: `env` must hold `NAME: value` lines, found {type(env).__name__}.")
    os.environ.update({str(name): str(value) for name, value in env.items()})

    script_keys = {action.dest for action in parser._actions}
    switches = {option for action in launcher._actions if action.nargs == 0 for option in action.option_strings}
    options = []
    for key, value in config.items():
        option = f"--{key}"
        if key in script_keys:
            continue
        if option not in launch_options:
            known = launch_options | {f"--{known_key}" for known_key in script_keys}
            parser.error(f"in {config_file}: {unknown_option(option, known)}")
        if option not in switches:
            options.append([option, str(value)])
        elif value:
            options.append([option])
    return options


def _launch(args: argparse.Namespace) -> int:
    """Run `accelerate launch` and return the exit code of the training, which has printed its own errors."""
    import torch
    import yaml
    from accelerate.commands.launch import launch_command
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Python would put the folder of the script first on its path, where modules are named like common ones
    environment = {"PYTHONSAFEPATH": "1"}
    if not torch.accelerator.is_available():
        # accelerate's defaults are meant for GPUs: one thread a process, and a warning about their number
        threads = max(torch.get_num_threads() // (args.num_processes or 1), 1)
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
        logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)
    # Ctrl-C reaches the training too, which says how to continue; wait for it. (A handler is not inherited.)
    previous = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        with patch_environment(**environment):
            launch_command(args)
        return 0
    except yaml.YAMLError as error:  # of the file of accelerate
        raise ValueError(f"The configuration of accelerate is no YAML file of plain values: {error}") from None
    except subprocess.CalledProcessError as error:
        code = error.returncode
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
    except SignalException as error:
        code = -error.sigval
    finally:
        signal.signal(signal.SIGINT, previous)
    if code == -signal.SIGKILL:
        print("The training was killed (SIGKILL): most often, the machine ran out of memory.", file=sys.stderr)
    return 128 - code if code < 0 else code  # shells report signal N as 128 + N


if __name__ == "__main__":
    raise SystemExit(main())
