"""Checks of the operations behind attention scores, on the CPU interpreter and on a GPU.

As in `kernel_cases`: every check runs the kernel and the reference and compares both with float64
loops. Scores start as NaN wherever nobody may read them.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from patchkit.attention import reference
from patchkit.attention.kernels import (
    attention_lse,
    attention_mass,
    decode_attention,
    pool_scores,
    prefill_attention,
    window_statistics,
)

from .kernel_cases import (
    _GUARD,
    DecodeCase,
    PrefillCase,
    _decode_inputs,
    _prefill_inputs,
    assert_same_bits,
    nan_in_new_memory,
    ragged,
    random,
)

_EPS = torch.finfo(torch.float32).eps


def logits_oracle(
    query: Tensor,
    keys: Tensor,
    position: Tensor,
    length: Tensor,
    seen: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    indices: Tensor | None = None,
    index_count: Tensor | None = None,
) -> Tensor:
    """Return the logits `[B, H_q, Q, C]` in float64 on the CPU, -inf for invisible pairs."""
    query, keys, position, length, seen = (t.cpu() for t in (query, keys, position, length, seen))
    batch_size, num_heads, q_len, _ = query.shape
    groups = num_heads // keys.shape[1]
    shape = (batch_size, num_heads, q_len, keys.shape[2])
    logits = torch.full(shape, -torch.inf, dtype=torch.float64)
    for b in range(batch_size):
        for head in range(num_heads):
            h = head // groups
            p, n, s = (t[b, h if t.shape[1] > 1 else 0] for t in (position, length, seen))
            slots = torch.arange(int(n))
            if indices is not None and index_count is not None:
                slots = indices[b, h, : int(index_count[b, h])].long().cpu()
                slots = slots[slots < n]
            for i in range(q_len):
                column = int(s) - q_len + i
                chosen = slots[(p[slots] >= 0) & (p[slots] <= column)]
                if sliding_window is not None:
                    chosen = chosen[p[chosen] > column - sliding_window]
                found = keys[b, h, chosen].double() @ query[b, head, i].double() * scale
                if softcap is not None:
                    found = softcap * torch.tanh(found / softcap)
                logits[b, head, i, chosen] = found
    return logits


def lse_oracle(logits: Tensor, sinks: Tensor | None) -> Tensor:
    if sinks is not None:
        extra = sinks.cpu().double()[:, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat((logits, extra), -1)
    return logits.logsumexp(-1)


def _logit_error(query: Tensor, keys: Tensor, options: dict[str, Any]) -> float:
    """Bound the error of a float32 logit: the order of a sum, and tanh as a GPU computes it."""
    norms = [t.double().norm(dim=-1).nan_to_num(0, 0, 0).max() for t in (query, keys)]
    return 4 * _EPS * (options["scale"] * float(norms[0] * norms[1]) + (options["softcap"] or 0))


def _check_lse(got: Tensor, plain: Tensor, expected: Tensor, logit_error: float) -> None:
    for name, lse in (("reference", plain), ("kernel", got)):
        assert lse.dtype == torch.float32 and lse.is_contiguous(), name
        blind = expected == -torch.inf
        assert torch.equal(lse.cpu() == -torch.inf, blind), name
        error = (lse.cpu().double() - expected).masked_fill(blind, 0).abs()
        limit = logit_error + 4 * _EPS * (1 + expected.masked_fill(blind, 0).abs())
        assert (error <= limit).all(), f"{name}: {error.max()} > {limit.min()}"


# --- lse of decode_attention and prefill_attention ---------------------------------------------


def check_decode_lse(case: DecodeCase, dtype: torch.dtype, device: str, monkeypatch: Any) -> None:
    """Ask for the softmax denominators, which must not change the output."""
    if case.programs is not None:
        monkeypatch.setattr(decode_attention, "_TARGET_PROGRAMS", case.programs)
    tensors, options = _decode_inputs(case, dtype, device)
    _check_lse_output(decode_attention.decode_attention, tensors, options)


def check_prefill_lse(case: PrefillCase, dtype: torch.dtype, device: str, monkeypatch: Any) -> None:
    """Ask for the softmax denominators, which must not change the output."""
    if case.blocks is not None:
        sizes = dict(zip(("BLOCK_M", "BLOCK_N"), case.blocks, strict=True))
        monkeypatch.setattr(prefill_attention, "_blocks", lambda *_: sizes)
    tensors, options = _prefill_inputs(case, dtype, device)
    _check_lse_output(prefill_attention.prefill_attention, tensors, options)


def _check_lse_output(
    op: Callable[..., Tensor], tensors: tuple[Tensor, ...], options: dict[str, Any]
) -> None:
    plain, got = (
        torch.full(tensors[0].shape[:3], torch.nan, device=tensors[0].device) for _ in range(2)
    )
    getattr(reference, op.__name__)(*tensors, **options, lse=plain)
    with nan_in_new_memory():
        out = op(*tensors, **options, lse=got)
    assert torch.equal(out, op(*tensors, **options))
    sinks = options.pop("sinks", None)
    options = {k: v for k, v in options.items() if k not in ("behind", "ordered")}
    query, keys, _, *rest = tensors
    expected = lse_oracle(logits_oracle(query, keys, *rest, **options), sinks)
    _check_lse(got, plain, expected, _logit_error(query, keys, options))


# --- attention_lse, attention_mass, window_statistics ------------------------------------------


@dataclasses.dataclass(frozen=True)
class ScoreCase:
    """The store is that of a `PrefillCase`: some stored tokens, then a chunk of queries."""

    batch_size: int = 2
    num_kv_heads: int = 2
    groups: int = 2
    q_len: int = 37
    stored: int = 60
    ordered: bool = False
    padding: str | None = None
    head_dim: int = 16
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    decay: float = 0.0
    shared_positions: bool = False
    blocks: dict[str, int] | None = None  # None: the launcher's own

    def __str__(self) -> str:
        parts = [
            f"B{self.batch_size}-H{self.num_kv_heads}-G{self.groups}-Q{self.q_len}"
            f"-S{self.stored}-D{self.head_dim}"
        ]
        for name in ("padding", "sliding_window", "softcap"):
            if getattr(self, name) is not None:
                parts.append(f"{name}{getattr(self, name)}")
        if self.decay:
            parts.append(f"decay{self.decay}")
        parts += [f"{name}{size}" for name, size in (self.blocks or {}).items()]
        flags = ("ordered", "sinks", "shared_positions")
        return "-".join(parts + [flag for flag in flags if getattr(self, flag)])


def _score_inputs(
    case: ScoreCase, dtype: torch.dtype, device: str
) -> tuple[tuple[Tensor, ...], dict[str, Any], Tensor | None]:
    shared = {
        field.name: getattr(case, field.name)
        for field in dataclasses.fields(PrefillCase)
        if hasattr(case, field.name) and field.name != "blocks"
    }
    if case.shared_positions:
        shared |= {"num_kv_heads": 1, "groups": case.num_kv_heads * case.groups}
    tensors, options = _prefill_inputs(PrefillCase(**shared), dtype, device)
    query, keys, _, position, length, seen = tensors
    if case.shared_positions:
        shape = (case.batch_size, case.num_kv_heads, *keys.shape[2:])
        keys = random(shape, 9, dtype, device)
    sinks = options.get("sinks")
    options = {name: options[name] for name in ("scale", "sliding_window", "softcap")}
    return (query, keys, position, length, seen), options, sinks


def _set_blocks(case: ScoreCase, module: types.ModuleType, monkeypatch: Any) -> None:
    if case.blocks is None:
        return
    monkeypatch.setattr(module, "_blocks", lambda *_: case.blocks)
    if module is attention_mass:
        window = None if "TILE_Q" in case.blocks else case.blocks
        monkeypatch.setattr(module, "_window_blocks", lambda *_: window)


def check_attention_lse(case: ScoreCase, dtype: torch.dtype, device: str, monkeypatch: Any) -> None:
    """Compare with the logarithm of a float64 sum; the error is that of one logit."""
    _set_blocks(case, attention_lse, monkeypatch)
    tensors, options, sinks = _score_inputs(case, dtype, device)
    expected = lse_oracle(logits_oracle(*tensors, **options), sinks)
    with nan_in_new_memory():
        got = attention_lse.attention_lse(*tensors, **options, sinks=sinks)
    with monkeypatch.context() as patch:
        patch.setattr(
            reference.attention, "_MAX_LOGITS", expected[:, :, :5].numel() * tensors[1].shape[2]
        )
        plain = reference.attention_lse(*tensors, **options, sinks=sinks)
    _check_lse(got, plain, expected, _logit_error(*tensors[:2], options))


def _weights_oracle(
    case: ScoreCase,
    tensors: tuple[Tensor, ...],
    options: dict[str, Any],
    sinks: Tensor | None,
    device: str,
) -> tuple[Tensor, Tensor]:
    """Return float32 denominators, of which some say "ignore this query", and the weights.

    The denominators are a slice of a longer tensor, as those of a chunk's last queries are.
    """
    logits = logits_oracle(*tensors, **options)
    lse = lse_oracle(logits, sinks).float()
    lse[-1, :, case.q_len // 3 :: 5] = -torch.inf
    lse[0, -1, min(case.q_len - 1, 1) :] = -torch.inf  # one query of the head, or none, is left
    weights = torch.zeros_like(logits)
    for b, head, i in (lse > -torch.inf).nonzero().tolist():
        weights[b, head, i] = (logits[b, head, i] - lse[b, head, i].double()).exp()
    longer = torch.full((*lse.shape[:2], 3 + case.q_len), torch.nan, device=device)
    longer[:, :, 3:] = lse
    return longer[:, :, 3:], weights.unflatten(1, (case.num_kv_heads, case.groups))


def _weight_error(tensors: tuple[Tensor, ...], options: dict[str, Any], lse: Tensor) -> float:
    """Bound the relative error of a weight and of a sum of weights."""
    largest = float(lse.nan_to_num(0, 0, 0).abs().max())
    return 2 * _logit_error(*tensors[:2], options) + _EPS * (16 + largest)


def _per_slot(case: ScoreCase, keys: Tensor, fill: float) -> tuple[Tensor, Tensor]:
    """Return a buffer with guard slots, and its part for the slots of the store."""
    shape = (case.batch_size, case.num_kv_heads, keys.shape[2] + _GUARD)
    buffer = torch.full(shape, fill, device=keys.device)
    return buffer, buffer[:, :, : keys.shape[2]]


def _check_per_slot(
    name: str, got: Tensor, expected: Tensor, length: Tensor, limit: Tensor
) -> None:
    """Compare live slots with float64 results that are off by `limit`; dead ones stay NaN."""
    live = torch.arange(got.shape[2]) < length.cpu().unsqueeze(-1)
    live = live.expand(got.shape)
    got = got.cpu()
    assert got[~live].isnan().all(), f"{name}: a dead slot was written"
    error = (got - torch.nn.functional.pad(expected, (0, _GUARD))).masked_fill(~live, 0).abs()
    limit = torch.nn.functional.pad(limit, (0, _GUARD)) + 1e-37
    assert (error <= limit).all(), f"{name}: {error.max()}, {(error / limit).max()} x the limit"


def check_attention_mass(
    case: ScoreCase, dtype: torch.dtype, device: str, monkeypatch: Any
) -> None:
    """Compare with float64 sums over queries; dead slots and guards keep their NaN."""
    _set_blocks(case, attention_mass, monkeypatch)
    tensors, options, sinks = _score_inputs(case, dtype, device)
    keys, length = tensors[1], tensors[3]
    lse, weights = _weights_oracle(case, tensors, options, sinks, device)
    old = random((case.batch_size, case.num_kv_heads, keys.shape[2]), 31, torch.float32, device)
    live = torch.arange(keys.shape[2], device=device) < length.unsqueeze(-1)
    # Without decay the old content is NaN, and must not be read.
    position, seen = tensors[2], tensors[4]
    num_new = case.q_len + 7 if case.decay == 0.5 else case.q_len // 2 + 1
    old_slots = live & (position < seen.unsqueeze(-1) - num_new)
    old = old.masked_fill(~old_slots, torch.nan) if case.decay else old.fill_(torch.nan)
    added = weights.sum((2, 3))
    expected = added if not case.decay else added + case.decay * old.cpu().double().nan_to_num(0)
    magnitude = added + case.decay * old.cpu().double().abs().nan_to_num(0)
    error = _weight_error(tensors, options, lse)
    assert added.max() > 0.5

    def run(op: Callable[..., None]) -> Tensor:
        buffer, score = _per_slot(case, keys, torch.nan)
        score.copy_(old)
        assert op(*tensors, lse, score, **options, decay=case.decay, num_new=num_new) is None
        return buffer

    with monkeypatch.context() as patch:
        patch.setattr(reference.attention, "_MAX_LOGITS", weights[..., :5, :].numel())
        plain = run(reference.attention_mass)
    got = run(attention_mass.attention_mass)
    for name, buffer in (("reference", plain), ("kernel", got)):
        _check_per_slot(name, buffer, expected, length, error * magnitude)
    again = run(attention_mass.attention_mass)
    assert_same_bits({"score": again}, {"score": got}, "second run")


def check_window_statistics(
    case: ScoreCase, dtype: torch.dtype, device: str, monkeypatch: Any
) -> None:
    """Compare with float64 loops over heads; dead slots and guards keep their NaN.

    The means alone, then variances that outweigh them.
    """
    _set_blocks(case, window_statistics, monkeypatch)
    tensors, options, sinks = _score_inputs(case, dtype, device)
    keys, position, length, seen = tensors[1:]
    lse, weights = _weights_oracle(case, tensors, options, sinks, device)
    shape = weights.shape[:2] + weights.shape[4:]
    mean, variance, squares = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    sums, limits = (torch.zeros(2, case.batch_size, dtype=torch.float64) for _ in range(2))
    error = _weight_error(tensors, options, lse)
    for b in range(case.batch_size):
        for h in range(case.num_kv_heads):
            p = position.cpu()[b, 0 if case.shared_positions else h]
            start = int(seen[b, 0 if case.shared_positions else h]) - case.q_len
            older = (p >= 0) & (p < start)
            for g in range(case.groups):
                counted = lse[b, h * case.groups + g].cpu() > -torch.inf
                chosen = weights[b, h, g, counted]
                if len(chosen) > 0:
                    mean[b, h] += chosen.mean(0)
                if len(chosen) > 1:
                    variance[b, h] += chosen.var(0)
                    squares[b, h] += chosen.square().sum(0) / (len(chosen) - 1)
                for w in chosen[:, older]:
                    sums[0, b] -= torch.where(w > 0, w * w.log(), 0).sum()
                limits[0, b] += chosen.sum()
            sums[1, b] += variance[b, h, older].sum()
            # A weight is off by `error` of itself, so a difference by that of the larger one.
            limits[1, b] += 4 * error * squares[b, h].sum()
    limits[0] = error * 2 * (sums[0] + limits[0])  # d(w log w) = (1 + log w) dw

    for gamma in (0.0, 1e6):
        expected = mean + gamma * variance
        limit = error * (mean + gamma * 4 * squares)
        for name, op in (
            ("reference", reference.window_statistics),
            ("kernel", window_statistics.window_statistics),
        ):
            buffer, slots = _per_slot(case, keys, torch.nan)
            with nan_in_new_memory():
                got = op(*tensors, lse, slots, **options, gamma=gamma)
            _check_per_slot(f"{name}, {gamma=}", buffer, expected, length, limit)
            assert got.dtype == torch.float32 and got.shape[:2] == sums.shape
            difference = (got.cpu().sum(-1, dtype=torch.float64) - sums).abs()
            assert (difference <= limits + 1e-37).all(), f"{name}: {difference} > {limits}"


# --- pool_scores -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PoolCase:
    batch_size: int = 2
    num_heads: int = 2
    longest: int = 63
    width: int = 5
    scale: float = 1.0
    count: bool = False
    share: bool = False
    in_place: bool = False

    def __str__(self) -> str:
        size = f"B{self.batch_size}-H{self.num_heads}-S{self.longest}-W{self.width}-{self.scale}"
        flags = ("count", "share", "in_place")
        return "-".join([size] + [flag for flag in flags if getattr(self, flag)])


def check_pool_scores(case: PoolCase, device: str) -> None:
    """Compare with a float64 loop over slots; dead slots and guards keep their NaN."""
    lists = (case.batch_size, case.num_heads)
    length = ragged(case.batch_size, 1 if case.share else case.num_heads, case.longest)
    length = length.expand(lists).contiguous()
    capacity = case.longest + 2
    filled = torch.full((*lists, capacity + _GUARD), torch.nan)
    count = torch.arange(case.batch_size, dtype=torch.int32) if case.count else None
    expected, magnitude = (torch.zeros(*lists, capacity, dtype=torch.float64) for _ in range(2))
    for b, h in torch.cartesian_prod(*(torch.arange(n) for n in lists)).tolist():
        n, half = int(length[b, h]), case.width // 2
        filled[b, h, :n] = random((n,), 10 * b + h, torch.float32) + 1
        factor = case.scale / case.width / (1 if count is None else max(int(count[b]), 1))
        for s in range(n):
            near = filled[b, h, max(s - half, 0) : min(s + half + 1, n)].double()
            expected[b, h, s] = near.sum() * factor
            magnitude[b, h, s] = near.abs().sum() * abs(factor)
    if case.share:
        expected, magnitude = (
            x.mean(1, keepdim=True).expand(x.shape) for x in (expected, magnitude)
        )
    length = length.to(device)
    for name, op in (("reference", reference.pool_scores), ("kernel", pool_scores.pool_scores)):
        score = filled.to(device, copy=True)
        buffer = score if case.in_place else torch.full_like(score, torch.nan)
        given = (score[:, :, :capacity], length, buffer[:, :, :capacity])
        options = {"width": case.width, "scale": case.scale, "share": case.share}
        assert op(*given, count=None if count is None else count.to(device), **options) is None
        limit = _EPS * (8 + case.width * case.num_heads) * magnitude
        _check_per_slot(name, buffer, expected, length, limit)
