r"""FIGA: fine-grained quality signals from edits, https://huggingface.co/papers/2311.04072.

A model's own answer a and a corrected version b of it: the tokens that the editor put in are imitated, those that were taken
out are pushed down, the rest is left alone. No reference model. With nll(y_t) = - log pi(y_t|x,y_<t), each answer behind its
own prefix, and r = alpha on good tokens, gamma on the others of b:

    L = (1/N) [ sum_j r(b_j) nll(b_j)  -  beta sum_i keep_i bad(a_i) nll(a_i) ]

    keep_i = 1 while nll(a_i) <= c, a constant for the gradient: it bounds the negative part

Good tokens are those that a minimal edit script (Levenshtein) from a to b inserts or puts in the place of others, and the first
end-of-sequence token of b; bad ones are those that it deletes or replaces, but for the first end-of-sequence token of a. A
minimal script is not unique: here, from the end, tokens are kept before they are substituted, deleted, inserted, in this order
of preference (our choice). `align="indel"`, where a substitution costs as much as a deletion and an insertion, keeps the most
tokens (not in the paper).

N, the number of tokens whose weight is not 0, is a count of the micro-batch in the released code, and changes with the tokens
that are kept ("micro"). The default, "step", takes the good and bad tokens of the whole optimizer step, kept or not: a number
of the data, so that the gradient does not depend on how a step is split, and good tokens gain no weight when bad ones leave.

The cut of 0.6 is the released code's. At least one version of it keeps a bad token only between two bounds,
0.6 <= nll(a_i) <= 1: `figa_nll_floor=0.6, nll_cut=1.0`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..checks import check_choice, check_range, check_unused
from ..data.caching import versioned
from ..data.rows import first_row
from ..hub.paper import arxiv_paper
from ..trl_internals import global_then_local_main_first
from .collator import TokenColumn
from .trainer import PairLossConfig, PreferenceBatch, PreferenceTrainer, Term


# Cost of a substitution; insertions and deletions cost 1
ALIGNMENTS = {"levenshtein": 1, "indel": 2}
NORMALIZATIONS = ("step", "micro")
GOOD = TokenColumn("good_tokens", low=0, high=1, response="chosen")
BAD = TokenColumn("bad_tokens", low=0, high=1, response="rejected")


@dataclass
class FIGAConfig(PairLossConfig):
    r"""
    Configuration class for the [`FIGATrainer`].

    This class includes only the parameters that are specific to FIGA. `beta` has no effect.

    Parameters:
        good_weight (`float`, *optional*, defaults to `1.0`):
            Weight alpha of the tokens that were put in, > 0.
        bad_weight (`float`, *optional*, defaults to `0.5`):
            Weight beta of the tokens that were taken out, >= 0; they are pushed down.
        other_weight (`float`, *optional*, defaults to `0.0`):
            Weight gamma of the other tokens of the revised answer, >= 0.
        nll_cut (`float`, *optional*, defaults to `0.6`):
            Largest negative log-likelihood, in nats, at which a bad token is pushed down; `inf` for all of them.
        figa_nll_floor (`float`, *optional*, defaults to `0.0`):
            Smallest one, below `nll_cut`.
        align (`str`, *optional*, defaults to `"levenshtein"`):
            Which edit script marks the tokens: `"levenshtein"`, or `"indel"`, which keeps the most tokens (not in the paper).
        figa_normalization (`str`, *optional*, defaults to `"step"`):
            What the sums are divided by: `"step"` (our choice), the good and bad tokens of the optimizer step, or `"micro"`,
            those of the micro-batch whose weight is not 0 now, as in the released code.
    """

    good_weight: float = field(default=1.0, metadata={"help": "Weight of the tokens that were put in."})
    bad_weight: float = field(
        default=0.5, metadata={"help": "Weight of the tokens that were taken out, which are pushed down."}
    )
    other_weight: float = field(
        default=0.0, metadata={"help": "Weight of the other tokens of the revised answer, which is chosen."}
    )
    nll_cut: float = field(
        default=0.6,
        metadata={"help": "Largest negative log-likelihood at which a bad token is pushed down; inf for all."},
    )
    figa_nll_floor: float = field(
        default=0.0, metadata={"help": "Smallest negative log-likelihood at which a bad token is pushed down."}
    )
    align: str = field(
        default="levenshtein",
        metadata={
            "help": "Edit script that marks the tokens; 'indel' keeps the most tokens.",
            "choices": list(ALIGNMENTS),
        },
    )
    figa_normalization: str = field(
        default="step",
        metadata={
            "help": "Divide by the marked tokens of the optimizer step, or by those of the micro-batch that count now.",
            "choices": list(NORMALIZATIONS),
        },
    )

    def __post_init__(self):
        check_range("good_weight", self.good_weight, 0, low_open=True)
        check_range("bad_weight", self.bad_weight, 0)
        check_range("other_weight", self.other_weight, 0)
        if self.nll_cut != math.inf:
            check_range("nll_cut", self.nll_cut, 0, low_open=True)
        check_range("figa_nll_floor", self.figa_nll_floor, 0)
        check_choice("align", self.align, tuple(ALIGNMENTS))
        check_choice("figa_normalization", self.figa_normalization, NORMALIZATIONS)
        if self.bad_weight == 0:
            check_unused(self, ["nll_cut", "figa_nll_floor"], "with `bad_weight=0`")
        if not self.figa_nll_floor < self.nll_cut:
            raise ValueError(
                f"`figa_nll_floor={self.figa_nll_floor}` must be less than `nll_cut={self.nll_cut}`: no bad token would be "
                "pushed down. Lower it, or set `bad_weight=0`."
            )
        check_unused(self, ["beta", "ld_alpha"], "on this method's loss")
        super().__post_init__()
        self._refuse_reference_options()


def edit_masks(
    initial: Sequence[int], revised: Sequence[int], align: str = "levenshtein", eos_id: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Mark what an edit put in and what it took out.

    Args:
        initial: Token ids of the answer before the edit, N.
        revised: Those after it, M.
        align: Edit script, `"levenshtein"` or `"indel"`.
        eos_id: End-of-sequence token, whose first place in `revised` is good, and in `initial` is not bad.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Good tokens of `revised`, bool, (M,), and bad tokens of `initial`, bool, (N,).
    """
    a, b, substitution = np.asarray(initial, dtype=np.int64), np.asarray(revised, dtype=np.int64), ALIGNMENTS[align]
    steps = np.arange(len(b) + 1)
    costs = np.empty((len(a) + 1, len(b) + 1), dtype=np.int64)  # of turning a prefix of a into one of b
    costs[0] = steps
    for i, token in enumerate(a, start=1):
        above = costs[i - 1]
        row = above + 1
        row[1:] = np.minimum(row[1:], above[:-1] + substitution * (b != token))
        costs[i] = np.minimum.accumulate(row - steps) + steps  # insertions, of any number at once
    good, bad = np.zeros(len(b), dtype=bool), np.zeros(len(a), dtype=bool)
    i, j = len(a), len(b)
    while i or j:
        cost = costs[i, j]
        if i and j and cost == costs[i - 1, j - 1] + substitution * (a[i - 1] != b[j - 1]):
            i, j = i - 1, j - 1
            good[j] = bad[i] = a[i] != b[j]
        elif i and cost == costs[i - 1, j] + 1:
            i -= 1
            bad[i] = True
        else:
            j -= 1
            good[j] = True
    for mask, ids, value in ((good, b, True), (bad, a, False)):
        mask[(ids == eos_id).nonzero()[0][:1]] = value
    return good, bad


