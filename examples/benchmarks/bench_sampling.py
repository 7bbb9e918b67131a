"""Truncating and drawing in a recorded step: microseconds, beside the operations of transformers.

    python examples/benchmarks/bench_sampling.py                # batch 1 and 16, 128,256 tokens
    python examples/benchmarks/bench_sampling.py --batch 64

Rows are normal numbers of deviation 3 in bfloat16, which are flatter than most of a real model, and
in cache, as those that a step has just written. `draw` is the race by which `torch.multinomial`
samples, its random numbers included.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from harness import device_name, record, time_graph_us
from torch import Tensor
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from patchkit.backends import Backend
from patchkit.device_processors import merged, on_device
from patchkit.token_choice import draw

VOCAB_SIZE = 128_256
CALLS = 20  # in one graph
WARPERS = {
    "top-k 50": [TopKLogitsWarper(50)],
    "top-p 0.9": [TopPLogitsWarper(0.9)],
    "top-k 50, top-p 0.9": [TopKLogitsWarper(50), TopPLogitsWarper(0.9)],
    "min-p 0.05": [MinPLogitsWarper(0.05)],
}


def truncation(warpers: list, batch_size: int, backend: Backend | None) -> Callable:
    """Return a function that applies `warpers` by kernels, or as transformers does."""
    ids = torch.zeros(batch_size, 8, dtype=torch.int64, device="cuda")
    count = torch.ones(1, dtype=torch.int64, device="cuda")

    def run(scores: Tensor) -> Tensor:
        if backend is None:
            return LogitsProcessorList(warpers)(ids, scores)
        for warper in merged(warpers):
            scores = on_device(warper, ids, 1, backend)(ids, count, scores)
        return scores

    return run


def check(got: Tensor, want: Tensor) -> None:
    """Raise unless the same scores are kept, but for one or two per row within rounding."""
    differ = (got.sort().values != want.sort().values).sum(-1).max().item()
    if differ > 2:
        raise RuntimeError(f"{differ} scores of a row differ")


def measure(batch_size: int) -> None:
    """Check and time everything at one batch size."""
    config = f"B{batch_size} V{VOCAB_SIZE} f32"
    providers = {"patchkit": Backend("triton"), "torch": None}
    torch.manual_seed(0)
    scores = (torch.randn(batch_size, VOCAB_SIZE, device="cuda") * 3).bfloat16().float()
    for metric, warpers in WARPERS.items():
        runs = {name: truncation(warpers, batch_size, b) for name, b in providers.items()}
        check(runs["patchkit"](scores), runs["torch"](scores))
        for name, run in runs.items():
            times = time_graph_us(lambda _, run=run: run(scores), CALLS)
            record("sampling", config, name, metric, "us", times)
    sound, chosen = torch.tensor(True, device="cuda"), []
    draws = {
        name: lambda _, b=backend: draw(scores, sound, b or Backend("reference"))
        for name, backend in providers.items()
    }
    for run in draws.values():
        torch.manual_seed(1)
        chosen.append(run(0))
    if not torch.equal(*chosen):
        raise RuntimeError(f"other tokens were drawn: {chosen}")
    for name, run in draws.items():
        record("sampling", config, name, "draw", "us", time_graph_us(run, CALLS))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    args = parser.parse_args()
    print(f"on {device_name()}")
    for batch_size in args.batch:
        measure(batch_size)


if __name__ == "__main__":
    main()
