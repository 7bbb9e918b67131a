"""`argmax`, `sample` and `settle`: kernels and references against torch and plain loops."""

from __future__ import annotations

import pytest
import torch

from patchkit.decoding import reference
from patchkit.decoding.kernels.argmax import argmax
from patchkit.decoding.kernels.sample import sample
from patchkit.decoding.kernels.settle import settle

from .helpers import DEVICE, by_dtype, random

BOTH = pytest.mark.parametrize("op", ["kernel", "reference"])


@BOTH
@by_dtype
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 97), (2, 2048), (1, 5000), (1, 128256)])
def test_argmax(rows, size, dtype, op):
    scores = random(rows, size, dtype=dtype)
    got = (argmax if op == "kernel" else reference.argmax)(scores)
    assert got.dtype == torch.int64
    for row, place in zip(scores.tolist(), got.tolist(), strict=True):
        assert place == row.index(max(row))


@BOTH
@pytest.mark.parametrize(
    ("places", "want"),
    [
        ({}, 0),  # all are equal
        ({7: 1.0, 4100: 1.0}, 7),  # the first of several, in whatever block
        ({2047: 3.0, 2048: 3.5}, 2048),
        ({4: torch.inf, 9: torch.inf}, 4),
        ({3000: torch.nan, 5: torch.inf, 4999: torch.nan}, 3000),
        ({12: -torch.nan, 5: torch.inf}, 12),
        (dict.fromkeys(range(5000), -torch.inf), 0),
        (dict.fromkeys(range(5000), -torch.inf) | {4999: -3e38}, 4999),
        (dict.fromkeys(range(5000), -1.0) | {6: -0.0, 8: 0.0, 4990: -1e-45}, 6),
    ],
)
def test_argmax_of_a_row_with_ties_and_no_numbers(places, want, op):
    scores = torch.zeros(2, 5000, device=DEVICE)
    for place, value in places.items():
        scores[1, place] = value
    got = (argmax if op == "kernel" else reference.argmax)(scores)
    assert got.tolist() == [0, want]


def test_argmax_reads_rows_of_any_spacing():
    scores = random(300, 2, 6)[:, 1].T
    assert torch.equal(argmax(scores), scores.argmax(-1))
    assert argmax(scores[:0]).shape == (0,)


@pytest.mark.parametrize(
    "scores", [torch.ones(5), torch.ones(2, 0), torch.ones(2, 3, dtype=torch.float64)]
)
def test_argmax_refuses(scores):
    with pytest.raises(ValueError, match="^scores: expected"):
        argmax(scores.to(DEVICE))


def noise_of(scores, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(scores.shape).exponential_(1, generator=generator).to(DEVICE)


@BOTH
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 97), (20, 2048), (2, 50_257)])
def test_sample(rows, size, op):
    scores = random(rows, size) * 3
    scores[:, 1::5] = -torch.inf
    noise, sound = noise_of(scores), torch.tensor(True, device=DEVICE)
    got = (sample if op == "kernel" else reference.sample)(scores, noise.clone(), sound)
    race = scores.double().softmax(-1) / noise
    first, second = race.topk(2).values.T if size > 1 else (race[:, 0], race[:, 0] * 0)
    assert ((first - second) / first > 1e-5).all()  # none is within rounding
    assert got.dtype == torch.int64 and torch.equal(got, race.argmax(-1))
    assert sound


@BOTH
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("row", [0, 1])
def test_sample_notes_what_is_no_probability(row, broken, op):
    scores = random(2, 5000)
    if broken == -torch.inf:
        scores[row] = broken
    else:
        scores[row, 4500] = broken
    sound = torch.tensor(True, device=DEVICE)
    run = sample if op == "kernel" else reference.sample
    assert 0 <= run(scores, noise_of(scores), sound)[row] < 5000
    assert not sound
    run(random(2, 5000), noise_of(scores), sound)
    assert not sound  # it stays


def test_sample_reads_rows_of_any_spacing():
    scores, sound = random(300, 2, 6)[:, 1].T, torch.tensor(True, device=DEVICE)
    noise = noise_of(scores)
    assert torch.equal(sample(scores, noise, sound), sample(scores.contiguous(), noise, sound))
    assert sample(scores[:0], noise[:0], sound).shape == (0,)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scores", torch.ones(2, 3, dtype=torch.float64)),
        ("noise", torch.ones(2, 4)),
        ("noise", torch.ones(3, 2).T),
        ("noise", torch.ones(2, 3, dtype=torch.bfloat16)),
        ("sound", torch.ones(1, dtype=torch.bool)),
        ("sound", torch.tensor(1)),
    ],
)
def test_sample_refuses(name, value):
    given = {"scores": torch.ones(2, 3), "noise": torch.ones(2, 3), "sound": torch.tensor(True)}
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        sample(**{k: v.to(DEVICE) for k, v in (given | {name: value}).items()})


