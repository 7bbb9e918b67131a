"""Slot kernels and whole generate() calls: patchkit beside transformers and the memory floor.

    python examples/benchmarks/bench_store.py kernels     # needs a CUDA device
    python examples/benchmarks/bench_store.py generate --shape 8b
    python examples/benchmarks/bench_store.py generate --shape smollm2 --device cpu

Kernel figures use the attention shape of Llama-3.1-8B (32 query heads, 8 KV heads, 128 wide, bf16)
inside a CUDA graph over rotated inputs. The floor is bytes moved over the copy rate measured in
the same run. `generate` times whole greedy calls in turn: prefill is a call for one token, a step
is the rest of a call for n + 1 tokens over n.
"""

from __future__ import annotations

import argparse
import gc
import itertools

import torch
import torch.nn.functional as F
from harness import copy_rate, device_name, product_rate, record, time_graph_us, time_ms
from models import load
from torch.nn.attention import SDPBackend, sdpa_kernel

import patchkit
from patchkit import Window, demo
from patchkit.attention import reference

HEADS, KV_HEADS, DIM = 32, 8, 128


class Slots:
    """One layer's slots, filled with random tokens."""

    def __init__(self, batch_size: int, filled: int, capacity: int, dtype=torch.bfloat16):
        shape = (batch_size, KV_HEADS, capacity, DIM)
        self.keys = torch.randn(shape, device="cuda", dtype=dtype)
        self.values = torch.randn(shape, device="cuda", dtype=dtype)
        counters = {"device": "cuda", "dtype": torch.int32}
        self.position = torch.arange(capacity, **counters).expand(shape[:3]).contiguous()
        self.position[..., filled:] = -1
        self.length = torch.full(shape[:2], filled, **counters)
        self.seen = self.length.clone()
        self.query = torch.randn(batch_size, HEADS, 1, DIM, device="cuda", dtype=dtype)
        self.new = torch.randn(batch_size, KV_HEADS, 1, DIM, device="cuda", dtype=dtype)

    def decode(self, implementation):
        held = (self.keys, self.values, self.position, self.length, self.seen)
        return implementation(self.query, *held, scale=DIM**-0.5)


def check(slots: Slots, implementation) -> None:
    """The kernel's error against float64 is at most twice that of the reference in bf16."""
    got = slots.decode(implementation).double()
    same_dtype = slots.decode(reference.decode_attention).double()
    double = Slots.__new__(Slots)
    double.__dict__ = {
        k: v.double() if v.is_floating_point() else v for k, v in slots.__dict__.items()
    }
    oracle = double.decode(reference.decode_attention)
    error, own = (got - oracle).abs().max(), (same_dtype - oracle).abs().max()
    rounding = torch.finfo(torch.bfloat16).eps * oracle.abs().max()
    assert error <= 2 * own + rounding, (error, own)


def kernels(args: argparse.Namespace) -> None:
    rate = copy_rate()
    record("kernels", "copy of 4 GiB", "torch", "rate", "GB/s", [rate / 1e9])
    for batch_size, length in [
        (1, 512),
        (1, 8192),
        (1, 32768),
        (1, 131072),
        (16, 2048),
        (64, 2048),
    ]:
        decode(batch_size, length, rate)
        torch.cuda.empty_cache()
    products = product_rate()
    record("kernels", "bf16 product 8192^3", "torch", "rate", "TFLOP/s", [products / 1e12])
    for case in [(1, 512), (1, 2048), (1, 8192), (1, 32768), (1, 131072), (8, 4096)]:
        prefill(*case, products)
        torch.cuda.empty_cache()
    for batch_size, budget in [(1, 1024), (16, 1024), (1, 2048)]:
        append_and_evict(batch_size, budget, rate)
    for length, budget in [(32768, 2048), (131072, 2048), (131072, 32768)]:
        compaction(length, budget, rate)
    for batch_size in (1, 64):
        wave(batch_size, 128256)


def decode(batch_size: int, length: int, rate: float) -> None:
    from patchkit.attention.kernels.decode_attention import decode_attention

    config = f"decode B{batch_size} S{length} H32/8 D128 bf16"
    moved = 2 * batch_size * KV_HEADS * length * DIM * 2
    sets = max(2, min(16, int(2e9 / moved)))
    rotated = [Slots(batch_size, length, length + 256) for _ in range(sets)]
    check(rotated[0], decode_attention)
    record("kernels", config, "floor", "time", "us", [moved / rate * 1e6])
    times = time_graph_us(lambda i: rotated[i].decode(decode_attention), sets)
    record("kernels", config, "patchkit", "time", "us", times)

    def sdpa(i: int) -> torch.Tensor:
        slots = rotated[i]
        keys, values = slots.keys[:, :, :length], slots.values[:, :, :length]
        return F.scaled_dot_product_attention(slots.query, keys, values, enable_gqa=True)

    record("kernels", config, "torch sdpa", "time", "us", time_graph_us(sdpa, sets))


