"""Timing and the results file shared by all benchmarks.

Every figure is a row of `results.csv` (long format): which code, which machine, which case, which
provider, and the 20th, 50th and 80th percentile. Nothing is timed before its output was checked.
"""

from __future__ import annotations

import csv
import os
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

RESULTS = Path(os.environ.get("PATCHKIT_RESULTS", Path(__file__).parent / "results.csv"))
HEADER = "date,commit,gpu,torch,triton,transformers,bench,config,provider,metric,unit,p20,p50,p80"
FIELDS = HEADER.split(",")


def _commit() -> str:
    if "PATCHKIT_COMMIT" in os.environ:
        return os.environ["PATCHKIT_COMMIT"]
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__


def device_name() -> str:
    """Name the device that figures are for."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def record(
    bench: str, config: str, provider: str, metric: str, unit: str, values: list[float]
) -> float:
    """Append one row, print it, and return its median."""
    quantiles = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    row = dict(
        zip(
            FIELDS,
            [
                datetime.now(UTC).date().isoformat(),
                _commit(),
                device_name(),
                torch.__version__,
                _triton_version(),
                transformers.__version__,
                bench,
                config,
                provider,
                metric,
                unit,
                *(f"{q:.6g}" for q in quantiles.tolist()),
            ],
            strict=True,
        )
    )
    fresh = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if fresh:
            writer.writeheader()
        writer.writerow(row)
    print(
        f"{bench:<14} {config:<44} {provider:<22} {metric:<12} {row['p50']:>12} {unit}", flush=True
    )
    return quantiles[1].item()


def time_ms(run: Callable[[], object], repeats: int = 20, warmup: int = 3) -> list[float]:
    """Milliseconds of each of `repeats` calls, by CUDA events or the host clock on the CPU."""
    for _ in range(warmup):
        run()
    if not torch.cuda.is_available():
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e3)
        return times
    events = [(torch.cuda.Event(True), torch.cuda.Event(True)) for _ in range(repeats)]
    for start_event, end_event in events:
        start_event.record()
        run()
        end_event.record()
    torch.cuda.synchronize()
    return [start_event.elapsed_time(end_event) for start_event, end_event in events]


def time_graph_us(run: Callable[[int], object], sets: int, repeats: int = 20) -> list[float]:
    """Microseconds per call inside a CUDA graph that runs `run(0) .. run(sets - 1)` in turn.

    Rotating over `sets` inputs keeps the data out of the L2 cache; the graph keeps launch overhead
    out of the figure.
    """
    for index in range(sets):
        run(index)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(sets):
            run(index)
    return [ms * 1e3 / sets for ms in time_ms(graph.replay, repeats)]


def copy_rate(gigabytes: float = 4.0) -> float:
    """Bytes per second of a large device-to-device copy, read plus write: the memory floor."""
    source = torch.empty(int(gigabytes * 2**30), dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    times = time_ms(lambda: target.copy_(source), 10)
    return 2 * source.numel() / (sorted(times)[len(times) // 2] * 1e-3)


def product_rate(size: int = 8192) -> float:
    """FLOP per second of a large bfloat16 matrix product on random data: the arithmetic floor."""
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = time_ms(lambda: left @ right, 10)
    return 2 * size**3 / (sorted(times)[len(times) // 2] * 1e-3)
