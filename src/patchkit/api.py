"""Patch a model in place, undo it, and say what was done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from patchkit import configs, generation
from patchkit.attention import interface
from patchkit.backends import Backend, BackendName
from patchkit.decoding import fused, rotary
from patchkit.errors import MethodConflictError, NoMatchingModuleError, UnsupportedModelError
from patchkit.families import inspect_model, unwrap
from patchkit.method import Method, as_method, registry
from patchkit.moe import experts, router
from patchkit.patch import Patch
from patchkit.status import PatchReport, build_report

ModelT = TypeVar("ModelT", bound=nn.Module)


def apply(
    model: ModelT,
    *methods: str | Method,
    backend: BackendName = "auto",
    strict: bool = True,
) -> ModelT:
    """Patch `model` in place: exact attention over a `KVStore`, plus the given methods.

    Everything is checked before the first edit, and a failure undoes all edits. A second call adds
    methods to free slots. `generate()` gains one keyword per slot, valid for that call only: a
    method name, a configuration, a dict of fields, or None to switch the slot off.

    Args:
        model: A transformers causal language model, or a PeftModel around one.
        methods: Configurations (`Window(budget=1024)`) or registered names (`"window"`).
        backend: `"auto"`: Triton kernels for tensors on a GPU, the plain PyTorch reference
            elsewhere. `"triton"` or `"reference"`: that one, or an error. Fixed by the first call.
        strict: Raise if a method finds no module to act on; False skips it and says so in the
            report.

    Returns:
        The same object.

    Raises:
        UnsupportedModelError: the model offers no place to attach to.
        NoMatchingModuleError: a method has nothing to act on (`strict=True`).
        MethodConflictError: two methods share a slot, or the model is already patched and no method
            is given.
        UnknownMethodError: no such method; the message names the nearest ones.
        BackendError: the backend asked for cannot run here.
    """
    inner = unwrap(model)
    wanted = [as_method(method) for method in methods]
    patch: Patch | None = inner.__dict__.get("_patchkit")
    fresh = patch is None
    if patch is None:
        patch = Patch(inspect_model(inner), Backend(backend))
    elif not wanted:
        raise MethodConflictError(
            "the model is already patched; add methods to free slots, or restore(model) first"
        )
    elif backend not in ("auto", patch.backend.requested):
        raise MethodConflictError(
            f"the model is already patched with backend={patch.backend.requested!r}, "
            f"got backend={backend!r}"
        )
    added, skipped = _check(patch, wanted, strict)
    if fresh:
        try:
            _install(inner, patch)
        except BaseException:
            patch.journal.undo()
            raise
    patch.methods += added
    patch.skipped += skipped
    return model


def _check(
    patch: Patch, wanted: list[Method], strict: bool
) -> tuple[list[tuple[Method, tuple[str, ...]]], list[tuple[Method, str]]]:
    taken = patch.applied()
    added, skipped = [], []
    for method in wanted:
        sites = generation.check_method(method, taken, patch.family)
        if not sites:
            reason = generation.nothing_to_act_on(method, patch.family)
            if strict:
                raise NoMatchingModuleError(reason)
            skipped.append((method, reason))
            continue
        added.append((method, sites))
        taken |= dict.fromkeys(method.slots, method)
    return added, skipped


def _install(model: PreTrainedModel, patch: Patch) -> None:
    """Make the edits that every patched model carries, whatever its methods."""
    journal, family = patch.journal, patch.family
    interface.register()
    patch.configs = configs.adopt(model, journal)
    # The configuration is the model's own copy now, so this edit needs no entry of its own. Only
    # the decoder switches: a vision tower, say, keeps its attention.
    family.decoder.set_attn_implementation(interface.IMPLEMENTATION)
    if family.decoder.config._attn_implementation != interface.IMPLEMENTATION:
        raise UnsupportedModelError(
            f"transformers did not switch {type(model).__name__} to the attention implementation "
            f"{interface.IMPLEMENTATION!r}"
        )
    journal.set(model, "_patchkit", patch, label="model")
    if family.decoder is not model:
        journal.set(family.decoder, "_patchkit", patch, label=family.decoder_name)
    for name, module in family.attention.items():
        journal.set(module, "_patchkit", patch, label=name)
        journal.set(module, "extra_repr", MethodType(_extra_repr, module), label=name)
    for part in (fused, rotary, experts, router):
        patch.fused |= part.install(family, patch.backend, journal)
    journal.pre_hook(family.decoder, interface.before_decoder, label=family.decoder_name)
    journal.set(model, "generate", MethodType(generation.generate, model), label="model")
    prepare = MethodType(generation.prepare_cache_for_generation, model)
    journal.set(model, "_prepare_cache_for_generation", prepare, label="model")
    journal.set(model, "_prefill", MethodType(generation.prefill, model), label="model")
    criteria = MethodType(generation.get_stopping_criteria, model)
    journal.set(model, "_get_stopping_criteria", criteria, label="model")


def _extra_repr(module: nn.Module) -> str:
    return "attention=patchkit"


def restore(model: ModelT) -> ModelT:
    """Undo every edit, newest first; a no-op on an unpatched model.

    Configuration values that were changed while the model was patched are kept.

    Returns:
        The same object, with every `__dict__` as before `apply`.

    Raises:
        RestoreConflictError: somebody replaced a patched attribute since; nothing is undone.
    """
    inner = unwrap(model)
    patch: Patch | None = inner.__dict__.get("_patchkit")
    if patch is not None:
        patch.journal.undo()
        fused.remove_copies(inner)
        rotary.remove_copies(inner)
        configs.hand_back(patch.configs)
    return model


def report(model: nn.Module) -> PatchReport:
    """Say what is patched, which backend was requested and used, and what was skipped."""
    inner = unwrap(model)
    return build_report(inner, inner.__dict__.get("_patchkit"))


@contextmanager
def patched(
    model: ModelT,
    *methods: str | Method,
    backend: BackendName = "auto",
    strict: bool = True,
) -> Iterator[ModelT]:
    """Patch a model for the length of a `with` block; restores on exceptions too."""
    apply(model, *methods, backend=backend, strict=strict)
    try:
        yield model
    finally:
        restore(model)


@dataclass(frozen=True)
class MethodRow:
    """One line of the catalogue.

    Attributes:
        name: Registry name, also the value accepted by `apply` and by the slots of `generate()`.
        area: `attention`, `decoding`, ...
        slots: Slots it fills.
        exact: Whether greedy tokens equal the unpatched model's.
        config: Name of the configuration class.
        families: What it works on.
        page: The method's documentation.
    """

    name: str
    area: str
    slots: tuple[str, ...]
    exact: bool
    config: str
    families: str
    page: str


def methods(area: str | None = None) -> list[MethodRow]:
    """List all methods, or those of one area.

    Raises:
        ValueError: there is no such area; the message lists them.
    """
    rows = [
        MethodRow(
            name=cls.name,
            area=cls.area(),
            slots=cls.slots,
            exact=cls.exact,
            config=cls.__name__,
            families=cls.families,
            page=cls.page(),
        )
        for cls in registry().values()
    ]
    areas = sorted({row.area for row in rows})
    if area is not None and area not in areas:
        raise ValueError(f"area must be one of {areas}, got {area!r}")
    return [row for row in rows if area in (None, row.area)]
