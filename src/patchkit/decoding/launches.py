"""What a decoding step launches: linear maps that stream weights, and several things at once.

A step at a small batch reads every weight once. cuBLAS is made for matrices; a kernel that only has
to stream a weight does so at the rate of a copy. A step does not care which module or adapter asks,
so no module is edited: while a step runs, calls of `torch.nn.functional.linear` are answered.

Where all modules look at tensors through torch alone, a launch waits until somebody looks at its
result: a function of torch that reads elements, or an operation of a `Backend`. So maps of the same
rows that follow each other, as those of queries, keys and values do, are one launch, and adding a
residual is part of it, as it is of summing up experts. What lies between these and attention, norms
of the heads, rotary embedding and the store's append, is another.

Whatever was handed out is written in the end, also where it was only on the way to something else,
unless a launch raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from patchkit.attention.reference.step import rotary_append_fits
from patchkit.backends import Backend
from patchkit.decoding.eligibility import global_hooks, is_plain, kernels_serve
from patchkit.decoding.reference import is_skinny, rotary_outs

_KNOWN = ("torch", "transformers", "peft", "patchkit")
_INTEGRATIONS = "transformers.integrations"
_MOST_WEIGHTS = 3  # that the kernel takes at once
_WITH_RESIDUAL = ("skinny_linear", "combined_experts")  # operations that can add one

_PROPERTIES = ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")
_BLIND = frozenset(
    [
        *(Tensor.view, Tensor.transpose, Tensor.expand),
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride),
        *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
    ]
)
"""Functions that look at no element of a tensor."""


def _blind(func: Callable[..., Any], args: Sequence[Any]) -> bool:
    """Say whether a call looks at no element of a tensor."""
    return func in _BLIND or (func is Tensor.reshape and args[0].is_contiguous())


def looks_through_torch(model: nn.Module) -> bool:
    """Say whether nothing in a model but torch's own functions reads the memory of a tensor.

    That is known of the forwards and hooks that torch, transformers and PEFT bring, but for
    transformers' integrations of other libraries, and unless they are TorchScript, whose calls no
    mode sees. A scripted function inside of them is not found.
    """
    code: list[Any] = []
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            return False
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        code += (type(module), module.forward, *hooks)
    files = {getattr(part, "__module__", None) or "" for part in code}
    return not global_hooks() and all(
        file.partition(".")[0] in _KNOWN and not file.startswith(_INTEGRATIONS) for file in files
    )


@dataclass(eq=False)
class _Launch:
    """An operation that waits.

    Attributes:
        area: Of the operation.
        op: Its name.
        args: Its arguments.
        options: Its keyword arguments.
        results: One more, what it writes, which has been handed out.
    """

    backend: Backend
    area: str
    op: str
    args: tuple[Any, ...]
    options: dict[str, Any]
    results: dict[str, Any]

    @property
    def outs(self) -> Sequence[Tensor]:
        (outs,) = self.results.values()
        return [outs] if isinstance(outs, Tensor) else outs

    @property
    def read(self) -> Iterable[Tensor]:
        """Every tensor that it reads."""
        for given in (*self.args, *self.options.values()):
            for part in given if isinstance(given, (list, tuple)) else (given,):
                if isinstance(part, Tensor):
                    yield part

    def run(self) -> None:
        device, given = self.outs[0].device, self.options | self.results
        self.backend.run(self.area, self.op, device, *self.args, **given)


def _is_of(tensor: Tensor, results: Iterable[Tensor]) -> bool:
    """Say whether a tensor is, or is a view of, one of the results."""
    storage = tensor.untyped_storage().data_ptr()
    return any(storage == result.untyped_storage().data_ptr() for result in results)


def _is_all_of(tensor: Tensor, result: Tensor) -> bool:
    """Say whether a tensor is a result, perhaps of another shape."""
    same = tensor.data_ptr() == result.data_ptr() and tensor.numel() == result.numel()
    return same and tensor.dtype == result.dtype and tensor.is_contiguous()


def _same_rows(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors are the same rows, with dimensions of size 1 perhaps elsewhere."""
    sizes = [[n for n in x.shape[:-1] if n != 1] + [x.shape[-1]] for x in (a, b)]
    return a.data_ptr() == b.data_ptr() and sizes[0] == sizes[1] and a.is_contiguous()


