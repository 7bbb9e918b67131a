"""Choose the next token of every row on the device, as transformers' own sampling loop does.

Logits processors that `device_processors` can translate, and the end tokens, run on the device over
a preallocated id buffer; all other processors and criteria run as they are, on the host. Drawing
takes the random numbers of `torch.multinomial` in the same order, so a seed gives the tokens that
it gives without patchkit, but nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.generation import GenerationConfig

from patchkit.backends import Backend
from patchkit.decoding import reference
from patchkit.device_processors import DeviceProcessor, merged, on_device


def draw(scores: Tensor, sound: Tensor, backend: Backend) -> Tensor:
    """Sample a token of every row of `scores [B, V]` without waiting for the device.

    The noise is that of `torch.multinomial`, so it is drawn alike.

    Args:
        scores: `[B, V]`.
        sound: `[]` bool. Written: False if any probability is not a number; otherwise it stays.
        backend: Runs the kernels.

    Returns:
        `[B]` int64.
    """
    noise = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device).exponential_(1)
    if scores.dtype != torch.float32 or scores.device != sound.device:  # of a custom processor
        return reference.sample(scores, noise, sound)
    return backend.run("decoding", "sample", scores.device, scores, noise, sound)


class TokenChoice:
    """The ids generated so far, which rows are finished, and the rule for the next token.

    Everything a recorded `choose` touches keeps its address from one call to the next.

    Args:
        batch_size: Rows.
        width: Tokens per row that there is room for, prompt included.
        posts: Steps that stay posted until later ones take their place: at least those that the
            host queues before it has looked at the first.
        device: Of the logits.
        backend: Runs the kernels.

    Attributes:
        ids: `[B, width]` int64; the first `length` columns are valid.
        length: Prompt plus chosen tokens.
        token: `[B, 1]` int64, the newest token of every row.
        posted: `[posts, B + 2]` int64, a ring in memory of the host. The step that filled column
            `c` lies in row `c % posts`: whether any row is unfinished, whether every probability
            that was drawn from was a number, and the tokens. The GPU writes it itself: a copy
            between two replays would keep the second waiting (10 us on an H200).
        watches: Whether `posted` can end a call, which otherwise its length alone does.
        scores: `[B, V]` float32, what the newest token was chosen from.
        history: Scores of earlier steps, if they are kept, for criteria that ask for them.
    """

    scores: Tensor

    def __init__(
        self, batch_size: int, width: int, posts: int, device: torch.device, backend: Backend
    ) -> None:
        self._backend = backend
        ids, flags = ({"dtype": kind, "device": device} for kind in (torch.int64, torch.bool))
        with torch.inference_mode(False):  # what is kept must serve any later mode
            self.ids = torch.zeros(batch_size, width, **ids)
            self.token = torch.zeros(batch_size, 1, **ids)
            self.posted = torch.zeros(
                posts, batch_size + 2, dtype=torch.int64, pin_memory=device.type == "cuda"
            )
            self._unfinished = torch.ones(batch_size, **flags)
            self._sound = torch.ones((), **flags)
            self._column = torch.zeros(1, **ids)
        self._ends: Tensor | None = None
        self._pad: Tensor | None = None
        self._processors: list[DeviceProcessor | LogitsProcessorList] = []

    def begin(
        self,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
    ) -> None:
        """Set out from a prompt.

        Args:
            input_ids: `[B, P]` int64.
            processors: What transformers prepared for this call.
            criteria: Likewise.
            config: The prepared generation configuration.
        """
        self.length = input_ids.shape[1]
        self.ids[:, : self.length] = input_ids
        self._column.fill_(self.length)
        # Torch gives pinned memory away once its tensor is gone and the copies that it knows of are
        # done; it knows of no kernel. After this copy it waits for all that the stream has queued.
        self.posted[0, :1].copy_(self._column, non_blocking=True)
        self._unfinished.fill_(True)
        self._sound.fill_(True)
        self.history: tuple[Tensor, ...] | None = None
        steps = merged(processors)
        with torch.inference_mode(False):
            self._processors = [
                self._translate(processor, held)
                for processor, held in zip_longest(steps, self._processors[: len(steps)])
            ]
        self._sampling = bool(config.do_sample)
        self._criteria = StoppingCriteriaList(
            c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)
        )
        pad = (
            config._pad_token_tensor if any(hasattr(c, "eos_token_id") for c in criteria) else None
        )
        ends = [c.eos_token_id.view(1, -1) for c in criteria if type(c) is EosTokenCriteria]
        with torch.inference_mode(False):
            self._ends = self._place(self._ends, torch.cat(ends, 1) if ends else None)
            self._pad = self._place(self._pad, pad)
        self.watches = bool(ends) or bool(self._criteria) or self._sampling

    def _place(self, held: Tensor | None, value: Tensor | None) -> Tensor | None:
        if value is None or held is None or held.shape != value.shape:
            return None if value is None else value.to(self.ids.device, torch.int64, copy=True)
        return held.copy_(value)

    def _translate(
        self, processor: LogitsProcessor, held: object
    ) -> DeviceProcessor | LogitsProcessorList:
        twin = on_device(processor, self.ids, self.length, self._backend)
        return LogitsProcessorList([processor]) if twin is None else twin.renewed(held)

    @property
    def capturable(self) -> bool:
        """Whether `choose` needs nothing of the host, so that a CUDA graph can hold it."""
        plain = all(isinstance(process, DeviceProcessor) for process in self._processors)
        return plain and not self._criteria

    @property
    def kind(self) -> Hashable:
        """What operations a recorded `choose` consists of, wherever its tensors lie."""
        return self._sampling, tuple(getattr(p, "settings", None) for p in self._processors)

    @property
    def recipe(self) -> Hashable:
        """What a recording of `choose` has frozen, besides addresses that never change."""
        held = (t for t in (self._ends, self._pad) if t is not None)
        addresses = tuple((tensor.data_ptr(), tensor.shape) for tensor in held)
        processors = (p.recipe for p in self._processors if isinstance(p, DeviceProcessor))
        return addresses, self._sampling, tuple(processors)

    def choose(self, logits: Tensor) -> None:
        """Write the next token of every row to `token`, `ids` and `posted`.

        Only device operations, unless a custom processor or criterion brings others. The caller
        counts `length` with `advance`, since a recorded `choose` runs no Python.

        Args:
            logits: `[B, V]` float32.
        """
        for process in self._processors:
            if isinstance(process, DeviceProcessor):
                logits = process(self.ids, self._column, logits)
            else:  # which may keep what it gets
                logits = process(self.ids[:, : self.length].clone(), logits.clone())
        self.scores = logits
        run = partial(self._backend.run, "decoding")
        if self._sampling:
            chosen = draw(logits, self._sound, self._backend)
        elif logits.dtype == torch.float64:  # of a custom processor; kernels know less
            chosen = logits.argmax(-1)
        else:
            chosen = run("argmax", logits.device, logits)
        device = self.ids.device
        held = (self.token, self.ids, self._column, self._unfinished, self._sound, self.posted)
        run("settle", device, chosen.to(device), *held, self._pad, self._ends)
        if self._criteria:
            scores = None if self.history is None else (*self.history, logits)
            done = self._criteria(self.ids[:, : self.length + 1].clone(), scores)
            self._unfinished &= ~done.to(self._unfinished.device)
            alive = self._unfinished.any().to(torch.int64)
            self.posted[self.length % len(self.posted), 0].copy_(alive, non_blocking=True)

    def advance(self) -> None:
        """Count one chosen token on the host."""
        self.length += 1

    @property
    def post(self) -> Tensor:
        """What the step counted last posts, `[B + 2]` int64, once a GPU has run it."""
        return self.posted[(self.length - 1) % len(self.posted)]

    def sequences(self, length: int) -> Tensor:
        """Return the first `length` columns, prompt included, `[B, length]` int64."""
        return self.ids[:, :length].clone()
