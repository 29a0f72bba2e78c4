"""SPIN, LD-Align, and LD-Align with its weights dealt out at random: two iterations of each on a real model, at equal budget.

    python benchmarks/self_play_quality.py --sft sft_chat_train.jsonl sft_text_train.jsonl --held_out sft_chat_test.jsonl ...
    python benchmarks/self_play_quality.py --report     # tables, plot and pairs from the finished seeds

For each seed, prompts and human answers are drawn from the SFT sets (as chats; long rows are left out), the starting model
answers them, and a guiding model is trained on both (for the first seed; the others use it too). Each method then trains a
LoRA adapter on the same pairs for the same steps; its policy answers the prompts anew, and the second iteration trains on
these pairs alone (SPIN's authors add those of the first, which takes twice the time). "random" has the weights of LD-Align
for its pairs, permuted.

Measured on held-out rows after each iteration: NLL of the human answers, nats a token; the margin of the pair (human answer,
the starting model's own), as log-ratios to the starting model, and how often it is above zero. And of the weights: their
spread, rank correlations with lengths and with chrF (sacrebleu's, which `evaluate.load("chrf")` wraps), and with those of
`PolicyHiddenState`. What is finished is kept in `OUTPUT/`: interrupted, the same command goes on.
"""

import argparse
import json
import os
import random
import statistics
import time
from collections import Counter
from pathlib import Path


os.environ.setdefault("CI", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

METHODS = ("spin", "ld-align", "random")
SOURCES = {
    "pandalm_human",
    "llmbar_natural",
    "llmbar_manual",
    "self_instruct_seed",
    "self_instruct_user",
    "strategyqa",
}


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; the demo's SmolLM2-135M-Instruct by default")
    parser.add_argument("--sft", nargs="+", default=[], help="files of prompt-completion rows with a column `source`")
    parser.add_argument("--held_out", nargs="+", default=[], help="the same, held out")
    parser.add_argument("--output", default="self-play-quality")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--guide", help="a guide that is trained already; it is not trained then")
    parser.add_argument("--guide_options", type=json.loads, default={}, help="of `GuideTrainingArguments`, as JSON")
    parser.add_argument(
        "--guide_layers", type=int, default=8, help="layers of the model that the guide's encoder starts from"
    )
    parser.add_argument("--guide_rows", type=int, default=2000, help="human answers that the guide is trained on")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--held_out_rows", type=int, default=80)
    parser.add_argument(
        "--max_tokens", type=int, default=80, help="of a prompt without its template, and of an answer"
    )
    parser.add_argument("--iterations", type=int, default=2, choices=(1, 2))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--dtype", default="bfloat16", help="of the base weights; the adapters are float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="only print the tables and draw the plots")
    return parser.parse_args(argv)


# ---------------------------------------------------------------- data


def load_chats(
    files: list[str], tokenizer, max_tokens: int, number: int, seed: int, from_a_source: int = 100, sources=SOURCES
):
    """Short rows of the files as chats, drawn at random."""
    from datasets import Dataset, load_dataset

    def content(value):
        return (value if isinstance(value, str) else value[-1]["content"]).strip()

    def short(text):
        return 2 <= len(tokenizer(text)["input_ids"]) <= max_tokens

    chats = []
    for file in files:
        for row in load_dataset("json", data_files=file, split="train"):
            prompt, answer = content(row["prompt"]), content(row["completion"])
            one_turn = isinstance(row["prompt"], str) or len(row["prompt"]) == 1
            if row["source"] in sources and one_turn and short(prompt) and short(answer):
                prompt = prompt.removeprefix("Question:").removesuffix("Answer:").removesuffix("A:").strip()
                answer = answer.split("\n####")[0].strip()
                chats.append(
                    {
                        "prompt": [{"role": "user", "content": prompt}],
                        "completion": [{"role": "assistant", "content": answer}],
                        "source": row["source"],
                    }
                )
    random.Random(0).shuffle(chats)
    taken: Counter[str] = Counter()
    kept = []
    for chat in chats:
        source = chat.pop("source")
        taken[source] += 1
        if taken[source] <= from_a_source:
            kept.append(chat)
    random.Random(seed).shuffle(kept)
    if len(kept) < number:
        print(f"only {len(kept)} rows of {number} fit", flush=True)
    return Dataset.from_list(kept[:number])


def answers(args, model: str, adapter: Path | None, tokenizer, rows, folder: Path, seed: int):
    from trl_ift.data import generate_completions
    from trl_ift.data.pairs import count_pairs

    completions = generate_completions(
        model, rows.remove_columns("completion"), folder, processing_class=tokenizer, max_new_tokens=args.max_tokens,
        adapter=None if adapter is None else str(adapter), model_init_kwargs={"dtype": args.dtype}, seed=seed,
        batch_tokens=8192, shard_size=64, score=False,
    )  # fmt: skip
    return count_pairs(rows, completions, tokenizer, False)


