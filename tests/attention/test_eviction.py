"""Score-based eviction equals loops in float64, in every way of feeding tokens."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig

import patchkit
from patchkit import CAKE, H2O, TOVA, AdaKV, KVStore, PyramidKV, SnapKV, Window
from patchkit.attention.cake import calibrate, round_to_total, water_fill
from patchkit.errors import CacheError, UnsupportedGenerationError
from patchkit.testing import left_padded_batch, tiny_model

from ..helpers import with_cache
from .eviction_oracle import (
    EvictionOracle,
    adakv_rule,
    cake_rule,
    h2o_rule,
    snapkv_rule,
    tova_rule,
)

VOCAB = 97
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5, "check_dtype": False}


def pyramid(protected, beta):
    def share(depth, layers, most):
        fall = (2 - 2 / beta) / max(layers - 1, 1) if layers > 1 else 0
        return most + max(most - protected, 0) * fall * ((layers - 1) / 2 - depth)

    return share


WINDOW = {"sinks": 2, "window": 4, "width": 3}
SNAP = {"num_sink_tokens": 2, "window": 4, "kernel_size": 3}
CASES = {
    "h2o": (H2O(budget=12), h2o_rule(12)),
    "h2o mean": (
        H2O(budget=12, norm="mean", num_sink_tokens=1),
        h2o_rule(12, sinks=1, norm="mean"),
    ),
    "h2o ema": (
        H2O(budget=0.5, norm="ema", decay=0.8, recent=0.25),
        h2o_rule(0.5, norm="ema", decay=0.8, recent=0.25),
    ),
    "h2o last": (H2O(budget=9, score_queries="last:3", recent=0), h2o_rule(9, recent=0, window=3)),
    "tova": (TOVA(budget=11), tova_rule(11)),
    "snapkv": (SnapKV(budget=13, **SNAP), snapkv_rule(13, **WINDOW)),
    "snapkv fraction": (SnapKV(budget=0.6, **SNAP), snapkv_rule(0.6, **WINDOW)),
    "pyramidkv": (
        PyramidKV(budget=14, beta=4, **SNAP),
        snapkv_rule(14, share=pyramid(6, 4), **WINDOW),
    ),
    "adakv": (AdaKV(budget=13, **SNAP), adakv_rule(13, **WINDOW)),
    "adakv fraction": (
        AdaKV(budget=0.6, floor=0.75, **SNAP),
        adakv_rule(0.6, floor=0.75, **WINDOW),
    ),
    "adakv roomy": (AdaKV(budget=0.8, floor=0.5, **SNAP), adakv_rule(0.8, floor=0.5, **WINDOW)),
    "cake": (CAKE(budget=12, dense_layers=1, **SNAP), cake_rule(12, **WINDOW)),
    "cake tau": (
        CAKE(budget=0.6, tau1=0.5, tau2=2.0, gamma=5.0, **SNAP),
        cake_rule(0.6, tau1=0.5, tau2=2.0, gamma=5.0, **WINDOW),
    ),
}
GROUPS = {
    1: {"num_key_value_heads": 4},
    2: {},
    4: {"num_key_value_heads": 1},
    7: {"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 56},
}


def build(groups: int = 2, layers: int = 3, dtype=torch.float64, **overrides):
    return tiny_model("llama", dtype=dtype, num_hidden_layers=layers, **GROUPS[groups], **overrides)


def positions(store: KVStore) -> list:
    """Return the columns held, by layer, row and head."""
    kept = []
    for layer in store.store_layers:
        begin = torch.zeros_like(layer.length) if layer.list_start is None else layer.list_start
        lists = zip(layer.lists()[2], begin, layer.length, strict=True)
        kept.append(
            [
                [
                    sorted(row[i : i + n].tolist())
                    for row, i, n in zip(rows, first.tolist(), counts.tolist(), strict=True)
                ]
                for rows, first, counts in lists
            ]
        )
    return kept


def stream(lengths, extra, seed=5):
    """Make left-padded rows and what follows them: ids and validity `[B, N]`."""
    batch = left_padded_batch(VOCAB, lengths)
    generator = torch.Generator().manual_seed(seed)
    tail = torch.randint(1, VOCAB, (len(lengths), extra), generator=generator)
    mask = batch["attention_mask"].bool()
    valid = torch.cat([mask, torch.ones_like(tail, dtype=torch.bool)], dim=1)
    return torch.cat([batch["input_ids"], tail], dim=1), valid


@torch.no_grad()
def feed(model, ids, valid, chunks):
    """Feed a patched model in chunks; yield each chunk's logits and the store."""
    yield from feed_into(None, model, ids, valid, chunks)


