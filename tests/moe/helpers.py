"""What tests of mixtures of experts share: routings, and memory that shows that nobody wrote it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ..attention.kernel_cases import nan_in_new_memory
from ..decoding.helpers import DEVICE


@pytest.fixture
def unwritten_is_nan() -> Iterator[None]:
    """Fill new tensors with NaN, or the largest integer."""
    with nan_in_new_memory():
        yield


def routing(tokens: int, top_k: int, experts: int) -> Tensor:
    """Draw experts `[T, k]`, those of a token all different."""
    generator = torch.Generator().manual_seed(3)
    chosen = [torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)]
    return torch.stack(chosen).to(DEVICE)
