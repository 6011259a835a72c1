"""The recurrent functions against the float64 reference: values and every gradient."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
import torch

import fastseq
from fastseq import backends, functional
from fastseq.reference import rnn
from fastseq.testing import (
    LAYOUTS,
    RecurrentCase,
    allow_tf32,
    assert_close_to_reference,
    assert_matches,
    edge_sizes,
    recurrent_case,
    run_with_grads,
    with_layout,
)
from tests.fuzz_recurrent import check as check_drawn
from tests.fuzz_recurrent import draw, ours, seeded, with_zoneout, yardstick

CELLS = list(rnn.CELLS)
OTHERS = [cell for cell in CELLS if cell != "lstm"]
# The start of a series that `python -m tests.fuzz_recurrent` goes through.
SERIES, FUZZED = 0, 150


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
WHERE = DEVICES[:1]


@pytest.fixture(params=DEVICES, autouse=True)
def there(request) -> Iterator[None]:
    """What is checked runs on the CPU's kernels and, where there is a GPU, on its kernels."""
    WHERE[0] = request.param
    with allow_tf32(False):
        yield
    WHERE[0] = "cpu"


def check(case: RecurrentCase, **options) -> dict:
    """The function against the reference, with torch in the same dtype as the yardstick."""
    case = case if WHERE[0] == "cpu" else case.on(WHERE[0])

    def by_kernels(*inputs: torch.Tensor) -> object:
        with fastseq.use_backend("auto" if WHERE[0] == "cpu" else WHERE[0]):
            return ours(case)(*inputs)

    return assert_matches(
        by_kernels,
        case.reference(),
        yardstick(case),
        case.inputs,
        case.cotangents,
        names=case.names,
        what=str(case),
        **options,
    )


def grid() -> list[tuple[int, int, int, int]]:
    """(T, B, I, H): each extent alone through its edges, then random combinations of edges."""
    edges = edge_sizes(4, 8, 16)
    sizes = [(t, 3, 5, 6) for t in (1, 2, 3, 31)]
    sizes += [(4, b, 5, 6) for b in (*edges, 33, 67)]
    sizes += [(4, 3, i, 6) for i in (*edges, 65, 131)]
    sizes += [(4, 3, 5, h) for h in (*edges, 31, 33, 64, 65, 127)]
    draw = random.Random(0)
    small = [size for size in edges if size < 17]
    sizes += [tuple(draw.choice(small) for _ in "TBIH") for _ in range(24)]
    # Long recurrent sums of small terms, where the order of accumulation shows.
    sizes += [(2, 64, 2, 512), (50, 4, 8, 300), (50, 64, 8, 128)]
    return [*sizes, (1, 1, 1, 1), (3, 0, 3, 4), (9, 130, 33, 40), (40, 2, 70, 129)]


