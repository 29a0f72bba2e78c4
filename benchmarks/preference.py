"""Preference trainers beside TRL's: seconds and peak memory of a training step, alternating in one process.

    python benchmarks/preference.py                                           # tiny and 135M models on this machine
    python benchmarks/preference.py --sizes 1b --bf16 --lora --tokens 2048    # on a GPU
    python benchmarks/preference.py --prompt_share 0.9 --contenders DPO base  # long prompts, short responses

All contenders start from the same model and see the same pairs. A step is what `Trainer.train` does with a collated batch:
`get_batch_samples`, `training_step` (loss, metrics, backward), AdamW. Times are medians over rounds of the ratio to the first
contender's step of the same round. The second table has them for each of our trainers beside its counterpart in TRL; the losses
of the two must agree in the first two steps. While times are taken, all contenders train the same weights (LoRA: adapters of
their own on the same weights), so that all of them fit. Memory is the peak of a process that runs one contender alone.
"""

import contextlib
import copy
import math
import random
import statistics
import sys
from functools import partial

import common


# Name: trainer, options
CONTENDERS = {
    "DPO": ("trl.DPOTrainer", {}),
    "base": ("trl_ift.PreferenceTrainer", {}),
    "base all positions": ("trl_ift.PreferenceTrainer", {}),
    "DPO precomputed": ("trl.DPOTrainer", {"precompute_ref_log_probs": True}),
    "base precomputed": ("trl_ift.PreferenceTrainer", {"precompute_ref_log_probs": True}),
    "MPO": ("trl_ift.MPOTrainer", {"reg_weight": 0.0}),
    "MPO with samples": ("trl_ift.MPOTrainer", {}),
    "TRL TPO": ("trl.experimental.tpo.TPOTrainer", {}),
    "TPO": ("trl_ift.TPOTrainer", {}),
    "CPO": ("trl.experimental.cpo.CPOTrainer", {"beta": 0.1}),
    "TPO gold=chosen": ("trl_ift.TPOTrainer", {"beta": 0.1, "gold_from": "chosen"}),
}
# Ours, TRL's
COUNTERPARTS = {
    "base": "DPO",
    "base all positions": "DPO",
    "base precomputed": "DPO precomputed",
    "TPO": "TRL TPO",
    "TPO gold=chosen": "CPO",
}


