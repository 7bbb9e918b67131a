"""What the methods of slot `logit_schedule` share: one base class, one processor, prefix scans.

A schedule must be a function of the prefix alone. Beam search reorders rows between steps, and
speculative decoding calls the processors for longer prefixes and then for shorter ones, so nothing
may be counted from call to call. Everything here reads the generated ids anew, on their device and
without waiting for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from patchkit.decoding.tokens import find_tokenizer
from patchkit.method import Method

if TYPE_CHECKING:
    from patchkit.backends import Backend
    from patchkit.families import Family
    from patchkit.generation import Call

Windows = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class LogitSchedule(Method):
    """Base of the methods that act on the logits in `generate()`.

    Attributes:
        tokenizer: Looks up token strings. None takes the tokenizer passed to
            `generate(tokenizer=...)`, else the one stored beside the model's weights.
    """

    tokenizer: Any = field(default=None, repr=False, compare=False, kw_only=True)

    def neutral(self) -> bool:
        """Say whether this configuration changes nothing."""
        raise NotImplementedError

    def token_fields(self) -> tuple[Any, ...]:
        """Return the values of the fields that name tokens."""
        raise NotImplementedError

    def token_ids(self, tokenizer: Any, vocab_size: int | None) -> Any:
        """Resolve the token fields; raise TokenResolutionError where they do not resolve."""
        raise NotImplementedError

    def processor(self, ids: Any, call: Call) -> LogitsProcessor:
        """Build the processor of one call from what `token_ids` returned."""
        raise NotImplementedError

    def for_call(self, call: Call) -> LogitSchedule:
        """Take the tokenizer of `generate(tokenizer=...)` unless the method has its own."""
        if self.tokenizer is not None or call.tokenizer is None:
            return self
        return replace(self, tokenizer=call.tokenizer)

    def check(self, family: Family) -> None:
        """Raise TokenResolutionError if the tokens do not exist in the model's vocabulary."""
        if self.neutral():
            return
        tokenizer = self._find_tokenizer(None, family.model)
        self.token_ids(tokenizer, family.vocab_size)

    def sites(self, family: Family) -> tuple[str, ...]:
        """The method acts on the logits inside `generate()`."""
        return ("generate",)

    def logits_processor(self, call: Call) -> LogitsProcessor | None:
        """Return the processor of one `generate()` call, or None for a neutral setting."""
        if self.neutral():
            return None
        config = call.model.config.get_text_config(decoder=True)
        tokenizer = self._find_tokenizer(call.tokenizer, call.model)
        ids = self.token_ids(tokenizer, getattr(config, "vocab_size", None))
        return self.processor(ids, call)

    def _find_tokenizer(self, given: Any, model: PreTrainedModel) -> Any:
        strings: set[str] = set()
        for value in self.token_fields():
            items = [value] if isinstance(value, str) else value or ()
            strings.update(item for item in items if isinstance(item, str))
        if not strings:
            return None
        return find_tokenizer(self.tokenizer, given, model, required=strings != {"auto"})


class PrefixProcessor(LogitsProcessor):
    """A logits processor that sees the generated ids only.

    The prompt length is that of the first call: `generate()` always makes it on the bare prompt,
    and with `inputs_embeds` alone on no ids at all.
    """

    def __init__(self) -> None:
        self._prompt_len: int | None = None

    def generated(self, input_ids: Tensor) -> Tensor:
        """Cut the prompt off: `[B, prompt + n]` -> `[B, n]`."""
        if self._prompt_len is None:
            self._prompt_len = input_ids.shape[1]
        return input_ids[:, self._prompt_len :]


