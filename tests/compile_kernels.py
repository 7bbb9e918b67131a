"""Compile every Triton kernel for a GPU that is not there, and print what each one needs.

    python tests/compile_kernels.py 90    # compute capability 9.0 (Hopper)

The launchers run on CPU tensors as usual, but every launch stops after ptxas. Must run in a process
of its own, without TRITON_INTERPRET. Prints one line per kernel.
"""

from __future__ import annotations

import itertools
import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import KernelInterface

from patchkit import dependent_launch

MAX_SHARED = 227 * 1024


class AbsentGpu:
    """What the Triton compiler asks of a driver, for a device that does not exist."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_interface(self):
        return torch.cuda

    def map_python_to_cpp_type(self, ty):
        return ty


compiled: dict[tuple[str, str], int] = {}
"""Shared bytes by kernel name and hash."""


def compile_only(self, grid):
    def launch(*args, **kwargs):
        kernel = self.run(*args, grid=grid, warmup=True, **kwargs)
        metadata = kernel.metadata
        assert kernel.asm["cubin"], metadata.name
        assert metadata.shared <= MAX_SHARED, (metadata.name, metadata.shared)
        if metadata.launch_pdl:
            check_waits(metadata.name, kernel.asm["ptx"], ahead=kwargs.get("AHEAD", False))
        compiled[metadata.name, metadata.hash] = metadata.shared

    return launch


def check_waits(name: str, ptx: str, ahead: bool) -> None:
    """Assert that a kernel that is launched early touches no memory before it has waited.

    But weights that it is to read `ahead`, which no other kernel needs any more (`evict_first`).
    And that it waits before it lets others be launched early.
    """
    before, _, after = ptx.partition("griddepcontrol.wait")
    memory = r"(ld\.global[.\w:]*|st\.global|ld\.volatile|cp\.async|atom\.|red\.|ret;)"
    touched = re.findall(memory, before)
    assert bool(touched) == ahead, (name, touched)
    assert all("ld.global.L1::evict_first" in access for access in touched), (name, touched)
    assert "griddepcontrol.launch_dependents" not in before, name
    assert "griddepcontrol.launch_dependents" in after, name


def attention(dtype: torch.dtype, head_dim: int, groups: int) -> None:
    from patchkit.attention.kernels.append import append
    from patchkit.attention.kernels.attention_lse import attention_lse
    from patchkit.attention.kernels.attention_mass import attention_mass
    from patchkit.attention.kernels.compact import compact
    from patchkit.attention.kernels.decode_attention import decode_attention
    from patchkit.attention.kernels.evict_lowest import evict_lowest
    from patchkit.attention.kernels.pool_scores import pool_scores
    from patchkit.attention.kernels.prefill_attention import prefill_attention
    from patchkit.attention.kernels.rotary_append import rotary_append
    from patchkit.attention.kernels.select_top import select_top
    from patchkit.attention.kernels.window_statistics import window_statistics

    batch_size, heads, capacity = 2, 2, 512
    keys = torch.zeros(batch_size, heads, capacity, head_dim, dtype=dtype)
    values = torch.zeros_like(keys)
    position = torch.zeros(batch_size, heads, capacity, dtype=torch.int32)
    length = torch.full((batch_size, heads), 8, dtype=torch.int32)
    seen, budget = length.clone(), length.clone()
    held = (keys, values, position, length)
    for tokens, padded in itertools.product((1, 300), (False, True)):
        new = torch.zeros(batch_size, tokens, heads, head_dim, dtype=dtype).transpose(1, 2)
        valid = torch.ones(batch_size, tokens, dtype=torch.bool) if padded else None
        append(*held, seen, new, new, valid)
    for queries in (1, 4):
        query = torch.zeros(batch_size, queries, heads * groups, head_dim, dtype=dtype)
        slots = torch.zeros(batch_size, heads, 40, dtype=torch.int32)
        sinks = torch.zeros(heads * groups)
        for options in (
            {},
            {"sliding_window": 64, "softcap": 30.0, "sinks": sinks},
            {"indices": slots, "index_count": length},
        ):
            decode_attention(query.transpose(1, 2), *held, seen, scale=0.1, **options)
        lse = torch.zeros(batch_size, heads * groups, queries)
        decode_attention(query.transpose(1, 2), *held, seen, scale=0.1, lse=lse)
    chunk = torch.zeros(batch_size, 300, heads * groups, head_dim, dtype=dtype).transpose(1, 2)
    behind = torch.zeros(batch_size, 300, dtype=torch.int32)
    everything = {"sliding_window": 64, "softcap": 30.0, "sinks": sinks, "behind": behind}
    for options in ({"ordered": True}, {"behind": behind}, everything, {"sliding_window": 64}):
        prefill_attention(chunk, *held, seen, scale=0.1, **options)
    lse = torch.zeros(batch_size, heads * groups, 300)
    prefill_attention(chunk, *held, seen, scale=0.1, lse=lse)
    long = 8192  # enough slots for the largest blocks
    score = torch.zeros(batch_size, heads, long)
    listed = (keys.new_zeros(batch_size, heads, long, head_dim), score.int(), length, seen)
    limited = {"sliding_window": 64, "softcap": 30.0}
    for queries, options in itertools.product((1, 16, 64, 300), ({}, limited)):
        last, last_lse = chunk[:, :, -queries:], lse[:, :, -queries:]
        if queries != 16:
            attention_mass(last, *listed, last_lse, score, scale=0.1, **options)
        if queries in (1, 64):
            attention_lse(last, *listed, scale=0.1, **options)
        if queries in (16, 64):
            window_statistics(last, *listed, last_lse, score, scale=0.1, gamma=1.0, **options)
    for queries in (32, 300):
        last, last_lse = chunk[:, :, -queries:], lse[:, :, -queries:]
        attention_mass(last, *listed, last_lse, score, scale=0.1, decay=0.5)
    attention_lse(chunk[:, :, -64:], *listed, scale=0.1, sinks=sinks)
    pool_scores(score, length, score.clone(), width=5, count=length[:, 0])
    pool_scores(score, length, score, share=True)
    keep = torch.zeros(batch_size, heads, 64, dtype=torch.int64)
    out = (keys.new_zeros(batch_size, heads, 256, head_dim),) * 2
    into = (*out, position[:, :, :256].contiguous())
    compact(keys, values, position, length, keep, length, *into)
    first, scores = seen.clone(), (keys[..., 0].float(), out[0][..., 0].float())
    for begins in ((first, None), (None, first)):
        compact(keys, values, position, length, keep, length, *into, *scores, *begins)
    step = torch.zeros(batch_size, heads * groups, 1, head_dim, dtype=dtype)
    lse = torch.zeros(batch_size, heads * groups, 1)
    append(*held, seen, keys[:, :, :1], values[:, :, :1], list_start=first)
    new, outs = (keys[:, :, :1], values[:, :, :1]), (step.clone(), keys[:, :, :1].contiguous())
    cos, weights = keys[:1, 0, :1], [keys[0, 0, 0]] * 2
    token = (*held, seen, step, *new, cos, cos, outs)
    shared = [t[:, :1].contiguous().expand_as(t) for t in held[:3]]
    rotary_append(*token)
    rotary_append(*token, None, weights, outs, eps=1e-6, round_first=True)
    rotary_append(*shared, *token[3:], first, weights, outs, eps=1e-6, offset=1.0)
    narrow = cos[..., : head_dim // 2]
    for options in ({"interleaved": True}, {"table": "half", "wide": True}):
        rotary_append(*token[:8], narrow, narrow, outs, **options)
    decode_attention(step, *held, seen, scale=0.1, lse=lse, list_start=first)
    listed = (keys, position, length, seen, lse, scores[0])
    attention_mass(step, *listed, scale=0.1, decay=0.5, list_start=first)
    recent = torch.zeros_like(seen)
    evict_lowest(*held, budget, seen, recent, score=scores[0], num_protected=4, list_start=first)
    recent = torch.zeros_like(seen)
    for score, mean in itertools.product((None, keys[..., 0].float()), (False, True)):
        options = {"num_protected": 4, "mean": mean}
        evict_lowest(*held, budget, seen, recent, score=score, **options)
        for repeats in (1, 20):  # one program per list, and many
            columns = position.repeat(1, 1, repeats)
            ranking = None if score is None else score.repeat(1, 1, repeats)
            lists = (length, budget, seen, recent)
            select_top(ranking, columns, *lists, num_sinks=4, mean=mean, width=64)


def decoding(dtype: torch.dtype) -> None:
    from patchkit.decoding.eligibility import weights_at_rest
    from patchkit.decoding.kernels.argmax import argmax
    from patchkit.decoding.kernels.gated_activation import gated_activation
    from patchkit.decoding.kernels.keep_likely import keep_likely
    from patchkit.decoding.kernels.keep_top import keep_top
    from patchkit.decoding.kernels.logit_wave import logit_wave
    from patchkit.decoding.kernels.rms_norm import rms_norm
    from patchkit.decoding.kernels.rotary import rotary
    from patchkit.decoding.kernels.sample import sample
    from patchkit.decoding.kernels.settle import settle
    from patchkit.decoding.kernels.skinny_gated_linear import skinny_gated_linear
    from patchkit.decoding.kernels.skinny_linear import skinny_linear

    for rows, dim in ((1, 576), (3000, 4096)):
        x = torch.zeros(rows, dim, dtype=torch.bfloat16)
        rms_norm(x, x[0], eps=1e-6, round_first=True)
        rms_norm(x, x[0], eps=1e-6, offset=1.0)
        bias, out = x[:, 0].contiguous(), x[:, 0].contiguous()
        for count in (1, 2, 3):
            skinny_linear(x[0], [x] * count, [out] * count)
        skinny_linear(x[0], [x], [out], [bias], out, out)
        resting = torch.nn.Linear(dim, rows, device="meta")
        resting.weight = weight = torch.nn.Parameter(x, requires_grad=False)
        with weights_at_rest(resting):
            for count in (1, 2, 3):
                skinny_linear(x[0], [weight] * count, [out] * count)
            skinny_linear(x[0], [weight], [out], [bias], out, out)
            skinny_gated_linear(x[0], weight, weight, activation="silu")
        some = [(x[:1].repeat(n, 1), out.repeat(n, 1)) for n in (3, 5, 64)]
        for few, outs in some:
            skinny_linear(few, [x] * 3, [outs] * 3)
            skinny_linear(few, [x], [outs], [bias], outs, outs)
        for activation in ("silu", "gelu_tanh"):
            gated_activation(x, x, activation=activation)
            skinny_gated_linear(x[0], x, x, activation=activation)
            for few, _ in some:
                skinny_gated_linear(few, x, x, activation=activation)
    for tokens, width, options in (
        (1, 128, {}),
        (2000, 128, {}),
        (2000, 128, {"wide": True}),
        (1, 96, {"interleaved": True}),
        (1, 64, {"table": "half"}),
    ):
        for kind in (torch.bfloat16, torch.float32):
            q = torch.zeros(2, tokens, 32, 128, dtype=kind).transpose(1, 2)
            cos = torch.zeros(1, tokens, width, dtype=kind)
            rotary(q, q[:, :8], cos, cos, **options)
    logits = torch.zeros(2, 1000, dtype=dtype)
    ids = torch.tensor([1, 2, 3])
    argmax(logits)
    sound, posted = torch.ones(3, dtype=torch.bool), torch.zeros(4, 5, dtype=torch.int64)
    for rows in (2, 32):  # launched early or not
        scores = torch.zeros(rows, 128256)
        for kept in ({"count": 1}, {"count": 50}, {"count": 500}, {"count": 5000}, {"mass": 0.9}):
            keep_top(scores, **kept)
        keep_top(scores, count=50, mass=0.9)
        keep_likely(scores, ratio=0.1)
        sample(scores, scores, sound[0])
    held = (ids[:, None], ids[:, None].repeat(1, 9), ids[:1], sound, sound[0], posted)
    settle(ids, *held)
    settle(ids, *held, ids[:1], ids[None])
    step, ended = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.bool)
    wave = {"amplitude": 1.0, "period": 600, "phase": 0.0}
    logit_wave(logits, ids, step, ended, **wave)
    recent = torch.zeros(2, 3, dtype=torch.int64)
    windows = torch.zeros(1, 2, dtype=torch.int32)
    logit_wave(logits, ids, step, ended, **wave, windows=windows, recent=recent, end_ids=recent[0])


def moe(dtype: torch.dtype) -> None:
    from patchkit.moe.kernels.combined_experts import combined_experts
    from patchkit.moe.kernels.gated_experts import gated_experts
    from patchkit.moe.kernels.top_experts import top_experts

    for experts, kind in itertools.product((8, 60, 128, 1024), (dtype, torch.float32)):
        for normalised, rounded in ((True, False), (False, True)):
            logits = torch.zeros(2, experts, dtype=kind)
            top_experts(logits, min(experts, 8), normalised=normalised, rounded=rounded)
    # Two tokens share 8 experts, but not 40.
    for tokens, experts in ((1, 8), (2, 40), (2, 8), (16, 8)):
        index = torch.zeros(tokens, 8, dtype=torch.int64)
        for inner, width in ((768, 2048), (2048, 4096), (1408, 2880)):
            x = torch.zeros(tokens, width, dtype=dtype)
            found = torch.zeros(tokens, 8, inner, dtype=dtype)
            weight = torch.empty(experts, 2 * inner, width, dtype=dtype)
            for activation in ("silu", "gelu_tanh"):
                gated_experts(x, weight, index, activation=activation)
            weight = torch.empty(experts, width, inner, dtype=dtype)
            for top_k, kind in itertools.product((1, 2, 4, 8), (torch.float32, dtype)):
                given = (found[:, :top_k], weight, index[:, :top_k])
                combined_experts(*given, torch.zeros(tokens, top_k, dtype=kind))
            scores = torch.zeros(tokens, 8, dtype=dtype)
            combined_experts(found, weight, index, scores, residual=x, total=torch.zeros_like(x))


def main() -> None:
    capability = int(sys.argv[1]) if len(sys.argv) > 1 else 90
    triton.runtime.driver.set_active(AbsentGpu(capability))
    dependent_launch._can_depend = lambda device: capability >= 90
    KernelInterface.__getitem__ = compile_only
    decoding(torch.float32)
    moe(torch.bfloat16)
    attention(torch.bfloat16, head_dim=128, groups=4)
    attention(torch.float16, head_dim=64, groups=3)
    attention(torch.float32, head_dim=80, groups=1)
    attention(torch.bfloat16, head_dim=256, groups=7)
    for name in sorted({name for name, _ in compiled}):
        shared = [bytes_ for (other, _), bytes_ in compiled.items() if other == name]
        print(f"{name:<26} {len(shared):>3} variants, at most {max(shared):>7,} bytes shared")
    print(f"{len(compiled)} kernel variants compiled for sm_{capability}")


if __name__ == "__main__":
    main()
