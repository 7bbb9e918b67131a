"""One layer of the KV store: fixed-address slots, and the bookkeeping of what each one holds."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from patchkit.attention.eviction import EvictionPolicy
from patchkit.backends import Backend
from patchkit.errors import CacheError

BUCKET = 256
"""Capacity granularity in tokens."""


def ordinary_tensors() -> AbstractContextManager[None]:
    """Make tensors inside `torch.inference_mode` that may be written to outside of it later."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def _bucket(tokens: int) -> int:
    return max(1, math.ceil(tokens / BUCKET)) * BUCKET


@dataclass
class ForwardPass:
    """What the layers of one store share during a forward pass.

    Attributes:
        step: Counts the passes.
        valid: `[B, T]` bool, False for the padding among the new tokens of this pass; None for
            none.
        until: Columns that are known to come, for which slots are allocated at once.
        horizon: Steps to come, this one included, that must launch the same kernels as this one.
        recording: Whether launches are recorded for replay instead of run: what is handed out
            must then have the shape of the whole allocation.
    """

    step: int = 0
    valid: Tensor | None = None
    until: int = 0
    horizon: int = 1
    recording: bool = False
    _placed: dict[torch.device, Tensor] = field(default_factory=dict)
    _behind: dict[torch.device, Tensor] = field(default_factory=dict)

    def begin(self, valid: Tensor | None) -> None:
        """Open the next pass."""
        self.step += 1
        self.valid = valid
        self._placed.clear()
        self._behind.clear()

    def valid_on(self, device: torch.device) -> Tensor | None:
        """Return `valid` on a device, where the layers share it."""
        if self.valid is not None and device not in self._placed:
            self._placed[device] = self.valid.to(device, torch.bool)
        return self._placed.get(device)

    def behind_on(self, device: torch.device) -> Tensor | None:
        """Return, `[B, T]` int32, how many valid tokens are behind each; None without padding."""
        valid = self.valid_on(device)
        if valid is not None and device not in self._behind:
            behind = valid.sum(-1, keepdim=True) - valid.cumsum(-1)
            self._behind[device] = behind.to(torch.int32)
        return self._behind.get(device)


