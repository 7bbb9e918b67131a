"""Plain PyTorch specification of the KV store operations, and their CPU backend.

One layer of a KV store is, for every (row b, KV head h), its own list of slots:

* `keys` `[B, H, C, D]` and `values` `[B, H, C, D_v]`, `C` being the capacity,
* `position` `[B, H, C]` int32, the column (token index) held by each slot, -1 if empty,
* `length` `[B, H]` int32, the number of live slots, which always come first,
* `seen` `[B, H]` int32, the number of columns consumed so far, evicted and padding ones included.

All operations work in place, use tensor arithmetic only and never read a device value on the
host. Slots past `length` may hold anything, NaN included.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = [
    "append",
    "check_arguments",
    "compact",
    "decode_attention",
    "evict_lowest",
    "prefill_attention",
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
            then, which is much cheaper on a CPU. Needs `valid=None`.
    """
    row, head = _lists(keys)
    num_tokens = new_keys.shape[2]
    tokens = torch.arange(num_tokens, device=keys.device)  # [T]
    if start is not None:
        slots = slice(start, start + num_tokens)
        keys[:, :, slots] = new_keys
        values[:, :, slots] = new_values
        position[:, :, slots] = seen.unsqueeze(-1) + tokens
        length += num_tokens
        seen += num_tokens
        return
    if valid is None:
        slot = length.unsqueeze(-1) + tokens
        column = seen.unsqueeze(-1) + tokens
    else:
        # A padding token repeats the write of the nearest valid token before it (or of the first
        # valid one), so that duplicate targets carry equal data. A row without any valid token
        # writes its old content back.
        count = valid.sum(-1, keepdim=True)  # [B, 1]
        rank = (valid.cumsum(-1) - 1).clamp_min(0)
        first = valid.int().argmax(-1, keepdim=True)
        source = torch.where(valid, tokens, 0).cummax(-1).values.maximum(first)[:, None, :]
        some = (count > 0)[:, :, None]  # [B, 1, 1]
        slot = (length.unsqueeze(-1) + rank[:, None, :]).clamp_max(keys.shape[2] - 1)
        old, new = (row, head, slot), (row, head, source)
        column = torch.where(some, seen.unsqueeze(-1) + source, position[old])
        new_keys = torch.where(some[..., None], new_keys[new], keys[old])
        new_values = torch.where(some[..., None], new_values[new], values[old])
    keys[row, head, slot] = new_keys
    values[row, head, slot] = new_values
    position[row, head, slot] = column.int()
    length += num_tokens if valid is None else count.int()
    seen += num_tokens


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    length: Tensor,
    seen: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    indices: Tensor | None = None,
    index_count: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attend with a few queries per sequence to the live slots of a KV store.

    Query i is at column `seen[b, h] - Q + i`. It sees slot s iff `s < length` and
    `0 <= position <= column` and, with a window, `position > column - sliding_window`. A query
    that sees nothing returns zeros. Arithmetic is in float32 or wider.

    Args:
        query: `[B, H_q, Q, D]`, any float dtype. Query heads `[h * G, (h + 1) * G)` share KV head
            h, where `G = H_q / H_kv`.
        keys: `[B, H_kv, C, D]`, as `query`.
        values: `[B, H_kv, C, D_v]`, as `query`.
        position: `[B, H_kv or 1, C]` int32.
        length: `[B, H_kv or 1]` int32.
        seen: `[B, H_kv or 1]` int32, the tokens of `query` included.
        scale: Factor on the logits.
        sliding_window: Columns that a query sees, its own included. None: all.
        softcap: Logits become `softcap * tanh(logits / softcap)`, after `scale`. None: unchanged.
        sinks: `[H_q]`, any float dtype. One more logit per query head, in the denominator only.
        indices: `[B, H_kv, N]` int32. Attend to these slots only; no duplicates.
        index_count: `[B, H_kv]` int32. Entries of `indices` in use; those behind are ignored.
        out: `[B, Q, H_q, D_v]` contiguous, as `query`. Written and returned if given.

    Returns:
        `[B, Q, H_q, D_v]`, contiguous, in the dtype of `query`.
    """
    batch_size, num_heads, q_len, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    compute = torch.promote_types(query.dtype, torch.float32)
    slot_live = torch.arange(keys.shape[2], device=keys.device) < length.unsqueeze(-1)
    live = slot_live & (position >= 0)  # [B, H_kv or 1, C]
    if indices is not None and index_count is not None:
        listed = torch.arange(indices.shape[2], device=keys.device) < index_count.unsqueeze(-1)
        slots = torch.where(listed, indices, 0).long()
        row, head = _lists(keys)
        keys, values = keys[row, head, slots], values[row, head, slots]
        position = position.expand(-1, num_kv_heads, -1).gather(2, slots)
        live = live.expand(-1, num_kv_heads, -1).gather(2, slots) & listed
    column = seen.unsqueeze(-1) + torch.arange(-q_len, 0, device=keys.device)  # [B, H_kv or 1, Q]
    visible = live.unsqueeze(2) & (position.unsqueeze(2) <= column.unsqueeze(3))
    if sliding_window is not None:
        visible &= position.unsqueeze(2) > column.unsqueeze(3) - sliding_window
    visible = visible.unsqueeze(2)  # [B, H_kv or 1, 1, Q, S]

    grouped = query.reshape(batch_size, num_kv_heads, -1, head_dim).to(compute)  # [B, H_kv, GQ, D]
    logits = (grouped @ keys.to(compute).mT).mul_(scale)
    if softcap is not None:
        logits = (logits / softcap).tanh_().mul_(softcap)
    logits = logits.unflatten(2, (-1, q_len)).masked_fill(~visible, -torch.inf)
    # One extra column, the sink or -inf, also keeps an empty list of slots legal.
    extra = logits.new_full((num_heads,), -torch.inf) if sinks is None else sinks.to(compute)
    extra = extra.view(1, num_kv_heads, -1, 1, 1).expand(batch_size, -1, -1, q_len, -1)
    logits = torch.cat((logits, extra), -1)
    top = logits.amax(-1, keepdim=True).clamp_min(torch.finfo(compute).min)
    weights = (logits - top).exp_()
    total = weights.sum(-1, keepdim=True).clamp_min(torch.finfo(compute).tiny)
    finite = values.masked_fill(~live.unsqueeze(-1), 0).to(compute)  # 0 * NaN would be NaN
    mixed = (weights[..., :-1].flatten(2, 3) @ finite).unflatten(2, (-1, q_len)) / total
    result = mixed.flatten(1, 2).transpose(1, 2)  # [B, Q, H_q, D_v]
    if out is None:
        out = query.new_empty(result.shape)
    return out.copy_(result)


def prefill_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    length: Tensor,
    seen: Tensor,
    *,
    scale: float,
    behind: Tensor | None = None,
    ordered: bool = False,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attend from the chunk that was appended last to the live slots of a KV store.

    This is `decode_attention` for any number of queries. `behind` and `ordered` tell a kernel what
    the positions say anyway, so nothing here depends on them. Materialises all logits.

    Args:
        query: `[B, H_q, Q, D]`; so are the remaining tensors those of `decode_attention`. The
            tokens of the chunk are the last live slots, in order.
        behind: `[B, Q]` int32, stored tokens of the chunk behind each query. None: `Q - 1 - i`.
        ordered: Whether positions ascend with the slots.

    Returns:
        `[B, Q, H_q, D_v]`, contiguous, in the dtype of `query`.
    """
    return decode_attention(
        query,
        keys,
        values,
        position,
        length,
        seen,
        scale=scale,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=sinks,
        out=out,
    )


