"""Eviction by attention scores as plain loops in float64, independent of the store.

`EvictionOracle` is an attention function for transformers. The model runs without a cache; for
every layer, row and KV head the oracle keeps a list of tokens, attends to it and lets a rule score
and drop tokens after the forward. Nothing is padded, moved or overwritten.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AttentionInterface

NAME = "oracle"


@dataclass
class Tokens:
    """What one (row, KV head) of a layer holds, oldest first."""

    columns: list[int] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    arrived: int = 0  # in the first forward and others of more than one token

    def keep(self, chosen: set[int]) -> None:
        """Drop every token whose column is not chosen."""
        kept = [i for i, column in enumerate(self.columns) if column in chosen]
        for name in ("columns", "keys", "values", "scores"):
            held = getattr(self, name)
            setattr(self, name, [held[i] for i in kept])


@dataclass
class Pass:
    """One forward over one list: weights `[G, n, tokens]` of its n valid queries, in order."""

    tokens: Tokens
    weights: Tensor
    columns: list[int]  # of the queries
    size: int  # columns of the pass, padding included
    seen: int  # columns so far


Rule = Callable[[list[list[list[Pass]]]], None]
"""Takes the passes of a forward by layer, row and head; scores and drops tokens."""


class EvictionOracle:
    """Attention over lists of tokens that `rule` thins out after every forward."""

    def __init__(self, model, rule: Rule) -> None:
        self.model, self.rule = model, rule
        self.layers: dict[int, list[list[Tokens]]] = {}
        self.seen = 0
        AttentionInterface.register(NAME, self._attention)
        model.set_attn_implementation(NAME)

    @torch.no_grad()
    def __call__(self, ids: Tensor, valid: Tensor) -> Tensor:
        """Feed `ids [B, T]`; `valid [B, T]` is False for padding. Return the logits."""
        self.valid, self.passes = valid, {}
        before = torch.tensor([[self._count(row)] for row in range(len(ids))])
        position_ids = (before + valid.long().cumsum(-1) - 1).clamp(min=0)
        self._counts = [
            c + int(v.sum()) for c, v in zip(before.flatten().tolist(), valid, strict=True)
        ]
        self.seen += ids.shape[1]
        out = self.model(ids, position_ids=position_ids, use_cache=False)
        self.rule([self.passes[layer] for layer in sorted(self.passes)])
        return out.logits

    def _count(self, row: int) -> int:
        return getattr(self, "_counts", [0] * (row + 1))[row]

    def _attention(self, module, query, key, value, mask, scaling=None, **kwargs):
        rows, heads, size, dim = query.shape
        groups = heads // key.shape[1]
        lists = self.layers.setdefault(
            module.layer_idx, [[Tokens() for _ in range(key.shape[1])] for _ in range(rows)]
        )
        out = torch.zeros(rows, size, heads, value.shape[-1], dtype=query.dtype)
        self.passes[module.layer_idx] = [[] for _ in range(rows)]
        for b in range(rows):
            steps = [t for t in range(size) if self.valid[b, t]]
            columns = [self.seen - size + t for t in steps]
            for h, tokens in enumerate(lists[b]):
                for t, column in zip(steps, columns, strict=True):
                    tokens.columns.append(column)
                    tokens.keys.append(key[b, h, t])
                    tokens.values.append(value[b, h, t])
                    tokens.scores.append(0.0)
                tokens.arrived += len(steps) if size > 1 or self.seen == size else 0
                if not steps:
                    continue
                mine = slice(h * groups, (h + 1) * groups)
                logits = query[b, mine][:, steps] @ torch.stack(tokens.keys).T * scaling
                held = torch.tensor(tokens.columns)
                seen = held[None] <= torch.tensor(columns)[:, None]
                weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
                mixed = weights @ torch.stack(tokens.values)  # [G, n, Dv]
                out[b, steps, mine] = mixed.transpose(0, 1)
                self.passes[module.layer_idx][b].append(
                    Pass(tokens, weights.double(), columns, size, self.seen)
                )
        return out, None

    def kept(self) -> list[list[list[list[int]]]]:
        """Return the columns held, by layer, row and head."""
        return [[[t.columns for t in row] for row in rows] for rows in self.layers.values()]


def budget_of(budget: int | float, tokens: Tokens, sinks: int) -> int:
    """Resolve a budget; a fraction is of what arrived in chunks."""
    return budget if isinstance(budget, int) else max(int(tokens.arrived * budget), sinks + 1)


def drop(state: Pass, budget: int, sinks: int, recent: int, key: Callable[[int], float]) -> None:
    """Keep sinks, recent columns and the tokens with the highest `key(index)`, newer of equals."""
    tokens = state.tokens
    if len(tokens.columns) <= budget:
        return
    recent = min(recent, budget - sinks)
    order = list(range(len(tokens.columns)))

    def rank(i: int) -> tuple[int, float, int]:
        column = tokens.columns[i]
        safe = 2 if i < sinks else 1 if column >= state.seen - recent else 0
        return safe, key(i) if safe == 0 else 0.0, column

    order.sort(key=rank, reverse=True)
    tokens.keep({tokens.columns[i] for i in order[:budget]})


def smooth(scores: list[float], width: int) -> list[float]:
    """Average over neighbours; those beyond the ends count as 0."""
    half, n = width // 2, len(scores)
    return [sum(scores[max(i - half, 0) : min(i + half + 1, n)]) / width for i in range(n)]


def each(passes) -> list[Pass]:
    """Flatten layers, rows and heads."""
    return [state for layer in passes for row in layer for state in row]


def h2o_rule(
    budget, sinks=4, recent=0.5, norm="sum", decay=0.99, window: int | None = None
) -> Rule:
    """Accumulate attention; see `H2O`."""
    fading = decay if norm == "ema" else 1.0

    def rule(passes) -> None:
        for state in each(passes):
            tokens, size = state.tokens, state.size
            oldest = state.seen - (size if window is None else min(window, size))
            tokens.scores = [s * fading**size for s in tokens.scores]
            for i, column in enumerate(state.columns):
                if column >= oldest:
                    got = state.weights[:, i].sum(0) * fading ** (state.seen - 1 - column)
                    tokens.scores = [s + float(g) for s, g in zip(tokens.scores, got, strict=True)]
            most = budget_of(budget, tokens, sinks)

            def key(i: int, tokens=tokens, state=state) -> float:
                queries = state.seen - tokens.columns[i] if norm == "mean" else 1
                return tokens.scores[i] / queries

            drop(state, most, sinks, int((most - sinks) * recent), key)

    return rule


def tova_rule(budget, sinks=0) -> Rule:
    """Average the newest query's weights over all heads; see `TOVA`."""

    def rule(passes) -> None:
        for layer in passes:
            for row in layer:
                newest = [s.weights[:, -1].sum(0) for s in row if s.columns[-1] == s.seen - 1]
                score = torch.stack(newest).sum(0)
                for state in row:
                    state.tokens.scores = score.tolist()
                    most = budget_of(budget, state.tokens, sinks)
                    drop(state, most, sinks, 1, lambda i, s=state: s.tokens.scores[i])

    return rule


