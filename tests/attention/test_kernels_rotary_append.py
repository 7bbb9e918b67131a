"""`rotary_append`: the bits of the kernels it stands for, against references and float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from patchkit.attention import reference
from patchkit.attention.kernels.append import append
from patchkit.attention.kernels.rotary_append import rotary_append
from patchkit.decoding.kernels.rms_norm import rms_norm
from patchkit.decoding.kernels.rotary import rotary

from ..decoding.helpers import DEVICE, by_dtype, random
from ..decoding.test_kernels_rotary import FIRST, FULL, HALF, oracle
from .kernel_cases import random_int

CAPACITY = 32
LLAMA = {"eps": 1e-5, "offset": 0.0, "round_first": True}
GEMMA = {"eps": 1e-6, "offset": 1.0, "round_first": False}


@dataclasses.dataclass(frozen=True)
class Case:
    batch_size: int = 1
    q_heads: int = 4
    k_heads: int = 2
    dim: int = 16
    value_dim: int = 16
    width: int = 16
    table: str = FULL
    interleaved: bool = False
    shared: bool = False  # the lists of a row share its slots
    norm: str = ""
    wide: bool = False
    mixed: bool = False  # cos and sin are float32
    rows_of_cos: int = 1

    def __str__(self) -> str:
        given = (f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
        return "-".join(f"{f.name}={getattr(self, f.name)}" for f in given) or "default"


CASES = [
    Case(),
    Case(batch_size=3, q_heads=1, k_heads=1, dim=20, width=20, value_dim=7),
    Case(batch_size=3, q_heads=7, k_heads=1, dim=10, width=4, value_dim=33, table=HALF),
    Case(batch_size=2, q_heads=8, k_heads=2, dim=12, width=8, table=FIRST, interleaved=True),
    Case(q_heads=14, k_heads=2, dim=128, width=128, value_dim=128, norm="llama"),
    Case(batch_size=3, dim=20, width=6, interleaved=True, norm="gemma", mixed=True),
    Case(batch_size=2, q_heads=3, k_heads=3, wide=True, norm="llama", rows_of_cos=2),
    Case(batch_size=3, k_heads=4, shared=True, norm="gemma", rows_of_cos=3),
    Case(batch_size=2, k_heads=1, shared=True, dim=24, width=24),
]
by_case = pytest.mark.parametrize("case", CASES, ids=str)


class Step:
    """A token per row, and a store with NaN in its free slots."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        rows, lists = case.batch_size, (case.batch_size, case.k_heads)
        # Part of one projection, as in Phi-3.
        sizes = [case.q_heads * case.dim, case.k_heads * case.dim, case.k_heads * case.value_dim]
        parts = random(rows, 1, sum(sizes), dtype=dtype).split(sizes, dim=-1)
        dims = (case.dim, case.dim, case.value_dim)
        self.q, self.k, self.v = (
            part.unflatten(-1, (-1, dim)).transpose(1, 2)
            for part, dim in zip(parts, dims, strict=True)
        )
        kind = torch.float32 if case.mixed else dtype
        table = (case.rows_of_cos, 1, case.width)
        self.cos, self.sin = (random(*table, dtype=kind, seed=seed) for seed in (2, 3))
        self.length = random_int(CAPACITY - 1, lists, 5).to(DEVICE)
        self.seen = self.length + random_int(9, lists, 6).to(DEVICE)
        self.list_start = None
        heads, slots = case.k_heads, CAPACITY
        if case.shared:
            heads, slots = 1, CAPACITY * case.k_heads
            self.list_start = torch.arange(0, slots, CAPACITY, dtype=torch.int32).flip(0)
            self.list_start = self.list_start.expand(lists).contiguous().to(DEVICE)
        held = (rows, heads, slots)
        self.memory = [
            torch.full((*held, case.dim), torch.nan, dtype=dtype, device=DEVICE),
            torch.full((*held, case.value_dim), torch.nan, dtype=dtype, device=DEVICE),
            torch.full(held, -1, dtype=torch.int32, device=DEVICE),
        ]
        self.outs = [torch.full(x.shape, torch.nan).to(x) for x in (self.q, self.k)]
        self.normed = [torch.full(x.shape, torch.nan).to(x) for x in (self.q, self.k)]
        self.norm = {"llama": LLAMA, "gemma": GEMMA}.get(case.norm)
        self.weights = None
        if self.norm:
            self.weights = [random(case.dim, dtype=dtype, seed=seed) for seed in (7, 8)]
        options = ("interleaved", "table", "wide")
        self.options: dict[str, Any] = {name: getattr(case, name) for name in options}

    @property
    def store(self) -> list[Tensor]:
        lists = self.length.shape
        memory = [t.expand(*lists, *t.shape[2:]) for t in self.memory]
        return [*memory, self.length, self.seen]

    def written(self) -> dict[str, Tensor]:
        names = ("keys", "values", "position", "length", "seen", "q", "k", "q normed", "k normed")
        return dict(zip(names, (*self.memory, *self.store[3:], *self.outs, *self.normed),
                        strict=True))  # fmt: skip

    def at_once(self, op: Any) -> dict[str, Tensor]:
        normed = self.normed if self.norm else None
        tokens = (self.q, self.k, self.v, self.cos, self.sin, self.outs)
        more = (self.list_start, self.weights, normed)
        op(*self.store, *tokens, *more, **self.options, **(self.norm or {}))
        return self.written()

    def one_by_one(self) -> dict[str, Tensor]:
        q, k = self.q, self.k
        if self.norm:
            for x, weight, out in zip((q, k), self.weights, self.normed, strict=True):
                rms_norm(x, weight, **self.norm, out=out)
            q, k = self.normed
        rotary(q, k, self.cos, self.sin, **self.options, outs=self.outs)
        append(*self.store, self.outs[1], self.v, list_start=self.list_start)
        return self.written()


