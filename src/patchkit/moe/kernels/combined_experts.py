"""Triton down-projection of experts, read in place, and their sum by scores; see the reference.

Bytes floor: the down-projection of every expert that a token has chosen, once. While few tokens
share an expert, a program takes a block of outputs of a token and loads the rows of all of its
experts at once; programs of the same outputs run next to each other, so rows that several read come
from the L2 cache. Where more tokens share an expert, one program maps them together, as in
`gated_experts`, and a second launch sums up: 2 us, and next to no bytes, for not reading an expert
from the cache once per token. The sum of a token never depends on what others chose.
A residual is added where the sum is at hand.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkit.decoding.kernels.skinny_linear import INTERPRETED, add_product, blocks, weight_tile
from patchkit.dependent_launch import launch_options, wait_for_previous
from patchkit.direct_launch import direct
from patchkit.launch_sizes import cdiv, next_power_of_2
from patchkit.moe.kernels.gated_experts import (
    NO_PAIR,
    check_experts,
    pairs_of_expert,
    picked_rows_tile,
    shares_experts,
)

__all__ = ["combined_experts"]

_STEP_WEIGHTS = 2048


@triton.jit
def _weighted(found, score, dtype: tl.constexpr, ROUND_PRODUCT: tl.constexpr):
    # Both float32; `found` has been rounded to `dtype`.
    weighted = found * score
    if ROUND_PRODUCT:
        weighted = weighted.to(dtype).to(tl.float32)
    return weighted


@triton.jit
def _store_sum(
    result, out_ptr, residual_ptr, total_ptr, token, offs_n, num_outs, HAS_RESIDUAL: tl.constexpr
):
    # A block of a token's sum, rounded, and if there is a residual what both add up to.
    offs, mask = token * num_outs + offs_n, offs_n < num_outs
    tl.store(out_ptr + offs, result, mask=mask)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        total = residual + result.to(tl.float32)
        tl.store(total_ptr + offs, total.to(total_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _reread_tile(row_ptr, start, mask, K: tl.constexpr, BLOCK_K: tl.constexpr):
    # `weight_tile` of what other programs read as well.
    offs_k = start + tl.arange(0, BLOCK_K)
    mask = mask[:, None]
    if K % BLOCK_K:
        mask = mask & (offs_k < K)[None, :]
    return tl.load(row_ptr + offs_k[None, :], mask=mask, other=0.0)


@direct
@triton.jit
def _combined_experts_kernel(
    x_ptr,
    weight_ptr,
    index_ptr,
    scores_ptr,
    out_ptr,
    residual_ptr,
    total_ptr,
    stride_e,
    stride_n,
    num_outs,
    TOP_K: tl.constexpr,
    K: tl.constexpr,
    ROUND_PRODUCT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_TOP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program: a block of outputs of one token. A row of its tile: an output of an expert.
    wait_for_previous(EARLY)
    token = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, BLOCK_N * BLOCK_TOP)
    place, offs_n = row % BLOCK_TOP, tl.program_id(1) * BLOCK_N + row // BLOCK_TOP
    mask_k = place < TOP_K
    mask = mask_k & (offs_n < num_outs)
    pair = token * TOP_K + place
    expert = tl.load(index_ptr + pair, mask=mask_k, other=0)
    score = tl.load(scores_ptr + pair, mask=mask_k, other=0.0).to(tl.float32)
    row_ptr = weight_ptr + (expert * stride_e + offs_n.to(tl.int64) * stride_n)[:, None]
    x_ptr += pair[:, None] * K
    products = tl.zeros((BLOCK_N * BLOCK_TOP, BLOCK_K), tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        weight = weight_tile(row_ptr, start, mask, K, BLOCK_K).to(tl.float32)
        products += weight * _reread_tile(x_ptr, start, mask_k, K, BLOCK_K).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    found = tl.sum(products, axis=1).to(dtype).to(tl.float32)
    weighted = tl.reshape(_weighted(found, score, dtype, ROUND_PRODUCT), (BLOCK_N, BLOCK_TOP))
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    result = tl.sum(weighted, axis=1).to(dtype)
    _store_sum(result, out_ptr, residual_ptr, total_ptr, token, offs_n, num_outs, HAS_RESIDUAL)


@direct
@triton.jit
def _mapped_experts_kernel(
    x_ptr,
    weight_ptr,
    index_ptr,
    out_ptr,
    stride_e,
    stride_n,
    num_tokens,
    num_outs,
    TOP_K: tl.constexpr,
    K: tl.constexpr,
    UPCAST: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_TOP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program: a block of outputs of an expert, for every pair that has it.
    wait_for_previous(EARLY)
    pair = tl.program_id(0)
    expert = tl.load(index_ptr + pair)
    pairs = pairs_of_expert(index_ptr, pair, expert, num_tokens, TOP_K, BLOCK_TOP, BLOCK_M)
    if tl.min(pairs, axis=0) == pair:
        offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n, mask_m = offs_n < num_outs, pairs != NO_PAIR
        row = pairs.to(tl.int64)
        row_ptr = weight_ptr + expert * stride_e + offs_n.to(tl.int64)[:, None] * stride_n
        found = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for start in range(0, K, BLOCK_K):
            rows = picked_rows_tile(x_ptr, row, mask_m, start, K, BLOCK_K)
            weight = weight_tile(row_ptr, start, mask_n, K, BLOCK_K)
            found = add_product(found, weight, rows, UPCAST)
        offs = offs_n[:, None] + row[None, :] * num_outs
        mask = mask_n[:, None] & mask_m[None, :]
        tl.store(out_ptr + offs, found.to(out_ptr.dtype.element_ty), mask=mask)


@direct
@triton.jit
def _sum_of_experts_kernel(
    found_ptr,
    scores_ptr,
    out_ptr,
    residual_ptr,
    total_ptr,
    num_outs,
    TOP_K: tl.constexpr,
    ROUND_PRODUCT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_TOP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # One program: a block of outputs of one token.
    wait_for_previous(EARLY)
    token = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = tl.arange(0, BLOCK_TOP)
    pair = token * TOP_K + place
    mask_k, mask_n = place < TOP_K, offs_n < num_outs
    score = tl.load(scores_ptr + pair, mask=mask_k, other=0.0).to(tl.float32)
    offs = pair[:, None] * num_outs + offs_n[None, :]
    mask = mask_k[:, None] & mask_n[None, :]
    found = tl.load(found_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    result = tl.sum(_weighted(found, score[:, None], dtype, ROUND_PRODUCT), axis=0).to(dtype)
    _store_sum(result, out_ptr, residual_ptr, total_ptr, token, offs_n, num_outs, HAS_RESIDUAL)


def _blocks(width: int, block_top: int) -> dict[str, int]:
    """Choose tiles as measured on an H200: 16 weights per thread, rows in at most 32 steps."""
    block_k = max(64, next_power_of_2(width) // 32)
    block_n = max(_STEP_WEIGHTS // (block_top * block_k), 1)
    return {"BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": 4}


def combined_experts(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    scores: Tensor,
    *,
    out: Tensor | None = None,
    residual: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """Map what every expert of a token found by its down-projection, and add it up by scores.

    Args:
        x: `[T, k, I]`, float32/float16/bfloat16.
        weight: `[E, D, I]`, as `x`, last stride 1.
        index: `[T, k]` int64, the experts of a token, each in `[0, E)`, not checked.
        scores: `[T, k]`, as `x` or float32.
        out: `[T, D]`, contiguous, as `x`. Written and returned if given.
        residual: `T * D` elements, contiguous, as `x`, or None.
        total: As `residual`. Written: `out + residual`. Given exactly if `residual` is.

    Returns:
        `[T, D]`, contiguous, in the dtype of `x`.

    Raises:
        ValueError: Shapes, dtypes, devices or strides disagree.
    """
    check_experts(x, weight, index, x.shape[-1])
    if x.shape[:-1] != index.shape:
        raise ValueError(
            f"x: expected [T, k, I] for index {list(index.shape)}, got {list(x.shape)}"
        )
    if scores.shape != index.shape or scores.dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"scores: expected {x.dtype} or float32 {list(index.shape)}, got {scores.dtype} "
            f"{list(scores.shape)}"
        )
    (tokens, top_k), num_outs, width = index.shape, weight.shape[1], x.shape[-1]
    if out is None:
        out = x.new_empty(tokens, num_outs)
    if (residual is None) != (total is None):
        raise ValueError("expected both of residual and total or neither, got one")
    for name, tensor in {"out": out, "residual": residual, "total": total}.items():
        if tensor is not None and not (
            tensor.numel() == tokens * num_outs
            and (tensor.dtype, tensor.device) == (x.dtype, x.device)
            and tensor.is_contiguous()
        ):
            raise ValueError(
                f"{name}: expected contiguous {x.dtype} of [{tokens}, {num_outs}] on {x.device}, "
                f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device} with strides "
                f"{tensor.stride()}"
            )
    if out.numel() == 0:
        return out
    x, index, scores = x.contiguous(), index.contiguous(), scores.contiguous()
    block_top = next_power_of_2(top_k)
    strides, early = weight.stride()[:2], launch_options(x.device, tokens)
    outs = (out, out if residual is None else residual, out if total is None else total)
    summed = {"TOP_K": top_k, "BLOCK_TOP": block_top, "ROUND_PRODUCT": scores.dtype == x.dtype}
    summed["HAS_RESIDUAL"] = residual is not None
    # A product that is to be rounded must not be fused with what it is added to. Of more than two
    # that are rounded to 16 bits none is, and the compiler loads further ahead where it may fuse.
    half = x.dtype in (torch.float16, torch.bfloat16)
    summed["enable_fp_fusion"] = half and scores.dtype == x.dtype and block_top > 2
    with torch.cuda.device_of(x):
        if shares_experts(index, weight):
            found = x.new_empty(tokens, top_k, num_outs)
            tiles = blocks(x[:, 0], num_outs)
            # Rows of experts are short: more programs at a time serve better than deep pipelines.
            tiles["num_stages"] = min(tiles["num_stages"], 4)
            grid = (tokens * top_k, cdiv(num_outs, tiles["BLOCK_N"]))
            options = {"TOP_K": top_k, "K": width, "BLOCK_TOP": block_top, **early}
            options["UPCAST"] = INTERPRETED and x.dtype == torch.bfloat16
            _mapped_experts_kernel[grid](
                x, weight, index, found, *strides, tokens, num_outs, **options, **tiles
            )
            block_n = 256
            _sum_of_experts_kernel[(tokens, cdiv(num_outs, block_n))](
                found, scores, *outs, num_outs, **summed, **early, BLOCK_N=block_n
            )
        else:
            tiles = _blocks(width, block_top)
            grid = (tokens, cdiv(num_outs, tiles["BLOCK_N"]))
            _combined_experts_kernel[grid](
                x, weight, index, scores, *outs, *strides, num_outs, K=width, **summed, **early,
                **tiles,
            )  # fmt: skip
    return out
