"""nn.LSTM as a drop-in for torch.nn.LSTM: construction, checkpoints, calls, errors, fallbacks."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence
from torch.utils.checkpoint import checkpoint

from fastseq import backends, nn
from fastseq.reference import rnn
from fastseq.testing import (
    assert_close_to_reference,
    assert_matches,
    assert_results_close,
    lstm_case,
    run_with_grads,
)

CONFIGS = [
    dict(num_layers=layers, bidirectional=both, bias=bias)
    for layers, both, bias in itertools.product((1, 2), (False, True), (True, False))
]


def check(case, **options) -> dict:
    """nn.LSTM against torch.nn.LSTM in float64, with torch in the same dtype as the yardstick."""
    torch_lstm = case.module(torch.nn.LSTM)
    return assert_matches(
        case.module(nn.LSTM),
        torch_lstm,
        torch_lstm,
        case.inputs,
        case.cotangents,
        names=case.names,
        what=str(case),
        **options,
    )


def twins(*args, **kwargs) -> tuple[torch.nn.LSTM, torch.nn.LSTM]:
    """Ours and torch's, with the same parameters."""
    ours = nn.LSTM(*args, **kwargs)
    theirs = torch.nn.LSTM(*args, **kwargs)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("B", [None, 1, 6])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("hx", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: "-".join(map(str, c.values())))
def test_values_and_gradients(config, hx, batch_first, B, dtype):
    check(lstm_case(5, B, 4, 9, **config, hx=hx, batch_first=batch_first, dtype=dtype))


def test_is_torchs_class_in_all_that_programs_ask():
    ours, theirs = twins(4, 6, 2, bidirectional=True)
    assert isinstance(ours, torch.nn.LSTM) and isinstance(ours, torch.nn.RNNBase)
    assert type(ours).__name__ == "LSTM" and nn.LSTM is not torch.nn.LSTM
    assert repr(ours) == repr(theirs)
    assert [len(group) for group in ours.all_weights] == [4] * 4
    assert ours.__dict__.keys() == theirs.__dict__.keys() | {"zoneout"}
    ours.flatten_parameters()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: "-".join(map(str, c.values())))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_same_seed_same_weights(config, dtype):
    made = []
    for cls in (nn.LSTM, torch.nn.LSTM):
        torch.manual_seed(3)
        made.append((cls(5, 7, **config, dtype=dtype).state_dict(), torch.rand(3)))
    (ours, after), (theirs, after_theirs) = made
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(after, after_theirs)


@pytest.mark.parametrize("to_ours", [True, False])
def test_checkpoints_of_torch_load_and_the_other_way(to_ours):
    source, target = (torch.nn.LSTM, nn.LSTM) if to_ours else (nn.LSTM, torch.nn.LSTM)
    saved, loaded = source(4, 6, 2, bidirectional=True), target(4, 6, 2, bidirectional=True)
    assert not loaded.load_state_dict(saved.state_dict(), strict=True).missing_keys
    exact = copy.deepcopy(saved).double()
    x = torch.randn(5, 3, 4)
    assert_close_to_reference(loaded(x)[0], exact(x.double())[0], torch_like(loaded)(x)[0])


def torch_like(module: torch.nn.LSTM) -> torch.nn.LSTM:
    options = "input_size hidden_size num_layers bias batch_first dropout bidirectional proj_size"
    twin = torch.nn.LSTM(**{name: getattr(module, name) for name in options.split()})
    twin = twin.to(next(module.parameters()).dtype).train(module.training)
    twin.load_state_dict(module.state_dict())
    return twin


def saved_whole(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), saved_whole],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)
def test_copies_compute_the_same_and_hold_their_own_weights(duplicate):
    module, x = nn.LSTM(4, 6, 2), torch.randn(5, 3, 4)
    expected = module(x)[0].detach()
    again = duplicate(module)
    assert type(again) is nn.LSTM
    assert torch.equal(again(x)[0], expected)
    if duplicate is not copy.copy:
        with torch.no_grad():
            again.weight_hh_l1.zero_()
        assert torch.equal(module(x)[0], expected)
        assert not torch.equal(again(x)[0], expected)


