"""An exact reference for eviction by age: one forward pass without a cache and an explicit mask.

Row i of the mask holds the tokens that the policy had kept when the forward pass of token i began,
plus the tokens of that pass up to i. It is built by a plain Python loop over tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

Keep = Callable[[list[int]], list[int]]
"""Takes the columns one (row, head) holds, oldest first; returns those it keeps."""


def window_keep(budget: int, num_sink_tokens: int) -> Keep:
    """Sinks plus newest, `budget` in all; sinks are the first tokens the row ever held."""

    def keep(held: list[int]) -> list[int]:
        if len(held) <= budget:
            return held
        recent = budget - num_sink_tokens
        return held[:num_sink_tokens] + held[len(held) - recent :]

    return keep


def eviction_mask(
    valid: Tensor,
    chunks: Sequence[int],
    keep: Sequence[Sequence[Keep]],
    sliding_window: int | None = None,
) -> Tensor:
    """Build the mask `[B, H, N, N]` (True = attend) for rows `valid [B, N]` fed in `chunks`.

    Args:
        keep: Policy for every row and head.
        sliding_window: The model's own window, counting the query itself.
    """
    batch_size, length = valid.shape
    num_heads = len(keep[0])
    assert sum(chunks) == length
    mask = torch.zeros(batch_size, num_heads, length, length, dtype=torch.bool)
    for b in range(batch_size):
        for h in range(num_heads):
            held: list[int] = []
            start = 0
            for chunk in chunks:
                fresh = [c for c in range(start, start + chunk) if valid[b, c]]
                for i in range(start, start + chunk):
                    visible = held + [c for c in fresh if c <= i]
                    if sliding_window is not None:
                        visible = [c for c in visible if c > i - sliding_window]
                    mask[b, h, i, visible or [i]] = True
                held = keep[b][h](held + fresh)
                start += chunk
    return mask


@torch.no_grad()
def masked_logits(
    model: PreTrainedModel, input_ids: Tensor, valid: Tensor, masks: Tensor | dict[str, Tensor]
) -> Tensor:
    """Logits `[B, N, V]` of the unpatched model under explicit masks, without a cache."""

    def additive(mask: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=model.dtype)
        return torch.where(mask, zero, torch.finfo(model.dtype).min)

    mask = (
        {k: additive(m) for k, m in masks.items()} if isinstance(masks, dict) else additive(masks)
    )
    position_ids = (valid.long().cumsum(-1) - 1).clamp(min=0)
    out = model(input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False)
    return out.logits
