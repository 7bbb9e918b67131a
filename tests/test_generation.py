"""The extra keywords of generate(), and the caches it accepts."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    StaticCache,
    StoppingCriteria,
)
from transformers.generation.streamers import BaseStreamer

import patchkit
from patchkit import TIP, CyclicReflex, KVStore, Window
from patchkit.compat import CHUNKED_PREFILL_IGNORES_CACHE, find_cache
from patchkit.errors import (
    CacheError,
    MethodConflictError,
    SlotError,
    TokenResolutionError,
    UnknownMethodError,
    UnsupportedGenerationError,
)
from patchkit.testing import left_padded_batch, tiny_model

from .decoding.helpers import word_tokenizer
from .helpers import with_cache

IDS = torch.randint(1, 97, (1, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model():
    return patchkit.apply(tiny_model("llama"))


def generated(model, ids=IDS, new_tokens=10, **kwargs):
    return model.generate(
        ids, max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True, **kwargs
    )


@pytest.mark.parametrize(
    "value",
    [Window(budget=8), {"name": "window", "budget": 8}, {"name": "Window", "budget": 8}],
    ids=["config", "dict", "spelling"],
)
def test_slot_values_hold_for_one_call(model, value):
    plain = generated(model)
    out = generated(model, kv_eviction=value)
    assert out.past_key_values.eviction == Window(budget=8)
    assert max(int(n.max()) for n in out.past_key_values.lengths()) == 8
    assert not torch.equal(out.sequences, plain.sequences)
    after = generated(model)
    assert torch.equal(after.sequences, plain.sequences)
    assert after.past_key_values.eviction is None


def test_slot_by_name_takes_the_defaults(model):
    assert generated(model, kv_eviction="window").past_key_values.eviction == Window()


def test_slot_overrides_an_applied_method():
    model = patchkit.apply(tiny_model("llama"), Window(budget=8))
    assert generated(model).past_key_values.eviction == Window(budget=8)
    assert generated(model, kv_eviction=None).past_key_values.eviction is None
    changed = generated(model, kv_eviction={"num_sink_tokens": 2}).past_key_values
    assert changed.eviction == Window(budget=8, num_sink_tokens=2)
    assert generated(model).past_key_values.eviction == Window(budget=8)


def test_slot_is_reset_when_generate_fails(model):
    class Stop(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generated(model, kv_eviction=Window(budget=8), stopping_criteria=[Stop()])
    assert KVStore(model).eviction is None
    assert generated(model).past_key_values.eviction is None


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"kv_eviction": 8}, SlotError, "got int"),
        ({"kv_eviction": "windw"}, UnknownMethodError, "window"),
        ({"kv_eviction": {"budget": 8}}, SlotError, "no 'name'"),
        ({"kv_eviction": {"name": "window", "size": 8}}, SlotError, r"\['size'\].*budget"),
        ({"kv_eviction": {"name": "window", "budget": 2}}, ValueError, "exceed"),
        ({"kv_eviction": Window(budget=[9])}, ValueError, "2 layers"),
        ({"logit_schedule": "window"}, SlotError, "kv_eviction"),
        ({"kv_evictoin": Window()}, ValueError, "kv_evictoin"),
    ],
)
def test_bad_slot_values_change_nothing(model, kwargs, error, message):
    plain = generated(model).sequences
    with pytest.raises(error, match=message):
        generated(model, **kwargs)
    assert torch.equal(generated(model).sequences, plain)


def test_conflicts_declared_by_a_method(model, monkeypatch):
    monkeypatch.setattr(Window, "conflicts", ("logit_schedule",))
    tip = TIP(reflection_tokens=[3])
    with pytest.raises(MethodConflictError, match=r"tip.*window|window.*tip"):
        generated(model, kv_eviction="window", logit_schedule=tip)


def test_slots_combine_with_each_other_and_with_the_users_processors(model):
    seen = []

    def watch(input_ids, scores):
        seen.append(scores.clone())
        return scores

    wave = CyclicReflex(amplitude=50.0, period=8, reflection_tokens=[3])
    out = generated(
        model, kv_eviction=Window(budget=8), logit_schedule=wave, logits_processor=[watch]
    )
    assert len(seen) == 10
    assert out.past_key_values.eviction == Window(budget=8)
    assert 3 in out.sequences[0, 20:]
    positional = model.generate(
        IDS, None, [watch], max_new_tokens=10, do_sample=False, logit_schedule=wave,
        kv_eviction=Window(budget=8),
    )  # fmt: skip
    assert torch.equal(positional, out.sequences)
    assert len(seen) == 20


def test_tokenizer_of_the_call_resolves_the_tokens_of_a_slot(model):
    with pytest.raises(TokenResolutionError, match="tokenizer="):
        generated(model, logit_schedule="cyclic_reflex")
    tokenizer = word_tokenizer(["wait", "Wait", "but", "But", "Alternatively"])
    generated(model, logit_schedule="cyclic_reflex", tokenizer=tokenizer)
    assert sum(patchkit.report(model).calls["logit_wave"].values()) == 10


class Recorder(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_streamer_and_stopping_criteria(model):
    class AfterFour(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            done = input_ids.shape[1] >= IDS.shape[1] + 4
            return torch.full((input_ids.shape[0],), done, dtype=torch.bool)

    recorder = Recorder()
    out = generated(model, streamer=recorder, stopping_criteria=[AfterFour()])
    assert out.sequences.shape[1] == IDS.shape[1] + 4
    assert recorder.tokens == out.sequences[0].tolist()
    assert recorder.ended


def test_embeddings_as_input(model):
    embeds = model.get_input_embeddings()(IDS)
    out = model.generate(inputs_embeds=embeds, max_new_tokens=6, do_sample=False)
    assert torch.equal(out[0], generated(model, new_tokens=6).sequences[0, 20:])


def test_assistant_model_and_early_exit(model):
    plain = generated(model).sequences
    assistant = tiny_model("llama", seed=3)
    assert torch.equal(generated(model, assistant_model=assistant).sequences, plain)
    patchkit.apply(assistant)
    assert torch.equal(generated(model, assistant_model=assistant).sequences, plain)
    assert torch.equal(generated(model, assistant_early_exit=1).sequences, plain)


def test_sliding_window_layers_of_an_assistant_can_be_rolled_back():
    model, assistant = tiny_model("gemma3"), tiny_model("gemma3", seed=3)
    plain = generated(model, new_tokens=16).sequences
    patchkit.apply(model)
    patchkit.apply(assistant)
    out = generated(model, new_tokens=16, assistant_model=assistant)
    assert torch.equal(out.sequences, plain)


def test_custom_generate_callable_gets_the_store(model):
    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        return find_cache(kwargs)

    store = model.generate(IDS, custom_generate=loop, kv_eviction=Window(budget=8))
    assert isinstance(store, KVStore)
    assert store.eviction == Window(budget=8)


# -- caches ---------------------------------------------------------------------------------


def test_a_users_dynamic_cache_is_served(model):
    plain = generated(model).sequences
    cache = DynamicCache(config=model.config)
    out = generated(model, **with_cache(cache))
    assert torch.equal(out.sequences, plain)
    assert out.past_key_values is cache
    with pytest.raises(CacheError, match="KVStore"):
        generated(model, **with_cache(cache), kv_eviction="window")


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@torch.no_grad()
def test_the_older_name_of_the_cache_is_accepted(model):
    past = generated(model, kv_eviction="window").past_key_values
    ids = torch.cat([IDS, IDS], dim=1)
    with pytest.raises(CacheError, match="made for kv_eviction"):
        generated(model, ids, past_key_values=past, kv_eviction=Window(budget=9))
    store = KVStore(model)
    model(IDS, past_key_values=store)
    assert store.get_seq_length() == IDS.shape[1]


@pytest.mark.parametrize("implementation", ["static", "quantized", "offloaded", "paged"])
def test_cache_implementations_of_the_call_are_refused(model, implementation):
    with pytest.raises(CacheError, match=implementation):
        generated(model, cache_implementation=implementation)
    config = GenerationConfig(cache_implementation=implementation)
    with pytest.raises(CacheError, match=implementation):
        model.generate(IDS, generation_config=config)


def test_cache_implementation_of_the_checkpoint_is_replaced(model):
    model.generation_config.cache_implementation = "static"  # as Gemma 2 checkpoints ship it
    assert isinstance(generated(model).past_key_values, KVStore)
    assert model.generation_config.cache_implementation == "static"
    out = model.generate(IDS, generation_config=model.generation_config, max_new_tokens=3)
    assert out.shape == (1, 23)


def test_static_cache_is_refused(model):
    cache = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(CacheError, match="got StaticCache"):
        generated(model, **with_cache(cache))
    with torch.no_grad(), pytest.raises(CacheError, match="got StaticCache"):
        model(IDS, **with_cache(cache))


def test_store_of_another_model_is_refused(model):
    store = generated(model).past_key_values
    other = patchkit.apply(tiny_model("llama"))
    ids = torch.ones(1, 40, dtype=torch.long)
    columns = store.get_seq_length()
    with pytest.raises(CacheError, match="another model"):
        generated(other, ids, **with_cache(store))
    assert store.get_seq_length() == columns
    patchkit.restore(model)
    with torch.no_grad(), pytest.raises(CacheError, match="patched model"):
        model(IDS, **with_cache(store))


def test_store_of_another_batch_size_is_refused(model):
    store = generated(model).past_key_values
    ids = torch.ones(2, 40, dtype=torch.long)
    with pytest.raises(CacheError, match="1 rows, got an input of 2"):
        generated(model, ids, **with_cache(store))


def test_mask_that_misses_the_past_is_refused(model):
    store = generated(model).past_key_values
    mask = torch.ones(1, 3, dtype=torch.long)
    with torch.no_grad(), pytest.raises(CacheError, match="29 in the store, 3 new"):
        model(IDS[:, :3], attention_mask=mask, **with_cache(store))


def test_store_made_for_another_method_is_refused(model):
    store = generated(model, kv_eviction=Window(budget=8)).past_key_values
    ids = torch.ones(1, 40, dtype=torch.long)
    with pytest.raises(CacheError, match="made for"):
        generated(model, ids, **with_cache(store), kv_eviction=Window(budget=9))
    out = generated(model, ids, **with_cache(store))  # keeps its own policy
    assert out.past_key_values.lengths()[0].max() == 8


def test_store_continues_after_an_exception_only_when_reset(model):
    store = KVStore(model)
    broken = model.model.layers[1].register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory"))
    )
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="out of memory"):
            model(IDS, **with_cache(store))
        broken.remove()
        with pytest.raises(CacheError, match="did not finish"):
            model(IDS, **with_cache(store))
        store.reset()
        again = model(IDS, **with_cache(store)).logits
        torch.testing.assert_close(again, model(IDS).logits)


def test_use_cache_false(model):
    plain = generated(model).sequences
    assert torch.equal(generated(model, use_cache=False).sequences, plain)
    with pytest.raises(UnsupportedGenerationError, match="use_cache=False"):
        generated(model, use_cache=False, kv_eviction="window")


def test_gradients_through_the_store_are_refused(model):
    out = model(IDS)  # gradients on: transformers' own cache
    assert isinstance(out.past_key_values, DynamicCache)
    with pytest.raises(CacheError, match="no gradients"):
        model(IDS, **with_cache(KVStore(model)))


def test_output_attentions_is_refused_by_name(model):
    with pytest.raises(UnsupportedGenerationError, match="output_attentions"), torch.no_grad():
        model(IDS, output_attentions=True)


def test_chunked_prefill_over_a_filled_store(model):
    first = generated(model, new_tokens=5)
    ids = torch.cat([first.sequences, IDS[:, :7]], dim=1)
    if CHUNKED_PREFILL_IGNORES_CACHE:
        with pytest.raises(UnsupportedGenerationError, match="5.23"):
            generated(model, ids, **with_cache(first.past_key_values), prefill_chunk_size=3)
        return
    plain = generated(model, ids).sequences
    out = generated(model, ids, **with_cache(first.past_key_values), prefill_chunk_size=3)
    assert torch.equal(out.sequences, plain)


# -- the store as a transformers cache ---------------------------------------------------------


@torch.no_grad()
def test_four_dimensional_masks_are_masks_over_columns(model):
    """Tree verification: a prefix, then sibling branches under an explicit mask."""
    batch = left_padded_batch(97, [12, 9])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    tree = torch.tensor([[7, 21, 33, 40]] * 2)  # 21 and 33 both follow 7; 40 follows 33
    parents = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]).bool()
    positions = mask.long().cumsum(-1).sub(1).clamp(min=0)
    depth = positions[:, -1:] + torch.tensor([[1, 2, 2, 3]])
    past = model(ids, attention_mask=mask, position_ids=positions).past_key_values
    full = torch.cat([mask.bool()[:, None].expand(-1, 4, -1), parents.expand(2, -1, -1)], -1)
    got = model(tree, attention_mask=full[:, None], position_ids=depth, **with_cache(past)).logits
    for branch in ([0, 1], [0, 2, 3]):
        line = torch.cat([ids, tree[:, branch]], 1)
        line_mask = torch.cat([mask, mask.new_ones(2, len(branch))], 1)
        line_positions = line_mask.cumsum(-1).sub(1).clamp(min=0)
        want = model(
            line, attention_mask=line_mask, position_ids=line_positions, use_cache=False
        ).logits
        torch.testing.assert_close(got[:, branch[-1]], want[:, -1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_crop_repeat_select_and_reset(family):
    model = patchkit.apply(tiny_model(family))
    ids = torch.randint(1, 97, (2, 20), generator=torch.Generator().manual_seed(2))
    store = KVStore(model)
    store.activate_past_recording()
    model(ids, **with_cache(store))
    model(ids[:, :5], **with_cache(store))
    store.crop(-5)
    assert store.get_seq_length() == 20
    store.batch_repeat_interleave(2)
    store.reorder_cache(torch.tensor([3, 2, 1, 0]))
    store.batch_select_indices(torch.tensor([1, 2]))  # rows 1 and 0 of the original
    tail = ids[:, 5:11]
    got = model(tail, **with_cache(store)).logits
    want = model(torch.cat([ids[[1, 0]], tail], 1), use_cache=False).logits[:, 20:]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    with pytest.raises(CacheError, match="<= 0, got 3"):
        store.crop(3)
    store.reset()
    assert store.nbytes == 0
    torch.testing.assert_close(model(ids, **with_cache(store)).logits, model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("window", [None, Window(budget=7)])
def test_rows_of_different_length_are_reordered_with_their_bookkeeping(window):
    batch = left_padded_batch(97, [12, 5])
    order, token = torch.tensor([1, 0]), torch.tensor([[7], [9]])
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
    positions = batch["attention_mask"].sum(-1, keepdim=True)
    logits = []
    with patchkit.patched(tiny_model("llama"), *([window] if window else [])) as model:
        for reorder in (False, True):
            store = KVStore(model)
            first = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            model(**batch, position_ids=first, **with_cache(store))
            rows = order if reorder else torch.tensor([0, 1])
            if reorder:
                store.reorder_cache(order)
            out = model(
                token[rows], attention_mask=mask[rows], position_ids=positions[rows],
                **with_cache(store),
            )  # fmt: skip
            logits.append(out.logits)
    torch.testing.assert_close(logits[1], logits[0][order])


@torch.no_grad()
def test_crop_empties_the_slots(model):
    store = KVStore(model)
    model(IDS, **with_cache(store))
    store.crop(-6)
    for layer in store.layers:
        assert layer.length.eq(14).all()
        assert layer.position[:, :, :14].eq(torch.arange(14)).all()
        assert layer.position[:, :, 14:].eq(-1).all()


@torch.no_grad()
def test_addresses_stay_between_decoding_steps(model):
    store = KVStore(model)
    model(IDS, **with_cache(store))
    layer = store.layers[0]
    before = {name: t.data_ptr() for name, t in layer.tensors().items()}
    for token in range(100):
        model(IDS[:, :1] + token % 7, **with_cache(store))
    assert {name: t.data_ptr() for name, t in layer.tensors().items()} == before
    assert layer.capacity == 256
    for _ in range(160):
        model(IDS[:, :1], **with_cache(store))
    assert layer.capacity == 512
    assert layer.length.eq(280).all()


@torch.no_grad()
def test_padding_is_not_stored(model):
    batch = left_padded_batch(97, [12, 9, 4])
    store = model(**batch).past_key_values
    assert store.get_seq_length() == 12
    for length in store.lengths():
        assert length.tolist() == [[12, 12], [9, 9], [4, 4]]


def test_pretrained_folder_round_trip(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert "patchkit" not in (tmp_path / "config.json").read_text()
    assert "patchkit" not in (tmp_path / "generation_config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.generate(IDS, max_new_tokens=10, do_sample=False)[0],
                       generated(model).sequences[0])  # fmt: skip