def add_in_place(module):
    with torch.no_grad():
        module.weight_hh_l0.add_(0.5)


def optimiser_step(module):
    module(torch.ones(2, 1, 4))[0].sum().backward()
    torch.optim.SGD(module.parameters(), lr=1.0).step()


def write_data(module):
    module.weight_ih_l0.data[3:] = 0.25
    module.bias_hh_l0.data = torch.ones(24)


def new_parameter(module):
    module.weight_hh_l0 = torch.nn.Parameter(torch.ones(24, 6))


def to_double_and_back(module):
    module.double().half().float()


CHANGES = [add_in_place, optimiser_step, write_data, new_parameter, to_double_and_back]
WRAPPERS = {
    "weight_norm": lambda m: parametrizations.weight_norm(m, "weight_hh_l0"),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m, "weight_hh_l0"),
    "old weight_norm": lambda m: torch.nn.utils.weight_norm(m, "weight_ih_l0"),
    "prune": lambda m: prune.random_unstructured(m, "weight_hh_l0", 0.5),
    "tied": lambda m: setattr(m, "bias_ih_l0", m.bias_hh_l0),
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_no_weight_is_ever_stale(change):
    module, x = nn.LSTM(4, 6), torch.randn(5, 3, 4)
    before = module(x)[0].detach()
    change(module)
    after = module(x)[0]
    assert not torch.equal(before, after)
    exact = torch_like(module)
    assert_close_to_reference(after, exact.double()(x.double())[0], torch_like(module)(x)[0])


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_weights(name):
    results = []
    for cls, dtype in itertools.product((nn.LSTM, torch.nn.LSTM), (torch.float32, torch.float64)):
        torch.manual_seed(5)
        module = cls(4, 6).to(dtype)
        torch.manual_seed(6)
        WRAPPERS[name](module)
        module.eval()
        x = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
        y, _ = module(x)
        y.square().sum().backward()
        found = {n: p.grad for n, p in module.named_parameters()}
        results.append({"y": y.detach(), **found})
    ours, _, by_torch, truth = results
    if name in ("weight_norm", "spectral_norm"):
        assert parametrize.is_parametrized(module)
    assert_results_close(ours, truth, by_torch, what=name)


def test_dropout_is_read_at_each_call_and_drawn_as_torch_draws():
    ours, theirs = twins(4, 6, 3, dropout=0.4)
    exact, x = copy.deepcopy(theirs).double(), torch.randn(5, 3, 4)
    for p, training in ((0.4, True), (0.9, True), (0.4, False)):
        outputs = []
        for module, value in ((ours, x), (exact, x.double()), (theirs, x)):
            module.dropout = p
            module.train(training)
            torch.manual_seed(11)
            outputs.append(module(value)[0])
        assert_close_to_reference(*outputs, what=f"dropout {p} training {training}")
    # The last of the outputs above was made without dropout.
    assert torch.equal(ours(x)[0], outputs[0])


def packed(dtype=torch.float32, enforce_sorted=True) -> PackedSequence:
    lengths = [7, 5, 5, 1] if enforce_sorted else [5, 1, 7, 5]
    x = torch.randn(7, 4, 5, generator=torch.Generator().manual_seed(2)).to(dtype)
    return pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=enforce_sorted)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: "-".join(map(str, c.values())))
@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("hx", [False, True])
def test_packed_sequence(config, enforce_sorted, hx):
    D = 2 if config["bidirectional"] else 1
    states = torch.randn(2, config["num_layers"] * D, 4, 6)
    template = packed(enforce_sorted=enforce_sorted)

    def call(cls, dtype):
        module = cls(5, 6, **config, dtype=dtype)

        def run(data, h0, c0, *params):
            input = template._replace(data=data)
            named = dict(zip((n for n, _ in module.named_parameters()), params, strict=True))
            state = (h0, c0) if hx else None
            y, hidden = torch.func.functional_call(module, named, (input, state))
            assert isinstance(y, PackedSequence)
            assert torch.equal(y.batch_sizes, template.batch_sizes)
            return y.data, hidden

        return run

    module = nn.LSTM(5, 6, **config)
    inputs = {"data": template.data, "h0": states[0], "c0": states[1]}
    inputs |= {n: p.detach() for n, p in module.named_parameters()}
    shapes = [(len(template.data), 6 * D), states.shape[1:], states.shape[1:]]
    assert_matches(
        call(nn.LSTM, torch.float32),
        call(torch.nn.LSTM, torch.float64),
        call(torch.nn.LSTM, torch.float32),
        inputs,
        [torch.randn(shape) for shape in shapes],
        names=["y", "h_n", "c_n"],
    )