class StepLaunches(TorchFunctionMode):
    """Inside, `linear` maps a few rows by `skinny_linear` where a kernel serves.

    Norms of heads, rotary embeddings and the store's append wait for each other too.

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
        if func is Backend.run and self._together:
            return self._operation(*args, **(kwargs or {}))
        if self._waiting and not _blind(func, args):
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
            biases: list[Tensor] | None = None if bias is None else []
            results: dict[str, Any] = {"outs": []}
            options: dict[str, Any] = {"biases": biases}
            launch = _Launch(self._backend, "decoding", "skinny_linear", (x, []), options, results)
            self._waiting.append(launch)
        result = x.new_empty(*x.shape[:-1], weight.shape[0])
        launch.args[1].append(weight)
        launch.results["outs"].append(result)
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
                and len(launch.outs) < _MOST_WEIGHTS
                and (launch.options["biases"] is None) == (len(given) == 1)
                and not any(_is_of(tensor, results) for tensor in given)
            ):
                return launch
        return None

    def _residual(self, *terms: Any) -> Tensor | None:
        """Return what is to be added to the only result that waits, if it can be."""
        results = [out for launch in self._waiting for out in launch.outs]
        if len(results) > 1 or self._waiting[0].op not in _WITH_RESIDUAL:
            return None
        (result,) = results
        if len(terms) != 2 or not all(type(term) is Tensor for term in terms):
            return None
        others = [term for term in terms if not _is_all_of(term, result)]
        if len(others) != 1:
            return None
        (other,) = others
        alike = (
            terms[0].shape == terms[1].shape
            and other.dtype == result.dtype
            and other.device == result.device
            and other.is_contiguous()
        )
        return other if alike and not _is_of(other, results) else None

    # -- operations of a backend ------------------------------------------------------------

    def _operation(
        self, backend: Backend, area: str, op: str, device: torch.device, *args: Any, **options: Any
    ) -> Any:
        """Answer `Backend.run`: let an operation wait, or run it with or after what waits."""
        results: dict[str, Any] | None = None
        given = options.keys() & {"out", "outs", "total"}
        if (area, op) == ("decoding", "rms_norm") and not given:
            results = self._norm_results(*args)
        elif (area, op) == ("moe", "combined_experts") and not given:
            results = self._experts_results(*args)
        elif (area, op) == ("decoding", "rotary") and not given:
            results = self._rotary_results(*args, **options)
        elif (area, op) == ("attention", "append") and (
            whole := self._rotary_append(*args, **options)
        ) is not None:
            op, (args, options) = "rotary_append", whole
        if results is not None:
            self._waiting.append(_Launch(backend, area, op, args, options, results))
            return next(iter(results.values()))
        self._settle()
        return backend.run(area, op, device, *args, **options)

    def _norm_results(self, x: Tensor, weight: Tensor) -> dict[str, Any] | None:
        """Allocate the result of a norm that waits: one of heads, or of what waits itself."""
        outs = [out for launch in self._waiting for out in launch.outs]
        return {"out": x.new_empty(x.shape)} if x.ndim == 4 or _is_of(x, outs) else None

    def _experts_results(
        self, x: Tensor, weight: Tensor, index: Tensor, scores: Tensor
    ) -> dict[str, Any]:
        """Allocate the result of experts, which wait for a residual."""
        return {"out": x.new_empty(len(index), weight.shape[1])}

    def _rotary_results(
        self, q: Tensor, k: Tensor, *_: Tensor, contiguous: bool = False, **options: Any
    ) -> dict[str, Any] | None:
        """Allocate the results of a rotation that waits: of one token per row."""
        return {"outs": rotary_outs(q, k, contiguous=contiguous)} if q.shape[2] == 1 else None

    def _rotary_append(
        self,
        keys: Tensor,
        values: Tensor,
        position: Tensor,
        length: Tensor,
        seen: Tensor,
        new_keys: Tensor,
        new_values: Tensor,
        valid: Tensor | None = None,
        start: int | None = None,
        list_start: Tensor | None = None,
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Take what `append` waits for off the list, if one launch can do all.

        Returns:
            The arguments of `rotary_append`, or None.
        """
        rotation = self._waiting[-1] if self._waiting else None
        if rotation is None or rotation.op != "rotary" or rotation.outs[1] is not new_keys:
            return None
        *heads, cos, sin = rotation.args
        options = {name: v for name, v in rotation.options.items() if name != "contiguous"}
        norms, weights, normed = self._norms(*heads), None, None
        if norms is not None:
            options |= norms[0].options
            weights, normed = [norm.args[1] for norm in norms], heads
            given = [norm.args[0] for norm in norms]  # perhaps [B, 1, H, D]
            heads = [x.view(like.shape) for x, like in zip(given, heads, strict=True)]
        taken = (rotation, *(norms or ()))
        rest = [launch for launch in self._waiting if launch not in taken]
        read = (*heads, new_values, cos, sin, *(x for launch in rest for x in launch.read))
        written = [out for launch in taken for out in launch.outs]
        args = (keys, values, position, length, seen, *heads, new_values, cos, sin, rotation.outs)
        args += (list_start, weights, normed)
        if (
            valid is not None
            or any(_is_of(x, written) for x in read)
            or not rotary_append_fits(*args, table=options.get("table", "full"))
        ):
            return None
        self._waiting = rest
        return args, options

    def _norms(self, *heads: Tensor) -> list[_Launch] | None:
        """Find the waiting norms, alike, whose results are the heads."""
        waiting = [launch for launch in self._waiting if launch.op == "rms_norm"]
        norms = [norm for x in heads for norm in waiting if _same_rows(norm.outs[0], x)]
        alike = len(norms) == len(heads) and all(n.options == norms[0].options for n in norms)
        return norms if alike else None
