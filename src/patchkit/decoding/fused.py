"""RMS norms and gated MLPs of a model by one kernel each, in place of eight launches and two.

Which modules these are is not looked up by name. A stand-in with random weights runs the forward of
the module's own class on the CPU. Where the result equals, bit for bit, one of the formulas that a
kernel computes, the instance gets a forward that launches it. The kernels round where the formula
rounds; only the order of a float32 sum differs. Everything else keeps its own forward, and so does
every call that the kernels do not serve: on a CPU, with gradients, under autocast, compiled.

The MLP's projections stay modules of their own and are called as such, so adapters, quantised
weights and hooks on them work as before. Only for a few rows, and only plain Linears that nobody
has touched, gate and up-projection are read by one kernel.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from patchkit.decoding import reference
from patchkit.decoding.eligibility import is_plain, kernels_serve, untouched
from patchkit.decoding.reference import is_skinny
from patchkit.families import Family
from patchkit.journal import Journal

if TYPE_CHECKING:
    from patchkit.backends import Backend


_MOST_ROWS = 32768
"""Tokens that pass through an MLP at once: gate and up are the largest tensors of a prefill."""


@dataclass(frozen=True)
class Norm:
    """An RMS norm; see `reference.rms_norm`.

    Attributes:
        eps: Attribute of the module that holds the epsilon.
        offset: Added to the weight.
        round_first: Whether rounding precedes the product with the weight.
    """

    eps: str
    offset: float
    round_first: bool


@dataclass(frozen=True)
class GatedMLP:
    """`down_proj(act_fn(gate_proj(x)) * up_proj(x))`.

    Attributes:
        activation: A name in `reference.ACTIVATIONS`.
        act_fn: Class of the module that computes it.
    """

    activation: str
    act_fn: type


@dataclass(frozen=True)
class Fused:
    """What a fused module carries as `_patchkit`.

    Attributes:
        backend: Runs the kernel.
        formula: What the kernel computes.
        forward: The forward of the module's class that was found to compute the same.
    """

    backend: Backend
    formula: Any
    forward: Callable[..., Any]

    def serves(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Say whether a kernel computes this call."""
        if len(args) != 1 or kwargs or type(module).forward is not self.forward:
            return False
        return not module.training and kernels_serve(self.backend, args[0])


def rms_norm_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Normalise `[..., D]`; the forward of a fused norm."""
    fused: Fused = self.__dict__["_patchkit"]
    if not fused.serves(self, args, kwargs):
        return type(self).forward(self, *args, **kwargs)
    weight, formula = self.weight, fused.formula
    assert isinstance(formula, Norm)
    if args[0].dtype != weight.dtype or args[0].device != weight.device:
        return type(self).forward(self, *args, **kwargs)
    return fused.backend.run(
        "decoding",
        "rms_norm",
        weight.device,
        args[0],
        weight,
        eps=getattr(self, formula.eps),
        offset=formula.offset,
        round_first=formula.round_first,
    )


def gated_mlp_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Map `[..., D]` to `[..., D]`; the forward of a fused MLP."""
    fused: Fused = self.__dict__["_patchkit"]
    if not fused.serves(self, args, kwargs):
        return type(self).forward(self, *args, **kwargs)
    formula, act_fn = fused.formula, self.act_fn
    assert isinstance(formula, GatedMLP)
    if type(act_fn) is not formula.act_fn or not untouched(act_fn):
        return type(self).forward(self, *args, **kwargs)
    (x,) = args
    plain = all(_plain_linear(part) for part in (self.gate_proj, self.up_proj, self.down_proj))
    if plain and is_skinny(x) and _alike(x, self.gate_proj, self.up_proj):
        product = fused.backend.run(
            "decoding",
            "skinny_gated_linear",
            x.device,
            x,
            self.gate_proj.weight,
            self.up_proj.weight,
            self.gate_proj.bias,
            self.up_proj.bias,
            activation=formula.activation,
        )
        return self.down_proj(product)
    if x.shape[:-1].numel() <= _MOST_ROWS or not plain:
        return _gated_mlp_rows(self, fused.backend, formula.activation, x)
    out = torch.empty(*x.shape[:-1], self.down_proj.out_features, dtype=x.dtype, device=x.device)
    blocks = (tensor.reshape(-1, tensor.shape[-1]).split(_MOST_ROWS) for tensor in (x, out))
    for rows, into in zip(*blocks, strict=True):
        into.copy_(_gated_mlp_rows(self, fused.backend, formula.activation, rows))
    return out


