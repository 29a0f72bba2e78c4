"""What the tools beside the training commands share: the YAML file of `--config`, several processes on one machine."""

import argparse
import logging
import os
import signal
import sys
from pathlib import Path

import yaml


def options_of_config(argv: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """Return the options in the YAML file of `--config`, as on the command line."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    file = finder.parse_known_args(argv)[0].config
    if file is None:
        return []
    config = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"`--config {file}`: expected `option: value` lines, found {type(config).__name__}.")
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
