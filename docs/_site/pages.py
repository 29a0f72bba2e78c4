"""Pages of the documentation that are made of the code: `python docs/_site/pages.py` writes `choose.md` and `cli.md` anew.

Their navigation too: which pages there are, in which groups.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, Field, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from trl_ift import METHODS, Method


DOCS = Path(__file__).parents[1]

# The methods by the data that they train on: heading, what such data looks like, and which methods these are
GROUPS: tuple[tuple[str, str, Callable[[Method], bool]], ...] = (
    (
        "Good answers alone",
        "Prompts with one good answer each: an SFT dataset, `prompt` and `completion`, or `messages`.",
        lambda m: m.kind in ("sft", "self-play"),
    ),
    (
        "Pairs",
        "Two answers to a prompt and which one is better: `prompt`, `chosen`, `rejected`.",
        lambda m: m.data == "preference",
    ),
    (
        "Pairs, and more",
        "Pairs, and something beside them that says more than which answer is better.",
        lambda m: m.data.startswith("preference") and m.data != "preference" and m.kind != "reward",
    ),
    (
        "Triples and lists",
        "A gold answer beside each pair, or several scored answers to a prompt.",
        lambda m: m.kind in ("triples", "lists"),
    ),
    (
        "Feedback on single answers",
        "Thumbs up or down, or a score, on one answer to a prompt: `prompt`, `completion`, `label` or `score`.",
        lambda m: m.kind == "unpaired",
    ),
    (
        "Pairs, for a reward model",
        "The same pairs, to train a model that scores answers.",
        lambda m: m.kind == "reward",
    ),
)

# The other pages in order: heading of the group, its pages with their titles
GUIDES = {
    "Start": {"quickstart.md": "Quick start", "choose.md": "Choose a method", "moving.md": "Moving from other tools"},
    "Data": {
        "data.md": "Samples, pairs, triples",
        "lobass.md": "Select rows (LoBaSS)",
        "counterfactual_dpo.md": "Pairs from two prompts",
    },
    "Training": {
        "check.md": "Check a training",
        "resuming.md": "Resuming",
        "references.md": "Stored references",
        "shared_prompt.md": "Shared prompts",
        "scaling.md": "More than one GPU",
        "merging.md": "Merging adapters",
        "metrics.md": "Metrics",
    },
    "Comparing": {
        "study.md": "The study",
        "benchmarks.md": "Benchmarks",
        "benchmarks_study.md": "A study of SmolLM2",
        "benchmarks_study_report.md": "Its report",
    },
    "Reference": {
        "cli.md": "Commands",
        "examples.md": "Examples",
        "versions.md": "Versions",
        "security.md": "Security",
        "extending.md": "Adding a method",
    },
}


def page(method: Method) -> str:
    """File of a method's page in `docs/`."""
    return "preference.md" if method.name == "dpo" else f"{method.name.replace('-', '_')}.md"


def _template(file: str) -> str:
    return (Path(__file__).parent / file).read_text(encoding="utf-8")


def grouped_methods() -> Iterator[tuple[str, str, list[Method]]]:
    """Heading, description and methods of each group; every method is in exactly one."""
    left = set(METHODS)
    for heading, description, belongs in GROUPS:
        found = [method for method in METHODS if belongs(method)]
        if not left >= set(found):
            raise ValueError(f"Methods in two groups: {[m.name for m in set(found) - left]}. Change `GROUPS`.")
        left -= set(found)
        yield heading, description, found
    if left:
        raise ValueError(f"Methods in no group: {[method.name for method in left]}. Change `GROUPS`.")


def navigation(existing: Iterable[str]) -> list[Any]:
    """The `nav` of mkdocs, of the pages that exist."""
    existing = set(existing)
    guides = {
        heading: [{title: file} for file, title in pages.items() if file in existing]
        for heading, pages in GUIDES.items()
    }
    methods = [{heading: [page(method) for method in found]} for heading, _, found in grouped_methods()]
    before = ("Start", "Data", "Training")
    return [
        {"Home": "index.md"},
        *({heading: guides[heading]} for heading in before),
        {"Methods": methods},
        *({heading: pages} for heading, pages in guides.items() if heading not in before),
    ]


