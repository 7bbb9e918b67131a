"""Attention and KV cache: the store, the registered attention function, eviction methods."""
