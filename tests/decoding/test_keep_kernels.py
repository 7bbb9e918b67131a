"""`keep_top` and `keep_likely`: kernels and references against sorting in float64."""

from __future__ import annotations

import math

import pytest
import torch

from patchkit.decoding import reference
from patchkit.decoding.kernels.keep_likely import keep_likely
from patchkit.decoding.kernels.keep_top import keep_top
from patchkit.decoding.kernels.peaks import BLOCK, highest_scores, write_peaks

from .helpers import DEVICE, random

INF, NAN = math.inf, math.nan
KERNELS = {"keep_top": keep_top, "keep_likely": keep_likely}
BOTH = pytest.mark.parametrize("op", ["kernel", "reference"])
ROUNDING = 3e-6  # of sums of a softmax in float32


def run(op, name, scores, **options):
    before = scores.clone()
    got = (KERNELS[name] if op == "kernel" else getattr(reference, name))(scores, **options)
    assert same(scores, before)
    return got


def same(got, want):
    return torch.equal(got.nan_to_num(7e37), want.nan_to_num(7e37))


def rows_of(kind, size):
    """Make three rows of scores, `[3, size]`."""
    scores = random(3, size)
    most = random(3, size, seed=1) < 1
    most[:, 0] = False
    rows = {
        "flat": lambda: scores * 0.5,
        "normal": lambda: scores * 3 + 5,
        "peaked": lambda: scores * 15,
        "ties": lambda: (scores * 4 + 10).bfloat16().float(),
        "equal": lambda: torch.full_like(scores, -2.5),
        "filtered": lambda: (scores * 3).masked_fill(most, -INF),
        "filled": lambda: (scores * 3).masked_fill(most, -3e38),
        "huge": lambda: scores * 1e37,
    }
    return rows[kind]()


KINDS = ["flat", "normal", "peaked", "ties", "equal", "filtered", "filled", "huge"]
by_kind = pytest.mark.parametrize("kind", KINDS)


# -- the highest scores of blocks --------------------------------------------------------------


@pytest.mark.parametrize("size", [1, BLOCK, 2 * BLOCK + 77])
def test_peaks_of_blocks_and_groups(size):
    scores = random(3, size)
    scores[0, 0], scores[1, -1], scores[2, 0] = NAN, INF, -INF
    missing = -size % BLOCK
    padded = torch.nn.functional.pad(scores, (0, missing), value=-INF).unflatten(1, (-1, BLOCK))
    highest = padded.masked_fill(padded.isnan(), INF).amax(2)
    assert torch.equal(highest_scores(scores, {"EARLY": False}), highest)

    peaks = torch.full((*padded.shape[:2], 4), NAN, device=DEVICE)
    lows, emptied = peaks[..., 0].clone(), torch.ones(3, 11, dtype=torch.int64, device=DEVICE)
    write_peaks(scores, peaks, {"EARLY": False}, lows=lows, emptied=emptied)
    finite = padded.isfinite()
    groups = padded.masked_fill(~finite, -INF).unflatten(2, (4, -1))
    assert torch.equal(peaks, groups.amax(3))
    assert torch.equal(lows, padded.masked_fill(~finite, INF).amin(2))
    assert not emptied.any()


# -- a number of scores ------------------------------------------------------------------------


def check_count(op, scores, count, fill=-INF):
    got = run(op, "keep_top", scores, count=count, fill=fill)
    for row, kept in zip(scores.tolist(), got.tolist(), strict=True):
        least = sorted(row, reverse=True)[min(count, len(row)) - 1]
        assert kept == [score if score >= least else fill for score in row]


@BOTH
@by_kind
@pytest.mark.parametrize(
    ("size", "count"),
    [(1, 1), (5, 4), (5, 9), (1000, 999), (2500, 1), (4097, 50), (2500, 700), (2500, 2500)],
)
def test_count(kind, size, count, op):
    check_count(op, rows_of(kind, size), count, fill=-9.5 if count == 50 else -INF)


@BOTH
@pytest.mark.parametrize("count", [1, 50, 3000])
def test_count_in_a_vocabulary(count, op):
    check_count(op, rows_of("ties", 50_257), count)


