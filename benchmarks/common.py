"""What the benchmarks share: models, options, the clock, peak memory, the printed tables."""

import argparse
import contextlib
import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path


os.environ.setdefault("CI", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not sys.stderr.isatty():  # a log of tables, not of bars
    os.environ.setdefault("TQDM_DISABLE", "1")
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
# Ids of the special tokens; all others are words
SPECIAL = {"<pad>": 0, "<eos>": 1, "<unk>": 2}


# ---------------------------------------------------------------- options


def parser(description: str, contenders, unit: str) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--sizes", nargs="+", default=["tiny", "135m"], choices=list(SHAPES))
    options.add_argument("--contenders", nargs="+", default=list(contenders), choices=contenders)
    options.add_argument("--batch", type=int, default=4, help=f"{unit} a batch")
    options.add_argument("--tokens", type=int, default=256, help="most tokens a document (a prompt with its response)")
    options.add_argument("--prompt_share", type=float, default=0.5, help="share of each document without labels")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--threads", type=int, default=1, help="CPU threads")
    options.add_argument("--bf16", action="store_true", help="bfloat16 weights and autocast")
    options.add_argument("--lora", action="store_true", help="LoRA r=16 on all linear layers")
    options.add_argument(
        "--load_in_4bit", action="store_true", help="4-bit base weights; with --bf16 --lora, on a GPU"
    )
    options.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    options.add_argument("--no_memory", action="store_true", help="times only")
    add_json(options)
    options.add_argument("--memory_of", choices=contenders, help=argparse.SUPPRESS)
    return options


def add_json(options: argparse.ArgumentParser) -> None:
    options.add_argument("--json", metavar="FILE", help="write the tables there too, with versions and machine")


def parse(options: argparse.ArgumentParser) -> argparse.Namespace:
    args = options.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    if args.load_in_4bit and not (args.bf16 and args.lora and torch.cuda.is_available()):
        options.error("--load_in_4bit needs --bf16, --lora and a GPU")
    return args


def training_arguments(args, **more) -> dict:
    return {
        "output_dir": tempfile.mkdtemp(), "report_to": "none", "use_cpu": device() == "cpu", "bf16": args.bf16,
        "per_device_train_batch_size": args.batch, "max_length": None, "gradient_checkpointing": args.checkpointing,
        "disable_tqdm": True, "logging_steps": 10**6, **more,
    }  # fmt: skip


def lora(args):
    from peft import LoraConfig

    return LoraConfig(r=16, target_modules="all-linear") if args.lora else None


# ---------------------------------------------------------------- model and data


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def make_model(shape: str, args):
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(max_position_embeddings=8192, pad_token_id=0, eos_token_id=1, **SHAPES[shape])
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    with torch.device(device()):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if not args.load_in_4bit:
        return model
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quantization, dtype=dtype, device_map={"": 0}
        )


def make_tokenizer(shape: str):
    """One token a word, `w3`, `w4`, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(len(SPECIAL), SHAPES[shape]["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(SPECIAL | words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def length(rng: random.Random, index: int, longest: int) -> int:
    """The first is full, the others between half and full, as in a batch grouped by length."""
    return longest if index == 0 else rng.randint(longest // 2, longest)


def random_ids(rng: random.Random, shape: str, number: int) -> list[int]:
    return [rng.randrange(len(SPECIAL), SHAPES[shape]["vocab_size"]) for _ in range(number)]


# ---------------------------------------------------------------- measuring


def alternate(steps: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender's step in each round; they take turns, and another begins each round."""
    import torch

    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for number in range(rounds):
        first = number % len(order)
        for name in order[first:] + order[:first]:
            start = time.perf_counter()
            steps[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: list[float], base: list[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(t / b for t, b in zip(seconds, base, strict=True))


def measure_memory(contender: str, *options: str) -> float:
    """Peak memory in MiB of one contender, by this command line with `options`, in a process of its own."""
    command = [sys.executable, *sys.argv, "--memory_of", contender, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def print_peak_memory(make_step: Callable[[], Callable[[], float]]) -> None:
    """Run two steps and print this process's peak memory in MiB: what `measure_memory` reads."""
    import torch

    with contextlib.redirect_stdout(sys.stderr):
        step = make_step()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        step()
        step()
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:  # not `ru_maxrss`, which a process inherits from the one that started it
        with open("/proc/self/status") as status:
            peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
    print(json.dumps(peak))


# ---------------------------------------------------------------- printing


# What was printed: lists of rows, each a mapping from the heading of a column to its text
_TABLES: list[list[dict[str, str]]] = []
_HEADS: list[list[str]] = []


def machine() -> str:
    """Name of the GPU, or of the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    return f"CPU {platform.machine()}"


def write_json(args) -> None:
    """Write the tables that were printed to the file of `--json`, if one is named: what the last line of a benchmark does."""
    if args.json is None:
        return
    import torch

    result = {
        "benchmark": Path(sys.argv[0]).stem,
        "options": {name: value for name, value in vars(args).items() if name not in ("json", "memory_of")},
        "machine": machine(),
        "load": os.getloadavg(),  # of other processes: above the number of threads, times are too long
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"torch": torch.__version__}
        | {name: version(name) for name in ("trl", "transformers", "trl-ift")},
        "tables": _TABLES,
    }
    path = Path(args.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def print_setting(args, unit: str) -> None:
    import torch

    print(f"{machine()}, {args.threads} thread(s); torch {torch.__version__}, trl {version('trl')}, "
          f"transformers {version('transformers')}")  # fmt: skip
    print(f"batch {args.batch} {unit} of up to {args.tokens} tokens, {args.prompt_share:.0%} prompt, "
          f"{'bf16' if args.bf16 else 'fp32'}{', LoRA' if args.lora else ''}{', 4-bit' if args.load_in_4bit else ''}"
          f"{', gradient checkpointing' if args.checkpointing else ''}, median of {args.rounds} rounds\n")  # fmt: skip


def print_row(*columns) -> None:
    print("| " + " | ".join(map(str, columns)) + " |", flush=True)
    _TABLES[-1].append(dict(zip(_HEADS[-1], map(str, columns), strict=True)))


def print_head(*columns) -> None:
    """Begin a table."""
    # Two columns may be called alike, each beside what it is a multiple of
    _HEADS.append([f"{columns[i - 1]} {name}" if name in columns[:i] else name for i, name in enumerate(columns)])
    _TABLES.append([])
    for cells in (columns, ["---"] * len(columns)):
        print("| " + " | ".join(cells) + " |", flush=True)


def memory_columns(peak: float | None, base: float | None) -> tuple[str, str]:
    return (f"{peak:.0f}", f"{peak / base:.2f}") if peak and base else ("-", "-")
