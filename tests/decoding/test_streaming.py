"""Matrix times one vector: the kernel, and which calls of `linear` it answers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from patchkit.backends import Backend
from patchkit.decoding import reference
from patchkit.decoding.kernels.matvec import matvec
from patchkit.decoding.streaming import StreamedLinears

from .test_fused import DEVICE, by_dtype, random


@by_dtype
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (63, 97), (5, 2500), (2051, 64), (130, 1024)])
def test_matvec(rows, width, bias, dtype):
    x, weight = random(1, 1, width, dtype=dtype), random(rows, width, dtype=dtype, seed=1)
    shift = random(rows, dtype=dtype, seed=2) if bias else None
    wide = x.double(), weight.double()
    oracle = F.linear(*wide, None if shift is None else shift.double())
    # Rounding errors of float32 sums, against the sum of absolute values, then that of the result.
    size = F.linear(wide[0].abs(), wide[1].abs())
    size += 0 if shift is None else shift.double().abs()
    unit = torch.finfo(dtype).eps / (1 if DEVICE == "cpu" and dtype == torch.bfloat16 else 2)
    for implementation in (matvec, reference.matvec):
        got = implementation(x, weight, shift)
        assert got.shape == (1, 1, rows) and got.dtype == dtype
        error = (got.double() - oracle).abs()
        assert (
            error <= 1.01 * unit * oracle.abs() + 16 * torch.finfo(torch.float32).eps * size
        ).all()


def test_matvec_reads_rows_of_a_wider_matrix_only():
    weight = torch.full((40, 96), torch.nan, device=DEVICE)
    weight[:, 16:80] = random(40, 64)
    x = random(64, seed=3)
    torch.testing.assert_close(matvec(x, weight[:, 16:80]), F.linear(x, weight[:, 16:80]))


@pytest.mark.parametrize(
    ("message", "x", "weight", "bias"),
    [
        ("one vector", torch.ones(2, 8), torch.ones(4, 8), None),
        ("one vector", torch.ones(9), torch.ones(4, 8), None),
        ("weight: expected", torch.ones(8), torch.ones(4, 8).half(), None),
        ("last stride", torch.ones(8), torch.ones(8, 4).T, None),
        ("bias", torch.ones(8), torch.ones(4, 8), torch.ones(5)),
    ],
)
def test_matvec_refuses(message, x, weight, bias):
    with pytest.raises(ValueError, match=message):
        matvec(x, weight, bias)


class Quantised(torch.Tensor):
    pass


def test_only_plain_single_vectors_are_answered():
    backend = Backend("triton")
    layer = nn.Linear(24, 40, device=DEVICE).requires_grad_(False)
    alien = random(40, 24).as_subclass(Quantised)
    with torch.no_grad(), StreamedLinears(backend):
        served = layer(random(1, 1, 24))
        assert backend.calls["matvec", "triton"] == 1
        layer(random(2, 1, 24))
        F.linear(random(24), alien)
        F.linear(random(24), random(24, 40).T)
        F.linear(input=random(24), weight=random(40, 24))
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            layer(random(1, 24))
        with torch.enable_grad():
            layer(random(1, 24))
        assert backend.calls["matvec", "triton"] == 1
        torch.testing.assert_close(
            served, F.linear(random(1, 1, 24).expand(1, 1, -1), *layer.parameters())
        )
    torch.testing.assert_close(served, layer(random(1, 1, 24)))
