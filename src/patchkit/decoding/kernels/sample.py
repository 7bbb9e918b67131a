"""Triton kernels that draw a token of every row; see `reference.sample`.

Three launches: the highest score of every block, the race of the block, and the best of the
blocks. The race needs no sum: which token leads it does not change if a row is scaled.

Bytes floor: scores and noise once. The scores are read twice, the second time from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkit.decoding.kernels.argmax import argmax_key, best_block_kernel
from patchkit.decoding.kernels.peaks import BLOCK, check_scores, highest_of, highest_scores
from patchkit.dependent_launch import launch_options, wait_for_previous
from patchkit.direct_launch import direct
from patchkit.launch_sizes import cdiv

__all__ = ["sample"]

_INFINITY = tl.constexpr(float("inf"))


@direct
@triton.jit
def _sample_kernel(
    scores_ptr,
    noise_ptr,
    peaks_ptr,
    keys_ptr,
    sound_ptr,
    stride_b,
    stride_v,
    num_scores,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_previous(EARLY)
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_blocks = tl.num_programs(1)
    index = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    mask = index < num_scores
    score = tl.load(scores_ptr + row * stride_b + index * stride_v, mask=mask, other=0.0)
    noise = tl.load(noise_ptr + row * num_scores + index, mask=mask, other=1.0)
    highest = highest_of(peaks_ptr + row * num_blocks, num_blocks)
    race = tl.div_rn(tl.exp(score - highest), noise)
    tl.store(keys_ptr + row * num_blocks + block, tl.max(argmax_key(race, index, mask), axis=0))
    broken = tl.abs(highest) == _INFINITY  # NaN counts as infinity
    tl.store(sound_ptr, tl.zeros((), tl.int8), mask=broken & (block == 0))


def sample(scores: Tensor, noise: Tensor, sound: Tensor) -> Tensor:
    """Draw a token of every row by a race of exponential variables, as `torch.multinomial` does.

    Args:
        scores: `[B, V]` float32, any strides, V >= 1.
        noise: `[B, V]` float32, contiguous, drawn by `exponential_(1)`.
        sound: `[]` bool. Written: False if any probability is not a number; otherwise it stays.

    Returns:
        `[B]` int64. Any token if a probability of the row is not a number.

    Raises:
        ValueError: Shapes, dtypes, devices or strides are others.
    """
    check_scores(scores)
    if (
        noise.shape != scores.shape
        or noise.dtype != torch.float32
        or not noise.is_contiguous()
        or noise.device != scores.device
    ):
        raise ValueError(
            f"noise: expected contiguous float32 {list(scores.shape)} on {scores.device}, got "
            f"{noise.dtype} {list(noise.shape)} on {noise.device}, strides {noise.stride()}"
        )
    if sound.shape != () or sound.dtype != torch.bool or sound.device != scores.device:
        raise ValueError(
            f"sound: expected bool [] on {scores.device}, got {sound.dtype} {list(sound.shape)} "
            f"on {sound.device}"
        )
    batch_size, num_scores = scores.shape
    chosen = torch.empty(batch_size, dtype=torch.int64, device=scores.device)
    if batch_size == 0:
        return chosen
    num_blocks = cdiv(num_scores, BLOCK)
    keys = torch.empty(batch_size, num_blocks, dtype=torch.int64, device=scores.device)
    early = launch_options(scores.device, batch_size)
    with torch.cuda.device_of(scores):
        peaks = highest_scores(scores, early)
        _sample_kernel[(batch_size, num_blocks)](
            scores, noise, peaks, keys, sound.view(torch.int8), *scores.stride(), num_scores,
            **early, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
        best_block_kernel[(batch_size,)](keys, chosen, num_blocks, **early, BLOCK=128)
    return chosen
