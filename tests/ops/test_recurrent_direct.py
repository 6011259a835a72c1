"""The way past the dispatcher: the same bits, wherever it is taken; and it is not taken blindly."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastseq import _native, functional, nn
from fastseq.ops import recurrent, recurrent_direct
from fastseq.testing import recurrent_case, run_with_grads
from tests.fuzz_recurrent import ours

if not _native.loaded():
    pytest.skip(str(_native.why_not_loaded()), allow_module_level=True)

CELLS = sorted({cell.reference for cell in _native.cells().values()})


@pytest.fixture
def ways(monkeypatch) -> list[str]:
    """The way each pass took, in order."""
    taken = []

    def watched(name, past, through):
        def call(*args):
            found = past(*args)
            taken.append(f"{name} {'through' if found is None else 'past'}")
            return found

        return call

    for name in ("forward", "backward"):
        past = getattr(recurrent_direct, name)
        monkeypatch.setattr(recurrent_direct, name, watched(name, past, None))
    return taken


def through_the_dispatcher(monkeypatch) -> None:
    for name in ("forward", "backward"):
        monkeypatch.setattr(recurrent_direct, name, lambda *args: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [{}, dict(bidirectional=True), dict(bias=False), dict(hx=False), dict(batch_first=True)],
    ids=str,
)
@pytest.mark.parametrize("cell", CELLS)
def test_bits_are_those_of_the_registered_op(cell, options, dtype, ways, monkeypatch):
    case = recurrent_case(cell, T=5, B=3, I=4, H=18, dtype=dtype, **options)

    def run():
        return run_with_grads(ours(case), case.inputs, case.cotangents, names=case.names)

    found = run()
    assert ways == ["forward past", "backward past"]
    through_the_dispatcher(monkeypatch)
    expected = run()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_projection_and_rows_of_any_number_and_stride(ways, monkeypatch):
    layer = nn.LSTM(6, 10, proj_size=4)
    inputs = [torch.randn(t, b, 6) for t, b in ((3, 2), (1, 7), (4, 1))]
    inputs += [torch.randn(2, 5, 6).transpose(0, 1), torch.randn(9, 2, 6)[::2]]
    found = [layer(x)[0] for x in inputs]
    assert ways == ["forward past"] * len(inputs)
    through_the_dispatcher(monkeypatch)
    for x, y in zip(inputs, found, strict=True):
        assert torch.equal(layer(x)[0], y)


@pytest.mark.parametrize("sizes", [(1, 70, 40), (5, 3, 9)], ids=str)
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_single_steps(kind, sizes, ways, monkeypatch):
    B, I, H = sizes  # noqa: E741
    cell = getattr(nn, kind)(I, H)
    x = torch.randn(B, 2 * I)[:, :I].requires_grad_()
    hx = [torch.randn(B, H, requires_grad=True) for _ in range(2)]
    hx = tuple(hx) if kind == "LSTMCell" else hx[0]

    def run():
        after = cell(x, hx)
        after = after[0] + 2 * after[1] if isinstance(after, tuple) else after
        states = hx if isinstance(hx, tuple) else (hx,)
        return after, *torch.autograd.grad(after.sum(), (x, *states, *cell.parameters()))

    found = run()
    without = cell(x)
    assert set(ways) == {"forward past", "backward past"}
    through_the_dispatcher(monkeypatch)
    assert all(map(torch.equal, found, run()))
    assert all(
        map(torch.equal, *([*t] if isinstance(t, tuple) else [t] for t in (without, cell(x))))
    )


def test_without_gradients_and_in_inference_mode(ways):
    layer, x = nn.GRU(3, 5), torch.randn(4, 2, 3)
    expected = layer(x)[0]
    for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with mode:
            assert torch.equal(layer(x)[0], expected)
    assert ways == ["forward past"] * 4


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


class _Listening(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_who_watches_operators_sees_the_op(ways):
    layer, x = nn.LSTM(3, 5), torch.randn(4, 2, 3)
    with _Seen() as seen:
        layer(x)[0].sum().backward()
    assert "fastseq.recurrent_fwd.default" in seen.ops
    assert "fastseq.recurrent_bwd.default" in seen.ops
    with _Listening():
        layer(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x)
    assert "fastseq::recurrent_fwd" in {event.name for event in profile.events()}
    assert {way.split()[1] for way in ways} == {"through"}


class _Own(torch.Tensor):
    pass


def test_what_does_not_fit_is_for_the_op(ways):
    x = torch.randn(4, 2, 3)
    weights = [torch.randn(*shape) for shape in ((20, 3), (20, 5), (20,), (20,))]
    plain = functional.lstm(x, None, weights)[0]
    wide = [torch.randn(3, 20).t().copy_(weights[0]), *weights[1:]]
    assert torch.equal(functional.lstm(x, None, wide)[0], plain)
    assert torch.equal(functional.lstm(x.as_subclass(_Own), None, weights)[0], plain)
    functional.lstm(x, None, weights, lengths=torch.tensor([4, 2]))
    functional.lstm(x, None, weights, resets=torch.zeros(4, 2, dtype=torch.bool))
    functional.lstm(x[:, :0], None, weights)
    assert ways == ["forward past"] + ["forward through"] * 5


def test_a_weight_that_shrank_since_the_last_call_is_refused():
    """Not read beyond its end: the parameter is the same object, its memory is not."""
    layer, x = nn.LSTM(3, 5), torch.randn(4, 2, 3)
    layer(x)
    layer.weight_hh_l0.data = torch.zeros(8, 2)
    with pytest.raises(RuntimeError, match="expected w_ih of shape"):
        layer(x)


def test_one_first_weight_in_layers_of_two_kinds(ways):
    x, shared = torch.randn(4, 2, 3), torch.randn(20, 3)
    biases = [torch.randn(20), torch.randn(20)]
    plain = [shared, torch.randn(20, 5), *biases]
    projected = [shared, torch.randn(20, 2), *biases, torch.randn(2, 5)]
    expected = [torch.lstm(x, tuple(torch.zeros(1, 2, n) for n in (w, 5)), weights, True, 1, 0.0,
                           False, False, False)[0]
                for w, weights in ((5, plain), (2, projected))]  # fmt: skip
    for _ in range(2):
        for weights, y in zip((plain, projected), expected, strict=True):
            torch.testing.assert_close(functional.lstm(x, None, weights)[0], y)
    assert ways == ["forward past"] * 4


def test_weights_are_read_where_they_are_now():
    layer, x = nn.LSTM(3, 5), torch.randn(4, 2, 3)
    layer(x)
    layer.weight_ih_l0.data = torch.randn(20, 3)
    with torch.no_grad():
        layer.bias_hh_l0.add_(1.0)
    twin = torch.nn.LSTM(3, 5)
    twin.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x)[0], twin(x)[0])


def test_what_hooks_put_in_the_place_of_saved_tensors(ways):
    x = torch.randn(4, 2, 3, requires_grad=True)
    layer = nn.LSTM(3, 5)

    def gradient(unpack):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), unpack):
            y = layer(x)[0]
        return torch.autograd.grad(y.square().sum(), x)[0]

    expected = gradient(lambda t: t)
    apart = gradient(lambda t: torch.stack([t, t], -1)[..., 0])
    assert torch.equal(apart, expected)
    assert torch.equal(gradient(lambda t: t.as_subclass(_Own)), expected)
    assert ways[-2:] == ["forward past", "backward through"]


def test_gradients_of_a_batch_of_cotangents_at_once(monkeypatch):
    x = torch.randn(4, 2, 3, requires_grad=True)
    y = nn.LSTM(3, 5)(x)[0]
    cotangents = torch.randn(3, *y.shape)

    def batched():
        return torch.autograd.grad(y, x, cotangents, is_grads_batched=True, retain_graph=True)

    def outcome():
        try:
            return batched()[0]
        except RuntimeError as error:
            return str(error)

    found = outcome()
    through_the_dispatcher(monkeypatch)
    expected = outcome()
    assert type(found) is type(expected)
    assert found == expected if isinstance(found, str) else torch.equal(found, expected)


def test_many_threads_at_once():
    layers = [nn.LSTM(3, 5), nn.LSTM(7, 9), nn.GRU(3, 5)]
    inputs = [torch.randn(t, 2, layer.input_size) for t in (2, 6) for layer in layers]
    pairs = list(zip(layers * 2, inputs, strict=True))

    def run(i):
        layer, x = pairs[i % len(pairs)]
        return layer(x)[0]

    expected = [run(i) for i in range(len(pairs))]
    with ThreadPoolExecutor(8) as pool:
        for i, y in enumerate(pool.map(run, range(400))):
            assert torch.equal(y, expected[i % len(pairs)])


def test_the_guards_are_there():
    """Without them every call would go through the dispatcher, and nobody would notice."""
    assert recurrent_direct.TensorGuards is not None
    assert recurrent._forward is not None
