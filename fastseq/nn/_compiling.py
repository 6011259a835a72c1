"""torch.compile takes fastseq's layers whole, without a switch.

Torch's compiler leaves every torch.nn.LSTM, GRU and RNN out of its graphs, subclasses among them:
torch's own unroll into thousands of operators. The switch that lets them in,
``torch._dynamo.config.allow_rnn``, lets torch's in as well. So it is on just while the compiler
meets one of fastseq's, each of which is a single operator a layer.
"""

from __future__ import annotations

import functools
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from types import ModuleType

__all__ = ["allow"]

# Where the compiler decides, VariableBuilder.wrap_module.
_BUILDER = "torch._dynamo.variables.builder"


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
