"""BudgetForcing: s1's lower and upper limit on thinking.

Problem
    A reasoning model that is about to stop thinking often corrects itself if it is made to go on;
    one that does not stop must be stopped.

Method
    Lower side: while a row is thinking and fewer than `num_ignore` ends have been ignored, the
    first id of `wait` gets the score of the first end-of-thinking id where that is higher, and the
    end becomes impossible. Under greedy and beam search "Wait" thus appears where the end would
    have; further ids of `wait` are then forced one after another.
    Upper side: after `max_tokens` generated tokens the end is forced as in thinking_budget, however
    many ends are left to ignore.

    An emitted "Wait" counts against `num_ignore` only where the end scored higher when it was
    chosen, so the model's own are free. That is remembered per prefix, not per row or step: beams
    may be reordered and drafts rejected. For a prefix that the processor has not been shown step by
    step, every "Wait" in it counts.

Options
    max_tokens: thinking tokens per row, >= 0 (default 32000); None sets no upper limit.
    num_ignore: how often the end is ignored per row, >= 0 (default 1). With max_tokens=None, 0 is
        the unpatched model.
    wait: text, or ids, put in place of the end (default "Wait").
    end_think: "auto" (default: "</think>", which must then be one token of the vocabulary); a text,
        which may be several tokens; or ids. The first id is the one that is ignored: it should not
        occur in thinking otherwise.
    tokenizer: looks the texts up; None takes generate(tokenizer=...) or the model's own files.

Exactness
    Approximate: it lengthens and cuts thinking on purpose.

Families
    Every causal language model that `patchkit.apply` takes, with an end-of-thinking sequence.

Source
    s1: Simple test-time scaling, arXiv 2501.19393 (github.com/simplescaling/s1). Differs: one pass
    instead of repeated prompts; an end-of-text token emitted while thinking is not ignored; when
    sampling, "Wait" gets the higher of the two scores rather than their joint probability. Thinking
    is taken to begin with the generation. Accuracy has not been measured here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from patchkit.decoding.schedule import (
    LogitSchedule,
    PrefixProcessor,
    contains,
    force,
    progress,
    with_room,
)
from patchkit.decoding.tokens import (
    SequenceSpec,
    check_sequence_spec,
    require_end_think,
    resolve_sequence,
)
from patchkit.device_processors import DeviceProcessor
from patchkit.errors import TokenResolutionError

if TYPE_CHECKING:
    from patchkit.generation import Call


def limit_thinking(
    ids: Tensor,
    count: Tensor,
    scores: Tensor,
    *,
    start: Tensor,
    wait_ids: Tensor,
    end_ids: Tensor,
    replaced: Tensor,
    max_tokens: int | None,
    num_ignore: int,
) -> Tensor:
    """Replace the end of thinking by "Wait", and force it once the budget is spent.

    Args:
        ids: `[B, W]` int64; see `DeviceProcessor` for `count` and `scores`.
        start: `[1]` int64, the prompt length.
        wait_ids: `[w]` int64.
        end_ids: `[m]` int64.
        replaced: `[B, W]` bool, for every generated token whether it was chosen in place of the
            end; false elsewhere. Column `count` is written.
        max_tokens: See `BudgetForcing`; so is `num_ignore`.

    Returns:
        `[B, V]`.
    """
    thinking = ~contains(ids, count, end_ids, start)
    inserted = replaced & (ids == wait_ids[0])
    written = progress(ids, count, wait_ids, start, begins=inserted)
    ignoring = thinking & (written == 0) & (inserted.sum(1) < num_ignore)
    spent = torch.zeros_like(thinking)
    if max_tokens is not None:
        spent = thinking & (count - start >= max_tokens)
        ignoring &= ~spent
    wait, end = (scores.index_select(1, sequence[:1]) for sequence in (wait_ids, end_ids))
    # Kept for every token, "Wait" or not: a rejected draft may have put another one there.
    replaced.index_copy_(1, count, ignoring[:, None] & (end > wait))

    moved = scores.index_copy(1, wait_ids[:1], torch.maximum(wait, end))
    moved = moved.index_fill(1, end_ids[:1], float("-inf"))
    moved = torch.where(ignoring[:, None], moved, scores)
    moved = force(moved, wait_ids[written], thinking & (written > 0) & ~spent)
    return force(moved, end_ids[progress(ids, count, end_ids, start)], spent)


class BudgetForcingProcessor(PrefixProcessor):
    """Runs `limit_thinking`, and knows what was replaced in each prefix it is given.

    On the device a row continues itself from step to step. On the host rows may be reordered by
    beam search or cut back by a rejected draft.
    """

    _prompt_length = 0
    _seen: Tensor | None = None  # [B, L] the ids of the latest call
    _replaced: Tensor | None = None  # [B, n + 1] whether each step replaced the end

    def on_device(self, ids: Tensor, prompt_length: int) -> DeviceProcessor:
        """Translate itself, with a buffer as wide as `ids`."""
        twin = super().on_device(ids, prompt_length)
        twin.constants["replaced"] = torch.zeros_like(ids, dtype=torch.bool)
        return twin

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores `[B, V]` for `input_ids [B, prompt + n]`."""
        length = input_ids.shape[1]
        if self._twin is None:
            self._twin, self._prompt_length = self.on_device(input_ids, length), length
        recalled = self._recall(input_ids, length - self._prompt_length)
        replaced = nn.functional.pad(recalled, (self._prompt_length, 1))
        self._twin.constants["replaced"] = replaced
        scores = self._twin(with_room(input_ids), input_ids.new_full((1,), length), scores)
        self._seen = input_ids.clone()
        self._replaced = replaced[:, self._prompt_length :]
        return scores

    def _recall(self, input_ids: Tensor, n: int) -> Tensor:
        """Say for each step so far whether the end was replaced: `[B, n]`; unknown is True.

        The rows of this call continue rows of the latest one, reordered by beam search or cut back
        by a rejected draft: the row that agrees on everything but the newest token is the parent.
        """
        known = input_ids.shape[1] - 1
        if n == 0 or self._seen is None or self._replaced is None or known > self._seen.shape[1]:
            return torch.ones((input_ids.shape[0], n), dtype=torch.bool, device=input_ids.device)
        same = (input_ids[:, None, :known] == self._seen[None, :, :known]).all(-1)  # [B, B_seen]
        likely = same.long()
        likely.diagonal().mul_(2)  # of several, itself: `inputs_embeds` do not show in the ids
        return self._replaced[likely.argmax(1), :n] | ~same.any(1)[:, None]


