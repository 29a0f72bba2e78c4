"""One face for all methods of a study: those of the library's registry, and TRL's own.

A study has preference pairs (and, for some methods, a gold answer to each prompt). What becomes of them for a method is its
`kind`:

    sft         the chosen answer, as a prompt-completion row
    pairs       the pairs
    unpaired    each pair as one desirable and one undesirable row, in the order of `unpaired_rows`
    triples     the pairs and the gold answer
    weighted    the pairs, with weights of their tokens that the starting model gives under two prompts
    degraded    the pairs; a degraded version of each answer is trained beside it
    lists       each pair as a list of two completions, with the rewards 1 and 0
    samples     the pairs, and answers that the starting model samples
    self-play   the chosen answer, against one that the starting model samples (one iteration)

Methods of the kind `reward` train no model that answers, and are not known here.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from datasets import Dataset

from ..registry import METHODS, Method


# Kind -> sequences that the model trains on for one pair
SEQUENCES = {
    "sft": 1,
    "pairs": 2,
    "unpaired": 2,
    "triples": 3,
    "samples": 3,
    "self-play": 2,
    "lists": 2,
    "weighted": 2,
    "degraded": 4,
}

Row = dict[str, Any]


def _trl(name: str, title: str, trainer: str, kind: str, paper: str, module: str = "trl") -> Method:
    config = trainer.replace("Trainer", "Config")
    return Method(name, title, module, trainer, config, kind, paper, "TRL's", kind)


_PAIRS = "trl_ift.preference.trainer"
# Registered methods, and TRL's. DPO's family is trained by `PreferenceTrainer`, which has TRL's losses, and takes stored
# reference log-probabilities.
KNOWN: dict[str, Method] = {
    method.name: method
    for method in (
        _trl("sft", "Supervised fine-tuning", "SFTTrainer", "sft", ""),
        *(method for method in METHODS if method.kind != "reward"),
        _trl("ipo", "Identity Preference Optimization", "PreferenceTrainer", "pairs", "2310.12036", _PAIRS),
        _trl("kto", "Kahneman-Tversky Optimization", "KTOTrainer", "unpaired", "2402.01306"),
        _trl("cpo", "Contrastive Preference Optimization", "CPOTrainer", "pairs", "2401.08417", "trl.experimental.cpo"),
        _trl("simpo", "Simple Preference Optimization", "CPOTrainer", "pairs", "2405.14734", "trl.experimental.cpo"),
        _trl("orpo", "Odds Ratio Preference Optimization", "ORPOTrainer", "pairs", "2403.07691", "trl.experimental.orpo"),
    )
}  # fmt: skip
# What a method cannot be trained without, and a study cannot make of pairs: an option
NEEDS = {"mrpo": "ref_models", "fpo": "sae_path"}
# Options that make a trainer the method
_OPTIONS: dict[str, dict[str, Any]] = {
    "ipo": {"loss_type": ["ipo"]},
    "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0},
}


def options_of(method: Method) -> dict[str, Any]:
    """The options of its config that make a trainer the method."""
    return dict(_OPTIONS.get(method.name, {}))


def get_study_method(name: str) -> Method:
    """The method called `name`; `ValueError` names those that are known."""
    if name in KNOWN:
        return KNOWN[name]
    if any(method.name == name for method in METHODS):
        raise ValueError(
            f"{name!r} trains a reward model, which answers nothing: a study cannot compare it. Known methods: "
            f"{', '.join(KNOWN)}."
        )
    near = get_close_matches(name, KNOWN, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"Unknown method {name!r}. {hint}Known methods: {', '.join(KNOWN)}.")


def unknown_options(config_class: type, options: Mapping[str, Any]) -> list[str]:
    """Names in `options` that the config does not have."""
    known = {f.name for f in fields(config_class)}
    return [name for name in options if name not in known]


# ---------------------------------------------------------------- data


def as_chat(row: Row) -> Row:
    """A row of texts as one of messages, so that the model sees it within its chat template."""
    roles = {"prompt": "user"}
    return {
        name: [{"role": roles.get(name, "assistant"), "content": value.strip()}] if isinstance(value, str) else value
        for name, value in row.items()
    }


def training_rows(kind: str, rows: Sequence[Row], batch_pairs: int, seed: int) -> Dataset:
    """The dataset that a method of `kind` trains on, made of preference rows; `self-play` needs `self_play_rows`."""
    if kind == "sft":
        return Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows])
    if kind == "unpaired":
        return Dataset.from_list(unpaired_rows(rows, 2 * batch_pairs, seed))
    if kind == "lists":
        lists = [{"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]]} for row in rows]
        return Dataset.from_list([row | {"rewards": [1.0, 0.0]} for row in lists])
    columns = ("prompt", "chosen", "rejected", *(["reference"] if kind == "triples" else []))
    return Dataset.from_list([{name: row[name] for name in columns} for row in rows])


def unpaired_rows(rows: Sequence[Row], batch_rows: int, seed: int) -> list[Row]:
    """
    Each pair as a desirable and an undesirable row, in an order that KTO can be trained in.

    `KTOTrainer` reads the rows in order, and estimates its KL term by giving each prompt of a batch the answer of the row
    before it. Left to itself it unpairs a dataset into all chosen answers followed by all rejected ones, so that a batch has
    one label; and two answers of one prompt next to each other make its mismatched pairs matched ones. Here labels alternate,
    and rows of one prompt are kept apart.

    Args:
        rows: `prompt`, `chosen`, `rejected`.
        batch_rows: Rows of a batch of one device.
        seed: Seed of the order.

    Raises:
        ValueError: Too few prompts: somewhere the answers of one prompt would have to be neighbours in a batch.
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    shift = max(1, min(batch_rows // 2, len(order) // 2))  # the rejected answers come from a batch before
    mixed: list[tuple[int, bool]] = []
    for position, index in enumerate(order):
        mixed += [(index, True), (order[position - shift], False)]

    def prompt(position: int) -> Any:
        return rows[mixed[position][0]]["prompt"]

    def clash(position: int) -> bool:
        """Whether a row or the one behind it stands behind a row of the same prompt, in the circle of its batch."""
        first = position - position % batch_rows
        size = min(batch_rows, len(mixed) - first)
        behind = first + (position - first + 1) % size
        before = first + (position - first - 1) % size
        return prompt(position) in (prompt(before), prompt(behind))

    for position in range(len(mixed)):
        if not clash(position):
            continue
        for other in range(position % 2, len(mixed), 2):  # rows of the same label
            mixed[position], mixed[other] = mixed[other], mixed[position]
            if not clash(position) and not clash(other):
                break
            mixed[position], mixed[other] = mixed[other], mixed[position]
        else:
            raise ValueError(
                f"KTO: {len(rows)} pairs of {len({repr(row['prompt']) for row in rows})} prompts cannot be ordered so that "
                f"no two answers of one prompt are neighbours in a batch of {batch_rows} rows. Give more prompts, or change "
                "`per_device_train_batch_size`."
            )
    return [
        {"prompt": rows[index]["prompt"], "completion": rows[index]["chosen" if label else "rejected"], "label": label}
        for index, label in mixed
    ]
