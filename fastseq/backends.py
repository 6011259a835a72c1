"""Which kernel runs a call, and why not another: one sentence, in explain() and in errors alike."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from fastseq import _native
from fastseq.kernels import float32_matmul_precision
from fastseq.ops import attention as _attention
from fastseq.ops import decoder_cuda, measured_cuda, recurrent_cuda
from fastseq.ops import recurrent as _recurrent
from fastseq.ops.recurrent import CELLS
from fastseq.reference.rnn import CELLS as _REFERENCE

__all__ = [
    "Explanation",
    "attention_obstacle",
    "decoder_obstacle",
    "float32_matmul_precision",
    "float32_parts",
    "recurrent_obstacle",
    "transform_obstacle",
    "use_backend",
]

BACKENDS = ("auto", "cpu", "cuda", "torch")
_forced: ContextVar[str] = ContextVar("fastseq_backend", default="auto")

_KERNEL_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
_FORCED_TORCH = "use_backend('torch') is in force"


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What runs a call.

    Attributes:
        op: the operation, such as "lstm".
        backend: "cpu", "cuda" or "triton" (fastseq's kernels) or "torch" (PyTorch's own code).
        reason: one sentence.
    """

    op: str
    backend: str
    reason: str

    def __str__(self) -> str:
        return f"fastseq.{self.op}: {self.backend}: {self.reason}"


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend of every call inside the block, in this thread or task.

    Functions compiled by torch.compile are not affected.

    Args:
        name: "auto" (a kernel where one serves, else PyTorch), "cpu" or "cuda" (fastseq's kernels
            there or an error), "torch" (PyTorch's own code).

    Raises:
        ValueError: another name.
        RuntimeError: at a call that "cpu" or "cuda" can't serve; the text is that of
            :func:`fastseq.explain`.
    """
    if name not in BACKENDS:
        raise ValueError(f"fastseq.use_backend: expected one of {BACKENDS}, got {name!r}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def recurrent_obstacle(cell: str, x: Tensor, params: Sequence[Tensor]) -> str | None:
    """Why no kernel can run a cell on x [..., I] with these weights; None where one can.

    Raises:
        RuntimeError: it can't, and use_backend("cpu") or ("cuda") is in force.
    """
    # A compiled graph is the same wherever it runs: no choice made around a call enters it.
    compiling = torch.compiler.is_compiling()
    forced = "auto" if compiling else _forced.get()
    if forced == "torch":
        return _FORCED_TORCH
    obstacle = _recurrent_obstacle(cell, x, params, compiling)
    return None if obstacle is None else refuse(cell, obstacle)


def eager_calls_allowed() -> bool:
    """Whether a call may go straight to the CPU's kernels: they are built for such calls, nothing
    is being compiled, and use_backend leaves it to them."""
    return (
        _recurrent.eager is not None
        and not torch.compiler.is_compiling()
        and _forced.get() in ("auto", "cpu")
    )


@functools.cache
def bfloat16_units() -> tuple[str, ...]:
    """The instructions by which this CPU multiplies bfloat16, the fastest first."""
    has = {"AMX": "_is_amx_tile_supported", "AVX-512 BF16": "_is_avx512_bf16_supported"}
    return tuple(name for name, asked in has.items() if getattr(torch.cpu, asked, bool)())


def torch_is_faster(
    cell: str,
    x: Tensor,
    one_step: bool = False,
    params: Sequence[Tensor] = (),
    options=None,
    hx: Tensor | Sequence[Tensor] | None = None,
) -> str | None:
    """Why a call both could run is left to torch's code; None where the kernel is to run it.

    Args:
        cell: of the call.
        x: the input.
        one_step: whether the call is a single step of a cell, x [B, I].
        params, options, hx: its weights, what else it takes (functional's Options), and its states,
            if known.
    """
    if torch.compiler.is_compiling() or _forced.get() in ("cpu", "cuda"):
        return None
    if x.is_cuda:
        # (A cell is one kernel of torch's own behind two products, as it would be here.)
        if one_step:
            return "torch's cell takes as many launches"
        if options is None:
            return None
        return _GpuCall.of(cell, x, params, options, hx).torchs_reason()
    if cell == "lstm" and not one_step and x.numel():
        lowered = x.dtype is torch.float32 and torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if lowered else x.dtype
        # oneDNN multiplies bfloat16 as it stands then; else it takes three times what the kernels
        # need in float32, conversions included. What it does not serve, torch runs step by step.
        if dtype is torch.bfloat16 and (units := bfloat16_units()) and _for_onednn(params, options):
            return f"torch's LSTM is faster in bfloat16 on a CPU with {units[0]}"
    return None


def _for_onednn(params, options) -> bool:
    """Whether torch hands an LSTM's call on a CPU to oneDNN."""
    if options is None:
        # A module's weights alone, which project h to fewer units than H or not at all.
        return not params or 4 * params[1].shape[1] == params[0].shape[0]
    even = _of_one_length(options.batch_sizes)
    return even and not _beyond(options) and not _projects("lstm", params, options)


def _of_one_length(batch_sizes: Tensor | None) -> bool:
    return batch_sizes is None or not len(batch_sizes) or bool(batch_sizes[0] == batch_sizes[-1])


def _projects(cell, params, options) -> bool:
    sides = options.num_layers * (2 if options.bidirectional else 1)
    return len(params) // sides > 2 + 2 * options.has_biases + len(_REFERENCE[cell].extras)


def _beyond(options) -> str:
    """What a call has that torch's layers do not take."""
    if options is None:
        return ""
    has = options.lengths is not None, options.resets is not None, any(options.zoneout)
    return recurrent_cuda.beyond(*has)


def gpu_dtype(t: Tensor) -> torch.dtype:
    """What a GPU's kernels compute a layer in that is given such a tensor, and give: under autocast
    its dtype, as torch has cuDNN do."""
    lowered = t.is_cuda and t.dtype is not torch.float64 and torch.is_autocast_enabled("cuda")
    return torch.get_autocast_dtype("cuda") if lowered else t.dtype


def belongs_in_graphs(
    index: int, dtype: torch.dtype, H: int, *, cell: str, layers: int, directions: int,
    P: int, train: bool,
) -> bool:  # fmt: skip
    """Whether torch.compile does well to take a layer on a GPU, of H units projected to P (0: to
    none), into its graph, whatever input it will have. It leaves torch's own out and calls them
    between graphs; taken in, they unroll. So does what no kernel runs, and what one was not always
    faster at than cuDNN."""
    torchs, ours = measured_cuda.dtypes(dtype)
    if _device_obstacle(index) or measured_cuda.unproved(index, cell, ours):
        return False
    name, mode = measured_cuda.device_name(index), "train" if train else "inf"
    able = recurrent_cuda.able(recurrent_cuda.limits(torch.device("cuda", index)))
    return all(
        measured_cuda.never_slower(
            name,
            measured_cuda.Kind(cell, ours, layers, directions, packed, P > 0, mode),
            torchs,
            H,
            able,
            P,
        )
        for packed in ((False,) if P else (False, True))
    )


class _GpuCall(NamedTuple):
    """A layer's call as a GPU's kernels and the table of measurements see it."""

    kind: measured_cuda.Kind
    size: measured_cuda.Size
    torchs_dtype: str
    device: torch.device

    @classmethod
    def of(cls, cell, x, params, options, hx) -> _GpuCall:
        sizes, layers = options.batch_sizes, options.num_layers
        if sizes is None:
            T, B = x.shape[:2][:: -1 if options.batch_first else 1]
        else:
            T, B = len(sizes), int(sizes[0]) if len(sizes) else 0
        directions = 2 if options.bidirectional else 1
        projected = _projects(cell, params, options)
        states = () if hx is None else (hx,) if isinstance(hx, Tensor) else hx
        needed = torch._C._any_requires_grad(x, *states, *params)
        mode = "train" if torch.is_grad_enabled() and needed else "inf"
        torchs, ours = measured_cuda.dtypes(gpu_dtype(x))
        kind = measured_cuda.Kind(
            cell, ours, layers, directions, sizes is not None, projected, mode, _beyond(options)
        )
        # (w_hh [G*H, P].)
        H, P = params[0].shape[0] // CELLS[cell].gates, params[1].shape[1] if projected else 0
        size = measured_cuda.Size(T, B, x.shape[-1], H, P)
        return cls(kind, size, torchs, x.device)

    def torchs_reason(self) -> str | None:
        """Why it is left to torch's code; None where the kernels run it."""
        name = measured_cuda.device_name(self.device.index)
        able = recurrent_cuda.able(recurrent_cuda.limits(self.device))
        return measured_cuda.torchs_reason(name, self.kind, self.torchs_dtype, self.size, able)


_WAYS = {
    "step": "a product and a launch a step",
    "whole": "one launch a layer, the weights in a block's shared memory",
    "grid": "one launch a layer, the weights in blocks that meet at each step, "
    "or `{otherwise}` should the device refuse to run all of them at once",
}


def _cuda_ways(call: _GpuCall, dtype: torch.dtype, zoneout: bool) -> str:
    """Which of the ways of csrc/cuda run a call, in words."""
    cell = call.kind.cell
    kind = CELLS[f"zoneout_{cell}" if zoneout else cell]
    among = call.kind.projected and recurrent_cuda.projects_among_steps(kind)
    given = kind, dtype, call.size, call.kind.directions, call.device
    passes = recurrent_cuda.ways(*given, call.kind._replace(layers=1), among)
    forward, backward = (
        f"`{way}`, {_WAYS[way].format(otherwise=otherwise)}"
        for way, otherwise in zip(passes, recurrent_cuda.without_a_grid(*given), strict=True)
    )
    return forward if forward == backward else f"{forward}; backward {backward}"


def refuse(cell: str, obstacle: str) -> str:
    """The obstacle, where another backend may run the call.

    Raises:
        RuntimeError: use_backend("cpu") or ("cuda") is in force.
    """
    if not torch.compiler.is_compiling() and _forced.get() in ("cpu", "cuda"):
        raise RuntimeError(
            f"fastseq.{cell}: expected a call the {_forced.get()} backend can run, got: {obstacle}"
        )
    return obstacle


def transform_obstacle() -> str | None:
    """Why a call inside a transform is for the reference, whose operators have every rule: torch's
    recurrent operators have none for vmap and, in float32, none forward-mode. None outside."""
    if torch.compiler.is_compiling():
        return None
    if torch.autograd.forward_ad._current_level >= 0:
        return "no forward-mode derivative yet"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "no rule for torch.func transforms yet"
    return None


def _recurrent_obstacle(cell, x, params, compiling) -> str | None:
    if cell not in CELLS:
        return f"no kernel for {cell} yet" if _native.loaded() else _native.why_not_loaded()
    forced = "auto" if compiling else _forced.get()
    if not (x.is_cpu or x.is_cuda) or forced == ("cuda" if x.is_cpu else "cpu"):
        return f"no kernel for {x.device.type} tensors" + ("" if forced == "cuda" else " yet")
    first = params[0]
    # The op itself refuses weights that differ among themselves.
    if first.device != x.device:
        return "input and weights differ in device"
    if x.is_cuda:
        obstacle = _cuda_obstacle(cell, x, params)
        if obstacle is None and forced != "cuda" and x.dtype in _KERNEL_DTYPES:
            obstacle = _unproved(cell, x)
        if obstacle is not None:
            return obstacle
    if x.dtype not in _KERNEL_DTYPES:
        return f"no kernel for {x.dtype}"
    if first.dtype is not x.dtype and not _may_differ(first, x):
        return "input and weights differ in dtype"
    return None if compiling else _surroundings_obstacle(x)


def _may_differ(first: Tensor, x: Tensor) -> bool:
    """Whether autocast makes one dtype of theirs."""
    exact = x.is_cuda and torch.float64 in (first.dtype, x.dtype)
    return torch.is_autocast_enabled(x.device.type) and not exact


def _unproved(cell: str, x: Tensor, part: str = "recurrent") -> str | None:
    """No kernel is anybody's default before it has kept its budgets on the device that it is to run
    on: csrc/cuda/README.md."""
    said = measured_cuda.unproved(x.device.index, cell, measured_cuda.dtypes(gpu_dtype(x))[1], part)
    return None if said is None else f"the CUDA kernel is {said}; use_backend('cuda') runs it"


# As csrc/cpu/decoder/decoder.h has it.
MOST_DECODER_LAYERS = 8


def decoder_obstacle(
    values: Tensor,
    params: Sequence[Tensor],
    kind: measured_cuda.DecoderKind,
    T: int | None = None,
    K: int | None = None,
) -> str | None:
    """Why no kernel runs a decoder with attention on such values [B, S, C], its layers' weights
    ``params``; None where one does. Of ``kind``, dtype and mode follow from the call; T steps and
    keys K wide, where they are known.

    Raises:
        RuntimeError: it can't, and use_backend("cpu") or ("cuda") is in force.
    """
    obstacle = recurrent_obstacle(kind.cell, values, params)
    if obstacle is None and (deeper := _too_deep(values, kind)):
        obstacle = refuse(kind.cell, deeper)
    return obstacle or _slower_decoder(values, params, kind, T, K)


def _too_deep(values: Tensor, kind: measured_cuda.DecoderKind) -> str | None:
    if values.is_cuda or kind.layers <= MOST_DECODER_LAYERS:
        return None
    return f"the kernel takes at most {MOST_DECODER_LAYERS} layers, got {kind.layers}"


def _slower_decoder(
    values: Tensor,
    params: Sequence[Tensor],
    kind: measured_cuda.DecoderKind,
    T: int | None,
    K: int | None,
) -> str | None:
    compiling = torch.compiler.is_compiling()
    if not values.is_cuda or not compiling and _forced.get() == "cuda":
        return None
    obstacle = _unproved(kind.cell, values, "decoder")
    if obstacle is not None:
        return obstacle
    _, dtype = measured_cuda.dtypes(gpu_dtype(values))
    kind = kind._replace(dtype=dtype, mode="train" if torch.is_grad_enabled() else "inf")
    # (w_hh [G*H, H], or the hidden state, where that is all there is.)
    sizes = (params[min(1, len(params) - 1)].shape[-1],)
    # (Who asks without an input has a weight in its place.)
    if not compiling and values.dim() == 3:
        B, S, C = values.shape
        sizes += (B, S, T, K, C)
    reason = measured_cuda.decoders_reason(values.device.index, tuple(kind), *sizes)
    if reason is None and not compiling:
        reason = _attention.plain_because(values)
        reason = reason and f"the kernels' loop was measured with Triton's attention: {reason}"
    return reason


def _surroundings_obstacle(x: Tensor) -> str | None:
    """What is going on around the call, or with the tensor, that only torch's own code follows."""
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace records torch's own operators"
    transform = transform_obstacle()
    if transform is not None:
        return transform
    # Tensor subclasses and modes that only look, or make fakes, serve registered ops too.
    if x.layout is not torch.strided:
        return "not a dense tensor"
    return None


def _device_obstacle(index: int) -> str | None:
    if _native.cuda_obstacle() is not None:
        return f"no CUDA kernel: {_native.cuda_obstacle()}"
    if torch.cuda.get_device_capability(index) < (8, 0):
        return "the CUDA kernels need compute capability 8.0"
    lowered = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    if lowered and lowered is not torch.float16:
        # torch casts cuDNN's layers to float16 whatever the dtype is that was asked for.
        return f"autocast to {lowered} on a GPU is torch's"
    return None


def _cuda_obstacle(cell, x, params) -> str | None:
    obstacle = _device_obstacle(x.device.index)
    if obstacle is not None:
        return obstacle
    H = params[0].shape[0] // 4
    if cell == "layer_norm_lstm" and (
        recurrent_cuda.row_bytes(H, x.dtype) > recurrent_cuda.limits(x.device)[1]
    ):
        return f"no block of the GPU's has the memory to normalise rows of {H} units"
    return None


def attention_obstacle(op: str, query: Tensor, *rest: Tensor) -> str | None:
    """Why the operator cannot run an attention function, and the reference has to; else None.

    Args:
        op: the function, such as "additive_attention".
        query, rest: its query, keys and values.

    Raises:
        RuntimeError: no kernel can, and use_backend("cpu") or ("cuda") is in force.
    """
    if torch.compiler.is_compiling():
        return None
    forced = _forced.get()
    if forced == "torch":
        return _FORCED_TORCH
    obstacle = _attention_obstacle(query)
    if obstacle is None and forced != "auto":
        # Unless one insists, the operator then runs all the same, in PyTorch that spares memory.
        obstacle = _attention.plain_because(query, *rest)
    return None if obstacle is None else refuse(op, obstacle)


def _attention_obstacle(query: Tensor) -> str | None:
    kind, forced = query.device.type, _forced.get()
    if (kind, forced) in (("cpu", "cuda"), ("cuda", "cpu")):
        return f"no {forced} kernel for {kind} tensors"
    if kind not in ("cpu", "cuda", "meta"):
        return f"no kernel for {kind} tensors yet"
    return _surroundings_obstacle(query)


def attention_explanation(op: str, query: Tensor, *rest: Tensor) -> Explanation:
    """What :func:`attention_obstacle` finds, and what the operator then runs, in words.

    Args:
        op: the function, such as "additive_attention".
        query, rest: its query, keys and values, or as many of them as are known.
    """
    obstacle = _FORCED_TORCH if _forced.get() == "torch" else _attention_obstacle(query)
    obstacle = obstacle or _attention.plain_because(query, *rest)
    if obstacle is not None:
        return Explanation(op, "torch", obstacle)
    if query.is_cuda:
        return Explanation(op, "triton", "the Triton kernel")
    return Explanation(op, "cpu", _kernel_in_use())


def autocast_dtype(cell: str, x: Tensor, batch_sizes: Tensor | None) -> torch.dtype:
    """What torch's own layer returns under autocast on the CPU, given x. (Of an LSTM, oneDNN serves
    what has rows of one length.)"""
    lowered = cell.startswith("rnn") or ("lstm" in cell and _of_one_length(batch_sizes))
    return torch.get_autocast_dtype("cpu") if lowered else x.dtype


def recurrent_explanation(
    cell: str,
    x: Tensor,
    params: Sequence[Tensor],
    one_step: bool = False,
    plain: bool = True,
    options=None,
    hx: Tensor | Sequence[Tensor] | None = None,
) -> Explanation:
    """What :func:`recurrent_obstacle` and :func:`torch_is_faster` find, in words; ``options`` where
    they are known, else whether the call is ``plain``: without lengths, resets or zoneout."""
    obstacle = _FORCED_TORCH if _forced.get() == "torch" else None
    obstacle = obstacle or _recurrent_obstacle(cell, x, params, False)
    if plain or options is not None:
        obstacle = obstacle or torch_is_faster(cell, x, one_step, params, options, hx)
    if obstacle is not None:
        return Explanation(cell, "torch", obstacle)
    if x.is_cuda:
        said = "the CUDA kernels" + (" (use_backend('cuda'))" if _forced.get() == "cuda" else "")
        if options is not None:
            call = _GpuCall.of(cell, x, params, options, hx)
            said += f": {_cuda_ways(call, gpu_dtype(x), any(options.zoneout))}"
        elif plain and _forced.get() != "cuda" and not _REFERENCE[cell].extras:
            said += " for calls of a kind and size at which they were measured faster than torch's"
        return Explanation(cell, "cuda", said)
    wide = x.dtype is torch.float64 or one_step
    few_units = len(params) > 0 and params[0].shape[0] < 16 * CELLS[cell].gates
    said = "" if wide or few_units else _precision_in_use()
    return Explanation(cell, "cpu", _kernel_in_use() + said)


def _precision_in_use() -> str:
    """What a layer's float32 products are under torch's switches, where these permit less."""
    parts = float32_parts()
    if not parts:
        return ""
    if _recurrent.eager is None:
        return f"; all in float32: what reads the switch of precision, {_native.why_no_eager}"
    if _native.tiles() == "off":
        return f"; all in float32: {_native.tiles_reason()}"
    unit = "AMX" if _native.tiles() == "amx" else "AMX, emulated"
    made = "in bfloat16" if parts == 1 else "by three of bfloat16"
    return f"; products of eight rows and more {made} ({unit})"


def float32_parts() -> int:
    """Of how many bfloat16 the user lets a float32 factor of a recurrent layer's products on a CPU
    be the sum: 1 ("medium", or "bf16"), 2 ("high", or "tf32"), or 0: it stays float32. (The kernels
    ask for themselves, in csrc/ops/eager.)"""
    switch = torch._C._get_fp32_precision_getter
    said = switch("mkldnn", "rnn")
    return {"bf16": 1, "tf32": 2}.get(switch("mkldnn", "matmul") if said == "none" else said, 0)


def decoder_explanation(
    values: Tensor,
    params: Sequence[Tensor],
    kind: measured_cuda.DecoderKind,
    by_steps: bool = False,
    T: int | None = None,
    K: int | None = None,
) -> Explanation:
    """What :func:`decoder_obstacle` finds, in words; ``by_steps``: of one of the location score."""
    op = "attention_decoder"
    if by_steps:
        reason = "the location score needs each step's weights for the next: step by step"
        return Explanation(op, "torch", reason)
    obstacle = _FORCED_TORCH if _forced.get() == "torch" else None
    obstacle = obstacle or _recurrent_obstacle(kind.cell, values, params, False)
    obstacle = obstacle or _too_deep(values, kind) or _slower_decoder(values, params, kind, T, K)
    if obstacle is not None:
        return Explanation(op, "torch", f"{obstacle}; a step at a time")
    if not values.is_cuda:
        return Explanation(op, "cpu", _kernel_in_use())
    plain = _attention.plain_because(values)
    said = "Triton kernels" if plain is None else f"plain PyTorch attention ({plain})"
    most = decoder_cuda.GRAPHS["forward"].most
    said = f"a loop of CUDA kernels and {said}, one CUDA graph from the second call of a shape on"
    said += f", of {most} shapes at a time"
    refused = [graph.refused for graph in decoder_cuda.GRAPHS.values() if graph.refused]
    if refused:
        said += f"; the last capture failed: {refused[0]}"
    return Explanation(op, "cuda", said)


def _kernel_in_use() -> str:
    return f"the {_native.isa()} kernel ({_native.isa_reason()})"
