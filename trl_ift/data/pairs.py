"""Self-play pairs: the answers of an SFT dataset against those that a model generated for the same prompts.

build_pairs   the pairs, as token ids and as text; `trl-ift pairs` on the command line
first_turns   prompt and first answer of conversations
"""

import argparse
import json
import os
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from ..checks import check_sft_dataset
from ..latent.encoders import text_of
from ..scripts.data import load_split
from ..scripts.tools import add_dataset_options, run_tool
from ..scripts.train import usage_error
from ..trl_internals import common_prefix_length, tokenize
from .generation import load_completions, tokenize_prompt
from .inference import tokenizer_digest
from .rows import check_text, check_texts, head
from .shards import read_manifest


_COLUMNS = [
    "prompt", "chosen", "rejected", "prompt_ids", "chosen_ids", "rejected_ids", "truncated", "prompt_index", "policy",
]  # fmt: skip

logger = logging.get_logger(__name__)


class NoPairsError(ValueError):
    """No pair is left of the generated answers."""


def build_pairs(
    dataset: Dataset,
    completions: Dataset | str | os.PathLike,
    *,
    processing_class: PreTrainedTokenizerBase | str,
    drop_truncated: bool = False,
) -> Dataset:
    """
    Pair the answers of an SFT dataset, as chosen, with generated ones, as rejected.

    The token ids of a generated answer are those that the model sampled, and one that was cut at `max_new_tokens` gets no
    end-of-sequence token (from texts, TRL would append one to it). Real answers that are texts end with that of the tokenizer;
    messages end with what the chat template writes, as far as a token that ends answers, and a warning counts those where it
    writes none. Pairs whose generated answer is empty, or equal to the real one but for white space at its ends, are dropped;
    a warning counts them.

    Args:
        dataset ([`~datasets.Dataset`]):
            `prompt` and `completion`, strings or messages; or `messages`, whose first turn is taken (see `first_turns`).
        completions ([`~datasets.Dataset`] or `str`):
            What [`generate_completions`] returned for that dataset, or the folder that it wrote.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or `str`):
            Tokenizer of the model that generated them, or where to load it from.
        drop_truncated (`bool`, *optional*, defaults to `False`):
            Whether pairs whose generated answer was cut are dropped too.

    Returns:
        [`~datasets.Dataset`]: A row for each pair: `prompt`, `chosen` and `rejected` as text or messages; `prompt_ids`,
        `chosen_ids` and `rejected_ids`, which the trainers use; `truncated`, whether the generated answer was cut;
        `prompt_index`, the row of the SFT dataset; `policy`, the fingerprint of the model that generated it.

    Raises:
        ValueError, TypeError: The completions are not of these prompts or of this tokenizer, or no pair is left.
    """
    pairs, counts = count_pairs(dataset, completions, processing_class, drop_truncated)
    if counts["dropped"]:
        logger.warning(f"Dropped {describe_dropped(counts)} of {counts['completions']} generated answers.")
    if counts["endless"]:
        logger.warning(describe_endless(counts))
    return pairs


def count_pairs(
    dataset: Dataset, completions: Any, processing_class: Any, drop_truncated: bool
) -> tuple[Dataset, dict[str, Any]]:
    """As `build_pairs`; also return how many answers were generated, cut, and dropped for which reason.

    `endless` counts the pairs whose real answer ends without a token that ends answers.
    """
    dataset = first_turns(dataset)
    if isinstance(processing_class, str):
        processing_class = AutoTokenizer.from_pretrained(processing_class)
    if not isinstance(completions, Dataset):
        folder, completions = completions, load_completions(completions)
        expected, found = read_manifest(folder).part("settings")["tokenizer"], tokenizer_digest(processing_class)
        if found != expected:
            raise ValueError(
                f"The completions in `{folder}` are of a tokenizer with the digest {expected}, that of `processing_class` is "
                f"{found}: vocabulary, end of sequence or chat template differ. Pass the tokenizer that generated them."
            )
    completions = completions.with_format(None)
    reasons = _why_dropped(dataset, completions, processing_class, drop_truncated)
    dropped = Counter(reason for reason in reasons if reason is not None)
    counts = {
        "completions": len(completions),
        "truncated": sum(completions["truncated"]),
        "dropped": dict(sorted(dropped.items())),
        "pairs": len(completions) - dropped.total(),
    }
    if not counts["pairs"]:
        raise NoPairsError(
            f"No pair is left of {len(completions)} generated answers: {describe_dropped(counts)}. Look at a few of them: "
            "a model that generates nothing needs another prompt format (chat template), one that repeats the data has "
            "nothing left to learn from them."
        )
    end_ids = {processing_class.eos_token_id}
    end_ids |= {row["completion_ids"][-1] for row in completions if not row["truncated"]}
    kept = completions.select([index for index, reason in enumerate(reasons) if reason is None])
    pairs = kept.map(
        _pair,
        fn_kwargs={"real": dataset, "tokenizer": processing_class, "end_ids": end_ids},
        remove_columns=kept.column_names,
        load_from_cache_file=False,
        desc="Pairs",
    )
    counts["endless"] = sum(end_ids.isdisjoint(ids[-1:]) for ids in pairs["chosen_ids"])
    return pairs.select_columns(_COLUMNS), counts


