"""Choice of experts: the kernel, finding the formula, and when a router keeps its forward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import patchkit
from patchkit.compat import CACHE_KEYWORD
from patchkit.decoding.launches import StepLaunches
from patchkit.moe import reference
from patchkit.moe.kernels.top_experts import top_experts
from patchkit.moe.router import TopExperts, find_formula
from patchkit.testing import reference_attention, tiny_model

from ..decoding.helpers import DEVICE, by_dtype, random
from .helpers import unwritten_is_nan

__all__ = ["unwritten_is_nan"]

OPTIONS = pytest.mark.parametrize("normalised", [False, True])
SIZES = pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [(1, 1, 1), (1, 128, 8), (3, 60, 4), (16, 7, 7), (2, 300, 20), (5, 4, 1), (40, 16, 3)],
)


@by_dtype
@SIZES
@OPTIONS
@pytest.mark.usefixtures("unwritten_is_nan")
def test_top_experts(tokens, experts, top_k, normalised, dtype):
    logits = 4 * random(tokens, experts, dtype=dtype)
    oracle, chosen = reference.top_experts(
        logits.double(), top_k, normalised=normalised, rounded=False
    )
    for rounded in (False, True):
        for implementation in (top_experts, reference.top_experts):
            scores, index = implementation(logits, top_k, normalised=normalised, rounded=rounded)
            assert torch.equal(index, chosen) and index.dtype == torch.int64
            assert scores.dtype == (dtype if rounded else torch.float32)
            assert scores.shape == (tokens, top_k) and scores.is_contiguous()
            kind = torch.finfo(scores.dtype)
            # The interpreter cuts bfloat16 off where a GPU rounds to the nearest.
            unit = kind.eps / (1 if DEVICE == "cpu" and kind.bits == 16 else 2)
            # The exponent's own rounding is relative to its size, at most that of 32 logits.
            limit = 1.01 * unit + 48 * torch.finfo(torch.float32).eps
            least = kind.smallest_normal * kind.eps
            torch.testing.assert_close(scores.double(), oracle, rtol=limit, atol=least)


@by_dtype
@pytest.mark.usefixtures("unwritten_is_nan")
def test_of_equal_logits_the_first(dtype):
    logits = torch.zeros(4, 9, dtype=dtype, device=DEVICE)
    logits[0, ::2] = -0.0  # equal to 0.0
    logits[1, [3, 5, 8]] = 2.0
    logits[2, 4:] = -torch.inf
    logits[2, :3] = torch.finfo(dtype).smallest_normal / 4  # above 0.0
    logits[3] = -torch.inf
    expected = [[0, 1, 2, 3, 4], [3, 5, 8, 0, 1], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    for implementation in (top_experts, reference.top_experts):
        scores, index = implementation(logits, 5, normalised=True, rounded=False)
        assert index.tolist() == expected
        torch.testing.assert_close(scores[0], torch.full_like(scores[0], 0.2))
        assert scores[3].isnan().all()


@by_dtype
def test_numbers_of_all_sizes_are_in_order(dtype):
    generator = torch.Generator().manual_seed(0)
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    limit = 1 << (8 * kind.itemsize - 1)
    bits = torch.randint(-limit, limit, (3, 200), generator=generator).to(kind)
    bits[:, :4] = torch.tensor([-limit, -limit + 1, 0, 1])  # zeros and the smallest numbers
    logits = bits[:, torch.randperm(200, generator=generator)].view(dtype).to(DEVICE)
    _, index = top_experts(logits, 200, normalised=True, rounded=True)
    # Sorting on a GPU has an order of its own for NaN.
    _, expected = reference.top_experts(logits.cpu(), 200, normalised=True, rounded=True)
    assert torch.equal(index.cpu(), expected)


@by_dtype
@OPTIONS
@pytest.mark.usefixtures("unwritten_is_nan")
def test_nan_and_infinity_give_experts_that_exist(normalised, dtype):
    logits = random(4, 13, dtype=dtype)
    logits[0] = torch.nan
    logits[1, [2, 9]] = torch.tensor([torch.nan, torch.inf], dtype=dtype, device=DEVICE)
    logits[2, [5, 11]] = torch.inf
    logits[3, 3] = -torch.nan
    options = {"normalised": normalised, "rounded": False}
    scores, index = top_experts(logits, 4, **options)
    want, chosen = reference.top_experts(logits.cpu(), 4, **options)
    assert torch.equal(index.cpu(), chosen)
    assert index[1].tolist()[:2] == [2, 9] and index[2].tolist()[:2] == [5, 11] and index[3, 0] == 3
    # Eager gives NaN to all experts of such a token; so does the kernel to all that it chose.
    assert want.isnan().all() and scores.isnan().all()


def test_other_layouts_and_no_tokens():
    logits = random(6, 5)
    for view in (logits.mT, logits[::2], logits[:0]):
        for got, want in zip(
            top_experts(view, 2, normalised=True, rounded=True),
            reference.top_experts(view, 2, normalised=True, rounded=True),
            strict=True,
        ):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("logits", "top_k"),
    [
        (random(2, 3, 4), 1),
        (random(2, 3), 4),
        (random(2, 3), 0),
        (random(1, 1025), 1),
        (random(2, 3).double(), 1),
    ],
)
def test_wrong_arguments_are_refused(logits, top_k):
    with pytest.raises(ValueError, match="expected"):
        top_experts(logits, top_k, normalised=True, rounded=True)


# -- finding formulas --------------------------------------------------------------------------

FORMULAS = {
    "olmoe": TopExperts(False, True, False),
    "mixtral": TopExperts(True, False, None),
    "qwen3_moe": TopExperts(False, True, False),
}


def routers_of(model):
    return [module for module in model.modules() if type(module).__name__.endswith("Router")]


@pytest.mark.parametrize("family", [*FORMULAS, "deepseek_v2", "gpt_oss"])
def test_what_the_kernel_describes(family):
    model = tiny_model(family)
    before = [dict(vars(module)) for module in model.modules()]
    routers = routers_of(model)
    with patchkit.patched(model):
        served = len(routers) if family in FORMULAS else 0
        assert patchkit.report(model).fused["routers"] == (served, len(routers))
        for router in routers:
            held = vars(router).get("_patchkit")
            assert (held and held.formula) == FORMULAS.get(family)
            assert ("patchkit" in repr(router)) == (family in FORMULAS)
    assert [dict(vars(module)) for module in model.modules()] == before


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_the_configuration_decides_whether_scores_add_up_to_one(family):
    router = routers_of(tiny_model(family, norm_topk_prob=True))[0]
    assert find_formula(router) == TopExperts(True, True, True)


class Almost(nn.Module):
    """A router in the way of Mixtral; those below differ from every formula somewhere."""

    def __init__(self, bias=False):
        super().__init__()
        self.top_k, self.scale, self.weight = 2, 1.0, nn.Parameter(torch.zeros(6, 8))
        if bias:
            self.bias = nn.Parameter(torch.zeros(6))

    def choose(self, logits):
        scores, index = logits.float().softmax(-1).topk(self.top_k)
        return scores / scores.sum(-1, keepdim=True), index

    def forward(self, x):
        logits = nn.functional.linear(x, self.weight)
        return logits, *self.choose(logits)


class Sigmoid(Almost):
    def choose(self, logits):
        scores, index = logits.float().sigmoid().topk(self.top_k)
        return scores / scores.sum(-1, keepdim=True), index


class Narrow(Almost):
    def choose(self, logits):
        return super().choose(logits.softmax(-1).log())


class Scaled(Almost):
    def choose(self, logits):
        scores, index = super().choose(logits)
        return scores * 2.5, index


class Ascending(Almost):
    def choose(self, logits):
        return tuple(result.flip(-1) for result in super().choose(logits))


class Grouped(Almost):
    def choose(self, logits):
        return super().choose(logits.index_fill(-1, torch.arange(3), -torch.inf))


class Wide(Almost):
    def forward(self, x):
        return super().forward(x.float())


class Softcapped(Almost):
    def forward(self, x):
        logits = 30 * (nn.functional.linear(x, self.weight) / 30).tanh()
        return logits, *self.choose(logits)


class TakesMore(Almost):
    def forward(self, x, bias=None):
        return super().forward(x)


class Dense(Almost):
    def choose(self, logits):
        scores, index = super().choose(logits)
        return torch.zeros_like(logits, dtype=torch.float32).scatter(1, index, scores), index


OTHERS = [Sigmoid, Narrow, Scaled, Ascending, Grouped, Wide, Softcapped, TakesMore, Dense]


def test_other_formulas_are_left_alone():
    assert find_formula(Almost()) == TopExperts(True, False, None)
    for other in (*(kind() for kind in OTHERS), Almost(bias=True)):
        assert find_formula(other) is None, type(other).__name__


# -- running -----------------------------------------------------------------------------------


def kernel_calls(model):
    return patchkit.report(model).calls.get("top_experts", {}).get("triton", 0)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("olmoe", {"norm_topk_prob": False}),
        ("mixtral", {}),
        ("qwen3_moe", {"norm_topk_prob": True}),
    ],
)
def test_logits_are_those_of_the_model(family, options):
    attention = reference_attention(family)
    options |= {"num_hidden_layers": 1, "attn_implementation": attention}
    model = tiny_model(family, **options).to(DEVICE)
    ids = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    routers = len(routers_of(model))
    with torch.no_grad():
        want = model(ids, output_router_logits=True)
        with patchkit.patched(model, backend="triton"):
            got = model(ids, output_router_logits=True)  # more tokens than a step has
            assert kernel_calls(model) == routers
            torch.testing.assert_close(got.logits, want.logits, atol=2e-4, rtol=2e-4)
            for ours, theirs in zip(got.router_logits, want.router_logits, strict=True):
                torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)
            cache = model(ids[:, :-1], use_cache=True)[CACHE_KEYWORD]
            step = {"position_ids": torch.full((2, 1), 8, device=DEVICE), CACHE_KEYWORD: cache}
            before = kernel_calls(model)
            with StepLaunches(model._patchkit.backend, together=True):
                last = model(ids[:, -1:], **step).logits
            assert kernel_calls(model) - before == routers
            torch.testing.assert_close(last, want.logits[:, -1:], atol=2e-4, rtol=2e-4)
        assert torch.equal(model(ids).logits, want.logits)


@pytest.fixture
def router():
    """A fused router on the kernel."""
    model = patchkit.apply(tiny_model("qwen3_moe").to(DEVICE), backend="triton")
    with torch.no_grad():
        yield routers_of(model)[0]


def served(router, x, **kwargs):
    """Call a router, compare with its class, and say whether the kernel answered."""
    calls = vars(router)["_patchkit"].backend.calls
    before = calls["top_experts", "triton"]
    got, want = router(x, **kwargs), type(router).forward(router, x)
    assert [t.dtype for t in got] == [t.dtype for t in want]
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)
    return calls["top_experts", "triton"] > before


def test_a_step_answers_the_linear_map(router):
    x, calls = random(1, 64), vars(router)["_patchkit"].backend.calls
    with StepLaunches(vars(router)["_patchkit"].backend, together=True):
        got = router(x)
    assert calls["skinny_linear", "triton"] == calls["top_experts", "triton"] == 1
    for ours, theirs in zip(got, type(router).forward(router, x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_when_a_router_keeps_its_forward(router, monkeypatch):
    x = random(3, 64)
    assert served(router, x)
    assert not served(router, random(2, 3, 64))
    with torch.enable_grad():
        assert not served(router, x)
    router.train()
    assert not served(router, x)
    router.eval()
    router.norm_topk_prob = True
    assert not served(router, x)
    router.norm_topk_prob, router.top_k = False, 3
    assert served(router, x), "the number of experts is asked for anew"
    with torch.autocast(DEVICE, torch.bfloat16):
        assert not served(router, x)
    monkeypatch.setattr(type(router), "forward", lambda self, x: (x, x, x))
    assert not served(router, x)


def test_keywords_take_the_module_s_own_forward(router):
    calls = vars(router)["_patchkit"].backend.calls
    router(hidden_states=random(2, 64))
    assert not calls["top_experts", "triton"]


def test_restore_reaches_the_copies_that_peft_made():
    from peft import LoraConfig, get_peft_model

    plain = tiny_model("qwen3_moe").to(DEVICE)
    model = patchkit.apply(tiny_model("qwen3_moe").to(DEVICE))
    config = {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}
    model, plain = (get_peft_model(m, LoraConfig(**config)) for m in (model, plain))
    copies = [m for m in routers_of(model) if "_patchkit" in vars(m)]
    assert len(copies) == 4, "two layers, and a copy of each"
    patchkit.restore(model)
    assert not any("_patchkit" in vars(module) for module in model.modules())
    ids = torch.tensor([[3, 4, 5]], device=DEVICE)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
