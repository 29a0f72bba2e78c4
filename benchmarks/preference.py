"""Preference trainers beside TRL's: seconds and peak memory of a training step, alternating in one process.

    python benchmarks/preference.py                                           # tiny and 135M models on this machine
    python benchmarks/preference.py --sizes 1b --bf16 --lora --tokens 2048    # on a GPU
    python benchmarks/preference.py --prompt_share 0.9 --contenders DPO base  # long prompts, short responses
    python benchmarks/preference.py --family                                  # the related methods, beside the base
    python benchmarks/preference.py --shared_prompt --prompt_share 0.75       # one prompt a pair, beside padded rows

All contenders start from the same model and see the same pairs. A step is what `Trainer.train` does with a collated batch:
`get_batch_samples`, `training_step` (loss, metrics, backward), AdamW. Times are medians over rounds of the ratio to the first
contender's step of the same round. The second table has them for each of our trainers beside its counterpart in TRL; the losses
of the two must agree in the first two steps. With `--family`, it has the related methods beside what they add their mathematics
to; with `--shared_prompt`, trainers that compute the prompt of a pair once beside the same on padded rows. While times are
taken, all contenders train the same weights (LoRA: adapters of their own on the same weights), so that all of them fit. Memory
is the peak of a process that runs one contender alone.
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
STORED = {"precompute_ref_log_probs": True}
# The related methods, in the order of the registry
FAMILY = {
    "DPOP": ("trl_ift.DPOPTrainer", STORED),
    "MinorDPO": ("trl_ift.MinorDPOTrainer", STORED),
    "chi-PO": ("trl_ift.ChiPOTrainer", STORED),
    "regularized PO": ("trl_ift.RegularizedPOTrainer", STORED),
    "regularized PO, token_mean": ("trl_ift.RegularizedPOTrainer", {"rpo_normalization": "token_mean", **STORED}),
    "soft labels": ("trl_ift.SoftLabelPOTrainer", STORED),
    "Ada-DPO": ("trl_ift.AdaDPOTrainer", STORED),
    "Ada-DPO, quadratic": ("trl_ift.AdaDPOTrainer", {"tau_penalty": "quadratic", **STORED}),
    "ASFT": ("trl_ift.AlignedSFTTrainer", {}),
    "TIS-DPO": ("trl_ift.TISDPOTrainer", STORED),
    "relative PO": ("trl_ift.RelativePOTrainer", STORED),
    "MRPO": ("trl_ift.MRPOTrainer", STORED),
    "SPO-style": ("trl_ift.SelfSupervisedPOTrainer", STORED),
    "FIGA": ("trl_ift.FIGATrainer", {}),
    "FPO": ("trl_ift.FPOTrainer", {"fpo_top_k": 8}),
    "EXO": ("trl_ift.EXOTrainer", {}),
    "EXO, 4 responses": ("trl_ift.EXOTrainer", {}),
    "KTO": ("trl.KTOTrainer", {"loss_type": "apo_zero_unpaired", **STORED}),
    "ULMA": ("trl_ift.ULMATrainer", STORED),
    "UFT": ("trl_ift.UFTTrainer", STORED),
}
# A method of the family, what its cost is compared with if not the base with stored log-probs
BESIDE = {"ASFT": "CPO", "FIGA": "CPO", "FPO": "base", "ULMA": "KTO", "UFT": "KTO"}
# With it, a contender computes the prompt of a pair once; those that are compared with themselves without it
SHARED = ", shared prompt"
SHARED_CONTENDERS = ("base", "base precomputed", "TPO", "EXO, 4 responses")
# Ours, what must have the same losses and is compared with it
COUNTERPARTS = {
    "base": "DPO",
    "base all positions": "DPO",
    "base precomputed": "DPO precomputed",
    "TPO": "TRL TPO",
    "TPO gold=chosen": "CPO",
    **{f"{name}{SHARED}": name for name in SHARED_CONTENDERS},
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


def data_of(contender: str, rows: list[dict]) -> tuple[list[dict], list[str]]:
    """The rows that a contender trains on, and their columns."""
    import torch

    pairs = ["prompt", "chosen", "rejected"]
    if "TPO" in contender:
        return rows, [*pairs, "reference"]
    if contender in ("KTO", "ULMA", "UFT"):
        unpaired = [
            {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
            for row in rows
            for kind in ("chosen", "rejected")
        ]
        return unpaired, ["prompt", "completion", "label"]
    for index, row in enumerate(rows):
        if contender == "EXO, 4 responses":
            row["completions"] = [row[name] for name in ("chosen", "rejected", "reference", "sample")]
            row["rewards"] = [1.0, 0.0, 0.4, 0.6]
        if contender == "soft labels":
            row["soft_label"] = 0.5 + 0.1 * (index % 6)
        if contender == "TIS-DPO":  # a word is a token, and the end of the sequence is one
            row |= {f"{kind}_weights": [1.0] * (len(row[kind].split()) + 1) for kind in ("chosen", "rejected")}
        if contender == "relative PO":
            row["prompt_embedding"] = torch.randn(384, generator=torch.Generator().manual_seed(index)).tolist()
        if contender == "SPO-style":  # key phrases end at stop words
            for kind in ("chosen", "rejected"):
                words = row[kind].split()
                row[kind] = " " + " ".join("the" if i % 3 == 2 else word for i, word in enumerate(words))
        if contender == "MRPO":
            row |= {"ref1_chosen_logps": -500.0 - index, "ref1_rejected_logps": -510.0}
    if contender == "EXO, 4 responses":
        return rows, ["prompt", "completions", "rewards"]
    own = {"soft labels": ["soft_label"], "TIS-DPO": ["chosen_weights", "rejected_weights"],
           "relative PO": ["prompt_embedding"], "MRPO": ["ref1_chosen_logps", "ref1_rejected_logps"]}  # fmt: skip
    return rows, pairs + own.get(contender, [])


def make_trainer(contender: str, shape: str, args, model):
    from importlib import import_module

    from datasets import Dataset

    shared = {"shared_prompt": True} if contender.endswith(SHARED) else {}
    contender = contender.removesuffix(SHARED)
    name, options = {**CONTENDERS, **FAMILY}[contender]
    module, name = name.rsplit(".", 1)
    module = import_module(module)
    trainer, config = getattr(module, name), getattr(module, name.replace("Trainer", "Config"))
    if contender == "base all positions":
        trainer = type(name, (trainer,), {"_labelled_positions_only": False})
    rows, columns = data_of(contender, make_rows(shape, args))
    rows = Dataset.from_list(rows)
    more = {}
    if contender == "MPO with samples":
        more["reg_dataset"] = rows.select_columns(["prompt", "sample"]).rename_column("sample", "completion")
    if contender == "DPO" and not args.lora:
        more["ref_model"] = copy.deepcopy(model)
    if contender == "FPO":
        more["sae"] = random_sae(model.config.hidden_size)
    settings = common.training_arguments(args, **options, **shared)
    if "completion" in columns:  # a pair is two rows
        settings["per_device_train_batch_size"] *= 2
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


def random_sae(width: int):
    """A sparse autoencoder with 8 features a number of the hidden state."""
    import torch

    from trl_ift.preference.sae import JumpReLUSAE

    generator = torch.Generator().manual_seed(0)
    encoder = torch.randn(width, 8 * width, generator=generator) / width**0.5
    return JumpReLUSAE(encoder, torch.zeros(8 * width), torch.full((8 * width,), 0.1))


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
    shared = [f"{name}{SHARED}" for name in SHARED_CONTENDERS]
    options = common.parser(__doc__.splitlines()[0], [*CONTENDERS, *FAMILY, *shared], "pairs")
    options.set_defaults(contenders=None)
    options.add_argument("--family", action="store_true", help="the related methods, beside the base")
    options.add_argument("--shared_prompt", action="store_true", help="one prompt a pair, beside padded rows")
    args = common.parse(options)
    sets = [name for name in ("contenders", "family", "shared_prompt") if getattr(args, name)]
    if len(sets) > 1 and not args.memory_of:
        options.error(f"--{sets[0]} and --{sets[1]} both say what is compared. Give one.")
    counterparts = COUNTERPARTS
    if args.family:
        args.contenders = ["base precomputed", "base", "CPO", *FAMILY]
        counterparts = {name: BESIDE.get(name, "base precomputed") for name in FAMILY if name != "KTO"}
    elif args.shared_prompt:
        args.contenders = [name for base in SHARED_CONTENDERS for name in (base, f"{base}{SHARED}")]
    elif not args.contenders:
        args.contenders = list(CONTENDERS)
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
        for ours, theirs in counterparts.items():
            if {ours, theirs} <= seconds.keys():
                time = f"{common.ratio(seconds[ours], seconds[theirs]):.2f}"
                peak = common.memory_columns(memory.get(ours), memory.get(theirs))[1]
                beside.append((shape, ours, theirs, time, peak))
    print()
    common.print_head("model", "ours", "beside", "x time", "x memory")
    for row in beside:
        common.print_row(*row)
    common.write_json(args)


if __name__ == "__main__":
    main()