# ---------------------------------------------------------------- training and measuring


def train_guide(args, source: str, tokenizer, pairs, folder: Path) -> None:
    """A guide of the model's first layers, as the encoder, and the whole of it, frozen, as the decoder.

    Trained on the generated answers of the pairs and `--guide_rows` human ones: too few answers leave the codes unused.
    """
    from datasets import Dataset, concatenate_datasets
    from transformers import AutoModel

    from trl_ift import latent

    encoder = Path(args.output) / f"encoder-{args.guide_layers}"
    AutoModel.from_pretrained(source, num_hidden_layers=args.guide_layers).save_pretrained(encoder)
    tokenizer.save_pretrained(encoder)
    human = load_chats(args.sft, tokenizer, args.max_tokens, args.guide_rows, 0, 1200, {*SOURCES, "creak"})
    own = Dataset.from_list([{"prompt": row["prompt"], "completion": row["rejected"]} for row in pairs])
    options = {
        "use_cpu": True, "bf16": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 5, "save_strategy": "no",
        "max_length": 256, "per_device_train_batch_size": 16, "warmup_steps": 10, "eval_fraction": 0.04,
        "train_sampling_strategy": "group_by_length", "encoder_learning_rate": 3e-4, "decoder_learning_rate": 2e-3,
        "decoder_training": "memory", "word_dropout": 0.5,
    } | args.guide_options  # fmt: skip
    latent.train_guide(
        str(encoder),
        source,
        concatenate_datasets([human, own.cast(human.features)]),
        latent.GuideTrainingArguments(output_dir=str(folder), **options),
        processing_class=tokenizer,
        encoder_processing_class=tokenizer,
    )


def train(args, method: str, source: str, start: Path | None, tokenizer, pairs, folder: Path, seed: int) -> None:
    """One iteration, unless the folder holds its adapter."""
    if (folder / "adapter_config.json").is_file():
        return
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM, set_seed

    from trl_ift import LDAlignConfig, LDAlignTrainer, SPINConfig, SPINTrainer

    trainer_class, config_class = (SPINTrainer, SPINConfig) if method == "spin" else (LDAlignTrainer, LDAlignConfig)
    config = config_class(
        str(folder) + "-run", num_train_epochs=1, per_device_train_batch_size=args.batch, seed=seed, beta=args.beta,
        learning_rate=args.learning_rate, lr_scheduler_type="linear", warmup_steps=0.1, gradient_checkpointing=False,
        use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_steps=5, disable_tqdm=True, max_length=None,
        precompute_ref_log_probs=True, overwrite_output_dir=True,
    )  # fmt: skip
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, args.dtype))
    peft_config = None
    if start is None:
        peft_config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    else:
        model = PeftModel.from_pretrained(model, str(start), is_trainable=True)
    trainer = trainer_class(
        model, args=config, train_dataset=pairs, processing_class=tokenizer, peft_config=peft_config
    )
    trainer.train()
    scratch = Path(f"{folder}-writing")
    trainer.save_model(str(scratch))
    (scratch / "log.json").write_text(json.dumps(trainer.state.log_history))
    scratch.rename(folder)


