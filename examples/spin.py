# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-ift"]
# ///
"""SPIN: alignment from SFT data alone; the model learns to tell the human answers from those that it writes itself.

    uv run spin.py                                  # from the Hub: SmolLM2-135M-Instruct, 2000 rows of tldr, 2 iterations, LoRA
    python spin.py --num_iterations 4 --beta_schedule 0.1 0.1 0.1 5.0
    python spin.py --model_name_or_path ./model --dataset_name ./data --output_dir ./spin      # from local folders

Start from a model that was fine-tuned on the data. In each iteration it answers all prompts, and is trained on the pairs; one
adapter goes through all of them. Interrupted, the same command goes on. `trl-ift spin` does the same with every launcher of
accelerate. Every option of `SPINConfig`, `SelfPlayConfig` and `trl.ModelConfig` is a flag (`--help`).
"""

import torch
from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_ift import SPINConfig
from trl_ift.self_play import SelfPlayConfig, self_play


def main() -> None:
    parser = TrlParser((ScriptArguments, SPINConfig, ModelConfig, SelfPlayConfig))
    parser.set_defaults(
        model_name_or_path="HuggingFaceTB/SmolLM2-135M-Instruct",
        dataset_name="trl-lib/tldr",
        output_dir="SmolLM2-135M-SPIN",
        learning_rate=5e-5,
        num_train_epochs=1,
        num_iterations=2,
        max_rows=2000,
        max_new_tokens=128,
        use_peft=True,
        lora_target_modules="all-linear",
        use_cpu=not torch.accelerator.is_available(),
        bf16=torch.accelerator.is_available(),
    )
    script_args, training_args, model_args, config = parser.parse_args_and_config()
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }

    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    iterations = self_play(
        model_args.model_name_or_path,
        training_args,
        dataset[script_args.dataset_train_split],
        dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        config=config,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    for found in iterations:
        print(f"Iteration {found['iteration'] + 1}: {found['pairs']} pairs, margin {found['rewards/margins']:.3f}")


if __name__ == "__main__":
    main()
