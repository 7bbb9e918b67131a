"""Strict token resolution: one string, one token, or an error."""

from __future__ import annotations

import warnings

import pytest

from patchkit.decoding.cyclic_reflex import CyclicReflex
from patchkit.decoding.tokens import (
    PAPER_STRINGS,
    require_end_think,
    resolve_end_think,
    resolve_reflection_tokens,
    resolve_sequence,
)
from patchkit.errors import TokenResolutionError
from tests.decoding.helpers import (
    VOCAB_SIZE,
    byte_tokenizer,
    call,
    family,
    llama,
    word_tokenizer,
)

BPE_WORDS = ["wait", " wait", "Wait", " Wait", "but", "But", " but", "Alternatively"]


@pytest.fixture(scope="module")
def bpe():
    return byte_tokenizer(BPE_WORDS)


@pytest.fixture(scope="module")
def words():
    return word_tokenizer([*PAPER_STRINGS, "</think>"])


def test_paper_is_the_five_strings_without_space(bpe):
    ids = resolve_reflection_tokens("paper", bpe)
    assert [bpe.decode([i]) for i in ids] == list(PAPER_STRINGS)


def test_expanded_adds_space_and_case_variants_that_are_single_tokens(bpe):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # absent variants are no reason to warn
        ids = resolve_reflection_tokens("expanded", bpe)
    assert {bpe.decode([i]) for i in ids} == set(BPE_WORDS)
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("preset", ["paper", "expanded"])
def test_presets_warn_about_dropped_strings(preset):
    tokenizer = byte_tokenizer(["Wait", "But"])
    with pytest.warns(UserWarning, match=r"\['wait', 'but', 'Alternatively'\]"):
        ids = resolve_reflection_tokens(preset, tokenizer)
    assert [tokenizer.decode([i]) for i in ids] == ["Wait", "But"]


def test_missing_words_never_become_the_unknown_token():
    tokenizer = word_tokenizer(["But", "hello"])
    unknown = tokenizer.unk_token_id
    assert tokenizer.convert_tokens_to_ids("Wait") == unknown == 0  # the trap
    with pytest.warns(UserWarning, match="Wait"):
        assert resolve_reflection_tokens("paper", tokenizer) == (1,)
    assert resolve_end_think("auto", tokenizer) is None
    with pytest.raises(TokenResolutionError, match="'Wait'"):
        resolve_reflection_tokens(["But", "Wait"], tokenizer)
    with pytest.raises(TokenResolutionError, match="</think>"):
        resolve_end_think("</think>", tokenizer)


def test_an_empty_set_is_an_error():
    with pytest.warns(UserWarning), pytest.raises(TokenResolutionError, match="names no token"):
        resolve_reflection_tokens("paper", word_tokenizer(["hello"]))


def test_listed_strings_and_ids_mix_and_repeat_once(bpe):
    wait = bpe.encode("Wait")[0]
    assert resolve_reflection_tokens(["Wait", 3, wait, 3], bpe) == (wait, 3)


def test_a_string_of_several_tokens_is_refused(bpe):
    with pytest.raises(TokenResolutionError, match="However"):
        resolve_reflection_tokens(["However"], bpe)


@pytest.mark.parametrize("ids", [[VOCAB_SIZE], [-1]])
def test_ids_are_checked_against_the_vocabulary(ids):
    with pytest.raises(TokenResolutionError, match=r"\[0, 64\)"):
        resolve_reflection_tokens(ids, None, VOCAB_SIZE)
    with pytest.raises(TokenResolutionError, match=r"\[0, 64\)"):
        resolve_end_think(ids, None, VOCAB_SIZE)
    assert resolve_reflection_tokens([VOCAB_SIZE], None) == (VOCAB_SIZE,)  # size not known


@pytest.mark.parametrize("spec", ["papre", [], [1.5], [True]])
def test_malformed_reflection_specs_are_value_errors(spec, bpe):
    with pytest.raises(ValueError, match="reflection_tokens"):
        resolve_reflection_tokens(spec, bpe)


@pytest.mark.parametrize("spec", ["", [], ["a"], True, 1.5])
def test_malformed_sequences_are_errors(spec, bpe):
    with pytest.raises((ValueError, TypeError)):
        resolve_sequence("end_think", spec, bpe)


def test_end_think_forms(bpe, words):
    assert resolve_end_think(None, bpe) is None
    assert resolve_end_think("auto", words) == (6,)
    assert resolve_end_think("auto", bpe) is None  # several tokens: this model never learnt it
    assert resolve_end_think("auto", None) is None
    several = resolve_end_think("</think>", bpe)
    assert several is not None and len(several) == 8
    assert bpe.decode(several) == "</think>"
    assert resolve_end_think(5, None) == (5,)
    assert resolve_end_think([5, 6], None) == (5, 6)


def test_require_end_think_says_what_is_missing(bpe, words):
    assert require_end_think("auto", words) == (6,)
    with pytest.raises(TokenResolutionError, match="not one token"):
        require_end_think("auto", bpe)
    with pytest.raises(TokenResolutionError, match="no tokenizer"):
        require_end_think("auto", None)


def reflection(method, call):
    return method.logits_processor(call).constants["token_ids"]


def test_order_of_tokenizers(words, tmp_path):
    """Own field, then the call's, then the files beside the weights."""
    other = word_tokenizer(["pad", *PAPER_STRINGS])
    model = llama()
    own = CyclicReflex(tokenizer=words)
    assert reflection(own, call(model, other)) == (1, 2, 3, 4, 5)
    assert reflection(CyclicReflex(), call(model, other)) == (2, 3, 4, 5, 6)

    model.name_or_path = str(tmp_path)
    with pytest.raises(TokenResolutionError, match="pass tokenizer"):
        CyclicReflex().logits_processor(call(model))
    with pytest.raises(TokenResolutionError, match="pass tokenizer"):
        CyclicReflex().check(family(model))
    words.save_pretrained(tmp_path)
    assert reflection(CyclicReflex(), call(model)) == (1, 2, 3, 4, 5)
    CyclicReflex().check(family(model))


def test_ids_alone_need_no_tokenizer():
    model = llama()
    processor = CyclicReflex(reflection_tokens=(3, 4)).logits_processor(call(model))
    assert processor.constants["end_ids"] is None  # "auto" with nothing to look it up in
    CyclicReflex(reflection_tokens=(3, 4)).check(family(model))
    with pytest.raises(TokenResolutionError, match="pass tokenizer"):
        CyclicReflex(reflection_tokens=(3, 4), end_think="</think>").check(family(model))
    with pytest.raises(TokenResolutionError, match=r"\[64\]"):
        CyclicReflex(reflection_tokens=(3, 64)).check(family(model))
    with pytest.raises(TokenResolutionError, match=r"\[64\]"):
        CyclicReflex(reflection_tokens=(3, 64)).logits_processor(call(model))
