"""TOVA: keep the tokens that the newest query attends to (token omission via attention).

Problem
    A decoder with a bounded KV cache is a recurrent network with as many states as the cache has
    slots. Which state to overwrite must be decided at every step, at no cost.

Method
    After every forward pass the weights of its last query, averaged over all heads of the layer,
    rank the tokens; the lowest ones go. Nothing else is protected, so recent tokens leave as soon
    as the newest query does not look at them. All heads of a layer keep the same tokens.

Options
    budget: tokens kept per layer and KV head (int); kept fraction of the prompt (float in (0, 1]:
        0.25 keeps a quarter); or one int per layer.
    num_sink_tokens: tokens at the start of each row that are never dropped (default 0, as the
        paper, whose models keep them by themselves).
    budget_bytes: bound on the bytes of the whole store instead of `budget`.

Exactness
    Approximate; exact while nothing has been dropped.

Families
    Every model whose attention goes through transformers' AttentionInterface. Sliding-window layers
    keep their recent tokens only.

Source
    Transformers are Multi-State RNNs, arXiv 2401.06104, section 3.2. Differs: the prompt is cut
    once, by its last query, and not token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from patchkit.attention.eviction import (
    Attended,
    Budget,
    EvictionPolicy,
    KVEviction,
    apply_method,
)
from patchkit.attention.scoring import replace_by_newest
from patchkit.attention.store_layer import StoreLayer


class NewestQuery(EvictionPolicy):
    """Rank tokens by the attention of the newest query."""

    scored = True

    def __init__(self, budget: Budget, num_sink_tokens: int, most_bytes: int | None) -> None:
        super().__init__(budget, num_sink_tokens, most_bytes=most_bytes)
        self.per_head = False

    def num_recent(self, budget: Tensor) -> Tensor:
        """Protect the newest token, which its own query may ignore."""
        return budget.new_ones(budget.shape)

    def observe(self, layer: StoreLayer, attended: Attended) -> None:
        """Replace the scores by the weights of the last query, averaged over the heads."""
        replace_by_newest(layer, attended, share=True)


@dataclass(frozen=True)
class TOVA(KVEviction, name="tova", slots=("kv_eviction",)):
    """Keep the tokens that the newest query attends to.

    Attributes: those of `Window`; budgets per KV head are refused.

    Raises:
        ValueError: a budget is out of range or differs between heads.
    """

    num_sink_tokens: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.budget, tuple) and not all(isinstance(b, int) for b in self.budget):
            raise ValueError(
                f"all heads of a layer keep the same tokens: expected one int per layer, "
                f"got {self.budget}"
            )

    def policies(self, budgets: Sequence[Budget], most_bytes: int | None) -> list[EvictionPolicy]:
        """Rank by the newest query."""
        return [NewestQuery(budget, self.num_sink_tokens, most_bytes) for budget in budgets]


def patch(model: nn.Module, budget: int | float = 1024, **options: Any) -> nn.Module:
    """Bound the KV cache of `model` to what the newest query attends to.

    Args:
        model: A transformers causal language model, patched in place.
        budget: See `TOVA`.
        **options: The other fields of `TOVA`.

    Returns:
        The same model.

    Raises:
        ValueError: a setting is out of range.
        PatchkitError: the model cannot be patched; see `patchkit.apply`.
    """
    return apply_method(model, TOVA(budget=budget, **options))
