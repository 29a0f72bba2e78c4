"""Exact match of greedy answers, held-out NLL, and how sure one can be of the difference."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .task import Question, is_right, to_prompt, to_rows


MAX_NEW_TOKENS = 48
BATCH_SIZE = 32


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Question],
    advance: Callable[[int], None] = lambda number: None,
) -> dict[str, Any]:
    """Answer all questions greedily, and score the worked replies.

    Args:
        model: Model on its device; put into eval mode.
        tokenizer: Its tokenizer, with a chat template.
        questions: Test questions.
        advance: Called with the number of questions that were just done.

    Returns:
        `number` of questions, `correct` answers, `exact_match` in [0, 1], its 95 % Wilson `interval`, `nll` (nats a token,
        mean over the tokens of all worked replies and their end-of-turn token), the `nll_tokens` it is the mean of, the
        `replies`, and which of them are `right`.
    """
    model.eval()
    replies: list[str] = []
    nll_sum, nll_tokens = 0.0, 0
    for start in range(0, len(questions), BATCH_SIZE):
        batch = questions[start : start + BATCH_SIZE]
        replies += generate(model, tokenizer, batch)
        batch_sum, batch_tokens = reply_nll(model, tokenizer, batch)
        nll_sum, nll_tokens = nll_sum + batch_sum, nll_tokens + batch_tokens
        advance(len(batch))
    right = [is_right(reply, question["answer"]) for reply, question in zip(replies, questions, strict=True)]
    correct = sum(right)
    return {
        "number": len(questions),
        "correct": correct,
        "exact_match": correct / len(questions),
        "interval": wilson_interval(correct, len(questions)),
        "nll": nll_sum / nll_tokens,
        "nll_tokens": nll_tokens,
        "right": right,
        "replies": replies,
    }


@torch.no_grad()
def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[Question]) -> list[str]:
    """Return greedy replies of at most `MAX_NEW_TOKENS` tokens, generated in one batch."""
    prompts = [
        tokenizer.apply_chat_template(to_prompt(q), add_generation_prompt=True, return_dict=True)["input_ids"]
        for q in questions
    ]
    ids, mask, _ = _pad_left(prompts, tokenizer.pad_token_id, model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        num_beams=1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return [text.strip() for text in tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)]


@torch.no_grad()
def reply_nll(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[Question]
) -> tuple[float, int]:
    """Return the summed NLL (nats) of the worked replies with their end-of-turn token, and the number of these tokens."""
    rows, lengths = [], []
    for row in to_rows(questions):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        full = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
        # What a template appends behind the end-of-turn token (often a line break) is never generated
        end = max((i for i, token in enumerate(full) if token == tokenizer.eos_token_id), default=len(full) - 1)
        rows.append(full[: end + 1])
        lengths.append(end + 1 - len(prompt))
    ids, mask, positions = _pad_left(rows, tokenizer.pad_token_id, model.device)
    # Replies end all in the last column, so only the last columns need logits
    keep = max(lengths)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep + 1).logits
    nll = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, -keep:], reduction="none")  # (rows, keep)
    column = torch.arange(keep, device=nll.device)
    scored = column[None, :] >= keep - torch.tensor(lengths, device=nll.device)[:, None]
    return nll[scored].sum(dtype=torch.float64).item(), sum(lengths)


def _pad_left(
    rows: list[list[int]], pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, attention mask and position ids, each (rows, longest)."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def wilson_interval(correct: int, number: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95 % confidence interval of a share (Wilson 1927), within [0, 1]."""
    share, scale = correct / number, 1 + z * z / number
    centre = (share + z * z / (2 * number)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    return max(0.0, centre - half), min(1.0, centre + half)


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided p-value of `wins` against `losses` under equal chances (exact; McNemar's exact test)."""
    number = wins + losses
    tail = sum(math.comb(number, k) for k in range(max(wins, losses), number + 1)) / 2**number
    return min(1.0, 2 * tail)
