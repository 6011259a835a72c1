"""Fast recurrent encoder-decoder models for PyTorch.

``from fastseq import nn`` in place of ``from torch import nn`` is the whole change; see README.md.
"""

from __future__ import annotations

import importlib

from fastseq.version import __version__

# Imported when first asked for: the command line's help should not wait for torch.
_HOMES = {
    "Explanation": "fastseq.backends",
    "explain": "fastseq.explanation",
    "functional": None,
    "nn": None,
    "patched": "fastseq.replace",
    "replace_modules": "fastseq.replace",
    "restore_modules": "fastseq.replace",
    "use_backend": "fastseq.backends",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'fastseq' has no attribute {name!r}")
    home = _HOMES[name]
    if home is None:
        return importlib.import_module(f"fastseq.{name}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
