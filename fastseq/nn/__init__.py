"""Drop-in replacement for :mod:`torch.nn`: the accelerated modules, and all else unchanged."""

from torch.nn import *  # noqa: F403
