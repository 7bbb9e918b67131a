"""Checks of the operations that move tokens between slots; see `kernel_cases`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from patchkit.attention import reference
from patchkit.attention.kernels import compact, evict_lowest
from tests.attention.kernel_cases import (
    EMPTY,
    Store,
    assert_same_bits,
    make_store,
    ragged,
    random,
    random_int,
)

# --- compact -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CompactCase:
    batch_size: int = 2
    num_heads: int = 2
    capacity: int = 63
    out_capacity: int = 37
    head_dim: int = 16
    value_dim: int = 16
    num_keep: int = 30
    keep_dtype: torch.dtype = torch.int64
    heads_inside: bool = False

    def __str__(self) -> str:
        return (
            f"B{self.batch_size}-H{self.num_heads}-C{self.capacity}to{self.out_capacity}"
            f"-D{self.head_dim}-Dv{self.value_dim}-N{self.num_keep}"
            f"-{str(self.keep_dtype)[6:]}{'-heads_inside' * self.heads_inside}"
        )


def _compact_oracle(
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    length: Tensor,
    keep: Tensor,
    keep_count: Tensor,
    out_keys: Tensor,
    out_values: Tensor,
    out_position: Tensor,
    score: Tensor,
    out_score: Tensor,
) -> None:
    out_position.fill_(EMPTY)
    for data in (out_keys, out_values, out_score):
        data.fill_(0)
    for b in range(keep.shape[0]):
        for h in range(keep.shape[1]):
            length[b, h] = min(length[b, h], keep_count[b, h])
            for j in range(int(length[b, h])):
                slot = int(keep[b, h, j])
                out_keys[b, h, j] = keys[b, h, slot]
                out_values[b, h, j] = values[b, h, slot]
                out_position[b, h, j] = position[b, h, slot]
                out_score[b, h, j] = score[b, h, slot]


def check_compact(case: CompactCase, dtype: torch.dtype, device: str = "cpu") -> None:
    """Compact into a store full of NaN and compare every buffer."""
    lists = (case.batch_size, case.num_heads)
    width = min(case.num_keep, case.out_capacity)
    length = ragged(*lists, case.capacity)
    count = ragged(*lists, width, seed=6).minimum(length)
    keep = torch.full((*lists, case.num_keep), 2**30, dtype=case.keep_dtype)
    for b, h in torch.cartesian_prod(*(torch.arange(n) for n in lists)).tolist():
        slots = torch.randperm(
            int(length[b, h]), generator=torch.Generator().manual_seed(b + 10 * h)
        )
        keep[b, h, : count[b, h]] = slots[: count[b, h]].sort().values.to(case.keep_dtype)
    count += 7 * (count == length)  # more than there are
    dims = (case.head_dim, case.value_dim, dtype, device)

    def run(op: Callable[..., Any]) -> Store:
        store = make_store(length, case.capacity, *dims, heads_inside=case.heads_inside)
        target = make_store(
            torch.zeros(lists, dtype=torch.int32),
            case.out_capacity,
            *dims,
            heads_inside=case.heads_inside,
        )
        target.position.fill_(77)
        scores = [store.values[..., 0].float(), torch.full_like(target.position, 5).float()]
        target.buffers["score"] = scores[1]
        chosen = (keep.to(device), count.to(device))
        op(*store.tensors[:4], *chosen, *target.tensors[:3], *scores)
        target.buffers["length"] = store.length
        return target

    expected = run(_compact_oracle)
    assert_same_bits(run(reference.compact).buffers, expected.buffers, "reference")
    assert_same_bits(run(compact.compact).buffers, expected.buffers, "kernel")


# --- evict_lowest ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class EvictCase:
    batch_size: int = 2
    num_heads: int = 3
    capacity: int = 63
    head_dim: int = 16
    value_dim: int = 16
    score: str | None = None  # None, "random", "ties", "infinite" or "newest" (lowest is last)
    num_protected: int = 0
    recent: int = 0  # longest of the ragged ones
    mean: bool = False
    rounds: int = 3
    heads_inside: bool = False

    def __str__(self) -> str:
        return (
            f"B{self.batch_size}-H{self.num_heads}-C{self.capacity}-D{self.head_dim}"
            f"-Dv{self.value_dim}-{self.score}-protect{self.num_protected}-recent{self.recent}"
            f"{'-mean' * self.mean}{'-heads_inside' * self.heads_inside}"
        )


def _evict_oracle(
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    length: Tensor,
    budget: Tensor,
    seen: Tensor,
    recent: Tensor,
    score: Tensor | None = None,
    num_protected: int = 0,
    mean: bool = False,
) -> None:
    for b in range(keys.shape[0]):
        for h in range(keys.shape[1]):
            live = int(length[b, h])
            columns = position[b, h, :live]
            rank = columns if score is None else score[b, h, :live]
            if mean and score is not None:
                rank = rank / (int(seen[b, h]) - columns)
            order = list(zip(rank.tolist(), columns.tolist(), range(live), strict=True))
            first_recent = int(seen[b, h]) - int(recent[b, h])
            order = [entry for entry in order[num_protected:] if entry[1] < first_recent]
            if live <= int(budget[b, h]) or not order:
                continue
            victim = min(order)[2]
            for data in (
                (keys, values, position) if score is None else (keys, values, position, score)
            ):
                data[b, h, victim] = data[b, h, live - 1]
            position[b, h, live - 1] = EMPTY
            length[b, h] = live - 1


def _score(case: EvictCase, length: Tensor) -> Tensor | None:
    if case.score is None:
        return None
    shape = (case.batch_size, case.num_heads, case.capacity)
    score = random(shape, 21, torch.float32)
    if case.score == "ties":
        score = random_int(2, shape, seed=22).float() - 1
    elif case.score == "infinite":
        score = torch.full(shape, torch.inf)
    elif case.score == "newest":
        score.scatter_(2, (length[..., None] - 1).clamp_min(0).long(), -100.0)
    dead = torch.arange(case.capacity) >= length[..., None]
    return score.masked_fill(dead, torch.nan)


def check_evict_lowest(case: EvictCase, dtype: torch.dtype, device: str = "cpu") -> None:
    """Evict a few times in a row and compare every buffer, scores included."""
    length = ragged(case.batch_size, case.num_heads, case.capacity)
    length.view(-1)[1] = case.num_protected + 1  # evicts once, down to the protected slots
    budget = (length - random_int(4, tuple(length.shape), seed=23)).clamp_min(0)
    budget.view(-1)[1] = 0
    budget.view(-1)[-1] = length.view(-1)[-1] - 2
    recent = random_int(case.recent, tuple(length.shape), seed=24)
    if case.recent:
        recent[0, 1:] = 10**6  # no candidates
        recent[-1, -1] = case.recent

    def run(op: Callable[..., Any]) -> dict[str, Tensor]:
        store = make_store(
            length,
            case.capacity,
            case.head_dim,
            case.value_dim,
            dtype,
            device,
            heads_inside=case.heads_inside,
        )
        score = _score(case, length)
        if score is not None:
            store.buffers["score"] = score = score.to(device)
        for _ in range(case.rounds):
            lists = (budget.to(device), store.seen, recent.to(device))
            op(*store.tensors[:4], *lists, score, case.num_protected, case.mean)
        return store.buffers

    before, expected = run(lambda *_: None), run(_evict_oracle)
    assert not torch.equal(before["length"], expected["length"])
    assert_same_bits(run(reference.evict_lowest), expected, "reference")
    assert_same_bits(run(evict_lowest.evict_lowest), expected, "kernel")
