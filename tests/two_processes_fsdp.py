"""Run by `torchrun --nproc-per-node 2`: trainers under FSDP2 on CPUs (gloo), whose weights `fully_shard` really shards.

Usage: two_processes_fsdp.py MODEL_DIR OUTPUT_DIR

accelerate turns FSDP on for accelerators only; `shard_on_cpu` is all that is done by hand. Also the home of what this run
shares with the tests on one process.
"""

import os
import sys
from functools import partial
from pathlib import Path

import pairs
import pytest
import tiny
import torch
import transformers
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, patch_environment
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from test_methods import DATA
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, TrainerCallback
from two_processes_invariance import TOGETHER, reference_model, takes_reference

from trl_ift import get_method
from trl_ift.preference.trainer import REF_COLUMNS
from trl_ift.trl_internals import LMHead, add_fused_lm_head, score_labelled_positions_only


LORA = {"r": 2, "target_modules": ["q_proj", "up_proj"], "use_dora": True}
# Name of a run -> (method, settings). "start": a folder; weights that have moved since they were loaded from one; a new
# adapter; an adapter that is trained on; or, without it, weights without a name. "reference": another model, not the start
RUNS = {
    "ift": ("ift", {}),
    "ift, tied": ("ift", {"family": "llama-tied"}),
    "dpo, other reference": ("dpo", {"reference": True}),
    "dpo, folder": ("dpo", {"start": "folder"}),
    "dpo, folder, precomputed": ("dpo", {"start": "folder", "evaluated": True, "precompute_ref_log_probs": True}),
    "dpo, moved": ("dpo", {"start": "moved"}),
    "dpo, moved, precomputed": ("dpo", {"start": "moved", "precompute_ref_log_probs": True}),
    "dpo, new adapter": ("dpo", {"start": "new adapter"}),
    "dpo, old adapter": ("dpo", {"start": "old adapter"}),
    "ift, checkpointing": ("ift", {"gradient_checkpointing": True}),
    "dpo, checkpointing": ("dpo", {"gradient_checkpointing": True}),
    "ift, bfloat16": ("ift", {"bf16": True}),
    "dpo, bfloat16": ("dpo", {"bf16": True, "reference": True}),
    "dpo, bfloat16, new adapter": ("dpo", {"bf16": True, "start": "new adapter"}),
    "dpo, shared prompt": ("dpo", {"shared_prompt": True}),
    "dpop, stored reference": ("dpop", {"stored": True}),
    "tpo": ("tpo", {"evaluated": True}),
    "exo": ("exo", {}),
    "fpo": ("fpo", {"reference": True}),
    "ulma": ("ulma", {"reference": True}),
    "ulma, moved, precomputed": ("ulma", {"start": "moved", "precompute_ref_log_probs": True}),
    "eurus, folder": ("eurus-reward", {"start": "folder"}),
}
# The environment that `accelerate launch` makes of TRL's fsdp2.yaml
SHIPPED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_OFFLOAD_PARAMS": "false",
}
# Runs of its own under it: the weights of rank 0 count there, and new ones are made on that rank alone
SHIPPED_RUNS = ["ift", "eurus, folder"]
if Version(transformers.__version__) >= Version("5.23"):  # before, a reference has other weights there, and is refused
    SHIPPED_RUNS += ["dpo, folder", "dpo, folder, precomputed"]


def folder_of(output_dir, name, shipped=False):
    return Path(output_dir) / f"{name}{', shipped' * shipped}".replace(", ", "-").replace(" ", "_")


def moved(model, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return model


def make(run, model_dir, folder, tokenizer, **options):
    """The trainer of a value of `RUNS`; it descends by plain gradients, so that rounding does not grow."""
    method, settings = get_method(run[0]), {**run[1], **options}
    given = DATA.get(method.name, lambda settings: {"train_dataset": tiny.preference_data()})({})
    data = given.pop("train_dataset")
    if takes_reference(method) and not settings.pop("stored", False):
        data = data.remove_columns([column for column in REF_COLUMNS if column in data.column_names])
    if settings.pop("reference", False):
        given["ref_model"] = reference_model(tokenizer)
    start, family = settings.pop("start", None), settings.pop("family", "llama")
    if start == "folder":
        model = model_dir
    elif start == "moved":
        model = moved(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32))
    else:
        model = tiny.model(family, tokenizer)
    if settings.pop("evaluated", False):
        given["eval_dataset"] = data
        settings |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}
    if start == "new adapter":
        settings["peft_config"] = LoraConfig(**LORA)
    if start == "old adapter":
        torch.manual_seed(0)
        model = moved(get_peft_model(model, LoraConfig(**LORA)))
    options = {"optim": "sgd", "overwrite_output_dir": True, **settings}
    torch.manual_seed(0)
    return pairs.make(
        partial(method.trainer_class, **given), method.config_class, folder, model, data, tokenizer, **options
    )


