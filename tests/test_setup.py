"""What setup.py builds for a GPU, by nvcc's that only say what they would do."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parent.parent
if not (ROOT / "setup.py").exists():
    pytest.skip("no source tree", allow_module_level=True)

NVCC = """#!/bin/sh
echo "$*" >> "{folder}/calls"
case "$*" in *--version) echo "release {version}"; exit;; esac
case "$*" in {refused}) echo "warning: old"; echo "fatal: no such gpu" >&2; exit 1;; esac
"""


@pytest.fixture
def build(tmp_path, monkeypatch):
    """setup.py's names, building below tmp_path."""
    for name in ("NVCC", "CUDA_HOME", "FASTSEQ_CUDA", "FASTSEQ_ISAS", "FASTSEQ_WERROR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    names = runpy.run_path(str(ROOT / "setup.py"))
    given = names["NinjaBuild"].build_extension.__globals__
    monkeypatch.setitem(given, "ROOT", tmp_path)
    return given


def fake(folder: Path, refused: str = "nothing", version: str = "13.0") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "nvcc"
    path.write_text(NVCC.format(folder=folder, refused=refused, version=version))
    path.chmod(0o755)
    return path


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def usable(build, nvcc):
    left_out: list[str] = []
    return build["NinjaBuild"].usable_gpus(nvcc and str(nvcc), "g++", left_out), left_out


def test_an_nvcc_that_knows_all_is_tried_once(build, tmp_path):
    nvcc = fake(tmp_path / "bin")
    everything = list(build["GPU_CODE"])
    assert usable(build, nvcc) == (everything, []) == usable(build, nvcc)
    version, trial, again = calls(tmp_path / "bin")
    assert version == again == "--version" and "-Werror all-warnings" in trial
    assert all(code in trial for code in build["GPU_CODE"].values())
    # Another version is another compiler.
    fake(tmp_path / "bin", "*sm_100*", "12.4")
    assert "sm_100" not in usable(build, nvcc)[0]


@pytest.mark.parametrize("name", ["sm_80", "sm_100", "sm_90a", "PTX"])
def test_what_it_does_not_know_is_left_out_with_one_line(build, tmp_path, name):
    code = build["GPU_CODE"][name]
    nvcc = fake(tmp_path / "bin", f"*{code.partition(' ')[2]}*")
    found, left_out = usable(build, nvcc)
    assert found == [each for each in build["GPU_CODE"] if each != name]
    (line,) = left_out
    assert f"{nvcc} does not compile for: {name} (fatal: no such gpu)" in line


def test_one_that_is_too_old_or_does_not_run_leaves_cuda_out(build, tmp_path):
    for nvcc in (fake(tmp_path / "bin", "*c++17*"), tmp_path / "none", tmp_path):
        found, left_out = usable(build, nvcc)
        assert found == [] and len(left_out) == 1 and f"{nvcc} does not compile: " in left_out[0]
    assert usable(build, None)[1] == [
        "CUDA C++ kernels: no nvcc, or FASTSEQ_CUDA=0; GPUs run PyTorch's own"
    ]


@pytest.mark.parametrize("refused, gpus", [("*c++17*", []), ("*=sm_*", ["PTX"])])
def test_the_rest_is_built_all_the_same(build, tmp_path, monkeypatch, capsys, refused, gpus):
    nvcc, ran = fake(tmp_path / "bin", refused), []
    monkeypatch.setenv("NVCC", str(nvcc))
    monkeypatch.setenv("FASTSEQ_ISAS", "scalar")
    command = build["NinjaBuild"](setuptools.Distribution())
    command.ensure_finalized()
    monkeypatch.setattr(build["NinjaBuild"], "run_ninja", lambda self, *given: ran.append(given))
    command.build_extension(setuptools.Extension("fastseq._native_library", sources=[]))
    if not ran:
        pytest.skip("no C++ compiler")
    assert ran[0][1:3] == (str(nvcc) if gpus else None, gpus) and ran[0][4] == ["scalar"]
    said = capsys.readouterr().out
    assert said.count("left out CUDA C++ kernels") == 1
    assert ("built GPU kernels for: PTX" in said) == bool(gpus)


def test_where_nvcc_is_looked_for(build, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    usual = shutil.which("nvcc", path="/usr/local/cuda/bin")
    assert build["find_nvcc"]() == usual
    on_path = fake(tmp_path / "path")
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert build["find_nvcc"]() == str(on_path)
    home = fake(tmp_path / "home" / "bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert build["find_nvcc"]() == str(home)
    monkeypatch.setenv("NVCC", "mine")
    assert build["find_nvcc"]() == "mine"
