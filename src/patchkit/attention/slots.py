"""The memory of one layer of the KV store: slots at fixed addresses, and who lives in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patchkit.backends import Backend
from patchkit.compat import ordinary_tensors

if TYPE_CHECKING:
    from patchkit.attention.eviction import EvictionPolicy

BOUND = 16
"""Granularity in tokens of a capacity that a budget bounds."""

_PER_SLOT = ("keys", "values", "position", "score")
"""Tensors with an entry for every slot."""

_PER_LIST = ("length", "seen", "list_start")
"""Tensors with an entry for every list."""


class Slots:
    """Keys, values, positions and scores of every slot, and the lists of slots in use.

    Whoever fills them says when there are tensors (`is_initialized`) and, before they are
    allocated, of which `dtype` and on which `device`.

    Args:
        backend: Moves tokens from slot to slot.
        policy: Keeps tensors of its own beside these, or None.

    Attributes:
        keys: `[B, H_kv, C, D]`.
        values: `[B, H_kv, C, D_v]`.
        position: `[B, H_kv, C]` int32, the column of a token, -1 in a free slot.
        score: `[B, H_kv, C]` float32 of a policy that ranks by score, else None.
        length: `[B, H_kv]` int32, slots in use.
        seen: `[B, H_kv]` int32, columns consumed.
        list_start: `[B, H_kv]` int32: where heads keep lists of different sizes, those of a row
            share its slots (what there is per slot then has 1 in place of H_kv), and this says
            where each begins. None: every list has C slots of its own.
        capacity: C.
        spare: Tensors of earlier tokens, whose addresses the next ones are to take over.
    """

    keys: Tensor
    values: Tensor
    position: Tensor
    length: Tensor
    seen: Tensor
    score: Tensor | None
    list_start: Tensor | None
    spare: dict[str, Tensor] | None
    capacity: int

    dtype: torch.dtype
    device: torch.device
    is_initialized: bool

    def __init__(self, backend: Backend, policy: EvictionPolicy | None) -> None:
        self.backend, self.policy = backend, policy
        self.free()

    def free(self) -> None:
        """Let go of keys, values and scores; of an empty layer nobody reads the rest."""
        self.keys = self.values = self.score = self.list_start = self.spare = None
        self.capacity = 0

    def allocate(self, key_shape: torch.Size, value_shape: torch.Size) -> None:
        """Take over what is spare, or start with lists that have no slots yet.

        Args:
            key_shape: `[B, H_kv, T, D]` of the first tokens.
            value_shape: `[B, H_kv, T, D_v]` of theirs.
        """
        if not self._spare_suits(key_shape, value_shape):
            self.spare = None
        if self.spare is not None and self.policy is None:
            self.hold(self.spare)
            self.spare = None
            return
        batch_size, num_kv_heads = key_shape[:2]
        slots = {"dtype": self.dtype, "device": self.device}
        counters = {"dtype": torch.int32, "device": self.device}
        with ordinary_tensors():
            self.keys = torch.zeros(batch_size, num_kv_heads, 0, key_shape[-1], **slots)
            self.values = torch.zeros(batch_size, num_kv_heads, 0, value_shape[-1], **slots)
            self.position = torch.full((batch_size, num_kv_heads, 0), -1, **counters)
            if self.policy is not None and self.policy.scored:
                self.score = torch.zeros(batch_size, num_kv_heads, 0, device=self.device)
            if self.spare is None:
                self.length = torch.zeros(batch_size, num_kv_heads, **counters)
                self.seen = torch.zeros(batch_size, num_kv_heads, **counters)
            else:  # whose slots wait for what a budget leaves of the prompt; see `move`
                self.length, self.seen = self.spare["length"], self.spare["seen"]

    def _spare_suits(self, key_shape: torch.Size, value_shape: torch.Size) -> bool:
        """Say whether the spare tensors are of this batch size, dtype and device."""
        if self.spare is None:
            return False
        lists = self.spare["length"].shape
        for held, shape in ((self.spare["keys"], key_shape), (self.spare["values"], value_shape)):
            alike = lists == shape[:2] and held.shape[3] == shape[3]
            if not alike or held.dtype != self.dtype or held.device != self.device:
                return False
        return True

    @property
    def batch_size(self) -> int:
        """Rows held, or -1 before the first token."""
        return self.keys.shape[0] if self.is_initialized else -1

    @property
    def nbytes(self) -> int:
        """Allocated bytes of keys, values and slot bookkeeping."""
        if not self.is_initialized:
            return 0
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors().values())

    @property
    def slot_bytes(self) -> int:
        """Bytes that one slot takes in every row and head together."""
        per_list = sum(
            tensor.element_size() * (tensor.shape[3] if tensor.ndim == 4 else 1)
            for tensor in self.slots().values()
        )
        return self.length.numel() * per_list

    def slots_within(self, most_bytes: int) -> int:
        """Return how many slots per head can be allocated in so many bytes."""
        return most_bytes // self.slot_bytes // BOUND * BOUND

    def slots(self) -> dict[str, Tensor]:
        """Return the tensors `[B, H_kv, C, ...]`, or `[B, 1, C, ...]` if lists share them."""
        held = {name: getattr(self, name) for name in _PER_SLOT}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor of the layer and its policy by its name."""
        held = self.slots() | {"length": self.length, "seen": self.seen}
        if self.list_start is not None:
            held["list_start"] = self.list_start
        return held if self.policy is None else held | self.policy.tensors()

    def hold(self, tensors: dict[str, Tensor]) -> None:
        """Replace tensors of the layer and its policy."""
        for name, tensor in tensors.items():
            setattr(self if name in _PER_SLOT + _PER_LIST else self.policy, name, tensor)
        self.capacity = self.keys.shape[2]

    def lists(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys, values and positions, `[B, H_kv, C, ...]`, as operations take them.

        `keys`, `values` and `position` themselves, and `score` beside `scores`, are the memory.
        """
        if self.list_start is None:
            return self.keys, self.values, self.position
        heads = self.list_start.shape[1]
        return (
            self.keys.expand(-1, heads, -1, -1),
            self.values.expand(-1, heads, -1, -1),
            self.position.expand(-1, heads, -1),
        )

    @property
    def scores(self) -> Tensor:
        """`[B, H_kv, C]` float32 of a layer whose policy ranks by score."""
        assert self.score is not None
        return self.score.expand(-1, self.length.shape[1], -1)

    def _empty(
        self, capacity: int, *, shared: bool = False, cleared: bool = True
    ) -> dict[str, Tensor]:
        """Allocate slots for every list, or for every row; free ones unless they need not be.

        A masked slot still multiplies its value with a weight of exactly 0, so no NaN may remain.
        """
        lists = (self.length.shape[0], 1 if shared else self.length.shape[1])
        slots = {}
        with ordinary_tensors():
            for name, tensor in self.slots().items():
                slots[name] = tensor.new_empty((*lists, capacity, *tensor.shape[3:]))
                if cleared:
                    slots[name].fill_(-1 if name == "position" else 0)
        return slots

    def grow(self, capacity: int, filled: int) -> None:
        """Move the first `filled` slots of every list into a longer one of `capacity`."""
        slots = self._empty(capacity)
        for name, tensor in self.slots().items():
            slots[name][:, :, :filled] = tensor[:, :, :filled]
        self.hold(slots)

    def move(self, keep: Tensor, count: Tensor, capacity: int, list_start: Tensor | None) -> None:
        """Copy some tokens into other slots, and let go of the rest.

        Args:
            keep: `[B, H_kv, N]` int32, ascending slot numbers.
            count: `[B, H_kv]` int32, entries of `keep` in use, or more than the list is long.
            capacity: Of the new lists, or rows.
            list_start: `[B, H_kv]` int32, where each list begins in a row. None: lists have slots
                of their own.
        """
        spare, self.spare = self.spare, None
        shared = list_start is not None
        if spare and spare["keys"].shape[2] == capacity and ("list_start" in spare) == shared:
            slots = {name: spare[name] for name in self.slots()}
        else:  # where lists have slots of their own, what lies behind them is emptied below
            spare = None
            slots = self._empty(capacity, shared=shared, cleared=shared)
        score, heads = slots.get("score"), self.length.shape[1]
        self.backend.run(
            "attention",
            "compact",
            self.device,
            *self.lists(),
            self.length,
            keep,
            count,
            slots["keys"].expand(-1, heads, -1, -1),
            slots["values"].expand(-1, heads, -1, -1),
            slots["position"].expand(-1, heads, -1),
            None if self.score is None else self.scores,
            None if score is None else score.expand(-1, heads, -1),
            self.list_start,
            list_start,
        )
        self.hold(slots)
        if list_start is not None and spare is not None:  # recorded steps know the address
            list_start = spare["list_start"].copy_(list_start)
        self.list_start = list_start
