"""Lengths, resets and zoneout of the oracle: against literal loops over rows, pieces and steps."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from fastseq.reference import rnn
from fastseq.testing import assert_close_to_reference, assert_matches, recurrent_case

# Cells with every choice of projection they have.
PROJECTED = [(cell, p) for cell, kind in rnn.CELLS.items() for p in (0, 2)[: kind.states]]
F64 = dict(dtype=torch.float64)


def check(case, expected, fn=None) -> None:
    """The reference against ``expected`` in float64, with ``expected`` in float32 as yardstick.

    LayerNorm of a state of zeros magnifies what comes back through it by 1/sqrt(epsilon), rounding
    too, so that only the same arithmetic in the same dtype says what rounding may do.
    """
    fn = fn or case.reference()
    names = dict(names=case.names, what=str(case))
    assert_matches(fn, expected, expected, case.inputs, case.cotangents, **names)


def single(case, run):
    """A function of the case's inputs that calls ``run(x, states, weights)`` for its one layer.

    With inputs keep_h or keep_c among them, ``run`` gets ``zoneout`` too.
    """
    assert case.options["num_layers"] == 1 and not case.options["bidirectional"]

    def call(*inputs):
        values = dict(zip(case.inputs, inputs, strict=True))
        states = [values.pop(name)[0] for name in ("h0", "c0") if name in values]
        keeps = [values.pop(name, None) for name in ("keep_h", "keep_c")][: len(case.names) - 1]
        zoneout = {} if keeps.count(None) == len(keeps) else {"zoneout": keeps}
        x, *weights = values.values()
        y, *finals = run(x, states or None, weights, **zoneout)
        return y, *(s.unsqueeze(0) for s in finals)

    return call


def layer_of(case, reverse: bool, **keywords):
    """A function of the case's inputs that calls rnn.layer."""

    def run(*args, **zoneout):
        return rnn.layer(case.cell, *args, reverse=reverse, **keywords, **zoneout)

    return single(case, run)


def row_by_row(case, reverse: bool):
    """Each row alone, cut to its length; for one layer in one direction."""
    lengths = case.keywords["lengths"].tolist()

    def run(x, states, weights):
        rows = [
            rnn.layer(
                case.cell,
                x[:length, b : b + 1],
                states and [s[b : b + 1] for s in states],
                weights,
                reverse=reverse,
            )
            for b, length in enumerate(lengths)
        ]
        y, *finals = zip(*rows, strict=True)
        padded = [torch.nn.functional.pad(row, (0, 0, 0, 0, 0, len(x) - len(row))) for row in y]
        return torch.cat(padded, 1), *(torch.cat(f) for f in finals)

    return single(case, run)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("hx", [False, True])
@pytest.mark.parametrize("cell,proj_size", PROJECTED)
def test_lengths_are_rows_run_alone(cell, proj_size, hx, reverse):
    """NaN stands in x beyond each length, so whatever is read there shows."""
    options = dict(proj_size=proj_size, hx=hx)
    for lengths in ([0, 3, 6, 1, 0, 3], "random", [6] * 6):
        case = recurrent_case(cell, 6, 6, 3, 4, lengths=lengths, **options)
        check(case, row_by_row(case, reverse), layer_of(case, reverse, **case.keywords))


@pytest.mark.parametrize("cell", rnn.CELLS)
def test_lengths_reach_every_layer_and_direction(cell):
    """Two bidirectional layers, composed by hand from single ones."""
    options = dict(num_layers=2, bidirectional=True, lengths="random", resets=0.3)
    for first in (False, True):
        case = recurrent_case(cell, 5, 4, 3, 4, batch_first=first, **options)
        keywords = dict(case.keywords)
        if first:
            keywords["resets"] = keywords["resets"].T
        count, per_side = len(case.names) - 1, len(case.weights())

        def composed(x, *rest, first=first, keywords=keywords, count=count, per_side=per_side):
            states, params, finals = rest[:count], rest[count:], []
            x = x.transpose(0, 1) if first else x
            for layer in range(2):
                sides = []
                for side in (2 * layer, 2 * layer + 1):
                    y, *final = rnn.layer(
                        cell,
                        x,
                        [s[side] for s in states],
                        params[side * per_side : (side + 1) * per_side],
                        reverse=side % 2 == 1,
                        **keywords,
                    )
                    sides.append(y)
                    finals.append(final)
                x = torch.cat(sides, -1)
            finals = [torch.stack(s) for s in zip(*finals, strict=True)]
            return x.transpose(0, 1) if first else x, *finals

        check(case, composed)


