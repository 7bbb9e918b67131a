"""Triton gate, up-projection and activation of a single vector; see `reference.gated_matvec`.

Bytes floor: both weights once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkit.decoding.kernels.gated_activation import gated
from patchkit.decoding.kernels.matvec import blocks, check_vector, vector_tile, weight_tile
from patchkit.decoding.reference import ACTIVATIONS
from patchkit.dependent_launch import launch_options, wait_for_previous

__all__ = ["gated_matvec"]


@triton.jit
def _gated_matvec_kernel(
    x_ptr,
    gate_ptr,
    up_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    out_ptr,
    num_rows,
    stride_g,
    stride_u,
    K: tl.constexpr,
    GELU: tl.constexpr,
    HAS_GATE_BIAS: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wait_for_previous(EARLY)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = rows < num_rows
    dtype = out_ptr.dtype.element_ty
    gate_ptr += rows.to(tl.int64)[:, None] * stride_g  # [BLOCK_N, 1]
    up_ptr += rows.to(tl.int64)[:, None] * stride_u
    gates = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    ups = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        x = vector_tile(x_ptr, start, K, BLOCK_K)
        gates += weight_tile(gate_ptr, start, mask_n, K, BLOCK_K) * x
        ups += weight_tile(up_ptr, start, mask_n, K, BLOCK_K) * x
    gate, up = tl.sum(gates, axis=1), tl.sum(ups, axis=1)
    if HAS_GATE_BIAS:
        gate += tl.load(gate_bias_ptr + rows, mask=mask_n, other=0.0).to(tl.float32)
    if HAS_UP_BIAS:
        up += tl.load(up_bias_ptr + rows, mask=mask_n, other=0.0).to(tl.float32)
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    tl.store(out_ptr + rows, gated(gate, up, dtype, GELU), mask=mask_n)


def gated_matvec(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    *,
    activation: str,
) -> Tensor:
    """Map one vector by gate and up-projection of an MLP; activate and multiply.

    Both projections are rounded to the dtype, then the activation of the gate, then the product.

    Args:
        x: `[..., K]`, one vector, float32/float16/bfloat16.
        gate: `[N, K]`, as `x`, last stride 1.
        up: As `gate`.
        gate_bias: `[N]`, as `x`, or None.
        up_bias: As `gate_bias`.
        activation: `"silu"` or `"gelu_tanh"`.

    Returns:
        `[..., N]`, contiguous, in the dtype of `x`.

    Raises:
        ValueError: Shapes, dtypes, devices or strides disagree, `x` is more than one vector, or
            there is no such activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
    check_vector(x, gate, gate_bias)
    check_vector(x, up, up_bias)
    if gate.shape != up.shape:
        raise ValueError(f"up: expected {list(gate.shape)}, got {list(up.shape)}")
    num_rows, width = gate.shape
    out = x.new_empty(*x.shape[:-1], num_rows)
    if num_rows == 0:
        return out
    tiles = blocks(num_rows, width)
    vector = x.reshape(width).contiguous()
    with torch.cuda.device_of(x):
        _gated_matvec_kernel[(triton.cdiv(num_rows, tiles["BLOCK_N"]),)](
            vector,
            gate,
            up,
            vector if gate_bias is None else gate_bias.contiguous(),
            vector if up_bias is None else up_bias.contiguous(),
            out,
            num_rows,
            gate.stride(0),
            up.stride(0),
            K=width,
            GELU=activation == "gelu_tanh",
            HAS_GATE_BIAS=gate_bias is not None,
            HAS_UP_BIAS=up_bias is not None,
            **launch_options(x.device),
            **tiles,
        )
    return out
