"""Triton down-projection of experts, read in place, and their sum by scores; see the reference.

Bytes floor: the down-projection of every expert that a token has chosen, once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkit.decoding.kernels.skinny_linear import blocks, vector_tile, weight_tile
from patchkit.dependent_launch import launch_options, wait_for_previous
from patchkit.moe.kernels.gated_experts import check_experts

__all__ = ["combined_experts"]


@triton.jit
def _combined_experts_kernel(
    x_ptr,
    weight_ptr,
    index_ptr,
    scores_ptr,
    out_ptr,
    stride_e,
    stride_n,
    num_outs,
    TOP_K: tl.constexpr,
    K: tl.constexpr,
    ROUND_PRODUCT: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program: a block of outputs of one token, over all of its experts in order.
    wait_for_previous(EARLY)
    token = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_outs
    dtype = out_ptr.dtype.element_ty
    total = tl.zeros((BLOCK_N,), tl.float32)
    for k in range(TOP_K):
        pair = token * TOP_K + k
        row_ptr = weight_ptr + tl.load(index_ptr + pair) * stride_e
        row_ptr += offs_n.to(tl.int64)[:, None] * stride_n  # [BLOCK_N, 1]
        products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start in range(0, K, BLOCK_K):
            weight = weight_tile(row_ptr, start, mask_n, K, BLOCK_K).to(tl.float32)
            products += weight * vector_tile(x_ptr + pair * K, start, K, BLOCK_K)
        found = tl.sum(products, axis=1).to(dtype).to(tl.float32)
        weighted = found * tl.load(scores_ptr + pair).to(tl.float32)
        if ROUND_PRODUCT:
            weighted = weighted.to(dtype).to(tl.float32)
        total += weighted
    tl.store(out_ptr + token * num_outs + offs_n, total.to(dtype), mask=mask_n)


def combined_experts(x: Tensor, weight: Tensor, index: Tensor, scores: Tensor) -> Tensor:
    """Map what every expert of a token found by its down-projection, and add it up by scores.

    Args:
        x: `[T, k, I]`, float32/float16/bfloat16.
        weight: `[E, D, I]`, as `x`, last stride 1.
        index: `[T, k]` int64, the experts of a token, each in `[0, E)`, not checked.
        scores: `[T, k]`, as `x` or float32.

    Returns:
        `[T, D]`, contiguous, in the dtype of `x`.

    Raises:
        ValueError: Shapes, dtypes, devices or strides disagree.
    """
    check_experts(x, weight, index, x.shape[-1])
    if x.shape[:-1] != index.shape:
        raise ValueError(
            f"x: expected [T, k, I] for index {list(index.shape)}, got {list(x.shape)}"
        )
    if scores.shape != index.shape or scores.dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"scores: expected {x.dtype} or float32 {list(index.shape)}, got {scores.dtype} "
            f"{list(scores.shape)}"
        )
    (tokens, top_k), num_outs, width = index.shape, weight.shape[1], x.shape[-1]
    out = x.new_empty(tokens, num_outs)
    if out.numel() == 0:
        return out
    tiles = blocks(x.new_empty(1, width), num_outs)
    del tiles["BLOCK_M"]
    with torch.cuda.device_of(x):
        _combined_experts_kernel[(tokens, triton.cdiv(num_outs, tiles["BLOCK_N"]))](
            x.contiguous(),
            weight,
            index.contiguous(),
            scores.contiguous(),
            out,
            *weight.stride()[:2],
            num_outs,
            TOP_K=top_k,
            K=width,
            ROUND_PRODUCT=scores.dtype == x.dtype,
            **launch_options(x.device, tokens),
            **tiles,
        )
    return out
