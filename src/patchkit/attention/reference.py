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

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "append",
    "attention_lse",
    "attention_mass",
    "check_arguments",
    "compact",
    "decode_attention",
    "evict_lowest",
    "pool_scores",
    "prefill_attention",
    "select_top",
    "window_statistics",
]

_MAX_LOGITS = 2**24  # held at a time by the operations that go through blocks of queries


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
    list_start: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
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
        list_start: `[B, H_kv]` int32, see above. None: every list has C slots of its own.
        out: `[B, Q, H_q, D_v]` contiguous, as `query`. Written and returned if given.
        lse: `[B, H_q, Q]` float32 contiguous. Written if given: the natural log of the softmax
            denominator, -inf where a query sees nothing and has no sink.

    Returns:
        `[B, Q, H_q, D_v]`, contiguous, in the dtype of `query`.
    """
    batch_size, num_heads, q_len, _ = query.shape
    num_kv_heads = keys.shape[1]
    keys, values, position = (_own(data, list_start) for data in (keys, values, position))
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
    visible = _visible(position, live, _columns(seen, q_len), sliding_window)
    logits = _logits(query.to(compute), keys.to(compute), visible, scale, softcap)
    # One extra column, the sink or -inf, also keeps an empty list of slots legal.
    extra = logits.new_full((num_heads,), -torch.inf) if sinks is None else sinks.to(compute)
    extra = extra.view(1, num_kv_heads, -1, 1, 1).expand(batch_size, -1, -1, q_len, -1)
    logits = torch.cat((logits, extra), -1)
    top = logits.amax(-1, keepdim=True).clamp_min(torch.finfo(compute).min)
    weights = (logits - top).exp_()
    total = weights.sum(-1, keepdim=True)
    if lse is not None:
        lse.copy_((top + total.log()).flatten(1, 2).squeeze(-1))
    total = total.clamp_min_(torch.finfo(compute).tiny)
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
    lse: Tensor | None = None,
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
        lse=lse,
    )


def attention_lse(
    query: Tensor,
    keys: Tensor,
    position: Tensor,
    length: Tensor,
    seen: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return the log of the softmax denominator of every query, as `decode_attention` writes it.

    Args:
        query: `[B, H_q, Q, D]`; so are the remaining arguments those of `decode_attention`.

    Returns:
        `[B, H_q, Q]` float32, contiguous. -inf where a query sees nothing and has no sink.
    """
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    store = (keys, position, length, seen)
    for part, logits in _logit_blocks(query, *store, scale, sliding_window, softcap):
        lse[:, :, part] = logits.logsumexp(-1).flatten(1, 2)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.float().unsqueeze(-1))
    return lse


def attention_mass(
    query: Tensor,
    keys: Tensor,
    position: Tensor,
    length: Tensor,
    seen: Tensor,
    lse: Tensor,
    score: Tensor,
    *,
    scale: float,
    decay: float = 0.0,
    num_new: int = 0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    list_start: Tensor | None = None,
) -> None:
    """Add the attention that every live slot receives to its score.

    `score = decay * score + sum of exp(logit - lse)`, over the G query heads of the KV head and the
    queries that see the slot (as in `decode_attention`). Queries with `lse == -inf` add nothing.

    Args:
        query: `[B, H_q, Q, D]`, any float dtype, finite. Query heads `[h * G, (h + 1) * G)` share
            KV head h, where `G = H_q / H_kv`.
        keys: `[B, H_kv, C, D]`, as `query`.
        position: `[B, H_kv or 1, C]` int32.
        length: `[B, H_kv or 1]` int32.
        seen: `[B, H_kv or 1]` int32, the tokens of `query` included.
        lse: `[B, H_q, Q]` float32, log of the softmax denominators.
        score: `[B, H_kv, C]` float32. Changed in place where slots are live.
        scale: Factor on the logits.
        decay: Factor on the old score. 0: the old score is not read.
        num_new: Newest columns whose slots enter with a score of 0, whatever is stored there.
        sliding_window: Columns that a query sees, its own included. None: all.
        softcap: Logits become `softcap * tanh(logits / softcap)`, after `scale`. None: unchanged.
        list_start: `[B, H_kv]` int32, see above. None: every list has C slots of its own.
    """
    shared = score
    keys, position, score = (_own(data, list_start) for data in (keys, position, score))
    total = torch.zeros_like(score)
    store = (keys, position, length, seen)
    for part, logits in _logit_blocks(query, *store, scale, sliding_window, softcap):
        total += _weights(logits, lse[:, :, part]).sum((2, 3))
    if decay != 0:
        old = position < (seen - num_new).unsqueeze(-1)
        total += decay * torch.where(old, score, 0)
    slot = torch.arange(keys.shape[2], device=keys.device)
    live = slot < length.unsqueeze(-1)
    if list_start is None:
        score.copy_(torch.where(live, total, score))
    else:
        _put_live(shared, list_start, total, live)


