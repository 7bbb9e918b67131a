"""CyclicReflex: a triangular wave on the logits of reflection tokens.

Problem
    Reasoning models steer themselves with words such as "Wait" and "But". Too few of them and the
    model settles on its first idea; too many and it circles. A constant penalty (TIP) can only push
    one way.

Method
    While the model thinks, a bias that depends on the number n of tokens generated so far (0 for
    the first one) is added to the reflection tokens, with amplitude A, period T and phase s:

        c = ((n + s T) mod T) / T
        bias = A (1 - 4 |((c + 1/4) mod 1) - 1/2|)

    It rises from 0 to +A over a quarter of a period, falls to -A over the next half, and returns to
    0: reflection is encouraged first, then discouraged, and left alone on average. Rows that have
    emitted the end-of-thinking sequence are left unchanged.

    The bias comes before temperature, top-k and top-p, so it is divided by the temperature as all
    logits are. It depends on the prefix alone: batches, left padding, beam search and speculative
    decoding need no care.

Options
    amplitude: peak bias, in logits, >= 0 (default 1.0). 0 is the unpatched model.
    period: tokens per cycle, >= 1 (default 600).
    phase: shift to the left as a fraction of the period (default 0.0; 0.5 swaps the signs).
    reflection_tokens: "paper" (default: wait, Wait, but, But, Alternatively, each without a leading
        space); "expanded" (these words, lower-case and capitalised, without and with a leading
        space, as far as they are single tokens); or a list of strings and token ids.
    end_think: "auto" (default: "</think>" if that is one token, else never gated); None (never); a
        text, which may be several tokens; or ids. A text of several tokens is found only where the
        model writes it with the ids that it has on its own.
    windows: half-open ranges of n in which the bias applies (default ((0, 8192),), the authors');
        None means everywhere.
    tokenizer: looks the strings up; None takes generate(tokenizer=...) or the model's own files.

    CyclicReflex.preset("r1-distill-qwen-7b/math500") holds the authors' settings; the others are
    .../aime24, .../aime25, .../amc23, and r1-distill-qwen-1.5b/best-of-8 and .../beam-search-8.
    They were tuned for sampling at temperature 0.6 and top-p 0.95.

Exactness
    Approximate: it changes the distribution on purpose. Not a speed-up.

Families
    Every causal language model that `patchkit.apply` takes; meant for reasoning models.

Source
    CyclicReflex: Improving Reasoning Models via Cyclical Reflection Token Scheduling, arXiv
    2506.11077; settings from github.com/OPTML-Group/CyclicReflex. Differs: a string that is not
    exactly one token is never looked up (there, a missing word biases the unknown token or all of
    them). Accuracy has not been measured here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from patchkit.decoding.schedule import (
    LogitSchedule,
    PrefixProcessor,
    Windows,
    bias,
    bias_processor,
    check_windows,
)
from patchkit.decoding.tokens import (
    ReflectionSpec,
    SequenceSpec,
    check_reflection_spec,
    check_sequence_spec,
    resolve_end_think,
    resolve_reflection_tokens,
)

if TYPE_CHECKING:
    from patchkit.generation import Call

PRESETS: dict[str, tuple[float, int]] = {
    "r1-distill-qwen-7b/math500": (5.0, 1200),
    "r1-distill-qwen-7b/aime24": (5.0, 1200),
    "r1-distill-qwen-7b/aime25": (5.0, 1200),
    "r1-distill-qwen-7b/amc23": (5.0, 900),
    "r1-distill-qwen-1.5b/best-of-8": (1.0, 600),
    "r1-distill-qwen-1.5b/beam-search-8": (3.0, 600),
}
"""Amplitude and period that the authors used, by model and benchmark or search."""


@dataclass(frozen=True)
class CyclicReflex(LogitSchedule, name="cyclic_reflex", slots=("logit_schedule",)):
    """Encourage and discourage reflection in turn.

    Attributes:
        amplitude: Peak bias in logits; 0 changes nothing.
        period: Tokens per cycle.
        phase: Shift to the left as a fraction of the period.
        reflection_tokens: `"paper"`, `"expanded"`, or strings and ids.
        end_think: Ends the schedule of a row: `"auto"`, None, a text or ids.
        windows: Half-open ranges of generated tokens in which the bias applies; None: everywhere.

    Raises:
        ValueError: a field is out of range.
    """

    amplitude: float = 1.0
    period: int = 600
    phase: float = 0.0
    reflection_tokens: ReflectionSpec = "paper"
    end_think: SequenceSpec | None = "auto"
    windows: Windows | None = ((0, 8192),)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.amplitude) and self.amplitude >= 0):
            raise ValueError(
                f"amplitude must be finite and >= 0 (phase=0.5 swaps the signs), "
                f"got {self.amplitude}"
            )
        if type(self.period) is not int or self.period < 1:
            raise ValueError(f"period must be an int >= 1, in tokens, got {self.period!r}")
        if not math.isfinite(self.phase):
            raise ValueError(f"phase must be a finite fraction of the period, got {self.phase}")
        tokens = check_reflection_spec(self.reflection_tokens)
        object.__setattr__(self, "reflection_tokens", tokens)
        if self.end_think is not None:
            end = check_sequence_spec("end_think", self.end_think)
            object.__setattr__(self, "end_think", end)
        object.__setattr__(self, "windows", check_windows(self.windows))

    @classmethod
    def preset(cls, name: str, **fields: Any) -> CyclicReflex:
        """Return the authors' setting for a model and benchmark, with `fields` on top.

        Raises:
            ValueError: `name` is not one of `PRESETS`.
        """
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {name!r}")
        amplitude, period = PRESETS[name]
        return cls(**({"amplitude": amplitude, "period": period} | fields))

    def neutral(self) -> bool:
        """An amplitude of 0 changes nothing."""
        return self.amplitude == 0

    def token_fields(self) -> tuple[Any, ...]:
        """Return what names the reflection tokens and the end of thinking."""
        return self.reflection_tokens, self.end_think

    def token_ids(
        self, tokenizer: Any, vocab_size: int | None
    ) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        """Resolve the reflection tokens and the end-of-thinking sequence."""
        return (
            resolve_reflection_tokens(self.reflection_tokens, tokenizer, vocab_size),
            resolve_end_think(self.end_think, tokenizer, vocab_size),
        )

    def processor(self, ids: Any, call: Call) -> PrefixProcessor:
        """Build the wave of one `generate()` call."""
        reflection, end = ids
        return bias_processor(
            bias,
            call.backend,
            reflection,
            end,
            self.windows,
            amplitude=self.amplitude,
            period=self.period,
            phase=self.phase,
        )


def patch(
    model: nn.Module,
    amplitude: float = 1.0,
    period: int = 600,
    phase: float = 0.0,
    **fields: Any,
) -> nn.Module:
    """Put the wave on every `generate()` of `model` until `patchkit.restore`.

    Args:
        model: A transformers causal language model, patched in place.
        amplitude: See `CyclicReflex`; so are `period`, `phase` and the remaining `fields`.

    Returns:
        The same model.

    Raises:
        ValueError: a setting is out of range.
        PatchkitError: the model cannot be patched; see `patchkit.apply`.
    """
    from patchkit.api import apply

    return apply(model, CyclicReflex(amplitude=amplitude, period=period, phase=phase, **fields))
