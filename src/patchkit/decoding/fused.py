"""RMS norms and gated MLPs of a model by one kernel each, in place of eight launches and two.

Which modules these are is not looked up by name. A stand-in with random weights runs the forward of
the module's own class on the CPU. Where the result equals, bit for bit, one of the formulas that a
kernel computes, the instance gets a forward that launches it. The kernels round where the formula
rounds; only the order of a float32 sum differs. Everything else keeps its own forward, and so does
every call that the kernels do not serve: on a CPU, with gradients, under autocast, compiled.

The MLP's projections stay modules of their own and are called as such, so adapters, quantised
weights and hooks on them work as before.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from patchkit.decoding import reference
from patchkit.families import Family
from patchkit.journal import Journal

if TYPE_CHECKING:
    from patchkit.backends import Backend


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
    """

    activation: str


@dataclass(frozen=True)
class Fused:
    """What a fused module carries as `_patchkit`."""

    backend: Backend
    formula: Any

    def serves(self, x: Tensor) -> bool:
        """Say whether a kernel computes this call."""
        return (
            self.backend.choose(x.device) == "triton"
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(x.device.type)
            and not torch.compiler.is_compiling()
        )


def rms_norm_forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """Normalise `[..., D]`; the forward of a fused norm."""
    fused: Fused = self.__dict__["_patchkit"]
    weight, formula = self.weight, fused.formula
    if hidden_states.dtype != weight.dtype or not fused.serves(hidden_states):
        return type(self).forward(self, hidden_states)
    return fused.backend.run(
        "decoding",
        "rms_norm",
        hidden_states.device,
        hidden_states,
        weight,
        eps=getattr(self, formula.eps),
        offset=formula.offset,
        round_first=formula.round_first,
    )


def gated_mlp_forward(self: nn.Module, x: Tensor) -> Tensor:
    """Map `[..., D]` to `[..., D]`; the forward of a fused MLP."""
    fused: Fused = self.__dict__["_patchkit"]
    if not fused.serves(x):
        return type(self).forward(self, x)
    gate = self.gate_proj(x)
    # These are the largest tensors of a prefill. Nobody else holds the gate, unless by a hook.
    mine = not self.gate_proj._forward_hooks and gate.is_contiguous()
    product = fused.backend.run(
        "decoding",
        "gated_activation",
        gate.device,
        gate,
        self.up_proj(x),
        activation=fused.formula.activation,
        out=gate if mine else None,
    )
    return self.down_proj(product)


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
    formulas: dict[tuple[type, type], Norm | GatedMLP | None] = {}
    counts = {"norms": [0, 0], "MLPs": [0, 0]}
    for name, module in family.decoder.named_modules():
        kind = type(module).__name__
        group = "norms" if "Norm" in kind else "MLPs" if kind.endswith("MLP") else None
        if group is None or isinstance(module, nn.LayerNorm):  # which is one kernel already
            continue
        key = type(module), type(getattr(module, "act_fn", None))
        if key not in formulas:
            formulas[key] = find_formula(module)
        formula = formulas[key]
        counts[group][1] += 1
        # A forward of the instance's own belongs to somebody else, accelerate for one.
        if formula is None or "forward" in vars(module):
            continue
        label = f"{family.decoder_name}.{name}" if family.decoder_name else name
        forward = MethodType(_FORWARDS[type(formula)], module)
        journal.set(module, "_patchkit", Fused(backend, formula), label=label)
        journal.set(module, "forward", forward, label=label)
        journal.set(module, "extra_repr", MethodType(_extra_repr, module), label=label)
        counts[group][0] += 1
    return {group: (fused, total) for group, (fused, total) in counts.items() if total}


def _extra_repr(module: nn.Module) -> str:
    own = type(module).extra_repr(module)
    return f"{own}, patchkit" if own else "patchkit"


@torch.no_grad()
def find_formula(module: nn.Module) -> Norm | GatedMLP | None:
    """Find the formula that the class of `module` computes, by trying it on the CPU."""
    try:
        return _norm(module) if not module._modules else _gated_mlp(module)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None  # the stand-in lacks something that this class needs


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator).to(torch.bfloat16)


def _stand_in(module: nn.Module, **held: Any) -> nn.Module:
    """Copy a module without its weights; `held` replaces parts of its `__dict__`."""
    twin = copy.copy(module)
    twin.__dict__.update(_buffers={}, **held)
    return twin


def _norm(module: nn.Module) -> Norm | None:
    weights = module._parameters
    names = [name for name in ("variance_epsilon", "eps") if name in vars(module)]
    if set(weights) != {"weight"} or weights["weight"] is None or not names:
        return None
    generator = torch.Generator().manual_seed(0)
    weight = _random(generator, 64)
    x = 0.01 * _random(generator, 4, 64)  # small enough for the epsilon to matter
    twin = _stand_in(module, _parameters={"weight": nn.Parameter(weight)})
    expected = type(module).forward(twin, x)
    for offset, round_first in ((0.0, True), (0.0, False), (1.0, False)):
        eps = getattr(module, names[0])
        options = {"eps": eps, "offset": offset, "round_first": round_first}
        if torch.equal(reference.rms_norm(x, weight, **options), expected):
            return Norm(names[0], offset, round_first)
    return None


def _gated_mlp(module: nn.Module) -> GatedMLP | None:
    if not {"gate_proj", "up_proj", "down_proj"} <= set(module._modules):
        return None
    generator = torch.Generator().manual_seed(0)
    x = _random(generator, 4, 16)
    held: dict[str, Any] = dict(module._modules)
    for name, width_in, width_out in (
        ("gate_proj", 16, 48),
        ("up_proj", 16, 48),
        ("down_proj", 48, 16),
    ):
        # Initialising the weights would draw from the caller's random numbers.
        held[name] = skip_init(nn.Linear, width_in, width_out, bias=False, dtype=x.dtype)
        held[name].weight.copy_(_random(generator, width_out, width_in))
    expected = type(module).forward(_stand_in(module, _modules=held), x)
    for activation in reference.ACTIVATIONS:
        gate, up = held["gate_proj"](x), held["up_proj"](x)
        product = reference.gated_activation(gate, up, activation=activation)
        if torch.equal(held["down_proj"](product), expected):
            return GatedMLP(activation)
    return None