def _vote(state: Pass, window: int, width: int) -> None:
    tokens, size = state.tokens, state.size
    if size < window and size < state.seen:
        keep = 1 - 1 / window
        tokens.scores = [s * keep**size for s in tokens.scores]
        for i, column in enumerate(state.columns):
            got = state.weights[:, i].sum(0) * keep ** (state.seen - 1 - column) / window
            tokens.scores = [s + float(g) for s, g in zip(tokens.scores, got, strict=True)]
        return
    voters = min(size, window)
    inside = [i for i, column in enumerate(state.columns) if column >= state.seen - voters]
    tokens.scores = smooth(state.weights[:, inside].mean(1).sum(0).tolist(), width)


def snapkv_rule(budget, sinks=4, window=32, width=5, share: Callable | None = None) -> Rule:
    """Let the last queries vote; see `SnapKV`. `share(layer, layers, budget)` makes a pyramid."""

    def rule(passes) -> None:
        for depth, layer in enumerate(passes):
            for state in each([layer]):
                _vote(state, window, width)
                most = budget_of(budget, state.tokens, sinks)
                if share is not None:
                    most = budget if isinstance(budget, int) else state.tokens.arrived * budget
                    most = max(int(share(depth, len(passes), most)), sinks + 1)
                drop(state, most, sinks, window, lambda i, s=state: s.tokens.scores[i])

    return rule


