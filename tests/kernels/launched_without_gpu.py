"""Launches against a CUDA driver that does nothing: what is passed, and what it costs the host.

Run by test_launch.py in a process of its own, which finds stub_cuda.c's driver as the system's.
Tensors lie in host memory, and nothing is computed.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import operator
import sys
import time
import types

import pytest
import torch
import triton
from fastseq.kernels import _launch, attention
from fastseq.kernels.attention import launch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.amd.driver import HIPLauncher
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
from triton.compiler.compiler import LazyDict

from fastseq import functional
from fastseq.ops import attention as functional_op

STUB = ctypes.CDLL("libcuda.so.1")


class StubDriver(CudaDriver):
    """Triton's own, less what torch would have to know of a GPU."""

    def __init__(self):
        self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: STREAM
        self.get_device_capability = lambda device: (9, 0)


STREAM = 0
OF_SCRATCH = ("size", "align")
# What only Triton's own launch says.
OF_HOOKS = (type(triton.knobs.runtime.launch_enter_hook), LazyDict)
# What Triton's launcher in C is told, by itself or by us; None: nobody listens.
TOLD: list | None = None


# Of a remembered call: instructions of Python 3.11, calls of its functions, calls of C.
MOST_WORK = {
    ("additive", "fwd"): (404, 13, 16),
    ("additive", "bwd"): (781, 27, 35),
    ("dot", "fwd"): (367, 13, 15),
    ("dot", "bwd"): (388, 15, 17),
}


def listened_to(init):
    """``CudaLauncher.__init__`` of a launcher whose C function says what it is told."""

    def with_ears(self, *arguments):
        init(self, *arguments)
        launch = self.launch

        def tell(*told):
            if TOLD is not None:
                TOLD.append(told)
            return launch(*told)

        self.launch = tell

    return with_ears


CudaLauncher.__init__ = listened_to(CudaLauncher.__init__)
triton.runtime.driver.set_active(StubDriver())
launch._device = lambda index: ("stub", 132)


def step(B=64, Q=1, S=40, K=512, C=512, dtype=torch.float32, mask=None):
    """The arguments of a decoding step of the additive score."""

    def normal(*shape):
        return torch.randn(*shape, dtype=dtype)

    lengths = torch.full((B,), S)
    return normal(B, Q, K), normal(B, S, K), normal(B, S, C), normal(K), None, mask, lengths, 1.0


def cotangents(query, keys, values, v, extra, mask, lengths, scale):
    """The arguments of the backward pass of that step."""
    weights = torch.softmax(query.new_zeros(*query.shape[:2], keys.shape[1]), -1)
    d_context = torch.randn(*query.shape[:2], values.shape[2], dtype=query.dtype)
    upstream = (d_context, torch.randn_like(weights))
    return *upstream, query, keys, values, v, extra, lengths, weights, scale, True, False


def launches(call) -> int:
    before = STUB.stub_launches()
    call()
    return STUB.stub_launches() - before


def microseconds(call, calls=300) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls * 1e6


def dot(arguments, backward=False):
    """The arguments of the additive score without v and extra."""
    at = 2 * backward + 3
    return (*arguments[:at], *arguments[at + 2 :])


class Others(TorchDispatchMode):
    """Notes what torch would launch besides: here its operators compute."""

    NO_LAUNCH = {
        "new_empty",
        "detach",
        "view",
        "transpose",
        "select",
        "expand",
        "_unsafe_view",
        "empty",
    }

    def __enter__(self):
        self.found = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in self.NO_LAUNCH:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


# README.md: the shortest source of a single step that goes in two parts, by dtype and K = C.
SPLIT = {
    (torch.float32, 512): 256,
    (torch.bfloat16, 512): 512,
    (torch.float32, 128): 1024,
    (torch.bfloat16, 128): 2048,
}


