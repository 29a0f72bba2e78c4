"""Scoring beside the obvious script: rows a second and peak memory, same model, same rows, alternating in one process.

    python benchmarks/scoring.py                                                  # tiny and 135M models on this machine
    python benchmarks/scoring.py --model FOLDER --data text.jsonl chat.jsonl.gz   # a model and real rows of your own
    python benchmarks/scoring.py --sizes 1b --bf16 --rows 2048                    # on a GPU

The script takes the rows as they come, `--batch` at a time, pads them on the right to the longest, and sums the cross entropy
of `model(**batch).logits`. Ours is the loop of `Scorer`. Both get the same token ids and labels, and the sums of each row must
agree. On a GPU, "trunk" is the forward of the model without its head on as many tokens in full rows without padding: no exact
scoring can be faster than that. Ratios are medians over the rounds, in which the contenders take turns; memory is the peak of a
process that runs one of them alone.
"""

import argparse
import contextlib
import platform
import random
import statistics
import sys
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path

import common


CONTENDERS = ("script", "Scorer", "trunk")


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sizes", nargs="+", default=["tiny", "135m"], choices=list(common.SHAPES), help="random weights"
    )
    parser.add_argument("--model", help="folder or Hub id, in place of --sizes; with --data")
    parser.add_argument("--data", nargs="+", help="JSON lines, each file of one format, in place of synthetic rows")
    parser.add_argument("--rows", type=int, default=64, help="rows, drawn at random")
    parser.add_argument("--tokens", type=int, default=1024, help="most tokens of a row")
    parser.add_argument("--batch", type=int, default=8, help="rows a batch of the script")
    parser.add_argument("--batch_tokens", type=int, default=8192, help="tokens a batch of ours, with padding")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, help="all; without a GPU, not the trunk")
    parser.add_argument("--no_memory", action="store_true", help="times only")
    parser.add_argument("--memory_of", choices=CONTENDERS, help=argparse.SUPPRESS)
    common.add_json(parser)
    parser.set_defaults(load_in_4bit=False)
    return parser


# ---------------------------------------------------------------- model and rows


def make_model(shape: str, args):
    import torch
    from transformers import AutoModelForCausalLM

    if args.model is None:
        return common.make_model(shape, args).eval()
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(common.device()).eval()


def synthetic_rows(shape: str, args) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels, with lengths and shares of scored tokens as in instruction data."""
    rng = random.Random(0)
    rows = []
    for _ in range(args.rows):
        number = min(max(16, round(rng.lognormvariate(5.1, 0.75))), args.tokens)
        ids = common.random_ids(rng, shape, number)
        prompt = int(number * rng.uniform(0.2, 0.9))
        rows.append((ids, [-100] * prompt + ids[prompt:]))
    return rows


@cache
def real_rows(model: str, files: tuple[str, ...], number: int, tokens: int):
    """Token ids and labels of rows drawn from the files, as TRL prepares them for training, and the seconds of that."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    from trl_ift.data.scoring import RowOptions, _prepare

    tokenizer = AutoTokenizer.from_pretrained(model)
    read = [list(load_dataset("json", data_files=file, split="train")) for file in files]
    pool = [(source, row) for source, rows in enumerate(read) for row in rows]
    rng = random.Random(0)
    pool = rng.sample(pool, min(number, len(pool)))
    prepared, start = [], time.perf_counter()
    for source in range(len(files)):  # rows of one kind at a time
        rows = [row for origin, row in pool if origin == source]
        prepared += _prepare(rows, tokenizer, RowOptions(max_length=tokens)) if rows else []
    seconds = time.perf_counter() - start
    prepared = [row for row in prepared if row is not None]
    rng.shuffle(prepared)
    return prepared, seconds


def make_rows(shape: str, args):
    """Token ids and labels of the rows, and the seconds of their preparation (synthetic rows need none)."""
    if args.data is None:
        return synthetic_rows(shape, args), None
    return real_rows(args.model, tuple(args.data), args.rows, args.tokens)


# ---------------------------------------------------------------- contenders


def script(model, rows, args) -> list[float]:
    """The summed negative log-likelihood of each row, as one writes it first."""
    import torch
    import torch.nn.functional as F

    sums: list[float] = []
    for start in range(0, len(rows), args.batch):
        batch = rows[start : start + args.batch]
        length = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in batch])
        labels = torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in batch]).to(model.device)
        mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in batch])
        with torch.no_grad():
            logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
            nll = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
        sums += nll.view(len(batch), -1).sum(1).tolist()
    return sums


def ours(model, rows, args) -> list[float]:
    from trl_ift.data.inference import lent, sequence_log_probs

    with lent(model):
        return [-value for value in sequence_log_probs(model, rows, args.batch_tokens, 0)]


