"""What LoBaSS selects on a real model, and what training on the selection gives, beside random rows and all rows.

    python benchmarks/lobass_quality.py --sft sft_text_train.jsonl sft_chat_train.jsonl --held_out sft_text_test.jsonl ...
    python benchmarks/lobass_quality.py --report     # the tables and the plot from the finished seeds

For each seed a training set is mixed: questions of the demo's task (small sums, worked replies), rows of the SFT sets, and
junk: rows of the same SFT sets whose answers were dealt out anew among junk rows of the same source, so that the format is
right and the content is not. All are chats; rows of more than `--max_tokens` tokens are left out.

The reference is the model fine-tuned on everything. Every row is scored under both, and the shares of junk, of SFT rows and of
sums in each selection are counted. Then the starting model is trained on 6 %, 16.7 % and 100 % (the reference itself), by
LoBaSS and at random, for the same number of epochs. Measured: exact match on held-out sums, NLL of held-out SFT rows and of the
worked replies, nats a token. What is finished is kept in `OUTPUT/`: interrupted, the same command goes on.
"""

import argparse
import json
import os
import random
import statistics
import time
from pathlib import Path


os.environ.setdefault("CI", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

FRACTIONS = (0.06, 0.167)  # trained on
SHARE_FRACTIONS = (*FRACTIONS, 0.5)  # counted
SHARES = ("lobass", "rho_lm", "ifd", "superfiltering", "perplexity low", "perplexity high", "length", "random")


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; the demo's SmolLM2-135M-Instruct by default")
    parser.add_argument("--sft", nargs="+", default=[], help="files of prompt-completion rows with a column `source`")
    parser.add_argument("--held_out", nargs="+", default=[], help="the same, held out")
    parser.add_argument("--output", default="lobass-quality")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sums", type=int, default=200)
    parser.add_argument("--real", type=int, default=450)
    parser.add_argument("--junk", type=int, default=150)
    parser.add_argument("--held_out_rows", type=int, default=150)
    parser.add_argument("--questions", type=int, default=96)
    parser.add_argument("--max_tokens", type=int, default=128)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--dtype", default="bfloat16", help="of the base weights; the adapters are float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="only print the tables and draw the plot")
    return parser.parse_args(argv)


# ---------------------------------------------------------------- data


def load_chats(files: list[str], tokenizer, max_tokens: int, rng: random.Random) -> list[dict]:
    """Short rows of the files as chats, in random order."""
    from datasets import load_dataset

    chats = []
    for file in files:
        for row in load_dataset("json", data_files=file, split="train"):
            prompt, completion = row["prompt"], row["completion"]
            if isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt.strip()}]
                completion = [{"role": "assistant", "content": completion.strip()}]
            if len(tokenizer.apply_chat_template(prompt + completion, return_dict=True)["input_ids"]) <= max_tokens:
                chats.append({"prompt": prompt, "completion": completion, "source": row["source"]})
    rng.shuffle(chats)
    return chats


def deal_answers_anew(rows: list[dict], rng: random.Random) -> list[dict]:
    """The rows with the answers of other rows of the same source; a source's only row is left out."""
    junk = []
    for source in sorted({row["source"] for row in rows}):
        group = [row for row in rows if row["source"] == source]
        shift = rng.randrange(1, len(group)) if len(group) > 1 else 0
        for index, row in enumerate(group):
            other = group[(index + shift) % len(group)]
            if other["completion"] != row["completion"]:
                junk.append(row | {"completion": other["completion"]})
    return junk


def mix(args, tokenizer, seed: int):
    """Return the training set (with the column `kind`), held-out SFT rows and held-out questions."""
    from datasets import Dataset

    from trl_ift.demo.task import make_questions, to_rows

    rng = random.Random(seed)
    train, questions = make_questions(args.sums, args.questions, seed=seed)
    chats = load_chats(args.sft, tokenizer, args.max_tokens, rng)
    rows = [row | {"source": "chain_sum", "kind": "sum"} for row in to_rows(train)]
    rows += [row | {"kind": "real"} for row in chats[: args.real]]
    rows += [row | {"kind": "junk"} for row in deal_answers_anew(chats[args.real : args.real + args.junk], rng)]
    rng.shuffle(rows)
    held_out = load_chats(args.held_out, tokenizer, args.max_tokens, rng)[: args.held_out_rows]
    return Dataset.from_list(rows), Dataset.from_list(held_out), questions


