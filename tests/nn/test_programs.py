"""What existing programs do with torch's recurrent modules, done to ours."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch.nn.utils import (
    clip_grad_norm_,
    clip_grad_value_,
    parameters_to_vector,
    parametrizations,
    prune,
    vector_to_parameters,
)
from torch.nn.utils import rnn as rnn_utils
from torch.utils.checkpoint import checkpoint

from fastseq import nn
from fastseq.testing import assert_close_to_reference

LAYERS = ("LSTM", "GRU", "RNN")
CELLS = ("LSTMCell", "GRUCell", "RNNCell")
X = torch.linspace(-1, 1, 5 * 3 * 4).view(5, 3, 4)


def twins(name):
    """Ours, torch's, and torch's in float64, with the same parameters."""
    torch.manual_seed(2)
    made = getattr(nn, name)(4, 6), getattr(torch.nn, name)(4, 6)
    made[1].load_state_dict(made[0].state_dict())
    return *made, copy.deepcopy(made[1]).double()


def first(result):
    return result[0] if isinstance(result, tuple) else result


def run(module):
    x = X.to(next(module.parameters()).dtype)
    return first(module(x[0] if type(module).__name__.endswith("Cell") else x))


def check(ours, theirs, exact):
    """Output and gradients: ours against float64, torch's own as the yardstick."""
    found = []
    for module in (ours, exact, theirs):
        y = run(module)
        module.zero_grad()
        y.square().sum().backward()
        grads = {n: p.grad for n, p in module.named_parameters()}
        found.append((y, grads))
    (y, grads), (truth, exact_grads), (by_torch, torch_grads) = found
    assert_close_to_reference(y, truth, by_torch)
    assert list(grads) == list(exact_grads)
    for name, grad in grads.items():
        if exact_grads[name] is None:
            assert grad is None, name
            continue
        assert_close_to_reference(grad, exact_grads[name], torch_grads[name], what=name)


def flatten(m):
    vector_to_parameters(parameters_to_vector(m.parameters()) * 0.5, m.parameters())


def clip(m):
    run(m).square().sum().backward()
    clip_grad_norm_(m.parameters(), 0.1)
    clip_grad_value_(m.parameters(), 0.01)
    torch.optim.SGD(m.parameters(), lr=10.0).step()


