"""What preference methods do to a real model: same start, same prompts, same number of steps, several seeds.

    python benchmarks/preference_quality.py --scored_train scored_train.jsonl --scored_test scored_test.jsonl
    python benchmarks/preference_quality.py --report     # the table and the plot from the finished runs
    python benchmarks/preference_quality.py ... --runs DPO DPOP chi-PO --seeds 0     # others: see `FAMILY`

The data are prompts with several scored responses and a gold one (`prompt`, `responses`, `scores`, `reference`).
`build_triples` makes the triples; DPO and MPO train on their pairs. The starting model samples completions for the training
prompts (MPO's regularisation) and for the held-out prompts (the KL that all are measured by). Every run is written to
`OUTPUT/runs/` when it ends and is not repeated: interrupted, the same command goes on.

Measured on the held-out triples, before and after:

- accuracy: share of pairs whose chosen response gained more log-probability than the rejected one (implicit reward);
- chosen, rejected: change of their log-probability, nats a response;
- gold NLL: of the gold responses, nats a token;
- KL: forward KL(start || trained), nats a response, on samples of the start for held-out prompts: outside all pairs.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path


os.environ.setdefault("CI", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

RUNS = {
    # name: (method of the registry, options)
    "DPO": ("dpo", {"beta": 0.1, "precompute_ref_log_probs": True}),
    "MPO, no KL term": ("mpo", {"reg_weight": 0.0}),
    "MPO": ("mpo", {}),
    "MPO, reverse KL": ("mpo", {"reg_kl": "reverse"}),
    "TPO": ("tpo", {}),
}
# More of them, by name
STORED = {"precompute_ref_log_probs": True}
FAMILY = {
    "DPOP": ("dpop", STORED),
    "DPOP, outside": ("dpop", {"dpop_variant": "outside", "dpop_lambda": 0.3, "beta": 0.1, **STORED}),
    "MinorDPO": ("minor-dpo", STORED),
    "chi-PO": ("chipo", STORED),
    "regularized PO": ("regularized-po", STORED),
    "regularized PO, seq_mean": ("regularized-po", {"rpo_normalization": "seq_mean", **STORED}),
    "Ada-DPO": ("ada-dpo", {"beta": 0.1, **STORED}),
    "ASFT": ("aligned-sft", {}),
    "TIS-DPO": ("tis-dpo", STORED),
    "relative PO": ("relative-po", STORED),
    "MRPO": ("mrpo", STORED),
    "SPO-style": ("self-supervised-po", {"spo_levels": 2, **STORED}),
    "EXO": ("exo", {}),
    "ULMA": ("ulma", STORED),
    "UFT": ("uft", STORED),
    "FIGA": ("figa", {}),
    "FPO, random features": ("fpo", {}),  # no trained autoencoder of the model is at hand
}

KINDS = ("chosen", "rejected", "reference")


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; the demo's SmolLM2-135M-Instruct by default")
    parser.add_argument("--hub_base_model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="name for the cards")
    parser.add_argument("--scored_train", help="prompts with scored responses")
    parser.add_argument("--scored_test", help="the same, held out")
    parser.add_argument("--source", help="keep rows whose column `source` is this")
    parser.add_argument("--output", default="preference-quality")
    parser.add_argument("--runs", nargs="+", choices=[*RUNS, *FAMILY], default=list(RUNS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max_tokens", type=int, default=48, help="keep triples whose sequences are no longer")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="only print the table and draw the plot")
    return parser.parse_args(argv)


def load_triples(path: str, source: str | None, tokenizer, max_tokens: int):
    from datasets import load_dataset

    from trl_ift.data import build_triples

    rows = load_dataset("json", data_files=path, split="train")
    if source:
        rows = rows.filter(lambda row: row["source"] == source)
    triples = build_triples(rows, gold_column="reference")
    triples = triples.select_columns(["prompt", "reference", "chosen", "rejected"])

    def is_short(row):
        return all(len(tokenizer(row["prompt"] + row[kind])["input_ids"]) < max_tokens for kind in KINDS)

    return triples.filter(is_short)


def held_out_rows(tokenizer, triples, samples) -> dict[str, list[tuple[list[int], list[int]]]]:
    """(prompt ids, response ids) of the held-out responses, by kind; a response ends with the end-of-sequence token."""
    rows = {}
    for kind in KINDS:
        rows[kind] = [
            (
                tokenizer(row["prompt"])["input_ids"],
                tokenizer(row[kind])["input_ids"] + [tokenizer.eos_token_id],
            )
            for row in triples
        ]
    rows["sample"] = [(row["prompt_ids"], row["completion_ids"]) for row in samples]
    return rows


def score(model, rows, batch_size: int = 16):
    """Summed log-probability of each response, in float64."""
    import torch

    training = model.training
    model.eval()
    sums = torch.zeros(len(rows), dtype=torch.float64)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    with torch.no_grad():
        for first in range(0, len(rows), batch_size):
            numbers = order[first : first + batch_size]
            part = [rows[i] for i in numbers]
            width = max(len(prompt) + len(response) for prompt, response in part)
            ids = torch.zeros(len(part), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            labels = torch.full_like(ids, -100)
            for i, (prompt, response) in enumerate(part):
                row = torch.tensor([*prompt, *response])
                ids[i, : len(row)], mask[i, : len(row)] = row, 1
                labels[i, len(prompt) : len(row)] = row[len(prompt) :]
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
            targets = labels[:, 1:]
            logps = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
            sums[numbers] = (logps * (targets != -100)).double().sum(1)
    model.train(training)
    return sums


def measure(model, rows, start) -> dict[str, float]:
    now = {kind: score(model, part) for kind, part in rows.items()}
    gold_tokens = sum(len(response) for _, response in rows["reference"])
    gain = {kind: now[kind] - start[kind] for kind in rows}
    return {
        "accuracy": (gain["chosen"] > gain["rejected"]).double().mean().item(),
        "policy_accuracy": (now["chosen"] > now["rejected"]).double().mean().item(),
        "chosen": gain["chosen"].mean().item(),
        "rejected": gain["rejected"].mean().item(),
        "gold_nll": -now["reference"].sum().item() / gold_tokens,
        "kl": -gain["sample"].mean().item(),
    }


def curve_callback(every: int, rows, start):
    """A `TrainerCallback` that measures every few steps, into `.points`."""
    from transformers import TrainerCallback

    class Curve(TrainerCallback):
        def __init__(self):
            self.points: list[dict[str, float]] = []

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step % every == 0 or state.global_step == state.max_steps:
                self.points.append({"step": state.global_step, **measure(model, rows, start)})

    return Curve()


def merged(adapter: Path, model_path: str) -> str:
    """Folder of the model with the adapter of another run in it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = adapter.with_name(f"{adapter.name}-merged")
    if not folder.exists():
        if not adapter.exists():
            raise ValueError(f"`{adapter}` is missing, the reference of MRPO. Run TPO first: `--runs TPO`.")
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(model_path, dtype="float32"), str(adapter)
        )
        partial = folder.with_suffix(".tmp")
        model.merge_and_unload().save_pretrained(partial)
        AutoTokenizer.from_pretrained(model_path).save_pretrained(partial)
        partial.rename(folder)
    return str(folder)


