"""ThinkingBudget: the end of thinking is forced once, in full, and at the right token."""

from __future__ import annotations

import pytest
import torch

from patchkit.decoding.thinking_budget import ThinkingBudget
from patchkit.errors import TokenResolutionError
from patchkit.testing import left_padded_batch
from tests.decoding.helpers import (
    END,
    VOCAB_SIZE,
    Scripted,
    byte_tokenizer,
    call,
    generate,
    llama,
    prompt,
)

SEQUENCE = (END, END, 8)  # its own start occurs twice in it


@pytest.fixture(scope="module")
def model():
    return llama()


def processor(model, **fields):
    return ThinkingBudget(**fields).logits_processor(call(model))


def continuation(model, script, **fields):
    """Generate what `script` wants under a budget; return the generated ids, one list per row."""
    inputs = prompt(5, rows=len(script))
    steps = len(script[0])
    processors = [Scripted(script), processor(model, **fields)]
    return generate(model, processors, inputs, max_new_tokens=steps).sequences[:, 5:].tolist()


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
def test_the_sequence_follows_the_budget_and_then_nothing_is_forced(model, max_tokens):
    script = [[20, 21, 22, 23, 24, 25, 26, 27, 28, 29]]
    got = continuation(model, script, max_tokens=max_tokens, end_think=SEQUENCE)
    want = list(script[0])
    want[max_tokens : max_tokens + 3] = SEQUENCE
    assert got == [want]


def test_rows_that_end_by_themselves_are_left_alone(model):
    free = [20, *SEQUENCE, 24, 25, 26, 27, 28, 29]
    slow = [20, 21, 22, 23, 24, 25, 26, 27, 28, 29]
    got = continuation(model, [free, slow], max_tokens=4, end_think=SEQUENCE)
    assert got == [free, [20, 21, 22, 23, *SEQUENCE, 27, 28, 29]]


def test_a_started_sequence_is_completed_not_repeated(model):
    started = [20, 21, 22, END, 24, 25, 26, 27]
    longer = [20, 21, END, END, 24, 25, 26, 27]
    thrice = [20, END, END, END, 24, 25, 26, 27]  # only the last two can start it
    got = continuation(model, [started, longer, thrice], max_tokens=4, end_think=SEQUENCE)
    assert got == [
        [20, 21, 22, *SEQUENCE, 26, 27],
        [20, 21, *SEQUENCE, 25, 26, 27],
        [20, END, *SEQUENCE, 25, 26, 27],
    ]


def test_the_prompt_starts_no_sequence(model):
    proc = processor(model, max_tokens=0, end_think=SEQUENCE)
    ids = torch.tensor([[1, END, END], [8, 2, END]])
    for forced in SEQUENCE:
        out = proc(ids, torch.zeros(2, VOCAB_SIZE))
        assert out.argmax(1).tolist() == [forced] * 2
        ids = torch.cat([ids, out.argmax(1, keepdim=True)], dim=1)


def test_a_budget_that_is_not_reached_changes_no_score(model):
    inputs = prompt(rows=2)
    plain = generate(model, None, inputs)
    same = generate(model, processor(model, max_tokens=24, end_think=END), inputs)
    for a, b in zip(plain.scores, same.scores, strict=True):
        assert torch.equal(a, b)
    assert ThinkingBudget(max_tokens=None).logits_processor(call(model)) is None


def test_forcing_leaves_one_token(model):
    proc = processor(model, max_tokens=0, end_think=END)
    scores = torch.randn(2, VOCAB_SIZE)
    kept = scores.clone()
    out = proc(torch.ones(2, 4, dtype=torch.long), scores)
    assert out.isfinite().sum(1).tolist() == [1, 1]
    assert torch.equal(out[:, END], kept[:, END]) and torch.equal(scores, kept)
    removed = torch.full((1, VOCAB_SIZE), float("-inf"))
    fresh = processor(model, max_tokens=0, end_think=END)
    assert fresh(torch.ones(1, 4, dtype=torch.long), removed)[0, END] == 0  # still a distribution


def test_sampling_never_misses_the_end(model):
    torch.manual_seed(0)
    proc = processor(model, max_tokens=6, end_think=SEQUENCE)
    out = generate(model, proc, prompt(5, rows=4), do_sample=True, top_p=0.9, temperature=0.6)
    assert out.sequences[:, 11:14].tolist() == [list(SEQUENCE)] * 4


def test_left_padded_batch_equals_single_rows(model):
    lengths = [3, 9, 6]
    batch = left_padded_batch(VOCAB_SIZE, lengths)
    fields = {"max_tokens": 5, "end_think": SEQUENCE}
    whole = generate(model, processor(model, **fields), batch).sequences[:, 9:]
    assert whole[:, 5:8].tolist() == [list(SEQUENCE)] * 3
    for row, length in enumerate(lengths):
        single = {name: tensor[row : row + 1, 9 - length :] for name, tensor in batch.items()}
        alone = generate(model, processor(model, **fields), single).sequences
        assert torch.equal(alone[0, length:], whole[row])


def test_beam_search_ends_every_beam(model):
    proc = processor(model, max_tokens=6, end_think=SEQUENCE)
    out = generate(
        model, proc, prompt(5, rows=2), num_beams=3, num_return_sequences=3, max_new_tokens=12
    )
    assert out.sequences[:, 11:14].tolist() == [list(SEQUENCE)] * 6
    assert out.sequences_scores.isfinite().all()


@pytest.mark.parametrize("max_tokens", [7, 8, 9, 10])
def test_assisted_decoding_is_token_identical(model, max_tokens):
    ids = prompt(6)["input_ids"].repeat(1, 4)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    fields = {"max_tokens": max_tokens, "end_think": SEQUENCE}
    greedy = generate(model, processor(model, **fields), inputs, max_new_tokens=30)
    assisted = generate(
        model, processor(model, **fields), inputs, max_new_tokens=30, prompt_lookup_num_tokens=3
    )
    assert torch.equal(assisted.sequences, greedy.sequences)


def test_the_end_must_exist(model):
    tokenizer = byte_tokenizer(["Wait"])
    with pytest.raises(TokenResolutionError, match="</think>"):
        ThinkingBudget(max_tokens=4, tokenizer=tokenizer).logits_processor(call(model))
    text = ThinkingBudget(max_tokens=4, end_think="ab", tokenizer=tokenizer)
    assert text.token_ids(tokenizer, None) == tuple(tokenizer.encode("ab"))
    with pytest.raises(TokenResolutionError, match="no tokenizer"):
        ThinkingBudget(max_tokens=4).logits_processor(call(model))


@pytest.mark.parametrize("max_tokens", [-1, 1.5, True])
def test_bad_budgets_are_value_errors(max_tokens):
    with pytest.raises(ValueError, match="max_tokens"):
        ThinkingBudget(max_tokens=max_tokens)
