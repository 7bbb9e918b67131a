"""Fused norms and MLPs: the kernels, finding the formulas, and when a module keeps its forward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import patchkit
from patchkit.decoding import reference
from patchkit.decoding.fused import GatedMLP, Norm, find_formula
from patchkit.decoding.kernels.gated_activation import gated_activation
from patchkit.decoding.kernels.rms_norm import rms_norm
from patchkit.testing import FAMILIES, left_padded_batch, tiny_model

from .helpers import DEVICE, by_dtype, random


def check(got, oracle, roundings, slack=8.0, least=0.0):
    """Allow a rounding error for each rounding to the dtype, and `slack` of them in float32."""
    assert got.shape == oracle.shape and got.is_contiguous()
    kind, wide = torch.finfo(got.dtype), torch.finfo(torch.float32)
    # The interpreter cuts bfloat16 off where a GPU rounds to the nearest.
    unit = kind.eps if DEVICE == "cpu" and got.dtype == torch.bfloat16 else kind.eps / 2
    relative = 1.01 * roundings * unit + slack * wide.eps
    least = least + 4 * kind.smallest_normal * kind.eps + 200 * wide.smallest_normal
    assert ((got.double() - oracle).abs() <= relative * oracle.abs() + least).all()


@by_dtype
@pytest.mark.parametrize(("offset", "round_first"), [(0.0, True), (0.0, False), (1.0, False)])
@pytest.mark.parametrize("shape", [(1, 1, 576), (2, 3, 63), (5, 4, 2, 64), (3, 1)])
def test_rms_norm(shape, offset, round_first, dtype):
    x, weight = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=1)
    options = {"eps": 1e-3, "offset": offset, "round_first": round_first}
    oracle = reference.rms_norm(x.double(), weight.double(), **options)
    for implementation in (rms_norm, reference.rms_norm):
        got = implementation(x, weight, **options)
        assert got.dtype == dtype
        check(got, oracle, 1 + round_first)


def test_rms_norm_rounds_where_the_formula_does():
    x, weight = random(20, 512, dtype=torch.float16), random(512, dtype=torch.float16, seed=1)
    for round_first in (True, False):
        got = rms_norm(x, weight, eps=1e-6, round_first=round_first)
        same = [
            (got == reference.rms_norm(x, weight, eps=1e-6, round_first=first)).double().mean()
            for first in (round_first, not round_first)
        ]
        assert same[0] > 0.99 > 0.9 > same[1]


def test_rms_norm_reads_rows_in_place_and_any_other_layout():
    x, weight = random(4, 6, 32), random(16, seed=1)
    for view in (x[..., :16], x[:, ::2, 16:], x.transpose(1, 2)[:, :16].mT, x[:, :0, :16]):
        want = reference.rms_norm(view, weight, eps=1e-6)
        torch.testing.assert_close(rms_norm(view, weight, eps=1e-6), want)


@by_dtype
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(1, 1, 1536), (2, 3, 63), (5000, 7)])
def test_gated_activation(shape, activation, dtype):
    gate = 4 * random(*shape, dtype=dtype)
    gate.view(-1)[:4] = torch.tensor([-100.0, 100.0, 0.0, -20.0])
    up = random(*shape, dtype=dtype, seed=1)
    oracle = reference.gated_activation(gate.double(), up.double(), activation=activation)
    # The exponent's own rounding is relative to its size.
    exponent = gate.double().abs() * (1 + 0.05 * gate.double() ** 2) * 2
    # torch takes the difference of 1 and a number that is nearly 1.
    cancelled = torch.finfo(torch.float32).eps * (gate.double() * up.double()).abs()
    for implementation in (gated_activation, reference.gated_activation):
        got = implementation(gate, up, activation=activation)
        assert got.dtype == dtype
        check(got, oracle, 2, slack=8 + 2 * exponent, least=cancelled)
        own = gate.clone()
        assert implementation(own, up, activation=activation, out=own) is own
        assert torch.equal(own, got)


@pytest.mark.parametrize(
    "call",
    [
        lambda: rms_norm(random(2, 8), random(7), eps=1e-6),
        lambda: rms_norm(random(2, 8), random(8).half(), eps=1e-6),
        lambda: gated_activation(random(2, 8), random(2, 7), activation="silu"),
        lambda: gated_activation(random(2, 8), random(2, 8), activation="relu"),
        lambda: gated_activation(*[random(2, 8)] * 2, activation="silu", out=random(8, 2).mT),
    ],
)
def test_wrong_arguments_are_refused(call):
    with pytest.raises(ValueError, match="expected|must be"):
        call()


# -- finding formulas --------------------------------------------------------------------------

LLAMA, GEMMA, ONCE = (0.0, True), (1.0, False), (0.0, False)
NORMS = dict.fromkeys(FAMILIES, LLAMA) | {"gemma2": GEMMA, "gemma3": GEMMA, "gpt_oss": ONCE}
NO_NORMS = {"opt", "gpt_neox"}  # LayerNorm is one kernel already
MLPS = dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "deepseek_v2"], "silu")
MLPS |= {"gemma2": "gelu_tanh", "gemma3": "gelu_tanh"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_fused_as_far_as_its_formulas_go(family):
    model = patchkit.apply(tiny_model(family))
    held = [vars(module).get("_patchkit") for module in model.modules()]
    formulas = {held.formula for held in held if hasattr(held, "formula")}
    norms = {(f.offset, f.round_first) for f in formulas if isinstance(f, Norm)}
    assert norms == (set() if family in NO_NORMS else {NORMS[family]})
    mlps = {f.activation for f in formulas if isinstance(f, GatedMLP)}
    assert mlps == ({MLPS[family]} if family in MLPS else set())
    fused = patchkit.report(model).fused
    assert all(n == total for what, (n, total) in fused.items() if what == "norms")
    if family == "llama":
        assert fused == {"norms": (5, 5), "MLPs": (2, 2), "rotary embeddings": (2, 2)}
        assert "5 of 5 norms, 2 of 2 MLPs" in str(patchkit.report(model))
        assert "eps=1e-06, patchkit" in repr(model)


class AlmostNorm(nn.Module):
    """Differs from every formula by the sign of its epsilon."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-3

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) - self.eps))


