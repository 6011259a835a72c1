"""The recurrent kernels of csrc/cuda on a GPU: run by `make gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import fastseq
from fastseq import functional, nn
from fastseq.ops import decoder_cuda, measured_cuda, recurrent_cuda
from fastseq.ops.recurrent_cuda import GRID, STEP, WHOLE
from fastseq.testing import (
    TF32Products,
    allow_tf32,
    assert_matches,
    recurrent_case,
    run_with_grads,
)
from fastseq.testing_decoder import decoder_case
from tests.cuda.test_recurrent import FORMS, IDS, RUNS, STEP_CELLS, WHOLE_CELLS
from tests.fuzz_recurrent import ours, with_zoneout, yardstick
from tests.test_functional_decoder import ORDERS
from tests.test_functional_decoder import check as check_decoder
from tests.test_functional_rnn_calls import SPECIALS

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
WIDTHS = {STEP: (5, 64, 200), WHOLE: (5, 64, 100), GRID: (5, 64, 200)}


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with fastseq.use_backend("cuda"), allow_tf32(False):
        yield
    recurrent_cuda.way = recurrent_cuda.ANY_WAY


def moved(case):
    return case.on("cuda")


def case_of(cell, form, H, dtype=torch.float32, B=5, T=6):
    case = recurrent_case(cell, T, B, 4, H, dtype=dtype, **FORMS[form])
    return moved(case.packed() if "packed" in form else case)


def check(case, way):
    recurrent_cuda.way = way
    assert_matches(
        ours(case),
        case.reference(),
        yardstick(case),
        case.inputs,
        case.cotangents,
        names=case.names,
        what=f"{('any way', 'step', 'whole', 'grid')[way]} {case}",
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way, cell", RUNS, ids=IDS)
def test_small(way, cell, form):
    check(case_of(cell, form, 8), way)


@pytest.mark.parametrize("form", ["both directions", "resets, lengths", "packed"])
@pytest.mark.parametrize("way, cell", RUNS, ids=IDS)
def test_sanitized(way, cell, form):
    """For compute-sanitizer: our kernels alone, each with rows of four units and of odd ones."""
    recurrent_cuda.way = way
    for H, dtype in ((8, torch.float32), (33, torch.bfloat16)):
        case = case_of(cell, form, H, dtype)
        found = run_with_grads(ours(case), case.inputs, case.cotangents, names=case.names)
        assert found
    torch.cuda.synchronize()


@pytest.mark.parametrize("cell, zoneout", [("lstm", 0.2), ("layer_norm_lstm", None)])
def test_sanitized_projections(cell, zoneout):
    """Among the steps, by a kernel of their own."""
    for H, P, dtype in ((8, 4, torch.float32), (33, 9, torch.bfloat16)):
        case = recurrent_case(cell, 4, 3, 4, H, proj_size=P, dtype=dtype, bidirectional=True)
        case = moved(case)
        fn = ours(case, zoneout=zoneout, train=True) if zoneout else ours(case)
        assert run_with_grads(fn, case.inputs, case.cotangents, names=case.names)
    torch.cuda.synchronize()


@pytest.mark.parametrize("order", ORDERS)
def test_sanitized_decoder(order):
    """The loop as it is, without a graph."""
    case = decoder(order)
    for name in ("forward", "backward"):
        decoder_cuda.GRAPHS[name].clear()
    outputs = case.function(functional)
    assert run_with_grads(outputs, case.inputs, case.cotangents, names=case.names)
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way, cell", RUNS, ids=IDS)
def test_against_the_reference(way, cell, form, dtype):
    for H in WIDTHS[way]:
        check(case_of(cell, form, H, DTYPES[dtype]), way)


@pytest.mark.parametrize("form", ["both directions", "resets, lengths", "packed"])
@pytest.mark.parametrize("way, cell", RUNS, ids=IDS)
def test_products_in_tf32(way, cell, form):
    """By the user's switch: as far from float64 as TF32 allows, and no further."""
    recurrent_cuda.way = way
    for H in (64, 96):
        case = case_of(cell, form, H)
        with allow_tf32(True):
            assert_matches(
                ours(case), case.reference(), case.reference(), case.inputs, case.cotangents,
                names=case.names, what=str(case), baseline_under=TF32Products,
            )  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", STEP_CELLS)
