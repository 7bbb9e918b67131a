"""The attention and mask functions that patchkit registers with transformers.

Both are registered once per process under the name `patchkit`, at the first `apply`. The attention
function serves three kinds of calls: over a `KVStore` (inference), over another dynamic cache, and
without a cache (training). Per-model state travels on the attention module as `_patchkit`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from patchkit.attention.dense import (
    cudnn_attention,
    cudnn_serves,
    dense_attention,
    prefers_torch,
)
from patchkit.attention.eviction import Attended, refuse_custom_mask
from patchkit.attention.store import KVStore, check_cache
from patchkit.attention.store_layer import StoreLayer
from patchkit.backends import Backend
from patchkit.compat import CACHE_KEYWORD, find_cache
from patchkit.errors import CacheError, UnsupportedGenerationError, UnsupportedModelError

IMPLEMENTATION = "patchkit"
"""Name of the attention implementation; contains none of the substrings transformers tests for."""

_MAX_DECODE_ROWS = 128
"""Queries times heads per KV head that one program of the decode kernel holds."""

_UNSUPPORTED = ("position_bias", "indices", "block_indices", "cu_seq_lens_q", "cache")


def register() -> None:
    """Make the implementation known to transformers; idempotent."""
    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, attention_mask)


def before_decoder(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
    """Open the store of a forward pass: the pre-hook on the module that loops over the layers.

    A pass that would create transformers' default cache gets a `KVStore` instead, unless gradients
    are needed.

    Raises:
        CacheError: see `check_cache` and `KVStore.begin`.
        UnsupportedGenerationError: `output_attentions=True`.
    """
    patch = decoder.__dict__["_patchkit"]
    if args:
        kwargs = {**dict(zip(_parameters(type(decoder).forward), args, strict=False)), **kwargs}
    if kwargs.get("output_attentions"):
        raise UnsupportedGenerationError(
            "attention weights are never materialised by patchkit's attention; call "
            "patchkit.restore(model) and use attn_implementation='eager' for output_attentions"
        )
    past = find_cache(kwargs)
    eviction = patch.active().get("kv_eviction")
    check_cache(past, eviction)
    use_cache = kwargs.get("use_cache")
    if use_cache is None:
        use_cache = getattr(decoder.config, "use_cache", True)
    keeps_gradients = torch.is_grad_enabled() and (decoder.training or eviction is None)
    if past is None and use_cache and not keeps_gradients:
        past = kwargs[CACHE_KEYWORD] = KVStore(patch.family.model)
    patch.store = None
    if isinstance(past, KVStore):
        inputs = kwargs.get("input_ids")
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        if inputs is not None:  # else the model has its own error to raise
            past.begin(decoder, inputs.shape[0], inputs.shape[1], kwargs.get("attention_mask"))
        patch.store = past
    return (), kwargs


@cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def attention_mask(
    *args: Any,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool | None = None,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """Pass the 2-D padding mask through; build a 4-D mask only for patterns that are not causal.

    No value of the mask is read. `transformers` clears `allow_is_causal_skip` where the pattern is
    more than causal or sliding (packed sequences, bidirectional blocks), and omits it for
    bidirectional models.

    Returns:
        None, the `[B, columns]` bool mask, or a bool mask `[B, 1, q_length, kv_length]`.
    """
    chunked = getattr(config, "attention_chunk_size", None) is not None
    if allow_is_causal_skip and not chunked:
        return attention_mask
    kwargs.pop("allow_is_bidirectional_skip", None)
    return sdpa_mask(
        *args,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        config=config,
        **kwargs,
    )


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend over what the cache returned; the signature transformers calls.

    Args:
        module: The attention module, carrying `_patchkit` and `layer_idx`.
        query: `[B, H, Q, D]`.
        key: `[B, H_kv, S, D]`, what the cache's `update` returned (MLA: expanded from it).
        value: `[B, H_kv, S, Dv]`.
        attention_mask: None, `[B, columns]` bool, or a 4-D mask over columns.
        scaling: Factor on the logits; None for `D ** -0.5`.
        dropout: 0 outside training.
        sliding_window: Tokens a query may look back, counting itself.
        softcap: Logit soft-cap.
        s_aux: `[H]` attention-sink logits.

    Returns:
        `[B, Q, H, Dv]` contiguous, and None for the weights.
    """
    patch = module.__dict__.get("_patchkit")
    if patch is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} runs the 'patchkit' attention but is not patched; use "
            "patchkit.apply(model) instead of set_attn_implementation('patchkit')"
        )
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} passes {name!r} to attention, which is not supported"
            )
    options: dict[str, Any] = {
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "softcap": softcap,
        "sinks": s_aux,
    }
    layer = patch.store_layer(module.layer_idx)
    if layer is not None:
        stored = query.to(key.dtype)
        out = _attend_store(patch, layer, stored, key, value.to(key.dtype), attention_mask, options)
        return out.to(query.dtype), None
    mask, is_causal = _plain_visibility(query, key, attention_mask, sliding_window)
    patch.backend.calls["dense_attention", "torch"] += 1
    out = dense_attention(
        query, key, value, mask=mask, is_causal=is_causal, dropout=dropout, **options
    )
    return out, None


