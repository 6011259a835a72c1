"""The benchmark of attention records what it measures, and never times a wrong answer."""

from __future__ import annotations

import re
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


def test_what_is_too_large_is_checked_by_two_of_its_rows(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "MOST_TERMS", 1)
    monkeypatch.setattr(bench, "milliseconds", lambda calls, *_: dict.fromkeys(calls, 1.0))
    assert bench.main(["--quick", "--output", str(tmp_path)]) == 0
    right = bench.functional.additive_attention

    def another_row(**arguments):
        context, weights = right(**arguments)
        return context + 0.001 * arguments["query"].sum(), weights

    monkeypatch.setattr(bench.functional, "additive_attention", another_row)
    assert bench.main(["--quick", "--output", str(tmp_path)]) == 1
    assert {row["status"][:6] for row in rows_of(tmp_path / "attention_cpu_quick.csv")} == {
        "wrong:",
        "ok",
    }


@pytest.fixture
def gpu(bench, monkeypatch):
    """The benchmark of a GPU, on the host: small sizes, its clock, properties of none."""
    build = bench.build
    monkeypatch.setattr(bench, "build", lambda device, *rest: build("cpu", *rest))
    monkeypatch.setattr(bench, "milliseconds", lambda calls, *_: dict.fromkeys(calls, 1.0))
    monkeypatch.setitem(bench.SIZES, "cuda", [(2, 1 + n % 2, 4, 5, 6 + n) for n in range(5)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    rates = {"sm_clock_rate": 1_755_000, "mem_clock_rate": 3_201_000, "mem_bus_width": 6144}
    monkeypatch.setattr(
        bench, "driver_s_properties", lambda: {"multiprocessor_count": 132, **rates}
    )
    return bench


def test_on_a_gpu_each_kind_comes_before_it_is_compiled(gpu, tmp_path, monkeypatch):
    """And what there are targets for before the rest."""
    compiled = []
    monkeypatch.setattr(gpu.torch, "compile", lambda call: compiled.append(call) or call)
    path = tmp_path / "attention_cuda.csv"
    write, before = gpu.command.__globals__["write_csv"], []

    def write_csv(*arguments):
        write(*arguments)
        if not compiled:
            before[:] = rows_of(path)

    monkeypatch.setitem(gpu.command.__globals__, "write_csv", write_csv)
    assert gpu.main(["--device", "cuda", "--output", str(tmp_path)]) == 0
    rows, kinds = rows_of(path), sum(len(places) for places in gpu.GPU.values())
    assert len(rows) == len(compiled) == 2 * kinds
    assert [(row["score"], row["where"]) for row in before] == [("additive", "all")] * 10
    assert [row["where"] for row in rows[:26]] == ["all"] * 10 + ["lengths"] * 10 + ["mask"] * 6
    assert {(row["score"], row["where"]) for row in rows} == {kind[::2] for kind in gpu.GPU}
    assert all(row["over_compile"] and row["part_of_floor"] for row in rows)
    assert not any(row["over_compile"] for row in before)
    assert all(row["over_eager"] for row in before)
    # Half of the places do not count: neither do they for the floor.
    floor = {
        (r["where"], r["Q"], r["C"], r["mode"]): float(r["special_floor_ms"])
        for r in rows
        if (r["score"], r["dtype"]) == ("additive", "float32")
    }
    assert floor["lengths", "1", "6", "inf"] <= floor["all", "1", "6", "inf"]


def test_targets_are_said_to_be_met_or_missed(gpu, tmp_path, monkeypatch):
    """2 over torch.compile, 5 over eager, 70 % of the floor, training with the additive score."""
    times = {"fastseq": 1.0, "eager": 5.0, "compile": 1.999}
    monkeypatch.setattr(gpu, "milliseconds", lambda calls, *_: {n: times[n] for n in calls})
    monkeypatch.setattr(gpu, "gpu_floors", lambda *_: {"special": 0.7, "bytes": 0.1})
    assert gpu.main(["--device", "cuda", "--output", str(tmp_path)]) == 0
    for row in rows_of(tmp_path / "attention_cuda.csv"):
        found = [row[f"{name}_target"] for name in ("eager", "compile", "floor")]
        judged = (row["score"], row["mode"]) == ("additive", "train")
        assert found == (["5 met", "2 missed", "0.7 met"] if judged else [""] * 3)


def test_a_run_cut_off_and_a_row_that_fails_keep_the_others(gpu, tmp_path, monkeypatch):
    times = []

    def milliseconds(calls, *_):
        times.append(calls)
        if len(times) == 2:
            raise RuntimeError("out of memory\nand more")
        if len(times) == 4:
            raise KeyboardInterrupt
        return dict.fromkeys(calls, 1.0)

    monkeypatch.setattr(gpu, "milliseconds", milliseconds)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--device", "cuda", "--output", str(tmp_path)])
    status = [row["status"] for row in rows_of(tmp_path / "attention_cuda.csv")]
    assert status == ["ok", "failed: RuntimeError: out of memory and more", "ok"]


def test_what_the_readme_expects_is_computed(capsys):
    """Of the sizes that are measured on a GPU, for every score."""
    from benchmarks import attention_tables, bench_attention

    assert attention_tables.main(["floors"]) == 0
    table = capsys.readouterr().out
    assert table.strip() in (Path(__file__).parents[2] / "kernels" / "README.md").read_text()
    assert len(table.splitlines()) == 3 + 5 * len(bench_attention.SIZES["cuda"])


def test_the_tables_of_errors_can_be_made(capsys):
    from benchmarks import attention_tables

    attention_tables.second_mean()
    said = {
        row[0]: row[1:]
        for row in re.findall(r"\| ([a-z ]+) \| (.*), .* \| (.*), ", capsys.readouterr().out)
    }
    one, two = ([float(error) for error in said[name]] for name in ("one mean", "two"))
    assert all(less < more / 4 for less, more in zip(two, one, strict=True))
    assert attention_tables.main(["error"]) == 2 and "expected some of" in capsys.readouterr().out


def test_bad_arguments_end_before_anything_is_measured(bench, tmp_path, capsys):
    wrong = [["--rows", "7"]]
    if not torch.cuda.is_available():
        wrong.append(["--device", "cuda"])
    for arguments in wrong:
        with pytest.raises(SystemExit) as end:
            bench.main([*arguments, "--output", str(tmp_path)])
        assert end.value.code == 2 and "expected" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
