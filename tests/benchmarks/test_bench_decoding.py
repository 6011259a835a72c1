"""The benchmark of decoding records what it measures, and never times another search's answer."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks import bench_decoding, command

    monkeypatch.setattr(command, "busy", lambda: None)
    sizes = [((11, 6, 8, 3, 4, 4), 1e-6, 1e6), ((11, 6, 8, 1, 4, 4), 1e-6, 1e6)]
    monkeypatch.setattr(bench_decoding, "SIZES", sizes)
    return bench_decoding


def rows_of(path: Path) -> list[dict[str, str]]:
    from benchmarks.plot import read_results

    return read_results(path)[1]


def test_every_way_is_checked_timed_and_recorded(bench, tmp_path):
    assert bench.main(["--quick", "--output", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "decoding_cpu_quick.csv")
    assert [(row["way"], row["B"]) for row in rows] == [
        (way, batch) for batch in "31" for way in ("greedy", "sample", "beam 5")
    ]
    met = {"greedy": "yes", "sample": "", "beam 5": "no"}
    for row in rows:
        ratio = float(row["plain_ms"]) / float(row["fastseq_ms"])
        assert row["status"] == "ok" and float(row["ratio"]) == pytest.approx(ratio, rel=0.1)
        assert row["met"] == met[row["way"]]


@pytest.mark.parametrize("way", ["greedy", "sample", "beam"])
def test_other_tokens_are_not_timed(bench, tmp_path, monkeypatch, way):
    plain = getattr(bench, f"plain_{way}")
    monkeypatch.setattr(bench, f"plain_{way}", lambda *given: (plain(*given) + 1) % 11)
    assert bench.main(["--quick", "--rows", "1", "--output", str(tmp_path)]) == 1
    for row in rows_of(tmp_path / "decoding_cpu_quick.csv"):
        assert row["status"].startswith("wrong: ") == row["way"].startswith(way)
        assert bool(row["fastseq_ms"]) != row["way"].startswith(way)
