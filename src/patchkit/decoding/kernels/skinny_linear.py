"""Triton product of weights and a few rows; see `reference.skinny_linear`.

Bytes floor: the weights once. cuBLAS streams them at 60 to 95 % of the rate of a copy and, for all
but the widest, needs a second launch that sums up partial results. Here a program owns a block of
outputs. A single row is multiplied element by element; several are the columns of a tile for the
tensor cores, whose rows are the weights.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkit.attention.kernels import shared_bytes
from patchkit.decoding.eligibility import may_read_ahead
from patchkit.decoding.reference import MOST_SKINNY_ROWS, is_skinny
from patchkit.dependent_launch import launch_options, wait_for_previous
from patchkit.direct_launch import direct
from patchkit.launch_sizes import cdiv, next_power_of_2

__all__ = ["skinny_linear"]

# The interpreter keeps bfloat16 as uint16 and would multiply the bit patterns.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def weight_tile(row_ptr, start, mask_n, K: tl.constexpr, BLOCK_K: tl.constexpr):
    # [BLOCK_N, BLOCK_K] of the rows at `row_ptr` [BLOCK_N, 1].
    offs_k = start + tl.arange(0, BLOCK_K)
    mask = mask_n[:, None]
    if K % BLOCK_K:
        mask = mask & (offs_k < K)[None, :]
    # What is read once per token should not push out what the next kernel reads.
    return tl.load(row_ptr + offs_k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def vector_tile(x_ptr, start, K: tl.constexpr, BLOCK_K: tl.constexpr):
    # [1, BLOCK_K] float32.
    offs_k = start + tl.arange(0, BLOCK_K)
    if K % BLOCK_K:
        tile = tl.load(x_ptr + offs_k, mask=offs_k < K, other=0.0)
    else:
        tile = tl.load(x_ptr + offs_k)
    return tile.to(tl.float32)[None, :]


@triton.jit
def rows_tile(
    x_ptr, start, num_rows, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    # [BLOCK_K, BLOCK_M], a column per row of x [num_rows, K].
    offs_m = tl.arange(0, BLOCK_M)
    offs_k = start + tl.arange(0, BLOCK_K)
    mask = (offs_m < num_rows)[:, None]
    if K % BLOCK_K:
        mask = mask & (offs_k < K)[None, :]
    return tl.trans(tl.load(x_ptr + offs_m[:, None] * K + offs_k[None, :], mask=mask, other=0.0))


@triton.jit
def add_product(total, weight, rows, UPCAST: tl.constexpr):
    if UPCAST:
        weight, rows = weight.to(tl.float32), rows.to(tl.float32)
    return tl.dot(weight, rows, total)


@direct
@triton.jit
def _skinny_linear_kernel(
    x_ptr,
    weight_0_ptr,
    weight_1_ptr,
    weight_2_ptr,
    bias_0_ptr,
    bias_1_ptr,
    bias_2_ptr,
    out_0_ptr,
    out_1_ptr,
    out_2_ptr,
    residual_ptr,
    total_ptr,
    num_rows,
    outs_0,
    outs_1,
    outs_2,
    stride_0,
    stride_1,
    stride_2,
    K: tl.constexpr,
    COUNT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    UPCAST: tl.constexpr,
    EARLY: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program: a block of outputs of one of COUNT weights, of the only row if BLOCK_M is 1. If
    # AHEAD, it reads its first tile of weights before it waits.
    block = tl.program_id(0)
    weight_ptr, bias_ptr, out_ptr = weight_0_ptr, bias_0_ptr, out_0_ptr
    num_outs, stride = outs_0, stride_0
    # Selected, not branched to: of what a branch yields the compiler does not know the alignment.
    if COUNT > 1:
        first = tl.cdiv(outs_0, BLOCK_N)
        later = block >= first
        weight_ptr = tl.where(later, weight_1_ptr, weight_ptr)
        bias_ptr = tl.where(later, bias_1_ptr, bias_ptr)
        out_ptr = tl.where(later, out_1_ptr, out_ptr)
        num_outs = tl.where(later, outs_1, num_outs)
        stride = tl.where(later, stride_1, stride)
        before = tl.where(later, first, 0)
        if COUNT > 2:
            first += tl.cdiv(outs_1, BLOCK_N)
            later = block >= first
            weight_ptr = tl.where(later, weight_2_ptr, weight_ptr)
            bias_ptr = tl.where(later, bias_2_ptr, bias_ptr)
            out_ptr = tl.where(later, out_2_ptr, out_ptr)
            num_outs = tl.where(later, outs_2, num_outs)
            stride = tl.where(later, stride_2, stride)
            before = tl.where(later, first, before)
        block -= before

    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    mask_n = offs_n < num_outs
    mask = mask_n[:, None] & (offs_m < num_rows)[None, :]  # [BLOCK_N, BLOCK_M]
    offs = offs_n[:, None] + offs_m[None, :] * num_outs
    row_ptr = weight_ptr + offs_n.to(tl.int64)[:, None] * stride  # [BLOCK_N, 1]
    if AHEAD:
        first_tile = weight_tile(row_ptr, 0, mask_n, K, BLOCK_K)
    wait_for_previous(EARLY)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if BLOCK_M == 1:
        # The first tile apart from the loop: its load waits for nothing that a loop sets up.
        if not AHEAD:
            first_tile = weight_tile(row_ptr, 0, mask_n, K, BLOCK_K)
        products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        products += first_tile.to(tl.float32) * vector_tile(x_ptr, 0, K, BLOCK_K)
        for start in range(BLOCK_K, K, BLOCK_K):
            weight = weight_tile(row_ptr, start, mask_n, K, BLOCK_K).to(tl.float32)
            products += weight * vector_tile(x_ptr, start, K, BLOCK_K)
        result = tl.sum(products, axis=1)[:, None]
    else:
        result = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for start in range(0, K, BLOCK_K):
            weight = weight_tile(row_ptr, start, mask_n, K, BLOCK_K)
            rows = rows_tile(x_ptr, start, num_rows, K, BLOCK_M, BLOCK_K)
            result = add_product(result, weight, rows, UPCAST)
    if HAS_BIAS:
        result += bias[:, None]
    result = result.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs, result, mask=mask)
    if HAS_RESIDUAL:
        total = residual + result.to(tl.float32)
        tl.store(total_ptr + offs, total.to(total_ptr.dtype.element_ty), mask=mask)


def blocks(x: Tensor, num_outs: int, weights_at_once: int = 1) -> dict[str, int]:
    """Choose tiles as measured on an H200, and a pipeline that fits into shared memory.

    Args:
        x: `[..., K]`, the rows.
        num_outs: Outputs per row, of all weights.
        weights_at_once: Weights of which a program holds a tile each.
    """
    width = x.shape[-1]
    if x.numel() == width:  # a program per output, unless rows are short
        block_k = min(next_power_of_2(width), 4096)
        block_n = 1 if width > 1024 else 2 if num_outs < 2**15 else 4
        warps = min(max(block_k // 512, 4), 8)
        return {"BLOCK_M": 1, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": warps}
    block_m, block_n, block_k = max(16, next_power_of_2(x.numel() // width)), 64, 128
    stage = (weights_at_once * block_n + block_m) * block_k * x.element_size()
    deep = 6 if num_outs < 8192 else 4  # few programs have to load further ahead
    stages = max(min(shared_bytes(x.device) // stage - 1, deep // weights_at_once), 2)
    tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    return tile | {"num_warps": 4, "num_stages": stages}


def check_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless `x` is a few rows that the weight can map."""
    num_outs, width = weight.shape
    if x.shape[-1] != width or width == 0 or not is_skinny(x):
        raise ValueError(
            f"x: expected one row of {width}, or of 16 bits up to {MOST_SKINNY_ROWS}, got "
            f"{x.dtype} {list(x.shape)}"
        )
    for name, tensor in {"weight": weight, "bias": bias}.items():
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(
                f"{name}: expected {x.dtype} on {x.device}, got {tensor.dtype} on {tensor.device}"
            )
    if weight.stride(1) != 1 and width > 1:
        raise ValueError(f"weight: expected last stride 1, got strides {weight.stride()}")
    if bias is not None and bias.shape != (num_outs,):
        raise ValueError(f"bias: expected [{num_outs}], got {list(bias.shape)}")


