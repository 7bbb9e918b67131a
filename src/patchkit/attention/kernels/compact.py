"""Triton kernel that copies kept slots to the front of another store; see `reference.compact`.

Bytes floor: `2 * kept * (D + D_v)` elements plus `12 * kept + 4 * B * H * C_out` bytes of slot
numbers and positions (16 instead of 12 with int64 slot numbers).
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

__all__ = ["compact"]


# Budgets differ from layer to layer; a kernel for each kind of number would be built in the prompt.
@direct
@triton.jit(do_not_specialize=["stride_ib", "stride_ih", "width", "out_capacity"])
def _compact_kernel(
    keys_ptr,
    values_ptr,
    position_ptr,
    length_ptr,
    score_ptr,
    keep_ptr,
    keep_count_ptr,
    out_keys_ptr,
    out_values_ptr,
    out_position_ptr,
    out_score_ptr,
    list_start_ptr,
    out_list_start_ptr,
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
    stride_ss,
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
    stride_osb,
    stride_osh,
    stride_oss,
    num_heads,
    width,
    out_capacity,
    EARLY: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    HAS_SCORE: tl.constexpr,
    HAS_LIST_START: tl.constexpr,
    HAS_OUT_LIST_START: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wait_for_previous(EARLY)
    b = (tl.program_id(0) // num_heads).to(tl.int64)
    h = (tl.program_id(0) % num_heads).to(tl.int64)
    offs_s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    length_ptr += b * stride_lb + h * stride_lh
    kept = tl.load(keep_count_ptr + b * stride_cb + h * stride_ch)
    kept = tl.minimum(kept, tl.load(length_ptr))
    tl.store(length_ptr, kept)  # which a program that comes later may read as well
    mask_s = offs_s < tl.minimum(kept, width)
    # What lies behind a list of its own is emptied; behind one among others comes the next.
    written = mask_s if HAS_OUT_LIST_START else offs_s < out_capacity
    keep_ptr += b * stride_ib + h * stride_ih
    source = tl.load(keep_ptr + offs_s.to(tl.int64) * stride_in, mask=mask_s, other=0).to(tl.int64)
    source += first_slot(list_start_ptr, tl.program_id(0), HAS_LIST_START)  # [BLOCK_S]
    target = first_slot(out_list_start_ptr, tl.program_id(0), HAS_OUT_LIST_START) + offs_s

    position_ptr += b * stride_pb + h * stride_ph
    out_position_ptr += b * stride_opb + h * stride_oph
    column = tl.load(position_ptr + source * stride_ps, mask=mask_s, other=-1)
    tl.store(out_position_ptr + target * stride_ops, column, mask=written)
    if HAS_SCORE:
        score_ptr += b * stride_sb + h * stride_sh
        out_score_ptr += b * stride_osb + h * stride_osh
        score = tl.load(score_ptr + source * stride_ss, mask=mask_s, other=0.0)
        tl.store(out_score_ptr + target * stride_oss, score, mask=written)

    keys_ptr += b * stride_kb + h * stride_kh
    values_ptr += b * stride_vb + h * stride_vh
    out_keys_ptr += b * stride_okb + h * stride_okh
    out_values_ptr += b * stride_ovb + h * stride_ovh
    for start in tl.static_range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask = (offs_d < D)[None, :]
        row = tl.load(
            keys_ptr + source[:, None] * stride_ks + offs_d[None, :], mask=mask_s[:, None] & mask,
            other=0.0,
        )  # fmt: skip
        row_ptr = out_keys_ptr + target[:, None] * stride_oks + offs_d[None, :]
        tl.store(row_ptr, row, mask=written[:, None] & mask)
    for start in tl.static_range(0, D_V, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask = (offs_d < D_V)[None, :]
        row = tl.load(
            values_ptr + source[:, None] * stride_vs + offs_d[None, :],
            mask=mask_s[:, None] & mask, other=0.0,
        )  # fmt: skip
        row_ptr = out_values_ptr + target[:, None] * stride_ovs + offs_d[None, :]
        tl.store(row_ptr, row, mask=written[:, None] & mask)


def compact(
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    length: Tensor,
    keep: Tensor,
    keep_count: Tensor,
    out_keys: Tensor,
    out_values: Tensor,
    out_position: Tensor,
    score: Tensor | None = None,
    out_score: Tensor | None = None,
    list_start: Tensor | None = None,
    out_list_start: Tensor | None = None,
) -> None:
    """Copy the kept slots of every list to the front of another store.

    `out[b, h, j] = in[b, h, keep[b, h, j]]` for `j < min(keep_count[b, h], length[b, h])`, which
    becomes the length. The slots behind that are emptied, positions to -1 and the rest to 0, unless
    `out_list_start` is given.

    Args:
        keys: `[B, H, C, D]`, float32/float16/bfloat16, last stride 1.
        values: `[B, H, C, D_v]`, as `keys`.
        position: `[B, H, C]` int32.
        length: `[B, H]` int32. Changed in place.
        keep: `[B, H, N]` int32 or int64, ascending slot numbers.
        keep_count: `[B, H]` int32, entries of `keep` in use, or more than the list is long;
            `min(keep_count, length)` is at most `min(N, C_out)`.
        out_keys: `[B, H, C_out, D]`, as `keys`. Written; shares no memory with the inputs.
        out_values: `[B, H, C_out, D_v]`, as `values`. Written.
        out_position: `[B, H, C_out]` int32. Written.
        score: `[B, H, C]` float32, or None.
        out_score: `[B, H, C_out]` float32. Written; given exactly if `score` is.
        list_start: `[B, H]` int32 contiguous, first slot of each list where those of a row share
            C slots (and `keys`, ... are expanded over H). None: each has C slots of its own.
        out_list_start: The same of the other store.

    Raises:
        ValueError: Shapes, dtypes, devices or strides disagree, an output is an input, only one of
            `score` and `out_score` is given, or an input requires grad.
    """
    batch_size, num_heads, capacity, head_dim = keys.shape
    out_capacity, value_dim = out_keys.shape[2], values.shape[-1]
    lists, dtype, int32 = (batch_size, num_heads), keys.dtype, torch.int32
    slot_dtype = int32 if keep.dtype == int32 else torch.int64
    check_arguments(
        keys=(keys, (*lists, capacity, head_dim), dtype),
        values=(values, (*lists, capacity, value_dim), dtype),
        position=(position, (*lists, capacity), int32),
        length=(length, lists, int32),
        keep=(keep, (*lists, keep.shape[-1]), slot_dtype),
        keep_count=(keep_count, lists, int32),
        out_keys=(out_keys, (*lists, out_capacity, head_dim), dtype),
        out_values=(out_values, (*lists, out_capacity, value_dim), dtype),
        out_position=(out_position, (*lists, out_capacity), int32),
        score=(score, (*lists, capacity), torch.float32),
        out_score=(out_score, (*lists, out_capacity), torch.float32),
        list_start=(list_start, lists, int32),
        out_list_start=(out_list_start, lists, int32),
    )
    if (score is None) != (out_score is None):
        raise ValueError("expected both of score and out_score or neither, got one")
    for source, target in ((keys, out_keys), (values, out_values), (position, out_position)):
        if source.numel() and source.data_ptr() == target.data_ptr():
            raise ValueError("expected outputs in memory of their own, got an input as output")
    if batch_size * num_heads == 0:
        return

    width, block_s = min(keep.shape[2], out_capacity), 32
    touched = out_capacity if out_list_start is None else width
    ranking, out_ranking = (position, out_position) if score is None else (score, out_score)
    assert out_ranking is not None
    with torch.cuda.device_of(keys):
        _compact_kernel[(batch_size * num_heads, max(cdiv(touched, block_s), 1))](
            keys,
            values,
            position,
            length,
            ranking,
            keep,
            keep_count,
            out_keys,
            out_values,
            out_position,
            out_ranking,
            starts(list_start, keep_count),
            starts(out_list_start, keep_count),
            *keys.stride()[:3],
            *values.stride()[:3],
            *position.stride(),
            *length.stride(),
            *ranking.stride(),
            *keep.stride(),
            *keep_count.stride(),
            *out_keys.stride()[:3],
            *out_values.stride()[:3],
            *out_position.stride(),
            *out_ranking.stride(),
            num_heads,
            width,
            out_capacity,
            **launch_options(keys.device),
            D=head_dim,
            D_V=value_dim,
            HAS_SCORE=score is not None,
            HAS_LIST_START=list_start is not None,
            HAS_OUT_LIST_START=out_list_start is not None,
            BLOCK_S=block_s,
            BLOCK_D=min(next_power_of_2(max(head_dim, value_dim)), 128),
            num_warps=4,
        )