# Dealt out to the sizes in turn, so that each is met at several of them.
OPTIONS = [
    dict(num_layers=layers, bidirectional=both, bias=bias, batch_first=first, hx=hx)
    for layers, both, bias, first, hx in itertools.product((1, 2), *[(False, True)] * 4)
]
ids = dict(ids=lambda o: "-".join(map(str, o.values())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize(
    "index,size", list(enumerate(grid())), ids=lambda v: str(v).replace(" ", "")
)
def test_values_and_gradients(index, size, dtype):
    options = OPTIONS[index * 11 % len(OPTIONS)]
    check(recurrent_case("lstm", *size, **options, dtype=dtype, seed=index))


@pytest.mark.parametrize("cell", OTHERS)
@pytest.mark.parametrize("part", range(6))
def test_values_and_gradients_of_other_cells(cell, part):
    """The same grid without the largest, in float32 and, every third, in float64."""
    sizes = [(n, size) for n, size in enumerate(grid()) if size[0] * size[1] * size[3] < 20000]
    for index, size in sizes[part::6]:
        dtype = torch.float64 if index % 3 == 0 else torch.float32
        options = OPTIONS[(index * 11 + 5) % len(OPTIONS)]
        check(recurrent_case(cell, *size, **options, dtype=dtype, seed=index))


@pytest.mark.parametrize("form", ["rows", "none", "batch first", "lengths", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_no_steps_are_refused_as_torch_refuses_them(cell, form):
    """(Given packed rows of no steps, torch's functions end the process.)"""
    case = recurrent_case(cell, 0, 0 if form in ("none", "packed") else 2, 3, 4, bidirectional=True)
    more = {}
    if form == "packed":
        case = case.map(lambda x: x[0:0].reshape(0, 3), "x")
        more["batch_sizes"] = torch.zeros(0, dtype=torch.int64)
    elif form == "lengths":
        more["lengths"] = torch.zeros(2, dtype=torch.int64)
    elif form == "batch first":
        case = case.map(lambda x: x.transpose(0, 1), "x")
        more["batch_first"] = True
    with pytest.raises(RuntimeError, match=f"fastseq.{cell}: expected sequence length .* in RNN"):
        ours(case, **more)(*case.inputs.values())


@pytest.mark.parametrize("options", OPTIONS, **ids)
@pytest.mark.parametrize("cell", CELLS)
def test_every_combination_of_options(cell, options):
    check(recurrent_case(cell, 5, 3, 4, 9, **options, seed=1))


@pytest.mark.parametrize("cell", CELLS)
def test_three_layers_both_directions(cell):
    check(recurrent_case(cell, 7, 5, 6, 17, num_layers=3, bidirectional=True))


def test_reference_is_torchs():
    """The oracle itself, against torch in float64."""
    for cell in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        for seed, options in enumerate(OPTIONS):
            case = recurrent_case(cell, 4, 3, 2, 5, **options, dtype=torch.float64, seed=seed)
            run = (case.inputs, case.cotangents)
            assert_matches(case.reference(), yardstick(case), None, *run, what=str(case))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
@pytest.mark.parametrize("which", ["x", "h0", "c0", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_strides(which, layout, batch_first):
    for cell in CELLS:
        case = recurrent_case(cell, 5, 6, 7, 9, batch_first=batch_first)
        if which in case.inputs:
            check(case.map(lambda t: with_layout(t, layout), which))


def test_strided_extras():
    case = recurrent_case("lstm", 5, 6, 7, 9, proj_size=4)
    check(case.map(lambda t: with_layout(t, "transposed"), "weight_hr_l0"))
    case = recurrent_case("peephole_lstm", 5, 6, 7, 9)
    check(case.map(lambda t: with_layout(t, "transposed"), "weight_peephole_l0"))
    case = recurrent_case("lstm", 5, 6, 7, 9, lengths="random", resets=0.3)
    flags = torch.zeros(5, 6, 2, dtype=torch.bool)
    flags[..., 0] = case.keywords["resets"]
    case.keywords["resets"] = flags[..., 0]
    lengths = case.keywords["lengths"]
    case.keywords["lengths"] = torch.stack((lengths, lengths - 100), 1)[:, 0]
    check(case)


def test_strided_cotangents():
    for cell in CELLS:
        case = recurrent_case(cell, 5, 6, 7, 9, bidirectional=True)
        for layout in ("transposed", "strided", "sliced", "expanded"):
            case.cotangents[:] = [with_layout(c, layout) for c in case.cotangents]
            check(case)


LENGTHS = [[1], [3], [2, 1], [7, 5, 5, 1], [4] * 3, [9, 8, 7, 6, 5, 4, 3, 2, 1], [20, *[1] * 16]]
# Enough rows for one long sum over all of them to err more than torch's sums step by step.
LENGTHS += [[1 + row % 12 for row in range(60)]]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda v: "-".join(map(str, v[:9])))
def test_packed_rows(lengths, cell):
    for n, (layers, both) in enumerate(itertools.product((1, 2), (False, True))):
        options = dict(num_layers=layers, bidirectional=both, lengths=lengths, hx=n != 2)
        dtype = torch.float64 if (n + len(lengths)) % 2 else torch.float32
        case = recurrent_case(cell, max(lengths), len(lengths), 5, 9, **options, dtype=dtype)
        check(case.packed())


ROWS = [[0], [0, 0, 0], [0, 3, 5], [5, 5, 5], [1, 5, 0, 2, 4, 3, 5, 1, 0]]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("lengths", ROWS, ids=str)
def test_lengths(lengths, cell):
    """x is NaN beyond them: whatever read it would show."""
    for n, (layers, both) in enumerate(itertools.product((1, 2), (False, True))):
        options = dict(num_layers=layers, bidirectional=both, hx=n != 1, batch_first=n % 2 == 1)
        check(recurrent_case(cell, 5, len(lengths), 4, 9, lengths=lengths, **options, seed=n))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_resets(p, cell):
    for n, form in enumerate((None, "random", [6, 3, 1, 2, 6])):
        options = dict(bidirectional=n != 1, num_layers=2, lengths=form, batch_first=n == 0)
        case = recurrent_case(cell, 6, 5, 4, 9, resets=p, **options, seed=n)
        check(case.packed() if n == 2 else case)


@pytest.mark.parametrize("cell", CELLS)
def test_a_reset_splits_the_sequence(cell):
    """The same bits as two calls, the second from zeros."""
    case = recurrent_case(cell, 8, 3, 4, 9)
    resets = torch.zeros(8, 3, dtype=torch.bool)
    resets[5] = True
    names = list(case.inputs)
    whole = ours(case, resets=resets)(*case.inputs.values())
    first = ours(case)(case.inputs["x"][:5], *[case.inputs[n] for n in names[1:]])
    states = [torch.zeros_like(case.inputs[n]) for n in names if n in ("h0", "c0")]
    weights = [case.inputs[n] for n in names if n.startswith(("weight", "bias"))]
    second = ours(case)(case.inputs["x"][5:], *states, *weights)
    assert torch.equal(whole[0], torch.cat((first[0], second[0])))
    assert all(map(torch.equal, whole[1:], second[1:]))


@pytest.mark.parametrize("cell", ["lstm", "peephole_lstm", "layer_norm_lstm"])
@pytest.mark.parametrize("H,P", [(2, 1), (9, 4), (17, 16), (33, 8), (40, 33)])
def test_projection(H, P, cell):
    options = dict(proj_size=P, bidirectional=True)
    check(recurrent_case(cell, 5, 6, 4, H, **options, num_layers=2))
    check(recurrent_case(cell, 5, 1, 4, H, **options, dtype=torch.float64, hx=False))
    check(recurrent_case(cell, 5, 4, 4, H, **options, lengths=[2, 5, 1, 5]).packed())
    check(recurrent_case(cell, 5, 4, 4, H, **options, lengths="random", resets=0.3, bias=False))


ZONEOUTS = [(0.3, 0.3), (0.2, 0.0), (0.0, 0.5), (1.0, 1.0)]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("pair", ZONEOUTS, ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_zoneout(cell, pair, train):
    """Drawn from torch's stream in training, as the reference with the same draws; else the mean.

    In evaluation nothing is drawn.
    """
    if cell == "gru":
        pair = (pair[0] or pair[1],) * 2
    forms = [{}, dict(lengths="random", resets=0.2), dict(batch_first=True, num_layers=2)]
    forms += [dict(lengths=[3, 6, 1, 2, 6], dropout=0.4, num_layers=2)]
    if cell == "lstm":
        forms += [dict(proj_size=3), dict(proj_size=8, num_layers=2, hx=False)]
        forms += [dict(proj_size=4, lengths="random", resets=0.3)]
    for n, form in enumerate(forms):
        case = recurrent_case(cell, 6, 5, 4, 9, bidirectional=n != 0, **form)
        case = case.packed() if "dropout" in form else case
        more = dict(train=train, zoneout=pair if cell == "lstm" else pair[0])
        fn, truth = seeded(ours(case, **more), 3), seeded(with_zoneout(case, pair, train), 3)
        run = dict(names=case.names, what=f"{case} {pair}")
        found = assert_matches(fn, truth, truth, case.inputs, case.cotangents, **run)
        torch.manual_seed(3)
        before = torch.get_rng_state()
        again = ours(case, **more)(*case.inputs.values())
        assert torch.equal(again[0], found["y"])
        drawn = train and (any(p > 0 for p in pair) or bool(form.get("dropout")))
        assert torch.equal(torch.get_rng_state(), before) == (not drawn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_half_precision(cell, dtype):
    """As accurate as its own rounding allows where a kernel runs: states and sums are float32."""
    forms = [{}, dict(lengths="random"), dict(resets=0.2), dict(num_layers=2, bidirectional=True)]
    for n, form in enumerate(forms):
        case = recurrent_case(cell, 5, 3, 6, 9, dtype=dtype, seed=n, **form)
        found = check(case)
        assert all(t.dtype == dtype for t in found.values())
        params = [t for name, t in case.inputs.items() if name.startswith(("weight", "bias"))]
        if backends.recurrent_obstacle(cell, case.inputs["x"], params) is None:
            run = (case.inputs, case.cotangents)
            exact = case.to(torch.float32)
            yard = yardstick(exact) if not case.keywords else exact.reference()

            def rounded(*inputs, yard=yard, dtype=dtype):
                def flat(tree):
                    pairs = [tree] if isinstance(tree, torch.Tensor) else tree
                    return [t for p in pairs for t in (flat(p) if p is not tree else [p])]

                return [t.to(dtype) for t in flat(yard(*(t.float() for t in inputs)))]

            assert_matches(ours(case), case.reference(), rounded, *run, names=case.names)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_ten_thousand_steps(cell):
    check(recurrent_case(cell, 10_000, 1, 3, 4))


@pytest.mark.parametrize("cell", CELLS)
def test_ten_thousand_steps_are_ten_times_a_thousand(cell):
    """In bits, what comes out; within the rounding of sums over time, the gradients."""
    case = recurrent_case(cell, 10_000, 2, 3, 20)

    def in_pieces(x, *rest):
        states, weights = rest[: len(case.names) - 1], rest[len(case.names) - 1 :]
        outputs = []
        for piece in x.split(1000):
            y, *states = ours(case)(piece, *states, *weights)
            outputs.append(y)
        return torch.cat(outputs), *states

    runs = (case.inputs, case.cotangents)
    whole, pieces = (run_with_grads(fn, *runs, names=case.names) for fn in (ours(case), in_pieces))
    for name, tensor in whole.items():
        assert tensor.isfinite().all(), name
        if name in case.names:
            assert torch.equal(tensor, pieces[name]), name
        else:
            assert_close_to_reference(tensor, pieces[name].double(), terms=10_000, what=name)


@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_dropout_draws_what_torch_draws(cell, p, bidirectional):
    options = dict(num_layers=3, dropout=p, bidirectional=bidirectional)
    case = recurrent_case(cell, 6, 5, 4, 8, **options)
    torchs = seeded(yardstick(case), 7)
    found = assert_matches(
        seeded(ours(case, train=True), 7),
        seeded(case.reference(train=True), 7),
        torchs,
        case.inputs,
        case.cotangents,
        names=case.names,
    )
    state = torch.get_rng_state()
    torchs(*case.inputs.values())
    assert torch.equal(state, torch.get_rng_state())
    calm = ours(case)(*case.inputs.values())[0]
    assert not torch.equal(calm, found["y"])


@pytest.mark.parametrize("part", range(5))
def test_a_sample_of_random_calls(part):
    for index in range(part, FUZZED, 5):
        drawn = draw(SERIES, index)
        try:
            check_drawn(drawn)
        except Exception as error:
            replay = f"python -m tests.fuzz_recurrent --seed {SERIES} --only {index}"
            raise AssertionError(f"{replay}: {drawn}") from error


def test_functions_have_the_signatures_torch_has():
    """In torch's order after ``params``, whatever is beyond torch by keyword alone."""
    case = recurrent_case("gru", 5, 3, 4, 6, num_layers=2, bidirectional=True)
    x, h0, *params = case.inputs.values()
    by_position = functional.gru(x, h0, params, True, 2, 0.0, False, True, False)
    assert torch.equal(by_position[0], ours(case)(*case.inputs.values())[0])
    with pytest.raises(TypeError, match="positional"):
        functional.gru(x, h0, params, True, 2, 0.0, False, True, False, None, None)
