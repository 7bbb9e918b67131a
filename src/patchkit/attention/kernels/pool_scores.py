"""Triton average of scores over neighbours; see `reference.pool_scores`.

Bytes floor: `8 * B * H * live`, every live score read and written once. The neighbours of a slot
come from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkit.attention.kernels import check_arguments
from patchkit.dependent_launch import launch_options, wait_for_previous
from patchkit.direct_launch import direct
from patchkit.launch_sizes import cdiv

__all__ = ["pool_scores"]

_BLOCK = 256


@direct
@triton.jit
def _pool_scores_kernel(
    score_ptr, length_ptr, count_ptr, out_ptr,
    stride_cb, stride_ch, stride_cs, stride_lb, stride_lh, stride_nb,
    stride_ob, stride_oh, stride_os, lists_per_row, scale,
    EARLY: tl.constexpr, HAS_COUNT: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # One program: a block of slots of HEADS heads that share their scores.
    wait_for_previous(EARLY)
    b = (tl.program_id(0) // lists_per_row).to(tl.int64)
    h = (tl.program_id(0) % lists_per_row).to(tl.int64) * HEADS
    start = tl.program_id(1) * BLOCK
    length = tl.load(length_ptr + b * stride_lb + h * stride_lh)
    score_ptr += b * stride_cb + h * stride_ch
    out_ptr += b * stride_ob + h * stride_oh
    if start >= length:
        return
    if HAS_COUNT:
        scale /= tl.maximum(tl.load(count_ptr + b * stride_nb), 1)
    slot = (start + tl.arange(0, BLOCK)).to(tl.int64)
    live = slot < length
    total = tl.zeros((BLOCK,), tl.float32)
    for head in tl.static_range(HEADS):
        for neighbour in tl.static_range(WIDTH):
            source = slot + (neighbour - WIDTH // 2)
            mask = live if WIDTH == 1 else (source >= 0) & (source < length)
            total += tl.load(
                score_ptr + head * stride_ch + source * stride_cs, mask=mask, other=0.0
            )
    total *= scale / (HEADS * WIDTH)
    for head in tl.static_range(HEADS):
        tl.store(out_ptr + head * stride_oh + slot * stride_os, total, mask=live)


def pool_scores(
    score: Tensor,
    length: Tensor,
    out: Tensor,
    *,
    width: int = 1,
    scale: float = 1.0,
    count: Tensor | None = None,
    share: bool = False,
) -> None:
    """Average scores over neighbours, slots beyond the ends of a list counting as 0.

    `out[b, h, s] = scale / max(count[b], 1) * sum of score[b, h, t] / width`, over the live slots
    with `|t - s| <= width // 2`.

    Args:
        score: `[B, H, C]` float32.
        length: `[B, H]` int32.
        out: `[B, H, C]` float32. Written where slots are live. May be `score` if the width is 1.
        width: Slots averaged, odd.
        scale: Factor on the scores.
        count: `[B]` int32. None: 1.
        share: Give all heads of a row the mean of their results. Their lengths are equal then.

    Raises:
        ValueError: Shapes, dtypes or devices disagree, an input requires grad, or the width is not
            odd and positive.
    """
    shape = tuple(score.shape)
    check_arguments(
        score=(score, shape, torch.float32),
        length=(length, shape[:2], torch.int32),
        out=(out, shape, torch.float32),
        count=(count, shape[:1], torch.int32),
    )
    if width < 1 or width % 2 == 0:
        raise ValueError(f"expected an odd width, got {width}")
    if score.numel() == 0:
        return
    batch_size, num_heads, capacity = shape
    together = num_heads if share else 1
    lists_per_row = num_heads // together
    with torch.cuda.device_of(score):
        _pool_scores_kernel[(batch_size * lists_per_row, cdiv(capacity, _BLOCK))](
            score, length, length if count is None else count, out,
            *score.stride(), *length.stride(), 0 if count is None else count.stride(0),
            *out.stride(), lists_per_row, float(scale),
            **launch_options(score.device), HAS_COUNT=count is not None, HEADS=together,
            WIDTH=width, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