def _gated_mlp_rows(self: nn.Module, backend: Backend, activation: str, x: Tensor) -> Tensor:
    gate = self.gate_proj(x)
    product = backend.run(
        "decoding",
        "gated_activation",
        gate.device,
        gate,
        self.up_proj(x),
        activation=activation,
        # The result of a plain Linear is ours alone.
        out=gate if _plain_linear(self.gate_proj) else None,
    )
    return self.down_proj(product)


def _plain_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear and untouched(module)


def _alike(x: Tensor, *linears: nn.Module) -> bool:
    """Say whether the weights are plain ones that can be read as they are, of the dtype of `x`."""
    given = [p for linear in linears for p in linear.parameters()]
    return all(is_plain(p) and p.dtype == x.dtype and p.stride(-1) == 1 for p in given)


_FORWARDS = {Norm: rms_norm_forward, GatedMLP: gated_mlp_forward}


def install(family: Family, backend: Backend, journal: Journal) -> dict[str, tuple[int, int]]:
    """Fuse every norm and gated MLP of the decoder that a formula describes.

    Args:
        family: Where the decoder is.
        backend: Runs the kernels.
        journal: Notes the edits.

    Returns:
        Fused modules, of how many, for `"norms"` and `"MLPs"`.
    """

    def group(module: nn.Module) -> str | None:
        kind = type(module).__name__
        if isinstance(module, nn.LayerNorm):  # which is one kernel already
            return None
        return "norms" if "Norm" in kind else "MLPs" if kind.endswith("MLP") else None

    counts = fuse(family, backend, journal, group, find_formula, _FORWARDS)
    return {name: counts[name] for name in ("norms", "MLPs") if name in counts}


def fuse(
    family: Family,
    backend: Backend,
    journal: Journal,
    group: Callable[[nn.Module], str | None],
    find: Callable[[nn.Module], Any],
    forwards: dict[type, Callable[..., Any]],
) -> dict[str, tuple[int, int]]:
    """Give modules of the decoder, where a formula is found for them, a forward that computes it.

    Args:
        family: Where the decoder is.
        backend: Runs the kernels.
        journal: Notes the edits.
        group: Names what a module is counted as; None leaves it alone.
        find: Finds the formula of a module, or None. Asked once for modules of the same settings.
        forwards: What to bind, by the class of the formula.

    Returns:
        Fused modules, of how many, by group.
    """
    formulas: dict[tuple[Any, ...], Any] = {}
    counts: dict[str, tuple[int, int]] = {}
    for name, module in family.decoder.named_modules():
        counted = group(module)
        if counted is None:
            continue
        key = _settings(module)
        if key not in formulas:
            formulas[key] = find(module)
        formula = formulas[key]
        # A forward of the instance's own belongs to somebody else, accelerate for one.
        served = formula is not None and "forward" not in vars(module)
        fused, total = counts.get(counted, (0, 0))
        counts[counted] = (fused + served, total + 1)
        if not served:
            continue
        label = f"{family.decoder_name}.{name}" if family.decoder_name else name
        held = Fused(backend, formula, type(module).forward)
        journal.set(module, "_patchkit", held, label=label)
        journal.set(module, "forward", MethodType(forwards[type(formula)], module), label=label)
        journal.set(module, "extra_repr", MethodType(_extra_repr, module), label=label)
    return counts


