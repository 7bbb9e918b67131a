"""What decoding tests share: random tensors, a tokenizer, a call, a wave, scripted logits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast

from patchkit.backends import Backend
from patchkit.testing import tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
VOCAB_SIZE = 64
END, WAIT = 7, 11
REFLECTION = (11, 12, 13)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Draw normal numbers on the CPU, so that they are the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def call(model: Any = None, tokenizer: Any = None, backend: str = "reference") -> SimpleNamespace:
    """Stand in for `patchkit.generation.Call`."""
    model = model if model is not None else llama()
    return SimpleNamespace(model=model, tokenizer=tokenizer, backend=Backend(backend))


def family(model: Any) -> SimpleNamespace:
    """Stand in for `patchkit.families.Family`."""
    return SimpleNamespace(model=model, vocab_size=VOCAB_SIZE)


def llama(**overrides: Any) -> Any:
    """Build the tiny random Llama of these tests."""
    return tiny_model("llama", vocab_size=VOCAB_SIZE, **overrides)


def generate(model: Any, processors: Any, inputs: Any, **kwargs: Any) -> Any:
    """Generate greedily, returning scores too; `processors` is a processor, a list or None."""
    if isinstance(processors, LogitsProcessor):
        processors = [processors]
    options = {"max_new_tokens": 24, "do_sample": False} | kwargs
    return model.generate(
        **inputs,
        logits_processor=LogitsProcessorList(processors or []),
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )


def prompt(length: int = 9, rows: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Draw a prompt without the pad token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB_SIZE, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def piecewise(n: int, amplitude: float, period: int, phase: float) -> float:
    """Compute the wave piece by piece, as the authors' code does, in float64."""
    c = ((n + phase * period) % period) / period
    if c <= 0.25:
        return 4 * amplitude * c
    if c <= 0.75:
        return amplitude * (2 - 4 * c)
    return amplitude * (4 * c - 4)


class Scripted(LogitsProcessor):
    """Replaces the logits, so that a test decides what the model wants to say.

    Row b of the batch wants `wanted[b][n]` as generated token n, and its runner-up is token 1.
    """

    def __init__(self, wanted: list[list[int]]) -> None:
        self.wanted = wanted
        self.prompt_len: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scripted scores."""
        if self.prompt_len is None:
            self.prompt_len = input_ids.shape[1]
        n = input_ids.shape[1] - self.prompt_len
        scores = torch.zeros_like(scores)
        scores[:, 1] = 5.0
        for row, tokens in enumerate(self.wanted):
            scores[row, tokens[min(n, len(tokens) - 1)]] = 10.0
        return scores


def word_tokenizer(words: list[str], unk: str = "<|endoftext|>") -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer whose unknown token is id 0, as SmolLM2's."""
    vocab = {word: i for i, word in enumerate([unk, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=unk))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unk, eos_token=unk)


def byte_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """Build a byte-level BPE that knows every byte, and `words` as one token each.

    A word may start with a space; the word without it is then a token too.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges, vocab = [], {c: i for i, c in enumerate(alphabet)}
    for word in words:
        text = word.strip()
        pairs = [(text[: end - 1], text[end - 1]) for end in range(2, len(text) + 1)]
        if word.startswith(" "):
            pairs.append(("Ġ", text))
        for pair in pairs:
            if pair not in merges:
                merges.append(pair)
            vocab.setdefault("".join(pair), len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
