# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-ift"]
# ///
"""Align a small chat model with Intuitive Fine-Tuning (IFT): from answers alone, no pairs, no reference model.

    uv run ift.py                                  # from the Hub: SmolLM2-135M-Instruct on trl-lib/tldr, LoRA
    python ift.py --model_name_or_path ./model --dataset_name ./data --output_dir ./ift     # from local folders
    python ift.py --ift_lambda 0.3 --max_steps 500 --push_to_hub

Every option of `IFTConfig` and `trl.ModelConfig` is a flag (`--help`); `trl-ift ift` is the same as a command, with
data files, YAML and several GPUs.
"""

import torch
from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_ift import IFTConfig, IFTTrainer


def main() -> None:
    parser = TrlParser((ScriptArguments, IFTConfig, ModelConfig))
    parser.set_defaults(
        model_name_or_path="HuggingFaceTB/SmolLM2-135M-Instruct",
        dataset_name="trl-lib/tldr",
        output_dir="SmolLM2-135M-IFT",
        learning_rate=2e-4,
        num_train_epochs=1,
        use_peft=True,
        lora_target_modules="all-linear",
        use_cpu=not torch.accelerator.is_available(),
        bf16=torch.accelerator.is_available(),
    )
    script_args, training_args, model_args = parser.parse_args_and_config()
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }

    # `prompt` and `completion` columns, or `messages`, as for TRL's SFTTrainer
    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    trainer = IFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


if __name__ == "__main__":
    main()
