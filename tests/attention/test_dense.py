"""Which of torch's kernels dense attention asks for; what it computes is tested with the models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from patchkit.attention.dense import _order_of_kernels, prefers_torch


@pytest.fixture
def flags():
    backends = torch.backends.cuda
    before = backends.cudnn_sdp_enabled(), backends.mem_efficient_sdp_enabled()
    yield backends
    backends.enable_cudnn_sdp(before[0])
    backends.enable_mem_efficient_sdp(before[1])


def query(length, dim=128, dtype=torch.bfloat16):
    return SimpleNamespace(
        is_cuda=True, shape=(1, 8, length, dim), requires_grad=False, dtype=dtype
    )


def test_kernels_that_the_user_switched_off_stay_off(flags):
    flags.enable_cudnn_sdp(False)
    flags.enable_mem_efficient_sdp(False)
    with _order_of_kernels(query(1 << 16)):
        assert not flags.cudnn_sdp_enabled() and not flags.mem_efficient_sdp_enabled()
        assert flags.flash_sdp_enabled()
    flags.enable_cudnn_sdp(True)
    with _order_of_kernels(query(1 << 16)):
        assert flags.cudnn_sdp_enabled()


def test_torch_is_asked_where_it_is_faster():
    plain = {"softcap": None, "sinks": None, "scale": 1.0}
    short, middle, long = (query(length) for length in (512, 8192, 1 << 16))
    assert prefers_torch(short, short, **plain) and prefers_torch(long, long, **plain)
    assert not prefers_torch(middle, middle, **plain)
    assert not prefers_torch(short, short, **plain | {"softcap": 30.0})
    assert not prefers_torch(short, query(512, 64), **plain)
    exact = query(512, dtype=torch.float32)
    assert not prefers_torch(exact, exact, **plain)
