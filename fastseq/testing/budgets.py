"""The error budgets that tests and benchmarks share.

Every tolerance of the project is decided here. Truth is a float64 reference; the yardstick is what
torch's own kernel achieves in the dtype under test, so no tolerance is typed into a test.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = [
    "LOWERED",
    "assert_close_to_reference",
    "assert_lowered_close",
    "assert_matches",
    "assert_results_close",
    "assert_sums_lowered_close",
    "run_with_grads",
]

# Roundings that follow the longest sum behind an element: the bias, the activation, the product
# with another gate, the store. Sums themselves are covered by torch's error. In one element all
# may go the same way; over a tensor they add like independent errors.
_ROUNDINGS = 4


def assert_close_to_reference(
    actual: Tensor,
    expected64: Tensor,
    baseline: Tensor | None = None,
    *,
    what: str = "",
    terms: int | None = None,
    samples: Iterable[Tensor] = (),
) -> None:
    """Assert error(actual) <= 2 x error(baseline) + rounding, in two norms.

    Both the largest absolute error and the Frobenius norm of the error must keep the budget: the
    first sees one wrong element among a million, the second a kernel that is a little worse
    everywhere. Neither divides by single elements, because an element that cancels to nearly
    nothing has no meaningful relative error.

    With ``u`` the unit roundoff of ``actual.dtype``, N the number of finite elements and ``|.|``
    either norm of the expected tensor, rounding is ``k u |expected| u^(-1/(2N))``, with k = 4 for
    the largest error and 2 = sqrt(4) for the Frobenius norm. The last factor is about luck. N
    results can all be small against the terms they were summed from by a factor d with a
    probability near d^N (and torch's N errors can all be small by chance likewise), so the terms
    may be larger than the results by d = u^(-1/(2N)) with a probability near sqrt(u). It is 1.0001
    for a tensor of 64K, 1.7 for 16 elements, 8 for 4; a single element is checked to half its
    digits. A wrong gate, a missed bias or a stale row errs by 1e-3 of the tensor and more,
    thousands of budgets in float32.

    Args:
        actual: result under test, any shape, floating dtype.
        expected64: the truth, float64, same shape.
        baseline: torch's result in the dtype of ``actual``, same shape. None where torch has
            none to offer: the growth of rounding in a sum, sqrt(terms), then stands for it. It
            does so in float64 too, where the truth is rounded as often as torch's result, and
            where the two may be the same arithmetic and so seem to be without error.
        what: name of the tensor for the message.
        terms: length of the longest sum behind one element, for that growth; by default the
            number of elements.
        samples: errors torch made on inputs nearby, for a tensor whose few independent elements
            say little about the error torch is liable to; the largest counts.

    Raises:
        AssertionError: shape, dtype, a NaN or infinity, or an error beyond the budget; names the
            tensor, the error, the budget and the worst element. NaN and infinities must stand
            exactly where the reference, rounded to the dtype, has them.

    Source: the sqrt law of rounding in sums, Higham and Mary, A New Approach to Probabilistic
    Rounding Error Analysis, 2019, theorem 3.1.
    """
    label = what or "tensor"
    if actual.shape != expected64.shape:
        raise AssertionError(
            f"{label}: expected shape {list(expected64.shape)}, got {list(actual.shape)}"
        )
    if expected64.dtype != torch.float64:
        raise AssertionError(f"{label}: the reference must be float64, got {expected64.dtype}")
    if baseline is not None and (baseline.shape, baseline.dtype) != (actual.shape, actual.dtype):
        raise AssertionError(
            f"{label}: expected {baseline.dtype} {list(baseline.shape)} like torch, "
            f"got {actual.dtype} {list(actual.shape)}"
        )
    dtype = actual.dtype
    truth = expected64.detach().cpu()
    rounded = truth.to(dtype).double()
    got = actual.detach().cpu().double()
    _assert_same_specials(got, rounded, label)

    finite = rounded.isfinite()
    count = int(finite.sum())
    if count == 0:
        return
    unit = _unit(dtype)
    rounding = unit * unit ** (-0.5 / count)
    if baseline is None or dtype == torch.float64:
        rounding *= math.sqrt(count if terms is None else terms)
    error = (got - truth).abs().where(finite, 0.0)
    truth = truth.where(finite, 0.0)
    torch_errors = [sample.detach().cpu().double() for sample in samples]
    if baseline is not None:
        torch_errors.append(baseline.detach().cpu().double() - truth)
    torch_errors = [e.where(finite & e.isfinite(), 0.0) for e in torch_errors]
    # Flushing denormals to zero is not an error.
    flush = torch.finfo(dtype).smallest_normal
    for norm, order, roundings, floor in (
        ("largest", math.inf, _ROUNDINGS, flush),
        ("Frobenius", 2, math.sqrt(_ROUNDINGS), flush * math.sqrt(count)),
    ):
        size = float(torch.linalg.vector_norm(error, order))
        own = roundings * rounding * float(torch.linalg.vector_norm(truth, order)) + floor
        by_torch = max((float(torch.linalg.vector_norm(e, order)) for e in torch_errors), default=0)
        if size <= 2 * by_torch + own:
            continue
        at = _index(int(error.argmax()), actual.shape)
        said = "" if baseline is None else f", torch {float(baseline[at]):.9g}"
        raise AssertionError(
            f"{label}: {norm} error {size:.3g} > budget {2 * by_torch + own:.3g} "
            f"(2 x torch's {by_torch:.3g} + rounding {own:.3g}, {dtype}, {count} elements); "
            f"worst at {list(at)}: got {got[at]:.9g}, expected {truth[at]:.9g}{said}"
        )


# Relative errors in the Frobenius norm of a layer whose float32 products are made of bfloat16, by
# torch's names for how many: "high" is the project's target; hi alone leaves 2^-9 of a factor where
# hi and lo leave 2^-18, so "medium" has that times 2^9.
LOWERED = {"high": 2e-5, "medium": 2e-5 * 2**9}


def assert_lowered_close(
    actual: Mapping[str, Tensor | None],
    expected64: Mapping[str, Tensor | None],
    precision: str,
    *,
    what: str = "",
) -> None:
    """Assert that each tensor errs by at most :data:`LOWERED` of its Frobenius norm.

    Args:
        actual, expected64: results of :func:`run_with_grads`, equal names.
        precision: "high" or "medium".
        what: prefix for the message.

    Raises:
        AssertionError: names the tensor, its error and the budget.
    """
    for name, truth in expected64.items():
        got = actual[name]
        if got is None or truth is None:
            assert got is truth, f"{what} {name}: expected {truth}, got {got}"
            continue
        error, size = (float(t.norm()) for t in (got.double() - truth, truth))
        if not error <= LOWERED[precision] * size:
            raise AssertionError(
                f"{what} {name}: error {error:.3g} > budget {LOWERED[precision]:.3g} x {size:.3g}"
            )


def assert_sums_lowered_close(
    actual: Tensor, expected64: Tensor, terms64: Tensor, K: int, precision: str
) -> None:
    """Assert that sums of K products err no more than their factors' parts and float32 can.

    A factor is hi + lo + rest with |lo| <= 2^-9 of it and |rest| <= 2^-18, to first order. With
    "high" lo * lo and both rests are left out of a product, 3 x 2^-18 of it; with "medium" both lo,
    2^-8. Each of up to 3K additions rounds by 2^-24.

    Args:
        actual, expected64: sums under test, and exact.
        terms64: the sums of the products' absolute values.
        K: products in each.
        precision: "high" or "medium".

    Raises:
        AssertionError: an element beyond that.
    """
    unit = {"high": 3 * 2**-18, "medium": 2**-8}[precision] * (1 + 2**-8)
    over = (actual.double() - expected64).abs() / ((unit + 3 * K * 2**-24) * terms64)
    assert float(over.max()) <= 1, f"{precision}: {float(over.max()):.3g} of what it may err by"


def _assert_same_specials(got: Tensor, want: Tensor, label: str) -> None:
    special = ~(got.isfinite() & want.isfinite())
    same = (got == want) | (got.isnan() & want.isnan())
    wrong = special & ~same
    if wrong.any():
        at = _index(int(wrong.to(torch.uint8).argmax()), got.shape)
        raise AssertionError(
            f"{label}: expected {want[at]:.9g}, got {got[at]:.9g} at {list(at)}; "
            f"{int(wrong.sum())} elements differ in being finite, infinite or NaN"
        )


def _index(flat: int, shape: torch.Size) -> tuple[int, ...]:
    index = []
    for extent in reversed(shape):
        index.append(flat % extent)
        flat //= extent
    return tuple(index[::-1])


def assert_results_close(
    actual: Mapping[str, Tensor | None],
    expected64: Mapping[str, Tensor | None],
    baseline: Mapping[str, Tensor | None] | None = None,
    *,
    what: str = "",
    samples: Sequence[Mapping[str, Tensor | None]] = (),
) -> None:
    """Apply :func:`assert_close_to_reference` to each named tensor; None must match None.

    Args:
        actual, expected64, baseline: results of :func:`run_with_grads`, equal names.
        what: prefix for the message, usually the case.
        samples: errors torch made on inputs nearby, by name.
    """
    if actual.keys() != expected64.keys():
        raise AssertionError(f"{what}: expected {list(expected64)}, got {list(actual)}")
    for name, truth in expected64.items():
        label = f"{what} {name}".strip()
        got = actual[name]
        if got is None or truth is None:
            if got is not truth:
                raise AssertionError(f"{label}: expected {truth}, got {got}")
            continue
        yardstick = None if baseline is None else baseline[name]
        nearby = [sample[name] for sample in samples]
        assert_close_to_reference(got, truth, yardstick, what=label, samples=nearby)


def run_with_grads(
    fn: Callable[..., object],
    inputs: Mapping[str, Tensor],
    cotangents: Sequence[Tensor] | None = None,
    *,
    wrt: Collection[str] | None = None,
    names: Sequence[str] | None = None,
) -> dict[str, Tensor | None]:
    """Call ``fn`` and back-propagate fixed cotangents through it.

    Args:
        fn: called with the inputs in order, returns tensors in any nesting of tuples and lists.
        inputs: tensors by name; strides are kept, storage is shared, ``.grad`` is left alone.
        cotangents: one for each output, in order; None runs forward only, under ``no_grad``.
        wrt: names to differentiate; by default every floating input.
        names: names of the outputs; by default ``out0``, ``out1``, ...

    Returns:
        Outputs by name, then ``grad <input>`` for each of ``wrt`` (None where nothing flows).
    """
    if cotangents is None:
        wrt = ()
    elif wrt is None:
        wrt = [name for name, t in inputs.items() if t.is_floating_point()]
    leaves = {name: t.detach().requires_grad_(name in wrt) for name, t in inputs.items()}
    with torch.set_grad_enabled(cotangents is not None):
        outputs = list(_tensors(fn(*leaves.values())))
    names = names or [f"out{i}" for i in range(len(outputs))]
    results: dict[str, Tensor | None] = {
        name: out.detach() for name, out in zip(names, outputs, strict=True)
    }
    if wrt:
        flowing = [
            (out, cotangent.to(out.dtype))
            for out, cotangent in zip(outputs, cotangents or (), strict=True)
            if out.requires_grad
        ]
        grads = torch.autograd.grad(
            [out for out, _ in flowing],
            [leaves[name] for name in wrt],
            [cotangent for _, cotangent in flowing],
            allow_unused=True,
        )
        results |= {f"grad {name}": grad for name, grad in zip(wrt, grads, strict=True)}
    return results


def _tensors(tree: object) -> Iterable[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for branch in tree:
            yield from _tensors(branch)


def assert_matches(
    fn: Callable[..., object],
    reference: Callable[..., object],
    baseline: Callable[..., object] | None,
    inputs: Mapping[str, Tensor],
    cotangents: Sequence[Tensor] | None = None,
    *,
    wrt: Collection[str] | None = None,
    names: Sequence[str] | None = None,
    what: str = "",
    baseline_under: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> dict[str, Tensor | None]:
    """Compare ``fn`` with ``reference`` in float64, ``baseline`` being torch in the same dtype.

    Torch's error on one input is one draw: where few elements are independent (H = 1, say), it is
    small by chance once in some thousand tensors, even measured against torch itself. A result
    beyond the budget is therefore judged again by the largest error torch makes on that input and
    on sixteen others, drawn from a fixed seed: eight within 1 % of it, and eight near enough to be
    as ill conditioned (normalising values that are nearly equal is; 1 % away they are not), but for
    every rounding to fall anew. A defect gains nothing from it.

    In float64 there is nothing to measure torch against, and the truth is as wrong as torch is.
    There its errors are those it makes in float32, on all these inputs, scaled by the ratio of the
    unit roundoffs.

    Args:
        fn, reference, baseline: called with the inputs in order, equal outputs.
        inputs, cotangents, wrt, names: as in :func:`run_with_grads`; the reference gets them
            in float64, so all three see the same numbers.
        what: name of the case for the message.
        baseline_under: a context for the baseline's passes, such as
            :class:`fastseq.testing.TF32Products`.

    Returns:
        The results of ``fn``, outputs and gradients by name.
    """
    if cotangents is not None and wrt is None:
        wrt = [name for name, t in inputs.items() if t.is_floating_point()]
    exact_cotangents = None if cotangents is None else [c.double() for c in cotangents]

    def truth_and_torch(
        values: Mapping[str, Tensor], by_torch: Callable[..., object] | None
    ) -> tuple[dict, dict | None]:
        exact = {n: t.detach().double() if t.is_floating_point() else t for n, t in values.items()}
        truth = run_with_grads(reference, exact, exact_cotangents, wrt=wrt, names=names)
        if by_torch is None:
            return truth, None
        with baseline_under():
            return truth, run_with_grads(by_torch, values, cotangents, wrt=wrt, names=names)

    actual = run_with_grads(fn, inputs, cotangents, wrt=wrt, names=names)
    truth, by_torch = truth_and_torch(inputs, baseline)
    try:
        assert_results_close(actual, truth, by_torch, what=what)
    except AssertionError:
        wide = all(t.dtype == torch.float64 for t in actual.values() if t is not None)
        if baseline is None and not wide:
            raise
        scale = _unit(torch.float64) / _unit(torch.float32) if wide else 1.0
        samples = [
            {n: None if near[n] is None else (got[n].double() - near[n]) * scale for n in near}
            for near, got in (
                truth_and_torch(values, baseline or reference)
                for values in _nearby(inputs, torch.float32 if wide else None)
            )
        ]
        assert_results_close(actual, truth, by_torch, what=what, samples=samples)
    return actual


def _unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _nearby(inputs: Mapping[str, Tensor], dtype: torch.dtype | None) -> Iterable[dict[str, Tensor]]:
    """Inputs near these: in another dtype, these themselves; then sixteen others."""
    generator = torch.Generator().manual_seed(0)

    def shaken(t: Tensor, by: float) -> Tensor:
        if not t.is_floating_point():
            return t
        if by:
            by = max(by, 4 * _unit(dtype or t.dtype))
        noise = (torch.rand(t.shape, generator=generator, device="cpu") * 2 - 1) * by
        return (t.detach().double() * (1 + noise.to(t.device))).to(dtype or t.dtype)

    if dtype is not None:
        yield {name: shaken(t, 0.0) for name, t in inputs.items()}
    for by in (*[0.01] * 8, *[3e-4] * 8):
        yield {name: shaken(t, by) for name, t in inputs.items()}
