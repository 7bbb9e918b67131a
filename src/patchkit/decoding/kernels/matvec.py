"""Triton product of a matrix and a single vector; see `reference.matvec`.

Bytes floor: the weight once. cuBLAS streams the widest at nearly the rate of a copy; for most
others it needs a second launch that sums up partial results.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["matvec"]


@triton.jit
def add_products(
    total, x_ptr, weight_ptr, start, mask_n, K: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    # Add a tile [BLOCK_N, BLOCK_K] of products to `total`; `weight_ptr` [BLOCK_N, 1] are rows.
    offs_k = start + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    if K % BLOCK_K == 0:
        x = tl.load(x_ptr + offs_k)
        mask = mask_n[:, None]
    else:
        x = tl.load(x_ptr + offs_k, mask=mask_k, other=0.0)
        mask = mask_n[:, None] & mask_k[None, :]
    # What is read once per token should not push out what the next kernel reads.
    weight = tl.load(
        weight_ptr + offs_k[None, :], mask=mask, other=0.0, eviction_policy="evict_first"
    )
    return total + weight.to(tl.float32) * x.to(tl.float32)[None, :]


@triton.jit
def _matvec_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    stride_w,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = rows < num_rows
    weight_ptr += rows.to(tl.int64)[:, None] * stride_w  # [BLOCK_N, 1]
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        total = add_products(total, x_ptr, weight_ptr, start, mask_n, K, BLOCK_K)
    result = tl.sum(total, axis=1)
    if HAS_BIAS:
        result += tl.load(bias_ptr + rows, mask=mask_n, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows, result.to(out_ptr.dtype.element_ty), mask=mask_n)


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


def matvec(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map one vector as `torch.nn.functional.linear` does, with sums in float32.

    Args:
        x: `[..., K]`, one vector, float32/float16/bfloat16.
        weight: `[N, K]`, as `x`, last stride 1.
        bias: `[N]`, as `x`, or None.

    Returns:
        `[..., N]`, contiguous, in the dtype of `x`.

    Raises:
        ValueError: Shapes, dtypes, devices or strides disagree, or `x` is more than one vector.
    """
    num_rows, width = weight.shape
    check_vector(x, weight, bias)
    out = x.new_empty(*x.shape[:-1], num_rows)
    if num_rows == 0:
        return out
    tiles = blocks(num_rows, width)
    vector = x.reshape(width).contiguous()
    with torch.cuda.device_of(x):
        _matvec_kernel[(triton.cdiv(num_rows, tiles["BLOCK_N"]),)](
            vector,
            weight,
            vector if bias is None else bias.contiguous(),
            out,
            num_rows,
            weight.stride(0),
            K=width,
            HAS_BIAS=bias is not None,
            **tiles,
        )
    return out