def describe_dropped(counts: dict[str, Any]) -> str:
    """The reasons of dropped pairs with their numbers, e.g. `3 empty, 5 identical`; `none`."""
    return ", ".join(f"{number} {reason}" for reason, number in counts["dropped"].items()) or "none"


def describe_endless(counts: dict[str, Any]) -> str:
    """What is to be said of real answers without an end."""
    return (
        f"{counts['endless']} of {counts['pairs']} real answers have no token at their end that ends answers, because the chat "
        "template writes none: a model that learns from them does not learn to stop. Mend the template."
    )


def _why_dropped(
    dataset: Dataset, completions: Dataset, tokenizer: PreTrainedTokenizerBase, drop_truncated: bool
) -> list[str | None]:
    """Reason why the pair of each completion is dropped, or `None`."""
    needed = {"prompt", "completion", "prompt_ids", "completion_ids", "truncated", "prompt_index"}
    if missing := sorted(needed - set(completions.column_names)):
        raise ValueError(
            f"`completions` lacks {', '.join(map(repr, missing))}: expected what `generate_completions` (`trl-ift generate`) "
            "writes."
        )
    reasons: list[str | None] = []
    for number, row in enumerate(completions):
        _check_completion(row, number)
        index = row["prompt_index"]
        real = dataset[index] if index < len(dataset) else None
        if real is None or _messages_as_given(real["prompt"]) != _messages_as_given(row["prompt"]):
            raise ValueError(
                f"`completions`, row {number}: it was generated for another prompt than that of row {index} of `dataset`. Pass "
                "the dataset that the completions were generated for, unshuffled."
            )
        _, ids = tokenize_prompt(real, index, tokenizer)
        if ids != row["prompt_ids"]:
            heads = [tokenizer.decode(tokens[:12]) for tokens in (row["prompt_ids"], ids)]
            raise ValueError(
                f"`completions`, row {number}: its prompt begins with {heads[0]!r} as `processing_class` decodes it, and with "
                f"{heads[1]!r} as it tokenizes the prompt of `dataset` ({len(row['prompt_ids'])} and {len(ids)} tokens). Pass "
                "the tokenizer that generated them."
            )
        generated, answer = (text_of(row["completion"]).strip(), text_of(real["completion"]).strip())
        reasons.append(
            "empty" if not generated
            else "of an empty real answer" if not answer
            else "identical" if generated == answer
            else "truncated" if drop_truncated and row["truncated"]
            else None
        )  # fmt: skip
    return reasons


def _check_completion(row: dict[str, Any], number: int) -> None:
    """Raise unless a generated answer is what `generate_completions` writes."""
    where = f"`completions`, row {number}"
    for column in ("prompt", "completion"):
        check_text(row[column], where, column)
    for column in ("prompt_ids", "completion_ids"):
        ids = row[column]
        if not isinstance(ids, list) or not ids or not all(isinstance(i, int) and i >= 0 for i in ids):
            raise ValueError(
                f"{where}: column '{column}' must hold token ids, found {ids!r:.60}. Generate the answers anew."
            )
    for column, kind in (("prompt_index", int), ("truncated", bool)):
        if not isinstance(row[column], kind) or row[column] < 0:
            raise ValueError(f"{where}: column '{column}' holds {row[column]!r:.60}. Generate the answers anew.")


