"""apply, restore, report, patched, methods: all or nothing, in place, reversible."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModel,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import patchkit
from patchkit import TIP, CyclicReflex, KVStore, Window
from patchkit.errors import (
    BackendError,
    MethodConflictError,
    NoMatchingModuleError,
    RestoreConflictError,
    UnknownMethodError,
    UnsupportedModelError,
)
from patchkit.method import _METHOD_MODULES, Method, registry, slot_names
from patchkit.testing import tiny_model

IDS = torch.tensor([[5, 9, 11, 4, 7, 23, 8]])


def greedy(model, **kwargs):
    return model.generate(IDS, max_new_tokens=6, do_sample=False, **kwargs)


def test_apply_returns_the_same_object_and_restore_too():
    model = tiny_model("llama")
    assert patchkit.apply(model) is model
    assert patchkit.restore(model) is model
    assert patchkit.restore(model) is model  # a no-op


def test_methods_by_name_config_and_any_spelling():
    for method in ("window", "Window", Window()):
        with patchkit.patched(tiny_model("llama"), method) as model:
            assert patchkit.report(model).methods[0].name == "window"


def test_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UnknownMethodError, match=r"'windo'.*\['window'\]"):
        patchkit.apply(tiny_model("llama"), "windo")
    with pytest.raises(UnknownMethodError, match="cyclic_reflex"):
        patchkit.apply(tiny_model("llama"), "CyclicReflexx")
    with pytest.raises(TypeError, match="got type"):
        patchkit.apply(tiny_model("llama"), Window)


def test_slots_conflict_and_add_up():
    model = tiny_model("llama")
    with pytest.raises(MethodConflictError, match="kv_eviction"):
        patchkit.apply(model, Window(), Window(budget=64))
    assert not patchkit.report(model).patched
    patchkit.apply(model, Window(budget=64))
    with pytest.raises(MethodConflictError, match="already patched"):
        patchkit.apply(model)
    with pytest.raises(MethodConflictError, match="kv_eviction"):
        patchkit.apply(model, Window())
    patchkit.apply(model, CyclicReflex(reflection_tokens=[3]))
    with pytest.raises(MethodConflictError, match="logit_schedule"):
        patchkit.apply(model, TIP(reflection_tokens=[3]))
    assert [m.name for m in patchkit.report(model).methods] == ["window", "cyclic_reflex"]
    with pytest.raises(MethodConflictError, match="backend='auto'"):
        patchkit.apply(model, "thinking_budget", backend="reference")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2,
                                                     d_kv=8, vocab_size=32)), "encoder-decoder"),
        (lambda: BloomForCausalLM(BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2)),
         "AttentionInterface"),
        (lambda: FalconForCausalLM(FalconConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1,
                                                num_attention_heads=2)), "AttentionInterface"),
        (lambda: MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1,
                                              state_size=4)), "AttentionInterface"),
        (lambda: AutoModel.from_config(tiny_model("llama").config), "language-model head"),
        (lambda: torch.nn.Linear(2, 2), "got Linear"),
    ],
    ids=["t5", "bloom", "falcon", "mamba", "headless", "linear"],
)  # fmt: skip
def test_models_without_a_place_to_attach_to(build, message):
    model = build()
    before = dict(model.__dict__)
    with pytest.raises(UnsupportedModelError, match=message):
        patchkit.apply(model)
    assert model.__dict__ == before


def test_method_without_a_site(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(Window, "sites", lambda self, family: ())
    with pytest.raises(NoMatchingModuleError, match="window found nothing"):
        patchkit.apply(model, "window")
    assert not patchkit.report(model).patched
    patchkit.apply(model, "window", strict=False)
    report = patchkit.report(model)
    assert report.methods[0].skipped and "found nothing" in str(report)
    assert report.exact
    with pytest.raises(NoMatchingModuleError, match="window found nothing"):
        greedy(model, kv_eviction="window")


def test_a_failure_in_the_middle_undoes_everything(monkeypatch):
    model = tiny_model("llama")
    before = {name: dict(m.__dict__) for name, m in model.named_modules()}
    config = copy.deepcopy(model.config.__dict__)

    def fail(*args, **kwargs):
        raise RuntimeError("stop here")

    monkeypatch.setattr("patchkit.journal.Journal.pre_hook", fail)
    with pytest.raises(RuntimeError, match="stop here"):
        patchkit.apply(model)
    for name, module in model.named_modules():
        assert module.__dict__ == before[name], name
    assert model.config.__dict__ == config


def test_patched_restores_on_exceptions():
    model = tiny_model("llama")
    with pytest.raises(KeyError), patchkit.patched(model):
        raise KeyError("user code")
    assert not patchkit.report(model).patched


def test_restore_refuses_when_somebody_wrapped_us():
    model = patchkit.apply(tiny_model("llama"))
    ours = model.generate
    model.generate = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(RestoreConflictError, match="model.generate"):
        patchkit.restore(model)
    assert patchkit.report(model).displaced == ("model.generate",)
    assert model.config._attn_implementation == "patchkit"  # nothing was undone
    model.generate = ours
    with pytest.raises(RestoreConflictError):  # an equal method, but not the one we bound
        model.generate = type(ours)(ours.__func__, model)
        patchkit.restore(model)


def test_restore_keeps_what_the_user_changed_in_the_config():
    model = tiny_model("llama")
    config = model.config
    patchkit.apply(model)
    model.config.use_cache = False
    model.config.my_note = "kept"
    patchkit.restore(model)
    assert model.config is config
    assert config.use_cache is False
    assert config.my_note == "kept"
    assert config._attn_implementation == "sdpa"


def test_backends(monkeypatch):
    with pytest.raises(ValueError, match="backend must be one of"):
        patchkit.apply(tiny_model("llama"), backend="cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = tiny_model("llama")
    with pytest.raises(BackendError, match="no CUDA device"):
        patchkit.apply(model, backend="triton")
    assert not patchkit.report(model).patched


def test_reference_backend_never_launches_a_kernel():
    model = patchkit.apply(tiny_model("llama"), "window", backend="reference")
    greedy(model)
    used = {name for counts in patchkit.report(model).calls.values() for name in counts}
    assert used == {"reference", "torch"}


def test_report():
    model = tiny_model("llama")
    assert str(patchkit.report(model)).endswith("not patched")
    patchkit.apply(model, Window(budget=5))
    out = greedy(model, return_dict_in_generate=True)
    report = patchkit.report(model)
    assert report.patched and not report.exact
    assert report.attention_layers == (2, 2)
    assert report.methods[0].sites == ("model.layers.0.self_attn", "model.layers.1.self_attn")
    assert report.kv_bytes == out.past_key_values.nbytes > 0
    assert (report.kv_columns, report.kv_stored) == (12, 5)
    assert sum(report.calls["append"].values()) == 2 * 6
    text = str(report)
    for part in ("Window(budget=5", "kv_eviction", "approximate", "requested auto", "in place"):
        assert part in text
    assert report.to_dict()["methods"][0]["name"] == "window"
    assert "attention=patchkit" in str(model)
    del out
    assert patchkit.report(model).kv_bytes is None


def test_catalogue():
    rows = {row.name: row for row in patchkit.methods()}
    assert {"window", "cyclic_reflex", "tip", "thinking_budget", "budget_forcing"} <= rows.keys()
    assert rows["window"].slots == ("kv_eviction",)
    assert "StreamingLLM" in rows["window"].page
    assert {row.area for row in patchkit.methods("decoding")} == {"decoding"}
    with pytest.raises(ValueError, match="area must be one of"):
        patchkit.methods("decodin")


def test_registry_refuses_bad_and_duplicate_names():
    registry()
    with pytest.raises(ValueError, match="already taken"):

        class Other(Method, name="Window".lower(), slots=("kv_eviction",)):
            pass

    with pytest.raises(ValueError, match="lower_snake"):

        class Shouting(Method, name="Shouting", slots=("kv_eviction",)):
            pass


def test_slots_never_clash_with_generate():
    import inspect

    from transformers import GenerationConfig, GenerationMixin, LlamaForCausalLM

    taken = set(GenerationConfig().to_dict())
    taken |= set(inspect.signature(GenerationMixin.generate).parameters)
    taken |= set(inspect.signature(LlamaForCausalLM.forward).parameters)
    assert not slot_names() & taken


def test_import_changes_nothing_and_needs_no_triton():
    code = """
import sys
sys.modules["triton"] = None  # importing triton now raises ImportError
import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
names = set(ALL_ATTENTION_FUNCTIONS.valid_keys())
import patchkit, patchkit.api
assert set(ALL_ATTENTION_FUNCTIONS.valid_keys()) == names
import torch
from patchkit.testing import tiny_model
model = patchkit.apply(tiny_model("llama"), patchkit.Window(budget=8))
print(model.generate(torch.tensor([[5, 9, 11]]), max_new_tokens=12, do_sample=False).shape)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "torch.Size([1, 15])" in run.stdout


def test_store_needs_a_patched_model():
    from patchkit.errors import CacheError

    with pytest.raises(CacheError, match="apply"):
        KVStore(tiny_model("llama"))


def test_every_method_that_is_exported_can_be_named():
    exported = [getattr(patchkit, name) for name in patchkit.__all__]
    classes = {x for x in exported if isinstance(x, type) and issubclass(x, Method)} - {Method}
    # Names are looked up in these; a class that has been imported would be found by chance.
    assert {cls.__module__ for cls in classes} == set(_METHOD_MODULES)