def remove_copies(model: nn.Module) -> None:
    """Take our forwards from modules that were copied off fused ones, as PEFT does, and stay."""
    for module in model.modules():
        held = vars(module)
        if isinstance(held.get("_patchkit"), Fused):
            for name in ("_patchkit", "forward", "extra_repr"):
                held.pop(name, None)


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """Describe all that the formula of a module may depend on."""
    plain = {n: v for n, v in vars(module).items() if isinstance(v, (bool, int, float, str))}
    plain.pop("training", None)
    shapes = tuple((n, p.shape) for n, p in module._parameters.items() if p is not None)
    return type(module), type(getattr(module, "act_fn", None)), shapes, *sorted(plain.items())


def _extra_repr(module: nn.Module) -> str:
    own = type(module).extra_repr(module)
    return f"{own}, patchkit" if own else "patchkit"


@torch.no_grad()
def find_formula(module: nn.Module) -> Norm | GatedMLP | None:
    """Find the formula that the class of `module` computes, by trying it on the CPU."""
    if not takes_one_argument(module):
        return None
    try:
        return _norm(module) if not module._modules else _gated_mlp(module)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None  # the stand-in lacks something that this class needs


def takes_one_argument(module: nn.Module) -> bool:
    """Say whether the forward of a class has no further arguments, which a trial would miss."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return [p.kind for p in parameters] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 2


class _Given(nn.Module):
    """Maps the input that is expected to a result that is known."""

    def __init__(self, x: Tensor, result: Tensor) -> None:
        super().__init__()
        self._x, self._result = x, result

    def forward(self, x: Tensor) -> Tensor:
        if x is not self._x:
            raise ValueError("another input was expected")
        return self._result.clone()


TRIED_SIZES = torch.tensor([[1.0], [1.0], [30.0], [1000.0]])
"""Factors for the rows of a trial: some classes clamp what is large."""


def random_input(generator: torch.Generator, *shape: int) -> Tensor:
    """Draw a bfloat16 tensor on the CPU."""
    return torch.randn(*shape, generator=generator).to(torch.bfloat16)


def stand_in(module: nn.Module, **held: Any) -> nn.Module:
    """Copy a module without its weights and hooks; `held` replaces parts of its `__dict__`."""
    twin = copy.copy(module)
    twin.__dict__.update(_buffers={}, _forward_hooks={}, _forward_pre_hooks={}, **held)
    return twin


def _norm(module: nn.Module) -> Norm | None:
    weights = module._parameters
    names = [name for name in ("variance_epsilon", "eps") if name in vars(module)]
    if set(weights) != {"weight"} or weights["weight"] is None or not names:
        return None
    generator = torch.Generator().manual_seed(0)
    weight = random_input(generator, *weights["weight"].shape)
    x = 0.01 * random_input(generator, 4, *weight.shape)  # small enough for the epsilon to matter
    twin = stand_in(module, _parameters={"weight": nn.Parameter(weight)})
    expected = type(module).forward(twin, x)
    for offset, round_first in ((0.0, True), (0.0, False), (1.0, False)):
        eps = getattr(module, names[0])
        options = {"eps": eps, "offset": offset, "round_first": round_first}
        if torch.equal(reference.rms_norm(x, weight, **options), expected):
            return Norm(names[0], offset, round_first)
    return None


def _gated_mlp(module: nn.Module) -> GatedMLP | None:
    parts = {"gate_proj", "up_proj", "down_proj", "act_fn"}
    if set(module._modules) != parts or module._parameters:
        return None
    generator = torch.Generator().manual_seed(0)
    x = random_input(generator, 4, 16)
    sizes = TRIED_SIZES.to(x.dtype)
    gate, up = (factor * sizes * random_input(generator, 4, 48) for factor in (4, 1))
    act_fn = module.act_fn
    held = {
        "gate_proj": _Given(x, gate),
        "up_proj": _Given(x, up),
        "down_proj": nn.Identity(),
        "act_fn": stand_in(act_fn),
    }
    expected = type(module).forward(stand_in(module, _modules=held), x)
    for activation in reference.ACTIVATIONS:
        if torch.equal(reference.gated_activation(gate, up, activation=activation), expected):
            return GatedMLP(activation, type(act_fn))
    return None
