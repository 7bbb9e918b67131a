"""How exact is exact: greedy tokens and logits in half precision, patchkit beside transformers.

    python examples/benchmarks/prompts.py               # once: real prompts, see there
    python examples/benchmarks/bench_exactness.py       # on a CUDA device
    python examples/benchmarks/bench_exactness.py --prompts 2 --new-tokens 4 --batch-size 2
    python examples/benchmarks/bench_exactness.py --model gemma3-270m --batch-size 50

SmolLM2-135M-Instruct, or another bundled model, answers real prompts greedily, with the end token
barred so that each gives the same number of comparisons. Three providers see identical left-padded
batches: transformers with sdpa, which is the reference; transformers with eager attention, which
shows how often two correct attentions part company; and patchkit. It also answers the first
`--alone` prompts of every batch one by one, where its steps use other kernels. The rows:

- `diverging prompts`: share of prompts with any token unlike the reference's. Here p20, p50 and p80
  are not percentiles: they hold the low end, the point and the high end of Wilson's 95 % interval.
- `gap`: at the first divergence of a prompt both runs have seen the same tokens. It is the
  reference's own logit of its token less that of the other token, in the logits that its run really
  chose from. `largest gap` and `median gap` are over all diverging prompts.
- `logit error max` and `logit error p99.9`: |half precision - float32| over all logits of the first
  `--error-prompts` prompts. Each provider decodes the reference's tokens one at a time over a cache
  of its own. The float32 model has the same, already rounded weights and sees each sequence at
  once, so what is measured is arithmetic alone.

The contract, checked at the end (exit status 1 if broken): patchkit's logit errors are at most
twice those of sdpa, and it diverges only at near ties, where the gap is at most twice sdpa's
largest logit error. On a CUDA device the tokens must also have come from patchkit's decode kernel
and its recorded steps: transformers compared with itself would pass the rest.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from harness import device_name, record
from prompts import encode, load_prompts
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import patchkit
from patchkit import bundled, demo
from patchkit.compat import CACHE_KEYWORD

SDPA, EAGER, OURS = "transformers sdpa", "transformers eager", "patchkit"
ALONE = "patchkit, row by row"
FACTOR = 2.0


@dataclass
class Findings:
    """What the run has found so far.

    Attributes:
        prompts: Answered by each provider.
        gaps: Those of all diverging prompts, by provider.
        errors: Of the logits, by provider.
        unused: What patchkit should have used on a GPU and has not.
    """

    prompts: Counter[str] = field(default_factory=Counter)
    gaps: dict[str, list[float]] = field(default_factory=lambda: {EAGER: [], OURS: [], ALONE: []})
    errors: dict[str, ErrorScale] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)

    def broken(self) -> list[str]:
        """Say what of the contract does not hold."""
        theirs, ours = self.errors[SDPA], self.errors[OURS]
        p999 = [scale.percentile(0.999) for scale in (ours, theirs)]
        figures = [
            ("largest logit error", ours.largest, theirs.largest),
            ("99.9th percentile of the logit errors", *p999),
            *(
                (f"largest gap, {who}", max(self.gaps[who], default=0), theirs.largest)
                for who in (OURS, ALONE)
            ),
        ]
        return self.unused + [
            f"{name}: {figure:.4g}, allowed {FACTOR:g} x {scale:.4g}"
            for name, figure, scale in figures
            if not figure <= FACTOR * scale  # a NaN breaks it too
        ]

    def look_at(self, report: patchkit.PatchReport, replays: bool) -> None:
        """Note what patchkit has used on a GPU."""
        print(f"{report}\n", flush=True)
        if set(report.calls.get("decode_attention", ())) != {"triton"}:
            self.unused.append(f"the decode kernel was not used: {report.calls}")
        if replays and not report.steps["replayed"]:
            why = report.unrecorded or list(report.host_loops)
            self.unused.append(f"no step was replayed: {why}")


@contextmanager
def transformers_with(model: PreTrainedModel, attention: str) -> Iterator[None]:
    """Run `model` unpatched, with this attention, for the length of the block."""
    before = model.config._attn_implementation
    model.set_attn_implementation(attention)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def answer(model: PreTrainedModel, inputs: Any, new_tokens: int, **options: Any) -> Any:
    """Generate exactly `new_tokens` greedy tokens per row."""
    return model.generate(
        **inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False,
        return_dict_in_generate=True, **options,
    )  # fmt: skip


def wilson(hits: int, total: int, z: float = 1.959964) -> tuple[float, float, float]:
    """Return low end, point and high end of Wilson's interval for a share."""
    share, shrink = hits / total, 1 + z * z / total
    centre = (share + z * z / (2 * total)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), share, min(1.0, centre + half)


