"""fastseq::recurrent_fwd and recurrent_bwd: registration, instruction sets, bits, threads, fork."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from fastseq import _native
from fastseq.functional.rnn import as_matrix
from fastseq.testing import (
    assert_matches,
    edge_sizes,
    recurrent_case,
    run_with_grads,
)
from tests.fuzz_recurrent import ours, yardstick

if not _native.loaded():
    pytest.skip(str(_native.why_not_loaded()), allow_module_level=True)

DTYPES = {"f32": torch.float32, "f64": torch.float64}
ISAS = _native.available_isas()
CELLS = sorted({cell.reference for cell in _native.cells().values()})


@pytest.fixture(autouse=True)
def same_isa() -> Iterator[None]:
    before = _native.isa()
    yield
    _native.set_isa(before)


def run(case, **more):
    return run_with_grads(ours(case, **more), case.inputs, case.cotangents, names=case.names)


def with_isa(isa, fn):
    """The function on that instruction set, and its backward pass too: it is set until another."""

    def call(*inputs):
        _native.set_isa(isa)
        return fn(*inputs)

    return call


def check(case, what=""):
    arguments = (case.inputs, case.cotangents)
    assert_matches(
        ours(case),
        case.reference(),
        yardstick(case),
        *arguments,
        names=case.names,
        what=f"{what} {case}",
    )


def assert_same_bits(found: dict, expected: dict, what: str) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), f"{what}: {name}"


VARIANTS = {
    "plain": {},
    "both directions": dict(bidirectional=True),
    "no bias": dict(bias=False, bidirectional=True),
    "no state": dict(hx=False),
    "lengths": dict(lengths=[3, 0, 2], bidirectional=True),
    "packed": dict(lengths=[3, 1, 2], bidirectional=True),
    "resets": dict(resets=0.3, bidirectional=True),
    "projected": dict(proj_size=2, bidirectional=True),
}


def op_arguments(name: str, variant: str, dtype=torch.float32) -> list:
    """Of recurrent_fwd, all but save."""
    cell = _native.cells()[name]
    case = recurrent_case(cell.reference, 3, 3, 4, 5, dtype=dtype, **VARIANTS[variant])
    case = case.packed() if variant == "packed" else case
    both, bias = case.options["bidirectional"], case.options["bias"]
    x = case.inputs["x"].nan_to_num()
    weights = [w for n, w in case.inputs.items() if n.startswith(("weight", "bias"))]
    weights = as_matrix(cell.reference, weights, bias, 1 + both)
    widths = (weights[1].shape[1], 5)[: cell.masks] * (1 + both)
    masks = [(torch.rand(*x.shape[:-1], width) < 0.3).to(dtype) for width in widths]
    states = [case.inputs.get(n) for n in ("h0", "c0")]
    extras = [case.keywords.get(n) for n in ("batch_sizes", "lengths", "resets")]
    return [cell.number, x, *states, weights, bias, 1 + both, *extras, masks]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cell", _native.cells())
def test_opcheck(cell, variant):
    known = _native.cells()[cell]
    if variant == "projected" and known.states == 1:
        pytest.skip("no such projection")
    forward, backward = torch.ops.fastseq.recurrent_fwd, torch.ops.fastseq.recurrent_bwd
    for dtype in DTYPES.values() if variant == "plain" else (torch.float32,):
        arguments = op_arguments(cell, variant, dtype)
        torch.library.opcheck(forward, (*arguments, False))
        number, x, h0, c0, weights, *rest = arguments
        leaves = [None if t is None else t.clone().requires_grad_() for t in (x, h0, c0)]
        own = [w.clone().requires_grad_() for w in weights]
        # One configuration of autograd for each cell; the fakes are what varies with the variant.
        tests = ["test_schema", "test_faketensor"]
        tests += ["test_aot_dispatch_dynamic", "test_autograd_registration"] * (variant == "plain")
        torch.library.opcheck(forward, (number, *leaves, own, *rest, True), test_utils=tests)
        *outputs, saved = forward(*arguments, True)
        y, h_n, c_n = (*outputs, None)[:3]
        given = h0 is not None
        for cotangents in ((y, h_n, c_n), (None, h_n, None)):
            for dx, dw, db in ((True, True, True), (False, True, False), (False,) * 3):
                need = (dx, dw, db and arguments[5], dx and given)
                full = (number, *cotangents, x, h0, c0, weights, *rest, saved, *need)
                torch.library.opcheck(backward, full, test_utils=["test_schema", "test_faketensor"])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_set_against_reference(isa, dtype, cell):
    """Every remainder of H and of B against each vector width, in each instruction set."""
    edges = sorted({*edge_sizes(4, 8, 16), 31, 32, 33, 49})
    if cell != "lstm":
        edges = [1, 7, 8, 15, 16, 17, 33, 49]
    sizes = [(2, 3, 4, h) for h in edges] + [(2, b, 4, 6) for b in edges]
    sizes += [(3, b, i, 17) for b, i in zip(edges, reversed(edges), strict=True)]
    _native.set_isa(isa)
    assert _native.isa() == isa
    for seed, size in enumerate(sizes):
        check(recurrent_case(cell, *size, dtype=DTYPES[dtype], seed=seed), isa)


@pytest.mark.parametrize("isa", ISAS)
def test_projected_instruction_set_against_reference(isa):
    _native.set_isa(isa)
    for cell in ("lstm", "peephole_lstm"):
        for H, P in ((2, 1), (9, 8), (17, 15), (33, 16), (40, 17), (49, 48)):
            check(recurrent_case(cell, 3, 5, 4, H, proj_size=P, bidirectional=True, seed=H), isa)


# Around where tanh saturates, exp becomes denormal, overflows, and its power of two overflows.
EDGES = {
    "f32": [0, 1e-40, 1e-8, 1e-3, 0.1, 0.5, 9, 9.5, 10, 10.5, 43.5, 44.1, 44.5, 80, 87, 87.5]
    + [88, 88.3, 88.5, 88.7, 89, 90, 103, 104, 110, 1e4, 1e30, 1e36],
    "f64": [0, 1e-310, 1e-16, 1e-8, 0.1, 0.5, 18.5, 20, 21, 354, 355, 372, 700, 707, 708.5]
    + [709, 709.3, 709.5, 709.7, 710, 711, 745, 746, 800, 1e4, 1e100, 1e300],
}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_at_the_edges_of_exp(isa, dtype, cell):
    """Each gate and the cell through both signs of every edge, the other gates at rest."""
    _native.set_isa(isa)
    edges = torch.tensor(EDGES[dtype], dtype=DTYPES[dtype])
    edges = torch.cat((edges, -edges))
    gates, H = {"gru": 3, "rnn_tanh": 1, "rnn_relu": 1}.get(cell, 4), len(edges)
    for target in [*range(gates), *(["c0"] if gates == 4 else ["h0"] * (gates == 3))]:
        case = recurrent_case(cell, 1, 2, 1, H, dtype=DTYPES[dtype]).map(torch.zeros_like)
        case.inputs["bias_ih_l0"].view(gates, H)[:] = 0.5
        if gates == 4:
            case.inputs["c0"].fill_(0.75)
        if isinstance(target, str):
            # A state enters products with gradients: none that overflows in any order of them.
            bounded = edges if cell == "lstm" else edges.clamp(-1e15, 1e15)
            case.inputs[target].copy_(bounded)
        else:
            case.inputs["bias_ih_l0"].view(gates, H)[target] = edges
        check(case, f"{isa} gate {target}")


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "scalar"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_set_against_scalar(isa, dtype, cell):
    for seed, H in enumerate((1, 15, 16, 33, 70)):
        case = recurrent_case(cell, 6, 9, 20, H, dtype=DTYPES[dtype], bidirectional=True, seed=seed)
        assert_matches(
            with_isa(isa, ours(case)),
            case.reference(),
            with_isa("scalar", ours(case)),
            case.inputs,
            case.cotangents,
            names=case.names,
            what=f"{isa} {case}",
        )


def test_an_unknown_instruction_set_is_refused():
    before = _native.isa()
    with pytest.raises(ValueError, match="expected one of .*scalar.* got 'sse9'"):
        _native.set_isa("sse9")
    assert _native.isa() == before


SHAPES = [(7, 33, 20, 40), (5, 1, 64, 96), (20, 6, 9, 130), (1, 64, 16, 32), (3, 130, 65, 64)]
# Batches that threads split into parts of unequal height.
SHAPES += [(3, B, 20, 40) for B in (5, 12, 16, 17, 25, 37)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", SHAPES, ids=str)
def test_same_bits_for_any_number_of_threads_and_every_run(size, isa):
    _native.set_isa(isa)
    for bidirectional in (False, True):
        case = recurrent_case("lstm", *size, bidirectional=bidirectional)
        assert_same_bits_for_threads(case, (1, 2, 3, 4, 2))


def assert_same_bits_for_threads(case, counts=(1, 2, 3), **more):
    torch.set_num_threads(1)
    expected = run(case, **more)
    for threads in counts:
        torch.set_num_threads(threads)
        assert_same_bits(run(case, **more), expected, f"{threads} threads {case}")


# Of x, of a matrix, of a bias, and -1 of the initial state (an LSTM's h).
WANTED = [(0,), (1,), (4,), (0, -1), (-1,), (2, 3)]


def assert_same_bits_for_wanted(module, T, B, wanted):
    """The gradients that a call wants are those of a call that wants all."""
    directions = 2 if module.bidirectional else 1
    h0 = torch.randn(directions, B, module.hidden_size)
    leaves = [torch.randn(T, B, module.input_size), *module.parameters(), h0]

    def grads(which):
        for leaf in leaves:
            leaf.requires_grad_(False)
        for i in which:
            leaves[i].requires_grad_()
        hx = (h0, torch.zeros_like(h0)) if module.mode == "LSTM" else h0
        y = module(leaves[0], hx)[0]
        found = torch.autograd.grad(y.square().sum(), [leaves[i] for i in which])
        return dict(zip(which, found, strict=True))

    everything = grads([*range(len(leaves) - 1), -1])
    assert_same_bits(grads(wanted), {i: everything[i] for i in wanted}, f"{module} {wanted}")


FORMS = {
    "padded": {},
    "lengths": dict(lengths=[4, 0, 1, 6, 6] * 7),
    "packed": dict(lengths=[4, 2, 1, 6, 6] * 7),
    "resets": dict(resets=0.3),
    "projected": dict(proj_size=17),
    "no state, stacked": dict(hx=False, num_layers=2, bias=False),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_for_any_number_of_threads_in_every_form(isa, cell, form):
    if form == "projected" and "lstm" not in cell:
        pytest.skip("no such projection")
    _native.set_isa(isa)
    for both in (False, True):
        case = recurrent_case(cell, 6, 35, 20, 40, bidirectional=both, **FORMS[form])
        assert_same_bits_for_threads(case.packed() if form == "packed" else case)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_zoneout_keeps_its_bits_for_any_number_of_threads(cell):
    case = recurrent_case(cell, 6, 35, 20, 40, bidirectional=True, lengths="random")
    assert_same_bits_for_threads(case, zoneout=0.3)


# Of its neighbours a row sees nothing: how many, which, how long, what they hold.
@pytest.mark.parametrize("form", ["padded", "lengths", "resets"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_of_a_row_whatever_its_neighbours(isa, cell, form):
    _native.set_isa(isa)
    B, T = 23, 5
    options = {"padded": {}, "lengths": dict(lengths="random"), "resets": dict(resets=0.3)}[form]
    case = recurrent_case(cell, T, B, 7, 33, bidirectional=True, **options)
    everything = run(case)
    per_row = [*case.names, "grad x", "grad h0", *(["grad c0"] if "c0" in case.inputs else [])]

    def some(rows) -> dict:
        states = ("x", "h0", "c0")
        inputs = {n: t[:, rows] if n in states else t for n, t in case.inputs.items()}
        picks = {"lengths": lambda t: t[rows], "resets": lambda t: t[:, rows]}
        keywords = {n: picks[n](t) for n, t in case.keywords.items()}
        cotangents = [c[:, rows] for c in case.cotangents]
        return run(replace(case, inputs=inputs, cotangents=cotangents, keywords=keywords))

    for rows in ([0], [22], [3, 4], list(range(22, -1, -1)), list(range(1, 18)), [7] * 9):
        found = some(rows)
        for name in per_row:
            assert torch.equal(found[name], everything[name][:, rows]), f"rows {rows}: {name}"


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_saved_past_the_caches_is_what_backward_reads(dtype, cell):
    """More than 4 MiB goes there (forward.inl): that of all rows does, that of three does not."""
    B = 48
    case = recurrent_case(cell, 180, B, 5, 128, dtype=DTYPES[dtype])
    everything = run(case)
    states = ("x", "h0", "c0")
    for rows in (slice(0, 3), slice(B - 3, B)):
        inputs = {n: t[:, rows] if n in states else t for n, t in case.inputs.items()}
        found = run(replace(case, inputs=inputs, cotangents=[c[:, rows] for c in case.cotangents]))
        for name in (*case.names, *(f"grad {n}" for n in states if n in case.inputs)):
            assert torch.equal(found[name], everything[name][:, rows]), f"rows {rows}: {name}"


@pytest.mark.parametrize("cell", CELLS)
def test_inference_gives_the_bits_of_training(cell):
    case = recurrent_case(cell, 6, 5, 20, 33, num_layers=2, bidirectional=True)
    fn, trained = ours(case), run(case)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = fn(*case.inputs.values())
        for name, tensor in zip(case.names, found, strict=True):
            assert torch.equal(tensor, trained[name]), (mode, name)


def test_concurrent_calls_do_not_disturb_each_other():
    cells = ("lstm", "gru", "rnn_tanh", "peephole_lstm")
    cases = [
        recurrent_case(cell, 9, 7 + i, 20, 24 + i, bidirectional=i % 2 == 1, seed=i)
        for i, cell in enumerate(cells)
    ]
    expected = [run(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            for case, found, want in zip(cases, pool.map(run, cases), expected, strict=True):
                assert_same_bits(found, want, str(case))


@pytest.mark.parametrize("threads", [1, 2])
def test_after_fork(threads):
    """A forked child runs on one thread, whether or not the parent had used more."""
    program = f"""
        import os, sys
        import torch
        from fastseq import functional
        from fastseq.testing import lstm_case, run_with_grads

        torch.set_num_threads({threads})
        case = lstm_case(6, 40, 20, 48)
        def run():
            return run_with_grads(case.functional(functional.lstm), case.inputs, case.cotangents)
        expected = run()
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            same = all(torch.equal(t, expected[name]) for name, t in run().items())
            os._exit(0 if same else 3)
        _, status = os.waitpid(child, 0)
        sys.exit(os.waitstatus_to_exitcode(status))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()
