"""The benchmark of attention records what it measures, and never times a wrong answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks import bench_attention, command

    monkeypatch.setattr(command, "busy", lambda: None)
    monkeypatch.setitem(bench_attention.SIZES, "cpu", [(2, 3, 4, 5, 6)])
    # Compiling is not what is tested here.
    monkeypatch.setattr(bench_attention.torch, "compile", lambda call: call)
    return bench_attention


def rows_of(path: Path) -> list[dict[str, str]]:
    from benchmarks.plot import read_results

    return read_results(path)[1]


def test_every_row_is_checked_timed_and_recorded(bench, tmp_path):
    assert bench.main(["--quick", "--output", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "attention_cpu_quick.csv")
    assert [(row["score"], row["mode"]) for row in rows] == [
        (score, mode) for score in ("additive", "dot") for mode in ("train", "inf")
    ]
    for row in rows:
        ratio = float(row["eager_ms"]) / float(row["fastseq_ms"])
        assert row["status"] == "ok" and float(row["over_eager"]) == pytest.approx(ratio, rel=0.1)


def test_a_wrong_answer_is_not_timed(bench, tmp_path, monkeypatch):
    right = bench.functional.dot_attention
    monkeypatch.setattr(
        bench.functional,
        "dot_attention",
        lambda **arguments: tuple(1.001 * t for t in right(**arguments)),
    )
    assert bench.main(["--quick", "--output", str(tmp_path)]) == 1
    for row in rows_of(tmp_path / "attention_cpu_quick.csv"):
        assert row["status"].startswith("wrong: ") == (row["score"] == "dot")
        assert bool(row["fastseq_ms"]) == (row["score"] == "additive")


def test_bad_arguments_end_before_anything_is_measured(bench, tmp_path, capsys):
    wrong = [["--rows", "7"]]
    if not torch.cuda.is_available():
        wrong.append(["--device", "cuda"])
    for arguments in wrong:
        with pytest.raises(SystemExit) as end:
            bench.main([*arguments, "--output", str(tmp_path)])
        assert end.value.code == 2 and "expected" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
