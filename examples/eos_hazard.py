# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-ift"]
# ///
"""Why `ift_propagation_grad` is not "full" by default: the released gradient makes models forget how to stop.

    python examples/eos_hazard.py

A tiny Llama learns rows of 16 random tokens followed by EOS. The tokens cannot be predicted; the end always can. With the
gradient of the released code the loss is smallest when EOS keeps about HALF the loss of its surroundings, so its probability
is pushed down to exp(-log(8) / 2) = 0.35 although every row ends in it. The loss values of the three modes are the same.
"""

import argparse
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_ift import IFTConfig, IFTTrainer


BOS, EOS, SYMBOLS = 0, 1, range(2, 10)
LENGTH = 16
SETTINGS = {
    "SFT (lambda 0, gamma 0)": {"ift_lambda": 0.0, "ift_gamma": 0.0},
    "lambda 0, full": {"ift_lambda": 0.0, "ift_propagation_grad": "full"},
    "lambda 0, numerator": {"ift_lambda": 0.0, "ift_propagation_grad": "numerator"},
    "lambda 0, none": {"ift_lambda": 0.0, "ift_propagation_grad": "none"},
    "lambda 0.2, full": {"ift_lambda": 0.2, "ift_propagation_grad": "full"},
    "lambda 0.2, numerator (default)": {"ift_lambda": 0.2, "ift_propagation_grad": "numerator"},
}


def make_rows(number: int, seed: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(min(SYMBOLS), max(SYMBOLS) + 1, (number, LENGTH), generator=generator).tolist()
    return [{"input_ids": [BOS, *row, EOS]} for row in draws]


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<bos>": BOS, "<eos>": EOS} | {f"s{symbol}": symbol for symbol in SYMBOLS}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="s2"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")


def probability_of_eos(model: LlamaForCausalLM) -> float:
    """Mean probability of EOS where it belongs, over 256 fresh rows."""
    ids = torch.tensor([row["input_ids"] for row in make_rows(256, seed=10**6)])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits[:, -2].softmax(-1)[:, EOS].mean().item()


def run(settings: dict, steps: int, seed: int, output_dir: str) -> float:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=10, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            bos_token_id=BOS, eos_token_id=EOS, pad_token_id=EOS,
        )
    )  # fmt: skip
    trainer = IFTTrainer(
        model=model,
        args=IFTConfig(
            output_dir, use_cpu=not torch.cuda.is_available(), bf16=False, report_to="none", save_strategy="no",
            disable_tqdm=True, logging_steps=10**6, max_steps=steps, per_device_train_batch_size=16, learning_rate=5e-3,
            lr_scheduler_type="constant", gradient_checkpointing=False, seed=seed, **settings,
        ),
        train_dataset=Dataset.from_list(make_rows(16 * steps, seed)),
        processing_class=make_tokenizer(),
    )  # fmt: skip
    trainer.train()
    return probability_of_eos(trainer.model.cpu())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    print(f"P(EOS) at the end of a row after {args.steps} steps, mean and range over {args.seeds} seeds\n")
    print("| setting | P(EOS) | range |\n| --- | --- | --- |")
    for name, settings in SETTINGS.items():
        with tempfile.TemporaryDirectory() as folder:
            values = [run(settings, args.steps, seed, folder) for seed in range(args.seeds)]
        print(f"| {name} | {sum(values) / len(values):.4f} | {min(values):.4f} - {max(values):.4f} |", flush=True)


if __name__ == "__main__":
    main()
