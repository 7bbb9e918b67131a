"""CyclicReflex: the wave, its gate, and every way `generate()` calls a processor."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from patchkit.decoding.cyclic_reflex import PRESETS, CyclicReflex
from patchkit.decoding.reference import wave
from patchkit.decoding.tip import TIP
from patchkit.method import method_class
from patchkit.testing import left_padded_batch
from tests.decoding.helpers import (
    END,
    REFLECTION,
    VOCAB_SIZE,
    Scripted,
    call,
    generate,
    llama,
    piecewise,
    prompt,
)

SETTINGS = [(1.0, 8, 0.0), (5.0, 600, 0.0), (3.0, 100, 0.25), (2.0, 7, 0.3), (1.5, 1, 0.6)]


@pytest.fixture(scope="module")
def model():
    return llama()


def reflex(**fields):
    """Build a strong, fast wave on three tokens of the tiny vocabulary."""
    defaults = {
        "amplitude": 30.0,
        "period": 8,
        "reflection_tokens": REFLECTION,
        "end_think": None,
        "windows": None,
    }
    return CyclicReflex(**(defaults | fields))


def processor(model, backend="reference", **fields):
    return reflex(**fields).logits_processor(call(model, backend=backend))


def biases(proc, ids, prompt_len):
    """Feed every prefix of `ids [B, prompt + n]` in turn; return the biases `[B, n + 1]`."""
    steps = []
    for length in range(prompt_len, ids.shape[1] + 1):
        out = proc(ids[:, :length], torch.zeros(ids.shape[0], VOCAB_SIZE))
        steps.append(out[:, REFLECTION[0]])
    return torch.stack(steps, 1)


@pytest.mark.parametrize(("amplitude", "period", "phase"), SETTINGS)
def test_bias_follows_closed_and_piecewise_form(model, amplitude, period, phase):
    proc = processor(model, amplitude=amplitude, period=period, phase=phase)
    closed = wave(torch.arange(2 * period + 1), amplitude, period, phase)
    proc(torch.ones(1, 3, dtype=torch.long), torch.zeros(1, VOCAB_SIZE))  # prompt of three tokens
    for n in range(2 * period + 1):
        out = proc(torch.ones(1, 3 + n, dtype=torch.long), torch.zeros(1, VOCAB_SIZE))
        want = piecewise(n, amplitude, period, phase)
        assert float(out[0, REFLECTION[1]]) == pytest.approx(want, abs=1e-5 * amplitude)
        assert float(closed[n]) == pytest.approx(want, abs=1e-5 * amplitude)
        assert out.count_nonzero() in (0, len(REFLECTION))


def test_wave_encourages_first_and_averages_to_zero():
    values = wave(torch.arange(600), 1.0, 600)
    assert values[0] == 0 and values[150] == 1 and values[300] == 0 and values[450] == -1
    assert float(values.mean()) == pytest.approx(0, abs=1e-6)


def test_generation_changes_and_differs_from_tip(model):
    inputs = prompt(rows=2)
    plain = generate(model, None, inputs).sequences
    biased = generate(model, processor(model), inputs).sequences
    tip = TIP(delta=30.0, reflection_tokens=REFLECTION).logits_processor(call(model))
    penalised = generate(model, tip, inputs).sequences
    assert not torch.equal(plain, biased)
    assert not torch.equal(biased, penalised)


def test_scores_carry_the_wave(model):
    inputs = prompt(rows=2)
    out = generate(model, processor(model), inputs, output_logits=True)
    for n, (raw, biased) in enumerate(zip(out.logits, out.scores, strict=True)):
        want = raw.clone()
        want[:, list(REFLECTION)] += piecewise(n, 30.0, 8, 0.0)
        torch.testing.assert_close(biased, want)


def test_amplitude_zero_is_the_unpatched_model(model):
    method = reflex(amplitude=0.0, reflection_tokens="paper")
    assert method.logits_processor(call(model)) is None  # and needs no tokenizer
    method.check(None)
    forced = reflex(amplitude=0.0).processor((REFLECTION, None), call(model))
    inputs = prompt(rows=2)
    plain, same = generate(model, None, inputs), generate(model, forced, inputs)
    assert torch.equal(plain.sequences, same.sequences)
    for a, b in zip(plain.scores, same.scores, strict=True):
        assert torch.equal(a, b)


def test_processor_leaves_its_input_alone(model):
    scores = torch.zeros(1, VOCAB_SIZE)
    proc = processor(model, phase=0.25)
    assert proc(torch.ones(1, 4, dtype=torch.long), scores)[0, REFLECTION[0]] == 30
    assert not scores.any()


def test_kernel_and_reference_generate_the_same(model):
    inputs = prompt(rows=3)
    stand_in = call(model, backend="triton")
    method = reflex(end_think=(END,), windows=((0, 10), (12, 20)))
    kernel = generate(model, method.logits_processor(stand_in), inputs, max_new_tokens=16)
    spec = generate(model, method.logits_processor(call(model)), inputs, max_new_tokens=16)
    assert stand_in.backend.calls == {("logit_wave", "triton"): 16}
    assert torch.equal(kernel.sequences, spec.sequences)
    for a, b in zip(kernel.scores, spec.scores, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("end", [(END,), (END, 8), (END, END, 8)], ids=str)
def test_gate_closes_per_row(model, end):
    ids = torch.full((3, 14), 2)
    ids[0, 0 : len(end)] = torch.tensor(end)  # in the prompt: of an earlier turn
    ids[1, 8 : 8 + len(end)] = torch.tensor(end)
    ids[2, 8] = END  # the start of the sequence alone closes nothing, unless it is all of it
    got = biases(processor(model, end_think=end, phase=0.05), ids, prompt_len=5)
    alone = biases(processor(model, phase=0.05), ids, prompt_len=5)
    closed = torch.arange(10) + 5 >= 8 + len(end)
    assert alone.all()
    assert torch.equal(got[0], alone[0])
    assert torch.equal(got[1] == 0, closed)
    assert torch.equal(got[2] == 0, closed if len(end) == 1 else torch.zeros(10, dtype=torch.bool))


def test_a_sequence_across_the_prompt_border_does_not_close(model):
    ids = torch.full((1, 9), 2)
    ids[0, 4:6] = torch.tensor([END, 8])
    assert biases(processor(model, end_think=(END, 8), phase=0.05), ids, prompt_len=5).all()


def test_windows(model):
    ids = torch.full((1, 25), 2)
    got = biases(processor(model, windows=((1, 4), (9, 11)), phase=0.05), ids, prompt_len=5)
    assert got[0].nonzero().flatten().tolist() == [1, 2, 3, 9, 10]
    assert CyclicReflex().windows == ((0, 8192),)


def test_rows_may_be_permuted_and_prefixes_cut_back(model):
    """What beam search and speculative decoding do between two calls."""
    torch.manual_seed(0)
    ids = torch.randint(1, 10, (4, 20))
    ids[:, 12] = torch.tensor([END, 2, END, 2])
    want = biases(processor(model, end_think=(END,), phase=0.05), ids, prompt_len=5)
    proc = processor(model, end_think=(END,), phase=0.05)
    zeros = torch.zeros(4, VOCAB_SIZE)
    proc(ids[:, :5], zeros)
    for length in (9, 17, 6, 13, 12, 20, 5):
        order = torch.randperm(4)
        got = proc(ids[order, :length], zeros)[:, REFLECTION[0]]
        assert torch.equal(got, want[order, length - 5])


def test_left_padded_batch_equals_single_rows(model):
    lengths = [4, 9, 6]
    batch = left_padded_batch(VOCAB_SIZE, lengths)
    method = reflex(end_think=(END,))
    whole = generate(model, method.logits_processor(call(model)), batch).sequences[:, 9:]
    for row, length in enumerate(lengths):
        single = {name: tensor[row : row + 1, 9 - length :] for name, tensor in batch.items()}
        alone = generate(model, method.logits_processor(call(model)), single).sequences
        assert torch.equal(alone[0, length:], whole[row])


def test_beam_search_equals_a_manual_bias(model):
    """Beams see the wave of their own length, whatever the order of rows."""
    inputs = prompt(rows=2)

    class Manual(Scripted):
        def __call__(self, input_ids, scores):
            self.prompt_len = self.prompt_len or input_ids.shape[1]
            out = scores.clone()
            for row, ids in enumerate(input_ids.tolist()):
                generated = ids[self.prompt_len :]
                if END not in generated:
                    out[row, list(REFLECTION)] += piecewise(len(generated), 8.0, 8, 0.0)
            return out

    kwargs = {"num_beams": 3, "max_new_tokens": 16}
    method = reflex(amplitude=8.0, end_think=(END,))
    ours = generate(model, method.logits_processor(call(model)), inputs, **kwargs)
    manual = generate(model, Manual([]), inputs, **kwargs)
    plain = generate(model, None, inputs, **kwargs)
    assert torch.equal(ours.sequences, manual.sequences)
    assert torch.unique(ours.beam_indices).numel() > 2  # beams did change places
    assert not torch.equal(ours.sequences, plain.sequences)


def accepted_drafts(monkeypatch):
    """Count the drafts that prompt lookup makes."""
    lengths = []
    original = PromptLookupCandidateGenerator.get_candidates

    def counted(self, input_ids, *args, **kwargs):
        candidates, logits = original(self, input_ids, *args, **kwargs)
        lengths.append(candidates.shape[1] - input_ids.shape[1])
        return candidates, logits

    monkeypatch.setattr(PromptLookupCandidateGenerator, "get_candidates", counted)
    return lengths


@pytest.mark.parametrize("amplitude", [2.0, 30.0])
def test_assisted_decoding_is_token_identical(model, amplitude, monkeypatch):
    ids = prompt(6)["input_ids"].repeat(1, 4)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    method = reflex(amplitude=amplitude, end_think=(END,))
    greedy = generate(model, method.logits_processor(call(model)), inputs, max_new_tokens=40)
    lengths = accepted_drafts(monkeypatch)
    assisted = generate(
        model,
        method.logits_processor(call(model)),
        inputs,
        max_new_tokens=40,
        prompt_lookup_num_tokens=3,
    )
    assert torch.equal(assisted.sequences, greedy.sequences)
    assert sum(lengths) > 10 and len(lengths) < 40  # drafts were made, and some accepted


def test_bias_comes_before_temperature_and_top_p(model):
    torch.manual_seed(0)
    inputs = prompt()
    kwargs = {"do_sample": True, "temperature": 0.5, "top_k": 0, "output_logits": True}
    out = generate(model, processor(model, phase=0.25, amplitude=4.0), inputs, top_p=1.0, **kwargs)
    for n, (raw, score) in enumerate(zip(out.logits, out.scores, strict=True)):
        want = raw.clone()
        want[:, list(REFLECTION)] += piecewise(n, 4.0, 8, 0.25)
        torch.testing.assert_close(score, want / 0.5)
    # top-p cuts what the bias left: a strong bias keeps its tokens and nothing else.
    out = generate(model, processor(model, period=1, phase=0.25), inputs, top_p=0.9, **kwargs)
    for score in out.scores:
        assert set(score[0].isfinite().nonzero().flatten().tolist()) <= set(REFLECTION)


def test_inputs_embeds_count_from_the_first_generated_token(model):
    ids = prompt()["input_ids"]
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids)}
    from_embeds = generate(model, processor(model), inputs).sequences
    from_ids = generate(model, processor(model), {"input_ids": ids}).sequences
    assert torch.equal(from_embeds, from_ids[:, ids.shape[1] :])


def test_presets():
    method = CyclicReflex.preset("r1-distill-qwen-7b/amc23", phase=0.5)
    assert (method.amplitude, method.period, method.phase) == (5.0, 900, 0.5)
    assert len(PRESETS) == 6
    with pytest.raises(ValueError, match="r1-distill-qwen-7b/math500"):
        CyclicReflex.preset("nope")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"amplitude": -1.0}, "amplitude"),
        ({"amplitude": float("nan")}, "amplitude"),
        ({"period": 0}, "period"),
        ({"period": 1.5}, "period"),
        ({"phase": float("inf")}, "phase"),
        ({"reflection_tokens": "papre"}, "reflection_tokens"),
        ({"reflection_tokens": []}, "reflection_tokens"),
        ({"end_think": []}, "end_think"),
        ({"windows": ()}, "windows"),
        ({"windows": ((5, 5),)}, "windows"),
        ({"windows": ((0, 5), (4, 8))}, "windows"),
        ({"windows": ((-1, 5),)}, "windows"),
        ({"windows": ((0, 5, 6),)}, "windows"),
    ],
    ids=str,
)
def test_bad_fields_are_value_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        CyclicReflex(**fields)


def test_configuration_is_a_hashable_value(model):
    method = CyclicReflex(reflection_tokens=[3, "but"], windows=[[0, 5]], tokenizer=object())
    assert method == CyclicReflex(reflection_tokens=(3, "but"), windows=((0, 5),))
    assert hash(method) == hash(dataclasses.replace(method, tokenizer=None))
    assert "tokenizer" not in repr(method)
    assert method_class("CyclicReflex") is CyclicReflex
    assert not CyclicReflex.exact
    assert method.sites(None) == ("generate",)
    assert "2506.11077" in CyclicReflex.page()