def adakv_rule(budget, floor=0.2, sinks=4, window=32, width=5) -> Rule:
    """Divide a layer's budget among its heads whenever a chunk overflows it; see `AdaKV`."""
    budgets: dict[tuple[int, int, int], int] = {}

    def rule(passes) -> None:
        for depth, layer in enumerate(passes):
            for b, row in enumerate(layer):
                for state in row:
                    _vote(state, window, width)
                if row and (row[0].size > 1 or row[0].seen == row[0].size):
                    shares = _shares(row, budget_of(budget, row[0].tokens, sinks))
                    budgets.update({(depth, b, h): most for h, most in enumerate(shares)})
                for h, state in enumerate(row):
                    most = budgets[depth, b, h]
                    drop(state, most, sinks, window, lambda i, s=state: s.tokens.scores[i])

    def _shares(row: list[Pass], equal: int) -> list[int]:
        held = [len(state.tokens.columns) for state in row]
        if sum(held) <= equal * len(row):
            return [n + (equal * len(row) - sum(held)) // len(row) for n in held]
        least = min(max(int(equal * floor), sinks + window), equal)
        chosen, others = [least] * len(row), []
        for h, state in enumerate(row):
            tokens = Tokens(list(state.tokens.columns), *[list(state.tokens.columns)] * 3)
            twin = Pass(tokens, state.weights, state.columns, state.size, state.seen)
            drop(twin, least, sinks, min(window, equal - sinks), state.tokens.scores.__getitem__)
            for column, score in zip(state.tokens.columns, state.tokens.scores, strict=True):
                if column not in tokens.columns:
                    others.append((score, column, h))
            chosen[h] = len(tokens.columns)
        left = equal * len(row) - sum(chosen)
        for _, _, h in sorted(others, reverse=True)[:left]:
            chosen[h] += 1
        return chosen

    return rule


def cake_rule(budget, sinks=4, window=32, width=5, gamma=200.0, tau1=1.0, tau2=1.0) -> Rule:
    """Divide by preferences after the whole forward that fills the budget; see `CAKE`."""
    budgets: dict[tuple[int, int], int] = {}

    def rule(passes) -> None:
        size = passes[0][0][0].size
        rows = range(len(passes[0]))
        if passes[0][0][0].seen == size:
            budgets.clear()
        if size > 1:
            again = isinstance(budget, float) or not budgets
            full = isinstance(budget, float) or passes[0][0][0].seen > budget
            for b in rows:
                divided = _divide([layer[b] for layer in passes])  # which also scores
                for depth, most in enumerate(divided):
                    if again and full:
                        budgets[depth, b] = most
        for depth, layer in enumerate(passes):
            for b in rows:
                for state in layer[b]:
                    if size == 1:
                        state.tokens.scores = state.weights[:, 0].sum(0).tolist()
                    most = budgets.get((depth, b), budget_of(budget, state.tokens, sinks))
                    drop(state, most, sinks, window, lambda i, s=state: s.tokens.scores[i])

    def _divide(layers: list[list[Pass]]) -> list[int]:
        preferences = []
        for heads in layers:
            entropy = shift = 0.0
            for state in heads:
                voters = min(state.size, window)
                inside = [i for i, c in enumerate(state.columns) if c >= state.seen - voters]
                p = state.weights[:, inside]  # [G, n, tokens]
                variance = p.var(1) if len(inside) > 1 else torch.zeros_like(p[:, 0])
                indicator = (p.mean(1) + gamma * variance).sum(0)
                state.tokens.scores = smooth(indicator.tolist(), width)
                older = torch.tensor(state.tokens.columns) < state.seen - voters
                cut = p[..., older]
                entropy -= float(torch.special.xlogy(cut, cut).sum())
                shift += float(variance[:, older].sum())
            preferences.append(entropy ** (1 / tau1) * shift ** (1 / tau2))
        state = layers[0][0]
        mean = budget_of(budget, state.tokens, sinks)
        protected = sinks + min(window, mean - sinks)
        total = (mean - protected) * len(layers)
        caps = [max(len(heads[0].tokens.columns) - protected, 0) for heads in layers]
        return [protected + kept for kept in _fill(preferences, caps, total)]

    return rule


def _fill(weights: list[float], caps: list[int], total: int) -> list[int]:
    """Water-filling by bisection on the level, then largest remainders."""
    if sum(weights) <= 0:
        weights = [1.0] * len(weights)
    if sum(caps) <= total:
        parts = [cap + (total - sum(caps)) / len(caps) for cap in caps]
    else:
        low, high = 0.0, total / min(w for w in weights if w > 0) + 1
        for _ in range(500):
            level = (low + high) / 2
            filled = sum(min(cap, level * w) for cap, w in zip(caps, weights, strict=True))
            low, high = (level, high) if filled < total else (low, level)
        parts = [min(cap, low * w) for cap, w in zip(caps, weights, strict=True)]
    whole = [math.floor(part + 1e-9) for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda i: (whole[i] - parts[i], i))
    for i in by_remainder[: total - sum(whole)]:
        whole[i] += 1
    return whole
