"""What a decoding step launches: linear maps that stream their weights, and several things at once.

A step at a small batch reads every weight once. cuBLAS is made for matrices; a kernel that only has
to stream a weight does so at the rate of a copy. A step does not care which module or adapter asks,
so no module is edited: while a step runs, calls of `torch.nn.functional.linear` are answered.

Where all modules look at tensors through torch alone, a launch waits until somebody looks at its
result: a function of torch that reads elements, or an operation of a `Backend`. So maps of the same
rows that follow each other, as those of queries, keys and values do, are one launch, and adding a
residual is part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from patchkit.backends import Backend
from patchkit.decoding.eligibility import global_hooks, is_plain, kernels_serve
from patchkit.decoding.reference import is_skinny

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


@dataclass(eq=False)
class _Launch:
    """An operation that waits.

    Attributes:
        op: Its name, in the area `"decoding"`.
        args: Its arguments.
        options: Its keyword arguments, `outs` among them: the results, which were handed out.
    """

    backend: Backend
    op: str
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def outs(self) -> Sequence[Tensor]:
        outs: Sequence[Tensor] = self.options["outs"]
        return outs

    def run(self) -> None:
        device = self.outs[0].device
        self.backend.run("decoding", self.op, device, *self.args, **self.options)


def _is_of(tensor: Tensor, results: Iterable[Tensor]) -> bool:
    """Say whether a tensor is, or is a view of, one of the results."""
    storage = tensor.untyped_storage().data_ptr()
    return any(storage == result.untyped_storage().data_ptr() for result in results)


class StepLaunches(TorchFunctionMode):
    """Inside, `linear` maps a few rows by `skinny_linear` where a kernel serves.

    Args:
        backend: Runs the kernels.
        together: Wait with a launch until somebody looks at the result through torch or a
            `Backend`, for what else can be part of it. Extensions that read memory by themselves
            would come too early.
    """

    def __init__(self, backend: Backend, together: bool = False) -> None:
        super().__init__()
        self._backend, self._together = backend, together
        self._waiting: list[_Launch] = []  # in the order in which they can be launched

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Answer a call of a function of torch, or of `Backend.run`."""
        if func is F.linear and not kwargs and self._serves(*args):
            return self._linear(*args)
        if self._waiting and func not in _BLIND:
            if (
                func == Tensor.add
                and not kwargs
                and (residual := self._residual(*args)) is not None
            ):
                total = torch.empty_like(residual)
                self._waiting[0].options |= {"residual": residual, "total": total}
                self._settle()
                return total
            self._settle()
        return func(*args, **(kwargs or {}))

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Launch what nobody has looked at."""
        super().__exit__(kind, error, trace)
        if kind is None:
            self._settle()

    def _settle(self) -> None:
        """Launch what waits."""
        waiting, self._waiting = self._waiting, []
        for launch in waiting:
            launch.run()

    # -- linear maps ------------------------------------------------------------------------

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

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        given = [weight] if bias is None else [weight, bias]
        launch = self._maps_of(x, given)
        if launch is None:
            self._settle()
            options: dict[str, Any] = {"outs": [], "biases": None if bias is None else []}
            launch = _Launch(self._backend, "skinny_linear", (x, []), options)
            self._waiting.append(launch)
        result = x.new_empty(*x.shape[:-1], weight.shape[0])
        launch.args[1].append(weight)
        launch.options["outs"].append(result)
        if bias is not None:
            launch.options["biases"].append(bias)
        if not self._together:
            self._settle()
        return result

    def _maps_of(self, x: Tensor, given: Sequence[Tensor]) -> _Launch | None:
        """Find the waiting maps of `x` that one by a weight and perhaps a bias can join."""
        results = [out for launch in self._waiting for out in launch.outs]
        for launch in self._waiting:
            if (
                launch.op == "skinny_linear"
                and launch.args[0] is x
                and len(launch.outs) < _MOST
                and (launch.options["biases"] is None) == (len(given) == 1)
                and not any(_is_of(tensor, results) for tensor in given)
            ):
                return launch
        return None

    def _residual(self, *terms: Any) -> Tensor | None:
        """Return what is to be added to the only result that waits, if it can be."""
        results = [out for launch in self._waiting for out in launch.outs]
        if len(results) > 1 or self._waiting[0].op != "skinny_linear":
            return None
        (result,) = results
        others = [term for term in terms if term is not result]
        if len(terms) != 2 or len(others) != 1:
            return None
        (other,) = others
        alike = (
            type(other) is Tensor
            and other.shape == result.shape
            and other.dtype == result.dtype
            and other.device == result.device
            and other.is_contiguous()
        )
        return other if alike and not _is_of(other, results) else None
