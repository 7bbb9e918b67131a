"""Run Triton kernels through the interpreter where there is no CUDA device."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # one core for each worker
    torch.set_num_threads(1)
