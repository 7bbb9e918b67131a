"""Triton sum of the attention that every slot receives; see `reference.attention_mass`.

FLOP floor: `2 * D` for every visible pair of a query and a slot, and query head; with few queries,
bytes floor: `B * H_kv * live * D` elements of keys. A program owns a block of slots of one KV head
and walks over the queries that see it, so sums stay in registers: no atomics, no partial results.
Old slots are seen by more queries, so their blocks start first. Where all queries of a group are
one tile, a program holds that tile instead and walks over blocks of slots, loading keys ahead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkit.attention.kernels import check_arguments, first_slot, per_head, shared_bytes, starts
from patchkit.attention.kernels.attention_lse import (
    first_masked_tile,
    log2_logits,
    sees,
    splits,
)
from patchkit.attention.kernels.decode_attention import INTERPRETED, LOG2_E
from patchkit.dependent_launch import launch_options, wait_for_previous
from patchkit.direct_launch import direct
from patchkit.launch_sizes import cdiv, next_power_of_2

__all__ = ["attention_mass"]

_TARGET_PROGRAMS = 132
_FAR = tl.constexpr(2**30)  # behind every column
_NOWHERE = tl.constexpr(1e30)  # an exponent whose power of 2 is 0, and so is their product
# BLOCK_N, BLOCK_M, pipeline depth
_TILES = ((128, 64, 3), (128, 64, 2), (64, 64, 2), (64, 64, 1), (32, 32, 1), (16, 16, 1))
_FLOAT32_TILES = ((32, 64, 1), (32, 32, 1), (16, 16, 1))


@triton.jit
def _add_tiles(
    total, k, position, first, end, query_ptr, lse_ptr, stride_qh, stride_qi, stride_eh, stride_ei,
    oldest, q_len, scale, sliding_window, softcap,
    GROUPS: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    HEADS: tl.constexpr, TILE_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Add the weights of the query tiles [first, end) of all heads, HEADS of them at a time.
    num_tiles = tl.maximum(end - first, 0)
    divisor = tl.maximum(num_tiles, 1)  # an empty loop's first loads are prepared all the same
    offs_m = tl.arange(0, HEADS * TILE_Q)
    offs_d = tl.arange(0, BLOCK_D)
    for step in range(0, num_tiles * tl.cdiv(GROUPS, HEADS)):
        start = (first + step % divisor) * TILE_Q
        g = (step // divisor * HEADS).to(tl.int64)
        if HEADS == 1:
            i = start + offs_m
        else:
            g += offs_m // TILE_Q
            i = start + offs_m % TILE_Q
        lse_row = lse_ptr + (g * stride_eh + i.to(tl.int64) * stride_ei)
        row, head = i, g
        if MASKED or GROUPS % HEADS != 0:
            mask = i < q_len
            row = tl.minimum(i, q_len - 1)
            if GROUPS % HEADS != 0:
                mask = mask & (g < GROUPS)
                head = tl.minimum(g, GROUPS - 1)
            lse = tl.load(lse_row, mask=mask, other=float("inf"))
        else:
            lse = tl.load(lse_row)
        q_row = query_ptr + (head * stride_qh + row.to(tl.int64) * stride_qi)  # [BLOCK_M]
        if D == BLOCK_D:
            q = tl.load(q_row[None, :] + offs_d[:, None])  # [BLOCK_D, BLOCK_M]
        else:
            q = tl.load(q_row[None, :] + offs_d[:, None], mask=(offs_d < D)[:, None], other=0.0)
        if UPCAST:
            q = q.to(tl.float32)
        lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)  # those add nothing
        logits = log2_logits(k, q, scale, softcap, HAS_SOFTCAP, PRECISION) - lse[None, :]
        if MASKED:
            visible = sees(position[:, None], (oldest + i)[None, :], sliding_window, HAS_WINDOW)
            logits = tl.where(visible, logits, float("-inf"))
        total += tl.sum(tl.exp2(logits), axis=1)
    return total


@direct
@triton.jit(do_not_specialize=["num_lists", "num_kv_heads", "num_new", "sliding_window"])
def _attention_mass_kernel(
    query_ptr, keys_ptr, position_ptr, length_ptr, seen_ptr, lse_ptr, score_ptr, list_start_ptr,
    stride_qb, stride_qh, stride_qi, stride_kb, stride_kh, stride_ks,
    stride_pb, stride_ph, stride_ps, stride_lb, stride_lh, stride_sb, stride_sh,
    stride_eb, stride_eh, stride_ei, stride_cb, stride_ch, stride_cs,
    num_lists, num_kv_heads, q_len, scale, decay, num_new, sliding_window, softcap,
    GROUPS: tl.constexpr, D: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_LIST_START: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr, HEADS: tl.constexpr, TILE_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    wait_for_previous(EARLY)
    pid = tl.program_id(0) % num_lists
    start = tl.program_id(0) // num_lists * BLOCK_N
    b = (pid // num_kv_heads).to(tl.int64)
    h = (pid % num_kv_heads).to(tl.int64)
    length = tl.load(length_ptr + b * stride_lb + h * stride_lh)
    if start >= length:
        return
    oldest = tl.load(seen_ptr + b * stride_sb + h * stride_sh) - q_len  # column of query 0
    slot = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
    live = slot < length
    offs_d = tl.arange(0, BLOCK_D)
    list_start = first_slot(list_start_ptr, pid, HAS_LIST_START)
    position_ptr += b * stride_pb + h * stride_ph + list_start * stride_ps
    position = tl.load(position_ptr + slot * stride_ps, mask=live, other=-1)  # [BLOCK_N]
    keys_ptr += b * stride_kb + h * stride_kh + list_start * stride_ks
    k_ptr = keys_ptr + slot[:, None] * stride_ks + offs_d[None, :]
    k = tl.load(k_ptr, mask=live[:, None] & (offs_d < D)[None, :], other=0.0)  # [BLOCK_N, BLOCK_D]
    if UPCAST:
        k = k.to(tl.float32)
    query_ptr += b * stride_qb + h * GROUPS * stride_qh
    lse_ptr += b * stride_eb + h * GROUPS * stride_eh

    # Queries [first, end) see some slot of the block, those of the tiles [full, full_end) see all.
    low = tl.min(tl.where(position >= 0, position, _FAR), axis=0)
    high = tl.max(position, axis=0)
    end = tl.cdiv(q_len, TILE_Q)
    full_end = q_len // TILE_Q
    if HAS_WINDOW:
        end = tl.minimum(end, tl.cdiv(tl.maximum(high + sliding_window - oldest, 0), TILE_Q))
        full_end = tl.minimum(full_end, tl.maximum(low + sliding_window - oldest, 0) // TILE_Q)
    first = tl.maximum(low - oldest, 0) // TILE_Q
    full = tl.cdiv(tl.maximum(high - oldest, 0), TILE_Q)
    full = tl.minimum(tl.maximum(full, first), end)
    full_end = tl.minimum(tl.maximum(full_end, full), end)

    total = tl.zeros((BLOCK_N,), tl.float32)
    total = _add_tiles(
        total, k, position, first, full, query_ptr, lse_ptr, stride_qh, stride_qi, stride_eh,
        stride_ei, oldest, q_len, scale, sliding_window, softcap, GROUPS, D, True, HAS_WINDOW,
        HAS_SOFTCAP, UPCAST, PRECISION, HEADS, TILE_Q, BLOCK_D,
    )  # fmt: skip
    total = _add_tiles(
        total, k, position, full, full_end, query_ptr, lse_ptr, stride_qh, stride_qi, stride_eh,
        stride_ei, oldest, q_len, scale, sliding_window, softcap, GROUPS, D, False, HAS_WINDOW,
        HAS_SOFTCAP, UPCAST, PRECISION, HEADS, TILE_Q, BLOCK_D,
    )  # fmt: skip
    total = _add_tiles(
        total, k, position, full_end, end, query_ptr, lse_ptr, stride_qh, stride_qi, stride_eh,
        stride_ei, oldest, q_len, scale, sliding_window, softcap, GROUPS, D, True, HAS_WINDOW,
        HAS_SOFTCAP, UPCAST, PRECISION, HEADS, TILE_Q, BLOCK_D,
    )  # fmt: skip
    total = tl.where(position >= 0, total, 0.0)

    score_ptr += b * stride_cb + h * stride_ch + list_start * stride_cs
    if HAS_DECAY:
        old = live & (position < oldest + q_len - num_new)
        total += decay * tl.load(score_ptr + slot * stride_cs, mask=old, other=0.0)
    tl.store(score_ptr + slot * stride_cs, total, mask=live)


@triton.jit
def window_queries(
    query_ptr, lse_ptr, stride_qh, stride_qi, stride_eh, stride_ei, num_heads, q_len,
    D: tl.constexpr, UPCAST: tl.constexpr, HEADS: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Row m of a tile is query m % BLOCK_Q of head m // BLOCK_Q. Return queries
    # [BLOCK_D, HEADS * BLOCK_Q], whether a row counts, and its denominator as an exponent of 2.
    offs_m = tl.arange(0, HEADS * BLOCK_Q)
    offs_d = tl.arange(0, BLOCK_D)
    inside = (offs_m // BLOCK_Q < num_heads) & (offs_m % BLOCK_Q < q_len)
    head = tl.minimum(offs_m // BLOCK_Q, num_heads - 1).to(tl.int64)
    i = tl.minimum(offs_m % BLOCK_Q, q_len - 1)
    q_ptr = query_ptr + head * stride_qh + i * stride_qi  # [HEADS * BLOCK_Q]
    q = tl.load(q_ptr[None, :] + offs_d[:, None], mask=(offs_d < D)[:, None], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    lse = tl.load(lse_ptr + head * stride_eh + i * stride_ei)
    counts = inside & (lse > float("-inf"))
    return q, counts, tl.where(counts, lse * LOG2_E, _NOWHERE)


@triton.jit
def window_logits(
    keys_ptr, position_ptr, stride_ks, stride_ps, start, first_masked, length, q, lse, oldest,
    q_len, scale, sliding_window, softcap,
    D: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Logarithms to base 2 of the weights of a tile, [BLOCK_N, BLOCK_M], from slot `start`
    # on; those before `first_masked` are seen by all queries.
    slot = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
    live = slot < length
    offs_d = tl.arange(0, BLOCK_D)
    k_ptr = keys_ptr + slot[:, None] * stride_ks + offs_d[None, :]
    mask = live[:, None]
    if D != BLOCK_D:
        mask = mask & (offs_d < D)[None, :]
    k = tl.load(k_ptr, mask=mask, other=0.0)
    if UPCAST:
        k = k.to(tl.float32)
    logits = log2_logits(k, q, scale, softcap, HAS_SOFTCAP, PRECISION) - lse[None, :]
    if start >= first_masked:
        position = tl.load(position_ptr + slot * stride_ps, mask=live, other=-1)
        column = oldest + tl.minimum(tl.arange(0, BLOCK_M) % BLOCK_Q, q_len - 1)
        visible = sees(position[:, None], column[None, :], sliding_window, HAS_WINDOW)
        logits = tl.where(visible, logits, -_NOWHERE)
    return logits


@direct
@triton.jit(do_not_specialize=["num_kv_heads", "groups", "q_len", "num_new", "sliding_window"])
def _window_mass_kernel(
    query_ptr, keys_ptr, position_ptr, length_ptr, seen_ptr, lse_ptr, score_ptr, list_start_ptr,
    stride_qb, stride_qh, stride_qi, stride_kb, stride_kh, stride_ks,
    stride_pb, stride_ph, stride_ps, stride_lb, stride_lh, stride_sb, stride_sh,
    stride_eb, stride_eh, stride_ei, stride_cb, stride_ch, stride_cs,
    num_kv_heads, groups, q_len, scale, decay, num_new, sliding_window, softcap,
    D: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_LIST_START: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr, HEADS: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # One program: all query rows of one KV head, every num_splits-th tile of its slots.
    wait_for_previous(EARLY)
    pid = tl.program_id(0)
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    b = (pid // num_kv_heads).to(tl.int64)
    h = (pid % num_kv_heads).to(tl.int64)
    length = tl.load(length_ptr + b * stride_lb + h * stride_lh)
    seen = tl.load(seen_ptr + b * stride_sb + h * stride_sh)
    list_start = first_slot(list_start_ptr, pid, HAS_LIST_START)
    keys_ptr += b * stride_kb + h * stride_kh + list_start * stride_ks
    position_ptr += b * stride_pb + h * stride_ph + list_start * stride_ps
    score_ptr += b * stride_cb + h * stride_ch + list_start * stride_cs
    query_ptr += b * stride_qb + h * groups * stride_qh
    lse_ptr += b * stride_eb + h * groups * stride_eh

    q, _, lse = window_queries(
        query_ptr, lse_ptr, stride_qh, stride_qi, stride_eh, stride_ei, groups, q_len,
        D, UPCAST, HEADS, BLOCK_Q, BLOCK_D,
    )  # fmt: skip
    first_masked = first_masked_tile(length, q_len, HAS_WINDOW, BLOCK_N) * BLOCK_N
    for tile in range(split, tl.cdiv(length, BLOCK_N), num_splits):
        logits = window_logits(
            keys_ptr, position_ptr, stride_ks, stride_ps, tile * BLOCK_N, first_masked, length,
            q, lse, seen - q_len, q_len, scale, sliding_window, softcap, D, HAS_WINDOW,
            HAS_SOFTCAP, UPCAST, PRECISION, BLOCK_Q, HEADS * BLOCK_Q, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        total = tl.sum(tl.exp2(logits), axis=1)
        slot = (tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        live = slot < length
        if HAS_DECAY:
            position = tl.load(position_ptr + slot * stride_ps, mask=live, other=-1)
            old = live & (position < seen - num_new)
            total += decay * tl.load(score_ptr + slot * stride_cs, mask=old, other=0.0)
        tl.store(score_ptr + slot * stride_cs, total, mask=live)


def _window_blocks(
    groups: int, q_len: int, block_d: int, element_size: int, shared: int
) -> dict[str, int] | None:
    """Choose tiles for queries that are one tile, or None where they are not or do not fit."""
    wide = element_size == 4
    heads = next_power_of_2(groups)
    block_q = max(16 // heads, next_power_of_2(q_len))
    block_m = heads * block_q
    if block_m > (32 if wide else 256):
        return None
    for block_n, stages in ((32, 1), (16, 1)) if wide else ((64, 3), (64, 2), (32, 2), (16, 1)):
        if (block_m + stages * block_n) * block_d * element_size <= shared // 2:
            warps = 8 if block_m > (16 if wide else 128) else 4
            return {
                "HEADS": heads, "BLOCK_Q": block_q, "BLOCK_N": block_n, "num_stages": stages,
                "num_warps": warps,
            }  # fmt: skip
    return None


def _blocks(
    groups: int,
    q_len: int,
    capacity: int,
    num_lists: int,
    block_d: int,
    element_size: int,
    shared: int,
) -> dict[str, int]:
    """Choose tiles that fit into `shared` bytes, and blocks of slots that fill the GPU.

    At D = 128 two programs fit on an SM: one multiplies while the other exponentiates.
    """
    for block_n, block_m, stages in _FLOAT32_TILES if element_size == 4 else _TILES:
        if (block_n + stages * block_m) * block_d * element_size <= shared:
            break
    q_pow2 = next_power_of_2(max(q_len, 1))
    block_m = min(block_m, max(16, q_pow2 * next_power_of_2(groups)))
    tile_q = min(block_m, q_pow2)
    heads = block_m // tile_q
    num_tiles = cdiv(groups, heads) * cdiv(q_len, tile_q)
    # Programs of old slots run longest: one round would end unevenly.
    least = min(block_n, 64)
    while block_n > least and num_lists * cdiv(capacity, block_n) < 4 * _TARGET_PROGRAMS:
        block_n //= 2
    blocks = {"BLOCK_N": block_n, "TILE_Q": tile_q, "HEADS": heads}
    many = element_size == 4 and block_n * block_m > 512
    stages = max(1, min(stages, num_tiles))
    return blocks | {"num_stages": stages, "num_warps": 8 if many else 4}


def attention_mass(
    query: Tensor,
    keys: Tensor,
    position: Tensor,
    length: Tensor,
    seen: Tensor,
    lse: Tensor,
    score: Tensor,
    *,
    scale: float,
    decay: float = 0.0,
    num_new: int = 0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    list_start: Tensor | None = None,
) -> None:
    """Add the attention that every live slot receives to its score.

    `score = decay * score + sum of exp(logit - lse)`, over the G query heads of the KV head and the
    queries that see the slot. Query i is at column `seen[b, h] - Q + i`. It sees slot s iff
    `s < length` and `0 <= position <= column` and, with a window,
    `position > column - sliding_window`. Queries with `lse == -inf` add nothing. The tokens of the
    queries are the last live slots of a list.

    Args:
        query: `[B, H_q, Q, D]`, float32/float16/bfloat16, finite, last stride 1. Query heads
            `[h * G, (h + 1) * G)` share KV head h, where `G = H_q / H_kv`.
        keys: `[B, H_kv, C, D]`, as `query`.
        position: `[B, H_kv or 1, C]` int32.
        length: `[B, H_kv or 1]` int32.
        seen: `[B, H_kv or 1]` int32, the tokens of `query` included.
        lse: `[B, H_q, Q]` float32, log of the softmax denominators.
        score: `[B, H_kv, C]` float32. Changed in place where slots are live.
        scale: Factor on the logits.
        decay: Factor on the old score. 0: the old score is not read.
        num_new: Newest columns whose slots enter with a score of 0, whatever is stored there.
        sliding_window: Columns that a query sees, its own included. None: all.
        softcap: Logits become `softcap * tanh(logits / softcap)`, after `scale`. None: unchanged.
        list_start: `[B, H_kv]` int32 contiguous, first slot of each list where those of a row share
            C slots (and `keys`, ... are expanded over H_kv). None: each has C slots of its own.

    Raises:
        ValueError: Shapes, dtypes, devices or strides disagree, or an input requires grad.
    """
    batch_size, num_heads, q_len, head_dim = query.shape
    num_kv_heads, capacity = keys.shape[1], keys.shape[2]
    position, length, seen = per_head(num_heads, num_kv_heads, position, length, seen)
    lists, dtype, int32 = (batch_size, num_kv_heads), query.dtype, torch.int32
    check_arguments(
        query=(query, (batch_size, num_heads, q_len, head_dim), dtype),
        keys=(keys, (*lists, capacity, head_dim), dtype),
        position=(position, (*lists, capacity), int32),
        length=(length, lists, int32),
        seen=(seen, lists, int32),
        lse=(lse, (batch_size, num_heads, q_len), torch.float32),
        score=(score, (*lists, capacity), torch.float32),
        list_start=(list_start, lists, int32),
    )
    if score.numel() == 0 or num_heads == 0:
        return

    num_lists, groups = batch_size * num_kv_heads, num_heads // num_kv_heads
    block_d = max(16, next_power_of_2(head_dim))
    shared = shared_bytes(query.device)
    tensors = (
        query, keys, position, length, seen, lse, score, starts(list_start, length)
    )  # fmt: skip
    strides = (
        *query.stride()[:3], *keys.stride()[:3], *position.stride(), *length.stride(),
        *seen.stride(), *lse.stride(), *score.stride(),
    )  # fmt: skip
    options = {
        "D": head_dim,
        "HAS_DECAY": decay != 0,
        "HAS_WINDOW": sliding_window is not None,
        "HAS_SOFTCAP": softcap is not None,
        "HAS_LIST_START": list_start is not None,
        "UPCAST": INTERPRETED and dtype == torch.bfloat16,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "BLOCK_D": block_d,
        **launch_options(query.device),
    }
    numbers = (float(scale), float(decay), num_new, sliding_window or 0, float(softcap or 1.0))
    window = _window_blocks(groups, q_len, block_d, query.element_size(), shared)
    with torch.cuda.device_of(query):
        if window is not None:
            num_splits = splits(num_lists, cdiv(capacity, window["BLOCK_N"]))
            _window_mass_kernel[(num_lists, num_splits)](
                *tensors, *strides, num_kv_heads, groups, q_len, *numbers,
                **options, **window,
            )  # fmt: skip
            return
        blocks = _blocks(groups, q_len, capacity, num_lists, block_d, query.element_size(), shared)
        num_blocks = cdiv(capacity, blocks["BLOCK_N"])
        _attention_mass_kernel[(num_blocks * num_lists,)](
            *tensors, *strides, num_lists, num_kv_heads, q_len, *numbers,
            GROUPS=groups, **options, **blocks,
        )  # fmt: skip
