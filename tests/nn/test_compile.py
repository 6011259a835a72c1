"""torch.compile of the modules: one graph, forward and backward, whatever T and B are."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
import torch._dynamo
import torch._inductor.metrics

import fastseq
from fastseq import nn
from fastseq.testing import assert_close_to_reference


class Own(nn.LSTM):
    """As a program subclasses what it imports."""


LAYERS = {
    "lstm": lambda: nn.LSTM(4, 6, 2),
    "lstm, both ways": lambda: nn.LSTM(4, 6, 2, bidirectional=True, batch_first=True),
    "projected": lambda: nn.LSTM(4, 6, proj_size=3),
    "gru": lambda: nn.GRU(4, 6, 2),
    "rnn": lambda: nn.RNN(4, 6, nonlinearity="relu"),
    "subclass": lambda: Own(4, 6),
    "peephole": lambda: nn.PeepholeLSTM(4, 6),
    "layer norm": lambda: nn.LayerNormLSTM(4, 6, 2, bidirectional=True),
    "zoneout": lambda: nn.LSTM(4, 6, 2, zoneout=(0.1, 0.3)).eval(),
}
CELLS = {
    "lstm": lambda: nn.LSTMCell(4, 6),
    "gru": lambda: nn.GRUCell(4, 6),
    "rnn": lambda: nn.RNNCell(4, 6),
}
# The first differs from all widths: torch takes for one size what is equal when it compiles.
SHAPES = [(5, 3), (7, 4), (2, 9), (6, 6)]


def compiled(module, **options):
    """The module compiled into one graph."""
    torch._dynamo.reset()
    return torch.compile(module, backend="aot_eager", fullgraph=True, **options)


def compiling(number: int):
    """From the call of this number on, to compile again is an error."""
    return torch.compiler.set_stance("fail_on_recompile" if number else "default")


def first(result):
    while not isinstance(result, torch.Tensor):
        result = result[0]
    return result


def check(module, fn, *args, **more):
    """Output and gradients of a compiled module against float64, eager as the yardstick."""
    exact = copy.deepcopy(module).double()
    wide = [
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
    ]
    runs = [(fn, module, args), (exact, exact, wide), (module, module, args)]
    found = []
    for call, owner, given in runs:
        y = first(call(*given, **more))
        found.append([y, *torch.autograd.grad(y.square().sum(), list(owner.parameters()))])
    for got, want, eager in zip(*found, strict=True):
        assert_close_to_reference(got, want, eager)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_for_any_shape(name):
    module = LAYERS[name]()
    fn = compiled(module, dynamic=True)
    for i, (T, B) in enumerate(SHAPES):
        with compiling(i):
            check(module, fn, torch.randn(T, B, 4))


ATTENTION = {
    "additive": lambda: nn.AdditiveAttention(8, 4, 6),
    "normalised": lambda: nn.AdditiveAttention(8, 4, 6, normalize=True),
    "concat": lambda: nn.ConcatAttention(8, 4, 6),
    "general": lambda: nn.GeneralAttention(8, 4),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_for_any_shape(name):
    module = ATTENTION[name]()
    fn = compiled(module, dynamic=True)
    for i, (S, B) in enumerate(SHAPES):
        lengths = torch.arange(B) % S + 1
        with compiling(i):
            check(module, fn, torch.randn(B, 8), torch.randn(B, S, 4), lengths=lengths)


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_decoder_for_any_shape(order):
    feeding = {"order": order, "input_feeding": order == "after"}
    module = nn.AttentionDecoder(9, 4, 7, 8, cell="gru", num_layers=2, **feeding)
    fn = compiled(module, dynamic=True)
    for i, (T, B) in enumerate(SHAPES):
        tokens, hx = torch.randint(9, (B, T)), torch.randn(2, B, 7)
        lengths = torch.arange(B) % (T + 1) + 1
        with compiling(i):
            check(module, fn, tokens, hx, torch.randn(B, T + 1, 8), lengths=lengths)


def test_a_loss_for_any_shape():
    module = nn.LinearCrossEntropy(4, 11)
    fn = compiled(module, dynamic=True)
    for i, shape in enumerate(SHAPES):
        with compiling(i):
            check(module, fn, torch.randn(*shape, 4), torch.randint(11, shape))


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("hx", [False, True])
def test_cells_for_any_shape(name, hx):
    module = CELLS[name]()
    fn = compiled(module, dynamic=True)
    for i, (_, B) in enumerate(SHAPES):
        x, h = torch.randn(B, 4), torch.randn(B, 6)
        state = (((h, h + 1) if name == "lstm" else h),) if hx else ()
        with compiling(i):
            if hx:
                torch.testing.assert_close(fn(x, *state), module(x, *state))
            else:
                check(module, fn, x)


def test_shapes_are_found_dynamic_by_themselves():
    """Without dynamic=True: one compilation for the first shape, one for all others."""
    module = nn.LSTM(4, 6, 2)
    fn = compiled(module)
    for i, (T, B) in enumerate(SHAPES):
        with compiling(i // 2):
            check(module, fn, torch.randn(T, B, 4))


@pytest.mark.parametrize("what", ["hx", "lengths", "resets"])
def test_with_more_than_the_input(what):
    module = nn.LSTM(4, 6, 2)
    fn = compiled(module, dynamic=True)
    for i, (T, B) in enumerate(SHAPES):
        more = {
            "hx": {"hx": (torch.randn(2, B, 6), torch.randn(2, B, 6))},
            "lengths": {"lengths": torch.arange(B) % T + 1},
            "resets": {"resets": torch.rand(T, B) < 0.3},
        }[what]
        x = torch.randn(T, B, 4)
        with compiling(i):
            torch.testing.assert_close(fn(x, **more), module(x, **more))


def test_compiling_again_would_fail_these_tests():
    fn = compiled(torch.nn.Linear(4, 3), dynamic=False)
    fn(torch.randn(2, 4))
    with compiling(1), pytest.raises(RuntimeError, match="recompile"):
        fn(torch.randn(3, 4))


def test_inside_a_model_and_by_the_modules_own_method():
    model = torch.nn.Sequential(nn.GRU(4, 6, 2))
    fn = compiled(model)
    check(model, fn, torch.randn(5, 3, 4))
    model[0].compile(backend="aot_eager", fullgraph=True)
    assert model(torch.randn(5, 3, 4))[0].shape == (5, 3, 6)


def test_a_replaced_model():
    model = torch.nn.Sequential(torch.nn.LSTM(4, 6))
    fastseq.replace_modules(model)
    fn = compiled(model)
    check(model, fn, torch.randn(5, 3, 4))


def test_torchs_own_stay_out_of_graphs():
    fn = compiled(torch.nn.LSTM(4, 6))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="LSTM"):
        fn(torch.randn(5, 3, 4))
    assert not torch._dynamo.config.allow_rnn


def test_autocast_dropout_and_no_grad():
    module = nn.LSTM(4, 6, 2, dropout=0.5)
    fn = compiled(module)
    x = torch.randn(5, 3, 4)
    for training in (True, False):
        module.train(training)
        assert torch.equal(fn(x)[0], fn(x)[0]) != training
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            torch.manual_seed(1)
            found = fn(x)[0]
            torch.manual_seed(1)
            assert found.dtype == module(x)[0].dtype


def test_packed_sequences_with_breaks():
    """pack_padded_sequence breaks torch's graphs; what is between runs as ever."""
    torch._dynamo.reset()
    pack = torch.nn.utils.rnn.pack_padded_sequence
    module, x = nn.GRU(4, 6), torch.randn(5, 3, 4)
    fn = torch.compile(lambda x, n: module(pack(x, n))[0].data, backend="aot_eager")
    lengths = torch.tensor([5, 4, 2])
    assert torch.allclose(fn(x, lengths), module(pack(x, lengths))[0].data, atol=1e-6)


