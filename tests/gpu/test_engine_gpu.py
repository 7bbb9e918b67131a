"""Recorded steps: that they are used, that they go stale when they must, and how they fail."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

import patchkit
from patchkit import TIP, BudgetForcing, CyclicReflex, ThinkingBudget, Window, engine
from patchkit.testing import left_padded_batch, tiny_model
from tests.decoding.helpers import call

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
VOCAB = 97


def build(family="llama", **overrides):
    return tiny_model(family, **overrides).cuda()


def batch_of(lengths=(9, 4, 7)):
    batch = left_padded_batch(VOCAB, list(lengths))
    return {name: tensor.cuda() for name, tensor in batch.items()}


def logits_of(model, batch=None, new_tokens=12, **kwargs):
    out = model.generate(
        **(batch or batch_of()), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0,
        output_logits=True, **{"return_dict_in_generate": True} | kwargs,
    )  # fmt: skip
    return torch.stack(out.logits)


def tokens_of(model, new_tokens=12, batch=None, **kwargs):
    return model.generate(
        **(batch or batch_of()),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        **kwargs,
    )


def test_steps_are_recorded_once_and_used_again():
    model = patchkit.apply(build())
    for _ in range(4):
        tokens_of(model)
    steps = patchkit.report(model).steps
    assert patchkit.report(model).unrecorded is None
    assert steps == {"recorded": 1, "replayed": 4 * 11 - 1, "eager": 1}


def test_a_growing_store_is_recorded_anew():
    model = patchkit.apply(build())
    assert torch.equal(tokens_of(model, 1400), tokens_of(build(), 1400))
    assert patchkit.report(model).steps["recorded"] >= 2


def test_memory_of_the_host_is_not_given_away_while_steps_write_to_it():
    model = patchkit.apply(build())
    tokens_of(model)  # builds the kernels
    for _ in range(3):
        tokens_of(model, 400, return_dict_in_generate=True)  # comes back before the GPU is done
        other = torch.zeros((engine.RUN_AHEAD + 1) * (3 + 2), dtype=torch.int64, pin_memory=True)
        torch.cuda.synchronize()
        assert not other.any()


def lora(model, seed=0, rank=4):
    config = LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(seed)
    return get_peft_model(model, config)


def move_and_return(model):
    model.to("cpu")
    torch.cuda.empty_cache()
    filler = torch.randn(1 << 22, device="cuda")  # so that the weights come back elsewhere
    model.to("cuda")
    del filler


def replace_data(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1


def write_in_place(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)


def change_a_plain_attribute(model):
    for layer in model.model.layers:
        layer.self_attn.scaling *= 0.5


CHANGES = [move_and_return, replace_data, write_in_place, change_a_plain_attribute]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_answers_follow_the_weights(change):
    model, plain = patchkit.apply(build()), build()
    before = tokens_of(model)
    assert torch.equal(before, tokens_of(plain))
    assert torch.equal(before, tokens_of(model)) and patchkit.report(model).steps["replayed"]
    change(model), change(plain)
    torch.testing.assert_close(logits_of(model), logits_of(plain), atol=3e-4, rtol=3e-4)
    assert torch.equal(tokens_of(model), tokens_of(plain))
    assert torch.equal(tokens_of(model), tokens_of(plain))


def test_answers_follow_adapters():
    plain = lora(build())
    model = lora(build())
    patchkit.apply(model)
    seen = []

    def same():
        for _ in range(2):  # the second call would replay a stale step
            seen.append(tokens_of(model))
            assert torch.equal(seen[-1], tokens_of(plain))

    same()
    for m in (model, plain):
        torch.manual_seed(5)
        config = LoraConfig(r=8, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
        m.add_adapter("other", config)
        m.set_adapter("other")
    same()
    model.set_adapter("default"), plain.set_adapter("default")
    same()
    with model.disable_adapter(), plain.disable_adapter():
        same()
    for m in (model, plain):
        for module in m.modules():
            scaling = getattr(module, "scaling", None)
            if isinstance(scaling, dict) and "default" in scaling:
                scaling["default"] *= 3
    same()
    model.merge_adapter(), plain.merge_adapter()
    same()
    assert len({tuple(tokens.flatten().tolist()) for tokens in seen}) >= 4


def test_steps_at_batch_1_are_recorded_whatever_adapters_ask_for():
    plain, model = lora(build()), lora(build())
    patchkit.apply(model)
    one = batch_of((9,))
    for _ in range(2):
        assert torch.equal(tokens_of(model, batch=one), tokens_of(plain, batch=one))
    for m in (model, plain):
        torch.manual_seed(5)
        parts = ["q_proj", "gate_proj", "down_proj"]
        m.add_adapter("other", LoraConfig(r=6, target_modules=parts, init_lora_weights=False))
        m.set_adapter("other")
    for _ in range(2):
        before = patchkit.report(model).steps["replayed"]
        assert torch.equal(tokens_of(model, batch=one), tokens_of(plain, batch=one))
        report = patchkit.report(model)
        assert report.unrecorded is None and report.steps["replayed"] > before
    assert report.calls["skinny_linear"]["triton"] > 0


def test_answers_follow_hooks_and_training_mode():
    model, plain = patchkit.apply(build()), build()
    tokens_of(model), tokens_of(model)
    handles = [
        m.model.layers[0].register_forward_hook(lambda _m, _i, out: out * 1.3)
        for m in (model, plain)
    ]
    assert torch.equal(tokens_of(model), tokens_of(plain))
    for handle in handles:
        handle.remove()
    model.train(), plain.train()
    assert torch.equal(tokens_of(model), tokens_of(plain))
    model.eval(), plain.eval()
    assert torch.equal(tokens_of(model), tokens_of(plain))


def test_without_the_fingerprint_answers_would_be_stale(monkeypatch):
    from patchkit import step_graph

    monkeypatch.setattr(step_graph, "fingerprint", lambda model: ())
    model, plain = patchkit.apply(build()), build()
    tokens_of(model), tokens_of(model)
    change_a_plain_attribute(model), change_a_plain_attribute(plain)
    assert not torch.equal(tokens_of(model), tokens_of(plain))


def test_a_forward_that_waits_for_the_device_is_not_recorded():
    model, plain = build(), build()
    for m in (model, plain):
        mlp = m.model.layers[1].mlp
        original = type(mlp).forward
        # Reads a value on the host, as a dynamic RoPE or a dropless router does.
        mlp.forward = lambda x, _o=original, _m=mlp: _o(_m, x) * (2.0 if x.sum().item() > 0 else 1)
    patchkit.apply(model)
    for _ in range(2):
        assert torch.equal(tokens_of(model), tokens_of(plain))
    report = patchkit.report(model)
    assert report.steps["replayed"] == 0 and report.steps["recorded"] == 0
    assert report.unrecorded and report.unrecorded in str(report)
    # The failed recording must not leave torch believing that one is under way.
    torch.rand(3, device="cuda")
    other = patchkit.apply(build())
    tokens_of(other)
    torch.manual_seed(0)
    a = other.generate(**batch_of(), do_sample=True, max_new_tokens=8)
    torch.manual_seed(0)
    assert torch.equal(a, other.generate(**batch_of(), do_sample=True, max_new_tokens=8))
    assert patchkit.report(other).unrecorded is None


@pytest.mark.parametrize("budget", [12, 40, 0.5])
def test_window_steps_are_recorded(budget):
    window = Window(budget=budget, num_sink_tokens=3)
    model = build("gemma3")
    with patchkit.patched(model, window, backend="reference"):
        want = logits_of(model, new_tokens=60)
    with patchkit.patched(model, window):
        for _ in range(2):
            got = logits_of(model, new_tokens=60)
            torch.testing.assert_close(got, want, atol=3e-4, rtol=3e-4)
        assert patchkit.report(model).steps["replayed"] > 60


def test_sampling_is_recorded_and_equal_to_transformers():
    model = build()
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 30}
    torch.manual_seed(3)
    want = model.generate(**batch_of(), max_new_tokens=40, **options)
    patchkit.apply(model)
    for _ in range(2):
        torch.manual_seed(3)
        assert torch.equal(model.generate(**batch_of(), max_new_tokens=40, **options), want)
    assert patchkit.report(model).steps["replayed"] > 40
    torch.manual_seed(3)
    hotter = model.generate(**batch_of(), max_new_tokens=40, **options | {"temperature": 1.5})
    assert not torch.equal(hotter, want)


SAMPLED = {"do_sample": True, "top_k": 0}
PROCESSED = {
    "repetition": {"repetition_penalty": 1.7},
    "n-gram": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[5], [3, 9], [40, 41], [8, 9, 10]]},
    "bias": {"sequence_bias": {(5,): -9.0, (3, 9): 4.0, (7, 8, 9): 2.0}},
    "min length": {"min_length": 25, "eos_token_id": [5, 6, 7, 8, 9]},
    "min new tokens": {"min_new_tokens": 16, "eos_token_id": [5, 6, 7, 8, 9]},
    "suppress": {"suppress_tokens": list(range(60))},
    "suppress at begin": {"begin_suppress_tokens": list(range(50))},
    "forced eos": {"forced_eos_token_id": [5], "eos_token_id": [96]},
    "forced bos": {"forced_bos_token_id": 5},
    "invalid values": {"remove_invalid_values": True},
    "normalisation": SAMPLED | {"renormalize_logits": True},
    "epsilon": SAMPLED | {"epsilon_cutoff": 0.02},
    "eta": SAMPLED | {"eta_cutoff": 0.1},
    "top-h": SAMPLED | {"top_h": 0.4},
    "min-p": SAMPLED | {"min_p": 0.2},
    "typical-p": SAMPLED | {"typical_p": 0.5},
    "all": {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[5], [3, 9]],
        "min_new_tokens": 16,
        "eos_token_id": [5, 6],
        "suppress_tokens": [1, 2],
    }
    | SAMPLED,
}  # fmt: skip
SCHEDULES = {
    "wave": CyclicReflex(amplitude=9.0, period=8, reflection_tokens=(11, 12), end_think=(7,)),
    "tip": TIP(delta=4.0, reflection_tokens=(11, 12), end_think=(7, 8)),
    "tip, thought": TIP(
        delta=9.0, reflection_tokens=(11, 12), end_think=None, window="thought", windows=((1, 4),)
    ),
    "thinking budget": ThinkingBudget(max_tokens=6, end_think=(7, 7, 8)),
    "budget forcing": BudgetForcing(max_tokens=16, num_ignore=2, wait=(11, 12), end_think=(7,)),
}


@pytest.mark.parametrize("name", PROCESSED | SCHEDULES)
def test_logits_processors_are_recorded_once_for_all_prompts(name):
    plain, model = build(), patchkit.apply(build())
    options = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0}
    options |= PROCESSED.get(name, {"sequence_bias": {(7,): 6.0}})
    method = SCHEDULES.get(name)
    for seed, lengths in enumerate([(9, 4, 7), (5, 12, 3)]):
        torch.manual_seed(seed)
        own = [] if method is None else [method.logits_processor(call(plain))]
        want = plain.generate(**batch_of(lengths), **options, logits_processor=own)
        torch.manual_seed(seed)
        got = model.generate(**batch_of(lengths), **options, logit_schedule=method)
        assert torch.equal(got, want)
    report = patchkit.report(model)
    assert report.unrecorded is None and not report.host_loops
    assert report.steps["recorded"] == 1
    # The step before the recording, and the one that follows if cuBLAS loads a kernel too late.
    assert report.steps["eager"] in (1, 2)
    assert report.steps["replayed"] > 20
    assert model._patchkit.graphs.parked.choice.capturable


def test_a_copy_of_a_patched_model_records_its_own_steps():
    model = patchkit.apply(build())
    tokens_of(model), tokens_of(model)
    twin = copy.deepcopy(model)
    write_in_place(twin)
    plain = build()
    assert torch.equal(tokens_of(model), tokens_of(plain))
    write_in_place(plain)
    assert torch.equal(tokens_of(twin), tokens_of(plain))