def gaps(reference: Tensor, other: Tensor, logits: tuple[Tensor, ...]) -> list[float]:
    """Return the gap at the first divergence of every diverging row.

    Args:
        reference: `[B, N]` int64, the tokens of the reference.
        other: `[B, N]` int64.
        logits: Of the reference's run: `N` times `[B, V]`.
    """
    found = []
    differs = reference != other
    for row in differs.any(1).nonzero()[:, 0].tolist():
        step = int(differs[row].int().argmax())
        ours, theirs = int(reference[row, step]), int(other[row, step])
        found.append((logits[step][row, ours] - logits[step][row, theirs]).item())
    return found


class ErrorScale:
    """The largest and the 99.9th percentile of many absolute errors, kept as a histogram."""

    BINS, TOP = 65_536, 16.0

    def __init__(self) -> None:
        self._largest: list[Tensor] = []
        self._counts: Tensor | float = 0.0

    def add(self, errors: Tensor) -> None:
        self._largest.append(errors.max())
        counts = torch.histc(errors.clamp(max=self.TOP), bins=self.BINS, min=0, max=self.TOP)
        self._counts = self._counts + counts.double()

    @property
    def largest(self) -> float:
        return torch.stack(self._largest).max().item()

    def percentile(self, share: float) -> float:
        """Return the upper edge of the bin that holds it, 0.00025 wide."""
        assert isinstance(self._counts, Tensor)
        reached = self._counts.cumsum(0) >= share * self._counts.sum()
        return (int(reached.int().argmax()) + 1) * self.TOP / self.BINS


class Sequences:
    """Answered prompts: the input of teacher forcing.

    Args:
        tokens: `[B, P + N]` int64, left-padded.
        mask: `[B, P]`, 0 = padding.
    """

    def __init__(self, tokens: Tensor, mask: Tensor) -> None:
        self.prompt_length = mask.shape[1]
        self.tokens = tokens
        answered = mask.new_ones(tokens.shape[0], tokens.shape[1] - self.prompt_length)
        self.mask = torch.cat([mask, answered], 1)
        # As generate() counts them; forward() alone would count the padding too.
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)

    def forward(self, model: PreTrainedModel, start: int, end: int, **options: Any) -> Tensor:
        """Run the columns `start .. end - 1`; return logits, as the model gives them."""
        return model(
            input_ids=self.tokens[:, start:end],
            attention_mask=self.mask[:, :end],
            position_ids=self.positions[:, start:end],
            **options,
        ).logits

    def truth(self, model: PreTrainedModel) -> Tensor:
        """Return what decoding steps should give: `[B, N - 1, V]` float32, from one pass."""
        end = self.tokens.shape[1] - 1
        keep = end - self.prompt_length
        return self.forward(model, 0, end, use_cache=False, logits_to_keep=keep)

    def errors(self, model: PreTrainedModel, cache: Any, truth: Tensor) -> ErrorScale:
        """Decode the answers one token at a time over `cache`, after the prompt in one piece."""
        options = {CACHE_KEYWORD: cache, "use_cache": True, "logits_to_keep": 1}
        self.forward(model, 0, self.prompt_length, **options)
        scale = ErrorScale()
        for step in range(truth.shape[1]):
            column = self.prompt_length + step
            logits = self.forward(model, column, column + 1, **options)[:, -1]
            scale.add((logits.float() - truth[:, step]).abs())
        return scale


