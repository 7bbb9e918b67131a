"""What tests of every area share."""

from __future__ import annotations

from typing import Any

from patchkit.compat import CACHE_KEYWORD


def with_cache(cache: Any) -> dict[str, Any]:
    """Return the keyword argument that hands `cache` to `forward()` or `generate()`."""
    return {CACHE_KEYWORD: cache}
