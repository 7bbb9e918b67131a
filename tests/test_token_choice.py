"""Choosing tokens in the decoding loop: as transformers does, recorded or not."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import patchkit
from patchkit import TIP, BudgetForcing, CyclicReflex, ThinkingBudget, engine
from patchkit.backends import Backend
from patchkit.token_choice import draw

from .engine_helpers import (
    DEVICE,
    VOCAB,
    batch_of,
    both,
    build,
    served_devices,  # noqa: F401 the fixture is automatic
    tokens_that_end,
)

CHOICES = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True},
    "temperature": {"do_sample": True, "temperature": 0.4},
    "top-k": {"do_sample": True, "top_k": 5},
    "top-p": {"do_sample": True, "top_p": 0.6, "temperature": 1.5},
    "min-p": {"do_sample": True, "min_p": 0.2},
    "typical-p": {"do_sample": True, "typical_p": 0.5},
    "repetition": {"do_sample": False, "repetition_penalty": 1.7},
    "n-gram": {"do_sample": False, "no_repeat_ngram_size": 2},
    "bad words": {"do_sample": False, "bad_words_ids": [[5], [3, 9], [40, 41]]},
    "suppress": {"do_sample": True, "suppress_tokens": [1, 2, 3, 5, 8]},
    "min length": {"do_sample": True, "min_new_tokens": 12, "eos_token_id": [5, 6, 7, 8, 9]},
    "bias": {"do_sample": False, "sequence_bias": {(5,): -9.0, (3, 9): 4.0}},
    "suppress at begin": {"do_sample": False, "begin_suppress_tokens": list(range(50))},
    "min total length": {"do_sample": True, "min_length": 20, "eos_token_id": [5, 6, 7, 8, 9]},
    "forced eos": {"do_sample": False, "forced_eos_token_id": [5], "eos_token_id": [96]},
    "epsilon": {"do_sample": True, "epsilon_cutoff": 0.02},
    "eta": {"do_sample": True, "eta_cutoff": 0.1},
    "top-h": {"do_sample": True, "top_h": 0.4},
    "invalid values": {"do_sample": False, "remove_invalid_values": True},
}


@pytest.mark.parametrize("choice", CHOICES)
def test_tokens_scores_and_logits_are_those_of_transformers(choice):
    options = CHOICES[choice] | {"output_scores": True, "output_logits": True}
    plain, ours = both(build(), **batch_of(), **options)
    assert torch.equal(ours.sequences, plain.sequences)
    assert len(ours.logits) == len(ours.scores) == len(plain.logits)
    for name in ("scores", "logits"):
        for got, want in zip(ours[name], plain[name], strict=True):
            torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


TRUNCATED = {
    "top-k": {"top_k": 5},
    "top-p": {"top_k": 0, "top_p": 0.8},
    "both": {"top_k": 20, "top_p": 0.7, "temperature": 1.4},
    "min-p": {"top_k": 0, "min_p": 0.1, "temperature": 0.8},
}


@pytest.mark.parametrize("choice", TRUNCATED)
def test_kernels_draw_the_tokens_of_transformers(choice):
    model, rows = build(), []
    options = TRUNCATED[choice] | {"do_sample": True, "max_new_tokens": 12, "pad_token_id": 0}
    for backend in (None, "triton"):
        torch.manual_seed(11)
        patchkit.apply(model, backend=backend) if backend else None
        rows.append(model.generate(**batch_of(), **options))
    assert torch.equal(*rows)
    calls = model._patchkit.backend.calls
    truncation = "keep_likely" if "min_p" in options else "keep_top"
    assert calls[truncation, "triton"] == calls["sample", "triton"] > 0  # one for both limits
    assert not calls["argmax", "triton"]


SCHEDULES = {
    "wave": CyclicReflex(amplitude=9.0, period=8, reflection_tokens=(11, 12), end_think=(7,)),
    "tip": TIP(delta=9.0, reflection_tokens=(11, 12), end_think=None, window="thought"),
    "thinking budget": ThinkingBudget(max_tokens=6, end_think=(7, 7, 8)),
    "budget forcing": BudgetForcing(max_tokens=16, num_ignore=2, wait=(11, 12), end_think=(7,)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_those_of_transformers_own_loop(name, monkeypatch):
    model, rows = patchkit.apply(build(), SCHEDULES[name]), []
    options = {"do_sample": False, "sequence_bias": {(7,): 6.0}, "max_new_tokens": 24}
    for devices in ((), ("cpu", "cuda")):
        monkeypatch.setattr(engine, "_DEVICES", devices)
        rows.append(model.generate(**batch_of(), **options))
    steps = patchkit.report(model).steps
    assert steps.get("eager", 0) + steps.get("replayed", 0) == 23
    assert torch.equal(*rows)
    assert not torch.equal(rows[0], model.generate(**batch_of(), **options, logit_schedule=None))


RECORDABLE = CHOICES | {name: {"logit_schedule": method} for name, method in SCHEDULES.items()}


@pytest.mark.parametrize("choice", RECORDABLE)
def test_the_next_prompt_needs_no_new_recording(choice):
    model = patchkit.apply(build(), SCHEDULES["wave"])
    options = {"logit_schedule": None} | RECORDABLE[choice]
    recipes = []
    for lengths in ((9, 4, 7), (5, 12, 3)):
        model.generate(**batch_of(lengths), **options, max_new_tokens=24, pad_token_id=0)
        parked = model._patchkit.graphs.parked.choice
        assert parked.capturable
        recipes.append(parked.recipe)
    assert recipes[0] == recipes[1]


def test_an_unknown_token_is_refused_as_by_transformers():
    model = patchkit.apply(build())
    for _ in range(2):
        with pytest.raises(ValueError, match="vocabulary size is 97"):
            model.generate(**batch_of(), bad_words_ids=[[VOCAB]], max_new_tokens=4)
    assert model.generate(**batch_of(), max_new_tokens=4).shape == (3, 13)


def test_seeds_are_reproducible_and_matter():
    model = patchkit.apply(build())
    rows = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        rows.append(model.generate(**batch_of(), do_sample=True, max_new_tokens=16))
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def chi_square(counts, probabilities):
    expected = counts.sum() * probabilities
    return ((counts - expected) ** 2 / expected).sum().item()


def test_draws_follow_the_softmax():
    scores = torch.tensor([1.5, 0.0, -0.5, 0.7, 0.1, -1.0], device=DEVICE)
    torch.manual_seed(0)
    sound = torch.tensor(True, device=DEVICE)
    tokens = draw(scores.expand(60_000, -1), sound, Backend())
    drawn = tokens.bincount(minlength=6).double().cpu()
    assert sound
    probabilities = scores.double().softmax(-1).cpu()
    # 5 degrees of freedom: exceeded once in a thousand times.
    assert chi_square(drawn, probabilities) < 20.5
    wrong = (scores * 1.05).double().softmax(-1).cpu()
    assert chi_square(drawn, wrong) > 20.5


def test_a_custom_processor_sees_the_ids_so_far():
    class Recorder(LogitsProcessor):
        def __init__(self):
            self.seen = []

        def __call__(self, input_ids, scores):
            self.seen.append(input_ids.clone())
            return scores.masked_fill(scores > scores.topk(3).values[:, -1:], float("-inf"))

    recorders = [Recorder(), Recorder()]
    model, outputs = build(), []
    for recorder in recorders:
        processors = LogitsProcessorList([recorder])
        outputs.append(model.generate(**batch_of(), logits_processor=processors, max_new_tokens=9))
        patchkit.apply(model) if not patchkit.report(model).patched else None
    assert torch.equal(*outputs)
    assert len(recorders[0].seen) == len(recorders[1].seen) == 9
    for want, got in zip(recorders[0].seen, recorders[1].seen, strict=True):
        assert torch.equal(want, got)


# -- stopping --------------------------------------------------------------------------------


def test_draws_past_the_end_are_given_back():
    model = build()
    options = {"do_sample": True, "eos_token_id": list(range(3, 60)), "pad_token_id": 0}
    rows = []
    for _ in range(2):
        torch.manual_seed(4)
        rows.append([model.generate(**batch_of(), max_new_tokens=40, **options) for _ in range(3)])
        patchkit.apply(model) if len(rows) == 1 else None
    assert rows[0][0].shape[1] < 40
    for want, got in zip(*rows, strict=True):
        assert torch.equal(got, want)


def test_processors_keep_what_they_got_and_see_nothing_past_the_end():
    class Keeps(LogitsProcessor):
        def __init__(self):
            self.kept, self.copies = [], []

        def __call__(self, input_ids, scores):
            self.kept += [input_ids, scores]
            self.copies += [input_ids.clone(), scores.clone()]
            return scores

    model, seen = build(), [Keeps(), Keeps()]
    ends = tokens_that_end(model, 3)
    ids = {"input_ids": batch_of((9,))["input_ids"]}
    options = {"do_sample": False, "eos_token_id": ends, "max_new_tokens": 60, "pad_token_id": 0}
    for keeps in seen:
        processors = LogitsProcessorList([keeps])
        model.generate(**ids, **options, logits_processor=processors)
        patchkit.apply(model) if keeps is seen[0] else None
    model.generate(**ids, **options)
    assert len(seen[0].kept) == len(seen[1].kept)
    assert all(map(torch.equal, seen[1].kept, seen[1].copies))


@pytest.mark.skipif(DEVICE == "cuda", reason="the error ends the process's use of the GPU")
def test_nan_logits_raise_as_they_do_without_patchkit():
    class Broken(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores * float("nan")

    model = build()
    options = {"do_sample": True, "logits_processor": LogitsProcessorList([Broken()])}
    for _ in range(2):
        with pytest.raises(RuntimeError, match="nan|NaN"):
            model.generate(**batch_of(), max_new_tokens=5, **options)
        patchkit.apply(model) if not patchkit.report(model).patched else None
    assert model.generate(**batch_of(), max_new_tokens=5, do_sample=True).shape[1] > 9


def test_end_tokens_of_any_integer_dtype():
    model = build()
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": torch.tensor(0)}
    answers = []
    for dtype in (torch.int64, torch.int32):
        ends = torch.tensor(range(5, 60), dtype=dtype, device=DEVICE)
        with patchkit.patched(model, backend="triton"):
            answers.append(model.generate(**batch_of(), eos_token_id=ends, **options))
    assert torch.equal(*answers) and answers[0].shape[1] < 9 + 20
