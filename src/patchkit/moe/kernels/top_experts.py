"""Triton choice of each token's experts in one launch, where eager PyTorch takes five or more.

See the reference. Bytes floor: the logits once. A logit and its expert are one integer of the same
order, so a choice is one reduction; those of integers of 32 bits, which is what logits of 16 bits
need, are one instruction per warp on Ampere and later.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkit.dependent_launch import launch_options, wait_for_previous
from patchkit.direct_launch import direct
from patchkit.launch_sizes import next_power_of_2
from patchkit.moe.reference import MOST_EXPERTS

__all__ = ["top_experts"]

_PLACES = tl.constexpr(2**16)  # above MOST_EXPERTS


@triton.jit
def _turn(bits):
    # Negative floats ascend as integers descend. Its own inverse; of 16 bits as of 32.
    HIGHEST: tl.constexpr = 2 ** (bits.dtype.primitive_bitwidth - 1) - 1
    return tl.where(bits < 0, bits ^ HIGHEST, bits)


@triton.jit
def _keys(logit, expert, KEY: tl.constexpr, BITS: tl.constexpr):
    # Integers in the order of the logits, NaN above all; of equal logits the first is above.
    HIGHEST: tl.constexpr = 2 ** (BITS.primitive_bitwidth - 1) - 1
    bits = logit.to(BITS, bitcast=True)
    rank = tl.where(bits == -HIGHEST - 1, 0, _turn(bits).to(KEY))  # -0.0 is 0.0
    value = logit.to(tl.float32)
    rank = tl.where(value != value, HIGHEST, rank)
    return rank * _PLACES + (_PLACES - 1 - expert)


@triton.jit
def _logits(key, dtype: tl.constexpr, BITS: tl.constexpr):
    return _turn((key >> 16).to(BITS)).to(dtype, bitcast=True).to(tl.float32)


@direct
@triton.jit
def _top_experts_kernel(
    logits_ptr,
    scores_ptr,
    index_ptr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALISED: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_TOP: tl.constexpr,
):
    # One program: a token.
    wait_for_previous(EARLY)
    token = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    BITS: tl.constexpr = tl.int16 if dtype.primitive_bitwidth == 16 else tl.int32
    KEY: tl.constexpr = tl.int32 if dtype.primitive_bitwidth == 16 else tl.int64
    LOWEST: tl.constexpr = -(2 ** (KEY.primitive_bitwidth - 1))  # below the key of -inf
    expert = tl.arange(0, BLOCK_E)
    mask = expert < NUM_EXPERTS
    logit = tl.load(logits_ptr + token * NUM_EXPERTS + expert, mask=mask, other=float("-inf"))
    key = tl.where(mask, _keys(logit, expert, KEY, BITS), LOWEST)

    largest = _logits(tl.max(key, axis=0), dtype, BITS)
    place = tl.arange(0, BLOCK_TOP)
    chosen = tl.full((BLOCK_TOP,), LOWEST, KEY)
    for i in range(TOP_K):
        best = tl.max(key, axis=0)
        chosen = tl.where(place == i, best, chosen)
        key = tl.where(key == best, LOWEST, key)

    mask_k = place < TOP_K
    scores = tl.where(mask_k, tl.exp(_logits(chosen, dtype, BITS) - largest), 0.0)
    if NORMALISED:
        total = tl.sum(scores, axis=0)
    else:
        total = tl.sum(tl.exp(logit.to(tl.float32) - largest), axis=0)
    scores = (scores / total).to(scores_ptr.dtype.element_ty)
    tl.store(scores_ptr + token * TOP_K + place, scores, mask=mask_k)
    index = _PLACES - 1 - (chosen & (_PLACES - 1))
    tl.store(index_ptr + token * TOP_K + place, index.to(tl.int64), mask=mask_k)


def top_experts(
    logits: Tensor, top_k: int, *, normalised: bool, rounded: bool
) -> tuple[Tensor, Tensor]:
    """Choose the experts of every token, and score them by softmax.

    The largest logits are chosen, in descending order; of equal ones the first. NaN is above all
    numbers, so every index is in `[0, E)`. The softmax is in float32.

    Args:
        logits: `[T, E]`, float32/float16/bfloat16, E at most `MOST_EXPERTS`.
        top_k: Experts per token, from 1 to E.
        normalised: Whether the scores of a token add up to 1, or else those of all experts.
        rounded: Whether to round scores to the dtype of `logits`.

    Returns:
        scores: `[T, k]`, contiguous, in the dtype of `logits` or, unless `rounded`, float32.
        index: `[T, k]` int64, contiguous, the experts.

    Raises:
        ValueError: `logits` has another shape or dtype, or fewer than `top_k` columns.
    """
    if logits.ndim != 2 or logits.shape[1] > MOST_EXPERTS or logits.dtype.itemsize > 4:
        raise ValueError(
            f"logits: expected [T, E] with E at most {MOST_EXPERTS} and at most 32 bits, got "
            f"{logits.dtype} {list(logits.shape)}"
        )
    tokens, num_experts = logits.shape
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k: expected 1 to {num_experts}, got {top_k}")
    logits = logits.contiguous()
    scores = logits.new_empty(tokens, top_k, dtype=logits.dtype if rounded else torch.float32)
    index = logits.new_empty(tokens, top_k, dtype=torch.int64)
    if tokens == 0:
        return scores, index
    with torch.cuda.device_of(logits):
        _top_experts_kernel[(tokens,)](
            logits,
            scores,
            index,
            NUM_EXPERTS=num_experts,
            TOP_K=top_k,
            NORMALISED=normalised,
            **launch_options(logits.device, tokens),
            BLOCK_E=next_power_of_2(num_experts),
            BLOCK_TOP=next_power_of_2(top_k),
            num_warps=1,  # reductions stay within it
        )
    return scores, index
