"""What evicting costs and what it saves, on the Llama-3.1-8B shape.

    python examples/benchmarks/bench_eviction.py --parts cut decode batch     # 5 minutes on an H200
    python examples/benchmarks/bench_eviction.py --parts cut --kvpress FOLDER # an unpacked kvpress

cut: scoring a prompt, choosing tokens and moving them, for one layer; the floor is one read of the
keys, one write and read of the scores, and the kept tokens moved. Beside it kvpress's SnapKV and
the forward attention itself. Kernels are queued behind a pause, so that launching them is not
timed; kvpress waits for the device in the middle and is timed as it is.
decode: whole `generate()` calls over long prompts, beside dense decoding of as many tokens as the
budget keeps.
batch: 16 prompts of 32,768 tokens: rate and memory.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
import time
import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from bench_generate import call
from harness import copy_rate, device_name, record, time_ms
from models import load
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import patchkit
from patchkit.attention.dense import cudnn_attention, cudnn_serves
from patchkit.attention.eviction import Attended
from patchkit.attention.kernels.prefill_attention import prefill_attention
from patchkit.attention.store_layer import StoreLayer
from patchkit.method import Method

HEADS, KV_HEADS, DIM = 32, 8, 128
EARLY = 8
"""Tokens before the steps that are timed."""


def queued_ms(run: Callable[[], object], before: Callable[[], object], repeats: int) -> list[float]:
    """Time `run` on the device, with `before` in front of every call and outside of the time."""
    times = []
    for repeat in range(repeats + 1):
        before()
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(True), torch.cuda.Event(True)
        torch.cuda._sleep(5_000_000)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if repeat:
            times.append(start.elapsed_time(end))
    return times


def make_layer(
    model: PreTrainedModel, method: Method, length: int
) -> tuple[StoreLayer, Attended, Callable[[], None]]:
    """Fill one layer with random tokens; return it, its attention, and what undoes an eviction."""
    with patchkit.patched(model, method):
        layer = patchkit.KVStore(model).store_layers[0]
    shape = (1, KV_HEADS, length, DIM)
    key, value = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    query = torch.randn(1, HEADS, length, DIM, device="cuda", dtype=torch.bfloat16)
    layer._forward.begin(None)
    layer.update(key, value)
    slots, counters, policy = layer.slots(), layer.counters(), dict(vars(layer.policy))
    full = layer.length.clone()

    def undo() -> None:
        layer.hold(slots)
        layer.list_start = None
        layer.__dict__.update(counters)
        layer.policy.__dict__.update(policy)
        layer.length.copy_(full)

    masking = {"scale": DIM**-0.5, "softcap": None, "sliding_window": None}
    _, lse = attend(layer, query)
    return layer, Attended(query, layer.keys, layer.position, lse, masking, None), undo


def attend(layer: StoreLayer, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend as a prompt does whose tokens are scored; return the softmax denominators too."""
    filled = (layer.keys[:, :, : layer.filled], layer.values[:, :, : layer.filled])
    if cudnn_serves(query, *filled):
        return cudnn_attention(query, *filled, scale=DIM**-0.5)
    lse = torch.empty(query.shape[:3], device="cuda")
    held = (query, *layer.lists(), layer.length, layer.seen)
    return prefill_attention(*held, scale=DIM**-0.5, ordered=True, lse=lse), lse


def bench_cut(model: PreTrainedModel, lengths: list[int], budget: int, kvpress: str | None) -> None:
    rate = copy_rate()
    for length in lengths:
        config = f"8b layer B1 S{length} b{budget} bf16"
        scores = 2 * 4 * KV_HEADS * length
        moved = 4 * budget * KV_HEADS * DIM * 2
        floor = (KV_HEADS * length * DIM * 2 + scores + moved) / rate * 1e3
        record("eviction", config, "floor", "cut", "ms", [floor])
        repeats = 5 if length > 100_000 else 20
        column_sums(model, config, length, budget, repeats)
        for cls in (patchkit.SnapKV, patchkit.AdaKV, patchkit.CAKE, patchkit.TOVA):
            window_method(model, config, length, cls(budget=budget), repeats)
        if kvpress is not None:
            bench_kvpress(model, config, length, budget, kvpress, repeats)
        torch.cuda.empty_cache()


def column_sums(model, config, length, budget, repeats) -> None:
    """H2O: the sums come on top of the forward attention, which yields the denominators."""
    layer, attended, undo = make_layer(model, patchkit.H2O(budget=budget), length)
    filled = (layer.keys[:, :, : layer.filled], layer.values[:, :, : layer.filled])
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        plain = time_ms(lambda: F.scaled_dot_product_attention(
            attended.query, *filled, is_causal=True, enable_gqa=True), repeats)  # fmt: skip
    record("eviction", config, "cuDNN", "forward attention", "ms", plain)
    times = time_ms(lambda: attend(layer, attended.query), repeats)
    record("eviction", config, "patchkit", "forward attention with lse", "ms", times)
    times = queued_ms(lambda: layer.policy.observe(layer, attended), undo, repeats)
    record("eviction", config, "H2O", "score", "ms", times)
    times = queued_ms(lambda: layer.policy.evict_many(layer), undo, repeats)
    record("eviction", config, "H2O", "select and move", "ms", times)


def window_method(model, config, length, method, repeats) -> None:
    layer, attended, undo = make_layer(model, method, length)
    policy, provider = layer.policy, type(method).__name__

    def score() -> None:
        policy.observe(layer, attended)

    def cut() -> None:
        policy.observe(layer, attended)
        policy.evict_many(layer)

    for metric, run in (("score", score), ("cut", cut)):
        record("eviction", config, provider, metric, "ms", queued_ms(run, undo, repeats))


