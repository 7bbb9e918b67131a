"""Attention scores: kernels and references against float64 loops over queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from patchkit.attention.kernels import attention_lse as lse_module
from patchkit.attention.kernels import attention_mass as mass_module
from patchkit.attention.kernels import window_statistics as window_module
from patchkit.attention.kernels.attention_lse import attention_lse
from patchkit.attention.kernels.attention_mass import attention_mass
from patchkit.attention.kernels.decode_attention import decode_attention
from patchkit.attention.kernels.pool_scores import pool_scores
from patchkit.attention.kernels.prefill_attention import prefill_attention
from patchkit.attention.kernels.window_statistics import window_statistics

from .kernel_cases import DecodeCase, PrefillCase, small_store
from .score_cases import (
    PoolCase,
    ScoreCase,
    check_attention_lse,
    check_attention_mass,
    check_decode_lse,
    check_pool_scores,
    check_prefill_lse,
    check_window_statistics,
)

every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:]
)

DECODE_LSE = [
    DecodeCase(groups=4, q_len=3, sliding_window=7, softcap=0.5),
    DecodeCase(groups=7, capacity=130, sinks=True),
    DecodeCase(capacity=257, q_len=3, num_indices=130, programs=1),
    DecodeCase(num_kv_heads=3, groups=1, capacity=130, shared_positions=True),
    DecodeCase(q_len=5, longest=3),
    DecodeCase(longest=0, sinks=True),
]

PREFILL_LSE = [
    PrefillCase(groups=4, padding="left"),
    PrefillCase(groups=7, padding="row", stored=21, head_dim=24, value_dim=80),
    PrefillCase(q_len=90, stored=33, padding="random", sliding_window=31, softcap=3.0),
    PrefillCase(q_len=63, padding="left", sinks=True, sliding_window=20),
]

LSE = [
    ScoreCase(groups=1, q_len=1, stored=200),
    ScoreCase(groups=4, q_len=3, head_dim=24, sliding_window=7, softcap=0.5),
    ScoreCase(groups=7, q_len=1, padding="row", head_dim=80, sinks=True),
    ScoreCase(groups=7, q_len=37, padding="left", stored=0),
    ScoreCase(num_kv_heads=3, groups=1, q_len=5, shared_positions=True, sinks=True),
    ScoreCase(groups=4, q_len=63, stored=70, padding="random", sliding_window=31),
    ScoreCase(batch_size=1, num_kv_heads=1, groups=4, q_len=64, stored=140),  # two row blocks
    ScoreCase(groups=3, q_len=17, stored=90, blocks={"BLOCK_M": 16, "BLOCK_N": 16}),
]

_SMALL = {"BLOCK_N": 16, "HEADS": 1, "TILE_Q": 16}
_WINDOW = {"HEADS": 4, "BLOCK_Q": 32, "BLOCK_N": 16, "num_warps": 4}
_STATISTICS = {"HEADS": 2, "BLOCK_Q": 32, "BLOCK_N": 16}
MASS = [
    ScoreCase(groups=1, q_len=1, stored=150),
    ScoreCase(groups=7, q_len=1, decay=0.5, sliding_window=30),
    ScoreCase(groups=7, q_len=3, head_dim=24, padding="row", softcap=0.5),
    ScoreCase(groups=4, q_len=33, head_dim=80, decay=1.0),
    ScoreCase(groups=4, q_len=130, stored=0, ordered=True, padding="left"),
    ScoreCase(groups=2, q_len=130, stored=0, blocks=_SMALL),
    ScoreCase(groups=2, q_len=128, stored=0, sinks=True, blocks=_SMALL),
    ScoreCase(groups=2, q_len=100, padding="random", sliding_window=40, blocks=_SMALL),
    ScoreCase(groups=1, q_len=100, stored=40, ordered=True, sliding_window=70, blocks=_SMALL),
    ScoreCase(groups=3, q_len=16, softcap=3.0, blocks=_SMALL | {"HEADS": 2, "BLOCK_N": 32}),
    ScoreCase(groups=4, q_len=8, decay=0.25, blocks=_SMALL | {"HEADS": 2, "TILE_Q": 8}),
    ScoreCase(num_kv_heads=3, groups=1, q_len=20, shared_positions=True, blocks=_SMALL),
    ScoreCase(groups=3, q_len=17, stored=90, decay=0.5, blocks=_WINDOW),
    ScoreCase(groups=4, q_len=16, stored=200, padding="left", sinks=True, blocks=_WINDOW),
    ScoreCase(
        groups=7, q_len=9, stored=40, padding="random", sliding_window=20,
        blocks=_WINDOW | {"HEADS": 8, "BLOCK_Q": 16},
    ),
    ScoreCase(
        groups=1, q_len=33, stored=0, head_dim=24, softcap=3.0,
        blocks=_WINDOW | {"HEADS": 1, "BLOCK_Q": 64},
    ),
]  # fmt: skip

WINDOW = [
    ScoreCase(groups=1, q_len=2),
    ScoreCase(groups=2, q_len=32, stored=150, head_dim=24),
    ScoreCase(groups=4, q_len=16, padding="row", sliding_window=30),
    ScoreCase(groups=7, q_len=33, padding="left", softcap=3.0, sinks=True),
    ScoreCase(groups=2, q_len=64, stored=20, padding="random", head_dim=80),
    ScoreCase(num_kv_heads=3, groups=1, q_len=9, shared_positions=True, ordered=True),
    ScoreCase(groups=2, q_len=20, stored=14, ordered=True, blocks=_STATISTICS),
    ScoreCase(groups=7, q_len=5, stored=70, blocks=_STATISTICS),  # four launches
    ScoreCase(groups=4, q_len=32, stored=90, padding="random", blocks=_STATISTICS | {"HEADS": 4}),
]

POOL = [
    PoolCase(),
    PoolCase(width=1, scale=0.3),
    PoolCase(width=1, scale=0.3, in_place=True),
    PoolCase(batch_size=3, num_heads=7, longest=601, width=7, scale=-3.0, count=True),
    PoolCase(num_heads=1, longest=3, width=9),
    PoolCase(num_heads=5, longest=514, width=1, share=True, in_place=True),
    PoolCase(num_heads=3, longest=70, width=3, share=True, count=True),
    PoolCase(longest=512),
    PoolCase(batch_size=1, num_heads=2, longest=0),
]


@every_dtype
@pytest.mark.parametrize("case", DECODE_LSE, ids=str)
def test_decode_attention_writes_lse(case, dtype, monkeypatch) -> None:
    check_decode_lse(case, dtype, "cpu", monkeypatch)


@every_dtype
@pytest.mark.parametrize("case", PREFILL_LSE, ids=str)
def test_prefill_attention_writes_lse(case, dtype, monkeypatch) -> None:
    check_prefill_lse(case, dtype, "cpu", monkeypatch)


@every_dtype
@pytest.mark.parametrize("case", LSE, ids=str)
def test_attention_lse_equals_loop(case, dtype, monkeypatch) -> None:
    check_attention_lse(case, dtype, "cpu", monkeypatch)


@every_dtype
@pytest.mark.parametrize("case", MASS, ids=str)
def test_attention_mass_equals_loop(case, dtype, monkeypatch) -> None:
    check_attention_mass(case, dtype, "cpu", monkeypatch)


@every_dtype
@pytest.mark.parametrize("case", WINDOW, ids=str)
def test_window_statistics_equals_loop(case, dtype, monkeypatch) -> None:
    check_window_statistics(case, dtype, "cpu", monkeypatch)


@pytest.mark.parametrize("case", POOL, ids=str)
def test_pool_scores_equals_loop(case) -> None:
    check_pool_scores(case, "cpu")


def _arguments(*names: str, **change: Any) -> dict[str, Any]:
    store = small_store()
    slots = tuple(store.position.shape)
    arguments: dict[str, Any] = {
        "query": torch.ones(2, 4, 3, 16),
        "keys": store.keys,
        "values": store.values,
        "position": store.position,
        "length": store.length,
        "seen": store.seen,
        "lse": torch.zeros(2, 4, 3),
        "score": torch.zeros(slots),
        "gamma": 1.0,
    }
    return {name: arguments[name] for name in names} | {"scale": 1.0} | change


_STORE = ("query", "keys", "position", "length", "seen")
ARGUMENTS = {
    decode_attention: (*_STORE, "values", "lse"),
    prefill_attention: (*_STORE, "values", "lse"),
    attention_lse: _STORE,
    attention_mass: (*_STORE, "lse", "score"),
    window_statistics: (*_STORE, "lse", "score", "gamma"),
}
NEW = [attention_lse, attention_mass, window_statistics]


@pytest.mark.parametrize("op", NEW, ids=lambda op: op.__name__)
@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("^keys: expected .* got ", {"query": torch.ones(2, 4, 3, 8)}),
        ("^query: expected last stride 1", {"query": torch.ones(2, 4, 3, 32)[..., ::2]}),
        ("multiple of H_kv=2, got 3", {"query": torch.ones(2, 3, 3, 16)}),
        ("requires_grad=True", {"query": torch.ones(2, 4, 3, 16, requires_grad=True)}),
        ("^position: expected .* got ", {"position": torch.ones(2, 3, 8, dtype=torch.int32)}),
        ("^seen: expected .* got ", {"seen": torch.ones(2, 2)}),
    ],
)
def test_operations_refuse_wrong_arguments(
    op: Callable[..., Any], message: str, change: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        op(**_arguments(*ARGUMENTS[op], **change))


@pytest.mark.parametrize(
    ("op", "message", "change"),
    [
        (decode_attention, "^lse: expected .* got ", {"lse": torch.ones(2, 4, 1)}),
        (decode_attention, "^lse: expected a contig", {"lse": torch.ones(2, 4, 6)[..., ::2]}),
        (prefill_attention, "^lse: expected .* got ", {"lse": torch.ones(2, 4, 3).half()}),
        (prefill_attention, "^lse: expected a contig", {"lse": torch.ones(2, 4, 6)[..., ::2]}),
        (attention_lse, "^sinks: expected .* got ", {"sinks": torch.ones(2)}),
        (attention_mass, "^lse: expected .* got ", {"lse": torch.ones(2, 2, 3)}),
        (attention_mass, "^score: expected .* got ", {"score": torch.ones(2, 2, 3)}),
        (attention_lse, "positive scale, got 0", {"scale": 0}),
        (window_statistics, "^score: expected .* got ", {"score": torch.ones(2, 2, 3)}),
        (window_statistics, "2 to 64 queries, got 1", {"query": torch.ones(2, 4, 1, 16)}),
        (window_statistics, "2 to 64 queries, got 65", {"query": torch.ones(2, 4, 65, 16)}),
    ],
)
def test_operations_refuse_their_own_wrong_arguments(
    op: Callable[..., Any], message: str, change: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        op(**_arguments(*ARGUMENTS[op], **change))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("odd width, got 4", {"width": 4}),
        ("odd width, got -1", {"width": -1}),
        ("^out: expected .* got ", {"out": torch.ones(2, 2, 4)}),
        ("^length: expected .* got ", {"length": torch.ones(2, 1, dtype=torch.int32)}),
        ("^count: expected .* got ", {"count": torch.ones(2)}),
    ],
)
def test_pool_scores_refuses_wrong_arguments(message: str, change: dict[str, Any]) -> None:
    length = torch.ones(2, 2, dtype=torch.int32)
    given = {"score": torch.ones(2, 2, 5), "length": length, "out": torch.ones(2, 2, 5)}
    with pytest.raises(ValueError, match=message):
        pool_scores(**given | change)


@pytest.mark.parametrize("shared", [99, 163, 227], ids=["sm_89", "sm_80", "sm_90"])
@pytest.mark.parametrize("block_d", [64, 128, 256, 512])
@pytest.mark.parametrize("element_size", [2, 4])
def test_tiles_fit_into_shared_memory(block_d: int, shared: int, element_size: int) -> None:
    def size(rows: int, streamed: int, stages: int) -> int:
        return (rows + streamed * stages) * block_d * element_size

    limit = (element_size, shared * 1024)
    lse = lse_module._blocks(448, block_d, *limit)
    assert size(lse["BLOCK_M"], lse["BLOCK_N"], lse["num_stages"]) <= limit[1]
    mass = mass_module._blocks(4, 4096, 4096, 8, block_d, *limit)
    assert size(mass["BLOCK_N"], mass["HEADS"] * mass["TILE_Q"], mass["num_stages"]) <= limit[1]
    if block_d * element_size <= 1024:  # else 64 queries of a head may be too many
        for groups, q_len in ((1, 64), (7, 64), (16, 32), (4, 5)):
            window = window_module._blocks(groups, q_len, block_d, *limit)
            rows = window["HEADS"] * window["BLOCK_Q"]
            assert size(rows, window["BLOCK_N"], window["num_stages"]) <= limit[1]
            assert q_len <= window["BLOCK_Q"] and window["HEADS"] < 2 * groups


@pytest.mark.parametrize(("groups", "q_len"), [(1, 1), (7, 1), (4, 32), (3, 17), (1, 200)])
def test_few_queries_are_one_tile(groups: int, q_len: int) -> None:
    limit = 227 * 1024
    blocks = mass_module._window_blocks(groups, q_len, 128, 2, limit)
    assert blocks is not None
    assert blocks["HEADS"] >= groups and blocks["BLOCK_Q"] >= q_len
    rows = blocks["HEADS"] * blocks["BLOCK_Q"]
    assert 16 <= rows <= 256
    held = rows + blocks["BLOCK_N"] * blocks["num_stages"]
    assert 2 * held * 128 * 2 <= limit  # two programs on an SM
    assert mass_module._window_blocks(16, 32, 128, 2, limit) is None


def test_programs_end_together() -> None:
    for num_lists in (1, 2, 7, 8, 16, 24, 64, 131, 200, 300, 2000):
        programs = num_lists * lse_module.splits(num_lists, 4096)
        rounds = -(-programs // 264)
        assert rounds <= 4 or programs == num_lists
        assert programs >= 0.75 * rounds * 264
    assert lse_module.splits(8, 4096) == 33
    assert lse_module.splits(8, 5) == 5
    assert lse_module.splits(8, 0) == 1