@dataclass(frozen=True)
class BudgetForcing(LogitSchedule, name="budget_forcing", slots=("logit_schedule",)):
    """Make a model think longer, and not too long.

    Attributes:
        max_tokens: Thinking tokens per row; None sets no limit.
        num_ignore: How often the end of thinking is replaced by `wait`, per row.
        wait: What replaces it: a text or ids.
        end_think: The sequence that ends thinking: `"auto"`, a text or ids.

    Raises:
        ValueError: a field is out of range.
    """

    max_tokens: int | None = 32000
    num_ignore: int = 1
    wait: SequenceSpec = "Wait"
    end_think: SequenceSpec = "auto"

    def __post_init__(self) -> None:
        if self.max_tokens is not None and (
            type(self.max_tokens) is not int or self.max_tokens < 0
        ):
            raise ValueError(f"max_tokens must be an int >= 0 or None, got {self.max_tokens!r}")
        if type(self.num_ignore) is not int or self.num_ignore < 0:
            raise ValueError(f"num_ignore must be an int >= 0, got {self.num_ignore!r}")
        for name in ("wait", "end_think"):
            object.__setattr__(self, name, check_sequence_spec(name, getattr(self, name)))

    def neutral(self) -> bool:
        """Without an upper limit and with nothing to ignore, nothing changes."""
        return self.max_tokens is None and self.num_ignore == 0

    def token_fields(self) -> tuple[Any, ...]:
        """Return what names the wait text and the end of thinking."""
        return self.wait, self.end_think

    def token_ids(
        self, tokenizer: Any, vocab_size: int | None
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Resolve both sequences; raise TokenResolutionError if one does not exist."""
        wait = resolve_sequence("wait", self.wait, tokenizer, vocab_size)
        end = require_end_think(self.end_think, tokenizer, vocab_size)
        if wait[0] == end[0]:
            raise TokenResolutionError(
                f"wait and end_think must start with different ids, both start with {end[0]}"
            )
        return wait, end

    def processor(self, ids: Any, call: Call) -> BudgetForcingProcessor:
        """Build the limits of one `generate()` call."""
        wait, end = ids
        return BudgetForcingProcessor(
            limit_thinking,
            {"wait_ids": wait, "end_ids": end},
            max_tokens=self.max_tokens,
            num_ignore=self.num_ignore,
        )


def patch(
    model: nn.Module, max_tokens: int | None = 32000, num_ignore: int = 1, **fields: Any
) -> nn.Module:
    """Force the thinking length in every `generate()` of `model` until `patchkit.restore`.

    Args:
        model: A transformers causal language model, patched in place.
        max_tokens: See `BudgetForcing`; so are `num_ignore` and the remaining `fields`.

    Returns:
        The same model.

    Raises:
        ValueError: a setting is out of range.
        PatchkitError: the model cannot be patched; see `patchkit.apply`.
    """
    from patchkit.api import apply

    return apply(model, BudgetForcing(max_tokens=max_tokens, num_ignore=num_ignore, **fields))
