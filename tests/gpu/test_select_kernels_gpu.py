"""`select_top` on a CUDA device: the checks of `tests/attention` at realistic sizes."""

from __future__ import annotations

import pytest
import torch

from patchkit.attention import reference
from patchkit.attention.kernels.select_top import select_top

from ..attention.select_cases import SelectCase, check_select_top, select_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CASES = [
    SelectCase(capacity=1024, score="mass", num_sinks=4, recent=64, mean=True),
    SelectCase(capacity=2048, score=None, num_sinks=4),
    SelectCase(2, 8, 4352, score="mass", num_sinks=4, recent=32),
    SelectCase(capacity=5000, score="zeros", recent=500, heads_inside=True),
    SelectCase(capacity=8192, score="ties", mean=True),
    SelectCase(capacity=8192, score="infinite", num_sinks=1),
    SelectCase(1, 2, 300_000, score="divided"),
    SelectCase(capacity=3000, score="close"),
    SelectCase(capacity=20000, score="outlier", sparse=True, recent=1000),
    SelectCase(capacity=3000, count="all"),
    SelectCase(capacity=3000, count="none", width=10),
    SelectCase(capacity=3000, count="few", num_sinks=10, recent=2000),
    SelectCase(capacity=300, width=5000),
    SelectCase(1, 4, 40000, score="random", num_sinks=4, recent=64, mean=True, heads_inside=True),
]


@pytest.mark.parametrize("chunk", [None, 4096], ids=["as-is", "chunks"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_select_top(case: SelectCase, chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    check_select_top(case, "cuda", monkeypatch, chunk)


@pytest.mark.parametrize("capacity", [8192, 8193, 131072])
@pytest.mark.parametrize("score", [None, "mass", "zeros", "ties"])
def test_select_top_of_long_lists_equals_reference(score: str | None, capacity: int) -> None:
    case = SelectCase(1, 8, capacity, score=score, num_sinks=4, recent=64)
    tensors, options = select_inputs(case, "cuda")
    expected = reference.select_top(*tensors, **options)
    assert torch.equal(select_top(*tensors, **options), expected)


@pytest.mark.parametrize("capacity", [4096, 16384])
def test_select_top_can_be_captured(capacity: int) -> None:
    """Replays read scores and counters on the device."""
    case = SelectCase(1, 8, capacity, score="mass", num_sinks=4, recent=64)
    tensors, options = select_inputs(case, "cuda")
    score, _, length, count, _, recent = tensors
    select_top(*tensors, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        keep = select_top(*tensors, **options)
    for step in range(3):
        score.copy_(score.flip(0, 1).roll(step) if step else score.neg())
        score.nan_to_num_()
        recent.fill_(step)
        count.copy_(torch.minimum(length, count // (step + 1) + 4 + step))
        count.clamp_(max=options["width"])
        graph.replay()
        assert torch.equal(keep, reference.select_top(*tensors, **options)), step
