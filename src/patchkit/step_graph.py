"""One decoding step of a model over a `KVStore`, captured as a CUDA graph and replayed.

What a user pays for a token at small batch sizes is the launching of a thousand kernels. The store
keeps its addresses and reads its lengths on the device, so the unmodified forward of the model can
be recorded once and replayed for every further token. It is recorded anew when the store grows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from patchkit.attention.store import KVStore

RESERVE = 1024
"""Most tokens for which slots are allocated ahead of a step."""


class GraphPool:
    """Memory and knowledge that the graphs of one model share.

    Attributes:
        captures: Graphs recorded so far.
        replays: Steps replayed so far.
        eager: Steps run kernel by kernel so far.
        refused: Why recording failed, if it did; no other attempt is made.
    """

    def __init__(self) -> None:
        self.captures = self.replays = self.eager = 0
        self.refused: str | None = None
        self._handle: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._compiled: set[tuple[Any, ...]] = set()

    def record(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Record what `step` launches, without running it.

        Raises:
            RuntimeError: something in `step` cannot be captured.
        """
        if self._stream is None:
            self._handle = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        # torch.cuda.graph would collect garbage and empty the allocator's cache first, which costs
        # more than the recording.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._handle, capture_error_mode="thread_local")
            try:
                step()
            except BaseException:
                self._abandon(graph)
                raise
            graph.capture_end()
        current.wait_stream(self._stream)
        self.captures += 1
        return graph

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        with contextlib.suppress(RuntimeError):  # invalidated; the error in flight says why
            graph.capture_end()
        self._handle = self._stream = None

    def first_time(self, key: tuple[Any, ...]) -> bool:
        """Say once per key that kernels may have to be built, which recording does not allow."""
        known = key in self._compiled
        self._compiled.add(key)
        return not known

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphPool:
        return GraphPool()


class StepGraph:
    """Runs the model for one token per row, then `tail` on its logits, at fixed addresses.

    Args:
        model: The patched model.
        store: Its cache, holding the prompt.
        inputs: What `forward` takes besides token and position.
        token: `[B, 1]` int64, read by every step; the tail writes the next one.
        position: `[..., B, 1]` int64, position of the next token; every step adds one.
        tail: Called with the logits `[B, V]` float32 of a step.
        tail_in_graph: Whether the tail may be recorded.
        pool: Shared by the graphs of the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        store: KVStore,
        inputs: dict[str, Any],
        token: Tensor,
        position: Tensor,
        tail: Callable[[Tensor], None],
        tail_in_graph: bool,
        pool: GraphPool,
    ) -> None:
        self._model, self._store, self._pool = model, store, pool
        self._inputs = {**inputs, "input_ids": token, "position_ids": position}
        self._position, self._tail, self._tail_in_graph = position, tail, tail_in_graph
        self._graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor = torch.empty(0)

    def run(self, remaining: int) -> None:
        """Advance the store by one token per row and leave the logits in `logits`.

        Args:
            remaining: Steps to come, this one included.
        """
        if self._store.room < 1:
            self._store.reserve(min(remaining, RESERVE))
            self._graph = None
        if self._graph is None:
            self._graph = self._record(remaining)
        if self._graph is not None:
            self._graph.replay()
            self._store.advance()
            self._pool.replays += 1
            if self._tail_in_graph:
                return
        else:
            with self._store.stepping(remaining):
                self._forward()
            self._pool.eager += 1
        self._tail(self.logits)

    def _forward(self) -> None:
        outputs = self._model(**self._inputs, return_dict=True)
        self.logits = outputs.logits[:, -1].to(torch.float32, copy=True)
        self._position += 1

    def _record(self, remaining: int) -> torch.cuda.CUDAGraph | None:
        pool, store = self._pool, self._store
        if pool.refused is not None or not self._position.is_cuda:
            return None
        if pool.first_time((store.layout, self._tail_in_graph)):
            return None

        def step() -> None:
            self._forward()
            if self._tail_in_graph:
                self._tail(self.logits)

        try:
            with store.stepping(remaining, recording=True):
                return pool.record(step)
        except RuntimeError as error:
            pool.refused = str(error).splitlines()[0]
            return None
