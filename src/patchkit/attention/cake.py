"""CAKE: divide one budget among the layers by how they attend, and rank tokens by two moments.

Problem
    Layers differ in how widely they attend and in how much that shifts from query to query. The
    same budget for all starves some and pampers others.

Method
    The last `window` queries of the prompt describe each layer: the entropy H of their weights
    (how wide attention is spread) and their variance V over the queries (how much it moves). A
    layer's preference is `H^(1/tau1) * V^(1/tau2)`; the budget of all layers together is divided
    in proportion, by water-filling under what each layer holds. Inside a layer a token's score is
    the mean of its weights plus `gamma` times their variance, smoothed over `kernel_size`
    neighbours. Preferences of later layers only take away from earlier ones, so layers are cut
    while the prompt is still passing through the model (cascading), and what is kept equals a cut
    at the end. Layers keep their shares from then on; only a budget that is a fraction of the
    prompt is divided anew as the prompt grows. While decoding the attention of the newest query
    ranks the tokens.

Options
    budget: tokens kept per KV head in the average layer, window and sinks included (int), or kept
        fraction of the prompt (float in (0, 1]: 0.25 keeps a quarter).
    window: queries that describe a layer, and tokens that are always kept (default 32).
    gamma: weight of the variance (default 200).
    tau1, tau2: temperatures of entropy and variance (default 1; `calibrate` finds better ones).
    kernel_size: tokens that are averaged, odd (default 5).
    dense_layers: layers that may wait uncut while a prompt is fed (default 4): fewer take less
        memory, more take fewer host synchronisations.
    num_sink_tokens: tokens at the start of each row that are never dropped (default 4).
    budget_bytes: bound on the bytes of the whole store instead of `budget`; with rows or layers of
        unequal budgets their slots may take more.

Exactness
    Approximate; exact while nothing has been dropped.

Families
    Every model whose attention goes through transformers' AttentionInterface. Sliding-window layers
    keep their recent tokens only and take no part in the division.

Source
    CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences, arXiv 2503.12491,
    equations 4 to 8. Differs: entropy, variance and budgets are per row, without padding; budgets
    are real numbers until the end and then rounded to the exact total; sinks are protected; the
    budget is a hard bound; decoding ranks single slots without smoothing.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from patchkit.api import patched
from patchkit.attention.eviction import Attended, Budget, EvictionPolicy, apply_method
from patchkit.attention.scoring import replace_by_indicator, replace_by_newest
from patchkit.attention.snapkv import SnapKV
from patchkit.attention.store_layer import StoreLayer
from patchkit.compat import CACHE_KEYWORD


class Cascade:
    """Divides the budget among the layers of one store.

    Args:
        method: The configuration.
    """

    def __init__(self, method: CAKE) -> None:
        self.method = method
        self.policies: list[Preferred] = []
        # Weak, so that a store that is dropped does not wait for the garbage collector.
        self._closed: list[tuple[Preferred, weakref.ref[StoreLayer], Tensor]] = []
        self._waiting = 0
        self._crowded = False
        self.divided = False  # for good: what a layer has lost, a larger share does not bring back

    def close(self, policy: Preferred, layer: StoreLayer) -> None:
        """Take note that a layer has attended to a chunk, and cut layers where it is time."""
        if policy is self.policies[0]:
            self._closed, self._waiting, self._crowded = [], 0, False
        policy.set_budget(layer)  # what an average layer keeps
        lists = (layer.length, policy.budget, policy.recent)  # alike for all heads of a row
        sums = policy.parts.sum(-1, dtype=torch.float64)
        facts = torch.stack([*sums, *(x[:, 0].double() for x in lists)])
        self._closed.append((policy, weakref.ref(layer), facts))
        self._waiting += 1
        self._crowded |= layer.filled > policy.lowest
        last = len(self._closed) == len(self.policies)
        if self._crowded and (last or self._waiting >= self.method.dense_layers):
            self._cut(last)
            self._waiting = 0
            self.divided = last and not isinstance(policy.tokens, float)

    def _cut(self, last: bool) -> None:
        """Divide the budget by the preferences so far; the only read of device values."""
        device = self._closed[0][2].device
        facts = torch.stack([facts.to(device) for *_, facts in self._closed])  # [layers, 5, B]
        shares: list[list[int]] = []
        for row in facts.permute(2, 0, 1).tolist():
            entropies, shifts, lengths, budgets, recents = zip(*row, strict=True)
            protected = self.method.num_sink_tokens + int(recents[0])
            total = (int(budgets[0]) - protected) * len(self.policies)
            preferences = list(map(self._preference, entropies, shifts))
            top = max(preferences)
            weights = [math.exp(p - top) if top > -math.inf else 1.0 for p in preferences]
            caps = [max(int(length) - protected, 0) for length in lengths]
            real = water_fill(weights, total, caps)
            whole = round_to_total(real, total) if last else [math.floor(x) + 1 for x in real]
            shares.append([protected + kept for kept in whole])
        budgets_of_layers = zip(*shares, strict=True)
        for (policy, held, _), per_row in zip(self._closed, budgets_of_layers, strict=True):
            layer = held()
            assert layer is not None  # its store is being filled
            policy.take(layer, per_row, last)

    def _preference(self, entropy: float, shift: float) -> float:
        """Return the logarithm of a layer's share of the budget, but for a factor."""
        if entropy <= 0 or shift <= 0:
            return -math.inf
        return math.log(entropy) / self.method.tau1 + math.log(shift) / self.method.tau2


