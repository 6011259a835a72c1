"""What a launch costs the host, and that a remembered one is Triton's own: without a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

HERE = Path(__file__).parent


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler for a driver that does nothing")
def test_launches_by_a_driver_that_does_nothing(tmp_path):
    library = tmp_path / "libcuda.so.1"
    command = ["cc", "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, str(HERE / "stub_cuda.c"), "-o", str(library)], check=True)
    (tmp_path / "libcuda.so").symlink_to(library.name)
    here = {"TRITON_LIBCUDA_PATH": str(tmp_path), "LD_LIBRARY_PATH": str(tmp_path)}
    # Another machine's driver may have been linked into what Triton keeps.
    here["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        + [str(HERE / "launched_without_gpu.py")],
        env=os.environ | here,
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
