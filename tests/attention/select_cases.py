"""Cases, oracle and checks of `select_top`, shared by the tests on the CPU and on a GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from patchkit.attention import reference
from patchkit.attention.kernels import select_top

from .kernel_cases import nan_in_new_memory, ragged, random, random_int

_GUARD = 3


@dataclasses.dataclass(frozen=True)
class SelectCase:
    batch_size: int = 2
    num_heads: int = 3
    capacity: int = 63
    score: str | None = "random"  # a key of `_SCORES` or None
    count: str = "random"  # "random", "all", "none" or "few" (less than the protected slots)
    num_sinks: int = 0
    recent: int = 0  # longest of the ragged ones
    mean: bool = False
    width: int | None = None  # None: as the longest list wants
    sparse: bool = False  # positions far apart, up to 2^31
    heads_inside: bool = False  # tensors laid out as `[B, C, H]`

    def __str__(self) -> str:
        flags = ("mean", "sparse", "heads_inside")
        return (
            f"B{self.batch_size}-H{self.num_heads}-C{self.capacity}-{self.score}-{self.count}"
            f"-sinks{self.num_sinks}-recent{self.recent}-width{self.width}"
            + "".join(f"-{flag}" for flag in flags if getattr(self, flag))
        )


def _scores(kind: str, shape: tuple[int, ...]) -> Tensor:
    score = random(shape, 31, torch.float32)
    few = random_int(3, shape, seed=32)
    if kind == "mass":  # what attention gives: positive, over many octaves
        return (4 * score).exp()
    if kind == "zeros":  # of either sign, with some others on both sides
        zero = torch.where(few > 1, 0.0, -0.0)
        return torch.where(random_int(9, shape, seed=33) > 0, zero, score)
    if kind == "ties":
        return few.float() - 1
    if kind == "infinite":
        values = torch.tensor([-torch.inf, -1.0, 1.0, torch.inf])
        return values[few.long()]
    if kind == "divided":  # as AdaKV ranks what a head keeps for sure and what is no token
        values = torch.tensor([-torch.inf, torch.inf])
        return torch.where(few > 0, (score / 9).exp() / 999, values[(score > 0).long()])
    if kind == "close":  # neighbouring float32 numbers, down to the denormal ones
        tiny = torch.tensor([1e-45, -1e-45, 0.0, 3e-45])[few.long()]
        return torch.where(score > 0, 1 + few * torch.finfo(torch.float32).eps, tiny)
    if kind == "outlier":  # a range that says nothing about the bulk
        return (1e-3 * score).exp().index_fill(2, torch.tensor([shape[2] // 2]), 1e30)
    assert kind == "random"
    return score


def select_inputs(case: SelectCase, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make the arguments of `select_top`; dead slots hold NaN and plausible positions."""
    shape = (case.batch_size, case.num_heads, case.capacity)
    length = ragged(*shape)
    stride = (2**31 - 1) // (case.capacity + 5) if case.sparse else 1
    seen = (case.capacity + 5) * stride - random_int(stride - 1, shape[:2], seed=34)
    position = torch.empty(shape, dtype=torch.int32)
    for b in range(case.batch_size):
        for h in range(case.num_heads):
            generator = torch.Generator().manual_seed(100 * b + h)
            columns = torch.randperm(case.capacity + 4, generator=generator)[: case.capacity]
            position[b, h] = columns.int() * stride
    dead = torch.arange(case.capacity) >= length[..., None]
    score = None if case.score is None else _scores(case.score, shape).masked_fill(dead, torch.nan)
    recent = random_int(case.recent, shape[:2], seed=35) * stride
    slot = torch.arange(case.capacity)
    protected = (slot < case.num_sinks) | (position >= (seen - recent)[..., None])
    least = (protected & ~dead).sum(-1)
    if case.count == "random":
        share = torch.rand(shape[:2], generator=torch.Generator().manual_seed(36))
        count = (least + (length - least) * share).int()
        count.view(-1)[1] = least.view(-1)[1]
    elif case.count == "few":
        count = random_int(10**6, shape[:2], seed=37) % (least + 1)
        assert (count < least).any()
    else:
        count = length + 1 if case.count == "all" else torch.zeros_like(length)
    width = int(count.minimum(length).max()) if case.width is None else case.width

    def place(data: Tensor) -> Tensor:
        wide = torch.nn.functional.pad(data, (0, _GUARD)).to(device)
        if case.heads_inside:
            wide = wide.transpose(1, 2).contiguous().transpose(1, 2)
        return wide[:, :, : case.capacity]

    lists = (length, count.int(), seen.int(), recent.int())
    tensors = (None if score is None else place(score), place(position))
    options = {"num_sinks": case.num_sinks, "mean": case.mean, "width": width}
    return (*tensors, *(data.to(device) for data in lists)), options


def _select_oracle(
    score: Tensor | None,
    position: Tensor,
    length: Tensor,
    count: Tensor,
    seen: Tensor,
    recent: Tensor,
    *,
    num_sinks: int,
    mean: bool,
    width: int,
) -> Tensor:
    """Sort the slots of every list as Python tuples: group, score, position."""
    capacity = position.shape[2]
    keep = torch.full((*position.shape[:2], width), capacity, dtype=torch.int32)
    if score is not None and mean:
        age = (seen[..., None] - position).float()
        score = score / age
    for b in range(keep.shape[0]):
        for h in range(keep.shape[1]):
            first_recent = int(seen[b, h]) - int(recent[b, h])
            columns = position[b, h].tolist()
            scores = [0.0] * capacity if score is None else score[b, h].tolist()
            order = []
            for slot in range(int(length[b, h])):
                group = 2 if slot < num_sinks else 1 if columns[slot] >= first_recent else 0
                order.append((group, 0.0 if group else scores[slot], columns[slot], slot))
            best = sorted(order, reverse=True)[: int(count[b, h])]
            slots = sorted(slot for *_, slot in best)
            keep[b, h, : len(slots)] = torch.tensor(slots, dtype=torch.int32)
    return keep


def check_select_top(case: SelectCase, device: str, monkeypatch: Any, chunk: int | None) -> None:
    """Compare kernel and reference with sorted tuples.

    Args:
        chunk: Slots per program of the kernels for long lists, which serve all; None: the kernels
            and chunks that a capacity calls for.
    """
    tensors, options = select_inputs(case, device)
    on_cpu = (None if tensor is None else tensor.cpu() for tensor in tensors)
    expected = _select_oracle(*on_cpu, **options)
    if chunk is not None:
        monkeypatch.setattr(select_top, "_MAX_SINGLE", 0)
        monkeypatch.setattr(select_top, "_CHUNK", chunk)
        monkeypatch.setattr(select_top, "_BLOCK", min(chunk, 1024))
    with nan_in_new_memory():  # fills integers with their largest number
        for name, op in (("reference", reference.select_top), ("kernel", select_top.select_top)):
            got = op(*tensors, **options)
            assert got.dtype == torch.int32 and got.is_contiguous() and got.shape == expected.shape
            wrong = (got.cpu() != expected).nonzero()[:5].tolist()
            assert not wrong, f"{name}: differs at {wrong}"
