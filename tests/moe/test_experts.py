"""Experts that are read in place: kernels against references, and which modules they serve."""

from __future__ import annotations

import pytest
import torch

import patchkit
from patchkit import backends
from patchkit.backends import Backend
from patchkit.compat import CACHE_KEYWORD
from patchkit.decoding.launches import StepLaunches
from patchkit.decoding.reference import rms_norm as reference_rms_norm
from patchkit.moe import reference
from patchkit.moe.experts import find_formula
from patchkit.moe.kernels.combined_experts import combined_experts
from patchkit.moe.kernels.gated_experts import gated_experts, shares_experts
from patchkit.testing import reference_attention, tiny_model

from ..decoding.helpers import DEVICE, by_dtype, random
from .helpers import routing, unwritten_is_nan

__all__ = ["unwritten_is_nan"]

EXPERTS = 5


def close(got, want, roundings):
    """Allow so many rounding errors to the dtype, and those of float32 sums of 1,300 products."""
    unit = torch.finfo(want.dtype if want.dtype != torch.float64 else got.dtype).eps
    unit /= 1 if DEVICE == "cpu" and got.dtype == torch.bfloat16 else 2
    limits = {"rtol": roundings * unit, "atol": 2 * roundings * unit + 1e-5}
    torch.testing.assert_close(got.double(), want.double(), **limits)


# Tokens of half precision share experts in all but the first five and the one of 40 experts.
SIZES = pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "width", "inner"),
    [
        (1, 1, 5, 1, 1),
        (1, 4, 5, 97, 63),
        (3, 1, 9, 300, 1),
        (1, 3, 5, 63, 700),
        (1, 2, 5, 2900, 63),
        (2, 5, 5, 70, 130),
        (3, 2, 5, 1300, 5),
        (3, 6, 40, 33, 65),
        (16, 5, 5, 24, 9),
        (40, 2, 5, 24, 9),
        (70, 2, 5, 24, 9),
    ],
)


@by_dtype
@SIZES
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.usefixtures("unwritten_is_nan")
def test_gated_experts(tokens, top_k, experts, width, inner, activation, dtype):
    x = random(tokens, width, dtype=dtype)
    weight = random(experts, 2 * inner, width, dtype=dtype, seed=1) / width**0.5
    index = routing(tokens, top_k, experts)
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
@pytest.mark.usefixtures("unwritten_is_nan")
def test_combined_experts(tokens, top_k, experts, width, inner, wide, dtype):
    x = random(tokens, top_k, inner, dtype=dtype)
    weight = random(experts, width, inner, dtype=dtype, seed=1) / inner**0.5
    index = routing(tokens, top_k, experts)
    scores = random(tokens, top_k, dtype=torch.float32 if wide else dtype, seed=2).softmax(-1)
    got = combined_experts(x, weight, index, scores)
    want = reference.combined_experts(x, weight, index, scores)
    assert got.shape == (tokens, width) and got.dtype == dtype
    close(got, want, 8)
    exact = reference.combined_experts(x.double(), weight.double(), index, scores.double())
    close(got, exact, 16)
    residual = random(tokens, 1, width, dtype=dtype, seed=3)
    for implementation, summed in ((combined_experts, got), (reference.combined_experts, want)):
        out, total = (torch.full_like(x, torch.nan) for x in (got, residual))
        outs = {"out": out, "residual": residual, "total": total}
        assert implementation(x, weight, index, scores, **outs) is out
        assert torch.equal(out, summed)
        exact = residual.double() + out.double()[:, None]
        unit = torch.finfo(dtype).eps / (1 if DEVICE == "cpu" and dtype == torch.bfloat16 else 2)
        assert ((total.double() - exact).abs() <= 1.01 * unit * exact.abs()).all()


