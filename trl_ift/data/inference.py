"""Models that are only run: loading them, lending them a fused head, batches of a token budget, log-probabilities."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import PeftModel
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..checks import check_model_source, check_quantization
from ..trl_internals import (
    add_fused_lm_head,
    create_model_from_path,
    get_config_model_id,
    keep_4bit_trainable_on_cpu,
    score_labelled_positions_only,
)
from .fingerprint import base_model


def check_model(model: Any, processing_class: Any, adapter: str | None, init_kwargs: dict[str, Any]) -> None:
    """Raise, before anything is loaded, for a model that is none, or options that do not go with it."""
    if not isinstance(model, str | PreTrainedModel | PeftModel):
        raise TypeError(
            f"`model` is a {type(model).__name__}; expected a Hub id, a folder, a `PreTrainedModel` or a `PeftModel`."
        )
    check_model_source(model, processing_class)
    check_quantization(init_kwargs.get("quantization_config"))
    if not isinstance(model, str) and (adapter is not None or init_kwargs):
        raise ValueError(
            "`adapter`, `model_init_kwargs` and `quantization_config` are for a model that is named by a string; `model` is "
            f"a {type(model).__name__}. Apply them when you load it, and drop them here."
        )
    if adapter is not None and Path(adapter).is_dir() and not (Path(adapter) / "adapter_config.json").is_file():
        raise ValueError(f"The adapter folder `{adapter}` has no `adapter_config.json`: it holds no PEFT adapter.")


def check_runnable(model: PreTrainedModel | PeftModel) -> None:
    """Raise for an adapter that shifts positions, and for weights that are not in memory."""
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise ValueError(
            "The model does not fit: some of its weights were offloaded to the CPU or the disk. Load it in fewer bits "
            "(`dtype`, `load_in_4bit`), or use more GPUs."
        )
    if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"The adapter is prompt-learning PEFT ({type(model.active_peft_config).__name__}), which is not supported: in a "
            "batch, padding would come between its virtual tokens and the prompts. Use an adapter such as LoRA."
        )


def load_tokenizer(model: Any, processing_class: Any, init_kwargs: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Return the tokenizer that was given, or the model's."""
    if processing_class is None:
        source = model if isinstance(model, str) else get_config_model_id(model.config)
        options = {name: init_kwargs[name] for name in ("revision", "trust_remote_code") if name in init_kwargs}
        processing_class = AutoTokenizer.from_pretrained(source, **options)
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return 16 hex digits of all that decides which tokens a text becomes, and of the chat template."""
    parts = [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token, repr(tokenizer.chat_template)]
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        pipeline = json.loads(backend.to_str())
        # The vocabulary is in already, and calls leave their padding and truncation behind
        parts += [value for key, value in sorted(pipeline.items()) if key not in ("padding", "truncation", "model")]
        parts.append({key: value for key, value in pipeline["model"].items() if key != "vocab"})
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def load_model(
    source: str, adapter: str | None, init_kwargs: dict[str, Any], device: torch.device | None = None
) -> PreTrainedModel | PeftModel:
    """Load a model as TRL does; on `device`, where TRL would spread it over all GPUs."""
    if device is not None and device.type not in ("cpu", "mps"):
        init_kwargs = {"device_map": {"": device}} | init_kwargs
    elif not torch.accelerator.is_available():
        init_kwargs = {"device_map": None} | init_kwargs  # "auto" would form a group of the launched processes
    model = create_model_from_path(source, **init_kwargs)
    return model if adapter is None else PeftModel.from_pretrained(model, adapter)


def own_device(processes: int) -> torch.device | None:
    """The device of one of several processes of a launcher; `None` where TRL's choice is right."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    if processes == 1 or accelerator is None or cpu or "LOCAL_RANK" not in os.environ:
        return None
    rank, devices = int(os.environ["LOCAL_RANK"]), torch.accelerator.device_count()
    if rank >= devices:
        raise ValueError(
            f"This is process {rank + 1} on a machine with {devices} accelerators: each needs its own. Lower `--num_processes`."
        )
    return torch.device(accelerator.type, rank)


@contextmanager
def lent(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Make the model ready to sample and to score, and give it back as it was, with torch's random state."""
    base = base_model(model)
    keep_4bit_trainable_on_cpu(model)
    modes = [(module, module.training) for module in model.modules()]
    generation_config, forward = base.generation_config, vars(base).get("forward")
    device_type = model.device.type
    devices = {parameter.device.index for parameter in model.parameters() if parameter.device.type == device_type}
    with (
        torch.no_grad(),
        torch.autocast(device_type, enabled=False),  # a trainer may have left it on
        torch.random.fork_rng(sorted(devices - {None}), device_type=device_type),
    ):
        try:
            model.eval()
            # `generate` fills whatever the config that it is given leaves open from this one
            base.generation_config = GenerationConfig()
            add_fused_lm_head(base)
            score_labelled_positions_only(base)
            yield
        finally:
            for module, training in modes:
                module.training = training
            base.generation_config = generation_config
            vars(base).pop("forward", None)
            if forward is not None:
                base.forward = forward


# Rows shorter than this share of the longest of a batch begin another: few rows would be mostly padding otherwise
LIKE = 0.8


def batches(lengths: Sequence[int], batch_tokens: float, like: float = 0.0) -> list[list[int]]:
    """Return the indices in batches of like length, the longest first, each of at most `batch_tokens` with padding.

    No row is shorter than `like` times the longest of its batch.
    """
    found: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        longest = lengths[found[-1][0]] if found else 0
        if not found or (len(found[-1]) + 1) * longest > batch_tokens or lengths[index] < like * longest:
            found.append([])
        found[-1].append(index)
    return found


def sequence_log_probs(
    model: PreTrainedModel | PeftModel,
    sequences: Sequence[tuple[list[int], list[int]]],
    batch_tokens: int,
    pad_id: int,
) -> list[float]:
    """Return the summed log-probability, in nats, of the labelled tokens of each pair of token ids and labels (-100: none).

    Nothing predicts the first token, so that its label is not read. Sums are float64. Call it within `lent(model)`.
    """
    log_probs = [0.0] * len(sequences)
    for index, values in token_log_probs(model, sequences, batch_tokens, pad_id):
        log_probs[index] = values.sum(dtype=torch.float64).item()
    return log_probs


def token_log_probs(
    model: PreTrainedModel | PeftModel,
    sequences: Sequence[tuple[list[int], list[int]]],
    batch_tokens: int,
    pad_id: int,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the index of each sequence and the log-probability of its tokens but the first, float32, 0 without a label.

    Shape (length - 1,) or longer, with zeros behind. Call it within `lent(model)`.
    """
    # Adapters are layers of it. The forward around it may be a trainer's, in mixed precision.
    model = base_model(model)
    lengths = [len(ids) for ids, _ in sequences]
    for batch in batches(lengths, batch_tokens, LIKE):
        shape = (len(batch), lengths[batch[0]])
        ids, labels = torch.full(shape, pad_id), torch.full(shape, -100)
        for row, index in enumerate(batch):
            length = lengths[index]
            ids[row, :length], labels[row, :length] = map(torch.tensor, sequences[index])
        # No attention mask: causal models do not see the padding on the right, and are faster without
        output = model(
            input_ids=ids.to(model.device), labels=labels.to(model.device), fused_lm_head=True, use_cache=False
        )
        yield from zip(batch, output.log_probs.cpu(), strict=True)
