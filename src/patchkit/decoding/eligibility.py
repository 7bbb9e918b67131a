"""When a kernel may stand in for what a model would run, and when it may read weights early."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

if TYPE_CHECKING:
    from patchkit.backends import Backend

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def kernels_serve(backend: Backend, x: Tensor) -> bool:
    """Say whether a kernel may compute something of `x` here and now."""
    return (
        not torch.compiler.is_compiling()
        and backend.choose(x.device) == "triton"
        and x.dtype in _DTYPES
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(x.device.type)
    )


def is_plain(tensor: Tensor) -> bool:
    """Say whether a tensor is what it looks like: not quantised, sharded or inside of a vmap."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return type(tensor) in (Tensor, nn.Parameter) and not wrapped(tensor)


def untouched(module: nn.Module) -> bool:
    """Say whether calling a module runs the forward of its class and nothing else."""
    hooks = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return not (hooks or module._compiled_call_impl or global_hooks())


def global_hooks() -> bool:
    """Say whether somebody has put hooks on all modules there are."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


class _AtRest(threading.local):
    parameters: Mapping[int, nn.Parameter] = MappingProxyType({})  # by identity


_at_rest = _AtRest()


@contextmanager
def weights_at_rest(model: nn.Module) -> Iterator[None]:
    """Promise, in this thread, that nothing launched inside writes a parameter of a model.

    Nor may what was launched just before, and has not ended when the first kernel inside begins.
    """
    before = _at_rest.parameters
    _at_rest.parameters = {id(parameter): parameter for parameter in model.parameters()}
    try:
        yield
    finally:
        _at_rest.parameters = before


def may_read_ahead(weights: Sequence[Tensor]) -> bool:
    """Say whether a kernel may read weights before it waits: parameters that are at rest."""
    return all(id(weight) in _at_rest.parameters for weight in weights)