def state(rows, ends, pad, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda high, *shape: torch.randint(high, shape, generator=generator)  # noqa: E731
    wide = torch.full((rows, 9), -1)
    tensors = {
        "chosen": draw(6, rows), "token": torch.full((rows, 1), -1), "ids": wide[:, 1:8],
        "column": torch.tensor([5]), "unfinished": draw(2, rows).bool(),
        "sound": torch.tensor(seed % 2 == 0), "posted": torch.full((3, rows + 2), -1),
        "pad": torch.tensor(77) if pad else None,
        "ends": torch.tensor([ends]) if ends else None,
    }  # fmt: skip
    placed = {name: None if t is None else t.to(DEVICE) for name, t in tensors.items()}
    if DEVICE != "cpu":
        placed["posted"] = tensors["posted"].pin_memory()
    return placed


def posts(got):
    if DEVICE != "cpu":
        torch.cuda.synchronize()  # which reading memory of the host does not
    return got["posted"].tolist()


@BOTH
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("ends", [[], [4], [0, 5, 2], list(range(1, 40))])
@pytest.mark.parametrize("rows", [1, 3, 200])
def test_settle(rows, ends, pad, op):
    got = state(rows, ends, pad, seed=len(ends))
    before = {k: None if v is None else v.clone() for k, v in got.items()}
    (settle if op == "kernel" else reference.settle)(**got)
    ids = before["ids"].clone()
    for row in range(rows):
        unfinished = before["unfinished"][row].item()
        token = before["chosen"][row].item() if unfinished or not pad else 77
        ids[row, 5] = token
        assert got["token"][row].item() == token
        assert got["unfinished"][row].item() == (unfinished and token not in ends)
    assert torch.equal(got["ids"], ids)
    assert got["column"].item() == 6
    said = [got["unfinished"].any().item(), before["sound"].item(), *got["token"][:, 0].tolist()]
    assert posts(got) == [[-1] * (rows + 2), [-1] * (rows + 2), said]  # 5 % 3 == 2


@BOTH
def test_settle_posts_steps_in_turn(op):
    got = state(2, [], False)
    for step in range(4):  # columns 5 to 8; the last takes the place of the first
        got["chosen"].fill_(step)
        wide = got["ids"].new_zeros(2, 9)
        (settle if op == "kernel" else reference.settle)(**got | {"ids": wide})
    assert [post[2] for post in posts(got)] == [1, 2, 3]


def test_settle_of_finished_rows_says_that_nobody_is_alive():
    got = state(5, [1], True)
    got["unfinished"].fill_(False)
    settle(**got)
    assert posts(got)[2] == [0, 1, *[77] * 5]
    assert got["token"].tolist() == [[77]] * 5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("chosen", torch.zeros(3, dtype=torch.int32)),
        ("token", torch.zeros(3, dtype=torch.int64)),
        ("ids", torch.zeros(2, 9, dtype=torch.int64)),
        ("ids", torch.zeros(9, 3, dtype=torch.int64).T),
        ("unfinished", torch.zeros(3, dtype=torch.int8)),
        ("pad", torch.zeros((), dtype=torch.int32)),
        ("chosen", torch.zeros(3, 2, dtype=torch.int64, device=DEVICE)[:, 0]),
        ("token", torch.zeros(3, 2, dtype=torch.int64, device=DEVICE)[:, :1]),
        ("ends", torch.zeros(2, 2, dtype=torch.int64, device=DEVICE)[:, 0]),
        ("column", torch.zeros(2, dtype=torch.int64)),
        ("sound", torch.ones(1, dtype=torch.bool)),
        ("posted", torch.zeros(4, 5)),
        ("posted", torch.zeros(4, 3, dtype=torch.int64)),
        ("posted", torch.zeros(0, 5, dtype=torch.int64)),
        ("posted", torch.zeros(5, 4, dtype=torch.int64, device=DEVICE).T),
    ],
)
def test_settle_refuses(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        settle(**state(3, [1], True) | {name: value.to(DEVICE)})
