"""Routers of mixtures of experts: softmax and choice by one kernel, in place of five launches.

What a router computes from its logits is found by trying it, as in `patchkit.decoding.fused`. The
logits stay the result of `torch.nn.functional.linear`, which a step answers in its own way.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchkit.decoding.eligibility import is_plain
from patchkit.decoding.fused import Fused, fuse, random_input, stand_in, takes_one_argument
from patchkit.families import Family
from patchkit.journal import Journal
from patchkit.moe import reference

if TYPE_CHECKING:
    from patchkit.backends import Backend


@dataclass(frozen=True)
class TopExperts:
    """A router; see `reference.top_experts`.

    Attributes:
        normalised: Whether the scores of a token add up to 1.
        rounded: Whether scores have the dtype of the logits, or else float32.
        norm_topk_prob: The attribute of that name, by which some classes decide on the first.
    """

    normalised: bool
    rounded: bool
    norm_topk_prob: bool | None


def router_forward(self: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Map `[T, D]` to logits `[T, E]`, scores and index `[T, k]`; the forward of a fused router."""
    fused: Fused = self.__dict__["_patchkit"]
    formula = fused.formula
    assert isinstance(formula, TopExperts)
    if not fused.serves(self, args, kwargs) or not _serves(self, formula, *args):
        return type(self).forward(self, *args, **kwargs)
    (x,) = args
    logits = F.linear(x, self.weight)
    options = {"normalised": formula.normalised, "rounded": formula.rounded}
    return logits, *fused.backend.run("moe", "top_experts", x.device, logits, self.top_k, **options)


def _serves(module: nn.Module, formula: TopExperts, x: Tensor) -> bool:
    weight = module.weight
    return (
        x.ndim == 2
        and is_plain(x)
        and is_plain(weight)
        and weight.dtype == x.dtype
        and weight.device == x.device
        and 1 <= module.top_k <= weight.shape[0] <= reference.MOST_EXPERTS
        and getattr(module, "norm_topk_prob", None) == formula.norm_topk_prob
    )


def install(family: Family, backend: Backend, journal: Journal) -> dict[str, tuple[int, int]]:
    """Fuse every router of the decoder that a formula describes.

    Args:
        family: Where the decoder is.
        backend: Runs the kernel.
        journal: Notes the edits.

    Returns:
        Fused modules, of how many, for `"routers"`.
    """

    def group(module: nn.Module) -> str | None:
        return "routers" if type(module).__name__.endswith("Router") else None

    return fuse(family, backend, journal, group, find_formula, {TopExperts: router_forward})


@torch.no_grad()
def find_formula(module: nn.Module) -> TopExperts | None:
    """Find the formula that the class of `module` computes, by trying it on the CPU."""
    if set(module._parameters) != {"weight"} or module._modules or not takes_one_argument(module):
        return None
    top_k, weight, width = vars(module).get("top_k"), module._parameters["weight"], 16
    if type(top_k) is not int or weight is None or weight.ndim != 2:
        return None
    generator = torch.Generator().manual_seed(0)
    weight = random_input(generator, len(weight), width)
    x = random_input(generator, 16, width)
    twin = stand_in(module, _parameters={"weight": nn.Parameter(weight)})
    if "hidden_dim" in vars(module):
        twin.__dict__["hidden_dim"] = width
    try:
        logits, scores, index = type(module).forward(twin, x)
        if not torch.equal(logits, F.linear(x, weight)) or index.dtype != torch.int64:
            return None
        for normalised, rounded in itertools.product((False, True), repeat=2):
            options = {"normalised": normalised, "rounded": rounded}
            found, chosen = reference.top_experts(logits, top_k, **options)
            same = scores.dtype == found.dtype and torch.equal(scores, found)
            # Of equal logits a class may take any.
            if same and torch.equal(logits.gather(1, index), logits.gather(1, chosen)):
                norm_topk_prob = getattr(module, "norm_topk_prob", None)
                return TopExperts(normalised, rounded, norm_topk_prob)
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError):
        pass  # the stand-in lacks something that this class needs
    return None
