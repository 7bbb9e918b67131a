"""The logit_wave kernel against its reference and a float64 oracle."""

from __future__ import annotations

import itertools

import pytest
import torch

from patchkit.decoding import reference
from tests.decoding.helpers import piecewise

logit_wave = pytest.importorskip("patchkit.decoding.kernels.logit_wave").logit_wave

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the CPU goes through the interpreter
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WAVES = [(3.0, 40, 0.0), (1.0, 7, 0.3), (5.0, 1200, 0.75), (2.5, 1, 0.5), (-3.0, None, 0.0)]


def make(batch_size, vocab_size, num_tokens, dtype, device=DEVICE, seed=0):
    """Draw `(logits, token_ids, step, ended)`; the middle row has ended where there is one."""
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(batch_size, vocab_size, generator=g) * 8).to(device, dtype)
    tokens = torch.randperm(vocab_size, generator=g)[:num_tokens].to(device)
    step = torch.randint(0, 3000, (batch_size,), generator=g).to(device, torch.int32)
    ended = (torch.arange(batch_size) == 1).to(device)
    return logits, tokens, step, ended


def oracle(logits, tokens, step, ended, amplitude, period, phase):
    """Compute the biased logits in float64, with the wave in its piecewise form."""
    out = logits.double().clone()
    steps = step.expand(logits.shape[0]).tolist()
    for row, n in enumerate(steps):
        if not ended[row]:
            bias = amplitude if period is None else piecewise(n, amplitude, period, phase)
            out[row, tokens.long()] += bias
    return out


