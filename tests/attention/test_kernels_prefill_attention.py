"""`prefill_attention`: kernel and reference against a float64 loop over queries."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from patchkit.attention.kernels.prefill_attention import _blocks, prefill_attention

from .kernel_cases import PrefillCase, check_prefill_attention, small_store

CASES = [
    PrefillCase(groups=1, q_len=63),
    PrefillCase(groups=4, padding="left", q_len=50),
    PrefillCase(groups=7, padding="random", head_dim=24, value_dim=80),
    PrefillCase(padding="row", stored=21),
    PrefillCase(stored=70, head_dim=80, value_dim=24),
    PrefillCase(stored=70, ordered=True, padding="left", sliding_window=9),
    PrefillCase(stored=70, padding="random", sliding_window=40),
    PrefillCase(q_len=130, sliding_window=33, sinks=True),
    PrefillCase(q_len=130, sliding_window=20, padding="left", softcap=0.5),
    PrefillCase(q_len=90, sliding_window=31, padding="random", softcap=3.0, sinks=True),
    PrefillCase(batch_size=1, q_len=160, sliding_window=50, padding="random"),
    PrefillCase(batch_size=1, q_len=160, sliding_window=90, padding="left"),
    PrefillCase(q_len=40, stored=33, ordered=True, sliding_window=64, heads_inside=True),
    PrefillCase(q_len=33, padding="left", sinks=True, softcap=2.0, heads_inside=True),
    PrefillCase(batch_size=1, num_kv_heads=1, q_len=129, blocks=None),
    PrefillCase(batch_size=1, num_kv_heads=1, q_len=1, stored=40),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_prefill_attention_equals_loop(
    case: PrefillCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_prefill_attention(case, dtype, "cpu", monkeypatch)


def _arguments(**change: Any) -> dict[str, Any]:
    store = small_store()
    return {
        "query": torch.ones(2, 4, 3, 16),
        "keys": store.keys,
        "values": store.values,
        "position": store.position,
        "length": store.length,
        "seen": store.seen,
        "scale": 1.0,
        **change,
    }


def test_prefill_attention_allocates_a_contiguous_output() -> None:
    out = prefill_attention(**_arguments())
    assert out.shape == (2, 3, 4, 16) and out.is_contiguous() and out.isfinite().all()


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("^keys: expected .* got ", {"query": torch.ones(2, 4, 3, 8)}),
        ("^query: expected last stride 1", {"query": torch.ones(2, 4, 3, 32)[..., ::2]}),
        ("multiple of H_kv=2, got 3", {"query": torch.ones(2, 3, 3, 16)}),
        ("requires_grad=True", {"query": torch.ones(2, 4, 3, 16, requires_grad=True)}),
        ("^behind: expected .* got ", {"behind": torch.ones(2, 4, dtype=torch.int32)}),
        ("^sinks: expected .* got ", {"sinks": torch.ones(2)}),
        ("^out: expected a contiguous", {"out": torch.ones(2, 3, 4, 32)[..., :16]}),
    ],
)
def test_prefill_attention_refuses_wrong_arguments(message: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        prefill_attention(**_arguments(**change))


@pytest.mark.parametrize("shared", [99, 163, 227], ids=["sm_89", "sm_80", "sm_90"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 128), (256, 256), (512, 512)])
@pytest.mark.parametrize("element_size", [2, 4])
def test_tiles_fit_into_shared_memory(dims, shared, element_size):
    blocks = _blocks(*dims, element_size, shared * 1024)
    keys = blocks["num_stages"] * blocks["BLOCK_N"] * sum(dims)
    assert (blocks["BLOCK_M"] * dims[0] + keys) * element_size <= shared * 1024
    if dims == (128, 128) and element_size == 2 and shared == 227:
        assert blocks == {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3}
