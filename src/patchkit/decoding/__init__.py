"""Decoding methods: they change which token comes next, not how the logits are computed.

One module per method; what they share is `schedule` (prefix-only logits processors) and `tokens`
(strict look-up of token ids). `reference` is the plain PyTorch specification of the kernels.
"""
