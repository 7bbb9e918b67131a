"""Triton statistics of how a window of queries attends; see `reference.window_statistics`.

Bytes floor: `B * H_kv * live * D` elements, every live slot's key once, plus 4 bytes of score per
slot. A program holds the queries of a group and walks over tiles of slots, loading keys ahead. All
queries of a head are neighbours in the product, so a variance is centred in registers. Groups of
more rows than fit are added up in several launches, which read the keys again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkit.attention.kernels import check_arguments, per_head, shared_bytes
from patchkit.attention.kernels.attention_lse import first_masked_tile, splits
from patchkit.attention.kernels.attention_mass import window_logits, window_queries
from patchkit.attention.kernels.decode_attention import INTERPRETED, LN_2
from patchkit.dependent_launch import launch_options, wait_for_previous
from patchkit.direct_launch import direct
from patchkit.launch_sizes import cdiv, next_power_of_2

__all__ = ["window_statistics"]

_MAX_QUERIES = 64
# BLOCK_N, pipeline depth
_TILES = ((64, 3), (64, 2), (32, 2), (16, 1))
_FLOAT32_TILES = ((32, 1), (16, 1))


@triton.jit
def _moments(
    logits, counted, inverse, inverse_rest, HEADS: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Means, variances and entropies in bits of a tile's slots, each [BLOCK_N], over all heads.
    p = tl.exp2(logits)  # [BLOCK_N, HEADS * BLOCK_Q]
    by_head = tl.reshape(p, (BLOCK_N, HEADS, BLOCK_Q))
    mean = tl.sum(by_head, axis=2) * inverse[None, :]  # [BLOCK_N, HEADS]
    centred = by_head - mean[:, :, None] * counted[None, :, :]
    variance = tl.sum(tl.sum(centred * centred, axis=2) * inverse_rest[None, :], axis=1)
    return tl.sum(mean, axis=1), variance, -tl.sum(p * logits, axis=1)


@direct
@triton.jit(do_not_specialize=["num_kv_heads", "groups", "q_len", "first_head", "sliding_window"])
def _window_statistics_kernel(
    query_ptr, keys_ptr, position_ptr, length_ptr, seen_ptr, lse_ptr, score_ptr, partial_ptr,
    stride_qb, stride_qh, stride_qi, stride_kb, stride_kh, stride_ks,
    stride_pb, stride_ph, stride_ps, stride_lb, stride_lh, stride_sb, stride_sh,
    stride_eb, stride_eh, stride_ei, stride_cb, stride_ch, stride_cs, stride_as, stride_ab,
    num_kv_heads, groups, q_len, first_head, scale, gamma, sliding_window, softcap,
    EARLY: tl.constexpr, D: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # One program: HEADS query heads of one KV head, every num_splits-th tile of its slots.
    wait_for_previous(EARLY)
    pid = tl.program_id(0)
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    b = (pid // num_kv_heads).to(tl.int64)
    h = (pid % num_kv_heads).to(tl.int64)
    length = tl.load(length_ptr + b * stride_lb + h * stride_lh)
    scored = tl.where(first_head > 0, length, 0)  # slots that hold the sums of earlier heads
    oldest = tl.load(seen_ptr + b * stride_sb + h * stride_sh) - q_len  # column of query 0
    keys_ptr += b * stride_kb + h * stride_kh
    position_ptr += b * stride_pb + h * stride_ph
    score_ptr += b * stride_cb + h * stride_ch
    query_ptr += b * stride_qb + (h * groups + first_head) * stride_qh
    lse_ptr += b * stride_eb + (h * groups + first_head) * stride_eh
    partial_ptr += b * stride_ab + h * num_splits + split

    q, counts, lse = window_queries(
        query_ptr, lse_ptr, stride_qh, stride_qi, stride_eh, stride_ei, groups - first_head, q_len,
        D, UPCAST, HEADS, BLOCK_Q, BLOCK_D,
    )  # fmt: skip
    counted = tl.reshape(tl.where(counts, 1.0, 0.0), (HEADS, BLOCK_Q))
    count = tl.sum(counted, axis=1)
    inverse = 1 / tl.maximum(count, 1.0)  # [HEADS]
    inverse_rest = 1 / tl.maximum(count - 1, 1.0)

    entropy = tl.zeros((BLOCK_N,), tl.float32)
    shift = tl.zeros((BLOCK_N,), tl.float32)
    first_masked = first_masked_tile(length, q_len, HAS_WINDOW, BLOCK_N) * BLOCK_N
    for tile in range(split, tl.cdiv(length, BLOCK_N), num_splits):
        logits = window_logits(
            keys_ptr, position_ptr, stride_ks, stride_ps, tile * BLOCK_N, first_masked, length,
            q, lse, oldest, q_len, scale, sliding_window, softcap, D, HAS_WINDOW, HAS_SOFTCAP,
            UPCAST, PRECISION, BLOCK_Q, HEADS * BLOCK_Q, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        mean, variance, bits = _moments(
            logits, counted, inverse, inverse_rest, HEADS, BLOCK_Q, BLOCK_N
        )
        slot = (tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        live = slot < length
        older = tl.load(position_ptr + slot * stride_ps, mask=live, other=oldest) < oldest
        entropy += tl.where(older, bits, 0.0)
        shift += tl.where(older, variance, 0.0)
        score = mean + gamma * variance
        score += tl.load(score_ptr + slot * stride_cs, mask=slot < scored, other=0.0)
        tl.store(score_ptr + slot * stride_cs, score, mask=live)
    tl.store(partial_ptr, tl.maximum(tl.sum(entropy, axis=0) * LN_2, 0.0))
    tl.store(partial_ptr + stride_as, tl.sum(shift, axis=0))


def _blocks(
    groups: int, q_len: int, block_d: int, element_size: int, shared: int
) -> dict[str, int]:
    """Choose how many heads are one tile: all if they fit, two programs on an SM if they do."""
    block_q = max(16, next_power_of_2(q_len))
    wide = element_size == 4
    heads = min(next_power_of_2(groups), max(1, (32 if wide else 256) // block_q))
    sizes = [(heads >> i, *tile) for i in range(heads.bit_length()) for tile in
             (_FLOAT32_TILES if wide else _TILES)]  # fmt: skip

    def fits(size: tuple[int, int, int], limit: int) -> bool:
        heads, block_n, stages = size
        return (heads * block_q + stages * block_n) * block_d * element_size <= limit

    limits = (shared // 2, shared)
    choices = (size for limit in limits for size in sizes if fits(size, limit))
    heads, block_n, stages = next(choices, sizes[-1])
    warps = 8 if heads * block_q > (16 if wide else 128) else 4
    return {
        "HEADS": heads, "BLOCK_Q": block_q, "BLOCK_N": block_n, "num_stages": stages,
        "num_warps": warps,
    }  # fmt: skip


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

    Query i is at column `seen[b, h] - Q + i`. It sees slot s iff `s < length` and
    `0 <= position <= column` and, with a window, `position > column - sliding_window`. The tokens
    of the queries are the last live slots of a list. With `p = exp(logit - lse)`, 0 where a query
    does not see a slot or has `lse == -inf`, and mean and unbiased variance of p over the queries
    of a head with `lse > -inf` (a variance of fewer than two is 0), the score of a slot is the sum
    of `mean + gamma * variance` over the G query heads of the KV head.

    Args:
        query: `[B, H_q, Q, D]`, float32/float16/bfloat16, finite, last stride 1, `2 <= Q <= 64`.
            Query heads `[h * G, (h + 1) * G)` share KV head h, where `G = H_q / H_kv`.
        keys: `[B, H_kv, C, D]`, as `query`.
        position: `[B, H_kv or 1, C]` int32.
        length: `[B, H_kv or 1]` int32.
        seen: `[B, H_kv or 1]` int32, the tokens of `query` included.
        lse: `[B, H_q, Q]` float32, log of the softmax denominators.
        score: `[B, H_kv, C]` float32. Written where slots are live.
        scale: Factor on the logits.
        gamma: Factor on the variances.
        sliding_window: Columns that a query sees, its own included. None: all.
        softcap: Logits become `softcap * tanh(logits / softcap)`, after `scale`. None: unchanged.

    Returns:
        `[2, B, N]` float32, two sums in N parts, left to add up: of `-p * log(p)` over the heads,
        the queries and the live slots with `position < seen - Q`, those older than the window, in
        parts that are not negative; and of the variances over the heads and these slots.

    Raises:
        ValueError: Shapes, dtypes, devices or strides disagree, an input requires grad, or Q is out
            of range.
    """
    batch_size, num_heads, q_len, head_dim = query.shape
    num_kv_heads, capacity = keys.shape[1], keys.shape[2]
    if not 2 <= q_len <= _MAX_QUERIES:
        raise ValueError(f"expected 2 to {_MAX_QUERIES} queries, got {q_len}")
    position, length, seen = per_head(num_heads, num_kv_heads, position, length, seen)
    lists, dtype, int32 = (batch_size, num_kv_heads), query.dtype, torch.int32
    check_arguments(
        query=(query, (batch_size, num_heads, q_len, head_dim), dtype),
        keys=(keys, (*lists, capacity, head_dim), dtype),
        position=(position, (*lists, capacity), int32),
        length=(length, lists, int32),
        seen=(seen, lists, int32),
        lse=(lse, (batch_size, num_heads, q_len), torch.float32),
        score=(score, (*lists, capacity), torch.float32),
    )
    if score.numel() == 0 or num_heads == 0:
        return query.new_zeros((2, batch_size, 1), dtype=torch.float32)

    num_lists, groups = batch_size * num_kv_heads, num_heads // num_kv_heads
    block_d = max(16, next_power_of_2(head_dim))
    shared = shared_bytes(query.device)
    blocks = _blocks(groups, q_len, block_d, query.element_size(), shared)
    num_splits = splits(num_lists, cdiv(capacity, blocks["BLOCK_N"]))
    first_heads = range(0, groups, blocks["HEADS"])
    shape = (2, batch_size, len(first_heads), num_kv_heads * num_splits)  # entropies, variances
    partial = query.new_empty(shape, dtype=torch.float32)
    with torch.cuda.device_of(query):
        for first_head, sums in zip(first_heads, partial.unbind(2), strict=True):
            _window_statistics_kernel[(num_lists, num_splits)](
                query, keys, position, length, seen, lse, score, sums,
                *query.stride()[:3], *keys.stride()[:3], *position.stride(), *length.stride(),
                *seen.stride(), *lse.stride(), *score.stride(), *sums.stride()[:2],
                num_kv_heads, groups, q_len, first_head, float(scale), float(gamma),
                sliding_window or 0, float(softcap or 1.0),
                D=head_dim, HAS_WINDOW=sliding_window is not None,
                HAS_SOFTCAP=softcap is not None, UPCAST=INTERPRETED and dtype == torch.bfloat16,
                PRECISION="ieee" if dtype == torch.float32 else "tf32",
                BLOCK_D=block_d, **launch_options(query.device), **blocks,
            )  # fmt: skip
    return partial.flatten(2)