def run(name: str, seed: int, args, model_path: str, triples, samples, rows, start) -> dict:
    from peft import LoraConfig
    from transformers import AutoConfig, AutoTokenizer

    from trl_ift import get_method
    from trl_ift.data.token_weights import CONTRASTIVE_PROMPTS, estimate_token_weights
    from trl_ift.study.methods import training_rows

    name_of_method, options = {**RUNS, **FAMILY}[name]
    method = get_method(name_of_method)
    folder = Path(args.output) / "adapters" / f"{name}-seed{seed}".replace(" ", "-").replace(",", "")
    curve = curve_callback(15, rows, start)
    batch = args.batch * (2 if method.kind == "unpaired" else 1)  # rows of a pair
    extra = {"reg_dataset": samples} if method.name == "mpo" else {}
    if method.kind in ("lists", "unpaired"):
        triples = training_rows(method.kind, list(triples), args.batch, seed)
    if method.kind == "weighted":
        positive, negative = CONTRASTIVE_PROMPTS
        triples = estimate_token_weights(
            triples,
            model_path,
            output_dir=Path(args.output) / "token-log-probs",
            positive_prompt=positive,
            negative_prompt=negative,
        )
    if method.name == "fpo":
        from preference import random_sae

        extra["sae"] = random_sae(AutoConfig.from_pretrained(model_path).hidden_size)
    if method.name == "mrpo":
        options = {**options, "ref_models": [merged(Path(args.output) / "adapters" / "TPO-seed0", model_path)]}
    trainer = method.trainer_class(
        model=model_path,
        args=method.config_class(
            str(folder), seed=seed, max_steps=args.steps, per_device_train_batch_size=batch, max_length=256,
            learning_rate=args.learning_rate, lr_scheduler_type="cosine", warmup_steps=5, use_cpu=True, bf16=False,
            gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=5, disable_tqdm=True,
            overwrite_output_dir=True, hub_base_model=args.hub_base_model, **options,
        ),
        train_dataset=triples,
        processing_class=AutoTokenizer.from_pretrained(model_path),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        callbacks=[curve],
        **extra,
    )  # fmt: skip
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    result = curve.points[-1]
    for metric, title in (("accuracy", "held-out implicit reward accuracy"), ("gold_nll", "NLL of gold responses"),
                          ("kl", "forward KL to the start")):  # fmt: skip
        trainer.add_eval_result(metric, round(result[metric], 4), "held-out triples", "test", title)
    trainer.create_model_card(model_name=f"SmolLM2-135M-{method.name.upper()}", dataset_name="triples")
    trainer.save_model()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"name": name, "seed": seed, "curve": curve.points, "seconds": seconds, "log": log}


