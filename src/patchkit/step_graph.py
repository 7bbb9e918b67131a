"""One decoding step of a model over a `KVStore`, captured as a CUDA graph and replayed.

What a user pays for a token at small batch sizes is the launching of a thousand kernels. The store
keeps its addresses and reads its lengths on the device, so the unmodified forward of the model can
be recorded once and replayed for every further token. It is recorded anew when the store grows, and
when anything the recording froze has changed since (`fingerprint`).
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from patchkit.attention.store import KVStore
from patchkit.backends import Backend
from patchkit.decoding.eligibility import weights_at_rest
from patchkit.decoding.launches import StepLaunches, looks_through_torch
from patchkit.decoding.reference import MOST_SKINNY_ROWS
from patchkit.token_choice import TokenChoice

RESERVE = 1024
"""Most tokens for which slots are allocated ahead of a step."""

_NOT_READ = frozenset(
    [
        *("_modules", "_patchkit", "_non_persistent_buffers_set"),
        *("_state_dict_hooks", "_state_dict_pre_hooks"),
        *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
    ]
)
"""Attributes of a module that are looked at otherwise, or that no forward reads."""
_SCALARS = (bool, int, float, str, type(None))
_CONTAINERS = (OrderedDict, dict, set, list, tuple)
_OPAQUE = (PreTrainedConfig, nn.Module, type, FunctionType, MethodType)
_SDP = ("flash", "mem_efficient", "math", "cudnn")


class _Same:
    """Stands for one object, and keeps it alive: a new one cannot be taken for it."""

    __slots__ = ("_value",)

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)


def fingerprint(model: PreTrainedModel) -> Hashable:
    """Describe everything of a model that a recorded forward has frozen.

    That is the address and layout of every parameter and buffer, every plain attribute of every
    module (training flags, adapter scales, a RoPE length regime) and of the objects they hold, the
    values of the configuration, the code of every forward and of the rotary embedding in it, the
    global switches of torch, and the identity of everything else (hooks, replaced forwards). Values
    of tensors are not part of it: a replay reads them.
    """
    # One flat list of atoms: nested tuples would be many objects for the garbage collector to walk.
    atoms: list[Any] = list(_switches())
    _note(atoms, vars(model.config.get_text_config(decoder=True)))
    for module in model.modules():
        atoms += (_Same(module), type(module), type(module).forward)
        if (rotary := vars(module).get("_patchkit_rotary")) is not None:
            atoms.append(_Same(rotary.current))
        for name, value in vars(module).items():
            if name not in _NOT_READ:
                atoms.append(name)
                kind = type(value)  # most are one of the first two
                if kind in _SCALARS:
                    atoms.append(value)
                elif kind in _CONTAINERS and not value:
                    atoms.append(kind)
                else:
                    _note(atoms, value)
    return tuple(atoms)


def _switches() -> tuple[Any, ...]:
    backends = torch.backends
    return (
        backends.cuda.matmul.allow_tf32,
        backends.cudnn.allow_tf32,
        backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        torch.get_float32_matmul_precision(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        *(getattr(backends.cuda, f"{kind}_sdp_enabled")() for kind in _SDP),
    )


def _note(atoms: list[Any], value: Any) -> None:
    """Append what tells `value` from another one, however deep in containers it lies."""
    if isinstance(value, _SCALARS):
        atoms.append(value)
    elif isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):  # a wrapper, of quantised weights for one
            for name in value.__tensor_flatten__()[0]:
                _note(atoms, getattr(value, name))
        else:
            layout = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
            atoms.extend(layout)
    elif isinstance(value, dict):
        atoms.append(len(value))
        for key, entry in value.items():
            atoms.append(str(key))
            _note(atoms, entry)
    elif isinstance(value, (list, tuple, set)):
        atoms.append(len(value))
        for entry in value:
            _note(atoms, entry)
    else:
        atoms.append(_Same(value))
        if not isinstance(value, _OPAQUE):
            fields = getattr(value, "__dict__", {})
            atoms.extend(v for v in fields.values() if isinstance(v, _SCALARS))


def _makeup(model: PreTrainedModel) -> Hashable:
    """Describe what decides which kernels a step of the model launches."""
    modules = set()
    for module in model.modules():
        held = [p for p in module._parameters.values() if p is not None]
        shapes = tuple((p.shape, p.stride(), p.dtype) for p in held)
        hooked = bool(module._forward_hooks or module._forward_pre_hooks)
        modules.add((type(module), hooked, shapes))
    return frozenset(modules)


class GraphPool:
    """Memory and knowledge that the graphs of one model share.

    Attributes:
        captures: Graphs recorded so far.
        replays: Steps replayed so far.
        eager: Steps run kernel by kernel so far.
        refused: Why recording failed last, if it did.
        parked: The step of an earlier call, whose store nobody else holds, for a call to take.
    """

    def __init__(self) -> None:
        self.captures = self.replays = self.eager = 0
        self.refused: str | None = None
        self.parked: StepGraph | None = None
        self._stream: torch.cuda.Stream | None = None
        self._handle: Any = None
        self._anchor: torch.cuda.CUDAGraph | None = None
        self._built: set[Hashable] = set()
        self._doubtful: set[Hashable] = set()
        self._hopeless: set[Hashable] = set()

    def record(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Record what `step` launches, without running it.

        Raises:
            RuntimeError: something in `step` cannot be captured.
        """
        if self._stream is None or self._stream.device.index != torch.cuda.current_device():
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

    def failed(self, key: Hashable, reason: str) -> None:
        """Remember that a step of a kind could not be recorded.

        A second time is the last: the first may have met a kernel that was not built yet, which
        the step that now follows does.
        """
        if key in self._doubtful:
            self._hopeless.add(key)
            self.refused = reason
        self._doubtful.add(key)

    def hopeless(self, key: Hashable) -> bool:
        """Say whether recording steps of this kind has failed twice."""
        return key in self._hopeless

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
        backend: Runs the kernels that serve only a step.

    Attributes:
        logits: `[B, V]` float32 of the latest step.
    """

    logits: Tensor

    def __init__(
        self,
        model: PreTrainedModel,
        store: KVStore,
        choice: TokenChoice,
        pool: GraphPool,
        backend: Backend,
    ) -> None:
        self.store, self.choice = store, choice
        self._model, self._pool, self._backend = model, pool, backend
        self._few = choice.token.shape[0] <= MOST_SKINNY_ROWS
        self._inputs: dict[str, Any] = {}
        self._position: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._recorded: Hashable = None
        self._evicts: tuple[bool, ...] = ()  # layers whose recorded step evicts
        self._full = False  # the memory of the device, when recording was tried

    def begin(self, inputs: dict[str, Any], position: Tensor, remaining: int) -> None:
        """Set out from a prompt that the store holds.

        Args:
            inputs: What `forward` takes besides token and position.
            position: `[..., B, 1]` int64, of the next token; every step adds one.
            remaining: Steps to come, at most.
        """
        if self._position is None or self._position.shape != position.shape:
            with torch.inference_mode(False):
                self._position, self._graph = position.clone(), None
        self._position.copy_(position)
        self._full = False
        self._inputs = {**inputs, "input_ids": self.choice.token, "position_ids": self._position}
        if self._graph is not None and not self._still_true(remaining):
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
        with contextlib.ExitStack() as stack:
            if self._few:
                together = looks_through_torch(self._model)
                if together and self.choice.token.is_cuda:  # known code, which writes none
                    stack.enter_context(weights_at_rest(self._model))
                stack.enter_context(StepLaunches(self._backend, together))
            outputs = self._model(**self._inputs, return_dict=True)
        self.logits = outputs.logits[:, -1].to(torch.float32, copy=True)
        assert self._position is not None
        self._position += 1

    def _record(self, remaining: int) -> torch.cuda.CUDAGraph | None:
        pool, store = self._pool, self.store
        chosen = self.choice.kind if self.choice.capturable else None
        kind = (store.layout, chosen, _makeup(self._model))
        if not self.choice.token.is_cuda or self._full or pool.hopeless(kind):
            return None
        if pool.first_time(kind):
            return None

        evicts = store.evicts_within(remaining)

        def step() -> None:
            self._forward()
            if self.choice.capturable:
                self.choice.choose(self.logits)

        try:
            with store.stepping(remaining, recording=True):
                graph = pool.record(step)
        except torch.OutOfMemoryError:
            self._full = True  # for this call; another may find room
            return None
        except RuntimeError as error:
            pool.failed(kind, str(error).splitlines()[0])
            return None
        self._recorded, self._evicts = self._frozen(), evicts
        return graph

    def _still_true(self, remaining: int) -> bool:
        """Say whether the recording serves the steps to come; evicting in vain does no harm."""
        needed = zip(self.store.evicts_within(remaining), self._evicts, strict=True)
        return self._recorded == self._frozen() and all(had for needs, had in needed if needs)

    def _frozen(self) -> Hashable:
        inputs: list[Any] = []
        _note(inputs, {k: v for k, v in self._inputs.items() if v is not self.store})
        recipe = self.choice.recipe if self.choice.capturable else None
        return fingerprint(self._model), self.store.addresses, recipe, tuple(inputs)
