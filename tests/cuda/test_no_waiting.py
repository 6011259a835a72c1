"""Nothing in a GPU's layers waits for the device: shown without one.

Tensors are of the device "meta", which holds no values: whatever would read one on the host raises,
and so does, here, a copy out of memory that is not pinned.
"""

from __future__ import annotations

import contextlib
import threading
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastseq import _native, functional
from fastseq.ops import decoder as decoder_op
from fastseq.ops import decoder_cuda, graphs, recurrent_cuda
from fastseq.ops import recurrent as op
from fastseq.testing import recurrent_case, run_with_grads
from fastseq.testing_decoder import decoder_case
from tests.test_functional_decoder import ORDERS

if not _native.loaded():
    pytest.skip(str(_native.why_not_loaded()), allow_module_level=True)

WAITS = (NotImplementedError, RuntimeError, AssertionError)


class Copies(TorchDispatchMode):
    """Copies between the host and the device, but for those out of pinned memory."""

    def __init__(self):
        super().__init__()
        self.pinned, self.seen = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # (Below autograd torch's own functions arrive whole.)
        aten, asked = torch.ops.aten, func.overloadpacket
        if asked in (aten._to_copy, aten.to, aten.copy_):
            source = args[1] if asked is aten.copy_ else args[0]
            if source.device != out.device:
                self.seen += 1
                assert any(source is t for t in self.pinned), f"{func} from {source.device}"
                assert (kwargs or {}).get("non_blocking"), f"{func} that waits"
        return out


@pytest.fixture
def a_gpu(monkeypatch):
    for name in ("recurrent_cuda_fwd", "recurrent_cuda_bwd"):
        monkeypatch.setattr(torch.ops.fastseq, name, lambda *args: recurrent_cuda.STEP)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    copies = Copies()

    def pin(tensor):
        copies.pinned.append(tensor.clone())
        return copies.pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    with copies:
        yield copies


def on_gpu(t):
    return None if t is None else torch.empty(t.shape, dtype=t.dtype, device="meta")


FORMS = {
    "padded": {},
    "lengths": dict(lengths=[4, 0, 2], bidirectional=True),
    "lengths of the host": dict(lengths=[4, 0, 2]),
    "packed": dict(lengths=[4, 3, 1], resets=0.3, bidirectional=True),
}


def both_passes(cell, form, proj_size=0, around=None):
    zoneout = cell.startswith("zoneout_")
    options = dict(FORMS[form], proj_size=proj_size)
    case = recurrent_case(cell.removeprefix("zoneout_"), 4, 3, 5, 8, **options)
    case = case.packed() if form == "packed" else case
    kind, D = op.CELLS[cell], 1 + case.options["bidirectional"]
    x, h0, *rest = (on_gpu(t) for t in case.inputs.values())
    c0 = rest.pop(0) if kind.states == 2 else None
    sizes, lengths, resets = (case.keywords.get(n) for n in ("batch_sizes", "lengths", "resets"))
    if form == "lengths":
        lengths = on_gpu(lengths)
    weights = functional.rnn.as_matrix(kind.reference, rest, True, D)
    widths = (proj_size or 8, 8)[: kind.states]
    masks = [x.new_zeros(*x.shape[:-1], w) for w in widths * D] if zoneout else []
    given = (weights, True, D, sizes, lengths, on_gpu(resets), masks)
    with around or contextlib.nullcontext():
        *out, saved = recurrent_cuda.forward(kind.number, x, h0, c0, *given, True)
        cotangents = [torch.empty_like(t) for t in (*out, None)[:3] if t is not None]
        dc = cotangents[2] if kind.states == 2 else None
        grads = recurrent_cuda.backward(
            kind.number, *cotangents[:2], dc, x, h0, c0, *given, saved, True, True, True, True
        )
    assert all(t.is_meta for t in (*out, *grads))


