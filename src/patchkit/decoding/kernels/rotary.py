"""Triton rotary embedding of queries and keys in one launch; see `reference.rotary`.

Bytes floor: queries and keys read once and written once, a row of cos and sin read per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkit.decoding.reference import Table, rotary_fits, rotary_outs, rotated_elements
from patchkit.dependent_launch import launch_options, wait_for_previous
from patchkit.direct_launch import direct
from patchkit.launch_sizes import cdiv, next_power_of_2

__all__ = ["rotary"]

_PAIRS_AT_ONCE = 1024
_MANY_TOKENS = 1024  # as many programs keep a GPU busy


@triton.jit
def angles(
    cos_ptr,
    sin_ptr,
    stride_cw,
    stride_sw,
    offs_p,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FULL: tl.constexpr,
):
    # float32, of the first and the second element of every pair.
    mask = offs_p < PAIRS
    first = 2 * offs_p if INTERLEAVED and FULL else offs_p
    cos_1 = tl.load(cos_ptr + first * stride_cw, mask=mask, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin_ptr + first * stride_sw, mask=mask, other=0.0).to(tl.float32)
    cos_2, sin_2 = cos_1, sin_1
    if FULL:
        second = first + (1 if INTERLEAVED else PAIRS)
        cos_2 = tl.load(cos_ptr + second * stride_cw, mask=mask, other=0.0).to(tl.float32)
        sin_2 = tl.load(sin_ptr + second * stride_sw, mask=mask, other=0.0).to(tl.float32)
    return cos_1, sin_1, cos_2, sin_2


@triton.jit
def turn(x_1, x_2, cos_1, sin_1, cos_2, sin_2, dtype: tl.constexpr, WIDE: tl.constexpr):
    # Pairs in float32 to pairs in `dtype`, to which products are rounded too unless WIDE.
    rounded: tl.constexpr = tl.float32 if WIDE else dtype
    out_1 = (x_1 * cos_1).to(rounded).to(tl.float32) - (x_2 * sin_1).to(rounded).to(tl.float32)
    out_2 = (x_2 * cos_2).to(rounded).to(tl.float32) + (x_1 * sin_2).to(rounded).to(tl.float32)
    return out_1.to(dtype), out_2.to(dtype)


@triton.jit
def _rotate(
    x_ptr,
    out_ptr,
    stride_h,
    stride_oh,
    head,
    cos_1,
    sin_1,
    cos_2,
    sin_2,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Rotate a block of heads of one token."""
    offs_h = head + tl.arange(0, BLOCK_H)
    mask_h = offs_h < HEADS
    x_ptrs = x_ptr + offs_h.to(tl.int64)[:, None] * stride_h
    out_ptrs = out_ptr + offs_h.to(tl.int64)[:, None] * stride_oh
    offs_p = tl.arange(0, BLOCK_P)[None, :]
    mask = mask_h[:, None] & (offs_p < PAIRS)
    first = 2 * offs_p if INTERLEAVED else offs_p
    second = first + (1 if INTERLEAVED else PAIRS)

    x_1 = tl.load(x_ptrs + first, mask=mask, other=0.0).to(tl.float32)
    x_2 = tl.load(x_ptrs + second, mask=mask, other=0.0).to(tl.float32)
    out_1, out_2 = turn(x_1, x_2, cos_1, sin_1, cos_2, sin_2, out_ptr.dtype.element_ty, WIDE)
    tl.store(out_ptrs + first, out_1, mask=mask)
    tl.store(out_ptrs + second, out_2, mask=mask)

    if 2 * PAIRS < D:
        offs_d = 2 * PAIRS + tl.arange(0, BLOCK_REST)[None, :]
        mask = mask_h[:, None] & (offs_d < D)
        tl.store(out_ptrs + offs_d, tl.load(x_ptrs + offs_d, mask=mask), mask=mask)


