"""What an eviction method decides about one layer of a KV store, and the base of all such methods.

A method makes one `EvictionPolicy` per layer and store. After the attention of every forward pass
the layer shows its policy what was attended (`observe`) and lets it enforce the budget (`commit`).
A policy is at most three decisions: how much a list keeps (`set_budget`), which tokens are safe
(`num_recent`) and how the others rank (`observe` writes `layer.score`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from patchkit.compat import ordinary_tensors
from patchkit.errors import CacheError, UnsupportedGenerationError
from patchkit.method import Method

if TYPE_CHECKING:
    from patchkit.attention.store_layer import StoreLayer
    from patchkit.families import Family

Budget = int | float | tuple[int, ...]
"""Tokens per KV head (int), kept fraction of the prompt (float in (0, 1]), or one int per head."""


@dataclass(frozen=True)
class Attended:
    """The attention of one forward pass over a layer of the store.

    Attributes:
        query: `[B, H_q, Q, D]`; the tokens of the pass are the newest ones of the store.
        keys: `[B, H, C, D]` slots as attention read them; of H > H_kv heads where these were
            expanded from a latent (MLA).
        position: `[B, H_kv, C]` int32, columns of those slots.
        lse: `[B, H_q, Q]` float32 log of the softmax denominators, if attention computed it.
        masking: `scale`, `sliding_window` and `softcap`, as the attention operations take them.
        sinks: `[H_q]` attention-sink logits, or None.
    """

    query: Tensor
    keys: Tensor
    position: Tensor
    lse: Tensor | None
    masking: dict[str, Any]
    sinks: Tensor | None


def refuse_custom_mask() -> NoReturn:
    """Say that tokens are scored by causal attention only."""
    raise UnsupportedGenerationError(
        "tokens are scored by causal attention; a 4-D attention mask needs kv_eviction=None"
    )


class EvictionPolicy:
    """Bound one layer of one store by dropping the oldest tokens behind the sinks.

    The budget holds after every forward; a query sees what the previous forward left plus the
    tokens of its own pass. Subclasses rank tokens by a score.

    Args:
        budget: What a KV head keeps, sinks included; see `Budget`. A fraction counts the tokens of
            the first forward and of all others of more than one token, per row, rounded down.
        num_sink_tokens: The first tokens of each row, which are never dropped.
        sliding_window: The layer's own window. It sees no more than the newest
            `sliding_window - 1` tokens beside the query itself, which caps the budget.
        most_bytes: What the slots of this layer may take, instead of a budget.
    """

    scored: ClassVar[bool] = False
    """Whether slots carry a score that ranks them; otherwise the oldest go first."""

    needs_lse: bool = False
    """Whether `observe` uses the softmax denominators of all queries of a prompt: attention that
    has these at hand is taken then, even where another is faster."""

    mean: bool = False
    """Whether the score is a sum over the queries since the token came, to be divided by them."""

    shared_total: int | None = None
    """Where the lists of a row share its slots: bound on their budgets together."""

    per_head: bool
    """Whether the KV heads of a row may keep different tokens."""
    budget: Tensor
    """`[B, H_kv]` int32."""
    recent: Tensor
    """`[B, H_kv]` int32, newest columns whose tokens are never dropped."""
    prompt_length: Tensor
    """`[B, 1]` int32, the tokens that a fraction is of."""

    def __init__(
        self,
        budget: Budget,
        num_sink_tokens: int = 0,
        sliding_window: int | None = None,
        most_bytes: int | None = None,
    ) -> None:
        self.tokens = budget
        self.per_head = self.scored or isinstance(budget, tuple)
        self.num_sink_tokens = num_sink_tokens
        self.limit = None if sliding_window is None else sliding_window - 1
        self.most_bytes = most_bytes
        self.lowest = self.highest = 0  # bounds on `budget`, known to the host
        self._prompt_bound = 0

    # -- what subclasses decide -------------------------------------------------------------

    def num_recent(self, budget: Tensor) -> Tensor:
        """Choose how many of the newest columns are safe, given budgets of any shape (int32)."""
        return torch.zeros_like(budget)

    def share(self, tokens: Any) -> Any:
        """Turn the budget of an average layer, a number or a tensor, into that of this one."""
        return tokens

    def observe(self, layer: StoreLayer, attended: Attended) -> None:
        """Update `layer.score` by the attention of one forward pass."""

    # -- budgets ----------------------------------------------------------------------------

    def allocate(self, layer: StoreLayer) -> None:
        """Make the tensors of a layer that is about to take its first chunk."""
        self._prompt_bound = 0
        self._set_in_place("prompt_length", layer.length.new_zeros(layer.length.shape[0], 1))
        if self.most_bytes is not None:
            self.tokens = self._tokens_of_bytes(layer)
        self.set_budget(layer)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors whose rows follow those of the batch."""
        return {name: getattr(self, name) for name in ("budget", "recent", "prompt_length")}

    def counters(self) -> dict[str, Any]:
        """Return what the host knows of the budget."""
        names = ("tokens", "lowest", "highest", "_prompt_bound")
        return {name: getattr(self, name) for name in names}

    def load_counters(self, counters: dict[str, Any]) -> None:
        """Take over what `counters` returned, through JSON or not."""
        tokens = counters["tokens"]
        self.__dict__.update(counters, tokens=tuple(tokens) if isinstance(tokens, list) else tokens)

    def evicted(self, layer: StoreLayer) -> Tensor:
        """Count the tokens dropped so far, `[B, H_kv]` int32."""
        arrived = self.prompt_length + (layer.columns - self._prompt_bound)
        return arrived - layer.length

    def _tokens_of_bytes(self, layer: StoreLayer) -> int:
        assert self.most_bytes is not None
        slots = layer.slots_within(self.most_bytes)
        if slots <= self.num_sink_tokens + 1:
            raise CacheError(
                f"budget_bytes leaves {self.most_bytes:,} bytes for a layer whose slots take "
                f"{layer.slot_bytes:,}, in {layer.length.shape[0]} rows of all heads"
            )
        return slots - 1  # a step appends before it evicts

    def count(self, new_tokens: int, valid: Tensor | None) -> None:
        """Account for tokens of the prompt; `valid` is `[B, new_tokens]` bool or None."""
        self.prompt_length += new_tokens if valid is None else valid.sum(-1, keepdim=True)
        self._prompt_bound += new_tokens

    def set_budget(self, layer: StoreLayer) -> None:
        """Refresh `budget` and `recent`, and the bounds that the host knows."""
        floor, tokens = self.num_sink_tokens + 1, self.tokens
        if isinstance(tokens, float):
            # In float64, as the host computes its bound: both must round alike.
            per_row = self.share(self.prompt_length.double() * tokens).to(torch.int32)
            budget = per_row.clamp(floor, self.limit)
            self.lowest = 0
            self.highest = max(floor, int(self.share(self._prompt_bound * tokens)))
            if self.limit is not None:
                self.highest = min(self.highest, self.limit)
        else:
            per_head = tokens if isinstance(tokens, tuple) else (int(self.share(tokens)),)
            per_head = tuple(max(kept, floor) for kept in per_head)
            if self.limit is not None:
                per_head = tuple(min(kept, self.limit) for kept in per_head)
            budget = layer.length.new_tensor(per_head)
            self.lowest, self.highest = min(per_head), max(per_head)
        self.use_budget(budget.expand_as(layer.length).contiguous())

    def use_budget(self, budget: Tensor) -> None:
        """Bound every list by `[B, H_kv]` int32 and derive what is recent."""
        most = (budget - self.num_sink_tokens).clamp_min(0)
        self._set_in_place("budget", budget)
        self._set_in_place("recent", self.num_recent(budget).to(torch.int32).minimum(most))

    def _set_in_place(self, name: str, value: Tensor) -> None:
        """Set a tensor, in place where there is one: recorded steps know its address."""
        before = getattr(self, name, None)
        if before is None or before.shape != value.shape or before.device != value.device:
            with ordinary_tensors():
                setattr(self, name, value.clone())
        else:
            before.copy_(value)

    # -- enforcing them ---------------------------------------------------------------------

    def commit(self, layer: StoreLayer, new_tokens: int) -> None:
        """Enforce the budget after a forward pass of `new_tokens`."""
        if new_tokens > 1 or layer.columns == new_tokens:
            self.set_budget(layer)
        if layer.filled - 1 + layer.horizon <= self.lowest:  # as `evicts_within` said before
            return
        if layer.record_past:
            layer.overdue = True
        elif new_tokens == 1 and not layer.overdue:
            self.evict_one(layer)
        else:
            self.evict_many(layer)

    def evict_one(self, layer: StoreLayer) -> None:
        """Overwrite the victim of every list that is over its budget by its newest token."""
        layer.backend.run(
            "attention",
            "evict_lowest",
            layer.device,
            *layer.lists(),
            layer.length,
            self.budget,
            layer.seen,
            self.recent,
            score=None if layer.score is None else layer.scores,
            num_protected=self.num_sink_tokens,
            mean=self.mean,
            list_start=layer.list_start,
        )
        self.note_eviction(layer)

    def note_eviction(self, layer: StoreLayer) -> None:
        """Account on the host for a step that evicted where a list was over its budget."""
        if layer.filled > self.lowest:
            layer.filled = min(layer.filled, self.highest)
            layer.rollback = 0
            layer.ordered = False

    def evict_many(self, layer: StoreLayer) -> None:
        """Keep the best tokens of every list, in slots of just that size."""
        kept = self.select(layer, self.budget, self.highest)
        layer.keep(kept, self.budget, self.highest)

    def select(self, layer: StoreLayer, count: Tensor, most: int) -> Tensor:
        """Pick the best tokens of every list, whose slots are its own.

        Args:
            layer: What holds the lists.
            count: `[B, H_kv]` int32, tokens to pick, or all of a shorter list.
            most: Upper bound on `min(count, length)`.

        Returns:
            `[B, H_kv, min(most, filled)]` int32: the picked slots ascending, then `filled`.
        """
        assert layer.list_start is None
        return layer.backend.run(
            "attention",
            "select_top",
            layer.device,
            None if layer.score is None else layer.score[:, :, : layer.filled],
            layer.position[:, :, : layer.filled],
            layer.length,
            count,
            layer.seen,
            self.recent,
            num_sinks=self.num_sink_tokens,
            mean=self.mean,
            width=min(most, layer.filled),
        )


