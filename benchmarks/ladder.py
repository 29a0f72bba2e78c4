"""From TRL's default DPO step to ours, one lever at a time: time, peak memory, floating-point operations.

    python benchmarks/ladder.py                                                        # tiny and 135M models on this machine
    python benchmarks/ladder.py --sizes 135m --tokens 128 --batch 2 --rounds 7
    python benchmarks/ladder.py --sizes 1b 8b --bf16 --lora --load_in_4bit --tokens 2048    # on a GPU

Each rung adds its lever to those above it. The first is `trl.DPOTrainer` as it comes: a live reference, gradient checkpointing,
a head that scores all positions (on a CPU). The rungs up to the shared prompts compute the same: their losses must agree in the
first two steps, the second of which depends on the gradients. Options that are given for the whole run (`--lora`, `--bf16`) are
no rungs. A step is that of `preference.py`; the rungs take turns, and memory is the peak of a process that runs one alone.

"x floor" is what a step computes, as a multiple of a forward and a backward of the plain model on the same padded sequences
with its head on the labelled positions, all weights trained: checkpointing computes more, shared prompts and LoRA compute less.
MFU is the floor over the time and the peak of the device, where that is known.
"""

import contextlib
import copy
import math
import statistics
import sys
from argparse import Namespace
from functools import partial

import common
import preference


STORED = "base precomputed"
# Rung: contender of `preference.py`, and the options that it sets
RUNGS = {
    "TRL's default": ("DPO", {"checkpointing": True}),
    "stored reference": ("DPO precomputed", {"checkpointing": True}),
    "no checkpointing": ("DPO precomputed", {}),
    "labelled positions": (STORED, {}),
    "shared prompts": (f"{STORED}{preference.SHARED}", {}),
    "LoRA": (f"{STORED}{preference.SHARED}", {"lora": True}),
    "bf16": (f"{STORED}{preference.SHARED}", {"lora": True, "bf16": True}),
}
# Dense bfloat16 peaks of the data sheets, in floating-point operations a second
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}


def rung_options(rung: str, args) -> Namespace:
    return Namespace(**vars(args) | RUNGS[rung][1])


def rungs_of(args) -> list[str]:
    """The rungs asked for, without those whose lever is set for the whole run."""
    given = {"LoRA": args.lora, "bf16": args.bf16}
    return [rung for rung in args.contenders if not given.get(rung)]


def make_step(rung: str, shape: str, args, model=None, optimizer=None):
    return preference.make_step(RUNGS[rung][0], shape, rung_options(rung, args), model, optimizer)


def make_steps(shape: str, args) -> tuple[dict, dict[str, list[float]]]:
    """A step of each rung, and its first two losses. Rungs that train all of the same weights share them."""
    import torch

    steps, losses, models = {}, {}, {}
    for rung in rungs_of(args):
        options = rung_options(rung, args)
        kind = (options.lora, options.bf16)
        if kind not in models:
            models[kind] = common.make_model(shape, options)
        weights = list(models[kind].parameters())
        model = copy.deepcopy(models[kind], {id(weight): weight for weight in weights})
        if options.lora:
            steps[rung] = make_step(rung, shape, args, model)
            losses[rung] = [steps[rung](), steps[rung]()]
            continue
        start = [weight.detach().clone() for weight in weights]
        optimizer = models.setdefault((*kind, "optimizer"), torch.optim.AdamW(weights, lr=1e-5, fused=True))
        steps[rung] = make_step(rung, shape, args, model, optimizer)
        losses[rung] = [steps[rung](), steps[rung]()]
        with torch.no_grad():  # the next one starts there, too
            for weight, value in zip(weights, start, strict=True):
                weight.copy_(value)
        optimizer.state.clear()
    return steps, losses


def check_losses(losses: dict[str, list[float]], args) -> None:
    """Raise unless the rungs of the same weights compute the same."""
    groups: dict[tuple[bool, bool], list[str]] = {}
    for rung in losses:
        options = rung_options(rung, args)
        groups.setdefault((options.lora, options.bf16), []).append(rung)
    tolerance = 2e-2 if args.bf16 else 1e-4
    for first, *others in groups.values():
        for rung in others:
            for one, other in zip(losses[first], losses[rung], strict=True):
                if not math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance):
                    raise AssertionError(f"{first} and {rung} disagree: {losses[first]}, {losses[rung]}")


def count_floor(shape: str, args) -> int:
    """Operations of the forward and the backward that no step on these sequences can do without."""
    from flops import floor_of, flops

    options = Namespace(**vars(args) | {"lora": False, "load_in_4bit": False})
    trainer = preference.make_trainer(STORED, shape, options, common.make_model(shape, options))
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    forward = floor_of(trainer.model, batch)
    return flops(lambda: forward().backward())


def measure(shape: str, args) -> list[tuple]:
    """The rows of a size: rung, seconds a step, multiples of the first and of the rung above, memory, operations, MFU."""
    from flops import flops

    floor = count_floor(shape, args)
    steps, losses = make_steps(shape, args)
    check_losses(losses, args)
    counted = {rung: flops(step) for rung, step in steps.items()}
    seconds = common.alternate(steps, args.rounds)
    steps.clear()
    memory = {}
    if not args.no_memory:
        memory = {rung: common.measure_memory(rung, "--sizes", shape) for rung in seconds}
    peak = next((value for name, value in PEAKS.items() if name in common.machine()), None)
    rows, first, above = [], next(iter(seconds)), next(iter(seconds))
    for rung, times in seconds.items():
        median = statistics.median(times)
        bf16 = rung_options(rung, args).bf16
        rows.append((
            shape, rung, f"{median:.3g}", f"{common.ratio(times, seconds[first]):.2f}",
            f"{common.ratio(times, seconds[above]):.2f}", *common.memory_columns(memory.get(rung), memory.get(first)),
            f"{counted[rung] / floor:.2f}", f"{floor / median / peak:.0%}" if peak and bf16 else "-",
        ))  # fmt: skip
        above = rung
    return rows


def main() -> None:
    options = common.parser(__doc__.splitlines()[0], list(RUNGS), "pairs")
    args = common.parse(options)
    if args.checkpointing:
        options.error("--checkpointing is a rung")
    if args.memory_of:
        common.print_peak_memory(partial(make_step, args.memory_of, args.sizes[0], args))
        return
    common.print_setting(args, "pairs")
    head = ("model", "rung", "s/step", "x first", "x rung above", "peak MiB", "x first", "x floor", "MFU")
    common.print_head(*head)
    for shape in args.sizes:
        with contextlib.redirect_stdout(sys.stderr):
            rows = measure(shape, args)
        for row in rows:
            common.print_row(*row)
    common.write_json(args)


if __name__ == "__main__":
    main()
