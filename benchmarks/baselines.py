"""What fastseq is measured against besides torch.nn.LSTM itself, each built from one of those.

A baseline is a function from that module and a mode to something called with x [T, B, I]; it
returns None where it is not installed or cannot run the mode. Baselines run after the pair of
fastseq and torch, not between them: a thread pool that spins while it waits, as ONNX Runtime's
does, takes the cores from whoever comes next.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["OTHERS", "Baseline"]

Baseline = Callable[[torch.nn.LSTM, str], Callable[[Tensor], object] | None]


def onnxruntime(module: torch.nn.LSTM, mode: str) -> Callable[[Tensor], object] | None:
    """ONNX Runtime's LSTM operator, on as many threads as torch; inference only.

    Its arithmetic is float32, its gates are ordered i, o, f, g, and the two biases lie end to end.
    """
    if mode != "inf" or module.num_layers != 1 or module.bidirectional:
        return None
    try:
        import onnx
        import onnxruntime as ort
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        return None

    def reordered(weight: Tensor) -> Tensor:
        i, f, g, o = weight.detach().chunk(4)
        return torch.cat((i, o, f, g))

    tensors = {
        "W": reordered(module.weight_ih_l0)[None],
        "R": reordered(module.weight_hh_l0)[None],
        "B": torch.cat((reordered(module.bias_ih_l0), reordered(module.bias_hh_l0)))[None],
    }
    node = helper.make_node("LSTM", ["x", *tensors], ["y"], hidden_size=module.hidden_size)
    graph = helper.make_graph(
        [node],
        "lstm",
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
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0][:, 0])


OTHERS: dict[str, Baseline] = {"onnxruntime": onnxruntime}
