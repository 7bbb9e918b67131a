"""What a store that evicts can do besides, what it refuses, and what it reports."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

import patchkit
from patchkit import CAKE, H2O, TOVA, AdaKV, KVStore, PyramidKV, SnapKV, Window
from patchkit.errors import CacheError, UnsupportedGenerationError
from patchkit.testing import tiny_model

from ..helpers import with_cache
from .eviction_cases import CASES, SNAP, build, feed, positions, stream


def test_scores_cannot_be_taken_back_but_a_store_can_be_copied():
    model = build()
    ids, valid = stream([23], 8)
    with patchkit.patched(model, H2O(budget=12)):
        (_, store) = list(feed(model, ids, valid, [23, 1]))[-1]
        kept = positions(store)
        twin = copy.deepcopy(store)
        with torch.no_grad():
            asked = model(ids[:, 24:28], use_cache=True, **with_cache(twin)).logits
            with pytest.raises(CacheError, match="deepcopy"):
                twin.crop(-4)
            assert positions(store) == kept
            again = model(ids[:, 24:28], use_cache=True, **with_cache(store)).logits
    assert torch.equal(asked, again)


def test_a_custom_mask_is_refused_before_anything_changes():
    model = build()
    ids, valid = stream([20], 8)
    mask = torch.zeros(1, 1, 8, 28, dtype=torch.float64)
    with patchkit.patched(model, H2O(budget=12)), torch.no_grad():
        ((_, store),) = feed(model, ids, valid, [20])
        kept = positions(store)
        with pytest.raises(UnsupportedGenerationError, match="4-D"):
            model(ids[:, 20:], attention_mask=mask, use_cache=True, **with_cache(store))
        model(ids[:, 20:], use_cache=True, **with_cache(store))
    assert positions(store) != kept


@pytest.mark.parametrize("where", ["right", "hole", "later turn"])
def test_padding_behind_a_token_is_refused(where):
    model = build()
    ids, valid = stream([20, 20], 8)
    column = {"right": 19, "hole": 9, "later turn": 20}[where]
    valid[1, column] = False
    with patchkit.patched(model, H2O(budget=12)):
        fed = feed(model, ids, valid, [20, 8])
        if where == "later turn":
            next(fed)
        with pytest.raises(CacheError, match="pad on the left"):
            next(fed)
        with patchkit.patched(build(), Window(budget=12)) as other:
            assert len(list(feed(other, ids, valid, [20, 8]))) == 2


@pytest.mark.parametrize("cls", [Window, H2O, PyramidKV])
def test_device_and_host_agree_about_fractions(cls):
    layer = KVStore(patchkit.apply(build(), cls(budget=0.5))).store_layers[-1]
    layer.length, layer.columns = torch.zeros(1, 1, dtype=torch.int32), 1
    layer.policy.allocate(layer)
    lengths = torch.arange(1, 4097, dtype=torch.int32)
    for k in range(1, 101):
        policy = layer.policy
        policy.tokens = k / 100
        policy.prompt_length = lengths[:, None]
        layer.length = lengths[:, None]
        policy.set_budget(layer)
        highest = []
        for n in (*range(1, 200), 1000, 4095, 4096):
            policy._prompt_bound = n
            policy.prompt_length, layer.length = (lengths[n - 1 : n, None] for _ in range(2))
            policy.set_budget(layer)
            highest.append((policy.highest, int(policy.budget[0, 0])))
        assert all(host == device for host, device in highest), k


@pytest.mark.parametrize("cls", [H2O, SnapKV, CAKE])
def test_a_failed_prompt_frees_its_layers(cls):
    model = build()
    ids, valid = stream([40], 0)
    with patchkit.patched(model, cls(budget=40)):
        store = KVStore(model)
        layers = [weakref.ref(layer) for layer in store.store_layers]
        handle = model.model.layers[1].mlp.register_forward_hook(_fail)
        gc.disable()
        try:
            with torch.no_grad(), pytest.raises(RuntimeError, match="on purpose"):
                model(ids, use_cache=True, **with_cache(store))
            model._patchkit.store = None
            del store
            assert all(layer() is None for layer in layers)
        finally:
            gc.enable()
            handle.remove()


def _fail(*_):
    raise RuntimeError("on purpose")


@pytest.mark.parametrize("cls", [Window, H2O, AdaKV, CAKE])
def test_rows_of_a_store_filled_in_inference_mode_can_be_permuted(cls):
    model = build()
    ids, valid = stream([50, 50], 1)
    with patchkit.patched(model, cls(budget=40)):
        with torch.inference_mode():
            (_, store) = list(feed(model, ids, valid, [50, 1]))[-1]
        kept = positions(store)
        store.reorder_cache(torch.tensor([1, 0]))
    assert positions(store) == [rows[::-1] for rows in kept]


@pytest.mark.parametrize("cls", [H2O, SnapKV, AdaKV, TOVA, CAKE])
def test_a_step_over_a_shared_latent_can_be_recorded(cls):
    model = patchkit.apply(tiny_model("deepseek_v2"), cls(budget=40), backend="triton")
    ids, valid = stream([45], 2)
    (_, store) = list(feed(model, ids, valid, [45, 1]))[-1]
    with store.stepping(8, recording=True), torch.no_grad():
        model(ids[:, 46:], position_ids=torch.tensor([[46]]), use_cache=True, **with_cache(store))


@pytest.mark.parametrize("cls", [Window, H2O, SnapKV, PyramidKV, AdaKV, TOVA, CAKE])
def test_a_bound_in_bytes_holds(cls):
    model = build(layers=4, dtype=torch.float32)
    ids, valid = stream([900, 700], 2)
    wanted = 1_000_000 if cls is not PyramidKV else 2_000_000
    with patchkit.patched(model, cls(budget_bytes=wanted)):
        *_, (_, store) = feed(model, ids, valid, [900, 1, 1])
        *_, (_, short) = feed(model, ids[:, -60:], valid[:, -60:], [10, *[1] * 50])
    assert sum(t.nbytes for layer in short.store_layers for t in layer.slots().values()) <= wanted
    slots = sum(t.nbytes for layer in store.store_layers for t in layer.slots().values())
    uniform = cls not in (PyramidKV, CAKE)
    assert slots <= wanted if uniform else slots <= 1.3 * wanted
    assert slots > wanted / 2
    with (
        patchkit.patched(model, cls(budget_bytes=1000)),
        pytest.raises(CacheError, match="budget_bytes"),
    ):
        next(feed(model, ids, valid, [900]))


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("recent", lambda: H2O(recent=1.0)),
        ("norm", lambda: H2O(norm="max")),
        ("decay", lambda: H2O(decay=1.0)),
        ("score_queries", lambda: H2O(score_queries="first:3")),
        ("norm='mean'", lambda: H2O(norm="mean", score_queries="last:8")),
        ("window", lambda: SnapKV(window=1)),
        ("kernel_size", lambda: SnapKV(kernel_size=4)),
        ("num_sink_tokens \\+ window=36", lambda: SnapKV(budget=36)),
        ("beta", lambda: PyramidKV(beta=0.5)),
        ("one budget", lambda: PyramidKV(budget=[64, 64])),
        ("one budget", lambda: CAKE(budget=[64, 64])),
        ("one budget per layer", lambda: AdaKV(budget=[[64, 64], [64, 64]])),
        ("floor", lambda: AdaKV(floor=1.5)),
        ("at most 64", lambda: CAKE(window=65)),
        ("temperatures", lambda: CAKE(tau1=0.0)),
        ("dense_layers", lambda: CAKE(dense_layers=0)),
        ("one int per layer", lambda: TOVA(budget=[[8, 9]])),
        ("budget_bytes", lambda: Window(budget_bytes=0)),
        ("0, 1", lambda: CAKE(budget=1.5)),
    ],
)
def test_settings_are_checked(message, make):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["h2o", "adakv", "cake", "snapkv fraction", "tova"])
def test_a_saved_store_goes_on_where_it_was(name, tmp_path):
    method, _ = CASES[name]
    model = build(dtype=torch.float32)
    ids, valid = stream([23, 11], 9)
    path = tmp_path / "chat.safetensors"
    with patchkit.patched(model, method), torch.no_grad():
        (_, store) = list(feed(model, ids, valid, [23, 1, 1]))[-1]
        store.save(path)
        loaded = KVStore.load(path, model)
        assert positions(loaded) == positions(store)
        for chunk in (slice(25, 26), slice(26, 30), slice(30, 31)):
            want, got = (
                model(
                    ids[:, chunk],
                    attention_mask=valid[:, : chunk.stop].long(),
                    use_cache=True,
                    **with_cache(cache),
                ).logits
                for cache in (store, loaded)
            )
            assert torch.equal(got, want)
            assert positions(loaded) == positions(store)
        store.activate_past_recording()
        with pytest.raises(CacheError, match="crop"):
            store.save(path)
    with patchkit.patched(model), pytest.raises(CacheError, match="saved with kv_eviction"):
        KVStore.load(path, model)
    fewer = build(layers=2, dtype=torch.float32)
    with patchkit.patched(fewer, method), pytest.raises(CacheError, match="3 layers"):
        KVStore.load(path, fewer)
    assert path.stat().st_size < 64_000  # 12 of 256 slots


def test_the_report_counts_what_went():
    model = build()
    ids, valid = stream([40, 30], 2)
    with patchkit.patched(model, CAKE(budget=12, **SNAP)):
        (_, store) = list(feed(model, ids, valid, [40, 1, 1]))[-1]
        report = patchkit.report(model)
    assert report.kv_dense_bytes == 3 * 2 * 2 * 42 * 2 * 16 * 8
    tokens = 42 + 32
    held = [int(length.sum()) for length in store.lengths()]
    assert list(report.kv_evicted) == [2 * tokens - kept for kept in held]
    assert [layer.policy.highest for layer in store.store_layers] == list(report.kv_budgets)
    assert "evicted" in str(report) and "instead of" in str(report)
