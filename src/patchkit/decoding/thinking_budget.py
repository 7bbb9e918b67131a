"""ThinkingBudget: a hard limit on the number of thinking tokens.

Problem
    A reasoning model may think far longer than the answer is worth, or never stop.

Method
    A row that has generated `max_tokens` tokens without the end-of-thinking sequence emits that
    sequence, one id after another, all other logits being -inf; from then on it is left alone. If
    the row ends with a first part of the sequence, only the rest is forced.

Options
    max_tokens: thinking tokens per row, >= 0, the opening tag included if the model writes it
        (default 32000, the example of s1's authors); None is the unpatched model.
    end_think: "auto" (default: "</think>", which must then be one token of the vocabulary); a text,
        which may be several tokens; or ids.
    tokenizer: looks the text up; None takes generate(tokenizer=...) or the model's own files.

Exactness
    Approximate: it cuts thinking short on purpose; exact for rows that end thinking by themselves.

Families
    Every causal language model that `patchkit.apply` takes, with an end-of-thinking sequence.

Source
    The upper limit of budget forcing in s1: Simple test-time scaling, arXiv 2501.19393
    (github.com/simplescaling/s1). Differs: one pass instead of a second prompt. Thinking is taken
    to begin with the generation: do not use it with a prompt that already closes the thinking part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from patchkit.decoding.schedule import LogitSchedule, PrefixProcessor, contains, force, progress
from patchkit.decoding.tokens import (
    SequenceSpec,
    check_sequence_spec,
    require_end_think,
)

if TYPE_CHECKING:
    from patchkit.generation import Call


def end_thinking(
    ids: Tensor,
    count: Tensor,
    scores: Tensor,
    *,
    start: Tensor,
    end_ids: Tensor,
    max_tokens: int,
) -> Tensor:
    """Force what is missing of the sequence `end_ids [m]` in rows whose budget is spent.

    Args:
        ids: `[B, W]` int64; see `DeviceProcessor` for `count` and `scores`.
        start: `[1]` int64, the prompt length.
        end_ids: `[m]` int64.
        max_tokens: See `ThinkingBudget`.

    Returns:
        `[B, V]`.
    """
    overdue = (count - start >= max_tokens) & ~contains(ids, count, end_ids, start)
    return force(scores, end_ids[progress(ids, count, end_ids, start)], overdue)


@dataclass(frozen=True)
class ThinkingBudget(LogitSchedule, name="thinking_budget", slots=("logit_schedule",)):
    """End thinking after a number of tokens.

    Attributes:
        max_tokens: Thinking tokens per row; None changes nothing.
        end_think: The sequence that ends thinking: `"auto"`, a text or ids.

    Raises:
        ValueError: a field is out of range.
    """

    max_tokens: int | None = 32000
    end_think: SequenceSpec = "auto"

    def __post_init__(self) -> None:
        if self.max_tokens is not None and (
            type(self.max_tokens) is not int or self.max_tokens < 0
        ):
            raise ValueError(f"max_tokens must be an int >= 0 or None, got {self.max_tokens!r}")
        object.__setattr__(self, "end_think", check_sequence_spec("end_think", self.end_think))

    def neutral(self) -> bool:
        """Without a budget nothing changes."""
        return self.max_tokens is None

    def token_fields(self) -> tuple[Any, ...]:
        """Return what names the end of thinking."""
        return (self.end_think,)

    def token_ids(self, tokenizer: Any, vocab_size: int | None) -> tuple[int, ...]:
        """Resolve the end-of-thinking sequence; raise TokenResolutionError if there is none."""
        return require_end_think(self.end_think, tokenizer, vocab_size)

    def processor(self, ids: Any, call: Call) -> PrefixProcessor:
        """Build the budget of one `generate()` call."""
        return PrefixProcessor(end_thinking, {"end_ids": ids}, max_tokens=self.max_tokens)


def patch(model: nn.Module, max_tokens: int | None = 32000, **fields: Any) -> nn.Module:
    """Limit thinking in every `generate()` of `model` until `patchkit.restore`.

    Args:
        model: A transformers causal language model, patched in place.
        max_tokens: See `ThinkingBudget`; so are the remaining `fields`.

    Returns:
        The same model.

    Raises:
        ValueError: a setting is out of range.
        PatchkitError: the model cannot be patched; see `patchkit.apply`.
    """
    from patchkit.api import apply

    return apply(model, ThinkingBudget(max_tokens=max_tokens, **fields))
