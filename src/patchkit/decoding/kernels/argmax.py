"""Triton argmax over a vocabulary; see `reference.argmax`.

Bytes floor: the scores once. torch reduces a row by one program, which takes ten times as long for
a single row of 128,000 scores. Here programs of a row each reduce a block, then one the results.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkit.dependent_launch import launch_options, wait_for_previous
from patchkit.direct_launch import direct
from patchkit.launch_sizes import cdiv

__all__ = ["argmax"]

_BLOCK = 2048
_LOWEST_KEY = tl.constexpr(-(2**63))
_HIGHEST_RANK = tl.constexpr(2**31 - 1)
_NEGATIVE_ZERO = tl.constexpr(-(2**31))
_INDICES = tl.constexpr(2**32 - 1)


@triton.jit
def ascending(score):
    """Return an int32 of the same order for every float32. Zeros are equal, NaN is above all."""
    bits = score.to(tl.int32, bitcast=True)
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats ascend as integers descend
    rank = tl.where(bits == _NEGATIVE_ZERO, 0, rank)
    return tl.where(score != score, _HIGHEST_RANK, rank)


@triton.jit
def argmax_key(score, index, mask):
    """Return one 64-bit key per score: an integer of the same order, then its index, inverted."""
    key = (ascending(score).to(tl.int64) << 32) + (index ^ _INDICES)
    return tl.where(mask, key, _LOWEST_KEY)


@direct
@triton.jit
def _argmax_kernel(
    scores_ptr, keys_ptr, stride_b, stride_v, num_scores, EARLY: tl.constexpr, BLOCK: tl.constexpr
):
    wait_for_previous(EARLY)
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    mask = index < num_scores
    score = tl.load(scores_ptr + row * stride_b + index * stride_v, mask=mask, other=0.0)
    key = argmax_key(score.to(tl.float32), index, mask)
    tl.store(keys_ptr + row * tl.num_programs(1) + block, tl.max(key, axis=0))


@direct
@triton.jit
def best_block_kernel(keys_ptr, out_ptr, num_blocks, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    wait_for_previous(EARLY)
    row = tl.program_id(0).to(tl.int64)
    best = tl.full((BLOCK,), _LOWEST_KEY, tl.int64)
    for start in range(0, num_blocks, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        key = tl.load(keys_ptr + row * num_blocks + offs, mask=offs < num_blocks, other=_LOWEST_KEY)
        best = tl.maximum(best, key)
    tl.store(out_ptr + row, (tl.max(best, axis=0) & _INDICES) ^ _INDICES)


def argmax(scores: Tensor) -> Tensor:
    """Return the place of the highest score of every row, of several the first.

    Args:
        scores: `[B, V]` float32/float16/bfloat16, any strides, V >= 1. NaN is above all numbers.

    Returns:
        `[B]` int64.

    Raises:
        ValueError: `scores` has another shape or dtype.
    """
    if scores.ndim != 2 or scores.shape[1] == 0 or scores.dtype.itemsize > 4:
        raise ValueError(
            f"scores: expected [B, V] with V >= 1 and at most 32 bits, got {scores.dtype} "
            f"{list(scores.shape)}"
        )
    batch_size, num_scores = scores.shape
    out = torch.empty(batch_size, dtype=torch.int64, device=scores.device)
    if batch_size == 0:
        return out
    num_blocks = cdiv(num_scores, _BLOCK)
    keys = torch.empty(batch_size, num_blocks, dtype=torch.int64, device=scores.device)
    early = launch_options(scores.device, batch_size)
    with torch.cuda.device_of(scores):
        _argmax_kernel[(batch_size, num_blocks)](
            scores, keys, *scores.stride(), num_scores, **early, BLOCK=_BLOCK, num_warps=8
        )
        best_block_kernel[(batch_size,)](keys, out, num_blocks, **early, BLOCK=128)
    return out
