"""Layers inside the worker processes of a data loader."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from fastseq import nn


class Encoded(Dataset):
    """Sequences that a recurrent layer has gone over."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.gru = nn.GRU(6, 10, 2, bidirectional=True)
        self.x = torch.randn(12, 9, 6)

    def __len__(self) -> int:
        return len(self.x)

    @torch.no_grad()
    def __getitem__(self, index: int) -> torch.Tensor:
        return self.gru(self.x[index])[0]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_give_the_bits_of_the_parent(start):
    data = Encoded()
    # Several threads have run in this process before it forks.
    torch.set_num_threads(2)
    big = nn.LSTM(64, 64)
    big(torch.randn(20, 32, 64))[0].sum().backward()
    expected = [data[index] for index in range(len(data))]
    loader = DataLoader(data, 4, num_workers=2, multiprocessing_context=start, timeout=60)
    assert torch.equal(torch.cat(list(loader)), torch.stack(expected))
