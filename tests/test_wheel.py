"""``make wheel``: one file, whole and nothing more, that runs where no compiler is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fastseq import _native
from tests.try_wheel import clean_environment, home_of_torch, try_wheel

ROOT = Path(__file__).parent.parent
NINJA = ROOT / "build" / "native" / "build.ninja"


def sources() -> set[str]:
    """What the wheel has to hold, by its names."""

    def found(folder):
        paths = (path for kind in ("*.py", "*.json") for path in (ROOT / folder).rglob(kind))
        return {str(path.relative_to(ROOT)) for path in paths}

    return found("fastseq") | {f"fastseq/{name}" for name in found("kernels")}


@pytest.mark.skipif(not NINJA.exists(), reason="no native build")
@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_the_wheel_is_whole_and_runs_without_a_compiler(tmp_path):
    # Another compiler than the last one would compile everything anew.
    commands = re.findall(r"command = (\S+)", NINJA.read_text())
    nvcc = [command for command in commands if command.endswith("nvcc")]
    compilers = {"CXX": commands[0]} | ({"NVCC": nvcc[0]} if nvcc else {"FASTSEQ_CUDA": "0"})
    subprocess.run(
        ["make", "-s", "-o", "build", "wheel", f"BIN={Path(sys.executable).parent}"]
        + [f"DIST={tmp_path}"],
        cwd=ROOT,
        env=os.environ | compilers,
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    tag = r"fastseq-[\d.]+-py3-none-(manylinux_\d+_\d+_\w+|(?!linux)\w+)\.whl"
    assert re.fullmatch(tag, wheel.name), wheel.name
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
        library = file.read("fastseq/libfastseq.so")
    # The module for eager calls is there for whoever has this torch and this Python.
    eager = {name for name in names if re.fullmatch(r"fastseq/_eager-torch[^/]+\.so", name)}
    assert len(eager) == (1 if _native.eager else 0)
    assert names - eager == sources() | {"fastseq/libfastseq.so"}
    # Of torch it asks for no library of one Python's or one GPU's.
    assert not re.findall(rb"libtorch_python|libtorch_cuda|libpython", library)
    here = home_of_torch(Path(sys.executable))
    said = try_wheel(wheel, clean_environment(tmp_path / "clean", borrow=here))
    assert said.startswith("wheel works with torch "), said
