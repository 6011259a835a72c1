"""torch.func over the modules: vmap, per-sample gradients, forward mode, second derivatives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vmap

from fastseq import nn
from fastseq.testing import assert_close_to_reference

MODULES = {
    "lstm": lambda: nn.LSTM(4, 6, 2),
    "both ways": lambda: nn.LSTM(4, 6, bidirectional=True, batch_first=True),
    "projected": lambda: nn.LSTM(4, 6, proj_size=3),
    "gru": lambda: nn.GRU(4, 6, 2),
    "rnn": lambda: nn.RNN(4, 6),
    "lstm cell": lambda: nn.LSTMCell(4, 6),
    "gru cell": lambda: nn.GRUCell(4, 6),
    "rnn cell": lambda: nn.RNNCell(4, 6),
}
every_module = pytest.mark.parametrize("name", MODULES)


def first(result):
    return result[0] if isinstance(result, tuple) else result


def setup(name):
    """A module, its float64 twin and samples [N, ...] for it."""
    module = MODULES[name]()
    shape = (3, 2, 4) if "cell" in name else (3, 5, 2, 4)
    return module, copy.deepcopy(module).double(), torch.randn(shape)


@every_module
def test_vmap_over_inputs(name):
    module, exact, samples = setup(name)
    found = vmap(lambda x: first(module(x)))(samples)
    truth = torch.stack([first(exact(x.double())) for x in samples])
    assert_close_to_reference(found, truth)


@every_module
def test_vmap_over_models(name):
    modules = [MODULES[name]() for _ in range(3)]
    parameters, buffers = stack_module_state(modules)
    _, _, samples = setup(name)
    found = vmap(lambda p, x: first(functional_call(modules[0], p, (x,))))(parameters, samples)
    pairs = zip(modules, samples, strict=True)
    truth = torch.stack([first(copy.deepcopy(m).double()(x.double())) for m, x in pairs])
    assert not buffers
    assert_close_to_reference(found, truth)


@every_module
def test_gradients_of_each_sample(name):
    module, exact, samples = setup(name)

    def loss(parameters, x):
        return first(functional_call(module, parameters, (x,))).square().sum()

    parameters = {n: p.detach() for n, p in module.named_parameters()}
    found = vmap(grad(loss), (None, 0))(parameters, samples)
    for i, x in enumerate(samples):
        truth = torch.autograd.grad(
            first(exact(x.double())).square().sum(), list(exact.parameters())
        )
        for got, want in zip(found.values(), truth, strict=True):
            assert_close_to_reference(got[i], want)


@every_module
def test_forward_mode(name):
    module, exact, (x, tangent, _) = setup(name)
    value, found = jvp(lambda x: first(module(x)), (x,), (tangent,))
    x, tangent = x.double(), tangent.double()
    # The derivative along the tangent, by two reverse passes.
    leaf = x.clone().requires_grad_()
    y = first(exact(leaf))
    v = torch.zeros_like(y, requires_grad=True)
    (back,) = torch.autograd.grad(y, leaf, v, create_graph=True)
    (truth,) = torch.autograd.grad(back, v, tangent)
    assert_close_to_reference(value, y)
    assert_close_to_reference(found, truth)


@pytest.mark.parametrize("name", ["lstm", "gru cell"])
def test_second_derivatives(name):
    module, exact, (x, *_) = setup(name)
    x = x[..., :1, :]
    found = hessian(lambda x: first(module(x)).square().sum())(x)
    truth = torch.autograd.functional.hessian(lambda x: first(exact(x)).square().sum(), x.double())
    assert_close_to_reference(found, truth)


@every_module
def test_deterministic_mode(name):
    module, _, (x, *_) = setup(name)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            y = first(module(x))
            runs.append([y, *torch.autograd.grad(y.square().sum(), list(module.parameters()))])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, *runs))
