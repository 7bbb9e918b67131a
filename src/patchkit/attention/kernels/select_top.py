"""Triton kernels that pick the best slots of every list; see `reference.select_top`.

Every live slot gets one 64-bit key: its score as an integer of the same order, then its position.
A search narrows an interval of keys, 256 bins at a time, until the keys from its lower end on are
as many as asked for. Keys differ, so this ends; after each step the interval shrinks to the keys
it holds, so leading bits that these share cost nothing.

One program per list does all of it where the capacity is small. Else a program per chunk of slots
first sorts the keys into 256 bins, which a sample of the list has fixed, and copies those in the
bin of the threshold. One program per list searches these, and chunks write their kept slots.

Bytes floor: `8 * length + 4 * width` per list (`4 * length + 4 * width` without scores).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkit.attention.kernels import check_arguments
from patchkit.dependent_launch import launch_options, wait_for_previous

__all__ = ["select_top"]

# Capacity up to which one program per list does everything, holding its keys in registers; slots
# per program beyond, and candidates that the one program of a list takes at a time.
_MAX_SINGLE = 8192
_CHUNK = 2048
_BLOCK = 1024

_NUM_BINS = tl.constexpr(256)
_NUM_SAMPLES = tl.constexpr(256)
_NUM_ROWS = tl.constexpr(16)
_MAX_KEY = tl.constexpr(2**63 - 1)
_MIN_KEY = tl.constexpr(-(2**63))
_NEGATIVE_ZERO = tl.constexpr(-(2**31))
# Above every score; `_PROTECTED` is the lowest key of a protected slot.
_SINK = tl.constexpr(2**31 - 1)
_RECENT = tl.constexpr(2**31 - 2)
_PROTECTED = tl.constexpr((2**31 - 2) * 2**31)
# Keys of numbers lie between the lowest one of -3.4e38 and the lowest one of infinity.
_FINITE = tl.constexpr(-(0x7F800000) * 2**31)
_INFINITE = tl.constexpr(0x7F800000 * 2**31)

# Fields of `plan [lists, _PLAN]`: what a launch leaves to the next ones.
_PLAN = tl.constexpr(7)
_LOWEST, _SHIFT, _LENGTH, _COUNT, _INSIDE, _NEED, _THRESHOLD = (tl.constexpr(i) for i in range(7))


@triton.jit
def _load_keys(
    score_ptr,
    position_ptr,
    stride_ss,
    stride_ps,
    slot,
    mask,
    seen,
    recent,
    num_sinks,
    HAS_SCORE: tl.constexpr,
    MEAN: tl.constexpr,
):
    offset = slot.to(tl.int64)
    position = tl.load(position_ptr + offset * stride_ps, mask=mask, other=0)
    if HAS_SCORE:
        score = tl.load(score_ptr + offset * stride_ss, mask=mask, other=0.0)
        if MEAN:
            score = tl.div_rn(score, (seen - position).to(tl.float32))
        bits = score.to(tl.int32, bitcast=True)
        rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats ascend as integers descend
        rank = tl.where(bits == _NEGATIVE_ZERO, 0, rank)
    else:
        rank = position * 0
    rank = tl.where(position >= seen - recent, _RECENT, rank)
    rank = tl.where(slot < num_sinks, _SINK, rank)
    return (rank.to(tl.int64) << 31) + position


@triton.jit
def _bin_shift(span):
    """Return the smallest shift after which `span` numbers a bin."""
    return tl.sum(((span >> tl.arange(0, 64).to(tl.int64)) >= _NUM_BINS).to(tl.int32), axis=0)


@triton.jit
def _find_bin(histogram, inside, need):
    """Return the bin of the key of rank `need` from the top, how many it holds, how many are above.

    `inside` is the number of keys; what bin 0 of `histogram` says is ignored.
    """
    bins = tl.arange(0, _NUM_BINS)
    histogram = tl.where(bins == 0, 0, histogram)
    at_least = tl.sum(histogram, axis=0) - tl.cumsum(histogram, axis=0) + histogram
    at_least = tl.where(bins == 0, inside, at_least)  # [_NUM_BINS], keys in this bin or above
    found = tl.max(tl.where(at_least >= need, bins, 0), axis=0)
    above = tl.sum(tl.where(bins == found + 1, at_least, 0), axis=0)
    return found, tl.sum(tl.where(bins == found, at_least, 0), axis=0) - above, above


@triton.jit
def _block_of_keys(held, candidates_ptr, slot, length, HELD: tl.constexpr):
    """Return the keys of a block, `held` or those of candidates, and which of them there are."""
    live = slot < length
    key = held if HELD else tl.load(candidates_ptr + slot, mask=live, other=0)
    return key, live


@triton.jit
def _select_top_kernel(
    score_ptr,
    position_ptr,
    length_ptr,
    count_ptr,
    seen_ptr,
    recent_ptr,
    keep_ptr,
    candidates_ptr,
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
    width,
    EARLY: tl.constexpr,
    HAS_SCORE: tl.constexpr,
    MEAN: tl.constexpr,
    FROM_SLOTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    # FROM_SLOTS: search the slots of a list, at most BLOCK_S, and write `keep`. Otherwise search
    # its candidates, put in the place of each how many before it are kept, and write the threshold.
    wait_for_previous(EARLY)
    row = tl.program_id(0).to(tl.int64)
    b, h = row // num_heads, row % num_heads
    offs = tl.arange(0, BLOCK_S)
    plan_ptr += row * _PLAN
    candidates_ptr += row * (capacity + 1)
    keep_ptr += row * width
    lowest = tl.full((), _MIN_KEY, tl.int64)
    highest = tl.full((), _MAX_KEY, tl.int64)
    if FROM_SLOTS:
        length = tl.load(length_ptr + b * stride_lb + h * stride_lh)
        count = tl.load(count_ptr + b * stride_cb + h * stride_ch)
        count = tl.minimum(count, length)
        seen = tl.load(seen_ptr + b * stride_nb + h * stride_nh)
        recent = tl.load(recent_ptr + b * stride_rb + h * stride_rh)
        held = _load_keys(
            score_ptr + b * stride_sb + h * stride_sh, position_ptr + b * stride_pb + h * stride_ph,
            stride_ss, stride_ps, offs, offs < length, seen, recent, num_sinks, HAS_SCORE, MEAN,
        )  # fmt: skip
        # Protected slots and scores lie far apart: bins over both would be wasted.
        protected = tl.sum(((offs < length) & (held >= _PROTECTED)).to(tl.int32), axis=0)
        if count > protected:
            highest = tl.full((), _PROTECTED - 1, tl.int64)
            inside, need = length - protected, count - protected
        else:
            lowest = tl.full((), _PROTECTED, tl.int64)
            inside, need = protected, count
    else:
        length = tl.load(plan_ptr + _INSIDE).to(tl.int32)
        count = tl.load(plan_ptr + _NEED).to(tl.int32)
        held = offs.to(tl.int64)  # not used
        inside, need = length, count
    searching = count > 0
    while searching:
        # Shrink the interval to the keys it holds.
        low = tl.full((BLOCK_S,), _MAX_KEY, tl.int64)
        high = tl.full((BLOCK_S,), _MIN_KEY, tl.int64)
        for start in range(0, length, BLOCK_S):
            key, live = _block_of_keys(held, candidates_ptr, start + offs, length, FROM_SLOTS)
            live &= (key >= lowest) & (key <= highest)
            low = tl.minimum(low, tl.where(live, key, _MAX_KEY))
            high = tl.maximum(high, tl.where(live, key, _MIN_KEY))
        lowest, highest = tl.min(low, axis=0), tl.max(high, axis=0)

        if inside > need:
            shift = _bin_shift(highest - lowest)
            histogram = tl.zeros((_NUM_BINS,), tl.int32)
            for start in range(0, length, BLOCK_S):
                key, live = _block_of_keys(held, candidates_ptr, start + offs, length, FROM_SLOTS)
                live &= (key >= lowest) & (key <= highest)
                bin_of_key = tl.where(live, (key - lowest) >> shift, 0).to(tl.int32)
                histogram += tl.histogram(bin_of_key, _NUM_BINS)
            found, inside, above = _find_bin(histogram, inside, need)
            need -= above
            lowest += found.to(tl.int64) << shift
            highest = tl.minimum(highest, lowest + (tl.full((), 1, tl.int64) << shift) - 1)
        searching = (inside > need) & (lowest < highest)

    threshold = tl.where(count > 0, lowest, _MAX_KEY)
    before = tl.zeros((), tl.int32)
    for start in range(0, length, BLOCK_S):
        slot = start + offs
        key, live = _block_of_keys(held, candidates_ptr, slot, length, FROM_SLOTS)
        kept = (live & (key >= threshold)).to(tl.int32)
        rank = before + tl.cumsum(kept, axis=0) - kept
        if FROM_SLOTS:
            tl.store(keep_ptr + rank, slot, mask=(kept > 0) & (rank < width))
        else:
            tl.store(candidates_ptr + slot, rank.to(tl.int64), mask=live)
        before += tl.sum(kept, axis=0)
    if FROM_SLOTS:
        for start in range(0, width, BLOCK_S):
            slot = start + offs
            empty = tl.full((BLOCK_S,), 0, tl.int32) + capacity
            tl.store(keep_ptr + slot, empty, mask=(slot >= count) & (slot < width))
    else:
        tl.store(candidates_ptr + length, before.to(tl.int64))
        tl.store(plan_ptr + _THRESHOLD, threshold)


@triton.jit
def _survey_kernel(
    score_ptr,
    position_ptr,
    length_ptr,
    count_ptr,
    seen_ptr,
    recent_ptr,
    keys_ptr,
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
    # Write the keys of a chunk and how many fall into each bin.
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
        key = _load_keys(
            score_ptr, position_ptr, stride_ss, stride_ps, slot, live, seen, recent, num_sinks,
            HAS_SCORE, MEAN,
        )  # fmt: skip
        # Infinite scores would stretch the range until all others fall into a few bins.
        live &= (key >= _FINITE) & (key < _INFINITE)
        lowest = tl.min(tl.where(live, key, _PROTECTED), axis=0)
        highest = tl.maximum(tl.max(tl.where(live, key, _MIN_KEY), axis=0), lowest)
        shift = _bin_shift(highest - lowest)

        slot = start + tl.arange(0, CHUNK)
        live = slot < length
        key = _load_keys(
            score_ptr, position_ptr, stride_ss, stride_ps, slot, live, seen, recent, num_sinks,
            HAS_SCORE, MEAN,
        )  # fmt: skip
        tl.store(keys_ptr + row * capacity + slot, key, mask=live)
        bin_of_key = tl.minimum(tl.maximum((key - lowest) >> shift, 0), _NUM_BINS - 1)
        # Bin 0 also gets the slots past the length, which only the last chunk has.
        histogram = tl.histogram(tl.where(live, bin_of_key, 0).to(tl.int32), _NUM_BINS)
        bins = tl.arange(0, _NUM_BINS)
        tl.store(histogram_ptr + (row * num_chunks + chunk) * _NUM_BINS + bins, histogram)
        if chunk == 0:
            count = tl.load(count_ptr + b * stride_cb + h * stride_ch)
            plan_ptr += row * _PLAN
            tl.store(plan_ptr + _LOWEST, lowest)
            tl.store(plan_ptr + _SHIFT, shift.to(tl.int64))
            tl.store(plan_ptr + _LENGTH, length.to(tl.int64))
            tl.store(plan_ptr + _COUNT, tl.minimum(count, length).to(tl.int64))


@triton.jit
def _gather_kernel(
    keys_ptr,
    histogram_ptr,
    candidates_ptr,
    before_ptr,
    plan_ptr,
    capacity,
    num_chunks,
    EARLY: tl.constexpr,
    CHUNK: tl.constexpr,
):
    # Copy the keys of a chunk that lie in the bin of the threshold behind those of earlier chunks.
    wait_for_previous(EARLY)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    plan_ptr += row * _PLAN
    length = tl.load(plan_ptr + _LENGTH).to(tl.int32)
    start = chunk * CHUNK
    if (chunk == 0) | (start < length):
        need = tl.load(plan_ptr + _COUNT).to(tl.int32)
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
        key = tl.load(keys_ptr + row * capacity + slot, mask=live, other=0)
        bin_of_key = tl.minimum(tl.maximum((key - lowest) >> shift, 0), _NUM_BINS - 1)
        match = (live & (bin_of_key == found)).to(tl.int32)
        target = first + tl.cumsum(match, axis=0) - match
        tl.store(candidates_ptr + row * (capacity + 1) + target, key, mask=match > 0)
        before_ptr += (row * num_chunks + chunk) * 2
        tl.store(before_ptr, kept)
        tl.store(before_ptr + 1, first)
        if chunk == 0:
            tl.store(plan_ptr + _INSIDE, inside.to(tl.int64))
            tl.store(plan_ptr + _NEED, (need - above).to(tl.int64))


@triton.jit
def _write_kernel(
    keys_ptr,
    candidates_ptr,
    before_ptr,
    plan_ptr,
    keep_ptr,
    capacity,
    width,
    num_chunks,
    EARLY: tl.constexpr,
    CHUNK: tl.constexpr,
):
    # Write the kept slots of a chunk, and a chunk of the entries behind the count.
    wait_for_previous(EARLY)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    plan_ptr += row * _PLAN
    keep_ptr += row * width
    length = tl.load(plan_ptr + _LENGTH).to(tl.int32)
    count = tl.load(plan_ptr + _COUNT).to(tl.int32)
    slot = chunk * CHUNK + tl.arange(0, CHUNK)
    if chunk * CHUNK < length:
        threshold = tl.load(plan_ptr + _THRESHOLD)
        before_ptr += (row * num_chunks + chunk) * 2
        first = tl.load(before_ptr + 1)
        among_candidates = tl.load(candidates_ptr + row * (capacity + 1) + first).to(tl.int32)
        live = slot < length
        key = tl.load(keys_ptr + row * capacity + slot, mask=live, other=0)
        kept = (live & (key >= threshold)).to(tl.int32)
        rank = tl.load(before_ptr) + among_candidates + tl.cumsum(kept, axis=0) - kept
        tl.store(keep_ptr + rank, slot, mask=(kept > 0) & (rank < width))
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
            block_s = max(triton.next_power_of_2(capacity), 128)
            _select_top_kernel[(num_lists,)](
                *held, keep, keep, keep, *strides, num_heads, num_sinks, capacity, width,
                **options, FROM_SLOTS=True, BLOCK_S=block_s,
                num_warps=min(max(block_s // 256, 4), 16),
            )  # fmt: skip
            return keep
        num_chunks = triton.cdiv(max(capacity, width), _CHUNK)
        grid = (num_lists, num_chunks)
        keys = position.new_empty((num_lists, capacity), dtype=torch.int64)
        candidates = position.new_empty((num_lists, capacity + 1), dtype=torch.int64)
        plan = position.new_empty((num_lists, _PLAN.value), dtype=torch.int64)
        histogram = position.new_empty((num_lists, num_chunks, _NUM_BINS.value))
        before = position.new_empty((num_lists, num_chunks, 2))
        _survey_kernel[grid](
            *held, keys, histogram, plan, *strides, num_heads, num_sinks, capacity, num_chunks,
            **options, CHUNK=_CHUNK, num_warps=8,
        )  # fmt: skip
        _gather_kernel[grid](
            keys, histogram, candidates, before, plan, capacity, num_chunks, CHUNK=_CHUNK,
            num_warps=8, **early,
        )  # fmt: skip
        _select_top_kernel[(num_lists,)](
            *held, keep, candidates, plan, *strides, num_heads, num_sinks, capacity, width,
            **options, FROM_SLOTS=False, BLOCK_S=_BLOCK, num_warps=4,
        )  # fmt: skip
        _write_kernel[grid](
            keys, candidates, before, plan, keep, capacity, width, num_chunks, CHUNK=_CHUNK,
            num_warps=8, **early,
        )  # fmt: skip
    return keep
