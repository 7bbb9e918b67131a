"""Triton split-K softmax denominators of some queries over a KV store; see `reference`.

Bytes floor: `B * H_kv * live * D` elements, every visible slot's key once, plus 4 bytes of position
per slot. This is `decode_attention` without values, for any number of query rows: blocks of rows
beyond the first read the same tiles at the same time, from the cache. Partial results cost
`4 * B * H_q * Q * splits` bytes.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkit.attention.kernels import check_arguments, per_head, shared_bytes
from patchkit.attention.kernels.decode_attention import INTERPRETED, LOG2_E, log_sum, tanh
from patchkit.direct_launch import direct
from patchkit.launch_sizes import cdiv, next_power_of_2

__all__ = ["attention_lse"]

# BLOCK_M, BLOCK_N, pipeline depth
_TILES = ((256, 64, 3), (128, 64, 3), (64, 64, 3), (64, 64, 1), (64, 32, 1), (16, 16, 1))
_TARGET_PROGRAMS = 264  # two on each SM: one multiplies while the other exponentiates
_MOST_ROUNDS = 4


@triton.jit
def plain_logits(
    a, b, scale, softcap, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    # Logits of all pairs of a row of `a` and a column of `b`; `log2_factor` is still missing.
    logits = tl.dot(a, b, input_precision=PRECISION)
    if HAS_SOFTCAP:
        return softcap * tanh(logits * (scale / softcap))
    else:
        return logits


@triton.jit
def log2_factor(scale, HAS_SOFTCAP: tl.constexpr):
    # Turns plain logits into exponents of 2.
    if HAS_SOFTCAP:
        return LOG2_E
    else:
        return scale * LOG2_E


@triton.jit
def log2_logits(
    a, b, scale, softcap, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    # Logits of all pairs of a row of `a` and a column of `b`, as exponents of 2.
    factor = log2_factor(scale, HAS_SOFTCAP)
    return plain_logits(a, b, scale, softcap, HAS_SOFTCAP, PRECISION) * factor


@triton.jit
def sees(position, column, sliding_window, HAS_WINDOW: tl.constexpr):
    # Whether a query at `column` sees a live slot with `position`.
    visible = (position >= 0) & (position <= column)
    if HAS_WINDOW:
        visible = visible & (position > column - sliding_window)
    return visible


@triton.jit
def first_masked_tile(length, q_len, HAS_WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    # Tiles before this one hold only slots older than all queries, which are the last live ones.
    if HAS_WINDOW:
        return 0
    else:
        return tl.maximum(length - q_len, 0) // BLOCK_N


@triton.jit
def _add_tile(top, weight_sum, logits, factor):
    # The factor is positive, so that only maxima need it by itself.
    new_top = tl.maximum(top, tl.max(logits, axis=1) * factor)
    finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(logits * factor - finite_top[:, None])  # [BLOCK_M, BLOCK_N]
    return new_top, weight_sum * tl.exp2(top - finite_top) + tl.sum(weights, axis=1)


@direct
@triton.jit(do_not_specialize=["num_kv_heads", "rows", "q_len", "sliding_window"])
def _attention_lse_kernel(
    query_ptr, keys_ptr, position_ptr, length_ptr, seen_ptr, partial_ptr,
    stride_qb, stride_qh, stride_qi, stride_kb, stride_kh, stride_ks,
    stride_pb, stride_ph, stride_ps, stride_lb, stride_lh, stride_sb, stride_sh,
    num_kv_heads, rows, q_len, scale, sliding_window, softcap,
    D: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # One program: BLOCK_M query rows of one KV head, every num_splits-th tile of its slots.
    num_row_blocks = tl.cdiv(rows, BLOCK_M)
    row_block = tl.program_id(0) % num_row_blocks
    pid = tl.program_id(0) // num_row_blocks
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    b = (pid // num_kv_heads).to(tl.int64)
    h = (pid % num_kv_heads).to(tl.int64)
    length = tl.load(length_ptr + b * stride_lb + h * stride_lh)
    newest = tl.load(seen_ptr + b * stride_sb + h * stride_sh) - 1
    keys_ptr += b * stride_kb + h * stride_kh
    position_ptr += b * stride_pb + h * stride_ph

    offs_m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(offs_m, rows - 1)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    head = h * (rows // q_len) + row // q_len
    offs_q = b * stride_qb + head * stride_qh + (row % q_len) * stride_qi
    q_ptr = query_ptr + offs_q[:, None] + offs_d[None, :]
    q = tl.load(q_ptr, mask=mask_d[None, :], other=0.0)  # [BLOCK_M, BLOCK_D]
    if UPCAST:
        q = q.to(tl.float32)
    column = newest - (q_len - 1) + row % q_len  # [BLOCK_M]

    factor = log2_factor(scale, HAS_SOFTCAP)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((BLOCK_M,), tl.float32)
    first = (split * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    k_ptr = keys_ptr + first[None, :] * stride_ks + offs_d[:, None]  # [BLOCK_D, BLOCK_N]
    k_step = num_splits.to(tl.int64) * BLOCK_N * stride_ks
    first_masked = first_masked_tile(length, q_len, HAS_WINDOW, BLOCK_N)
    for _ in range(split, first_masked, num_splits):
        k = tl.load(k_ptr) if D == BLOCK_D else tl.load(k_ptr, mask=mask_d[:, None], other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
        logits = plain_logits(q, k, scale, softcap, HAS_SOFTCAP, PRECISION)
        top, weight_sum = _add_tile(top, weight_sum, logits, factor)
        k_ptr += k_step
    passed = tl.cdiv(tl.maximum(first_masked - split, 0), num_splits)
    for tile in range(split + passed * num_splits, tl.cdiv(length, BLOCK_N), num_splits):
        slot = (tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask_n = slot < length
        position = tl.load(position_ptr + slot * stride_ps, mask=mask_n, other=-1)  # [BLOCK_N]
        if HAS_WINDOW:  # slots that no query sees any more are not read
            mask_n = mask_n & (position > newest - (q_len - 1) - sliding_window)
        k = tl.load(k_ptr, mask=mask_n[None, :] & mask_d[:, None], other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
        logits = plain_logits(q, k, scale, softcap, HAS_SOFTCAP, PRECISION)
        visible = sees(position[None, :], column[:, None], sliding_window, HAS_WINDOW)
        logits = tl.where(visible, logits, float("-inf"))
        top, weight_sum = _add_tile(top, weight_sum, logits, factor)
        k_ptr += k_step

    partial_ptr += (pid.to(tl.int64) * num_splits + split) * rows
    tl.store(partial_ptr + offs_m, log_sum(top, weight_sum), mask=offs_m < rows)


@direct
@triton.jit(do_not_specialize=["num_kv_heads", "rows", "q_len", "num_splits"])
def _merge_lse_kernel(
    partial_ptr, sinks_ptr, lse_ptr, stride_sink, num_kv_heads, rows, q_len,
    num_splits, HAS_SINKS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    # One program: BLOCK_M query rows, all their splits. Layout [lists, splits, rows].
    pid = tl.program_id(0).to(tl.int64)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < rows
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_SINKS:
        head = (pid % num_kv_heads) * (rows // q_len) + offs_m // q_len
        sink = tl.load(sinks_ptr + head * stride_sink, mask=mask_m, other=0.0)
        top = sink.to(tl.float32) * LOG2_E
        weight_sum = tl.where(top == float("-inf"), 0.0, 1.0)
    for start in range(0, num_splits, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        part_ptr = partial_ptr + (pid * num_splits + offs_s[:, None]) * rows + offs_m[None, :]
        mask = (offs_s < num_splits)[:, None] & mask_m[None, :]
        part = tl.load(part_ptr, mask=mask, other=float("-inf")) * LOG2_E  # [BLOCK_S, BLOCK_M]
        new_top = tl.maximum(top, tl.max(part, axis=0))
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        share = tl.exp2(part - finite_top[None, :])
        weight_sum = weight_sum * tl.exp2(top - finite_top) + tl.sum(share, axis=0)
        top = new_top
    tl.store(lse_ptr + pid * rows + offs_m, log_sum(top, weight_sum), mask=mask_m)


def _blocks(rows: int, block_d: int, element_size: int, shared: int) -> dict[str, int]:
    """Choose the largest tiles that fit into `shared` bytes, several query rows per read key.

    Triton 3.6 keeps a second copy of the queries for each of the two loops, 128 rows at a time.
    """
    for block_m, block_n, stages in _TILES[4:] if element_size == 4 else _TILES:
        block_m = min(block_m, max(16, next_power_of_2(rows)))
        held = block_m + 2 * min(block_m, 128) + stages * block_n  # rows
        if held * block_d * element_size <= shared:
            break
    warps = 8 if block_m * block_n > (512 if element_size == 4 else 64 * 64) else 4
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}


def splits(num_lists: int, num_tiles: int) -> int:
    """Choose how many programs share the tiles of a list; from shapes, so that it can be captured.

    Programs of one size end together if they fill the GPU a whole number of times. Few of them are
    better, unless a tenth of the last round would stay idle.
    """
    rounds = (r * _TARGET_PROGRAMS for r in range(1, _MOST_ROUNDS + 1))
    counts = [places // num_lists for places in rounds if places >= num_lists] or [1]

    def idle(count: int) -> float:
        used = count * num_lists / _TARGET_PROGRAMS
        return round(1 - used / math.ceil(used), 1)

    return max(1, min(num_tiles, min(counts, key=lambda count: (idle(count), count))))


def attention_lse(
    query: Tensor,
    keys: Tensor,
    position: Tensor,
    length: Tensor,
    seen: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return the log of the softmax denominator of every query, as `decode_attention` writes it.

    Query i is at column `seen[b, h] - Q + i`. It sees slot s iff `s < length` and
    `0 <= position <= column` and, with a window, `position > column - sliding_window`. The tokens
    of the queries are the last live slots of a list.

    Args:
        query: `[B, H_q, Q, D]`, float32/float16/bfloat16, last stride 1. Query heads
            `[h * G, (h + 1) * G)` share KV head h, where `G = H_q / H_kv`.
        keys: `[B, H_kv, C, D]`, as `query`.
        position: `[B, H_kv or 1, C]` int32.
        length: `[B, H_kv or 1]` int32.
        seen: `[B, H_kv or 1]` int32, the tokens of `query` included.
        scale: Factor on the logits, positive.
        sliding_window: Columns that a query sees, its own included. None: all.
        softcap: Logits become `softcap * tanh(logits / softcap)`, after `scale`. None: unchanged.
        sinks: `[H_q]`, any float dtype. One more logit per query head.

    Returns:
        `[B, H_q, Q]` float32, contiguous. -inf where a query sees nothing and has no sink.

    Raises:
        ValueError: Shapes, dtypes, devices or strides disagree, an input requires grad, or the
            scale is not positive.
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
        sinks=(sinks, (num_heads,), dtype if sinks is None else sinks.dtype),
    )
    if scale <= 0:
        raise ValueError(f"expected a positive scale, got {scale}")
    lse = query.new_empty((batch_size, num_heads, q_len), dtype=torch.float32)
    if lse.numel() == 0:
        return lse

    num_lists, rows = batch_size * num_kv_heads, num_heads // num_kv_heads * q_len
    block_d = max(16, next_power_of_2(head_dim))
    blocks = _blocks(rows, block_d, query.element_size(), shared_bytes(query.device))
    num_columns = num_lists * cdiv(rows, blocks["BLOCK_M"])
    num_splits = splits(num_columns, cdiv(capacity, blocks["BLOCK_N"]))
    partial = lse.new_empty((num_lists, num_splits, rows))
    with torch.cuda.device_of(query):
        _attention_lse_kernel[(num_columns, num_splits)](
            query, keys, position, length, seen, partial,
            *query.stride()[:3], *keys.stride()[:3],
            *position.stride(), *length.stride(), *seen.stride(),
            num_kv_heads, rows, q_len, float(scale), sliding_window or 0, float(softcap or 1.0),
            D=head_dim, HAS_WINDOW=sliding_window is not None, HAS_SOFTCAP=softcap is not None,
            UPCAST=INTERPRETED and dtype == torch.bfloat16,
            PRECISION="ieee" if dtype == torch.float32 else "tf32",
            BLOCK_D=block_d, **blocks,
        )  # fmt: skip
        _merge_lse_kernel[(num_lists, cdiv(rows, 32))](
            partial, partial if sinks is None else sinks, lse,
            0 if sinks is None else sinks.stride(0), num_kv_heads, rows, q_len, num_splits,
            HAS_SINKS=sinks is not None, BLOCK_S=32, BLOCK_M=32, num_warps=4,
        )  # fmt: skip
    return lse
