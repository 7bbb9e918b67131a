"""Linear maps of a few rows: a decoding step at a small batch reads every weight once.

cuBLAS is made for matrices; a kernel that only has to stream a weight does so at the rate of a
copy. A step does not care which module or adapter asks, so no module is edited: while a step runs,
calls of `torch.nn.functional.linear` are answered.

Where all modules look at tensors through torch alone, a map is launched only when somebody looks at
its result. So maps of the same rows that follow each other, as those of queries, keys and values
do, are one launch, and adding a residual is part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from patchkit.decoding.eligibility import global_hooks, is_plain, kernels_serve
from patchkit.decoding.reference import is_skinny

if TYPE_CHECKING:
    from patchkit.backends import Backend

_KNOWN = ("torch", "transformers", "peft", "patchkit")
_MOST = 3  # weights that the kernel takes at once

_PROPERTIES = ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")
_BLIND = frozenset(
    [
        *(Tensor.view, Tensor.transpose, Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride),
        *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
    ]
)
"""Functions that look at no element of a tensor."""


def looks_through_torch(model: nn.Module) -> bool:
    """Say whether nothing in a model but torch's own functions reads the memory of a tensor.

    That is known of the forwards and hooks that torch, transformers and PEFT bring, unless they are
    TorchScript, whose calls no mode sees. A scripted function inside of them is not found.
    """
    code: list[Any] = []
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            return False
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        code += (type(module), module.forward, *hooks)
    return not global_hooks() and all(
        (getattr(part, "__module__", None) or "").partition(".")[0] in _KNOWN for part in code
    )


def _pending(tensor: Tensor, results: Iterable[Tensor]) -> bool:
    """Say whether a tensor is, or is a view of, one of the results."""
    storage = tensor.untyped_storage().data_ptr()
    return any(storage == result.untyped_storage().data_ptr() for result in results)


class StreamedLinears(TorchFunctionMode):
    """Inside, `linear` maps a few rows by `skinny_linear` where a kernel serves.

    Args:
        backend: Runs the kernel.
        together: Wait with a launch until a function of torch looks at the result, for what else
            can be part of it. Extensions that read memory by themselves would come too early.
    """

    def __init__(self, backend: Backend, together: bool = False) -> None:
        super().__init__()
        self._backend, self._together = backend, together
        self._x: Tensor | None = None
        self._asked: list[tuple[Tensor, Tensor | None, Tensor]] = []  # weight, bias, result

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Answer a call of a function of torch."""
        if func is F.linear and not kwargs and self._serves(*args):
            return self._ask(*args)
        if self._asked and func not in _BLIND:
            if (
                func == Tensor.add
                and not kwargs
                and (residual := self._residual(*args)) is not None
            ):
                total = torch.empty_like(residual)
                self._launch(residual=residual, total=total)
                return total
            self._launch()
        return func(*args, **(kwargs or {}))

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Launch what nobody has looked at."""
        if kind is None:
            self._launch()
        super().__exit__(kind, error, trace)

    def _serves(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
        given = (x, weight) if bias is None else (x, weight, bias)
        return (
            is_skinny(x)
            and all(is_plain(t) and t.dtype == x.dtype and t.device == x.device for t in given)
            and weight.ndim == 2
            and weight.shape[1] == x.shape[-1] > 0
            and weight.stride(1) == 1
            and (bias is None or bias.shape == weight.shape[:1])
            and kernels_serve(self._backend, x)
        )

    def _ask(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self._asked:
            biased = self._asked[0][1] is not None
            results = [result for *_, result in self._asked]
            if (
                x is not self._x
                or len(self._asked) == _MOST
                or biased != (bias is not None)
                or any(_pending(t, results) for t in (weight, bias) if t is not None)
            ):
                self._launch()
        result = x.new_empty(*x.shape[:-1], weight.shape[0])
        self._x = x
        self._asked.append((weight, bias, result))
        if not self._together:
            self._launch()
        return result

    def _residual(self, *terms: Any) -> Tensor | None:
        """Return what is to be added to the only result that is asked for, if it can be."""
        *_, result = self._asked[0]
        others = [term for term in terms if term is not result]
        if len(self._asked) > 1 or len(terms) != 2 or len(others) != 1:
            return None
        (other,) = others
        alike = (
            type(other) is Tensor
            and other.shape == result.shape
            and other.dtype == result.dtype
            and other.device == result.device
            and other.is_contiguous()
        )
        return other if alike and not _pending(other, [result]) else None

    def _launch(self, **options: Tensor) -> None:
        asked, self._asked = self._asked, []
        if not asked:
            return
        assert self._x is not None
        weights, biases, results = zip(*asked, strict=True)
        given = None if biases[0] is None else biases
        device = self._x.device
        run = partial(self._backend.run, "decoding", "skinny_linear", device)
        run(self._x, weights, results, given, **options)
        self._x = None