def log_probs(args, source: str, adapter: Path | None, tokenizer, pairs) -> tuple[list[float], list[float]]:
    """Summed log-probabilities of the real and of the generated answers."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from trl_ift.data.inference import lent, sequence_log_probs

    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, args.dtype))
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    found = []
    with lent(model):
        for column in ("chosen_ids", "rejected_ids"):
            sequences = [
                (row["prompt_ids"] + row[column], [-100] * len(row["prompt_ids"]) + row[column]) for row in pairs
            ]
            found.append(sequence_log_probs(model, sequences, 4096, tokenizer.pad_token_id or 0))
    return found[0], found[1]


def measure(chosen, rejected, chosen_start, rejected_start, tokens: int) -> dict[str, float]:
    margins = [(a - b) - (c - d) for a, b, c, d in zip(chosen, chosen_start, rejected, rejected_start, strict=True)]
    return {
        "nll": -sum(chosen) / tokens,
        "margin": statistics.mean(margins),
        "accuracy": statistics.mean(margin > 0 for margin in margins),
        "real": statistics.mean(a - b for a, b in zip(chosen, chosen_start, strict=True)),
        "generated": statistics.mean(a - b for a, b in zip(rejected, rejected_start, strict=True)),
    }


def chrf(pairs) -> list[float]:
    """chrF of each generated answer against the human one, 0 to 100."""
    import sacrebleu

    return [
        sacrebleu.sentence_chrf(row["rejected"][0]["content"], [row["chosen"][0]["content"]]).score for row in pairs
    ]


def describe_weights(args, source: str, tokenizer, pairs, folder: Path) -> dict:
    """Spread and rank correlations of the weights of some pairs."""
    import numpy as np

    from trl_ift.latent import PolicyHiddenState, weigh_pairs
    from trl_ift.latent.weights import rank_correlation, weight_summary

    distances = np.array(pairs["latent_distance"])
    lengths = np.array(
        [[len(row["chosen"][0]["content"]), len(row["rejected"][0]["content"])] for row in pairs], dtype=float
    )
    similarity = np.array(chrf(pairs))
    plain = pairs.remove_columns(["latent_distance", "weight"])
    states = weigh_pairs(
        plain,
        PolicyHiddenState(source, processing_class=tokenizer, model_init_kwargs={"dtype": args.dtype}),
        folder / "policy-hidden-state",
    )
    states = np.array(states["latent_distance"])
    return {
        "spread": weight_summary(np.array(pairs["weight"]), np.abs(lengths[:, 0] - lengths[:, 1])),
        "distances": distances.tolist(),
        "weights": list(pairs["weight"]),
        "chrf": similarity.tolist(),
        "length_difference": rank_correlation(distances, np.abs(lengths[:, 0] - lengths[:, 1])),
        "length_ratio": rank_correlation(distances, np.abs(np.log(lengths[:, 0] / lengths[:, 1]))),
        "chrf_correlation": rank_correlation(distances, similarity),
        "hidden_state": rank_correlation(distances, states),
        "hidden_state_chrf": rank_correlation(states, similarity),
        "hidden_state_length_difference": rank_correlation(states, np.abs(lengths[:, 0] - lengths[:, 1])),
        "truncated": float(np.mean(pairs["truncated"])),
        "mean_weight_truncated": float(np.mean(np.array(pairs["weight"])[np.array(pairs["truncated"])]))
        if any(pairs["truncated"])
        else None,
    }


# ---------------------------------------------------------------- a seed


def run_seed(args, source: str, tokenizer, seed: int) -> None:
    import numpy as np

    from trl_ift.latent import LatentGuide, weigh_pairs

    folder = Path(args.output) / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    def say(what: str) -> None:
        print(f"seed {seed}, {(time.monotonic() - started) / 60:.1f} min: {what}", flush=True)

    rows = load_chats(args.sft, tokenizer, args.max_tokens, args.rows, seed)
    held_out = load_chats(args.held_out, tokenizer, args.max_tokens, args.held_out_rows, 0)
    first, counts = answers(args, source, None, tokenizer, rows, folder / "answers-0", seed)
    held, _ = answers(args, source, None, tokenizer, held_out, folder / "held-out-answers", seed)
    say(f"{len(rows)} prompts: {counts}; {len(held)} held-out pairs")
    tokens = sum(map(len, held["chosen_ids"]))
    start = log_probs(args, source, None, tokenizer, held)
    results = {"start": measure(*start, *start, tokens) | {"counts": counts, "chrf": statistics.mean(chrf(first))}}
    say(f"start {results['start']}")

    guide = Path(args.guide or Path(args.output) / "guide")
    if set(args.methods) != {"spin"} and not (guide / "guide.json").is_file():
        train_guide(args, source, tokenizer, first, guide)
        say(f"guide: {json.loads((guide / 'guide.json').read_text())['check']}")

    encoder = None
    for method in args.methods:
        adapter, pairs = None, first
        for iteration in range(1, args.iterations + 1):
            if method != "spin" and encoder is None:
                encoder = LatentGuide.from_pretrained(guide)
            data = pairs
            if method != "spin":
                data = weigh_pairs(pairs, encoder, folder / f"{method}-weights-{iteration}")
                if method == "ld-align":
                    file = folder / f"weights-{iteration}.json"
                    if not file.is_file():
                        file.write_text(
                            json.dumps(describe_weights(args, source, tokenizer, data, folder / f"states-{iteration}"))
                        )
                    data.to_parquet(str(folder / f"weighted-{iteration}.parquet"))
                else:
                    weights = np.random.default_rng(seed).permutation(data["weight"])
                    data = data.remove_columns(["weight", "latent_distance"]).add_column("weight", weights.tolist())
            target = folder / f"{method}-{iteration}"
            train(args, method, source, adapter, tokenizer, data, target, seed)
            adapter = target
            say(f"{method} {iteration} trained on {len(data)} pairs")
            found = measure(*log_probs(args, source, adapter, tokenizer, held), *start, tokens)
            if iteration < args.iterations:
                new, counts = answers(args, source, adapter, tokenizer, rows, folder / f"{method}-answers", seed + 1)
                pairs = new
                found |= {"counts": counts, "chrf": statistics.mean(chrf(new))}
            results[f"{method}-{iteration}"] = found
            say(f"{method} {iteration}: {found}")
    file = folder / "results.json"  # of the other methods too, if these were run by themselves
    results = (json.loads(file.read_text()) if file.is_file() else {}) | results
    file.write_text(json.dumps(results, indent=2))


# ---------------------------------------------------------------- report


def spread(values: list[float], digits: int = 2) -> str:
    """Mean and standard deviation over the seeds."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def report(args) -> None:
    folders = sorted(path.parent for path in Path(args.output).glob("seed-*/results.json"))
    if not folders:
        raise SystemExit(f"No finished seed in {args.output}.")
    results = [json.loads((folder / "results.json").read_text()) for folder in folders]
    print(f"{len(folders)} seeds; mean ± standard deviation\n")
    print("| policy | NLL of held-out human answers | margin | above zero | human answer | start's own answer |")
    print("| --- | --- | --- | --- | --- | --- |")
    names = list(dict.fromkeys(name for result in results for name in result))
    for name in names:
        columns = [
            spread([result[name][key] for result in results if name in result], digits)
            for key, digits in (("nll", 3), ("margin", 2), ("accuracy", 2), ("real", 2), ("generated", 2))
        ]
        print(f"| {name} | {' | '.join(columns)} |")
    print("\n| answers of | cut at the limit | dropped | chrF to the human answer |\n| --- | --- | --- | --- |")
    for name in names:
        found = [result[name] for result in results if "counts" in result.get(name, {})]
        if found:
            cut = [one["counts"]["truncated"] / one["counts"]["completions"] for one in found]
            dropped = [sum(one["counts"]["dropped"].values()) for one in found]
            print(f"| {name} | {spread(cut)} | {spread(dropped, 1)} | {spread([one['chrf'] for one in found], 1)} |")
    print("\n| weights of LD-Align | iteration 1 | iteration 2 |\n| --- | --- | --- |")
    found = [
        [json.loads(file.read_text()) for f in folders if (file := f / f"weights-{i}.json").is_file()] for i in (1, 2)
    ]
    for key in ("std", "min", "median", "max", "effective_share"):
        print(f"| {key} | {' | '.join(spread([w['spread'][key] for w in weights]) for weights in found)} |")
    for key in (
        "length_difference", "length_ratio", "chrf_correlation", "hidden_state", "hidden_state_chrf",
        "hidden_state_length_difference", "truncated",
    ):  # fmt: skip
        print(f"| {key} | {' | '.join(spread([w[key] for w in weights]) for weights in found)} |")
    plot(found[0], Path(args.output) / "weights.png")
    extremes(folders[0])


