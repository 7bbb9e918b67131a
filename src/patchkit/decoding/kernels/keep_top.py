"""Triton kernels that keep the highest scores of every row; see `reference.keep_top`.

Both rules are one: a score stays as long as those above it weigh less than what is needed. They
weigh 1 each and `count` is needed, or `exp(score - highest)` and the part of all weights that
`mass` says. Weights are integers, in fixed point, so that no order of adding them matters.

Four launches, the programs of a row each having a block of it: the highest scores of blocks, and
thereby the range in which the threshold lies; the weights in equal bins of that range; the scores
in the bin of the threshold, gathered; and, by bisection over these in every program, the
threshold, by which blocks are written. With both limits the scores above the bin are gathered too,
and the mass is found among them. A row whose scores nearly all lie in one bin is searched as
a whole by each program, which takes long but ends.

Bytes floor: the scores once and the result once. The scores are read four times, later from cache.
"""

from __future__ import annotations

import math
from ctypes import c_float

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkit.decoding.kernels.argmax import ascending
from patchkit.decoding.kernels.peaks import BLOCK, check_scores, highest_of, write_peaks
from patchkit.dependent_launch import launch_options, wait_for_previous
from patchkit.direct_launch import direct
from patchkit.launch_sizes import cdiv

__all__ = ["keep_top"]

_SMALLEST_GROUP = 64
# No weight of float32 is left so far below the highest score.
_LARGEST_SPAN = 104.0

_INFINITY = tl.constexpr(float("inf"))
_LOWEST_KEY = tl.constexpr(-(2**63))
_HIGHEST_KEY = tl.constexpr(2**63 - 1)
_HIGHEST_RANK = tl.constexpr(2**31 - 1)
_INFINITE_KEY = tl.constexpr(0x7F800000 * 2**32)
_CHUNK = tl.constexpr(1024)

# Fields of `plan [B, _PLAN]`: the weights of bins, the number of candidates, and how much of their
# weight is needed (0: all scores stay).
_BINS = tl.constexpr(1024)
_CANDIDATES = tl.constexpr(1024)
_NEED = tl.constexpr(1025)
_PLAN = tl.constexpr(1026)


@triton.jit
def _lowest_of(peaks_ptr, num_peaks):
    lowest = tl.full((128,), _INFINITY, tl.float32)
    for start in range(0, num_peaks, 128):
        offs = start + tl.arange(0, 128)
        peak = tl.load(peaks_ptr + offs, mask=offs < num_peaks, other=_INFINITY)
        lowest = tl.minimum(lowest, peak)
    return tl.min(lowest, axis=0)


@triton.jit
def _range_of_bins(
    peaks_ptr,
    lows_ptr,
    row,
    num_peaks,
    count,
    span,
    COUNT: tl.constexpr,
    PEAKS: tl.constexpr,
):
    """Return the highest score, a bound below the threshold, and how many bins a unit takes."""
    num_blocks = tl.num_programs(1)
    peaks_ptr += row * num_blocks * PEAKS
    highest = highest_of(peaks_ptr, num_peaks)
    if COUNT:
        # As many groups as are to be kept have a score of at least the lowest of their peaks.
        lowest = tl.full((), -_INFINITY, tl.float32)
        if num_peaks >= count:
            lowest = _lowest_of(peaks_ptr, num_peaks)
        if lowest == -_INFINITY:
            lowest = _lowest_of(lows_ptr + row * num_blocks, num_blocks)
        span = tl.minimum(tl.maximum(highest - lowest, 1e-30), 3e38)
    else:
        lowest = highest - span
    return highest, lowest, tl.div_rn(_BINS + 0.0, span)


@triton.jit
def _bin_of(score, highest, bins_per_unit):
    # Of operations that two kernels cannot round differently.
    place = tl.fma(score - highest, bins_per_unit, _BINS + 0.0)
    place = tl.minimum(tl.maximum(place, 0.0), _BINS - 1.0)
    return tl.where(score <= highest, place, _BINS - 1.0).to(tl.int32)  # infinity and NaN on top


@triton.jit
def _weight_of(score, highest, one, COUNT: tl.constexpr):
    if COUNT:
        weight = tl.full(score.shape, 1, tl.int64)
    else:
        weight = tl.ceil(tl.exp(score - highest) * one).to(tl.int64)
    return weight


@triton.jit
def _need_of(total, share):
    """Return how much of `total` weight has to stay if `share` of it may go."""
    return tl.maximum(total - tl.floor(total.to(tl.float64) * share).to(tl.int64), 1)


