"""`rotary` on a CUDA device: the bits of transformers; `rotary_append`: those of its parts."""

from __future__ import annotations

import pytest
import torch

from patchkit.decoding.kernels.rotary import rotary

from ..attention import test_kernels_rotary_append as at_once
from ..decoding.helpers import by_dtype
from ..decoding.test_kernels_rotary import HALF, inputs, same_bits
from ..decoding.test_rotary import FORMULAS, function_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@by_dtype
@pytest.mark.parametrize("tokens", [1, 5, 1500])
@pytest.mark.parametrize("family", [name for name, formula in FORMULAS.items() if formula])
def test_the_kernel_gives_the_bits_of_transformers(family, tokens, dtype):
    formula = FORMULAS[family]
    width = 64 if formula.table == HALF else 128
    args = inputs(2, 32, 8, tokens, 128, width, dtype)
    same_bits(rotary(*args, **formula.options), function_of(family)(*args))


@by_dtype
@pytest.mark.parametrize("norm", ["", "llama", "gemma"])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_one_launch_gives_the_bits_of_four(rows, dim, norm, dtype):
    sizes = {"dim": dim, "value_dim": dim, "width": dim, "q_heads": 32, "k_heads": 8}
    at_once.check(at_once.Case(batch_size=rows, norm=norm, **sizes), dtype)
