"""The specification of the mixture-of-experts kernels in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from patchkit.decoding.reference import gated_activation

MOST_EXPERTS = 1024
"""Among so many `top_experts` chooses."""


def top_experts(
    logits: Tensor, top_k: int, *, normalised: bool, rounded: bool
) -> tuple[Tensor, Tensor]:
    """Choose the experts of every token, and score them by softmax.

    The largest logits are chosen, in descending order; of equal ones the first. NaN is above all
    numbers. The softmax is in float32 or wider.

    Args:
        logits: `[T, E]`, any float dtype.
        top_k: Experts per token, from 1 to E.
        normalised: Whether the scores of a token add up to 1, or else those of all experts.
        rounded: Whether to round scores to the dtype of `logits`.

    Returns:
        scores: `[T, k]`, in the dtype of `logits` or, unless `rounded`, that of the softmax.
        index: `[T, k]` int64, the experts.
    """
    index = logits.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    wide = torch.promote_types(logits.dtype, torch.float32)
    scores = logits.softmax(-1, dtype=wide).gather(1, index)
    if normalised:
        scores = scores / scores.sum(-1, keepdim=True)
    return scores.to(logits.dtype if rounded else wide), index


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


def combined_experts(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    scores: Tensor,
    *,
    out: Tensor | None = None,
    residual: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """Map what every expert of a token found by its down-projection, and add it up by scores.

    It rounds where transformers' `batched_mm` does: the projection to the dtype, its product with
    the score to the wider of both dtypes, the float32 sum to the dtype of `x`.

    Args:
        x: `[T, k, I]`, any float dtype.
        weight: `[E, D, I]`, as `x`.
        index: `[T, k]` int64, the experts of a token, each in `[0, E)`.
        scores: `[T, k]`, as `x` or float32.
        out: `[T, D]`, as `x`. Written and returned if given.
        residual: `T * D` elements, contiguous, as `x`, or None.
        total: As `residual`. Written: `out + residual`.

    Returns:
        `[T, D]`, in the dtype of `x`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    mapped = torch.einsum("tkdi,tki->tkd", weight[index].to(wide), x.to(wide)).to(x.dtype)
    weighted = mapped * scores[..., None]
    result = weighted.to(wide).sum(1).to(x.dtype)
    if residual is not None and total is not None:
        torch.add(residual.view(result.shape), result, out=total.view(result.shape))
    return result if out is None else out.copy_(result)
