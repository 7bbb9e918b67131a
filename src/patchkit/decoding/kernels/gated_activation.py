"""Triton activation and product of a gated MLP in one pass; see `reference.gated_activation`.

Bytes floor: gate and up read once, the product written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkit.decoding.reference import ACTIVATIONS
from patchkit.direct_launch import direct
from patchkit.launch_sizes import cdiv

__all__ = ["gated_activation"]


@triton.jit
def gated(gate, up, dtype: tl.constexpr, GELU: tl.constexpr):
    # Both float32. The activation is rounded to `dtype` before the product.
    slope = gate
    if GELU:  # (1 + tanh(y)) / 2 is the logistic function of 2 y
        slope = 2 * 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    activated = gate / (1 + tl.exp(-slope))
    return (activated.to(dtype).to(tl.float32) * up).to(dtype)


@direct
@triton.jit
def _gated_activation_kernel(
    gate_ptr, up_ptr, out_ptr, numel, GELU: tl.constexpr, BLOCK: tl.constexpr
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    gate = tl.load(gate_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, gated(gate, up, out_ptr.dtype.element_ty, GELU), mask=mask)


def gated_activation(
    gate: Tensor, up: Tensor, *, activation: str, out: Tensor | None = None
) -> Tensor:
    """Multiply `up` by the activation of `gate`, which is rounded in between.

    Args:
        gate: `[..., I]`, float32/float16/bfloat16.
        up: As `gate`.
        activation: `"silu"` or `"gelu_tanh"`.
        out: As `gate`, contiguous; may be `gate` itself. Written and returned if given.

    Returns:
        `[..., I]`, contiguous, in the dtype of `gate`.

    Raises:
        ValueError: Shapes, dtypes or devices disagree, or there is no such activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
    if up.shape != gate.shape or up.dtype != gate.dtype or up.device != gate.device:
        raise ValueError(
            f"up: expected {gate.dtype} {list(gate.shape)} on {gate.device}, got {up.dtype} "
            f"{list(up.shape)} on {up.device}"
        )
    gate, up = gate.contiguous(), up.contiguous()
    if out is None:
        out = torch.empty_like(gate)
    elif out.shape != gate.shape or out.dtype != gate.dtype or not out.is_contiguous():
        raise ValueError(
            f"out: expected contiguous {gate.dtype} {list(gate.shape)}, got {out.dtype} "
            f"{list(out.shape)} with strides {out.stride()}"
        )
    if out.numel() == 0:
        return out
    block = 1024 if out.numel() < 1 << 20 else 4096
    with torch.cuda.device_of(gate):
        _gated_activation_kernel[(cdiv(out.numel(), block),)](
            gate,
            up,
            out,
            out.numel(),
            GELU=activation == "gelu_tanh",
            BLOCK=block,
            num_warps=4 if block == 1024 else 8,
        )
    return out
