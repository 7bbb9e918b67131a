"""Checks of the operations on lists that share the slots of their row.

Every check runs an operation on lists with slots of their own and on the same lists packed one
behind the other, in any order, with NaN between them, and compares what both hold afterwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from patchkit.attention import reference
from patchkit.attention.kernels import (
    append,
    attention_mass,
    compact,
    decode_attention,
    evict_lowest,
)
from tests.attention.kernel_cases import Store, make_store, ragged, random, random_int

SPARE = 2  # slots behind the live ones of every list


@dataclasses.dataclass(frozen=True)
class PackedCase:
    batch_size: int = 2
    num_kv_heads: int = 3
    groups: int = 2
    longest: int = 41
    head_dim: int = 16
    value_dim: int = 24

    def __str__(self) -> str:
        return "-".join(f"{name}{value}" for name, value in vars(self).items())


def pack(store: Store, score: Tensor, room: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Put the lists of every row behind each other, in reverse order, `room` slots for each.

    Returns:
        `keys`, `values`, `position` and `score` expanded over the heads, and their first slots.
    """
    batch_size, num_heads = store.length.shape
    held = {"keys": store.keys, "values": store.values, "position": store.position, "score": score}
    ahead = room.cpu().flip(1).cumsum(1)
    first = (ahead - room.cpu().flip(1)).flip(1).int() + 1  # one slot that belongs to nobody
    total = int(ahead.max()) + 2
    packed = {}
    for name, data in held.items():
        empty = 777 if name == "position" else torch.nan
        row = data.new_full((batch_size, 1, total, *data.shape[3:]), empty)
        for b in range(batch_size):
            for h in range(num_heads):
                begin, live = int(first[b, h]), int(store.length[b, h])
                row[b, 0, begin : begin + live] = data[b, h, :live]
        packed[name] = row.expand(-1, num_heads, *row.shape[2:])
    return packed, first.to(score.device)


def compare(
    packed: dict[str, Tensor],
    list_start: Tensor,
    room: Tensor,
    dense: dict[str, Tensor],
    length: Tensor,
) -> None:
    """Compare live slots, and expect every slot outside of all lists as it was."""
    for name, data in packed.items():
        outside = torch.ones(data.shape[0], data.shape[2], dtype=torch.bool)
        for b in range(length.shape[0]):
            for h in range(length.shape[1]):
                begin, live = int(list_start[b, h]), int(length[b, h])
                outside[b, begin : begin + int(room[b, h])] = False
                got, want = data[b, h, begin : begin + live], dense[name][b, h, :live]
                assert torch.equal(got, want), f"{name} of list {b}, {h}"
        rest = data[:, 0].cpu()[outside].float()
        assert (rest.isnan() | (rest == 777)).all(), f"{name} changed outside of the lists"


def _stores(
    case: PackedCase, dtype: torch.dtype, device: str
) -> tuple[Store, Tensor, Tensor, dict[str, Tensor], Tensor, Tensor]:
    length = ragged(case.batch_size, case.num_kv_heads, case.longest)
    room = length + SPARE
    store = make_store(length, case.longest + SPARE, case.head_dim, case.value_dim, dtype, device)
    score = random(store.position.shape, 9, torch.float32, device).abs()
    packed, first = pack(store, score, room)
    return store, score, room, packed, first, store.length.clone()


def check_append(case: PackedCase, dtype: torch.dtype, device: str = "cpu") -> None:
    for op in (reference.append, append.append):
        for valid in (None, torch.arange(case.batch_size, device=device)[:, None] % 2 == 0):
            store, score, room, packed, first, length = _stores(case, dtype, device)
            seen = store.seen.clone()
            shape = (case.batch_size, case.num_kv_heads, 1)
            new = [random((*shape, d), 3, dtype, device) for d in (case.head_dim, case.value_dim)]
            held = [packed[name] for name in ("keys", "values", "position")]
            op(*held, length, seen, *new, valid, list_start=first)
            op(*store.tensors, *new, valid)
            assert torch.equal(length, store.length) and torch.equal(seen, store.seen)
            dense = {"keys": store.keys, "values": store.values, "position": store.position}
            del packed["score"]
            compare(packed, first, room, dense, length)


def check_decode_attention(case: PackedCase, dtype: torch.dtype, device: str = "cpu") -> None:
    heads = case.num_kv_heads * case.groups
    query = random((case.batch_size, heads, 1, case.head_dim), 4, dtype, device)
    for op in (reference.decode_attention, decode_attention.decode_attention):
        store, _, _, packed, first, length = _stores(case, dtype, device)
        results = []
        held = [packed[name] for name in ("keys", "values", "position")]
        for slots, extra in ((store.tensors[:3], {}), (held, {"list_start": first})):
            lse = query.new_full(query.shape[:3], torch.nan, dtype=torch.float32)
            out = op(query, *slots, length, store.seen, scale=0.3, lse=lse, **extra)
            results.append((out, lse))
        # Splits are other ones: sums in another order.
        for got, want in zip(*reversed(results), strict=True):
            rtol = max(4 * torch.finfo(got.dtype).eps, 1e-5)
            torch.testing.assert_close(got, want, rtol=rtol, atol=rtol)


