"""torch.export of the modules: saved, loaded, run for other shapes; packaged ahead of time."""

from __future__ import annotations

import copy
import io
import shutil

import pytest
import torch
from torch.export import Dim, export

from fastseq import nn
from fastseq.models import attention
from fastseq.testing import assert_close_to_reference

T, B = Dim("T", min=2, max=1000), Dim("B", min=2, max=1000)
LAYERS = {
    "lstm": lambda: nn.LSTM(4, 6, 2, bidirectional=True),
    "gru": lambda: nn.GRU(4, 6, 2),
    "rnn": lambda: nn.RNN(4, 6),
}
CELLS = {
    "lstm": lambda: nn.LSTMCell(4, 6),
    "gru": lambda: nn.GRUCell(4, 6),
    "rnn": lambda: nn.RNNCell(4, 6),
}


def first(result):
    while not isinstance(result, torch.Tensor):
        result = result[0]
    return result


def reloaded(program):
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return torch.export.load(io.BytesIO(buffer.getvalue()))


def operators(program) -> list[str]:
    targets = (str(node.target) for node in program.graph.nodes)
    return [target for target in targets if "fastseq.recurrent" in target]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_run_for_any_shape(name, strict):
    module = LAYERS[name]()
    program = export(module, (torch.randn(5, 3, 4),), dynamic_shapes=({0: T, 1: B},), strict=strict)
    assert len(operators(program)) == module.num_layers
    run = reloaded(program).module()
    exact = copy.deepcopy(module).double()
    for shape in ((5, 3, 4), (9, 2, 4), (2, 11, 4)):
        x = torch.randn(shape)
        assert_close_to_reference(run(x)[0], exact(x.double())[0], module(x)[0])


@pytest.mark.parametrize("name", CELLS)
def test_cells_run_for_any_batch(name):
    module = CELLS[name]()
    program = export(module, (torch.randn(3, 4),), dynamic_shapes=({0: B},))
    assert len(operators(program)) == 1
    run, x = reloaded(program).module(), torch.randn(8, 4)
    truth = first(copy.deepcopy(module).double()(x.double()))
    assert_close_to_reference(first(run(x)), truth, first(module(x)))


def test_attention_models():
    encoder = attention.Encoder(11, 4, 6)
    decoder = attention.Decoder(11, 4, 6, attention.Attention(6))
    token = torch.randint(11, (3, 1))
    state = (torch.randn(1, 3, 6), torch.randn(1, 3, 6), torch.randn(3, 5, 6))
    for module, args in ((encoder, (token.expand(3, 5),)), (decoder, (token, *state))):
        run = reloaded(export(module, args)).module()
        torch.testing.assert_close(run(*args), module(*args))


@pytest.mark.skipif(not shutil.which("g++"), reason="packaging needs a C++ compiler")
@torch.no_grad()
def test_packages_ahead_of_time(tmp_path):
    module = nn.LSTM(4, 6, 2).eval()
    program = export(module, (torch.randn(5, 3, 4),), dynamic_shapes=({0: T, 1: B},))
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "layer.pt2")
    )
    run = torch._inductor.aoti_load_package(path)
    for shape in ((5, 3, 4), (9, 2, 4)):
        x = torch.randn(shape)
        assert_close_to_reference(
            run(x)[0], copy.deepcopy(module).double()(x.double())[0], module(x)[0]
        )
