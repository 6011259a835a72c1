"""The table by which a GPU's calls are chosen, as the benchmarks write it: run on the host."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch

import fastseq
from benchmarks import bench_decoder, bench_recurrent_gpu
from benchmarks.plot import read_results
from fastseq import _native, functional
from fastseq.ops import measured_cuda
from fastseq.ops.measured_cuda import DecoderKind, Kind, Size
from fastseq.testing import RecurrentCase, allow_tf32
from tests.cuda.on_host import COMPILER, load, on_host

if not _native.loaded() or COMPILER is None:
    pytest.skip("no compiler to build the kernels for the host", allow_module_level=True)

SMALL = (3, 4, 5, 6)


def able(kind, size):
    return measured_cuda.WAYS


def milliseconds(calls, device, seconds):
    """Each runs; the later are the faster."""
    for call in calls.values():
        call()
    return {name: float(len(calls) - i) for i, name in enumerate(calls)}


@pytest.fixture
def host(monkeypatch):
    """The benchmarks as they run on a GPU, on the host."""
    load()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(RecurrentCase, "on", lambda self, device: self)
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: self)
    real = fastseq.use_backend
    monkeypatch.setattr(
        fastseq,
        "use_backend",
        lambda name: real(name) if name == "torch" else contextlib.nullcontext(),
    )
    for module in (bench_recurrent_gpu, bench_decoder):
        monkeypatch.setattr(module, "milliseconds", milliseconds)
    monkeypatch.setattr(bench_recurrent_gpu, "busiest", lambda run: "a kernel")
    monkeypatch.setattr(
        measured_cuda, "TABLE", {"another": {"recurrent": [1]}, "a GPU": {"old": []}}
    )
    with on_host(layers=False):
        yield


def recurrent(tmp_path, monkeypatch, cases):
    monkeypatch.setattr(bench_recurrent_gpu, "cases", lambda quick: iter(cases))
    table = tmp_path / "table.json"
    status = bench_recurrent_gpu.main(["--output", str(tmp_path), "--table", str(table)])
    _, rows = read_results(tmp_path / "recurrent_gpu.csv")
    return status, rows, json.loads(table.read_text())


CASES = [
    ("lstm", SMALL, "plain", "f32"),
    ("lstm", SMALL, "plain", "tf32"),
    ("lstm", SMALL, "projected", "f32"),
    ("gru", SMALL, "both packed", "f32"),
    ("rnn_tanh", SMALL, "plain", "f32"),
]
BEYOND = [
    ("lstm", SMALL, "lengths", "f32"),
    ("gru", SMALL, "resets", "f32"),
    ("lstm", SMALL, "zoneout", "f32"),
    ("peephole_lstm", SMALL, "plain", "f32"),
    ("layer_norm_lstm", SMALL, "plain", "f32"),
]


def test_every_case_is_checked_timed_and_chosen_by(host, tmp_path, monkeypatch):
    taken, kernels = set(), torch.ops.fastseq.recurrent_cuda_fwd
    recorded = lambda *given: taken.add(way := kernels(*given)) or way  # noqa: E731
    monkeypatch.setattr(torch.ops.fastseq, "recurrent_cuda_fwd", recorded)
    status, rows, table = recurrent(tmp_path, monkeypatch, CASES)
    assert taken == set(bench_recurrent_gpu.WAYS.values())
    assert status == 0 and [row["status"] for row in rows] == ["ok"] * 10
    assert table["another"] == {"recurrent": [1]} and table["a GPU"].keys() == {"old", "recurrent"}
    monkeypatch.setattr(measured_cuda, "TABLE", table)
    size = Size(3, 4, 5, 6, 3)
    for mode in ("train", "inf"):
        for kind in (
            Kind("lstm", "f32", 1, 1, False, False, mode),
            Kind("lstm", "tf32", 1, 1, False, False, mode),
            Kind("lstm", "f32", 1, 1, False, True, mode),
            Kind("gru", "f32", 1, 2, True, False, mode),
            Kind("rnn_tanh", "f32", 1, 1, False, False, mode),
        ):
            assert measured_cuda.fastest_way("a GPU", kind, size, able) == "grid"
            assert measured_cuda.torchs_reason("a GPU", kind, "tf32", size, able) is None
            other = kind._replace(directions=3 - kind.directions)
            assert "was measured" in measured_cuda.torchs_reason("a GPU", other, "tf32", size, able)
    # Where cuDNN may not use TF32 and our products may, nothing was measured.
    tf32 = Kind("lstm", "tf32", 1, 1, False, False, "inf")
    assert "was measured" in measured_cuda.torchs_reason("a GPU", tf32, "f32", size, able)
    row = table["a GPU"]["recurrent"][0]
    assert row["torch"] == {"f32": 5.0, "tf32": 4.0} and (row["step"], row["grid"]) == (3.0, 1.0)


def test_what_torch_has_no_layer_for_is_measured_against_the_reference(host, tmp_path, monkeypatch):
    plain, timed = [], []
    forward = bench_recurrent_gpu.functional.rnn._reference.layer
    monkeypatch.setattr(
        bench_recurrent_gpu.functional.rnn._reference,
        "layer",
        lambda *given, **options: plain.append(given[0]) or forward(*given, **options),
    )

    def ran(calls, device, seconds):
        for name, call in calls.items():
            plain.clear()
            call()
            timed.append((name, bool(plain)))
        return milliseconds(calls, device, seconds)

    monkeypatch.setattr(bench_recurrent_gpu, "milliseconds", ran)
    status, rows, table = recurrent(tmp_path, monkeypatch, BEYOND)
    assert status == 0 and {row["status"] for row in rows} == {"ok"}
    assert all(by_plain == (name == "torch") for name, by_plain in timed) and len(timed) >= 20
    monkeypatch.setattr(measured_cuda, "TABLE", table)
    for cell, _, form, dtype in BEYOND:
        beyond = "" if form == "plain" else form
        kind = Kind(cell, dtype, 1, 1, False, False, "train", beyond)
        found = measured_cuda._nearest("a GPU", kind, Size(3, 4, 5, 6))
        assert found.torch.keys() == {"f32"} and "step" in found.ours
        assert ("grid" in found.ours) == (form in ("lengths", "resets")), kind
        assert measured_cuda.torchs_reason("a GPU", kind, "tf32", Size(3, 4, 5, 6), able) is None


def test_kernels_that_cudnn_ran_name_its_algorithm():
    name = bench_recurrent_gpu.named_by_cudnn
    persistent, gemm = "void RNN_blockPersist_fp_LSTM<__half>(..)", "sm90_xmma_gemm_f32f32_tn_n"
    assert name({gemm: 5.0, persistent: 1.0}) == persistent
    assert name({gemm: 5.0, "void LSTM_elementWise_fp<float>(..)": 1.0, "GRU": 0.5})[5:9] == "LSTM"
    assert name({gemm: 5.0, "void at::native::elementwise_kernel": 7.0}).startswith("unknown: void")
    assert name({}) == ""


def test_what_is_wrong_or_fails_stays_in_as_wrong(host, tmp_path, monkeypatch):
    right = functional.lstm

    def wrong(*arguments, **options):
        y, *states = right(*arguments, **options)
        return y * (1.001 if bench_recurrent_gpu.recurrent_cuda.way == 2 else 1), *states

    def fails(*arguments, **options):
        raise RuntimeError("CUDA error: illegal address\nmore")

    monkeypatch.setattr(functional, "lstm", wrong)
    monkeypatch.setattr(functional, "gru", fails)
    status, rows, table = recurrent(tmp_path, monkeypatch, [CASES[0], CASES[3], CASES[4]])
    assert status == 1 and rows[0]["status"].startswith("whole is wrong: out0: ")
    assert rows[2]["status"].startswith("step is wrong: CUDA error: illegal address;")
    assert not rows[0]["torch_ms"] and rows[4]["status"] == "ok"
    found = table["a GPU"]["recurrent"]
    assert ["wrong" in row for row in found] == [True] * 4 + [False] * 2
    monkeypatch.setattr(measured_cuda, "TABLE", table)
    monkeypatch.setattr(measured_cuda, "device_name", lambda index: "a GPU")
    assert "whole is wrong" in measured_cuda.unproved(0, "lstm", "f32")
    assert measured_cuda.unproved(0, "rnn_tanh", "f32") is None


def test_a_time_that_cannot_be_taken_is_wrong_too(host, tmp_path, monkeypatch):
    def no_time(calls, device, seconds):
        raise RuntimeError("CUDA error: illegal address")

    monkeypatch.setattr(bench_recurrent_gpu, "milliseconds", no_time)
    status, rows, table = recurrent(tmp_path, monkeypatch, CASES[:1])
    assert status == 1 and {row["status"] for row in rows} == {
        "failed: CUDA error: illegal address"
    }
    assert all("wrong" in row for row in table["a GPU"]["recurrent"])


def out_of_memory(*given, **options):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nand more")


def no_algorithm(*given, **options):
    raise RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED")


FAILURES = {
    "no memory to check": (functional, "lstm", out_of_memory, "CUDA out of memory"),
    "no memory to time": (bench_recurrent_gpu, "milliseconds", out_of_memory, "CUDA out of memory"),
    "torch's memory": (torch.nn.LSTM, "forward", out_of_memory, "torch's side: CUDA out of memory"),
    "torch's own": (torch.nn.LSTM, "forward", no_algorithm, "torch's side: cuDNN error"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_what_could_not_be_measured_is_not_called_wrong(host, tmp_path, monkeypatch, failure):
    """Ours is not known to be: the row is torch's, its cell and dtype are not."""
    owner, name, fails, reason = FAILURES[failure]
    monkeypatch.setattr(owner, name, fails)
    status, rows, table = recurrent(tmp_path, monkeypatch, [CASES[0], CASES[4]])
    assert status == 1
    assert all(row["status"].startswith(f"unmeasured: {reason}") for row in rows[:2])
    found = table["a GPU"]["recurrent"]
    assert all(row["unmeasured"].startswith(reason) for row in found[:2])
    assert not any("wrong" in row for row in found)
    monkeypatch.setattr(measured_cuda, "TABLE", table)
    monkeypatch.setattr(measured_cuda, "device_name", lambda index: "a GPU")
    assert measured_cuda.unproved(0, "lstm", "f32") is None
    kind = Kind("lstm", "f32", 1, 1, False, False, "train")
    reason = measured_cuda.torchs_reason("a GPU", kind, "f32", Size(3, 4, 5, 6), able)
    assert "was measured" in reason


