"""The benchmark of the fused loss records what it measures, and never times a wrong answer."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks import bench_loss, command

    monkeypatch.setattr(command, "busy", lambda: None)
    monkeypatch.setattr(bench_loss, "SIZES", [(700, 8, 900)])
    return bench_loss


def rows_of(path: Path) -> list[dict[str, str]]:
    from benchmarks.plot import read_results

    return read_results(path)[1]


def test_every_row_is_checked_timed_and_recorded(bench, tmp_path, monkeypatch):
    # Small logits: enough of them that a chunk is far from all.
    monkeypatch.setattr("fastseq.ops.linear_cross_entropy.CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr("fastseq.functional.loss.DIRECT_BYTES", 0)
    assert bench.main(["--quick", "--output", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "loss_cpu_quick.csv")
    assert [row["options"] for row in rows] == list(bench.OPTIONS)
    for row in rows:
        ratio = float(row["torch_ms"]) / float(row["fastseq_ms"])
        assert row["status"] == "ok" and float(row["ratio"]) == pytest.approx(ratio, rel=0.1)
        # torch holds the logits and their gradient at least.
        assert float(row["torch_mib"]) > 2 * 700 * 900 * 4 / 2**20 > 3 * float(row["fastseq_mib"])


def test_a_wrong_answer_is_not_timed(bench, tmp_path, monkeypatch):
    right = bench.functional.linear_cross_entropy
    monkeypatch.setattr(
        bench.functional, "linear_cross_entropy", lambda *a, **k: 1.001 * right(*a, **k)
    )
    assert bench.main(["--quick", "--output", str(tmp_path)]) == 1
    for row in rows_of(tmp_path / "loss_cpu_quick.csv"):
        assert row["status"].startswith("wrong: ") and not row["fastseq_ms"]
