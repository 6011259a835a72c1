"""Which code runs a recurrent call on a GPU, and what explain() says of it: without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fastseq
from fastseq import _native, functional, nn
from fastseq.ops import measured_cuda, recurrent_cuda
from fastseq.ops import recurrent as op

if not _native.loaded() or not _native.cuda_built():
    pytest.skip("the library is built without nvcc", allow_module_level=True)

H200 = (132, 232448)


@pytest.fixture
def a_gpu(monkeypatch):
    """Tensors on a device that isn't there, of an H200's size; nothing is computed."""
    monkeypatch.setattr(_native, "cuda_obstacle", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(measured_cuda, "device_name", lambda index: "a GPU")
    monkeypatch.setattr(recurrent_cuda, "limits", lambda device: H200)
    monkeypatch.setattr(torch.nn.init, "uniform_", lambda tensor, *bounds: tensor)
    with FakeTensorMode():
        yield


def plant(monkeypatch, *rows):
    """A table of one device."""
    names = ("cell", "dtype", "form", "mode", "T", "B", "H", "torch", "step", "whole", "grid")
    table = [{n: v for n, v in zip(names, row, strict=True) if v is not None} for row in rows]
    monkeypatch.setattr(measured_cuda, "TABLE", {"a GPU": table})


def said(layer, *shape, dtype=torch.float32, **options):
    module = layer(shape[-1], options.pop("H"), device="cuda", dtype=dtype, **options)
    return fastseq.explain(module, torch.empty(*shape, device="cuda", dtype=dtype))


@pytest.mark.parametrize(
    "layer, B, H, dtype, way",
    [
        (nn.LSTM, 64, 96, torch.float32, "whole"),
        (nn.LSTM, 64, 160, torch.bfloat16, "whole"),
        (nn.LSTM, 32, 256, torch.float32, "grid"),
        (nn.GRU, 8, 1024, torch.float32, "grid"),
        (nn.LSTM, 64, 1024, torch.float64, "step"),
        (nn.RNN, 8, 3000, torch.float32, "step"),
    ],
)
def test_explain_names_the_way(a_gpu, layer, B, H, dtype, way):
    with fastseq.use_backend("cuda"):
        found = said(layer, 20, B, 16, H=H, dtype=dtype)
    assert found.backend == "cuda" and found.reason.endswith(f": `{way}`, {WORDS[way]}")


WORDS = {
    "step": "a product and a launch a step",
    "whole": "one launch a layer, the weights in a block's shared memory",
    "grid": "one launch a layer, the weights in blocks that meet at each step",
}


def test_explain_names_the_way_of_each_pass_and_of_what_must_go_step_by_step(a_gpu):
    lstm = nn.LSTM(8, 96, device="cuda")
    x = torch.empty(5, 3, 8, device="cuda")
    with fastseq.use_backend("cuda"):
        zoneout = nn.LSTM(8, 96, zoneout=0.1, device="cuda")
        assert "`step`" in fastseq.explain(zoneout, x).reason
        assert "`whole`" in fastseq.explain(nn.LSTM(8, 96, proj_size=8, device="cuda"), x).reason
        by_function = fastseq.explain(functional.lstm, x, None, list(lstm.parameters()))
        assert by_function == fastseq.explain(lstm, x)
        assert fastseq.explain(lstm).backend == "cuda"
        # Backward the sums are longer, and more is exchanged.
        found = said(nn.GRU, 20, 16, 16, H=1024).reason
    assert f"`grid`, {WORDS['grid']}; backward `step`, {WORDS['step']}" in found


def test_rows_too_wide_to_be_normalised_are_the_reference_s(a_gpu, monkeypatch):
    monkeypatch.setattr(measured_cuda, "TABLE", {"a GPU": []})
    assert said(nn.LayerNormLSTM, 5, 3, 8, H=5785).backend == "cuda"
    found = said(nn.LayerNormLSTM, 5, 3, 8, H=5786)
    assert found.backend == "torch" and "rows of 5786 units" in found.reason
    assert said(nn.LayerNormLSTM, 5, 3, 8, H=2900, dtype=torch.float64).backend == "torch"


def test_what_runs_follows_a_planted_way(a_gpu, monkeypatch):
    monkeypatch.setattr(recurrent_cuda, "way", recurrent_cuda.STEP)
    with fastseq.use_backend("cuda"):
        assert "`step`" in said(nn.LSTM, 20, 64, 16, H=96).reason


def test_nothing_measured_anywhere_leaves_all_to_torch(a_gpu):
    assert measured_cuda.TABLE == {}
    found = said(nn.GRU, 20, 64, 16, H=96)
    assert found.backend == "torch" and "not yet measured" in found.reason


@pytest.mark.parametrize("torchs, ours, backend", [(1.0, 2.0, "torch"), (2.0, 1.0, "cuda")])
def test_whichever_was_measured_faster_runs(a_gpu, monkeypatch, torchs, ours, backend):
    plant(monkeypatch, ("lstm", "f32", "plain", "train", 50, 64, 512, torchs, 3.0, None, ours))
    with torch.backends.cudnn.flags(allow_tf32=False):
        found = said(nn.LSTM, 20, 32, 16, H=500)
    assert found.backend == backend
    if backend == "torch":
        assert found.reason == (
            "cuDNN was measured faster at T 50, B 64, H 512: 1 ms, by `grid` 2 ms"
        )
        with fastseq.use_backend("cuda"):
            assert said(nn.LSTM, 20, 32, 16, H=500).backend == "cuda"


def test_the_nearest_size_of_the_same_kind_counts(a_gpu, monkeypatch):
    def row(cell="gru", dtype="bf16", form="plain", mode="train", B=64, H=512, torchs=2.0):
        return (cell, dtype, form, mode, 50, B, H, torchs, 1.0, None, None)

    plant(
        monkeypatch,
        row(),
        row(H=1024, torchs=0.5),
        row(B=8, torchs=0.5),
        row(cell="lstm", torchs=0.5),
        row(form="both", torchs=0.5),
        row(form="stacked", torchs=0.5),
        row(mode="inf", torchs=0.5),
        row(dtype="f16", torchs=0.5),
    )
    half = dict(dtype=torch.bfloat16)
    assert said(nn.GRU, 9, 50, 16, H=512, **half).backend == "cuda"
    assert said(nn.GRU, 9, 50, 16, H=900, **half).backend == "torch"
    assert said(nn.GRU, 9, 9, 16, H=512, **half).backend == "torch"
    assert said(nn.LSTM, 9, 50, 16, H=512, **half).backend == "torch"
    assert said(nn.GRU, 9, 50, 16, H=512, bidirectional=True, **half).backend == "torch"
    assert said(nn.GRU, 9, 50, 16, H=512, num_layers=2, **half).backend == "torch"
    assert said(nn.GRU, 9, 50, 16, H=512, dtype=torch.float16).backend == "torch"
    with torch.no_grad():
        assert said(nn.GRU, 9, 50, 16, H=512, **half).backend == "torch"


def test_each_side_under_its_own_switch_of_precision(a_gpu, monkeypatch):
    """By default cuDNN may round to TF32 and products may not."""
    plant(
        monkeypatch,
        ("lstm", "f32", "plain", "train", 50, 64, 512, 2.0, 1.0, None, None),
        ("lstm", "tf32", "plain", "train", 50, 64, 512, 0.5, 0.4, None, None),
    )
    assert torch.backends.cudnn.rnn.fp32_precision == "tf32"
    assert said(nn.LSTM, 20, 64, 16, H=512).backend == "torch"
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert said(nn.LSTM, 20, 64, 16, H=512).backend == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert said(nn.LSTM, 20, 64, 16, H=512).backend == "cuda"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_what_was_not_measured_is_torchs_where_cudnn_has_its_persistent_kernel(a_gpu, monkeypatch):
    monkeypatch.setattr(measured_cuda, "TABLE", {"another GPU": []})
    half = dict(dtype=torch.float16)
    found = said(nn.LSTM, 20, 64, 16, H=512, **half)
    assert found.backend == "torch" and "persistent kernel" in found.reason
    for B, options in (
        (64, dict(H=500)),
        (63, dict(H=512)),
        (136, dict(H=512)),
        (64, dict(H=512, num_layers=2)),
        (64, dict(H=512, bidirectional=True)),
    ):
        assert said(nn.LSTM, 20, B, 16, **options, **half).backend == "cuda"
    assert said(nn.LSTM, 20, 64, 16, H=512, dtype=torch.bfloat16).backend == "cuda"
    # What torch has no layer for is nobody else's.
    assert said(nn.LSTM, 20, 64, 16, H=512, zoneout=0.1, **half).backend == "cuda"


def test_a_single_step_stays_torchs_and_a_decoder_does_not(a_gpu, monkeypatch):
    monkeypatch.setattr(measured_cuda, "TABLE", {"another GPU": []})
    cell, x = nn.GRUCell(8, 16, device="cuda"), torch.empty(3, 8, device="cuda")
    assert "as many launches" in fastseq.explain(cell, x).reason
    with fastseq.use_backend("cuda"):
        assert fastseq.explain(cell, x).backend == "cuda"
    keys = torch.empty(3, 7, 16, device="cuda")
    given = (torch.empty(3, 5, 8, device="cuda"), (), keys, keys, list(cell.parameters()))
    found = fastseq.explain(functional.attention_decoder, *given, cell="gru")
    assert found.backend == "cuda" and "one CUDA graph" in found.reason
    monkeypatch.setattr(measured_cuda, "TABLE", {})
    found = fastseq.explain(functional.attention_decoder, *given, cell="gru")
    assert found.backend == "torch" and "not yet measured" in found.reason


@pytest.mark.parametrize("fastest", ["step", "whole", "grid"])
def test_the_way_measured_fastest_is_taken_where_it_can(a_gpu, monkeypatch, fastest):
    times = [1.0 if way == fastest else 2.0 for way in measured_cuda.WAYS]
    plant(
        monkeypatch,
        *(("lstm", "f32", "plain", mode, 50, 64, 96, 9.0, *times) for mode in ("train", "inf")),
    )
    assert f"`{fastest}`" in said(nn.LSTM, 20, 64, 16, H=96).reason
    x = torch.empty(20, 64, 16, device="cuda")
    tokens = recurrent_cuda._tokens(x, None, None, None)
    wanted = recurrent_cuda.wanted(op.CELLS["lstm"], x, 96, tokens, 1, True)
    assert wanted == recurrent_cuda.NAMES.index(fastest) | recurrent_cuda.IF_IT_CAN
    # Too large for a block: not an error.
    found = said(nn.LSTM, 20, 64, 16, H=300).reason
    assert ("`step`" in found) == (fastest == "step")


def test_the_table_is_what_the_benchmark_writes():
    """By hand or by machine, each row is whole."""
    for rows in measured_cuda.TABLE.values():
        for row in rows:
            assert {*measured_cuda.Kind._fields, "T", "B", "H", "torch"} <= row.keys()
            assert set(measured_cuda.WAYS) & row.keys()
