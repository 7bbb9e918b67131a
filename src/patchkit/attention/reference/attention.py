"""What reads the slots of a store: attention of a few queries and of many, and scores by it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from patchkit.attention.reference.slots import list_indices, own_slots, put_live

__all__ = [
    "attention_lse",
    "attention_mass",
    "decode_attention",
    "pool_scores",
    "prefill_attention",
    "window_statistics",
]

_MAX_LOGITS = 2**24  # held at a time by the operations that go through blocks of queries


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
    keys, values, position = (own_slots(data, list_start) for data in (keys, values, position))
    compute = torch.promote_types(query.dtype, torch.float32)
    slot_live = torch.arange(keys.shape[2], device=keys.device) < length.unsqueeze(-1)
    live = slot_live & (position >= 0)  # [B, H_kv or 1, C]
    if indices is not None and index_count is not None:
        listed = torch.arange(indices.shape[2], device=keys.device) < index_count.unsqueeze(-1)
        slots = torch.where(listed, indices, 0).long()
        row, head = list_indices(keys)
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
    keys, position, score = (own_slots(data, list_start) for data in (keys, position, score))
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
        put_live(shared, list_start, total, live)


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
        `[2, B, N]` float32, two sums in N parts, left to add up: of `-p * log(p)` over the heads,
        the queries and the live slots with `position < seen - Q`, those older than the window, in
        parts that are not negative; and of the variances over the heads and these slots.
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
    return sums.clamp_min_(0)[..., None]


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
