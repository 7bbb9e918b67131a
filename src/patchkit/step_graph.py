"""One decoding step of a model over a `KVStore`, captured as a CUDA graph and replayed.

What a user pays for a token at small batch sizes is the launching of a thousand kernels. The store
keeps its addresses and reads its lengths on the device, so the unmodified forward of the model can
be recorded once and replayed for every further token. It is recorded anew when the store grows, and
when anything the recording froze has changed since (`fingerprint`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from patchkit.attention.store import KVStore
from patchkit.token_choice import TokenChoice

RESERVE = 1024
"""Most tokens for which slots are allocated ahead of a step."""

_NOT_READ = frozenset({"_modules", "_patchkit"})
_SCALARS = (bool, int, float, str, type(None))


def fingerprint(model: PreTrainedModel) -> Hashable:
    """Describe everything of a model that a recorded forward has frozen.

    That is the address and layout of every parameter and buffer, every plain attribute of every
    module (training flags, adapter scales, a RoPE length regime), the values of the configuration,
    and the identity of everything else (hooks, replaced forwards). Values of tensors are not part
    of it: a replay reads them.
    """
    described: list[Hashable] = [_trace(vars(model.config.get_text_config(decoder=True)))]
    for module in model.modules():
        held = ((name, _trace(v)) for name, v in vars(module).items() if name not in _NOT_READ)
        described.append((id(module), *held))
    return tuple(described)


def _trace(value: Any) -> Hashable:
    if isinstance(value, _SCALARS):
        return value
    if isinstance(value, Tensor):
        return value.data_ptr(), value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, dict):
        return tuple((str(key), _trace(entry)) for key, entry in value.items())
    if isinstance(value, (list, tuple, set)):
        return tuple(map(_trace, value))
    return id(value)


class GraphPool:
    """Memory and knowledge that the graphs of one model share.

    Attributes:
        captures: Graphs recorded so far.
        replays: Steps replayed so far.
        eager: Steps run kernel by kernel so far.
        refused: Why recording failed, if it did; no other attempt is made.
        parked: The step of the latest call, whose store nobody holds, for the next call to take.
    """

    def __init__(self) -> None:
        self.captures = self.replays = self.eager = 0
        self.refused: str | None = None
        self.parked: StepGraph | None = None
        self._stream: torch.cuda.Stream | None = None
        self._handle: Any = None
        self._anchor: torch.cuda.CUDAGraph | None = None
        self._built: set[Hashable] = set()

    def record(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Record what `step` launches, without running it.

        Raises:
            RuntimeError: something in `step` cannot be captured.
        """
        if self._stream is None:
            self._stream = torch.cuda.Stream()
            self._handle = torch.cuda.graph_pool_handle()
            # The pool lives as long as one of its graphs, and must outlive those that are replaced.
            self._anchor = self._capture(self._stream, lambda: torch.zeros(1, device="cuda"))
        graph = self._capture(self._stream, step)
        self.captures += 1
        return graph

    def _capture(self, stream: torch.cuda.Stream, step: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        random_state = torch.cuda.get_rng_state()
        stream.wait_stream(current)
        # torch.cuda.graph would collect garbage and empty the allocator's cache first, which costs
        # more than the recording.
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=self._handle, capture_error_mode="thread_local")
            try:
                step()
            except BaseException:
                _abandon(graph, random_state)
                self._stream = None
                raise
            graph.capture_end()
        current.wait_stream(stream)
        return graph

    def first_time(self, key: Hashable) -> bool:
        """Say once per key that kernels may have to be built, which recording does not allow."""
        known = key in self._built
        self._built.add(key)
        return not known

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphPool:
        return GraphPool()


def _abandon(graph: torch.cuda.CUDAGraph, random_state: Tensor) -> None:
    """End an invalid capture and give torch a generator that does not believe in it any more."""
    with contextlib.suppress(RuntimeError):  # the error in flight says why
        graph.capture_end()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    fresh = torch.Generator(generator.device)
    fresh.set_state(random_state)
    generator.graphsafe_set_state(fresh.graphsafe_get_state())


class StepGraph:
    """Runs the model for one token per row and chooses the next, at fixed addresses.

    Args:
        model: The patched model.
        store: Its cache.
        choice: Chooses tokens; its `token` is the input of every step.
        pool: Shared by the graphs of the model.

    Attributes:
        logits: `[B, V]` float32 of the latest step.
    """

    logits: Tensor

    def __init__(
        self, model: PreTrainedModel, store: KVStore, choice: TokenChoice, pool: GraphPool
    ) -> None:
        self.store, self.choice = store, choice
        self._model, self._pool = model, pool
        self._inputs: dict[str, Any] = {}
        self._position: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._recorded: Hashable = None

    def begin(self, inputs: dict[str, Any], position: Tensor) -> None:
        """Set out from a prompt that the store holds.

        Args:
            inputs: What `forward` takes besides token and position.
            position: `[..., B, 1]` int64, of the next token; every step adds one.
        """
        if self._position is None or self._position.shape != position.shape:
            self._position, self._graph = position.clone(), None
        self._position.copy_(position)
        self._inputs = {**inputs, "input_ids": self.choice.token, "position_ids": self._position}
        if self._graph is not None and self._recorded != self._frozen():
            self._graph = None

    def run(self, remaining: int) -> None:
        """Advance the store by one token per row and choose the next.

        Args:
            remaining: Steps to come, this one included.
        """
        pool, store = self._pool, self.store
        if store.room < 1:
            store.reserve(min(remaining, RESERVE))
            self._graph = None
        if self._graph is None:
            self._graph = self._record(remaining)
        if self._graph is not None:
            self._graph.replay()
            store.advance()
            pool.replays += 1
            if self.choice.capturable:
                return
        else:
            with store.stepping(remaining):
                self._forward()
            pool.eager += 1
        self.choice.choose(self.logits)

    def _forward(self) -> None:
        outputs = self._model(**self._inputs, return_dict=True)
        self.logits = outputs.logits[:, -1].to(torch.float32, copy=True)
        assert self._position is not None
        self._position += 1

    def _record(self, remaining: int) -> torch.cuda.CUDAGraph | None:
        pool, store = self._pool, self.store
        if pool.refused is not None or not self.choice.token.is_cuda:
            return None
        if pool.first_time((store.layout, self.choice.capturable)):
            return None

        def step() -> None:
            self._forward()
            if self.choice.capturable:
                self.choice.choose(self.logits)

        try:
            with store.stepping(remaining, recording=True):
                graph = pool.record(step)
        except RuntimeError as error:
            pool.refused = str(error).splitlines()[0]
            return None
        self._recorded = self._frozen()
        return graph

    def _frozen(self) -> Hashable:
        inputs = {name: value for name, value in self._inputs.items() if value is not self.store}
        recipe = self.choice.recipe if self.choice.capturable else None
        return fingerprint(self._model), self.store.addresses, recipe, _trace(inputs)
