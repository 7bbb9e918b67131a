"""The fused rotary embedding: finding formulas, and when a module keeps its forward."""

from __future__ import annotations

import copy
import functools
import importlib
import itertools

import pytest
import torch
from torch import nn

import patchkit
from patchkit.compat import CACHE_KEYWORD
from patchkit.decoding.kernels.rotary import rotary
from patchkit.decoding.rotary import Rotary, _twin, find_formula
from patchkit.step_graph import fingerprint
from patchkit.testing import FAMILIES, left_padded_batch, tiny_model

from .helpers import DEVICE, DTYPES, random
from .test_kernels_rotary import FIRST, FULL, HALF, inputs, same_bits

FORMULAS = {
    "llama": Rotary(False, FULL, False, False),
    "gpt_neox": Rotary(False, FULL, False, True, partial=True),
    "phi3": Rotary(False, FULL, False, True, partial=True),
    "gpt_oss": Rotary(False, HALF, False, True),
    "glm": Rotary(True, FIRST, False, True, partial=True),
    "cohere": Rotary(True, FULL, True, False),
    "modernbert": Rotary(False, FULL, True, False),
    "ernie4_5": Rotary(True, FIRST, True, False),
    "blt": Rotary(True, FULL, False, False),
    "olmo2": Rotary(False, FULL, False, False),
    "nanochat": None,  # turns the other way
    "gemma3n": None,  # one tensor at a time
}


def function_of(family):
    return importlib.import_module(
        f"transformers.models.{family}.modeling_{family}"
    ).apply_rotary_pos_emb


