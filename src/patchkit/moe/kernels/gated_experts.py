"""Triton gate, up-projection and activation of experts, read in place; see the reference.

Bytes floor: gate and up-projection of every expert that a token has chosen, once. A program takes
a pair of a token and one of its experts, so an expert that several tokens chose is read for each of
them, from the L2 cache if they run at the same time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkit.decoding.kernels.gated_activation import gated
from patchkit.decoding.kernels.skinny_linear import blocks, vector_tile, weight_tile
from patchkit.decoding.reference import ACTIVATIONS
from patchkit.dependent_launch import launch_options, wait_for_previous

__all__ = ["gated_experts"]


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
    # One program: a block of outputs of one token and one of its experts.
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
    for start in range(0, K, BLOCK_K):
        x = vector_tile(x_ptr, start, K, BLOCK_K)
        gates += weight_tile(gate_ptr, start, mask_n, K, BLOCK_K).to(tl.float32) * x
        ups += weight_tile(up_ptr, start, mask_n, K, BLOCK_K).to(tl.float32) * x
    dtype = out_ptr.dtype.element_ty
    gate = tl.sum(gates, axis=1).to(dtype).to(tl.float32)
    up = tl.sum(ups, axis=1).to(dtype).to(tl.float32)
    tl.store(out_ptr + pair * num_outs + offs_n, gated(gate, up, dtype, GELU), mask=mask_n)


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
    (tokens, top_k), num_outs = index.shape, weight.shape[1] // 2
    out = x.new_empty(tokens, top_k, num_outs)
    if out.numel() == 0:
        return out
    tiles = blocks(x[:1], num_outs)
    del tiles["BLOCK_M"]
    grid = (tokens * top_k, triton.cdiv(num_outs, tiles["BLOCK_N"]))
    with torch.cuda.device_of(x):
        _gated_experts_kernel[grid](
            x.contiguous(),
            weight,
            index.contiguous(),
            out,
            *weight.stride()[:2],
            num_outs,
            TOP_K=top_k,
            K=x.shape[-1],
            GELU=activation == "gelu_tanh",
            **launch_options(x.device, tokens),
            **tiles,
        )
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