def piece_by_piece(case, reverse: bool):
    """Each row alone, literally split where it is reset; only the first piece run gets a state."""
    T, B = case.inputs["x"].shape[:2]
    resets = case.keywords["resets"]
    lengths = case.keywords.get("lengths", torch.full((B,), T)).tolist()

    def run_row(x, states, weights, cuts):
        bounds = [0, *cuts, len(x)]
        pieces = [slice(a, b) for a, b in itertools.pairwise(bounds)]
        ys = []
        for piece in reversed(pieces) if reverse else pieces:
            y, *states = rnn.layer(case.cell, x[piece], states, weights, reverse=reverse)
            ys.append(y)
            final, states = states, None
        return torch.cat(ys[::-1] if reverse else ys), *final

    def run(x, states, weights):
        rows = []
        for b, length in enumerate(lengths):
            cuts = [t for t in range(length) if resets[t, b]]
            initial = [s[b : b + 1] for s in states]
            y, *finals = run_row(x[:length, b : b + 1], initial, weights, cuts)
            y = torch.nn.functional.pad(y, (0, 0, 0, 0, 0, T - length))
            rows.append((y, *finals))
        y, *finals = zip(*rows, strict=True)
        return torch.cat(y, 1), *(torch.cat(f) for f in finals)

    return single(case, run)


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell,proj_size", PROJECTED)
def test_resets_are_literal_splits(cell, proj_size, reverse, probability):
    for lengths in (None, [7, 0, 3, 1, 5]):
        case = recurrent_case(
            cell, 7, 5, 3, 4, proj_size=proj_size, lengths=lengths, resets=probability
        )
        check(case, piece_by_piece(case, reverse), layer_of(case, reverse, **case.keywords))


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("reverse", [False, True])
def test_one_reset_at_each_step(at, reverse):
    case = recurrent_case("lstm", 4, 2, 3, 4, resets=0.0)
    case.keywords["resets"][at, 1] = True
    check(case, piece_by_piece(case, reverse), layer_of(case, reverse, **case.keywords))


