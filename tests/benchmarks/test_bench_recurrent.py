"""The benchmark records what it measures, and never times a wrong answer."""

from __future__ import annotations

import sys
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


def test_a_row_is_checked_timed_and_recorded(bench, tmp_path, monkeypatch, capsys):
    from benchmarks import baselines

    monkeypatch.setattr(baselines, "BASELINES", {})
    assert bench.main([*ONE, "--threads", "1", "--output", str(tmp_path)]) == 0
    from benchmarks.plot import read_results

    about, rows = read_results(tmp_path / "recurrent_cpu_quick.csv")
    assert about["torch"] == torch.__version__ and about["threads"] == "1"
    assert about["high"] in ("amx", "emulated", "float32, without AMX")
    assert [row["mode"] for row in rows] == ["train", "inf"]
    for row in rows:
        assert row["status"] == "ok"
        assert float(row["ratio_q1"]) <= float(row["ratio"]) <= float(row["ratio_q3"])
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
        ([*ONE[1:5], "--rows", "0"], "rows from 1 to 18, got '0'"),
        (["--cells", "lsmt"], "rnn_tanh, got 'lsmt'"),
        (["--group", "layer"], "high, got 'layer'"),
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
        ("lstm", "high", ""),
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
    from benchmarks.measure import Samples

    one, other = (Samples((t,) * 7) for t in (1.0, ratio))
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
    bench.measured([m], 0.01, bench.Console())
    assert seen == ([41, 80] if variant == "half full" else [80, 8])


@pytest.mark.parametrize(
    "failure,word",
    [
        ("refuses", "refused"),
        ("lacks", "missing"),
        ("breaks", "error"),
        ("errs", "wrong"),
        ("", ""),
    ],
)
@pytest.mark.parametrize("mode", ["train", "inf"])
def test_a_baseline_that_fails_is_named_for_what_it_did(bench, monkeypatch, failure, word, mode):
    from benchmarks import baselines, shapes

    def make(module, m):
        if failure == "lacks":
            raise baselines.Missing("no such module")

        def call(x):
            if failure == "refuses":
                raise baselines.Refused("no")
            if failure == "breaks":
                raise RuntimeError("internal")
            y, state = module(x)
            return (y * 1.001 if failure == "errs" else y), state

        call.parameters = module.parameters
        return call

    monkeypatch.setattr(baselines, "BASELINES", {"compile": make})
    first = next(m for m in shapes.measurements() if m.mode == mode)
    row = bench.measure(replace(first, sizes=(3, 4, 5, 6)), 0.01)
    assert ("compile" in row.times) == (not word)
    assert row.milliseconds("compile") == word or not word


def test_every_size_has_every_kind_of_layer(bench):
    from benchmarks import shapes

    kinds: dict[tuple[str, ...], list] = {}
    for m in shapes.measurements():
        if m.group in ("layers", "stacked"):
            kinds.setdefault((m.cell, m.variant, m.mode), []).append(m.sizes)
    assert len(kinds) == 4 + 8 + 2 + 1 and len(shapes.SIZES) == 9
    for sizes in kinds.values():
        assert tuple(sizes) == shapes.SIZES
    left = set(shapes.select()) - set(shapes.select(quick=True))
    assert {(m.group, m.sizes) for m in left} == shapes.LONG and len(left) == 40
    # What is asked for by number is measured.
    assert {m.sizes for m in shapes.select("lstm", "stacked", "4", quick=True)} == {shapes.SIZES[3]}


def test_a_ratio_is_of_one_round_at_a_time(bench):
    from benchmarks import shapes
    from benchmarks.measure import Samples

    first = next(shapes.measurements())
    times = {"fastseq": Samples((1.0, 2.0, 4.0)), "baseline": Samples((3.0, 2.0, 8.0))}
    row = bench.Row(replace(first, target=1.8), times=times)
    record = row.record(bench.met(row, [row]))
    assert record["fastseq_ms"] == "2000" and record["baseline_ms"] == "3000"
    assert [record[name] for name in ("ratio_q1", "ratio", "ratio_q3")] == [
        "1.500",
        "2.000",
        "2.500",
    ]
    # The ratio of the medians would be below the target.
    assert record["met"] == "yes" and row.doubtful and record["rounds"] == 3


