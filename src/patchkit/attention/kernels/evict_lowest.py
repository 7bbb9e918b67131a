"""Triton kernel that evicts the lowest-scored slot of every list; see `reference.evict_lowest`.

Bytes floor per list over budget: `4 * length` bytes of positions, as much again with scores, and
`2 * (D + D_v)` elements for the one slot that moves. The time is that of one program's scan.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkit.attention.kernels import check_arguments, first_slot, starts
from patchkit.dependent_launch import launch_options, wait_for_previous
from patchkit.direct_launch import direct
from patchkit.launch_sizes import next_power_of_2

__all__ = ["evict_lowest"]

_INT_MAX = tl.constexpr(2**31 - 1)


@direct
@triton.jit
def _evict_lowest_kernel(
    keys_ptr,
    values_ptr,
    position_ptr,
    length_ptr,
    budget_ptr,
    seen_ptr,
    recent_ptr,
    score_ptr,
    list_start_ptr,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_pb,
    stride_ph,
    stride_ps,
    stride_lb,
    stride_lh,
    stride_ub,
    stride_uh,
    stride_nb,
    stride_nh,
    stride_rb,
    stride_rh,
    stride_sb,
    stride_sh,
    stride_ss,
    num_heads,
    num_protected,
    EARLY: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    HAS_SCORE: tl.constexpr,
    MEAN: tl.constexpr,
    HAS_LIST_START: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wait_for_previous(EARLY)
    b = (tl.program_id(0) // num_heads).to(tl.int64)
    h = (tl.program_id(0) % num_heads).to(tl.int64)
    length_ptr += b * stride_lb + h * stride_lh
    length = tl.load(length_ptr)
    budget = tl.load(budget_ptr + b * stride_ub + h * stride_uh)
    if (length > budget) & (length > num_protected):
        offset = first_slot(list_start_ptr, tl.program_id(0), HAS_LIST_START)
        position_ptr += b * stride_pb + h * stride_ph + offset * stride_ps
        score_ptr += b * stride_sb + h * stride_sh + offset * stride_ss
        seen = tl.load(seen_ptr + b * stride_nb + h * stride_nh)
        first_recent = seen - tl.load(recent_ptr + b * stride_rb + h * stride_rh)

        # Every lane keeps the best of the slots it meets; the lanes are compared once at the end.
        best_score = tl.full((BLOCK_S,), float("inf"), tl.float32)
        best_position = tl.full((BLOCK_S,), _INT_MAX, tl.int32)
        best_slot = tl.full((BLOCK_S,), _INT_MAX, tl.int32)
        for start in range(num_protected, length, BLOCK_S):
            slot = start + tl.arange(0, BLOCK_S)
            mask = slot < length
            wide = slot.to(tl.int64)
            position = tl.load(position_ptr + wide * stride_ps, mask=mask, other=_INT_MAX)
            candidate = mask & (position < first_recent)
            better = candidate & (position < best_position)
            if HAS_SCORE:
                score = tl.load(score_ptr + wide * stride_ss, mask=mask, other=float("inf"))
                if MEAN:
                    score = tl.div_rn(score, (seen - position).to(tl.float32))
                better = (candidate & (score < best_score)) | ((score == best_score) & better)
                best_score = tl.where(better, score, best_score)
            best_position = tl.where(better, position, best_position)
            best_slot = tl.where(better, slot, best_slot)
        if HAS_SCORE:
            tied = best_score == tl.min(best_score, axis=0)
            best_position = tl.where(tied, best_position, _INT_MAX)
        tied = best_position == tl.min(best_position, axis=0)
        victim = tl.min(tl.where(tied, best_slot, _INT_MAX), axis=0)
        last = length - 1
        if victim < length:  # there is a candidate
            # If the victim is the last slot, its row is copied onto itself.
            source = last.to(tl.int64)
            target = victim.to(tl.int64)
            keys_ptr += b * stride_kb + h * stride_kh + offset * stride_ks
            values_ptr += b * stride_vb + h * stride_vh + offset * stride_vs
            for first in tl.static_range(0, D, BLOCK_D):
                offs_d = first + tl.arange(0, BLOCK_D)
                mask_d = offs_d < D
                row = tl.load(keys_ptr + source * stride_ks + offs_d, mask=mask_d)
                tl.store(keys_ptr + target * stride_ks + offs_d, row, mask=mask_d)
            for first in tl.static_range(0, D_V, BLOCK_D):
                offs_d = first + tl.arange(0, BLOCK_D)
                mask_d = offs_d < D_V
                row = tl.load(values_ptr + source * stride_vs + offs_d, mask=mask_d)
                tl.store(values_ptr + target * stride_vs + offs_d, row, mask=mask_d)
            column = tl.load(position_ptr + source * stride_ps)
            # Every warp loads these scalars; none may load them after the first one stored.
            if HAS_SCORE:
                score_of_last = tl.load(score_ptr + source * stride_ss)
                tl.debug_barrier()
                tl.store(score_ptr + target * stride_ss, score_of_last)
            else:
                tl.debug_barrier()
            tl.store(position_ptr + target * stride_ps, tl.where(victim == last, -1, column))
            tl.store(position_ptr + source * stride_ps, -1)
            tl.store(length_ptr, last)


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
        keys: `[B, H, C, D]`, float32/float16/bfloat16, last stride 1. Changed in place.
        values: `[B, H, C, D_v]`, as `keys`. Changed in place.
        position: `[B, H, C]` int32. Changed in place.
        length: `[B, H]` int32. Changed in place.
        budget: `[B, H]` int32, live slots to keep.
        seen: `[B, H]` int32.
        recent: `[B, H]` int32, newest columns that are never evicted.
        score: `[B, H, C]` float32 without NaN in live slots. Changed in place. None: the position
            is the score, so the oldest slot goes.
        num_protected: Leading slots that are never evicted, `>= 0`.
        mean: Rank by `score / (seen - position)`, the score per column since the slot was filled.
            Moves `score` all the same. Ignored without `score`.
        list_start: `[B, H]` int32 contiguous, first slot of each list where those of a row share
            C slots (and `keys`, ... are expanded over H). None: each has C slots of its own.

    Raises:
        ValueError: Shapes, dtypes, devices or strides disagree, an input requires grad, or
            `num_protected` is negative.
    """
    batch_size, num_heads, capacity, head_dim = keys.shape
    value_dim = values.shape[-1]
    lists, dtype, int32 = (batch_size, num_heads), keys.dtype, torch.int32
    check_arguments(
        keys=(keys, (*lists, capacity, head_dim), dtype),
        values=(values, (*lists, capacity, value_dim), dtype),
        position=(position, (*lists, capacity), int32),
        length=(length, lists, int32),
        budget=(budget, lists, int32),
        seen=(seen, lists, int32),
        recent=(recent, lists, int32),
        score=(score, (*lists, capacity), torch.float32),
        list_start=(list_start, lists, int32),
    )
    if num_protected < 0:
        raise ValueError(f"num_protected must be >= 0, got {num_protected}")
    if capacity == 0 or batch_size * num_heads == 0:
        return

    ranking = position if score is None else score
    with torch.cuda.device_of(keys):
        _evict_lowest_kernel[(batch_size * num_heads,)](
            keys,
            values,
            position,
            length,
            budget,
            seen,
            recent,
            ranking,
            starts(list_start, length),
            *keys.stride()[:3],
            *values.stride()[:3],
            *position.stride(),
            *length.stride(),
            *budget.stride(),
            *seen.stride(),
            *recent.stride(),
            *ranking.stride(),
            num_heads,
            num_protected,
            **launch_options(keys.device, batch_size),
            D=head_dim,
            D_V=value_dim,
            HAS_SCORE=score is not None,
            MEAN=mean and score is not None,
            HAS_LIST_START=list_start is not None,
            BLOCK_S=min(next_power_of_2(capacity), 2048),
            BLOCK_D=min(next_power_of_2(max(head_dim, value_dim)), 1024),
            num_warps=8,
        )
