"""Statistics of attention that eviction policies rank tokens by.

All are exact and need no matrix of attention weights: given the softmax denominators of the
queries, the weights of a block of slots are computed where they are summed up.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
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


def replace_by_mean(
    layer: StoreLayer, attended: Attended, num_queries: int, scale: float = 1.0
) -> None:
    """Set `layer.score` to `scale` times the mean attention of the newest queries.

    As in `add_mass`, over the queries that are no padding.
    """
    lse = denominators(layer, attended, num_queries)
    if layer.padding is not None:
        lse = lse + _voters(lse)[..., None, None].log() - math.log(scale)
    elif scale != num_queries:  # else the sum is what is wanted, and a step costs no launch
        lse = lse + math.log(num_queries / scale)
    _add(layer, attended, lse, decay=0.0)


def _voters(lse: Tensor) -> Tensor:
    """Count the queries that are no padding, `[B]`."""
    return (lse[:, 0] > -torch.inf).sum(-1).clamp_min(1)


def _add(layer: StoreLayer, attended: Attended, lse: Tensor, decay: float) -> None:
    shared = attended.keys.shape[1] == layer.length.shape[1]
    score = layer.scores if shared else _per_key_head(layer, attended)
    layer.backend.run(
        "attention",
        "attention_mass",
        layer.device,
        attended.query[:, :, -lse.shape[2] :],
        *_slots(layer, attended),
        lse,
        score,
        decay=decay if shared else 0.0,
        num_new=layer.newest,
        first=layer.first,
        **attended.masking,
    )
    if shared:
        return
    width = score.shape[2]
    held, position = layer.scores[:, :, :width], layer.position[:, :, :width]
    mass = score.unflatten(1, (held.shape[1], -1)).sum(2)
    if decay != 0:
        old = position < (layer.seen - layer.newest)[..., None]
        mass = mass + decay * torch.where(old, held, 0)
    held.copy_(mass)


def window_statistics(
    layer: StoreLayer, attended: Attended, num_queries: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Describe what the newest queries attended to, summed over the query heads of a group.

    Returns:
        The means and the unbiased variances over the queries of each slot's weight, both
        `[B, H_kv, C]` float32 (0 in empty slots), and the entropy of the weights of slots older
        than the queries, `[B, H_kv]`.
    """
    lse = denominators(layer, attended, num_queries)
    mass, variance = _per_key_head(layer, attended), _per_key_head(layer, attended)
    entropy = layer.backend.run(
        "attention",
        "window_statistics",
        layer.device,
        attended.query[:, :, -num_queries:],
        *_slots(layer, attended),
        lse,
        mass,
        variance,
        **attended.masking,
    )
    mean = mass / _voters(lse)[:, None, None]
    groups = (layer.length.shape[1], -1)
    mean, variance = (x.unflatten(1, groups).sum(2) for x in (mean, variance))
    return mean, variance, entropy.unflatten(1, groups).sum(2)


def pool(layer: StoreLayer, score: Tensor, width: int) -> Tensor:
    """Average `[B, H_kv, C]` scores over `width` neighbours in the text; slots beyond count as 0.

    As `avg_pool1d(kernel=width, stride=1, padding=width // 2)` over the live slots by position.
    """
    live = _live(layer, score.shape[2])
    score = torch.where(live, score, 0)
    if width == 1:
        return score
    if layer.ordered:
        return F.avg_pool1d(score, width, stride=1, padding=width // 2)
    position = layer.position[:, :, : score.shape[2]]
    order = position.masked_fill(~live, torch.iinfo(torch.int32).max).argsort(-1)
    pooled = F.avg_pool1d(score.gather(2, order), width, stride=1, padding=width // 2)
    return torch.zeros_like(score).scatter_(2, order, pooled)


def _live(layer: StoreLayer, capacity: int) -> Tensor:
    return torch.arange(capacity, device=layer.device) < layer.length[..., None]


def _per_key_head(layer: StoreLayer, attended: Attended) -> Tensor:
    """Make `[B, H, C]` zeros for keys of H heads, which MLA expands from one latent."""
    shape = attended.keys.shape[:3]
    return torch.zeros(shape, dtype=torch.float32, device=layer.device)


def _slots(layer: StoreLayer, attended: Attended) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return attended.keys, attended.position, layer.length, layer.seen
