"""AdaKV: heads divide a layer's budget, and their lists share the slots of a row.

What it keeps is compared with loops in float64 in `test_eviction`.
"""

from __future__ import annotations

import copy

import pytest
import torch

import patchkit
from patchkit import AdaKV, SnapKV

from .eviction_cases import SNAP, TOLERANCE, build, feed, feed_into, positions, stream


def test_heads_share_the_slots_of_their_row():
    model = build(groups=1, layers=2)
    ids, valid = stream([60, 41], 12)
    with patchkit.patched(model, AdaKV(budget=16, **SNAP)) as patched:
        for index, (_, store) in enumerate(feed(patched, ids, valid, [60, 1, 1, 6, 1, 1, 1, 1])):
            for layer in store.store_layers:
                lengths = layer.length
                assert lengths.sum(1).eq(4 * 16).all() and lengths.min() >= 6
                assert lengths.ne(16).any(), "every head keeps the same: nothing was divided"
                assert layer.keys.shape[:3] == (2, 1, 80)  # (16 + 1) * 4 slots, in steps of 16
            if index == 3:
                twin = copy.deepcopy(store)
    assert positions(store) != positions(twin)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_heads_that_score_alike_share_to_the_last_token(backend):
    model = build(groups=1, layers=2, dtype=torch.float32)
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            weight = projection.weight.data
            weight.copy_(weight[: len(weight) // 4].repeat(4, 1))
    ids, valid = stream([40, 27], 2)
    with patchkit.patched(model, AdaKV(budget=15, **SNAP), backend=backend):
        *_, (_, store) = feed(model, ids, valid, [40, 1, 1])
    for layer in store.store_layers:
        assert layer.length.sum(1).eq(60).all() and layer.length.max() <= 16


def test_slots_shared_by_heads_serve_the_next_prompt_at_the_same_addresses():
    model = build(groups=1, layers=2)
    prompts = [stream([60, 41], 2, seed) for seed in (1, 2)]
    with patchkit.patched(model, AdaKV(budget=16, **SNAP)):
        with torch.inference_mode():
            *_, (_, store) = feed(model, *prompts[0], [60, 1, 1])
        before = store.addresses
        store.restart()
        *_, (logits, _) = feed_into(store, model, *prompts[1], [60, 1, 1])
        assert store.addresses == before
        *_, (want, fresh) = feed(model, *prompts[1], [60, 1, 1])
    torch.testing.assert_close(logits, want, **TOLERANCE)
    assert positions(store) == positions(fresh)


def test_rows_whose_heads_share_slots_are_repeated_and_chosen():
    model = build(groups=1, layers=2)
    ids, valid = stream([60, 41], 3)
    with patchkit.patched(model, AdaKV(budget=16, **SNAP)):
        *_, (_, store) = feed(model, ids[:, :61], valid[:, :61], [60, 1])
        kept = positions(store)
        store.batch_repeat_interleave(2)
        assert positions(store) == [[row for row in rows for _ in range(2)] for rows in kept]
        store.batch_select_indices(torch.tensor([3, 0]))
        assert positions(store) == [rows[::-1] for rows in kept]
        *_, (logits, _) = feed_into(store, model, ids.flip(0), valid.flip(0), [1, 1], start=61)
        *_, (want, _) = feed(model, ids, valid, [60, 1, 1, 1])
    torch.testing.assert_close(logits, want.flip(0), **TOLERANCE)


def test_shared_slots_wait_for_crop():
    model = build(groups=1, layers=2)
    ids, valid = stream([60, 41], 9)
    with patchkit.patched(model, AdaKV(budget=16, **SNAP)):
        *_, (_, store) = feed(model, ids[:, :61], valid[:, :61], [60, 1])
        store.activate_past_recording()
        list(feed_into(store, model, ids, valid, [1, 3], start=61))
        assert all(layer.list_start is None for layer in store.store_layers)
        store.crop(0)
        assert all(layer.length.sum(1).eq(4 * 16).all() for layer in store.store_layers)
        assert all(layer.list_start is not None for layer in store.store_layers)


def test_a_floor_of_one_is_snapkv():
    method = AdaKV(budget=16, floor=1.0, **SNAP)
    ids, valid = stream([40, 21], 6)
    with patchkit.patched(build(), method) as model:
        *_, (logits, divided) = feed(model, ids, valid, [40, 1, 1, 3, 1])
    with patchkit.patched(build(), SnapKV(budget=16, **SNAP)) as model:
        *_, (want, equal) = feed(model, ids, valid, [40, 1, 1, 3, 1])
    assert positions(divided) == positions(equal)
    torch.testing.assert_close(logits, want, **TOLERANCE)
