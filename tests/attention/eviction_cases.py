"""Methods that evict with the rules of their oracles, and ways of feeding a model."""

from __future__ import annotations

import torch

from patchkit import CAKE, H2O, TOVA, AdaKV, KVStore, PyramidKV, SnapKV
from patchkit.testing import left_padded_batch, tiny_model

from ..helpers import with_cache
from .eviction_oracle import adakv_rule, cake_rule, h2o_rule, snapkv_rule, tova_rule

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