@pytest.mark.parametrize("tokens", [1, 4])
def test_combined_experts_refuses(tokens):
    x, weight = random(tokens, 3, 40).half(), random(EXPERTS, 30, 40, seed=1).half()
    index, scores = routing(tokens, 3, EXPERTS), random(tokens, 3, seed=2)
    fits, short = random(tokens, 30).half(), random(tokens, 29).half()
    for name, outs in (
        ("out", {"out": short}),
        ("out", {"out": fits.float()}),
        ("residual", {"residual": short, "total": fits}),
        ("total", {"residual": fits, "total": random(tokens, 60).half()[:, ::2]}),
        ("residual and total", {"residual": fits}),
        ("residual and total", {"total": fits}),
    ):
        with pytest.raises(ValueError, match=name):
            combined_experts(x, weight, index, scores, **outs)
    with pytest.raises(ValueError, match="scores"):
        combined_experts(x, weight, index, scores[:, :2])
    with pytest.raises(ValueError, match="x: expected"):
        combined_experts(x[:, :2], weight, index, scores)


@pytest.mark.parametrize("tokens", [1, 4])
def test_products_with_scores_are_rounded_if_scores_are(tokens):
    x, weight = random(tokens, 3, 40).half(), random(EXPERTS, 300, 40, seed=1).half()
    index = routing(tokens, 3, EXPERTS)
    scores = random(tokens, 3, seed=2).softmax(-1).half()
    want = [reference.combined_experts(x, weight, index, s) for s in (scores, scores.float())]
    for given, (rounded, wide) in ((scores, want), (scores.float(), want[::-1])):
        got = combined_experts(x, weight, index, given)
        assert (got == rounded).double().mean() > 0.99 > 0.9 > (got == wide).double().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.usefixtures("unwritten_is_nan")
