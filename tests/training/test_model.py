from __future__ import annotations

import pytest
import torch

from fastseq.training.model import build_model, resolve_device
from fastseq.training.settings import MODELS, Settings


def settings(**options) -> Settings:
    return Settings("a", "b", "c", "d", embedding=4, hidden=6, **options)


@pytest.mark.parametrize("name", MODELS)
def test_both_families_start_from_the_same_weights(name):
    models = []
    for reference in (True, False):
        torch.manual_seed(7)
        models.append(build_model(settings(model=name), 11, 13, reference))
    assert type(models[0]).__module__ == f"fastseq.reference.{name}"
    assert type(models[1]).__module__ == f"fastseq.models.{name}"
    weights = [model.state_dict() for model in models]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert weights[0]["encoder.embedding.weight"].shape == (11, 4)
    assert weights[0]["decoder.fc.weight"].shape == (13, {"attention": 12, "bahdanau": 22}[name])


@pytest.mark.parametrize("reference", [False, True])
def test_dropout_goes_where_the_settings_say(reference):
    given = settings(model="bahdanau", dropout=0.25, output_dropout=0.125)
    model = build_model(given, 11, 13, reference)
    found = {name: m.p for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert found == {
        "encoder.dropout": 0.25,
        "decoder.dropout": 0.25,
        "decoder.output_dropout": 0.125,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "magic"}, "a model among attention, bahdanau, got 'magic'"),
        ({"dropout": 0.5}, "no dropout with the model attention"),
        ({"output_dropout": 0.5}, "no dropout with the model attention"),
    ],
)
def test_models_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        build_model(settings(**options), 11, 13)


def test_the_published_sizes():
    published = Settings("a", "b", "c", "d", model="bahdanau", **MODELS["bahdanau"])
    with torch.device("meta"):
        model = build_model(published, 7853, 5893)
    assert sum(parameter.numel() for parameter in model.parameters()) == 20_518_405


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