def test_packed_one_element_sequences():
    ours, theirs = twins(5, 6)
    input = pack_sequence([torch.randn(1, 5), torch.randn(1, 5)])
    exact = copy.deepcopy(theirs).double()
    expected = exact(input._replace(data=input.data.double()))[0].data
    assert_close_to_reference(ours(input)[0].data, expected, theirs(input)[0].data)


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "by stack"])
@pytest.mark.parametrize("form", ["rows", "unbatched", "packed"])
def test_states_may_come_as_a_list(form, direct, monkeypatch):
    """torch takes one, and gives a pair."""
    if not direct:
        monkeypatch.setattr(backends, "eager_calls_allowed", lambda: False)
    ours, theirs = twins(5, 6)
    rows = () if form == "unbatched" else (4,)
    x = packed(enforce_sorted=False) if form == "packed" else torch.randn(7, *rows, 5)
    states = [torch.randn(1, *rows, 6) for _ in range(2)]
    expected, pair = theirs(x, states), ours(x, tuple(states))
    monkeypatch.setattr(torch.nn.LSTM, "forward", None)
    found = ours(x, states)
    data = [out[0].data if form == "packed" else out[0] for out in (found, pair, expected)]
    assert torch.equal(data[0], data[1])
    torch.testing.assert_close(data[0], data[2])
    assert type(found[1]) is type(expected[1])
    assert all(map(torch.equal, found[1], pair[1]))


def test_proj_size_is_torchs_answer():
    case = dict(num_layers=2, bidirectional=True, proj_size=3)
    ours, theirs = twins(5, 7, **case)
    x = torch.randn(6, 4, 5)
    exact = copy.deepcopy(theirs).double()
    for got, want, torch_got in zip(
        [ours(x)[0], *ours(x)[1]],
        [exact(x.double())[0], *exact(x.double())[1]],
        [theirs(x)[0], *theirs(x)[1]],
        strict=True,
    ):
        assert_close_to_reference(got, want, torch_got)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_worse_than_torch(dtype):
    check(lstm_case(5, 3, 6, 9, num_layers=2, dtype=dtype))


