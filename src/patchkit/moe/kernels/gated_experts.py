"""Triton gate, up-projection and activation of experts, read in place; see the reference.

Bytes floor: gate and up-projection of every expert that a token has chosen, once. A pair is a token
and one of its experts. While few tokens share an expert, a program takes a pair; programs of the
same outputs run next to each other, so what several pairs read comes from the L2 cache, if not for
nothing. Where more tokens share an expert, the program of its first pair serves all of them by the
tensor cores, and those of the others return: each expert is read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkit.decoding.kernels.gated_activation import gated
from patchkit.decoding.kernels.skinny_linear import (
    INTERPRETED,
    add_product,
    blocks,
    vector_tile,
    weight_tile,
)
from patchkit.decoding.reference import ACTIVATIONS, MOST_SKINNY_ROWS
from patchkit.dependent_launch import launch_options, wait_for_previous
from patchkit.direct_launch import direct
from patchkit.launch_sizes import cdiv, next_power_of_2

__all__ = ["gated_experts"]

NO_PAIR = tl.constexpr(2**31 - 1)


@triton.jit
def pairs_of_expert(
    index_ptr,
    pair,
    expert,
    num_tokens,
    TOP_K: tl.constexpr,
    BLOCK_TOP: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    # [BLOCK_M]: each token's pair with the expert of `pair`, or NO_PAIR. Where a token names an
    # expert again, that pair is on its own.
    token, place = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_TOP)
    pairs = token[:, None] * TOP_K + place[None, :]
    mask = (token < num_tokens)[:, None] & (place < TOP_K)[None, :]
    chosen = tl.load(index_ptr + pairs, mask=mask, other=-1)
    first = tl.min(tl.where(chosen == expert, pairs, NO_PAIR), axis=1)
    own = token == pair // TOP_K
    again = tl.min(tl.where(own, first, NO_PAIR), axis=0) < pair
    return tl.where(again, tl.where(own, pair, NO_PAIR), first)


@triton.jit
def picked_rows_tile(x_ptr, row, mask, start, K: tl.constexpr, BLOCK_K: tl.constexpr):
    # [BLOCK_K, BLOCK_M], a column per `row` [BLOCK_M] of x [..., K].
    offs_k = start + tl.arange(0, BLOCK_K)
    mask = mask[:, None]
    if K % BLOCK_K:
        mask = mask & (offs_k < K)[None, :]
    return tl.trans(tl.load(x_ptr + row[:, None] * K + offs_k[None, :], mask=mask, other=0.0))


@direct
@triton.jit
def _gated_experts_kernel(
    x_ptr,
    weight_ptr,
    index_ptr,
    out_ptr,
    stride_e,
    stride_n,
    num_outs,
    TOP_K: tl.constexpr,
    K: tl.constexpr,
    GELU: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program: a block of outputs of a pair.
    wait_for_previous(EARLY)
    pair = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_outs
    x_ptr += pair // TOP_K * K
    weight_ptr += tl.load(index_ptr + pair) * stride_e
    gate_ptr = weight_ptr + offs_n.to(tl.int64)[:, None] * stride_n  # [BLOCK_N, 1]
    up_ptr = weight_ptr + (offs_n + num_outs).to(tl.int64)[:, None] * stride_n
    gates = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    ups = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        x = vector_tile(x_ptr, start, K, BLOCK_K)
        gates += weight_tile(gate_ptr, start, mask_n, K, BLOCK_K).to(tl.float32) * x
        ups += weight_tile(up_ptr, start, mask_n, K, BLOCK_K).to(tl.float32) * x
    dtype = out_ptr.dtype.element_ty
    gate = tl.sum(gates, axis=1).to(dtype).to(tl.float32)
    up = tl.sum(ups, axis=1).to(dtype).to(tl.float32)
    tl.store(out_ptr + pair * num_outs + offs_n, gated(gate, up, dtype, GELU), mask=mask_n)


@direct
@triton.jit
def _shared_gated_experts_kernel(
    x_ptr,
    weight_ptr,
    index_ptr,
    out_ptr,
    stride_e,
    stride_n,
    num_tokens,
    num_outs,
    TOP_K: tl.constexpr,
    K: tl.constexpr,
    GELU: tl.constexpr,
    UPCAST: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_TOP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program: a block of outputs of an expert, for every token that chose it.
    wait_for_previous(EARLY)
    pair = tl.program_id(0)
    expert = tl.load(index_ptr + pair)
    pairs = pairs_of_expert(index_ptr, pair, expert, num_tokens, TOP_K, BLOCK_TOP, BLOCK_M)
    if tl.min(pairs, axis=0) == pair:
        offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n, mask_m = offs_n < num_outs, pairs != NO_PAIR
        token = tl.arange(0, BLOCK_M)
        gate_ptr = weight_ptr + expert * stride_e + offs_n.to(tl.int64)[:, None] * stride_n
        up_ptr = weight_ptr + expert * stride_e
        up_ptr += (offs_n + num_outs).to(tl.int64)[:, None] * stride_n
        gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for start in range(0, K, BLOCK_K):
            rows = picked_rows_tile(x_ptr, token, mask_m, start, K, BLOCK_K)
            weight = weight_tile(gate_ptr, start, mask_n, K, BLOCK_K)
            gate = add_product(gate, weight, rows, UPCAST)
            weight = weight_tile(up_ptr, start, mask_n, K, BLOCK_K)
            up = add_product(up, weight, rows, UPCAST)
        dtype = out_ptr.dtype.element_ty
        gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
        offs = offs_n[:, None] + pairs.to(tl.int64)[None, :] * num_outs
        result = gated(gate, up, dtype, GELU)
        tl.store(out_ptr + offs, result, mask=mask_n[:, None] & mask_m[None, :])


def gated_experts(x: Tensor, weight: Tensor, index: Tensor, *, activation: str) -> Tensor:
    """Map every token by gate and up-projection of its experts; activate and multiply.

    Args:
        x: `[T, D]`, float32/float16/bfloat16.
        weight: `[E, 2 * I, D]`, as `x`, last stride 1; gates of an expert, then up-projections.
        index: `[T, k]` int64, the experts of a token, each in `[0, E)` (not checked: that would
            wait for the device).
        activation: `"silu"` or `"gelu_tanh"`.

    Returns:
        `[T, k, I]`, contiguous, in the dtype of `x`.

    Raises:
        ValueError: Shapes, dtypes, devices or strides disagree, or there is no such activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
    check_experts(x, weight, index, x.shape[-1])
    if x.shape != (len(index), weight.shape[2]) or weight.shape[1] % 2:
        raise ValueError(
            f"expected x [T, D] and weight [E, 2 * I, D], got {list(x.shape)} and "
            f"{list(weight.shape)}"
        )
    (tokens, top_k), (width, num_outs) = index.shape, (x.shape[1], weight.shape[1] // 2)
    out = x.new_empty(tokens, top_k, num_outs)
    if out.numel() == 0:
        return out
    args = (x.contiguous(), weight, index.contiguous(), out, *weight.stride()[:2])
    options = {"TOP_K": top_k, "K": width, "GELU": activation == "gelu_tanh"}
    options |= launch_options(x.device, tokens)
    with torch.cuda.device_of(x):
        if shares_experts(index, weight):
            tiles = blocks(x, num_outs, 2)
            grid = (tokens * top_k, cdiv(num_outs, tiles["BLOCK_N"]))
            options["BLOCK_TOP"] = next_power_of_2(top_k)
            options["UPCAST"] = INTERPRETED and x.dtype == torch.bfloat16
            _shared_gated_experts_kernel[grid](*args, tokens, num_outs, **options, **tiles)
        else:
            tiles = _blocks(width)
            grid = (tokens * top_k, cdiv(num_outs, tiles["BLOCK_N"]))
            _gated_experts_kernel[grid](*args, num_outs, **options, **tiles)
    return out


def check_experts(x: Tensor, weight: Tensor, index: Tensor, width: int) -> None:
    """Raise ValueError unless the last dimension of `x` is what every expert's weight maps."""
    if weight.ndim != 3 or weight.shape[2] != width or width == 0:
        raise ValueError(f"weight: expected [E, N, {width}], got {list(weight.shape)}")
    if weight.dtype != x.dtype or weight.device != x.device or weight.stride(2) != 1:
        raise ValueError(
            f"weight: expected {x.dtype} on {x.device} with last stride 1, got {weight.dtype} on "
            f"{weight.device} with strides {weight.stride()}"
        )
    if index.ndim != 2 or index.dtype != torch.int64 or index.device != x.device:
        raise ValueError(
            f"index: expected int64 [T, k] on {x.device}, got {index.dtype} {list(index.shape)} on "
            f"{index.device}"
        )


def shares_experts(index: Tensor, weight: Tensor) -> bool:
    """Say whether to serve all tokens of an expert by one program, from the shapes alone.

    That pays once experts have half a pair on average. It takes a dtype that tensor cores multiply
    exactly, and no more tokens than a tile has columns.
    """
    return (
        1 < len(index) <= MOST_SKINNY_ROWS
        and weight.dtype in (torch.float16, torch.bfloat16)
        and 2 * index.numel() >= len(weight)
    )


def _blocks(width: int) -> dict[str, int]:
    """Choose tiles as measured on an H200: an output per program, in steps of some KB."""
    # A power of two that divides the width leaves no lane idle.
    block_k = min(max(width & -width, 256), 1024)
    return {"BLOCK_N": 1, "BLOCK_K": block_k, "num_warps": 8 if width > 2048 else 4}
