"""Window eviction equals an exact masked reference without a cache, in every way of feeding it.

The models run in float64 (transformers still rounds norms and the returned logits to float32), so
that the agreement asked for leaves no room for a wrong mask or position.
"""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

import patchkit
from patchkit import KVStore, Window
from patchkit.errors import CacheError, SlotError, UnsupportedGenerationError
from patchkit.testing import FAMILIES, left_padded_batch, reference_attention, tiny_model

from ..helpers import with_cache
from .policy_reference import eviction_mask, masked_logits, window_keep

BUDGET, SINKS, VOCAB = 12, 3, 97
SLIDING = 8  # the window of the tiny Gemma and gpt-oss models


MOE = ("olmoe", "mixtral", "qwen3_moe", "deepseek_v2", "gpt_oss")
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5, "check_dtype": False}


def build(family: str = "llama", dtype: torch.dtype = torch.float64, **overrides):
    attention = reference_attention(family)
    model = tiny_model(family, dtype=dtype, attn_implementation=attention, **overrides)
    if family in MOE:  # the grouped matrix product has no float64
        model.set_experts_implementation("eager")
    return model


def reference(model, ids, valid, chunks, *, budget=BUDGET, sinks=SINKS, per_head=None):
    """Masked logits of an unpatched model for the token stream `ids [B, N]` fed in `chunks`."""
    batch_size = ids.shape[0]
    config = model.config.get_text_config()
    groups = config.num_attention_heads // getattr(
        config, "num_key_value_heads", config.num_attention_heads
    )
    heads = [1] if per_head is None else [b for b in per_head for _ in range(groups)]
    full = [
        [window_keep(budget if per_head is None else b, sinks) for b in heads]
        for _ in range(batch_size)
    ]
    masks = eviction_mask(valid, chunks, full)
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        recent = [[window_keep(min(budget, SLIDING - 1), 0)]] * batch_size
        sliding = eviction_mask(valid, chunks, recent, sliding_window=SLIDING)
        masks = {"full_attention": masks, "sliding_attention": sliding}
    return masked_logits(model, ids, valid, masks)


def generated(model, new_tokens=20, **kwargs):
    return model.generate(
        **kwargs,
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


def check(out, model, valid, chunks, prompt_len, **kwargs):
    """Every step's logits equal the reference's logits of the column before it."""
    ids = out.sequences[:, :-1]
    steps = len(out.logits)
    valid = torch.cat([valid, valid.new_ones(len(valid), ids.shape[1] - valid.shape[1])], dim=1)
    want = reference(model, ids, valid, [*chunks, *[1] * (steps - 1)], **kwargs)
    got = torch.stack(out.logits, dim=1)
    torch.testing.assert_close(got, want[:, prompt_len - 1 :], **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_matches_masked_reference(family):
    model = build(family)
    batch = left_padded_batch(VOCAB, [23, 11, 17])
    with patchkit.patched(model, Window(budget=BUDGET, num_sink_tokens=SINKS)):
        out = generated(model, **batch)
        plain = generated(model, kv_eviction=None, **batch)
    assert not torch.equal(out.sequences, plain.sequences)  # the window must matter here
    check(out, model, batch["attention_mask"].bool(), [23], 23)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 5, 22])