def shard_on_cpu():
    """Let accelerate's state become that of FSDP where there is a plugin for it, as it does with accelerators."""
    original = AcceleratorState.__init__

    def with_plugin(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = with_plugin


def fsdp(state_dict_type="FULL_STATE_DICT"):
    config = {"version": 2, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer", "state_dict_type": state_dict_type}
    return {"fsdp": True, "fsdp_config": config, "ddp_backend": "gloo"}


class Sharded(TrainerCallback):
    """Counts the parameters of which a process holds a part."""

    number = 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        parameters = [p for p in model.parameters() if isinstance(p, DTensor)]
        assert len(parameters) == len(list(model.parameters()))
        self.number = sum(p.to_local().numel() < p.numel() for p in parameters)


def losses_of(trainer):
    """Losses of the steps, and of the evaluations after them."""
    return [entry[key] for entry in trainer.state.log_history for key in ("loss", "eval_loss") if key in entry]


def run(name, model_dir, output_dir, tokenizer, shipped=False):
    options = {**({"ddp_backend": "gloo"} if shipped else fsdp()), **TOGETHER, "logging_steps": 1}
    folder = folder_of(output_dir, name, shipped)
    trainer = make(RUNS[name], model_dir, folder, tokenizer, **options)
    assert trainer.accelerator.is_fsdp2
    trainer.add_callback(callback := Sharded())
    trainer.train()
    assert callback.number > 10
    if trainer.args.bf16:  # whatever the precision of the weights
        ids = torch.arange(20, 30)[None]
        assert trainer.model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.dtype == torch.float32
    trainer.save_model(str(folder / "saved"))
    return losses_of(trainer)


def resume(state_dict_type, model_dir, output_dir, tokenizer):
    """Weights of a run, and of one that goes on from its checkpoint."""
    options = {**fsdp(state_dict_type), **TOGETHER, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2}
    options |= {"max_steps": 4, "logging_steps": 1}
    folder = Path(output_dir) / state_dict_type
    found = []
    for checkpoint in (None, str(folder / "run" / "checkpoint-2")):
        trainer = make(RUNS["dpo, other reference"], model_dir, folder, tokenizer, **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert len(pairs.logs(trainer)) == 4
        found.append((pairs.logs(trainer), trainer.accelerator.get_state_dict(trainer.model)))
    return found, sorted(path.name for path in Path(checkpoint).iterdir())


def heads(tokenizer):
    """Log-probs, gradients and logits of a model whose head is seen as a whole, and as the shards of two processes."""
    found = []
    for family in ("llama", "gemma2"):  # our head, and TRL's for capped logits
        for sharded in (False, True):
            model = tiny.model(family, tokenizer, tie_word_embeddings=False)
            add_fused_lm_head(model, outputs=("log_probs", "entropy"))
            score_labelled_positions_only(model)
            if sharded:  # on its own: nothing runs it, so that nothing gathers it
                fully_shard(model.lm_head)
            ids = torch.arange(20, 32).view(2, 6)
            output = model(input_ids=ids, labels=ids, fused_lm_head=True)
            (output.log_probs.sum() + output.entropy.square().sum()).backward()
            weight = model.lm_head.weight
            assert isinstance(weight, DTensor) == sharded
            tiles = torch.cat([tile for _, tile in LMHead.of(model).logit_tiles(model, torch.ones(3, 16), 2**10)])
            grad = weight.grad.full_tensor() if sharded else weight.grad
            found.append([output.log_probs.detach(), grad, tiles])
    return found


def refusal(tokenizer, folder):
    """What a method with modules of its own says."""
    with pytest.raises(ValueError, match="not supported with DeepSpeed and FSDP") as error:
        make(("self-supervised-po", {}), None, folder, tokenizer, **fsdp())
    return str(error.value)


def main(model_dir, output_dir):
    torch.set_num_threads(1)
    shard_on_cpu()
    tokenizer = tiny.tokenizer()
    places = {"model_dir": model_dir, "output_dir": output_dir, "tokenizer": tokenizer}
    found = {"losses": {name: run(name, **places) for name in RUNS}}
    with patch_environment(**SHIPPED):
        found["shipped"] = {name: run(name, **places, shipped=True) for name in SHIPPED_RUNS}
    found |= {kind: resume(kind, **places) for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT")}
    found["heads"] = heads(tokenizer)
    found["refusal"] = refusal(tokenizer, Path(output_dir) / "refused")
    if os.environ["RANK"] == "0":
        torch.save(found, f"{output_dir}/found.pt")
    torch.distributed.barrier()
    os._exit(0)  # tearing gloo down beside live models sometimes hangs in torch 2.13


if __name__ == "__main__":
    main(*sys.argv[1:])