@BOTH
@pytest.mark.parametrize(
    ("row", "count", "want"),
    [
        ([1.0, -INF, 2.0, -INF], 1, [0.0, 0.0, 2.0, 0.0]),
        ([1.0, -INF, 2.0, -INF], 3, [1.0, -INF, 2.0, -INF]),  # ties at the threshold
        ([-INF] * 4, 2, [-INF] * 4),
        ([0.0, -0.0, -1.0, 0.0], 1, [0.0, -0.0, 0.0, 0.0]),  # zeros are equal
        ([INF, 1.0, INF, 2.0], 2, [INF, 0.0, INF, 0.0]),
        ([INF, 1.0, INF, 2.0], 3, [INF, 0.0, INF, 2.0]),
        ([NAN, 1.0, 3.0, 2.0], 1, [NAN, 1.0, 3.0, 2.0]),  # no number is below NaN
        ([NAN, 1.0, 3.0, 2.0], 2, [NAN, 0.0, 3.0, 0.0]),
        ([NAN, INF, -INF, 2.0], 3, [NAN, INF, 0.0, 2.0]),
        ([NAN] * 4, 2, [NAN] * 4),
        ([3e38, -3e38, 3.2e38, -3.4e38], 2, [3e38, 0.0, 3.2e38, 0.0]),
        ([1e-45, 2e-45, 0.0, -1e-45], 2, [1e-45, 2e-45, 0.0, 0.0]),
    ],
)
def test_count_of_few_and_of_no_numbers(row, count, want, op):
    scores = torch.tensor([row, [4.0, 3.0, 2.0, 1.0]], device=DEVICE)
    got = run(op, "keep_top", scores, count=count, fill=0.0)
    assert same(got[:1], torch.tensor([want], device=DEVICE))
    assert got[1].tolist() == [4.0, 3.0, 2.0, 1.0][:count] + [0.0] * (4 - count)


# -- a share of the probability ----------------------------------------------------------------


def check_mass(scores, got, mass, fill):
    """Compare with sorting in float64; what is within rounding of the threshold may go or stay."""
    scores, got = scores.cpu(), got.cpu()
    ordered, places = scores.double().sort(stable=True)
    below = torch.zeros_like(ordered).scatter(1, places, ordered.softmax(-1).cumsum(-1))
    kept = got == scores
    assert torch.equal(got[~kept], torch.full_like(got[~kept], fill))
    kept &= scores > -INF  # which may equal their replacement
    last = torch.zeros_like(kept).scatter(1, places[:, -1:], True)
    assert (kept | ~last).all()
    close = (below - (1 - mass)).abs() < ROUNDING
    unsure = close & ~last & (scores > -INF)
    want = ((below > 1 - mass) | last) & (scores > -INF)
    assert torch.equal(kept & ~unsure, want & ~unsure)
    return unsure


@pytest.mark.parametrize(
    ("op", "kind"),
    [("kernel", kind) for kind in KINDS]
    # torch.sort orders equal scores in its own way.
    + [("reference", kind) for kind in KINDS if kind not in ("ties", "equal")],
)
@pytest.mark.parametrize(
    ("size", "mass"),
    [(1, 0.5), (5, 0.0), (5, 0.7), (1000, 1e-6), (1000, 0.999), (2500, 0.35), (4097, 0.9)],
)
def test_mass(op, kind, size, mass):
    scores = rows_of(kind, size)
    fill = -INF if mass != 0.35 else -1e4
    unsure = check_mass(scores, run(op, "keep_top", scores, mass=mass, fill=fill), mass, fill)
    if kind in ("normal", "flat", "ties"):
        assert unsure.sum() <= 3


def test_mass_in_a_vocabulary():
    scores = rows_of("ties", 50_257)
    for mass in (0.5, 0.95):
        check_mass(scores, keep_top(scores, mass=mass), mass, -INF)


@BOTH
def test_all_of_the_mass_is_every_token_that_has_a_probability(op):
    scores = random(2, 1000) * 3
    scores[:, ::7] = -INF
    scores[:, 1::7] = -500.0  # less than float32 can tell from zero
    scores[:, 2::7] = -60.0
    got = run(op, "keep_top", scores, mass=1.0)
    assert torch.equal(got, scores.masked_fill(scores < -400, -INF))


@pytest.mark.parametrize(("mass", "kept"), [(0.0, 1), (0.25, 2), (0.3, 3), (0.5, 4), (1.0, 8)])
def test_of_equal_scores_the_last_ones_stay(mass, kept):
    scores = torch.tensor([1.0] * 8 + [-INF], device=DEVICE)[None]
    got = keep_top(scores, mass=mass)
    assert (got[0] == 1).tolist() == [False] * (8 - kept) + [True] * kept + [False]
    assert (reference.keep_top(scores, mass=mass) == 1).sum() == kept


def test_equal_scores_of_several_blocks():
    scores = torch.zeros(1, 6000, device=DEVICE)
    scores[0, 3000] = 5.0
    total = 5999 + math.exp(5)
    got = keep_top(scores, mass=(math.exp(5) + 2500.5) / total, fill=-1.0)
    places = (got[0] == 0).nonzero().flatten()
    assert places.tolist() == list(range(6000 - 2501, 6000))
    assert got[0, 3000] == 5


