"""benchmarks/gpu.sh with programs that only say they were called: what runs, and what is kept."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = [
    "a GPU",
    "build",
    "doctor",
    "tests",
    "attention tests",
    "recurrent tests",
    "the CPU's recurrent tests",
    "resources",
    "memcheck",
    "recurrent memcheck",
    "racecheck",
    "recurrent racecheck",
    "synccheck",
    "recurrent synccheck",
    "recurrent",
    "attention",
    "decoder",
    "loss",
    "decoding",
    "tiles",
    "demo",
]

SANITIZERS = ("memcheck", "racecheck", "synccheck")


@pytest.fixture
def run(tmp_path):
    if not shutil.which("bash"):
        pytest.skip("bash is not installed")
    (tmp_path / "bin").mkdir()
    for name in ("python3", "compute-sanitizer"):
        program = tmp_path / "bin" / name
        program.write_text(
            '#!/bin/sh\necho "ran $*"\n'
            'case "$*" in *$SLOW*) exec sleep 9;; esac\n'
            'case "$*" in *$BAD*) exit 3;; esac\n'
            'case "$*" in *--tool*$SILENT*) ;; *--tool*) echo "== SUMMARY: 0 errors";; esac\n'
        )
        program.chmod(0o755)

    def run(bad="nothing", slow="nothing", silent="nothing", seconds=60):
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        own = {"PATH": path, "OUT": "out", "BAD": bad, "SLOW": slow, "SILENT": silent}
        done = subprocess.run(
            ["bash", str(ROOT / "benchmarks" / "gpu.sh")],
            env=os.environ | own | {"SECONDS_IN_ALL": str(seconds)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=50,
        )
        log = (tmp_path / "out" / "gpu.log").read_text()
        summary = log.partition("== summary\n")[2].splitlines()
        return done, log, {line.partition(": ")[0]: line.partition(": ")[2] for line in summary}

    return run


def test_every_part_runs_and_is_told_of(run):
    done, log, summary = run()
    assert done.returncode == 0 and list(summary) == PARTS, done.stderr
    assert all(said.startswith("ok") for said in summary.values())
    assert log.count("ran ") == len(PARTS) and log == done.stdout


def test_benchmarks_end_of_themselves_before_they_are_ended(run):
    said = [line for line in run()[1].splitlines() if "benchmarks.bench_" in line]
    assert len(said) == 5
    for line in said:
        seconds = int(line.split("--within ")[1].split()[0])
        assert 0 < seconds < 465 / 2 and "--output" in line


def test_a_part_that_fails_stops_no_other(run):
    done, _, summary = run(bad="bench_attention")
    assert done.returncode == 1 and list(summary) == PARTS
    assert [name for name, said in summary.items() if "FAILED: 3" in said] == ["attention"]


def test_a_part_beside_others_that_fails_or_takes_too_long_is_told_of(run):
    done, _, summary = run(bad="racecheck", slow="worksteal tests/cuda", seconds=3)
    assert done.returncode == 1 and list(summary) == PARTS
    assert all("FAILED: 3" in summary[name] for name in ("racecheck", "recurrent racecheck"))
    assert "FAILED: more than" in summary["recurrent tests"]
    assert summary["tests"].startswith("ok") and summary["resources"].startswith("ok")


def tables(log: str) -> list[str]:
    """The benchmarks that were told to write the table."""
    said = [line for line in log.splitlines() if line.startswith("ran ") and "--table" in line]
    return [line.partition("benchmarks.bench_")[2].partition(" ")[0] for line in said]


def test_kernels_that_are_right_come_into_the_table(run, tmp_path):
    stale = tmp_path / "out" / "measured_cuda.json"
    stale.parent.mkdir()
    stale.write_text("{}")
    log = run()[1]
    assert tables(log) == ["recurrent_gpu", "decoder"] and not stale.exists()
    assert f"fastseq.kernels.tune --seconds 45 --output {stale.with_name('tuned.json')}" in log
    assert f"--table {stale}" in log and f"kept as fastseq/ops/measured_cuda.json: {stale}" in log


@pytest.mark.parametrize(
    "bad, failed",
    [("worksteal tests/cuda/test_on_device.py", "recurrent tests")]
    + [("tests/test_functional_rnn.py", "the CPU's recurrent tests")]
    + [(f"{tool} *test_on_device.py", f"recurrent {tool}") for tool in SANITIZERS],
)
def test_kernels_that_are_wrong_do_not(run, bad, failed):
    _, log, summary = run(bad=bad)
    assert [name for name, said in summary.items() if "FAILED" in said] == [failed]
    assert not tables(log) and "the table was left as it is" in log


@pytest.mark.parametrize(
    "bad", ["tests/test_gpu.py", "tests/nn/test_attention.py", "synccheck *test_attention_gpu.py"]
)
def test_decoders_need_the_attention_kernels_too(run, bad):
    assert tables(run(bad=bad)[1]) == ["recurrent_gpu"]


def test_a_sanitizer_that_says_nothing_has_seen_nothing(run):
    _, log, summary = run(silent="racecheck *test_on_device.py")
    assert summary["recurrent racecheck"].startswith("FAILED") and not tables(log)
    assert summary["racecheck"].startswith("ok")


def test_without_sanitizers_there_is_no_table(run, tmp_path):
    if shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin"):
        pytest.skip("compute-sanitizer is installed")
    (tmp_path / "bin" / "compute-sanitizer").unlink()
    done, log, summary = run()
    assert done.returncode == 1 and summary["sanitizers"].startswith("FAILED") and not tables(log)


# Of `compute-sanitizer`, as its manual lists them: which tool each is for.
OPTIONS = {
    "--tool": None,
    "--error-exitcode": None,
    "--target-processes": None,
    "--launch-timeout": None,
    "--report-api-errors": "memcheck",
}


def test_sanitizers_are_given_their_own_options(run):
    for line in run()[1].splitlines():
        given, _, _ = line.removeprefix("ran ").partition(" python3 ")
        if given.startswith("--tool"):
            options = dict(zip(*[iter(given.split())] * 2, strict=True))
            assert {OPTIONS[name] for name in options} <= {None, options["--tool"]}


def test_without_a_compiler_the_rest_runs_all_the_same(run):
    done, _, summary = run(bad="pip")
    assert done.returncode == 1 and list(summary)[-1] == "install without the native library"
    done, log, _ = run(bad="torch.cuda")
    assert done.returncode == 1 and log.count("ran ") == 1


def test_time_is_bounded(run):
    done, log, summary = run(slow="bench_attention", seconds=7)
    assert done.returncode == 1 and "FAILED: more than" in summary["attention"]
    assert summary["decoder"].startswith("ok")
    # What came before is in the log as it comes.
    told = [line for line in log.splitlines() if line.startswith("-- ")]
    assert told.index(f"-- recurrent: {summary['recurrent']}") < log.splitlines().index(
        "== attention"
    )
    done, _, summary = run(slow="worksteal", seconds=2)
    assert "no time left" in summary["demo"]


def test_every_file_and_option_it_names_is_there(run):
    """What it calls is called nowhere else without a GPU."""
    words = run()[1].split()
    for word in words:
        if word.startswith("tests/"):
            assert (ROOT / word).exists(), word
        if word.startswith("benchmarks.bench_"):
            assert (ROOT / word.replace(".", "/")).with_suffix(".py").exists(), word
