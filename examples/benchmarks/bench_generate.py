"""Whole `generate()` calls: transformers as is, its static cache with compile, patchkit, the floor.

    python examples/benchmarks/bench_generate.py --shape 8b --cases 1x512 1x32768 --new-tokens 256
    python examples/benchmarks/bench_generate.py --shape smollm2 --cases 1x512

Per case: time to the first token, ms per further token (whole call less the first token, divided),
peak memory, and what the first call costs over a later one. The floor of a token is the bytes of
the weights and of the live KV cache at the copy rate measured in the same run. Before anything is
timed, the tokens of patchkit are compared with transformers' and their share is recorded.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable

import torch
from harness import copy_rate, device_name, record
from models import load
from transformers import PreTrainedModel

import patchkit

PROVIDERS = ("transformers", "static + compile", "patchkit")


def call(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int, **options) -> torch.Tensor:
    return model.generate(
        ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0,
        **options,
    )[:, ids.shape[1] :]  # fmt: skip


def seconds(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(
    model: PreTrainedModel, ids: torch.Tensor, provider: str, new_tokens: int, rounds: int
) -> tuple[dict[str, list[float]], torch.Tensor]:
    """Return the figures of one provider, each a list over rounds, and its tokens."""
    options = {"cache_implementation": "static"} if provider.startswith("static") else {}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    first = seconds(lambda: call(model, ids, new_tokens, **options))
    figures: dict[str, list[float]] = {"first token": [], "token": [], "call": []}
    for _ in range(rounds):
        prefill = seconds(lambda: call(model, ids, 1, **options))
        whole = seconds(lambda: call(model, ids, new_tokens, **options))
        figures["first token"].append(prefill * 1e3)
        figures["token"].append((whole - prefill) / (new_tokens - 1) * 1e3)
        figures["call"].append(whole * 1e3)
    later = sorted(figures["call"])[rounds // 2] / 1e3
    figures["first call over a later one"] = [(first - later) * 1e3]
    figures["peak memory"] = [torch.cuda.max_memory_allocated() / 1e9]
    return figures, call(model, ids, new_tokens, **options)


def floor_ms(model: PreTrainedModel, batch_size: int, length: int, rate: float) -> float:
    config = model.config
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    weights = sum(p.nbytes for p in model.parameters())
    if embedding.data_ptr() != head.data_ptr():
        weights -= embedding.nbytes
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * 2
    return (weights + batch_size * length * token) / rate * 1e3


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=["8b", "smollm2"], default="8b")
    parser.add_argument("--cases", nargs="+", default=["1x512"], help="batch x prompt tokens")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--reference-tokens", type=int, default=32, help="for transformers as is")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=PROVIDERS)
    args = parser.parse_args()
    print(f"on {device_name()}")
    rate = copy_rate()
    record("generate", "copy of 4 GiB", "torch", "rate", "GB/s", [rate / 1e9])
    model = load(args.shape, "cuda")
    for case in args.cases:
        batch_size, length = map(int, case.split("x"))
        compare(model, batch_size, length, args, rate)


def compare(
    model: PreTrainedModel, batch_size: int, length: int, args: argparse.Namespace, rate: float
) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (batch_size, length)
    ids = torch.randint(5, model.config.vocab_size - 5, shape, device="cuda", generator=generator)
    config = f"{args.shape} B{batch_size} S{length} +{args.new_tokens} bf16"
    answers = {}
    floor = floor_ms(model, batch_size, length + args.new_tokens // 2, rate)
    record("generate", config, "floor", "token", "ms", [floor])
    for provider in args.providers:
        new_tokens = args.reference_tokens if provider == "transformers" else args.new_tokens
        if provider == "patchkit":
            patchkit.apply(model)
        try:
            figures, answers[provider] = measure(model, ids, provider, new_tokens, args.rounds)
        except torch.OutOfMemoryError:
            print(f"{config} {provider}: out of memory", flush=True)
            continue
        finally:
            report = patchkit.report(model)
            patchkit.restore(model)
            gc.collect()
            torch.compiler.reset()
            model._cache = None
            torch.cuda.empty_cache()
        if report.patched:
            print(report)
        for metric, values in figures.items():
            unit = "GB" if metric == "peak memory" else "ms"
            record("generate", config, provider, metric, unit, values)
    if {"transformers", "patchkit"} <= answers.keys():
        shared = min(answer.shape[1] for answer in answers.values())
        same = answers["patchkit"][:, :shared] == answers["transformers"][:, :shared]
        record(
            "generate", config, "patchkit", "same tokens", "share", [same.double().mean().item()]
        )


if __name__ == "__main__":
    main()
