"""Typed errors. Each message says what was expected and what came."""

from __future__ import annotations

__all__ = [
    "BackendError",
    "CacheError",
    "FetchError",
    "MethodConflictError",
    "MissingExtraError",
    "ModelLoadError",
    "NoMatchingModuleError",
    "PatchkitError",
    "RestoreConflictError",
    "SlotError",
    "TokenResolutionError",
    "UnknownMethodError",
    "UnsupportedGenerationError",
    "UnsupportedModelError",
]


class PatchkitError(Exception):
    """Base class of every error that patchkit raises on purpose."""


class UnknownMethodError(PatchkitError, ValueError):
    """A method name is not registered; the message lists the nearest ones."""


class SlotError(PatchkitError, ValueError):
    """A value given for a `generate()` slot does not fit that slot."""


class MethodConflictError(PatchkitError, ValueError):
    """Two methods claim one slot, or the model already carries this patch."""


class UnsupportedModelError(PatchkitError, ValueError):
    """The model offers no place to attach to, or needs something patchkit refuses."""


class NoMatchingModuleError(PatchkitError, ValueError):
    """A method found no module in the model that it could act on."""


class RestoreConflictError(PatchkitError, RuntimeError):
    """Somebody changed a patched attribute since `apply`; nothing was undone."""


class BackendError(PatchkitError, RuntimeError):
    """The backend asked for cannot run here."""


class CacheError(PatchkitError, ValueError):
    """A cache does not belong to this model or call, or cannot do what was asked."""


class UnsupportedGenerationError(PatchkitError, ValueError):
    """A `generate()` mode that an active method cannot serve."""


class TokenResolutionError(PatchkitError, ValueError):
    """A string does not name exactly one token of the tokenizer."""


class FetchError(PatchkitError, RuntimeError):
    """A bundled model could not be downloaded, or is not the expected file."""


class MissingExtraError(PatchkitError, ImportError):
    """An optional package is missing; the message names the extra that brings it."""


class ModelLoadError(PatchkitError, ValueError):
    """transformers cannot load the model or tokenizer that was asked for, or loads it wrongly."""
