"""Statistics of attention that eviction policies rank tokens by.

All are exact and need no matrix of attention weights: given the softmax denominators of the
queries, the weights of a block of slots are computed where they are summed up.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from patchkit.attention.eviction import Attended
from patchkit.attention.store_layer import StoreLayer


def denominators(layer: StoreLayer, attended: Attended, num_queries: int) -> Tensor:
    """Return `[B, H_q, num_queries]` float32, log of the denominators of the newest queries.

    That of padding is -inf, which takes its attention out of every statistic.
    """
    if attended.lse is not None:
        lse = attended.lse[:, :, -num_queries:]
    else:
        lse = layer.backend.run(
            "attention",
            "attention_lse",
            layer.device,
            attended.query[:, :, -num_queries:],
            *_slots(layer, attended),
            **attended.masking,
            sinks=attended.sinks,
        )
    if (padding := layer.padding) is not None:
        lse = lse.masked_fill(padding[:, None, -num_queries:], -torch.inf)
    return lse


def add_mass(
    layer: StoreLayer, attended: Attended, num_queries: int, *, fading: float = 1.0
) -> None:
    """Add the attention of the newest queries of a pass to `layer.score`.

    Every token of the pass, T of them without padding, lets what came before it fade: `score =
    fading^T * score + sum_i fading^(tokens behind i) * p_i`, where `p_i` is the attention weight of
    query i, summed over the query heads of a group.
    """
    lse = denominators(layer, attended, num_queries)
    q_len = attended.query.shape[2]
    decay = fading**q_len
    if fading != 1 and q_len > 1:  # a factor on the weights is a shift of the denominators
        behind = layer.behind
        if behind is None:
            behind = torch.arange(q_len - 1, -1, -1, device=lse.device).expand(len(lse), -1)
        else:
            layer.scores.mul_(fading ** layer.count_valid()[..., None])
            decay = 1.0
        lse = lse - behind[:, None, -num_queries:] * math.log(fading)
    _add(layer, attended, lse, decay)


def replace_by_newest(layer: StoreLayer, attended: Attended, *, share: bool = False) -> None:
    """Set `layer.score` to the attention of the newest query, summed as in `add_mass`.

    Args:
        layer: Whose scores change.
        attended: What was attended.
        share: Give all heads of a row the mean of their scores.
    """
    _add(layer, attended, denominators(layer, attended, 1), decay=0.0)
    if share and layer.scores.shape[1] > 1:
        layer.backend.run(
            "attention",
            "pool_scores",
            layer.device,
            layer.scores,
            layer.length,
            layer.scores,
            share=True,
        )


def replace_by_mean(
    layer: StoreLayer, attended: Attended, num_queries: int, *, scale: float, width: int
) -> None:
    """Set `layer.score` to `scale` times the mean attention of the newest queries, pooled.

    Summed as in `add_mass`; the mean is over the queries that are no padding. See `pool`.
    """
    lse = denominators(layer, attended, num_queries)
    score = _per_key_head(layer, attended)
    _mass(layer, attended, lse, score)
    count = None
    if layer.behind is None:  # no padding
        scale /= num_queries
    else:
        count = (lse[:, 0] > -torch.inf).sum(-1, dtype=torch.int32)
    pool(layer, _per_head(layer, score), width, scale=scale, count=count)


def replace_by_indicator(
    layer: StoreLayer, attended: Attended, num_queries: int, *, gamma: float, width: int
) -> Tensor:
    """Set `layer.score` to mean plus `gamma` times variance of the newest queries' attention.

    Both are over the queries that are no padding, summed over the query heads of a group, then
    pooled.

    Returns:
        `[2, B, N]` float32, of the slots older than the queries, over all heads, in N parts to add
        up: the entropy of their weights, and the sum of their variances.
    """
    score = _per_key_head(layer, attended)
    parts = layer.backend.run(
        "attention",
        "window_statistics",
        layer.device,
        attended.query[:, :, -num_queries:],
        *_slots(layer, attended),
        denominators(layer, attended, num_queries),
        score,
        gamma=gamma,
        **attended.masking,
    )
    pool(layer, _per_head(layer, score), width)
    return parts


def pool(
    layer: StoreLayer,
    score: Tensor,
    width: int,
    *,
    scale: float = 1.0,
    count: Tensor | None = None,
) -> None:
    """Write averages of `[B, H_kv, C]` scores over `width` neighbours in the text to `layer.score`.

    Slots beyond count as 0, as in `avg_pool1d(kernel=width, stride=1, padding=width // 2)` over the
    live slots by position. The scores are multiplied by `scale` and divided by `count`, `[B]`.
    """
    out = layer.scores[:, :, : score.shape[2]]

    def run(score: Tensor, out: Tensor) -> None:
        layer.backend.run(
            "attention",
            "pool_scores",
            layer.device,
            score,
            layer.length,
            out,
            width=width,
            scale=scale,
            count=count,
        )

    if layer.ordered or width == 1:
        run(score, out)
        return
    live = torch.arange(score.shape[2], device=layer.device) < layer.length[..., None]
    position = layer.position[:, :, : score.shape[2]]
    order = position.masked_fill(~live, torch.iinfo(torch.int32).max).argsort(-1)
    pooled = torch.zeros_like(score)
    run(score.gather(2, order), pooled)
    out.scatter_(2, order, pooled)


def _add(layer: StoreLayer, attended: Attended, lse: Tensor, decay: float) -> None:
    if attended.keys.shape[1] == layer.length.shape[1]:
        _mass(layer, attended, lse, layer.scores, decay=decay, num_new=layer.newest)
        return
    score = _per_key_head(layer, attended)
    _mass(layer, attended, lse, score)
    mass, width = _per_head(layer, score), score.shape[2]
    held, position = layer.scores[:, :, :width], layer.position[:, :, :width]
    if decay != 0:
        old = position < (layer.seen - layer.newest)[..., None]
        mass = mass + decay * torch.where(old, held, 0)
    held.copy_(mass)


def _mass(
    layer: StoreLayer, attended: Attended, lse: Tensor, score: Tensor, **options: float
) -> None:
    layer.backend.run(
        "attention",
        "attention_mass",
        layer.device,
        attended.query[:, :, -lse.shape[2] :],
        *_slots(layer, attended),
        lse,
        score,
        **options,
        list_start=layer.list_start,
        **attended.masking,
    )


def _per_head(layer: StoreLayer, score: Tensor) -> Tensor:
    """Sum `[B, H, C]` over the key heads of a KV head."""
    num_heads = layer.length.shape[1]
    return score if score.shape[1] == num_heads else score.unflatten(1, (num_heads, -1)).sum(2)


def _per_key_head(layer: StoreLayer, attended: Attended) -> Tensor:
    """Make room for `[B, H, C]` scores of H key heads, which MLA expands from one latent."""
    shape = attended.keys.shape[:3]
    return torch.empty(shape, dtype=torch.float32, device=layer.device)


def _slots(layer: StoreLayer, attended: Attended) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return attended.keys, attended.position, layer.length, layer.seen
