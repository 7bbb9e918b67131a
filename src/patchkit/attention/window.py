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

from patchkit.attention.eviction import EvictionPolicy
from patchkit.families import Family
from patchkit.method import Method

LayerBudget = int | Sequence[int]


@dataclass(frozen=True)
class Window(Method, name="window", slots=("kv_eviction",)):
    """Keep attention sinks and the most recent tokens.

    Attributes:
        budget: Tokens per layer and KV head (int), kept fraction of the prompt (float), or one
            int, or one int per KV head, for each layer.
        num_sink_tokens: First tokens of each row that are never dropped.

    Raises:
        ValueError: a budget leaves no room beside the sinks, or a fraction is not in (0, 1].
    """

    budget: int | float | Sequence[LayerBudget] = 1024
    num_sink_tokens: int = 4

    def __post_init__(self) -> None:
        if self.num_sink_tokens < 0:
            raise ValueError(f"num_sink_tokens must be >= 0, got {self.num_sink_tokens}")
        if isinstance(self.budget, float):
            if not 0 < self.budget <= 1:
                raise ValueError(
                    f"a budget given as a float is the kept fraction of the prompt and must be in "
                    f"(0, 1], got {self.budget}"
                )
            return
        per_layer = (self.budget,) if isinstance(self.budget, int) else tuple(self.budget)
        frozen = tuple(b if isinstance(b, int) else tuple(b) for b in per_layer)
        for budget in frozen:
            lowest = budget if isinstance(budget, int) else min(budget, default=0)
            if lowest <= self.num_sink_tokens:
                raise ValueError(
                    f"budget must exceed num_sink_tokens={self.num_sink_tokens}, got {budget}"
                )
        if not isinstance(self.budget, int):
            object.__setattr__(self, "budget", frozen)

    def check(self, family: Family) -> None:
        """Raise ValueError if per-layer budgets do not match the model's layers and heads."""
        if not isinstance(self.budget, tuple):
            return
        if len(self.budget) != len(family.layers):
            raise ValueError(
                f"expected one budget for each of {len(family.layers)} layers, "
                f"got {len(self.budget)}"
            )
        num_kv_heads = family.num_kv_heads
        for index, budget in enumerate(self.budget):
            if isinstance(budget, tuple) and len(budget) != num_kv_heads:
                raise ValueError(
                    f"layer {index}: expected one budget for each of {num_kv_heads} KV heads, "
                    f"got {len(budget)}"
                )

    def sites(self, family: Family) -> tuple[str, ...]:
        """Name the attention modules whose cache layer is bounded."""
        return tuple(layer.name for layer in family.layers if layer.storable)

    def eviction_policy(self, layer_idx: int, sliding_window: int | None) -> EvictionPolicy:
        """Bound one layer; sliding-window layers keep recent tokens only."""
        budget = self.budget[layer_idx] if isinstance(self.budget, tuple) else self.budget
        assert isinstance(budget, (int, float, tuple))
        return EvictionPolicy(
            budget=budget,
            num_sink_tokens=self.num_sink_tokens if sliding_window is None else 0,
            per_head=isinstance(budget, tuple),
        )


def patch(
    model: nn.Module,
    budget: int | float | Sequence[LayerBudget] = 1024,
    num_sink_tokens: int = 4,
) -> nn.Module:
    """Bound the KV cache of `model` to sinks and recent tokens until `patchkit.restore`.

    Args:
        model: A transformers causal language model, patched in place.
        budget: See `Window`.
        num_sink_tokens: See `Window`.

    Returns:
        The same model.

    Raises:
        ValueError: a setting is out of range.
        PatchkitError: the model cannot be patched; see `patchkit.apply`.
    """
    from patchkit.api import apply

    return apply(model, Window(budget=budget, num_sink_tokens=num_sink_tokens))
