"""Matrix times one vector: the kernel, and which calls of `linear` it answers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import patchkit
from patchkit.backends import Backend
from patchkit.decoding import reference
from patchkit.decoding.kernels.gated_activation import gated_activation
from patchkit.decoding.kernels.gated_matvec import gated_matvec
from patchkit.decoding.kernels.matvec import matvec
from patchkit.decoding.streaming import StreamedLinears
from patchkit.testing import tiny_model

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


@by_dtype
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "width"), [(63, 97), (5, 2500), (130, 1024)])
def test_gated_matvec_is_two_products_and_an_activation(rows, width, activation, bias, dtype):
    x = random(1, 1, width, dtype=dtype)
    gate, up = (random(rows, width, dtype=dtype, seed=seed) / 8 for seed in (1, 2))
    shifts = [random(rows, dtype=dtype, seed=seed) if bias else None for seed in (3, 4)]
    parts = [matvec(x, weight, shift) for weight, shift in zip((gate, up), shifts, strict=True)]
    want = gated_activation(*parts, activation=activation)
    got = gated_matvec(x, gate, up, *shifts, activation=activation)
    torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    plain = reference.gated_matvec(x.double(), gate.double(), up.double(),
                                   *(s if s is None else s.double() for s in shifts),
                                   activation=activation)  # fmt: skip
    torch.testing.assert_close(got.double(), plain, rtol=0.05, atol=0.1 * float(plain.abs().mean()))


def test_gated_matvec_refuses():
    x, weight = torch.ones(8), torch.ones(4, 8)
    for args in ((x, weight, weight[:3]), (x[:7], weight, weight)):
        with pytest.raises(ValueError, match="expected"):
            gated_matvec(*args, activation="silu")
    with pytest.raises(ValueError, match="activation must be"):
        gated_matvec(x, weight, weight, activation="relu")


@pytest.mark.parametrize("attention_bias", [False, True])
def test_mlps_map_a_single_vector_at_once(attention_bias):
    model = tiny_model("llama", mlp_bias=attention_bias).to(DEVICE)
    one = torch.tensor([[5]], device=DEVICE)
    with torch.no_grad():
        want, several = model(one).logits, model(one.expand(1, 3)).logits
        patchkit.apply(model, backend="triton")
        calls = model._patchkit.backend.calls
        torch.testing.assert_close(model(one).logits, want, atol=1e-5, rtol=1e-5)
        assert calls["gated_matvec", "triton"] == len(model.model.layers)
        torch.testing.assert_close(model(one.expand(1, 3)).logits, several, atol=1e-5, rtol=1e-5)
        seen = []
        model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(model(one).logits, want, atol=1e-5, rtol=1e-5)
    assert seen == [1]
    assert calls["gated_matvec", "triton"] == 2 * len(model.model.layers) - 1
