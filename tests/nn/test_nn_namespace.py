"""`from fastseq import nn` in place of `from torch import nn`."""

from __future__ import annotations

import importlib

import pytest
import torch

from fastseq import nn
from fastseq.testing import assert_close_to_reference

OURS = {"GRU", "GRUCell", "LSTM", "LSTMCell", "RNN", "RNNCell"}
PUBLIC = [name for name in dir(torch.nn) if not name.startswith("_")]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there(name):
    ours, theirs = getattr(nn, name), getattr(torch.nn, name)
    assert (ours is theirs) == (name not in OURS)


def test_ours_subclass_torchs():
    for name in OURS:
        ours, theirs = getattr(nn, name), getattr(torch.nn, name)
        assert issubclass(ours, theirs) and ours.__name__ == name
        assert getattr(importlib.import_module(ours.__module__), name) is ours
        assert ours.__module__.startswith("fastseq.nn")


def test_star_import_gives_ours():
    namespace: dict[str, object] = {}
    exec("from fastseq.nn import *", namespace)
    assert namespace["LSTM"] is nn.LSTM and namespace["Linear"] is torch.nn.Linear


def test_unknown_names_fail_as_usual():
    with pytest.raises(AttributeError, match="Lstm"):
        nn.Lstm  # noqa: B018
    with pytest.raises(ImportError):
        exec("from fastseq.nn import Lstm")


def test_torch_is_left_as_it_was():
    assert torch.nn.LSTM.__module__ == "torch.nn.modules.rnn"
    assert nn.LSTM is not torch.nn.LSTM


def test_a_program_written_for_torch_runs_with_one_import_changed():
    program = """
from torch import nn

class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.rnn = nn.LSTM(5, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(12, 3), nn.LogSoftmax(-1))
        for name, p in self.rnn.named_parameters():
            nn.init.orthogonal_(p) if "weight" in name else nn.init.zeros_(p)

    def forward(self, tokens, lengths):
        x = nn.functional.relu(self.embedding(tokens))
        x = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        y, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(x)[0], batch_first=True)
        return self.head(y)
"""
    changed = program.replace("from torch import nn", "from fastseq import nn")
    results = []
    for source, dtype in (
        (changed, torch.float32),
        (program, torch.float64),
        (program, torch.float32),
    ):
        torch.manual_seed(0)
        namespace: dict[str, type] = {"__name__": "program"}
        exec(source, namespace)
        model = namespace["Tagger"]().eval().to(dtype)
        tokens = torch.arange(12).view(3, 4) % 7
        results.append(model(tokens, torch.tensor([4, 3, 1])))
    assert_close_to_reference(*results)
