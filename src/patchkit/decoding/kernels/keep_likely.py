"""Triton kernels that keep what is likely beside the best; see `reference.keep_likely`.

Two launches: the highest score of every block, then one program per block compares with them all.

Bytes floor: the scores once and the result once.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkit.decoding.kernels.peaks import BLOCK, check_scores, highest_of, highest_scores
from patchkit.dependent_launch import launch_options, wait_for_previous
from patchkit.direct_launch import direct
from patchkit.launch_sizes import cdiv

__all__ = ["keep_likely"]

_INFINITY = tl.constexpr(float("inf"))


@direct
@triton.jit
def _keep_likely_kernel(
    scores_ptr,
    peaks_ptr,
    out_ptr,
    stride_b,
    stride_v,
    num_scores,
    ratio,
    fill,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_previous(EARLY)
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    mask = index < num_scores
    score = tl.load(scores_ptr + row * stride_b + index * stride_v, mask=mask, other=0.0)
    highest = highest_of(peaks_ptr + row * tl.num_programs(1), tl.num_programs(1))
    removed = tl.exp(score - highest) < tl.where(highest < _INFINITY, ratio, 0.0)
    tl.store(out_ptr + row * num_scores + index, tl.where(removed, fill, score), mask=mask)


def keep_likely(scores: Tensor, *, ratio: float, fill: float = -math.inf) -> Tensor:
    """Keep the scores that are at least `ratio` times as probable as the highest of their row.

    Args:
        scores: `[B, V]` float32, any strides, V >= 1.
        ratio: In [0, 1]. A row with NaN or infinity, or without a number, stays as it is.
        fill: What the others are replaced by.

    Returns:
        `[B, V]` float32, contiguous.

    Raises:
        ValueError: `scores` has another shape or dtype, or `ratio` is out of range.
    """
    check_scores(scores)
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio: expected a number in [0, 1], got {ratio}")
    batch_size, num_scores = scores.shape
    out = torch.empty(batch_size, num_scores, device=scores.device)
    if batch_size == 0:
        return out
    early = launch_options(scores.device, batch_size)
    with torch.cuda.device_of(scores):
        peaks = highest_scores(scores, early)
        _keep_likely_kernel[(batch_size, cdiv(num_scores, BLOCK))](
            scores, peaks, out, *scores.stride(), num_scores, float(ratio), float(fill),
            **early, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    return out
