# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-ift"]
# ///
"""Maximum Preference Optimization (MPO, arXiv 2312.16430): sample the starting model once, then train without a reference.

    uv run mpo.py                                  # from the Hub: SmolLM2-135M-Instruct on UltraFeedback pairs, LoRA
    python mpo.py --max_prompts 2000 --max_new_tokens 128 --reg_weight 0.02
    python mpo.py --model_name_or_path ./model --dataset_name ./data --output_dir ./mpo         # from local folders

The samples go to `OUTPUT_DIR/_samples`; interrupted, the same command goes on. Every option of `MPOConfig` and
`trl.ModelConfig` is a flag (`--help`).
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_ift import MPOConfig, MPOTrainer
from trl_ift.data import generate_completions


@dataclass
class SamplingArguments:
    max_prompts: int | None = field(default=None, metadata={"help": "Sample for the first prompts only."})
    max_new_tokens: int = field(default=256, metadata={"help": "Most tokens of a sample."})


def main() -> None:
    parser = TrlParser((ScriptArguments, SamplingArguments, MPOConfig, ModelConfig))
    parser.set_defaults(
        model_name_or_path="HuggingFaceTB/SmolLM2-135M-Instruct",
        dataset_name="trl-lib/ultrafeedback_binarized",
        output_dir="SmolLM2-135M-MPO",
        learning_rate=1e-5,
        num_train_epochs=1,
        use_peft=True,
        lora_target_modules="all-linear",
        use_cpu=not torch.accelerator.is_available(),
        bf16=torch.accelerator.is_available(),
    )
    script_args, sampling_args, training_args, model_args = parser.parse_args_and_config()
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    quantization_config = get_quantization_config(model_args)

    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    train_dataset = dataset[script_args.dataset_train_split]
    samples = None
    if training_args.reg_weight > 0 and training_args.reg_dataset_name is None:
        prompts = train_dataset
        if sampling_args.max_prompts is not None:
            prompts = prompts.select(range(min(sampling_args.max_prompts, len(prompts))))
        samples = generate_completions(
            model_args.model_name_or_path,
            prompts,
            str(Path(training_args.output_dir) / "_samples"),  # not pushed to the Hub
            max_new_tokens=sampling_args.max_new_tokens,
            seed=training_args.seed,
            model_init_kwargs={
                **training_args.model_init_kwargs,
                "trust_remote_code": training_args.trust_remote_code,
            },
            quantization_config=quantization_config,
        )

    trainer = MPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        quantization_config=quantization_config,
        peft_config=get_peft_config(model_args),
        reg_dataset=samples,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


if __name__ == "__main__":
    main()
