# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-ift"]
# ///
"""LD-Align: SPIN in which pairs count by how far apart their answers are in the latent space of a guiding model.

    uv run ld_align.py                              # from the Hub: SmolLM2-135M-Instruct, 2000 rows of tldr, LoRA
    python ld_align.py --policy_hidden_state true   # without a guiding model: distances of the model's own hidden states
    python ld_align.py --guide ./guide              # with one that `trl-ift guide` has trained
    python ld_align.py --model_name_or_path ./model --dataset_name ./data --output_dir ./ld-align      # from local folders

The model answers all prompts; a guide is trained to reconstruct human and generated answers from their codes; the distance of
the two codes of a pair is its weight; then the model is trained. Interrupted, the same command goes on. `trl-ift ld-align` does
the same with every launcher of accelerate. Every option of `LDAlignConfig`, `SelfPlayConfig`, `LatentConfig` is a flag.
"""

import torch
from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_ift import LDAlignConfig
from trl_ift.self_play import LatentConfig, SelfPlayConfig, self_play


def main() -> None:
    parser = TrlParser((ScriptArguments, LDAlignConfig, ModelConfig, SelfPlayConfig, LatentConfig))
    parser.set_defaults(
        model_name_or_path="HuggingFaceTB/SmolLM2-135M-Instruct",
        dataset_name="trl-lib/tldr",
        output_dir="SmolLM2-135M-LD-Align",
        learning_rate=5e-5,
        num_train_epochs=1,
        max_rows=2000,
        max_new_tokens=128,
        use_peft=True,
        lora_target_modules="all-linear",
        use_cpu=not torch.accelerator.is_available(),
        bf16=torch.accelerator.is_available(),
    )
    script_args, training_args, model_args, config, latent = parser.parse_args_and_config()
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
        latent=latent,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    for found in iterations:
        weights = found["weights"]
        worth = f"worth {weights['effective_sample_size']:.0f} of equal weight"
        margin = found["rewards/margins"]
        print(f"Iteration {found['iteration'] + 1}: {found['pairs']} pairs, {worth}; margin {margin:.3f}")


if __name__ == "__main__":
    main()
