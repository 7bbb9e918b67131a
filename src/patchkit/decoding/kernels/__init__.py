"""Triton kernels of the decoding area: one module per operation, named like the operation.

The specification of every operation is the function of the same name in
`patchkit.decoding.reference`.
"""
