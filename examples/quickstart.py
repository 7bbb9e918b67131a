"""Patch a real model in place, look at what changed, bound its KV cache for one call, undo it.

With the demo extra installed (`pip install -e ".[demo]"`), run `python examples/quickstart.py`.
"""

from __future__ import annotations

import patchkit
from patchkit import Window, demo

PROMPT = "Give me three reasons to read the source code of other people."


def main() -> None:
    model, tokenizer = demo.load()
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    ).to(model.device)

    def answer(**kwargs):
        out = model.generate(**inputs, max_new_tokens=60, do_sample=False, **kwargs)
        return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    plain = answer()

    patchkit.apply(model)  # in place; the answers stay the same
    patched = answer()
    print(f"unpatched: {plain}\n")
    print(f"patched:   {patched}\n")
    print(f"identical: {patched == plain}\n")
    print(patchkit.report(model), "\n")

    # A method for one call: at most 48 tokens per layer and KV head stay in the cache.
    bounded = answer(kv_eviction=Window(budget=48))
    print(f"with a KV cache of 48 tokens: {bounded}\n")

    patchkit.restore(model)
    print(patchkit.report(model))


if __name__ == "__main__":
    main()
