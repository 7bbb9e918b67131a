"""Weights times a few rows: the kernels, and which calls of `linear` they answer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import MethodType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import patchkit
from patchkit.backends import Backend
from patchkit.compat import CACHE_KEYWORD
from patchkit.decoding import reference
from patchkit.decoding.eligibility import may_read_ahead, weights_at_rest
from patchkit.decoding.kernels.gated_activation import gated_activation
from patchkit.decoding.kernels.skinny_gated_linear import skinny_gated_linear
from patchkit.decoding.kernels.skinny_linear import skinny_linear
from patchkit.decoding.launches import StepLaunches, looks_through_torch
from patchkit.step_graph import StepGraph
from patchkit.testing import FAMILIES, reference_attention, tiny_model

from .helpers import DEVICE, by_dtype, random


def outs_of(x, weights):
    return [x.new_full((*x.shape[:-1], len(weight)), torch.nan) for weight in weights]


@by_dtype
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 16, 64])
@pytest.mark.parametrize(
    ("sizes", "width"),
    [((1,), 1), ((63, 1, 7), 97), ((5, 6), 2500), ((2051,), 64), ((130, 33, 33), 1024)],
)
def test_skinny_linear(sizes, width, rows, bias, dtype):
    if rows > 1 and dtype == torch.float32:
        rows = 1  # tensor cores would round float32
    x = random(rows, 1, width, dtype=dtype)
    weights = [random(n, width, dtype=dtype, seed=1 + i) for i, n in enumerate(sizes)]
    biases = [random(n, dtype=dtype, seed=9 + i) for i, n in enumerate(sizes)] if bias else None
    residual = random(rows, 1, sizes[0], dtype=dtype, seed=20) if len(sizes) == 1 else None
    unit = torch.finfo(dtype).eps / (1 if DEVICE == "cpu" and dtype == torch.bfloat16 else 2)
    for implementation in (skinny_linear, reference.skinny_linear):
        outs = outs_of(x, weights)
        total = None if residual is None else torch.full_like(residual, torch.nan)
        implementation(x, weights, outs, biases, residual, total)
        for index, (weight, got) in enumerate(zip(weights, outs, strict=True)):
            shift = biases[index].double() if bias else torch.zeros(len(weight), device=DEVICE)
            oracle = F.linear(x.double(), weight.double(), shift.double())
            # Errors of float32 sums, against the sum of absolute values, then the result's.
            size = F.linear(x.double().abs(), weight.double().abs(), shift.double().abs())
            error = (got.double() - oracle).abs()
            slack = 16 * torch.finfo(torch.float32).eps * size
            assert (error <= 1.01 * unit * oracle.abs() + slack).all()
        if residual is not None:
            exact = residual.double() + outs[0].double()
            assert ((total.double() - exact).abs() <= 1.01 * unit * exact.abs()).all()


def test_skinny_linear_reads_rows_of_a_wider_matrix_only():
    weight = torch.full((40, 96), torch.nan, device=DEVICE)
    weight[:, 16:80] = random(40, 64)
    x = random(64, seed=3)
    outs = outs_of(x, [weight])
    skinny_linear(x, [weight[:, 16:80]], outs)
    torch.testing.assert_close(outs[0], F.linear(x, weight[:, 16:80]))


@by_dtype
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize(("sizes", "width"), [((63, 1, 7), 97), ((5,), 2500), ((33,), 4200)])
def test_weights_at_rest_are_read_ahead_to_the_same_bits(monkeypatch, sizes, width, rows, dtype):
    rows = 1 if dtype == torch.float32 else rows
    x, residual = random(rows, width, dtype=dtype), random(rows, sizes[0], dtype=dtype, seed=9)
    given = (random(n, width, dtype=dtype, seed=1 + i) / 8 for i, n in enumerate(sizes))
    held = nn.ParameterList(nn.Parameter(weight, requires_grad=False) for weight in given)
    weights, alone, asked = list(held), len(sizes) == 1, []

    def spy(weights):
        asked.append(may_read_ahead(weights))
        return asked[-1]

    for kernel in (skinny_linear, skinny_gated_linear):
        monkeypatch.setattr(f"{kernel.__module__}.may_read_ahead", spy)
    results = []
    for resting in (nn.ParameterList(), held):
        outs = outs_of(x, weights)
        total = torch.full_like(residual, torch.nan) if alone else None
        with weights_at_rest(resting):
            skinny_linear(x, weights, outs, None, residual if alone else None, total)
            gated = skinny_gated_linear(x, weights[0], weights[0], activation="silu")
        results.append([*outs, gated, *([total] if alone else [])])
    assert asked == ([False, False, True, True] if rows == 1 else [])
    assert all(
        torch.equal(*pair) and pair[0].isfinite().all() for pair in zip(*results, strict=True)
    )


def test_only_parameters_are_at_rest_and_only_while_somebody_promises():
    module, other = nn.Linear(3, 4), nn.Linear(3, 4)
    assert not may_read_ahead([module.weight])
    with weights_at_rest(module):
        assert may_read_ahead([module.weight]) and may_read_ahead([module.weight, module.bias])
        for foreign in (other.weight, module.weight * 1, module.weight.data):
            assert not may_read_ahead([module.weight, foreign])
        with ThreadPoolExecutor(1) as pool:
            assert not pool.submit(may_read_ahead, [module.weight]).result()
        with pytest.raises(KeyError), weights_at_rest(other):
            assert may_read_ahead([other.weight]) and not may_read_ahead([module.weight])
            raise KeyError
        assert may_read_ahead([module.weight])
        module.weight = nn.Parameter(torch.ones(4, 3))
        assert not any(may_read_ahead([torch.ones(4, 3)]) for _ in range(100))
    assert not may_read_ahead([module.weight])


@pytest.mark.parametrize("known", [True, False])
def test_a_step_reads_its_weights_ahead(monkeypatch, known):
    model = patchkit.apply(tiny_model("llama").to(DEVICE), backend="triton")
    ids, asked = torch.tensor([[5, 6, 7, 8]], device=DEVICE), []

    def spy(weights):
        asked.append(may_read_ahead(weights))
        return asked[-1]

    with torch.no_grad():
        store = model(ids[:, :-1], use_cache=True)[CACHE_KEYWORD]
        for kernel in (skinny_linear, skinny_gated_linear):
            monkeypatch.setattr(f"{kernel.__module__}.may_read_ahead", spy)
        monkeypatch.setattr("patchkit.step_graph.looks_through_torch", lambda _: known)
        step = SimpleNamespace(_few=True, _model=model, _backend=model._patchkit.backend)
        step.choice = SimpleNamespace(token=SimpleNamespace(is_cuda=True))
        step._position = torch.tensor([[3]], device=DEVICE)
        step._inputs = {"input_ids": ids[:, -1:], "position_ids": step._position}
        step._inputs[CACHE_KEYWORD] = store
        StepGraph._forward(step)
    assert asked and set(asked) == {known}
    assert not known or len(asked) == 4 * model.config.num_hidden_layers + 1  # and the head


ONE = torch.ones


@pytest.mark.parametrize(
    ("message", "args"),
    [
        ("one row", (ONE(2, 8), [ONE(4, 8)], [ONE(2, 4)])),
        ("one row", (ONE(65, 8).half(), [ONE(4, 8).half()], [ONE(65, 4).half()])),
        ("one row", (ONE(9), [ONE(4, 8)], [ONE(4)])),
        ("weight: expected", (ONE(8), [ONE(4, 8).half()], [ONE(4)])),
        ("last stride", (ONE(8), [ONE(8, 4).T], [ONE(4)])),
        ("bias", (ONE(8), [ONE(4, 8)], [ONE(4)], [ONE(5)])),
        ("1 to 3", (ONE(8), [ONE(4, 8)] * 4, [ONE(4)] * 4)),
        ("1 to 3", (ONE(8), [ONE(4, 8)], [])),
        ("1 to 3", (ONE(8), [ONE(4, 8)], [ONE(4)], [])),
        ("one row", (ONE(0), [ONE(4, 0)], [ONE(4)])),
        ("1 to 3", (ONE(8), [ONE(4, 8)] * 2, [ONE(4)] * 2, [ONE(4)])),
        ("out: expected", (ONE(8), [ONE(4, 8)], [ONE(5)])),
        ("residual", (ONE(8), [ONE(4, 8)], [ONE(4)], None, ONE(4))),
        ("residual", (ONE(8), [ONE(4, 8)] * 2, [ONE(4)] * 2, None, ONE(4), ONE(4))),
        ("out: expected", (ONE(8), [ONE(4, 8)], [ONE(4)], None, ONE(5), ONE(4))),
    ],
)
def test_skinny_linear_refuses(message, args):
    with pytest.raises(ValueError, match=message):
        skinny_linear(*args)


class Quantised(torch.Tensor):
    pass


def test_only_a_few_plain_rows_are_answered():
    backend = Backend("triton")
    layer = nn.Linear(24, 40, device=DEVICE).requires_grad_(False)
    alien = random(40, 24).as_subclass(Quantised)
    with torch.no_grad(), StepLaunches(backend):
        served = layer(random(1, 1, 24)) * 1
        assert backend.calls["skinny_linear", "triton"] == 1
        layer(random(2, 1, 24))
        F.linear(random(65, 24).half(), random(40, 24).half())
        F.linear(random(24), alien)
        F.linear(random(24), random(24, 40).T)
        F.linear(input=random(24), weight=random(40, 24))
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            layer(random(1, 24))
        with torch.enable_grad():
            layer(random(1, 24))
        assert backend.calls["skinny_linear", "triton"] == 1
        torch.testing.assert_close(
            served, F.linear(random(1, 1, 24).expand(1, 1, -1), *layer.parameters())
        )
    torch.testing.assert_close(served, layer(random(1, 1, 24)))


def own_forward(self, x):
    return x


own_forward.__module__ = "own.models"


def test_maps_wait_only_where_nothing_reads_memory_by_itself():
    model = tiny_model("llama")
    patchkit.apply(model)  # whose one hook is patchkit's own
    assert looks_through_torch(model)
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    assert not looks_through_torch(model)
    handle.remove()
    kind = type(model.model.layers[1].mlp)
    model.model.layers[1].mlp.__class__ = type("Own", (kind,), {"__module__": "own.models"})
    assert not looks_through_torch(model)
    model = tiny_model("qwen3")
    norm = model.model.layers[0].self_attn.q_norm
    norm.forward = MethodType(own_forward, norm)
    assert not looks_through_torch(model)
    model = tiny_model("qwen3")
    assert looks_through_torch(model)
    attention = model.model.layers[0].self_attn
    attention.q_norm = torch.jit.trace(attention.q_norm, torch.ones(1, 1, 4, attention.head_dim))
    assert not looks_through_torch(model)
    backend = Backend("triton")
    x, weight = random(24), random(40, 24)
    with torch.no_grad(), StepLaunches(backend):
        got = F.linear(x, weight)
        assert backend.calls["skinny_linear", "triton"] == 1
    torch.testing.assert_close(got, F.linear(x, weight))


def test_maps_wait_until_somebody_looks():
    backend = Backend("triton")
    x, other = random(1, 1, 24), random(1, 1, 24, seed=8)
    a, b, c, d = (random(n, 24, seed=n) for n in (40, 8, 8, 24))
    bias = random(8, seed=5)
    calls = backend.calls

    def count() -> int:
        return calls["skinny_linear", "triton"]

    with torch.no_grad(), StepLaunches(backend, together=True):
        heads = F.linear(x, a).view(1, 1, 5, 8).transpose(1, 2)
        keys, values = F.linear(x, b), F.linear(x, c)
        assert heads.shape == (1, 5, 1, 8) and count() == 0
        first = heads.sum()
        assert count() == 1
        more = [F.linear(x, b), F.linear(x, b, bias), F.linear(other, d), F.linear(x, c)]
        assert count() == 4  # with and without bias, another vector
        x.add_(1)
        assert count() == 5  # before the vector changed
        x.sub_(1)
        nested = F.linear(F.linear(x, d), d)
        many = [F.linear(x, b) for _ in range(4)]
    assert count() == 9  # what was left, at the end
    torch.testing.assert_close(first, F.linear(x, a).sum())
    torch.testing.assert_close(heads, F.linear(x, a).view(1, 1, 5, 8).transpose(1, 2))
    for got, weight in (
        (keys, b),
        (values, c),
        (more[0], b),
        (more[3], c),
        *((m, b) for m in many),
    ):
        torch.testing.assert_close(got, F.linear(x, weight))
    torch.testing.assert_close(more[1], F.linear(x, b, bias))
    torch.testing.assert_close(more[2], F.linear(other, d))
    torch.testing.assert_close(nested, F.linear(F.linear(x, d), d))


def test_a_residual_is_added_in_the_same_launch():
    backend = Backend("triton")
    x, residual = random(1, 1, 24), random(1, 1, 40, seed=2)
    weight = random(40, 24, seed=3)
    with torch.no_grad(), StepLaunches(backend, together=True):
        mapped = F.linear(x, weight)
        total = residual + mapped
        assert backend.calls["skinny_linear", "triton"] == 1
        swapped = F.linear(x, weight) + residual
        doubled = F.linear(x, weight)
        doubled = doubled + doubled
        viewed = F.linear(x, weight)
        viewed = viewed + viewed.view(viewed.shape)
        scaled = F.linear(x, weight) + 1.0
        wide = F.linear(x, weight) + residual.double()
        pair = (F.linear(x, weight), F.linear(x, weight))
        both = residual + pair[1]
    plain = F.linear(x, weight)
    for got, want in (
        (mapped, plain), (total, residual + plain), (swapped, plain + residual),
        (doubled, plain + plain), (viewed, plain + plain), (scaled, plain + 1.0), (pair[0], plain),
        (both, residual + plain),
    ):  # fmt: skip
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(wide, plain + residual.double(), atol=1e-5, rtol=1e-5)


def test_what_waits_is_no_weight_of_the_same_launch():
    backend = Backend("triton")
    x, weight = random(1, 24), random(40, 24)
    with torch.no_grad(), StepLaunches(backend, together=True):
        flat = F.linear(x.flatten(), weight)
        biased = F.linear(x.flatten(), weight, flat)
        square = F.linear(x, random(24, 24, seed=5))
        mapped = F.linear(x, square)
    assert backend.calls["skinny_linear", "triton"] == 4
    torch.testing.assert_close(biased, 2 * flat)
    torch.testing.assert_close(mapped, F.linear(x, square))


def test_an_error_inside_is_not_hidden():
    backend = Backend("triton")
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        torch.no_grad(),
        StepLaunches(backend, True),
    ):
        F.linear(random(24), random(40, 24))
        raise RuntimeError("on purpose")
    assert not backend.calls
    assert F.linear(random(2, 24), random(40, 24)).shape == (2, 40)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_every_family(family):
    model = tiny_model(family, attn_implementation=reference_attention(family)).to(DEVICE)
    ids = torch.randint(5, 90, (1, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    options = {"use_cache": True, "logits_to_keep": 1}
    with torch.no_grad():
        want = model(ids).logits[:, -1]
        patchkit.apply(model, backend="triton")
        store = model(ids[:, :-1], **options)[CACHE_KEYWORD]
        backend = model._patchkit.backend
        before = backend.calls["skinny_linear", "triton"]
        step = {"position_ids": torch.tensor([[8]], device=DEVICE)}
        with StepLaunches(backend, together=True):
            got = model(ids[:, -1:], **step, **options, **{CACHE_KEYWORD: store}).logits[:, -1]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    layers = model.config.get_text_config().num_hidden_layers
    launches = backend.calls["skinny_linear", "triton"] - before
    assert layers < launches
    if family == "llama":  # queries to values, output, down-projection; and the head
        assert launches == 3 * layers + 1


@by_dtype
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize(("size", "width"), [(63, 97), (5, 2500), (130, 1024)])
def test_skinny_gated_linear_is_two_products_and_an_activation(
    size, width, rows, activation, bias, dtype
):
    x = random(1 if dtype == torch.float32 else rows, 1, width, dtype=dtype)
    gate, up = (random(size, width, dtype=dtype, seed=seed) / 8 for seed in (1, 2))
    shifts = [random(size, dtype=dtype, seed=seed) if bias else None for seed in (3, 4)]
    parts = outs_of(x, (gate, up))
    skinny_linear(x, (gate, up), parts, shifts if bias else None)
    want = gated_activation(*parts, activation=activation)
    got = skinny_gated_linear(x, gate, up, *shifts, activation=activation)
    # Both multiply in the same order, but tiles of other sizes may round a sum otherwise.
    torch.testing.assert_close(got, want, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)
    plain = reference.skinny_gated_linear(x.double(), gate.double(), up.double(),
                                   *(s if s is None else s.double() for s in shifts),
                                   activation=activation)  # fmt: skip
    torch.testing.assert_close(got.double(), plain, rtol=0.05, atol=0.1 * float(plain.abs().mean()))


def test_skinny_gated_linear_refuses():
    x, weight = torch.ones(8), torch.ones(4, 8)
    for args in ((x, weight, weight[:3]), (x[:7], weight, weight)):
        with pytest.raises(ValueError, match="expected"):
            skinny_gated_linear(*args, activation="silu")
    with pytest.raises(ValueError, match="activation must be"):
        skinny_gated_linear(x, weight, weight, activation="relu")


@pytest.mark.parametrize("attention_bias", [False, True])
def test_mlps_map_a_single_vector_at_once(attention_bias):
    model = tiny_model("llama", mlp_bias=attention_bias).to(DEVICE)
    one = torch.tensor([[5]], device=DEVICE)
    with torch.no_grad():
        want, several = model(one).logits, model(one.expand(1, 3)).logits
        patchkit.apply(model, backend="triton")
        calls = model._patchkit.backend.calls
        torch.testing.assert_close(model(one).logits, want, atol=1e-5, rtol=1e-5)
        assert calls["skinny_gated_linear", "triton"] == len(model.model.layers)
        torch.testing.assert_close(model(one.expand(1, 3)).logits, several, atol=1e-5, rtol=1e-5)
        seen = []
        model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(model(one).logits, want, atol=1e-5, rtol=1e-5)
    assert seen == [1]
    assert calls["skinny_gated_linear", "triton"] == 2 * len(model.model.layers) - 1


def test_a_step_of_several_rows_in_half_precision():
    model = tiny_model("llama").to(DEVICE, torch.float16)
    ids = torch.randint(5, 90, (3, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with torch.no_grad():
        want = model(ids).logits[:, -1]
        patchkit.apply(model, backend="triton")
        store = model(ids[:, :-1], use_cache=True)[CACHE_KEYWORD]
        backend = model._patchkit.backend
        before, gated = (
            backend.calls[op, "triton"] for op in ("skinny_linear", "skinny_gated_linear")
        )
        step = {"position_ids": torch.full((3, 1), 8, device=DEVICE), CACHE_KEYWORD: store}
        with StepLaunches(backend, together=True):
            got = model(ids[:, -1:], **step).logits[:, -1]
    layers = model.config.num_hidden_layers
    assert backend.calls["skinny_linear", "triton"] - before == 3 * layers + 1
    assert backend.calls["skinny_gated_linear", "triton"] - gated == layers
    torch.testing.assert_close(got, want, atol=0.02 * float(want.abs().max()), rtol=0)
