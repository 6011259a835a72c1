"""The GPU's recurrent kernels, run on the host: every budget that the CPU's must keep."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastseq import _native
from fastseq.functional.rnn import as_matrix
from fastseq.ops import measured_cuda, recurrent_cuda
from fastseq.ops import recurrent as op
from fastseq.ops.recurrent_cuda import GRID, IF_IT_CAN, STEP, WHOLE
from fastseq.testing import assert_matches, recurrent_case, run_with_grads
from tests.cuda.on_host import COMPILER, load, on_host
from tests.fuzz_recurrent import ours, seeded, with_zoneout, yardstick
from tests.test_functional_rnn_calls import SPECIALS

if not _native.loaded():
    pytest.skip(str(_native.why_not_loaded()), allow_module_level=True)
if COMPILER is None:
    pytest.skip("no C++ compiler to build them for the host", allow_module_level=True)

WHOLE_CELLS = ["lstm", "gru", "rnn_tanh", "rnn_relu"]
STEP_CELLS = [*WHOLE_CELLS, "peephole_lstm"]
RUNS = [(STEP, cell) for cell in (*STEP_CELLS, "layer_norm_lstm")]
RUNS += [(way, cell) for way in (WHOLE, GRID) for cell in WHOLE_CELLS]
IDS = [f"{('', 'step', 'whole', 'grid')[way]}-{cell}" for way, cell in RUNS]

FORMS = {
    "padded": {},
    "both directions": dict(bidirectional=True),
    "no biases": dict(bias=False, bidirectional=True),
    "no state": dict(hx=False, bidirectional=True),
    "lengths": dict(lengths=[6, 0, 3, 6, 1], bidirectional=True),
    "lengths, longest last": dict(lengths=[1, 2, 2, 4, 6]),
    "packed": dict(lengths=[6, 2, 1, 6, 5], bidirectional=True),
    "resets": dict(resets=0.3, bidirectional=True),
    "resets, lengths": dict(resets=0.3, lengths=[6, 0, 3, 4, 1], bidirectional=True),
    "resets, packed": dict(resets=0.3, lengths=[6, 2, 1, 6, 5], bidirectional=True),
    "stacked": dict(num_layers=2, bidirectional=True, batch_first=True),
}


@pytest.fixture(scope="module", autouse=True)
def library():
    return load()


def case_of(cell, form, H, *, T=6, B=5, dtype=torch.float32, seed=0):
    case = recurrent_case(cell, T, B, 4, H, dtype=dtype, seed=seed, **FORMS[form])
    return case.packed() if "packed" in form else case


def check(case, what="", fn=None, reference=None, baseline=None):
    assert_matches(
        fn or ours(case),
        reference or case.reference(),
        baseline or yardstick(case),
        case.inputs,
        case.cotangents,
        names=case.names,
        what=f"{what} {case}",
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way, cell", RUNS, ids=IDS)
def test_against_the_reference(way, cell, form):
    """H that threads move by four, and that they don't."""
    with on_host(way):
        for seed, H in enumerate((5, 8, 33)):
            check(case_of(cell, form, H, seed=seed))


@pytest.mark.parametrize("way, cell", RUNS, ids=IDS)
def test_sizes_at_the_edges(way, cell):
    with on_host(way):
        for T, B, H in ((1, 1, 1), (4, 0, 4), (2, 1, 64), (2, 9, 3)):
            check(recurrent_case(cell, T, B, 3, H, bidirectional=True))
        # No steps: what functions refuse as torch does, and the op doesn't.
        case = recurrent_case(cell, 0, 3, 3, 4, bidirectional=True)
        check(case, fn=by_op(case))


@pytest.mark.parametrize("cell", [*STEP_CELLS, "layer_norm_lstm"])
@pytest.mark.parametrize("form", ["both directions", "resets, lengths", "packed"])
def test_float64(cell, form):
    with on_host(STEP):
        check(case_of(cell, form, 8, dtype=torch.float64))


def test_normalised_rows_wider_than_a_block():
    options = dict(resets=0.3, lengths=[3, 0, 2], bidirectional=True)
    with on_host(STEP):
        check(recurrent_case("layer_norm_lstm", 3, 3, 4, 150, **options))


def test_squares_beyond_the_largest_number():
    """What is normalised doesn't change with its unit; torch's arithmetic is no yardstick here."""
    case = recurrent_case("layer_norm_lstm", 3, 2, 4, 20)
    with on_host(STEP):
        small, large = (
            ours(case)(*case.map(lambda t, by=by: t * by, "x").inputs.values())
            for by in (2.0**30, 2.0**100)
        )
    for found, expected in zip(large, small, strict=True):
        assert torch.equal(found, expected) and expected.abs().max() > 0.1


