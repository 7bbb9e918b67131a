"""Triton kernel that copies kept slots to the front of another store; see `reference.compact`.

Bytes floor: `2 * kept * (D + D_v)` elements plus `12 * kept + 4 * B * H * C_out` bytes of slot
numbers and positions (16 instead of 12 with int64 slot numbers).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkit.attention.reference import check_arguments

__all__ = ["compact"]


@triton.jit
def _compact_kernel(
    keys_ptr,
    values_ptr,
    position_ptr,
    keep_ptr,
    keep_count_ptr,
    out_keys_ptr,
    out_values_ptr,
    out_position_ptr,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_pb,
    stride_ph,
    stride_ps,
    stride_ib,
    stride_ih,
    stride_in,
    stride_cb,
    stride_ch,
    stride_okb,
    stride_okh,
    stride_oks,
    stride_ovb,
    stride_ovh,
    stride_ovs,
    stride_opb,
    stride_oph,
    stride_ops,
    num_heads,
    width,
    out_capacity,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = (tl.program_id(0) // num_heads).to(tl.int64)
    h = (tl.program_id(0) % num_heads).to(tl.int64)
    offs_s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    kept = tl.minimum(tl.load(keep_count_ptr + b * stride_cb + h * stride_ch), width)
    mask_s = offs_s < kept
    target = offs_s.to(tl.int64)
    keep_ptr += b * stride_ib + h * stride_ih
    source = tl.load(keep_ptr + target * stride_in, mask=mask_s, other=0).to(tl.int64)  # [BLOCK_S]

    position_ptr += b * stride_pb + h * stride_ph
    out_position_ptr += b * stride_opb + h * stride_oph
    column = tl.load(position_ptr + source * stride_ps, mask=mask_s, other=-1)
    tl.store(out_position_ptr + target * stride_ops, column, mask=offs_s < out_capacity)

    keys_ptr += b * stride_kb + h * stride_kh
    values_ptr += b * stride_vb + h * stride_vh
    out_keys_ptr += b * stride_okb + h * stride_okh
    out_values_ptr += b * stride_ovb + h * stride_ovh
    for start in tl.static_range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask = mask_s[:, None] & (offs_d < D)[None, :]
        row = tl.load(keys_ptr + source[:, None] * stride_ks + offs_d[None, :], mask=mask)
        tl.store(out_keys_ptr + target[:, None] * stride_oks + offs_d[None, :], row, mask=mask)
    for start in tl.static_range(0, D_V, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask = mask_s[:, None] & (offs_d < D_V)[None, :]
        row = tl.load(values_ptr + source[:, None] * stride_vs + offs_d[None, :], mask=mask)
        tl.store(out_values_ptr + target[:, None] * stride_ovs + offs_d[None, :], row, mask=mask)


def compact(
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    keep: Tensor,
    keep_count: Tensor,
    out_keys: Tensor,
    out_values: Tensor,
    out_position: Tensor,
) -> None:
    """Copy the kept slots of every list to the front of another store.

    `out[b, h, j] = in[b, h, keep[b, h, j]]` for `j < keep_count[b, h]`. Behind that,
    `out_position` is -1 and `out_keys` and `out_values` keep their content.

    Args:
        keys: `[B, H, C, D]`, float32/float16/bfloat16, last stride 1.
        values: `[B, H, C, D_v]`, as `keys`.
        position: `[B, H, C]` int32.
        keep: `[B, H, N]` int32 or int64, ascending slot numbers.
        keep_count: `[B, H]` int32, entries of `keep` in use, at most `min(N, C_out)`.
        out_keys: `[B, H, C_out, D]`, as `keys`. Written; shares no memory with the inputs.
        out_values: `[B, H, C_out, D_v]`, as `values`. Written.
        out_position: `[B, H, C_out]` int32. Written.

    Raises:
        ValueError: Shapes, dtypes, devices or strides disagree, an output is an input, or an input
            requires grad.
    """
    batch_size, num_heads, capacity, head_dim = keys.shape
    out_capacity, value_dim = out_keys.shape[2], values.shape[-1]
    lists, dtype, int32 = (batch_size, num_heads), keys.dtype, torch.int32
    slot_dtype = int32 if keep.dtype == int32 else torch.int64
    check_arguments(
        keys=(keys, (*lists, capacity, head_dim), dtype),
        values=(values, (*lists, capacity, value_dim), dtype),
        position=(position, (*lists, capacity), int32),
        keep=(keep, (*lists, keep.shape[-1]), slot_dtype),
        keep_count=(keep_count, lists, int32),
        out_keys=(out_keys, (*lists, out_capacity, head_dim), dtype),
        out_values=(out_values, (*lists, out_capacity, value_dim), dtype),
        out_position=(out_position, (*lists, out_capacity), int32),
    )
    for source, target in ((keys, out_keys), (values, out_values), (position, out_position)):
        if source.numel() and source.data_ptr() == target.data_ptr():
            raise ValueError("expected outputs in memory of their own, got an input as output")
    if out_capacity == 0 or batch_size * num_heads == 0:
        return

    block_s = 32
    with torch.cuda.device_of(keys):
        _compact_kernel[(batch_size * num_heads, triton.cdiv(out_capacity, block_s))](
            keys,
            values,
            position,
            keep,
            keep_count,
            out_keys,
            out_values,
            out_position,
            *keys.stride()[:3],
            *values.stride()[:3],
            *position.stride(),
            *keep.stride(),
            *keep_count.stride(),
            *out_keys.stride()[:3],
            *out_values.stride()[:3],
            *out_position.stride(),
            num_heads,
            min(keep.shape[2], out_capacity),
            out_capacity,
            D=head_dim,
            D_V=value_dim,
            BLOCK_S=block_s,
            BLOCK_D=min(triton.next_power_of_2(max(head_dim, value_dim)), 128),
            num_warps=4,
        )
