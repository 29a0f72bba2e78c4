"""Short real runs of what each related method claims, beside the method that it claims it over.

    python benchmarks/family_claims.py --data FOLDER --output family-claims --claim chi-po mrpo

`FOLDER` holds JSON Lines files, `NAME_train.jsonl.gz` and `NAME_test.jsonl.gz`, whose prompts differ: `pref_text` (`prompt`,
`chosen`, `rejected`, `source`), `triple_text` (a gold answer too, `reference`), `unpaired_text` (`prompt`, `completion`,
`label`, `truthful`, `informative`, `source`) and `sft_text` (`prompt`, `completion`, `source`). The rows that are used have
the sources `truthfulqa_human_labels`, several answers a question, and `strategyqa`, one rationale a question.

Each arm is a LoRA of SmolLM2-135M-Instruct. It is written to `OUTPUT/CLAIM-seedN/` when it ends and is not repeated:
interrupted, the same command goes on; with all arms there it only prints the table. Gains are changes of log-probabilities
from the start, in nats, on held-out prompts; accuracy is the share of pairs whose chosen answer gained more.
"""

import argparse
import gzip
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any


os.environ.setdefault("CI", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

TRUTHFUL, RATIONALES = "truthfulqa_human_labels", "strategyqa"
KINDS = ("chosen", "rejected")
Row = dict[str, Any]
# Token ids of a prompt and of a response
Pair = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Lab:
    """Where the data, the model and the results of a claim are, and how an arm is trained."""

    data: Path
    folder: Path
    seed: int
    model_path: str

    @cached_property
    def tokenizer(self):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model_path)

    @cached_property
    def start(self):
        """The starting model."""
        import torch
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.model_path, dtype=torch.float32)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, from the file of its first run."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            begin = time.perf_counter()
            result = make()
            path.with_suffix(".tmp").write_text(json.dumps(result))
            path.with_suffix(".tmp").rename(path)
            print(f"{self.folder.name}: {name}, {time.perf_counter() - begin:.0f} s", flush=True)
        return json.loads(path.read_text())

    # ---------------------------------------------------------------- data

    def read(self, name: str, source: str) -> list[Row]:
        with gzip.open(self.data / f"{name}.jsonl.gz", "rt") as file:
            return [row for row in map(json.loads, file) if row["source"] == source]

    def ids(self, row: Row) -> dict[str, list[int]]:
        """`prompt_ids`, `chosen_ids` and `rejected_ids` as the trainers make them; of a single answer, as both."""
        from trl_ift.preference.trainer import pair_ids

        row = row if "chosen" in row else {"prompt": row["prompt"]} | dict.fromkeys(KINDS, row["completion"])
        return pair_ids(row, self.tokenizer, self.tokenizer.eos_token)

    def is_short(self, row: Row, most_tokens: int) -> bool:
        found = self.ids(row)
        return len(found["prompt_ids"]) + max(len(found[f"{kind}_ids"]) for kind in KINDS) <= most_tokens

    def questions(self, split: str) -> dict[str, list[Row]]:
        """Pairs of answers to each TruthfulQA question, of at least four words and at most 40 tokens with the question."""
        found: dict[str, list[Row]] = {}
        for row in self.read(f"pref_text_{split}", TRUTHFUL):
            pair = {name: row[name] for name in ("prompt", *KINDS)}
            if min(len(pair[kind].split()) for kind in KINDS) >= 4 and self.is_short(pair, 40):
                found.setdefault(row["prompt"], []).append(pair)
        return found

    def one_pair_each(self, split: str, number: int) -> list[Row]:
        """A pair of each of so many questions; those held out are the same for every seed."""
        rows = [pairs[0] for pairs in self.questions(split).values()]
        random.Random(self.seed if split == "train" else 0).shuffle(rows)
        return rows[:number]

    def responses(self, rows: Sequence[Row]) -> dict[str, list[Pair]]:
        found = [self.ids(row) for row in rows]
        return {kind: [(ids["prompt_ids"], ids[f"{kind}_ids"]) for ids in found] for kind in KINDS}

    def samples(self, rows: Sequence[Row]) -> list[Pair]:
        """Answers that the start samples: what is outside of all pairs."""
        from datasets import Dataset

        from trl_ift.data import generate_completions

        prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in rows])
        found = generate_completions(self.model_path, prompts, self.folder / "samples", max_new_tokens=24, seed=0)
        return [(row["prompt_ids"], row["completion_ids"]) for row in found]

    # ---------------------------------------------------------------- models

    def train(
        self, arm: str, method: str, rows: Sequence[Row], steps: int, batch: int = 8, rate: float = 5e-4,
        callbacks: Sequence[Any] = (), extra: dict[str, Any] | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        """Train a LoRA, keep it in the folder `arm`, and return the trainer."""
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import PrinterCallback

        from trl_ift.study.methods import get_study_method

        known = get_study_method(method)
        trainer = known.trainer_class(
            model=self.model_path,
            args=known.config_class(
                tempfile.mkdtemp(), seed=self.seed, max_steps=steps, per_device_train_batch_size=batch, max_length=128,
                learning_rate=rate, lr_scheduler_type="cosine", warmup_steps=2, use_cpu=True, bf16=False, report_to="none",
                gradient_checkpointing=False, save_strategy="no", logging_steps=1, disable_tqdm=True, **options,
            ),
            train_dataset=Dataset.from_list(list(rows)),
            processing_class=self.tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
            callbacks=list(callbacks),
            **(extra or {}),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.model.save_pretrained(self.folder / arm)
        return trainer

    def token_logps(self, model: Any, pairs: Sequence[Pair]) -> list[list[float]]:
        """Log-probabilities of the tokens of each response."""
        from trl_ift.data.inference import lent, token_log_probs

        found: list[list[float]] = [[] for _ in pairs]
        with lent(model):
            sequences = [(prompt + response, [-100] * len(prompt) + response) for prompt, response in pairs]
            for index, values in token_log_probs(model, sequences, 1024, self.tokenizer.eos_token_id):
                first = len(pairs[index][0]) - 1
                found[index] = values[first : first + len(pairs[index][1])].tolist()
        return found

    def sums(self, model: Any, responses: dict[str, list[Pair]]) -> dict[str, list[float]]:
        return {kind: [sum(values) for values in self.token_logps(model, pairs)] for kind, pairs in responses.items()}


def log_of(trainer: Any) -> list[Row]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def gains(now: dict[str, list[float]], start: dict[str, list[float]]) -> dict[str, list[float]]:
    return {
        kind: [value - first for value, first in zip(values, start[kind], strict=True)] for kind, values in now.items()
    }


def mean_and_error(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):+.2f} ± {statistics.stdev(values) / len(values) ** 0.5:.2f}"


def pair_cells(now: dict[str, list[float]], start: dict[str, list[float]]) -> list[str]:
    """Accuracy, margin, chosen, rejected, KL: of held-out pairs and, where there are any, samples of the start."""
    gain = gains(now, start)
    margins = [chosen - rejected for chosen, rejected in zip(gain["chosen"], gain["rejected"], strict=True)]
    cells = [
        f"{statistics.fmean(margin > 0 for margin in margins):.2f}",
        mean_and_error(margins),
        *(f"{statistics.fmean(gain[kind]):+.2f}" for kind in KINDS),
    ]
    return [*cells, f"{-statistics.fmean(gain['sample']):.2f}"] if "sample" in gain else cells


PAIR_HEAD = ("accuracy", "margin (nats)", "chosen (nats)", "rejected (nats)", "KL (nats)")


def print_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    print("\n| " + " | ".join(head) + " |\n" + "| --- " * len(head) + "|")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


def curve(lab: Lab, responses: dict[str, list[Pair]], steps: Sequence[int]) -> Any:
    """A `TrainerCallback` that measures after these steps, into `.points`."""
    from transformers import TrainerCallback

    class Curve(TrainerCallback):
        def __init__(self):
            self.points: list[Row] = []

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step in steps:
                self.points.append({"step": state.global_step, "sums": lab.sums(model, responses)})

    return Curve()


# ---------------------------------------------------------------- the claims


def chi_po(lab: Lab) -> None:
    """Many epochs on few pairs at a small beta: DPO drifts away, chi-PO does not."""
    per_epoch, epochs = 3, (1, 2, 4, 8)
    train, held_out = lab.one_pair_each("train", 8 * per_epoch), lab.one_pair_each("test", 60)
    responses = lab.responses(held_out) | {"sample": lab.samples(held_out[:24])}
    start = lab.once("start", lambda: lab.sums(lab.start, responses))
    tokens = sum(len(response) for _, response in responses["chosen"])

    def run(arm: str, method: str, beta: float) -> list[Row]:
        points = curve(lab, responses, [per_epoch * epoch for epoch in epochs])
        options = {"beta": beta, "precompute_ref_log_probs": True}
        lab.train(arm, method, train, per_epoch * epochs[-1], rate=1e-3, callbacks=[points], **options)
        return points.points

    table = []
    for arm, method, beta in (
        ("DPO, beta 0.005", "dpo", 0.005),
        ("chi-PO, beta 0.005", "chipo", 0.005),
        ("DPO, beta 0.05", "dpo", 0.05),
    ):
        for point in lab.once(arm, lambda: run(arm, method, beta)):  # noqa: B023
            nll = -sum(point["sums"]["chosen"]) / tokens
            table.append([arm, point["step"] // per_epoch, *pair_cells(point["sums"], start), f"{nll:.2f}"])
    first = -sum(start["chosen"]) / tokens
    print_table(("run", "epoch", *PAIR_HEAD, f"chosen NLL (nats/token; {first:.2f} at the start)"), table)


def rationale_words(rows: Sequence[Row]) -> list[str]:
    return [word for row in rows for word in row["completion"].split() if is_plain(word)]


def is_plain(word: str) -> bool:
    return word.isalpha() and word.islower() and len(word) > 3


def with_swapped_words(lab: Lab, rows: Sequence[Row], words: Sequence[str], number: int = 2) -> list[Row]:
    """Pairs of a rationale and of the same with so many of its words swapped for words of other rationales."""
    found = []
    for row in rows:
        draw, answer = random.Random(row["prompt"]), row["completion"].split("\n")[0]
        parts = answer.split(" ")
        places = [i for i, part in enumerate(parts) if is_plain(part)]
        if len(places) < 4:
            continue
        for i in draw.sample(places, number):
            parts[i] = draw.choice([word for word in words if word != parts[i]])
        pair = {"prompt": row["prompt"], "chosen": answer, "rejected": " ".join(parts)}
        if lab.is_short(pair, 56):
            found.append(pair)
    return found


def marked(lab: Lab, rows: Sequence[Row]) -> list[dict[str, list[bool]]]:
    """Which tokens of chosen and of rejected the other one does not have, but for the end."""
    from trl_ift.preference.figa import edit_masks

    found = []
    for row in rows:
        ids = lab.ids(row)
        good, bad = edit_masks(ids["rejected_ids"][:-1], ids["chosen_ids"][:-1])
        found.append({"chosen": good.tolist(), "rejected": bad.tolist()})
    return found


def by_token(lab: Lab, model: Any, rows: Sequence[Row]) -> dict[str, list[list[float]]]:
    return {kind: lab.token_logps(model, pairs) for kind, pairs in lab.responses(rows).items()}


def token_gains(now: Row, start: Row, marks: Sequence[dict[str, list[bool]]], kind: str) -> dict[bool, list[float]]:
    """Gains of the tokens of these responses, the end left out, by whether they are marked."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for new, old, mark in zip(now[kind], start[kind], marks, strict=True):
        for value, first, is_marked in zip(new[:-1], old[:-1], mark[kind], strict=True):
            found[is_marked].append(value - first)
    return found


def summed(by_tokens: Row) -> dict[str, list[float]]:
    return {kind: [sum(values) for values in rows] for kind, rows in by_tokens.items()}


def tis_dpo(lab: Lab) -> None:
    """Two contrastive DPO models give planted errors and what they replaced more weight; TIS-DPO uses it."""
    from datasets import Dataset

    from trl_ift.data.token_weights import CONTRASTIVE_PROMPTS, estimate_token_weights

    source = {split: lab.read(f"sft_text_{split}", RATIONALES) for split in ("train", "test")}
    words = rationale_words(source["train"])
    random.Random(lab.seed).shuffle(source["train"])
    train = with_swapped_words(lab, source["train"][:300], words)[:96]
    held_out = with_swapped_words(lab, source["test"], words)[:48]
    stored = {"precompute_ref_log_probs": True}
    start = lab.once("start", lambda: by_token(lab, lab.start, held_out))

    def run(arm: str, method: str, rows: Sequence[Row], **options: Any) -> Row:
        trainer = lab.train(arm, method, rows, 12, **stored, **options)
        return {"log": log_of(trainer), "held_out": by_token(lab, trainer.model, held_out)}

    swapped = [{"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]} for row in train]
    runs = {"DPO": lab.once("DPO", lambda: run("DPO", "dpo", train))}
    lab.once("reverse DPO", lambda: run("reverse DPO", "dpo", swapped))
    two_models = {
        "negative": lab.model_path, "positive_adapter": str(lab.folder / "DPO"),
        "negative_adapter": str(lab.folder / "reverse DPO"),
    }  # fmt: skip
    two_prompts = dict(zip(("positive_prompt", "negative_prompt"), CONTRASTIVE_PROMPTS, strict=True))

    def weigh(rows: Sequence[Row], sources: dict[str, Any], folder: str) -> list[Row]:
        return estimate_token_weights(
            Dataset.from_list(list(rows)), lab.model_path, output_dir=lab.folder / folder, **sources
        ).to_list()

    weighted = {
        "two DPO models, training pairs": lab.once("weights-train", lambda: weigh(train, two_models, "logps-train")),
        "two DPO models, held-out pairs": lab.once("weights-test", lambda: weigh(held_out, two_models, "logps-test")),
        "two prompts, held-out pairs": lab.once(
            "weights-prompts", lambda: weigh(held_out, two_prompts, "logps-prompts")
        ),
    }
    table = []
    for name, rows in weighted.items():
        for kind in ("rejected", "chosen"):
            values: dict[bool, list[float]] = {True: [], False: []}
            higher = []
            for row, mark in zip(rows, marked(lab, rows), strict=True):
                found = {
                    side: [
                        w
                        for w, is_marked in zip(row[f"{kind}_weights"][:-1], mark[kind], strict=True)
                        if is_marked == side
                    ]
                    for side in values
                }
                higher.append(statistics.fmean(found[True]) > statistics.fmean(found[False]))
                for side in values:
                    values[side] += found[side]
            means = [f"{statistics.fmean(values[side]):.2f}" for side in (True, False)]
            table.append(
                [name, kind, *means, f"{statistics.fmean(higher):.2f}", len(values[True]), len(values[False])]
            )
    differing = ("weight of tokens that differ", "of the others", "answers where it is higher", "differ", "others")
    print_table(("weights from", "answer", *differing), table)

    train_weighted = weighted["two DPO models, training pairs"]
    runs["TIS-DPO"] = lab.once("TIS-DPO", lambda: run("TIS-DPO", "tis-dpo", train_weighted))
    marks, table = marked(lab, held_out), []
    for arm, result in runs.items():
        now, cells = result["held_out"], []
        for kind in KINDS:
            gain = token_gains(now, start, marks, kind)
            cells += [f"{statistics.fmean(gain[side]):+.3f}" for side in (True, False)]
        table.append([arm, *pair_cells(summed(now), summed(start)), *cells])
    tokens = [f"{kind}, {which} (nats/token)" for kind in KINDS for which in ("differs", "others")]
    print_table(("run", *PAIR_HEAD[:-1], *tokens), table)


SCORES = (1.0, 0.5, 0.0)


def single_answers(lab: Lab, split: str, number: dict[float, int], per_question: int) -> list[Row]:
    """Single answers with a label and a score, (truthful + informative) / 2 or 0 if untruthful; good and bad ones alternate."""
    rows = lab.read(f"unpaired_text_{split}", TRUTHFUL)
    random.Random(lab.seed if split == "train" else 0).shuffle(rows)
    found: dict[float, list[Row]] = {score: [] for score in SCORES}
    used: dict[str, int] = {}
    for row in rows:
        score = row["truthful"] * (row["truthful"] + row["informative"]) / 2
        is_new = used.get(row["prompt"], 0) < per_question and all(
            row["prompt"] != other["prompt"] for other in found[score]
        )
        if len(found[score]) < number[score] and is_new and len(row["completion"].split()) >= 4:
            kept = {"prompt": row["prompt"], "completion": row["completion"], "label": score == 1, "score": score}
            if lab.is_short(kept, 40):
                found[score].append(kept)
                used[row["prompt"]] = used.get(row["prompt"], 0) + 1
    bad = [row for score in SCORES[1:] for row in found[score]]
    random.Random(0).shuffle(bad)
    return [row for two in zip(found[1.0], bad, strict=True) for row in two]


def graded_answers(lab: Lab, rows: Sequence[Row], words: Sequence[str]) -> list[list[Row]]:
    """Each rationale as it is (score 1), with one of its words swapped (1/2), and with four (0)."""
    one, four = ({row["prompt"]: row for row in with_swapped_words(lab, rows, words, number)} for number in (1, 4))
    found = []
    for prompt in [prompt for prompt in one if prompt in four]:
        texts = (one[prompt]["chosen"], one[prompt]["rejected"], four[prompt]["rejected"])
        found.append(
            [
                {"prompt": prompt, "completion": text, "score": score, "label": score == 1}
                for text, score in zip(texts, SCORES, strict=True)
            ]
        )
    return found


def single(lab: Lab) -> None:
    """ULMA and UFT learn from single answers: good ones up, bad ones down, UFT in the order of their scores."""
    train = single_answers(lab, "train", {1.0: 64, 0.5: 32, 0.0: 32}, 1)
    learn_from_single(lab, train, single_answers(lab, "test", {1.0: 56, 0.5: 28, 0.0: 28}, 3))


def graded(lab: Lab) -> None:
    """The same, on answers whose quality can be seen: rationales without, with one and with four swapped words."""
    source = {split: lab.read(f"sft_text_{split}", RATIONALES) for split in ("train", "test")}
    words = rationale_words(source["train"])
    random.Random(lab.seed).shuffle(source["train"])
    train = []  # good and bad ones alternate, and each question comes once
    for number, versions in enumerate(graded_answers(lab, source["train"][:400], words)[:128]):
        train.append(versions[0 if number % 2 == 0 else 1 if number % 4 == 1 else 2])
    held_out = [row for versions in graded_answers(lab, source["test"], words) for row in versions]
    learn_from_single(lab, train, held_out)


def learn_from_single(lab: Lab, train: Sequence[Row], held_out: Sequence[Row]) -> None:
    responses = {"answer": [(ids["prompt_ids"], ids["chosen_ids"]) for ids in map(lab.ids, held_out)]}
    start = lab.once("start", lambda: lab.sums(lab.start, responses))

    def run(arm: str, method: str, columns: Sequence[str], **options: Any) -> Row:
        rows = [{name: row[name] for name in ("prompt", "completion", *columns)} for row in train]
        trainer = lab.train(arm, method, rows, 16, batch=16, **options)
        return {"log": log_of(trainer), "held_out": lab.sums(trainer.model, responses)}

    stored = {"precompute_ref_log_probs": True}
    scores = [row["score"] for row in held_out]
    lengths = [len(response) for _, response in responses["answer"]]
    table = []
    for arm, arguments in {
        "KTO": ("kto", ["label"], {"beta": 0.1}),
        "ULMA": ("ulma", ["label"], stored),
        "ULMA, both parts alike": ("ulma", ["label"], {"beta": 1.0, "undesirable_weight": 2.0, **stored}),
        "UFT": ("uft", ["score"], {"beta": 0.03, **stored}),
    }.items():
        method, columns, options = arguments
        now = lab.once(arm, lambda: run(arm, method, columns, **options))["held_out"]  # noqa: B023
        gain = gains(now, start)["answer"]
        means = [mean_and_error([g for g, score in zip(gain, scores, strict=True) if score == s]) for s in SCORES]
        gaps = [
            statistics.fmean(g > h for g, s in zip(gain, scores, strict=True) if s == high
                             for h, s in zip(gain, scores, strict=True) if s == low)
            for high, low in ((1.0, 0.5), (0.5, 0.0), (1.0, 0.0))
        ]  # fmt: skip
        table.append([arm, *means, *(f"{gap:.2f}" for gap in gaps), f"{statistics.correlation(gain, scores):+.2f}"])
    per_token = [value / length for value, length in zip(start["answer"], lengths, strict=True)]
    first = [f"{statistics.correlation(values, scores):+.2f}" for values in (start["answer"], per_token)]
    orders = [f"P(gain at {high} > at {low})" for high, low in (("1", "1/2"), ("1/2", "0"), ("1", "0"))]
    print_table(("run", "score 1 (nats)", "score 1/2 (nats)", "score 0 (nats)", *orders, "correlation"), table)
    print(f"\nCorrelation of the start's log-probabilities with the scores: {first[0]}; per token: {first[1]}.")


def own_errors(lab: Lab, rows: Sequence[Row], number: int, most_tokens: int = 64) -> list[Row]:
    """Corrections: rationales, and the same with one or two words that the start likes better at their places."""
    import torch

    tokenizer, found = lab.tokenizer, []

    def is_word(token: int) -> bool:
        text = tokenizer.decode([token])
        return text.startswith(" ") and text[1:].isalpha()

    for row in rows:
        pair = {"prompt": row["prompt"], "completion": row["completion"].split("\n")[0]}
        if not lab.is_short(pair, most_tokens):
            continue
        ids = lab.ids(pair)
        prompt, answer = ids["prompt_ids"], ids["chosen_ids"]
        with torch.no_grad():
            logits = lab.start(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
        liked, best = logits[len(prompt) - 1 : -1].float().softmax(-1).max(-1)
        places = [
            (float(liked[i]), i, int(best[i]))
            for i in range(1, len(answer) - 2)
            if best[i] != answer[i] and liked[i] > 0.2 and is_word(int(best[i])) and is_word(answer[i])
            and not tokenizer.decode([answer[i + 1]])[0].isalpha()  # a whole word of one token
        ]  # fmt: skip
        changed = list(answer[:-1])
        for _, i, token in sorted(places, reverse=True)[:2]:
            changed[i] = token
        edit = {"prompt": pair["prompt"], "chosen": pair["completion"], "rejected": tokenizer.decode(changed)}
        if places and lab.ids(edit)["rejected_ids"] == [*changed, answer[-1]]:
            found.append(edit)
        if len(found) == number:
            return found
    raise ValueError(f"{len(found)} rationales hold an error that the model likes; {number} were asked for.")


def figa(lab: Lab) -> None:
    """Of small corrections FIGA learns the corrected tokens, unlearns the errors, and leaves the others alone; SFT does not."""
    source = {split: lab.read(f"sft_text_{split}", RATIONALES) for split in ("train", "test")}
    random.Random(lab.seed).shuffle(source["train"])
    train = lab.once("pairs-train", lambda: own_errors(lab, source["train"], 96))
    held_out = lab.once("pairs-test", lambda: own_errors(lab, source["test"], 48))
    rows = {"held-out": held_out, "training": train[:48]}

    def measured(model: Any) -> Row:
        return {name: by_token(lab, model, part) for name, part in rows.items()}

    def run(arm: str, method: str, **options: Any) -> Row:
        sft = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in train]
        trainer = lab.train(arm, method, sft if method == "sft" else train, 12, **options)
        return {"log": log_of(trainer), "by_token": measured(trainer.model)}

    start, table = lab.once("start", lambda: measured(lab.start)), []
    for arm, method, options in (
        ("SFT", "sft", {}), ("FIGA", "figa", {}), ("FIGA, nll_cut 2", "figa", {"nll_cut": 2.0}),
        ("FIGA, corrections only", "figa", {"bad_weight": 0.0}),
    ):  # fmt: skip
        result = lab.once(arm, lambda: run(arm, method, **options))["by_token"]  # noqa: B023
        for name, part in rows.items():
            marks = marked(lab, part)
            revised, initial = (token_gains(result[name], start[name], marks, kind) for kind in KINDS)
            size = statistics.fmean(map(abs, revised[False]))
            moved = [f"{statistics.fmean(values):+.2f}" for values in (revised[True], initial[True], revised[False])]
            table.append([arm, name, *moved, f"{size:.2f}"])
    for name, part in rows.items():
        marks = marked(lab, part)
        for kind, which in (("chosen", "corrected"), ("rejected", "planted")):
            nll = [
                -value for values, mark in zip(start[name][kind], marks, strict=True)
                for value, is_marked in zip(values[:-1], mark[kind], strict=True) if is_marked
            ]  # fmt: skip
            kept = statistics.fmean(value <= 0.6 for value in nll)
            mean = statistics.fmean(nll)
            print(f"{name}: {len(nll)} {which} tokens of {len(part)} rows, NLL {mean:.2f}, at most 0.6: {kept:.2f}")
    print_table(("run", "rows", "corrected (nats/token)", "planted", "others of the revised", "others, size"), table)


def mrpo(lab: Lab) -> None:
    """With few pairs, a second and better reference helps."""
    questions = lab.one_pair_each("train", 400)
    few, held_out = questions[:32], lab.one_pair_each("test", 60)
    taken = {row["prompt"] for row in few}
    gold: dict[str, Row] = {}
    for row in lab.read("triple_text_train", TRUTHFUL):
        pair = {"prompt": row["prompt"], "completion": row["reference"]}
        if row["prompt"] not in taken and lab.is_short(pair, 40):
            gold.setdefault(row["prompt"], pair)
    responses = lab.responses(held_out) | {"sample": lab.samples(held_out[:24])}
    start = lab.once("start", lambda: lab.sums(lab.start, responses))
    better = lab.folder / "reference"

    def reference() -> dict[str, Any]:
        trainer = lab.train("SFT", "sft", list(gold.values())[:160], 40)
        found = {"held_out": lab.sums(trainer.model, responses), "train": lab.sums(trainer.model, lab.responses(few))}
        trainer.model.merge_and_unload().save_pretrained(better)
        lab.tokenizer.save_pretrained(better)
        return found | {"rows": len(gold)}

    found = {"the start": start, "SFT on other questions' gold answers": lab.once("SFT", reference)["held_out"]}
    head = ("reference", "likes the chosen answer better", "margin (nats)")
    table = []
    for name, sums in found.items():
        margins = [chosen - rejected for chosen, rejected in zip(sums["chosen"], sums["rejected"], strict=True)]
        table.append([name, f"{statistics.fmean(margin > 0 for margin in margins):.2f}", mean_and_error(margins)])
    print_table(head, table)

    def run(arm: str, method: str, **options: Any) -> Row:
        trainer = lab.train(arm, method, few, 12, precompute_ref_log_probs=True, **options)
        return {"log": log_of(trainer), "held_out": lab.sums(trainer.model, responses)}

    second = {"ref_models": [str(better)]}
    table = []
    for arm, method, options in (
        ("DPO", "dpo", {}),
        ("MRPO", "mrpo", second),
        ("DPO, the second reference alone", "mrpo",
         {"weight_mode": "fixed", "ref_weights": [0.0, 1.0], "ctro_eps": None, **second}),
    ):  # fmt: skip
        result = lab.once(arm, lambda: run(arm, method, **options))  # noqa: B023
        now = result["held_out"]
        own = statistics.fmean(c > r for c, r in zip(now["chosen"], now["rejected"], strict=True))
        last = result["log"][-1]
        shift = [last.get(f"mrpo/shift_{kind}", 0.0) for kind in KINDS]
        table.append([arm, *pair_cells(now, start), f"{own:.2f}", *(f"{float(value):+.2f}" for value in shift)])
    print_table(("run", *PAIR_HEAD, "likes the chosen answer better", "shift of chosen", "of rejected"), table)


def relative_po(lab: Lab) -> None:
    """Several pairs a question: comparisons across them teach more than the pairs alone."""
    import torch
    from datasets import Dataset

    from trl_ift.data import embed_prompts
    from trl_ift.preference.relative_po import relative_weights

    several = [pairs for pairs in lab.questions("train").values() if len(pairs) >= 5]
    random.Random(lab.seed).shuffle(several)
    # Two questions a batch; the last pair of each, with answers that are in none of the others, is held out
    train, alike = [], []
    for pairs in several:
        used = {pair[kind] for pair in pairs[:4] for kind in KINDS}
        if len(train) < 48 and not used & {pairs[4][kind] for kind in KINDS}:
            train += pairs[:4]
            alike.append(pairs[4])
    held_out = lab.one_pair_each("test", 60)
    responses = {
        name: lab.responses(rows) for name, rows in (("same questions", alike), ("other questions", held_out))
    }
    embedded = embed_prompts(Dataset.from_list(train))

    def measured(model: Any) -> Row:
        return {name: lab.sums(model, part) for name, part in responses.items()}

    start = lab.once("start", lambda: measured(lab.start))

    def run(arm: str, method: str, rows: Any, **options: Any) -> Row:
        options = {"train_sampling_strategy": "sequential", "precompute_ref_log_probs": True, **options}
        trainer = lab.train(arm, method, list(rows), 12, **options)
        return {"log": log_of(trainer), "held_out": measured(trainer.model)}

    weights: dict[str, list[float]] = {"its own": [], "others of the question": [], "of the other question": []}
    for first in range(0, len(train), 8):
        vectors = torch.tensor(embedded[first : first + 8]["prompt_embedding"])
        for i, row in enumerate(relative_weights(vectors, vectors, 0.5).tolist()):
            for j, weight in enumerate(row):
                kind = 0 if i == j else 1 if train[first + i]["prompt"] == train[first + j]["prompt"] else 2
                list(weights.values())[kind].append(weight)
    print("Mean weights in a batch: " + ", ".join(f"{name} {statistics.fmean(w):.3f}" for name, w in weights.items()))
    table = []
    for arm, method, rows, options in (
        ("DPO", "dpo", train, {}),
        ("relative PO", "relative-po", embedded, {}),
        ("relative PO, beta 0.4", "relative-po", embedded, {"beta": 0.4}),
    ):
        result = lab.once(arm, lambda: run(arm, method, rows, **options))["held_out"]  # noqa: B023
        table += [[arm, name, *pair_cells(result[name], start[name])] for name in responses]
    print_table(("run", "held-out pairs of", *PAIR_HEAD[:-1]), table)


def spo(lab: Lab) -> None:
    """The auxiliary task makes the representation tell degrees of quality, and the policy better, beside DPO."""
    import torch

    from trl_ift.preference.self_supervised_po import degraded_texts, rake

    levels = 3

    def at_levels(row: Row) -> dict[str, list[str]]:
        return {kind: degraded_texts(row[kind], rake(row[kind]), levels, True) for kind in KINDS}

    questions = {
        split: [row for row in lab.one_pair_each(split, 400) if all(at_levels(row).values())]
        for split in ("train", "test")
    }
    train, held_out = questions["train"][:48], questions["test"][:32]
    responses = lab.responses(held_out) | {"sample": lab.samples(held_out[:24])}

    def probed(rows: Sequence[Row]) -> tuple[list[Pair], list[int]]:
        """Degraded answers, and their levels."""
        pairs, labels = [], []
        for row in rows:
            for texts in at_levels(row).values():
                for level, text in enumerate(texts):
                    ids = lab.ids({"prompt": row["prompt"], "completion": text})
                    pairs.append((ids["prompt_ids"], ids["chosen_ids"]))
                    labels.append(level)
        return pairs, labels

    def features(model: Any, pairs: Sequence[Pair]) -> torch.Tensor:
        """Mean last hidden state of each response."""
        rows = []
        model.eval()
        with torch.no_grad():
            for prompt, response in pairs:
                output = model(input_ids=torch.tensor([prompt + response]), output_hidden_states=True, use_cache=False,
                               logits_to_keep=1)  # fmt: skip
                rows.append(output.hidden_states[-1][0, len(prompt) :].mean(0))
        return torch.stack(rows)

    fit, test = probed(train[:32]), probed(held_out)

    def probe(model: Any) -> float:
        """Accuracy of a linear classifier of the level, on held-out questions."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
        classifier.fit(features(model, fit[0]).numpy(), fit[1])
        return float(classifier.score(features(model, test[0]).numpy(), test[1]))

    def measured(model: Any) -> Row:
        return {
            "held_out": lab.sums(model, responses),
            "degraded": lab.sums(model, {"d": test[0]})["d"],
            "probe": probe(model),
        }

    start = lab.once("start", lambda: measured(lab.start))

    def run(arm: str, method: str, **options: Any) -> Row:
        trainer = lab.train(arm, method, train, 12, precompute_ref_log_probs=True, **options)
        return {"log": log_of(trainer), **measured(trainer.model)}

    options = {"spo_levels": levels, "spo_length_control": True}
    table = [["start", *["-"] * 5, f"{start['probe']:.2f}", "-"]]
    for arm, method, own in (
        ("DPO", "dpo", {}),
        ("SPO-style", "self-supervised-po", options),
        (
            "SPO-style, weights 1",
            "self-supervised-po",
            {"spo_gamma_chosen": 1.0, "spo_gamma_rejected": 1.0, **options},
        ),
    ):
        result = lab.once(arm, lambda: run(arm, method, **own))  # noqa: B023
        gain = [now - first for now, first in zip(result["degraded"], start["degraded"], strict=True)]
        ordered = statistics.fmean(gain[i] > gain[i + levels - 1] for i in range(0, len(gain), levels))
        table.append(
            [arm, *pair_cells(result["held_out"], start["held_out"]), f"{result['probe']:.2f}", f"{ordered:.2f}"]
        )
    print_table(
        ("run", *PAIR_HEAD, "level told by a linear probe", "whole answer gained more than a degraded one"), table
    )
    print(f"{len(fit[0])} degraded answers for the probe, {len(test[0])} held out, {levels} levels.")


def activations(model: Any, pairs: Sequence[Pair]) -> Any:
    """Hidden states of the last decoder layer at the tokens of each response, a tensor (T, d_model) each."""
    import torch

    from trl_ift.preference.fpo import decoder_layers

    outputs: list[Any] = []
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    handle = decoder_layers(inner)[-1].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    model.eval()
    found = []
    with torch.no_grad():
        for prompt, response in pairs:
            model(input_ids=torch.tensor([prompt + response]), use_cache=False, logits_to_keep=1)
            output = outputs.pop()
            found.append((output[0] if isinstance(output, tuple) else output)[0, -len(response) :])
    handle.remove()
    return found


def train_autoencoder(lab: Lab, path: Path, width: int = 2304, steps: int = 1000, sparsity: float = 4.0) -> Row:
    """Train a sparse autoencoder with ReLU features on the start's last layer; its encoder goes to `path`."""
    import torch
    from safetensors.torch import save_file

    def states(split: str, number: int) -> torch.Tensor:
        rows = [
            row for source in (RATIONALES, "gsm8k_train", "creak") for row in lab.read(f"sft_text_{split}", source)
        ]
        random.Random(0).shuffle(rows)
        rows = [row for row in rows if lab.is_short(row, 128)][:number]
        ids = [lab.ids(row) for row in rows]
        whole = [(row["prompt_ids"][:1], row["prompt_ids"][1:] + row["chosen_ids"]) for row in ids]
        return torch.cat(activations(lab.start, whole))

    train, held_out = states("train", 250), states("test", 30)
    scale = train.square().mean().sqrt()
    train, held_out = train / scale, held_out / scale
    generator = torch.Generator().manual_seed(0)
    center = train.mean(0).requires_grad_()
    decoder = torch.nn.functional.normalize(torch.randn(width, train.size(1), generator=generator), dim=1)
    encoder, decoder = (0.1 * decoder.T).clone().requires_grad_(), decoder.requires_grad_()
    bias = torch.zeros(width, requires_grad=True)
    optimizer = torch.optim.Adam([encoder, decoder, bias, center], lr=1e-3)

    def forward(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.relu((states - center) @ encoder + bias)
        return features, features @ decoder + center

    for _ in range(steps):
        batch = train[torch.randint(len(train), (256,), generator=generator)]
        features, rebuilt = forward(batch)
        loss = (rebuilt - batch).square().sum(1).mean() + sparsity * features.sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():  # else features shrink and their directions grow
            decoder.div_(decoder.norm(dim=1, keepdim=True))
    with torch.no_grad():
        features, rebuilt = forward(held_out)
        save_file({"W_enc": (encoder / scale).contiguous(), "b_enc": bias - center @ encoder}, path)
        unexplained = (rebuilt - held_out).square().sum() / (held_out - held_out.mean(0)).square().sum()
    return {
        "tokens": len(train), "unexplained": unexplained.item(), "active": (features > 0).sum(1).float().mean().item(),
        "dead": ((features > 0).sum(0) == 0).float().mean().item(), "scale": scale.item(),
    }  # fmt: skip


def fpo(lab: Lab) -> None:
    """With the features of an autoencoder FPO stays nearer to the reference than without; beside DPO."""
    import torch

    from trl_ift.preference.fpo import feature_distance
    from trl_ift.preference.sae import load_sae

    path = lab.folder / "sae.safetensors"
    found = lab.once("autoencoder", lambda: train_autoencoder(lab, path))
    print("Autoencoder: " + ", ".join(f"{name} {value:.3g}" for name, value in found.items()))
    sae = load_sae(path)
    train, held_out = lab.one_pair_each("train", 48), lab.one_pair_each("test", 40)
    responses = lab.responses(held_out) | {"sample": lab.samples(held_out[:24])}

    def pooled(model: Any) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return {
                kind: torch.stack([sae.encode(states).mean(0) for states in activations(model, pairs)])
                for kind, pairs in responses.items()
            }

    reference: dict[str, torch.Tensor] = {}

    def measured(model: Any) -> Row:
        if not reference:
            reference.update(pooled(lab.start))
        now = pooled(model)
        distance = {kind: feature_distance(now[kind], reference[kind], 50).tolist() for kind in responses}
        return {"held_out": lab.sums(model, responses), "distance": distance}

    start = lab.once("start", lambda: lab.sums(lab.start, responses))

    def run(arm: str, method: str, **options: Any) -> Row:
        trainer = lab.train(arm, method, train, 12, **options)
        return {"log": log_of(trainer), **measured(trainer.model)}

    features, table = {"sae_path": str(path)}, []
    for arm, method, options in (
        ("DPO", "dpo", {"precompute_ref_log_probs": True}),
        ("FPO, alpha 0", "fpo", {"fpo_alpha": 0.0, **features}),
        ("FPO", "fpo", features),
        ("FPO, alpha 5", "fpo", {"fpo_alpha": 5.0, **features}),
    ):
        result = lab.once(arm, lambda: run(arm, method, **options))  # noqa: B023
        distances = [f"{statistics.fmean(result['distance'][kind]):.4f}" for kind in responses]
        table.append([arm, *pair_cells(result["held_out"], start), *distances])
    print_table(("run", *PAIR_HEAD, "D of chosen", "D of rejected", "D of samples"), table)


CLAIMS: dict[str, Callable[[Lab], None]] = {
    "chi-po": chi_po,
    "tis-dpo": tis_dpo,
    "single": single,
    "graded": graded,
    "figa": figa,
    "mrpo": mrpo,
    "relative-po": relative_po,
    "spo": spo,
    "fpo": fpo,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; the demo's SmolLM2-135M-Instruct by default")
    parser.add_argument("--data", type=Path, required=True, help="folder of the files named above")
    parser.add_argument("--output", type=Path, default=Path("family-claims"))
    parser.add_argument("--claim", nargs="+", choices=list(CLAIMS), default=list(CLAIMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    import torch

    torch.set_num_threads(args.threads)
    model_path = args.model
    if model_path is None:
        from trl_ift.demo.model import packaged_model

        model_path = str(packaged_model())
    for name in args.claim:
        folder = args.output / f"{name}-seed{args.seed}"
        folder.mkdir(parents=True, exist_ok=True)
        print(f"\n{name}: {CLAIMS[name].__doc__}", flush=True)
        CLAIMS[name](Lab(args.data, folder, args.seed, model_path))


if __name__ == "__main__":
    main()
