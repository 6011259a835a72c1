"""The benchmark of a training step records what it measures, and never times a wrong gradient."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks import bench_training, command

    monkeypatch.setattr(command, "busy", lambda: None)
    monkeypatch.setattr(bench_training, "SIZES", [((11, 6, 8, 3, 4), 1e-6, 1e6)])
    return bench_training


def rows_of(path: Path) -> list[dict[str, str]]:
    from benchmarks.plot import read_results

    return read_results(path)[1]


def test_every_row_is_checked_timed_and_recorded(bench, tmp_path):
    assert bench.main(["--quick", "--output", str(tmp_path)]) == 0
    forced, mixed = rows_of(tmp_path / "training_cpu_quick.csv")
    assert (forced["forcing"], mixed["forcing"]) == ("1.0", "0.5")
    for row in (forced, mixed):
        ratio = float(row["reference_ms"]) / float(row["fastseq_ms"])
        assert row["status"] == "ok" and float(row["ratio"]) == pytest.approx(ratio, rel=0.1)
        assert row["met"] == "yes"
    assert forced["tuned_met"] == "no" and float(forced["memory_part"]) > 0
    assert all(float(forced[f"{part}_ms"]) > 0 for part in ("encoder", "decoder", "output"))
    assert float(forced["fused_loss_ratio"]) > 0


@pytest.mark.parametrize("method", ["forward", "features"])
def test_a_wrong_gradient_is_not_timed(bench, tmp_path, monkeypatch, method):
    right = getattr(bench.fast.Seq2Seq, method)

    def twice_its_gradient(self, *given):
        found = right(self, *given)
        return found + (found - found.detach())

    monkeypatch.setattr(bench.fast.Seq2Seq, method, twice_its_gradient)
    assert bench.main(["--quick", "--output", str(tmp_path)]) == 1
    for row in rows_of(tmp_path / "training_cpu_quick.csv"):
        assert row["status"].startswith("wrong: ") and not row["fastseq_ms"]