def check_against_oracle(batch_size, vocab_size, num_tokens, dtype, device=DEVICE):
    """Assert that the kernel is as near to the oracle as the reference, and touches no more."""
    for amplitude, period, phase in WAVES:
        logits, tokens, step, ended = make(batch_size, vocab_size, num_tokens, dtype, device)
        want = oracle(logits, tokens, step, ended, amplitude, period, phase)
        kwargs = {"amplitude": amplitude, "period": period, "phase": phase}
        theirs = reference.logit_wave(logits.clone(), tokens, step, ended, **kwargs)
        ours = logits.clone()
        assert logit_wave(ours, tokens, step, ended, **kwargs) is ours
        error = (ours.double() - want).abs()
        allowed = 2 * (theirs.double() - want).abs().max() + torch.finfo(dtype).eps * 8
        assert error.max() <= allowed
        untouched = torch.ones_like(logits, dtype=torch.bool)
        untouched[:, tokens.long()] = False
        untouched |= ended[:, None]
        assert torch.equal(ours[untouched], logits[untouched])
        if period != 1:  # otherwise the wave may be 0 throughout
            assert not torch.equal(ours, logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(
    ("batch_size", "vocab_size", "num_tokens"),
    list(itertools.product((1, 3), (97, 513), (1, 5, 17))),
    ids=lambda x: str(x),
)
def test_kernel_matches_oracle(batch_size, vocab_size, num_tokens, dtype):
    check_against_oracle(batch_size, vocab_size, num_tokens, dtype)


@pytest.mark.parametrize("impl", [logit_wave, reference.logit_wave], ids=["triton", "reference"])
class TestBoth:
    """What the specification promises, for both implementations."""

    def test_nan_elsewhere_stays(self, impl):
        logits, tokens, step, ended = make(3, 97, 5, torch.float32)
        wanted = torch.zeros_like(logits, dtype=torch.bool)
        wanted[:, tokens] = True
        logits[~wanted] = float("nan")
        out = impl(logits.clone(), tokens, step, ended, amplitude=3.0, period=40)
        assert torch.equal(out.isnan(), ~wanted)

    def test_one_step_serves_all_rows(self, impl):
        logits, tokens, _, ended = make(3, 97, 5, torch.float32)
        one = torch.tensor([13], dtype=torch.int32, device=DEVICE)
        kwargs = {"amplitude": 3.0, "period": 40}
        got = impl(logits.clone(), tokens, one, ended, **kwargs)
        want = impl(logits.clone(), tokens, one.repeat(3), ended, **kwargs)
        assert torch.equal(got, want)
        assert got[0, tokens[0]] == pytest.approx(float(logits[0, tokens[0]]) + 2.1, abs=1e-5)

    @pytest.mark.parametrize("int_dtype", [torch.int32, torch.int64])
    def test_index_dtypes_and_strides(self, impl, int_dtype):
        logits, tokens, step, ended = make(3, 97, 5, torch.float32)
        kwargs = {"amplitude": 3.0, "period": 40}
        want = impl(logits.clone(), tokens, step, ended, **kwargs)
        wide = torch.full((97, 8), float("nan"), device=DEVICE)
        view = wide.t()[1:7:2]  # [3, 97], stride_v = 8
        view.copy_(logits)
        got = impl(view, tokens.to(int_dtype), step.to(int_dtype), ended.to(torch.int8), **kwargs)
        assert torch.equal(got, want)
        assert wide.t()[0::2].isnan().all()

    def test_far_steps_keep_their_low_digits(self, impl):
        """2**24 + 1 is no float32: the modulo must be an integer's."""
        logits, tokens, _, _ = make(1, 97, 1, torch.float32)
        step = torch.tensor([2**24 + 1], dtype=torch.int32, device=DEVICE)
        ended = torch.zeros(1, dtype=torch.bool, device=DEVICE)
        got = impl(torch.zeros_like(logits), tokens, step, ended, amplitude=3.0, period=8)
        assert float(got[0, tokens[0]]) == piecewise(2**24 + 1, 3.0, 8, 0.0) == 1.5

    def test_windows_are_half_open(self, impl):
        logits, tokens, _, _ = make(7, 97, 5, torch.float32)
        step = torch.tensor([0, 2, 3, 5, 8, 9, 20], dtype=torch.int32, device=DEVICE)
        ended = torch.zeros(7, dtype=torch.bool, device=DEVICE)
        windows = torch.tensor([[2, 5], [8, 9]], dtype=torch.int32, device=DEVICE)
        out = impl(logits.clone(), tokens, step, ended, amplitude=2.0, period=None, windows=windows)
        changed = (out != logits).any(1).tolist()
        assert changed == [False, True, True, False, True, False, False]

    @pytest.mark.parametrize("flag", [torch.bool, torch.int8])
    def test_incremental_gate_closes_before_the_bias(self, impl, flag):
        logits, tokens, step, _ = make(5, 97, 5, torch.float32)
        end_ids = torch.tensor([4, 5, 6], device=DEVICE)
        recent = torch.tensor(
            [[4, 5, 6], [4, 5, 7], [-1, -1, 6], [3, 5, 6], [-1, -1, -1]], device=DEVICE
        )
        ended = torch.tensor([0, 0, 0, 0, 1], device=DEVICE).to(flag)
        kwargs = {"amplitude": 2.0, "period": None, "recent": recent, "end_ids": end_ids}
        out = impl(logits.clone(), tokens, step, ended, **kwargs)
        assert ended.bool().tolist() == [True, False, False, False, True]
        assert (out != logits).any(1).tolist() == [False, True, True, True, False]
        # The flag stays up after the sequence has moved out of `recent`.
        kwargs["recent"] = torch.full_like(recent, 9)
        impl(logits.clone(), tokens, step, ended, **kwargs)
        assert ended.bool().tolist() == [True, False, False, False, True]

    def test_minus_infinity_stays(self, impl):
        logits, tokens, step, ended = make(1, 97, 5, torch.float16)
        logits[:, tokens] = float("-inf")
        out = impl(logits, tokens, step, ended, amplitude=3.0, period=None)
        assert (out[:, tokens] == float("-inf")).all()


def test_kernel_refuses_what_does_not_fit():
    logits, tokens, step, ended = make(3, 97, 5, torch.float32)
    wave = {"amplitude": 1.0, "period": 40}
    bad = [
        ((logits[0], tokens, step, ended), {}, "logits"),
        ((logits, tokens[:0], step, ended), {}, "token_ids"),
        ((logits, tokens, step[:2], ended), {}, "step"),
        ((logits, tokens, step, ended[:2]), {}, "ended"),
        ((logits, tokens, step, ended.float()), {}, "ended"),
        ((logits, tokens, step, ended), {"windows": step}, "windows"),
        ((logits, tokens, step, ended), {"end_ids": tokens}, "belong together"),
        ((logits, tokens, step, ended), {"end_ids": tokens, "recent": step[:, None]}, "recent"),
        ((logits.clone().requires_grad_(), tokens, step, ended), {}, "detach"),
    ]
    for args, kwargs, message in bad:
        with pytest.raises(ValueError, match=message):
            logit_wave(*args, **wave, **kwargs)


def test_empty_batch():
    logits, tokens, step, ended = make(3, 97, 5, torch.float32)
    out = logit_wave(logits[:0], tokens, step[:0], ended[:0], amplitude=1.0, period=4)
    assert out.shape == (0, 97)
