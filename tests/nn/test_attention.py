"""The attention modules: parameters, checkpoints, keys projected once, and torch's machinery."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from fastseq import functional, nn
from fastseq.reference import attention as seed
from fastseq.testing import assert_close_to_reference, assert_matches
from fastseq.testing_attention import attention_case

pytestmark = pytest.mark.usefixtures("device")
B, Q, S, H, E, K = 3, 4, 6, 5, 7, 8
MODULES = {
    "additive": lambda: nn.AdditiveAttention(H, E, K),
    "additive, normalized": lambda: nn.AdditiveAttention(H, E, K, normalize=True, scale=0.7),
    "additive, no bias": lambda: nn.AdditiveAttention(H, E, K, bias=False),
    "concat": lambda: nn.ConcatAttention(H, E, K, normalize=True),
    "dot": lambda: nn.DotAttention(scale=0.3),
    "general": lambda: nn.GeneralAttention(H, E, scale=0.3),
    "location": lambda: nn.LocationAttention(H, E, K, kernel_size=5, filters=2, kinds=2),
}
KEYS = {
    "additive": ["key_proj.bias", "key_proj.weight", "query_proj.weight", "v.weight"],
    "additive, normalized": [
        "g",
        "key_proj.bias",
        "key_proj.weight",
        "query_proj.weight",
        "v.weight",
    ],
    "additive, no bias": ["key_proj.weight", "query_proj.weight", "v.weight"],
    "concat": ["attn.bias", "attn.weight", "g", "v.weight"],
    "dot": [],
    "general": ["proj.weight"],
    "location": [
        "key_proj.bias",
        "key_proj.weight",
        "location_conv.weight",
        "location_proj.weight",
        "query_proj.weight",
        "v.weight",
    ],
}


def arguments(name: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Query, keys and, for the location score, weights of earlier steps."""
    width = E if name == "dot" else H
    tensors = torch.randn(B, Q, width, dtype=dtype), torch.randn(B, S, E, dtype=dtype)
    return (*tensors, torch.rand(B, 2, S, dtype=dtype)) if name == "location" else tensors


def by_function(name: str, module: nn.Module, query, keys, *previous, **where):
    """What the module computes, from the functions on unprojected tensors."""
    where["scale"] = module.scale
    if name == "dot":
        return functional.dot_attention(query, keys, keys, **where)
    if name == "general":
        return functional.general_attention(query, keys, keys, module.proj.weight.t(), **where)
    more = {"g": module.g} | where
    v = module.v.weight[0]
    if name == "concat":
        weight, bias = module.attn.weight, module.attn.bias
        return functional.concat_attention(query, keys, keys, weight, v, bias=bias, **more)
    q, k = module.query_proj(query), keys @ module.key_proj.weight.t()
    more["bias"] = module.key_proj.bias
    if name == "location":
        taps, weight = module.location_conv.weight, module.location_proj.weight
        return functional.location_attention(q, k, keys, v, *previous, taps, weight, **more)
    return functional.additive_attention(q, k, keys, v, **more)


@pytest.mark.parametrize("name", MODULES)
def test_is_the_function_of_its_parameters(name):
    module, tensors = MODULES[name]().double(), arguments(name, torch.float64)
    assert sorted(module.state_dict()) == KEYS[name]
    where = {"lengths": torch.tensor([S, 0, 2]), "mask": torch.rand(B, S) < 0.7}
    truth = by_function(name, module, *tensors, **where)
    for found, want in zip(module(*tensors, **where), truth, strict=True):
        assert_close_to_reference(found, want, what=name, terms=B * Q * S * K)


@pytest.mark.parametrize("name", MODULES)
def test_keys_projected_once_serve_every_call(name):
    module, (query, keys, *previous) = MODULES[name](), arguments(name)
    projected = module.project_keys(keys)
    found = module(query, keys, *previous, projected=projected)
    assert all(map(torch.equal, found, module(query, keys, *previous)))
    one = module(query[:, 1], keys, *previous, projected=projected)
    assert one[0].shape == (B, E) and one[1].shape == (B, S)
    for one_found, want in zip(one, (found[0][:, 1], found[1][:, 1]), strict=True):
        assert_close_to_reference(one_found, want.double(), what=name)


@pytest.mark.parametrize("name", MODULES)
def test_values_of_their_own(name):
    module, tensors = MODULES[name](), arguments(name)
    values = torch.randn(B, S, 2)
    context, weights = module(*tensors, values=values)
    assert context.shape == (B, Q, 2)
    assert_close_to_reference(context, torch.bmm(weights, values).double(), what=name)


