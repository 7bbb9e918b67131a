"""Models that the benchmarks run: real small ones, or shapes of larger ones with random weights."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from patchkit import bundled, demo

SHAPES: dict[str, PreTrainedConfig] = {
    "8b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
        rope_theta=500000.0, tie_word_embeddings=False,
    ),
    "30b-a3b": Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, moe_intermediate_size=768, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128,
        num_experts_per_tok=8, norm_topk_prob=True, max_position_embeddings=40960,
        rope_theta=1000000.0, tie_word_embeddings=False,
    ),
}  # fmt: skip
"""Llama-3.1-8B and Qwen3-30B-A3B."""
NAMES = [*SHAPES, *bundled.SOURCES]


def load(shape: str, device: str) -> PreTrainedModel:
    """Load a bundled model (float32 on a CPU, else bfloat16) or build a shape in bfloat16."""
    if shape in bundled.SOURCES:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        return demo.load(shape, dtype=dtype, device=device)[0]
    config = SHAPES[shape]
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    model = model.to_empty(device=device).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02) if parameter.ndim > 1 else parameter.data.fill_(1)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    return model
