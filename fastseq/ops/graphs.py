"""A function of tensors on a GPU as one CUDA graph for each kind of call.

A loop of small launches costs what its launches cost; captured, it is one. A graph reads and writes
the memory it was captured with, so what it is given is copied in and what it gives is copied
out.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import Tensor

from fastseq.kernels import float32_matmul_precision

__all__ = ["Replayed", "capture"]


def capture(function: Callable, inputs: Sequence) -> tuple[Callable[[], None], list[Tensor]]:
    """A CUDA graph of ``function(*inputs)``: what replays it, and where its results lie then.

    It runs once before: what is compiled or chosen may depend on how the inputs lie in memory.
    """
    function(*inputs)
    graph = torch.cuda.CUDAGraph()
    stream = _capture_stream(torch.cuda.current_device())
    # The outer stream is there to come back to: a capture that fails leaves its own in place.
    with (
        _one_at_a_time,
        _workspaces_of_its_own(),
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
    ):
        outputs = function(*inputs)
    return graph.replay, outputs


# Backward passes are captured by threads of torch's own.
_one_at_a_time = threading.Lock()


@contextlib.contextmanager
def _workspaces_of_its_own() -> Iterator[None]:
    """cuBLAS's scratch memory is the stream's, allocated at its first product there. All captures
    here are on one stream: left there, it would be that of the graphs captured before too, and two
    of them replayed at once would write into it. What is allocated inside is the graph's alone.

    (torch does so around the graphs that its compiler captures.)
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """torch's own stream for captures belongs to whichever device was captured on first."""
    return torch.cuda.Stream(device)


class _Graph:
    """A captured call, and the memory that it reads."""

    def __init__(self, replay, inputs, outputs):
        self.replay, self.inputs, self.outputs = replay, inputs, outputs
        self.lock = threading.Lock()
        self.used = 0  # the call that it served last

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        # Two threads on one stream must not mix what they copy.
        with self.lock:
            for held, given in zip(self.inputs, tensors, strict=True):
                held.copy_(given, non_blocking=True)
            self.replay()
            return [t.clone() for t in self.outputs]


class Replayed:
    """Calls a function, from the second call of a kind on as a captured graph where there is room.

    Of a kind are calls with tensors of the same shapes and dtypes, the same other arguments, one
    stream and the same switches of precision. The first runs the function as it is. The second
    captures it, which runs it twice and waits for the device; no later one waits. Once there are
    ``most`` graphs, or a capture has failed, a kind is captured only where neither another was nor
    the graph that would give way was used in the last ``16 * most`` calls, and the function runs as
    it is meanwhile: of shapes that vary without end at most one call in ``16 * most`` captures.
    Where capturing fails, the function runs as it is from then on, for that kind of call. Inside
    somebody else's capture it runs as it is too, and becomes part of theirs.

    Args:
        function: of tensors, lists of tensors, and hashable values; returns a list of tensors. What
            it does depends on nothing else, and on no value that only the device knows.
        most: graphs that are kept. Each keeps its inputs, results and intermediate values in
            memory.
        capture: stands in for :func:`capture` in tests.

    Attributes:
        refused: why the last capture that failed did; None where none has.
        enabled: whether there are graphs at all; without, the function runs as it is.
    """

    def __init__(self, function: Callable, most: int = 8, capture: Callable = capture) -> None:
        self.function, self.most, self.capture = function, most, capture
        self.refused: str | None = None
        self.enabled = True
        self._calls = self._tried = 0  # the last call, and the last one that captured
        # By kind: how often it was met, as far as that counts, or its graph.
        self._kinds: OrderedDict[Hashable, _Graph | int] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, *arguments) -> list[Tensor]:
        if not self.enabled or _inside_a_capture(arguments):
            return self.function(*arguments)
        tensors, kind = _described(arguments)
        with self._lock:
            self._calls += 1
            found = self._kinds.pop(kind, _NEW)
            if found == _MET and self._has_room():
                found, self._tried = self._captured(arguments), self._calls
            if isinstance(found, _Graph):
                found.used = self._calls
            self._kinds[kind] = _MET if found == _NEW else found
            self._drop_oldest()
        return found(tensors) if isinstance(found, _Graph) else self.function(*arguments)

    def __len__(self) -> int:
        return sum(isinstance(entry, _Graph) for entry in self._kinds.values())

    def clear(self) -> None:
        """Let go of all graphs and their memory."""
        with self._lock:
            self._kinds.clear()
            self.refused = None

    def _captured(self, arguments) -> _Graph | int:
        copies = [_copied(argument) for argument in arguments]
        inputs, _ = _described(copies)
        try:
            replay, outputs = self.capture(self.function, copies)
        except RuntimeError as error:
            self.refused = str(error).splitlines()[0]
            return _REFUSED
        return _Graph(replay, inputs, outputs)

    def _has_room(self) -> bool:
        """Whether to capture now."""
        if len(self) < self.most and self.refused is None:
            return True
        graphs = (entry for entry in self._kinds.values() if isinstance(entry, _Graph))
        last = max(self._tried, next(graphs).used if len(self) >= self.most else 0)
        return self._calls - last > _IDLE * self.most

    def _drop_oldest(self) -> None:
        """Keep the latest: ``most`` graphs, and eight times as many kinds without one."""
        graphs, others = len(self), len(self._kinds) - len(self)
        for kind, entry in list(self._kinds.items()):
            is_graph = isinstance(entry, _Graph)
            if graphs > self.most if is_graph else others > 8 * self.most:
                del self._kinds[kind]
                graphs, others = graphs - is_graph, others - (not is_graph)


_NEW, _MET, _REFUSED = range(3)
_IDLE = 16


def _inside_a_capture(arguments) -> bool:
    on_gpu = any(isinstance(a, Tensor) and a.is_cuda for a in arguments)
    return on_gpu and torch.cuda.is_current_stream_capturing()


def _described(arguments) -> tuple[list[Tensor], Hashable]:
    """All tensors, and the kind of the call."""
    tensors, kind = [], []
    for argument in arguments:
        several = argument if isinstance(argument, (list, tuple)) else (argument,)
        kind.append(len(several))
        for each in several:
            if isinstance(each, Tensor):
                tensors.append(each)
                each = (each.shape, each.dtype, each.device)
            kind.append(each)
    stream = 0
    device = next((t.device for t in tensors if t.is_cuda), None)
    if device is not None:
        stream = torch.cuda.current_stream(device).cuda_stream
    matmul = torch.backends.cuda.matmul
    switches = (
        float32_matmul_precision(),
        matmul.allow_fp16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
    )
    return tensors, (*kind, stream, *switches)


def _copied(argument):
    if isinstance(argument, (list, tuple)):
        return [_copied(each) for each in argument]
    if isinstance(argument, Tensor):
        return argument.clone(memory_format=torch.contiguous_format)
    return argument