def compare_tokens(
    model: PreTrainedModel, inputs: Any, new_tokens: int, alone: int, findings: Findings
) -> Tensor:
    """Answer one batch with every provider; return prompts and answers of the reference."""
    with transformers_with(model, "sdpa"):
        reference = answer(model, inputs, new_tokens, output_logits=True)
    with transformers_with(model, "eager"):
        others = {EAGER: answer(model, inputs, new_tokens).sequences}
    with patchkit.patched(model):
        others[OURS] = answer(model, inputs, new_tokens).sequences
        rows = [{k: v[i : i + 1] for k, v in inputs.items()} for i in range(len(others[OURS]))]
        singles = [answer(model, row, new_tokens).sequences for row in rows[:alone]]
        if singles:
            others[ALONE] = torch.cat(singles)
        if model.device.type == "cuda":
            findings.look_at(patchkit.report(model), replays=True)
    expected = reference.sequences[:, -new_tokens:].cpu()
    for provider, sequences in others.items():
        tokens = sequences[:, -new_tokens:].cpu()
        findings.gaps[provider] += gaps(expected[: len(tokens)], tokens, reference.logits)
        findings.prompts[provider] += len(tokens)
    return reference.sequences


def measure_errors(model: PreTrainedModel, sequences: Sequences, findings: Findings) -> None:
    """Measure how far the logits of both providers are from float32."""
    with transformers_with(model, "sdpa"):
        truth = sequences.truth(copy.deepcopy(model).float())
        cache = DynamicCache(config=model.config)
        findings.errors[SDPA] = sequences.errors(model, cache, truth)
    with patchkit.patched(model):
        findings.errors[OURS] = sequences.errors(model, patchkit.KVStore(model), truth)
        if model.device.type == "cuda":
            findings.look_at(patchkit.report(model), replays=False)


def record_all(config: str, findings: Findings) -> None:
    def row(provider: str, metric: str, unit: str, *values: float) -> None:
        record("exactness", config, provider, metric, unit, list(values))

    for provider, found in findings.gaps.items():
        if not findings.prompts[provider]:
            continue
        low, share, high = wilson(len(found), findings.prompts[provider])
        # The 20th, 50th and 80th percentile of these five are the three figures.
        row(provider, "diverging prompts", "share", low, low, share, high, high)
        if found:
            row(provider, "gap", "logit", *found)
            row(provider, "largest gap", "logit", max(found))
            row(provider, "median gap", "logit", median(found))
    for provider, scale in findings.errors.items():
        row(provider, "logit error max", "logit", scale.largest)
        row(provider, "logit error p99.9", "logit", scale.percentile(0.999))


def table(findings: Findings) -> str:
    lines = [f"{'':<20}{'diverging (95 % CI)':<28}{'gap median, max':<20}error p99.9, max"]
    for provider in (SDPA, EAGER, OURS, ALONE):
        share = gap = error = "-"
        if total := findings.prompts[provider] if provider in findings.gaps else 0:
            found = findings.gaps[provider]
            low, _, high = wilson(len(found), total)
            share = f"{len(found)} of {total} ({low:.1%} to {high:.1%})"
            gap = f"{median(found):.4g}, {max(found):.4g}" if found else "-"
        if provider in findings.errors:
            scale = findings.errors[provider]
            error = f"{scale.percentile(0.999):.4g}, {scale.largest:.4g}"
        lines.append(f"{provider:<20}{share:<28}{gap:<20}{error}")
    return "\n".join(lines)


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(bundled.SOURCES), default=bundled.DEFAULT)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=256, help="per prompt")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument(
        "--error-prompts", type=int, default=40, help="of the first batch, for the logit errors"
    )
    parser.add_argument("--alone", type=int, default=30, help="of each batch, also one by one")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.prompts < 1 or args.new_tokens < 2:
        parser.error("--prompts must be at least 1, --new-tokens at least 2")
    print(f"on {device_name()}")
    torch.set_float32_matmul_precision("highest")
    prompts = load_prompts(args.prompts)
    dtype = getattr(torch, args.dtype)
    model, tokenizer = demo.load(args.model, dtype=dtype, device=args.device)

    findings = Findings()
    sequences: Sequences | None = None
    for start in range(0, args.prompts, args.batch_size):
        batch = prompts[start : start + args.batch_size]
        inputs = encode(tokenizer, batch).to(args.device)
        answered = compare_tokens(model, inputs, args.new_tokens, args.alone, findings)
        if sequences is None:
            some = slice(args.error_prompts)
            sequences = Sequences(answered[some], inputs["attention_mask"][some])
    assert sequences is not None
    measure_errors(model, sequences, findings)

    config = f"{args.model} N{args.prompts} B{args.batch_size} +{args.new_tokens} {args.dtype}"
    record_all(config, findings)
    print(f"\n{table(findings)}\n")
    broken = findings.broken()
    print("\n".join(f"BROKEN: {line}" for line in broken) or "the contract holds")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
