"""Launches of known kinds go to the compiled kernel, all others through Triton."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from triton.compiler import CompiledKernel

from patchkit.direct_launch import _MOST_KNOWN, _Direct, direct

SCALE = 0.5


class Compiled(CompiledKernel):
    """Notes what it is launched with."""

    def __init__(self, launches):
        self.launches, self.module = launches, None

    def __getitem__(self, grid):
        return lambda *args: self.launches.append((self, grid, args))


class Kernel:
    """What `triton.jit` makes of a function of `x, y, n, scale, BLOCK, WIDE`."""

    arg_names = ("x", "y", "n", "scale", "BLOCK", "WIDE")
    __name__ = "kernel"

    def __init__(self):
        self.direct_launches, self.own_launches = [], []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.own_launches.append((grid, args, options))
            return Compiled(self.direct_launches)

        return launch


@pytest.fixture
def kernel():
    return Kernel()


@pytest.fixture
def tensors():
    memory = torch.zeros(64)
    assert memory.data_ptr() % 16 == 0
    return memory[:8], memory[16:]


def test_a_known_kind_goes_to_the_compiled_kernel(kernel, tensors):
    launched = _Direct(kernel)
    options = {"WIDE": True, "num_warps": 4, "BLOCK": 128}
    first = launched[(3,)](*tensors, 7, SCALE, **options)
    assert kernel.own_launches == [((3,), (*tensors, 7, SCALE), options)]

    others = (torch.zeros(40), tensors[0][4:])  # other sizes and strides, as well aligned
    launched[(5, 2)](*others, 7, SCALE, **options)
    assert len(kernel.own_launches) == 1
    ((compiled, grid, args),) = kernel.direct_launches
    assert compiled is first and grid == (5, 2, 1, 1)
    assert args[0] is others[0] and args[1] is others[1]
    assert args[2:] == (7, SCALE, 128, True)  # constants in the order of the parameters


@pytest.mark.parametrize(
    "change",
    ["dtype", "alignment", "number", "scale", "constant", "option", "fewer options"],
)
def test_another_kind_goes_through_triton(kernel, tensors, change):
    launched = _Direct(kernel)
    x, y = tensors
    n, scale, options = 16, SCALE, {"BLOCK": 128, "WIDE": True, "num_warps": 4}
    launched[(3,)](x, y, n, scale, **options)
    if change == "dtype":
        x = x.bfloat16()
    elif change == "alignment":
        y = y[1:]
    elif change == "number":
        n = 17
    elif change == "scale":
        scale = 0.25
    elif change == "constant":
        options = {**options, "BLOCK": 64}
    elif change == "option":
        options = {**options, "num_warps": 8}
    else:
        del options["num_warps"]
    launched[(3,)](x, y, n, scale, **options)
    assert len(kernel.own_launches) == 2 and not kernel.direct_launches
    launched[(3,)](x, y, n, scale, **options)
    assert len(kernel.own_launches) == 2 and len(kernel.direct_launches) == 1


def test_what_triton_did_not_compile_is_not_remembered(tensors):
    class Recorded(Kernel):
        def __getitem__(self, grid):
            return lambda *args, **options: super(Recorded, self).__getitem__(grid) and None

    kernel = Recorded()
    launched = _Direct(kernel)
    launched[(3,)](*tensors, 7, SCALE, BLOCK=128, WIDE=True)
    assert not launched._known


def test_kinds_are_forgotten_before_they_are_too_many(kernel, tensors):
    launched = _Direct(kernel)
    for n in range(_MOST_KNOWN + 2):
        launched[(1,)](*tensors, n, SCALE, BLOCK=128, WIDE=True)
    assert 0 < len(launched._known) <= 2


def test_the_interpreter_runs_kernels_itself(kernel):
    assert direct(kernel) is kernel