@pytest.mark.parametrize("cell", rnn.CELLS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_resets_and_lengths_go_with_packed_rows(cell, bidirectional):
    """What packed() rearranges stays what it was, and runs through the same layers."""
    options = dict(num_layers=2, bidirectional=bidirectional, resets=0.3, **F64)
    for first in (False, True):
        case = recurrent_case(
            cell, 6, 5, 3, 4, lengths=[4, 6, 1, 3, 6], batch_first=first, **options
        )
        order = [1, 4, 0, 3, 2]
        packed = case.packed()
        y, *finals = case.reference()(*case.inputs.values())
        y = y.transpose(0, 1) if first else y
        rows = [y[t, b] for t in range(6) for b in order if t < case.keywords["lengths"][b]]
        found_y, *found = packed.reference()(*packed.inputs.values())
        assert_close_to_reference(found_y, torch.stack(rows))
        for state, expected in zip(found, finals, strict=True):
            assert_close_to_reference(state, expected[:, order])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", rnn.CELLS)
def test_chunks_joined_by_their_states_are_the_whole(cell, reverse):
    """Wherever the chunks end, on a reset or not, in either direction."""
    case = recurrent_case(cell, 6, 4, 3, 4, resets=0.4)
    resets = case.keywords["resets"]
    resets[3] = torch.tensor([True, False, True, False])
    for end in range(7):
        parts = [slice(0, end), slice(end, 6)]

        def chunked(x, states, weights, parts=parts):
            ys = {}
            for k in (1, 0) if reverse else (0, 1):
                ys[k], *states = rnn.layer(
                    cell, x[parts[k]], states, weights, reverse=reverse, resets=resets[parts[k]]
                )
            return torch.cat((ys[0], ys[1])), *states

        check(case, single(case, chunked), layer_of(case, reverse, resets=resets))


def test_a_reset_stops_what_is_not_finite():
    case = recurrent_case("lstm", 3, 2, 3, 4, resets=0.0, **F64)
    case.keywords["resets"][1, 0] = True
    case.inputs["x"][0, 0] = math.nan
    y, h_n, c_n = case.reference()(*case.inputs.values())
    assert y[0, 0].isnan().all() and y[1:].isfinite().all()
    assert h_n.isfinite().all() and c_n.isfinite().all()


def with_keeps(case, kind: str, chosen: tuple[str, ...] = ("keep_h", "keep_c")):
    """The case with more inputs: masks, probabilities, or values for every step, row and unit."""
    T, B = case.inputs["x"].shape[:2]
    draw = torch.Generator().manual_seed(0)
    keeps = {}
    for name, cotangent in zip(("keep_h", "keep_c"), case.cotangents[1:], strict=False):
        shape = () if kind == "probability" else (T, B, cotangent.shape[-1])
        keep = torch.rand(shape, generator=draw)
        keep = keep.lt(0.4) if kind == "mask" else keep
        keeps[name] = keep.to(cotangent.dtype)
    keeps = {name: keep for name, keep in keeps.items() if name in chosen}
    return replace(case, inputs=case.inputs | keeps)


def zoned_out(case, reverse: bool):
    """Krueger et al., equations 2-4, over steps without zoneout."""

    def run(x, states, weights, zoneout):
        ys = []
        for t in reversed(range(len(x))) if reverse else range(len(x)):
            _, *new = rnn.layer(case.cell, x[t : t + 1], states, weights)
            states = [
                s if keep is None else torch.lerp(s, old, keep.expand(len(x), *old.shape)[t])
                for keep, old, s in zip(zoneout, states, new, strict=True)
            ]
            ys.append(states[0])
        return torch.stack(ys[::-1] if reverse else ys), *states

    return single(case, run)


@pytest.mark.parametrize("kind", ["mask", "probability", "values"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell,proj_size", PROJECTED)
def test_zoneout_mixes_old_and_new(cell, proj_size, reverse, kind):
    plain = recurrent_case(cell, 5, 3, 4, 6, proj_size=proj_size)
    states = ("keep_h", "keep_c")[: len(plain.names) - 1]
    for chosen in (states, states[:1], states[1:]):
        if chosen:
            case = with_keeps(plain, kind, chosen)
            check(case, zoned_out(case, reverse), layer_of(case, reverse))


@pytest.mark.parametrize("cell,proj_size", PROJECTED)
def test_zoneout_keeps_all_or_nothing(cell, proj_size):
    case = recurrent_case(cell, 5, 3, 4, 6, proj_size=proj_size, **F64)
    x, weights = case.inputs["x"], case.weights()
    states = [case.inputs[name][0] for name in ("h0", "c0")[: len(case.names) - 1]]
    one, nought = torch.ones((), **F64), torch.zeros((), **F64)
    y, *finals = rnn.layer(cell, x, states, weights, zoneout=[one] * len(states))
    assert torch.equal(y, states[0].expand_as(y)) and all(map(torch.equal, finals, states))
    y, *finals = rnn.layer(cell, x, states, weights, zoneout=[nought] * len(states))
    expected, *expected_finals = rnn.layer(cell, x, states, weights)
    assert torch.equal(y, expected) and all(map(torch.equal, finals, expected_finals))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell,proj_size", PROJECTED)
def test_zoneout_with_lengths_and_resets(cell, proj_size, reverse):
    """Each row alone, and packed: the masks follow their rows."""
    options = dict(lengths=[3, 6, 1, 4], resets=0.3, proj_size=proj_size)
    case = with_keeps(recurrent_case(cell, 6, 4, 3, 4, **options), "mask")
    lengths, resets = case.keywords["lengths"].tolist(), case.keywords["resets"]

    def run(x, states, weights, zoneout):
        rows = []
        for b, length in enumerate(lengths):
            span = slice(0, length), slice(b, b + 1)
            y, *finals = rnn.layer(
                cell,
                x[span],
                [s[b : b + 1] for s in states],
                weights,
                reverse=reverse,
                resets=resets[span],
                zoneout=[keep[span] for keep in zoneout],
            )
            rows.append((torch.nn.functional.pad(y, (0, 0, 0, 0, 0, 6 - length)), *finals))
        y, *finals = zip(*rows, strict=True)
        return torch.cat(y, 1), *(torch.cat(f) for f in finals)

    check(case, single(case, run), layer_of(case, reverse, **case.keywords))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell,proj_size", PROJECTED)
def test_derivatives_of_first_and_second_order(cell, proj_size, reverse):
    case = recurrent_case(
        cell, 3, 2, 1, 2 + bool(proj_size), proj_size=proj_size, lengths=[2, 3], resets=0.3, **F64
    )
    case = with_keeps(case.map(torch.nan_to_num), "values")
    fn = layer_of(case, reverse, **case.keywords)
    leaves = [t.requires_grad_() for t in case.inputs.values()]
    assert torch.autograd.gradcheck(fn, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(fn, leaves)
