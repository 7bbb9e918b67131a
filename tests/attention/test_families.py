"""`apply(model)` alone gives the answers of the unpatched model, family by family."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import patchkit
from patchkit import KVStore
from patchkit.testing import FAMILIES, left_padded_batch, reference_attention, tiny_model

from ..helpers import with_cache

VOCAB = 97


@pytest.fixture(params=FAMILIES)
def model(request):
    family = request.param
    no_dropout = {"dropout": 0.0} if family == "opt" else {}
    return tiny_model(family, attn_implementation=reference_attention(family), **no_dropout)


def generated(model, new_tokens=24, **kwargs):
    return model.generate(
        **kwargs,
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


def second_turn(model, first, mask, **kwargs):
    turn = torch.randint(1, VOCAB, (len(mask), 6), generator=torch.Generator().manual_seed(4))
    ids = torch.cat([first.sequences, turn], dim=1)
    mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], dim=1)
    past = first.past_key_values
    return generated(model, input_ids=ids, attention_mask=mask, **with_cache(past), **kwargs)


def situations(model):
    """Every way of feeding a model that has to agree, as `{name: output}`."""
    batch = left_padded_batch(VOCAB, [23, 11, 17])
    single = {"input_ids": batch["input_ids"][:1]}
    first = generated(model, **batch)
    return {
        "left-padded batch": first,
        "second turn": second_turn(model, copy.deepcopy(first), batch["attention_mask"]),
        "single": generated(model, **single),
        "one-token prompt": generated(model, input_ids=single["input_ids"][:, :1]),
        "chunked prefill": generated(model, prefill_chunk_size=5, **batch),
        "prompt lookup": generated(model, prompt_lookup_num_tokens=3, **single),
        "beam search": generated(model, num_beams=3, **batch),
        "sampling": sampled(model, batch),
    }


def sampled(model, batch):
    torch.manual_seed(11)
    return model.generate(
        **batch,
        max_new_tokens=12,
        do_sample=True,
        temperature=1.3,
        top_p=0.9,
        num_return_sequences=2,
        return_dict_in_generate=True,
        output_logits=True,
    )


def test_answers_are_those_of_the_unpatched_model(model):
    want = situations(model)
    with patchkit.patched(model):
        got = situations(model)
        calls = patchkit.report(model).calls
    assert sum(calls["append"].values()) > 0
    for name, expected in want.items():
        assert torch.equal(got[name].sequences, expected.sequences), name
        assert isinstance(got[name].past_key_values, KVStore)
        for a, b in zip(got[name].logits, expected.logits, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, msg=name)


@torch.no_grad()
def test_raw_forward_loop_and_training_pass(model):
    ids = torch.randint(1, VOCAB, (2, 30), generator=torch.Generator().manual_seed(5))
    want = model(ids, use_cache=False).logits
    with patchkit.patched(model):
        past, parts, start = None, [], 0
        for chunk in [13, 1, 1, 6, 9]:
            out = model(ids[:, start : start + chunk], **with_cache(past))
            past, start = out.past_key_values, start + chunk
            parts.append(out.logits)
        looped = torch.cat(parts, dim=1)
        with torch.enable_grad():
            model.train()
            trained = model(ids, labels=ids)
            trained.loss.backward()
            model.eval()
    assert isinstance(past, KVStore)
    torch.testing.assert_close(looped, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(trained.logits, want, atol=1e-4, rtol=1e-4)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)


def snapshot(model):
    """Every instance attribute of every module and configuration object, by identity."""
    state = {}
    for name, module in model.named_modules():
        state[name] = dict(module.__dict__)
        for key, value in module.__dict__.items():
            if isinstance(value, dict):
                state[name, key] = dict(value)
        if hasattr(module, "config"):
            state[name, "config"] = copy.deepcopy(module.config.__dict__)
    return state


def test_restore_leaves_every_dict_as_it_was(model):
    batch = left_padded_batch(VOCAB, [9, 5])
    want = generated(model, 6, **batch)
    before = snapshot(model)
    keys = {k: v.clone() for k, v in model.state_dict().items()}
    patchkit.apply(model, "window")
    patched_keys = model.state_dict()
    assert patched_keys.keys() == keys.keys()
    generated(model, 6, **batch)
    patchkit.restore(model)
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name, attributes in before.items():
        assert after[name].keys() == attributes.keys(), name
        for key, value in attributes.items():
            same = after[name][key] is value
            assert same or (isinstance(name, tuple) and after[name][key] == value), (name, key)
    got = generated(model, 6, **batch)
    assert torch.equal(torch.stack(got.logits), torch.stack(want.logits))
    assert all(torch.equal(v, keys[k]) for k, v in model.state_dict().items())


def test_twin_of_the_same_config_is_untouched(model):
    twin = AutoModelForCausalLM.from_config(model.config)
    implementation = twin.config._attn_implementation
    twin.config = model.config
    patchkit.apply(model)
    assert twin.config._attn_implementation == implementation
    assert model.config._attn_implementation == "patchkit"
    patchkit.restore(model)
    assert model.config is twin.config
