"""nn.loss.LinearCrossEntropy: torch.nn.Linear and torch.nn.CrossEntropyLoss in one."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from fastseq.nn.loss import LinearCrossEntropy
from fastseq.testing import assert_close_to_reference, assert_matches

OPTIONS = [
    {},
    {"bias": False, "reduction": "sum"},
    {"label_smoothing": 0.1, "ignore_index": 3},
    {"weight": torch.linspace(0.5, 1.5, 11), "reduction": "none"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options))
def test_is_linear_and_cross_entropy(options):
    torch.manual_seed(5)
    ours = LinearCrossEntropy(6, 11, **options)
    torch.manual_seed(5)
    linear = torch.nn.Linear(6, 11, bias=options.get("bias", True))
    rest = {k: v for k, v in options.items() if k != "bias"}
    assert list(ours.state_dict()) == list(linear.state_dict())
    for name, tensor in linear.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)
    inputs = {"hidden": torch.randn(40, 6), **dict(linear.named_parameters())}
    target = torch.randint(11, (40,))
    target[:5] = rest.get("ignore_index", -100)

    def by_torch(hidden, *parameters):
        named = dict(zip(list(inputs)[1:], parameters, strict=True))
        more = {"weight": rest["weight"].to(hidden.dtype)} if "weight" in rest else {}
        logits = torch.func.functional_call(linear, named, (hidden,))
        return torch.nn.CrossEntropyLoss(**(rest | more))(logits, target)

    def by_us(hidden, *parameters):
        named = dict(zip(list(inputs)[1:], parameters, strict=True))
        return torch.func.functional_call(ours, named, (hidden, target))

    cotangent = torch.randn(40) if rest.get("reduction") == "none" else torch.randn(())
    assert_matches(by_us, by_torch, by_torch, inputs, [cotangent])


def test_checkpoints_go_both_ways():
    linear = torch.nn.Linear(6, 11)
    ours = LinearCrossEntropy(6, 11, weight=torch.ones(11))
    assert not ours.load_state_dict(linear.state_dict()).missing_keys
    hidden = torch.randn(4, 6)
    assert torch.equal(ours.logits(hidden), linear(hidden))
    linear.load_state_dict(LinearCrossEntropy(6, 11).state_dict())


def test_copies_pickles_and_moves():
    ours = LinearCrossEntropy(6, 11, weight=torch.rand(11), label_smoothing=0.2, reduction="sum")
    hidden, target = torch.randn(2, 3, 6), torch.randint(11, (2, 3))
    expected = ours(hidden, target)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(hidden, target), expected)
        assert twin.weight is not ours.weight
    assert ours.to(torch.float64).class_weight.dtype == torch.float64
    assert ours(hidden.double(), target).dtype == torch.float64
    made = LinearCrossEntropy(6, 11, weight=torch.rand(11), dtype=torch.bfloat16, device="cpu")
    assert made.class_weight.dtype == made.weight.dtype == torch.bfloat16


def test_tied_weights_stay_tied():
    embedding, ours = torch.nn.Embedding(11, 6), LinearCrossEntropy(6, 11, bias=False)
    ours.weight = embedding.weight
    tokens = torch.randint(11, (7,))
    ours(embedding(tokens), tokens).backward()
    step = torch.optim.SGD([embedding.weight], 0.1)
    before = ours(embedding(tokens), tokens)
    step.step()
    assert ours(embedding(tokens), tokens) < before
    assert ours.weight is embedding.weight


def test_exports_for_any_number_of_rows():
    ours = LinearCrossEntropy(6, 11, label_smoothing=0.1, weight=torch.rand(11))
    hidden, target = torch.randn(5, 3, 6), torch.randint(11, (5, 3))
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(ours, (hidden, target), dynamic_shapes=({0: rows}, {0: rows}))
    truth = copy.deepcopy(ours).double()
    for count in (5, 2, 4):
        found = program.module()(hidden[:count], target[:count])
        assert_close_to_reference(found, truth(hidden[:count].double(), target[:count]), terms=100)


def test_says_what_it_is():
    said = repr(LinearCrossEntropy(6, 11, label_smoothing=0.1))
    assert said == (
        "LinearCrossEntropy(in_features=6, out_features=11, bias=True, ignore_index=-100, "
        "label_smoothing=0.1, reduction='mean')"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "max"}, "'mean', 'sum', 'none'.*got 'max'"),
        ({"label_smoothing": -0.1}, "between 0 and 1, got -0.1"),
        ({"weight": torch.ones(10)}, r"\[V\] = \[11\], got \[10\]"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"^fastseq.LinearCrossEntropy: expected.*{message}"):
        LinearCrossEntropy(6, 11, **options)
