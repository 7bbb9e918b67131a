"""What KV eviction costs in quality: four measures on a real model, beside the dense cache.

    python examples/benchmarks/texts.py                 # once: real texts, see there
    python examples/benchmarks/bench_quality.py         # on a CUDA device, some minutes
    python examples/benchmarks/bench_quality.py --quick --methods Window   # on a CPU

SmolLM2-135M-Instruct reads a context, its cache is compressed, and only then does it see what is
asked: questions that are known beforehand are too easy for methods that look at attention. Every
method gets the same prompts, one batch of equally long contexts, and a budget in tokens per layer
and KV head. Questions about one context run on copies of one compressed cache. The measures:

- `recall NLL`: the first 24 tokens of a passage of the context are repeated after it; nats per
  token of the 56 that followed, teacher-forced. Passages at the depths `DEPTHS`.
- `needle hits`, `needle NLL`: each quarter of the context holds a paragraph `### CITY: 12345 ###`.
  The question repeats three of them and begins the fourth; each is the fourth once. A hit is a
  number whose five digits are all the most likely ones; NLL is nats per digit.
- `text NLL`, `text NLL over dense`: nats per token of the next 256 tokens of the text, fed in
  chunks of `--chunk` tokens, teacher-forced. The cache is cut back to its budget after each chunk,
  so within a chunk up to `--chunk - 1` tokens more are seen; `--chunk 1` is decoding proper, and
  slow. `over dense` is paired by context.
- `agreement`, `KL`: on those tokens, how often the most likely token is the dense cache's, and
  KL(dense || method) of the next-token distributions in nats.
- `tokens kept`: per layer and KV head, mean, after the context; `tokens at end` after the text.

p50 is the mean over contexts, not a median; p20 and p80 are the ends of its 95 % bootstrap interval
over contexts, for `needle hits` of Wilson's. A method that keeps more than its budget on average
breaks the contract (exit status 1). `dense` is patchkit without a method.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from bench_exactness import wilson
from harness import device_name, record
from texts import load_texts
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax
from transformers import PreTrainedModel

import patchkit
from patchkit import demo
from patchkit.compat import CACHE_KEYWORD

DENSE = "dense"
METHODS = (DENSE, "Window", "SnapKV", "PyramidKV", "AdaKV", "TOVA", "H2O", "CAKE")
DEPTHS = (0.3, 0.5, 0.7, 0.9)
CUE, ANSWER = 24, 56
QUARTERS, DIGITS = 4, 5
# Each is one token behind a space, so that the rows of a batch are equally long.
CITIES = (
    "Athens", "Berlin", "Boston", "Cairo", "Chicago", "Dallas", "Delhi", "Denver", "Dublin",
    "Geneva", "Houston", "Lima", "Lisbon", "London", "Madrid", "Miami", "Milan", "Moscow", "Munich",
    "Oslo", "Paris", "Prague", "Rome", "Sydney", "Tokyo", "Toronto", "Venice", "Vienna", "Warsaw",
)  # fmt: skip
METRICS = {
    "recall NLL": ("nats", "recall"),
    "needle hits": ("share", "hits"),
    "needle NLL": ("nats", "needle"),
    "text NLL": ("nats", "text"),
    "text NLL over dense": ("nats", "-dense"),
    "agreement": ("share", "agree"),
    "KL": ("nats", "KL"),
    "tokens kept": ("tokens", "kept"),
    "tokens at end": ("tokens", "at end"),
}
"""Unit of every metric and its heading in the table, in order."""


@dataclass
class Question:
    """What is fed behind a compressed context, one row per context.

    Attributes:
        ids: `[N, Q]` int64, the right answer included.
        scored: How many tokens at the end are the answer.
    """

    ids: Tensor
    scored: int

    def ask(self, model: PreTrainedModel, store: patchkit.KVStore) -> tuple[Tensor, Tensor]:
        """Return nats per token of the answer, `[N]`, and whether all its tokens are on top."""
        logits = forward(model, copy.deepcopy(store), self.ids[:, :-1], self.scored)
        answer = self.ids[:, -self.scored :]
        nll = cross_entropy(logits.transpose(1, 2), answer, reduction="none")
        return nll.mean(1), (logits.argmax(-1) == answer).all(1)


@dataclass
class Prompts:
    """All prompts of one context length.

    Attributes:
        prose: `[N, S]` int64, the beginnings of the texts.
        continuation: `[N, T + 1]`, what follows there.
        passages: About `prose`.
        haystack: `[N, S]`, prose with needles.
        needles: Questions about `haystack`.
    """

    prose: Tensor
    continuation: Tensor
    passages: list[Question]
    haystack: Tensor
    needles: list[Question]


def forward(
    model: PreTrainedModel, store: patchkit.KVStore, ids: Tensor, logits_to_keep: int
) -> Tensor:
    """Feed `ids [N, Q]` behind what `store` has seen; return the last logits in float32."""
    options = {CACHE_KEYWORD: store, "use_cache": True, "logits_to_keep": logits_to_keep}
    return model(input_ids=ids, **options).logits.float()


def build(tokenizer: Any, texts: list[str], length: int, scored: int, device: str) -> Prompts:
    """Make the prompts for contexts of `length` tokens.

    Raises:
        ValueError: a text is too short, or the last passage does not fit into the context.
    """
    if int(DEPTHS[-1] * length) + CUE + ANSWER > length:
        raise ValueError(f"a context of {length} tokens ends before the passage at {DEPTHS[-1]}")
    rows = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    if (shortest := min(map(len, rows))) <= length + scored:
        raise ValueError(
            f"expected texts of more than {length} + {scored} tokens, got one of {shortest}"
        )
    prose = torch.tensor([row[: length + scored + 1] for row in rows])
    paragraph = torch.tensor(tokenizer("\n\n")["input_ids"]).expand(len(rows), -1)
    passages = []
    for depth in DEPTHS:
        start = int(depth * length)
        passage = prose[:, start : start + CUE + ANSWER]
        passages.append(Question(torch.cat([paragraph, passage], 1).to(device), ANSWER))
    hidden = [_hide(tokenizer, row, length, index) for index, row in enumerate(rows)]
    asked = [torch.tensor(column) for column in zip(*(ask for _, ask in hidden), strict=True)]
    return Prompts(
        prose[:, :length].to(device),
        prose[:, length:].to(device),
        passages,
        torch.tensor([haystack for haystack, _ in hidden]).to(device),
        [Question(ids.to(device), DIGITS) for ids in asked],
    )


def _hide(
    tokenizer: Any, row: list[int], length: int, index: int
) -> tuple[list[int], list[list[int]]]:
    """Return a context of `length` tokens with a needle in each quarter, and the questions."""
    rng = random.Random(index)
    pairs = [
        (city, rng.randrange(10 ** (DIGITS - 1), 10**DIGITS)) for city in rng.sample(CITIES, 4)
    ]
    needles = [
        tokenizer(f"\n\n### {city}: {number} ###\n\n")["input_ids"] for city, number in pairs
    ]
    prose = row[: length - sum(map(len, needles))]
    stop = tokenizer.convert_tokens_to_ids(".")
    haystack: list[int] = []
    done = 0
    for quarter, needle in enumerate(needles):
        middle = (2 * quarter + 1) * len(prose) // (2 * QUARTERS)
        end = prose.index(stop, middle) + 1 if stop in prose[middle:] else middle
        haystack += prose[done:end] + needle
        done = end
    haystack += prose[done:]
    questions = []
    for asked in range(QUARTERS):
        order = [*(place for place in range(QUARTERS) if place != asked), asked]
        lines = [f"### {city}: {number} ###" for city, number in (pairs[place] for place in order)]
        text = "\n\n" + "\n\n".join(lines).removesuffix(" ###")
        questions.append(tokenizer(text)["input_ids"])
    return haystack, questions


class Text:
    """Scores of the continuation of the texts, and the dense logits to compare with.

    Args:
        ids: `[N, T + 1]` int64; the first token is fed but not scored.
        chunk: Tokens fed at a time.
    """

    def __init__(self, ids: Tensor, chunk: int) -> None:
        self.ids, self.chunk = ids, chunk
        self.dense: list[Tensor] = []
        self.dense_nll: Tensor | None = None

    def score(self, model: PreTrainedModel, store: patchkit.KVStore) -> dict[str, Tensor]:
        """Feed the continuation to `store`; return every metric as `[N]`, means over the tokens.

        The first call must be the dense cache's.
        """
        is_reference = self.dense_nll is None
        nll, agreement, divergence = [], [], []
        for place, start in enumerate(range(0, self.ids.shape[1] - 1, self.chunk)):
            end = min(start + self.chunk, self.ids.shape[1] - 1)
            logits = forward(model, store, self.ids[:, start:end], end - start)
            if is_reference:
                self.dense.append(logits.to(model.dtype))
            dense = self.dense[place].float()
            target = self.ids[:, start + 1 : end + 1]
            nll.append(cross_entropy(logits.transpose(1, 2), target, reduction="none"))
            agreement.append((logits.argmax(-1) == dense.argmax(-1)).float())
            theirs, ours = log_softmax(dense, -1), log_softmax(logits, -1)
            divergence.append((theirs.exp() * (theirs - ours)).sum(-1))
        loss = torch.cat(nll, 1).mean(1)
        if self.dense_nll is None:
            self.dense_nll = loss
        return {
            "text NLL": loss,
            "text NLL over dense": loss - self.dense_nll,
            "agreement": torch.cat(agreement, 1).mean(1),
            "KL": torch.cat(divergence, 1).mean(1),
        }


def tokens_held(store: patchkit.KVStore) -> Tensor:
    """Return the tokens per layer and KV head that each row holds, `[N]` float32."""
    return torch.stack([length.float().mean(1) for length in store.lengths()]).mean(0)


def measure(model: PreTrainedModel, prompts: Prompts, text: Text) -> dict[str, Tensor]:
    """Return every metric of the patched model, one figure per context: `[N]`, on the CPU."""
    store = patchkit.KVStore(model)
    forward(model, store, prompts.haystack, 1)
    answers = [question.ask(model, store) for question in prompts.needles]
    found = {
        "needle NLL": torch.stack([nll for nll, _ in answers]).mean(0),
        "needle hits": torch.stack([hit.float() for _, hit in answers]).mean(0),
    }
    del store
    store = patchkit.KVStore(model)
    forward(model, store, prompts.prose, 1)
    found["tokens kept"] = tokens_held(store)
    passages = [question.ask(model, store)[0] for question in prompts.passages]
    found["recall NLL"] = torch.stack(passages).mean(0)
    found |= text.score(model, store)
    found["tokens at end"] = tokens_held(store)
    return {name: values.cpu() for name, values in found.items()}


def interval(metric: str, values: Tensor, resamples: int = 2000) -> tuple[float, float, float]:
    """Return low end, mean and high end of a 95 % interval for the mean of `values [N]`."""
    if metric == "needle hits":
        total = len(values) * QUARTERS
        return wilson(round(values.sum().item() * QUARTERS), total)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (resamples, len(values)), generator=generator)
    low, high = values.double()[drawn].mean(1).quantile(torch.tensor([0.025, 0.975]).double())
    return low.item(), values.double().mean().item(), high.item()


def table(results: dict[tuple[int, int | None, str], dict[str, float]]) -> str:
    """Lay the means out: one line per length, budget and method."""
    headings = "".join(f"{heading:>9}" for _, heading in METRICS.values())
    lines = [f"{'length':>6} {'budget':>6}  {'method':<11}{headings}"]
    for (length, budget, method), means in results.items():
        figures = "".join(f"{means[metric]:>9.4g}" for metric in METRICS)
        lines.append(f"{length:>6} {budget or '-':>6}  {method:<11}{figures}")
    return "\n".join(lines)


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", type=int, default=None, help="default 16, one batch")
    parser.add_argument("--lengths", type=int, nargs="+", default=None, help="default 2048 4096")
    parser.add_argument("--budgets", type=int, nargs="+", default=None)
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD")
    parser.add_argument("--scored", type=int, default=None, help="tokens of text, default 256")
    parser.add_argument("--chunk", type=int, default=32, help="tokens of text fed at a time")
    parser.add_argument(
        "--quick", action="store_true", help="2 contexts of 1024 tokens, budgets 128 and 512"
    )
    args = parser.parse_args()
    quick = args.quick
    contexts = args.contexts or (2 if quick else 16)
    lengths = args.lengths or ([1024] if quick else [2048, 4096])
    budgets = args.budgets or ([128, 512] if quick else [128, 256, 512, 1024])
    scored = args.scored or (64 if quick else 256)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"on {device_name()}")
    model, tokenizer = demo.load(device=device)
    dtype = str(model.dtype).removeprefix("torch.")

    results: dict[tuple[int, int | None, str], dict[str, float]] = {}
    broken = []
    for length in lengths:
        prompts = build(tokenizer, load_texts(contexts), length, scored, device)
        text = Text(prompts.continuation, args.chunk)
        cases: list[tuple[str, int | None]] = [(DENSE, None)]
        cases += [(name, budget) for budget in budgets for name in args.methods if name != DENSE]
        for name, budget in cases:
            start = time.perf_counter()
            methods = [] if budget is None else [getattr(patchkit, name)(budget=budget)]
            with patchkit.patched(model, *methods):
                found = measure(model, prompts, text)
            seconds = time.perf_counter() - start
            shape = f"S{length} b{budget or length} N{contexts} +{scored}/{args.chunk}"
            config = f"smollm2 {shape} {dtype}"
            means = {}
            for metric, (unit, _) in METRICS.items():
                low, middle, high = interval(metric, found[metric])
                # The 20th, 50th and 80th percentile of these five are the three figures.
                record("quality", config, name, metric, unit, [low, low, middle, high, high])
                means[metric] = middle
            results[length, budget, name] = means
            print(f"{name} took {seconds:.1f} s", flush=True)
            kept = max(found["tokens kept"].tolist())
            if kept > (budget or length) + 1e-3:
                broken.append(f"{name} keeps {kept:g} tokens of {length}, allowed {budget}")
    print(f"\n{table(results)}\n")
    print("\n".join(f"BROKEN: {line}" for line in broken) or "the contract holds")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
