"""`KVStore`: a transformers cache of fixed-address slots that knows what each slot holds.

Every (row, KV head) of a layer owns `capacity` slots; the live ones come first. A token is
appended in place behind them, and evicting moves the last live token over the victim, so nothing
is concatenated and no address changes between decoding steps. Where a method gives the heads of a
layer different budgets, their lists are packed: the row owns the slots, and `list_start [B, H_kv]`
says where each list begins. Three numbers that other caches mix up are kept apart:

- *columns*: tokens the model has consumed, padding included. This is `get_seq_length()`, which
  position ids and input slicing depend on.
- *length* `[B, H_kv]`: live slots. Padding is never stored, so rows of a left-padded batch have
  different lengths, and an eviction policy may give every layer and head its own.
- *capacity*: slots allocated, a multiple of 256 tokens, or of 16 where a budget bounds them.

`position [B, H_kv, capacity]` is the column of the token in each slot and -1 where a slot is
empty. Attention masks are derived from it, never from the order of the slots.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from patchkit.attention.eviction import refuse_custom_mask
from patchkit.attention.forward_pass import ForwardPass
from patchkit.attention.store_layer import StoreLayer
from patchkit.errors import CacheError
from patchkit.families import unwrap
from patchkit.method import Method


def check_cache(cache: Cache | None, eviction: Method | None) -> None:
    """Refuse a caller's cache that a patched model cannot use.

    Raises:
        CacheError: a static, quantised or otherwise special cache, or any but a `KVStore` while an
            eviction method is active.
    """
    if cache is None or isinstance(cache, KVStore):
        return
    if type(cache) is not DynamicCache:
        raise CacheError(
            f"expected past_key_values to be a KVStore or a DynamicCache, got "
            f"{type(cache).__name__}; leave it out, or call patchkit.restore(model) first"
        )
    if eviction is not None:
        raise CacheError(
            f"{eviction.name} needs a patchkit.KVStore as past_key_values, got a DynamicCache; "
            "leave it out, or pass kv_eviction=None"
        )


class KVStore(Cache):
    """The cache of a patched model; `generate()` makes one per call and returns it.

    Pass it back as `past_key_values` to continue a conversation. It belongs to the model object it
    was made for and follows transformers' cache protocol: beam reordering, batch repetition,
    `crop`, `reset`. A 2-D attention mask is read once per token, when the token is appended.

    Args:
        model: A model that `patchkit.apply` has patched. Its eviction method, if any, bounds the
            store.

    Raises:
        CacheError: the model is not patched.
    """

    def __init__(self, model: nn.Module) -> None:
        inner = unwrap(model)
        patch = inner.__dict__.get("_patchkit")
        if patch is None:
            raise CacheError("KVStore needs a patched model; call patchkit.apply(model) first")
        self.eviction: Method | None = patch.active().get("kv_eviction")
        self._owner = weakref.ref(patch.family.decoder)
        self._forward = ForwardPass()
        config = inner.config.get_text_config(decoder=True)
        kinds = patch.family.layers[: config.num_hidden_layers]  # fewer in an early exit
        policies = self.eviction and self.eviction.eviction_policies(patch.family)
        layers: list[Any] = [
            StoreLayer(self._forward, patch.backend, policy, kind.sliding_window)
            for kind, policy in zip(kinds, policies or [None] * len(kinds), strict=False)
        ]
        if not all(kind.storable for kind in kinds):
            template = DynamicCache(config=config).layers
            for index, kind in enumerate(kinds):
                if not kind.storable:
                    layers[index] = template[index]
        super().__init__(layers=layers)

    @property
    def store_layers(self) -> list[StoreLayer]:
        """The layers that patchkit stores itself."""
        return [layer for layer in self.layers if isinstance(layer, StoreLayer)]

    @property
    def nbytes(self) -> int:
        """Allocated bytes over all layers."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, StoreLayer):
                total += layer.nbytes
            elif getattr(layer, "keys", None) is not None:
                total += layer.keys.nbytes + layer.values.nbytes
        return total

    def lengths(self) -> list[Tensor]:
        """Live tokens per layer, each `[B, H_kv]` int32 on the layer's device."""
        return [layer.length for layer in self.store_layers if layer.is_initialized]

    @property
    def dense_bytes(self) -> int:
        """Bytes of keys and values that a cache without eviction would hold by now."""
        return sum(layer.dense_bytes for layer in self.store_layers)

    def budgets(self) -> list[Tensor | None]:
        """Budgets per layer, each `[B, H_kv]` int32, or None for a layer without a bound."""
        held = [layer for layer in self.store_layers if layer.is_initialized]
        return [layer.policy and layer.policy.budget for layer in held]

    def evicted(self) -> list[Tensor | None]:
        """Tokens dropped so far per layer, each `[B, H_kv]`; None for a layer without a bound."""
        held = [layer for layer in self.store_layers if layer.is_initialized]
        return [layer.policy and layer.policy.evicted(layer) for layer in held]

    # -- on disk -----------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the store to a safetensors file; only live slots take room.

        Raises:
            CacheError: some layers are transformers' own, a forward pass did not finish, or an
                eviction waits for `crop`.
        """
        if len(self.store_layers) < len(self.layers):
            raise CacheError("only a store whose layers are all patchkit's can be saved")
        if any(layer.newest for layer in self.store_layers):
            raise CacheError("an earlier forward pass over this KVStore did not finish")
        if any(layer.record_past for layer in self.store_layers):
            raise CacheError("crop() the store first: it has put an eviction off")
        tensors: dict[str, Tensor] = {}
        counters = []
        for index, layer in enumerate(self.store_layers):
            held, host = layer.state()
            counters.append(host)
            tensors |= {f"{index}.{name}": tensor.contiguous() for name, tensor in held.items()}
        described = {"eviction": repr(self.eviction), "counters": json.dumps(counters)}
        save_file(tensors, path, metadata=described | {"format": "pt"})

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module) -> KVStore:
        """Read a store that `save` wrote, onto the devices of a model's layers.

        Args:
            path: The file.
            model: A patched model with the weights, and the eviction method, that filled it.

        Raises:
            CacheError: the model is not patched, has another eviction method, or another number
                of layers or heads.
        """
        store = cls(model)
        family = unwrap(model).__dict__["_patchkit"].family
        with safe_open(path, "pt") as file:
            described = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if described["eviction"] != repr(store.eviction):
            raise CacheError(
                f"the file was saved with kv_eviction={described['eviction']}, the model has "
                f"kv_eviction={store.eviction}"
            )
        counters = json.loads(described["counters"])
        if len(counters) != len(store.store_layers):
            raise CacheError(
                f"the file holds {len(counters)} layers, the model has {len(store.store_layers)}"
            )
        for index, (layer, host) in enumerate(zip(store.store_layers, counters, strict=True)):
            own = f"{index}."
            held = {n.removeprefix(own): t for n, t in tensors.items() if n.startswith(own)}
            if held and held["length"].shape[1] != family.num_kv_heads:
                raise CacheError(
                    f"the file holds {held['length'].shape[1]} KV heads per layer, the model has "
                    f"{family.num_kv_heads}"
                )
            module = family.attention[family.layers[index].name]
            device = next(module.parameters()).device
            layer.load_state({n: t.to(device) for n, t in held.items()}, host)
        return store

    # -- decoding at fixed addresses ---------------------------------------------------------

    @property
    def recordable(self) -> bool:
        """Whether every layer is one of patchkit's, holds a prompt and may evict at once."""
        return all(isinstance(layer, StoreLayer) and layer.recordable for layer in self.layers)

    @property
    def room(self) -> int:
        """Tokens that every layer can take before its slots must grow."""
        return min(layer.room for layer in self.store_layers)

    def evicts_within(self, steps: int) -> tuple[bool, ...]:
        """Say for every layer whether it may have to evict in so many steps of one token."""
        return tuple(layer.evicts_within(steps) for layer in self.store_layers)

    @property
    def layout(self) -> tuple[Any, ...]:
        """What kernels are built for: shapes and dtype of each kind of layer."""
        kinds = {(layer.keys.shape, layer.values.shape, layer.dtype) for layer in self.store_layers}
        return tuple(sorted(kinds, key=str))

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the tensors of all layers lie."""
        return tuple(
            tensor.data_ptr() for layer in self.store_layers for tensor in layer.tensors().values()
        )

    def restart(self) -> None:
        """Drop every token but keep the slots for a prompt of the same batch size."""
        spares = [spare for layer in self.store_layers if (spare := layer.restart())]
        if not spares:
            return
        # One launch for all layers and tensors of a dtype: a loop would cost more than feeding a
        # short prompt. Slots are emptied too: a NaN in a masked one would outlive its weight of 0.
        for emptied in (("keys", "values"), ("length", "seen")):
            torch._foreach_zero_([spare[name] for spare in spares for name in emptied])
        positions = [spare["position"] for spare in spares]
        torch._foreach_zero_(positions)
        torch._foreach_sub_(positions, 1)

    @contextmanager
    def expecting(self, new_tokens: int) -> Iterator[None]:
        """Allocate slots for `new_tokens` at once where passes inside the block need any."""
        before = self._forward.until
        self._forward.until = max(before, self.get_seq_length() + new_tokens)
        try:
            yield
        finally:
            self._forward.until = before

    def reserve(self, new_tokens: int) -> None:
        """Allocate slots for `new_tokens` more tokens; addresses may change."""
        for layer in self.store_layers:
            layer.reserve(new_tokens)

    @contextmanager
    def stepping(self, horizon: int, recording: bool = False) -> Iterator[None]:
        """Make a forward of one token per row launch what each of `horizon` steps needs.

        Args:
            horizon: Steps to come, this one included.
            recording: The launches are recorded, not run; `advance` accounts for every replay.
        """
        saved = [layer.counters() for layer in self.store_layers]
        self._forward.horizon, self._forward.recording = horizon, recording
        try:
            yield
        finally:
            self._forward.horizon, self._forward.recording = 1, False
            if recording:
                for layer, counters in zip(self.store_layers, saved, strict=True):
                    layer.__dict__.update(counters)

    def advance(self) -> None:
        """Account on the host for one replayed step."""
        for layer in self.store_layers:
            layer.advance()

    # -- a forward pass ------------------------------------------------------------------------

    def begin(self, decoder: nn.Module, batch_size: int, new_tokens: int, mask: Any) -> None:
        """Open a forward pass of the model.

        Args:
            decoder: The decoder that is about to run.
            batch_size: Rows of the input.
            new_tokens: Columns of the input.
            mask: The caller's attention mask: None, `[B, columns]` of any dtype (0 = padding), a
                4-D mask over columns, or a dict of the latter.

        Raises:
            CacheError: the store belongs to another model, is in the middle of a failed forward,
                or holds another batch size or a mask of the wrong length, or tokens are scored and
                padding lies behind a token of its row.
            UnsupportedGenerationError: tokens are scored and the mask is not 2-D.
        """
        if self._owner() is not decoder:
            raise CacheError(
                "this KVStore was filled by another model; expected the model it was made for"
            )
        held = {layer.columns for layer in self.store_layers}
        if len(held) > 1 or any(layer._open for layer in self.store_layers):
            raise CacheError(
                "an earlier forward pass over this KVStore did not finish; reset() it or make a "
                "new one"
            )
        columns = max(held, default=0)
        rows = max((layer.batch_size for layer in self.store_layers), default=-1)
        if rows not in (-1, batch_size):
            raise CacheError(f"the store holds {rows} rows, got an input of {batch_size} rows")
        two_dimensional = isinstance(mask, Tensor) and mask.ndim == 2
        if two_dimensional and mask.shape[1] < columns + new_tokens:
            raise CacheError(
                f"expected an attention mask over all {columns + new_tokens} columns ({columns} in "
                f"the store, {new_tokens} new), got {mask.shape[1]}"
            )
        scored = any(layer.policy and layer.policy.scored for layer in self.store_layers)
        if scored and mask is not None and not two_dimensional:
            refuse_custom_mask()
        valid = mask[:, columns : columns + new_tokens] if two_dimensional else None
        if valid is not None and _holds_no_padding(valid):
            valid = None
        if scored and valid is not None and new_tokens > 1:
            self._refuse_holes(valid.bool())
        self._forward.begin(valid)

    def _refuse_holes(self, valid: Tensor) -> None:
        """Refuse padding behind a token of its row: recency and means are counted in columns."""
        ascending = (valid[:, 1:] | ~valid[:, :-1]).all()
        begun = [layer.length for layer in self.store_layers if layer.is_initialized]
        if begun:
            ascending &= (valid[:, 0] | (begun[0][:, 0] == 0).to(valid.device)).all()
        if not ascending:
            raise CacheError(
                f"{self.eviction} scores tokens, which needs padding in front of a row's first "
                "token only, got some behind it; pad on the left, and later turns not at all"
            )


def _holds_no_padding(mask: Tensor) -> bool:
    """Say whether a mask `[B, T]` is known to be all ones.

    This waits for the device once per prefill, since attention without a mask is much faster. One
    token at a time is not worth it, and a traced forward cannot branch on it.
    """
    if torch.compiler.is_compiling() or (mask.is_cuda and mask.shape[1] == 1):
        return False
    return bool(mask.all())
