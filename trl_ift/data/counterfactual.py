r"""Counterfactual DPO: pairs for a style from the contrast of prompts, https://huggingface.co/papers/2401.09566.

The model's own answers with and without a style instruction are the pairs; no labels. With x_c a plain prompt, s+ a desired
and s- an undesired instruction, and y_c, y_t, y_n the answers to x_c, to x_c + s+ and to x_n = x_c + s-:

    variant              prompt   chosen   rejected
    enc (encourage)      x_c      y_t      y_c         the desired style becomes the default
    dis (discourage)     x_c      y_c      y_n         the undesired style is suppressed below the plain answer
    con (contrastive)    x_c      y_t      y_n         both at once
    neg (negation)       x_n      y_c      y_n         the model learns to disregard s-

Both answers are scored under the prompt of the row, not under those that produced them: then ordinary DPO (`trl-ift dpo`).
The rows of "neg" are from memory, unconfirmed.

build_counterfactual_pairs   the pairs; `trl-ift counterfactual` on the command line
answer_with                  the answers of a model, sampled into a folder
"""

import argparse
import hashlib
import json
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.utils import logging
from trl import ModelConfig, get_quantization_config

from ..checks import check_choice, check_quantization, check_range
from ..latent.encoders import text_of
from ..scripts.data import load_split
from ..scripts.tools import add_dataset_options, add_model_options, run_tool
from ..scripts.train import usage_error
from .caching import versioned
from .generation import generate_completions
from .pairs import NoPairsError, describe_dropped
from .rows import check_text, head


# Variant -> (prompt of the row, chosen, rejected): of the plain prompt, with the desired, with the undesired instruction
VARIANTS = {
    "enc": ("control", "desired", "control"),
    "dis": ("control", "control", "undesired"),
    "con": ("control", "desired", "undesired"),
    "neg": ("undesired", "control", "undesired"),
}
STYLE_POSITIONS = ("system", "user_prefix", "user_suffix")
# Beginnings of answers that refuse, and that speak of their instruction (our choice; English)
REFUSALS = r"^\s*(I['’]m sorry|I am sorry|Sorry,|I cannot|I can['’]t|I['’]m unable|I am unable|As an AI)"
ECHOES = r"^\s*(As (you )?(requested|asked|instructed|per)|As you wish|Per your|In accordance with|According to your)"

# Answers of a model: (prompts, name of the side, answers to each prompt) -> rows as `generate_completions` writes them
Generate = Callable[[Dataset, str, int], Dataset]

logger = logging.get_logger(__name__)


def answer_with(model: str | PreTrainedModel | PeftModel, output_dir: str | os.PathLike, **options: Any) -> Generate:
    """
    Return a `generate` for `build_counterfactual_pairs`: samples of a model, in a folder for each side.

    Interrupted runs go on where they were, and the plain answers serve any number of styles. `options` are those of
    [`generate_completions`]; by default `temperature=0.7`, `top_p=0.95`, `max_new_tokens=256` (our choice), without scores.
    """
    options = {"temperature": 0.7, "top_p": 0.95, "max_new_tokens": 256, "score": False} | options

    def generate(prompts: Dataset, name: str, number: int) -> Dataset:
        return generate_completions(model, prompts, Path(output_dir) / name, num_completions=number, **options)

    return generate