def check_attention_mass(
    case: PackedCase, q_len: int, dtype: torch.dtype, device: str = "cpu"
) -> None:
    heads = case.num_kv_heads * case.groups
    query = random((case.batch_size, heads, q_len, case.head_dim), 4, dtype, device)
    lse = 2 + random(query.shape[:3], 5, torch.float32, device).abs()
    for op in (reference.attention_mass, attention_mass.attention_mass):
        store, score, room, packed, first, length = _stores(case, dtype, device)
        options: dict[str, Any] = {"scale": 0.3, "decay": 0.7, "num_new": 1}
        dense = (store.keys, store.position, length, store.seen, lse, score)
        shared = (packed["keys"], packed["position"], length, store.seen, lse, packed["score"])
        op(query, *dense, **options)
        op(query, *shared, **options, list_start=first)
        for b in range(length.shape[0]):
            for h in range(length.shape[1]):
                begin, live = int(first[b, h]), int(length[b, h])
                got = packed["score"][b, h, begin : begin + live]
                torch.testing.assert_close(got, score[b, h, :live], rtol=1e-5, atol=1e-6)
        free = length.cpu() * 0
        everywhere = {"score": packed["score"]}
        compare(everywhere, first, room, {"score": score}, free)


def check_evict_lowest(
    case: PackedCase, scored: bool, dtype: torch.dtype, device: str = "cpu"
) -> None:
    for op in (reference.evict_lowest, evict_lowest.evict_lowest):
        store, score, room, packed, first, length = _stores(case, dtype, device)
        lists = tuple(length.shape)
        budget = (length.cpu() - random_int(1, lists, 8)).to(device)
        recent = random_int(3, lists, 7).to(device)
        held = [packed[name] for name in ("keys", "values", "position")]
        ranking = (score, packed["score"]) if scored else (None, None)
        rule = (budget, store.seen, recent)
        op(*store.tensors[:3], store.length, *rule, ranking[0], 1)
        op(*held, length, *rule, ranking[1], 1, list_start=first)
        assert torch.equal(length, store.length)
        dense = dict(zip(("keys", "values", "position"), store.tensors, strict=False))
        if scored:
            dense["score"] = score
        else:
            del packed["score"]
        compare(packed, first, room, dense, length)


def check_compact(case: PackedCase, dtype: torch.dtype, device: str = "cpu") -> None:
    """Pack lists, move them to another packing, unpack them."""
    run: Callable[..., None]
    for run in (reference.compact, compact.compact):
        store, score, room, packed, first, length = _stores(case, dtype, device)
        names = ("keys", "values", "position")
        dense = dict(zip(names, store.tensors, strict=False)) | {"score": score}
        width = case.longest
        every = torch.arange(width, dtype=torch.int32, device=device).expand(*length.shape, -1)
        held = [packed[name] for name in names]

        def empty(like: dict[str, Tensor]) -> dict[str, Tensor]:
            blank = {}
            for name, data in like.items():
                shared = data[:, :1] if data.stride(1) == 0 else data
                fill = 777 if name == "position" else torch.nan
                blank[name] = torch.full_like(shared, fill).expand_as(data)
            return blank

        unpacked = empty(dense)
        into = [unpacked[name] for name in names]
        scores = (packed["score"], unpacked["score"])
        run(*held, length, every, length, *into, *scores, list_start=first)
        compare(unpacked, first * 0, length * 0 + 10**6, dense, length)
        for b in range(length.shape[0]):
            for h in range(length.shape[1]):
                live = int(length[b, h])
                assert (unpacked["position"][b, h, live:] == -1).all()
                assert all((unpacked[n][b, h, live:] == 0).all() for n in ("keys", "score"))

        # Every other slot, from slots of their own to a packing, and from one packing to another.
        count = (length + 1) // 2
        keep = (2 * every[..., : (width + 1) // 2]).contiguous()
        third = {n: t[:, :, ::2] for n, t in dense.items()}
        own = [dense[name] for name in names]
        for source, scores, begin in ((own, score, None), (held, packed["score"], first)):
            target = empty(packed)
            into = [target[name] for name in names]
            rest = length.clone()
            run(*source, rest, keep, count, *into, scores, target["score"], begin, first)
            assert torch.equal(rest, count)
            compare(target, first, room, third, count)
