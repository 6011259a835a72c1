"""The beam search of the kernel against the search in Python, and against one by hand."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch

import fastseq
from fastseq import _native, explain
from fastseq.decoding import beam_search, greedy
from fastseq.functional import attention_beams
from fastseq.models import attention as fast_attention
from fastseq.models import bahdanau as fast_bahdanau
from fastseq.models import plain as fast_plain
from fastseq.reference import decoder as reference
from fastseq.testing import assert_close_to_reference
from fastseq.testing_decoder import decoder_case
from tests.decoding.test_beam import assert_found, by_hand

pytestmark = pytest.mark.skipif(not _native.loaded(), reason=str(_native.why_not_loaded()))
HOUSES = {"attention": fast_attention, "bahdanau": fast_bahdanau}


def make(kind, V=23, E=5, H=9, dtype=torch.float64):
    house = HOUSES[kind]
    model = house.Seq2Seq(house.Encoder(V, E, H), house.Decoder(V, E, H, house.Attention(H)))
    with torch.no_grad():
        for parameter in model.to(dtype).parameters():
            parameter.mul_(4.0)
    return model.eval()


def both(model, *args, **options):
    """What the kernel finds, given a source that was read, and what the search in Python does."""
    calls = []
    search = model.decoder.search
    model.in_one_call = lambda *a, **k: None
    model.decoder.search = lambda *a, **k: calls.append(search(*a, **k)) or calls[-1]
    found = beam_search(model, *args, **options)
    assert len(calls) == 1 and calls[0] is not None
    model.decoder.search = lambda *a, **k: None
    expected = beam_search(model, *args, **options)
    del model.decoder.search, model.in_one_call
    return found, expected


def assert_same(found, expected):
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.lengths, expected.lengths)
    assert_close_to_reference(found.scores, expected.scores, terms=1000)


OPTIONS = [
    {},
    {"length_penalty": 0.8, "width": 1},
    {"length_penalty": "average", "early_stop": False},
    {"length_penalty": 1.5, "early_stop": False, "min_length": 3, "width": 3, "n_best": 2},
    {"min_length": 2, "no_repeat_ngram": 1},
    {"no_repeat_ngram": 2, "length_penalty": 0.3, "early_stop": False},
    {"no_repeat_ngram": 3, "width": 23, "n_best": 23},
    {"eos": None, "no_repeat_ngram": 1},
    {"min_length": 50},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", HOUSES)
def test_it_is_the_search_in_python(kind, options, monkeypatch):
    model = make(kind)
    src, lengths = torch.randint(23, (11, 6)), torch.randint(1, 7, (11,))
    options = {"max_length": 14, "width": 4, "n_best": min(3, options.get("width", 4))} | options
    for eos in {3, 7, options.get("eos", 3)}:
        found, expected = both(model, src, lengths, **options | {"eos": eos})
        assert_same(found, expected)
    each = torch.randint(23, (11,))
    found, expected = both(model, src, **options | {"bos": each, "eos": each.flip(0)})
    assert_same(found, expected)
    if kind == "attention":
        monkeypatch.setattr(sys.modules[beam_search.__module__], "Rows", None)
        assert_same(beam_search(model, src, **options | {"bos": each, "eos": each.flip(0)}), found)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_models_without_attention(options):
    torch.manual_seed(0)
    sizes = 23, 5, 9
    model = fast_plain.Seq2Seq(fast_plain.Encoder(*sizes), fast_plain.Decoder(*sizes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    src = torch.randint(23, (11, 6))
    options = {"max_length": 14, "width": 4, "n_best": min(3, options.get("width", 4))} | options
    found, expected = both(model, src, **options)
    assert_same(found, expected)
    assert explain(beam_search, model, src).backend == "cpu"
    greedy_one = greedy(model, src, max_length=14)
    assert torch.equal(greedy_one, beam_search(model, src, max_length=14, width=1).tokens[:, 0])
    model.decoder.generate = lambda *_, **__: None
    assert torch.equal(greedy_one, greedy(model, src, max_length=14))


def test_targets_end_at_different_steps():
    model = make("attention")
    found, _ = both(model, torch.randint(23, (30, 6)), max_length=20, width=3, n_best=3, eos=5)
    assert len(set(found.lengths.flatten().tolist())) > 4


CASES = [
    dict(cell=cell, score=score, **order)
    for cell, score, order in itertools.product(
        ("lstm", "gru", "rnn_tanh"),
        ("additive", "dot"),
        (
            {},
            {"L": 2, "residual": True},
            {"after": True},
            {"after": True, "feeds": True, "L": 3, "bias": False},
        ),
    )
]


@torch.no_grad()
@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(map(str, o.values())))
def test_every_decoder_by_hand(options):
    case = decoder_case(T=1, B=4, S=5, H=6, K=6, masked=True, forced=(True,), dtype=torch.float64,
                        **options)  # fmt: skip
    i, more = dict(case.inputs), dict(case.options)
    output, embedding = more["output"], i.pop("embedding")
    hx = tuple(i.pop(name) for name in ("h0", "c0") if name in i)
    given = {"query_weight": i.pop("query_weight"), "v": i.pop("v", None), "embedding": embedding}
    if "combine_weight" in i:
        given["combine"] = (i.pop("combine_weight"), i.pop("combine_bias", None))
    i.pop("feed", None)
    keys, values, params = i.pop("keys"), i.pop("values"), list(i.values())
    for name in ("cell", "has_biases", "input_feeding", "residual", "scale", "mask"):
        given[name] = more[name]
    start, ends = torch.tensor([2, 5, 0, 2]), torch.tensor([3, 3, 1, 6])
    found = attention_beams(
        start, hx, keys, values, params, output=output, penalties=[1.0] * 7, width=3, n_best=2,
        ends=ends, **given,
    )  # fmt: skip

    def log_p(b, history):
        row = slice(b, b + 1)
        features = reference.attention_decoder(
            torch.tensor([[int(start[b]), *history[1:]]]), tuple(t[:, row] for t in hx), keys[row],
            values[row], params, **given | {"mask": given["mask"][row]},
        )[0]  # fmt: skip
        return torch.nn.functional.linear(features[0, -1], *output).log_softmax(0).tolist()

    for b in range(4):
        expected = by_hand(lambda history, b=b: log_p(b, history), 3, 6, n_best=2, eos=int(ends[b]))
        assert_found(found, b, expected)


def test_equal_scores_go_by_hypothesis_and_token():
    model = make("attention")
    with torch.no_grad():
        model.decoder.fc.weight.zero_()
        model.decoder.fc.bias.zero_()
    src = torch.zeros(1, 3, dtype=torch.int64)
    found, expected = both(model, src, max_length=2, width=3, n_best=3, eos=0)
    assert found.tokens[0].tolist() == [[0, 0], [1, 0], [1, 1]]
    assert_same(found, expected)


@pytest.mark.parametrize("kind", HOUSES)
def test_same_bits_for_any_threads_and_company(kind):
    model = make(kind, V=301, E=40, H=48, dtype=torch.float32)
    src = torch.randint(301, (9, 12))
    options = {"max_length": 9, "width": 5, "n_best": 5, "length_penalty": 0.7}
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(beam_search(model, src, **options))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    outputs, state = model.encoder(src)
    state = state if isinstance(state, tuple) else (state,)
    start = torch.full((9,), 2)
    together, alone = (
        [
            model.decoder.search(
                start[rows], *(t[:, rows] for t in state), outputs[rows], width=5, n_best=5,
                penalties=[1.0] * 8,
            )
            for rows in parts
        ]
        for parts in ([slice(0, 9)], [slice(b, b + 1) for b in range(9)])
    )  # fmt: skip
    with torch.no_grad():
        for i, tensor in enumerate(together[0]):
            assert torch.equal(tensor, torch.cat([one[i] for one in alone]))


def test_instruction_sets_agree():
    before = _native.isa()
    model, src = make("bahdanau"), torch.randint(23, (7, 5))
    found = []
    try:
        for isa in _native.available_isas():
            _native.set_isa(isa)
            found.append(beam_search(model, src, max_length=9, width=4, n_best=4))
    finally:
        _native.set_isa(before)
    for other in found[1:]:
        assert_same(other, found[0])


def test_half_dtypes_are_searched_in_float32():
    model = make("attention").bfloat16()
    found = beam_search(model, torch.randint(23, (4, 5)), max_length=9, width=4, n_best=4)
    assert found.scores.isfinite().all() and (found.scores.diff(dim=1) <= 0).all()


def test_what_the_kernel_leaves_to_python():
    model, src = make("bahdanau"), torch.randint(23, (3, 4))
    expected = beam_search(model, src, max_length=5)
    search = model.decoder.search
    with fastseq.use_backend("torch"):
        assert_same(beam_search(model, src, max_length=5), expected)
    outputs, hidden = model.encoder(src)
    options = {"width": 2, "penalties": [1.0] * 3}
    assert search(src[:, 0], hidden, outputs, **options) is not None
    model.train()
    assert search(src[:, 0], hidden, outputs, **options) is None
    model.eval().decoder.fc.register_forward_hook(lambda *_: None)
    assert search(src[:, 0], hidden, outputs, **options) is None
    assert_same(beam_search(model, src, max_length=5), expected)


def test_logits_that_are_nan():
    model = make("attention")
    with torch.no_grad():
        model.decoder.fc.bias[4] = torch.nan
    with pytest.raises(RuntimeError, match="^fastseq.*expected logits without NaN"):
        beam_search(model, torch.randint(23, (2, 4)), width=2)


def test_a_start_outside_the_vocabulary():
    with pytest.raises(IndexError, match=r"0\.\.22"):
        beam_search(make("attention"), torch.randint(23, (2, 4)), bos=23)


BAD = [
    ({"width": 0}, ValueError, "width of at least 1, got 0"),
    ({"width": 99}, ValueError, "width of at most V = [0-9]+, got 99"),
    ({"n_best": 0}, ValueError, "n_best between 1 and width = 3, got 0"),
    ({"n_best": 4}, ValueError, "n_best between 1 and width = 3, got 4"),
    ({"min_length": -1}, ValueError, "min_length of at least 0, got -1"),
    ({"no_repeat_ngram": -2}, ValueError, "no_repeat_ngram of at least 0, got -2"),
    ({"penalties": [1.0]}, ValueError, "penalties of at least 2"),
    ({"penalties": [1.0, 0.0]}, ValueError, "penalties of at least 2 finite numbers above 0"),
    ({"penalties": [1.0, float("nan")]}, ValueError, "penalties of at least 2 finite numbers"),
    ({"ends": torch.tensor([0, 1, 99])}, ValueError, "eos in 0.."),
    ({"ends": torch.tensor([0, 1])}, ValueError, r"ends of shape \[B\] = \[3\]"),
    ({"start": torch.tensor([0, -1, 2])}, IndexError, "tokens in 0.."),
    ({"start": None}, ValueError, r"start of shape \[B\]"),
    ({"mask": torch.ones(3, 9, dtype=torch.bool)}, ValueError, r"mask of shape \[B, S\]"),
    ({"lengths": torch.tensor([1, 2, 9])}, ValueError, "lengths between 0 and S = 5"),
    ({"output": None}, ValueError, "output as a tuple"),
    ({"embedding": None}, ValueError, "an embedding"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=[str(row[0]) for row in BAD])
def test_bad_arguments(change, kind, message):
    case = decoder_case("gru", T=1, B=3, S=5, forced=(True,))
    i = case.inputs
    arguments = {
        "start": torch.tensor([1, 2, 0]), "hx": (i["h0"],), "keys": i["keys"], "cell": "gru",
        "values": i["values"], "embedding": i["embedding"], "query_weight": i["query_weight"],
        "v": i["v"], "params": [t for n, t in i.items() if n.startswith(("weight_", "bias_"))],
        "output": tuple(t.float() for t in case.options["output"]), "penalties": [1.0] * 4,
        "width": 3,
    }  # fmt: skip
    tokens, scores, lengths = attention_beams(**arguments)
    assert not scores.requires_grad and lengths.tolist() == [[3]] * 3
    with pytest.raises(kind, match=f"^fastseq.attention_beams: expected {message}"):
        attention_beams(**arguments | change)
    with fastseq.use_backend("torch"), pytest.raises(NotImplementedError, match="fastseq.decoding"):
        attention_beams(**arguments)


def test_opcheck():
    from fastseq.ops.decoder import DECODER_CELLS
    from fastseq.ops.decoder_beams import attention_decoder_beams

    case = decoder_case("gru", T=1, forced=(True,))
    i = case.inputs
    weights = [t for name, t in i.items() if name.startswith(("weight_", "bias_"))]
    weight, bias = (t.float() for t in case.options["output"])
    arguments = (
        DECODER_CELLS["gru"].number, torch.tensor([1, 2, 3]), None, i["embedding"], i["h0"], None,
        i["keys"], i["values"], None, weights, True, i["query_weight"], i["v"], None, None,
        False, False, 0.7, weight, bias, torch.ones(5, dtype=torch.float64), 3, 2, 0, 0, True,
    )  # fmt: skip
    torch.library.opcheck(attention_decoder_beams, arguments)