def build_counterfactual_pairs(
    dataset: Dataset,
    generate: Generate,
    *,
    desired: str | None = None,
    undesired: str | None = None,
    variant: str = "con",
    style_position: str | None = None,
    num_pairs_per_prompt: int = 1,
    style: str | None = None,
    is_styled: Callable[[str], bool] | None = None,
    refusals: str | None = REFUSALS,
    echoes: str | None = ECHOES,
    drop_truncated: bool = True,
) -> Dataset:
    """
    Pair a model's answers with and without a style instruction.

    Dropped, with a warning that counts them: prompts that contain an instruction themselves, and pairs that are identical or
    have an empty, cut or refusing answer, one that speaks of its instruction, or one on the wrong side of `is_styled`.

    Args:
        dataset ([`~datasets.Dataset`]):
            Plain prompts, free of the style: a column `prompt` of strings or of lists of messages (then `tools` and
            `chat_template_kwargs` are kept).
        generate (`Callable`):
            `answer_with(model, folder)`, or a function of a dataset with a column `prompt`, a name of the side and a number of
            answers to each prompt, which returns rows with `prompt_index` (row of that dataset), `completion` (of the same
            kind as the prompts) and, where known, `truncated`. Use the same settings for all sides.
        desired (`str`, *optional*):
            The instruction s+, e.g. `"Answer in one sentence."`; for `"enc"` and `"con"`.
        undesired (`str`, *optional*):
            The instruction s-; for `"dis"`, `"con"` and `"neg"`.
        variant (`str`, *optional*, defaults to `"con"`):
            `"enc"`, `"dis"`, `"con"` or `"neg"`.
        style_position (`str`, *optional*):
            Where an instruction stands: `"system"`, or before or behind the text of the last user message (`"user_prefix"`,
            `"user_suffix"`) or of a prompt that is a string. By default `"system"` for messages, `"user_prefix"` for strings.
        num_pairs_per_prompt (`int`, *optional*, defaults to `1`):
            Answers sampled on each side; the i-th ones are paired.
        style (`str`, *optional*):
            Name of the style for the column `style`; the instructions by default.
        is_styled (`Callable`, *optional*):
            Whether a text has the style: the desired one for `"enc"` and `"con"`, which the chosen answer must have and the
            rejected one must not; the undesired one for `"dis"` and `"neg"`, the other way round.
        refusals (`str`, *optional*):
            Regular expression of answers that refuse; `None` keeps them. English beginnings by default.
        echoes (`str`, *optional*):
            The same of answers to styled prompts that speak of their instruction.
        drop_truncated (`bool`, *optional*, defaults to `True`):
            Whether pairs with an answer that was cut are dropped. As text, it would be trained with an end behind it.

    Returns:
        [`~datasets.Dataset`]: A row for each pair: `prompt`, `chosen`, `rejected`, `style`, `variant`, and `prompt_index`, the
        row of `dataset`.

    Raises:
        ValueError, TypeError: Something in the input is wrong, or no pair is left.
    """
    pairs, counts = count_counterfactual_pairs(
        dataset, generate, desired=desired, undesired=undesired, variant=variant, style_position=style_position,
        num_pairs_per_prompt=num_pairs_per_prompt, style=style, is_styled=is_styled, refusals=refusals, echoes=echoes,
        drop_truncated=drop_truncated,
    )  # fmt: skip
    if counts["dropped"]:
        logger.warning(f"Dropped of {counts['expected']} pairs: {describe_dropped(counts)}.")
    logger.info(describe_lengths(counts))
    return pairs


