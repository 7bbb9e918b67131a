"""TIP: a constant penalty inside windows of the generation or of the current thought."""

from __future__ import annotations

import pytest
import torch

from patchkit.decoding.tip import TIP
from patchkit.method import method_class
from tests.decoding.helpers import END, REFLECTION, VOCAB_SIZE, call, generate, llama, prompt


@pytest.fixture(scope="module")
def model():
    return llama()


def processor(model, backend="reference", **fields):
    fields = {"reflection_tokens": REFLECTION, "end_think": None} | fields
    return TIP(**fields).logits_processor(call(model, backend=backend))


def biases(proc, ids, prompt_len):
    steps = []
    for length in range(prompt_len, ids.shape[1] + 1):
        out = proc(ids[:, :length], torch.zeros(ids.shape[0], VOCAB_SIZE))
        assert (out[:, REFLECTION[0]] == out[:, REFLECTION[-1]]).all()
        steps.append(out[:, REFLECTION[0]])
    return torch.stack(steps, 1)


def test_defaults_are_the_baseline_of_the_authors():
    method = TIP()
    assert (method.delta, method.windows, method.window) == (-3.0, ((0, 600),), "generation")
    assert method_class("tip") is TIP


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_constant_inside_the_window_only(model, backend):
    ids = torch.full((2, 12), 2)
    got = biases(processor(model, backend, windows=((0, 4),)), ids, prompt_len=4)
    assert torch.equal(got, torch.tensor([[-3.0] * 4 + [0.0] * 5] * 2))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_thought_window_restarts_at_each_reflection_token(model, backend):
    ids = torch.full((3, 14), 2)
    ids[1, 7] = REFLECTION[1]  # generated tokens 3 and 5
    ids[1, 9] = REFLECTION[2]
    ids[2, 2] = REFLECTION[0]  # in the prompt: no thought of this generation
    ids[2, 4] = REFLECTION[0]  # the very first generated token
    got = biases(processor(model, backend, window="thought", windows=((0, 3),)), ids, 4)
    active = (got != 0).int().tolist()
    assert active[0] == [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    # The token after generated token 3 is step 1 of its thought, since that token is step 0.
    assert active[1] == [1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0]
    assert active[2] == [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]


def test_thought_window_survives_permuted_rows_and_shorter_prefixes(model):
    torch.manual_seed(0)
    ids = torch.randint(1, 20, (4, 20))
    fields = {"window": "thought", "windows": ((2, 4),)}
    want = biases(processor(model, **fields), ids, prompt_len=5)
    assert 0 < want.count_nonzero() < want.numel()
    proc = processor(model, **fields)
    proc(ids[:, :5], torch.zeros(4, VOCAB_SIZE))
    for length in (17, 6, 13, 12, 20, 5):
        order = torch.randperm(4)
        got = proc(ids[order, :length], torch.zeros(4, VOCAB_SIZE))[:, REFLECTION[0]]
        assert torch.equal(got, want[order, length - 5])


@pytest.mark.parametrize("window", ["generation", "thought"])
def test_gate_closes(model, window):
    ids = torch.full((2, 12), 2)
    ids[1, 6:8] = torch.tensor([END, 8])
    got = biases(processor(model, window=window, end_think=(END, 8)), ids, prompt_len=4)
    assert (got[0] == -3).all()
    assert got[1].tolist() == [-3.0] * 4 + [0.0] * 5


def test_generation_avoids_the_tokens(model):
    inputs = prompt(rows=2)
    plain = generate(model, None, inputs).sequences[:, 9:]
    tokens = tuple(torch.unique(plain)[:4].tolist())
    proc = processor(model, delta=-100.0, reflection_tokens=tokens)
    out = generate(model, proc, inputs).sequences[:, 9:]
    assert torch.isin(plain, torch.tensor(tokens)).any()
    assert not torch.isin(out, torch.tensor(tokens)).any()


@pytest.mark.parametrize("window", ["generation", "thought"])
def test_assisted_decoding_is_token_identical(model, window):
    ids = prompt(6)["input_ids"].repeat(1, 4)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    fields = {"window": window, "delta": -6.0, "windows": ((1, 9),), "end_think": (END,)}
    fields["reflection_tokens"] = tuple(range(1, 30))
    greedy = generate(model, processor(model, **fields), inputs, max_new_tokens=40)
    assisted = generate(
        model, processor(model, **fields), inputs, max_new_tokens=40, prompt_lookup_num_tokens=3
    )
    assert torch.equal(assisted.sequences, greedy.sequences)
    assert not torch.equal(
        generate(model, None, inputs, max_new_tokens=40).sequences, greedy.sequences
    )


def test_delta_zero_is_the_unpatched_model(model):
    assert TIP(delta=0.0).logits_processor(call(model)) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"delta": float("-inf")}, "delta"),
        ({"window": "sentence"}, "window"),
        ({"windows": ((3, 1),)}, "windows"),
        ({"reflection_tokens": "all"}, "reflection_tokens"),
    ],
    ids=str,
)
def test_bad_fields_are_value_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        TIP(**fields)