@pytest.mark.parametrize("lengths", [None, torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("dtype,K", SPLIT)
@pytest.mark.parametrize("score", ["additive", "dot"])
def test_a_step_is_one_launch_and_a_long_source_two(score, dtype, K, lengths):
    """With nothing of torch's besides, whichever lengths and masks there are."""
    forward, long = attention.kernel(f"{score}_fwd"), SPLIT[dtype, K]
    for S, expected in ((40, 1), (long - 1, 1), (long, 2), (4000, 2)):
        for mask in (None, torch.ones(8, 1, S, dtype=torch.bool)):
            *given, kind, scale = step(8, S=S, K=K, C=K, dtype=dtype, mask=mask)
            given = (*given, None if lengths is None else kind.to(lengths), scale)
            given = dot(given) if score == "dot" else given
            for _ in range(2):
                with Others() as others:
                    assert launches(lambda a=given: forward(*a)) == expected, S
                assert not others.found


def test_many_rows_are_not_split():
    """Where they keep the multiprocessors at work, however long the source is."""
    forward = attention.kernel("additive_fwd")
    for B, expected in ((264, 2), (265, 1)):
        given = step(B, S=1200, K=64, C=1024)
        assert launches(lambda a=given: forward(*a)) == expected


@pytest.mark.parametrize("lengths", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("score", ["additive", "dot"])
def test_what_a_backward_pass_launches(score, dtype, lengths):
    """As README.md lists it: kernels of ours, and torch's operators."""
    backward = attention.kernel(f"{score}_bwd")
    for S, Q in ((40, 1), (40, 40), (4000, 1)):
        *given, kind, scale = step(8, Q, S=S, dtype=dtype)
        given = (*cotangents(*given, kind.to(lengths), scale)[:-1], True)
        given = dot(given, backward=True) if score == "dot" else given
        long = S > 1000
        for _ in range(2):
            with Others() as others:
                ours = launches(lambda a=given: backward(*a))
            assert ours == (1 if score == "dot" else 2) + long, (S, Q)
            if score == "dot":
                assert others.found == ["bmm"] * 3
            else:
                sums = ["sum"] * (2 if long or Q > 1 else 1)
                casts = ["_to_copy"] * (0 if dtype == torch.float32 else 2)
                assert others.found == ["bmm", *sums, *casts], (S, Q)


def recorded(call, monkeypatch):
    """What C is told of each launch of a call: addresses for tensors, nothing of hooks."""

    def plain(told):
        if isinstance(told, torch.Tensor):
            # A tensor of nothing and None are the same to the launcher in C: a null pointer.
            return told.data_ptr() or None
        if isinstance(told, (tuple, list)):
            return [plain(one) for one in told]
        return None if isinstance(told, OF_HOOKS) else told

    with monkeypatch.context() as patch:
        patch.setitem(globals(), "TOLD", [])
        call()
        return [plain(told) for told in TOLD]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("S", [40, 4000])
@pytest.mark.parametrize("masked", [False, True])
def test_a_remembered_launch_is_triton_s_own(dtype, S, masked, monkeypatch):
    mask = torch.ones(8, 1, S, dtype=torch.bool) if masked else None
    given = step(8, 1, S, 48, 36, dtype, mask)
    inputs = {t.data_ptr() for t in given if isinstance(t, torch.Tensor)}

    def comparable(told):
        """Buffers have new addresses each time; no size is as large as an address."""
        if isinstance(told, list):
            return [comparable(one) for one in told]
        buffer = isinstance(told, int) and told > 2**40 and told not in inputs
        return "buffer" if buffer else told

    _launch.forget()
    for stage, arguments in (("fwd", given), ("bwd", cotangents(*given))):
        run = attention.kernel(f"additive_{stage}")
        call = functools.partial(run, *arguments)
        first, second, third = (comparable(recorded(call, monkeypatch)) for _ in range(3))
        assert first == second == third and first


def test_amd_s_launcher_is_told_what_it_tells_itself():
    """Its function in C, by Triton's way and by ours."""
    told, stream, arguments = [], object(), (1, 2.5, None)
    run = object.__new__(HIPLauncher)
    sizes = {f"{kind}_scratch_{what}": 0 for kind in ("global", "profile") for what in OF_SCRATCH}
    run.__dict__.update(sizes, launch=lambda *one: told.append(one), launch_cooperative_grid=False)
    run.__dict__.update(warp_size=64, arg_annotations="annotations", kernel_signature=b"signature")
    compiled = types.SimpleNamespace(run=run, function=7, packed_metadata=(4, 1, 0))
    run(5, 1, 1, stream, 7, (4, 1, 0), None, None, None, *arguments)
    _launch._launcher(compiled, (5, 1, 1), arguments)(stream, arguments)
    assert len(told) == 2 and told[0] == told[1] and stream in told[0]


def test_only_triton_asks_whose_an_address_is():
    forward, arguments = attention.kernel("additive_fwd"), step(K=64)
    forward(*arguments)
    before = STUB.stub_asked()
    forward(*arguments)
    assert STUB.stub_asked() == before


@pytest.mark.parametrize("S", [40, 4000])
def test_a_remembered_launch_asks_the_driver_for_nothing_else(S):
    """No memory, no module, no wait: it may be captured in a graph."""
    given = step(8, S=S, K=64)
    for stage, arguments in (("fwd", given), ("bwd", cotangents(*given))):
        call = functools.partial(attention.kernel(f"additive_{stage}"), *arguments)
        call()
        before = STUB.stub_others()
        assert launches(call) and STUB.stub_others() == before


@pytest.mark.parametrize(
    "change",
    [
        lambda a: (a[0].bfloat16(), *(t.bfloat16() for t in a[1:4]), *a[4:]),
        lambda a: (a[0], a[1][:, :-1], a[2][:, :-1], *a[3:]),
        lambda a: (a[0], a[1].mT.contiguous().mT, *a[2:]),
        lambda a: (a[0].repeat(1, 3, 1), *a[1:]),
        lambda a: (*a[:4], a[1], *a[5:]),
        lambda a: (*a[:6], a[6].int(), a[7]),
        lambda a: (*a[:5], torch.ones(64, 1, 40, dtype=torch.bool), *a[6:]),
        lambda a: (torch.randn(64 * 512 + 1)[1:].view(64, 1, 512), *a[1:]),
    ],
    ids="dtype length strides queries extra lengths mask alignment".split(),
)
def test_another_kind_of_call_has_a_plan_of_its_own(change):
    arguments, forward = step(), attention.kernel("additive_fwd")
    forward(*arguments)
    known = set(_launch._plans)
    forward(*arguments)
    assert set(_launch._plans) == known
    forward(*change(arguments))
    assert len(_launch._plans) == len(known) + 1


def test_the_precision_switch_has_plans_of_its_own():
    arguments, forward = step(), attention.kernel("additive_fwd")
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            forward(*arguments)
            known = {key[1] for key in _launch._plans if key[0] == "additive_fwd"}
            assert precision in known
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_current_stream_is_asked_for_at_every_launch(monkeypatch):
    """So a launch inside a captured graph goes to the stream that is captured."""
    arguments, forward = step(), attention.kernel("additive_fwd")
    forward(*arguments)
    for stream in (0, 4711):
        monkeypatch.setitem(globals(), "STREAM", stream)
        (seen,) = recorded(lambda: forward(*arguments), monkeypatch)
        assert seen[3] == stream


def test_a_profiler_is_told_of_every_launch():
    arguments, forward, told = step(), attention.kernel("additive_fwd"), []
    forward(*arguments)
    hooks = triton.knobs.runtime.launch_enter_hook
    hook = told.append
    hooks.add(hook)
    try:
        forward(*arguments)
    finally:
        hooks.remove(hook)
    forward(*arguments)
    assert [metadata.get()["name"] for metadata in told] == ["additive_fwd_kernel"]


def test_plans_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(_launch, "MOST_PLANS", 3)
    _launch.forget()
    for S in range(16, 24):
        attention.kernel("additive_fwd")(*step(2, S=S, K=32, C=32))
        assert 1 <= len(_launch._plans) <= 3


def work_of(call):
    """What Python does in a call: its instructions, calls of its own functions and of C's."""
    found = collections.Counter()

    def listen(frame, event, argument):
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        found.update([event])
        return listen

    sys.settrace(listen)
    try:
        call()
    finally:
        sys.settrace(None)
    sys.setprofile(lambda frame, event, argument: found.update([f"profiled {event}"]))
    try:
        call()
    finally:
        sys.setprofile(None)
    return found["opcode"], found["profiled call"], found["profiled c_call"]


@pytest.mark.parametrize("score,stage", MOST_WORK)
def test_what_a_remembered_call_costs_the_host(score, stage):
    """Counted, as time depends on who else is there. Listeners count too."""
    given = step()
    arguments = given if stage == "fwd" else cotangents(*given)
    if score == "dot":
        arguments = dot(arguments, stage == "bwd")
    call = functools.partial(attention.kernel(f"{score}_{stage}"), *arguments)
    call()
    instructions, *calls = work_of(call)
    most, *most_calls = MOST_WORK[score, stage]
    # Another Python has other instructions.
    assert instructions <= most * (1.05 if sys.version_info[:2] == (3, 11) else 1.5), instructions
    assert all(map(operator.le, calls, most_calls)), calls


def test_what_is_counted_is_what_is_done():
    """A loop more in the path of every launch is seen."""
    call = functools.partial(attention.kernel("additive_fwd"), *step())
    call()
    found = work_of(call)
    assert found == work_of(call)
    more = work_of(lambda: (call(), [abs(-1) for _ in range(30)]))
    assert more[0] > 1.1 * found[0] and more[2] >= found[2] + 30


def costs(calls: int = 1000, rounds: int = 9) -> dict[str, float]:
    """What benchmarks/attention_tables.py prints: microseconds of a decoding step's forward call,
    the least of so many rounds of so many calls, all sides in turn."""
    _launch.forget()
    arguments, forward = step(), attention.kernel("additive_fwd")
    query, keys, values, v, *_ = arguments
    context, weights = results = forward(*arguments)
    (plan,) = _launch._plans.values()
    found = [cell.cell_contents for cell in plan.__closure__]
    (launcher,) = (one for one in found if isinstance(one, _launch.Launch))
    remembered, told = launcher._launch, []
    launcher._launch = lambda *one: told.append(one)
    forward(*arguments)
    launcher._launch = remembered
    buffers = (weights, weights, context, None, None)
    library = torch.library.Library("fastseq_costs", "FRAGMENT")
    schema = str(torch.ops.fastseq.additive_attention_fwd.default._schema)
    library.define("nothing" + schema[schema.index("(") :])
    library.impl("nothing", lambda *_: results, "CPU")
    nothing = torch.ops.fastseq_costs.nothing
    functional_op.additive_attention = lambda *_: results
    sides = {
        "through Triton alone": lambda: launcher._by_triton((*arguments[:7], *buffers), (1.0,)),
        'the kernel\'s entry, `attention.kernel("additive_fwd")`': lambda: forward(*arguments),
        "- buffers of the two outputs, by torch": lambda: (
            query.new_empty(64, 1, 512),
            query.new_empty(64, 1, 40),
        ),
        "- Triton's launcher in C": lambda: remembered(*told[0]),
        "torch's dispatcher, once": lambda: nothing(*arguments),
        # Without lengths, whose values would be looked at on a CPU alone.
        "`functional.additive_attention` around the operator": lambda: (
            functional.additive_attention(query[:, 0], keys, values, v)
        ),
    }
    sides["through Triton alone"]()
    times = [[microseconds(call, calls) for call in sides.values()] for _ in range(rounds)]
    return {name: min(found) for name, *found in zip(sides, *times, strict=True)}


def test_the_host_s_time_is_not_triton_s(monkeypatch):
    """A sixth of it when written; a loop of Python is no yardstick on a machine that others use.
    Nothing finer is kept by time; see above."""
    monkeypatch.setattr(functional_op, "additive_attention", functional_op.additive_attention)
    by_triton, entry, buffers, *_ = costs(calls=100, rounds=15).values()
    assert buffers < entry < by_triton / 4
