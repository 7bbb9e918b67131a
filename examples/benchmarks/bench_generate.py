"""Whole `generate()` calls: transformers as is, its static cache with compile, patchkit, the floor.

    python examples/benchmarks/bench_generate.py --table          # 8b shape, 6 minutes on an H200
    python examples/benchmarks/bench_generate.py --shape 8b --cases 1x512 1x32768 --new-tokens 256
    python examples/benchmarks/bench_generate.py --shape smollm2 --cases 1x512

Per case: time to the first token, ms per further token (whole call less the first token, divided),
peak memory, what the first call costs over a later one, and what building kernels adds to it. The
floor of a token is the bytes of the weights and of the live KV cache at the copy rate measured in
the same run; of experts it counts the share that the rows are expected to choose, independently of
each other. Where patchkit's tokens first differ from transformers', the gap between transformers'
logits for the two tokens is recorded: rounding can only turn near ties.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import copy_rate, device_name, record, time_ms
from models import NAMES, load
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from triton import knobs

import patchkit

HF, STATIC, PATCHKIT = PROVIDERS = ("transformers", "static + compile", "patchkit")
GROUPED = "transformers grouped_mm"
"""Of a mixture, whose prompts transformers computes so, but decodes by `batched_mm`."""


@dataclass(frozen=True)
class Case:
    """One batch of prompts, and how much of it is measured.

    Attributes:
        batch_size: Rows.
        length: Prompt tokens per row.
        rounds: Of one prefill and one whole call; see `measure`.
        providers: In order.
        new_tokens: Per row.
        reference_tokens: The same for transformers as is, which is slow.
    """

    batch_size: int
    length: int
    rounds: int = 3
    providers: tuple[str, ...] = PROVIDERS
    new_tokens: int = 256
    reference_tokens: int = 32


TABLE = (
    Case(1, 512, rounds=5),  # the first token is a matter of the host, which varies
    Case(1, 8192, rounds=1, providers=(HF, PATCHKIT), reference_tokens=16),
    Case(1, 32768, rounds=1, providers=(HF, PATCHKIT), reference_tokens=16),
    Case(16, 2048, rounds=1, providers=(HF, PATCHKIT), new_tokens=128, reference_tokens=16),
    Case(64, 2048, rounds=1, providers=(PATCHKIT,), new_tokens=128),
    Case(64, 2048, rounds=0, providers=(HF,), new_tokens=128, reference_tokens=16),
    Case(1, 131072, rounds=0, providers=(PATCHKIT, HF), new_tokens=128, reference_tokens=8),
    Case(16, 32768, rounds=0, providers=(PATCHKIT, HF), new_tokens=64, reference_tokens=8),
    Case(1, 32768, rounds=1, providers=(STATIC,), new_tokens=64),
    Case(16, 2048, rounds=1, providers=(STATIC,), new_tokens=32),
)
"""The README's table; the longest prompts come last and once, compiling after everything else."""


def call(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int, **options):
    return model.generate(
        ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0,
        **options,
    )  # fmt: skip


