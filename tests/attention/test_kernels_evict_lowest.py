"""`evict_lowest`: kernel and reference against a loop over slots."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from patchkit.attention import reference
from patchkit.attention.kernels.evict_lowest import evict_lowest

from .kernel_cases import assert_same_bits, small_store
from .slot_cases import EvictCase, check_evict_lowest

CASES = [
    EvictCase(),
    EvictCase(num_protected=4, head_dim=24, value_dim=80),
    EvictCase(capacity=37, score="random", num_protected=1),
    EvictCase(capacity=257, score="random", num_protected=4, heads_inside=True),
    EvictCase(capacity=257, score="ties", head_dim=80),
    EvictCase(score="ties", num_protected=2),
    EvictCase(score="infinite", num_protected=3),
    EvictCase(score="newest", head_dim=24),
    EvictCase(batch_size=1, capacity=2500, score="newest"),
    EvictCase(batch_size=1, capacity=4200, score="ties", num_protected=4),
    EvictCase(batch_size=1, capacity=4200, value_dim=144),
    EvictCase(recent=5),
    EvictCase(capacity=37, num_protected=4, recent=36),
    EvictCase(score="random", recent=40, num_protected=1),
    EvictCase(capacity=257, score="newest", recent=2),
    EvictCase(score="infinite", recent=20),
    EvictCase(capacity=257, score="random", mean=True),
    EvictCase(capacity=257, score="ties", mean=True, recent=9, heads_inside=True),
    EvictCase(score="infinite", mean=True, num_protected=2),
    EvictCase(batch_size=1, capacity=4200, score="random", num_protected=4, recent=64, mean=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_evict_lowest_equals_loop(case: EvictCase) -> None:
    check_evict_lowest(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_evict_lowest_copies_half_precision_bits(dtype: torch.dtype) -> None:
    check_evict_lowest(EvictCase(score="random", head_dim=24), dtype)


@pytest.mark.parametrize("op", [evict_lowest, reference.evict_lowest], ids=["kernel", "reference"])
def test_evict_lowest_leaves_a_list_of_protected_slots(op: Callable[..., None]) -> None:
    store, before = small_store(), small_store()
    lists = (torch.zeros(2, 2, dtype=torch.int32), store.seen, torch.zeros(2, 2, dtype=torch.int32))
    op(*store.tensors[:4], *lists, num_protected=20)
    assert_same_bits(store.buffers, before.buffers, "all slots protected")


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("^budget: expected .* got ", {"budget": torch.ones(2, dtype=torch.int32)}),
        ("^budget: expected .* got ", {"budget": torch.ones(2, 2, dtype=torch.int64)}),
        ("^seen: expected .* got ", {"seen": torch.ones(2, 1, dtype=torch.int32)}),
        ("^recent: expected .* got ", {"recent": torch.ones(2, 2)}),
        ("^score: expected .* got ", {"score": torch.ones(2, 2, 8, dtype=torch.float16)}),
        ("^score: expected .* got ", {"score": torch.ones(2, 2, 7)}),
        ("^values: expected last stride 1", {"values": torch.ones(2, 2, 8, 32)[..., ::2]}),
        ("requires_grad=True", {"score": torch.ones(2, 2, 8, requires_grad=True)}),
        ("num_protected must be >= 0, got -1", {"num_protected": -1}),
    ],
)
def test_evict_lowest_refuses_wrong_arguments(message: str, change: dict[str, object]) -> None:
    store = small_store()
    arguments = {
        "keys": store.keys,
        "values": store.values,
        "position": store.position,
        "length": store.length,
        "budget": torch.ones(2, 2, dtype=torch.int32),
        "seen": store.seen,
        "recent": torch.zeros(2, 2, dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=message):
        evict_lowest(**{**arguments, **change})
