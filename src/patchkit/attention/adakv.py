"""AdaKV: one budget per layer that its KV heads divide by what they attend to.

Problem
    Some heads gather their attention on few tokens, others spread it over many. One budget for all
    of them evicts tokens that matter from the latter and keeps tokens that do not in the former.

Method
    Tokens are ranked as in SnapKV, but over all KV heads of a layer together: the layer keeps the
    best `H_kv * budget` of them, whichever heads they belong to, and at least a share of the budget
    in every head. The lists of a row then lie behind each other in one run of slots, so that a head
    takes just the memory of what it keeps.

Options
    budget: tokens kept per KV head on average, window and sinks included (int, or one per layer),
        or kept fraction of the prompt (float in (0, 1]: 0.25 keeps a quarter).
    floor: share of the budget that every head keeps (default 0.2); 1 is SnapKV.
    window, kernel_size, num_sink_tokens: as in SnapKV.
    budget_bytes: bound on the bytes of the whole store instead of `budget`.

Exactness
    Approximate; exact while nothing has been dropped.

Families
    Every model whose attention goes through transformers' AttentionInterface. Sliding-window layers
    keep their recent tokens only. A single KV head (MLA) has nobody to share with.

Source
    Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference,
    arXiv 2407.11550, algorithm 1 on top of SnapKV. Differs as SnapKV does, and: the floor is a
    guarantee for the best tokens of a head, where the paper mixes budgets with equal ones; budgets
    are divided whenever more than one token is fed, and hold while single ones are. Rows that fit
    are not cut; their heads get equal parts of the room that is left, rounded down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patchkit.attention.eviction import Budget, EvictionPolicy, apply_method
from patchkit.attention.snapkv import SnapKV, WindowVotes
from patchkit.attention.store_layer import StoreLayer


class HeadVotes(WindowVotes):
    """WindowVotes with budgets that the heads of a layer divide."""

    average: Tensor
    """`[B, H_kv]` int32, the budgets before they are divided."""

    def __init__(self, method: AdaKV, budget: Budget, most_bytes: int | None) -> None:
        super().__init__(method, budget, most_bytes)
        self.floor = method.floor

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors whose rows follow those of the batch."""
        return super().tensors() | {"average": self.average}

    def counters(self) -> dict[str, Any]:
        """Return what the host knows of the budget."""
        return super().counters() | {"shared_total": self.shared_total}

    def set_budget(self, layer: StoreLayer) -> None:
        """Give all heads the same until `evict_many` divides it."""
        super().set_budget(layer)
        self._set_in_place("average", self.budget)
        num_heads = layer.length.shape[1]
        self.shared_total = num_heads * self.highest if num_heads > 1 else None

    def evict_many(self, layer: StoreLayer) -> None:
        """Divide the budget, then keep the best tokens of every list."""
        if self.shared_total is not None:
            self._divide(layer, self.shared_total)
        super().evict_many(layer)

    def _divide(self, layer: StoreLayer, total: int) -> None:
        """Count how many of the best tokens of all heads each head holds."""
        num_heads, filled = layer.length.shape[1], layer.filled
        equal = total // num_heads
        protected = self.num_sink_tokens + self.window
        # In float64, as the host computes its bounds.
        safe = (self.average.double() * self.floor).int().clamp_min(protected)
        safe = safe.minimum(self.average)
        most_safe = min(max(int(equal * self.floor), protected), equal)
        least_safe = 0 if isinstance(self.tokens, float) else most_safe

        # What the floors keep comes first. Slots beyond a list come last, and `filled` of no list.
        kept_for_sure = self.select(layer, safe, most_safe)
        rank = layer.scores.new_full((*layer.length.shape, filled + 1), -torch.inf)
        live = torch.arange(filled, device=layer.device) < layer.length[..., None]
        rank[..., :filled] = layer.scores[..., :filled].masked_fill(~live, -torch.inf)
        rank.scatter_(2, kept_for_sure.long(), torch.inf)
        rank[..., filled] = -torch.inf
        # Among equals newer tokens come first, then the later head.
        order = torch.full_like(rank, -1, dtype=torch.int32)
        head = torch.arange(num_heads, dtype=torch.int32, device=layer.device)[:, None]
        order[..., :filled] = layer.position[..., :filled] * num_heads + head

        wanted = self.average.sum(1, keepdim=True, dtype=torch.int32)
        count = layer.length.sum(1, keepdim=True, dtype=torch.int32).minimum(wanted)
        kept = layer.backend.run(
            "attention",
            "select_top",
            layer.device,
            rank.flatten(1)[:, None],
            order.flatten(1)[:, None],
            torch.full_like(count, num_heads * (filled + 1)),
            count,
            layer.seen[:, :1] * num_heads,
            torch.zeros_like(count),
            num_sinks=0,
            mean=False,
            width=min(total, num_heads * filled),
        )
        owner = kept[:, 0].long() // (filled + 1)  # of entries that are not used, one more head
        budget = count.new_zeros(len(count), num_heads + 1)
        budget.scatter_add_(1, owner, torch.ones_like(owner, dtype=torch.int32))
        budget = budget[:, :num_heads]
        budget = budget + (wanted - budget.sum(1, keepdim=True)) // num_heads  # room to grow
        self.lowest = least_safe
        self.highest = total - (num_heads - 1) * least_safe
        self.use_budget(budget.int())


@dataclass(frozen=True)
class AdaKV(SnapKV, name="adakv", slots=("kv_eviction",)):
    """Keep what the last queries attend to, in whichever heads that is.

    Attributes:
        floor: Share of the budget that every head keeps, in [0, 1].

    The remaining fields are those of `SnapKV`; budgets per head are refused.

    Raises:
        ValueError: a setting is out of range.
    """

    floor: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor must be in [0, 1], got {self.floor}")
        per_layer = self.budget if isinstance(self.budget, tuple) else ()
        if any(not isinstance(budget, int) for budget in per_layer):
            raise ValueError(
                f"AdaKV decides about heads: expected one budget per layer, got {self.budget}"
            )

    def policies(self, budgets: Sequence[Budget], most_bytes: int | None) -> list[EvictionPolicy]:
        """Rank by the votes of the window, over the heads of a layer."""
        return [HeadVotes(self, budget, most_bytes) for budget in budgets]


def patch(model: nn.Module, budget: int | float = 1024, **options: Any) -> nn.Module:
    """Bound the KV cache of `model` by budgets that the heads of a layer divide.

    Args:
        model: A transformers causal language model, patched in place.
        budget: See `AdaKV`.
        **options: The other fields of `AdaKV`.

    Returns:
        The same model.

    Raises:
        ValueError: a setting is out of range.
        PatchkitError: the model cannot be patched; see `patchkit.apply`.
    """
    return apply_method(model, AdaKV(budget=budget, **options))