def test_tf32_is_allowed_where_a_row_says_so(host, tmp_path, monkeypatch):
    """As answers are checked, by what TF32 may do to them, and as they are timed."""
    right, forward = functional.lstm, torch.nn.LSTM.forward
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn.rnn
    seen, checked, timed = [], set(), {}

    def telling(fn):
        def call(*arguments, **options):
            seen.append((matmul.fp32_precision, cudnn.fp32_precision))
            return fn(*arguments, **options)

        return call

    def rounded(*arguments, **options):
        y, *states = right(*arguments, **options)
        return y * (1 + 2**-13) if matmul.fp32_precision == "tf32" else y, *states

    def switches(calls, device, seconds):
        checked.update(seen)
        for name, call in calls.items():
            seen.clear()
            call()
            timed.setdefault(tuple(calls), {})[name] = seen[-1]
        seen.clear()
        return dict.fromkeys(calls, 1.0)

    monkeypatch.setattr(functional, "lstm", telling(rounded))
    monkeypatch.setattr(torch.nn.LSTM, "forward", telling(forward))
    monkeypatch.setattr(bench_recurrent_gpu, "milliseconds", switches)
    status, rows, _ = recurrent(tmp_path, monkeypatch, CASES[:2])
    assert status == 0 and checked == {("ieee", "ieee"), ("tf32", "tf32")}, rows
    exact, allowed = timed.values()
    assert allowed == dict.fromkeys(("torch", *measured_cuda.WAYS), ("tf32", "tf32"))
    ieee = dict.fromkeys(("torch", "torch_tf32", *measured_cuda.WAYS), ("ieee", "ieee"))
    assert exact == ieee | {"torch_tf32": ("tf32", "tf32")}
    monkeypatch.setattr(bench_recurrent_gpu, "allow_tf32", lambda allowed: allow_tf32(True))
    status, rows, _ = recurrent(tmp_path, monkeypatch, CASES[:2])
    assert [row["status"][:13] for row in rows] == ["step is wrong"] * 2 + ["ok"] * 2


