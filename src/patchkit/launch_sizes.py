"""Arithmetic of launches. Triton's functions of these names serve kernels too: 1.5 us a call."""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    """Divide and round up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is at least `n`, and 1 for less."""
    return 1 << max(n - 1, 0).bit_length()
