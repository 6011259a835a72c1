"""The meeting of `grid`'s blocks under ThreadSanitizer: it orders what they hand each other."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.cuda.on_host import COMPILER, ROOT

FLAGS = "-std=c++17 -O1 -g -fsanitize=thread -ffp-contract=off -pthread".split()


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meeting")
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    (folder / "empty.cpp").write_text("int main() { return 0; }")
    trial = [COMPILER, *FLAGS, str(folder / "empty.cpp"), "-o", str(folder / "empty")]
    if subprocess.run(trial, capture_output=True).returncode:
        pytest.skip("the compiler has no ThreadSanitizer")
    if subprocess.run([str(folder / "empty")], capture_output=True).returncode:
        pytest.skip("ThreadSanitizer does not run here")

    def build(name, *more):
        source = str(ROOT / "tests" / "cuda" / "meeting.cpp")
        command = [COMPILER, *FLAGS, *more, source, "-o", str(folder / name)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
        return subprocess.run(
            [str(folder / name)], env=environment, capture_output=True, text=True, timeout=120
        )

    return build


def test_blocks_that_meet_do_not_race(build):
    done = build("meeting")
    assert done.returncode == 0, done.stderr[-3000:]


def test_blocks_that_arrive_without_releasing_do(build):
    """So that the test above can fail."""
    done = build("relaxed", "-DARRIVE=__ATOMIC_RELAXED")
    assert done.returncode == 66 and "data race" in done.stderr