CELLS = [("lstm", 0), ("lstm", 6), ("gru", 0), ("peephole_lstm", 0), ("layer_norm_lstm", 0)]
CELLS += [("layer_norm_lstm", 6), ("zoneout_lstm", 0), ("zoneout_lstm", 6), ("zoneout_gru", 0)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell, proj_size", CELLS)
def test_layers(a_gpu, cell, proj_size, form):
    both_passes(cell, form, proj_size)
    assert (a_gpu.seen > 0) == (form in ("packed", "lengths of the host"))


@pytest.mark.parametrize("cell, proj_size", [("lstm", 0), ("layer_norm_lstm", 6)])
def test_what_the_host_needs_is_made_there_whatever_the_default_device(a_gpu, cell, proj_size):
    both_passes(cell, "packed", proj_size, torch.device("meta"))


PLANTED = {
    "a number read": lambda t: t * t.sum().item(),
    "a choice by a value": lambda t: t if t.any() else -t,
    "as many as there are": lambda t: t[t > 0].new_zeros(t.shape),
    "a copy to the host": lambda t: t.cpu().to("meta"),
    "a copy from the host": lambda t: t + torch.ones(3).to("meta", non_blocking=True).sum(),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_what_waits_is_noticed(a_gpu, monkeypatch, planted):
    original = recurrent_cuda.in_order
    wait = PLANTED[planted]
    monkeypatch.setattr(recurrent_cuda, "in_order", lambda t, moved: wait(original(t, moved)))
    with pytest.raises(WAITS):
        both_passes("lstm", "lengths")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell, proj_size", [("lstm", 0), ("gru", 0), ("layer_norm_lstm", 6)])
def test_inside_a_capture_nothing_is_copied(a_gpu, monkeypatch, cell, proj_size, form):
    """The copy's source would be another's memory by the time of the replay."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    both_passes(cell, form, proj_size)
    assert a_gpu.seen == 0 and not a_gpu.pinned


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("forced", [None, (True, False, True, False, False)])
def test_decoders(a_gpu, monkeypatch, order, forced):
    """Both passes once more on the device, with what the host alone knows left there: which tokens
    are given."""
    ran = []

    def beside(name):
        original, function = (
            getattr(decoder_op, f"attention_decoder_{name}"),
            getattr(decoder_cuda, "forward" if name == "fwd" else "backward"),
        )

        def call(*given):
            known = 4 if name == "fwd" else None
            moved = [t if i == known else on_gpus(t) for i, t in enumerate(given)]
            ran.append(function(*moved))
            assert all(t.is_meta for t in ran[-1])
            return original(*given)

        monkeypatch.setattr(decoder_op, f"attention_decoder_{name}", call)

    for name in ("forward", "backward"):
        monkeypatch.setitem(decoder_cuda.GRAPHS, name, getattr(decoder_cuda, f"_{name}"))
    beside("fwd")
    beside("bwd")
    options = {} if forced is None else {"forced": forced}
    case = decoder_case("lstm", masked=True, **options, **ORDERS[order])
    run_with_grads(case.function(functional), case.inputs, case.cotangents, names=case.names)
    assert len(ran) == 2 and a_gpu.seen == 0


def on_gpus(argument):
    if isinstance(argument, (list, tuple)):
        return [on_gpus(each) for each in argument]
    return on_gpu(argument) if isinstance(argument, torch.Tensor) else argument


class Elsewhere(torch.Tensor):
    """Of a device that is another, and yet has values to look at."""

    device = torch.device("meta")
    __torch_function__ = torch._C._disabled_torch_function_impl


@pytest.mark.parametrize("n", [0, 1, 61, 62, 63, 200])
def test_flags_arrive_without_a_copy(n):
    flags = torch.rand(n) < 0.5
    sent = recurrent_cuda.send_flags(flags, torch.device("meta"))
    assert sent.is_meta and sent.shape == flags.shape and sent.dtype == torch.bool
    found = recurrent_cuda.send_flags(flags.as_subclass(Elsewhere), torch.device("cpu"))
    assert torch.equal(found, flags)


@pytest.mark.parametrize("most", [0, 1, 5, 1000, 2**31, 2**62 - 1])
@pytest.mark.parametrize("n", [0, 1, 61, 200])
def test_numbers_arrive_in_a_capture(monkeypatch, n, most):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    numbers = torch.randint(0, most + 1, (n,))
    numbers[-1:] = most
    found = recurrent_cuda.send(numbers.as_subclass(Elsewhere), torch.device("cpu"))
    assert torch.equal(found, numbers) and found.dtype == torch.int64 and found.is_contiguous()


def test_captures_follow_each_other(monkeypatch):
    """They are on one stream, and torch runs backward passes on threads of its own."""
    begun, at_once = [], []

    @contextlib.contextmanager
    def capture(graph, **options):
        begun.append(1)
        at_once.append(len(begun))
        time.sleep(0.02)
        yield
        begun.pop()

    for name, value in {
        "CUDAGraph": type("Graph", (), {"replay": None}),
        "graph": capture,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda: None,
        "current_device": lambda: 0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(graphs, "_capture_stream", lambda device: None)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    threads = [threading.Thread(target=graphs.capture, args=(list, ())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert at_once == [1] * 4


def test_a_capture_has_a_stream_of_its_device_and_memory_of_its_own(monkeypatch):
    now, captured, events = {"device": 0, "stream": "mine"}, [], []

    class Stream:
        def __init__(self, device):
            self.device = device

    @contextlib.contextmanager
    def on(stream):
        before, now["stream"] = now["stream"], stream
        try:
            yield
        finally:
            now["stream"] = before

    class Capture:
        """torch's: where the capture fails, its stream stays the current one."""

        def __init__(self, graph, stream, capture_error_mode):
            captured.append(stream)

        def __enter__(self):
            events.append("begin")
            now["stream"] = captured[-1]

        def __exit__(self, *error):
            events.append("end")
            raise RuntimeError("capturing failed")

    for name, value in {
        "CUDAGraph": lambda: None,
        "Stream": Stream,
        "stream": on,
        "graph": Capture,
        "current_stream": lambda: now["stream"],
        "current_device": lambda: now["device"],
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    cleared = lambda: events.append("cleared")  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", cleared, raising=False)
    graphs._capture_stream.cache_clear()
    ran = []
    for device in (0, 1, 0):
        now["device"] = device
        with pytest.raises(RuntimeError, match="capturing failed"):
            graphs.capture(lambda: ran.append(now["stream"]) or events.append("ran") or [], [])
        assert now["stream"] == "mine"
        # Products' scratch memory is neither an earlier graph's nor a later one's.
        assert events == ["ran", "cleared", "begin", "ran", "end", "cleared"]
        events.clear()
        # What must not happen during a capture, such as compiling, did before.
        assert ran[-2:] == ["mine", captured[-1]]
    graphs._capture_stream.cache_clear()
    assert [stream.device for stream in captured] == [0, 1, 0] and captured[0] is captured[2]


def test_a_graph_is_of_its_device(monkeypatch):
    kinds = {
        str(device): graphs._described([torch.empty(2, device=device), [torch.empty(3)], 4])[1]
        for device in ("cpu", "meta")
    }
    assert kinds["cpu"] != kinds["meta"]
