"""What reaches the host while a decoding loop runs ahead of it: tokens, the end, logits, the draws.

The device is never waited for. Every step posts its tokens in memory of the host, which is looked
at some steps later, so that the device never runs dry; what was computed past the end of the answer
is never shown, and the random numbers it drew are given back.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationConfig

from patchkit.token_choice import TokenChoice


class History:
    """The logits and scores of every step, where the caller wants them returned."""

    def __init__(self, choice: TokenChoice, config: GenerationConfig) -> None:
        returned = config.return_dict_in_generate
        choice.history = () if returned and config.output_scores else None
        self._logits: tuple[Tensor, ...] | None = () if returned and config.output_logits else None
        self._choice = choice

    def add(self, logits: Tensor) -> None:
        """Keep copies of what the newest token was chosen from."""
        if self._choice.history is not None:
            self._choice.history += (self._choice.scores.clone(),)
        if self._logits is not None:
            self._logits += (logits.clone(),)

    def cut(self, steps: int) -> dict[str, tuple[Tensor, ...] | None]:
        """Return the first `steps` entries under the names of transformers' output."""
        held = {"scores": self._choice.history, "logits": self._logits}
        return {name: None if kept is None else kept[:steps] for name, kept in held.items()}


@dataclass
class _Step:
    """One step that was queued.

    Attributes:
        post: `[B + 2]` int64, see `TokenChoice.posted`.
        event: Recorded behind the step, on a GPU.
        draws: Where the random numbers stood after the step, if it draws any.
    """

    post: Tensor
    event: torch.cuda.Event | None
    draws: Any


class Outbox:
    """Brings tokens and the end of all rows to the host in order, some steps late.

    Args:
        choice: Where the tokens are.
        streamer: The streamer of the call, or None. It gets a token once it is known to belong to
            the answer.
        sampling: Whether every step draws random numbers.
    """

    def __init__(self, choice: TokenChoice, streamer: Any, sampling: bool) -> None:
        self._choice, self._streamer = choice, streamer
        self._random = _Random(choice.token.device) if sampling else None
        # The length alone ends a call that watches nothing; its steps need not be looked at.
        self._looks = choice.watches or streamer is not None
        self._waiting: deque[_Step] = deque()
        self._events: list[torch.cuda.Event] = []
        self._known = 0  # steps known to belong to the answer
        self._done = False
        self._draws: Any = None

    def push(self) -> None:
        """Note the step that was queued last, once `TokenChoice.advance` has counted it."""
        event = None
        if self._looks and self._choice.token.is_cuda:
            event = self._events.pop() if self._events else torch.cuda.Event()
            event.record()
        draws = None if self._random is None else self._random.position()
        self._waiting.append(_Step(self._choice.post, event, draws))

    def finished(self, run_ahead: int) -> bool:
        """Deliver all but the newest `run_ahead` steps; say whether one finished every row.

        Raises:
            RuntimeError: a row was to be sampled from probabilities that are NaN.
        """
        assert run_ahead < len(self._choice.posted), "a step would be overwritten unseen"
        while len(self._waiting) > run_ahead and not self._done:
            step = self._waiting.popleft()
            self._known += 1
            if not self._looks:
                continue
            if step.event is not None:
                step.event.synchronize()
                self._events.append(step.event)
            alive, sound = step.post[:2].tolist()
            if not sound:
                raise RuntimeError(
                    "expected probabilities to sample from, got NaN: the logits of a row are NaN, "
                    "or all -inf"
                )
            if self._streamer is not None:
                self._streamer.put(step.post[2:].clone())
            self._done, self._draws = not alive, step.draws
        return self._done

    def close(self) -> int:
        """Deliver the rest, end the stream, and return how many tokens the answer has."""
        self.finished(0)
        if self._random is not None and self._waiting:
            self._random.rewind(self._draws)
        if self._streamer is not None:
            self._streamer.end()
        return self._known


class _Random:
    """Torch's default generator of one device; reading its position does not wait for a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._generator = torch.default_generator
        if self._cuda:
            index = torch.cuda.current_device() if device.index is None else device.index
            self._generator = torch.cuda.default_generators[index]

    def position(self) -> Any:
        return self._generator.get_offset() if self._cuda else self._generator.get_state()

    def rewind(self, position: Any) -> None:
        if self._cuda:
            self._generator.set_offset(position)
        else:
            self._generator.set_state(position)