# ---------------------------------------------------------------- choose.md


def choose_page() -> str:
    """Text of `choose.md`."""
    parts = []
    for heading, description, methods in grouped_methods():
        rows = [f"| [{m.title}]({page(m)}) | `{m.name}` | {m.data} | {m.summary} |" for m in methods]
        parts += [
            f"### {heading}\n",
            f"{description}\n",
            "| method | command | data | what for |",
            "| --- | --- | --- | --- |",
        ]
        parts += [*rows, ""]
    symptoms = ["| what you see, or have | method |", "| --- | --- |"]
    symptoms += [f"| {m.symptom} | [{m.title}]({page(m)}) |" for m in METHODS if m.symptom]
    return _template("choose.md").format(groups="\n".join(parts), symptoms="\n".join(symptoms))


# ---------------------------------------------------------------- cli.md


def cli_page() -> str:
    """Text of `cli.md`."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

    from trl_ift.cli import _CHECK, _LOBASS, _TOOLS
    from trl_ift.extension import ExtensionConfig
    from trl_ift.preference.trainer import PreferenceConfig
    from trl_ift.scripts import check, lobass

    shared = {field.name for field in fields(ExtensionConfig)}
    methods = [method for _, _, found in grouped_methods() for method in found]
    parsers = {method: _parser(method) for method in methods}
    some = parsers[methods[0]]
    scripts = {
        field.name for config in (ScriptArguments, ModelConfig, DatasetMixtureConfig) for field in fields(config)
    }
    training = []
    for method, parser in parsers.items():
        trl_config = _trl_config(method)
        theirs = {field.name: _default(field) for field in fields(trl_config)}
        ours = {field.name: _default(field) for field in fields(method.config_class)}
        as_trl = {name for name, default in theirs.items() if name == "loss_type" or ours[name] == default}
        inherited = issubclass(method.config_class, PreferenceConfig) and method.config_class is not PreferenceConfig
        of_base = {field.name for field in fields(PreferenceConfig)} - set(theirs) - shared if inherited else set()
        own = [a for a in _options(parser) if a.dest not in as_trl | scripts | shared | of_base]
        base = (
            "the options of [`trl-ift dpo`](#trl-ift-dpo)"
            if inherited
            else f"the options of TRL's `{trl_config.__name__}`"
        )
        text = [
            f"### `trl-ift {method.name}`\n",
            f"[{method.title}]({page(method)}): {method.summary}. Data: {method.data}.\n",
            f"T{base[1:]}{', and' if own else '; none of its own.'}\n",
        ]
        training.append(
            "\n".join([*text, _table(own, "(TRL's, with another default) ", set(theirs))] if own else text)
        )
    own = _options(lobass.make_parser(), {field.name for field in fields(lobass.LoBaSSArguments)})
    training.append(
        f"### `trl-ift lobass`\n\n{_LOBASS}: [LoBaSS](lobass.md).\n\n"
        f"The options of TRL's `SFTConfig`, for the reference, and\n\n{_table(own)}"
    )
    added = {a.dest for a in _options(check.make_parser(methods[0]))} - {a.dest for a in _options(some)}
    training.append(
        f"### `trl-ift check`\n\n{_CHECK}: [Check a training](check.md).\n\n"
        "`trl-ift check METHOD` takes the options of `trl-ift METHOD`, and\n\n"
        + _table(_options(check.make_parser(methods[0]), added))
    )
    tools = [_tool(name, module, summary) for name, (module, summary) in _TOOLS.items()]
    contents = [f"| `{method.name}` | {method.title} |" for method in methods]
    contents += [f"| `lobass` | {_LOBASS} |", f"| `check` | {_CHECK} |"]
    contents += [f"| `{name}` | {summary} |" for name, (_, summary) in _TOOLS.items()]
    contents += ["| `methods` | List the methods, their data and papers |", "| `env` | Print versions and hardware |"]
    return _template("cli.md").format(
        contents="\n".join(["| command | |", "| --- | --- |", *contents]),
        shared=_table([action for action in _options(some) if action.dest in shared]),
        scripts=_table([action for action in _options(some) if action.dest in scripts]),
        training="\n\n".join(training),
        tools="\n\n".join(tools),
    )


def _parser(method: Method) -> argparse.ArgumentParser:
    script = import_module(f"trl_ift.scripts.{method.script.removesuffix('.py')}")
    return script.make_parser(method, f"trl-ift {method.name}")


def _trl_config(method: Method) -> type:
    """The config of TRL that a method's config extends."""
    return next(base for base in method.config_class.__mro__ if base.__module__.startswith("trl."))


