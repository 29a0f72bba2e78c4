"""Floating-point operations of a training step, counted, and the fewest that its sequences need."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


aten = torch.ops.aten
# torch counts none of these
_MISSING = {
    aten.addmm_: lambda out, a, b, *args, **kwargs: 2 * a[0] * a[1] * b[1],
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, **kwargs: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *args, **kwargs: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def flops(function: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products and the attention that a call runs."""
    with FlopCounterMode(display=False, custom_mapping=_MISSING) as counter:
        function()
    return counter.get_total_flops()


def floor_of(model: torch.nn.Module, inputs: Mapping[str, Any]) -> Callable[[], torch.Tensor]:
    """Forward of the plain model on all sequences of a batch, a function, with the head on what is scored."""
    rows = []
    for name, ids in inputs.items():
        if name.endswith("input_ids"):
            prefix = name.removesuffix("input_ids")
            labels = inputs.get(f"{prefix}labels")
            if f"{prefix}completion_mask" in inputs:
                labels = ids.masked_fill(inputs[f"{prefix}completion_mask"] == 0, -100)
            if labels is None:  # one value at the end of each sequence
                labels = torch.full_like(ids, -100)
                labels[:, -1] = 0
            rows.append((ids, inputs[f"{prefix}attention_mask"], labels))
    width = max(ids.size(1) for ids, _, _ in rows)
    ids, mask, labels = (
        torch.cat([F.pad(row[i], (0, width - row[i].size(1)), value=value) for row in rows])
        for i, value in enumerate((0, 0, -100))
    )
    head = getattr(model, "lm_head", None) or model.score

    def forward() -> torch.Tensor:
        hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        logits = head(hidden[:, :-1][labels[:, 1:] != -100])
        return logits.log_softmax(-1).sum()

    return forward