def water_fill(weights: Sequence[float], total: float, caps: Sequence[float]) -> list[float]:
    """Divide `total` in proportion to `weights`, no part above its cap.

    What a capped part cannot take goes to the others. If all are capped, the sum falls short of
    `total`. Equal weights stand in for weights that are all 0.
    """
    parts = [0.0] * len(weights)
    open_parts = set(range(len(weights)))
    left = float(total)
    while open_parts:
        scale = sum(weights[i] for i in open_parts)
        parts_now = {
            i: left * weights[i] / scale if scale > 0 else left / len(open_parts)
            for i in open_parts
        }
        full = {i for i, part in parts_now.items() if part >= caps[i]}
        if not full:
            for i, part in parts_now.items():
                parts[i] = part
            break
        for i in full:
            parts[i] = float(caps[i])
            left -= caps[i]
        open_parts -= full
    return parts


def round_to_total(parts: Sequence[float], total: int) -> list[int]:
    """Round to whole numbers that sum to `total`, largest remainders first.

    Where the parts sum to less, every part gets an equal share of the difference on top.
    """
    spare = max(total - sum(parts), 0.0) / len(parts)
    raised = [part + spare for part in parts]
    whole = [math.floor(part + 1e-9) for part in raised]
    by_remainder = sorted(range(len(parts)), key=lambda i: (whole[i] - raised[i], i))
    for i in by_remainder[: total - sum(whole)]:
        whole[i] += 1
    return whole


class Preferred(EvictionPolicy):
    """Rank tokens by mean and variance of the weights they get, in a layer's share of a budget."""

    scored = True
    parts: Tensor
    """`[2, B, N]` float32, to add up: how widely the layer attends, and how much that shifts."""

    def __init__(self, cascade: Cascade, budget: Budget, most_bytes: int | None) -> None:
        method = cascade.method
        super().__init__(budget, method.num_sink_tokens, most_bytes=most_bytes)
        self.method, self.cascade = method, cascade
        cascade.policies.append(self)

    def allocate(self, layer: StoreLayer) -> None:
        """Make the tensors of a layer that is about to take its first chunk."""
        self.cascade.divided = False
        super().allocate(layer)

    def set_budget(self, layer: StoreLayer) -> None:
        """Set what an average layer keeps, until the budget has been divided."""
        if not self.cascade.divided:
            super().set_budget(layer)

    def counters(self) -> dict[str, Any]:
        """Return what the host knows of the budget."""
        return super().counters() | {"divided": self.cascade.divided}

    def load_counters(self, counters: dict[str, Any]) -> None:
        """Take over what `counters` returned, through JSON or not."""
        self.cascade.divided = counters.pop("divided")
        super().load_counters(counters)

    def num_recent(self, budget: Tensor) -> Tensor:
        """Protect the window."""
        return budget.new_full(budget.shape, self.method.window)

    def observe(self, layer: StoreLayer, attended: Attended) -> None:
        """Describe the layer and its tokens by the last queries of a chunk, or by the only one."""
        q_len, method = attended.query.shape[2], self.method
        if q_len == 1:
            replace_by_newest(layer, attended)
            return
        voters = min(q_len, method.window)
        self.parts = replace_by_indicator(
            layer, attended, voters, gamma=method.gamma, width=method.kernel_size
        )

    def commit(self, layer: StoreLayer, new_tokens: int) -> None:
        """Leave a chunk to the cascade until the budget has been divided."""
        if new_tokens > 1 and not layer.record_past and not self.cascade.divided:
            self.cascade.close(self, layer)
        else:
            super().commit(layer, new_tokens)

    def take(self, layer: StoreLayer, per_row: Sequence[int], last: bool) -> None:
        """Cut the layer to a budget per row; before the last time, only if that frees memory."""
        self.lowest, self.highest = min(per_row), max(per_row)
        self.use_budget(
            layer.length.new_tensor(per_row)[:, None].expand_as(layer.length).contiguous()
        )
        if layer.filled > self.lowest and (last or layer.shrinks(self.highest)):
            self.evict_many(layer)


