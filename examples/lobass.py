# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-ift[report]"]
# ///
"""LoBaSS: find the small part of a dataset that this model can learn from, and train on it alone.

    uv run lobass.py                                  # from the Hub: SmolLM2-135M-Instruct, 6 % of tldr, LoRA
    python lobass.py --fraction 0.167 --num_train_epochs 3
    python lobass.py --model_name_or_path ./model --dataset_name ./data --output_dir ./lobass     # from local folders

Fine-tunes a reference on all rows, scores every row before and after (the adapter switched off and on: one model in memory),
keeps the rows whose loss training took away, and fine-tunes the initial model on them. `trl-ift lobass` does all but the last
step, resumes after an interruption and runs on several GPUs. Every option of `trl.SFTConfig` and `trl.ModelConfig` is a flag.
"""

from copy import copy
from dataclasses import dataclass, field

import torch
from datasets import load_dataset
from trl import (
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from trl_ift.data import score_dataset, write_selection


@dataclass
class SelectionArguments:
    fraction: float = field(default=0.06, metadata={"help": "Share of the rows to keep."})


def main() -> None:
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, SelectionArguments))
    parser.set_defaults(
        model_name_or_path="HuggingFaceTB/SmolLM2-135M-Instruct",
        dataset_name="trl-lib/tldr",
        output_dir="SmolLM2-135M-LoBaSS",
        learning_rate=2e-4,
        num_train_epochs=1,
        use_peft=True,
        lora_target_modules="all-linear",
        use_cpu=not torch.accelerator.is_available(),
        bf16=torch.accelerator.is_available(),
    )
    script_args, args, model_args, selection_args = parser.parse_args_and_config()
    if not model_args.use_peft:
        raise SystemExit("This script scores with the adapter off and on. Without one, use `trl-ift lobass`.")
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(args.model_init_kwargs or {}),
    }
    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)[script_args.dataset_train_split]

    def train(rows, output_dir):
        run = copy(args)
        run.output_dir = output_dir
        trainer = SFTTrainer(
            model=model_args.model_name_or_path,
            args=run,
            train_dataset=rows,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
        trainer.train()
        return trainer

    reference = train(dataset, f"{args.output_dir}/reference")
    options = {"processing_class": reference.processing_class, "args": args}
    with reference.model.disable_adapter():
        before = score_dataset(reference.model, dataset, f"{args.output_dir}/scores/initial", **options)
    after = score_dataset(reference.model, dataset, f"{args.output_dir}/scores/reference", **options)
    selected = write_selection(
        f"{args.output_dir}/selection",
        dataset,
        before,
        after,
        fraction=selection_args.fraction,
        dataset_text_field=args.dataset_text_field,
    )
    print(f"Selected {len(selected)} of {len(dataset)} rows; see {args.output_dir}/selection/report.html.")
    del reference

    trainer = train(selected, args.output_dir)
    trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


if __name__ == "__main__":
    main()
