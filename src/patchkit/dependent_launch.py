"""Programmatic dependent launch: kernels that are put on the GPU while the one before still runs.

A step is hundreds of kernels of a few microseconds. Where each is scheduled only when the one
before has ended, the GPU idles for a good part of a microsecond in between. A kernel that is
launched with `launch_options` and calls `wait_for_previous` first is scheduled as soon as all
programs of its predecessor have been, and begins when that has ended and its writes are visible.

Every program has to call it, before its first access to memory: a later kernel relies on that its
predecessor has waited for all that came before.
"""

from __future__ import annotations

import os
from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_HOPPER = (9, 0)


@lru_cache(maxsize=16)
def launch_options(device: torch.device) -> dict[str, bool]:
    """Return what a launch on `device` gets for a kernel with a parameter `EARLY: tl.constexpr`.

    As elsewhere, no GPU stands for a Hopper GPU, for which kernels are compiled in tests.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return {"EARLY": False}
    if device.type == "cuda" and (
        torch.version.hip is not None or torch.cuda.get_device_capability(device) < _HOPPER
    ):
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}


@triton.jit
def wait_for_previous(EARLY: tl.constexpr):
    if EARLY:
        gdc_launch_dependents()  # which wait in turn
        gdc_wait()
