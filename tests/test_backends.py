"""Which backend runs a call, why not the others, and what happens when one is forced."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from fastseq.kernels import attention as triton_kernels
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_sequence

import fastseq
from fastseq import _native, backends, functional, nn
from fastseq.functional import rnn
from fastseq.testing import lstm_case

native = pytest.mark.skipif(not _native.loaded(), reason=str(_native.why_not_loaded()))


def lstm_and_input(dtype=torch.float32, **options):
    module = nn.LSTM(4, 6, dtype=dtype, **options)
    return module, torch.randn(5, 3, 4, dtype=dtype)


# Options of the module, the backend that serves it, and what the sentence must say.
CALLS = {
    "float32": (dict(), "cpu", ""),
    "float64": (dict(dtype=torch.float64), "cpu", ""),
    "stacked": (dict(num_layers=2, dropout=0.3, bidirectional=True), "cpu", ""),
    "no bias": (dict(bias=False, batch_first=True), "cpu", ""),
    "projected": (dict(proj_size=3), "cpu", ""),
    "bfloat16": (dict(dtype=torch.bfloat16), "cpu", ""),
    "float16": (dict(dtype=torch.float16), "cpu", ""),
    "meta": (dict(device="meta"), "torch", "meta"),
}


@native
@pytest.mark.parametrize("name", CALLS)
def test_explain_names_the_backend_and_the_reason(name):
    options, backend, said = CALLS[name]
    module, x = lstm_and_input(**options)
    explanation = fastseq.explain(module, x.to(options.get("device", "cpu")))
    assert explanation.backend == backend
    assert said in str(explanation)
    assert str(explanation).strip().endswith(".") or len(str(explanation)) > 10


@native
def test_explain_of_a_function():
    case = lstm_case(5, 3, 4, 6)
    params = [t for n, t in case.inputs.items() if n.startswith(("weight", "bias"))]
    assert fastseq.explain(functional.lstm, case.inputs["x"], None, params).backend == "cpu"
    half = [p.half() for p in params]
    explanation = fastseq.explain(functional.lstm, case.inputs["x"].half(), None, half)
    assert explanation.backend == "cpu"
    explanation = fastseq.explain(functional.layer_norm_lstm, case.inputs["x"], None, params)
    assert explanation.backend == "cpu" and "layer_norm_lstm" in str(explanation)


BEYOND_TORCH = [dict(lengths=torch.tensor([5, 1, 0])), dict(resets=torch.zeros(5, 3).bool())]


@native
@pytest.mark.parametrize("proj_size", [0, 3])
def test_explain_of_what_torch_could_not_run(proj_size, monkeypatch):
    """torch's bfloat16 LSTM may be faster, but knows none of these."""
    monkeypatch.setattr(backends, "bfloat16_units", lambda: ("AMX",))
    module, x = lstm_and_input(torch.bfloat16, proj_size=proj_size)
    weights = list(module.parameters())
    for more in (*BEYOND_TORCH, dict(zoneout=0.1), dict(zoneout=(0.0, 0.1))):
        assert fastseq.explain(functional.lstm, x, None, weights, **more).backend == "cpu"
        with fastseq.use_backend("cpu"):
            functional.lstm(x, None, weights, **more)
    for more in BEYOND_TORCH:
        assert fastseq.explain(module, x, **more).backend == "cpu"
    zoned, _ = lstm_and_input(torch.bfloat16, proj_size=proj_size, zoneout=0.2)
    assert fastseq.explain(zoned, x).backend == "cpu"
    assert fastseq.explain(module, x).backend == ("cpu" if proj_size else "torch")


@native
def test_explain_of_attention():
    query, keys, v = torch.randn(2, 3, 4), torch.randn(2, 5, 4), torch.randn(4)
    said = fastseq.explain(functional.additive_attention, query, keys, keys, v)
    assert said.backend == "cpu" and _native.isa() in said.reason
    assert fastseq.explain(nn.DotAttention()).backend == "cpu"
    module = nn.AdditiveAttention(4, 4, 6)
    assert fastseq.explain(module, query, keys).backend == "cpu"
    with fastseq.use_backend("torch"):
        assert "use_backend" in str(fastseq.explain(module))
    said = fastseq.explain(functional.dot_attention, query.to("meta"), keys, keys)
    assert said.backend == "torch" and "meta" in said.reason


