"""Launches of kernels that skip what Triton works out anew for every argument of every launch.

Triton sorts the arguments of a launch into kinds, a compiled kernel for each combination, which
takes a host some 2 us an argument: with 30 of them more than the kernels of a short prompt take. A
launch of the same numbers and options as an earlier one, over tensors of the same dtypes and
alignments, needs none of that.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

__all__ = ["direct"]

_MOST_KNOWN = 4096


def direct(kernel: Any) -> Any:
    """Launch a kernel directly where its arguments are of kinds that it was launched with before.

    Args:
        kernel: What `triton.jit` made. Its callers give parameters by position first, each of one
            type in all launches, then all constants by name.

    Returns:
        The same to its callers. In Triton's interpreter, and on AMD's GPUs, for which Triton also
        tells tensors by their sizes, `kernel`.
    """
    known = isinstance(kernel, JITFunction) and torch.version.hip is None
    return _Direct(kernel) if known else kernel


class _Direct:
    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._known: dict[tuple[Any, ...], tuple[CompiledKernel, tuple[Any, ...]]] = {}
        self.__wrapped__ = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> functools.partial[Any]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **options: Any) -> Any:
        # Triton tells tensors by dtype and by whether they begin at a multiple of 16 bytes, numbers
        # by less than their values. The first tensor names the device, as for every launch here.
        kinds = [(x.dtype, x.data_ptr() & 15 == 0) if isinstance(x, Tensor) else x for x in args]
        key = (args[0].get_device(), *kinds, *options.items())
        if (known := self._known.get(key)) is not None:
            compiled, constants = known
            return compiled[(*grid, 1, 1)](*args, *constants)
        compiled = self._kernel[grid](*args, **options)
        if isinstance(compiled, CompiledKernel):
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            names = self._kernel.arg_names[len(args) :]
            self._known[key] = (compiled, tuple(options[name] for name in names))
        return compiled