def bench_kvpress(model, config, length, budget, folder, repeats) -> None:
    """Run kvpress's own SnapKV; its package is not imported, its modules are."""
    for name in ("kvpress", "kvpress.presses"):
        package = types.ModuleType(name)
        package.__path__ = [f"{folder}/{name.replace('.', '/')}"]
        sys.modules.setdefault(name, package)
    press_class = importlib.import_module("kvpress.presses.snapkv_press").SnapKVPress
    press = press_class(compression_ratio=1 - budget / length, window_size=32)
    module = model.model.layers[0].self_attn
    hidden = torch.randn(1, length, 4096, device="cuda", dtype=torch.bfloat16)
    positions = torch.arange(length, device="cuda")[None]
    embeddings = {"position_embeddings": model.model.rotary_emb(hidden, positions)}
    shape = (1, KV_HEADS, length, DIM)
    cache = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    given = (module, hidden, *cache, None, embeddings)
    record("eviction", config, "kvpress SnapKV", "score", "ms",
           time_ms(lambda: press.score(*given), repeats))  # fmt: skip
    record("eviction", config, "kvpress SnapKV", "cut", "ms",
           time_ms(lambda: press.compress(*given), repeats))  # fmt: skip


def release(model: PreTrainedModel) -> None:
    patchkit.restore(model)
    gc.collect()
    torch.cuda.empty_cache()


def prompt(batch_size: int, length: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(0)
    size = (batch_size, length)
    return torch.randint(5, 128_000, size, device="cuda", generator=generator)


def bench_decode(model: PreTrainedModel, lengths: list[int], budgets: list[int], new: int) -> None:
    methods = (
        patchkit.H2O, patchkit.SnapKV, patchkit.AdaKV, patchkit.CAKE, patchkit.TOVA, patchkit.Window
    )  # fmt: skip
    for budget in budgets:
        patchkit.apply(model)
        ids = prompt(1, budget - new // 2)  # so that the average context is the budget
        call(model, ids, new)
        times = [generate_ms(model, ids, new)["token"] for _ in range(3)]
        record("eviction", f"8b B1 S{budget} +{new} bf16", "dense", "token", "ms", times)
        release(model)
        for length in lengths:
            config = f"8b B1 S{length} b{budget} +{new} bf16"
            for cls in methods[: 3 if length > 100_000 else None]:
                patchkit.apply(model, cls(budget=budget))
                call(model, prompt(1, 4096), 4)  # builds the kernels
                for metric, value in generate_ms(model, prompt(1, length), new).items():
                    unit = "GB" if "memory" in metric else "ms"
                    record("eviction", config, cls.__name__, metric, unit, [value])
                release(model)


class Clock(BaseStreamer):
    """Notes when tokens are handed out; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate_ms(model: PreTrainedModel, ids: torch.Tensor, new: int) -> dict[str, float]:
    """Time one call: its first token, every further one, and what recording the step costs.

    A long prompt takes seconds that differ from call to call by more than its tokens take, so all
    are measured in the same call. The first tokens are those in which the step is recorded.
    """
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    clock = Clock()
    call(model, ids, new, streamer=clock)
    start, *tokens = clock.times
    token = (tokens[-1] - tokens[EARLY]) / (len(tokens) - 1 - EARLY) * 1e3
    return {
        "token": token,
        "recording": (tokens[EARLY] - tokens[0]) * 1e3 - EARLY * token,
        "first token": (tokens[0] - start) * 1e3,
        "peak memory": torch.cuda.max_memory_allocated() / 1e9,
    }


def bench_batch(model: PreTrainedModel, batch_size: int, length: int, new: int) -> None:
    config = f"8b B{batch_size} S{length} b1024 +{new} bf16"
    total = torch.cuda.get_device_properties(0).total_memory
    for cls in (None, patchkit.H2O, patchkit.SnapKV, patchkit.CAKE):
        provider = "dense" if cls is None else cls.__name__
        patchkit.apply(model, *([] if cls is None else [cls(budget=1024)]))
        before = torch.cuda.memory_allocated()
        ids = prompt(batch_size, length)
        try:
            figures = generate_ms(model, ids, new)
        except torch.OutOfMemoryError:
            print(f"{config} {provider}: out of memory", flush=True)
            release(model)
            continue
        dense = (
            2 * 2 * KV_HEADS * DIM * model.config.num_hidden_layers * batch_size * (length + new)
        )
        held = patchkit.report(model).kv_bytes or dense  # large ones are not kept for a next call
        figures |= {"memory of the cache": held / 1e9, "memory of a dense cache": dense / 1e9}
        for metric, value in figures.items():
            unit = "GB" if "memory" in metric else "ms"
            record("eviction", config, provider, metric, unit, [value])
        record("eviction", config, provider, "rows that fit", "rows",
               [(total - before) // (held / batch_size)])  # fmt: skip
        release(model)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=["cut", "decode", "batch"], default=["cut"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 32768, 131072])
    parser.add_argument("--budgets", nargs="+", type=int, default=[1024, 2048])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--kvpress", help="folder that holds an unpacked kvpress")
    parser.add_argument("--new-tokens", type=int, default=128)
    args = parser.parse_args()
    print(f"on {device_name()}")
    model = load("8b", "cuda")
    if "cut" in args.parts:
        bench_cut(model, args.lengths, 2048, args.kvpress)
    if "decode" in args.parts:
        bench_decode(model, [n for n in args.lengths if n > 8192], args.budgets, args.new_tokens)
    if "batch" in args.parts:
        bench_batch(model, args.batch_size, 32768, args.new_tokens)


if __name__ == "__main__":
    main()
