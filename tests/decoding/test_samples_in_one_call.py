"""The kernel's sampling against the loop in Python, and against the distribution by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import fastseq
from fastseq import _native, explain, functional
from fastseq.decoding import sample, sampling
from fastseq.models import attention as fast_attention
from fastseq.models import bahdanau as fast_bahdanau
from fastseq.models import plain as fast_plain
from fastseq.reference import decoder as reference
from fastseq.testing_decoder import decoder_case
from tests.decoding.test_sampling import chi_square_p, counts_of, kept_by

pytestmark = pytest.mark.skipif(not _native.loaded(), reason=str(_native.why_not_loaded()))
V = 23


def make(kind, vocabulary=V, E=5, H=9, dtype=torch.float64):
    sizes = vocabulary, E, H
    if kind == "plain":
        model = fast_plain.Seq2Seq(fast_plain.Encoder(*sizes), fast_plain.Decoder(*sizes))
    else:
        house = {"attention": fast_attention, "bahdanau": fast_bahdanau}[kind]
        model = house.Seq2Seq(house.Encoder(*sizes), house.Decoder(*sizes, house.Attention(H)))
    with torch.no_grad():
        for parameter in model.to(dtype).parameters():
            parameter.mul_(4.0)
    return model.eval()


def both(model, *args, **options):
    """What the kernel draws, and what the loop in Python does; the generators' states after are the
    same. The kernel is given a source that was read, and, where it can be, the source itself."""
    calls, states, tokens = [], [], []
    draw, whole = model.decoder.draw, getattr(model, "in_one_call", lambda *a, **k: None)
    ways = (
        (lambda *a, **k: None, lambda *a, **k: None),
        (lambda *a, **k: calls.append(draw(*a, **k)) or calls[-1], lambda *a, **k: None),
        (draw, whole),
    )
    for model.decoder.draw, model.in_one_call in ways:
        generator = torch.Generator().manual_seed(7)
        tokens.append(sample(model, *args, **options, generator=generator))
        states.append(generator.get_state())
    del model.decoder.draw, model.in_one_call
    assert len(calls) == 1 and calls[0] is not None
    for state in states[1:]:
        assert torch.equal(states[0], state)
    assert torch.equal(tokens[1], tokens[2])
    return tokens[1], tokens[0]


LEFT_OUT = [
    dict(temperature=temperature, top_k=top_k, top_p=top_p)
    for temperature, top_k, top_p in itertools.product(
        (0.3, 1.0, 4.0), (None, 1, 4, 22, V), (1e-9, 0.5, 0.95, 1.0)
    )
]


@pytest.mark.parametrize("kind", ["attention", "bahdanau", "plain"])
def test_it_is_the_loop_in_python(kind):
    model = make(kind)
    src, lengths = torch.randint(V, (11, 6)), torch.randint(1, 7, (11,))
    if kind == "plain":
        lengths = None
    seen = set()
    for options in LEFT_OUT:
        found, expected = both(model, src, lengths, 9, eos=7, **options)
        assert torch.equal(found, expected), options
        seen.update(found.flatten().tolist())
    assert len(seen) > V // 2
    each = torch.randint(V, (11,))
    assert torch.equal(*both(model, src, lengths, bos=each, eos=each.flip(0)))
    assert torch.equal(*both(model, src, lengths, 4, eos=None))
    # Not a token at all: none ends.
    assert torch.equal(*both(model, src, lengths, 4, eos=V + 3))


@pytest.mark.parametrize("vocabulary", [2, 8, 63, 64, 65, 200, 1030])
def test_any_vocabulary(vocabulary):
    model = make("attention", vocabulary)
    src = torch.randint(vocabulary, (40, 4))
    for options in (
        {}, {"top_k": 2}, {"top_k": 60}, {"top_k": vocabulary // 2}, {"top_p": 0.9},
        {"top_p": 0.999, "temperature": 5.0}, {"top_k": 50, "top_p": 0.7}, {"top_p": 1 - 1e-12},
    ):  # fmt: skip
        found, expected = both(model, src, max_length=5, bos=1, eos=0, **options)
        assert torch.equal(found, expected), options


def test_equal_tokens_go_by_their_number():
    """At the borders: all tokens of the same probability, and nearly all of none."""
    model = make("attention", vocabulary=64)
    with torch.no_grad():
        model.decoder.fc.weight.zero_()
        model.decoder.fc.bias.zero_()
    src = torch.zeros(400, 2, dtype=torch.int64)
    for options in (
        {}, {"top_k": 5}, {"top_k": 16, "top_p": 0.5}, {"top_p": 0.25}, {"top_p": 0.26},
        {"temperature": 1e-300}, {"temperature": 1e300, "top_k": 7},
    ):  # fmt: skip
        found, expected = both(model, src, max_length=2, eos=None, **options)
        assert torch.equal(found, expected)
    with torch.no_grad():
        model.decoder.fc.bias.fill_(-math.inf)[[5, 40]] = 0
    for options in ({}, {"top_k": 5}, {"top_p": 0.5}, {"top_p": 0.51}, {"top_k": 64}):
        found, expected = both(model, src, max_length=2, eos=None, **options)
        assert torch.equal(found, expected)
        assert set(found.flatten().tolist()) <= {5, 40}


OPTIONS = [
    {},
    {"temperature": 3.0},
    {"top_k": 3},
    {"top_p": 0.7},
    {"top_k": 5, "top_p": 0.8, "temperature": 1.7},
]


def given_case(options, B):
    case = decoder_case(
        T=1, B=1, S=5, H=6, K=6, masked=True, forced=(True,), dtype=torch.float64, **options
    )
    i, more = dict(case.inputs), dict(case.options)
    given = {"query_weight": i.pop("query_weight"), "v": i.pop("v", None)}
    given["embedding"] = i.pop("embedding")
    hx = tuple(i.pop(name).expand(-1, B, -1) for name in ("h0", "c0") if name in i)
    if "combine_weight" in i:
        given["combine"] = (i.pop("combine_weight"), i.pop("combine_bias", None))
    i.pop("feed", None)
    keys, values = (i.pop(name).expand(B, -1, -1) for name in ("keys", "values"))
    params = list(i.values())
    for name in ("cell", "has_biases", "input_feeding", "residual", "scale"):
        given[name] = more[name]
    given["mask"] = more["mask"].expand(B, -1)
    return (hx, keys, values, params), given, more["output"]


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "decoder", [{}, {"cell": "gru", "L": 2, "residual": True}, {"after": True, "feeds": True}],
    ids=str,
)  # fmt: skip
def test_the_distribution_of_every_decoder(decoder, options):
    B = 4000
    (hx, keys, values, params), given, output = given_case(decoder, B)
    start = torch.full((B,), 2)
    drawn = torch.rand(2, B, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    tokens, lengths = functional.attention_samples(
        start, hx, keys, values, params, output=output, drawn=drawn, **options, **given
    )
    assert lengths.tolist() == [2] * B

    def p_after(history):
        features = reference.attention_decoder(
            torch.tensor([history]), tuple(t[:, :1] for t in hx), keys[:1], values[:1], params,
            **given | {"mask": given["mask"][:1]},
        )[0]  # fmt: skip
        logits = torch.nn.functional.linear(features[0, -1], *output)
        p = (logits / options.get("temperature", 1.0)).softmax(0)
        return kept_by(p, options.get("top_k", len(p)), options.get("top_p", 1.0))

    first = p_after([2])
    vocabulary = len(first)
    assert chi_square_p(counts_of(tokens[:, 0], vocabulary), first) > 1e-4
    likely = int(first.argmax())
    after = tokens[tokens[:, 0] == likely, 1]
    assert chi_square_p(counts_of(after, vocabulary), p_after([2, likely])) > 1e-4


def test_same_tokens_for_any_threads_and_company():
    model = make("attention", 301, 40, 48, dtype=torch.float32)
    src = torch.randint(301, (9, 12))
    outputs, state = model.encoder(src)
    start, ends = torch.full((9,), 2), torch.full((9,), 3)
    drawn = torch.rand(15, 9, dtype=torch.float64)

    def draw(rows, **options):
        return model.decoder.draw(
            start[rows], *(t[:, rows] for t in state), outputs[rows], ends=ends[rows],
            drawn=drawn[:, rows], **options,
        )  # fmt: skip

    for options in ({}, {"top_k": 40, "top_p": 0.9}):
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(draw(slice(0, 9), **options))
        alone = [draw(slice(b, b + 1), **options) for b in range(9)]
        results.append([torch.cat(each) for each in zip(*alone, strict=True)])
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


def test_instruction_sets_agree():
    before = _native.isa()
    model, src = make("bahdanau"), torch.randint(V, (40, 5))
    found = []
    try:
        for isa in _native.available_isas():
            _native.set_isa(isa)
            for options in ({}, {"top_k": 7}, {"top_p": 0.8}):
                found.append(sample(model, src, max_length=9, generator=1, **options))
    finally:
        _native.set_isa(before)
    for i, other in enumerate(found):
        assert torch.equal(other, found[i % 3])


def test_tokens_past_an_end_are_padding():
    model = make("attention")
    src, free = torch.randint(V, (30, 6)), {"max_length": 20, "generator": 4}
    ended, full = sample(model, src, eos=5, **free), sample(model, src, eos=None, **free)
    lengths = set()
    for row, whole in zip(ended.tolist(), full.tolist(), strict=True):
        end = whole.index(5) + 1 if 5 in whole else 20
        assert row == (whole[:end] + [0] * 20)[: len(row)]
        lengths.add(end)
    assert len(lengths) > 4


def test_the_source_is_read_in_the_same_call(monkeypatch):
    model, src = make("attention"), torch.randint(V, (6, 5))
    expected, after = sample(model, src, max_length=9, generator=2), sample(model, src, generator=3)
    monkeypatch.setattr(sampling, "Rows", None)
    assert torch.equal(sample(model, src, max_length=9, generator=2), expected)
    assert torch.equal(sample(model, src, generator=3), after)


def test_what_the_kernel_leaves_to_python(monkeypatch):
    model, src = make("bahdanau"), torch.randint(V, (3, 4))
    expected = sample(model, src, max_length=5, generator=0)
    assert explain(sample, model, src).backend == "cpu"
    with fastseq.use_backend("torch"):
        assert torch.equal(sample(model, src, max_length=5, generator=0), expected)
    draw = model.decoder.draw
    outputs, hidden = model.encoder(src)
    drawn = torch.rand(2, 3, dtype=torch.float64)
    assert draw(src[:, 0], hidden, outputs, drawn=drawn) is not None
    model.train()
    assert draw(src[:, 0], hidden, outputs, drawn=drawn) is None
    model.eval().decoder.fc.register_forward_hook(lambda *_: None)
    assert draw(src[:, 0], hidden, outputs, drawn=drawn) is None
    assert torch.equal(sample(model, src, max_length=5, generator=0), expected)
    # More numbers than are drawn ahead.
    model = make("attention")
    expected = sample(model, src, max_length=5, generator=0)
    monkeypatch.setattr(sampling, "MOST_AHEAD", 14)
    monkeypatch.setattr(model.decoder, "draw", lambda *_, **__: pytest.fail("drawn ahead"))
    assert torch.equal(sample(model, src, max_length=5, generator=0), expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_distribution(value):
    model = make("attention")
    with torch.no_grad():
        model.decoder.fc.bias[slice(None) if value < 0 else 4] = value
    for options in ({}, {"top_k": 2}, {"top_p": 0.5}):
        with pytest.raises(RuntimeError, match="^fastseq.*expected finite logits, got NaN or all"):
            sample(model, torch.randint(V, (2, 4)), **options)


def test_half_dtypes_are_drawn_from_in_float32():
    model = make("attention").bfloat16()
    assert sample(model, torch.randint(V, (4, 5)), max_length=9, eos=None).shape == (4, 9)


B = 3
BAD = [
    ({"drawn": torch.rand(2, B)}, TypeError, "drawn to be a float64 tensor, got torch.float32"),
    ({"drawn": torch.rand(2, B + 1).double()}, ValueError, r"drawn of shape \[N, B\] with B = 3"),
    ({"drawn": torch.ones(2, B).double()}, ValueError, r"drawn in \[0, 1\)"),
    ({"drawn": torch.full((2, B), math.nan).double()}, ValueError, r"drawn in \[0, 1\)"),
    ({"temperature": 0.0}, ValueError, "a finite temperature above 0, got 0"),
    ({"top_k": 0}, ValueError, "top_k of at least 1, got 0"),
    ({"top_p": 1.5}, ValueError, "top_p above 0 and at most 1, got 1.5"),
    ({"ends": torch.zeros(2, dtype=torch.int64)}, ValueError, r"ends of shape \[B\] = \[3\]"),
    ({"ends": torch.zeros(B)}, TypeError, "ends to be an int64 tensor"),
    ({"start": torch.tensor([0, 1, 99])}, IndexError, "tokens in 0.."),
    ({"start": torch.zeros(B, 1, dtype=torch.int64)}, ValueError, r"start of shape \[B\]"),
    ({"mask": torch.ones(B, 9)}, TypeError, "mask to be a bool tensor"),
    ({"lengths": torch.tensor([1, 2, 9])}, ValueError, "lengths between 0 and S = 5"),
    ({"cell": "lstmp"}, ValueError, "cell to be one of"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=[row[2] for row in BAD])
def test_bad_arguments(change, kind, message):
    (hx, keys, values, params), given, output = given_case({}, B)
    arguments = {"start": torch.tensor([1, 2, 0]), "drawn": torch.rand(2, B, dtype=torch.float64)}
    arguments |= {"output": output, **given}
    functional.attention_samples(hx=hx, keys=keys, values=values, params=params, **arguments)
    with pytest.raises(kind, match=f"^fastseq.attention_samples: expected {message}"):
        functional.attention_samples(
            hx=hx, keys=keys, values=values, params=params, **arguments | change
        )


def test_lengths_are_a_mask():
    (hx, keys, values, params), given, output = given_case({}, B)
    arguments = {"start": torch.tensor([1, 2, 0]), "output": output, **given, "mask": None}
    arguments["drawn"] = torch.rand(6, B, dtype=torch.float64)
    lengths = torch.tensor([1, 4, 0])
    mask = torch.arange(5) < lengths.unsqueeze(1)
    found = [
        functional.attention_samples(
            hx=hx, keys=keys, values=values, params=params, **arguments | which
        )[0]
        for which in ({"lengths": lengths}, {"mask": mask}, {})
    ]
    assert torch.equal(*found[:2]) and not torch.equal(found[0], found[2])


def test_opcheck():
    from fastseq.ops.decoder import DECODER_CELLS
    from fastseq.ops.decoder_samples import attention_decoder_samples

    case = decoder_case("gru", T=1, forced=(True,))
    i = case.inputs
    weights = [t for name, t in i.items() if name.startswith(("weight_", "bias_"))]
    weight, bias = (t.float() for t in case.options["output"])
    arguments = (
        DECODER_CELLS["gru"].number, torch.tensor([1, 2, 3]), None, i["embedding"], i["h0"], None,
        i["keys"], i["values"], None, weights, True, i["query_weight"], i["v"], None, None,
        False, False, 0.7, weight, bias, torch.rand(4, 3, dtype=torch.float64), 0.8, 3, 0.9,
    )  # fmt: skip
    torch.library.opcheck(attention_decoder_samples, arguments)