@torch.no_grad()
def feed_into(store, model, ids, valid, chunks, start=0):
    """Do so into a store that holds the columns before `start`."""
    for chunk in chunks:
        end = start + chunk
        position_ids = (valid.long().cumsum(-1) - 1).clamp(min=0)[:, start:end]
        out = model(
            ids[:, start:end],
            attention_mask=valid[:, :end].long(),
            position_ids=position_ids,
            use_cache=True,
            **with_cache(store),
        )
        store = out.past_key_values
        yield out.logits, store
        start = end


@pytest.mark.parametrize(
    ("name", "groups"),
    [(name, 2) for name in CASES]
    + [(name, g) for name in ("h2o", "cake", "adakv") for g in (1, 4, 7)],
)
def test_equals_loops(name, groups):
    method, rule = CASES[name]
    lengths, chunks = [23, 11], [23, 1, 1, 1, 7, 1, 1, 3, 1]
    ids, valid = stream(lengths, sum(chunks) - 23)
    oracle = EvictionOracle(build(groups), rule)
    with patchkit.patched(build(groups), method) as model:
        start = 0
        for logits, store in feed(model, ids, valid, chunks):
            chunk = slice(start, start + logits.shape[1])
            want = oracle(ids[:, chunk], valid[:, chunk])
            assert positions(store) == oracle.kept(), f"after column {chunk.stop}"
            real = valid[:, chunk]
            torch.testing.assert_close(logits[real], want[real], **TOLERANCE)
            start = chunk.stop


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_float32_keeps_the_same_tokens(name, backend):
    method, rule = CASES[name]
    ids, valid = stream([19, 12], 4)
    oracle = EvictionOracle(build(), rule)
    with patchkit.patched(build(dtype=torch.float32), method, backend=backend) as model:
        start = 0
        for logits, store in feed(model, ids, valid, [19, 1, 1, 1, 1]):
            chunk = slice(start, start + logits.shape[1])
            want = oracle(ids[:, chunk], valid[:, chunk])
            assert positions(store) == oracle.kept()
            real = valid[:, chunk]
            torch.testing.assert_close(
                logits[real], want[real], atol=2e-3, rtol=2e-3, check_dtype=False
            )
            start = chunk.stop


@pytest.mark.parametrize("name", CASES)
def test_rows_do_not_see_each_other(name):
    method, _ = CASES[name]
    ids, valid = stream([23, 3, 17, 1], 5)
    chunks = [23, 1, 1, 3]
    with patchkit.patched(build(), method) as model:
        together = [(logits, positions(store)) for logits, store in feed(model, ids, valid, chunks)]
        for b in range(4):
            skipped = int((~valid[b]).sum())
            own = (ids[b : b + 1, skipped:], valid[b : b + 1, skipped:])
            alone = feed(model, *own, [23 - skipped, *chunks[1:]])
            for (logits, kept), (own_logits, store) in zip(together, alone, strict=True):
                torch.testing.assert_close(
                    logits[b, -own_logits.shape[1] :], own_logits[0], **TOLERANCE
                )
                mine = [[[c - skipped for c in head] for head in layer[b]] for layer in kept]
                assert [layer[0] for layer in positions(store)] == mine


@pytest.mark.parametrize("name", CASES)
def test_a_budget_that_holds_everything_changes_nothing(name):
    method, _ = CASES[name]
    roomy = type(method)(**{**vars(method), "budget": 200})
    ids, valid = stream([23, 11], 6)
    model = build()
    with patchkit.patched(model):
        dense = [logits for logits, _ in feed(model, ids, valid, [23, 1, 1, 4])]
    with patchkit.patched(model, roomy):
        got = list(feed(model, ids, valid, [23, 1, 1, 4]))
    for (logits, _), want in zip(got, dense, strict=True):
        assert torch.equal(logits, want)
    store = got[-1][1]
    assert all(layer.length.max() == 29 for layer in store.store_layers)


@pytest.mark.parametrize("name", CASES)
def test_generate_and_beams(name):
    method, _ = CASES[name]
    batch = left_padded_batch(VOCAB, [19, 11])
    beams = GenerationConfig(
        num_beams=3, num_return_sequences=3, max_new_tokens=10, do_sample=False, pad_token_id=0
    )
    model = build()
    with patchkit.patched(model, method):
        greedy = model.generate(
            **batch, max_new_tokens=10, do_sample=False, return_dict_in_generate=True
        )
        out = model.generate(
            **batch, generation_config=beams, return_dict_in_generate=True, output_scores=True
        )
        # The best beam is what feeding its tokens alone would have scored.
        ids = out.sequences[:, :-1]
        valid = batch["attention_mask"].bool().repeat_interleave(3, dim=0)
        valid = torch.cat([valid, valid.new_ones(6, 9)], dim=1)
        logits = torch.cat([step for step, _ in feed(model, ids, valid, [19, *[1] * 9])], dim=1)
    taken = logits[:, 18:].log_softmax(-1).gather(-1, out.sequences[:, 19:, None])[..., 0]
    torch.testing.assert_close(out.sequences_scores, taken.sum(-1) / 10, **TOLERANCE)
    budget = method.budget
    for layer in greedy.past_key_values.store_layers:
        if isinstance(method, AdaKV) and isinstance(budget, int):
            assert layer.length.sum(1).eq(2 * budget).all()
        elif isinstance(budget, int) and not isinstance(method, (CAKE, PyramidKV)):
            assert layer.length.eq(budget).all()


