"""Choosing the chunks of a long prompt; the answers of chunked prefill are tested elsewhere."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, Qwen3MoeConfig
from transformers.cache_utils import DynamicLayer

import patchkit
from patchkit import KVStore, Window, prefill
from patchkit.compat import CHUNKED_PREFILL_IGNORES_CACHE
from patchkit.prefill import activation_bytes, kv_bytes, new_tokens, prefill_chunk_size
from patchkit.testing import left_padded_batch, tiny_model

from .helpers import with_cache

VOCAB = 97


@pytest.fixture
def narrow(monkeypatch):
    """Let the CPU be served, with room for the activations of 1,000 tokens."""
    monkeypatch.setattr(prefill, "_DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(prefill, "_LEAST_BYTES", 0)
    monkeypatch.setattr(prefill, "free_bytes", lambda device: 1 << 40)
    model = tiny_model("llama")
    per_token = activation_bytes(model.config, 4)
    monkeypatch.setattr(prefill, "_MOST_BYTES", 1000 * per_token)
    return patchkit.apply(model)


def chunk(model, rows, tokens, store=None, config=None, **model_kwargs):
    ids = torch.ones(rows, tokens, dtype=torch.int64)
    config = config or GenerationConfig()
    return prefill_chunk_size(model, store or KVStore(model), ids, config, model_kwargs)


def test_chunks_are_even_and_fit(narrow):
    assert chunk(narrow, 1, 1000) is None
    assert chunk(narrow, 1, 1001) == 512  # two of 501, rounded up to a multiple of 256
    assert chunk(narrow, 1, 5000) == 768
    assert chunk(narrow, 2, 501) == 256
    assert chunk(narrow, 100, 501) == 256  # never less


def test_room_for_the_cache_is_left(narrow, monkeypatch):
    config = narrow.config
    cache = kv_bytes(config, [None] * config.num_hidden_layers, 900, 4)
    monkeypatch.setattr(prefill, "free_bytes", lambda _: cache + 1000 * activation_bytes(config, 4))
    assert chunk(narrow, 1, 900) == 512  # two thirds of what is left hold 666


def test_a_short_prompt_asks_nobody(narrow, monkeypatch):
    monkeypatch.setattr(prefill, "free_bytes", lambda device: 0)
    assert chunk(narrow, 1, 300) == 256
    monkeypatch.setattr(prefill, "_LEAST_BYTES", 1e9)
    assert chunk(narrow, 1, 300) is None


def test_what_cannot_be_cut_is_fed_at_once(narrow):
    positions = torch.zeros(3, 1, 2000, dtype=torch.int64)
    assert chunk(narrow, 1, 2000, position_ids=positions) is None
    assert chunk(narrow, 1, 2000, position_ids=positions[0]) is not None
    assert chunk(narrow, 1, 2000, token_type_ids=positions[0]) is None
    assert chunk(narrow, 1, 2000, pixel_values=[positions]) is None
    assert chunk(narrow, 1, 2000, config=GenerationConfig(output_hidden_states=True)) is None
    patchkit.apply(narrow, Window(budget=64))
    assert chunk(narrow, 1, 2000) is None


def test_a_cpu_feeds_everything_at_once():
    assert chunk(patchkit.apply(tiny_model("llama")), 1, 100_000) is None


@pytest.mark.parametrize("num_beams", [1, 2])
def test_answers_and_slots_are_those_of_a_prefill_in_one_go(narrow, monkeypatch, num_beams):
    batch = left_padded_batch(VOCAB, [700, 300])
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": num_beams}
    options |= {"return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
    seen = []
    original = KVStore.begin

    def begin(store, decoder, rows, tokens, mask):
        seen.append(tokens)
        return original(store, decoder, rows, tokens, mask)

    monkeypatch.setattr(KVStore, "begin", begin)
    ours = narrow.generate(**batch, **options)
    assert seen[:4] == [256, 256, 188, 1]
    layer = next(iter(ours.past_key_values.store_layers))
    assert layer.capacity <= 1024
    patchkit.restore(narrow)
    plain = narrow.generate(**batch, **options)
    assert torch.equal(ours.sequences, plain.sequences)
    for got, want in zip(ours.logits, plain.logits, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_layers_with_a_state_of_their_own_are_fed_at_once(narrow):
    store = KVStore(narrow)
    store.layers[0] = DynamicLayer()
    assert chunk(narrow, 1, 2000, store) is None


def test_slots_do_not_outgrow_the_prompt(narrow):
    """A store that holds some slots already gets as many as the prompt needs, at once."""
    ids = torch.randint(1, VOCAB, (1, 1300))
    store = KVStore(narrow)
    with torch.no_grad(), store.expecting(ids.shape[1]):
        for part in ids[:, :600].split(256, dim=1):
            narrow(part, **with_cache(store))
    capacities = [layer.capacity for layer in store.store_layers]
    assert capacities == [1536] * len(capacities)
    store.restart()
    with torch.no_grad(), store.expecting(1700):
        for part in ids.split(256, dim=1):
            narrow(part, **with_cache(store))
            assert {layer.capacity for layer in store.store_layers} == {1792}


def test_a_second_turn_counts_its_new_tokens_only(narrow):
    ids = torch.randint(1, VOCAB, (1, 900))
    store = KVStore(narrow)
    with torch.no_grad():
        narrow(ids, **with_cache(store))
    longer = torch.cat([ids, ids[:, :200]], dim=1)
    assert new_tokens(store, longer) == 200
    assert new_tokens(store, ids[:, :50]) == 50
    assert chunk(narrow, 1, 1100, store) is None
    wanted = None if CHUNKED_PREFILL_IGNORES_CACHE else 768
    assert chunk(narrow, 1, 900 + 1500, store) == wanted


def test_estimates():
    llama = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    assert kv_bytes(llama, [None] * 32, 1, 2) == 131_072
    assert kv_bytes(llama, [None, 100], 1000, 2) == 1100 * 4096
    assert 131_072 * activation_bytes(llama, 2) == pytest.approx(25.8e9, rel=0.01)
    experts = Qwen3MoeConfig(
        hidden_size=2048, moe_intermediate_size=768, num_experts_per_tok=8, intermediate_size=6144
    )
    assert activation_bytes(experts, 2) == 2 * (4 * 8 * (768 + 2048) + 10 * 2048)
