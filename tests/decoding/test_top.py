"""The best of many scores: values, and which of equal ones, against a stable sort."""

from __future__ import annotations

import pytest
import torch

from fastseq.decoding import _top
from fastseq.decoding._top import descending, top

WIDE = _top.GROUPED_FROM


@pytest.mark.parametrize("V", [1, 2, 11, 300, WIDE - 1, WIDE, WIDE + 1, WIDE + 7, 2 * WIDE + 3])
@pytest.mark.parametrize("k", [1, 5, 10, 11])
@pytest.mark.parametrize("levels", [None, 3, 40, 2000])
def test_top_is_the_head_of_a_stable_sort(V, k, levels):
    """With few levels nearly all scores are equal to others, within and across groups."""
    generator = torch.Generator().manual_seed(V + k)
    scores = torch.randn(7, V, generator=generator)
    if levels is not None:
        scores = torch.randint(levels, (7, V), generator=generator).float()
    scores[0, V // 2 :] = -torch.inf
    k = min(k, V - V // 2) if V // 2 else 1
    values, indices = top(scores, k)
    expected = descending(scores)
    assert torch.equal(values, expected[0][:, :k])
    finite = values > -torch.inf
    assert torch.equal(indices[finite], expected[1][:, :k][finite])


def test_an_equal_in_a_group_that_was_not_looked_at():
    """Twelve groups whose maxima are equal, of which a top of ten may look at eleven."""
    scores = torch.zeros(1, WIDE)
    groups = WIDE // _top.GROUP
    places = torch.arange(12) * (groups // 13) + groups * (torch.arange(12) % _top.GROUP)
    scores[0, places] = 1.0
    assert torch.equal(top(scores, 10)[1][0], places.sort().values[:10])
