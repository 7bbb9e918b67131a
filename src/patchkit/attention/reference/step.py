"""What a step does between its projections and attention, as one operation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patchkit.attention.reference.slots import append
from patchkit.decoding.reference import Table, rms_norm, rotary, rotary_fits

__all__ = ["rotary_append", "rotary_append_fits"]


def rotary_append(
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    length: Tensor,
    seen: Tensor,
    q: Tensor,
    k: Tensor,
    new_values: Tensor,
    cos: Tensor,
    sin: Tensor,
    outs: Sequence[Tensor],
    list_start: Tensor | None = None,
    weights: Sequence[Tensor] | None = None,
    normed: Sequence[Tensor] | None = None,
    *,
    interleaved: bool = False,
    table: Table = "full",
    wide: bool = False,
    eps: float = 0.0,
    offset: float = 0.0,
    round_first: bool = False,
) -> None:
    """Rotate queries and keys of one token per row, and append the keys and their values.

    That is `rms_norm` of every query and key if there are weights, `rotary`, and `append`.

    Args:
        keys: `[B, H, C, D]`, any float dtype. This and the next four as in `append`.
        values: `[B, H, C, D_v]`, as `keys`.
        position: `[B, H, C]` int32.
        length: `[B, H]` int32.
        seen: `[B, H]` int32.
        q: `[B, H_q, 1, D]`, as `keys`, last stride 1.
        k: `[B, H, 1, D]`, as `q`.
        new_values: `[B, H, 1, D_v]`, as `q`.
        cos: `[B or 1, 1, W]`, as in `rotary`.
        sin: As `cos`.
        outs: As `q` and as `k`. Written: what is rotated.
        list_start: `[B, H]` int32, as in `append`.
        weights: For queries and for keys `[D]`, as `keys`. None: no norm.
        normed: As `q` and as `k`. Written: what is normalised. Given exactly if `weights` are.
        interleaved: This and the next two as in `rotary`.
        table: See there.
        wide: See there.
        eps: This and the next two as in `rms_norm`, for both.
        offset: See there.
        round_first: See there.
    """
    if weights is not None and normed is not None:
        for x, weight, out in zip((q, k), weights, normed, strict=True):
            rms_norm(x, weight, eps=eps, offset=offset, round_first=round_first, out=out)
        q, k = normed
    rotary(q, k, cos, sin, interleaved=interleaved, table=table, wide=wide, outs=outs)
    append(keys, values, position, length, seen, outs[1], new_values, list_start=list_start)


def rotary_append_fits(
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    length: Tensor,
    seen: Tensor,
    q: Tensor,
    k: Tensor,
    new_values: Tensor,
    cos: Tensor,
    sin: Tensor,
    outs: Sequence[Tensor],
    list_start: Tensor | None = None,
    weights: Sequence[Tensor] | None = None,
    normed: Sequence[Tensor] | None = None,
    *,
    table: Table,
) -> bool:
    """Say whether the kernel of `rotary_append` takes these, which asks for more than `append`.

    The memory of the store is contiguous, or for shared slots what is expanded over the heads; so
    are counters, weights and results; `cos` and `sin` have the same strides, the last one 1.
    """
    if not rotary_fits(q, k, cos, sin, table=table) or new_values.ndim != 4:
        return False
    (batch_size, heads, tokens, dim), dtype, capacity = k.shape, k.dtype, keys.shape[2]
    lists, value_dim = (batch_size, heads), new_values.shape[3]
    shared = list_start is not None
    counters = [length, seen] if list_start is None else [length, seen, list_start]
    slots = [keys, values, position]
    results = [*outs, *(normed or ())]
    dense = [*counters, *results, *(weights or ())]
    dense += [t[:, :1] for t in slots] if shared else slots
    given = [*slots, *dense, new_values]
    return (
        tokens == 1
        and keys.shape == (*lists, capacity, dim)
        and values.shape == (*lists, capacity, value_dim)
        and position.shape == (*lists, capacity)
        and new_values.shape == (*lists, 1, value_dim)
        and all(t.shape == lists and t.dtype == torch.int32 for t in counters)
        and all(t.shape == x.shape for t, x in zip(results, (q, k) * 2, strict=False))
        and (weights is None) == (normed is None)
        and all(w.shape == (dim,) for w in weights or ())
        and position.dtype == torch.int32
        and all(t.dtype == dtype for t in (keys, values, new_values, *results, *(weights or ())))
        and (not shared or all(t.stride(1) == 0 or heads == 1 for t in slots))
        and all(t.is_contiguous() for t in dense)
        and new_values.stride(3) == cos.stride(2) == 1
        and cos.stride() == sin.stride()
        and all(t.device == k.device for t in given)
    )
