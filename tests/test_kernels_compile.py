"""Every Triton kernel compiles to machine code for Hopper and Ampere, without a GPU at hand."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is missing"),
]


PARTS = {"ranks"}  # modules of what kernels are made of


@pytest.mark.parametrize("capability", ["90", "80"])
def test_kernels_compile(capability, tmp_path):
    script = Path(__file__).parent / "compile_kernels.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(script), capability],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = {line.split()[0] for line in run.stdout.splitlines()[:-1]}
    sources = Path(__file__).parent.parent.glob("src/patchkit/*/kernels/*.py")
    names = {path.stem for path in sources} - {"__init__"} - PARTS
    assert all(f"_{name}_kernel" in kernels for name in names), kernels
