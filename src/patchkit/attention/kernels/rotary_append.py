"""Triton kernel between projections and attention of a step; see `reference.rotary_append`.

Bytes floor: queries, keys and values read once and written once, keys twice; 4 bytes of positions
per key and a row of cos and sin. All that is a few kilobytes, so what counts is being one launch
and not four, and that a program has its loads under way at once.

With the functions that `rms_norm` and `rotary` compute with it gives their bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkit.attention.kernels import first_slot
from patchkit.attention.reference.step import rotary_append_fits
from patchkit.decoding.kernels.rms_norm import inverse_rms, num_warps, weighted
from patchkit.decoding.kernels.rotary import angles, turn
from patchkit.decoding.reference import Table, rotated_elements
from patchkit.dependent_launch import launch_options, wait_for_previous
from patchkit.direct_launch import direct
from patchkit.launch_sizes import next_power_of_2

__all__ = ["rotary_append"]


@triton.jit
def _elements(
    x_ptr,
    weight_ptr,
    normed_ptr,
    offs,
    mask,
    inverse,
    offset,
    HAS_NORM: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
):
    # Some elements of a head, in its dtype, normalised if there is a norm.
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    if HAS_NORM:
        weight = tl.load(weight_ptr + offs, mask=mask, other=0.0)
        x = weighted(x.to(tl.float32), inverse, weight, offset, x.dtype, ROUND_FIRST)
        tl.store(normed_ptr + offs, x, mask=mask)
    return x


@triton.jit
def _rotate_head(
    x_ptr,
    weight_ptr,
    normed_ptr,
    out_ptr,
    slot_ptr,
    cos_1,
    sin_1,
    cos_2,
    sin_2,
    eps,
    offset,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    STORED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Rotate one head of one token into `out_ptr`, and if STORED into `slot_ptr` too."""
    inverse = 1.0
    if HAS_NORM:
        offs_d = tl.arange(0, BLOCK_D)  # the elements in the order in which `rms_norm` sums
        x = tl.load(x_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
        inverse = inverse_rms(x, eps, D)
    offs_p = tl.arange(0, BLOCK_P)
    mask = offs_p < PAIRS
    first = 2 * offs_p if INTERLEAVED else offs_p
    second = first + (1 if INTERLEAVED else PAIRS)
    x_1 = _elements(
        x_ptr, weight_ptr, normed_ptr, first, mask, inverse, offset, HAS_NORM, ROUND_FIRST
    )
    x_2 = _elements(
        x_ptr, weight_ptr, normed_ptr, second, mask, inverse, offset, HAS_NORM, ROUND_FIRST
    )
    x_1, x_2 = x_1.to(tl.float32), x_2.to(tl.float32)
    out_1, out_2 = turn(x_1, x_2, cos_1, sin_1, cos_2, sin_2, out_ptr.dtype.element_ty, WIDE)
    tl.store(out_ptr + first, out_1, mask=mask)
    tl.store(out_ptr + second, out_2, mask=mask)
    if STORED:
        tl.store(slot_ptr + first, out_1, mask=mask)
        tl.store(slot_ptr + second, out_2, mask=mask)
    if 2 * PAIRS < D:
        offs_d = 2 * PAIRS + tl.arange(0, BLOCK_REST)
        mask = offs_d < D
        rest = _elements(
            x_ptr, weight_ptr, normed_ptr, offs_d, mask, inverse, offset, HAS_NORM, ROUND_FIRST
        )
        tl.store(out_ptr + offs_d, rest, mask=mask)
        if STORED:
            tl.store(slot_ptr + offs_d, rest, mask=mask)


@direct
@triton.jit
def _rotary_append_kernel(
    keys_ptr,
    values_ptr,
    position_ptr,
    length_ptr,
    seen_ptr,
    list_start_ptr,
    q_ptr,
    k_ptr,
    new_values_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_normed_ptr,
    k_normed_ptr,
    capacity,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_vb,
    stride_vh,
    stride_cb,
    eps,
    offset,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FULL: tl.constexpr,
    WIDE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    HAS_LIST_START: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    # One program: a head of keys with its list, which no other program reads, or one of queries.
    wait_for_previous(EARLY)
    b = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    offs_p = tl.arange(0, BLOCK_P)
    cos_1, sin_1, cos_2, sin_2 = angles(
        cos_ptr + b * stride_cb, sin_ptr + b * stride_cb, 1, 1, offs_p, PAIRS, INTERLEAVED, FULL
    )
    if head < K_HEADS:
        number = b * K_HEADS + head
        length = tl.load(length_ptr + number)
        seen = tl.load(seen_ptr + number)
        begin = first_slot(list_start_ptr, number, HAS_LIST_START)
        slot = (b if HAS_LIST_START else number) * capacity + begin + length
        offs_v = tl.arange(0, BLOCK_V)
        mask_v = offs_v < D_V
        new_values_ptr += b * stride_vb + head * stride_vh
        value = tl.load(new_values_ptr + offs_v, mask=mask_v)
        _rotate_head(
            k_ptr + b * stride_kb + head * stride_kh, k_weight_ptr, k_normed_ptr + number * D,
            k_out_ptr + number * D, keys_ptr + slot * D,
            cos_1, sin_1, cos_2, sin_2, eps, offset,
            D, PAIRS, INTERLEAVED, WIDE, HAS_NORM, ROUND_FIRST, True, BLOCK_D, BLOCK_P, BLOCK_REST,
        )  # fmt: skip
        tl.store(values_ptr + slot * D_V + offs_v, value, mask=mask_v)
        tl.store(position_ptr + slot, seen)
        # Every warp loads the counters; none may load them after the first one stored.
        tl.debug_barrier()
        tl.store(length_ptr + number, length + 1)
        tl.store(seen_ptr + number, seen + 1)
    else:
        head -= K_HEADS
        out = (b * Q_HEADS + head) * D
        _rotate_head(
            q_ptr + b * stride_qb + head * stride_qh, q_weight_ptr, q_normed_ptr + out,
            q_out_ptr + out, q_out_ptr,
            cos_1, sin_1, cos_2, sin_2, eps, offset,
            D, PAIRS, INTERLEAVED, WIDE, HAS_NORM, ROUND_FIRST, False, BLOCK_D, BLOCK_P, BLOCK_REST,
        )  # fmt: skip


def rotary_append(
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    length: Tensor,
    seen: Tensor,
    q: Tensor,
    k: Tensor,
    new_values: Tensor,
    cos: Tensor,
    sin: Tensor,
    outs: Sequence[Tensor],
    list_start: Tensor | None = None,
    weights: Sequence[Tensor] | None = None,
    normed: Sequence[Tensor] | None = None,
    *,
    interleaved: bool = False,
    table: Table = "full",
    wide: bool = False,
    eps: float = 0.0,
    offset: float = 0.0,
    round_first: bool = False,
) -> None:
    """Rotate queries and keys of one token per row, and append the keys and their values.

    It rounds where `rms_norm` and `rotary` do, to the same bits, and as with `append` the caller
    guarantees the capacity.

    Args:
        keys: `[B, H, C, D]`, float32/float16/bfloat16. This and the next four as in `append`.
        values: `[B, H, C, D_v]`, as `keys`.
        position: `[B, H, C]` int32.
        length: `[B, H]` int32.
        seen: `[B, H]` int32.
        q: `[B, H_q, 1, D]`, as `keys`, last stride 1; read in place.
        k: `[B, H, 1, D]`, as `q`.
        new_values: `[B, H, 1, D_v]`, as `q`.
        cos: `[B or 1, 1, W]`, as `keys` or float32, last stride 1.
        sin: As `cos`, with the same strides.
        outs: As `q` and as `k`, contiguous. Written: what is rotated.
        list_start: `[B, H]` int32, as in `append`.
        weights: For queries and for keys `[D]`, as `keys`. None: no norm.
        normed: As `outs`. Written: what is normalised. Given exactly if `weights` are.
        interleaved: This and the next two as in `rotary`.
        table: See there.
        wide: See there.
        eps: This and the next two as in `rms_norm`, for both.
        offset: See there.
        round_first: See there.

    Raises:
        ValueError: Shapes, dtypes, devices or layouts are others, see `rotary_append_fits`.
    """
    held = (keys, values, position, length, seen, q, k, new_values, cos, sin)
    if not rotary_append_fits(*held, outs, list_start, weights, normed, table=table):
        raise ValueError(
            "expected a token per row and a store, both contiguous; got "
            + ", ".join(f"{x.dtype} {list(x.shape)} on {x.device} {x.stride()}" for x in held)
        )
    (batch_size, q_heads, _, dim), k_heads = q.shape, k.shape[1]
    pairs, value_dim = rotated_elements(cos, table) // 2, values.shape[3]
    if batch_size * k_heads == 0:
        return
    block_d = next_power_of_2(dim)
    with torch.cuda.device_of(q):
        _rotary_append_kernel[(batch_size, k_heads + q_heads)](
            keys,
            values,
            position,
            length,
            seen,
            length if list_start is None else list_start,
            q,
            k,
            new_values,
            cos,
            sin,
            *outs,
            *(outs if weights is None else weights),
            *(outs if normed is None else normed),
            keys.shape[2],
            *q.stride()[:2],
            *k.stride()[:2],
            *new_values.stride()[:2],
            0 if cos.shape[0] == 1 else cos.stride(0),
            float(eps),
            float(offset),
            Q_HEADS=q_heads,
            K_HEADS=k_heads,
            D=dim,
            D_V=value_dim,
            PAIRS=pairs,
            INTERLEAVED=interleaved,
            FULL=table == "full",
            WIDE=wide or cos.dtype != q.dtype,
            HAS_NORM=weights is not None,
            ROUND_FIRST=round_first,
            HAS_LIST_START=list_start is not None,
            **launch_options(q.device, batch_size),
            BLOCK_D=block_d,
            BLOCK_V=next_power_of_2(max(value_dim, 1)),
            BLOCK_P=next_power_of_2(max(pairs, 1)),
            BLOCK_REST=next_power_of_2(max(dim - 2 * pairs, 1)),
            num_warps=num_warps(block_d),
            enable_fp_fusion=False,  # a fused multiply-add would not round the product
        )
