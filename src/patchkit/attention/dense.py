"""Exact attention over plain tensors: torch's fused SDPA, or an explicit softmax."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, cudnn_sdp_enabled
from torch.nn.attention import SDPBackend, sdpa_kernel

_MAX_SCORES = 1 << 26
"""Attention scores that the explicit softmax materialises at a time when no gradient is needed."""

_FEW_QUERIES = 1024
"""Up to this many queries, torch's flash attention takes less time than patchkit's kernel."""

_CUDNN_QUERIES = 32768
"""From this many on, cuDNN gains more than the building of its plan costs: 55 ms for every new
length (H100)."""

_CUDNN_FIRST = {
    SDPBackend.CUDNN_ATTENTION: cudnn_sdp_enabled,
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
}


def prefers_torch(
    query: Tensor, value: Tensor, *, softcap: float | None, sinks: Tensor | None, **_: Any
) -> bool:
    """Say whether torch attends faster than patchkit's kernel where every query is causal.

    Args:
        query: `[B, H, Q, D]`.
        value: `[B, H_kv, S, Dv]`.
    """
    plain = softcap is None and sinks is None and query.shape[-1] == value.shape[-1] <= 128
    half = query.dtype in (torch.float16, torch.bfloat16)
    suited = not _FEW_QUERIES < query.shape[2] < _CUDNN_QUERIES
    return query.is_cuda and half and plain and suited


def cudnn_serves(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Say whether `cudnn_attention` takes these and is the fastest there is."""
    if not query.is_cuda or query.shape[2] < _CUDNN_QUERIES or torch.compiler.is_compiling():
        return False
    grouped = key.shape[1] != query.shape[1]
    params = SDPAParams(query, key, value, None, 0.0, True, grouped)
    return cudnn_sdp_enabled() and can_use_cudnn_attention(params)


def cudnn_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend causally through cuDNN, which has the softmax denominators at hand.

    torch offers these in no public function.

    Args:
        query: `[B, H, S, D]`, float16 or bfloat16; needs `cudnn_serves`.
        key: `[B, H_kv, S, D]`, as `query`.
        value: `[B, H_kv, S, D]`, as `query`.
        scale: Factor on the logits.

    Returns:
        `[B, S, H, D]`, contiguous, query dtype, and `[B, H, S]` float32, the natural log of the
        denominators.
    """
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse, *_ = attend(query, key, value, None, True, is_causal=True, scale=scale)
    return out.transpose(1, 2).contiguous(), lse.view(query.shape[:3])


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend from every query to all keys that the mask leaves visible.

    Args:
        query: `[B, H, Q, D]`, float.
        key: `[B, H_kv, S, D]`, same dtype; `H` is a multiple of `H_kv` (grouped heads).
        value: `[B, H_kv, S, Dv]`, same dtype.
        scale: Factor on the logits, usually `D ** -0.5`.
        mask: Broadcastable to `[B, H_kv, Q, S]` (or `H` heads): bool, True = attend, or an additive
            float bias.
        is_causal: Query i sees keys 0..i; needs `Q == S` and no mask.
        dropout: Probability on the attention weights, 0 outside training.
        softcap: `c * tanh(logits / c)` after scaling (Gemma 2), None for none.
        sinks: `[H]` extra logits that join the softmax denominator only (gpt-oss).

    Returns:
        `[B, Q, H, Dv]`, contiguous, query dtype.
    """
    if softcap is None and sinks is None:
        with _order_of_kernels(query):
            out = _sdpa(query, key, value, scale, mask, is_causal, dropout)
    else:
        out = _explicit(query, key, value, scale, mask, is_causal, dropout, softcap, sinks)
    return out.transpose(1, 2).contiguous()


def _order_of_kernels(query: Tensor) -> AbstractContextManager[None]:
    """Make torch try cuDNN before its own flash attention where that pays."""
    long = query.is_cuda and query.shape[2] >= _CUDNN_QUERIES
    if not long or query.requires_grad or torch.compiler.is_compiling():
        return nullcontext()
    allowed = [kernel for kernel, enabled in _CUDNN_FIRST.items() if enabled()]
    return sdpa_kernel(allowed, set_priority=True)


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None,
    is_causal: bool,
    dropout: float,
) -> Tensor:
    batch_size, num_heads, q_len, head_dim = query.shape
    num_kv_heads = key.shape[1]
    groups = num_heads // num_kv_heads
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    options: dict[str, Any] = {"dropout_p": dropout, "is_causal": is_causal, "scale": scale}
    if groups == 1:
        return F.scaled_dot_product_attention(query, key, value, mask, **options)
    if q_len == 1 and (mask is None or mask.shape[1] != num_heads):
        # One query per head: the heads of a group become the queries of their KV head.
        packed = query.reshape(batch_size, num_kv_heads, groups, head_dim)
        out = F.scaled_dot_product_attention(packed, key, value, mask, **options)
        return out.reshape(batch_size, num_heads, 1, value.shape[-1])
    # torch's fused kernels take grouped heads only without a mask and with equal head sizes.
    if mask is None and key.shape[-1] == value.shape[-1] <= 256:
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)
    if mask is not None and mask.shape[1] == num_kv_heads > 1:
        mask = mask.repeat_interleave(groups, dim=1)
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, mask, **options)


def _explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None,
    is_causal: bool,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    batch_size, num_heads, q_len, _ = query.shape
    num_kv_heads, kv_len = key.shape[1:3]
    grouped = query.unflatten(1, (num_kv_heads, num_heads // num_kv_heads))
    if is_causal:
        mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None and mask.shape[1] == num_heads:
        mask = mask.unflatten(1, (num_kv_heads, -1))
    elif mask is not None:
        mask = mask[:, :, None]
    rows = q_len
    if not torch.is_grad_enabled():
        rows = max(1, _MAX_SCORES // (batch_size * num_heads * kv_len))
    outputs = []
    for start in range(0, q_len, rows):
        logits = grouped[..., start : start + rows, :] @ key[:, :, None].mT * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if mask is not None:
            part = mask[..., start : start + rows, :]
            if part.dtype == torch.bool:
                logits = logits.masked_fill(~part, torch.finfo(logits.dtype).min)
            else:
                logits = logits + part
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if sinks is not None:
            sink = (
                sinks.to(logits.dtype).view(1, num_kv_heads, -1, 1, 1).expand(*logits.shape[:-1], 1)
            )
            weights = torch.cat([logits, sink], dim=-1).softmax(-1)[..., :-1]
        else:
            weights = logits.softmax(-1)
        weights = (
            F.dropout(weights.to(value.dtype), dropout) if dropout else weights.to(value.dtype)
        )
        outputs.append(weights @ value[:, :, None])
    return torch.cat(outputs, dim=-2).flatten(1, 2)
