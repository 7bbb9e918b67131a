"""Triton product of a matrix and a single vector; see `reference.matvec`.

Bytes floor: the weight once. cuBLAS streams the widest at nearly the rate of a copy; for most
others it needs a second launch that sums up partial results.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkit.dependent_launch import launch_options, wait_for_previous

__all__ = ["matvec"]


@triton.jit
def weight_tile(row_ptr, start, mask_n, K: tl.constexpr, BLOCK_K: tl.constexpr):
    # [BLOCK_N, BLOCK_K] float32 of the rows at `row_ptr` [BLOCK_N, 1].
    offs_k = start + tl.arange(0, BLOCK_K)
    mask = mask_n[:, None]
    if K % BLOCK_K:
        mask = mask & (offs_k < K)[None, :]
    # What is read once per token should not push out what the next kernel reads.
    tile = tl.load(row_ptr + offs_k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
    return tile.to(tl.float32)


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
def _map_rows(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    residual_ptr,
    total_ptr,
    block,
    num_rows,
    stride,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = rows < num_rows
    row_ptr = weight_ptr + rows.to(tl.int64)[:, None] * stride  # [BLOCK_N, 1]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + rows, mask=mask_n, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + rows, mask=mask_n, other=0.0).to(tl.float32)
    products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        weight = weight_tile(row_ptr, start, mask_n, K, BLOCK_K)
        products += weight * vector_tile(x_ptr, start, K, BLOCK_K)
    result = tl.sum(products, axis=1)
    if HAS_BIAS:
        result += bias
    result = result.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows, result, mask=mask_n)
    if HAS_RESIDUAL:
        total = residual + result.to(tl.float32)
        tl.store(total_ptr + rows, total.to(total_ptr.dtype.element_ty), mask=mask_n)


@triton.jit
def _matvec_kernel(
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
    rows_0,
    rows_1,
    rows_2,
    stride_0,
    stride_1,
    stride_2,
    K: tl.constexpr,
    COUNT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program: BLOCK_N rows of one of COUNT weights. A branch for each, because the compiler
    # does not know how a pointer that was chosen is aligned.
    wait_for_previous(EARLY)
    block = tl.program_id(0)
    first_1 = tl.cdiv(rows_0, BLOCK_N)
    first_2 = first_1 + tl.cdiv(rows_1, BLOCK_N)
    if (COUNT == 1) | (block < first_1):
        _map_rows(
            x_ptr, weight_0_ptr, bias_0_ptr, out_0_ptr, residual_ptr, total_ptr,
            block, rows_0, stride_0,
            K, HAS_BIAS, HAS_RESIDUAL, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    elif (COUNT == 2) | (block < first_2):
        _map_rows(
            x_ptr, weight_1_ptr, bias_1_ptr, out_1_ptr, residual_ptr, total_ptr,
            block - first_1, rows_1, stride_1,
            K, HAS_BIAS, False, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        _map_rows(
            x_ptr, weight_2_ptr, bias_2_ptr, out_2_ptr, residual_ptr, total_ptr,
            block - first_2, rows_2, stride_2,
            K, HAS_BIAS, False, BLOCK_N, BLOCK_K,
        )  # fmt: skip


def blocks(num_rows: int, width: int) -> dict[str, int]:
    """Choose tiles as measured on an H200: a program per row, unless rows are short."""
    block_k = min(triton.next_power_of_2(width), 4096)
    block_n = 1 if width > 1024 else 2 if num_rows < 2**15 else 4
    return {"BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": min(max(block_k // 512, 4), 8)}


def check_vector(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless `x` is one vector that the weight can map."""
    num_rows, width = weight.shape
    if x.shape[-1] != width or x.numel() != width:
        raise ValueError(f"x: expected one vector of {width}, got {list(x.shape)}")
    for name, tensor in {"weight": weight, "bias": bias}.items():
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(
                f"{name}: expected {x.dtype} on {x.device}, got {tensor.dtype} on {tensor.device}"
            )
    if weight.stride(1) != 1 and width > 1:
        raise ValueError(f"weight: expected last stride 1, got strides {weight.stride()}")
    if bias is not None and bias.shape != (num_rows,):
        raise ValueError(f"bias: expected [{num_rows}], got {list(bias.shape)}")


def matvec(
    x: Tensor,
    weights: Sequence[Tensor],
    outs: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    residual: Tensor | None = None,
    total: Tensor | None = None,
) -> None:
    """Map one vector as `torch.nn.functional.linear` does, by up to three weights at once.

    Sums are in float32. A single result, rounded, can be added to a residual.

    Args:
        x: `[..., K]`, one vector, float32/float16/bfloat16.
        weights: One to three, each `[N, K]` with an N of its own, as `x`, last stride 1.
        outs: For each weight `[..., N]`, contiguous, as `x`. Written.
        biases: For each weight `[N]`, as `x`. None: no biases.
        residual: `[..., N]`, contiguous, as `x`; with one weight only.
        total: As `residual`. Written: `out + residual`. Given exactly if `residual` is.

    Raises:
        ValueError: Numbers, shapes, dtypes, devices or strides disagree, or `x` is more than one
            vector.
    """
    count = len(weights)
    if not 1 <= count <= 3 or len(outs) != count or len(biases or weights) != count:
        raise ValueError(
            f"expected 1 to 3 weights, each with an output, and biases for all or none; got "
            f"{count} weights, {len(outs)} outputs, {len(biases or ())} biases"
        )
    for weight, out, bias in zip(weights, outs, biases or (None,) * count, strict=True):
        check_vector(x, weight, bias)
        _check_result(x, weight, out)
    if (residual is None) != (total is None) or (residual is not None and count > 1):
        raise ValueError("expected both of residual and total, with one weight, or neither")
    for result in (residual, total):
        if result is not None:
            _check_result(x, weights[0], result)

    width = x.shape[-1]
    tiles = blocks(sum(weight.shape[0] for weight in weights), width)
    num_blocks = sum(triton.cdiv(weight.shape[0], tiles["BLOCK_N"]) for weight in weights)
    if num_blocks == 0:
        return
    vector = x.reshape(width).contiguous()
    unused = 3 - count
    with torch.cuda.device_of(x):
        _matvec_kernel[(num_blocks,)](
            vector,
            *weights,
            *(vector,) * unused,
            *((vector,) * count if biases is None else (bias.contiguous() for bias in biases)),
            *(vector,) * unused,
            *outs,
            *(vector,) * unused,
            vector if residual is None else residual,
            vector if total is None else total,
            *(weight.shape[0] for weight in weights),
            *(0,) * unused,
            *(weight.stride(0) for weight in weights),
            *(0,) * unused,
            K=width,
            COUNT=count,
            HAS_BIAS=biases is not None,
            HAS_RESIDUAL=residual is not None,
            **launch_options(x.device),
            **tiles,
        )


def _check_result(x: Tensor, weight: Tensor, out: Tensor) -> None:
    alike = out.dtype == x.dtype and out.device == x.device and out.is_contiguous()
    if out.numel() != weight.shape[0] or not alike:
        raise ValueError(
            f"out: expected contiguous {x.dtype} of {weight.shape[0]} on {x.device}, got "
            f"{out.dtype} {list(out.shape)} on {out.device} with strides {out.stride()}"
        )