@pytest.mark.parametrize("faster", [True, False])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_layer_that_torch_may_run_faster_is_called_between_graphs(monkeypatch, fullgraph, faster):
    """As torch's own are on a GPU; not where one graph is asked for."""

    def belongs(index, dtype, H, **about):
        assert (index, dtype, H, about["cell"]) == (None, torch.float32, 6, "gru")
        return faster

    monkeypatch.setattr(fastseq.backends, "belongs_in_graphs", belongs)
    own = lambda self: fastseq.nn._compiling.in_graph(  # noqa: E731
        None, torch.float32, self.hidden_size, cell=self.cell_name
    )
    monkeypatch.setattr(nn.GRU, "_belongs_in_graphs", own)
    torch._dynamo.reset()
    seen, eager = [], []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    module, x = nn.GRU(4, 6), torch.randn(5, 3, 4)
    original = module._run_eagerly
    monkeypatch.setattr(
        nn.GRU, "_run_eagerly", lambda self, *given: eager.append(1) or original(*given)
    )
    fn = torch.compile(lambda x: module(x + 1)[0] * 2, backend=backend, fullgraph=fullgraph)
    found = fn(x)
    between = bool(eager)
    assert torch.allclose(found, module(x + 1)[0] * 2, atol=1e-6)
    assert between == (not faster and not fullgraph)
    assert any("recurrent_fwd" in target for target in seen) != between
    assert any("mul" in target for target in seen)


@pytest.mark.parametrize("dynamo_first", [False, True])
def test_whichever_is_imported_first(dynamo_first):
    """torch imports its compiler late; fastseq neither makes it nor needs it to."""
    imports = ["import torch._dynamo", "from fastseq import nn"]
    program = f"""
        import sys
        {imports[not dynamo_first]}
        assert {dynamo_first} == ("torch._dynamo" in sys.modules)
        {imports[dynamo_first]}
        import torch
        fn = torch.compile(nn.GRU(3, 4), backend="eager", fullgraph=True)
        print(tuple(fn(torch.randn(5, 2, 3))[0].shape))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True,
        env=os.environ, timeout=120,
    )  # fmt: skip
    assert done.stdout == "(5, 2, 4)\n", done.stderr


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_by_inductor():
    """Nothing is left to write C++ for, whose compilation is what takes a compiler's time."""
    torch._dynamo.reset()
    torch._inductor.metrics.reset()
    module = nn.LSTM(4, 6, 2, bidirectional=True, batch_first=True)
    with torch.compiler.config.patch(force_disable_caches=True):
        fn = torch.compile(module, fullgraph=True, dynamic=True)
        check(module, fn, torch.randn(5, 3, 4))
        assert torch._inductor.metrics.generated_kernel_count == 0