def count_counterfactual_pairs(
    dataset: Dataset,
    generate: Generate,
    *,
    desired: str | None,
    undesired: str | None,
    variant: str,
    style_position: str | None,
    num_pairs_per_prompt: int,
    style: str | None,
    is_styled: Callable[[str], bool] | None,
    refusals: str | None,
    echoes: str | None,
    drop_truncated: bool,
) -> tuple[Dataset, dict[str, Any]]:
    """As `build_counterfactual_pairs`; also return how many pairs were dropped for which reason, and the mean lengths."""
    styles = check_settings(variant, desired, undesired, style_position, num_pairs_per_prompt, refusals, echoes)
    dataset, position = _plain_prompts(dataset, style_position)
    instructions = [text.lower() for text in styles.values() if text]
    rows = [
        index
        for index, prompt in enumerate(dataset["prompt"])
        if not any(text in _all_text(prompt).lower() for text in instructions)
    ]
    dropped: Counter[str] = Counter()
    if named := (len(dataset) - len(rows)) * num_pairs_per_prompt:
        dropped["with the instruction in the prompt"] = named
    prompt_side, *answer_sides = VARIANTS[variant]
    prompts, answers = {}, {}
    for side in sorted({prompt_side, *answer_sides}):
        text, name = styles.get(side, ""), side
        # Other styles of the same prompts get other folders. They share the plain answers, which are those to all prompts
        prompts[side] = dataset if side == "control" else dataset.select(rows)
        if text:
            prompts[side] = prompts[side].map(versioned(_add_style), fn_kwargs={"style": text, "position": position})
        if side != "control":
            name += "-" + hashlib.sha256(json.dumps([text, position]).encode()).hexdigest()[:8]
        if rows and side in answer_sides:
            answers[side] = _by_prompt(generate(prompts[side], name, num_pairs_per_prompt), name)

    why_dropped = partial(
        _why_dropped,
        is_styled=is_styled,
        refusals=refusals,
        echoes=echoes,
        drop_truncated=drop_truncated,
        style_is_chosen=variant in ("enc", "con"),
    )
    label = style if style is not None else " / ".join(styles.values())
    found = []
    for number, index in enumerate(rows):
        place = {side: index if side == "control" else number for side in prompts}
        both = [[(answer, side) for answer in answers[side].get(place[side], [])] for side in answer_sides]
        both = [answers[:num_pairs_per_prompt] for answers in both]
        if missing := num_pairs_per_prompt - min(map(len, both)):
            dropped["without an answer"] += missing
        for chosen, rejected in zip(*both, strict=False):
            if reason := why_dropped(chosen, rejected):
                dropped[reason] += 1
                continue
            row = prompts[prompt_side][place[prompt_side]]
            texts = {"chosen": chosen[0]["completion"], "rejected": rejected[0]["completion"]}
            found.append({**row, **texts, "style": label, "variant": variant, "prompt_index": index})
    counts = {
        "expected": len(dataset) * num_pairs_per_prompt,
        "pairs": len(found),
        "dropped": dict(sorted(dropped.items())),
    }
    if not found:
        raise NoPairsError(
            f"No pair is left of {counts['expected']}: {describe_dropped(counts)}. Look at a few answers: the model may not "
            "follow the instruction, or need another prompt format (chat template, `style_position`) or more `max_new_tokens`."
        )
    for name in ("chosen", "rejected"):
        counts[f"{name}_words"] = sum(len(text_of(row[name]).split()) for row in found) / len(found)
    return Dataset.from_list(found), counts


def check_settings(
    variant: str,
    desired: str | None,
    undesired: str | None,
    style_position: str | None,
    num_pairs_per_prompt: int,
    refusals: str | None,
    echoes: str | None,
) -> dict[str, str]:
    """Raise for settings that do not go together; return the instruction of each styled side."""
    check_choice("variant", variant, tuple(VARIANTS))
    if style_position is not None:
        check_choice("style_position", style_position, STYLE_POSITIONS)
    check_range("num_pairs_per_prompt", num_pairs_per_prompt, 1, integer=True)
    given = {"desired": desired, "undesired": undesired}
    for name, text in given.items():
        needed = name in VARIANTS[variant]
        if needed and text is None:
            raise ValueError(f"`variant={variant!r}` needs the instruction `{name}`, e.g. 'Answer briefly.'. Give it.")
        if not needed and text is not None:
            raise ValueError(f"`{name}={text!r}` has no effect with `variant={variant!r}`. Drop it, or choose 'con'.")
    for name, pattern in (("refusals", refusals), ("echoes", echoes)):
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"`{name}={pattern!r}` is no regular expression: {error}.") from None
    return {name: text for name, text in given.items() if text is not None}


def describe_lengths(counts: dict[str, Any]) -> str:
    """What is to be said of the lengths, which are learned with the style."""
    return f"Words of an answer, on average: {counts['chosen_words']:.1f} chosen, {counts['rejected_words']:.1f} rejected."


# ---------------------------------------------------------------- prompts


