"""replace_modules and restore_modules: models of other people's, changed in place and back."""

from __future__ import annotations

import copy
import io
import pickle
import random

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize

import fastseq
from fastseq import nn
from fastseq.models import attention, bahdanau, plain
from fastseq.reference import attention as reference_attention
from fastseq.reference import bahdanau as reference_bahdanau
from fastseq.reference import plain as reference_plain
from fastseq.testing import assert_close_to_reference


class Tagger(torch.nn.Module):
    """A program's model: every recurrent module of torch, one of them used twice."""

    def __init__(self):
        super().__init__()
        self.lstm = torch.nn.LSTM(4, 6, 2, bidirectional=True, dropout=0.1)
        self.gru = torch.nn.GRU(12, 5)
        self.rnns = torch.nn.ModuleList(torch.nn.RNN(5, 5, nonlinearity=n) for n in KINDS)
        self.cells = torch.nn.ModuleDict(
            {"lstm": torch.nn.LSTMCell(5, 5), "gru": torch.nn.GRUCell(5, 5)}
        )
        self.step = torch.nn.RNNCell(5, 5)
        self.again = self.rnns[0]
        self.head = torch.nn.Linear(5, 3)

    def forward(self, x):
        x = self.gru(self.lstm(x)[0])[0]
        for rnn in (*self.rnns, self.again):
            x = rnn(x)[0]
        h, c = self.cells["lstm"](x[-1])
        return self.head(self.step(self.cells["gru"](h), c))


KINDS = ("tanh", "relu")
NAMES = ["lstm", "gru", "rnns.0", "rnns.1", "cells.lstm", "cells.gru", "step"]
X = torch.linspace(-1, 1, 5 * 3 * 4).view(5, 3, 4)


class OwnForward(torch.nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(input * 2, hx)


class OwnCheck(torch.nn.GRU):
    def check_input(self, input, batch_sizes):
        raise ValueError("no")


class OwnInit(torch.nn.LSTM):
    def reset_parameters(self):
        for weight in self.parameters():
            torch.nn.init.constant_(weight, 0.1)


def snapshot(model):
    """Everything a program could hold on to, by identity."""
    return [
        (name, id(m), type(m), {k: id(v) for k, v in vars(m).items() if not k.startswith("_fast")},
         [(n, id(p), p.requires_grad) for n, p in m.named_parameters()])
        for name, m in model.named_modules()
    ]  # fmt: skip


def test_replaces_all_and_computes_the_same():
    model = Tagger().eval()
    exact, torchs = copy.deepcopy(model).double()(X.double()), model(X)
    report = fastseq.replace_modules(model)
    assert report.replaced == NAMES and not report.left
    for name in NAMES:
        module = model.get_submodule(name)
        assert type(module).__module__.startswith("fastseq.nn.")
        assert isinstance(module, getattr(torch.nn, type(module).__name__))
    assert model.again is model.rnns[0]
    assert_close_to_reference(model(X), exact, torchs)


def test_nothing_but_the_class_changes_and_restoring_is_exact():
    model = Tagger()
    model.lstm.weight_hh_l0.requires_grad_(False)
    seen = []
    model.gru.register_forward_hook(lambda *_: seen.append("hook"))
    model.step.note = "mine"
    before = snapshot(model)
    fastseq.replace_modules(model)
    after = snapshot(model)
    assert [row[:2] + row[3:] for row in after] == [row[:2] + row[3:] for row in before]
    model(X)
    assert seen == ["hook"]
    assert fastseq.restore_modules(model) == NAMES
    assert snapshot(model) == before and not any("_fastseq" in k for k in vars(model.lstm))
    assert fastseq.restore_modules(model) == []


def test_the_optimiser_goes_on():
    model = Tagger()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.1)
    for change in (fastseq.replace_modules, fastseq.restore_modules, lambda m: None):
        before = model.lstm.weight_hh_l1.detach().clone()
        model(X).square().sum().backward()
        optimiser.step()
        assert not torch.equal(before, model.lstm.weight_hh_l1)
        change(model)
    assert all(state["step"] == 3 for state in optimiser.state.values())


def test_the_model_may_be_the_module():
    module = torch.nn.LSTM(4, 6)
    assert fastseq.replace_modules(module).replaced == [""]
    assert type(module) is nn.LSTM
    assert "(model)" in str(fastseq.replace_modules(module))
    fastseq.restore_modules(module)
    assert type(module) is torch.nn.LSTM


def test_what_is_fastseqs_already_stays_so():
    model = torch.nn.Sequential(nn.LSTM(4, 6), attention.Attention(3))
    report = fastseq.replace_modules(model, strict=True)
    assert [row.outcome for row in report.rows] == ["already"] * 2
    fastseq.restore_modules(model)
    assert type(model[0]) is nn.LSTM and type(model[1]) is attention.Attention


