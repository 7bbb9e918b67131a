"""BudgetForcing: "Wait" in place of the end, a counted number of times, and the upper limit."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessor

from patchkit.decoding.budget_forcing import BudgetForcing
from patchkit.errors import TokenResolutionError
from tests.decoding.helpers import (
    END,
    VOCAB_SIZE,
    WAIT,
    Scripted,
    byte_tokenizer,
    call,
    generate,
    llama,
    prompt,
)


@pytest.fixture(scope="module")
def model():
    return llama()


def processor(model, **fields):
    fields = {"wait": WAIT, "end_think": END, "max_tokens": None} | fields
    return BudgetForcing(**fields).logits_processor(call(model))


def continuation(model, script, **fields):
    """Generate what `script` wants under the limits; return the generated ids, a list per row."""
    inputs = prompt(5, rows=len(script))
    processors = [Scripted(script), processor(model, **fields)]
    out = generate(model, processors, inputs, max_new_tokens=len(script[0]))
    return out.sequences[:, 5:].tolist()


@pytest.mark.parametrize("num_ignore", [0, 1, 2])
def test_the_end_becomes_wait_so_many_times(model, num_ignore):
    script = [[20, END, 21, END, 22, END, 23, 24]]
    want = list(script[0])
    for at in (1, 3, 5)[:num_ignore]:
        want[at] = WAIT
    assert continuation(model, script, num_ignore=num_ignore, max_tokens=100) == [want]


def test_rows_count_for_themselves(model):
    script = [[20, END, 21, END, 22], [20, 21, 22, END, 23], [20, 21, 22, 23, 24]]
    got = continuation(model, script)
    assert got == [[20, WAIT, 21, END, 22], [20, 21, 22, WAIT, 23], [20, 21, 22, 23, 24]]


def test_the_models_own_wait_is_free(model):
    script = [[WAIT, 20, WAIT, END, 21, END, END]]
    assert continuation(model, script) == [[WAIT, 20, WAIT, WAIT, 21, END, END]]


def test_after_the_end_nothing_is_replaced(model):
    """Once thinking has ended, a further end id is the model's business."""
    script = [[20, END, 21, END, END, END]]
    assert continuation(model, script) == [[20, WAIT, 21, END, END, END]]


def test_a_wait_of_several_ids_is_written_in_full(model):
    wait = (WAIT, 30, WAIT, 31)
    script = [[20, END, 21, 22, 23, 24, END, 25], [WAIT, 30, 21, 22, 23, 24, 25, END]]
    got = continuation(model, script, wait=wait)
    assert got == [[20, *wait, 24, END, 25], [WAIT, 30, 21, 22, 23, 24, 25, WAIT]]


def test_a_wait_inside_the_forced_text_is_not_counted(model):
    wait = (WAIT, 30, WAIT, 31)
    script = [[20, END, END, END, END, 23, END, 24, 25, 26, END]]
    got = continuation(model, script, wait=wait, num_ignore=2)
    assert got == [[20, *wait, 23, *wait, END]]


def test_the_first_id_of_a_longer_end_is_replaced(model):
    end = (END, 8)
    script = [[20, END, 21, END, 8, END, 8, 22]]
    assert continuation(model, script, end_think=end) == [[20, WAIT, 21, END, 8, END, 8, 22]]


@pytest.mark.parametrize("max_tokens", [0, 3, 4])
def test_the_upper_limit_wins(model, max_tokens):
    script = [[20, 21, 22, 23, 24, 25, 26, 27]]
    want = list(script[0])
    want[max_tokens : max_tokens + 2] = [END, 8]
    assert continuation(model, script, max_tokens=max_tokens, end_think=(END, 8)) == [want]
    late = [[20, 21, 22, 23, END, END, END, END]]
    assert continuation(model, late, max_tokens=5)[0][4:] == [WAIT, END, END, END]


def test_only_two_scores_move(model):
    proc = processor(model)
    scores = torch.randn(3, VOCAB_SIZE)
    scores[0, END], scores[0, WAIT] = 3.0, -1.0
    scores[1, END], scores[1, WAIT] = -1.0, 3.0
    kept = scores.clone()
    out = proc(torch.ones(3, 4, dtype=torch.long), scores)
    assert torch.equal(scores, kept)
    assert (out[:, END] == float("-inf")).all()
    assert out[:2, WAIT].tolist() == [3.0, 3.0]
    others = [i for i in range(VOCAB_SIZE) if i not in (END, WAIT)]
    assert torch.equal(out[:, others], kept[:, others])


def test_neutral_settings(model):
    assert BudgetForcing(max_tokens=None, num_ignore=0).logits_processor(call(model)) is None


