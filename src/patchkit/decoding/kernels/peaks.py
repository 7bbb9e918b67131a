"""Triton kernel that finds the highest scores of blocks, which other operations start from.

Bytes floor: the scores once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkit.dependent_launch import wait_for_previous
from patchkit.direct_launch import direct
from patchkit.launch_sizes import cdiv, next_power_of_2

__all__ = ["BLOCK", "check_scores", "highest_of", "highest_scores", "write_peaks"]

BLOCK = 2048

_INFINITY = tl.constexpr(float("inf"))


@direct
@triton.jit
def _peaks_kernel(
    scores_ptr,
    peaks_ptr,
    lows_ptr,
    emptied_ptr,
    stride_b,
    stride_v,
    num_scores,
    FINITE: tl.constexpr,
    EMPTIED: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_EMPTIED: tl.constexpr,
    PEAKS: tl.constexpr,
):
    # One program: a block of the scores of a row. Block 0 also empties its EMPTIED numbers.
    wait_for_previous(EARLY)
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_blocks = tl.num_programs(1)
    index = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    mask = index < num_scores
    score = tl.load(scores_ptr + row * stride_b + index * stride_v, mask=mask, other=-_INFINITY)
    if FINITE:
        finite = tl.abs(score) < _INFINITY
        lowest = tl.min(tl.where(finite, score, _INFINITY), axis=0)
        tl.store(lows_ptr + row * num_blocks + block, lowest)
        score = tl.where(finite, score, -_INFINITY)
    else:
        score = tl.where(score != score, _INFINITY, score)
    peaks = tl.max(tl.reshape(score, (PEAKS, BLOCK // PEAKS)), axis=1)
    offs = (row * num_blocks + block) * PEAKS + tl.arange(0, PEAKS)
    tl.store(peaks_ptr + offs, peaks)
    if EMPTIED > 0 and block == 0:
        number = tl.arange(0, BLOCK_EMPTIED)
        zero = tl.zeros((BLOCK_EMPTIED,), tl.int64)
        tl.store(emptied_ptr + row * EMPTIED + number, zero, mask=number < EMPTIED)


@triton.jit
def highest_of(peaks_ptr, num_peaks):
    """Return the highest of `num_peaks` numbers, none of which is NaN."""
    highest = tl.full((128,), -_INFINITY, tl.float32)
    for start in range(0, num_peaks, 128):
        offs = start + tl.arange(0, 128)
        peak = tl.load(peaks_ptr + offs, mask=offs < num_peaks, other=-_INFINITY)
        highest = tl.maximum(highest, peak)
    return tl.max(highest, axis=0)


def check_scores(scores: Tensor) -> None:
    """Raise ValueError unless `scores` are `[B, V]` float32 with V >= 1."""
    if scores.ndim != 2 or scores.shape[1] == 0 or scores.dtype != torch.float32:
        raise ValueError(
            f"scores: expected float32 [B, V] with V >= 1, got {scores.dtype} {list(scores.shape)}"
        )


def write_peaks(
    scores: Tensor,
    peaks: Tensor,
    early: dict[str, bool],
    *,
    lows: Tensor | None = None,
    emptied: Tensor | None = None,
) -> None:
    """Write the highest score of every group of a block.

    NaN counts as infinity, or with `lows` as no score, and so does infinity then.

    Args:
        scores: `[B, V]` float32, any strides.
        peaks: `[B, blocks, groups]` float32 contiguous, of `BLOCK` scores each, whose groups are
            equally many scores. Written.
        early: What `launch_options` says.
        lows: `[B, blocks]` float32 contiguous. Written: the lowest finite score of every block.
        emptied: `[B, N]` int64 contiguous. Written: zeros.
    """
    size = 0 if emptied is None else emptied.shape[1]
    _peaks_kernel[peaks.shape[:2]](
        scores,
        peaks,
        peaks if lows is None else lows,
        peaks if emptied is None else emptied,
        *scores.stride(),
        scores.shape[1],
        FINITE=lows is not None,
        EMPTIED=size,
        **early,
        BLOCK=BLOCK,
        BLOCK_EMPTIED=next_power_of_2(max(size, 1)),
        PEAKS=peaks.shape[2],
        num_warps=8,
    )


def highest_scores(scores: Tensor, early: dict[str, bool]) -> Tensor:
    """Return the highest score of every block of `scores [B, V]`, `[B, blocks]` float32.

    NaN counts as infinity.
    """
    blocks = (scores.shape[0], cdiv(scores.shape[1], BLOCK))
    peaks = torch.empty(blocks, device=scores.device)
    write_peaks(scores, peaks[..., None], early)
    return peaks
