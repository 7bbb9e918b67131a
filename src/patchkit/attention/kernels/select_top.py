"""Triton kernels that pick the best slots of every list; see `reference.select_top`.

Where the capacity is small, one program per list finds the threshold (`ranks.py`). Else a program
per chunk of slots first sorts the ranks into 256 bins, which a sample of the list has fixed, and
copies those in the bin of the threshold. Then every program searches these, and writes the kept
slots of its chunk.

Bytes floor: `8 * length + 4 * width` per list (`4 * length + 4 * width` without scores).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkit.attention.kernels import check_arguments
from patchkit.attention.kernels.ranks import (
    FINITE,
    INFINITE,
    LOWEST_INT,
    block_of_ranks,
    load_ranks,
    reaches,
    threshold,
)
from patchkit.dependent_launch import launch_options, wait_for_previous
from patchkit.direct_launch import direct
from patchkit.launch_sizes import cdiv, next_power_of_2

__all__ = ["select_top"]

# Capacity up to which one program per list does everything, holding its ranks in registers.
_MAX_SINGLE = 8192
# Slots per program beyond, or twice as many where lists are so long that programs would wait for
# each other; candidates that a program takes at a time.
_CHUNK = 2048
_LONG = 65536
_BLOCK = 1024

_NUM_BINS = tl.constexpr(256)
_NUM_SAMPLES = tl.constexpr(256)
_NUM_ROWS = tl.constexpr(16)
# Fields of `plan [lists, _PLAN]`: what a launch leaves to the next ones.
_PLAN = tl.constexpr(6)
_LOWEST, _SHIFT, _LENGTH, _COUNT, _INSIDE, _NEED = (tl.constexpr(i) for i in range(6))


@triton.jit
def _bin_shift(span):
    """Return the smallest shift after which `span` numbers a bin."""
    return tl.sum(((span >> tl.arange(0, 64).to(tl.int64)) >= _NUM_BINS).to(tl.int32), axis=0)


@triton.jit
def _bin(rank, lowest, shift):
    """Return the bin of every rank: bins begin at `lowest`; the outer ones take what is beyond."""
    bin_of_rank = (rank.to(tl.int64) - lowest) >> shift
    return tl.minimum(tl.maximum(bin_of_rank, 0), _NUM_BINS - 1).to(tl.int32)


@triton.jit
def _find_bin(histogram, inside, need):
    """Return the bin of the rank number `need` from the top, its size, and how many are above.

    `inside` is the number of ranks; what bin 0 of `histogram` says is ignored.
    """
    bins = tl.arange(0, _NUM_BINS)
    histogram = tl.where(bins == 0, 0, histogram)
    at_least = tl.sum(histogram, axis=0) - tl.cumsum(histogram, axis=0) + histogram
    at_least = tl.where(bins == 0, inside, at_least)  # [_NUM_BINS], ranks in this bin or above
    found = tl.max(tl.where(at_least >= need, bins, 0), axis=0)
    above = tl.sum(tl.where(bins == found + 1, at_least, 0), axis=0)
    return found, tl.sum(tl.where(bins == found, at_least, 0), axis=0) - above, above


@direct
@triton.jit(do_not_specialize=["num_sinks", "width"])
def _select_top_kernel(
    score_ptr,
    position_ptr,
    length_ptr,
    count_ptr,
    seen_ptr,
    recent_ptr,
    keep_ptr,
    stride_sb,
    stride_sh,
    stride_ss,
    stride_pb,
    stride_ph,
    stride_ps,
    stride_lb,
    stride_lh,
    stride_cb,
    stride_ch,
    stride_nb,
    stride_nh,
    stride_rb,
    stride_rh,
    num_heads,
    num_sinks,
    capacity,
    width,
    EARLY: tl.constexpr,
    HAS_SCORE: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    # One program: a list of at most BLOCK_S slots.
    wait_for_previous(EARLY)
    row = tl.program_id(0).to(tl.int64)
    b, h = row // num_heads, row % num_heads
    slot = tl.arange(0, BLOCK_S)
    keep_ptr += row * width
    length = tl.load(length_ptr + b * stride_lb + h * stride_lh)
    count = tl.load(count_ptr + b * stride_cb + h * stride_ch)
    count = tl.minimum(count, length)
    seen = tl.load(seen_ptr + b * stride_nb + h * stride_nh)
    recent = tl.load(recent_ptr + b * stride_rb + h * stride_rh)
    position_ptr += b * stride_pb + h * stride_ph
    rank = load_ranks(  # of dead slots too, rather than wait for the length
        score_ptr + b * stride_sb + h * stride_sh, position_ptr, stride_ss, stride_ps, slot,
        slot < capacity, seen, recent, num_sinks, HAS_SCORE, MEAN,
    )  # fmt: skip
    rank = tl.where(slot < length, rank, LOWEST_INT)
    rank_bound, position_bound = threshold(
        rank, keep_ptr, position_ptr, stride_ps, length, count, True, BLOCK_S
    )
    kept = reaches(rank, position_ptr, stride_ps, slot, rank_bound, position_bound).to(tl.int32)
    entry = tl.cumsum(kept, axis=0) - kept
    tl.store(keep_ptr + entry, slot, mask=(kept > 0) & (entry < width))
    for start in range(0, width, BLOCK_S):
        entry = start + slot
        empty = tl.full((BLOCK_S,), 0, tl.int32) + capacity
        tl.store(keep_ptr + entry, empty, mask=(entry >= count) & (entry < width))


@direct
@triton.jit(do_not_specialize=["num_sinks"])
def _survey_kernel(
    score_ptr,
    position_ptr,
    length_ptr,
    count_ptr,
    seen_ptr,
    recent_ptr,
    rank_ptr,
    histogram_ptr,
    plan_ptr,
    stride_sb,
    stride_sh,
    stride_ss,
    stride_pb,
    stride_ph,
    stride_ps,
    stride_lb,
    stride_lh,
    stride_cb,
    stride_ch,
    stride_nb,
    stride_nh,
    stride_rb,
    stride_rh,
    num_heads,
    num_sinks,
    capacity,
    num_chunks,
    EARLY: tl.constexpr,
    HAS_SCORE: tl.constexpr,
    MEAN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    # Write the ranks of a chunk and how many fall into each bin.
    wait_for_previous(EARLY)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    b, h = row // num_heads, row % num_heads
    length = tl.load(length_ptr + b * stride_lb + h * stride_lh)
    start = chunk * CHUNK
    if (chunk == 0) | (start < length):
        score_ptr += b * stride_sb + h * stride_sh
        position_ptr += b * stride_pb + h * stride_ph
        seen = tl.load(seen_ptr + b * stride_nb + h * stride_nh)
        recent = tl.load(recent_ptr + b * stride_rb + h * stride_rh)

        # All programs of a list agree on the bins: they draw the same sample.
        slot = (tl.arange(0, _NUM_SAMPLES).to(tl.int64) * length // _NUM_SAMPLES).to(tl.int32)
        live = slot < length
        rank = load_ranks(
            score_ptr, position_ptr, stride_ss, stride_ps, slot, live, seen, recent, num_sinks,
            HAS_SCORE, MEAN,
        )  # fmt: skip
        # Infinite scores would stretch the range until all others fall into a few bins.
        live &= (rank >= FINITE) & (rank < INFINITE)
        lowest = tl.min(tl.where(live, rank, INFINITE), axis=0)
        highest = tl.maximum(tl.max(tl.where(live, rank, LOWEST_INT), axis=0), lowest)
        shift = _bin_shift(highest.to(tl.int64) - lowest)

        slot = start + tl.arange(0, CHUNK)
        live = slot < length
        rank = load_ranks(
            score_ptr, position_ptr, stride_ss, stride_ps, slot, live, seen, recent, num_sinks,
            HAS_SCORE, MEAN,
        )  # fmt: skip
        tl.store(rank_ptr + row * capacity + slot, rank, mask=live)
        # Bin 0 also gets the slots past the length, which only the last chunk has.
        histogram = tl.histogram(tl.where(live, _bin(rank, lowest, shift), 0), _NUM_BINS)
        bins = tl.arange(0, _NUM_BINS)
        tl.store(histogram_ptr + (row * num_chunks + chunk) * _NUM_BINS + bins, histogram)
        if chunk == 0:
            count = tl.load(count_ptr + b * stride_cb + h * stride_ch)
            plan_ptr += row * _PLAN
            tl.store(plan_ptr + _LOWEST, lowest)
            tl.store(plan_ptr + _SHIFT, shift)
            tl.store(plan_ptr + _LENGTH, length)
            tl.store(plan_ptr + _COUNT, tl.minimum(count, length))


@direct
@triton.jit
def _gather_kernel(
    rank_ptr,
    position_ptr,
    histogram_ptr,
    candidates_ptr,
    before_ptr,
    plan_ptr,
    stride_pb,
    stride_ph,
    stride_ps,
    num_heads,
    capacity,
    num_chunks,
    EARLY: tl.constexpr,
    CHUNK: tl.constexpr,
):
    # Copy ranks and positions of a chunk's slots that lie in the bin of the threshold, behind those
    # of earlier chunks.
    wait_for_previous(EARLY)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    plan_ptr += row * _PLAN
    length = tl.load(plan_ptr + _LENGTH)
    start = chunk * CHUNK
    if (chunk == 0) | (start < length):
        need = tl.load(plan_ptr + _COUNT)
        lowest = tl.load(plan_ptr + _LOWEST)
        shift = tl.load(plan_ptr + _SHIFT)
        bins = tl.arange(0, _NUM_BINS)
        histogram = tl.zeros((_NUM_BINS,), tl.int32)
        earlier = tl.zeros((_NUM_BINS,), tl.int32)
        used = tl.cdiv(length, CHUNK)
        for first in range(0, used, _NUM_ROWS):
            chunks = first + tl.arange(0, _NUM_ROWS)[:, None]
            offset = (row * num_chunks + chunks) * _NUM_BINS + bins[None, :]
            counts = tl.load(histogram_ptr + offset, mask=chunks < used, other=0)
            histogram += tl.sum(counts, axis=0)
            earlier += tl.sum(tl.where(chunks < chunk, counts, 0), axis=0)
        found, inside, above = _find_bin(histogram, length, need)
        first = tl.sum(tl.where(bins == found, earlier, 0), axis=0)
        kept = tl.sum(tl.where(bins > found, earlier, 0), axis=0)

        slot = start + tl.arange(0, CHUNK)
        live = slot < length
        rank = tl.load(rank_ptr + row * capacity + slot, mask=live, other=0)
        match = live & (_bin(rank, lowest, shift) == found)
        matches = match.to(tl.int32)
        target = first + tl.cumsum(matches, axis=0) - matches
        position_ptr += (row // num_heads) * stride_pb + (row % num_heads) * stride_ph
        position = tl.load(position_ptr + slot.to(tl.int64) * stride_ps, mask=match, other=0)
        candidates_ptr += 2 * row * capacity
        tl.store(candidates_ptr + target, rank, mask=match)
        tl.store(candidates_ptr + capacity + target, position, mask=match)
        before_ptr += (row * num_chunks + chunk) * 2
        tl.store(before_ptr, kept)
        tl.store(before_ptr + 1, first)
        if chunk == 0:
            tl.store(plan_ptr + _INSIDE, inside)
            tl.store(plan_ptr + _NEED, need - above)


@direct
@triton.jit(do_not_specialize=["width"])
def _write_kernel(
    rank_ptr,
    position_ptr,
    candidates_ptr,
    before_ptr,
    plan_ptr,
    keep_ptr,
    stride_pb,
    stride_ph,
    stride_ps,
    num_heads,
    capacity,
    width,
    num_chunks,
    EARLY: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    # Find the threshold; write the kept slots of a chunk, and its part of what lies behind them.
    wait_for_previous(EARLY)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    plan_ptr += row * _PLAN
    keep_ptr += row * width
    candidates_ptr += 2 * row * capacity
    length = tl.load(plan_ptr + _LENGTH)
    count = tl.load(plan_ptr + _COUNT)
    slot = chunk * CHUNK + tl.arange(0, CHUNK)
    if chunk * CHUNK < length:
        inside = tl.load(plan_ptr + _INSIDE)
        need = tl.load(plan_ptr + _NEED)
        offs = tl.arange(0, BLOCK_S)
        positions_ptr = candidates_ptr + capacity
        held = block_of_ranks(offs, candidates_ptr, offs, inside, False)
        if inside <= BLOCK_S:
            rank_bound, position_bound = threshold(
                held, candidates_ptr, positions_ptr, 1, inside, need, True, BLOCK_S
            )
        else:
            rank_bound, position_bound = threshold(
                held, candidates_ptr, positions_ptr, 1, inside, need, False, BLOCK_S
            )
        # Kept slots of earlier chunks: those above the bin of the threshold, and candidates.
        before_ptr += (row * num_chunks + chunk) * 2
        first = tl.load(before_ptr + 1)
        before = tl.load(before_ptr)
        for start in range(0, first, BLOCK_S):
            rank = block_of_ranks(held, candidates_ptr, start + offs, first, False)
            kept = reaches(rank, positions_ptr, 1, start + offs, rank_bound, position_bound)
            before += tl.sum(kept.to(tl.int32), axis=0)
        rank = block_of_ranks(slot, rank_ptr + row * capacity, slot, length, False)
        position_ptr += (row // num_heads) * stride_pb + (row % num_heads) * stride_ph
        kept = reaches(rank, position_ptr, stride_ps, slot, rank_bound, position_bound)
        kept = kept.to(tl.int32)
        entry = before + tl.cumsum(kept, axis=0) - kept
        tl.store(keep_ptr + entry, slot, mask=(kept > 0) & (entry < width))
    empty = tl.full((CHUNK,), 0, tl.int32) + capacity
    tl.store(keep_ptr + slot, empty, mask=(slot >= count) & (slot < width))


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
        num_sinks: Leading slots that come before all others, `>= 0`.
        mean: Rank by `score / (seen - position)`, the score per column since the slot was filled.
            Ignored without `score`.
        width: Entries to return, `>= 0`.

    Returns:
        `[B, H, width]` int32, contiguous: the picked slots ascending, then C.

    Raises:
        ValueError: Shapes, dtypes or devices disagree, an input requires grad, or `num_sinks` or
            `width` is negative.
    """
    batch_size, num_heads, capacity = position.shape
    lists, int32 = (batch_size, num_heads), torch.int32
    check_arguments(
        position=(position, (*lists, capacity), int32),
        score=(score, (*lists, capacity), torch.float32),
        length=(length, lists, int32),
        count=(count, lists, int32),
        seen=(seen, lists, int32),
        recent=(recent, lists, int32),
    )
    for name, value in (("num_sinks", num_sinks), ("width", width)):
        if value < 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    keep = position.new_empty((*lists, width))
    if keep.numel() == 0:
        return keep
    num_lists = batch_size * num_heads
    ranking = position if score is None else score
    held = (ranking, position, length, count, seen, recent)
    strides = [stride for tensor in held for stride in tensor.stride()]
    early = launch_options(position.device)
    options = {"HAS_SCORE": score is not None, "MEAN": mean and score is not None, **early}

    with torch.cuda.device_of(position):
        if capacity <= _MAX_SINGLE:
            block_s = max(next_power_of_2(capacity), 128)
            _select_top_kernel[(num_lists,)](
                *held, keep, *strides, num_heads, num_sinks, capacity, width,
                **options, BLOCK_S=block_s, num_warps=8,
            )  # fmt: skip
            return keep
        chunk = _CHUNK if capacity <= _LONG else 2 * _CHUNK
        num_chunks = cdiv(max(capacity, width), chunk)
        grid = (num_lists, num_chunks)
        ranks = position.new_empty((num_lists, capacity))
        candidates = position.new_empty((num_lists, 2, capacity))
        plan = position.new_empty((num_lists, _PLAN.value))
        histogram = position.new_empty((num_lists, num_chunks, _NUM_BINS.value))
        before = position.new_empty((num_lists, num_chunks, 2))
        _survey_kernel[grid](
            *held, ranks, histogram, plan, *strides, num_heads, num_sinks, capacity, num_chunks,
            **options, CHUNK=chunk, num_warps=8,
        )  # fmt: skip
        _gather_kernel[grid](
            ranks, position, histogram, candidates, before, plan, *position.stride(), num_heads,
            capacity, num_chunks, CHUNK=chunk, num_warps=8, **early,
        )  # fmt: skip
        _write_kernel[grid](
            ranks, position, candidates, before, plan, keep, *position.stride(), num_heads,
            capacity, width, num_chunks, CHUNK=chunk, BLOCK_S=_BLOCK, num_warps=8, **early,
        )  # fmt: skip
    return keep
