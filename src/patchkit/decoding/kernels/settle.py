"""Triton kernel that writes chosen tokens and finds which rows have ended; see `reference.settle`.

A dozen operations on a few numbers, each a launch in eager PyTorch, in one program. What the host
is to know of them goes straight to its memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkit.dependent_launch import launch_options, wait_for_previous
from patchkit.direct_launch import direct
from patchkit.launch_sizes import next_power_of_2

__all__ = ["settle"]


@direct
@triton.jit
def _settle_kernel(
    chosen_ptr,
    token_ptr,
    ids_ptr,
    column_ptr,
    unfinished_ptr,
    sound_ptr,
    posted_ptr,
    pad_ptr,
    ends_ptr,
    stride_ids,
    num_rows,
    num_posts,
    num_ends,
    HAS_PAD: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    wait_for_previous(EARLY)
    column = tl.load(column_ptr)
    posted_ptr += column % num_posts * (num_rows + 2)
    alive = tl.full((), 0, tl.int32)
    for first in range(0, num_rows, BLOCK_B):
        row = first + tl.arange(0, BLOCK_B)
        mask = row < num_rows
        unfinished = tl.load(unfinished_ptr + row, mask=mask, other=0).to(tl.int32)
        token = tl.load(chosen_ptr + row, mask=mask, other=0)
        if HAS_PAD:
            token = tl.where(unfinished != 0, token, tl.load(pad_ptr))
        tl.store(token_ptr + row, token, mask=mask)
        tl.store(ids_ptr + row.to(tl.int64) * stride_ids + column, token, mask=mask)
        tl.store(posted_ptr + 2 + row, token, mask=mask)
        for start in range(0, num_ends, BLOCK_E):
            offs = start + tl.arange(0, BLOCK_E)
            mask_e = (offs < num_ends)[None, :]
            end = tl.load(ends_ptr + offs, mask=offs < num_ends, other=0)
            ended = tl.max((mask_e & (token[:, None] == end[None, :])).to(tl.int32), axis=1)
            unfinished = unfinished & (1 - ended)
        tl.store(unfinished_ptr + row, unfinished.to(tl.int8), mask=mask)
        alive = tl.maximum(alive, tl.max(unfinished, axis=0))
    tl.debug_barrier()  # every warp has loaded the column
    tl.store(column_ptr, column + 1)
    tl.store(posted_ptr, alive.to(tl.int64))
    tl.store(posted_ptr + 1, tl.load(sound_ptr).to(tl.int64))


def settle(
    chosen: Tensor,
    token: Tensor,
    ids: Tensor,
    column: Tensor,
    unfinished: Tensor,
    sound: Tensor,
    posted: Tensor,
    pad: Tensor | None = None,
    ends: Tensor | None = None,
) -> None:
    """Write the tokens that were chosen, note which rows they end, and post both to the host.

    Args:
        chosen: `[B]` int64, contiguous.
        token: `[B, 1]` int64, contiguous. Written: `chosen`, or `pad` in rows that were finished.
        ids: `[B, W]` int64, last stride 1. Written at `column`, which is not checked.
        column: `[1]` int64. Grows by one.
        unfinished: `[B]` bool, contiguous. False from now on in rows whose token is an end.
        sound: `[]` bool. Posted.
        posted: `[S, B + 2]` int64, contiguous, pinned memory of the host or on the device. Row
            `column % S` is written: whether any row is unfinished, `sound`, and the tokens.
        pad: `[]` or `[1]` int64. None: finished rows go on.
        ends: `[1, E]` or `[E]` int64, contiguous. None: no token ends a row.

    Raises:
        ValueError: Shapes, dtypes, devices or strides are others.
    """
    batch_size = chosen.shape[0]
    expected = {
        "chosen": (chosen, torch.int64, (batch_size,)),
        "token": (token, torch.int64, (batch_size, 1)),
        "column": (column, torch.int64, (1,)),
        "unfinished": (unfinished, torch.bool, (batch_size,)),
        "sound": (sound, torch.bool, ()),
        "pad": (pad, torch.int64, None),
        "ends": (ends, torch.int64, None),
    }
    for name, (tensor, dtype, shape) in expected.items():
        if tensor is None:
            continue
        right = tensor.dtype == dtype and tensor.is_contiguous() and tensor.device == ids.device
        if not right or (shape is not None and tensor.shape != shape):
            raise ValueError(
                f"{name}: expected contiguous {dtype} {'' if shape is None else list(shape)} on "
                f"{ids.device}, got {tensor.dtype} {list(tensor.shape)} on {tensor.device}, "
                f"strides {tensor.stride()}"
            )
    if ids.shape[:1] != (batch_size,) or ids.dtype != torch.int64 or ids.stride(1) != 1:
        raise ValueError(
            f"ids: expected int64 [{batch_size}, W] with last stride 1, got {ids.dtype} "
            f"{list(ids.shape)}, strides {ids.stride()}"
        )
    reached = posted.device == ids.device or posted.is_pinned()
    if not reached or posted.dtype != torch.int64 or not posted.is_contiguous():
        raise ValueError(
            f"posted: expected contiguous int64 on {ids.device} or in pinned memory, got "
            f"{posted.dtype} on {posted.device}, strides {posted.stride()}"
        )
    if posted.ndim != 2 or posted.shape[0] == 0 or posted.shape[1] != batch_size + 2:
        raise ValueError(f"posted: expected [S, {batch_size + 2}], got {list(posted.shape)}")
    num_ends = 0 if ends is None else ends.numel()
    with torch.cuda.device_of(chosen):
        _settle_kernel[(1,)](
            chosen,
            token,
            ids,
            column,
            unfinished.view(torch.int8),
            sound.view(torch.int8),
            posted,
            column if pad is None else pad,
            column if ends is None else ends,
            ids.stride(0),
            batch_size,
            posted.shape[0],
            num_ends,
            HAS_PAD=pad is not None,
            **launch_options(chosen.device, batch_size),
            BLOCK_B=min(next_power_of_2(max(batch_size, 1)), 128),
            BLOCK_E=min(next_power_of_2(max(num_ends, 1)), 16),
            num_warps=1,
        )
