"""Triton statistics of how a window of queries attends; see `reference.window_statistics`.

Bytes floor: `B * H_kv * live * D` elements, every live slot's key once, plus 12 bytes of position
and results per slot. A program owns a block of slots of one KV head and walks over the G query
heads; all queries of a head are the columns of one product, so a variance is centred in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkit.attention.kernels import per_head, shared_bytes
from patchkit.attention.kernels.attention_lse import log2_logits, sees
from patchkit.attention.kernels.decode_attention import INTERPRETED, LN_2, LOG2_E
from patchkit.attention.reference import check_arguments

__all__ = ["window_statistics"]

_TARGET_PROGRAMS = 132
_MAX_QUERIES = 64


@triton.jit
def _add_heads(
    mass, variance, entropy, k, position, num_heads, query_ptr, lse_ptr, stride_qh, stride_qi,
    stride_eh, stride_ei, oldest, q_len, scale, sliding_window, softcap,
    D: tl.constexpr, EVEN_Q: tl.constexpr, MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Add the first num_heads query heads.
    i = tl.arange(0, BLOCK_Q)
    offs_d = tl.arange(0, BLOCK_D)
    row = tl.minimum(i, q_len - 1)
    for _ in range(0, num_heads):
        if EVEN_Q:
            lse = tl.load(lse_ptr + i * stride_ei)  # [BLOCK_Q]
        else:
            lse = tl.load(lse_ptr + i * stride_ei, mask=i < q_len, other=float("-inf"))
        q_ptr = query_ptr + (row[None, :] * stride_qi + offs_d[:, None])
        q = tl.load(q_ptr, mask=(offs_d < D)[:, None], other=0.0)  # [BLOCK_D, BLOCK_Q]
        lse_ptr += stride_eh
        query_ptr += stride_qh
        if UPCAST:
            q = q.to(tl.float32)
        counted = tl.where(lse > float("-inf"), 1.0, 0.0)
        lse = tl.where(lse > float("-inf"), lse * LOG2_E, float("inf"))
        count = tl.sum(counted, axis=0)
        logits = log2_logits(k, q, scale, softcap, HAS_SOFTCAP, PRECISION) - lse[None, :]
        if MASKED:
            visible = sees(position[:, None], (oldest + i)[None, :], sliding_window, HAS_WINDOW)
            logits = tl.where(visible, logits, float("-inf"))
        p = tl.exp2(logits)  # [BLOCK_N, BLOCK_Q]
        head_mass = tl.sum(p, axis=1)
        mean = head_mass * (1 / tl.maximum(count, 1.0))
        centred = p - mean[:, None] * counted[None, :]
        mass += head_mass
        variance += tl.sum(centred * centred, axis=1) * (1 / tl.maximum(count - 1, 1.0))
        entropy -= tl.sum(p * tl.maximum(logits, -1e30), axis=1)  # p is 0 there, not 0 * inf
    return mass, variance, entropy


@triton.jit
def _window_statistics_kernel(
    query_ptr, keys_ptr, position_ptr, length_ptr, seen_ptr, lse_ptr, mass_ptr, variance_ptr,
    entropy_ptr,
    stride_qb, stride_qh, stride_qi, stride_kb, stride_kh, stride_ks,
    stride_pb, stride_ph, stride_ps, stride_lb, stride_lh, stride_sb, stride_sh,
    stride_eb, stride_eh, stride_ei, stride_mb, stride_mh, stride_ms,
    stride_vb, stride_vh, stride_vs,
    num_kv_heads, q_len, scale, sliding_window, softcap,
    GROUPS: tl.constexpr, D: tl.constexpr, EVEN_Q: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    start = tl.program_id(1) * BLOCK_N
    b = (pid // num_kv_heads).to(tl.int64)
    h = (pid % num_kv_heads).to(tl.int64)
    entropy_ptr += pid.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    length = tl.load(length_ptr + b * stride_lb + h * stride_lh)
    if start >= length:
        tl.store(entropy_ptr, 0.0)
        return
    oldest = tl.load(seen_ptr + b * stride_sb + h * stride_sh) - q_len  # column of query 0
    slot = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
    live = slot < length
    offs_d = tl.arange(0, BLOCK_D)
    position_ptr += b * stride_pb + h * stride_ph
    position = tl.load(position_ptr + slot * stride_ps, mask=live, other=-1)  # [BLOCK_N]
    keys_ptr += b * stride_kb + h * stride_kh
    k_ptr = keys_ptr + slot[:, None] * stride_ks + offs_d[None, :]
    k = tl.load(k_ptr, mask=live[:, None] & (offs_d < D)[None, :], other=0.0)  # [BLOCK_N, BLOCK_D]
    if UPCAST:
        k = k.to(tl.float32)

    query_ptr += b * stride_qb + h * GROUPS * stride_qh
    lse_ptr += b * stride_eb + h * GROUPS * stride_eh

    # All queries see all slots of most blocks, which need no mask then.
    low = tl.min(position, axis=0)
    full = (low >= 0) & (tl.max(position, axis=0) <= oldest)
    if HAS_WINDOW:
        full = full & (low > oldest + q_len - 1 - sliding_window)
    num_full = tl.where(full, GROUPS, 0)
    mass = tl.zeros((BLOCK_N,), tl.float32)
    variance = tl.zeros((BLOCK_N,), tl.float32)
    entropy = tl.zeros((BLOCK_N,), tl.float32)  # in bits
    mass, variance, entropy = _add_heads(
        mass, variance, entropy, k, position, num_full, query_ptr, lse_ptr, stride_qh, stride_qi,
        stride_eh, stride_ei, oldest, q_len, scale, sliding_window, softcap, D, EVEN_Q, False,
        HAS_WINDOW, HAS_SOFTCAP, UPCAST, PRECISION, BLOCK_Q, BLOCK_D,
    )  # fmt: skip
    mass, variance, entropy = _add_heads(
        mass, variance, entropy, k, position, GROUPS - num_full, query_ptr, lse_ptr, stride_qh,
        stride_qi, stride_eh, stride_ei, oldest, q_len, scale, sliding_window, softcap, D, EVEN_Q,
        True, HAS_WINDOW, HAS_SOFTCAP, UPCAST, PRECISION, BLOCK_Q, BLOCK_D,
    )  # fmt: skip

    tl.store(mass_ptr + b * stride_mb + h * stride_mh + slot * stride_ms, mass, mask=live)
    variance_ptr += b * stride_vb + h * stride_vh
    tl.store(variance_ptr + slot * stride_vs, variance, mask=live)
    tl.store(entropy_ptr, tl.sum(tl.where(position < oldest, entropy, 0.0), axis=0) * LN_2)


def _blocks(
    q_len: int, capacity: int, num_lists: int, block_d: int, element_size: int, shared: int
) -> dict[str, int]:
    """Choose blocks of slots that fit into `shared` bytes and fill the GPU."""
    block_q = max(16, triton.next_power_of_2(q_len))
    for block_n, stages in ((128, 2), (64, 2), (64, 1), (32, 1), (16, 1)):
        if (block_n + stages * block_q) * block_d * element_size <= shared:
            break
    if element_size == 4:
        block_n, stages = min(block_n, 32), 1
    while block_n > 16 and num_lists * triton.cdiv(capacity, block_n) < _TARGET_PROGRAMS:
        block_n //= 2
    blocks = {"BLOCK_N": block_n, "BLOCK_Q": block_q, "num_stages": stages}
    if block_n * block_q <= (512 if element_size == 4 else 64 * 64) and block_n < 128:
        return blocks | {"num_warps": 4}
    return blocks | {"num_warps": 8, "maxnreg": 128}  # two programs on an SM


def window_statistics(
    query: Tensor,
    keys: Tensor,
    position: Tensor,
    length: Tensor,
    seen: Tensor,
    lse: Tensor,
    mass: Tensor,
    variance: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Measure how a window of queries attends to the live slots.

    Query i is at column `seen[b, h] - Q + i`. It sees slot s iff `s < length` and
    `0 <= position <= column` and, with a window, `position > column - sliding_window`. With
    `p = exp(logit - lse)`, 0 where a query does not see a slot or has `lse == -inf`, and per slot:
    `mass` is the sum of p over the G query heads of the KV head and the queries; `variance` is the
    sum over the heads of the unbiased variance of p over the queries with `lse > -inf`, 0 where a
    head has fewer than two of these.

    Args:
        query: `[B, H_q, Q, D]`, float32/float16/bfloat16, finite, last stride 1, `2 <= Q <= 64`.
            Query heads `[h * G, (h + 1) * G)` share KV head h, where `G = H_q / H_kv`.
        keys: `[B, H_kv, C, D]`, as `query`.
        position: `[B, H_kv or 1, C]` int32.
        length: `[B, H_kv or 1]` int32.
        seen: `[B, H_kv or 1]` int32, the tokens of `query` included.
        lse: `[B, H_q, Q]` float32, log of the softmax denominators.
        mass: `[B, H_kv, C]` float32. Written where slots are live.
        variance: `[B, H_kv, C]` float32. Written where slots are live.
        scale: Factor on the logits.
        sliding_window: Columns that a query sees, its own included. None: all.
        softcap: Logits become `softcap * tanh(logits / softcap)`, after `scale`. None: unchanged.

    Returns:
        `[B, H_kv]` float32, the sum of `-p * log(p)` over the heads, the queries and the live slots
        with `position < seen - Q`, those older than the window.

    Raises:
        ValueError: Shapes, dtypes, devices or strides disagree, an input requires grad, or Q is out
            of range.
    """
    batch_size, num_heads, q_len, head_dim = query.shape
    num_kv_heads, capacity = keys.shape[1], keys.shape[2]
    if not 2 <= q_len <= _MAX_QUERIES:
        raise ValueError(f"expected 2 to {_MAX_QUERIES} queries, got {q_len}")
    position, length, seen = per_head(num_heads, num_kv_heads, position, length, seen)
    lists, dtype, int32 = (batch_size, num_kv_heads), query.dtype, torch.int32
    check_arguments(
        query=(query, (batch_size, num_heads, q_len, head_dim), dtype),
        keys=(keys, (*lists, capacity, head_dim), dtype),
        position=(position, (*lists, capacity), int32),
        length=(length, lists, int32),
        seen=(seen, lists, int32),
        lse=(lse, (batch_size, num_heads, q_len), torch.float32),
        mass=(mass, (*lists, capacity), torch.float32),
        variance=(variance, (*lists, capacity), torch.float32),
    )
    if mass.numel() == 0 or num_heads == 0:
        return query.new_zeros(lists, dtype=torch.float32)

    num_lists = batch_size * num_kv_heads
    block_d = max(16, triton.next_power_of_2(head_dim))
    shared = shared_bytes(query.device)
    blocks = _blocks(q_len, capacity, num_lists, block_d, query.element_size(), shared)
    num_blocks = triton.cdiv(capacity, blocks["BLOCK_N"])
    entropy = query.new_empty((*lists, num_blocks), dtype=torch.float32)
    with torch.cuda.device_of(query):
        _window_statistics_kernel[(num_lists, num_blocks)](
            query, keys, position, length, seen, lse, mass, variance, entropy,
            *query.stride()[:3], *keys.stride()[:3], *position.stride(), *length.stride(),
            *seen.stride(), *lse.stride(), *mass.stride(), *variance.stride(),
            num_kv_heads, q_len, float(scale), sliding_window or 0, float(softcap or 1.0),
            GROUPS=num_heads // num_kv_heads, D=head_dim, EVEN_Q=q_len == blocks["BLOCK_Q"],
            HAS_WINDOW=sliding_window is not None, HAS_SOFTCAP=softcap is not None,
            UPCAST=INTERPRETED and dtype == torch.bfloat16,
            PRECISION="ieee" if dtype == torch.float32 else "tf32",
            BLOCK_D=block_d, **blocks,
        )  # fmt: skip
    return entropy.sum(-1)
