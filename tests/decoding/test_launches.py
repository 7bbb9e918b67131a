"""Which launches of a step wait for each other, and that nobody sees a result too early."""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import patchkit
from patchkit import H2O, TOVA, AdaKV, Window, backends
from patchkit.attention.kernels.append import append
from patchkit.attention.store_layer import StoreLayer
from patchkit.backends import Backend
from patchkit.compat import CACHE_KEYWORD
from patchkit.decoding.kernels.rotary import rotary
from patchkit.decoding.launches import StepLaunches, looks_through_torch
from patchkit.decoding.rotary import FusedRotary
from patchkit.testing import FAMILIES, reference_attention, tiny_model

from ..attention.test_kernels_rotary_append import Case, Step
from .helpers import DEVICE, random


def test_operations_of_any_backend_look(monkeypatch):
    load = backends._load
    backend, other = Backend("triton"), Backend("triton")
    x, weight = random(1, 24), random(40, 24, seed=1)

    def read(area, op, used):  # calls no function of torch
        return (lambda _: dict(backend.calls)) if op == "read" else load(area, op, used)

    monkeypatch.setattr(backends, "_load", read)
    with torch.no_grad(), StepLaunches(backend, together=True):
        mapped = F.linear(x, weight)
        assert not backend.calls
        found = other.run("decoding", "read", x.device, mapped)
    assert found == {("skinny_linear", "triton"): 1}


def test_operations_are_what_they_are_inside_of_other_modes():
    backend, x = Backend("triton"), random(2, 24)
    with torch.device(DEVICE):
        got = backend.run("decoding", "rms_norm", x.device, x, x[0], eps=1e-6)
    assert torch.equal(got, backend.run("decoding", "rms_norm", x.device, x, x[0], eps=1e-6))
    assert backend.calls == {("rms_norm", "triton"): 2}


# -- rotary embedding and the store's append -----------------------------------------------------


def step_of(model, rows=1, prompt=8, together=True, **inputs):
    """Feed a prompt, with more inputs perhaps, and then one token per row, as a step does.

    Returns:
        The logits of the step, how often it called each operation, and the store.
    """
    ids = torch.randint(5, 90, (rows, prompt + 1), generator=torch.Generator().manual_seed(0))
    ids, backend = ids.to(DEVICE), model._patchkit.backend
    with torch.no_grad():
        store = model(ids[:, :-1], use_cache=True, **inputs)[CACHE_KEYWORD]
        before = Counter(backend.calls)
        step = {"position_ids": torch.full((rows, 1), prompt, device=DEVICE), CACHE_KEYWORD: store}
        with StepLaunches(backend, together):
            logits = model(ids[:, -1:], **step).logits[:, -1]
    return logits, Counter({op: n for (op, _), n in (backend.calls - before).items()}), store


SERVED = sorted(set(FAMILIES) - {"opt", "deepseek_v2"})


@pytest.mark.parametrize(
    ("family", "rows", "dtype"),
    [
        *((family, 1, torch.float32) for family in (*SERVED, "deepseek_v2")),
        # One per kind of attention.
        *((family, 3, torch.float16) for family in ("llama", "qwen3", "gemma3", "gpt_neox")),
    ],
)
def test_a_step_rotates_and_appends_at_once(family, rows, dtype):
    model = tiny_model(family, attn_implementation=reference_attention(family)).to(DEVICE, dtype)
    patchkit.apply(model, backend="triton")
    got, calls, _ = step_of(model, rows)
    want, before, _ = step_of(model, rows, together=False)
    assert torch.equal(got, want)
    layers = model.config.get_text_config().num_hidden_layers
    if family in SERVED:
        assert calls["rotary_append"] == layers
        assert calls["rotary"] == calls["append"] == 0
        assert before["rotary"] == before["append"] == layers
    else:
        assert calls["append"] == layers and calls["rotary_append"] == 0
    norms_of_heads = family in ("qwen3", "qwen3_moe", "gemma3")
    assert calls["rms_norm"] == before["rms_norm"] - norms_of_heads * 2 * layers
    if family in ("llama", "qwen3", "gemma3", "olmoe"):  # queries to values, output, down; the head
        assert calls["skinny_linear"] == 3 * layers + 1


def test_padded_prompts_step_as_others_do():
    model = patchkit.apply(tiny_model("qwen3").to(DEVICE), backend="triton")
    mask = torch.ones(3, 8, dtype=torch.int64, device=DEVICE)
    mask[0, :5] = mask[2, :1] = 0
    (got, calls, _), (want, *_) = (
        step_of(model, 3, together=together, attention_mask=mask) for together in (True, False)
    )
    assert torch.equal(got, want) and calls["rotary_append"] == 2


