"""`compact`: kernel and reference against a loop over kept slots."""

from __future__ import annotations

import pytest
import torch

from patchkit.attention.kernels.compact import compact

from .kernel_cases import small_store
from .slot_cases import CompactCase, check_compact

CASES = [
    CompactCase(),
    CompactCase(num_heads=3, capacity=37, out_capacity=63, num_keep=37, head_dim=24),
    CompactCase(capacity=257, out_capacity=70, num_keep=80, head_dim=80, value_dim=24),
    CompactCase(1, 3, 257, 257, 16, 144, 257, keep_dtype=torch.int32),
    CompactCase(head_dim=144, num_keep=1, heads_inside=True),
    CompactCase(num_keep=0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compact_equals_loop(case: CompactCase) -> None:
    check_compact(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_compact_copies_half_precision_bits(dtype: torch.dtype) -> None:
    check_compact(CompactCase(head_dim=24, keep_dtype=torch.int32), dtype)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("^keep: expected .* got ", {"keep": torch.ones(2, 2, 3)}),
        ("^keep: expected .* got ", {"keep": torch.ones(2, 1, 3, dtype=torch.int32)}),
        ("^keep_count: expected .* got ", {"keep_count": torch.ones(2, 2, dtype=torch.int64)}),
        ("^out_keys: expected .* got ", {"out_keys": torch.ones(2, 2, 8, 15)}),
        ("^out_values: expected .* got ", {"out_values": torch.ones(2, 2, 9, 16)}),
        ("^out_keys: expected last stride", {"out_keys": torch.ones(2, 2, 8, 32)[..., ::2]}),
        ("requires_grad=True", {"values": torch.ones(2, 2, 8, 16, requires_grad=True)}),
    ],
)
def test_compact_refuses_wrong_arguments(message: str, change: dict[str, torch.Tensor]) -> None:
    source, target = small_store(), small_store()
    arguments = {
        "keys": source.keys,
        "values": source.values,
        "position": source.position,
        "length": source.length,
        "keep": torch.zeros(2, 2, 3, dtype=torch.int64),
        "keep_count": torch.ones(2, 2, dtype=torch.int32),
        "out_keys": target.keys,
        "out_values": target.values,
        "out_position": target.position,
    }
    with pytest.raises(ValueError, match=message):
        compact(**{**arguments, **change})
    with pytest.raises(ValueError, match="memory of their own"):
        compact(**{**arguments, "out_values": source.values})
