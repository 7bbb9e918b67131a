"""What an eviction method decides about one layer of the KV store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from patchkit.attention.store_layer import StoreLayer

Budget = int | float | tuple[int, ...]
"""Tokens per KV head (int), kept fraction of the prompt (float in (0, 1]), or one int per head."""


@dataclass
class EvictionPolicy:
    """Bound one layer to a budget by dropping the oldest tokens behind the sinks.

    The store enforces the budget after the attention of every forward, so a query sees what the
    previous forward left plus the tokens of its own chunk. Policies that rank tokens by more than
    their age override `score`.

    Attributes:
        budget: How much a KV head keeps, sinks included; see `Budget`. A fraction counts the
            tokens that arrived in forwards of more than one token, per row, rounded down. The store
            caps it at what a sliding-window layer can use.
        num_sink_tokens: The first tokens of each row, which are never dropped.
        per_head: Whether the KV heads of a row may keep different tokens.
    """

    budget: Budget
    num_sink_tokens: int = 0
    per_head: bool = False

    def score(self, layer: StoreLayer) -> Tensor | None:
        """Rank the tokens of a layer; the lowest go first and ties keep the newer token.

        Returns:
            `[B, H_kv, capacity]` float32, or None to rank by age.
        """
        return None
