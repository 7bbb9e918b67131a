"""Triton gate, up-projection and activation of a few rows; see `reference.skinny_gated_linear`.

Bytes floor: both weights once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkit.decoding.eligibility import may_read_ahead
from patchkit.decoding.kernels.gated_activation import gated
from patchkit.decoding.kernels.skinny_linear import (
    INTERPRETED,
    add_product,
    blocks,
    check_rows,
    rows_tile,
    vector_tile,
    weight_tile,
)
from patchkit.decoding.reference import ACTIVATIONS
from patchkit.dependent_launch import launch_options, wait_for_previous
from patchkit.direct_launch import direct
from patchkit.launch_sizes import cdiv

__all__ = ["skinny_gated_linear"]


@direct
@triton.jit
def _skinny_gated_linear_kernel(
    x_ptr,
    gate_ptr,
    up_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    out_ptr,
    num_rows,
    num_outs,
    stride_g,
    stride_u,
    K: tl.constexpr,
    GELU: tl.constexpr,
    HAS_GATE_BIAS: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    EARLY: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program: a block of outputs, of the only row if BLOCK_M is 1; AHEAD as in `skinny_linear`.
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    mask_n = offs_n < num_outs
    dtype = out_ptr.dtype.element_ty
    gate_ptr += offs_n.to(tl.int64)[:, None] * stride_g  # [BLOCK_N, 1]
    up_ptr += offs_n.to(tl.int64)[:, None] * stride_u
    if AHEAD:
        gate_tile = weight_tile(gate_ptr, 0, mask_n, K, BLOCK_K)
        up_tile = weight_tile(up_ptr, 0, mask_n, K, BLOCK_K)
    wait_for_previous(EARLY)
    if BLOCK_M == 1:
        if not AHEAD:
            gate_tile = weight_tile(gate_ptr, 0, mask_n, K, BLOCK_K)
            up_tile = weight_tile(up_ptr, 0, mask_n, K, BLOCK_K)
        x = vector_tile(x_ptr, 0, K, BLOCK_K)
        gates, ups = gate_tile.to(tl.float32) * x, up_tile.to(tl.float32) * x
        for start in range(BLOCK_K, K, BLOCK_K):
            x = vector_tile(x_ptr, start, K, BLOCK_K)
            gates += weight_tile(gate_ptr, start, mask_n, K, BLOCK_K).to(tl.float32) * x
            ups += weight_tile(up_ptr, start, mask_n, K, BLOCK_K).to(tl.float32) * x
        gate, up = tl.sum(gates, axis=1)[:, None], tl.sum(ups, axis=1)[:, None]
    else:
        gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for start in range(0, K, BLOCK_K):
            rows = rows_tile(x_ptr, start, num_rows, K, BLOCK_M, BLOCK_K)
            weight = weight_tile(gate_ptr, start, mask_n, K, BLOCK_K)
            gate = add_product(gate, weight, rows, UPCAST)
            weight = weight_tile(up_ptr, start, mask_n, K, BLOCK_K)
            up = add_product(up, weight, rows, UPCAST)
    if HAS_GATE_BIAS:
        gate += tl.load(gate_bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    if HAS_UP_BIAS:
        up += tl.load(up_bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    offs = offs_n[:, None] + offs_m[None, :] * num_outs
    mask = mask_n[:, None] & (offs_m < num_rows)[None, :]
    tl.store(out_ptr + offs, gated(gate, up, dtype, GELU), mask=mask)


def skinny_gated_linear(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    *,
    activation: str,
) -> Tensor:
    """Map a few rows by gate and up-projection of an MLP; activate and multiply.

    Both projections are rounded to the dtype, then the activation of the gate, then the product.

    Args:
        x: `[..., K]`, one row of float32/float16/bfloat16, or up to 64 of float16/bfloat16.
        gate: `[N, K]`, as `x`, last stride 1.
        up: As `gate`.
        gate_bias: `[N]`, as `x`, or None.
        up_bias: As `gate_bias`.
        activation: `"silu"` or `"gelu_tanh"`.

    Returns:
        `[..., N]`, contiguous, in the dtype of `x`.

    Raises:
        ValueError: Shapes, dtypes, devices or strides disagree, `x` has more rows, or there is no
            such activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
    check_rows(x, gate, gate_bias)
    check_rows(x, up, up_bias)
    if gate.shape != up.shape:
        raise ValueError(f"up: expected {list(gate.shape)}, got {list(up.shape)}")
    num_outs, width = gate.shape
    out = x.new_empty(*x.shape[:-1], num_outs)
    if num_outs == 0:
        return out
    tiles = blocks(x, num_outs, 2)
    rows = x.reshape(-1, width).contiguous()
    with torch.cuda.device_of(x):
        _skinny_gated_linear_kernel[(cdiv(num_outs, tiles["BLOCK_N"]),)](
            rows,
            gate,
            up,
            rows if gate_bias is None else gate_bias.contiguous(),
            rows if up_bias is None else up_bias.contiguous(),
            out,
            rows.shape[0],
            num_outs,
            gate.stride(0),
            up.stride(0),
            K=width,
            GELU=activation == "gelu_tanh",
            HAS_GATE_BIAS=gate_bias is not None,
            HAS_UP_BIAS=up_bias is not None,
            UPCAST=INTERPRETED and x.dtype == torch.bfloat16,
            AHEAD=tiles["BLOCK_M"] == 1 and may_read_ahead((gate, up)),
            **launch_options(x.device, len(rows)),
            **tiles,
        )
    return out
