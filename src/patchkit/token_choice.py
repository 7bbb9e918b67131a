"""Choose the next token of every row on the device, as transformers' own sampling loop does.

transformers' own processors and criteria run as they are, over a preallocated id buffer. Drawing
takes the random numbers of `torch.multinomial` in the same order, so a seed gives the tokens that
it gives without patchkit, but nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    LogitNormalization,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation import GenerationConfig

_FUNCTIONS_OF_SCORES = (
    LogitNormalization,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
"""Processors that look at the scores alone, so that a CUDA graph can hold them."""


def draw(scores: Tensor) -> Tensor:
    """Sample one token per row of `scores [B, V]` -> int64 `[B]`, without waiting for the device.

    This is the race of exponential variables by which `torch.multinomial` draws a single sample.
    """
    probabilities = scores.softmax(-1)
    return (probabilities / torch.empty_like(probabilities).exponential_(1)).argmax(-1)


class TokenChoice:
    """The ids generated so far, which rows are finished, and the rule for the next token.

    Args:
        input_ids: `[B, P]` int64 prompt, on the device of the logits.
        limit: Length at which every row stops.
        processors: What transformers prepared for this call.
        criteria: Likewise.
        config: The prepared generation configuration.

    Attributes:
        ids: `[B, limit]` int64; the first `length` columns are valid.
        length: Prompt plus chosen tokens.
        token: `[B, 1]` int64, the newest token of every row, at a fixed address.
        alive: `[1]` bool, whether any row is unfinished, at a fixed address.
        watches: Whether anything but the length limit can finish a row.
        scores: `[B, V]` float32, what the newest token was chosen from.
    """

    def __init__(
        self,
        input_ids: Tensor,
        limit: int,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
    ) -> None:
        batch_size, self.length = input_ids.shape
        self.ids = input_ids.new_zeros(batch_size, limit)
        self.ids[:, : self.length] = input_ids
        self.token = input_ids.new_zeros(batch_size, 1)
        self._column = torch.full((1,), self.length, device=input_ids.device)
        self._unfinished = torch.ones(batch_size, dtype=torch.bool, device=input_ids.device)
        self.alive = torch.ones(1, dtype=torch.bool, device=input_ids.device)
        self.scores: Tensor | None = None
        self._processors = processors
        self._sampling = config.do_sample
        self._criteria = StoppingCriteriaList(
            c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)
        )
        self._ends: Tensor | None = None
        self._pad: Tensor | None = None
        for criterion in criteria:
            if hasattr(criterion, "eos_token_id"):
                self._pad = config._pad_token_tensor.to(input_ids.device)
            if type(criterion) is EosTokenCriteria:
                self._ends = criterion.eos_token_id.to(input_ids.device).view(1, -1)
        self.watches = self._ends is not None or bool(self._criteria)

    @property
    def capturable(self) -> bool:
        """Whether `choose` depends on the logits alone, so that a CUDA graph can hold it."""
        plain = all(type(processor) in _FUNCTIONS_OF_SCORES for processor in self._processors)
        return plain and not self._criteria

    def choose(self, logits: Tensor, scores: tuple[Tensor, ...] | None = None) -> None:
        """Write the next token of every row to `token` and `ids`, and refresh `alive`.

        Only device operations, unless a custom processor or criterion brings others. The caller
        counts `length` with `advance`, since a captured `choose` runs no Python.

        Args:
            logits: `[B, V]` float32, not modified.
            scores: What criteria expect as `scores`, the newest entry left out.
        """
        if self._processors:
            logits = self._processors(self.ids[:, : self.length].contiguous(), logits)
        self.scores = logits
        chosen = draw(logits) if self._sampling else logits.argmax(-1)
        if self._pad is not None:
            chosen = torch.where(self._unfinished, chosen, self._pad)
        self.token.copy_(chosen[:, None])
        self.ids.index_copy_(1, self._column, self.token)
        self._column += 1
        if self._ends is not None:
            self._unfinished &= (self.token != self._ends).all(-1)
        if self._criteria:
            given = None if scores is None else (*scores, self.scores)
            done = self._criteria(self.ids[:, : self.length + 1].contiguous(), given)
            self._unfinished &= ~done.to(self._unfinished.device)
        if self.watches:
            self.alive.copy_(self._unfinished.any())

    def advance(self) -> None:
        """Count one chosen token on the host."""
        self.length += 1

    def sequences(self, length: int) -> Tensor:
        """Return the first `length` columns, prompt included, `[B, length]` int64."""
        return self.ids[:, :length].clone()
