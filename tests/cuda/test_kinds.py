"""Calls that torch has no layer for, calls under autocast and compiled ones: what is chosen for
them on a GPU, without one."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastseq
from fastseq import _native, backends, functional, nn
from fastseq.nn import _compiling
from fastseq.ops import measured_cuda, recurrent_cuda
from fastseq.testing import assert_matches, recurrent_case
from tests.cuda.on_host import COMPILER, on_host
from tests.cuda.table import plant, row, said
from tests.fuzz_recurrent import with_zoneout

if not _native.loaded() or not _native.cuda_built():
    pytest.skip("the library is built without nvcc", allow_module_level=True)

FAST, SLOW = dict(step=9.0, grid=1.0), dict(step=9.0, grid=8.0)
# The layer, and what its call has; its cell and what the table calls it.
BEYOND = {
    "lengths": (nn.LSTM, {}, dict(beyond="lengths")),
    "resets": (nn.LSTM, {}, dict(beyond="resets")),
    "lengths resets": (nn.LSTM, {}, dict(beyond="lengths resets")),
    "zoneout": (nn.LSTM, dict(zoneout=0.1), dict(beyond="zoneout")),
    "peephole": (nn.PeepholeLSTM, {}, dict(cell="peephole_lstm")),
    "normalised": (nn.LayerNormLSTM, {}, dict(cell="layer_norm_lstm")),
}


def explained(name):
    layer, options, _ = BEYOND[name]
    module = layer(512, 512, device="cuda", **options)
    x = torch.empty(50, 64, 512, device="cuda")
    given = {
        "lengths": torch.empty(64, dtype=torch.int64, device="cuda"),
        "resets": torch.empty(50, 64, dtype=torch.bool, device="cuda"),
    }
    return fastseq.explain(module, x, **{n: t for n, t in given.items() if n in name.split()})


@pytest.mark.parametrize("name", BEYOND)
def test_what_torch_has_no_layer_for_is_compared_with_the_plain_reference(
    a_gpu, exact, monkeypatch, name
):
    kind = BEYOND[name][2]
    # The plain kind's times say nothing of it: not that it is slower, nor which way to go.
    for plain in (row(0.5, **FAST), row(9.0, **FAST)):
        plant(monkeypatch, plain)
        assert explained(name).backend == "cuda" and "`step`" in explained(name).reason
    # (The other cells have `step` alone.)
    way = "grid" if {"lengths", "resets"} & {*name.split()} else "step"
    plant(monkeypatch, row(2.0, **FAST), row(9.0, **FAST, **kind))
    assert explained(name).backend == "cuda" and f"`{way}`" in explained(name).reason
    plant(monkeypatch, row(9.0, **FAST), row(2.0, **SLOW, **kind))
    found = explained(name)
    assert found.backend == "torch"
    assert "plain PyTorch was measured faster at T 50, B 64, H 512: 2 ms" in found.reason
    with fastseq.use_backend("cuda"):
        assert explained(name).backend == "cuda"


def test_another_kind_s_times_are_no_more_the_plain_one_s(a_gpu, exact, monkeypatch):
    plant(monkeypatch, *(row(9.0, **kind) for _, _, kind in BEYOND.values()))
    assert "was measured on a GPU" in said(nn.LSTM, 50, 64, 512, H=512).reason


def test_tf32_is_the_references_where_it_is_ours(a_gpu, monkeypatch):
    """By default cuDNN may round so and products may not: the reference makes products."""
    plant(monkeypatch, row({"f32": 2.0, "tf32": 0.5}, beyond="lengths", **FAST))
    assert explained("lengths").backend == "cuda"


class Launches(TorchDispatchMode):
    """Operators that compute something."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        views = (torch.ops.aten.detach, torch.ops.aten.split, torch.ops.aten.chunk)
        if not func.is_view and func.overloadpacket not in views:
            self.seen[str(func)] += 1
        return out


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", BEYOND)
def test_a_step_of_the_reference_is_many_launches(name, train):
    """What was not measured goes by `step`: a product and a launch a step, beside those of the
    reference, which makes the same product."""
    _, _, kind = BEYOND[name]
    counted = []
    for T in (4, 8):
        options = {"lengths": [T, 1, 2]} if "lengths" in name else {}
        options |= {"resets": 0.3} if "resets" in name else {}
        case = recurrent_case(kind.get("cell", "lstm"), T, 3, 4, 5, **options)
        run = with_zoneout(case, (0.1, 0.2), True) if name == "zoneout" else case.reference()
        leaves = [t.requires_grad_(train) for t in case.inputs.values()]
        with Launches() as launches:
            y, *_ = run(*leaves)
            if train:
                torch.autograd.grad(y.sum(), leaves, allow_unused=True)
        counted.append(launches.seen.total())
    assert (counted[1] - counted[0]) / 4 >= (20 if train else 6)