def names(m):
    for name, p in m.named_parameters():
        if "weight_hh" in name:
            torch.nn.init.eye_(p)
        elif "weight_ih" in name:
            torch.nn.init.constant_(p.data, 0.25)
            # Units that differ, by numbers that every dtype holds.
            p.data.mul_((torch.arange(p.numel()) % 7 - 2).view_as(p))
        elif "bias" in name:
            p.data.fill_(0)
            p.data[p.shape[0] // 4 : p.shape[0] // 2].fill_(1)


def first_weight(m):
    return next(n for n, _ in m.named_parameters() if n.startswith("weight_hh"))


def freeze(m):
    for name, p in m.named_parameters():
        p.requires_grad_("bias" in name)


def freeze_biases(m):
    for name, p in m.named_parameters():
        p.requires_grad_("bias" not in name)


def pruned_for_good(m):
    name = first_weight(m)
    prune.l1_unstructured(m, name, 0.5)
    prune.remove(m, name)


def swapped(m):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        m.to(torch.float64).to(torch.float32)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


PROGRAMS = {
    "vector_to_parameters": flatten,
    "clip_grad": clip,
    "init by name": names,
    "frozen weights": freeze,
    "frozen biases": freeze_biases,
    "spectral_norm": lambda m: parametrizations.spectral_norm(m, first_weight(m)),
    "spectral_norm of old": lambda m: torch.nn.utils.spectral_norm(m, first_weight(m)),
    "weight_norm": lambda m: parametrizations.weight_norm(m, first_weight(m)),
    "weight_norm of old": lambda m: torch.nn.utils.weight_norm(m, first_weight(m)),
    "orthogonal": lambda m: parametrizations.orthogonal(m, first_weight(m)),
    "prune": lambda m: prune.l1_unstructured(m, first_weight(m), 0.5),
    "prune globally": lambda m: prune.global_unstructured(
        [(m, first_weight(m))], prune.L1Unstructured, amount=0.3
    ),
    "prune and remove": pruned_for_good,
    "share_memory": lambda m: m.share_memory(),
    "state_dict in place": lambda m: [t.mul_(0.5) for t in m.state_dict().values()],
    "data": lambda m: [setattr(p, "data", p.data.clone() * 2) for p in m.parameters()],
    "pre-hook": lambda m: m.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
    "hook": lambda m: m.register_forward_hook(lambda m, args, y: first(y) + 1),
    "backward hook": lambda m: m.register_full_backward_hook(lambda m, gi, go: None),
    "tensor hook": lambda m: [p.register_hook(lambda g: g * 3) for p in m.parameters()],
    "swapped on conversion": swapped,
    "twice": lambda m: setattr(m, "itself", [m]),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", LAYERS + CELLS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_gets_what_torch_gives(program, name):
    modules = twins(name)
    for module in modules:
        torch.manual_seed(3)
        if program == "swapped on conversion" and next(module.parameters()).dtype != torch.float32:
            continue
        PROGRAMS[program](module)
        module.eval()
    check(*modules)


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_the_same_names_in_the_same_order(name):
    ours, theirs, _ = twins(name)
    for listing in ("named_parameters", "state_dict", "named_children", "named_buffers"):
        assert [k for k, *_ in _items(ours, listing)] == [k for k, *_ in _items(theirs, listing)]
    assert type(ours).__name__ == name and isinstance(ours, getattr(torch.nn, name))
    assert repr(ours) == repr(theirs)


def _items(module, listing):
    found = getattr(module, listing)()
    return list(found.items() if isinstance(found, dict) else found)


@pytest.mark.parametrize("name", LAYERS)
def test_all_weights_are_the_parameters(name):
    module = getattr(nn, name)(4, 6, 2, bidirectional=True)
    flat = [w for group in module.all_weights for w in group]
    assert all(a is b for a, b in zip(flat, module.parameters(), strict=True))
    module.flatten_parameters()
    assert module.weight_hh_l0.data.shape[1] == 6 and module.num_layers == 2
    with torch.no_grad():
        module.all_weights[0][1].zero_()
    assert module.weight_hh_l0.count_nonzero() == 0


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_same_seed_same_weights_and_draws(name):
    drawn = []
    for home in (nn, torch.nn):
        torch.manual_seed(7)
        drawn.append([*getattr(home, name)(4, 6).parameters(), torch.rand(3)])
    assert all(map(torch.equal, *drawn))


@pytest.mark.parametrize("name", LAYERS)
def test_the_last_output_is_the_final_state_and_shares_no_memory(name):
    module = getattr(nn, name)(4, 6, 2)
    with torch.no_grad():
        y, state = module(X)
        h = state[0] if isinstance(state, tuple) else state
        assert torch.equal(y[-1], h[-1])
        kept, expected = h.clone(), module(X)[0]
        y.fill_(7)
        assert torch.equal(h, kept)
        h.fill_(8)
        assert torch.equal(module(X)[0], expected)


@pytest.mark.parametrize("name", LAYERS)
def test_the_rnn_utilities(name):
    ours, theirs, exact = twins(name)
    sequences = [X[:n, i % 3] for i, n in enumerate((2, 5, 3))]
    packed = rnn_utils.pack_sequence(sequences, enforce_sorted=False)
    found = []
    for module in (ours, exact, theirs):
        dtype = next(module.parameters()).dtype
        y, h = module(packed.to(dtype))
        padded, lengths = rnn_utils.pad_packed_sequence(y, batch_first=True)
        assert lengths.tolist() == [2, 5, 3]
        rows = rnn_utils.unpad_sequence(padded, lengths, batch_first=True)
        assert [len(r) for r in rows] == [2, 5, 3]
        found.append(torch.cat((rnn_utils.pad_sequence(rows).flatten(), first(h).flatten())))
    assert_close_to_reference(*found)


@pytest.mark.parametrize("name", CELLS)
def test_odd_arguments_of_cells(name):
    cls, theirs = getattr(nn, name), getattr(torch.nn, name)
    torch.manual_seed(1)
    ours = cls(torch.tensor(4), 6, 1)
    torch.manual_seed(1)
    other = theirs(torch.tensor(4), 6, 1)
    assert_close_to_reference(first(ours(X[0], None)), first(other.double()(X[0].double(), None)))
    assert first(ours(X[0, 0])).shape == (6,)


def test_classes_as_constructor_arguments():
    def build(rnn_cell):
        return rnn_cell(4, 6), rnn_cell is nn.LSTM, issubclass(rnn_cell, torch.nn.LSTM)

    assert build(nn.LSTM)[1:] == (True, True)
    assert nn.LSTM(4, 6).mode == "LSTM"


def test_averaged_models_follow():
    module = nn.GRU(4, 6)
    averaged = torch.optim.swa_utils.AveragedModel(module)
    averaged.update_parameters(module)
    assert torch.equal(averaged(X)[0], module(X)[0])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_checkpointing_gives_the_same_bits(name, reentrant):
    module = getattr(nn, name)(4, 6)
    x = (X[0] if name in CELLS else X).clone().requires_grad_()
    leaves, found = [x, *module.parameters()], []
    for run in (module, lambda x: checkpoint(module, x, use_reentrant=reentrant)):
        for leaf in leaves:
            leaf.grad = None
        y = first(run(x))
        y.square().sum().backward()
        found.append([y, *(leaf.grad for leaf in leaves)])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_traces(name):
    ours, _, exact = twins(name)
    example = (X[0] if name in CELLS else X,)
    traced = torch.jit.trace(ours, tuple(t + 1 for t in example))
    found = first(traced(*example))
    assert_close_to_reference(found, first(exact(*(t.double() for t in example))))


class Holds(torch.nn.Module):
    """torch.jit.script has a way to call a layer inside a model only."""

    def __init__(self, rnn: torch.nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: torch.Tensor):
        return self.rnn(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_scripts_as_torchs(name):
    ours, theirs, exact = twins(name)
    example = X[0] if name in CELLS else X
    model = Holds(ours)
    scripted = torch.jit.script(model)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    loaded = torch.jit.load(io.BytesIO(buffer.getvalue()))
    for fn in (scripted, loaded, model):
        truth = first(exact(example.double()))
        assert_close_to_reference(first(fn(example)), truth, first(theirs(example)))
    pairs = zip(model.rnn.parameters(), ours.parameters(), strict=True)
    assert all(a is b for a, b in pairs)
    pairs = zip(model.parameters(), ours.parameters(), strict=True)
    assert all(a is b for a, b in pairs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "module",
    [nn.LSTM(4, 6, zoneout=0.1), nn.PeepholeLSTM(4, 6), nn.AdditiveAttention(4, 4, 4),
     nn.LinearCrossEntropy(4, 6)],
    ids=lambda m: type(m).__name__,
)  # fmt: skip
def test_what_cannot_be_scripted_says_what_to_use(module):
    with pytest.raises(NotImplementedError, match="torch.jit.trace.*torch.export"):
        torch.jit.script(module)
