"""The module for eager calls: the registered ops' answers, and what it leaves to them."""

import gc
import sys
import sysconfig
import warnings
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastseq import _native, nn
from fastseq.ops import recurrent as op

HAS_HEADERS = Path(sysconfig.get_path("include"), "Python.h").exists()


@pytest.fixture(autouse=True)
def needs_eager():
    if op.eager is None and not HAS_HEADERS:
        pytest.skip("no Python.h: built without")


def without_eager(monkeypatch):
    monkeypatch.setattr(op, "eager", None)


def test_it_is_built_and_loaded_wherever_python_has_its_headers():
    assert op.eager is not None, _native.why_no_eager


def test_another_torch_does_not_get_it(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.11.0+other")
    module, reason = _native._load_eager()
    assert module is None
    assert reason == "it was not built for this torch and this Python"


def test_one_that_does_not_load_is_done_without(monkeypatch, tmp_path):
    library = tmp_path / "libfastseq.so"
    monkeypatch.setattr(_native, "LIBRARY", library)
    name = f"_eager-torch{torch.__version__}-{sysconfig.get_config_var('SOABI')}.so"
    library.with_name(name).write_bytes(b"cut off")
    module, reason = _native._load_eager()
    assert module is None
    assert reason.startswith("it does not load: ")


# Module, its arguments, whether with states, packed rows.
MODULES = {
    "lstm": (nn.LSTM, {}, True, False),
    "lstm without states": (nn.LSTM, {}, False, False),
    "lstm batch first, no bias": (nn.LSTM, {"batch_first": True, "bias": False}, True, False),
    "lstm projected": (nn.LSTM, {"proj_size": 3}, True, False),
    "lstm two layers, two sides": (nn.LSTM, {"num_layers": 2, "bidirectional": True}, True, False),
    "lstm three layers, dropout": (nn.LSTM, {"num_layers": 3, "dropout": 0.4}, False, False),
    "lstm packed": (nn.LSTM, {"bidirectional": True}, False, True),
    "lstm packed, projected, two layers": (
        nn.LSTM,
        {"num_layers": 2, "proj_size": 3, "batch_first": True},
        True,
        True,
    ),
    "gru packed, without states": (nn.GRU, {"num_layers": 2}, False, True),
    "gru": (nn.GRU, {"bidirectional": True}, True, False),
    "rnn": (nn.RNN, {"nonlinearity": "relu"}, False, False),
    "zoneout": (nn.GRU, {"zoneout": 0.3}, False, False),
    "peephole": (nn.PeepholeLSTM, {}, True, False),
    "layer norm": (nn.LayerNormLSTM, {"bidirectional": True, "num_layers": 2}, False, False),
}


def run(name, dtype, recompute=False, create_graph=False):
    """Outputs and gradients of everything, as one flat list."""
    cls, arguments, with_states, packed = MODULES[name]
    torch.manual_seed(5)
    T, B, inputs, H = 6, 3, 4, 5
    module = cls(inputs, H, dtype=dtype, **arguments)
    module.recompute = recompute
    x = torch.randn(T, B, inputs, dtype=dtype)
    x = (x.transpose(0, 1).contiguous() if module.batch_first else x).requires_grad_()
    leaves = [x, *module.parameters()]
    hx = None
    if with_states:
        sides = module.num_layers * (2 if module.bidirectional else 1)
        widths = (module.proj_size or H, H)[: 2 if "LSTM" in cls.__name__ else 1]
        hx = [torch.randn(sides, B, w, dtype=dtype, requires_grad=True) for w in widths]
        leaves += hx
        hx = tuple(hx) if len(hx) == 2 else hx[0]
    given = x
    if packed:
        given = torch.nn.utils.rnn.pack_padded_sequence(
            x, [4, 6, 1], batch_first=module.batch_first, enforce_sorted=False
        )
    torch.manual_seed(6)
    y, state = module(given, hx)
    outputs = [y.data if packed else y, *(state if isinstance(state, tuple) else (state,))]
    cotangents = [torch.randn_like(o) for o in outputs]
    found = torch.autograd.grad(outputs, leaves, cotangents, create_graph=create_graph)
    if create_graph:
        found += torch.autograd.grad(sum((g * g).sum() for g in found), leaves)
    return [*outputs, *found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODULES)
def test_same_bits_as_through_the_registered_ops(name, dtype, monkeypatch):
    here = [run(name, dtype), run(name, dtype, recompute=True)]
    without_eager(monkeypatch)
    there = run(name, dtype)
    for found in here:
        for a, b in zip(found, there, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["lstm", "lstm packed", "gru", "zoneout", "layer norm"])
def test_second_derivatives_are_those_of_the_registered_ops(name, monkeypatch):
    here = run(name, torch.float64, create_graph=True)
    without_eager(monkeypatch)
    there = run(name, torch.float64, create_graph=True)
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cls", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_have_the_bits_of_the_registered_ops(cls, bias, monkeypatch):
    torch.manual_seed(7)
    cell, x = cls(4, 6, bias=bias), torch.randn(3, 4, requires_grad=True)
    hx = [torch.randn(3, 6, requires_grad=True) for _ in range(2)]
    given = tuple(hx) if cls is nn.LSTMCell else hx[0]

    def everything():
        results = []
        for state in (None, given):
            out = cell(x, state)
            out = out if isinstance(out, tuple) else (out,)
            leaves = [x, *cell.parameters(), *(hx[: len(out)] if state is not None else ())]
            total = sum((o * (i + 1)).square().sum() for i, o in enumerate(out))
            results += [*out, *torch.autograd.grad(total, leaves)]
        return results

    here = everything()
    without_eager(monkeypatch)
    for a, b in zip(here, everything(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "x, hx",
    [
        (torch.randn(4), None),
        (torch.randn(3, 3), None),
        (torch.randn(3, 4), torch.randn(2, 6)),
        (torch.randn(3, 4), torch.randn(1, 3, 6)),
        (torch.randn(3, 4), torch.randn(3, 5)),
        (torch.randn(2, 3, 4), None),
    ],
)
def test_a_cells_call_that_does_not_fit_is_left(x, hx):
    cell = nn.GRUCell(4, 6)
    assert op.eager.layer(SETTINGS, 1, x, hx, list(cell.parameters()), None, 1, 0.0) is None


def counted(monkeypatch):
    """Calls that the module took, and those it left."""
    taken, left = [], []

    class Counting:
        def __getattr__(self, name):
            function = getattr(_native.eager, name)

            def call(*arguments):
                out = function(*arguments)
                (left if out is None else taken).append(name)
                return out

            return call

    monkeypatch.setattr(op, "eager", Counting())
    return taken, left


def test_modules_and_cells_go_through_it(monkeypatch):
    taken, left = counted(monkeypatch)
    x = torch.randn(5, 3, 4)
    nn.LSTM(4, 6)(x)
    nn.GRU(4, 6, batch_first=True)(x, torch.randn(1, 5, 6))
    nn.LSTM(4, 6, num_layers=2, dropout=0.5)(x)
    nn.LSTM(4, 6, num_layers=2)(torch.nn.utils.rnn.pack_sequence([x[:, 0], x[:3, 1]]))
    nn.LSTMCell(4, 6)(x[0])
    nn.GRUCell(4, 6)(x[0], torch.randn(3, 6))
    nn.LSTM(4, 6)(x, [torch.randn(1, 3, 6), torch.randn(1, 3, 6)])
    nn.LSTMCell(4, 6)(x[0], [torch.randn(3, 6), torch.randn(3, 6)])
    assert taken == ["layer"] * 8
    nn.GRU(4, 6, zoneout=0.1)(x)
    assert taken[8:] == ["run"]
    assert not left


class Subclass(torch.Tensor):
    pass


class Looking(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Overriding(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def dual(x):
    with torch.autograd.forward_ad.dual_level():
        return op.eager.run(
            op.settings_of("gru", True), torch.autograd.forward_ad.make_dual(x, x), *REST
        )


GRU = torch.nn.GRU(4, 6)
REST = (None, None, list(GRU.parameters()))
SETTINGS = op.settings_of("gru", True) if op.CELLS else None


def under(context, x):
    with context:
        return op.eager.run(SETTINGS, x, *REST)


NOT_PLAIN = {
    "a subclass": lambda x: op.eager.run(SETTINGS, x.as_subclass(Subclass), *REST),
    "a tensor that is not there": lambda x: op.eager.run(SETTINGS, x.to("meta"), *REST),
    "a sparse tensor": lambda x: op.eager.run(SETTINGS, x.to_sparse(), *REST),
    "weights that are no list": lambda x: op.eager.run(SETTINGS, x, None, None, iter(REST[2])),
    "no tensor": lambda x: op.eager.run(SETTINGS, 3, *REST),
    "a dispatch mode": lambda x: under(Looking(), x),
    "a function mode": lambda x: under(Overriding(), x),
    "autocast": lambda x: under(torch.autocast("cpu", torch.bfloat16), x),
    "a tangent": dual,
}


@pytest.mark.parametrize("what", NOT_PLAIN)
def test_what_is_not_plain_is_left_to_the_registered_ops(what):
    x = torch.randn(5, 3, 4)
    assert op.eager.run(SETTINGS, x, *REST) is not None
    assert NOT_PLAIN[what](x) is None


def test_transforms_and_tracing_are_left_too():
    x = torch.randn(2, 5, 3, 4)
    seen = []

    def call(x):
        seen.append(op.eager.run(SETTINGS, x, *REST))
        return x * 1

    torch.func.vmap(call)(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(call, (x[0],), check_trace=False)
    torch.func.grad(lambda x: call(x).sum())(x[0])
    assert seen == [None] * 3


@pytest.mark.parametrize(
    "x, hx",
    [
        (torch.randn(5, 3, 3), None),
        (torch.randn(3, 4), None),
        (torch.randn(0, 3, 4), None),
        (torch.randn(5, 3, 4, dtype=torch.float64), None),
        (torch.randn(5, 3, 4), torch.randn(1, 2, 6)),
        (torch.randn(5, 3, 4), torch.randn(2, 3, 6)),
        (torch.randn(5, 3, 4), torch.randn(1, 3, 6, dtype=torch.float64)),
        (torch.randn(5, 3, 4), torch.randn(3, 6)),
    ],
)
def test_what_does_not_fit_is_left_and_said_in_torchs_words(x, hx):
    ours, torchs = nn.GRU(4, 6), torch.nn.GRU(4, 6)
    assert op.eager.layer(SETTINGS, 1, x, hx, list(ours.parameters()), False, 1, 0.0) is None
    ours.load_state_dict(torchs.state_dict())
    try:
        want = torchs(x, hx)
    except Exception as error:
        with pytest.raises(type(error)) as caught:
            ours(x, hx)
        assert str(caught.value) == str(error)
    else:
        assert ours(x, hx)[0].shape == want[0].shape


ROWS, SIZES = torch.randn(5, 4), torch.tensor([2, 2, 1])
PACKED = dict(x=ROWS, hx=None, sizes=SIZES, layers=1)


def packed_call(x, hx, sizes, layers):
    weights = list(GRU.parameters())
    return op.eager.layer(SETTINGS, 1, x, hx, weights, False, layers, 0.0, sizes, None, None)


@pytest.mark.parametrize(
    "change",
    [
        dict(x=torch.randn(5, 3)),
        dict(x=torch.randn(5, 1, 4)),
        dict(x=ROWS.bfloat16()),
        dict(hx=torch.randn(1, 3, 6)),
        dict(hx=torch.randn(2, 2, 6)),
        dict(hx=torch.randn(2, 6)),
        dict(sizes=SIZES.int()),
        dict(sizes=SIZES[None]),
        dict(sizes=SIZES[:0]),
        dict(sizes=None),
        dict(sizes=SIZES.to("meta")),
        dict(layers=0),
        dict(layers=3),
    ],
)
def test_packed_rows_that_do_not_fit_are_left(change):
    assert packed_call(**PACKED) is not None
    assert packed_call(**PACKED | dict(hx=torch.randn(1, 2, 6))) is not None
    assert packed_call(**PACKED | change) is None


def test_four_weights_are_two_layers_without_biases():
    with pytest.raises(RuntimeError, match="fastseq.recurrent_fwd: expected"):
        packed_call(**PACKED | dict(layers=2))


@pytest.mark.parametrize("dropout", [-0.5, float("nan"), 1.5])
def test_a_dropout_set_wrong_later_is_refused(dropout):
    module, x = nn.LSTM(4, 6, num_layers=2, dropout=0.1), torch.randn(5, 3, 4)
    module.dropout = dropout
    with pytest.raises((RuntimeError, ValueError), match="dropout"):
        module(x)


def test_states_that_were_not_given_are_not_put_in_order():
    """An order of the wrong length is of no matter to them, as in torch."""
    ours, torchs = nn.LSTM(4, 6), torch.nn.LSTM(4, 6)
    ours.load_state_dict(torchs.state_dict())
    rows = torch.nn.utils.rnn.PackedSequence(ROWS, SIZES, torch.tensor([0]), torch.tensor([0]))
    for found, want in zip(ours(rows)[1], torchs(rows)[1], strict=True):
        assert found.shape == want.shape
        assert torch.allclose(found, want, atol=1e-6)


def test_weights_that_do_not_fit_are_an_error_in_the_ops_words():
    weights = [torch.randn(18, 4), torch.randn(17, 6)]
    with pytest.raises(RuntimeError, match=r"fastseq.recurrent_fwd: expected w_hh of shape"):
        op.eager.run(op.settings_of("gru", False), torch.randn(5, 3, 4), None, None, weights)


@pytest.mark.parametrize("which", [(), (0,), (1,), (3,), (0, 2), (1, 4)])
def test_only_wanted_gradients_are_given(which):
    module = nn.LSTM(4, 6)
    leaves = [torch.randn(5, 3, 4), *module.parameters()]
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in which)
    y = module(leaves[0])[0]
    assert y.requires_grad == bool(which)
    if which:
        y.sum().backward()
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in which)


def graph():
    module = nn.LSTM(4, 6)
    x = torch.randn(5, 3, 4, requires_grad=True)
    return module, x, module(x)


def test_state_alone_may_be_differentiated():
    module, x, (_, (_, c)) = graph()
    c.sum().backward()
    other = torch.nn.LSTM(4, 6)
    other.load_state_dict(module.state_dict())
    want = torch.autograd.grad(other(x)[1][1].sum(), [x])[0]
    torch.testing.assert_close(x.grad, want)


def test_a_graph_is_gone_through_once_unless_retained():
    _, x, (y, _) = graph()
    y.sum().backward(retain_graph=True)
    first = x.grad.clone()
    y.sum().backward()
    assert torch.equal(x.grad, 2 * first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


def test_a_weight_changed_meanwhile_is_noticed():
    module, _, (y, _) = graph()
    with torch.no_grad():
        module.weight_hh_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_saved_tensors_go_through_hooks():
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        _, x, (y, _) = graph()
    # x, four weights, and what the kernel keeps.
    assert len(packed) == 6
    y.sum().backward()
    assert x.grad is not None


def test_checkpoints_and_anomaly_mode():
    module, x, (y, _) = graph()
    want = torch.autograd.grad(y.sum(), [x])[0]
    again = torch.utils.checkpoint.checkpoint(lambda x: module(x)[0], x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.sum(), [x])[0], want)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            y = module(x)[0]
            assert torch.equal(torch.autograd.grad(y.sum(), [x])[0], want)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_profiler_sees_both_passes(autocast):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        y = graph()[2][0]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y.backward(torch.ones_like(y))
    names = {event.key for event in seen.key_averages()}
    assert {"fastseq::recurrent_fwd", "fastseq::recurrent_bwd"} <= names


def test_no_reference_is_lost():
    module = nn.LSTM(4, 6)
    x, settings = torch.randn(5, 3, 4), op.settings_of("lstm", True)
    hx = (torch.randn(1, 3, 6), torch.randn(1, 3, 6))
    held = [x, settings, hx, *hx, module.weight_ih_l0, None, 2]
    # What tests before this one left in cycles refers to None too.
    gc.collect()
    before = [sys.getrefcount(o) for o in held]
    for _ in range(1000):
        module(x, hx)[0].sum().backward()
        op.eager.layer(settings, 2, x, (1, 2), list(module.parameters()), False, 1, 0.0)
    after = [sys.getrefcount(o) for o in held]
    assert all(abs(a - b) < 100 for a, b in zip(after, before, strict=True)), (before, after)