def trunk(model, rows, args) -> None:
    """The forward without head and padding: all tokens in rows of their mean length, batches of our size."""
    import torch

    length = sum(len(ids) for ids, _ in rows) // len(rows)
    tokens = [token for ids, _ in rows for token in ids]
    ids = torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length).to(model.device)
    with torch.no_grad():
        for batch in ids.split(max(1, args.batch_tokens // length)):
            model.base_model(input_ids=batch, use_cache=False)


def make_step(contender: str, shape: str, args, model=None):
    """Return a function that scores all rows."""
    model = make_model(shape, args) if model is None else model
    rows, _ = make_rows(shape, args)
    function = {"script": script, "Scorer": ours, "trunk": trunk}[contender]
    return lambda: function(model, rows, args)


def padding(contender: str, lengths: list[int], args) -> float:
    """Share of padding among the tokens that the model reads."""
    from trl_ift.data.inference import LIKE, batches

    if contender == "trunk":
        return 0.0
    if contender == "script":
        parts = [lengths[start : start + args.batch] for start in range(0, len(lengths), args.batch)]
    else:
        parts = [[lengths[index] for index in batch] for batch in batches(lengths, args.batch_tokens, LIKE)]
    return 1 - sum(lengths) / sum(len(part) * max(part) for part in parts)


# ---------------------------------------------------------------- measuring and printing


def check_sums(sums: dict[str, list[float]], args) -> None:
    """Raise unless both give each row the same sum."""
    tolerance = 2e-2 if args.bf16 else 1e-3
    if {"script", "Scorer"} <= sums.keys():
        pairs = list(zip(sums["script"], sums["Scorer"], strict=True))
        worst = max(abs(a - b) / max(abs(a), 1e-6) for a, b in pairs if a or b)
        if worst > tolerance:
            raise AssertionError(f"the sums of script and Scorer differ by {worst:.2g}, relative")


def measure_time(shape: str, args) -> dict[str, list[float]]:
    model = make_model(shape, args)
    steps = {name: make_step(name, shape, args, model) for name in args.contenders}
    check_sums({name: step() for name, step in steps.items() if name != "trunk"}, args)
    return common.alternate(steps, args.rounds)


def print_setting(args) -> None:
    import torch

    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"
    print(f"{machine}, {args.threads} thread(s); torch {torch.__version__}, transformers {version('transformers')}")
    print(f"{'bf16' if args.bf16 else 'fp32'}; script: {args.batch} rows a batch, ours: {args.batch_tokens} tokens a batch; "
          f"median of {args.rounds} rounds\n")  # fmt: skip


def describe(shape: str, rows) -> str:
    lengths = sorted(len(ids) for ids, _ in rows)
    scored = sum(label != -100 for _, labels in rows for label in labels[1:])
    return (
        f"{shape}: {len(rows)} rows, {sum(lengths)} tokens ({scored / sum(lengths):.0%} scored); lengths from {lengths[0]}, "
        f"median {lengths[len(lengths) // 2]}, to {lengths[-1]}"
    )


def main() -> None:
    parser = options()
    args = parser.parse_args()
    if bool(args.data) != bool(args.model):
        parser.error("--model and --data go together: the rows are read with the tokenizer of the model")
    import torch

    torch.set_num_threads(args.threads)
    args.contenders = args.contenders or CONTENDERS[: 3 if torch.cuda.is_available() else 2]
    if args.memory_of:
        common.print_peak_memory(lambda: make_step(args.memory_of, args.sizes[0], args))
        return
    print_setting(args)
    head = ("model", "contender", "rows/s", "tokens/s", "x script", "padding", "peak MiB", "x script")
    table, notes = [], []
    for shape in [args.model] if args.model else args.sizes:
        with contextlib.redirect_stdout(sys.stderr):
            rows, preparation = make_rows(shape, args)
            seconds = measure_time(shape, args)
            memory = {}
            if not args.no_memory:
                same = () if args.model else ("--sizes", shape)
                memory = {name: common.measure_memory(name, *same) for name in seconds if name != "trunk"}
        lengths, shape = [len(ids) for ids, _ in rows], Path(shape).name
        notes.append(describe(shape, rows))
        for name, times in seconds.items():
            median = statistics.median(times)
            speed = f"{1 / common.ratio(times, seconds['script']):.2f}" if "script" in seconds else "-"
            table.append((
                shape, name, f"{len(rows) / median:.3g}", f"{sum(lengths) / median:.0f}", speed,
                f"{padding(name, lengths, args):.0%}", *common.memory_columns(memory.get(name), memory.get("script")),
            ))  # fmt: skip
            if preparation is not None:
                share = preparation / (preparation + median)
                notes.append(f"{name}: tokenization ({preparation:.2g} s) is {share:.1%} of tokenization and scoring")
        if {"trunk", "Scorer"} <= seconds.keys():
            share = common.ratio(seconds["trunk"], seconds["Scorer"])
            notes.append(f"{shape}: Scorer runs at {share:.0%} of the speed of the trunk alone")
    common.print_head(*head)
    for row in table:
        common.print_row(*row)
    print("\n" + "\n".join(notes))
    common.write_json(args)


if __name__ == "__main__":
    main()