def test_chunked_prefill_matches_masked_reference(family, chunk):
    model = build(family)
    batch = left_padded_batch(VOCAB, [23, 11, 17])
    with patchkit.patched(model, Window(budget=BUDGET, num_sink_tokens=SINKS)):
        out = generated(model, 6, prefill_chunk_size=chunk, **batch)
    sizes = [chunk] * (23 // chunk) + [23 % chunk] * (23 % chunk > 0)
    check(out, model, batch["attention_mask"].bool(), sizes, 23)


@pytest.mark.parametrize("family", FAMILIES)
def test_second_turn_continues_at_the_true_position(family):
    model = build(family)
    batch = left_padded_batch(VOCAB, [23, 11, 17])
    with patchkit.patched(model, Window(budget=BUDGET, num_sink_tokens=SINKS)):
        first = generated(model, 8, **batch)
        turn = torch.randint(1, VOCAB, (3, 6), generator=torch.Generator().manual_seed(3))
        ids = torch.cat([first.sequences, turn], dim=1)
        mask = batch["attention_mask"]
        mask = torch.cat([mask, mask.new_ones(3, ids.shape[1] - mask.shape[1])], dim=1)
        store = first.past_key_values
        second = generated(model, 8, input_ids=ids, attention_mask=mask, **with_cache(store))
    assert second.past_key_values is store
    # 23 prompt columns, 7 decoded (the 8th was never fed), then 1 + 6 new ones in one chunk.
    chunks = [23, *[1] * 7, 7]
    check(second, model, mask.bool(), chunks, ids.shape[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_beam_search_reorders_the_store(family):
    model = build(family)
    batch = left_padded_batch(VOCAB, [19, 11])
    config = GenerationConfig(
        num_beams=3, num_return_sequences=3, max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    with patchkit.patched(model, Window(budget=BUDGET, num_sink_tokens=SINKS)):
        out = model.generate(
            **batch, generation_config=config, return_dict_in_generate=True, output_scores=True
        )
    ids = out.sequences[:, :-1]
    valid = batch["attention_mask"].bool().repeat_interleave(3, dim=0)
    valid = torch.cat([valid, valid.new_ones(6, 11)], dim=1)
    want = reference(model, ids, valid, [19, *[1] * 11]).log_softmax(-1)
    taken = want[:, 18:].gather(-1, out.sequences[:, 19:, None])[..., 0]
    torch.testing.assert_close(out.sequences_scores, taken.sum(-1) / 12, **TOLERANCE)


def test_raw_forward_loop():
    model = build()
    ids = torch.randint(1, VOCAB, (2, 30), generator=torch.Generator().manual_seed(5))
    chunks = [13, 1, 1, 6, 1, 8]
    with patchkit.patched(model, Window(budget=BUDGET, num_sink_tokens=SINKS)), torch.no_grad():
        past, logits, start = None, [], 0
        for chunk in chunks:
            out = model(ids[:, start : start + chunk], **with_cache(past))
            past = out.past_key_values
            logits.append(out.logits)
            start += chunk
    assert isinstance(past, KVStore)
    want = reference(model, ids, torch.ones_like(ids, dtype=torch.bool), chunks)
    torch.testing.assert_close(torch.cat(logits, dim=1), want, **TOLERANCE)


def test_budgets_per_layer_and_head():
    model = build(num_hidden_layers=2)
    batch = left_padded_batch(VOCAB, [23, 11, 17])
    per_head = (7, 15)
    budget = [list(per_head), list(per_head)]
    with patchkit.patched(model, Window(budget=budget, num_sink_tokens=SINKS)):
        out = generated(model, **batch)
        lengths = out.past_key_values.lengths()
    for length in lengths:
        assert length.tolist() == [[7, 15]] * 3
    check(out, model, batch["attention_mask"].bool(), [23], 23, per_head=per_head)


def test_budget_per_layer_holds():
    model = build()
    with patchkit.patched(model, Window(budget=[6, 20], num_sink_tokens=SINKS)):
        out = generated(model, **left_padded_batch(VOCAB, [23, 11, 17]))
    first, second = out.past_key_values.lengths()
    assert first.eq(6).all()
    assert second.eq(20).all()


def test_fraction_counts_each_rows_own_prompt():
    model = build()
    batch = left_padded_batch(VOCAB, [24, 11, 17])
    with patchkit.patched(model, Window(budget=0.5, num_sink_tokens=SINKS)):
        out = generated(model, **batch)
    for length in out.past_key_values.lengths():
        assert length.tolist() == [[12, 12], [5, 5], [8, 8]]
    assert all(layer.capacity == 16 for layer in out.past_key_values.store_layers)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_budget_is_never_exceeded_after_a_forward(backend):
    model = build(dtype=torch.float32)
    ids = torch.randint(1, VOCAB, (1, 60), generator=torch.Generator().manual_seed(5))
    window = Window(budget=BUDGET, num_sink_tokens=SINKS)
    with patchkit.patched(model, window, backend=backend), torch.no_grad():
        past, start = None, 0
        for chunk in [11, 1, 1, 1, 20, 1, 9]:
            past = model(ids[:, start : start + chunk], **with_cache(past)).past_key_values
            start += chunk
            for layer in past.store_layers:
                assert layer.length.max() == min(start, BUDGET)
                held = layer.position[0, 0][: layer.length[0, 0]].tolist()
                expected = list(range(start))
                if start > BUDGET:
                    expected = expected[:SINKS] + expected[-(BUDGET - SINKS) :]
                assert sorted(held) == expected
                assert held[:SINKS] == expected[:SINKS]


def test_a_budget_that_is_never_reached_is_exact():
    model = build()
    batch = left_padded_batch(VOCAB, [23, 11, 17])
    plain = generated(model, **batch)
    with patchkit.patched(model, Window(budget=64)):
        out = generated(model, **batch)
    assert torch.equal(out.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(plain.logits), **TOLERANCE)


def test_triton_backend_agrees_with_reference():
    model = build("gemma2", dtype=torch.float32)
    batch = left_padded_batch(VOCAB, [13, 7])
    window = Window(budget=9, num_sink_tokens=2)
    with patchkit.patched(model, window, backend="reference"):
        want = generated(model, 6, **batch)
    with patchkit.patched(model, window, backend="triton"):
        got = generated(model, 6, **batch)
        calls = patchkit.report(model).calls
    assert calls["decode_attention"].keys() == {"triton"}
    assert calls["append"].keys() == {"triton"}
    assert calls["evict_lowest"].keys() == {"triton"}
    torch.testing.assert_close(
        torch.stack(got.logits), torch.stack(want.logits), atol=1e-4, rtol=1e-4
    )


def test_memory_stays_constant_and_is_released():
    model = build(max_position_embeddings=2048)
    ids = torch.randint(1, VOCAB, (1, 1000))
    with patchkit.patched(model, Window(budget=100)):
        short = generated(model, 2, input_ids=ids[:, :110]).past_key_values.nbytes
        long = generated(model, 2, input_ids=ids).past_key_values.nbytes
        dense = generated(model, 2, input_ids=ids, kv_eviction=None).past_key_values.nbytes
    assert short == long
    assert long < dense / 3


def test_crop_after_eviction_is_refused():
    model = build()
    with patchkit.patched(model, Window(budget=BUDGET)):
        store = generated(model, 4, input_ids=torch.ones(1, 20, dtype=torch.long)).past_key_values
        with pytest.raises(CacheError, match="evicted"):
            store.crop(-2)


def test_assisted_decoding_is_refused_by_name():
    model = build()
    with (
        patchkit.patched(model, Window(budget=BUDGET)),
        pytest.raises(UnsupportedGenerationError, match="window"),
    ):
        model.generate(torch.ones(1, 5, dtype=torch.long), prompt_lookup_num_tokens=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": 4}, "exceed num_sink_tokens=4"),
        ({"budget": 0.0}, r"\(0, 1\]"),
        ({"budget": 1.5}, r"\(0, 1\]"),
        ({"budget": [9, 3]}, "got 3"),
        ({"budget": [9, [9, 2]]}, "got"),
        ({"num_sink_tokens": -1}, "got -1"),
    ],
)
def test_settings_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        Window(**fields)


@pytest.mark.parametrize("budget", [[9], [9, 9, 9], [[9], [9]], [9, [9, 9, 9]]])
def test_budgets_that_do_not_fit_the_model(budget):
    model = build()
    with pytest.raises(ValueError, match="expected one budget for each of 2"):
        patchkit.apply(model, Window(budget=budget))
    assert not patchkit.report(model).patched


def test_wrong_slot():
    model = patchkit.apply(build())
    with pytest.raises(SlotError, match="kv_eviction"):
        model.generate(torch.ones(1, 5, dtype=torch.long), logit_schedule=Window(budget=9))


def test_patch_function():
    from patchkit.attention import window

    model = window.patch(build(), budget=9)
    assert (
        patchkit.report(model).methods[0].config
        == "Window(budget=9, num_sink_tokens=4, budget_bytes=None)"
    )
