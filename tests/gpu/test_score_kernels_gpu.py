"""Attention scores on a CUDA device: the checks of `tests/attention` at realistic sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from patchkit.attention import reference
from patchkit.attention.dense import cudnn_attention, cudnn_serves
from patchkit.attention.kernels.attention_lse import attention_lse
from patchkit.attention.kernels.attention_mass import attention_mass
from patchkit.attention.kernels.decode_attention import decode_attention
from patchkit.attention.kernels.pool_scores import pool_scores
from patchkit.attention.kernels.prefill_attention import prefill_attention
from patchkit.attention.kernels.window_statistics import window_statistics

from ..attention.kernel_cases import DecodeCase, PrefillCase, make_store, random
from ..attention.score_cases import (
    PoolCase,
    ScoreCase,
    check_attention_lse,
    check_attention_mass,
    check_decode_lse,
    check_pool_scores,
    check_prefill_lse,
    check_window_statistics,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def pairs(every_dtype: list[Any], one_dtype: list[Any]) -> list[Any]:
    """Pair cases with dtypes. Nearly all the time goes into compiling: cases for every dtype share
    what the compiler knows as far as they can; other shapes and options come in bfloat16."""
    chosen = [(case, dtype) for case in every_dtype for dtype in DTYPES]
    chosen += [(case, torch.bfloat16) for case in one_dtype]
    return [pytest.param(*pair, id=f"{pair[0]}-{str(pair[1])[6:]}") for pair in chosen]


DECODE_LSE = pairs(
    [
        DecodeCase(2, 8, 4, 1, 4096, 64, 64, sinks=True),
        DecodeCase(2, 2, 7, 1, 4096, 64, 64, sinks=True),
    ],
    [
        DecodeCase(2, 2, 7, 3, 4096, 80, 80, num_indices=333, heads_inside=True),
        DecodeCase(1, 4, 2, 3, 4096, 256, 256, sliding_window=512, softcap=50.0),
    ],
)

PREFILL_LSE = pairs(
    [
        PrefillCase(2, 1, 7, 200, stored=400, head_dim=64, value_dim=64, blocks=None),
        PrefillCase(2, 2, 2, 300, padding="left", head_dim=64, value_dim=64, blocks=None),
    ],
    [
        PrefillCase(2, 2, 4, 300, padding="left", head_dim=128, value_dim=128, blocks=None),
        PrefillCase(
            1, 1, 4, 500, head_dim=256, value_dim=256, sliding_window=300, sinks=True, blocks=None
        ),
    ],
)

LSE = pairs(
    [
        ScoreCase(2, 2, 1, 64, 2000, head_dim=128),
        ScoreCase(2, 2, 2, 32, 2000, head_dim=128, padding="left"),
        ScoreCase(2, 2, 4, 16, 2000, head_dim=128, padding="row"),
        ScoreCase(2, 2, 7, 9, 2000, head_dim=128, padding="random"),
        ScoreCase(2, 2, 4, 1, 4000, head_dim=128),
    ],
    [
        ScoreCase(2, 2, 4, 32, 2000, head_dim=128, sinks=True),
        ScoreCase(2, 1, 7, 64, 1000, head_dim=128, padding="left", sliding_window=500),
        ScoreCase(2, 2, 3, 40, 1000, head_dim=80, padding="row", softcap=50.0),
        ScoreCase(2, 1, 16, 64, 500, head_dim=256),
        ScoreCase(2, 3, 1, 16, 500, head_dim=192, shared_positions=True),
    ],
)

MASS = pairs(
    [
        # Queries that are one tile, then one query, then many.
        ScoreCase(2, 2, 1, 32, 2000, head_dim=128),
        ScoreCase(2, 2, 2, 16, 2000, head_dim=128, padding="left"),
        ScoreCase(2, 2, 4, 8, 2000, head_dim=128, padding="row"),
        ScoreCase(2, 2, 7, 4, 2000, head_dim=128, padding="random"),
        ScoreCase(4, 8, 4, 1, 1000, head_dim=128, decay=0.9),
        ScoreCase(2, 2, 4, 500, 700, head_dim=64, padding="random", decay=0.5),
    ],
    [
        ScoreCase(2, 2, 4, 32, 2000, head_dim=128),
        ScoreCase(2, 2, 7, 32, 2000, head_dim=128, decay=0.9),
        ScoreCase(2, 2, 7, 1, 2000, head_dim=128, sliding_window=1000),
        ScoreCase(2, 4, 7, 64, 3000, head_dim=64, padding="row", softcap=50.0),
        ScoreCase(2, 2, 4, 700, 0, head_dim=128, padding="left"),
        ScoreCase(2, 8, 2, 300, 1800, head_dim=128, sliding_window=700, sinks=True),
        ScoreCase(2, 1, 4, 600, 0, ordered=True, head_dim=256, sliding_window=256),
        ScoreCase(2, 2, 3, 300, 200, head_dim=80),
        ScoreCase(2, 3, 1, 200, 200, head_dim=192, shared_positions=True),
    ],
)

WINDOW = pairs(
    [
        ScoreCase(2, 2, 1, 32, 4000, head_dim=128),
        ScoreCase(2, 2, 2, 32, 2000, head_dim=128, padding="left"),
        ScoreCase(2, 2, 4, 32, 2000, head_dim=128, padding="row"),
        ScoreCase(2, 2, 7, 31, 2000, head_dim=128, padding="random"),
    ],
    [
        ScoreCase(2, 2, 7, 64, 2000, head_dim=128, padding="left"),  # two launches
        ScoreCase(2, 8, 2, 16, 4000, head_dim=64, sliding_window=1000),
        ScoreCase(2, 2, 4, 33, 1000, head_dim=256, softcap=50.0, sinks=True),
        ScoreCase(2, 3, 1, 64, 500, head_dim=80, shared_positions=True, padding="row"),
    ],
)

POOL = [
    PoolCase(longest=5000),
    PoolCase(4, 7, 3001, scale=0.3, count=True),
    PoolCase(2, 8, 4000, width=1, share=True, in_place=True),
]


@pytest.mark.parametrize(("case", "dtype"), DECODE_LSE)
def test_decode_attention_writes_lse(case, dtype, monkeypatch) -> None:
    check_decode_lse(case, dtype, "cuda", monkeypatch)


@pytest.mark.parametrize(("case", "dtype"), PREFILL_LSE)
def test_prefill_attention_writes_lse(case, dtype, monkeypatch) -> None:
    check_prefill_lse(case, dtype, "cuda", monkeypatch)


@pytest.mark.parametrize(("case", "dtype"), LSE)
def test_attention_lse(case, dtype, monkeypatch) -> None:
    check_attention_lse(case, dtype, "cuda", monkeypatch)


@pytest.mark.parametrize(("case", "dtype"), MASS)
def test_attention_mass(case, dtype, monkeypatch) -> None:
    check_attention_mass(case, dtype, "cuda", monkeypatch)


@pytest.mark.parametrize(("case", "dtype"), WINDOW)
def test_window_statistics(case, dtype, monkeypatch) -> None:
    check_window_statistics(case, dtype, "cuda", monkeypatch)


@pytest.mark.parametrize("case", POOL, ids=str)
def test_pool_scores(case) -> None:
    check_pool_scores(case, "cuda")


def _prompt(q_len: int, num_kv_heads: int, groups: int) -> tuple[Tensor, ...]:
    """Return query, keys and bookkeeping after a prompt, in bfloat16 with D = 128."""
    query = random((1, q_len, num_kv_heads * groups, 128), 1, torch.bfloat16, "cuda")
    keys = random((1, num_kv_heads, q_len, 128), 2, torch.bfloat16, "cuda")
    columns = torch.arange(q_len, dtype=torch.int32, device="cuda")
    position = columns.expand(1, num_kv_heads, -1).clone()
    length = torch.full((1, num_kv_heads), q_len, dtype=torch.int32, device="cuda")
    return query.transpose(1, 2), keys, position, length, length.clone()


def test_a_long_prompt_equals_the_reference() -> None:
    query, *held = _prompt(8192, 2, 4)
    lse = torch.empty(1, 8, 8192, device="cuda")
    prefill_attention(query, held[0], *held, scale=0.1, ordered=True, lse=lse)
    plain = reference.attention_lse(query, *held, scale=0.1)
    torch.testing.assert_close(lse, plain, atol=1e-4, rtol=0)
    score, expected = (torch.zeros(1, 2, 8192, device="cuda") for _ in range(2))
    attention_mass(query, *held, plain, score, scale=0.1)
    reference.attention_mass(query, *held, plain, expected, scale=0.1)
    close = {"atol": 0, "rtol": 1e-4}
    torch.testing.assert_close(score, expected, **close)
    torch.testing.assert_close(score.sum(-1), torch.full((1, 2), 32768.0, device="cuda"), **close)

    last = query[:, :, -32:]
    last_lse = attention_lse(last, *held, scale=0.1)
    torch.testing.assert_close(last_lse, plain[:, :, -32:], atol=1e-4, rtol=0)
    got, want = (torch.zeros_like(score) for _ in range(2))
    for gamma, tolerance in ((0.0, 1e-9), (200.0, 1e-7)):
        options = {"scale": 0.1, "gamma": gamma}
        sums = window_statistics(last, *held, last_lse, got, **options)
        other = reference.window_statistics(last, *held, last_lse, want, **options)
        torch.testing.assert_close(sums[0].sum(-1), other[0].sum(-1), **close)
        torch.testing.assert_close(sums[1].sum(-1), other[1].sum(-1), atol=0, rtol=1e-3)
        torch.testing.assert_close(got, want, atol=tolerance, rtol=1e-3)


def test_cudnn_yields_the_denominators() -> None:
    query = random((1, 4, 32768, 128), 1, torch.bfloat16, "cuda")
    key, value = (random((1, 2, 32768, 128), seed, torch.bfloat16, "cuda") for seed in (2, 3))
    if not cudnn_serves(query, key, value):
        pytest.skip("cuDNN attends on this GPU no faster")
    out, lse = cudnn_attention(query, key, value, scale=0.2)
    position = torch.arange(32768, device="cuda", dtype=torch.int32).expand(1, 2, -1)
    length = torch.full((1, 2), 32768, device="cuda", dtype=torch.int32)
    want_lse = torch.full_like(lse, torch.nan)
    want = prefill_attention(
        query, key, value, position, length, length, scale=0.2, ordered=True, lse=want_lse
    )
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)


def test_a_scored_step_can_be_captured() -> None:
    """Replays read the counters on the device, so that one graph serves growing lists."""
    length = torch.tensor([[0, 700], [130, 64]], dtype=torch.int32)
    store = make_store(length, 1024, 128, 128, torch.float16, "cuda")
    keys, values, position, lengths, seen = store.tensors
    for data in (keys, values):
        data.copy_(random(tuple(data.shape), 3, torch.float16))
    position.copy_(torch.arange(1024).expand(2, 2, -1))
    query = random((2, 8, 2, 128), 4, torch.float16, "cuda")
    held = (keys, position, lengths, seen)
    options: dict[str, Any] = {"scale": 0.1}
    lse = torch.empty(2, 8, 2, device="cuda")
    slots = [torch.zeros(2, 2, 1024, device="cuda") for _ in range(3)]
    result: dict[str, Tensor] = {}

    def step() -> None:
        lengths.add_(1)
        seen.copy_(lengths)
        decode_attention(query, keys, values, position, lengths, seen, **options, lse=lse)
        attention_mass(query, *held, lse, slots[0], decay=0.5, **options)
        result["lse"] = attention_lse(query, *held, **options)
        parts = window_statistics(query, *held, lse, slots[1], gamma=9.0, **options)
        result["sums"] = parts.sum(-1)
        pool_scores(slots[1], lengths, slots[2], width=3)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for i in range(3):
        expected = [data.clone() for data in slots]
        graph.replay()
        want = reference.attention_lse(query, *held, **options)
        for got in (lse, result["lse"]):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=0, msg=f"step {i}")
        reference.attention_mass(query, *held, lse, expected[0], decay=0.5, **options)
        given = (query, *held, lse, expected[1])
        sums = reference.window_statistics(*given, gamma=9.0, **options)
        reference.pool_scores(expected[1], lengths, expected[2], width=3)
        torch.testing.assert_close(result["sums"], sums.sum(-1), atol=1e-5, rtol=1e-3)
        for got, data in zip(slots, expected, strict=True):
            torch.testing.assert_close(got, data, atol=1e-7, rtol=1e-3)