def window_statistics(
    query: Tensor,
    keys: Tensor,
    position: Tensor,
    length: Tensor,
    seen: Tensor,
    lse: Tensor,
    score: Tensor,
    *,
    scale: float,
    gamma: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Measure how a window of queries attends to the live slots.

    With `p = exp(logit - lse)`, 0 where a query does not see a slot (as in `decode_attention`) or
    has `lse == -inf`, and mean and unbiased variance of p over the queries of a head with
    `lse > -inf` (a variance of fewer than two is 0), the score of a slot is the sum of
    `mean + gamma * variance` over the G query heads of the KV head.

    Args:
        query: `[B, H_q, Q, D]`; so are `keys` to `lse` and the options those of `attention_mass`.
            `2 <= Q <= 64`.
        score: `[B, H_kv, C]` float32. Written where slots are live.
        gamma: Factor on the variances.

    Returns:
        `[2, B]` float32: the sum of `-p * log(p)` over the heads, the queries and the live slots
        with `position < seen - Q`, those older than the window, not negative; and the sum of the
        variances over the heads and these slots.
    """
    batch_size, num_heads, q_len, _ = query.shape
    compute = torch.promote_types(query.dtype, torch.float32)
    live = torch.arange(keys.shape[2], device=keys.device) < length.unsqueeze(-1)
    visible = _visible(position, live, _columns(seen, q_len), sliding_window)
    older = live & (position < (seen - q_len).unsqueeze(-1))  # [B, H_kv or 1, C]
    wide = keys.to(compute)
    total = torch.zeros_like(score)
    sums = score.new_zeros((2, batch_size))
    groups = num_heads // keys.shape[1]
    for g in range(groups):
        logits = _logits(query[:, g::groups].to(compute), wide, visible, scale, softcap)
        p = _weights(logits, lse[:, g::groups]).squeeze(2)  # [B, H_kv, Q, C]
        counted = (lse[:, g::groups] > -torch.inf).unsqueeze(-1)
        count = counted.sum(2)  # [B, H_kv, 1]
        mean = p.sum(2) / count.clamp_min(1)
        squares = (p - mean.unsqueeze(2)).square_().masked_fill_(~counted, 0).sum(2)
        variance = squares / (count - 1).clamp_min(1)
        total += mean + gamma * variance
        sums[0] -= torch.special.xlogy(p, p).masked_fill_(~older.unsqueeze(2), 0).sum((1, 2, 3))
        sums[1] += variance.masked_fill(~older, 0).sum((1, 2))
    score.copy_(torch.where(live, total, score))
    return sums.clamp_min_(0)


def pool_scores(
    score: Tensor,
    length: Tensor,
    out: Tensor,
    *,
    width: int = 1,
    scale: float = 1.0,
    count: Tensor | None = None,
    share: bool = False,
) -> None:
    """Average scores over neighbours, slots beyond the ends of a list counting as 0.

    `out[b, h, s] = scale / max(count[b], 1) * sum of score[b, h, t] / width`, over the live slots
    with `|t - s| <= width // 2`.

    Args:
        score: `[B, H, C]` float32.
        length: `[B, H]` int32.
        out: `[B, H, C]` float32. Written where slots are live. May be `score` if the width is 1.
        width: Slots averaged, odd.
        scale: Factor on the scores.
        count: `[B]` int32. None: 1.
        share: Give all heads of a row the mean of their results. Their lengths are equal then.
    """
    if score.numel() == 0:
        return
    live = torch.arange(score.shape[2], device=score.device) < length.unsqueeze(-1)
    pooled = torch.where(live, score, 0)
    if share:
        pooled = pooled.mean(1, keepdim=True)
    if width > 1:
        pooled = F.avg_pool1d(pooled, width, stride=1, padding=width // 2)
    if count is not None:
        pooled = pooled / count.clamp_min(1)[:, None, None]
    if scale != 1:
        pooled = pooled * scale
    out.copy_(torch.where(live, pooled, out))


def compact(
    keys: Tensor,
    values: Tensor,
    position: Tensor,
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

    `out[b, h, j] = in[b, h, keep[b, h, j]]` for `j < keep_count[b, h]`. The slots behind that are
    emptied, positions to -1 and the rest to 0, unless `out_list_start` is given.

    Args:
        keys: `[B, H, C, D]`, any float dtype.
        values: `[B, H, C, D_v]`, as `keys`.
        position: `[B, H, C]` int32.
        keep: `[B, H, N]` int32 or int64, ascending slot numbers.
        keep_count: `[B, H]` int32, entries of `keep` in use, at most `min(N, C_out)`.
        out_keys: `[B, H, C_out, D]`, as `keys`. Written; shares no memory with the inputs.
        out_values: `[B, H, C_out, D_v]`, as `values`. Written.
        out_position: `[B, H, C_out]` int32. Written.
        score: `[B, H, C]` float32, or None.
        out_score: `[B, H, C_out]` float32. Written; given exactly if `score` is.
        list_start: `[B, H]` int32, see above. None: every list has C slots of its own.
        out_list_start: The same of the other store.
    """
    width = min(keep.shape[2], out_keys.shape[2])
    live = torch.arange(width, device=keys.device) < keep_count.unsqueeze(-1)
    slots = torch.where(live, keep[:, :, :width], 0).long()
    if list_start is not None:
        slots = slots + list_start.unsqueeze(-1)
    row, head = _lists(keys)
    pairs = [(keys, out_keys, 0), (values, out_values, 0), (position, out_position, -1)]
    if score is not None and out_score is not None:
        pairs.append((score, out_score, 0))
    for source, target, empty in pairs:
        kept = source[row, head, slots]
        if out_list_start is not None:
            _put_live(target, out_list_start, kept, live)
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
    age = _own(position, list_start)
    slot = torch.arange(age.shape[2], device=age.device)
    barred = (slot < num_protected) | (slot >= length.unsqueeze(-1))
    barred |= age >= (seen - recent).unsqueeze(-1)
    evict = (length > budget).unsqueeze(-1) & ~barred.all(-1, keepdim=True)
    if score is not None:
        lowest = _own(score, list_start)
        lowest = lowest / (seen.unsqueeze(-1) - age) if mean else lowest
        lowest = lowest.masked_fill(barred, torch.inf)
        barred |= lowest > lowest.amin(-1, keepdim=True)
    oldest = age.masked_fill(barred, torch.iinfo(torch.int32).max)
    last = (length.unsqueeze(-1) - 1).clamp_min(0).long()  # [B, H, 1]
    # Lists that keep everything copy their last slot onto itself.
    victim = torch.where(evict, oldest.argmin(-1, keepdim=True), last)
    if list_start is not None:
        last, victim = last + list_start.unsqueeze(-1), victim + list_start.unsqueeze(-1)
    row, head = _lists(keys)
    for data in (keys, values, position) if score is None else (keys, values, position, score):
        _put(data, list_start, victim, data[row, head, last])
    _put(position, list_start, last, position[row, head, last].masked_fill(evict, -1))
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


def _columns(seen: Tensor, q_len: int) -> Tensor:
    """Return the columns of the last `q_len` tokens, `[B, H or 1, Q]`."""
    return seen.unsqueeze(-1) + torch.arange(-q_len, 0, device=seen.device)


def _visible(position: Tensor, live: Tensor, column: Tensor, sliding_window: int | None) -> Tensor:
    """Return which slots the queries at `column` see, `[B, H or 1, Q, S]`."""
    column, position = column.unsqueeze(3), position.unsqueeze(2)
    visible = (live.unsqueeze(2) & (position >= 0)) & (position <= column)
    if sliding_window is not None:
        visible &= position > column - sliding_window
    return visible


def _logits(
    query: Tensor, keys: Tensor, visible: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Return the logits `[B, H_kv, G, Q, S]`, -inf where a query does not see a slot."""
    grouped = query.reshape(query.shape[0], keys.shape[1], -1, query.shape[3])  # [B, H_kv, GQ, D]
    logits = (grouped @ keys.mT).mul_(scale)
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    logits = logits.unflatten(2, (-1, query.shape[2]))
    return logits.masked_fill_(~visible.unsqueeze(2), -torch.inf)


def _logit_blocks(
    query: Tensor,
    keys: Tensor,
    position: Tensor,
    length: Tensor,
    seen: Tensor,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the logits of one block of queries after the other, to bound the memory."""
    batch_size, num_heads, q_len, _ = query.shape
    compute = torch.promote_types(query.dtype, torch.float32)
    live = torch.arange(keys.shape[2], device=keys.device) < length.unsqueeze(-1)
    columns = _columns(seen, q_len)
    keys = keys.to(compute)
    step = max(1, _MAX_LOGITS // max(1, batch_size * num_heads * keys.shape[2]))
    for start in range(0, q_len, step):
        part = slice(start, start + step)
        visible = _visible(position, live, columns[:, :, part], sliding_window)
        yield part, _logits(query[:, :, part].to(compute), keys, visible, scale, softcap)


def _weights(logits: Tensor, lse: Tensor) -> Tensor:
    """Turn logits `[B, H_kv, G, Q, S]` into weights in place, 0 where `lse` is -inf."""
    lse = torch.where(lse > -torch.inf, lse, torch.inf).unflatten(1, logits.shape[1:3])
    return logits.sub_(lse.unsqueeze(-1)).exp_()


def _own(data: Tensor, list_start: Tensor | None) -> Tensor:
    """Return `[B, H, C, ...]` slots in which every list begins at 0; a copy where it did not."""
    if list_start is None:
        return data
    row, head = _lists(data)
    slot = list_start.unsqueeze(-1) + torch.arange(data.shape[2], device=data.device)
    return data[row, head, slot.clamp_max_(data.shape[2] - 1)]


def _put(data: Tensor, list_start: Tensor | None, slot: Tensor, new: Tensor) -> None:
    """Write to slots `[B, H, S]`, counted from the begin of their row."""
    row, head = _lists(data)
    if list_start is None:
        data[row, head, slot] = new
    else:  # which cannot be written through its expanded heads
        data[:, :1][row, 0, slot] = new


def _put_live(data: Tensor, list_start: Tensor, new: Tensor, live: Tensor) -> None:
    """Write `[B, H, S, ...]` to the first slots of lists that share a row, where `live`."""
    # The others write once more what slot 0 gets, which is its own content in an empty list.
    row, head = _lists(data)
    rank = torch.where(live, torch.arange(live.shape[2], device=data.device), 0)
    slot = list_start.unsqueeze(-1) + rank
    some = live[:, :, :1].unsqueeze(-1) if data.ndim == 4 else live[:, :, :1]
    _put(data, list_start, slot, torch.where(some, new[row, head, rank], data[row, head, slot]))


def _lists(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Index the lists of a store: `data[row, head, slots]`, slots `[B, H or 1, S]`, takes rows."""
    return _list_numbers(keys.shape[0], keys.shape[1], keys.device)


@lru_cache(maxsize=32)
def _list_numbers(num_rows: int, num_heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # the cached tensors must serve any later mode
        row = torch.arange(num_rows, device=device)[:, None, None]
        return row, torch.arange(num_heads, device=device)[:, None]
