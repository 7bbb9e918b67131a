"""Experts that are read in place: kernels against references, and which modules they serve."""

from __future__ import annotations

import pytest
import torch

import patchkit
from patchkit.compat import CACHE_KEYWORD
from patchkit.decoding.launches import StepLaunches
from patchkit.moe import reference
from patchkit.moe.experts import find_formula
from patchkit.moe.kernels.combined_experts import combined_experts
from patchkit.moe.kernels.gated_experts import gated_experts
from patchkit.testing import reference_attention, tiny_model

from ..decoding.helpers import DEVICE, by_dtype, random

EXPERTS = 5


def routing(tokens, top_k):
    generator = torch.Generator().manual_seed(3)
    chosen = [torch.randperm(EXPERTS, generator=generator)[:top_k] for _ in range(tokens)]
    return torch.stack(chosen).to(DEVICE)


def close(got, want, roundings):
    """Allow so many rounding errors to the dtype, and those of float32 sums of 1,300 products."""
    unit = torch.finfo(want.dtype if want.dtype != torch.float64 else got.dtype).eps
    unit /= 1 if DEVICE == "cpu" and got.dtype == torch.bfloat16 else 2
    limits = {"rtol": roundings * unit, "atol": 2 * roundings * unit + 1e-5}
    torch.testing.assert_close(got.double(), want.double(), **limits)


SIZES = pytest.mark.parametrize(
    ("tokens", "top_k", "width", "inner"),
    [(1, 1, 1, 1), (1, 4, 97, 63), (3, 2, 1300, 5), (16, 5, 24, 9)],
)


@by_dtype
@SIZES
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_experts(tokens, top_k, width, inner, activation, dtype):
    x = random(tokens, width, dtype=dtype)
    weight = random(EXPERTS, 2 * inner, width, dtype=dtype, seed=1) / width**0.5
    index = routing(tokens, top_k)
    got = gated_experts(x, weight, index, activation=activation)
    want = reference.gated_experts(x, weight, index, activation=activation)
    assert got.shape == (tokens, top_k, inner) and got.dtype == dtype
    # A projection on the edge between two numbers may round otherwise.
    close(got, want, 8)
    exact = reference.gated_experts(x.double(), weight.double(), index, activation=activation)
    close(got, exact, 16)


@by_dtype
@SIZES
@pytest.mark.parametrize("wide", [False, True])
def test_combined_experts(tokens, top_k, width, inner, wide, dtype):
    x = random(tokens, top_k, inner, dtype=dtype)
    weight = random(EXPERTS, width, inner, dtype=dtype, seed=1) / inner**0.5
    index = routing(tokens, top_k)
    scores = random(tokens, top_k, dtype=torch.float32 if wide else dtype, seed=2).softmax(-1)
    got = combined_experts(x, weight, index, scores)
    want = reference.combined_experts(x, weight, index, scores)
    assert got.shape == (tokens, width) and got.dtype == dtype
    close(got, want, 8)
    exact = reference.combined_experts(x.double(), weight.double(), index, scores.double())
    close(got, exact, 16)


def test_experts_that_nobody_chose_are_not_read():
    weight = random(EXPERTS, 6, 24)
    weight[[0, 3]] = torch.nan
    index = torch.tensor([[1, 2], [4, 1]], device=DEVICE)
    found = gated_experts(random(2, 24), weight, index, activation="silu")
    down = random(EXPERTS, 24, 3)
    down[[0, 3]] = torch.nan
    assert combined_experts(found, down, index, torch.ones(2, 2, device=DEVICE)).isfinite().all()


SERVED = ["olmoe", "mixtral", "qwen3_moe", "deepseek_v2"]


def experts_of(model):
    return [m for m in model.modules() if type(m).__name__.endswith("Experts")]


@pytest.mark.parametrize("family", [*SERVED, "gpt_oss"])
def test_what_the_kernels_describe(family):
    model = tiny_model(family)
    served = len(experts_of(model)) if family in SERVED else 0
    with patchkit.patched(model):
        assert patchkit.report(model).fused["expert layers"] == (served, len(experts_of(model)))
    assert not any("forward" in vars(module) for module in experts_of(model))


def test_another_loop_is_not_taken_for_this_one():
    module = experts_of(tiny_model("qwen3_moe"))[0]
    kind = type(module)

    class Doubled(kind):
        def forward(self, x, index, scores):
            return 2 * kind.forward.__wrapped__(self, x, index, scores)

    assert find_formula(module) is not None
    module.__class__ = Doubled
    assert find_formula(module) is None


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", SERVED)
def test_a_step_with_experts(family, rows):
    model = tiny_model(family, attn_implementation=reference_attention(family)).to(DEVICE)
    ids = torch.randint(5, 90, (rows, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with torch.no_grad():
        want = model(ids).logits[:, -1]
        patchkit.apply(model, backend="triton")
        store = model(ids[:, :-1], use_cache=True)[CACHE_KEYWORD]
        calls = model._patchkit.backend.calls
        before = calls["combined_experts", "triton"]
        step = {"position_ids": torch.full((rows, 1), 8, device=DEVICE), CACHE_KEYWORD: store}
        with StepLaunches(model._patchkit.backend, together=True):
            got = model(ids[:, -1:], **step).logits[:, -1]
    assert calls["combined_experts", "triton"] - before == len(experts_of(model))
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


def test_many_tokens_go_the_way_that_the_configuration_names():
    model = tiny_model("qwen3_moe").to(DEVICE)
    ids = torch.randint(5, 90, (1, 17), device=DEVICE)
    with patchkit.patched(model, backend="triton"), torch.no_grad():
        model(ids)
        calls = patchkit.report(model).calls
        assert "gated_experts" not in calls
        model(ids[:, :16])
        assert patchkit.report(model).calls["gated_experts"]["triton"] == len(experts_of(model))
