"""The decoding loop against transformers' own; on the CPU its steps are never recorded."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

import patchkit
from patchkit import KVStore, Window, engine
from patchkit.testing import tiny_model, tiny_tokenizer

from .engine_helpers import (
    DEVICE,
    batch_of,
    both,
    build,
    served_devices,  # noqa: F401 the fixture is automatic
    tokens_that_end,
)
from .helpers import with_cache


class Words(BaseStreamer):
    def __init__(self):
        self.seen, self.ended = [], False

    def put(self, value):
        assert not self.ended
        self.seen.append(value.clone())

    def end(self):
        self.ended = True


# -- choosing tokens -------------------------------------------------------------------------


def test_inputs_embeds_alone_begin_without_ids():
    model = build()
    batch = batch_of()
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    options = {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "min_new_tokens": 5}
    options |= {"do_sample": False, "eos_token_id": [5, 9], "bad_words_ids": [[3, 4], [8]]}
    plain, ours = both(model, inputs_embeds=embeds, **batch, **options)
    assert torch.equal(ours.sequences, plain.sequences)


def test_num_return_sequences():
    plain, ours = both(build(), **batch_of((6, 9)), do_sample=True, num_return_sequences=3)
    assert torch.equal(ours.sequences, plain.sequences)
    assert len({tuple(row.tolist()) for row in ours.sequences[:3]}) == 3


@pytest.mark.parametrize("run_ahead", [0, 1, 3, 50])
@pytest.mark.parametrize("rows", [1, 3])
def test_nothing_shows_past_the_end_of_all_rows(monkeypatch, run_ahead, rows):
    monkeypatch.setattr(engine, "RUN_AHEAD", run_ahead)
    model = build()
    ends = tokens_that_end(model, 3)
    streamed = Words(), Words()
    inputs = batch_of() if rows == 3 else {"input_ids": batch_of()["input_ids"][:1]}
    options = {"do_sample": False, "eos_token_id": ends, "max_new_tokens": 60, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    plain = model.generate(**inputs, **options, streamer=streamed[0])
    patchkit.apply(model)
    ours = model.generate(**inputs, **options, streamer=streamed[1])
    assert torch.equal(ours.sequences, plain.sequences)
    assert plain.sequences.shape[1] < 60, "the rows should have ended early"
    assert len(ours.scores) == len(plain.scores)
    assert streamed[1].ended
    assert len(streamed[0].seen) == len(streamed[1].seen)
    for want, got in zip(streamed[0].seen, streamed[1].seen, strict=True):
        assert torch.equal(want, got) and want.device == got.device
    store = ours.past_key_values
    assert isinstance(store, KVStore)
    assert store.get_seq_length() == plain.past_key_values.get_seq_length()
    more = torch.cat([ours.sequences, ours.sequences[:, :4]], dim=1)
    mask = torch.ones_like(more)
    if rows == 3:
        mask[:, :9] = inputs["attention_mask"]
    again = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    second = model.generate(more, **with_cache(store), **again)
    patchkit.restore(model)
    want = model.generate(more, **with_cache(plain.past_key_values), **again)
    assert torch.equal(second, want)


def test_rows_that_ended_are_padded():
    model = build()
    ends = tokens_that_end(model, 1)
    plain, ours = both(model, **batch_of(), do_sample=False, eos_token_id=ends)
    assert torch.equal(ours.sequences, plain.sequences)
    assert (ours.sequences[:, 9:] == 0).any()


def test_an_evicting_store_that_is_returned_ends_with_the_answer():
    model = build()
    ends = tokens_that_end(model, 3)
    patchkit.apply(model, Window(budget=6, num_sink_tokens=2))
    options = {"do_sample": False, "max_new_tokens": 40, "pad_token_id": 0, "eos_token_id": ends}
    out = model.generate(**batch_of(), **options, return_dict_in_generate=True)
    store = out.past_key_values
    assert store.get_seq_length() == out.sequences.shape[1] - 1
    newest = max(int(layer.position.max()) for layer in store.store_layers)
    assert newest == out.sequences.shape[1] - 2


def test_stop_strings_and_max_time_and_custom_criteria():
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer)).to(DEVICE)
    ids = torch.tensor([[3, 4, 5, 6, 7]], device=DEVICE)
    plain = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
    word = tokenizer.decode(plain[0, 14])
    options = {"do_sample": False, "pad_token_id": 0, "stop_strings": [word]}
    options |= {"tokenizer": tokenizer, "max_new_tokens": 24, "input_ids": ids}
    stopped, ours = both(model, **options)
    assert torch.equal(ours.sequences, stopped.sequences)
    assert stopped.sequences.shape[1] < plain.shape[1]

    class After(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            done = input_ids.shape[1] >= 12
            return torch.full((input_ids.shape[0],), done, device=input_ids.device)

    options = {"input_ids": ids, "stopping_criteria": StoppingCriteriaList([After()])}
    stopped, ours = both(model, do_sample=False, **options)
    assert torch.equal(ours.sequences, stopped.sequences)
    assert ours.sequences.shape[1] == 12

    patchkit.apply(model)
    out = model.generate(ids, max_new_tokens=400, max_time=0.0, do_sample=False)
    assert out.shape[1] == 6


def test_a_streamer_that_fails_leaves_the_model_usable():
    class Broken(Words):
        def put(self, value):
            super().put(value)
            if len(self.seen) == 4:
                raise OSError("the pipe is closed")

    model = patchkit.apply(build())
    want = model.generate(**batch_of(), do_sample=False, max_new_tokens=12)
    with pytest.raises(OSError, match="pipe"):
        model.generate(**batch_of(), do_sample=False, max_new_tokens=12, streamer=Broken())
    assert torch.equal(model.generate(**batch_of(), do_sample=False, max_new_tokens=12), want)


# -- calls in a row ----------------------------------------------------------------------------


def test_one_token_and_long_runs_over_several_buckets():
    model = patchkit.apply(build())
    assert model.generate(**batch_of(), max_new_tokens=1).shape[1] == 10
    assert not any(patchkit.report(model).steps.values())
    for new_tokens in (2, 300):
        plain, ours = both(build(), **batch_of(), do_sample=False, max_new_tokens=new_tokens)
        assert torch.equal(ours.sequences, plain.sequences)


def test_calls_of_changing_shapes_in_a_row():
    model = build()
    calls = [((9, 4, 7), 12), ((9, 4, 7), 40), ((5,), 9), ((30, 31), 300), ((9, 4, 7), 12)]
    want = [model.generate(**batch_of(b), max_new_tokens=n, do_sample=False) for b, n in calls]
    patchkit.apply(model)
    for (lengths, new_tokens), expected in zip(calls, want, strict=True):
        got = model.generate(**batch_of(lengths), max_new_tokens=new_tokens, do_sample=False)
        assert torch.equal(got, expected)


def test_an_answer_does_not_change_with_the_next_call():
    model = patchkit.apply(build())
    first = model.generate(**batch_of(), max_new_tokens=8, do_sample=False)
    kept = first.clone()
    store = model.generate(
        **batch_of(), max_new_tokens=8, do_sample=False, return_dict_in_generate=True
    ).past_key_values
    keys = [layer.keys.clone() for layer in store.store_layers]
    model.generate(**batch_of((5, 6, 9)), max_new_tokens=30, do_sample=False)
    assert torch.equal(first, kept)
    for layer, before in zip(store.store_layers, keys, strict=True):
        assert torch.equal(layer.keys, before)


# -- what it does not serve --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "hidden states"),
        ({"use_cache": False}, "use_cache=False"),
    ],
)
def test_host_loops_are_reported(options, reason):
    model = build()
    want = model.generate(**batch_of(), max_new_tokens=8, do_sample=False, **options)
    patchkit.apply(model)
    got = model.generate(**batch_of(), max_new_tokens=8, do_sample=False, **options)
    sequences = [out if isinstance(out, torch.Tensor) else out.sequences for out in (want, got)]
    assert torch.equal(*sequences)
    loops = patchkit.report(model).host_loops
    assert len(loops) == 1 and reason in next(iter(loops))
    assert reason in str(patchkit.report(model))


def test_hooks_run_at_every_step_and_streamers_still_work():
    model = patchkit.apply(build())
    calls = []
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    words = Words()
    model.generate(**batch_of((5,)), max_new_tokens=8, do_sample=False, streamer=words)
    assert len(calls) == 8 and len(words.seen) == 9 and words.ended
    assert "model.layers.1.mlp has forward hooks" in patchkit.report(model).host_loops
    handle.remove()
    model.generate(**batch_of((5,)), max_new_tokens=8, do_sample=False)
    assert sum(patchkit.report(model).host_loops.values()) == 1


def test_beam_search_and_assistants_are_left_to_transformers():
    model = build()
    for options in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 3}):
        inputs = {"input_ids": batch_of((9,))["input_ids"]}
        want = model.generate(**inputs, max_new_tokens=12, do_sample=False, **options)
        with patchkit.patched(model):
            got = model.generate(**inputs, max_new_tokens=12, do_sample=False, **options)
            assert sum(patchkit.report(model).steps.values()) == 0
        assert torch.equal(got, want)


def test_the_mode_may_come_from_a_configuration():
    model = build()
    config = GenerationConfig(num_beams=2, max_new_tokens=8, do_sample=False, pad_token_id=0)
    want = model.generate(**batch_of(), generation_config=config)
    with patchkit.patched(model):
        assert torch.equal(model.generate(**batch_of(), generation_config=config), want)
    model.generation_config.num_beams = 2
    want = model.generate(**batch_of(), max_new_tokens=8, do_sample=False)
    with patchkit.patched(model):
        got = model.generate(**batch_of(), max_new_tokens=8, do_sample=False)
    assert torch.equal(got, want)


# -- calls that must not disturb each other --------------------------------------------------


def second_turn(model, out, **kwargs):
    """Continue from what a call returned."""
    more = torch.cat([out.sequences, out.sequences[:, :4]], dim=1)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    return model.generate(more, **with_cache(out.past_key_values), **options, **kwargs)


@pytest.mark.parametrize(
    "host_loop",
    [
        {"num_beams": 2, "num_return_sequences": 2},
        {"output_hidden_states": True},
        {"prompt_lookup_num_tokens": 2},
    ],
)
def test_a_store_that_a_caller_holds_is_never_used_again(host_loop):
    model, ids = build(), {"input_ids": batch_of((9,))["input_ids"]}
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    returned = options | {"return_dict_in_generate": True} | host_loop
    want = second_turn(model, model.generate(**ids, **returned))
    patchkit.apply(model)
    model.generate(**ids, **options)  # parks its store
    out = model.generate(**ids, **returned)
    columns = out.past_key_values.get_seq_length()
    model.generate(**batch_of((5,)), **options)
    assert out.past_key_values.get_seq_length() == columns
    assert torch.equal(second_turn(model, out), want)


def test_a_call_inside_a_call_has_a_store_of_its_own():
    class Asks(LogitsProcessor):
        def __call__(self, input_ids, scores):
            inner.append(model.generate(**batch_of((5,)), max_new_tokens=3, do_sample=False))
            return scores

    model, inner = patchkit.apply(build()), []
    options = {"max_new_tokens": 5, "do_sample": False}
    want = model.generate(**batch_of((9,)), **options)
    for host_loop in ({}, {"num_beams": 2}):
        got = model.generate(
            **batch_of((9,)), **options, **host_loop, logits_processor=LogitsProcessorList([Asks()])
        )
        assert got.shape == want.shape
    assert len(inner) == 10 and all(torch.equal(inner[0], other) for other in inner)


def test_a_model_that_drafted_for_another_is_served_again():
    small, big = patchkit.apply(build()), build()
    ids = {"input_ids": batch_of((9,))["input_ids"]}
    want = small.generate(**ids, max_new_tokens=8, do_sample=False)
    big.generate(**ids, assistant_model=small, max_new_tokens=8, do_sample=False)
    loops = dict(patchkit.report(small).host_loops)
    assert torch.equal(small.generate(**ids, max_new_tokens=8, do_sample=False), want)
    assert patchkit.report(small).host_loops == loops


def test_inference_mode_leaves_nothing_behind():
    model = patchkit.apply(build())
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    want = model.generate(**batch_of(), **options).sequences
    for _ in range(2):
        with torch.inference_mode():
            out = model.generate(**batch_of(), **options)
            model.generate(**batch_of(), max_new_tokens=8, min_new_tokens=2)
        assert torch.equal(out.sequences, want)
        assert torch.equal(model.generate(**batch_of(), **options).sequences, want)
        more = torch.cat([want, want[:, :3]], dim=1)
        mask = torch.ones_like(more)
        mask[:, :9] = batch_of()["attention_mask"]
        store = with_cache(out.past_key_values)
        model.generate(more, attention_mask=mask, **store, max_new_tokens=3)


def test_values_of_an_earlier_call_do_not_linger():
    model = patchkit.apply(build(), backend="reference")
    weight, outputs = model.model.layers[0].self_attn.v_proj.weight.data, []
    for factor in (1.0, float("nan"), 1.0):
        kept = weight.clone()
        weight *= factor
        outputs.append(
            model.generate(**batch_of(), max_new_tokens=6, do_sample=False, pad_token_id=0)
        )
        weight.copy_(kept)
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])


def test_threads_take_turns():
    model = patchkit.apply(build())
    want = model.generate(**batch_of(), max_new_tokens=12, do_sample=False)
    with ThreadPoolExecutor(3) as pool:
        calls = [
            pool.submit(model.generate, **batch_of(), max_new_tokens=12, do_sample=False)
            for _ in range(6)
        ]
    assert all(torch.equal(call.result(), want) for call in calls)


def test_hidden_states_asked_for_once_do_not_end_the_fast_path():
    model = patchkit.apply(build())
    options = {"max_new_tokens": 4, "do_sample": False}
    model.generate(**batch_of(), **options, output_hidden_states=True, return_dict_in_generate=True)
    before = sum(patchkit.report(model).steps.values())
    model.generate(**batch_of(), **options)
    assert sum(patchkit.report(model).steps.values()) > before


def test_hooks_on_all_modules_are_an_obstacle():
    model, seen = patchkit.apply(build()), []
    register = torch.nn.modules.module.register_module_forward_hook
    handle = register(lambda *_: seen.append(1))
    model.generate(**batch_of(), max_new_tokens=4, do_sample=False)
    handle.remove()
    assert seen and "every module has forward hooks" in patchkit.report(model).host_loops


# -- limits and random numbers ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "criteria",
    [
        [MaxLengthCriteria(5)],
        [MaxLengthCriteria(16), MaxLengthCriteria(12)],
        [EosTokenCriteria(torch.tensor([5, 6, 7])), EosTokenCriteria(torch.tensor([40]))],
    ],
)
def test_criteria_may_come_twice_or_be_met_at_once(criteria):
    ids = {"input_ids": batch_of((9,))["input_ids"]}
    for criterion in criteria:
        if hasattr(criterion, "eos_token_id"):
            criterion.eos_token_id = criterion.eos_token_id.to(DEVICE)
    options = {"do_sample": False, "stopping_criteria": StoppingCriteriaList(criteria)}
    plain, ours = both(build(), **ids, **options, eos_token_id=None, steps=False)
    assert torch.equal(ours.sequences, plain.sequences)


def test_an_endless_limit_is_left_to_transformers():
    model = patchkit.apply(build())

    class After(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 12, device=DEVICE)

    criteria = StoppingCriteriaList([After()])
    model.generate(**batch_of(), max_length=10**8, stopping_criteria=criteria, do_sample=False)
    assert any("maximum length" in reason for reason in patchkit.report(model).host_loops)


def test_one_row_streams_its_weights():
    model = build()
    with patchkit.patched(model, backend="triton"):
        got = model.generate(**batch_of((9,)), max_new_tokens=6, do_sample=False, pad_token_id=0)
        calls = patchkit.report(model).calls
        several = calls["skinny_linear"]["triton"]
        model.generate(**batch_of(), max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert patchkit.report(model).calls["skinny_linear"]["triton"] == several
    # Per step and layer queries to values, output and down-projection, then the head.
    assert several == 5 * (3 * model.config.num_hidden_layers + 1)
    plain = model.generate(**batch_of((9,)), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(got, plain)
