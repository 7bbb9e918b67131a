"""Experts of a mixture, read in place: each token's own, by two kernels, while few tokens come.

transformers keeps the experts of a layer stacked. For a step it copies the weights that each token
chose to a place of their own (`batched_mm`), which costs three times their bytes; its other ways
sort tokens by expert, which serves prompts. An experts module whose forward was found, by trying
it, to compute what the kernels do gets a forward that launches them for a few tokens. More tokens,
and every other module, go the way that the configuration names.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from patchkit.decoding.eligibility import is_plain, kernels_serve, untouched
from patchkit.decoding.fused import TRIED_SIZES, Fused, fuse, random_input, stand_in
from patchkit.decoding.reference import ACTIVATIONS, MOST_SKINNY_ROWS
from patchkit.families import Family
from patchkit.journal import Journal
from patchkit.moe import reference

if TYPE_CHECKING:
    from patchkit.backends import Backend

_LAYOUT = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
    "_is_expert_parallel": False,
}
"""What transformers notes of an experts module: one weight of gates and up-projections, no bias."""


@dataclass(frozen=True)
class GatedExperts:
    """An experts module.

    Attributes:
        activation: Of the gate, a key of `ACTIVATIONS`.
    """

    activation: str


def experts_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Map `[T, D]` to `[T, D]`; the forward of a fused experts module."""
    fused: Fused = self.__dict__["_patchkit"]
    formula = fused.formula
    assert isinstance(formula, GatedExperts)
    if kwargs or len(args) != 3 or not _serves(self, fused, *args):
        return type(self).forward(self, *args, **kwargs)
    x, index, scores = args
    run, device = fused.backend.run, x.device
    activation = {"activation": formula.activation}
    found = run("moe", "gated_experts", device, x, self.gate_up_proj, index, **activation)
    return run("moe", "combined_experts", device, found, self.down_proj, index, scores)


def _serves(module: nn.Module, fused: Fused, x: Tensor, index: Tensor, scores: Tensor) -> bool:
    weights = (module.gate_up_proj, module.down_proj)
    return (
        kernels_serve(fused.backend, x)
        and type(module).forward is fused.forward
        and not module.training
        and x.ndim == 2
        and is_plain(x)
        and not getattr(module, "_is_expert_parallel", False)  # 5.17 does not note it
        and untouched(module.act_fn)
        and 0 < len(x) <= MOST_SKINNY_ROWS
        and index.dtype == torch.int64
        and scores.dtype in (x.dtype, torch.float32)
        and all(
            is_plain(w) and w.dtype == x.dtype and w.device == x.device and w.stride(2) == 1
            for w in weights
        )
    )


def install(family: Family, backend: Backend, journal: Journal) -> dict[str, tuple[int, int]]:
    """Fuse every experts module of the decoder that the kernels describe.

    Args:
        family: Where the decoder is.
        backend: Runs the kernels.
        journal: Notes the edits.

    Returns:
        Fused modules, of how many, for `"expert layers"`.
    """

    def group(module: nn.Module) -> str | None:
        return "expert layers" if type(module).__name__.endswith("Experts") else None

    return fuse(family, backend, journal, group, find_formula, {GatedExperts: experts_forward})


@torch.no_grad()
def find_formula(module: nn.Module) -> GatedExperts | None:
    """Find what the class of `module` computes, by trying its own loop over experts on the CPU."""
    if any(getattr(module, name, value) != value for name, value in _LAYOUT.items()):
        return None
    if set(module._parameters) != {"gate_up_proj", "down_proj"} or set(module._modules) != {
        "act_fn"
    }:
        return None
    own = inspect.unwrap(type(module).forward)  # without the dispatch by configuration
    generator = torch.Generator().manual_seed(0)
    experts, inner, width = 3, 24, 16
    gate_up = random_input(generator, experts, 2 * inner, width).double()
    down = random_input(generator, experts, width, inner).double()
    x = TRIED_SIZES * random_input(generator, 4, width).double()
    index = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1]])
    scores = random_input(generator, 4, 2).double()
    sizes = {"num_experts": experts, "hidden_dim": width, "intermediate_dim": inner}
    held = {"gate_up_proj": nn.Parameter(gate_up), "down_proj": nn.Parameter(down)}
    twin = stand_in(
        module, _parameters=held, **{n: v for n, v in sizes.items() if n in vars(module)}
    )
    try:
        expected = own(twin, x, index, scores)
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError):
        return None  # the stand-in lacks something that this class needs
    for activation in ACTIVATIONS:
        found = reference.gated_experts(x, gate_up, index, activation=activation)
        error = (reference.combined_experts(found, down, index, scores) - expected).abs()
        if (error <= 1e-9 * expected.abs().amax(-1, keepdim=True)).all():
            return GatedExperts(activation)
    return None
