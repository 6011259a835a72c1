"""Which code runs a recurrent call on a GPU, and what explain() says of it: without a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from fastseq.kernels import why_not_available
from torch._subclasses.fake_tensor import unset_fake_temporarily

import fastseq
from fastseq import _native, functional, nn
from fastseq.functional.decoder import picks_obstacle
from fastseq.ops import measured_cuda, recurrent_cuda
from fastseq.ops import recurrent as op
from tests.cuda.table import H200, plant, row, said

if not _native.loaded() or not _native.cuda_built():
    pytest.skip("the library is built without nvcc", allow_module_level=True)


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
    "grid": "one launch a layer, the weights in blocks that meet at each step, "
    "or `step` should the device refuse to run all of them at once",
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
    monkeypatch.setattr(measured_cuda, "TABLE", {"a GPU": {}})
    assert said(nn.LayerNormLSTM, 5, 3, 8, H=5785).backend == "cuda"
    found = said(nn.LayerNormLSTM, 5, 3, 8, H=5786)
    assert found.backend == "torch" and "rows of 5786 units" in found.reason
    assert said(nn.LayerNormLSTM, 5, 3, 8, H=2900, dtype=torch.float64).backend == "torch"


README = Path(__file__).parents[2] / "csrc" / "cuda" / "README.md"
SIZES = re.findall(r"^\| [\w, ]+: (\d+), (\d+) \| (\w+) \| ([\d |]+) \|$", README.read_text(), re.M)


@pytest.mark.parametrize("processors, kibibytes, name, sizes", SIZES)
def test_the_largest_sizes_are_those_of_the_plans(processors, kibibytes, name, sizes):
    """As csrc/cuda/README.md says them."""
    way = op_way(name)

    def fits(cell, bytes, H):
        given = op.CELLS[cell].number, bytes, way, H, 64, 1
        device = int(processors), int(kibibytes) * 1024
        return all(_native.cuda_way(*given, backward, *device) == way for backward in (0, 1))

    kinds = [(cell, bytes) for bytes in (4, 2) for cell in ("lstm", "gru", "rnn_tanh")]
    for (cell, bytes), largest in zip(kinds, map(int, sizes.split("|")), strict=True):
        assert not fits(cell, bytes, largest + 1), (cell, bytes, largest)
        assert all(fits(cell, bytes, H) for H in (*range(1, largest, 7), largest)), (cell, largest)


def test_the_table_of_sizes_is_read():
    assert len(SIZES) == 6 and H200 == (132, 227 * 1024)


def test_explain_says_what_runs_should_the_device_refuse_a_grid(a_gpu, exact, monkeypatch):
    """A grid measured faster though a block holds the weights, and one larger than that."""
    plant(monkeypatch, *(row(9.0, H=H, step=3.0, grid=1.0) for H in (96, 300)))
    for H, otherwise in ((96, "whole"), (300, "step")):
        words = WORDS["grid"].replace("`step`", f"`{otherwise}`")
        assert said(nn.LSTM, 50, 64, 512, H=H).reason.endswith(f": `grid`, {words}")


def test_what_runs_follows_a_planted_way(a_gpu, monkeypatch):
    monkeypatch.setattr(recurrent_cuda, "way", recurrent_cuda.STEP)
    with fastseq.use_backend("cuda"):
        assert "`step`" in said(nn.LSTM, 20, 64, 16, H=96).reason


def test_nothing_measured_anywhere_leaves_all_to_torch(a_gpu):
    assert measured_cuda.TABLE == {}
    found = said(nn.GRU, 20, 64, 16, H=96)
    assert found.backend == "torch" and "not yet measured" in found.reason


@pytest.mark.parametrize("torchs, ours, backend", [(1.0, 2.0, "torch"), (2.0, 1.0, "cuda")])
def test_whichever_was_measured_faster_runs(a_gpu, exact, monkeypatch, torchs, ours, backend):
    plant(monkeypatch, row(torchs, step=3.0, grid=ours))
    found = said(nn.LSTM, 20, 32, 16, H=500)
    assert found.backend == backend
    if backend == "torch":
        assert found.reason == (
            "cuDNN was measured faster at T 50, B 64, H 512: 1 ms, by `grid` 2 ms"
        )
        with fastseq.use_backend("cuda"):
            assert said(nn.LSTM, 20, 32, 16, H=500).backend == "cuda"


@pytest.mark.parametrize("ours", [0.89, 0.95])
def test_of_other_rows_or_units_ours_must_have_been_ten_percent_faster(
    a_gpu, exact, monkeypatch, ours
):
    plant(monkeypatch, row(1.0, step=ours), row(1.0, step=ours, packed=True))
    kind = measured_cuda.Kind("lstm", "f32", 1, 1, False, False, "train")
    able = recurrent_cuda.able(H200)
    for B, H in ((64, 512), (63, 512), (64, 500)):
        found = said(nn.LSTM, 50, B, 512, H=H)
        runs = ours < 0.9 or (B, H) == (64, 512)
        assert found.backend == ("cuda" if runs else "torch"), (B, H)
        # Compiled, for whatever B.
        assert measured_cuda.never_slower("a GPU", kind, "f32", H, able) == (ours < 0.9)
    if ours > 0.9:
        said_so = "cuDNN was measured less than 10 % slower at T 50, B 64, H 512: 1 ms, by `step`"
        assert f"{said_so} 0.95 ms" in found.reason


# What a call must have in common with the only row there is, `torch.nn.GRU(16, 512)` in training.
OTHERS = {
    "more units": dict(H=1025),
    "fewer units": dict(H=255),
    "more rows": dict(B=257),
    "fewer rows": dict(B=15),
    "fewer steps": dict(T=8),
    "cell": dict(layer=nn.LSTM),
    "dtype": dict(dtype=torch.float16),
    "directions": dict(bidirectional=True),
    "layers": dict(num_layers=3),
    "packed": dict(packed=True),
    "inference": dict(train=False),
}


def call_like(layer=nn.GRU, T=16, B=200, H=300, dtype=torch.bfloat16, train=True, packed=False,
              **options):  # fmt: skip
    module = layer(16, H, device="cuda", dtype=dtype, **options)
    x = torch.empty(T, B, 16, device="cuda", dtype=dtype)
    if packed:
        with unset_fake_temporarily():
            sizes = torch.full((T,), B)
        x = torch.nn.utils.rnn.PackedSequence(x.flatten(0, 1), sizes)
    with torch.set_grad_enabled(train), unset_fake_temporarily():
        return fastseq.explain(module, x)


def test_what_was_not_measured_is_torchs(a_gpu, monkeypatch):
    like = dict(cell="gru", dtype="bf16", I=16)
    plant(monkeypatch, row(**like), row(layers=2, **like))
    assert call_like().backend == "cuda" and call_like(num_layers=2).backend == "cuda"
    for name, others in OTHERS.items():
        found = call_like(**others)
        assert found.backend == "torch" and "was measured on a GPU" in found.reason, name
    plant(monkeypatch, row(**like))
    assert call_like(num_layers=2).backend == "torch"
    # Nothing needs a gradient: an inference.
    plant(monkeypatch, row(mode="inf", **like))
    module = nn.GRU(16, 512, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    x = torch.empty(50, 64, 16, device="cuda", dtype=torch.bfloat16)
    assert fastseq.explain(module, x).backend == "cuda"
    for hx in (x.new_empty(1, 64, 512), x.new_empty(1, 64, 512).requires_grad_()):
        depends = "torch" if hx.requires_grad else "cuda"
        assert fastseq.explain(module, x, hx).backend == depends
        by_function = functional.gru, x, hx, list(module.parameters())
        assert fastseq.explain(*by_function).backend == depends
        left = fastseq.backends.torch_is_faster(
            "gru", x, False, by_function[3], fastseq.functional._checks.Options(), hx
        )
        assert (left is not None) == hx.requires_grad
    # What torch has no layer for is nobody else's.
    assert said(nn.LSTM, 20, 64, 16, H=512, zoneout=0.1).backend == "cuda"


def test_each_row_speaks_for_its_own_kind(a_gpu, exact, monkeypatch):
    slower = [
        dict(H=1024),
        dict(B=8),
        dict(cell="lstm"),
        dict(directions=2),
        dict(layers=2),
        dict(packed=True),
        dict(projected=True, P=8, cell="lstm"),
        dict(mode="inf"),
        dict(dtype="f16"),
    ]
    like = dict(cell="gru", dtype="bf16")
    plant(monkeypatch, row(**like), *(row(0.5, **(like | other)) for other in slower))
    assert call_like(B=50, H=512).backend == "cuda"
    for others in (
        dict(H=900), dict(B=9), dict(layer=nn.LSTM), dict(bidirectional=True),
        dict(num_layers=2), dict(packed=True), dict(train=False), dict(dtype=torch.float16),
        dict(layer=nn.LSTM, proj_size=8),
    ):  # fmt: skip
        given = dict(B=50, H=512) | others
        assert "measured faster" in call_like(**given).reason, others


def test_a_projection_is_chosen_by_rows_that_are_projected(a_gpu, exact, monkeypatch):
    fast, slow = dict(step=9.0, whole=1.0), dict(step=1.0, whole=9.0)
    plant(monkeypatch, row(H=96, **slow), row(H=96, I=96, projected=True, P=48, **fast))
    assert "`step`" in said(nn.LSTM, 50, 64, 96, H=96).reason
    able = recurrent_cuda.able(H200)
    kind = measured_cuda.Kind("lstm", "f32", 1, 1, False, True, "train")
    # Of a width like that measured.
    for P, backend in ((24, "cuda"), (48, "cuda"), (95, "cuda"), (23, "torch"), (8, "torch")):
        found = said(nn.LSTM, 50, 64, 96, H=96, proj_size=P)
        assert found.backend == backend, P
        assert ("`whole`" if backend == "cuda" else "no call of such a kind") in found.reason
        whatever = measured_cuda.never_slower("a GPU", kind, "f32", 96, able, P)
        assert whatever == (backend == "cuda"), P
    plant(monkeypatch, row(H=96, **slow))
    assert said(nn.LSTM, 50, 64, 96, H=96, proj_size=8).backend == "torch"


def test_a_stack_is_judged_by_the_way_its_layers_go(a_gpu, exact, monkeypatch):
    """`grid` would be faster for two layers; one alone goes by `step`."""
    one, two = row(step=1.0, grid=2.0), row(2.0, layers=2, step=3.0, grid=1.0)
    plant(monkeypatch, one, two)
    found = said(nn.LSTM, 50, 64, 512, H=512, num_layers=2)
    assert found.backend == "torch" and "2 ms, by `step` 3 ms" in found.reason
    plant(monkeypatch, two)
    assert said(nn.LSTM, 50, 64, 512, H=512, num_layers=2).backend == "torch"


def test_each_side_under_its_own_switch_of_precision(a_gpu, monkeypatch):
    """By default cuDNN may round to TF32 and products may not."""
    both = {"f32": 2.0, "tf32": 0.5}
    plant(monkeypatch, row(both), row({"tf32": 0.5}, dtype="tf32", step=0.4))
    cudnn, matmul = torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    assert (cudnn.fp32_precision, matmul.fp32_precision) == ("tf32", "none")
    try:
        for theirs, ours, backend in (
            ("tf32", "ieee", "torch"), ("ieee", "ieee", "cuda"),
            ("tf32", "tf32", "cuda"), ("ieee", "tf32", "torch"),
        ):  # fmt: skip
            cudnn.fp32_precision, matmul.fp32_precision = theirs, ours
            assert said(nn.LSTM, 20, 64, 16, H=512).backend == backend, (theirs, ours)
    finally:
        cudnn.fp32_precision, matmul.fp32_precision = "tf32", "none"


@pytest.mark.parametrize("batch_first", [False, True])
def test_rows_and_steps_are_told_apart(a_gpu, monkeypatch, batch_first):
    plant(monkeypatch, row(cell="gru", dtype="bf16", I=16, T=400, B=10))
    options = dict(batch_first=batch_first, dtype=torch.bfloat16)
    for T, B, backend in ((400, 10, "cuda"), (10, 400, "torch")):
        shape = (B, T, 16) if batch_first else (T, B, 16)
        assert said(nn.GRU, *shape, H=512, **options).backend == backend


def test_times_of_another_algorithm_of_cudnns_say_nothing(a_gpu, monkeypatch):
    plant(monkeypatch, row(dtype="f16", I=500, H=500))
    half = dict(dtype=torch.float16)
    assert said(nn.LSTM, 50, 64, 512, H=500, **half).backend == "cuda"
    assert said(nn.LSTM, 50, 64, 512, H=512, **half).backend == "torch"
    assert said(nn.LSTM, 50, 63, 512, H=512, **half).backend == "cuda"
    assert said(nn.LSTM, 50, 64, 500, H=512, **half).backend == "cuda"


def test_without_an_input_it_depends(a_gpu, monkeypatch):
    plant(monkeypatch, row())
    for layer, depends in ((nn.LSTM, True), (nn.PeepholeLSTM, False)):
        found = fastseq.explain(layer(16, 512, device="cuda"))
        assert found.backend == "cuda"
        assert found.reason.endswith("measured faster than torch's") == depends


def test_a_table_is_one_devices(a_gpu, monkeypatch):
    monkeypatch.setattr(measured_cuda, "TABLE", {"another GPU": {"recurrent": [row()]}})
    for options in ({}, dict(zoneout=0.1)):
        found = said(nn.LSTM, 20, 64, 16, H=512, **options)
        assert found.backend == "torch"
        assert "not yet measured on a GPU; use_backend('cuda')" in found.reason
    with fastseq.use_backend("cuda"):
        assert said(nn.LSTM, 20, 64, 16, H=512).backend == "cuda"


def test_what_was_wrong_is_torchs_with_all_of_its_cell_and_dtype(a_gpu, exact, monkeypatch):
    wrong = {n: v for n, v in row(directions=2, wrong="grid: y").items() if n not in WAYS_AND_TORCH}
    plant(monkeypatch, row(), wrong, row(dtype="bf16"), row(cell="gru"))
    for options in ({}, dict(zoneout=0.1)):
        found = said(nn.LSTM, 50, 64, 512, H=512, **options)
        assert found.backend == "torch" and "wrong when it was measured" in found.reason
    assert said(nn.LSTM, 50, 64, 512, H=512, dtype=torch.bfloat16).backend == "cuda"
    assert said(nn.GRU, 50, 64, 512, H=512).backend == "cuda"


WAYS_AND_TORCH = {*measured_cuda.WAYS, "torch"}


def test_another_thread_may_forget_what_was_found(monkeypatch):
    class Forgetful(dict):
        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            self.clear()

    monkeypatch.setattr(measured_cuda, "_found", Forgetful())
    assert measured_cuda._remembered(abs, -3) == measured_cuda._remembered(abs, -3) == 3


def test_a_compiled_graph_asks_for_the_device_too(a_gpu, monkeypatch):
    """By what is constant while it is traced."""
    plant(monkeypatch, row())
    asked = torch.compile(
        lambda t: t + 1 if measured_cuda.unproved(0, "lstm", "f32") else t - 1,
        backend="eager",
        fullgraph=True,
    )
    assert measured_cuda.unproved(0, "lstm", "f32") is None
    monkeypatch.setattr(measured_cuda, "device_name", lambda index: f"GPU {index}")
    assert measured_cuda.unproved(1, "lstm", "f32") == "not yet measured on GPU 1"
    with unset_fake_temporarily():
        assert asked(torch.zeros(())) == 1


def decoder_row(**changed):
    kind = measured_cuda.DecoderKind("gru")._asdict()
    sizes = dict(B=8, T=40, S=10, E=8, H=16, K=16, C=16)
    times = dict(torch={"eager": 3.0, "captured": 2.0})
    ours = {"replayed": 1.0, "uncaptured": 1.0}
    return kind | sizes | times | {"ours": ours} | changed


def explain_decoder(B=3, S=7, H=16, T=10, K=16, C=16, **options):
    kind = options.pop("kind", "gru")
    cell = {"gru": nn.GRUCell, "lstm": nn.LSTMCell}[kind](8, H, device="cuda")
    keys, values = (torch.empty(B, S, width, device="cuda") for width in (K, C))
    h = [torch.empty(options.pop("layers", 1), B, H, device="cuda")] * (1 + (kind == "lstm"))
    given = (torch.empty(B, T, 8, device="cuda"), h, keys, values, list(cell.parameters()))
    v = torch.empty(K, device="cuda")
    return fastseq.explain(functional.attention_decoder, *given, cell=kind, **{"v": v} | options)


def test_a_decoder_s_steps_and_widths_count(a_gpu, monkeypatch):
    monkeypatch.setattr(fastseq.backends._attention, "plain_because", lambda *given: None)
    plant(monkeypatch, decoder=[decoder_row()])
    for like in (dict(T=10), dict(T=500), dict(K=8), dict(K=32), dict(C=8), dict(C=32)):
        assert explain_decoder(**like).backend == "cuda", like
    for other in (dict(T=9), dict(K=7), dict(K=33), dict(C=7), dict(C=33)):
        assert "no decoder of such a kind" in explain_decoder(**other).reason, other
    # Where T is not known, all that was measured counts.
    slower = decoder_row(T=80, torch={"eager": 0.5})
    plant(monkeypatch, decoder=[decoder_row(), slower])
    assert explain_decoder(T=10).backend == "cuda" and explain_decoder(T=20).backend == "torch"
    assert measured_cuda.decoders_reason(0, tuple(measured_cuda.DecoderKind("gru")), 16)


def test_a_decoder_of_other_rows_must_have_been_ten_percent_faster(a_gpu, monkeypatch):
    monkeypatch.setattr(fastseq.backends._attention, "plain_because", lambda *given: None)
    kind = tuple(measured_cuda.DecoderKind("gru"))
    for ours in (0.89, 0.95):
        times = dict(torch={"eager": 1.0}, ours={"replayed": ours, "uncaptured": ours})
        plant(monkeypatch, decoder=[decoder_row(**times)])
        for B, H in ((8, 16), (7, 16), (8, 15)):
            backend = "cuda" if ours < 0.9 or (B, H) == (8, 16) else "torch"
            assert explain_decoder(B=B, H=H).backend == backend, (ours, B, H)
        assert (measured_cuda.decoders_reason(0, kind, 16) is None) == (ours < 0.9)


def test_a_single_step_stays_torchs(a_gpu, monkeypatch):
    plant(monkeypatch, row(cell="gru"))
    cell, x = nn.GRUCell(8, 16, device="cuda"), torch.empty(3, 8, device="cuda")
    assert "as many launches" in fastseq.explain(cell, x).reason
    with fastseq.use_backend("cuda"):
        assert fastseq.explain(cell, x).backend == "cuda"


def test_a_decoder_is_chosen_by_rows_of_decoders(a_gpu, monkeypatch):
    plant(monkeypatch, row(cell="gru"))
    found = explain_decoder()
    assert found.backend == "torch" and "no decoder of such a kind and size" in found.reason
    with fastseq.use_backend("cuda"):
        assert explain_decoder().backend == "cuda"
    plant(monkeypatch, decoder=[decoder_row()])
    # Without Triton the loop is another, which nobody measured; whoever wants it has it.
    found = explain_decoder()
    assert found.backend == "torch"
    assert f"Triton's attention: {why_not_available()}" in found.reason
    with fastseq.use_backend("cuda"):
        found = explain_decoder()
    assert found.backend == "cuda" and "one CUDA graph" in found.reason
    assert f"plain PyTorch attention ({why_not_available()})" in found.reason
    monkeypatch.setattr(fastseq.backends._attention, "plain_because", lambda *given: None)
    assert "a loop of CUDA kernels and Triton kernels, one" in explain_decoder().reason
    combine = (torch.empty(16, 32, device="cuda"), None)
    for others in (
        dict(kind="lstm"), dict(combine=combine), dict(combine=combine, input_feeding=True),
        dict(v=None), dict(forced=(True, False)), dict(layers=2),
        dict(B=1), dict(B=33), dict(S=2), dict(S=41), dict(H=7), dict(H=33),
    ):  # fmt: skip
        assert explain_decoder(**others).backend == "torch", others
    with torch.no_grad():
        assert explain_decoder().backend == "torch"
    monkeypatch.setattr(measured_cuda, "TABLE", {"another": {"decoder": [decoder_row()]}})
    assert "not yet measured on a GPU" in explain_decoder().reason
    monkeypatch.setattr(measured_cuda, "TABLE", {})
    assert "not yet measured on a device" in explain_decoder().reason


def test_a_decoder_is_torchs_where_it_took_longer_once_or_was_wrong(a_gpu, monkeypatch):
    monkeypatch.setattr(fastseq.backends._attention, "plain_because", lambda *given: None)
    slower = decoder_row(H=12, torch={"eager": 3.0, "captured": 0.5})
    plant(monkeypatch, decoder=[decoder_row(), slower])
    found = explain_decoder()
    assert found.backend == "torch"
    assert "torch was measured faster at B 8, T 40, S 10, H 12: 0.5 ms" in found.reason
    # Beyond what that size is like.
    assert explain_decoder(H=25).backend == "cuda"
    # Without its graph the loop is eager torch's rival, which a call without one would be.
    for uncaptured, backend in ((2.5, "cuda"), (3.5, "torch")):
        ours = {"replayed": 1.0, "uncaptured": uncaptured}
        plant(monkeypatch, decoder=[decoder_row(ours=ours)])
        found = explain_decoder()
        assert found.backend == backend
    assert "3 ms, the kernels' loop uncaptured 3.5 ms" in found.reason
    wrong = {
        n: v for n, v in decoder_row(mode="inf", wrong="y").items() if n not in ("torch", "ours")
    }
    plant(monkeypatch, decoder=[decoder_row(), wrong])
    assert "wrong when it was measured" in explain_decoder().reason


def test_a_compiled_decoder_asks_by_its_units_alone(a_gpu, monkeypatch):
    """Of all numbers of rows and lengths of sources; what else is known are constants."""
    asked = torch.compile(
        lambda t, kind, H: t + 1 if measured_cuda.decoders_reason(0, kind, H) else t - 1,
        backend="eager",
        fullgraph=True,
    )
    kind = tuple(measured_cuda.DecoderKind("gru"))
    for rows, H, torchs in (
        ([decoder_row()], 16, False), ([decoder_row()], 64, True),
        ([decoder_row(), decoder_row(B=99, torch={"eager": 0.5})], 16, True),
    ):  # fmt: skip
        plant(monkeypatch, decoder=rows)
        torch._dynamo.reset()
        with unset_fake_temporarily():
            assert asked(torch.zeros(()), kind, H) == (1 if torchs else -1)


def test_decoders_that_choose_their_tokens_ask_the_same(a_gpu, monkeypatch):
    monkeypatch.setattr(fastseq.backends._attention, "plain_because", lambda *given: None)
    values, hidden = torch.empty(3, 7, 16, device="cuda"), torch.empty(1, 3, 16, device="cuda")
    plant(monkeypatch, decoder=[decoder_row(mode="inf")])
    with torch.no_grad():
        assert "no decoder of such" in picks_obstacle("gru", values, hidden, 12, 16)
        plant(monkeypatch, decoder=[decoder_row(mode="inf", tokens="chosen")])
        assert picks_obstacle("gru", values, hidden, 12, 16) is None
        assert picks_obstacle("gru", values, hidden, 9, 16)
        module = nn.AttentionDecoder(9, 8, 16, 16, cell="gru", device="cuda")
        start = torch.zeros(3, dtype=torch.long, device="cuda")
        assert module.explained(start, hidden, values, forced=(True, False)).backend == "cuda"
        assert module.explained(start, hidden, values).backend == "torch"


def wanted(x, H=96, train=True, P=0, first=None, lengths=None, resets=None):
    """What the op goes by."""
    tokens = recurrent_cuda._tokens(x, None, None, lengths)._replace(first=first)
    w_hr = torch.empty(P, H, device="cuda") if P else None
    return recurrent_cuda.wanted(op.CELLS["lstm"], x, H, tokens, resets, 1, train, w_hr)


def test_the_op_goes_by_rows_like_its_call(a_gpu, exact, monkeypatch):
    like = dict(T=100, B=20, I=16, H=96)
    step, grid = dict(step=1.0, grid=2.0), dict(step=2.0, grid=1.0)
    plant(
        monkeypatch,
        row(**like, **step),
        row(mode="inf", **like, **grid),
        row(projected=True, P=48, **like, **grid),
        row(packed=True, **like, **grid),
        row(beyond="lengths resets", **like, **grid),
    )
    x = torch.empty(100, 20, 16, device="cuda")
    by_step, by_grid = (way | recurrent_cuda.IF_IT_CAN for way in (op_way("step"), op_way("grid")))
    assert wanted(x) == by_step
    assert wanted(x, train=False) == wanted(x, P=24) == wanted(x, first=x) == by_grid
    assert wanted(x, P=23) == recurrent_cuda.ANY_WAY
    lengths = torch.empty(20, dtype=torch.int64, device="cuda")
    assert wanted(x, lengths=lengths, resets=lengths) == by_grid
    assert wanted(x, lengths=lengths) == by_step
    # Twenty steps of a hundred rows are of another size.
    assert wanted(x.transpose(0, 1)) == recurrent_cuda.ANY_WAY


def op_way(name):
    return recurrent_cuda.NAMES.index(name)


@pytest.mark.parametrize("fastest", ["step", "whole", "grid"])
def test_the_way_measured_fastest_is_taken_where_it_can(a_gpu, exact, monkeypatch, fastest):
    times = {"step": 3.0, "whole": 2.5, "grid": 2.0, fastest: 1.0}
    plant(monkeypatch, *(row(9.0, H=H, **times) for H in (96, 300)))
    assert f"`{fastest}`" in said(nn.LSTM, 20, 64, 16, H=96).reason
    x = torch.empty(20, 64, 16, device="cuda")
    assert wanted(x) == recurrent_cuda.NAMES.index(fastest) | recurrent_cuda.IF_IT_CAN
    # Too large for a block: not an error.
    found = said(nn.LSTM, 20, 64, 16, H=300).reason
    assert ("`step`, a product" in found) == (fastest == "step")


def test_no_call_is_chosen_by_the_time_of_a_way_that_cannot_run_it(a_gpu, exact, monkeypatch):
    """The weights of 96 units fit a block, those of 128 do not, nor backward those of 120."""
    like = dict(packed=True, I=16)
    kind = measured_cuda.Kind("lstm", "f32", 1, 1, True, False, "train")

    def chosen(H, mode="train"):
        about = kind._replace(mode=mode), "f32"
        found = call_like(layer=nn.LSTM, T=50, B=64, H=H, dtype=torch.float32, packed=True,
                          train=mode == "train")  # fmt: skip
        able = recurrent_cuda.able(H200)
        known = measured_cuda.never_slower("a GPU", *about, H, able)
        return found.backend, known

    for grid, backend in ((8.0, "torch"), (1.5, "cuda")):
        times = dict(whole=1.0, grid=grid, step=9.0, H=96)
        plant(monkeypatch, row(**like, **times), row(**like, **times, mode="inf"))
        assert chosen(96) == ("cuda", True)
        assert chosen(128) == (backend, backend == "cuda")
        x = torch.empty(50, 64, 16, device="cuda")
        assert wanted(x, H=128, first=x) == op_way("grid") | recurrent_cuda.IF_IT_CAN
    # Backward more is held.
    for mode, ways in (("train", ("step",)), ("inf", ("step", "grid"))):
        asked = kind._replace(cell="gru", mode=mode), measured_cuda.Size(50, 64, 16, 1136)
        assert recurrent_cuda.able(H200)(*asked) == ways
    plant(monkeypatch, row(**like, whole=1.0, H=96))
    assert chosen(96) == ("cuda", True) and chosen(128) == ("torch", False)