def test_a_token_may_name_an_expert_again(dtype):
    index = torch.tensor([[2, 1, 2], [1, 2, 1], [0, 0, 0], [3, 2, 4]], device=DEVICE)
    x, weight = random(4, 20, dtype=dtype), random(EXPERTS, 12, 20, dtype=dtype, seed=1)
    got = gated_experts(x, weight, index, activation="silu")
    close(got, reference.gated_experts(x, weight, index, activation="silu"), 8)
    x, weight = random(4, 3, 6, dtype=dtype), random(EXPERTS, 20, 6, dtype=dtype, seed=1)
    scores = random(4, 3, dtype=dtype, seed=2).softmax(-1)
    got = combined_experts(x, weight, index, scores)
    close(got, reference.combined_experts(x, weight, index, scores), 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_a_token_gets_does_not_depend_on_the_others(dtype):
    first = routing(6, 3, EXPERTS)
    second = torch.cat((first[:2], first[2:].flip(0, 1)))
    x, weight = random(6, 40, dtype=dtype), random(EXPERTS, 18, 40, dtype=dtype, seed=1)
    down, scores = random(EXPERTS, 40, 9, dtype=dtype, seed=2), random(6, 3, dtype=dtype, seed=3)
    results = []
    for index in (first, second):
        found = gated_experts(x, weight, index, activation="silu")
        results.append((found[:2], combined_experts(found, down, index, scores)[:2]))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_equal_numbers_of_pairs_and_experts_decide_who_shares():
    weight = random(8, 2, 2, dtype=torch.float16)
    for tokens, top_k, shared in ((1, 8, False), (2, 2, True), (3, 1, False), (65, 2, False)):
        assert shares_experts(routing(tokens, top_k, 8), weight) == shared
        assert not shares_experts(routing(tokens, top_k, 8), weight.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_experts_that_nobody_chose_are_not_read(dtype):
    weight = random(EXPERTS, 6, 24, dtype=dtype)
    weight[[0, 3]] = torch.nan
    index = torch.tensor([[1, 2], [4, 1]], device=DEVICE)
    found = gated_experts(random(2, 24, dtype=dtype), weight, index, activation="silu")
    down = random(EXPERTS, 24, 3, dtype=dtype)
    down[[0, 3]] = torch.nan
    scores = torch.ones(2, 2, device=DEVICE)
    assert combined_experts(found, down, index, scores).isfinite().all()


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


@pytest.mark.parametrize(
    ("rows", "dtype"),
    [(1, torch.float32), (3, torch.float32), (3, torch.float16)],
    ids=["1-float32", "3-float32", "3-float16"],
)
@pytest.mark.parametrize("family", SERVED)
def test_a_step_with_experts(family, rows, dtype):
    attention = reference_attention(family)
    model = tiny_model(family, attn_implementation=attention, dtype=dtype).to(DEVICE)
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
    limit = 2e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, want, atol=limit, rtol=limit)


@pytest.mark.parametrize(("family", "added"), [("qwen3_moe", True), ("deepseek_v2", False)])
def test_a_residual_is_added_where_experts_are_summed_up(monkeypatch, family, added):
    model = tiny_model(family, attn_implementation=reference_attention(family)).to(DEVICE)
    ids = torch.randint(5, 90, (1, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    load, residuals = backends._load, []

    def spy(area, op, used):
        kernel = load(area, op, used)
        if op != "combined_experts":
            return kernel
        return lambda *args, **options: (
            residuals.append("total" in options) or kernel(*args, **options)
        )

    with torch.no_grad():
        want = model(ids).logits[:, -1]
        patchkit.apply(model, backend="triton")
        store = model(ids[:, :-1], use_cache=True)[CACHE_KEYWORD]
        monkeypatch.setattr(backends, "_load", spy)
        step = {"position_ids": torch.full((1, 1), 8, device=DEVICE), CACHE_KEYWORD: store}
        with StepLaunches(model._patchkit.backend, together=True):
            got = model(ids[:, -1:], **step).logits[:, -1]
    assert residuals == [added] * len(experts_of(model))  # what is shared comes in between
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


@pytest.mark.usefixtures("unwritten_is_nan")
def test_whoever_looks_at_a_sum_of_experts_sees_it():
    backend = Backend("triton")
    x, down = random(2, 3, 40), random(EXPERTS, 30, 40, seed=1)
    index, scores = routing(2, 3, EXPERTS), random(2, 3, seed=2)
    residual = random(1, 2, 30, seed=4)
    want = combined_experts(x, down, index, scores)

    def summed():
        return backend.run("moe", "combined_experts", x.device, x, down, index, scores)

    with torch.no_grad(), StepLaunches(backend, together=True):
        before = backend.calls.total()
        kept = summed()
        seen = kept.reshape(1, 2, 30)
        assert backend.calls.total() == before
        total = residual + seen
        assert backend.calls.total() == before + 1
        doubled = summed()
        doubled = doubled.view(1, 2, 30) + doubled.reshape(1, 2, 30)
        part = residual[:, :1] + summed()[:1]
        turned = summed().transpose(0, 1).reshape(2, 30)  # copies
        normed = backend.run("decoding", "rms_norm", x.device, summed(), down[0, 0, :30], eps=1e-6)
        left = summed()
    norm = reference_rms_norm(want, down[0, 0, :30], eps=1e-6)
    for got, wanted in (
        (kept, want), (seen, want[None]), (total, residual + want), (doubled, 2 * want[None]),
        (part, residual[:, :1] + want[:1]), (turned, want.t().reshape(2, 30)), (left, want),
        (normed, norm),
    ):  # fmt: skip
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("limit", [16.0, 1e3])
def test_experts_that_clamp_are_not_taken_for_these(limit):
    module = experts_of(tiny_model("qwen3_moe"))[0]

    class Clamped(torch.nn.Module):
        def forward(self, gate):
            return torch.nn.functional.silu(gate.clamp(max=limit))

    assert find_formula(module) is not None
    module.act_fn = Clamped()
    assert find_formula(module) is None


def test_a_mixture_is_still_one_graph_to_the_compiler():
    model = patchkit.apply(tiny_model("qwen3_moe"))
    ids = torch.randint(5, 90, (1, 7))
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        whole = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(whole(ids, use_cache=False).logits, want)


def test_many_tokens_go_the_way_that_the_configuration_names():
    model = tiny_model("qwen3_moe").to(DEVICE)
    ids = torch.randint(5, 90, (1, 65), device=DEVICE)
    with patchkit.patched(model, backend="triton"), torch.no_grad():
        model(ids)
        calls = patchkit.report(model).calls
        assert "gated_experts" not in calls
        model(ids[:, :64])
        assert patchkit.report(model).calls["gated_experts"]["triton"] == len(experts_of(model))
