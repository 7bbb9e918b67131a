"""What differs between versions of transformers and modes of torch, each under one name."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from typing import Any

import torch
from packaging.version import Version

TRANSFORMERS_VERSION = Version(version("transformers"))

CHUNKED_PREFILL_IGNORES_CACHE = Version("5.23") > TRANSFORMERS_VERSION
"""`generate(prefill_chunk_size=...)` feeds the whole input again on top of a non-empty cache."""

CACHE_KEYWORD = "cache" if Version("5.24") <= TRANSFORMERS_VERSION else "past_key_values"
"""What `forward()` and `generate()` call the KV cache; the older name is still accepted."""


def find_cache(kwargs: Mapping[str, Any]) -> Any:
    """Return the KV cache among keyword arguments, under either name, or None."""
    cache = kwargs.get(CACHE_KEYWORD)
    return kwargs.get("past_key_values") if cache is None else cache


def ordinary_tensors() -> AbstractContextManager[None]:
    """Make tensors inside `torch.inference_mode` that may be written to outside of it later."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
