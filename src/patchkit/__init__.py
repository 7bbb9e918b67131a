"""patchkit: make the Hugging Face model you already hold fast, in place and reversibly.

    import patchkit
    patchkit.apply(model)                               # same answers
    patchkit.apply(model, patchkit.Window(budget=1024)) # a bounded KV cache
    patchkit.restore(model)

Importing this package changes nothing and needs neither a GPU nor triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "BudgetForcing": "patchkit.decoding.budget_forcing",
    "CyclicReflex": "patchkit.decoding.cyclic_reflex",
    "KVStore": "patchkit.attention.store",
    "Method": "patchkit.method",
    "PatchReport": "patchkit.status",
    "TIP": "patchkit.decoding.tip",
    "ThinkingBudget": "patchkit.decoding.thinking_budget",
    "AdaKV": "patchkit.attention.adakv",
    "CAKE": "patchkit.attention.cake",
    "H2O": "patchkit.attention.h2o",
    "PyramidKV": "patchkit.attention.pyramidkv",
    "SnapKV": "patchkit.attention.snapkv",
    "TOVA": "patchkit.attention.tova",
    "Window": "patchkit.attention.window",
    "apply": "patchkit.api",
    "methods": "patchkit.api",
    "patched": "patchkit.api",
    "report": "patchkit.api",
    "restore": "patchkit.api",
}
_SUBMODULES = ("demo", "errors", "testing")

__all__ = [
    "CAKE",
    "H2O",
    "TIP",
    "TOVA",
    "AdaKV",
    "BudgetForcing",
    "CyclicReflex",
    "KVStore",
    "Method",
    "PatchReport",
    "PyramidKV",
    "SnapKV",
    "ThinkingBudget",
    "Window",
    "apply",
    "demo",
    "errors",
    "methods",
    "patched",
    "report",
    "restore",
    "testing",
]

if TYPE_CHECKING:
    from patchkit import demo, errors, testing
    from patchkit.api import apply, methods, patched, report, restore
    from patchkit.attention.adakv import AdaKV
    from patchkit.attention.cake import CAKE
    from patchkit.attention.h2o import H2O
    from patchkit.attention.pyramidkv import PyramidKV
    from patchkit.attention.snapkv import SnapKV
    from patchkit.attention.store import KVStore
    from patchkit.attention.tova import TOVA
    from patchkit.attention.window import Window
    from patchkit.decoding.budget_forcing import BudgetForcing
    from patchkit.decoding.cyclic_reflex import CyclicReflex
    from patchkit.decoding.thinking_budget import ThinkingBudget
    from patchkit.decoding.tip import TIP
    from patchkit.method import Method
    from patchkit.status import PatchReport


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"patchkit.{name}")
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'patchkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