@native
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("units", [(), ("AMX", "AVX-512 BF16")], ids=str)
def test_bfloat16_lstm_goes_to_torch_where_the_cpu_multiplies_it(units, autocast, monkeypatch):
    monkeypatch.setattr(backends, "bfloat16_units", lambda: units)
    module, x = lstm_and_input(torch.float32 if autocast else torch.bfloat16)
    theirs = torch.nn.LSTM(4, 6, dtype=x.dtype)
    theirs.load_state_dict(module.state_dict())
    weights = list(module.parameters())
    run = []
    for name in ("stack", "_by_torch"):
        fn = getattr(rnn, name)
        monkeypatch.setattr(rnn, name, lambda *a, n=name, f=fn, **k: run.append(n) or f(*a, **k))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        said = fastseq.explain(module, x)
        found, expected = module(x), theirs(x)
        functional.lstm(x, None, weights)
        with fastseq.use_backend("cpu"):
            assert fastseq.explain(module, x).backend == "cpu"
    assert found[0].dtype == expected[0].dtype
    if units:
        assert said.backend == "torch" and "AMX" in str(said)
        assert torch.equal(found[0], expected[0]) and run == ["_by_torch"]
    else:
        assert said.backend == "cpu" and run == ["stack"]


ROWS = [torch.randn(5, 4), torch.randn(5, 4)]
# Arguments of the module, its input, whether torch hands it to oneDNN.
BY_ONEDNN = {
    "padded": ({}, torch.stack(ROWS, 1), True),
    "packed": ({}, pack_sequence([ROWS[0], ROWS[1][:3]]), False),
    "packed, of one length": ({}, pack_sequence(ROWS), True),
    "projected": ({"proj_size": 3}, torch.stack(ROWS, 1), False),
    "projected, stacked": (
        {"proj_size": 3, "num_layers": 2, "bias": False}, torch.stack(ROWS, 1), False
    ),
}  # fmt: skip


@native
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", BY_ONEDNN)
def test_only_what_onednn_serves_goes_to_torch(name, autocast, monkeypatch):
    options, x, served = BY_ONEDNN[name]
    dtype = torch.float32 if autocast else torch.bfloat16
    theirs = torch.nn.LSTM(4, 6, **options, dtype=dtype)
    module = nn.LSTM(4, 6, **options, dtype=dtype)
    x = x.to(dtype)
    monkeypatch.setattr(backends, "bfloat16_units", lambda: ("AMX",))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            expected = theirs(x)[0].data.dtype
        assert served == any("mkldnn_rnn" in event.key for event in seen.key_averages())
        assert fastseq.explain(module, x).backend == ("torch" if served else "cpu")
        if name != "packed":
            assert fastseq.explain(module).backend == ("torch" if served else "cpu")
        monkeypatch.setattr(torch.nn.LSTM, "forward", lambda *_: "torch's")
        found = module(x)
    assert (found == "torch's") == served
    assert served or found[0].data.dtype is expected


@native
def test_only_the_bfloat16_lstm_layer_goes_to_torch(monkeypatch):
    monkeypatch.setattr(backends, "bfloat16_units", lambda: ("AMX",))
    module, x = lstm_and_input(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fastseq.explain(module, x).backend == "cpu"
        assert fastseq.explain(nn.GRU(4, 6)).backend == "cpu"
    with torch.autocast("cpu", dtype=torch.float16):
        assert fastseq.explain(nn.LSTM(4, 6)).backend == "cpu"
    assert fastseq.explain(nn.LSTM(4, 6)).backend == "cpu"
    assert fastseq.explain(nn.LSTMCell(4, 6, dtype=torch.bfloat16)).backend == "cpu"


@native
def test_a_cell_is_the_kernels_for_any_number_of_rows():
    for B in (0, 1, 4, 300):
        assert fastseq.explain(nn.GRUCell(128, 8), torch.zeros(B, 128)).backend == "cpu"


def test_bfloat16_units_are_what_torch_finds(monkeypatch):
    for amx, avx512 in itertools.product([False, True], repeat=2):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=amx: has)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=avx512: has)
        expected = ("AMX",) * amx + ("AVX-512 BF16",) * avx512
        assert backends.bfloat16_units.__wrapped__() == expected


def test_explain_computes_nothing():
    module, x = lstm_and_input(num_layers=2, dropout=0.5)
    called = []
    module.register_forward_hook(lambda *_: called.append(1))
    state = torch.get_rng_state()
    fastseq.explain(module, x)
    assert torch.equal(state, torch.get_rng_state()) and not called


def test_explain_of_something_else():
    explanation = fastseq.explain(torch.nn.Linear(3, 4), torch.randn(2, 3))
    assert explanation.backend == "torch" and "Linear" in str(explanation)
    with pytest.raises(TypeError, match="fastseq.explain: expected"):
        fastseq.explain(torch.tanh, torch.randn(2, 3))