def _plain_prompts(dataset: Dataset, position: str | None) -> tuple[Dataset, str]:
    """The columns that a prompt is made of, and where an instruction stands in it."""
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"`dataset` is a {type(dataset).__name__}; expected a `Dataset`. Of a dictionary of splits pass one; a stream can "
            "be stored with `Dataset.from_generator`."
        )
    if not len(dataset):
        raise ValueError("`dataset` is empty: it has no rows. Check the split, and any filter applied before.")
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"`dataset` has the columns {sorted(dataset.column_names)}. Expected 'prompt'. Rename your column."
        )
    extra = [name for name in ("tools", "chat_template_kwargs") if name in dataset.column_names]
    dataset = dataset.with_format(None).select_columns(["prompt", *extra])
    texts = isinstance(dataset[0]["prompt"], str)
    position = position or ("user_prefix" if texts else "system")
    for index, prompt in enumerate(dataset["prompt"]):
        of_messages = isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt)
        if not prompt or isinstance(prompt, str) != texts or not (texts or of_messages):
            raise TypeError(
                f"`dataset`, row {index}: the prompts must all be strings, or all be lists of {{'role', 'content'}} messages, "
                f"and not empty; this one is {prompt!r:.80}. Mend or drop the row."
            )
        if not texts and any(not isinstance(message.get("content") or "", str) for message in prompt):
            raise TypeError(
                f"`dataset`, row {index}: a message has a content of parts, found {prompt!r:.80}. An instruction is written "
                "into texts: make the contents strings."
            )
        check_text(prompt, f"`dataset`, row {index}", "prompt")
        if not texts and position != "system" and not any(message["role"] == "user" for message in prompt):
            raise ValueError(
                f"`dataset`, row {index}: no message of the user for `style_position={position!r}`. Set 'system', or drop it."
            )
    if texts and position == "system":
        raise ValueError(
            "`style_position='system'` needs prompts that are messages; those of `dataset` are strings. Set 'user_prefix' or "
            "'user_suffix', or make them messages: `{'prompt': [{'role': 'user', 'content': text}]}`."
        )
    return dataset, position