class BiasedNorm(AlmostNorm):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(8))


class LlamaLike(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(64)), 1e-3

    def forward(self, x):
        return reference.rms_norm(x, self.weight, eps=self.eps, round_first=True)


class GatedNorm(LlamaLike):
    """Like the norms of Mamba hybrids: the trial would not see what the gate does."""

    def forward(self, x, gate=None):
        x = super().forward(x)
        return x if gate is None else x * gate


class GroupedNorm(LlamaLike):
    """Normalises groups of 48 values, which a trial at another width would not see."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(96))

    def forward(self, x):
        groups = reference.rms_norm(x.unflatten(-1, (-1, 48)), torch.ones(48), eps=self.eps)
        return self.weight * groups.flatten(-2)


def test_other_formulas_are_left_alone():
    assert find_formula(LlamaLike()) == Norm("eps", 0.0, True)
    for other in (AlmostNorm(), BiasedNorm(), GatedNorm(), GroupedNorm()):
        assert find_formula(other) is None
    llama = tiny_model("llama").model.layers[0]
    llama.mlp.act_fn = nn.ReLU()
    assert find_formula(llama.mlp) is None
    assert find_formula(llama.self_attn) is None


@pytest.mark.parametrize("limit", [16.0, 1e3])
@pytest.mark.parametrize("part", ["act_fn", "up_proj"])
def test_mlps_that_clamp_are_not_taken_for_gated_ones(part, limit):
    mlp = tiny_model("llama").model.layers[0].mlp
    kind = type(mlp)

    class Clamped(kind):
        def forward(self, x):
            gate, up = self.act_fn(self.gate_proj(x)), self.up_proj(x)
            if part == "act_fn":
                return self.down_proj(gate.clamp(max=limit) * up)
            return self.down_proj(gate * up.clamp(-limit, limit))

    assert find_formula(mlp) is not None
    mlp.__class__ = Clamped
    assert find_formula(mlp) is None


def test_finding_formulas_draws_no_random_numbers():
    model = tiny_model("llama")
    before = torch.get_rng_state()
    patchkit.apply(model)
    assert torch.equal(torch.get_rng_state(), before)


# -- running -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_answers_through_the_kernels_are_those_of_the_modules(family):
    model = tiny_model(family, attn_implementation="eager").to(DEVICE)
    batch = {k: v.to(DEVICE) for k, v in left_padded_batch(97, [9, 4]).items()}
    options = {"do_sample": False, "max_new_tokens": 4, "output_logits": True}
    options |= {"return_dict_in_generate": True, "pad_token_id": 0}
    plain = model.generate(**batch, **options)
    with patchkit.patched(model, backend="triton"):
        ours = model.generate(**batch, **options)
        calls = patchkit.report(model).calls
    assert calls["rms_norm"].keys() == {"triton"}
    assert ("gated_activation" in calls) == (family in MLPS)
    assert torch.equal(ours.sequences, plain.sequences)
    for got, want in zip(ours.logits, plain.logits, strict=True):
        torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


def test_gradients_autocast_and_other_dtypes_take_the_module_s_own_forward():
    model = patchkit.apply(tiny_model("llama").to(DEVICE), backend="triton")
    ids = torch.tensor([[3, 4, 5]], device=DEVICE)
    model(ids, use_cache=False).logits.sum().backward()
    assert model.model.norm.weight.grad.abs().sum() > 0
    norm = model.model.norm
    with torch.no_grad():
        norm(random(2, 64, dtype=torch.bfloat16))
        with torch.autocast(DEVICE, torch.bfloat16):
            norm(random(2, 64))
        assert "rms_norm" not in patchkit.report(model).calls
        norm(random(2, 64))
    assert patchkit.report(model).calls["rms_norm"] == {"triton": 1}


@pytest.fixture
def fused_mlp():
    """A fused MLP on the kernels, an input, and what its class computes."""
    model = patchkit.apply(tiny_model("llama").to(DEVICE), backend="triton")
    mlp, x = model.model.layers[0].mlp, random(2, 3, 64)
    with torch.no_grad():
        yield mlp, x, lambda: type(mlp).forward(mlp, x)


def kernel_calls(mlp):
    return sum(n for (op, _), n in vars(mlp)["_patchkit"].backend.calls.items() if "gated" in op)


def test_a_replaced_or_hooked_activation_is_the_module_s_own_again(fused_mlp):
    mlp, x, own = fused_mlp
    torch.testing.assert_close(mlp(x), own())
    assert kernel_calls(mlp) == 1
    seen = []
    handle = mlp.act_fn.register_forward_hook(lambda *_: seen.append(1))
    mlp(x)
    assert seen == [1]
    handle.remove()
    mlp.act_fn = nn.ReLU()
    torch.testing.assert_close(mlp(x), own())
    assert kernel_calls(mlp) == 1


def test_a_long_prompt_passes_in_blocks_of_rows(fused_mlp, monkeypatch):
    mlp, _, _ = fused_mlp
    monkeypatch.setattr("patchkit.decoding.fused._MOST_ROWS", 5)
    x = random(2, 6, 64)  # blocks of 5, 5 and 2 rows, the second one out of both prompts
    torch.testing.assert_close(mlp(x), type(mlp).forward(mlp, x))
    assert kernel_calls(mlp) == 3
    seen = []
    handle = mlp.up_proj.register_forward_hook(lambda _m, _i, out: seen.append(out.shape))
    mlp(x)
    handle.remove()
    assert seen == [(2, 6, 128)], "a hook sees the whole input, as ever"


def test_a_replaced_class_forward_and_training_mode_are_respected(fused_mlp, monkeypatch):
    mlp, x, _ = fused_mlp
    monkeypatch.setattr(type(mlp), "forward", lambda self, x: x + 1)
    assert torch.equal(mlp(x), x + 1)
    monkeypatch.undo()
    mlp.train()
    mlp(x)
    assert kernel_calls(mlp) == 0


def test_finding_formulas_calls_nobody_s_hooks():
    model, seen = tiny_model("llama"), []
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: seen.append(1))
    patchkit.apply(model)
    assert not seen and patchkit.report(model).fused["MLPs"] == (2, 2)


class Keeping(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        self.last = self.inner(x)
        return self.last


def test_a_gate_that_somebody_else_holds_is_not_written_to(fused_mlp):
    mlp, x, own = fused_mlp
    plain, held = mlp.gate_proj, []

    def check():
        want = plain(x)
        torch.testing.assert_close(mlp(x), own())
        assert all(torch.equal(gate, want) for gate in held)

    mlp.gate_proj = Keeping(plain)
    mlp(x)
    held.append(mlp.gate_proj.last)
    check()
    mlp.gate_proj = plain
    plain.forward = lambda x: held.append(nn.Linear.forward(plain, x)) or held[-1]
    check()
    del plain.forward
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, _i, out: held.append(out) if m is plain else None
    )
    check()
    handle.remove()
    assert len(held) >= 3


def test_keywords_and_float64_take_the_module_s_own_forward():
    model = patchkit.apply(tiny_model("gemma2").to(DEVICE), backend="triton")
    norm, x = model.model.norm, random(2, 64)
    with torch.no_grad():
        torch.testing.assert_close(norm(x=x), norm(x))
        model.double()
        wide = x.double()
        assert torch.equal(norm(wide), type(norm).forward(norm, wide))


def test_restore_reaches_the_copies_that_peft_made():
    from peft import LoraConfig, get_peft_model

    plain = tiny_model("llama").to(DEVICE)
    model = patchkit.apply(tiny_model("llama").to(DEVICE))
    config = {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}
    model, plain = (get_peft_model(m, LoraConfig(**config)) for m in (model, plain))
    patchkit.restore(model)
    assert not any("_patchkit" in vars(module) for module in model.modules())
    ids = torch.tensor([[3, 4, 5]], device=DEVICE)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)


def test_adapters_and_hooks_inside_a_fused_mlp_still_act():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["gate_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama").to(DEVICE), config)
    ids, seen, gates = torch.tensor([[3, 4, 5]], device=DEVICE), [], []
    with torch.no_grad():
        want = model(ids).logits
        patchkit.apply(model, backend="triton")
        mlp = model.get_base_model().model.layers[0].mlp
        mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
        mlp.gate_proj.register_forward_hook(lambda _m, _i, out: gates.append((out, out.clone())))
        torch.testing.assert_close(model(ids).logits, want, atol=2e-4, rtol=2e-4)
    assert all(torch.equal(*pair) for pair in gates), "what a hook holds must not change"
    assert gates and seen and "gated_activation" in patchkit.report(model).calls
