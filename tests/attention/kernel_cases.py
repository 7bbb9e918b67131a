"""Stores, oracles and checks shared by the kernel tests on the CPU interpreter and on a GPU.

Every check runs the kernel and the reference on equal stores and compares both with an oracle
written here as slow loops. Slots that nobody may touch hold NaN, and copies are compared bit by
bit over the whole buffers, guard slots behind the capacity included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from patchkit.attention import reference
from patchkit.attention.kernels import (
    append,
    decode_attention,
    prefill_attention,
)

_GUARD = 3
EMPTY = -1
_INTEGER = {2: torch.int16, 4: torch.int32}


@dataclasses.dataclass
class Store:
    """One layer: `keys [B, H, C, D]`, `values [B, H, C, D_v]` and their bookkeeping."""

    keys: Tensor
    values: Tensor
    position: Tensor
    length: Tensor
    seen: Tensor
    buffers: dict[str, Tensor]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.keys, self.values, self.position, self.length, self.seen


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Draw standard normal numbers that do not depend on the device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def random_int(high: int, shape: tuple[int, ...], seed: int, low: int = 0) -> Tensor:
    """Draw int32 numbers in `[low, high]` on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator).int()


def ragged(batch_size: int, num_heads: int, longest: int, seed: int = 5) -> Tensor:
    """Draw lengths `[B, H]` of which one is 0 (if there are two or more) and one is `longest`."""
    length = random_int(longest, (batch_size, num_heads), seed)
    length.view(-1)[0] = 0
    length.view(-1)[-1] = longest
    return length


def make_store(
    length: Tensor,
    capacity: int,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    heads_inside: bool = False,
) -> Store:
    """Fill a store as it is after evictions: columns have gaps, and slots are in any order.

    Args:
        length: `[B, H]` int32, live slots.
        heads_inside: Lay the buffers out as `[B, C, H, D]`.
    """
    batch_size, num_heads = length.shape
    buffers: dict[str, Tensor] = {}

    def allocate(name: str, width: int) -> Tensor:
        slots = capacity + _GUARD
        order = (slots, num_heads) if heads_inside else (num_heads, slots)
        buffers[name] = torch.full((batch_size, *order, width), torch.nan, dtype=dtype)
        buffers[name] = buffers[name].to(device)
        data = buffers[name].transpose(1, 2) if heads_inside else buffers[name]
        return data[:, :, :capacity]

    keys, values = allocate("keys", head_dim), allocate("values", value_dim)
    position = torch.full((batch_size, num_heads, capacity + _GUARD), EMPTY, dtype=torch.int32)
    seen = length + random_int(5, (batch_size, num_heads), seed=1)
    for b in range(batch_size):
        for h in range(num_heads):
            live, seed = int(length[b, h]), 100 * b + h
            generator = torch.Generator().manual_seed(seed)
            newest = min(live, 3)
            columns = torch.randperm(int(seen[b, h]) - newest, generator=generator)
            columns = torch.cat((columns, int(seen[b, h]) - 1 - torch.arange(newest)))[-live:]
            shuffled = torch.randperm(live, generator=generator)
            position[b, h, :live] = columns[shuffled] if live else 0
            keys[b, h, :live] = random((live, head_dim), seed, dtype, device)
            values[b, h, :live] = random((live, value_dim), seed + 50, dtype, device)
    buffers["position"] = position.to(device)
    buffers["length"], buffers["seen"] = length.to(device, copy=True), seen.to(device)
    position = buffers["position"][:, :, :capacity]
    return Store(keys, values, position, buffers["length"], buffers["seen"], buffers)