def _pair(row: dict[str, Any], real: Dataset, tokenizer: Any, end_ids: set[int]) -> dict[str, Any]:
    answer = real[row["prompt_index"]]
    prompt, chosen = answer["prompt"], answer["completion"]
    options: dict[str, Any] = {}
    if isinstance(prompt, str):
        chosen_text = chosen if chosen.endswith(tokenizer.eos_token) else chosen + tokenizer.eos_token
        ids = list(tokenize(tokenizer, prompt + chosen_text)["input_ids"])
    else:
        tools = answer.get("tools")
        options = {"tools": json.loads(tools) if isinstance(tools, str) else tools}
        options |= answer.get("chat_template_kwargs") or {}
        ids = list(tokenize(tokenizer, prompt + chosen, **options)["input_ids"])
    # Where the tokens of the prompt change with what follows, both answers begin with the first one that does
    start = common_prefix_length(row["prompt_ids"], ids)
    chosen_ids = ids[start:]
    # Chat templates write a line break behind the token that ends an answer, or another token
    for position, token in enumerate(chosen_ids):
        if token in end_ids and not tokenizer.decode(chosen_ids[position + 1 :], skip_special_tokens=True).strip():
            chosen_ids = chosen_ids[: position + 1]
            break
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": row["completion"],
        "prompt_ids": row["prompt_ids"][:start],
        "chosen_ids": chosen_ids,
        "rejected_ids": row["prompt_ids"][start:] + row["completion_ids"],
        "truncated": row["truncated"],
        "prompt_index": row["prompt_index"],
        "policy": row["policy"],
    }


def first_turns(dataset: Dataset) -> Dataset:
    """Return an SFT dataset as `prompt` and `completion` (and `tools`, `chat_template_kwargs`), in the same order.

    Of conversations (`messages`), the messages before the first of the assistant are the prompt, and that message is the
    completion, as the authors of SPIN do with UltraChat.

    Raises:
        ValueError, TypeError: It is no map-style SFT dataset, or has no prompts.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"`dataset` is a {type(dataset).__name__}; expected a `Dataset`. Of a dictionary of splits pass one; a stream "
            "can be stored with `Dataset.from_generator`."
        )
    check_sft_dataset(dataset, "dataset")
    dataset = dataset.with_format(None)
    extra = [name for name in ("tools", "chat_template_kwargs") if name in dataset.column_names]
    if {"prompt", "completion"} <= set(dataset.column_names):
        check_texts(dataset, "dataset", ["prompt", "completion"])
        return dataset.select_columns(["prompt", "completion", *extra])
    if "messages" not in dataset.column_names:
        raise ValueError(
            f"`dataset` has the columns {sorted(dataset.column_names)}: self-play needs prompts. Expected 'prompt' and "
            "'completion', or 'messages'."
        )
    check_texts(dataset, "dataset", ["messages"])
    return dataset.select_columns(["messages", *extra]).map(
        _first_turn, with_indices=True, remove_columns="messages", load_from_cache_file=False, desc="First turns"
    )


def _first_turn(row: dict[str, Any], index: int) -> dict[str, Any]:
    messages = row["messages"]
    first = next((position for position, m in enumerate(messages) if m["role"] == "assistant"), 0)
    if first == 0:
        raise ValueError(
            f"`dataset`, row {index}: the conversation has no message of the assistant behind one of the user. Drop the row."
        )
    return {"prompt": messages[:first], "completion": [messages[first]]}


def _messages_as_given(value: Any) -> Any:
    """Messages without keys that are null: tables add them."""
    return value if isinstance(value, str) else [{k: v for k, v in m.items() if v is not None} for m in value]


# ---------------------------------------------------------------- the command line


def make_parser(prog: str = "trl-ift pairs") -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Pair the answers of an SFT dataset with those that a model generated (`trl-ift generate`).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="YAML file of options; those on the command line win")
    add_dataset_options(parser, streaming=False)
    add("--max_rows", type=int, help="take the first rows only, as `trl-ift generate --max_rows` did")
    add("--completions", required=True, help="folder of `trl-ift generate`")
    add("--tokenizer", required=True, help="Hub id or folder of the model that generated them")
    add("--drop_truncated", action="store_true", help="leave out answers that were cut")
    add("--output", required=True, help="file of the pairs, .parquet")
    parser.error = partial(usage_error, prog)  # type: ignore[method-assign]
    return parser


def main(argv: list[str]) -> int:
    """Run `trl-ift pairs` and return its exit code."""
    return run_tool(make_parser(), argv, _build)


def _build(args: argparse.Namespace) -> None:
    output = Path(args.output)
    if output.suffix != ".parquet":
        raise ValueError(f"`--output {output}`: expected a file that ends with .parquet.")
    if output.exists():
        raise ValueError(f"`--output {output}` exists. Choose another file, or remove it.")
    dataset = load_split(args.dataset_name, args.dataset_split, args.dataset_config)
    if args.max_rows is not None:
        dataset = head(dataset, args.max_rows)
    pairs, counts = count_pairs(dataset, args.completions, args.tokenizer, args.drop_truncated)
    output.parent.mkdir(parents=True, exist_ok=True)
    pairs.to_parquet(str(output))
    print(f"{counts['pairs']} pairs written to {output}; dropped: {describe_dropped(counts)}.")
    if counts["endless"]:
        print(describe_endless(counts))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
