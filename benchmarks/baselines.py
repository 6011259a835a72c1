"""What fastseq is measured against besides torch's eager modules, each built from one of those.

A baseline is a function from that module and what is measured to something called with x [T, B, I];
it returns None where it has no such layer, and raises Untimed where it has, and does not run it.
Baselines run after the pair of fastseq and torch, not between them: a thread
pool that spins while it waits, as ONNX Runtime's does, takes the cores from whoever comes next.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.shapes import Measurement

__all__ = ["BASELINES", "Baseline", "Missing", "Refused", "Untimed", "compiled", "onnxruntime"]

Baseline = Callable[[torch.nn.Module, Measurement], Callable[..., object] | None]

# Order of the gates in ONNX, as places in torch's, by operator.
_ONNX_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}


class Untimed(RuntimeError):
    """The baseline does not run this module; the text says why, ``word`` in short."""

    word: str


class Refused(Untimed):
    """It was asked, and would not."""

    word = "refused"


class Missing(Untimed):
    """It is not installed."""

    word = "missing"


def onnxruntime(module: torch.nn.Module, m: Measurement) -> Callable[[Tensor], object] | None:
    """ONNX Runtime's LSTM or GRU operator, on as many threads as torch; inference only.

    Its arithmetic is float32, its gates are ordered i, o, f, g and z, r, n, and the two biases lie
    end to end.
    """
    kind = type(module).__name__
    if (m.group, m.variant, m.mode) != ("layers", "", "inf") or kind not in _ONNX_GATES:
        return None
    try:
        import onnx
        import onnxruntime as ort
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise Missing(f"{error}; pip install -r benchmarks/requirements.txt") from error

    def reordered(weight: Tensor) -> Tensor:
        gates = weight.detach().chunk(len(_ONNX_GATES[kind]))
        return torch.cat([gates[place] for place in _ONNX_GATES[kind]])

    tensors = {
        "W": reordered(module.weight_ih_l0)[None],
        "R": reordered(module.weight_hh_l0)[None],
        "B": torch.cat((reordered(module.bias_ih_l0), reordered(module.bias_hh_l0)))[None],
    }
    # torch resets after the product with weight_hh.
    own = {"linear_before_reset": 1} if kind == "GRU" else {}
    node = helper.make_node(kind, ["x", *tensors], ["y"], hidden_size=module.hidden_size, **own)
    graph = helper.make_graph(
        [node],
        kind,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", "B", module.input_size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", 1, "B", module.hidden_size])],
        [numpy_helper.from_array(t.contiguous().numpy(), name) for name, t in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    # The oldest file format that holds opset 17: older runtimes read it too.
    model.ir_version = 8
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda x: (torch.from_numpy(session.run(None, {"x": x.numpy()})[0][:, 0]),)


def compiled(module: torch.nn.Module, m: Measurement) -> Callable[..., object]:
    """The module through torch.compile, in one graph; its first call compiles, for seconds.

    The caller makes that call outside any timing; it raises Refused where torch's compiler says
    that it cannot trace the module, and what it likes where the compiler fails. It traces no layer
    unless ``allow_rnn`` is set, as it is here for measurements to be ``compiled``. (Not in one
    graph it would leave the layer to torch, and be the baseline.)
    """
    from torch._dynamo import config
    from torch._dynamo.exc import Unsupported

    torch.compiler.reset()
    run, traced = torch.compile(module, fullgraph=True), False

    def call(*arguments: object) -> object:
        nonlocal traced
        if traced:
            return run(*arguments)
        try:
            with config.patch(allow_rnn=m.compiled):
                found = run(*arguments)
        except Unsupported as error:
            left = "" if m.compiled else "; unrolled only as shapes.COMPILED says: it takes minutes"
            raise Refused(str(error).partition("\n")[0] + left) from error
        traced = True
        return found

    call.parameters = module.parameters
    return call


BASELINES: dict[str, Baseline] = {"onnxruntime": onnxruntime, "compile": compiled}
