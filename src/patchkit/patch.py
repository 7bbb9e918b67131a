"""The state that one patched model carries, under `_patchkit` on the model and its modules."""

from __future__ import annotations

import copy
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patchkit.backends import Backend
from patchkit.configs import OwnConfig
from patchkit.families import Family
from patchkit.journal import Journal
from patchkit.method import Method
from patchkit.step_graph import GraphPool, StepGraph

if TYPE_CHECKING:
    from patchkit.attention.store import KVStore
    from patchkit.attention.store_layer import StoreLayer


@dataclass
class ActiveCall:
    """What a `generate()` call brings that transformers hands to nobody.

    Attributes:
        methods: The methods in force, by slot.
        streamer: Receives tokens, or None.
        tokenizer: The tokenizer of the call, or None.
        served: Whether the call goes to patchkit's decoding loop.
        step: The parked step that the call has taken, until its loop begins.
    """

    methods: dict[str, Method]
    streamer: Any = None
    tokenizer: Any = None
    served: bool = False
    step: StepGraph | None = None


class Patch:
    """Everything patchkit knows about one patched model.

    Attributes:
        family: Where the parts of the model are.
        backend: The backend requested, and the calls made so far.
        journal: The edits, for `restore`.
        configs: The model's own configuration copies, for `restore`.
        methods: Applied methods in order, each with the modules it acts on.
        skipped: Methods that found nothing to act on, with the reason (`strict=False`).
        fused: Modules that kernels compute, of how many, by their kind.
        graphs: Recorded decoding steps.
        host_loops: How many calls ran transformers' own decoding loop on a GPU, by reason.
        lock: Held by the `generate()` call that runs; other threads wait for it.
    """

    def __init__(self, family: Family, backend: Backend) -> None:
        self.family = family
        self.backend = backend
        self.journal = Journal()
        self.configs: list[OwnConfig] = []
        self.methods: list[tuple[Method, tuple[str, ...]]] = []
        self.skipped: list[tuple[Method, str]] = []
        self.fused: dict[str, tuple[int, int]] = {}
        self.graphs = GraphPool()
        self.host_loops: Counter[str] = Counter()
        self.lock = threading.RLock()
        self._calls: list[ActiveCall] = []
        self._store: weakref.ref[KVStore] | None = None

    def applied(self) -> dict[str, Method]:
        """Return the methods that stay on until `restore`, by slot."""
        return {slot: method for method, _ in self.methods for slot in method.slots}

    def active(self) -> dict[str, Method]:
        """Return the methods in force now, by slot: the current call's, else the applied ones."""
        return self.running.methods

    @property
    def running(self) -> ActiveCall:
        """The `generate()` call that is running; an empty one outside of any."""
        return self._calls[-1] if self._calls else ActiveCall(self.applied())

    @contextmanager
    def call(self, call: ActiveCall) -> Iterator[None]:
        """Put a `generate()` call in force while it runs; calls may nest."""
        self._calls.append(call)
        try:
            yield
        finally:
            self._calls.pop()

    @property
    def store(self) -> KVStore | None:
        """The store of the latest forward pass, while somebody still holds it."""
        return self._store() if self._store is not None else None

    @store.setter
    def store(self, store: KVStore | None) -> None:
        self._store = None if store is None else weakref.ref(store)

    def store_layer(self, layer_idx: int) -> StoreLayer | None:
        """Return the store layer that serves an attention module in this forward pass."""
        from patchkit.attention.store_layer import StoreLayer

        store = self.store
        layer = store.layers[layer_idx] if store is not None else None
        return layer if isinstance(layer, StoreLayer) else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Patch:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        state = {**self.__dict__, "_store": None, "_calls": []}
        del state["lock"]
        twin.__dict__.update(copy.deepcopy(state, memo), lock=threading.RLock())
        return twin

    def __reduce__(self) -> Any:
        raise TypeError(
            "a patched model cannot be pickled; call patchkit.restore(model) first, or use "
            "save_pretrained, which writes the plain model"
        )
