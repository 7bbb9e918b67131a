"""`rotary`: kernel and reference against a loop in float64, and against transformers' rounding."""

from __future__ import annotations

import itertools

import pytest
import torch

from patchkit.decoding import reference
from patchkit.decoding.kernels.rotary import rotary

from .helpers import DEVICE, DTYPES, by_dtype, random

FULL, HALF, FIRST = "full", "half", "first half"


def inputs(batch_size, q_heads, k_heads, tokens, dim, width, dtype, table_dtype=None):
    """Queries and keys as attention modules make them, one row of cos and sin for all."""
    q = random(batch_size, tokens, q_heads, dim, dtype=dtype).transpose(1, 2)
    k = random(batch_size, tokens, k_heads, dim, dtype=dtype, seed=1).transpose(1, 2)
    cos, sin = (random(1, tokens, width, dtype=table_dtype or dtype, seed=s) for s in (2, 3))
    return q, k, cos, sin


def oracle(x, cos, sin, interleaved, table):
    """Return the rotation in float64, element by element, and the sizes of what is added."""
    x, cos, sin = x.double().cpu(), cos.double().cpu(), sin.double().cpu()
    rotated = cos.shape[-1] * (2 if table == HALF else 1)
    out, size = x.clone(), torch.zeros_like(x)
    for b, h, s, i in itertools.product(*map(range, x.shape[:3]), range(rotated // 2)):
        pair = (2 * i, 2 * i + 1) if interleaved else (i, i + rotated // 2)
        columns = pair if table == FULL else (i, i)
        angles = [(t[b % len(cos), s, c].item()) for c in columns for t in (cos, sin)]
        (first, second), (cos_1, sin_1, cos_2, sin_2) = x[b, h, s, list(pair)].tolist(), angles
        out[b, h, s, pair[0]] = first * cos_1 - second * sin_1
        out[b, h, s, pair[1]] = second * cos_2 + first * sin_2
        size[b, h, s, pair[0]] = abs(first * cos_1) + abs(second * sin_1)
        size[b, h, s, pair[1]] = abs(second * cos_2) + abs(first * sin_2)
    return out.to(DEVICE), size.to(DEVICE)


def same_bits(got, want):
    """Compare results; the interpreter cuts bfloat16 off where a GPU rounds to the nearest."""
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        layouts = [
            [step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1]
            for x in (a, b)
        ]
        assert layouts[0] == layouts[1]
        if DEVICE == "cpu" and a.dtype == torch.bfloat16:
            torch.testing.assert_close(a, b, atol=0.06, rtol=0.03)
        else:
            assert torch.equal(a, b)


@by_dtype
@pytest.mark.parametrize(
    ("shape", "width", "table"),
    [
        ((2, 4, 1, 1, 8), 8, FULL),
        ((1, 7, 2, 3, 20), 20, FULL),
        ((2, 3, 3, 2, 20), 6, FULL),
        ((1, 3, 2, 2, 12), 6, HALF),
        ((2, 1, 1, 3, 10), 4, HALF),
        ((1, 2, 1, 2, 10), 8, FIRST),
        ((1, 33, 2, 1, 128), 128, FULL),
    ],
)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(shape, width, table, interleaved, dtype):
    for wide, mixed in ((False, False), (True, False), (False, True)):
        q, k, cos, sin = inputs(*shape, width, dtype, torch.float32 if mixed else None)
        options = {"interleaved": interleaved, "table": table, "wide": wide}
        results = [f(q, k, cos, sin, **options) for f in (rotary, reference.rotary)]
        same_bits(*results)
        # The interpreter cuts bfloat16 off, once for each product and for their sum.
        unit = torch.finfo(dtype).eps / (1 if DEVICE == "cpu" and dtype == torch.bfloat16 else 2)
        for x, *got in zip((q, k), *results, strict=True):
            want, size = oracle(x, cos, sin, interleaved, table)
            for one in got:
                assert ((one.double() - want).abs() <= 2.02 * unit * size + 1e-7).all()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)  # wide or not, float32 is the same
def test_rotary_rounds_where_the_formula_does(dtype):
    args = inputs(1, 8, 2, 40, 64, 64, dtype)
    for wide in (False, True):
        got = rotary(*args, wide=wide)[0]
        same = [
            (got == reference.rotary(*args, wide=each)[0]).double().mean()
            for each in (wide, not wide)
        ]
        if DEVICE == "cuda" or dtype == torch.float16:
            assert same[0] == 1 > 0.9 > same[1]


def test_rotary_reads_any_layout_in_place_and_lays_out_as_asked():
    fused = random(2, 3, 4 * 16 + 2 * 16)
    views = {
        "transposed": (random(2, 3, 4, 8).transpose(1, 2), random(2, 3, 2, 8).transpose(1, 2)),
        "contiguous": (random(2, 4, 3, 8), random(2, 2, 3, 8)),
        "part of a projection": (
            fused[..., :64].view(2, 3, 4, 16).transpose(1, 2)[..., :8],
            fused[..., 64:].view(2, 3, 2, 16).transpose(1, 2)[..., 8:],
        ),
        "repeated": (random(2, 1, 3, 8).expand(-1, 4, -1, -1), random(2, 1, 3, 8)),
        "no tokens": (random(2, 0, 4, 8).transpose(1, 2), random(2, 0, 2, 8).transpose(1, 2)),
    }
    for q, k in views.values():
        tokens = q.shape[2]
        tables = [
            random(2, tokens, 8),
            random(1, tokens, 8).expand(2, -1, -1),
            random(1, 8, tokens).mT,
            random(2, tokens, 16)[..., ::2],
        ]
        for cos, contiguous in itertools.product(tables, (False, True)):
            args = (q, k, cos, cos.roll(1, -1))
            got, want = (f(*args, contiguous=contiguous) for f in (rotary, reference.rotary))
            same_bits(got, want)
            if contiguous:
                assert all(x.is_contiguous() for x in got)


def test_many_tokens_are_one_program_each(monkeypatch):
    monkeypatch.setattr("patchkit.decoding.kernels.rotary._MANY_TOKENS", 6)
    monkeypatch.setattr("patchkit.decoding.kernels.rotary._PAIRS_AT_ONCE", 16)
    args = inputs(2, 7, 3, 3, 20, 12, torch.float32)
    same_bits(rotary(*args), reference.rotary(*args))


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, cos, sin: (q, k[:, :, 1:], cos, sin),
        lambda q, k, cos, sin: (q, k.half(), cos, sin),
        lambda q, k, cos, sin: (q[..., :6], k[..., :6], cos, sin),
        lambda q, k, cos, sin: (q, k, cos[..., :7], sin[..., :7]),
        lambda q, k, cos, sin: (q, k, cos, sin[..., :6]),
        lambda q, k, cos, sin: (q, k, cos[:, 1:], sin[:, 1:]),
        lambda q, k, cos, sin: (q, k, cos.half(), sin.half()),
        lambda q, k, cos, sin: (q, k, cos[0], sin[0]),
        lambda q, k, cos, sin: (q, k, cos.expand(3, -1, -1), sin.expand(3, -1, -1)),
        lambda q, k, cos, sin: (q.mT.contiguous().mT, k, cos, sin),
    ],
)
def test_wrong_arguments_are_refused(change):
    with pytest.raises(ValueError, match="expected"):
        rotary(*change(*inputs(2, 4, 2, 3, 8, 8, torch.float32)))


# -- finding formulas --------------------------------------------------------------------------
