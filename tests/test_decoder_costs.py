"""What a decoder with attention costs: memory and work grow with S, T and B, not with a product."""

from __future__ import annotations

import itertools
import time
from functools import partial

import pytest
import torch

from fastseq import _native, functional
from fastseq.models import attention as fast_house
from fastseq.reference import attention as reference_house
from fastseq.testing import run_with_grads
from fastseq.testing_decoder import decoder_case

pytestmark = pytest.mark.skipif(not _native.loaded(), reason=str(_native.why_not_loaded()))
SIZES = {"B": 4, "S": 32, "T": 24}


def step(**sizes):
    case = decoder_case("gru", E=16, H=24, K=48, C=24, **SIZES | sizes)
    return partial(run_with_grads, case.function(functional), case.inputs, case.cotangents)


@pytest.mark.parametrize("extent", SIZES)
def test_time_is_linear(extent):
    """Eight times as long at most for four times as much: a square would take sixteen."""
    torch.set_num_threads(1)
    calls = [step(), step(**{extent: 4 * SIZES[extent]})]
    least = [float("inf")] * 2
    for _ in range(7):
        for i, call in enumerate(calls):
            start = time.thread_time()
            call()
            least[i] = min(least[i], time.thread_time() - start)
    assert least[1] < 8 * least[0], least


def peak(call) -> int:
    """Most bytes held at once beyond those before."""
    call()
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events), default=0)


@pytest.mark.parametrize("extent", SIZES)
def test_memory_is_linear(extent):
    held = [peak(step(**{extent: n * SIZES[extent]})) for n in (1, 2, 4)]
    # The third size adds what twice the step from the first to the second does.
    assert held[2] - held[1] <= 2.1 * (held[1] - held[0])


def test_a_training_step_holds_a_quarter_of_the_references():
    V, E, H, B, S = 300, 32, 128, 8, 40
    src, trg = torch.randint(V, (B, S)), torch.randint(V, (B, S))
    held = []
    for house in (fast_house, reference_house):
        decoder = house.Decoder(V, E, H, house.Attention(H))
        model = house.Seq2Seq(house.Encoder(V, E, H), decoder)
        parameters = list(model.parameters())

        def run(model=model, parameters=parameters):
            logits = model(src, trg, 1.0)[:, 1:]
            return torch.autograd.grad(logits.square().sum(), parameters)

        held.append(peak(run))
    assert held[0] <= held[1] / 4, held
