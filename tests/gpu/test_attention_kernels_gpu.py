"""The KV store kernels on a CUDA device: the checks of `tests/attention` at realistic sizes."""

from __future__ import annotations

import pytest
import torch

from patchkit.attention import reference
from patchkit.attention.kernels.append import append
from patchkit.attention.kernels.decode_attention import decode_attention
from patchkit.attention.kernels.evict_lowest import evict_lowest

from ..attention import packed_cases
from ..attention.kernel_cases import (
    AppendCase,
    DecodeCase,
    PrefillCase,
    assert_same_bits,
    check_append,
    check_decode_attention,
    check_prefill_attention,
    make_store,
    random,
)
from ..attention.packed_cases import PackedCase
from ..attention.slot_cases import CompactCase, EvictCase, check_compact, check_evict_lowest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:]
)

APPEND = [
    AppendCase(batch_size=4, num_heads=8, capacity=1024, head_dim=128, value_dim=128),
    AppendCase(capacity=1024, head_dim=80, value_dim=80, num_tokens=1, padding="row", full=True),
    AppendCase(capacity=1024, head_dim=64, value_dim=64, num_tokens=16, padding="left"),
    AppendCase(capacity=1024, head_dim=576, value_dim=512, num_tokens=5, heads_inside=True),
    AppendCase(num_heads=1, capacity=5120, head_dim=128, value_dim=128, num_tokens=4096),
    AppendCase(capacity=2048, head_dim=256, num_tokens=1500, padding="random", full=True),
]

DECODE = [
    DecodeCase(4, 8, 4, 1, 4096, 128, 128),
    DecodeCase(1, 8, 4, 1, 32768, 128, 128),
    DecodeCase(1, 1, 1, 1, 32768, 64, 64),
    DecodeCase(2, 3, 7, 1, 4096, 64, 64, sliding_window=1000),
    DecodeCase(2, 2, 2, 3, 5000, 80, 80, softcap=5.0),
    DecodeCase(1, 4, 2, 3, 4096, 256, 256, sliding_window=512, softcap=50.0),
    DecodeCase(2, 8, 8, 1, 2048, 64, 64, sinks=True, sliding_window=128),
    DecodeCase(1, 8, 4, 1, 32768, 128, 128, num_indices=2048),
    DecodeCase(2, 2, 7, 3, 4096, 80, 80, num_indices=333, sinks=True, heads_inside=True),
    DecodeCase(2, 16, 1, 1, 2048, 192, 128, shared_positions=True),
    DecodeCase(1, 2, 4, 16, 2048, 128, 128),
    DecodeCase(1, 2, 8, 16, 2048, 128, 128, sliding_window=300),
    DecodeCase(1, 1, 8, 16, 1024, 256, 256),
    DecodeCase(1, 1, 16, 1, 1024, 576, 512),
    DecodeCase(2, 2, 4, 3, 4096, 128, 128, programs=1),
    DecodeCase(2, 2, 4, 5, 4096, 128, 128, longest=3, sinks=True),
    DecodeCase(2, 2, 4, 1, 4096, 128, 128, longest=0, sinks=True),
]

PREFILL = [
    PrefillCase(1, 2, 4, 300, head_dim=128, value_dim=128, blocks=None),
    PrefillCase(2, 1, 7, 200, stored=400, head_dim=64, value_dim=64, blocks=None),
    PrefillCase(2, 2, 2, 300, padding="left", head_dim=128, value_dim=128, blocks=None),
    PrefillCase(2, 2, 2, 300, padding="random", head_dim=128, value_dim=128, blocks=None),
    PrefillCase(2, 1, 2, 300, padding="row", stored=77, head_dim=80, value_dim=80, blocks=None),
    PrefillCase(1, 1, 4, 900, head_dim=256, value_dim=256, sliding_window=300, blocks=None),
    PrefillCase(
        2, 1, 2, 600, padding="random", head_dim=64, value_dim=64, sliding_window=170, blocks=None
    ),
    PrefillCase(
        1, 1, 8, 400, stored=128, ordered=True, head_dim=64, value_dim=64, sliding_window=128,
        sinks=True, blocks=None,
    ),
    PrefillCase(
        2, 1, 2, 200, padding="left", head_dim=256, value_dim=256, softcap=5.0, blocks=None
    ),
    PrefillCase(1, 4, 1, 300, stored=50, head_dim=192, value_dim=128, blocks=None),
]  # fmt: skip

COMPACT = [
    CompactCase(4, 8, 1024, 512, 128, 128, 500),
    CompactCase(2, 2, 8192, 4096, 80, 80, 4000, keep_dtype=torch.int32),
    CompactCase(2, 1, 2048, 256, 576, 512, 255, heads_inside=True),
]

EVICT = [
    EvictCase(4, 8, 1024, 128, 128),
    EvictCase(2, 4, 4352, 80, 80, score="random", num_protected=4),
    EvictCase(2, 8, 4352, 256, 256, score="ties", num_protected=4, heads_inside=True),
    EvictCase(1, 2, 32768, 64, 64, score="infinite", num_protected=1),
    EvictCase(2, 2, 2048, 128, 128, score="newest"),
    EvictCase(2, 8, 4352, 128, 128, score="random", num_protected=4, recent=64, mean=True),
    EvictCase(2, 8, 4352, 128, 128, score="ties", recent=3000, mean=True),
    EvictCase(2, 4, 1024, 128, 128, num_protected=4, recent=900),
]