def skinny_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    outs: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    residual: Tensor | None = None,
    total: Tensor | None = None,
) -> None:
    """Map a few rows as `torch.nn.functional.linear` does, by up to three weights at once.

    Sums are in float32. A single result, rounded, can be added to a residual.

    Args:
        x: `[..., K]`, one row of float32/float16/bfloat16, or up to 64 of float16/bfloat16.
        weights: One to three, each `[N, K]` with an N of its own, as `x`, last stride 1.
        outs: For each weight `[..., N]`, contiguous, as `x`. Written.
        biases: For each weight `[N]`, as `x`. None: no biases.
        residual: `[..., N]`, contiguous, as `x`; with one weight only.
        total: As `residual`. Written: `out + residual`. Given exactly if `residual` is.

    Raises:
        ValueError: Numbers, shapes, dtypes, devices or strides disagree, or `x` has more rows.
    """
    count = len(weights)
    given = count if biases is None else len(biases)
    if not 1 <= count <= 3 or len(outs) != count or given != count:
        raise ValueError(
            f"expected 1 to 3 weights, each with an output, and biases for all or none; got "
            f"{count} weights, {len(outs)} outputs, {given} biases"
        )
    for weight, out, bias in zip(weights, outs, biases or [None] * count, strict=True):
        check_rows(x, weight, bias)
        _check_result(x, weight, out)
    if (residual is None) != (total is None) or (residual is not None and count > 1):
        raise ValueError("expected both of residual and total, with one weight, or neither")
    for result in (residual, total):
        if result is not None:
            _check_result(x, weights[0], result)

    width = x.shape[-1]
    tiles = blocks(x, sum(weight.shape[0] for weight in weights))
    num_blocks = sum(cdiv(weight.shape[0], tiles["BLOCK_N"]) for weight in weights)
    if num_blocks == 0:
        return
    rows = x.reshape(-1, width).contiguous()
    unused = 3 - count
    with torch.cuda.device_of(x):
        _skinny_linear_kernel[(num_blocks,)](
            rows,
            *weights,
            *(rows,) * unused,
            *((rows,) * count if biases is None else (bias.contiguous() for bias in biases)),
            *(rows,) * unused,
            *outs,
            *(rows,) * unused,
            rows if residual is None else residual,
            rows if total is None else total,
            rows.shape[0],
            *(weight.shape[0] for weight in weights),
            *(0,) * unused,
            *(weight.stride(0) for weight in weights),
            *(0,) * unused,
            K=width,
            COUNT=count,
            HAS_BIAS=biases is not None,
            HAS_RESIDUAL=residual is not None,
            UPCAST=INTERPRETED and x.dtype == torch.bfloat16,
            AHEAD=tiles["BLOCK_M"] == 1 and may_read_ahead(weights),
            **launch_options(x.device, len(rows)),
            **tiles,
        )


def _check_result(x: Tensor, weight: Tensor, out: Tensor) -> None:
    numel = x.shape[:-1].numel() * weight.shape[0]
    alike = out.dtype == x.dtype and out.device == x.device and out.is_contiguous()
    if out.numel() != numel or not alike:
        raise ValueError(
            f"out: expected contiguous {x.dtype} of {numel} on {x.device}, got "
            f"{out.dtype} {list(out.shape)} on {out.device} with strides {out.stride()}"
        )
