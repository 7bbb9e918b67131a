"""PyramidKV: SnapKV with more room in the lower layers and less in the upper ones.

Problem
    Attention is broad in the lower layers and gathers on few tokens in the upper ones, so the same
    budget for every layer is too little for the former and too much for the latter.

Method
    Tokens are ranked as in SnapKV. The budget beside sinks and window falls linearly with the depth
    of the layer, from `2 - 1 / beta` of the average in the first to `1 / beta` in the last.

Options
    budget: tokens kept per KV head in the average layer, window and sinks included (int), or kept
        fraction of the prompt (float in (0, 1]: 0.25 keeps a quarter).
    beta: how steep the pyramid is (default 20); 1 is SnapKV.
    window, kernel_size, num_sink_tokens: as in SnapKV.
    budget_bytes: bound on the bytes of the whole store instead of `budget`.

Exactness
    Approximate; exact while nothing has been dropped.

Families
    Every model whose attention goes through transformers' AttentionInterface. Sliding-window layers
    keep their recent tokens only and take no part in the pyramid.

Source
    PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling, arXiv
    2406.02069, section 4. Differs as SnapKV does, and: a layer whose budget exceeds the prompt
    does not pass the surplus on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from patchkit.attention.eviction import Budget, EvictionPolicy, apply_method
from patchkit.attention.snapkv import SnapKV, WindowVotes


class PyramidVotes(WindowVotes):
    """WindowVotes with a share of the budget that depends on the layer."""

    def __init__(
        self, method: PyramidKV, budget: Budget, most_bytes: int | None, slope: float
    ) -> None:
        super().__init__(method, budget, most_bytes)
        self.slope = slope  # of what is not protected, over that of the average layer

    def share(self, tokens: Any) -> Any:
        """Scale what the average layer keeps beside sinks and window."""
        beside = tokens - (self.num_sink_tokens + self.window)
        beside = beside.clamp_min(0) if isinstance(beside, Tensor) else max(beside, 0)
        return tokens + beside * (self.slope - 1)


@dataclass(frozen=True)
class PyramidKV(SnapKV, name="pyramidkv", slots=("kv_eviction",)):
    """Keep what the last queries attend to, more of it in the lower layers.

    Attributes:
        beta: The last layer keeps `1 / beta` of the average beside what is protected, the first
            one `2 - 1 / beta`.

    The remaining fields are those of `SnapKV`; budgets per layer are refused.

    Raises:
        ValueError: a setting is out of range.
    """

    beta: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 1:
            raise ValueError(f"beta must be >= 1, got {self.beta}")
        if isinstance(self.budget, tuple):
            raise ValueError(
                f"the pyramid decides about layers: expected one budget, got {self.budget}"
            )

    def policies(self, budgets: Sequence[Budget], most_bytes: int | None) -> list[EvictionPolicy]:
        """Rank by the votes of the window, within the share of each layer."""
        steps = max(len(budgets) - 1, 1)
        fall = (2 - 2 / self.beta) / steps if len(budgets) > 1 else 0.0
        slopes = [1 + fall * (steps / 2 - depth) for depth in range(len(budgets))]
        return [
            PyramidVotes(self, budget, most_bytes, slope)
            for budget, slope in zip(budgets, slopes, strict=True)
        ]


def patch(model: nn.Module, budget: int | float = 1024, **options: Any) -> nn.Module:
    """Bound the KV cache of `model` by a pyramid of budgets.

    Args:
        model: A transformers causal language model, patched in place.
        budget: See `PyramidKV`.
        **options: The other fields of `PyramidKV`.

    Returns:
        The same model.

    Raises:
        ValueError: a setting is out of range.
        PatchkitError: the model cannot be patched; see `patchkit.apply`.
    """
    return apply_method(model, PyramidKV(budget=budget, **options))
