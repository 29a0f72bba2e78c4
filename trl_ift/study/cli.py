"""`trl-ift study plan|run|report STUDY.yaml`."""

import argparse
import os
from functools import partial

from ..scripts.tools import run_tool
from ..scripts.train import usage_error


def make_parser(prog: str = "trl-ift study") -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Compare methods from several starts, with several data sizes and seeds: the same evaluation of all, with "
        "intervals. A study that was interrupted goes on when it is run again; what is finished is not repeated.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    plan = commands.add_parser("plan", help="Check everything, print the grid and what it costs", allow_abbrev=False)
    plan.add_argument(
        "--no_measure", action="store_true", help="do not train two steps of each method to tell the time"
    )
    plan.add_argument("--list", action="store_true", help="list the ids of the cells, and whether they are finished")
    run = commands.add_parser("run", help="Train and evaluate what is missing", allow_abbrev=False)
    run.add_argument("--cells", nargs="+", metavar="ID", help="run these cells only")
    run.add_argument("--executor", default="in-process", choices=["in-process", "ray"], help="what runs the cells")
    run.add_argument("--num_workers", type=_workers, help="cells at a time on this machine, with Ray (default: 2)")
    run.add_argument(
        "--print-commands", "--print_commands", action="store_true", help="print a command for each cell instead"
    )
    report = commands.add_parser("report", help="Write report.html and report.md, print the table", allow_abbrev=False)
    for command in (plan, run, report):
        command.add_argument("study", metavar="STUDY.yaml")
        command.error = partial(usage_error, f"{prog} {command.prog.split()[-1]}")  # type: ignore[method-assign]
    return parser


def _workers(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 1")
    return int(text)


def main(argv: list[str]) -> int:
    """Run the command."""
    return run_tool(make_parser(), argv, _run)


def _run(args: argparse.Namespace) -> None:
    if args.command == "run":
        _check_executor(args)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from .plan import Study

    study = Study.load(args.study)
    if args.command == "plan":
        from .costs import describe_plan
        from .run import is_finished

        study.check()
        print(describe_plan(study, not args.no_measure))
        if args.list:
            print("\n" + "\n".join(f"{cell.id}{'  finished' * is_finished(study, cell)}" for cell in study.cells()))
    elif args.command == "run":
        _run_cells(args, study)
    else:
        from .report import report_text, write_report
        from .run import write_results

        results = write_results(study)
        path = write_report(results, study.output_dir)
        print(report_text(results))
        print(f"\nReport: {path}")


def _check_executor(args: argparse.Namespace) -> None:
    if args.print_commands and args.executor == "ray":
        raise ValueError(
            "--print-commands and --executor ray exclude each other: each command runs one cell. Drop one."
        )
    if args.num_workers is not None and args.executor != "ray":
        raise ValueError(
            f"--num_workers {args.num_workers} has no effect with --executor {args.executor}, which runs one cell after "
            "another. Add --executor ray, or drop it."
        )


def _run_cells(args: argparse.Namespace, study: "Study") -> None:  # type: ignore[name-defined]  # noqa: F821
    from .run import print_commands, run_study

    if args.print_commands:
        print("\n".join(print_commands(study, args.study, args.cells)))
        return
    results = run_study(study, args.cells, args.executor, args.num_workers or 2)
    wanted = [cell for cell in results["cells"] if not args.cells or cell["id"] in args.cells]
    failed = [cell for cell in wanted if cell["status"] == "failed"]
    print(f"{sum(cell['status'] == 'done' for cell in wanted)} of {len(wanted)} cells are finished.")
    if failed:
        ids = "\n".join(f"  {cell['id']}: {cell['error']}" for cell in failed)
        raise ValueError(f"{len(failed)} cells failed; they are tried again by the next run:\n{ids}")
