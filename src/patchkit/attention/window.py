"""Window: attention sinks plus the most recent tokens (StreamingLLM).

Problem
    The KV cache grows with every token. Keeping only recent tokens bounds it, but quality collapses
    as soon as the first tokens leave, because attention parks its surplus weight on them.

Method
    Keep the first `num_sink_tokens` tokens of every row and the newest ones, `budget` in all. After
    every forward pass the tokens in between are dropped, oldest first. While decoding that is one
    slot overwritten per step; a query therefore sees `budget` tokens plus itself.

Options
    budget: tokens kept per layer and KV head, sinks included (int); kept fraction of the prompt
        (float in (0, 1]: 0.25 keeps a quarter); or one budget per layer, each an int or one int per
        KV head.
    num_sink_tokens: tokens at the start of each row that are never dropped (default 4).
    budget_bytes: bound on the bytes of the whole store instead of `budget`.

Exactness
    Approximate; exact while nothing has been dropped. Keys keep the rotation of their true
    position, and so do queries.

Families
    Every model whose attention goes through transformers' AttentionInterface. Sliding-window layers
    keep `min(budget, window - 1)` recent tokens and no sinks, which would be outside their window.

Source
    Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453. Differs: positions
    are not re-numbered inside the cache, so lengths beyond the trained context are not extended;
    the prompt is prefilled with full attention and then cut, as in the authors' evaluation code for
    long inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from patchkit.attention.eviction import (
    Budget,
    EvictionPolicy,
    KVEviction,
    LayerBudget,
    apply_method,
)


@dataclass(frozen=True)
class Window(KVEviction, name="window", slots=("kv_eviction",)):
    """Keep attention sinks and the most recent tokens.

    Attributes:
        budget: Tokens per layer and KV head (int), kept fraction of the prompt (float), or one
            int, or one int per KV head, for each layer.
        num_sink_tokens: First tokens of each row that are never dropped.
        budget_bytes: What the slots of the whole store may take, all rows together, instead of
            `budget`.

    Raises:
        ValueError: a budget leaves no room beside the sinks, or a fraction is not in (0, 1].
    """

    def policies(self, budgets: Sequence[Budget], most_bytes: int | None) -> list[EvictionPolicy]:
        """Drop the oldest tokens behind the sinks."""
        sinks = self.num_sink_tokens
        return [EvictionPolicy(budget, sinks, most_bytes=most_bytes) for budget in budgets]


def patch(
    model: nn.Module,
    budget: int | float | Sequence[LayerBudget] = 1024,
    num_sink_tokens: int = 4,
    budget_bytes: int | None = None,
) -> nn.Module:
    """Bound the KV cache of `model` to sinks and recent tokens until `patchkit.restore`.

    Args:
        model: A transformers causal language model, patched in place.
        budget: See `Window`.
        num_sink_tokens: See `Window`.
        budget_bytes: See `Window`.

    Returns:
        The same model.

    Raises:
        ValueError: a setting is out of range.
        PatchkitError: the model cannot be patched; see `patchkit.apply`.
    """
    return apply_method(model, Window(budget, num_sink_tokens, budget_bytes))
