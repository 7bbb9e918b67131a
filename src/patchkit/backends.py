"""Choose between a Triton kernel and its plain PyTorch reference, and count which one ran.

An operation `op` of an area ("attention", "decoding", "moe") exists twice under one signature:
`patchkit.<area>.kernels.<op>.<op>` (Triton) and `patchkit.<area>.reference.<op>` (the
specification, also the CPU backend). Kernel modules are imported on first use, so patchkit works
without triton.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch.overrides import handle_torch_function, has_torch_function

from patchkit.errors import BackendError

BackendName = Literal["auto", "triton", "reference"]


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _load(area: str, op: str, used: str) -> Callable[..., Any]:
    module = f"patchkit.{area}.kernels.{op}" if used == "triton" else f"patchkit.{area}.reference"
    return getattr(importlib.import_module(module), op)


class Backend:
    """The backend requested for one model, and how often each implementation was called.

    Args:
        requested: `"auto"` takes Triton for tensors on a CUDA device and the reference elsewhere.
            `"triton"` and `"reference"` never fall back.

    Raises:
        ValueError: `requested` is none of the three.
        BackendError: `"triton"` was asked for and triton is missing, or there is neither a CUDA
            device nor `TRITON_INTERPRET=1`.
    """

    def __init__(self, requested: BackendName = "auto") -> None:
        if requested not in get_args(BackendName):
            raise ValueError(f"backend must be one of {get_args(BackendName)}, got {requested!r}")
        if requested == "triton" and not _has_triton():
            raise BackendError("backend='triton' was requested, but triton cannot be imported")
        if requested == "triton" and not (torch.cuda.is_available() or _interpreting()):
            raise BackendError(
                "backend='triton' was requested, but there is no CUDA device; "
                "set TRITON_INTERPRET=1 before importing triton to run kernels on the CPU"
            )
        self.requested = requested
        self.calls: Counter[tuple[str, str]] = Counter()

    def choose(self, device: torch.device) -> Literal["triton", "reference"]:
        """Name the implementation that serves tensors on `device`."""
        if self.requested == "reference":
            return "reference"
        if self.requested == "triton":
            return "triton"
        if device.type != "cuda":
            return "reference"
        if not _has_triton():
            warnings.warn(
                "patchkit runs its reference implementation on a CUDA device because triton "
                "cannot be imported; expect it to be slow",
                RuntimeWarning,
                stacklevel=2,
            )
            return "reference"
        return "triton"

    def run(self, area: str, op: str, device: torch.device, *args: Any, **kwargs: Any) -> Any:
        """Call operation `op` of `area` on the implementation that `device` calls for.

        Modes of torch see the call as they see those of torch's own functions, `func` being
        `Backend.run`; kernels read memory by themselves.
        """
        if has_torch_function((device,)):  # which has none: a mode is there
            call = (self, area, op, device, *args)
            return handle_torch_function(Backend.run, (), *call, **kwargs)
        used = self.choose(device)
        self.calls[op, used] += 1
        return _load(area, op, used)(*args, **kwargs)