@every_dtype
@pytest.mark.parametrize("case", APPEND, ids=str)
def test_append(case: AppendCase, dtype: torch.dtype) -> None:
    check_append(case, dtype, "cuda")


@every_dtype
@pytest.mark.parametrize("case", DECODE, ids=str)
def test_decode_attention(
    case: DecodeCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_decode_attention(case, dtype, "cuda", monkeypatch)


@every_dtype
@pytest.mark.parametrize("case", PREFILL, ids=str)
def test_prefill_attention(
    case: PrefillCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_prefill_attention(case, dtype, "cuda", monkeypatch)


@every_dtype
@pytest.mark.parametrize("case", COMPACT, ids=str)
def test_compact(case: CompactCase, dtype: torch.dtype) -> None:
    check_compact(case, dtype, "cuda")


@every_dtype
@pytest.mark.parametrize("case", EVICT, ids=str)
def test_evict_lowest(case: EvictCase, dtype: torch.dtype) -> None:
    check_evict_lowest(case, dtype, "cuda")


PACKED = [PackedCase(), PackedCase(3, 8, 4, 700, 128, 128), PackedCase(1, 2, 7, 90, 64, 80)]


@every_dtype
@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed_lists(case: PackedCase, dtype: torch.dtype) -> None:
    packed_cases.check_append(case, dtype, "cuda")
    packed_cases.check_decode_attention(case, dtype, "cuda")
    packed_cases.check_compact(case, dtype, "cuda")
    for choice in (False, True):
        packed_cases.check_evict_lowest(case, choice, dtype, "cuda")
        packed_cases.check_attention_mass(case, 3 if choice else 1, dtype, "cuda")


def test_a_decoding_step_can_be_captured() -> None:
    """Replays read the counters on the device, so that one graph serves growing lists."""
    length = torch.tensor([[0, 700], [130, 64]], dtype=torch.int32)
    store, plain = (make_store(length, 1024, 128, 128, torch.float16, "cuda") for _ in range(2))
    budget = torch.tensor([[3, 701], [100, 1000]], dtype=torch.int32, device="cuda")
    recent = torch.tensor([[0, 2], [64, 1]], dtype=torch.int32, device="cuda")
    query = torch.zeros(2, 8, 1, 128, dtype=torch.float16, device="cuda")
    new_keys, new_values = query[:, :2].clone(), query[:, :2].clone()
    out = torch.empty(2, 1, 8, 128, dtype=torch.float16, device="cuda")

    def step() -> None:
        append(*store.tensors, new_keys, new_values)
        decode_attention(query, *store.tensors, scale=0.1, out=out)
        evict_lowest(*store.tensors[:4], budget, store.seen, recent)

    saved = {name: buffer.clone() for name, buffer in store.buffers.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for name, buffer in store.buffers.items():
        buffer.copy_(saved[name])

    for i in range(6):
        for tensor, seed in ((query, 30), (new_keys, 40), (new_values, 50)):
            tensor.copy_(random(tuple(tensor.shape), seed + i, torch.float16))
        graph.replay()
        reference.append(*plain.tensors, new_keys, new_values)
        expected = reference.decode_attention(query, *plain.tensors, scale=0.1)
        reference.evict_lowest(*plain.tensors[:4], budget, plain.seen, recent)
        torch.testing.assert_close(out, expected, atol=2e-3, rtol=2e-3)
        assert_same_bits(store.buffers, plain.buffers, f"step {i}")


def test_offsets_past_2_to_the_31() -> None:
    num_heads, width, tail = 8, 128, 300
    capacity = 2**31 // (num_heads * width) + tail
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free device memory")
    keys, values = (
        torch.zeros(1, capacity, num_heads, width, dtype=torch.float16, device="cuda").transpose(
            1, 2
        )
        for _ in range(2)
    )
    columns = torch.arange(capacity, dtype=torch.int32, device="cuda")
    position = columns.expand(1, num_heads, -1).clone()
    length = torch.full((1, num_heads), capacity - tail, dtype=torch.int32, device="cuda")
    seen = length.clone()
    shape = (1, num_heads, tail, width)
    new_keys, new_values = (random(shape, seed, torch.float16, "cuda") for seed in (1, 2))
    append(keys, values, position, length, seen, new_keys, new_values)
    assert torch.equal(keys[:, :, -tail:], new_keys)
    assert torch.equal(values[:, :, -tail:], new_values)

    query = random((1, num_heads, 1, width), 3, torch.float16, "cuda")
    indices = columns[-tail:].expand(1, num_heads, -1)
    count = torch.full((1, num_heads), tail, dtype=torch.int32, device="cuda")
    store = (keys, values, position, length, seen)
    listed = decode_attention(query, *store, scale=0.1, indices=indices, index_count=count)
    windowed = decode_attention(query, *store, scale=0.1, sliding_window=tail)
    small = (new_keys, new_values, position[:, :, :tail], torch.full_like(length, tail))
    expected = reference.decode_attention(query, *small, torch.full_like(seen, tail), scale=0.1)
    torch.testing.assert_close(listed, expected, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(windowed, expected, atol=2e-3, rtol=2e-3)

    lists = (length, length - 1, seen, torch.zeros_like(seen))
    evict_lowest(keys, values, position, *lists, num_protected=capacity - tail)
    assert torch.equal(keys[:, :, -tail], new_keys[:, :, -1])
