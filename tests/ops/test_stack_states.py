"""fastseq::stack_states: torch.cat of layers' states, whatever their strides."""

from __future__ import annotations

import pytest
import torch

from fastseq import _native
from fastseq.ops.stack_states import stack_states

if not _native.loaded():
    pytest.skip(str(_native.why_not_loaded()), allow_module_level=True)


def states(dtype=torch.float64, rows=(2, 2, 1), batch=3):
    wide = [torch.randn(n, 5, batch, dtype=dtype) for n in rows]
    return [t.transpose(1, 2).requires_grad_() for t in wide]


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_is_cat(dtype, batch):
    given = states(dtype, batch=batch)
    found, expected = stack_states(given), torch.cat(given)
    assert torch.equal(found, expected) and found.is_contiguous()
    cotangent = torch.randn_like(found)
    pairs = (torch.autograd.grad(y, given, cotangent) for y in (found, expected))
    assert all(map(torch.equal, *pairs))


def test_registration():
    torch.library.opcheck(torch.ops.fastseq.stack_states.default, (states(),))
    assert torch.autograd.gradgradcheck(lambda *t: stack_states(t).square(), states())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "at least one"),
        ([torch.ones(2)], "3 dimensions"),
        ([torch.ones(1, 2, 3), torch.ones(1, 2, 4)], "states of shape"),
    ],
)
def test_what_does_not_fit(given, said):
    with pytest.raises(RuntimeError, match=f"^fastseq.stack_states: .*{said}"):
        stack_states(given)