@direct
@triton.jit
def _rotary_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_cb,
    stride_cs,
    stride_cw,
    stride_sb,
    stride_ss,
    stride_sw,
    stride_qob,
    stride_qoh,
    stride_qos,
    stride_kob,
    stride_koh,
    stride_kos,
    num_tokens,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FULL: tl.constexpr,
    WIDE: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    wait_for_previous(EARLY)
    b = (tl.program_id(0) // num_tokens).to(tl.int64)
    s = (tl.program_id(0) % num_tokens).to(tl.int64)
    q_ptr += b * stride_qb + s * stride_qs
    k_ptr += b * stride_kb + s * stride_ks
    q_out_ptr += b * stride_qob + s * stride_qos
    k_out_ptr += b * stride_kob + s * stride_kos
    cos_ptr += b * stride_cb + s * stride_cs
    sin_ptr += b * stride_sb + s * stride_ss

    offs_p = tl.arange(0, BLOCK_P)[None, :]
    cos_1, sin_1, cos_2, sin_2 = angles(
        cos_ptr, sin_ptr, stride_cw, stride_sw, offs_p, PAIRS, INTERLEAVED, FULL
    )

    Q_BLOCKS: tl.constexpr = (Q_HEADS + BLOCK_H - 1) // BLOCK_H
    K_BLOCKS: tl.constexpr = (K_HEADS + BLOCK_H - 1) // BLOCK_H
    for block in range(tl.program_id(1), Q_BLOCKS + K_BLOCKS, tl.num_programs(1)):
        if block < Q_BLOCKS:
            _rotate(
                q_ptr, q_out_ptr, stride_qh, stride_qoh, block * BLOCK_H,
                cos_1, sin_1, cos_2, sin_2,
                Q_HEADS, D, PAIRS, INTERLEAVED, WIDE, BLOCK_H, BLOCK_P, BLOCK_REST,
            )  # fmt: skip
        else:
            _rotate(
                k_ptr, k_out_ptr, stride_kh, stride_koh, (block - Q_BLOCKS) * BLOCK_H,
                cos_1, sin_1, cos_2, sin_2,
                K_HEADS, D, PAIRS, INTERLEAVED, WIDE, BLOCK_H, BLOCK_P, BLOCK_REST,
            )  # fmt: skip


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    table: Table = "full",
    wide: bool = False,
    contiguous: bool = False,
    outs: Sequence[Tensor] | None = None,
) -> Sequence[Tensor]:
    """Rotate pairs of elements of every query and key.

    It rounds where eager PyTorch does, to the same bits.

    Args:
        q: `[B, H_q, S, D]`, float32/float16/bfloat16, last stride 1; read in place.
        k: `[B, H_k, S, D]`, as `q`.
        cos: `[B or 1, S, W]`, as `q` or float32, any strides.
        sin: As `cos`.
        interleaved: Which elements are a pair, see `reference.rotary`.
        table: Which columns of `cos` and `sin` belong to them, see `reference.rotary`.
        wide: Compute in float32, or else round each product.
        contiguous: Lay the results out as `[B, H, S, D]`, or else as `q` and `k` are.
        outs: Where to write the results, as `q` and `k`, last stride 1.

    Returns:
        The rotated `q` and `k`.

    Raises:
        ValueError: Shapes, dtypes, devices or strides are others.
    """
    if outs is None:
        outs = rotary_outs(q, k, contiguous=contiguous)
    if not rotary_fits(q, k, cos, sin, table=table) or not _alike(outs, (q, k)):
        raise ValueError(
            f"expected q and k [B, H, S, D] with last stride 1, cos and sin [B or 1, S, W], of one "
            "device and with dtypes that agree, and outs as q and k; got "
            f"{[_describe(x) for x in (q, k, cos, sin, *outs)]}"
        )
    q_out, k_out = outs
    batch_size, q_heads, tokens, dim = q.shape
    k_heads, pairs = k.shape[1], rotated_elements(cos, table) // 2
    if q.numel() + k.numel() == 0:
        return q_out, k_out
    cos, sin = cos.expand(batch_size, -1, -1), sin.expand(batch_size, -1, -1)
    block_p = next_power_of_2(max(pairs, 1))
    block_h = min(max(_PAIRS_AT_ONCE // block_p, 1), next_power_of_2(max(q_heads, k_heads)))
    blocks = cdiv(q_heads, block_h) + cdiv(k_heads, block_h)
    rows = batch_size * tokens
    with torch.cuda.device_of(q):
        _rotary_kernel[(rows, blocks if rows < _MANY_TOKENS else 1)](
            q,
            k,
            cos,
            sin,
            q_out,
            k_out,
            *q.stride()[:3],
            *k.stride()[:3],
            *cos.stride(),
            *sin.stride(),
            *q_out.stride()[:3],
            *k_out.stride()[:3],
            tokens,
            Q_HEADS=q_heads,
            K_HEADS=k_heads,
            D=dim,
            PAIRS=pairs,
            INTERLEAVED=interleaved,
            FULL=table == "full",
            WIDE=wide or cos.dtype != q.dtype,
            **launch_options(q.device, rows),
            BLOCK_H=block_h,
            BLOCK_P=block_p,
            BLOCK_REST=next_power_of_2(max(dim - 2 * pairs, 1)),
            enable_fp_fusion=False,  # a fused multiply-add would not round the product
        )
    return q_out, k_out


def _alike(outs: Sequence[Tensor], like: Sequence[Tensor]) -> bool:
    return [(x.shape, x.dtype, x.device, x.stride(-1)) for x in outs] == [
        (x.shape, x.dtype, x.device, 1) for x in like
    ]


def _describe(x: Tensor) -> str:
    return f"{x.dtype} {list(x.shape)} on {x.device}, strides {x.stride()}"
