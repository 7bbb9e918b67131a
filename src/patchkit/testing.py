"""Tiny random models and batches for tests; nothing is downloaded.

Every family is built from a config object with weights large enough that a wrong mask, position
or bias changes the tokens, and with every bias, norm weight and attention sink away from its
neutral value, so that dropping one cannot go unnoticed.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any, Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

__all__ = ["FAMILIES", "left_padded_batch", "reference_attention", "tiny_model", "tiny_tokenizer"]

_STD = 0.3  # of weights and biases: the usual 0.02 makes attention uniform and hides bugs
_NORM_STD = 0.1  # of norm weights and biases, around their neutral values

_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": _STD,
    "tie_word_embeddings": False,  # tied random weights just repeat the last token
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,  # nothing stops early
}
_GQA = {"num_key_value_heads": 2, "head_dim": 16}
_DENSE = {"intermediate_size": 128}
# Sliding and full layers in turn, with a window that short test prompts do leave.
_ALTERNATING = {"num_hidden_layers": 4, "sliding_window": 8}

_FIELDS: dict[str, dict[str, Any]] = {
    "llama": _GQA | _DENSE,
    "mistral": _GQA | _DENSE | {"sliding_window": None},
    "qwen2": {"num_key_value_heads": 2} | _DENSE,
    "qwen3": _GQA | _DENSE,
    "gemma2": _GQA
    | _DENSE
    | _ALTERNATING
    | {
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3": _GQA | _DENSE | _ALTERNATING | {"query_pre_attn_scalar": 16},
    "phi3": {"num_key_value_heads": 2, "original_max_position_embeddings": 512} | _DENSE,
    "gpt_neox": dict(_DENSE),
    "opt": {"ffn_dim": 128, "init_std": _STD},
    "olmoe": {
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "mixtral": _GQA | {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": _GQA
    | _DENSE
    | {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": _DENSE
    | {
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 48,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
    },
    "gpt_oss": _GQA
    | _ALTERNATING
    | {
        "intermediate_size": 48,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
    },
}
_MODEL_TYPES = {"gemma3": "gemma3_text"}  # where it is not the family's own name

FAMILIES: tuple[str, ...] = tuple(_FIELDS)


def tiny_model(
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    **config_overrides: Any,
) -> PreTrainedModel:
    """Build a tiny random causal LM of one family on the CPU, in eval mode.

    The weights depend on `family`, `seed` and the shapes only: not on torch's global generator,
    which is left alone, and a half-precision model holds the rounded float32 weights.

    Args:
        family: One of `FAMILIES`.
        seed: Of the weights.
        dtype: Of the parameters.
        attn_implementation: As in `from_pretrained`; None takes transformers' own choice, which
            is not always a correct one (see `reference_attention`).
        config_overrides: Fields of the family's config, e.g. `num_hidden_layers=3`.

    Raises:
        ValueError: unknown family, or a field that its config does not have.
    """
    if family not in _FIELDS:
        raise ValueError(f"family must be one of {list(FAMILIES)}, got {family!r}")
    kwargs = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    # transformers initialises too; its draws are overwritten below and must not leak out.
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(
            _config(family, config_overrides), dtype=dtype, **kwargs
        )
    _fill(model, torch.Generator().manual_seed(seed))
    return model.eval()


def _config(family: str, overrides: dict[str, Any]) -> PretrainedConfig:
    model_type = _MODEL_TYPES.get(family, family)
    default = AutoConfig.for_model(model_type)
    unknown = sorted(name for name in overrides if not hasattr(default, name))
    if unknown:
        raise ValueError(f"{type(default).__name__} has no field {unknown}")
    fields = _COMMON | _FIELDS[family] | overrides
    if _ALTERNATING.keys() <= _FIELDS[family].keys() and "layer_types" not in overrides:
        kinds = ("sliding_attention", "full_attention")
        fields["layer_types"] = [kinds[i % 2] for i in range(fields["num_hidden_layers"])]
    return AutoConfig.for_model(model_type, **fields)


@torch.no_grad()
def _fill(model: PreTrainedModel, generator: torch.Generator) -> None:
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            # The neutral weight is 0 in Gemma and 1 elsewhere: transformers has just set it.
            parameter.add_((noise * _NORM_STD).to(parameter.dtype))
        else:
            parameter.copy_(noise * _STD)


def reference_attention(family: str) -> Literal["eager", "sdpa"]:
    """Name the attention implementation of transformers that computes `family` correctly.

    `"sdpa"` drops the soft-cap of Gemma 2 and the sinks of gpt-oss; transformers refuses both by
    now, but its older releases compute Gemma 2 wrongly.
    """
    if family not in _FIELDS:
        raise ValueError(f"family must be one of {list(FAMILIES)}, got {family!r}")
    return "eager" if family in ("gemma2", "gpt_oss") else "sdpa"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer of the tiny models: one token per printable ASCII character.

    Token 0 pads and token 1 is unknown; there is no end token and no chat template.
    """
    printable = string.digits + string.ascii_letters + string.punctuation + " "
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", *printable])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )


def left_padded_batch(
    vocab_size: int, lengths: Sequence[int], pad_token_id: int = 0, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Draw one random prompt per length, none of them containing the pad token.

    Args:
        vocab_size: Tokens are drawn from `[0, vocab_size)` without `pad_token_id`.
        lengths: Prompt lengths in tokens, each at least 1.
        pad_token_id: Fills the left of the shorter rows.
        seed: Of the tokens.

    Returns:
        `input_ids` and `attention_mask`, both `[B, T]` int64 with `T = max(lengths)`.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"lengths must be positive, got {list(lengths)}")
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    drawn = torch.randint(0, vocab_size - 1, shape, generator=generator)
    tokens = drawn + (drawn >= pad_token_id)
    first = shape[1] - torch.tensor(lengths)
    mask = torch.arange(shape[1]) >= first[:, None]
    return {
        "input_ids": tokens.masked_fill(~mask, pad_token_id),
        "attention_mask": mask.long(),
    }
