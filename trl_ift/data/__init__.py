"""From dataset to dataset: samples of a model, triples from scored responses, scores and selections of rows."""

from importlib import import_module
from typing import Any


# Public name -> module; imported on first use
_NAMES = {
    "DIRECT_PROMPT": "scoring",
    "SELECTIONS": "lobass",
    "Scorer": "scoring",
    "build_pairs": "pairs",
    "build_triples": "triples",
    "generate_completions": "generation",
    "learnability": "lobass",
    "load_completions": "generation",
    "load_scores": "scoring",
    "model_fingerprint": "fingerprint",
    "score_dataset": "scoring",
    "select_top": "lobass",
    "selection_scores": "lobass",
    "top_rows": "lobass",
    "write_selection": "selection",
}
__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_NAMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES])
