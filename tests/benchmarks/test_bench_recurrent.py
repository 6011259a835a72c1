"""The benchmark records what it measures, and never times a wrong answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastseq import nn

ONE = ["--quick", "--cells", "lstm", "--group", "layers", "--rows", "9"]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks import bench_recurrent

    monkeypatch.setattr(bench_recurrent, "busy", lambda: None)
    monkeypatch.setattr(bench_recurrent, "peak_gflops", lambda seconds: 100.0)
    return bench_recurrent


def test_a_row_is_checked_timed_and_recorded(bench, tmp_path, capsys):
    assert bench.main([*ONE, "--threads", "1", "--output", str(tmp_path)]) == 0
    from benchmarks.plot import read_results

    about, rows = read_results(tmp_path / "recurrent_cpu_quick.csv")
    assert about["torch"] == torch.__version__ and about["threads"] == "1"
    assert [row["mode"] for row in rows] == ["train", "inf"]
    for row in rows:
        assert row["status"] == "ok"
        ratio = float(row["baseline_ms"]) / float(row["fastseq_ms"])
        assert float(row["ratio"]) == pytest.approx(ratio, rel=0.01)
        assert (row["met"] == "yes") == (float(row["ratio"]) >= float(row["target"]))
        assert float(row["fastseq_q1_ms"]) <= float(row["fastseq_ms"])
        assert float(row["peak_part"]) == pytest.approx(float(row["gflops"]) / 100, abs=2e-3)
    assert (tmp_path / "recurrent_cpu_quick.png").stat().st_size > 10_000
    assert {path.name for path in tmp_path.iterdir()} == {
        "recurrent_cpu_quick.csv",
        "recurrent_cpu_quick.png",
    }
    assert "5, 1, 16, 32" in capsys.readouterr().out


def test_a_wrong_answer_is_not_timed(bench, tmp_path, monkeypatch, capsys):
    class Wrong(nn.LSTM):
        def forward(self, input, hx=None):
            y, hidden = super().forward(input, hx)
            return y * 1.001, hidden

    monkeypatch.setattr(nn, "LSTM", Wrong, raising=False)
    assert bench.main([*ONE, "--output", str(tmp_path)]) == 1
    from benchmarks.plot import read_results

    for row in read_results(tmp_path / "recurrent_cpu_quick.csv")[1]:
        assert row["status"].startswith("wrong: ") and "error" in row["status"]
        assert row["fastseq_ms"] == row["ratio"] == "" and row["met"] == "no"
    assert "wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments,said",
    [
        ([*ONE[1:5], "--rows", "0"], "rows from 1 to 13, got '0'"),
        (["--cells", "lsmt"], "rnn_tanh, got 'lsmt'"),
        (["--group", "layer"], "bf16, got 'layer'"),
        (["--rows", "1,x"], "'x'"),
        (["--threads", "0"], "positive"),
        (["--output", "{file}/results"], "directory"),
    ],
    ids=lambda v: str(v),
)
def test_bad_arguments_end_before_anything_is_measured(bench, tmp_path, arguments, said, capsys):
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(SystemExit) as end:
        bench.main([argument.format(file=file) for argument in arguments])
    assert end.value.code == 2 and said in capsys.readouterr().err
    assert file.read_text() == "kept" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "cell,group,variant",
    [
        ("gru", "layers", ""),
        ("rnn_tanh", "layers", ""),
        ("lstm", "layers", "proj"),
        ("lstm", "packed", ""),
        ("gru", "stacked", "bidirectional"),
        ("lstm", "stacked", "two layers"),
        ("lstm", "cells", "cell"),
        ("gru", "cells", "cell"),
        ("gru", "bf16", ""),
    ],
)
def test_every_kind_of_row_is_checked_and_runs(bench, cell, group, variant):
    from benchmarks import shapes, subjects

    wanted = cell, group, variant
    known = shapes.measurements()
    first = next(m for m in known if (m.cell, m.group, m.variant) == wanted)
    m = replace(first, sizes=(1 if group == "cells" else 3, 4, 5, 6))
    subjects.verify(m)
    tested = subjects.subject(m)
    for mode in shapes.MODES:
        results = [tested.step(tested.module(side), mode)() for side in ("fastseq", "torch")]
        for ours, theirs in zip(*results, strict=True):
            assert ours.shape == theirs.shape


def test_peak_is_a_rate_of_every_instruction_set_and_of_no_other():
    import ctypes

    from benchmarks.measure import peak_gflops
    from fastseq import _native

    if not _native.loaded():
        pytest.skip(_native.why_not_loaded())
    assert 0 < peak_gflops(0.001) < float("inf")
    measure = _native.library().fastseq_peak_flops_f32
    measure.restype, measure.argtypes = ctypes.c_double, (ctypes.c_char_p, ctypes.c_double)
    for isa in _native.available_isas():
        assert 0 < measure(isa.encode(), 0.0) < float("inf")
    assert measure(b"none", 0.0) < 0


def _row(bench, m, ratio=4.0):
    from benchmarks.measure import Timing

    one, other = (Timing(t, t, t, 7) for t in (1.0, ratio))
    return bench.Row(m, times={"fastseq": one, "baseline": other})


def test_a_geometric_mean_is_judged_when_all_its_rows_are_there(bench):
    from benchmarks import shapes

    together = [m for m in shapes.measurements() if m.cell == "lstm" and m.group == "cells"]
    rows = [_row(bench, m) for m in together]
    assert {bench.met(row, rows) for row in rows} == {"yes"}
    assert {bench.met(row, rows[1:]) for row in rows[1:]} == {""}
    rows[0].times = None
    assert [bench.met(row, rows) for row in rows] == ["no"] + [""] * (len(rows) - 1)
    slow = [_row(bench, m, 1.0) for m in together]
    assert {bench.met(row, slow) for row in slow} == {"no"}


@pytest.mark.parametrize("cell,variant", [("lstm", "half full"), ("gru", "long")])
def test_what_a_cost_is_measured_against_is_checked_too(bench, monkeypatch, cell, variant):
    from benchmarks import shapes

    sizes = (20, 4, 5, 6)
    m = next(m for m in shapes.measurements() if (m.cell, m.variant) == (cell, variant))
    m = replace(m, sizes=sizes)
    seen = []
    monkeypatch.setattr(bench, "verify", lambda m, tested: seen.append(tested.tokens))
    monkeypatch.setattr(bench, "measure", lambda m, *_: _row(bench, m))
    bench.measured([m], 0.01, False, bench.Console())
    assert seen == ([41, 80] if variant == "half full" else [80, 8])


@pytest.mark.parametrize(
    "failure,word",
    [("refuses", "refused"), ("breaks", "error"), ("errs", "wrong"), (None, None)],
)
@pytest.mark.parametrize("mode", ["train", "inf"])
def test_a_baseline_that_fails_is_named_for_what_it_did(bench, monkeypatch, failure, word, mode):
    from benchmarks import baselines, shapes

    def make(module, mode):
        def call(x):
            if failure == "refuses":
                raise baselines.Refused("no")
            if failure == "breaks":
                raise RuntimeError("internal")
            y, state = module(x)
            return (y * 1.001 if failure == "errs" else y), state

        call.parameters = module.parameters
        return call

    monkeypatch.setattr(baselines, "OTHERS", {})
    monkeypatch.setattr(baselines, "COMPILE", {"compile": make})
    first = next(m for m in shapes.measurements() if m.mode == mode)
    row = bench.measure(replace(first, sizes=(3, 4, 5, 6)), 0.01, True)
    assert ("compile" in row.times) == (word is None)
    assert row.milliseconds("compile") == word or word is None
