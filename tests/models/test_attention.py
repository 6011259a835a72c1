"""The attention model: keys projected once, sources of unequal length, masks."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn.utils import prune

from fastseq.models import attention as fast_house
from fastseq.reference import attention as reference_house
from fastseq.reference.attention import length_mask
from fastseq.testing import assert_close_to_reference, assert_matches, run_with_grads


def _attentions(hidden, dtype=torch.float64):
    reference = reference_house.Attention(hidden).to(dtype)
    fast = fast_house.Attention(hidden).to(dtype)
    fast.load_state_dict(reference.state_dict())
    return reference, fast


def _weights(attention, mask=None):
    names = dict(attention.named_parameters())

    def call(hidden, encoder_outputs, *parameters):
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(attention, given, (hidden, encoder_outputs, mask))

    return call, names


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 5, 3), (7, 13, 8), (3, 31, 17)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_and_gradients(dtype, sizes, masked, assert_same):
    rows, source, hidden = sizes
    reference, fast = _attentions(hidden, dtype)
    mask = torch.rand(rows, source) < 0.6 if masked else None
    call, parameters = _weights(fast, mask)
    expected, _ = _weights(reference, mask)
    inputs = {
        "hidden": torch.randn(rows, hidden, dtype=dtype),
        "encoder_outputs": torch.randn(rows, source, hidden, dtype=dtype),
        **parameters,
    }
    cotangents = [torch.randn(rows, source, dtype=dtype)]
    if dtype == torch.float32:
        assert_matches(call, expected, expected, inputs, cotangents)
    else:
        truth = run_with_grads(expected, inputs, cotangents)
        assert_same(run_with_grads(call, inputs, cotangents), truth)


def test_masked_positions_weigh_nothing_and_the_rest_sums_to_one():
    mask = torch.tensor([[True, True, False], [False, False, True], [False, False, False]])
    for attention in _attentions(4):
        weights = attention(torch.randn(3, 4).double(), torch.randn(3, 3, 4).double(), mask)
        assert not weights[~mask].any()
        assert_close_to_reference(weights.sum(1), torch.tensor([1.0, 1.0, 0.0]).double())
        assert weights[1, 2] == 1


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_rows_without_anything_to_attend_to_stay_finite(make_pair):
    mask = torch.tensor([[True, False], [False, False]])
    with torch.autograd.detect_anomaly(check_nan=True):
        for model in make_pair("attention"):
            outputs, (h, c) = model.encoder(torch.tensor([[1, 2], [3, 4]]))
            logits, *_, weights = model.decoder(torch.tensor([[5], [6]]), h, c, outputs, mask)
            assert not weights[1].any()
            logits.sum().backward()
            grads = [p.grad for p in model.parameters()]
            assert all(g.isfinite().all() for g in [logits, *grads])


@pytest.mark.parametrize("masked", [False, True])
def test_decoder_calls_one_by_one_are_the_whole_target(masked, make_pair):
    src, trg = torch.randint(11, (3, 5)), torch.randint(11, (3, 6))
    mask = torch.rand(3, 5) < 0.7 if masked else None
    reference, fast = make_pair("attention")
    outputs, (h, c) = fast.encoder(src)
    coins = [True, False, False, True, True]
    whole = fast.decoder.decode(trg, [True, *coins[:-1]], h, c, outputs, mask)
    token, mine, theirs = trg[:, :1], (h, c), (h, c)
    for t, forced in enumerate(coins):
        logits, *mine, weights = fast.decoder(token, *mine, outputs, mask)
        expected, *theirs, wanted = reference.decoder(token, *theirs, outputs, mask)
        assert logits.shape == (3, 1, 11) and weights.shape == (3, 1, 5)
        assert_close_to_reference(logits, expected)
        assert_close_to_reference(weights, wanted)
        assert_close_to_reference(logits[:, 0], whole[:, t])
        token = trg[:, t + 1 : t + 2] if forced else logits.argmax(2)


@torch.no_grad()
def test_encoder_outputs_written_to_between_steps(make_pair):
    reference, fast = make_pair("attention")
    src, token = torch.randint(11, (3, 5)), torch.randint(11, (3, 1))
    outputs, state = fast.encoder(src)
    for factor in (1.0, -0.5):
        outputs.mul_(factor)
        logits = fast.decoder(token, *state, outputs)[0]
        assert_close_to_reference(logits, reference.decoder(token, *state, outputs)[0])


LENGTHS = [(1, 1), (3, 5), (5, 1, 4), (2, 7, 7, 3), (4, 4)]


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths_like_the_reference(lengths, ratio, make_pair, results, assert_same):
    steps = max(lengths) + 1 if lengths == (2, 7, 7, 3) else max(lengths)
    src = torch.randint(11, (len(lengths), steps))
    trg = torch.randint(11, (len(lengths), 5))
    cotangent = torch.randn(len(lengths), 5, 11)
    reference, fast = make_pair("attention")
    expected, actual = (
        results(model, cotangent, src, trg, ratio, torch.tensor(lengths))
        for model in (reference, fast)
    )
    assert_same(actual, expected)


def test_padding_influences_nothing(make_pair, results, assert_same):
    lengths = torch.tensor([2, 6, 4])
    src, trg = torch.randint(11, (3, 6)), torch.randint(11, (3, 5))
    other = torch.where(length_mask(lengths, 6), src, (src + 1) % 11)
    assert not torch.equal(src, other)
    cotangent = torch.randn(3, 5, 11)
    for model in make_pair("attention"):
        one = results(model, cotangent, src, trg, 1.0, lengths)
        two = results(model, cotangent, other, trg, 1.0, lengths)
        wider = results(model, cotangent, torch.nn.functional.pad(src, (0, 3)), trg, 1.0, lengths)
        for name, value in one.items():
            assert torch.equal(value, two[name]), name
        assert_same(wider, one)


def test_a_padded_row_is_decoded_as_if_alone(make_pair):
    lengths = torch.tensor([2, 6, 4])
    src, trg = torch.randint(11, (3, 6)), torch.randint(11, (3, 5))
    for model in make_pair("attention"):
        together = model(src, trg, 0.0, lengths)
        outputs, (h, c) = model.encoder(src, lengths)
        for row, length in enumerate(lengths.tolist()):
            alone = model(src[row : row + 1, :length], trg[row : row + 1], 0.0)
            assert_close_to_reference(together[row], alone[0])
            expected, (h1, c1) = model.encoder(src[row : row + 1, :length])
            assert_close_to_reference(outputs[row, :length], expected[0])
            assert not outputs[row, length:].any()
            assert_close_to_reference(h[:, row], h1[:, 0])
            assert_close_to_reference(c[:, row], c1[:, 0])


def test_full_rows_skip_the_packing(make_pair, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("packed")

    monkeypatch.setattr(fast_house, "pack_padded_sequence", fail)
    _, fast = make_pair("attention")
    src = torch.randint(11, (2, 4))
    assert torch.equal(fast(src, src, 1.0, torch.tensor([4, 4])), fast(src, src, 1.0))


def test_keys_are_projected_once_a_source(make_pair, monkeypatch):
    _, fast = make_pair("attention")
    sources = []
    split = fast_house.Attention.split
    monkeypatch.setattr(
        fast_house.Attention, "split", lambda self, y: sources.append(y) or split(self, y)
    )
    src = torch.randint(11, (2, 4))
    # Full sources are one operator's, which has no part to be called twice.
    fast(src, torch.randint(11, (2, 9)), 0.5, torch.tensor([4, 3]))
    assert len(sources) == 1


def test_logits_wait_for_two_products_a_run(make_pair):
    _, fast = make_pair("attention")
    shapes = []
    fast.decoder.fc.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape[:2]))
    tokens = torch.randint(11, (3, 6))
    fast(tokens, tokens, 1.0)
    assert shapes == [(2, 5), (1, 5)]
    fast(tokens[:1], tokens[:1], 1.0)
    assert shapes[2:] == [(1, 3), (1, 2)]
    fast(tokens, tokens, 0.0)
    assert shapes[4:] == [(3, 1)] * 5


def _prune(attention):
    prune.random_unstructured(attention.attn, "weight", amount=0.5)


def _old_weight_norm(attention):
    torch.nn.utils.weight_norm(attention.attn)


def _parametrized(attention):
    torch.nn.utils.parametrizations.weight_norm(attention.attn)


def _replaced_by_a_layer_of_its_own(attention):
    class Doubling(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    attention.attn.__class__ = Doubling


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    "change", [_prune, _old_weight_norm, _parametrized, _replaced_by_a_layer_of_its_own]
)
def test_changed_attention_layers(change, make_pair, results, assert_same):
    src, trg = torch.randint(11, (3, 4)), torch.randint(11, (3, 6))
    cotangent = torch.randn(3, 6, 11)
    found = []
    for model in make_pair("attention"):
        torch.manual_seed(2)
        change(model.decoder.attention)
        results(model, cotangent, src, trg)
        with torch.no_grad():
            for parameter in model.decoder.attention.parameters():
                parameter.add_(0.1)
        found.append(results(model, cotangent, src, trg))
    assert_same(found[1], found[0])


def test_a_hook_sees_the_weights_of_every_step(make_pair):
    src, trg = torch.randint(11, (3, 4)), torch.randint(11, (3, 6))
    seen = []
    for model in make_pair("attention"):
        weights = []
        model.decoder.attention.register_forward_hook(
            lambda *args, weights=weights: weights.append(args[-1])
        )
        random.seed(2)
        model(src, trg)
        seen.append(torch.stack(weights, dim=1))
    assert seen[1].shape == (3, 5, 4)
    assert_close_to_reference(seen[1], seen[0])


MASKS = [
    (torch.ones(2, 4), TypeError, "expected mask to be a bool tensor"),
    (torch.ones(2, 4, dtype=torch.int64), TypeError, "got torch.int64"),
    ([[True] * 4] * 2, TypeError, "got list"),
    (torch.ones(2, 3, dtype=torch.bool), ValueError, r"\[B, S\] = \[2, 4\], got \[2, 3\]"),
    (torch.ones(4, dtype=torch.bool), ValueError, r"got \[4\]"),
]


@pytest.mark.parametrize(("mask", "kind", "message"), MASKS)
def test_bad_masks(mask, kind, message, make_pair):
    for model in make_pair("attention"):
        outputs, (h, c) = model.encoder(torch.ones(2, 4, dtype=torch.int64))
        with pytest.raises(kind, match=f"^fastseq.attention: .*{message}"):
            model.decoder(torch.ones(2, 1, dtype=torch.int64), h, c, outputs, mask)


BAD_LENGTHS = [
    (torch.tensor([0, 4]), ValueError, "between 1 and S = 4, got 0 to 4"),
    (torch.tensor([5, 1]), ValueError, "got 1 to 5"),
    (torch.tensor([4]), ValueError, r"got \[1\] for \[2, 4\]"),
    (torch.tensor([[4, 4]]), ValueError, r"got \[1, 2\]"),
    (torch.tensor([4.0, 4.0]), TypeError, "got torch.float32"),
    ([4, 4], TypeError, "got list"),
]


@pytest.mark.parametrize(("lengths", "kind", "message"), BAD_LENGTHS)
def test_bad_lengths(lengths, kind, message, make_pair):
    src = torch.ones(2, 4, dtype=torch.int64)
    for model in make_pair("attention"):
        for call in (model.encoder, lambda x, n, model=model: model(x, x, 1.0, n)):
            with pytest.raises(kind, match=f"^fastseq.attention: .*{message}"):
                call(src, lengths)


def test_a_query_for_each_row():
    for attention in _attentions(3):
        with pytest.raises(RuntimeError):
            attention(torch.ones(1, 3).double(), torch.ones(2, 4, 3).double())


def _hooked(attention):
    attention.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("change", [None, _prune, _hooked])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("width", [1, 2, 5])
def test_several_rows_ask_one_source(width, masked, change, make_pair, assert_same):
    """As if the source were repeated for each, in values and gradients, for some sources too."""
    B, S, H = 3, 5, 7
    reference, fast = (model.decoder for model in make_pair("attention"))
    for decoder in (reference, fast):
        torch.manual_seed(2)
        if change is not None:
            change(decoder.attention)
    mask = torch.rand(B, S) < 0.7 if masked else None
    kept = torch.tensor([2, 0])
    tokens = [torch.randint(11, (B * width, 1)), torch.randint(11, (2 * width, 1))]
    later = (kept.unsqueeze(1) * width + torch.arange(width)).flatten()

    def of_fast(outputs, h, c):
        step = fast.stepper(outputs, mask)
        _, h, c, first = step(tokens[0], h, c)
        return first, *step.select(kept)(tokens[1], h[:, later], c[:, later])

    def of_reference(outputs, h, c):
        outputs = outputs.repeat_interleave(width, 0)
        whole = None if mask is None else mask.repeat_interleave(width, 0)
        _, h, c, first = reference(tokens[0], h, c, outputs, whole)
        some = None if mask is None else whole[later]
        return first, *reference(tokens[1], h[:, later], c[:, later], outputs[later], some)

    inputs = {"outputs": torch.randn(B, S, H).double()}
    inputs |= {name: torch.randn(1, B * width, H).double() for name in ("h", "c")}
    shapes = [(B * width, 1, S), (2 * width, 1, 11)] + [(1, 2 * width, H)] * 2 + [(2 * width, 1, S)]
    cotangents = [torch.randn(shape).double() for shape in shapes]
    assert_same(
        run_with_grads(of_fast, inputs, cotangents),
        run_with_grads(of_reference, inputs, cotangents),
    )


def test_selecting_sources_projects_nothing_again(make_pair, monkeypatch):
    decoder = make_pair("attention")[1].decoder
    step = decoder.stepper(torch.randn(4, 5, 7).double(), None)
    monkeypatch.setattr(fast_house.Attention, "split", None)
    state = torch.randn(2, 1, 6, 7).double()
    logits = step.select(torch.tensor([0, 3]))(torch.randint(11, (6, 1)), *state)[0]
    assert logits.shape == (6, 1, 11)