@pytest.mark.parametrize("method", [H2O(budget=12), AdaKV(budget=12, **SNAP)])
def test_second_turn_through_generate_feeds_the_new_tokens_only(method):
    model = build()
    batch = left_padded_batch(VOCAB, [23, 11])
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    with patchkit.patched(model, method):
        first = model.generate(**batch, **options)
        turn = torch.randint(1, VOCAB, (2, 5), generator=torch.Generator().manual_seed(3))
        ids = torch.cat([first.sequences, turn], dim=1)
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 11, dtype=torch.long)], dim=1)
        store = first.past_key_values
        second = model.generate(ids, attention_mask=mask, **with_cache(store), **options)
        chunks = [23, *[1] * 5, 6, *[1] * 5]
        fed = list(feed(model, second.sequences[:, :-1], _valid(mask, second), chunks))
    logits = torch.cat([logits for logits, _ in fed], dim=1)
    assert torch.equal(logits[:, -6:].argmax(-1), second.sequences[:, -6:])
    assert positions(store) == positions(fed[-1][1])


def _valid(mask, out):
    new = out.sequences.shape[1] - 1 - mask.shape[1]
    return torch.cat([mask.bool(), torch.ones(len(mask), new, dtype=torch.bool)], dim=1)


@pytest.mark.parametrize("dense_layers", [1, 2, 3, 8])
def test_cascade_equals_one_cut_at_the_end(dense_layers):
    ids, valid = stream([150, 90], 0)
    at_once = CAKE(budget=30, dense_layers=8, **SNAP)
    model = build(layers=8)
    with patchkit.patched(model, at_once):
        ((want, one_cut),) = feed(model, ids, valid, [150])
    with patchkit.patched(model, CAKE(budget=30, dense_layers=dense_layers, **SNAP)):
        ((got, cascaded),) = feed(model, ids, valid, [150])
    assert torch.equal(got, want)
    assert positions(cascaded) == positions(one_cut)
    for row in range(2):
        budgets = [int(layer.policy.budget[row, 0]) for layer in cascaded.store_layers]
        assert sum(budgets) == 30 * 8 and len(set(budgets)) > 1
        assert [int(layer.length[row, 0]) for layer in cascaded.store_layers] == budgets


def test_water_filling_and_rounding():
    assert water_fill([1, 1, 2], 8, [9, 9, 9]) == [2, 2, 4]
    assert water_fill([1, 1, 2], 8, [9, 9, 2]) == [3, 3, 2]
    assert water_fill([1, 4, 16], 12, [5, 5, 5]) == pytest.approx([2, 5, 5])
    assert water_fill([1, 2], 8, [3, 3]) == [3, 3]
    assert water_fill([0, 0], 8, [9, 9]) == [4, 4]
    assert round_to_total([1.5, 2.25, 4.25], 8) == [2, 2, 4]
    assert round_to_total([3, 3], 9) == [5, 4]
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        weights = torch.randn(9, generator=generator).mul(2).exp().tolist()
        caps = torch.randint(0, 40, (9,), generator=generator).tolist()
        total = int(torch.randint(1, sum(caps) + 20, (1,), generator=generator))
        real = water_fill(weights, total, caps)
        whole = round_to_total(real, total)
        assert sum(whole) == total
        assert all(abs(w - r) < 1 for w, r in zip(whole, real, strict=True)) or sum(caps) < total
        # One layer more only takes away from the others: what makes cascading exact.
        fewer = water_fill(weights[:-1], total, caps[:-1])
        assert all(r <= f + 1e-9 for r, f in zip(real, fewer, strict=False))


def test_sliding_layers_keep_recent_tokens_only():
    model = tiny_model("gemma2", dtype=torch.float64)
    ids, valid = stream([40], 3)
    with patchkit.patched(model, H2O(budget=12)):
        *_, (_, store) = feed(model, ids, valid, [40, 1, 1, 1])
    for layer in store.store_layers:
        if layer.sliding_window is not None:
            assert layer.length.eq(7).all() and layer.score is None
        else:
            assert layer.length.eq(12).all() and layer.score is not None


