"""logit_wave on a CUDA device: large vocabularies, a captured step, and generate()."""

from __future__ import annotations

import pytest
import torch

from patchkit.decoding.cyclic_reflex import CyclicReflex
from tests.decoding.helpers import call, generate, llama, piecewise, prompt
from tests.decoding.test_kernels_logit_wave import DTYPES, check_against_oracle, logit_wave, make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("batch_size", "num_tokens"), [(1, 5), (3, 17), (64, 40)])
def test_kernel_matches_oracle(batch_size, num_tokens, dtype):
    check_against_oracle(batch_size, 151_937, num_tokens, dtype, device="cuda")


def test_captured_step_follows_its_buffers():
    """Replaying one graph walks the wave and closes the gate; nothing is read back on the way."""
    logits, tokens, _, _ = make(2, 513, 5, torch.float32, device="cuda")
    step = torch.zeros(1, dtype=torch.int32, device="cuda")
    ended = torch.zeros(2, dtype=torch.bool, device="cuda")
    recent = torch.full((2, 2), -1, device="cuda")
    end_ids = torch.tensor([4, 5], device="cuda")
    out = logits.clone()
    kwargs = {"amplitude": 3.0, "period": 12, "phase": 0.1, "recent": recent, "end_ids": end_ids}
    logit_wave(out.clone(), tokens, step, ended, **kwargs)  # compile outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(logits)
        logit_wave(out, tokens, step, ended, **kwargs)
        step += 1
    step.zero_()
    for n in range(30):
        if n == 20:
            recent[0] = end_ids
        graph.replay()
        bias = (out - logits)[:, tokens[0]].tolist()
        want = piecewise(n, 3.0, 12, 0.1)
        assert bias == pytest.approx([0.0 if n >= 20 else want, want], abs=1e-5)


def test_generate_counts_kernel_launches():
    model = llama().cuda()
    inputs = {name: tensor.cuda() for name, tensor in prompt(rows=2).items()}
    method = CyclicReflex(amplitude=30, period=8, reflection_tokens=(3, 4), windows=None)
    stand_in = call(model, backend="auto")
    tokens = generate(model, method.logits_processor(stand_in), inputs).sequences
    assert stand_in.backend.calls == {("logit_wave", "triton"): 24}
    specified = method.logits_processor(call(model, backend="reference"))
    assert torch.equal(tokens, generate(model, specified, inputs).sequences)
