"""fastseq::lstm_fwd and lstm_bwd: registration, instruction sets, determinism, threads."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastseq import _native, functional
from fastseq.reference import rnn
from fastseq.testing import assert_results_close, edge_sizes, lstm_case, run_with_grads

if not _native.loaded():
    pytest.skip(str(_native.why_not_loaded()), allow_module_level=True)

DTYPES = {"f32": torch.float32, "f64": torch.float64}
ISAS = _native.available_isas()


@pytest.fixture(autouse=True)
def same_isa() -> Iterator[None]:
    before = _native.isa()
    yield
    _native.set_isa(before)


def run(case, lstm=functional.lstm):
    return run_with_grads(case.functional(lstm), case.inputs, case.cotangents, names=case.names)


def assert_same_bits(found: dict, expected: dict, what: str) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), f"{what}: {name}"


def op_arguments(dtype=torch.float32, *, T=3, B=2, I=4, H=5, D=1, bias=True):  # noqa: E741
    case = lstm_case(T, B, I, H, bidirectional=D == 2, bias=bias, dtype=dtype)
    weights = [case.inputs.get(name) for name in _names("", bias) + _names("_reverse", bias)]
    return [case.inputs["x"], case.inputs["h0"], case.inputs["c0"], *weights]


def _names(side: str, bias: bool) -> list[str]:
    names = [f"weight_ih_l0{side}", f"weight_hh_l0{side}"]
    return names + ([f"bias_ih_l0{side}", f"bias_hh_l0{side}"] if bias else ["none", "none"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(dtype, D, bias):
    inputs = op_arguments(DTYPES[dtype], D=D, bias=bias)
    leaves = [None if t is None else t.clone().requires_grad_() for t in inputs]
    forward = torch.ops.fastseq.lstm_fwd.default
    torch.library.opcheck(forward, (*leaves, None, True))
    torch.library.opcheck(forward, (*inputs, None, False))
    y, h_n, c_n, gates, cells = forward(*inputs, None, True)
    x, h0, c0, w_ih, w_hh, _, _, w_ih_r, w_hh_r, _, _ = inputs
    saved = (x, h0, c0, w_ih, w_hh, w_ih_r, w_hh_r, None, gates, cells)
    for cotangents in ((y, h_n, c_n), (None, h_n, None)):
        for need_dx, need_dw, need_db in ((True, True, True), (False, True, False), (False,) * 3):
            torch.library.opcheck(
                torch.ops.fastseq.lstm_bwd.default,
                (*cotangents, *saved, need_dx, need_dw, need_db, need_dx),
            )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_set_against_reference(isa, dtype):
    """Every remainder of H and of B against each vector width, in each instruction set."""
    edges = sorted({*edge_sizes(4, 8, 16), 31, 32, 33, 49})
    sizes = [(2, 3, 4, h) for h in edges] + [(2, b, 4, 6) for b in edges]
    sizes += [(3, b, i, 17) for b, i in zip(edges, reversed(edges), strict=True)]
    _native.set_isa(isa)
    assert _native.isa() == isa
    for seed, size in enumerate(sizes):
        case = lstm_case(*size, dtype=DTYPES[dtype], seed=seed)
        exact = case.to(torch.float64)
        truth = run(exact, rnn.lstm)
        by_torch = run_with_grads(
            case.module(torch.nn.LSTM), case.inputs, case.cotangents, names=case.names
        )
        assert_results_close(run(case), truth, by_torch, what=f"{isa} {case}")


# Around where tanh saturates, exp becomes denormal, overflows, and its power of two overflows.
EDGES = {
    "f32": [0, 1e-40, 1e-8, 1e-3, 0.1, 0.5, 9, 9.5, 10, 10.5, 43.5, 44.1, 44.5, 80, 87, 87.5]
    + [88, 88.3, 88.5, 88.7, 89, 90, 103, 104, 110, 1e4, 1e30, 1e36],
    "f64": [0, 1e-310, 1e-16, 1e-8, 0.1, 0.5, 18.5, 20, 21, 354, 355, 372, 700, 707, 708.5]
    + [709, 709.3, 709.5, 709.7, 710, 711, 745, 746, 800, 1e4, 1e100, 1e300],
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_at_the_edges_of_exp(isa, dtype):
    """Each gate and the cell through both signs of every edge, the other gates at rest."""
    _native.set_isa(isa)
    edges = torch.tensor(EDGES[dtype], dtype=DTYPES[dtype])
    edges = torch.cat((edges, -edges))
    H = len(edges)
    for target in ("i", "f", "g", "o", "c"):
        case = lstm_case(1, 2, 1, H, dtype=DTYPES[dtype]).map(torch.zeros_like)
        case.inputs["bias_ih_l0"].view(4, H)[:] = 0.5
        case.inputs["c0"].fill_(0.75)
        if target == "c":
            case.inputs["c0"].copy_(edges)
        else:
            case.inputs["bias_ih_l0"].view(4, H)["ifgo".index(target)] = edges
        found, truth = run(case), run(case.to(torch.float64), rnn.lstm)
        by_torch = run_with_grads(
            case.module(torch.nn.LSTM), case.inputs, case.cotangents, names=case.names
        )
        assert_results_close(found, truth, by_torch, what=f"{isa} gate {target}")


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "scalar"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_set_against_scalar(isa, dtype):
    for seed, H in enumerate((1, 15, 16, 33, 70)):
        case = lstm_case(6, 9, 20, H, dtype=DTYPES[dtype], bidirectional=True, seed=seed)
        _native.set_isa("scalar")
        scalar = run(case)
        _native.set_isa(isa)
        truth = run(case.to(torch.float64), rnn.lstm)
        assert_results_close(run(case), truth, scalar, what=f"{isa} {case}")


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
        case = lstm_case(*size, bidirectional=bidirectional)
        torch.set_num_threads(1)
        expected = run(case)
        for threads in (1, 2, 3, 4, 2):
            torch.set_num_threads(threads)
            assert_same_bits(run(case), expected, f"{threads} threads")


@pytest.mark.parametrize("isa", ISAS)
def test_packed_rows_keep_their_bits_for_any_number_of_threads(isa):
    _native.set_isa(isa)
    sizes = torch.tensor([37, 37, 30, 16, 16, 9, 1, 1])
    case = lstm_case(1, 37, 20, 40, bidirectional=True)
    rows = torch.randn(int(sizes.sum()), 20)
    cotangents = [torch.randn(len(rows), 80), *case.cotangents[1:]]
    fn, inputs = case.functional(functional.lstm, batch_sizes=sizes), case.inputs | {"x": rows}
    torch.set_num_threads(1)
    expected = run_with_grads(fn, inputs, cotangents)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert_same_bits(run_with_grads(fn, inputs, cotangents), expected, f"{threads} threads")


def test_inference_gives_the_bits_of_training():
    case = lstm_case(6, 5, 20, 33, num_layers=2)
    fn = case.functional(functional.lstm)
    trained = run(case)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = fn(*case.inputs.values())
        for name, tensor in zip(case.names, found, strict=True):
            assert torch.equal(tensor, trained[name]), (mode, name)


def test_concurrent_calls_do_not_disturb_each_other():
    cases = [lstm_case(9, 7 + i, 20, 24 + i, bidirectional=i % 2 == 1, seed=i) for i in range(4)]
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
