"""One decoding step, kernel by kernel: microseconds, bytes, and the share of the copy rate.

    python examples/benchmarks/bench_step.py                       # 8b shape, batch 1, 512 tokens
    python examples/benchmarks/bench_step.py --cases 1x32768 16x2048

The step is replayed as `generate()` recorded it. `step` is what a replay takes; the kernels are
timed one by one by the profiler, in a recording without dependent launch, where they do not overlap
(`step, launched plainly`). For a Llama shape, whose bytes are known, kernels of a layer are named.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from bench_generate import call, floor_ms
from harness import copy_rate, device_name, record, time_ms
from models import load
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

import patchkit
from patchkit import dependent_launch

REPLAYS = 5
STEPS = 64


@contextmanager
def launched_plainly() -> Iterator[None]:
    """Record without dependent launch."""
    capability, dependent_launch._HOPPER = dependent_launch._HOPPER, (99, 0)
    dependent_launch._can_depend.cache_clear()
    try:
        yield
    finally:
        dependent_launch._HOPPER = capability
        dependent_launch._can_depend.cache_clear()


def recorded(model: PreTrainedModel, batch_size: int, length: int) -> torch.cuda.CUDAGraph:
    """Generate, with slots for all replays to come, and return the graph of a step."""
    patchkit.apply(model)
    ids = torch.randint(5, 40_000, (batch_size, length), device="cuda")
    call(model, ids, 2 * STEPS)
    call(model, ids, 2)  # restarts the store, so that replays have room
    graph = model._patchkit.graphs.parked._graph
    assert graph is not None
    return graph


def kernels(graph: torch.cuda.CUDAGraph) -> list[list[tuple[str, float]]]:
    """Return name and microseconds of every kernel of some replays, in order."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type.name == "CUDA"]
    events.sort(key=lambda event: event.time_range.start)
    size = len(events) // REPLAYS
    timed = [(event.name, event.time_range.elapsed_us()) for event in events]
    return [timed[i * size : (i + 1) * size] for i in range(REPLAYS)]


def layer_bytes(model: PreTrainedModel, batch_size: int, length: int) -> list[tuple[str, str, int]]:
    """Say of the kernels of a layer, in order: part of the name, what it does, its bytes."""
    layer = model.model.layers[0]
    attention, mlp, width = layer.self_attn, layer.mlp, model.config.hidden_size
    queries, keys = attention.q_proj.weight.shape[0], attention.k_proj.weight.shape[0]
    new = 2 * batch_size * keys * 2  # of keys and values of a token
    weights = {name: module.weight.nbytes for name, module in layer.named_modules()
               if isinstance(module, torch.nn.Linear)}  # fmt: skip
    qkv = sum(weights[f"self_attn.{name}_proj"] for name in "qkv")
    rows = batch_size * width * 2
    return [
        ("rms_norm", "norm before attention", 2 * rows),
        ("skinny_linear", "queries, keys, values", qkv),
        ("rotary_append", "rotary embedding, append", 4 * batch_size * queries + 5 * new // 2),
        ("decode_attention", "attention", length * new),
        ("merge", "merge of splits", 0),
        ("skinny_linear", "output, residual", weights["self_attn.o_proj"]),
        ("rms_norm", "norm before MLP", 2 * rows),
        ("skinny_gated_linear", "gate, up, activation", 2 * mlp.gate_proj.weight.nbytes),
        ("skinny_linear", "down, residual", weights["mlp.down_proj"]),
    ]


def named(
    model: PreTrainedModel, step: list[tuple[str, float]], layer: list[tuple[str, str, int]]
) -> dict[str, tuple[float, int]]:
    """Sum microseconds and bytes of a step by what its kernels do; raise if they do others."""
    layers = model.config.num_hidden_layers
    first = next(i for i, (name, _) in enumerate(step) if layer[0][0] in name)
    after = first + layers * len(layer)
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for index, (name, us) in enumerate(step[first:after]):
        part, what, moved = layer[index % len(layer)]
        if part not in name:
            raise RuntimeError(f"expected a kernel of {part} at {index}, got {name}")
        sums[what][0] += us
        sums[what][1] += moved
    head = model.get_output_embeddings().weight.nbytes
    for name, us in step[after:]:
        if "skinny_linear" in name:
            sums["head"] = [us, head]
        elif "argmax" in name or "best_block" in name:
            sums["argmax"][0] += us
    everything = sum(us for _, us in step)
    sums["all else"] = [everything - sum(us for us, _ in sums.values()), 0]
    return {what: (us, int(moved)) for what, (us, moved) in sums.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=["8b", "smollm2"], default="8b")
    parser.add_argument("--cases", nargs="+", default=["1x512"], help="batch x prompt tokens")
    args = parser.parse_args()
    print(f"on {device_name()}")
    rate = copy_rate()
    model = load(args.shape, "cuda")
    for case in args.cases:
        batch_size, length = map(int, case.split("x"))
        config = f"{args.shape} B{batch_size} S{length} bf16"
        floor = floor_ms(model, batch_size, length, rate)
        record("step", config, "floor", "step", "ms", [floor])
        graph = recorded(model, batch_size, length)
        record("step", config, "patchkit", "step", "ms", time_ms(graph.replay, 20))
        patchkit.restore(model)
        with launched_plainly():
            graph = recorded(model, batch_size, length)
            times = time_ms(graph.replay, 20)
            record("step", config, "launched plainly", "step", "ms", times)
            steps = kernels(graph)
            patchkit.restore(model)
        layer = layer_bytes(model, batch_size, length)
        sums = [named(model, step, layer) for step in steps]
        record("step", config, "patchkit", "launches", "number", [float(len(steps[0]))])
        for what, (_, moved) in sums[0].items():
            times = [one[what][0] for one in sums]
            us = record("step", config, what, "kernel", "us", times)
            if moved:
                record("step", config, what, "share of copy rate", "share",
                       [moved / rate / us * 1e6])  # fmt: skip


if __name__ == "__main__":
    main()
