"""Triton attention of a whole chunk of queries over a KV store; see `reference.prefill_attention`.

FLOP floor: `2 * (D + D_v)` for every visible pair of a query and a slot, and query head. A program
owns a block of queries of one head and walks over the slots they may see. Live slots come first and
a chunk is appended in order, so causality is a slot number: tiles in front of the block's first
query need no mask at all, and no mask tensor or repeated key exists anywhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkit.attention.kernels import check_arguments, per_head, shared_bytes
from patchkit.attention.kernels.decode_attention import INTERPRETED, LOG2_E, log_sum, tanh
from patchkit.direct_launch import direct
from patchkit.launch_sizes import cdiv, next_power_of_2

__all__ = ["prefill_attention"]


_WIDE = ((128, 128, 3), (128, 64, 2), (64, 64, 2))  # BLOCK_M, BLOCK_N, pipeline depth
_NARROW = ((64, 64, 1), (64, 32, 1), (32, 32, 1), (16, 16, 1))


@triton.jit
def _attend_tile(
    start, q, top, weight_sum, acc, keys_ptr, values_ptr, position_ptr,
    stride_ks, stride_vs, stride_ps, end, length, column, scale, sliding_window, softcap,
    D: tl.constexpr, D_V: tl.constexpr, MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    # One online-softmax step over the slots [start, start + BLOCK_N).
    slot = start + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    k_ptr = keys_ptr + slot.to(tl.int64)[None, :] * stride_ks + offs_d[:, None]
    v_ptr = values_ptr + slot.to(tl.int64)[:, None] * stride_vs + offs_dv[None, :]
    live = slot < length
    if MASKED:
        k = tl.load(k_ptr, mask=live[None, :] & (offs_d < D)[:, None], other=0.0)
        v = tl.load(v_ptr, mask=live[:, None] & (offs_dv < D_V)[None, :], other=0.0)
    else:
        if D == BLOCK_D:
            k = tl.load(k_ptr)  # [BLOCK_D, BLOCK_N]
        else:
            k = tl.load(k_ptr, mask=(offs_d < D)[:, None], other=0.0)
        if D_V == BLOCK_DV:
            v = tl.load(v_ptr)  # [BLOCK_N, BLOCK_DV]
        else:
            v = tl.load(v_ptr, mask=(offs_dv < D_V)[None, :], other=0.0)
    if UPCAST:
        k, v = k.to(tl.float32), v.to(tl.float32)
    logits = tl.dot(q, k, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if HAS_SOFTCAP:
        logits = softcap * tanh(logits * (scale / softcap))
        factor = LOG2_E
    else:
        factor = scale * LOG2_E
    if MASKED:
        visible = slot[None, :] < end[:, None]
        if HAS_WINDOW:
            position = tl.load(position_ptr + slot.to(tl.int64) * stride_ps, mask=live, other=-1)
            visible = visible & (position[None, :] > column[:, None] - sliding_window)
        logits = tl.where(visible, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, axis=1) * factor)
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
    else:
        new_top = tl.maximum(top, tl.max(logits, axis=1) * factor)
        finite_top = new_top
    weights = tl.exp2(logits * factor - finite_top[:, None])
    decay = tl.exp2(top - finite_top)
    weight_sum = weight_sum * decay + tl.sum(weights, axis=1)
    p = weights.to(values_ptr.dtype.element_ty).to(v.dtype)
    acc = tl.dot(p, v, acc * decay[:, None], input_precision=PRECISION)
    return new_top, weight_sum, acc


@direct
@triton.jit
def _prefill_attention_kernel(
    query_ptr, keys_ptr, values_ptr, position_ptr, length_ptr, seen_ptr, behind_ptr, sinks_ptr,
    out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qi, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_pb, stride_ph, stride_ps,
    stride_lb, stride_lh, stride_sb, stride_sh, stride_bb, stride_bi, stride_sink,
    num_heads, q_len, scale, sliding_window, softcap,
    GROUPS: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr,
    HAS_BEHIND: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_LSE: tl.constexpr, ORDERED: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    # The blocks of a head run side by side and share what they read. Later queries see more slots,
    # so their blocks start first.
    num_blocks = tl.cdiv(q_len, BLOCK_M)
    first = (num_blocks - 1 - tl.program_id(0) % num_blocks) * BLOCK_M
    row = tl.program_id(0) // num_blocks
    b = (row // num_heads).to(tl.int64)
    head = (row % num_heads).to(tl.int64)
    h = head // GROUPS
    length = tl.load(length_ptr + b * stride_lb + h * stride_lh)
    seen = tl.load(seen_ptr + b * stride_sb + h * stride_sh)
    keys_ptr += b * stride_kb + h * stride_kh
    values_ptr += b * stride_vb + h * stride_vh
    position_ptr += b * stride_pb + h * stride_ph

    offs_m = tl.minimum(first + tl.arange(0, BLOCK_M), q_len - 1)  # the last query repeats
    last = tl.minimum(first + BLOCK_M, q_len) - 1
    # A query sees the slots [0, end), those of the tokens behind it excepted.
    if HAS_BEHIND:
        behind_ptr += b * stride_bb
        end = length - tl.load(behind_ptr + offs_m * stride_bi)
        first_end = length - tl.load(behind_ptr + first * stride_bi)
        last_end = length - tl.load(behind_ptr + last * stride_bi)
    else:
        end = length - (q_len - 1) + offs_m
        first_end = length - (q_len - 1) + first
        last_end = length - (q_len - 1) + last
    column = seen - q_len + offs_m

    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    q_ptr = query_ptr + b * stride_qb + head * stride_qh
    q_ptr += offs_m.to(tl.int64)[:, None] * stride_qi + offs_d[None, :]
    q = tl.load(q_ptr, mask=(offs_d < D)[None, :], other=0.0)  # [BLOCK_M, BLOCK_D]
    if UPCAST:
        q = q.to(tl.float32)

    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head * stride_sink).to(tl.float32) * LOG2_E
        top = tl.zeros((BLOCK_M,), tl.float32) + sink
        weight_sum = tl.where(top == float("-inf"), 0.0, 1.0)
    else:
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        weight_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)

    # Three runs of tiles: at the far edge of the window, seen in full by all queries of the block,
    # and at their own slots.
    full_start = 0
    full_end = tl.maximum(first_end, 0) // BLOCK_N * BLOCK_N
    if HAS_WINDOW:
        full_start = full_end
        edge = 0
        if ORDERED:  # a window of columns holds at most as many of the newest slots
            edge = tl.maximum(first_end - sliding_window, 0) // BLOCK_N * BLOCK_N
            near = tl.cdiv(tl.maximum(last_end - sliding_window, 0), BLOCK_N) * BLOCK_N
            near_slot = tl.minimum(near, tl.maximum(length - 1, 0)).to(tl.int64)
            # Where padding left gaps, these slots may reach further back.
            if tl.load(position_ptr + near_slot * stride_ps) > seen - q_len + last - sliding_window:
                full_start = tl.minimum(near, full_end)
        for start in range(edge, full_start, BLOCK_N):
            top, weight_sum, acc = _attend_tile(
                start, q, top, weight_sum, acc, keys_ptr, values_ptr, position_ptr,
                stride_ks, stride_vs, stride_ps, end, length, column, scale, sliding_window,
                softcap, D, D_V, True, HAS_WINDOW, HAS_SOFTCAP, UPCAST, PRECISION,
                BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
    for start in range(full_start, full_end, BLOCK_N):
        top, weight_sum, acc = _attend_tile(
            start, q, top, weight_sum, acc, keys_ptr, values_ptr, position_ptr,
            stride_ks, stride_vs, stride_ps, end, length, column, scale, sliding_window,
            softcap, D, D_V, False, HAS_WINDOW, HAS_SOFTCAP, UPCAST, PRECISION,
            BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    for start in range(full_end, last_end, BLOCK_N):
        top, weight_sum, acc = _attend_tile(
            start, q, top, weight_sum, acc, keys_ptr, values_ptr, position_ptr,
            stride_ks, stride_vs, stride_ps, end, length, column, scale, sliding_window,
            softcap, D, D_V, True, HAS_WINDOW, HAS_SOFTCAP, UPCAST, PRECISION,
            BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip

    rows = first + tl.arange(0, BLOCK_M)
    if HAS_LSE:
        lse_ptr += (b * num_heads + head) * q_len
        tl.store(lse_ptr + rows, log_sum(top, weight_sum), mask=rows < q_len)
    acc = acc / tl.where(weight_sum > 0, weight_sum, 1.0)[:, None]
    out_ptr += ((b * q_len + rows[:, None]) * num_heads + head) * D_V + offs_dv[None, :]
    mask = (rows < q_len)[:, None] & (offs_dv < D_V)[None, :]
    tl.store(out_ptr, acc.to(out_ptr.dtype.element_ty), mask=mask)


def _blocks(block_d: int, block_dv: int, element_size: int, shared: int) -> dict[str, int]:
    """Choose the largest tiles that fit into `shared` bytes, best first (measured on Hopper)."""
    choices = _NARROW[1:] if element_size == 4 else _WIDE + _NARROW
    for block_m, block_n, stages in choices:
        tiles = block_m * block_d + stages * block_n * (block_d + block_dv)
        if tiles * element_size <= shared:
            break
    warps = 8 if block_m * block_d > 64 * 128 else 4
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}


def prefill_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    length: Tensor,
    seen: Tensor,
    *,
    scale: float,
    behind: Tensor | None = None,
    ordered: bool = False,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Attend from the chunk that was appended last to the live slots of a KV store.

    Query i is at column `seen[b, h] - Q + i`. It sees every live slot except those of the tokens
    behind it and, with a window, those with `position <= column - sliding_window`. A query that
    sees nothing returns zeros.

    Args:
        query: `[B, H_q, Q, D]`, float32/float16/bfloat16, last stride 1. Query heads
            `[h * G, (h + 1) * G)` share KV head h, where `G = H_q / H_kv`.
        keys: `[B, H_kv, C, D]`, as `query`. The tokens of the chunk are the last live slots, in
            order.
        values: `[B, H_kv, C, D_v]`, as `query`.
        position: `[B, H_kv or 1, C]` int32.
        length: `[B, H_kv or 1]` int32.
        seen: `[B, H_kv or 1]` int32, the chunk included.
        scale: Factor on the logits.
        behind: `[B, Q]` int32, stored tokens of the chunk behind each query. None: all were stored,
            so `Q - 1 - i`.
        ordered: Whether positions ascend with the slots; a window then skips what it cannot see.
        sliding_window: Columns that a query sees, its own included. None: all.
        softcap: Logits become `softcap * tanh(logits / softcap)`, after `scale`. None: unchanged.
        sinks: `[H_q]`, any float dtype. One more logit per query head, in the denominator only.
        out: `[B, Q, H_q, D_v]` contiguous, as `query`. Written and returned if given.
        lse: `[B, H_q, Q]` float32 contiguous. Written if given: the natural log of the softmax
            denominator, -inf where a query sees nothing and has no sink.

    Returns:
        `[B, Q, H_q, D_v]`, contiguous, in the dtype of `query`.

    Raises:
        ValueError: Shapes, dtypes, devices or strides disagree, or an input requires grad.

    Source: FlashAttention-2 (Dao, arXiv 2307.08691). Differs: runs over the slots of a store.
    """
    batch_size, num_heads, q_len, head_dim = query.shape
    num_kv_heads, capacity, value_dim = keys.shape[1], keys.shape[2], values.shape[-1]
    if out is None:
        out = query.new_empty(batch_size, q_len, num_heads, value_dim)
    position, length, seen = per_head(num_heads, num_kv_heads, position, length, seen)
    lists, dtype, int32 = (batch_size, num_kv_heads), query.dtype, torch.int32
    check_arguments(
        query=(query, (batch_size, num_heads, q_len, head_dim), dtype),
        keys=(keys, (*lists, capacity, head_dim), dtype),
        values=(values, (*lists, capacity, value_dim), dtype),
        position=(position, (*lists, capacity), int32),
        length=(length, lists, int32),
        seen=(seen, lists, int32),
        behind=(behind, (batch_size, q_len), int32),
        sinks=(sinks, (num_heads,), dtype if sinks is None else sinks.dtype),
        out=(out, (batch_size, q_len, num_heads, value_dim), dtype),
        lse=(lse, (batch_size, num_heads, q_len), torch.float32),
    )
    if not out.is_contiguous():
        raise ValueError(f"out: expected a contiguous tensor, got strides {out.stride()}")
    if lse is not None and not lse.is_contiguous():
        raise ValueError(f"lse: expected a contiguous tensor, got strides {lse.stride()}")
    if out.numel() == 0:
        return out

    block_d = max(16, next_power_of_2(head_dim))
    block_dv = max(16, next_power_of_2(value_dim))
    blocks = _blocks(block_d, block_dv, query.element_size(), shared_bytes(query.device))
    num_blocks = cdiv(q_len, blocks["BLOCK_M"])
    with torch.cuda.device_of(query):
        _prefill_attention_kernel[(num_blocks * batch_size * num_heads,)](
            query, keys, values, position, length, seen,
            length if behind is None else behind, length if sinks is None else sinks, out,
            out if lse is None else lse,
            *query.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
            *position.stride(), *length.stride(), *seen.stride(),
            *((0, 0) if behind is None else behind.stride()),
            0 if sinks is None else sinks.stride(0),
            num_heads, q_len, float(scale), sliding_window or 0, float(softcap or 1.0),
            GROUPS=num_heads // num_kv_heads, D=head_dim, D_V=value_dim,
            HAS_BEHIND=behind is not None, HAS_WINDOW=sliding_window is not None,
            HAS_SOFTCAP=softcap is not None, HAS_SINKS=sinks is not None, HAS_LSE=lse is not None,
            ORDERED=ordered, UPCAST=INTERPRETED and dtype == torch.bfloat16,
            PRECISION="ieee" if dtype == torch.float32 else "tf32",
            BLOCK_D=block_d, BLOCK_DV=block_dv, **blocks,
        )  # fmt: skip
    return out
