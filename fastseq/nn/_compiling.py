"""torch.compile takes fastseq's layers whole, without a switch.

Torch's compiler leaves every torch.nn.LSTM, GRU and RNN out of its graphs, subclasses among them:
torch's own unroll into thousands of operators. The switch that lets them in,
``torch._dynamo.config.allow_rnn``, lets torch's in as well. So it is on just while the compiler
meets one of fastseq's, each of which is a single operator a layer. Those on a GPU that torch runs,
or may run faster, are called between its graphs like torch's own, unless one graph is asked for.
"""

from __future__ import annotations

import functools
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from types import ModuleType

import torch

from fastseq import backends

__all__ = ["allow", "between_graphs", "in_graph"]

# Where the compiler decides, VariableBuilder.wrap_module.
_BUILDER = "torch._dynamo.variables.builder"


def in_graph(*about: object, **more: object) -> bool:
    """Whether the compiler, which is tracing, takes a layer of such a kind into its graph;
    arguments of :func:`fastseq.backends.belongs_in_graphs`."""
    global between_graphs
    translator = getattr(sys.modules.get("torch._dynamo.symbolic_convert"), _TRANSLATOR, None)
    try:
        tracing = translator.current_tx()
    except AttributeError:
        # Exported by other means, into one graph.
        return True
    if tracing.one_graph or getattr(tracing, "error_on_graph_break", False):
        return True
    if between_graphs is _forward:
        between_graphs = torch.compiler.disable(_forward)
    return backends.belongs_in_graphs(*about, **more)


_TRANSLATOR = "InstructionTranslator"
# All that torch.compiler.assume_constant_result does, which imports the compiler to do it.
in_graph._dynamo_marked_constant = True


def _forward(layer, *given):
    return layer.forward(*given)


between_graphs = _forward
"""A call that the compiler, by now imported, does not look into."""


def allow(layers: type) -> None:
    """Let the compiler take instances of ``layers``, now or, where it has not been imported yet
    (which takes seconds), as soon as it is."""
    if _BUILDER in sys.modules:
        _teach(sys.modules[_BUILDER], layers)
    else:
        sys.meta_path.insert(0, _AtImport(layers))


class _AtImport(MetaPathFinder):
    def __init__(self, layers: type) -> None:
        self.layers = layers

    def find_spec(self, fullname, path, target=None):
        if fullname != _BUILDER:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _teach(module, self.layers)

            spec.loader.exec_module = exec_module
        return spec


def _teach(builder: ModuleType, layers: type) -> None:
    wrap = getattr(builder.VariableBuilder, "wrap_module", None)
    if wrap is None or not hasattr(builder.config, "allow_rnn"):
        return

    @functools.wraps(wrap)
    def wrap_module(self, value):
        if not isinstance(value, layers):
            return wrap(self, value)
        with builder.config.patch(allow_rnn=True):
            return wrap(self, value)

    builder.VariableBuilder.wrap_module = wrap_module
