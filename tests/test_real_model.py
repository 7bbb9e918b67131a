"""SmolLM2-135M-Instruct, real weights: exact text, and a bounded cache over 4,000 tokens."""

from __future__ import annotations

import pytest
import torch

import patchkit
from patchkit import KVStore, Window, demo

from .helpers import with_cache

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(not demo.is_cached(), reason="the demo model is not in the cache"),
]

PROMPTS = [
    "Give me three reasons to read the source code of other people.",
    "What is the capital of France?",
    "Write a haiku about autumn rain.",
    "Explain recursion to a child.",
    "How many legs does a spider have, and why do people ask?",
    "Translate 'good morning' into Spanish, French and German.",
    "List five uses of a paper clip.",
    "Why is the sky blue?",
    "Write a Python function that reverses a string.",
    "Who wrote Romeo and Juliet?",
    "What should I pack for a week in Iceland?",
    "Summarise the water cycle in two sentences.",
    "Is 91 a prime number? Think step by step.",
    "Tell me a joke about computers.",
    "What does HTTP status 404 mean?",
    "Describe the taste of a lemon.",
    "Compare cats and dogs as pets.",
    "What happened in 1969 on the Moon?",
    "Suggest a name for a bakery.",
    "How do I boil an egg?",
]


@pytest.fixture(scope="module")
def smollm2():
    model, tokenizer = demo.load(dtype=torch.float32, device="cpu")
    yield model, tokenizer
    patchkit.restore(model)


def test_dense_text_is_identical_on_20_prompts(smollm2):
    model, tokenizer = smollm2
    tokenizer.padding_side = "left"
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        for prompt in PROMPTS
    ]
    batches = [texts[:8], texts[8:16], *([text] for text in texts[16:])]

    def answers():
        out = []
        for batch in batches:
            inputs = tokenizer(batch, return_tensors="pt", padding=len(batch) > 1)
            tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)
            out += tokenizer.batch_decode(tokens)
        return out

    plain = answers()
    with patchkit.patched(model):
        patched = answers()
    assert patched == plain
    assert len(set(plain)) == len(PROMPTS)


@torch.no_grad()
def test_window_holds_the_bytes_constant_over_4000_tokens(smollm2):
    model, tokenizer = smollm2
    text = "The committee read the report twice, and each reader marked another passage. " * 400
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :3900]
    assert ids.shape[1] == 3900
    per_layer = 2 * 3 * 64 * 4  # keys and values, KV heads, head size, bytes per number
    with patchkit.patched(model, Window(budget=1024)):
        store = KVStore(model)
        sizes = []
        for chunk in ids.split(600, dim=1):
            logits = model(chunk, **with_cache(store), logits_to_keep=1).logits
            sizes.append(store.nbytes)
        for _ in range(100):
            logits = model(logits.argmax(-1), **with_cache(store)).logits
            sizes.append(store.nbytes)
    assert store.get_seq_length() == 4000
    assert all(length.eq(1024).all() for length in store.lengths())
    assert len(set(sizes[1:])) == 1
    # 1,280 slots: the budget, the token of the step, rounded up to a bucket of 256.
    assert sizes[-1] < 30 * 1280 * (per_layer + 3 * 4) * 1.01
    assert logits.isfinite().all()