@pytest.mark.parametrize("way, cell", RUNS, ids=IDS)
def test_special_values_as_in_the_reference(way, cell):
    for name, (which, change) in SPECIALS.items():
        case = recurrent_case(cell, 5, 3, 4, 21).map(torch.clone)
        if which not in case.inputs:
            continue
        change(case.inputs[which])
        # torch's layer_norm makes NaN of huge values: without a yardstick, outputs alone.
        normalised = cell == "layer_norm_lstm"
        baseline = case.reference() if normalised else yardstick(case)
        cotangents = [] if normalised and "huge" in name else [case.cotangents]
        with on_host(way):
            assert_matches(
                ours(case), case.reference(), baseline, case.inputs, *cotangents,
                names=case.names, what=f"{name} {case}",
            )  # fmt: skip


@pytest.mark.parametrize("cell", WHOLE_CELLS)
def test_blocks_of_several_rows(cell):
    """More rows than multiprocessors, so that a block takes four and the last is not full."""
    lengths = torch.arange(135) % 4
    case = recurrent_case(cell, 3, 135, 3, 8, lengths=lengths, bidirectional=True)
    with on_host(WHOLE):
        check(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_sums_over_many_tokens_are_made_in_pieces(dtype):
    """One long sum of float32 errs by its length."""
    a, b = torch.rand(5003, 6).to(dtype), torch.rand(5003, 9).to(dtype)
    truth = a.double().T @ b.double()
    found, long = (t.double() for t in (recurrent_cuda._over_tokens(a[:, 1:], b), a[:, 1:].T @ b))
    assert (found - truth[1:]).norm() / truth.norm() < 2 * torch.finfo(dtype).eps
    if dtype == torch.bfloat16:
        assert torch.equal(found, long)
    few = recurrent_cuda._over_tokens(a[:100], b[:100])
    assert torch.equal(few, a[:100].T @ b[:100])


def test_many_packed_rows():
    """As the CPU's kernels are tested: within the budget of sums step by step."""
    lengths = [1 + row % 12 for row in range(60)]
    with on_host(STEP):
        for cell in ("peephole_lstm", "gru"):
            check(recurrent_case(cell, 12, 60, 5, 9, lengths=lengths).packed())


@pytest.mark.parametrize("way", [STEP, WHOLE, GRID])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_lengths_that_nobody_looked_at_stay_within_the_sequence(cell, way):
    """The host cannot check what a device holds without waiting for it."""
    T, B, H = 4, 5, 6
    kind = op.CELLS[cell]
    x = torch.randn(T, B, 3)
    weights = [torch.randn(kind.gates * H, width, requires_grad=True) for width in (3, H)]
    found = []
    with on_host(way):
        for lengths in ([9, -3, 2, 1 << 40, 0], [4, 0, 2, 4, 0]):
            settings = op.Settings(kind.number, False, 1, lengths=torch.tensor(lengths))
            y, *states = op.run(settings, x, None, None, weights)
            grads = torch.autograd.grad(y.square().sum() + states[-1].sum(), weights)
            found.append([y, *states, *grads])
    for beyond, within in zip(*found, strict=True):
        assert torch.equal(beyond, within)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(
    "cell, processors, shared", [("lstm", 8, 105_000), ("rnn_tanh", 2, 103_000)]
)
def test_a_grid_of_little_memory_and_many_rows(cell, processors, shared, order):
    """A tile of several chunks of rows, the last not full, and their operands in several parts."""
    lengths = torch.arange(50) % 4
    case = recurrent_case(cell, 3, 50, 3, 100, lengths=lengths, bidirectional=True)
    with on_host(GRID, order, processors=processors, shared=shared):
        check(case)


@pytest.mark.parametrize(
    "way, H, blocks, taken",
    [
        (WHOLE | IF_IT_CAN, 300, 0, GRID),
        (GRID | IF_IT_CAN, 1700, 0, STEP),
        (GRID | IF_IT_CAN, 20, 0, GRID),
        (GRID | IF_IT_CAN, 20, 1, WHOLE),
        (GRID | IF_IT_CAN, 200, 1, STEP),
        (recurrent_cuda.ANY_WAY, 200, 1, STEP),
    ],
)
def test_a_wish_that_cannot_be_is_no_error(way, H, blocks, taken):
    """What the op says it did it has done, also where the device refused a grid."""
    case = recurrent_case("lstm", 3, 16, 4, H, bidirectional=True)
    expected = {}
    for each in (STEP, taken):
        with on_host(each):
            expected[each] = bits(case)
    with on_host(way, blocks=blocks), pytest.MonkeyPatch.context() as patch:
        found = []
        for name in ("recurrent_cuda_fwd", "recurrent_cuda_bwd"):
            original = getattr(torch.ops.fastseq, name)
            record = lambda *args, op=original: found.append(op(*args)) or found[-1]  # noqa: E731
            patch.setattr(torch.ops.fastseq, name, record)
        run = bits(case)
    assert found == [taken, taken]
    same = {way: all(torch.equal(run[n], t) for n, t in expected[way].items()) for way in expected}
    assert same[taken] and same[STEP] == (taken == STEP)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_grid_that_does_not_fit_at_once(cell):
    """Directions one after the other, and without room for one of them the way that needs none."""
    case = case_of(cell, "lengths", 40)
    with on_host(GRID):
        expected = bits(case)
    with on_host(GRID, blocks=15):
        assert all(torch.equal(t, expected[name]) for name, t in bits(case).items())
    with on_host(GRID, blocks=2), pytest.raises(RuntimeError, match="that fit the device at once"):
        bits(case)
    with on_host(STEP):
        expected = bits(case)
    with on_host(blocks=2, shared=20_000):
        assert all(torch.equal(t, expected[name]) for name, t in bits(case).items())


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("form", ["both directions", "resets, lengths", "packed"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_zoneout(cell, form, train):
    pair = (0.3, 0.2) if cell == "lstm" else (0.3,)
    case = case_of(cell, form, 8)
    fn = seeded(ours(case, zoneout=pair if cell == "lstm" else 0.3, train=train), 5)
    reference = seeded(with_zoneout(case, pair, train), 5)
    with on_host(STEP):
        check(case, "zoneout", fn, reference, reference)


def by_op(case):
    """The op itself: functions on the CPU would widen halves first."""
    kind, D = op.CELLS[case.cell], 1 + case.options["bidirectional"]
    names = ("batch_sizes", "lengths", "resets")
    tensors = [case.keywords.get(name) for name in names]

    def call(x, *rest):
        states, weights = rest[: kind.states], rest[kind.states :]
        weights = as_matrix(case.cell, list(weights), case.options["bias"], D)
        settings = op.Settings(kind.number, case.options["bias"], D, *tensors)
        return op.run(settings, x, *(*states, None)[:2], weights)

    return call


@pytest.mark.parametrize("form", ["both directions", "lengths", "packed", "resets"])
@pytest.mark.parametrize("way, cell", RUNS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_halves(dtype, way, cell, form):
    case = case_of(cell, form, 20, dtype=dtype)
    with on_host(way):
        check(case, fn=by_op(case), baseline=case.reference())


def bits(case):
    return run_with_grads(ours(case), case.inputs, case.cotangents, names=case.names)


@pytest.mark.parametrize("form", ["both directions", "resets, lengths", "packed"])
@pytest.mark.parametrize("way, cell", RUNS, ids=IDS)
def test_threads_in_any_order_give_the_same_bits(way, cell, form):
    """A result that depends on the order of threads between two meetings is a race."""
    case = case_of(cell, form, 36)
    with on_host(way):
        expected = bits(case)
    for order in (1, 2):
        with on_host(way, order):
            for name, tensor in bits(case).items():
                assert torch.equal(tensor, expected[name]), (order, name)


def test_the_way_follows_from_the_size():
    """Whole sequences where the weights fit the 227 KiB that a block may have, or all blocks that
    there are multiprocessors for."""
    x, h = torch.randn(2, 3, 4), None
    taken = {}

    def ways(cell, H, dtype):
        kind = op.CELLS[cell]
        weights = [torch.zeros(kind.gates * H, width, dtype=dtype) for width in (4, H)]
        with on_host(), pytest.MonkeyPatch.context() as patch:
            ops = torch.ops.fastseq
            for name in ("recurrent_cuda_fwd", "recurrent_cuda_bwd"):
                original = getattr(ops, name)

                def record(*args, _original=original, _name=name):
                    taken[_name] = _original(*args)
                    return taken[_name]

                patch.setattr(ops, name, record)
            leaves = [w.requires_grad_() for w in weights]
            y, *_ = op.run(op.Settings(kind.number, False, 1), x.to(dtype), h, None, leaves)
            y.sum().backward()
        found = taken["recurrent_cuda_fwd"], taken["recurrent_cuda_bwd"]
        if _native.cuda_built():
            # What explain() is told, which launches nothing.
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(recurrent_cuda, "limits", lambda device: (132, 232448))
                size = measured_cuda.Size(2, 3, 4, H)
                said = recurrent_cuda.ways(kind, dtype, size, 1, torch.device("cuda"))
            assert said == tuple(recurrent_cuda.NAMES[way] for way in found)
        return found

    for cell, dtype, fits, beyond in (
        ("lstm", torch.float32, 112, 128),
        ("gru", torch.float32, 128, 144),
        ("lstm", torch.bfloat16, 160, 180),
        ("rnn_tanh", torch.float32, 224, 256),
    ):
        assert ways(cell, fits, dtype) == (WHOLE, WHOLE), (cell, fits)
        assert ways(cell, beyond, dtype) == (GRID, GRID), (cell, beyond)
    assert ways("rnn_tanh", 3000, torch.float32) == (STEP, STEP)
    assert ways("lstm", 8, torch.float64) == (STEP, STEP)
    with on_host(WHOLE), pytest.raises(RuntimeError, match="expected weights of lstm that fit"):
        weights = [torch.zeros(4 * 200, width) for width in (4, 200)]
        op.run(op.Settings(op.CELLS["lstm"].number, False, 1), x, None, None, weights)


PROJECTED = [form for form in FORMS if form not in ("both directions", "lengths, longest last")]


@pytest.mark.parametrize("form", PROJECTED)
@pytest.mark.parametrize(
    "way, cell", [run for run in RUNS if run[1] in ("lstm", "peephole_lstm")], ids=str
)
def test_projections(way, cell, form):
    with on_host(way):
        for P in (3, 9):
            case = recurrent_case(cell, 6, 5, 4, 12, proj_size=P, seed=P, **FORMS[form])
            check(case.packed() if "packed" in form else case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("form", ["both directions", "resets, lengths", "resets, packed"])
def test_projections_of_every_dtype(form, dtype):
    case = recurrent_case("lstm", 6, 5, 4, 20, proj_size=8, dtype=dtype, **FORMS[form])
    case = case.packed() if "packed" in form else case
    with on_host():
        fn = ours(case) if dtype == torch.float64 else by_op(case)
        check(case, fn=fn, baseline=None if dtype == torch.float64 else case.reference())


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("form", [form for form in PROJECTED if form != "no state"])
def test_zoneout_of_what_is_projected(form, train):
    for P, pair in ((3, (0.3, 0.2)), (8, (0.0, 0.4)), (9, (0.5, 0.0))):
        case = recurrent_case("lstm", 6, 5, 4, 12, proj_size=P, seed=P, **FORMS[form])
        case = case.packed() if "packed" in form else case
        fn = seeded(ours(case, zoneout=pair, train=train), 5)
        reference = seeded(with_zoneout(case, pair, train), 5)
        with on_host():
            check(case, f"zoneout {pair}", fn, reference, reference)


@pytest.mark.parametrize("form", PROJECTED)
def test_a_normalised_cell_with_a_projection(form):
    for P in (3, 8):
        case = recurrent_case("layer_norm_lstm", 6, 5, 4, 12, proj_size=P, seed=P, **FORMS[form])
        with on_host():
            check(case.packed() if "packed" in form else case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_projection_among_the_steps_of_every_dtype(dtype):
    for form in ("resets, lengths", "packed"):
        case = recurrent_case(
            "layer_norm_lstm", 6, 5, 4, 20, proj_size=8, dtype=dtype, **FORMS[form]
        )
        case = case.packed() if "packed" in form else case
        with on_host():
            fn = ours(case) if dtype == torch.float64 else by_op(case)
            check(case, fn=fn, baseline=None if dtype == torch.float64 else case.reference())


def test_a_projection_among_the_steps_at_the_edges():
    for T, B, H, P in ((1, 1, 1, 1), (2, 0, 4, 2), (2, 1, 5, 4), (3, 2, 4, 5)):
        case = recurrent_case("layer_norm_lstm", T, B, 3, H, proj_size=P, bidirectional=True)
        with on_host():
            check(case)
    case = recurrent_case("layer_norm_lstm", 0, 3, 3, 4, proj_size=2, bidirectional=True)
    with on_host():
        check(case, fn=by_op(case))


@pytest.mark.parametrize("form", ["lengths", "packed"])
@pytest.mark.parametrize("cell, P", [("lstm", 0), ("lstm", 3), ("gru", 0), ("zoneout_lstm", 3),
                                     ("zoneout_lstm", 0), ("layer_norm_lstm", 3)])  # fmt: skip
def test_what_is_kept_is_as_large_as_tracing_is_told(cell, P, form):
    kind = op.CELLS[cell]
    case = recurrent_case(kind.reference, 6, 5, 4, 8, proj_size=P, **FORMS[form])
    case = case.packed() if form == "packed" else case
    D = 1 + case.options["bidirectional"]
    x, h0, c0, *weights = (*list(case.inputs.values())[: 1 + kind.states], None)[:3] + tuple(
        as_matrix(kind.reference, list(case.inputs.values())[1 + kind.states :], True, D)
    )
    widths = (P or 8, 8)[: kind.states]
    masks = [torch.zeros(*x.shape[:-1], w) for w in widths * D] if kind.masks else []
    sizes, lengths = (case.keywords.get(name) for name in ("batch_sizes", "lengths"))
    given = (weights, True, D, sizes, lengths, None, masks, True)
    with on_host(layers=False):
        found = recurrent_cuda.forward(kind.number, x, h0, c0, *given)
    with FakeTensorMode():
        fake = lambda t: None if t is None else torch.empty(t.shape, dtype=t.dtype, device="cuda")  # noqa: E731
        weights = [fake(w) for w in weights]
        given = (weights, True, D, sizes, fake(lengths), None, [fake(m) for m in masks], True)
        said = op._fwd_fake(kind.number, fake(x), fake(h0), fake(c0), *given)
    assert [t.shape for t in said] == [t.shape for t in found]


def test_what_no_weight_wants_is_not_made():
    case = case_of("lstm", "both directions", 8)
    inputs = list(case.inputs)
    with on_host():
        for wrt in (["x"], inputs[-2:], inputs[3:5], ["h0"]):
            some = run_with_grads(ours(case), case.inputs, case.cotangents, wrt=wrt)
            everything = run_with_grads(ours(case), case.inputs, case.cotangents)
            for name in wrt:
                assert torch.equal(some[f"grad {name}"], everything[f"grad {name}"])


@pytest.mark.parametrize(
    "cell, once, each",
    [
        ("lstm", {}, {"aten::mm": 1}),
        ("gru", {"aten::copy_": 1}, {"aten::mm": 1}),
        ("layer_norm_lstm", {}, {"aten::mm": 1}),
    ],
)
def test_a_step_is_one_product_beside_its_kernel(cell, once, each):
    """As csrc/cuda/README.md counts launches; a decoder's steps are calls of one step each."""
    kind, H = op.CELLS[cell], 8
    biases = kind.gates if cell == "layer_norm_lstm" else 0
    for T in (1, 4):
        h, c = torch.zeros(1, 3, H), torch.zeros(1, 3, H) if kind.states == 2 else None
        params = [torch.zeros(kind.params + biases, H)] if kind.params else []
        with on_host(STEP, layers=False), torch.profiler.profile() as seen:
            torch.ops.fastseq.recurrent_cuda_fwd(
                kind.number, STEP, 0, T, torch.zeros(3 * T, kind.gates * H),
                [torch.zeros(kind.gates * H, H)], [], params, [], None, None, None, h, c,
                torch.zeros(3 * T, H), None, *recurrent_cuda.NO_PROJECTION,
            )  # fmt: skip
        launched = ("aten::mm", "aten::copy_")
        found = Counter(event.name for event in seen.events() if event.name in launched)
        assert found == Counter(once) + Counter({name: n * T for name, n in each.items()})


@pytest.mark.parametrize("cell, proj_size", [("lstm", 0), ("lstm", 2), ("gru", 0)])
def test_gradients_of_gradients(cell, proj_size):
    case = recurrent_case(cell, 2, 2, 2, 3, proj_size=proj_size, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in case.inputs.values()]
    with on_host():
        assert torch.autograd.gradgradcheck(ours(case), leaves)


def test_recompute_gives_the_same_bits():
    case = case_of("gru", "resets, lengths", 8)
    with on_host(recurrent_cuda.ANY_WAY):
        expected = bits(case)
        found = run_with_grads(
            ours(case, recompute=True), case.inputs, case.cotangents, names=case.names
        )
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
