"""SnapKV: keep what the last queries of the prompt attend to.

Problem
    Long prompts fill the KV cache with tokens that the answer never looks at. Which ones it will
    look at shows already in the attention of the last tokens of the prompt.

Method
    The last `window` queries of the prompt vote: a token's score is the attention weight that it
    gets from them on average, smoothed over `kernel_size` neighbours in the text so that phrases
    stay whole, and added up over the query heads of a KV head. Every KV head keeps the window, the
    sinks and the tokens with the highest scores, `budget` in all. While decoding, the average over
    the last `window` queries is carried on as an exponential one of the same length, and one
    slot is overwritten per step.

Options
    budget: tokens kept per layer and KV head, window and sinks included (int); kept fraction of
        the prompt (float in (0, 1]: 0.25 keeps a quarter); or one budget per layer, each an int or
        one int per KV head.
    window: queries that vote and tokens that are always kept (default 32).
    kernel_size: tokens that are averaged, odd (default 5).
    num_sink_tokens: tokens at the start of each row that are never dropped (default 4).
    budget_bytes: bound on the bytes of the whole store instead of `budget`.

Exactness
    Approximate; exact while nothing has been dropped. Keys and queries keep their true positions.

Families
    Every model whose attention goes through transformers' AttentionInterface. Sliding-window layers
    keep their recent tokens only.

Source
    SnapKV: LLM Knows What You are Looking for Before Generation, arXiv 2404.14469, section 4.
    Differs: one set of tokens per KV head instead of per query head; sinks are protected; the
    budget holds while decoding too, where the paper lets the cache grow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from patchkit.attention.eviction import (
    Attended,
    Budget,
    EvictionPolicy,
    KVEviction,
    apply_method,
)
from patchkit.attention.scoring import add_mass, replace_by_mean
from patchkit.attention.store_layer import StoreLayer


class WindowVotes(EvictionPolicy):
    """Rank tokens by the attention of the last `window` queries."""

    scored = True

    def __init__(self, method: SnapKV, budget: Budget, most_bytes: int | None) -> None:
        super().__init__(budget, method.num_sink_tokens, most_bytes=most_bytes)
        self.window, self.kernel_size = method.window, method.kernel_size

    def num_recent(self, budget: Tensor) -> Tensor:
        """Protect the window."""
        return budget.new_full(budget.shape, self.window)

    def observe(self, layer: StoreLayer, attended: Attended) -> None:
        """Average over the last queries, or carry the average on by the few that came."""
        # Scores are `window` times the averages.
        q_len = attended.query.shape[2]
        if q_len < self.window and q_len < layer.columns:
            add_mass(layer, attended, q_len, fading=1 - 1 / self.window)
            return
        voters = min(q_len, self.window)
        replace_by_mean(layer, attended, voters, scale=self.window, width=self.kernel_size)


@dataclass(frozen=True)
class SnapKV(KVEviction, name="snapkv", slots=("kv_eviction",)):
    """Keep what the last queries of the prompt attend to.

    Attributes:
        window: Queries that vote and tokens that are always kept.
        kernel_size: Neighbours in the text over which scores are averaged, odd.

    The remaining fields are those of `Window`.

    Raises:
        ValueError: a setting is out of range, or a budget leaves no room beside sinks and window.
    """

    window: int = 32
    kernel_size: int = 5

    _protected: ClassVar[str] = "num_sink_tokens + window"

    def __post_init__(self) -> None:
        if self.window < 2:
            raise ValueError(f"window must be >= 2, got {self.window}")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {self.kernel_size}")
        super().__post_init__()

    @property
    def num_protected(self) -> int:
        """Sinks and window."""
        return self.num_sink_tokens + self.window

    def policies(self, budgets: Sequence[Budget], most_bytes: int | None) -> list[EvictionPolicy]:
        """Rank by the votes of the window."""
        return [WindowVotes(self, budget, most_bytes) for budget in budgets]


def patch(model: nn.Module, budget: int | float = 1024, **options: Any) -> nn.Module:
    """Bound the KV cache of `model` to what the last queries attend to.

    Args:
        model: A transformers causal language model, patched in place.
        budget: See `SnapKV`.
        **options: The other fields of `SnapKV`.

    Returns:
        The same model.

    Raises:
        ValueError: a setting is out of range.
        PatchkitError: the model cannot be patched; see `patchkit.apply`.
    """
    return apply_method(model, SnapKV(budget=budget, **options))
