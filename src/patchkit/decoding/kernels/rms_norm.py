"""Triton RMS norm in one launch, where eager PyTorch takes eight; see `reference.rms_norm`.

Bytes floor: the input once and the output once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkit.dependent_launch import launch_options, wait_for_previous
from patchkit.direct_launch import direct
from patchkit.launch_sizes import next_power_of_2

__all__ = ["rms_norm"]


@triton.jit
def inverse_rms(x, eps, D: tl.constexpr):
    # Of x [BLOCK_D] float32, 0 behind D.
    return tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)


@triton.jit
def weighted(x, inverse, weight, offset, dtype: tl.constexpr, ROUND_FIRST: tl.constexpr):
    # Any elements of such an x, normalised, in `dtype`.
    normed = x * inverse
    if ROUND_FIRST:
        normed = normed.to(dtype).to(tl.float32)
    return (normed * (weight.to(tl.float32) + offset)).to(dtype)


@direct
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
    weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0)
    normed = weighted(
        x, inverse_rms(x, eps, D), weight, offset, out_ptr.dtype.element_ty, ROUND_FIRST
    )
    tl.store(out_ptr + row * D + offs_d, normed, mask=mask_d)


def num_warps(block_d: int) -> int:
    """Say how many warps normalise a row; the order of its sum depends on it."""
    return min(max(block_d // 512, 1), 16)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    offset: float = 0.0,
    round_first: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Divide every row by its root mean square, then multiply by the weight.

    Args:
        x: `[..., D]`, float32/float16/bfloat16. Rows of any even spacing are read in place.
        weight: `[D]`, as `x`.
        eps: Added to the mean square.
        offset: Added to the weight.
        round_first: Round to the dtype of `x` before the product with the weight as well as after.
        out: As `x`, contiguous. Written and returned if given.

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
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    alike = (out.shape, out.dtype, out.device) == (x.shape, x.dtype, x.device)
    if not alike or not out.is_contiguous():
        raise ValueError(
            f"out: expected contiguous {x.dtype} {list(x.shape)} on {x.device}, got {out.dtype} "
            f"{list(out.shape)} on {out.device} with strides {out.stride()}"
        )
    rows = x.reshape(-1, dim)
    if rows.stride(1) != 1 and dim > 1:
        rows = rows.contiguous()
    if out.numel() == 0:
        return out
    block_d = next_power_of_2(dim)
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
            num_warps=num_warps(block_d),
            enable_fp_fusion=False,  # the same bits as in `rotary_append`
        )
    return out