class StoreLayer(CacheLayerMixin):
    """Keys, values and slot bookkeeping of one attention layer.

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

    keys: Tensor
    values: Tensor
    position: Tensor
    length: Tensor
    seen: Tensor
    budget: Tensor | None

    def __init__(
        self,
        forward: ForwardPass,
        backend: Backend,
        policy: EvictionPolicy | None = None,
        sliding_window: int | None = None,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        if policy is None and sliding_window is not None:
            policy = EvictionPolicy(budget=sliding_window - 1)
        self.policy = policy
        self._forward = forward
        self.reset()

    # -- allocation -------------------------------------------------------------------------

    def reset(self) -> None:
        """Drop every token and free the memory."""
        self.keys = self.values = None
        self.is_initialized = False
        self.columns = 0
        self.filled = 0  # host-side upper bound on `length`
        self.rollback = 0  # newest columns that `crop` can still remove
        self.ragged = False  # rows may differ in length or hold holes
        self.ordered = True  # positions ascend with the slots
        self.record_past = False  # see `activate_past_recording`
        self.capacity = 0
        self._step = self._forward.step
        self._open = 0  # tokens appended but not yet committed
        self._overdue = False  # an eviction was deferred for `crop`
        self._spare: dict[str, Tensor] | None = None

    def restart(self) -> dict[str, Tensor] | None:
        """Drop every token, but keep the slots for a first chunk that fits them.

        Returns:
            The tensors that are kept, for the caller to empty, or None.
        """
        spare = self.tensors() if self.is_initialized else None
        self.reset()
        self._spare = spare
        return spare

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take batch size, heads, dtype and device from the first chunk `[B, H_kv, T, D]`."""
        batch_size, num_kv_heads = key_states.shape[:2]
        self.dtype, self.device = key_states.dtype, key_states.device
        if torch.is_autocast_enabled(self.device.type):  # RoPE leaves it for float32
            self.dtype = torch.get_autocast_dtype(self.device.type)
        self._prompt_bound = 0
        self.is_initialized = True
        if self._adopt_spare(key_states.shape, value_states.shape):
            return
        slots = {"dtype": self.dtype, "device": self.device}
        counters = {"dtype": torch.int32, "device": self.device}
        with ordinary_tensors():
            self.keys = torch.zeros(batch_size, num_kv_heads, 0, key_states.shape[-1], **slots)
            self.values = torch.zeros(batch_size, num_kv_heads, 0, value_states.shape[-1], **slots)
            self.position = torch.full((batch_size, num_kv_heads, 0), -1, **counters)
            self.length = torch.zeros(batch_size, num_kv_heads, **counters)
            self.seen = torch.zeros(batch_size, num_kv_heads, **counters)
            self.prompt_length = torch.zeros(batch_size, 1, **counters)
        self._set_budget()

    def _adopt_spare(self, key_shape: torch.Size, value_shape: torch.Size) -> bool:
        """Take the tensors that `restart` kept, where they suit the first chunk and no policy."""
        spare, self._spare = self._spare, None
        if spare is None or self.policy is not None:
            return False
        for held, shape in ((spare["keys"], key_shape), (spare["values"], value_shape)):
            alike = held.shape[:2] == shape[:2] and held.shape[3] == shape[3]
            if not alike or held.dtype != self.dtype or held.device != self.device:
                return False
        self.__dict__.update(spare)
        self.budget = None
        self.capacity = self.keys.shape[2]
        return True

    @property
    def batch_size(self) -> int:
        """Rows held, or -1 before the first token."""
        return self.keys.shape[0] if self.is_initialized else -1

    @property
    def _per_head(self) -> bool:
        return self.policy is not None and self.policy.per_head

    @property
    def nbytes(self) -> int:
        """Allocated bytes of keys, values and slot bookkeeping."""
        if not self.is_initialized:
            return 0
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor of the layer by its name."""
        names = ("keys", "values", "position", "length", "seen", "prompt_length", "budget")
        held = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def _slot_tensors(self, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
        """Allocate empty keys, values and positions of `capacity` slots."""
        batch_size, num_kv_heads = self.length.shape
        shape = (batch_size, num_kv_heads, capacity)
        with ordinary_tensors():
            # Zeros, because a masked slot still multiplies its value with a weight of exactly 0.
            keys = self.keys.new_zeros(*shape, self.keys.shape[-1])
            values = self.values.new_zeros(*shape, self.values.shape[-1])
            return keys, values, self.position.new_full(shape, -1)

    def _reserve(self, new_tokens: int) -> None:
        needed = self.filled + new_tokens
        if needed <= self.capacity:
            return
        keys, values, position = self._slot_tensors(_bucket(needed))
        keys[:, :, : self.filled] = self.keys[:, :, : self.filled]
        values[:, :, : self.filled] = self.values[:, :, : self.filled]
        position[:, :, : self.filled] = self.position[:, :, : self.filled]
        self.keys, self.values, self.position = keys, values, position
        self.capacity = keys.shape[2]

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
            of all `capacity` slots while a step is recorded.

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
        self._step = self._forward.step
        bounded = self.policy is not None  # compaction follows, which makes room of its own
        ahead = 0 if bounded else self._forward.until - self.columns
        self._reserve(max(new_tokens, ahead))
        valid = self._forward.valid_on(self.device)
        self.ragged |= valid is not None
        self.backend.run(
            "attention",
            "append",
            self.device,
            self.keys,
            self.values,
            self.position,
            self.length,
            self.seen,
            key_states.to(self.dtype),
            value_states.to(self.dtype),
            valid,
            start=None if self.ragged or self._per_head else self.filled,
        )
        self.columns += new_tokens
        self.filled += new_tokens
        self.rollback += new_tokens
        if new_tokens > 1 and self.policy is not None:
            self.prompt_length += new_tokens if valid is None else valid.sum(-1, keepdim=True)
            self._prompt_bound += new_tokens
        self._open = new_tokens
        shown = self.capacity if self._forward.recording else self.filled
        return self.keys[:, :, :shown], self.values[:, :, :shown]

    @property
    def behind(self) -> Tensor | None:
        """`[B, T]` int32, stored tokens of this pass behind each; None if all were stored."""
        return self._forward.behind_on(self.device)

    def unmasked(self, q_len: int) -> Literal["all", "causal"] | None:
        """Say whether the newest `q_len` queries see all slots, or those up to their own, or None.

        None where padding, a window or evicted tokens decide what is seen.
        """
        within_window = self.sliding_window is None or self.filled <= self.sliding_window
        if not self.ragged and not self._per_head and within_window:
            if q_len == 1:
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
        if self.policy is None:
            return
        if new_tokens > 1:
            self._set_budget()
        if self.filled - 1 + self._forward.horizon <= self._min_budget:
            return
        if self.record_past:
            self._overdue = True
        elif new_tokens == 1 and not self._overdue:
            self._evict_one()
        else:
            self._evict_many()

    # -- replayed steps -----------------------------------------------------------------------

    @property
    def recordable(self) -> bool:
        """Whether the next step of one token can be recorded: nothing is open or deferred."""
        return self.is_initialized and not (self._open or self._overdue or self.record_past)

    @property
    def room(self) -> int:
        """Tokens that fit before the slots must grow."""
        return self.capacity - self.filled

    def reserve(self, new_tokens: int) -> None:
        """Allocate slots for `new_tokens` more, or as many as the budget lets live at a time."""
        if self.policy is not None:
            new_tokens = min(new_tokens, max(1, self._max_budget + 1 - self.filled))
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
            self._note_eviction()

    # -- eviction ---------------------------------------------------------------------------

    def _set_budget(self) -> None:
        """Refresh `budget [B, H_kv]` on the device and its bounds on the host."""
        self.budget = None
        if self.policy is None:
            return
        budget, floor = self.policy.budget, self.policy.num_sink_tokens + 1
        limit = None if self.sliding_window is None else self.sliding_window - 1
        if isinstance(budget, float):
            per_row = (self.prompt_length * budget).to(torch.int32).clamp(floor, limit)
            self.budget = per_row.expand_as(self.length).contiguous()
            self._min_budget = 0
            self._max_budget = max(floor, int(self._prompt_bound * budget))
            if limit is not None:
                self._max_budget = min(self._max_budget, limit)
            return
        per_head = budget if isinstance(budget, tuple) else (budget,) * self.length.shape[1]
        if limit is not None:
            per_head = tuple(min(tokens, limit) for tokens in per_head)
        self.budget = self.length.new_tensor(per_head).expand_as(self.length).contiguous()
        self._min_budget, self._max_budget = min(per_head), max(per_head)

    def _evict_one(self) -> None:
        assert self.policy is not None
        self.backend.run(
            "attention",
            "evict_lowest",
            self.device,
            self.keys,
            self.values,
            self.position,
            self.length,
            self.budget,
            seen=self.seen,
            recent=torch.zeros_like(self.seen),
            score=self.policy.score(self),
            num_protected=self.policy.num_sink_tokens,
        )
        self._note_eviction()

    def _note_eviction(self) -> None:
        if self.filled > self._min_budget:
            self.filled = min(self.filled, self._max_budget)
            self.rollback = 0
            self.ordered = False

    def _evict_many(self) -> None:
        """Keep the best `budget` tokens of every head and move them into slots of that size."""
        keep, count = self._select()
        keys, values, position = self._slot_tensors(_bucket(self._max_budget + 1))
        self.backend.run(
            "attention",
            "compact",
            self.device,
            self.keys,
            self.values,
            self.position,
            keep,
            count,
            keys,
            values,
            position,
        )
        self.keys, self.values, self.position = keys, values, position
        self.capacity = keys.shape[2]
        self.length.copy_(count)
        self.filled = min(self.filled, self._max_budget)
        self.rollback = 0
        self._overdue = False

    def _select(self) -> tuple[Tensor, Tensor]:
        """Return slots to keep `[B, H_kv, width]`, ascending, and how many of them count."""
        assert self.policy is not None and self.budget is not None
        position = self.position[:, :, : self.filled]
        width = min(self._max_budget, self.filled)
        score = self.policy.score(self)
        slot = torch.arange(self.filled, device=self.device)
        # Live slots come first and sinks never move, so the sinks are the leading slots.
        sink = (slot < self.policy.num_sink_tokens) & (position >= 0)
        if score is None:
            age = position.masked_fill(sink, torch.iinfo(torch.int32).max)
            keep = age.topk(width, dim=-1).indices
        else:
            ranked = score[:, :, : self.filled].masked_fill(sink, torch.inf)
            newest_first = position.argsort(dim=-1, descending=True)
            ranked = ranked.masked_fill(position < 0, -torch.inf).gather(-1, newest_first)
            best = ranked.argsort(dim=-1, descending=True, stable=True)[..., :width]
            keep = newest_first.gather(-1, best)
        count = torch.minimum(self.length, self.budget)
        beyond = torch.arange(width, device=self.device) >= count[..., None]
        keep = keep.masked_fill(beyond, self.filled).sort(dim=-1).values
        return keep, count

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
        if self._overdue and self.is_initialized:
            self._evict_many()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Permute the rows in place (beam search)."""
        if self.is_initialized:
            for tensor in self.tensors().values():
                tensor.copy_(tensor.index_select(0, beam_idx.to(self.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.is_initialized:
            with ordinary_tensors():
                for name, tensor in self.tensors().items():
                    setattr(self, name, tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows only."""
        if self.is_initialized:
            with ordinary_tensors():
                for name, tensor in self.tensors().items():
                    setattr(self, name, tensor[indices.to(self.device)])

    def offload(self) -> None:
        """Refuse: the slots of a step must stay where its kernels expect them."""
        raise CacheError("a KVStore cannot be offloaded layer by layer")
