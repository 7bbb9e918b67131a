"""TIP: a constant penalty on the tokens that start a new thought (thought switching penalty).

Problem
    Reasoning models abandon promising ideas too early: they switch thoughts after a few tokens.

Method
    While the model thinks, a constant `delta` is added to the reflection tokens at the steps that
    lie in `windows`. Rows that have emitted the end-of-thinking sequence are left unchanged. With
    window="generation" the step is the number of tokens generated so far (0 for the first one);
    with window="thought" it is counted from the start of the current thought, which is the newest
    reflection token (that token is step 0), or the first generated token before there is one.

Options
    delta: bias in logits (default -3.0). 0 is the unpatched model.
    windows: half-open ranges of the step in which the bias applies (default ((0, 600),)); None
        means everywhere.
    window: "generation" (default) or "thought".
    reflection_tokens: "paper" (default: wait, Wait, but, But, Alternatively, each without a leading
        space), "expanded", or a list of strings and token ids; see cyclic_reflex.
    end_think: "auto" (default: "</think>" if that is one token, else never gated), None, a text or
        ids.
    tokenizer: looks the strings up; None takes generate(tokenizer=...) or the model's own files.

Exactness
    Approximate: it changes the distribution on purpose. Not a speed-up.

Families
    Every causal language model that `patchkit.apply` takes; meant for reasoning models.

Source
    Thoughts Are All Over the Place: On the Underthinking of o1-Like LLMs, arXiv 2501.18585, whose
    window is per thought; defaults and window="generation" follow the baseline in
    github.com/OPTML-Group/CyclicReflex. Differs: the words are those of CyclicReflex, and a string
    that is not exactly one token is never looked up. Accuracy has not been measured here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

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
from patchkit.device_processors import columns, marked

if TYPE_CHECKING:
    from patchkit.generation import Call

Window = Literal["generation", "thought"]


def bias_thoughts(
    ids: Tensor, count: Tensor, scores: Tensor, *, start: Tensor, token_ids: Tensor, **rest: Any
) -> Tensor:
    """Apply `bias`, its step counted from the newest reflection token of each row."""
    place, vocab_size = columns(ids), scores.shape[1]
    known = (place < count) & (ids < vocab_size)
    opens = marked(token_ids, vocab_size)[torch.where(known, ids, 0)] & known
    # Tokens of the prompt lie before `start`, so without a newer one it is the first generated.
    step = count - torch.where(opens, place, start).amax(1)
    return bias(ids, count, scores, start=start, token_ids=token_ids, step=step, **rest)


@dataclass(frozen=True)
class TIP(LogitSchedule, name="tip", slots=("logit_schedule",)):
    """Penalise reflection tokens by a constant.

    Attributes:
        delta: Bias in logits; 0 changes nothing.
        windows: Half-open ranges of the step in which the bias applies; None: everywhere.
        window: What the step counts from: `"generation"` or `"thought"`.
        reflection_tokens: `"paper"`, `"expanded"`, or strings and ids.
        end_think: Ends the schedule of a row: `"auto"`, None, a text or ids.

    Raises:
        ValueError: a field is out of range.
    """

    delta: float = -3.0
    windows: Windows | None = ((0, 600),)
    window: Window = "generation"
    reflection_tokens: ReflectionSpec = "paper"
    end_think: SequenceSpec | None = "auto"

    def __post_init__(self) -> None:
        if not math.isfinite(self.delta):
            raise ValueError(f"delta must be finite, in logits, got {self.delta}")
        if self.window not in get_args(Window):
            raise ValueError(f"window must be one of {get_args(Window)}, got {self.window!r}")
        tokens = check_reflection_spec(self.reflection_tokens)
        object.__setattr__(self, "reflection_tokens", tokens)
        if self.end_think is not None:
            end = check_sequence_spec("end_think", self.end_think)
            object.__setattr__(self, "end_think", end)
        object.__setattr__(self, "windows", check_windows(self.windows))

    def neutral(self) -> bool:
        """A delta of 0 changes nothing."""
        return self.delta == 0

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
        """Build the penalty of one `generate()` call."""
        reflection, end = ids
        function = bias_thoughts if self.window == "thought" else bias
        return bias_processor(
            function, call.backend, reflection, end, self.windows, amplitude=self.delta
        )


def patch(model: nn.Module, delta: float = -3.0, **fields: Any) -> nn.Module:
    """Put the penalty on every `generate()` of `model` until `patchkit.restore`.

    Args:
        model: A transformers causal language model, patched in place.
        delta: See `TIP`; so are the remaining `fields`.

    Returns:
        The same model.

    Raises:
        ValueError: a setting is out of range.
        PatchkitError: the model cannot be patched; see `patchkit.apply`.
    """
    from patchkit.api import apply

    return apply(model, TIP(delta=delta, **fields))
