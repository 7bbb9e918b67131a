"""The tiny models are what tests rely on: really random, really varied, the same every time."""

from __future__ import annotations

import pytest
import torch

from patchkit.testing import (
    FAMILIES,
    left_padded_batch,
    reference_attention,
    tiny_model,
    tiny_tokenizer,
)

SLIDING = ("gemma2", "gemma3", "gpt_oss")


def prompts(batch_size=4, seq_len=24):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(1, 97, (batch_size, seq_len), generator=generator)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return tiny_model(family, attn_implementation=reference_attention(family))


def test_no_parameter_is_neutral(model):
    for name, parameter in model.named_parameters():
        assert not parameter.is_meta
        assert parameter.std() > 0.05, f"{name} is constant"
    assert not model.training
    assert model.dtype == torch.float32


@torch.no_grad()
def test_logits_vary_over_tokens_and_positions(model):
    logits = model(prompts()).logits
    assert logits.shape == (4, 24, 97)
    assert logits.std(dim=-1).min() > 0.5
    assert logits.std(dim=1).mean() > 0.5


def test_greedy_continuations_differ_and_are_not_loops_of_one_token(model):
    new = model.generate(prompts(), max_new_tokens=24, do_sample=False)[:, 24:]
    assert new.shape == (4, 24)  # nothing stopped early
    assert len({tuple(row) for row in new.tolist()}) == 4
    assert len(new.unique()) >= 20


def test_order_of_tokens_matters(model):
    """A model that ignored positions would pass many tests of a cache."""
    ids = prompts()
    swapped = ids.clone()
    swapped[:, [2, 3]] = ids[:, [3, 2]]
    with torch.no_grad():
        difference = (model(ids).logits - model(swapped).logits)[:, -1].abs().max()
    assert difference > 1e-3


def test_same_seed_same_weights_and_other_seed_other_weights(family):
    torch.manual_seed(1)
    first = tiny_model(family, seed=7).state_dict()
    torch.manual_seed(2)
    second = tiny_model(family, seed=7).state_dict()
    other = tiny_model(family, seed=8).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    changed = [name for name in first if not torch.equal(first[name], other[name])]
    assert len(changed) == len(dict(tiny_model(family).named_parameters()))


def test_global_generator_is_left_alone(family):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    tiny_model(family)
    assert torch.equal(torch.rand(4), expected)


def test_half_precision_rounds_the_same_weights():
    full = tiny_model("llama")
    half = tiny_model("llama", dtype=torch.bfloat16)
    pairs = zip(full.named_parameters(), half.parameters(), strict=True)
    for (name, parameter), rounded in pairs:
        if "norm" not in name:  # norm weights are rounded before the noise is added
            assert torch.equal(parameter.bfloat16(), rounded)
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("family", SLIDING)
def test_sliding_layers_alternate_and_the_window_is_short(family):
    config = tiny_model(family).config
    assert config.layer_types == ["sliding_attention", "full_attention"] * 2
    assert config.sliding_window == 8
    assert tiny_model(family, num_hidden_layers=3).config.layer_types[2] == "sliding_attention"


@pytest.mark.parametrize(
    ("family", "neutral"),
    [
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"sliding_window": 500}),
        ("gpt_oss", {"sliding_window": 500}),
    ],
)
@torch.no_grad()
def test_what_a_family_is_in_the_list_for_matters(family, neutral):
    """Soft-caps and windows of the same weights change the logits clearly."""
    plain = tiny_model(family, attn_implementation="eager")(prompts()).logits
    without = tiny_model(family, attn_implementation="eager", **neutral)(prompts()).logits
    assert (plain - without).abs().max() > 0.1


@torch.no_grad()
def test_sinks_matter():
    model = tiny_model("gpt_oss", attn_implementation="eager")
    plain = model(prompts()).logits
    for layer in model.model.layers:
        layer.self_attn.sinks.fill_(-1e4)
    assert (plain - model(prompts()).logits).abs().max() > 0.1


def test_overrides_reach_the_config_and_unknown_ones_are_refused():
    assert tiny_model("mixtral", num_experts_per_tok=1).config.num_experts_per_tok == 1
    assert tiny_model("mistral", sliding_window=8).config.sliding_window == 8
    with pytest.raises(ValueError, match=r"MistralConfig has no field \['sliding_windows'\]"):
        tiny_model("mistral", sliding_windows=8)


def test_unknown_families_are_refused():
    with pytest.raises(ValueError, match="family must be one of .*'llama'.*got 'lama'"):
        tiny_model("lama")
    with pytest.raises(ValueError, match="got 'lama'"):
        reference_attention("lama")


def test_left_padded_batch():
    batch = left_padded_batch(11, [3, 5, 1], pad_token_id=4, seed=2)
    assert batch["input_ids"].shape == (3, 5)
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1] * 5, [0, 0, 0, 0, 1]]
    padding = batch["attention_mask"] == 0
    assert (batch["input_ids"] == 4).equal(padding)
    many = left_padded_batch(11, [500], pad_token_id=4)["input_ids"]
    assert sorted(many.unique().tolist()) == [t for t in range(11) if t != 4]
    again = left_padded_batch(11, [3, 5, 1], pad_token_id=4, seed=2)["input_ids"]
    assert torch.equal(again, batch["input_ids"])
    with pytest.raises(ValueError, match="lengths must be positive"):
        left_padded_batch(11, [3, 0])


def test_tiny_tokenizer_covers_the_tiny_vocabulary():
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) == 97
    ids = tokenizer("Once, upon 2 times!")["input_ids"]
    assert tokenizer.decode(ids) == "Once, upon 2 times!"
    assert len(ids) == 19
    assert tokenizer("é")["input_ids"] == [tokenizer.unk_token_id]
