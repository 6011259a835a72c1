"""What torchrun starts for test_parallel.py: every process checks that the team trained as one.

In float64 and by plain gradient descent, so that two orders of summation cannot part the runs:
Adam would divide what rounding leaves of a gradient near zero by its own size.
"""

from __future__ import annotations

import copy
import random

import torch
from torch import distributed as dist
from torch import nn as plain
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastseq import nn
from fastseq.testing import assert_close_to_reference
from fastseq.training import loop
from fastseq.training.data import make_pair
from fastseq.training.model import build_model
from fastseq.training.parallel import ALONE, Team, join
from fastseq.training.settings import Settings

ROWS, STEPS, TIME = 6, 5, 7


class Tagger(plain.Module):
    """A model that none of its wrappers knows anything about."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(5, 8, num_layers=2, bidirectional=True)
        self.out = plain.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, B, 5] to [T, B, 3]."""
        return self.out(self.rnn(x)[0])


def whole(model: plain.Module) -> dict[str, torch.Tensor]:
    """The weights, gathered where they are in shards."""
    return {
        name.removeprefix("module."): w.full_tensor() if isinstance(w, DTensor) else w.clone()
        for name, w in model.state_dict().items()
    }


def fit(model: plain.Module, rows: slice) -> dict[str, torch.Tensor]:
    """Some steps on these rows of every batch; the weights after them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(TIME, ROWS, 5, dtype=torch.float64, generator=generator)
        optimizer.zero_grad()
        model(x[:, rows]).square().mean().backward()
        optimizer.step()
    return whole(model)


def assert_same(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], terms: int
) -> None:
    """Within budget of a single process, and the same bits in every process."""
    assert actual.keys() == expected.keys()
    for name, truth in expected.items():
        assert_close_to_reference(actual[name], truth, what=name, terms=terms)
        everyones = [torch.empty_like(truth) for _ in range(dist.get_world_size())]
        dist.all_gather(everyones, actual[name].contiguous())
        assert all(torch.equal(one, actual[name]) for one in everyones), name


def check_wrappers(team: Team) -> None:
    """DistributedDataParallel and FSDP2, as any program would use them."""
    terms = STEPS * TIME * ROWS * 16
    for kind in ("LSTM", "GRU"):
        torch.manual_seed(0)
        model = Tagger(kind).double()
        start = whole(model)
        alone = fit(copy.deepcopy(model), slice(None))
        assert not torch.equal(alone["rnn.weight_hh_l0"], start["rnn.weight_hh_l0"])
        rows = slice(team.rank, None, team.size)
        assert_same(
            fit(plain.parallel.DistributedDataParallel(copy.deepcopy(model)), rows), alone, terms
        )
        sharded = copy.deepcopy(model)
        fully_shard(sharded.rnn)
        fully_shard(sharded)
        assert isinstance(sharded.rnn.weight_hh_l0, DTensor)
        assert_same(fit(sharded, rows), alone, terms)


def check_training(team: Team) -> None:
    """The loop of ``fastseq train``, in which the last batch has fewer rows than processes."""
    rng = random.Random(0)
    sources = [rng.choices(range(4, 12), k=rng.randint(1, 6)) for _ in range(17)]
    pairs = [make_pair(source, source[::-1]) for source in sources]
    results = []
    for members in (team, ALONE):
        torch.manual_seed(0)
        random.seed(0)
        settings = Settings("", "", "", "", embedding=6, hidden=8)
        model = build_model(settings, 12, 12).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        loss, _ = loop.train_epoch(model, pairs, optimizer, 4, 0, 0.5, 1.0, team=members)
        losses = loss, loop.evaluate(model, pairs, 4, members)
        results.append(whole(model) | {"losses": torch.tensor(losses, dtype=torch.float64)})
    # Batches, rows, target tokens, source tokens, widths.
    assert_same(*results, terms=5 * 4 * 8 * 7 * 16)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with join() as two:
        assert two.size == 2
        check_wrappers(two)
        check_training(two)
    print(f"process {two.rank} is content")
