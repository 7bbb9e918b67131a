"""Chat for many turns over one KV store of fixed size.

Run: python examples/long_chat.py [--turns 20] [--method Window] [--budget 192]

Every turn passes the whole conversation and the same store to `generate()`, which feeds only what
the store has not seen. "dense" is what the keys and values of all tokens seen would take.
"""

from __future__ import annotations

import argparse
import textwrap

import torch

import patchkit
from patchkit import demo
from patchkit.compat import CACHE_KEYWORD

MESSAGES = (
    "Who wrote Hamlet?",
    "What is a compass for?",
    "Name a bright star.",
    "Why is the sea salty?",
    "What makes the tides?",
    "How deep is the ocean?",
    "What is the capital of Peru?",
    "Name three kinds of trees.",
    "What is a lighthouse for?",
    "Which whale is the largest?",
    "What do seagulls eat?",
    "Why do ships float?",
    "What is glass made of?",
    "Name a famous explorer.",
    "What is a coral reef?",
    "Where is Cape Horn?",
    "How do fish breathe?",
    "What is a monsoon?",
    "Name two large cities in Europe.",
    "What is a volcano?",
)
REPLY_TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=len(MESSAGES))
    parser.add_argument("--method", default="H2O")
    parser.add_argument("--budget", type=int, default=192, help="tokens per layer and KV head")
    args = parser.parse_args()
    model, tokenizer = demo.load()
    patchkit.apply(model, getattr(patchkit, args.method)(budget=args.budget))
    store = patchkit.KVStore(model)
    options = {"max_new_tokens": REPLY_TOKENS, "do_sample": False, CACHE_KEYWORD: store}

    print(f"{args.method}, at most {args.budget} tokens per layer and KV head\n")
    print(f"{'turn':>4}{'seen':>7}{'stored':>8}{'KV MB':>8}{'dense':>8}  message and reply")
    ids = torch.empty(1, 0, dtype=torch.long, device=model.device)
    for turn in range(1, args.turns + 1):
        message = MESSAGES[(turn - 1) % len(MESSAGES)]
        text = f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n"
        if turn > 1:  # ends the reply, which was cut or has ended itself
            text = f"<|im_end|>\n{text}"
            if ids[0, -1] == tokenizer.eos_token_id:
                ids = ids[:, :-1]
        new = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
        prompt = torch.cat([ids, new], 1)
        ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)

        reply = tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)
        seen, stored = store.get_seq_length(), max(int(n.max()) for n in store.lengths())
        sizes = f"{store.nbytes / 1e6:>8.1f}{store.dense_bytes / 1e6:>8.1f}"
        line = textwrap.shorten(f"{message} > {reply}", width=72, placeholder=" ...")
        print(f"{turn:>4}{seen:>7}{stored:>8}{sizes}  {line}", flush=True)
    patchkit.restore(model)


if __name__ == "__main__":
    main()