def plot(found: list[dict], path: Path) -> None:
    """Distribution of the weights, and distance against text similarity."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for seed, weights in enumerate(found):
        left.hist(weights["weights"], bins=30, histtype="step", label=f"seed {seed}")
    left.set_xlabel("weight of a pair, d / mean(d)")
    left.set_ylabel("pairs")
    left.legend(frameon=False)
    right.scatter(found[0]["chrf"], found[0]["weights"], s=8, alpha=0.6)
    right.set_xlabel("chrF of generated against human answer")
    right.set_ylabel("weight")
    right.set_title(f"rank correlation {found[0]['chrf_correlation']:.2f} (seed 0)", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    print(f"\nPlot: {path}")


def extremes(folder: Path, number: int = 4, width: int = 160) -> None:
    """The nearest and the farthest pairs, as text."""
    from datasets import load_dataset

    pairs = load_dataset("parquet", data_files=str(folder / "weighted-1.parquet"), split="train").sort("weight")

    def shown(value):
        return " ".join(value[0]["content"].split())[:width]

    for title, rows in (("nearest", range(number)), ("farthest", range(len(pairs) - number, len(pairs)))):
        print(f"\n{title}:")
        for row in pairs.select(rows):
            print(f"- {row['weight']:.2f} | {shown(row['prompt'])}\n    human: {shown(row['chosen'])}")
            print(f"    own:   {shown(row['rejected'])}")


def main(argv=None) -> None:
    args = parse(argv)
    if not args.report:
        import torch

        from trl_ift.demo.model import load_tokenizer, packaged_model

        torch.set_num_threads(args.threads)
        source = args.model or str(packaged_model())
        for seed in args.seeds:
            run_seed(args, source, load_tokenizer(source), seed)
    report(args)


if __name__ == "__main__":
    main()
