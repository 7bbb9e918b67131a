"""What the methods of slot `logit_schedule` share: one base class, one processor, prefix scans.

A schedule must be a function of the prefix alone. Beam search reorders rows between steps, and
speculative decoding calls the processors for longer prefixes and then for shorter ones, so nothing
may be counted from call to call. Everything here reads the generated ids anew, with fixed shapes,
on their device and without waiting for it, so that a recorded decoding step can hold it too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, PreTrainedModel

from patchkit.decoding.tokens import find_tokenizer
from patchkit.device_processors import DeviceProcessor, newest, occurrences
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
    """A function of the generated ids as a logits processor, on the host as on the device.

    The prompt length is that of the first call: `generate()` always makes it on the bare prompt,
    and with `inputs_embeds` alone on no ids at all.

    Args:
        function: A module-level function `(ids, count, scores, *, start, **constants, **settings)`
            as `DeviceProcessor` describes it. `start [1]` int64 is the prompt length.
        constants: Tensors, numbers in nested sequences, or None for the function's default.
        settings: Plain values.
    """

    def __init__(
        self, function: Callable[..., Tensor], constants: dict[str, Any], **settings: Any
    ) -> None:
        self.function, self.constants, self.settings = function, constants, settings
        self._twin: DeviceProcessor | None = None

    def on_device(self, ids: Tensor, prompt_length: int) -> DeviceProcessor:
        """Translate itself; see `patchkit.device_processors.on_device`."""
        constants = {"start": [prompt_length], **self.constants}
        return DeviceProcessor.of(self.function, ids.device, constants, **self.settings)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores `[B, V]` for `input_ids [B, prompt + n]`."""
        length = input_ids.shape[1]
        if self._twin is None:  # once: the only copy from the host
            self._twin = self.on_device(input_ids, length)
        return self._twin(with_room(input_ids), input_ids.new_full((1,), length), scores)


def with_room(input_ids: Tensor) -> Tensor:
    """Append a column for the next token, `[B, n]` -> `[B, n + 1]`, as an id buffer has it."""
    return nn.functional.pad(input_ids, (0, 1))


def bias_processor(
    function: Callable[..., Tensor],
    backend: Backend,
    token_ids: Sequence[int],
    end_ids: Sequence[int] | None,
    windows: Windows | None,
    **wave: float | None,
) -> PrefixProcessor:
    """Build a processor from `bias`, or from a function that ends in it; see there."""
    constants = {"token_ids": token_ids, "end_ids": end_ids, "windows": windows}
    return PrefixProcessor(function, constants, backend=backend, **wave)


def bias(
    ids: Tensor,
    count: Tensor,
    scores: Tensor,
    *,
    start: Tensor,
    token_ids: Tensor,
    backend: Backend,
    amplitude: float,
    period: int | None = None,
    phase: float = 0.0,
    end_ids: Tensor | None = None,
    windows: Tensor | None = None,
    step: Tensor | None = None,
) -> Tensor:
    """Add a wave or a constant to the reflection tokens of the rows that are still thinking.

    Args:
        ids: `[B, W]` int64; see `DeviceProcessor` for `count` and `scores`.
        start: `[1]` int64, the prompt length.
        token_ids: `[R]` int64, reflection tokens.
        backend: Runs the kernel.
        amplitude: See `patchkit.decoding.reference.logit_wave`; so are `period` and `phase`.
        end_ids: `[m]` int64, the sequence that ends thinking, or None.
        windows: `[N, 2]` int64, ranges of the step in which the bias applies, or None.
        step: `[1]` or `[B]` int64, the position in the schedule; None counts generated tokens.

    Returns:
        `[B, V]`.
    """
    return backend.run(
        "decoding",
        "logit_wave",
        scores.device,
        scores.clone(),
        token_ids,
        count - start if step is None else step,
        contains(ids, count, end_ids, start),
        amplitude=amplitude,
        period=period,
        phase=phase,
        windows=windows,
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


def contains(ids: Tensor, count: Tensor, sequence: Tensor | None, start: Tensor) -> Tensor:
    """Say per row whether `sequence [m]` was generated -> bool `[B]`; None never is.

    Args:
        ids: `[B, W]` int64, of which the columns from `start [1]` up to `count [1]` are looked at.
    """
    if sequence is None:
        return ids.new_zeros(ids.shape[0], dtype=torch.bool)
    return occurrences(ids, count, sequence, start).any(1)


def progress(
    ids: Tensor, count: Tensor, sequence: Tensor, start: Tensor, begins: Tensor | None = None
) -> Tensor:
    """Count how many tokens of `sequence [m]` the generated ids end with -> int64 `[B]`.

    The longest proper prefix counts, so emitting `sequence[progress]` from here on always
    completes the sequence.

    Args:
        ids: `[B, W]` int64, of which the columns from `start [1]` up to `count [1]` are looked at.
        begins: `[B, W]` bool, where the sequence may have begun; None for everywhere.
    """
    proper = len(sequence) - 1
    tail = newest(ids, count, proper, start)
    allowed = None if begins is None else newest(begins.long(), count, proper, start) == 1
    matched = ids.new_zeros(ids.shape[0])
    for length in range(1, proper + 1):
        ends = (tail[:, -length:] == sequence[:length]).all(1)
        if allowed is not None:
            ends &= allowed[:, -length]
        matched = torch.where(ends, length, matched)
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
