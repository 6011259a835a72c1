"""`with fastseq.patched():` programs that construct torch's modules get fastseq's."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.nn import LSTM  # as a program does that cannot be edited

import fastseq
from fastseq import nn

NAMES = ["GRU", "GRUCell", "LSTM", "LSTMCell", "RNN", "RNNCell"]


class Own(LSTM):
    pass


def constructors():
    return [getattr(torch.nn, name).__init__ for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_constructed_is_ours(name):
    theirs, ours, before = getattr(torch.nn, name), getattr(nn, name), constructors()
    torch.manual_seed(1)
    expected = theirs(4, 6, bias=False)
    with fastseq.patched():
        assert getattr(torch.nn, name) is theirs
        torch.manual_seed(1)
        made = theirs(4, 6, bias=False)
    assert type(made) is ours and isinstance(made, theirs)
    assert all(map(torch.equal, made.parameters(), expected.parameters()))
    assert type(theirs(4, 6)) is theirs and constructors() == before
    assert fastseq.restore_modules(made) == [""] and type(made) is theirs


def test_names_imported_before_and_modules_inside_modules():
    with fastseq.patched():
        model = torch.nn.Sequential(LSTM(4, 6))
        assert isinstance(model[0], LSTM) and issubclass(nn.LSTM, LSTM)
        assert type(model[0]) is nn.LSTM
        assert type(nn.LSTM(4, 6, zoneout=0.5)) is nn.LSTM
    assert fastseq.restore_modules(nn.LSTM(4, 6)) == []


def test_subclasses_are_made_as_they_are():
    with fastseq.patched():
        assert type(Own(4, 6)) is Own

        class Inside(torch.nn.GRU):
            def forward(self, input, hx=None):
                return "mine"

        assert Inside(4, 6)(None) == "mine"
    assert Inside.__mro__[1] is torch.nn.GRU


def test_nested_and_left_by_exceptions():
    before = constructors()
    with pytest.raises(KeyError), fastseq.patched():
        with fastseq.patched():
            pass
        assert type(LSTM(4, 6)) is nn.LSTM
        raise KeyError
    assert constructors() == before and type(LSTM(4, 6)) is LSTM


def test_as_a_decorator():
    @fastseq.patched()
    def build():
        return torch.nn.GRU(4, 6)

    assert type(build()) is type(build()) is nn.GRU
    assert type(torch.nn.GRU(4, 6)) is torch.nn.GRU


def test_errors_of_constructors_are_torchs():
    for args in ((4,), (4, 0), (4.0, 6)):
        said = []
        for patch in (False, True):
            with fastseq.patched() if patch else torch.no_grad():
                with pytest.raises((TypeError, ValueError)) as failure:
                    torch.nn.LSTM(*args)
            said.append((failure.type, str(failure.value)))
        assert said[0] == said[1]


def test_blocks_of_several_threads_overlap():
    before, inside, leave = constructors(), threading.Event(), threading.Event()

    def other():
        with fastseq.patched():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with fastseq.patched():
        thread.start()
        assert inside.wait(10)
    assert type(LSTM(4, 6)) is nn.LSTM
    leave.set()
    thread.join()
    assert constructors() == before
