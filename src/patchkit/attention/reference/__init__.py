"""Plain PyTorch specification of the KV store operations, and their CPU backend.

One layer of a KV store is, for every (row b, KV head h), its own list of slots:

* `keys` `[B, H, C, D]` and `values` `[B, H, C, D_v]`, `C` being the capacity,
* `position` `[B, H, C]` int32, the column (token index) held by each slot, -1 if empty,
* `length` `[B, H]` int32, the number of live slots, which always come first,
* `seen` `[B, H]` int32, the number of columns consumed so far, evicted and padding ones included.

Where heads keep lists of different sizes, all lists of a row may share one run of C slots:
`list_start` `[B, H]` int32 then says where each begins, and `keys`, `values`, `position` and scores
are `[B, 1, C, ...]` expanded over H.

All operations work in place, use tensor arithmetic only and never read a device value on the
host. Slots past `length` may hold anything, NaN included.
"""

from patchkit.attention.reference.attention import (
    attention_lse,
    attention_mass,
    decode_attention,
    pool_scores,
    prefill_attention,
    window_statistics,
)
from patchkit.attention.reference.slots import append, compact, evict_lowest, select_top
from patchkit.attention.reference.step import rotary_append

__all__ = [
    "append",
    "attention_lse",
    "attention_mass",
    "compact",
    "decode_attention",
    "evict_lowest",
    "pool_scores",
    "prefill_attention",
    "rotary_append",
    "select_top",
    "window_statistics",
]