LayerBudget = int | Sequence[int]


@dataclass(frozen=True)
class KVEviction(Method):
    """Base of the methods that bound the KV cache; see `Window` for what the fields mean."""

    budget: int | float | Sequence[LayerBudget] = 1024
    num_sink_tokens: int = 4
    budget_bytes: int | None = None

    _protected: ClassVar[str] = "num_sink_tokens"

    def __post_init__(self) -> None:
        if self.num_sink_tokens < 0:
            raise ValueError(f"num_sink_tokens must be >= 0, got {self.num_sink_tokens}")
        if self.budget_bytes is not None and self.budget_bytes <= 0:
            raise ValueError(f"budget_bytes must be positive, got {self.budget_bytes}")
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
            if lowest <= self.num_protected:
                raise ValueError(
                    f"budget must exceed {self._protected}={self.num_protected}, got {budget}"
                )
        if not isinstance(self.budget, int):
            object.__setattr__(self, "budget", frozen)

    @property
    def num_protected(self) -> int:
        """Tokens of a list that are never dropped, whatever the budget."""
        return self.num_sink_tokens

    def check(self, family: Family) -> None:
        """Raise ValueError if per-layer budgets do not match the model's layers and heads."""
        if not isinstance(self.budget, tuple):
            return
        if len(self.budget) != len(family.layers):
            raise ValueError(
                f"expected one budget for each of {len(family.layers)} layers, "
                f"got {len(self.budget)}"
            )
        for index, budget in enumerate(self.budget):
            if isinstance(budget, tuple) and len(budget) != family.num_kv_heads:
                raise ValueError(
                    f"layer {index}: expected one budget for each of {family.num_kv_heads} KV "
                    f"heads, got {len(budget)}"
                )

    def sites(self, family: Family) -> tuple[str, ...]:
        """Name the attention modules whose cache layer is bounded."""
        return tuple(layer.name for layer in family.layers if layer.storable)

    def eviction_policies(self, family: Family) -> list[EvictionPolicy | None]:
        """Bound every layer; those with a sliding window keep recent tokens and no sinks."""
        kinds = family.layers
        budgets: Any = self.budget  # see __post_init__
        per_layer = budgets if isinstance(budgets, tuple) else (budgets,) * len(kinds)
        each = self.budget_bytes and self.budget_bytes // sum(kind.storable for kind in kinds)
        full = [kind.storable and kind.sliding_window is None for kind in kinds]
        ranked = iter(self.policies(list(itertools.compress(per_layer, full)), each))
        return [
            next(ranked)
            if wanted
            else EvictionPolicy(budget, 0, kind.sliding_window, each)
            if kind.storable
            else None
            for kind, budget, wanted in zip(kinds, per_layer, full, strict=True)
        ]

    def policies(self, budgets: Sequence[Budget], most_bytes: int | None) -> list[EvictionPolicy]:
        """Make the policies of one store's layers that have no sliding window, in their order."""
        raise NotImplementedError


def apply_method(model: nn.Module, method: Method) -> nn.Module:
    """Apply one method; what the `patch` functions of the method modules do."""
    from patchkit.api import apply

    return apply(model, method)