def prefix_oracle(num_ignore):
    """Build the method as a function of (prefix, scores) with a dictionary for memory."""

    class Oracle(LogitsProcessor):
        def __init__(self):
            self.prompt_len, self.replaced = None, {}

        def __call__(self, input_ids, scores):
            self.prompt_len = self.prompt_len or input_ids.shape[1]
            out = scores.clone()
            for row, ids in enumerate(input_ids.tolist()):
                start = range(self.prompt_len, len(ids))
                if END in ids[self.prompt_len :]:
                    continue
                used = sum(ids[j] == WAIT and self.replaced[tuple(ids[:j])] for j in start)
                ignoring = used < num_ignore
                wins = bool(scores[row, END] > scores[row, WAIT])
                self.replaced[tuple(ids)] = ignoring and wins
                if ignoring:
                    out[row, WAIT] = max(scores[row, END], scores[row, WAIT])
                    out[row, END] = float("-inf")
            return out

    return Oracle()


class Eager(LogitsProcessor):
    """Makes the model fond of ending and of waiting, by an amount that depends on the prefix."""

    def __call__(self, input_ids, scores):
        noise = (input_ids[:, -1] * 7 + input_ids[:, -2] * 13) % 11
        scores = scores.clone()
        scores[:, END] += 14 + noise
        scores[:, WAIT] += 26 - noise * 2
        return scores


@pytest.mark.parametrize("num_ignore", [1, 3])
def test_beam_search_remembers_by_prefix(model, num_ignore):
    inputs = prompt(5, rows=2)
    kwargs = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 16}
    ours = generate(model, [Eager(), processor(model, num_ignore=num_ignore)], inputs, **kwargs)
    want = generate(model, [Eager(), prefix_oracle(num_ignore)], inputs, **kwargs)
    assert torch.equal(ours.sequences, want.sequences)
    assert (ours.sequences[:, 5:] == WAIT).any() and (ours.sequences[:, 5:] == END).any()


@pytest.mark.parametrize("seed", range(6))
def test_assisted_decoding_is_token_identical(model, seed):
    """Drafts hold "Wait" and other tokens at places where the verified text differs."""
    ids = prompt(6, seed=seed)["input_ids"]
    ids[0, 3] = WAIT
    ids = ids.repeat(1, 4)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    num_ignore = 2
    greedy = generate(
        model, [Eager(), processor(model, num_ignore=num_ignore)], inputs, max_new_tokens=30
    )
    want = generate(model, [Eager(), prefix_oracle(num_ignore)], inputs, max_new_tokens=30)
    assisted = generate(
        model,
        [Eager(), processor(model, num_ignore=num_ignore)],
        inputs,
        max_new_tokens=30,
        prompt_lookup_num_tokens=3,
    )
    assert torch.equal(greedy.sequences, want.sequences)
    assert torch.equal(assisted.sequences, greedy.sequences)


def test_a_rejected_draft_does_not_blur_the_memory(model):
    """The draft guesses another token where "Wait" comes out in the end."""
    proc = processor(model)
    scores = torch.zeros(1, VOCAB_SIZE)
    scores[0, END] = 9.0
    before = torch.tensor([[1, 2, 3]])
    assert proc(before, scores)[0].argmax() == WAIT
    proc(torch.tensor([[1, 2, 3, 50]]), scores)  # verified, and rejected at once
    after = proc(torch.tensor([[1, 2, 3, WAIT]]), scores)
    assert after[0].argmax() == END  # the one replacement is spent


def test_an_unseen_prefix_counts_every_wait(model):
    proc = processor(model, num_ignore=2)
    scores = torch.zeros(2, VOCAB_SIZE)
    scores[:, END] = 9.0
    proc(torch.tensor([[1, 2], [1, 2]]), scores)
    out = proc(torch.tensor([[1, 2, WAIT, 4, WAIT], [1, 2, WAIT, 4, 5]]), scores)
    assert out.argmax(1).tolist() == [END, WAIT]

    proc = processor(model)
    likes_wait = scores[:1].clone()
    likes_wait[:, WAIT] = 10.0
    proc(torch.tensor([[1, 2]]), likes_wait)
    proc(torch.tensor([[1, 2, 4]]), likes_wait)
    out = proc(torch.tensor([[1, 2, WAIT, 5]]), scores[:1])  # continues no row of the latest call
    assert out.argmax() == END


def test_tokens_must_exist_and_differ(model):
    tokenizer = byte_tokenizer(["Wait"])
    with pytest.raises(TokenResolutionError, match="</think>"):
        BudgetForcing().token_ids(tokenizer, None)
    method = BudgetForcing(end_think="<end>", tokenizer=tokenizer)
    wait, end = method.token_ids(tokenizer, None)
    assert (tokenizer.decode(wait), tokenizer.decode(end)) == ("Wait", "<end>")
    with pytest.raises(TokenResolutionError, match="different"):
        processor(model, wait=END)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"num_ignore": -1}, "num_ignore"),
        ({"num_ignore": 1.0}, "num_ignore"),
        ({"wait": []}, "wait"),
    ],
    ids=str,
)
def test_bad_fields_are_value_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        BudgetForcing(**fields)
