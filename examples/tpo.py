# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-ift"]
# ///
"""Triple Preference Optimization (TPO): imitate a gold answer and contrast a pair, in one stage, without a reference model.

    uv run tpo.py                                  # from the Hub: SmolLM2-135M-Instruct, triples of UltraFeedback, LoRA
    python tpo.py --loss_type tpo-l --tpo_alpha 0.05
    python tpo.py --model_name_or_path ./model --dataset_name ./triples --output_dir ./tpo      # from local folders

The dataset has `prompt`, `reference` (or `gold`), `chosen`, `rejected`; `trl-ift triples` makes it from scored answers. Every
option of `TPOConfig` and `trl.ModelConfig` is a flag (`--help`).
"""

import torch
from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_ift import TPOConfig, TPOTrainer


def main() -> None:
    parser = TrlParser((ScriptArguments, TPOConfig, ModelConfig))
    parser.set_defaults(
        model_name_or_path="HuggingFaceTB/SmolLM2-135M-Instruct",
        dataset_name="tpo-alignment/triple-preference-ultrafeedback-40K",
        output_dir="SmolLM2-135M-TPO",
        learning_rate=1e-5,
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

    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    trainer = TPOTrainer(
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