def _attend_store(
    patch: Any,
    layer: StoreLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """Attend over the slots of a store layer, then let its policy look and evict.

    Triton kernels on a GPU, torch elsewhere and where it is faster.
    """
    backend, policy = patch.backend, layer.policy
    q_len, groups = query.shape[2], query.shape[1] // key.shape[1]
    custom = attention_mask is not None and attention_mask.ndim == 4
    scored = policy is not None and policy.scored
    if custom and scored:
        refuse_custom_mask()  # the model's own; `KVStore.begin` has refused the caller's
    lse = None
    means = "torch" if custom else _means(backend, layer, query, key, value, options)
    keys, values, position = layer.lists()
    if key.data_ptr() != layer.keys.data_ptr():  # MLA: expanded from the latent slots
        keys, values, position = key, value, position[:, :, : key.shape[2]]
    if means == "cudnn":
        backend.calls["dense_attention", "torch"] += 1
        out, lse = cudnn_attention(query, key, value, scale=options["scale"])
    elif means == "torch":
        visible = _mask_of_columns(attention_mask, layer) if custom else layer.visibility(q_len)
        mask = visible if isinstance(visible, Tensor) else None
        backend.calls["dense_attention", "torch"] += 1
        out = dense_attention(
            query, key, value, mask=mask, is_causal=mask is None and visible == "causal", **options
        )
    else:
        held = (query, keys, values, position, layer.length, layer.seen)
        if scored:
            lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        kernel = {**options, "sliding_window": layer.sliding_window, "lse": lse}
        few = q_len <= 16 and q_len * groups <= _MAX_DECODE_ROWS and q_len < layer.columns
        if few:
            kernel["list_start"] = layer.list_start
        else:
            kernel |= {"behind": layer.behind, "ordered": layer.ordered}
        op = "decode_attention" if few else "prefill_attention"
        out = backend.run("attention", op, layer.device, *held, **kernel)
    if policy is not None and scored:
        masking = {name: options[name] for name in ("scale", "softcap")}
        masking["sliding_window"] = layer.sliding_window
        policy.observe(layer, Attended(query, keys, position, lse, masking, options["sinks"]))
    layer.commit()
    return out


def _means(
    backend: Backend,
    layer: StoreLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: dict[str, Any],
) -> Literal["cudnn", "torch", "slots"]:
    """Choose what attends: cuDNN for its denominators, torch, or a kernel over the slots."""
    if layer.list_start is not None:
        return "slots"
    policy, q_len = layer.policy, query.shape[2]
    if layer.unmasked(q_len) == "causal" and prefers_torch(query, value, **options):
        if policy is None or not policy.scored:
            return "torch"
        if cudnn_serves(query, key, value):
            return "cudnn"
        if not policy.needs_lse:
            return "torch"
    return "torch" if backend.choose(layer.device) == "reference" else "slots"


def _mask_of_columns(mask: Tensor, layer: StoreLayer) -> Tensor:
    """Rearrange a 4-D mask over columns `[B, 1 or H, Q, columns]` to the slots of a layer."""
    if mask.shape[-1] < layer.columns:
        raise CacheError(
            f"expected a 4-D mask over all {layer.columns} columns, got {mask.shape[-1]}"
        )
    position = layer.position[:, :, : layer.filled]
    if mask.shape[1] not in (1, position.shape[1]):
        position = position.repeat_interleave(mask.shape[1] // position.shape[1], dim=1)
    batch_size, num_heads = position.shape[:2]
    column = position.clamp(min=0).long()[:, :, None].expand(-1, -1, mask.shape[2], -1)
    gathered = mask.expand(batch_size, num_heads, -1, -1).gather(-1, column)
    empty = (position < 0)[:, :, None]
    if mask.dtype == torch.bool:
        return gathered & ~empty
    return gathered.masked_fill(empty, torch.finfo(mask.dtype).min)


def _plain_visibility(
    query: Tensor, key: Tensor, mask: Tensor | None, sliding_window: int | None
) -> tuple[Tensor | None, bool]:
    """Return mask and causal flag for keys in column order, the last of which are the queries'."""
    if mask is not None and mask.ndim == 4:
        return mask, False
    q_len, kv_len = query.shape[2], key.shape[2]
    if mask is None and (sliding_window is None or kv_len <= sliding_window):
        if q_len == 1:
            return None, False
        if q_len == kv_len:
            return None, True
    columns = kv_len if mask is None else mask.shape[1]
    kv_column = torch.arange(columns - kv_len, columns, device=key.device)
    q_column = kv_column[kv_len - q_len :, None]
    visible = (kv_column <= q_column)[None, None]
    if sliding_window is not None:
        visible = visible & (kv_column > q_column - sliding_window)
    if mask is not None:
        visible = visible & mask[:, None, None, columns - kv_len :].bool()
        # Padding queries see everything: never used, but a row without keys would be NaN.
        visible = visible | ~visible.any(-1, keepdim=True)
    return visible, False
