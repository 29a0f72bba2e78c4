"""The model card: metadata and text as a pure function of plain arguments, and a check that needs no network."""

import dataclasses
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..redaction import TOKEN, redacted


_TEMPLATE = Path(__file__).with_name("model_card.md")
_LIBRARIES = {
    "TRL": "trl",
    "trl-ift": "trl-ift",
    "PEFT": "peft",
    "Transformers": "transformers",
    "PyTorch": "torch",
    "Datasets": "datasets",
    "Tokenizers": "tokenizers",
}
_BADGES = {
    "Weights & Biases": "https://raw.githubusercontent.com/wandb/assets/main/wandb-github-badge-28.svg",
    "Trackio": "https://raw.githubusercontent.com/gradio-app/trackio/refs/heads/main/trackio/assets/badge.png",
    "Comet": "https://raw.githubusercontent.com/comet-ml/comet-examples/master/logo/comet_badge.png",
}

_DATA_FILES = {".json", ".jsonl", ".csv", ".parquet", ".txt", ".arrow"}

# The first alternative consumes addresses, so that the second, the only group, finds no path inside them
_ABSOLUTE_PATH = re.compile(
    r"\b(?!file:)[a-z][a-z0-9+.-]+://[^\s)>\"'|`]*"
    r"|(?<![\w.~])(~?/(?:[\w.@+-]+/)+[\w.@+-]*|[A-Za-z]:[\\/][\w.\\/@+-]+)"
)
_LINK = re.compile(r"\[([^\]\n]*)\]\(([^)\n]*)\)")


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries that a training run depends on, by the name to print."""
    return {name: version(package) for name, package in _LIBRARIES.items()}


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a Hub id, `"org/name"` or `"name"` (nothing is looked up)."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name != "None"


def build_model_card(
    *,
    model_name: str,
    method: str,
    trainer_name: str,
    method_parameters: Mapping[str, Any],
    training_parameters: Mapping[str, Any],
    versions: Mapping[str, str],
    base_model: str | None = None,
    base_model_label: str | None = None,
    hub_model_id: str | None = None,
    dataset_names: str | Sequence[str] | None = None,
    tags: Sequence[str] = (),
    license: str | None = None,
    paper_title: str | None = None,
    paper_id: str | None = None,
    citation: str | None = None,
    peft: bool = False,
    peft_summary: str | None = None,
    merged_adapter: str | None = None,
    merged_dtype: str | None = None,
    quantization: str | None = None,
    chat: bool = True,
    eval_results: Sequence[EvalResult] = (),
    wandb_url: str | None = None,
    trackio_url: str | None = None,
    comet_url: str | None = None,
    pipeline_tag: str = "text-generation",
) -> ModelCard:
    """Build the model card of a trained model.

    Of an absolute path in a parameter or a name only the last component is printed, and access tokens are blanked.

    Args:
        model_name: Title of the card.
        method: Full name of the method, e.g. `"Intuitive Fine-Tuning"`.
        trainer_name: Class name of the trainer.
        method_parameters: The options of the method itself, printed as a table.
        training_parameters: Learning rate, batch size and the like, printed as a table.
        versions: Library versions by name, see `library_versions`.
        base_model: Hub id of the base model; `None` if it is only a local folder.
        base_model_label: Name or folder of a base model without a Hub id.
        hub_model_id: Hub id of this model; without it the example names a local folder.
        dataset_names: Training datasets. Those of the form `"org/name"` are taken for Hub ids.
        tags: The method's tag and any others; "trl", "trl-ift" and "generated_from_trainer" are added.
        license: Hub license identifier, e.g. `"apache-2.0"`.
        paper_title: Title of the method's paper.
        paper_id: Its arXiv id.
        citation: Its BibTeX entry.
        peft: Whether the model is a PEFT adapter.
        peft_summary: The adapter in a few words, e.g. `"LoRA, rank 16, alpha 32"`.
        merged_adapter: Name or Hub id of the adapter that was merged into the base model to make this one.
        merged_dtype: dtype of the merged weights.
        quantization: The quantization of the base model in a few words.
        chat: Whether the tokenizer has a chat template; decides the example's input.
        eval_results: Results for the table and the metadata (there, only finite numbers and strings).
        wandb_url: Run on Weights & Biases.
        trackio_url: Run on Trackio.
        comet_url: Run on Comet.
        pipeline_tag: What the model does: `"text-generation"`, or `"text-classification"` for a reward model.

    Returns:
        The card. `str(card)` is the text of `README.md`.

    Raises:
        ValueError: `base_model` is not a Hub id.
    """
    if base_model is not None and not is_hub_id(base_model):
        raise ValueError(f"`base_model={base_model!r}` is not a Hub id. Pass a local folder as `base_model_label`.")
    names = [dataset_names] if isinstance(dataset_names, str) else list(dataset_names or [])
    names = [_printable(name) for name in names]
    hub_datasets = [name for name in names if _is_namespaced(name)]
    base_name = _printable(base_model_label) if base_model_label else None
    model_name = _printable(model_name)
    eval_results = [_plain_result(result) for result in eval_results]
    indexed = [r for r in eval_results if isinstance(r.metric_value, str) or math.isfinite(r.metric_value)]

    data = ModelCardData(
        base_model=base_model,
        base_model_relation=("adapter" if peft else "finetune") if base_model else None,
        library_name="peft" if peft else "transformers",
        pipeline_tag=pipeline_tag,
        license=license,
        datasets=hub_datasets or None,
        tags=[*dict.fromkeys(["trl", "trl-ift", *tags, "generated_from_trainer"])],
        model_name=model_name if indexed else None,
        eval_results=indexed or None,
    )
    if base_model:
        base = f"[{base_model}](https://huggingface.co/{base_model})"
    else:
        base = f"`{base_name}` (a local model)" if base_name else "a local model"
    urls = {"Weights & Biases": wandb_url, "Trackio": trackio_url, "Comet": comet_url}
    tables = {"Method parameters": method_parameters, "Training parameters": training_parameters}
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    text = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        card_data=data.to_yaml(),
        model_name=model_name,
        method=method,
        trainer_name=trainer_name,
        base=base,
        base_is_on_hub=base_model is not None,
        base_location=f"path/to/{base_name or 'base-model'}",
        location=hub_model_id or f"path/to/{model_name}",
        location_comment="" if hub_model_id else "  # the folder that holds this card",
        datasets=_dataset_phrase(names),
        chat=chat,
        reward=pipeline_tag == "text-classification",
        peft=peft,
        peft_summary=peft_summary,
        merged_adapter=_hub_link(_printable(merged_adapter)) if merged_adapter else None,
        merged_dtype=merged_dtype,
        quantization=quantization,
        trackers=[(f"Visualize in {name}", _BADGES[name], url) for name, url in urls.items() if url],
        paper_title=paper_title,
        paper_id=paper_id,
        citation=citation.strip() if citation else None,
        parameter_tables=[
            (title, [(name, f"`{_cell(value)}`") for name, value in rows.items()])
            for title, rows in tables.items()
            if rows
        ],
        results=[
            (
                _cell(r.dataset_name),
                r.dataset_split or "",
                _cell(r.metric_name or r.metric_type),
                _cell(r.metric_value),
            )
            for r in eval_results
        ],
        versions=list(versions.items()),
    )
    return ModelCard(redacted(text))


def check_model_card(card: ModelCard) -> list[str]:
    """Look for what makes a card invalid on the Hub, misleading, or leak something; `[]` if nothing is found.

    `ModelCard.validate` asks the Hub; this check works offline and also reads the text.
    """
    content = str(card)
    problems = [f"contains what looks like an access token: {found[0][:6]}..." for found in TOKEN.finditer(content)]
    paths = dict.fromkeys(path for path in _ABSOLUTE_PATH.findall(content) if path)
    problems += [f"contains an absolute path of the machine: {path}" for path in paths]
    for text, target in _LINK.findall(content):
        if re.search(r"\bNone\b", f"{text} {target}"):
            problems.append(f"link to None: [{text}]({target})")
        elif not target.startswith(("https://", "http://", "#")):
            problems.append(f"link with an invalid address: [{text}]({target})")
    block = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    try:
        data = yaml.safe_load(block[1]) if block else None
        ModelCard(content)  # parses `model-index` too
    except (yaml.YAMLError, ValueError) as error:
        return [*problems, f"the metadata cannot be parsed: {error}"]
    if not isinstance(data, dict):
        return [*problems, "no metadata block at the top"]
    return problems + _metadata_problems(data)


def _metadata_problems(data: dict[str, Any]) -> list[str]:
    problems = []
    if "licence" in data:
        problems.append("metadata key `licence` does not exist on the Hub: use `license`")
    if data.get("library_name") not in ("peft", "transformers"):
        problems.append(f"library_name is {data.get('library_name')!r}")
    if data.get("pipeline_tag") not in ("text-generation", "text-classification"):
        problems.append(f"pipeline_tag is {data.get('pipeline_tag')!r}")
    base_models = data.get("base_model") or []
    for name in base_models if isinstance(base_models, list) else [base_models]:
        if not isinstance(name, str) or not is_hub_id(name):
            problems.append(f"base_model {name!r} is not a Hub id")
    relation = "adapter" if data.get("library_name") == "peft" else "finetune"
    if data.get("base_model_relation") != (relation if base_models else None):
        problems.append(f"base_model_relation is {data.get('base_model_relation')!r}")
    datasets = data.get("datasets") or []
    if not isinstance(datasets, list) or not all(isinstance(name, str) and _is_namespaced(name) for name in datasets):
        problems.append(f"datasets must be a list of Hub ids, found {datasets!r}")
    tags = data.get("tags")
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        problems.append(f"tags must be a list of strings, found {tags!r}")
    elif tags[:2] != ["trl", "trl-ift"] or "generated_from_trainer" not in tags:
        problems.append(f"tags must begin with 'trl', 'trl-ift' and hold 'generated_from_trainer', found {tags!r}")
    for model in data.get("model-index") or []:
        if not isinstance(model.get("name"), str) or not model.get("results"):
            problems.append(f"model-index entry without a name or without results: {model!r}")
        values = [metric["value"] for result in model.get("results") or [] for metric in result["metrics"]]
        bad = [
            v
            for v in values
            if not isinstance(v, str | int | float) or (isinstance(v, float) and not math.isfinite(v))
        ]
        problems += [f"model-index holds the value {value!r}" for value in bad]
    return problems


def _is_namespaced(name: str) -> bool:
    """Whether `name` has the form `org/name`; a bare name may just as well be a local dataset."""
    return name.count("/") == 1 and is_hub_id(name) and PurePath(name).suffix not in _DATA_FILES


def _hub_link(name: str) -> str:
    """A link to a model on the Hub, or a local name as it is."""
    return f"[{name}](https://huggingface.co/{name})" if _is_namespaced(name) else f"`{name}`"


def _printable(value: Any) -> str:
    """`value` as text, with absolute paths cut down to their last component."""
    return _ABSOLUTE_PATH.sub(lambda match: PureWindowsPath(match[1]).name if match[1] else match[0], str(value))


def _cell(value: Any) -> str:
    """`value` as the content of a table cell."""
    if isinstance(value, float):
        value = f"{value:.6g}"
    text = " ".join(_printable(value).splitlines())  # a carriage return ends a line of Markdown too
    return text.replace("|", r"\|").replace("`", "'")


def _plain_result(result: EvalResult) -> EvalResult:
    """`result` with a Python number (or the string it had) as its value, so that it can be written as YAML."""
    value = result.metric_value
    if isinstance(value, str | bool | int):
        return result
    if not isinstance(value, numbers.Real):
        raise TypeError(f"The result of metric {result.metric_type!r} is not a number: {value!r}.")
    return dataclasses.replace(result, metric_value=float(value))


def _dataset_phrase(names: Sequence[str]) -> str:
    """`the [org/a](...) and `b` datasets`, or an empty string."""
    shown = [f"[{n}](https://huggingface.co/datasets/{n})" if _is_namespaced(n) else f"`{n}`" for n in names]
    if not shown:
        return ""
    *head, last = shown
    return f"the {', '.join(head)} and {last} datasets" if head else f"the {last} dataset"
