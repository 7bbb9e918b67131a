"""Logits processors on the device against transformers' own, step by step."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from transformers import (
    EncoderRepetitionPenaltyLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    GenerationConfig,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteriaList,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from patchkit import TIP, BudgetForcing, CyclicReflex, ThinkingBudget
from patchkit.backends import Backend
from patchkit.device_processors import TopKThenTopP, merged, on_device
from patchkit.testing import left_padded_batch
from patchkit.token_choice import TokenChoice

from .decoding.helpers import DEVICE, call

VOCAB = 97
BACKEND = Backend()
CALL = call()
STEPS = 24
WIDTH = 256
LENGTHS = (9, 4, 7)
PROMPT = max(LENGTHS)
COMMON = (3, 5, 8, 9)  # the tokens that the logits of these tests favour

BIAS = {(5,): -2.0, (3, 9): 1.5, (8, 9): 0.7, (9,): 0.25, (5, 8, 9): -0.3, (3, 5): -math.inf}
LONG = {tuple([3] * 12): 9.0, tuple([8] * 40): 2.0, (8, 3): 1.0}

KNOWN = {
    "repetition": lambda: RepetitionPenaltyLogitsProcessor(1.7),
    "repetition, new tokens": lambda: RepetitionPenaltyLogitsProcessor(0.6, PROMPT),
    "n-gram 1": lambda: NoRepeatNGramLogitsProcessor(1),
    "n-gram 2": lambda: NoRepeatNGramLogitsProcessor(2),
    "n-gram 3": lambda: NoRepeatNGramLogitsProcessor(3),
    "min length": lambda: MinLengthLogitsProcessor(PROMPT + 6, [5, 8, -1, 400]),
    "min new tokens": lambda: MinNewTokensLengthLogitsProcessor(PROMPT, 6, 5),
    "bad words": lambda: NoBadWordsLogitsProcessor([[5], [3, 9], [8, 9, 3], [9, 9, 9, 8]], [5]),
    "bias": lambda: SequenceBiasLogitsProcessor(dict(BIAS)),
    "bias as a list": lambda: SequenceBiasLogitsProcessor([[[3, 9], 2.0], [[8], -1.0]]),
    "bias, long": lambda: SequenceBiasLogitsProcessor(LONG),
    "suppress": lambda: SuppressTokensLogitsProcessor([3, 9, *range(20, 90), 200]),
    "suppress at begin": lambda: SuppressTokensAtBeginLogitsProcessor([3, 5], PROMPT + 4),
    "forced eos": lambda: ForcedEOSTokenLogitsProcessor(PROMPT + STEPS, [5, 7]),
    "epsilon": lambda: EpsilonLogitsWarper(0.02),
    "eta": lambda: EtaLogitsWarper(0.2, min_tokens_to_keep=2),
    "eta, wide": lambda: EtaLogitsWarper(0.9, min_tokens_to_keep=6),
    "top-h": lambda: TopHLogitsWarper(0.6),
    "top-h, narrow": lambda: TopHLogitsWarper(0.03),
    "inf and nan": InfNanRemoveLogitsProcessor,
    "normalisation": LogitNormalization,
    "temperature": lambda: TemperatureLogitsWarper(0.7),
    "top-k": lambda: TopKLogitsWarper(5),
    "top-p": lambda: TopPLogitsWarper(0.7),
    "top-k, then top-p": lambda: TopKThenTopP(8, 0.8),
    "min-p": lambda: MinPLogitsWarper(0.1),
    "typical-p": lambda: TypicalLogitsWarper(0.5),
}
# Settings under which the runs below can see no effect.
UNSEEN = {
    "empty bad words": lambda: NoBadWordsLogitsProcessor([[5]], 5),
    "suppress nothing": lambda: SuppressTokensLogitsProcessor([]),
    "n-gram, longer than the prefix": lambda: NoRepeatNGramLogitsProcessor(PROMPT + STEPS + 1),
    "n-gram, wider than the buffer": lambda: NoRepeatNGramLogitsProcessor(WIDTH + 7),
    "forced bos": lambda: ForcedBOSTokenLogitsProcessor(4),
}

METHODS = {
    "wave": CyclicReflex(amplitude=6.0, period=8, reflection_tokens=(3, 9), end_think=(5, 8)),
    "wave, windows": CyclicReflex(
        amplitude=6.0, period=5, phase=0.3, reflection_tokens=(3,), end_think=None,
        windows=((1, 4), (9, 15)),
    ),
    "tip": TIP(reflection_tokens=(3, 9), end_think=(5, 8, 5), windows=((0, 10),)),
    "tip, thought": TIP(
        delta=2.0, reflection_tokens=(3, 9), end_think=None, window="thought", windows=((1, 3),)
    ),
    "thinking budget": ThinkingBudget(max_tokens=11, end_think=(5, 5, 8)),
    "budget forcing": BudgetForcing(max_tokens=20, num_ignore=2, wait=(3, 9, 3, 8), end_think=(5,)),
    "ignored ends": BudgetForcing(max_tokens=None, num_ignore=4, wait=9, end_think=(5, 8)),
}  # fmt: skip


def logits_of(step, batch_size):
    """Draw logits that make a few tokens likely, so that n-grams and sequences do come back."""
    generator = torch.Generator().manual_seed(step)
    logits = torch.randn(batch_size, VOCAB, generator=generator)
    logits[:, list(COMMON)] += 4
    return logits


def buffer_of(prompt):
    """Put a prompt into a wide buffer of rubbish; return it and the count of valid columns."""
    rubbish = torch.tensor([-7, 3, 9, 5, 10**9, 8])
    ids = rubbish[torch.randint(len(rubbish), (prompt.shape[0], WIDTH))]
    ids[:, : prompt.shape[1]] = prompt
    return ids, torch.tensor([prompt.shape[1]])


def agree(own, prompt, steps=STEPS, spoil=lambda logits: logits):
    """Run a processor and its translation side by side; return in how many steps it acts."""
    ids, count = buffer_of(prompt)
    twin = on_device(own, ids, prompt.shape[1], BACKEND)
    effects = 0
    for step in range(steps):
        logits = spoil(logits_of(step, prompt.shape[0]))
        kept, before = logits.clone(), ids.clone()
        want = own(ids[:, : int(count)].clone(), logits.clone())
        got = twin(ids, count, logits)
        assert torch.equal(logits.nan_to_num(7e7), kept.nan_to_num(7e7))
        assert torch.equal(ids, before)
        assert torch.equal(got, want), f"step {step}"
        effects += not torch.equal(got, logits)
        ids[:, count] = got.argmax(-1, keepdim=True)
        ids[0, count] = 0 if step > 15 else ids[0, count]  # a row that ended is padded
        count += 1
    return effects


def batch():
    return left_padded_batch(VOCAB, list(LENGTHS))["input_ids"]


@pytest.mark.parametrize("name", KNOWN)
def test_scores_are_those_of_transformers(name):
    def spoil(logits):
        if name == "inf and nan":
            logits[0, 1:4] = torch.tensor([math.inf, -math.inf, math.nan])
        return logits

    assert agree(KNOWN[name](), batch(), spoil=spoil) > 0


TRUNCATING = {
    "top-k": lambda: TopKLogitsWarper(5),
    "top-k, at least": lambda: TopKLogitsWarper(2, min_tokens_to_keep=7, filter_value=-50.0),
    "top-p": lambda: TopPLogitsWarper(0.7),
    "top-p, filled": lambda: TopPLogitsWarper(0.4, filter_value=-50.0),
    "min-p": lambda: MinPLogitsWarper(0.1),
    "top-k, then top-p": lambda: TopKThenTopP(8, 0.8),
}


@pytest.mark.parametrize("name", TRUNCATING)
def test_kernels_keep_what_transformers_keeps(name):
    ids, count = (tensor.to(DEVICE) for tensor in buffer_of(batch()))
    own, backend = TRUNCATING[name](), Backend("triton")
    twin = on_device(own, ids, PROMPT, backend)
    for step in range(STEPS):
        scores = logits_of(step, 3).masked_fill(logits_of(step + 99, 3) < -1, -math.inf)
        scores = scores.to(DEVICE)
        want = own(ids, scores.clone())
        assert torch.equal(twin(ids, count, scores), want) and not torch.equal(want, scores)
        wide = scores.double()  # of a custom processor; runs as it is
        assert torch.equal(twin(ids, count, wide), own(ids, wide))
    assert backend.calls.total() == STEPS


def test_top_k_and_the_top_p_behind_it_are_one():
    heat, top_k = TemperatureLogitsWarper(0.7), TopKLogitsWarper(5)
    top_p, several = TopPLogitsWarper(0.7), TopPLogitsWarper(0.7, min_tokens_to_keep=2)
    filled = TopKLogitsWarper(5, filter_value=-50.0)
    for apart in ([top_k], [top_p, top_k], [top_k, heat, top_p], [filled, top_p], [top_k, several]):
        assert merged(apart) == apart
    first, both, last = merged([heat, top_k, top_p, top_p])
    assert first is heat and last is top_p
    assert (both.top_k, both.top_p) == (5, 0.7)


@pytest.mark.parametrize("warper", [TopPLogitsWarper, MinPLogitsWarper])
def test_what_has_to_keep_several_tokens_runs_as_it_is(warper):
    ids, count = buffer_of(batch())
    own, backend = warper(0.5, min_tokens_to_keep=4), Backend("triton")
    scores = logits_of(0, 3) * 9
    got = on_device(own, ids, PROMPT, backend)(ids, count, scores)
    assert torch.equal(got, own(ids, scores)) and (got > -math.inf).sum() == 12
    assert not backend.calls


@pytest.mark.parametrize("name", UNSEEN)
def test_scores_without_effect_are_those_of_transformers(name):
    assert agree(UNSEEN[name](), batch()) == 0


@pytest.mark.parametrize("length", [0, 1, 2])
@pytest.mark.parametrize("name", KNOWN | UNSEEN)
def test_short_and_empty_prompts(name, length):
    """`inputs_embeds` alone start without ids; sequences and n-grams are longer than the prefix."""
    agree((KNOWN | UNSEEN)[name](), batch()[:, :length], steps=10)


def test_one_token_is_forced_at_the_beginning():
    assert agree(ForcedBOSTokenLogitsProcessor(4), batch()[:, -1:], steps=4) == 1


def test_biases_of_one_token_add_up_in_the_order_of_transformers():
    """In float32 the sum of these depends on the order."""
    biases = {(1, 9): 5.0, (5, 3, 9): 1e8, (8, 5, 3, 9): 0.7, (3, 9): -1e8, (9,): 0.3}
    prompt = torch.tensor([[2, 8, 5, 3], [2, 1, 5, 3], [2, 8, 5, 1]])
    assert agree(SequenceBiasLogitsProcessor(biases), prompt, steps=1) == 1


def test_a_sequence_whose_beginning_is_the_whole_prefix():
    """Versions of transformers differ."""
    agree(SequenceBiasLogitsProcessor({(3, 9): 2.0, (9, 8, 5): 1.0}), torch.tensor([[3], [9]]))


def test_tokens_that_a_bias_removes_stay_removed():
    agree(
        SequenceBiasLogitsProcessor(dict(BIAS)),
        batch(),
        spoil=lambda logits: logits.masked_fill(logits < 0, -math.inf),
    )


HAS_RAGGED_PENALTY = "Tensor" in str(
    inspect.signature(RepetitionPenaltyLogitsProcessor).parameters["prompt_ignore_length"]
)


@pytest.mark.skipif(not HAS_RAGGED_PENALTY, reason="transformers ignores no padding yet")
def test_the_penalty_may_skip_the_padding_of_each_row():
    padding = torch.tensor([PROMPT - length for length in LENGTHS])
    own = RepetitionPenaltyLogitsProcessor(1.7, prompt_ignore_length=padding)
    assert agree(own, batch()) == STEPS
    mixed = RepetitionPenaltyLogitsProcessor(1.7, prompt_ignore_length=padding[:2])
    ids, _ = buffer_of(batch())
    assert (
        on_device(mixed, ids, PROMPT, BACKEND) is None
    )  # transformers has something to say about it


@pytest.mark.skipif(not HAS_RAGGED_PENALTY, reason="transformers takes no such ids yet")
@pytest.mark.parametrize("name", ["repetition", "n-gram 1", "n-gram 2", "bias"])
def test_ids_beyond_the_vocabulary_of_the_logits(name):
    prompt = batch()
    prompt[:, 5:7] = torch.tensor([VOCAB, VOCAB + 40])
    assert agree(KNOWN[name](), prompt) > 0


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("length", [PROMPT, 0])
def test_schedules_on_the_device_are_those_on_the_host(name, length):
    own = METHODS[name].logits_processor(CALL)
    assert agree(own, batch()[:, :length]) > 0


@pytest.mark.parametrize("name", KNOWN | UNSEEN | METHODS)
def test_nothing_waits_for_the_device(name):
    """Meta tensors have no values to wait for, and do not mix with what the host makes."""
    made = (KNOWN | UNSEEN).get(name)
    own = made() if made else METHODS[name].logits_processor(CALL)
    ids = torch.zeros(3, WIDTH, dtype=torch.int64, device="meta")
    count = torch.zeros(1, dtype=torch.int64, device="meta")
    scores = torch.zeros(3, VOCAB, device="meta")
    assert on_device(own, ids, PROMPT, BACKEND)(ids, count, scores).shape == scores.shape


def test_what_is_not_known_stays_on_the_host():
    class Mine(TopKLogitsWarper):
        pass

    class Stronger(RepetitionPenaltyLogitsProcessor):
        pass

    schedule = METHODS["wave"].logits_processor(CALL)

    class Otherwise(type(schedule)):
        pass

    strange = TemperatureLogitsWarper(0.5)
    strange.temperature = torch.tensor(0.5)
    unknown = [
        Mine(5),
        Stronger(1.2),
        Otherwise(schedule.function, schedule.constants, **schedule.settings),
        EncoderRepetitionPenaltyLogitsProcessor(1.2, batch()),
        ExponentialDecayLengthPenalty((3, 1.1), 5, PROMPT),
        strange,
    ]
    ids, _ = buffer_of(batch())
    assert [on_device(own, ids, PROMPT, BACKEND) for own in unknown] == [None] * len(unknown)


def test_tokens_that_do_not_exist_are_refused_by_transformers():
    for own in (
        SequenceBiasLogitsProcessor({(VOCAB, 3): 1.0}),
        NoBadWordsLogitsProcessor([[VOCAB]]),
    ):
        ids, count = buffer_of(batch())
        twin = on_device(own, ids, PROMPT, BACKEND)
        with pytest.raises(ValueError, match="vocabulary size is 97"):
            twin(ids, count, logits_of(0, 3))


# -- many of them, over several calls ----------------------------------------------------------


def own_list(prompt_length, **changes):
    """Build what transformers does for a call: lengths and end tokens are the call's own."""
    given = {"penalty": 1.3, "end": [5, 8], "bias": {(3, 9): 2.0, (8,): -1.0}} | changes
    return LogitsProcessorList(
        [
            SequenceBiasLogitsProcessor(dict(given["bias"])),
            RepetitionPenaltyLogitsProcessor(given["penalty"]),
            NoRepeatNGramLogitsProcessor(3),
            MinNewTokensLengthLogitsProcessor(prompt_length, 5, torch.tensor(given["end"])),
            ForcedEOSTokenLogitsProcessor(prompt_length + 12, given["end"][0]),
            SuppressTokensAtBeginLogitsProcessor([9], prompt_length),
            METHODS["budget forcing"].logits_processor(CALL),
            METHODS["tip, thought"].logits_processor(CALL),
            TopPLogitsWarper(0.95),
        ]
    )


