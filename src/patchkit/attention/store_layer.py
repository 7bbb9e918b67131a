"""One layer of the KV store: fixed-address slots, and the bookkeeping of what each one holds."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from patchkit.attention.eviction import EvictionPolicy
from patchkit.attention.forward_pass import ForwardPass
from patchkit.attention.slots import BOUND, Slots
from patchkit.backends import Backend
from patchkit.compat import ordinary_tensors
from patchkit.errors import CacheError

BUCKET = 256
"""Granularity in tokens of a capacity that grows."""

_COUNTERS = ("columns", "filled", "rollback", "ragged", "ordered")
"""What the host knows of a layer between two forward passes."""


def _bucket(tokens: int, step: int = BUCKET) -> int:
    return max(1, math.ceil(tokens / step)) * step


class StoreLayer(Slots, CacheLayerMixin):
    """The slots of one attention layer, filled by forward passes and emptied by a policy.

    A forward pass calls `update` (append the chunk, hand out the slots), attends, then calls
    `commit` (enforce the budget). The attention function registered by patchkit does the latter.

    Args:
        forward: State shared by the layers of a store.
        backend: Runs the slot operations.
        policy: Eviction policy, or None to keep every token.
        sliding_window: Tokens a query may look back, counting itself. Such a layer keeps the
            newest `sliding_window - 1` tokens even without a policy of its own.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(
        self,
        forward: ForwardPass,
        backend: Backend,
        policy: EvictionPolicy | None = None,
        sliding_window: int | None = None,
    ) -> None:
        if policy is None and sliding_window is not None:
            policy = EvictionPolicy(sliding_window - 1, sliding_window=sliding_window)
        Slots.__init__(self, backend, policy)
        CacheLayerMixin.__init__(self)
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self._forward = forward
        self.reset()

    # -- between two passes -------------------------------------------------------------------

    def reset(self) -> None:
        """Drop every token and free the memory."""
        self.free()
        self.is_initialized = False
        self.columns = 0
        self.filled = 0  # host-side upper bound on `length`
        self.rollback = 0  # newest columns that `crop` can still remove
        self.ragged = False  # rows may differ in length or hold holes
        self.ordered = True  # positions ascend with the slots
        self.record_past = False  # see `activate_past_recording`
        self._step = self._forward.step
        self._open = 0  # tokens appended but not yet committed
        self.overdue = False  # an eviction was deferred for `crop`

    def restart(self) -> dict[str, Tensor] | None:
        """Drop every token, but keep the slots for the next ones, at the same addresses.

        Returns:
            The tensors that are kept, for the caller to empty, or None.
        """
        spare = self.tensors() if self.is_initialized else None
        self.reset()
        self.spare = spare
        return spare

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take batch size, heads, dtype and device from the first chunk `[B, H_kv, T, D]`."""
        self.dtype, self.device = key_states.dtype, key_states.device
        if torch.is_autocast_enabled(self.device.type):  # RoPE leaves it for float32
            self.dtype = torch.get_autocast_dtype(self.device.type)
        self.allocate(key_states.shape, value_states.shape)
        if self.policy is not None:
            with ordinary_tensors():
                self.policy.allocate(self)
        self.is_initialized = True

    @property
    def _per_head(self) -> bool:
        return self.policy is not None and self.policy.per_head

    @property
    def dense_bytes(self) -> int:
        """Bytes of keys and values that a cache without eviction would hold by now."""
        if not self.is_initialized:
            return 0
        width = self.keys.shape[3] + self.values.shape[3]
        return self.length.numel() * self.columns * width * self.keys.element_size()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what a layer between two passes holds: its tensors, and the host's bookkeeping."""
        tensors = self.tensors() if self.is_initialized else {}
        for name in self.slots() if self.list_start is None else ():
            tensors[name] = tensors[name][:, :, : self.filled]
        counters = {name: getattr(self, name) for name in _COUNTERS}
        return tensors, counters | {"policy": self.policy and self.policy.counters()}

    def load_state(self, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
        """Take a state over; the tensors `keys`, `values`, ... become the layer's own."""
        self.reset()
        policy = counters.pop("policy")
        self.__dict__.update(counters)
        if not tensors:
            return
        self.is_initialized = True
        self.hold(tensors)
        self.dtype, self.device = self.keys.dtype, self.keys.device
        if self.policy is not None:
            self.policy.load_counters(policy)
            self._reserve(1)

    def _reserve(self, new_tokens: int) -> None:
        needed = self.filled + new_tokens
        if needed <= self.capacity:
            return
        capacity = _bucket(needed)
        if self.policy is not None and needed <= self.policy.highest + 1:
            capacity = min(capacity, _bucket(self.policy.highest + 1, BOUND))
        self.grow(capacity, self.filled)

    # -- one forward pass -------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append a chunk and return the slots that attention must see.

        Args:
            key_states: `[B, H_kv, T, D]`, float. Keys after RoPE. Converted to the dtype of the
                store, which the first chunk (or autocast) decides.
            value_states: `[B, H_kv, T, Dv]`, likewise.

        Returns:
            Views `[B, H_kv, filled, D]` and `[B, H_kv, filled, Dv]` of the slots, in slot order;
            of all `capacity` slots while a step is recorded and where lists share them.

        Raises:
            CacheError: the model that runs is not patched, another attention function ran in
                between, batch size or device changed, or gradients would be lost.
        """
        if self._open or self._step == self._forward.step:
            raise CacheError(
                "a KVStore serves only the patched model it was made for, through patchkit's "
                "attention function; this forward pass comes from somewhere else (was the model "
                "restored, or its attention implementation changed?)"
            )
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise CacheError(
                "a KVStore keeps no gradients: run under torch.no_grad(), or pass use_cache=False"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.batch_size:
            raise CacheError(
                f"the store holds {self.batch_size} rows, got a chunk of {key_states.shape[0]}"
            )
        if key_states.device != self.device:
            raise CacheError(
                f"the store lives on {self.device}, got a chunk on {key_states.device}; "
                "a store does not follow a model that moves"
            )
        new_tokens = key_states.shape[-2]
        if not key_states.dtype == value_states.dtype == self.dtype:  # else nobody looks at them
            key_states, value_states = key_states.to(self.dtype), value_states.to(self.dtype)
        self._step = self._forward.step
        if self.list_start is not None and (new_tokens > 1 or self.record_past):
            self._unpack(new_tokens)  # a list has room for one token, which evicts another
        bounded = self.policy is not None  # compaction follows, which makes room of its own
        ahead = 0 if bounded else self._forward.until - self.columns
        self._reserve(max(new_tokens, ahead))
        valid = self._forward.valid_on(self.device)
        self.ragged |= valid is not None
        self.backend.run(
            "attention",
            "append",
            self.device,
            *self.lists(),
            self.length,
            self.seen,
            key_states,
            value_states,
            valid,
            start=None if self.ragged or self._per_head else self.filled,
            list_start=self.list_start,
        )
        if self.policy is not None and (new_tokens > 1 or self.columns == 0):
            self.policy.count(new_tokens, valid)
        self.columns += new_tokens
        self.filled += new_tokens
        self.rollback += new_tokens
        self._open = new_tokens
        keys, values, _ = self.lists()
        whole = self._forward.recording or self.list_start is not None
        shown = self.capacity if whole else self.filled
        return keys[:, :, :shown], values[:, :, :shown]

    @property
    def newest(self) -> int:
        """Tokens of the pass that is under way."""
        return self._open

    @property
    def padding(self) -> Tensor | None:
        """`[B, T]` bool, True for the padding among the tokens of this pass; None for none."""
        valid = self._forward.valid_on(self.device)
        return None if valid is None else ~valid

    def count_valid(self) -> Tensor:
        """Count the tokens of this pass that are no padding, `[B, 1]`; for a pass with padding."""
        valid = self._forward.valid_on(self.device)
        assert valid is not None
        return valid.sum(-1, keepdim=True)

    @property
    def horizon(self) -> int:
        """Steps to come, this one included, that must launch the same kernels."""
        return self._forward.horizon

    @property
    def behind(self) -> Tensor | None:
        """`[B, T]` int32, stored tokens of this pass behind each; None if all were stored."""
        return self._forward.behind_on(self.device)

    def unmasked(self, q_len: int) -> Literal["all", "causal"] | None:
        """Say whether the newest `q_len` queries see all slots, or those up to their own, or None.

        None where padding, a window or evicted tokens decide what is seen.
        """
        within_window = self.sliding_window is None or self.filled <= self.sliding_window
        if not self.ragged and within_window:
            if q_len == 1 and not self._per_head:
                return "all"
            if q_len == self.filled == self.columns:
                return "causal"
        return None

    def visibility(self, q_len: int) -> Literal["all", "causal"] | Tensor:
        """Say which slots each of the newest `q_len` queries may attend to.

        Returns:
            `"all"` or `"causal"` where that is known without looking at the slots, otherwise a
            bool mask `[B or 1, H_kv or 1, q_len, filled]`, True = attend. Queries that see no
            slot (padding) see every slot instead: their output is never used, but must be finite.
        """
        if (known := self.unmasked(q_len)) is not None:
            return known
        position = self.position[:, :, : self.filled]
        if not self._per_head:
            position = position[:, :1] if self.ragged else position[:1, :1]
        position = position[:, :, None, :]
        column = torch.arange(self.columns - q_len, self.columns, device=self.device)[:, None]
        visible = (position >= 0) & (position <= column)
        if self.sliding_window is not None:
            visible &= position > column - self.sliding_window
        return visible | ~visible.any(-1, keepdim=True) if self.ragged else visible

    def commit(self) -> None:
        """Close the forward pass: enforce the budget on what is stored."""
        new_tokens, self._open = self._open, 0
        if self.policy is not None:
            self.policy.commit(self, new_tokens)
            self.spare = None  # slots that this prompt did not need

    def shrinks(self, most: int) -> bool:
        """Say whether slots for `most` tokens per list take less memory than those there are."""
        return _bucket(most + 1, BOUND) < self.capacity

    def keep(self, keep: Tensor, count: Tensor, most: int) -> None:
        """Move some tokens into slots of their own and free the others.

        Where the policy gives heads different budgets, the lists of a row come to share its slots.

        Args:
            keep: `[B, H_kv, N]` int32, ascending slot numbers.
            count: `[B, H_kv]` int32, entries of `keep` in use, or more than the list is long.
            most: Upper bound on those in use.
        """
        policy = self.policy
        if policy is None or policy.shared_total is None:
            self.move(keep, count, _bucket(most + 1, BOUND), None)
        else:
            room = policy.budget + 1  # a step appends before it evicts
            with ordinary_tensors():
                list_start = (room.cumsum(-1) - room).int().clone()
            capacity = _bucket(policy.shared_total + room.shape[1], BOUND)
            self.move(keep, count, capacity, list_start)
        self.filled = min(self.filled, most)
        self.rollback = 0
        self.overdue = False

    def _unpack(self, new_tokens: int) -> None:
        """Give every list slots of its own again, and room for a chunk."""
        self.filled = int(self.length.max())  # the bound may be as large as all heads together
        every = torch.arange(self.filled, dtype=torch.int32, device=self.device)
        every = every.expand(*self.length.shape, -1)
        self.move(every, self.length, _bucket(self.filled + new_tokens), None)

    # -- replayed steps -----------------------------------------------------------------------

    @property
    def recordable(self) -> bool:
        """Whether the next step of one token can be recorded: nothing is open or deferred."""
        return self.is_initialized and not (self._open or self.overdue or self.record_past)

    def evicts_within(self, steps: int) -> bool:
        """Say whether some list may outgrow its budget in so many steps of one token."""
        return self.policy is not None and self.filled + steps > self.policy.lowest

    @property
    def room(self) -> int:
        """Tokens that fit before the slots must grow."""
        return self.capacity - self.filled

    def reserve(self, new_tokens: int) -> None:
        """Allocate slots for `new_tokens` more, or as many as the budget lets live at a time."""
        if self.policy is not None:
            new_tokens = min(new_tokens, max(1, self.policy.highest + 1 - self.filled))
        self._reserve(new_tokens)

    def counters(self) -> dict[str, Any]:
        """Return the host's side of the bookkeeping, which a recorded step must not move."""
        names = ("columns", "filled", "rollback", "ordered", "_step", "_open")
        return {name: getattr(self, name) for name in names}

    def advance(self) -> None:
        """Account on the host for one replayed step of one token."""
        self.columns += 1
        self.filled += 1
        self.rollback += 1
        if self.policy is not None:
            self.policy.note_eviction(self)

    # -- what transformers asks of a cache layer ----------------------------------------------

    def get_seq_length(self) -> int:
        """Columns consumed, padding and evicted tokens included."""
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are built over columns; the attention function maps columns to slots."""
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        """The store grows on demand."""
        return -1

    def activate_past_recording(self) -> None:
        """Defer eviction until the next `crop`, so that the newest tokens can be taken back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` columns, then evict what was deferred.

        Raises:
            CacheError: the count is positive, or tokens that an exact roll-back needs have been
                evicted since.
        """
        remove = -int(tokens_to_remove)  # transformers 5.17 passes a tensor
        if remove < 0:
            raise CacheError(
                f"crop takes a count of newest tokens as a number <= 0, got {tokens_to_remove}"
            )
        if remove and self.is_initialized:
            if self.score is not None:
                raise CacheError(
                    f"cannot remove the newest {remove} tokens: the scores of the others include "
                    "their attention; feed a copy.deepcopy() of the store instead"
                )
            if remove > self.rollback:
                raise CacheError(
                    f"cannot remove the newest {remove} tokens: others were evicted "
                    f"{self.rollback} tokens ago, so the state before them is gone"
                )
            self.columns -= remove
            dropped = self.position >= self.columns
            self.position.masked_fill_(dropped, -1)
            self.length -= dropped.sum(-1, dtype=torch.int32)
            self.seen -= remove
            self.filled = min(self.filled, self.columns) if self.ragged else self.filled - remove
            self.rollback -= remove
        if self.overdue and self.policy is not None:
            self.policy.evict_many(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Permute the rows in place (beam search)."""
        if self.is_initialized:
            for tensor in self.tensors().values():
                tensor.copy_(tensor.index_select(0, beam_idx.to(self.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.is_initialized:
            with ordinary_tensors():
                held = self.tensors().items()
                self.hold({name: tensor.repeat_interleave(repeats, dim=0) for name, tensor in held})

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows only."""
        if self.is_initialized:
            with ordinary_tensors():
                chosen, held = indices.to(self.device), self.tensors()
                self.hold({name: tensor[chosen] for name, tensor in held.items()})

    def offload(self) -> None:
        """Refuse: the slots of a step must stay where its kernels expect them."""
        raise CacheError("a KVStore cannot be offloaded layer by layer")