def make_rows(shape: str, args) -> list[dict]:
    """Pairs of varied length, `--prompt_share` of it prompt, with two more responses of such lengths."""
    rng = random.Random(0)
    rows = []
    for index in range(args.batch):
        total = common.length(rng, index, args.tokens) - 1  # the trainers add the end of the sequence
        prompt = max(1, int(total * args.prompt_share))
        longest = max(1, total - prompt)
        lengths = {"prompt": prompt, "chosen": longest}
        lengths |= {name: rng.randint((3 * longest + 3) // 4, longest) for name in ("rejected", "reference", "sample")}
        row = {}
        for name, number in lengths.items():
            words = [f"w{token}" for token in common.random_ids(rng, shape, number)]
            row[name] = " ".join(words) if name == "prompt" else " " + " ".join(words)
        rows.append(row)
    return rows


def make_trainer(contender: str, shape: str, args, model):
    from importlib import import_module

    from datasets import Dataset

    name, options = CONTENDERS[contender]
    module, name = name.rsplit(".", 1)
    module = import_module(module)
    trainer, config = getattr(module, name), getattr(module, name.replace("Trainer", "Config"))
    if contender == "base all positions":
        trainer = type(name, (trainer,), {"_labelled_positions_only": False})
    rows = Dataset.from_list(make_rows(shape, args))
    columns = ["prompt", "chosen", "rejected"] + (["reference"] if "TPO" in contender else [])
    more = {}
    if contender == "MPO with samples":
        more["reg_dataset"] = rows.select_columns(["prompt", "sample"]).rename_column("sample", "completion")
    if contender == "DPO" and not args.lora:
        more["ref_model"] = copy.deepcopy(model)
    settings = common.training_arguments(args, **options)
    if contender == "CPO":  # it cuts at 512 for `None`
        settings |= {"max_length": args.tokens + 1, "remove_unused_columns": False}
    return trainer(
        model=model,
        args=config(**settings),
        train_dataset=rows.select_columns(columns),
        processing_class=common.make_tokenizer(shape),
        peft_config=common.lora(args),
        **more,
    )


def make_step(contender: str, shape: str, args, model=None, optimizer=None):
    """Return a function that runs one optimizer step and returns its loss."""
    import torch

    trainer = make_trainer(contender, shape, args, common.make_model(shape, args) if model is None else model)
    if args.checkpointing:
        trainer.model.gradient_checkpointing_enable()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.current_gradient_accumulation_steps = 1
    trained = trainer.accelerator.prepare(trainer.model)
    if optimizer is None:
        optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step() -> float:
        (inputs,), items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
        loss = trainer.training_step(trained, dict(inputs), items)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        trainer.state.global_step += 1
        return loss.item()  # waits for the device

    return step


def check_losses(losses: dict[str, list[float]], args) -> None:
    """Raise unless ours and TRL's compute the same: the loss of the second step depends on the gradients of the first."""
    tolerance = 2e-2 if args.bf16 else 1e-4
    for ours, theirs in COUNTERPARTS.items():
        if {ours, theirs} <= losses.keys():
            for mine, other in zip(losses[ours], losses[theirs], strict=True):
                if not math.isclose(mine, other, rel_tol=tolerance, abs_tol=tolerance):
                    raise AssertionError(f"{ours} and {theirs} disagree: {losses[ours]}, {losses[theirs]}")


def measure_time(shape: str, args) -> dict[str, list[float]]:
    import torch

    model = common.make_model(shape, args)
    weights = list(model.parameters())
    start = [] if args.lora else [weight.detach().clone() for weight in weights]
    optimizer = None if args.lora else torch.optim.AdamW(weights, lr=1e-5, fused=True)
    steps, losses = {}, {}
    for name in args.contenders:
        shared = copy.deepcopy(model, {id(weight): weight for weight in weights})
        steps[name] = make_step(name, shape, args, shared, optimizer)
    for name, step in steps.items():  # the warm-up, each from the start
        with torch.no_grad():
            for weight, value in zip(weights, start, strict=False):
                weight.copy_(value)
        if optimizer is not None:
            optimizer.state.clear()
        losses[name] = [step(), step()]
    check_losses(losses, args)
    return common.alternate(steps, args.rounds)


def main() -> None:
    args = common.parse(common.parser(__doc__.splitlines()[0], CONTENDERS, "pairs"))
    if args.memory_of:
        common.print_peak_memory(partial(make_step, args.memory_of, args.sizes[0], args))
        return
    common.print_setting(args, "pairs")
    first = args.contenders[0]
    common.print_head("model", "contender", "s/step", f"x {first}", "pairs/s", "peak MiB", f"x {first}")
    beside = []
    for shape in args.sizes:
        with contextlib.redirect_stdout(sys.stderr):
            seconds = measure_time(shape, args)
            memory = {}
            if not args.no_memory:
                memory = {name: common.measure_memory(name, "--sizes", shape) for name in seconds}
        for name, times in seconds.items():
            median = statistics.median(times)
            common.print_row(
                shape, name, f"{median:.3g}", f"{common.ratio(times, seconds[first]):.2f}",
                f"{args.batch / median:.3g}", *common.memory_columns(memory.get(name), memory.get(first)),
            )  # fmt: skip
        for ours, theirs in COUNTERPARTS.items():
            if {ours, theirs} <= seconds.keys():
                time = f"{common.ratio(seconds[ours], seconds[theirs]):.2f}"
                peak = common.memory_columns(memory.get(ours), memory.get(theirs))[1]
                beside.append((shape, ours, theirs, time, peak))
    print()
    common.print_head("model", "ours", "TRL's", "x time", "x memory")
    for row in beside:
        common.print_row(*row)


if __name__ == "__main__":
    main()
