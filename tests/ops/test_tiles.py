"""Float32 products by AMX's bfloat16 tiles, on its emulation: what torch's switches of precision
permit. The instructions themselves are run by tiles_trapped.cpp."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastseq
from fastseq import _native, doctor, functional, nn
from fastseq.testing import (
    assert_lowered_close,
    assert_sums_lowered_close,
    recurrent_case,
    run_with_grads,
)
from tests.cuda.on_host import COMPILER
from tests.ops.test_recurrent import assert_same_bits, run

if not _native.loaded() or _native.isa() != "avx512" or _native.eager is None:
    reason = "tiles need the AVX-512 kernels, and what reads torch's switches"
    pytest.skip(reason, allow_module_level=True)

CELLS = ["lstm", "gru", "rnn_tanh", "peephole_lstm", "layer_norm_lstm"]


@pytest.fixture(autouse=True)
def emulated() -> Iterator[None]:
    before = _native.tiles()
    _native.set_tiles("emulated")
    yield
    _native.set_tiles(before)


def allow(precision: str) -> None:
    """By the switch that all products share; conftest.py sets it back."""
    torch.set_float32_matmul_precision(precision)


def under(precision: str, fn, *args, **kwargs):
    allow(precision)
    try:
        return fn(*args, **kwargs)
    finally:
        allow("highest")


def truth(case) -> dict:
    """Of the reference in float64."""
    exact = case.to(torch.float64)
    return run_with_grads(exact.reference(), exact.inputs, exact.cotangents, names=case.names)


def check(case) -> dict:
    expected, plain = truth(case), run(case)
    for precision in ("high", "medium"):
        found = under(precision, run, case)
        assert_lowered_close(found, expected, precision, what=f"{case} {precision}")
        # It is by tiles that they are made.
        assert any(not torch.equal(found[name], plain[name]) for name in plain), precision
    return plain


def bfloat16_bits(t: torch.Tensor) -> torch.Tensor:
    return t.to(torch.bfloat16).view(torch.int16)


def flushed(t: torch.Tensor) -> torch.Tensor:
    return torch.where(t.abs() < torch.finfo(torch.float32).tiny, t * 0, t)


def test_the_instruction_as_its_manual_has_it():
    """Even k, odd k, their sum, the sum so far, each rounded; of a product of bfloat16, exact in
    float32, a multiply-add is the rounded sum."""
    a, b = torch.randn(16, 32), torch.randn(32, 16)
    # Denormals beside what would make them count, and sums that are.
    a[3], b[:, 5], a[4], b[:, 7] = 1e-39, 1e10, 3e-20, 2e-20
    a, b = (t.to(torch.bfloat16).float() for t in (a, b))
    even, odd = torch.zeros(16, 16), torch.zeros(16, 16)
    for k in range(0, 32, 2):
        even = flushed(even + flushed(flushed(a[:, k : k + 1]) * flushed(b[k])))
        odd = flushed(odd + flushed(flushed(a[:, k + 1 : k + 2]) * flushed(b[k + 1])))
    pairs = b.view(16, 2, 16).transpose(1, 2)
    out = torch.empty(16, 1, 16)
    inputs = [bfloat16_bits(t.contiguous()).contiguous() for t in (a, pairs)]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (*inputs, out)]
    failed = _native.library().fastseq_multiply_tiles(
        *pointers[:2], ctypes.c_int64(1), 16, 1, 1, pointers[2]
    )
    assert not failed and torch.equal(out[:, 0], flushed(even + odd))


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_the_instructions_themselves(tmp_path):
    source, program = Path(__file__).with_name("tiles_trapped.cpp"), tmp_path / "tiles"
    command = [COMPILER, "-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=off"]
    subprocess.run([*command, source, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    if done.stdout == "not built\n":
        pytest.skip("a compiler that does not know AMX, or a system that does not")
    assert done.returncode == 0 and done.stdout.startswith("same: 32 products"), done.stdout


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_single_products_within_what_their_parts_allow(precision):
    """A step of a ReLU layer whose sums are positive is a product; its gradients are two more."""
    B, I, H = 37, 67, 83  # noqa: E741
    generator = torch.Generator().manual_seed(1)
    x, w = (torch.rand(*s, generator=generator) + 0.1 for s in ((2, B, I), (H, I)))
    dy = torch.randn(2, B, H, generator=generator)
    zeros = torch.zeros(H, H)

    def layer(x, w):
        return functional.rnn_relu(x, None, [w, zeros], has_biases=False)[0]

    found = under(precision, run_with_grads, layer, {"x": x, "w": w}, [dy], names=["y"])
    dy, x, w = dy.double(), x.double(), w.double()
    rows, steps = dy.reshape(-1, H), x.reshape(-1, I)
    for name, left, right in (("y", x, w.T), ("grad x", dy, w), ("grad w", rows.T, steps)):
        terms = left.abs() @ right.abs()
        assert_sums_lowered_close(found[name], left @ right, terms, right.shape[0], precision)


@pytest.mark.parametrize("cell", CELLS)
def test_layers_in_both_precisions(cell):
    check(recurrent_case(cell, 50, 24, 40, 48))


SIZES = [
    (16, 16, 16),
    (8, 1, 33),
    (15, 31, 17),
    (17, 33, 31),
    (33, 15, 47),
    (9, 130, 19),
    (31, 37, 64),
]


@pytest.mark.parametrize("B, I, H", SIZES)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_odd_sizes(cell, B, I, H):  # noqa: E741
    check(recurrent_case(cell, 6, B, I, H))


FORMS = {
    "both directions": dict(bidirectional=True),
    "stacked, no state, no bias": dict(num_layers=2, hx=False, bias=False),
    "lengths": dict(lengths=[5, 0, 2, 7, 7, 1, 3, 4, 6, 7, 2], bidirectional=True),
    "resets": dict(resets=0.3, bidirectional=True),
    "projected": dict(proj_size=19),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_forms(cell, form):
    if cell == "gru" and form == "projected":
        pytest.skip("no such projection")
    check(recurrent_case(cell, 7, 11, 21, 34, **FORMS[form]))


def test_packed_and_the_registered_op():
    case = recurrent_case("lstm", 7, 9, 21, 34, lengths=[5, 1, 2, 7, 7, 1, 3, 4, 6])
    check(case.packed())
    case = recurrent_case("lstm", 7, 9, 21, 34, hx=False, bias=False)
    x, *weights = case.inputs.values()
    number = _native.cells()["lstm"].number
    arguments = (number, x, None, None, weights, False, 1, None, None, None, [], False)
    found = under("high", torch.ops.fastseq.recurrent_fwd, *arguments)
    assert torch.equal(found[0], under("high", functional.lstm, x, None, weights, False)[0])


@pytest.mark.parametrize("cell", CELLS)
def test_by_default_and_without_tiles_float32_stays_ieee(cell):
    case = recurrent_case(cell, 5, 9, 33, 40, bidirectional=True)
    _native.set_tiles("off")
    expected = run(case)
    for precision in ("high", "medium"):
        assert_same_bits(under(precision, run, case), expected, precision)
    _native.set_tiles("emulated")
    assert_same_bits(run(case), expected, "highest")


def test_few_rows_or_units_and_float64_stay_ieee():
    few_units = recurrent_case("lstm", 4, 33, 100, 15)
    assert_same_bits(under("high", run, few_units), run(few_units), "15 units")
    for case in (
        recurrent_case("lstm", 4, 7, 33, 40, dtype=torch.float64),
        recurrent_case("lstm", 1, 20, 33, 40),
        recurrent_case("gru", 4, 7, 33, 40),
    ):
        expected = run(case)
        found = under("high", run, case)
        # (Products over all tokens have rows enough.)
        for name in case.names:
            assert torch.equal(found[name], expected[name]), f"{case}: {name}"


SWITCHES = [
    ("high", "none", "high"),
    ("medium", "none", "medium"),
    ("highest", "tf32", "high"),
    ("highest", "bf16", "medium"),
    ("high", "bf16", "medium"),
    ("medium", "ieee", "highest"),
    ("highest", "none", "highest"),
]


@pytest.mark.parametrize("products, layers, means", SWITCHES)
def test_the_switch_of_recurrent_layers_has_the_last_word(products, layers, means):
    case = recurrent_case("lstm", 3, 9, 33, 40)
    expected = under(means, run, case)
    allow(products)
    torch.backends.mkldnn.rnn.fp32_precision = layers
    assert_same_bits(run(case), expected, means)
    said = fastseq.explain(nn.LSTM(4, 16)).reason
    in_words = {"high": "by three of bfloat16", "medium": "in bfloat16", "highest": ""}[means]
    assert in_words in said and ("bfloat16" in said) == bool(in_words)


def test_a_backward_pass_goes_by_its_own_time():
    case = recurrent_case("lstm", 5, 9, 33, 40, hx=False)
    x, *weights = (t.clone().requires_grad_() for t in case.inputs.values())

    def gradients(forward, backward):
        y = under(forward, functional.lstm, x, None, weights)[0]
        return under(backward, torch.autograd.grad, y, [x, *weights], case.cotangents[0])

    plain, lowered = gradients("highest", "highest"), gradients("highest", "high")
    assert not any(map(torch.equal, plain[:3], lowered[:3]))
    # The other way round only what forward kept differs.
    for grad, plainly in zip(gradients("high", "highest"), plain, strict=True):
        assert_lowered_close({"grad": grad}, {"grad": plainly.double()}, "high")


@pytest.mark.parametrize("cell, B", [("lstm", 37), ("gru", 64), ("lstm", 9)])
def test_same_bits_for_any_number_of_threads(cell, B):
    case = recurrent_case(cell, 6, B, 65, 130, bidirectional=True)
    # Rows that are multiplied in float32 fall into other tiles then.
    case.inputs["x"][2, 1, 3], case.inputs["x"][:, 5] = math.inf, 1e30
    expected = under("high", run, case)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        found = under("high", run, case)
        for name, t in expected.items():
            assert torch.equal(found[name].nan_to_num(7), t.nan_to_num(7)), (threads, name)


SPECIAL = {
    "an infinite input": ("x", (1, 2, 3), math.inf),
    "NaN in": ("x", (1, 2, 3), math.nan),
    "huge": ("x", (1, 2), 3e38),
    "an infinite weight": ("weight_hh_l0", (3, 4), -math.inf),
    "huge weights": ("weight_ih_l0", (5,), 1e30),
    "an infinite state": ("h0", (0, 3, 1), math.inf),
    "denormals": ("x", (0,), 1e-42),
}


@pytest.mark.parametrize("what", SPECIAL)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_relu"])
def test_special_values_as_float32_has_them(cell, what):
    name, at, value = SPECIAL[what]
    case = recurrent_case(cell, 4, 10, 33, 40)
    case.inputs[name][at] = value
    expected = run(case)
    for precision, near in (("high", 1e-4), ("medium", 5e-2)):
        found = under(precision, run, case)
        for result, want in expected.items():
            got, finite = found[result], want.isfinite()
            assert torch.equal(got.isfinite(), finite), (precision, result)
            same = (got == want) | (got.isnan() & want.isnan())
            assert same[~finite].all(), (precision, result)
            error = (got - want)[finite].double().norm()
            assert error <= near * want[finite].double().norm(), (precision, result)


def test_what_is_said(monkeypatch):
    allow("high")
    module, x = nn.LSTM(4, 16), torch.randn(2, 3, 4)
    assert "by three of bfloat16 (AMX, emulated)" in fastseq.explain(module, x).reason
    assert "bfloat16" not in fastseq.explain(module.double(), x.double()).reason
    assert "bfloat16" not in fastseq.explain(nn.LSTM(4, 15), x).reason
    assert dict(doctor.report()[0])["AMX"] == "emulated: set by name"
    _native.set_tiles("off")
    assert fastseq.explain(module.float(), x).reason.endswith("all in float32: set by name")
    with pytest.raises(ValueError, match="a way that runs here, got 'fast'"):
        _native.set_tiles("fast")


@pytest.mark.parametrize(
    "asked, said",
    [
        ("emulated", "emulated: FASTSEQ_AMX=emulated"),
        ("off", "off: FASTSEQ_AMX=off"),
        ("quick", "off: FASTSEQ_AMX=quick: no such way"),
    ],
)
def test_the_environment_chooses(asked, said):
    program = "from fastseq import _native; print(f'{_native.tiles()}: {_native.tiles_reason()}')"
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"FASTSEQ_AMX": asked}
    )
    assert done.stdout.strip() == said, done.stderr
