"""Find decoder, attention modules and layer kinds in any Hugging Face causal language model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from patchkit.errors import UnsupportedModelError


@dataclass(frozen=True)
class LayerKind:
    """How one layer stores keys and values.

    Attributes:
        name: Module name of its attention, e.g. `"model.layers.0.self_attn"`.
        storable: False for layers that keep transformers' own cache layer (recurrent states,
            chunked attention, shared keys).
        sliding_window: Tokens a query may look back, counting itself; None on full layers.
    """

    name: str
    storable: bool
    sliding_window: int | None


@dataclass(frozen=True)
class Family:
    """Where the parts of a causal language model live.

    Attributes:
        model: The model with the language-model head.
        model_type: `config.model_type`.
        decoder: The module that loops over the layers, and its name in `model`.
        attention: Attention modules by name, in layer order.
        layers: One entry per layer index of the cache.
        num_kv_heads: Heads the cache stores; 1 where a shared latent is cached (MLA).
        vocab_size: Rows of the output head.
    """

    model: PreTrainedModel
    model_type: str
    decoder: nn.Module
    decoder_name: str
    attention: dict[str, nn.Module]
    layers: tuple[LayerKind, ...]
    num_kv_heads: int
    vocab_size: int


@cache
def _calls_attention_interface(forward: Callable[..., Any]) -> bool:
    try:
        source = inspect.getsource(forward)
    except (OSError, TypeError):
        return False
    return "ALL_ATTENTION_FUNCTIONS" in source


def _attention_modules(decoder: nn.Module, prefix: str) -> dict[str, nn.Module]:
    return {
        f"{prefix}.{name}" if prefix else name: module
        for name, module in decoder.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and hasattr(module, "is_causal")
        and _calls_attention_interface(type(module).forward)
    }


def unwrap(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a PEFT wrapper, or the model itself.

    Raises:
        UnsupportedModelError: it is not a transformers model.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(
            f"expected a transformers PreTrainedModel (or a PeftModel), got {type(model).__name__}"
        )
    return inner


def inspect_model(model: PreTrainedModel) -> Family:
    """Locate the parts of `model` that patchkit attaches to; edit nothing.

    Raises:
        UnsupportedModelError: encoder-decoder, no `generate()`, attention that does not go through
            transformers' `AttentionInterface`, or several layers on one cache entry.
    """
    config = model.config
    kind = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"expected a decoder-only model, got the encoder-decoder model {kind}"
        )
    if not model.can_generate():
        raise UnsupportedModelError(
            f"expected a model with a language-model head that can generate(), got {kind}"
        )
    text_config = config.get_text_config(decoder=True)
    if getattr(text_config, "num_kv_shared_layers", 0) or getattr(
        text_config, "kv_sharing_modes", None
    ):
        raise UnsupportedModelError(
            f"{kind} shares keys and values between layers; its cache layout is not supported"
        )
    decoder = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel):
        raise UnsupportedModelError(f"{kind} has no decoder of its own that could be switched")
    decoder_name = next(name for name, module in model.named_modules() if module is decoder)
    attention = _attention_modules(decoder, decoder_name)
    if not attention:
        raise UnsupportedModelError(
            f"expected attention modules that call transformers' AttentionInterface, found none in "
            f"{kind} (model_type {config.model_type!r}); Bloom, Falcon, GPT-J, MPT and Mamba, for "
            "example, carry attention code of their own"
        )
    by_index = {module.layer_idx: name for name, module in attention.items()}
    if len(by_index) != len(attention):
        raise UnsupportedModelError(f"{kind} has several attention modules for one cache layer")
    layers = []
    for index, layer in enumerate(DynamicCache(config=text_config).layers):
        chunked = getattr(text_config, "attention_chunk_size", None) is not None
        storable = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and not chunked
        window = layer.sliding_window if type(layer) is DynamicSlidingWindowLayer else None
        layers.append(LayerKind(by_index.get(index, f"layer {index}"), storable, window))
    head = model.get_output_embeddings()
    num_kv_heads = getattr(text_config, "num_key_value_heads", None)
    if getattr(text_config, "kv_lora_rank", None):
        num_kv_heads = 1
    return Family(
        model=model,
        model_type=config.model_type,
        decoder=decoder,
        decoder_name=decoder_name,
        attention=attention,
        layers=tuple(layers),
        num_kv_heads=num_kv_heads or text_config.num_attention_heads,
        vocab_size=head.weight.shape[0] if head is not None else text_config.vocab_size,
    )
