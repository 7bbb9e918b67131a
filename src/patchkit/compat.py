"""Version differences of transformers, each under one name."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version

TRANSFORMERS_VERSION = Version(version("transformers"))

CHUNKED_PREFILL_IGNORES_CACHE = Version("5.23") > TRANSFORMERS_VERSION
"""`generate(prefill_chunk_size=...)` feeds the whole input again on top of a non-empty cache."""
