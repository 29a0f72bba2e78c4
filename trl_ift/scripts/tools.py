"""What the tools beside the training commands share: options, the YAML file of `--config`, processes, exit codes."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable

from .train import INPUT_ERRORS, read_config, report_error


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a model that is only run."""
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="Hub id or folder of the model")
    add("--adapter", help="Hub id or folder of a PEFT adapter, loaded on the model")
    dtypes = ("auto", "bfloat16", "float16", "float32")
    add("--dtype", choices=dtypes, default="float32", help="dtype of the model")
    add("--load_in_4bit", action="store_true", help="quantize the model to 4 bits")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model")
    add("--num_processes", type=int, default=1, help="processes of this machine, each with a model of its own")


def add_dataset_options(parser: argparse.ArgumentParser, streaming: bool = True) -> None:
    """Add the options that name a dataset; `streaming` unless the tool needs all rows at once."""
    add = parser.add_argument
    add("--dataset_name", required=True, help="file, folder or Hub id of the dataset")
    add("--dataset_config", help="configuration of a dataset on the Hub")
    add("--dataset_split", default="train", help="split of the dataset")
    if streaming:
        add("--dataset_streaming", action="store_true", help="read the dataset as a stream")


def run_tool(
    parser: argparse.ArgumentParser,
    argv: list[str],
    run: Callable[[argparse.Namespace], None],
    module: str | None = None,
) -> int:
    """Parse the options and run a tool, in `--num_processes` processes if it is the `module` of one that has the option.

    Returns:
        0, 1 after an error that its message explains, 130 after Ctrl-C, or the exit code of the processes.
    """
    try:
        args = parser.parse_args(options_of_config(argv, parser) + argv)
        if module is not None and args.num_processes < 1:
            parser.error(f"--num_processes {args.num_processes} must be at least 1")
        if module is not None and args.num_processes > 1 and getattr(args, "part", None) is not None:
            parser.error("--num_processes and --part exclude each other")
        if module is not None and args.num_processes > 1 and "RANK" not in os.environ:
            return launch(args.num_processes, module, argv)
        run(args)
    except KeyboardInterrupt:
        return 130
    except INPUT_ERRORS as error:
        return report_error(parser.prog, error)
    return 0


def options_of_config(argv: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """Return the options in the YAML file of `--config`, as on the command line."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    file = finder.parse_known_args(argv)[0].config
    if file is None:
        return []
    config = read_config(file)
    switches = {action.dest for action in parser._actions if action.nargs == 0}
    options = []
    for name, value in config.items():
        if value is None and parser.get_default(name) is None:
            continue
        if name not in switches:
            options.append(f"--{name}={'none' if value is None else value}")
        elif not isinstance(value, bool):
            raise ValueError(f"`--config {file}`: `{name}: {value!r}` must be true or false.")
        elif value:
            options.append(f"--{name}")
    return options


def launch(num_processes: int, module: str, argv: list[str]) -> int:
    """Run a module in several processes of this machine, and return the exit code."""
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    if not torch.accelerator.is_available():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(torch.get_num_threads() // num_processes, 1)))
    logging.disable(logging.ERROR)  # torchrun's: a process that fails says why itself
    try:
        torchrun(["--standalone", "--nproc-per-node", str(num_processes), "--module", module, *argv])
        return 0
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
    except SignalException as error:
        code = -error.sigval
    finally:
        logging.disable(logging.NOTSET)
    if code == -signal.SIGKILL:
        print("A process was killed (SIGKILL): most often, the machine ran out of memory.", file=sys.stderr)
    return 128 - code if code < 0 else code
