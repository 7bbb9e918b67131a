"""Steer how often a model says "Wait" and "But": CyclicReflex, TIP and plain decoding.

Run: python examples/cyclic_reflex.py

The model is SmolLM2-135M, which was never trained to reason: asked to argue with itself it gets
stuck saying "wait". The wave is far stronger here than the authors' so that it shows in a short
text. Look at where the words fall, not at the answers.
"""

from __future__ import annotations

import textwrap

import torch

import patchkit
from patchkit import demo
from patchkit.decoding.reference import wave
from patchkit.decoding.tokens import resolve_reflection_tokens

QUESTION = (
    "Argue with yourself about whether 91 is a prime number. "
    "Start every other sentence with 'But' or 'Wait'."
)
AMPLITUDE, PERIOD, NEW_TOKENS = 6.0, 40, 60


def plot(amplitude: float, period: int, num_tokens: int, height: int = 7) -> str:
    """Draw the wave, one column per token."""
    levels = (wave(torch.arange(num_tokens), amplitude, period) / amplitude * (height // 2)).round()
    rows = []
    for level in range(height // 2, -height // 2, -1):
        line = "".join("*" if at == level else "-" if level == 0 else " " for at in levels.tolist())
        rows.append(f"{level / (height // 2) * amplitude:+6.1f} |{line}")
    return "\n".join(rows)


def main() -> None:
    """Print the wave and three continuations of one prompt."""
    model, tokenizer = demo.load()
    chat = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    words = resolve_reflection_tokens("expanded", tokenizer)
    common = {"reflection_tokens": words, "tokenizer": tokenizer}
    schedules = {
        "plain": None,
        "CyclicReflex": patchkit.CyclicReflex(amplitude=AMPLITUDE, period=PERIOD, **common),
        "TIP": patchkit.TIP(delta=-AMPLITUDE, **common),
    }

    print(f"Bias on {tokenizer.batch_decode([[i] for i in words])}, per generated token:")
    print(plot(AMPLITUDE, PERIOD, NEW_TOKENS))

    patchkit.apply(model)  # no method yet: each call below brings its own
    for name, schedule in schedules.items():
        out = model.generate(
            **inputs, logit_schedule=schedule, max_new_tokens=NEW_TOKENS, do_sample=False
        )
        generated = out[0, inputs["input_ids"].shape[1] :]
        at = torch.isin(generated.cpu(), torch.tensor(words)).nonzero().flatten().tolist()
        text = tokenizer.decode(generated, skip_special_tokens=True)
        print(f"\n{name}: {len(at)} reflection tokens, as generated token {at}")
        print(textwrap.fill(text, width=96, initial_indent="  ", subsequent_indent="  "))
    patchkit.restore(model)


if __name__ == "__main__":
    main()