def test_float64(cell, form):
    check(case_of(cell, form, 33, torch.float64), STEP)


@pytest.mark.parametrize("form", ["padded", "resets, lengths", "resets, packed", "stacked"])
@pytest.mark.parametrize("way, cell", [run for run in RUNS if "lstm" in run[1]], ids=str)
def test_projections(way, cell, form):
    for H, P, dtype in ((33, 5, torch.float32), (64, 16, torch.float32), (64, 16, torch.bfloat16)):
        options = dict(proj_size=P, dtype=dtype, **FORMS[form])
        case = recurrent_case(cell, 6, 5, 4, H, **options)
        check(moved(case.packed() if "packed" in form else case), way)


@pytest.mark.parametrize("form", ["padded", "resets, lengths", "resets, packed", "stacked"])
@pytest.mark.parametrize("cell, P", [("lstm", 0), ("lstm", 16), ("gru", 0)])
def test_zoneout(cell, P, form):
    """Without draws, which would have to be the same on both sides."""
    pair = (0.3, 0.2) if cell == "lstm" else (0.3,)
    case = recurrent_case(cell, 6, 5, 4, 32, proj_size=P, **FORMS[form])
    case = moved(case.packed() if "packed" in form else case)
    fn = ours(case, zoneout=pair if cell == "lstm" else 0.3, train=False)
    with torch.device("cuda"):
        reference = with_zoneout(case, pair, False)
        assert_matches(
            fn, reference, reference, case.inputs, case.cotangents, names=case.names, what=str(case)
        )


def test_rows_that_are_normalised_in_more_than_48_kilobytes():
    check(moved(recurrent_case("layer_norm_lstm", 4, 3, 8, 2000, lengths="random")), STEP)


def test_lengths_of_the_host():
    layer = nn.GRU(16, 64).cuda()
    x, lengths = torch.randn(7, 5, 16, device="cuda"), torch.tensor([7, 3, 0, 1, 7])
    assert torch.equal(layer(x, lengths=lengths)[0], layer(x, lengths=lengths.cuda())[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x, lengths=lengths)
        layer(torch.nn.utils.rnn.PackedSequence(x.flatten(0, 1), torch.tensor([5] * 7)))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("way, cell", RUNS, ids=IDS)
def test_special_values_as_in_the_reference(way, cell):
    recurrent_cuda.way = way
    for name, (which, change) in SPECIALS.items():
        case = recurrent_case(cell, 5, 3, 4, 21).map(torch.clone)
        if which not in case.inputs:
            continue
        change(case.inputs[which])
        case = moved(case)
        normalised = cell == "layer_norm_lstm"
        # torch's layer_norm, and cuDNN, make NaN of huge values.
        cotangents = [] if "huge" in name else [case.cotangents]
        assert_matches(
            ours(case), case.reference(), case.reference() if normalised else yardstick(case),
            case.inputs, *cotangents, names=case.names, what=f"{name} {case}",
        )  # fmt: skip


@pytest.mark.parametrize("way, cell", RUNS, ids=IDS)
def test_many_rows_and_steps(way, cell):
    case = moved(recurrent_case(cell, 50, 300, 16, 96, lengths="random", bidirectional=True))
    check(case, way)


@pytest.mark.parametrize("T, B, H", [(20, 64, 512), (6, 16, 1000), (300, 3, 320)])
@pytest.mark.parametrize("cell", WHOLE_CELLS)
def test_a_grid_as_large_as_the_device(cell, T, B, H):
    check(moved(recurrent_case(cell, T, B, 16, H, lengths="random")), GRID)


def test_a_grid_that_does_not_fit_runs_step_by_step():
    check(moved(recurrent_case("lstm", 3, 4, 16, 3000)), recurrent_cuda.ANY_WAY)
    with pytest.raises(RuntimeError, match="that fit the device at once"):
        check(moved(recurrent_case("lstm", 3, 4, 16, 3000)), GRID)


def test_grids_on_two_streams_at_once():
    """Both want the whole device: one waits for the other, and neither for itself."""
    recurrent_cuda.way = GRID
    layer = nn.LSTM(16, 512).cuda()
    x = torch.randn(50, 64, 16, device="cuda")
    with torch.no_grad():
        expected = layer(x)[0]
        streams = [torch.cuda.Stream() for _ in range(2)]
        torch.cuda.synchronize()
        found = []
        for stream in streams * 5:
            with torch.cuda.stream(stream):
                found.append(layer(x)[0])
        torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in found)


