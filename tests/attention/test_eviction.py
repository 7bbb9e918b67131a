"""Score-based eviction equals loops in float64, in every way of feeding tokens."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig

import patchkit
from patchkit import CAKE, H2O, AdaKV, KVStore, PyramidKV
from patchkit.attention.cake import calibrate, round_to_total, water_fill
from patchkit.testing import left_padded_batch, tiny_model

from ..helpers import with_cache
from .eviction_cases import CASES, SNAP, TOLERANCE, VOCAB, build, feed, positions, stream
from .eviction_oracle import EvictionOracle


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