def test_what_was_cut_off_keeps_its_rows(host, tmp_path, monkeypatch):
    def interrupted(calls, device, seconds):
        if (tmp_path / "table.json").exists():
            raise KeyboardInterrupt
        return milliseconds(calls, device, seconds)

    monkeypatch.setattr(bench_recurrent_gpu, "milliseconds", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recurrent(tmp_path, monkeypatch, CASES)
    found = json.loads((tmp_path / "table.json").read_text())["a GPU"]["recurrent"]
    assert [row["mode"] for row in found] == ["train"]


def test_the_cases_of_a_whole_run():
    cases = list(bench_recurrent_gpu.cases(False))
    assert len(set(cases)) == len(cases) and cases[0] == ("lstm", (100, 64, 96, 96), "plain", "f32")
    for cell in ("lstm", "gru"):
        for form in bench_recurrent_gpu.FORMS.keys() - {"projected"}:
            assert {dtype for c, _, f, dtype in cases if (c, f) == (cell, form)} >= {"f32", "bf16"}
        forms = {form for c, _, form, _ in cases if c == cell}
        assert forms >= {"lengths", "resets", "zoneout"}
    assert {c for c, _, form, _ in cases if form == "projected"} == {"lstm"}
    own = {(c, form, dtype) for c, _, form, dtype in cases if c in bench_recurrent_gpu.OWN}
    assert own == {(cell, "plain", "f32") for cell in bench_recurrent_gpu.OWN}


def decoder(tmp_path, monkeypatch):
    monkeypatch.setitem(bench_decoder.SIZES, "cuda", [(2, 7, 4, 5, 6, 7, 8)])
    monkeypatch.setattr(bench_decoder, "VOCABULARY", 9)
    monkeypatch.setattr(bench_decoder, "captured", lambda run: {"captured": run})
    build = bench_decoder.build
    monkeypatch.setattr(
        bench_decoder, "build", lambda size, kind, device, *steps: build(size, kind, "cpu", *steps)
    )
    table = tmp_path / "table.json"
    given = ["--device", "cuda", "--output", str(tmp_path), "--table", str(table)]
    status = bench_decoder.main(given)
    _, rows = read_results(tmp_path / "decoder_cuda.csv")
    return status, rows, json.loads(table.read_text())


def test_decoders_come_into_the_table_by_their_kind(host, tmp_path, monkeypatch):
    status, rows, table = decoder(tmp_path, monkeypatch)
    assert status == 0 and {row["status"] for row in rows} == {"ok"}
    monkeypatch.setattr(measured_cuda, "TABLE", table)
    monkeypatch.setattr(measured_cuda, "device_name", lambda index: "a GPU")
    sizes = (6, 2, 4, 7, 7, 8)
    for cell, order, tokens, dtype in bench_decoder.KINDS["cuda"]:
        for mode in ("train", "inf"):
            kind = DecoderKind(cell, order, tokens=tokens, dtype=dtype, mode=mode)
            # Here fastseq's side is the first and second of four.
            reason = measured_cuda.decoders_reason(0, kind, *sizes)
            assert "measured faster at B 2, T 7, S 4, H 6: 1 ms" in reason
            two = kind._replace(layers=2)
            assert "no decoder" in measured_cuda.decoders_reason(0, two, *sizes)
    for row in table["a GPU"]["decoder"]:
        assert row["ours"] == {"replayed": 4.0, "uncaptured": 3.0}
        row["ours"] = {"replayed": 0.5, "uncaptured": 0.5}
    monkeypatch.setattr(measured_cuda, "TABLE", dict(table))
    assert measured_cuda.decoders_reason(0, DecoderKind("gru", mode="train"), *sizes) is None


def test_wrong_decoders_stay_in_as_wrong(host, tmp_path, monkeypatch):
    right = functional.attention_decoder

    def wrong(*arguments, **options):
        decoded = right(*arguments, **options)
        return decoded._replace(features=1.1 * decoded.features)

    monkeypatch.setattr(functional, "attention_decoder", wrong)
    status, _, table = decoder(tmp_path, monkeypatch)
    assert status == 1 and all("wrong" in row for row in table["a GPU"]["decoder"])
    monkeypatch.setattr(measured_cuda, "TABLE", table)
    monkeypatch.setattr(measured_cuda, "device_name", lambda index: "a GPU")
    assert "features" in measured_cuda.unproved(0, "gru", "f32", "decoder")


def test_a_decoder_that_torch_could_not_run_is_unmeasured(host, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_decoder.reference, "attention_decoder", out_of_memory)
    status, rows, table = decoder(tmp_path, monkeypatch)
    assert status == 1 and rows[0]["status"].startswith("unmeasured: torch's side: CUDA out of")
    assert all("unmeasured" in row for row in table["a GPU"]["decoder"])
    monkeypatch.setattr(measured_cuda, "TABLE", table)
    monkeypatch.setattr(measured_cuda, "device_name", lambda index: "a GPU")
    assert measured_cuda.unproved(0, "gru", "f32", "decoder") is None
    assert "no decoder" in measured_cuda.decoders_reason(0, DecoderKind("gru"), 6)


def test_the_table_is_a_gpus(tmp_path):
    with pytest.raises(SystemExit):
        bench_decoder.main(["--table", str(tmp_path / "t.json"), "--output", str(tmp_path)])
