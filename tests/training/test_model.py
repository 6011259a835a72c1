from __future__ import annotations

import pytest
import torch

from fastseq.models import attention as fast
from fastseq.reference import attention as plain
from fastseq.training.model import build_model, resolve_device


def test_both_families_start_from_the_same_weights():
    models = []
    for reference in (True, False):
        torch.manual_seed(7)
        models.append(build_model(11, 13, 4, 6, reference))
    assert type(models[0]) is plain.Seq2Seq
    assert type(models[1]) is fast.Seq2Seq
    weights = [model.state_dict() for model in models]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert weights[0]["encoder.embedding.weight"].shape == (11, 4)
    assert weights[0]["decoder.fc.weight"].shape == (13, 12)


def test_auto_is_the_gpu_where_there_is_one(monkeypatch):
    for available, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert resolve_device("auto").type == kind


def test_devices_that_do_not_exist(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(RuntimeError, match="got 0 GPUs seen.*use --device cpu"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(RuntimeError, match="expected device cuda:2 to exist, got 2 GPUs"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("name", ["", "tpu", "cuda:", "cuda:x", "cuda:-1", "cpu:a", "meta"])
def test_names_that_are_no_devices(name):
    with pytest.raises((ValueError, RuntimeError), match="fastseq.training: expected a device"):
        resolve_device(name)
