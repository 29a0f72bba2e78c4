"""Embeddings of prompts, one vector a row: what tells methods that compare prompts how alike two of them are."""

import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm
from trl import maybe_extract_prompt

from .caching import versioned
from .rows import check_texts


EMBEDDING = "prompt_embedding"
_WORD = re.compile(r"\w+|[^\w\s]")
_HASHED_SIZE = 512


def prompt_text(prompt: Any) -> str:
    """A prompt as one text: a string as it is, the contents of messages one below the other."""
    if isinstance(prompt, str):
        return prompt
    parts = []
    for message in prompt:
        content = message.get("content") or ""
        parts.append(content if isinstance(content, str) else " ".join(part.get("text") or "" for part in content))
    return "\n".join(parts)


def hashed_tfidf(texts: Sequence[str], size: int = _HASHED_SIZE) -> np.ndarray:
    """Unit vectors of N texts, (N, size), float32: words, hashed, weighted with TF-IDF over the texts.

    Deterministic, without a model or another package. Texts are alike if they share rare words; it knows no synonyms, and no
    words of languages that are written without spaces.
    """
    words = [Counter(_WORD.findall(text.lower()) or [""]) for text in texts]
    documents = Counter(word for counts in words for word in counts)
    vectors = np.zeros((len(texts), size), dtype=np.float32)
    for vector, counts in zip(vectors, words, strict=True):
        for word, count in counts.items():
            rarity = math.log((1 + len(texts)) / (1 + documents[word])) + 1
            vector[zlib.crc32(word.encode()) % size] += (1 + math.log(count)) * rarity
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def embed_prompts(
    dataset: Dataset, encoder: Callable[[list[str]], Any] | None = None, batch_size: int = 64
) -> Dataset:
    """Add a column `prompt_embedding`, a vector of length 1 for the prompt of each row.

    Args:
        dataset: With a column `prompt` (a string or messages), or `chosen` and `rejected` that begin with it.
        encoder: Turns N texts into an array (N, D), e.g. `SentenceTransformer("all-MiniLM-L6-v2").encode`. By default
            [`hashed_tfidf`] over all prompts of the dataset.
        batch_size: Texts of one call of `encoder`.

    Raises:
        TypeError, ValueError: The dataset is a stream, is empty or has that column, or the encoder does not return a vector for
            each text that is finite and not 0.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(f"`dataset` must be a `Dataset`, got `{type(dataset).__name__}`.")
    if not len(dataset):
        raise ValueError("`dataset` is empty: it has no rows. Check the split, and any filter applied before.")
    if EMBEDDING in dataset.column_names:
        raise ValueError(
            f"`dataset` has a column '{EMBEDDING}'. Drop it first: `dataset.remove_columns('{EMBEDDING}')`."
        )
    keys = next((keys for keys in (["prompt"], ["chosen", "rejected"]) if {*keys} <= {*dataset.column_names}), None)
    if keys is None:
        raise ValueError(
            f"`dataset` has the columns {dataset.column_names}; expected 'prompt', or 'chosen' and 'rejected' that begin with "
            "it."
        )
    check_texts(dataset, "dataset", keys)
    texts = [
        prompt_text(maybe_extract_prompt(row)["prompt"]) for row in dataset.with_format(None).select_columns(keys)
    ]
    if encoder is None:
        vectors = hashed_tfidf(texts)
    else:
        starts = tqdm(range(0, len(texts), batch_size), desc="Embedding prompts", disable=None)
        vectors = np.concatenate([_encoded(encoder, texts[start : start + batch_size]) for start in starts])
    options = {"fn_kwargs": {"vectors": vectors}, "desc": "Storing prompt embeddings"}
    return dataset.map(versioned(_attach), with_indices=True, batched=True, **options)


def _encoded(encoder: Callable[[list[str]], Any], texts: list[str]) -> np.ndarray:
    """What the encoder makes of some texts, at length 1."""
    vectors = np.asarray(encoder(texts), dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != len(texts):
        raise ValueError(
            f"`encoder` returned an array of shape {vectors.shape} for {len(texts)} texts, expected ({len(texts)}, D)."
        )
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (np.isfinite(norms) & (norms > 0)).all():
        bad = texts[int(np.argmin(np.isfinite(norms) & (norms > 0)))]
        raise ValueError(f"`encoder` returned a vector that is zero or not finite for the prompt {bad[:80]!r}.")
    return vectors / norms


def _attach(batch: dict[str, list[Any]], indices: list[int], vectors: np.ndarray) -> dict[str, list[Any]]:
    return {EMBEDDING: list(vectors[indices])}
