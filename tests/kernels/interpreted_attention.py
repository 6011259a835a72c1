"""What only Triton's interpreter shows of the attention kernels: the order of their accesses.

Run by test_attention.py, with test_attention_gpu.py, in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import pytest
import torch

from fastseq import functional
from fastseq.testing import run_with_grads
from fastseq.testing_attention import attention_case
from tests.kernels.on_device import INTERPRETED, processors  # noqa: F401
from tests.kernels.ordered_accesses import Accesses

assert INTERPRETED, "expected TRITON_INTERPRET=1"

RACED = [(2, 3, 40, 35, 33), (2, None, 40, 35, 33), (1, 17, 70, 33, 5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("score", ["additive", "dot"])
def test_nothing_depends_on_which_thread_comes_first(score, dtype):
    for size in RACED:
        where = {"lengths": True, "mask": "query" if size[1] else "source"}
        case = attention_case(score, *size, extra=True, dtype=dtype, **where)
        with Accesses() as accesses:
            run_with_grads(case.functional(functional), case.inputs, case.cotangents)
        assert not accesses.conflicts, f"{case}: {accesses.conflicts[:3]}"
        assert accesses.launches >= 2


def test_a_missing_barrier_is_seen(processors):  # noqa: F811
    """Each of those of each kernel."""
    for score in ("additive", "dot"):
        case = attention_case(score, 1, 3, 70, 35, 33)
        leaves = [t.clone().requires_grad_() for t in case.inputs.values()]
        for without in range(1 if processors else 2):
            with Accesses(without) as forward:
                outputs = case.functional(functional)(*leaves)
            assert 0 in {launch for launch, _ in forward.conflicts}, (score, without)
        for without in range(2):
            # What only writes has nothing to wait for, nor has what has but a block to add to: in
            # parts that leaves the launch that makes d_e of d_p.
            expected = {0} if score == "dot" else {0, 1}
            if processors:
                expected = {1} if without else set()
            with Accesses(without) as backward:
                torch.autograd.grad(outputs, leaves, case.cotangents, retain_graph=True)
            assert {launch for launch, _ in backward.conflicts} == expected, (score, without)
