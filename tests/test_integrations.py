"""deepcopy, PEFT, accelerate, gradient checkpointing, torch.compile: they go on working."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from peft import LoraConfig, get_peft_model

import patchkit
from patchkit import KVStore, Window
from patchkit.testing import tiny_model

from .helpers import with_cache

IDS = torch.randint(1, 97, (1, 20), generator=torch.Generator().manual_seed(1))


def greedy(model, **kwargs):
    return model.generate(input_ids=IDS, max_new_tokens=10, do_sample=False, **kwargs)


def lora(model):
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, config).eval()


def test_deepcopy_is_a_patched_model_of_its_own():
    model = patchkit.apply(tiny_model("llama"), Window(budget=8))
    want = greedy(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)  # the copy must not run the original's weights
    assert torch.equal(greedy(twin), want)
    assert not torch.equal(greedy(model), want)
    patchkit.restore(twin)
    assert not patchkit.report(twin).patched
    assert patchkit.report(model).patched
    assert twin.config._attn_implementation == "sdpa"
    plain = tiny_model("llama")
    assert torch.equal(greedy(twin), greedy(plain))


def test_pickling_is_refused_by_name():
    model = patchkit.apply(tiny_model("llama"))
    with pytest.raises(TypeError, match="restore"):
        pickle.dumps(model)
    patchkit.restore(model)
    pickle.dumps(model)


@pytest.mark.parametrize("adapter_first", [True, False])
def test_lora_before_and_after_apply(adapter_first):
    want_model = lora(tiny_model("llama"))
    want = greedy(want_model)
    base_want = greedy(tiny_model("llama"))
    assert not torch.equal(want, base_want)
    model = tiny_model("llama")
    if adapter_first:
        model = lora(model)
        assert patchkit.apply(model) is model
    else:
        model = lora(patchkit.apply(model))
    assert torch.equal(greedy(model), want)
    windowed = greedy(model, kv_eviction=Window(budget=6), return_dict_in_generate=True)
    assert isinstance(windowed.past_key_values, KVStore)
    assert windowed.past_key_values.lengths()[0].max() == 6
    with model.disable_adapter():
        assert torch.equal(greedy(model), base_want)
    assert patchkit.report(model).patched
    patchkit.restore(model)
    assert not patchkit.report(model).patched
    assert torch.equal(greedy(model), want)
    merged = model.merge_and_unload()
    assert torch.equal(greedy(patchkit.apply(merged)), want)


def test_lora_trains_through_the_patch():
    plain, model = lora(tiny_model("llama")), lora(patchkit.apply(tiny_model("llama")))
    for one in (plain, model):
        one.train()
        one(input_ids=IDS, labels=IDS).loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert gradients
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("offload_first", [True, False])
def test_accelerate_cpu_offload(offload_first):
    want = greedy(tiny_model("llama"))
    model = tiny_model("llama")
    if offload_first:
        cpu_offload(model, execution_device="cpu")
        patchkit.apply(model)
    else:
        patchkit.apply(model)
        cpu_offload(model, execution_device="cpu")
    assert torch.equal(greedy(model), want)
    out = greedy(model, kv_eviction=Window(budget=6), return_dict_in_generate=True)
    assert out.past_key_values.lengths()[0].max() == 6
    patchkit.restore(model)
    assert torch.equal(greedy(model), want)
    remove_hook_from_submodules(model)
    assert torch.equal(greedy(model), want)
    forwards = [vars(m).get("forward") for m in model.modules()]
    assert not any("patchkit" in f.__module__ for f in forwards if f is not None)


def test_accelerate_hooks_that_come_and_go():
    model = patchkit.apply(tiny_model("llama"))
    before = {name: dict(vars(m)) for name, m in tiny_model("llama").named_modules()}
    cpu_offload(model, execution_device="cpu")
    remove_hook_from_submodules(model)
    patchkit.restore(model)
    norm = model.model.norm
    assert "_patchkit" not in vars(norm) and "_old_forward" not in vars(norm)
    assert vars(norm).keys() - before["model.norm"].keys() <= {"forward"}
    assert torch.equal(greedy(model), greedy(tiny_model("llama")))


def test_accelerate_dispatch():
    want = greedy(tiny_model("llama"))
    model = dispatch_model(tiny_model("llama"), {"": "cpu"}, force_hooks=True)
    patchkit.apply(model)
    assert torch.equal(greedy(model), want)
    patchkit.restore(model)
    assert torch.equal(greedy(model), want)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = patchkit.apply(tiny_model("llama")).train()
        if checkpointing:  # renamed in transformers 5.23
            old = not hasattr(model, "activation_checkpointing_enable")
            getattr(model, f"{'gradient' if old else 'activation'}_checkpointing_enable")()
        model(IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_torch_compile():
    model = tiny_model("llama")
    want = model(IDS).logits
    want_tokens = greedy(model)
    patchkit.apply(model)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS, use_cache=False).logits, want, atol=1e-4, rtol=1e-4)
    out = compiled(IDS)
    assert isinstance(out.past_key_values, KVStore)
    torch.testing.assert_close(out.logits, want, atol=1e-4, rtol=1e-4)
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(greedy(model), want_tokens)
    del model.forward
    torch._dynamo.reset()


@torch.no_grad()
def test_packed_sequences_keep_their_block_mask():
    model = tiny_model("llama")
    positions = torch.tensor([[*range(8), *range(12)]])
    want = model(IDS, position_ids=positions, use_cache=False).logits
    plain = model(IDS, use_cache=False).logits
    patchkit.apply(model)
    got = model(IDS, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert (want - plain).abs().max() > 0.1


def test_moving_between_dtypes():
    model = patchkit.apply(tiny_model("llama"))
    want = greedy(model)
    model.to(torch.bfloat16)
    assert greedy(model).shape == want.shape
    model.to(torch.float64)
    assert greedy(model).shape == want.shape


@torch.no_grad()
def test_autocast():
    model = tiny_model("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = greedy(model, return_dict_in_generate=True, output_logits=True)
        patchkit.apply(model)
        got = greedy(model, return_dict_in_generate=True, output_logits=True)
    assert got.past_key_values.layers[0].keys.dtype == torch.bfloat16
    scale = torch.stack(want.logits).abs().max()
    torch.testing.assert_close(got.logits[0], want.logits[0], atol=0.05 * scale.item(), rtol=0)
    # A store keeps the dtype it began with; a model of another dtype can continue over it.
    ids = torch.cat([got.sequences, IDS[:, :3]], dim=1)
    out = model.generate(ids, **with_cache(got.past_key_values), max_new_tokens=3, do_sample=False)
    assert out.shape[1] == ids.shape[1] + 3


def test_a_vision_tower_keeps_its_attention():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    config = Gemma3Config(
        text_config={
            "vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
            "sliding_window": 8, "initializer_range": 0.3,
        },
        vision_config={
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
        },
        mm_tokens_per_image=4, image_token_index=96, boi_token_index=94, eoi_token_index=95,
    )  # fmt: skip
    model = Gemma3ForConditionalGeneration(config).eval()
    ids = IDS.remainder(90) + 1
    image = torch.tensor([[94, 96, 96, 96, 96, 95]])
    inputs = {
        "input_ids": torch.cat([ids[:, :5], image, ids[:, 5:]], dim=1),
        "pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)),
    }
    inputs["token_type_ids"] = (inputs["input_ids"] == 96).long()
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True}
    want = model.generate(**inputs, **options, return_dict_in_generate=True)
    vision = model.config.vision_config._attn_implementation
    patchkit.apply(model)
    assert model.config.text_config._attn_implementation == "patchkit"
    assert model.config.vision_config._attn_implementation == vision
    got = model.generate(**inputs, **options, return_dict_in_generate=True)
    assert isinstance(got.past_key_values, KVStore)
    torch.testing.assert_close(
        torch.stack(got.logits), torch.stack(want.logits), atol=1e-4, rtol=1e-4
    )
    patchkit.restore(model)
    assert model.config is config
