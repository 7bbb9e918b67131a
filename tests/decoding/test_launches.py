"""Which launches of a step wait for each other, and that nobody sees a result too early."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from patchkit import backends
from patchkit.backends import Backend
from patchkit.decoding.launches import StepLaunches

from .helpers import DEVICE, random


def test_operations_of_any_backend_look(monkeypatch):
    load = backends._load
    backend, other = Backend("triton"), Backend("triton")
    x, weight = random(1, 24), random(40, 24, seed=1)

    def read(area, op, used):  # calls no function of torch
        return (lambda _: dict(backend.calls)) if op == "read" else load(area, op, used)

    monkeypatch.setattr(backends, "_load", read)
    with torch.no_grad(), StepLaunches(backend, together=True):
        mapped = F.linear(x, weight)
        assert not backend.calls
        found = other.run("decoding", "read", x.device, mapped)
    assert found == {("skinny_linear", "triton"): 1}


def test_operations_are_what_they_are_inside_of_other_modes():
    backend, x = Backend("triton"), random(2, 24)
    with torch.device(DEVICE):
        got = backend.run("decoding", "rms_norm", x.device, x, x[0], eps=1e-6)
    assert torch.equal(got, backend.run("decoding", "rms_norm", x.device, x, x[0], eps=1e-6))
    assert backend.calls == {("rms_norm", "triton"): 2}
