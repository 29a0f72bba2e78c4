"""The script of `trl-ift spin` and `trl-ift ld-align`: the iterations of self-play, METHOD first.

Interrupted at any point, the same command goes on.
"""

import os
import sys
from typing import Any

from trl_ift.registry import Method, get_method
from trl_ift.scripts import train
from trl_ift.scripts.train import INPUT_ERRORS, model_init_kwargs, parse_options, report_error, usage_error
from trl_ift.stages import is_main_process


# What of a method is its paper's
_ORIGIN = {
    "spin": "Confirmed by the paper and its code: the loss, the iterations, and their defaults but those marked as our choice.",
    "ld-align": "Confirmed by the paper: a distance in a latent space learnt by reconstruction weighs the pair in a loss based "
    "on DPO; encoder, distance, normalisation and defaults are our choices.",
}


def make_parser(method: Method, prog: str | None = None) -> Any:
    """Return the `TrlParser` of `method`: the options of its training, of the iterations and of the distances."""
    from trl_ift.self_play import LatentConfig, SelfPlayConfig

    more = [SelfPlayConfig, *([LatentConfig] if method.name == "ld-align" else [])]
    parser = train.make_parser(method, prog, more)
    parser.description += f" {_ORIGIN[method.name]}"
    return parser


def main(
    script_args: Any, training_args: Any, model_args: Any, dataset_args: Any, config: Any, latent: Any = None
) -> list[dict[str, Any]]:
    """Run the iterations with the parsed arguments of `make_parser(method)`."""
    from accelerate import PartialState
    from transformers import set_seed
    from trl import get_peft_config, get_quantization_config

    from trl_ift.checks import check_quantization
    from trl_ift.scripts.data import load_splits
    from trl_ift.self_play import self_play

    if model_args.model_name_or_path is None:
        raise ValueError("No model: name a Hub id or a local folder with `--model_name_or_path`.")
    check_quantization(model_args)
    set_seed(training_args.seed)
    train_dataset, eval_dataset = load_splits(script_args, dataset_args, training_args)
    training_args.model_init_kwargs = model_init_kwargs(training_args, model_args)
    summaries = self_play(
        os.path.expanduser(model_args.model_name_or_path),
        training_args,
        train_dataset,
        eval_dataset,
        config=config,
        latent=latent,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    PartialState().destroy_process_group()
    return summaries


def run(argv: list[str]) -> int:
    """Run the script on a command line, METHOD first, and return the exit code."""
    if not argv or argv[0].startswith("-"):
        usage_error("self_play.py", "the method comes first: self_play.py METHOD [options]")
    prog = f"trl-ift {argv[0]}"
    try:
        summaries = main(*parse_options(make_parser(get_method(argv[0]), prog), argv[1:], prog))
    except INPUT_ERRORS as error:
        return report_error(prog, error)
    except KeyboardInterrupt:
        return 130
    if is_main_process():
        print(summary_table(summaries))
    return 0


def summary_table(summaries: list[dict[str, Any]]) -> str:
    """The iterations as a table for the terminal."""
    columns = {
        "iteration": lambda s: str(s["iteration"] + 1),
        "pairs": lambda s: str(s["pairs"]),
        "dropped": lambda s: str(sum(s["dropped"].values())),
        "cut": lambda s: f"{s['truncated'] / max(s['answers'], 1):.0%}",
        "loss": lambda s: _figure(s, "loss"),
        "margin": lambda s: _figure(s, "rewards/margins"),
        "accuracy": lambda s: _figure(s, "rewards/accuracies"),
        "eval margin": lambda s: _figure(s, "eval_rewards/margins"),
        "eval accuracy": lambda s: _figure(s, "eval_rewards/accuracies"),
    }
    rows = [list(columns), *([cell(summary) for cell in columns.values()] for summary in summaries)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _figure(summary: dict[str, Any], name: str) -> str:
    return f"{summary[name]:.3f}" if name in summary else "-"


if __name__ == "__main__":
    raise SystemExit(run(sys.argv[1:]))