def test_twice_is_once():
    model = Tagger()
    fastseq.replace_modules(model)
    assert not fastseq.replace_modules(model).replaced
    fastseq.restore_modules(model)
    assert type(model.lstm) is torch.nn.LSTM


@pytest.mark.parametrize("include", [(torch.nn.GRU, torch.nn.GRUCell), (nn.GRU, nn.GRUCell)])
def test_include(include):
    model = Tagger()
    report = fastseq.replace_modules(model, include=include)
    assert report.replaced == ["gru", "cells.gru"] and not report.left
    assert type(model.lstm) is torch.nn.LSTM
    with pytest.raises(ValueError, match="torch.nn.LSTM.*Dropout"):
        fastseq.replace_modules(model, include=[torch.nn.Dropout])


def test_filter():
    model = Tagger()
    report = fastseq.replace_modules(model, filter_fn=lambda name, m: not name.startswith("rnns"))
    assert report.replaced == [n for n in NAMES if not n.startswith("rnns")]
    assert {row.reason for row in report.rows if row.name == "rnns.1"} == {"filter_fn said no"}


def test_linear_cross_entropy_on_request():
    model = Tagger().eval()
    before, logits = snapshot(model), model(X)
    assert fastseq.replace_modules(model, include=[nn.LinearCrossEntropy]).replaced == ["head"]
    assert torch.equal(model(X), logits)
    hidden, target = torch.randn(7, 5), torch.randint(3, (7,))
    loss = torch.nn.functional.cross_entropy(model.head(hidden), target)
    assert torch.allclose(model.head(hidden, target), loss)
    fastseq.restore_modules(model)
    assert snapshot(model) == before


class Pointer(torch.nn.Module):
    """A model of somebody's that took no more than the attention from the reference."""

    def __init__(self, attend):
        super().__init__()
        self.rnn = torch.nn.GRU(4, 6, batch_first=True)
        self.attend = attend

    def forward(self, x, keys, mask):
        found = self.attend(self.rnn(x)[1][0], keys, mask)
        return found[-1] if isinstance(found, tuple) else found


@pytest.mark.parametrize(
    ("theirs", "ours", "width"),
    [(reference_attention, attention, 6), (reference_bahdanau, bahdanau, 12)],
    ids=["attention", "bahdanau"],
)
def test_attention_inside_other_models(theirs, ours, width):
    model = Pointer(theirs.Attention(6))
    mask = torch.arange(7) < torch.tensor([[7], [3], [1]])
    given, keys = X.transpose(0, 1), torch.randn(3, 7, width)
    exact = copy.deepcopy(model).double()(given.double(), keys.double(), mask)
    before = model(given, keys, mask)
    report = fastseq.replace_modules(model, strict=True)
    assert report.replaced == ["rnn", "attend"] and type(model.attend) is ours.Attention
    assert_close_to_reference(model(given, keys, mask), exact, before)
    assert fastseq.restore_modules(model) == ["rnn", "attend"]
    only = fastseq.replace_modules(model, include=[theirs.Attention])
    assert only.replaced == ["attend"] and type(model.rnn) is torch.nn.GRU


def test_subclasses_that_compute_in_their_own_way_are_left():
    model = torch.nn.ModuleDict({"a": OwnForward(4, 6), "b": OwnCheck(4, 6)})
    model["c"] = torch.nn.LSTM(4, 6)
    model["c"].forward = model["c"].forward
    model["d"] = type("GRU", (torch.nn.Module,), {})()
    before = snapshot(model)
    report = fastseq.replace_modules(model)
    assert snapshot(model) == before
    assert list(report.left) == ["a", "b", "c", "d"]
    for name, words in zip(
        "abcd", ["forward", "check_input", "instance", "torch.nn.GRU"], strict=True
    ):
        assert words in report.left[name] and report.left[name] in str(report)
    with pytest.raises(ValueError, match="OwnForward has forward"):
        fastseq.replace_modules(model, strict=True)
    fastseq.replace_modules(model, strict=True, filter_fn=lambda *_: False)


