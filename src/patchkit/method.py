"""The contract every method fills in, and the registry that finds methods by name.

A method is a frozen dataclass: its fields are its configuration, checked in `__post_init__`.
It declares the *slots* it fills; two methods that share a slot conflict, and each slot is also
an extra keyword of `model.generate()`. What a method does is expressed through the hooks below;
the attention seam and the `generate()` wrapper know nothing else about it.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from patchkit.errors import SlotError, UnknownMethodError

if TYPE_CHECKING:
    from transformers import LogitsProcessor

    from patchkit.attention.eviction import EvictionPolicy
    from patchkit.families import Family
    from patchkit.generation import Call

# Modules that define methods. A new method adds its module here and nowhere else.
_METHOD_MODULES = (
    "patchkit.attention.window",
    "patchkit.attention.h2o",
    "patchkit.attention.cake",
    "patchkit.attention.snapkv",
    "patchkit.attention.adakv",
    "patchkit.attention.pyramidkv",
    "patchkit.attention.tova",
    "patchkit.decoding.cyclic_reflex",
    "patchkit.decoding.tip",
    "patchkit.decoding.thinking_budget",
    "patchkit.decoding.budget_forcing",
)

_REGISTRY: dict[str, type[Method]] = {}


@dataclasses.dataclass(frozen=True)
class Method:
    """Base class of all methods; subclass as `class Window(Method, name="window", slots=...)`.

    Class keywords:
        name: Registry name, lower_snake, the paper's own name.
        slots: Names of the slots (= extra `generate()` keywords) that the method fills.
        exact: True if greedy tokens equal the unpatched model's, within rounding.
        conflicts: Slots of *other* methods that cannot be combined with this one.
    """

    name: ClassVar[str]
    slots: ClassVar[tuple[str, ...]] = ()
    exact: ClassVar[bool] = False
    families: ClassVar[str] = "any decoder-only model that goes through AttentionInterface"
    conflicts: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(
        cls,
        name: str | None = None,
        slots: tuple[str, ...] = (),
        exact: bool = False,
        conflicts: tuple[str, ...] = (),
        **kwargs: Any,
    ) -> None:
        super().__init_subclass__(**kwargs)
        if name is None:  # an intermediate base class, not a method
            return
        if not name.isidentifier() or name != name.lower() or not slots:
            raise ValueError(f"a method needs a lower_snake name and slots, got {name!r}, {slots}")
        known = _REGISTRY.get(_fold(name))
        if known is not None and (known.__module__, known.__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        ):
            raise ValueError(f"method name {name!r} is already taken by {known.__qualname__}")
        cls.name, cls.slots, cls.exact, cls.conflicts = name, slots, exact, conflicts
        _REGISTRY[_fold(name)] = cls

    @classmethod
    def area(cls) -> str:
        """Name the area of patchkit the method lives in, e.g. `"attention"`."""
        return cls.__module__.split(".")[1]

    @classmethod
    def page(cls) -> str:
        """Return the method's page: the docstring of the module that defines it."""
        return inspect.cleandoc(inspect.getmodule(cls).__doc__ or "")

    def for_call(self, call: Call) -> Method:
        """Complete a configuration passed as a `generate()` slot by what the call brings."""
        return self

    def check(self, family: Family) -> None:
        """Raise a typed error if this configuration cannot serve the model; edit nothing."""

    def sites(self, family: Family) -> tuple[str, ...]:
        """Name the modules of the model that the method acts on; empty means it cannot act."""
        raise NotImplementedError(f"{type(self).__name__} must say where it acts")

    def eviction_policies(self, family: Family) -> list[EvictionPolicy | None]:
        """Return what bounds each layer of one new KV store (slot `kv_eviction`)."""
        return []

    def logits_processor(self, call: Call) -> LogitsProcessor | None:
        """Return a fresh processor for one `generate()` call (slot `logit_schedule`)."""
        return None


def _fold(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def registry() -> dict[str, type[Method]]:
    """Return all registered method classes by name, importing the modules that define them."""
    for module in _METHOD_MODULES:
        importlib.import_module(module)
    return {cls.name: cls for cls in _REGISTRY.values()}


def slot_names() -> frozenset[str]:
    """Return every slot that at least one registered method fills."""
    return frozenset(slot for cls in registry().values() for slot in cls.slots)


def method_class(name: str) -> type[Method]:
    """Look a method up by name, ignoring case and underscores (`"CyclicReflex"` is fine).

    Raises:
        UnknownMethodError: no such method; the message names the nearest ones.
    """
    known = registry()
    found = _REGISTRY.get(_fold(name))
    if found is not None:
        return found
    near = difflib.get_close_matches(_fold(name), [_fold(n) for n in known], n=3, cutoff=0.4)
    names = sorted(_REGISTRY[n].name for n in near) or sorted(known)
    raise UnknownMethodError(f"unknown method {name!r}; the nearest valid names are {names}")


def as_method(value: str | Method) -> Method:
    """Turn what `apply` accepts (a configuration or a registered name) into a configuration."""
    if isinstance(value, Method):
        return value
    if isinstance(value, str):
        return method_class(value)()
    raise TypeError(
        f"expected a method configuration or a registered name, got {type(value).__name__}"
    )


def as_slot_value(slot: str, value: Any, current: Method | None) -> Method | None:
    """Turn what a `generate()` slot accepts into a configuration, or None to switch it off.

    Args:
        slot: The keyword under which `value` was passed.
        value: A name, a configuration, None, or a dict of fields. A dict names its method under
            `"name"`; without it the fields change the configuration that is already active.
        current: The configuration active in that slot, if any.

    Raises:
        SlotError: the value has the wrong type, names no method, has unknown fields, or belongs
            to another slot.
    """
    if value is None:
        return None
    if isinstance(value, Mapping):
        fields = dict(value)
        name = fields.pop("name", None)
        if name is not None:
            cls = method_class(name)
        elif current is not None:
            cls = type(current)
        else:
            raise SlotError(f"{slot}={value!r} has no 'name', and no method is active in that slot")
        known = {field.name for field in dataclasses.fields(cls)}
        if not known >= fields.keys():
            raise SlotError(
                f"{slot}: {cls.__name__} has no field {sorted(fields.keys() - known)}, "
                f"it takes {sorted(known)}"
            )
        if name is None and current is not None:
            method: Method = dataclasses.replace(current, **fields)
        else:
            method = cls(**fields)
    elif isinstance(value, (str, Method)):
        method = as_method(value)
    else:
        raise SlotError(
            f"{slot} takes a method name, a configuration, a dict or None, "
            f"got {type(value).__name__}"
        )
    if slot not in method.slots:
        raise SlotError(
            f"{type(method).__name__} fills {list(method.slots)}, it cannot be passed as {slot}"
        )
    return method