@BOTH
@pytest.mark.parametrize(
    "row", [[NAN, 1.0, 9.0, 2.0], [INF, 1.0, -INF, 2.0], [-INF] * 4, [NAN, INF, -INF, 0.0]]
)
def test_rows_without_probabilities_stay(row, op):
    scores = torch.tensor([row, [9.0, 1.0, 1.0, 1.0]], device=DEVICE)
    for name, option in (("keep_top", "mass"), ("keep_likely", "ratio")):
        got = run(op, name, scores, **{option: 0.5}, fill=0.0)
        assert same(got[:1], scores[:1])
        assert got[1].tolist() == [9.0, 0.0, 0.0, 0.0]


# -- both --------------------------------------------------------------------------------------


@by_kind
@pytest.mark.parametrize(
    ("size", "count", "mass", "fill"),
    [(5, 3, 0.6, -INF), (1000, 1, 0.9, -INF), (2500, 50, 0.0, -INF), (2500, 50, 0.8, -INF),
     (2500, 50, 0.8, 0.0), (1500, 1100, 0.6, -INF)],
)  # fmt: skip
def test_both_limits_are_one_after_the_other(kind, size, count, mass, fill):
    scores = rows_of(kind, size)
    got = run("kernel", "keep_top", scores, count=count, mass=mass, fill=fill)
    few = run("kernel", "keep_top", scores, count=count, fill=fill)
    assert torch.equal(got, run("kernel", "keep_top", few, mass=mass, fill=fill))
    assert not torch.equal(got, few) or kind == "huge" or count <= 3 or fill == 0


@pytest.mark.parametrize(
    "row",
    [
        [NAN, 1.0, 9.0, 2.0, 8.0],
        [INF, 1.0, -INF, 2.0, 1.0],
        [-INF] * 5,
        [-INF, 3.0, 2.0, -INF, -INF],
    ],
)
@pytest.mark.parametrize("count", [1, 3, 4])
def test_both_limits_of_few_and_of_no_numbers(row, count):
    scores = torch.tensor([row, [9.0, 8.9, 1.0, 1.0, 8.8]], device=DEVICE)
    got, want = (f(scores, count=count, mass=0.5) for f in (keep_top, reference.keep_top))
    assert same(got, want)


# -- a share of the highest probability --------------------------------------------------------


@BOTH
@by_kind
@pytest.mark.parametrize("size", [1, 2500])
@pytest.mark.parametrize("ratio", [0.0, 0.01, 1.0])
def test_likely(ratio, size, kind, op):
    scores = rows_of(kind, size)
    got = run(op, "keep_likely", scores, ratio=ratio, fill=-7.0)
    wide = scores.double()
    relative = (wide - wide.amax(-1, keepdim=True)).exp()
    sure = (relative - ratio).abs() > 1e-5 * ratio
    want = torch.where(relative < ratio, -7.0, scores)
    assert torch.equal(got[sure], want[sure])
    assert torch.equal(got.amax(-1), scores.amax(-1))
    assert (~sure).float().mean() < 0.01 or ratio in (0.0, 1.0)


# -- all of them -------------------------------------------------------------------------------

OPTIONS = [
    ("keep_top", {"count": 40}),
    ("keep_top", {"mass": 0.8}),
    ("keep_top", {"count": 40, "mass": 0.8}),
    ("keep_likely", {"ratio": 0.02}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_a_row_does_not_depend_on_its_batch(name, options):
    scores = torch.cat([rows_of(kind, 2500)[:1] for kind in KINDS[:6]])
    together = KERNELS[name](scores, **options)
    assert torch.equal(together, KERNELS[name](scores, **options))
    for index in range(len(scores)):
        assert torch.equal(KERNELS[name](scores[index : index + 1], **options)[0], together[index])


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_rows_of_any_spacing(name, options):
    scores = random(2500, 2, 3)[:, 1].T
    got = KERNELS[name](scores, **options)
    assert got.is_contiguous()
    assert torch.equal(got, KERNELS[name](scores.contiguous(), **options))
    assert KERNELS[name](scores[:0], **options).shape == (0, 2500)


@pytest.mark.parametrize(
    "scores", [torch.ones(5), torch.ones(2, 0), torch.ones(2, 3, dtype=torch.float16)]
)
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_refuses_scores(name, options, scores):
    with pytest.raises(ValueError, match="^scores: expected"):
        KERNELS[name](scores.to(DEVICE), **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("keep_top", {}, "^expected count or mass"),
        ("keep_top", {"count": 0}, "^count: expected"),
        ("keep_top", {"mass": 1.5}, "^mass: expected"),
        ("keep_top", {"mass": NAN}, "^mass: expected"),
        ("keep_likely", {"ratio": -0.1}, "^ratio: expected"),
    ],
)
def test_refuses_limits(name, options, message):
    with pytest.raises(ValueError, match=message):
        KERNELS[name](torch.ones(2, 3, device=DEVICE), **options)
