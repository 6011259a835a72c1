"""A GPU that isn't there, for what is chosen without computing anything."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastseq import _native
from fastseq.ops import measured_cuda, recurrent_cuda
from tests.cuda.table import H200


@pytest.fixture
def a_gpu(monkeypatch):
    """Tensors on a device that isn't there, of an H200's size; nothing is computed."""
    monkeypatch.setattr(_native, "cuda_obstacle", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(measured_cuda, "device_name", lambda index: "a GPU")
    monkeypatch.setattr(recurrent_cuda, "limits", lambda device: H200)
    for name in ("uniform_", "kaiming_uniform_"):
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *bounds, **more: tensor)
    with FakeTensorMode():
        yield


@pytest.fixture
def exact():
    """cuDNN's products are float32, as ours are by default."""
    switch = torch.backends.cudnn.rnn
    before, switch.fp32_precision = switch.fp32_precision, "ieee"
    yield
    switch.fp32_precision = before
