"""The specification of the mixture-of-experts kernels in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from patchkit.decoding.reference import gated_activation


def gated_experts(x: Tensor, weight: Tensor, index: Tensor, *, activation: str) -> Tensor:
    """Map every token by gate and up-projection of its experts; activate and multiply.

    Sums are in float32 or wider. Both projections are rounded to the dtype, then the activation of
    the gate, then the product.

    Args:
        x: `[T, D]`, any float dtype.
        weight: `[E, 2 * I, D]`, as `x`; the gates of an expert, then its up-projections.
        index: `[T, k]` int64, the experts of a token, each in `[0, E)`.
        activation: `"silu"` or `"gelu_tanh"`.

    Returns:
        `[T, k, I]`, in the dtype of `x`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    mapped = torch.einsum("tknd,td->tkn", weight[index].to(wide), x.to(wide)).to(x.dtype)
    gate, up = mapped.chunk(2, dim=-1)
    return gated_activation(gate, up, activation=activation)


def combined_experts(x: Tensor, weight: Tensor, index: Tensor, scores: Tensor) -> Tensor:
    """Map what every expert of a token found by its down-projection, and add it up by scores.

    It rounds where transformers' `batched_mm` does: the projection to the dtype, its product with
    the score to the wider of both dtypes, the float32 sum to the dtype of `x`.

    Args:
        x: `[T, k, I]`, any float dtype.
        weight: `[E, D, I]`, as `x`.
        index: `[T, k]` int64, the experts of a token, each in `[0, E)`.
        scores: `[T, k]`, as `x` or float32.

    Returns:
        `[T, D]`, in the dtype of `x`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    mapped = torch.einsum("tkdi,tki->tkd", weight[index].to(wide), x.to(wide)).to(x.dtype)
    weighted = mapped * scores[..., None]
    return weighted.to(wide).sum(1).to(x.dtype)