@dataclass(frozen=True)
class CAKE(SnapKV, name="cake", slots=("kv_eviction",)):
    """Divide one budget among the layers by how they attend.

    Attributes:
        gamma: Weight of the variance in a token's score.
        tau1: Temperature of the entropy in a layer's preference, positive.
        tau2: Temperature of the variance.
        dense_layers: Layers that may wait uncut while a prompt is fed, at least 1.

    The remaining fields are those of `SnapKV`; budgets per layer are refused.

    Raises:
        ValueError: a setting is out of range.
    """

    gamma: float = 200.0
    tau1: float = 1.0
    tau2: float = 1.0
    dense_layers: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window > 64:
            raise ValueError(f"window must be at most 64, got {self.window}")
        if self.tau1 <= 0 or self.tau2 <= 0:
            raise ValueError(f"temperatures must be positive, got {self.tau1} and {self.tau2}")
        if self.dense_layers < 1:
            raise ValueError(f"dense_layers must be >= 1, got {self.dense_layers}")
        if isinstance(self.budget, tuple):
            raise ValueError(f"CAKE decides about layers: expected one budget, got {self.budget}")

    def policies(self, budgets: Sequence[Budget], most_bytes: int | None) -> list[EvictionPolicy]:
        """Make policies that share one cascade."""
        cascade = Cascade(self)
        return [Preferred(cascade, budget, most_bytes) for budget in budgets]


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    input_ids: Tensor,
    method: CAKE,
    *,
    num_scored: int = 64,
    temperatures: Sequence[float] = (0.4, 0.7, 1.0, 1.5, 2.0),
) -> CAKE:
    """Find the temperatures with which a model predicts the ends of some texts best.

    Every pair is tried: all but the last `num_scored` tokens are fed and cut to the budget, then
    the loss of the rest is measured. Texts of the kind and length that will be served are best.

    Args:
        model: A transformers causal language model; patched while this runs only, so not now.
        input_ids: `[B, S]` int64 without padding.
        method: Budget and other settings.
        num_scored: Tokens of each text that are scored, at least 2.
        temperatures: Candidates for both.

    Returns:
        `method` with the best temperatures; the earlier ones of equals.

    Raises:
        ValueError: the texts are not longer than `num_scored`, or fit the budget, or the budget is
            in bytes.
        PatchkitError: the model cannot be patched, or is patched already.
    """
    length = input_ids.shape[1]
    fed = length - num_scored
    kept = method.budget if isinstance(method.budget, int) else int(fed * method.budget)
    if method.budget_bytes is not None:
        raise ValueError(f"expected a budget in tokens, got budget_bytes={method.budget_bytes}")
    if not 2 <= num_scored < length or kept >= fed:
        raise ValueError(
            f"expected texts longer than the budget {method.budget} and num_scored={num_scored} "
            f"together, got {length} tokens"
        )
    prompt, rest = input_ids[:, :-num_scored], input_ids[:, -num_scored:]

    def loss(candidate: CAKE) -> float:
        with patched(model, candidate):
            out = model(prompt, use_cache=True)
            logits = model(rest, **{CACHE_KEYWORD: out[CACHE_KEYWORD]}).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rest[:, 1:].flatten()).item()

    pairs = itertools.product(temperatures, temperatures)
    candidates = [replace(method, tau1=tau1, tau2=tau2) for tau1, tau2 in pairs]
    return min(candidates, key=loss)


def patch(model: nn.Module, budget: int | float = 1024, **options: Any) -> nn.Module:
    """Bound the KV cache of `model` to one budget that its layers divide among themselves.

    Args:
        model: A transformers causal language model, patched in place.
        budget: See `CAKE`.
        **options: The other fields of `CAKE`.

    Returns:
        The same model.

    Raises:
        ValueError: a setting is out of range.
        PatchkitError: the model cannot be patched; see `patchkit.apply`.
    """
    return apply_method(model, CAKE(budget=budget, **options))
