"""Linear maps of a single vector: a decoding step at batch 1 reads every weight once.

cuBLAS is made for matrices; a kernel that only has to stream a weight does so at the rate of a
copy. A step does not care which module or adapter asks, so no module is edited: while a step runs,
calls of `torch.nn.functional.linear` are answered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from patchkit.decoding.eligibility import is_plain, kernels_serve

if TYPE_CHECKING:
    from patchkit.backends import Backend


class StreamedLinears(TorchFunctionMode):
    """Inside, `linear` maps a single vector by `matvec` where a kernel serves.

    Args:
        backend: Runs the kernel.
    """

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self._backend = backend

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Answer a call of a function of torch."""
        if func is F.linear and not kwargs and self._serves(*args):
            return self._backend.run("decoding", "matvec", args[0].device, *args)
        return func(*args, **(kwargs or {}))

    def _serves(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
        given = (x, weight) if bias is None else (x, weight, bias)
        return (
            x.ndim > 0
            and x.numel() == x.shape[-1] > 0
            and all(is_plain(t) and t.dtype == x.dtype and t.device == x.device for t in given)
            and weight.ndim == 2
            and weight.shape[1] == x.shape[-1]
            and weight.stride(1) == 1
            and (bias is None or bias.shape == weight.shape[:1])
            and kernels_serve(self._backend, x)
        )
