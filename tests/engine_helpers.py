"""What tests of the decoding loop share: a model, batches, and calls without and with patchkit."""

from __future__ import annotations

import pytest
import torch

import patchkit
from patchkit import engine
from patchkit.testing import left_padded_batch, tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = 97


@pytest.fixture(autouse=True)
def served_devices(monkeypatch):
    """Let the loop serve the CPU too, where a user gets transformers' own, and reuse its store."""
    monkeypatch.setattr(engine, "_DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(engine, "_parking_bytes", lambda store: 1 << 30)


def build(**overrides):
    return tiny_model("llama", **overrides).to(DEVICE)


def batch_of(lengths=(9, 4, 7)):
    batch = left_padded_batch(VOCAB, list(lengths))
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def both(model, *methods, steps=True, **kwargs):
    """Generate without and with patchkit, from the same seed; `steps`: more than one token."""
    outputs = []
    for patched in (False, True):
        torch.manual_seed(7)
        if patched:
            patchkit.apply(model, *methods)
        outputs.append(
            model.generate(
                **{"max_new_tokens": 24, "pad_token_id": 0, "return_dict_in_generate": True}
                | kwargs
            )
        )
    report = patchkit.report(model)
    assert (sum(report.steps.values()) > 0 or not steps) and not report.host_loops
    patchkit.restore(model)
    return outputs


def tokens_that_end(model, count):
    """Pick end tokens such that the rows of the batch finish at different steps."""
    plain = model.generate(**batch_of(), max_new_tokens=24, do_sample=False, pad_token_id=0)
    rows = plain[:, 9:].tolist()
    return [row[5 + 4 * index] for index, row in enumerate(rows[:count])]
