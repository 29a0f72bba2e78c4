"""What soft labels do to a real model: the margins of sure and of split pairs, on pairs that people voted on.

    python benchmarks/soft_label_quality.py --train votes_train.jsonl --test votes_test.jsonl

The data are preference rows of messages with `chosen_prob`, the share of the votes for `chosen`. DPO, cDPO (the linear loss)
and GDPO (the geometric one) train from the same start on the same rows in the same order. Measured on held-out pairs, by their
votes: the mean gain of the margin, log-prob of chosen minus that of rejected, in nats; with its standard error.
"""

import argparse
import statistics

import preference_quality as quality


LOSSES = ("dpo", "cdpo", "gdpo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or Hub id; the demo's SmolLM2-135M-Instruct by default")
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--max_tokens", type=int, default=128, help="keep pairs whose sequences are no longer")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    import tempfile

    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_ift import SoftLabelPOConfig, SoftLabelPOTrainer
    from trl_ift.preference.trainer import pair_ids

    torch.set_num_threads(args.threads)
    model_path = args.model
    if model_path is None:
        from trl_ift.demo.model import packaged_model

        model_path = str(packaged_model())
    tokenizer = AutoTokenizer.from_pretrained(model_path)

    def ids(row):
        return pair_ids(row, tokenizer, tokenizer.eos_token)

    def is_short(row):
        found = ids(row)
        return len(found["prompt_ids"]) + max(len(found["chosen_ids"]), len(found["rejected_ids"])) <= args.max_tokens

    def load(path):
        rows = load_dataset("json", data_files=path, split="train").rename_column("chosen_prob", "soft_label")
        return rows.select_columns(["prompt", "chosen", "rejected", "soft_label"]).filter(is_short)

    train, test = load(args.train), load(args.test)
    pairs = [ids(row) for row in test]
    labels = torch.tensor(test["soft_label"][:])
    groups = {"unanimous": labels == 1, "split": (labels < 1) & (labels > 0.5), "tie": labels == 0.5}

    def margins(model):
        sides = (
            quality.score(model, [(row["prompt_ids"], row[f"{kind}_ids"]) for row in pairs])
            for kind in ("chosen", "rejected")
        )
        chosen, rejected = sides
        return chosen - rejected

    start = margins(AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32))
    sizes = ", ".join(f"{int(mask.sum())} {name}" for name, mask in groups.items())
    print(f"{len(train)} training pairs, {len(test)} held out: {sizes}\n")
    print("| loss | " + " | ".join(f"{name} (nats)" for name in groups) + " | accuracy, not ties |")
    print("| --- " * (len(groups) + 2) + "|")
    for loss in LOSSES:
        trainer = SoftLabelPOTrainer(
            model=model_path,
            args=SoftLabelPOConfig(
                tempfile.mkdtemp(), soft_label_loss=loss, seed=args.seed, max_steps=args.steps, warmup_steps=3,
                per_device_train_batch_size=args.batch, learning_rate=3e-4, use_cpu=True, bf16=False, report_to="none",
                gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, precompute_ref_log_probs=True,
                logging_steps=1000,
            ),
            train_dataset=train,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        )  # fmt: skip
        trainer.train()
        gain = margins(trainer.model) - start
        cells = []
        for mask in groups.values():
            part = gain[mask].tolist()
            error = f" ± {statistics.stdev(part) / len(part) ** 0.5:.2f}" if len(part) > 1 else ""
            cells.append(f"{statistics.fmean(part):+.2f}{error}" if part else "-")
        accuracy = (gain[labels > 0.5] > 0).double().mean().item()
        print(f"| {loss} | " + " | ".join(cells) + f" | {accuracy:.2f} |", flush=True)


if __name__ == "__main__":
    main()
