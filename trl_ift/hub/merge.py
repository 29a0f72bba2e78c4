"""`trl-ift merge`: an adapter merged into its base model, as a model of its own with a card, in a folder or on the Hub."""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ..checks import check_choice, check_model_source
from ..extension import adapter_summary
from ..registry import METHODS, Method, get_method
from ..scripts.tools import run_tool
from ..scripts.train import usage_error
from .card import build_model_card, is_hub_id, library_versions


DTYPES = ("auto", "bfloat16", "float16", "float32")
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# No pickles
_DOWNLOADED = ("*.json", "*.safetensors", "*.md", "*.jinja", "*.txt", "*.model")


def merge_adapter(
    adapter: str,
    output_dir: str | os.PathLike,
    *,
    base_model: str | None = None,
    dtype: str = "auto",
    method: str | None = None,
    hub_model_id: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Merge an adapter into its base model, and write weights, tokenizer and model card.

    The base is loaded in full precision, for an adapter that was trained on 4-bit weights too.

    Args:
        adapter: Folder or Hub id of a PEFT adapter.
        output_dir: Folder of the merged model; new or empty.
        base_model: Folder or Hub id of the base; by default the one that the adapter names.
        dtype: dtype of the merged weights; `"auto"` is that of the base.
        method: Name of the method for the model card; by default the one that the adapter's card names.
        hub_model_id: Hub id that the model card tells to load.
        trust_remote_code: Whether to run code that comes with the base model.

    Returns:
        `output_dir`.

    Raises:
        ValueError: The adapter is none, or cannot be merged; its base is missing or quantized; `output_dir` is not empty; the
            method is not known; or the merged weights are not finite. All but the last before the base is loaded.
    """
    output = Path(output_dir)
    check_choice("dtype", dtype, DTYPES)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise ValueError(f"`output_dir={str(output)!r}` is not empty. Choose a new folder.")
    if hub_model_id is not None and not is_hub_id(hub_model_id):
        raise ValueError(f"`hub_model_id={hub_model_id!r}` is no Hub id: expected 'name' or 'owner/name'.")
    folder = _adapter_folder(adapter)
    config = PeftConfig.from_pretrained(str(folder))
    _check_mergeable(config)
    card = (
        ModelCard.load(folder / "README.md", ignore_metadata_errors=True) if (folder / "README.md").is_file() else None
    )
    trained = _method(method, card)
    base = base_model or config.base_model_name_or_path
    own_base = base == config.base_model_name_or_path
    loading: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if own_base and config.revision is not None:
        loading["revision"] = config.revision
    _check_base(base, own_base, loading)

    tokenizer = AutoTokenizer.from_pretrained(
        str(folder) if (folder / "tokenizer_config.json").is_file() else base, trust_remote_code=trust_remote_code
    )
    model = _load_base(base, trained, folder, dtype, loading)
    if len(tokenizer) > model.get_input_embeddings().weight.size(0):  # tokens that were added for the training
        model.resize_token_embeddings(len(tokenizer))
    merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload(safe_merge=True)
    # PEFT checks layers with an adapter, not the modules that were trained whole
    if broken := [name for name, value in merged.named_parameters() if not value.isfinite().all()]:
        raise ValueError(
            f"The merged weights are not finite ({', '.join(broken[:3])}): the adapter is broken, or {merged.dtype} is too "
            "small for them. Nothing was written."
        )

    if trained.kind == "reward":  # of a batch, the reward is read at the last token that is no padding
        pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        merged.config.get_text_config().pad_token_id = pad_id
    merged.save_pretrained(output)
    tokenizer.save_pretrained(output)
    _card(adapter, base, config, trained, card, merged, tokenizer, output, hub_model_id).save(output / "README.md")
    return output


def push_folder(folder: str | os.PathLike, hub_model_id: str, private: bool | None = None) -> str:
    """Push a folder to the Hub, with the token of the environment or of `hf auth login`; return the address."""
    api = HfApi()
    url = api.create_repo(hub_model_id, private=private, exist_ok=True)
    api.upload_folder(repo_id=url.repo_id, folder_path=str(folder), commit_message="Merged model")
    return str(url)


def _adapter_folder(adapter: str) -> Path:
    """The folder of an adapter, downloaded if it is on the Hub."""
    folder = Path(adapter).expanduser()
    if not folder.is_dir():
        if not is_hub_id(adapter):
            raise ValueError(f"The adapter `{adapter}` does not exist: there is no such folder, and it is no Hub id.")
        try:
            folder = Path(snapshot_download(adapter, allow_patterns=list(_DOWNLOADED)))
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise ValueError(
                f"The adapter `{adapter}` is no folder, and cannot be downloaded from the Hub: {error}"
            ) from None
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            found = "a whole model" if (folder / "config.json").is_file() else f"no `{name}`"
            raise ValueError(
                f"`{adapter}` holds no PEFT adapter as safetensors: expected `{_CONFIG}` and `{_WEIGHTS}`, found {found}. Name "
                "the folder that a training with `--use_peft` wrote."
            )
    return folder


def _check_mergeable(config: PeftConfig) -> None:
    """Raise for an adapter that is no change of weights."""
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    if config.is_prompt_learning or not hasattr(tuner, "merge_and_unload"):
        raise ValueError(
            f"An adapter of the type {config.peft_type.value} cannot be merged: it is no change of the weights. Use it as an "
            "adapter; LoRA and its relatives can be merged."
        )


def _method(name: str | None, card: ModelCard | None) -> Method:
    """The method that an adapter was trained with."""
    if name is not None:
        return get_method(name)
    names = {method.name for method in METHODS}
    tags = _metadata(card, "tags") or ()
    for tag in tags if "trl-ift" in tags else ():  # "dpo" is a tag of TRL's own cards too
        if tag in names:
            return get_method(tag)
    raise ValueError(
        "The adapter has no model card of trl-ift, which would name its method. Name it with `--method` (`trl-ift methods` "
        "lists them)."
    )


def _metadata(card: ModelCard | None, name: str) -> Any:
    return None if card is None else card.data.get(name)


def _check_base(base: str | None, own: bool, loading: dict[str, Any]) -> None:
    """Raise unless the base can be loaded, in full precision."""
    remedy = "Name the base model with `--base_model` (a folder or a Hub id)."
    if not base:
        raise ValueError(f"The adapter does not name its base model. {remedy}")
    whose = "that the adapter names " if own else ""
    if not Path(base).is_dir() and not is_hub_id(base):
        raise ValueError(f"The base model {whose}does not exist: `{base}` is no folder and no Hub id. {remedy}")
    check_model_source(base, "of the adapter")
    try:
        config = AutoConfig.from_pretrained(base, **loading)
    except OSError as error:
        raise ValueError(f"The base model {whose}cannot be loaded: {error}\n{remedy}") from None
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"The base model `{base}` is stored with quantized weights, into which nothing can be merged exactly. Name the "
            "model that it was made of with `--base_model`."
        )


def _load_base(base: str, method: Method, folder: Path, dtype: str, loading: dict[str, Any]) -> Any:
    options = {**loading, "dtype": dtype}
    if method.kind != "reward":
        return AutoModelForCausalLM.from_pretrained(base, **options)
    with safe_open(folder / _WEIGHTS, "pt") as weights:  # the head is among them
        heads = [name for name in weights.keys() if name.endswith(("score.weight", "classifier.weight"))]  # noqa: SIM118
        labels = weights.get_slice(heads[0]).get_shape()[0] if heads else 1
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels, **options)


def _card(
    adapter: str,
    base: str,
    config: PeftConfig,
    method: Method,
    card: ModelCard | None,
    model: Any,
    tokenizer: Any,
    output: Path,
    hub_model_id: str | None,
) -> ModelCard:
    """The card of a merged model: its adapter, its base, its method."""
    paper = method.trainer_class._paper  # type: ignore[attr-defined]
    on_hub = not Path(base).is_dir()
    return build_model_card(
        model_name=Path(hub_model_id or output.resolve()).name,
        method=method.title,
        trainer_name=method.trainer,
        method_parameters={},
        training_parameters={},
        versions=library_versions(),
        base_model=base if on_hub else None,
        base_model_label=None if on_hub else base,
        hub_model_id=hub_model_id,
        dataset_names=_metadata(card, "datasets"),
        tags=[method.name],
        license=_metadata(card, "license"),
        paper_title=paper["title"],
        paper_id=paper["id"],
        citation=paper["citation"],
        peft_summary=adapter_summary(config),
        merged_adapter=path.resolve().name if (path := Path(adapter).expanduser()).is_dir() else adapter,
        merged_dtype=str(model.dtype).removeprefix("torch."),
        chat=bool(tokenizer.chat_template),
        pipeline_tag="text-classification" if method.kind == "reward" else "text-generation",
    )


# ---------------------------------------------------------------- the command line


def make_parser(prog: str = "trl-ift merge") -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Merge an adapter into its base model; write (and push) the result, its tokenizer and a model card.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", help="folder or Hub id of the adapter")
    add("--config", metavar="FILE", help="YAML file of options; those on the command line win")
    add("--output_dir", help="folder of the merged model; by default the adapter's name and '-merged'")
    add("--base_model", help="folder or Hub id of the base model, if not the one that the adapter names")
    add(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="dtype of the merged weights; 'auto' (default) is that of the base",
    )
    add("--method", help="method that the adapter was trained with, if its model card does not say")
    add("--push_to_hub", action="store_true", help="push the merged model to the Hub")
    add("--hub_model_id", help="Hub id to push to")
    add("--hub_private_repo", action="store_true", help="make a new repository private")
    add("--trust_remote_code", action="store_true", help="run code that comes with the base model")
    parser.error = partial(usage_error, prog)  # type: ignore[method-assign]
    return parser


def main(argv: list[str]) -> int:
    """Run `trl-ift merge` and return its exit code."""
    return run_tool(make_parser(), argv, _merge)


def _merge(args: argparse.Namespace) -> None:
    if args.push_to_hub != (args.hub_model_id is not None):
        raise ValueError("`--push_to_hub` and `--hub_model_id ID` go together: give both, or none.")
    name = Path(args.adapter).expanduser().resolve().name
    output = Path(args.output_dir or f"{name}-merged").expanduser()
    merge_adapter(
        args.adapter,
        output,
        base_model=args.base_model and os.path.expanduser(args.base_model),
        dtype=args.dtype,
        method=args.method,
        hub_model_id=args.hub_model_id,
        trust_remote_code=args.trust_remote_code,
    )
    print(f"Merged model written to {output}.")
    if args.push_to_hub:
        address = push_folder(output, args.hub_model_id, True if args.hub_private_repo else None)
        print(f"Pushed to {address}.")