@pytest.mark.parametrize("name", MODULES)
def test_every_parameter_learns(name):
    module = MODULES[name]()
    context, _ = module(*arguments(name))
    context.square().sum().backward() if KEYS[name] else None
    for key, parameter in module.named_parameters():
        assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", MODULES)
def test_copies_and_conversions(name):
    module, tensors = MODULES[name](), arguments(name)
    expected = module(*tensors)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert all(map(torch.equal, twin(*tensors), expected))
    found = module.half()(*(t.half() for t in tensors))
    assert all(t.dtype == torch.float16 for t in found)


def test_made_in_a_dtype_and_on_a_device():
    sizes = {
        nn.AdditiveAttention: (4, 5, 6), nn.ConcatAttention: (4, 5, 6),
        nn.GeneralAttention: (4, 5), nn.LocationAttention: (4, 5, 6),
    }  # fmt: skip
    for kind, dims in sizes.items():
        options = {} if kind is nn.GeneralAttention else {"normalize": True}
        torch.manual_seed(3)
        module = kind(*dims, **options, device="meta", dtype=torch.float64)
        made = {name: p.shape for name, p in kind(*dims, **options).named_parameters()}
        assert {name: p.shape for name, p in module.named_parameters()} == made
        for parameter in module.parameters():
            assert parameter.is_meta and parameter.dtype == torch.float64


def test_same_seed_same_parameters():
    torch.manual_seed(3)
    first = nn.AdditiveAttention(H, E, K)
    torch.manual_seed(3)
    assert torch.equal(first.query_proj.weight, torch.nn.Linear(H, K, bias=False).weight)


def test_serves_the_checkpoint_of_the_teaching_model():
    """Same keys, same weights, and in the additive module the halves of one matrix."""
    theirs = seed.Attention(H)
    concat, additive = nn.ConcatAttention(H, H, H), nn.AdditiveAttention(H, H, H)
    concat.load_state_dict(theirs.state_dict())
    state = theirs.state_dict()
    query_half, key_half = state["attn.weight"].chunk(2, dim=1)
    additive.load_state_dict(
        {
            "query_proj.weight": query_half,
            "key_proj.weight": key_half,
            "key_proj.bias": state["attn.bias"],
            "v.weight": state["v.weight"],
        }
    )
    mask = torch.rand(B, S) < 0.6
    inputs = {"hidden": torch.randn(B, H), "outputs": torch.randn(B, S, H)}

    def call(module, **where):
        module = copy.deepcopy(module)

        def weights(hidden, outputs):
            found = module.to(hidden.dtype)(hidden, outputs, **where)
            return found[1] if where else found

        return weights

    def theirs_call(hidden, outputs):
        return copy.deepcopy(theirs).to(hidden.dtype)(hidden, outputs, mask)

    for ours in (concat, additive):
        assert_matches(call(ours, mask=mask), theirs_call, theirs_call, inputs, [torch.randn(B, S)])


def test_extra_goes_inside_the_tanh():
    case = attention_case("additive", B, Q, S, K, extra=True)
    query, keys, values, _, extra = case.inputs.values()
    module = nn.AdditiveAttention(K, K, K)
    found = module(query, keys, values, extra=extra)
    moved = module(query, keys, values, projected=module.project_keys(keys) + extra)
    for one, other in zip(found, moved, strict=True):
        assert_close_to_reference(one, other.double())
    with pytest.raises(TypeError, match="fastseq.nn.DotAttention: expected no extra"):
        nn.DotAttention()(query, keys, extra=extra)
    location = nn.LocationAttention(K, K, K)
    with torch.no_grad():
        location.location_proj.weight.zero_()
    location.load_state_dict(module.state_dict(), strict=False)
    for one, other in zip(
        location(query, keys, torch.rand(B, S), values, extra=extra), found, strict=True
    ):
        assert_close_to_reference(one, other.double())


def test_an_even_width_is_refused():
    with pytest.raises(ValueError, match="fastseq.nn.LocationAttention: .*odd kernel_size, got 4"):
        nn.LocationAttention(H, E, K, kernel_size=4)


@pytest.mark.parametrize("name", MODULES)
def test_compiles_and_exports(name):
    module, tensors = MODULES[name](), arguments(name)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    expected = module(*tensors)
    found = compiled(*tensors)
    assert all(map(torch.equal, found, expected))
    found[0].sum().backward() if KEYS[name] else None
    by_compiler = [p.grad for p in module.parameters()]
    module.zero_grad()
    expected[0].sum().backward() if KEYS[name] else None
    for grad, parameter in zip(by_compiler, module.parameters(), strict=True):
        assert_close_to_reference(grad, parameter.grad.double(), what=name)
    program = torch.export.export(module, tensors)
    assert all(map(torch.equal, program.module()(*tensors), expected))
