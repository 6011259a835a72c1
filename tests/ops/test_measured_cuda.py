"""What is known of cuDNN, and the table of measurements as it is shipped."""

from __future__ import annotations

import pytest

from fastseq.ops import measured_cuda


def kind_and_size(cell="lstm", dtype="f16", layers=1, directions=1, packed=False, projected=False,
                  mode="train", beyond="", T=50, B=64, I=256, H=256):  # noqa: E741  # fmt: skip
    kind = measured_cuda.Kind(cell, dtype, layers, directions, packed, projected, mode, beyond)
    return kind, measured_cuda.Size(T, B, I, H)


@pytest.mark.parametrize(
    "given, algorithm",
    [
        (dict(), "persistent"),
        (dict(B=128, H=1024), "persistent"),
        (dict(cell="rnn_tanh", H=512, B=96), "persistent"),
        (dict(cell="rnn_tanh", H=896, B=96), "standard"),
        (dict(cell="rnn_relu", H=896, B=88), "persistent"),
        *((dict([it]), "standard") for it in (
            ("cell", "gru"), ("dtype", "bf16"), ("dtype", "f32"), ("layers", 2), ("directions", 2),
            ("packed", True), ("projected", True), ("H", 1152), ("H", 250), ("I", 250), ("B", 63),
            ("B", 136),
        )),
        *((dict(cell=cell, dtype=dtype, H=H, directions=2), "small")
          for cell, H in (("lstm", 128), ("gru", 128), ("rnn_tanh", 256))
          for dtype in ("f32", "bf16", "tf32")),
        (dict(H=128, dtype="f64"), "standard"),
        (dict(H=128, packed=True), "standard"),
        (dict(H=128, projected=True), "standard"),
    ],
)  # fmt: skip
def test_what_torch_has_cudnn_do(given, algorithm):
    assert measured_cuda.cudnn_algorithm(*kind_and_size(**given)) == (algorithm,) * 2
    forward = measured_cuda.cudnn_algorithm(*kind_and_size(mode="inf", **given))
    assert forward == (algorithm,)


@pytest.mark.parametrize("given", [dict(cell="peephole_lstm"), dict(beyond="lengths")])
def test_cudnn_does_nothing_for_what_torch_has_no_layer_for(given):
    kind, size = kind_and_size(**given)
    assert measured_cuda.cudnn_algorithm(kind, size) == () and not measured_cuda.is_torchs(kind)
    assert measured_cuda.is_torchs(kind_and_size()[0])


def test_small_layers_go_backward_by_another_algorithm():
    for cell, forward, backward in (("lstm", 192, 128), ("gru", 192, 128), ("rnn_relu", 384, 256)):
        of = lambda H, cell=cell: measured_cuda.cudnn_algorithm(*kind_and_size(cell, "f32", H=H))  # noqa: E731
        assert of(backward) == ("small", "small") and of(forward) == ("small", "standard")
        assert of(backward + 1) == ("small", "standard") and of(forward + 1) == ("standard",) * 2


def test_the_table_is_what_the_benchmarks_write():
    """By hand or by machine, each row is whole."""
    for parts in measured_cuda.TABLE.values():
        assert parts.keys() <= {"recurrent", "decoder"}
        for part, kind, sizes in (
            ("recurrent", measured_cuda.Kind, measured_cuda.Size._fields),
            ("decoder", measured_cuda.DecoderKind, tuple("BTSH")),
        ):
            for row in parts.get(part, []):
                assert {*kind._fields, *sizes} <= row.keys()
                timed = "torch" in row and {*measured_cuda.WAYS, "ours"} & row.keys()
                assert timed or {"wrong", "unmeasured"} & row.keys()
