"""Score-based eviction on a GPU: kernels and recorded steps against the CPU's reference."""

from __future__ import annotations

import gc

import pytest
import torch

import patchkit
from patchkit import CAKE, H2O, AdaKV, SnapKV
from patchkit.testing import left_padded_batch, tiny_model

from ..attention.eviction_cases import CASES, VOCAB, build, feed, positions, stream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("groups", [1, 2, 7])
@pytest.mark.parametrize("name", CASES)
def test_same_tokens_as_on_the_cpu(name, groups):
    method, _ = CASES[name]
    ids, valid = stream([43, 19, 33], 8)
    chunks = [43, 1, 1, 5, 1]
    with patchkit.patched(build(groups, dtype=torch.float32), method, backend="reference") as model:
        want = [(logits, positions(store)) for logits, store in feed(model, ids, valid, chunks)]
    on_gpu = build(groups, dtype=torch.float32).cuda()
    with patchkit.patched(on_gpu, method, backend="triton") as model:
        fed = feed(model, ids.cuda(), valid.cuda(), chunks)
        for (logits, store), (cpu_logits, kept) in zip(fed, want, strict=True):
            assert positions(store) == kept
            real = valid[:, :43][:, -logits.shape[1] :]
            torch.testing.assert_close(logits.cpu()[real], cpu_logits[real], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", CASES)
def test_recorded_steps(name):
    method, _ = CASES[name]
    batch = left_padded_batch(VOCAB, [43, 19])
    options = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True}
    with patchkit.patched(build(dtype=torch.float32), method) as model:
        want = model.generate(**batch, **options)
    on_gpu = build(dtype=torch.float32).cuda()
    with patchkit.patched(on_gpu, method) as model:
        inputs = {key: value.cuda() for key, value in batch.items()}
        for _ in range(2):
            got = model.generate(**inputs, **options)
            assert torch.equal(got.sequences.cpu(), want.sequences)
            assert positions(got.past_key_values) == positions(want.past_key_values)
        report = patchkit.report(model)
    assert report.steps["replayed"] >= 40 and report.unrecorded is None
    assert report.calls["evict_lowest"].keys() == {"triton"}


@pytest.mark.parametrize("cls", [H2O, SnapKV, AdaKV, CAKE])
def test_memory_is_given_back_after_the_prompt(cls):
    model = tiny_model("llama", num_hidden_layers=8, max_position_embeddings=40_000).cuda()
    ids = torch.randint(1, VOCAB, (1, 32_000), device="cuda")

    def held(*methods) -> tuple[int, patchkit.KVStore]:
        with patchkit.patched(model, *methods), torch.no_grad():
            before = torch.cuda.memory_allocated()
            out = model(ids, logits_to_keep=1, use_cache=True)
            store = out.past_key_values
            del out
            gc.collect()
            return torch.cuda.memory_allocated() - before, store

    dense, store = held()
    whole = store.nbytes
    del store
    kept, store = held(cls(budget=1024))
    evicted = whole - store.nbytes
    assert dense - kept >= 0.95 * evicted > 0.9 * whole
