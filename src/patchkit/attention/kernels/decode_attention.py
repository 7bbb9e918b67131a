"""Triton split-K attention of a few queries over a KV store; see `reference.decode_attention`.

Bytes floor: `B * H_kv * live * (D + D_v)` elements, every visible slot's key and value once, plus
4 bytes of position (and 4 of slot list) per slot. All queries and heads of a group share one read:
they are the M rows of the products. Tiles of a list are dealt out to the splits in turn, so that
the work is even at any `length` although the grid depends on the capacity only. Partial results
cost `8 * B * H_q * Q * splits * D_v` bytes.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkit.attention.kernels import check_arguments, first_slot, per_head, shared_bytes, starts
from patchkit.dependent_launch import launch_options, wait_for_previous
from patchkit.direct_launch import direct
from patchkit.launch_sizes import cdiv, next_power_of_2

__all__ = ["decode_attention"]

_TARGET_PROGRAMS = 256  # two on nearly every SM of a Hopper GPU
_MAX_ROWS = 128
_SPARE_BYTES = 27 * 1024  # of shared memory, for what a tile is copied through
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# The interpreter keeps bfloat16 as uint16 and would multiply the bit patterns.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def tanh(x):
    # Off by a rounding unit of 1 near 0, where a logit may be: softmax sees differences only.
    return 2 / (1 + tl.exp(-2 * x)) - 1


@triton.jit
def log_sum(top, weight_sum):
    # ln(2**top * weight_sum); -inf where nothing was summed, and never a logarithm of 0.
    return tl.where(weight_sum > 0, (top + tl.log2(tl.maximum(weight_sum, 1e-30))) * LN_2, top)


@direct
@triton.jit
def _decode_attention_kernel(
    query_ptr, keys_ptr, values_ptr, position_ptr, length_ptr, seen_ptr,
    indices_ptr, index_count_ptr, list_start_ptr, partial_ptr, stats_ptr,
    stride_qb, stride_qh, stride_qi, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_pb, stride_ph, stride_ps,
    stride_lb, stride_lh, stride_sb, stride_sh,
    stride_ib, stride_ih, stride_in, stride_cb, stride_ch,
    num_kv_heads, num_indices, scale, sliding_window, softcap,
    Q: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_INDICES: tl.constexpr,
    HAS_LIST_START: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    # One program: all query rows of one KV head, every num_splits-th tile of its slots.
    wait_for_previous(EARLY)
    pid = tl.program_id(0)
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    b = (pid // num_kv_heads).to(tl.int64)
    h = (pid % num_kv_heads).to(tl.int64)
    length = tl.load(length_ptr + b * stride_lb + h * stride_lh)
    total = length
    if HAS_INDICES:
        total = tl.minimum(tl.load(index_count_ptr + b * stride_cb + h * stride_ch), num_indices)
        indices_ptr += b * stride_ib + h * stride_ih
    num_tiles = tl.cdiv(total, BLOCK_N)

    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < ROWS
    out_row = (pid.to(tl.int64) * num_splits + split) * ROWS + offs_m
    if split >= num_tiles:
        tl.store(stats_ptr + out_row * 2, float("-inf"), mask=mask_m)
        return

    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    offs_dv = tl.arange(0, BLOCK_DV)
    mask_dv = offs_dv < D_V
    head = h * (ROWS // Q) + offs_m // Q
    offs_q = b * stride_qb + head * stride_qh + (offs_m % Q) * stride_qi
    mask_q = mask_m[:, None] & mask_d[None, :]  # [BLOCK_M, BLOCK_D]
    q = tl.load(query_ptr + offs_q[:, None] + offs_d[None, :], mask=mask_q, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    newest = tl.load(seen_ptr + b * stride_sb + h * stride_sh) - 1
    column = newest - (Q - 1) + offs_m % Q  # [BLOCK_M]
    list_start = first_slot(list_start_ptr, pid, HAS_LIST_START)
    keys_ptr += b * stride_kb + h * stride_kh + list_start * stride_ks
    values_ptr += b * stride_vb + h * stride_vh + list_start * stride_vs
    position_ptr += b * stride_pb + h * stride_ph + list_start * stride_ps

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    for tile in range(split, num_tiles, num_splits):
        offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < total
        if HAS_INDICES:
            slot = tl.load(indices_ptr + offs_n.to(tl.int64) * stride_in, mask=mask_n, other=-1)
            mask_n = (slot >= 0) & (slot < length)
            slot = slot.to(tl.int64)
        else:
            slot = offs_n.to(tl.int64)
        if Q > 1 or HAS_WINDOW:  # else every live slot is visible
            position = tl.load(position_ptr + slot * stride_ps, mask=mask_n, other=-1)  # [BLOCK_N]
        if HAS_WINDOW:  # slots that no query sees any more are not read
            mask_n = mask_n & (position > newest - (Q - 1) - sliding_window)
        k_ptr = keys_ptr + slot[None, :] * stride_ks + offs_d[:, None]  # [BLOCK_D, BLOCK_N]
        k = tl.load(k_ptr, mask=mask_n[None, :] & mask_d[:, None], other=0.0)
        v_ptr = values_ptr + slot[:, None] * stride_vs + offs_dv[None, :]  # [BLOCK_N, BLOCK_DV]
        v = tl.load(v_ptr, mask=mask_n[:, None] & mask_dv[None, :], other=0.0)
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        logits = tl.dot(q, k, input_precision=PRECISION) * scale
        if HAS_SOFTCAP:
            logits = softcap * tanh(logits / softcap)
        visible = mask_n[None, :]
        if Q > 1:
            visible = visible & (position[None, :] <= column[:, None])
        if HAS_WINDOW:
            visible = visible & (position[None, :] > column[:, None] - sliding_window)
        logits = tl.where(visible, logits * LOG2_E, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        decay = tl.exp2(top - finite_top)
        weights = tl.exp2(logits - finite_top[:, None])  # [BLOCK_M, BLOCK_N]
        weight_sum = weight_sum * decay + tl.sum(weights, axis=1)
        p = weights.to(values_ptr.dtype.element_ty).to(v.dtype)
        acc = tl.dot(p, v, acc * decay[:, None], input_precision=PRECISION)
        top = new_top

    tl.store(stats_ptr + out_row * 2, top, mask=mask_m)
    tl.store(stats_ptr + out_row * 2 + 1, weight_sum, mask=mask_m)
    mask = mask_m[:, None] & mask_dv[None, :]
    tl.store(partial_ptr + out_row[:, None] * D_V + offs_dv[None, :], acc, mask=mask)


@direct
@triton.jit
def _merge_kernel(
    partial_ptr, stats_ptr, sinks_ptr, out_ptr, lse_ptr,
    stride_sink, num_kv_heads, num_splits,
    Q: tl.constexpr, ROWS: tl.constexpr, D_V: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_LSE: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    # One program: one query row, all its splits. Layout [lists, splits, ROWS, ..].
    wait_for_previous(EARLY)
    pid = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    b = pid // num_kv_heads
    head = (pid % num_kv_heads) * (ROWS // Q) + row // Q
    offs_dv = tl.arange(0, BLOCK_DV)
    mask_dv = offs_dv < D_V

    top, weight_sum = float("-inf"), 0.0
    if HAS_SINKS:
        top = tl.load(sinks_ptr + head * stride_sink).to(tl.float32) * LOG2_E
        weight_sum = tl.where(top == float("-inf"), 0.0, 1.0)
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    for start in range(0, num_splits, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        source = (pid * num_splits + offs_s) * ROWS + row  # [BLOCK_S]
        split_top = tl.load(stats_ptr + source * 2, mask=offs_s < num_splits, other=float("-inf"))
        # Splits without a visible slot have written nothing else.
        mask_s = split_top > float("-inf")
        split_sum = tl.load(stats_ptr + source * 2 + 1, mask=mask_s, other=0.0)
        mask = mask_s[:, None] & mask_dv[None, :]  # [BLOCK_S, BLOCK_DV]
        rows_ptr = partial_ptr + source[:, None] * D_V + offs_dv[None, :]
        partial = tl.load(rows_ptr, mask=mask, other=0.0)
        new_top = tl.maximum(top, tl.max(split_top, axis=0))
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        decay = tl.exp2(top - finite_top)
        share = tl.exp2(split_top - finite_top)
        weight_sum = weight_sum * decay + tl.sum(share * split_sum, axis=0)
        acc = acc * decay + tl.sum(share[:, None] * partial, axis=0)
        top = new_top
    if HAS_LSE:
        tl.store(lse_ptr + pid * ROWS + row, log_sum(top, weight_sum))
    acc = acc / tl.where(weight_sum > 0, weight_sum, 1.0)
    out_ptr += ((b * Q + row % Q) * num_kv_heads * (ROWS // Q) + head) * D_V
    tl.store(out_ptr + offs_dv, acc.to(out_ptr.dtype.element_ty), mask=mask_dv)


def _blocks(
    block_dims: int, block_m: int, element_size: int, many: bool, shared: int
) -> dict[str, int]:
    """Choose BLOCK_N, warps and pipeline depth so that the tiles fit into `shared` bytes.

    Where lists are `many`, other programs on the same SM hide a load as well as a deep pipeline.
    """
    for block_n, stages in ((64, 2 if many else 3), (64, 2), (32, 2), (32, 1), (16, 1)):
        tiles = block_n * (block_dims * stages + block_m) + block_m * block_dims
        if tiles * element_size <= shared - _SPARE_BYTES:
            break
    warps = 2 if block_m <= 16 else 4 if block_m <= 32 else 8
    return {"BLOCK_N": block_n, "num_stages": stages, "num_warps": warps}


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    length: Tensor,
    seen: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    indices: Tensor | None = None,
    index_count: Tensor | None = None,
    list_start: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Attend with a few queries per sequence to the live slots of a KV store.

    Query i is at column `seen[b, h] - Q + i`. It sees slot s iff `s < length` and
    `0 <= position <= column` and, with a window, `position > column - sliding_window`. A query
    that sees nothing returns zeros.

    Args:
        query: `[B, H_q, Q, D]`, float32/float16/bfloat16, last stride 1. Query heads
            `[h * G, (h + 1) * G)` share KV head h, where `G = H_q / H_kv` and `G * Q <= 128`.
        keys: `[B, H_kv, C, D]`, as `query`.
        values: `[B, H_kv, C, D_v]`, as `query`.
        position: `[B, H_kv or 1, C]` int32.
        length: `[B, H_kv or 1]` int32.
        seen: `[B, H_kv or 1]` int32, the tokens of `query` included.
        scale: Factor on the logits.
        sliding_window: Columns that a query sees, its own included. None: all.
        softcap: Logits become `softcap * tanh(logits / softcap)`, after `scale`. None: unchanged.
        sinks: `[H_q]`, any float dtype. One more logit per query head, in the denominator only.
        indices: `[B, H_kv, N]` int32. Attend to these slots only; no duplicates.
        index_count: `[B, H_kv]` int32. Entries of `indices` in use; those behind are ignored.
        list_start: `[B, H_kv]` int32 contiguous, first slot of each list where those of a row share
            C slots (and `keys`, ... are expanded over H_kv). None: each has C slots of its own.
        out: `[B, Q, H_q, D_v]` contiguous, as `query`. Written and returned if given.
        lse: `[B, H_q, Q]` float32 contiguous. Written if given: the natural log of the softmax
            denominator, -inf where a query sees nothing and has no sink.

    Returns:
        `[B, Q, H_q, D_v]`, contiguous, in the dtype of `query`.

    Raises:
        ValueError: Shapes, dtypes, devices or strides disagree, an input requires grad, or only
            one of `indices` and `index_count` is given.

    Source: FlashDecoding (Dao et al., 2023). Differs: tiles are dealt out to splits in turn.
    """
    batch_size, num_heads, q_len, head_dim = query.shape
    num_kv_heads, capacity, value_dim = keys.shape[1], keys.shape[2], values.shape[-1]
    if out is None:
        out = query.new_empty(batch_size, q_len, num_heads, value_dim)
    if (indices is None) != (index_count is None):
        raise ValueError("expected both of indices and index_count or neither, got one")
    num_lists, rows = batch_size * num_kv_heads, num_heads // num_kv_heads * q_len
    if rows > _MAX_ROWS:
        raise ValueError(f"expected at most {_MAX_ROWS} query rows (H_q / H_kv * Q), got {rows}")
    num_indices = 0 if indices is None else indices.shape[-1]
    position, length, seen = per_head(num_heads, num_kv_heads, position, length, seen)
    lists, dtype, int32 = (batch_size, num_kv_heads), query.dtype, torch.int32
    check_arguments(
        query=(query, (batch_size, num_heads, q_len, head_dim), dtype),
        keys=(keys, (*lists, capacity, head_dim), dtype),
        values=(values, (*lists, capacity, value_dim), dtype),
        position=(position, (*lists, capacity), int32),
        length=(length, lists, int32),
        seen=(seen, lists, int32),
        sinks=(sinks, (num_heads,), dtype if sinks is None else sinks.dtype),
        indices=(indices, (*lists, num_indices), int32),
        index_count=(index_count, lists, int32),
        list_start=(list_start, lists, int32),
        out=(out, (batch_size, q_len, num_heads, value_dim), dtype),
        lse=(lse, (batch_size, num_heads, q_len), torch.float32),
    )
    if not out.is_contiguous():
        raise ValueError(f"out: expected a contiguous tensor, got strides {out.stride()}")
    if lse is not None and not lse.is_contiguous():
        raise ValueError(f"lse: expected a contiguous tensor, got strides {lse.stride()}")
    if out.numel() == 0:
        return out

    block_m = max(16, next_power_of_2(rows))
    block_d = max(16, next_power_of_2(head_dim))
    block_dv = max(16, next_power_of_2(value_dim))
    many = num_lists > _TARGET_PROGRAMS // 2
    shared = shared_bytes(query.device)
    blocks = _blocks(block_d + block_dv, block_m, query.element_size(), many, shared)
    # From shapes only, so that the grid can be captured: fill the GPU, at least one tile each.
    num_tiles = cdiv(capacity if indices is None else num_indices, blocks["BLOCK_N"])
    num_splits = max(1, min(num_tiles, cdiv(_TARGET_PROGRAMS, num_lists)))
    partial = query.new_empty((num_lists, num_splits, rows, value_dim), dtype=torch.float32)
    stats = query.new_empty((num_lists, num_splits, rows, 2), dtype=torch.float32)
    early = launch_options(query.device, batch_size * q_len)
    with torch.cuda.device_of(query):
        _decode_attention_kernel[(num_lists, num_splits)](
            query, keys, values, position, length, seen,
            length if indices is None else indices,
            length if index_count is None else index_count,
            starts(list_start, length), partial, stats,
            *query.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
            *position.stride(), *length.stride(), *seen.stride(),
            *((0, 0, 0) if indices is None else indices.stride()),
            *((0, 0) if index_count is None else index_count.stride()),
            num_kv_heads, num_indices, float(scale), sliding_window or 0, float(softcap or 1.0),
            Q=q_len, ROWS=rows, D=head_dim, D_V=value_dim,
            HAS_WINDOW=sliding_window is not None, HAS_SOFTCAP=softcap is not None,
            HAS_INDICES=indices is not None, HAS_LIST_START=list_start is not None,
            UPCAST=INTERPRETED and dtype == torch.bfloat16,
            PRECISION="ieee" if dtype == torch.float32 else "tf32",
            BLOCK_M=block_m, BLOCK_D=block_d, BLOCK_DV=block_dv, **early, **blocks,
        )  # fmt: skip
        _merge_kernel[(num_lists, rows)](
            partial, stats, stats if sinks is None else sinks, out, stats if lse is None else lse,
            0 if sinks is None else sinks.stride(0), num_kv_heads, num_splits,
            Q=q_len, ROWS=rows, D_V=value_dim, HAS_SINKS=sinks is not None,
            HAS_LSE=lse is not None, BLOCK_DV=block_dv, num_warps=4, **early,
            BLOCK_S=max(2, min(next_power_of_2(num_splits), 32)),
        )  # fmt: skip
    return out