def assert_same_bits(got: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """Compare tensors bit by bit; any NaN equals any other."""
    for name, tensor in expected.items():
        integer = _INTEGER[tensor.element_size()]
        different = got[name].view(integer) != tensor.view(integer)
        different &= ~(got[name].isnan() & tensor.isnan())
        assert not different.any(), f"{what}: {name} differs at {different.nonzero()[:5].tolist()}"


@contextmanager
def nan_in_new_memory() -> Iterator[None]:
    """Make `torch.empty` return NaN, to find reads of memory that no kernel has written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.ones(3).new_empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


# --- append ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AppendCase:
    batch_size: int = 2
    num_heads: int = 2
    capacity: int = 63
    head_dim: int = 16
    value_dim: int = 16
    num_tokens: int = 1
    padding: str | None = None  # None, "left", "random" or "row" (a whole row is padding)
    full: bool = False  # the valid tokens fill every list to the last slot
    heads_inside: bool = False

    def __str__(self) -> str:
        flags = "".join(f"-{f}" for f in ("full", "heads_inside") if getattr(self, f))
        return (
            f"B{self.batch_size}-H{self.num_heads}-C{self.capacity}-D{self.head_dim}"
            f"-Dv{self.value_dim}-T{self.num_tokens}-{self.padding}{flags}"
        )


def _padding(case: AppendCase) -> Tensor | None:
    if case.padding is None:
        return None
    valid = random_int(1, (case.batch_size, case.num_tokens), seed=3).bool()
    if case.padding == "left":
        pad = random_int(case.num_tokens - 1, (case.batch_size, 1), seed=4)
        valid = torch.arange(case.num_tokens) >= pad
    elif case.padding == "row":
        valid[0] = False
    return valid


def _append_oracle(
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    length: Tensor,
    seen: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    valid: Tensor,
) -> None:
    for b in range(new_keys.shape[0]):
        for h in range(new_keys.shape[1]):
            slot, column = int(length[b, h]), int(seen[b, h])
            for t in range(new_keys.shape[2]):
                if valid[b, t]:
                    keys[b, h, slot] = new_keys[b, h, t]
                    values[b, h, slot] = new_values[b, h, t]
                    position[b, h, slot] = column
                    slot += 1
                column += 1
            length[b, h], seen[b, h] = slot, column


def check_append(case: AppendCase, dtype: torch.dtype, device: str = "cpu") -> None:
    """Append a transposed chunk and compare every buffer."""
    valid = _padding(case)
    everything = torch.ones(case.batch_size, case.num_tokens, dtype=torch.bool)
    count = (everything if valid is None else valid).sum(-1, keepdim=True).int()
    length = ragged(case.batch_size, case.num_heads, case.capacity - case.num_tokens)
    if case.full:
        length = (case.capacity - count).expand(-1, case.num_heads).contiguous()
    shape = (case.batch_size, case.num_tokens, case.num_heads)
    new_keys = random((*shape, case.head_dim), 7, dtype, device).transpose(1, 2)
    new_values = random((*shape, case.value_dim), 8, dtype, device).transpose(1, 2)

    def run(op: Callable[..., Any], mask: Tensor | None) -> Store:
        store = make_store(
            length,
            case.capacity,
            case.head_dim,
            case.value_dim,
            dtype,
            device,
            heads_inside=case.heads_inside,
        )
        op(*store.tensors, new_keys, new_values, mask if mask is None else mask.to(device))
        return store

    before = run(lambda *_: None, None)
    expected = run(_append_oracle, everything if valid is None else valid)
    assert not torch.equal(before.seen, expected.seen)
    assert_same_bits(run(reference.append, valid).buffers, expected.buffers, "reference")
    assert_same_bits(run(append.append, valid).buffers, expected.buffers, "kernel")


# --- decode_attention --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DecodeCase:
    batch_size: int = 2
    num_kv_heads: int = 2
    groups: int = 2
    q_len: int = 1
    capacity: int = 63
    head_dim: int = 16
    value_dim: int = 16
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    num_indices: int | None = None
    shared_positions: bool = False
    longest: int | None = None  # None: as the capacity
    programs: int | None = None  # None: as many as the launcher wants
    heads_inside: bool = False

    def __str__(self) -> str:
        parts = [
            f"B{self.batch_size}-H{self.num_kv_heads}-G{self.groups}-Q{self.q_len}"
            f"-C{self.capacity}-D{self.head_dim}-Dv{self.value_dim}"
        ]
        for name in ("sliding_window", "softcap", "num_indices", "longest", "programs"):
            if getattr(self, name) is not None:
                parts.append(f"{name}{getattr(self, name)}")
        flags = ("sinks", "shared_positions", "heads_inside")
        return "-".join(parts + [flag for flag in flags if getattr(self, flag)])


def _decode_inputs(
    case: DecodeCase, dtype: torch.dtype, device: str
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    longest = case.capacity if case.longest is None else case.longest
    position_heads = 1 if case.shared_positions else case.num_kv_heads
    length = ragged(case.batch_size, position_heads, longest)
    if case.shared_positions:
        length = length.expand(-1, case.num_kv_heads).contiguous()
    store = make_store(
        length,
        case.capacity,
        case.head_dim,
        case.value_dim,
        dtype,
        device,
        heads_inside=case.heads_inside,
    )
    position, lengths, seen = store.position, store.length, store.seen
    if case.shared_positions:
        position, lengths, seen = position[:, :1], lengths[:, :1], seen[:, :1]
    num_heads = case.num_kv_heads * case.groups
    shape = (case.batch_size, case.q_len, num_heads, case.head_dim)
    query = random(shape, 11, dtype, device).transpose(1, 2)
    options: dict[str, Any] = {
        # Large enough for peaked weights, so that a wrong slot or mask changes the output.
        "scale": 2 * case.head_dim**-0.5,
        "sliding_window": case.sliding_window,
        "softcap": case.softcap,
    }
    if case.sinks:
        options["sinks"] = random((num_heads,), 12, torch.float32, device) + 2
    if case.num_indices is not None:
        # Some listed slots are dead; behind the count lie addresses that must never be followed.
        lists = (case.batch_size, case.num_kv_heads)
        indices = torch.full((*lists, case.num_indices), 2**30, dtype=torch.int32)
        indices[..., ::2] = -(2**30)
        count = random_int(min(case.num_indices, case.capacity), lists, seed=13)
        count[0, -1] = 0
        for b, h in torch.cartesian_prod(*(torch.arange(n) for n in lists)).tolist():
            generator = torch.Generator().manual_seed(b + 10 * h)
            slots = torch.randperm(case.capacity, generator=generator)[: count[b, h]]
            indices[b, h, : count[b, h]] = slots.int()
        options["indices"], options["index_count"] = indices.to(device), count.to(device)
    return (query, store.keys, store.values, position, lengths, seen), options


def _decode_oracle(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    length: Tensor,
    seen: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    indices: Tensor | None = None,
    index_count: Tensor | None = None,
) -> Tensor:
    """Pick the visible slots of every query one by one, then softmax over these in float64.

    On the CPU: a loop of small operations is slow on a GPU.
    """
    device = query.device
    query, keys, values, position, length, seen = (
        t.cpu() for t in (query, keys, values, position, length, seen)
    )
    sinks, indices, index_count = (
        None if t is None else t.cpu() for t in (sinks, indices, index_count)
    )
    batch_size, num_heads, q_len, _ = query.shape
    groups = num_heads // keys.shape[1]
    shape = (batch_size, q_len, num_heads, values.shape[-1])
    out = torch.zeros(shape, dtype=torch.float64)
    for b in range(batch_size):
        for head in range(num_heads):
            h = head // groups
            p, n, s = (t[b, h if t.shape[1] > 1 else 0] for t in (position, length, seen))
            slots = torch.arange(int(n))
            if indices is not None and index_count is not None:
                slots = indices[b, h, : int(index_count[b, h])].long()
                slots = slots[slots < n]
            for i in range(q_len):
                column = int(s) - q_len + i
                chosen = slots[(p[slots] >= 0) & (p[slots] <= column)]
                if sliding_window is not None:
                    chosen = chosen[p[chosen] > column - sliding_window]
                if len(chosen) == 0:
                    continue
                logits = keys[b, h, chosen].double() @ query[b, head, i].double() * scale
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                if sinks is not None:
                    logits = torch.cat((logits, sinks[head : head + 1].double()))
                weights = logits.softmax(0)[: len(chosen)]
                out[b, i, head] = weights @ values[b, h, chosen].double()
    return out.to(device)


def check_decode_attention(
    case: DecodeCase, dtype: torch.dtype, device: str, monkeypatch: Any
) -> None:
    """Bound the kernel's error by twice the reference's own, one rounding unit, and summing order.

    A GPU adds the D products of a logit one after the other where a CPU adds blocks, and each of
    these float32 sums is off by about `eps * |q| * |k| * scale`, which the values multiply.
    """
    if case.programs is not None:
        monkeypatch.setattr(decode_attention, "_TARGET_PROGRAMS", case.programs)
    tensors, options = _decode_inputs(case, dtype, device)
    expected = _decode_oracle(*tensors, **options)
    plain = reference.decode_attention(*tensors, **options)
    out = torch.full_like(plain, torch.nan)
    with nan_in_new_memory():
        got = decode_attention.decode_attention(*tensors, **options, out=out)
    assert got is out and got.dtype == dtype

    _check_attention_error(got, plain, expected, tensors, options["scale"])


def _check_attention_error(
    got: Tensor, plain: Tensor, expected: Tensor, tensors: tuple[Tensor, ...], scale: float
) -> None:
    """Compare kernel and reference with the float64 oracle; see `check_decode_attention`."""
    unit = torch.finfo(got.dtype).eps * expected.abs().max()
    reference_error = (plain.double() - expected).abs().max()
    error = (got.double() - expected).abs().max()
    # Both compute in float32, whatever the dtype of their inputs.
    eps = torch.finfo(torch.float32).eps
    limit = unit + 32 * eps * expected.abs().max()
    assert reference_error <= limit, f"reference: {reference_error} > {limit}"
    query, keys, values = tensors[:3]
    norms = [t.double().norm(dim=-1).nan_to_num(0, 0, 0).max() for t in (query, keys)]
    order = eps * scale * norms[0] * norms[1] * values.double().nan_to_num(0, 0, 0).max()
    limit = 2 * reference_error + unit + order
    assert error <= limit, f"kernel: {error} > {limit}, reference {reference_error}"
    blind = (expected == 0).all(-1)
    assert (got[blind] == 0).all() and (plain[blind] == 0).all()


# --- prefill_attention -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PrefillCase:
    batch_size: int = 2
    num_kv_heads: int = 2
    groups: int = 2
    q_len: int = 37
    stored: int = 0  # most tokens that a list holds before the chunk
    ordered: bool = False  # these lie in the order of their columns
    padding: str | None = None  # None, "left", "random" or "row" (a whole row is padding)
    head_dim: int = 16
    value_dim: int = 16
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    blocks: tuple[int, int] | None = (16, 32)  # BLOCK_M, BLOCK_N; None: the launcher's own
    heads_inside: bool = False

    def __str__(self) -> str:
        parts = [
            f"B{self.batch_size}-H{self.num_kv_heads}-G{self.groups}-Q{self.q_len}"
            f"-S{self.stored}-D{self.head_dim}-Dv{self.value_dim}"
        ]
        for name in ("padding", "sliding_window", "softcap"):
            if getattr(self, name) is not None:
                parts.append(f"{name}{getattr(self, name)}")
        flags = ("sinks", "ordered", "heads_inside")
        return "-".join(parts + [flag for flag in flags if getattr(self, flag)])


def _prefill_inputs(
    case: PrefillCase, dtype: torch.dtype, device: str
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Append a chunk to a store; on the CPU by the reference, which has tests of its own."""
    lists = (case.batch_size, case.num_kv_heads)
    length = ragged(*lists, case.stored) if case.stored else torch.zeros(lists, dtype=torch.int32)
    capacity = case.stored + case.q_len
    dims = (case.head_dim, case.value_dim, dtype)
    store = make_store(length, capacity, *dims, heads_inside=case.heads_inside)
    if case.ordered:
        for b, h in torch.cartesian_prod(*(torch.arange(n) for n in lists)).tolist():
            live = store.position[b, h, : length[b, h]]
            live.copy_(live.sort().values)
    valid = None
    if case.padding is not None:
        shape = AppendCase(case.batch_size, num_tokens=case.q_len, padding=case.padding)
        valid = _padding(shape)
    chunk = (case.batch_size, case.num_kv_heads, case.q_len)
    new = [random((*chunk, width), 7 + width, dtype) for width in dims[:2]]
    reference.append(*store.tensors, *new, valid)
    num_heads = case.num_kv_heads * case.groups
    shape = (case.batch_size, case.q_len, num_heads, case.head_dim)
    query = random(shape, 11, dtype, device).transpose(1, 2)
    options: dict[str, Any] = {
        "scale": 2 * case.head_dim**-0.5,
        "sliding_window": case.sliding_window,
        "softcap": case.softcap,
        "ordered": case.ordered or not case.stored,
    }
    if case.sinks:
        options["sinks"] = random((num_heads,), 12, torch.float32, device) + 2
    if valid is not None:
        behind = valid.sum(-1, keepdim=True) - valid.cumsum(-1)
        options["behind"] = behind.int().to(device)
    return (query, *(tensor.to(device) for tensor in store.tensors)), options


def check_prefill_attention(
    case: PrefillCase, dtype: torch.dtype, device: str, monkeypatch: Any
) -> None:
    """Bound the kernel's error as `check_decode_attention` does."""
    if case.blocks is not None:
        sizes = dict(zip(("BLOCK_M", "BLOCK_N"), case.blocks, strict=True))
        monkeypatch.setattr(prefill_attention, "_blocks", lambda *_: sizes)
    tensors, options = _prefill_inputs(case, dtype, device)
    plain = reference.prefill_attention(*tensors, **options)
    out = torch.full_like(plain, torch.nan)
    with nan_in_new_memory():
        got = prefill_attention.prefill_attention(*tensors, **options, out=out)
    assert got is out and got.dtype == dtype
    for name in ("ordered", "behind"):
        options.pop(name, None)
    expected = _decode_oracle(*tensors, **options)
    _check_attention_error(got, plain, expected, tensors, options["scale"])


# --- argument checks ---------------------------------------------------------------------------


def small_store() -> Store:
    """Make a store for tests of the argument checks: B 2, H 2, C 8, D 16, D_v 16, float32."""
    return make_store(torch.full((2, 2), 4, dtype=torch.int32), 8, 16, 16, torch.float32)
