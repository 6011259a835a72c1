"""The benchmark records what it measures, and never times a wrong answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastseq import nn


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks import bench_lstm

    monkeypatch.setattr(bench_lstm, "busy", lambda: None)
    monkeypatch.setattr(bench_lstm, "peak_gflops", lambda: 100.0)
    return bench_lstm


def test_a_row_is_checked_timed_and_recorded(bench, tmp_path, capsys):
    assert bench.main(["--quick", "--rows", "9", "--threads", "1", "--output", str(tmp_path)]) == 0
    from benchmarks.plot import read_results

    about, rows = read_results(tmp_path / "lstm_cpu_quick.csv")
    assert about["torch"] == torch.__version__ and about["threads"] == "1"
    assert [row["mode"] for row in rows] == ["train", "inf"]
    for row in rows:
        assert row["status"] == "ok"
        ratio = float(row["torch_ms"]) / float(row["fastseq_ms"])
        assert float(row["ratio"]) == pytest.approx(ratio, rel=0.01)
        assert (row["met"] == "yes") == (float(row["ratio"]) >= float(row["target"]))
        assert float(row["fastseq_q1_ms"]) <= float(row["fastseq_ms"])
    assert (tmp_path / "lstm_cpu_quick.png").stat().st_size > 10_000
    assert {path.name for path in tmp_path.iterdir()} == {
        "lstm_cpu_quick.csv",
        "lstm_cpu_quick.png",
    }
    assert "5, 1, 16, 32" in capsys.readouterr().out


def test_a_wrong_answer_is_not_timed(bench, tmp_path, monkeypatch, capsys):
    class Wrong(nn.LSTM):
        def forward(self, input, hx=None):
            y, hidden = super().forward(input, hx)
            return y * 1.001, hidden

    monkeypatch.setattr(bench.nn, "LSTM", Wrong, raising=False)
    assert bench.main(["--quick", "--rows", "9", "--output", str(tmp_path)]) == 1
    from benchmarks.plot import read_results

    for row in read_results(tmp_path / "lstm_cpu_quick.csv")[1]:
        assert row["status"].startswith("wrong: ") and "error" in row["status"]
        assert row["fastseq_ms"] == row["ratio"] == "" and row["met"] == "no"
    assert "wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["--rows", "0"], "rows from 1 to 9, got '0'"),
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
