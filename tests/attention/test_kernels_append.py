"""`append`: kernel and reference against a loop over tokens."""

from __future__ import annotations

import pytest
import torch

from patchkit.attention.kernels.append import append

from .kernel_cases import AppendCase, check_append, small_store

CASES = [
    AppendCase(),
    AppendCase(batch_size=1, num_heads=3, capacity=37, head_dim=24, value_dim=16, num_tokens=1),
    AppendCase(num_tokens=1, padding="row", full=True),
    AppendCase(num_tokens=1, heads_inside=True),
    AppendCase(head_dim=80, value_dim=24, num_tokens=5),
    AppendCase(head_dim=24, num_tokens=5, padding="left"),
    AppendCase(head_dim=16, value_dim=80, num_tokens=5, padding="random", full=True),
    AppendCase(num_tokens=32, padding="row", full=True),
    AppendCase(num_tokens=33, padding="left", heads_inside=True),
    AppendCase(capacity=257, head_dim=80, num_tokens=70),
    AppendCase(capacity=257, head_dim=144, value_dim=24, num_tokens=70, padding="random"),
    AppendCase(capacity=257, value_dim=144, num_tokens=70, padding="row", full=True),
    AppendCase(batch_size=1, num_heads=1, capacity=1200, num_tokens=1100, padding="random"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_append_equals_loop(case: AppendCase) -> None:
    check_append(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_append_copies_half_precision_bits(dtype: torch.dtype) -> None:
    check_append(AppendCase(head_dim=24, num_tokens=5, padding="left"), dtype)


def test_append_of_no_token_changes_nothing() -> None:
    store = small_store()
    length, seen = store.length.clone(), store.seen.clone()
    nothing = torch.ones(2, 2, 0, 16)
    append(*store.tensors, nothing, nothing)
    assert torch.equal(store.length, length) and torch.equal(store.seen, seen)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("new_keys", {"new_keys": torch.ones(2, 2, 1, 15)}),
        ("new_values", {"new_values": torch.ones(2, 2, 2, 16)}),
        ("new_keys", {"new_keys": torch.ones(2, 2, 1, 16, dtype=torch.float16)}),
        ("new_keys", {"new_keys": torch.ones(2, 2, 1, 32)[..., ::2]}),
        ("new_keys", {"new_keys": torch.ones(2, 2, 1, 16, requires_grad=True)}),
        ("length", {"length": torch.ones(2, 2, dtype=torch.int64)}),
        ("seen", {"seen": torch.ones(2, 1, dtype=torch.int32)}),
        ("valid", {"valid": torch.ones(2, 1)}),
        ("valid", {"valid": torch.ones(2, 2, dtype=torch.bool)}),
    ],
)
def test_append_refuses_wrong_arguments(name: str, change: dict[str, torch.Tensor]) -> None:
    store = small_store()
    arguments = {
        "keys": store.keys,
        "values": store.values,
        "position": store.position,
        "length": store.length,
        "seen": store.seen,
        "new_keys": torch.ones(2, 2, 1, 16),
        "new_values": torch.ones(2, 2, 1, 16),
    }
    with pytest.raises(ValueError, match=f"^{name}: expected .* got "):
        append(**{**arguments, **change})