@direct
@triton.jit
def _weigh_kernel(
    scores_ptr,
    peaks_ptr,
    lows_ptr,
    plan_ptr,
    stride_b,
    stride_v,
    num_scores,
    num_peaks,
    count,
    span,
    one,
    COUNT: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
    PEAKS: tl.constexpr,
):
    # Add the weights of a block to those of the bins.
    wait_for_previous(EARLY)
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    mask = index < num_scores
    score = tl.load(scores_ptr + row * stride_b + index * stride_v, mask=mask, other=-_INFINITY)
    highest, lowest, bins_per_unit = _range_of_bins(
        peaks_ptr, lows_ptr, row, num_peaks, count, span, COUNT, PEAKS
    )
    plan_ptr += row * _PLAN
    below = score < lowest
    weight = tl.where(score != -_INFINITY, _weight_of(score, highest, one, COUNT), 0)
    if not COUNT:  # with infinity in a row all stay, and so its bins stay empty
        weight = tl.where(highest < _INFINITY, weight, 0)
    place = plan_ptr + _bin_of(score, highest, bins_per_unit)
    tl.atomic_add(place, weight, mask=(weight > 0) & ~below, sem="relaxed")
    if not COUNT:
        rest = tl.sum(tl.where(below, weight, 0), axis=0)
        tl.atomic_add(plan_ptr, rest, mask=rest > 0, sem="relaxed")


@direct
@triton.jit
def _gather_kernel(
    scores_ptr,
    peaks_ptr,
    lows_ptr,
    plan_ptr,
    candidates_ptr,
    stride_b,
    stride_v,
    num_scores,
    num_peaks,
    count,
    span,
    share,
    COUNT: tl.constexpr,
    MASS: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
    PEAKS: tl.constexpr,
):
    # Collect the scores of a block that lie in the bin of the threshold, in any order.
    wait_for_previous(EARLY)
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    mask = index < num_scores
    score = tl.load(scores_ptr + row * stride_b + index * stride_v, mask=mask, other=-_INFINITY)
    highest, lowest, bins_per_unit = _range_of_bins(
        peaks_ptr, lows_ptr, row, num_peaks, count, span, COUNT, PEAKS
    )
    plan_ptr += row * _PLAN
    bins = tl.arange(0, _BINS)
    weights = tl.load(plan_ptr + bins)
    total = tl.sum(weights, axis=0)
    need = tl.full((), 0, tl.int64) + count if COUNT else _need_of(total, share)
    at_least = total - tl.cumsum(weights, axis=0) + weights  # in this bin or above
    found = tl.max(tl.where(at_least >= need, bins, -1), axis=0)
    place = _bin_of(score, highest, bins_per_unit)
    if COUNT and MASS:
        match = place >= found
    else:
        match = place == found
        need -= tl.sum(tl.where(bins > found, weights, 0), axis=0)
    if block == 0:
        tl.store(plan_ptr + _NEED, tl.where(found >= 0, need, 0))
    match &= score != -_INFINITY
    if COUNT:
        match &= ~(score < lowest)
    ones = match.to(tl.int32)
    number = tl.sum(ones, axis=0)
    if number > 0:
        first = tl.atomic_add(plan_ptr + _CANDIDATES, number.to(tl.int64), sem="relaxed")
        target = first + tl.cumsum(ones, axis=0) - ones
        key = _key_of(score, index, MASS)
        tl.store(candidates_ptr + row * num_scores + target, key, mask=match)


@triton.jit
def _key_of(score, index, MASS: tl.constexpr):
    """Return an integer of the same order, and with MASS of the order of indices next."""
    key = ascending(score).to(tl.int64) << 32
    return key + index if MASS else key


