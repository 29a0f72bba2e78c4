"""From dataset to dataset: samples of a model, triples from scored responses, scores and selections of rows."""

from importlib import import_module
from typing import Any


# Public name -> module; imported on first use
_NAMES = {
    "DIRECT_PROMPT": "scoring",
    "SELECTIONS": "lobass",
    "Scorer": "scoring",
    "build_counterfactual_pairs": "counterfactual",
    "build_pairs": "pairs",
    "build_triples": "triples",
    "cross_turn_pairs": "trees",
    "embed_prompts": "embeddings",
    "estimate_token_weights": "token_weights",
    "generate_completions": "generation",
    "learnability": "lobass",
    "load_completions": "generation",
    "load_scores": "scoring",
    "model_fingerprint": "fingerprint",
    "score_dataset": "scoring",
    "score_references": "references",
    "select_top": "lobass",
    "store_references": "stored_references",
    "selection_scores": "lobass",
    "top_rows": "lobass",
    "tree_to_pairs": "trees",
    "tree_to_sft": "trees",
    "write_selection": "selection",
}
__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_NAMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES])
