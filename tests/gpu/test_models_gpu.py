"""Patched models on a CUDA device, through the Triton kernels, against the unpatched ones."""

from __future__ import annotations

import pytest
import torch

import patchkit
from patchkit import CyclicReflex, Window, demo
from patchkit.testing import FAMILIES, left_padded_batch, reference_attention, tiny_model

from ..helpers import with_cache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
VOCAB = 97


def build(family="llama", dtype=torch.float32, **overrides):
    attention = reference_attention(family)
    return tiny_model(family, dtype=dtype, attn_implementation=attention, **overrides).cuda()


def batch_of(lengths):
    return {name: tensor.cuda() for name, tensor in left_padded_batch(VOCAB, lengths).items()}


def generated(model, new_tokens=24, **kwargs):
    return model.generate(
        **kwargs,
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


def situations(model):
    batch = batch_of([23, 11, 17])
    first = generated(model, **batch)
    mask = batch["attention_mask"]
    ids = torch.cat([first.sequences, first.sequences[:, -6:]], dim=1)
    mask = torch.cat([mask, mask.new_ones(3, ids.shape[1] - mask.shape[1])], dim=1)
    past = first.past_key_values
    return {
        "left-padded batch": first,
        "single": generated(model, input_ids=batch["input_ids"][:1]),
        "chunked prefill": generated(model, prefill_chunk_size=5, **batch),
        "prompt lookup": generated(
            model, prompt_lookup_num_tokens=3, input_ids=batch["input_ids"][:1]
        ),
        "beam search": generated(model, num_beams=3, **batch),
        "second turn": generated(model, input_ids=ids, attention_mask=mask, **with_cache(past)),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_the_unpatched_model(family):
    model = build(family)
    want = situations(model)
    with patchkit.patched(model):
        got = situations(model)
        calls = patchkit.report(model).calls
    assert calls["append"].keys() == {"triton"}
    assert calls["decode_attention"]["triton"] > 0
    for name, expected in want.items():
        assert torch.equal(got[name].sequences, expected.sequences), name
        for a, b in zip(got[name].logits, expected.logits, strict=True):
            torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_window_through_kernels_equals_the_reference_backend(family):
    model = build(family)
    window = Window(budget=12, num_sink_tokens=3)
    with patchkit.patched(model, window, backend="reference"):
        want = situations_evicting(model)
    with patchkit.patched(model, window):
        got = situations_evicting(model)
        assert patchkit.report(model).calls["evict_lowest"].keys() == {"triton"}
    for name, expected in want.items():
        assert torch.equal(got[name].sequences, expected.sequences), name
        for a, b in zip(got[name].logits, expected.logits, strict=True):
            torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4, msg=name)


def situations_evicting(model):
    batch = batch_of([40, 11, 33])
    return {
        "batch": generated(model, 40, **batch),
        "chunked": generated(model, 8, prefill_chunk_size=7, **batch),
        "beams": generated(model, 12, num_beams=3, **batch),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_float32_as_the_unpatched_model(dtype):
    model = build(dtype=torch.float32, num_hidden_layers=4)
    batch = batch_of([200, 120])
    exact = generated(model, 1, **batch).logits[0]
    ids = torch.cat([batch["input_ids"], batch["input_ids"][:, -5:]], dim=1)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits.double()
        model.to(dtype)
        plain = model(ids, use_cache=False).logits.double()
        patchkit.apply(model)
        past = model(ids[:, :200]).past_key_values
        steps = [model(ids[:, i : i + 1], **with_cache(past)).logits for i in range(200, 205)]
    assert exact.isfinite().all()
    got = torch.cat(steps, dim=1).double()
    error = (got - full[:, 200:]).abs().max()
    own = (plain - full).abs().max()
    assert error <= 2 * own, (error, own)


def test_cyclic_reflex_kernel_in_generate():
    model = build()
    wave = CyclicReflex(amplitude=30.0, period=12, reflection_tokens=[3, 5])
    ids = batch_of([23])["input_ids"]
    with patchkit.patched(model, wave, backend="reference"):
        want = generated(model, input_ids=ids).sequences
    with patchkit.patched(model, wave):
        got = generated(model, input_ids=ids).sequences
        # The rest is recorded: once to build the kernels, once to record, and the prompt.
        assert patchkit.report(model).calls["logit_wave"] == {"triton": 3}
        assert patchkit.report(model).steps["replayed"] > 20
    assert torch.equal(got, want)


@torch.no_grad()
def test_a_step_over_the_store_can_be_captured_in_a_cuda_graph():
    model = patchkit.apply(build(), Window(budget=40, num_sink_tokens=3))
    ids = torch.randint(1, VOCAB, (2, 60), device="cuda")
    eager, captured = patchkit.KVStore(model), patchkit.KVStore(model)
    for store in (eager, captured):
        model(ids, **with_cache(store))
        for _ in range(3):  # warm up: compile kernels, settle the capacity
            model(ids[:, :1], **with_cache(store))
    token = ids[:, :1].clone()
    position = torch.full((2, 1), 63, device="cuda")
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        twin = patchkit.KVStore(model)
        model(ids, **with_cache(twin))
        model(token, position_ids=position, **with_cache(twin))
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        logits = model(token, position_ids=position, **with_cache(captured)).logits
    for step in range(5):
        token.copy_(ids[:, step : step + 1])
        position.fill_(63 + step)
        want = model(token, position_ids=position, **with_cache(eager)).logits
        graph.replay()
        torch.testing.assert_close(logits, want, atol=2e-4, rtol=2e-4)


@pytest.mark.real
@pytest.mark.skipif(not demo.is_cached(), reason="the demo model is not in the cache")
def test_smollm2_pass_key_and_agreement():
    model, tokenizer = demo.load(dtype=torch.float32, device="cuda")
    filler = "The grass is green. The sky is blue. The sun is yellow. Here we go. " * 40
    text = (
        f"{filler}The pass key is 73914. Remember it. {filler}What is the pass key? The pass key is"
    )
    ids = tokenizer(text, return_tensors="pt").input_ids.cuda()
    plain = model.generate(ids, max_new_tokens=32, do_sample=False)
    with patchkit.patched(model):
        dense = model.generate(ids, max_new_tokens=32, do_sample=False)
    assert torch.equal(dense, plain)
    assert "73914" in tokenizer.decode(dense[0, ids.shape[1] :])
