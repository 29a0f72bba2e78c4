"""IFT beside SFT: seconds and peak memory of a training step, same model, same batches, alternating in one process.

    python benchmarks/ift.py                                  # tiny and 135M models, padded and packed, on this machine
    python benchmarks/ift.py --sizes 1b --lora --tokens 2048  # on a GPU

Contenders: `trl.SFTTrainer`; `IFTTrainer`; `IFTTrainer` with lambda 0; and a naive IFT written below: two ordinary forwards
with full logits, and a T x T propagation matrix. A step is the loss, its backward and AdamW. Times are medians over rounds of
the ratio to SFT's step of the same round. Memory is the peak of a process that runs one contender alone.
"""

import argparse
import contextlib
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings


os.environ.setdefault("CI", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

SHAPES = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 128, "vocab_size": 1024, "tie_word_embeddings": True},
    "135m": {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
             "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True},
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
           "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
           "intermediate_size": 14336, "vocab_size": 128256, "tie_word_embeddings": False},
}  # fmt: skip
CONTENDERS = ("SFT", "IFT", "IFT lambda=0", "naive IFT")


def make_model(shape: str, device, dtype):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(max_position_embeddings=8192, pad_token_id=0, eos_token_id=1, **SHAPES[shape])
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype)


def make_rows(shape: str, args) -> list[dict]:
    """Documents of varied length; `--prompt_share` of each is prompt."""
    import random

    rng = random.Random(0)
    vocabulary = SHAPES[shape]["vocab_size"]
    rows = []
    for index in range(args.batch):
        # The first is full, the others between half and full, as in a batch grouped by length
        length = args.tokens if index == 0 else rng.randint(args.tokens // 2, args.tokens)
        ids = [rng.randrange(2, vocabulary) for _ in range(length)]
        prompt = int(length * args.prompt_share)
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
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    from trl_ift import IFTConfig, IFTTrainer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = make_model(shape, device, dtype) if model is None else model
    rows = make_rows(shape, args)
    words = {f"t{index}": index for index in range(4)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t2")), pad_token="t0", eos_token="t1"
    )
    settings = {
        "output_dir": tempfile.mkdtemp(), "report_to": "none", "use_cpu": device.type == "cpu", "bf16": args.bf16,
        "per_device_train_batch_size": args.batch, "max_length": None, "padding_free": layout == "packed",
        "gradient_checkpointing": False, "disable_tqdm": True, "logging_steps": 10**6,
    }  # fmt: skip
    is_ift = contender.startswith("IFT")
    if contender == "IFT lambda=0":
        settings["ift_lambda"] = 0.0
    trainer = (IFTTrainer if is_ift else SFTTrainer)(
        model=model,
        args=(IFTConfig if is_ift else SFTConfig)(**settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, target_modules="all-linear") if args.lora else None,
    )
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    trained = trainer.model
    trained.train()
    if args.checkpointing:
        trained.gradient_checkpointing_enable()
        if args.lora:
            trained.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-5)
    items = (batch["labels"][:, 1:] != -100).sum()
    documents = torch.tensor(len(rows), device=device)

    def step() -> float:
        with trainer.compute_loss_context_manager(), torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            if contender == "naive IFT":
                loss = naive_loss(trained, batch)
            else:
                loss = trainer.compute_loss(trained, dict(batch), num_items_in_batch=documents if is_ift else items)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device

    return step


def measure_time(shape: str, layout: str, args) -> dict[str, dict]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    first = make_model(shape, device, torch.bfloat16 if args.bf16 else torch.float32)
    steps = {name: make_step(name, shape, layout, args, copy.deepcopy(first)) for name in args.contenders}
    first_losses = {name: step() for name, step in steps.items()}  # warm-up; IFT and its naive form must agree
    if {"IFT", "naive IFT"} <= first_losses.keys():
        difference = abs(first_losses["IFT"] - first_losses["naive IFT"])
        if difference > (2e-2 if args.bf16 else 1e-4):
            raise AssertionError(f"IFT and its naive form disagree by {difference}")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for round_number in range(args.rounds):
        for name in order[round_number % len(order) :] + order[: round_number % len(order)]:
            start = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - start)
    tokens = sum(len(row["input_ids"]) for row in make_rows(shape, args))
    base = seconds[order[0]]
    return {
        name: {
            "seconds": statistics.median(times),
            "ratio": statistics.median(t / b for t, b in zip(times, base, strict=True)),
            "tokens_per_second": tokens / statistics.median(times),
        }
        for name, times in seconds.items()
    }


def measure_memory(contender: str, shape: str, layout: str, args) -> float:
    """Peak memory in MiB of two steps of one contender, in a process of its own (`--memory_of`)."""
    command = [sys.executable, __file__, "--memory_of", contender, "--sizes", shape, "--layouts", layout]
    for name in ("batch", "tokens", "prompt_share", "threads"):
        command += [f"--{name}", str(getattr(args, name))]
    command += [f"--{name}" for name in ("bf16", "lora", "checkpointing") if getattr(args, name)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def peak_memory(contender: str, shape: str, layout: str, args) -> float:
    import torch

    step = make_step(contender, shape, layout, args)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    step()
    step()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    # Not `ru_maxrss`, which a process inherits from the one that started it
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["tiny", "135m"], choices=list(SHAPES))
    parser.add_argument("--layouts", nargs="+", default=["padded", "packed"], choices=["padded", "packed"])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--batch", type=int, default=4, help="documents a batch")
    parser.add_argument("--tokens", type=int, default=256, help="longest document")
    parser.add_argument("--prompt_share", type=float, default=0.5, help="share of each document without labels")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 weights and autocast")
    parser.add_argument("--lora", action="store_true", help="LoRA r=16 on all linear layers")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--no_memory", action="store_true", help="times only")
    parser.add_argument("--memory_of", choices=CONTENDERS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    import torch

    torch.set_num_threads(args.threads)
    if args.memory_of:
        with contextlib.redirect_stdout(sys.stderr):
            peak = peak_memory(args.memory_of, args.sizes[0], args.layouts[0], args)
        print(json.dumps(peak))
        return
    from importlib.metadata import version

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"
    print(f"{device}, {args.threads} thread(s); torch {torch.__version__}, trl {version('trl')}, "
          f"transformers {version('transformers')}")  # fmt: skip
    print(f"batch {args.batch}, documents of up to {args.tokens} tokens, {args.prompt_share:.0%} prompt, "
          f"{'bf16' if args.bf16 else 'fp32'}{', LoRA' if args.lora else ''}"
          f"{', gradient checkpointing' if args.checkpointing else ''}, median of {args.rounds} rounds\n")  # fmt: skip
    print("| model | layout | contender | s/step | x SFT | tokens/s | peak MiB | x SFT |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for shape in args.sizes:
        for layout in args.layouts:
            with contextlib.redirect_stdout(sys.stderr):
                rows = measure_time(shape, layout, args)
                memory = {} if args.no_memory else {n: measure_memory(n, shape, layout, args) for n in rows}
            for name, row in rows.items():
                peak = memory.get(name)
                columns = [shape, layout, name, f"{row['seconds']:.3g}", f"{row['ratio']:.2f}",
                           f"{row['tokens_per_second']:.0f}", f"{peak:.0f}" if peak else "-",
                           f"{peak / memory[next(iter(rows))]:.2f}" if peak else "-"]  # fmt: skip
                print("| " + " | ".join(columns) + " |", flush=True)


if __name__ == "__main__":
    main()