@pytest.mark.parametrize("family", FORMULAS)
def test_the_formula_of_a_function_is_found(family):
    function, formula = function_of(family), FORMULAS[family]
    assert find_formula(function, wider=False) == formula
    wider = find_formula(function, wider=True)
    assert (wider is not None) == (family in {"cohere", "modernbert", "ernie4_5", "olmo2"})
    for dtype, width in itertools.product(DTYPES, (16, 8)):
        for found, table_dtype in ((formula, dtype), (wider, torch.float32)):
            if found is None:
                continue
            args = inputs(2, 4, 2, 3, 16, width, dtype, table_dtype)
            try:
                want = function(*args)
            except RuntimeError:  # llama rotates all, gpt-oss has half the columns
                assert width == (16 if family == "gpt_oss" else 8)
                continue
            same_bits(rotary(*args, **found.options), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_fused_as_far_as_its_formulas_go(family):
    model = patchkit.apply(tiny_model(family))
    total = model.config.num_hidden_layers
    counts = {"opt": None, "deepseek_v2": (0, total)}.get(family, (total, total))
    assert patchkit.report(model).fused.get("rotary embeddings") == counts
    held = [vars(module).get("_patchkit_rotary") for module in model.modules()]
    formulas = {fused.formulas[False] for fused in held if fused is not None}
    want = {FORMULAS.get(family, FORMULAS["llama"])} if counts == (total, total) else set()
    assert formulas == want
    if family == "llama":
        assert "2 of 2 MLPs, 2 of 2 rotary embeddings" in str(patchkit.report(model))


def test_finding_formulas_draws_no_random_numbers():
    before = torch.get_rng_state()
    find_formula(function_of("llama"), wider=False)
    assert torch.equal(torch.get_rng_state(), before)


# -- the twin of a forward ---------------------------------------------------------------------

SHIFT = 1
FACTOR = 2


def scaled(x, *, factor=3):
    return FACTOR * factor * x + SHIFT


def noted(function, calls):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    return wrapper


def test_a_twin_differs_by_a_name_and_nothing_else(monkeypatch):
    calls = []
    decorated = torch.no_grad()(noted(scaled, calls))
    twin = _twin(decorated, {"FACTOR": 10})
    x = torch.ones(1, requires_grad=True)
    assert (twin(x).item(), decorated(x).item()) == (31, 7)
    assert len(calls) == 2 and not twin(x).requires_grad
    assert twin(1, factor=5) == 51
    monkeypatch.setitem(globals(), "SHIFT", 4)
    assert twin(1) == 34
    monkeypatch.setitem(globals(), "FACTOR", 0)
    assert (twin(1), decorated(1)) == (34, 4)
    assert (twin.__name__, twin.__module__) == ("scaled", __name__)
    with pytest.raises(NameError):
        _twin(lambda: unknown, {})()  # noqa: F821


def test_decorators_that_cannot_be_rebuilt_leave_the_forward_alone(monkeypatch):
    attention = type(tiny_model("llama").model.layers[0].self_attn)
    held = {"forward": attention.forward}

    @functools.wraps(attention.forward)
    def forward(self, *args, **kwargs):
        return held["forward"](self, *args, **kwargs)

    monkeypatch.setattr(attention, "forward", forward)
    with pytest.raises(TypeError):
        _twin(forward, {})
    monkeypatch.setattr("patchkit.families._calls_attention_interface", lambda _: True)
    model = patchkit.apply(tiny_model("llama"))
    assert patchkit.report(model).fused["rotary embeddings"] == (0, 2)


# -- running -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt_oss"])
def test_answers_through_the_kernel_are_those_of_the_model(family):
    model = tiny_model(family, attn_implementation="eager").to(DEVICE)
    batch = {k: v.to(DEVICE) for k, v in left_padded_batch(97, [9, 4]).items()}
    options = {"do_sample": False, "max_new_tokens": 2, "output_logits": True}
    options |= {"return_dict_in_generate": True, "pad_token_id": 0}
    plain = model.generate(**batch, **options)
    with patchkit.patched(model, backend="triton"):
        ours = model.generate(**batch, **options)
        assert patchkit.report(model).calls["rotary"].keys() == {"triton"}
    assert torch.equal(ours.sequences, plain.sequences)
    for got, want in zip(ours.logits, plain.logits, strict=True):
        torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


class Call:
    """An attention module of a patched model, and a call of it."""

    def __init__(self, model=None):
        self.model = model or patchkit.apply(tiny_model("llama").to(DEVICE), backend="triton")
        self.module = self.model.model.layers[0].self_attn
        self.hidden = random(2, 3, 64)

    def arguments(self):
        positions = torch.arange(3, device=DEVICE)[None]
        tables = self.model.model.rotary_emb(self.hidden, positions)
        return {"position_embeddings": tables, "attention_mask": None}

    def __call__(self):
        return self.module(self.hidden, **self.arguments())[0]

    def own(self):
        forward = type(self.module).forward
        return forward(self.module, self.hidden, **self.arguments())[0]

    def kernel_calls(self):
        return patchkit.report(self.model).calls.get("rotary", {}).get("triton", 0)


@pytest.fixture
def call():
    with torch.no_grad():
        yield Call()


def test_attention_over_the_kernel_gives_the_bits_of_the_module(call):
    assert torch.equal(call(), call.own())
    assert call.kernel_calls() == 1


def test_other_calls_take_the_module_s_own_function(call):
    with torch.enable_grad():
        call().sum().backward()
    assert call.module.q_proj.weight.grad.abs().sum() > 0
    with torch.autocast(DEVICE, torch.bfloat16):
        call()
    call.module.train()
    call()
    call.module.eval()
    call.model.double()
    call.hidden = call.hidden.double()
    assert torch.equal(call(), call.own())
    assert call.kernel_calls() == 0


def test_arguments_that_the_kernel_does_not_take(call):
    rotate, function = call.module._patchkit_rotary.rotate, function_of("llama")
    q, k, cos, sin = inputs(1, 3, 3, 3, 8, 8, torch.float32)
    for args, kwargs in (
        ((q, k, cos, sin, 2), {}),
        ((q, k, cos, sin), {"unsqueeze_dim": 2}),
        ((q, k), {"cos": cos, "sin": sin}),
        ((q.half(), k.half(), cos, sin), {}),
        ((q, k[:, :, :1], cos, sin), {}),
    ):
        for got, want in zip(rotate(*args, **kwargs), function(*args, **kwargs), strict=True):
            assert got.dtype == want.dtype and torch.equal(got, want)
    assert call.kernel_calls() == 0
    rotate(q, k, cos, sin)
    assert call.kernel_calls() == 1


def test_a_function_replaced_later_is_obeyed(call, monkeypatch):
    before = fingerprint(call.model)
    assert before == fingerprint(call.model)
    module = importlib.import_module(type(call.module).__module__)
    monkeypatch.setattr(module, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k))
    assert torch.equal(call(), call.own())
    assert call.kernel_calls() == 0 and before != fingerprint(call.model)
    monkeypatch.undo()
    call()
    assert call.kernel_calls() == 1
    monkeypatch.setattr(type(call.module), "forward", lambda self, x, **_: (x + 1, None))
    assert torch.equal(call(), call.hidden + 1)


def test_other_names_of_the_file_are_looked_up_as_ever(call, monkeypatch):
    module = importlib.import_module(type(call.module).__module__)

    class Interface:
        @staticmethod
        def get_interface(*_):
            return lambda module, q, k, v, mask, **_: (v.transpose(1, 2), None)

    monkeypatch.setattr(module, "ALL_ATTENTION_FUNCTIONS", Interface)
    hidden = call.module.o_proj.in_features
    monkeypatch.setattr(call.module, "o_proj", nn.Identity())
    monkeypatch.setattr(call.module, "v_proj", nn.Linear(64, hidden, device=DEVICE))
    assert torch.equal(call(), call.module.v_proj(call.hidden))
    assert call.kernel_calls() == 1