def figa_sums(
    revised_logps: torch.Tensor,
    initial_logps: torch.Tensor,
    good: torch.Tensor,
    bad: torch.Tensor,
    mask: torch.Tensor,
    good_weight: float = 1.0,
    bad_weight: float = 0.5,
    other_weight: float = 0.0,
    nll_cut: float = 0.6,
    nll_floor: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted negative log-likelihoods of each pair, added up.

    Args:
        revised_logps: Log-probabilities of the tokens of the revised answers, (B, T).
        initial_logps: Those of the initial answers, (B, T).
        good: How much a token of a revised answer was put in, 0 or 1 (or between), (B, T).
        bad: How much a token of an initial answer was taken out, (B, T).
        mask: Whether there is a token of the revised answer, (B, T).
        good_weight, bad_weight, other_weight: Weights alpha, beta, gamma.
        nll_cut, nll_floor: Bounds of the negative log-likelihood of a bad token that counts.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The sums, (B,), and how many tokens have a weight other than 0, a scalar.
    """
    nll = -initial_logps.detach()
    kept = bad_weight * bad * ((nll <= nll_cut) & (nll >= nll_floor))
    weights = (good_weight * good + other_weight * (1 - good)) * mask
    sums = kept * initial_logps - weights * revised_logps
    return sums.sum(1), (kept != 0).sum() + (weights != 0).sum()


class FIGATrainer(PreferenceTrainer):
    """Trainer for FIGA, with the arguments of [`~trl.DPOTrainer`] but `ref_model`, and the data of [`PreferenceTrainer`].

    `chosen` is the revised answer, `rejected` the initial one. The tokens are marked once, before training; data with the
    columns `good_tokens` (of chosen) and `bad_tokens` (of rejected), a number in [0, 1] for each token as the trainer tokenizes
    it, keep theirs. The metrics `rewards/*` are mean log-probabilities per token.

    Example:

    ```python
    from datasets import load_dataset
    from trl_ift import FIGAConfig, FIGATrainer

    edits = load_dataset("json", data_files="edits.jsonl", split="train")  # prompt, initial, revised
    trainer = FIGATrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=FIGAConfig("qwen-figa", learning_rate=1e-5),
        train_dataset=edits.rename_columns({"revised": "chosen", "initial": "rejected"}),
    )
    trainer.train()
    ```
    """

    config_class = FIGAConfig
    method = "figa"
    card_options = ()
    uses_reference = False
    columns = (GOOD, BAD)
    _tag_names = ["trl", "trl-ift", "figa"]  # noqa: RUF012
    _name = "FIGA"
    _paper = arxiv_paper(
        "2311.04072",
        "guo2023beyond",
        "Beyond Imitation: Leveraging Fine-grained Quality Signals for Alignment",
        "Geyang Guo and Ranchi Zhao and Tianyi Tang and Wayne Xin Zhao and Ji-Rong Wen",
        2023,
    )

    def _check_dataset(self, args: Any, dataset: Any, name: str, stored: bool) -> None:
        super()._check_dataset(args, dataset, name, stored)
        row = first_row(dataset)
        found = [column.name for column in self.columns if column.name in row]
        if len(found) == 1:
            raise ValueError(
                f"`{name}` has the column '{found[0]}' but not the other one: tokens are marked by both '{GOOD.name}' and "
                f"'{BAD.name}'. Add it, or drop this one to have the tokens marked by the edits."
            )
        if found and not self._is_own(dataset):  # whose tokens were marked here
            check_unused(args, ["align"], f"on `{name}`, which has the columns '{GOOD.name}' and '{BAD.name}'")

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if GOOD.name in first_row(prepared):
            return self._own(prepared)
        named = isinstance(prepared, Dataset)
        options = (
            {"num_proc": args.dataset_num_proc, "desc": f"Marking edits in {dataset_name} dataset"} if named else {}
        )
        with global_then_local_main_first():
            fn_kwargs = {"align": args.align, "eos_id": self._tokenizer.eos_token_id}
            return self._own(prepared.map(versioned(_mark_edits), fn_kwargs=fn_kwargs, **options))

    def pair_loss(self, batch: PreferenceBatch) -> None:
        return None  # a mean over tokens: below

    def branch_terms(self, batch: PreferenceBatch) -> Iterator[Term]:
        args, revised, initial = self.args, batch.chosen, batch.rejected
        good, bad = batch.columns[GOOD.name], batch.columns[BAD.name]
        bounds = {"nll_cut": args.nll_cut, "nll_floor": args.figa_nll_floor}
        weights = {name: getattr(args, name) for name in ("good_weight", "bad_weight", "other_weight")}
        sums, count = figa_sums(
            revised.token_logps, initial.token_logps, good, bad, revised.mask.float(), **weights, **bounds
        )
        total = (sums * batch.columns.get("weight", 1.0)).sum()
        if args.figa_normalization == "micro":
            yield Term(total / count.clamp(min=1), "chosen", "batch")
        else:
            counted = ["chosen" if args.other_weight else GOOD.name, *([BAD.name] if args.bad_weight else [])]
            yield Term(total, tuple(counted), "token")
        self._record(revised.token_logps.detach(), initial.token_logps.detach(), good, bad, bounds)

    def _record(self, revised_logps, initial_logps, good, bad, bounds: dict[str, float]) -> None:
        is_good, is_bad = good != 0, bad != 0
        kept = is_bad & (-initial_logps <= bounds["nll_cut"]) & (-initial_logps >= bounds["nll_floor"])
        self._record_mean("figa/good_tokens", is_good.sum(), len(good))
        self._record_mean("figa/bad_tokens", is_bad.sum(), len(bad))
        self._record_mean("figa/kept_bad", kept.sum(), is_bad.sum())
        self._record_mean("figa/good_nll", -(revised_logps * is_good).sum(), is_good.sum())
        self._record_mean("figa/bad_nll", -(initial_logps * is_bad).sum(), is_bad.sum())

    def implicit_rewards(self, batch: PreferenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
        return batch.chosen.mean_logps, batch.rejected.mean_logps


def _mark_edits(row: dict[str, Any], align: str, eos_id: int) -> dict[str, list[float]]:
    good, bad = edit_masks(row["rejected_ids"], row["chosen_ids"], align, eos_id)
    return {GOOD.name: good.astype(float).tolist(), BAD.name: bad.astype(float).tolist()}
