"""A name for the weights of a model, so that data sampled from it can be told from that of another."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from huggingface_hub import try_to_load_from_cache
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from ..hub.card import is_hub_id


def model_fingerprint(model: PreTrainedModel | PeftModel, with_adapters: bool = True) -> str:
    """
    Return 16 hex digits that tell the weights of a model from others.

    The same weights have the same fingerprint in float32 and bfloat16, with tied or copied embeddings, and under a LoRA adapter
    that does nothing yet (or is disabled); training changes it. Of several adapters the active ones count, and none with
    `with_adapters=False`; their scaling is not looked at. At most 4096 elements of each parameter are looked at; quantized
    weights count as they are stored.
    """
    entries, matrices = [], set()
    for name, parameter in _active_parameters(model, with_adapters):
        entry = (tuple(parameter.shape), _content_digest(parameter))
        if parameter.dim() > 1:
            if entry in matrices:
                continue  # a tied weight that was loaded or saved as a copy
            matrices.add(entry)
        entries.append((name, *entry))
    return hashlib.sha256(repr(sorted(entries)).encode()).hexdigest()[:16]


def _active_parameters(model: PreTrainedModel | PeftModel, with_adapters: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters that the model computes with, under the names that they have without PEFT."""
    named = list(base_model(model).named_parameters())
    adapters, active = set(), set()
    if is_peft_model(model):
        adapters = set(model.peft_config)
        if with_adapters:
            named += [(name, value) for name, value in model.named_parameters() if name.startswith("prompt_encoder.")]
        if with_adapters and not _adapters_disabled(model):
            active = set(model.active_adapters)

    def owner(name: str) -> str | None:
        return next((part for part in name.split(".") if part in adapters), None)

    replaced = {n.split(".modules_to_save.")[0] for n, _ in named if ".modules_to_save." in n and owner(n) in active}
    # LoRA adds B A x: nothing while the factor that starts at zero is zero
    factors = [(n, p) for n, p in named if ".lora_B." in n or ".lora_embedding_A." in n]
    trained = {(_lora_layer(name), owner(name)) for name, parameter in factors if parameter.any()}
    idle = {(_lora_layer(name), owner(name)) for name, _ in factors} - trained

    for name, parameter in named:
        if owner(name) not in {None, *active} or (_lora_layer(name), owner(name)) in idle:
            continue
        if ".original_module." in name and name.split(".original_module.")[0] in replaced:
            continue
        wrappers = {"base_layer", "original_module", "modules_to_save", *adapters}
        yield ".".join(part for part in name.split(".") if part not in wrappers), parameter


def _lora_layer(name: str) -> str:
    return name.split(".lora_")[0]


def _adapters_disabled(model: PeftModel) -> bool:
    return any(module.disable_adapters for module in model.modules() if isinstance(module, BaseTunerLayer))


def _content_digest(parameter: torch.Tensor) -> str:
    # An odd stride: it walks through all columns of a matrix of even width
    stride = -(-parameter.numel() // 4096) | 1
    sample = parameter.detach().reshape(-1)[::stride]
    if sample.is_floating_point():
        sample = sample.to(torch.bfloat16).contiguous().view(torch.int16)  # NumPy has no bfloat16
    return hashlib.sha256(sample.cpu().numpy().tobytes()).hexdigest()


def base_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model under a PEFT adapter, or the model itself."""
    return model.get_base_model() if is_peft_model(model) else model


def differs_from_source(model: PreTrainedModel, source: str) -> bool | None:
    """
    Whether a model in memory has other weights than the folder or Hub id that it was loaded from.

    Compares what `model_fingerprint` looks at, parameter by parameter. `None` if that cannot be said without a download: the
    weights are not there, are in several files, or have other names.
    """
    path = Path(source) / SAFE_WEIGHTS_NAME
    if not path.is_file():
        cached = try_to_load_from_cache(source, SAFE_WEIGHTS_NAME) if is_hub_id(source) else None
        if not isinstance(cached, str):
            return None
        path = Path(cached)
    parameters = dict(model.named_parameters())
    with safe_open(path, "pt") as file:
        common = [name for name in file.keys() if name in parameters]  # noqa: SIM118
        for name in common:
            stored = file.get_tensor(name)
            if stored.shape != parameters[name].shape or _content_digest(stored) != _content_digest(parameters[name]):
                return True
    return False if common else None