@pytest.mark.parametrize("way, cell", RUNS, ids=IDS)
def test_every_run_gives_the_same_bits(way, cell):
    case = case_of(cell, "resets, lengths", 96, T=6)
    recurrent_cuda.way = way
    runs = [
        run_with_grads(ours(case), case.inputs, case.cotangents, names=case.names) for _ in range(5)
    ]
    for found in runs[1:]:
        assert all(torch.equal(found[name], tensor) for name, tensor in runs[0].items())


@pytest.mark.parametrize("way", [STEP, WHOLE, GRID])
def test_a_training_step_in_a_graph_on_another_stream(way):
    recurrent_cuda.way = way
    layer = nn.LSTM(16, 64, 2, bidirectional=True).cuda()
    x = torch.randn(7, 5, 16, device="cuda", requires_grad=True)
    parameters = [x, *layer.parameters()]

    def run():
        y, (h, c) = layer(x)
        return [y, *torch.autograd.grad((y.sum() + h.sum() + c.square().sum()), parameters)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = [t.clone() for t in run()]
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("form", ["packed", "resets, lengths"])
@pytest.mark.parametrize("cell, P", [("lstm", 0), ("gru", 0), ("layer_norm_lstm", 4)])
def test_what_the_host_alone_knows_is_kept_by_a_graph(cell, P, form):
    """The sizes of a packed sequence, and lengths that were given on the host."""
    case = recurrent_case(cell, 6, 5, 4, 16, proj_size=P, **FORMS[form])
    case = moved(case.packed() if form == "packed" else case)
    if form != "packed":
        case.keywords["lengths"] = case.keywords["lengths"].cpu()

    def run():
        return run_with_grads(ours(case), case.inputs, case.cotangents, names=case.names)

    expected = run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(captured[name], t) for name, t in expected.items())
        # Of the replay, not of the capture.
        for t in captured.values():
            t.fill_(float("nan"))


def decoder(order, **options):
    case = decoder_case("lstm", T=6, B=4, S=9, H=32, C=24, masked=True, **options, **ORDERS[order])
    options = {n: t.cuda() if torch.is_tensor(t) else t for n, t in case.options.items()}
    if options.get("output"):
        options["output"] = tuple(t.cuda() for t in options["output"])
    return replace(
        case,
        inputs={name: t.cuda() for name, t in case.inputs.items()},
        options=options,
        cotangents=[c.cuda() for c in case.cotangents],
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "options", [{}, {"L": 2}, {"forced": (True, False, True, True, True, False)}]
)
def test_a_decoder_as_it_is_captured_and_replayed(order, options):
    for graphs in decoder_cuda.GRAPHS.values():
        graphs.clear()
    for seed in range(3):
        check_decoder(decoder(order, seed=seed, **options))
        graphs = decoder_cuda.GRAPHS.values()
        assert not any(graph.refused for graph in graphs)
        assert all(len(graph) == (seed > 0) for graph in graphs)


