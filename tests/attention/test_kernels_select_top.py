"""`select_top`: kernels and reference against sorted tuples."""

from __future__ import annotations

import pytest
import torch

from patchkit.attention.kernels.select_top import select_top

from .select_cases import SelectCase, check_select_top, select_inputs

CASES = [
    SelectCase(),
    SelectCase(score=None),
    SelectCase(score=None, num_sinks=4, recent=9, heads_inside=True),
    SelectCase(capacity=37, num_sinks=4, recent=9),
    SelectCase(capacity=257, score="mass", num_sinks=4, recent=70, mean=True),
    SelectCase(capacity=257, score="random", mean=True, heads_inside=True),
    SelectCase(capacity=257, score="ties", num_sinks=1, recent=3),
    SelectCase(capacity=257, score="ties", mean=True),
    SelectCase(capacity=700, score="zeros", recent=20),
    SelectCase(capacity=700, score="zeros", sparse=True, num_sinks=4),
    SelectCase(capacity=300, score="infinite", num_sinks=2, recent=5),
    SelectCase(capacity=300, score="infinite", mean=True),
    SelectCase(capacity=700, score="divided"),
    SelectCase(capacity=300, score="close"),
    SelectCase(capacity=600, score="outlier", recent=17, sparse=True),
    SelectCase(score=None, sparse=True),
    SelectCase(count="all", width=63),
    SelectCase(count="all", score="ties", num_sinks=70, recent=100),
    SelectCase(count="none", width=5),
    SelectCase(count="none"),  # a width of 0
    SelectCase(count="few", num_sinks=3, recent=30),
    SelectCase(count="few", num_sinks=40, recent=30, score=None),
    SelectCase(width=300),  # beyond the capacity
    SelectCase(batch_size=1, num_heads=2, capacity=1),
    SelectCase(batch_size=1, num_heads=2, capacity=2500, score="mass", recent=64),
]


@pytest.mark.parametrize("chunk", [None, 128], ids=["as-is", "chunks"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_select_top_equals_sort(
    case: SelectCase, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_select_top(case, "cpu", monkeypatch, chunk)


def test_select_top_of_a_list_longer_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    case = SelectCase(1, 2, 10000, score="mass", num_sinks=4, recent=64)
    check_select_top(case, "cpu", monkeypatch, None)
    check_select_top(case, "cpu", monkeypatch, 4096)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("^score: expected .* got ", {"score": torch.ones(2, 3, 63, dtype=torch.float16)}),
        ("^score: expected .* got ", {"score": torch.ones(2, 3, 62)}),
        ("^position: expected .* got ", {"position": torch.ones(2, 3, 63, dtype=torch.int64)}),
        ("^length: expected .* got ", {"length": torch.ones(2, dtype=torch.int32)}),
        ("^count: expected .* got ", {"count": torch.ones(2, 3, dtype=torch.int64)}),
        ("^seen: expected .* got ", {"seen": torch.ones(2, 1, dtype=torch.int32)}),
        ("^recent: expected .* got ", {"recent": torch.ones(3, 2, dtype=torch.int32)}),
        ("requires_grad=True", {"score": torch.ones(2, 3, 63, requires_grad=True)}),
        ("num_sinks must be >= 0, got -1", {"num_sinks": -1}),
        ("width must be >= 0, got -2", {"width": -2}),
    ],
)
def test_select_top_refuses_wrong_arguments(message: str, change: dict[str, object]) -> None:
    tensors, options = select_inputs(SelectCase(), "cpu")
    names = ("score", "position", "length", "count", "seen", "recent")
    arguments = {**dict(zip(names, tensors, strict=True)), **options, **change}
    with pytest.raises(ValueError, match=message):
        select_top(**arguments)