@triton.jit
def _score_of(key):
    rank = (key >> 32).to(tl.int32)
    return (rank ^ ((rank >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _threshold(candidates_ptr, number, need, low, highest, one, COUNT: tl.constexpr):
    """Return the highest key from which on candidates weigh `need`, or else `low`."""
    high = tl.where(need > 0, _HIGHEST_KEY, low)
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # half of their sum, rounded up
        weights = tl.zeros((_CHUNK,), tl.int64)
        lowest_above = tl.full((_CHUNK,), _HIGHEST_KEY, tl.int64)
        highest_below = tl.full((_CHUNK,), _LOWEST_KEY, tl.int64)
        for start in range(0, number, _CHUNK):
            offs = start + tl.arange(0, _CHUNK)
            live = offs < number
            key = tl.load(candidates_ptr + offs, mask=live, other=0)
            above = live & (key >= middle)
            weights += tl.where(above, _weight_of(_score_of(key), highest, one, COUNT), 0)
            lowest_above = tl.minimum(lowest_above, tl.where(above, key, _HIGHEST_KEY))
            highest_below = tl.maximum(highest_below, tl.where(live & ~above, key, _LOWEST_KEY))
        if tl.sum(weights, axis=0) >= need:
            low = tl.min(lowest_above, axis=0)
        else:
            high = tl.maximum(tl.max(highest_below, axis=0), low)
    return low


@direct
@triton.jit
def _keep_top_kernel(
    scores_ptr,
    peaks_ptr,
    plan_ptr,
    candidates_ptr,
    out_ptr,
    stride_b,
    stride_v,
    num_scores,
    num_peaks,
    share,
    one,
    fill,
    COUNT: tl.constexpr,
    MASS: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
    PEAKS: tl.constexpr,
):
    # Find the threshold among the candidates; write a block.
    wait_for_previous(EARLY)
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    mask = index < num_scores
    score = tl.load(scores_ptr + row * stride_b + index * stride_v, mask=mask, other=0.0)
    highest = highest_of(peaks_ptr + row * tl.num_programs(1) * PEAKS, num_peaks)
    need = tl.load(plan_ptr + row * _PLAN + _NEED)
    number = tl.load(plan_ptr + row * _PLAN + _CANDIDATES).to(tl.int32)
    candidates_ptr += row * num_scores
    low = tl.full((), _LOWEST_KEY, tl.int64)
    low = _threshold(candidates_ptr, number, need, low, highest, one, COUNT)
    if COUNT:
        low = tl.where((low >> 32) == _HIGHEST_RANK, _LOWEST_KEY, low)  # nothing is below NaN
    if COUNT and MASS:
        low = (low >> 32) << 32  # all that are equal
        weights = tl.zeros((_CHUNK,), tl.int64)
        top = tl.full((_CHUNK,), _LOWEST_KEY, tl.int64)
        for start in range(0, number, _CHUNK):
            offs = start + tl.arange(0, _CHUNK)
            key = tl.load(candidates_ptr + offs, mask=offs < number, other=_LOWEST_KEY)
            weight = _weight_of(_score_of(key), highest, one, False)
            weights += tl.where((offs < number) & (key >= low), weight, 0)
            top = tl.maximum(top, key)
        need = _need_of(tl.sum(weights, axis=0), share)
        # With infinity or NaN all that are left stay.
        need = tl.where(tl.max(top, axis=0) < _INFINITE_KEY, need, 0)
        low = _threshold(candidates_ptr, number, need, low, highest, one, False)
    kept = tl.where(_key_of(score, index, MASS) >= low, score, fill)
    tl.store(out_ptr + row * num_scores + index, kept, mask=mask)


def keep_top(
    scores: Tensor, *, count: int | None = None, mass: float | None = None, fill: float = -math.inf
) -> Tensor:
    """Keep the highest scores of every row: so many, and then so much of their probability.

    Args:
        scores: `[B, V]` float32, any strides, V >= 1.
        count: How many; as many as there are if these are fewer. All that equal the last stay too.
        mass: How much: scores stay if those above them hold less than this share of the softmax, in
            [0, 1]. Of equal scores the last ones count as the higher ones. The highest always
            stays, and a row with NaN or infinity, or without a number, stays as it is.
        fill: What the others are replaced by.

    Returns:
        `[B, V]` float32, contiguous.

    Raises:
        ValueError: `scores` has another shape or dtype, neither `count` nor `mass` is given, or one
            is out of range.
    """
    check_scores(scores)
    if count is None and mass is None:
        raise ValueError("expected count or mass, got neither")
    if count is not None and count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    if mass is not None and not 0 <= mass <= 1:
        raise ValueError(f"mass: expected a number in [0, 1], got {mass}")
    if count is not None and mass is not None and (count > _CHUNK.value or fill != -math.inf):
        # Too many candidates, or what was removed takes part again.
        return keep_top(keep_top(scores, count=count, fill=fill), mass=mass, fill=fill)
    batch_size, num_scores = scores.shape
    out = torch.empty(batch_size, num_scores, device=scores.device)
    if batch_size == 0:
        return out
    has_count, has_mass = count is not None, mass is not None
    group, count = BLOCK, min(count or 0, num_scores)
    while group > _SMALLEST_GROUP and cdiv(num_scores, group) < count:
        group //= 2
    # The share of the softmax that may go, as transformers compares it: in float32.
    share = 1.0 if mass is None else c_float(1 - mass).value
    # What lies further below the highest score holds less than that in all.
    span = min(math.log(num_scores / share), _LARGEST_SPAN) if share > 0 else _LARGEST_SPAN
    span = max(span, 1.0)
    one = 2.0 ** (62 - num_scores.bit_length())  # no sum leaves 63 bits
    num_blocks = cdiv(num_scores, BLOCK)
    num_peaks = cdiv(num_scores, group)
    peaks = out.new_empty(batch_size, num_blocks, BLOCK // group)
    lows = out.new_empty(batch_size, num_blocks)
    plan = torch.empty(batch_size, _PLAN.value, dtype=torch.int64, device=scores.device)
    candidates = torch.empty(batch_size, num_scores, dtype=torch.int64, device=scores.device)
    grid = (batch_size, num_blocks)
    early = launch_options(scores.device, batch_size)
    options = {
        "COUNT": has_count,
        **early,
        "BLOCK": BLOCK,
        "PEAKS": BLOCK // group,
        "num_warps": 8,
    }
    given, limits = (*scores.stride(), num_scores), (num_peaks, count, span)
    with torch.cuda.device_of(scores):
        write_peaks(scores, peaks, early, lows=lows if has_count else None, emptied=plan)
        _weigh_kernel[grid](scores, peaks, lows, plan, *given, *limits, one, **options)
        options["MASS"] = has_mass
        _gather_kernel[grid](
            scores, peaks, lows, plan, candidates, *given, *limits, share, **options
        )
        _keep_top_kernel[grid](
            scores, peaks, plan, candidates, out, *given, num_peaks, share, one, float(fill),
            **options,
        )  # fmt: skip
    return out