def prefill(batch_size: int, length: int, rate: float) -> None:
    """A causal chunk; in a batch with left padding, where torch needs a mask and repeated heads."""
    from patchkit.attention.kernels.prefill_attention import prefill_attention

    slots = Slots(batch_size, length, length)
    shape = (batch_size, length, HEADS, DIM)
    query = torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    held = (slots.keys, slots.values, slots.position, slots.length, slots.seen)
    options = {"scale": DIM**-0.5, "ordered": True}
    causal = {"is_causal": True, "enable_gqa": True}
    config = f"prefill B{batch_size} S{length} H32/8 D128 bf16"
    backends = {
        "torch flash": SDPBackend.FLASH_ATTENTION,
        "torch cuDNN": SDPBackend.CUDNN_ATTENTION,
    }
    pairs = batch_size * length**2 / 2
    keys, values, checked = slots.keys, slots.values, slice(None)
    if batch_size > 1:  # half of the rows are padded by a quarter
        config += " left-padded"
        pad = torch.arange(batch_size, device="cuda") % 2 * (length // 4)
        pairs = ((length - pad).double() ** 2 / 2).sum().item()
        column = torch.arange(length, device="cuda")
        valid = column >= pad[:, None]
        slots.length -= pad[:, None].int()
        options["behind"] = (valid.sum(-1, keepdim=True) - valid.cumsum(-1)).int()
        mask = (valid[:, None] & (column <= column[:, None]))[:, None]
        mask |= ~mask.any(-1, keepdim=True)
        causal = {"attn_mask": mask}
        checked = valid  # [B, S]; the padding is in front of the columns but not in the slots
        shifts = pad.tolist()
        keys, values = (
            torch.stack([row.roll(shift, 1) for row, shift in zip(t, shifts, strict=True)])
            for t in (keys, values)
        )
        backends = {"torch sdpa with mask": SDPBackend.EFFICIENT_ATTENTION}

    def ours() -> torch.Tensor:
        return prefill_attention(query, *held, **options)

    def torchs(backend: SDPBackend) -> torch.Tensor:
        shared = (keys, values)
        if batch_size > 1:
            shared = tuple(t.repeat_interleave(HEADS // KV_HEADS, 1) for t in shared)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, *shared, **causal)

    expected = torchs(next(iter(backends.values()))).transpose(1, 2)[checked].float()
    error = (ours()[checked].float() - expected).abs().max()
    assert error <= 4 * torch.finfo(torch.bfloat16).eps * expected.abs().max(), error
    del expected
    repeats = 3 if length > 60000 else 10
    record("kernels", config, "floor", "time", "ms", [4 * pairs * HEADS * DIM / rate * 1e3])
    record("kernels", config, "patchkit", "time", "ms", time_ms(ours, repeats))
    for name, backend in backends.items():
        record("kernels", config, name, "time", "ms", time_ms(lambda b=backend: torchs(b), repeats))


def append_and_evict(batch_size: int, budget: int, rate: float) -> None:
    from patchkit.attention.kernels.append import append
    from patchkit.attention.kernels.evict_lowest import evict_lowest

    slots = Slots(batch_size, budget, budget + 256)
    held = (slots.keys, slots.values, slots.position, slots.length)
    full = torch.full_like(slots.length, budget)
    recent = torch.zeros_like(slots.length)

    def step(_: int) -> None:
        append(*held, slots.seen, slots.new, slots.new)
        evict_lowest(*held, full, slots.seen, recent, num_protected=4)

    config = f"append+evict B{batch_size} b{budget} H8 D128 bf16"
    moved = batch_size * KV_HEADS * (3 * 2 * DIM * 2 * 2 + budget * 4)
    record("kernels", config, "floor", "time", "us", [moved / rate * 1e6])
    record("kernels", config, "patchkit", "time", "us", time_graph_us(step, 32))
    assert slots.length.eq(budget).all()


def compaction(length: int, budget: int, rate: float) -> None:
    from patchkit.attention.kernels.compact import compact

    slots = Slots(1, length, length)
    rows = [torch.randperm(length, device="cuda")[:budget].sort().values for _ in range(KV_HEADS)]
    keep = torch.stack(rows)[None]
    count = torch.full_like(slots.length, budget)
    keys, values = (t.new_empty(1, KV_HEADS, budget, DIM) for t in (slots.keys, slots.values))
    position = slots.position.new_empty(1, KV_HEADS, budget)
    index = keep[..., None].expand(-1, -1, -1, DIM)

    def ours(_: int) -> None:
        lists = (slots.keys, slots.values, slots.position, slots.length)
        compact(*lists, keep, count, keys, values, position)

    def gather(_: int) -> tuple[torch.Tensor, torch.Tensor]:
        return slots.keys.gather(2, index), slots.values.gather(2, index)

    ours(0)
    want_keys, want_values = gather(0)
    assert torch.equal(keys, want_keys) and torch.equal(values, want_values)
    config = f"compact S{length} b{budget} H8 D128 bf16"
    moved = 4 * KV_HEADS * budget * DIM * 2
    record("kernels", config, "floor", "time", "us", [moved / rate * 1e6])
    record("kernels", config, "patchkit", "time", "us", time_graph_us(ours, 4))
    record("kernels", config, "torch gather", "time", "us", time_graph_us(gather, 4))


def wave(batch_size: int, vocab: int) -> None:
    from patchkit.decoding.kernels.logit_wave import logit_wave

    logits = torch.randn(batch_size, vocab, device="cuda")
    ids = torch.tensor([11489, 14190, 8088, 3983, 92014], device="cuda")
    step = torch.full((batch_size,), 30, device="cuda", dtype=torch.int32)
    ended = torch.zeros(batch_size, device="cuda", dtype=torch.bool)

    def run(_: int) -> None:
        logit_wave(logits, ids, step, ended, amplitude=1.0, period=600, phase=0.0)

    config = f"logit_wave B{batch_size} V{vocab}"
    record("kernels", config, "patchkit", "time", "us", time_graph_us(run, 16))


@torch.no_grad()
def generate(args: argparse.Namespace) -> None:
    model = load(args.shape, args.device)
    dtype = str(model.dtype).removeprefix("torch.")
    for batch_size, length in itertools.product(args.batch, args.lengths):
        shape = (batch_size, length)
        ids = torch.randint(5, model.config.vocab_size - 5, shape, device=args.device)
        config = f"{args.shape} B{batch_size} S{length} +{args.new_tokens} {dtype}"
        compare(model, ids, args, config)


def compare(
    model: torch.nn.Module, ids: torch.Tensor, args: argparse.Namespace, config: str
) -> None:
    """Time the providers in turn, round by round, so that drift of the machine hits all alike."""
    providers = {
        "transformers": None,
        "patchkit": (),
        f"patchkit Window({args.budget})": (Window(budget=args.budget),),
    }
    figures = {name: {"prefill": [], "step": []} for name in providers}
    answers = {}
    for turn in range(args.rounds + 1):  # the first round warms up
        for name, methods in list(providers.items()):
            if methods is not None:
                patchkit.apply(model, *methods)
            try:
                prefill, step, answers[name], sizes = whole_call(model, ids, args.new_tokens)
            except torch.OutOfMemoryError:
                print(f"generate       {config:<44} {name:<22} out of memory", flush=True)
                del providers[name], figures[name]
                continue
            finally:
                patchkit.restore(model)
                gc.collect()
                if ids.is_cuda:
                    torch.cuda.empty_cache()
            if turn:
                figures[name]["prefill"].append(prefill)
                figures[name]["step"].append(step)
                figures[name] |= {metric: [size] for metric, size in sizes.items()}
    units = {"prefill": "ms", "step": "ms", "KV cache": "MB", "peak memory": "GB"}
    for name, measured in figures.items():
        for metric, values in measured.items():
            record("generate", config, name, metric, units[metric], values)
    if "transformers" in figures and "patchkit" in figures:
        pairs = zip(figures["patchkit"]["step"], figures["transformers"]["step"], strict=True)
        record("generate", config, "patchkit", "step ratio", "", [ours / hf for ours, hf in pairs])
        same = (answers["transformers"] == answers["patchkit"]).double().mean().item()
        record("generate", config, "patchkit", "same tokens", "share", [same])


def whole_call(
    model: torch.nn.Module, ids: torch.Tensor, new_tokens: int
) -> tuple[float, float, torch.Tensor, dict[str, float]]:
    """Return prefill ms, ms per further token, the new tokens, and sizes, of greedy calls."""

    def run(tokens: int):
        return model.generate(
            ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0,
            return_dict_in_generate=True,
        )  # fmt: skip

    if ids.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    (prefill,) = time_ms(lambda: run(1), 1, 0)
    outputs = []
    (total,) = time_ms(lambda: outputs.append(run(new_tokens + 1)), 1, 0)
    sizes = {"KV cache": demo.kv_bytes(outputs[0].past_key_values) / 1e6}
    if ids.is_cuda:
        sizes["peak memory"] = torch.cuda.max_memory_allocated() / 1e9
    step = (total - prefill) / new_tokens
    return prefill, step, outputs[0].sequences[:, ids.shape[1] :].cpu(), sizes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    commands.add_parser("kernels").set_defaults(run=kernels)
    whole = commands.add_parser("generate")
    whole.add_argument("--shape", choices=["8b", "smollm2"], default="smollm2")
    whole.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    whole.add_argument("--batch", type=int, nargs="+", default=[1])
    whole.add_argument("--lengths", type=int, nargs="+", default=[512])
    whole.add_argument("--new-tokens", type=int, default=32)
    whole.add_argument("--budget", type=int, default=1024)
    whole.add_argument("--rounds", type=int, default=5)
    whole.set_defaults(run=generate)
    args = parser.parse_args()
    print(f"on {device_name()}")
    args.run(args)


if __name__ == "__main__":
    main()
