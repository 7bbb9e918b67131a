"""Triton kernels of the mixture-of-experts area: one module per operation, named like it.

The specification of every operation is the function of the same name in `patchkit.moe.reference`.
"""