def test_torch_backend_is_torchs_bits():
    case = lstm_case(5, 3, 4, 6, num_layers=2)
    fn, torch_lstm = case.functional(functional.lstm), case.module(torch.nn.LSTM)
    with fastseq.use_backend("torch"):
        y, h_n, c_n = fn(*case.inputs.values())
        module, x = lstm_and_input()
        assert fastseq.explain(module, x).backend == "torch"
        assert "use_backend" in str(fastseq.explain(module, x))
    expected = torch_lstm(*case.inputs.values())
    assert torch.equal(y, expected[0])
    assert torch.equal(h_n, expected[1][0]) and torch.equal(c_n, expected[1][1])


@native
@pytest.mark.parametrize(
    "name",
    [name for name, call in CALLS.items() if call[1] == "torch"],
)
def test_a_forced_backend_that_cannot_run_raises_the_sentence(name):
    options, _, said = CALLS[name]
    module, x = lstm_and_input(**options)
    x = x.to(options.get("device", "cpu"))
    with fastseq.use_backend("cpu"):
        with pytest.raises((NotImplementedError, RuntimeError), match=said) as failure:
            module(x)
    assert "fastseq" in str(failure.value)
    module(x)


@native
def test_a_forced_backend_that_can_run_runs():
    module, x = lstm_and_input()
    expected = module(x)[0]
    with fastseq.use_backend("cpu"):
        assert torch.equal(module(x)[0], expected)


# Device, backend that is forced, and why it cannot run attention there.
NO_ATTENTION = [
    ("cpu", "cuda", "no cuda kernel for cpu tensors"),
    ("cuda", "cpu", "no cpu kernel for cuda tensors"),
    ("cuda", "cuda", "a planted obstacle"),
]


@pytest.mark.parametrize("device,forced,said", NO_ATTENTION, ids=str)
@pytest.mark.parametrize("op", ["additive_attention", "dot_attention"])
def test_a_forced_backend_that_cannot_attend_raises_the_sentence(
    op, device, forced, said, monkeypatch
):
    monkeypatch.setattr(triton_kernels, "why_not_available", lambda: "a planted obstacle")
    function = getattr(functional, op)
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = [torch.empty(2, n, 4, device=device) for n in (3, 5, 5)]
        tensors += [torch.empty(4, device=device)] * (op == "additive_attention")
        with fastseq.use_backend(forced):
            explanation = fastseq.explain(function, *tensors)
            with pytest.raises(RuntimeError, match=f"fastseq.{op}: .*{forced} backend") as failure:
                function(*tensors)
        assert explanation.backend == "torch" and said in explanation.reason
        assert explanation.reason in str(failure.value)
        # Unless one insists there is nothing to refuse.
        assert function(*tensors)[0].shape == (2, 3, 4)


def test_forced_triton_kernels_run_what_they_can(monkeypatch):
    monkeypatch.setattr(triton_kernels, "why_not_available", lambda: None)
    monkeypatch.setattr(triton_kernels, "_too_old", lambda device: None)
    with FakeTensorMode(), fastseq.use_backend("cuda"):
        query, keys, none = (torch.empty(2, n, 4, device="cuda") for n in (3, 5, 0))
        assert backends.attention_obstacle("dot_attention", query, keys, keys) is None
        with pytest.raises(RuntimeError, match="float64"):
            backends.attention_obstacle("dot_attention", query.double(), keys, keys)
        with pytest.raises(RuntimeError, match="nothing to compute"):
            backends.attention_obstacle("dot_attention", query, none, none)


def test_the_choice_nests_and_is_restored_after_an_error():
    module, x = lstm_and_input()
    usual = fastseq.explain(module, x).backend
    with fastseq.use_backend("torch"):
        with fastseq.use_backend("auto"):
            assert fastseq.explain(module, x).backend == usual
        assert fastseq.explain(module, x).backend == "torch"
        with pytest.raises(KeyError):
            with fastseq.use_backend("auto"):
                raise KeyError
        assert fastseq.explain(module, x).backend == "torch"
    assert fastseq.explain(module, x).backend == usual


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="fastseq.use_backend: expected .*auto.* got 'cuda9'"):
        with fastseq.use_backend("cuda9"):
            pass


@native
def test_the_environment_may_lower_the_instruction_set():
    program = """
        import torch, fastseq
        from fastseq import _native, nn
        assert _native.isa() == "scalar", _native.isa()
        said = str(fastseq.explain(nn.LSTM(3, 4), torch.randn(2, 1, 3)))
        assert "scalar" in said and "FASTSEQ_CPU_ISA" in said, said
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | {"FASTSEQ_CPU_ISA": "scalar"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