class Function(nn.Module):
    """What `kernels` makes of a function."""

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)

    function = staticmethod(function_of("llama"))


def test_a_function_that_kernels_made_a_module_of(monkeypatch):
    module = importlib.import_module("transformers.models.llama.modeling_llama")
    monkeypatch.setattr(module, "apply_rotary_pos_emb", Function())
    with torch.no_grad():
        call = Call()
        assert torch.equal(call(), call.own())
        assert call.kernel_calls() == 1
        module.apply_rotary_pos_emb.forward = lambda q, k, cos, sin: (q, k)
        assert torch.equal(call(), call.own())
        assert call.kernel_calls() == 1
        assert patchkit.report(Call().model).fused["rotary embeddings"] == (0, 2)


def test_nothing_outside_the_model_changes(call):
    module = importlib.import_module(type(call.module).__module__)
    function, forward = module.apply_rotary_pos_emb, type(call.module).forward
    other = Call(tiny_model("llama").to(DEVICE))
    call()
    assert torch.equal(other(), other.own()) and "forward" not in vars(other.module)
    assert module.apply_rotary_pos_emb is function
    assert type(call.module).forward is forward
    assert call.kernel_calls() == 1


def test_restore_leaves_every_dict_as_it_was():
    model = tiny_model("llama")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    patchkit.restore(patchkit.apply(model))
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert all(value is before[name][key] for key, value in vars(module).items())


def test_a_deepcopy_is_fused_on_its_own(call):
    twin = Call(copy.deepcopy(call.model))
    for parameter in call.model.parameters():
        parameter.mul_(0.5)
    assert torch.equal(twin(), twin.own())
    assert not torch.equal(twin(), call())
    assert (twin.kernel_calls(), call.kernel_calls()) == (2, 1)
    patchkit.restore(twin.model)
    assert "forward" not in vars(twin.module) and "_patchkit_rotary" not in vars(twin.module)
    call()
    assert call.kernel_calls() == 2


def test_a_forward_of_the_instance_s_own_is_left_alone():
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    attention.forward = functools.partial(type(attention).forward, attention)
    mine = attention.forward
    patchkit.apply(model)
    assert attention.forward is mine
    assert patchkit.report(model).fused["rotary embeddings"] == (1, 2)


def test_hooks_on_the_attention_module_and_renamed_keywords_still_act(call):
    seen = []
    call.module.register_forward_hook(lambda *_: seen.append("after"))
    call.module.register_forward_pre_hook(lambda *_: seen.append("before"))
    call()
    assert seen == ["before", "after"] and call.kernel_calls() == 1
    if CACHE_KEYWORD == "cache":
        with pytest.warns(FutureWarning, match="LlamaAttention.forward"):
            call.module(call.hidden, **call.arguments(), past_key_values=None)
        assert call.kernel_calls() == 2


def test_restore_reaches_the_copies_that_peft_made():
    from peft import LoraConfig, get_peft_model

    model = patchkit.apply(tiny_model("llama"))
    config = LoraConfig(target_modules=["gate_proj"], modules_to_save=["self_attn"])
    model = get_peft_model(model, config)
    patchkit.restore(model)
    for module in model.modules():
        assert not {"_patchkit_rotary", "forward"} & vars(module).keys()


def test_a_decorator_with_an_empty_cell_is_left_alone(monkeypatch):
    model = tiny_model("llama")
    kind = type(model.model.layers[0].self_attn)

    def decorate(forward):
        @functools.wraps(forward)
        def decorated(*args, **kwargs):
            return forward(*args, **kwargs) if later is None else later

        if kwargs_are_wrong:
            later = 1
        return decorated

    kwargs_are_wrong = False
    monkeypatch.setattr(kind, "forward", decorate(kind.forward))
    patchkit.apply(model)
    assert patchkit.report(model).fused["rotary embeddings"] == (0, 2)


def test_what_the_function_refuses_is_refused():
    model = patchkit.apply(tiny_model("llama"), backend="triton")
    rotate = vars(model.model.layers[0].self_attn)["_patchkit_rotary"].rotate
    whole, narrow = (inputs(1, 4, 2, 3, 16, width, torch.float32) for width in (16, 8))
    with torch.no_grad():
        rotate(*whole)
        with pytest.raises(RuntimeError, match="size of tensor"):
            rotate(*narrow)
