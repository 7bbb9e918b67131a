"""Wave, gate and bias on the logits in one launch; every changing input lives on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkit.direct_launch import direct
from patchkit.launch_sizes import next_power_of_2


@direct
@triton.jit(do_not_specialize=["period", "num_tokens", "stride_lb", "stride_rb"])
def _logit_wave_kernel(
    logits_ptr,
    token_ids_ptr,
    step_ptr,
    ended_ptr,
    windows_ptr,
    recent_ptr,
    end_ids_ptr,
    stride_lb,
    stride_lv,
    stride_rb,
    stride_rm,
    stride_step,
    num_tokens,
    amplitude,
    period,
    shift,
    NUM_WINDOWS: tl.constexpr,
    NUM_END: tl.constexpr,
    HAS_WAVE: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    step = tl.load(step_ptr + row * stride_step)

    thinking = tl.load(ended_ptr + row) == 0
    if NUM_END > 0:
        missed = 0
        for i in tl.static_range(NUM_END):
            token = tl.load(recent_ptr + row * stride_rb + i * stride_rm)
            missed += (token != tl.load(end_ids_ptr + i)).to(tl.int32)
        thinking = thinking & (missed > 0)
        tl.store(ended_ptr + row, 1 - thinking.to(tl.int8))

    # A row is skipped by letting it have no tokens.
    num_active = tl.where(thinking, num_tokens, 0)
    if NUM_WINDOWS > 0:
        hits = 0
        for i in tl.static_range(NUM_WINDOWS):
            start = tl.load(windows_ptr + 2 * i)
            end = tl.load(windows_ptr + 2 * i + 1)
            hits += ((step >= start) & (step < end)).to(tl.int32)
        num_active = tl.where(hits > 0, num_active, 0)

    bias = amplitude
    if HAS_WAVE:
        # The step is reduced as an integer: in float32 it would lose its low digits.
        cycle = (step % period).to(tl.float32) + shift
        cycle = tl.where(cycle >= period, cycle - period, cycle)
        shifted = cycle / period + 0.25
        bias = amplitude * (1 - 4 * tl.abs((shifted - tl.floor(shifted)) - 0.5))

    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < num_active
    columns = tl.load(token_ids_ptr + offs_r, mask=mask_r, other=0).to(tl.int64)
    ptrs = logits_ptr + row * stride_lb + columns * stride_lv
    logits = tl.load(ptrs, mask=mask_r, other=0.0).to(tl.float32)
    tl.store(ptrs, (logits + bias).to(logits_ptr.dtype.element_ty), mask=mask_r)


def logit_wave(
    logits: Tensor,
    token_ids: Tensor,
    step: Tensor,
    ended: Tensor,
    *,
    amplitude: float,
    period: int | None,
    phase: float = 0.0,
    windows: Tensor | None = None,
    recent: Tensor | None = None,
    end_ids: Tensor | None = None,
) -> Tensor:
    """Add a bias to a few columns of the logits, in place, in rows that are still thinking.

    One launch, one program per row, no wait for the device: fit for a captured decoding step, in
    which `step`, `ended` and `recent` are buffers at fixed addresses. Arguments and result are
    those of `patchkit.decoding.reference.logit_wave`.

    Raises:
        ValueError: shapes or dtypes disagree, or the logits require grad.
    """
    _check(logits, token_ids, step, ended, windows, recent, end_ids)
    batch_size = logits.shape[0]
    if batch_size == 0:
        return logits
    num_end = 0 if end_ids is None else end_ids.numel()
    cycle = 1 if period is None else period
    _logit_wave_kernel[(batch_size,)](
        logits,
        token_ids.contiguous(),
        step,
        ended.view(torch.int8),
        None if windows is None else windows.contiguous(),
        recent,
        None if end_ids is None else end_ids.contiguous(),
        logits.stride(0),
        logits.stride(1),
        0 if recent is None else recent.stride(0),
        0 if recent is None else recent.stride(1),
        step.stride(0) if step.numel() > 1 else 0,
        token_ids.numel(),
        float(amplitude),
        cycle,
        phase % 1.0 * cycle,
        NUM_WINDOWS=0 if windows is None else windows.shape[0],
        NUM_END=num_end,
        HAS_WAVE=period is not None,
        BLOCK_R=next_power_of_2(token_ids.numel()),
        num_warps=1,
    )
    return logits


def _check(
    logits: Tensor,
    token_ids: Tensor,
    step: Tensor,
    ended: Tensor,
    windows: Tensor | None,
    recent: Tensor | None,
    end_ids: Tensor | None,
) -> None:
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating-point [B, V], got {_describe(logits)}")
    if logits.requires_grad:
        raise ValueError("logit_wave works in place and has no backward pass: detach the logits")
    batch_size = logits.shape[0]
    if token_ids.ndim != 1 or token_ids.numel() == 0:
        raise ValueError(f"token_ids must be [R] with R >= 1, got {_describe(token_ids)}")
    if step.shape not in {(1,), (batch_size,)}:
        raise ValueError(f"step must be [{batch_size}] or [1], got {_describe(step)}")
    flag = ended.dtype in (torch.bool, torch.int8) and ended.is_contiguous()
    if ended.shape != (batch_size,) or not flag:
        raise ValueError(
            f"ended must be contiguous bool or int8 [{batch_size}], got {_describe(ended)}"
        )
    if windows is not None and (
        windows.ndim != 2 or windows.shape[0] == 0 or windows.shape[1] != 2
    ):
        raise ValueError(f"windows must be [W, 2] with W >= 1, got {_describe(windows)}")
    if (recent is None) != (end_ids is None):
        raise ValueError("recent and end_ids belong together, got only one of them")
    if recent is not None and end_ids is not None and recent.shape != (batch_size, *end_ids.shape):
        raise ValueError(
            f"recent must be [{batch_size}, m] for end_ids [m], got {_describe(recent)} "
            f"and {_describe(end_ids)}"
        )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
