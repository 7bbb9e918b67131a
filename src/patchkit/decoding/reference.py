"""The specification of the decoding kernels in plain PyTorch; also the CPU backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
"""What `gated_activation` applies to the gate, by name."""

MOST_SKINNY_ROWS = 64
"""As many rows do not change what a linear map costs: reading its weight."""


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    offset: float = 0.0,
    round_first: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Divide every row by its root mean square, then multiply by the weight, in float32.

    Args:
        x: `[..., D]`, any float dtype.
        weight: `[D]`, as `x`.
        eps: Added to the mean square.
        offset: Added to the weight: 1 for Gemma, else 0.
        round_first: Round to the dtype of `x` before the product with the weight as well as after
            (Llama and most others; not Gemma, gpt-oss and OLMo 2).
        out: As `x`. Written and returned if given.

    Returns:
        `[..., D]`, in the dtype of `x`.

    Source: Root Mean Square Layer Normalization, arXiv 1910.07467. Differs: none.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = x.to(wide)
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps)
    if round_first:
        normed = normed.to(x.dtype)
    normed = (normed * (weight.to(normed.dtype) + offset)).to(x.dtype)
    return normed if out is None else out.copy_(normed)


def gated_activation(
    gate: Tensor, up: Tensor, *, activation: str, out: Tensor | None = None
) -> Tensor:
    """Multiply `up` by the activation of `gate`, which is rounded in between.

    Args:
        gate: `[..., I]`, any float dtype.
        up: As `gate`.
        activation: `"silu"` or `"gelu_tanh"`.
        out: As `gate`; may be `gate` itself. Written and returned if given.

    Returns:
        `[..., I]`, in the dtype of `gate`.

    Source: GLU Variants Improve Transformer, arXiv 2002.05202. Differs: none.
    """
    product = ACTIVATIONS[activation](gate) * up
    return product if out is None else out.copy_(product)


Table = Literal["full", "half", "first half"]
"""Which column of `cos` and `sin` belongs to which element of a head, see `rotary`."""


def rotated_elements(cos: Tensor, table: Table) -> int:
    """Return how many elements of a head `rotary` rotates."""
    return cos.shape[-1] * (2 if table == "half" else 1)


def rotary_fits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, table: Table) -> bool:
    """Say whether arguments have the shapes, dtypes and strides that `rotary` asks for."""
    if q.ndim != 4 or k.ndim != 4 or cos.ndim != 3:
        return False
    batch_size, _, tokens, dim = q.shape
    rotated = rotated_elements(cos, table)
    return (
        (k.shape[0], *k.shape[2:]) == (batch_size, tokens, dim)
        and cos.shape == sin.shape
        and cos.shape[0] in (1, batch_size)
        and cos.shape[1] == tokens
        and rotated <= dim
        and rotated % 2 == 0
        and q.stride(-1) == k.stride(-1) == 1
        and q.dtype == k.dtype
        and cos.dtype == sin.dtype
        and cos.dtype in (q.dtype, torch.float32)
        and q.device == k.device == cos.device == sin.device
    )


def rotary_outs(q: Tensor, k: Tensor, *, contiguous: bool) -> tuple[Tensor, Tensor]:
    """Allocate what `rotary` returns."""
    layout = torch.contiguous_format if contiguous else torch.preserve_format
    return torch.empty_like(q, memory_format=layout), torch.empty_like(k, memory_format=layout)


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    table: Table = "full",
    wide: bool = False,
    contiguous: bool = False,
    outs: Sequence[Tensor] | None = None,
) -> Sequence[Tensor]:
    """Rotate pairs of elements of queries and keys: `(x, y)` to `(x cos - y sin, y cos + x sin)`.

    Args:
        q: `[B, H_q, S, D]`, any float dtype, last stride 1.
        k: `[B, H_k, S, D]`, as `q`.
        cos: `[B or 1, S, W]`, as `q` or float32, any strides.
        sin: As `cos`.
        interleaved: Whether neighbours are a pair, or else element i of the first half of the R
            rotated ones and element i of the second half. Elements behind the first R pass through.
        table: `"full"`: R = W, column i belongs to element i. `"half"`: R = 2 W, column i belongs
            to both elements of pair i. `"first half"`: R = W, and the second half of the columns is
            not read; the first is as in `"half"`.
        wide: Compute in float32, or else round each product to the dtype that torch promotes to.
        contiguous: Lay the results out as `[B, H, S, D]`, or else as `q` and `k` are.
        outs: As `q` and `k`. Written and returned if given.

    Returns:
        The rotated `q` and `k`, in their dtype.

    Source: RoFormer, arXiv 2104.09864. Differs: none.
    """
    rotated = rotated_elements(cos, table)
    if table != "full":
        cos, sin = (t[..., : rotated // 2] for t in (cos, sin))
        cos, sin = (
            t.repeat_interleave(2, dim=-1) if interleaved else torch.cat((t, t), dim=-1)
            for t in (cos, sin)
        )
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    if outs is None:
        outs = rotary_outs(q, k, contiguous=contiguous)
    for x, out in zip((q, k), outs, strict=True):
        out[..., rotated:] = x[..., rotated:]
        x = x[..., :rotated]
        if wide:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        if interleaved:
            turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        else:
            first, second = x.chunk(2, dim=-1)
            turned = torch.cat((-second, first), dim=-1)
        out[..., :rotated] = x * cos + turned * sin
    return outs


def is_skinny(x: Tensor) -> bool:
    """Say whether `x [..., K]` is rows that a kernel maps which only streams the weight.

    That is one row, or up to 64 of a dtype that tensor cores multiply exactly.
    """
    rows = x.shape[:-1].numel() if x.ndim else 0
    return rows == 1 or (
        1 < rows <= MOST_SKINNY_ROWS and x.dtype in (torch.float16, torch.bfloat16)
    )


def skinny_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    outs: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    residual: Tensor | None = None,
    total: Tensor | None = None,
) -> None:
    """Map a few rows as `torch.nn.functional.linear` does, by several weights at once.

    Sums are in float32 or wider. A single result, rounded, can be added to a residual.

    Args:
        x: `[..., K]`, any float dtype.
        weights: One to three, each `[N, K]` with an N of its own, as `x`.
        outs: For each weight `[..., N]`, as `x`. Written.
        biases: For each weight `[N]`, as `x`. None: no biases.
        residual: `[..., N]`, as `x`; with one weight only.
        total: As `residual`. Written: `out + residual`. Given exactly if `residual` is.
    """
    for index, (weight, out) in enumerate(zip(weights, outs, strict=True)):
        out.copy_(_linear(x, weight, None if biases is None else biases[index]))
    if residual is not None and total is not None:
        torch.add(residual, outs[0], out=total)


def skinny_gated_linear(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    *,
    activation: str,
) -> Tensor:
    """Map a few rows by gate and up-projection of an MLP; activate and multiply.

    Args:
        x: `[..., K]`, any float dtype.
        gate: `[N, K]`, as `x`.
        up: As `gate`.
        gate_bias: `[N]`, as `x`, or None.
        up_bias: As `gate_bias`.
        activation: `"silu"` or `"gelu_tanh"`.

    Returns:
        `[..., N]`, in the dtype of `x`: `gated_activation` of what two `skinny_linear` give.
    """
    gates, ups = _linear(x, gate, gate_bias), _linear(x, up, up_bias)
    return gated_activation(gates, ups, activation=activation)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    result = F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return result.to(x.dtype)


def argmax(scores: Tensor) -> Tensor:
    """Return the place of the highest score of every row, of several the first.

    Args:
        scores: `[B, V]`, any float dtype, V >= 1. NaN is above all numbers.

    Returns:
        `[B]` int64.
    """
    return scores.argmax(-1)


def keep_top(
    scores: Tensor, *, count: int | None = None, mass: float | None = None, fill: float = -math.inf
) -> Tensor:
    """Keep the highest scores of every row: so many, and then so much of their probability.

    Args:
        scores: `[B, V]`, any float dtype, V >= 1.
        count: How many; as many as there are if these are fewer. All that equal the last stay too.
        mass: How much: scores stay if those above them hold less than this share of the softmax, in
            [0, 1]. Of equal scores the last ones count as the higher ones (in this reference as far
            as `torch.sort` keeps their order). The highest always stays, and a row with NaN or
            infinity, or without a number, stays as it is.
        fill: What the others are replaced by.

    Returns:
        `[B, V]`, as `scores`.

    Source: arXiv 1805.04833 (top-k) and 1904.09751 (nucleus), by the formulas of transformers.
    Differs: none.
    """
    if count is None and mass is None:
        raise ValueError("expected count or mass, got neither")
    if count is not None:
        least = scores.topk(min(count, scores.shape[1])).values[:, -1:]
        scores = scores.masked_fill(scores < least, fill)
    if mass is not None:
        ordered, places = scores.sort()
        removed = ordered.softmax(-1).cumsum(-1) <= 1 - mass
        removed[:, -1] = False
        scores = scores.masked_fill(removed.scatter(1, places, removed), fill)
    return scores


def keep_likely(scores: Tensor, *, ratio: float, fill: float = -math.inf) -> Tensor:
    """Keep the scores that are at least `ratio` times as probable as the highest of their row.

    Args:
        scores: `[B, V]`, any float dtype, V >= 1.
        ratio: In [0, 1]. A row with NaN or infinity, or without a number, stays as it is.
        fill: What the others are replaced by.

    Returns:
        `[B, V]`, as `scores`.

    Source: Min-p Sampling, arXiv 2407.01082, by the formula of transformers. Differs: none.
    """
    probabilities = scores.softmax(-1)
    return scores.masked_fill(probabilities < ratio * probabilities.amax(-1, keepdim=True), fill)


def sample(scores: Tensor, noise: Tensor, sound: Tensor) -> Tensor:
    """Draw a token of every row by a race of exponential variables, as `torch.multinomial` does.

    Args:
        scores: `[B, V]`, any float dtype, V >= 1.
        noise: As `scores`, drawn by `exponential_(1)`. May be overwritten.
        sound: `[]` bool. Written: False if any probability is not a number; otherwise it stays.

    Returns:
        `[B]` int64. Any token if a probability of the row is not a number.
    """
    probabilities = scores.softmax(-1)
    sound &= probabilities.isfinite().all()
    return (probabilities / noise).argmax(-1)


def settle(
    chosen: Tensor,
    token: Tensor,
    ids: Tensor,
    column: Tensor,
    unfinished: Tensor,
    sound: Tensor,
    posted: Tensor,
    pad: Tensor | None = None,
    ends: Tensor | None = None,
) -> None:
    """Write the tokens that were chosen, note which rows they end, and post both to the host.

    Args:
        chosen: `[B]` int64.
        token: `[B, 1]` int64. Written: `chosen`, or `pad` in rows that were finished.
        ids: `[B, W]` int64. Written at `column`.
        column: `[1]` int64. Grows by one.
        unfinished: `[B]` bool. False from now on in rows whose token is an end.
        sound: `[]` bool. Posted.
        posted: `[S, B + 2]` int64, in memory of the host. Row `column % S` is written: whether any
            row is unfinished, `sound`, and the tokens.
        pad: `[]` or `[1]` int64. None: finished rows go on.
        ends: `[1, E]` or `[E]` int64. None: no token ends a row.
    """
    token.copy_((chosen if pad is None else torch.where(unfinished, chosen, pad))[:, None])
    ids.index_copy_(1, column, token)
    if ends is not None:
        unfinished &= (token != ends).all(-1)
    posted[column.item() % len(posted)] = torch.cat(
        [unfinished.any()[None], sound[None], token[:, 0]]
    )
    column += 1


def wave(step: Tensor, amplitude: float, period: int, phase: float = 0.0) -> Tensor:
    """Compute the triangular wave of CyclicReflex at `step`.

    It rises from 0 to `amplitude` over the first quarter of a period, falls to `-amplitude` over
    the next half and returns to 0.

    Args:
        step: Integer tensor, tokens generated so far.
        amplitude: Peak value, in logits.
        period: Length of a cycle in tokens.
        phase: Shift to the left, as a fraction of the period.

    Returns:
        float32, shape of `step`.
    """
    cycle = (step % period).float() + phase % 1.0 * period
    cycle = torch.where(cycle >= period, cycle - period, cycle)
    shifted = cycle / period + 0.25
    return amplitude * (1 - 4 * ((shifted - shifted.floor()) - 0.5).abs())


def logit_wave(
    logits: Tensor,
    token_ids: Tensor,
    step: Tensor,
    ended: Tensor,
    *,
    amplitude: float,
    period: int | None,
    phase: float = 0.0,
    windows: Tensor | None = None,
    recent: Tensor | None = None,
    end_ids: Tensor | None = None,
) -> Tensor:
    """Add a bias to a few columns of the logits, in place, in rows that are still thinking.

    Args:
        logits: `[B, V]`, float32/float16/bfloat16, any strides. Modified; columns outside
            `token_ids`, and rows that are skipped, keep their bits.
        token_ids: `[R]` int32/int64, unique, each in `[0, V)` (not checked: that would wait for
            the device).
        step: `[B]` or `[1]` int32/int64, tokens generated so far: 0 for the first one.
        ended: `[B]` bool or int8, true where thinking has ended. Modified only with `recent`.
        amplitude: Peak of the wave, or the bias itself if `period` is None; in logits.
        period: Length of a cycle in tokens; None adds the constant `amplitude`.
        phase: Shift of the wave as a fraction of the period.
        windows: `[W, 2]` int32/int64, half-open ranges of `step` in which the bias applies; None
            means everywhere.
        recent: `[B, m]` int32/int64, the newest `m` generated ids, oldest first, -1 where there are
            fewer. A row whose `recent` equals `end_ids` has ended, from this call on.
        end_ids: `[m]` int32/int64; needed with `recent`.

    Returns:
        `logits`.

    Source: CyclicReflex, arXiv 2506.11077, the wave in closed form. Differs: none.
    """
    if recent is not None:
        ended |= (recent == end_ids).all(1)
    active = ~ended.bool()
    if windows is not None:
        inside = (step[:, None] >= windows[:, 0]) & (step[:, None] < windows[:, 1])
        active = active & inside.any(1)
    if period is None:
        bias = torch.full_like(step, amplitude, dtype=torch.float32)
    else:
        bias = wave(step, amplitude, period, phase)
    columns = token_ids.long()
    before = logits[:, columns]
    after = (before.float() + bias[:, None]).to(logits.dtype)
    logits[:, columns] = torch.where(active[:, None], after, before)
    return logits
