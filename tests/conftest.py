"""Shared fixtures: tiny tokenizers, models and datasets, built offline from configs."""

import gc
import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("CI", "1")  # silences TRL's telemetry
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import tiny
import torch


torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """`train` collects garbage: without the objects of the imported libraries it takes a tenth of the time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def tokenizer():
    """A tiny BPE tokenizer with a chat template. Do not change it: the whole session shares it."""
    return tiny.tokenizer()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, tokenizer):
    """Folder of a tiny Llama with its tokenizer, as `from_pretrained` expects it."""
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny.model("llama", tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
