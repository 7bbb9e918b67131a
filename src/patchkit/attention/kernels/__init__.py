"""Triton kernels of the attention area: one module per operation, named like the operation.

The specification of every operation is the function of the same name in
`patchkit.attention.reference`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor


@lru_cache(maxsize=16)
def shared_bytes(device: torch.device) -> int:
    """Return the shared memory that one program may use; Hopper's where there is no GPU."""
    if device.type != "cuda":
        return 227 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def check_arguments(**expected: tuple[Tensor | None, tuple[int, ...], torch.dtype]) -> None:
    """Check the tensors of one kernel launch.

    Args:
        expected: Per argument the tensor (None is skipped), its shape and its dtype. The first
            one says which device is expected.

    Raises:
        ValueError: A shape, dtype or device differs, the last stride of a `[B, H, S, D]` tensor is
            not 1, or a tensor requires grad while grad is enabled.
    """
    device: torch.device | None = None
    for name, (tensor, shape, dtype) in expected.items():
        if tensor is None:
            continue
        device = device or tensor.device
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"{name}: expected {dtype} {list(shape)} on {device}, got {tensor.dtype} "
                f"{list(tensor.shape)} on {tensor.device}"
            )
        if tensor.ndim == 4 and tensor.stride(3) != 1 and tensor.shape[3] != 1:
            raise ValueError(f"{name}: expected last stride 1, got strides {tensor.stride()}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: expected a tensor without grad, got requires_grad=True; kernels of the "
                "KV store have no backward, run them under torch.no_grad()"
            )


def per_head(num_heads: int, num_kv_heads: int, *bookkeeping: Tensor) -> tuple[Tensor, ...]:
    """Show `[B, 1, ...]` tensors that the heads share as `[B, H_kv, ...]`, others as they are.

    Raises:
        ValueError: the query heads cannot be divided among the KV heads.
    """
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"expected H_q to be a multiple of H_kv={num_kv_heads}, got {num_heads}")
    return tuple(
        t.expand(-1, num_kv_heads, *t.shape[2:]) if t.shape[1:2] == (1,) else t for t in bookkeeping
    )


def starts(list_start: Tensor | None, placeholder: Tensor) -> Tensor:
    """Return what a kernel gets as the first slots of its lists, `[B, H]`, or an unused tensor.

    Raises:
        ValueError: the first slots are not contiguous.
    """
    if list_start is None:
        return placeholder
    if not list_start.is_contiguous():
        raise ValueError(
            f"list_start: expected a contiguous tensor, got strides {list_start.stride()}"
        )
    return list_start


@triton.jit
def first_slot(list_start_ptr, number, HAS_LIST_START: tl.constexpr):
    # The first slot of list `number`, counted over rows and heads; 0 where it has slots of its own.
    list_start = tl.load(list_start_ptr + number) if HAS_LIST_START else 0
    return tl.cast(list_start, tl.int64)
