"""IFT beside SFT: seconds and peak memory of a training step, same model, same batches, alternating in one process.

    python benchmarks/ift.py                                  # tiny and 135M models, padded and packed, on this machine
    python benchmarks/ift.py --sizes 1b --lora --tokens 2048  # on a GPU

Contenders: `trl.SFTTrainer`; `IFTTrainer`; `IFTTrainer` with lambda 0; and a naive IFT written below: two ordinary forwards
with full logits, and a T x T propagation matrix. A step is the loss, its backward and AdamW. Times are medians over rounds of
the ratio to SFT's step of the same round. Memory is the peak of a process that runs one contender alone.
"""

import contextlib
import copy
import math
import random
import statistics
import sys

import common


CONTENDERS = ("SFT", "IFT", "IFT lambda=0", "naive IFT")


def make_rows(shape: str, args) -> list[dict]:
    """Documents of varied length; `--prompt_share` of each is prompt."""
    rng = random.Random(0)
    rows = []
    for index in range(args.batch):
        ids = common.random_ids(rng, shape, common.length(rng, index, args.tokens))
        prompt = int(len(ids) * args.prompt_share)
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def naive_loss(model, inputs, ift_lambda=0.2, gamma=0.95):
    """IFT as the obvious script writes it; rows must be padded or one packed row with `position_ids`."""
    import torch

    ids, labels = inputs["input_ids"], inputs["labels"]
    extra = {name: inputs[name] for name in ("attention_mask", "position_ids") if name in inputs}
    embed = model.get_input_embeddings()
    with torch.no_grad():
        guesses = model(input_ids=ids, use_cache=False, **extra).logits.argmax(-1)
    predicted = torch.cat([ids[:, :1], guesses[:, :-1]], 1)
    predicted = torch.where(labels == -100, ids, predicted)
    fused = (1 - ift_lambda) * embed(ids) + ift_lambda * embed(predicted)
    logits = model(inputs_embeds=fused, use_cache=False, **extra).logits.float()
    targets = labels[:, 1:]
    mask = targets != -100
    log_probs = logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    nll = torch.where(mask, -log_probs, 0.0)
    if "position_ids" in inputs:
        documents = (inputs["position_ids"] == 0).cumsum(-1)[:, :-1]
    else:
        documents = torch.zeros_like(targets)
    steps = torch.arange(targets.size(1), device=ids.device)
    distance = steps[None, :] - steps[:, None]
    matrix = torch.where(distance >= 0, gamma ** distance.clamp(min=0).float(), 0.0)
    matrix = matrix * (documents[:, :, None] == documents[:, None, :])
    scores = (matrix @ nll[..., None]).squeeze(-1) * mask
    losses = []
    for row in range(ids.size(0)):
        for document in documents[row].unique():
            inside = (documents[row] == document) & mask[row]
            if inside.any():
                reach = scores[row][inside]
                losses.append((reach * nll[row][inside]).sum() / reach.sum().detach())
    return torch.stack(losses).mean()


def make_step(contender: str, shape: str, layout: str, args, model=None):
    """Return a function that runs one optimizer step and returns its loss."""
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from trl_ift import IFTConfig, IFTTrainer

    rows = make_rows(shape, args)
    settings = common.training_arguments(args, padding_free=layout == "packed")
    is_ift = contender.startswith("IFT")
    if contender == "IFT lambda=0":
        settings["ift_lambda"] = 0.0
    trainer = (IFTTrainer if is_ift else SFTTrainer)(
        model=common.make_model(shape, args) if model is None else model,
        args=(IFTConfig if is_ift else SFTConfig)(**settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=common.make_tokenizer(shape),
        peft_config=common.lora(args),
    )
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    trained = trainer.model
    trained.train()
    if args.checkpointing:
        trained.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-5)
    items = (batch["labels"][:, 1:] != -100).sum()
    documents = torch.tensor(len(rows), device=items.device)

    def step() -> float:
        autocast = torch.autocast(common.device(), torch.bfloat16, enabled=args.bf16)
        with trainer.compute_loss_context_manager(), autocast:
            if contender == "naive IFT":
                loss = naive_loss(trained, batch)
            else:
                loss = trainer.compute_loss(trained, dict(batch), num_items_in_batch=documents if is_ift else items)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device

    return step


def measure_time(shape: str, layout: str, args) -> dict[str, list[float]]:
    first = common.make_model(shape, args)
    steps = {name: make_step(name, shape, layout, args, copy.deepcopy(first)) for name in args.contenders}
    losses = {name: step() for name, step in steps.items()}  # warm-up; IFT and its naive form must agree
    if {"IFT", "naive IFT"} <= losses.keys() and not math.isclose(
        losses["IFT"], losses["naive IFT"], rel_tol=0, abs_tol=2e-2 if args.bf16 else 1e-4
    ):
        raise AssertionError(f"IFT and its naive form disagree: {losses}")
    return common.alternate(steps, args.rounds)


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0], CONTENDERS, "documents")
    parser.add_argument("--layouts", nargs="+", default=["padded", "packed"], choices=["padded", "packed"])
    args = common.parse(parser)
    if args.memory_of:
        common.print_peak_memory(lambda: make_step(args.memory_of, args.sizes[0], args.layouts[0], args))
        return
    common.print_setting(args, "documents")
    first = args.contenders[0]
    common.print_head("model", "layout", "contender", "s/step", f"x {first}", "tokens/s", "peak MiB", f"x {first}")
    for shape in args.sizes:
        tokens = sum(len(row["input_ids"]) for row in make_rows(shape, args))
        for layout in args.layouts:
            with contextlib.redirect_stdout(sys.stderr):
                seconds = measure_time(shape, layout, args)
                memory = {}
                if not args.no_memory:
                    memory = {n: common.measure_memory(n, "--sizes", shape, "--layouts", layout) for n in seconds}
            for name, times in seconds.items():
                median = statistics.median(times)
                common.print_row(
                    shape, layout, name, f"{median:.3g}", f"{common.ratio(times, seconds[first]):.2f}",
                    f"{tokens / median:.0f}", *common.memory_columns(memory.get(name), memory.get(first)),
                )  # fmt: skip
    common.write_json(args)


if __name__ == "__main__":
    main()