# ---------------------------------------------------------------- runs


def train(args, source: str, tokenizer, rows, folder: Path, seed: int) -> None:
    """Fine-tune LoRA on the rows, unless the folder holds the adapter; write it when it is done."""
    if (folder / "adapter_config.json").is_file():
        return
    from peft import LoraConfig
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    from trl_ift.trl_internals import score_labelled_positions_only

    config = SFTConfig(
        str(folder) + "-run", num_train_epochs=args.epochs, per_device_train_batch_size=args.batch, seed=seed,
        learning_rate=args.learning_rate, lr_scheduler_type="cosine", warmup_steps=2, gradient_checkpointing=False,
        model_init_kwargs={"dtype": args.dtype}, use_cpu=True, bf16=False, report_to="none", save_strategy="no",
        logging_steps=10, disable_tqdm=True, max_length=None,
    )  # fmt: skip
    set_seed(seed)
    trainer = SFTTrainer(
        source,
        args=config,
        train_dataset=rows.select_columns(["prompt", "completion"]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    score_labelled_positions_only(trainer.model.get_base_model())  # the same loss, sooner, on a CPU
    trainer.train()
    scratch = Path(f"{folder}-writing")
    trainer.save_model(str(scratch))
    scratch.rename(folder)


def measure(args, source: str, adapter: Path | None, tokenizer, held_out, questions, file: Path) -> dict:
    """Measure a model on the held-out data, once."""
    if file.is_file():
        return json.loads(file.read_text())
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from trl_ift.data import score_dataset
    from trl_ift.data.shards import write_file
    from trl_ift.demo.evaluate import evaluate

    model = AutoModelForCausalLM.from_pretrained(source, dtype=args.dtype)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    found = evaluate(model, tokenizer, questions)
    scores = score_dataset(model, held_out, processing_class=tokenizer)
    result = {
        "accuracy": found["exact_match"],
        "sum_nll": found["nll"],
        "nll": sum(scores["nll_sum"]) / sum(scores["num_tokens"]),
    }
    write_file(file, json.dumps(result).encode())
    return result


def run_seed(args, source: str, tokenizer, seed: int) -> None:
    import numpy as np

    from trl_ift.data import DIRECT_PROMPT, score_dataset, selection_scores, top_rows

    folder = Path(args.output) / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    def say(what: str) -> None:
        print(f"seed {seed}, {(time.monotonic() - started) / 60:.1f} min: {what}", flush=True)

    rows, held_out, questions = mix(args, tokenizer, seed)
    kinds = np.array(rows["kind"])
    say(f"{len(rows)} rows: " + ", ".join(f"{(kinds == kind).sum()} {kind}" for kind in ("sum", "real", "junk")))
    train(args, source, tokenizer, rows, folder / "reference", seed)
    say("reference trained")
    options = {"model_init_kwargs": {"dtype": args.dtype}}
    initial = score_dataset(source, rows, folder / "initial", **options)
    reference = score_dataset(source, rows, folder / "reference-scores", adapter=str(folder / "reference"), **options)
    direct = score_dataset(source, rows, folder / "direct", direct_prompt=DIRECT_PROMPT, **options)
    say("scored")

    shares, chosen, above_junk = {}, {}, {}
    for name in SHARES:
        selection, _, band = name.partition(" ")
        scores = selection_scores(selection, initial, reference, direct, band=band or "low", seed=seed)
        above_junk[name] = probability_above(scores[kinds == "real"], scores[kinds == "junk"])
        for fraction in SHARE_FRACTIONS:
            chosen[name, fraction] = top_rows(scores, fraction)
            found = kinds[chosen[name, fraction]]
            shares[f"{name}|{fraction}"] = {kind: float((found == kind).mean()) for kind in ("sum", "real", "junk")}
    shares["all|1"] = {kind: float((kinds == kind).mean()) for kind in ("sum", "real", "junk")}
    learnable = selection_scores("lobass", initial, reference)
    means = {kind: float(np.nanmean(learnable[kinds == kind])) for kind in ("sum", "real", "junk")}
    (folder / "shares.json").write_text(
        json.dumps({"shares": shares, "mean_score": means, "above_junk": above_junk}, indent=2)
    )

    results = {"start": measure(args, source, None, tokenizer, held_out, questions, folder / "start.json")}
    say("start measured")
    results["all|1"] = measure(
        args, source, folder / "reference", tokenizer, held_out, questions, folder / "reference.json"
    )
    for fraction in FRACTIONS:
        for name in ("lobass", "random"):
            adapter = folder / f"{name}-{fraction}"
            train(args, source, tokenizer, rows.select(chosen[name, fraction]), adapter, seed)
            results[f"{name}|{fraction}"] = measure(
                args, source, adapter, tokenizer, held_out, questions, folder / f"{name}-{fraction}.json"
            )
            say(f"{name} {fraction:.1%}: {results[f'{name}|{fraction}']}")
    (folder / "results.json").write_text(json.dumps(results, indent=2))


def probability_above(first, second) -> float:
    """Share of all pairs in which the first scores higher; ties count half, dropped rows (NaN) as lowest."""
    import numpy as np

    first, second = (np.nan_to_num(values, nan=-np.inf) for values in (first, second))
    return float(np.mean((first[:, None] > second) + 0.5 * (first[:, None] == second)))


# ---------------------------------------------------------------- report


def spread(values: list[float], scale: float = 1.0, digits: int = 2) -> str:
    """Mean and standard deviation over the seeds."""
    mean = statistics.mean(values) * scale
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(values) * scale:.{digits}f}"


def report(args) -> None:
    folders = sorted(path.parent for path in Path(args.output).glob("seed-*/results.json"))
    if not folders:
        raise SystemExit(f"No finished seed in {args.output}.")
    results = [json.loads((folder / "results.json").read_text()) for folder in folders]
    selections = [json.loads((folder / "shares.json").read_text()) for folder in folders]
    print(f"{len(folders)} seeds; mean ± standard deviation\n")
    print("| trained on | sums right, % | NLL of worked sums | NLL of held-out SFT rows |\n| --- | --- | --- | --- |")
    for name in results[0]:
        columns = [
            spread([result[name]["accuracy"] for result in results], 100, 1),
            spread([result[name]["sum_nll"] for result in results], 1, 3),
            spread([result[name]["nll"] for result in results], 1, 3),
        ]
        print(f"| {label(name)} | {' | '.join(columns)} |")
    print("\n| selection | rows | sums, % | SFT rows, % | junk, % |\n| --- | --- | --- | --- | --- |")
    for key in selections[0]["shares"]:
        name, fraction = key.split("|")
        columns = [spread([s["shares"][key][kind] for s in selections], 100, 1) for kind in ("sum", "real", "junk")]
        print(f"| {name} | {float(fraction):.1%} | {' | '.join(columns)} |")
    means = {kind: spread([s["mean_score"][kind] for s in selections]) for kind in ("sum", "real", "junk")}
    print("\n| selection | P(SFT row above junk row) |\n| --- | --- |")
    for name in selections[0]["above_junk"]:
        print(f"| {name} | {spread([s['above_junk'][name] for s in selections])} |")
    print(f"\nMean learnability: sums {means['sum']}, SFT rows {means['real']}, junk {means['junk']}")


def label(name: str) -> str:
    selection, _, fraction = name.partition("|")
    if selection == "start":
        return "nothing (start)"
    return "all rows" if selection == "all" else f"{selection}, {float(fraction):.1%}"


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
