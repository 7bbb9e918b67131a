"""What changes which tokens the slots of a store hold: append, compact, select, evict."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = [
    "append",
    "compact",
    "evict_lowest",
    "select_top",
]


def append(
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    length: Tensor,
    seen: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    valid: Tensor | None = None,
    start: int | None = None,
    list_start: Tensor | None = None,
) -> None:
    """Store the tokens of one forward pass behind the live slots of every list.

    Token t of row b goes to slot `length[b, h]` + (valid tokens before t in row b) and gets
    position `seen[b, h] + t`. Then `length` grows by the number of valid tokens and `seen` by T.
    The caller guarantees the capacity.

    Args:
        keys: `[B, H, C, D]`, any float dtype. Changed in place.
        values: `[B, H, C, D_v]`, as `keys`. Changed in place.
        position: `[B, H, C]` int32. Changed in place.
        length: `[B, H]` int32. Changed in place.
        seen: `[B, H]` int32. Changed in place.
        new_keys: `[B, H, T, D]`, as `keys`.
        new_values: `[B, H, T, D_v]`, as `keys`.
        valid: `[B, T]` bool, False for padding, which consumes a column but no slot. None: all.
        start: The length of all lists, where the caller knows that it is one: a slice is written
            then, which is much cheaper on a CPU. Needs `valid` and `list_start` to be None.
        list_start: `[B, H]` int32, see above. None: every list has C slots of its own.
    """
    num_tokens = new_keys.shape[2]
    if start is not None:
        column = seen.unsqueeze(-1)
        if num_tokens > 1:  # a step on a CPU is made of small operations
            column = column + torch.arange(num_tokens, device=keys.device)
        for data, new in ((keys, new_keys), (values, new_values), (position, column)):
            data.narrow(2, start, num_tokens).copy_(new)
        length += num_tokens
        seen += num_tokens
        return
    row, head = list_indices(keys)
    tokens = torch.arange(num_tokens, device=keys.device)  # [T]
    if valid is None:
        slot = length.unsqueeze(-1) + tokens
        if list_start is not None:
            slot = slot + list_start.unsqueeze(-1)
        column = seen.unsqueeze(-1) + tokens
    else:
        # A padding token repeats the write of the nearest valid token before it (or of the first
        # valid one), so that duplicate targets carry equal data. A row without any valid token
        # writes its old content back.
        count = valid.sum(-1, keepdim=True)  # [B, 1]
        rank = (valid.cumsum(-1) - 1).clamp_min(0)
        leading = valid.int().argmax(-1, keepdim=True)
        source = torch.where(valid, tokens, 0).cummax(-1).values.maximum(leading)[:, None, :]
        some = (count > 0)[:, :, None]  # [B, 1, 1]
        slot = length.unsqueeze(-1) + rank[:, None, :]
        if list_start is not None:
            slot = slot + list_start.unsqueeze(-1)
        slot = slot.clamp_max(keys.shape[2] - 1)
        old, new = (row, head, slot), (row, head, source)
        column = torch.where(some, seen.unsqueeze(-1) + source, position[old])
        new_keys = torch.where(some[..., None], new_keys[new], keys[old])
        new_values = torch.where(some[..., None], new_values[new], values[old])
    for data, new in ((keys, new_keys), (values, new_values), (position, column.int())):
        _put(data, list_start, slot, new)
    length += num_tokens if valid is None else count.int()
    seen += num_tokens


def compact(
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    length: Tensor,
    keep: Tensor,
    keep_count: Tensor,
    out_keys: Tensor,
    out_values: Tensor,
    out_position: Tensor,
    score: Tensor | None = None,
    out_score: Tensor | None = None,
    list_start: Tensor | None = None,
    out_list_start: Tensor | None = None,
) -> None:
    """Copy the kept slots of every list to the front of another store.

    `out[b, h, j] = in[b, h, keep[b, h, j]]` for `j < min(keep_count[b, h], length[b, h])`, which
    becomes the length. The slots behind that are emptied, positions to -1 and the rest to 0, unless
    `out_list_start` is given.

    Args:
        keys: `[B, H, C, D]`, any float dtype.
        values: `[B, H, C, D_v]`, as `keys`.
        position: `[B, H, C]` int32.
        length: `[B, H]` int32. Changed in place.
        keep: `[B, H, N]` int32 or int64, ascending slot numbers.
        keep_count: `[B, H]` int32, entries of `keep` in use, or more than the list is long;
            `min(keep_count, length)` is at most `min(N, C_out)`.
        out_keys: `[B, H, C_out, D]`, as `keys`. Written; shares no memory with the inputs.
        out_values: `[B, H, C_out, D_v]`, as `values`. Written.
        out_position: `[B, H, C_out]` int32. Written.
        score: `[B, H, C]` float32, or None.
        out_score: `[B, H, C_out]` float32. Written; given exactly if `score` is.
        list_start: `[B, H]` int32, see above. None: every list has C slots of its own.
        out_list_start: The same of the other store.
    """
    width = min(keep.shape[2], out_keys.shape[2])
    torch.minimum(length, keep_count, out=length)
    live = torch.arange(width, device=keys.device) < length.unsqueeze(-1)
    slots = torch.where(live, keep[:, :, :width], 0).long()
    if list_start is not None:
        slots = slots + list_start.unsqueeze(-1)
    row, head = list_indices(keys)
    pairs = [(keys, out_keys, 0), (values, out_values, 0), (position, out_position, -1)]
    if score is not None and out_score is not None:
        pairs.append((score, out_score, 0))
    for source, target, empty in pairs:
        kept = source[row, head, slots]
        if out_list_start is not None:
            put_live(target, out_list_start, kept, live)
            continue
        target[:, :, width:] = empty
        target[:, :, :width] = kept.masked_fill_(
            ~(live[..., None] if kept.ndim == 4 else live), empty
        )


def select_top(
    score: Tensor | None,
    position: Tensor,
    length: Tensor,
    count: Tensor,
    seen: Tensor,
    recent: Tensor,
    *,
    num_sinks: int,
    mean: bool,
    width: int,
) -> Tensor:
    """Pick the best live slots of every list.

    First come the `num_sinks` leading slots, then those among the newest `recent` columns
    (`position >= seen - recent`), then the others by descending score. In each of these groups,
    and among equal scores, newer slots come first.

    Args:
        score: `[B, H, C]` float32 without NaN in live slots. None: all scores are equal, so newer
            slots come first.
        position: `[B, H, C]` int32. Live slots of a list hold different positions below `seen`.
        length: `[B, H]` int32.
        count: `[B, H]` int32, slots to pick, or all of a shorter list; `min(count, length)` is at
            most `width`.
        seen: `[B, H]` int32.
        recent: `[B, H]` int32, newest columns that come before all scores.
        num_sinks: Leading slots that come before all others.
        mean: Rank by `score / (seen - position)`, the score per column since the slot was filled.
            Ignored without `score`.
        width: Entries to return.

    Returns:
        `[B, H, width]` int32, contiguous: the picked slots ascending, then C.
    """
    capacity = position.shape[2]
    slot = torch.arange(capacity, dtype=torch.int32, device=position.device)
    if score is None:
        rank = torch.zeros_like(position)
    else:
        if mean:
            score = score / (seen.unsqueeze(-1) - position)
        # The bits of a float32 as an integer of the same order; adding zero drops the sign of -0.
        rank = (score + 0.0).view(torch.int32)
        rank = torch.where(rank < 0, rank ^ 0x7FFFFFFF, rank)
    largest = torch.iinfo(torch.int32).max
    rank = rank.masked_fill(position >= (seen - recent).unsqueeze(-1), largest - 1)
    rank = rank.masked_fill(slot < num_sinks, largest)
    live = slot < length.unsqueeze(-1)
    key = (rank.long() * 2**31 + position).masked_fill(~live, torch.iinfo(torch.int64).min)
    best = key.topk(min(width, capacity), -1).values
    # One key more, above all, is the threshold of lists that keep nothing.
    above = key.new_full((*position.shape[:2], 1), torch.iinfo(torch.int64).max)
    best = torch.cat((above, best), -1)
    kept = key >= best.gather(2, count.minimum(length).unsqueeze(-1).long())
    target = torch.where(kept, kept.cumsum(-1) - 1, width)
    keep = position.new_full((*position.shape[:2], width + 1), capacity)
    return keep.scatter_(2, target, slot.expand_as(target))[:, :, :width].contiguous()


def evict_lowest(
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    length: Tensor,
    budget: Tensor,
    seen: Tensor,
    recent: Tensor,
    score: Tensor | None = None,
    num_protected: int = 0,
    mean: bool = False,
    list_start: Tensor | None = None,
) -> None:
    """Evict one slot from every list that is longer than its budget.

    The candidates are the slots in `[num_protected, length)` with `position < seen - recent`. The
    victim is the one with the lowest score, the one with the smallest position among equals. The
    last live slot moves into its place and `length` drops by one. A list with `length <= budget`
    or without candidates stays as it is.

    Args:
        keys: `[B, H, C, D]`, any float dtype. Changed in place.
        values: `[B, H, C, D_v]`, as `keys`. Changed in place.
        position: `[B, H, C]` int32. Changed in place.
        length: `[B, H]` int32. Changed in place.
        budget: `[B, H]` int32, live slots to keep.
        seen: `[B, H]` int32.
        recent: `[B, H]` int32, newest columns that are never evicted.
        score: `[B, H, C]` float32 without NaN in live slots. Changed in place. None: the position
            is the score, so the oldest slot goes.
        num_protected: Leading slots that are never evicted.
        mean: Rank by `score / (seen - position)`, the score per column since the slot was filled.
            Moves `score` all the same. Ignored without `score`.
        list_start: `[B, H]` int32, see above. None: every list has C slots of its own.
    """
    age = own_slots(position, list_start)
    slot = torch.arange(age.shape[2], device=age.device)
    barred = (slot < num_protected) | (slot >= length.unsqueeze(-1))
    barred |= age >= (seen - recent).unsqueeze(-1)
    evict = (length > budget).unsqueeze(-1) & ~barred.all(-1, keepdim=True)
    if score is not None:
        lowest = own_slots(score, list_start)
        lowest = lowest / (seen.unsqueeze(-1) - age) if mean else lowest
        lowest = lowest.masked_fill(barred, torch.inf)
        barred |= lowest > lowest.amin(-1, keepdim=True)
    oldest = age.masked_fill(barred, torch.iinfo(torch.int32).max)
    last = (length.unsqueeze(-1) - 1).clamp_min(0).long()  # [B, H, 1]
    # Lists that keep everything copy their last slot onto itself.
    victim = torch.where(evict, oldest.argmin(-1, keepdim=True), last)
    if list_start is not None:
        last, victim = last + list_start.unsqueeze(-1), victim + list_start.unsqueeze(-1)
    row, head = list_indices(keys)
    for data in (keys, values, position) if score is None else (keys, values, position, score):
        _put(data, list_start, victim, data[row, head, last])
    _put(position, list_start, last, position[row, head, last].masked_fill(evict, -1))
    length -= evict.squeeze(-1).int()


def own_slots(data: Tensor, list_start: Tensor | None) -> Tensor:
    """Return `[B, H, C, ...]` slots in which every list begins at 0; a copy where it did not."""
    if list_start is None:
        return data
    row, head = list_indices(data)
    slot = list_start.unsqueeze(-1) + torch.arange(data.shape[2], device=data.device)
    return data[row, head, slot.clamp_max_(data.shape[2] - 1)]


def _put(data: Tensor, list_start: Tensor | None, slot: Tensor, new: Tensor) -> None:
    """Write to slots `[B, H, S]`, counted from the begin of their row."""
    row, head = list_indices(data)
    if list_start is None:
        data[row, head, slot] = new
    else:  # which cannot be written through its expanded heads
        data[:, :1][row, 0, slot] = new


def put_live(data: Tensor, list_start: Tensor, new: Tensor, live: Tensor) -> None:
    """Write `[B, H, S, ...]` to the first slots of lists that share a row, where `live`."""
    # The others write once more what slot 0 gets, which is its own content in an empty list.
    row, head = list_indices(data)
    rank = torch.where(live, torch.arange(live.shape[2], device=data.device), 0)
    slot = list_start.unsqueeze(-1) + rank
    some = live[:, :, :1].unsqueeze(-1) if data.ndim == 4 else live[:, :, :1]
    _put(data, list_start, slot, torch.where(some, new[row, head, rank], data[row, head, slot]))


def list_indices(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Index the lists of a store: `data[row, head, slots]`, slots `[B, H or 1, S]`, takes rows."""
    return _list_numbers(keys.shape[0], keys.shape[1], keys.device)


@lru_cache(maxsize=32)
def _list_numbers(num_rows: int, num_heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # the cached tensors must serve any later mode
        row = torch.arange(num_rows, device=device)[:, None, None]
        return row, torch.arange(num_heads, device=device)[:, None]