def _default(field: Field) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _tool(name: str, module: str, summary: str) -> str:
    from transformers import TrainingArguments

    parser = import_module(module).make_parser()
    text = f"### `trl-ift {name}`\n\n{_cell(parser.description or summary).rstrip('.')}.\n\n"
    subcommands = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not subcommands:
        options = _options(parser)
        training = {field.name for field in fields(TrainingArguments)}
        if training <= {action.dest for action in options}:
            text += "The options of transformers' `TrainingArguments`, and\n\n"
            options = [action for action in options if action.dest not in training]
        return text + _table(options)
    summaries = {choice.dest: choice.help for choice in subcommands[0]._choices_actions}
    parts = []
    for command, subparser in subcommands[0].choices.items():
        options = _options(subparser)
        parts.append(f"`trl-ift {name} {command}`: {_cell(summaries[command] or '')}.\n\n{_table(options)}")
    return text + "\n\n".join(parts)


def _options(parser: argparse.ArgumentParser, names: set[str] | None = None) -> list[argparse.Action]:
    """What a parser takes (of `names`), without `--help`; of a switch and its opposite only what changes something."""
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    if names is not None:
        actions = [action for action in actions if action.dest in names]
    negated = {action.dest for action in actions if any(o.startswith("--no_") for o in action.option_strings)}
    return [a for a in actions if a.dest not in negated or any(o.startswith("--no_") for o in a.option_strings)]


def _table(actions: list[argparse.Action], remark: str = "", remarked: Iterable[str] = ()) -> str:
    """Options as a Markdown table; a `remark` stands before the text of those in `remarked`."""
    rows = ["| option | default | what it does |", "| --- | --- | --- |"]
    for action in actions:
        # Of several spellings the one with underscores, as in TRL
        name = next((o for o in action.option_strings if "-" not in o.removeprefix("--")), "")
        name = name or (action.option_strings[0] if action.option_strings else str(action.metavar or action.dest))
        is_switch = action.nargs == 0 or isinstance(action.default, bool)
        value = "" if is_switch or not action.option_strings else f" {_metavar(action)}"
        what = remark * (action.dest in remarked) + _cell(action.help or "")
        if name.startswith("--no_"):
            what = f"switches off: {what}" if what else f"switches `{action.dest}` off"
        if action.choices and not is_switch:
            what += f" ({', '.join(f'`{choice}`' for choice in action.choices)})"
        rows.append(f"| `{name}{value}` | {_default_cell(action, is_switch)} | {what} |")
    return "\n".join(rows)


def _metavar(action: argparse.Action) -> str:
    types = {int: "INT", float: "FLOAT", str: "TEXT", None: "TEXT"}
    name = action.metavar if isinstance(action.metavar, str) else types.get(action.type, "VALUE")  # type: ignore[call-overload]
    many = action.nargs in ("+", "*") or isinstance(action.nargs, int)
    return f"{name} ..." if many else name


def _default_cell(action: argparse.Action, is_switch: bool) -> str:
    if action.required or not action.option_strings:
        return "required"
    if is_switch or action.default is None or action.default is argparse.SUPPRESS:
        return ""
    default = action.default
    text = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
    return f"`{text}`" if text else ""


def _cell(text: str) -> str:
    """A help text as Markdown in a cell of a table."""
    parts = " ".join(text.replace("%%", "%").split()).split("`")
    for i in range(0, len(parts), 2):  # not in code
        parts[i] = parts[i].replace("<", "&lt;").replace("*", "\\*")
    return "`".join(parts).replace("|", "\\|")


PAGES = {"choose.md": choose_page, "cli.md": cli_page}


if __name__ == "__main__":
    for file, make in PAGES.items():
        (DOCS / file).write_text(make(), encoding="utf-8")
        print(f"docs/{file}")
