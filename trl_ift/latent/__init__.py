"""The latent space of LD-Align: guiding model, stand-ins for it, distances, and the weights of pairs."""

from importlib import import_module
from typing import Any


# Public name -> module; imported on first use
_NAMES = {
    "Encoder": "encoders",
    "GuideConfig": "guide",
    "GuideModel": "guide",
    "GuideTrainingArguments": "training",
    "LatentGuide": "guide",
    "PolicyHiddenState": "encoders",
    "Sample": "encoders",
    "SentenceEncoder": "encoders",
    "WeightNormalizer": "weights",
    "effective_sample_size": "weights",
    "encode_dataset": "weigh",
    "latent_distance": "weights",
    "reconstruction_check": "training",
    "train_guide": "training",
    "weigh_pairs": "weigh",
}
__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_NAMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES])
