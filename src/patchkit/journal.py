"""Reversible edits of a model: every change is written down, checked and undone in reverse.

Only instance attributes and forward pre-hooks are ever edited. `copy.deepcopy` of a patched
model copies its journal too, so the copy can be restored on its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from patchkit.errors import RestoreConflictError


class _Missing:
    """Marks an attribute that the instance did not have; survives deepcopy as a singleton."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Missing:
        return self

    def __reduce__(self) -> str:
        return "_MISSING"

    def __repr__(self) -> str:
        return "<missing>"


_MISSING = _Missing()


@dataclass
class _Attribute:
    owner: Any
    label: str
    name: str
    old: Any
    new: Any

    @property
    def before(self) -> Any:
        """What the attribute was, be it the instance's or its class's."""
        if self.old is _MISSING:
            return getattr(type(self.owner), self.name).__get__(self.owner)
        return self.old

    def _wrapped(self) -> bool:
        """Whether accelerate has put a hook around our forward, which it keeps for its own."""
        return self.name == "forward" and self.owner.__dict__.get("_old_forward") is self.new

    def in_place(self) -> bool:
        return self.owner.__dict__.get(self.name, _MISSING) is self.new or self._wrapped()

    def undo(self) -> None:
        if self._wrapped():
            self.owner.__dict__["_old_forward"] = self.before
        elif self.old is _MISSING:
            del self.owner.__dict__[self.name]
        else:
            self.owner.__dict__[self.name] = self.old


@dataclass
class _PreHook:
    owner: nn.Module
    label: str
    hook: Callable[..., Any]
    hook_id: int

    @property
    def name(self) -> str:
        return f"forward pre-hook {self.hook.__name__}"

    def in_place(self) -> bool:
        return self.owner._forward_pre_hooks.get(self.hook_id) is self.hook

    def undo(self) -> None:
        del self.owner._forward_pre_hooks[self.hook_id]
        self.owner._forward_pre_hooks_with_kwargs.pop(self.hook_id, None)


class Journal:
    """The edits made to one model, newest last."""

    def __init__(self) -> None:
        self._edits: list[_Attribute | _PreHook] = []

    def __len__(self) -> int:
        return len(self._edits)

    def set(self, owner: Any, name: str, value: Any, *, label: str) -> None:
        """Set an attribute on the instance itself (never on its class).

        Args:
            owner: A module or configuration object.
            name: Attribute name.
            value: Any object except a parameter, buffer or module, which nn.Module keeps elsewhere.
            label: What the owner is called in messages, e.g. `"model.layers.0.self_attn"`.
        """
        old = owner.__dict__.get(name, _MISSING)
        owner.__dict__[name] = value
        self._edits.append(_Attribute(owner, label, name, old, value))

    def pre_hook(self, module: nn.Module, hook: Callable[..., Any], *, label: str) -> None:
        """Register a module-level function as forward pre-hook that also receives kwargs."""
        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        self._edits.append(_PreHook(module, label, hook, handle.id))

    def holds_hook(self, hook: Callable[..., Any]) -> bool:
        """Say whether `hook` is a forward pre-hook that this journal registered."""
        return any(isinstance(edit, _PreHook) and edit.hook is hook for edit in self._edits)

    def original(self, owner: Any, name: str) -> Any:
        """Return what `owner.name` was before the first edit (a bound method of the class, say)."""
        for edit in self._edits:
            if edit.owner is owner and edit.name == name and isinstance(edit, _Attribute):
                return edit.before
        return getattr(owner, name)

    def displaced(self) -> list[str]:
        """Name every edit that somebody has changed or removed since it was made."""
        latest: dict[tuple[int, str], _Attribute | _PreHook] = {}
        for edit in self._edits:
            latest[id(edit.owner), edit.name] = edit
        return [f"{e.label}.{e.name}" for e in latest.values() if not e.in_place()]

    def undo(self, keep: int = 0) -> None:
        """Undo the edits after the first `keep`, newest first.

        Raises:
            RestoreConflictError: somebody replaced a patched attribute in the meantime (an
                accelerate hook, another patch); nothing is undone.
        """
        displaced = self.displaced()
        if displaced:
            raise RestoreConflictError(
                "expected patchkit's own values in place, but these were changed after apply(): "
                f"{displaced[:5]}{' ...' if len(displaced) > 5 else ''}; undo that change first"
            )
        while len(self._edits) > keep:
            self._edits.pop().undo()
