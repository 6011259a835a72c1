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
    "recurrent tests",
    "resources",
    "memcheck",
    "recurrent memcheck",
    "racecheck",
    "recurrent racecheck",
    "synccheck",
    "recurrent synccheck",
    "recurrent",
    "decoder",
    "attention",
    "loss",
    "decoding",
    "tiles",
    "demo",
]


@pytest.fixture
def run(tmp_path):
    if not shutil.which("bash"):
        pytest.skip("bash is not installed")
    (tmp_path / "bin").mkdir()
    for name in ("python3", "compute-sanitizer"):
        program = tmp_path / "bin" / name
        program.write_text(
            '#!/bin/sh\necho "ran $*"\n'
            'case "$*" in *"$SLOW"*) exec sleep 9;; esac\n'
            'case "$*" in *"$BAD"*) exit 3;; esac\n'
        )
        program.chmod(0o755)

    def run(bad="nothing", slow="nothing", seconds=60):
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        own = {"PATH": path, "OUT": str(tmp_path / "out"), "BAD": bad, "SLOW": slow}
        done = subprocess.run(
            ["bash", str(ROOT / "benchmarks" / "gpu.sh")],
            env=os.environ | own | {"SECONDS_IN_ALL": str(seconds)},
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


def test_a_missing_sanitizer_is_a_failure(run, tmp_path):
    if shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin"):
        pytest.skip("compute-sanitizer is installed")
    (tmp_path / "bin" / "compute-sanitizer").unlink()
    done, _, summary = run()
    assert done.returncode == 1 and summary["sanitizers"].startswith("FAILED")


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


def test_kernels_that_are_wrong_do_not_come_into_the_table(run):
    assert "measured_cuda.json" in run()[1]
    done, log, summary = run(bad="test_on_device.py -k", slow="nothing")
    assert summary["recurrent memcheck"].startswith("FAILED") and "measured_cuda.json" in log
    done, log, summary = run(bad="worksteal tests/cuda/test_on_device.py")
    assert summary["recurrent tests"].startswith("FAILED") and "measured_cuda.json" not in log


def test_without_a_compiler_the_rest_runs_all_the_same(run):
    done, _, summary = run(bad="pip")
    assert done.returncode == 1 and list(summary)[-1] == "install without the native library"
    done, log, _ = run(bad="torch.cuda")
    assert done.returncode == 1 and log.count("ran ") == 1


def test_time_is_bounded(run):
    done, _, summary = run(slow="bench_attention", seconds=3)
    assert done.returncode == 1 and "FAILED: more than" in summary["attention"]
    assert "no time left" in summary["demo"]


def test_every_file_and_option_it_names_is_there(run):
    """What it calls is called nowhere else without a GPU."""
    words = run()[1].split()
    for word in words:
        if word.startswith("tests/"):
            assert (ROOT / word).exists(), word
        if word.startswith("benchmarks.bench_"):
            assert (ROOT / word.replace(".", "/")).with_suffix(".py").exists(), word
