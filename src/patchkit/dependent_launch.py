"""Programmatic dependent launch: kernels that are put on the GPU while the one before still runs.

A step is hundreds of kernels of a few microseconds. Where each is scheduled only when the one
before has ended, the GPU idles for a good part of a microsecond in between. A kernel that is
launched with `launch_options` and calls `wait_for_previous` is scheduled as soon as all programs of
its predecessor have waited, and goes on when that has ended and its writes are visible.

Every program has to call it, before its first access to memory: a later kernel relies on that its
predecessor has waited for all that came before. One thing may be read ahead of it: weights that
nobody writes. So a kernel fills the time in which its predecessor ends; see
`decoding.eligibility.may_read_ahead`.
"""

from __future__ import annotations

import os
from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_HOPPER = (9, 0)
_MOST_ROWS = 16


def launch_options(device: torch.device, rows: int = 1) -> dict[str, bool]:
    """Return what a launch on `device` gets for a kernel with a parameter `EARLY: tl.constexpr`.

    The longer the kernels, the less it brings: on an H200 it makes a step of an 8B model 3 to 5 %
    shorter up to 16 rows, and 2 % longer at 64 (`bench_step.py`).

    Args:
        device: Of the tensors. As elsewhere, no GPU stands for the Hopper GPU that tests compile
            kernels for.
        rows: Of the step. Kernels that follow each other, as those do that score and select the
            tokens of a prompt, leave it out.
    """
    if rows <= _MOST_ROWS and _can_depend(device):
        return {"EARLY": True, "launch_pdl": True}
    return {"EARLY": False}


@lru_cache(maxsize=16)
def _can_depend(device: torch.device) -> bool:
    if os.environ.get("TRITON_INTERPRET") == "1" or torch.version.hip is not None:
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _HOPPER


@triton.jit
def wait_for_previous(EARLY: tl.constexpr) -> None:
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()  # earlier, those after them would crowd in too