@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss", "gemma2", "qwen3_moe"])
@pytest.mark.parametrize("name", ["h2o", "snapkv", "adakv", "cake", "tova"])
def test_padding_changes_nothing_in_other_families(family, name):
    method, _ = CASES[name]
    model = tiny_model(family)
    ids, valid = stream([30, 13], 2)
    with patchkit.patched(model, method):
        both = [
            (logits[1], positions(store)) for logits, store in feed(model, ids, valid, [30, 1, 1])
        ]
        alone = feed(model, ids[1:, 17:], valid[1:, 17:], [13, 1, 1])
        for (logits, kept), (own, store) in zip(both, alone, strict=True):
            torch.testing.assert_close(logits[-own.shape[1] :], own[0], atol=1e-4, rtol=1e-4)
            mine = [[[c - 17 for c in head] for head in layer[1]] for layer in kept]
            assert [layer[0] for layer in positions(store)] == mine


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


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma2", "deepseek_v2"])
def test_sums_of_a_prompt_are_those_of_eager_attention(family):
    plain = tiny_model(family, attn_implementation="eager")
    ids = torch.randint(1, VOCAB, (2, 25), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        weights = plain(ids, output_attentions=True).attentions
        model = patchkit.apply(tiny_model(family), H2O(budget=64))
        store = KVStore(model)
        model(ids, use_cache=True, **with_cache(store))
    compared = 0
    for layer, attention in zip(store.store_layers, weights, strict=True):
        if layer.score is not None:
            heads = layer.score.shape[1]
            want = attention.sum(-2).unflatten(1, (heads, -1)).sum(2)
            torch.testing.assert_close(layer.score[:, :, :25], want, atol=1e-4, rtol=1e-4)
            compared += 1
    assert compared


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
    assert sum(t.nbytes for layer in short.store_layers for t in layer._slots().values()) <= wanted
    slots = sum(t.nbytes for layer in store.store_layers for t in layer._slots().values())
    uniform = cls not in (PyramidKV, CAKE)
    assert slots <= wanted if uniform else slots <= 1.3 * wanted
    assert slots > wanted / 2
    with (
        patchkit.patched(model, cls(budget_bytes=1000)),
        pytest.raises(CacheError, match="budget_bytes"),
    ):
        next(feed(model, ids, valid, [900]))


def test_calibration_returns_the_pair_with_the_lowest_loss():
    model = build(dtype=torch.float32)
    ids = torch.randint(1, VOCAB, (1, 60), generator=torch.Generator().manual_seed(1))
    method, losses = CAKE(budget=16, **SNAP), {}
    for pair in itertools.product((0.5, 1.0, 3.0), repeat=2):
        with patchkit.patched(model, replace(method, tau1=pair[0], tau2=pair[1])):
            fed = list(feed(model, ids, torch.ones_like(ids, dtype=torch.bool), [52, 8]))
        losses[pair] = cross_entropy(fed[-1][0][0, :-1], ids[0, 53:]).item()
    best = calibrate(model, ids, method, num_scored=8, temperatures=(0.5, 1.0, 3.0))
    assert (best.tau1, best.tau2) == min(losses, key=losses.get) != (0.5, 0.5)
    for wrong, message in ((CAKE(budget=1.0), "longer than"), (CAKE(budget_bytes=9999), "bytes")):
        with pytest.raises(ValueError, match=message):
            calibrate(model, ids, wrong, num_scored=8)
    assert not patchkit.report(model).patched
    with pytest.raises(ValueError, match="longer than the budget"):
        calibrate(model, ids[:, :20], CAKE(budget=16, **SNAP), num_scored=8)


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


@pytest.mark.parametrize("name", ["h2o", "snapkv", "adakv", "cake", "tova"])
def test_a_chunked_prompt_is_the_same_as_its_chunks(name):
    method, _ = CASES[name]
    model = build()
    batch = left_padded_batch(VOCAB, [23, 11])
    with patchkit.patched(model, method):
        out = model.generate(
            **batch,
            prefill_chunk_size=9,
            max_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        valid = torch.nn.functional.pad(batch["attention_mask"].bool(), (0, 3), value=True)
        fed = list(feed(model, out.sequences[:, :-1], valid, [9, 9, 5, 1, 1, 1]))
    assert positions(out.past_key_values) == positions(fed[-1][1])
    got = torch.stack(out.logits, 1)
    torch.testing.assert_close(got[:, 1:], torch.cat([x for x, _ in fed[3:]], 1), **TOLERANCE)