def compact(
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    keep: Tensor,
    keep_count: Tensor,
    out_keys: Tensor,
    out_values: Tensor,
    out_position: Tensor,
) -> None:
    """Copy the kept slots of every list to the front of another store.

    `out[b, h, j] = in[b, h, keep[b, h, j]]` for `j < keep_count[b, h]`. Behind that,
    `out_position` is -1 and `out_keys` and `out_values` keep their content.

    Args:
        keys: `[B, H, C, D]`, any float dtype.
        values: `[B, H, C, D_v]`, as `keys`.
        position: `[B, H, C]` int32.
        keep: `[B, H, N]` int32 or int64, ascending slot numbers.
        keep_count: `[B, H]` int32, entries of `keep` in use, at most `min(N, C_out)`.
        out_keys: `[B, H, C_out, D]`, as `keys`. Written; shares no memory with the inputs.
        out_values: `[B, H, C_out, D_v]`, as `values`. Written.
        out_position: `[B, H, C_out]` int32. Written.
    """
    width = min(keep.shape[2], out_keys.shape[2])
    live = torch.arange(width, device=keys.device) < keep_count.unsqueeze(-1)
    slots = torch.where(live, keep[:, :, :width], 0).long()
    row, head = _lists(keys)
    for source, target in ((keys, out_keys), (values, out_values)):
        front = target[:, :, :width]
        front.copy_(torch.where(live.unsqueeze(-1), source[row, head, slots], front))
    out_position.fill_(-1)
    out_position[:, :, :width] = torch.where(live, position.gather(2, slots), -1)


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
        count: `[B, H]` int32, slots to pick, at most `min(length, width)`.
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
    kept = key >= best.gather(2, count.unsqueeze(-1).long())
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
    """
    slot = torch.arange(position.shape[2], device=position.device)
    barred = (slot < num_protected) | (slot >= length.unsqueeze(-1))
    barred |= position >= (seen - recent).unsqueeze(-1)
    evict = (length > budget).unsqueeze(-1) & ~barred.all(-1, keepdim=True)
    if score is not None:
        lowest = score / (seen.unsqueeze(-1) - position) if mean else score
        lowest = lowest.masked_fill(barred, torch.inf)
        barred |= lowest > lowest.amin(-1, keepdim=True)
    oldest = position.masked_fill(barred, torch.iinfo(torch.int32).max)
    last = (length.unsqueeze(-1) - 1).clamp_min(0).long()  # [B, H, 1]
    # Lists that keep everything copy their last slot onto itself.
    victim = torch.where(evict, oldest.argmin(-1, keepdim=True), last)
    for data in (position,) if score is None else (position, score):
        data.scatter_(2, victim, data.gather(2, last))
    for data in (keys, values):
        width = (-1, -1, -1, data.shape[3])
        moved = data.gather(2, last.unsqueeze(-1).expand(width))
        data.scatter_(2, victim.unsqueeze(-1).expand(width), moved)
    position.scatter_(2, last, position.gather(2, last).masked_fill(evict, -1))
    length -= evict.squeeze(-1).int()


def check_arguments(**expected: tuple[Tensor | None, tuple[int, ...], torch.dtype]) -> None:
    """Check the tensors of one kernel launch; the launchers share it.

    Args:
        expected: Per argument the tensor (None is skipped), its shape and its dtype. The first
            one says which device is expected.

    Raises:
        ValueError: A shape, dtype or device differs, the last stride of a `[B, H, S, D]` tensor is
            not 1, or a tensor requires grad while grad is enabled.
    """
    device: torch.device | None = None
    for name, (tensor, shape, dtype) in expected.items():
        if tensor is None:
            continue
        device = device or tensor.device
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"{name}: expected {dtype} {list(shape)} on {device}, got {tensor.dtype} "
                f"{list(tensor.shape)} on {tensor.device}"
            )
        if tensor.ndim == 4 and tensor.stride(3) != 1 and tensor.shape[3] != 1:
            raise ValueError(f"{name}: expected last stride 1, got strides {tensor.stride()}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: expected a tensor without grad, got requires_grad=True; kernels of the "
                "KV store have no backward, run them under torch.no_grad()"
            )


def _lists(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Index the lists of a store: `data[row, head, slots]`, slots `[B, H or 1, S]`, takes rows."""
    return _list_numbers(keys.shape[0], keys.shape[1], keys.device)


@lru_cache(maxsize=32)
def _list_numbers(num_rows: int, num_heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # the cached tensors must serve any later mode
        row = torch.arange(num_rows, device=device)[:, None, None]
        return row, torch.arange(num_heads, device=device)[:, None]
