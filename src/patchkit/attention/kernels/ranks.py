"""Ranks of slots, and the search for a threshold among them; what `select_top` is made of.

Every live slot gets a rank, its score as an integer of the same order; of equal ranks the higher
position wins. The search narrows an interval of ranks to a third of it at a time, by counting how
many reach two numbers inside, until as many reach its lower end as are asked for. Where slots of
one rank are left to choose from, it goes on with their positions, which differ.
"""

from __future__ import annotations

import triton
import triton.language as tl

# No slot has one of these ranks: below all, and above all.
LOWEST_INT = tl.constexpr(-(2**31))
_HIGHEST_INT = tl.constexpr(2**31 - 1)
_SINK = tl.constexpr(2**31 - 2)
_RECENT = tl.constexpr(2**31 - 3)
# Ranks of numbers are at least that of -3.4e38 and less than that of infinity.
FINITE = tl.constexpr(-0x7F800000)
INFINITE = tl.constexpr(0x7F800000)
_NEGATIVE_ZERO = tl.constexpr(-(2**31))


@triton.jit
def load_ranks(
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
        rank = position + FINITE
    rank = tl.where(position >= seen - recent, _RECENT, rank)
    return tl.where(slot < num_sinks, _SINK, rank)


@triton.jit
def block_of_ranks(held, rank_ptr, slot, length, HELD: tl.constexpr):
    """Return the ranks of a block, `held` or those at `rank_ptr`, `LOWEST_INT` past `length`."""
    return held if HELD else tl.load(rank_ptr + slot, mask=slot < length, other=LOWEST_INT)


@triton.jit
def _block_of_values(
    held, rank_ptr, position_ptr, stride_ps, slot, length, tied, HELD: tl.constexpr,
    TIES: tl.constexpr,
):  # fmt: skip
    """Return the ranks of a block, or the positions where these are `tied`; elsewhere nothing."""
    rank = block_of_ranks(held, rank_ptr, slot, length, HELD)
    if TIES:
        offset = slot.to(tl.int64) * stride_ps
        return tl.load(position_ptr + offset, mask=rank == tied, other=LOWEST_INT)
    else:
        return rank


@triton.jit
def _narrow(
    held, rank_ptr, position_ptr, stride_ps, length, tied, inside, need, HELD: tl.constexpr,
    TIES: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Return a number that `need` of the `inside` values reach, or more if these are all equal.

    Also how many reach it and how many are above it.
    """
    offs = tl.arange(0, BLOCK_S)
    low = tl.full((BLOCK_S,), _HIGHEST_INT, tl.int32)
    high = tl.full((BLOCK_S,), LOWEST_INT, tl.int32)
    protected = tl.zeros((BLOCK_S,), tl.int32)
    for start in range(0, BLOCK_S if HELD else length, BLOCK_S):
        value = _block_of_values(
            held, rank_ptr, position_ptr, stride_ps, start + offs, length, tied, HELD, TIES
        )
        there = value > LOWEST_INT
        if not TIES:  # ranks of protected slots lie far above scores: search on one side only
            protected += (value >= _RECENT).to(tl.int32)
            there &= value < _RECENT
        low = tl.minimum(low, tl.where(there, value, _HIGHEST_INT))
        high = tl.maximum(high, tl.where(there, value, LOWEST_INT))
    lowest, highest = tl.min(low, axis=0), tl.max(high, axis=0)
    above = tl.sum(protected, axis=0)
    if above >= need:
        lowest, highest = tl.full((), _RECENT, tl.int32), tl.full((), _SINK, tl.int32)
        inside, above = above, tl.full((), 0, tl.int32)

    while (inside > need) & (lowest < highest):
        third = ((highest - lowest).to(tl.uint32, bitcast=True) // 3 + 1).to(tl.int32)
        first = lowest + third  # at most `highest`
        second = first + third  # at most one more
        reach_first = tl.zeros((BLOCK_S,), tl.int32)
        reach_second = tl.zeros((BLOCK_S,), tl.int32)
        for start in range(0, BLOCK_S if HELD else length, BLOCK_S):
            value = _block_of_values(
                held, rank_ptr, position_ptr, stride_ps, start + offs, length, tied, HELD, TIES
            )
            reach_first += (value >= first).to(tl.int32)
            reach_second += (value >= second).to(tl.int32)
        if HELD:  # both in one sum
            both = tl.sum(reach_first + (reach_second << 16), axis=0)
            num_first, num_second = both & 0xFFFF, (both >> 16) & 0xFFFF
        else:
            num_first, num_second = tl.sum(reach_first, axis=0), tl.sum(reach_second, axis=0)
        if num_second >= need:
            lowest, inside = second, num_second
        elif num_first >= need:
            lowest, highest, inside, above = first, second - 1, num_first, num_second
        else:
            highest, above = first - 1, num_first
    return lowest, inside, above


@triton.jit
def threshold(
    held, rank_ptr, position_ptr, stride_ps, length, need, HELD: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Return rank and position that the `need` best of `length` slots reach; see `reaches`.

    Their ranks are `held [BLOCK_S]`, then `BLOCK_S` is at most 2**15, or at `rank_ptr`.
    """
    rank, inside, above = _narrow(
        held, rank_ptr, position_ptr, stride_ps, length, 0, length, need, HELD, False, BLOCK_S
    )
    position = tl.full((), 0, tl.int32)
    if inside > need:
        position, _, _ = _narrow(
            held, rank_ptr, position_ptr, stride_ps, length, rank, inside - above, need - above,
            HELD, True, BLOCK_S,
        )  # fmt: skip
    return tl.where(need > 0, rank, _HIGHEST_INT), position


@triton.jit
def reaches(rank, position_ptr, stride_ps, slot, rank_bound, position_bound):
    """Say which slots lie above a rank, or have it and a position that is not below the bound."""
    tied = rank == rank_bound
    if position_bound > 0:
        offset = slot.to(tl.int64) * stride_ps
        tied &= tl.load(position_ptr + offset, mask=tied, other=0) >= position_bound
    return (rank > rank_bound) | tied