@pytest.mark.parametrize("method", [AdaKV, H2O, TOVA, Window])
def test_policies_see_what_they_do_without(method):
    stores = []
    for together in (True, False):
        model = patchkit.apply(tiny_model("qwen3").to(DEVICE), method(budget=40), backend="triton")
        logits, calls, store = step_of(model, 2, 60, together)
        assert calls["rotary_append" if together else "append"] == 2
        if method is AdaKV:
            assert store.layers[0].list_start is not None
        stores.append([logits, *(t for layer in store.layers for t in layer.tensors().values())])
    for got, want in zip(*stores, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_rotation_that_waits_may_read_what_another_takes_over():
    def run(together):
        backend, device = Backend("triton"), torch.device(DEVICE)
        q, k = [random(1, 4, 1, 8, seed=seed) for seed in (0, 1)], random(1, 2, 1, 8, seed=2)
        weight, cos = random(8, seed=3), random(1, 1, 8, seed=4)
        keys, position = torch.zeros(1, 2, 16, 8, device=device), torch.full((1, 2, 16), -1)
        length = torch.zeros(1, 2, dtype=torch.int32, device=device)
        held = (keys, keys.clone(), position.int().to(device), length, length.clone())
        with torch.no_grad(), StepLaunches(backend, together):
            norm = partial(backend.run, "decoding", "rms_norm", device, eps=1e-6)
            one, other, key = (norm(x, weight) for x in (*q, k))
            first = backend.run("decoding", "rotary", device, one, key, cos, cos)
            second = backend.run("decoding", "rotary", device, other, key, cos, cos)
            backend.run("attention", "append", device, *held, second[1], k)
        return [*first, *second, *held]

    for got, want in zip(run(True), run(False), strict=True):
        assert torch.equal(got, want)


class Between:
    """Stands between the rotary embedding of a Llama layer and the store."""

    def __init__(self, monkeypatch, change):
        self.model = patchkit.apply(tiny_model("qwen3").to(DEVICE), backend="triton")
        update = StoreLayer.update
        monkeypatch.setattr(
            StoreLayer, "update", lambda layer, k, v, *args, **kw: update(layer, *change(k, v))
        )

    def check(self, at_once):
        got, calls, store = step_of(self.model)
        want, _, other = step_of(self.model, together=False)
        assert torch.equal(got, want)
        for layer, expected in zip(store.layers, other.layers, strict=True):
            for name, tensor in layer.tensors().items():
                assert torch.equal(tensor, expected.tensors()[name]), name
        assert calls["rotary_append"] == (2 if at_once else 0)
        assert calls["rotary"] == calls["append"] == (0 if at_once else 2)


@pytest.mark.parametrize(
    ("change", "at_once"),
    [
        (lambda k, v: (k, v), True),
        (lambda k, v: (k + 0, v), False),
        (lambda k, v: (k.view(k.shape), v), False),
        (lambda k, v: (k.transpose(2, 3).transpose(2, 3), v), False),
        (lambda k, v: (k, v * k.sum()), False),
        (lambda k, v: (k, k), False),
        (lambda k, v: (v, k), False),
        (lambda k, v: (k, v.double()), False),
    ],
)
def test_whoever_looks_between_rotation_and_append_sees_the_keys(monkeypatch, change, at_once):
    Between(monkeypatch, change).check(at_once)


def test_values_that_are_what_is_normalised(monkeypatch):
    seen = []
    norm = type(tiny_model("qwen3").model.layers[0].self_attn.k_norm)
    call = norm.__call__

    def remember(self, x):
        seen.append(call(self, x))
        return seen[-1]

    monkeypatch.setattr(norm, "__call__", remember)

    def change(k, v):  # the newest norm is that of the keys
        return k, seen[-1].transpose(1, 2)

    Between(monkeypatch, change).check(at_once=False)


def test_what_was_normalised_and_rotated_is_there_for_whoever_kept_it(monkeypatch):
    kept = []
    rotate = FusedRotary.rotate

    def keep(self, q, k, cos, sin):
        kept.append((q, k, *rotate(self, q, k, cos, sin)))
        return kept[-1][2:]

    monkeypatch.setattr(FusedRotary, "rotate", keep)
    model = patchkit.apply(tiny_model("qwen3").to(DEVICE), backend="triton")
    steps = []
    for together in (True, False):
        _, calls, _ = step_of(model, together=together)
        steps.append([x for layer in kept[-2:] for x in layer])
    assert calls["rotary"] == 2
    for got, want in zip(*steps, strict=True):
        assert torch.equal(got, want) and got.stride() == want.stride()


@pytest.mark.parametrize("valid", [None, [True, False]])
def test_tokens_of_padding_are_appended_alone(valid):
    case = Case(batch_size=2)
    step, plain = (Step(case, torch.float32) for _ in range(2))
    backend = Backend("triton")
    valid = valid if valid is None else torch.tensor(valid, device=DEVICE)[:, None]
    args = (step.q, step.k, step.cos, step.sin)
    with torch.no_grad(), StepLaunches(backend, together=True):
        q, k = backend.run("decoding", "rotary", step.k.device, *args)
        backend.run("attention", "append", step.k.device, *step.store, k, step.v, valid)
    plain.outs = rotary(*args)
    append(*plain.store, plain.outs[1], plain.v, valid)
    for got, want in zip((q, k, *step.store), (*plain.outs, *plain.store), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert backend.calls["rotary_append", "triton"] == (valid is None)


def test_a_copied_store_has_a_backend_of_its_own():
    model = patchkit.apply(tiny_model("llama").to(DEVICE), backend="triton")
    ids = torch.randint(5, 90, (1, 9), device=DEVICE)
    results = []
    with torch.no_grad():
        store = model(ids[:, :-1], use_cache=True)[CACHE_KEYWORD]
        for together in (True, False):
            twin = copy.deepcopy(store)
            assert twin.layers[0].backend is not model._patchkit.backend
            step = {"position_ids": torch.full((1, 1), 8, device=DEVICE), CACHE_KEYWORD: twin}
            with StepLaunches(model._patchkit.backend, together):
                results.append(model(ids[:, -1:], **step).logits)
            assert ("rotary_append", "triton") in twin.layers[0].backend.calls or not together
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_adapters_step_as_others_do():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_model("qwen3").to(DEVICE), config).eval()
    patchkit.apply(model, backend="triton")
    assert looks_through_torch(model)
    inner = model.base_model.model
    got, calls, _ = step_of(inner, 3)
    want, *_ = step_of(inner, 3, together=False)
    assert torch.equal(got, want) and calls["rotary_append"] == 2