def check(case: Case, dtype: torch.dtype) -> None:
    got = Step(case, dtype).at_once(rotary_append)
    for name, want in Step(case, dtype).one_by_one().items():
        assert got[name].dtype == want.dtype
        torch.testing.assert_close(
            got[name], want, rtol=0, atol=0, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )


@by_dtype
@by_case
def test_the_kernel_gives_the_bits_of_the_kernels_it_stands_for(case, dtype):
    check(case, dtype)


@by_dtype
@by_case
def test_kernel_and_reference_against_float64(case, dtype):
    # The interpreter cuts bfloat16 off, once for each product and for their sum.
    unit = torch.finfo(dtype).eps / (1 if DEVICE == "cpu" and dtype == torch.bfloat16 else 2)
    before, roundings = Step(case, dtype), 2.02 + (2 if case.norm else 0)
    for op in (rotary_append, reference.rotary_append):
        step = Step(case, dtype)
        got = step.at_once(op)
        for x, name, weight in zip(
            (before.q, before.k), ("q", "k"), before.weights or (None, None), strict=True
        ):
            x = x.double()
            if before.norm:
                scale = (x.pow(2).mean(-1, keepdim=True) + before.norm["eps"]).rsqrt()
                x = x * scale * (weight.double() + before.norm["offset"])
                torch.testing.assert_close(
                    got[f"{name} normed"].double(), x, rtol=2.02 * unit + 1e-6, atol=1e-6
                )
            want, size = oracle(x, before.cos, before.sin, case.interleaved, case.table)
            size = size.maximum(want.abs())  # what passes through is rounded by the norm
            limit = roundings * unit * size + 2e-6 * (1 + size)
            assert ((got[name].double() - want).abs() <= limit).all(), name
        memory = [t.clone() for t in before.memory]
        for b in range(case.batch_size):
            for h in range(case.k_heads):
                slot, row = int(before.length[b, h]), 0 if case.shared else h
                if case.shared:
                    slot += int(before.list_start[b, h])
                memory[0][b, row, slot] = got["k"][b, h, 0]
                memory[1][b, row, slot] = before.v[b, h, 0]
                memory[2][b, row, slot] = before.seen[b, h]
        for got_one, want in zip(step.memory, memory, strict=True):
            torch.testing.assert_close(got_one, want, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(step.length, before.length + 1)
        assert torch.equal(step.seen, before.seen + 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {"q": s.q[..., :8]},
        lambda s: {"k": s.k.half()},
        lambda s: {"v": s.v[..., :8]},
        lambda s: {"v": s.v.mT.contiguous().mT[:, :1]},
        lambda s: {"v": s.v.half()},
        lambda s: {"q": s.q.repeat(1, 1, 2, 1), "k": s.k.repeat(1, 1, 2, 1)},
        lambda s: {"length": s.length.long()},
        lambda s: {"seen": s.seen.mT.contiguous().mT},
        lambda s: {"memory": [t.mT.contiguous().mT for t in s.memory]},
        lambda s: {"memory": [t.half() for t in s.memory]},
        lambda s: {"memory": [s.memory[0][..., :8], *s.memory[1:]]},
        lambda s: {"outs": [x.repeat(1, 1, 1, 2)[..., :16] for x in s.outs]},
        lambda s: {"outs": [x.half() for x in s.outs]},
        lambda s: {"sin": s.sin.repeat(1, 1, 2)[..., ::2]},
        lambda s: {"weights": [w[:8] for w in s.weights]},
        lambda s: {"weights": [w.repeat(2)[::2] for w in s.weights]},
        lambda s: {"weights": None},
        lambda s: {"list_start": s.length},
    ],
)
def test_what_the_kernel_does_not_take_is_refused(change):
    step = Step(Case(batch_size=2, norm="llama"), torch.float32)
    for name, value in change(step).items():
        setattr(step, name, value)
    with pytest.raises(ValueError, match="expected"):
        step.at_once(rotary_append)
