"""The benchmark of the decoder records what it measures, and never times a wrong answer."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks import bench_decoder, command

    monkeypatch.setattr(command, "busy", lambda: None)
    monkeypatch.setitem(bench_decoder.SIZES, "cpu", [(2, 3, 4, 5, 6, 7, 8)])
    return bench_decoder


def rows_of(path: Path) -> list[dict[str, str]]:
    from benchmarks.plot import read_results

    return read_results(path)[1]


def test_every_row_is_checked_timed_and_recorded(bench, tmp_path):
    assert bench.main(["--quick", "--output", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "decoder_cpu_quick.csv")
    assert [(row["order"], row["mode"]) for row in rows] == [
        (order, mode) for order in ("before", "feeding") for mode in ("train", "inf")
    ]
    for row in rows:
        ratio = float(row["eager_ms"]) / float(row["fastseq_ms"])
        assert row["status"] == "ok" and float(row["over_eager"]) == pytest.approx(ratio, rel=0.1)


def test_a_wrong_answer_is_not_timed(bench, tmp_path, monkeypatch):
    right = bench.functional.attention_decoder

    def wrong(*arguments, **options):
        decoded = right(*arguments, **options)
        return decoded._replace(features=1.001 * decoded.features)

    monkeypatch.setattr(bench.functional, "attention_decoder", wrong)
    assert bench.main(["--quick", "--output", str(tmp_path)]) == 1
    for row in rows_of(tmp_path / "decoder_cpu_quick.csv"):
        assert row["status"].startswith("wrong: ") and not row["fastseq_ms"]