def lowered(dtype=torch.float16):
    """torch.autocast does nothing where there is no GPU."""

    class Autocast:
        def __enter__(self):
            self.before = torch.get_autocast_dtype("cuda")
            torch.set_autocast_enabled("cuda", True)
            torch.set_autocast_dtype("cuda", dtype)

        def __exit__(self, *error):
            torch.set_autocast_enabled("cuda", False)
            torch.set_autocast_dtype("cuda", self.before)

    return Autocast()


def test_autocast_to_float16_is_served_as_torch_has_cudnn_do(a_gpu, monkeypatch):
    plant(monkeypatch, *(row(dtype="f16", I=500, H=500, mode=mode) for mode in ("train", "inf")))
    assert said(nn.LSTM, 50, 64, 500, H=500).backend == "torch"
    seen = []
    original = functional.rnn._op.run

    def run(settings, *tensors):
        seen.append({t.dtype for t in (*tensors[:3], *tensors[3]) if t is not None})
        return original(settings, *tensors)

    monkeypatch.setattr(functional.rnn._op, "run", run)
    layer, x = nn.LSTM(500, 500, device="cuda"), torch.empty(50, 64, 500, device="cuda")
    with lowered():
        assert fastseq.explain(layer, x).backend == "cuda"
        y, (h, c) = layer.requires_grad_(False)(x)
    assert seen == [{torch.float16}] and {y.dtype, h.dtype, c.dtype} == {torch.float16}
    with lowered(torch.bfloat16):
        assert "autocast to torch.bfloat16" in fastseq.explain(layer, x).reason
    with lowered():
        # As torch: what is float64 stays so.
        exact = nn.LSTM(500, 500, device="cuda", dtype=torch.float64)
        doubles = dict(torchs={"f64": 2.0}, dtype="f64", I=500, H=500)
        plant(monkeypatch, row(**doubles), row(mode="inf", **doubles))
        assert fastseq.explain(exact, x.double()).backend == "cuda"
        assert exact.requires_grad_(False)(x.double())[0].dtype == torch.float64
        assert "differ in dtype" in fastseq.explain(exact, x).reason


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler to build the kernels for the host")
@pytest.mark.parametrize("cell", ["lstm", "gru", "layer_norm_lstm"])
def test_autocast_does_not_choose_again_inside(cell):
    """Products and sums around the steps keep the dtypes that were chosen for the call."""
    case = recurrent_case(cell, 4, 3, 5, 8, bidirectional=True)
    kind = fastseq.ops.recurrent.CELLS[cell]

    def call(x, *rest):
        states, weights = rest[: kind.states], rest[kind.states :]
        weights = functional.rnn.as_matrix(cell, list(weights), True, 2)
        settings = fastseq.ops.recurrent.Settings(kind.number, True, 2)
        with torch.autocast("cpu", torch.bfloat16):
            return fastseq.ops.recurrent.run(settings, x, *(*states, None)[:2], weights)

    with on_host(recurrent_cuda.STEP):
        assert_matches(
            call, case.reference(), case.reference(), case.inputs, case.cotangents, names=case.names
        )


def test_a_compiler_takes_in_what_was_always_as_fast(a_gpu, exact, monkeypatch):
    def taken(H=512, dtype=torch.float32, **changed):
        about = dict(cell="gru", layers=1, directions=1, P=0, train=True) | changed
        return backends.belongs_in_graphs(0, dtype, H, **about)

    like = dict(cell="gru")
    assert not taken()
    plant(monkeypatch, row(**like))
    assert not taken()
    plant(monkeypatch, row(**like), row(packed=True, **like))
    assert taken() and taken(H=300)
    for others in (dict(H=1025), dict(cell="lstm"), dict(layers=2), dict(directions=2),
                   dict(dtype=torch.bfloat16), dict(train=False)):  # fmt: skip
        assert not taken(**others), others
    with lowered(torch.bfloat16):
        assert not taken()
    # Slower once, at whatever number of rows.
    plant(monkeypatch, row(**like), row(packed=True, **like), row(0.5, B=2, **like))
    assert not taken()
    monkeypatch.setattr(measured_cuda, "TABLE", {"another": {}})
    assert not taken()


def test_the_compiler_is_asked_of_layers_of_torchs_on_a_gpu(a_gpu, monkeypatch):
    asked = []
    monkeypatch.setattr(_compiling, "in_graph", lambda *given, **more: asked.append((given, more)))
    for layer in (nn.LSTM(4, 6), nn.PeepholeLSTM(4, 6, device="cuda")):
        assert layer._belongs_in_graphs() and not asked
    layer = nn.LSTM(4, 6, 2, bidirectional=True, proj_size=3, device="cuda")
    assert not layer._belongs_in_graphs()
    about = dict(cell="lstm", layers=2, directions=2, P=3, train=True)
    assert asked == [((0, torch.float32, 6), about)]
