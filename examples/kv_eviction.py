"""Read a long prompt, keep a part of its KV cache, then ask: dense, and every eviction method.

Run: python examples/kv_eviction.py [--tokens 896] [--budgets 256 640]

The prompt is a chapter of Python's manual with a fact hidden in each quarter. The cache is
compressed before the question is known. The question shows three of the facts and begins the
fourth, because the model is SmolLM2-135M, which answers nothing harder reliably. One question says
little about a method: examples/benchmarks/bench_quality.py asks many.
"""

from __future__ import annotations

import argparse
import copy
from pydoc_data.topics import topics

import torch
from torch.nn.functional import cross_entropy

import patchkit
from patchkit import demo
from patchkit.compat import CACHE_KEYWORD

FACTS = {"Lisbon": "48213", "Oslo": "90571", "Cairo": "27364", "Denver": "61859"}
ASKED = "Oslo"


def build(tokenizer, tokens: int):
    """Return the prompt, the question and its answer, each `[1, length]`."""

    def encode(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    lines = {city: f"### {city}: {number} ###" for city, number in FACTS.items()}
    facts = [encode(f"\n\n{line}\n\n") for line in lines.values()]
    manual = encode(topics["execmodel"])[: tokens - sum(map(len, facts))]
    context, quarter = [], len(manual) // len(facts)
    for place, fact in enumerate(facts):
        text = manual[place * quarter : (place + 1) * quarter]
        context += text[: quarter // 2] + fact + text[quarter // 2 :]
    shown = [line for city, line in lines.items() if city != ASKED]
    question = encode("\n\n" + "\n\n".join([*shown, f"### {ASKED}: "]))
    return [torch.tensor([ids]) for ids in (context, question, encode(FACTS[ASKED]))]


@torch.no_grad()
def ask(model, context, question, answer):
    """Return the generated ids, nats per token of the right answer, KV bytes and tokens kept."""
    store = patchkit.KVStore(model)
    model(context, logits_to_keep=1, **{CACHE_KEYWORD: store})  # compressed when this returns
    nbytes, kept = store.nbytes, torch.stack(store.lengths()).float().mean().item()

    copied = copy.deepcopy(store)
    ids = torch.cat([question, answer[:, :-1]], 1)
    length = answer.shape[1]
    logits = model(ids, logits_to_keep=length, **{CACHE_KEYWORD: copied}).logits
    nll = cross_entropy(logits[0].float(), answer[0]).item()

    prompt = torch.cat([context, question], 1)  # what the store has seen is not fed again
    options = {"max_new_tokens": length, "do_sample": False, CACHE_KEYWORD: store}
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    return out[0, prompt.shape[1] :], nll, nbytes, kept


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=896, help="of the prompt")
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 640])
    args = parser.parse_args()
    model, tokenizer = demo.load()
    prompts = [ids.to(model.device) for ids in build(tokenizer, args.tokens)]
    methods = [row.config for row in patchkit.methods() if "kv_eviction" in row.slots]

    print(f"{prompts[0].shape[1]} tokens; the number of {ASKED} is {FACTS[ASKED]}\n")
    print(f"{'method':<12}{'budget':>7}{'tokens kept':>13}{'KV MB':>8}{'NLL':>8}  answer")
    for name, budget in [("dense", None), *((name, b) for b in args.budgets for name in methods)]:
        chosen = [] if budget is None else [getattr(patchkit, name)(budget=budget)]
        with patchkit.patched(model, *chosen):
            ids, nll, nbytes, kept = ask(model, *prompts)
        text = " ".join(tokenizer.decode(ids).split())
        size = f"{kept:>13.0f}{nbytes / 1e6:>8.1f}{nll:>8.3f}"
        print(f"{name:<12}{budget or '-':>7}{size}  {text}", flush=True)
    print("\nNLL: nats per digit of the right number.")


if __name__ == "__main__":
    main()
