"""Triton kernels of the attention area: one module per operation, named like the operation.

The specification of every operation is the function of the same name in
`patchkit.attention.reference`.
"""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache(maxsize=16)
def shared_bytes(device: torch.device) -> int:
    """Return the shared memory that one program may use; Hopper's where there is no GPU."""
    if device.type != "cuda":
        return 227 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
