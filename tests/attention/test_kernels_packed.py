"""Operations on lists that share the slots of their row equal those on lists of their own."""

from __future__ import annotations

import pytest
import torch

from tests.attention import packed_cases as packed
from tests.attention.packed_cases import PackedCase

CASES = [PackedCase(), PackedCase(num_kv_heads=1, groups=7), PackedCase(groups=4, longest=150)]
by_case = pytest.mark.parametrize("case", CASES, ids=str)


@by_case
def test_append(case: PackedCase) -> None:
    packed.check_append(case, torch.float32)


@by_case
def test_decode_attention(case: PackedCase) -> None:
    packed.check_decode_attention(case, torch.float32)


@by_case
@pytest.mark.parametrize("q_len", [1, 3])
def test_attention_mass(case: PackedCase, q_len: int) -> None:
    packed.check_attention_mass(case, q_len, torch.float32)


@by_case
@pytest.mark.parametrize("scored", [True, False])
def test_evict_lowest(case: PackedCase, scored: bool) -> None:
    packed.check_evict_lowest(case, scored, torch.float32)


@by_case
def test_compact(case: PackedCase) -> None:
    packed.check_compact(case, torch.float32)