def _all_text(prompt: str | list[dict[str, Any]]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(str(message.get("content") or "") for message in prompt)


def _add_style(row: dict[str, Any], style: str, position: str) -> dict[str, Any]:
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return {"prompt": _joined(prompt, style, position)}
    messages = [dict(message) for message in prompt]
    if position == "system" and messages[0]["role"] != "system":
        return {"prompt": [{"role": "system", "content": style}, *messages]}
    role, order = ("system", messages) if position == "system" else ("user", messages[::-1])
    message = next(message for message in order if message["role"] == role)
    # Behind what a system prompt says already
    message["content"] = _joined(message["content"], style, "user_suffix" if role == "system" else position)
    return {"prompt": messages}


def _joined(text: str, style: str, position: str) -> str:
    return f"{style}\n\n{text}" if position == "user_prefix" else f"{text}\n\n{style}"


# ---------------------------------------------------------------- answers


def _by_prompt(answers: Dataset, name: str) -> dict[int, list[dict[str, Any]]]:
    if missing := sorted({"prompt_index", "completion"} - set(answers.column_names)):
        raise ValueError(
            f"`generate` returned rows without {', '.join(map(repr, missing))} for {name!r}: expected rows as "
            "`generate_completions` writes them."
        )
    found = defaultdict(list)
    for number, row in enumerate(answers):
        if row["completion"] not in ("", []):
            check_text(row["completion"], f"the answers {name!r}, row {number}", "completion")
        found[row["prompt_index"]].append(row)
    return found


def _why_dropped(
    chosen: tuple[dict[str, Any], str],
    rejected: tuple[dict[str, Any], str],
    is_styled: Callable[[str], bool] | None,
    refusals: str | None,
    echoes: str | None,
    drop_truncated: bool,
    style_is_chosen: bool,
) -> str | None:
    """Reason why two answers, each with its side, are no pair, or `None`."""
    texts = [text_of(answer["completion"]).strip() for answer, _ in (chosen, rejected)]
    if not all(texts):
        return "empty"
    if texts[0] == texts[1]:
        return "identical"
    if drop_truncated and any(answer.get("truncated") for answer, _ in (chosen, rejected)):
        return "cut"
    if refusals and any(re.search(refusals, text, re.IGNORECASE) for text in texts):
        return "refusing"
    styled = [text for text, (_, side) in zip(texts, (chosen, rejected), strict=True) if side != "control"]
    if echoes and any(re.search(echoes, text, re.IGNORECASE) for text in styled):
        return "speaking of the instruction"
    if is_styled is not None and (is_styled(texts[0]), is_styled(texts[1])) != (style_is_chosen, not style_is_chosen):
        return "without the contrast"
    return None


# ---------------------------------------------------------------- the command line

_SAMPLING = {
    "max_new_tokens": (256, "most tokens of an answer"),
    "temperature": (0.7, "temperature; 0 is greedy"),
    "top_p": (0.95, "probability mass that is sampled from"),
    "batch_tokens": (16384, "most tokens of a batch; bounds the memory"),
    "shard_size": (256, "prompts of a shard, the unit of progress"),
    "seed": (0, "seed of the samples"),
}


def make_parser(prog: str = "trl-ift counterfactual") -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Pair a model's answers with and without a style instruction (Counterfactual DPO). An interrupted run goes "
        "on where it was when the same command is given again. Train with `trl-ift dpo`.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="YAML file of options; those on the command line win")
    add_model_options(parser)
    add_dataset_options(parser, streaming=False)
    add("--max_rows", type=int, help="take the first rows only")
    add("--variant", choices=list(VARIANTS), default="con", help="which answers are paired")
    add("--desired", help="the desired instruction (enc, con)")
    add("--undesired", help="the undesired instruction (dis, con, neg)")
    add("--style_position", choices=STYLE_POSITIONS, help="default: system for messages, user_prefix for strings")
    add("--style", help="name of the style in the rows; the instructions by default")
    add(
        "--style_pattern",
        metavar="REGEX",
        help="what texts with the style match; pairs without the contrast are dropped",
    )
    add("--refusals", metavar="REGEX", default=REFUSALS, help="drop answers that refuse; '' keeps them")
    add("--echoes", metavar="REGEX", default=ECHOES, help="drop answers that speak of the instruction; '' keeps them")
    add("--keep_truncated", action="store_true", help="keep answers that were cut")
    add("--num_pairs_per_prompt", type=int, default=1, help="answers sampled on each side")
    for name, (default, text) in _SAMPLING.items():
        add(f"--{name}", type=type(default), default=default, help=text)
    add("--answers_dir", required=True, help="folder of the answers, which an interrupted run goes on with")
    add("--output", required=True, help="file of the pairs, .parquet")
    parser.error = partial(usage_error, prog)  # type: ignore[method-assign]
    return parser


def main(argv: list[str]) -> int:
    """Run `trl-ift counterfactual` and return its exit code."""
    return run_tool(make_parser(), argv, _build, "trl_ift.data.counterfactual")


def _build(args: argparse.Namespace) -> None:
    output = Path(args.output)
    if output.suffix != ".parquet":
        raise ValueError(f"`--output {output}`: expected a file that ends with .parquet.")
    if output.exists():
        raise ValueError(f"`--output {output}` exists. Choose another file, or remove it.")
    check_quantization(args)
    if args.max_rows is not None:
        check_range("max_rows", args.max_rows, 1, integer=True)
    names = ("variant", "desired", "undesired", "style_position", "num_pairs_per_prompt")
    settings = {name: getattr(args, name) for name in names}
    settings |= {"refusals": args.refusals or None, "echoes": args.echoes or None}
    check_settings(**settings)
    is_styled = None
    if args.style_pattern is not None:
        try:
            pattern = re.compile(args.style_pattern)
        except re.error as error:
            raise ValueError(f"`--style_pattern {args.style_pattern}` is no regular expression: {error}.") from None
        is_styled = lambda text: pattern.search(text) is not None  # noqa: E731
    dataset = load_split(args.dataset_name, args.dataset_split, args.dataset_config)
    if args.max_rows is not None:
        dataset = head(dataset, args.max_rows)
    if not isinstance(dataset, Dataset):
        dataset = Dataset.from_list(list(dataset))
    generate = answer_with(
        os.path.expanduser(args.model_name_or_path),
        args.answers_dir,
        adapter=args.adapter,
        model_init_kwargs={"dtype": args.dtype, "trust_remote_code": args.trust_remote_code},
        quantization_config=get_quantization_config(ModelConfig(dtype=args.dtype, load_in_4bit=args.load_in_4bit)),
        **{name: getattr(args, name) for name in _SAMPLING},
    )
    pairs, counts = count_counterfactual_pairs(
        dataset,
        generate,
        style=args.style,
        is_styled=is_styled,
        drop_truncated=not args.keep_truncated,
        **settings,
    )
    if os.environ.get("RANK", "0") == "0":
        output.parent.mkdir(parents=True, exist_ok=True)
        pairs.to_parquet(str(output))
        print(f"{counts['pairs']} pairs written to {output}; dropped: {describe_dropped(counts)}.")
        print(describe_lengths(counts))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
