"""Rotary embedding of queries and keys by one kernel, in place of eight launches.

The attention forwards of transformers call a function of their own file for it, most often
`apply_rotary_pos_emb`. As in `fused`, what it computes is found by trying it. The instance then
runs a twin of its class's forward: the same code, decorators included, for which that name means a
method of `FusedRotary`. Any other global name means what it means to the class at that moment.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import CellType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from patchkit.decoding import reference
from patchkit.decoding.eligibility import kernels_serve, untouched
from patchkit.decoding.fused import random_input
from patchkit.families import Family
from patchkit.journal import Journal

if TYPE_CHECKING:
    from patchkit.backends import Backend


@dataclass(frozen=True)
class Rotary:
    """A rotary embedding; the fields but the last are arguments of `reference.rotary`.

    Attributes:
        partial: Whether cos and sin may be narrower than a head, the rest of which stays as it is.
    """

    interleaved: bool
    table: reference.Table
    wide: bool
    contiguous: bool
    partial: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `reference.rotary`."""
        return {name: value for name, value in vars(self).items() if name != "partial"}

    def fits(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
        """Say whether the kernel takes these, and the function that it stands for too."""
        whole = reference.rotated_elements(cos, self.table) == q.shape[-1]
        return reference.rotary_fits(q, k, cos, sin, table=self.table) and (whole or self.partial)


class FusedRotary:
    """What attention modules of one class carry as `_patchkit_rotary`.

    Args:
        backend: Runs the kernel.
        forward: The forward of the class.
        name: What it calls the function that rotates.
        function: That function.
        formulas: What it computes, by whether cos and sin are wider than the queries.

    Attributes:
        twin: The forward with `rotate` in place of the function.

    Raises:
        TypeError: A decorator of the forward cannot be rebuilt.
    """

    def __init__(
        self,
        backend: Backend,
        forward: Callable[..., Any],
        name: str,
        function: Callable[..., Any],
        formulas: dict[bool, Rotary],
    ) -> None:
        self.backend, self.forward = backend, forward
        self.name, self.function, self.formulas = name, function, formulas
        self._globals = inspect.unwrap(forward).__globals__
        # Where torch.compile has given up on a module, it still compiles what the module calls.
        self.twin = torch.compiler.disable(_twin(forward, {name: self.rotate}))

    @property
    def current(self) -> Callable[..., Any]:
        """The function that rotates in the forward of the class, as of now."""
        function: Callable[..., Any] = self._globals[self.name]
        return function

    def rotate(self, *args: Any, **kwargs: Any) -> Any:
        """Rotate queries and keys by the kernel, or by the function where it does not serve."""
        function = self.current
        if function is self.function and _plain(function) and len(args) == 4 and not kwargs:
            q, _, cos, _ = args
            formula = self.formulas.get(cos.dtype != q.dtype)
            if formula is not None and kernels_serve(self.backend, q) and formula.fits(*args):
                return self.backend.run("decoding", "rotary", q.device, *args, **formula.options)
        return function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedRotary:
        backend = copy.deepcopy(self.backend, memo)
        return FusedRotary(backend, self.forward, self.name, self.function, self.formulas)


def attention_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Attend; the forward of a module whose rotary embedding is fused."""
    fused: FusedRotary = self.__dict__["_patchkit_rotary"]
    forward = type(self).forward
    if forward is not fused.forward or self.training or torch.compiler.is_compiling():
        return forward(self, *args, **kwargs)
    return fused.twin(self, *args, **kwargs)


def install(family: Family, backend: Backend, journal: Journal) -> dict[str, tuple[int, int]]:
    """Fuse the rotary embedding of every attention module that a formula describes.

    Args:
        family: Where the attention modules are.
        backend: Runs the kernel.
        journal: Notes the edits.

    Returns:
        Fused embeddings, of how many, for `"rotary embeddings"`, unless there are none.
    """
    found: dict[Callable[..., Any], FusedRotary | None] = {}
    fused = total = 0
    for label, module in family.attention.items():
        forward = type(module).forward
        if not _names(forward):
            continue
        total += 1
        if forward not in found:
            found[forward] = _find(forward, backend)
        # A forward of the instance's own belongs to somebody else, accelerate for one.
        if found[forward] is None or "forward" in vars(module):
            continue
        journal.set(module, "_patchkit_rotary", found[forward], label=label)
        journal.set(module, "forward", MethodType(attention_forward, module), label=label)
        fused += 1
    return {"rotary embeddings": (fused, total)} if total else {}


def remove_copies(model: nn.Module) -> None:
    """Take our forwards from modules that were copied off fused ones, as PEFT does, and stay."""
    for module in model.modules():
        if vars(module).pop("_patchkit_rotary", None) is not None:
            vars(module).pop("forward", None)


def _names(forward: Callable[..., Any]) -> list[str]:
    """Name the functions that rotate in a forward."""
    code = inspect.unwrap(forward).__code__
    return [name for name in code.co_names if name.startswith("apply_rotary")]


def _find(forward: Callable[..., Any], backend: Backend) -> FusedRotary | None:
    names = _names(forward)
    function = inspect.unwrap(forward).__globals__.get(names[0])
    if len(names) > 1 or not _plain(function):
        return None
    formulas = {wider: find_formula(function, wider) for wider in (False, True)}
    served = {wider: formula for wider, formula in formulas.items() if formula is not None}
    try:
        return FusedRotary(backend, forward, names[0], function, served) if served else None
    except (TypeError, ValueError):  # ValueError: a decorator with an empty cell
        return None


def _plain(function: Any) -> bool:
    """Say whether calling a function, or the module that `kernels` makes of it, runs its code."""
    return isinstance(function, FunctionType) or (
        isinstance(function, nn.Module) and untouched(function)
    )


@torch.no_grad()
def find_formula(function: Callable[..., Any], wider: bool) -> Rotary | None:
    """Find the formula that a function of queries, keys, cos and sin computes, by trying it.

    Args:
        function: Takes and returns what `reference.rotary` does.
        wider: Try it with float32 cos and sin, or else in bfloat16 as queries and keys.
    """
    generator = torch.Generator().manual_seed(0)
    q, k = (random_input(generator, 2, 5, heads, 16).transpose(1, 2) for heads in (3, 2))
    choices = ((False, True), get_args(reference.Table), (False, True), (False, True))
    formulas = [Rotary(*choice) for choice in itertools.product(*choices)]
    taken = []
    for width in (16, 8):
        cos, sin = (random_input(generator, 2, 5, width) for _ in range(2))
        if wider:
            cos, sin = cos.float(), sin.float()
        try:
            results = function(q, k, cos, sin)
        except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):
            continue  # not every function takes every width
        taken.append(cos)
        formulas = [f for f in formulas if _computes(f, (q, k, cos, sin), results)]
    if not taken or not formulas:
        return None
    rotated = [reference.rotated_elements(cos, formulas[0].table) for cos in taken]
    return replace(formulas[0], partial=min(rotated) < q.shape[-1])


def _computes(formula: Rotary, args: tuple[Tensor, ...], results: Any) -> bool:
    if not isinstance(results, tuple) or len(results) != 2:
        return False
    return reference.rotary_fits(*args, table=formula.table) and all(
        got.dtype == want.dtype and got.stride() == want.stride() and torch.equal(got, want)
        for got, want in zip(results, reference.rotary(*args, **formula.options), strict=True)
    )


class _Globals(dict[str, Any]):
    """The globals of a file as they are at any moment, except for `names`."""

    def __init__(self, live: dict[str, Any], names: dict[str, Any]) -> None:
        # The interpreter itself reads `__name__` and its like, and asks no `__missing__` for them.
        super().__init__({n: v for n, v in live.items() if n.startswith("__")} | names)
        self._live = live

    def __missing__(self, name: str) -> Any:
        return self._live[name]


def _twin(function: Callable[..., Any], names: dict[str, Any]) -> Callable[..., Any]:
    """Rebuild a function and its decorators, so that some of its global names mean `names`."""
    if not isinstance(function, FunctionType):
        raise TypeError(f"expected a function, got {function!r}")
    scope, cells = function.__globals__, function.__closure__ or ()
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        scope = _Globals(scope, names)
    else:
        held = [cell.cell_contents is inner for cell in cells]
        if not any(held):
            raise TypeError(f"{function!r} does not hold the function that it wraps")
        twin = _twin(inner, names)
        cells = tuple(
            CellType(twin) if is_inner else cell for cell, is_inner in zip(cells, held, strict=True)
        )
    rebuilt = FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, cells
    )
    rebuilt.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(rebuilt, function)
