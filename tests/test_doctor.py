from __future__ import annotations

import sys

import torch
from typer.testing import CliRunner

import fastseq
from fastseq import _native, backends, doctor
from fastseq.cli import app


def facts() -> dict[str, str]:
    return dict(doctor.report()[0])


def test_names_versions_threads_and_gpu(monkeypatch):
    torch.set_num_threads(1)
    rows = facts()
    assert rows["fastseq"].startswith(fastseq.__version__)
    assert rows["torch"] == torch.__version__
    assert rows["threads"].startswith("1 used")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert facts()["gpu"].startswith("none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda n: f"GPU {n}")
    assert facts()["gpu"] == "GPU 0, GPU 1"


def test_triton_missing_or_broken(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert facts()["triton"] == "not installed"


def test_bfloat16_instructions(monkeypatch):
    for units, said in {(): "none", ("AMX", "AVX-512 BF16"): "AMX, AVX-512 BF16"}.items():
        monkeypatch.setattr(backends, "bfloat16_units", lambda units=units: units)
        assert facts()["bfloat16 instructions"] == said


def test_a_library_that_does_not_load_is_said_and_fails(monkeypatch):
    monkeypatch.setattr(_native, "loaded", lambda: False)
    monkeypatch.setattr(_native, "why_not_loaded", lambda: "it was not built")
    rows, healthy = doctor.report()
    assert not healthy
    assert dict(rows)["native library"] == "not loaded: it was not built"
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "it was not built" in result.stdout


def test_a_library_of_another_version_is_done_without(monkeypatch):
    monkeypatch.setattr(_native.ctypes, "CDLL", lambda path: object())
    library, reason = _native._load()
    if _native.loaded():
        assert library is None
        assert reason.startswith("the native library is another version's, build it again: ")


def test_a_loaded_library_says_what_it_holds(monkeypatch):
    answers = {
        "loaded": True,
        "kernels": ["lstm_fwd_f32_avx2"],
        "build_info": {"compiler": "GCC 99", "isas": "scalar avx2", "left out": "the rest"},
        "built_isas": ["scalar", "avx2"],
        "available_isas": ["scalar"],
        "isa": "scalar",
        "isa_reason": "FASTSEQ_CPU_ISA=scalar",
    }
    for name, answer in answers.items():
        monkeypatch.setattr(_native, name, lambda answer=answer: answer)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    for text in (
        "GCC 99",
        "lstm_fwd_f32_avx2",
        "the rest",
        "built: scalar, avx2",
        "this machine has: scalar",
        "in use: scalar (FASTSEQ_CPU_ISA=scalar)",
    ):
        assert text in result.stdout
