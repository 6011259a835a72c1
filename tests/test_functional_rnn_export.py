"""torch.export of every recurrent function, and of the layers torch lacks: the kernel inside."""

from __future__ import annotations

import io

import pytest
import torch

from fastseq import _native
from fastseq.testing import recurrent_case
from tests.fuzz_recurrent import MODULES, TORCHS, ours

FORMS = {
    "both directions": dict(num_layers=2, bidirectional=True),
    "resets": dict(resets=0.3, batch_first=True),
    "no state, no bias": dict(hx=False, bias=False),
}


def saved_and_loaded(program: torch.export.ExportedProgram) -> torch.nn.Module:
    assert not _native.loaded() or "recurrent_fwd" in str(program.graph)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


def flat(tree) -> list[torch.Tensor]:
    return torch.utils._pytree.tree_leaves(tree)


class Calls(torch.nn.Module):
    """A function as the module that torch.export asks for."""

    def __init__(self, fn) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *inputs):
        return self.fn(*inputs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", MODULES)
def test_functions(cell, form):
    case = recurrent_case(cell, 3, 2, 4, 5, **FORMS[form])
    inputs = tuple(case.inputs.values())
    loaded = saved_and_loaded(torch.export.export(Calls(ours(case)), inputs))
    assert all(map(torch.equal, loaded(*inputs), ours(case)(*inputs)))


@pytest.mark.parametrize("cell", [cell for cell in MODULES if TORCHS[cell] is None])
def test_layers_torch_lacks_at_other_steps_and_rows(cell):
    module = MODULES[cell](4, 5, 2, bidirectional=True).eval()
    free = {0: torch.export.Dim("T"), 1: torch.export.Dim("B")}
    program = torch.export.export(module, (torch.randn(3, 2, 4),), dynamic_shapes=(free,))
    loaded, x = saved_and_loaded(program), torch.randn(7, 5, 4)
    assert all(map(torch.equal, flat(loaded(x)), flat(module(x))))