def test_the_sides_of_a_round_are_timed_next_to_each_other(monkeypatch):
    from benchmarks import measure

    now, called = [0.0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(measure.time, "sleep", lambda seconds: None)

    def side(name, seconds):
        def call():
            # A machine that gets slower and slower.
            now[0] += seconds * (1 + now[0])
            called.append(name)

        return call

    times = measure.interleaved({"a": side("a", 0.2), "b": side("b", 0.3)}, 0.0)
    pairs = list(zip(called[4::2], called[5::2], strict=True))
    assert pairs == [("b", "a"), ("a", "b")] * 3 + [("b", "a")]
    a, b = times["a"], times["b"]
    assert a.values[-1] > 5 * a.values[0]
    assert b.over(a).median == pytest.approx(1.5, rel=0.25)
    assert a.scaled(10).median == pytest.approx(10 * a.median)


def test_fewer_bits_without_units_for_them_are_judged_as_float32(bench, monkeypatch):
    from benchmarks import shapes
    from fastseq import backends

    def judged(group):
        m = next(m for m in shapes.measurements() if (m.group, m.mode) == (group, "train"))
        row = _row(bench, bench.judged(m), 2.0)
        row.tokens, row.peak = 3200, 100.0
        return row.record(bench.met(row, [row]))

    for units, tiles, met in (((), "", "yes"), (("AMX",), "amx", "no")):
        monkeypatch.setattr(backends, "bfloat16_units", lambda units=units: units)
        monkeypatch.setattr(bench, "tiles", lambda tiles=tiles: tiles)
        high, bf16, plain = judged("high"), judged("bf16"), judged("layers")
        assert high["met"] == met and plain["peak_part"]
        assert bool(high["peak_part"]) == bool(bf16["peak_part"]) == (not units)
        assert high["target_of"] == ("row" if units else "float32 row")
        assert high["target"] == ("2.5" if units else "1.4") and bf16["target"] == "2.2"


def test_high_is_torchs_switch_for_the_check_and_both_sides(bench, monkeypatch):
    from benchmarks import shapes

    seen = []
    asked = torch.get_float32_matmul_precision
    monkeypatch.setattr(bench, "verify", lambda m, tested: seen.append((m.group, asked())))
    monkeypatch.setattr(bench, "measure", lambda m, *_: seen.append((m.group, asked())))
    some = [m for m in shapes.measurements() if m.group in ("bf16", "high")]
    bench.measured([replace(m, sizes=(3, 4, 5, 6)) for m in some], 0.01, bench.Console())
    assert set(seen) == {("bf16", "highest"), ("high", "high")} and asked() == "highest"


def test_high_has_a_budget_of_its_own(bench, monkeypatch):
    from benchmarks import shapes, subjects

    class Off(nn.LSTM):
        def forward(self, input, hx=None):
            y, hidden = super().forward(input, hx)
            return y * (1 + off), hidden

    monkeypatch.setattr(nn, "LSTM", Off, raising=False)
    high = next(m for m in shapes.measurements() if m.group == "high")
    off = 1e-5
    subjects.verify(replace(high, sizes=(3, 4, 5, 6)))
    off = 3e-5
    with pytest.raises(AssertionError, match="budget 2e-05"):
        subjects.verify(replace(high, sizes=(3, 4, 5, 6)))


def test_torch_compile_is_asked_for_what_the_table_says(bench, monkeypatch):
    from benchmarks import baselines, shapes

    monkeypatch.setattr(baselines, "BASELINES", {"compile": baselines.compiled})
    last = {m.mode: m for m in shapes.select("lstm", "layers", "9")}
    assert last["inf"].compiled and not last["train"].compiled
    row = bench.measure(last["inf"], 0.01)
    assert not row.untimed and float(row.record("")["compile_ms"]) > 0
    row = bench.measure(last["train"], 0.01)
    assert row.record("")["compile_ms"] == "refused" and "minutes" in row.untimed["compile"][1]
    kinds = {(m.cell, m.group, m.mode) for m in shapes.measurements() if m.compiled}
    modes = ("train", "inf")
    assert kinds == {
        *((cell, "layers", mode) for cell in shapes.CELLS for mode in modes),
        *((cell, "cells", mode) for cell in ("lstm", "gru") for mode in modes),
    }


def test_onnxruntime_is_missed_where_it_is_not_installed(bench, monkeypatch):
    from benchmarks import baselines, shapes

    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setattr(baselines, "BASELINES", {"onnxruntime": baselines.onnxruntime})
    first = next(m for m in shapes.measurements() if m.mode == "inf")
    row = bench.measure(replace(first, sizes=(3, 4, 5, 6)), 0.01)
    assert row.milliseconds("onnxruntime") == "missing"
    assert "benchmarks/requirements.txt" in row.untimed["onnxruntime"][1]
