"""What a recorded step depends on, without recording any."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch

import patchkit
from patchkit import CAKE, H2O, TOVA, AdaKV, SnapKV, Window
from patchkit.step_graph import GraphPool, StepGraph, fingerprint

from .engine_helpers import batch_of, build, served_devices  # noqa: F401 the fixture is automatic


def test_a_kind_of_step_is_given_up_when_recording_it_fails_twice():
    pool = GraphPool()
    assert pool.first_time("a") and not pool.first_time("a")
    pool.failed("a", "a kernel was being built")
    assert not pool.hopeless("a") and pool.refused is None
    pool.failed("b", "another kind")
    pool.failed("a", "a host read")
    assert pool.hopeless("a") and not pool.hopeless("b") and pool.refused == "a host read"


def test_recordings_are_compared_in_the_state_in_which_steps_are_recorded(monkeypatch):
    """While it decodes, transformers computes the experts of a mixture in another way."""
    model, prints = patchkit.apply(build()), {"begin": [], "run": []}

    @contextlib.contextmanager
    def decoding():
        model.config.way = "of decoding"
        yield
        model.config.way = "of prompts"

    def noted(name):
        method = getattr(StepGraph, name)

        def run(self, *args):
            prints[name].append(fingerprint(model))
            return method(self, *args)

        return run

    monkeypatch.setattr(model, "_optimize_model_for_decode", decoding)
    for name in prints:
        monkeypatch.setattr(StepGraph, name, noted(name))
    for _ in range(2):
        model.generate(**batch_of(), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert len(prints["begin"]) == 2 and len(prints["run"]) == 6
    assert len({*prints["begin"], *prints["run"]}) == 1


def test_replacements_are_never_taken_for_each_other():
    model, prints = build(), []
    mlp = model.model.layers[0].mlp
    for factor in range(6):
        mlp.forward = lambda x, f=factor: x * f
        prints.append(fingerprint(model))
    assert all(one != other for one, other in itertools.combinations(prints, 2))


def test_fingerprints_see_what_is_put_into_empty_containers():
    model = patchkit.apply(build())
    module = model.model.layers[0].mlp
    for held in ({}, [], set(), (), 0, None, False):
        module.held = held
        before = fingerprint(model)
        for other in ({}, [], set(), (), 0.5, 1, None, True, {"a": 1}, [None], (1,), {2}):
            module.held = other
            same = type(other) is type(held) and other == held
            assert (fingerprint(model) == before) == same, (held, other)
    before = fingerprint(model)
    module.register_state_dict_pre_hook(lambda *_: None)
    module.register_load_state_dict_post_hook(lambda *_: None)
    assert fingerprint(model) == before
    module.register_forward_hook(lambda *_: None)
    assert fingerprint(model) != before


def test_fingerprints_see_classes_switches_and_fields():
    class Steer:
        alpha = 1.0

        def __init__(self):
            self.beta = 2.0

    class Other(torch.nn.Linear):
        pass

    model = build()
    layer = model.model.layers[0]
    layer.steer = Steer()
    prints = [fingerprint(model)]
    layer.steer.beta = 3.0
    prints.append(fingerprint(model))
    layer.mlp.up_proj.__class__ = Other
    prints.append(fingerprint(model))
    torch.backends.cuda.matmul.allow_tf32 ^= True
    prints.append(fingerprint(model))
    torch.backends.cuda.matmul.allow_tf32 ^= True
    model.half()
    prints.append(fingerprint(model))
    assert all(one != other for one, other in itertools.combinations(prints, 2))
    assert prints[-1] == fingerprint(model)


@pytest.mark.parametrize(
    "method",
    [
        Window(budget=12),
        H2O(budget=12),
        TOVA(budget=0.5),
        SnapKV(budget=14, window=4),
        AdaKV(budget=14, window=4),
        CAKE(budget=14, window=4),
    ],
    ids=lambda method: type(method).__name__,
)
def test_a_parked_store_with_a_budget_starts_afresh_at_the_same_addresses(method):
    prompts = [batch_of((40, 23)), batch_of((40, 31)), batch_of((9, 4)), batch_of((40, 23))]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    want = []
    for prompt in prompts:
        with patchkit.patched(build(), method) as model:
            want.append(model.generate(**prompt, **options))
    with patchkit.patched(build(), method) as model:
        addresses = []
        for prompt, tokens in zip(prompts, want, strict=True):
            assert torch.equal(model.generate(**prompt, **options), tokens)
            step = model._patchkit.graphs.parked
            addresses.append(step.store.addresses)
    if not isinstance(method, CAKE):  # whose layers get other budgets with every prompt
        assert addresses[0] == addresses[1]


def test_a_recording_serves_only_steps_that_evict_no_more_than_it():
    model = patchkit.apply(build(), Window(budget=20))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    model.generate(**batch_of((8, 5)), **options)
    step = model._patchkit.graphs.parked
    step._recorded, step._evicts = step._frozen(), step.store.evicts_within(4)
    assert step._evicts == (False, False)
    assert step._still_true(4)
    assert not step._still_true(40)
    step._evicts = (True, True)
    assert step._still_true(4) and step._still_true(40)