def test_decoders_on_two_streams_at_once():
    """Each graph has memory of its own, that of its products among it: both run as if alone."""
    case = decoder_case("lstm", T=24, B=32, S=40, H=256, C=256, E=128, masked=True)
    case = replace(case, inputs={name: t.cuda() for name, t in case.inputs.items()},
                   options={n: t.cuda() if torch.is_tensor(t) else t
                            for n, t in case.options.items()})  # fmt: skip
    for graphs in decoder_cuda.GRAPHS.values():
        graphs.clear()

    def run(scale):
        tensors = [t * scale if t.is_floating_point() else t for t in case.inputs.values()]
        return case.function(functional)(*tensors)[0]

    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    with torch.no_grad():
        expected = []
        for scale, stream in enumerate(streams, 1):
            with torch.cuda.stream(stream):
                # As it is, captured, and replayed alone.
                expected.append([run(scale) for _ in range(3)][-1].clone())
            torch.cuda.synchronize()
        found = []
        for _ in range(20):
            for scale, stream in enumerate(streams, 1):
                with torch.cuda.stream(stream):
                    found.append((scale, run(scale)))
        torch.cuda.synchronize()
    assert len(decoder_cuda.GRAPHS["forward"]) == 2
    assert all(torch.equal(y, expected[scale - 1]) for scale, y in found)


def test_a_layer_under_autocast():
    layer, x = nn.LSTM(16, 64).cuda(), torch.randn(7, 5, 16, device="cuda")
    with torch.autocast("cuda", torch.float16):
        y, (h, c) = layer(x)
        with fastseq.use_backend("torch"):
            theirs = layer(x)[0]
    assert {y.dtype, h.dtype, c.dtype} == {torch.float16} and theirs.dtype == y.dtype
    y.float().sum().backward()
    assert layer.weight_hh_l0.grad.dtype == torch.float32
    torch.testing.assert_close(y, layer.half()(x.half())[0])


def test_a_decoder_does_not_wait_once_captured():
    case = decoder("before")
    leaves = [t.requires_grad_() for t in case.inputs.values()]

    def run():
        out = case.function(functional)(*leaves)
        return torch.autograd.grad(out, leaves, case.cotangents)

    for _ in range(2):
        run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_waits_for_the_device():
    layer = nn.GRU(16, 64).cuda()
    x = torch.randn(7, 5, 16, device="cuda")
    lengths = torch.tensor([7, 3, 0, 1, 7], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x, lengths=lengths)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_double_backward():
    layer = nn.LSTM(3, 5).cuda().double()
    x = torch.randn(4, 2, 3, device="cuda", dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], (x,))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_another_device_than_the_current():
    layer = nn.LSTM(3, 5).to("cuda:1")
    x = torch.randn(4, 2, 3, device="cuda:1")
    found = layer(x)[0]
    with fastseq.use_backend("torch"):
        torch.testing.assert_close(found, layer(x)[0])


def test_explain_names_the_kernels_and_why_they_are_not_the_default():
    layer = nn.LSTM(3, 5).cuda()
    x = torch.randn(4, 2, 3, device="cuda")
    assert fastseq.explain(layer, x).backend == "cuda"
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        original = torch.ops.fastseq.recurrent_cuda_fwd
        record = lambda *args: taken.append(original(*args))  # noqa: E731
        patch.setattr(torch.ops.fastseq, "recurrent_cuda_fwd", record)
        for H in (5, 200, 3000):
            layer = nn.LSTM(3, H).cuda()
            layer(x)
            assert f"`{recurrent_cuda.NAMES[taken[-1]]}`" in fastseq.explain(layer, x).reason
    with fastseq.use_backend("auto"):
        found = fastseq.explain(layer, x)
    if torch.cuda.get_device_name() not in measured_cuda.TABLE:
        assert found.backend == "torch" and "not yet measured" in found.reason
