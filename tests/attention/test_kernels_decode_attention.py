"""`decode_attention`: kernel and reference against a float64 loop over queries."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from patchkit.attention.kernels.decode_attention import decode_attention

from .kernel_cases import DecodeCase, check_decode_attention, small_store

CASES = [
    DecodeCase(groups=1, capacity=37),
    DecodeCase(groups=2, q_len=3, head_dim=24, value_dim=16, sliding_window=9),
    DecodeCase(groups=4, q_len=3, capacity=257, head_dim=80, value_dim=24, softcap=3.0),
    DecodeCase(groups=7, capacity=257, head_dim=24, value_dim=80, sinks=True),
    DecodeCase(groups=7, q_len=3, head_dim=80, sliding_window=7, softcap=0.5, sinks=True),
    DecodeCase(capacity=257, num_indices=37, heads_inside=True),
    DecodeCase(q_len=3, capacity=257, num_indices=130, sliding_window=40, sinks=True),
    DecodeCase(num_kv_heads=3, capacity=257, q_len=2, shared_positions=True),
    DecodeCase(num_kv_heads=3, groups=1, num_indices=63, shared_positions=True),
    DecodeCase(capacity=257, q_len=3, programs=1),
    DecodeCase(capacity=257, sliding_window=2, programs=1),
    DecodeCase(capacity=257, sliding_window=40, programs=8, heads_inside=True),
    DecodeCase(capacity=257, num_indices=200, programs=1),
    DecodeCase(q_len=5, longest=3, sinks=True),
    DecodeCase(longest=0, sinks=True, softcap=2.0),
    DecodeCase(longest=0, capacity=257),
    DecodeCase(batch_size=1, num_kv_heads=1, groups=4, capacity=2200),
    DecodeCase(batch_size=1, num_kv_heads=1, groups=8, q_len=16),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_attention_equals_loop(
    case: DecodeCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_decode_attention(case, dtype, "cpu", monkeypatch)


def _arguments(**change: Any) -> dict[str, Any]:
    store = small_store()
    return {
        "query": torch.ones(2, 4, 1, 16),
        "keys": store.keys,
        "values": store.values,
        "position": store.position,
        "length": store.length,
        "seen": store.seen,
        "scale": 1.0,
        **change,
    }


def test_decode_attention_allocates_a_contiguous_output() -> None:
    out = decode_attention(**_arguments())
    assert out.shape == (2, 1, 4, 16) and out.is_contiguous() and out.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_decode_attention_takes_sinks_of_any_float_type(dtype: torch.dtype) -> None:
    sinks = torch.tensor([0.5, -1.0, 2.0, -torch.inf])
    out = decode_attention(**_arguments(sinks=sinks.to(dtype)))
    assert torch.equal(out, decode_attention(**_arguments(sinks=sinks)))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("^keys: expected .* got ", {"query": torch.ones(2, 4, 1, 8)}),
        ("^query: expected last stride 1", {"query": torch.ones(2, 4, 1, 32)[..., ::2]}),
        ("^keys: expected .* got ", {"query": torch.ones(2, 4, 1, 16, dtype=torch.float16)}),
        ("multiple of H_kv=2, got 3", {"query": torch.ones(2, 3, 1, 16)}),
        ("at most 128 query rows", {"query": torch.ones(2, 4, 65, 16)}),
        ("requires_grad=True", {"query": torch.ones(2, 4, 1, 16, requires_grad=True)}),
        ("^position: expected .* got ", {"position": torch.ones(2, 3, 8, dtype=torch.int32)}),
        ("^sinks: expected .* got ", {"sinks": torch.ones(2)}),
        ("both of indices", {"indices": torch.ones(2, 2, 3, dtype=torch.int32)}),
        ("^out: expected .* got ", {"out": torch.ones(2, 4, 1, 16)}),
        ("^out: expected a contiguous", {"out": torch.ones(2, 1, 4, 32)[..., :16]}),
    ],
)
def test_decode_attention_refuses_wrong_arguments(message: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        decode_attention(**_arguments(**change))
