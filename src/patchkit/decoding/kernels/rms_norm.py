"""Triton RMS norm in one launch, where eager PyTorch takes eight; see `reference.rms_norm`.

Bytes floor: the input once and the output once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkit.dependent_launch import launch_options, wait_for_previous

__all__ = ["rms_norm"]


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    stride_x,
    eps,
    offset,
    D: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wait_for_previous(EARLY)
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    x = tl.load(x_ptr + row * stride_x + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32) + offset
    normed = x * tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    if ROUND_FIRST:
        normed = normed.to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * D + offs_d, (normed * weight).to(out_ptr.dtype.element_ty), mask_d)


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, offset: float = 0.0, round_first: bool = False
) -> Tensor:
    """Divide every row by its root mean square, then multiply by the weight.

    Args:
        x: `[..., D]`, float32/float16/bfloat16. Rows of any even spacing are read in place.
        weight: `[D]`, as `x`.
        eps: Added to the mean square.
        offset: Added to the weight.
        round_first: Round to the dtype of `x` before the product with the weight as well as after.

    Returns:
        `[..., D]`, contiguous, in the dtype of `x`.

    Raises:
        ValueError: Shapes, dtypes or devices disagree.
    """
    dim = x.shape[-1]
    if weight.shape != (dim,) or weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(
            f"weight: expected {x.dtype} [{dim}] on {x.device}, got {weight.dtype} "
            f"{list(weight.shape)} on {weight.device}"
        )
    rows = x.reshape(-1, dim)
    if rows.stride(1) != 1 and dim > 1:
        rows = rows.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    block_d = triton.next_power_of_2(dim)
    with torch.cuda.device_of(x):
        _rms_norm_kernel[(rows.shape[0],)](
            rows,
            weight,
            out,
            rows.stride(0),
            float(eps),
            float(offset),
            D=dim,
            ROUND_FIRST=round_first,
            **launch_options(x.device, rows.shape[0]),
            BLOCK_D=block_d,
            num_warps=min(max(block_d // 512, 1), 16),
        )
    return out