def check_settings(path: Path, args) -> None:
    """Raise if the finished runs in the folder were made with other settings."""
    choices = ("output", "runs", "seeds", "threads", "report")
    settings = {name: value for name, value in vars(args).items() if name not in choices}
    found = json.loads(path.read_text()) if path.exists() else settings
    if found != settings:
        raise ValueError(f"{path} was made with {found}, this run has {settings}. Choose another --output.")
    path.write_text(json.dumps(settings))


def train_all(args) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_ift.data import generate_completions

    torch.set_num_threads(args.threads)
    model_path = args.model
    if model_path is None:
        from trl_ift.demo.model import packaged_model

        model_path = str(packaged_model())
    output = Path(args.output)
    (output / "runs").mkdir(parents=True, exist_ok=True)
    check_settings(output / "settings.json", args)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    train, test = (
        load_triples(path, args.source, tokenizer, args.max_tokens) for path in (args.scored_train, args.scored_test)
    )
    options = {"max_new_tokens": args.max_new_tokens, "seed": 0}
    samples = generate_completions(model_path, train, str(output / "samples-train"), **options)
    held_out = generate_completions(model_path, test, str(output / "samples-test"), num_completions=2, **options)

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    rows = held_out_rows(tokenizer, test, held_out)
    start = {kind: score(model, part) for kind, part in rows.items()}
    base = measure(model, rows, start)
    del model
    sizes = {"train": len(train), "test": len(test), "samples": len(held_out)}
    (output / "start.json").write_text(json.dumps({**base, **sizes}))
    for seed in args.seeds:
        for name in args.runs:
            path = output / "runs" / f"{name}-seed{seed}.json"
            if path.exists():
                continue
            result = run(name, seed, args, model_path, train, samples, rows, start)
            path.with_suffix(".tmp").write_text(json.dumps(result))
            path.with_suffix(".tmp").rename(path)
            final = {key: round(value, 3) for key, value in result["curve"][-1].items()}
            print(f"{name}, seed {seed}, {result['seconds']:.0f} s: {final}", flush=True)


def report(args) -> None:
    output = Path(args.output)
    results: dict[str, list[dict]] = {}
    for path in sorted((output / "runs").glob("*.json")):
        result = json.loads(path.read_text())
        results.setdefault(result["name"], []).append(result)
    start = json.loads((output / "start.json").read_text())
    print(f"{start['train']} training and {start['test']} held-out triples\n")
    columns = ("accuracy", "chosen", "rejected", "gold_nll", "kl")
    print("| method | seeds | accuracy | chosen (nats) | rejected (nats) | gold NLL (nats/token) | KL (nats) |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print(f"| start | - | - | 0 | 0 | {start['gold_nll']:.3f} | 0 |")
    for name in args.runs:
        if name in results:
            finals = [result["curve"][-1] for result in results[name]]
            cells = []
            for column in columns:
                values = [final[column] for final in finals]
                spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.3f}{spread}")
            print(f"| {name} | {len(finals)} | " + " | ".join(cells) + " |")
    plot({name: results[name] for name in args.runs if name in results}, start, output / "curves.png")


def plot(results: dict[str, list[dict]], start: dict[str, float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = (("accuracy", "held-out reward accuracy"), ("chosen", "chosen log-prob, change (nats)"),
              ("gold_nll", "gold NLL (nats/token)"), ("kl", "KL(start || trained) outside the pairs (nats)"))  # fmt: skip
    figure, axes = plt.subplots(1, 4, figsize=(18, 4))
    for number, name in enumerate(results):
        for axis, (column, _) in zip(axes, panels, strict=True):
            origin = [] if column == "accuracy" else [{"step": 0, **start}]  # nothing has gained before the first step
            curves = [[point[column] for point in [*origin, *result["curve"]]] for result in results[name]]
            steps = [point["step"] for point in [*origin, *results[name][0]["curve"]]]
            for curve in curves:
                axis.plot(steps, curve, color=f"C{number}", alpha=0.25, linewidth=1)
            axis.plot(
                steps, [statistics.mean(values) for values in zip(*curves, strict=True)], f"C{number}o-", label=name
            )
    for axis, (_, title) in zip(axes, panels, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"\nPlot: {path}")


def main() -> None:
    args = parse()
    if not args.report:
        train_all(args)
    report(args)


if __name__ == "__main__":
    main()