class BiasProcessor(PrefixProcessor):
    """Adds a wave or a constant to the reflection tokens of the rows that are still thinking.

    Args:
        backend: Runs the kernel.
        token_ids: Reflection tokens.
        end_ids: The sequence that ends thinking, or None.
        windows: Ranges of the step in which the bias applies, or None.
        amplitude: See `patchkit.decoding.reference.logit_wave`; so are `period` and `phase`.
    """

    def __init__(
        self,
        backend: Backend,
        token_ids: Sequence[int],
        end_ids: Sequence[int] | None,
        windows: Windows | None,
        *,
        amplitude: float,
        period: int | None = None,
        phase: float = 0.0,
    ) -> None:
        super().__init__()
        self.token_ids = torch.tensor(token_ids, dtype=torch.int32)
        self.end_ids = end_ids
        self.windows = None if windows is None else torch.tensor(windows, dtype=torch.int32)
        self._backend = backend
        self._wave = {"amplitude": amplitude, "period": period, "phase": phase}

    def step(self, generated: Tensor) -> Tensor:
        """Return the position in the schedule of `generated [B, n]`: int32 `[1]` or `[B]`."""
        n = generated.shape[1]
        return torch.full((1,), n, dtype=torch.int32, device=generated.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return biased scores `[B, V]` for `input_ids [B, prompt + n]`."""
        generated = self.generated(input_ids)
        if self.token_ids.device != scores.device:  # once: the only copy from the host
            self.token_ids = self.token_ids.to(scores.device)
            self.windows = None if self.windows is None else self.windows.to(scores.device)
        return self._backend.run(
            "decoding",
            "logit_wave",
            scores.device,
            scores.clone(),
            self.token_ids,
            self.step(generated),
            contains(generated, self.end_ids),
            windows=self.windows,
            **self._wave,
        )


def check_windows(windows: Sequence[Sequence[int]] | None) -> Windows | None:
    """Return windows as tuples; raise ValueError unless they are ordered, disjoint `[start, end)`.

    Args:
        windows: Pairs of token counts, or None for everywhere.
    """
    if windows is None:
        return None
    last = 0
    if not windows:
        raise ValueError("windows must hold at least one (start, end), or be None for everywhere")
    for window in windows:
        start, end = window if len(window) == 2 else (None, None)
        if type(start) is not int or type(end) is not int or not last <= start < end:
            raise ValueError(
                f"windows must be ordered, disjoint pairs of ints 0 <= start < end, "
                f"got {[tuple(w) for w in windows]}"
            )
        last = end
    return tuple((start, end) for start, end in windows)


def occurrences(ids: Tensor, sequence: Sequence[int]) -> Tensor:
    """Mark where `sequence` starts in `ids [B, n]` -> bool `[B, max(n - len + 1, 0)]`."""
    count = ids.shape[1] - len(sequence) + 1
    if count <= 0:
        return ids.new_zeros((ids.shape[0], 0), dtype=torch.bool)
    # One comparison with a Python int each: a device tensor of the sequence would need a copy.
    found = ids[:, :count] == sequence[0]
    for offset, token in enumerate(sequence[1:], start=1):
        found &= ids[:, offset : offset + count] == token
    return found


def contains(ids: Tensor, sequence: Sequence[int] | None) -> Tensor:
    """Say per row whether `sequence` occurs in `ids [B, n]` -> bool `[B]`; None never does."""
    if sequence is None:
        return ids.new_zeros(ids.shape[0], dtype=torch.bool)
    return occurrences(ids, sequence).any(1)


def progress(ids: Tensor, sequence: Sequence[int]) -> Tensor:
    """Count how many tokens of `sequence` the rows of `ids [B, n]` end with -> int64 `[B]`.

    The longest proper prefix counts, so emitting `sequence[progress]` from here on always
    completes the sequence.
    """
    matched = ids.new_zeros(ids.shape[0], dtype=torch.int64)
    for length in range(1, min(len(sequence), ids.shape[1] + 1)):
        tail = occurrences(ids[:, ids.shape[1] - length :], sequence[:length])
        matched = torch.where(tail[:, 0], length, matched)
    return matched


def force(scores: Tensor, tokens: Tensor, active: Tensor) -> Tensor:
    """Leave one token possible in every active row.

    Args:
        scores: `[B, V]`, not modified. The forced token keeps its score, unless another processor
            had removed it; then it scores 0.
        tokens: `[B]` int64.
        active: `[B]` bool.

    Returns:
        `[B, V]`.
    """
    kept = scores.gather(1, tokens[:, None])
    kept = torch.where(kept == float("-inf"), 0.0, kept)
    forced = torch.full_like(scores, float("-inf")).scatter(1, tokens[:, None], kept)
    return torch.where(active[:, None], forced, scores)
