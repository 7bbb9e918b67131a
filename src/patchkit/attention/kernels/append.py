"""Triton kernel that stores new tokens in the slots of a KV store; see `reference.append`.

Bytes floor: `2 * B * H * T * (D + D_v)` elements (read the new tokens, write the slots) plus
`4 * B * H * T` bytes of positions. At T = 1 that is microseconds, so one launch does everything.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkit.attention.kernels import check_arguments, first_slot, starts
from patchkit.dependent_launch import launch_options, wait_for_previous
from patchkit.direct_launch import direct
from patchkit.launch_sizes import cdiv, next_power_of_2

__all__ = ["append"]

_MAX_BLOCK_T = 32


@direct
@triton.jit
def _append_kernel(
    keys_ptr,
    values_ptr,
    position_ptr,
    length_ptr,
    seen_ptr,
    new_keys_ptr,
    new_values_ptr,
    valid_ptr,
    list_start_ptr,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_pb,
    stride_ph,
    stride_ps,
    stride_lb,
    stride_lh,
    stride_sb,
    stride_sh,
    stride_nkb,
    stride_nkh,
    stride_nkt,
    stride_nvb,
    stride_nvh,
    stride_nvt,
    stride_mb,
    stride_mt,
    num_heads,
    num_tokens,
    D: tl.constexpr,
    D_V: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_LIST_START: tl.constexpr,
    UPDATE: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SCAN: tl.constexpr,
):
    wait_for_previous(EARLY)
    b = (tl.program_id(0) // num_heads).to(tl.int64)
    h = (tl.program_id(0) % num_heads).to(tl.int64)
    first = tl.program_id(1) * BLOCK_T
    offs_t = first + tl.arange(0, BLOCK_T)
    mask_t = offs_t < num_tokens
    length_ptr += b * stride_lb + h * stride_lh
    seen_ptr += b * stride_sb + h * stride_sh
    length = tl.load(length_ptr)
    seen = tl.load(seen_ptr)

    if HAS_VALID:
        valid_ptr += b * stride_mb
        before = 0
        for start in range(0, first, BLOCK_SCAN):
            offs = start + tl.arange(0, BLOCK_SCAN)
            earlier = tl.load(valid_ptr + offs * stride_mt, mask=offs < first, other=0)
            before += tl.sum(earlier.to(tl.int32), axis=0)
        valid = tl.load(valid_ptr + offs_t * stride_mt, mask=mask_t, other=0).to(tl.int32)
        count = tl.sum(valid, axis=0)
        rank = before + tl.cumsum(valid, axis=0) - valid
        mask_t = mask_t & (valid != 0)
    else:
        count = num_tokens
        rank = offs_t

    slot = first_slot(list_start_ptr, tl.program_id(0), HAS_LIST_START) + length + rank  # [BLOCK_T]
    token = offs_t.to(tl.int64)
    new_keys_ptr += b * stride_nkb + h * stride_nkh
    new_values_ptr += b * stride_nvb + h * stride_nvh
    keys_ptr += b * stride_kb + h * stride_kh
    values_ptr += b * stride_vb + h * stride_vh
    for start in tl.static_range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask = mask_t[:, None] & (offs_d < D)[None, :]
        row = tl.load(new_keys_ptr + token[:, None] * stride_nkt + offs_d[None, :], mask=mask)
        tl.store(keys_ptr + slot[:, None] * stride_ks + offs_d[None, :], row, mask=mask)
    for start in tl.static_range(0, D_V, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask = mask_t[:, None] & (offs_d < D_V)[None, :]
        row = tl.load(new_values_ptr + token[:, None] * stride_nvt + offs_d[None, :], mask=mask)
        tl.store(values_ptr + slot[:, None] * stride_vs + offs_d[None, :], row, mask=mask)
    position_ptr += b * stride_pb + h * stride_ph
    tl.store(position_ptr + slot * stride_ps, seen + offs_t, mask=mask_t)

    if UPDATE:
        # Every warp loads the counters; none may load them after the first one stored.
        tl.debug_barrier()
        tl.store(length_ptr, length + count)
        tl.store(seen_ptr, seen + num_tokens)


def append(
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    length: Tensor,
    seen: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    valid: Tensor | None = None,
    start: int | None = None,
    list_start: Tensor | None = None,
) -> None:
    """Store the tokens of one forward pass behind the live slots of every list.

    Token t of row b goes to slot `length[b, h]` + (valid tokens before t in row b) and gets
    position `seen[b, h] + t`. Then `length` grows by the number of valid tokens and `seen` by T.
    The caller guarantees the capacity: slot numbers are not checked. Up to 32 tokens take one
    launch; more are written by tiles in parallel and the counters follow in launches of their own.

    Args:
        keys: `[B, H, C, D]`, float32/float16/bfloat16, last stride 1. Changed in place.
        values: `[B, H, C, D_v]`, as `keys`. Changed in place.
        position: `[B, H, C]` int32. Changed in place.
        length: `[B, H]` int32. Changed in place.
        seen: `[B, H]` int32. Changed in place.
        new_keys: `[B, H, T, D]`, as `keys`.
        new_values: `[B, H, T, D_v]`, as `keys`.
        valid: `[B, T]` bool, False for padding, which consumes a column but no slot. None: all.
        start: Not used: a captured launch must read `length` on the device.
        list_start: `[B, H]` int32 contiguous, first slot of each list where those of a row share
            C slots (and `keys`, ... are expanded over H). None: each has C slots of its own.

    Raises:
        ValueError: Shapes, dtypes, devices or strides disagree, or an input requires grad.
    """
    batch_size, num_heads, capacity, head_dim = keys.shape
    num_tokens, value_dim = new_keys.shape[2], values.shape[-1]
    lists, dtype, int32 = (batch_size, num_heads), keys.dtype, torch.int32
    check_arguments(
        keys=(keys, (*lists, capacity, head_dim), dtype),
        values=(values, (*lists, capacity, value_dim), dtype),
        position=(position, (*lists, capacity), int32),
        length=(length, lists, int32),
        seen=(seen, lists, int32),
        new_keys=(new_keys, (*lists, num_tokens, head_dim), dtype),
        new_values=(new_values, (*lists, num_tokens, value_dim), dtype),
        valid=(valid, (batch_size, num_tokens), torch.bool),
        list_start=(list_start, lists, int32),
    )
    if num_tokens == 0 or batch_size * num_heads == 0:
        return

    block_t = min(next_power_of_2(num_tokens), _MAX_BLOCK_T)
    single = num_tokens <= block_t
    mask = length if valid is None else valid.view(torch.uint8)
    with torch.cuda.device_of(keys):
        _append_kernel[(batch_size * num_heads, cdiv(num_tokens, block_t))](
            keys,
            values,
            position,
            length,
            seen,
            new_keys,
            new_values,
            mask,
            starts(list_start, length),
            *keys.stride()[:3],
            *values.stride()[:3],
            *position.stride(),
            *length.stride(),
            *seen.stride(),
            *new_keys.stride()[:3],
            *new_values.stride()[:3],
            *mask.stride(),
            num_heads,
            num_tokens,
            D=head_dim,
            D_V=value_dim,
            HAS_VALID=valid is not None,
            HAS_LIST_START=list_start is not None,
            UPDATE=single,
            **launch_options(keys.device, batch_size * num_tokens),
            BLOCK_T=block_t,
            BLOCK_D=min(next_power_of_2(max(head_dim, value_dim)), 128),
            BLOCK_SCAN=1024,
            num_warps=4 if block_t > 4 else 1,
        )
    if single:
        return
    if valid is None:
        torch._foreach_add_([length, seen], num_tokens)
    else:
        length += valid.sum(-1, keepdim=True, dtype=torch.int32)
        seen += num_tokens