def run(choice, prompt, processors):
    """Choose twelve tokens greedily; return the scores they were chosen from."""
    criteria, config = StoppingCriteriaList(), GenerationConfig(do_sample=False)
    choice.begin(prompt, processors, criteria, config)
    scores = []
    for step in range(12):
        choice.choose(logits_of(step, prompt.shape[0]))
        scores.append(choice.scores)
        choice.advance()
    return scores


def run_on_the_host(prompt, processors):
    scores = []
    for step in range(12):
        scores.append(processors(prompt, logits_of(step, prompt.shape[0])))
        prompt = torch.cat([prompt, scores[-1].argmax(-1, keepdim=True)], dim=1)
    return scores


def same(got, want):
    return all(map(torch.equal, got, want))


def test_equal_settings_keep_their_addresses_from_call_to_call():
    choice = TokenChoice(3, WIDTH, 4, torch.device("cpu"), Backend())
    recipes = []
    for lengths, changes in (
        (LENGTHS, {}),
        ((4, 13, 20), {}),
        ((2, 2, 1), {"end": [9, 3], "bias": {(5, 8): -4.0, (9,): 1.0}}),
    ):
        prompt = left_padded_batch(VOCAB, list(lengths))["input_ids"]
        got = run(choice, prompt, own_list(prompt.shape[1], **changes))
        assert same(got, run_on_the_host(prompt, own_list(prompt.shape[1], **changes)))
        assert choice.capturable
        recipes.append(choice.recipe)
    assert recipes[0] == recipes[1] == recipes[2]


@pytest.mark.parametrize(
    "changes", [{"penalty": 1.4}, {"end": [5, 8, 9]}, {"bias": {(3, 9, 8): 2.0, (8,): -1.0}}]
)
def test_other_settings_are_another_recipe(changes):
    choice = TokenChoice(3, WIDTH, 4, torch.device("cpu"), Backend())
    run(choice, batch(), own_list(PROMPT))
    before = choice.recipe
    got = run(choice, batch(), own_list(PROMPT, **changes))
    assert choice.recipe != before
    assert same(got, run_on_the_host(batch(), own_list(PROMPT, **changes)))


def test_one_processor_on_the_host_keeps_its_place():
    class Sharper(TemperatureLogitsWarper):
        pass

    def mixed():
        return LogitsProcessorList([*own_list(PROMPT)[:3], Sharper(0.3), *own_list(PROMPT)[3:]])

    choice = TokenChoice(3, WIDTH, 4, torch.device("cpu"), Backend())
    run(choice, batch(), own_list(PROMPT))
    got = run(choice, batch(), mixed())
    assert same(got, run_on_the_host(batch(), mixed()))
    assert not choice.capturable
