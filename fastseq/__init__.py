"""Fast recurrent encoder-decoder models for PyTorch.

``from fastseq import nn`` in place of ``from torch import nn`` is the whole change; see README.md.
"""

from fastseq import functional, nn
from fastseq.backends import Explanation, use_backend
from fastseq.explain import explain
from fastseq.version import __version__

__all__ = ["Explanation", "__version__", "explain", "functional", "nn", "use_backend"]