def seconds(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


@contextmanager
def kernel_compilation() -> Iterator[list[float]]:
    """Collect the seconds that Triton spends on building each kernel that its cache lacks."""
    built: list[float] = []

    def listener(*, times, cache_hit, **_) -> None:
        if not cache_hit:
            built.append(times.total / 1e6)

    previous = knobs.compilation.listener
    knobs.compilation.listener = listener
    try:
        yield built
    finally:
        knobs.compilation.listener = previous


def measure(
    model: PreTrainedModel, ids: torch.Tensor, provider: str, new_tokens: int, rounds: int
) -> tuple[dict[str, list[float]], torch.Tensor, tuple[torch.Tensor, ...] | None]:
    """Return the figures of one provider, each a list over rounds, its tokens, and its logits.

    Only transformers as is returns logits. Without rounds, one call for one token and one whole
    call make all figures, warm-up included: for cases that take minutes.
    """
    options = {"cache_implementation": "static"} if provider == STATIC else {}
    detailed = {"return_dict_in_generate": True, "output_logits": True}
    answers: list = []

    def whole(**more) -> float:
        answers.clear()
        return seconds(lambda: answers.append(call(model, ids, new_tokens, **options, **more)))

    def prefill() -> float:
        return seconds(lambda: call(model, ids, 1, **options))

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    reference = provider == HF
    figures: dict[str, list[float]] = {}
    if rounds:
        with kernel_compilation() as built:
            first = whole()
        times = []
        for _ in range(rounds):
            prefill()  # not timed: a host that has waited for a GPU wakes up slowly
            times.append((prefill(), whole()))
        later = sorted(w for _, w in times)[rounds // 2]
        if provider == PATCHKIT:
            figures["kernel compilation"] = [sum(built) * 1e3]
            first -= sum(built)
        figures["first call over a later one"] = [(first - later) * 1e3]
        if reference:
            whole(**detailed)
    else:
        times = [(prefill(), whole(**detailed) if reference else whole())]
    figures["first token"] = [p * 1e3 for p, _ in times]
    figures["token"] = [(w - p) / (new_tokens - 1) * 1e3 for p, w in times]
    figures["peak memory"] = [torch.cuda.max_memory_allocated() / 1e9]
    answer = answers[0]
    tokens = answer.sequences if reference else answer
    return figures, tokens[:, ids.shape[1] :], answer.logits if reference else None


def largest_gap(
    reference: torch.Tensor, logits: tuple[torch.Tensor, ...], tokens: torch.Tensor
) -> float:
    """Return how sure the reference was, at most, where a row first differs from it, in logits."""
    shared = min(reference.shape[1], tokens.shape[1])
    gaps = [0.0]
    for row, (want, got) in enumerate(zip(reference[:, :shared], tokens[:, :shared], strict=True)):
        if different := (want != got).nonzero()[:1].flatten().tolist():
            step = different[0]
            gaps.append((logits[step][row, want[step]] - logits[step][row, got[step]]).item())
    return max(gaps)


def floor_ms(model: PreTrainedModel, batch_size: int, length: int, rate: float) -> float:
    """Return what reading weights and KV cache once takes at `rate`.

    Of a layer's experts it counts the share that is expected to be chosen by any row, as if every
    row chose independently and all experts alike.
    """
    config = model.config
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    chosen = getattr(config, "num_experts_per_tok", 1) / getattr(config, "num_experts", 1)
    share = 1 - (1 - chosen) ** batch_size
    weights = sum(
        p.nbytes * (share if ".experts." in name else 1.0) for name, p in model.named_parameters()
    )
    if embedding.data_ptr() != head.data_ptr():
        weights -= embedding.nbytes
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    live = sum(
        min(length, config.sliding_window) if kind == "sliding_attention" else length
        for kind in kinds
    )
    slot = 2 * config.num_key_value_heads * head_dim * 2
    return (weights + batch_size * live * slot) / rate * 1e3


def prefill_parts_ms(model: PreTrainedModel, batch_size: int, length: int) -> float:
    """Time what a prefill cannot do without: the products of every layer, and cuDNN's attention.

    All layers in one go, because a GPU that is busy for a second clocks lower than for a moment.
    """
    config = model.config
    linears = [m for m in model.model.layers[0].modules() if isinstance(m, torch.nn.Linear)]
    inputs = {
        width: torch.randn(batch_size * length, width, device="cuda", dtype=model.dtype)
        for width in {linear.in_features for linear in linears}
    }
    width = config.hidden_size // config.num_attention_heads
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    query, key, value = (
        torch.randn(batch_size, h, length, width, device="cuda", dtype=model.dtype) for h in heads
    )

    def layers() -> None:
        for _ in range(config.num_hidden_layers):
            for linear in linears:
                linear(inputs[linear.in_features])
            F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return min(time_ms(layers, 2, 1))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=NAMES, default="8b")
    parser.add_argument("--table", action="store_true", help="all cases of the README's table")
    parser.add_argument("--cases", nargs="+", default=["1x512"], help="batch x prompt tokens")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--reference-tokens", type=int, default=32, help="for transformers as is")
    parser.add_argument("--rounds", type=int, default=3)
    choices = (*PROVIDERS, GROUPED)
    parser.add_argument("--providers", nargs="+", choices=choices, default=PROVIDERS)
    args = parser.parse_args()
    numbers = (args.new_tokens, args.reference_tokens)
    sizes = [tuple(map(int, case.split("x"))) for case in args.cases]
    cases = [Case(*size, args.rounds, tuple(args.providers), *numbers) for size in sizes]
    print(f"on {device_name()}")
    rate = copy_rate()
    record("generate", "copy of 4 GiB", "torch", "rate", "GB/s", [rate / 1e9])
    model = load(args.shape, "cuda")
    for case in TABLE if args.table else cases:
        compare(model, args.shape, case, rate)


def compare(model: PreTrainedModel, shape: str, case: Case, rate: float) -> None:
    batch_size, length = case.batch_size, case.length
    generator = torch.Generator("cuda").manual_seed(0)
    size = (batch_size, length)
    ids = torch.randint(5, model.config.vocab_size - 5, size, device="cuda", generator=generator)
    config = f"{shape} B{batch_size} S{length} +{case.new_tokens} bf16"
    answers, logits = {}, None
    floor = floor_ms(model, batch_size, length + case.new_tokens // 2, rate)
    record("generate", config, "floor", "token", "ms", [floor])
    if shape == "8b" and batch_size == 1 and length >= 8192 and PATCHKIT in case.providers:
        parts = prefill_parts_ms(model, batch_size, length)
        record("generate", config, "products + cuDNN", "first token", "ms", [parts])
    for provider in case.providers:
        new_tokens = case.reference_tokens if provider in (HF, GROUPED) else case.new_tokens
        if provider == PATCHKIT:
            patchkit.apply(model)
        if provider == GROUPED:
            model._optimize_model_for_decode = nullcontext
        try:
            figures, answers[provider], kept = measure(
                model, ids, provider, new_tokens, case.rounds
            )
            logits = logits or kept
        except torch.OutOfMemoryError:
            print(f"{config} {provider}: out of memory", flush=True)
            continue
        finally:
            report = patchkit.report(model)
            patchkit.restore(model)
            vars(model).pop("_optimize_model_for_decode", None)
            gc.collect()
            torch.compiler.reset()
            model._cache = None
            torch.cuda.empty_cache()
        if report.patched:
            print(report)
        for metric, values in figures.items():
            unit = "GB" if metric == "peak memory" else "ms"
            record("generate", config, provider, metric, unit, values)
    if {HF, PATCHKIT} <= answers.keys():
        shared = min(answer.shape[1] for answer in answers.values())
        same = answers[PATCHKIT][:, :shared] == answers[HF][:, :shared]
        share = same.double().mean().item()
        record("generate", config, PATCHKIT, "same tokens", "share", [share])
        gap = largest_gap(answers[HF], logits, answers[PATCHKIT])
        record("generate", config, PATCHKIT, "largest gap", "logits", [gap])


if __name__ == "__main__":
    main()
