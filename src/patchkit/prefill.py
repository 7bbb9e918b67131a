"""How many tokens of a prompt the model is fed at a time.

The activations of a forward grow with the number of tokens; from some hundred thousand on they
outgrow the weights. Feeding such a prompt in chunks bounds them and changes nothing in the answers.
A prompt that fits is fed at once, because attention inside one chunk is the fastest there is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from patchkit.attention.store import KVStore
from patchkit.attention.store_layer import BUCKET
from patchkit.compat import CACHE_KEYWORD, CHUNKED_PREFILL_IGNORES_CACHE

_MOST_BYTES = 26e9
"""Activations of one chunk, at most: those of 131,072 tokens of Llama-3.1-8B."""

_LEAST_BYTES = 1e9
"""Activations for which it is not worth asking the driver how much memory is free."""

_SHARE = 2 / 3
"""Of the free memory for activations. As transformers is, 131,072 tokens of Llama-3.1-8B take two
thirds of what `activation_bytes` estimates; fused MLPs, which go through their rows in blocks, a
third.
"""

_DEVICES = ("cuda",)

_SLICED = frozenset({"attention_mask", "position_ids"})
"""Tensors that transformers cuts into chunks along with the ids."""


def prefill_chunk_size(
    model: PreTrainedModel,
    store: KVStore,
    input_ids: Tensor,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> int | None:
    """Choose the tokens per row and chunk such that the activations of a chunk fit.

    Args:
        model: The patched model.
        store: Its cache.
        input_ids: `[B, P]` int64.
        generation_config: Of the call.
        model_kwargs: What `generate()` prepared for the forward.

    Returns:
        A multiple of 256, or None to feed everything at once: it fits, or the model runs on a CPU,
        or the answer might change. That is so with an eviction method, which would see another
        prompt in every chunk, with layers that keep a state of their own, with outputs of every
        token, and with inputs that cannot be cut.
    """
    rows, tokens = input_ids.shape[0], new_tokens(store, input_ids)
    if model.device.type not in _DEVICES or not tokens:
        return None
    if store.eviction is not None or len(store.store_layers) < len(store.layers):
        return None
    if store.get_seq_length() and CHUNKED_PREFILL_IGNORES_CACHE:
        return None
    config = model.config.get_text_config(decoder=True)
    for name in ("output_hidden_states", "output_router_logits"):
        asked = (getattr(held, name, None) for held in (generation_config, model.config, config))
        if model_kwargs.get(name) or any(asked):
            return None
    given = {name for name, value in model_kwargs.items() if isinstance(value, (Tensor, list))}
    positions = model_kwargs.get("position_ids")
    if given - _SLICED - {CACHE_KEYWORD} or (positions is not None and positions.ndim != 2):
        return None
    itemsize = model.dtype.itemsize
    per_token = activation_bytes(config, itemsize)
    if rows * tokens * per_token < _LEAST_BYTES:
        return None
    windows = [layer.sliding_window for layer in store.store_layers]
    free = free_bytes(model.device) - rows * kv_bytes(config, windows, tokens, itemsize)
    most = int(min(_MOST_BYTES, max(free, 0) * _SHARE) / per_token / rows)
    if tokens <= most:
        return None
    most = max(most // BUCKET, 1) * BUCKET
    chunks = math.ceil(tokens / most)
    return math.ceil(tokens / chunks / BUCKET) * BUCKET


def new_tokens(store: KVStore, input_ids: Tensor) -> int:
    """Return how many of the ids `[B, P]` the model has yet to see.

    With tokens in the store, callers pass the whole sequence or the new ids alone.
    """
    tokens = input_ids.shape[1] - store.get_seq_length()
    return tokens if tokens > 0 else input_ids.shape[1]


def activation_bytes(config: PreTrainedConfig, itemsize: int) -> int:
    """Estimate what one token needs while it passes through a layer.

    Counted are the residual stream with its float32 copies in the norms, queries, keys, values, and
    the gate, its activation and the product of the MLP.
    """
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    experts = getattr(config, "num_experts_per_tok", None)
    if experts:
        width = getattr(config, "moe_intermediate_size", None) or width
        width = experts * (width + config.hidden_size)
    return itemsize * (4 * width + 10 * config.hidden_size)


def kv_bytes(
    config: PreTrainedConfig, windows: list[int | None], tokens: int, itemsize: int
) -> int:
    """Estimate what the cache of one row takes.

    Args:
        config: Of the decoder.
        windows: The sliding window of each layer, or None.
        tokens: In the row.
        itemsize: Bytes per number.
    """
    latent = getattr(config, "kv_lora_rank", None)
    if latent:  # one latent vector instead of heads
        numbers = 2 * latent + config.qk_rope_head_dim
    else:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None)
        numbers = 2 * heads * (width or config.hidden_size // config.num_attention_heads)
    stored = sum(tokens if window is None else min(tokens, window) for window in windows)
    return stored * numbers * itemsize


def free_bytes(device: torch.device) -> int:
    """Return what PyTorch can still allocate on a CUDA device, its own cached blocks included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
