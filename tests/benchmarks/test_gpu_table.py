"""The table by which a GPU's calls are chosen, as the benchmark writes it."""

from __future__ import annotations

import json

from benchmarks import bench_recurrent_gpu
from fastseq.ops import measured_cuda


def test_what_is_written_is_what_is_chosen_by(tmp_path, monkeypatch):
    monkeypatch.setattr(measured_cuda, "TABLE", {"another": [{"kept": 1}], "a GPU": [{"old": 1}]})
    about = dict(cell="lstm", form="plain", dtype="bf16", T=50, B=64, I=512, H=512)
    found = [
        about | dict(mode="train", status="ok", torch_ms="2.0", step_ms="3.0", grid_ms="1.0"),
        about | dict(mode="inf", status="grid is wrong: y"),
    ]
    bench_recurrent_gpu.write_table(tmp_path / "table.json", "a GPU", found)
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["another"] == [{"kept": 1}] and len(table["a GPU"]) == 1
    monkeypatch.setattr(measured_cuda, "TABLE", table)
    kind = measured_cuda.Kind("lstm", "bf16", "plain", "train")
    assert measured_cuda.fastest_way("a GPU", kind, 64, 512) == "grid"
    assert measured_cuda.fastest_way("a GPU", kind._replace(mode="inf"), 64, 512) is None
    assert measured_cuda.torchs_reason("a GPU", kind, "bf16", 1, 64, 512) is None