def test_subclasses_that_compute_as_torch_are_replaced():
    module = OwnInit(4, 6, 2)
    exact, torchs = copy.deepcopy(module).double()(X.double())[0], module(X)[0]
    assert fastseq.replace_modules(module).replaced == [""]
    assert isinstance(module, OwnInit) and isinstance(module, nn.LSTM)
    assert type(module).__name__ == "OwnInit"
    assert fastseq.explain(module).op == "lstm"
    assert_close_to_reference(module(X)[0], exact, torchs)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(again) is type(module) and torch.equal(again(X)[0], module(X)[0])
    module.reset_parameters()
    assert bool((module.weight_hh_l0 == 0.1).all())
    fastseq.restore_modules(module)
    assert type(module) is OwnInit


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("remove", [False, True])
def test_parametrizations_live_through_it(when, remove):
    module, changes = torch.nn.LSTM(4, 6), [fastseq.replace_modules]
    changes.insert(when == "after", lambda m: parametrizations.weight_norm(m, "weight_hh_l0"))
    for change in changes:
        change(module)
    assert isinstance(module, nn.LSTM) and type(module).__name__ == "ParametrizedLSTM"
    assert parametrize.is_parametrized(module, "weight_hh_l0")
    norm = module.parametrizations.weight_hh_l0.original0
    parametrizations.spectral_norm(module, "weight_ih_l0")
    y = module.eval()(X)[0]
    y.sum().backward()
    assert norm.grad is not None
    if remove:
        for name in ("weight_hh_l0", "weight_ih_l0"):
            parametrize.remove_parametrizations(module, name)
        assert type(module) is nn.LSTM
    fastseq.restore_modules(module)
    assert isinstance(module, torch.nn.LSTM) and not isinstance(module, nn.LSTM)
    assert parametrize.is_parametrized(module) != remove
    assert torch.allclose(module(X)[0], y, atol=1e-6)
    if not remove:
        parametrize.remove_parametrizations(module, "weight_hh_l0")
        parametrize.remove_parametrizations(module, "weight_ih_l0")
    assert type(module) is torch.nn.LSTM


def test_scripted_modules_are_told_of():
    with pytest.warns(DeprecationWarning):
        model = torch.nn.Sequential(torch.jit.script(torch.nn.GRU(4, 6)))
    assert "TorchScript" in fastseq.replace_modules(model).left["0"]


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "torch.save"],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_of_a_replaced_model_are_replaced_and_restored(duplicate):
    if duplicate == "torch.save":

        def duplicate(module):
            buffer = io.BytesIO()
            torch.save(module, buffer)
            return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)

    model = Tagger().eval()
    fastseq.replace_modules(model)
    again = duplicate(model)
    assert torch.equal(again(X), model(X))
    assert fastseq.restore_modules(again) == NAMES
    assert type(again.lstm) is torch.nn.LSTM and type(model.lstm) is nn.LSTM


MODELS = [
    (reference_plain, plain),
    (reference_attention, attention),
    (reference_bahdanau, bahdanau),
]


@pytest.mark.parametrize(("theirs", "ours"), MODELS, ids=["plain", "attention", "bahdanau"])
def test_the_reference_models_become_the_fast_ones(theirs, ours):
    def build(module):
        torch.manual_seed(3)
        more = [module.Attention(6)] if hasattr(module, "Attention") else []
        return module.Seq2Seq(module.Encoder(9, 4, 6), module.Decoder(9, 4, 6, *more)).eval()

    def call(model):
        random.seed(1)
        return model(torch.arange(10).view(2, 5) % 9, torch.arange(8).view(2, 4) % 9, 0.5)

    model, native = build(theirs), build(ours)
    kept = {name: set(vars(module)) for name, module in model.named_modules()}
    exact, before = call(copy.deepcopy(model).double()), call(model)
    report = fastseq.replace_modules(model, strict=True)
    modules = zip(model.named_modules(), native.named_modules(), strict=True)
    assert [(n, type(m)) for (n, m), _ in modules] == [
        (n, type(m)) for n, m in native.named_modules()
    ]
    assert all(row.outcome == "replaced" for row in report.rows)
    for name, module in native.named_modules():
        own = vars(model.get_submodule(name)).keys() - {"_fastseq_replaced"}
        assert own == vars(module).keys() - {"zoneout"}, name
    assert_close_to_reference(call(model), exact, before)
    fastseq.restore_modules(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == kept
    assert torch.equal(call(model), before)


def test_the_report_reads_as_a_table():
    model = torch.nn.ModuleDict({"encoder": torch.nn.LSTM(4, 6), "odd": OwnForward(4, 6)})
    lines = str(fastseq.replace_modules(model)).splitlines()
    assert lines[0] == "fastseq: replaced 1 of 2 modules"
    assert lines[1].split()[:4] == ["encoder", "torch.nn.LSTM", "replaced", "cpu:"]
    assert lines[2].split()[0] == "odd" and lines[2].split()[2] == "left"
    assert lines[2].endswith("OwnForward has forward of its own")
    assert str(fastseq.replace_modules(torch.nn.Linear(1, 1))) == "fastseq: replaced 0 of 0 modules"


def test_only_modules():
    with pytest.raises(TypeError, match="expected a module, got dict"):
        fastseq.replace_modules({})
