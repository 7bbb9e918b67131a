"""H2O: keep the tokens that have received the most attention (heavy hitters), and recent ones.

Problem
    The KV cache grows with every token, and so does what each decoding step must read. Which
    tokens will matter cannot be known, but attention is concentrated: few tokens get most of it.

Method
    Every token carries the attention it has received from all queries so far, summed over the
    query heads of a KV head. After the prompt, every KV head keeps the `recent` newest tokens, the
    sinks, and the tokens with the highest sums, `budget` in all. From then on every step adds its
    own attention, and the lowest token outside of the protected ones is overwritten. The sums of
    the prompt are exact column sums of its attention matrix, which is never materialised: a second
    pass over queries and keys recomputes the weights block by block.

Options
    budget: tokens kept per layer and KV head, sinks and recent ones included (int); kept fraction
        of the prompt (float in (0, 1]: 0.25 keeps a quarter); or one budget per layer, each an int
        or one int per KV head. Below some hundred tokens expect a visible loss.
    recent: share of the budget for the newest tokens (default 0.5, as the paper).
    norm: "sum" (paper) favours old tokens, which more queries have seen; "mean" divides by the
        number of those queries; "ema" lets a query's share fade by `decay` with each later one.
    score_queries: "all" (paper), or "last:W" to score by the last W queries of every forward.
    num_sink_tokens: tokens at the start of each row that are never dropped (default 4).
    budget_bytes: bound on the bytes of the whole store instead of `budget`.

Exactness
    Approximate; exact while nothing has been dropped. Keys and queries keep their true positions.

Families
    Every model whose attention goes through transformers' AttentionInterface. Sliding-window layers
    keep their recent tokens only. With MLA all heads share one latent, so their sums are added.

Source
    H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models, arXiv
    2306.14048, Algorithm 1. Differs: sinks are protected; query heads that share a KV head are
    added up (the paper has no grouped-query attention); the query that is being answered sees all
    tokens of the step before; the budget is a hard bound after every forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn

from patchkit.attention.eviction import (
    Attended,
    Budget,
    EvictionPolicy,
    KVEviction,
    apply_method,
)
from patchkit.attention.scoring import add_mass
from patchkit.attention.store_layer import StoreLayer

Norm = Literal["sum", "mean", "ema"]


class HeavyHitters(EvictionPolicy):
    """Rank tokens by accumulated attention."""

    scored = True

    def __init__(self, method: H2O, budget: Budget, most_bytes: int | None) -> None:
        super().__init__(budget, method.num_sink_tokens, most_bytes=most_bytes)
        self.method = method
        self.mean = method.norm == "mean"
        self.needs_lse = method.window is None

    def num_recent(self, budget: Tensor) -> Tensor:
        """Protect a share of what the sinks leave."""
        return ((budget - self.num_sink_tokens) * self.method.recent).int()

    def observe(self, layer: StoreLayer, attended: Attended) -> None:
        """Add the attention of a pass to what the tokens have received before."""
        q_len = attended.query.shape[2]
        fading = self.method.decay if self.method.norm == "ema" else 1.0
        scored = q_len if self.method.window is None else min(q_len, self.method.window)
        add_mass(layer, attended, scored, fading=fading)


@dataclass(frozen=True)
class H2O(KVEviction, name="h2o", slots=("kv_eviction",)):
    """Keep the tokens that have received the most attention, and recent ones.

    Attributes:
        recent: Share of the budget, in [0, 1), for the newest tokens.
        norm: How the attention of many queries becomes one score.
        decay: Factor per query with `norm="ema"`, in (0, 1).
        score_queries: `"all"`, or `"last:W"` for the last W queries of a forward.

    The remaining fields are those of `Window`.

    Raises:
        ValueError: a setting is out of range, or `norm="mean"` meets `score_queries="last:W"`.
    """

    recent: float = 0.5
    norm: Norm = "sum"
    decay: float = 0.99
    score_queries: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.recent < 1:
            raise ValueError(f"recent must be a share of the budget in [0, 1), got {self.recent}")
        if self.norm not in get_args(Norm):
            raise ValueError(f"norm must be one of {get_args(Norm)}, got {self.norm!r}")
        if not 0 < self.decay < 1:
            raise ValueError(f"decay must be in (0, 1), got {self.decay}")
        if self.window is not None and self.norm == "mean":
            raise ValueError(
                "norm='mean' divides by all queries that saw a token; it needs "
                f"score_queries='all', got {self.score_queries!r}"
            )

    @property
    def window(self) -> int | None:
        """Queries of a forward that count; None for all."""
        if self.score_queries == "all":
            return None
        kind, _, number = str(self.score_queries).partition(":")
        if kind != "last" or not number.isdecimal() or int(number) < 1:
            raise ValueError(f"score_queries is 'all' or 'last:W', got {self.score_queries!r}")
        return int(number)

    def policies(self, budgets: Sequence[Budget], most_bytes: int | None) -> list[EvictionPolicy]:
        """Rank by accumulated attention."""
        return [HeavyHitters(self, budget, most_bytes) for budget in budgets]


def patch(model: nn.Module, budget: int | float = 1024, **options: Any) -> nn.Module:
    """Bound the KV cache of `model` to heavy hitters and recent tokens until `patchkit.restore`.

    Args:
        model: A transformers causal language model, patched in place.
        budget: See `H2O`.
        **options: The other fields of `H2O`.

    Returns:
        The same model.

    Raises:
        ValueError: a setting is out of range.
        PatchkitError: the model cannot be patched; see `patchkit.apply`.
    """
    return apply_method(model, H2O(budget=budget, **options))