def test_autocast_gives_torchs_dtype_and_answer():
    ours, theirs = twins(6, 9, 2)
    exact, x = copy.deepcopy(theirs).double(), torch.randn(5, 3, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, by_torch = ours(x), theirs(x)
    assert got[0].dtype == by_torch[0].dtype
    assert [t.dtype for t in got[1]] == [t.dtype for t in by_torch[1]]
    assert_close_to_reference(got[0], exact(x.double())[0], by_torch[0])


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("hx", [False, True])
def test_no_rows(batch_first, hx):
    check(lstm_case(3, 0, 4, 6, batch_first=batch_first, bidirectional=True, hx=hx))


def outcome(call) -> tuple:
    """The exception a call raises, as type and text, and the warnings it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
            raised = None
        except Exception as error:
            raised = (type(error), str(error))
    return raised, [(w.category, str(w.message)) for w in caught]


CONSTRUCTIONS = {
    "none": ((), {}),
    "one": ((4,), {}),
    "zero input": ((0, 6), {}),
    "negative input": ((-1, 6), {}),
    "zero hidden": ((4, 0), {}),
    "float sizes": ((4.0, 6), {}),
    "float hidden": ((4, 6.5), {}),
    "no layers": ((4, 6, 0), {}),
    "dropout without layers between": ((4, 6), {"dropout": 0.5}),
    "dropout above one": ((4, 6, 2), {"dropout": 1.5}),
    "dropout below zero": ((4, 6, 2), {"dropout": -0.1}),
    "dropout true": ((4, 6, 2), {"dropout": True}),
    "dropout text": ((4, 6, 2), {"dropout": "0.5"}),
    "bias as number": ((4, 6, 2, 1), {}),
    "batch_first as number": ((4, 6), {"batch_first": 1}),
    "projection too large": ((4, 6), {"proj_size": 6}),
    "negative projection": ((4, 6), {"proj_size": -1}),
    "unknown argument": ((4, 6), {"nonlinearity": "tanh"}),
    "integer dtype": ((4, 6), {"dtype": torch.int64}),
    "fine": ((4, 6, 2, False, True, 0.25, True), {}),
}


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_constructor_errors_and_warnings_are_torchs(name):
    args, kwargs = CONSTRUCTIONS[name]
    ours, theirs = (outcome(lambda c=cls: c(*args, **kwargs)) for cls in (nn.LSTM, torch.nn.LSTM))
    assert ours == theirs


X = torch.zeros(5, 3, 4)
S = torch.zeros(1, 3, 6)
PACKED = pack_padded_sequence(X, [5, 4, 2])
CALLS = {
    "input of one dimension": ((X[0, 0],), {}),
    "input of four dimensions": ((X[None],), {}),
    "input of another width": ((X[..., :3],), {}),
    "unbatched of another width": ((X[:, 0, :3],), {}),
    "input of another dtype": ((X.double(),), {}),
    "input of integers": ((X.long(),), {}),
    "input not a tensor": (([1.0],), {}),
    "input none": ((None,), {}),
    "no input": ((), {}),
    "hx a tensor of one layer": ((X, S), {}),
    "hx a tensor of two": ((X, torch.cat((S, S))), {}),
    "hx of one": ((X, (S,)), {}),
    "hx of three": ((X, (S, S, S)), {}),
    "hx a list": ((X, [S, S]), {}),
    "hx of nothing": ((X, (None, None)), {}),
    "h0 of other rows": ((X, (S[:, :2], S)), {}),
    "h0 of other layers": ((X, (torch.cat((S, S)), S)), {}),
    "c0 of other rows": ((X, (S, S[:, :2])), {}),
    "c0 of other width": ((X, (S, S[..., :5])), {}),
    "hx unbatched for a batch": ((X, (S[:, 0], S[:, 0])), {}),
    "hx batched for no batch": ((X[:, 0], (S, S)), {}),
    "c0 of another dtype": ((X, (S, S.double())), {}),
    "hx of another dtype": ((X, (S.double(), S.double())), {}),
    "packed of another width": ((pack_padded_sequence(X[..., :3], [5, 4, 2]),), {}),
    "packed with wrong hx": ((PACKED, (S[:, :2], S)), {}),
    "packed of another dtype": ((PACKED.double(),), {}),
    "no steps": ((X[:0],), {}),
    "no steps, no rows": ((X[:0, :0],), {}),
    "no steps, unbatched": ((X[:0, 0],), {}),
    "no steps, packed": ((PackedSequence(X[0, :0], torch.zeros(0, dtype=torch.int64)),), {}),
    "unknown keyword": ((X,), {"length": None}),
    "hx by keyword": ((), {"input": X, "hx": (S, S)}),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_call_errors_are_torchs(name, grad):
    args, kwargs = CALLS[name]
    ours, theirs = twins(4, 6)
    with torch.set_grad_enabled(grad):
        expected = outcome(lambda: theirs(*args, **kwargs))
        found = outcome(lambda: ours(*args, **kwargs))
    assert found[0] == expected[0]


def test_an_error_leaves_the_module_usable():
    module = nn.LSTM(4, 6)
    expected = module(X + 1)[0]
    for args in ((X[..., :3],), (X, (S[:, :2], S)), (X.double(),)):
        with pytest.raises((RuntimeError, ValueError)):
            module(*args)
    assert torch.equal(module(X + 1)[0], expected)


def test_functional_call_hooks_and_meta():
    ours, theirs = twins(4, 6)
    seen = []
    ours.register_forward_hook(lambda module, args, result: seen.append(result[0].shape))
    ours(X)
    assert seen == [(5, 3, 6)]
    zeros = {n: torch.zeros_like(p) for n, p in ours.named_parameters()}
    assert torch.func.functional_call(ours, zeros, (X + 1,))[0].count_nonzero() == 0
    meta = nn.LSTM(4, 6, device="meta")
    assert meta(torch.empty(5, 3, 4, device="meta"))[0].shape == (5, 3, 6)
    assert meta.to_empty(device="cpu")(X)[0].shape == theirs(X)[0].shape


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_forward_mode(dtype, grad):
    """Beyond torch, which has it in float64 alone."""
    ours, theirs = twins(4, 6, dtype=dtype)
    x, tangent = torch.randn(2, 5, 3, 4, dtype=dtype)

    def push(module, x, tangent):
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            return forward_ad.unpack_dual(module(forward_ad.make_dual(x, tangent))[0]).tangent

    exact = push(theirs.double(), x.double(), tangent.double())
    found = push(ours, x, tangent)
    assert found.dtype == dtype
    assert_close_to_reference(found, exact)


def test_checkpointing_gives_the_same_gradients():
    module, x = nn.LSTM(4, 6, 2), torch.randn(5, 3, 4, requires_grad=True)
    direct = torch.autograd.grad(module(x)[0].sum(), list(module.parameters()))
    replayed = checkpoint(module, x, use_reentrant=False)[0].sum()
    assert all(map(torch.equal, direct, torch.autograd.grad(replayed, list(module.parameters()))))


def test_lazy_negation_is_seen():
    module, x = nn.LSTM(4, 6), torch.randn(5, 3, 4)
    negated = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert negated.is_neg() and torch.equal(negated, x)
    assert torch.equal(module(negated)[0], module(x)[0])


def test_a_weight_of_the_wrong_shape_is_refused():
    module = nn.LSTM(4, 6)
    module.weight_ih_l0 = torch.nn.Parameter(torch.zeros(24, 5))
    with pytest.raises((RuntimeError, ValueError), match=r"\[24, 4\].*\[24, 5\]") as failure:
        module(X)
    assert ".cpp" not in str(failure.value)


def test_traces():
    module, other = nn.LSTM(4, 6), torch.randn(5, 3, 4)
    traced = torch.jit.trace(module, (torch.randn(5, 3, 4),), check_trace=False)
    exact = copy.deepcopy(module).double()(other.double())[0]
    assert_close_to_reference(traced(other)[0], exact, module(other)[0])


def test_trains_to_the_same_losses_as_torch():
    x, target = torch.randn(12, 8, 4), torch.randn(12, 8, 6)
    losses = []
    for cls, dtype in (
        (nn.LSTM, torch.float32),
        (torch.nn.LSTM, torch.float64),
        (torch.nn.LSTM, torch.float32),
    ):
        torch.manual_seed(0)
        module = cls(4, 6, 2).to(dtype)
        optimiser = torch.optim.SGD(module.parameters(), lr=0.5)
        run = []
        for _ in range(20):
            optimiser.zero_grad()
            loss = (module(x.to(dtype))[0] - target.to(dtype)).square().mean()
            loss.backward()
            optimiser.step()
            run.append(loss.detach())
        losses.append(torch.stack(run))
    assert losses[0][-1] < losses[0][0]
    assert_close_to_reference(*losses, what="losses")


def test_reference_stands_behind_it():
    """The chain closes: nn.LSTM's float64 agrees with the shipped reference."""
    case = lstm_case(4, 3, 5, 6, num_layers=2, dtype=torch.float64)
    found = run_with_grads(case.module(nn.LSTM), case.inputs, case.cotangents, names=case.names)
    expected = run_with_grads(
        case.functional(rnn.lstm), case.inputs, case.cotangents, names=case.names
    )
    assert_results_close(found, expected)
